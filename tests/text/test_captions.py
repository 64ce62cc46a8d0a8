import json

import pytest
import torch

from minidit.text.captions import clean_caption, encode_captions, with_scores
from tests.recordings.base import open_recording
from tests.recordings.latte import run_text


def test_every_recorded_caption_is_cleaned_alike(goldens):
    pairs = json.loads((goldens("t5_caption_cleaning") / "config.json").read_text())["pairs"]
    assert len(pairs) > 20
    for pair in pairs:
        assert clean_caption(pair["input"]) == pair["latte"]
        assert clean_caption(pair["input"], strip_inside=True) == pair["open_sora"]


@torch.no_grad()
def test_prompts_become_the_recorded_states(goldens, monkeypatch):
    recording = open_recording(goldens("t5_text_pipeline"))
    for name, out in run_text(recording).outs.items():
        want = recording.io[name]
        assert out.shape == want.shape
        assert (out - want).abs().max() <= 1e-5 * want.abs().max()  # ids are equal, states measured 5e-7


def test_scores_are_added_once():
    assert with_scores("a cat") == "a cat aesthetic score: 6.5."
    assert with_scores("a cat aesthetic score: 5.0.") == "a cat aesthetic score: 5.0."


class Letters:
    def encode(self, text: str, max_len: int) -> list[int]:
        return [ord(c) for c in text][: max_len - 1] + [1]


class Positions(torch.nn.Module):
    """States that tell the id, and how many ids were not masked."""

    def forward(self, ids, mask):
        return torch.stack((ids.float(), mask.sum(1, keepdim=True).expand_as(ids).float()), dim=2)


def test_all_states_have_as_many_rows_as_the_first():
    encode = lambda *captions: encode_captions(
        list(captions), Letters(), Positions(), max_len=6, device="cpu"
    )
    first, shorter, longer = encode("abc", "", "abcdefgh")
    assert first.tolist() == [[97, 4], [98, 4], [99, 4], [1, 4]]
    assert shorter.tolist() == [[1, 1], [0, 1], [0, 1], [0, 1]]  # goes on with masked padding
    assert longer.tolist() == [[97, 6], [98, 6], [99, 6], [100, 6]]  # cut
    with pytest.raises(TypeError, match="put it in a list"):
        encode_captions("abc", Letters(), Positions(), max_len=6, device="cpu")
