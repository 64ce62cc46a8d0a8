import re

import pytest
import torch
from safetensors.torch import load_file

from minidit.presets import T5Config
from minidit.text.t5 import T5Encoder, position_buckets
from tests.tensors import rel

TINY = T5Config(vocab=40, width=32, mlp_width=48, heads=4, head_width=8, depth=2)

WAN_NAMES = {
    "token_embedding.": "embed.",
    "attn.o.": "attn.out.",
    "pos_embedding.embedding.": "attn.positions.",
    "ffn.gate.0.": "mlp.gate.",
    "ffn.fc1.": "mlp.up.",
    "ffn.fc2.": "mlp.down.",
    r"^norm\.": "norm_out.",
}
TRANSFORMERS_NAMES = {
    "^encoder.": "",
    "^shared.": "embed.",
    "^embed_tokens.": "embed.",
    "^block.": "blocks.",
    "layer.0.layer_norm.": "norm1.",
    "layer.1.layer_norm.": "norm2.",
    "layer.0.SelfAttention.": "attn.",
    "layer.1.DenseReluDense.": "mlp.",
    "attn.o.": "attn.out.",
    "relative_attention_bias.": "positions.",
    "wi_0.": "gate.",
    "wi_1.": "up.",
    "wo.": "down.",
    "final_layer_norm.": "norm_out.",
}


def convert(weights, names):
    """Upstream's tensors under our names, with q, k and v in one."""
    ours = {}
    for name, tensor in weights.items():
        for theirs, replacement in names.items():
            name = re.sub(theirs, replacement, name)
        ours[name] = tensor
    for q in [name for name in ours if name.endswith("attn.q.weight")]:
        q_k_v = [ours.pop(q.replace(".q.", f".{letter}.")) for letter in "qkv"]
        ours[q.replace(".q.", ".qkv.")] = torch.cat(q_k_v)
    return ours


def seeded_encoder(config, seed):
    """An encoder of weights that keep the softmax away from both one-hot and uniform."""
    g = torch.Generator().manual_seed(seed)
    encoder = T5Encoder(config)
    with torch.no_grad():
        for p in encoder.parameters():
            scale = p.shape[-1] ** -0.5 if p.ndim == 2 else 0.1
            p.copy_(torch.randn(p.shape, generator=g) * scale + (p.ndim == 1))
        for block in encoder.blocks:
            if block.attn.positions is not None:
                block.attn.positions.weight.mul_(2)
    return encoder.eval()


def padded_batch(g, vocab, lengths):
    """Random ids with padding 0 behind each row's length, and the mask. -> two (B, M) int64"""
    lengths = torch.tensor(lengths)
    mask = (torch.arange(int(lengths.max()))[None, :] < lengths[:, None]).long()
    return torch.randint(3, vocab, mask.shape, generator=g) * mask, mask


@torch.no_grad()
def test_umt5_reproduces_the_recording(goldens):
    folder = goldens("umt5_encoder")
    io = load_file(folder / "io.safetensors")
    encoder = T5Encoder(T5Config(vocab=131, width=48, mlp_width=112, heads=4, head_width=16, depth=3))
    encoder.load_state_dict(convert(load_file(folder / "weights.safetensors"), WAN_NAMES))
    # fp32 rounding only; exact GELU instead of its tanh form would change 3e-4
    assert rel(encoder(io["in.ids"], io["in.mask"]), io["out.hidden"]) < 1e-5


@torch.no_grad()
def test_t5_v1_1_reproduces_the_recording(goldens):
    folder = goldens("t5_v1_1_encoder")
    io = load_file(folder / "io.safetensors")
    config = T5Config(
        vocab=900, width=48, mlp_width=96, heads=4, head_width=16, depth=3, shared_positions=True
    )
    encoder = T5Encoder(config)
    encoder.load_state_dict(convert(load_file(folder / "weights.safetensors"), TRANSFORMERS_NAMES))
    out = encoder(io["in.input_ids"], io["in.attention_mask"])
    assert rel(out, io["out.last_hidden_state"]) < 1e-5  # fp32 rounding only


@torch.no_grad()
def test_t5_with_and_without_mask_reproduces_the_recording(goldens):
    folder = goldens("t5_encoder")
    io = load_file(folder / "io.safetensors")
    config = T5Config(
        vocab=150, width=64, mlp_width=112, heads=4, head_width=16, depth=4, shared_positions=True
    )
    encoder = T5Encoder(config)
    encoder.load_state_dict(convert(load_file(folder / "weights.safetensors"), TRANSFORMERS_NAMES))
    ids, mask = io["in.input_ids"], io["in.attention_mask"]
    unmasked, masked, valid = encoder(ids, torch.ones_like(mask)), encoder(ids, mask), mask.bool()
    assert rel(unmasked, io["out.last_hidden_state"]) < 1e-5  # fp32 rounding only
    assert rel(masked[valid], io["out.last_hidden_state_masked"][valid]) < 1e-5


@pytest.mark.parametrize("family", ["UMT5", "T5"])
@torch.no_grad()
def test_encoder_equals_transformers(family):
    transformers = pytest.importorskip("transformers")
    g = torch.Generator().manual_seed(0)
    names = dict(d_model=32, d_ff=48, num_heads=4, d_kv=8, num_layers=2, vocab_size=40, dropout_rate=0.0)
    config = getattr(transformers, f"{family}Config")(**names, feed_forward_proj="gated-gelu")
    oracle = getattr(transformers, f"{family}EncoderModel")(config).eval()
    for name, p in oracle.named_parameters():
        scale = 1 if "bias" in name else 0.7 * p.shape[-1] ** -0.5
        p.copy_(torch.randn(p.shape, generator=g) * scale + (p.ndim == 1))
    encoder = T5Encoder(T5Config(40, 32, 48, 4, 8, 2, shared_positions=family == "T5"))
    encoder.load_state_dict(convert(oracle.state_dict(), TRANSFORMERS_NAMES))
    ids, mask = padded_batch(g, 40, [150, 60])  # 150: beyond the last bucket
    wanted, got = oracle(ids, attention_mask=mask).last_hidden_state, encoder(ids, mask)
    assert (got - wanted)[mask.bool()].abs().max() < 1e-5  # fp32 rounding only


def test_buckets_follow_the_recording(goldens):
    wanted = load_file(goldens("umt5_encoder") / "io.safetensors")["mid.block_0.rel_bucket_by_offset"]
    buckets = position_buckets(150, 32, 128)
    assert torch.equal(torch.cat([buckets[1:, 0].flip(0), buckets[0]]), wanted)


@pytest.mark.parametrize(
    "distance, bucket", [(0, 0), (7, 7), (8, 8), (15, 9), (16, 10), (32, 12), (64, 14), (127, 15), (199, 15)]
)
def test_buckets_follow_the_definition(distance, bucket):
    buckets = position_buckets(200, 32, 128)
    assert buckets[distance, 0] == bucket  # the key lies before the query
    assert buckets[0, distance] == bucket + 16 * (distance > 0)


@torch.no_grad()
def test_padding_changes_nothing():
    g = torch.Generator().manual_seed(1)
    encoder = seeded_encoder(TINY, seed=1)
    ids, mask = padded_batch(g, 40, [30, 11])
    alone = encoder(ids[1:, :11], mask[1:, :11])
    other_padding = torch.where(mask == 0, torch.full_like(ids, 39), ids)
    assert (encoder(ids, mask)[1, :11] - alone[0]).abs().max() < 1e-5  # fp32 sums of other lengths
    assert (encoder(other_padding, mask)[1, :11] - alone[0]).abs().max() < 1e-5


@torch.no_grad()
def test_a_row_of_padding_alone_is_finite():
    ids = torch.zeros(1, 4, dtype=torch.int64)
    assert seeded_encoder(TINY, seed=2)(ids, ids).isfinite().all()


@torch.no_grad()
def test_bf16_stays_close_to_fp32():
    g = torch.Generator().manual_seed(3)
    narrow = seeded_encoder(TINY, seed=3).bfloat16()
    wide = T5Encoder(TINY)
    wide.load_state_dict(narrow.state_dict())
    ids, mask = padded_batch(g, 40, [60, 25])
    got, wanted, valid = narrow(ids, mask), wide(ids, mask), mask.bool()
    assert got.dtype == torch.bfloat16
    error = (got.float() - wanted)[valid].norm() / wanted[valid].norm()
    assert error < 0.02  # rms, 0.012 to 0.015 over twenty seeds; transformers in bf16: 0.014 to 0.018


@torch.no_grad()
def test_bf16_softmax_is_fp32():
    """Scores of 512 and 513 are one number in bf16; in fp32 the keys get 1 / (1 + e) and e / (1 + e)."""
    attn = T5Encoder(T5Config(3, 1, 1, 1, 1, 1)).bfloat16().blocks[0].attn
    attn.qkv.weight.copy_(torch.tensor([[0.0], [0.0], [1.0]]))  # values are the inputs, scores the bias alone
    attn.out.weight.fill_(1)
    x = torch.tensor([[[0.0], [1.0]]], dtype=torch.bfloat16)
    bias = torch.tensor([512.0, 513.0]).expand(1, 2, 2)
    out = attn(x, bias, torch.zeros(1, 1, 1, 2, dtype=torch.bool))
    assert (out.float() - 0.7311).abs().max() < 2e-3  # one bf16 rounding; equal scores would give 0.5


@pytest.mark.parametrize("shared", [False, True])
def test_parameters_carry_our_names(shared):
    layer = ["attn.out", "attn.qkv", "mlp.down", "mlp.gate", "mlp.up", "norm1", "norm2"]
    names = {"embed.weight", "norm_out.weight", "blocks.0.attn.positions.weight"}
    names |= {f"blocks.{i}.{part}.weight" for i in range(2) for part in layer}
    names |= set() if shared else {"blocks.1.attn.positions.weight"}
    state = T5Encoder(T5Config(40, 32, 48, 4, 6, 2, shared_positions=shared)).state_dict()
    assert set(state) == names
    assert state["blocks.0.attn.qkv.weight"].shape == (3 * 4 * 6, 32)
    assert state["blocks.0.attn.positions.weight"].shape == (32, 4)


def test_mask_of_another_shape_is_refused():
    ids = torch.zeros(2, 5, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"share one shape .* \(2, 5\) and \(2, 4\)"):
        T5Encoder(TINY)(ids, ids[:, :4])
