"""What the benchmarks share: the machine in words, prompts, tables, where results go."""

import json
import os
import platform
import re
import sys
from pathlib import Path
from typing import Any

import torch

from minidit.components import DEMO

RESULTS = Path(__file__).parent / "results"
# of those that nothing was fitted on (cache/profile.py has the others)
PROMPTS = tuple((DEMO / "prompts.txt").read_text(encoding="utf-8").splitlines()[:8])


def machine() -> dict[str, str]:
    """Where a number was measured: card or processor, and versions."""
    if torch.cuda.is_available():
        card = torch.cuda.get_device_name()
    else:
        card = f"{processor()}, {torch.get_num_threads()} threads"
    return {"card": card, "torch": torch.__version__, "python": platform.python_version()}


def processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [
        line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
    ]
    return names[0] if names else platform.processor()


def busy() -> str:
    """A warning where other programs want the processors too, else ""; times then say little."""
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    return f"the machine was busy: load {load:.1f} on {cores} cores" if load > cores else ""


def command_line(name: str) -> str:
    """The command that is running. name: of the benchmark"""
    return " ".join(["python -m", f"benchmarks.{name}", *sys.argv[1:]])


def results_folder(device: str) -> Path:
    """Where results of this device go: a card's into a folder of its own, below $OUT where that is set."""
    root = Path(os.environ.get("OUT") or RESULTS)
    if not device.startswith("cuda"):
        return root
    return root / re.sub(r"\W+", "-", torch.cuda.get_device_name(device).lower()).strip("-")


def write_results(name: str, command: str, rows: list[dict[str, Any]], device: str = "cpu") -> Path:
    """One file per benchmark: the machine and the command, then the rows."""
    path = results_folder(device) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    head = json.dumps({"command": command, **machine(), **({"note": note} if (note := busy()) else {})})
    path.write_text(f'{{"about": {head},\n "rows": [\n{lines}\n]}}\n')
    return path


def table(rows: list[dict[str, Any]], columns: dict[str, str]) -> str:
    """A markdown table. columns: key -> heading"""
    text = [list(columns.values())] + [[str(row.get(key, "")) for key in columns] for row in rows]
    widths = [max(len(line[i]) for line in text) for i in range(len(columns))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in text]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])
