"""One small random model of every family, ready to be denoised with two guidance branches."""

from contextlib import nullcontext

import torch
from torch import Tensor

from minidit.cache.loop import Lane, run_blocks
from minidit.cache.measure import Measurements
from minidit.cache.plan import Need, Plan, RunInfo, Site, Values
from minidit.cache.recorder import Recorder
from minidit.cache.seam import BlockCache
from minidit.cache.store import Store, make_store
from minidit.models.latte import Latte
from minidit.models.open_sora import OpenSora, Video
from minidit.models.wan import Wan
from minidit.presets import LatteConfig, OpenSoraConfig, ScheduleConfig, WanConfig
from minidit.sampling import Forward, Outcome, denoise, site_shapes
from minidit.schedules import Step, make_schedule
from tests import tiny_cogvideox, tiny_hunyuan_video
from tests.tensors import randn, random

FAMILIES = ("wan", "hunyuan_video", "cogvideox", "open_sora", "latte")
BOTH = ("cond", "uncond")
SIZE = (3, 4, 6)  # latent (T, H, W): 18 tokens
TOKENS = 18
AXES = dict(width=48, mlp_width=64, heads=4, depth=3, text_width=16, text_len=8, freq_width=16)
FULL_ATTENTION = dict(width=48, mlp_width=64, heads=2, depth=3, channels=4, text_width=16, text_len=6)


@torch.no_grad()
def forward_of(
    family: str, *, is_batched: bool = True, attention: str = "auto", keep_text: bool = True
) -> Forward:
    """A model whose branches have texts of one length. keep_text: off, of models with cross-attention"""
    texts = [randn(5, 16, seed=2), randn(5, 16, seed=3)]
    options = {"branches": BOTH, "attention": attention} | ({} if keep_text else {"keep_text": False})
    if family == "wan":
        model = random(Wan(WanConfig(**FULL_ATTENTION)))
    elif family == "hunyuan_video":
        model, texts = tiny_hunyuan_video.tiny(), [tiny_hunyuan_video.text(5, seed) for seed in (2, 3)]
    elif family == "cogvideox":
        model, texts = tiny_cogvideox.tiny("5b", depth=3), [randn(12, 24, seed=n) for n in (2, 3)]
    elif family == "open_sora":
        model, options = random(OpenSora(OpenSoraConfig(**AXES))), options | {"video": Video(32, 48, 24)}
    else:
        model = random(Latte(LatteConfig(**AXES, frames=3)))
    context = model.prepare(texts, SIZE, **options)
    return Forward(model, context, is_batched, video_tokens=TOKENS)


def rows_of(forward: Forward) -> int:
    """Tokens that attend to each other in attn."""
    return TOKENS // SIZE[0] if "t_attn" in forward.model.subs else forward.shapes["cond"][0][1]


class Scripted:
    """Follows a list of plans; decided(value) is what a gate turns its plan into."""

    def __init__(self, needs: tuple[Need, ...], *plans: Plan, decided=None):
        self.needs, self.plans, self.decided = needs, plans, decided
        self.values: list[Values] = []
        self.asked: list[float] = []

    def reset(self, run) -> tuple[Need, ...]:
        self.run = run
        return self.needs

    def plan(self, step) -> Plan:
        return self.plans[step.i]

    def decide(self, step, plan: Plan, value: float) -> Plan:
        self.asked.append(value)
        return self.decided(plan, value) if self.decided else plan

    def tell(self, step, values: Values) -> None:
        self.values.append(values)


def follow(forward: Forward, policy, steps: int | None = None, *, seed: int = 4, **options) -> Outcome:
    """Denoise, for as many steps as a scripted policy has plans. options: of denoise"""
    schedule = make_schedule(ScheduleConfig("euler", "wan", 3.0), steps or len(policy.plans))
    return denoise(forward, schedule, randn(1, 4, *SIZE, seed=seed), policy, guidance_scale=3.0, **options)


def rel(got: Tensor, want: Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()


def lanes_of(forward: Forward, x: Tensor, t: float = 500.0) -> list[Lane]:
    """A lane per branch, or one for both."""
    groups = [BOTH] if forward.is_batched else [(name,) for name in BOTH]
    times = lambda group: torch.full((len(group),), t)
    select = lambda group: forward.context.select(group)
    embed = lambda g: forward.model.embed(x.expand(len(g), -1, -1, -1, -1), times(g), select(g))
    return [Lane(group, *embed(group)) for group in groups]


@torch.no_grad()
def store_of(forward: Forward, *sites: Site) -> Store:
    """An empty store of one entry per site."""
    shape_of = site_shapes(forward, torch.zeros(1, 4, *SIZE))
    return make_store([Need(site) for site in sites], BOTH, shape_of, "cpu")


def states(
    forward: Forward, plan: Plan, store: Store | None = None, seed: int = 4, within=None, **options
) -> Tensor:
    """h before the head, a row per branch. within: around the blocks · options: of run_blocks"""
    recorder = Recorder(plan, store or store_of(forward), Measurements(), TOKENS)
    lanes = lanes_of(forward, randn(1, 4, *SIZE, seed=seed))
    with within or nullcontext():
        return torch.cat(run_blocks(forward.model.blocks, lanes, plan, recorder, **options))


SUBS = {"wan": ("attn", "cross", "mlp"), "open_sora": ("attn", "cross", "mlp", "t_attn", "t_cross", "t_mlp")}
SUBS["latte"] = ("attn", "cross", "mlp", "t_attn", "t_mlp")


def run_info(steps: int = 50, family: str = "wan", model: str = "", depth: int = 8, branches=BOTH) -> RunInfo:
    """Of a run without a model; timesteps fall evenly from 1000."""
    table = tuple(Step(i, steps, 1000 * (1 - i / steps), 1 - i / steps, 4.0) for i in range(steps))
    return RunInfo(table, depth, SUBS.get(family, ("attn", "mlp")), branches, family, (), model, 100)


@torch.no_grad()
def skip_by_hand(forward: Forward, steps: int, is_skipped, *, seed: int = 4) -> tuple[Tensor, list[int]]:
    """Skipped steps add each branch's last residual of all blocks -> latents, the computed steps

    is_skipped(i, x, starts): of step i; starts: per branch (h(0), cond)
    """
    model, schedule = forward.model, make_schedule(ScheduleConfig("euler", "wan", 3.0), steps)
    x, residuals, computed = randn(1, 4, *SIZE, seed=seed), {}, []
    for step in schedule.steps(3.0):
        t, starts, outs = torch.tensor([step.t]), {}, {}
        for name in BOTH:
            starts[name] = model.embed(x, t, forward.context.select((name,)))
        skips = is_skipped(step.i, x, starts)
        for name, (start, cond) in starts.items():
            if not skips:
                state = start
                for k, block in enumerate(model.blocks):
                    state = block(state, cond.at(k), BlockCache())
                residuals[name] = state - start
            outs[name] = model.head(start + residuals[name], cond)
        computed += [] if skips else [step.i]
        v = outs["uncond"] + 3.0 * (outs["cond"] - outs["uncond"])
        x, _ = schedule.step(step.i, x, v, schedule.start())
    return x, computed


def computed_steps(outcome: Outcome) -> list[int]:
    return [record.step.i for record in outcome.records if record.plan.label != "skip"]


def ask(policy, run: RunInfo, value=lambda i: 0.0, told=lambda i, plan: {}) -> list[Plan]:
    """The plans of a run whose gates see value(i), and whose measurements are told(i, plan)."""
    plans = []
    for step in run.steps:
        plan = policy.plan(step)
        if plan.gate is not None:
            plan = policy.decide(step, plan, value(step.i))
        plans.append(plan)
        policy.tell(step, told(step.i, plan))
    return plans
