"""Schedules against the recorded originals, against diffusers, and against a pencil."""

import math

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load, save

from minidit import schedules
from minidit.presets import ScheduleConfig
from minidit.schedules import Schedule, State, make_schedule

KINDS = {
    "wan_unipc": ("unipc", "wan"),
    "wan_dpmpp": ("dpm++", "wan"),
    "diffusers_unipc": ("unipc", "diffusers"),
    "diffusers_flowmatch_euler": ("euler", "diffusers"),
}
COMBOS = [(20, 3.0), (20, 5.0), (20, 8.0), (50, 3.0), (50, 5.0), (50, 8.0), (10, 5.0), (6, 3.0)]
SOLVERS = [*KINDS.values(), ("euler", "wan")]
TOLERANCE = 2e-5  # fp32 rounding of |x| < 6 over 50 steps; measured 5e-6. The recordings ask for 1e-4


def read(folder, names=None):
    with safe_open(folder / "io.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in names or file.keys()}


def read_case(folder, kind, n, shift):
    """sigmas, timesteps, x, v and, for UniPC, x_corrected of a recorded run, and its toy model's a, b, c."""
    fields = ["sigmas", "timesteps", "x", "v"] + ["x_corrected"] * ("unipc" in kind)
    prefix = f"{kind}.n{n}.shift{shift:g}."
    tensors = read(folder, [prefix + field for field in fields] + ["in.a", "in.b", "in.c"])
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def schedule_of(solver, grid, n, shift):
    return make_schedule(ScheduleConfig(solver=solver, sigma_grid=grid, shift=shift), n)


def run(schedule, x, model):
    """[x before step 0, ..., x after the last step], [state after each step]; model(i, x) -> v."""
    xs, states, state = [x], [], schedule.start()
    for i in range(len(schedule.timesteps)):
        x, state = schedule.step(i, x, model(i, x), state)
        xs.append(x)
        states.append(state)
    return xs, states


def assert_close(got, wanted, tolerance=TOLERANCE):
    assert (got - wanted).abs().max().item() <= tolerance


@pytest.mark.parametrize("n, shift", COMBOS)
@pytest.mark.parametrize("kind", KINDS)
def test_tables_equal_the_recorded(goldens, kind, n, shift):
    case = read_case(goldens("wan_schedulers"), kind, n, shift)
    schedule = schedule_of(*KINDS[kind], n, shift)
    assert schedule.sigmas == tuple(case["sigmas"].tolist())  # to the last bit
    assert schedule.timesteps == tuple(case["timesteps"].tolist())
    assert len(schedule.sigmas) == n + 1 and schedule.sigmas[-1] == 0


@pytest.mark.parametrize("n, shift", COMBOS)
@pytest.mark.parametrize("kind", KINDS)
def test_recorded_velocities_lead_to_the_recorded_samples(goldens, kind, n, shift):
    case = read_case(goldens("wan_schedulers"), kind, n, shift)
    xs, states = run(schedule_of(*KINDS[kind], n, shift), case["x"][0], lambda i, x: case["v"][i])
    assert_close(torch.stack(xs), case["x"])
    if "x_corrected" in case:
        assert_close(torch.stack([state.corrected for state in states]), case["x_corrected"])


@pytest.mark.parametrize("n, shift", COMBOS)
@pytest.mark.parametrize("kind", KINDS)
def test_recorded_model_leads_to_the_recorded_samples(goldens, kind, n, shift):
    case = read_case(goldens("wan_schedulers"), kind, n, shift)
    a, b, c = (case[f"in.{name}"][0] for name in "abc")
    schedule = schedule_of(*KINDS[kind], n, shift)
    model = lambda i, x: a * x + b * (schedule.timesteps[i] / 1000) + c * torch.tanh(2 * x)
    assert_close(torch.stack(run(schedule, case["x"][0], model)[0]), case["x"])


def test_wan_pipeline_visits_the_same_noise_levels_and_latents(goldens):
    case = read(goldens("wan_denoise"))
    for prefix, schedule in [
        ("", schedule_of("unipc", "wan", 10, 5.0)),
        ("dpmpp.", schedule_of("dpm++", "wan", 8, 3.0)),
    ]:
        assert schedule.sigmas == tuple(case[prefix + "mid.sigmas"].tolist())
        assert schedule.timesteps == tuple(case[prefix + "mid.timesteps"].tolist())
    velocities, latents = case["mid.noise_pred"], case["out.latents"]
    xs, _ = run(schedule_of("unipc", "wan", 10, 5.0), latents[0], lambda i, x: velocities[i])
    assert_close(torch.stack(xs), latents)


def diffusers_oracle(solver, shift):
    diffusers = pytest.importorskip("diffusers")
    if solver == "euler":
        return diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift)
    return diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=shift
    )


@pytest.mark.parametrize("n, shift", [(1, 5.0), (2, 5.0), (3, 0.5), (4, 1.0), (13, 4.5), (40, 12.0)])
@pytest.mark.parametrize("solver", ["unipc", "euler"])
def test_diffusers_grid_and_steps_equal_diffusers(solver, n, shift):
    oracle = diffusers_oracle(solver, shift)
    oracle.set_timesteps(n)
    schedule = schedule_of(solver, "diffusers", n, shift)
    assert schedule.timesteps == tuple(oracle.timesteps.tolist())
    assert schedule.sigmas == tuple(oracle.sigmas.tolist())

    x = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(n))
    model = lambda x, t: torch.sin(3 * x) + t / 1000
    wanted = [x]
    for t in oracle.timesteps:
        wanted.append(oracle.step(model(wanted[-1], t), t, wanted[-1]).prev_sample)
    xs, _ = run(schedule, x, lambda i, x: model(x, schedule.timesteps[i]))
    assert_close(torch.stack(xs), torch.stack(wanted))


@pytest.mark.parametrize("n", [1, 2, 3, 100])
@pytest.mark.parametrize("shift", [0.1, 1.0, 12.0])  # at 0.1, float64 rounding lifts the first sigma above 1
@pytest.mark.parametrize("solver, grid", SOLVERS)
def test_a_model_that_knows_x0_is_followed_exactly(solver, grid, n, shift):
    generator = torch.Generator().manual_seed(0)
    noise, clean = torch.randn(2, 5, 7, generator=generator, dtype=torch.float64)
    schedule = schedule_of(solver, grid, n, shift)
    xs, _ = run(schedule, noise, lambda i, x: (x - clean) / schedule.sigmas[i])
    ratio = [sigma / schedule.sigmas[0] for sigma in schedule.sigmas]  # the share of the noise that is left
    wanted = torch.stack([clean + r * (noise - clean) for r in ratio])
    assert_close(torch.stack(xs), wanted, 1e-9)  # fp64: rounding of 100 steps; NaN fails too


@pytest.mark.parametrize("grid", ["wan", "diffusers"])
def test_equal_timesteps_are_different_steps(grid):
    schedule = schedule_of("unipc", grid, 100, 12.0)
    assert schedule.timesteps[:2] == (999, 999)
    assert [step.i for step in schedule.steps(1.0)] == list(range(100))
    xs, _ = run(schedule, torch.ones(3), lambda i, x: torch.sin(x))
    assert len(xs) == 101 and all((a - b).abs().min() > 0 for a, b in zip(xs, xs[1:], strict=False))


def test_shift_and_grids_follow_their_formulas():
    assert schedules.shifted(0.5, 5.0) == pytest.approx(5 / 6)
    assert schedules.shifted(1.0, 5.0) == 1 and schedules.shifted(0.0, 5.0) == 0
    assert schedules.plain_sigmas(4, 3.0) == pytest.approx([1, 0.9, 0.75, 0.5])
    assert schedules.plain_sigmas(4, 3.0)[0] == 1
    assert schedules.wan_unipc_sigmas(3, 1.0) == pytest.approx([0.999, 0.666, 0.333], abs=2e-8)
    assert schedules.diffusers_unipc_sigmas(3, 1.0) == pytest.approx([0.999999, 0.667, 0.334], abs=1e-12)
    assert schedules.diffusers_euler_sigmas(3, 1.0) == pytest.approx([1, 0.5005, 0.001])
    twice = 9 * 0.001 / (1 + 8 * 0.001)  # shift 3 of shift 3 is shift 9
    assert schedules.diffusers_euler_sigmas(2, 3.0) == pytest.approx([1, twice])


def test_timesteps_are_cut_and_not_rounded():
    assert schedule_of("dpm++", "wan", 3, 1.0).timesteps == (1000, 666, 333)
    assert schedule_of("euler", "wan", 4, 3.0).timesteps == (1000.0, 900.0, 750.0, 500.0)


def test_log_snr_at_its_ends():
    assert schedules.log_snr(1.0) == -math.inf
    assert schedules.log_snr(0.5) == 0
    assert schedules.log_snr(0.2) == pytest.approx(math.log(4))


@pytest.mark.parametrize("sigma, sigma_next", [(1.0, 0.9), (0.9, 0.5), (0.5, 0.499), (0.01, 0.001)])
def test_share_of_the_guess_is_that_of_the_papers(sigma, sigma_next):
    h = schedules.log_snr(sigma_next) - schedules.log_snr(sigma)
    in_papers = -(1 - sigma_next) * math.expm1(-h)
    zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    assert schedules.toward(zero, one, sigma, sigma_next).item() == pytest.approx(in_papers)


def test_extrapolation_is_adams_bashforth_on_even_strides():
    assert schedules.extrapolation(0.0, 0.3, 0.6) == pytest.approx(1 / 2)
    assert schedules.extrapolation(0.0, 0.4, 0.6) == pytest.approx(1 / 4)
    assert schedules.extrapolation(-math.inf, 0.4, 0.6) == 0


def test_corrector_is_adams_moulton_on_small_even_strides():
    w_before, w = schedules.corrector_weights(-1e-3, 0.0, 1e-3)
    assert w_before == pytest.approx(-1 / 12, abs=1e-4) and w == pytest.approx(5 / 12, abs=1e-4)


def test_corrector_solves_the_equations_of_bh2():
    lam_before, lam_prev, lam = -2.0, -0.5, 0.3
    h, r = 0.8, -1.5 / 0.8
    phi = math.exp(-h) - 1
    b1 = (phi / -h - 1) / phi
    b2 = 2 * ((phi / -h - 1) / -h - 0.5) / phi
    rho = torch.linalg.solve(torch.tensor([[1.0, 1.0], [r, 1.0]]), torch.tensor([b1, b2]))
    w_before, w = schedules.corrector_weights(lam_before, lam_prev, lam)
    assert (w_before * r, w) == pytest.approx(tuple(rho.tolist()), abs=1e-6)


@pytest.mark.parametrize(
    "solver, wanted",
    [
        # velocities 0.5, 1, 1 from x = 1; lam of 0.8, 0.5, 0.2 has even strides: step 1 extrapolates by 1/2
        ("euler", [1, 0.85, 0.55, 0.35]),
        # x0 0.6, 0.35, 0.275; step 1 goes to 0.35 + (0.35 - 0.6) / 2 = 0.225, keeping 0.4 of 0.85
        ("dpm++", [1, 0.85, 0.475, 0.275]),
        # step 1 starts from 0.625 * 1 + 0.375 * (0.6 + 0.35) / 2 = 0.803125 instead of 0.85
        ("unipc", [1, 0.85, 0.45625, 0.25625]),
    ],
)
def test_three_steps_by_hand(solver, wanted):
    schedule = Schedule(solver, sigmas=(0.8, 0.5, 0.2, 0.0), timesteps=(800, 500, 200))
    velocity = torch.tensor([0.5, 1.0, 1.0])
    xs, _ = run(schedule, torch.ones(()), lambda i, x: velocity[i])
    assert [x.item() for x in xs] == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("solver, grid", SOLVERS)
def test_resuming_from_a_saved_state_changes_nothing(solver, grid):
    schedule = schedule_of(solver, grid, 6, 5.0)
    model = lambda i, x: torch.cos(2 * x) + i
    xs, states = run(schedule, torch.randn(3, 4, generator=torch.Generator().manual_seed(1)), model)
    for first in range(1, 6):
        history = {name: entry for name, entry in states[first - 1]._asdict().items() if entry is not None}
        saved = load(
            save({"x": xs[first].clone()} | {name: entry.clone() for name, entry in history.items()})
        )
        x, state = saved.pop("x"), State(**saved)
        for i in range(first, 6):
            x, state = schedule.step(i, x, model(i, x), state)
        assert torch.equal(x, xs[-1])


@pytest.mark.parametrize("solver, grid", SOLVERS)
def test_steps_write_into_none_of_their_inputs(solver, grid):
    schedule = schedule_of(solver, grid, 5, 5.0)
    x, state = torch.randn(3, 4, generator=torch.Generator().manual_seed(2)), schedule.start()
    for i in range(5):
        v = torch.sin(x + i)
        inputs = [x, v, *(entry for entry in state if entry is not None)]
        copies = [tensor.clone() for tensor in inputs]
        x, state = schedule.step(i, x, v, state)
        assert all(torch.equal(a, b) for a, b in zip(inputs, copies, strict=True))


@pytest.mark.parametrize("solver, grid", SOLVERS)
def test_steps_never_read_a_tensor_back(solver, grid):
    x = torch.zeros(3, 4, device="meta")  # has no values, so asking for one raises
    xs, _ = run(schedule_of(solver, grid, 5, 5.0), x, lambda i, x: x)
    assert len(xs) == 6 and all(x.is_meta and x.dtype == torch.float32 for x in xs)


@pytest.mark.parametrize("solver, grid", SOLVERS)
def test_half_precision_velocities_keep_the_sample_in_float32(solver, grid):
    schedule = schedule_of(solver, grid, 5, 5.0)
    v = torch.randn(5, 8, generator=torch.Generator().manual_seed(3)).bfloat16()
    xs, _ = run(schedule, torch.ones(8), lambda i, x: v[i])
    wanted, _ = run(schedule, torch.ones(8), lambda i, x: v[i].float())
    assert torch.equal(torch.stack(xs), torch.stack(wanted))


def test_step_table_carries_guidance():
    schedule = schedule_of("unipc", "wan", 3, 5.0)
    table = schedule.steps(6.0)
    assert [step.guidance for step in table] == [6.0] * 3
    assert [(step.i, step.n, step.t, step.sigma) for step in table] == [
        (i, 3, schedule.timesteps[i], schedule.sigmas[i]) for i in range(3)
    ]
    assert [step.guidance for step in schedule.steps([1.0, 2.0, 3.0])] == [1.0, 2.0, 3.0]
    with pytest.raises(ValueError, match="2 values for 3 steps"):
        schedule.steps([1.0, 2.0])


@pytest.mark.parametrize(
    "config, n, message",
    [
        (ScheduleConfig(solver="heun"), 10, "'heun'; choose one of unipc, dpm\\+\\+, euler"),
        (
            ScheduleConfig(sigma_grid="karras"),
            10,
            "'karras' for solver 'unipc'.*choose one of wan, diffusers",
        ),
        (ScheduleConfig(solver="dpm++", sigma_grid="diffusers"), 10, "'diffusers' for .*choose one of wan$"),
        (ScheduleConfig(), 0, "steps=0"),
        (ScheduleConfig(), 2.5, "steps=2.5"),
        (ScheduleConfig(shift=0.0), 10, "shift=0.0 is not a finite number above 0"),
        (ScheduleConfig(shift=-1.0), 10, "shift=-1.0 is not a finite number above 0"),
        (ScheduleConfig(shift=math.inf), 10, "shift=inf is not a finite number above 0"),
        (ScheduleConfig(shift=math.nan), 10, "shift=nan is not a finite number above 0"),
        (ScheduleConfig(solver="dpm++", shift=1e20), 10, "two of 10 steps on one noise level"),
    ],
)
def test_bad_configs_are_refused(config, n, message):
    with pytest.raises(ValueError, match=message):
        make_schedule(config, n)


def test_bad_steps_are_refused():
    schedule, x = schedule_of("unipc", "wan", 4, 5.0), torch.zeros(2, 3)
    first = schedule.step(0, x, x, schedule.start())[1]
    with pytest.raises(ValueError, match="step 4 is not one of this schedule's 4; count from 0 to 3"):
        schedule.step(4, x, x, first)
    with pytest.raises(ValueError, match="step -1 is not"):
        schedule.step(-1, x, x, first)
    with pytest.raises(ValueError, match=r"prediction \(3,\), x \(2, 3\)"):
        schedule.step(0, x, x[0], schedule.start())
    with pytest.raises(
        ValueError, match="no x0, corrected in the state; pass the state that step 0 returned"
    ):
        schedule.step(1, x, x, schedule.start())
    with pytest.raises(ValueError, match="no x0_before in the state"):
        schedule.step(2, x, x, first)
    with pytest.raises(ValueError, match="1 noise tensors given; pass needs_noise=0"):
        schedule.step(0, x, x, schedule.start(), noise=[x])
    with pytest.raises(TypeError, match="torch.bfloat16"):
        schedule.step(0, x.bfloat16(), x.bfloat16(), schedule.start())
