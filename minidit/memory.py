"""Memory by stage: predicted before anything is loaded, held against what is free, measured as it runs.

Stages are text, denoise and decode, as in the seconds that a run prints. The components that one needs are on
the device, and those that stay there from the stage before. Weights are counted, activations are the models'
own estimates; on a CPU the interpreter with its libraries lies below, as a run finds it at its start.
"""

import ctypes
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

GIB = 2**30
OFFLOAD = ("auto", "none", "parts", "blocks")
LIBRARIES = 35 * 2**20  # resident on a CPU once code has run for the first time; measured on Linux
HEAP = 1.3  # of a CPU's activations: what the C library keeps of freed memory; 1.1 to 1.4 measured
M_MMAP_THRESHOLD = -3  # of malloc.h
MARGIN = 1.1  # of a prediction, before auto relies on it


@dataclass(frozen=True)
class Stage:
    """Bytes on the device in one stage of a run."""

    name: str  # text, denoise or decode
    weights: int
    activations: int
    cache: int = 0  # of a caching method
    text: int = 0  # keys and values of the text, made once for all steps
    host: int = 0  # CPU memory of blocks that visit a GPU

    @property
    def total(self) -> int:
        return self.weights + self.activations + self.cache + self.text


def free_bytes(device: str, base: int = 0) -> int | None:
    """What a run may take on the device: what is free, and what it has; None where the system does not say.

    base: bytes in use when the run's process had loaded nothing
    """
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    lines = Path("/proc/meminfo")
    if device != "cpu" or not lines.exists():
        return None
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # of torchrun, which share this memory
    return field_bytes(lines, "MemAvailable") // ranks + max(0, in_use(device) - base)


def left_bytes(device: str) -> int | None:
    """What can still be allocated on the device; None where the system does not say."""
    free = free_bytes(device)
    return None if free is None else free - in_use(device)


def in_use(device: str) -> int:
    """Bytes of tensors on a GPU; on a CPU the process's resident memory, 0 where the system does not say."""
    if device.startswith("cuda"):
        return torch.cuda.memory_allocated(device)
    status = Path("/proc/self/status")
    return field_bytes(status, "VmRSS") if status.exists() else 0


def field_bytes(path: Path, name: str) -> int:
    """A line of a file under /proc that counts in kB."""
    line = next(line for line in path.read_text().splitlines() if line.startswith(f"{name}:"))
    return 1024 * int(line.split()[1])


def keep_large_off_heap() -> None:
    """On Linux, from now on memory of a MiB or more comes from the system, not from the heap, and goes back.

    Otherwise what is freed leaves holes between what stays: 0.3 GiB while 1.3B parameters are read in int8,
    0.2 GiB while they denoise 5 frames of 128x128.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**20)


def give_back_heap() -> None:
    """On Linux, what the C library keeps of freed memory goes back to the system.

    7 MiB once 1.3B parameters have denoised 5 frames of 128x128; 0.4 GiB, in 0.05 s, were large memory in
    the heap too.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


class Peaks:
    """The most memory that was in use in every stage."""

    def __init__(self, device: str):
        self.device, self.base = device, in_use(device)
        self.found: dict[str, int] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """What runs inside belongs to this stage."""
        self.reset()
        try:
            yield
        finally:
            self.found[name] = max(self.found.get(name, 0), self.read())

    def reset(self) -> None:
        """Forget earlier peaks. Where Linux does not let us, a stage has the most of those before it too."""
        if self.device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            pass

    def read(self) -> int:
        if self.device.startswith("cuda"):
            return torch.cuda.max_memory_allocated(self.device)
        status = Path("/proc/self/status")
        return field_bytes(status, "VmHWM") if status.exists() else 0


def check_offload(offload: str) -> None:
    """Refuse a name that is unknown."""
    if offload not in OFFLOAD:
        raise ValueError(f"unknown offload {offload!r}; choose one of {', '.join(OFFLOAD)}")


def choose_offload(
    predict: Callable[[str], Sequence[Stage]], offload: str, *, device: str, base: int
) -> tuple[str, Sequence[Stage]]:
    """How a run keeps within the memory that is free, and its stages; ValueError where it cannot.

    predict: stages under a name of OFFLOAD · auto is the first that fits, with some room. On a CPU blocks
    have nowhere to go.
    """
    room = free_bytes(device, base)
    names = ("none", "parts") if device == "cpu" else OFFLOAD[1:]
    most = lambda stages: max(stages, key=lambda stage: stage.total)
    below = base + LIBRARIES if device == "cpu" else 0
    for name in names if offload == "auto" else (offload,):
        stages = predict(name)
        margin = MARGIN if offload == "auto" and name != names[-1] else 1
        if room is None or most(stages).total * margin <= room:
            return name, stages
    fullest = most(stages)
    tries = ["a smaller --size", "fewer --num-frames", "--weights int8"]
    tries += [] if device == "cpu" else ["--offload blocks"]
    tries += ["--tiled"] if fullest.name == "decode" else []
    tries += ["--cache-budget"] if fullest.cache + fullest.text else []
    raise ValueError(
        f"{fullest.name} needs {readable(fullest.total + below)} on {device} "
        f"({readable(fullest.weights)} of weights, {readable(fullest.activations)} of activations, "
        f"{readable(fullest.cache + fullest.text)} of caches), and {readable(room + below)} are free; "
        f"try {', '.join(tries)} or --dtype bf16"
    )


def readable(size: float) -> str:
    """In GiB, MiB or KiB, whichever leaves a number of one or more."""
    unit, name = (GIB, "GiB") if size >= GIB else (2**20, "MiB") if size >= 2**20 else (2**10, "KiB")
    digits = 2 if unit == GIB or size < 10 * unit else 0
    return f"{size / unit:.{digits}f} {name}"


def describe(stages: Sequence[Stage], peaks: Peaks) -> str:
    """Predicted and measured, one line."""
    below = peaks.base + LIBRARIES if peaks.device == "cpu" else 0
    line = lambda name, size, found: f"{name} {readable(size)} predicted, {readable(found)} measured"
    seen = [stage for stage in stages if stage.name in peaks.found]
    parts = [line(stage.name, stage.total + below, peaks.found[stage.name]) for stage in seen]
    return "memory: " + " · ".join(parts)
