"""Calibration: what the probes collect, the bases for slicing, and the profile that comes of it."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minidit.cache.calibrate import (
    CovarianceProbe,
    ErrorProbe,
    SliceProbe,
    calibrate_unicp,
    coverage,
    drift_by_step,
    make_bases,
    pool_numbers,
    relative_l2,
    second_moment,
    shared_basis,
    slice_widths,
    two_sided_basis,
    uncachable_pairs,
)
from minidit.cache.plan import RunInfo
from minidit.cache.policies.none import NoCache
from minidit.cache.policies.unicp import UniCP
from minidit.models.wan import Wan
from minidit.presets import ScheduleConfig, WanConfig
from minidit.sampling import Forward, denoise
from minidit.schedules import make_schedule

BASES = {"two-sided": two_sided_basis, "pca": shared_basis}
TINY = WanConfig(
    width=64, mlp_width=96, heads=2, depth=3, channels=4, text_width=16, text_len=6, freq_width=32
)
STEPS = 7


def correlated(seed: int, tokens: int = 400) -> tuple[Tensor, Tensor]:
    """Queries and keys of 4 heads of width 32 whose directions differ much in energy, each in its own way."""
    g = torch.Generator().manual_seed(seed)
    energy = torch.logspace(0.5, -1.5, 32, dtype=torch.float64)
    mixed = lambda: torch.linalg.qr(torch.randn(4, 32, 32, generator=g, dtype=torch.float64)).Q
    q, k = (
        torch.randn(1, 4, tokens, 32, generator=g, dtype=torch.float64) * energy @ mixed() for _ in range(2)
    )
    return q, k + 3 * torch.randn(1, 4, 1, 32, generator=g, dtype=torch.float64)  # keys have a mean


def weights_of(q: Tensor, k: Tensor) -> Tensor:
    return (q @ k.mT / 32**0.5).softmax(-1)


def bases_of(q: Tensor, k: Tensor, basis: str) -> tuple[Tensor, Tensor]:
    return BASES[basis](second_moment(q), second_moment(k - k.mean(2, keepdim=True)))


class Fixed:
    """An attention module whose queries and keys are given."""

    def __init__(self, q: Tensor, k: Tensor):
        self.qkv = q, k, None

    def queries_keys_values(self) -> tuple:
        return self.qkv


class Watched(NoCache):
    """No caching; tells the probe which step begins."""

    def __init__(self, probe, prompt: int):
        self.probe, self.prompt = probe, prompt

    def plan(self, step):
        self.probe.begin_step(self.prompt, step.i)
        return super().plan(step)


def tiny_run_once(prompts: int = 2, is_batched: bool = True):
    """run_once of a small random Wan: `prompts` random texts and seeds."""
    torch.manual_seed(11)
    model = Wan(TINY).eval().requires_grad_(False)
    g = torch.Generator().manual_seed(12)
    texts = [[torch.randn(n, 16, generator=g) for n in (4, 1)] for _ in range(prompts)]
    noises = [torch.randn(1, 4, 2, 6, 6, generator=g) for _ in range(prompts)]

    def run_once(probe):
        for prompt, (text, noise) in enumerate(zip(texts, noises, strict=True)):
            context = model.prepare(text, (2, 6, 6), branches=("cond", "uncond"))
            forward = Forward(model, context, is_batched, probe=probe)
            schedule = make_schedule(ScheduleConfig("euler"), STEPS)
            denoise(forward, schedule, noise, Watched(probe, prompt), guidance_scale=4.0)

    return run_once


@pytest.mark.parametrize(
    "head_width, widths",
    [(32, (28, 26, 22, 20)), (64, (48,)), (72, (64, 48)), (128, (112, 96, 80)), (48, (42, 39, 33, 30))],
)
def test_slice_widths_are_what_the_hardware_likes(head_width, widths):
    assert slice_widths(head_width) == widths


def test_errors_are_relative_l2_between_steps_per_branch_and_prompt():
    g = torch.Generator().manual_seed(0)
    outputs = torch.randn(2, 4, 2, 5, 3, generator=g)  # (prompt, step, branch, L, D)
    probe = ErrorProbe(("attn",), max_window=2)
    for prompt in range(2):
        for step in range(4):
            probe.begin_step(prompt, step)
            for row, branch in enumerate(("cond", "uncond")):  # one branch after the other
                probe((branch,), 0, "attn", None, (), outputs[prompt, step, row : row + 1])
                probe((branch,), 0, "mlp", None, (), outputs[prompt, step, row : row + 1] * 9)
    error = lambda p, i, j, b: ((outputs[p, j, b] - outputs[p, i, b]).norm() / outputs[p, i, b].norm()).item()
    want = lambda i, j: sum(max(error(p, i, j, b) for b in range(2)) for p in range(2)) / 2
    table = probe.table()
    assert list(table) == ["attn"] and [len(row[0]) for row in table["attn"]] == [2, 2, 1, 0]
    for i, row in enumerate(table["attn"]):
        for k, got in enumerate(row[0], 1):
            assert got == pytest.approx(want(i, i + k), rel=1e-3)  # rounded to four digits


def test_pooling_takes_the_worse_branch_and_the_mean_or_the_worst_prompt():
    found = {
        (0, "cond", 5): torch.tensor([1.0, 8.0]),
        (0, "uncond", 5): torch.tensor([3.0, 2.0]),
        (1, "cond", 5): torch.tensor([5.0, 4.0]),
    }
    assert pool_numbers(found, "mean") == {(5,): [4.0, 6.0]}
    assert pool_numbers(found, "max") == {(5,): [5.0, 8.0]}


def test_nothing_is_no_distance_from_nothing():
    zero = torch.zeros(3)
    assert relative_l2(zero, zero) == 0 and relative_l2(torch.ones(3), zero) > 1e6


@pytest.mark.parametrize("basis", BASES)
def test_full_width_is_exact_attention(basis):
    q, k = correlated(1)
    t_q, t_k = bases_of(q, k, basis)
    assert (t_q @ t_k.mT - torch.eye(32)).abs().max() < 1e-9  # fp64, and moments of condition 1e4
    assert (weights_of(q @ t_q, k @ t_k) - weights_of(q, k)).abs().max() < 1e-9
    q, k, v = (x.float() for x in (q, k, k.roll(1, 2)))
    sliced = F.scaled_dot_product_attention(q @ t_q.float(), k @ t_k.float(), v, scale=32**-0.5)
    exact = F.scaled_dot_product_attention(q, k, v)
    assert (sliced - exact).abs().max() < 1e-4 * exact.abs().max()  # fp32


@pytest.mark.parametrize("width", (28, 24, 20))
def test_the_two_sided_basis_loses_less_than_the_shared_one(width):
    for seed in range(3):
        q, k = correlated(seed)
        errors = {}
        for basis in BASES:
            t_q, t_k = (t[:, :, :width] for t in bases_of(q, k, basis))
            errors[basis] = (weights_of(q @ t_q, k @ t_k) - weights_of(q, k)).norm()
        assert errors["two-sided"] < 0.8 * errors["pca"]


def test_the_two_sided_basis_gives_the_best_scores_of_its_rank():
    """The scores are q k^T cut to its 20 largest singular values: nothing of that rank is nearer."""
    q, k = correlated(4)
    k = k - k.mean(2, keepdim=True)
    t_q, t_k = (t[:, :, :20] for t in two_sided_basis(second_moment(q), second_moment(k), ridge=1e-12))
    lost = ((q @ t_q) @ (k @ t_k).mT - q @ k.mT).square().sum((-1, -2))
    least = torch.linalg.svdvals(q @ k.mT)[..., 20:].square().sum(-1)
    assert torch.allclose(lost, least, rtol=1e-6)


def test_centring_the_keys_changes_no_attention():
    q, k = correlated(2)
    assert (weights_of(q, k - k.mean(2, keepdim=True)) - weights_of(q, k)).abs().max() < 1e-12


def test_covariances_do_not_see_a_constant_in_the_keys():
    q, k = correlated(3)
    sums = []
    for shift in (0.0, 7.0):
        probe = CovarianceProbe({(0, 0)})
        probe.begin_step(0, 0)
        probe(("cond",), 0, "attn", Fixed(q, k + shift), (), None)
        sums.append(probe.sums[0])
    assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(*sums, strict=True))
    assert torch.linalg.eigvalsh(sums[0][1]).min() > 0


def test_covariances_come_of_uncachable_pairs_alone():
    q, k = correlated(5)
    probe = CovarianceProbe({(0, 1), (2, 1), (1, 0)})
    for step in range(3):
        probe.begin_step(0, step)
        for block in range(3):
            scaled = Fixed(q * (10**step), k)
            probe(("cond",), block, "attn", scaled, (), None)
            probe(("cond",), block, "mlp", scaled, (), None)
    once = CovarianceProbe({(0, 0)})
    once.begin_step(0, 0)
    once(("cond",), 0, "attn", Fixed(q, k), (), None)
    (c_q, c_k), sums = once.sums[0], probe.sums
    assert sorted(sums) == [0, 1]
    assert torch.allclose(sums[0][0], 100 * c_q) and torch.allclose(sums[0][1], c_k)
    assert torch.allclose(sums[1][0], (1 + 10**4) * c_q) and torch.allclose(sums[1][1], 2 * c_k)


def test_a_head_without_energy_has_finite_bases():
    c = torch.zeros(2, 32, 32, dtype=torch.float64)
    c[1, 0, 0] = 1.0
    for tensor in make_bases({0: (c, c)}, "two-sided").values():
        assert tensor.isfinite().all()


def test_uncachable_are_the_steps_that_the_windows_leave():
    errors = [[[0.0, 0.9], [0.9, 0.9]], [[0.0], [0.9]], [[], []]]
    assert uncachable_pairs(errors, 0.05, "strict") == {(0, 0), (2, 0), (0, 1), (1, 1), (2, 1)}


@pytest.mark.parametrize("is_batched", (True, False), ids=("batched", "sequential"))
def test_the_profile_of_a_small_model_drives_the_policy(is_batched):
    data, tensors = calibrate_unicp(tiny_run_once(is_batched=is_batched), threshold="E4")
    again = json.loads(json.dumps(data))
    assert again == data and (data["steps"], data["depth"], data["prompts"], data["tokens"]) == (
        STEPS,
        3,
        2,
        18,
    )
    assert sorted(tensors) == sorted(
        (block, f"attn.{part}.{width}") for block in range(3) for part in "qk" for width in (28, 26, 22, 20)
    )
    losses = torch.tensor(data["slice_losses"])  # (step, block, width)
    assert losses.shape == (STEPS, 3, 4) and (losses.diff(dim=2) > -1e-3).all() and losses.max() < 0.5
    policy = UniCP(threshold=1.0, profile=again)
    table = make_schedule(ScheduleConfig("euler"), STEPS).steps(4.0)
    policy.reset(RunInfo(table, 3, Wan.subs, ("cond", "uncond"), "wan"))
    assert policy.sources[0, "attn"] == (0,) * STEPS  # a random model drifts slowly


def test_calibration_is_the_same_batched_and_sequential():
    both = [calibrate_unicp(tiny_run_once(is_batched=b))[0] for b in (True, False)]
    flat = [torch.tensor([x for row in d["errors"]["attn"] for col in row for x in col]) for d in both]
    assert torch.allclose(*flat, rtol=2e-3)  # four digits of numbers from differently rounded products


def test_slice_losses_are_those_of_the_modules_own_output():
    seen = {}

    class Twice(SliceProbe):
        def __call__(self, branches, block, name, module, inputs, out):
            super().__call__(branches, block, name, module, inputs, out)
            if name == "attn" and (self.step, block) == (3, 1):
                q, k, v = module.queries_keys_values(*inputs)
                q, k = q @ self.tensors[1, "attn.q.20"], k @ self.tensors[1, "attn.k.20"]
                mine = (q @ k.mT / 32**0.5).softmax(-1) @ v
                mine = module.out(mine.transpose(1, 2).flatten(2))
                seen[self.prompt] = max(relative_l2(a, b).item() for a, b in zip(mine, out, strict=True))

    run_once = tiny_run_once()
    _, tensors = calibrate_unicp(run_once)
    probe = Twice(tensors, (28, 20))
    run_once(probe)
    assert probe.table("max")[3][1][1] == pytest.approx(max(seen.values()), rel=1e-3)  # four digits


def test_a_run_that_shows_nothing_is_refused():
    with pytest.raises(ValueError, match="showed the probe no sub-module"):
        calibrate_unicp(lambda probe: None)


@pytest.mark.parametrize("options", [{"basis": "svd"}, {"pool": "median"}], ids=str)
def test_unknown_choices_are_refused(options):
    with pytest.raises(ValueError, match="choose from"):
        calibrate_unicp(lambda probe: None, **options)


def test_coverage_and_drift_sum_up_the_error_table():
    errors = {"attn": [[[0.04, 0.01], [0.2, 0.2]], [[0.06], [0.03]], [[], []]]}
    data = {"steps": 3, "depth": 2, "errors": errors}
    assert coverage(data)["E2"] == {"strict": {"attn": 3}, "literal": {"attn": 3}}
    assert coverage(data)["E1"] == {"strict": {"attn": 0}, "literal": {"attn": 2}}
    assert coverage(data)["E5"] == {"strict": {"attn": 3}, "literal": {"attn": 3}}
    assert drift_by_step(data) == {"attn": [pytest.approx(0.12), pytest.approx(0.045)]}
    assert drift_by_step(data, 2) == {"attn": [pytest.approx(0.105)]}
