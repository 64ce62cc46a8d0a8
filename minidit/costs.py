"""What a model costs before it is run: parameters, multiply-adds, memory by stage."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from minidit.families import find_family
from minidit.generate import DEMO, build, part_dtype
from minidit.presets import Defaults, find_preset
from minidit.settings import DTYPES
from minidit.weights import is_fp32, read_manifest

GIB = 2**30


@dataclass(frozen=True)
class Parts:
    """What a preset and a model folder have in common. components: name -> (class name, config)"""

    family: str
    components: dict[str, tuple[str, Any]]
    defaults: Defaults


@dataclass(frozen=True)
class Costs:
    """Of one video of one size."""

    size: tuple[int, int, int]  # width, height, frames
    tokens: int  # per branch
    parameters: dict[str, int]  # by component
    macs: int  # per forward and branch
    macs_by_sub: dict[str, int]
    weight_bytes: dict[str, int]  # by component
    activation_bytes: dict[str, int]  # by component, estimated; text encoders need next to nothing


def find_parts(model: str) -> Parts:
    """The parts of a preset, of a model folder, or of "demo"."""
    folder = DEMO if model == "demo" else Path(model)
    if folder.is_dir():
        manifest = read_manifest(folder)
        missing = [name for name in ("transformer", "vae") if name not in manifest.components]
        if missing:
            raise ValueError(f"{folder} has no {', '.join(missing)}; convert the whole release")
        parts = {n: (p.class_name, p.config) for n, p in manifest.components.items() if p.config is not None}
        return Parts(manifest.family, parts, manifest.defaults)
    preset = find_preset(model)
    return Parts(preset.family, preset.components, preset.defaults)


def measure(parts: Parts, size: tuple[int, int, int], dtype: str) -> Costs:
    """Costs of a video of size (width, height, frames) with weights in dtype."""
    family = find_family(parts.family, {name: config for name, (_, config) in parts.components.items()})
    latent = family.latent_shape(*size)
    tokens, run = family.tokens(latent), DTYPES[dtype]
    built = {name: build(*part) for name, part in parts.components.items()}
    macs = built["transformer"].macs(latent[1:], family.text_len)
    by_sub: dict[str, int] = {}
    for (_, sub), count in macs.items():
        by_sub[sub] = by_sub.get(sub, 0) + count
    weights = {name: weight_bytes(m, part_dtype(parts.components[name][0], run)) for name, m in built.items()}
    activations = {
        "transformer": built["transformer"].activation_bytes(tokens, run.itemsize),
        "vae": built["vae"].activation_bytes(*size),
    }
    parameters = {name: sum(p.numel() for p in module.parameters()) for name, module in built.items()}
    return Costs(size, tokens, parameters, sum(macs.values()), by_sub, weights, activations)


def weight_bytes(module: nn.Module, dtype: Any) -> int:
    sizes = ((4 if is_fp32(n, module.keep_fp32) else dtype.itemsize, p) for n, p in module.named_parameters())
    return sum(item * p.numel() for item, p in sizes)


def report(model: str, size: tuple[int | None, int | None, int | None], dtype: str) -> str:
    """The costs of one video as a table to read.

    model: a preset, a model folder or "demo" · size: (width, height, frames), None where the default is meant
    """
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; choose one of {', '.join(DTYPES)}")
    parts = find_parts(model)
    default = (parts.defaults.width, parts.defaults.height, parts.defaults.num_frames)
    costs = measure(parts, tuple(given or d for given, d in zip(size, default, strict=True)), dtype)
    c, d = parts.components["transformer"][1], parts.defaults
    forwards, kind = (1, "") if (d.true_cfg or d.guidance_scale) == 1 else (2, "guided ")
    lines = [
        f"{model}: {costs.size[0]}x{costs.size[1]}, {costs.size[2]} frames, {dtype}",
        f"  transformer  {c.depth} blocks, width {c.width}, {c.heads} heads x {c.width // c.heads}, "
        f"{costs.tokens} video tokens",
        "  parameters   " + ", ".join(f"{name} {count(n)}" for name, n in costs.parameters.items()),
        f"  per forward and branch: {costs.macs / 1e12:.4g} TMAC ("
        + ", ".join(f"{sub} {n / costs.macs:.0%}" for sub, n in costs.macs_by_sub.items())
        + f"); {d.steps} {kind}steps: {forwards * d.steps * costs.macs / 1e15:.4g} PMAC",
        "  memory by stage, one component loaded at a time (activations are estimates):",
    ]
    for name, weights in costs.weight_bytes.items():
        extra = costs.activation_bytes.get(name, 0)
        lines.append(f"    {name:<13}{weights / GIB:8.2f} GiB weights  {extra / GIB:8.2f} GiB activations")
    return "\n".join(lines)


def count(n: int) -> str:
    return f"{n / 1e9:.3f} B" if n >= 1e9 else f"{n / 1e6:.2f} M"
