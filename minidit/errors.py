"""What a user reads where something fails: one line. Standard library only."""

import argparse
import traceback

OWN = "minidit_own_policy."  # begins the module name of a user's own policy


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with a command line."""

    def error(self, message: str):
        program = self.prog.split()[2]  # of "python -m minidit generate"
        self.exit(2, f"{program}: {printable(message)}; {self.prog} --help lists what there is\n")


def printable(text: str) -> str:
    """Text of any origin as a terminal may have it: control characters are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def one_line(error: BaseException) -> str:
    """The first line of an error's message, with its type where the message alone says too little.

    What a user's own policy raised is told with its file and line.
    """
    text = printable((str(error).strip().splitlines() or [""])[0])
    if "out of memory" in text.lower() or "allocate memory" in text or isinstance(error, MemoryError):
        return f"{text or 'out of memory'}; try a smaller --size, fewer --num-frames, or --dtype bf16"
    where = own_line(error)
    if where or not text or not isinstance(error, ValueError | TypeError | OSError):
        text = f"{type(error).__name__}: {text}"
    return f"{where}: {text}" if where else text


def own_line(error: BaseException) -> str | None:
    """FILE:LINE of the user's own policy where an error came about, None where no such file was running."""
    if isinstance(error, SyntaxError):  # of its file, as ours has none
        return f"{error.filename}:{error.lineno}" if error.filename else None
    frames = [
        f"{frame.f_code.co_filename}:{line}"
        for frame, line in traceback.walk_tb(error.__traceback__)
        if frame.f_globals.get("__name__", "").startswith(OWN)
    ]
    return frames[-1] if frames else None
