"""Frames to files and back: mp4, gif, png and npz, each carrying the settings that made it.

Frames are uint8 RGB arrays (T, H, W, 3). Settings are a JSON object with the key "minidit" (the version that
wrote them); they lie inside the file and, since editors and web sites strip metadata, also beside it:
out.mp4 has out.mp4.json.
"""

import json
import math
import os
import struct
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile, is_zipfile

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    import av  # imported where it is used: a reader of npz files needs no FFmpeg

SUFFIXES = (".mp4", ".gif", ".png", ".npz")
GIF_MAX_FPS = 50  # browsers slow down a gif whose frames last less than two hundredths of a second
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# FFmpeg's SWS_BICUBIC, FULL_CHR_H_INT, FULL_CHR_H_INP and ACCURATE_RND; the default conversion loses 3 dB
EXACT = 0x4 | 0x2000 | 0x4000 | 0x40000  # numbers: PyAV before 18 has no names for the last three
GIF_COMMENT = 0xFE  # label of the comment extension


def to_frames(video: Tensor, *, rounds: bool = False) -> np.ndarray:
    """Turn a decoded video into frames. video (3, T, H, W) in [-1, 1] -> (T, H, W, 3) uint8.

    Values outside are clamped and levels truncated, as in the original Wan release, or rounded.
    """
    if video.ndim != 4 or video.shape[0] != 3:
        raise ValueError(
            f"to_frames: video is {tuple(video.shape)}, wanted (3, T, H, W); pass one sample at a time"
        )
    if video.isnan().any():
        raise ValueError(
            "to_frames: video holds NaN, wanted numbers in [-1, 1]; try another dtype for the VAE"
        )
    levels = (video.float().clamp(-1, 1) + 1) / 2 * 255 + 0.5 * rounds
    return levels.to(torch.uint8).permute(1, 2, 3, 0).contiguous().cpu().numpy()  # (T, H, W, 3)


def check_output(path: str | Path, fps: float | None = None) -> None:
    """Raise before the work what write_video would raise after it: suffix, folder, permission, fps."""
    path = Path(path)
    if path.suffix.lower() == ".gif" and fps is not None and fps > GIF_MAX_FPS:
        raise ValueError(f"a gif plays at most {GIF_MAX_FPS} frames per second, got {fps:g}; write an mp4")
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(
            f"unknown output format {path.suffix!r} in {path}; choose one of {', '.join(SUFFIXES)}"
        )
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: folder {path.parent} does not exist; create it first")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise PermissionError(
            f"cannot write {path}: no permission to write in {path.parent}; choose another folder"
        )
    for target in (path, sidecar_path(path)):
        if target.is_dir():
            raise IsADirectoryError(f"cannot write {target}: it is a folder; choose another name")


def write_video(
    path: str | Path,
    frames: np.ndarray | Iterator[np.ndarray],
    *,
    fps: float,
    settings: dict[str, Any],
) -> None:
    """Write frames in the format of path's suffix, and settings into the file and its sidecar.

    frames (T, H, W, 3) uint8, or pieces of it one after the other, which an mp4 takes piece by piece · fps
    frames per second, may be fractional. .mp4 and .gif (which loops) hold the video, .png one sheet with the
    frames row by row, .npz the arrays themselves; the last two are lossless.
    Existing files are replaced. A file appears whole or not at all, also when the run is interrupted.
    """
    path = Path(path)
    check_output(path, fps)
    rate, text = _rate(fps), _to_text(settings)
    pieces = iter([_check_frames(frames)]) if isinstance(frames, np.ndarray) else map(_check_frames, frames)
    with whole_file(sidecar_path(path)) as partial_sidecar, whole_file(path) as partial:
        partial_sidecar.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        match path.suffix.lower():
            case ".mp4":
                _write_mp4(partial, pieces, rate, text)
            case ".gif":
                _write_gif(partial, np.concatenate(list(pieces)), rate, text)
            case ".png":
                _write_png(partial, np.concatenate(list(pieces)), text)
            case ".npz":
                _write_npz(partial, np.concatenate(list(pieces)), fps, text)


def write_png(path: Path, frames: np.ndarray, settings: dict[str, Any]) -> None:
    """One picture of frames (T, H, W, 3) uint8, with settings inside and no sidecar. path: from whole_file"""
    _write_png(path, _check_frames(frames), _to_text(settings))


def read_video(path: str | Path) -> tuple[np.ndarray, float | None]:
    """Read frames and frames per second of an mp4, gif or npz; a png is one frame, without fps.

    -> (T, H, W, 3) uint8, fps or None. A gif keeps times in hundredths of a second, so its fps is only near
    the one that was written. A png sheet comes back as the sheet.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(
            f"cannot read {path}: unknown format {path.suffix!r}, wanted one of {', '.join(SUFFIXES)}"
        )
    if not path.is_file():
        raise FileNotFoundError(f"cannot read {path}: no such file")
    match path.suffix.lower():
        case ".npz":
            return _read_npz(path)
        case ".png":
            return _decode(path)[0], None
        case _:
            return _decode(path)


def read_settings(path: str | Path) -> dict[str, Any]:
    """Settings of a file from write_video: its own, else its sidecar's. path may be the sidecar itself.

    They come back as JSON keeps them: a tuple as a list, a number used as a key as a string.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"cannot read settings from {path}: no such file")
    sidecar = sidecar_path(path)
    try:
        settings = _from_text(_own_text(path))
    except (BadZipFile, zlib.error, struct.error, EOFError, IndexError, KeyError, ValueError) as error:
        reason = str(error) or type(error).__name__
        raise ValueError(f"{path} is damaged ({reason}); its sidecar {sidecar.name} may not be") from None
    if settings is None and sidecar.is_file():
        settings = _from_text(sidecar.read_text(encoding="utf-8"))
    if settings is None:
        raise ValueError(
            f"{path} carries no minidit settings and has no {sidecar.name}; give the settings as flags"
        )
    return settings


def sidecar_path(path: str | Path) -> Path:
    """out.mp4 -> out.mp4.json, so that out.mp4 and out.gif have a sidecar each."""
    path = Path(path)
    return path.with_name(path.name + ".json")


def _check_frames(frames: np.ndarray) -> np.ndarray:
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or 0 in frames.shape:
        raise ValueError(
            f"frames are {frames.dtype} {frames.shape}, wanted uint8 (T, H, W, 3); see to_frames"
        )
    return np.ascontiguousarray(frames)


def _rate(fps: float) -> Fraction:
    """The frame rate as a fraction; a denominator of 1001 is what television's 29.97 and 23.976 need."""
    rate = Fraction(fps).limit_denominator(1001) if math.isfinite(fps) else Fraction(0)
    if rate <= 0:
        raise ValueError(f"fps={fps} is not a frame rate; give a positive number such as 16")
    return rate


def _to_text(settings: dict[str, Any]) -> str:
    if "minidit" not in settings:
        raise ValueError(
            "settings lack the key 'minidit', wanted its version; read_settings would refuse them"
        )
    return json.dumps(settings)  # ASCII: what a png text chunk and a gif comment can hold


def _from_text(text: str | None) -> dict[str, Any] | None:
    """The settings in a comment, or None where it is somebody else's comment."""
    try:
        settings = json.loads(text or "")
    except (json.JSONDecodeError, RecursionError):
        return None
    return settings if isinstance(settings, dict) and "minidit" in settings else None


def partial_path(path: Path) -> Path:
    """What a file is called until it is whole."""
    return path.with_name(f".{path.stem}.partial{path.suffix}")


class Unwritten(OSError):
    """The disk refused a file; the message names it."""


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary name in path's folder; it takes path's place on success and vanishes otherwise.

    What the disk refuses is Unwritten, whichever library met it.
    """
    partial = partial_path(path)
    try:
        yield partial
        os.replace(partial, path)
    except Unwritten:  # another file, inside
        raise
    except OSError as error:
        reason = error.strerror or error
        raise Unwritten(f"cannot write {path}: {reason}; make room or choose another folder") from error
    finally:
        partial.unlink(missing_ok=True)


def _write_mp4(path: Path, pieces: Iterator[np.ndarray], rate: Fraction, text: str) -> None:
    """H.264 at crf 10, which the eye cannot tell from the frames, in the colours of BT.709, limited range."""
    import av
    from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc

    first = next(pieces)
    height, width = first.shape[1:3]
    if height % 2 or width % 2:
        raise ValueError(
            f"mp4 needs an even size, got {width}x{height}; crop the frames or write a gif, png or npz"
        )
    graph = _yuv_graph(width, height, rate)
    # faststart: the index comes first, so that a browser plays before it has everything
    with av.open(path, "w", format="mp4", options={"movflags": "+faststart"}) as container:
        container.metadata["comment"] = text
        # mbtree=0: with it, the same small frames give another file from run to run
        options = {"crf": "10", "preset": "medium", "x264-params": "mbtree=0"}
        stream = container.add_stream("libx264", rate=rate, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        codec = stream.codec_context
        codec.colorspace, codec.color_range = Colorspace.ITU709, ColorRange.MPEG
        codec.color_primaries, codec.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        for picture in _pictures(chain(first, chain.from_iterable(pieces)), rate):
            graph.push(picture)
            container.mux(stream.encode(graph.vpull()))
        container.mux(stream.encode(None))


def _write_gif(path: Path, frames: np.ndarray, rate: Fraction, text: str) -> None:
    """One palette of 256 colours for the whole video, error diffusion, endless loop."""
    import av

    height, width = frames.shape[1:3]
    graph = _palette_graph(width, height, rate)
    with av.open(path, "w", format="gif", options={"loop": "0"}) as container:
        stream = container.add_stream("gif", rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, "pal8"
        for picture in _pictures(frames, rate):
            graph.push(picture)
        graph.push(None)  # only now is the palette known
        for _ in frames:
            container.mux(stream.encode(graph.vpull()))
        container.mux(stream.encode(None))
    path.write_bytes(_with_gif_comment(path.read_bytes(), text))


def _pictures(frames: Iterable[np.ndarray], rate: Fraction) -> Iterator["av.VideoFrame"]:
    """Frames as FFmpeg wants them, each with its time."""
    import av

    for i, frame in enumerate(frames):
        picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
        picture.pts, picture.time_base = i, 1 / rate
        yield picture


def _yuv_graph(width: int, height: int, rate: Fraction) -> "av.filter.Graph":
    """RGB frames in, 4:2:0 frames out, really converted as their tags will say."""
    import av

    graph = av.filter.Graph()
    source = graph.add_buffer(width=width, height=height, format=av.VideoFormat("rgb24"), time_base=1 / rate)
    # left is where H.264 players look for chroma; FFmpeg's own choice, the centre, costs 1 dB of PSNR
    target = "out_color_matrix=bt709:out_range=limited:out_chroma_loc=left"
    scale = graph.add("scale", f"{target}:flags=bicubic+accurate_rnd+full_chroma_int+full_chroma_inp")
    graph.link_nodes(source, scale, graph.add("format", "yuv420p"), graph.add("buffersink"))
    graph.configure()
    return graph


def _palette_graph(width: int, height: int, rate: Fraction) -> "av.filter.Graph":
    """RGB frames in, paletted frames out: one branch finds the palette, the other waits for it."""
    import av

    graph = av.filter.Graph()
    source = graph.add_buffer(width=width, height=height, format=av.VideoFormat("rgb24"), time_base=1 / rate)
    split, paint = graph.add("split"), graph.add("paletteuse")
    find = graph.add("palettegen", "reserve_transparent=0")  # nothing is transparent: 256 colours, not 255
    graph.link_nodes(source, split, find)
    find.link_to(paint, 0, 1)
    split.link_to(paint, 1, 0)
    graph.link_nodes(paint, graph.add("buffersink"))
    graph.configure()
    return graph


def _write_png(path: Path, frames: np.ndarray, text: str) -> None:
    """One image with all frames. Written by hand, as it is short and FFmpeg's encoder keeps no text."""
    pixels = _sheet(frames)
    height, width = pixels.shape[:2]
    rows = pixels.reshape(height, width * 3)
    rows = np.concatenate([rows[:1], rows[1:] - rows[:-1]])  # filter 2, "up": difference modulo 256
    rows = np.concatenate([np.full((height, 1), 2, np.uint8), rows], axis=1)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits, RGB, not interlaced
    chunks = (
        (b"IHDR", header),
        (b"tEXt", b"Comment\0" + text.encode()),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    )
    with path.open("wb") as file:
        file.write(PNG_SIGNATURE)
        for kind, body in chunks:
            file.write(
                struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
            )


def _sheet(frames: np.ndarray) -> np.ndarray:
    """Lay frames out row by row, nearly square; cells left over are black. -> (rows*H, columns*W, 3)"""
    T, H, W, _ = frames.shape
    columns = min(T, math.ceil(math.sqrt(T * H / W)))
    rows = math.ceil(T / columns)
    cells = np.zeros((rows * columns, H, W, 3), np.uint8)
    cells[:T] = frames
    return cells.reshape(rows, columns, H, W, 3).swapaxes(1, 2).reshape(rows * H, columns * W, 3)


def _write_npz(path: Path, frames: np.ndarray, fps: float, text: str) -> None:
    with path.open("wb") as file:  # given a name, numpy would add .npz to .NPZ
        np.savez_compressed(file, frames=frames, fps=np.float64(fps), settings=np.array(text))


def _decode(path: Path) -> tuple[np.ndarray, float]:
    """Frames and fps as FFmpeg decodes them, with the matrix and range of the file's tags."""
    import av

    with av.open(path) as container:
        if not container.streams.video:
            raise ValueError(f"{path} holds no video stream; wanted a video or a picture")
        stream = container.streams.video[0]
        pictures = [
            (f.time, f.to_ndarray(format="rgb24", interpolation=EXACT)) for f in container.decode(stream)
        ]
        fps = float(stream.average_rate or stream.base_rate)
    if not pictures:
        raise ValueError(f"{path} holds no frame that can be decoded; it may be cut off, write it again")
    if path.suffix.lower() == ".gif" and len(pictures) > 1:
        # FFmpeg's rate comes from the first few delays, each rounded; the whole length is known better
        fps = (len(pictures) - 1) / (pictures[-1][0] - pictures[0][0])
    return np.stack([rgb for _, rgb in pictures]), fps


def _read_npz(path: Path) -> tuple[np.ndarray, float]:
    with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        missing = {"frames", "fps"} - set(arrays.files)
        if missing:
            raise ValueError(f"{path} lacks {', '.join(sorted(missing))}; wanted an npz from write_video")
        return arrays["frames"], float(arrays["fps"])


def _own_text(path: Path) -> str | None:
    """The comment inside a file, whoever wrote it, or None."""
    match path.suffix.lower():
        case ".mp4":
            return _mp4_comment(path)
        case ".gif":
            return _gif_comment(path.read_bytes())
        case ".png":
            return _png_comment(path.read_bytes())
        case ".npz":
            return _npz_comment(path)
        case ".json":
            return path.read_text(encoding="utf-8")
        case _:
            return None


def _mp4_comment(path: Path) -> str | None:
    import av

    with av.open(path) as container:
        return container.metadata.get("comment")


def _npz_comment(path: Path) -> str | None:
    if not is_zipfile(path):
        raise BadZipFile("it is no npz file")  # numpy would advise to unpickle it
    with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        return str(arrays["settings"]) if "settings" in arrays.files else None


def _png_comment(data: bytes) -> str | None:
    """Walk the chunks: length, kind, body, checksum."""
    at = len(PNG_SIGNATURE)
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        body = data[at + 8 : at + 8 + length]
        if kind == b"tEXt" and body.startswith(b"Comment\0"):
            return body.removeprefix(b"Comment\0").decode("latin-1")
        at += 12 + length
    return None


def _with_gif_comment(data: bytes, text: str) -> bytes:
    """Put a comment extension, in sub-blocks of up to 255 bytes, before the first block of a gif."""
    body = text.encode()
    parts = (body[i : i + 255] for i in range(0, len(body), 255))
    comment = bytes([0x21, GIF_COMMENT]) + b"".join(bytes([len(part)]) + part for part in parts) + b"\0"
    at = _gif_blocks_start(data)
    return data[:at] + comment + data[at:]


def _gif_comment(data: bytes) -> str | None:
    """Walk the extensions before the first image: 0x21, label, sub-blocks, 0."""
    if not data.startswith(b"GIF8"):
        return None
    at = _gif_blocks_start(data)
    while data[at] == 0x21:
        label, body, at = data[at + 1], b"", at + 2
        while size := data[at]:
            body += data[at + 1 : at + 1 + size]
            at += 1 + size
        if label == GIF_COMMENT:
            return body.decode("latin-1")
        at += 1
    return None


def _gif_blocks_start(data: bytes) -> int:
    """Where the blocks of a gif begin: after the 13-byte header and the global palette, if it has one."""
    packed = data[10]
    return 13 + (3 << (packed & 7) + 1 if packed & 0x80 else 0)
