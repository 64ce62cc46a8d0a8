"""PSNR and SSIM against hand values and a window-by-window reference."""

import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from minidit import metrics
from minidit.metrics import psnr, ssim


def noisy_pair(shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    a = rng.integers(0, 256, shape)
    b = np.clip(a + rng.integers(-40, 41, shape), 0, 255)
    return a.astype(np.uint8), b.astype(np.uint8)


def slow_ssim(a: np.ndarray, b: np.ndarray, data_range: float) -> float:
    """Wang et al. (2004), eq. 13 to 16: weighted mean, variance and covariance at each window."""
    line = np.exp(-((np.arange(11) - 5.0) ** 2) / (2 * 1.5**2))
    w = np.outer(line, line) / line.sum() ** 2
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    T, H, W, _ = a.shape
    values = []
    for t, i, j, c in np.ndindex(T, H - 10, W - 10, 3):
        x = a[t, i : i + 11, j : j + 11, c].astype(float)
        y = b[t, i : i + 11, j : j + 11, c].astype(float)
        mx, my = (w * x).sum(), (w * y).sum()
        vx, vy = (w * (x - mx) ** 2).sum(), (w * (y - my) ** 2).sum()
        cov = (w * (x - mx) * (y - my)).sum()
        values.append((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    return float(np.mean(values))


def test_psnr_of_a_constant_error_is_known():
    a = np.full((3, 4, 5, 3), 100, np.uint8)
    assert psnr(a, a + np.uint8(1)) == pytest.approx(20 * math.log10(255))  # 48.13 dB
    ones = torch.ones(2, 4, 5, 3)
    assert psnr(ones, ones * 0.5) == pytest.approx(20 * math.log10(2))  # 6.02 dB
    assert psnr(a * 0, a * 0 + np.uint8(255)) == pytest.approx(0)


def test_psnr_does_not_wrap_and_is_symmetric():
    a, b = noisy_pair((2, 12, 13, 3))
    mse = np.mean((a.astype(float) - b.astype(float)) ** 2)
    assert psnr(a, b) == psnr(b, a) == pytest.approx(10 * math.log10(255**2 / mse), rel=1e-12)


def test_psnr_averages_the_error_over_frames_before_the_logarithm():
    a = np.zeros((2, 4, 4, 3), np.uint8)
    b = a.copy()
    b[1] = 2  # MSE 0 and 4, so 2 over both; a mean of the two PSNRs would be infinite
    assert psnr(a, b) == pytest.approx(10 * math.log10(255**2 / 2))


def test_equal_videos_have_infinite_psnr_and_ssim_one():
    a, _ = noisy_pair((2, 12, 13, 3))
    assert psnr(a, a.copy()) == math.inf
    assert ssim(a, a.copy()) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("size", [(11, 11), (13, 17)], ids=["11x11", "13x17"])
def test_ssim_matches_the_definition(size):
    a, b = noisy_pair((2, *size, 3))
    assert ssim(a, b) == pytest.approx(slow_ssim(a, b, 255), abs=1e-9)  # float64 on both sides


def test_ssim_of_flat_videos_is_the_luminance_term():
    a, b = np.full((1, 16, 16, 3), 100, np.uint8), np.full((1, 16, 16, 3), 150, np.uint8)
    c1 = 2.55**2
    assert ssim(a, b) == pytest.approx((2 * 100 * 150 + c1) / (100**2 + 150**2 + c1), abs=1e-9)


def test_floats_give_the_numbers_of_their_levels():
    a, b = noisy_pair((2, 12, 13, 3))
    fa, fb = (torch.from_numpy(x).double() / 255 for x in (a, b))
    assert psnr(fa, fb) == pytest.approx(psnr(a, b), rel=1e-9)
    assert ssim(fa, fb) == pytest.approx(ssim(a, b), rel=1e-9)
    assert ssim(fa.float(), fb.float()) == pytest.approx(ssim(a, b), rel=1e-5)  # inputs rounded to float32


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_what_cannot_be_compared_is_refused(metric):
    a = torch.full((2, 12, 12, 3), 0.5)
    with pytest.raises(ValueError, match="equal shapes"):
        metric(a, a[:1])
    with pytest.raises(ValueError, match="equal shapes"):
        metric(a[0], a[0])
    with pytest.raises(TypeError, match="both uint8"):
        metric(a, (a * 255).to(torch.uint8))
    holed = a.clone()
    holed[1, 3, 4, 0] = math.nan
    for x, y in ((a, holed), (holed, a)):
        with pytest.raises(ValueError, match="without NaN"):
            metric(x, y)
    with pytest.raises(ValueError, match=r"wanted floats in \[0, 1\]"):
        metric(a, a - 1)


def test_ssim_refuses_frames_smaller_than_its_window():
    a = np.zeros((1, 10, 32, 3), np.uint8)
    with pytest.raises(ValueError, match="32x10, wanted 11 pixels"):
        ssim(a, a)


class Network(torch.nn.Module):
    """Stands in for LPIPS: the mean distance, and what it was shown."""

    def __init__(self, **options):
        super().__init__()
        self.weight, self.options, self.seen = torch.nn.Parameter(torch.ones(1)), options, []

    def forward(self, a, b):
        self.seen.append((a, b))
        return (a - b).abs().mean().reshape(1, 1, 1, 1)


def test_lpips_is_shown_frame_after_frame_in_its_own_range():
    network = Network()
    a, b = np.zeros((2, 4, 6, 3), np.uint8), np.full((2, 4, 6, 3), 255, np.uint8)
    b[1] = 0
    assert metrics.lpips(network, a, b) == pytest.approx(1.0)  # 2 and 0
    assert [tuple(x.shape) for x in network.seen[0]] == [(1, 3, 4, 6)] * 2
    assert network.seen[0][0].unique().tolist() == [-1.0] and network.seen[0][1].unique().tolist() == [1.0]
    assert metrics.lpips(network, a / 255.0, b / 255.0) == pytest.approx(1.0)


def test_lpips_is_loaded_only_where_its_weights_lie_already(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=Network))
    assert metrics.load_lpips() is None  # it would download them
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / metrics.ALEXNET).touch()
    network = metrics.load_lpips()
    assert network.options == {"net": "alex", "verbose": False} and not network.training
    monkeypatch.setitem(sys.modules, "lpips", None)
    assert metrics.load_lpips() is None
