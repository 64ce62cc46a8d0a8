"""Profiles: what a caching method learned of one model at one setting, in the model's folder.

profiles/<name>.json holds {version, policy, match, data}, <name>.safetensors the tensors that go with it.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor

from minidit.tensor_files import open_tensors
from minidit.video import whole_file

VERSION = 1


@dataclass(frozen=True)
class Profile:
    """match: the settings it was made with, which a run has to share · tensors: by (block, name)"""

    policy: str
    match: dict[str, Any]
    data: dict[str, Any]
    tensors: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    path: Path | None = None  # of its json, where it was read


def profile_name(profile: Profile) -> str:
    """A file name that says what fits: mixcache-64x64x17-30-unipc-wan-shift3-guidance4-fp32."""
    m = profile.match
    size = f"{m['width']}x{m['height']}x{m['num_frames']}"
    schedule = f"{m['steps']}-{m['solver']}-{m['sigma_grid']}-shift{m['flow_shift']:g}"
    return f"{profile.policy}-{size}-{schedule}-guidance{m['guidance_scale']:g}-{m['dtype']}"


def write_profile(folder: Path, profile: Profile) -> Path:
    """Write a profile into a folder, replacing one of the same name; -> the json's path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{profile_name(profile)}.json"
    content = {"version": VERSION, "policy": profile.policy, "match": profile.match, "data": profile.data}
    tensors = path.with_suffix(".safetensors")
    tensors.unlink(missing_ok=True)
    if profile.tensors:
        named = {f"{block}.{name}": t.contiguous() for (block, name), t in profile.tensors.items()}
        with whole_file(tensors) as partial:
            partial.write_bytes(save(named))
    with whole_file(path) as partial:
        partial.write_text(json.dumps(content, separators=(",", ":")) + "\n", encoding="utf-8")
    return path


def read_profile(path: Path) -> Profile:
    """Read a profile's json and the tensors beside it."""
    return with_tensors(read_numbers(path), path)


def read_numbers(path: Path) -> Profile:
    """Read a profile's json alone, which says what it fits."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["version"] != VERSION:
            raise ValueError(f"version {content['version']}, wanted {VERSION}")
        return Profile(content["policy"], dict(content["match"]), dict(content["data"]), path=path)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as a profile ({error}); make it again") from None


def with_tensors(profile: Profile, path: Path) -> Profile:
    """The profile with the tensors that lie beside its json, where there are any."""
    tensors = path.with_suffix(".safetensors")
    if tensors.is_file():
        try:
            with open_tensors(tensors) as file:
                for name in file.keys():
                    block, _, rest = name.partition(".")
                    profile.tensors[int(block), rest] = file.get_tensor(name)
        except (SafetensorError, ValueError) as error:
            raise ValueError(f"{tensors} cannot be read ({error}); make the profile again") from None
    return profile


def find_profile(folders: list[Path], policy: str, match: dict[str, Any]) -> Profile | None:
    """The profile of a policy that fits the run; None where the policy has no profile at all.

    Where there are profiles but none fits, ValueError names what the nearest one differs in.
    """
    paths = [path for folder in folders for path in sorted(folder.glob(f"{policy}-*.json"))]
    profiles = {path: profile for path in paths if (profile := read_numbers(path)).policy == policy}
    odd = lambda p: [k for k in match | p.match if p.match.get(k) != match.get(k)]
    for path, profile in profiles.items():
        if not odd(profile):
            return with_tensors(profile, path)
    if not profiles:
        return None
    near = min(profiles.values(), key=lambda p: len(odd(p)))
    what = ", ".join(f"{k} {near.match.get(k)} instead of {match.get(k)}" for k in odd(near))
    raise ValueError(
        f"no {policy} profile fits this run: the nearest has {what}; {how_to_make(policy, match)}"
    )


@contextmanager
def blamed_on(used: list[Path]) -> Iterator[None]:
    """What goes wrong inside over what a profile holds is a ValueError that names the profiles in use."""
    try:
        yield
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        if not used:
            raise
        names = ", ".join(map(str, used))
        raise ValueError(f"{names}: its data cannot be used ({error!r}); make it again") from error


def how_to_make(policy: str, match: dict[str, Any]) -> str:
    """The command that makes the missing profile, the model aside."""
    flags = {name: value for name, value in match.items() if name not in ("model_id", "width", "height")}
    words = [f"--{k.replace('_', '-')}" + ("" if v is True else f" {v}") for k, v in flags.items()]
    return (
        f"make one of this model with python -m minidit profile --cache {policy} "
        f"--size {match['width']}x{match['height']} {' '.join(words)}"
    )
