"""Retrieval metrics from trec_eval's own code, by way of pytrec_eval, and the file that keeps them by query."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean

import pytrec_eval

from configs.schema import ConfigError, Metric

# Documents ranked for each query, as trec_eval's runs usually are: MAP reads them all.
DEPTH = 1000

QueryScores = dict[str, dict[str, float]]
"""The value of each judged query, by query id, by the metric's name."""


def score_rankings(judgements: dict[str, dict[str, int]], rankings: Mapping[str, dict[str, float]]) -> QueryScores:
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


def join_sets(scores: Mapping[str, QueryScores]) -> QueryScores:
    """Return the scores of all sets, by set, as those of one; of several, a set's name and / go before its ids."""
    joined: QueryScores = {}
    for name, own in scores.items():
        for metric, values in own.items():
            named = values if len(scores) == 1 else {f"{name}/{query}": value for query, value in values.items()}
            joined.setdefault(metric, {}).update(named)
    return joined


def means(values: QueryScores) -> dict[str, float]:
    """Return the mean over the queries of every metric, by its name."""
    return {name: fmean(by_query.values()) for name, by_query in values.items()}


def write_scores(path: Path, values: QueryScores) -> None:
    """Write scores as JSON lines, one a judged query."""
    queries = next(iter(values.values()))
    lines = ({"query": query, **{name: own[query] for name, own in values.items()}} for query in queries)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def read_scores(path: Path) -> QueryScores:
    """Return what `write_scores` wrote.

    Raises ConfigError that names the line of what no such file holds.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read ({error}): give a file of scores") from error
    values: QueryScores = {}
    for number, line in enumerate(lines, start=1):
        query, own = _scores_of(line, f"{path}:{number}")
        if number == 1:
            values = {name: {} for name in own}
        if own.keys() != values.keys():
            raise ConfigError(f"{path}:{number} has {', '.join(own)}, and the first line {', '.join(values)}: mend it")
        for name, value in own.items():
            if query in values[name]:
                raise ConfigError(f"{path}:{number}: query={query} stands here for the second time: remove one")
            values[name][query] = value
    if not values:
        raise ConfigError(f"{path} holds no score: give a file with a line a query")
    return values


def _scores_of(line: str, place: str) -> tuple[str, dict[str, float]]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{place} is no JSON ({error}): mend or remove the line") from error
    if not isinstance(row, dict) or not isinstance(row.get("query"), str) or len(row) < 2:
        raise ConfigError(f"{place} must be an object of query, a text, and its metrics, numbers by name")
    query = row.pop("query")
    for name, value in row.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ConfigError(f"{place}: query={query} has {name}={value}, which must be a finite number")
    return query, row
