"""What the benchmarks share: the machine in words, prompts, tables, one JSON line per result."""

import json
import platform
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
PROMPTS = (
    "a red circle moves left to right",
    "a blue star moves right to left",
    "a green square moves up",
    "a yellow triangle moves down",
    "a purple circle grows",
    "a white square shrinks",
    "an orange star stays still",
    "a small blue triangle moves left to right",
)


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


def write_results(name: str, command: str, rows: list[dict[str, Any]]) -> Path:
    """One file per benchmark: the machine and the command, then the rows."""
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    head = json.dumps({"command": command, **machine()})
    path.write_text(f'{{"about": {head},\n "rows": [\n{lines}\n]}}\n')
    return path


def table(rows: list[dict[str, Any]], columns: dict[str, str]) -> str:
    """A markdown table. columns: key -> heading"""
    text = [list(columns.values())] + [[str(row.get(key, "")) for key in columns] for row in rows]
    widths = [max(len(line[i]) for line in text) for i in range(len(columns))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in text]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])
