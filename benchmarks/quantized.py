"""What do eight-bit weights cost in quality? The embedded model against itself with full weights.

PSNR and SSIM of frames before encoding, same prompts and seeds; bytes of the transformer as it is held.

    python -m benchmarks.quantized [--steps 30] [--dtype fp32]
"""

import argparse
from statistics import fmean

import torch

from benchmarks.common import PROMPTS, command_line, machine, table, write_results
from minidit.generate import Engine
from minidit.metrics import psnr, ssim
from minidit.quantize import WEIGHTS

COLUMNS = {
    "weights": "weights",
    "transformer_mib": "transformer MiB",
    "psnr": "PSNR dB",
    "psnr_worst": "worst",
    "ssim": "SSIM",
}


def run(weights: str, args: argparse.Namespace) -> tuple[list, int]:
    """The frames of every prompt, and the bytes of the transformer."""
    engine = Engine("demo", device=args.device, dtype=args.dtype, weights=weights)
    videos = [
        engine.generate(prompt, seed=1000 * i, steps=args.steps).frames for i, prompt in enumerate(PROMPTS)
    ]
    return videos, sum(t.nbytes for t in engine.module("transformer").state_dict().values())


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.quantized", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows, plain = [], None
    for weights in WEIGHTS:
        videos, size = run(weights, args)
        plain = plain or videos
        row = {"weights": weights, "transformer_mib": round(size / 2**20, 2)}
        if weights != "full":
            pairs = list(zip(videos, plain, strict=True))
            found = [psnr(a, b) for a, b in pairs]
            row |= {"psnr": round(fmean(found), 1), "psnr_worst": round(min(found), 1)}
            row["ssim"] = round(fmean(ssim(a, b) for a, b in pairs), 4)
        rows.append(row)
    print(table(rows, COLUMNS) + f"\n\ndemo {args.dtype}, {args.steps} steps · {machine()['card']}")
    print(write_results(f"quantized-{args.dtype}", command_line("quantized"), rows, args.device))


if __name__ == "__main__":
    main()
