"""What every family's runners share: a recording, its outcome, weights through the name tables."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from weights_convert.layouts import LAYOUTS
from weights_convert.names import fit


@dataclass
class Recording:
    """One recorded component."""

    folder: Path
    config: dict
    io: dict[str, Tensor]

    @property
    def name(self) -> str:
        return self.config["component"]

    def weights(self) -> dict[str, Tensor]:
        return load_file(self.folder / "weights.safetensors")


@dataclass
class Outcome:
    """What a run gave, under the recording's names: `mids` locate a difference, `outs` are judged."""

    outs: dict[str, Any]
    mids: dict[str, Tensor]


def open_recording(folder: Path) -> Recording:
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} is not a recording (no config.json)")
    io = folder / "io.safetensors"
    return Recording(folder, json.loads(path.read_text()), load_file(io) if io.is_file() else {})


def load_upstream(module: nn.Module, config: Any, tensors: dict[str, Tensor]) -> nn.Module:
    """Fill a module from tensors under upstream names, through the converter's own tables."""
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    layout = next(item for item in LAYOUTS if all(sign in shapes for sign in item.signs))
    targets = {name: tuple(t.shape) for name, t in module.state_dict().items()}
    found = fit(shapes, targets, layout.table(config, shapes), layout.drop)
    if found.problems:
        raise ValueError(f"recorded weights do not fit: {'; '.join(found.problems)}")
    state = {
        name: torch.cat([piece.take(tensors[piece.upstream]) for piece in pieces])
        for name, pieces in found.pieces.items()
    }
    module.load_state_dict(state)
    return module.eval().requires_grad_(False)


class Capture:
    """Collects the outputs of modules while they run; chunks of a stream are joined along time."""

    def __init__(self, modules: dict[str, nn.Module]):
        self.parts: dict[str, list[Tensor]] = {}
        for name, module in modules.items():
            module.register_forward_hook(
                lambda m, args, out, name=name: self.parts.setdefault(name, []).append(out)
            )

    def joined(self) -> dict[str, Tensor]:
        return {name: torch.cat(p, dim=2) if p[0].ndim == 5 else p[0] for name, p in self.parts.items()}
