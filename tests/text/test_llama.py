import pytest
import torch

from minidit.presets import LlamaConfig
from minidit.text.llama import UNUSED_LAYERS, LlamaEncoder, rotate
from tests.recordings.base import load_upstream
from tests.tensors import randn, random, rel

REL = 2e-5  # fp32 on both sides: nothing but the order of sums
CONFIG = LlamaConfig(vocab=50, width=32, mlp_width=48, heads=4, kv_heads=2, depth=2)


def ids(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, CONFIG.vocab, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_equals_the_states_that_the_release_takes_from_transformers():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2 + UNUSED_LAYERS,
        num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )  # fmt: skip
    oracle = transformers.LlamaModel(config).eval()
    model = load_upstream(LlamaEncoder(CONFIG), CONFIG, oracle.state_dict())
    tokens = ids(2, 40)
    mask = torch.ones_like(tokens)
    mask[1, 25:] = 0  # padding on the right
    states = oracle(tokens, attention_mask=mask, output_hidden_states=True).hidden_states[-3]
    assert rel(model(tokens[:1]), states[:1]) < REL
    assert rel(model(tokens[1:, :25]), states[1:, :25]) < REL


def test_what_follows_a_token_does_not_change_its_state():
    model, tokens = random(LlamaEncoder(CONFIG)), ids(1, 12)
    assert rel(model(tokens[:, :7]), model(tokens)[:, :7]) < REL


def test_positions_pair_channels_half_a_head_apart():
    x = randn(1, 1, 1, 4)
    angle = torch.tensor([[0.5, 2.0]])
    a, b, c, d = x.flatten().tolist()
    cos, sin = angle.cos(), angle.sin()
    want = [
        a * cos[0, 0] - c * sin[0, 0], b * cos[0, 1] - d * sin[0, 1],
        c * cos[0, 0] + a * sin[0, 0], d * cos[0, 1] + b * sin[0, 1],
    ]  # fmt: skip
    assert rotate(x, cos, sin).flatten().tolist() == pytest.approx([float(w) for w in want], rel=1e-5)


def test_ids_without_a_batch_are_refused():
    with pytest.raises(ValueError, match=r"ids are \(7,\), wanted \(B, M\)"):
        random(LlamaEncoder(CONFIG))(ids(7))
