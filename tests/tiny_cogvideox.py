"""A small random CogVideoX, of each release's kind."""

from dataclasses import replace
from pathlib import Path

from minidit.components import DEMO
from minidit.models.cogvideox import CogVideoX
from minidit.presets import CogVideoXConfig, CogVideoXVAEConfig, Defaults, ScheduleConfig, T5Config
from minidit.text.t5 import T5Encoder
from minidit.vae.cogvideox import CogVideoXVAE
from minidit.weights import save_model_folder
from tests.tensors import random

V1 = CogVideoXConfig(
    width=64,
    mlp_width=96,
    heads=2,
    depth=5,
    positions="rope-cropped",
    channels=4,
    text_width=24,
    text_len=12,
    time_width=16,
    base_grid=(3, 4),
)
CONFIGS = {
    "2b": replace(V1, positions="sincos"),
    "5b": V1,
    "1.5": replace(V1, positions="rope", patch=(2, 2, 2)),
}
VAE = CogVideoXVAEConfig(scale=0.8, widths=(4, 4, 8, 8), res_blocks=1, latent=4, groups=2, tile=(48, 40))
TEXT = T5Config(vocab=768, width=24, mlp_width=32, heads=3, head_width=8, depth=2, shared_positions=True)
DDIM = ScheduleConfig("ddim", "trailing", 3.0, betas="zero-snr", prediction="v")
DPM = ScheduleConfig("dpm", "trailing", 1.0, betas="zero-snr", prediction="v", dynamic_guidance=True)


def tiny(kind: str, **changes) -> CogVideoX:
    return random(CogVideoX(replace(CONFIGS[kind], **changes)))


def save_tiny(out: Path, kind: str = "5b", schedule: ScheduleConfig = DPM) -> Path:
    """A model folder with the embedded model's tokenizer."""
    save_model_folder(
        out,
        family="cogvideox",
        components={
            "transformer": ("CogVideoX", CONFIGS[kind], tiny(kind)),
            "text_encoder": ("T5Encoder", TEXT, random(T5Encoder(TEXT), 2)),
            "vae": ("CogVideoXVAE", VAE, random(CogVideoXVAE(VAE), 3)),
            "tokenizer": ("SentencePiece", None, DEMO / "tokenizer" / "spiece.model"),
        },
        schedule=schedule,
        defaults=Defaults(width=64, height=48, num_frames=9, steps=6, guidance_scale=6.0, fps=8),
        source="random weights",
    )
    return out
