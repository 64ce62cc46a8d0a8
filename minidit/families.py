"""What a family's pipeline does differently from another's, around the transformer: one class per family.

A class holds the configs of its components and answers for sizes, text and schedule; generate.py is the
recipe that asks.
"""

import math
from typing import Any, Protocol

from torch import Tensor

from minidit.presets import ScheduleConfig, WanConfig, WanVAEConfig
from minidit.schedules import Schedule, make_schedule
from minidit.settings import DTYPES, Settings, check_multiple


class Components(Protocol):
    """The loaded model, as far as encoding text needs it (generate.Engine)."""

    device: str

    def module(self, component: str) -> Any: ...

    def file(self, component: str) -> Any: ...


class Family(Protocol):
    """What generate.py asks of a family."""

    depth: int  # blocks of the transformer
    text_len: int  # text rows that attention sees, for counting multiply-adds
    encoders: tuple[str, ...]  # components that are only needed to encode text

    def latent_shape(self, width: int, height: int, num_frames: int) -> tuple[int, int, int, int]:
        """(C, T, H, W) of the latents of a video; a size that cannot be made is refused with the nearest."""
        ...

    def tokens(self, latent: tuple[int, int, int, int]) -> int:
        """Video tokens per branch."""
        ...

    def branches(self, guidance_scale: float) -> tuple[str, ...]: ...

    def encode(self, parts: Components, prompts: list[str]) -> list[Any]:
        """What model.prepare takes as text, one entry per prompt."""
        ...

    def prepare(self, model: Any, text: list[Any], settings: Settings) -> Any:
        """The transformer's context. text: from encode, a row per branch"""
        return model.prepare(
            text,
            self.latent_shape(settings.width, settings.height, settings.num_frames)[1:],
            branches=self.branches(settings.cfg_scale),
            attention=settings.attention,
            residual=DTYPES[settings.residual],
        )

    def schedule(self, settings: Settings) -> Schedule: ...


class WanFamily(Family):
    """Wan 2.1 text-to-video: UMT5 states of the cleaned prompt, the causal VAE's latents, flow matching."""

    encoders = ("text_encoder",)

    def __init__(self, transformer: WanConfig, vae: WanVAEConfig):
        self.transformer, self.vae = transformer, vae
        self.depth, self.text_len = transformer.depth, transformer.text_len

    def latent_shape(self, width: int, height: int, num_frames: int) -> tuple[int, int, int, int]:
        time_stride, space_stride = 2 ** sum(self.vae.temporal_down), 2 ** len(self.vae.temporal_down)
        pt, ph, pw = self.transformer.patch
        check_multiple("width", width, space_stride * pw)
        check_multiple("height", height, space_stride * ph)
        check_multiple("num_frames", num_frames, time_stride * pt, offset=1)
        frames = 1 + (num_frames - 1) // time_stride
        return self.vae.latent, frames, height // space_stride, width // space_stride

    def tokens(self, latent: tuple[int, int, int, int]) -> int:
        return math.prod(latent[1:]) // math.prod(self.transformer.patch)

    def branches(self, guidance_scale: float) -> tuple[str, ...]:
        return ("cond",) if guidance_scale == 1 else ("cond", "uncond")

    def encode(self, parts: Components, prompts: list[str]) -> list[Tensor]:
        from minidit.text.prompts import encode_prompts
        from minidit.text.tokenizers import SentencePiece

        tokenizer, encoder = SentencePiece(parts.file("tokenizer")), parts.module("text_encoder")
        return encode_prompts(prompts, tokenizer, encoder, max_len=self.text_len, device=parts.device)

    def schedule(self, settings: Settings) -> Schedule:
        return make_schedule(
            ScheduleConfig(settings.solver, settings.sigma_grid, settings.flow_shift), settings.steps
        )


def find_family(name: str, configs: dict[str, Any]) -> Family:
    """The family of a model from its components' configs."""
    match name:
        case "wan":
            return WanFamily(configs["transformer"], configs["vae"])
    raise ValueError(f"unknown family {name!r}; this model folder is of a newer minidit")
