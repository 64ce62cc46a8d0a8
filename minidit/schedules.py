"""Noise schedules of flow matching and the solvers that step along them: Euler, DPM++ and UniPC.

A sample at noise level sigma is x = (1 - sigma) * x0 + sigma * noise, and a model predicts the velocity
v = noise - x0, so that x0 = x - sigma * v. Every step from sigma to sigma_next keeps the share
ratio = sigma_next / sigma of the sample and fills the rest with a guess of x0,

    x_next = ratio * x + (1 - ratio) * guess,

and the solvers differ in the guess alone. Euler takes the x0 of this step. DPM++ (2M, midpoint; Lu et al.,
2022) continues the line through the last two x0 in lam = log((1 - sigma) / sigma). UniPC (order 2, bh2; Zhao
et al., 2023) predicts as DPM++ does, but first redoes the previous step with the x0 it has led to. Papers
write 1 - ratio as alpha_next * (1 - exp(-h)) with h = lam_next - lam. Under flow matching, alpha = 1 - sigma,
the two are equal, and ours needs no care where lam is infinite.

Tables are Python floats on the host, so a step is a few fused tensor operations and never waits for the GPU.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from minidit.presets import ScheduleConfig

TRAIN_STEPS = 1000  # a model is told timestep = 1000 * sigma


class State(NamedTuple):
    """A solver's history, which a run needs beside x to go on. Entries have the shape of x.

    To save it, take state._asdict() without the entries that are None; State(**saved) restores it.
    """

    x0: Tensor | None = None  # guessed by the last step
    x0_before: Tensor | None = None  # by the step before it
    corrected: Tensor | None = None  # what the last step started from, after UniPC's correction


@dataclass(frozen=True)
class Step:
    """What one step of a run is told, to policies and progress as well."""

    i: int  # counted from 0; timesteps may coincide, so this alone says where a run is
    n: int
    t: float  # what the model is told
    sigma: float
    guidance: float
    expert: int = 0


@dataclass(frozen=True)
class Schedule:
    """The noise levels of a run and how to go from one to the next. Made by make_schedule."""

    solver: str
    sigmas: tuple[float, ...]  # n + 1, falling; the last is 0
    timesteps: tuple[float, ...]  # n; whole numbers for unipc and dpm++
    train_steps: int = TRAIN_STEPS
    needs_noise: int = 0  # tensors of fresh noise that each step takes: these solvers are deterministic

    def steps(self, guidance: float | Sequence[float]) -> tuple[Step, ...]:
        """The run as a table; guidance is one number or one per step."""
        n = len(self.timesteps)
        table = (guidance,) * n if isinstance(guidance, int | float) else tuple(guidance)
        if len(table) != n:
            raise ValueError(f"guidance has {len(table)} values for {n} steps; give one number or {n}")
        rows = zip(self.timesteps, self.sigmas, table, strict=False)  # sigmas has the final 0 too many
        return tuple(Step(i, n, t, sigma, g) for i, (t, sigma, g) in enumerate(rows))

    def start(self) -> State:
        """The history before step 0: none."""
        return State()

    def step(
        self, i: int, x: Tensor, prediction: Tensor, state: State, noise: Sequence[Tensor] | None = None
    ) -> tuple[Tensor, State]:
        """Step i, from sigmas[i] to sigmas[i + 1]. Pure: nothing is remembered between calls.

        x fp32, any shape · prediction like x, half precision allowed, the velocity at (x, timesteps[i])
        · state of step i - 1 -> (x_next, state of this step), which may hold x itself: do not write into x
        """
        check_step(self, i, x, prediction, state, noise)
        if self.solver == "euler":
            return euler_step(self.sigmas, i, x, prediction, state)
        if self.solver == "dpm++":
            return dpm_step(self.sigmas, i, x, prediction, state)
        return unipc_step(self.sigmas, i, x, prediction, state)


def make_schedule(config: ScheduleConfig, steps: int) -> Schedule:
    """The schedule of a run of that many steps.

    Sigmas are rounded to float32, as upstream schedulers do: near sigma 1, lam shows it. Timesteps are
    1000 * sigma: for unipc and dpm++ cut to whole numbers before that rounding, for euler float32 after it.
    """
    check_config(config, steps)
    grid = GRIDS[config.solver][config.sigma_grid](steps, config.shift)
    sigmas = float32(grid + [0.0])
    if any(a <= b for a, b in pairwise(sigmas)):
        raise ValueError(
            f"shift={config.shift} puts two of {steps} steps on one noise level; choose one nearer 1"
        )
    if config.solver == "euler":
        timesteps = float32([TRAIN_STEPS * sigma for sigma in sigmas[:-1]])
    else:
        timesteps = tuple(int(TRAIN_STEPS * sigma) for sigma in grid)
    return Schedule(config.solver, sigmas, timesteps)


def float32(values: Sequence[float]) -> tuple[float, ...]:
    """Each value rounded to float32."""
    return tuple(torch.tensor(values, dtype=torch.float32).tolist())


def shifted(sigma: float | Tensor, shift: float) -> float | Tensor:
    """Spend more steps (shift > 1) or fewer (shift < 1) at high noise; 0 and 1 stay where they are."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def linspace(first: float, last: float, count: int) -> list[float]:
    """count numbers from first to last, in numpy's order of operations: cut timesteps show the last bit."""
    if count == 1:
        return [first]
    stride = (last - first) / (count - 1)
    return [first + k * stride for k in range(count - 1)] + [last]


def plain_sigmas(n: int, shift: float) -> list[float]:
    """From exactly 1 in even strides to 0, then shifted: Wan's dpm++ and HunyuanVideo's euler.

    Wan has no Euler of its own; sigma_grid "wan" with euler means this grid.
    """
    return [shifted(sigma, shift) for sigma in linspace(1.0, 0.0, n + 1)[:-1]]


def wan_unipc_sigmas(n: int, shift: float) -> list[float]:
    """Wan-Video/Wan2.1 wan/utils/fm_solvers_unipc.py: as plain_sigmas, but from the first sigma below 1."""
    (highest,) = float32([1 - 1 / TRAIN_STEPS])
    return [shifted(sigma, shift) for sigma in linspace(highest, 0.0, n + 1)[:-1]]


def diffusers_unipc_sigmas(n: int, shift: float) -> list[float]:
    """diffusers 0.42 UniPCMultistepScheduler(use_flow_sigmas=True): even strides to 0.001, not to 0."""
    sigmas = [shifted(sigma, shift) for sigma in linspace(1.0, 1 / TRAIN_STEPS, n + 1)[:-1]]
    return [sigmas[0] - 1e-6] + sigmas[1:]  # at 1, lam would be infinite


def diffusers_euler_sigmas(n: int, shift: float) -> list[float]:
    """diffusers 0.42 FlowMatchEulerDiscreteScheduler: the lowest sigma is shifted twice."""
    lowest = shifted(torch.tensor(1 / TRAIN_STEPS, dtype=torch.float32), shift)  # upstream's precision
    return [shifted(sigma, shift) for sigma in linspace(1.0, lowest.item(), n)]


# Solver and sigma_grid -> (n, shift) -> the n sigmas of a run, falling from 1 or less.
GRIDS = {
    "unipc": {"wan": wan_unipc_sigmas, "diffusers": diffusers_unipc_sigmas},
    "dpm++": {"wan": plain_sigmas},
    "euler": {"wan": plain_sigmas, "diffusers": diffusers_euler_sigmas},
}


def x0_from_velocity(x: Tensor, velocity: Tensor, sigma: float) -> Tensor:
    """x0 = x - sigma * v."""
    return torch.add(x, velocity, alpha=-sigma)


def toward(x: Tensor, guess: Tensor, sigma: float, sigma_next: float) -> Tensor:
    """x_next = ratio * x + (1 - ratio) * guess, ratio = sigma_next / sigma; the guess if sigma_next = 0."""
    return torch.lerp(guess, x, sigma_next / sigma)


def log_snr(sigma: float) -> float:
    """lam = log((1 - sigma) / sigma), -inf at sigma 1."""
    return -math.inf if sigma == 1 else math.log((1 - sigma) / sigma)


def extrapolation(lam_prev: float, lam: float, lam_next: float) -> float:
    """c in guess = x0 + c * (x0 - x0_prev): the line through both x0, read off in the middle of the step.

    c = h / (2 * (lam - lam_prev)), h = lam_next - lam; 0 if lam_prev is -inf.
    """
    return (lam_next - lam) / (2 * (lam - lam_prev))


def corrector_weights(lam_before: float, lam_prev: float, lam: float) -> tuple[float, float]:
    """(w_before, w) in guess = x0_prev + w_before * (x0_before - x0_prev) + w * (x0 - x0_prev), of order 2.

    UniPC's bh2 with h = lam - lam_prev, r = (lam_before - lam_prev) / h, phi = exp(-h) - 1:
    rho_before + rho = b1 and r * rho_before + rho = b2; w_before = rho_before / r, w = rho.
    """
    h = lam - lam_prev
    r = (lam_before - lam_prev) / h  # below 0
    phi = math.expm1(-h)
    excess = phi / -h - 1
    b1 = excess / phi
    b2 = 2 * (excess / -h - 0.5) / phi
    rho_before = (b1 - b2) / (1 - r)
    return rho_before / r, b1 - rho_before


def euler_step(sigmas: Sequence[float], i: int, x: Tensor, v: Tensor, state: State) -> tuple[Tensor, State]:
    """x_next = x + (sigma_next - sigma) * v."""
    return torch.add(x, v, alpha=sigmas[i + 1] - sigmas[i]), state


def dpm_guess(sigmas: Sequence[float], i: int, x0: Tensor, x0_prev: Tensor | None) -> Tensor:
    """The guess of the step from sigmas[i]: extrapolated, but on the first and the last step x0 itself."""
    if i == 0 or i == len(sigmas) - 2:
        return x0
    c = extrapolation(*(log_snr(sigma) for sigma in sigmas[i - 1 : i + 2]))
    return torch.lerp(x0_prev, x0, 1 + c)


def dpm_step(sigmas: Sequence[float], i: int, x: Tensor, v: Tensor, state: State) -> tuple[Tensor, State]:
    """DPM-Solver++(2M), midpoint. Follows Wan-Video/Wan2.1 wan/utils/fm_solvers.py."""
    x0 = x0_from_velocity(x, v, sigmas[i])
    guess = dpm_guess(sigmas, i, x0, state.x0)
    return toward(x, guess, sigmas[i], sigmas[i + 1]), State(x0=x0)


def unipc_correct(sigmas: Sequence[float], i: int, x0: Tensor, state: State) -> Tensor:
    """Redo the step that led to sigmas[i] with the x0 found there. -> the corrected sample at sigmas[i]"""
    if i == 1:  # order 1: the mean of both ends
        guess = torch.lerp(state.x0, x0, 0.5)
    else:
        w_before, w = corrector_weights(*(log_snr(sigma) for sigma in sigmas[i - 2 : i + 1]))
        guess = torch.lerp(state.x0, x0, w).add_(state.x0_before - state.x0, alpha=w_before)
    return toward(state.corrected, guess, sigmas[i - 1], sigmas[i])


def unipc_step(sigmas: Sequence[float], i: int, x: Tensor, v: Tensor, state: State) -> tuple[Tensor, State]:
    """UniPC of order 2, bh2. Follows Wan-Video/Wan2.1 wan/utils/fm_solvers_unipc.py."""
    x0 = x0_from_velocity(x, v, sigmas[i])  # of the sample that the model saw, not of the corrected one
    corrected = x if i == 0 else unipc_correct(sigmas, i, x0, state)
    guess = dpm_guess(sigmas, i, x0, state.x0)
    x_next = toward(corrected, guess, sigmas[i], sigmas[i + 1])
    return x_next, State(x0=x0, x0_before=state.x0, corrected=corrected)


def check_config(config: ScheduleConfig, steps: int) -> None:
    """ValueError unless make_schedule can follow this config."""
    if config.solver not in GRIDS:
        raise ValueError(f"unknown solver {config.solver!r}; choose one of {', '.join(GRIDS)}")
    grids = GRIDS[config.solver]
    if config.sigma_grid not in grids:
        came = f"no sigma_grid {config.sigma_grid!r} for solver {config.solver!r}"
        raise ValueError(f"{came} has been checked against its original; choose one of {', '.join(grids)}")
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps={steps} is not a whole number of at least 1; ask for 1 step or more")
    if not 0 < config.shift < math.inf:
        raise ValueError(f"shift={config.shift} is not a finite number above 0; give 1 for no shift")


def history_needed(solver: str, i: int) -> tuple[str, ...]:
    """The entries of State that step i reads."""
    if solver == "euler" or i == 0:
        return ()
    if solver == "dpm++":
        return ("x0",)
    return ("x0", "corrected") if i == 1 else ("x0", "x0_before", "corrected")


def check_step(
    schedule: Schedule, i: int, x: Tensor, prediction: Tensor, state: State, noise: Sequence[Tensor] | None
) -> None:
    """ValueError or TypeError unless Schedule.step can do step i with these."""
    n = len(schedule.timesteps)
    if not 0 <= i < n:
        raise ValueError(f"step {i} is not one of this schedule's {n}; count from 0 to {n - 1}")
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"step {i}: x is {x.dtype}, too coarse to add small steps to; pass x.float()")
    if prediction.shape != x.shape:
        got = f"prediction {tuple(prediction.shape)}, x {tuple(x.shape)}"
        raise ValueError(f"step {i}: {got}; they must be alike (drop what else the model predicts)")
    missing = [name for name in history_needed(schedule.solver, i) if getattr(state, name) is None]
    if missing:
        came = f"step {i} of {schedule.solver}: no {', '.join(missing)} in the state"
        raise ValueError(f"{came}; pass the state that step {i - 1} returned")
    count = len(noise) if noise is not None else 0
    if count != schedule.needs_noise:
        raise ValueError(
            f"step {i}: {count} noise tensors given; pass needs_noise={schedule.needs_noise} of them"
        )


# Over a table of noise levels: DDIM
#
# A sample at level t of the table is x = sqrt(alpha) * x0 + sqrt(1 - alpha) * noise, alpha being the product
# of 1 - beta up to t. A step guesses x0 and keeps the noise that is left (Song et al., 2021, eta 0):
#
#     x_next = keep * x + (sqrt(alpha_next) - keep * sqrt(alpha)) * x0
#     keep = sqrt((1 - alpha_next) / (1 - alpha))


@dataclass(frozen=True)
class TableSchedule:
    """The levels of a run and how to go from one to the next. Made by make_table_schedule."""

    solver: str
    timesteps: tuple[int, ...]  # falling
    alphas: tuple[float, ...]  # at each timestep
    alphas_next: tuple[float, ...]  # where its step leads
    prediction: str
    needs_noise: int = 0
    dynamic_guidance: bool = False

    def steps(self, guidance: float | Sequence[float]) -> tuple[Step, ...]:
        """The run as a table; guidance is one number or one per step. sigma is sqrt(1 - alpha)."""
        n = len(self.timesteps)
        if self.dynamic_guidance and isinstance(guidance, int | float):
            guidance = dynamic_guidance(self.timesteps, guidance)
        table = (guidance,) * n if isinstance(guidance, int | float) else tuple(guidance)
        if len(table) != n:
            raise ValueError(f"guidance has {len(table)} values for {n} steps; give one number or {n}")
        rows = zip(self.timesteps, self.alphas, table, strict=True)
        return tuple(Step(i, n, t, math.sqrt(1 - a), g) for i, (t, a, g) in enumerate(rows))

    def start(self) -> State:
        """The history before step 0: none."""
        return State()

    def step(
        self, i: int, x: Tensor, prediction: Tensor, state: State, noise: Sequence[Tensor] | None = None
    ) -> tuple[Tensor, State]:
        """Step i: x fp32 · prediction like x -> (x_next, state of this step). Pure, as Schedule.step is."""
        check_table_step(self, i, x, prediction, noise)
        alpha = self.alphas[i]
        x0 = X0[self.prediction](x, prediction, alpha)
        if self.solver == "dpm":
            before = self.alphas[i - 1] if i else None
            x_next = sde_dpm_step(x, x0, state.x0, noise[0], alpha, self.alphas_next[i], before)
            return x_next, State(x0=x0)
        return ddim_step(x, x0, alpha, self.alphas_next[i]), state


def x0_from_epsilon(x: Tensor, epsilon: Tensor, alpha: float) -> Tensor:
    """x0 = (x - sqrt(1 - alpha) * epsilon) / sqrt(alpha)."""
    return torch.add(x, epsilon, alpha=-math.sqrt(1 - alpha)) / math.sqrt(alpha)


def x0_from_v(x: Tensor, v: Tensor, alpha: float) -> Tensor:
    """x0 = sqrt(alpha) * x - sqrt(1 - alpha) * v (Salimans & Ho, 2022); defined at alpha 0 too."""
    return torch.add(math.sqrt(alpha) * x, v, alpha=-math.sqrt(1 - alpha))


X0 = {"epsilon": x0_from_epsilon, "v": x0_from_v}


def ddim_step(x: Tensor, x0: Tensor, alpha: float, alpha_next: float) -> Tensor:
    """One step of DDIM, from level alpha to level alpha_next."""
    keep = math.sqrt((1 - alpha_next) / (1 - alpha))
    return torch.add(keep * x, x0, alpha=math.sqrt(alpha_next) - keep * math.sqrt(alpha))


def sde_dpm_step(
    x: Tensor,
    x0: Tensor,
    x0_prev: Tensor | None,
    noise: Tensor,
    alpha: float,
    alpha_next: float,
    alpha_before: float | None,
) -> Tensor:
    """One step of SDE-DPM-Solver++(2M) (Lu et al., 2022), from level alpha to alpha_next, with fresh noise.

    With h = lam_next - lam, lam = log(alpha / (1 - alpha)) / 2, and decay = exp(-h), which stays finite where
    lam does not: x_next = keep * decay * x + (1 - decay^2) * sqrt(alpha_next) * guess
    + sqrt((1 - alpha_next) * (1 - decay^2)) * noise. The guess extrapolates from x0_prev, found at
    alpha_before; on the first step, and on one that ends at alpha 1, it is x0 itself. Follows diffusers 0.42
    CogVideoXDPMScheduler.
    """
    decay_squared = alpha * (1 - alpha_next) / ((1 - alpha) * alpha_next)
    guess = x0
    if alpha_before is not None and alpha_next < 1:
        c = extrapolation(*(half_log_snr(a) for a in (alpha_before, alpha, alpha_next)))
        guess = torch.lerp(x0_prev, x0, 1 + c)
    keep = math.sqrt((1 - alpha_next) / (1 - alpha) * decay_squared)
    x_next = torch.add(keep * x, guess, alpha=(1 - decay_squared) * math.sqrt(alpha_next))
    return x_next.add_(noise, alpha=math.sqrt((1 - alpha_next) * (1 - decay_squared)))


def half_log_snr(alpha: float) -> float:
    """lam = log(alpha / (1 - alpha)) / 2, -inf at alpha 0."""
    return math.log(alpha / (1 - alpha)) / 2 if alpha else -math.inf


def dynamic_guidance(timesteps: Sequence[int], scale: float) -> tuple[float, ...]:
    """CogVideoX's guidance by step: s = 1 + scale * (1 - cos(pi * ((n - t) / n)^5)) / 2.

    t is the timestep, not the step's number, for which the formula looks made: s jumps about. That is what
    the releases were shown with, so it stays (zai-org/CogVideo sat/sgm and diffusers' pipeline alike).
    """
    n = len(timesteps)
    return tuple(1 + scale * (1 - math.cos(math.pi * ((n - t) / n) ** 5)) / 2 for t in timesteps)


def linear_alphas(shift: float) -> Tensor:
    """betas from 0.0001 to 0.02 in even strides, which have no shift. -> (1000,) fp64"""
    if shift != 1:
        raise ValueError(f"shift={shift} has no meaning for linear betas; leave it at 1")
    betas = torch.linspace(1e-4, 0.02, TRAIN_STEPS, dtype=torch.float32)  # as upstream: the fp32 numbers
    return (1 - betas).cumprod(0).double()


def zero_snr_alphas(shift: float) -> Tensor:
    """Square roots of betas from 0.00085 to 0.012 in even strides, shifted, then stretched to end at alpha 0.

    alpha -> alpha / (shift + (1 - shift) * alpha) divides the signal's share by the shift. The stretch keeps
    the first sqrt(alpha) (Lin et al., 2024). -> (1000,) fp64
    """
    if not 0 < shift < math.inf:
        raise ValueError(f"shift={shift} is not a finite number above 0; give 1 for no shift")
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, TRAIN_STEPS, dtype=torch.float64) ** 2
    alphas = (1 - betas).cumprod(0)
    roots = (alphas / (shift + (1 - shift) * alphas)).sqrt()
    return ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])) ** 2


ALPHAS = {"linear": linear_alphas, "zero-snr": zero_snr_alphas}  # (shift) -> alpha of the levels 0 .. 999


def leading_steps(n: int) -> list[int]:
    """0, k, 2k, ... backwards, k = 1000 // n: the noisiest level is left out."""
    return [i * (TRAIN_STEPS // n) for i in reversed(range(n))]


def linspace_steps(n: int) -> list[int]:
    """From the last level to the first, rounded half to even."""
    return [round(t) for t in linspace(0.0, TRAIN_STEPS - 1.0, n)][::-1]


def trailing_steps(n: int) -> list[int]:
    """From the last level on in strides of 1000 / n, rounded half to even."""
    return [round(TRAIN_STEPS - i * (TRAIN_STEPS / n)) - 1 for i in range(n)]


SPACINGS = {
    "leading": leading_steps,
    "leading-1": lambda n: [t + 1 for t in leading_steps(n)],
    "linspace": linspace_steps,
    "trailing": trailing_steps,
}


def make_table_schedule(config: ScheduleConfig, steps: int) -> TableSchedule:
    """The schedule of a run of that many steps over a table.

    A step goes down by 1000 // steps levels, as upstream schedulers count, wherever the next one begins.
    """
    for what, value, known in (
        ("solver", config.solver, ("ddim", "dpm")),
        ("betas", config.betas, ALPHAS),
        ("prediction", config.prediction, X0),
        ("sigma_grid", config.sigma_grid, SPACINGS),
    ):
        if value not in known:
            raise ValueError(f"{config.solver}: unknown {what} {value!r}; choose one of {', '.join(known)}")
    if not isinstance(steps, int) or not 1 <= steps <= TRAIN_STEPS:
        raise ValueError(f"steps={steps} is not a whole number from 1 to {TRAIN_STEPS}")
    alphas = ALPHAS[config.betas](config.shift).tolist()
    timesteps = SPACINGS[config.sigma_grid](steps)
    last = 1.0 if config.ends_clean else alphas[0]
    after = [t - TRAIN_STEPS // steps for t in timesteps]
    return TableSchedule(
        solver=config.solver,
        timesteps=tuple(timesteps),
        alphas=tuple(alphas[t] for t in timesteps),
        alphas_next=tuple(alphas[t] if t >= 0 else last for t in after),
        prediction=config.prediction,
        needs_noise=int(config.solver == "dpm"),
        dynamic_guidance=config.dynamic_guidance,
    )


def check_table_step(
    schedule: TableSchedule, i: int, x: Tensor, prediction: Tensor, noise: Sequence[Tensor] | None
) -> None:
    """ValueError or TypeError unless TableSchedule.step can do step i with these."""
    n, count = len(schedule.timesteps), len(noise or ())
    if not 0 <= i < n:
        raise ValueError(f"step {i} is not one of this schedule's {n}; count from 0 to {n - 1}")
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"step {i}: x is {x.dtype}, too coarse to add small steps to; pass x.float()")
    if prediction.shape != x.shape:
        got = f"prediction {tuple(prediction.shape)}, x {tuple(x.shape)}"
        raise ValueError(f"step {i}: {got}; they must be alike (drop what else the model predicts)")
    if count != schedule.needs_noise:
        raise ValueError(
            f"step {i}: {count} noise tensors given; pass needs_noise={schedule.needs_noise} of them"
        )


# Open-Sora: a shift that follows the size of the video, and frames that are given


def size_shift(height: int, width: int, num_frames: int, dtype: torch.dtype = torch.float64) -> float:
    """Open-Sora's shift: larger and longer videos need more noise. Follows v1.2.0 timestep_transform.

    sqrt(height * width) / 512 * sqrt(n), n = 1 for an image, else 5 per whole 17 frames. dtype: in which it
    is computed; the original's own runs do it in bf16, where 854 pixels are 856.
    """
    if 1 < num_frames < 17:
        raise ValueError(
            f"num_frames={num_frames} has no noise schedule; give 1 for an image, or 17 and more"
        )
    pixels, frames = torch.tensor([height, width], dtype=dtype).prod(), torch.tensor(num_frames, dtype=dtype)
    latents = torch.ones_like(frames) if num_frames == 1 else frames // 17 * 5
    return ((pixels / 512**2).sqrt() * latents.sqrt()).item()


@dataclass(frozen=True)
class MaskedSchedule:
    """A schedule for latents some of whose frames are given, as Open-Sora's mask strategy has it.

    A frame is noisy, and is denoised, from t = 1000 * mask on; until then it stays what it is. A frame that
    becomes noisy at the next step is given noise of its level. A mask of 1 is noise from the start.
    """

    base: Schedule
    mask: Tensor  # (T,) in [0, 1]

    @property
    def solver(self) -> str:
        return self.base.solver

    @property
    def needs_noise(self) -> int:
        """Fresh noise is wanted where a frame starts in the middle."""
        return int(((self.mask > 0) & (self.mask < 1)).any())

    def steps(self, guidance: float | Sequence[float]) -> tuple[Step, ...]:
        return self.base.steps(guidance)

    def start(self) -> State:
        return self.base.start()

    def is_noisy(self, i: int) -> Tensor:
        """The frames that step i denoises: (T, 1, 1), to go with (B, C, T, H, W)"""
        return (self.mask * TRAIN_STEPS >= self.base.timesteps[i])[:, None, None]

    def step(
        self, i: int, x: Tensor, prediction: Tensor, state: State, noise: Sequence[Tensor] | None = None
    ) -> tuple[Tensor, State]:
        """Step i of the base schedule for the noisy frames. Pure, as Schedule.step is."""
        x_next, state = self.base.step(i, x, prediction, state)
        x_next = torch.where(self.is_noisy(i), x_next, x)
        if i + 1 < len(self.base.timesteps) and self.needs_noise:
            sigma = self.base.sigmas[i + 1]
            begins = self.is_noisy(i + 1) & ~self.is_noisy(i)
            x_next = torch.where(begins, torch.lerp(x_next, noise[0], sigma), x_next)
        return x_next, state
