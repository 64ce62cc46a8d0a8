"""Which layout a checkpoint has and what model it makes; the check of the tables on recorded layouts."""

import json
import math
import sys
from pathlib import Path

import torch

from minidit.weights import CONFIGS, Config, config_from_json
from weights_convert import cogvideox, hunyuan_video, latte, open_sora, t5, wan
from weights_convert.names import Fit, Layout, Shapes, fit

LAYOUTS = (
    *wan.LAYOUTS,
    *t5.LAYOUTS,
    *latte.LAYOUTS,
    *open_sora.LAYOUTS,
    *cogvideox.LAYOUTS,
    *hunyuan_video.LAYOUTS,
)
REFUSALS = (wan.refusal, cogvideox.refusal, hunyuan_video.refusal)
KNOWN = "Wan 2.1 text-to-video, Latte, Open-Sora, CogVideoX, HunyuanVideo, their VAEs and text encoders"


def recognise(shapes: Shapes) -> Layout | None:
    """The layout with these tensor names or None; ValueError for a known relative that cannot be run."""
    for refusal in REFUSALS:
        if reason := refusal(shapes):
            raise ValueError(reason)
    return next((layout for layout in LAYOUTS if all(sign in shapes for sign in layout.signs)), None)


def make_config(layout: Layout, shapes: Shapes, known: dict, override: dict) -> Config:
    """The config from the shapes, over them the upstream config.json, over that the user's own values."""
    known = known if layout.is_config in known else {}
    try:
        values = layout.config(shapes, known) | override
    except (KeyError, IndexError, ValueError, TypeError, ZeroDivisionError) as e:
        reason = f"a tensor that tells its size is missing or has an odd shape ({e!r})"
        raise ValueError(f"{layout.component}: {reason}; download it again") from None
    try:
        return config_from_json(CONFIGS[layout.class_name], values, f"{layout.component}.config")
    except ValueError as e:
        example = f'{{"components": {{"{layout.component}": {{"config": {{...}}}}}}}}'
        raise ValueError(f"{e}; give the values in a file with --config: {example}") from None


def match(layout: Layout, config: Config, shapes: Shapes) -> tuple[Shapes, Fit]:
    """Our parameters and their shapes, and how the upstream tensors fill them."""
    with torch.device("meta"):
        module = layout.build(config)
    targets = {name: tuple(t.shape) for name, t in module.state_dict().items()}
    return targets, fit(shapes, targets, layout.table(config, shapes), layout.drop)


def check(paths: list[Path]) -> int:
    """Compare recorded layouts with the tables, a line each; 0: all fit, 1: one does not, 2: unreadable."""
    status = 0
    for path in paths:
        try:
            shapes, known = read_layout(path)
        except (ValueError, OSError) as e:
            print(f"weights_convert: {e}", file=sys.stderr)
            status = 2
            continue
        try:
            print(f"{path.name}: {check_one(shapes, known)}")
        except ValueError as e:
            print(f"{path.name}: {e}")
            status = max(status, 1)
    return status


def check_one(shapes: Shapes, known: dict) -> str:
    """'ok, ...' for a layout that the tables cover completely; ValueError otherwise."""
    layout = recognise(shapes)
    if layout is None:
        raise ValueError(f"not recognised; minidit knows {KNOWN}")
    targets, found = match(layout, make_config(layout, shapes, known, {}), shapes)
    title = f"{layout.family} {layout.component}, {layout.origin} names"
    if found.problems:
        raise ValueError(f"{title}: {'; '.join(found.problems)}")
    numbers = sum(math.prod(shape) for shape in targets.values())
    dropped = f", {len(found.dropped)} dropped" if found.dropped else ""
    return f"ok, {title}: {len(shapes)} tensors -> {len(targets)} with {numbers:,} parameters{dropped}"


def read_layout(path: Path) -> tuple[Shapes, dict]:
    """A recorded layout: name -> shape, and the hyper-parameters it was recorded with, if it has them."""
    if path.name.endswith("keymap.json"):
        raise ValueError(f"{path} maps names to names and holds no shapes; give a layout")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        about = content.pop("__about__", {})
        shapes = {name: tuple(int(n) for n in shape) for name, shape in content.items()}
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as e:
        raise ValueError(f"{path} is not a layout, JSON with name: shape ({e})") from None
    return shapes, about.get("hyper_parameters", {}) if isinstance(about, dict) else {}
