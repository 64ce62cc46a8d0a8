"""Prompts to what HunyuanVideo is conditioned on: states of a language model, and CLIP's pooled vector.

Follows Tencent-Hunyuan/HunyuanVideo hyvideo/text_encoder and constants.py. The language model reads the
prompt inside a template that tells it to describe a video; what it thinks of the template is cut off again.
A departure: one frame alone is asked for with the same template, where the original has another for images.
"""

from typing import Protocol

import torch
from torch import Tensor, nn

# Input of the language model, to the letter; the missing spaces are the release's.
VIDEO_TEMPLATE = (
    "<|start_header_id|>system<|end_header_id|>\n\nDescribe the video by detailing the following aspects: "
    "1. The main content and theme of the video."
    "2. The color, shape, size, texture, quantity, text, and spatial relationships of the objects."
    "3. Actions, events, behaviors temporal relationships, physical movement changes of the objects."
    "4. background environment, light, style and atmosphere."
    "5. camera angles, movements, and transitions used in the video:<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
)


class Tokenizer(Protocol):
    def encode(self, text: str, max_len: int) -> list[int]: ...


def template_length(tokenizer: Tokenizer) -> int:
    """How many tokens stand before the prompt: those that all prompts share (95 in the release)."""
    before = VIDEO_TEMPLATE.split("{}")[0]
    return len(tokenizer.encode(before, len(before) + 1))


def video_ids(prompt: str, tokenizer: Tokenizer, max_len: int) -> list[int]:
    """Ids of the template with the prompt in it, of which at most max_len behind the template's start."""
    return tokenizer.encode(VIDEO_TEMPLATE.format(prompt.strip()), template_length(tokenizer) + max_len)


@torch.no_grad()
def encode_states(
    prompt: str, tokenizer: Tokenizer, encoder: nn.Module, *, max_len: int, device: torch.device | str
) -> Tensor:
    """The language model's states of a prompt and of the token that ends it -> (M, D), 1 <= M <= max_len.

    The release pads to max_len and masks: attention is causal, so padding behind the prompt changes nothing.
    A prompt that is too long loses its end, the end token too.
    """
    ids = video_ids(prompt, tokenizer, max_len)
    return encoder(torch.tensor([ids], device=device))[0, template_length(tokenizer) :]


@torch.no_grad()
def encode_pooled(
    prompt: str, tokenizer: Tokenizer, encoder: nn.Module, *, max_len: int, device: torch.device | str
) -> Tensor:
    """CLIP's vector of a prompt -> (D,)"""
    ids = tokenizer.encode(prompt.strip(), max_len)
    return encoder(torch.tensor([ids], device=device))[0]
