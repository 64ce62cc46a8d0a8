"""How long is one guided denoising step at a real size, and how near is it to what the card can do?

Random weights in a release's shape. The model's output at a small size is first compared with the same
weights in fp32; then one branch of a step is timed, beside a large matrix product in the same run.

    python -m benchmarks.step --preset wan2.1-t2v-1.3b --size 832x480 --num-frames 81 [--device cpu --depth 2]
"""

import argparse
import statistics
import sys
import time
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.common import machine, write_results
from minidit.families import find_family
from minidit.generate import find_class
from minidit.presets import HunyuanVideoConfig, find_preset
from minidit.settings import DTYPES
from minidit.weights import is_fp32

TOLERANCE = 0.05  # relative, of bf16 products through every block


def random_model(config, class_name: str, device: str, dtype: torch.dtype):
    """A transformer with random weights of sensible size, in the dtypes it would be loaded in."""
    with torch.device("meta"):
        model = find_class(class_name)(config)
    model = model.to_empty(device=device).requires_grad_(False).eval()
    draw = torch.Generator(device).manual_seed(0)
    for name, p in model.named_parameters():
        fan_in = p.shape[-1] if p.ndim > 1 else 1
        bound = (3 / fan_in) ** 0.5 if p.ndim > 1 else 0.1
        value = torch.empty(p.shape, device=device).uniform_(-bound, bound, generator=draw)
        is_gain = p.ndim == 1 and name.endswith("weight")
        p.data = (1 + value if is_gain else value).to(
            torch.float32 if is_fp32(name, model.keep_fp32) else dtype
        )
    return model


def wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def seconds(run, device: str, n: int) -> list[float]:
    """Seconds of n runs after one to warm up."""
    run()
    times = []
    for _ in range(n):
        wait(device)
        started = time.perf_counter()
        run()
        wait(device)
        times.append(time.perf_counter() - started)
    return times


def matmul_ceiling(device: str, dtype: torch.dtype, n: int) -> float:
    """FLOP/s of an n x n product of random numbers."""
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / statistics.median(seconds(lambda: a @ b, device, 10))


def forward_of(model, latent: tuple[int, ...], device: str):
    """A call that predicts one branch of random latents."""
    draw, config = torch.Generator(device).manual_seed(1), model.config
    normal = lambda *shape: torch.randn(*shape, device=device, generator=draw)
    x = normal(1, *latent)
    if isinstance(config, HunyuanVideoConfig):
        text = normal(config.text_len, config.text_width), normal(config.pooled_width)
        context = model.prepare([text], latent[1:], guidance=4.0)  # 4000 is a number in bf16 too
    else:
        context = model.prepare([normal(60, config.text_width)], latent[1:])
    return lambda: model(x, torch.full((1,), 700.0, device=device), context)


def check(model, exact, channels: int, device: str) -> float:
    """Relative error of the timed model against fp32 on the same weights, at a small size."""
    latent = (channels, 3, 8, 8)
    got, want = (forward_of(m, latent, device)() for m in (model, exact))
    return ((got - want).norm() / want.norm()).item()


def with_depth(config, depth: int):
    """The config with that many blocks, of HunyuanVideo's two kinds in its own proportion."""
    if isinstance(config, HunyuanVideoConfig):
        double = max(1, round(depth * config.double / config.depth))
        return replace(config, double=double, single=depth - double)
    return replace(config, depth=depth)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.step", description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="wan2.1-t2v-1.3b")
    parser.add_argument("--size", default="832x480")
    parser.add_argument("--num-frames", type=int, default=81)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bf16", choices=DTYPES)
    parser.add_argument("--depth", type=int, help="fewer blocks, for a quick look")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--matmul", type=int, default=8192, help="side of the product that sets the ceiling")
    args = parser.parse_args()
    preset, dtype = find_preset(args.preset), DTYPES[args.dtype]
    class_name, config = preset.components["transformer"]
    config = with_depth(config, args.depth or config.depth)
    family = find_family(preset.family, {"transformer": config, "vae": preset.components["vae"][1]})
    width, height = map(int, args.size.split("x"))
    latent = family.latent_shape(width, height, args.num_frames)

    shallow = with_depth(config, 2)
    model = random_model(shallow, class_name, args.device, dtype)
    exact = random_model(shallow, class_name, args.device, dtype).float()
    error = check(model, exact, latent[0], args.device)
    if not error < TOLERANCE:
        sys.exit(
            f"{args.dtype} differs from fp32 by {error:.3f}, wanted below {TOLERANCE}; nothing was timed"
        )
    del model, exact
    model = random_model(config, class_name, args.device, dtype)
    run: Tensor = forward_of(model, latent, args.device)
    times = seconds(run, args.device, args.runs)
    ceiling = matmul_ceiling(args.device, dtype, args.matmul)
    flops = 2 * sum(model.macs(latent[1:], family.text_len).values())
    median, d = statistics.median(times), preset.defaults
    branches = len(family.branches(d.true_cfg or d.guidance_scale))
    peak = torch.cuda.max_memory_allocated() / 2**30 if args.device.startswith("cuda") else None
    row = {
        "preset": args.preset,
        "size": f"{args.size}x{args.num_frames}",
        "depth": config.depth,
        "dtype": args.dtype,
        "forward_s": round(median, 4),
        "spread_s": round(max(times) - min(times), 4),
        "guided_step_s": round(branches * median, 4),
        "tflops": round(flops / median / 1e12, 2),
        "matmul_tflops": round(ceiling / 1e12, 2),
        "share_of_matmul": round(flops / median / ceiling, 3),
        "error_vs_fp32": round(error, 5),
        "peak_gib": peak and round(peak, 2),
    }
    about = machine()
    print(
        f"{row['preset']} {row['size']} {row['dtype']} depth {row['depth']} · "
        f"{row['forward_s']} s per forward ± {row['spread_s']} (n={args.runs}), "
        f"{row['guided_step_s']} s per guided step · {row['tflops']} TFLOP/s "
        f"({row['share_of_matmul']:.0%} of the measured matrix product) · "
        f"rel L2 {row['error_vs_fp32']} · {about['card']}, torch {about['torch']}"
    )
    write_results(
        f"step-{args.preset}-{args.device.split(':')[0]}",
        f"python -m benchmarks.step {' '.join(sys.argv[1:])}",
        [row],
    )


if __name__ == "__main__":
    main()
