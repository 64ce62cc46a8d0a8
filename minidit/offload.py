"""Blocks that live in CPU memory and visit the GPU in their turn, for a transformer larger than the card.

Every block is packed into one buffer (pinned, where there is a GPU), so that a visit is one copy. It goes
through a side stream into one of a few slots while the block before is computed, and which block comes next
is what the step's plan says: a block that is skipped is not copied. Numbers are those of blocks that stay,
bit for bit. On a CPU the same code copies from memory to memory.
"""

import math
import weakref
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minidit.cache.plan import RUN_ALL, Plan, runs

ALIGNED = 256  # bytes at which a tensor begins: what kernels and the allocator take for granted
SLOTS = 2  # one block is computed, the next one arrives


@dataclass(frozen=True)
class Span:
    """Where a tensor of a block lies in its buffer."""

    tensor: Tensor  # the block's own: a parameter or a buffer
    start: int
    dtype: torch.dtype
    shape: torch.Size

    def within(self, buffer: Tensor) -> Tensor:
        size = math.prod(self.shape) * self.dtype.itemsize
        return buffer[self.start : self.start + size].view(self.dtype).view(self.shape)


def spans_of(block: nn.Module) -> tuple[list[Span], int]:
    """The tensors of a block one behind the other, and how many bytes they take."""
    spans, at = [], 0
    for tensor in (*block.parameters(), *block.buffers()):
        spans.append(Span(tensor, at, tensor.dtype, tensor.shape))
        at += -(-tensor.nbytes // ALIGNED) * ALIGNED
    return spans, at


class Pack:
    """A block's tensors in one buffer of CPU memory."""

    def __init__(self, block: nn.Module):
        self.spans, self.bytes = spans_of(block)
        self.host = torch.empty(self.bytes, dtype=torch.uint8)
        for span in self.spans:
            span.within(self.host).copy_(span.tensor)
        self.place(self.host)

    def place(self, buffer: Tensor) -> None:
        """The block's tensors are those in this buffer from now on."""
        for span in self.spans:
            span.tensor.data = span.within(buffer)


def pin(hosts: list[Tensor], owner: object) -> None:
    """Lock the buffers' pages as long as their owner lives, so that copies run beside computing.

    torch's own pinned memory comes in powers of two, which would be half as much again for Wan 14B's blocks.
    """
    runtime = torch.cuda.cudart()
    for host in hosts:
        code = int(runtime.cudaHostRegister(host.data_ptr(), host.nbytes, 0))
        if code:
            raise RuntimeError(f"{host.nbytes} bytes of CPU memory cannot be pinned (CUDA error {code})")
        weakref.finalize(owner, runtime.cudaHostUnregister, host.data_ptr())


class Slot:
    """A place on the device for one block at a time."""

    def __init__(self, size: int, device: torch.device):
        self.buffer = torch.empty(size, dtype=torch.uint8, device=device)
        self.block: int | None = None
        is_gpu = device.type == "cuda"
        self.arrived = torch.cuda.Event() if is_gpu else None
        self.computed = torch.cuda.Event() if is_gpu else None


class OffloadedBlocks(nn.ModuleList):
    """A transformer's blocks, fetched to the device when they are asked for, and ahead of that along a plan.

    blocks: in CPU memory, from which they move into packs · slots: blocks on the device at a time, 2 or more
    """

    def __init__(self, blocks: nn.ModuleList, device: torch.device | str, *, slots: int = SLOTS):
        super().__init__(blocks)
        self.device = torch.device(device)
        is_gpu = self.device.type == "cuda"
        self.packs = [Pack(block) for block in blocks]
        if is_gpu:
            pin([pack.host for pack in self.packs], self)
        most = max(pack.bytes for pack in self.packs)
        self.slots = [Slot(most, self.device) for _ in range(min(slots, len(self.packs)))]
        self.side = torch.cuda.Stream(self.device) if is_gpu else None
        self.current: int | None = None  # the block that is being computed
        self.visits = 0  # copies so far
        self.follow(RUN_ALL)

    def follow(self, plan: Plan) -> None:
        """Fetch ahead along this plan from now on."""
        self.order = sorted(runs(plan, len(self.packs)))
        self.fetch_ahead()

    def __getitem__(self, k: int) -> nn.Module:
        """Block k, on the device."""
        if k != self.current:
            self.leave()
            self.current = k
            self.arrive(self.slot_of(k) or self.fetch(k))
            self.fetch_ahead()
        return self._modules[str(k)]

    def __iter__(self) -> Iterator[nn.Module]:
        """All blocks in order, each on the device until the next is asked for."""
        self.follow(RUN_ALL)
        return (self[k] for k in range(len(self.packs)))

    def ahead(self) -> list[int]:
        """The blocks that come next, as many as there are slots beside the current one's.

        Behind the last one come the first again: the next step begins as this one, more often than not.
        """
        here = -1 if self.current is None else self.current
        later = [k for k in self.order if k > here] + [k for k in self.order if k < here]
        return later[: len(self.slots) - 1]

    def fetch_ahead(self) -> None:
        for k in self.ahead():
            if self.slot_of(k) is None:
                self.fetch(k)

    def slot_of(self, k: int) -> Slot | None:
        return next((slot for slot in self.slots if slot.block == k), None)

    def fetch(self, k: int) -> Slot:
        """Begin to copy block k into a slot that is neither in use nor filled for what comes next."""
        busy = {self.current, *self.ahead()} - {k, None}
        slot = next(slot for slot in self.slots if slot.block not in busy)
        if slot.block is not None:
            self.packs[slot.block].place(self.packs[slot.block].host)
        pack, slot.block = self.packs[k], k
        self.copy(pack.host, slot)
        pack.place(slot.buffer)
        self.visits += 1
        return slot

    def copy(self, host: Tensor, slot: Slot) -> None:
        if self.side is None:
            slot.buffer[: len(host)].copy_(host)
            return
        with torch.cuda.stream(self.side):
            self.side.wait_event(slot.computed)  # the block that was there; of an empty slot: no wait
            slot.buffer[: len(host)].copy_(host, non_blocking=True)
            slot.arrived.record(self.side)

    def arrive(self, slot: Slot) -> None:
        """What is computed from now on waits for the slot's copy."""
        if self.side is not None:
            torch.cuda.current_stream(self.device).wait_event(slot.arrived)

    def leave(self) -> None:
        """The current block has been given to the device: its slot is free when that is done."""
        if self.side is not None and self.current is not None:
            self.slot_of(self.current).computed.record(torch.cuda.current_stream(self.device))
