"""The step loop: noise becomes latents, one plan and one guided prediction per step."""

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from minidit.cache.loop import run_blocks
from minidit.cache.plan import Plan
from minidit.schedules import Schedule, Step


class Policy(Protocol):
    """A caching method: host numbers in, a plan out (cache/policies/)."""

    def plan(self, step: Step) -> Plan: ...


def draw_noise(shape: Sequence[int], seed: int) -> Tensor:
    """The starting noise: always drawn on the CPU in fp32, so that a seed means the same on every device."""
    return torch.randn(*shape, generator=torch.Generator("cpu").manual_seed(seed), dtype=torch.float32)


def predict(model: Any, x: Tensor, t: float, lanes: Sequence[Any], plan: Plan) -> dict[str, Tensor]:
    """Run the branches of every lane. x (1, C, T, H, W) -> {branch: prediction like x}, fp32

    lanes: contexts from model.prepare; the branches of one context run as one batch, contexts in turn.
    """
    starts = []
    for context in lanes:
        rows = len(context.branches)
        starts.append(
            model.embed(x.expand(rows, -1, -1, -1, -1), torch.full((rows,), t, device=x.device), context)
        )
    h = run_blocks(model.blocks, [h for h, _ in starts], [cond for _, cond in starts], plan)
    outputs = {}
    for context, lane, (_, cond) in zip(lanes, h, starts, strict=True):
        outputs.update(zip(context.branches, model.head(lane, cond).split(1), strict=True))
    return outputs


def guide(outputs: dict[str, Tensor], scale: float) -> Tensor:
    """Classifier-free guidance (Ho & Salimans, 2022): uncond + scale * (cond - uncond), or cond alone."""
    if "uncond" not in outputs:
        return outputs["cond"]
    return outputs["uncond"] + scale * (outputs["cond"] - outputs["uncond"])


@torch.inference_mode()
def denoise(
    model: Any,
    schedule: Schedule,
    noise: Tensor,
    lanes: Sequence[Any],
    *,
    guidance_scale: float,
    policy: Policy,
    progress: bool = False,
    on_step: Callable[[Step, Tensor, float], None] | None = None,
) -> Tensor:
    """Integrate from noise to latents. noise (1, C, T, H, W) fp32 -> latents like it

    on_step(step, x, seconds) is called after every step. Raises ValueError where a prediction is not finite.
    """
    x, state = noise, schedule.start()
    steps = schedule.steps(guidance_scale)
    with tqdm(total=len(steps), desc="denoise", unit="step", disable=not progress, smoothing=0.1) as bar:
        for step in steps:
            started = time.perf_counter()
            outputs = predict(model, x, step.t, lanes, policy.plan(step))
            check_finite(outputs, step)
            x, state = schedule.step(step.i, x, guide(outputs, step.guidance), state)
            bar.update()
            if on_step:
                on_step(step, x, time.perf_counter() - started)
    return x


def check_finite(outputs: dict[str, Tensor], step: Step) -> None:
    """Stop at the first prediction that is not finite, naming step and branch."""
    for branch, out in outputs.items():
        if not torch.isfinite(out.sum()):
            raise ValueError(
                f"step {step.i + 1} of {step.n}: the {branch} prediction is not finite; "
                f"try --dtype fp32, or check the weights with --verify"
            )
