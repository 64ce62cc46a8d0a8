"""What `inspect` says of a model: parameters, multiply-adds and memory of one video, as a table to read."""

from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from minidit.cache.plan import Policy
from minidit.cache.spec import make_policy, parse
from minidit.components import find_class
from minidit.costs import Costs, Parts, cache_bytes, find_parts, footprint
from minidit.generate import Engine
from minidit.memory import GIB, Stage
from minidit.parallel import ALONE, Layout, busiest_share, find_layout, frames_of, most_tokens
from minidit.settings import BATCHED_TOKENS, DTYPES, Choices, Settings


def settings_of(parts: Parts, model: str, given: Mapping[str, Any]) -> Settings:
    """The settings of a video that nobody has asked for yet: a release's own, but for what is given."""
    schedule = parts.schedule
    values = {f.name: f.default for f in fields(Choices)} | asdict(parts.defaults)
    values |= {"flow_shift": schedule.shift, "solver": schedule.solver, "sigma_grid": schedule.sigma_grid}
    values |= {"dynamic_cfg": schedule.dynamic_guidance, "residual": given["dtype"]}
    values |= {name: value for name, value in given.items() if value is not None}
    family = parts.find_family()
    tokens = family.tokens(family.latent_shape(values["width"], values["height"], values["num_frames"]))
    return Settings(prompt="", batched_guidance=tokens <= BATCHED_TOKENS, model=model, model_id="", **values)


def report(
    model: str,
    size: tuple[int | None, int | None, int | None],
    dtype: str,
    *,
    device: str = "cuda",
    weights: str = "full",
    offload: str = "none",
    cache: str = "none",
    ranks: int = 1,
    parallel: str = "auto",
    tiled: bool = False,
) -> str:
    """The costs of one video as a table to read.

    model: a preset, a model folder or "demo" · size: (width, height, frames), None where the default is meant
    device: cuda or cpu, whether there is one or not · ranks: that share the video, by `parallel` as generate
    has it; memory is that of the busiest
    """
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; choose one of {', '.join(DTYPES)}")
    parts, (width, height, frames) = find_parts(model), size
    parts.find_family().check_tiled(tiled)
    given = dict(
        width=width,
        height=height,
        num_frames=frames,
        dtype=dtype,
        device=device,
        weights=weights,
        cache=cache,
        tiled=tiled,
    )
    settings = settings_of(parts, model, given)
    layout = layout_of(parts, settings, ranks, parallel)
    kept = 0
    if cache != "none":
        kept = cache_bytes(parts, settings, *find_policy(model, settings), layout)
    found = footprint(parts, settings, kept, layout=layout)
    costs = found.costs
    c, d = parts.components["transformer"][1], parts.defaults
    forwards, kind = (1, "") if (d.true_cfg or d.guidance_scale) == 1 else (2, "guided ")
    lines = [
        f"{model}: {costs.size[0]}x{costs.size[1]}, {costs.size[2]} frames, {dtype}, {weights} weights",
        f"  transformer  {c.depth} blocks, width {c.width}, {c.heads} heads x {c.width // c.heads}, "
        f"{costs.tokens} video tokens",
        "  parameters   " + ", ".join(f"{name} {count(n)}" for name, n in costs.parameters.items()),
        f"  per forward and branch: {costs.macs / 1e12:.4g} TMAC ("
        + ", ".join(f"{sub} {n / costs.macs:.0%}" for sub, n in costs.macs_by_sub.items())
        + f"); {d.steps} {kind}steps: {forwards * d.steps * costs.macs / 1e15:.4g} PMAC",
        "  weights      " + ", ".join(f"{name} {n / GIB:.2f} GiB" for name, n in costs.weight_bytes.items()),
        f"  memory by stage on {device}, offload {offload}, cache {cache} (activations are estimates):",
    ]
    if layout != ALONE:
        lines.insert(-1, "  " + describe_share(parts, settings, costs, layout))
    return "\n".join(lines + [stage_line(stage) for stage in found.stages(offload)])


def layout_of(parts: Parts, settings: Settings, ranks: int, mode: str) -> Layout:
    """How so many ranks would share a video; ValueError where they cannot."""
    if ranks < 1:
        raise ValueError(f"--ranks {ranks}: wanted 1 or more")
    if ranks == 1:
        return ALONE
    class_name, config = parts.components["transformer"]
    return find_layout(mode, ranks, parts.find_family(), find_class(class_name).subs, config.heads, settings)


def describe_share(parts: Parts, settings: Settings, costs: Costs, layout: Layout) -> str:
    """What the busiest rank has of a step."""
    family, subs = parts.find_family(), find_class(parts.components["transformer"][0]).subs
    latent = family.latent_of(settings)
    tokens = most_tokens(layout, costs.tokens, frames_of(subs, latent[1]))
    branches = len(family.branches(settings.cfg_scale)) // layout.cfg
    macs = branches * costs.macs * busiest_share(layout, family, subs, settings)
    return f"{layout}: the busiest has {tokens} video tokens and {macs / 1e12:.4g} TMAC of a full step"


def find_policy(model: str, settings: Settings) -> tuple[Policy, Mapping[Any, Tensor]]:
    """The caching method of a video, with the profile that lies in the model's folder."""
    if Path(model).is_dir() or model == "demo":
        engine = Engine(model, device="cpu", dtype=settings.dtype)
        return engine.policy(replace(settings, model_id=engine.model_id))
    return make_policy(parse(settings.cache), lambda method: None), {}


def stage_line(stage: Stage) -> str:
    parts = f"{stage.weights / GIB:.2f} weights + {stage.activations / GIB:.2f} activations"
    parts += f" + {stage.cache / GIB:.2f} cache" if stage.cache else ""
    parts += f" + {stage.text / GIB:.2f} text keys and values" if stage.text else ""
    host = f", and {stage.host / GIB:.2f} GiB in CPU memory" if stage.host else ""
    return f"    {stage.name:<8}{stage.total / GIB:8.2f} GiB = {parts}{host}"


def count(n: int) -> str:
    return f"{n / 1e9:.3f} B" if n >= 1e9 else f"{n / 1e6:.2f} M"
