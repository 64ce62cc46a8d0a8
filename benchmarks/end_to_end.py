"""How long is a video from prompt to file, by stage, under each cache, and what does it cost in quality?

All methods make the same prompt from the same seed, in turns, after a run that is not counted. Seconds stand
beside multiply-adds: where "seconds" falls short of "MACs", the difference is measuring, copying and waiting.
With a preset in place of a model folder the weights are random: then only the denoising is timed, and nothing
is said of quality.

    python -m benchmarks.end_to_end [--model FOLDER] [--steps 50] [--cache none mixcache ...]
    python -m benchmarks.end_to_end --preset wan2.1-t2v-14b --size 832x480 --steps 6
"""

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.common import PROMPTS, busy, command_line, machine, table, write_results
from benchmarks.models import Subject, add_run_options, random_subject
from benchmarks.timing import matmul_ceiling, wait
from minidit.cache.macs import full_macs, plan_macs
from minidit.cache.spec import make_policy, parse
from minidit.generate import Engine, Stopwatch
from minidit.metrics import psnr, ssim
from minidit.presets import find_preset
from minidit.sampling import denoise
from minidit.schedules import make_schedule, make_table_schedule
from minidit.settings import DTYPES, Choices
from minidit.video import write_video

CACHES = (
    "none",
    "mixcache:theta=profile",
    "mixcache:eff:theta=profile",
    "unicp",
    "mixcache:eff:theta=profile+unicp",
)
RANDOM_CACHES = ("none", "mixcache:impact=uniform,theta=inf,interval=2", "mixcache:impact=uniform,theta=inf")
STAGES = ("load", "text", "denoise", "decode", "write")
COLUMNS = {
    "cache": "cache",
    **{f"{stage}_s": f"{stage} s" for stage in STAGES},
    "total_s": "total s",
    "macs_ratio": "MACs",
    "seconds_ratio": "seconds",
    "share_of_matmul": "of a matrix product",
    "cache_mib": "cache MiB",
    "psnr": "PSNR dB",
    "ssim": "SSIM",
}


def make_video(engine: Engine, settings: Any, folder: Path) -> dict[str, Any]:
    """One video from nothing: seconds by stage, its frames, and the totals of its trace."""
    engine.modules.clear()
    watch = Stopwatch()
    with watch.stage("load"):
        for component in (*engine.family.encoders, "transformer", "vae"):
            engine.module(component)
        wait(engine.device)
    with watch.stage("text"):
        text = engine.encode(settings)
        wait(engine.device)
    with watch.stage("denoise"):
        outcome = engine.denoise(settings, text)
        wait(engine.device)
    with watch.stage("decode"):
        frames = engine.decode(outcome.latents)
    with watch.stage("write"):
        name = "video.mp4" if find_spec("av") else "video.npz"  # a borrowed card's machine may lack av
        write_video(folder / name, frames, fps=settings.fps, settings=asdict(settings))
    return {"seconds": watch.seconds, "frames": frames, "total": engine.trace(settings, outcome)["total"]}


def alternate(makers: dict[str, Callable[[], dict]], runs: int) -> dict[str, list[dict]]:
    """Every method `runs` times, in turns, after one round that is not counted."""
    rounds = [{name: make() for name, make in makers.items()} for _ in range(runs + 1)]
    return {name: [found[name] for found in rounds[1:]] for name in makers}


def row_of(name: str, runs: list[dict], plain: list[dict], ceiling: float) -> dict[str, Any]:
    """Medians of one method's runs, beside those without a cache."""
    seconds = {stage: median(run["seconds"][stage] for run in runs) for stage in runs[0]["seconds"]}
    whole = median(run["seconds"]["denoise"] for run in plain)
    spread = [run["seconds"]["denoise"] for run in runs]
    total = runs[0]["total"]
    row = {
        "cache": name,
        **{f"{stage}_s": round(s, 4) for stage, s in seconds.items()},
        "total_s": round(sum(seconds.values()), 4),
        "denoise_spread_s": round(max(spread) - min(spread), 4),
        "n": len(runs),
        "macs_ratio": f"{total['macs_full'] / total['macs']:.3f}x",
        "seconds_ratio": f"{whole / seconds['denoise']:.3f}x",
        "share_of_matmul": f"{2 * total['macs'] / seconds['denoise'] / ceiling:.1%}",
        "cache_mib": round(total["cache_bytes"] / 2**20, 2),
    }
    if "frames" in runs[0] and name != "none":
        pair = runs[0]["frames"], plain[0]["frames"]
        row |= {"psnr": round(min(psnr(*pair), 99.0), 2), "ssim": round(ssim(*pair), 4)}
    return row


def folder_makers(args: argparse.Namespace, folder: Path) -> dict[str, Callable[[], dict]]:
    """Whole videos of a model folder."""
    engine = Engine(
        args.model, device=args.device, dtype=args.dtype, keep_text_encoder=True, compile=args.compile
    )
    chosen = Choices(steps=args.steps, width=args.size[0], height=args.size[1], num_frames=args.num_frames)
    settings = {name: engine.resolve(args.prompt, replace(chosen, cache=name)) for name in args.cache}
    return {name: lambda s=s: make_video(engine, s, folder) for name, s in settings.items()}


def random_makers(args: argparse.Namespace) -> dict[str, Callable[[], dict]]:
    """Denoising with a release's shape and random weights."""
    video = (*args.size, args.num_frames)
    subject = random_subject(args.preset, video, args.device, DTYPES[args.dtype or "bf16"], args.depth)
    forward, config = subject.forward(), find_preset(args.preset).schedule
    schedule = (make_table_schedule if config.betas else make_schedule)(config, args.steps or 6)
    return {
        name: lambda name=name: denoise_random(subject, forward, schedule, name, args.preset)
        for name in args.cache
    }


def denoise_random(subject: Subject, forward: Any, schedule: Any, spec: str, preset: str) -> dict[str, Any]:
    """Seconds of one run, and its multiply-adds."""
    policy, watch = make_policy(parse(spec), lambda method: None), Stopwatch()
    family = find_preset(preset).family
    rows = subject.text_rows
    table_at = cache(lambda width: subject.model.macs(tuple(subject.x.shape[2:]), rows, width))
    draw = lambda shape: torch.zeros(shape)
    with watch.stage("denoise"):
        outcome = denoise(
            forward, schedule, subject.x, policy, guidance_scale=subject.scale, family=family, draw=draw
        )
        wait(subject.device)
    macs = sum(plan_macs(r.plan, forward.branches, table_at) for r in outcome.records)
    full = full_macs(forward.branches, table_at) * len(outcome.records)
    total = {"macs": macs, "macs_full": full, "cache_bytes": outcome.cache_bytes}
    return {"seconds": watch.seconds, "total": total}


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    dtype = DTYPES[args.dtype or ("fp32" if args.device == "cpu" and not args.preset else "bf16")]
    ceiling = matmul_ceiling(args.device, dtype)
    with tempfile.TemporaryDirectory() as folder:
        makers = random_makers(args) if args.preset else folder_makers(args, Path(folder))
        found = alternate(makers, args.runs)
    return [row_of(name, runs, found["none"], ceiling) for name, runs in found.items()]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.end_to_end", description=__doc__.splitlines()[0])
    add_run_options(parser)
    parser.add_argument("--prompt", default=PROMPTS[0])
    parser.add_argument("--compile", action="store_true", help="of a model folder")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU (1)")
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args(argv)
    default = RANDOM_CACHES if args.preset else CACHES
    args.cache = tuple(dict.fromkeys(("none", *(args.cache or default))))
    return args


@torch.inference_mode()
def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    rows = run(args)
    print(table(rows, COLUMNS) + f"\n\n{machine()['card']}. {busy()}")
    name = f"end_to_end-{args.preset or Path(args.model).name}"
    print(write_results(name, command_line("end_to_end"), rows, args.device))


if __name__ == "__main__":
    main()
