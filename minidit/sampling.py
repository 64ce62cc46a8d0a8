"""The step loop: noise becomes latents, one plan and one guided prediction per step."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from minidit.cache.loop import Lane, run_blocks
from minidit.cache.measure import Measurements
from minidit.cache.plan import (
    CFG_DELTA,
    GUIDED,
    GUIDED_FULL,
    LATENTS,
    LATENTS_FULL,
    OFFSET,
    PREDICTION,
    REUSE,
    SHARED,
    TIME,
    TIME_MOD,
    Load,
    Mix,
    Plan,
    Policy,
    RunInfo,
    Site,
    Spectrum,
    Values,
    check,
    recalled,
)
from minidit.cache.recorder import Recorder
from minidit.cache.seam import Probe
from minidit.cache.store import Ring, Store, make_store
from minidit.cache.trace import to_json
from minidit.parallel import Part
from minidit.schedules import Schedule, State, Step


@dataclass(frozen=True)
class Record:
    """What one step did: its plan, what was measured, how long it took."""

    step: Step
    plan: Plan
    values: Values
    seconds: float
    gates: tuple[float, ...] = ()  # what decide() was told in mid-step


@dataclass
class Outcome:
    """A finished run."""

    latents: Tensor
    records: list[Record] = field(default_factory=list)
    cache_bytes: int = 0


@dataclass(frozen=True)
class Snapshot:
    """A run between two steps: with the schedule and the policy, all that the steps to come depend on."""

    x: Tensor  # (1, C, T, H, W) fp32
    state: State
    rings: Mapping[tuple[Site, str], Ring]  # those of the store: the next step writes into them
    records: Sequence[Record]  # of the steps that are done


class GateLog:
    """A policy's decide(), and what it was told in one step."""

    def __init__(self, policy: Policy):
        self.policy = policy
        self.values: list[float] = []

    def decide(self, step: Step, plan: Plan, value: float) -> Plan:
        self.values.append(value)
        return self.policy.decide(step, plan, value)


@dataclass(frozen=True)
class Forward:
    """The model as one generation uses it: everything that no step changes."""

    model: Any
    context: Any  # from model.prepare, with a batch row for every branch
    is_batched: bool  # guidance branches run as one batch, not one after the other
    block_fn: Callable | None = None  # a compiled run_block
    probe: Probe | None = None  # sees every sub-module of an uncached run
    video_tokens: int | None = None  # the first rows of h; text may follow, at which distances do not look
    part: Part | None = None  # this rank's, where several make one video
    expect: Callable[[Plan], None] | None = None  # told which plan is run: offloaded blocks

    @property
    def branches(self) -> tuple[str, ...]:
        return self.context.branches

    @property
    def branches_here(self) -> tuple[str, ...]:
        """Those that this rank runs."""
        return self.branches if self.part is None else self.part.branches

    @property
    def block_context(self) -> Any:
        """What the blocks see of the context: on one of several ranks, of its tokens."""
        return self.context if self.part is None else self.part.context

    @property
    def tokens_here(self) -> int | None:
        """video_tokens on this rank."""
        return self.video_tokens if self.part is None else self.part.tokens

    @cached_property
    def shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Of every branch's h: where it holds text rows too, prompts of two lengths give two shapes."""
        return {name: self.model.state_shape(self.block_context.select((name,))) for name in self.branches}


class NoiseSource:
    """All the noise of a video: one tensor after the other, from a shape each.

    Always on the CPU in fp32, so that a seed means the same on every device.
    """

    def __init__(self, seed: int):
        self.generator = torch.Generator("cpu").manual_seed(seed)

    def __call__(self, shape: Sequence[int]) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float32)


def draw_noise(shape: Sequence[int], seed: int) -> Tensor:
    """The starting noise of a video."""
    return NoiseSource(seed)(shape)


def predict(
    forward: Forward,
    x: Tensor,
    step: Step,
    plan: Plan,
    recorder: Recorder,
    decide: Callable[[Plan, float], Plan] | None = None,
) -> dict[str, Tensor]:
    """Run the plan's branches. x (1, C, T, H, W) -> {branch: prediction like x}, fp32"""
    names, part = plan.branches or forward.branches, forward.part
    if part is None:
        return predict_here(forward, x, step, plan, recorder, decide, names)
    here = [name for name in names if name in part.branches]
    return part.all_predictions(predict_here(forward, x, step, plan, recorder, decide, here), names, x)


def predict_here(
    forward: Forward,
    x: Tensor,
    step: Step,
    plan: Plan,
    recorder: Recorder,
    decide: Callable[[Plan, float], Plan] | None,
    names: Sequence[str],
) -> dict[str, Tensor]:
    """predict() for these branches, those of this rank."""
    if (item := recalled(plan)) is not None:
        return {name: recall(item, name, x, recorder.store) for name in names}
    is_batched = forward.is_batched and len({forward.shapes[name] for name in names}) == 1
    groups = [names] if is_batched else [(name,) for name in names]
    lanes, conds, part = [], [], forward.part
    for group in groups:
        t = torch.full((len(group),), step.t, device=x.device)
        h, cond = forward.model.embed(x.expand(len(group), -1, -1, -1, -1), t, forward.context.select(group))
        conds.append(cond)
        if part is not None:
            h, cond = part.take(h), replace(cond, context=part.context.select(group))
        lanes.append(Lane(tuple(group), h, cond))
        for site in recorder.wanted & {TIME, TIME_MOD}:
            recorder.see(site, group, time_of(cond, site))
    options = {} if forward.block_fn is None else {"block_fn": forward.block_fn}
    if forward.expect is not None:
        options["expect"] = forward.expect
    states = run_blocks(
        forward.model.blocks, lanes, plan, recorder, decide=decide, probe=forward.probe, **options
    )
    outputs = {}
    for lane, state, cond in zip(lanes, states, conds, strict=True):
        out = forward.model.head(state if part is None else part.whole(state), cond)
        recorder.see(PREDICTION, lane.branches, out)
        if OFFSET in recorder.wanted:
            recorder.see(OFFSET, lane.branches, out - x)
        outputs.update(zip(lane.branches, out.split(1), strict=True))
    return outputs


def recall(item: Load, branch: str, x: Tensor, store: Store) -> Tensor:
    """A branch's prediction without the transformer: a stored one, or the latents and a stored offset."""
    stored = store.mix(item.site, (branch,), item.mix)
    return x + stored if item.site == OFFSET else stored


def time_of(cond: Any, site: Site) -> Tensor:
    """What a family's conditioning has of TIME or TIME_MOD, (G, ...): a row, or one per frame, by branch."""
    return cond.time if site == TIME else cond.mod


def fill_delta(store: Store, how: Mix | Spectrum) -> Tensor:
    """uncond - cond from the store, for a step that runs cond alone. -> (1, C, T, H, W)"""
    if isinstance(how, Mix):
        return store.mix(CFG_DELTA, ("",), how)
    return weigh_spectrum(store.mix(CFG_DELTA, ("",), REUSE), how)


def weigh_spectrum(x: Tensor, how: Spectrum) -> Tensor:
    """Weigh the low and the high spatial frequencies of every frame (FasterCache). x (..., H, W) fp32

    Low are those within a disc around zero of radius min(H, W) // 5, in grid units. A frequency and its
    negative weigh the same, so the result is real.
    """
    rows, columns = x.shape[-2:]
    v, u = (torch.fft.fftfreq(n, 1 / n, device=x.device) for n in (rows, columns))
    is_low = v[:, None] ** 2 + u**2 <= (min(rows, columns) // 5) ** 2
    weight = torch.where(is_low, how.low, how.high)
    return torch.fft.ifft2(torch.fft.fft2(x) * weight).real


def guide(outputs: dict[str, Tensor], scale: float) -> Tensor:
    """Classifier-free guidance (Ho & Salimans, 2022): uncond + scale * (cond - uncond), or cond alone."""
    if "uncond" not in outputs:
        return outputs["cond"]
    return outputs["uncond"] + scale * (outputs["cond"] - outputs["uncond"])


def guided_prediction(
    forward: Forward, x: Tensor, step: Step, plan: Plan, store: Store, found: Measurements, policy: Policy
) -> tuple[Tensor, Plan]:
    """Carry out one step's plan -> the guided prediction, and the plan as a gate may have changed it."""
    recorder = Recorder(plan, store, found, forward.tokens_here)
    decide = lambda plan, value: policy.decide(step, plan, value)
    recorder.see(LATENTS, ("",), x)
    if plan.gate is not None and plan.gate.measure.site == LATENTS:
        plan = recorder.settle(decide, len(forward.model.blocks))
    if plan.output is not None:
        guided = store.mix(GUIDED, ("",), plan.output)
        recorder.see(GUIDED, ("",), guided)
        return guided, plan
    outputs = predict(forward, x, step, plan, recorder, decide)
    plan = recorder.plan
    found.watch(outputs)
    if len(outputs) == 2:
        recorder.see(CFG_DELTA, ("",), outputs["uncond"] - outputs["cond"])
    elif plan.fill is not None:
        outputs["uncond"] = outputs["cond"] + fill_delta(store, plan.fill)
    guided = guide(outputs, step.guidance)
    recorder.see(GUIDED, ("",), guided)
    recorder.see(GUIDED_FULL, ("",), guided)
    recorder.see(LATENTS_FULL, ("",), x)
    return guided, plan


@dataclass(frozen=True)
class Taken:
    """A step whose work the device has been given."""

    step: Step
    plan: Plan
    found: Measurements
    gates: GateLog
    x: Tensor  # the latents after it
    started: float


def runs_ahead(policy: Policy, x: Tensor) -> bool:
    """Whether the host prepares a step while the device works on the one before.

    It may where a policy says needs_values = False: its plans do not depend on what tell() is told.
    """
    return x.is_cuda and not getattr(policy, "needs_values", True)


def finish(taken: Taken, policy: Policy, since: float) -> Record:
    """Wait for a step's numbers and tell the policy. since: when the step before was finished"""
    values, broken = taken.found.read()
    step, gates = taken.step, tuple(taken.gates.values)
    if broken:
        raise ValueError(
            f"step {step.i + 1} of {step.n}: the {broken[0]} prediction is not finite; "
            f"try --dtype fp32, or check the weights with --verify"
        )
    policy.tell(step, values)
    return Record(step, taken.plan, values, time.perf_counter() - max(taken.started, since), gates)


@torch.inference_mode()
def denoise(
    forward: Forward,
    schedule: Schedule,
    noise: Tensor,
    policy: Policy,
    *,
    guidance_scale: float,
    family: str = "",
    preset: str = "",
    constants: Mapping[tuple[int, str], Tensor] | None = None,
    progress: bool = False,
    on_step: Callable[[Record, Tensor], None] | None = None,
    draw: Callable[[Sequence[int]], Tensor] | None = None,
    start: Snapshot | None = None,
    on_state: Callable[[Snapshot], None] | None = None,
    wants_state: Callable[[int], bool] | None = None,
) -> Outcome:
    """Integrate from noise to latents. noise (1, C, T, H, W) fp32

    preset: the release's name, "" for other weights · constants: a profile's tensors ·
    on_step(record, x) is called after every step · draw(shape): fresh noise, where the schedule takes some at
    every step · start: go on from here, with `draw` as it was then · on_state(snapshot) is called after every
    step too, or where wants_state(steps done) says so. Raises ValueError where a prediction is not finite.
    """
    steps = schedule.steps(guidance_scale)
    if schedule.needs_noise and draw is None:
        raise ValueError(f"{schedule.solver} adds fresh noise at every step; pass draw=NoiseSource(seed)")
    blocks, part = forward.model.blocks, forward.part
    needs = policy.reset(run_info(forward, steps, family, preset))
    store = make_store(needs, forward.branches_here, site_shapes(forward, noise), noise.device, constants)
    x, state, outcome = noise, schedule.start(), Outcome(noise, cache_bytes=store.bytes)
    if start is not None:
        retrace(policy, start.records)
        x, state = restore(start, store, noise.device)
        outcome.records.extend(start.records)
    done, waiting, since = len(outcome.records), [], 0.0
    ahead = runs_ahead(policy, noise)
    with progress_bar(len(steps), done, progress) as bar:
        for step in steps[done:]:
            started = time.perf_counter()
            plan, gates = policy.plan(step), GateLog(policy)
            found = Measurements() if part is None else Measurements(part.add)
            check(plan, len(blocks))
            guided, plan = guided_prediction(forward, x, step, plan, store, found, gates)
            fresh = [draw(x.shape).to(x.device) for _ in range(schedule.needs_noise)]
            x, state = schedule.step(step.i, x, guided, state, fresh)
            found.send()
            waiting.append(Taken(step, plan, found, gates, x, started))
            is_wanted = on_state is not None and (wants_state is None or wants_state(step.i + 1))
            while len(waiting) > (ahead and not is_wanted and step.i + 1 < len(steps)):
                taken = waiting.pop(0)
                outcome.records.append(finish(taken, policy, since))
                since = time.perf_counter()
                bar.update()
                if on_step:
                    on_step(outcome.records[-1], taken.x)
            if is_wanted:
                on_state(Snapshot(x, state, store.rings, outcome.records))
    outcome.latents, outcome.cache_bytes = x, store.bytes  # folded projections come on the way
    return outcome


def progress_bar(steps: int, done: int, is_shown: bool) -> tqdm:
    """Steps done, and how long the rest is going to take."""
    return tqdm(total=steps, initial=done, desc="denoise", unit="step", disable=not is_shown, smoothing=0.1)


def run_info(forward: Forward, steps: Sequence[Step], family: str, preset: str) -> RunInfo:
    """What a policy is told of a run."""
    model, part = forward.model, forward.part
    rows = forward.shapes[forward.branches[0]][0][1]
    tokens, maps, depth = forward.video_tokens or rows, map_bytes(forward), len(model.blocks)
    counts = tokens, rows - tokens
    run = RunInfo(tuple(steps), depth, model.subs, forward.branches, family, maps, preset, *counts)
    return run if part is None else replace(run, token_ranks=part.layout.ulysses, cfg_ranks=part.layout.cfg)


def retrace(policy: Policy, records: Sequence[Record]) -> None:
    """Bring a policy to where it stood: the same questions again, answered with what was measured then."""
    for record in records:
        plan = policy.plan(record.step)
        for value in record.gates:
            plan = policy.decide(record.step, plan, value)
        if to_json(plan) != to_json(record.plan):
            raise ValueError(
                f"step {record.step.i + 1} of the unfinished run was {record.plan.label}, and would be "
                f"{plan.label} now: the caching method or its profile has changed; leave out --resume"
            )
        policy.tell(record.step, record.values)


def restore(start: Snapshot, store: Store, device: torch.device) -> tuple[Tensor, State]:
    """Fill the rings as they were -> the latents and the solver's history."""
    shapes = lambda rings: {key: ring.slots.shape for key, ring in rings.items()}
    if shapes(start.rings) != shapes(store.rings):
        raise ValueError("the unfinished run kept other values than this one would; leave out --resume")
    for key, ring in start.rings.items():
        store.rings[key].slots.copy_(ring.slots)
        store.rings[key].pushed = ring.pushed
    saved = {name: t for name, t in start.state._asdict().items() if t is not None}
    return start.x.to(device), State(**{name: t.to(device) for name, t in saved.items()})


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
        if site in SHARED or site in (PREDICTION, OFFSET):
            return tuple(latents.shape), torch.float32
        if site in (TIME, TIME_MOD):
            context, t = forward.context.select((branch,)), torch.zeros(1, device=latents.device)
            time = time_of(forward.model.embed(latents, t, context)[1], site)
            return tuple(time.shape), time.dtype
        shape, residual = forward.shapes[branch]
        if site.kind == "ages":
            return shape[:2], torch.float32
        if site.kind == "map":
            return forward.model.map_shape(forward.block_context, site.name), forward.model.dtype
        return shape, forward.model.dtype if site.kind in ("sub", "input", "rest") else residual

    return shape_of
