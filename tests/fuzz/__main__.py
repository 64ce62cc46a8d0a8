"""python -m tests.fuzz --cases 5000 --seed 7: bad input of every kind; exit code 1 where something is odd."""

import argparse
import faulthandler
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch

from tests.fuzz.assets import make_assets
from tests.fuzz.cases import make_case
from tests.fuzz.runner import SECONDS, Case, Seen, faults, run


def fuzz(numbers: Iterable[int], seed: int, scratch: Path, say=lambda *args: None) -> list[str]:
    """Run cases; -> what is wrong, each with the command that shows it again. say(number, case, seen)"""
    scratch = scratch.resolve()
    kept = {name: os.environ.get(name) for name in ("MINIDIT_CACHE_DIR", "MPLCONFIGDIR")}
    temporary, tempfile.tempdir = tempfile.tempdir, str(scratch)
    os.environ |= {name: str(scratch / name.lower()) for name in kept}
    threads, failed = torch.get_num_threads(), []
    torch.set_num_threads(1)
    try:
        assets = make_assets(scratch / "assets")
        for number in numbers:
            folder = scratch / "case"
            folder.mkdir()
            case = make_case(seed, number, folder, assets)
            seen = run(case, folder, scratch)
            say(number, case, seen)
            if wrong := faults(case, seen, folder):
                failed.append(describe(number, seed, case, seen, wrong))
            shutil.rmtree(folder)
    finally:
        torch.set_num_threads(threads)
        tempfile.tempdir = temporary
        for name, value in kept.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})
    return failed


def describe(number: int, seed: int, case: Case, seen: Seen, wrong: list[str]) -> str:
    again = f"python -m tests.fuzz --seed {seed} --only {number}"
    words = [word if len(word) < 200 else f"{word[:100]}... ({len(word)})" for word in case.argv]
    said = "".join(f"\n    stderr: {line[:300]!r}" for line in seen.err.splitlines()[:6])
    return f"{again}  ({case.kind})\n    {case.program} {words}" + "".join(f"\n  {w}" for w in wrong) + said


def main() -> int:
    parser = argparse.ArgumentParser("python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, metavar="N", help="this case alone, and all it says")
    args = parser.parse_args()
    numbers = range(args.cases) if args.only is None else [args.only]
    codes, seconds, started = Counter(), Counter(), time.perf_counter()

    def say(number: int, case: Case, seen: Seen) -> None:
        nonlocal started
        codes[case.kind, seen.code] += 1
        seconds[case.kind] += time.perf_counter() - started
        if args.only is not None or time.perf_counter() - started > 3:
            print(
                f"{number} {case.kind} {time.perf_counter() - started:.1f} s: {case.program} {case.argv}"[
                    :500
                ]
            )
        if args.only is not None:
            print(f"exit code {seen.code}\n{seen.out}{seen.err}{seen.escaped}")
        started = time.perf_counter()

    with tempfile.TemporaryDirectory() as scratch:
        faulthandler.dump_traceback_later(
            SECONDS * len(numbers) + 60, exit=True
        )  # where no signal gets through
        failed = fuzz(numbers, args.seed, Path(scratch) / "fuzz", say)
    for text in failed:
        print(text)
    for kind, total in sorted(seconds.items()):
        kinds = {code: n for (name, code), n in codes.items() if name == kind}
        print(f"{kind}: exit codes {kinds}, {total / sum(kinds.values()):.2f} s each")
    print(f"{len(failed)} of {len(numbers)} cases failed; {sum(seconds.values()):.0f} s")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
