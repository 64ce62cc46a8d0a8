"""How do all caching methods compare on the embedded model, at their own settings and at equal cost?

Every method over the same prompts and seeds against the uncached run: as its paper sets it, then with its
main knob tuned to half, and to 0.35, of the uncached multiply-adds (on prompts that no row uses). Beside
every row stands "fewer steps": the uncached sampler with as many steps as those multiply-adds buy.

    python -m benchmarks.headline [--steps 50] [--folder FOLDER]     # what lies in FOLDER is not made again
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import command_line, machine, table, write_results
from minidit.compare import Row, compare, open_bench
from minidit.settings import Choices

METHODS = (
    "planned",
    "planned+unicp",
    "mixcache:theta=profile",
    "mixcache:eff:theta=profile",
    "mixcache:eff:theta=profile+unicp",
    "mixcache:eff",
    "mixcache:eff+unicp",
    "unicp",
    "teacache",
    "magcache",
    "easycache",
    "adacache",
    "abcache",
    "cfg-gating",
    "blockdance",
    "delta-dit",
    "fbcache",
    "dbcache",
    "fora",
    "pab",
    "taylorseer",
    "taylorseer:lite",
    "ditfastattn",
    "fastercache",
    "toca",
    "duca",
)
COLUMNS = {
    "method": "method",
    "constants": "constants",
    "ratio": "fewer MACs",
    "psnr": "PSNR dB: mean (median, worst)",
    "ssim": "SSIM",
    "fewer": "fewer steps: n",
    "fewer_psnr": "PSNR dB",
    "note": "note",
}


def line(row: Row, plain: Row) -> dict[str, Any]:
    """One row of the table, as text; without its numbers where it was refused."""
    if row.error:
        return {"method": row.spec, "note": row.error}
    full, mine, psnr = plain.spread("macs")["mean"], row.spread("macs")["mean"], row.spread("psnr")
    rival = row.rival.spread("psnr") if row.rival else None
    show = lambda s: f"{s['mean']:.1f} ({s['median']:.1f}, {s['worst']:.1f})"
    return {
        "method": row.spec,
        "constants": row.videos[0].constants,
        "ratio": f"{full / mine:.2f}x",
        "psnr": show(psnr),
        "ssim": f"{row.spread('ssim')['mean']:.4f}",
        "fewer": row.rival.steps if row.rival else row.steps,
        "fewer_psnr": show(rival) if rival else "",
        "note": row.note,
        "macs_share": mine / full,
        "psnr_spread": psnr,
        "fewer_spread": rival,
    }


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.headline", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--folder", type=Path, help="where videos are kept between calls")
    parser.add_argument("--match", type=float, nargs="*", default=[0.5, 0.35], metavar="SHARE")
    parser.add_argument("--own", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        for share in [None] * args.own + args.match:
            bench = open_bench(
                "demo", Choices(steps=args.steps), args.folder or Path(scratch), prompts=(), tune_prompts=(),
                seeds=1, engine_options={}, say=lambda text: print(text, flush=True),
            )  # fmt: skip
            rows = compare(bench, METHODS, macs=share)
            best = lambda row: -row.spread("psnr")["mean"] if row.videos else 0.0
            lines = [line(row, rows[0]) for row in sorted(rows[1:], key=best)]
            print(table(lines, COLUMNS))
            name = "own" if share is None else f"{share:g}"
            write_results(f"headline-{args.steps}-{name}", command_line("headline"), lines)
    print(machine())


if __name__ == "__main__":
    main()
