import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from minidit.components import find_class
from minidit.presets import PRESETS
from minidit.vae.tiles import Tiles, blend, video_bytes
from tests.tensors import randn, rel

COGVIDEOX = Tiles((30, 45), (30, 45), (1 / 6, 1 / 5))
SQUARE = Tiles((32, 32), (32, 32))


def ramp(frames: int, height: int, width: int) -> Tensor:
    """Every cell its own number."""
    return torch.arange(frames * height * width, dtype=torch.float32).reshape(1, 1, frames, height, width)


def enlarge(x: Tensor) -> Tensor:
    """Every cell four times, along both sides."""
    return x.repeat_interleave(4, dim=3).repeat_interleave(4, dim=4)


def test_blending_fades_from_the_old_tile_to_the_new():
    before, after = torch.zeros(1, 1, 6), torch.ones(1, 1, 5)
    assert blend(before, after, 4, dim=2).flatten().tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert blend(before, after, 9, dim=2).flatten().tolist() == pytest.approx([0, 0.2, 0.4, 0.6, 0.8])
    assert torch.equal(blend(before, after, 0, dim=2), after)


@pytest.mark.parametrize("tiles", [COGVIDEOX, SQUARE], ids=["cogvideox", "square"])
@pytest.mark.parametrize("height, width", [(30, 45), (31, 45), (60, 90), (47, 80), (24, 33), (97, 20)])
def test_tiles_of_the_same_picture_join_to_the_picture(tiles, height, width):
    plane = ramp(1, height, width)
    rows = tiles.cut(plane)
    assert all(
        tile.shape[3] <= tiles.size[0] and tile.shape[4] <= tiles.size[1] for row in rows for tile in row
    )
    assert torch.allclose(tiles.join(rows), plane, rtol=1e-5)
    assert tiles.is_needed(height, width) == (height > tiles.size[0] or width > tiles.size[1])


def test_tiles_of_the_releases_overlap_by_a_sixth_and_a_fifth_or_a_quarter():
    tiles = Tiles((30, 45), (240, 360), (1 / 6, 1 / 5))
    assert (tiles.strides, tiles.blends, tiles.kept) == ([25, 36], [40, 72], [200, 288])
    tiles = Tiles((32, 32), (256, 256))
    assert (tiles.strides, tiles.blends, tiles.kept) == ([24, 24], [64, 64], [192, 192])


def test_a_tile_is_blended_with_the_one_above_and_then_with_the_one_to_its_left():
    tiles, tile = Tiles((8, 8), (8, 8)), lambda value: torch.full((1, 1, 1, 8, 8), float(value))
    joined = tiles.join([[tile(0), tile(8)], [tile(16), tile(32)]])[0, 0, 0]
    assert joined.shape == (12, 12)  # they overlap by two cells
    assert joined[0].tolist() == [0] * 7 + [4] + [8] * 4
    assert joined[:, 0].tolist() == [0] * 7 + [8] + [16] * 4
    assert joined[7, 7] == ((4 + 32) / 2 + 8) / 2  # 4 and 8: above and to the left, blended already


def test_tiles_that_would_leave_gaps_are_refused():
    with pytest.raises(ValueError, match=r"tiles of \(4, 5\) cells, \(32, 40\) once coded, would leave gaps"):
        Tiles((4, 5), (32, 40), (1 / 6, 1 / 5))


def test_a_clip_is_coded_tile_by_tile_and_kept_by_rows():
    tiles, clip, alive = Tiles((8, 8), (32, 32)), ramp(3, 20, 14), []

    def code(tile: Tensor) -> Tensor:
        alive.append((sum(ref() is not None for _, ref in made), len(made)))
        out = enlarge(tile)
        made.append((tile.shape, weakref.ref(out)))
        return out

    made: list = []
    assert torch.allclose(tiles.apply(code, clip), enlarge(clip), rtol=1e-5)
    assert len(made) == 4 * 3 and max(count for count, _ in alive) <= 2 * 3
    assert torch.equal(tiles.apply(enlarge, clip[..., :8, :8]), enlarge(clip[..., :8, :8]))


class Past:
    """What a coder remembers of a tile."""


def test_a_tile_goes_through_all_its_time_and_is_forgotten_before_the_next():
    tiles, video = Tiles((8, 8), (32, 32)), ramp(7, 20, 14)
    calls, pasts, watched = [], [], []

    def code(tile: Tensor) -> Iterator[Tensor]:
        assert all(past() is None for past in pasts)
        past = Past()
        pasts.append(weakref.ref(past))
        for part in tile.split((1, 2, 4), dim=2):
            calls.append((len(pasts), part.shape[2]))
            yield enlarge(part)

    def watch(found: list[Tensor]) -> Iterator[Tensor]:
        for tile in found:
            watched.append((len(found), tile.shape[3:]))
            yield tile

    parts = list(tiles.stream(code, video, watch))
    assert [part.shape[2] for part in parts] == [1, 2, 4]
    assert torch.allclose(torch.cat(parts, dim=2), enlarge(video), rtol=1e-5)
    assert calls == [(i, frames) for i in range(1, 13) for frames in (1, 2, 4)]
    assert len(watched) == 12 and watched[0] == (12, (8, 8)) and watched[-1] == (12, (2, 2))


def test_pieces_of_tiles_are_let_go_as_they_are_joined():
    tiles, video, made = SQUARE, ramp(3, 40, 50), []

    def code(tile: Tensor) -> Iterator[Tensor]:
        for part in tile.split(1, dim=2):
            made.append(part + 0)
            yield made[-1]
            made[-1] = weakref.ref(made[-1])

    stream = tiles.stream(code, video)
    left = lambda: sum(ref() is not None for ref in made)
    assert [left() for _ in stream] == [12, 6, 0]  # of six tiles


def test_a_plane_no_larger_than_a_tile_is_coded_as_it_is():
    video, seen = ramp(3, 32, 20), []
    pieces = [randn(1, 3, 1, 5, 5), randn(1, 3, 2, 5, 5)]

    def code(x: Tensor) -> Iterator[Tensor]:
        seen.append(x)
        yield from pieces

    watch = lambda tiles: pytest.fail("there are no tiles")
    parts = list(SQUARE.stream(code, video, watch))
    assert seen[0] is video and all(a is b for a, b in zip(parts, pieces, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_and_is_near(dtype):
    plane = randn(1, 3, 1, 60, 40)
    joined = SQUARE.join(SQUARE.cut(plane.to(dtype)))
    assert joined.dtype == dtype and rel(joined.float(), plane) < 0.01  # 8 bits


@pytest.mark.parametrize("height, width", [(240, 304), (256, 256), (480, 832), (720, 1280), (200, 264)])
def test_cells_counts_the_largest_tile_and_all(height, width):
    tiles, plane = Tiles((32, 32), (256, 256)), torch.empty(1, 1, 1, height // 8, width // 8, device="meta")
    sizes = [64 * tile.numel() for row in tiles.cut(plane) for tile in row]
    want = (max(sizes), sum(sizes)) if len(sizes) > 1 and tiles.is_needed(*plane.shape[3:]) else None
    assert tiles.cells(height, width) == (want or (height * width,) * 2)


@pytest.mark.parametrize(
    "preset, part, share",
    [
        ("wan2.1-t2v-1.3b", "vae", 0.1),
        ("latte-1", "vae", 0.2),
        ("latte-1", "vae_2", 0.1),
        ("open-sora-1.2", "vae", 0.65),  # the part over time has no tiles
        ("cogvideox-5b", "vae", 0.15),
    ],
)
def test_an_estimate_counts_one_tile(preset, part, share):
    class_name, config = PRESETS[preset].components[part]
    with torch.device("meta"):
        vae = find_class(class_name)(config)
    small, large = (240, 208, 17, 4), (1280, 720, 17, 4)
    assert vae.activation_bytes(*small, tiled=True) == vae.activation_bytes(*small)
    assert vae.activation_bytes(*large, tiled=True) < share * vae.activation_bytes(*large)
    assert 2 * vae.activation_bytes(1280, 720, 17, 2) == vae.activation_bytes(*large)


def test_the_video_is_counted_once_and_its_pieces_where_they_overlap():
    tiles = Tiles((32, 32), (256, 256))
    assert video_bytes(1280, 720, 10, 4, None) == 10 * 1280 * 720 * 3 * (4 + 1)
    pieces = tiles.cells(720, 1280)[1]
    assert video_bytes(1280, 720, 10, 4, tiles) == 10 * 3 * (4 * pieces + 1280 * 720)
    assert 1280 * 720 < pieces < 2 * 1280 * 720
