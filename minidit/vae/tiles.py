"""Tiles: a plane that is too large to be coded at once is cut into overlapping tiles, which are blended.

Less memory, other pixels: what lies outside a tile is unknown to it. Sizes, overlaps and the order of
blending are those of the original implementations and of diffusers.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

SQUARE = (0.25, 0.25)  # overlap along (H, W) in most families
Watch = Callable[[Sequence[Tensor]], Iterable[Tensor]]  # wraps the tiles as they are coded: a progress bar


def blend(before: Tensor, after: Tensor, extent: int, dim: int) -> Tensor:
    """`after` with its first `extent` cells along dim faded in over the last ones of `before`."""
    extent = min(extent, before.shape[dim], after.shape[dim])
    if extent == 0:
        return after
    share = torch.arange(extent, device=after.device, dtype=after.dtype) / extent
    share = share.view(-1, *(1,) * (after.ndim - 1 - dim))
    end = before.narrow(dim, before.shape[dim] - extent, extent)
    start, rest = after.split((extent, after.shape[dim] - extent), dim=dim)
    return torch.cat((end * (1 - share) + start * share, rest), dim=dim)


class Tiles:
    """How a plane is cut into tiles and put together again. Sizes are cells along (H, W).

    size: of a tile · size_after: of a coded one · overlap: which share of a tile its neighbour has too

    A tile is blended with the one above it, then with the one to its left, both blended already, and keeps
    what the next ones do not have.
    """

    def __init__(
        self, size: tuple[int, int], size_after: tuple[int, int], overlap: tuple[float, float] = SQUARE
    ):
        self.size, self.size_after = size, size_after
        self.strides = [int(n * (1 - share)) for n, share in zip(size, overlap, strict=True)]
        self.blends = [int(n * share) for n, share in zip(size_after, overlap, strict=True)]
        self.kept = [n - extent for n, extent in zip(size_after, self.blends, strict=True)]
        steps = [kept * n / after for kept, n, after in zip(self.kept, size, size_after, strict=True)]
        if steps != self.strides:
            raise ValueError(
                f"tiles of {size} cells, {size_after} once coded, would leave gaps; "
                f"give the VAE a tile whose overlap is a whole number of latent cells"
            )

    def is_needed(self, height: int, width: int) -> bool:
        """Whether a plane is larger than a tile, before coding."""
        return height > self.size[0] or width > self.size[1]

    def cut(self, x: Tensor) -> list[list[Tensor]]:
        """Rows of tiles, views of x (B, C, T, H, W); the last of a row or column is what is left."""
        (height, width), (down, right) = self.size, self.strides
        return [
            [x[..., top : top + height, left : left + width] for left in range(0, x.shape[4], right)]
            for top in range(0, x.shape[3], down)
        ]

    def join(self, rows: Iterable[Iterable[Tensor]]) -> Tensor:
        """Rows of coded tiles to a plane. Takes one at a time, and holds but a row of them uncropped."""
        strips: list[Tensor] = []
        above: list[Tensor] = []
        for row in rows:
            done: list[Tensor] = []
            for column, tile in enumerate(row):
                tile = blend(above[column], tile, self.blends[0], dim=3) if above else tile
                done.append(blend(done[-1], tile, self.blends[1], dim=4) if done else tile)
            strips.append(torch.cat([tile[..., : self.kept[0], : self.kept[1]] for tile in done], dim=4))
            above = done
        return torch.cat(strips, dim=3)

    def apply(self, code: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Code a clip, tile by tile where its plane is larger than one. x (B, C, T, H, W)"""
        if not self.is_needed(*x.shape[3:]):
            return code(x)
        return self.join((code(tile) for tile in row) for row in self.cut(x))

    def stream(
        self, code: Callable[[Tensor], Iterator[Tensor]], x: Tensor, watch: Watch = iter
    ) -> Iterator[Tensor]:
        """Code a video that comes out in pieces of time, tile by tile where its plane is larger than one.

        x (B, C, T, H, W) · code: to pieces (B, C', n, H', W'), from a fresh start · watch: wraps the tiles

        A tile goes through all of its time before the next one starts, so that the device holds activations
        and past of one alone. Finished pieces wait in CPU memory, and are joined there one by one.
        """
        if not self.is_needed(*x.shape[3:]):
            yield from code(x)
            return
        rows = self.cut(x)
        across = len(rows[0])
        tiles = [tile for row in rows for tile in row]
        coded = [deque(piece.cpu() for piece in code(tile)) for tile in watch(tiles)]
        grid = [coded[i : i + across] for i in range(0, len(coded), across)]
        while coded[0]:
            yield self.join((pieces.popleft() for pieces in row) for row in grid)

    def cells(self, height: int, width: int) -> tuple[int, int]:
        """Of a plane of that size once coded: the cells of its largest tile, and of all tiles together."""
        if height <= self.size_after[0] and width <= self.size_after[1]:
            return height * width, height * width
        tile, total = 1, 1
        for length, size, kept in zip((height, width), self.size_after, self.kept, strict=True):
            tile *= min(length, size)
            total *= sum(min(size, length - start) for start in range(0, length, kept))
        return tile, total


def pixels_in_hand(width: int, height: int, tiles: Tiles | None) -> int:
    """Of the largest tile or, with None, of the plane."""
    return tiles.cells(height, width)[0] if tiles else width * height


def video_bytes(width: int, height: int, num_frames: int, item: int, tiles: Tiles | None) -> int:
    """A decoded video in CPU memory: pixels of `item` bytes, more where tiles overlap, and frames."""
    pieces = tiles.cells(height, width)[1] if tiles else width * height
    return num_frames * 3 * (item * pieces + width * height)
