"""A small random HunyuanVideo: the original release's files, shrunk, and the modules alone."""

import json
import re
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from minidit.models.hunyuan_video import HunyuanVideo
from minidit.presets import HunyuanVideoConfig
from tests.tensors import fill, randn, random
from tests.text.excerpt import renumbered
from tests.weights_convert.tiny import LAYOUTS, save_sharded

FOLDER = LAYOUTS / "hunyuan_video"
EXCERPTS = Path(__file__).parent / "text"
CONFIG = HunyuanVideoConfig(
    width=64,
    mlp_width=128,
    heads=2,
    double=2,
    single=3,
    channels=4,
    text_width=24,
    pooled_width=20,
    freq_width=32,
    rope_widths=(4, 14, 14),
)

# recorded layout, recorded size -> tiny size, the blocks that are kept
DIT = (
    "hunyuanvideo-t2v-720p.original",
    {
        3072: 64, 9216: 192, 12288: 128, 18432: 384, 21504: 320, 15360: 192, 6144: 128, 4096: 24, 768: 20,
        256: 32, 128: 32, 16: 4, 64: 16,
    },
    r"double_blocks\.[01]\.|single_blocks\.[012]\.",
)  # fmt: skip
VAE = "hunyuanvideo-vae.original", {128: 4, 256: 8, 512: 12, 16: 4, 32: 8}, ""
LLAMA = "hunyuanvideo-text_encoder.original", {4096: 24, 14336: 32, 1024: 8}, r"model\.layers\.[0123]\."
CLIP = "clip-vit-large-patch14-text.original", {768: 20, 3072: 40}, r"text_model\.encoder\.layers\.[01]\."

VAE_JSON = {"latent_channels": 4, "norm_num_groups": 2, "scaling_factor": 0.5, "layers_per_block": 2}
LLAMA_JSON = {"architectures": ["LlamaForCausalLM"], "num_attention_heads": 3, "num_key_value_heads": 1}
CLIP_JSON = {"architectures": ["CLIPModel"], "text_config": {"num_attention_heads": 2}}


def tiny(seed: int = 1) -> HunyuanVideo:
    return random(HunyuanVideo(CONFIG), seed)


def text(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """What prepare takes of one prompt."""
    return randn(rows, CONFIG.text_width, seed=seed), randn(CONFIG.pooled_width, seed=seed + 100)


def original(part: tuple[str, dict[int, int], str], seed: int = 0, **sizes: int) -> dict[str, Tensor]:
    """A random state dict under the original names; sizes: of the vocabulary."""
    name, small, kept = part
    layout = json.loads((FOLDER / f"{name}.json").read_text())
    layout.pop("__about__")
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for key, shape in layout.items():
        numbered = re.search(r"(double_blocks|single_blocks|layers)\.\d", key)
        if not numbered or re.match(kept, key):
            shape = tuple(sizes.get(f"n{n}", small.get(n, n)) for n in shape)
            tensors[key] = fill(key, shape, generator)
    return tensors


def tokenizers() -> tuple[dict, dict]:
    """Llama's and CLIP's, of as few tokens as the tests need."""
    names = "llama3_excerpt.json", "clip_excerpt.json"
    return tuple(renumbered(json.loads((EXCERPTS / n).read_text(encoding="utf-8"))) for n in names)


def save_text_encoders(folder: Path) -> None:
    """As the release asks for them: the language part of llava in shards, and the whole of CLIP."""
    llama, clip = tokenizers()
    sizes = [len(rules["model"]["vocab"]) for rules in (llama, clip)]
    save_sharded(original(LLAMA, 2, n128320=sizes[0]), folder / "text_encoder")
    (folder / "text_encoder" / "config.json").write_text(json.dumps(LLAMA_JSON))
    (folder / "text_encoder" / "tokenizer.json").write_text(json.dumps(llama))
    second = folder / "text_encoder_2"
    second.mkdir()
    whole = original(CLIP, 3, n49408=sizes[1]) | {
        "text_model.embeddings.position_ids": torch.arange(77)[None],
        "vision_model.post_layernorm.weight": torch.ones(8),
        "text_projection.weight": torch.ones(8, 20),
        "logit_scale": torch.tensor(4.6),
    }
    save_file(whole, second / "model.safetensors")
    torch.save(whole, second / "pytorch_model.bin")
    (second / "config.json").write_text(json.dumps(CLIP_JSON))
    (second / "vocab.json").write_text(json.dumps(clip["model"]["vocab"]))
    merges = "\n".join(" ".join(pair) for pair in clip["model"]["merges"])
    (second / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")


def save_original(folder: Path) -> Path:
    """A folder like the download: two pickles with their wrappers, and the text encoders."""
    release = folder / "hunyuan-video-t2v-720p"
    (release / "transformers").mkdir(parents=True)
    (release / "vae").mkdir()
    torch.save({"module": original(DIT)}, release / "transformers" / "mp_rank_00_model_states.pt")
    torch.save({"state_dict": original(VAE, 1)}, release / "vae" / "pytorch_model.pt")
    (release / "vae" / "config.json").write_text(json.dumps(VAE_JSON))
    save_text_encoders(folder)
    return folder
