"""What ranks send each other: Ulysses' trade of tokens for heads (Jacobs et al., 2023), and plain gathering.

Rank r holds `counts[r]` of the tokens that attend to each other, and a copy of all text rows behind them.
Around attention every rank gets all tokens of its share of the heads, in one all-to-all of queries, keys and
values, and gives them back in another. Counts may differ, so pieces travel flat, with a size each. Two
collectives are used, all_to_all_single and all_gather, which NCCL has and, on a CPU, gloo (torch 2.11, 2.13).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

LOST = "another rank ended or hung in mid-run; its own line, or torchrun's report, says why"


@dataclass(frozen=True)
class Exchange:
    """The door to the other ranks, in the place where models have the name of an attention backend."""

    backend: str  # what attention() is asked for on every rank
    counts: tuple[int, ...]  # tokens that attend to each other, by rank
    rank: int  # within the group
    group: "dist.ProcessGroup | None"  # without one only shapes can be asked for

    def to_heads(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """Tokens of this rank to heads of this rank. parts (B, N, l + M, K_i) -> (B, N / P, L + M, K_i)"""
        ranks, here = len(self.counts), self.counts[self.rank]
        joint = torch.cat(parts, dim=-1).unflatten(1, (ranks, -1))  # (B, P, N / P, l + M, sum of K_i)
        batch, _, heads, _, width = joint.shape
        shapes = [(batch, heads, count, width) for count in self.counts]
        video = self.trade(joint[:, :, :, :here].unbind(1), shapes)
        text = joint[:, self.rank, :, here:]  # of which every rank has all
        return torch.cat((*video, text), dim=2).split([part.shape[-1] for part in parts], dim=-1)

    def to_tokens(self, x: Tensor) -> Tensor:
        """The way back. x (B, N / P, L + M, K) -> (B, N, l + M, K)"""
        *video, text = x.split((*self.counts, x.shape[2] - sum(self.counts)), dim=2)
        parts = [torch.cat((part, text), dim=2) for part in video]
        return torch.cat(self.trade(parts, [parts[self.rank].shape] * len(parts)), dim=1)

    def gather(self, x: Tensor, dim: int) -> Tensor:
        """The tokens of all ranks, along `dim`, in the order of ranks."""
        shape = lambda count: (*x.shape[:dim], count, *x.shape[dim + 1 :])
        shapes = [shape(count) for count in self.counts]
        return torch.cat(self.trade([x] * len(shapes), shapes), dim=dim)

    def trade(self, parts: Sequence[Tensor], shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        """Part r goes to rank r; what rank r sends here has shapes[r]."""
        sizes = [math.prod(shape) for shape in shapes]
        out = parts[0].new_empty(sum(sizes))
        sent = torch.cat([part.flatten() for part in parts])
        try:
            dist.all_to_all_single(out, sent, sizes, [part.numel() for part in parts], group=self.group)
        except RuntimeError as error:
            raise ConnectionError(LOST) from error
        return [piece.view(shape) for piece, shape in zip(out.split(sizes), shapes, strict=True)]


def all_gather(x: Tensor, group: "dist.ProcessGroup") -> list[Tensor]:
    """This tensor of every rank of a group, all of one shape, in the order of ranks."""
    found = [torch.empty_like(x) for _ in range(group.size())]
    try:
        dist.all_gather(found, x, group=group)
    except RuntimeError as error:
        raise ConnectionError(LOST) from error
    return found
