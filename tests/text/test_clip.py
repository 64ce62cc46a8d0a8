import pytest
import torch

from minidit.presets import CLIPTextConfig
from minidit.text.clip import CLIPText
from tests.parity import compare
from tests.recordings.base import load_upstream, open_recording
from tests.tensors import random, rel

REL = 2e-5  # fp32 on both sides: nothing but the order of sums
CONFIG = CLIPTextConfig(vocab=50, width=32, mlp_width=48, heads=4, depth=2, positions=16)
START, END = 48, 49


def prompts() -> torch.Tensor:
    """Two prompts of 9 and 4 tokens, padded with end tokens."""
    words = torch.randint(0, START, (2, 16), generator=torch.Generator().manual_seed(0))
    words[:, 0] = START
    words[0, 10:], words[1, 5:] = END, END
    return words


def test_equals_the_recorded_original(goldens):
    assert compare(open_recording(goldens("hunyuan_clip_text"))).error <= 2e-5


@torch.no_grad()
def test_equals_transformers_with_the_same_random_weights():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.CLIPTextConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=16, hidden_act="quick_gelu", eos_token_id=2,
    )  # fmt: skip
    oracle = transformers.CLIPTextModel(config).eval()
    tensors = {f"text_model.{k.removeprefix('text_model.')}": t for k, t in oracle.state_dict().items()}
    model = load_upstream(CLIPText(CONFIG), CONFIG, tensors)
    assert rel(model(prompts()), oracle(prompts()).pooler_output) < REL


def test_the_vector_is_that_of_the_first_end_token():
    model = random(CLIPText(CONFIG))
    states = model.states(prompts())
    assert torch.equal(model(prompts()), torch.stack((states[0, 10], states[1, 5])))


def test_padding_changes_nothing():
    model = random(CLIPText(CONFIG))
    assert rel(model(prompts()[1:, :6]), model(prompts())[1:]) < REL


@pytest.mark.parametrize("shape", [(1, 17), (7,)])
def test_ids_of_the_wrong_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"wanted \(B, M\) with M up to 16; cut the prompt"):
        random(CLIPText(CONFIG))(torch.zeros(shape, dtype=torch.int64))
