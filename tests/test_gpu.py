"""The embedded model on a card: make gpu, or pytest -m gpu."""

import pytest
import torch

import minidit
from minidit.metrics import psnr

pytestmark = pytest.mark.gpu
PROMPT = "a red circle moves left to right"


@pytest.fixture(scope="module")
def reference():
    return minidit.load("demo", device="cpu", dtype="fp32").generate(PROMPT)


def test_fp32_on_the_card_gives_the_frames_of_the_cpu(reference):
    video = minidit.load("demo", device="cuda", dtype="fp32").generate(PROMPT)
    assert psnr(video.frames, reference.frames) > 40  # other sums; the VAE in TF32, torch's default


def test_bf16_is_the_default_and_near(reference):
    video = minidit.load("demo").generate(PROMPT)
    assert (video.settings.device, video.settings.dtype) == ("cuda", "bf16")
    assert psnr(video.frames, reference.frames) > 20  # rounding of 8 bits through 30 steps


@pytest.mark.parametrize("backend", ["flash", "cudnn", "efficient", "math"])
def test_attention_backends_agree(backend):
    from minidit.attention import attention

    draw = torch.Generator("cuda").manual_seed(0)
    q, k, v = (torch.randn(1, 4, 512, 128, device="cuda", generator=draw).bfloat16() for _ in range(3))
    want = attention(q.float(), k.float(), v.float(), backend="math")
    got = attention(q, k, v, backend=backend).float()
    assert ((got - want).norm() / want.norm()).item() < 0.01  # bf16 rounding of scores and output


def test_same_seed_same_latents():
    engine = minidit.load("demo", device="cuda")
    assert torch.equal(engine.generate(PROMPT).latents, engine.generate(PROMPT).latents)
