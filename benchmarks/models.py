"""What the benchmarks run: the embedded model, or a release's shape with random weights, and its input."""

import argparse
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import PROMPTS
from minidit.cache.measure import Measurements
from minidit.cache.plan import RUN_ALL
from minidit.cache.policies.none import NoCache
from minidit.cache.store import Store
from minidit.components import find_class
from minidit.families import find_family
from minidit.flags import size as parse_size
from minidit.generate import Engine
from minidit.models.open_sora import Video
from minidit.presets import PRESETS, HunyuanVideoConfig, OpenSoraConfig, WanConfig, find_preset
from minidit.sampling import Forward, draw_noise, guided_prediction
from minidit.schedules import Step
from minidit.settings import BATCHED_TOKENS, DTYPES, Choices
from minidit.weights import is_fp32

PROMPT_ROWS = 60  # text rows of a prompt, where padding is not attended to
T = 700.0  # the timestep of the step; 4000 and 700 are numbers in bf16 too
EMBEDDED_GUIDANCE = 4.0


@dataclass(frozen=True)
class Subject:
    """A transformer, and the inputs of one step of one video."""

    name: str
    model: nn.Module
    video: tuple[int, int, int]  # width, height, frames
    x: Tensor  # (1, C, T, H, W) fp32
    text: list[Any]  # per branch, as model.prepare takes it
    branches: tuple[str, ...]
    scale: float  # of classifier-free guidance
    tokens: int  # per branch
    text_rows: int  # that attention sees

    @property
    def macs(self) -> int:
        """Of all branches."""
        counts = self.model.macs(tuple(self.x.shape[2:]), self.text_rows)
        return len(self.branches) * sum(counts.values())

    @property
    def device(self) -> str:
        return str(self.x.device)

    def forward(self, *, is_batched: bool | None = None) -> Forward:
        """What no step changes. is_batched: None is what generate would do"""
        size, config, options = tuple(self.x.shape[2:]), self.model.config, {}
        if isinstance(config, HunyuanVideoConfig):
            options = {"guidance": EMBEDDED_GUIDANCE}
        elif isinstance(config, OpenSoraConfig):
            options = {"video": Video(self.video[1], self.video[0], 24)}
        context = self.model.prepare(self.text, size, branches=self.branches, **options)
        if is_batched is None:
            is_batched = self.tokens <= BATCHED_TOKENS
        return Forward(self.model, context, is_batched, video_tokens=self.tokens)

    def step(self, forward: Forward) -> Tensor:
        """The guided prediction of one step, as sampling makes it: the check for finite values included."""
        found, step = Measurements(), Step(0, 1, T, T / 1000, self.scale)
        guided, _ = guided_prediction(forward, self.x, step, RUN_ALL, Store(), found, NoCache())
        found.read()
        return guided


def random_model(config, class_name: str, device: str, dtype: torch.dtype) -> nn.Module:
    """A transformer with random weights of sensible size, in the dtypes it would be loaded in."""
    with torch.device("meta"):
        model = find_class(class_name)(config)
    model = model.to_empty(device=device).requires_grad_(False).eval()
    draw = torch.Generator(device).manual_seed(0)
    for name, p in model.named_parameters():
        fan_in = p.shape[-1] if p.ndim > 1 else 1
        bound = (3 / fan_in) ** 0.5 if p.ndim > 1 else 0.1
        value = torch.empty(p.shape, device=device).uniform_(-bound, bound, generator=draw)
        is_gain = p.ndim == 1 and name.endswith("weight")
        p.data = (1 + value if is_gain else value).to(
            torch.float32 if is_fp32(name, model.keep_fp32) else dtype
        )
    return model


def with_depth(config, depth: int):
    """The config with that many blocks, of HunyuanVideo's two kinds in its own proportion."""
    if isinstance(config, HunyuanVideoConfig):
        double = max(1, round(depth * config.double / config.depth))
        return replace(config, double=double, single=depth - double)
    return replace(config, depth=depth)


def random_subject(
    preset_name: str,
    video: tuple[int | None, int | None, int | None],
    device: str,
    dtype: torch.dtype,
    depth: int | None = None,
) -> Subject:
    """A release's shape with random weights. video: width, height, frames, None for the release's own"""
    preset = find_preset(preset_name)
    class_name, config = preset.components["transformer"]
    config, d = with_depth(config, depth or config.depth), preset.defaults
    video = tuple(given or own for given, own in zip(video, (d.width, d.height, d.num_frames), strict=True))
    configs = {name: part for name, (_, part) in preset.components.items()}
    family = find_family(preset.family, configs, preset.schedule)
    latent, scale = family.latent_shape(*video), d.true_cfg or d.guidance_scale
    branches = family.branches(scale)
    model = random_model(config, class_name, device, dtype)
    text = random_text(config, branches, device)
    x = draw_noise((1, *latent), 0).to(device)
    name = preset_name + (f", {depth} blocks" if depth else "")
    return Subject(
        name,
        model,
        video,
        x,
        text,
        branches,
        scale,
        family.tokens(latent),
        attended_rows(config),
    )


def attended_rows(config) -> int:
    """Text rows that attention sees: Wan and CogVideoX attend to padding too."""
    return PROMPT_ROWS if not pads_text(config) else config.text_len


def pads_text(config) -> bool:
    return not isinstance(config, HunyuanVideoConfig | OpenSoraConfig) and config.text_len > 120


def random_text(config, branches: tuple[str, ...], device: str) -> list[Any]:
    """Random states, of the shapes that a family's text encoder gives."""
    draw = torch.Generator(device).manual_seed(1)
    normal = lambda *shape: torch.randn(*shape, device=device, generator=draw)
    rows = PROMPT_ROWS if isinstance(config, WanConfig) else attended_rows(config)  # Wan pads by itself
    if isinstance(config, HunyuanVideoConfig):
        return [(normal(rows, config.text_width), normal(config.pooled_width)) for _ in branches]
    states = [normal(rows, config.text_width) for _ in branches]
    return [states[0], None] if isinstance(config, OpenSoraConfig) else states


@torch.inference_mode()
def demo_subject(device: str, dtype: str) -> Subject:
    """The embedded model with its real weights and text."""
    engine = Engine("demo", device=device, dtype=dtype)
    settings = engine.resolve(PROMPTS[0], Choices())
    text, latent = engine.encode(settings), engine.latent_shape(settings)
    model, family, branches = engine.module("transformer"), engine.family, ("cond", "uncond")
    x = draw_noise((1, *latent), 0).to(device)
    video = settings.width, settings.height, settings.num_frames
    scale, tokens = settings.guidance_scale, family.tokens(latent)
    return Subject("demo", model, video, x, text, branches, scale, tokens, family.text_len)


def find_subject(
    name: str, video: tuple[int | None, int | None, int | None], device: str, dtype: str, depth: int | None
) -> Subject:
    """The embedded model by the name demo, else a preset."""
    if name == "demo":
        return demo_subject(device, dtype)
    return random_subject(name, video, device, DTYPES[dtype], depth)


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """What a benchmark of whole runs generates, under which caches, on what."""
    parser.add_argument("--model", default="demo", help="a model folder")
    parser.add_argument("--preset", choices=PRESETS, help="random weights in a release's shape")
    parser.add_argument("--cache", nargs="*", help="methods; none is always among them")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--size", type=parse_size, default=(None, None))
    parser.add_argument("--num-frames", type=int)
    parser.add_argument("--depth", type=int, help="of a preset: fewer blocks")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES)
