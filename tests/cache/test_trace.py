"""Traces: plans as JSON and back, totals by hand, files, and replays that give the same bits."""

import json
from dataclasses import fields, replace

import pytest
import torch

import minidit
from minidit.cache.plan import (
    CFG_DELTA,
    GUIDED,
    PREDICTION,
    REUSE,
    RUN_ALL,
    Add,
    Freeze,
    Gate,
    Load,
    Measure,
    Mix,
    Need,
    Plan,
    Run,
    Share,
    Slice,
    Spectrum,
    Tokens,
    Window,
    attention_map,
    h,
    residual,
    sub,
    sub_input,
    window_rest,
)
from minidit.cache.policies.combined import Combined
from minidit.cache.policies.mixcache import MixCache
from minidit.cache.policies.replay import Replay
from minidit.cache.policies.unicp import UniCP
from minidit.cache.spec import make_policy, parse
from minidit.cache.trace import (
    TYPES,
    acted,
    closing_line,
    from_json,
    make_trace,
    name_of,
    read_plans,
    read_trace,
    to_json,
    write_trace,
)
from minidit.presets import ScheduleConfig
from minidit.sampling import Record, denoise
from minidit.schedules import Step, make_schedule
from minidit.settings import Choices
from tests.cache.test_mixcache import run_info as mixcache_run
from tests.cache.test_unicp import STEPS, embedded_run, mixed_profile, random_bases
from tests.cache.test_unicp import run_info as unicp_run

EVERYTHING = Plan(
    path=(Run(0, 2), Add(residual(2, 4), Mix((2, -1))), Load(h(6), Mix((0.5, 0.25, 0.25))), Run(6)),
    branches=("cond",),
    subs=(
        ((0, "attn"), REUSE),
        ((1, "attn"), Slice(16)),
        ((2, "t_attn"), Freeze()),
        ((7, "mlp"), Mix((3, -3, 1))),
        ((4, "attn"), Window(3, 16)),
        ((5, "attn"), Share("uncond", Window(3, 16))),
        ((6, "mlp"), Tokens(2, 16, "random", 0.1, 5)),
    ),
    keep=(
        sub_input(0, "attn"),
        window_rest(3, "attn", Window(3, 16)),
        h(2),
        residual(2, 4),
        sub(7, "cross"),
        attention_map(2, "t_attn"),
        GUIDED,
        PREDICTION,
    ),
    measure=(Measure(GUIDED), Measure(h(2), "moments", "uncond", 1)),
    fill=Spectrum(1.1, 0.9),
    output=REUSE,
    gate=Gate(-1, Measure(h(0), "l2")),
    label="everything",
)
ACTIVE = "mixcache:eff:impact=uniform,theta=9"  # acts from step 2 on, whatever is measured
TINY = dict(width=32, height=32, num_frames=5, seed=3)


def by_way_of_a_file(plan: Plan) -> Plan:
    return from_json(json.loads(json.dumps(to_json(plan))))


def record(i: int, plan: Plan, values=None, seconds: float = 0.5) -> Record:
    return Record(Step(i, 4, 900.0 - i, 1.0, 4.0), plan, values or {}, seconds)


def hand_trace(plans, cache: str = "mixcache", **options) -> dict:
    """A trace over two blocks whose sub-modules cost 6 and 4, with both branches: a full step is 40."""
    table = {(k, name): n for k in (0, 1) for name, n in (("attn", 6), ("mlp", 4))}
    records = [record(i, plan, **options) for i, plan in enumerate(plans)]
    return make_trace(
        {"cache": cache}, records, ("attn", "mlp"), ("cond", "uncond"), lambda w: table, 3 << 19
    )


def test_every_part_of_a_plan_survives():
    assert by_way_of_a_file(EVERYTHING) == EVERYTHING
    text = json.dumps(to_json(EVERYTHING))
    assert all(f'"is": "{name}"' in text for name in TYPES)  # so every type is in it
    changed = {f.name for f in fields(Plan) if getattr(EVERYTHING, f.name) != getattr(RUN_ALL, f.name)}
    assert changed == {f.name for f in fields(Plan)}  # and every field


def test_defaults_are_left_out():
    assert to_json(RUN_ALL) == {"is": "Plan"}
    assert to_json(Plan(output=REUSE, label="step")) == {
        "is": "Plan", "output": {"is": "Mix"}, "label": "step"
    }  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"residual": True}, {"block_uncond": "run"}], ids=str)
@pytest.mark.parametrize("guidance", [None, [4.0 + i for i in range(20)]], ids=["constant", "varying"])
def test_mixcaches_plans_survive(options, guidance):
    policy = MixCache(impact="uniform", **options)
    policy.reset(mixcache_run(guidance=guidance))
    assert len(policy.plans) == 6
    assert {name: by_way_of_a_file(plan) for name, plan in policy.plans.items()} == policy.plans


@pytest.mark.parametrize("outer", [None, "mixcache:impact=uniform,theta=9"])
def test_unicps_plans_survive(outer):
    policy, info = UniCP(profile=mixed_profile()), unicp_run(depth=8)
    if outer:
        policy = Combined(make_policy(parse(outer), lambda name: None), policy)
    policy.reset(info)
    kinds = set()
    for step in info.steps:
        plan = policy.plan(step)
        assert by_way_of_a_file(plan) == plan
        kinds |= {type(how) for _, how in plan.subs}
        policy.tell(step, {})
    assert kinds == {Mix, Slice}


@pytest.mark.parametrize(
    "measure, name",
    [
        (Measure(GUIDED), "l1 guided"),
        (Measure(CFG_DELTA, "moments"), "moments cfg_delta"),
        (Measure(h(4)), "l1 h(4) cond"),
        (Measure(sub(2, "attn"), "l2", "uncond", 1), "l2 sub(2,attn) uncond age 1"),
    ],
)
def test_measurements_have_readable_names(measure, name):
    assert name_of(measure) == name


def test_totals_are_those_by_hand():
    cond = Plan(branches=("cond",), fill=REUSE, label="cfg")
    half = Plan(path=(Load(h(1)), Run(1)), label="block 0")
    trace = hand_trace([RUN_ALL, cond, half, Plan(output=REUSE, label="step")])
    assert [step["macs"] for step in trace["steps"]] == [40, 20, 20, 0]
    assert trace["total"] == {
        "macs": 80, "macs_full": 160, "cache_bytes": 3 << 19, "full_equivalents": 2.0, "seconds": 2.0
    }  # fmt: skip
    assert (trace["depth"], trace["subs"], trace["version"]) == (2, ["attn", "mlp"], 1)
    assert trace["steps"][2]["t"] == 898.0 and trace["steps"][2]["i"] == 2
    line = "mixcache: 2.0 of 4 steps full-equivalent, 2.00x fewer MACs, 1.50 MiB cache"
    assert closing_line(trace) == line
    assert closing_line(trace | {"total": trace["total"] | {"cache_bytes": 1 << 30}}).endswith(
        ", 1.00 GiB cache"
    )


def test_values_are_logged_by_name():
    values = {Measure(GUIDED): 0.25, Measure(h(1), "moments"): (0.5, 1.5)}
    trace = json.loads(json.dumps(hand_trace([RUN_ALL], values=values)))
    assert trace["steps"][0]["values"] == {"l1 guided": 0.25, "moments h(1) cond": [0.5, 1.5]}


def test_only_less_work_counts_as_acting():
    kept = Plan(keep=(h(1),), measure=(Measure(h(1)),), label="short")
    assert not acted(hand_trace([RUN_ALL, kept]))
    assert acted(hand_trace([RUN_ALL, Plan(subs=(((1, "mlp"), REUSE),))]))


def test_a_file_gives_the_trace_and_its_plans_back(tmp_path):
    plans = (RUN_ALL, replace(EVERYTHING, path=(Run(0, 1), Load(h(2)))))
    trace, path = hand_trace(plans), tmp_path / "run.json"
    write_trace(path, trace)
    assert read_trace(path) == trace and read_plans(trace, str(path)) == plans
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]


def test_a_trace_that_cannot_be_written_leaves_the_old_one(tmp_path):
    path, trace = tmp_path / "run.json", hand_trace([RUN_ALL])
    write_trace(path, trace)
    with pytest.raises(TypeError):
        write_trace(path, trace | {"settings": {1, 2}})  # no JSON
    assert read_trace(path) == trace and [p.name for p in tmp_path.iterdir()] == ["run.json"]


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "cannot be read as a trace"),
        ('{"version": 1, "steps": [{"plan"', "cannot be read as a trace"),
        ("[1, 2]", "is not a trace of this minidit; make one with --trace FILE"),
        ('{"version": 2, "depth": 2, "steps": []}', "is not a trace of this minidit"),
        ('{"version": 1}', "is not a trace of this minidit"),
        ('{"version": 1, "steps": [{"plan": {"is": "Plan"}}]}', "no plan ('depth')"),
        *(
            ('{"version": 1, "depth": 2, "steps": ' + steps + "}", "holds a step that is no plan")
            for steps in (
                "5",
                "[5]",
                "[{}]",
                '[{"plan": null}]',
                '[{"plan": "full"}]',
                '[{"plan": {"is": "Mix"}}]',
                '[{"plan": {"is": "Flan"}}]',
                '[{"plan": {"label": "full"}}]',
                '[{"plan": {"is": "Plan", "colour": 3}}]',
                '[{"plan": {"is": "Plan", "path": [1]}}]',
                '[{"plan": {"is": "Plan", "path": [{"is": "Run", "last": "2"}]}}]',
                '[{"plan": {"is": "Plan", "path": [{"is": "Load"}]}}]',
                '[{"plan": {"is": "Plan", "path": [{"is": "Run", "last": 9}]}}]',  # of a deeper model
            )
        ),
    ],
)
def test_a_damaged_file_is_refused_in_one_line(tmp_path, text, said):
    path = tmp_path / "run.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError) as error:
        read_plans(read_trace(path), str(path))
    assert said in str(error.value) and "run.json" in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    for path in (tmp_path / "nowhere.json", tmp_path):
        with pytest.raises(ValueError, match="cannot be read as a trace .*; make one with --trace FILE"):
            read_trace(path)


@pytest.fixture(scope="module")
def engine():
    torch.set_num_threads(1)
    return minidit.load("demo", device="cpu", dtype="fp32")


def run(engine, cache: str, steps: int = STEPS, **options):
    """-> (outcome, trace) of a tiny run"""
    choices = Choices(**{**TINY, "steps": steps, "cache": cache, **options})
    settings = engine.resolve("a blue star moves right", choices)
    outcome = engine.denoise(settings, engine.encode(settings))
    return outcome, engine.trace(settings, outcome)


@pytest.mark.parametrize("options", ["", ",residual=on", ",block_uncond=run", ",levels=step"])
def test_a_replay_gives_the_same_bits(engine, tmp_path, options):
    first, trace = run(engine, ACTIVE + options)
    assert acted(trace) and len({step["plan"].get("label") for step in trace["steps"]}) > 1
    write_trace(tmp_path / "run.json", trace)
    again, retrace = run(engine, f"replay:{tmp_path / 'run.json'}")
    assert torch.equal(again.latents, first.latents)
    assert [r.plan for r in again.records] == [r.plan for r in first.records]
    for name in ("macs", "cache_bytes"):
        assert retrace["total"][name] == trace["total"][name]
    assert not torch.equal(run(engine, "none")[0].latents, first.latents)


def test_a_replay_of_slices_and_windows_gives_the_same_bits():
    (forward, noise), bases = embedded_run(), random_bases()
    outer = make_policy(parse(ACTIVE), lambda name: None)
    schedule = make_schedule(ScheduleConfig("unipc"), STEPS)
    sample = lambda policy: denoise(forward, schedule, noise, policy, guidance_scale=4.0, constants=bases)
    first = sample(Combined(outer, UniCP(profile=mixed_profile())))
    again = sample(Replay(tuple(by_way_of_a_file(r.plan) for r in first.records)))
    assert torch.equal(again.latents, first.latents)
    assert {type(how) for r in again.records for _, how in r.plan.subs} == {Mix, Slice}


def test_a_replay_of_another_step_count_is_refused(engine, tmp_path):
    write_trace(tmp_path / "run.json", run(engine, ACTIVE)[1])
    with pytest.raises(ValueError, match=f"the trace has {STEPS} steps, this run 6; make them equal"):
        run(engine, f"replay:{tmp_path / 'run.json'}", steps=6)


def test_a_decided_gate_is_replayed_without_being_asked():
    policy = Replay((Plan(path=(Run(0, 2), Run(2)), gate=Gate(0, Measure(h(2)))),) * 20)
    policy.reset(mixcache_run())
    assert policy.plan(Step(0, 20, 0.0, 0.0, 1.0)) == Plan(path=(Run(0, 2), Run(2)))


class Gated:
    """Measures after two blocks, and skips the rest where little has changed."""

    def reset(self, run):
        self.asked, self.site = [], residual(2, run.depth)
        return Need(h(2)), Need(self.site)

    def plan(self, step):
        path = (Run(0, 2), Run(2))
        return Plan(path, keep=(h(2), self.site), gate=Gate(0, Measure(h(2))), label="gated")

    def decide(self, step, plan, value):
        self.asked.append((step.i, value))
        return replace(plan, path=(Run(0, 2), Add(self.site)), keep=(h(2),)) if value < 1 else plan

    def tell(self, step, values):
        pass


def test_a_decision_stands_in_the_log_and_is_replayed():
    (forward, noise), policy = embedded_run(), Gated()
    schedule = make_schedule(ScheduleConfig("unipc"), STEPS)
    first = denoise(forward, schedule, noise, policy, guidance_scale=4.0)
    assert [i for i, _ in policy.asked] == list(range(STEPS))
    assert policy.asked[0][1] == float("inf") and all(0 < value < 1 for _, value in policy.asked[1:])
    paths = [record.plan.path for record in first.records]
    assert paths == [(Run(0, 2), Run(2))] + [(Run(0, 2), Add(residual(2, 8)))] * (STEPS - 1)
    plans = tuple(by_way_of_a_file(record.plan) for record in first.records)
    again = denoise(forward, schedule, noise, Replay(plans), guidance_scale=4.0)
    assert torch.equal(again.latents, first.latents)


@pytest.mark.parametrize("cache", [ACTIVE, "none"])
def test_one_engine_makes_every_run_afresh(engine, cache):
    """After a run that was cut off, and after runs of another length, size and guidance."""
    first = run(engine, cache)[0]

    def stop(record, x):
        if record.step.i == 3:
            raise KeyboardInterrupt

    settings = engine.resolve("a red circle grows", Choices(**TINY, steps=STEPS, cache=cache))
    with pytest.raises(KeyboardInterrupt):
        engine.denoise(settings, engine.encode(settings), on_step=stop)
    for options in ({"steps": 5}, {"width": 48}, {"num_frames": 9}, {"guidance_scale": 1.0}, {}):
        again = run(engine, cache, **options)[0]
        alone = run(minidit.load("demo", device="cpu", dtype="fp32"), cache, **options)[0]
        assert torch.equal(again.latents, alone.latents)
        assert [r.plan for r in again.records] == [r.plan for r in alone.records]
        assert [r.values for r in again.records] == [r.values for r in alone.records]
    assert torch.equal(again.latents, first.latents)
