"""Bad input of every kind is refused in one line, exit code 2: nothing half-written, no code run."""

import pytest

from tests.fuzz.__main__ import fuzz
from tests.fuzz.cases import make_case
from tests.fuzz.runner import Case, Seen, faults


def test_a_hundred_cases_end_well(tmp_path):
    assert fuzz(range(100), 0, tmp_path) == []


@pytest.mark.slow
def test_five_hundred_other_cases_end_well(tmp_path):
    assert fuzz(range(500), 1, tmp_path) == []


def test_the_same_number_is_the_same_case(tmp_path):
    """The printed command line shows a failure again."""
    from tests.fuzz.assets import make_assets

    assets, folders = make_assets(tmp_path / "assets"), [tmp_path / "a", tmp_path / "b"]
    for number in (3, 4, 5):
        made = []
        for folder in folders:
            folder = folder / str(number)
            folder.mkdir(parents=True)
            case = make_case(7, number, folder, assets)
            made.append((case, [path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()]))
        assert made[0] == made[1]


@pytest.mark.parametrize(
    "seen, fault",
    [
        (Seen(2, err="minidit: a good refusal of this\n"), None),
        (Seen(0, out="fine\n"), None),
        (Seen(1, err="minidit: a good refusal of this\n"), "exit code 1"),
        (Seen(2, err=""), "0 lines on stderr"),
        (Seen(2, err="minidit: one thing went wrong\nminidit: and another one\n"), "2 lines on stderr"),
        (Seen(2, err="oh no, this went wrong\n"), "does not begin with minidit"),
        (Seen(2, err="minidit: 'x'\n"), "says nothing"),
        (Seen(2, err="minidit: Traceback (most recent)\n"), "a traceback"),
        (Seen(2, err="minidit: a title \x1b]0;x of a terminal\n"), "control characters"),
        (Seen(0, err="a warning\n"), "something on stderr"),
        (Seen(0, warned=["UserWarning: x"]), "warned: UserWarning"),
        (Seen(0, outside=["open /etc/x"]), "outside its folder: open /etc/x"),
        (Seen(None, escaped="Traceback: KeyError"), "not caught"),
    ],
)
def test_the_judge_sees_what_is_wrong(tmp_path, seen, fault):
    found = faults(Case("x", []), seen, tmp_path)
    assert (found == []) if fault is None else any(fault in text for text in found)


@pytest.mark.parametrize("name", ["witness", ".v.partial.npz", "v.npz", "v.json"])
def test_the_judge_sees_what_is_left(tmp_path, name):
    (tmp_path / name).write_text("{")
    seen = Seen(2, err="minidit: a good refusal of this\n", new=[tmp_path / name])
    assert faults(Case("x", []), seen, tmp_path) == [f"left {name}"]
