"""Which examples each step takes: of one set, of a mix, and sorted by length in windows; of any sizes."""

import math
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.order import Order, Place, _turns_until, bounds, count_steps_per_epoch

# The same examples each time, and no file of those that failed.
drawn = settings(derandomize=True, database=None, deadline=None, max_examples=60)
seeds = st.integers(0, 2**32 - 1)
windows = st.none() | st.integers(1, 12)


@st.composite
def mixes(draw: st.DrawFn, *, fewest: int = 2, most: int = 4) -> tuple[list[int], list[float]]:
    """Sizes, and shares as weights times a power of the sizes."""
    sizes = draw(st.lists(st.integers(1, 40), min_size=fewest, max_size=most))
    weights = draw(st.lists(st.floats(0.05, 20), min_size=len(sizes), max_size=len(sizes)))
    alpha = draw(st.floats(0, 1))
    return sizes, [weight * size**alpha for weight, size in zip(weights, sizes, strict=True)]


def make_order(sizes: list[int], batch_size: int, seed: int, window: int | None = None, **changes: Any) -> Order:
    """Lengths repeat, so that sorting by them leaves something to decide."""
    lengths = [np.random.default_rng(size).integers(3, 9, size) for size in sizes] if window else ()
    given = {"shares": [1.0] * len(sizes), **changes}
    return Order(sizes=sizes, batch_size=batch_size, seed=seed, window=window, lengths=lengths, **given)


def steps_of(order: Order, epoch: int) -> list[list[Place]]:
    first = epoch * order.steps_per_epoch
    return [order.step(step) for step in range(first, first + order.steps_per_epoch)]


def rows_of(steps: Iterable[list[Place]]) -> list[int]:
    return [place.row for step in steps for place in step]


# One set


@drawn
@given(size=st.integers(1, 60), batch_size=st.integers(1, 70), seed=seeds, window=windows, epoch=st.integers(0, 5))
def test_an_epoch_has_every_example_once_in_steps_that_differ_by_one_and_fit_the_batch(
    size: int, batch_size: int, seed: int, window: int | None, epoch: int
) -> None:
    order = make_order([size], batch_size, seed, window)
    steps = steps_of(order, epoch)
    assert sorted(rows_of(steps)) == list(range(size))
    assert {(place.set, place.epoch) for step in steps for place in step} == {(0, epoch)}
    sizes = [len(step) for step in steps]
    assert 1 <= min(sizes) <= max(sizes) <= min(batch_size, min(sizes) + 1)
    # No more steps than must be.
    assert len(steps) == order.steps_per_epoch == math.ceil(size / batch_size)


@drawn
@given(
    mix=mixes(fewest=1),
    batch_size=st.integers(1, 12),
    seed=seeds,
    window=windows,
    one_set=st.booleans(),
    asked=st.lists(st.integers(0, 40), min_size=1, max_size=20),
)
def test_a_step_depends_on_seed_and_number_alone_in_whatever_order_it_is_asked_for(
    mix: tuple[list[int], list[float]],
    batch_size: int,
    seed: int,
    window: int | None,
    one_set: bool,
    asked: list[int],
) -> None:
    sizes, shares = mix
    changes: dict[str, Any] = {"shares": shares, "one_set": one_set, "window": window if one_set else None}
    one = make_order(sizes, batch_size, seed, **changes)
    assert [one.step(step) for step in asked] == [make_order(sizes, batch_size, seed, **changes).step(s) for s in asked]


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("sizes", [[20], [20, 20]])
def test_epochs_and_seeds_and_sets_have_orders_of_their_own_also_one_apart(
    sizes: list[int], window: int | None
) -> None:
    rows: dict[tuple[int, int, int], list[int]] = {}
    for seed in range(3):
        order = make_order(sizes, 4, seed, window)
        for step in range(15 * len(sizes)):
            for place in order.step(step):
                rows.setdefault((seed, place.set, place.epoch), []).append(place.row)
    orders = [tuple(own) for own in rows.values() if len(own) == 20]
    assert len(orders) >= 3 * 2 * len(sizes)
    assert len(set(orders)) == len(orders)


# A mix


@drawn
@given(mix=mixes(), batch_size=st.integers(1, 12), seed=seeds, window=windows)
def test_a_step_of_a_mix_is_a_whole_step_of_one_set_and_each_set_has_its_own_epochs(
    mix: tuple[list[int], list[float]], batch_size: int, seed: int, window: int | None
) -> None:
    sizes, shares = mix
    order = make_order(sizes, batch_size, seed, window, shares=shares)
    taken: list[list[list[Place]]] = [[] for _ in sizes]
    for step in range(4 * order.steps_per_epoch):
        places = order.step(step)
        [index] = {place.set for place in places}
        taken[index].append(places)
    for index, steps in enumerate(taken):
        _assert_epochs(steps, sizes[index], index, whole_steps=count_steps_per_epoch(sizes[index], batch_size))


def _assert_epochs(steps: list[list[Place]], size: int, index: int, *, whole_steps: int | None = None) -> None:
    """One after the other, each example once in each that is over, and in one that is not, at most once."""
    places = [place for step in steps for place in step]
    assert [place.epoch for place in places] == sorted(place.epoch for place in places)
    assert {place.set for place in places} <= {index}
    for epoch in range(places[-1].epoch + 1 if places else 0):
        rows = [place.row for place in places if place.epoch == epoch]
        assert len(set(rows)) == len(rows)
        assert set(rows) <= set(range(size))
        if epoch < places[-1].epoch:
            assert len(rows) == size
            if whole_steps is not None:
                assert sum(step[0].epoch == epoch for step in steps) == whole_steps


@drawn
@given(mix=mixes(), batch_size=st.integers(1, 12), seed=seeds)
def test_a_step_of_all_sets_takes_each_example_from_any_and_each_set_has_its_own_epochs(
    mix: tuple[list[int], list[float]], batch_size: int, seed: int
) -> None:
    sizes, shares = mix
    order = make_order(sizes, batch_size, seed, shares=shares, one_set=False)
    taken: list[list[Place]] = [[] for _ in sizes]
    for epoch in range(4):
        steps = steps_of(order, epoch)
        lengths = [len(step) for step in steps]
        assert sum(lengths) == sum(sizes)
        assert 1 <= min(lengths) <= max(lengths) <= min(batch_size, min(lengths) + 1)
        for step in steps:
            for place in step:
                taken[place.set].append(place)
    for index, places in enumerate(taken):
        _assert_epochs([places], sizes[index], index)


@drawn
@given(mix=mixes(most=3), batch_size=st.integers(1, 12), seed=seeds, one_set=st.booleans())
def test_each_epoch_of_a_mix_gives_each_set_its_share_to_within_two_turns(
    mix: tuple[list[int], list[float]], batch_size: int, seed: int, one_set: bool
) -> None:
    """Of two or three sets; of more, one that has most of the turns may be further from its share."""
    sizes, shares = mix
    order = make_order(sizes, batch_size, seed, shares=shares, one_set=one_set)
    for epoch in range(5):
        steps = steps_of(order, epoch)
        turns = [places[0].set for places in steps] if one_set else [place.set for step in steps for place in step]
        for index, count in ((index, turns.count(index)) for index in range(len(sizes))):
            assert abs(count - len(turns) * shares[index] / sum(shares)) <= 2 + 1e-9


@pytest.mark.parametrize("one_set", [True, False])
@pytest.mark.parametrize("light", [3, 4, 9])
def test_sets_of_little_weight_are_spread_over_the_epochs_of_a_mix(light: int, one_set: bool) -> None:
    shares = [100.0] + [1.0] * light
    order = make_order([10] * (light + 1), 10, 1, shares=shares, one_set=one_set)
    for epoch in range(40):
        steps = steps_of(order, epoch)
        turns = [places[0].set for places in steps] if one_set else [place.set for step in steps for place in step]
        for index, share in enumerate(shares):
            assert abs(turns.count(index) - len(turns) * share / sum(shares)) <= 2


@drawn
@given(
    shares=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=8),
    total=st.integers(0, 400),
)
def test_turns_up_to_a_number_sum_to_it_near_the_shares_and_none_is_taken_back(shares: list[float], total: int) -> None:
    before, after = (_turns_until(count, tuple(shares)) for count in (total, total + 1))
    assert before.sum() == total
    assert (after - before).min() >= 0
    weights = np.array(shares) / sum(shares)
    # At a moment each has its share of it to within a turn, and the phases leave all of them half a turn a set off.
    assert (abs(before - total * weights) <= 1 + weights * len(weights) / 2 + 1e-6).all()


def test_turns_of_many_steps_are_found_as_fast_as_of_few() -> None:
    counts = _turns_until(10**12, (1.0, 2.0, 5.0))
    assert counts.sum() == 10**12
    assert counts.tolist() == pytest.approx([10**12 / 8, 10**12 / 4, 5 * 10**12 / 8], abs=1)


def test_a_mix_is_drawn_at_random_and_not_in_turns() -> None:
    order = make_order([40, 40], 4, 3)
    sets = [places[0].set for places in steps_of(order, 0)]
    # Of twenty steps, which would change sets nineteen times if the sets took turns, and once if they followed.
    changes = sum(first != second for first, second in pairwise(sets))
    assert 4 <= changes <= 15
    assert sets != [places[0].set for places in steps_of(order, 1)]


def test_shares_of_a_mix_are_those_of_its_turns() -> None:
    order = make_order([30, 10], 4, 1, shares=[1.0, 3.0])
    assert Counter(places[0].set for epoch in range(4) for places in steps_of(order, epoch)) == {0: 10, 1: 30}
    by_example = make_order([30, 10], 4, 1, shares=[1.0, 3.0], one_set=False)
    taken = Counter(place.set for epoch in range(4) for places in steps_of(by_example, epoch) for place in places)
    assert taken == {0: 40, 1: 120}


# Windows


@drawn
@given(size=st.integers(1, 200), batch_size=st.integers(1, 20), window=st.integers(1, 9), seed=seeds)
def test_each_window_has_the_examples_of_the_window_without_sorting(
    size: int, batch_size: int, window: int, seed: int
) -> None:
    plain, by_length = (make_order([size], batch_size, seed, given) for given in (None, window))
    steps = plain.steps_per_epoch
    count = math.ceil(steps / window)
    unsorted = steps_of(plain, 1)
    sets = [set(rows_of(unsorted[slice(*bounds(steps, number, count))])) for number in range(count)]
    found: list[list[list[int]]] = [[] for _ in sets]
    for places in steps_of(by_length, 1):
        rows = rows_of([places])
        [number] = [number for number, own in enumerate(sets) if own & set(rows)]
        found[number].append(rows)
    lengths = by_length.lengths[0]
    for own, taken in zip(sets, found, strict=True):
        assert len(taken) <= window
        assert {row for rows in taken for row in rows} == own
        # Batches of one window lie beside each other by length.
        ranges = sorted((lengths[rows].min(), lengths[rows].max()) for rows in taken)
        assert all(first[1] <= second[0] for first, second in pairwise(ranges))


def test_the_padding_of_batches_falls_as_the_window_grows() -> None:
    lengths = np.random.default_rng(1).geometric(0.02, 2000)

    def padding(window: int | None) -> int:
        order = Order(sizes=[2000], shares=[1], batch_size=16, seed=5, window=window, lengths=[lengths])
        batches = [lengths[rows_of([step])] for step in steps_of(order, 0)]
        return sum(int(len(own) * own.max() - own.sum()) for own in batches)

    paddings = [padding(window) for window in (None, 1, 4, 16, 125)]
    assert paddings[1] == paddings[0]  # a batch alone is sorted inside, and is the same batch
    assert paddings[0] > 2 * paddings[2] > 4 * paddings[3] > 4 * paddings[4]


@drawn
@given(
    steps=st.integers(1, 40),
    batch_size=st.integers(1, 9),
    window=st.integers(1, 9),
    seed=seeds,
    epoch=st.integers(0, 3),
)
def test_a_window_computes_no_more_tokens_than_none_where_batches_are_equal(
    steps: int, batch_size: int, window: int, seed: int, epoch: int
) -> None:
    plain, by_length = (make_order([steps * batch_size], batch_size, seed, given) for given in (None, window))
    [lengths] = by_length.lengths
    plain_tokens, tokens = (
        sum(int(lengths[rows_of([step])].max()) * len(step) for step in steps_of(order, epoch))
        for order in (plain, by_length)
    )
    assert tokens <= plain_tokens
    if window == 1:
        assert tokens == plain_tokens


def test_no_step_is_known_by_its_place_to_be_short_or_long() -> None:
    lengths = np.arange(640)
    order = Order(sizes=[640], shares=[1], batch_size=16, seed=5, window=8, lengths=[lengths])
    means = np.array([lengths[rows_of([step])].mean() for step in steps_of(order, 0)])
    # Ranks of the steps against their places: sorted they would give 1 or -1, at random 0 +- 0.16.
    assert abs(np.corrcoef(means.argsort().argsort(), np.arange(len(means)))[0, 1]) < 0.5


# Memory


def test_the_order_holds_one_epoch_of_each_set() -> None:
    order = make_order([30, 20], 4, 1)
    sizes = set()
    for step in range(80):
        order.step(step)
        sizes.add(sum(len(rows) for _, rows, _ in order._kept.values()))
    assert max(sizes) == 50
