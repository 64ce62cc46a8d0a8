"""The block function under torch.compile: one graph per distinct row of codes, none of them broken."""

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from minidit.cache.loop import Lane, run_blocks
from minidit.cache.measure import Measurements
from minidit.cache.plan import REUSE, RUN_ALL, Load, Measure, Need, Plan, Run, Slice, h, sub
from minidit.cache.recorder import Recorder
from minidit.cache.seam import run_block
from minidit.cache.store import Store, make_store
from minidit.models.wan import Wan
from minidit.presets import WanConfig

CONFIG = WanConfig(width=48, mlp_width=64, heads=2, depth=4, channels=4, text_width=16, text_len=6)
PLANS = {  # a plan, and how many distinct rows of codes its blocks have
    "everything": (RUN_ALL, 1),
    "resume and keep": (
        Plan(path=(Load(h(2)), Run(2)), keep=(sub(3, "attn"), h(3)), measure=(Measure(h(3)),)),
        2,
    ),
    "slice, reuse twice, both": (
        Plan(
            subs=(
                ((0, "attn"), Slice(16)),
                ((1, "attn"), REUSE),
                ((2, "attn"), REUSE),
                ((3, "attn"), Slice(16)),
                ((3, "cross"), REUSE),
            )
        ),
        3,
    ),
}


@pytest.fixture(scope="module")
def model() -> Wan:
    torch.manual_seed(0)
    return Wan(CONFIG).eval().requires_grad_(False)


def start(model: Wan, seed: int) -> Lane:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 4, 2, 4, 4, generator=draw)
    context = model.prepare([torch.randn(5, 16, generator=draw)], (2, 4, 4))
    state, cond = model.embed(x, torch.full((1,), 500.0), context)
    return Lane(("cond",), state, cond)


def filled_store(model: Wan) -> Store:
    """A store that holds something at every site that the plans read."""
    sites = (h(2), h(3), sub(1, "attn"), sub(2, "attn"), sub(3, "attn"), sub(3, "cross"))
    store = make_store([Need(s) for s in sites], ("cond",), lambda s, b: ((1, 8, 48), torch.float32), "cpu")
    draw = torch.Generator().manual_seed(9)
    for site in sites:
        store.push(site, "cond", torch.randn(1, 8, 48, generator=draw))
    names = [(block, f"attn.{part}.16") for block in range(4) for part in ("q", "k")]
    store.constants = {name: torch.randn(2, 24, 16, generator=draw) for name in names}
    return store


def run(model: Wan, plan: Plan, block_fn, seed: int) -> Tensor:
    recorder = Recorder(plan, filled_store(model), Measurements())
    return run_blocks(model.blocks, [start(model, seed)], plan, recorder, block_fn=block_fn)[0]


@pytest.mark.parametrize("name", PLANS)
def test_compiles_whole_once_per_row_and_gives_the_same(model, name):
    plan, rows = PLANS[name]
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(run_block, fullgraph=True, backend=counter)
    with torch.no_grad():
        for seed in (1, 2):  # other numbers, no new graph
            assert torch.equal(run(model, plan, compiled, seed), run(model, plan, run_block, seed))
    assert counter.frame_count == rows
