"""What a video costs before it is run: parameters, multiply-adds, memory by stage."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minidit.cache.plan import Policy
from minidit.cache.store import ring_bytes, ring_shapes
from minidit.components import DEMO, build, part_dtype
from minidit.families import Family, find_family
from minidit.layers import hidden_copies
from minidit.memory import HEAP, Stage
from minidit.offload import SLOTS
from minidit.parallel import ALONE, Layout, frames_of, most_tokens, part_of
from minidit.presets import Defaults, HunyuanVideoConfig, OpenSoraConfig, ScheduleConfig, find_preset
from minidit.quantize import QuantLinear, quantize_blocks
from minidit.sampling import Forward, run_info, site_shapes
from minidit.settings import DTYPES, Settings
from minidit.vae.tiles import video_bytes
from minidit.weights import Manifest, is_fp32, read_manifest

# what ranks have beside a block's activations, in copies of h: around attention queries, keys and values are
# joined, sent and received; before the head every rank sends its share to all, and joins what came
TRADED, GATHERED = 9, 3


@dataclass(frozen=True)
class Parts:
    """What a preset and a model folder have in common. components: name -> (class name, config)"""

    family: str
    components: dict[str, tuple[str, Any]]
    schedule: ScheduleConfig
    defaults: Defaults
    preset: str  # "" for none

    def find_family(self) -> Family:
        configs = {name: config for name, (_, config) in self.components.items()}
        return find_family(self.family, configs, self.schedule)


@dataclass(frozen=True)
class Costs:
    """Of one video of one size."""

    size: tuple[int, int, int]  # width, height, frames
    tokens: int  # per branch, of all ranks
    parameters: dict[str, int]  # by component
    macs: int  # per forward and branch
    macs_by_sub: dict[str, int]
    weight_bytes: dict[str, int]  # by component
    block_bytes: tuple[int, ...]  # of the transformer's weights, block by block
    activation_bytes: dict[str, int]  # by component, estimated; text encoders need next to nothing
    text_bytes: int  # keys and values of one branch's text, in all blocks
    text_macs: int  # of making them anew, per forward and branch
    decoder: str  # the component that decodes
    video_bytes: int  # what it has decoded, in CPU memory


def find_parts(model: str) -> Parts:
    """The parts of a preset, of a model folder, or of "demo"."""
    folder = DEMO if model == "demo" else Path(model)
    if folder.is_dir():
        manifest = read_manifest(folder)
        missing = [name for name in ("transformer", "vae") if name not in manifest.components]
        if missing:
            raise ValueError(f"{folder} has no {', '.join(missing)}; convert the whole release")
        return parts_of(manifest)
    preset = find_preset(model)
    return Parts(preset.family, preset.components, preset.schedule, preset.defaults, model)


def parts_of(manifest: Manifest) -> Parts:
    """The parts of a model folder."""
    parts = {n: (p.class_name, p.config) for n, p in manifest.components.items() if p.config is not None}
    return Parts(manifest.family, parts, manifest.schedule, manifest.defaults, manifest.preset or "")


def measure(
    parts: Parts,
    size: tuple[int, int, int],
    dtype: str,
    weights: str = "full",
    rows: int = 1,
    *,
    layout: Layout = ALONE,
    tiled: bool = False,
    device: str = "cuda",
) -> Costs:
    """Costs of a video of size (width, height, frames) in dtype.

    weights: of the transformer's blocks · rows: guidance branches that run as one batch · layout: of ranks
    that share the video; memory is that of the busiest · tiled: decoding goes tile by tile · device: a CPU
    has some activations less
    """
    family = parts.find_family()
    latent = family.latent_shape(*size)
    tokens, run = family.tokens(latent), DTYPES[dtype]
    built = {name: build(*part) for name, part in parts.components.items()}
    parameters = {name: sum(p.numel() for p in module.parameters()) for name, module in built.items()}
    macs = built["transformer"].macs(latent[1:], family.text_len)
    by_sub: dict[str, int] = {}
    for (_, sub), n in macs.items():
        by_sub[sub] = by_sub.get(sub, 0) + n
    if weights != "full":
        quantize_blocks(built["transformer"], weights)
    types = {name: part_dtype(class_name, run) for name, (class_name, _) in parts.components.items()}
    held = {name: weight_bytes(m, types[name], m.keep_fp32) for name, m in built.items()}
    model = built["transformer"]
    blocks = tuple(weight_bytes(block, types["transformer"], model.keep_fp32) for block in model.blocks)
    decoder = family.decoder(latent[1])
    vae, item = built[decoder], types[decoder].itemsize
    activations = {
        "transformer": step_bytes(model, frames_of(model.subs, latent[1]), tokens, run, rows, layout, device),
        "vae": vae.activation_bytes(*size, item, **({"tiled": True} if tiled else {})),
    }
    return Costs(
        size=size,
        tokens=tokens,
        parameters=parameters,
        macs=sum(macs.values()),
        macs_by_sub=by_sub,
        weight_bytes=held,
        block_bytes=blocks,
        activation_bytes=activations,
        text_bytes=text_bytes(model, family.text_len, run),
        text_macs=count_crosses(model) * text_macs(model, family.text_len),
        decoder=decoder,
        video_bytes=video_bytes(*size, item, vae.tiles if tiled else None),
    )


def step_bytes(
    model: nn.Module, frames: int, tokens: int, run: torch.dtype, rows: int, layout: Layout, device: str
) -> int:
    """Activations of a step on the busiest of the ranks that share it.

    frames: within which tokens attend to each other · tokens: per branch, of all ranks · rows: guidance
    branches that run as one batch
    """
    here = most_tokens(layout, tokens, frames)
    block = model.activation_bytes(rows * here, run.itemsize, hidden_copies(device, run))
    block += dequantised_bytes(model, run)
    if layout.ulysses == 1:
        return block
    state = rows * model.config.width * run.itemsize  # of one token
    return max(block + TRADED * here * state, GATHERED * tokens * state)


def text_bytes(model: nn.Module, rows: int, run: torch.dtype) -> int:
    """Keys and values of one branch's text, of so many rows, in all blocks; none where text is part of h."""
    return 2 * count_crosses(model) * rows * model.config.width * run.itemsize


def text_macs(model: nn.Module, rows: int) -> int:
    """Multiply-adds of making the keys and values of so many rows of text in one cross-attention."""
    return 2 * rows * model.config.width**2


def count_crosses(model: nn.Module) -> int:
    """Cross-attentions of all blocks."""
    return len(model.blocks) * sum(name.endswith("cross") for name in model.subs)


def weight_bytes(module: nn.Module, run: torch.dtype, keep_fp32: Collection[str]) -> int:
    """Bytes of a module's tensors as they are loaded; what is quantised has a dtype of its own already."""

    def item(name: str, tensor: Tensor) -> int:
        if tensor.dtype != torch.float32:
            return tensor.itemsize
        return 4 if is_fp32(name, keep_fp32) else run.itemsize

    return sum(item(name, tensor) * tensor.numel() for name, tensor in module.state_dict().items())


@dataclass(frozen=True)
class Footprint:
    """Memory of a video, from which follows every way of holding its components."""

    device: str
    costs: Costs
    cache: int  # bytes of a caching method
    text: int = 0  # bytes of the text's keys and values, of all branches

    def stages(self, offload: str, stays: Sequence[str] = ()) -> list[Stage]:
        """offload: none, parts or blocks · stays: components that are never let go"""
        weights, blocks = self.costs.weight_bytes, self.costs.block_bytes
        text = sum(size for name, size in weights.items() if name.startswith("text_encoder"))
        below = sum(weights[name] for name in stays)
        transformer, host = weights["transformer"], 0
        if offload == "blocks":
            transformer += SLOTS * max(blocks)
            if self.device != "cpu":
                transformer, host = transformer - sum(blocks), sum(blocks)
        left = transformer if offload == "none" else 0
        heap = HEAP if self.device == "cpu" else 1
        denoise, decode = (self.costs.activation_bytes[name] for name in ("transformer", "vae"))
        decode += self.costs.video_bytes if self.device == "cpu" else 0
        return [
            Stage("text", text, 0),
            Stage("denoise", below + transformer, int(heap * denoise), self.cache, self.text, host),
            Stage("decode", below + left + weights[self.costs.decoder], int(heap * decode)),
        ]


def footprint(parts: Parts, settings: Settings, cache: int = 0, *, layout: Layout = ALONE) -> Footprint:
    """What a video takes of memory, of the busiest rank. cache: bytes of its method, from cache_bytes()"""
    size = settings.width, settings.height, settings.num_frames
    branches = len(parts.find_family().branches(settings.cfg_scale))
    rows = branches // layout.cfg if settings.batched_guidance else 1
    how = dict(layout=layout, tiled=settings.tiled, device=settings.device)
    costs = measure(parts, size, settings.dtype, settings.weights, rows, **how)
    return Footprint(settings.device, costs, cache, branches * costs.text_bytes)


def cache_bytes(
    parts: Parts,
    settings: Settings,
    policy: Policy,
    constants: Mapping[Any, Tensor],
    layout: Layout = ALONE,
) -> int:
    """What a caching method keeps: its rings, found on the meta device, and the tensors of its profile.

    layout: of the ranks; what counts is the first one's, whose share is the largest
    """
    family, model = parts.find_family(), build(*parts.components["transformer"])
    model.to(DTYPES[settings.dtype])
    branches = family.branches(settings.cfg_scale)
    latent = family.latent_of(settings)
    with torch.inference_mode(), torch.device("meta"):
        text, noise = longest_text(model.config, family.text_len, len(branches)), torch.empty(1, *latent)
        context = family.prepare(model, text, settings)
        part = None if layout == ALONE else part_of(layout, model, context)
        tokens, batched = family.tokens(latent), settings.batched_guidance
        forward = Forward(model, context, batched, video_tokens=tokens, part=part)
        shape_of = site_shapes(forward, noise)
    steps = family.schedule(settings).steps(settings.cfg_scale)
    needs = policy.reset(run_info(forward, steps, parts.family, parts.preset))
    rings = ring_bytes(ring_shapes(needs, forward.branches_here, shape_of))
    return rings + sum(t.numel() * DTYPES[settings.dtype].itemsize for t in constants.values())


def dequantised_bytes(model: nn.Module, run: torch.dtype) -> int:
    """Of the largest matrix made anew for a product: as it is read, and scaled."""
    sizes = [m.quantized.numel() for m in model.modules() if isinstance(m, QuantLinear) and not m.is_dynamic]
    return 2 * run.itemsize * max(sizes, default=0)


def longest_text(config: Any, rows: int, branches: int) -> list[Any]:
    """What a family's encoder gives of text as long as it may be, for that many branches."""
    states = [torch.empty(rows, config.text_width) for _ in range(branches)]
    if isinstance(config, HunyuanVideoConfig):
        return [(each, torch.empty(config.pooled_width)) for each in states]
    if isinstance(config, OpenSoraConfig):
        return [states[0], *(None for _ in states[1:])]  # which has learned the other
    return states
