"""Which steps to run in full when the others are forecast: a shortest path. Standard library only. Ours.

A run of n steps computes the guided prediction v at some of them and forecasts it at the others from the last
two that were computed, b < a:

    v_j ~ v_a + c * (v_a - v_b)

with c from least squares over uncached runs; (j - a) / (a - b) would be the line through both, 0 repeats
the last. A profile (cache/forecasts.py) has three tables: ahead[a][a - b - 1][j - a - 1] is c, errors[...]
how far such a forecast is from the truth (L2), and impact[j] how far an error of 1 in step j's prediction
moves the final latents. Errors within one gap have one cause and are added up, gaps are taken as independent,
so that the cost of a gap is (sum_j impact_j errors_j)^2, and the best places minimise the sum over gaps.
"""

from collections.abc import Sequence

Table = Sequence[Sequence[Sequence[float]]]  # [a][a - b - 1][j - a - 1]


def weights(ahead: Table, computed: tuple[int, int], step: int) -> tuple[float, float]:
    """The coefficients of the last two computed predictions, newest first, that forecast `step`."""
    a, b = computed
    c = ahead[a][a - b - 1][step - a - 1]
    return 1 + c, -c


def gap_cost(errors: Table, impact: Sequence[float], before: int, at: int, following: int) -> float:
    """What forecasting all steps between `at` and `following` costs."""
    row = errors[at][at - before - 1]
    return sum(impact[j] * row[j - at - 1] for j in range(at + 1, following)) ** 2


def place(errors: Table, impact: Sequence[float], count: int) -> tuple[int, ...]:
    """The `count` steps to compute, steps 0 and 1 among them, so that forecasting the rest costs least.

    Raises ValueError where no `count` steps leave gaps that the errors' reach covers.
    """
    n, reach = len(impact), len(errors[1][0]) + 1  # a gap leads at most `reach` steps on
    best = {(0, 1): (0.0, (0, 1))}  # last two computed steps -> cost so far, and all of them
    for _ in range(count - 2):
        longer: dict[tuple[int, int], tuple[float, tuple[int, ...]]] = {}
        for (b, a), (cost, path) in best.items():
            for j in range(a + 1, min(n, a + reach + 1)):
                total = cost + gap_cost(errors, impact, b, a, j)
                if total < longer.get((a, j), (float("inf"),))[0]:
                    longer[a, j] = total, (*path, j)
        best = longer
    ends = [
        (cost + gap_cost(errors, impact, b, a, n), path)
        for (b, a), (cost, path) in best.items()
        if n - a <= reach
    ]
    if count < 2 or not ends:
        least = 2 + -(-(n - 2) // reach)
        raise ValueError(f"{count} of {n} steps cannot be placed: wanted {least} .. {n}")
    return min(ends)[1]
