"""Run one command line in this process, see all it does, and judge it."""

import json
import os
import resource
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from minidit.__main__ import main as minidit
from weights_convert.__main__ import main as weights_convert

PROGRAMS = {"minidit": minidit, "weights_convert": weights_convert}
SECONDS = 30  # after which a case hangs
MEMORY = 4 << 30  # bytes that a case may map: a size that is too large fails at once, not by thrashing
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
WITNESS = "witness"  # a file that only code which must not run would write


@dataclass(frozen=True)
class Case:
    """A command line and the folder, made for it, that it runs in."""

    kind: str
    argv: list[str]
    program: str = "minidit"
    lines: int = 1  # most lines on stderr that exit code 2 may come with
    codes: tuple[int, ...] = (0, 2)  # that it may end with


@dataclass
class Seen:
    """What a case did."""

    code: int | None = None
    out: str = ""
    err: str = ""
    escaped: str = ""  # the traceback of what was not caught
    warned: list[str] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)  # written or started, beyond the case's folder
    new: list[Path] = field(default_factory=list)


class Hang(BaseException):
    """A case took too long."""


class Watch:
    """What is written, started or connected to while a case runs, by an audit hook, which stays for good."""

    def __init__(self):
        self.root: str | None = None  # None: no case is running
        self.outside: list[str] = []
        sys.addaudithook(self.see)

    def see(self, event: str, args: tuple) -> None:
        if self.root is None:
            return
        if event in ("socket.connect", "os.system", "subprocess.Popen", "os.exec", "os.posix_spawn"):
            if args[0] != "fc-list":  # matplotlib, which looks for fonts
                self.outside.append(f"{event} {args}")
        elif event == "open" and isinstance(args[0], str | bytes | os.PathLike) and args[2] & WRITES:
            self.check(event, args[0])
        elif event in ("os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree"):
            self.check(event, args[0])
        elif event == "os.rename":
            self.check(event, args[1])

    def check(self, event: str, path) -> None:
        path = os.path.abspath(os.fsdecode(path))
        if not path.startswith((self.root, "/dev/", "/proc/self/")) and "__pycache__" not in path:
            self.outside.append(f"{event} {path}")


WATCH = Watch()


@contextmanager
def streams(folder: Path, seen: Seen) -> Iterator[None]:
    """Everything that is written to stdout and stderr, C libraries included, goes into `seen`."""
    files = [open(folder / name, "w+b") for name in ("stdout", "stderr")]
    kept = [os.dup(number) for number in (1, 2)]
    before = sys.stdout, sys.stderr
    for stream in before:
        stream.flush()
    for number, file in zip((1, 2), files, strict=True):
        os.dup2(file.fileno(), number)
    # as Python opens them: what cannot be encoded stops stdout, and is escaped on stderr
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = before
        for number, fd in zip((1, 2), kept, strict=True):
            os.dup2(fd, number)
            os.close(fd)
        texts = []
        for file in files:
            file.seek(0)
            texts.append(file.read().decode("utf-8", "replace"))
            file.close()
        seen.out, seen.err = texts


@contextmanager
def limits(seconds: float) -> Iterator[None]:
    """No case takes longer or more memory."""

    def stop(number, frame):
        raise Hang(f"longer than {seconds} s")

    before, (soft, hard) = signal.signal(signal.SIGALRM, stop), resource.getrlimit(resource.RLIMIT_AS)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, hard))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def run(case: Case, folder: Path, scratch: Path) -> Seen:
    """Run a case in its folder. scratch: where the process may write too, such as its text cache"""
    seen, here = Seen(), os.getcwd()
    before = {path: path.stat().st_mtime_ns for path in files_in(folder)}
    os.chdir(folder)
    WATCH.outside, WATCH.root = [], str(scratch)
    try:
        with warnings.catch_warnings(record=True) as warned, streams(scratch, seen), limits(SECONDS):
            warnings.simplefilter("always")
            try:
                seen.code = PROGRAMS[case.program](list(case.argv))
            except SystemExit as end:
                seen.code = end.code or 0
            except (Exception, Hang):
                seen.escaped = traceback.format_exc()
    finally:
        WATCH.root = None
        os.chdir(here)
    seen.warned = [f"{w.category.__name__}: {w.message}" for w in warned]
    seen.outside = WATCH.outside
    seen.new = [path for path in files_in(folder) if before.get(path) != path.stat().st_mtime_ns]
    return seen


def files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def faults(case: Case, seen: Seen, folder: Path) -> list[str]:
    """What is wrong with what a case did; [] for nothing."""
    found = []
    if seen.escaped:
        return [f"not caught:\n{seen.escaped}"]
    if seen.code not in case.codes:
        found.append(f"exit code {seen.code}, wanted {' or '.join(map(str, case.codes))}")
    lines = seen.err.splitlines()
    if seen.code == 0 and seen.err:
        found.append("exit code 0, and something on stderr")
    if seen.code == 2 and not (seen.err.endswith("\n") and 1 <= len(lines) <= case.lines):
        found.append(f"{len(lines)} lines on stderr, wanted {case.lines}")
    if seen.code == 2 and not all(line.startswith(f"{case.program}: ") for line in lines):
        found.append(f"a line on stderr does not begin with {case.program}")
    if seen.code == 2 and any(len(line) < len(case.program) + 12 for line in lines):
        found.append("a line on stderr says nothing")
    if odd := sorted({c for line in lines for c in line if not c.isprintable()}):
        found.append(f"stderr holds control characters: {odd}")
    if "Traceback" in seen.err + seen.out:
        found.append("a traceback")
    found += [f"warned: {text}" for text in seen.warned if "it is not made for that" not in text]  # teacache
    found += [f"outside its folder: {text}" for text in seen.outside]
    return found + [f"left {path.relative_to(folder)}" for path in seen.new if not is_fine(path, case, seen)]


def is_fine(path: Path, case: Case, seen: Seen) -> bool:
    """Whether a new file is whole, and after a failure spoken of."""
    if path.name == WITNESS or ".partial" in path.name.removesuffix(".partial.safetensors"):
        return False
    if path.suffix == ".json":
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            return False
    return seen.code == 0 or path.name.removesuffix(".json") in seen.err + seen.out
