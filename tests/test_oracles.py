"""The weights that ship give the same numbers in diffusers' and transformers' own classes.

Our tensors go back under the libraries' names through the converter's tables, and are loaded strictly.
"""

import pytest
import torch
from torch import nn

import minidit
from minidit.generate import Engine
from minidit.text.tokenizers import SentencePiece
from tests.tensors import randn, rel
from weights_convert.layouts import LAYOUTS
from weights_convert.names import fit

PROMPT = "a red circle moves left to right"
REL = 2e-5  # fp32 on both sides: nothing but the order of sums; measured 4e-6 (decoder), the others 3e-7


@pytest.fixture(scope="module")
def demo() -> Engine:
    return minidit.load("demo", device="cpu", dtype="fp32")


def fill(oracle: nn.Module, engine: Engine, component: str, origin: str) -> nn.Module:
    """Load our weights of a component into a library's class, with nothing missing and nothing left over."""
    layout = next(item for item in LAYOUTS if (item.component, item.origin) == (component, origin))
    ours = engine.module(component).state_dict()
    theirs = {name: tuple(t.shape) for name, t in oracle.state_dict().items()}
    config = engine.manifest.components[component].config
    found = fit(
        theirs, {n: tuple(t.shape) for n, t in ours.items()}, layout.table(config, theirs), layout.drop
    )
    assert found.problems == []
    state = {}
    for name, pieces in found.pieces.items():
        for piece, part in zip(pieces, ours[name].chunk(pieces[0].parts), strict=True):
            state[piece.upstream] = part.reshape(theirs[piece.upstream])
    for name, reason in found.dropped.items():
        assert reason.startswith("a copy of ")
        state[name] = state[reason.removeprefix("a copy of ")]
    oracle.load_state_dict(state, strict=True)
    return oracle.eval()


@torch.no_grad()
def test_transformer_equals_diffusers(demo):
    diffusers = pytest.importorskip("diffusers")
    c = demo.manifest.components["transformer"].config
    oracle = diffusers.WanTransformer3DModel(
        patch_size=c.patch,
        num_attention_heads=c.heads,
        attention_head_dim=c.width // c.heads,
        in_channels=c.channels,
        out_channels=c.channels,
        text_dim=c.text_width,
        freq_dim=c.freq_width,
        ffn_dim=c.mlp_width,
        num_layers=c.depth,
        eps=c.eps,
    )
    fill(oracle, demo, "transformer", "diffusers")
    text = [randn(9, c.text_width, seed=1), randn(1, c.text_width, seed=2)]
    padded = torch.stack([nn.functional.pad(t, (0, 0, 0, c.text_len - len(t))) for t in text])
    x, t = (
        randn(2, c.channels, 5, 8, 10),
        torch.tensor([900.0, 20.0]),
    )  # longer and wider than it was trained on
    model = demo.module("transformer")
    got = model(x, t, model.prepare(text, x.shape[2:], branches=("a", "b")))
    assert rel(got, oracle(x, t, padded).sample) < REL


@torch.no_grad()
def test_vae_equals_diffusers(demo):
    diffusers = pytest.importorskip("diffusers")
    c = demo.manifest.components["vae"].config
    oracle = diffusers.AutoencoderKLWan(
        base_dim=c.base,
        z_dim=c.latent,
        dim_mult=list(c.multipliers),
        num_res_blocks=c.res_blocks,
        temperal_downsample=list(c.temporal_down),
        latents_mean=list(c.mean),
        latents_std=list(c.std),
    )
    fill(oracle, demo, "vae", "diffusers")
    vae, video = demo.module("vae"), randn(1, 3, 9, 32, 48, seed=3).clamp(-1, 1)
    mu, logvar = vae.moments(video)
    found = oracle.encode(video).latent_dist
    assert rel(mu, found.mean) < REL
    assert rel(logvar.clamp(-30, 20), found.logvar) < REL
    mean, std = (
        torch.tensor(v).view(-1, 1, 1, 1) for v in (oracle.config.latents_mean, oracle.config.latents_std)
    )
    latents = randn(1, c.latent, 3, 4, 6, seed=4)
    assert rel(vae.encode(video), (found.mean - mean) / std) < REL
    assert rel(vae.decode(latents).clamp(-1, 1), oracle.decode(latents * std + mean).sample) < REL


@torch.no_grad()
def test_text_encoder_equals_transformers(demo):
    transformers = pytest.importorskip("transformers")
    c = demo.manifest.components["text_encoder"].config
    config = transformers.UMT5Config(
        vocab_size=c.vocab,
        d_model=c.width,
        d_kv=c.head_width,
        d_ff=c.mlp_width,
        num_heads=c.heads,
        num_layers=c.depth,
        relative_attention_num_buckets=c.buckets,
        relative_attention_max_distance=c.max_distance,
        layer_norm_epsilon=c.eps,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    oracle = fill(transformers.UMT5EncoderModel(config), demo, "text_encoder", "transformers")
    tokenizer = SentencePiece(demo.folder / demo.manifest.components["tokenizer"].files[0].name)
    rows = [tokenizer.encode(text, 200) for text in (PROMPT, "", " and ".join([PROMPT] * 14))]
    longest = max(len(row) for row in rows)
    assert longest > 64  # far enough for the logarithmic buckets
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    got, want = demo.module("text_encoder")(ids, mask), oracle(ids, attention_mask=mask).last_hidden_state
    assert rel(got[mask.bool()], want[mask.bool()]) < REL
