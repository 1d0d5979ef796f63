"""Retrieval sets: what becomes of a table of examples, and of several sets."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from datasets import Dataset

from tests.trainer.datafiles import make_set_config
from trainer.data.files import Source
from trainer.data.retrieval import RetrievalSet
from trainer.data.tables import WITH_TEXTS, TrainingSet, identity, set_of_rows, with_texts


def make_set(*rows: dict[str, Any]) -> TrainingSet:
    return set_of_rows("made", make_set_config("pairs"), Source(), Dataset.from_list(list(rows), features=WITH_TEXTS))


def make_row(
    query: str, documents: Sequence[str], *, positives: int = 1, scores: Sequence[float] = ()
) -> dict[str, Any]:
    return with_texts("made:1", query, list(documents), positives=positives, scores=scores)


def named(*texts: str) -> list[str]:
    """The ids that these texts have in what a teacher asks."""
    return [str(identity(text)) for text in texts]


def test_repeated_queries_and_texts_are_merged_and_every_document_is_in_the_corpus() -> None:
    examples = make_set(
        make_row("what is a cat", ["an animal", "a fish", "a dog"]),
        make_row("what swims", ["a fish"]),
        make_row("what is a cat", ["it meows", "a dog"]),
    )
    retrieval = RetrievalSet.from_examples(examples)
    assert retrieval.queries == {"q0": "what is a cat", "q1": "what swims"}
    assert retrieval.corpus == {"d0": "an animal", "d1": "a fish", "d2": "a dog", "d3": "it meows"}
    assert retrieval.judgements == {"q0": {"d0": 1, "d3": 1}, "q1": {"d1": 1}}
    assert retrieval.candidates is None


def test_all_positives_of_an_example_answer_it() -> None:
    examples = make_set(
        make_row("what swims", ["a fish", "a whale", "a dog"], positives=2), make_row("what barks", ["a dog"])
    )
    retrieval = RetrievalSet.of(examples)
    assert retrieval.corpus == {"d0": "a fish", "d1": "a whale", "d2": "a dog"}
    assert retrieval.judgements == {"q0": {"d0": 1, "d1": 1}, "q1": {"d2": 1}}


def test_a_selection_of_examples_asks_its_own_alone() -> None:
    examples = make_set(*(make_row(f"query {row}", [f"answer {row}", "another"]) for row in range(5)))
    retrieval = RetrievalSet.of(examples.select([4, 2]))
    assert retrieval == RetrievalSet(
        queries={"q0": "query 4", "q1": "query 2"},
        corpus={"d0": "answer 4", "d1": "another", "d2": "answer 2"},
        judgements={"q0": {"d0": 1}, "q1": {"d2": 1}},
    )


def test_the_teachers_ten_best_documents_have_the_grades_10_to_1_and_others_none() -> None:
    texts = [f"text {number}" for number in range(12)]
    scores = [float(12 - number) for number in range(12)]
    examples = make_set(
        make_row("what", texts, scores=scores), make_row("which", ["a fish", "text 1"], scores=[-1.0, 0.5])
    )
    retrieval = RetrievalSet.of(examples)
    what, which, fish = named("what", "which", "a fish")
    ids = named(*texts)
    assert retrieval.queries == {what: "what", which: "which"}
    assert retrieval.corpus == {**dict(zip(ids, texts, strict=True)), fish: "a fish"}
    assert retrieval.judgements == {
        what: dict(zip(ids[:10], range(10, 0, -1), strict=True)),
        which: {ids[1]: 10, fish: 9},
    }
    assert retrieval.candidates == {what: ids, which: [ids[1], fish]}


def test_equal_texts_of_a_teacher_are_one_document() -> None:
    examples = make_set(make_row("what", ["a cat", "a dog", "a cat"], scores=[2.0, 1.5, 1.0]))
    retrieval = RetrievalSet.from_teacher(examples)
    what, cat, dog = named("what", "a cat", "a dog")
    assert retrieval.corpus == {cat: "a cat", dog: "a dog"}
    assert retrieval.candidates == {what: [dog, cat]}
    assert retrieval.judgements == {what: {dog: 10, cat: 9}}


def test_a_teachers_examples_of_one_query_are_ranked_together() -> None:
    examples = make_set(
        make_row("what", ["a", "b"], scores=[0.9, 0.3]), make_row("what", ["c", "a"], scores=[1.5, 0.9])
    )
    retrieval = RetrievalSet.from_teacher(examples)
    what, a, b, c = named("what", "a", "b", "c")
    assert retrieval.queries == {what: "what"}
    assert retrieval.candidates == {what: [c, a, b]}
    assert retrieval.judgements == {what: {c: 10, a: 9, b: 8}}


def test_a_set_in_which_an_example_has_no_scores_is_no_teachers() -> None:
    examples = make_set(make_row("what", ["a", "b"], scores=[0.3, 0.9]), make_row("which", ["c", "a"]))
    assert RetrievalSet.of(examples).judgements == {"q0": {"d0": 1}, "q1": {"d2": 1}}


# As the set is read


def test_a_set_is_read_with_prefixes_and_lengths_of_its_config() -> None:
    retrieval = RetrievalSet({"q0": "what"}, {"d0": "a"}, {"q0": {"d0": 1}})
    config = make_set_config("pairs", path="x.jsonl", query_prefix="ask: ", document_prefix="", document_length=7)
    asked = retrieval.read_as(config)
    assert asked == replace(retrieval, query_prefix="ask: ", document_prefix="", document_length=7)
    assert asked.query_length is None
