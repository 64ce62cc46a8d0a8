"""Files of frames: what is written comes back, with its settings, or nothing is written at all."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from minidit import video
from minidit.metrics import psnr
from minidit.video import check_output, read_settings, read_video, sidecar_path, to_frames, write_video

av = pytest.importorskip("av")

SETTINGS = {
    "minidit": "0.1",
    "prompt": 'un café, "rouge" 赤',
    "seed": 7,
    "prompts": ["x" * 300] * 20,
}  # over 6 kB


def moving_disc(T: int = 17, H: int = 64, W: int = 64) -> np.ndarray:
    """A red disc crossing a colour ramp. -> (T, H, W, 3) uint8"""
    y, x = np.mgrid[:H, :W]
    frames = np.empty((T, H, W, 3), np.uint8)
    for t in range(T):
        frames[t] = np.stack([x * 255 // W, y * 255 // H, np.full_like(x, 90)], -1)
        frames[t][(x - W * (0.2 + 0.6 * t / T)) ** 2 + (y - H / 2) ** 2 < (H * 0.18) ** 2] = (230, 40, 30)
    return frames


def listing(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


def test_to_frames_clamps_truncates_and_puts_channels_last():
    line = torch.tensor([-3.0, -1.0, 0.0, 0.999, 1.0, 2.0])  # 0 is level 127.5, 0.999 is 254.87
    values = line.expand(3, 1, 2, 6).clone()
    values[2] = -1
    frames = to_frames(values)
    assert frames.shape == (1, 2, 6, 3) and frames.dtype == np.uint8
    assert frames[0, 1, :, 0].tolist() == [0, 0, 127, 254, 255, 255]
    assert not frames[..., 2].any()
    assert np.array_equal(to_frames(values.bfloat16())[..., 1][0, 0, [0, 1, 2, 5]], [0, 0, 127, 255])


def test_to_frames_refuses_batches_and_nan():
    with pytest.raises(ValueError, match=r"wanted \(3, T, H, W\)"):
        to_frames(torch.zeros(1, 3, 2, 4, 4))
    with pytest.raises(ValueError, match="NaN"):
        to_frames(torch.full((3, 1, 4, 4), torch.nan))


def test_npz_gives_back_every_byte(tmp_path):
    frames = moving_disc()
    write_video(tmp_path / "out.npz", frames, fps=23.976, settings=SETTINGS)
    back, fps = read_video(tmp_path / "out.npz")
    assert np.array_equal(back, frames) and fps == 23.976


def test_png_of_one_frame_is_that_frame(tmp_path):
    frames = moving_disc(1, 24, 40)
    write_video(tmp_path / "out.png", frames, fps=16, settings=SETTINGS)
    back, fps = read_video(tmp_path / "out.png")
    assert np.array_equal(back, frames) and fps is None


def test_png_sheet_holds_the_frames_row_by_row(tmp_path):
    frames = moving_disc(5, 16, 24)
    write_video(tmp_path / "out.png", frames, fps=16, settings=SETTINGS)
    sheet, _ = read_video(tmp_path / "out.png")
    assert sheet.shape == (1, 48, 48, 3)  # two columns, three rows, the last cell is black
    cells = [sheet[0, 16 * i : 16 * i + 16, 24 * j : 24 * j + 24] for i in range(3) for j in range(2)]
    assert all(np.array_equal(cell, frame) for cell, frame in zip(cells[:5], frames, strict=True))
    assert not cells[5].any()


@pytest.mark.parametrize("fps", [16, 7.5, 23.976, 30000 / 1001])
def test_mp4_keeps_size_length_rate_and_looks(tmp_path, fps):
    frames = moving_disc(9, 48, 40)
    write_video(tmp_path / "out.mp4", frames, fps=fps, settings=SETTINGS)
    back, back_fps = read_video(tmp_path / "out.mp4")
    assert back.shape == frames.shape and back.dtype == np.uint8
    assert back_fps == pytest.approx(fps, rel=1e-9)
    luma = [(x @ [0.2126, 0.7152, 0.0722] / 255)[..., None].repeat(3, -1) for x in (back, frames)]
    assert (
        psnr(*luma) > 46
    )  # dB, measured 50; in RGB the hard red edge loses its chroma resolution, whatever crf


def test_mp4_chroma_lies_on_the_even_columns(tmp_path):
    ramp = np.full((1, 32, 64, 3), 100, np.uint8)
    ramp[..., 0] = np.linspace(40, 215, 64).round()
    ramp[..., 2] = ramp[..., ::-1, 0]
    write_video(tmp_path / "a.mp4", ramp, fps=16, settings=SETTINGS)
    with av.open(tmp_path / "a.mp4") as container:
        planes = next(container.decode(video=0)).to_ndarray()  # (48, 64): Y (32, 64), U and V (16, 32) folded
    v = planes[40:].reshape(16, 32).mean(0)
    red, green, blue = ramp[0, 0].T / 255
    wanted = 128 + 224 * (red - (0.2126 * red + 0.7152 * green + 0.0722 * blue)) / 1.5748
    assert abs((v - wanted[::2])[2:-2].mean()) < 0.3  # levels; halfway to the odd columns would be 0.7


COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (250, 120, 10), (40, 200, 90)]


@pytest.mark.parametrize("colour", COLOURS)
def test_mp4_colours_are_bt709_limited_range(tmp_path, colour):
    write_video(tmp_path / "a.mp4", np.full((2, 32, 32, 3), colour, np.uint8), fps=16, settings=SETTINGS)
    back, _ = read_video(tmp_path / "a.mp4")
    assert np.abs(back.astype(int) - colour).max() <= 2  # 8-bit limited range has steps of 1.16 levels
    with av.open(tmp_path / "a.mp4") as container:
        planes = next(container.decode(video=0)).to_ndarray()  # (48, 32): Y, then U and V at half size
    r, g, b = (c / 255 for c in colour)
    luma = 0.2126 * r + 0.7152 * g + 0.0722 * b  # BT.709; green would be 0.587 in BT.601, 29 levels away
    y, u, v = 16 + 219 * luma, 128 + 224 * (b - luma) / 1.8556, 128 + 224 * (r - luma) / 1.5748
    assert [planes[5, 5], planes[34, 5], planes[42, 5]] == pytest.approx([y, u, v], abs=1.01)  # rounding


def test_mp4_is_tagged_and_starts_fast(tmp_path):
    from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc

    write_video(tmp_path / "a.mp4", moving_disc(3, 32, 32), fps=16, settings=SETTINGS)
    with av.open(tmp_path / "a.mp4") as container:
        codec = container.streams.video[0].codec_context
        assert (codec.name, codec.pix_fmt) == ("h264", "yuv420p")
        assert (codec.colorspace, codec.color_range) == (Colorspace.ITU709, ColorRange.MPEG)
        assert (codec.color_primaries, codec.color_trc) == (ColorPrimaries.BT709, ColorTrc.BT709)
    data = (tmp_path / "a.mp4").read_bytes()
    assert 0 < data.index(b"moov") < data.index(b"mdat")


def test_gif_plays_all_frames_for_ever_in_near_colours(tmp_path):
    frames = moving_disc()
    write_video(tmp_path / "out.gif", frames, fps=16, settings=SETTINGS)
    back, fps = read_video(tmp_path / "out.gif")
    assert back.shape == frames.shape and fps == pytest.approx(16, rel=0.01)
    assert np.abs(back.mean((1, 2)) - frames.mean((1, 2))).max() < 1.5  # dithering keeps the mean, in levels
    assert psnr(back, frames) > 30
    assert b"NETSCAPE2.0\x03\x01\x00\x00\x00" in (tmp_path / "out.gif").read_bytes()  # zero is for ever


@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
@pytest.mark.parametrize("T", [1, 4])
def test_still_videos_keep_every_frame(tmp_path, suffix, T):
    frames = np.full((T, 16, 16, 3), 77, np.uint8)
    write_video(tmp_path / f"a{suffix}", frames, fps=16, settings=SETTINGS)
    assert np.abs(read_video(tmp_path / f"a{suffix}")[0].astype(int) - frames).max() <= 2


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".png", ".npz", ".MP4"])
def test_settings_lie_in_the_file_and_beside_it(tmp_path, suffix):
    path = tmp_path / f"out{suffix}"
    write_video(path, moving_disc(2, 16, 16), fps=16, settings=SETTINGS)
    assert listing(tmp_path) == {f"out{suffix}", f"out{suffix}.json"}
    assert read_settings(sidecar_path(path)) == SETTINGS
    sidecar_path(path).unlink()
    assert read_settings(path) == SETTINGS


def test_the_sidecar_serves_a_file_that_lost_its_settings(tmp_path):
    path = tmp_path / "out.webm"  # a copy made by another program
    path.write_bytes(b"anything")
    sidecar_path(path).write_text(json.dumps(SETTINGS))
    assert read_settings(path) == SETTINGS


def test_files_of_others_carry_no_settings(tmp_path):
    with av.open(tmp_path / "other.mp4", "w") as container:
        container.metadata["comment"] = "a holiday"
        stream = container.add_stream("libx264", rate=16)
        stream.width = stream.height = 16
        container.mux(stream.encode(av.VideoFrame(16, 16)))
        container.mux(stream.encode(None))
    (tmp_path / "other.json").write_text('{"seed": 1}')
    (tmp_path / "other.gif").write_bytes(b"GIF89a\x01\0\x01\0\0\0\0;")
    (tmp_path / "other.png").write_bytes(b"no picture")
    np.savez(tmp_path / "other.npz", x=np.zeros(1))
    for name in ("other.mp4", "other.json", "other.gif", "other.png", "other.npz"):
        with pytest.raises(ValueError, match=f"{name} carries no minidit settings"):
            read_settings(tmp_path / name)
    with pytest.raises(ValueError, match="lacks fps, frames"):
        read_video(tmp_path / "other.npz")
    with pytest.raises(FileNotFoundError, match="absent.mp4"):
        read_settings(tmp_path / "absent.mp4")
    with pytest.raises(FileNotFoundError, match="absent.mp4"):
        read_video(tmp_path / "absent.mp4")


def test_existing_files_are_replaced(tmp_path):
    for value in (10, 200):
        frames = np.full((1, 8, 8, 3), value, np.uint8)
        write_video(tmp_path / "a.npz", frames, fps=16, settings={"minidit": "1", "value": value})
    assert read_video(tmp_path / "a.npz")[0].max() == 200
    assert (
        read_settings(tmp_path / "a.npz")
        == read_settings(tmp_path / "a.npz.json")
        == {"minidit": "1", "value": 200}
    )


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".png", ".npz"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, suffix, error):
    path = tmp_path / f"out{suffix}"
    path.write_text("old")
    writer = getattr(video, f"_write_{suffix[1:]}")

    def cut_off(*args):
        writer(*args)
        raise error("cut")

    monkeypatch.setattr(video, f"_write_{suffix[1:]}", cut_off)
    with pytest.raises(error, match="cut"):
        write_video(path, moving_disc(2, 16, 16), fps=16, settings=SETTINGS)
    assert path.read_text() == "old" and listing(tmp_path) == {path.name}


def test_what_cannot_be_written_is_refused_and_leaves_nothing(tmp_path):
    good = moving_disc(2, 16, 16)
    refusals = [
        ("a.mp4", good[:, :15], 16, SETTINGS, "even size, got 16x15"),
        ("a.mp4", good.astype(np.float32), 16, SETTINGS, "float32"),
        ("a.mp4", good[:0], 16, SETTINGS, "wanted uint8"),
        ("a.mp4", good[0], 16, SETTINGS, "wanted uint8"),
        ("a.mp4", good, 0, SETTINGS, "fps=0"),
        ("a.mp4", good, float("nan"), SETTINGS, "fps=nan"),
        ("a.mp4", good, 16, {"seed": 1}, "'minidit'"),
        ("a.gif", good, 60, SETTINGS, "at most 50"),
    ]
    for name, frames, fps, settings, message in refusals:
        with pytest.raises(ValueError, match=message):
            write_video(tmp_path / name, frames, fps=fps, settings=settings)
    assert listing(tmp_path) == set()


def test_check_output_names_the_obstacle(tmp_path, monkeypatch):
    check_output(tmp_path / "fine.mp4")
    monkeypatch.chdir(tmp_path)
    check_output("fine.GIF")
    with pytest.raises(ValueError, match=r"'.avi' in .*one of .mp4, .gif, .png, .npz"):
        check_output(tmp_path / "a.avi")
    with pytest.raises(FileNotFoundError, match="absent does not exist"):
        check_output(tmp_path / "absent" / "a.mp4")
    (tmp_path / "b.mp4").mkdir()
    (tmp_path / "c.mp4.json").mkdir()
    for name in ("b.mp4", "c.mp4"):
        with pytest.raises(IsADirectoryError, match=f"{name}.*is a folder"):
            check_output(tmp_path / name)
    monkeypatch.setattr(os, "access", lambda *args: False)  # a real read-only folder would not stop root
    with pytest.raises(PermissionError, match="no permission"):
        check_output(tmp_path / "fine.mp4")
    with pytest.raises(PermissionError, match="no permission"):
        write_video(tmp_path / "fine.mp4", moving_disc(1, 16, 16), fps=16, settings=SETTINGS)
