"""Retrieval sets: what becomes of a table of examples."""

from collections.abc import Sequence

from datasets import Dataset

from trainer.data.retrieval import RetrievalSet


def make_example(
    query: str,
    documents: Sequence[str],
    *,
    query_id: int = 0,
    document_ids: Sequence[int] | None = None,
    scores: Sequence[float] = (),
) -> dict[str, object]:
    return {
        "query": query,
        "query_id": query_id,
        "documents": list(documents),
        "document_ids": list(range(len(documents)) if document_ids is None else document_ids),
        "scores": list(scores),
        "place": "file:1",
    }


def test_repeated_queries_and_texts_are_merged_and_every_document_is_in_the_corpus() -> None:
    examples = Dataset.from_list(
        [
            make_example("what is a cat", ["an animal", "a fish", "a dog"]),
            make_example("what swims", ["a fish"]),
            make_example("what is a cat", ["it meows", "a dog"]),
        ]
    )
    retrieval = RetrievalSet.from_examples(examples)
    assert retrieval.queries == {"q0": "what is a cat", "q1": "what swims"}
    assert retrieval.corpus == {"d0": "an animal", "d1": "a fish", "d2": "a dog", "d3": "it meows"}
    assert retrieval.judgements == {"q0": {"d0": 1, "d3": 1}, "q1": {"d1": 1}}
    assert retrieval.candidates is None


def test_the_teachers_ten_best_documents_have_the_grades_10_to_1_and_others_none() -> None:
    texts = [f"text {number}" for number in range(12)]
    scores = [float(12 - number) for number in range(12)]
    examples = Dataset.from_list(
        [
            make_example("what", texts, query_id=70, document_ids=range(100, 112), scores=scores),
            make_example("which", ["a fish", "text 1"], query_id=5, document_ids=[9, 101], scores=[0.5, -1.0]),
        ]
    )
    retrieval = RetrievalSet.from_teacher(examples)
    assert retrieval.queries == {"70": "what", "5": "which"}
    assert retrieval.corpus == {str(100 + number): text for number, text in enumerate(texts)} | {"9": "a fish"}
    assert retrieval.judgements == {
        "70": {
            "100": 10, "101": 9, "102": 8, "103": 7, "104": 6, "105": 5, "106": 4, "107": 3, "108": 2, "109": 1,
        },
        "5": {"9": 10, "101": 9},
    }  # fmt: skip
    assert retrieval.candidates == {"70": [str(number) for number in range(100, 112)], "5": ["9", "101"]}


def test_a_teachers_documents_are_told_apart_by_their_ids_and_not_by_their_texts() -> None:
    examples = Dataset.from_list(
        [make_example("what", ["a cat", "a cat"], query_id=1, document_ids=[3, 4], scores=[2.0, 1.0])]
    )
    retrieval = RetrievalSet.from_teacher(examples)
    assert retrieval.corpus == {"3": "a cat", "4": "a cat"}
    assert retrieval.judgements == {"1": {"3": 10, "4": 9}}


def test_a_teachers_examples_of_one_query_are_ranked_together() -> None:
    examples = Dataset.from_list(
        [
            make_example("what", ["a", "b"], query_id=1, document_ids=[10, 11], scores=[0.9, 0.3]),
            make_example("what", ["c", "a"], query_id=1, document_ids=[12, 10], scores=[1.5, 0.9]),
        ]
    )
    retrieval = RetrievalSet.from_teacher(examples)
    assert retrieval.queries == {"1": "what"}
    assert retrieval.candidates == {"1": ["12", "10", "11"]}
    assert retrieval.judgements == {"1": {"12": 10, "10": 9, "11": 8}}
