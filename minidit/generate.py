"""From a prompt to a video: the whole run as a recipe."""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from tqdm import tqdm

from minidit.cache.loop import Probe
from minidit.cache.plan import Policy, RunInfo
from minidit.cache.policies.replay import Replay
from minidit.cache.spec import make_policy, parse
from minidit.cache.trace import make_trace
from minidit.families import find_family
from minidit.profiles import find_profile
from minidit.sampling import Forward, Outcome, Record, denoise, noise_source
from minidit.schedules import MaskedSchedule
from minidit.settings import (
    BATCHED_TOKENS,
    DTYPES,
    Choices,
    Settings,
    check_settings,
    pick_device,
    pick_dtype,
    profile_match,
)
from minidit.video import to_frames, whole_file, write_video
from minidit.weights import Component, load_into, read_manifest

DEMO = Path(__file__).parent / "demo"
CLASSES = {  # class of a component -> the file that has it
    "HunyuanVideo": "minidit.models.hunyuan_video",
    "LlamaEncoder": "minidit.text.llama",
    "CLIPText": "minidit.text.clip",
    "HunyuanVAE": "minidit.vae.hunyuan_video",
    "Wan": "minidit.models.wan",
    "T5Encoder": "minidit.text.t5",
    "WanVAE": "minidit.vae.wan",
    "Latte": "minidit.models.latte",
    "KLVAE": "minidit.vae.kl",
    "OpenSora": "minidit.models.open_sora",
    "OpenSoraVAE": "minidit.vae.open_sora",
    "CogVideoX": "minidit.models.cogvideox",
    "CogVideoXVAE": "minidit.vae.cogvideox",
}
ALWAYS_FP32 = ("WanVAE", "KLVAE", "OpenSoraVAE")  # as the originals run it: bf16 shows as banding
FP16_FOR_BF16 = ("LlamaEncoder", "CLIPText", "HunyuanVAE")  # as the original runs them


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
        configs = {name: part.config for name, part in self.manifest.components.items()}
        self.family = find_family(self.manifest.family, configs, self.manifest.schedule)
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
        true_cfg: float | None = None,
        dynamic_cfg: bool | None = None,
        tiled: bool = False,
        progress: bool = False,
    ) -> Video:
        """Make one video. What is None is the model's default; sizes are used exactly, or refused."""
        choices = Choices(
            negative_prompt, seed, width, height, num_frames, steps, guidance_scale,
            flow_shift, solver, sigma_grid, fps, cache, attention, residual, true_cfg, dynamic_cfg, tiled,
        )  # fmt: skip
        settings = self.resolve(prompt, choices)
        watch = Stopwatch()
        with watch.stage("text"):
            text = self.encode(settings)
        with watch.stage("denoise"):
            outcome = self.denoise(settings, text, progress=progress)
        with watch.stage("decode"):
            frames = self.decode(outcome.latents, tiled=settings.tiled)
        return Video(frames, outcome.latents.cpu(), settings, self.trace(settings, outcome), watch.seconds)

    def resolve(self, prompt: str, choices: Choices) -> Settings:
        """Fill in the model's defaults and refuse what cannot be made, before anything is loaded."""
        given = {f.name: value for f in fields(Choices) if (value := getattr(choices, f.name)) is not None}
        schedule = self.manifest.schedule
        wanted = asdict(self.manifest.defaults) | {
            "flow_shift": schedule.shift,
            "solver": schedule.solver,
            # a solver other than the model's own takes the grid that every solver has; over a table all do
            "sigma_grid": schedule.sigma_grid
            if schedule.betas or given.get("solver", schedule.solver) == schedule.solver
            else "wan",
            "dynamic_cfg": schedule.dynamic_guidance,
            "residual": self.dtype,
        }
        values = wanted | given
        if bool(values["true_cfg"]) != bool(wanted["true_cfg"]):
            then = "1 turns it off" if wanted["true_cfg"] else "only models told their guidance have it"
            raise ValueError(f"true_cfg={values['true_cfg']}: {then}")
        if values["dynamic_cfg"] and schedule.betas != "zero-snr":
            raise ValueError("dynamic_cfg is of CogVideoX; other models have one guidance for all steps")
        self.check_tiled(values["tiled"])
        latent = self.family.latent_shape(values["width"], values["height"], values["num_frames"])
        settings = Settings(
            prompt=prompt,
            **{f.name: values[f.name] for f in fields(Choices)},
            batched_guidance=self.family.tokens(latent) <= BATCHED_TOKENS,
            dtype=self.dtype,
            device=self.device,
            model=self.name,
            model_id=self.model_id,
        )
        check_settings(settings)
        self.check_cache(settings)
        return settings

    def check_tiled(self, tiled: bool) -> None:
        """Refuse tiles where the autoencoder has none."""
        if tiled and not self.family.has_tiles:
            raise ValueError(f"tiled: the autoencoder of {self.folder} has no tiles; leave it out")

    def check_cache(self, settings: Settings) -> None:
        """Refuse a caching method that cannot act on this run."""
        policy, _ = self.policy(settings)
        steps = self.family.schedule(settings).steps(settings.cfg_scale)
        subs = find_class(self.part("transformer").class_name).subs
        branches = self.family.branches(settings.cfg_scale)
        policy.reset(RunInfo(steps, self.family.depth, subs, branches, self.manifest.family))

    def policy(self, settings: Settings) -> tuple[Policy, dict[tuple[int, str], Tensor]]:
        """The caching method of a run and the tensors of its profiles."""
        constants: dict[tuple[int, str], Tensor] = {}

        def find(method: str) -> dict | None:
            profile = find_profile(self.profile_folders, method, profile_match(settings))
            constants.update(profile.tensors if profile else {})
            return profile.data if profile else None

        policy = make_policy(parse(settings.cache), find)
        if isinstance(policy, Replay) and policy.slices:
            find("unicp")  # the bases of its slices
        return policy, constants

    @property
    def model_id(self) -> str:
        """Short hash of all files of the model."""
        hashes = [file.sha256 for part in self.manifest.components.values() for file in part.files]
        return hashlib.sha256("".join(sorted(hashes)).encode()).hexdigest()[:12]

    def file(self, component: str) -> Path:
        """The file of a component that is one file, such as a tokenizer."""
        return self.folder / self.part(component).files[0].name

    def part(self, component: str) -> Component:
        if component not in self.manifest.components:
            raise ValueError(f"{self.folder} has no {component}; convert the whole release")
        return self.manifest.components[component]

    def module(self, component: str) -> nn.Module:
        """A component with its weights on the device, loaded at the first call."""
        if component not in self.modules:
            part = self.part(component)
            dtype = part_dtype(part.class_name, DTYPES[self.dtype])
            module = build(part.class_name, part.config)
            args = dict(device=self.device, dtype=dtype, keep_fp32=module.keep_fp32)
            self.modules[component] = load_into(module, self.folder, component, **args)
        return self.modules[component]

    def encode(self, settings: Settings) -> list[Any]:
        """Text of the prompt and, under guidance, of the negative prompt, as model.prepare takes it."""
        return self.encode_all([settings])[0]

    def encode_all(self, runs: Sequence[Settings]) -> list[list[Any]]:
        """The text of several runs, before the text encoder makes room for the transformer."""
        texts = []
        for settings in runs:
            branches = self.family.branches(settings.cfg_scale)
            prompts = [settings.prompt, settings.negative_prompt][: len(branches)]
            texts.append(self.family.encode(self, prompts))
        if not self.keep_text_encoder:
            for component in self.family.encoders:
                del self.modules[component]
        return texts

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
        draw, schedule = noise_source(settings.seed), self.family.schedule(settings)
        noise = draw((1, *self.latent_shape(settings))).to(self.device)
        if (given := self.family.given(self, settings, noise, draw)) is not None:
            noise, schedule = given.latents, MaskedSchedule(schedule, given.mask)
            forward = replace(forward, context=replace(forward.context, frame_mask=given.mask))
        chosen, constants = self.policy(settings)
        return denoise(
            forward,
            schedule,
            noise,
            policy or chosen,
            guidance_scale=settings.cfg_scale,
            family=self.manifest.family,
            constants={key: t.to(self.device, DTYPES[self.dtype]) for key, t in constants.items()},
            progress=progress,
            on_step=on_step,
            draw=draw,
        )

    @torch.inference_mode()
    def forward(self, settings: Settings, text: list[Tensor]) -> Forward:
        """The transformer with everything that no step of this run changes."""
        model = self.module("transformer")
        context = self.family.prepare(model, text, settings)
        tokens = self.family.tokens(self.latent_shape(settings))
        return Forward(model, context, settings.batched_guidance, video_tokens=tokens)

    def latent_shape(self, settings: Settings) -> tuple[int, int, int, int]:
        """(C, T, H, W) of the latents."""
        return self.family.latent_shape(settings.width, settings.height, settings.num_frames)

    def trace(self, settings: Settings, outcome: Outcome) -> dict:
        """The log of a run, ready for JSON (cache/trace.py)."""
        model, size = self.module("transformer"), self.latent_shape(settings)[1:]
        branches = self.family.branches(settings.cfg_scale)
        table_at = cache(lambda width: model.macs(size, self.family.text_len, width))
        return make_trace(
            asdict(settings), outcome.records, model.subs, branches, table_at, outcome.cache_bytes
        )

    @torch.inference_mode()
    def decode(self, latents: Tensor, *, tiled: bool = False, progress: bool = False) -> Any:
        """Latents to frames. latents (1, C, t, h, w) -> uint8 array (T, H, W, 3)"""
        self.check_tiled(tiled)
        stream = self.family.decode(self, latents.to(self.device), tiled=tiled)
        parts = [part[0].cpu() for part in tqdm(stream, "decode", latents.shape[2], disable=not progress)]
        return to_frames(torch.cat(parts, dim=1), rounds=self.family.rounds_levels)


def find_class(class_name: str) -> type[nn.Module]:
    """The module class of a component; only its own file is imported."""
    if class_name not in CLASSES:
        raise ValueError(f"unknown component class {class_name!r}; this model folder is of a newer minidit")
    return getattr(import_module(CLASSES[class_name]), class_name)


def build(class_name: str, config: Any) -> nn.Module:
    """The module of a component without its weights, on the meta device."""
    with torch.device("meta"):
        return find_class(class_name)(config)


def part_dtype(class_name: str, run: torch.dtype) -> torch.dtype:
    """The dtype that a component's weights are loaded in, its keep_fp32 ones aside."""
    if class_name in FP16_FOR_BF16 and run == torch.bfloat16:
        return torch.float16
    return torch.float32 if class_name in ALWAYS_FP32 else run


def save_latents(path: str | Path, latents: Tensor, settings: Settings) -> None:
    """Write latents with the settings that made them; the file appears whole or not at all."""
    data = save({"latents": latents.cpu().contiguous()}, {"settings": json.dumps(asdict(settings))})
    with whole_file(Path(path)) as partial:
        partial.write_bytes(data)


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
