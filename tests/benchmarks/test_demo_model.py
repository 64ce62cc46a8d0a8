"""The embedded model: its data, its check, its training in miniature, and whether the shipped one obeys."""

import random
from itertools import chain

import pytest
import torch
from torch import nn

from benchmarks.demo_model import check, dit_stage, state, train
from benchmarks.demo_model.data import (
    COLOURS,
    MOTIONS,
    SHAPES,
    combinations,
    draw,
    held_out,
    object_masks,
    sample_clips,
    trained,
    visible_backgrounds,
)
from benchmarks.demo_model.latents import training_clips
from minidit.generate import Engine
from minidit.models.wan import Wan
from minidit.presets import WanConfig
from minidit.text.tokenizers import SentencePiece


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """A folder in which every stage of training has run in miniature."""
    out = tmp_path_factory.mktemp("demo_model")
    train.run(train.parse(["--out", str(out), "--smoke", "--device", "cpu"]))
    return out


def test_no_wording_belongs_to_two_motions():
    wordings = [list(chain.from_iterable(forms)) for forms in MOTIONS.values()]
    assert all(len(forms) >= 4 for forms in MOTIONS.values())
    assert len(set(chain.from_iterable(wordings))) == sum(len(set(forms)) for forms in wordings)


def test_a_tenth_of_the_combinations_is_never_trained_on():
    assert len(held_out()) == round(len(combinations()) / 10)
    assert {(c.colour, c.shape, c.motion) for c in training_clips(2000, seed=0)} == set(trained())
    assert held_out()[0] == ("red", "circle", "right")  # the choice is fixed: scores of all times compare


def test_every_clip_shows_all_of_its_object():
    clips = sample_clips(196, combinations(), random.Random(0))
    masks = object_masks(clips, [0, 16])
    border = torch.cat([masks[..., 0, :], masks[..., -1, :], masks[..., 0], masks[..., -1]])
    assert border.max() < 0.5  # the tip of a star may graze it
    assert masks.sum((-1, -2)).min() > 100  # pixels
    assert all(clip.background in visible_backgrounds(clip.colour) for clip in clips)


def test_the_check_is_right_on_drawn_clips():
    assert set(check.scores(check.drawn_answers(100)).values()) == {1.0}


def test_the_check_notices_what_is_wrong():
    (clip,) = sample_clips(1, [("red", "triangle", "left")], random.Random(0))
    video = ((draw([clip])[0][0] + 1) * 127.5).permute(1, 2, 3, 0)  # (T, H, W, 3)
    assert check.look(video) == check.Seen("red", "triangle", "left")
    assert check.look(video.flip(0)).motion == "right"
    assert check.look(video[:1].expand(17, -1, -1, -1)).motion == "still"
    assert check.look(video.flip(-1)).colour == "blue"


def test_resuming_equals_going_on(tmp_path):
    def work(stage: state.Stage, steps: int) -> None:
        for _ in range(steps):
            x = torch.randn(4, 3, generator=stage.generator) * stage.rng.random()
            loss = stage.modules["net"](x).square().mean()
            state.update(stage, loss, 4, lr=0.1, warmup=8, ema=0.9)

    def fresh(seed: int) -> state.Stage:
        torch.manual_seed(seed)
        return state.make_stage(
            nn.ModuleDict({"net": nn.Linear(3, 2)}), lr=0.1, decay=0.01, total=40, seed=seed
        )

    one, two = fresh(0), fresh(1)
    work(one, 5)
    state.save(one, tmp_path / "a.pt")
    work(one, 5)
    state.resume(two, tmp_path / "a.pt")
    work(two, 5)
    state.load_ema(one)
    state.load_ema(two)
    assert torch.equal(one.modules["net"].weight, two.modules["net"].weight)
    assert list(tmp_path.iterdir()) == [tmp_path / "a.pt"]  # nothing half-written stays behind


def test_the_training_forward_equals_the_models():
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = Wan(WanConfig(width=32, mlp_width=48, heads=2, depth=2, channels=4, text_width=16, text_len=6))
    x = torch.randn(2, 4, 3, 4, 4, generator=generator)
    text = [torch.randn(n, 16, generator=generator) for n in (3, 6)]
    t = torch.tensor([100.0, 900.0])
    want = model(x, t, model.prepare(text, (3, 4, 4), branches=("a", "b")))
    got = dit_stage.predict(model, x, t, text, dit_stage.run_block)
    assert (got - want).abs().max() < 1e-5 * want.abs().max()  # another order of sums in fp32


def test_names_are_whole_pieces(smoke):
    tokenizer = SentencePiece(smoke / "spiece.model")
    for word in (*COLOURS, *SHAPES):
        assert len(tokenizer.encode(word, 9)) == 2, word  # the word and the end token
    assert tokenizer.encode("A RED Circle", 9) == tokenizer.encode("a red circle", 9)


def test_smoke_training_makes_a_model_folder_that_runs(smoke):
    video = Engine(smoke / "model", device="cpu").generate("a red circle moves left", steps=2)
    assert video.frames.shape == (17, 64, 64, 3)
    assert video.latents.isfinite().all()


def test_a_finished_training_only_exports(smoke):
    before = torch.load(smoke / "dit.pt", weights_only=True)["counters"][1]
    train.run(train.parse(["--out", str(smoke), "--smoke", "--device", "cpu"]))
    assert torch.load(smoke / "dit.pt", weights_only=True)["counters"][1] == before


def test_the_shipped_model_obeys_on_held_out_combinations():
    engine = Engine("demo", device="cpu", keep_text_encoder=True)
    answers, _ = check.ask(engine, random.Random(0).sample(held_out(), 12))
    shares = check.scores(answers)
    assert shares["colour+motion"] >= 0.9, check.describe(answers)
    assert shares["shape"] >= 0.8, check.describe(answers)
