"""What a model costs before it is run: parameters, multiply-adds, memory by stage."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from minidit.generate import DEMO, build
from minidit.presets import Defaults, T5Config, WanConfig, WanVAEConfig, find_preset
from minidit.settings import DTYPES, count_tokens, latent_size
from minidit.weights import is_fp32, read_manifest

GIB = 2**30


@dataclass(frozen=True)
class Parts:
    """The configs of a model and its default size: what a preset and a model folder have in common."""

    transformer: WanConfig
    text_encoder: T5Config
    vae: WanVAEConfig
    defaults: Defaults


@dataclass(frozen=True)
class Costs:
    """Of one video of one size."""

    size: tuple[int, int, int]  # width, height, frames
    tokens: int  # per branch
    parameters: dict[str, int]  # by component
    macs: int  # per forward and branch
    macs_by_sub: dict[str, int]
    weight_bytes: dict[str, int]  # by stage
    activation_bytes: dict[str, int]  # by stage, estimated


def find_parts(model: str) -> Parts:
    """The parts of a preset, of a model folder, or of "demo"."""
    folder = DEMO if model == "demo" else Path(model)
    if folder.is_dir():
        manifest = read_manifest(folder)
        missing = [name for name in ("transformer", "text_encoder", "vae") if name not in manifest.components]
        if missing:
            raise ValueError(f"{folder} has no {', '.join(missing)}; convert the whole release")
        of = lambda name: manifest.components[name].config
        return Parts(of("transformer"), of("text_encoder"), of("vae"), manifest.defaults)
    preset = find_preset(model)
    return Parts(preset.transformer, preset.text_encoder, preset.vae, preset.defaults)


def measure(parts: Parts, size: tuple[int, int, int], dtype: str) -> Costs:
    """Costs of a video of size (width, height, frames) with weights in dtype."""
    latent = latent_size(parts.vae, parts.transformer.patch, *size)
    tokens = count_tokens(latent, parts.transformer.patch)
    classes = {"text_encoder": "T5Encoder", "transformer": "Wan", "vae": "WanVAE"}
    built = {name: build(kind, getattr(parts, name), DTYPES[dtype]) for name, kind in classes.items()}
    macs = built["transformer"][0].macs(latent, parts.transformer.text_len)
    by_sub: dict[str, int] = {}
    for (_, sub), count in macs.items():
        by_sub[sub] = by_sub.get(sub, 0) + count
    weights = {name: weight_bytes(*part) for name, part in built.items()}
    item = DTYPES[dtype].itemsize
    activations = {
        "text_encoder": parts.transformer.text_len * 4 * (2 * parts.text_encoder.mlp_width),
        "transformer": transformer_activations(parts.transformer, tokens, item),
        "vae": vae_activations(parts.vae, size),
    }
    parameters = {name: sum(p.numel() for p in part[0].parameters()) for name, part in built.items()}
    return Costs(size, tokens, parameters, sum(macs.values()), by_sub, weights, activations)


def weight_bytes(module: nn.Module, dtype: Any, keep_fp32: tuple[str, ...]) -> int:
    return sum(
        p.numel() * (4 if is_fp32(name, keep_fp32) else dtype.itemsize)
        for name, p in module.named_parameters()
    )


def transformer_activations(config: WanConfig, tokens: int, item: int) -> int:
    """The fullest moment of a block, one branch at a time, beside text keys and values of two branches.

    In attention: h, its normed copy, qkv and the rotated q and k with their fp32 forms; in the MLP: h, the
    normed copy and the hidden layer before and after GELU.
    """
    attention = config.width * (5 * item + 2 * item + 8)
    mlp = 2 * config.width * item + 2 * config.mlp_width * item
    text = 2 * 2 * config.depth * config.text_len * config.width * item
    return tokens * max(attention, mlp) + text


def vae_activations(config: WanVAEConfig, size: tuple[int, int, int]) -> int:
    """Four pixel frames in flight at full resolution, in fp32, and the video that is collected.

    Every convolution of the last level keeps two frames of context and works on three shifted copies.
    """
    width, height, frames = size
    per_frame = width * height * 4
    level = 2 * config.base * (4 * 3 + 2 * 2 * (config.res_blocks + 1))
    return per_frame * level + frames * width * height * 3 * 5


def report(model: str, size: tuple[int | None, int | None, int | None], dtype: str) -> str:
    """The costs of one video as a table to read.

    model: a preset, a model folder or "demo" · size: (width, height, frames), None where the default is meant
    """
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; choose one of {', '.join(DTYPES)}")
    parts = find_parts(model)
    default = (parts.defaults.width, parts.defaults.height, parts.defaults.num_frames)
    costs = measure(parts, tuple(given or d for given, d in zip(size, default, strict=True)), dtype)
    c = parts.transformer
    lines = [
        f"{model}: {costs.size[0]}x{costs.size[1]}, {costs.size[2]} frames, {dtype}",
        f"  transformer  {c.depth} blocks, width {c.width}, {c.heads} heads x {c.width // c.heads}, "
        f"{costs.tokens} video tokens",
        "  parameters   " + ", ".join(f"{name} {count(n)}" for name, n in costs.parameters.items()),
        f"  per forward and branch: {costs.macs / 1e12:.4g} TMAC ("
        + ", ".join(f"{sub} {n / costs.macs:.0%}" for sub, n in costs.macs_by_sub.items())
        + f"); {parts.defaults.steps} guided steps: {2 * parts.defaults.steps * costs.macs / 1e15:.4g} PMAC",
        "  memory by stage, one component loaded at a time (activations are estimates):",
    ]
    for name, weights in costs.weight_bytes.items():
        extra = costs.activation_bytes[name]
        lines.append(f"    {name:<13}{weights / GIB:8.2f} GiB weights  {extra / GIB:8.2f} GiB activations")
    return "\n".join(lines)


def count(n: int) -> str:
    return f"{n / 1e9:.3f} B" if n >= 1e9 else f"{n / 1e6:.2f} M"
