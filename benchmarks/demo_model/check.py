"""Does the embedded model do as it is told? Colour, motion and shape, measured in decoded frames.

One prompt for each held-out combination (none was ever trained on), seed 0, default settings. The object is
what differs from the background: its colour is the nearest of the palette, its motion the path of its centre
and the ratio of its areas, its shape the best match of its mask with the four shapes drawn in its place.

    python -m benchmarks.demo_model.check [--model FOLDER] [--limit N] [--sheet FILE.png] [--json FILE]
    python -m benchmarks.demo_model.check --drawn 500     # the check itself, on drawn clips
"""

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.demo_model.data import (
    COLOURS,
    MOTIONS,
    SHAPES,
    SIZE,
    Combination,
    coverage,
    draw,
    held_out,
    sample_clips,
    trained,
)
from minidit import __version__
from minidit.generate import Engine
from minidit.video import write_video

SHAPE_FRAMES = (0, 4, 8, 12, 16)
MIN_TRAVEL = 6.0  # pixels from the first three frames to the last three; drawn clips travel at least 17
MIN_GROWTH = 1.35  # ratio of areas, likewise; drawn clips reach at least 1.9
TARGETS = {"colour": 0.9, "motion": 0.9, "shape": 0.8}


@dataclass(frozen=True)
class Seen:
    """What a video shows."""

    colour: str
    shape: str
    motion: str  # a key of MOTIONS, or "unclear"


@dataclass(frozen=True)
class Answer:
    """A prompt, what it asks for and what came."""

    prompt: str
    asked: Seen
    seen: Seen


def object_mask(video: Tensor) -> Tensor:
    """How much each pixel belongs to the object. video (T, H, W, 3) in [0, 255] -> (T, H, W) in [0, 1]"""
    border = torch.cat((video[:, 0], video[:, -1], video[:, :, 0], video[:, :, -1]), dim=1)  # (T, 2H + 2W, 3)
    away = (video - border.flatten(0, 1).median(0).values).norm(
        dim=-1
    )  # (T, H, W) RGB distance to the background
    mask = (away / away.flatten().quantile(0.98).clamp_min(20.0)).clamp(0, 1)
    return torch.where(mask < 0.3, 0, mask)  # reconstruction noise is no object


def centres(mask: Tensor) -> Tensor:
    """Centre of mass per frame, x and y in pixels. mask (T, H, W) -> (T, 2)"""
    pixel = torch.arange(SIZE) + 0.5
    mass = mask.sum((1, 2)).clamp_min(1e-6)
    return torch.stack(((mask.sum(1) * pixel).sum(1) / mass, (mask.sum(2) * pixel).sum(1) / mass), dim=1)


def see_colour(video: Tensor, mask: Tensor) -> str:
    """The palette's colour nearest to the mean of the object's inside."""
    mean = video[mask > 0.8].mean(0)  # (3,)
    return min(COLOURS, key=lambda name: (mean - torch.tensor(COLOURS[name])).norm().item())


def see_motion(mask: Tensor) -> str:
    """By growth first, then by the way the centre went, if that is clearly along one axis."""
    area, centre = mask.sum((1, 2)), centres(mask)
    growth = (area[-3:].mean() / area[:3].mean().clamp_min(1e-6)).item()
    if not 1 / MIN_GROWTH < growth < MIN_GROWTH:
        return "grows" if growth > 1 else "shrinks"
    dx, dy = (centre[-3:].mean(0) - centre[:3].mean(0)).tolist()
    if max(abs(dx), abs(dy)) < MIN_TRAVEL:
        return "still"
    if min(abs(dx), abs(dy)) > 0.5 * max(abs(dx), abs(dy)):
        return "unclear"
    return ("right" if dx > 0 else "left") if abs(dx) > abs(dy) else ("down" if dy > 0 else "up")


def see_shape(mask: Tensor) -> str:
    """The shape whose drawing, at the object's place and about its size, differs least over several frames.

    Drawings are softened as a VAE softens, otherwise every blunted star would pass for a circle.
    """
    frames = mask[list(SHAPE_FRAMES)]  # (t, H, W)
    centre, area = centres(frames), frames.sum((1, 2)).clamp_min(1e-6)
    pixel = torch.arange(SIZE) + 0.5
    x = (pixel - centre[:, 0, None, None]).expand(-1, SIZE, -1)  # (t, H, W)
    y = (pixel[:, None] - centre[:, 1, None, None]).expand(-1, -1, SIZE)
    error = {}
    for shape in SHAPES:
        radius = (area / unit_area(shape)).sqrt()[:, None, None]
        drawn = torch.stack(
            [soften(coverage(shape, x, y, k * radius)) for k in (0.9, 1.0, 1.1)]
        )  # (3, t, H, W)
        error[shape] = ((drawn - frames).square().sum((2, 3)) / area).min(0).values.mean().item()
    return min(error, key=error.get)


def soften(masks: Tensor, sigma: float = 1.0) -> Tensor:
    """Gaussian blur of each frame. masks (t, H, W) -> the same shape"""
    taps = torch.exp(-torch.arange(-3.0, 4.0).square() / (2 * sigma**2))
    kernel = (taps[:, None] * taps / taps.sum() ** 2)[None, None]  # (1, 1, 7, 7)
    return F.conv2d(masks[:, None], kernel, padding=3)[:, 0]


def unit_area(shape: str) -> float:
    """Area of the shape of radius 1, measured on a drawing of radius 20."""
    pixel = torch.arange(SIZE) + 0.5 - SIZE / 2
    drawn = coverage(shape, pixel.expand(SIZE, -1), pixel[:, None].expand(-1, SIZE), torch.tensor(20.0))
    return drawn.sum().item() / 400


def look(video: Tensor) -> Seen:
    """Colour, shape and motion of the object. video (T, H, W, 3), 0 to 255"""
    video = video.float()
    mask = object_mask(video)
    return Seen(see_colour(video, mask), see_shape(mask), see_motion(mask))


def prompt_for(combo: Combination, wording: int) -> str:
    """The plainest caption of a combination. wording: which of the motion's finite forms, counted round"""
    colour, shape, motion = combo
    forms = MOTIONS[motion]
    return f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {shape} {forms[wording % len(forms)][0]}"


def ask(engine: Engine, combos: Sequence[Combination], *, seed: int = 0) -> tuple[list[Answer], list[Tensor]]:
    """Generate one video per combination, at the model's defaults. -> answers, videos (T, H, W, 3) uint8"""
    answers, videos = [], []
    for i, combo in enumerate(combos):
        prompt = prompt_for(combo, i)
        video = torch.as_tensor(engine.generate(prompt, seed=seed).frames)
        answers.append(Answer(prompt, Seen(*combo), look(video)))
        videos.append(video)
    return answers, videos


def scores(answers: Sequence[Answer]) -> dict[str, float]:
    """Share of right answers: colour, motion, shape, and colour and motion at once."""
    right = lambda *parts: sum(all(getattr(a.asked, p) == getattr(a.seen, p) for p in parts) for a in answers)
    sets = [("colour",), ("motion",), ("shape",), ("colour", "motion")]
    return {"+".join(parts): right(*parts) / len(answers) for parts in sets}


def drawn_answers(n: int, *, seed: int = 0) -> list[Answer]:
    """The check on n drawn clips instead of generated ones: it must be right on nearly all of them."""
    answers = []
    for clip in sample_clips(n, trained(), random.Random(seed)):
        video = ((draw([clip])[0][0] + 1) * 127.5).permute(1, 2, 3, 0)  # (T, H, W, 3)
        answers.append(Answer(clip.caption, Seen(clip.colour, clip.shape, clip.motion), look(video)))
    return answers


def contact_sheet(answers: Sequence[Answer], videos: Sequence[Tensor], path: Path) -> None:
    """One strip of frames per video, in columns, as a PNG that carries the prompts (and a json beside it)."""
    strips = [torch.cat([video[t] for t in SHAPE_FRAMES], dim=1) for video in videos]  # (H, 5 W, 3)
    margin = torch.full((SIZE, 8, 3), 255, dtype=torch.uint8)
    pictures = torch.stack([torch.cat((strip, margin), dim=1) for strip in strips])
    settings = {"minidit": __version__, "prompts": [a.prompt for a in answers]}
    write_video(path, pictures.numpy(), fps=1, settings=settings)


def describe(answers: Sequence[Answer]) -> str:
    """A line per wrong answer, then the scores."""
    wrong = [a for a in answers if a.asked != a.seen]
    lines = [f"  wrong: {a.prompt!r} shows {a.seen.colour} {a.seen.shape} {a.seen.motion}" for a in wrong]
    shares = " · ".join(f"{name} {share:.1%}" for name, share in scores(answers).items())
    return "\n".join([*lines, f"{shares} of {len(answers)}"])


def main(args: argparse.Namespace) -> None:
    if args.drawn:
        print(describe(drawn_answers(args.drawn)))
        return
    engine = Engine(args.model, keep_text_encoder=True)
    answers, videos = ask(engine, held_out()[: args.limit], seed=args.seed)
    print(describe(answers))
    if args.sheet:
        contact_sheet(answers, videos, args.sheet)
    if args.json:
        content = {"scores": scores(answers), "seed": args.seed, "answers": [asdict(a) for a in answers]}
        args.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="demo", help="a model folder, or demo")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, help="ask for the first N held-out combinations only")
    parser.add_argument("--sheet", type=Path, help="write a contact sheet of all videos as PNG")
    parser.add_argument("--json", type=Path, help="write scores and answers")
    parser.add_argument("--drawn", type=int, help="check the check on N drawn clips, without a model")
    main(parser.parse_args())
