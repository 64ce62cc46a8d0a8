"""minidit: a minimal, standalone video-DiT inference engine. Importing it imports no torch.

import minidit
video = minidit.load("demo").generate("a red circle moves left to right", seed=0)
video.save("out.mp4")
"""

from minidit.presets import PRESETS

__version__ = "0.1.0"
__all__ = ["PRESETS", "load"]


def load(model: str = "demo", *, device: str | None = None, dtype: str | None = None, verify: bool = False):
    """Open a model folder and return an Engine (generate.py); weights are read when they are first needed.

    model: a folder from `python -m weights_convert`, or "demo", the embedded model · device: cuda where there
    is one, else cpu · dtype: bf16 on a GPU, fp32 on a CPU · verify: also compare files with their sha256
    """
    from minidit.generate import Engine

    return Engine(model, device=device, dtype=dtype, verify=verify)
