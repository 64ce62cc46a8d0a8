"""Train the video autoencoder on drawn clips, in full-sequence form (which the streaming form equals).

From scratch the start decides: a VAE with default initialisation stays gray. `initialise` makes an image
autoencoder out of it, inflated over time; clips grow from single frames to all 17. Most steps see a crop
around the object, since convolutions do not mind and the plain background teaches little.
"""

import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.demo_model.data import FRAMES, SIZE, combinations, draw, sample_clips
from benchmarks.demo_model.state import Stage, fit, save, update
from minidit.vae.wan import Down, ResBlock, Up, WanVAE

LR, TUNE_LR, EMA = 2e-3, 3e-4, 0.99
LATER_SPEED = 2.0  # frames per second over the whole run, as a multiple of those in its first phase
# from this share of the run on: frames, side of the crop, clips per step, weight of the KL term
PHASES = [(0.0, 1, 64, 8, 1e-6), (0.12, 5, 40, 6, 2e-5), (0.3, 17, 40, 3, 1e-4), (0.8, 17, 64, 2, 1e-4)]


@torch.no_grad()
def initialise(vae: WanVAE) -> None:
    """Fan-in normal weights of the last temporal tap only; quarter-scale ends of residual branches."""
    for module in vae.modules():
        if isinstance(module, nn.Conv3d | nn.Conv2d):
            inflate(module, gain=1.0)
    for module in vae.modules():
        if isinstance(module, ResBlock):
            inflate(module.conv1, gain=1.4)
            inflate(module.conv2, gain=0.5)
        if isinstance(module, Down) and module.time_conv is not None:
            average_frames(module.time_conv)
        if isinstance(module, Up) and module.time_conv is not None:
            copy_frames(module.time_conv)
    for quant in (vae.quant, vae.post_quant):
        nn.init.dirac_(quant.weight)
    vae.quant.bias[vae.config.latent :] = -7.0  # log-variance: next to no noise at first


def inflate(conv: nn.Module, gain: float) -> None:
    """An image convolution inside a causal video one: only the tap on the current frame is not zero."""
    tap = torch.empty_like(conv.weight[:, :, -1] if conv.weight.ndim == 5 else conv.weight)
    nn.init.normal_(tap, std=gain / tap[0].numel() ** 0.5)
    nn.init.zeros_(conv.bias)
    if conv.weight.ndim == 4:
        conv.weight.copy_(tap)
    else:
        nn.init.zeros_(conv.weight)
        conv.weight[:, :, -1] = tap


def average_frames(conv: nn.Conv3d) -> None:
    """Time downsampling starts as the mean of the two newest frames."""
    nn.init.zeros_(conv.weight)
    conv.weight[:, :, 1:, 0, 0] = torch.eye(conv.out_channels)[..., None] / 2


def copy_frames(conv: nn.Conv3d) -> None:
    """Time upsampling starts by showing every frame twice."""
    nn.init.zeros_(conv.weight)
    conv.weight[:, :, -1, 0, 0] = torch.eye(conv.in_channels).repeat(2, 1)


def channels_last(vae: WanVAE) -> None:
    """Convolution weights in the layout that kernels like best: a fifth faster on a CPU."""
    for p in vae.parameters():
        if p.ndim >= 4:
            p.data = p.data.contiguous(
                memory_format=torch.channels_last if p.ndim == 4 else torch.channels_last_3d
            )


def crop(video: Tensor, mask: Tensor, side: int, rng: random.Random) -> tuple[Tensor, Tensor]:
    """Cut a window from each clip, near the object. (B, C, T, H, W) -> (B, C, T, side, side)"""
    if side == SIZE:
        return video, mask
    pairs = []
    for clip, shape in zip(video, mask, strict=True):
        weight = shape[0].mean(0) / shape.mean().clamp_min(1e-6) / SIZE**2  # (H, W), sums to one
        position = torch.arange(SIZE, device=video.device).float()
        y, x = (weight.sum(1) * position).sum().item(), (weight.sum(0) * position).sum().item()
        top, left = (round(min(max(at - side / 2 + rng.uniform(-12, 12), 0), SIZE - side)) for at in (y, x))
        pairs.append([part[..., top : top + side, left : left + side] for part in (clip, shape)])
    return torch.stack([p[0] for p in pairs]), torch.stack([p[1] for p in pairs])


def loss_terms(out: Tensor, video: Tensor, mask: Tensor) -> Tensor:
    """L1 + 2 L2, four times as much on the object, and the edges: L1 of spatial differences."""
    weight = 1 + 3 * (F.max_pool3d(mask, (1, 3, 3), 1, (0, 1, 1)) > 0)
    error = out - video
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return (weight * (error.abs() + 2 * error.square())).mean() + 0.5 * edges


def vae_step(
    vae: WanVAE, video: Tensor, mask: Tensor, kl_weight: float, generator: torch.Generator
) -> Tensor:
    """Reconstruction and KL loss of one batch. video (B, 3, T, H, W) -> scalar"""
    with torch.autocast(video.device.type, torch.bfloat16):
        with torch.set_grad_enabled(vae.quant.weight.requires_grad):  # off where the decoder alone is tuned
            mu, logvar = (x.float() for x in vae.moments(video, chunk=None))
        noise = torch.randn(mu.shape, generator=generator, device=mu.device)
        mean, std = vae.statistics(mu.device)  # decode takes normalised latents
        latents = (mu + (logvar.clamp(-20, 10) / 2).exp() * noise - mean) / std
        out = vae.decode(latents, chunk=None).float()
    kl = 0.5 * (mu.square() + logvar.exp() - 1 - logvar).mean()
    return loss_terms(out, video, mask) + kl_weight * kl


@torch.no_grad()
def psnr(vae: WanVAE, video: Tensor) -> Tensor:
    """Of the reconstruction, per clip, in dB. video (B, 3, T, H, W) -> (B,)"""
    with torch.autocast(video.device.type, torch.bfloat16):
        out = vae.decode(vae.encode(video, chunk=None), chunk=None).float().clamp(-1, 1)
    return -10 * ((out - video) / 2).square().flatten(1).mean(1).log10()


def phase(share: float) -> tuple[int, int, int, float]:
    """Frames, side, batch and KL weight at this share of the run."""
    return [rest for start, *rest in PHASES if start <= share][-1]


def train_vae(
    stage: Stage,
    path: Path,
    *,
    tuned: bool,
    budget_s: float | None = None,
    log_every: int = 50,
    save_every: int = 300,
) -> None:
    """Run the stage to its total. tuned: it started from trained weights, so skip the first phases."""
    vae, step, meter = stage.modules["vae"], 0, []
    is_new, began, device = stage.seen == 0, time.time() - stage.seconds, next(vae.parameters()).device
    while stage.seen < stage.total:
        share = stage.seen / stage.total
        frames, side, batch, kl_weight = phase(0.3 + 0.7 * share if tuned else share)
        first = stage.rng.randint(0, FRAMES - frames)
        clips = sample_clips(batch, combinations(), stage.rng)
        video, mask = crop(*draw(clips, list(range(first, first + frames)), device), side, stage.rng)
        loss = vae_step(
            vae, video.contiguous(memory_format=torch.channels_last_3d), mask, kl_weight, stage.generator
        )
        update(stage, loss, batch * frames, lr=TUNE_LR if tuned else LR, warmup=1000, ema=EMA)
        meter.append(loss.item())
        step, stage.seconds = step + 1, time.time() - began
        if budget_s and is_new and step == 20:
            fit(stage, budget_s if tuned else LATER_SPEED * budget_s)
        if step % log_every == 0 or stage.seen >= stage.total:
            done = f"{stage.seen}/{stage.total} frames · {stage.seconds:.0f} s"
            print(f"vae · {done} · T{frames} side {side} · loss {sum(meter) / len(meter):.4f}", flush=True)
            meter = []
        if step % save_every == 0:
            save(stage, path)
    save(stage, path)
