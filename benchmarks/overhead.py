"""How much of a step is not model maths under --cache mixcache?

A wide Wan with random weights denoises a few steps under `none` and under mixcache (uniform impact, every
second step cached), every call of a part timed. Maths is embed, blocks and head; measurement is distances,
copies of what is kept, the read-back and the check for finite values; host is the policy and all the rest:
loop, recorder, records. Solver and guidance are a pipeline's own, cached or not, and stand apart.

    python -m benchmarks.overhead [--width 1280] [--threads 1]
"""

import argparse
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.common import table, write_results
from minidit import sampling
from minidit.cache import measure
from minidit.cache.measure import Measurements
from minidit.cache.policies.mixcache import MixCache
from minidit.cache.policies.none import NoCache
from minidit.cache.seam import run_block
from minidit.cache.store import Ring, Store
from minidit.models.wan import Head, Wan
from minidit.presets import ScheduleConfig, WanConfig
from minidit.sampling import Forward, Record, draw_noise
from minidit.schedules import Schedule, make_schedule

SIZE = (4, 16, 16)  # latent (T, H, W): 256 tokens
STEPS, WARM_UP = 8, 2  # the first steps, which touch memory for the first time, are not counted
PARTS = ("maths", "distances", "keeps", "read-back", "loads", "solver", "policy")
TIMES = ("total", *PARTS, "rest")
COLUMNS = {
    "step": "median step, in ms",
    "steps": "n",
    **{f"{part}_ms": part for part in TIMES},
    "measurement": "measurement",
    "host": "host",
    "outside": "all but maths, of a full step",
}


class Clock:
    """Seconds by part since the last lap."""

    def __init__(self):
        self.seconds: dict[str, float] = defaultdict(float)

    def timed(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args, **options):
            started = time.perf_counter()
            try:
                return call(*args, **options)
            finally:
                self.seconds[part] += time.perf_counter() - started

        return wrapped

    def lap(self) -> dict[str, float]:
        seconds, self.seconds = self.seconds, defaultdict(float)
        return {part: seconds[part] for part in PARTS}


def build(width: int, depth: int) -> tuple[Forward, Schedule, Tensor]:
    """A random model of that width, with two guidance branches, and its noise."""
    torch.manual_seed(0)
    config = WanConfig(width, 4 * width, width // 64, depth, text_width=64, text_len=64)
    model = Wan(config).eval().requires_grad_(False)
    with torch.inference_mode():
        context = model.prepare([torch.randn(n, 64) for n in (20, 1)], SIZE, branches=("cond", "uncond"))
    forward = Forward(model, context, is_batched=True)
    return forward, make_schedule(ScheduleConfig(), STEPS), draw_noise((1, config.channels, *SIZE), 0)


def run(forward: Forward, schedule: Schedule, noise: Tensor, policy) -> tuple[list[dict], list[Tensor]]:
    """Denoise under a policy -> seconds by part of every step, and the latents after it."""
    clock, rows, latents = Clock(), [], []

    def look(record: Record, x: Tensor) -> None:
        parts = clock.lap()
        rest = record.seconds - sum(parts.values())
        rows.append({"label": record.plan.label, "total": record.seconds, **parts, "rest": rest})
        latents.append(x)

    calls = [
        ("maths", Wan, "embed"),
        ("maths", Head, "forward"),
        ("distances", measure, "distance_sums"),
        ("keeps", Ring, "push"),
        ("read-back", Measurements, "read"),
        ("loads", Store, "mix"),
        ("solver", sampling, "guide"),
        ("solver", Schedule, "step"),
        ("policy", policy, "plan"),
        ("policy", policy, "tell"),
    ]
    timed = Forward(forward.model, forward.context, True, block_fn=clock.timed("maths", run_block))
    with ExitStack() as stack:
        for part, owner, name in calls:
            stack.enter_context(patch.object(owner, name, clock.timed(part, getattr(owner, name))))
        sampling.denoise(timed, schedule, noise, policy, guidance_scale=5.0, on_step=look)
    return rows, latents


def row(name: str, steps: list[dict], full: float) -> dict:
    """Medians over steps in ms, and what is not maths as a share of a full step of `full` seconds."""
    share = lambda of: f"{median(of(step) for step in steps) / full:.3%}"
    return {
        "step": name,
        "steps": len(steps),
        **{f"{part}_ms": round(1000 * median(step[part] for step in steps), 2) for part in TIMES},
        "measurement": share(lambda step: step["distances"] + step["keeps"] + step["read-back"]),
        "host": share(lambda step: step["policy"] + step["rest"]),
        "outside": share(lambda step: step["total"] - step["maths"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.overhead", description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    forward, schedule, noise = build(args.width, args.depth)
    plain, plain_latents = run(forward, schedule, noise, NoCache())
    policy = MixCache(impact="uniform", theta=float("inf"), interval=2)
    cached, latents = run(forward, schedule, noise, policy)
    if not all(torch.equal(a, b) for a, b in zip(plain_latents[:2], latents[:2], strict=True)):
        sys.exit("full steps under mixcache differ from uncached ones; nothing below would mean anything")
    kinds = {
        "none": plain[WARM_UP:],
        "mixcache, full": [step for step in cached[WARM_UP:] if step["label"] == "full"],
        "mixcache, cached": [step for step in cached[WARM_UP:] if step["label"] != "full"],
    }
    full = median(step["total"] for step in kinds["mixcache, full"])
    rows = [row(name, steps, full) for name, steps in kinds.items()]
    about = {"width": args.width, "depth": args.depth, "tokens": SIZE[0] * SIZE[1] * SIZE[2] // 4}
    path = write_results(
        "overhead",
        f"python -m benchmarks.overhead --width {args.width} --depth {args.depth} --threads {args.threads}",
        [about | {"branches": 2, "dtype": "fp32", **r} for r in rows],
    )
    print(f"{about}, fp32, {args.threads} threads ({path.name})\n\n{table(rows, COLUMNS)}")
    if full < 1:
        sys.exit(
            f"a full step took {full:.2f} s; the question is about steps of over 1 s: take a larger --width"
        )


if __name__ == "__main__":
    main()
