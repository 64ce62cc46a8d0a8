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
class LatteConfig:
    """The Latte transformer (models/latte.py)."""

    width: int  # D
    mlp_width: int
    heads: int  # N; the head width K is width / heads
    depth: int  # blocks, each a spatial and a temporal half
    channels: int = 4  # C, latent channels
    out_channels: int = 8  # of the prediction: noise, then a learned variance that no sampler here uses
    text_width: int = 4096
    text_len: int = 120  # M at most: prompts are cut to it
    freq_width: int = 256  # width of the timestep sinusoid
    patch: int = 2  # latent cells per token along each side
    sample_size: int = 64  # latent side in training; its grid is what positions are stretched to span
    frames: int = 16  # T, of a video; images have one
    eps: float = 1e-6

    def __post_init__(self):
        if self.width % self.heads or self.width % 4:
            raise ValueError(f"width={self.width} does not split into {self.heads} heads and into 4 parts")


@dataclass(frozen=True)
class KLConfig:
    """An image autoencoder used frame by frame (vae/kl.py), with a plain or a temporal decoder."""

    widths: tuple[int, ...] = (128, 256, 512, 512)  # channels per level; every level but the last halves H, W
    res_blocks: int = 2  # per level, one more in the decoder
    latent: int = 4  # C
    groups: int = 32  # of the group norms
    scale: float = 0.18215  # latents are multiplied by it
    is_temporal: bool = False  # which decoder
    chunk: int = 14  # frames that the temporal decoder takes at a time; chunks know nothing of each other
    eps: float = 1e-6


@dataclass(frozen=True)
class CogVideoXConfig:
    """The CogVideoX transformer (models/cogvideox.py)."""

    width: int  # D
    mlp_width: int
    heads: int  # N; the head width K is width / heads
    depth: int
    positions: str  # sincos | rope | rope-cropped: as rope, but fitted into base_grid
    channels: int = 16  # C, latent channels
    text_width: int = 4096
    text_len: int = 226  # M: prompts are padded to it, and every row is attended to
    time_width: int = 512
    patch: tuple[int, int, int] = (1, 2, 2)  # latent cells per token along (T, H, W)
    base_grid: tuple[int, int] = (30, 45)  # tokens along (H, W) of the training size
    eps: float = 1e-5

    def __post_init__(self):
        if self.width % self.heads or self.width // self.heads % 16:
            raise ValueError(f"width={self.width} does not split into {self.heads} heads of a width 16n")
        if self.positions not in ("sincos", "rope", "rope-cropped"):
            raise ValueError(f"positions={self.positions!r} is not one of sincos, rope, rope-cropped")


@dataclass(frozen=True)
class CogVideoXVAEConfig:
    """The CogVideoX video autoencoder (vae/cogvideox.py)."""

    scale: float  # latents are multiplied by it: what the transformer sees
    widths: tuple[int, ...] = (128, 256, 256, 512)  # channels per level; every level but the last halves H, W
    res_blocks: int = 3  # per level, one more in the decoder
    latent: int = 16  # C
    groups: int = 32  # of the group norms
    time_levels: int = 2  # how many levels, from the first, halve time too
    tile: tuple[int, int] = (240, 360)  # pixels (H, W) of a tile, where tiling is asked for
    eps: float = 1e-6


@dataclass(frozen=True)
class HunyuanVideoConfig:
    """The HunyuanVideo transformer (models/hunyuan_video.py)."""

    width: int  # D
    mlp_width: int
    heads: int  # N; the head width K is width / heads
    double: int  # blocks with weights of their own for video and text
    single: int  # blocks with one set of weights for both
    channels: int = 16  # C, latent channels
    text_width: int = 4096  # of the language model's states
    pooled_width: int = 768  # of CLIP's pooled vector
    text_len: int = 256  # M at most: prompts are cut to it
    refiner_depth: int = 2
    freq_width: int = 256  # width of the timestep and guidance sinusoids
    patch: tuple[int, int, int] = (1, 2, 2)  # latent cells per token along (T, H, W)
    rope_widths: tuple[int, int, int] = (16, 56, 56)  # of a head's channels, turned by (T, H, W)
    rope_theta: float = 256.0
    eps: float = 1e-6

    @property
    def depth(self) -> int:
        """Double blocks come first, then single ones."""
        return self.double + self.single

    def __post_init__(self):
        if self.width % self.heads or sum(self.rope_widths) != self.width // self.heads:
            raise ValueError(
                f"width={self.width} over {self.heads} heads is not the sum of rope_widths={self.rope_widths}"
            )
        if any(width % 2 for width in self.rope_widths):
            raise ValueError(f"rope_widths={self.rope_widths} are turned in pairs; wanted even numbers")


@dataclass(frozen=True)
class HunyuanVAEConfig:
    """The HunyuanVideo video autoencoder (vae/hunyuan_video.py)."""

    widths: tuple[int, ...] = (128, 256, 512, 512)  # channels per level
    res_blocks: int = 2  # per level, one more in the decoder
    latent: int = 16  # C
    groups: int = 32  # of the group norms
    scale: float = 0.476986  # latents are multiplied by it
    temporal_down: tuple[bool, ...] = (False, True, True)  # of the downsamplings, which also halve time
    tile: int = 256  # pixels: larger sides are coded in overlapping tiles
    tile_frames: int = 64
    eps: float = 1e-6


@dataclass(frozen=True)
class LlamaConfig:
    """The layers of a Llama 3 language model that its use as a text encoder needs (text/llama.py)."""

    vocab: int
    width: int
    mlp_width: int
    heads: int
    kv_heads: int
    depth: int
    theta: float = 500000.0
    eps: float = 1e-5


@dataclass(frozen=True)
class CLIPTextConfig:
    """The text tower of a CLIP model (text/clip.py)."""

    vocab: int
    width: int
    mlp_width: int
    heads: int
    depth: int
    positions: int = 77
    eps: float = 1e-5


@dataclass(frozen=True)
class ScheduleConfig:
    """Which noise levels a run visits and how it steps between them (schedules.py)."""

    solver: str = "unipc"  # unipc | dpm++ | euler, or over a table of noise levels: ddim
    sigma_grid: str = "wan"  # wan | diffusers: the two releases of unipc visit slightly different sigmas
    shift: float = 5.0  # sigma -> shift * sigma / (1 + (shift - 1) * sigma)
    # over a table, sigma_grid says which of its levels are visited: leading | leading-1 | linspace | trailing
    betas: str = ""  # the table: linear
    prediction: str = ""  # what the model predicts: epsilon
    ends_clean: bool = True  # the last step goes to no noise at all, else to the table's first level


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
    true_cfg: float = 0.0  # guidance on top of guidance_scale where that is embedded; 0: it is not embedded


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


# The release's own (Tencent-Hunyuan/HunyuanVideo hyvideo/constants.py), for guidance beside the embedded one.
HUNYUAN_NEGATIVE_PROMPT = (
    "Aerial view, aerial view, overexposed, low quality, deformation, a poor composition, bad hands, "
    "bad teeth, bad eyes, bad limbs, distortion"
)
LLAMA3_8B = LlamaConfig(vocab=128320, width=4096, mlp_width=14336, heads=32, kv_heads=8, depth=30)  # of 32
CLIP_L = CLIPTextConfig(vocab=49408, width=768, mlp_width=3072, heads=12, depth=12)


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
    "hunyuan-video": Preset(
        family="hunyuan_video",
        components={
            "text_encoder": ("LlamaEncoder", LLAMA3_8B),
            "text_encoder_2": ("CLIPText", CLIP_L),
            "transformer": (
                "HunyuanVideo",
                HunyuanVideoConfig(width=3072, mlp_width=12288, heads=24, double=20, single=40),
            ),
            "vae": ("HunyuanVAE", HunyuanVAEConfig()),
        },
        schedule=ScheduleConfig(solver="euler", sigma_grid="wan", shift=7.0),
        defaults=Defaults(1280, 720, 129, 50, 6.0, 24, HUNYUAN_NEGATIVE_PROMPT, true_cfg=1.0),
    ),
}


def find_preset(name: str) -> Preset:
    """The preset of that name; ValueError with the known names otherwise."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; choose one of {', '.join(PRESETS)}")
    return PRESETS[name]
