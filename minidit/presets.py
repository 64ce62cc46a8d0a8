"""The releases minidit knows by name: configs, schedules and default settings. Standard library only.

A config holds numbers and nothing else; models import theirs from here. Values follow the original releases
(Wan-Video/Wan2.1 wan/configs), not a re-packaging of them, where the two differ.
"""

from dataclasses import dataclass, replace
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
class OpenSoraConfig:
    """The Open-Sora 1.2 transformer, STDiT3 (models/open_sora.py)."""

    width: int  # D
    mlp_width: int
    heads: int  # N; the head width K is width / heads
    depth: int  # blocks, each a spatial and a temporal half
    channels: int = 4  # C, latent channels
    out_channels: int = 8  # of the prediction: velocity, then channels that nothing uses
    text_width: int = 4096
    text_len: int = 300  # M at most: prompts are cut to it
    freq_width: int = 256  # width of the timestep and fps sinusoids
    patch: int = 2  # latent cells per token along each side
    base_size: int = 512  # pixels per side that positions are measured against
    eps: float = 1e-6

    def __post_init__(self):
        if self.width % self.heads or self.width // self.heads % 2 or self.width % 4:
            raise ValueError(f"width={self.width} does not split into {self.heads} heads of even width")


@dataclass(frozen=True)
class OpenSoraVAEConfig:
    """The Open-Sora 1.2 video autoencoder (vae/open_sora.py): one over time upon one of images."""

    widths: tuple[int, ...] = (128, 256, 512, 512)  # of the image autoencoder, as in KLConfig
    res_blocks: int = 2
    groups: int = 32
    scale: float = 0.18215  # image latents are multiplied by it
    latent: int = 4  # C, of both
    time_base: int = 128  # channels of the first level over time
    time_multipliers: tuple[int, ...] = (1, 2, 2, 4)
    time_blocks: int = 4  # per level
    time_groups: int = 32
    temporal_down: tuple[bool, ...] = (False, True, True)  # whether time is halved after a level
    chunk: int = 17  # frames that are coded together; chunks know nothing of each other
    mean: tuple[float, ...] = (-0.1, 0.34, 0.27, 0.98)  # the transformer sees (z - mean) / std
    std: tuple[float, ...] = (3.85, 2.32, 2.33, 3.06)
    eps: float = 1e-6  # of the image autoencoder's norms

    def __post_init__(self):
        if not len(self.mean) == len(self.std) == self.latent:
            raise ValueError(f"latent={self.latent}, but {len(self.mean)} means and {len(self.std)} stds")


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

    scale: float = 0.7  # latents are multiplied by it (2B: 1.15258426)
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

    solver: str = "unipc"  # unipc | dpm++ | euler, or over a table of noise levels: ddim | dpm
    sigma_grid: str = "wan"  # wan | diffusers: the two releases of unipc visit slightly different sigmas
    shift: float = 5.0  # sigma -> shift * sigma / (1 + (shift - 1) * sigma)
    # over a table, sigma_grid says which of its levels are visited: leading | leading-1 | linspace | trailing
    betas: str = ""  # the table: linear | zero-snr, where shift divides the signal-to-noise ratio
    prediction: str = ""  # what the model predicts: epsilon | v
    ends_clean: bool = True  # the last step goes to no noise at all, else to the table's first level
    dynamic_guidance: bool = False  # guidance changes from step to step, between 1 and 1 + guidance_scale


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
T5_XXL = T5Config(
    vocab=32128, width=4096, mlp_width=10240, heads=64, head_width=64, depth=24, shared_positions=True
)
LLAMA3_8B = LlamaConfig(vocab=128320, width=4096, mlp_width=14336, heads=32, kv_heads=8, depth=30)  # of 32
CLIP_L = CLIPTextConfig(vocab=49408, width=768, mlp_width=3072, heads=12, depth=12)


def cogvideox_preset(
    transformer: CogVideoXConfig, schedule: ScheduleConfig, defaults: Defaults, *, scale: float = 0.7
) -> Preset:
    components = {
        "text_encoder": ("T5Encoder", T5_XXL),
        "transformer": ("CogVideoX", transformer),
        "vae": ("CogVideoXVAE", CogVideoXVAEConfig(scale=scale)),
    }
    return Preset("cogvideox", components, schedule, defaults)


# Solvers and guidance as the release's command line advises them (zai-org/CogVideo inference/cli_demo.py).
COGVIDEOX_DDIM = ScheduleConfig("ddim", "trailing", 3.0, betas="zero-snr", prediction="v")
COGVIDEOX_DPM = ScheduleConfig(
    "dpm", "trailing", 1.0, betas="zero-snr", prediction="v", dynamic_guidance=True
)
COGVIDEOX_2B = CogVideoXConfig(width=1920, mlp_width=7680, heads=30, depth=30, positions="sincos")
COGVIDEOX_5B = CogVideoXConfig(width=3072, mlp_width=12288, heads=48, depth=42, positions="rope-cropped")

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
    "cogvideox-2b": cogvideox_preset(
        COGVIDEOX_2B, COGVIDEOX_DDIM, Defaults(720, 480, 49, 50, 6.0, 8), scale=1.15258426
    ),
    "cogvideox-5b": cogvideox_preset(COGVIDEOX_5B, COGVIDEOX_DPM, Defaults(720, 480, 49, 50, 6.0, 8)),
    "cogvideox1.5-5b": cogvideox_preset(
        replace(COGVIDEOX_5B, positions="rope", patch=(2, 2, 2)),
        COGVIDEOX_DPM,
        Defaults(1360, 768, 81, 50, 6.0, 16),
    ),
    "open-sora-1.2": Preset(
        family="open_sora",
        components={
            "text_encoder": ("T5Encoder", T5_XXL),
            "transformer": ("OpenSora", OpenSoraConfig(width=1152, mlp_width=4608, heads=16, depth=28)),
            "vae": ("OpenSoraVAE", OpenSoraVAEConfig()),
        },
        schedule=ScheduleConfig("euler", "wan", 1.0),  # times what the size of the video asks for
        defaults=Defaults(426, 240, 51, 30, 7.0, 24),
    ),
    "latte-1": Preset(
        family="latte",
        components={
            "text_encoder": ("T5Encoder", T5_XXL),
            "transformer": ("Latte", LatteConfig(width=1152, mlp_width=4608, heads=16, depth=28)),
            "vae": ("KLVAE", KLConfig()),
            "vae_2": ("KLVAE", KLConfig(is_temporal=True)),
        },
        schedule=ScheduleConfig("ddim", "leading", 1.0, betas="linear", prediction="epsilon"),
        defaults=Defaults(512, 512, 16, 50, 7.5, 8),
    ),
}


def find_preset(name: str) -> Preset:
    """The preset of that name; ValueError with the known names otherwise."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; choose one of {', '.join(PRESETS)}")
    return PRESETS[name]
