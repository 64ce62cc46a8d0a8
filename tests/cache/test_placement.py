"""Where to compute steps, and forecasts between them: against brute force and by hand."""

from itertools import combinations

import pytest

from minidit.cache.placement import gap_cost, place, weights


def made_up(n: int, reach: int) -> tuple[list, list]:
    """Errors that grow with gap and distance, differently at every step, and impacts."""
    errors = [
        [
            [(1 + (3 * a) % 5) * (j - a) * (j - b) if j < n else 0.0 for j in range(a + 1, a + reach)]
            for b in range(a - 1, max(-1, a - reach - 1), -1)
        ]
        for a in range(n)
    ]
    return errors, [1 + (7 * i) % 4 for i in range(n)]


def cost_of(path: tuple[int, ...], errors, impact) -> float:
    ends = (*path, len(impact))
    return sum(gap_cost(errors, impact, *ends[i : i + 3]) for i in range(len(path) - 1))


@pytest.mark.parametrize("count", [4, 5, 7, 9, 10])
def test_places_cost_least_of_all_choices(count):
    n, reach = 10, 6
    errors, impact = made_up(n, reach)
    got = place(errors, impact, count)
    fits = lambda path: all(b - a <= reach for a, b in zip(path, (*path[1:], n), strict=True))
    every = [(0, 1, *rest) for rest in combinations(range(2, n), count - 2)]
    best = min(cost_of(path, errors, impact) for path in every if fits(path))
    assert len(got) == count and got[:2] == (0, 1) and sorted(got) == list(got)
    assert cost_of(got, errors, impact) == pytest.approx(best)


def test_steps_that_matter_are_computed():
    n = 12
    errors, _ = made_up(n, 8)
    impact = [1.0] * n
    impact[7] = 1000.0
    assert 7 in place(errors, impact, 5)


def test_too_few_steps_for_the_reach_are_refused():
    errors, impact = made_up(20, 4)
    with pytest.raises(ValueError, match=r"3 of 20 steps cannot be placed: wanted 7 .. 20"):
        place(errors, impact, 3)
    assert len(place(errors, impact, 7)) == 7


def test_forecasts_go_ahead_from_the_last_two():
    ahead = [[], [[0.9, 1.7]], [[0.8, 1.5], [0.4, 0.7]]]  # [a][a - b - 1][j - a - 1]
    assert weights(ahead, (1, 0), 2) == (1.9, -0.9)
    assert weights(ahead, (2, 1), 4) == (2.5, -1.5)
    assert weights(ahead, (2, 0), 4) == (1.7, -0.7)
