import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minidit import attention
from minidit.cache.seam import BlockCache
from minidit.models.cogvideox import CogVideoX, Context, cropped_axes, rope_table, sincos_table
from minidit.presets import PRESETS
from tests.recordings.base import open_recording
from tests.recordings.cogvideox import run_dit
from tests.tensors import randn, rel
from tests.tiny_cogvideox import CONFIGS, tiny

SIZE = (4, 6, 8)  # latent (T, H, W): 48 tokens, in patches of two frames 24
REL = 1e-5  # fp32: what is compared differs in the order of sums only
KINDS = ("2b", "5b", "1.5")


def two_branches(model: CogVideoX, **options) -> Context:
    text = [randn(12, 24, seed=2), randn(12, 24, seed=3)]
    return model.prepare(text, SIZE, branches=("cond", "uncond"), **options)


def test_forward_equals_the_original(goldens):
    recording = open_recording(goldens("cogvideox_2b_dit"))
    got = run_dit(recording).outs["out.sample"]
    assert rel(got, recording.io["out.sample"]) < REL  # measured 2e-6


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_batch_equals_its_samples_alone(kind):
    model, x, t = tiny(kind), randn(2, 4, *SIZE), torch.tensor([900, 30])
    both = two_branches(model)
    out = model(x, t, both)
    assert out.shape == x.shape and out.dtype == torch.float32
    for row, branch in enumerate(both.branches):
        rows = slice(row, row + 1)
        assert rel(model(x[rows], t[rows], both.select((branch,))), out[rows]) < REL
    swapped = both.select(("uncond", "cond"))
    assert rel(model(x.flip(0), t.flip(0), swapped), out.flip(0)) < REL
    assert rel(out[:1], out[1:]) > 0.1  # else this test would see nothing


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_forward_is_the_plain_loop_to_the_bit(kind):
    model, x, t = tiny(kind), randn(2, 4, *SIZE), torch.tensor([700, 700])
    context = two_branches(model)
    h, cond = model.embed(x, t, context)
    for k, block in enumerate(model.blocks):
        h = block(h, cond.at(k), BlockCache())
    assert torch.equal(model(x, t, context), model.head(h, cond))
    assert model.state_shape(context) == ((1, *h.shape[1:]), torch.float32)
    assert h.shape[1] == context.video_tokens + 12


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_bf16_stays_close_to_fp32(kind):
    x, t = randn(2, 4, *SIZE), torch.tensor([700, 700])
    exact, model = tiny(kind), tiny(kind).bfloat16()
    want = exact(x, t, two_branches(exact))
    got = model(x, t, two_branches(model))
    assert got.dtype == torch.float32
    assert ((got - want).norm() / want.norm()).item() < 0.03  # 2^-9 a rounding; measured 0.01
    fine = two_branches(model, residual=torch.float32)
    h, _ = model.embed(x, t, fine)
    assert h.dtype == fine.residual == torch.float32


@torch.no_grad()
def test_streams_are_normed_and_gated_by_their_own_modulation():
    """A block over [video | text] against the formulas written out stream by stream."""
    model, x, t = tiny("5b"), randn(2, 4, *SIZE), torch.tensor([700, 700])
    h, cond = model.embed(x, t, two_branches(model))
    block = model.blocks[0]
    d = h.shape[-1]
    mod = block.mod(cond.vec)
    part = lambda stream, place, i: mod[:, None, d * (6 * stream + 3 * place + i) :][..., :d]
    want = list(h.split(cond.streams, dim=1))
    for place, (norm, sub) in enumerate(((block.norm1, block.attn), (block.norm2, block.mlp))):
        normed = [
            F.layer_norm(s, (d,), norm.weight, norm.bias, norm.eps) * (1 + part(i, place, 1))
            + part(i, place, 0)
            for i, s in enumerate(want)
        ]
        inputs = (torch.cat(normed, dim=1), cond) if place == 0 else (torch.cat(normed, dim=1),)
        outs = sub(*inputs).split(cond.streams, dim=1)
        want = [s + part(i, place, 2) * out for i, (s, out) in enumerate(zip(want, outs, strict=True))]
    assert rel(block(h, cond, BlockCache()), torch.cat(want, dim=1)) < REL


def test_positions_are_whole_numbers_at_the_training_size_alone():
    rows, cols = cropped_axes((30, 45), (30, 45))
    assert rows.tolist() == list(range(30))
    assert (cols - torch.arange(45)).abs().max() < 1e-12
    rows, cols = cropped_axes((24, 40), (30, 45))  # fills the width; 27 of 30 rows, from 2 on
    assert rows[0] == 2 and rows[-1] == pytest.approx(29 * 23 / 24)
    assert cols[0] == 0 and cols[-1] == pytest.approx(45 * 39 / 40)
    cos, _ = rope_table(CONFIGS["1.5"], (2, 30, 50))  # version 1.5 counts, whatever the size
    assert cos.shape == (3000, 16)
    assert cos[49, -6] == pytest.approx(torch.tensor(49.0).cos().item(), abs=1e-6)


def test_the_position_table_goes_time_column_row():
    table = sincos_table((2, 3, 4), 16).reshape(2, 3, 4, 16)
    time, column, row = table.split((4, 6, 6), dim=-1)
    for part, axis in ((time, 0), (row, 1), (column, 2)):
        moved = part.movedim(axis, 0)
        assert (moved[1:] != moved[:1]).any()
        flat = moved.reshape(len(moved), -1, part.shape[-1])
        assert (flat == flat[:, :1]).all()  # the same along the other axes
    assert torch.allclose(row[0, 2, 0, 0], torch.tensor(2 / 1.875).sin())


@torch.no_grad()
def test_text_rows_are_not_rotated():
    model = tiny("5b")
    cos, sin = two_branches(model).rope
    assert (cos[48:] == 1).all() and (sin[48:] == 0).all() and cos.shape == (60, 16)


def test_text_of_another_length_is_refused():
    with pytest.raises(ValueError, match="text of 9 rows; every row counts here: pad the token ids to 12"):
        tiny("2b").prepare([randn(12, 24), randn(9, 24)], SIZE, branches=("cond", "uncond"))


@torch.no_grad()
def test_macs_equal_a_count_of_what_runs(monkeypatch):
    model, counted = tiny("1.5"), {}
    context = model.prepare([randn(12, 24)], SIZE)

    def add(key, count):
        counted[key] = counted.get(key, 0) + count

    for k, block in enumerate(model.blocks):
        for sub in CogVideoX.subs:
            for linear in (m for m in getattr(block, sub).modules() if isinstance(m, nn.Linear)):
                linear.register_forward_hook(
                    lambda m, args, out, key=(k, sub): add(key, out.numel() * m.in_features)
                )
    blocks, original = iter(range(len(model.blocks))), attention.attention

    def counting(q, k, v, **options):
        add((next(blocks), "attn"), q.shape[:-1].numel() * k.shape[-2] * (q.shape[-1] + v.shape[-1]))
        return original(q, k, v, **options)

    monkeypatch.setattr(attention, "attention", counting)
    model(randn(1, 4, *SIZE), torch.tensor([700]), context)
    assert model.macs(SIZE, 12) == counted


@pytest.mark.parametrize(
    "name, size, parameters, macs",
    [
        ("cogvideox-2b", (13, 60, 90), 1.694e9, 59.9e12),
        ("cogvideox-5b", (13, 60, 90), 5.570e9, 166e12),
        ("cogvideox1.5-5b", (22, 96, 170), 5.571e9, 740e12),
    ],
)
def test_releases_have_their_known_size_and_cost(name, size, parameters, macs):
    with torch.device("meta"):
        model = CogVideoX(PRESETS[name].transformer)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=1e-3)
    assert sum(model.macs(size, text_len=226).values()) == pytest.approx(macs, rel=0.01)
