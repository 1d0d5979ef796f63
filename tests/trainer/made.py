"""A few examples, made by hand, whose lengths in tokens are known."""

from datasets import Dataset

from trainer.data import Data
from trainer.data.files import identity
from trainer.data.retrieval import RetrievalSet

# Each word is one token; [CLS], the marker and [SEP] make three more: 4, 5, 6, 9 and 10 tokens.
QUERIES = ["what", "what is", "what is a", "what is a cat that meows", "which animal is a cat that meows"]
# 5, 7, 16, 17 and 17 tokens.
POSITIVES = ["the cat", "a dog that barks", *(" ".join(["fish"] * count) for count in (13, 14, 14))]
NEGATIVES = [["a", "dog"], [], ["what"], [], ["the", "fish", "swims"]]
# What the terms with a teacher need of a config.
DISTILLATION = ("data=distillation", "data.path=unused", "loss=distillation")
MARGINS = ("data=distillation", "data.path=unused", "loss=margin_mse")


def make_data(*, negatives: bool = False, evaluation: RetrievalSet | None = None) -> Data:
    rows = zip(QUERIES, POSITIVES, NEGATIVES, strict=True)
    documents = [[positive, *(texts if negatives else [])] for _, positive, texts in rows]
    return Data(to_examples(documents, [[]] * len(QUERIES)), evaluation)


def to_examples(documents: list[list[str]], scores: list[list[float]]) -> Dataset:
    return Dataset.from_list(
        [
            {
                "query": query,
                "query_id": identity(query),
                "documents": own,
                "document_ids": [identity(text) for text in own],
                "scores": given,
                "place": f"made.jsonl:{row}",
            }
            for row, (query, own, given) in enumerate(zip(QUERIES, documents, scores, strict=False), start=1)
        ]
    )
