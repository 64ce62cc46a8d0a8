"""minidit: a minimal, standalone video-DiT inference engine. Importing it imports no torch.

import minidit
video = minidit.load("demo").generate("a red circle moves left to right", seed=0)
video.save("out.mp4")
"""

from minidit.presets import PRESETS

__version__ = "0.1.0"
__all__ = ["PRESETS", "load"]


def load(
    model: str = "demo",
    *,
    device: str | None = None,
    dtype: str | None = None,
    verify: bool = False,
    compile: bool = False,
    weights: str = "full",
    offload: str = "auto",
    cache_budget: int | None = None,
    text_cache: str | None = None,
):
    """Open a model folder and return an Engine (generate.py); weights are read when they are first needed.

    model: a folder from `python -m weights_convert`, or "demo", the embedded model · device: cuda where there
    is one, else cpu · dtype: bf16 on a GPU, fp32 on a CPU · verify: also compare files with their sha256
    compile: the transformer's blocks, with torch.compile · weights: full, int8, fp8 or fp8-dynamic, of the
    transformer's blocks · offload: auto, none, parts or blocks · cache_budget: most bytes that are kept from
    step to step, see Engine · text_cache: a folder that keeps prompts' text states; None keeps none
    """
    from minidit.generate import Engine

    return Engine(
        model, device=device, dtype=dtype, verify=verify, compile=compile, weights=weights, offload=offload,
        cache_budget=cache_budget, text_cache=text_cache,
    )  # fmt: skip
