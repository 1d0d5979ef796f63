"""Rankings against brute force over the library's own calls and, for cut vectors, over float64."""

import json
import math
import os
import random
import weakref
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import pytrec_eval
import torch
import torch.distributed as dist
from accelerate import PartialState
from sentence_transformers import MultiVectorEncoder
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from configs.schema import ConfigError
from losses.maxsim import maxsim
from tests.conftest import WORDS
from trainer import evaluation
from trainer.data.retrieval import RetrievalSet
from trainer.evaluation import evaluate, rank
from trainer.metrics import DEPTH, score_rankings

# Of a score of at most 8, the sum of 8 products in float32.
SCORE = 1e-5
# The tiny encoder's own width; its narrowest cut here still has a third of a vector's length.
FULL = 128


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


def with_candidates(retrieval: RetrievalSet) -> RetrievalSet:
    """Few documents, some of several queries and most of none; the last query has none at all."""
    return replace(retrieval, candidates={"q0": ["d17", "d3", "d0"], "q1": ["d3", "d1", "d2", "d29"], "q2": []})


def brute_force(encoder: MultiVectorEncoder, retrieval: RetrievalSet) -> dict[str, dict[str, float]]:
    """The score of every document for every query, one text at a time."""
    queries = {name: encoder.encode_query([text]) for name, text in retrieval.queries.items()}
    documents = {name: encoder.encode_document([text]) for name, text in retrieval.corpus.items()}
    return {
        query: {name: float(encoder.similarity(vectors, others)) for name, others in documents.items()}
        for query, vectors in queries.items()
    }


def brute_force_cut(encoder: MultiVectorEncoder, retrieval: RetrievalSet, width: int) -> dict[str, dict[str, float]]:
    """The same of vectors cut to a width and brought to unit length, in float64, one token of the query at a time."""

    def cut(vectors: Tensor) -> list[Tensor]:
        return [token[:width].double() / token[:width].double().square().sum().sqrt() for token in vectors]

    queries = {name: cut(encoder.encode_query([text])[0]) for name, text in retrieval.queries.items()}
    documents = {name: cut(encoder.encode_document([text])[0]) for name, text in retrieval.corpus.items()}
    return {
        query: {
            name: sum(float((torch.stack(others) @ token).max()) for token in vectors)
            for name, others in documents.items()
        }
        for query, vectors in queries.items()
    }


def assert_best(ranking: dict[str, float], scores: dict[str, float], *, depth: int = DEPTH) -> None:
    """The ranking is the best of the scores, best first."""
    assert list(ranking.values()) == sorted(ranking.values(), reverse=True)
    assert ranking == pytest.approx({name: scores[name] for name in ranking}, abs=SCORE)
    # By score and not by name: two documents may differ by less than the tolerance at the cut.
    assert list(ranking.values()) == pytest.approx(sorted(scores.values(), reverse=True)[:depth], abs=SCORE)


@pytest.mark.parametrize("block_documents", [2048, 7, 1])
@pytest.mark.parametrize("documents", [5, 130])
def test_the_ranking_equals_brute_force_over_the_whole_corpus(
    documents: int, block_documents: int, encoder: MultiVectorEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "BLOCK_DOCUMENTS", block_documents)
    retrieval = make_retrieval(documents)
    expected = brute_force(encoder, retrieval)
    rankings = rank(encoder, retrieval, batch_size=4, widths=[])
    assert list(rankings) == [FULL]
    assert list(rankings[FULL]) == ["q0", "q1", "q2"]
    for query, ranking in rankings[FULL].items():
        assert_best(ranking, expected[query])


def test_a_ranking_ends_at_its_depth(encoder: MultiVectorEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "DEPTH", 5)
    monkeypatch.setattr(evaluation, "BLOCK_DOCUMENTS", 4)
    retrieval = make_retrieval(30)
    expected = brute_force(encoder, retrieval)
    for query, ranking in rank(encoder, retrieval, batch_size=4, widths=[])[FULL].items():
        assert len(ranking) == 5
        assert_best(ranking, expected[query], depth=5)


def test_each_width_ranks_by_vectors_that_are_cut_and_have_unit_length_again(
    encoder: MultiVectorEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "BLOCK_DOCUMENTS", 11)
    retrieval = make_retrieval(30)
    rankings = rank(encoder, retrieval, batch_size=4, widths=[64, 16])
    assert list(rankings) == [FULL, 64, 16]
    for width in (FULL, 64, 16):
        expected = brute_force_cut(encoder, retrieval, width)
        for query, ranking in rankings[width].items():
            assert_best(ranking, expected[query])
    # The order changes with the width, so that no ranking passes for another.
    assert len({tuple(ranking["q0"]) for ranking in rankings.values()}) == 3


def test_several_widths_take_one_encoding(encoder: MultiVectorEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[str] = []
    encode = encoder.encode_document

    def count(texts: Sequence[str], **options: Any) -> list[Tensor]:
        encoded.extend(texts)
        return list(encode(list(texts), **options))

    monkeypatch.setattr(encoder, "encode_document", count)
    retrieval = make_retrieval(10)
    rank(encoder, retrieval, batch_size=4, widths=[64, 16])
    assert sorted(encoded) == sorted(retrieval.corpus.values())


def test_under_autocast_vectors_are_cut_in_float32(encoder: MultiVectorEncoder) -> None:
    retrieval = make_retrieval(10)
    with torch.autocast("cpu", torch.bfloat16):
        # One text at a time: bfloat16 rounds texts otherwise that are padded otherwise.
        ranking = rank(encoder, retrieval, batch_size=1, widths=[16])[16]
        expected = brute_force_cut(encoder, retrieval, 16)
    for query in retrieval.queries:
        assert_best(ranking[query], expected[query])


@pytest.mark.parametrize("block_documents", [2048, 7, 1])
def test_a_query_ranks_its_candidates_and_no_better_document(
    block_documents: int, encoder: MultiVectorEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "BLOCK_DOCUMENTS", block_documents)
    retrieval = with_candidates(make_retrieval(30))
    assert retrieval.candidates is not None
    rankings = rank(encoder, retrieval, batch_size=4, widths=[16])
    for width in (FULL, 16):
        expected = brute_force_cut(encoder, retrieval, width)
        for query, candidates in retrieval.candidates.items():
            assert sorted(rankings[width][query]) == sorted(candidates)
            assert_best(rankings[width][query], {name: expected[query][name] for name in candidates})
            # Each of them is beaten by a document that is no candidate.
            assert max(expected[query].values()) > max(rankings[width][query].values(), default=0) + SCORE


def test_all_documents_as_candidates_give_the_ranking_of_the_whole_corpus(encoder: MultiVectorEncoder) -> None:
    retrieval = make_retrieval(20)
    every = replace(retrieval, candidates={query: list(retrieval.corpus) for query in retrieval.queries})
    assert rank(encoder, every, batch_size=4, widths=[16]) == rank(encoder, retrieval, batch_size=4, widths=[16])


def test_evaluate_gives_the_value_of_each_query_at_each_width(encoder: MultiVectorEncoder) -> None:
    retrieval = make_retrieval(20)
    values = evaluate(encoder, {"made": retrieval}, batch_size=3, widths=[64, 16])["made"]
    expected = {
        metric + suffix: by_query
        for width, suffix in ((FULL, ""), (64, "/64"), (16, "/16"))
        for metric, by_query in score_rankings(retrieval.judgements, brute_force_cut(encoder, retrieval, width)).items()
    }
    assert list(values) == list(expected)
    assert {"map", "ndcg@10/64", "recall@100/16"} < set(values)
    for metric, by_query in expected.items():
        assert values[metric] == pytest.approx(by_query, rel=1e-12)
    assert len({tuple(values[f"map{suffix}"].values()) for suffix in ("", "/64", "/16")}) == 3
    alone = evaluate(encoder, {"made": retrieval}, batch_size=3, widths=[])
    assert list(alone["made"]) == ["ndcg@10", "mrr@10", "map", "recall@100"]


def test_a_set_is_ranked_with_its_own_prefixes_and_lengths(encoder: MultiVectorEncoder) -> None:
    own = make_retrieval(20)
    as_asked = replace(own, query_prefix="ask: ", document_prefix="about ", query_length=9, document_length=7)
    rankings = evaluate(encoder, {"one": own, "two": as_asked}, batch_size=3, widths=[])
    spelt = replace(
        own,
        queries={key: f"ask: {text}" for key, text in own.queries.items()},
        corpus={key: f"about {text}" for key, text in own.corpus.items()},
    )
    transformer: Any = encoder[0]
    kept = transformer.query_length, transformer.document_length, dict(transformer.query_expansion or {})
    # The prefixes are spelt out and the lengths set by hand: it is the same.
    transformer.query_expansion = None
    transformer.query_length, transformer.document_length = 9, 7
    transformer.query_expansion = {**kept[2], "length": 9}
    bare = replace(spelt, query_prefix="", document_prefix="")
    expected = evaluate(encoder, {"two": bare}, batch_size=3, widths=[])["two"]
    transformer.query_expansion = None
    transformer.query_length, transformer.document_length, transformer.query_expansion = kept
    assert rankings["two"] == expected
    assert rankings["two"] != rankings["one"] == evaluate(encoder, {"one": own}, batch_size=3, widths=[])["one"]


@pytest.mark.parametrize("training", [True, False])
def test_the_training_mode_of_the_encoder_is_restored(training: bool, encoder: MultiVectorEncoder) -> None:
    encoder.train(training)
    rank(encoder, make_retrieval(3), batch_size=2, widths=[])
    assert {module.training for module in encoder.modules()} == {training}


def test_dropout_does_not_touch_a_ranking(encoder: MultiVectorEncoder) -> None:
    retrieval = make_retrieval(10)
    encoder.train()
    assert rank(encoder, retrieval, batch_size=2, widths=[]) == rank(encoder, retrieval, batch_size=2, widths=[])


# Ties, broken scores, and what is held


@pytest.mark.parametrize("depth", [None, 20])
@pytest.mark.parametrize("block_documents", [512, 64])
def test_the_ranking_is_that_of_a_dense_computation_in_float64_ties_included(
    depth: int | None, block_documents: int, encoder: MultiVectorEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    retrieval = make_many()
    vectors = on_a_grid(encoder, monkeypatch)
    [ranking] = rank(
        encoder, retrieval, batch_size=32, widths=[], depth=depth, block_documents=block_documents
    ).values()
    ties = 0
    for query, scores in dense(retrieval, vectors).items():
        # Of equal scores, trec_eval puts the higher id first.
        expected = sorted(scores, key=lambda name: (scores[name], name), reverse=True)[:depth]
        assert list(ranking[query]) == expected
        assert list(ranking[query].values()) == [scores[name] for name in expected]
        ties += len(expected) - len(set(ranking[query].values()))
    assert ties > len(retrieval.queries)


def test_trec_eval_has_the_documents_in_the_order_of_the_ranking(
    encoder: MultiVectorEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    retrieval = make_many()
    on_a_grid(encoder, monkeypatch)
    [ranking] = rank(encoder, retrieval, batch_size=32, widths=[]).values()
    ranked = ranking["q0"]
    assert len(set(ranked.values())) < len(ranked) - 20
    found = {}
    for document in ranked:
        [values] = (
            pytrec_eval.RelevanceEvaluator({"q0": {document: 1}}, {"recip_rank"}).evaluate({"q0": ranked}).values()
        )
        found[document] = round(1 / values["recip_rank"])
    assert found == {document: place for place, document in enumerate(ranked, start=1)}


def test_documents_with_the_same_text_are_encoded_once_and_have_the_same_score(
    encoder: MultiVectorEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    retrieval = make_retrieval(6)
    twice = replace(retrieval, corpus=retrieval.corpus | {f"e{key}": text for key, text in retrieval.corpus.items()})
    encoded = count_encoded(encoder, monkeypatch)
    # Batches of one text, so that two would be padded otherwise if both were encoded.
    for ranking in rank(encoder, twice, batch_size=1, widths=[])[FULL].values():
        assert sorted(ranking) == sorted(twice.corpus)
        assert all(ranking[key] == ranking[f"e{key}"] for key in retrieval.corpus)
        assert list(ranking)[::2] == [f"e{key}" for key in list(ranking)[1::2]]
    assert sum(encoded) == 6


def make_many() -> RetrievalSet:
    """200 queries and 500 documents, a tenth of them copies of others; ids in no order."""
    generator = random.Random(5)

    def text(longest: int) -> str:
        return " ".join(generator.choices(WORDS, k=generator.randint(1, longest)))

    texts = [text(9) for _ in range(450)]
    texts += generator.choices(texts, k=50)
    names = generator.sample(range(10_000), 500)
    return RetrievalSet(
        queries={f"q{number}": text(5) for number in range(200)},
        corpus={f"d{name}": each for name, each in zip(names, texts, strict=True)},
        judgements={},
    )


def on_a_grid(encoder: MultiVectorEncoder, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Tensor]]:
    """Let the encoder round to multiples of 1/16, whose products float32 sums without an error, so that many scores are
    the same; what it then gives, by text, by side."""
    vectors: dict[str, dict[str, Tensor]] = {"query": {}, "document": {}}

    def rounded(side: str) -> Any:
        encode = getattr(encoder, f"encode_{side}")

        def call(texts: list[str], **options: Any) -> list[Tensor]:
            found = [(16 * each).round() / 16 for each in encode(texts, **options)]
            vectors[side].update(zip(texts, found, strict=True))
            return found

        return call

    for side in vectors:
        monkeypatch.setattr(encoder, f"encode_{side}", rounded(side))
    return vectors


def dense(retrieval: RetrievalSet, vectors: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, float]]:
    """Every score, from all similarities at once, in float64."""
    documents = [vectors["document"][text].double() for text in retrieval.corpus.values()]
    ends = torch.tensor([0, *(len(each) for each in documents)]).cumsum(0).tolist()
    tokens = torch.cat(documents)
    found = {}
    for query, text in retrieval.queries.items():
        similarities = vectors["query"][text].double() @ tokens.T
        scores = [float(similarities[:, start:stop].amax(dim=1).sum()) for start, stop in pairwise(ends)]
        found[query] = dict(zip(retrieval.corpus, scores, strict=True))
    return found


def count_encoded(encoder: MultiVectorEncoder, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many documents each call encodes."""
    counts: list[int] = []
    encode = encoder.encode_document

    def count(texts: list[str], **options: Any) -> list[Tensor]:
        counts.append(len(texts))
        return list(encode(texts, **options))

    monkeypatch.setattr(encoder, "encode_document", count)
    return counts


@pytest.mark.parametrize("documents", [40, 130])
def test_the_vectors_of_a_block_are_gone_before_the_next_is_encoded(
    documents: int, encoder: MultiVectorEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[weakref.ref[Tensor]] = []
    alive: list[int] = []
    encode, pad = encoder.encode_document, evaluation._pad

    def watch(texts: list[str], **options: Any) -> list[Tensor]:
        alive.append(sum(each() is not None for each in held))
        found = list(encode(texts, **options))
        held.extend(map(weakref.ref, found))
        return found

    def watch_padded(vectors: list[Tensor], encoder: MultiVectorEncoder) -> tuple[Tensor, Tensor]:
        padded, mask = pad(vectors, encoder)
        if alive:  # the queries come first, and stay
            held.append(weakref.ref(padded))
        return padded, mask

    monkeypatch.setattr(encoder, "encode_document", watch)
    monkeypatch.setattr(evaluation, "_pad", watch_padded)
    rank(encoder, make_retrieval(documents), batch_size=4, widths=[16], block_documents=10)
    assert alive == [0] * (documents // 10)


def test_a_ranking_holds_a_number_a_document_and_makes_one_query_a_dictionary(encoder: MultiVectorEncoder) -> None:
    ranking = rank(encoder, make_retrieval(30), batch_size=4, widths=[], depth=7)[FULL]
    assert ranking.best.shape == (3, 7)
    assert ranking.best.dtype is torch.int64
    assert ranking["q1"] is not ranking["q1"]
    assert ranking["q1"] == ranking["q1"]
    assert "q9" not in ranking


@pytest.mark.parametrize("candidates", [False, True])
def test_a_query_does_not_rank_the_document_of_its_own_id_where_the_set_says_so(
    candidates: bool, encoder: MultiVectorEncoder
) -> None:
    retrieval = make_retrieval(20)
    own = replace(retrieval, queries={"d3": "what animal meows", "d17": "which fish", "q": "what"})
    own = replace(own, candidates={query: ["d17", "d3", "d4"] for query in own.queries}) if candidates else own
    before = rank(encoder, own, batch_size=4, widths=[], block_documents=6)[FULL]
    without = rank(encoder, replace(own, ignore_identical_ids=True), batch_size=4, widths=[], block_documents=6)[FULL]
    assert "d3" in before["d3"]
    assert without == {
        query: {document: score for document, score in ranking.items() if document != query}
        for query, ranking in before.items()
    }


def test_a_score_that_is_no_number_is_named(encoder: MultiVectorEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    retrieval = make_retrieval(30)
    encode = encoder.encode_document

    def broken(texts: list[str], **options: Any) -> list[Tensor]:
        found = list(encode(texts, **options))
        if retrieval.corpus["d7"] in texts:
            found[texts.index(retrieval.corpus["d7"])][0, 0] = math.nan
        return found

    monkeypatch.setattr(encoder, "encode_document", broken)
    with pytest.raises(ConfigError, match=r"^the score of query q0 and document d7 is not a number: "):
        rank(encoder, retrieval, batch_size=4, widths=[], block_documents=4)
    # Nobody asks for it.
    rank(encoder, replace(retrieval, candidates={"q0": ["d1"], "q1": [], "q2": ["d8"]}), batch_size=4, widths=[])


def test_the_progress_counts_the_texts_of_all_blocks(encoder: MultiVectorEncoder) -> None:
    told: list[tuple[int, int]] = []
    rank(
        encoder,
        make_retrieval(10),
        batch_size=4,
        widths=[],
        block_documents=4,
        progress=lambda done, total: told.append((done, total)),
    )
    assert told == [(4, 10), (8, 10), (10, 10)]


def test_only_candidates_are_encoded(encoder: MultiVectorEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = count_encoded(encoder, monkeypatch)
    rank(encoder, with_candidates(make_retrieval(30)), batch_size=4, widths=[])
    assert encoded == [6]


@pytest.mark.parametrize("seed", range(3))
def test_keys_are_in_the_order_of_scores_and_then_of_rows(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(1, 300, generator=generator).mul(4).round().div(4)
    scores[0, :6] = torch.tensor([0.0, -0.0, 3e38, -3e38, 1e-45, -1e-45])
    rows = torch.randperm(2**20, generator=generator)[:300]
    pairs = sorted(zip(scores[0].tolist(), rows.tolist(), strict=True), reverse=True)
    keys = evaluation._keys(scores, rows).sort(descending=True).values
    found, found_rows = evaluation._scores_and_rows(keys[0])
    assert list(zip(found.tolist(), found_rows.tolist(), strict=True)) == pairs


# Processes


def test_each_of_several_processes_gets_the_rankings_of_one(
    encoder: MultiVectorEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder.save_pretrained(str(tmp_path / "model"))
    spawn(rank_as_process, args=(2, tmp_path), nprocs=2)

    of_processes = [json.loads((tmp_path / f"{process}.json").read_text()) for process in range(2)]
    assert of_processes[0] == of_processes[1]
    lay_out_for_processes(monkeypatch)
    for number, retrieval in enumerate(retrievals_of_processes()):
        expected = rank_all_ways(encoder, retrieval)
        assert list(of_processes[0][number]) == list(expected) == [f"{FULL}", "16", f"bfloat16 {FULL}", "bfloat16 16"]
        for way, rankings in of_processes[0][number].items():
            assert list(rankings) == list(retrieval.queries)
            # To the last bit, and in the same order.
            assert [list(ranking.items()) for ranking in rankings.values()] == [
                list(ranking.items()) for ranking in expected[way].values()
            ]
        whole = brute_force(encoder, retrieval)
        for query, ranking in of_processes[0][number][f"{FULL}"].items():
            ranked = whole[query] if retrieval.candidates is None else retrieval.candidates[query]
            assert_best(ranking, {name: whole[query][name] - 9 for name in ranked}, depth=3)


def lay_out_for_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "DEPTH", 3)
    # Less than a process has of the largest corpus.
    monkeypatch.setattr(evaluation, "BLOCK_DOCUMENTS", 7)
    # Below 0, where a document that a process lacks would win by a score of 0.
    monkeypatch.setattr(evaluation, "maxsim", lambda *arguments, **backend: maxsim(*arguments, **backend) - 9)


def retrievals_of_processes() -> list[RetrievalSet]:
    """Sets of which every process has several documents, one of them a document less, or one of them none; one query,
    which leaves a process without; and candidates, of which each process has fewer than it has places to send."""
    sets = [make_retrieval(documents) for documents in (30, 5, 1)]
    return [*sets, replace(sets[0], queries={"q0": sets[0].queries["q0"]}), with_candidates(sets[0])]


def rank_all_ways(encoder: MultiVectorEncoder, retrieval: RetrievalSet) -> dict[str, dict[str, dict[str, float]]]:
    """Rankings by width, in float32 and under autocast, where bfloat16 rounds texts otherwise that are padded
    otherwise."""
    rankings = rank(encoder, retrieval, batch_size=4, widths=[16])
    with torch.autocast("cpu", torch.bfloat16):
        rounded = rank(encoder, retrieval, batch_size=4, widths=[16])
    return {
        **{f"{width}": dict(ranking) for width, ranking in rankings.items()},
        **{f"bfloat16 {width}": dict(ranking) for width, ranking in rounded.items()},
    }


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
    rankings = [rank_all_ways(encoder, retrieval) for retrieval in retrievals_of_processes()]
    (folder / f"{process}.json").write_text(json.dumps(rankings))
    # Whoever ends first would take the connection from the others.
    dist.barrier()
    dist.destroy_process_group()
