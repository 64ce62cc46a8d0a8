"""Train the transformer and the text encoder jointly, on latents, to predict the flow velocity.

x_s = (1 - s) x0 + s noise,   v = noise - x0,   t = 1000 s,   s = sigmoid(N(0.4, 1.2))
"""

import random
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.demo_model.captions import encode
from benchmarks.demo_model.data import Clip, write_caption
from benchmarks.demo_model.state import Stage, save, update
from minidit.models.wan import Wan
from minidit.text.t5 import T5Encoder
from minidit.text.tokenizers import SentencePiece

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


def velocity_loss(model: Wan, x0: Tensor, text: list[Tensor], generator: torch.Generator) -> Tensor:
    """x0 (B, C, T, H, W), normalised · text from text_states -> scalar"""
    noise = torch.randn(x0.shape, generator=generator, device=x0.device)
    level = torch.randn(len(x0), generator=generator, device=x0.device)
    sigma = torch.sigmoid(0.4 + 1.2 * level)
    at = sigma[:, None, None, None, None]
    context = model.prepare(text, tuple(x0.shape[2:]), branches=("cond",) * len(x0), attention="math")
    velocity = model((1 - at) * x0 + at * noise, 1000 * sigma, context)
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
    log_every: int = 50,
    save_every: int = 200,
    on_save: Callable[[Stage], None] | None = None,
) -> None:
    """Run the stage to its total. latents (n, C, t, h, w), normalised, of the clips, in the same order"""
    model, encoder = stage.modules["transformer"], stage.modules["text_encoder"]
    device, step, meter, began = latents.device, 0, [], time.time() - stage.seconds
    while stage.seen < stage.total:
        picked = [stage.rng.randrange(len(clips)) for _ in range(batch)]
        ids, mask = encode(word([clips[i] for i in picked], stage.rng), tokenizer)
        with torch.autocast(device.type, torch.bfloat16):
            text = text_states(encoder, ids.to(device), mask.to(device))
            loss = velocity_loss(model, latents[picked].float(), text, stage.generator)
        update(stage, loss, batch, lr=LR, warmup=100 * BATCH, ema=EMA)
        meter.append(loss.item())
        step, stage.seconds = step + 1, time.time() - began
        if step % log_every == 0 or stage.seen >= stage.total:
            done = f"{stage.seen}/{stage.total} samples · {stage.seconds:.0f} s"
            print(f"dit · {done} · loss {sum(meter) / len(meter):.4f}", flush=True)
            meter = []
        if step % save_every == 0:
            save(stage, path)
            if on_save:
                on_save(stage)
    save(stage, path)
