"""How far two videos are apart: PSNR, SSIM and LPIPS, on frames as they are before any codec.

All take frames (T, H, W, 3), arrays or tensors: uint8 with data range 255, or floating point in [0, 1] with
data range 1. Sums run in float64.
"""

import math
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

WINDOW = 11  # pixels, SSIM's window (Wang et al., 2004, section III-C)
SIGMA = 1.5  # pixels
K1, K2 = 0.01, 0.03
ALEXNET = "alexnet-owt-7be5be79.pth"  # torchvision's file of the network that LPIPS 0.1 looks through


def psnr(a: np.ndarray | Tensor, b: np.ndarray | Tensor) -> float:
    """Peak signal-to-noise ratio in dB. a, b (T, H, W, 3) -> 10 log10(range^2 / MSE), inf if equal.

    The error is averaged over all frames before the logarithm, so one bad frame weighs what it should.
    """
    a, b, data_range = _pair(a, b)
    squares = sum((x.double() - y.double()).square().sum().item() for x, y in zip(a, b, strict=True))
    return 10 * math.log10(data_range**2 * a.numel() / squares) if squares else math.inf


def ssim(a: np.ndarray | Tensor, b: np.ndarray | Tensor) -> float:
    """Structural similarity (Wang et al., 2004), 1 where equal. a, b (T, H, W, 3) -> mean over all.

    Gaussian window of 11 pixels with sigma 1.5, K1 = 0.01, K2 = 0.03, only where the window fits whole. It is
    taken on R, G and B one by one and averaged, as scikit-image does with channel_axis, not on the luma.
    """
    a, b, data_range = _pair(a, b)
    if min(a.shape[1:3]) < WINDOW:
        raise ValueError(
            f"ssim: frames are {a.shape[2]}x{a.shape[1]}, wanted {WINDOW} pixels a side or more; use psnr"
        )
    return sum(_ssim_frame(x, y, data_range) for x, y in zip(a, b, strict=True)) / len(a)


def load_lpips(device: str = "cpu") -> nn.Module | None:
    """The network of LPIPS (Zhang et al., 2018), by the package lpips; None where it or its weights lack.

    The weights are those that torchvision keeps in torch.hub's folder. Nothing is ever downloaded.
    """
    if not (Path(torch.hub.get_dir()) / "checkpoints" / ALEXNET).is_file():
        return None
    try:
        package = import_module("lpips")  # belongs to no extra: without its weights it is of no use
    except ImportError:
        return None
    return package.LPIPS(net="alex", verbose=False).eval().to(device)


@torch.inference_mode()
def lpips(network: nn.Module, a: np.ndarray | Tensor, b: np.ndarray | Tensor) -> float:
    """Learned perceptual distance, 0 where equal. a, b (T, H, W, 3) -> mean over frames

    network: from load_lpips(); takes two (1, 3, H, W) in [-1, 1].
    """
    a, b, data_range = _pair(a, b)
    device = next(network.parameters()).device
    as_input = lambda x: (x.to(device).float() / data_range * 2 - 1).permute(2, 0, 1)[None]  # (1, 3, H, W)
    return sum(network(as_input(x), as_input(y)).item() for x, y in zip(a, b, strict=True)) / len(a)


def _pair(a: np.ndarray | Tensor, b: np.ndarray | Tensor) -> tuple[Tensor, Tensor, float]:
    """Both videos as tensors, checked, and their data range."""
    a, b = torch.as_tensor(a), torch.as_tensor(b)
    if a.shape != b.shape or a.ndim != 4 or a.shape[-1] != 3 or a.numel() == 0:
        raise ValueError(
            f"frames are {tuple(a.shape)} and {tuple(b.shape)}, wanted two equal shapes (T, H, W, 3)"
        )
    if a.dtype != b.dtype or not (a.dtype == torch.uint8 or a.is_floating_point()):
        raise TypeError(
            f"frames are {a.dtype} and {b.dtype}, wanted both uint8 or both the same floating type"
        )
    if a.dtype == torch.uint8:
        return a, b, 255.0
    for frames in (a, b):
        low, high = frames.min().item(), frames.max().item()  # both NaN where any value is
        if not (low >= 0 and high <= 1):
            raise ValueError(
                f"frames lie in [{low:g}, {high:g}], wanted floats in [0, 1] without NaN; rescale or clamp"
            )
    return a, b, 1.0


def _ssim_frame(x: Tensor, y: Tensor, data_range: float) -> float:
    """x, y (H, W, 3) -> mean of the SSIM map over pixels and channels."""
    x, y = (z.double().permute(2, 0, 1) for z in (x, y))  # (3, H, W)
    mean_x, mean_y = _blur(x), _blur(y)  # (3, H-10, W-10)
    var_x = _blur(x * x) - mean_x**2
    var_y = _blur(y * y) - mean_y**2
    cov = _blur(x * y) - mean_x * mean_y
    c1, c2 = (K1 * data_range) ** 2, (K2 * data_range) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * cov + c2) / (
        var_x + var_y + c2
    )  # contrast and structure in one, as c3 = c2 / 2 (eq. 13)
    return (luminance * structure).mean().item()


def _blur(x: Tensor) -> Tensor:
    """Weighted mean over SSIM's window, rows then columns. x (n, H, W) -> (n, H-10, W-10)

    A sum of shifted views: in float64 on a CPU this is 16 times faster than conv2d.
    """
    weights = [math.exp(-((i - WINDOW // 2) ** 2) / (2 * SIGMA**2)) for i in range(WINDOW)]
    for dim in (1, 2):
        size = x.shape[dim] - WINDOW + 1
        blurred = torch.zeros_like(x.narrow(dim, 0, size))
        for i, weight in enumerate(weights):
            blurred.add_(x.narrow(dim, i, size), alpha=weight / sum(weights))
        x = blurred
    return x
