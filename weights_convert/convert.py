"""From SOURCE to a model folder: find the components, settle the settings, stream the tensors."""

import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial, reduce
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from minidit.presets import PRESETS, Defaults, ScheduleConfig
from minidit.weights import (
    COMPONENTS,
    Component,
    Config,
    Entry,
    Manifest,
    config_from_json,
    listing,
    write_model_folder,
)
from weights_convert.checkpoint import (
    PICKLES,
    Checkpoint,
    Upstream,
    find_files,
    group_shards,
    open_checkpoint,
    read_json,
)
from weights_convert.layouts import KNOWN, make_config, match, recognise
from weights_convert.names import Fit, Layout, Piece, Shapes, why_dropped
from weights_convert.tokenizers import Tokenizers, find_tokenizers

DTYPES = {"keep": None, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PLAIN_DEFAULTS = Defaults(width=832, height=480, num_frames=81, steps=50, guidance_scale=5.0, fps=16)
NEEDED = ("transformer", "text_encoder", "vae", "tokenizer")
NEEDED_TOO = {"hunyuan_video": ("text_encoder_2", "tokenizer_2")}


@dataclass(frozen=True)
class Found:
    """A recognised component of SOURCE."""

    layout: Layout
    checkpoint: Checkpoint
    config: Config
    targets: Shapes  # our parameter -> shape
    fit: Fit


def convert(
    source: Path, out: Path, *, dtype: str = "keep", config: Path | None = None, overwrite: bool = False
) -> Manifest:
    """Convert SOURCE into the model folder OUT and print what was done."""
    if not source.exists():
        raise OSError(f"{source} does not exist; give a downloaded folder or file")
    if source.resolve().is_relative_to(out.resolve()):
        raise OSError(f"{source} lies in {out}, which is about to be written; choose another OUT")
    override = read_override(config)
    found = find_components(source, override.get("components", {}))
    with TemporaryDirectory() as scratch:
        tokenizers = find_tokenizers(source, Path(scratch))
        if not found and not tokenizers:
            raise ValueError(f"{source} holds nothing that is recognised; minidit converts {KNOWN}")
        manifest = describe(source, found, tokenizers, override)
        contents = {name: entries(part, DTYPES[dtype]) for name, part in found.items()}
        sizes = {name: sum(entry.bytes for entry in what) for name, what in contents.items()}
        check_space(out, sum(sizes.values()))
        contents |= {name: path for name, (_, path) in tokenizers.items()}
        manifest = write_model_folder(
            out, manifest, contents, overwrite=overwrite, progress=partial(show, sizes)
        )
    print(summary(out, manifest))
    return manifest


# What SOURCE holds


def find_components(source: Path, override: dict) -> dict[str, Found]:
    """Open and recognise every checkpoint of SOURCE; two of a kind are an error, unknown ones are named."""
    found: dict[str, Found] = {}
    for expert in ("transformer_2", "low_noise_model", "high_noise_model"):
        if (source / expert).is_dir():
            raise ValueError(f"{source} is a Wan 2.2 release of two experts ({expert}); minidit runs Wan 2.1")
    for files in group_shards(find_files(source, (".safetensors", *PICKLES))):
        checkpoint = open_checkpoint(files)
        try:
            layout = recognise(checkpoint.shapes)
        except ValueError as e:
            raise ValueError(f"{files[0]}: {e}") from None
        if layout is None:
            print(f"skipped {files[0]}: not recognised", file=sys.stderr)
        elif is_second_copy(files[0], found.get(layout.component)):
            print(f"skipped {files[0]}: beside the same in safetensors", file=sys.stderr)
        elif layout.component in found:
            other = found[layout.component].checkpoint.files[0]
            raise ValueError(f"{other} and {files[0]} are both a {layout.component}; move one of them away")
        else:
            values = override.get(layout.component, {}).get("config", {})
            found[layout.component] = fill(layout, checkpoint, values)
    if extra := [name for name in override if name not in found]:
        raise ValueError(f"--config names {', '.join(extra)}, but {source} holds {', '.join(found)}")
    return found


def is_second_copy(path: Path, other: Found | None) -> bool:
    """Whether a pickle lies in one folder with safetensors of the same component, as the hub has it."""
    if other is None or path.suffix not in PICKLES:
        return False
    first = other.checkpoint.files[0]
    return first.suffix == ".safetensors" and first.parent == path.parent


def fill(layout: Layout, checkpoint: Checkpoint, override: dict) -> Found:
    """Settle the config and match every tensor; ValueError with what is left over on either side."""
    odd = [name for name, tensor in checkpoint.tensors.items() if tensor.dtype is None]
    if odd := [name for name in odd if why_dropped(name, layout.drop) is None]:
        what = listing("entries are not float tensors", odd)
        raise ValueError(f"{checkpoint.files[0]}: {what}; get an unquantised release")
    try:
        config = make_config(layout, checkpoint.shapes, checkpoint.config, override)
        targets, fit = match(layout, config, checkpoint.shapes)
    except ValueError as e:
        raise ValueError(f"{checkpoint.files[0]}: {e}") from None
    if fit.problems:
        what = f"a {layout.family} {layout.component} ({layout.origin} names)"
        raise ValueError(f"{checkpoint.files[0]} is not quite {what}: {'; '.join(fit.problems)}")
    return Found(layout, checkpoint, config, targets, fit)


# What model.json says


def read_override(path: Path | None) -> dict:
    """The --config file; its outer keys are checked here, the fields where they are used."""
    override = read_json(path) if path else {}
    allowed = {"components", "schedule", "defaults"}
    if unknown := sorted(set(override) - allowed):
        raise ValueError(f"{path} has unknown keys {', '.join(unknown)}; wanted {', '.join(sorted(allowed))}")
    parts = override.get("components", {})
    values = [*override.values(), *(parts.values() if isinstance(parts, dict) else ())]
    if not all(isinstance(value, dict) for value in values):
        raise ValueError(f"{path}: components, schedule and defaults are objects with named values")
    for name, part in parts.items():
        if set(part) != {"config"} or not isinstance(part["config"], dict):
            raise ValueError(f'{path}: components.{name} is {{"config": {{...}}}} and nothing else')
    return override


def describe(source: Path, found: dict[str, Found], tokenizers: Tokenizers, override: dict) -> Manifest:
    """The manifest, its files still to come. A known release brings its own schedule and defaults."""
    config = found["transformer"].config if "transformer" in found else None
    preset = next((name for name, p in PRESETS.items() if p.transformer == config), None)
    parts = {
        name: Component(part.layout.class_name, told_by_release(name, part, preset, override), ())
        for name, part in found.items()
    }
    parts |= {name: Component(kind, None, ()) for name, (kind, _) in tokenizers.items()}
    scheduler = find_scheduler(source)
    family = next((found[name].layout.family for name in ("transformer", *found) if name in found), "wan")
    schedule, defaults = release_settings(preset, family, scheduler, "schedule" in override)
    origins = dict.fromkeys(found[name].layout.origin for name in COMPONENTS if name in found)
    return Manifest(
        family=family,
        preset=preset,
        components={name: parts[name] for name in COMPONENTS if name in parts},
        schedule=merged(schedule, override, "schedule"),
        defaults=merged(defaults, override, "defaults"),
        source=f"{source.resolve().name} ({', '.join(origins) or 'tokenizer'}{note(scheduler)})",
        dropped={name: why for part in found.values() for name, why in part.fit.dropped.items()},
    )


def told_by_release(name: str, part: Found, preset: str | None, override: dict) -> Config:
    """A component's config, with what its own files cannot say taken from the release that it is part of."""
    given = override.get("components", {}).get(name, {}).get("config", {})
    missing = [field for field in part.layout.unsaid if field not in given]
    if missing and preset is None:
        example = f'{{"components": {{"{name}": {{"config": {{"{missing[0]}": ...}}}}}}}}'
        raise ValueError(
            f"{part.checkpoint.files[0]} does not say {', '.join(missing)}, and SOURCE is no known release; "
            f"give it in a file with --config: {example}"
        )
    return replace(part.config, **{n: getattr(PRESETS[preset].components[name][1], n) for n in missing})


def release_settings(
    preset: str | None, family: str, scheduler: dict, is_given: bool
) -> tuple[ScheduleConfig, Defaults]:
    """A known release's own settings; a relative's are those of its family, under its own scheduler.

    Latte's scheduler file counts in the release too: the original reads it.
    """
    known = PRESETS.get(preset) or next((p for p in PRESETS.values() if p.family == family != "wan"), None)
    if known and (not scheduler or (preset and scheduler.get("_class_name") != "DDIMScheduler")):
        return known.schedule, known.defaults
    schedule = read_schedule(scheduler, is_given)
    if family == "hunyuan_video":  # its pipeline tells the scheduler which sigmas to visit
        schedule = replace(schedule, sigma_grid="wan")
    return schedule, known.defaults if known else PLAIN_DEFAULTS


def merged(values: Any, override: dict, key: str) -> Any:
    """A config dataclass with the user's values over its own."""
    return config_from_json(type(values), asdict(values) | override.get(key, {}), f"--config: {key}")


def find_scheduler(source: Path) -> dict:
    """diffusers' scheduler_config.json, or {}."""
    path = source / "scheduler" / "scheduler_config.json"
    return read_json(path) if path.is_file() else {}


def read_schedule(scheduler: dict, is_given: bool) -> ScheduleConfig:
    """A diffusers scheduler in our words; the default where there is none or --config gives the schedule."""
    kind = scheduler.get("_class_name")
    if kind == "UniPCMultistepScheduler" and scheduler.get("use_flow_sigmas"):
        return ScheduleConfig("unipc", "diffusers", float(scheduler.get("flow_shift", 1.0)))
    if kind == "FlowMatchEulerDiscreteScheduler":
        return ScheduleConfig("euler", "diffusers", float(scheduler.get("shift", 1.0)))
    if kind in ("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"):
        solver, shift = "dpm" if "DPM" in kind else "ddim", float(scheduler.get("snr_shift_scale", 3.0))
        return ScheduleConfig(
            solver, "trailing", shift, betas="zero-snr", prediction="v", dynamic_guidance=solver == "dpm"
        )
    if kind == "DDIMScheduler":
        return read_ddim(scheduler)
    if scheduler and not is_given:
        raise ValueError(f"scheduler {kind} is not known; give the schedule in a file with --config")
    return ScheduleConfig()


def read_ddim(scheduler: dict) -> ScheduleConfig:
    """Latte's scheduler; its betas are in the release's code, over whatever the file says."""
    spacing, offset = scheduler.get("timestep_spacing", "leading"), scheduler.get("steps_offset", 0)
    if spacing not in ("leading", "linspace", "trailing") or offset not in (0, 1):
        raise ValueError(f"DDIMScheduler with {spacing} timesteps and offset {offset} is not known")
    grid = "leading-1" if spacing == "leading" and offset else spacing  # upstream ignores it elsewhere
    ends_clean = scheduler.get("set_alpha_to_one", True)
    return ScheduleConfig("ddim", grid, 1.0, "linear", "epsilon", ends_clean)


def note(scheduler: dict) -> str:
    """What the source's own scheduler file said, for the record."""
    shift = scheduler.get("flow_shift", scheduler.get("shift"))
    return f"; scheduler {scheduler.get('_class_name')}, shift {shift}" if scheduler else ""


# The tensors


def entries(part: Found, dtype: torch.dtype | None) -> list[Entry]:
    """One Entry per parameter, in the model's order, that reads its upstream tensors when its turn comes."""
    upstream, result = part.checkpoint.tensors, []
    for name, shape in part.targets.items():
        pieces = part.fit.pieces[name]
        kept = reduce(torch.promote_types, [upstream[piece.upstream].dtype for piece in pieces])
        result.append(Entry(name, shape, dtype or kept, partial(read, pieces, upstream, dtype)))
    return result


def read(pieces: list[Piece], upstream: dict[str, Upstream], dtype: torch.dtype | None) -> Iterator[Tensor]:
    """The parts of a parameter, one after the other."""
    for piece in pieces:
        yield read_piece(piece, upstream[piece.upstream], dtype)  # without a name: it would outlive its turn


def read_piece(piece: Piece, upstream: Upstream, dtype: torch.dtype | None) -> Tensor:
    tensor = upstream.read()
    if dtype == torch.float16 and tensor.abs().max() > torch.finfo(dtype).max:
        raise ValueError(f"{piece.upstream} has values beyond the range of fp16; use --dtype bf16")
    return piece.take(tensor)


def check_space(out: Path, needed: int) -> None:
    """Refuse now what would fill the disk an hour from now."""
    place = next(folder for folder in out.absolute().parents if folder.exists())
    if (free := shutil.disk_usage(place).free) < needed:
        raise OSError(
            f"{out} needs {gigabytes(needed)}, {place} has {gigabytes(free)} free; try --dtype bf16"
        )


def show(sizes: dict[str, int], component: str, done: int) -> None:
    """The progress of a component: one line that grows on a terminal, one line at its end elsewhere."""
    is_done = done >= sizes[component]
    if sys.stdout.isatty():
        print(
            f"\r{component}: {gigabytes(done)} of {gigabytes(sizes[component])}",
            end="\n" if is_done else "",
            flush=True,
        )
    elif is_done:
        print(f"{component}: {gigabytes(done)}", flush=True)


def summary(out: Path, manifest: Manifest) -> str:
    """What was written, and what to do with it."""
    size = gigabytes(sum(file.bytes for part in manifest.components.values() for file in part.files))
    needed = NEEDED + NEEDED_TOO.get(manifest.family, ())
    missing = [name for name in needed if name not in manifest.components]
    if missing:
        then = f"SOURCE has no {', '.join(missing)}, which a video needs: convert the whole release"
    else:
        then = f'run it with python -m minidit generate "a red fox in the snow" --model {out}'
    what = f"{manifest.preset or manifest.family} ({', '.join(manifest.components)}; {size})"
    return f"wrote {what} to {out}; {then}"


def gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e7 else f"{count / 1e6:.2f} MB"
