"""A model folder on disk: `model.json` and one safetensors file per component. Read and written here only.

model.json                what the folder holds: classes, configs, file sizes and SHA-256, schedule, defaults
transformer.safetensors   parameters under minidit's own names; likewise text_encoder and vae
tokenizer/spiece.model
profiles/                 made later, by `profile`; not listed in model.json
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path, PurePosixPath
from typing import Any, get_args, get_origin

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from minidit.memory import keep_large_off_heap
from minidit.presets import (
    CLIPTextConfig,
    CogVideoXConfig,
    CogVideoXVAEConfig,
    Defaults,
    HunyuanVAEConfig,
    HunyuanVideoConfig,
    KLConfig,
    LatteConfig,
    LlamaConfig,
    OpenSoraConfig,
    OpenSoraVAEConfig,
    ScheduleConfig,
    T5Config,
    WanConfig,
    WanVAEConfig,
)
from minidit.tensor_files import open_tensors

FORMAT = 1
COMPONENTS = (
    "transformer", "transformer_2", "text_encoder", "text_encoder_2", "vae", "vae_2",
    "tokenizer", "tokenizer_2",
)  # fmt: skip
CONFIGS = {
    "Wan": WanConfig,
    "WanVAE": WanVAEConfig,
    "T5Encoder": T5Config,
    "SentencePiece": None,
    "HunyuanVideo": HunyuanVideoConfig,
    "LlamaEncoder": LlamaConfig,
    "CLIPText": CLIPTextConfig,
    "HunyuanVAE": HunyuanVAEConfig,
    "LlamaTokenizer": None,
    "CLIPTokenizer": None,
    "Latte": LatteConfig,
    "KLVAE": KLConfig,
    "OpenSora": OpenSoraConfig,
    "OpenSoraVAE": OpenSoraVAEConfig,
    "CogVideoX": CogVideoXConfig,
    "CogVideoXVAE": CogVideoXVAEConfig,
}
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CONVERT = "python -m weights_convert SOURCE OUT"

Config = Any  # one of the dataclasses in CONFIGS


@dataclass(frozen=True)
class File:
    """One file of a model folder."""

    name: str  # relative to the folder, with forward slashes
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Component:
    """One part of a model: the class that runs it and the files it is loaded from."""

    class_name: str  # a key of CONFIGS
    config: Config | None  # None for a tokenizer
    files: tuple[File, ...]


@dataclass(frozen=True)
class Manifest:
    """What model.json says."""

    family: str
    preset: str | None  # the release with the same transformer config, if there is one
    components: dict[str, Component]
    schedule: ScheduleConfig
    defaults: Defaults
    source: str
    dropped: dict[str, str]  # upstream tensor -> why it is not here


# Reading


def read_manifest(folder: str | Path, *, verify: bool = False) -> Manifest:
    """Read model.json and check that every file it lists is there in full; verify also compares SHA-256."""
    folder = Path(folder)
    path = folder / "model.json"
    if not path.is_file():
        raise ValueError(f"{folder} is not a model folder (no model.json); make one with {CONVERT}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:  # bad JSON and bad UTF-8 alike
        raise ValueError(f"{path} is not JSON ({e}); make the folder again with {CONVERT}") from None
    manifest = manifest_from_json(content, str(path))
    for component in manifest.components.values():
        for file in component.files:
            _check_file(folder, file, verify)
    return manifest


def manifest_from_json(content: Any, where: str) -> Manifest:
    """model.json as Python values -> Manifest. Anything unexpected is a ValueError beginning with `where`."""
    version = content.get("format") if isinstance(content, dict) else None
    if version != FORMAT:
        raise ValueError(f"{where} has format {version!r}, wanted {FORMAT}; make the folder again: {CONVERT}")
    try:
        parts = {name: _component(name, part, where) for name, part in content["components"].items()}
        return Manifest(
            family=content["family"],
            preset=content["preset"],
            components=parts,
            schedule=config_from_json(ScheduleConfig, content["schedule"], f"{where}: schedule"),
            defaults=config_from_json(Defaults, content["defaults"], f"{where}: defaults"),
            source=content["source"],
            dropped=dict(content["dropped"]),
        )
    except (KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"{where} does not have the keys of a model.json ({e!r}); make it again") from None


def _component(name: str, part: dict, where: str) -> Component:
    if name not in COMPONENTS:
        raise ValueError(f"{where}: unknown component {name!r}; wanted one of {', '.join(COMPONENTS)}")
    if part["class"] not in CONFIGS:
        raise ValueError(f"{where}: {name} has class {part['class']!r}, wanted one of {', '.join(CONFIGS)}")
    kind = CONFIGS[part["class"]]
    config = config_from_json(kind, part["config"], f"{where}: {name}.config") if kind else None
    files = tuple(File(str(file["name"]), file["bytes"], file["sha256"]) for file in part["files"])
    return Component(part["class"], config, files)


def config_from_json(kind: type, values: dict, where: str) -> Any:
    """Build the config dataclass `kind`; unknown, missing and ill-typed values are refused by name."""
    known = {f.name: f for f in fields(kind)}
    unknown = [name for name in values if name not in known]
    missing = [name for name, f in known.items() if f.default is MISSING and name not in values]
    if unknown:
        raise ValueError(f"{where} has unknown keys {', '.join(unknown)}; known are {', '.join(known)}")
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}")
    typed = {name: _typed(value, known[name].type, f"{where}.{name}") for name, value in values.items()}
    return kind(**typed)


def _typed(value: Any, kind: Any, where: str) -> Any:
    """The JSON value as the field's type: lists become tuples, a float may be whole, an int is above 0."""
    if get_origin(kind) is tuple and isinstance(value, list | tuple):
        item, *rest = get_args(kind)
        if rest == [...] or len(value) == 1 + len(rest):
            return tuple(_typed(v, item, where) for v in value)
    elif kind is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    elif type(value) is kind and not (kind is int and value < 1):
        return value
    wanted = {int: "a whole number above 0", float: "a number"}.get(kind, getattr(kind, "__name__", kind))
    raise ValueError(f"{where} is {value!r}, wanted {kind if get_args(kind) else wanted}")


def _check_file(folder: Path, file: File, verify: bool) -> None:
    inside = PurePosixPath(file.name)
    if inside.is_absolute() or ".." in inside.parts or "\\" in file.name or ":" in file.name:
        raise ValueError(f"{folder / 'model.json'} lists {file.name!r}, which is outside the folder; refused")
    path = folder / file.name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{path} is a link out of the folder; refused, copy the file or link the folder")
    if not path.is_file():
        raise ValueError(f"{path} is missing; make the folder again with {CONVERT}")
    if path.stat().st_size != file.bytes:
        size = path.stat().st_size
        raise ValueError(f"{path} has {size} bytes instead of {file.bytes}; copy or convert it again")
    if verify and _sha256(path) != file.sha256:
        raise ValueError(f"{path} is damaged (SHA-256 differs from model.json); copy or convert it again")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def load_into(
    module: nn.Module,
    folder: str | Path,
    component: str,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    keep_fp32: Collection[str] = (),
) -> nn.Module:
    """Fill a module that was built on the meta device; returns it in eval mode, without gradients.

    Tensors go to the device one at a time, in `dtype` or, where is_fp32 says so, in float32.
    """
    return fill(
        module, read_tensors(module, folder, component, device=device, dtype=dtype, keep_fp32=keep_fp32)
    )


def read_tensors(
    module: nn.Module,
    folder: str | Path,
    component: str,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    keep_fp32: Collection[str] = (),
) -> Iterator[tuple[str, Tensor]]:
    """A component's tensors, each read when its turn comes. What does not fit is refused at once.

    module: on the meta device, with the names and shapes of the files
    """
    part = _find(read_manifest(folder), folder, component)
    paths = [Path(folder) / file.name for file in part.files]
    wanted = {name: tuple(t.shape) for name, t in module.state_dict().items()}
    _check_fit(wanted, paths, part.config)
    type_of = lambda name: torch.float32 if is_fp32(name, keep_fp32) else dtype
    return ((name, _read(path, name).to(device, type_of(name))) for path, name in _names_in(paths))


def _read(path: Path, name: str) -> Tensor:
    """One tensor, in memory of its own: one file handle for all would keep every page that was read."""
    with safe_open(path, "pt") as f:
        return f.get_tensor(name).clone()  # a view would die with the file


def fill(module: nn.Module, tensors: Iterable[tuple[str, Tensor]]) -> nn.Module:
    """Give a module on the meta device its tensors; returns it in eval mode, without gradients."""
    keep_large_off_heap()
    module.load_state_dict(dict(tensors), assign=True)
    lost = [name for name, t in module.named_buffers() if t.is_meta]
    if lost:
        kind = type(module).__name__
        raise TypeError(f"{kind} has buffers that no file fills ({', '.join(lost)}); compute them in use")
    return module.eval().requires_grad_(False)


def _names_in(paths: Iterable[Path]) -> Iterator[tuple[Path, str]]:
    """Every tensor of some files, by file and name."""
    for path in paths:
        with safe_open(path, "pt") as f:
            names = list(f.keys())
        yield from ((path, name) for name in names)


def is_fp32(name: str, keep_fp32: Collection[str]) -> bool:
    """Whether a parameter stays in float32: its dotted name holds an entry of keep_fp32 as whole parts.

    "mod" covers blocks.0.mod, "time_mlp" covers time_mlp.up.weight.
    """
    return any(f".{part}." in f".{name}." for part in keep_fp32)


def _find(manifest: Manifest, folder: str | Path, component: str) -> Component:
    if component not in manifest.components:
        has = ", ".join(manifest.components)
        raise ValueError(f"{folder} has no {component}, only {has}; convert the whole release with {CONVERT}")
    return manifest.components[component]


def _check_fit(wanted: dict[str, tuple[int, ...]], paths: list[Path], config: Config) -> None:
    """Compare names and shapes with the files' headers; nothing else is read."""
    found = {}
    for path in paths:
        try:
            with open_tensors(path) as f:
                found |= {name: tuple(f.get_slice(name).get_shape()) for name in f.keys()}
        except SafetensorError as e:
            raise ValueError(f"{path} is not a safetensors file ({e}); make it with {CONVERT}") from None
    odd = [f"{n} is {found[n]}, wanted {wanted[n]}" for n in wanted if n in found and found[n] != wanted[n]]
    problems = [
        listing("missing", [n for n in wanted if n not in found]),
        listing("unexpected", [n for n in found if n not in wanted]),
        listing("of the wrong shape", odd),
    ]
    if any(problems):
        names, what = ", ".join(p.name for p in paths), ", ".join(p for p in problems if p)
        raise ValueError(f"{names} does not fit {_brief(config)}: {what}; convert it with {CONVERT}")


def listing(what: str, names: list[str], shown: int = 3) -> str:
    """'5 missing (a, b, c, ...)', or '' when there are none."""
    more = ", ..." if len(names) > shown else ""
    return f"{len(names)} {what} ({', '.join(names[:shown])}{more})" if names else ""


def _brief(config: Config) -> str:
    """The config's whole numbers: enough to tell two sizes of a model apart on one line."""
    values = ", ".join(f"{k}={v}" for k, v in asdict(config).items() if type(v) is int)
    return f"{type(config).__name__}({values})"


# Writing


@dataclass(frozen=True)
class Entry:
    """A tensor to be written. Its parts are joined along dimension 0 and asked for when their turn comes."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: Callable[[], Iterable[Tensor]]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class _Writer:
    """A new file that counts and hashes what passes through."""

    def __init__(self, path: Path):
        self.file, self.sha256, self.bytes = open(path, "xb"), hashlib.sha256(), 0

    def write(self, data: Any) -> None:
        self.file.write(data)
        self.sha256.update(data)
        self.bytes += len(data)

    def close(self, name: str) -> File:
        self.file.close()
        return File(name, self.bytes, self.sha256.hexdigest())


def write_tensors(path: Path, entries: list[Entry], progress: Callable[[int], None] | None = None) -> File:
    """Write a safetensors file one part at a time, header first; progress(bytes) after each tensor."""
    entries = sorted(entries, key=lambda e: -e.dtype.itemsize)  # widest first: every offset is then aligned
    writer = _Writer(path)
    try:
        writer.write(_header(entries))
        start = writer.bytes
        for entry in entries:
            end = writer.bytes + entry.bytes
            for part in entry.parts():
                raw = part.detach().to("cpu", entry.dtype).contiguous().reshape(-1).view(torch.uint8)
                writer.write(raw.numpy())
                del part, raw  # before the next part is read: memory holds one at a time
            if writer.bytes != end:
                raise ValueError(f"{entry.name}: its parts do not add up to {entry.shape} {entry.dtype}")
            if progress:
                progress(writer.bytes - start)
    finally:
        file = writer.close(path.name)
    return file


def _header(entries: list[Entry]) -> bytes:
    """The length and JSON header of a safetensors file, padded so that the data start at a multiple of 8."""
    names, at, header = {dtype: name for name, dtype in DTYPES.items()}, 0, {"__metadata__": {"format": "pt"}}
    for e in entries:
        header[e.name] = {"dtype": names[e.dtype], "shape": e.shape, "data_offsets": [at, at + e.bytes]}
        at += e.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def module_entries(module: nn.Module, dtype: torch.dtype | None = None) -> list[Entry]:
    """The module's parameters and saved buffers, in dtype (None: as they are)."""
    return [
        Entry(n, tuple(t.shape), dtype or t.dtype, lambda t=t: (t,)) for n, t in module.state_dict().items()
    ]


def copy_file(path: Path, folder: Path, name: str) -> File:
    """Copy a file to folder / name."""
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    writer = _Writer(folder / name)
    with open(path, "rb") as f:
        while chunk := f.read(1 << 20):
            writer.write(chunk)
    return writer.close(name)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write model.json."""
    parts = {
        name: {
            "class": part.class_name,
            "config": asdict(part.config) if part.config else {},
            "files": [asdict(file) for file in part.files],
        }
        for name, part in manifest.components.items()
    }
    content = {"format": FORMAT} | {f.name: getattr(manifest, f.name) for f in fields(manifest)}
    content |= {
        "components": parts,
        "schedule": asdict(manifest.schedule),
        "defaults": asdict(manifest.defaults),
    }
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    (folder / "model.json").write_text(text, encoding="utf-8")


@contextmanager
def new_folder(out: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder that appears complete or not at all: OUT.partial, renamed at the end or removed on failure.

    OUT must not exist, or be empty; overwrite replaces a model folder, and nothing that is not one.
    """
    out = Path(os.path.abspath(out))
    partial = out.with_name(out.name + ".partial")
    _check_target(out, overwrite)
    try:
        partial.mkdir(parents=True)
    except FileExistsError:
        raise OSError(
            f"{partial} exists: another run is writing it, or one was killed; remove it first"
        ) from None
    try:
        yield partial
        _move_into_place(partial, out)
    except BaseException:  # Ctrl-C too
        shutil.rmtree(partial)
        raise


def _check_target(out: Path, overwrite: bool) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not overwrite:
        raise OSError(
            f"{out} exists and is not an empty folder; choose another name, or replace it with --overwrite"
        )
    if not (out / "model.json").is_file():
        raise OSError(
            f"{out} is not a model folder (no model.json), so it is not overwritten; choose another name"
        )


def _move_into_place(partial: Path, out: Path) -> None:
    old = out.with_name(out.name + ".old")
    if out.exists():
        out.rename(old)
    partial.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def write_model_folder(
    out: str | Path,
    manifest: Manifest,
    contents: dict[str, list[Entry] | Path],
    *,
    overwrite: bool = False,
    progress: Callable[[str, int], None] = lambda component, done: None,
) -> Manifest:
    """Write a model folder; returns the manifest with its files filled in.

    contents: per component the tensors to write, or a file to copy (a tokenizer). progress(component, bytes).
    """
    with new_folder(out, overwrite=overwrite) as folder:
        parts = {}
        for name in manifest.components:
            what = contents[name]
            if isinstance(what, Path):
                file = copy_file(what, folder, f"{name}/{what.name}")
            else:
                file = write_tensors(
                    folder / f"{name}.safetensors", what, lambda n, name=name: progress(name, n)
                )
            parts[name] = replace(manifest.components[name], files=(file,))
        manifest = replace(manifest, components=parts)
        write_manifest(folder, manifest)
    return manifest


def save_model_folder(
    out: str | Path,
    *,
    family: str,
    components: dict[str, tuple[str, Config | None, nn.Module | str | Path]],
    schedule: ScheduleConfig,
    defaults: Defaults,
    source: str,
    dtype: torch.dtype | None = None,
    preset: str | None = None,
    overwrite: bool = False,
) -> Manifest:
    """Save modules as a model folder. components: name -> (class name, config, module or file to copy)."""
    parts = {name: Component(kind, config, ()) for name, (kind, config, _) in components.items()}
    contents = {
        name: module_entries(what, dtype) if isinstance(what, nn.Module) else Path(what)
        for name, (_, _, what) in components.items()
    }
    manifest = Manifest(family, preset, parts, schedule, defaults, source, dropped={})
    return write_model_folder(out, manifest, contents, overwrite=overwrite)
