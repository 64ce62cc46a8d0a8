"""Ways to break a file: bytes, JSON, and safetensors whose header stays readable."""

import json
import math
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load_file, save_file

JUNK = (
    None, True, False, -1, 0, 1, 2, 3, 7, 2**31, 2**63, 2**64, 10**30, 0.0, -0.5, 1e-300, 1e308, math.nan,
    math.inf,
    "", "x", "nan", "\0", "\n", "\x1b[2J", "é", "\u2028", "\ud800", "none", "../../x", "/etc/hostname",
    "x" * 5000,
    [], [[]], [0], [None], {}, {"is": "Plan"}, {"is": "Run"}, {"a": {}}, [1, 2, 3],
)  # fmt: skip
TEXTS = (
    b"", b" ", b"null", b"0", b"[]", b"{}", b'""', b"nan", b"{", b'{"a":', b"\xff\xfe{\0}\0",
    b"\xef\xbb\xbf{}",
    b"\x00" * 64, b"[" * 100_000, b'{"a":' * 100_000, b"1" * 10_000, b'{"format": 1, "format": 2}',
)  # fmt: skip


def mutate_bytes(rng: Random, data: bytes) -> bytes:
    """Cut off, overwritten, inserted into, or another thing altogether."""
    at = rng.randrange(len(data) + 1)
    match rng.randrange(6):
        case 0:
            return data[:at]
        case 1:
            return data[:at] + rng.randbytes(rng.randint(1, 16)) + data[at:]
        case 2:
            count = rng.randint(1, 16)
            return data[:at] + rng.randbytes(count) + data[at + count :]
        case 3:  # where headers are
            at = rng.randrange(min(len(data), 200) + 1)
            return data[:at] + rng.randbytes(1) + data[at + 1 :]
        case 4:
            return rng.choice(TEXTS)
        case _:
            return rng.randbytes(rng.randint(0, 300))


def mutate_json(rng: Random, value: Any) -> Any:
    """The value with one thing in it deleted, renamed, doubled, or replaced by junk."""
    if not isinstance(value, dict | list) or not value or rng.random() < 0.03:
        return rng.choice(JUNK)
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key, result = rng.choice(keys), value.copy()
    if isinstance(value[key], dict | list) and value[key] and rng.random() < 0.8:
        result[key] = mutate_json(rng, value[key])
        return result
    match rng.randrange(5):
        case 0:
            del result[key]
        case 1 if isinstance(result, dict):
            result[rng.choice(("x", "", key + " "))] = result.pop(key)
        case 2 if isinstance(result, list):
            result.append(rng.choice(JUNK + (value[key],)))
        case 3 if type(value[key]) in (int, float):
            result[key] = rng.choice(
                (value[key] + 1, -value[key], value[key] * 2, str(value[key]), value[key] / 2)
            )
        case _:
            result[key] = rng.choice(JUNK)
    return result


def mutate_json_file(rng: Random, path: Path) -> None:
    if rng.random() < 0.2:
        path.write_bytes(mutate_bytes(rng, path.read_bytes()))
        return
    value = json.loads(path.read_text(encoding="utf-8"))
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        value = mutate_json(rng, value)
    path.write_text(json.dumps(value), encoding="utf-8")


def mutate_tensors(rng: Random, path: Path) -> None:
    """A safetensors file with a tensor renamed, retyped, reshaped, left out, added, or not finite."""
    if rng.random() < 0.3:
        mutate_header(rng, path)
        return
    tensors = load_file(path)
    name = rng.choice(sorted(tensors))
    t = tensors[name]
    match rng.randrange(7):
        case 0:
            tensors[rng.choice((name + "x", "", "0", name.upper(), "\n"))] = tensors.pop(name)
        case 1:
            tensors[name] = t.to(
                rng.choice((torch.float16, torch.int8, torch.bool, torch.float64, torch.int64))
            )
        case 2:
            tensors[name] = t.reshape(-1)[: rng.randint(0, t.numel())].clone()
        case 3:
            del tensors[name]
        case 4:
            tensors["extra"] = torch.zeros(rng.randint(0, 3))
        case 5:
            tensors[name] = t[None].clone()
        case _:
            filled = t.clone().to(torch.float32)
            filled.view(-1)[:: rng.choice((1, 7))] = rng.choice((math.nan, math.inf, 1e38))
            tensors[name] = filled
    metadata = rng.choice((None, {"format": "pt"}))
    save_file(tensors, path, read_metadata(path) or metadata)


def read_metadata(path: Path) -> dict[str, str] | None:
    return read_header(path)[0].get("__metadata__")


def read_header(path: Path) -> tuple[dict, bytes]:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_header(path: Path, header: Any, rest: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + rest)


def mutate_header(rng: Random, path: Path) -> None:
    """A header that is JSON still: offsets, shapes, dtypes, and what the metadata says."""
    header, rest = read_header(path)
    metadata = header.get("__metadata__", {})
    texts = [name for name, text in metadata.items() if text.startswith("{")]
    if texts and rng.random() < 0.7:
        name = rng.choice(texts)
        metadata[name] = json.dumps(mutate_json(rng, json.loads(metadata[name])))
    else:
        header = mutate_json(rng, header)
    write_header(path, header, rest)
