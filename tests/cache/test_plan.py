"""Plans as data: which paths are refused, which blocks a plan runs, how sites are named."""

import pytest

from minidit.cache.plan import (
    CFG_DELTA,
    GUIDED,
    LATENTS,
    OFFSET,
    PREDICTION,
    REUSE,
    RUN_ALL,
    TIME,
    TIME_MOD,
    Add,
    Gate,
    Load,
    Measure,
    Mix,
    Plan,
    Run,
    Share,
    Tokens,
    Window,
    attention_map,
    check,
    check_change,
    h,
    recalled,
    residual,
    runs,
    sub,
    sub_input,
    token_ages,
    window_rest,
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
        ((Load(OFFSET),), ()),
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
        ((Load(OFFSET), Run()), "kind='offset'"),
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


def test_recalled_is_a_stored_prediction_or_offset_alone():
    for site in (PREDICTION, OFFSET):
        item = Load(site, Mix((2, -1)))
        assert recalled(Plan(path=(item,))) == item
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
        (sub_input(0, "attn"), "input(0,attn)"),
        (window_rest(3, "attn", Window(8, 64)), "rest(3,attn,8)"),
        (token_ages(5, "mlp"), "ages(5,mlp)"),
        (TIME, "time"),
        (TIME_MOD, "time_mod"),
        (OFFSET, "offset"),
        (LATENTS, "latents"),
        (PREDICTION, "prediction"),
        (GUIDED, "guided"),
        (CFG_DELTA, "cfg_delta"),
    ],
)
def test_sites_have_readable_names(site, name):
    assert str(site) == name


@pytest.mark.parametrize(
    "key, how, branches, named",
    [
        ((0, "cross"), Share(), (), "looks at the text of its branch"),
        ((0, "t_cross"), Share(), (), "looks at the text of its branch"),
        ((0, "attn"), Share("cond"), ("uncond",), "but uncond runs first"),
        ((0, "attn"), Window(0, 16), (), "wanted a width of 1 .. 15, of attn"),
        ((0, "attn"), Window(16, 16), (), "wanted a width of 1 .. 15, of attn"),
        ((0, "t_attn"), Window(2, 16), (), "of attn"),
        ((0, "attn"), Share(how=Window(16, 16)), (), "wanted a width of 1 .. 15, of attn"),
        ((0, "attn"), Tokens(2, 16), (), "that is no self-attention"),
        ((0, "mlp"), Tokens(0, 16), (), "wanted a count of 1 .. 16"),
        ((0, "mlp"), Tokens(17, 16), (), "wanted a count of 1 .. 16"),
        ((0, "mlp"), Tokens(2, 16, "entropy"), (), "its score is one of norm, random"),
    ],
    ids=str,
)
def test_what_cannot_be_done_with_a_sub_module_is_refused(key, how, branches, named):
    with pytest.raises(ValueError) as error:
        check(Plan(subs=((key, how),), branches=branches), DEPTH)
    assert named in str(error.value) and key[1] in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "key, how",
    [
        ((0, "attn"), Share()),
        ((7, "mlp"), Share("uncond")),
        ((1, "attn"), Window(15, 16)),
        ((1, "attn"), Share(how=Window(3, 16))),
        ((2, "t_cross"), Tokens(16, 16, "random")),
    ],
    ids=str,
)
def test_what_can_be_done_with_a_sub_module_passes(key, how):
    check(Plan(subs=((key, how),)), DEPTH)


HALVES = (Run(0, 3), Run(3))


@pytest.mark.parametrize(
    "gate, named",
    [
        (Gate(2, Measure(h(8))), "after item 2 of a path of 2"),
        (Gate(-2, Measure(h(0))), "after item -2 of a path of 2"),
        (Gate(0, Measure(LATENTS)), "on latents is after item 0; put it before the path, at -1"),
        (Gate(1, Measure(TIME)), "on time is after item 1"),
        (Gate(0, Measure(TIME_MOD)), "on time_mod is after item 0"),
        (Gate(-1, Measure(sub_input(3, "attn"))), "on input(3,attn) stands before block 0"),
        (Gate(0, Measure(sub_input(0, "attn"))), "on input(0,attn) stands before block 3"),
    ],
    ids=str,
)
def test_a_gate_where_its_value_is_not_known_is_refused(gate, named):
    with pytest.raises(ValueError) as error:
        check(Plan(path=HALVES, gate=gate), DEPTH)
    assert named in str(error.value)


@pytest.mark.parametrize(
    "gate",
    [
        Gate(-1, Measure(LATENTS)),
        Gate(-1, Measure(TIME)),
        Gate(-1, Measure(sub_input(0, "attn"))),
        Gate(0, Measure(sub_input(3, "attn"))),
        Gate(1, Measure(h(8))),
    ],
    ids=str,
)
def test_a_gate_where_its_value_is_known_passes(gate):
    check(Plan(path=HALVES, gate=gate), DEPTH)
