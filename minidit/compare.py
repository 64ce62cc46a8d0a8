"""Is a caching method worth its speed? Methods beside the uncached run, and beside simply taking fewer steps.

Every video is made once and kept in a folder with what it cost, under a hash of all that decided it: run
again, only what is missing is made. Quality is measured on frames before any codec, against the uncached run
of the same prompt and seed. Beside every method stands the rival that costs nothing to implement: the
uncached sampler with as many steps as the method's multiply-adds (MACs) buy.
"""

import hashlib
import json
import platform
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import torch

from minidit import __version__, metrics
from minidit.cache.profile import SCENE_PROMPTS
from minidit.cache.spec import fewer_steps, parse
from minidit.cache.trace import acted
from minidit.components import DEMO
from minidit.generate import Engine
from minidit.profiles import find_profile
from minidit.settings import Choices, Settings, profile_match, set_threads
from minidit.tune import tuned
from minidit.video import whole_file

IDENTICAL = 99.0  # dB in place of infinity, where not one level differs
WORST = {"psnr": min, "ssim": min, "lpips": max, "seconds": max, "macs": max}


@dataclass(frozen=True)
class Made:
    """A finished video: what it cost, how far it is from the uncached one, and where its frames are."""

    path: Path  # of its numbers; the frames lie beside them
    numbers: dict[str, Any]  # settings, seconds, macs, cache_bytes, peak_bytes, psnr, ssim, lpips
    trace: dict
    constants: str  # where the method's constants come from, "" where it has none

    def frames(self) -> np.ndarray:
        """uint8 (T, H, W, 3)"""
        with np.load(self.path.with_suffix(".npz")) as arrays:
            return arrays["frames"]


@dataclass
class Row:
    """A method over all prompts and seeds, and fewer steps at its cost."""

    spec: str
    note: str = ""  # what tuning did
    error: str = ""  # why there is nothing to see
    videos: list[Made] = field(default_factory=list)
    rival: "Row | None" = None  # None too where the method itself is a number of steps, or saves none
    steps: int = 0

    @property
    def name(self) -> str:
        """The spec without the folders of a user's policy."""
        return re.sub(r"[^+]*/(?=[^/+]*\.py:)", "", self.spec)

    def spread(self, name: str) -> dict[str, float] | None:
        """Mean, median and worst of a number over all videos; None where it was not measured."""
        values = [video.numbers[name] for video in self.videos]
        if not values or None in values:
            return None
        return {"mean": fmean(values), "median": median(values), "worst": WORST[name](values)}

    def most(self, name: str) -> int | None:
        """The largest of a number of bytes; None where it was not measured."""
        values = [video.numbers[name] for video in self.videos]
        return None if not values or None in values else max(values)

    def to_json(self) -> dict:
        found = {"spec": self.spec, "steps": self.steps, "note": self.note, "error": self.error}
        found |= {name: self.spread(name) for name in WORST}
        found |= {name: self.most(name) for name in ("cache_bytes", "peak_bytes")}
        if self.videos:
            found["constants"] = self.videos[0].constants
        found["fewer_steps"] = self.rival.to_json() if self.rival else None
        return found | {"videos": [video.numbers for video in self.videos]}


class Bench:
    """Makes the videos of a comparison, or finds them in its folder.

    tune_prompts: what knobs are tuned on; those that are prompts too are left out · say(line): tells
    """

    def __init__(
        self,
        engine: Engine,
        choices: Choices,
        prompts: Sequence[str],
        folder: Path,
        *,
        seeds: int = 1,
        tune_prompts: Sequence[str] = (),
        say: Callable[[str], None] = print,
    ):
        self.engine, self.choices, self.folder, self.say = engine, choices, folder / "runs", say
        self.prompts, self.tune_prompts = list(prompts), [p for p in tune_prompts if p not in prompts]
        tasks = [(prompt, 1000 * i + sample) for i, prompt in enumerate(prompts) for sample in range(seeds)]
        self.plain = [self.settings("none", prompt, choices.seed + offset) for prompt, offset in tasks]
        self.machine = machine(self.plain[0].device)
        self.texts = cache(self.encode)
        self.warm = cache(self.warm_up)
        self.lpips = metrics.load_lpips(self.plain[0].device)
        self.ingredients = cache(self.find_ingredients)
        self.folder.mkdir(parents=True, exist_ok=True)

    def settings(self, spec: str, prompt: str, seed: int) -> Settings:
        """The resolved settings of a video; raises ValueError where the method cannot act on it."""
        return self.engine.resolve(prompt, replace(self.choices, seed=seed, cache=spec))

    def encode(self) -> dict[str, Any]:
        """The text of every prompt, before the text encoder makes room for the transformer."""
        runs = [self.settings("none", prompt, 0) for prompt in (*self.prompts, *self.tune_prompts)]
        return {run.prompt: text for run, text in zip(runs, self.engine.encode_all(runs), strict=True)}

    def warm_up(self) -> None:
        """Load all weights and run two steps, so that the first video has neither in its time and memory."""
        settings = replace(self.plain[0], steps=2)
        outcome = self.engine.denoise(settings, self.texts()[settings.prompt])
        self.engine.decode(outcome.latents, tiled=settings.tiled)

    def find_ingredients(self, spec: str) -> list[Any]:
        """What decides a method beside its settings: the profiles it finds, a user's policy or a trace."""
        found: list[Any] = []
        match = profile_match(self.plain[0])
        for method in parse(spec):
            file = method.variant if method.name == "replay" else method.name.rsplit(":", 1)[0]
            if method.name == "replay" or ".py:" in method.name:
                found.append(Path(file).read_text(encoding="utf-8"))
            try:
                profile = find_profile(self.engine.profile_folders, method.name.rsplit(":")[-1], match)
            except ValueError:  # none fits; a method that needs one has been refused already
                profile = None
            found.append(profile.data if profile else None)
        return found

    def path(self, settings: Settings, kind: str) -> Path:
        """Where a video's numbers lie: the name has a hash of all that decides them."""
        steps, made_of = self.plain[0].steps, self.ingredients(settings.cache)
        content = [asdict(settings), kind, steps, self.machine, made_of]
        key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
        return self.folder / f"{kind}-{file_name(settings.cache)[:60]}-{settings.steps}-{key}.json"

    def denoise(self, settings: Settings) -> tuple[torch.Tensor, dict, dict]:
        """A run as it is timed -> latents, numbers, trace and constants"""
        text = self.texts()[settings.prompt]
        self.warm()
        policy, _ = self.engine.policy(settings)
        on_gpu = settings.device.startswith("cuda")
        if on_gpu:
            torch.cuda.synchronize(settings.device)
            torch.cuda.reset_peak_memory_stats(settings.device)
        started = time.perf_counter()
        outcome = self.engine.denoise(settings, text, policy=policy)
        if on_gpu:
            torch.cuda.synchronize(settings.device)
        seconds = time.perf_counter() - started
        # a CPU's peak is that of the whole process, which would say nothing of one run
        peak = torch.cuda.max_memory_allocated(settings.device) if on_gpu else None
        trace = self.engine.trace(settings, outcome)
        numbers = {"settings": asdict(settings), "seconds": seconds, "peak_bytes": peak}
        numbers |= {name: trace["total"][name] for name in ("macs", "cache_bytes")}
        return outcome.latents, numbers, {"trace": trace, "constants": getattr(policy, "constants", "")}

    def make(self, settings: Settings, plain: Made | None) -> Made:
        """A video and its distance from the uncached one (plain: None is that one), made or found."""
        path = self.path(settings, "video")
        if not path.exists():
            latents, numbers, rest = self.denoise(settings)
            frames = self.engine.decode(latents, tiled=settings.tiled)
            numbers |= self.quality(frames, frames if plain is None else plain.frames())
            with whole_file(path.with_suffix(".npz")) as partial:
                np.savez_compressed(partial, frames=frames)
            write_json(path, numbers | rest)  # last: where it is, all is
            said = f"{settings.cache}, {settings.steps} steps · {settings.prompt!r} seed {settings.seed}"
            self.say(f"{said} · {numbers['seconds']:.2f} s · {numbers['psnr']:.1f} dB")
        numbers = json.loads(path.read_text(encoding="utf-8"))
        made = Made(path, numbers, numbers.pop("trace"), numbers.pop("constants"))
        if self.lpips and numbers["lpips"] is None:  # the network came after the video
            numbers["lpips"] = metrics.lpips(self.lpips, made.frames(), (plain or made).frames())
        return made

    def quality(self, frames: np.ndarray, plain: np.ndarray) -> dict[str, float | None]:
        """Distances from the uncached frames."""
        has_ssim = min(frames.shape[1:3]) >= metrics.WINDOW
        return {
            "psnr": min(metrics.psnr(frames, plain), IDENTICAL),
            "ssim": metrics.ssim(frames, plain) if has_ssim else None,
            "lpips": metrics.lpips(self.lpips, frames, plain) if self.lpips else None,
        }

    def share(self, spec: str) -> float:
        """Mean share of the uncached MACs that a method takes, on the prompts that are for tuning."""
        shares = []
        for i, prompt in enumerate(self.tune_prompts):
            settings = self.settings(spec, prompt, self.choices.seed + 1000 * i)
            path = self.path(settings, "tune")
            if not path.exists():
                total = self.denoise(settings)[2]["trace"]["total"]
                write_json(path, {"spec": spec, "share": total["macs"] / total["macs_full"]})
            shares.append(json.loads(path.read_text(encoding="utf-8"))["share"])
        return fmean(shares)

    def fewer(self, steps: int) -> Row:
        """The uncached sampler with fewer steps."""
        videos = [self.make(replace(full, steps=steps), self.make(full, None)) for full in self.plain]
        return Row(f"fewer-steps:steps={steps}", videos=videos, steps=steps)


def compare(
    bench: Bench, specs: Sequence[str], *, macs: float | None = None, debug: bool = False
) -> list[Row]:
    """A row per method, the uncached run first. macs: the share of its MACs that knobs are tuned to

    A method that is refused, or fails, is a row with its reason. debug: raise instead
    """
    if not any(spec.startswith("fewer-steps") for spec in specs):
        specs = [*specs, f"fewer-steps:share={0.5 if macs is None else macs:g}"]
    rows = [Row(spec) for spec in dict.fromkeys(("none", *specs))]
    for row in rows:
        with reason_kept(row, debug):
            prepare(bench, row, macs)
    for full in bench.plain:
        plain = bench.make(full, None)
        for row in [row for row in rows if not row.error]:
            with reason_kept(row, debug):
                row.videos.append(bench.make(bench.settings(row.spec, full.prompt, full.seed), plain))
    for row in rows[1:]:
        if not row.error and not row.spec.startswith("fewer-steps"):
            add_rival(bench, row, rows[0])
    return rows


@contextmanager
def reason_kept(row: Row, debug: bool) -> Iterator[None]:
    """What goes wrong with a method, a user's own policy among them, is the reason why its row is empty."""
    try:
        yield
    except Exception as error:
        if debug:
            raise
        text = (str(error).strip().splitlines() or [""])[0]
        row.error = text if isinstance(error, ValueError) and text else f"{type(error).__name__}: {text}"
        row.videos = []


def prepare(bench: Bench, row: Row, macs: float | None) -> None:
    """Tune a row's method where that was asked for, and refuse what cannot run, before any run."""
    full = bench.plain[0]
    fewer = fewer_steps(row.spec, full.steps)
    row.steps = fewer or full.steps
    if fewer is not None:
        row.spec = f"fewer-steps:steps={fewer}"
    elif macs is not None and row.spec != "none":
        row.spec, row.note = tuned(row.spec, macs, bench.share if bench.tune_prompts else None)
    bench.settings(row.spec, full.prompt, full.seed)


def add_rival(bench: Bench, row: Row, plain: Row) -> None:
    """Fewer steps at a row's MACs, the nearest whole number of them."""
    fewer = max(1, round(row.steps * row.spread("macs")["mean"] / plain.spread("macs")["mean"]))
    row.rival = bench.fewer(fewer) if fewer < row.steps else None
    if not any(acted(video.trace) for video in row.videos):
        row.note = "; ".join(filter(None, (row.note, "it never acted: every step ran in full")))


def open_bench(
    model: str,
    choices: Choices,
    folder: Path,
    *,
    prompts: Sequence[str],
    tune_prompts: Sequence[str] | None,
    seeds: int,
    engine_options: dict[str, Any],
    say: Callable[[str], None],
) -> Bench:
    """A model's bench. engine_options: of Engine

    No prompts: those that ship for the embedded model; likewise tune_prompts, None where nothing is tuned.
    """
    if seeds < 1:
        raise ValueError(f"seeds={seeds} makes no video; wanted 1 or more")
    engine = Engine(model, **engine_options)
    if not prompts:
        if engine.name != "demo":
            raise ValueError(f"no prompts were given for {model}; give --prompts FILE, one per line")
        prompts = read_lines("prompts.txt")
    if tune_prompts is not None and not tune_prompts:
        tune_prompts = read_lines("tune_prompts.txt") if engine.name == "demo" else SCENE_PROMPTS
    set_threads(engine.resolve(prompts[0], choices))
    return Bench(engine, choices, prompts, folder, seeds=seeds, tune_prompts=tune_prompts or (), say=say)


def read_lines(name: str) -> list[str]:
    """A list of prompts that ships with the embedded model."""
    return (DEMO / name).read_text(encoding="utf-8").splitlines()


def describe_run(bench: Bench, command: str, macs: float | None) -> dict[str, Any]:
    """What a reader has to know of a comparison, ready for JSON."""
    files = bench.engine.part("transformer").files
    return {
        "command": command,
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "machine": bench.machine,
        "settings": asdict(bench.plain[0]),
        "prompts": bench.prompts,
        "seeds": len(bench.plain) // len(bench.prompts),
        "match": macs,
        "tune_prompts": bench.tune_prompts,
        "weights_bytes": sum(file.bytes for file in files),  # as they lie on the disk
    }


def machine(device: str) -> dict[str, str]:
    """Where seconds were measured; videos of another machine are made again."""
    if device.startswith("cuda"):
        where = torch.cuda.get_device_name(device)
    else:
        info = Path("/proc/cpuinfo")
        text = info.read_text(encoding="utf-8") if info.is_file() else ""
        names = re.findall(r"model name\s*: (.+)", text)
        threads = torch.get_num_threads()
        where = f"{names[0] if names else platform.processor()}, {threads} thread{'s' * (threads > 1)}"
    versions = {"python": platform.python_version(), "torch": torch.__version__, "minidit": __version__}
    return {"device": where} | versions


def file_name(spec: str) -> str:
    """A spec as a part of a file name."""
    return re.sub(r"[^\w.=+,-]+", "-", spec).strip("-.") or "method"


def write_json(path: Path, content: Any) -> None:
    with whole_file(path) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
