"""Retrieval metrics from trec_eval's own code, by way of pytrec_eval, and how sure a change of one is."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

import numpy as np
import pytrec_eval
from scipy.stats import bootstrap

from configs.schema import Metric

# Documents ranked for each query, as trec_eval's runs usually are: MAP reads them all.
DEPTH = 1000


def score_rankings(
    judgements: dict[str, dict[str, int]], rankings: Mapping[str, dict[str, float]]
) -> dict[str, dict[str, float]]:
    """Return the value of every metric for every judged query, by query id, by the metric's name; all in [0, 1].

    judgements: grade by document id, by query id; rankings: score by document id, by query id; of documents that tie,
    the higher id, letter by letter, ranks first. A judged query that ranks nothing has 0, and one that is not judged no
    value; queries come in the order of the judgements.
    """
    evaluator = pytrec_eval.RelevanceEvaluator(judgements, {metric.value for metric in Metric})
    values = {metric.name: dict.fromkeys(judgements, 0.0) for metric in Metric}
    for query in judgements:
        # One at a time: a ranking of 1,000 documents is 100 kB as a dictionary.
        if ranking := rankings.get(query):
            for measure, value in evaluator.evaluate({query: ranking}).get(query, {}).items():
                # trec_eval has no cut of its reciprocal rank, which at rank 10 is 0.1.
                cut = measure == Metric["mrr@10"].value and value < 0.1
                values[Metric(measure).name][query] = 0.0 if cut else value
    return values


def write_scores(path: Path, values: dict[str, dict[str, float]]) -> None:
    """Write what `score_rankings` returns as JSON lines, one a judged query."""
    queries = next(iter(values.values()))
    lines = ({"query": query, **{name: own[query] for name, own in values.items()}} for query in queries)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def read_scores(path: Path) -> dict[str, dict[str, float]]:
    """Return what `write_scores` wrote: the value of each judged query, by query id, by the metric's name."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {name: {line["query"]: line[name] for line in lines} for name in lines[0] if name != "query"}


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
