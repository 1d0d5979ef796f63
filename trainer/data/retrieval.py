"""A retrieval set: queries, a corpus, and which documents answer which query."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

from configs.schema import SetConfig
from trainer.data.tables import TrainingSet

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
    ignore_identical_ids: bool = False
    """Whether no query ranks the document that has its own id."""
    unjudged: frozenset[str] = frozenset()
    """Ids of further queries, which nobody has judged and which rank nothing."""
    query_prefix: str | None = None
    """What stands before each query; None is the model's own, as of the next three."""
    document_prefix: str | None = None
    query_length: int | None = None
    """Tokens at which a query is cut."""
    document_length: int | None = None

    def read_as(self, config: SetConfig) -> Self:
        """The set with prefixes and lengths as its config has them."""
        return replace(
            self,
            query_prefix=config.query_prefix,
            document_prefix=config.document_prefix,
            query_length=config.query_length,
            document_length=config.document_length,
        )

    @classmethod
    def of(cls, examples: TrainingSet) -> Self:
        """What held-out examples ask: of a teacher's, its order of their own documents."""
        return cls.from_teacher(examples) if examples.has_teacher else cls.from_examples(examples)

    @classmethod
    def from_examples(cls, examples: TrainingSet) -> Self:
        """Each different text once: the corpus is all documents of the examples, and positives have grade 1."""
        query_ids: dict[str, str] = {}
        document_ids: dict[str, str] = {}
        judgements: dict[str, dict[str, int]] = {}
        for row in range(len(examples)):
            example = examples.example(row)
            query = query_ids.setdefault(example["query"], f"q{len(query_ids)}")
            documents = [document_ids.setdefault(text, f"d{len(document_ids)}") for text in example["documents"]]
            judgements.setdefault(query, {}).update(dict.fromkeys(documents[: example["positives"]], 1))
        return cls(
            queries={identifier: text for text, identifier in query_ids.items()},
            corpus={identifier: text for text, identifier in document_ids.items()},
            judgements=judgements,
        )

    @classmethod
    def from_teacher(cls, examples: TrainingSet) -> Self:
        """Each query ranks its own documents again: the teacher's ten best have the grades 10 to 1, others none.

        Equal texts are one query, or one document; examples of one query are taken together.
        """
        queries: dict[str, str] = {}
        corpus: dict[str, str] = {}
        scores: dict[str, dict[str, float]] = {}
        for row in range(len(examples)):
            example = examples.example(row)
            query, documents = str(example["query_identity"]), list(map(str, example["document_identities"]))
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


def queries_of(sets: Mapping[str, RetrievalSet]) -> list[str]:
    """The texts of the queries of all sets."""
    return [text for each in sets.values() for text in each.queries.values()]
