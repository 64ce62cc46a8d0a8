"""The embedded model's data: captioned shapes in motion, drawn on the fly, nothing stored.

A clip is one anti-aliased shape on a plain background that travels, grows, shrinks or rests. A tenth of all
(colour, shape, motion) combinations, fixed by a hash, is hidden from the transformer; check.py asks for it.
"""

import hashlib
import math
import random
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

SIZE, FRAMES = 64, 17  # pixels per side, frames

COLOURS = {  # RGB, far from each other and from every background they are drawn on
    "red": (225, 40, 40),
    "green": (50, 185, 70),
    "blue": (60, 90, 235),
    "yellow": (250, 220, 50),
    "orange": (250, 140, 30),
    "purple": (160, 60, 200),
    "white": (248, 248, 248),
}
BACKGROUNDS = {
    "black": (16, 16, 20),
    "gray": (112, 112, 118),
    "teal": (20, 98, 100),
    "navy": (22, 26, 72),
    "beige": (222, 205, 172),
}
MIN_CONTRAST = 100.0  # RGB distance below which a background would hide the object

# name -> (corners, outer radius, inner radius, angle of the first corner), in units of the clip's radius.
# Outer radii bring the areas near to each other; a star's inner radius lies below that of a straight edge.
SHAPES = {
    "circle": (0, 1.0, 1.0, 0.0),
    "square": (4, 1.25, 1.25 * math.cos(math.pi / 4), math.pi / 4),
    "triangle": (3, 1.45, 1.45 * math.cos(math.pi / 3), 0.0),
    "star": (5, 1.45, 0.6, 0.0),
}

# motion -> wordings as (finite form, participle). None is shared by two motions, none is ambiguous.
MOTIONS = {
    "left": [
        ("moves left", "moving left"),
        ("moves to the left", "moving to the left"),
        ("moves from right to left", "moving from right to left"),
        ("moves right to left", "moving right to left"),
        ("slides left", "sliding left"),
        ("goes to the left", "going to the left"),
    ],
    "right": [
        ("moves right", "moving right"),
        ("moves to the right", "moving to the right"),
        ("moves from left to right", "moving from left to right"),
        ("moves left to right", "moving left to right"),
        ("slides right", "sliding right"),
        ("goes to the right", "going to the right"),
    ],
    "up": [
        ("moves up", "moving up"),
        ("moves upward", "moving upward"),
        ("moves from bottom to top", "moving from bottom to top"),
        ("rises", "rising"),
        ("goes up", "going up"),
        ("floats up", "floating up"),
    ],
    "down": [
        ("moves down", "moving down"),
        ("moves downward", "moving downward"),
        ("moves from top to bottom", "moving from top to bottom"),
        ("falls", "falling"),
        ("goes down", "going down"),
        ("sinks", "sinking"),
    ],
    "still": [
        ("stays still", "staying still"),
        ("stands still", "standing still"),
        ("does not move", "not moving"),
        ("rests in place", "resting in place"),
        ("stays in place", "staying in place"),
    ],
    "grows": [
        ("grows", "growing"),
        ("gets bigger", "getting bigger"),
        ("becomes larger", "becoming larger"),
        ("expands", "expanding"),
        ("grows bigger", "growing bigger"),
    ],
    "shrinks": [
        ("shrinks", "shrinking"),
        ("gets smaller", "getting smaller"),
        ("becomes smaller", "becoming smaller"),
        ("contracts", "contracting"),
        ("shrinks smaller", "shrinking smaller"),
    ],
}
RADII = {"small": (8.5, 9.5), "": (10.0, 12.0), "large": (12.5, 13.5)}  # pixels, by what the caption may say
SIZE_WORDS = {"small": ("small", "little"), "large": ("large", "big"), "": ()}
TRAVEL = (20.0, 25.0)  # pixels over the clip: faster is more than four frames in one latent can hold
GROWTH = ((7.5, 8.5), (13.0, 14.5))  # radius at the small and at the large end

Combination = tuple[str, str, str]  # colour, shape, motion


@dataclass(frozen=True)
class Clip:
    """Everything that is needed to draw one video, and what it says."""

    colour: str
    shape: str
    motion: str
    background: str
    size: str  # a key of RADII
    start: tuple[float, float, float]  # x, y of the centre and radius in pixels, first frame
    end: tuple[float, float, float]  # last frame; all three change linearly
    caption: str


def combinations() -> list[Combination]:
    return list(product(COLOURS, SHAPES, MOTIONS))


def held_out() -> list[Combination]:
    """The tenth of all combinations with the least SHA-256, in reading order."""
    digest = lambda combo: hashlib.sha256(" ".join(combo).encode()).hexdigest()
    chosen = set(sorted(combinations(), key=digest)[: round(len(combinations()) / 10)])
    return [combo for combo in combinations() if combo in chosen]


def trained() -> list[Combination]:
    chosen = set(held_out())
    return [combo for combo in combinations() if combo not in chosen]


def visible_backgrounds(colour: str) -> list[str]:
    """The backgrounds that do not hide an object of this colour."""
    return [name for name, rgb in BACKGROUNDS.items() if math.dist(rgb, COLOURS[colour]) >= MIN_CONTRAST]


def write_caption(combo: Combination, size: str, background: str, rng: random.Random) -> str:
    """One of the many ways to say it: size in half, background in half of the captions, the motion always."""
    colour, shape, motion = combo
    words = [rng.choice(SIZE_WORDS[size])] if SIZE_WORDS[size] and rng.random() < 0.5 else []
    words += [colour, shape]
    article = "the" if rng.random() < 0.15 else "an" if words[0][0] in "aeiou" else "a"
    finite, participle = rng.choice(MOTIONS[motion])
    verb = rng.choices([finite, participle, f"is {participle}"], [0.7, 0.15, 0.15])[0]
    where = rng.choice(["on", "over", "in front of"])
    tail = [f"{where} a {background} background"] if rng.random() < 0.5 else []
    caption = " ".join([article, *words, verb, *tail])
    caption = caption.capitalize() if rng.random() < 0.15 else caption
    return caption + ("." if rng.random() < 0.15 else "")


def make_clip(combo: Combination, rng: random.Random) -> Clip:
    """A clip of this combination with everything else drawn at random; the shape stays inside the frame."""
    colour, shape, motion = combo
    background = rng.choice(visible_backgrounds(colour))
    size = "" if motion in ("grows", "shrinks") else rng.choice(list(RADII))
    first = last = rng.uniform(*RADII[size])
    if motion in ("grows", "shrinks"):
        small, large = (rng.uniform(*span) for span in GROWTH)
        first, last = (small, large) if motion == "grows" else (large, small)
    dx, dy = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}.get(motion, (0, 0))
    travel, room = rng.uniform(*TRAVEL), SIZE / 2 - 1 - SHAPES[shape][1] * max(first, last)
    travel = min(travel, 2 * room)
    slack = lambda along: min(room - abs(along) * travel / 2, 8.0)
    x, y = (SIZE / 2 + rng.uniform(-1, 1) * slack(along) for along in (dx, dy))
    half = travel / 2
    start, end = (x - dx * half, y - dy * half, first), (x + dx * half, y + dy * half, last)
    return Clip(*combo, background, size, start, end, write_caption(combo, size, background, rng))


def sample_clips(n: int, combos: list[Combination], rng: random.Random) -> list[Clip]:
    """n clips, evenly spread over the combinations."""
    order = combos * (n // len(combos)) + rng.sample(combos, n % len(combos))
    rng.shuffle(order)
    return [make_clip(combo, rng) for combo in order]


def coverage(shape: str, x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """Share of each pixel that the shape covers; x, y are offsets from its centre in pixels, y downwards.

    The plane is folded into one of the 2n equal wedges of an n-cornered shape, where its edge is one line.
    """
    corners, outer, inner, turn = SHAPES[shape]
    if corners == 0:
        return (0.5 + radius - torch.hypot(x, y)).clamp(0, 1)
    wedge = math.pi / corners
    angle = torch.atan2(x, -y) - turn  # 0 towards the first corner
    angle = (torch.remainder(angle + wedge, 2 * wedge) - wedge).abs()  # in [0, wedge]
    length = torch.hypot(x, y)
    along, across = length * angle.cos(), length * angle.sin()
    edge = (
        inner * math.cos(wedge) - outer,
        inner * math.sin(wedge),
    )  # from the corner to the next inner corner
    scale = math.hypot(*edge)
    inside = (outer * radius - along) * edge[1] / scale + across * edge[
        0
    ] / scale  # signed distance to the edge
    return (0.5 + inside).clamp(0, 1)


def object_masks(clips: list[Clip], frames: list[int], device: torch.device | str = "cpu") -> Tensor:
    """Coverage of the object. clips (B), frame numbers (T) -> (B, 1, T, H, W) in [0, 1]."""
    progress = torch.tensor(frames, device=device).float() / (FRAMES - 1)
    start, end = (
        torch.tensor([getattr(c, at) for c in clips], device=device)[..., None] for at in ("start", "end")
    )
    path = (start + (end - start) * progress)[..., None, None]  # (B, 3, T, 1, 1)
    pixel = torch.arange(SIZE, device=device) + 0.5
    masks = torch.empty(len(clips), len(frames), SIZE, SIZE, device=device)
    for shape in SHAPES:
        rows = [i for i, clip in enumerate(clips) if clip.shape == shape]
        if rows:
            x, y, radius = path[rows].unbind(1)  # (b, T, 1, 1)
            masks[rows] = coverage(shape, (pixel - x).expand(-1, -1, SIZE, -1), pixel[:, None] - y, radius)
    return masks[:, None]


def draw(
    clips: list[Clip], frames: list[int] | None = None, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """The videos of the clips and their masks: (B, 3, T, H, W) in [-1, 1], (B, 1, T, H, W) in [0, 1]."""
    masks = object_masks(clips, list(range(FRAMES)) if frames is None else frames, device)
    rgb = lambda names: torch.tensor(names, device=device).float()[:, :, None, None, None] / 127.5 - 1
    front = rgb([COLOURS[c.colour] for c in clips])
    back = rgb([BACKGROUNDS[c.background] for c in clips])
    return back + masks * (front - back), masks
