"""Train the transformer and the text encoder jointly, on latents, to predict the flow velocity.

x_s = (1 - s) x0 + s noise,   v = noise - x0,   t = 1000 s,   s = sigmoid(N(0.4, 1.2))
"""

import random
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from benchmarks.demo_model.captions import encode
from benchmarks.demo_model.data import Clip, write_caption
from benchmarks.demo_model.state import Stage, fit, save, update
from minidit.models.wan import SelfAttention, Wan, WanBlock, split_heads
from minidit.text.t5 import T5Encoder
from minidit.text.tokenizers import SentencePiece
from minidit_kernels.modulate import gated_residual, modulate
from minidit_kernels.qk_norm_rope import rope

LR, EMA, BATCH = 1.2e-3, 0.999, 64
NO_CAPTION = 0.1  # share of captions left empty, which is what guidance needs


@torch.no_grad()
def initialise(model: Wan, encoder: T5Encoder) -> None:
    """Xavier linears, small embeddings, and a head that predicts nothing at first."""
    for module in [*model.modules(), *encoder.modules()]:
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for block in encoder.blocks:
        block.attn.qkv.weight[: block.attn.out.in_features] *= (
            encoder.config.head_width**-0.5
        )  # T5 scores are unscaled
        nn.init.normal_(block.attn.positions.weight, std=0.1)
    nn.init.normal_(encoder.embed.weight, std=1.0)
    nn.init.zeros_(model.head.out.weight)


def text_states(encoder: T5Encoder, ids: Tensor, mask: Tensor) -> list[Tensor]:
    """What sampling gives the model: each prompt's own rows, end token included. -> one (M_i, D) each"""
    states = encoder(ids, mask)
    return [row[:length] for row, length in zip(states, mask.sum(1).tolist(), strict=True)]


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Two products around a softmax: on a CPU in bf16 its backward is several times faster than SDPA's."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # (B, N, L, M)
    return rearrange(scores.softmax(-1).to(v.dtype) @ v, "b n l k -> b l (n k)")


def self_attention(attn: SelfAttention, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    q, k, v = attn.qkv(x).chunk(3, dim=-1)  # (B, L, D)
    q, k = (rope(split_heads(y, attn.heads), cos, sin).to(v.dtype) for y in (attn.q_norm(q), attn.k_norm(k)))
    return attn.out(plain_attention(q, k, split_heads(v, attn.heads)))


BlockFn = Callable[[WanBlock, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def run_block(
    block: WanBlock, h: Tensor, mod: Tensor, cos: Tensor, sin: Tensor, k: Tensor, v: Tensor
) -> Tensor:
    """WanBlock.forward with plain attention and no seams for caching; a test holds the two equal.

    h (B, L, D) · mod (B, 6, D) · cos, sin (L, K/2) · k, v of the text (B, N, M, K) -> (B, L, D)
    """
    shift1, scale1, gate1, shift2, scale2, gate2 = (block.mod + mod).unsqueeze(2).unbind(1)  # six (B, 1, D)
    x = modulate(h, scale1, shift1, eps=block.eps)  # (B, L, D)
    h = gated_residual(h, gate1, self_attention(block.attn, x, cos, sin))
    q = split_heads(block.cross.q_norm(block.cross.q(block.norm3(h, h.dtype))), block.cross.heads)
    h = h + block.cross.out(plain_attention(q, k, v))
    return gated_residual(h, gate2, block.mlp(modulate(h, scale2, shift2, eps=block.eps)))


def predict(model: Wan, x: Tensor, t: Tensor, text: list[Tensor], block_fn: BlockFn) -> Tensor:
    """Wan.forward for training. x (B, C, T, H, W) · t (B,) -> velocity like x"""
    context = model.prepare(text, tuple(x.shape[2:]), branches=("cond",) * len(x))
    h, cond = model.embed(x, t, context)
    for k, block in enumerate(model.blocks):
        h = block_fn(block, h, cond.mod, *context.rope, *context.text[k])
    return model.head(h, cond)


def velocity_loss(
    model: Wan,
    x0: Tensor,
    text: list[Tensor],
    generator: torch.Generator,
    block_fn: BlockFn = run_block,
) -> Tensor:
    """x0 (B, C, T, H, W), normalised · text from text_states -> scalar"""
    noise = torch.randn(x0.shape, generator=generator, device=x0.device)
    level = torch.randn(len(x0), generator=generator, device=x0.device)
    sigma = torch.sigmoid(0.4 + 1.2 * level)
    at = sigma[:, None, None, None, None]
    velocity = predict(model, (1 - at) * x0 + at * noise, 1000 * sigma, text, block_fn)
    return F.mse_loss(velocity, noise - x0)


def word(clips: list[Clip], rng: random.Random) -> list[str]:
    """Fresh captions; a tenth are empty."""
    captions = [write_caption((c.colour, c.shape, c.motion), c.size, c.background, rng) for c in clips]
    return ["" if rng.random() < NO_CAPTION else caption for caption in captions]


def train_dit(
    stage: Stage,
    path: Path,
    latents: Tensor,
    clips: list[Clip],
    tokenizer: SentencePiece,
    *,
    batch: int = BATCH,
    compiled: bool = False,
    budget_s: float | None = None,
    log_every: int = 50,
    save_every: int = 200,
) -> None:
    """Run the stage to its total. latents (n, C, t, h, w), normalised, of the clips, in the same order"""
    model, encoder = stage.modules["transformer"], stage.modules["text_encoder"]
    block_fn = torch.compile(run_block) if compiled else run_block
    is_new, began, device = stage.seen == 0, time.time() - stage.seconds, latents.device
    step, meter = 0, []
    while stage.seen < stage.total:
        picked = [stage.rng.randrange(len(clips)) for _ in range(batch)]
        ids, mask = encode(word([clips[i] for i in picked], stage.rng), tokenizer)
        with torch.autocast(device.type, torch.bfloat16):
            text = text_states(encoder, ids.to(device), mask.to(device))
            loss = velocity_loss(model, latents[picked].float(), text, stage.generator, block_fn)
        update(stage, loss, batch, lr=LR, warmup=100 * BATCH, ema=EMA)
        meter.append(loss.item())
        step, stage.seconds = step + 1, time.time() - began
        if budget_s and is_new and step == 20:
            fit(stage, budget_s)
        if step % log_every == 0 or stage.seen >= stage.total:
            done = f"{stage.seen}/{stage.total} samples · {stage.seconds:.0f} s"
            print(f"dit · {done} · loss {sum(meter) / len(meter):.4f}", flush=True)
            meter = []
        if step % save_every == 0:
            save(stage, path)
    save(stage, path)
