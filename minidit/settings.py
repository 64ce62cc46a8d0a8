"""What decides a video: the settings of a run, resolved and checked before anything is loaded."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

from minidit import __version__
from minidit.attention import check_backend

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SMALL_PIXELS = 64 * 64 * 81
MOST_STEPS = 1000  # noise levels that every family here was trained on
WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
BATCHED_TOKENS = 4096  # guidance branches of at most this many tokens run as one batch: alone they are small


@dataclass(frozen=True)
class Settings:
    """Everything that decides a video, resolved; written into every file that is made from it."""

    prompt: str
    negative_prompt: str
    seed: int
    width: int
    height: int
    num_frames: int
    steps: int
    guidance_scale: float
    flow_shift: float
    solver: str
    sigma_grid: str
    fps: float
    cache: str
    attention: str
    residual: str  # dtype of the hidden state between blocks
    batched_guidance: bool
    dtype: str
    device: str
    model: str
    model_id: str  # of the weights, whatever the folder is called
    true_cfg: float = 0.0  # guidance on top of guidance_scale where that is embedded; 0: it is not embedded
    dynamic_cfg: bool = False  # CogVideoX: guidance changes from step to step, up to 1 + guidance_scale
    tiled: bool = False  # the autoencoder decodes tile by tile, which takes less memory
    compile: bool = False  # the transformer's blocks were compiled: other roundings
    weights: str = "full"  # of the transformer's blocks; int8, fp8 or fp8-dynamic (quantize.py)
    minidit: str = __version__

    @property
    def is_small(self) -> bool:
        """So small a video that a step on a CPU takes well below a second."""
        return self.width * self.height * self.num_frames <= SMALL_PIXELS

    @property
    def cfg_scale(self) -> float:
        """Of classifier-free guidance, with its second branch; 1 is without."""
        return self.true_cfg or self.guidance_scale


@dataclass(frozen=True)
class Choices:
    """What a user may choose; None takes the model's default."""

    negative_prompt: str | None = None
    seed: int = 0
    width: int | None = None
    height: int | None = None
    num_frames: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    flow_shift: float | None = None
    solver: str | None = None
    sigma_grid: str | None = None
    fps: float | None = None
    cache: str = "none"
    attention: str = "auto"
    residual: str | None = None
    true_cfg: float | None = None
    dynamic_cfg: bool | None = None
    tiled: bool = False


def profile_match(settings: Settings) -> dict[str, Any]:
    """The settings that a caching profile is made for, and a run has to share."""
    names = (
        "model_id", "width", "height", "num_frames", "steps", "solver", "sigma_grid", "flow_shift",
        "guidance_scale", "dtype",
    )  # fmt: skip
    beside = {"true_cfg": settings.true_cfg} if settings.true_cfg else {}
    beside |= {"dynamic_cfg": True} if settings.dynamic_cfg else {}
    beside |= {"weights": settings.weights} if settings.weights != "full" else {}
    return {name: getattr(settings, name) for name in names} | beside


def set_threads(settings: Settings) -> None:
    """One thread for a small video: its tensors are so small that threads mostly wait for each other.

    Measured where other programs wanted the same two cores, in s per guided step of the embedded model with
    one thread and with two: 0.13 and 0.48 at 80 tokens (its own size), 0.15 and 0.89 at 320, 1.8 and 4.5 at
    1296.
    A number in OMP_NUM_THREADS is left alone. python -m benchmarks.step --device cpu --threads 2 measures it.
    """
    if settings.device == "cpu" and settings.is_small and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


def check_settings(settings: Settings) -> None:
    """Refuse values that no model takes."""
    if not 0 <= settings.seed < 2**63:
        raise ValueError(f"seed={settings.seed} is not a whole number between 0 and 2^63 - 1")
    if settings.steps > MOST_STEPS:
        raise ValueError(f"steps={settings.steps} is more than the {MOST_STEPS} noise levels of training")
    if not math.isfinite(settings.guidance_scale):
        raise ValueError(f"guidance_scale={settings.guidance_scale} is not a number; 1 turns guidance off")
    if not 0 <= settings.true_cfg < math.inf:
        raise ValueError(f"true_cfg={settings.true_cfg} is not a number above 0; 1 turns it off")
    if not 0 < settings.fps < math.inf:
        raise ValueError(f"fps={settings.fps} is not above 0")
    check_backend(settings.attention)
    if settings.residual not in (settings.dtype, "fp32"):
        raise ValueError(f"residual={settings.residual!r}; choose fp32 or the run's dtype, {settings.dtype}")


def check_types(values: Mapping[str, Any]) -> None:
    """Refuse a setting of another type than its own, as a file that somebody edited may have."""
    for field in fields(Settings):
        value = values.get(field.name, field.default)
        wanted = (int, float) if field.type is float else field.type
        is_odd = not isinstance(value, wanted) or (isinstance(value, bool) and field.type is not bool)
        if field.name in values and is_odd:
            raise ValueError(f"{field.name}={value!r:.60} is not {WORDS[field.type]}")


def check_multiple(name: str, value: int, step: int, *, offset: int = 0) -> None:
    """Refuse a value that is not step * n + offset, naming the nearest that are."""
    low = max((value - offset) // step * step + offset, offset or step)
    if value < 1 or value != low:
        nearest = f"nearest are {low} and {low + step}" if value > low else f"the least is {low}"
        raise ValueError(f"{name}={value} is not {step}n{'+1' if offset else ''}; {nearest}")


def pick_device(device: str | None) -> str:
    """cuda where there is one, else cpu; a named device must exist."""
    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=chosen).tolist()  # read back, which the meta device cannot
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device {chosen!r} cannot be used ({str(error).splitlines()[0]}); try --device cpu"
        ) from None
    if torch.device(chosen).type == "cuda" and torch.device(chosen).index is not None:
        torch.cuda.set_device(chosen)  # kernels are launched on the current device
    return chosen


def pick_dtype(dtype: str | None, device: str) -> str:
    """bf16 on a GPU, fp32 on a CPU, unless one is named."""
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; choose one of {', '.join(DTYPES)}")
    return dtype or ("fp32" if device == "cpu" else "bf16")
