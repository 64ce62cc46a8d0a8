"""From a prompt to a video: the whole run as a recipe."""

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from minidit.cache.loop import Probe
from minidit.cache.plan import Policy, RunInfo
from minidit.cache.spec import make_policy, parse
from minidit.cache.trace import make_trace
from minidit.profiles import find_profile
from minidit.sampling import Forward, Outcome, Record, denoise, draw_noise
from minidit.schedules import make_schedule
from minidit.settings import (
    BATCHED_TOKENS,
    DTYPES,
    Choices,
    Settings,
    check_settings,
    count_tokens,
    latent_size,
    pick_device,
    pick_dtype,
    profile_match,
    schedule_config,
)
from minidit.video import to_frames, whole_file, write_video
from minidit.weights import load_into, read_manifest

BRANCHES = ("cond", "uncond")
DEMO = Path(__file__).parent / "demo"


@dataclass(frozen=True)
class Video:
    """A finished generation."""

    frames: Any  # numpy uint8 (T, H, W, 3)
    latents: Tensor  # (1, C, t, h, w) fp32 on the CPU
    settings: Settings
    trace: dict  # of the denoising run, as --trace writes it
    seconds: dict[str, float]  # by stage

    def save(self, path: str | Path) -> None:
        """Write .mp4, .gif, .png or .npz, and the settings inside and beside it."""
        write_video(path, self.frames, fps=self.settings.fps, settings=asdict(self.settings))


class Engine:
    """A model folder, its components loaded when they are first needed.

    The text encoder is let go again after encoding, unless keep_text_encoder is set: on one GPU it would take
    the transformer's place. profiles: a folder of caching profiles in place of the model's own.
    """

    def __init__(
        self,
        model: str | Path = "demo",
        *,
        device: str | None = None,
        dtype: str | None = None,
        verify: bool = False,
        keep_text_encoder: bool = False,
        profiles: str | Path | None = None,
    ):
        self.name = str(model)
        self.folder = DEMO if self.name == "demo" else Path(model)
        self.manifest = read_manifest(self.folder, verify=verify)
        self.device = pick_device(device)
        self.dtype = pick_dtype(dtype, self.device)
        self.keep_text_encoder = keep_text_encoder
        self.profile_folders = [Path(profiles)] if profiles else [self.folder / "profiles"]
        self.modules: dict[str, nn.Module] = {}

    def generate(
        self,
        prompt: str,
        *,
        negative_prompt: str | None = None,
        seed: int = 0,
        width: int | None = None,
        height: int | None = None,
        num_frames: int | None = None,
        steps: int | None = None,
        guidance_scale: float | None = None,
        flow_shift: float | None = None,
        solver: str | None = None,
        sigma_grid: str | None = None,
        fps: float | None = None,
        cache: str = "none",
        attention: str = "auto",
        residual: str | None = None,
        progress: bool = False,
    ) -> Video:
        """Make one video. What is None is the model's default; sizes are used exactly, or refused."""
        choices = Choices(
            negative_prompt, seed, width, height, num_frames, steps, guidance_scale,
            flow_shift, solver, sigma_grid, fps, cache, attention, residual,
        )  # fmt: skip
        settings = self.resolve(prompt, choices)
        watch = Stopwatch()
        with watch.stage("text"):
            text = self.encode(settings)
        with watch.stage("denoise"):
            outcome = self.denoise(settings, text, progress=progress)
        with watch.stage("decode"):
            frames = self.decode(outcome.latents)
        return Video(frames, outcome.latents.cpu(), settings, self.trace(settings, outcome), watch.seconds)

    def resolve(self, prompt: str, choices: Choices) -> Settings:
        """Fill in the model's defaults and refuse what cannot be made, before anything is loaded."""
        given = {f.name: value for f in fields(Choices) if (value := getattr(choices, f.name)) is not None}
        schedule = self.manifest.schedule
        wanted = asdict(self.manifest.defaults) | {
            "flow_shift": schedule.shift,
            "solver": schedule.solver,
            # a solver other than the model's own takes the grid that every solver has
            "sigma_grid": schedule.sigma_grid
            if given.get("solver", schedule.solver) == schedule.solver
            else "wan",
            "residual": self.dtype,
        }
        values = wanted | given
        latent = self.latent_size(values["width"], values["height"], values["num_frames"])
        tokens = count_tokens(latent, self.manifest.components["transformer"].config.patch)
        settings = Settings(
            prompt=prompt,
            **{f.name: values[f.name] for f in fields(Choices)},
            batched_guidance=tokens <= BATCHED_TOKENS,
            dtype=self.dtype,
            device=self.device,
            model=self.name,
            model_id=self.model_id,
        )
        check_settings(settings)
        self.check_cache(settings)
        return settings

    def check_cache(self, settings: Settings) -> None:
        """Refuse a caching method that cannot act on this run."""
        policy, _ = self.policy(settings)
        part = self.manifest.components["transformer"]
        steps = make_schedule(schedule_config(settings), settings.steps).steps(settings.guidance_scale)
        branches = BRANCHES[: 1 if settings.guidance_scale == 1 else 2]
        policy.reset(
            RunInfo(steps, part.config.depth, subs_of(part.class_name), branches, self.manifest.family)
        )

    def policy(self, settings: Settings) -> tuple[Policy, dict[tuple[int, str], Tensor]]:
        """The caching method of a run and the tensors of its profiles."""
        constants: dict[tuple[int, str], Tensor] = {}

        def find(method: str) -> dict | None:
            profile = find_profile(self.profile_folders, method, profile_match(settings))
            constants.update(profile.tensors if profile else {})
            return profile.data if profile else None

        return make_policy(parse(settings.cache), find), constants

    @property
    def model_id(self) -> str:
        """Short hash of all files of the model."""
        hashes = [file.sha256 for part in self.manifest.components.values() for file in part.files]
        return hashlib.sha256("".join(sorted(hashes)).encode()).hexdigest()[:12]

    def latent_size(self, width: int, height: int, num_frames: int) -> tuple[int, int, int]:
        """(T, H, W) of the latents of a video; a size that cannot be made is refused."""
        parts = self.manifest.components
        return latent_size(parts["vae"].config, parts["transformer"].config.patch, width, height, num_frames)

    def module(self, component: str) -> nn.Module:
        """A component with its weights on the device, loaded at the first call."""
        if component not in self.modules:
            part = self.manifest.components.get(component)
            if part is None:
                raise ValueError(
                    f"{self.folder} has no {component}; convert the whole release, or pass its folder"
                )
            module, dtype, keep_fp32 = build(part.class_name, part.config, DTYPES[self.dtype])
            args = dict(device=self.device, dtype=dtype, keep_fp32=keep_fp32)
            self.modules[component] = load_into(module, self.folder, component, **args)
        return self.modules[component]

    def encode(self, settings: Settings) -> list[Tensor]:
        """Text states of the prompt and, under guidance, of the negative prompt. -> one or two (M, D)"""
        from minidit.text.prompts import encode_prompts
        from minidit.text.tokenizers import SentencePiece

        part = self.manifest.components.get("tokenizer")
        if part is None:
            raise ValueError(
                f"{self.folder} has no tokenizer; convert the whole release, its spiece.model included"
            )
        tokenizer = SentencePiece(self.folder / part.files[0].name)
        prompts = [settings.prompt, settings.negative_prompt][: 2 if settings.guidance_scale != 1 else 1]
        text_len = self.manifest.components["transformer"].config.text_len
        states = encode_prompts(
            prompts, tokenizer, self.module("text_encoder"), max_len=text_len, device=self.device
        )
        if not self.keep_text_encoder:
            del self.modules["text_encoder"]
        return states

    def denoise(
        self,
        settings: Settings,
        text: list[Tensor],
        *,
        policy: Policy | None = None,
        on_step: Callable[[Record, Tensor], None] | None = None,
        probe: Probe | None = None,
        progress: bool = False,
    ) -> Outcome:
        """Noise to latents. text: from encode() · policy: in place of the one that the settings name"""
        forward = replace(self.forward(settings, text), probe=probe)
        noise = draw_noise(
            (1, self.manifest.components["vae"].config.latent, *self.size_of(settings)), settings.seed
        )
        chosen, constants = self.policy(settings)
        return denoise(
            forward,
            make_schedule(schedule_config(settings), settings.steps),
            noise.to(self.device),
            policy or chosen,
            guidance_scale=settings.guidance_scale,
            family=self.manifest.family,
            constants={key: t.to(self.device, DTYPES[self.dtype]) for key, t in constants.items()},
            progress=progress,
            on_step=on_step,
        )

    @torch.inference_mode()
    def forward(self, settings: Settings, text: list[Tensor]) -> Forward:
        """The transformer with everything that no step of this run changes."""
        model = self.module("transformer")
        context = model.prepare(
            text,
            self.size_of(settings),
            branches=BRANCHES[: len(text)],
            attention=settings.attention,
            residual=DTYPES[settings.residual],
        )
        return Forward(model, context, settings.batched_guidance)

    def size_of(self, settings: Settings) -> tuple[int, int, int]:
        return self.latent_size(settings.width, settings.height, settings.num_frames)

    def trace(self, settings: Settings, outcome: Outcome) -> dict:
        """The log of a run, ready for JSON (cache/trace.py)."""
        model, size = self.module("transformer"), self.size_of(settings)
        text_len = self.manifest.components["transformer"].config.text_len
        branches = BRANCHES[: 1 if settings.guidance_scale == 1 else 2]
        table_at = cache(lambda width: model.macs(size, text_len, width))
        return make_trace(
            asdict(settings), outcome.records, model.subs, branches, table_at, outcome.cache_bytes
        )

    @torch.inference_mode()
    def decode(self, latents: Tensor, *, progress: bool = False) -> Any:
        """Latents to frames. latents (1, C, t, h, w) -> uint8 array (T, H, W, 3)"""
        stream = self.module("vae").decode_stream(latents.to(self.device))
        parts = [part[0].cpu() for part in tqdm(stream, "decode", latents.shape[2], disable=not progress)]
        return to_frames(torch.cat(parts, dim=1))


def build(class_name: str, config: Any, dtype: torch.dtype) -> tuple[nn.Module, torch.dtype, tuple[str, ...]]:
    """The empty module of a component, the dtype to load it in, and which of its parameters stay fp32."""
    with torch.device("meta"):
        match class_name:
            case "Wan":
                from minidit.models.wan import KEEP_FP32, Wan

                return Wan(config), dtype, KEEP_FP32
            case "T5Encoder":
                from minidit.text.t5 import T5Encoder

                return T5Encoder(config), dtype, ()
            case "WanVAE":
                from minidit.vae.wan import WanVAE

                return WanVAE(config), torch.float32, ()  # as the original: bf16 shows as banding
    raise ValueError(f"cannot build a {class_name}; this model folder is of a newer minidit")


def subs_of(class_name: str) -> tuple[str, ...]:
    """The sub-modules of a transformer's blocks."""
    match class_name:
        case "Wan":
            from minidit.models.wan import Wan

            return Wan.subs
    raise ValueError(f"{class_name} is not a transformer of this minidit")


def save_latents(path: str | Path, latents: Tensor, settings: Settings) -> None:
    """Write latents with the settings that made them; the file appears whole or not at all."""
    with whole_file(Path(path)) as partial:
        save_file(
            {"latents": latents.cpu().contiguous()}, partial, {"settings": json.dumps(asdict(settings))}
        )


def load_latents(path: str | Path) -> tuple[Tensor, Settings]:
    """Read what save_latents wrote."""
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get("settings")
            if text is None or "latents" not in file.keys():
                raise ValueError(
                    f"{path} holds no latents of minidit; generate writes them before it decodes"
                )
            return file.get_tensor("latents"), Settings(**json.loads(text))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; pass the .latents.safetensors of a generation") from None
    except (SafetensorError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read as latents ({error})") from None


class Stopwatch:
    """Seconds by stage."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started
