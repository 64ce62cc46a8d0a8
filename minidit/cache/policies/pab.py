"""Real-Time Video Generation with Pyramid Attention Broadcast (Zhao et al., 2024).

Through the middle of a run, where attention changes little, its outputs are reused: spatial ones for 2 steps,
temporal and cross ones for longer, the more alike they are. A sub-module runs at the steps whose number is a
multiple of its kind's range, and wherever the timestep is not strictly inside the window. In the first blocks
some MLPs are reused, too.

State is kept per sub-module and guidance branch. That is VideoSys' way, not that of diffusers 0.42, which
keeps one state for both: there, under sequential guidance, uncond replays cond's attention. What is stored is
the output before its gate, as in VideoSys' CogVideoX; its Open-Sora stores self-attention after the gate.
"""

from dataclasses import dataclass

from minidit.cache.plan import REUSE, Need, Plan, RunInfo, Sub, Values, sub

KINDS = {"attn": "spatial", "t_attn": "temporal", "cross": "cross", "t_cross": "cross"}  # the rest are MLPs


@dataclass(frozen=True)
class Constants:
    """Of one family: ranges by kind in steps, the window and the MLPs' timesteps in 0 .. 1000."""

    ranges: dict[str, int]
    window: tuple[float, float]
    mlp_timesteps: tuple[float, ...] = ()
    mlp_blocks: int = 5  # of 28, the first
    mlp_skip: int = 2  # steps after a listed one


PUBLISHED = {  # VideoSys 4cce477, videosys/pipelines/{open_sora,latte,cogvideox}
    "open_sora": Constants({"spatial": 2, "temporal": 4, "cross": 6}, (450, 930), (864, 788, 676)),
    "latte": Constants({"spatial": 2, "temporal": 3, "cross": 6}, (100, 800), (720, 640, 560, 480, 400)),
    "cogvideox": Constants({"spatial": 2}, (100, 850)),
}
DEFAULT = Constants({"spatial": 2, "cross": 6}, (100, 800))  # the window of diffusers, the ranges of VideoSys


def reuses(timesteps: tuple[float, ...], every: int, window: tuple[float, float]) -> list[bool]:
    """Whether each step reuses a sub-module of that range."""
    low, high = window
    return [i % every != 0 and low < t < high for i, t in enumerate(timesteps)]


def mlp_reuses(timesteps: tuple[float, ...], listed: tuple[float, ...], skip: int) -> list[bool]:
    """Whether each step reuses an MLP: `skip` steps after each listed timestep, or the step nearest to it.

    VideoSys wants the exact whole number, and does nothing on any schedule that does not visit it.
    """
    nearest = {min(range(len(timesteps)), key=lambda i: abs(int(timesteps[i]) - t)) for t in listed}
    served = {i + k for i in nearest for k in range(1, skip + 1)}
    return [i in served - nearest for i in range(len(timesteps))]


class PAB:
    """Pyramid Attention Broadcast (Zhao et al., 2024, arXiv 2408.12588): attention reused by kind mid-run.

    Published ranges: Open-Sora 2/4/6 and the variants 357, 579; Latte 2/3/6, 3/4/7, 4/6/9; CogVideoX 2.

    spatial, temporal, cross: ranges in steps, 1 never reuses · window: the two timesteps, such as 100/800,
    between which attention is reused · mlp: reuse the first blocks' MLPs, where their timesteps are published
    """

    variants = {
        "357": {"spatial": 3, "temporal": 5, "cross": 7},
        "579": {"spatial": 5, "temporal": 7, "cross": 9},
    }
    needs_values = False
    knob = ("spatial", 2, 10)  # what compare tunes, and its bounds

    def __init__(
        self,
        spatial: int | None = None,
        temporal: int | None = None,
        cross: int | None = None,
        window: tuple[float, ...] | None = None,
        mlp: bool = True,
    ):
        given = {"spatial": spatial, "temporal": temporal, "cross": cross}
        self.ranges = {kind: every for kind, every in given.items() if every is not None}
        if min(self.ranges.values(), default=1) < 1 or (window is not None and len(window) != 2):
            raise ValueError(f"pab: {self.ranges}, window={window}; wanted 1 or more, and two timesteps")
        self.window, self.mlp = window, mlp

    def reset(self, run: RunInfo) -> tuple[Need, ...]:
        found = PUBLISHED.get(run.family, DEFAULT)
        ranges, window = found.ranges | self.ranges, self.window or found.window
        timesteps = tuple(step.t for step in run.steps)
        by_name = {
            name: reuses(timesteps, ranges[kind], window)
            for name, kind in KINDS.items()
            if name in run.subs and kind in ranges
        }
        table: dict[Sub, list[bool]] = {(b, name): r for name, r in by_name.items() for b in range(run.depth)}
        if self.mlp and found.mlp_timesteps:
            blocks = max(1, round(found.mlp_blocks * run.depth / 28))
            row = mlp_reuses(timesteps, found.mlp_timesteps, found.mlp_skip)
            table |= {(b, name): row for name in ("mlp", "t_mlp") for b in range(blocks)}
        if not any(map(any, table.values())):
            raise ValueError(
                f"pab: no step of {len(timesteps)} between timesteps {window[0]:g} and {window[1]:g} reuses "
                f"anything; take more steps, longer ranges or a wider window"
            )
        self.plans = tuple(self.plan_of(i, table) for i in range(len(timesteps)))
        usual = f"published for {run.family}" if run.family in PUBLISHED else "defaults"
        self.constants = "typed" if self.ranges or self.window else usual
        return tuple(Need(sub(*key)) for key, row in table.items() if any(row))

    def plan_of(self, i: int, table: dict[Sub, list[bool]]) -> Plan:
        """What step i reuses, and keeps because the next step reuses it."""
        reused = tuple((key, REUSE) for key, row in table.items() if row[i])
        keep = tuple(sub(*key) for key, row in table.items() if not row[i] and any(row[i + 1 : i + 2]))
        return Plan(subs=reused, keep=keep, label="reuse" if reused else "full")

    def plan(self, step) -> Plan:
        return self.plans[step.i]

    def tell(self, step, values: Values) -> None:
        pass
