import json
import sys
from pathlib import Path

import pytest
import torch

from minidit.presets import CLIPTextConfig, LlamaConfig
from minidit.text.clip import CLIPText
from minidit.text.hunyuan_video import (
    VIDEO_TEMPLATE,
    encode_pooled,
    encode_states,
    template_length,
    video_ids,
)
from minidit.text.llama import LlamaEncoder
from minidit.text.tokenizers import CLIPTokenizer, LlamaTokenizer
from tests.parity import compare
from tests.recordings.base import open_recording
from tests.tensors import random, rel
from tests.text.excerpt import excerpt, renumbered

HERE = Path(__file__).parent
START, EOT = 128000, 128009
PROMPT = "A cat walks on the grass, realistic style."


@pytest.fixture(scope="module")
def llama() -> LlamaTokenizer:
    pytest.importorskip("tokenizers")
    return LlamaTokenizer(HERE / "llama3_excerpt.json")


@pytest.fixture(scope="module")
def clip() -> CLIPTokenizer:
    pytest.importorskip("tokenizers")
    return CLIPTokenizer(HERE / "clip_excerpt.json")


def test_ids_equal_the_recorded_ones(goldens):
    pytest.importorskip("tokenizers")
    assert compare(open_recording(goldens("hunyuan_tokens"))).error == 0


def test_95_tokens_stand_before_every_prompt(llama):
    assert template_length(llama) == 95
    rows = [video_ids(prompt, llama, 256) for prompt in ("", PROMPT, "two words")]
    assert all(row[0] == START and row[:95] == rows[0][:95] for row in rows)
    assert rows[0][95:] == [EOT]  # an empty prompt is the end token alone


def test_space_around_a_prompt_is_cut_off(llama):
    assert video_ids(f" \n{PROMPT}  ", llama, 256) == video_ids(PROMPT, llama, 256)


def test_a_prompt_that_is_too_long_loses_its_end(llama):
    whole, cut = video_ids(PROMPT, llama, 256), video_ids(PROMPT, llama, 5)
    assert len(cut) == 95 + 5 and cut == whole[:100] and EOT not in cut[95:]


def test_a_brace_in_a_prompt_is_a_character(llama):
    assert llama.rules.decode(video_ids("{} {0}", llama, 256)[95:-1]) == "{} {0}"


def test_clip_closes_a_cut_prompt_with_its_end_token(clip):
    ids = clip.encode("the " * 100, 77)
    assert len(ids) == 77 and (ids[0], ids[-1]) == (49406, 49407) and len(set(ids[1:-1])) == 1
    assert clip.encode("", 77) == [49406, 49407]
    assert clip.encode("A CAT", 77) == clip.encode("a  cat\n", 77)


def test_states_are_those_of_the_prompt_alone(llama, clip, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(renumbered(json.loads((HERE / "llama3_excerpt.json").read_text("utf-8")))))
    small = LlamaTokenizer(path)
    vocab = small.rules.get_vocab_size()
    encoder = random(LlamaEncoder(LlamaConfig(vocab, width=32, mlp_width=48, heads=4, kv_heads=2, depth=2)))
    states = encode_states(PROMPT, small, encoder, max_len=256, device="cpu")
    ids = small.encode(VIDEO_TEMPLATE.format(PROMPT), 400)
    assert states.shape == (11, 32) and rel(states, encoder(torch.tensor([ids]))[0, 95:]) == 0
    assert encode_states(PROMPT, small, encoder, max_len=4, device="cpu").shape == (4, 32)


def test_pooled_is_one_vector_of_the_raw_prompt(clip):
    seen = []

    class Watching(CLIPText):
        def forward(self, ids):
            seen.append(ids)
            return super().forward(ids % 50)

    encoder = random(Watching(CLIPTextConfig(vocab=50, width=32, mlp_width=48, heads=4, depth=1)))
    assert encode_pooled(PROMPT, clip, encoder, max_len=77, device="cpu").shape == (32,)
    assert seen[0].tolist() == [clip.encode(PROMPT, 77)]


def test_without_the_library_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(OSError, match=r"pip install 'minidit\[hunyuan\]'"):
        LlamaTokenizer(HERE / "llama3_excerpt.json")


@pytest.mark.parametrize(
    "content, reason",
    [
        (None, "no tokenizer at .*wanted the model's tokenizer.json"),
        ("{}", "is not a tokenizer.json"),
        ((HERE / "clip_excerpt.json"), r"has no <\|begin_of_text\|>; take the text encoder's own"),
    ],
)
def test_files_that_are_no_llama_tokenizer_are_refused(tmp_path, content, reason):
    pytest.importorskip("tokenizers")
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content if isinstance(content, str) else content.read_text("utf-8"))
    with pytest.raises((OSError, ValueError), match=reason):
        LlamaTokenizer(path)


@pytest.mark.parametrize("name, least", [("llama3", 1), ("clip", 2)])
def test_no_room_is_refused(llama, clip, name, least):
    tokenizer = llama if name == "llama3" else clip
    with pytest.raises(ValueError, match=f"give at least {least}"):
        tokenizer.encode("a", least - 1)


def test_an_excerpt_of_an_excerpt_is_the_same():
    """The shipped files hold what makes their own tokens, and nothing that is not needed for it."""
    rules = json.loads((HERE / "clip_excerpt.json").read_text("utf-8"))
    again = excerpt(rules, set(rules["model"]["vocab"].values()))
    assert again["model"]["merges"] == rules["model"]["merges"]
    assert again["model"]["vocab"] == rules["model"]["vocab"]
