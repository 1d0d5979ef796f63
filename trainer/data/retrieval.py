"""A retrieval set: queries, a corpus, and which documents answer which query."""

from dataclasses import dataclass
from typing import Self

from datasets import Dataset


@dataclass(frozen=True)
class RetrievalSet:
    queries: dict[str, str]
    """Text by query id."""
    corpus: dict[str, str]
    """Text by document id."""
    judgements: dict[str, dict[str, int]]
    """Grade by document id, by query id."""

    @classmethod
    def from_examples(cls, examples: Dataset) -> Self:
        """Each different text once: the corpus is all positives and negatives of the examples."""
        query_ids: dict[str, str] = {}
        document_ids: dict[str, str] = {}
        judgements: dict[str, dict[str, int]] = {}
        for example in examples:
            query = query_ids.setdefault(example["query"], f"q{len(query_ids)}")
            for document in (example["positive"], *example["negatives"]):
                document_ids.setdefault(document, f"d{len(document_ids)}")
            judgements.setdefault(query, {})[document_ids[example["positive"]]] = 1
        return cls(
            queries={identifier: text for text, identifier in query_ids.items()},
            corpus={identifier: text for text, identifier in document_ids.items()},
            judgements=judgements,
        )
