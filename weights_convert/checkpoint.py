"""Downloaded checkpoint files: found, grouped into shards, and read one tensor at a time."""

import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minidit.tensor_files import open_tensors
from minidit.weights import DTYPES, listing

PICKLES = (".pth", ".pt", ".bin")
SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d+)-of-(?P<count>\d+)")


@dataclass(frozen=True)
class Upstream:
    """A tensor in a file; nothing of it is in memory until read() is called."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None  # None: not one of weights.DTYPES, or not a tensor at all
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of one component: of one file, or of all its shards."""

    files: tuple[Path, ...]
    tensors: dict[str, Upstream]
    config: dict  # of the config.json beside it; {} without one

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self.tensors.items()}


def find_files(source: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """Files with one of these endings, in the folder or two levels below it; hidden folders are left out."""
    if source.is_file():
        return [source] if source.name.endswith(suffixes) else []
    found = (path for pattern in ("*", "*/*", "*/*/*") for path in source.glob(pattern))
    found = (path for path in found if path.name.endswith(suffixes) and path.is_file())
    return sorted(p for p in found if not any(part.startswith(".") for part in p.relative_to(source).parts))


def group_shards(paths: list[Path]) -> list[list[Path]]:
    """Files that belong together, by the numbers in their names; raises if one of a set is missing."""
    groups = {}
    for path in paths:
        shard = SHARD.fullmatch(path.stem)
        key = (path.parent, shard["stem"], path.suffix, shard["count"]) if shard else (path,)
        groups.setdefault(key, []).append(path)
    for key, group in groups.items():
        if len(key) > 1 and len(group) != int(key[3]):
            there = f"{len(group)} of {int(key[3])} shards of {key[1]}{key[2]}"
            raise ValueError(f"{key[0]}: only {there} are here; give a folder with all of them")
    return list(groups.values())


def open_checkpoint(files: list[Path]) -> Checkpoint:
    """Read names, shapes and dtypes of the files, and compare them with their index if there is one."""
    tensors, origin = {}, {}
    for path in files:
        found = open_pickle(path) if path.suffix in PICKLES else open_safetensors(path)
        if twice := [name for name in found if name in tensors]:
            raise ValueError(f"{origin[twice[0]]} and {path} both hold {twice[0]}; download the shards again")
        tensors |= found
        origin |= dict.fromkeys(found, path)
    _check_index(files, tensors)
    config = files[0].parent / "config.json"
    return Checkpoint(tuple(files), tensors, read_json(config) if config.is_file() else {})


def _check_index(files: list[Path], tensors: dict[str, Upstream]) -> None:
    shard = SHARD.fullmatch(files[0].stem)
    index = files[0].parent / f"{shard['stem']}{files[0].suffix}.index.json" if shard else None
    if index and index.is_file():
        listed = read_json(index).get("weight_map", {})
        if missing := [name for name in listed if name not in tensors]:
            raise ValueError(f"{index}: {listing('tensors are in no shard', missing)}; download it again")


def open_safetensors(path: Path) -> dict[str, Upstream]:
    """The tensors of a safetensors file."""
    try:
        with open_tensors(path) as f:
            slices = {name: f.get_slice(name) for name in f.keys()}
            found = {name: (tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
    except SafetensorError as e:
        raise ValueError(f"{path} is damaged or no safetensors file ({e}); download it again") from None
    return {
        n: Upstream(shape, DTYPES.get(dtype), partial(_read, path, n)) for n, (shape, dtype) in found.items()
    }


def _read(path: Path, name: str) -> Tensor:
    # opened for each tensor: the pages of a mapped file count as memory until it is closed
    with safe_open(path, "pt") as f:
        return f.get_tensor(name)


def open_pickle(path: Path) -> dict[str, Upstream]:
    """The tensors of a .pth, .pt or .bin file."""
    state = _load(path)
    is_mapped = zipfile.is_zipfile(path)
    found, mapped = {}, MappedPickle(path)
    for name, value in state.items():
        # a file older than torch 1.6 cannot be mapped: it is in memory as a whole, and read once
        read = partial(mapped.read if is_mapped else state.__getitem__, name)
        is_float = isinstance(value, Tensor) and value.dtype in DTYPES.values()
        found[name] = Upstream(tuple(getattr(value, "shape", ())), value.dtype if is_float else None, read)
    return found


class MappedPickle:
    """A pickle that is opened again before it takes much memory, for the reason given in _read.

    Not for each tensor, as it is unpickled as a whole every time.
    """

    limit = 2**22  # bytes read

    def __init__(self, path: Path):
        self.path, self.state, self.taken = path, {}, 0

    def read(self, name: str) -> Tensor:
        if not self.state or self.taken > self.limit:
            self.state, self.taken = {}, 0  # closed before it is opened again
            self.state = _load(self.path)
        self.taken += self.state[name].nbytes
        return self.state[name]


def _load(path: Path) -> dict:
    """Open a pickle of plain tensors: weights_only, always."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd pickle protocols: what is not read is refused below
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as e:
        name = re.search(r"GLOBAL ([\w.]+)", str(e))
        what = f"calls {name[1]} when it is opened" if name else "holds more than tensors, or is damaged"
        raise ValueError(f"{path} {what}; refused, only pickles of plain tensors are read") from None
    except (
        RuntimeError,
        OSError,
        EOFError,
        ValueError,
        KeyError,
        AttributeError,
        IndexError,
        TypeError,
    ) as e:
        first = (str(e).splitlines() or [type(e).__name__])[0]
        raise ValueError(f"{path} is damaged or no torch file ({first}); download it again") from None
    if isinstance(state, dict):
        whole = next(iter(state)) if len(state) == 1 else ""  # beside "module" there are a trainer's counters
        inner = next((state[k] for k in ("module", "state_dict", whole) if k in state), None)
        state = inner if isinstance(inner, dict) else state  # {"state_dict": {...}} and the like
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise ValueError(f"{path} holds a {type(state).__name__}, wanted tensors by name")
    return state


def read_json(path: Path) -> dict:
    """A JSON file with an object at the top."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path} is not JSON ({e})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, wanted an object")
    return content
