"""What several models share unchanged."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidit_kernels.modulate import layer_norm
from minidit_kernels.qk_norm_rope import Rope, norm_rope, rms_norm

# what oneDNN multiplies on this machine, asked once: a look in mid-forward would break a compiled graph
ONEDNN_DTYPES = (torch.float32,) if torch.backends.mkldnn.is_available() else ()
if ONEDNN_DTYPES and torch.ops.mkldnn._is_mkldnn_bf16_supported():
    ONEDNN_DTYPES += (torch.bfloat16,)


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    """x W^T + b, then GELU in its tanh form if wanted, on a CPU. x (..., D) -> (..., D_out)"""
    then = ("gelu", [], "tanh") if gelu else ("none", [], "")
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, *then)


wrapped_onednn_linear = torch.library.custom_op("minidit::onednn_linear", onednn_linear, mutates_args=())
wrapped_onednn_linear.register_fake(lambda x, weight, bias, gelu: x.new_empty(*x.shape[:-1], len(weight)))


class Linear(nn.Linear):
    """x W^T + b, then GELU in its tanh form if wanted. x (..., D) -> (..., D_out)

    On a CPU, where no gradient is wanted, through oneDNN: torch takes MKL for fp32, which is slower on many
    processors (half as fast on an EPYC of 2024), and its GELU costs as much as the product before it.
    """

    def forward(self, x: Tensor, *, gelu: bool = False) -> Tensor:
        if x.device.type == "cpu" and x.dtype in ONEDNN_DTYPES and not torch.is_grad_enabled():
            # inductor takes the operation itself with constant weights only; wrapped, it leaves it whole
            run = wrapped_onednn_linear if torch.compiler.is_compiling() else onednn_linear
            return run(x, self.weight, self.bias, gelu)
        y = F.linear(x, self.weight, self.bias)
        return F.gelu(y, approximate="tanh") if gelu else y


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, statistics in fp32, one rounding. x (..., D) -> (..., D)"""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, eps=self.eps).to(x.dtype)

    def into_heads(
        self,
        x: Tensor,
        heads: int,
        rope: Rope | None = None,
        basis: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Norm queries or keys, each head by itself where the norm is as wide as one; then rope and basis.

        x (B, L, N * K) -> (B, N, L, K or R), see norm_rope
        """
        return norm_rope(x, self.weight, heads=heads, eps=self.eps, rope=rope, basis=basis, out=out)


class LayerNorm(nn.Module):
    """Affine layer norm in fp32, rounded once to `dtype`. x (B, L, D) -> (B, L, D)"""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return layer_norm(x, self.weight, self.bias, eps=self.eps, dtype=dtype)

    def into_heads(
        self, x: Tensor, heads: int, rope: Rope | None = None, basis: Tensor | None = None
    ) -> Tensor:
        """As RMSNorm's, of norms as wide as a head."""
        return norm_rope(x, self.weight, self.bias, heads=heads, eps=self.eps, rope=rope, basis=basis)


class Mlp(nn.Module):
    """Linear, GELU (tanh form), linear. x (..., D) -> (..., D_out)"""

    def __init__(self, width: int, mlp_width: int, out_width: int | None = None):
        super().__init__()
        self.up = Linear(width, mlp_width)
        self.down = Linear(mlp_width, out_width or width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x, gelu=True))


class TimeMlp(nn.Module):
    """Linear, SiLU, linear: a sinusoid to an embedding. x (B, F) -> (B, D)"""

    def __init__(self, freq_width: int, width: int):
        super().__init__()
        self.up = nn.Linear(freq_width, width)
        self.down = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.up(x.to(self.up.weight.dtype))))


def block_bytes(
    width: int, mlp_width: int, item: int, hidden: int, *, attention: int, mlp: int, forms: int = 2
) -> int:
    """Activations of a block per token where they take most, an estimate: in attention or in the MLP.

    attention, mlp: tensors as wide as h that are alive there · forms: of these, how many have an fp32 form on
    their way, in a shorter dtype · hidden: copies of the MLP's hidden layer, see hidden_copies · item: bytes
    of the dtype
    """
    fp32 = 4 * forms if item < 4 else 0
    return max(width * (attention * item + fp32), (mlp * width + hidden * mlp_width) * item)


def hidden_copies(device: str, dtype: torch.dtype) -> int:
    """Of an MLP's hidden layer: before and after GELU, where that is not a part of the product (Linear)."""
    return 1 if device == "cpu" and dtype in ONEDNN_DTYPES else 2


def modulation_table(rows: int, width: int) -> Tensor:
    """Start values of variance 1/D; uniform, as a normal draw is slow on the meta device."""
    bound = (3 / width) ** 0.5
    return torch.empty(rows, width).uniform_(-bound, bound)


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
