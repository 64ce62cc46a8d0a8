"""What does each part of MixCache and UniCP buy on the embedded model, against simply taking fewer steps?

Every row is a caching method over the same prompts and seeds: multiply-adds saved, bytes held, PSNR and SSIM
of its frames against the uncached run. Beside it stands "fewer steps": the uncached sampler with as many
steps as those multiply-adds buy.

    python -m benchmarks.ablations [--group table2 ...] [--steps 50]
"""

import argparse
import sys
from dataclasses import replace
from functools import cache
from statistics import fmean, median

import numpy as np
import torch

from benchmarks.common import PROMPTS, table, write_results
from minidit.generate import Engine
from minidit.metrics import psnr, ssim
from minidit.settings import Choices, Settings

SINGLE = "penalty=false"  # the penalty would stop a single mode every second time
GROUPS = {
    "table2": {
        "hybrid, N 4": "mixcache:interval=4",
        "hybrid, acc": "mixcache",
        "hybrid, eff": "mixcache:eff",
        "hybrid, eff, no penalty": f"mixcache:eff:{SINGLE}",
        "step only, eff": f"mixcache:eff:levels=step,{SINGLE}",
        "cfg only, eff": f"mixcache:eff:levels=cfg,{SINGLE}",
        "block only, eff": f"mixcache:eff:levels=block,{SINGLE}",
        "hybrid, eff, uniform impact": "mixcache:eff:impact=uniform",
        "hybrid, eff, residual": "mixcache:eff:residual=true",
        "hybrid, eff, uncond runs too": "mixcache:eff:block_uncond=run",
    },
    "settled": {  # table 2 again, with warm-up until the profile's theta
        "hybrid, acc": "mixcache:theta=profile",
        "hybrid, eff": "mixcache:eff:theta=profile",
        "step only, eff": f"mixcache:eff:theta=profile,levels=step,{SINGLE}",
        "cfg only, eff": f"mixcache:eff:theta=profile,levels=cfg,{SINGLE}",
        "block only, eff": f"mixcache:eff:theta=profile,levels=block,{SINGLE}",
        "hybrid, eff + unicp E2": "mixcache:eff:theta=profile+unicp:threshold=E2",
        "hybrid, eff + unicp E3": "mixcache:eff:theta=profile+unicp:threshold=E3",
    },
    "table3": {
        "blocks 4": "mixcache:eff:blocks=4",
        "blocks 2, 6": "mixcache:eff:blocks=2/6",
        "blocks 2, 4, 6": "mixcache:eff:blocks=2/4/6",
        "blocks 1 to 6": "mixcache:eff:blocks=1/2/3/4/5/6",
    },
    "theta": {f"theta {t}": f"mixcache:eff:theta={t}" for t in (0.05, 0.075, 0.1, 0.15, 0.2, "profile")},
    "delta": {
        f"delta {a:g}, {b:g}": f"mixcache:eff:delta={a}/{b}"
        for a, b in ((0.02, 0.05), (0.05, 0.1), (0.1, 0.15), (0.15, 0.25), (0.3, 0.4))
    },
    "unicp": {
        **{f"E{n}": f"unicp:threshold=E{n}" for n in (1, 2, 3, 4, 5)},
        **{f"E{n}, windows only": f"unicp:threshold=E{n},slice=false" for n in (3, 5)},
        **{f"E{n}, literal window": f"unicp:threshold=E{n},window=literal" for n in (3, 5)},
    },
    "slices": {f"slice {r:g}": f"unicp:reuse=false,ratio={r}" for r in (0.1, 0.2, 0.3, 0.4)},
    "together": {
        "mixcache:eff + E2": "mixcache:eff+unicp:threshold=E2",
        "mixcache:eff + E3": "mixcache:eff+unicp:threshold=E3",
        "mixcache:eff + E5": "mixcache:eff+unicp:threshold=E5",
    },
}
COLUMNS = {
    "name": "method",
    "ratio": "fewer MACs",
    "cache_kib": "cache KiB",
    "psnr": "PSNR dB: mean (median, worst)",
    "ssim": "SSIM",
    "fewer_steps": "steps for as many MACs",
    "fewer_psnr": "their PSNR dB",
    "fewer_ssim": "their SSIM",
}


class Bench:
    """Runs of the embedded model, the uncached ones remembered."""

    def __init__(self, engine: Engine, prompts: tuple[str, ...], steps: int):
        self.engine, self.steps = engine, steps
        self.settings = [
            engine.resolve(p, Choices(steps=steps, seed=1000 * i)) for i, p in enumerate(prompts)
        ]
        self.text = [engine.encode(s) for s in self.settings]
        self.plain = cache(self.run_plain)

    def frames(self, settings: Settings, text) -> tuple[np.ndarray, dict]:
        outcome = self.engine.denoise(settings, text)
        return self.engine.decode(outcome.latents), self.engine.trace(settings, outcome)["total"]

    def run_plain(self, steps: int) -> list[np.ndarray]:
        pairs = zip(self.settings, self.text, strict=True)
        return [self.frames(replace(s, steps=steps), text)[0] for s, text in pairs]

    def quality(self, videos: list[np.ndarray]) -> dict[str, str]:
        """PSNR and SSIM against no caching: mean; of PSNR the median and the worst prompt too."""
        pairs = list(zip(videos, self.plain(self.steps), strict=True))
        db = [min(psnr(a, b), 99.0) for a, b in pairs]
        return {
            "psnr": f"{fmean(db):.1f} ({median(db):.1f}, {min(db):.1f})",
            "ssim": f"{fmean(ssim(a, b) for a, b in pairs):.4f}",
        }

    def row(self, name: str, spec: str) -> dict:
        """One method over all prompts, and fewer steps at the same cost."""
        videos, totals = [], []
        for settings, text in zip(self.settings, self.text, strict=True):
            frames, total = self.frames(replace(settings, cache=spec), text)
            videos.append(frames)
            totals.append(total)
        ratio = fmean(t["macs_full"] for t in totals) / fmean(t["macs"] for t in totals)
        fewer = max(1, round(self.steps / ratio))
        other = self.quality(self.plain(fewer)) if fewer < self.steps else {"psnr": "same", "ssim": "same"}
        return {
            "name": name,
            "spec": spec,
            "ratio": f"{ratio:.2f}x",
            "cache_kib": f"{totals[0]['cache_bytes'] / 1024:.0f}",
            **self.quality(videos),
            "fewer_steps": fewer,
            **{f"fewer_{key}": value for key, value in other.items()},
        }


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.ablations", description=__doc__.splitlines()[0])
    parser.add_argument("--group", nargs="*", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--profiles", help="folder of caching profiles, if not the model's own")
    args = parser.parse_args()
    torch.set_num_threads(1)
    engine = Engine("demo", device="cpu", keep_text_encoder=True, profiles=args.profiles)
    bench = Bench(engine, PROMPTS, args.steps)
    first = bench.frames(bench.settings[0], bench.text[0])[0]
    if not np.array_equal(first, bench.plain(args.steps)[0]):
        sys.exit("the uncached run is not repeatable; nothing below would mean anything")
    for group in args.group:
        rows = [bench.row(name, spec) for name, spec in GROUPS[group].items()]
        path = write_results(
            f"ablations-{group}-{args.steps}",
            f"python -m benchmarks.ablations --group {group} --steps {args.steps}",
            [{"model": engine.model_id, "prompts": len(PROMPTS), **row} for row in rows],
        )
        print(
            f"\n{group}, {args.steps} steps, {len(PROMPTS)} prompts ({path.name})\n\n{table(rows, COLUMNS)}",
            flush=True,
        )


if __name__ == "__main__":
    main()
