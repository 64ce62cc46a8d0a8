"""Latent frames that a run is given: pictures and videos to start from, named as Open-Sora's prompts do.

A prompt may end in JSON: {"reference_path": "first.png;clip.mp4", "mask_strategy": "0;0,1,0,-5,5"}. Follows
hpcaitech/Open-Sora v1.2.0 opensora/utils/inference_utils.py.
"""

import json
import re
from dataclasses import dataclass

import torch
from torch import Tensor

SEGMENT = re.compile(r"\|(\d+)\|")
ALIGN = 5  # latent frames of a whole chunk of the autoencoder: references start at its multiples


@dataclass(frozen=True)
class GivenFrames:
    """What a run starts from, and which of its frames are noisy when."""

    latents: Tensor  # (1, C, T, H, W): the references, and noise elsewhere
    mask: Tensor  # (T,): a frame is noisy from t = 1000 * mask on; 0 is kept, 1 is noise


@dataclass(frozen=True)
class Paste:
    """One group of a mask strategy: `length` frames of a reference, from `first` on, go to `target`."""

    clip: int = 0  # of a video made in several; 0 is the first
    reference: int = 0
    first: int = 0  # counted from the end below 0, like target
    target: int = 0
    length: int = 1
    mask: float = 0.0


@dataclass(frozen=True)
class Request:
    """A prompt taken apart."""

    text: str
    references: tuple[str, ...] = ()
    strategy: str = ""


def read_prompt(prompt: str) -> Request:
    """Take apart a prompt: its text, for the first clip alone, and the JSON at its end."""
    text, _, options = prompt.partition("{")
    known = {"reference_path", "mask_strategy"}
    try:
        values = json.loads("{" + options) if options else {}
    except json.JSONDecodeError as error:
        raise ValueError(f"the prompt's {{{options} is not JSON ({error}); wanted {known}") from None
    if unknown := set(values) - known:
        raise ValueError(f"the prompt's JSON has {', '.join(sorted(unknown))}; known are {', '.join(known)}")
    parts = SEGMENT.split(text)
    text = parts[2] if len(parts) > 1 and not parts[0].strip() else text
    references = tuple(path for path in values.get("reference_path", "").split(";") if path)
    # a reference alone means its first frame, kept
    strategy = values.get("mask_strategy", "") or ("0" if references else "")
    return Request(text.strip(), references, strategy)


def read_strategy(strategy: str) -> tuple[Paste, ...]:
    """The groups of "clip,reference,first,target,length,mask;..."; what is left out has its default."""
    kinds, groups = (int, int, int, int, int, float), []
    for group in filter(None, strategy.split(";")):
        values = group.split(",")
        try:
            if len(values) > len(kinds):
                raise ValueError(f"{len(values)} values")
            groups.append(Paste(*(kind(value) for kind, value in zip(kinds, values, strict=False))))
        except ValueError as error:
            raise ValueError(
                f"mask_strategy {group!r}: {error}; wanted clip,reference,first,target,length,mask"
            ) from None
    if later := [g for g in groups if g.clip]:
        raise ValueError(f"mask_strategy is of clip {later[0].clip}, but one clip is made; use 0")
    return tuple(groups)


def nearest(value: int, count: int, align: int = ALIGN) -> int:
    """The nearest multiple of `align` among `count` frames."""
    below = value // align
    goes_up = value % align > align / 2 and below < count // align - 1
    return (below + goes_up) * align


def paste(
    groups: tuple[Paste, ...], references: list[Tensor], noise: Tensor, align: int = ALIGN
) -> GivenFrames:
    """Lay references over the frames of a run. references (C, t, H, W) each · noise (1, C, T, H, W)"""
    latents, frames = noise.clone(), noise.shape[2]
    mask = torch.ones(frames, device=noise.device)
    for group in groups:
        reference = references[group.reference]
        has = reference.shape[1]
        first = nearest(group.first + has * (group.first < 0), has, align)
        target = nearest(group.target + frames * (group.target < 0), frames, align)
        length = min(group.length, frames - target, has - first)
        latents[0, :, target : target + length] = reference[:, first : first + length]
        mask[target : target + length] = group.mask
    return GivenFrames(latents, mask)


def fit_size(video: Tensor, height: int, width: int) -> Tensor:
    """Scale to cover the size, then cut the middle out. video (3, T, H, W) -> (3, T, height, width)"""
    scale = max(height / video.shape[2], width / video.shape[3])
    size = max(height, round(video.shape[2] * scale)), max(width, round(video.shape[3] * scale))
    frames = torch.nn.functional.interpolate(video.transpose(0, 1), size, mode="bicubic", antialias=True)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return frames[:, :, top : top + height, left : left + width].transpose(0, 1).clamp(-1, 1)
