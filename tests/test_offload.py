"""Blocks that visit the device in their turn, components that are let go, and who decides."""

import pytest
import torch
from torch import nn

from minidit import memory
from minidit.cache.plan import RUN_ALL, Add, Plan, Run, residual
from minidit.generate import Engine
from minidit.memory import MARGIN, Peaks, Stage, choose_offload
from minidit.offload import OffloadedBlocks
from minidit.settings import Choices

GIB = 2**30
PROMPT = "a red circle moves left to right"


class Toy(nn.Module):
    """A block of two dtypes and a buffer, all holding its number."""

    def __init__(self, k: int):
        super().__init__()
        self.weight = nn.Parameter(torch.full((3, 5), float(k)), requires_grad=False)
        self.norm = nn.Parameter(torch.full((7,), float(k), dtype=torch.bfloat16), requires_grad=False)
        self.register_buffer("quantized", torch.full((2, 3), k, dtype=torch.int8))


def blocks(count: int = 6, slots: int = 2) -> OffloadedBlocks:
    return OffloadedBlocks(nn.ModuleList(Toy(k) for k in range(count)), "cpu", slots=slots)


def number(block: Toy) -> int:
    values = {*block.weight.flatten().tolist(), *block.norm.tolist(), *block.quantized.flatten().tolist()}
    assert len(values) == 1
    return int(values.pop())


def is_within(block: Toy, slot) -> bool:
    start = slot.buffer.data_ptr()
    return start <= block.weight.data_ptr() < start + slot.buffer.nbytes


@pytest.mark.parametrize("slots", [2, 3])
def test_every_block_is_itself_in_whatever_order(slots):
    found = blocks(slots=slots)
    for k in (0, 1, 2, 5, 5, 3, 0, 4, 1):
        block = found[k]
        assert number(block) == k and any(is_within(block, slot) for slot in found.slots)
    assert [number(block) for block in found] == list(range(6))


def test_no_more_blocks_than_slots_are_on_the_device():
    found = blocks(slots=3)
    for k in range(6):
        found[k]
        here = [b for b in found._modules.values() if any(is_within(b, slot) for slot in found.slots)]
        assert len(here) <= 3
    assert [number(block) for block in found._modules.values()] == list(range(6))  # the others in CPU memory


def test_the_block_that_the_plan_runs_next_is_there_already():
    found = blocks()
    found.follow(Plan(path=(Run(0, 2), Add(residual(2, 4)), Run(4))))
    for k, following in ((0, 1), (1, 4), (4, 5), (5, 0)):  # behind the last one, the next step's first
        found[k]
        assert found.slot_of(following) is not None


def test_a_block_that_is_skipped_is_not_copied():
    found = blocks()
    [found[k] for k in range(6)]
    before = found.visits
    found.follow(Plan(path=(Run(0, 1), Add(residual(1, 4)), Run(4))))
    for k in (0, 4, 5):
        assert number(found[k]) == k
    assert found.visits - before == 3  # 4 and 5, and block 0 again for the next step


def latents(steps: int = 8, **options):
    engine = Engine("demo", device="cpu", **options)
    settings = engine.resolve(PROMPT, Choices(steps=steps, cache="mixcache:impact=uniform,theta=inf"))
    return engine.denoise(settings, engine.encode(settings)), engine


def test_offloaded_blocks_give_the_same_numbers():
    (plain, _), (visited, engine) = latents(), latents(offload="blocks")
    assert torch.equal(visited.latents, plain.latents)
    model, ran = engine.module("transformer"), sum(len(r.plan.path) > 1 for r in plain.records)
    assert ran > 0 and model.blocks.visits < 8 + 8 * 8  # MixCache skipped some
    assert sum(slot.buffer.nbytes for slot in model.blocks.slots) < 0.3 * sum(
        p.bytes for p in model.blocks.packs
    )


def test_compiled_blocks_may_visit_too():
    engine = Engine("demo", device="cpu", offload="blocks")
    from minidit.compiled import CompiledBlock

    engine.block_fn = CompiledBlock(backend="eager")
    settings = engine.resolve(PROMPT, Choices(steps=2))
    compiled = engine.denoise(settings, engine.encode(settings)).latents
    plain = Engine("demo", device="cpu")
    assert torch.equal(compiled, plain.denoise(settings, plain.encode(settings)).latents)


@pytest.mark.gpu
def test_blocks_visit_a_card_with_the_same_numbers():
    def run(offload: str) -> torch.Tensor:
        engine = Engine("demo", device="cuda", offload=offload)
        settings = engine.resolve(PROMPT, Choices(steps=8))
        return engine.denoise(settings, engine.encode(settings)).latents

    assert torch.equal(run("blocks"), run("none"))


@pytest.mark.parametrize("offload, is_kept", [("none", True), ("parts", False), ("blocks", False)])
def test_the_transformer_is_let_go_before_decoding_where_that_was_asked_for(offload, is_kept):
    engine = Engine("demo", device="cpu", offload=offload)
    video = engine.generate(PROMPT, steps=2)
    assert ("transformer" in engine.modules) == is_kept and "vae" in engine.modules
    assert "text_encoder" not in engine.modules
    assert video.trace["total"]["macs"] > 0


def predict(name: str) -> list[Stage]:
    weights = {"none": 40, "parts": 28, "blocks": 2}[name] * GIB
    return [Stage("text", 11 * GIB, 0), Stage("denoise", weights, 3 * GIB, 1 * GIB)]


@pytest.mark.parametrize("free, chosen", [(80, "none"), (44.1, "parts"), (36, "parts"), (33, "blocks")])
def test_auto_is_the_first_that_fits_with_some_room(monkeypatch, free, chosen):
    assert MARGIN == 1.1
    monkeypatch.setattr(memory, "free_bytes", lambda device, base: free * GIB)
    assert choose_offload(predict, "auto", device="cuda", base=0)[0] == chosen


def test_what_cannot_fit_is_refused_with_the_numbers(monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device, base: 10 * GIB)
    with pytest.raises(ValueError, match="text needs 11.00 GiB on cuda .* and 10.00 GiB are free; try"):
        choose_offload(predict, "auto", device="cuda", base=0)
    with pytest.raises(ValueError, match=r"denoise needs 44.00 GiB .*40.00 GiB of weights, 3.00 GiB of act"):
        choose_offload(predict, "none", device="cuda", base=0)
    with pytest.raises(ValueError, match="unknown offload 'disk'; choose one of auto, none, parts, blocks"):
        Engine("demo", device="cpu", offload="disk")


def test_a_video_that_does_not_fit_is_refused_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device, base: 2**20)
    engine = Engine("demo", device="cpu")
    with pytest.raises(ValueError, match="decode needs .* [MG]iB on cpu .* try a smaller --size"):
        engine.generate(PROMPT, steps=2)
    assert engine.modules == {}


def test_peaks_are_kept_by_stage():
    peaks = Peaks("cpu")
    with peaks.stage("large"):
        torch.ones(2**25).sum()  # 128 MiB
    with peaks.stage("small"):
        torch.ones(8).sum()
    assert peaks.found["large"] - peaks.found["small"] > 2**26


def test_run_all_is_followed_at_first():
    assert blocks().order == list(range(6)) and RUN_ALL.path == (Run(0),)
