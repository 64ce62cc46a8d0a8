"""Compare minidit with outputs recorded from the original implementations.

    python -m tests.parity DIR...

Each DIR is a recording: config.json says which component it is, io.safetensors holds inputs and outputs.
The measure is max|a - b| / max|reference| over every recorded output; bounds are in tolerances.json beside
the recordings. Exit code 1 where anything is beyond its bound, 3 where a component is not supported.
"""

import argparse
import fnmatch
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.recordings import cogvideox, hunyuan_video, latte, open_sora, wan
from tests.recordings.base import Recording, open_recording

DEFAULT_BOUND = 1e-4
RUNNERS = wan.RUNNERS | cogvideox.RUNNERS | latte.RUNNERS | open_sora.RUNNERS | hunyuan_video.RUNNERS


@dataclass
class Verdict:
    component: str
    error: float
    bound: float
    worst: str  # the output with the largest error, or what else is wrong
    first_mid: str = ""  # the first mid-state that differs

    @property
    def ok(self) -> bool:
        return self.error <= self.bound

    def __str__(self) -> str:
        text = (
            f"{self.component:<24} {self.error:9.2e}  bound {self.bound:.0e}  {'ok' if self.ok else 'FAIL'}"
        )
        return (
            text
            if self.ok
            else f"{text}  ({self.worst}; first mid-state that differs: {self.first_mid or 'none'})"
        )


# Judging


def difference(got: Any, wanted: Any) -> float:
    """Relative for floats, equality for the rest, one level for uint8 frames (tolerances.json)."""
    if isinstance(wanted, str):
        return 0.0 if got == wanted else float("inf")
    if got.shape != wanted.shape:
        return float("inf")
    if wanted.dtype == torch.uint8:
        return 0.0 if (got.int() - wanted.int()).abs().max() <= 1 else float("inf")
    if not wanted.is_floating_point():
        return 0.0 if torch.equal(got, wanted) else float("inf")
    error = ((got.double() - wanted.double()).abs().max() / wanted.double().abs().max()).item()
    return error if error == error else float("inf")  # NaN is a failure


def judged(name: str) -> bool:
    """Whether a recorded tensor is an output: out.*, or one of the solvers' tables and samples."""
    return "out" in name.split(".")[:2] or name.split(".")[-1] in ("x", "sigmas", "timesteps", "x_corrected")


def outputs_of(recording: Recording) -> list[str]:
    names = [n for n in recording.io if judged(n) and "in" not in n.split(".") and "mid" not in n.split(".")]
    if not names:
        raise ValueError(f"{recording.folder} records no outputs")
    return names


def bound_of(recording: Recording) -> float:
    """The bound of a component: its pattern's in tolerances.json, or the default there."""
    path = recording.folder.parent / "tolerances.json"
    table = (
        json.loads(path.read_text())
        if path.is_file()
        else {"default": {"rel": DEFAULT_BOUND}, "patterns": {}}
    )
    for pattern, bound in table["patterns"].items():
        if fnmatch.fnmatch(recording.name, pattern):
            return bound["rel"]
    return table["default"]["rel"]


def compare(recording: Recording) -> Verdict:
    """Run a component and compare every output that was recorded."""
    outcome, bound = RUNNERS[recording.name](recording), bound_of(recording)
    worst, error = "", -1.0
    for name in outputs_of(recording):
        e = difference(outcome.outs[name], recording.io[name]) if name in outcome.outs else float("inf")
        if e > error:
            worst, error = name, e
    verdict = Verdict(recording.name, error, bound, worst)
    if not verdict.ok:
        mids = ((n, difference(x, recording.io[n])) for n, x in outcome.mids.items() if n in recording.io)
        verdict.first_mid = next((f"{n} {e:.1e}" for n, e in mids if e > bound), "")
    return verdict


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m tests.parity", description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR")
    parser.add_argument(
        "--skip-unsupported", action="store_true", help="exit 0 although some are not supported"
    )
    args = parser.parse_args(argv)
    failed = unsupported = False
    for folder in args.folders:
        try:
            recording = open_recording(folder)
        except ValueError as error:
            parser.error(str(error))
        if recording.name not in RUNNERS:
            print(f"{recording.name:<24} not supported")
            unsupported = True
            continue
        verdict = compare(recording)
        print(verdict)
        failed |= not verdict.ok
    return 1 if failed else 3 if unsupported and not args.skip_unsupported else 0


if __name__ == "__main__":
    sys.exit(main())
