"""Retrieval metrics from trec_eval's own code, by way of ir-measures."""

import ir_measures

from configs.schema import Metric

# Documents ranked for each query, as trec_eval's runs usually are: MAP reads them all.
DEPTH = 1000


def score_rankings(judgements: dict[str, dict[str, int]], rankings: dict[str, dict[str, float]]) -> dict[str, float]:
    """Return the mean of every metric over the judged queries.

    judgements: grade by document id, by query id; rankings: score by document id, by query id.
    """
    measures = {metric.name: ir_measures.parse_measure(metric.value) for metric in Metric}
    results = ir_measures.calc_aggregate(list(measures.values()), judgements, rankings)
    return {name: float(results[measure]) for name, measure in measures.items()}
