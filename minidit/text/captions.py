"""Captions as T5 image models were trained to read them: cleaned of what web pages leave in them.

Follows the caption cleaning of DeepFloyd IF, as PixArt, Latte and Open-Sora took it over. The originals
remove html with BeautifulSoup; Python's own parser gives the same text.
"""

import html
import re
from html.parser import HTMLParser
from typing import Protocol
from urllib.parse import unquote_plus

import torch
from torch import Tensor, nn

PAD = 0

FILES = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"
CJK = "\u31c0-\u31ef\u31f0-\u31ff\u3200-\u32ff\u3300-\u33ff\u3400-\u4dbf\u4dc0-\u4dff\u4e00-\u9fff"
DASHES = (
    "\u2010-\u2015\u058a\u05be\u1400\u1806\u2e17\u2e1a\u2e3a\u2e3b\u2e40"
    "\u301c\u3030\u30a0\ufe31\ufe32\ufe58\ufe63\uff0d"
)
Rules = tuple[tuple[str, str], ...]  # (pattern, replacement), applied in order

URLS: Rules = (
    ("<person>", "person"),
    (
        r"\b(?:https?:(?:/{1,3}|[a-z0-9%])|[a-z0-9.\-]+\.(?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b/?(?!@))",
        "",
    ),
)
MARKS: Rules = (
    (r"@\w+\b", ""),  # names
    (f"[{CJK}]+", ""),
    (f"[{DASHES}]", "-"),
    ("[`´«»“”¨]", '"'),
    ("[‘’]", "'"),
    (r"&quot;?", ""),
    ("&amp", ""),
    (r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}", " "),  # addresses
    (r"\d:\d\d\s+$", ""),
    (r"\\n", " "),
    (r"#\d{1,3}\b", ""),
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    (rf"\S+\.(?:{FILES})", ""),
    (r"[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    (r"[#®•©™&@·º½¾¿¡§~()\[\]{}|\\/*]+", " "),
    (r"\s+\.\s+", " "),
)
LEFTOVERS: Rules = (
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),  # product codes
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),
    (r"\b\d+[a-zA-Z]+\d+\b", ""),
    (r"(worldwide\s+)?(free\s+)?shipping", ""),
    (r"(free\s)?download(\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b(?:{FILES})(\simages?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),
    (r"\b\d+\.?\d*[xх×]\d+\.?\d*\b", ""),  # sizes; the second x is Cyrillic
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),
    (r"\s+", " "),
)
EDGES: Rules = (
    (r"^[\"']([\w\W]+)[\"']$", r"\1"),
    (r"^['_,\-:;]", ""),
    (r"['_,\-:+]$", ""),
    (r"^\.\S+$", ""),
)


class Tokenizer(Protocol):
    """What encode_captions needs of a tokenizer."""

    def encode(self, text: str, max_len: int) -> list[int]: ...


class TextOnly(HTMLParser):
    """Collects what a page shows."""

    def __init__(self):
        super().__init__()
        self.parts: list[str] = []
        self.hidden = 0  # open script and style elements

    def handle_starttag(self, tag, attrs):
        self.hidden += tag in ("script", "style")

    def handle_endtag(self, tag):
        self.hidden -= tag in ("script", "style") and self.hidden > 0

    def handle_data(self, data):
        self.parts += [] if self.hidden else [data]


def without_html(text: str) -> str:
    """The text between the tags, entities resolved."""
    parser = TextOnly()
    parser.feed(text)
    parser.close()
    return "".join(parser.parts)


def substitute(text: str, rules: Rules) -> str:
    for pattern, replacement in rules:
        text = re.sub(pattern, replacement, text)
    return text


def clean_once(text: str, *, strip_inside: bool) -> str:
    import ftfy

    text = substitute(unquote_plus(text).strip().lower(), URLS)
    text = substitute(without_html(text), MARKS)
    if len(re.findall("[-_]", text)) > 3:  # this-is-my-cute-cat
        text = re.sub("[-_]", " ", text)
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    text = substitute(text.strip() if strip_inside else text, LEFTOVERS)
    return substitute(text, EDGES).strip()  # edges count with their spaces: the originals strip in vain


def clean_caption(text: str, *, strip_inside: bool = False) -> str:
    """The caption in lower case without links, markup, codes and the like; the originals clean twice.

    strip_inside: as Open-Sora does it, with one more strip half-way.
    """
    return clean_once(clean_once(text, strip_inside=strip_inside), strip_inside=strip_inside)


def with_scores(caption: str, aesthetic: float = 6.5) -> str:
    """Open-Sora's captions end in scores; one that the caption already has stays as it is."""
    return caption if "aesthetic score:" in caption else f"{caption} aesthetic score: {aesthetic:.1f}."


@torch.no_grad()
def encode_captions(
    captions: list[str], tokenizer: Tokenizer, encoder: nn.Module, *, max_len: int, device: torch.device | str
) -> list[Tensor]:
    """The text states of clean captions, all with as many rows as the first has tokens -> (M, D) each.

    A longer one is cut; a shorter one goes on with what the encoder makes of masked padding, as the
    unconditional text of Latte does.
    """
    if isinstance(captions, str):
        raise TypeError(f"captions must be a list of strings, got {captions[:40]!r}; put it in a list")
    ids = [tokenizer.encode(caption, max_len) for caption in captions]
    rows, states = len(ids[0]), []
    for row in ids:
        length = max(rows, len(row))
        padded = torch.tensor([row + [PAD] * (length - len(row))], device=device)
        mask = torch.arange(length, device=device)[None] < len(row)
        states.append(encoder(padded, mask)[0, :rows])
    return states
