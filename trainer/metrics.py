"""Retrieval metrics from trec_eval's own code, by way of ir-measures, and how sure a change of one is."""

from collections.abc import Sequence
from statistics import fmean

import ir_measures
import numpy as np
from scipy.stats import bootstrap

from configs.schema import Metric

# Documents ranked for each query, as trec_eval's runs usually are: MAP reads them all.
DEPTH = 1000


def score_rankings(
    judgements: dict[str, dict[str, int]], rankings: dict[str, dict[str, float]]
) -> dict[str, dict[str, float]]:
    """Return the value of every metric for every judged query, by query id, by the metric's name; all in [0, 1].

    judgements: grade by document id, by query id; rankings: score by document id, by query id. A judged query that
    ranks nothing has 0, and one that is not judged no value; queries come in the order of the judgements.
    """
    names = {ir_measures.parse_measure(metric.value): metric.name for metric in Metric}
    values = {name: dict.fromkeys(judgements, 0.0) for name in names.values()}
    for found in ir_measures.iter_calc(list(names), judgements, rankings):
        values[names[found.measure]][found.query_id] = found.value
    return values


def means(values: dict[str, dict[str, float]]) -> dict[str, float]:
    """Return the mean over the queries of every metric, by its name, from what `score_rankings` returns."""
    return {name: fmean(by_query.values()) for name, by_query in values.items()}


def change_interval(before: Sequence[float], after: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % percentile bootstrap interval of the mean of after - before (Efron and Tibshirani 1993, ch. 13).

    before, after: a metric's value for each query, the same queries in the same order. What is drawn anew, 9,999 times,
    is the set of queries, so the interval says nothing of other seeds. A single query has an interval without width.
    """
    differences = np.array([new - old for old, new in zip(before, after, strict=True)])
    if len(differences) == 1:
        return float(differences[0]), float(differences[0])
    # In batches, which change no number: at once, 10,000 queries would be copied 9,999 times, to 800 MB.
    drawn = bootstrap((differences,), np.mean, n_resamples=9999, method="percentile", rng=0, batch=100)
    return float(drawn.confidence_interval.low), float(drawn.confidence_interval.high)
