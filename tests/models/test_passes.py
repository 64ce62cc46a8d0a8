"""How often a block reads and writes its tokens beside matrix products and attention (kernels/README.md)."""

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from minidit import layers
from minidit.cache.seam import BlockCache
from minidit.models import cogvideox, hunyuan_video, latte, open_sora, wan
from minidit.models.cogvideox import CogVideoX
from minidit.models.hunyuan_video import HunyuanVideo
from minidit.models.latte import Latte
from minidit.models.open_sora import OpenSora, Video
from minidit.models.wan import Wan
from minidit.presets import LatteConfig, OpenSoraConfig, WanConfig
from tests import tiny_cogvideox, tiny_hunyuan_video

SMALL = dict(width=64, mlp_width=96, heads=2, depth=2, text_width=24)
SIZE = (3, 4, 6)  # latent (T, H, W): 18 tokens
TEXT = 20  # rows; like the tokens more than anything else in a block has
FUSED = ("modulate", "layer_norm", "gated_residual", "norm_rope")
PRODUCTS = ("addmm", "mm", "bmm", "_linear_pointwise", "_scaled_dot_product_flash_attention_for_cpu")
TABLE = Path(__file__).parents[2] / "kernels/README.md"


def start(model, text, **options) -> tuple[Tensor, object]:
    """h and cond of one branch."""
    draw = torch.Generator().manual_seed(0)
    context = model.eval().requires_grad_(False).prepare([text], SIZE, **options)
    return model.embed(torch.randn(1, 4, *SIZE, generator=draw), torch.tensor([500.0]), context)


def family(name: str):
    """A small model and what its blocks are given."""
    states = torch.ones(TEXT, 24)
    if name == "Wan":
        model = Wan(WanConfig(**SMALL, channels=4, text_len=TEXT))
        return model, *start(model, states)
    if name == "CogVideoX":
        model = CogVideoX(replace(tiny_cogvideox.CONFIGS["5b"], text_len=TEXT))
        return model, *start(model, states)
    if name == "Open-Sora":
        model = OpenSora(OpenSoraConfig(**SMALL, text_len=TEXT))
        return model, *start(model, states, video=Video(40, 48, 24))
    if name == "Latte":
        model = Latte(LatteConfig(**SMALL, text_len=TEXT, frames=3))
        return model, *start(model, states)
    model = HunyuanVideo(tiny_hunyuan_video.CONFIG)
    return model, *start(model, (states, torch.ones(20)))


class Passes(TorchDispatchMode):
    """Counts what operations read and write of tokens, in units of h. A fused operation is one."""

    def __init__(self, h: Tensor):
        super().__init__()
        self.unit, self.least = h.numel(), 16 * h.shape[-1]
        self.read = self.written = 0
        self.is_inside = False  # of a fused operation
        self.names: Counter[str] = Counter()

    def tokens(self, values) -> int:
        """Numbers in those that are tokens: rows of modulation, tables and weights are smaller."""
        flat = [t for v in values for t in (v if isinstance(v, (list, tuple)) else [v])]
        return sum(
            t.numel() for t in flat if isinstance(t, Tensor) and t.ndim > 2 and t.numel() >= self.least
        )

    def add(self, name: str, inputs, out) -> None:
        if (written := self.tokens([out])) > 0:
            self.names[name] += 1
            self.read += self.tokens(inputs)
            self.written += written

    def fused(self, function):
        def call(*args, out=None, **options):
            self.is_inside = True
            y = function(*args, **options) if out is None else function(*args, out=out, **options)
            self.is_inside = False
            self.add(function.__name__, args, y)
            return y

        return call

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        name = op.name().split("::")[1].split(".")[0]
        if not (self.is_inside or op.is_view or name in PRODUCTS or name in ("empty", "_unsafe_view")):
            self.add(name, args, out)
        return out


def count(name: str, index: int, monkeypatch) -> Passes:
    """One block of a family, with the fused operations counted as they are on a GPU."""
    with torch.no_grad():
        model, h, cond = family(name)
        passes = Passes(h)
        for module in (layers, wan, cogvideox, hunyuan_video, open_sora, latte):
            for function in FUSED:
                if function in vars(module):
                    monkeypatch.setattr(module, function, passes.fused(vars(module)[function]))
        with passes:
            model.blocks[index](h, cond.at(index), BlockCache())
    return passes


@pytest.mark.parametrize(
    "row, name, index",
    [
        ("Wan 2.1", "Wan", 1),
        ("HunyuanVideo, double", "HunyuanVideo", 1),
        ("HunyuanVideo, single", "HunyuanVideo", 4),
        ("CogVideoX", "CogVideoX", 1),
        ("Open-Sora 1.2", "Open-Sora", 1),
        ("Latte-1", "Latte", 1),
    ],
)
def test_a_block_makes_the_passes_that_the_table_says(row, name, index, monkeypatch):
    said = re.search(rf"^\| {row} \| (\d+) \| (\d+) \|", TABLE.read_text(), re.MULTILINE)
    passes = count(name, index, monkeypatch)
    got = passes.read / passes.unit, passes.written / passes.unit
    assert got == (int(said[1]), int(said[2])), passes.names


@pytest.mark.parametrize("dtype, most", [(torch.float32, 19), (torch.bfloat16, 43)], ids=["fp32", "bf16"])
@torch.no_grad()
def test_wan_on_the_cpu_takes_few_operations(dtype, most):
    """By hand, in fp32: two norms and addcmuls of modulation, one affine norm, two gates, one sum; q and k:
    three of RMSNorm and one of rope each; the query towards text: three of RMSNorm. In bf16 the eight
    definitions cast what they take and give (18 casts), attention of few keys is cast to fp32 and back (6,
    beside the keys and values of the text, which are shorter), and the sum stays as it is.
    """
    model = Wan(WanConfig(**SMALL, channels=4, text_len=TEXT)).to(dtype)
    h, cond = start(model, torch.ones(TEXT, 24))
    with Passes(h) as passes:
        model.blocks[1](h, cond.at(1), BlockCache())
    assert sum(passes.names.values()) <= most, passes.names
