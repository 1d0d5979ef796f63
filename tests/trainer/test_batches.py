"""The order of the examples, the micro-batches of a step, and how texts become chunks of tokens."""

import math
import random
from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from datasets import Dataset
from sentence_transformers import MultiVectorEncoder
from sentence_transformers.base.modules import Transformer

from trainer.data.batches import Batch, StepBatches, TokenizedTexts, tokenize
from trainer.data.files import identity

TEXTS = ["the dog barks.", "what", "a cat meows, that swims", "fish", "is it the animal", "a", "which cat is a dog?"]


def make_examples(count: int) -> Dataset:
    """Examples whose texts tell their row; row r has r % 3 documents beside its positive."""
    letters = "bcdefghijklmnopqrstuvwxyz"
    return to_examples(
        [
            (
                f"what is {letters[row]}",
                [
                    f"the {letters[row]} swims" + " a" * (row % 4),
                    *(f"no {letters[row]} {letters[number]}" for number in range(row % 3)),
                ],
            )
            for row in range(count)
        ]
    )


def to_examples(rows: list[tuple[str, list[str]]], *, taught: bool = False) -> Dataset:
    """A query and its documents each; a teacher gives document d of row r the score r - d / 4."""
    return Dataset.from_list(
        [
            {
                "query": query,
                "query_id": identity(query),
                "documents": documents,
                "document_ids": [identity(document) for document in documents],
                "scores": [row - place / 4 for place in range(len(documents))] if taught else [],
                "place": f"made.jsonl:{row + 1}",
            }
            for row, (query, documents) in enumerate(rows)
        ]
    )


def make_batches(
    encoder: MultiVectorEncoder,
    *,
    examples: int | Dataset = 10,
    batch_size: int = 4,
    accumulation_steps: int = 1,
    documents_per_query: int | None = None,
    seed: int = 1,
    process: int = 0,
    processes: int = 1,
) -> StepBatches:
    return StepBatches(
        make_examples(examples) if isinstance(examples, int) else examples,
        encoder,
        batch_size=batch_size,
        accumulation_steps=accumulation_steps,
        chunk_tokens=20,
        documents_per_query=documents_per_query,
        seed=seed,
        process=process,
        processes=processes,
    )


def epoch_order(batches: StepBatches, epoch: int) -> list[int]:
    first = epoch * batches.steps_per_epoch
    return [row for step in range(first, first + batches.steps_per_epoch) for row in batches.rows(step)]


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
    assert [len(batches.rows(step)) for step in range(6)] == [3, 3, 4, 3, 3, 4]


def test_the_order_depends_on_seed_and_step_alone(encoder: MultiVectorEncoder) -> None:
    first = make_batches(encoder)
    forward = [first.rows(step) for step in range(9)]
    torch.manual_seed(99)
    random.seed(99)
    torch.rand(5)
    second = make_batches(encoder)
    assert [second.rows(step) for step in reversed(range(9))] == forward[::-1]


def test_the_order_is_the_same_however_a_step_is_accumulated(encoder: MultiVectorEncoder) -> None:
    whole, halves = make_batches(encoder), make_batches(encoder, accumulation_steps=2)
    for step in range(3):
        assert [row for batch in halves[step] for row in batch.rows] == whole[step][0].rows


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
    assert [len(batch.rows) for batch in micro_batches] == sizes
    assert [batch.share for batch in micro_batches] == [size / sum(sizes) for size in sizes]
    assert sum(batch.share for batch in micro_batches) == pytest.approx(1.0, rel=1e-12)


def test_documents_are_those_of_one_query_after_the_other_the_positive_first(encoder: MultiVectorEncoder) -> None:
    batches = make_batches(encoder, batch_size=6)
    [batch] = batches[0]
    examples = batches.examples[batch.rows]
    documents = [text for texts in examples["documents"] for text in texts]
    assert len(documents) > 6
    assert restored_tokens(batch.queries) == expected_tokens(encoder, examples["query"], "query")
    assert restored_tokens(batch.documents) == expected_tokens(encoder, documents, "document")


def test_a_micro_batch_has_the_negatives_of_its_own_queries_only(encoder: MultiVectorEncoder) -> None:
    for batch in make_batches(encoder, batch_size=6, accumulation_steps=2)[0]:
        assert len(batch.documents.order) == len(batch.rows) + sum(row % 3 for row in batch.rows)


def test_candidates_are_where_a_query_has_its_documents(encoder: MultiVectorEncoder) -> None:
    [batch] = make_batches(encoder, batch_size=5)[0]
    # With one, one, two, no and no document beside their positive.
    assert batch.rows == [4, 1, 8, 6, 3]
    assert batch.candidates.dtype == torch.int64
    assert batch.candidates.tolist() == [[0, 1, -1], [2, 3, -1], [4, 5, 6], [7, -1, -1], [8, -1, -1]]


def test_ids_teacher_scores_and_texts_of_a_document_stand_in_one_place(encoder: MultiVectorEncoder) -> None:
    examples = to_examples([(row["query"], row["documents"]) for row in make_examples(10)], taught=True)
    [batch] = make_batches(encoder, examples=examples, batch_size=5)[0]
    assert batch.teacher_scores is not None
    assert batch.teacher_scores.dtype == torch.float32
    assert batch.teacher_scores.shape == batch.candidates.shape
    assert batch.document_ids.dtype == torch.int64
    tokens = restored_tokens(batch.documents)
    for row, places, scores in zip(batch.rows, batch.candidates.tolist(), batch.teacher_scores.tolist(), strict=True):
        texts = examples[row]["documents"]
        count = len(texts)
        assert [tokens[place] for place in places[:count]] == expected_tokens(encoder, texts, "document")
        assert batch.document_ids[places[:count]].tolist() == [identity(text) for text in texts]
        assert scores[:count] == [row - place / 4 for place in range(count)]
        assert places[count:] == [-1] * (3 - count)
        assert scores[count:] == [0.0] * (3 - count)
    assert len({row % 3 for row in batch.rows}) == 3


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
                for row, ids in zip(batch.rows, batch.known_positives.tolist(), strict=True)
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


def many_documents(rows: int, documents: int) -> Dataset:
    """Each document with an id of its own, in a table without repeated texts."""
    letters = "bcdefghijklmnopqrstuvwxyz"
    texts = [[f"{letters[row]} is {letters[place]}" for place in range(documents)] for row in range(rows)]
    return to_examples([(f"what is {letters[row]}", own) for row, own in enumerate(texts)], taught=True)


def drawn(batch: Batch, examples: Dataset) -> dict[int, list[int]]:
    """Which of its documents each row was given, by their places in the data."""
    return {
        row: [examples[row]["document_ids"].index(batch.document_ids[place]) for place in places if place >= 0]
        for row, places in zip(batch.rows, batch.candidates.tolist(), strict=True)
    }


def drawn_in_epoch(batches: StepBatches, epoch: int) -> dict[int, list[int]]:
    """The same of all rows of an epoch."""
    first = epoch * batches.steps_per_epoch
    draws: dict[int, list[int]] = {}
    for step in range(first, first + batches.steps_per_epoch):
        for batch in batches[step]:
            draws |= drawn(batch, batches.examples)
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
        texts = [examples[row]["documents"][place] for row, places in draws.items() for place in places]
        assert restored_tokens(batch.documents) == expected_tokens(encoder, texts, "document")
        assert batch.teacher_scores is not None
        assert batch.teacher_scores.tolist() == [[row - place / 4 for place in draws[row]] for row in batch.rows]


@pytest.mark.parametrize("documents_per_query", [3, 99, None])
def test_an_example_with_no_more_documents_than_asked_for_keeps_all(
    documents_per_query: int | None, encoder: MultiVectorEncoder
) -> None:
    batches = make_batches(encoder, documents_per_query=documents_per_query)
    assert drawn_in_epoch(batches, 0) == {row: list(range(1 + row % 3)) for row in range(10)}


def test_one_document_a_query_is_its_positive(encoder: MultiVectorEncoder) -> None:
    batches = make_batches(encoder, documents_per_query=1)
    assert drawn_in_epoch(batches, 0) == {row: [0] for row in range(10)}


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
        rows = [row for parts in micro_batches for batch in parts for row in batch.rows]
        assert rows == whole.rows(step)
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
        assert [[row for batch in parts for row in batch.rows] for parts in several] == [batch.rows for [batch] in one]


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
        assert shares == [len(batch.rows) / queries for parts in micro_batches for batch in parts]
        assert math.fsum(shares) == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize("processes", [2, 3, 4])
def test_the_queries_of_two_processes_differ_by_one_at_most(processes: int, encoder: MultiVectorEncoder) -> None:
    for step in range(2):
        for parts in batches_of_all(encoder, step, accumulation_steps=3, processes=processes, **SPLIT):
            sizes = [len(batch.rows) for batch in parts]
            assert max(sizes) - min(sizes) <= 1
            assert min(sizes) >= 1


def test_a_process_has_the_texts_of_its_own_rows_and_no_others(encoder: MultiVectorEncoder) -> None:
    examples = make_examples(25)
    [parts] = batches_of_all(encoder, 1, accumulation_steps=1, processes=3, **SPLIT)
    assert [len(batch.rows) for batch in parts] == [4, 4, 5]
    for batch in parts:
        own = examples[batch.rows]
        documents = [text for texts in own["documents"] for text in texts]
        assert restored_tokens(batch.queries) == expected_tokens(encoder, own["query"], "query")
        assert restored_tokens(batch.documents) == expected_tokens(encoder, documents, "document")


# Chunks


@pytest.mark.parametrize("task", ["query", "document"])
@pytest.mark.parametrize("chunk_tokens", [1, 16, 30, 1000])
@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_chunks_restored_are_the_tokens_of_the_texts_in_their_order(
    task: str, chunk_tokens: int, padding_side: str, encoder: MultiVectorEncoder
) -> None:
    encoder.tokenizer.padding_side = padding_side
    tokenized = tokenize(encoder, TEXTS, task=task, chunk_tokens=chunk_tokens)
    tokens = restored_tokens(tokenized)
    if task == "query" and padding_side == "left":
        # The expansion stands where the padding was.
        expansion = encoder.tokenizer.mask_token_id
        tokens = [sorted(ids, key=lambda token: token == expansion) for ids in tokens]
    assert tokens == expected_tokens(encoder, TEXTS, task)


@pytest.mark.parametrize("chunk_tokens", [1, 16, 30, 45, 1000])
def test_no_chunk_exceeds_chunk_tokens_unless_it_is_one_text(chunk_tokens: int, encoder: MultiVectorEncoder) -> None:
    tokenized = tokenize(encoder, TEXTS, task="document", chunk_tokens=chunk_tokens)
    for chunk in tokenized.chunks:
        texts, width = chunk["input_ids"].shape
        assert texts == 1 or texts * width <= chunk_tokens


@pytest.mark.parametrize("chunk_tokens", [16, 30, 45])
def test_a_chunk_takes_as_many_texts_as_fit(chunk_tokens: int, encoder: MultiVectorEncoder) -> None:
    chunks = tokenize(encoder, TEXTS, task="document", chunk_tokens=chunk_tokens).chunks
    assert len(chunks) > 1
    for chunk, following in pairwise(chunks):
        next_length = int(following["attention_mask"].sum(dim=1)[0])
        assert (len(chunk["input_ids"]) + 1) * next_length > chunk_tokens


def test_texts_are_sorted_by_length_within_and_across_chunks(encoder: MultiVectorEncoder) -> None:
    tokenized = tokenize(encoder, TEXTS, task="document", chunk_tokens=30)
    lengths = [length for chunk in tokenized.chunks for length in chunk["attention_mask"].sum(dim=1).tolist()]
    assert lengths == sorted(len(tokens) for tokens in expected_tokens(encoder, TEXTS, "document"))
    assert len(set(lengths)) > 3


@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_a_chunk_is_as_wide_as_its_longest_text(padding_side: str, encoder: MultiVectorEncoder) -> None:
    encoder.tokenizer.padding_side = padding_side
    for chunk in tokenize(encoder, TEXTS, task="document", chunk_tokens=30).chunks:
        longest = int(chunk["attention_mask"].sum(dim=1).max())
        assert chunk["attention_mask"].shape[1] == longest
        assert chunk["token_type_ids"].shape == chunk["input_ids"].shape == chunk["attention_mask"].shape


def test_document_tokens_are_those_that_the_tokenizer_makes(encoder: MultiVectorEncoder) -> None:
    texts = [*TEXTS, " ".join(TEXTS)]
    lengths = [len(tokens) for tokens in expected_tokens(encoder, texts, "document")]
    tokenized = tokenize(encoder, texts, task="document", chunk_tokens=1)
    assert max(lengths) == 16
    assert tokenized.tokens == sum(lengths)
    assert tokenized.padded_tokens == sum(lengths)


def test_padded_tokens_are_texts_times_width_in_one_chunk(encoder: MultiVectorEncoder) -> None:
    lengths = [len(tokens) for tokens in expected_tokens(encoder, TEXTS, "document")]
    tokenized = tokenize(encoder, TEXTS, task="document", chunk_tokens=1000)
    assert tokenized.tokens == sum(lengths)
    assert tokenized.padded_tokens == len(TEXTS) * max(lengths)


def test_expansion_counts_as_tokens(encoder: MultiVectorEncoder) -> None:
    tokenized = tokenize(encoder, TEXTS, task="query", chunk_tokens=1000)
    assert tokenized.tokens == tokenized.padded_tokens == 8 * len(TEXTS)


def test_without_expansion_the_padding_of_queries_does_not_count(encoder: MultiVectorEncoder) -> None:
    transformer = encoder[0]
    assert isinstance(transformer, Transformer)
    transformer.query_expansion = None
    tokenized = tokenize(encoder, ["a", "what is the cat"], task="query", chunk_tokens=1000)
    # [CLS] [Q] a [SEP], and seven of the longer query.
    assert tokenized.tokens == 4 + 7
    assert tokenized.padded_tokens == 2 * 7


def test_a_text_without_a_marker_gets_none(encoder: MultiVectorEncoder) -> None:
    encoder.prompts["document"] = ""
    tokenized = tokenize(encoder, ["the cat"], task="document", chunk_tokens=1000)
    assert encoder.tokenizer.convert_ids_to_tokens(restored_tokens(tokenized)[0]) == ["[CLS]", "the", "cat", "[SEP]"]
