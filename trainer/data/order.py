"""Which examples each step takes: a pure function of the seed and the step, for one set and for a mix of several."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch

from trainer.data.tables import IntArray


@dataclass(frozen=True)
class Place:
    """An example as a step takes it."""

    set: int
    epoch: int
    """How often the set has been gone through before."""
    row: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Order:
    """The order of the examples. An epoch of a set is a permutation of its examples, cut into steps of sizes that
    differ by one at most: none is lost or repeated, and no last step is left with a query and nothing to tell its
    document from.

    In a mix each set goes through its own epochs at its share of the turns, in a random order: of each epoch of the
    mix, which has as many examples as its sets, a set has its share to within two turns.
    """

    sizes: Sequence[int]
    """Examples of each set."""
    shares: Sequence[float]
    """Weight of each set among the turns."""
    batch_size: int
    seed: int
    one_set: bool = True
    """A turn is a step, whose examples come from one set; else it is an example."""
    window: int | None = None
    """Batches whose examples are sorted by length among themselves; None leaves the order random."""
    lengths: Sequence[IntArray] = field(default=(), repr=False)
    """Of the examples of each set, where there is a window."""
    _kept: dict[int, tuple[int, IntArray, IntArray | None]] = field(default_factory=dict, init=False, repr=False)
    """The epoch that each set is in, with its examples."""

    @property
    def steps_per_epoch(self) -> int:
        return count_steps_per_epoch(sum(self.sizes), self.batch_size)

    def step(self, step: int) -> list[Place]:
        """The examples of a step."""
        epoch, turn = divmod(step, self.steps_per_epoch)
        if len(self.sizes) > 1 and not self.one_set:
            turns = self._turns(epoch, sum(self.sizes))
            start, stop = bounds(sum(self.sizes), turn, self.steps_per_epoch)
            return [self._example(index, number) for index, number in turns[start:stop].tolist()]
        index, number = (0, step) if len(self.sizes) == 1 else self._turns(epoch, self.steps_per_epoch)[turn].tolist()
        size = self.sizes[index]
        steps = count_steps_per_epoch(size, self.batch_size)
        epoch, number = divmod(number, steps)
        rows, order = self._epoch(index, epoch)
        start, stop = bounds(size, number if order is None else int(order[number]), steps)
        return [Place(index, epoch, row) for row in rows[start:stop].tolist()]

    def _example(self, index: int, number: int) -> Place:
        epoch, place = divmod(number, self.sizes[index])
        return Place(index, epoch, int(self._epoch(index, epoch)[0][place]))

    def _turns(self, epoch: int, turns: int) -> "np.ndarray[tuple[int, int], np.dtype[np.int64]]":
        """(turns, 2): the set of each turn of an epoch of the mix, and which of the set's own turns that is."""
        return _turns(self.seed, epoch, turns, tuple(self.shares))

    def _epoch(self, index: int, epoch: int) -> tuple[IntArray, IntArray | None]:
        """The examples of an epoch of a set, and in which order its steps take parts of them; None is one by one."""
        kept = self._kept.get(index)
        if kept is None or kept[0] != epoch:
            rows = _permutation(self.seed, index, epoch, self.sizes[index])
            order = None
            if self.window is not None:
                rows, order = self._sorted(rows, index, epoch)
            self._kept[index] = kept = epoch, rows, order
        return kept[1:]

    def _sorted(self, rows: IntArray, index: int, epoch: int) -> tuple[IntArray, IntArray]:
        """The rows, by length within each window, and an order of the steps in which none is known by its place to be
        short or long."""
        assert self.window is not None
        steps = count_steps_per_epoch(len(rows), self.batch_size)
        windows, rows = math.ceil(steps / self.window), rows.copy()
        for window in range(windows):  # as even as the steps
            first, last = bounds(steps, window, windows)
            start, stop = bounds(len(rows), first, steps)[0], bounds(len(rows), last - 1, steps)[1]
            own = rows[start:stop]
            rows[start:stop] = own[np.argsort(self.lengths[index][own], kind="stable")]
        return rows, np.random.default_rng((self.seed, epoch, index)).permutation(steps)


def _permutation(seed: int, index: int, epoch: int, size: int) -> IntArray:
    # One generator an epoch; the odd factors keep (seed, epoch) and (seed + 1, epoch - 1) apart, and the sets.
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch + index * 7_368_787_001) % 2**63)
    rows: IntArray = torch.randperm(size, generator=generator).numpy()
    return rows


@lru_cache(maxsize=2)
def _turns(
    seed: int, epoch: int, turns: int, shares: tuple[float, ...]
) -> "np.ndarray[tuple[int, int], np.dtype[np.int64]]":
    before, after = (_turns_until(count * turns, shares) for count in (epoch, epoch + 1))
    sets = np.repeat(np.arange(len(shares)), after - before)
    sets = np.random.default_rng((seed, epoch)).permutation(sets)
    numbers = np.empty_like(sets)
    for index, first in enumerate(before.tolist()):
        own = np.flatnonzero(sets == index)
        numbers[own] = first + np.arange(len(own))
    return np.stack([sets, numbers], axis=1)


def _turns_until(total: int, shares: tuple[float, ...]) -> IntArray:
    """How many of the first `total` turns each set has, and never fewer of more turns: the n-th of a set stands at
    (n - phase) / share, with another phase for each set, or those of equal share would all come at once."""
    weights = np.array(shares) / sum(shares)
    phases = (np.argsort(np.argsort(-weights, kind="stable")) + 0.5) / len(weights)
    counts = np.floor(np.maximum((total - len(weights)) * weights - 1, 0)).astype(np.int64)
    while counts.sum() < total:
        counts[np.argmin((counts + phases) / weights)] += 1
    return counts


def count_steps_per_epoch(examples: int, batch_size: int) -> int:
    """Optimiser steps that take every example once, none with more than batch_size."""
    return math.ceil(examples / batch_size)


def bounds(items: int, part: int, parts: int) -> tuple[int, int]:
    """Where one part begins and ends when items are cut evenly: sizes differ by one at most."""
    return items * part // parts, items * (part + 1) // parts
