"""How long until something happens: help, the import, the first frame of the embedded model?

Every measurement is a new process, with files in the system's cache. Beside them: what an empty Python and
the import of torch alone take, which no program here can be faster than.

    python -m benchmarks.startup [--runs 5] [--threads 1]
"""

import argparse
import json
import os
import subprocess
import sys
from statistics import median
from time import perf_counter
from typing import Any

from benchmarks.common import busy, command_line, machine, table, write_results

HELP_S = 0.3  # at most, of python -m minidit --help
FIRST_FRAME = """
import json, sys
from time import perf_counter
last, seconds = perf_counter(), {}
def lap(stage):
    global last
    seconds[stage], last = perf_counter() - last, perf_counter()
import torch
torch.set_num_threads(int(sys.argv[1]))
lap("torch")
from minidit.generate import Engine
from minidit.settings import Choices
lap("minidit")
engine = Engine("demo", device="cpu")
settings = engine.resolve("a red circle moves left to right", Choices())
lap("open and resolve")
text = engine.encode(settings)
lap("load text encoder, encode")
engine.module("transformer")
lap("load transformer")
outcome = engine.denoise(settings, text)
lap("denoise")
engine.module("vae")
lap("load autoencoder")
with torch.inference_mode():
    next(engine.family.decode(engine, outcome.latents))
lap("decode the first frame")
print(json.dumps(seconds))
"""


def seconds_of(code: list[str], runs: int) -> list[float]:
    """Seconds of n new Python processes. code: their arguments"""
    times = []
    for _ in range(runs):
        started = perf_counter()
        subprocess.run([sys.executable, *code], check=True, stdout=subprocess.DEVNULL)
        times.append(perf_counter() - started)
    return times


def imported_by(statement: str) -> set[str]:
    """The modules that a statement imports, in a new process."""
    code = f"import sys; {statement}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return set(done.stdout.split())


def first_frame(threads: int) -> dict[str, float]:
    """Seconds by stage, in a new process."""
    command = [sys.executable, "-c", FIRST_FRAME, str(threads)]
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return json.loads(done.stdout)


def starts(runs: int) -> list[dict[str, Any]]:
    """Seconds of whole processes."""
    ways = {
        "an empty Python": ["-c", "pass"],
        "import minidit": ["-c", "import minidit"],
        "minidit --help": ["-m", "minidit", "--help"],
        "minidit models": ["-m", "minidit", "models"],
        "import torch": ["-c", "import torch"],
    }
    found = {what: seconds_of(code, runs) for what, code in ways.items()}
    return [
        {"what": what, "seconds": round(median(t), 3), "spread_s": round(max(t) - min(t), 3), "n": runs}
        for what, t in found.items()
    ]


def stages(runs: int, threads: int) -> list[dict[str, Any]]:
    """Seconds to the first frame, by stage."""
    found = [first_frame(threads) for _ in range(runs)]
    laps = {stage: [run[stage] for run in found] for stage in found[0]}
    laps["first frame, in all"] = [sum(run.values()) for run in found]
    return [
        {"what": what, "seconds": round(median(t), 3), "spread_s": round(max(t) - min(t), 3), "n": runs}
        for what, t in laps.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.startup", description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    heavy = imported_by("import minidit, minidit.__main__") & {"torch", "triton", "numpy"}
    if heavy:
        sys.exit(f"import minidit imports {', '.join(sorted(heavy))}; nothing was timed")
    rows = starts(args.runs) + stages(args.runs, args.threads)
    columns = {"what": "what", "seconds": "s, median", "spread_s": "most - least", "n": "n"}
    print(table(rows, columns) + f"\n\n{machine()['card']}. {busy()}")
    print(write_results("startup", command_line("startup"), rows))
    slow = next(row["seconds"] for row in rows if row["what"] == "minidit --help")
    if slow >= HELP_S:
        sys.exit(f"minidit --help takes {slow} s; wanted less than {HELP_S}")


if __name__ == "__main__":
    main()
