import json
import sys
from pathlib import Path

import pytest
import torch

import minidit.text.prompts
from minidit.presets import WAN_NEGATIVE_PROMPT, T5Config
from minidit.text.prompts import clean_prompt, encode_prompts
from minidit.text.t5 import T5Encoder
from minidit.text.tokenizers import END, PAD, SentencePiece

MODEL = Path(minidit.text.prompts.__file__).parents[1] / "demo" / "tokenizer" / "spiece.model"


def seeded_encoder(vocab):
    g = torch.Generator().manual_seed(0)
    encoder = T5Encoder(T5Config(vocab, width=32, mlp_width=48, heads=4, head_width=8, depth=2))
    for p in encoder.parameters():
        p.data.copy_(torch.randn(p.shape, generator=g) * p.shape[-1] ** -0.5 + (p.ndim == 1))
    return encoder


def test_cleaning_reproduces_the_recording(goldens):
    cases = json.loads((goldens("wan_prompt_clean") / "cases.json").read_text(encoding="utf-8"))["cases"]
    assert [clean_prompt(text) for text, _ in cases] == [cleaned for _, cleaned in cases]


def test_cleaning_resolves_entities_twice_itself():
    """ftfy resolves them too, but not in a text with a "<"."""
    assert clean_prompt("<b> caf&amp;eacute; &amp;amp; bar") == "<b> café & bar"
    assert clean_prompt("<b> &amp;amp;amp;") == "<b> &amp;"


def test_cleaning_makes_the_commas_of_the_negative_prompt_ascii():
    cleaned = clean_prompt(WAN_NEGATIVE_PROMPT)
    assert cleaned == WAN_NEGATIVE_PROMPT.replace("，", ",") != WAN_NEGATIVE_PROMPT


def test_cleaning_without_ftfy_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises(ImportError, match="ftfy"):
        clean_prompt("a red circle")


def test_states_equal_padding_masking_and_cutting():
    """What the release does: pad to a fixed length, mask, encode in one batch, cut to the true lengths."""
    tokenizer = SentencePiece(MODEL)
    encoder = seeded_encoder(tokenizer.vocab)
    prompts = ["a red circle  moves left to right", "", WAN_NEGATIVE_PROMPT, "it’s a &lt;b&gt;", "red " * 300]
    rows = [tokenizer.encode(clean_prompt(prompt), 100) for prompt in prompts]
    ids = torch.tensor([row + [PAD] * (100 - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (100 - len(row)) for row in rows])
    with torch.no_grad():
        padded = encoder(ids, mask)
    states = encode_prompts(prompts, tokenizer, encoder, max_len=100, device="cpu")
    assert [len(s) for s in states] == [len(row) for row in rows]
    assert states[-1].shape == (100, 32)  # a long prompt is cut
    for state, out in zip(states, padded, strict=True):
        assert (state - out[: len(state)]).abs().max() < 1e-5  # fp32 sums of other lengths


def test_empty_prompt_is_the_end_token_alone():
    tokenizer = SentencePiece(MODEL)
    encoder = seeded_encoder(tokenizer.vocab)
    (state,) = encode_prompts([" \n"], tokenizer, encoder, max_len=32, device="cpu")
    end = torch.tensor([[END]])
    assert torch.equal(state, encoder(end, torch.ones_like(end))[0])
    assert state.shape == (1, 32) and not state.requires_grad


def test_states_have_the_dtype_of_the_encoder():
    tokenizer = SentencePiece(MODEL)
    encoder = seeded_encoder(tokenizer.vocab).bfloat16()
    (state,) = encode_prompts(["a red circle"], tokenizer, encoder, max_len=32, device="cpu")
    assert state.dtype == torch.bfloat16 and state.isfinite().all()


def test_a_bare_string_is_refused():
    with pytest.raises(TypeError, match="must be a list of strings, got the string 'a red circle'"):
        encode_prompts("a red circle", None, None, max_len=32, device="cpu")
