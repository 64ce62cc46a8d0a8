"""Text states on disk: a prompt that was encoded before is not encoded again, nor is its encoder loaded.

The key of an entry is a hash of everything that decides its numbers to the bit, the machine's arithmetic and
the source of the encoding included, so that a video does not depend on whether an entry was found. Prompts
themselves are not kept. Entries that were not used for longest are removed once all take more than a limit.
"""

import hashlib
import json
import os
import tempfile
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from minidit_kernels import tuning

GIB = 2**30
ROOT = Path(__file__).parents[1]
SOURCES = ("text/*.py", "layers.py", "attention.py", "families.py", "given.py")  # what encodes a prompt


def default_folder() -> Path:
    """$MINIDIT_CACHE_DIR/text, else text in minidit's folder where the XDG rule puts it: ~/.cache/minidit."""
    if folder := os.environ.get("MINIDIT_CACHE_DIR"):
        return Path(folder) / "text"
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))  # relative paths are to be ignored, and so is none
    return (base if base.is_absolute() else Path.home() / ".cache") / "minidit" / "text"


def hash_of(*what: Any) -> str:
    """A hash of numbers, strings, lists, tuples and dicts of these."""
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


@cache
def source_hash() -> str:
    """Of the code that encodes prompts: nobody has to remember to raise a version."""
    digest = hashlib.sha256()
    kernels = Path(tuning.__file__).parent
    for path in sorted([*(p for name in SOURCES for p in ROOT.glob(name)), *kernels.glob("*.py")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def numerics(device: str) -> tuple[Any, ...]:
    """What decides the last bits of a matrix product: the library, the machine, and on a CPU the threads."""
    from importlib.metadata import version

    libraries = torch.__version__, version("ftfy")
    if torch.device(device).type == "cuda":
        return *libraries, torch.cuda.get_device_name(device)
    return *libraries, device, torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()


class TextCache:
    """A folder of text states, each the text of one run: a list of tensors, tuples of tensors, and None.

    A damaged entry counts as none and is written again, without a word. limit: most bytes of all entries
    """

    def __init__(self, folder: str | Path, limit: int = GIB):
        self.folder, self.limit = Path(folder), limit

    def path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def load(self, key: str, device: torch.device | str) -> list[Any] | None:
        """The states of a key, on the device; None where there are none."""
        path = self.path(key)
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
            if metadata.get("sha256") != digest(tensors):
                return None
            os.utime(path)  # used last: removed last
            tensors = {name: t.to(device) for name, t in tensors.items()}
            return join(json.loads(metadata["layout"]), tensors)
        except (OSError, SafetensorError, KeyError, ValueError):
            return None

    def save(self, key: str, states: list[Any]) -> None:
        """Write the states of a key, whole or not at all; where the folder refuses, with a warning."""
        layout, tensors = split(states)
        data = save(tensors, {"layout": json.dumps(layout), "sha256": digest(tensors)})
        if len(data) > self.limit:
            return
        partial = None
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self.folder, delete=False) as file:
                partial = Path(file.name)
                file.write(data)
            partial.replace(self.path(key))
            self.trim()
        except OSError as error:
            message = f"text states are not kept in {self.folder} ({error.strerror}); --no-text-cache"
            warnings.warn(f"{message} or MINIDIT_CACHE_DIR helps", stacklevel=2)
        finally:
            if partial is not None:
                partial.unlink(missing_ok=True)

    def trim(self) -> None:
        """Remove the entries that were not used for longest until the others fit the limit."""
        used = []
        for path in self.folder.iterdir():
            try:
                used.append((path.stat().st_mtime_ns, path.stat().st_size, path))
            except FileNotFoundError:  # another process trims too
                continue
        excess = sum(size for _, size, _ in used) - self.limit
        for _, size, path in sorted(used):
            if excess <= 0:
                return
            path.unlink(missing_ok=True)
            excess -= size


def split(states: list[Any]) -> tuple[list[int | None], dict[str, Tensor]]:
    """States as named tensors, and per entry None, 0 for a tensor, n for a tuple of n tensors."""
    layout: list[int | None] = []
    tensors = {}
    for i, entry in enumerate(states):
        parts = entry if isinstance(entry, tuple) else () if entry is None else (entry,)
        layout.append(None if entry is None else len(entry) if isinstance(entry, tuple) else 0)
        tensors |= {f"{i}.{j}": part.to("cpu").contiguous() for j, part in enumerate(parts)}
    return layout, tensors


def join(layout: list[int | None], tensors: dict[str, Tensor]) -> list[Any]:
    """The inverse of split."""
    entry = lambda i, n: tuple(tensors[f"{i}.{j}"] for j in range(n)) if n else tensors[f"{i}.0"]
    return [None if n is None else entry(i, n) for i, n in enumerate(layout)]


def digest(tensors: dict[str, Tensor]) -> str:
    """A hash of names, shapes and bytes."""
    result = hashlib.sha256()
    for name, t in sorted(tensors.items()):
        result.update(f"{name} {t.dtype} {tuple(t.shape)} ".encode())
        result.update(t.reshape(-1).view(torch.uint8).numpy())
    return result.hexdigest()
