"""Metrics against values computed by hand and trec_eval on the same run file; the interval against a bootstrap in plain
Python."""

import json
import random
import warnings
from math import log2, sqrt
from pathlib import Path
from statistics import NormalDist, fmean, stdev

import pytest
import pytrec_eval

from trainer.data.trec import write_run
from trainer.metrics import change_interval, means, read_scores, score_rankings, write_scores


def test_graded_judgements_give_the_metrics_computed_by_hand() -> None:
    judgements = {"q": {"best": 3, "good": 1, "bad": 0, "unseen": 2}}
    rankings = {"q": {"other": 0.9, "good": 0.8, "bad": 0.7, "best": 0.6}}
    # Gain is the grade, its discount the logarithm of the rank + 1; a grade of 1 or more counts as relevant.
    found, ideal = 1 / log2(3) + 3 / log2(5), 3 / log2(2) + 2 / log2(3) + 1 / log2(4)
    assert means(score_rankings(judgements, rankings)) == pytest.approx(
        {"ndcg@10": found / ideal, "mrr@10": 1 / 2, "map": (1 / 2 + 2 / 4) / 3, "recall@100": 2 / 3}, rel=1e-6
    )


def test_ndcg_and_mrr_end_at_rank_10_and_recall_at_rank_100() -> None:
    def values(relevant_rank: int) -> dict[str, float]:
        names = ["relevant" if place == relevant_rank else f"d{place}" for place in range(1, 121)]
        ranking = {name: 1.0 - place / 1000 for place, name in enumerate(names)}
        return means(score_rankings({"q": {"relevant": 1}}, {"q": ranking}))

    assert values(10) == pytest.approx(
        {"ndcg@10": 1 / log2(11), "mrr@10": 0.1, "map": 0.1, "recall@100": 1.0}, rel=1e-6
    )
    assert values(11) == pytest.approx({"ndcg@10": 0.0, "mrr@10": 0.0, "map": 1 / 11, "recall@100": 1.0}, rel=1e-6)
    assert values(101)["recall@100"] == 0.0


def test_each_query_has_its_own_value_in_the_order_of_the_judgements() -> None:
    judgements = {"q2": {"d0": 1}, "q0": {"d0": 1}, "q1": {"d1": 1, "d2": 1}}
    ranking = {"d0": 3.0, "d1": 2.0, "d2": 1.0}
    values = score_rankings(judgements, {"q0": ranking, "q1": ranking, "q2": {"d1": 1.0, "d0": 0.5}})
    assert list(values) == ["ndcg@10", "mrr@10", "map", "recall@100"]
    assert all(list(by_query) == ["q2", "q0", "q1"] for by_query in values.values())
    assert values["mrr@10"] == {"q2": 1 / 2, "q0": 1.0, "q1": 1 / 2}
    assert values["map"] == pytest.approx({"q2": 1 / 2, "q0": 1.0, "q1": (1 / 2 + 2 / 3) / 2}, rel=1e-6)


@pytest.mark.parametrize("ranked", [{}, {"q1": {}}], ids=["no ranking", "an empty one"])
def test_a_judged_query_that_ranks_nothing_counts_as_zero(ranked: dict[str, dict[str, float]]) -> None:
    judgements = {"q1": {"d0": 1}, "q0": {"d0": 1}}
    values = score_rankings(judgements, {"q0": {"d0": 1.0}} | ranked)
    assert values == {metric: {"q1": 0.0, "q0": 1.0} for metric in ("ndcg@10", "mrr@10", "map", "recall@100")}
    assert means(values) == dict.fromkeys(values, 0.5)


def test_a_query_that_is_not_judged_has_no_value() -> None:
    values = score_rankings({"q0": {"d0": 1}}, {"q0": {"d0": 1.0}, "q1": {"d0": 1.0}})
    assert list(values.values()) == [{"q0": 1.0}] * 4


def test_documents_that_tie_rank_as_trec_eval_has_them_in_every_metric() -> None:
    ranking = {f"d{number}": 1.0 for number in range(10)} | {"a": 2.0}
    values = score_rankings({"q": {"d8": 1}}, {"q": ranking})
    # Behind a and d9: the higher id first.
    assert means(values) == pytest.approx(
        {"ndcg@10": 1 / log2(4), "mrr@10": 1 / 3, "map": 1 / 3, "recall@100": 1.0}, rel=1e-12
    )


def test_the_means_are_those_of_a_loop_over_the_ranks() -> None:
    generator = random.Random(2)
    documents = [f"d{number}" for number in range(150)]
    judgements = {
        f"q{number}": {name: generator.randint(0, 3) for name in generator.sample(documents, 20)}
        for number in range(40)
    }
    # Of the last ten no ranking, and one of a query that is not judged.
    rankings = {
        f"q{number}": {name: generator.random() for name in generator.sample(documents, 120)}
        for number in [*range(30), 99]
    }
    expected = dict.fromkeys(("ndcg@10", "mrr@10", "map", "recall@100"), 0.0)
    for query, grades in judgements.items():
        ranking = rankings.get(query, {})
        gains = [grades.get(name, 0) for name in sorted(ranking, key=ranking.__getitem__, reverse=True)]
        ideal = sorted(grades.values(), reverse=True)
        relevant = sum(grade > 0 for grade in ideal)
        hits = [rank for rank, gain in enumerate(gains, start=1) if gain > 0]
        of_query = {
            "ndcg@10": _gain(gains[:10]) / _gain(ideal[:10]),
            "mrr@10": 1 / hits[0] if hits and hits[0] <= 10 else 0.0,
            "map": sum(number / rank for number, rank in enumerate(hits, start=1)) / relevant,
            "recall@100": sum(rank <= 100 for rank in hits) / relevant,
        }
        expected = {name: expected[name] + value / len(judgements) for name, value in of_query.items()}
    assert means(score_rankings(judgements, rankings)) == pytest.approx(expected, rel=1e-9)
    assert all(0 < value < 1 for value in expected.values())


def _gain(gains: list[int]) -> float:
    return sum(gain / log2(rank + 1) for rank, gain in enumerate(gains, start=1))


def test_the_values_are_those_of_trec_eval_on_the_run_file(tmp_path: Path) -> None:
    generator = random.Random(3)
    documents = [f"d{number}" for number in range(300)]
    judgements = {f"q{number}": dict.fromkeys(generator.sample(documents, 5), 1) for number in range(20)}
    # float32, of which many are the same.
    rankings = {query: {name: generator.randint(0, 99) / 4 - 9 for name in documents} for query in judgements}
    values = score_rankings(judgements, rankings)
    write_run(tmp_path / "run.trec", rankings, name="made")
    with (tmp_path / "run.trec").open() as file:
        run = pytrec_eval.parse_run(file)
    names = {"ndcg@10": "ndcg_cut_10", "map": "map", "recall@100": "recall_100"}
    expected = pytrec_eval.RelevanceEvaluator(judgements, set(names.values())).evaluate(run)
    for name, measure in names.items():
        assert values[name] == pytest.approx({query: own[measure] for query, own in expected.items()}, abs=1e-9)
    # The reciprocal rank of a run that is cut at 10, as trec_eval -M 10 does.
    cut = {
        query: {name: own[name] for name in sorted(own, key=lambda name: (own[name], name), reverse=True)[:10]}
        for query, own in run.items()
    }
    expected = pytrec_eval.RelevanceEvaluator(judgements, {"recip_rank"}).evaluate(cut)
    assert values["mrr@10"] == pytest.approx({query: own["recip_rank"] for query, own in expected.items()}, abs=1e-9)
    assert 0.0 in values["mrr@10"].values()


def test_scores_are_read_as_they_were_written(tmp_path: Path) -> None:
    values = {"ndcg@10": {"q\u20281": 1 / 3, "7": 0.0}, "ndcg@10/64": {"q\u20281": 0.1, "7": 1.0}}
    write_scores(tmp_path / "scores.jsonl", values)
    assert read_scores(tmp_path / "scores.jsonl") == values
    first, _ = (tmp_path / "scores.jsonl").read_text().splitlines()
    assert json.loads(first) == {"query": "q\u20281", "ndcg@10": 1 / 3, "ndcg@10/64": 0.1}


# The interval


def draw_values(queries: int) -> tuple[list[float], list[float]]:
    """Values of a metric before and after, by query; the change is skewed."""
    generator = random.Random(3)
    before = [generator.random() for _ in range(queries)]
    return before, [value + generator.expovariate(10) - 0.05 for value in before]


def test_the_interval_is_that_of_a_bootstrap_in_plain_python() -> None:
    before, after = draw_values(30)
    changes = [new - old for old, new in zip(before, after, strict=True)]
    generator = random.Random(4)
    drawn = sorted(fmean(generator.choices(changes, k=30)) for _ in range(9999))
    # Of 9,999 draws a 2.5 % percentile has a standard error of sqrt(0.025 * 0.975 / 9999) / 0.058, the normal density
    # there: 0.027 spreads of the drawn means; of two such runs' difference 0.038.
    tolerance = 0.1 * stdev(drawn)
    assert change_interval(before, after) == pytest.approx((drawn[249], drawn[9749]), abs=tolerance)


def test_the_interval_of_many_queries_is_the_normal_one_of_the_paired_change() -> None:
    before, after = draw_values(2000)
    changes = [new - old for old, new in zip(before, after, strict=True)]
    half = NormalDist().inv_cdf(0.975) * stdev(changes) / sqrt(len(changes))
    low, high = change_interval(before, after)
    assert (low, high) == pytest.approx((fmean(changes) - half, fmean(changes) + half), abs=0.1 * half)
    # Before and after swapped, the change is the opposite one.
    assert change_interval(after, before) == pytest.approx((-high, -low), abs=0.1 * half)


def test_the_interval_is_the_same_each_time() -> None:
    assert change_interval(*draw_values(20)) == change_interval(*draw_values(20))


@pytest.mark.parametrize("queries", [1, 2, 40])
@pytest.mark.parametrize("change", [0.0, 0.25])
def test_equal_changes_have_an_interval_without_width(queries: int, change: float) -> None:
    before = [number / 64 for number in range(queries)]  # exact in binary, so that all differences are the same
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert change_interval(before, [value + change for value in before]) == (change, change)


def test_queries_before_and_after_must_be_the_same() -> None:
    with pytest.raises(ValueError, match="shorter"):
        change_interval([0.5, 0.6], [0.7])
