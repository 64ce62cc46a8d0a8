"""From a prompt to a video: the whole run as a recipe."""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from functools import cache, partial
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from tqdm import tqdm

from minidit.budget import within_budget
from minidit.cache.macs import with_text
from minidit.cache.plan import Policy, RunInfo
from minidit.cache.policies.replay import Replay
from minidit.cache.seam import Probe
from minidit.cache.spec import fewer_steps, make_policy, parse
from minidit.cache.trace import closing_line, make_trace
from minidit.checkpoint import Checkpoint
from minidit.compiled import CompiledBlock
from minidit.components import DEMO, build, find_class, part_dtype
from minidit.costs import cache_bytes, footprint, parts_of, text_macs
from minidit.families import find_family
from minidit.memory import Peaks, Stage, check_offload, choose_offload, give_back_heap, in_use, readable
from minidit.offload import OffloadedBlocks
from minidit.parallel import (
    ALONE,
    Agreed,
    Layout,
    World,
    add_critical,
    busiest_share,
    find_layout,
    make_part,
)
from minidit.profiles import blamed_on, find_profile
from minidit.quantize import check_weights, quantize_blocks, quantized
from minidit.sampling import Forward, NoiseSource, Outcome, Record, denoise
from minidit.schedules import MaskedSchedule
from minidit.settings import (
    BATCHED_TOKENS,
    DTYPES,
    Choices,
    Settings,
    check_settings,
    check_types,
    pick_device,
    pick_dtype,
    profile_match,
)
from minidit.tensor_files import open_tensors
from minidit.text.states import TextCache, hash_of, numerics, source_hash
from minidit.video import to_frames, whole_file, write_video
from minidit.weights import Component, fill, read_manifest, read_tensors


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
    the transformer's place. profiles: a folder of caching profiles in place of the model's own. text_cache: a
    folder that keeps the text states of prompts (text/states.py); None keeps none. compile: the transformer's
    blocks are compiled, once per distinct row of what a method does inside them (compiled.py). world: the
    ranks that make every video together; each has an engine, and is asked for the same videos. weights: of
    the transformer's blocks, full, int8, fp8 or fp8-dynamic (quantize.py). offload: none, parts (the
    transformer is let go before decoding), blocks (they visit the device in their turn, offload.py) or auto,
    what fit() finds to fit. cache_budget: the most bytes that may be kept from step to step: by a caching
    method and, in what it leaves, of the text's keys and values; `notes` says what that has changed.
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
        text_cache: str | Path | None = None,
        compile: bool = False,
        world: World | None = None,
        weights: str = "full",
        offload: str = "auto",
        cache_budget: int | None = None,
    ):
        check_weights(weights)
        check_offload(offload)
        self.weights, self.cache_budget = weights, cache_budget
        self.offload, self.held = offload, "none" if offload == "auto" else offload
        self.world = world
        self.name = str(model)
        self.folder = DEMO if self.name == "demo" else Path(model)
        self.manifest = read_manifest(self.folder, verify=verify)
        configs = {name: part.config for name, part in self.manifest.components.items()}
        self.family = find_family(self.manifest.family, configs, self.manifest.schedule)
        self.device = pick_device(device)
        self.dtype = pick_dtype(dtype, self.device)
        self.keep_text_encoder = keep_text_encoder
        self.block_fn = CompiledBlock() if compile else None
        self.text_cache = TextCache(text_cache) if text_cache else None
        self.profile_folders = [Path(profiles)] if profiles else [self.folder / "profiles"]
        self.modules: dict[str, nn.Module] = {}
        self.peaks = Peaks(self.device)
        self.stages: list[Stage] = []  # as fit() has predicted them
        self.kept: dict[Settings, int] = {}  # bytes of caching methods, so far
        self.keeps_text = True  # the text's keys and values, for all steps
        self.notes: list[str] = []  # what the budget for caches has changed

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
        self.fit(settings)
        watch = Stopwatch(self.peaks)
        with watch.stage("text"):
            text = self.encode(settings)
        with watch.stage("denoise"):
            outcome = self.denoise(settings, text, progress=progress)
        self.make_room()
        with watch.stage("decode"):
            frames = self.decode(outcome.latents, tiled=settings.tiled)
        return Video(frames, outcome.latents.cpu(), settings, self.trace(settings, outcome), watch.seconds)

    def resolve(self, prompt: str, choices: Choices) -> Settings:
        """Fill in the model's defaults and refuse what cannot be made, before anything is loaded."""
        given = {f.name: value for f in fields(Choices) if (value := getattr(choices, f.name)) is not None}
        check_types(given | {"prompt": prompt})
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
        if (fewer := fewer_steps(values["cache"], values["steps"])) is not None:
            values |= {"steps": fewer, "cache": "none"}  # no method: the rival that every method has to beat
        self.family.check_tiled(values["tiled"])
        latent = self.family.latent_shape(values["width"], values["height"], values["num_frames"])
        settings = Settings(
            prompt=prompt,
            **{f.name: values[f.name] for f in fields(Choices)},
            batched_guidance=self.family.tokens(latent) <= BATCHED_TOKENS,
            dtype=self.dtype,
            device=self.device,
            model=self.name,
            model_id=self.model_id,
            compile=self.block_fn is not None,
            weights=self.weights,
        )
        check_settings(settings)
        self.check_cache(settings)
        is_free = self.cache_budget is None or settings.cache == "none"
        return settings if is_free else self.within_budget(settings)

    def within_budget(self, settings: Settings) -> Settings:
        """The same, or with a smaller form of the caching method that keeps within the budget for caches."""

        def size_of(cache: str) -> float:
            try:
                return self.cache_bytes(replace(settings, cache=cache))
            except ValueError:  # it cannot act on this video, or lacks a profile
                return inf

        cache = within_budget(settings.cache, self.cache_budget, size_of)
        if cache != settings.cache:
            kept, room, left = map(readable, (size_of(settings.cache), self.cache_budget, size_of(cache)))
            self.note(
                f"cache {settings.cache} keeps {kept}, and the budget is {room}: {cache} runs in its place, "
                f"which keeps {left}"
            )
        return replace(settings, cache=cache)

    def note(self, line: str) -> None:
        """Something that whoever runs this has to be told, once."""
        if line not in self.notes:
            self.notes.append(line)

    def cache_bytes(self, settings: Settings) -> int:
        """What the caching method keeps, on the busiest rank."""
        any_text = replace(settings, prompt="", negative_prompt="", seed=0)  # all videos of a prompt file
        if any_text not in self.kept:
            parts, layout = parts_of(self.manifest), self.layout(settings) or ALONE
            self.kept[any_text] = cache_bytes(parts, settings, *self.policy(settings), layout)
        return self.kept[any_text]

    def fit(self, settings: Settings) -> None:
        """Find how this video keeps within free memory, or refuse it, before anything is loaded.

        The text's keys and values are made once for all steps unless the cache's budget has no room for them.
        """
        is_quick = self.device == "cpu" and settings.is_small  # counting its cache would take as long as it
        is_counted = settings.cache != "none" and (self.cache_budget is not None or not is_quick)
        kept = self.cache_bytes(settings) if is_counted else 0
        layout, parts = self.layout(settings) or ALONE, parts_of(self.manifest)
        found = footprint(parts, settings, kept, layout=layout)
        self.keeps_text = self.cache_budget is None or kept + found.text <= self.cache_budget
        if not self.keeps_text:
            more = found.costs.text_macs / found.costs.macs
            self.note(
                f"the budget for caches has no room for the text's keys and values, {readable(found.text)}: "
                f"every block makes its own at every step, {more:.1%} more multiply-adds"
            )
            found = replace(found, text=0)
        if not self.modules:  # what predicting has imported, 0.15 GiB with a budget for caches, is no tensor
            self.peaks.base = in_use(self.device)
        stages = partial(found.stages, stays=self.family.encoders if self.keep_text_encoder else ())
        held, self.stages = choose_offload(stages, self.offload, device=self.device, base=self.peaks.base)
        if held != self.held and "blocks" in (held, self.held):
            self.modules.pop("transformer", None)
        self.held = held

    def check_cache(self, settings: Settings) -> None:
        """Refuse a caching method that cannot act on this run."""
        steps = self.family.schedule(settings).steps(settings.cfg_scale)
        subs = find_class(self.part("transformer").class_name).subs
        branches = self.family.branches(settings.cfg_scale)
        preset, tokens = self.manifest.preset or "", self.tokens_of(settings)
        family = self.manifest.family
        run = RunInfo(steps, self.family.depth, subs, branches, family, (), preset, tokens)
        if (layout := self.layout(settings)) is not None:
            run = replace(run, token_ranks=layout.ulysses, cfg_ranks=layout.cfg)
        used: list[Path] = []
        with blamed_on(used):
            self.policy(settings, used)[0].reset(run)

    def layout(self, settings: Settings) -> Layout | None:
        """How ranks share this video, refused where they cannot; None where one rank makes it."""
        if self.world is None:
            return None
        part, world = self.part("transformer"), self.world
        subs, heads = find_class(part.class_name).subs, part.config.heads
        return find_layout(world.mode, world.size, self.family, subs, heads, settings)

    def tokens_of(self, settings: Settings) -> int:
        """Video tokens per branch."""
        return self.family.tokens(self.latent_shape(settings))

    def policy(
        self, settings: Settings, used: list[Path] | None = None
    ) -> tuple[Policy, dict[tuple[int, str], Tensor]]:
        """The caching method of a run and the tensors of its profiles. used: gains the profiles' files"""
        constants: dict[tuple[int, str], Tensor] = {}

        def find(method: str) -> dict | None:
            profile = find_profile(self.profile_folders, method, profile_match(settings))
            constants.update(profile.tensors if profile else {})
            if profile and used is not None:
                used.append(profile.path)
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
            is_offloaded = component == "transformer" and self.held == "blocks"
            self.modules[component] = self.load(component, is_offloaded=is_offloaded)
        return self.modules[component]

    def load(self, component: str, *, is_offloaded: bool) -> nn.Module:
        """A component from its files, tensor by tensor; a transformer's blocks quantised on the way, if so.

        is_offloaded: the blocks stay in CPU memory
        """
        part = self.part(component)
        module = build(part.class_name, part.config)
        dtype, device = part_dtype(part.class_name, DTYPES[self.dtype]), self.device
        keep_fp32, to = module.keep_fp32, "cpu" if is_offloaded and self.weights == "full" else device
        tensors = read_tensors(module, self.folder, component, device=to, dtype=dtype, keep_fp32=keep_fp32)
        if component == "transformer" and self.weights != "full":
            tensors = quantized(module, tensors, quantize_blocks(module, self.weights))
        if not is_offloaded:
            return fill(module, tensors)
        fill(module, ((n, t.to("cpu" if n.startswith("blocks.") else device)) for n, t in tensors))
        module.blocks = OffloadedBlocks(module.blocks, device)
        return module

    def encode(self, settings: Settings) -> list[Any]:
        """Text of the prompt and, under guidance, of the negative prompt, as model.prepare takes it."""
        return self.encode_all([settings])[0]

    def encode_all(self, runs: Sequence[Settings]) -> list[list[Any]]:
        """The text of several runs, before the text encoder makes room for the transformer."""
        texts = []
        for settings in runs:
            branches = self.family.branches(settings.cfg_scale)
            prompts = [settings.prompt, settings.negative_prompt][: len(branches)]
            texts.append(self.encode_prompts(prompts))
        if not self.keep_text_encoder:
            for component in self.family.encoders:
                self.modules.pop(component, None)  # not loaded where all states were found
        return texts

    def encode_prompts(self, prompts: list[str]) -> list[Any]:
        """The text of one run, from the text cache where it lies there."""
        if self.text_cache is None:
            return self.family.encode(self, prompts)
        key = self.text_key(prompts)
        if (states := self.text_cache.load(key, self.device)) is None:
            states = self.family.encode(self, prompts)
            self.text_cache.save(key, states)
        return states

    def text_key(self, prompts: list[str]) -> str:
        """A hash of everything that decides the text states of these prompts."""
        parts = {
            name: (part.class_name, repr(part.config), [file.sha256 for file in part.files])
            for name, part in self.manifest.components.items()
            if name.startswith(("text_encoder", "tokenizer"))
        }
        what = prompts, self.manifest.family, self.family.text_len, parts, self.dtype
        return hash_of(*what, numerics(self.device), source_hash())

    def denoise(
        self,
        settings: Settings,
        text: list[Tensor],
        *,
        policy: Policy | None = None,
        on_step: Callable[[Record, Tensor], None] | None = None,
        probe: Probe | None = None,
        progress: bool = False,
        start: Checkpoint | None = None,
        keep: Callable[[Checkpoint], None] | None = None,
        wants: Callable[[int], bool] | None = None,
    ) -> Outcome:
        """Noise to latents. text: from encode() · policy: in place of the one that the settings name

        start: a checkpoint to go on with · keep(checkpoint) is called after every step, or where
        wants(steps done) says so; a checkpoint holds what the next step overwrites
        """
        forward = replace(self.forward(settings, text), probe=probe)
        draw, schedule = NoiseSource(settings.seed), self.family.schedule(settings)
        noise = draw((1, *self.latent_shape(settings))).to(self.device)
        if (given := self.family.given(self, settings, noise, draw)) is not None:
            noise, schedule = given.latents, MaskedSchedule(schedule, given.mask)
            forward = replace(forward, context=replace(forward.context, frame_mask=given.mask))
        chosen, constants = self.policy(settings)
        if start is not None:
            draw.generator.set_state(start.generator)
        state = draw.generator.get_state
        policy = policy or chosen
        if forward.part is not None:
            policy = Agreed(policy, forward.part, self.world.checks)
        return denoise(
            forward,
            schedule,
            noise,
            policy,
            guidance_scale=settings.cfg_scale,
            family=self.manifest.family,
            preset=self.manifest.preset or "",
            constants={key: t.to(self.device, DTYPES[self.dtype]) for key, t in constants.items()},
            progress=progress,
            on_step=on_step,
            draw=draw,
            start=start and start.snapshot,
            on_state=keep and (lambda snapshot: keep(Checkpoint(snapshot, state()))),
            wants_state=wants,
        )

    @torch.inference_mode()
    def forward(self, settings: Settings, text: list[Tensor]) -> Forward:
        """The transformer with everything that no step of this run changes."""
        model = self.module("transformer")
        context = self.family.prepare(model, text, settings, keep_text=self.keeps_text)
        tokens = self.tokens_of(settings)
        batched, layout = settings.batched_guidance, self.layout(settings)
        if layout is not None:
            self.world.meet()  # the weights of one rank may take longer to load than a collective may wait
        part = make_part(self.world, layout, model, context) if layout else None
        expect = model.blocks.follow if isinstance(model.blocks, OffloadedBlocks) else None
        return Forward(
            model,
            context,
            batched,
            block_fn=self.block_fn,
            video_tokens=tokens,
            part=part,
            expect=expect,
        )

    def latent_shape(self, settings: Settings) -> tuple[int, int, int, int]:
        """(C, T, H, W) of the latents."""
        return self.family.latent_of(settings)

    def trace(self, settings: Settings, outcome: Outcome) -> dict:
        """The log of a run, ready for JSON (cache/trace.py)."""
        part, size = self.part("transformer"), self.latent_shape(settings)[1:]
        model = build(part.class_name, part.config)  # without weights: those may have been let go
        branches = self.family.branches(settings.cfg_scale)
        anew = 0 if self.keeps_text else text_macs(model, self.family.text_len)
        table_at = cache(lambda width: with_text(model.macs(size, self.family.text_len, width), anew))
        trace = make_trace(
            asdict(settings), outcome.records, model.subs, branches, table_at, outcome.cache_bytes
        )
        if (layout := self.layout(settings)) is not None:
            share = busiest_share(layout, self.family, model.subs, settings)
            add_critical(trace, [record.plan for record in outcome.records], branches, layout, share)
        return trace

    def make_room(self) -> None:
        """Before decoding, let go of a transformer that does not fit beside the autoencoder."""
        if self.held != "none":
            self.modules.pop("transformer", None)
        give_back_heap()

    def decode(self, latents: Tensor, *, tiled: bool = False, progress: bool = False) -> np.ndarray:
        """Latents to frames. latents (1, C, t, h, w) -> uint8 (T, H, W, 3)"""
        return np.concatenate(list(self.decode_stream(latents, tiled=tiled, progress=progress)))

    @torch.inference_mode()
    def decode_stream(
        self, latents: Tensor, *, tiled: bool = False, progress: bool = False
    ) -> Iterator[np.ndarray]:
        """`decode` piece by piece, a few frames (n, H, W, 3) at a time."""
        self.family.check_tiled(tiled)
        watch = lambda tiles: tqdm(tiles, "decode tiles", disable=not progress)
        stream = self.family.decode(self, latents.to(self.device), tiled=tiled, watch=watch)
        for part in tqdm(stream, "decode", latents.shape[2], disable=not progress):
            yield to_frames(part[0], rounds=self.family.rounds_levels)


def save_latents(path: str | Path, latents: Tensor, settings: Settings, trace: dict | None = None) -> None:
    """Write latents with the settings that made them and, if given, the run's trace: whole or not at all."""
    metadata = {"settings": json.dumps(asdict(settings))} | ({"trace": json.dumps(trace)} if trace else {})
    data = save({"latents": latents.cpu().contiguous()}, metadata)
    with whole_file(Path(path)) as partial:
        partial.write_bytes(data)


def load_latents(path: str | Path) -> tuple[Tensor, Settings]:
    """Read what save_latents wrote."""
    try:
        with open_tensors(path) as file:
            text = (file.metadata() or {}).get("settings")
            if text is None or "latents" not in file.keys():
                raise ValueError(
                    f"{path} holds no latents of minidit; generate writes them before it decodes"
                )
            settings, latents = Settings(**json.loads(text)), file.get_tensor("latents")
            check_types(asdict(settings))
            if latents.ndim != 5 or not latents.isfinite().all():
                shape = tuple(latents.shape)
                raise ValueError(f"{path}: latents are {shape}, wanted finite (1, C, T, H, W); make it again")
            return latents, settings
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; pass the .latents.safetensors of a generation") from None
    except (SafetensorError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read as latents ({error})") from None


def load_trace(path: str | Path) -> dict:
    """The trace that lies beside the latents of a run; one line where it is damaged."""
    with safe_open(path, "pt") as file:
        if "trace" not in (metadata := file.metadata()):
            raise ValueError(f"{path} holds no trace; use it with python -m minidit decode {path}")
        try:
            trace = json.loads(metadata["trace"])
            closing_line(trace)  # finds there what a finished run says
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(
                f"{path} holds a damaged trace ({error!r:.60}); use it with python -m minidit decode {path}"
            ) from None
        return trace


class Stopwatch:
    """Seconds by stage, and the most memory in use, by the same names."""

    def __init__(self, peaks: Peaks | None = None):
        self.seconds: dict[str, float] = {}
        self.peaks = peaks

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        with self.peaks.stage(name) if self.peaks else nullcontext():
            yield
        self.seconds[name] = time.perf_counter() - started
