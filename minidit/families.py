"""What a family's pipeline does differently from another's, around the transformer: one class per family.

A class holds the configs of its components and answers for sizes, text and schedule; generate.py is the
recipe that asks.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from minidit.given import GivenFrames, fit_size, paste, read_prompt, read_strategy
from minidit.presets import ScheduleConfig
from minidit.schedules import Schedule, TableSchedule, make_schedule, make_table_schedule, size_shift
from minidit.settings import DTYPES, Settings, check_multiple
from minidit.vae.tiles import Watch
from minidit.video import read_video


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
    rounds_levels: bool = False  # of the video's 256, where others truncate
    has_tiles: bool = True  # whether the autoencoder can be asked to decode tile by tile

    def latent_shape(self, width: int, height: int, num_frames: int) -> tuple[int, int, int, int]:
        """(C, T, H, W) of the latents of a video; a size that cannot be made is refused with the nearest."""
        ...

    def latent_of(self, settings: Settings) -> tuple[int, int, int, int]:
        """(C, T, H, W) of the latents of a run."""
        return self.latent_shape(settings.width, settings.height, settings.num_frames)

    def tokens(self, latent: tuple[int, int, int, int]) -> int:
        """Video tokens per branch."""
        ...

    def branches(self, guidance_scale: float) -> tuple[str, ...]: ...

    def encode(self, parts: Components, prompts: list[str]) -> list[Any]:
        """What model.prepare takes as text, one entry per prompt."""
        ...

    def prepare(self, model: Any, text: list[Any], settings: Settings, *, keep_text: bool = True) -> Any:
        """The transformer's context. text: from encode, a row per branch

        keep_text: off, models with cross-attention make the text's keys and values anew in every block
        """
        return model.prepare(
            text,
            self.latent_of(settings)[1:],
            branches=self.branches(settings.cfg_scale),
            attention=settings.attention,
            residual=DTYPES[settings.residual],
            **self.inputs(settings),
            **({} if keep_text else {"keep_text": False}),
        )

    def inputs(self, settings: Settings) -> dict[str, Any]:
        """What model.prepare takes beside what all models do."""
        return {}

    def schedule(self, settings: Settings) -> Schedule: ...

    def given(
        self, parts: Components, settings: Settings, noise: Tensor, draw: Callable[[Sequence[int]], Tensor]
    ) -> GivenFrames | None:
        """Frames that the run is given; None for none. draw: fresh noise of a shape, after `noise`"""
        return None

    def check_tiled(self, tiled: bool) -> None:
        """Refuse to be asked for tiles where there is no choice."""
        if tiled and not self.has_tiles:
            raise ValueError("tiled: this model's autoencoder always decodes in tiles; leave it out")

    def decoder(self, frames: int) -> str:
        """The component that decodes so many latent frames."""
        return "vae"

    def decode(
        self, parts: Components, latents: Tensor, *, tiled: bool = False, watch: Watch = iter
    ) -> Iterator[Tensor]:
        """Pixels of latents (1, C, t, h, w), a few frames (1, 3, n, H, W) at a time.

        tiled: tile by tile, which takes less memory and gives other pixels · watch: see Tiles.stream
        """
        vae = parts.module(self.decoder(latents.shape[2]))
        return vae.decode_stream(latents, tiled=tiled, watch=watch)


class FlowFamily(Family):
    """A causal video autoencoder, patches of its latents, and flow matching: what two families share."""

    def __init__(self, configs: dict[str, Any]):
        self.transformer, self.vae = configs["transformer"], configs["vae"]
        self.depth, self.text_len = self.transformer.depth, self.transformer.text_len

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

    def schedule(self, settings: Settings) -> Schedule:
        config = ScheduleConfig(settings.solver, settings.sigma_grid, settings.flow_shift)
        return make_schedule(config, settings.steps)


class WanFamily(FlowFamily):
    """Wan 2.1 text-to-video: UMT5 states of the cleaned prompt, and of the negative one under guidance."""

    encoders = ("text_encoder",)

    def branches(self, guidance_scale: float) -> tuple[str, ...]:
        return ("cond",) if guidance_scale == 1 else ("cond", "uncond")

    def encode(self, parts: Components, prompts: list[str]) -> list[Tensor]:
        from minidit.text.prompts import encode_prompts
        from minidit.text.tokenizers import SentencePiece

        tokenizer, encoder = SentencePiece(parts.file("tokenizer")), parts.module("text_encoder")
        return encode_prompts(prompts, tokenizer, encoder, max_len=self.text_len, device=parts.device)


class LatteFamily(Family):
    """Latte-1: T5 states of the cleaned caption, latents frame by frame, DDIM. An image is one frame."""

    encoders = ("text_encoder",)

    def __init__(self, configs: dict[str, Any], schedule: ScheduleConfig):
        self.transformer, self.vae = configs["transformer"], configs["vae"]
        self.has_temporal_decoder = "vae_2" in configs
        self.table = schedule
        self.depth, self.text_len = self.transformer.depth, self.transformer.text_len

    def latent_shape(self, width: int, height: int, num_frames: int) -> tuple[int, int, int, int]:
        stride = 2 ** (len(self.vae.widths) - 1)
        check_multiple("width", width, stride * self.transformer.patch)
        check_multiple("height", height, stride * self.transformer.patch)
        if num_frames not in (1, frames := self.transformer.frames):
            raise ValueError(f"num_frames={num_frames}: this model makes {frames} frames, or 1")
        return self.vae.latent, num_frames, height // stride, width // stride

    def tokens(self, latent: tuple[int, int, int, int]) -> int:
        return math.prod(latent[1:]) // self.transformer.patch**2

    def branches(self, guidance_scale: float) -> tuple[str, ...]:
        return ("cond",) if guidance_scale <= 1 else ("cond", "uncond")

    def encode(self, parts: Components, prompts: list[str]) -> list[Tensor]:
        from minidit.text.captions import clean_caption, encode_captions
        from minidit.text.tokenizers import SentencePiece

        tokenizer, encoder = SentencePiece(parts.file("tokenizer")), parts.module("text_encoder")
        captions = [clean_caption(prompt) for prompt in prompts]
        return encode_captions(captions, tokenizer, encoder, max_len=self.text_len, device=parts.device)

    def schedule(self, settings: Settings) -> TableSchedule:
        return make_table_schedule(table_config(self.table, settings), settings.steps)

    def decoder(self, frames: int) -> str:
        return "vae_2" if self.has_temporal_decoder and frames > 1 else "vae"


class CogVideoXFamily(Family):
    """CogVideoX: T5 states of the prompt as it is, padding included; DDIM or DPM with its own guidance table.

    Version 1.5 has patches of two latent frames, and so one more in front of the video, which is dropped.
    """

    encoders = ("text_encoder",)
    rounds_levels = True

    def __init__(self, configs: dict[str, Any], schedule: ScheduleConfig):
        self.transformer, self.vae = configs["transformer"], configs["vae"]
        self.table = schedule
        self.depth, self.text_len = self.transformer.depth, self.transformer.text_len

    def latent_shape(self, width: int, height: int, num_frames: int) -> tuple[int, int, int, int]:
        time_stride, space_stride = 2**self.vae.time_levels, 2 ** (len(self.vae.widths) - 1)
        pt, ph, pw = self.transformer.patch
        check_multiple("width", width, space_stride * pw)
        check_multiple("height", height, space_stride * ph)
        check_multiple("num_frames", num_frames, 2 * time_stride, offset=1)  # latents: an odd count
        frames = 1 + (num_frames - 1) // time_stride
        return self.vae.latent, frames + frames % pt, height // space_stride, width // space_stride

    def tokens(self, latent: tuple[int, int, int, int]) -> int:
        return math.prod(latent[1:]) // math.prod(self.transformer.patch)

    def branches(self, guidance_scale: float) -> tuple[str, ...]:
        return ("cond",) if guidance_scale <= 1 else ("cond", "uncond")

    def encode(self, parts: Components, prompts: list[str]) -> list[Tensor]:
        from minidit.text.prompts import encode_padded
        from minidit.text.tokenizers import SentencePiece

        tokenizer, encoder = SentencePiece(parts.file("tokenizer")), parts.module("text_encoder")
        return encode_padded(prompts, tokenizer, encoder, length=self.text_len, device=parts.device)

    def schedule(self, settings: Settings) -> TableSchedule:
        config = replace(table_config(self.table, settings), dynamic_guidance=settings.dynamic_cfg)
        return make_table_schedule(config, settings.steps)

    def decode(
        self, parts: Components, latents: Tensor, *, tiled: bool = False, watch: Watch = iter
    ) -> Iterator[Tensor]:
        extra = 1 - latents.shape[2] % 2
        return super().decode(parts, latents[:, :, extra:], tiled=tiled, watch=watch)


class HunyuanVideoFamily(FlowFamily):
    """HunyuanVideo: Llama's states and CLIP's vector of the prompt, and guidance as an input.

    true_cfg above 1 adds classifier-free guidance with a second branch.
    """

    encoders = ("text_encoder", "text_encoder_2")
    has_tiles = False  # it always decodes in tiles, which are a part of the model

    def __init__(self, configs: dict[str, Any]):
        super().__init__(configs)
        self.clip = configs.get("text_encoder_2")

    def branches(self, guidance_scale: float) -> tuple[str, ...]:
        return ("cond",) if guidance_scale <= 1 else ("cond", "uncond")

    def encode(self, parts: Components, prompts: list[str]) -> list[tuple[Tensor, Tensor]]:
        from minidit.text.hunyuan_video import encode_pooled, encode_states
        from minidit.text.tokenizers import CLIPTokenizer, LlamaTokenizer

        llama, clip = LlamaTokenizer(parts.file("tokenizer")), CLIPTokenizer(parts.file("tokenizer_2"))
        encoders = parts.module("text_encoder"), parts.module("text_encoder_2")
        lengths, device = (self.text_len, self.clip.positions), parts.device
        return [
            (
                encode_states(prompt, llama, encoders[0], max_len=lengths[0], device=device),
                encode_pooled(prompt, clip, encoders[1], max_len=lengths[1], device=device),
            )
            for prompt in prompts
        ]

    def inputs(self, settings: Settings) -> dict[str, Any]:
        return {"guidance": settings.guidance_scale}

    def decode(
        self, parts: Components, latents: Tensor, *, tiled: bool = False, watch: Watch = iter
    ) -> Iterator[Tensor]:
        return parts.module("vae").decode_stream(latents)


# Picture sizes of Open-Sora's releases (sides, either way) that are not whole latent cells
ODD_SIZES = ({240, 426}, {480, 854}, {166, 221}, {276, 368}, {416, 554}, {554, 738}, {832, 1110})


class OpenSoraFamily(Family):
    """Open-Sora 1.2: T5 states of the cleaned, scored caption, a learned text in place of a negative prompt.

    The flow's shift follows the size of the video. The prompt's own JSON may give frames to start from.
    """

    encoders = ("text_encoder",)
    rounds_levels = True

    def __init__(self, configs: dict[str, Any]):
        self.transformer, self.vae = configs["transformer"], configs["vae"]
        self.depth, self.text_len = self.transformer.depth, self.transformer.text_len

    def latent_shape(self, width: int, height: int, num_frames: int) -> tuple[int, int, int, int]:
        """Of a release's own sizes the decoded video may lack a few pixels: 426 come out as 424."""
        stride, time_stride = 2 ** (len(self.vae.widths) - 1), 2 ** sum(self.vae.temporal_down)
        if {width, height} not in ODD_SIZES:
            check_multiple("width", width, stride)
            check_multiple("height", height, stride)
        whole, rest = divmod(num_frames, self.vae.chunk)
        if num_frames != 1 and (whole < 1 or rest % time_stride):
            low = max(whole * self.vae.chunk + rest // time_stride * time_stride, self.vae.chunk)
            raise ValueError(
                f"num_frames={num_frames} is neither 1 nor {self.vae.chunk}n+{time_stride}m; try {low}"
            )
        frames = whole * -(-self.vae.chunk // time_stride) + -(-rest // time_stride)
        return self.vae.latent, frames, height // stride, width // stride

    def tokens(self, latent: tuple[int, int, int, int]) -> int:
        patch = self.transformer.patch
        return latent[1] * -(-latent[2] // patch) * -(-latent[3] // patch)

    def branches(self, guidance_scale: float) -> tuple[str, ...]:
        return ("cond",) if guidance_scale == 1 else ("cond", "uncond")

    def encode(self, parts: Components, prompts: list[str]) -> list[Tensor | None]:
        from minidit.text.captions import clean_caption, encode_captions, with_scores
        from minidit.text.tokenizers import SentencePiece

        tokenizer, encoder = SentencePiece(parts.file("tokenizer")), parts.module("text_encoder")
        caption = clean_caption(with_scores(read_prompt(prompts[0]).text), strip_inside=True)
        states = encode_captions([caption], tokenizer, encoder, max_len=self.text_len, device=parts.device)
        return states + [None] * len(prompts[1:])

    def inputs(self, settings: Settings) -> dict[str, Any]:
        from minidit.models.open_sora import Video

        fps = 120 if settings.num_frames == 1 else settings.fps  # how images are told apart
        return {"video": Video(settings.height, settings.width, fps)}

    def schedule(self, settings: Settings) -> Schedule:
        self.check(settings)
        precision = {"wan": torch.float64, "bf16": torch.bfloat16}
        if settings.sigma_grid not in precision:
            raise ValueError(f"sigma_grid={settings.sigma_grid!r}; choose one of {', '.join(precision)}")
        size = settings.height, settings.width, settings.num_frames
        shift = size_shift(*size, dtype=precision[settings.sigma_grid]) * settings.flow_shift
        return make_schedule(ScheduleConfig(settings.solver, "wan", shift), settings.steps)

    def given(
        self, parts: Components, settings: Settings, noise: Tensor, draw: Callable[[Sequence[int]], Tensor]
    ) -> GivenFrames | None:
        request = read_prompt(settings.prompt)
        if not (groups := read_strategy(request.strategy)):
            return None
        references = [self.reference(parts, path, settings, draw) for path in request.references]
        return paste(groups, references, noise)

    def check(self, settings: Settings) -> None:
        """Refuse what the prompt asks for and cannot have, before anything is loaded."""
        if settings.negative_prompt:
            raise ValueError("this model has learned what to turn away from; leave the negative prompt empty")
        request = read_prompt(settings.prompt)
        groups = read_strategy(request.strategy)
        if missing := [path for path in request.references if not Path(path).is_file()]:
            raise ValueError(f"the prompt's reference {missing[0]} does not exist")
        for group in groups:
            if not 0 <= group.reference < len(request.references):
                count = len(request.references)
                raise ValueError(f"mask_strategy names reference {group.reference} of {count}")
        if groups and settings.solver != "euler":
            raise ValueError(f"references go with the euler solver, not with {settings.solver}")

    def reference(
        self, parts: Components, path: str, settings: Settings, draw: Callable[[Sequence[int]], Tensor]
    ) -> Tensor:
        """The latents of a picture or video file, drawn from their distribution. -> (C, t, H, W)"""
        frames, _ = read_video(path)
        video = torch.from_numpy(frames).permute(3, 0, 1, 2) / 127.5 - 1
        video = fit_size(video, settings.height, settings.width)[None].to(parts.device)
        vae = parts.module("vae")
        shape = self.vae.latent, settings.height // 8, settings.width // 8
        counts = video.shape[2], vae.latent_frames(video.shape[2])
        noise = tuple(draw((1, shape[0], count, *shape[1:])) for count in counts)
        return vae.encode(video, noise=noise)[0].float()


def table_config(release: ScheduleConfig, settings: Settings) -> ScheduleConfig:
    """A release's table of noise levels, walked as a run wants it."""
    chosen = dict(solver=settings.solver, sigma_grid=settings.sigma_grid, shift=settings.flow_shift)
    return replace(release, **chosen)


def find_family(name: str, configs: dict[str, Any], schedule: ScheduleConfig | None = None) -> Family:
    """The family of a model from its components' configs, and its schedule where that is of the model."""
    match name:
        case "wan":
            return WanFamily(configs)
        case "open_sora":
            return OpenSoraFamily(configs)
        case "latte":
            return LatteFamily(configs, schedule)
        case "cogvideox":
            return CogVideoXFamily(configs, schedule)
        case "hunyuan_video":
            return HunyuanVideoFamily(configs)
    raise ValueError(f"unknown family {name!r}; this model folder is of a newer minidit")
