"""The header of a safetensors file, checked before the library maps the file.

8 bytes, the header's length, little endian · the header, JSON: name -> {dtype, shape, data_offsets} · data.
Files come from anywhere, so what the header says is held against the file's size, name by name. Format:
huggingface/safetensors README.md.
"""

import json
import math
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

LONGEST = 100_000_000  # bytes of a header, the library's limit too
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "I16": 16, "U16": 16, "F16": 16,
    "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64, "F4": 4,
    "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip


def open_tensors(path: str | Path) -> Any:
    """Open a safetensors file of plausible header. Raises SafetensorError, as the library does."""
    check_header(path)
    return safe_open(path, "pt")


def check_header(path: str | Path) -> None:
    """Refuse a file whose header is no header, or whose tensors are not all of its data, end to end."""
    size = Path(path).stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or not 2 <= length <= min(size - 8, LONGEST):
            raise SafetensorError(f"its first 8 bytes announce a header of {length} bytes in {size}")
        text = file.read(length)
    try:
        header = json.loads(text.decode(), object_pairs_hook=named_once)
    except (ValueError, RecursionError) as error:
        raise SafetensorError(f"its header is not JSON: {error}") from None
    if not isinstance(header, dict):
        raise SafetensorError(f"its header is a {type(header).__name__}, wanted an object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise SafetensorError("its header's metadata is not text by name")
    at = 0
    for (first, last), name in sorted((byte_range(name, item), name) for name, item in header.items()):
        if first != at:
            what = "overlaps what lies before" if first < at else "leaves a gap before it"
            raise SafetensorError(f"{name} begins at byte {first} of the data, which {what} (wanted {at})")
        at = last
    if at != size - 8 - length:
        raise SafetensorError(f"its tensors take {at} bytes, and {size - 8 - length} are there")


def named_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object in which no name comes twice: readers differ in which one they take."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} comes twice")
    return found


def byte_range(name: str, item: Any) -> tuple[int, int]:
    """Where a tensor lies in the data; raises where that is not what its dtype and shape take."""
    try:
        dtype, shape, (first, last) = item["dtype"], item["shape"], item["data_offsets"]
        numbers = [*shape, first, last]
        bits = math.prod(shape) * BITS[dtype]
    except (KeyError, TypeError, ValueError):
        raise SafetensorError(f"{name} lacks a known dtype, a shape or two data_offsets") from None
    if not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
        raise SafetensorError(f"{name} has a size or an offset that is no whole number from 0 on")
    if (last - first) * 8 != bits:
        wanted = f"{dtype} {tuple(shape)} takes {bits / 8:g}"
        raise SafetensorError(f"{name} has {last - first} bytes, but {wanted}")
    return first, last
