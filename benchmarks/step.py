"""How long is one guided denoising step, against diffusers on the same weights, and what the device can do?

minidit and diffusers predict the same step from the same weights, latents and text, with the same threads, in
turns; first their outputs are compared. diffusers runs branch by branch, as its Wan pipeline does, and as one
batch, and the better of the two is the baseline. minidit's text keys and values are computed before, once per
generation, which is exact; diffusers computes them at every step. The solver, which touches a few MB, is left
out on both sides.

    python -m benchmarks.step --device cpu                       # the embedded model, in fp32 and in bf16
    python -m benchmarks.step --preset wan2.1-t2v-14b --size 832x480 [--compile] [--depth 2]
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.common import busy, command_line, machine, write_results
from benchmarks.library import compile_blocks, make_library, why_not
from benchmarks.models import Subject, find_subject
from benchmarks.timing import Times, alternate, matmul_ceiling
from minidit.compiled import CompiledBlock
from minidit.flags import size as parse_size
from minidit.presets import PRESETS
from minidit.settings import BATCHED_TOKENS, DTYPES

# Relative L2 of guided outputs, whose difference of two branches guidance multiplies: order of sums in fp32
# (measured 2e-6), in bf16 and fp16 rounding of h and of modulation, which diffusers does at other places
TOLERANCES = {"fp32": 1e-4, "bf16": 0.1, "fp16": 0.02}
BACKENDS = (  # in this order of preference, where torch's own takes an older one
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
)
Runs = dict[str, Callable[[], Tensor]]


def our_runs(subject: Subject, compiled: bool) -> Runs:
    """Ways to run the step: as generate chooses, and batched and sequential where both are sensible."""
    forward = subject.forward()
    runs = {"minidit": partial(subject.step, forward)}
    if compiled:
        runs["minidit, compiled"] = partial(subject.step, replace(forward, block_fn=CompiledBlock()))
    return runs


def their_runs(subject: Subject, dtype: torch.dtype, compiled: bool) -> Runs:
    """diffusers' ways; on a GPU also with cuDNN's attention first, which torch does not prefer by itself."""
    kinds = {"diffusers": make_library(subject, dtype)}
    if compiled:
        kinds["diffusers, compiled"] = make_library(subject, dtype)
        compile_blocks(kinds["diffusers, compiled"].module)
    ways = {"": False}
    if len(subject.branches) > 1 and (subject.tokens <= BATCHED_TOKENS or subject.name != "demo"):
        ways[", batched"] = True
    runs = {
        name + way: partial(library.step, subject, is_batched=is_batched)
        for name, library in kinds.items()
        for way, is_batched in ways.items()
    }
    if subject.device.startswith("cuda"):
        runs["diffusers, cudnn first"] = partial(with_cudnn, runs["diffusers"])
    return runs


def with_cudnn(run: Callable[[], Tensor]) -> Tensor:
    with sdpa_kernel(list(BACKENDS), set_priority=True):
        return run()


def distance(got: Tensor, want: Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()


def compare(runs: Runs, tolerance: float) -> dict[str, float]:
    """Relative L2 of every output from the first one's; raises where one is too far. Warms all of them up."""
    outputs = {name: run() for name, run in runs.items()}
    want = next(iter(outputs.values()))
    distances = {name: distance(out, want) for name, out in outputs.items()}
    for name, d in distances.items():
        if not d < tolerance:
            raise SystemExit(f"{name} differs by {d:.2e}, wanted below {tolerance}; nothing was timed")
    return distances


def measure(subject: Subject, dtype: str, n: int, compiled: bool, ceiling: float) -> list[dict[str, Any]]:
    """One row per way to run the step."""
    runs = our_runs(subject, compiled)
    lacking = why_not(subject)
    runs |= {} if lacking else their_runs(subject, DTYPES[dtype], compiled)
    distances = compare(runs, TOLERANCES[dtype])
    times = alternate(runs, subject.device, n)
    about = {"model": subject.name, "video": "x".join(map(str, subject.video)), "dtype": dtype, "n": n}
    rows = [
        about | {"way": name} | numbers(t, subject.macs, ceiling) | {"rel_l2": round(distances[name], 7)}
        for name, t in times.items()
    ]
    return rows + ([about | {"way": "diffusers", "missing": lacking}] if lacking else [])


def numbers(times: Times, macs: int, ceiling: float) -> dict[str, float]:
    """Seconds, and what they are worth: multiply-adds of the blocks, twice, over the matmul ceiling."""
    flops = 2 * macs / times.median
    return {
        "step_s": round(times.median, 5),
        "spread_s": round(times.spread, 5),
        "best_s": round(times.best, 5),
        "tflops": round(flops / 1e12, 3),
        "matmul_tflops": round(ceiling / 1e12, 3),
        "share_of_matmul": round(flops / ceiling, 3),
    }


def say(row: dict[str, Any]) -> str:
    if "missing" in row:
        return f"{row['model']} {row['dtype']} · {row['way']}: {row['missing']}"
    return (
        f"{row['model']} {row['video']} {row['dtype']} · {row['way']}: {row['step_s']:.4g} s per guided step "
        f"± {row['spread_s']:.2g} (n={row['n']}, best {row['best_s']:.4g}) · {row['tflops']:.3g} TFLOP/s, "
        f"{row['share_of_matmul']:.0%} of a matrix product · rel L2 {row['rel_l2']:.1e}"
    )


def ratios(rows: list[dict[str, Any]]) -> list[str]:
    """How many times as fast as diffusers' best way: eager against eager, compiled against compiled."""
    found = []
    for kind in ("", ", compiled"):
        ours = [r for r in rows if r["way"] == f"minidit{kind}"]
        theirs = [
            r
            for r in rows
            if r["way"].startswith("diffusers")
            and "missing" not in r
            and (", compiled" in r["way"]) == bool(kind)
        ]
        if ours and theirs:
            best = min(theirs, key=lambda r: r["step_s"])
            ratio = best["step_s"] / ours[0]["step_s"]
            by_best = min(r["best_s"] for r in theirs) / ours[0]["best_s"]
            found.append(
                f"{best['dtype']}: minidit{kind} is {ratio:.2f} times as fast as {best['way']} (medians; "
                f"{by_best:.2f} by the best runs)"
            )
    return found


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.step", description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=["demo", *PRESETS], default="demo")
    parser.add_argument("--size", type=parse_size, default=(None, None), help="WxH; the release's own")
    parser.add_argument("--num-frames", type=int)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="demo on a CPU: fp32, then bf16; else bf16")
    parser.add_argument("--depth", type=int, help="fewer blocks, for a quick look")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1, help="of a CPU (1)")
    parser.add_argument("--compile", action="store_true", help="both compiled too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    on_cpu = args.device == "cpu"
    dtypes = [args.dtype] if args.dtype else (["fp32", "bf16"] if on_cpu else ["bf16"])
    rows, summary = [], []
    for dtype in dtypes:
        ceiling = matmul_ceiling(args.device, DTYPES[dtype])
        subject = find_subject(args.preset, (*args.size, args.num_frames), args.device, dtype, args.depth)
        found = measure(subject, dtype, args.runs, args.compile, ceiling)
        rows += found
        summary += ratios(found)
        print("\n".join(say(row) for row in found), flush=True)
    about = machine()
    print("\n".join(summary) + f"\n{about['card']}, torch {about['torch']}. {busy()}")
    path = write_results(f"step-{args.preset}", command_line("step"), rows, args.device)
    print(path)


if __name__ == "__main__":
    sys.exit(main())
