"""Random checkpoints with the releases' real names, a few hundred kB in all: the recorded layouts, shrunk."""

import json
import re
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

LAYOUTS = Path(__file__).parents[1] / "layouts"

# recorded size -> tiny size; block 0 and 1 of the many are kept
WAN = "Wan2.1-T2V-1.3B", {1536: 48, 9216: 288, 8960: 80, 4096: 32, 256: 16}
VAE = "Wan2.1_VAE", {96: 4, 192: 8, 384: 16, 768: 32, 1152: 48}
UMT5 = "umt5-xxl-encoder", {256384: 50, 4096: 32, 10240: 40, 64: 4}

WAN_JSON = {
    "dim": 48,
    "ffn_dim": 80,
    "num_heads": 3,
    "num_layers": 2,
    "in_dim": 16,
    "text_len": 24,
    "eps": 1e-6,
}
WAN_DIFFUSERS_JSON = {"num_attention_heads": 3, "attention_head_dim": 16, "num_layers": 2, "in_channels": 16}
UMT5_JSON = {"d_model": 32, "d_kv": 8, "num_heads": 4, "num_layers": 2, "relative_attention_max_distance": 64}
VAE_JSON = {"z_dim": 16, "latents_mean": [0.25] * 16, "latents_std": [2.0] * 16}
UNIPC_JSON = {"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True, "flow_shift": 3.0}


def original(part: tuple[str, dict[int, int]], seed: int = 0) -> dict[str, Tensor]:
    """A random state dict under the original release's names."""
    name, sizes = part
    layout = json.loads((LAYOUTS / f"{name}.original.json").read_text())
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn([sizes.get(n, n) for n in shape], generator=generator)
        for name, shape in layout.items()
        if name != "__about__" and not re.match(r"blocks\.([2-9]|\d\d)\.", name)
    }


def repackaged(tensors: dict[str, Tensor], keymap: str) -> dict[str, Tensor]:
    """The same tensors under the names of diffusers or transformers, by the recorded map."""
    names = json.loads((LAYOUTS / "wan.keymap.json").read_text())[keymap]
    renamed = {}
    for name, tensor in tensors.items():
        block = re.match(r"blocks\.(\d+)\.", name)
        number = block[1] if block else ""
        key = re.sub(r"^blocks\.\d+\.", "blocks.{i}.", name) if block else name
        renamed[names[key].replace("{i}", number)] = tensor
    return renamed


def save_original(folder: Path) -> Path:
    """A folder like the original release: safetensors, two pickles, a tokenizer."""
    (folder / "google" / "umt5-xxl").mkdir(parents=True)
    save_file(original(WAN), folder / "diffusion_pytorch_model.safetensors")
    torch.save(original(UMT5), folder / "models_t5_umt5-xxl-enc-bf16.pth")
    torch.save(original(VAE), folder / "Wan2.1_VAE.pth")
    (folder / "config.json").write_text(json.dumps(WAN_JSON))
    (folder / "google" / "umt5-xxl" / "spiece.model").write_bytes(b"not really a tokenizer")
    return folder


def save_diffusers(folder: Path) -> Path:
    """The same weights as a folder in the diffusers layout."""
    for part, tensors, config in (
        ("transformer", repackaged(original(WAN), "dit"), WAN_DIFFUSERS_JSON),
        ("text_encoder", repackaged(original(UMT5), "umt5_encoder"), UMT5_JSON),
        ("vae", repackaged(original(VAE), "vae21"), VAE_JSON),
    ):
        (folder / part).mkdir(parents=True)
        save_file(tensors, folder / part / "model.safetensors")
        (folder / part / "config.json").write_text(json.dumps(config))
    for part, name, content in (
        ("scheduler", "scheduler_config.json", json.dumps(UNIPC_JSON)),
        ("tokenizer", "spiece.model", "not really a tokenizer"),
    ):
        (folder / part).mkdir()
        (folder / part / name).write_text(content)
    return folder


def save_sharded(tensors: dict[str, Tensor], folder: Path, count: int = 3) -> Path:
    """A safetensors checkpoint in shards, with its index."""
    folder.mkdir(parents=True)
    names, weight_map = list(tensors), {}
    for i in range(count):
        file = f"model-{i + 1:05}-of-{count:05}.safetensors"
        save_file({name: tensors[name] for name in names[i::count]}, folder / file)
        weight_map |= dict.fromkeys(names[i::count], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder
