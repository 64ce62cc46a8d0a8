"""What a comparison says: a table for the terminal, and one HTML page that needs nothing but a browser."""

import base64
import tempfile
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from minidit import report
from minidit.cache.spec import parse, summary
from minidit.compare import IDENTICAL, Row, file_name
from minidit.video import whole_file, write_video

SHOWN = 4  # prompts whose videos are in the page: the first ones, and the one where a method did worst
PANEL = 192  # pixels: width of a video in the page
COLUMNS = {  # heading -> what it says
    "#": "The method's number in the picture below, where fewer steps are squares.",
    "method": "The caching method, as --cache takes it; none is the full run that the rest is held against.",
    "MACs": "Multiply-adds of the transformer's blocks as a share of the uncached run's, counted exactly "
    "from what every step ran; in brackets, how many times fewer. Text and decoding cost the same for all "
    "and are left out.",
    "seconds": "Median time of denoising one video, that is of everything between text and latents; in "
    "brackets, how many times faster than uncached. It depends on the machine, and on what else ran on it.",
    "PSNR dB": "How near the frames are to those of the uncached run of the same prompt and seed, before any "
    "video codec; higher is nearer: mean (median, worst video). At 40 and above the eye hardly sees a "
    "difference; at 20 and below it is usually another video. A worst value far below the median is a video "
    "that tipped over into another one.",
    "SSIM": "The same by structure, 1 where equal: mean (median, worst video).",
    "LPIPS": "The same in the eyes of a network, 0 where equal: mean (median, worst video).",
    "cache": "What the method keeps in memory between steps.",
    "peak memory": "Most GPU memory that was in use at once, weights included.",
    "fewer steps": "The honest rival, which needs no method at all: the uncached run with as many steps as "
    "this method's MACs would pay for, to the nearest whole step.",
    "their s": "Median seconds of that rival.",
    "their PSNR dB": "PSNR of that rival, against the same uncached run: mean (median, worst video).",
    "gain": "The method's median PSNR less that of its rival. Below 0, taking fewer steps is the better "
    "method. Over a few videos, a dB or two may be luck.",
}
NOT_MEASURED = {
    "SSIM": "frames of fewer than 11 pixels a side have none.",
    "LPIPS": "it needs the package lpips and AlexNet's weights, which are never downloaded for you.",
    "peak memory": "on a CPU only the whole process could be measured, which would say nothing of a method.",
}
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1c2733; max-width: 1240px; margin: 2em auto;
  padding: 0 1em }
h1 { font-size: 1.7em; margin-bottom: 0 } h2 { margin-top: 2em; border-bottom: 1px solid #d9e2ec }
table { border-collapse: collapse; font-size: 13px } td, th { padding: .3em .5em; text-align: left }
th { border-bottom: 2px solid #3b6ea5; vertical-align: bottom } td { border-bottom: 1px solid #e6ecf2 }
td { vertical-align: top } .scroll { overflow-x: auto } .n { white-space: nowrap } .quiet { color: #5b6b7b }
.good { color: #1a7f37; font-weight: 600 } .bad { color: #b42318; font-weight: 600 }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .35em 1.2em; font-size: 15px }
dt { font-weight: 600 } dd { margin: 0 } code, pre { background: #f2f5f8; border-radius: 4px }
code { padding: .1em .3em } pre { padding: .7em; overflow-x: auto; white-space: pre-wrap }
img { max-width: 100%; image-rendering: pixelated } img.plot { image-rendering: auto }
figure { display: inline-block; margin: 0 1em 1em 0; vertical-align: top } figcaption { font-size: 14px }
summary { cursor: pointer; font-weight: 600 } details { margin: .7em 0 }
"""


def cells(row: Row, plain: Row) -> dict[str, str]:
    """What the table says of a row, by column; a column that is not there was not measured."""
    macs = row.spread("macs")["mean"] / plain.spread("macs")["mean"]
    seconds, plain_seconds = row.spread("seconds")["median"], plain.spread("seconds")["median"]
    found = {
        "method": "none (uncached)" if row is plain else row.name,
        "MACs": f"{macs:.3f} ({1 / macs:.2f}x)" if macs else "0",
        "seconds": f"{seconds:.2f} ({plain_seconds / seconds:.2f}x)",
        "cache": show_bytes(row.most("cache_bytes")),
    }
    if (peak := row.most("peak_bytes")) is not None:
        found["peak memory"] = show_bytes(peak)
    if row is plain:
        return found
    found |= distances(row)
    if row.rival:
        found["fewer steps"] = str(row.rival.steps)
        found["their s"] = f"{row.rival.spread('seconds')['median']:.2f}"
        found["their PSNR dB"] = distances(row.rival)["PSNR dB"]
        found["gain"] = f"{gain(row):+.1f} dB"
    return found


def gain(row: Row) -> float:
    """Median PSNR over that of fewer steps at the same MACs."""
    return row.spread("psnr")["median"] - row.rival.spread("psnr")["median"]


def distances(row: Row) -> dict[str, str]:
    """A row's distances from the uncached run, by column."""
    found = {}
    for name, column, show in (
        ("psnr", "PSNR dB", show_psnr),
        ("ssim", "SSIM", show_4),
        ("lpips", "LPIPS", show_4),
    ):
        if (s := row.spread(name)) is not None:
            found[column] = f"{show(s['mean'])} ({show(s['median'])}, {show(s['worst'])})"
    return found


def show_psnr(value: float) -> str:
    return "equal" if value >= IDENTICAL else f"{value:.1f}"


def show_4(value: float) -> str:
    return f"{value:.4f}"


def show_bytes(count: int) -> str:
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count} B" if count else "nothing"


def table_cells(rows: Sequence[Row]) -> list[dict[str, str]]:
    """The table's lines, refused methods left out."""
    good = [row for row in rows if row.videos]
    return [{"#": str(n)} | cells(row, rows[0]) for n, row in enumerate(good)]


def columns_of(lines: Sequence[dict[str, str]]) -> list[str]:
    """The columns that anything was measured for."""
    return [column for column in COLUMNS if any(column in line for line in lines)]


def text_table(rows: Sequence[Row]) -> str:
    """The comparison for a terminal; what tuning did and what was refused stand below."""
    lines = table_cells(rows)
    columns = columns_of(lines)
    grid = [columns, *([line.get(column, "") for column in columns] for line in lines)]
    widths = [max(len(line[i]) for line in grid) for i in range(len(columns))]
    text = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in grid]
    text += ["PSNR, SSIM and LPIPS: mean (median, worst video); gain: of the median over fewer steps'"]
    text += [f"{row.name}: {row.note}" for row in rows if row.note]
    return "\n".join(text + [f"{row.name}: left out: {row.error}" for row in rows if row.error])


def write_report(folder: Path, about: dict[str, Any], rows: Sequence[Row]) -> Path:
    """Draw what there is to draw into a folder, then the page that holds all of it. -> the page

    about: {command, machine, settings, prompts, seeds, weights_bytes, tuning}
    """
    figures = folder / "pictures"
    figures.mkdir(parents=True, exist_ok=True)
    (folder / "videos").mkdir(exist_ok=True)
    good = [row for row in rows if row.videos]
    shown, count = tasks_to_show(good), len(good[0].videos)
    others = f" Shown are {len(shown)} of {count} videos, the worst among them; all are in the folder beside."
    body = [
        introduction(about, rows),
        table_section(rows),
        plots(figures, good),
        "<h2>The videos</h2><p>Every row of frames is one run of the same prompt and seed; the top one is "
        "uncached. What matters is whether the rows below show the same video, and as sharp. The numbers are "
        f"PSNR.{'' if len(shown) == count else others}</p>",
    ]
    for i in range(count):
        body.append(task_section(folder, good, i, is_shown=i in shown))
    body += [methods_section(figures, rows), failures(rows), repeat(about)]
    page = folder / "report.html"
    with whole_file(page) as partial:
        partial.write_text(
            '<!doctype html>\n<html lang="en"><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>Caching methods compared</title><style>{STYLE}</style>\n"
            + "\n".join(body)
            + "\n</html>\n",
            encoding="utf-8",
        )
    return page


def tasks_to_show(rows: Sequence[Row]) -> set[int]:
    """The first videos, and the one where a method is furthest from the uncached run."""
    count = len(rows[0].videos)
    lowest = lambda i: min(row.videos[i].numbers["psnr"] for row in rows)
    return {*range(min(SHOWN - 1, count)), min(range(count), key=lowest)}


def introduction(about: dict[str, Any], rows: Sequence[Row]) -> str:
    """What was run, and what came out in one sentence."""
    s, where = about["settings"], about["machine"]
    count = f"{len(about['prompts'])} prompts" + (
        f" with {about['seeds']} seeds each" if about["seeds"] > 1 else ""
    )
    ranked = sorted((row for row in rows if row.rival), key=gain, reverse=True)
    better = [f"<code>{escape(row.name)}</code>" for row in ranked if gain(row) > 0]
    verdict = (
        f"{len(better) or 'None'} of {len(ranked)} methods came nearer to the uncached run, in the median "
    )
    verdict += "video, than fewer steps with as many multiply-adds" + (
        f": {', '.join(better)}." if better else "."
    )
    tuned = (
        f" Methods were tuned to {about['match']:g} of the MACs, on other prompts." if about["match"] else ""
    )
    return (
        f"<h1>Caching methods compared</h1>"
        f"<p class=quiet>minidit {escape(s['minidit'])}, {escape(about['date'])}</p>"
        f"<p>A video diffusion model makes a video in many steps that resemble each other. Caching methods "
        f"reuse parts of earlier steps to save time. This page shows how much each saves, and how far its "
        f"videos move away from those of the full run: {count}, {s['width']}x{s['height']} pixels, "
        f"{s['num_frames']} frames, {s['steps']} steps of {escape(s['solver'])}, guidance "
        f"{s['guidance_scale']:g}, model <code>{escape(s['model'])}</code> in {s['dtype']}, on "
        f"{escape(where['device'])}.{tuned}</p><p>{verdict}</p>"
    )


def table_section(rows: Sequence[Row]) -> str:
    """The table, then how to read each column."""
    lines = table_cells(rows)
    columns = columns_of(lines)
    head = "".join(f"<th>{escape(column)}" for column in columns)
    body = []
    for line in lines:
        sign = {"+": "good", "-": "bad"}.get(line.get("gain", "")[:1], "")
        classes = {"gain": f"n {sign}", "method": ""}
        inside = "".join(f"<td class='{classes.get(c, 'n')}'>{escape(line.get(c, ''))}" for c in columns)
        body.append(f"<tr>{inside}")
    for row in rows:
        if row.error:
            body.append(f"<tr><td><td>{escape(row.name)}<td colspan=20>left out: {escape(row.error)}")
    missing = [column for column in NOT_MEASURED if column not in columns]
    notes = "".join(f"<dt>{escape(c)}: not measured<dd>{escape(NOT_MEASURED[c])}" for c in missing)
    meaning = "".join(f"<dt>{escape(c)}<dd>{escape(COLUMNS[c])}" for c in columns)
    return (
        f"<h2>The numbers</h2><div class=scroll><table><tr>{head}{''.join(body)}</table></div>"
        f"<details open><summary>How to read each column</summary><dl>{meaning}{notes}</dl></details>"
    )


def plots(folder: Path, rows: Sequence[Row]) -> str:
    """The Pareto picture, where matplotlib is there to draw it."""
    heading = "<h2>Cost against quality</h2>"
    try:
        report.import_pyplot()
    except ValueError as error:
        return f"{heading}<p>Not drawn: {escape(str(error))}</p>"
    full = rows[0].spread("macs")["mean"]
    methods = [row for row in rows[1:] if not row.spec.startswith("fewer-steps")]
    beside = [row.rival for row in methods if row.rival] + [row for row in rows[1:] if row not in methods]
    fewer = {row.steps: row for row in beside}.values()
    numbers = {row.spec: n for n, row in enumerate(rows)}
    points, rivals = ([point(row, full, numbers.get(row.spec)) for row in part] for part in (methods, fewer))
    report.draw_pareto(folder / "pareto.png", points, rivals)
    return (
        f"{heading}<p>Each numbered dot is a method of the table; the dashed line is what the uncached run "
        f"reaches with fewer steps. A method is worth having where its dot lies above that line.</p>"
        f"{image(folder / 'pareto.png', 'PSNR over MACs and over seconds', 'plot')}"
    )


def point(row: Row, full: float, number: int | None) -> dict[str, Any]:
    """A row in the Pareto picture. full: MACs of the uncached run"""
    psnr = row.spread("psnr")
    cost = {"macs": row.spread("macs")["mean"] / full, "seconds": row.spread("seconds")["median"]}
    named = {"name": row.name, "number": number, "steps": row.steps}
    return named | cost | {"median": psnr["median"], "worst": psnr["worst"]}


def task_section(folder: Path, rows: Sequence[Row], i: int, *, is_shown: bool) -> str:
    """A prompt and seed: its contact sheet, and every method's video beside the uncached one."""
    plain = rows[0].videos[i]
    s = plain.numbers["settings"]
    name = f"{i:03d}-seed{s['seed']}"
    videos = {row.spec: row.videos[i].frames() for row in rows}
    labels = {row.spec: "uncached" if row is rows[0] else label(row, i) for row in rows}
    sheet = report.contact_sheet([(labels[spec], frames) for spec, frames in videos.items()])
    write_video(folder / "pictures" / f"sheet-{name}.png", sheet, fps=s["fps"], settings=s)
    figures = []
    for row in rows[1:]:
        panels = [("uncached", videos["none"]), (labels[row.spec], videos[row.spec])]
        if row.rival:
            panels.append((label(row.rival, i), row.rival.videos[i].frames()))
        path = folder / "videos" / f"{name}-{file_name(row.name)[:80]}.mp4"
        write_panels(path, panels, max(PANEL, s["width"]), row.videos[i].numbers["settings"])
        if is_shown:
            figures.append(figure(path, panels, row, s))
    if not is_shown:
        return ""
    return (
        f"<h3>“{escape(s['prompt'])}”, seed {s['seed']}</h3>"
        f"{image(folder / 'pictures' / f'sheet-{name}.png', 'frames of every method')}"
        f"<details{' open' if i == 0 else ''}><summary>Videos: uncached, then the method, then fewer steps "
        f"at its MACs</summary>{''.join(figures)}</details>"
    )


def label(row: Row, i: int) -> str:
    """What stands above a video; the number first, as a small video cuts the rest off."""
    name = f"{row.steps} steps" if row.spec.startswith("fewer-steps") else row.name
    return f"{show_psnr(row.videos[i].numbers['psnr'])} dB: {name}"


def write_panels(path: Path, panels: Sequence[tuple[str, Any]], width: int, settings: dict) -> None:
    """Videos beside each other, about `width` pixels each."""
    fitted = [(text, report.fit(frames, width)) for text, frames in panels]
    write_video(path, report.side_by_side(fitted), fps=settings["fps"], settings=settings)


def figure(path: Path, panels: Sequence[tuple[str, Any]], row: Row, settings: dict) -> str:
    """A video inside the page; a large one is reduced for it."""
    if settings["width"] > PANEL:
        with tempfile.TemporaryDirectory() as scratch:
            small = Path(scratch) / path.name
            write_panels(small, panels, PANEL, settings)
            data = data_uri(small, "video/mp4")
    else:
        data = data_uri(path, "video/mp4")
    return (
        f"<figure><video controls loop muted autoplay playsinline src='{data}'></video>"
        f"<figcaption><code>{escape(row.name)}</code></figcaption></figure>"
    )


def methods_section(folder: Path, rows: Sequence[Row]) -> str:
    """What each method did, step by step, and where its constants come from."""
    parts = [
        "<h2>What each method did</h2><p>A column per step, a row per block and guidance branch, for the "
        "first video. Dark was computed, lighter was computed in part, pale is reused inside a block, white "
        "was skipped. The bars say how much of a full step was computed, and the words above them what kind "
        "of step it was.</p>"
    ]
    for row in rows[1:]:
        if not row.videos:
            continue
        names = [] if row.spec.startswith(("fewer-steps", "replay:")) else [m.name for m in parse(row.spec)]
        told = " Inside its blocks: ".join(summary(name)[0] for name in names)
        if not names:
            told = f"The uncached run with {row.steps} steps."
        constants = row.videos[0].constants
        fitted = f"<p>Constants: {escape(constants)}.</p>" if constants else ""
        note = f"<p>Tuning: {escape(row.note)}.</p>" if row.note else ""
        picture = ""
        if names and has_pyplot():
            path = folder / f"timeline-{file_name(row.name)[:80]}.png"
            report.draw_timeline(path, row.videos[0].trace)
            picture = image(path, "what every step ran", "plot")
        parts.append(f"<h3><code>{escape(row.name)}</code></h3><p>{escape(told)}</p>{note}{fitted}{picture}")
    return "\n".join(parts)


def has_pyplot() -> bool:
    try:
        report.import_pyplot()
    except ValueError:
        return False
    return True


def failures(rows: Sequence[Row]) -> str:
    """What is missing from the table, with its reason."""
    items = [f"<li><code>{escape(row.name)}</code>: {escape(row.error)}" for row in rows if row.error]
    what = f"<ul>{''.join(items)}</ul>" if items else "<p>Nothing: every method that was asked for ran.</p>"
    return f"<h2>What was refused, or failed</h2>{what}"


def repeat(about: dict[str, Any]) -> str:
    """All settings, the machine, and the command that makes this page again."""
    left_out = ("prompt", "seed", "cache")
    rows = [(k, v) for k, v in about["settings"].items() if k not in left_out and v not in ("", None)]
    rows += list(about["machine"].items()) + [
        ("files of the transformer", show_bytes(about["weights_bytes"]))
    ]
    lines = "".join(f"<tr><td>{escape(str(k))}<td>{escape(str(v))}" for k, v in rows)
    prompts = "".join(f"<li>{escape(prompt)}" for prompt in about["prompts"])
    tuning = "".join(f"<li>{escape(prompt)}" for prompt in about["tune_prompts"])
    tuned = (
        f"<details><summary>Prompts that knobs were tuned on</summary><ul>{tuning}</ul></details>"
        if tuning
        else ""
    )
    return (
        f"<h2>How this was made</h2><pre>{escape(about['command'])}</pre>"
        f"<p>The same command again makes only what is missing. A video's seed is the first "
        f"seed + 1000 times the prompt's number + the sample.</p>"
        f"<details><summary>Settings and machine</summary><table>{lines}</table></details>"
        f"<details><summary>Prompts</summary><ol start=0>{prompts}</ol></details>{tuned}"
    )


def image(path: Path, text: str, kind: str = "") -> str:
    return f"<p><img class='{kind}' alt='{escape(text)}' src='{data_uri(path, 'image/png')}'></p>"


def data_uri(path: Path, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
