"""How much of a step is new? Relative L1 of step, cfg and every block of the embedded model, 30 and 50 steps.

Mean of several prompts, without any cache. A row compares a step with the step before it:

    step        the guided prediction            step cond   the prediction of the cond branch
    cfg         uncond against cond, same step   block k     h after block k, cond branch
    attn k      the output of block k's self-attention, before its gate, cond branch

    python -m benchmarks.demo_model.redundancy [--model FOLDER] [--prompts N] [--json FILE]
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.demo_model.check import prompt_for
from benchmarks.demo_model.data import held_out
from minidit.cache.seam import BlockCache
from minidit.generate import Engine
from minidit.models.wan import Context, Wan
from minidit.presets import ScheduleConfig
from minidit.sampling import draw_noise
from minidit.schedules import make_schedule
from minidit.settings import Choices

STEPS = (30, 50)
SHOWN = {30: (1, 2, 4, 6, 10, 15, 20, 25, 27, 28, 29), 50: (1, 2, 4, 6, 10, 20, 30, 40, 46, 48, 49)}


class KeepOutputs(BlockCache):
    """Runs everything and keeps what came out of each sub-module."""

    def __init__(self):
        super().__init__()
        self.kept: dict[str, Tensor] = {}

    def run(self, name: str, module: Callable[..., Tensor], *inputs: Any) -> Tensor:
        self.kept[name] = module(*inputs)
        return self.kept[name]


def relative_l1(new: Tensor, old: Tensor) -> float:
    return ((new - old).abs().mean() / old.abs().mean()).item()


def step_values(model: Wan, x: Tensor, t: float, context: Context, guidance: float) -> dict[str, Tensor]:
    """One step with both branches as a batch. x (1, C, T, H, W) -> every value that the table compares"""
    h, cond = model.embed(x.expand(2, -1, -1, -1, -1), torch.full((2,), t), context)
    values = {}
    for k, block in enumerate(model.blocks):
        cache = KeepOutputs()
        h = block(h, cond.at(k), cache)
        values[f"block {k}"], values[f"attn {k}"] = h[0], cache.kept["attn"][0]
    values["step cond"], values["uncond"] = model.head(h, cond)
    values["step"] = values["uncond"] + guidance * (values["step cond"] - values["uncond"])
    return values


@torch.inference_mode()
def redundancy(engine: Engine, prompt: str, steps: int) -> dict[str, list[float]]:
    """Row name -> distances of steps 1 .. steps - 1 to the step before; cfg counts from step 0."""
    settings = engine.resolve(prompt, Choices(steps=steps))
    model, text = engine.module("transformer"), engine.encode(settings)
    shape = engine.latent_shape(settings)  # (C, T, H, W)
    context = model.prepare(text, shape[1:], branches=("cond", "uncond"))
    schedule = make_schedule(ScheduleConfig(settings.solver, settings.sigma_grid, settings.flow_shift), steps)
    x, state = draw_noise((1, *shape), settings.seed), schedule.start()
    rows, old = {}, {}
    for step in schedule.steps(settings.guidance_scale):
        values = step_values(model, x, step.t, context, step.guidance)
        uncond = values.pop("uncond")
        rows.setdefault("cfg", []).append(relative_l1(uncond, values["step cond"]))
        for name in old:
            rows.setdefault(name, []).append(relative_l1(values[name], old[name]))
        x, state = schedule.step(step.i, x, values["step"][None], state)
        old = values
    return rows


def mean_rows(runs: list[dict[str, list[float]]]) -> dict[str, list[float]]:
    return {name: torch.tensor([run[name] for run in runs]).mean(0).tolist() for name in runs[0]}


def table(rows: dict[str, list[float]], steps: int) -> str:
    """Markdown, some of the steps: step first, then cfg, then the blocks."""
    depth = sum(name.startswith("block") for name in rows)
    names = ["step", "step cond", "cfg", *(f"{kind} {k}" for kind in ("block", "attn") for k in range(depth))]
    shown = SHOWN[steps]
    lines = [f"| step of {steps} | " + " | ".join(map(str, shown)) + " |", "|---" * (len(shown) + 1) + "|"]
    for name in names:
        first = 0 if name == "cfg" else 1  # the step that the row's first entry belongs to
        cells = (f"{rows[name][i - first]:.3f}".lstrip("0") for i in shown)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(args: argparse.Namespace) -> None:
    engine = Engine(args.model, keep_text_encoder=True)
    prompts = [prompt_for(combo, i) for i, combo in enumerate(held_out()[:: len(held_out()) // args.prompts])]
    result = {"model_id": engine.model_id, "prompts": prompts[: args.prompts], "rows": {}}
    for steps in STEPS:
        rows = mean_rows([redundancy(engine, prompt, steps) for prompt in result["prompts"]])
        result["rows"][steps] = {name: [round(value, 4) for value in row] for name, row in rows.items()}
        print(table(rows, steps), end="\n\n")
    if args.json:
        args.json.write_text(json.dumps(result) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="demo", help="a model folder, or demo")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--json", type=Path, help="write all rows")
    main(parser.parse_args())
