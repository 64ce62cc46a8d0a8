"""UniCP's Table II on Latte: what does reusing outputs (o) save, what attention maps (a), and what both?

    python -m benchmarks.unicp_maps [--model FOLDER] [--steps 50] [--threshold 0.025]

Without a model folder it runs on random weights. Multiply-adds, bytes and seconds then mean what they say,
and distances say nothing of quality; the threshold is the drift that half of what a row reuses stays below.
"""

import argparse
import time
from statistics import median

import torch

from benchmarks.common import table, write_results
from minidit.cache.calibrate import calibrate_unicp
from minidit.cache.macs import full_macs, plan_macs
from minidit.cache.policies.none import NoCache
from minidit.cache.policies.unicp import UniCP
from minidit.cache.profile import Announcer
from minidit.generate import Engine
from minidit.models.latte import Latte
from minidit.presets import LatteConfig, ScheduleConfig
from minidit.sampling import Forward, denoise, draw_noise
from minidit.schedules import make_table_schedule
from minidit.settings import Choices

SMALL = LatteConfig(width=144, mlp_width=576, heads=4, depth=8, text_width=64)
SIZE = (16, 16, 16)  # latent (T, H, W)
ROWS = {
    "o only": dict(slice=False),
    "a only": dict(slice=False, reuse=False, maps=True),
    "both": dict(slice=False, maps=True),
    "both, spatial queries and keys kept": dict(slice=False, maps=True, freeze=True),
    "both, sliced by 0.2": dict(maps=True, ratio=0.2),
}


def random_start(steps: int) -> tuple:
    """(forward, schedule, noise, guidance) of a small Latte with random weights."""
    generator = torch.Generator().manual_seed(0)
    model = Latte(SMALL).eval().requires_grad_(False)
    for name, p in model.named_parameters():
        scale = p[0].numel() ** -0.5 if p.ndim > 1 else 0.1
        p.copy_(torch.randn(p.shape, generator=generator) * scale * (2 if "qkv" in name else 1))
    text = list(torch.randn(2, 20, SMALL.text_width, generator=generator))
    context = model.prepare(text, SIZE, branches=("cond", "uncond"))
    schedule = make_table_schedule(ScheduleConfig("ddim", "leading", 1.0, "linear", "epsilon"), steps)
    return Forward(model, context, is_batched=False), schedule, draw_noise((1, 4, *SIZE), 0), 7.5


def model_start(folder: str, steps: int) -> tuple:
    engine = Engine(folder)
    settings = engine.resolve("a red circle moves left to right", Choices(steps=steps))
    forward = engine.forward(settings, engine.encode(settings))
    noise = draw_noise((1, *engine.latent_shape(settings)), 0).to(engine.device)
    return forward, engine.family.schedule(settings), noise, settings.guidance_scale


def measure(start: tuple, policy, tensors: dict, repeats: int = 3) -> dict:
    """MACs against a full run, MiB held, and the median of the seconds of a step loop."""
    forward, schedule, noise, guidance = start
    size, seconds = forward.context.grid, []
    latent = (size[0], *noise.shape[3:])
    table_at = lambda width: forward.model.macs(latent, forward.model.config.text_len, width)
    for _ in range(repeats):
        began = time.perf_counter()
        outcome = denoise(forward, schedule, noise, policy, guidance_scale=guidance, constants=tensors)
        seconds.append(time.perf_counter() - began)
    macs = sum(plan_macs(r.plan, forward.branches, table_at) for r in outcome.records)
    full = full_macs(forward.branches, table_at) * len(outcome.records)
    return {
        "macs": f"{full / macs:.3f}x fewer",
        "mib": f"{outcome.cache_bytes / 2**20:.1f}",
        "seconds": f"{median(seconds):.2f}",
        "latents": outcome.latents,
    }


def median_drift(data: dict, options: dict) -> float:
    """What half of the one-step drifts stay below, of outputs and of the maps over time that a row reuses."""
    tables = list(data["errors"].values()) if options.get("reuse", True) else []
    tables += [data["map_errors"]["t_attn"]] if options.get("maps") else []
    return median(row[0] for rows in tables for step in rows[:-1] for row in step)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.unicp_maps", description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a Latte or Open-Sora model folder")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--threshold", type=float)
    args = parser.parse_args()
    start = model_start(args.model, args.steps) if args.model else random_start(args.steps)

    def run_once(probe) -> None:
        policy = Announcer(probe, 0)
        forward = Forward(
            *(getattr(start[0], name) for name in ("model", "context", "is_batched")), probe=probe
        )
        denoise(forward, start[1], start[2], policy, guidance_scale=start[3])

    data, tensors = calibrate_unicp(run_once)
    plain = measure(start, NoCache(), {})
    rows = [{"what": "nothing", **plain, "distance": "0"}]
    for what, options in ROWS.items():
        threshold = args.threshold or (0.025 if args.model else median_drift(data, options))
        row = measure(start, UniCP(threshold=threshold, profile=data, **options), tensors)
        row["threshold"] = f"{threshold:.3f}"
        distance = (row["latents"] - plain["latents"]).abs().sum() / plain["latents"].abs().sum()
        rows.append({"what": what, **row, "distance": f"{distance:.4f}"})
    rows = [{k: v for k, v in row.items() if k != "latents"} for row in rows]
    columns = {
        "what": "reused",
        "threshold": "threshold",
        "macs": "MACs",
        "mib": "MiB",
        "seconds": "s",
        "distance": "relative L1",
    }
    print(table(rows, columns))
    note = f"{args.model}" if args.model else "random weights: what it costs, not what it looks like"
    print(f"{note}; {args.steps} steps")
    command = f"python -m benchmarks.unicp_maps --steps {args.steps}"
    write_results("unicp_maps", command, [{"weights": note, **row} for row in rows])


if __name__ == "__main__":
    main()
