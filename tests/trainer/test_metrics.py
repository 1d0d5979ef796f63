"""Metrics against values computed by hand and trec_eval on the same run file; what is written is read again."""

import json
import random
from math import log2
from pathlib import Path

import pytest
import pytrec_eval

from configs.schema import ConfigError
from trainer.data.trec import write_run
from trainer.metrics import join_sets, means, read_scores, score_rankings, write_scores


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


def test_the_scores_of_several_sets_are_joined_under_their_names() -> None:
    one, two = {"map": {"q0": 1.0, "q1": 0.5}}, {"map": {"q0": 0.0}}
    assert join_sets({"one": one}) == one
    assert join_sets({"one": one, "two": two}) == {"map": {"one/q0": 1.0, "one/q1": 0.5, "two/q0": 0.0}}
    assert join_sets({}) == {}


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


# The file


def test_scores_are_read_as_they_were_written(tmp_path: Path) -> None:
    values = {"ndcg@10": {"q2": 1 / 3, "q 1": 0.0}, "ndcg@10/64": {"q2": 2 / 7, "q 1": 1.0}}
    write_scores(tmp_path / "scores.jsonl", values)
    read = read_scores(tmp_path / "scores.jsonl")
    assert read == values
    assert [list(by_query) for by_query in read.values()] == [["q2", "q 1"]] * 2
    lines = (tmp_path / "scores.jsonl").read_text().splitlines()
    assert json.loads(lines[0]) == {"query": "q2", "ndcg@10": 1 / 3, "ndcg@10/64": 2 / 7}
    assert len(lines) == 2


FIRST = '{"query": "q1", "map": 0.5}'


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], " holds no score: give a file with a line a query"),
        ([FIRST, '{"query": '], ":2 is no JSON (Expecting value: line 1 column 11 (char 10)): mend or remove the line"),
        ([FIRST, "[1]"], ":2 must be an object of query, a text, and its metrics, numbers by name"),
        (['{"map": 0.5}'], ":1 must be an object of query, a text, and its metrics, numbers by name"),
        ([FIRST, '{"query": "q2", "map": NaN}'], ":2: query=q2 has map=nan, which must be a finite number"),
        ([FIRST, '{"query": "q2", "map": "0.5"}'], ":2: query=q2 has map=0.5, which must be a finite number"),
        ([FIRST, '{"query": "q2", "mrr@10": 1}'], ":2 has mrr@10, and the first line map: mend it"),
        ([FIRST, FIRST], ":2: query=q1 stands here for the second time: remove one"),
    ],
)
def test_what_is_no_file_of_scores_is_named_by_its_line(lines: list[str], message: str, tmp_path: Path) -> None:
    path = tmp_path / "scores.jsonl"
    path.write_text("".join(f"{line}\n" for line in lines))
    with pytest.raises(ConfigError) as caught:
        read_scores(path)
    assert str(caught.value) == f"{path}{message}"


def test_scores_that_are_not_there_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.jsonl cannot be read \(.*No such file.*\): give a file of scores"):
        read_scores(tmp_path / "none.jsonl")
