"""Encode drawn clips once: the transformer trains on latents, and on captions worded anew at every visit."""

import os
import random
import time
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.demo_model.data import Clip, draw, sample_clips, trained
from minidit.vae.wan import WanVAE

Statistics = tuple[tuple[float, ...], tuple[float, ...]]  # mean and std of every latent channel


def training_clips(n: int, seed: int) -> list[Clip]:
    """The clips behind the latents, in order; never a held-out combination."""
    return sample_clips(n, trained(), random.Random(seed))


@torch.no_grad()
def encode_clips(
    vae: WanVAE, clips: list[Clip], path: Path, *, batch: int = 8, save_every: int = 64
) -> Tensor:
    """Posterior means, not normalised; goes on where the file at `path` ends. -> (n, C, t, h, w) fp16"""
    device = next(vae.parameters()).device
    parts = [torch.load(path, weights_only=True)] if path.exists() else []
    began, first = time.time(), len(parts[0]) if parts else 0
    for i, at in enumerate(range(first, len(clips), batch)):
        video, _ = draw(clips[at : at + batch], device=device)
        with torch.autocast(video.device.type, torch.bfloat16):
            mu, _ = vae.moments(video.contiguous(memory_format=torch.channels_last_3d), chunk=None)
        parts.append(mu.half().cpu())
        if i % save_every == save_every - 1 or at + batch >= len(clips):
            write(torch.cat(parts), path)
            print(f"latents · {at + batch}/{len(clips)} clips · {time.time() - began:.0f} s", flush=True)
    return torch.cat(parts)[: len(clips)]


def write(latents: Tensor, path: Path) -> None:
    part = path.with_suffix(".part")
    torch.save(latents, part)
    os.replace(part, path)


def statistics(latents: Tensor) -> Statistics:
    """Mean and standard deviation of every latent channel. latents (n, C, t, h, w)"""
    x = latents.float().transpose(0, 1).flatten(1)  # (C, n * t * h * w)
    return tuple(x.mean(1).tolist()), tuple(x.std(1).tolist())


def normalise(latents: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """What the transformer sees. latents (n, C, t, h, w) -> the same shape, fp16"""
    mean, std = (torch.tensor(x)[:, None, None, None] for x in (mean, std))
    return ((latents.float() - mean) / std).half()
