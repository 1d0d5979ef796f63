"""A retrieval set: queries, a corpus, and which documents answer which query."""

from dataclasses import dataclass
from typing import Self

from datasets import Dataset

# Grades of the documents that a teacher puts first, its best first.
TEACHER_GRADES = range(10, 0, -1)


@dataclass(frozen=True)
class RetrievalSet:
    queries: dict[str, str]
    """Text by query id."""
    corpus: dict[str, str]
    """Text by document id."""
    judgements: dict[str, dict[str, int]]
    """Grade by document id, by query id."""
    candidates: dict[str, list[str]] | None = None
    """Ids of the documents that each query ranks, by query id; None ranks the whole corpus for each."""

    @classmethod
    def from_examples(cls, examples: Dataset) -> Self:
        """Each different text once: the corpus is all documents of the examples, and positives have grade 1."""
        query_ids: dict[str, str] = {}
        document_ids: dict[str, str] = {}
        judgements: dict[str, dict[str, int]] = {}
        for example in examples:
            query = query_ids.setdefault(example["query"], f"q{len(query_ids)}")
            documents = [document_ids.setdefault(text, f"d{len(document_ids)}") for text in example["documents"]]
            judgements.setdefault(query, {})[documents[0]] = 1
        return cls(
            queries={identifier: text for text, identifier in query_ids.items()},
            corpus={identifier: text for text, identifier in document_ids.items()},
            judgements=judgements,
        )

    @classmethod
    def from_teacher(cls, examples: Dataset) -> Self:
        """Each query ranks its own documents again: the teacher's ten best have the grades 10 to 1, others none.

        Queries and documents are told apart by the ids of the examples; examples of one query are taken together.
        """
        queries: dict[str, str] = {}
        corpus: dict[str, str] = {}
        scores: dict[str, dict[str, float]] = {}
        for example in examples:
            query, documents = str(example["query_id"]), [str(identifier) for identifier in example["document_ids"]]
            queries[query] = example["query"]
            corpus.update(zip(documents, example["documents"], strict=True))
            scores.setdefault(query, {}).update(zip(documents, example["scores"], strict=True))
        candidates = {query: sorted(own, key=own.__getitem__, reverse=True) for query, own in scores.items()}
        return cls(
            queries=queries,
            corpus=corpus,
            judgements={query: dict(zip(own, TEACHER_GRADES, strict=False)) for query, own in candidates.items()},
            candidates=candidates,
        )
