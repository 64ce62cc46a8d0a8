"""What a running generation is going to show: one frame of its guess, through the model's own autoencoder."""

import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from minidit.sampling import Snapshot
from minidit.schedules import Schedule, TableSchedule
from minidit.settings import Settings
from minidit.video import whole_file, write_png


def clean_guess(
    schedule: Schedule | TableSchedule, snapshot: Snapshot, before: Tensor | None
) -> Tensor | None:
    """The x0 that the last step guessed; before: its sample, or None where that is not known.

    Solvers with a history keep it. The others, euler and ddim, go a part of the way from the sample to x0 and
    in a straight line, which gives it back. -> like the latents, or None without `before`
    """
    if snapshot.state.x0 is not None or before is None:
        return snapshot.state.x0
    i, after = len(snapshot.records) - 1, snapshot.x
    keep, share = step_weights(schedule, i)
    return (after - keep * before) / share


def step_weights(schedule: Schedule | TableSchedule, i: int) -> tuple[float, float]:
    """(keep, share) of step i of a solver without a history: x_next = keep * x + share * x0."""
    if isinstance(schedule, TableSchedule):
        alpha, alpha_next = schedule.alphas[i], schedule.alphas_next[i]
        keep = math.sqrt((1 - alpha_next) / (1 - alpha))
        return keep, math.sqrt(alpha_next) - keep * math.sqrt(alpha)
    ratio = schedule.sigmas[i + 1] / schedule.sigmas[i]
    return ratio, 1 - ratio


class Preview:
    """Writes the middle frame of a run's guess to a .png, every few steps.

    The frame is decoded alone, as if it were the video's first: nearly the frame that the video will have.
    decode: latents (1, C, t, h, w) -> frames (T, H, W, 3)
    """

    def __init__(
        self,
        path: Path,
        every: int,
        schedule: Schedule | TableSchedule,
        decode: Callable[[Tensor], Any],
        settings: Settings,
    ):
        self.path, self.every, self.schedule, self.decode = path, every, schedule, decode
        self.settings, self.before = asdict(settings), None

    def wants(self, done: int) -> bool:
        """Whether to look at this step: every few, and at the one before for its sample."""
        return done % self.every in (0, self.every - 1)

    def show(self, snapshot: Snapshot) -> None:
        """Look at a step, and write what it guesses if its turn has come."""
        done = len(snapshot.records)
        guess = clean_guess(self.schedule, snapshot, self.before) if done % self.every == 0 else None
        self.before = snapshot.x
        if guess is None:
            return
        middle = guess.shape[2] // 2
        frames = self.decode(guess[:, :, middle : middle + 1])
        with whole_file(self.path) as partial:
            write_png(partial, frames[:1], self.settings | {"preview_of_step": done})
