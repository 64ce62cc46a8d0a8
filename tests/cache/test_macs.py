"""Multiply-adds of plans: counted by hand, and by torch while the plan runs."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from minidit.cache.loop import Lane, run_blocks
from minidit.cache.macs import attention_core, full_macs, plan_macs
from minidit.cache.measure import Measurements
from minidit.cache.plan import (
    GUIDED,
    OFFSET,
    PREDICTION,
    REUSE,
    RUN_ALL,
    Add,
    Freeze,
    Gate,
    Load,
    Measure,
    Need,
    Plan,
    Run,
    Share,
    Slice,
    Tokens,
    Window,
    h,
    residual,
    sub,
    sub_input,
    window_rest,
)
from minidit.cache.recorder import Recorder
from minidit.cache.store import make_store
from minidit.models.wan import Wan
from minidit.presets import WanConfig
from tests.cache.families import FAMILIES, forward_of, rows_of, states, store_of
from tests.cache.families import SIZE as FAMILY_SIZE

BOTH = ("cond", "uncond")
DEPTH = 4
FULL = {"attn": 100, "cross": 30, "mlp": 50}  # a block is 180, a branch 720


WINDOW = Window(1, 4)  # 10 pairs of 16


def table_at(width: int | None) -> dict:
    """Sliced attention costs its width, and 60 more where none is left: what is not scores."""
    attn = {} if width is None else {"attn": width or 60}
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
        (Plan(subs=(((3, "attn"), Freeze()),)), 1440 - 2 * 40),  # queries and keys of no width
        # sub-modules of blocks that do not run save nothing more
        (Plan(path=(Load(h(2)), Run(2)), subs=(((0, "attn"), REUSE), ((2, "attn"), REUSE))), 720 - 200),
        (Plan(keep=(h(1), GUIDED), measure=(Measure(h(1)),)), 1440),  # measuring is no product
        (Plan(gate=Gate(-1, Measure(sub_input(0, "attn")))), 1440),  # nor is looking into a block
        (Plan(path=(Load(OFFSET),)), 0),
        (Plan(subs=(((0, "mlp"), Tokens(3, 10)),)), 1440 - 2 * 35),
        (Plan(subs=(((0, "mlp"), Tokens(2, 8, text=2)),)), 1440 - 2 * 30),  # text runs whatever is chosen
        (Plan(subs=(((0, "attn"), Share()), ((1, "mlp"), Share()))), 1440 - 100 - 50),
        # sliced to no width attention costs 60: scores are 40, values as much, of 4 tokens and 5 pairs each
        (Plan(subs=(((0, "attn"), WINDOW),)), 1440 - 2 * (80 - 50)),
        (Plan(subs=(((0, "attn"), Share(how=WINDOW)),)), 1440 - 100 - 30),
        (Plan(keep=(window_rest(0, "attn", WINDOW),)), 1440 + 2 * 50),  # both ways are computed
        (Plan(subs=(((0, "attn"), Share()),), keep=(window_rest(0, "attn", WINDOW),)), 1440 - 100 + 50),
        (Plan(subs=(((0, "attn"), WINDOW),), keep=(window_rest(0, "attn", WINDOW),)), 1440 - 2 * 30),
    ],
    ids=lambda value: value.label if isinstance(value, Plan) else str(value),
)
def test_plans_counted_by_hand(plan, macs):
    assert plan_macs(plan, BOTH, table_at) == macs
    shares = any(isinstance(how, Share) for _, how in plan.subs)
    if plan.branches == () and not shares:
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


@pytest.mark.parametrize("family", FAMILIES)
def test_the_products_of_attention_are_read_off_every_familys_table(family):
    model = forward_of(family).model
    table = lambda width: model.macs(FAMILY_SIZE, 5, width)
    rows = 18 if "t_attn" in model.subs else None  # text rows are part of the sequence elsewhere
    for block in range(len(model.blocks)):
        core, width = attention_core((block, "attn"), table), model.config.width
        projections = table(None)[block, "attn"] - core
        tokens, odd = divmod(projections, 4 * width**2)
        assert odd == 0 and tokens == (rows or tokens)
        assert core == 2 * tokens * width * (tokens // FAMILY_SIZE[0] if rows else tokens)


@pytest.mark.parametrize("is_batched", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_torch_counts_the_same_while_new_words_run(family, is_batched):
    """But for modulation, which is of one row, and what a window's chunks compute and mask."""
    forward = forward_of(family, is_batched=is_batched, attention="math")
    model, of = forward.model, rows_of(forward)
    window = Window(of - 1, of)
    rest, names = window_rest(1, "attn", window), [n for n in model.subs if "attn" not in n]
    text = forward.shapes["cond"][0][1] - 18  # rows, behind those of the video
    tokens = [((2, n), Tokens(6, 18, text=text)) for n in names]
    store = store_of(forward, rest, *(sub(2, n) for n in names))
    states(forward, Plan(keep=(rest, *(sub(2, n) for n in names))), store)
    table = lambda width: model.macs(FAMILY_SIZE, TEXT_ROWS[family], width)
    masked = masked_pairs(of, window.width) * attention_core((1, "attn"), table) // of**2

    def products(plan: Plan) -> int:
        counter = FlopCounterMode(display=False)
        states(forward, plan, store, within=counter)
        return counter.get_total_flops() // 2

    modulation = products(RUN_ALL) - full_macs(BOTH, table)
    assert (modulation > 0) == (family in ("hunyuan_video", "cogvideox"))  # where every block projects it
    for plan, windows in (
        (Plan(subs=(((0, "attn"), Share()), ((1, "mlp"), Share()))), 0),
        (Plan(subs=(((1, "attn"), Share()),), keep=(rest,)), 1),
        (Plan(keep=(rest,)), 2),
        (Plan(subs=(((1, "attn"), window), *tokens)), 2),
        (Plan(subs=(((1, "attn"), Share(how=window)),)), 1),
    ):
        assert products(plan) - modulation == plan_macs(plan, BOTH, table) + windows * masked


TEXT_ROWS = {"wan": 6, "hunyuan_video": 5, "cogvideox": 12, "open_sora": 5, "latte": 5}


def masked_pairs(length: int, width: int) -> int:
    """Pairs that a window's chunks compute beside its own."""
    chunks = -(-length // width)
    return chunks * width * 3 * width - (length * (2 * width + 1) - width * (width + 1))
