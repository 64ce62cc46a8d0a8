"""The releases minidit knows by name: configs, schedules and default settings. Standard library only.

A config holds numbers and nothing else; models import theirs from here. Values follow the original releases
(Wan-Video/Wan2.1 wan/configs), not a re-packaging of them, where the two differ.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class WanConfig:
    """The Wan transformer (models/wan.py)."""

    width: int  # D
    mlp_width: int
    heads: int  # N; the head width K is width / heads
    depth: int
    channels: int = 16  # C, latent channels
    text_width: int = 4096
    text_len: int = 512  # M: text states are zero-padded to this many rows, and every row is attended to
    freq_width: int = 256  # width of the timestep sinusoid
    patch: tuple[int, int, int] = (1, 2, 2)  # latent cells per token along (T, H, W)
    eps: float = 1e-6

    def __post_init__(self):
        if self.width % self.heads or self.width // self.heads % 2:
            raise ValueError(f"width={self.width} does not split into {self.heads} heads of even width")


@dataclass(frozen=True)
class T5Config:
    """A T5-family text encoder (text/t5.py); UMT5 has one position table per layer, T5 one for all."""

    vocab: int
    width: int
    mlp_width: int
    heads: int
    head_width: int
    depth: int
    buckets: int = 32
    max_distance: int = 128
    shared_positions: bool = False  # True: layer 0's relative position table serves every layer (T5)
    eps: float = 1e-6


@dataclass(frozen=True)
class WanVAEConfig:
    """The Wan 2.1 video autoencoder (vae/wan.py)."""

    base: int  # channels of the widest-resolution level
    latent: int  # C, latent channels
    mean: tuple[float, ...]  # per latent channel; the transformer sees (mu - mean) / std
    std: tuple[float, ...]
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    res_blocks: int = 2
    temporal_down: tuple[bool, ...] = (False, True, True)  # of the downsamplings, which also halve time

    def __post_init__(self):
        if not len(self.mean) == len(self.std) == self.latent:
            raise ValueError(f"latent={self.latent}, but {len(self.mean)} means and {len(self.std)} stds")


@dataclass(frozen=True)
class ScheduleConfig:
    """Which noise levels a run visits and how it steps between them (schedules.py)."""

    solver: str = "unipc"  # unipc | dpm++ | euler
    sigma_grid: str = "wan"  # wan | diffusers: the two releases of unipc visit slightly different sigmas
    shift: float = 5.0  # sigma -> shift * sigma / (1 + (shift - 1) * sigma)


@dataclass(frozen=True)
class Defaults:
    """What a generation uses where the user says nothing."""

    width: int
    height: int
    num_frames: int
    steps: int
    guidance_scale: float
    fps: int
    negative_prompt: str = ""


@dataclass(frozen=True)
class Preset:
    """A release: everything about it but the weights."""

    family: str
    components: dict[str, tuple[str, Any]]  # name -> (class name, config), tokenizers aside
    schedule: ScheduleConfig
    defaults: Defaults

    @property
    def transformer(self) -> Any:
        return self.components["transformer"][1]


# Latent statistics of the Wan 2.1 VAE; in no checkpoint (Wan-Video/Wan2.1 wan/modules/vae.py).
WAN21_MEAN = (
    -0.7571,
    -0.7089,
    -0.9113,
    0.1075,
    -0.1745,
    0.9653,
    -0.1517,
    1.5508,
    0.4134,
    -0.0715,
    0.5517,
    -0.3632,
    -0.1922,
    -0.9497,
    0.2503,
    -0.2921,
)
WAN21_STD = (
    2.8184,
    1.4541,
    2.3275,
    2.6558,
    1.2196,
    1.7708,
    2.6052,
    2.0743,
    3.2687,
    2.1526,
    2.8652,
    1.5579,
    1.6382,
    1.1253,
    2.8251,
    1.9160,
)

# The releases' own default (Wan-Video/Wan2.1 wan/configs/shared_config.py, sample_neg_prompt): model input.
WAN_NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，"
    "杂乱的背景，三条腿，背景人很多，倒着走"
)

UMT5_XXL = T5Config(vocab=256384, width=4096, mlp_width=10240, heads=64, head_width=64, depth=24)
WAN21_VAE = WanVAEConfig(base=96, latent=16, mean=WAN21_MEAN, std=WAN21_STD)


def wan_parts(transformer: WanConfig) -> dict[str, tuple[str, Any]]:
    return {
        "text_encoder": ("T5Encoder", UMT5_XXL),
        "transformer": ("Wan", transformer),
        "vae": ("WanVAE", WAN21_VAE),
    }


PRESETS = {
    "wan2.1-t2v-1.3b": Preset(
        family="wan",
        components=wan_parts(WanConfig(width=1536, mlp_width=8960, heads=12, depth=30)),
        schedule=ScheduleConfig(),
        defaults=Defaults(832, 480, 81, 50, 5.0, 16, WAN_NEGATIVE_PROMPT),
    ),
    "wan2.1-t2v-14b": Preset(
        family="wan",
        components=wan_parts(WanConfig(width=5120, mlp_width=13824, heads=40, depth=40)),
        schedule=ScheduleConfig(),
        defaults=Defaults(1280, 720, 81, 50, 5.0, 16, WAN_NEGATIVE_PROMPT),
    ),
}


def find_preset(name: str) -> Preset:
    """The preset of that name; ValueError with the known names otherwise."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; choose one of {', '.join(PRESETS)}")
    return PRESETS[name]
