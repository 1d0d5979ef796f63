"""How sure a difference between two models is, from a metric's values for the same queries."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import bootstrap

# Of signs, as in Smucker et al.
RESAMPLES = 99_999
# Signs that are held at once.
BLOCK = 1_000_000


@dataclass(frozen=True)
class Difference:
    """Of two models, one in the place of the other, over the queries."""

    mean: float
    low: float
    """Of its 95 % interval."""
    high: float
    p: float
    """Two-sided."""


def compare_paired(before: Sequence[float], after: Sequence[float]) -> Difference:
    """Return the mean of after - before, a metric's value for each query, the same queries in the same order, with its
    bootstrap interval and the p of a randomisation test."""
    low, high = change_interval(before, after)
    return Difference(float(_differences(before, after).mean()), low, high, randomisation_p(before, after))


def randomisation_p(before: Sequence[float], after: Sequence[float], *, resamples: int = RESAMPLES) -> float:
    """Return the two-sided p of a paired randomisation test (Smucker, Allan and Carterette 2007, CIKM, section 4.1).

    Where two models do not differ, either could have given either value of a query, so each difference could as well
    have the other sign. p is the share of drawings of all signs whose mean is as far from 0 as the one that was seen,
    which counts as a drawing itself: p is never below 1 / (resamples + 1), and 1 where no query differs. The same
    values give the same p.
    """
    differences = _differences(before, after)
    total, rounding = differences.sum(), 1e-12 * np.abs(differences).sum()
    generator, extreme = np.random.default_rng(0), 0
    rows = max(1, BLOCK // len(differences))
    for start in range(0, resamples, rows):
        # A bit a sign: scipy's permutation_test, to which the tests hold this, takes 60 times as long.
        shape = min(rows, resamples - start), -(-len(differences) // 8)
        bits = generator.integers(256, size=shape, dtype=np.uint8)
        flipped = np.unpackbits(bits, axis=1, count=len(differences))
        # Equal sums may differ in their last bits, as numbers are added in another order.
        extreme += int((np.abs(total - 2 * (flipped @ differences)) >= abs(total) - rounding).sum())
    return (extreme + 1) / (resamples + 1)


def change_interval(before: Sequence[float], after: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % percentile bootstrap interval of the mean of after - before (Efron and Tibshirani 1993, ch. 13).

    before, after: a metric's value for each query, the same queries in the same order. What is drawn anew, 9,999 times,
    is the set of queries, so the interval says nothing of other seeds. A single query has an interval without width.
    """
    differences = _differences(before, after)
    if len(differences) == 1:
        return float(differences[0]), float(differences[0])
    # In batches, which change no number: at once, 10,000 queries would be copied 9,999 times, to 800 MB.
    drawn = bootstrap((differences,), np.mean, n_resamples=9999, method="percentile", rng=0, batch=100)
    return float(drawn.confidence_interval.low), float(drawn.confidence_interval.high)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return what the p of several tests become where it counts against all that any of them errs (Holm 1979).

    The smallest is multiplied by their number, the next by one less, and so on; none comes before a smaller one, and
    none is above 1.
    """
    corrected, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = highest
    return corrected


def _differences(before: Sequence[float], after: Sequence[float]) -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
    return np.array([new - old for old, new in zip(before, after, strict=True)])
