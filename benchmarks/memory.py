"""How much memory does each stage take at most, beside what `inspect` predicts and the store announced?

Every stage is a process of its own. On a GPU: what torch's allocator held at most. On a CPU: how far the
resident set rose above that of a process with the libraries loaded, weights included (Linux alone says so);
pages of code that run for the first time count there too, some 10 to 20 MiB. The yardstick is the prediction:
weights and activations of the stage, and the bytes of the cache's rings.

    python -m benchmarks.memory [--model demo] [--device cpu]
    python -m benchmarks.memory --model wan2.1-t2v-14b --size 832x480    # random weights; no text stage
    python -m benchmarks.memory --model wan2.1-t2v-1.3b --size 832x480 --tiled
"""

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import PROMPTS, command_line, machine, table, write_results
from benchmarks.models import find_subject, random_model, with_depth
from minidit.cache.policies.mixcache import MixCache
from minidit.components import part_dtype
from minidit.costs import find_parts, footprint
from minidit.families import find_family
from minidit.flags import size as parse_size
from minidit.generate import Engine
from minidit.inspection import settings_of
from minidit.memory import keep_large_off_heap
from minidit.presets import PRESETS, ScheduleConfig
from minidit.sampling import denoise
from minidit.schedules import make_schedule
from minidit.settings import DTYPES, Choices

STAGES = ("text", "transformer", "transformer with a cache", "vae")
COLUMNS = {
    "stage": "stage",
    "peak_mib": "peak MiB",
    "weights_mib": "weights, predicted",
    "activations_mib": "activations, predicted",
    "text_mib": "text keys and values",
    "cache_mib": "cache, announced",
    "peak_over_prediction": "peak / prediction",
}
MIB = 2**20


class Peak:
    """The most memory in use since the last reset(), above what was in use when this was made."""

    def __init__(self, device: str):
        self.device = device
        on_gpu = device.startswith("cuda")
        self.before = torch.cuda.memory_allocated() if on_gpu else status_bytes("VmRSS")

    def reset(self) -> None:
        """Forget earlier peaks: making random weights takes more than having them."""
        if self.device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark becomes what is in use now

    def read(self) -> int:
        if self.device.startswith("cuda"):
            return torch.cuda.max_memory_allocated() - self.before
        return status_bytes("VmHWM") - self.before


def status_bytes(name: str) -> int:
    """A line of /proc/self/status, which counts in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


def run_stage(stage: str, args: argparse.Namespace) -> dict[str, int]:
    """Load what the stage needs and run it -> bytes at its peak, and what its store announced."""
    keep_large_off_heap()  # as a run does
    torch.ones(64, 64, device=args.device) @ torch.ones(64, 64, device=args.device)  # loads the libraries
    peak = Peak(args.device)
    if stage == "text":
        encode(args, peak)
        return {"peak": peak.read(), "cache": 0}
    if stage == "vae":
        decode(args, peak)
        return {"peak": peak.read(), "cache": 0}
    cache_bytes = step(args, peak, has_cache=stage != "transformer")
    return {"peak": peak.read(), "cache": cache_bytes}


def encode(args: argparse.Namespace, peak: Peak) -> None:
    engine = Engine(args.model, device=args.device, dtype=args.dtype)
    settings = engine.resolve(PROMPTS[0], Choices())
    engine.module("text_encoder")
    peak.reset()
    engine.encode(settings)


def step(args: argparse.Namespace, peak: Peak, has_cache: bool) -> int:
    """A step, or under MixCache six, of every kind -> the bytes of its rings"""
    video = (*args.size, args.num_frames)
    subject = find_subject(args.model, video, args.device, args.dtype, args.depth)
    peak.reset()
    forward = subject.forward()
    if not has_cache:
        subject.step(forward)
        return 0
    policy, schedule = MixCache(impact="uniform", theta=float("inf")), make_schedule(ScheduleConfig(), 6)
    return denoise(forward, schedule, subject.x, policy, guidance_scale=subject.scale).cache_bytes


def decode(args: argparse.Namespace, peak: Peak) -> None:
    """The autoencoder with random weights: what it decodes does not matter here."""
    parts, size = find_parts(args.model), video_size(args)
    family = find_family(parts.family, {name: config for name, (_, config) in parts.components.items()})
    class_name, config = parts.components[family.decoder(family.latent_shape(*size)[1])]
    dtype = part_dtype(class_name, DTYPES[args.dtype])
    vae = random_model(config, class_name, args.device, dtype)
    latents = torch.zeros(1, *family.latent_shape(*size), device=args.device)
    peak.reset()
    for piece in vae.decode_stream(latents, **({"tiled": True} if args.tiled else {})):
        piece.cpu()


def video_size(args: argparse.Namespace) -> tuple[int, int, int]:
    d = find_parts(args.model).defaults
    given = (*args.size, args.num_frames)
    return tuple(g or own for g, own in zip(given, (d.width, d.height, d.num_frames), strict=True))


def in_a_process(stage: str) -> dict[str, int]:
    """run_stage in a new process, with this one's arguments."""
    command = [sys.executable, "-m", "benchmarks.memory", *sys.argv[1:], "--stage", stage]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def row_of(stage: str, found: dict[str, int], args: argparse.Namespace) -> dict[str, Any]:
    """Beside the prediction, which is of as many blocks as were run."""
    parts = find_parts(args.model)
    class_name, config = parts.components["transformer"]
    shallow = {"transformer": (class_name, with_depth(config, args.depth or config.depth))}
    parts = replace(parts, components=parts.components | shallow)
    given = dict(zip(("width", "height", "num_frames"), video_size(args), strict=True))
    given |= dict(dtype=args.dtype, device=args.device, weights="full", tiled=args.tiled)
    stages = footprint(parts, settings_of(parts, args.model, given)).stages("parts")
    name = {"text": "text", "vae": "decode"}.get(stage, "denoise")
    (predicted,) = (each for each in stages if each.name == name)
    mib = lambda n: round(n / MIB, 1)
    return {
        "stage": stage,
        "peak_mib": mib(found["peak"]),
        "weights_mib": mib(predicted.weights),
        "activations_mib": mib(predicted.activations),
        "text_mib": mib(predicted.text),
        "cache_mib": round(found["cache"] / MIB, 2),
        "peak_over_prediction": round(found["peak"] / (predicted.total + found["cache"]), 2),
    }


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.memory", description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=["demo", *PRESETS], default="demo")
    parser.add_argument("--size", type=parse_size, default=(None, None))
    parser.add_argument("--num-frames", type=int)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES)
    parser.add_argument("--depth", type=int, help="fewer blocks, of a preset")
    parser.add_argument("--tiled", action="store_true", help="decode tile by tile")
    parser.add_argument("--stage", choices=STAGES, help="run this one here and print its bytes")
    args = parser.parse_args()
    args.dtype = args.dtype or ("fp32" if args.device == "cpu" else "bf16")
    torch.set_num_threads(1)
    if args.stage:
        print(json.dumps(run_stage(args.stage, args)))
        return
    stages = STAGES if args.model == "demo" else STAGES[1:]
    rows = [row_of(stage, in_a_process(stage), args) for stage in stages]
    print(table(rows, COLUMNS) + f"\n\n{args.model} {args.dtype} · {machine()['card']}")
    name = f"memory-{args.model}{'-tiled' if args.tiled else ''}"
    print(write_results(name, command_line("memory"), rows, args.device))


if __name__ == "__main__":
    main()
