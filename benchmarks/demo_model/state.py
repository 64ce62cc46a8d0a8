"""What a training stage is made of and how it survives a kill: one file, written whole or not at all."""

import ast
import math
import os
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn


@dataclass
class Stage:
    """Modules in training with everything that must be saved together."""

    modules: nn.ModuleDict
    optimizer: torch.optim.Optimizer
    ema: dict[str, Tensor]  # running mean of the weights, fp32
    rng: random.Random  # picks clips and captions
    generator: torch.Generator  # draws noise
    total: int  # samples of the whole run; the learning rate follows seen / total
    seen: int = 0
    seconds: float = 0.0


def make_stage(modules: nn.ModuleDict, *, lr: float, decay: float, total: int, seed: int) -> Stage:
    optimizer = torch.optim.AdamW(modules.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=decay)
    ema = {name: p.detach().clone() for name, p in modules.named_parameters()}
    generator = torch.Generator(next(modules.parameters()).device).manual_seed(seed)
    return Stage(modules, optimizer, ema, random.Random(seed), generator, total)


def save(stage: Stage, path: Path) -> None:
    """Write beside, then rename: a kill leaves the old file or the new one."""
    held = {
        "modules": stage.modules.state_dict(),
        "optimizer": stage.optimizer.state_dict(),
        "ema": stage.ema,
        "rng": repr(stage.rng.getstate()),
        "generator": stage.generator.get_state(),
        "counters": [stage.total, stage.seen, stage.seconds],
    }
    part = path.with_suffix(".part")
    torch.save(held, part)
    os.replace(part, path)


def resume(stage: Stage, path: Path, *, total: int | None = None) -> None:
    """Fill the stage from its checkpoint; a new total stretches what is left of the learning rate's way."""
    device = next(stage.modules.parameters()).device
    held = torch.load(path, map_location=device, weights_only=True)
    stage.modules.load_state_dict(held["modules"])
    stage.optimizer.load_state_dict(held["optimizer"])
    stage.ema = held["ema"]
    stage.rng.setstate(ast.literal_eval(held["rng"]))
    stage.generator.set_state(held["generator"].cpu())
    stage.total, stage.seen, stage.seconds = held["counters"]
    stage.total = total or stage.total


def rate(seen: int, total: int, warmup: int) -> float:
    """Share of the peak learning rate: linear over `warmup` samples, under a cosine to zero at `total`."""
    return min(1.0, (seen + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * min(1.0, seen / total)))


def update(stage: Stage, loss: Tensor, samples: int, *, lr: float, warmup: int, ema: float) -> None:
    """One step of the optimiser and of the running mean of the weights."""
    for group in stage.optimizer.param_groups:
        group["lr"] = lr * rate(stage.seen, stage.total, warmup)
    stage.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(stage.modules.parameters(), 1.0)
    stage.optimizer.step()
    weights = [p.detach() for p in stage.modules.parameters()]
    torch._foreach_lerp_(
        list(stage.ema.values()), weights, 1 - min(ema, (stage.seen + 1) / (stage.seen + 10 * samples))
    )
    stage.seen += samples


def fit(stage: Stage, budget_s: float) -> None:
    """Set the total to what fits into the time, going by the speed so far. Stays as it is on resuming."""
    stage.total = max(stage.seen, int(stage.seen * budget_s / stage.seconds))


def load_ema(stage: Stage) -> None:
    """Put the running mean into the modules: what is measured and exported. Training ends with it."""
    stage.modules.load_state_dict(stage.ema)
