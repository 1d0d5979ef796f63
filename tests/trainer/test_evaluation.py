"""Rankings against brute force over the library's own calls; metrics against hand-computed values."""

import json
import os
import random
from dataclasses import replace
from math import log2
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate import PartialState
from datasets import Dataset
from sentence_transformers import MultiVectorEncoder
from torch.multiprocessing.spawn import spawn

from losses.maxsim import maxsim
from tests.conftest import WORDS
from trainer import evaluation
from trainer.data.retrieval import RetrievalSet
from trainer.evaluation import evaluate, rank
from trainer.metrics import DEPTH, score_rankings

# Of a score of at most 8, the sum of 8 products in float32.
SCORE = 1e-5


def make_retrieval(documents: int) -> RetrievalSet:
    """Different random texts of 1 to 20 words, some of them longer than the encoder reads."""
    generator = random.Random(1)
    texts: dict[str, None] = {}
    while len(texts) < documents:
        texts[" ".join(generator.choices(WORDS, k=generator.randint(1, 20)))] = None
    return RetrievalSet(
        queries={"q0": "what animal meows", "q1": "which fish", "q2": "a dog that barks, is it?"},
        corpus={f"d{number}": text for number, text in enumerate(texts)},
        judgements={"q0": {"d0": 1}, "q1": {"d1": 1, "d2": 1}, "q2": {"d3": 1}},
    )


def brute_force(encoder: MultiVectorEncoder, retrieval: RetrievalSet) -> dict[str, dict[str, float]]:
    """The score of every document for every query, one text at a time."""
    queries = {name: encoder.encode_query([text]) for name, text in retrieval.queries.items()}
    documents = {name: encoder.encode_document([text]) for name, text in retrieval.corpus.items()}
    return {
        query: {name: float(encoder.similarity(vectors, others)) for name, others in documents.items()}
        for query, vectors in queries.items()
    }


@pytest.mark.parametrize("block_documents", [2048, 7, 1])
@pytest.mark.parametrize("documents", [5, 130])
def test_the_ranking_equals_brute_force_over_the_whole_corpus(
    documents: int, block_documents: int, encoder: MultiVectorEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "BLOCK_DOCUMENTS", block_documents)
    retrieval = make_retrieval(documents)
    expected = brute_force(encoder, retrieval)
    rankings = rank(encoder, retrieval, batch_size=4)
    assert list(rankings) == ["q0", "q1", "q2"]
    for query, ranking in rankings.items():
        assert list(ranking.values()) == sorted(ranking.values(), reverse=True)
        assert ranking == pytest.approx({name: expected[query][name] for name in ranking}, abs=SCORE)
        # By score and not by name: two documents may differ by less than the tolerance at the cut.
        best = sorted(expected[query].values(), reverse=True)[:DEPTH]
        assert list(ranking.values()) == pytest.approx(best, abs=SCORE)


def test_evaluate_scores_the_ranking(encoder: MultiVectorEncoder) -> None:
    retrieval = make_retrieval(20)
    expected = score_rankings(retrieval.judgements, brute_force(encoder, retrieval))
    assert 0 < expected["map"] < 1
    assert evaluate(encoder, retrieval, batch_size=3) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("training", [True, False])
def test_the_training_mode_of_the_encoder_is_restored(training: bool, encoder: MultiVectorEncoder) -> None:
    encoder.train(training)
    rank(encoder, make_retrieval(3), batch_size=2)
    assert {module.training for module in encoder.modules()} == {training}


def test_dropout_does_not_touch_a_ranking(encoder: MultiVectorEncoder) -> None:
    retrieval = make_retrieval(10)
    encoder.train()
    assert rank(encoder, retrieval, batch_size=2) == rank(encoder, retrieval, batch_size=2)


# Processes


def test_each_of_several_processes_gets_the_rankings_of_one(
    encoder: MultiVectorEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder.save_pretrained(str(tmp_path / "model"))
    spawn(rank_as_process, args=(2, tmp_path), nprocs=2)

    lay_out_for_processes(monkeypatch)
    for number, retrieval in enumerate(retrievals_of_processes()):
        expected = rank(encoder, retrieval, batch_size=4)
        whole = brute_force(encoder, retrieval)
        for process in range(2):
            rankings = json.loads((tmp_path / f"{process}.json").read_text())[number]
            assert list(rankings) == list(retrieval.queries)
            for query, ranking in rankings.items():
                assert list(ranking) == list(expected[query])
                scores = {name: score - 9 for name, score in whole[query].items()}
                assert ranking == pytest.approx({name: scores[name] for name in ranking}, abs=SCORE)
                best = sorted(scores.values(), reverse=True)[:3]
                assert list(ranking.values()) == pytest.approx(best, abs=SCORE)


def lay_out_for_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "DEPTH", 3)
    # Less than a process has of the largest corpus.
    monkeypatch.setattr(evaluation, "BLOCK_DOCUMENTS", 7)
    # Below 0, where a document that a process lacks would win by a score of 0.
    monkeypatch.setattr(evaluation, "maxsim", lambda *arguments, **backend: maxsim(*arguments, **backend) - 9)


def retrievals_of_processes() -> list[RetrievalSet]:
    """Sets of which every process has several documents, one of them a document less, or one of them none; and one
    query, which leaves a process without."""
    sets = [make_retrieval(documents) for documents in (30, 5, 1)]
    return [*sets, replace(sets[0], queries={"q0": sets[0].queries["q0"]})]


def rank_as_process(process: int, processes: int, folder: Path) -> None:
    """What one of several processes does."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=process, world_size=processes)
    # As launchers say it.
    os.environ |= {"RANK": str(process), "LOCAL_RANK": str(process)}
    os.environ |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    assert PartialState(cpu=True).num_processes == processes
    lay_out_for_processes(pytest.MonkeyPatch())
    encoder = MultiVectorEncoder(str(folder / "model"), device="cpu")
    rankings = [rank(encoder, retrieval, batch_size=4) for retrieval in retrievals_of_processes()]
    (folder / f"{process}.json").write_text(json.dumps(rankings))
    # Whoever ends first would take the connection from the others.
    dist.barrier()
    dist.destroy_process_group()


# Metrics


def test_graded_judgements_give_the_metrics_computed_by_hand() -> None:
    judgements = {"q": {"best": 3, "good": 1, "bad": 0, "unseen": 2}}
    rankings = {"q": {"other": 0.9, "good": 0.8, "bad": 0.7, "best": 0.6}}
    # Gain is the grade, its discount the logarithm of the rank + 1; a grade of 1 or more counts as relevant.
    found, ideal = 1 / log2(3) + 3 / log2(5), 3 / log2(2) + 2 / log2(3) + 1 / log2(4)
    assert score_rankings(judgements, rankings) == pytest.approx(
        {"ndcg@10": found / ideal, "mrr@10": 1 / 2, "map": (1 / 2 + 2 / 4) / 3, "recall@100": 2 / 3}, rel=1e-6
    )


def test_ndcg_and_mrr_end_at_rank_10_and_recall_at_rank_100() -> None:
    def ranking(relevant_rank: int) -> dict[str, float]:
        names = ["relevant" if place == relevant_rank else f"d{place}" for place in range(1, 121)]
        return {name: 1.0 - place / 1000 for place, name in enumerate(names)}

    judgements = {"q": {"relevant": 1}}
    assert score_rankings(judgements, {"q": ranking(10)}) == pytest.approx(
        {"ndcg@10": 1 / log2(11), "mrr@10": 0.1, "map": 0.1, "recall@100": 1.0}, rel=1e-6
    )
    assert score_rankings(judgements, {"q": ranking(11)}) == pytest.approx(
        {"ndcg@10": 0.0, "mrr@10": 0.0, "map": 1 / 11, "recall@100": 1.0}, rel=1e-6
    )
    assert score_rankings(judgements, {"q": ranking(101)})["recall@100"] == 0.0


def test_a_judged_query_without_a_ranking_counts_as_zero() -> None:
    judgements = {"q0": {"d0": 1}, "q1": {"d0": 1}}
    assert score_rankings(judgements, {"q0": {"d0": 1.0}}) == {
        "ndcg@10": 0.5,
        "mrr@10": 0.5,
        "map": 0.5,
        "recall@100": 0.5,
    }


# Retrieval sets


def test_repeated_queries_and_texts_are_merged_and_every_document_is_in_the_corpus() -> None:
    examples = Dataset.from_list(
        [
            {"query": "what is a cat", "positive": "an animal", "negatives": ["a fish", "a dog"], "place": "f:1"},
            {"query": "what swims", "positive": "a fish", "negatives": [], "place": "f:2"},
            {"query": "what is a cat", "positive": "it meows", "negatives": ["a dog"], "place": "f:3"},
        ]
    )
    retrieval = RetrievalSet.from_examples(examples)
    assert retrieval.queries == {"q0": "what is a cat", "q1": "what swims"}
    assert retrieval.corpus == {"d0": "an animal", "d1": "a fish", "d2": "a dog", "d3": "it meows"}
    assert retrieval.judgements == {"q0": {"d0": 1, "d3": 1}, "q1": {"d1": 1}}
