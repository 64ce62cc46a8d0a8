"""TeaCache's polynomials and thresholds by release and signal, as published (ali-vilab/TeaCache 7c10efc).

TeaCache4Wan2.1/teacache_generate.py 883-976, TeaCache4CogVideoX1.5/teacache_sample_video.py 10-16,
TeaCache4HunyuanVideo/teacache_sample_video.py 102, eval/teacache/experiments/opensora.py 77 and latte.py 180.
Fitted at 50 steps, of Open-Sora at 30.
"""

from collections.abc import Sequence
from dataclasses import dataclass


def polynomial(coefficients: Sequence[float], x: float) -> float:
    """Its value at x. coefficients: highest power first"""
    total = 0.0
    for c in coefficients:
        total = total * x + c
    return total


@dataclass(frozen=True)
class Published:
    """The authors' numbers of a release: the polynomial, and its thresholds from slow to fast."""

    coefficients: tuple[float, ...]
    thresholds: tuple[float, ...] = (0.1, 0.2)


PUBLISHED = {  # (release, signal), the default signal of a release first
    ("wan2.1-t2v-1.3b", "time"): Published(
        (2396.76752, -1311.10545, 201.331979, -8.29855975, 0.137887774), (0.05, 0.07, 0.08)
    ),
    ("wan2.1-t2v-1.3b", "time_mod"): Published(
        (-52186.2437, 9230.41404, -528.275948, 13.6987616, -0.0499875664), (0.05, 0.1)
    ),
    ("wan2.1-t2v-14b", "time"): Published(
        (-5784.54975374, 5449.50911966, -1811.16591783, 256.27178429, -13.02252404), (0.14, 0.15, 0.2)
    ),
    ("wan2.1-t2v-14b", "time_mod"): Published(
        (-303318.725, 49053.7029, -2655.30556, 58.7365115, -0.315583525), (0.1, 0.2)
    ),
    ("hunyuan-video", "input"): Published(
        (733.226126, -401.131952, 67.5869174, -3.149878, 0.0961237896), (0.1, 0.15)
    ),
    ("cogvideox-2b", "time"): Published(
        (-31.0658903, 25.4732368, -5.92380459, 1.75769064, -0.00361568434)
    ),
    ("cogvideox-5b", "time"): Published(
        (-1538.80483, 843.202495, -134.363087, 7.97131516, -0.0523162339)
    ),
    ("cogvideox1.5-5b", "time"): Published(
        (250.210439, -165.061612, 35.7804877, -0.781551492, 0.0358559703), (0.1, 0.2, 0.3)
    ),
    ("open-sora-1.2", "input"): Published(
        (217.546007, -118.329252, 26.8662585, -0.0459364272, 0.048442624)
    ),
    ("latte-1", "input"): Published((-2464.34137, 308.044764, 80.7447667, -4.11385132, 0.111001402)),
}  # fmt: skip
