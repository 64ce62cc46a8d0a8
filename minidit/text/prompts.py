"""Prompts to text states: clean, tokenise, encode. Follows Wan-Video/Wan2.1 wan/modules/tokenizers.py."""

import html
from typing import Protocol

import torch
from torch import Tensor, nn

PAD = 0  # in every vocabulary of the T5 family


class Tokenizer(Protocol):
    """What encode_prompts needs of a tokenizer."""

    def encode(self, text: str, max_len: int) -> list[int]: ...


def clean_prompt(text: str) -> str:
    """Mend broken unicode, resolve html entities (twice), turn every run of whitespace into one space.

    ftfy also turns full-width letters and punctuation into ASCII (the commas of Wan's negative prompt) and
    straightens curly quotes: without it the ids differ, so there is no way around it.
    """
    import ftfy

    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split())


@torch.no_grad()
def encode_padded(
    prompts: list[str], tokenizer: Tokenizer, encoder: nn.Module, *, length: int, device: torch.device | str
) -> list[Tensor]:
    """The text states of each prompt as it is, padding attended to like text -> one (length, D) per prompt.

    CogVideoX was trained with every row of these. A longer prompt is cut. Follows diffusers'
    CogVideoXPipeline; the SAT code has zeros in place of the states of an empty prompt.
    """
    if isinstance(prompts, str):
        raise TypeError(f"prompts must be a list of strings, got {prompts[:40]!r}; put it in a list")
    rows = [tokenizer.encode(prompt, length) for prompt in prompts]
    padded = torch.tensor([row + [PAD] * (length - len(row)) for row in rows], device=device)  # (B, length)
    return [encoder(ids[None], torch.ones_like(ids[None]))[0] for ids in padded]


@torch.no_grad()
def encode_prompts(
    prompts: list[str], tokenizer: Tokenizer, encoder: nn.Module, *, max_len: int, device: torch.device | str
) -> list[Tensor]:
    """The text states of each prompt, end token included -> one (M_i, D) per prompt, 1 <= M_i <= max_len.

    The encoder sees each prompt alone and without padding. The release pads to 512, masks and cuts: the same
    numbers for a multiple of the work. An empty prompt is the end token alone.
    """
    if isinstance(prompts, str):
        raise TypeError(
            f"prompts must be a list of strings, got the string {prompts[:40]!r}; put it in a list"
        )
    ids = [tokenizer.encode(clean_prompt(prompt), max_len) for prompt in prompts]
    rows = [torch.tensor([row], device=device) for row in ids]  # (1, M_i) each
    return [encoder(row, torch.ones_like(row))[0] for row in rows]
