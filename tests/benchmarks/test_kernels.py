"""benchmarks/kernels.py: what is compared, what a share is of, what a tuned tile is. No time is tested."""

from dataclasses import replace

import pytest

from benchmarks import kernels
from benchmarks.timing import Times, alternate
from minidit import attention_table
from minidit_kernels.pca_attention import tile

SHAPE = kernels.small(kernels.SHAPES["cogvideox-5b"])


def op_named(name: str) -> kernels.Op:
    return next(op for op in kernels.ops(SHAPE, "cpu") if op.name == name)


@pytest.mark.parametrize("name", kernels.SHAPES)
def test_every_operation_equals_its_definition_at_every_release(name):
    found = list(kernels.ops(kernels.small(kernels.SHAPES[name]), "cpu"))
    kinds = {"rel_l1", "mix", "modulate", "gated_residual", "qk_norm_rope", "pca_attention"}
    assert {op.name.split()[0] for op in found} == kinds
    assert all(kernels.error_of(op) < kernels.TOLERANCE for op in found)
    assert all((op.bytes > 0) != (op.flops > 0) for op in found)  # one yardstick each


def test_a_wrong_result_is_not_timed():
    op = op_named("gated_residual")
    broken = replace(op, run=lambda: op.run() * 1.1)
    with pytest.raises(SystemExit, match="gated_residual .* differs by 9|gated_residual .* differs by 1"):
        kernels.measure(broken, "cpu", 1e9, 1e12, 1)


def test_a_backend_that_cannot_run_is_said():
    def refuse():
        raise RuntimeError("No available kernel. Aborting execution.")

    row = kernels.measure(replace(op_named("pca_attention"), run=refuse, way="flash"), "cpu", 1e9, 1e12, 1)
    assert row["cannot"].startswith("No available kernel") and "cannot" in kernels.say(row)


def test_the_share_is_of_the_yardstick_measured_in_the_same_run():
    times = Times((0.002, 0.001, 0.003))
    copied = replace(op_named("modulate"), bytes=10**6)
    assert kernels.yardstick(copied, times, 1e9, 1e12) == {"gb_per_s": 0.5, "share_of_copy": 0.5}
    multiplied = replace(op_named("pca_attention"), flops=10**9)
    assert kernels.yardstick(multiplied, times, 1e9, 1e12) == {"tflops": 0.5, "share_of_matmul": 0.5}


def test_attention_counts_scores_at_the_narrow_width_and_values_at_the_full_one():
    sliced = [op for op in kernels.attention_ops(SHAPE, "cpu") if "R32 K64" in op.what]
    assert sliced[0].flops == 2 * SHAPE.heads * SHAPE.tokens**2 * (32 + 64)


def test_tuning_asks_the_kernels_file_for_the_candidate():
    chosen, op = [], op_named("pca_attention")
    spy = replace(op, run=lambda: (chosen.append(kernels.attention_file.tile(None, 64)), op.run())[1])
    best, _ = kernels.tune(spy, kernels.attention_file, "tile", kernels.TILES[:2], "cpu")
    assert best in kernels.TILES[:2] and set(chosen) == set(kernels.TILES[:2])
    assert kernels.attention_file.tile is tile  # as it was


def form(answer):
    """A tile, blocks or a launch without its numbers."""
    if isinstance(answer, tuple):
        return tuple(form(part) for part in answer)
    return type(answer), *(answer if isinstance(answer, dict) else ())


@pytest.mark.parametrize("name", ["qk_norm_rope", "modulate", "gated_residual", "pca_attention"])
def test_candidates_are_what_the_kernels_file_answers_itself(name):
    op = op_named(name)
    owner, place, candidates = kernels.tunable(op, SHAPE)
    asked = {"tile": (None, 64), "launch_of": (False, True), "blocks_of": (SHAPE.width,)}
    own = getattr(owner, place)(*asked[place])
    assert all(form(candidate) == form(own) for candidate in candidates)
    assert kernels.tune(op, owner, place, candidates[:1], "cpu")[0] == candidates[0]


def attention_row(R: int, way: str, ms: float | None) -> dict:
    row = {"op": "pca_attention", "what": f"R{R}", "way": way, "widths": (R, 64)}
    return row | ({"cannot": "no"} if ms is None else {"ms": ms})


ROWS = [
    attention_row(64, "cudnn", 2.0), attention_row(64, "triton", 3.0), attention_row(32, "cudnn", 4.0),
    attention_row(32, "triton", 1.0), attention_row(32, "flash", None), attention_row(64, "flash", 2.5),
]  # fmt: skip


def test_the_fastest_of_each_width_is_held_against_the_best_unsliced():
    assert kernels.fastest(ROWS) == [
        "R32: triton is fastest, 2.00x the best unsliced (cudnn)",
        "R64: cudnn is fastest, 1.00x the best unsliced (cudnn)",
    ]


def test_rows_for_the_attention_table_are_python_in_order_of_time():
    whole, sliced = kernels.table_rows(ROWS, kernels.SHAPES["cogvideox-5b"], "sm_90")
    (row,) = eval(f"({whole})", vars(attention_table))
    assert row.backends == ("cudnn", "flash", "triton", "math") and row.is_sliced is False and row.measured
    (row,) = eval(f"({sliced})", vars(attention_table))
    assert row.backends == ("triton", "cudnn", "math")  # flash could not
    assert (row.cards, row.shapes, row.widths) == (
        ("sm_90",),
        ("long",),
        (64,),
    ) and "triton 1.00 ms" in row.evidence


def test_all_of_it_runs_on_a_cpu(capsys, monkeypatch):
    monkeypatch.setattr(kernels, "copy_bandwidth", lambda device: 1e9)
    monkeypatch.setattr(kernels, "matmul_ceiling", lambda device, dtype: 1e12)
    rows = kernels.run(["open-sora"], ["mix", "pca_attention"], "cpu", False, 1)
    assert {row.get("op") for row in rows} == {"mix of 1", "mix of 2", "mix of 3", "pca_attention", None}
    assert "of a copy" in capsys.readouterr().out


def test_runs_take_turns():
    order = []
    runs = {name: lambda name=name: order.append(name) for name in "ab"}
    times = alternate(runs, "cpu", 3)
    assert "".join(order) == "ababab" and [len(t.seconds) for t in times.values()] == [3, 3]


def test_median_and_spread_of_times():
    times = Times(tuple(map(float, range(1, 9))))
    assert (times.median, times.best, times.spread) == (4.5, 1.0, 4.5)  # quartiles 2.25 and 6.75
    assert Times((3.0, 1.0)).spread == 2.0
