"""The order of the examples, the micro-batches of a step, and how texts become chunks of tokens."""

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers import MultiVectorEncoder
from sentence_transformers.base.modules import Transformer

from configs.schema import Draw, MixedBatch
from tests.trainer.made import chunked, make_data_config, to_set
from trainer.data.batches import Batch, StepBatches, choose_documents
from trainer.data.tables import TrainingSet, identity, with_texts
from trainer.data.tokens import Task, TokenizedTexts

TEXTS = ["the dog barks.", "what", "a cat meows, that swims", "fish", "is it the animal", "a", "which cat is a dog?"]


def make_examples(count: int) -> TrainingSet:
    """Examples whose texts tell their row; row r has r % 3 documents beside its positive."""
    return to_examples(texts_of(count))


def texts_of(count: int) -> list[tuple[str, list[str]]]:
    letters = "bcdefghijklmnopqrstuvwxyz"
    return [
        (
            f"what is {letters[row]}",
            [
                f"the {letters[row]} swims" + " a" * (row % 4),
                *(f"no {letters[row]} {letters[number]}" for number in range(row % 3)),
            ],
        )
        for row in range(count)
    ]


def to_examples(
    rows: list[tuple[str, list[str]]], *, taught: bool = False, positives: int = 1, name: str = "made", **changes: Any
) -> TrainingSet:
    """A query and its documents each; a teacher gives document d of row r the score r - d / 4."""
    return to_set(
        [
            with_texts(
                f"{name}.jsonl:{row + 1}",
                query,
                documents,
                positives=positives,
                scores=[row - place / 4 for place in range(len(documents))] if taught else [],
            )
            for row, (query, documents) in enumerate(rows)
        ],
        name=name,
        **changes,
    )


def make_batches(
    encoder: MultiVectorEncoder,
    *,
    examples: int | TrainingSet = 10,
    batch_size: int = 4,
    accumulation_steps: int = 1,
    documents_per_query: int | None = None,
    seed: int = 1,
    process: int = 0,
    processes: int = 1,
) -> StepBatches:
    made = make_examples(examples) if isinstance(examples, int) else examples
    if documents_per_query is not None:
        made = replace(made, config=replace(made.config, documents_per_query=documents_per_query))
    return StepBatches(
        [made],
        encoder,
        config=make_data_config(),
        batch_size=batch_size,
        accumulation_steps=accumulation_steps,
        chunk_tokens=20,
        seed=seed,
        process=process,
        processes=processes,
    )


def rows_of(batch: Batch) -> list[int]:
    return [place.row for place in batch.places]


def rows_in(batches: StepBatches, step: int) -> list[int]:
    return [place.row for place in batches.order.step(step)]


def epoch_order(batches: StepBatches, epoch: int) -> list[int]:
    first = epoch * batches.steps_per_epoch
    return [row for step in range(first, first + batches.steps_per_epoch) for row in rows_in(batches, step)]


def restored_tokens(texts: TokenizedTexts) -> list[list[int]]:
    """The tokens of each text, expansion included, in the order in which the texts were given."""
    rows = []
    for chunk in texts.chunks:
        used = chunk["attention_mask"].bool()
        if "query_expansion_positions" in chunk:
            used = used | chunk["query_expansion_positions"]
        rows += [ids[mask].tolist() for ids, mask in zip(chunk["input_ids"], used, strict=True)]
    return [rows[position] for position in texts.order.argsort().tolist()]


def expected_tokens(encoder: MultiVectorEncoder, texts: Sequence[str], task: str) -> list[list[int]]:
    """The tokens of each text by the tokenizer alone: the marker, the text, cut to its side's length."""
    length = {"query": 8, "document": 16}[task]
    encoded = encoder.tokenizer(
        [f"{encoder.prompts[task]}{text}" for text in texts], truncation=True, max_length=length
    )
    ids: list[list[int]] = encoded["input_ids"]
    if task == "query":
        ids = [tokens + [encoder.tokenizer.mask_token_id] * (length - len(tokens)) for tokens in ids]
    return ids


# The order of the examples


@pytest.mark.parametrize(("examples", "batch_size"), [(10, 4), (8, 4), (7, 7), (9, 2), (3, 1)])
@pytest.mark.parametrize("epoch", [0, 3])
def test_an_epoch_has_every_example_exactly_once(
    examples: int, batch_size: int, epoch: int, encoder: MultiVectorEncoder
) -> None:
    batches = make_batches(encoder, examples=examples, batch_size=batch_size)
    assert sorted(epoch_order(batches, epoch)) == list(range(examples))


def test_the_steps_of_an_epoch_differ_by_one_example_at_most(encoder: MultiVectorEncoder) -> None:
    batches = make_batches(encoder, examples=10, batch_size=4)
    assert [len(rows_in(batches, step)) for step in range(6)] == [3, 3, 4, 3, 3, 4]


def test_the_order_depends_on_seed_and_step_alone(encoder: MultiVectorEncoder) -> None:
    first = make_batches(encoder)
    forward = [rows_in(first, step) for step in range(9)]
    torch.manual_seed(99)
    random.seed(99)
    torch.rand(5)
    second = make_batches(encoder)
    assert [rows_in(second, step) for step in reversed(range(9))] == forward[::-1]


def test_the_order_is_the_same_however_a_step_is_accumulated(encoder: MultiVectorEncoder) -> None:
    whole, halves = make_batches(encoder), make_batches(encoder, accumulation_steps=2)
    for step in range(3):
        assert [row for batch in halves[step] for row in rows_of(batch)] == rows_of(whole[step][0])


def test_epochs_have_different_orders(encoder: MultiVectorEncoder) -> None:
    batches = make_batches(encoder, examples=20)
    assert len({tuple(epoch_order(batches, epoch)) for epoch in range(5)}) == 5


def test_seeds_have_different_orders_also_one_epoch_apart(encoder: MultiVectorEncoder) -> None:
    orders = {
        tuple(epoch_order(make_batches(encoder, examples=20, seed=seed), epoch))
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(orders) == 9


def test_the_largest_seed_that_a_config_takes_has_an_order(encoder: MultiVectorEncoder) -> None:
    assert sorted(epoch_order(make_batches(encoder, seed=2**32 - 1), 1)) == list(range(10))


# Micro-batches


@pytest.mark.parametrize(
    ("examples", "batch_size", "accumulation_steps", "step", "sizes"),
    [
        (10, 4, 1, 0, [3]),
        (8, 4, 2, 0, [2, 2]),
        (10, 4, 2, 0, [1, 2]),
        (9, 6, 2, 1, [2, 3]),
        (8, 6, 3, 1, [1, 1, 2]),
        (3, 8, 4, 0, [1, 1, 1]),
    ],
)
def test_shares_follow_the_queries_of_each_micro_batch_and_sum_to_one(
    examples: int,
    batch_size: int,
    accumulation_steps: int,
    step: int,
    sizes: list[int],
    encoder: MultiVectorEncoder,
) -> None:
    batches = make_batches(encoder, examples=examples, batch_size=batch_size, accumulation_steps=accumulation_steps)
    micro_batches = batches[step]
    assert [len(rows_of(batch)) for batch in micro_batches] == sizes
    assert [batch.share for batch in micro_batches] == [size / sum(sizes) for size in sizes]
    assert sum(batch.share for batch in micro_batches) == pytest.approx(1.0, rel=1e-12)


def test_documents_are_those_of_one_query_after_the_other_the_positive_first(encoder: MultiVectorEncoder) -> None:
    batches = make_batches(encoder, batch_size=6)
    [batch] = batches[0]
    examples = batches.examples(0)
    documents = [text for example in examples for text in example["documents"]]
    assert len(documents) > 6
    queries = [example["query"] for example in examples]
    assert restored_tokens(batch.queries) == expected_tokens(encoder, queries, "query")
    assert restored_tokens(batch.documents) == expected_tokens(encoder, documents, "document")


def test_a_micro_batch_has_the_negatives_of_its_own_queries_only(encoder: MultiVectorEncoder) -> None:
    for batch in make_batches(encoder, batch_size=6, accumulation_steps=2)[0]:
        assert len(batch.documents.order) == len(rows_of(batch)) + sum(row % 3 for row in rows_of(batch))


def test_candidates_are_where_a_query_has_its_documents(encoder: MultiVectorEncoder) -> None:
    [batch] = make_batches(encoder, batch_size=5)[0]
    # With one, one, two, no and no document beside their positive.
    assert rows_of(batch) == [4, 1, 8, 6, 3]
    assert batch.candidates.dtype == torch.int64
    assert batch.candidates.tolist() == [[0, 1, -1], [2, 3, -1], [4, 5, 6], [7, -1, -1], [8, -1, -1]]


def test_ids_teacher_scores_and_texts_of_a_document_stand_in_one_place(encoder: MultiVectorEncoder) -> None:
    examples = to_examples(texts_of(10), taught=True)
    [batch] = make_batches(encoder, examples=examples, batch_size=5)[0]
    assert batch.teacher_scores is not None
    assert batch.teacher_scores.dtype == torch.float32
    assert batch.teacher_scores.shape == batch.candidates.shape
    assert batch.document_ids.dtype == torch.int64
    tokens = restored_tokens(batch.documents)
    for row, places, scores in zip(
        rows_of(batch), batch.candidates.tolist(), batch.teacher_scores.tolist(), strict=True
    ):
        texts = examples.example(row)["documents"]
        count = len(texts)
        assert [tokens[place] for place in places[:count]] == expected_tokens(encoder, texts, "document")
        assert batch.document_ids[places[:count]].tolist() == [identity(text) for text in texts]
        assert scores[:count] == [row - place / 4 for place in range(count)]
        assert places[count:] == [-1] * (3 - count)
        assert scores[count:] == [0.0] * (3 - count)
    assert len({row % 3 for row in rows_of(batch)}) == 3


def test_without_a_teacher_there_are_no_scores(encoder: MultiVectorEncoder) -> None:
    [batch] = make_batches(encoder)[0]
    assert batch.teacher_scores is None


# What answers "what is b" in three rows, of which two name the same document.
SEVERAL = to_examples(
    [
        ("what is b", ["the b swims", "no b"]),
        ("what is c", ["the c swims"]),
        ("what is b", ["a b barks", "the b swims"]),
        ("what is d", ["the b swims"]),
        ("what is b", ["the b swims"]),
        ("what is b", ["a b is that"]),
    ]
)


def known_positives(batches: StepBatches, steps: int) -> dict[int, list[int]]:
    """Ids of the known positives that are there, by the row of the example."""
    known: dict[int, list[int]] = {}
    for step in range(steps):
        for batch in batches[step]:
            assert batch.known_positives.dtype == torch.int64
            known |= {
                row: [identifier for identifier in ids if identifier]
                for row, ids in zip(rows_of(batch), batch.known_positives.tolist(), strict=True)
            }
    return known


@pytest.mark.parametrize("batch_size", [1, 2, 6])
def test_known_positives_are_those_of_all_training_examples_of_the_query(
    batch_size: int, encoder: MultiVectorEncoder
) -> None:
    batches = make_batches(encoder, examples=SEVERAL, batch_size=batch_size)
    of_b = sorted(identity(text) for text in ("the b swims", "a b barks", "a b is that"))
    of_c, of_d = [identity("the c swims")], [identity("the b swims")]
    known = known_positives(batches, batches.steps_per_epoch)
    assert {row: sorted(ids) for row, ids in known.items()} == {0: of_b, 1: of_c, 2: of_b, 3: of_d, 4: of_b, 5: of_b}


def test_positives_of_examples_that_are_held_out_are_not_known(encoder: MultiVectorEncoder) -> None:
    batches = make_batches(encoder, examples=SEVERAL.select([0, 1, 2]), batch_size=3)
    known = known_positives(batches, 1)
    assert sorted(known[0]) == sorted(known[2]) == sorted(identity(text) for text in ("the b swims", "a b barks"))


# Documents that are drawn


def many_documents(rows: int, documents: int, *, positives: int = 1, **changes: Any) -> TrainingSet:
    """Each document with an id of its own, in a table without repeated texts."""
    letters = "bcdefghijklmnopqrstuvwxyz"
    texts = [[f"{letters[row]} is {letters[place]}" for place in range(documents)] for row in range(rows)]
    rows_of_texts = [(f"what is {letters[row]}", own) for row, own in enumerate(texts)]
    return to_examples(rows_of_texts, taught=True, positives=positives, **changes)


def drawn(batch: Batch, examples: TrainingSet) -> dict[int, list[int]]:
    """Which of its documents each row was given, by their places in the data."""
    ids = batch.document_ids.tolist()
    return {
        row: [examples.example(row)["document_identities"].index(ids[place]) for place in places if place >= 0]
        for row, places in zip(rows_of(batch), batch.candidates.tolist(), strict=True)
    }


def drawn_in_epoch(batches: StepBatches, epoch: int) -> dict[int, list[int]]:
    """The same of all rows of an epoch."""
    first = epoch * batches.steps_per_epoch
    draws: dict[int, list[int]] = {}
    for step in range(first, first + batches.steps_per_epoch):
        for batch in batches[step]:
            draws |= drawn(batch, batches.sets[0])
    return draws


def test_the_positive_stays_and_of_the_others_as_many_as_fit_are_drawn_none_twice(encoder: MultiVectorEncoder) -> None:
    batches = make_batches(encoder, examples=many_documents(5, 6), documents_per_query=4)
    for epoch in range(5):
        for places in drawn_in_epoch(batches, epoch).values():
            assert places[0] == 0
            # In the order of the data, which a teacher may have given.
            assert places == sorted(set(places))
            assert len(places) == 4


def test_over_many_epochs_each_of_the_others_is_drawn_about_as_often(encoder: MultiVectorEncoder) -> None:
    batches = make_batches(encoder, examples=many_documents(2, 6), batch_size=2, documents_per_query=3)
    counts = {(row, place): 0 for row in range(2) for place in range(6)}
    for epoch in range(100):
        for row, places in drawn_in_epoch(batches, epoch).items():
            for place in places:
                counts[row, place] += 1
    for (_, place), count in counts.items():
        # Two of five others in each of 100 epochs: 40, whose standard deviation is 4.9.
        assert count == 100 if place == 0 else 25 <= count <= 55


def test_each_epoch_example_and_seed_has_a_draw_of_its_own(encoder: MultiVectorEncoder) -> None:
    examples = many_documents(4, 20)
    first, second = (make_batches(encoder, examples=examples, documents_per_query=8, seed=seed) for seed in (1, 2))
    draws = [
        tuple(places)
        for batches in (first, second)
        for epoch in range(3)
        for places in drawn_in_epoch(batches, epoch).values()
    ]
    # Of 50,388 that are possible.
    assert len(set(draws)) == len(draws) == 2 * 3 * 4


@pytest.mark.parametrize("processes", [2, 3])
def test_the_number_of_processes_changes_no_draw(processes: int, encoder: MultiVectorEncoder) -> None:
    examples = many_documents(7, 9)
    one = make_batches(encoder, examples=examples, documents_per_query=4)
    several = [
        make_batches(encoder, examples=examples, documents_per_query=4, process=process, processes=processes)
        for process in range(processes)
    ]
    for epoch in range(2):
        merged = {row: places for each in several for row, places in drawn_in_epoch(each, epoch).items()}
        assert merged == drawn_in_epoch(one, epoch)


def test_the_texts_scores_and_ids_of_drawn_documents_line_up(encoder: MultiVectorEncoder) -> None:
    examples = many_documents(5, 6)
    for batch in make_batches(encoder, examples=examples, documents_per_query=3, accumulation_steps=2)[0]:
        draws = drawn(batch, examples)
        texts = [examples.example(row)["documents"][place] for row, places in draws.items() for place in places]
        assert restored_tokens(batch.documents) == expected_tokens(encoder, texts, "document")
        assert batch.teacher_scores is not None
        assert batch.teacher_scores.tolist() == [[row - place / 4 for place in draws[row]] for row in rows_of(batch)]


@pytest.mark.parametrize("documents_per_query", [3, 99, None])
def test_an_example_with_no_more_documents_than_asked_for_keeps_all(
    documents_per_query: int | None, encoder: MultiVectorEncoder
) -> None:
    batches = make_batches(encoder, documents_per_query=documents_per_query)
    assert drawn_in_epoch(batches, 0) == {row: list(range(1 + row % 3)) for row in range(10)}


def test_one_document_a_query_is_its_positive(encoder: MultiVectorEncoder) -> None:
    batches = make_batches(encoder, documents_per_query=1)
    assert drawn_in_epoch(batches, 0) == {row: [0] for row in range(10)}


DRAWS = {
    "documents": st.integers(1, 12),
    "positives": st.integers(1, 4),
    "wanted": st.none() | st.integers(1, 12),
    "stratified": st.booleans(),
    "seed": st.tuples(*[st.integers(0, 2**32 - 1)] * 4),
}


@settings(derandomize=True, database=None, deadline=None, max_examples=300)
@given(**DRAWS)
def test_a_draw_is_one_positive_and_of_the_others_as_many_as_fit(
    documents: int, positives: int, wanted: int | None, stratified: bool, seed: tuple[int, ...]
) -> None:
    positives = min(positives, documents)
    others = documents - positives
    chosen = choose_documents(documents, wanted, positives=positives, stratified=stratified, seed=seed)
    assert chosen == choose_documents(documents, wanted, positives=positives, stratified=stratified, seed=seed)
    assert 0 <= chosen[0] < positives
    assert len(chosen) == 1 + (others if wanted is None else min(others, wanted - 1))
    assert all(positives <= number < documents for number in chosen[1:])
    assert chosen[1:] == sorted(set(chosen[1:]))
    if stratified and wanted is not None and 1 < wanted <= others:
        parts = wanted - 1
        edges = [positives + others * part // parts for part in range(parts + 1)]
        assert all(start <= number < stop for number, (start, stop) in zip(chosen[1:], pairwise(edges), strict=True))


def test_of_several_positives_each_epoch_draws_one_and_over_epochs_all(encoder: MultiVectorEncoder) -> None:
    examples = many_documents(3, 6, positives=3)
    taken: dict[int, Counter[int]] = {row: Counter() for row in range(3)}
    for documents_per_query in (3, None):
        batches = make_batches(encoder, examples=examples, documents_per_query=documents_per_query)
        for epoch in range(40):
            for row, places in drawn_in_epoch(batches, epoch).items():
                assert places[0] < 3
                others = [place for place in places if place >= 3]
                assert len(places) == 1 + len(others)
                assert len(others) == (2 if documents_per_query else 3)
                taken[row][places[0]] += 1
    for counts in taken.values():
        # A third of 80 is 27, whose standard deviation is 4.2.
        assert sorted(counts) == [0, 1, 2]
        assert min(counts.values()) > 10


def test_whichever_positive_is_drawn_the_others_stay_known(encoder: MultiVectorEncoder) -> None:
    examples = many_documents(2, 5, positives=2)
    for step in range(6):
        for batch in make_batches(encoder, examples=examples, batch_size=2, documents_per_query=2)[step]:
            for row, known in zip(rows_of(batch), batch.known_positives.tolist(), strict=True):
                assert sorted(known) == sorted(examples.example(row)["document_identities"][:2])


def test_stratified_draws_have_one_of_each_range_and_over_epochs_all_of_it(encoder: MultiVectorEncoder) -> None:
    examples = many_documents(2, 10, draw=Draw.stratified)
    batches = make_batches(encoder, examples=examples, documents_per_query=4)
    taken: dict[int, Counter[int]] = {row: Counter() for row in range(2)}
    for epoch in range(60):
        for row, places in drawn_in_epoch(batches, epoch).items():
            assert [(place - 1) // 3 for place in places[1:]] == [0, 1, 2]
            taken[row].update(places)
    for counts in taken.values():
        # Each of three in 60 epochs: 20, whose standard deviation is 3.7.
        assert sorted(counts) == list(range(10))
        assert all(count == 60 if place == 0 else 7 <= count <= 33 for place, count in counts.items())


# Mixes

MIXES = [MixedBatch.one_set, MixedBatch.all_sets]


def mixed_sets() -> list[TrainingSet]:
    """Three sets that differ in all that a set decides; the last has a query and a document of the first."""
    letters = "bcdefghijklmnopqrstuvwxyz"
    return [
        many_documents(7, 6, name="first", documents_per_query=3),
        to_examples(
            [(f"which {letters[row]}", [f"{letters[row]} {letters[n]} barks" for n in range(4)]) for row in range(9)],
            positives=2,
            name="second",
            document_length=5,
            query_prefix="is ",
            document_prefix="the ",
        ),
        to_examples(
            [("what is b", ["fish", "b is b"]), ("what is z", ["b is b", "a"]), ("which b", ["b is c", "cat"])],
            name="third",
            documents_per_query=1,
            query_length=6,
        ),
    ]


def make_mix(
    encoder: MultiVectorEncoder,
    mix_batches: MixedBatch,
    *,
    accumulation_steps: int = 1,
    process: int = 0,
    processes: int = 1,
    **changes: Any,
) -> StepBatches:
    weights = {"first": 2.0, "second": 1.0, "third": 1.0}
    return StepBatches(
        mixed_sets(),
        encoder,
        config=make_data_config(mix=weights, mix_batches=mix_batches, **changes),
        batch_size=6,
        accumulation_steps=accumulation_steps,
        chunk_tokens=30,
        seed=1,
        process=process,
        processes=processes,
    )


def queries_of(batches: StepBatches, batch: Batch) -> list[dict[str, Any]]:
    """All that a batch says of each of its queries, which are given once and in order."""
    queries, documents = restored_tokens(batch.queries), restored_tokens(batch.documents)
    ids = batch.document_ids.tolist()
    assert len(queries) == len(batch.places)
    own = [[number for number in numbers if number >= 0] for numbers in batch.candidates.tolist()]
    assert [number for numbers in own for number in numbers] == list(range(len(documents)))
    return [
        {
            "place": place,
            "query": queries[number],
            "documents": [documents[document] for document in own[number]],
            "ids": [ids[document] for document in own[number]],
            "known": sorted(known for known in batch.known_positives[number].tolist() if known),
        }
        for number, place in enumerate(batch.places)
    ]


@pytest.mark.parametrize("mix_batches", MIXES)
def test_a_query_of_a_mix_has_what_its_own_set_gives_it(mix_batches: MixedBatch, encoder: MultiVectorEncoder) -> None:
    batches = make_mix(encoder, mix_batches)
    markers = {task: encoder.prompts[task] or "" for task in ("query", "document")}
    # Tokens of a query and of a document, what stands before them, documents a query.
    expected = [
        (8, 16, markers["query"], markers["document"], 3),
        (8, 5, "is ", "the ", 3),
        (6, 16, markers["query"], markers["document"], 1),
    ]
    seen = Counter[int]()
    for step in range(2 * batches.steps_per_epoch):
        [batch] = batches[step]
        sets = {place.set for place in batch.places}
        assert len(sets) == 1 or mix_batches is MixedBatch.all_sets
        seen.update(sets)
        for found in queries_of(batches, batch):
            place = found["place"]
            example = batches.sets[place.set].example(place.row)
            query_length, document_length, query_prefix, document_prefix, documents = expected[place.set]
            assert (
                found["query"] == tokens_of(encoder, [query_prefix + example["query"]], query_length, expands=True)[0]
            )
            texts = dict(zip(example["document_identities"], example["documents"], strict=True))
            assert len(found["ids"]) == documents
            assert found["documents"] == tokens_of(
                encoder, [document_prefix + texts[document] for document in found["ids"]], document_length
            )
            assert found["ids"][0] in example["document_identities"][: example["positives"]]
            assert not set(found["ids"][1:]) & set(example["document_identities"][: example["positives"]])
        for chunk in (*batch.queries.chunks, *batch.documents.chunks):
            assert len(chunk["input_ids"]) == 1 or chunk["input_ids"].numel() <= 30
    assert sorted(seen) == [0, 1, 2]
    assert batches.examples(0) == [batches.sets[place.set].example(place.row) for place in batches.order.step(0)]


def tokens_of(encoder: MultiVectorEncoder, texts: list[str], length: int, *, expands: bool = False) -> list[list[int]]:
    ids: list[list[int]] = encoder.tokenizer(texts, truncation=True, max_length=length)["input_ids"]
    return [own + [encoder.tokenizer.mask_token_id] * (length - len(own)) for own in ids] if expands else ids


def test_a_batch_of_all_sets_has_several(encoder: MultiVectorEncoder) -> None:
    batches = make_mix(encoder, MixedBatch.all_sets)
    numbers = [len({place.set for place in batches.order.step(step)}) for step in range(2 * batches.steps_per_epoch)]
    assert max(numbers) == 3
    # Only the first set has a teacher.
    assert all(batch.teacher_scores is None for step in range(3) for batch in batches[step] if numbers[step] > 1)


@pytest.mark.parametrize("mix_batches", MIXES)
def test_a_text_has_one_id_in_all_sets_and_a_query_the_positives_of_all(
    mix_batches: MixedBatch, encoder: MultiVectorEncoder
) -> None:
    batches = make_mix(encoder, mix_batches)
    known: dict[str, set[int]] = {}
    for examples in batches.sets:
        for row in range(len(examples)):
            example = examples.example(row)
            known.setdefault(example["query"], set()).update(example["document_identities"][: example["positives"]])
    # "b is b" answers "what is b" in the first set, and "fish" in the third.
    assert known["what is b"] == {identity("b is b"), identity("fish")}
    assert known["which b"] == {identity("b b barks"), identity("b c barks"), identity("b is c")}
    taken = set()
    for step in range(3 * batches.steps_per_epoch):
        for batch in batches[step]:
            for found in queries_of(batches, batch):
                query = batches.sets[found["place"].set].example(found["place"].row)["query"]
                assert found["known"] == sorted(known[query])
                taken |= {(found["place"].set, document) for document in found["ids"]}
    assert {index for index, document in taken if document == identity("b is b")} == {0, 2}


@pytest.mark.parametrize(
    ("mix_batches", "window"),
    [(MixedBatch.one_set, None), (MixedBatch.one_set, 2), (MixedBatch.all_sets, None)],
)
def test_the_number_of_processes_changes_no_micro_batch_of_a_mix(
    mix_batches: MixedBatch, window: int | None, encoder: MultiVectorEncoder
) -> None:
    one = make_mix(encoder, mix_batches, length_window=window)
    for processes in (2, 3):
        several = [
            make_mix(encoder, mix_batches, process=process, processes=processes, length_window=window)
            for process in range(processes)
        ]
        for step in range(2 * one.steps_per_epoch):
            [whole] = one[step]
            parts = [each[step][0] for each in several]
            found = [query for each, part in zip(several, parts, strict=True) for query in queries_of(each, part)]
            assert found == queries_of(one, whole)
            assert math.fsum(part.share for part in parts) == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize("mix_batches", MIXES)
def test_a_step_of_a_mix_is_the_same_however_it_is_accumulated(
    mix_batches: MixedBatch, encoder: MultiVectorEncoder
) -> None:
    whole, halves = (make_mix(encoder, mix_batches, accumulation_steps=count) for count in (1, 2))
    for step in range(whole.steps_per_epoch):
        found = [query for batch in halves[step] for query in queries_of(halves, batch)]
        assert found == queries_of(whole, whole[step][0])


# Processes


def batches_of_all(
    encoder: MultiVectorEncoder, step: int, *, accumulation_steps: int, processes: int, examples: int, batch_size: int
) -> list[list[Batch]]:
    """The micro-batches of a step, each as what every process has of it."""
    by_process = [
        make_batches(
            encoder,
            examples=examples,
            batch_size=batch_size,
            accumulation_steps=accumulation_steps,
            process=process,
            processes=processes,
        )[step]
        for process in range(processes)
    ]
    return [list(parts) for parts in zip(*by_process, strict=True)]


# 25 examples are two steps of 12 and 13, and neither number can be cut evenly by all of 2, 3 and 4.
SPLIT = {"examples": 25, "batch_size": 14}


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
@pytest.mark.parametrize("accumulation_steps", [1, 2, 3])
def test_the_processes_have_the_rows_of_a_step_in_order_and_those_of_an_epoch_once(
    accumulation_steps: int, processes: int, encoder: MultiVectorEncoder
) -> None:
    whole, epoch = make_batches(encoder, **SPLIT), []
    for step in range(whole.steps_per_epoch):
        micro_batches = batches_of_all(
            encoder, step, accumulation_steps=accumulation_steps, processes=processes, **SPLIT
        )
        rows = [row for parts in micro_batches for batch in parts for row in rows_of(batch)]
        assert rows == rows_in(whole, step)
        epoch += rows
    assert sorted(epoch) == list(range(25))


@pytest.mark.parametrize("processes", [2, 3, 4])
@pytest.mark.parametrize("accumulation_steps", [1, 2, 3])
def test_the_number_of_processes_changes_no_micro_batch(
    accumulation_steps: int, processes: int, encoder: MultiVectorEncoder
) -> None:
    for step in range(2):
        one, several = (
            batches_of_all(encoder, step, accumulation_steps=accumulation_steps, processes=count, **SPLIT)
            for count in (1, processes)
        )
        assert [[row for batch in parts for row in rows_of(batch)] for parts in several] == [
            rows_of(batch) for [batch] in one
        ]


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
@pytest.mark.parametrize("accumulation_steps", [1, 2, 3])
def test_shares_are_the_queries_of_a_process_over_those_of_the_step_and_sum_to_one(
    accumulation_steps: int, processes: int, encoder: MultiVectorEncoder
) -> None:
    for step, queries in enumerate([12, 13]):
        micro_batches = batches_of_all(
            encoder, step, accumulation_steps=accumulation_steps, processes=processes, **SPLIT
        )
        shares = [batch.share for parts in micro_batches for batch in parts]
        assert shares == [len(rows_of(batch)) / queries for parts in micro_batches for batch in parts]
        assert math.fsum(shares) == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize("processes", [2, 3, 4])
def test_the_queries_of_two_processes_differ_by_one_at_most(processes: int, encoder: MultiVectorEncoder) -> None:
    for step in range(2):
        for parts in batches_of_all(encoder, step, accumulation_steps=3, processes=processes, **SPLIT):
            sizes = [len(rows_of(batch)) for batch in parts]
            assert max(sizes) - min(sizes) <= 1
            assert min(sizes) >= 1


def test_a_process_has_the_texts_of_its_own_rows_and_no_others(encoder: MultiVectorEncoder) -> None:
    examples = make_examples(25)
    [parts] = batches_of_all(encoder, 1, accumulation_steps=1, processes=3, **SPLIT)
    assert [len(rows_of(batch)) for batch in parts] == [4, 4, 5]
    for batch in parts:
        own = [examples.example(row) for row in rows_of(batch)]
        documents = [text for example in own for text in example["documents"]]
        queries = [example["query"] for example in own]
        assert restored_tokens(batch.queries) == expected_tokens(encoder, queries, "query")
        assert restored_tokens(batch.documents) == expected_tokens(encoder, documents, "document")


# Chunks


@pytest.mark.parametrize("task", ["query", "document"])
@pytest.mark.parametrize("chunk_tokens", [1, 16, 30, 1000])
@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_chunks_restored_are_the_tokens_of_the_texts_in_their_order(
    task: Task, chunk_tokens: int, padding_side: str, encoder: MultiVectorEncoder
) -> None:
    encoder.tokenizer.padding_side = padding_side
    tokens = restored_tokens(chunked(encoder, TEXTS, task, chunk_tokens))
    if task == "query" and padding_side == "left":
        # The expansion stands where the padding was.
        expansion = encoder.tokenizer.mask_token_id
        tokens = [sorted(ids, key=lambda token: token == expansion) for ids in tokens]
    assert tokens == expected_tokens(encoder, TEXTS, task)


@pytest.mark.parametrize("chunk_tokens", [1, 16, 30, 45, 1000])
def test_no_chunk_exceeds_chunk_tokens_unless_it_is_one_text(chunk_tokens: int, encoder: MultiVectorEncoder) -> None:
    tokens = chunked(encoder, TEXTS, "document", chunk_tokens)
    for chunk in tokens.chunks:
        texts, width = chunk["input_ids"].shape
        assert texts == 1 or texts * width <= chunk_tokens


def test_texts_are_sorted_by_length_within_and_across_chunks(encoder: MultiVectorEncoder) -> None:
    tokens = chunked(encoder, TEXTS, "document", 30)
    lengths = [length for chunk in tokens.chunks for length in chunk["attention_mask"].sum(dim=1).tolist()]
    assert lengths == sorted(len(tokens) for tokens in expected_tokens(encoder, TEXTS, "document"))
    assert len(set(lengths)) > 3


@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_a_chunk_is_as_wide_as_its_longest_text(padding_side: str, encoder: MultiVectorEncoder) -> None:
    encoder.tokenizer.padding_side = padding_side
    for chunk in chunked(encoder, TEXTS, "document", 30).chunks:
        longest = int(chunk["attention_mask"].sum(dim=1).max())
        assert chunk["attention_mask"].shape[1] == longest
        assert chunk["token_type_ids"].shape == chunk["input_ids"].shape == chunk["attention_mask"].shape


def test_document_tokens_are_those_that_the_tokenizer_makes(encoder: MultiVectorEncoder) -> None:
    texts = [*TEXTS, " ".join(TEXTS)]
    lengths = [len(tokens) for tokens in expected_tokens(encoder, texts, "document")]
    tokens = chunked(encoder, texts, "document", 1)
    assert max(lengths) == 16
    assert tokens.tokens == sum(lengths)
    assert tokens.padded_tokens == sum(lengths)


def test_padded_tokens_are_texts_times_width_in_one_chunk(encoder: MultiVectorEncoder) -> None:
    lengths = [len(tokens) for tokens in expected_tokens(encoder, TEXTS, "document")]
    tokens = chunked(encoder, TEXTS, "document", 1000)
    assert tokens.tokens == sum(lengths)
    assert tokens.padded_tokens == len(TEXTS) * max(lengths)


def test_expansion_counts_as_tokens(encoder: MultiVectorEncoder) -> None:
    tokens = chunked(encoder, TEXTS, "query", 1000)
    assert tokens.tokens == tokens.padded_tokens == 8 * len(TEXTS)


def test_without_expansion_the_padding_of_queries_does_not_count(encoder: MultiVectorEncoder) -> None:
    transformer = encoder[0]
    assert isinstance(transformer, Transformer)
    transformer.query_expansion = None
    tokens = chunked(encoder, ["a", "what is the cat"], "query", 1000)
    # [CLS] [Q] a [SEP], and seven of the longer query.
    assert tokens.tokens == 4 + 7
    assert tokens.padded_tokens == 2 * 7


def test_a_text_without_a_marker_gets_none(encoder: MultiVectorEncoder) -> None:
    encoder.prompts["document"] = ""
    tokens = chunked(encoder, ["the cat"], "document", 1000)
    assert encoder.tokenizer.convert_ids_to_tokens(restored_tokens(tokens)[0]) == ["[CLS]", "the", "cat", "[SEP]"]
