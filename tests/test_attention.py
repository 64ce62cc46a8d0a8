"""The door to attention: which backend takes which tensors, by rules alone, and what each of them gives."""

import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minidit import attention as door
from minidit.attention import BACKENDS, PACKAGES, TORCHS, attention, check_backend, chosen_backend
from minidit.attention_table import HALF, ON_CPU, TABLE, TAKES, Case, choose, pads, refusal

WAN = Case("sm_90", "bf16", 1, 32760, 32760, 128, 128)  # self-attention at 832x480, 81 frames


def case(**changes) -> Case:
    return Case(**vars(WAN) | changes)


def draw(L: int, M: int, R: int, K: int, *, dtype=torch.float32, device="cpu") -> list[Tensor]:
    seed = torch.Generator().manual_seed(L + M + R + K)
    shapes = (2, 3, L, R), (2, 3, M, R), (2, 3, M, K)
    return [torch.randn(shape, generator=seed).to(dtype).to(device) for shape in shapes]


@pytest.mark.parametrize("L, M, R, K", [(9, 9, 64, 64), (20, 7, 32, 32), (9, 9, 16, 24)], ids=str)
def test_auto_on_the_cpu_is_torchs_own_attention(L, M, R, K):
    q, k, v = draw(L, M, R, K)
    want = F.scaled_dot_product_attention(q, k, v, scale=0.3)
    assert torch.equal(attention(q, k, v, scale=0.3), want)


@pytest.mark.parametrize("backend", ["flash", "math", "triton"])
@pytest.mark.parametrize("R", [64, 48])
def test_backends_agree_on_the_cpu(backend, R):
    q, k, v = draw(20, 33, R, 64)
    want = (q @ k.mT * 0.1).softmax(-1) @ v
    torch.testing.assert_close(attention(q, k, v, scale=0.1, backend=backend), want, rtol=1e-5, atol=1e-6)


def test_narrow_queries_and_keys_need_a_scale():
    q, k, v = draw(9, 9, 16, 24)
    with pytest.raises(ValueError, match="q and k of width 16 against v of 24 need a scale"):
        attention(q, k, v)


def test_without_a_scale_it_is_that_of_the_width():
    q, k, v = draw(9, 9, 64, 64)
    want = F.scaled_dot_product_attention(q, k, v)
    for backend in ("auto", "math", "triton"):
        torch.testing.assert_close(attention(q, k, v, backend=backend), want, rtol=1e-5, atol=1e-6)


TABLE_SAYS = {  # by hand, from the published figures that the rows cite
    "Wan on Hopper": ({}, "cudnn"),
    "Wan on Blackwell": ({"card": "sm_100"}, "cudnn"),
    "Wan on Ampere": ({"card": "sm_80"}, "flash"),
    "Wan, its text": ({"keys": 512}, "flash"),
    "CogVideoX on Hopper": ({"qk_width": 64, "v_width": 64}, "flash"),
    "sliced on Hopper": ({"qk_width": 64}, "cudnn"),
    "sliced to no multiple of 8": ({"qk_width": 50}, "flash"),
    "sliced on Ampere": ({"card": "sm_80", "qk_width": 64}, "triton"),
    "sliced on Ampere, with gradients": ({"card": "sm_80", "qk_width": 64, "needs_grad": True}, "efficient"),
    "over time, sliced": ({"batch": 3600, "queries": 16, "keys": 16, "qk_width": 64}, "efficient"),
    "over time": ({"batch": 100000, "queries": 16, "keys": 16}, "flash"),
    "a large batch": ({"batch": 100000}, "flash"),
    "fp32": ({"dtype": "fp32"}, "efficient"),
    "fp32, odd": ({"dtype": "fp32", "qk_width": 6, "v_width": 6}, "math"),
    "an autoencoder": ({"qk_width": 512, "v_width": 512}, "efficient"),
    "another dtype": ({"dtype": "torch.float64"}, "math"),
    "another card": ({"card": "other"}, "torch"),
    "no card": ({"card": "cpu"}, "torch"),
}


@pytest.mark.parametrize("name", TABLE_SAYS)
def test_auto_follows_the_table(name):
    changes, want = TABLE_SAYS[name]
    assert choose(case(**changes)) == want


def test_every_case_finds_a_backend_that_takes_it():
    for card in ("sm_80", "sm_90", "sm_100"):
        for dtype in (*HALF, "fp32", "torch.float64"):
            for queries, keys in ((32760, 32760), (16, 16), (1, 1), (32760, 1)):
                for widths in ((128, 128), (50, 128), (72, 72), (512, 512), (7, 7), (128, 64)):
                    this = Case(card, dtype, 70000, queries, keys, *widths)
                    assert refusal(choose(this), this) is None


def test_rows_name_backends_and_say_why():
    for row in TABLE:
        assert row.backends[-1] == "math" and set(row.backends) <= set(TAKES)
        assert not {"sage", "flash_attn"} & set(row.backends)  # packages, and int8, are asked for by name
        assert row.evidence and set(row.cards) <= {"sm_80", "sm_90", "sm_100"}
    assert set(TAKES) | {"auto"} == set(BACKENDS) and set(ON_CPU) <= set(TAKES)


@pytest.mark.parametrize(
    "backend, changes, said",
    [
        ("flash", {"dtype": "fp32"}, "it takes bf16, fp16, not fp32"),
        ("flash", {"qk_width": 512, "v_width": 512}, "heads up to 256 wide, not 512"),
        ("flash", {"v_width": 64}, "one width, not queries of 128 and values of 64"),
        ("cudnn", {"qk_width": 36}, "multiples of 8, not 36 and 128"),
        ("cudnn", {"batch": 65536}, "a batch up to 65535"),
        ("cudnn", {"keys": 1}, "2 keys and more, not 1"),
        ("efficient", {"dtype": "fp32", "qk_width": 6}, "multiples of 4, not 6 and 128"),
        ("triton", {"dtype": "fp32"}, "not fp32"),
        ("triton", {"needs_grad": True}, "no gradients"),
        ("sage", {"qk_width": 256, "v_width": 256}, "heads up to 128"),
        ("cudnn", {"card": "cpu"}, "it needs a GPU"),
        ("sage", {"card": "cpu"}, "it needs a GPU"),
    ],
)
def test_refusals_say_what_is_wanted(backend, changes, said):
    assert said in refusal(backend, case(**changes))


@pytest.mark.parametrize("backend", TAKES)
def test_every_backend_takes_a_sliced_wan(backend):
    sliced = case(qk_width=80)
    assert refusal(backend, sliced) is None
    assert pads(backend, sliced) == (backend in ("flash", "flash_attn", "sage"))
    assert not pads(backend, case())


def test_a_forced_backend_that_cannot_run_raises():
    q, k, v = draw(9, 9, 16, 16)
    with pytest.raises(
        ValueError, match="attention 'cudnn' cannot run here: it needs a GPU; try --attention auto"
    ):
        attention(q, k, v, backend="cudnn")
    with pytest.raises(ValueError, match="unknown attention 'fast'; choose one of auto, flash, cudnn"):
        attention(q, k, v, backend="fast")


@pytest.mark.parametrize("backend, package", [("flash_attn", "flash-attn"), ("sage", "sageattention")])
def test_a_missing_package_is_named(backend, package, monkeypatch):
    monkeypatch.setattr(door, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=f"attention {backend!r} needs a package .*; pip install {package}"):
        check_backend(backend)


def test_packages_are_called_as_they_document(monkeypatch):
    """Stand-ins with the packages' signatures: flash_attn wants (B, L, N, K), sageattention (B, N, L, K)."""
    swap = lambda *tensors: [x.transpose(1, 2) for x in tensors]

    def flash_attn_func(q, k, v, softmax_scale=None):
        return F.scaled_dot_product_attention(*swap(q, k, v), scale=softmax_scale).transpose(1, 2)

    def sageattn(q, k, v, tensor_layout, is_causal, sm_scale):
        assert (tensor_layout, is_causal) == ("HND", False)
        return F.scaled_dot_product_attention(q, k, v, scale=sm_scale)

    modules = {"flash_attn": flash_attn_func, "sageattention": sageattn}
    for name, function in modules.items():
        module = types.ModuleType(name)
        setattr(module, function.__name__, function)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(door, "find_spec", lambda name: name)
    monkeypatch.setattr(door, "card", lambda device: "sm_90")
    q, k, v = draw(20, 33, 48, 64, dtype=torch.bfloat16)
    want = F.scaled_dot_product_attention(q, k, v, scale=0.1)
    for backend in PACKAGES:
        assert chosen_backend(q, k, v, backend) == (backend, True)
        got = attention(q, k, v, scale=0.1, backend=backend)
        torch.testing.assert_close(got, want, rtol=2**-7, atol=2**-9)  # bf16: last places of weights, output


@pytest.mark.parametrize("backend", ["auto", "math", "triton"])
def test_compiled_code_chooses_in_one_graph(backend):
    q, k, v = draw(20, 20, 48, 64)
    run = lambda q, k, v: attention(q, k, v, scale=0.1, backend=backend)
    got = torch.compile(run, fullgraph=True, backend="aot_eager")(q, k, v)
    torch.testing.assert_close(got, run(q, k, v), rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["auto", *TORCHS, "triton"])
@pytest.mark.parametrize(
    "L, M, R, K", [(2048, 2048, 128, 128), (2048, 2048, 80, 128), (1500, 77, 72, 72)], ids=str
)
def test_backends_agree_on_the_card(backend, L, M, R, K):
    q, k, v = draw(L, M, R, K, dtype=torch.bfloat16, device="cuda")
    want = (q.float() @ k.float().mT * 0.1).softmax(-1) @ v.float()
    got = attention(q, k, v, scale=0.1, backend=backend).float()
    assert ((got - want).norm() / want.norm()).item() < 0.01  # bf16 rounding of weights and output


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["auto", *TORCHS, "triton"])
def test_the_card_compiles_the_choice_in_one_graph(backend):
    q, k, v = draw(2048, 2048, 80, 128, dtype=torch.bfloat16, device="cuda")
    run = lambda q, k, v: attention(q, k, v, scale=0.1, backend=backend)
    got = torch.compile(run, fullgraph=True)(q, k, v)
    torch.testing.assert_close(got, run(q, k, v), rtol=0.02, atol=0.002)
