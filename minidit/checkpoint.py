"""Unfinished runs on disk: what a step leaves to the next one, written whole or not at all, and read again.

A checkpoint holds latents, the solver's history, the state of the noise, the store's rings, and per step the
plan and what was measured. A policy is not in it: it is asked the same questions again
(sampling.retrace), so there is nothing to unpickle.
"""

import json
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from minidit.cache.store import Ring
from minidit.cache.trace import from_json, to_json
from minidit.sampling import Record, Snapshot
from minidit.schedules import State, Step
from minidit.settings import Settings
from minidit.stopping import Stopped
from minidit.tensor_files import open_tensors
from minidit.video import partial_path, whole_file

VERSION = 1
SECONDS = 10.0  # of work that a killed run may lose, where a checkpoint is cheap
WORK_PER_COST = 100  # seconds of work per second of writing: less than 1 % of a run goes into checkpoints
# what damaged files raise
UNREADABLE = (SafetensorError, KeyError, TypeError, ValueError, AttributeError, RecursionError)


@dataclass(frozen=True)
class Checkpoint:
    """A run to go on with."""

    snapshot: Snapshot  # on the CPU
    generator: Tensor  # state of the noise source


def checkpoint_path(output: Path) -> Path:
    """out.mp4 -> out.mp4.partial.safetensors, so that out.mp4 and out.gif have one each."""
    return output.with_name(output.name + ".partial.safetensors")


def save_checkpoint(path: Path, settings: Settings, checkpoint: Checkpoint) -> None:
    """Write a checkpoint, in place of the one before."""
    snapshot = checkpoint.snapshot
    history = {f"state.{name}": t for name, t in snapshot.state._asdict().items() if t is not None}
    tensors = {"latents": snapshot.x, "generator": checkpoint.generator} | history
    # copies: a solver's history may share memory with the latents, which a file cannot
    tensors = {name: t.to("cpu", copy=True).contiguous() for name, t in tensors.items()}
    tensors |= {f"ring.{i}": ring.slots.cpu() for i, ring in enumerate(snapshot.rings.values())}
    content = {
        "version": VERSION,
        "settings": asdict(settings),
        "records": [record_to_json(record) for record in snapshot.records],
        "rings": [[to_json(site), branch, ring.pushed] for (site, branch), ring in snapshot.rings.items()],
    }
    with whole_file(path) as partial:
        try:
            save_file(tensors, partial, {"minidit": json.dumps(content)})
        except SafetensorError as error:  # of the disk, as everything else was checked
            raise OSError(str(error).removeprefix("Error while serializing: ")) from None


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint, and what a run left that was killed while it wrote one."""
    path.unlink(missing_ok=True)
    partial_path(path).unlink(missing_ok=True)


def load_checkpoint(path: Path, settings: Settings) -> Checkpoint:
    """Read a checkpoint of a run with these settings; one of other settings is refused."""
    try:
        with open_tensors(path) as file:
            content = read_content(file)
            take = lambda name: file.get_tensor(name).clone()  # a view would die with the file
            rings = {
                (from_json(site), branch): Ring(take(f"ring.{i}"), pushed)
                for i, (site, branch, pushed) in enumerate(content["rings"])
            }
            names = [name for name in file.keys() if name.startswith("state.")]
            state = State(**{name.removeprefix("state."): take(name) for name in names})
            records = [record_from_json(record) for record in content["records"]]
            snapshot = Snapshot(take("latents"), state, rings, records)
            checkpoint = Checkpoint(snapshot, take("generator"))
    except UNREADABLE as error:
        raise ValueError(f"{path} cannot be read as an unfinished run ({error}); remove it") from None
    check_same(path, content["settings"], settings)
    return checkpoint


def latents_path(output: Path) -> Path:
    """out.mp4 -> out.latents.safetensors: what is left to do is to decode it, to mp4 or gif alike."""
    return output.with_name(output.stem + ".latents.safetensors")


@dataclass(frozen=True)
class Found:
    """What an earlier run has left of a video."""

    path: Path
    settings: dict
    done: int  # steps

    @property
    def is_denoised(self) -> bool:
        return self.done == self.settings["steps"]


def find(output: Path) -> Found | None:
    """Saved latents of this video, else a checkpoint; None for neither. Reads headers alone."""
    path = next((p for p in (latents_path(output), checkpoint_path(output)) if p.exists()), None)
    if path is None:
        return None
    try:
        with open_tensors(path) as file:
            if path == latents_path(output):
                settings = json.loads(file.metadata()["settings"])
                return Found(path, settings, settings["steps"])
            content = read_content(file)
            return Found(path, content["settings"], len(content["records"]))
    except UNREADABLE as error:
        raise ValueError(f"{path} cannot be read as an unfinished run ({error}); remove it") from None


def read_content(file: Any) -> dict:
    """All of a checkpoint but its tensors."""
    content = json.loads((file.metadata() or {})["minidit"])
    if content["version"] != VERSION:
        raise TypeError(f"version {content['version']}, wanted {VERSION}")
    if "steps" not in content["settings"]:
        raise TypeError("its settings lack the steps")
    return content


def differing(saved: dict, settings: Settings) -> list[str]:
    """The settings that two runs differ in; a model's folder may have moved, its id tells."""
    wanted = asdict(settings)
    return [name for name in wanted | saved if name != "model" and saved.get(name) != wanted.get(name)]


def check_same(path: Path, saved: dict, settings: Settings) -> None:
    """Refuse what was made with other settings."""
    wanted = asdict(settings)
    if odd := differing(saved, settings):
        what = ", ".join(f"{name} {saved.get(name)!r} instead of {wanted.get(name)!r}" for name in odd)
        raise ValueError(f"{path} is of another run ({what}); leave out --resume to start anew")


def record_to_json(record: Record) -> dict:
    """One step, as a trace has it, but with its measurements whole: they are told again."""
    return {
        "step": asdict(record.step),
        "plan": to_json(record.plan),
        "values": [[to_json(measure), value] for measure, value in record.values.items()],
        "gates": record.gates,
        "seconds": record.seconds,
    }


def record_from_json(saved: dict) -> Record:
    values = {from_json(measure): from_json(value) for measure, value in saved["values"]}
    gates = from_json(saved["gates"])
    return Record(Step(**saved["step"]), from_json(saved["plan"]), values, saved["seconds"], gates)


class Keeper:
    """Keeps a run on disk while it denoises: every so often, and when it is told to stop.

    every: a checkpoint after so many steps, 0 for none. None: after 10 s of work, and a hundred times as much
    as the last checkpoint took to write. Then a killed run loses little and a finished one has paid little.
    """

    def __init__(self, path: Path, settings: Settings, every: int | None = None, start: int = 0):
        self.path, self.settings, self.every = path, settings, every
        self.done = self.saved = start  # steps
        self.wanted_stop: int | None = None  # the signal
        self.cost, self.written_at = 0.0, time.perf_counter()

    def on_signal(self, number: int) -> None:
        """Stop at once where nothing is lost by it, or at the second time; else when this step is done."""
        if self.wanted_stop is not None or self.done == self.saved:
            raise Stopped(number)
        self.wanted_stop = number
        if number == signal.SIGINT:  # not by print: this interrupts what may be printing
            os.write(2, b"\nstopping after this step; once more stops at once\n")

    def wants(self, done: int) -> bool:
        """Whether to keep this step. What the last one leaves is latents, which are kept elsewhere."""
        self.done = done
        return done < self.settings.steps and (self.wanted_stop is not None or self.is_due())

    def keep(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint, and stop where that was asked for."""
        try:
            self.save(checkpoint)
        except OSError as error:
            if self.wanted_stop is not None:
                raise
            # the run that it protects goes on
            print(f"step {self.done} was not kept, and none will be: {error}", file=sys.stderr)
            self.every = 0
        self.stop_if_wanted()

    def stop_if_wanted(self) -> None:
        if self.wanted_stop is not None:
            raise Stopped(self.wanted_stop)

    def is_due(self) -> bool:
        if self.every is not None:
            return self.every > 0 and self.done % self.every == 0
        return time.perf_counter() - self.written_at >= max(SECONDS, WORK_PER_COST * self.cost)

    def save(self, checkpoint: Checkpoint) -> None:
        started = time.perf_counter()
        save_checkpoint(self.path, self.settings, checkpoint)
        self.saved, self.written_at = self.done, time.perf_counter()
        self.cost = self.written_at - started
