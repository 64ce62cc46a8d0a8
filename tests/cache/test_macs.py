"""Multiply-adds of plans: counted by hand, and by torch while the plan runs."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from minidit.cache.loop import Lane, Recorder, run_blocks
from minidit.cache.macs import full_macs, plan_macs
from minidit.cache.measure import Measurements
from minidit.cache.plan import (
    GUIDED,
    PREDICTION,
    REUSE,
    RUN_ALL,
    Add,
    Freeze,
    Load,
    Measure,
    Need,
    Plan,
    Run,
    Slice,
    h,
    residual,
    sub,
)
from minidit.cache.store import make_store
from minidit.models.wan import Wan
from minidit.presets import WanConfig

BOTH = ("cond", "uncond")
DEPTH = 4
FULL = {"attn": 100, "cross": 30, "mlp": 50}  # a block is 180, a branch 720


def table_at(width: int | None) -> dict:
    """Sliced attention costs its width."""
    attn = {} if width is None else {"attn": width}
    return {(k, name): n for k in range(DEPTH) for name, n in (FULL | attn).items()}


@pytest.mark.parametrize(
    "plan, macs",
    [
        (RUN_ALL, 1440),
        (Plan(branches=("cond",), fill=REUSE), 720),
        (Plan(path=(Load(h(2)), Run(2))), 720),  # half the blocks, both branches
        (Plan(path=(Load(h(3)), Run(3)), branches=("uncond",)), 180),
        (Plan(path=(Run(0, 1), Add(residual(1, 3)), Run(3))), 720),
        (Plan(path=(Load(h(4)),)), 0),
        (Plan(output=REUSE), 0),
        (Plan(path=(Load(PREDICTION),)), 0),
        (Plan(subs=(((0, "attn"), REUSE), ((0, "cross"), REUSE), ((3, "mlp"), REUSE))), 1440 - 2 * 180),
        (Plan(subs=tuple(((1, name), REUSE) for name in FULL)), 1440 - 2 * 180),
        (Plan(subs=(((0, "attn"), Slice(64)), ((2, "attn"), Slice(16)))), 1440 - 2 * (36 + 84)),
        (Plan(subs=(((3, "attn"), Freeze()),)), 1440 - 2 * 100),  # queries and keys of no width
        # sub-modules of blocks that do not run save nothing more
        (Plan(path=(Load(h(2)), Run(2)), subs=(((0, "attn"), REUSE), ((2, "attn"), REUSE))), 720 - 200),
        (Plan(keep=(h(1), GUIDED), measure=(Measure(h(1)),)), 1440),  # measuring is no product
    ],
    ids=lambda value: value.label if isinstance(value, Plan) else str(value),
)
def test_plans_counted_by_hand(plan, macs):
    assert plan_macs(plan, BOTH, table_at) == macs
    if plan.branches == ():
        assert plan_macs(plan, ("cond",), table_at) == macs // 2


def test_a_full_step_is_every_sub_module_of_every_branch():
    assert full_macs(BOTH, table_at) == plan_macs(RUN_ALL, BOTH, table_at) == 1440
    assert full_macs(("cond",), table_at) == 720


CONFIG = WanConfig(width=48, mlp_width=64, heads=2, depth=DEPTH, channels=4, text_width=16, text_len=6)
SIZE = (2, 4, 6)  # 12 tokens


@pytest.mark.parametrize(
    "plan",
    [
        RUN_ALL,
        Plan(branches=("cond",)),
        Plan(path=(Load(h(3)), Run(3))),
        Plan(path=(Run(0, 1), Add(residual(1, 3)), Run(3))),
        Plan(subs=tuple(((k, name), REUSE) for k, name in ((0, "attn"), (1, "cross"), (2, "mlp")))),
        Plan(subs=(((0, "attn"), Slice(16)), ((3, "attn"), Slice(8)), ((3, "cross"), REUSE))),
    ],
    ids=["all", "cond", "load", "add", "reuse", "slice"],
)
def test_torch_counts_the_same_while_a_plan_runs(plan):
    torch.manual_seed(0)
    model = Wan(CONFIG).eval().requires_grad_(False)
    branches = plan.branches or BOTH
    text = [torch.zeros(3, 16)] * len(branches)
    context = model.prepare(text, SIZE, branches=branches, attention="math")  # whose products are counted
    state, cond = model.embed(torch.zeros(len(branches), 4, *SIZE), torch.zeros(len(branches)), context)
    sites = (h(3), residual(1, 3), sub(0, "attn"), sub(1, "cross"), sub(2, "mlp"), sub(3, "cross"))
    store = make_store([Need(s) for s in sites], branches, lambda s, b: ((1, 12, 48), torch.float32), "cpu")
    for ring in store.rings.values():
        ring.push(torch.zeros(1, 12, 48))
    store.constants = {
        (k, f"attn.{part}.{n}"): torch.ones(2, 24, n) for k, n in ((0, 16), (3, 8)) for part in ("q", "k")
    }
    recorder = Recorder(plan, store, Measurements())
    with FlopCounterMode(display=False) as counter:
        run_blocks(model.blocks, [Lane(branches, state, cond)], plan, recorder)
    table = lambda width: model.macs(SIZE, CONFIG.text_len, width)
    assert counter.get_total_flops() == 2 * plan_macs(plan, BOTH, table)
    assert full_macs(BOTH, table) == 2 * sum(model.macs(SIZE, CONFIG.text_len).values())
