"""The store: what is allocated for whom, what is refused, what rings give back."""

import pytest
import torch

from minidit.cache import store as stores
from minidit.cache.plan import CFG_DELTA, GUIDED, PREDICTION, REUSE, Mix, Need, Site, h, sub
from minidit.cache.store import Ring, Store, make_store

BOTH = ("cond", "uncond")


def shape_of(site: Site, branch: str) -> tuple:
    """Latents for what is like a prediction, a state in bf16 else, longer for uncond."""
    if site in (GUIDED, CFG_DELTA, PREDICTION):
        return (1, 2, 3), torch.float32
    return (1, 5 if branch == "cond" else 7, 4), torch.bfloat16


def make(*needs: Need, branches=BOTH, **options) -> Store:
    return make_store(needs, branches, shape_of, "cpu", **options)


def entry(value: float) -> torch.Tensor:
    return torch.full((1, 5, 4), value, dtype=torch.bfloat16)


def test_rings_are_of_the_branches_that_a_need_names():
    store = make(Need(h(1)), Need(h(2), branches=("cond",)), Need(GUIDED), Need(PREDICTION))
    assert set(store.rings) == {
        *((h(1), branch) for branch in BOTH),
        (h(2), "cond"),
        (GUIDED, ""),
        *((PREDICTION, branch) for branch in BOTH),
    }
    assert store.holds(h(2), "cond") and not store.holds(h(2), "uncond")
    alone = make(Need(h(1)), Need(h(2), branches=BOTH), Need(CFG_DELTA, branches=BOTH), branches=("cond",))
    assert set(alone.rings) == {(h(1), "cond"), (h(2), "cond"), (CFG_DELTA, "")}


def test_bytes_are_those_of_all_rings_and_constants():
    assert make().bytes == 0
    assert make(Need(h(1), branches=("cond",))).bytes == 5 * 4 * 2  # bf16
    assert make(Need(h(1))).bytes == (5 + 7) * 4 * 2  # a shape for every branch
    assert make(Need(GUIDED, depth=3)).bytes == 3 * 6 * 4
    constants = {(0, "attn.q.16"): torch.zeros(2, 8, 16)}
    assert make(Need(GUIDED), constants=constants).bytes == 6 * 4 + 2 * 8 * 16 * 4


@pytest.mark.parametrize("depths", [(1, 3), (3, 1)])
def test_two_needs_of_one_site_get_the_deeper_ring(depths):
    store = make(*(Need(GUIDED, depth) for depth in depths))
    assert len(store.rings[GUIDED, ""].slots) == 3


def test_too_much_is_refused_with_the_number(monkeypatch):
    needs = (Need(h(1)), Need(GUIDED))
    wanted = (5 + 7) * 4 * 2 + 6 * 4
    monkeypatch.setattr(stores, "GIB", 100)  # so that two digits show
    monkeypatch.setattr(stores, "left_bytes", lambda device: wanted)
    assert make(*needs).bytes == wanted
    monkeypatch.setattr(stores, "left_bytes", lambda device: wanted - 1)
    with pytest.raises(ValueError, match=r"the cache needs 1\.20 GiB and 1\.19 GiB are free on cpu; choose"):
        make(*needs)
    monkeypatch.setattr(stores, "left_bytes", lambda device: None)  # where the system does not say
    assert make(*needs).bytes == wanted


def test_a_ring_gives_the_newest_first_and_forgets_the_oldest():
    ring = Ring(torch.zeros(3, 2))
    addresses = set()
    for n in range(5):
        assert [e[0].item() for e in ring.entries()] == list(range(n - 1, max(n - 4, -1), -1))
        addresses |= {e.data_ptr() for e in ring.entries()}
        ring.push(torch.full((2,), float(n)))
    assert len(addresses) == 3  # fixed slots


def test_what_is_pushed_is_copied():
    store, value = make(Need(h(1), branches=("cond",))), entry(1.0)
    store.push(h(1), "cond", value)
    value.fill_(9.0)
    mixed = store.mix(h(1), ("cond",), REUSE)
    assert torch.equal(mixed, entry(1.0))
    mixed.fill_(9.0)
    assert torch.equal(store.entries(h(1), "cond")[0], entry(1.0))


@pytest.mark.parametrize(
    "site, branch, said",
    [
        (h(1), "cond", r"reads h\(1\) of cond, which was never kept"),
        (h(1), "uncond", r"reads h\(1\) of uncond, which was never kept"),
        (sub(2, "attn"), "cond", r"reads sub\(2,attn\) of cond"),
        (GUIDED, "", "reads guided of the run"),
    ],
)
def test_reading_what_was_never_kept_is_refused(site, branch, said):
    store = make(Need(h(1), branches=("cond",)), Need(GUIDED))
    with pytest.raises(ValueError, match=said):
        store.mix(site, (branch,), REUSE)


def test_a_mix_of_two_needs_two_entries():
    store, how = make(Need(h(1), depth=2, branches=("cond",))), Mix((2, -1))
    store.push(h(1), "cond", entry(1.0))
    with pytest.raises(ValueError, match="2 coefficients for 1 stored states"):
        store.mix(h(1), ("cond",), how)
    store.push(h(1), "cond", entry(1.5))
    assert torch.equal(store.mix(h(1), ("cond",), how), entry(2.0))  # 2 * 1.5 - 1
    store.push(h(1), "cond", entry(4.0))
    assert torch.equal(store.mix(h(1), ("cond",), how), entry(6.5))  # 2 * 4 - 1.5
    assert torch.equal(store.mix(h(1), ("cond",), REUSE), entry(4.0))


def test_a_mix_has_a_row_for_every_branch():
    store = make(Need(PREDICTION))
    for n, branch in enumerate(BOTH):
        store.push(PREDICTION, branch, torch.full((1, 2, 3), float(n)))
    mixed = store.mix(PREDICTION, BOTH, Mix((3.0,)))
    assert mixed.shape == (2, 2, 3) and mixed[0].eq(0).all() and mixed[1].eq(3).all()
    assert store.mix(PREDICTION, ("uncond", "cond"), REUSE)[0].eq(1).all()


def test_a_constant_that_no_profile_has_is_refused():
    store = make(constants={(0, "attn.q.16"): torch.ones(1)})
    assert store.constant(0, "attn.q.16").item() == 1
    with pytest.raises(ValueError, match="no profile of this run has attn.q.16 of block 1; make one"):
        store.constant(1, "attn.q.16")


def test_a_claimed_slot_is_the_newest_entry_once_it_is_filled():
    store = make(Need(h(1), depth=2, branches=("cond",)))
    for value in (1.0, 2.0):
        store.push(h(1), "cond", entry(value))
    oldest = store.entries(h(1), "cond")[1]
    slot = store.claim(h(1), "cond")
    assert slot.data_ptr() == oldest.data_ptr()
    slot.copy_(entry(3.0))
    assert [e[0, 0, 0].item() for e in store.entries(h(1), "cond")] == [3.0, 2.0]


def test_a_mix_of_two_branches_is_one_new_tensor():
    store = make(Need(PREDICTION, depth=2))
    for branch, first, second in (("cond", 1.0, 2.0), ("uncond", 5.0, 4.0)):
        for value in (first, second):
            store.push(PREDICTION, branch, torch.full((1, 2, 3), value))
    mixed = store.mix(PREDICTION, BOTH, Mix((2, -1)))
    assert mixed.is_contiguous() and mixed[0].eq(3).all() and mixed[1].eq(3).all()
    mixed.fill_(9.0)
    assert store.entries(PREDICTION, "cond")[0].eq(2).all()
