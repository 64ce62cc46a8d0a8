"""Plans as data: which paths are refused, which blocks a plan runs, how sites are named."""

import pytest

from minidit.cache.plan import (
    CFG_DELTA,
    GUIDED,
    PREDICTION,
    REUSE,
    RUN_ALL,
    Add,
    Gate,
    Load,
    Measure,
    Mix,
    Plan,
    Run,
    attention_map,
    check,
    check_change,
    h,
    recalled,
    residual,
    runs,
    sub,
)

DEPTH = 8


@pytest.mark.parametrize(
    "path, ran",
    [
        ((Run(),), range(8)),
        ((Run(0, 8),), range(8)),
        ((Run(0, 3), Run(3)), range(8)),
        ((Load(h(5)), Run(5)), (5, 6, 7)),
        ((Load(h(8)),), ()),
        ((Add(residual(0, 8)),), ()),
        ((Run(0, 2), Add(residual(2, 6), Mix((2, -1))), Run(6)), (0, 1, 6, 7)),
        ((Run(0, 2), Load(h(6)), Run(6)), (0, 1, 6, 7)),
        ((Run(0, 2), Load(h(2)), Run(2)), range(8)),  # a stored state in place of the one just reached
        ((Load(PREDICTION),), ()),
    ],
    ids=str,
)
def test_paths_to_the_head_pass_and_run_their_blocks(path, ran):
    check(Plan(path=path), DEPTH)
    assert runs(Plan(path=path), DEPTH) == set(ran)


@pytest.mark.parametrize(
    "path, named",
    [
        ((Run(1),), "Run(first=1, last=None) at block 0 of 8"),
        ((Run(0, 9),), "Run(first=0, last=9) at block 0 of 8"),
        ((Run(0, 3), Run(2)), "Run(first=2, last=None) at block 3 of 8"),
        ((Run(0, 3), Run(4)), "Run(first=4, last=None) at block 3 of 8"),
        ((Run(0, 3), Run(3, 2)), "Run(first=3, last=2) at block 3 of 8"),
        ((Run(0, 5), Load(h(3)), Run(3)), "at block 5 of 8"),
        ((Load(h(9)),), "at block 0 of 8"),
        ((Run(0, 2), Add(residual(3, 5)), Run(5)), "at block 2 of 8"),
        ((Add(residual(5, 3)), Run(3)), "at block 0 of 8"),
        ((Load(residual(0, 8)),), "at block 0 of 8"),
        ((Load(sub(0, "attn")), Run()), "at block 0 of 8"),
        ((Run(0, 2), Load(PREDICTION)), "kind='prediction'"),
        ((Add(h(0)), Run()), "kind='h'"),  # h(0) is no residual, though it starts and ends at block 0
        ((Add(GUIDED), Run()), "kind='guided'"),
        ((Add(attention_map(0, "attn")), Run()), "kind='map'"),
        ((Run(0, 3),), "ends at block 3 of 8"),
        ((Load(h(7)),), "ends at block 7 of 8"),
        ((), "ends at block 0 of 8"),
    ],
    ids=str,
)
def test_a_broken_path_is_refused_by_name(path, named):
    with pytest.raises(ValueError) as error:
        check(Plan(path=path), DEPTH)
    assert named in str(error.value) and "\n" not in str(error.value)


def test_a_plan_without_the_transformer_has_no_path_to_check():
    plan = Plan(path=(), output=REUSE)
    check(plan, DEPTH)
    assert runs(plan, DEPTH) == set() and runs(RUN_ALL, DEPTH) == set(range(DEPTH))


def test_recalled_is_a_stored_prediction_alone():
    assert recalled(Plan(path=(Load(PREDICTION, Mix((2, -1))),))) == Mix((2, -1))
    for path in ((), (Run(),), (Load(h(8)),), (Load(PREDICTION), Run()), (Add(residual(0, 8)),)):
        assert recalled(Plan(path=path)) is None


def test_a_gate_may_change_what_comes_after_it():
    plan = Plan(path=(Run(0, 2), Run(2)), gate=Gate(0, Measure(h(2))))
    for path in ((Run(0, 2), Add(residual(2, 8))), (Run(0, 2), Load(h(8)))):
        check_change(plan, Plan(path=path, keep=(h(4),)), 1, DEPTH)
    with pytest.raises(ValueError, match="the first 1 items of the path"):
        check_change(plan, Plan(path=(Run(0, 3), Run(3))), 1, DEPTH)
    with pytest.raises(ValueError, match="changed the branches"):
        check_change(plan, Plan(path=plan.path, branches=("cond",)), 1, DEPTH)
    with pytest.raises(ValueError, match="ends at block 2 of 8"):
        check_change(plan, Plan(path=(Run(0, 2),)), 1, DEPTH)


@pytest.mark.parametrize(
    "site, name",
    [
        (h(3), "h(3)"),
        (residual(1, 4), "residual(1,4)"),
        (sub(0, "attn"), "sub(0,attn)"),
        (sub(7, "cross"), "sub(7,cross)"),
        (attention_map(2, "t_attn"), "map(2,t_attn)"),
        (PREDICTION, "prediction"),
        (GUIDED, "guided"),
        (CFG_DELTA, "cfg_delta"),
    ],
)
def test_sites_have_readable_names(site, name):
    assert str(site) == name
