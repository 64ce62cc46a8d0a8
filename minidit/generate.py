"""From a prompt to a video: the whole run as a recipe."""

import hashlib
import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from minidit import __version__
from minidit.attention import BACKENDS
from minidit.cache.policies.none import NoCache
from minidit.presets import ScheduleConfig, WanVAEConfig
from minidit.sampling import denoise, draw_noise
from minidit.schedules import make_schedule
from minidit.video import to_frames, whole_file, write_video
from minidit.weights import load_into, read_manifest

DEMO = Path(__file__).parent / "demo"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BATCHED_TOKENS = (
    4096  # guidance branches of at most this many tokens each run as one batch: they fill no GPU alone
)


@dataclass(frozen=True)
class Settings:
    """Everything that decides a video, resolved; written into every file that is made from it."""

    prompt: str
    negative_prompt: str
    seed: int
    width: int
    height: int
    num_frames: int
    steps: int
    guidance_scale: float
    flow_shift: float
    solver: str
    sigma_grid: str
    fps: float
    cache: str
    attention: str
    residual: str  # dtype of the hidden state between blocks
    batched_guidance: bool
    dtype: str
    device: str
    model: str
    model_id: str  # of the weights, whatever the folder is called
    minidit: str = __version__


@dataclass(frozen=True)
class Choices:
    """What a user may choose; None takes the model's default."""

    negative_prompt: str | None = None
    seed: int = 0
    width: int | None = None
    height: int | None = None
    num_frames: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    flow_shift: float | None = None
    solver: str | None = None
    sigma_grid: str | None = None
    fps: float | None = None
    cache: str = "none"
    attention: str = "auto"
    residual: str | None = None


@dataclass(frozen=True)
class Video:
    """A finished generation."""

    frames: Any  # numpy uint8 (T, H, W, 3)
    latents: Tensor  # (1, C, t, h, w) fp32 on the CPU
    settings: Settings
    seconds: dict[str, float]  # by stage

    def save(self, path: str | Path) -> None:
        """Write .mp4, .gif, .png or .npz, and the settings inside and beside it."""
        write_video(path, self.frames, fps=self.settings.fps, settings=asdict(self.settings))


class Engine:
    """A model folder, its components loaded when they are first needed.

    The text encoder is let go again after encoding, unless keep_text_encoder is set: on one GPU it would take
    the transformer's place.
    """

    def __init__(
        self,
        model: str | Path = "demo",
        *,
        device: str | None = None,
        dtype: str | None = None,
        verify: bool = False,
        keep_text_encoder: bool = False,
    ):
        self.name = str(model)
        self.folder = DEMO if self.name == "demo" else Path(model)
        self.manifest = read_manifest(self.folder, verify=verify)
        self.device = pick_device(device)
        self.dtype = pick_dtype(dtype, self.device)
        self.keep_text_encoder = keep_text_encoder
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
        with watch.stage("encode"):
            text = self.encode(settings)
        with watch.stage("denoise"):
            latents = self.denoise(settings, text, progress=progress)
        with watch.stage("decode"):
            frames = self.decode(latents)
        return Video(frames, latents, settings, watch.seconds)

    def resolve(self, prompt: str, choices: Choices = Choices()) -> Settings:
        """Fill in the model's defaults and refuse what cannot be made, before anything is loaded."""
        given = {f.name: value for f in fields(Choices) if (value := getattr(choices, f.name)) is not None}
        defaults, schedule = self.manifest.defaults, self.manifest.schedule
        wanted = asdict(defaults) | {
            "flow_shift": schedule.shift,
            "solver": schedule.solver,
            "sigma_grid": schedule.sigma_grid,
            "residual": self.dtype,
        }
        # A solver other than the model's own takes the sigma grid that exists for it.
        if "solver" in given and given["solver"] != schedule.solver:
            wanted["sigma_grid"] = "wan"
        values = wanted | given
        latent = self.latent_size(values["width"], values["height"], values["num_frames"])
        tokens = count_tokens(latent, self.manifest.components["transformer"].config.patch)
        settings = Settings(
            prompt=prompt,
            **{name: values[name] for name in (f.name for f in fields(Choices))},
            batched_guidance=tokens <= BATCHED_TOKENS,
            dtype=self.dtype,
            device=self.device,
            model=self.name,
            model_id=self.model_id,
        )
        check_settings(settings)
        make_schedule(schedule_config(settings), settings.steps)  # refuses what it cannot do
        return settings

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

    def denoise(self, settings: Settings, text: list[Tensor], *, progress: bool = False) -> Tensor:
        """Noise to latents. text: from encode() -> (1, C, t, h, w) fp32"""
        model = self.module("transformer")
        size = self.latent_size(settings.width, settings.height, settings.num_frames)
        noise = draw_noise((1, self.manifest.components["vae"].config.latent, *size), settings.seed)
        branches = ("cond", "uncond")[: len(text)]
        groups = (
            [slice(0, len(text))]
            if settings.batched_guidance
            else [slice(i, i + 1) for i in range(len(text))]
        )
        with torch.inference_mode():
            lanes = [
                model.prepare(
                    text[rows],
                    size,
                    branches=branches[rows],
                    attention=settings.attention,
                    residual=DTYPES[settings.residual],
                )
                for rows in groups
            ]
        return denoise(
            model,
            make_schedule(schedule_config(settings), settings.steps),
            noise.to(self.device),
            lanes,
            guidance_scale=settings.guidance_scale,
            policy=make_policy(settings.cache),
            progress=progress,
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


def latent_size(
    vae: WanVAEConfig, patch: tuple[int, int, int], width: int, height: int, num_frames: int
) -> tuple[int, int, int]:
    """(T, H, W) of the latents of a video; refuses sizes that cannot be made, naming the nearest that can."""
    time_stride, space_stride = 2 ** sum(vae.temporal_down), 2 ** len(vae.temporal_down)
    check_multiple("width", width, space_stride * patch[2])
    check_multiple("height", height, space_stride * patch[1])
    check_multiple("num_frames", num_frames, time_stride * patch[0], offset=1)
    return 1 + (num_frames - 1) // time_stride, height // space_stride, width // space_stride


def count_tokens(latent: tuple[int, int, int], patch: tuple[int, int, int]) -> int:
    """Video tokens per branch."""
    return math.prod(latent) // math.prod(patch)


def make_policy(spec: str) -> NoCache:
    """The caching method of that name."""
    if spec != "none":
        raise ValueError(f"unknown cache {spec!r}; choose one of none")
    return NoCache()


def schedule_config(settings: Settings) -> ScheduleConfig:
    return ScheduleConfig(settings.solver, settings.sigma_grid, settings.flow_shift)


def check_settings(settings: Settings) -> None:
    """Refuse values that no model takes."""
    if not 0 <= settings.seed < 2**63:
        raise ValueError(f"seed={settings.seed} is not between 0 and 2^63 - 1")
    if not math.isfinite(settings.guidance_scale):
        raise ValueError(f"guidance_scale={settings.guidance_scale} is not a number; 1 turns guidance off")
    if not 0 < settings.fps < math.inf:
        raise ValueError(f"fps={settings.fps} is not above 0")
    if settings.attention not in BACKENDS:
        raise ValueError(f"unknown attention {settings.attention!r}; choose one of {', '.join(BACKENDS)}")
    if settings.residual not in (settings.dtype, "fp32"):
        raise ValueError(f"residual={settings.residual!r}; choose fp32 or the run's dtype, {settings.dtype}")
    make_policy(settings.cache)


def check_multiple(name: str, value: int, step: int, *, offset: int = 0) -> None:
    """Refuse a value that is not step * n + offset, naming the nearest that are."""
    low = max((value - offset) // step * step + offset, offset or step)
    if value < 1 or value != low:
        nearest = f"nearest are {low} and {low + step}" if value > low else f"the least is {low}"
        raise ValueError(f"{name}={value} is not {step}n{'+1' if offset else ''}; {nearest}")


def pick_device(device: str | None) -> str:
    """cuda where there is one, else cpu; a named device must exist."""
    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device {chosen!r} cannot be used ({str(error).splitlines()[0]}); try --device cpu"
        ) from None
    return chosen


def pick_dtype(dtype: str | None, device: str) -> str:
    """bf16 on a GPU, fp32 on a CPU, unless one is named."""
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; choose one of {', '.join(DTYPES)}")
    return dtype or ("fp32" if device == "cpu" else "bf16")


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
    except (SafetensorError, TypeError) as error:
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
