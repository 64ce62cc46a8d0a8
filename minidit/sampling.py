"""The step loop: noise becomes latents, one plan and one guided prediction per step."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from minidit.cache.loop import Lane, Probe, Recorder, run_blocks
from minidit.cache.measure import Measurements
from minidit.cache.plan import (
    CFG_DELTA,
    GUIDED,
    GUIDED_FULL,
    PREDICTION,
    SHARED,
    Plan,
    Policy,
    RunInfo,
    Site,
    Values,
    check,
    recalled,
)
from minidit.cache.store import Store, make_store
from minidit.schedules import Schedule, Step


@dataclass(frozen=True)
class Record:
    """What one step did: its plan, what was measured, how long it took."""

    step: Step
    plan: Plan
    values: Values
    seconds: float


@dataclass
class Outcome:
    """A finished run."""

    latents: Tensor
    records: list[Record] = field(default_factory=list)
    cache_bytes: int = 0


@dataclass(frozen=True)
class Forward:
    """The model as one generation uses it: everything that no step changes."""

    model: Any
    context: Any  # from model.prepare, with a batch row for every branch
    is_batched: bool  # guidance branches run as one batch, not one after the other
    block_fn: Callable | None = None  # a compiled run_block
    probe: Probe | None = None  # sees every sub-module of an uncached run
    video_tokens: int | None = None  # the first rows of h; text may follow, at which distances do not look

    @property
    def branches(self) -> tuple[str, ...]:
        return self.context.branches

    @cached_property
    def shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Of every branch's h: where it holds text rows too, prompts of two lengths give two shapes."""
        return {name: self.model.state_shape(self.context.select((name,))) for name in self.branches}


def draw_noise(shape: Sequence[int], seed: int) -> Tensor:
    """The starting noise of a video."""
    return noise_source(seed)(shape)


def noise_source(seed: int) -> Callable[[Sequence[int]], Tensor]:
    """Draws one tensor of noise after the other, from a shape each.

    Always on the CPU in fp32, so that a seed means the same on every device.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    return lambda shape: torch.randn(*shape, generator=generator, dtype=torch.float32)


def predict(
    forward: Forward,
    x: Tensor,
    step: Step,
    plan: Plan,
    recorder: Recorder,
    decide: Callable[[Plan, float], Plan] | None = None,
) -> dict[str, Tensor]:
    """Run the plan's branches. x (1, C, T, H, W) -> {branch: prediction like x}, fp32"""
    names = plan.branches or forward.branches
    if (how := recalled(plan)) is not None:
        return {name: recorder.store.mix(PREDICTION, (name,), how) for name in names}
    is_batched = forward.is_batched and len({forward.shapes[name] for name in names}) == 1
    groups = [names] if is_batched else [(name,) for name in names]
    lanes = []
    for group in groups:
        t = torch.full((len(group),), step.t, device=x.device)
        h, cond = forward.model.embed(x.expand(len(group), -1, -1, -1, -1), t, forward.context.select(group))
        lanes.append(Lane(tuple(group), h, cond))
    options = {} if forward.block_fn is None else {"block_fn": forward.block_fn}
    states = run_blocks(
        forward.model.blocks, lanes, plan, recorder, decide=decide, probe=forward.probe, **options
    )
    outputs = {}
    for lane, state in zip(lanes, states, strict=True):
        out = forward.model.head(state, lane.cond)
        recorder.see(PREDICTION, lane.branches, out)
        outputs.update(zip(lane.branches, out.split(1), strict=True))
    return outputs


def guide(outputs: dict[str, Tensor], scale: float) -> Tensor:
    """Classifier-free guidance (Ho & Salimans, 2022): uncond + scale * (cond - uncond), or cond alone."""
    if "uncond" not in outputs:
        return outputs["cond"]
    return outputs["uncond"] + scale * (outputs["cond"] - outputs["uncond"])


def guided_prediction(
    forward: Forward, x: Tensor, step: Step, plan: Plan, store: Store, found: Measurements, policy: Policy
) -> tuple[Tensor, Plan]:
    """Carry out one step's plan -> the guided prediction, and the plan as a gate may have changed it."""
    if plan.output is not None:
        guided = store.mix(GUIDED, ("",), plan.output)
        Recorder(plan, store, found).see(GUIDED, ("",), guided)
        return guided, plan
    recorder = Recorder(plan, store, found, forward.video_tokens)
    decide = None if plan.gate is None else lambda plan, value: policy.decide(step, plan, value)
    outputs = predict(forward, x, step, plan, recorder, decide)
    plan = recorder.plan
    for name, out in outputs.items():
        found.watch(name, out)
    if len(outputs) == 2:
        recorder.see(CFG_DELTA, ("",), outputs["uncond"] - outputs["cond"])
    elif plan.fill is not None:
        outputs["uncond"] = outputs["cond"] + store.mix(CFG_DELTA, ("",), plan.fill)
    guided = guide(outputs, step.guidance)
    recorder.see(GUIDED, ("",), guided)
    recorder.see(GUIDED_FULL, ("",), guided)
    return guided, plan


@torch.inference_mode()
def denoise(
    forward: Forward,
    schedule: Schedule,
    noise: Tensor,
    policy: Policy,
    *,
    guidance_scale: float,
    family: str = "",
    constants: Mapping[tuple[int, str], Tensor] | None = None,
    progress: bool = False,
    on_step: Callable[[Record, Tensor], None] | None = None,
    draw: Callable[[Sequence[int]], Tensor] | None = None,
) -> Outcome:
    """Integrate from noise to latents. noise (1, C, T, H, W) fp32

    constants: a profile's tensors · on_step(record, x) is called after every step · draw(shape): fresh noise,
    where the schedule takes some at every step. Raises ValueError where a prediction is not finite.
    """
    steps = schedule.steps(guidance_scale)
    if schedule.needs_noise and draw is None:
        raise ValueError(f"{schedule.solver} adds fresh noise at every step; pass draw=noise_source(seed)")
    blocks, model = forward.model.blocks, forward.model
    info = RunInfo(steps, len(blocks), model.subs, forward.branches, family, map_bytes(forward))
    needs = policy.reset(info)
    store = make_store(needs, forward.branches, site_shapes(forward, noise), noise.device, constants)
    x, state, outcome = noise, schedule.start(), Outcome(noise, cache_bytes=store.bytes)
    with tqdm(total=len(steps), desc="denoise", unit="step", disable=not progress, smoothing=0.1) as bar:
        for step in steps:
            started = time.perf_counter()
            plan, found = policy.plan(step), Measurements()
            check(plan, len(blocks))
            guided, plan = guided_prediction(forward, x, step, plan, store, found, policy)
            fresh = [draw(x.shape).to(x.device) for _ in range(schedule.needs_noise)]
            x, state = schedule.step(step.i, x, guided, state, fresh)
            values, broken = found.read()
            if broken:
                raise ValueError(
                    f"step {step.i + 1} of {step.n}: the {broken[0]} prediction is not finite; "
                    f"try --dtype fp32, or check the weights with --verify"
                )
            policy.tell(step, values)
            outcome.records.append(Record(step, plan, values, time.perf_counter() - started))
            bar.update()
            if on_step:
                on_step(outcome.records[-1], x)
    outcome.latents, outcome.cache_bytes = x, store.bytes  # folded projections come on the way
    return outcome


def map_bytes(forward: Forward) -> tuple[tuple[str, int], ...]:
    """Bytes of what decides one branch's attention map, in models with attention along axes."""
    model = forward.model
    names = [name for name in ("attn", "t_attn") if "t_attn" in model.subs]
    size = lambda name: math.prod(model.map_shape(forward.context, name)) * model.dtype.itemsize
    return tuple((name, size(name)) for name in names)


def site_shapes(
    forward: Forward, latents: Tensor
) -> Callable[[Site, str], tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of what a site holds of a branch."""

    def shape_of(site: Site, branch: str) -> tuple[tuple[int, ...], torch.dtype]:
        if site in SHARED or site == PREDICTION:
            return tuple(latents.shape), torch.float32
        shape, residual = forward.shapes[branch]
        if site.kind == "map":
            return forward.model.map_shape(forward.context, site.name), forward.model.dtype
        return shape, forward.model.dtype if site.kind == "sub" else residual

    return shape_of
