"""How do seconds per step fall with ranks, without and with a cache (as in figure 12 of MixCache)?

Every count of ranks is a torchrun of its own, and denoises one noise under every cache, in turns, after a
round that is not counted. The latents are compared with those of one rank before anything is printed.
Efficiency is the time of one rank over ranks times theirs. On a CPU the ranks are gloo's, on the same cores,
and a step of the embedded model takes milliseconds: there the table shows what sharing costs, not what it
brings. On several machines start the worker by hand, with torchrun's own flags, once per table row:
torchrun --nnodes 2 ... -m benchmarks.scaling --worker rows.json --preset ...

    python -m benchmarks.scaling [--ranks 1 2 3 6] [--parallel auto]
    python -m benchmarks.scaling --device cuda --preset wan2.1-t2v-14b --size 832x480 --ranks 1 2 4 8
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import PROMPTS, busy, command_line, machine, table, write_results
from benchmarks.models import add_run_options, random_subject
from benchmarks.timing import wait
from minidit.cache.spec import make_policy, parse
from minidit.cache.trace import make_trace
from minidit.generate import Engine
from minidit.parallel import (
    Agreed,
    World,
    add_critical,
    choose_layout,
    frames_of,
    joined,
    largest_share,
    make_part,
)
from minidit.presets import find_preset
from minidit.sampling import Outcome, denoise
from minidit.schedules import make_schedule, make_table_schedule
from minidit.settings import DTYPES, Choices

CACHES = ("none", "mixcache:eff:theta=profile")
RANDOM_CACHES = ("none", "mixcache:impact=uniform,theta=inf")
CLOSE = {"fp32": 1e-5, "bf16": 0.05, "fp16": 0.01}  # relative L2; other shapes are summed in another order
COLUMNS = {
    "ranks": "ranks",
    "layout": "ulysses x cfg",
    "cache": "cache",
    "step_s": "s per step",
    "spread_s": "spread",
    "speedup": "vs one rank without",
    "efficiency": "efficiency",
    "macs": "fewer MACs, busiest rank",
    "apart": "rel. L2 from one rank",
}
Runner = Callable[[str], tuple[Outcome, dict]]  # of a cache: the run, and its trace


def demo_runner(args: argparse.Namespace, world: World | None) -> Runner:
    """Runs of the embedded model, which a model folder may replace."""
    engine = Engine(args.model, device=args.device, dtype=args.dtype, keep_text_encoder=True, world=world)
    choices = Choices(steps=args.steps, width=args.size[0], height=args.size[1], num_frames=args.num_frames)
    text = engine.encode(engine.resolve(PROMPTS[0], choices))

    def run(spec: str) -> tuple[Outcome, dict]:
        settings = engine.resolve(PROMPTS[0], replace(choices, cache=spec))
        outcome = engine.denoise(settings, text)
        return outcome, engine.trace(settings, outcome)

    return run


def random_runner(args: argparse.Namespace, world: World | None) -> Runner:
    """Runs of a release's shape with random weights, the same on every rank."""
    subject = random_subject(
        args.preset, (*args.size, args.num_frames), args.device, DTYPES[args.dtype], args.depth
    )
    forward, config = subject.forward(), find_preset(args.preset).schedule
    schedule = (make_table_schedule if config.betas else make_schedule)(config, args.steps or 6)
    model, grid = subject.model, forward.context.grid
    frames = frames_of(model.subs, grid[0])
    layout = None
    if world is not None:
        places = subject.tokens // frames
        layout = choose_layout(world.mode, world.size, model.config.heads, len(subject.branches), places)
        world.meet()
        forward = replace(forward, part=make_part(world, layout, model, forward.context))
    table_at = cache(lambda width: model.macs(tuple(subject.x.shape[2:]), subject.text_rows, width))

    def run(spec: str) -> tuple[Outcome, dict]:
        policy = make_policy(parse(spec), lambda method: None)
        policy = policy if layout is None else Agreed(policy, forward.part)
        outcome = denoise(
            forward, schedule, subject.x, policy, guidance_scale=subject.scale,
            family=find_preset(args.preset).family, draw=torch.zeros,
        )  # fmt: skip
        trace = make_trace({}, outcome.records, model.subs, subject.branches, table_at, outcome.cache_bytes)
        if layout is not None:
            text = 0 if "cross" in model.subs else subject.text_rows
            share = largest_share(layout, subject.tokens, frames, text)
            add_critical(trace, [r.plan for r in outcome.records], subject.branches, layout, share)
        return outcome, trace

    return run


def measure(args: argparse.Namespace, run: Runner) -> tuple[list[dict[str, Any]], list[Tensor]]:
    """A row per cache, and its latents: `runs` times in turns, after a round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in args.cache}
    for _ in range(args.runs + 1):
        found = {}
        for name in args.cache:
            wait(args.device)
            started = time.perf_counter()
            found[name] = run(name)
            wait(args.device)
            seconds[name].append((time.perf_counter() - started) / len(found[name][0].records))
    rows = []
    for name, (_, trace) in found.items():
        total, times = trace["total"], seconds[name][1:]
        macs = total.get("macs_critical", total["macs"])
        rows.append(
            {
                "cache": name, "step_s": median(times), "spread_s": max(times) - min(times), "n": len(times),
                "macs": total["macs_full"] / macs, "ranks_of": trace.get("ranks", {}),
            }
        )  # fmt: skip
    return rows, [outcome.latents.cpu() for outcome, _ in found.values()]


def work(args: argparse.Namespace) -> None:
    """What every rank does; the first writes rows and latents."""
    with joined(args.parallel, 1, device=args.device) as world:
        rows, latents = measure(args, (random_runner if args.preset else demo_runner)(args, world))
        if world is None or world.is_first:
            args.worker.write_text(json.dumps(rows))
            torch.save(latents, args.worker.with_suffix(".pt"))


def start(args: argparse.Namespace, ranks: int, folder: Path) -> tuple[list[dict[str, Any]], list[Tensor]]:
    """One count of ranks, in processes of its own."""
    out = folder / f"{ranks}.json"
    words = [word for word in sys.argv[1:] if word]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    command += ["-m", "benchmarks.scaling", *words, "--worker", str(out)]
    if ranks == 1:  # there is nothing to share
        command += ["--parallel", "auto"]
    threads = {"OMP_NUM_THREADS": str(args.threads)}
    subprocess.run(command, check=True, env=os.environ | threads)
    return json.loads(out.read_text()), torch.load(out.with_suffix(".pt"))


def compare(found: dict[int, tuple[list[dict], list[Tensor]]], tolerance: float) -> list[dict[str, Any]]:
    """The table: every row beside one rank, whose latents it has to have."""
    ones, references = found[1]
    rows = []
    for ranks, (measured, latents) in found.items():
        for row, one, got, want in zip(measured, ones, latents, references, strict=True):
            apart = ((got - want).norm() / want.norm()).item()
            layout = row.pop("ranks_of")
            if not apart < tolerance and not layout.get("cfg", 1) > 1:  # where cfg reuse is off by design
                raise ValueError(f"{ranks} ranks are {apart:.2g} from one under {row['cache']}")
            rows.append(
                {
                    "ranks": ranks,
                    "layout": f"{layout.get('ulysses', 1)} x {layout.get('cfg', 1)}",
                    **row,
                    "step_s": round(row["step_s"], 5),
                    "spread_s": round(row["spread_s"], 5),
                    "speedup": f"{ones[0]['step_s'] / row['step_s']:.2f}x",
                    "efficiency": f"{one['step_s'] / row['step_s'] / ranks:.0%}",
                    "macs": f"{row['macs']:.2f}x",
                    "apart": f"{apart:.1e}",
                }
            )
    return rows


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.scaling", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--ranks", type=int, nargs="+", default=[1, 2, 3], help="counts; 1 is always among them"
    )
    parser.add_argument("--parallel", default="auto", help="as generate's")
    add_run_options(parser)
    parser.add_argument("--threads", type=int, default=1, help="of every rank on a CPU (1)")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--worker", type=Path, help="be one of the ranks, and write here")
    args = parser.parse_args(argv)
    args.dtype = args.dtype or ("fp32" if args.device == "cpu" else "bf16")
    default = RANDOM_CACHES if args.preset else CACHES
    args.cache = tuple(dict.fromkeys(("none", *(args.cache or default))))
    return args


@torch.inference_mode()
def main() -> None:
    args = parse_args()
    if args.worker:
        torch.set_num_threads(args.threads)
        return work(args)
    with tempfile.TemporaryDirectory() as folder:
        counts = sorted({1, *args.ranks})
        found = {ranks: start(args, ranks, Path(folder)) for ranks in counts}
    rows = compare(found, CLOSE[args.dtype])
    print(table(rows, COLUMNS) + f"\n\n{machine()['card']}. {busy()}")
    mode = "" if args.parallel == "auto" else f"-{args.parallel}"
    name = f"scaling-{args.preset or Path(args.model).name}{mode}"
    print(write_results(name, command_line("scaling"), rows, args.device))


if __name__ == "__main__":
    main()
