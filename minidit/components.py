"""The components of a model: which file has a class, and in which dtype it is loaded."""

from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

DEMO = Path(__file__).parent / "demo"
CLASSES = {  # class of a component -> the file that has it
    "HunyuanVideo": "minidit.models.hunyuan_video",
    "LlamaEncoder": "minidit.text.llama",
    "CLIPText": "minidit.text.clip",
    "HunyuanVAE": "minidit.vae.hunyuan_video",
    "Wan": "minidit.models.wan",
    "T5Encoder": "minidit.text.t5",
    "WanVAE": "minidit.vae.wan",
    "Latte": "minidit.models.latte",
    "KLVAE": "minidit.vae.kl",
    "OpenSora": "minidit.models.open_sora",
    "OpenSoraVAE": "minidit.vae.open_sora",
    "CogVideoX": "minidit.models.cogvideox",
    "CogVideoXVAE": "minidit.vae.cogvideox",
}
ALWAYS_FP32 = ("WanVAE", "KLVAE", "OpenSoraVAE")  # as the originals run it: bf16 shows as banding
FP16_FOR_BF16 = ("LlamaEncoder", "CLIPText", "HunyuanVAE")  # as the original runs them


def find_class(class_name: str) -> type[nn.Module]:
    """The module class of a component; only its own file is imported."""
    if class_name not in CLASSES:
        raise ValueError(f"unknown component class {class_name!r}; this model folder is of a newer minidit")
    return getattr(import_module(CLASSES[class_name]), class_name)


def build(class_name: str, config: Any) -> nn.Module:
    """The module of a component without its weights, on the meta device."""
    with torch.device("meta"):
        return find_class(class_name)(config)


def part_dtype(class_name: str, run: torch.dtype) -> torch.dtype:
    """The dtype that a component's weights are loaded in, its keep_fp32 ones aside."""
    if class_name in FP16_FOR_BF16 and run == torch.bfloat16:
        return torch.float16
    return torch.float32 if class_name in ALWAYS_FP32 else run
