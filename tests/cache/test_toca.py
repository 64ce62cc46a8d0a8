"""ToCa and DuCa: their cycles by hand, and what a whole run computes and keeps."""

from dataclasses import replace

import pytest
import torch

from minidit.cache.loop import token_scores
from minidit.cache.macs import full_macs, plan_macs
from minidit.cache.plan import REUSE, Load, Tokens, h, sub, token_ages
from minidit.cache.policies.toca import DuCa, ToCa
from minidit.presets import ScheduleConfig
from minidit.schedules import make_schedule
from tests.cache.families import BOTH, FAMILIES, SIZE, TOKENS, ask, follow, forward_of, rel, run_info
from tests.tensors import randn


def plans(policy, run) -> list:
    policy.reset(run)
    return ask(policy, run)


def letters(found, key) -> str:
    """What a sub-module does by step: F(ull), R(eused), T(okens), S(kipped with all blocks)"""
    letter = lambda plan: {type(None): "F", type(REUSE): "R", Tokens: "T"}[type(dict(plan.subs).get(key))]
    return "".join("S" if plan.label == "skip" else letter(plan) for plan in found)


def test_tocas_cycles():
    found = plans(ToCa(), run_info(15, "open_sora"))
    for name in ("attn", "t_attn"):
        assert letters(found, (0, name)) == "FFFRRFRRFRRFRRF"
    for name in ("cross", "t_cross"):
        assert letters(found, (0, name)) == "FFFRRRRRFRRRRRF"
    for name in ("mlp", "t_mlp"):
        assert letters(found, (0, name)) == "FFFTTFTTFTTFTTF"


def test_ducas_cycles():
    found = plans(DuCa(), run_info(15, "open_sora"))
    assert letters(found, (0, "attn")) == "FFFRSFRSFRSFRSF"
    assert letters(found, (0, "cross")) == "FFFRSRRSFRSRRSF"
    assert letters(found, (0, "mlp")) == "FFFTSFTSFTSFTSF"
    assert found[4].path == (Load(h(8)),) and found[3].keep[-1] == h(8)


def test_other_intervals():
    found = plans(ToCa(interval=4, cross_interval=2, first=1), run_info(8, "wan"))
    assert [letters(found, (0, n)) for n in ("attn", "cross", "mlp")] == ["FRRRFRRR", "FRFRFRFR", "FTTTFTTT"]


def test_mlps_run_for_a_share_of_the_tokens():
    policy = ToCa(fresh=0.3)
    how = dict(plans(policy, run_info(15, "wan"))[3].subs)[2, "mlp"]
    assert how == Tokens(15, 100, "norm", pytest.approx(0.1), 0)  # 0.1 times 1.495 of 100
    how = dict(plans(ToCa(score="random"), run_info(15, "wan"))[4].subs)[2, "mlp"]
    assert (how.score, how.seed) == ("random", 4)


def test_what_is_computed_is_kept_and_nothing_else():
    policy = ToCa()
    needs = {need.site for need in policy.reset(run_info(15, "wan", depth=2))}
    keys = [(k, n) for k in range(2) for n in ("attn", "cross", "mlp")]
    assert needs == {sub(*key) for key in keys} | {token_ages(k, "mlp") for k in range(2)}
    found = ask(policy, run_info(15, "wan", depth=2))
    assert set(found[2].keep) == {sub(*key) for key in keys}
    assert set(found[3].keep) == {sub(k, "mlp") for k in range(2)}
    assert set(found[5].keep) == {sub(k, n) for k in range(2) for n in ("attn", "mlp")}
    assert not any(need.site.kind == "ages" for need in ToCa(fresh=0.0).reset(run_info(15)))
    assert [need.site for need in DuCa().reset(run_info(15))][-1] == h(8)


@pytest.mark.parametrize("cls", [ToCa, DuCa])
def test_what_cannot_run_is_refused_by_name(cls):
    name = cls.__name__.lower()
    with pytest.raises(ValueError, match=f"{name}: no rank knows the scores of all tokens"):
        cls().reset(replace(run_info(50), token_ranks=2))
    with pytest.raises(ValueError, match=f"{name}: first=3 leaves none of 3 steps"):
        cls().reset(run_info(3))
    assert plans(cls(), run_info(4))[3].label == "tokens"
    for options in ({"ratio": 0.0}, {"ratio": 0.9}, {"interval": 1}, {"first": 0}, {"score": "entropy"}):
        with pytest.raises(ValueError, match=f"{name}: "):
            cls(**options)


def test_constants_say_whose_they_are():
    for family, said in (("open_sora", "open-sora-1.2"), ("wan", "open-sora-1.2, used here")):
        policy = ToCa()
        policy.reset(run_info(30, family))
        assert policy.constants == f"published for {said}"


class Walking:
    """A branch's blocks by hand: what modules gave last, and how long tokens have been passed over."""

    def __init__(self):
        self.past, self.ages = {}, {}

    def run(self, name, module, *inputs):
        key = self.block, name
        how = self.subs.get(key)
        if how is None:
            out = module(*inputs)
            self.ages[key] = torch.zeros(1, TOKENS)
        elif how == REUSE:
            out = self.past[key]
        else:
            out, x = self.past[key].clone(), inputs[0]
            score = token_scores(out[:, :TOKENS], how, self.block) + how.fresh * self.ages[key]
            video = score[0].argsort(descending=True)[: how.count]
            rows = torch.cat((video, torch.arange(TOKENS, x.shape[1])))
            out[:, rows] = module(x[:, rows], *inputs[1:])
            self.ages[key] += 1
            self.ages[key][:, video] = 0
        self.past[key] = out
        return out


@torch.no_grad()
def by_hand(forward, found):
    schedule, x = make_schedule(ScheduleConfig("euler", "wan", 3.0), len(found)), randn(1, 4, *SIZE, seed=4)
    walks, ends = {b: Walking() for b in BOTH}, {}
    for step, plan in zip(schedule.steps(3.0), found, strict=True):
        outs = {}
        for b, walk in walks.items():
            state, cond = forward.model.embed(x, torch.tensor([step.t]), forward.context.select((b,)))
            walk.subs = dict(plan.subs)
            for walk.block, block in enumerate(forward.model.blocks if plan.label != "skip" else ()):
                state = block(state, cond.at(walk.block), walk)
            ends[b] = state if plan.label != "skip" else ends[b]
            outs[b] = forward.model.head(ends[b], cond)
        v = outs["uncond"] + 3.0 * (outs["cond"] - outs["uncond"])
        x, _ = schedule.step(step.i, x, v, schedule.start())
    return x


@pytest.mark.parametrize("cls, score", [(ToCa, "norm"), (ToCa, "random"), (DuCa, "norm")])
@pytest.mark.parametrize("family", FAMILIES)
def test_runs_are_those_by_hand(family, cls, score):
    for is_batched in (True, False):
        forward, policy = forward_of(family, is_batched=is_batched), cls(ratio=0.3, score=score)
        outcome = follow(forward, policy, 10, family=family)
        found = [record.plan for record in outcome.records]
        assert rel(outcome.latents, by_hand(forward, found)) < 1e-5
        table = lambda width: forward.model.macs(SIZE, 5, width)  # noqa: B023
        ran = sum(plan_macs(plan, BOTH, table) for plan in found)
        assert ran < 0.75 * 10 * full_macs(BOTH, table)
