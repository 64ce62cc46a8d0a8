"""What several models share unchanged."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidit_kernels.qk_norm_rope import rms_norm


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, statistics in fp32, one rounding. x (..., D) -> (..., D)"""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, eps=self.eps).to(x.dtype)


class LayerNorm(nn.Module):
    """Affine layer norm in fp32, rounded once to `dtype`. x (..., D) -> (..., D)"""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return F.layer_norm(x.float(), x.shape[-1:], self.weight.float(), self.bias.float(), self.eps).to(
            dtype
        )


class Mlp(nn.Module):
    """Linear, GELU (tanh form), linear. x (..., D) -> (..., D_out)"""

    def __init__(self, width: int, mlp_width: int, out_width: int | None = None):
        super().__init__()
        self.up = nn.Linear(width, mlp_width)
        self.down = nn.Linear(mlp_width, out_width or width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class TimeMlp(nn.Module):
    """Linear, SiLU, linear: a sinusoid to an embedding. x (B, F) -> (B, D)"""

    def __init__(self, freq_width: int, width: int):
        super().__init__()
        self.up = nn.Linear(freq_width, width)
        self.down = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.up(x.to(self.up.weight.dtype))))


def take_rows(x: Tensor, rows: list[int]) -> Tensor:
    """Some rows of a batch; a view, not a copy, where it is one row. x (B, ...) -> (len(rows), ...)"""
    return x[rows[0] : rows[0] + 1] if len(rows) == 1 else x[rows]


def timestep_sinusoid(t: Tensor, width: int) -> Tensor:
    """[cos(t f) | sin(t f)] with f_i = 10000^(-2i/width), computed in fp64. t (B,) -> (B, width) fp32"""
    half = width // 2
    f = torch.exp(torch.arange(half, dtype=torch.float64, device=t.device) * (-math.log(10000) / half))
    angle = t.double()[:, None] * f
    return torch.cat((angle.cos(), angle.sin()), dim=1).float()


def rope_axis(positions: int, width: int, theta: float = 10000.0) -> Tensor:
    """Rotation angles of one axis, position * theta^(-2i/width). -> (positions, width/2) fp64"""
    f = theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    return torch.arange(positions, dtype=torch.float64)[:, None] * f
