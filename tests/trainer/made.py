"""A few examples, made by hand, whose lengths in tokens are known."""

from dataclasses import fields, replace
from typing import Any

import numpy as np
from datasets import Dataset
from sentence_transformers import MultiVectorEncoder

from configs.schema import DataConfig, DataFormat, MixedBatch, SetConfig
from trainer.data import Data
from trainer.data.files import Source
from trainer.data.retrieval import RetrievalSet
from trainer.data.tables import WITH_TEXTS, TrainingSet, set_of_rows, with_texts
from trainer.data.tokens import Task, TokenizedTexts, tokenized

# Each word is one token; [CLS], the marker and [SEP] make three more: 4, 5, 6, 9 and 10 tokens.
QUERIES = ["what", "what is", "what is a", "what is a cat that meows", "which animal is a cat that meows"]
# 5, 7, 16, 17 and 17 tokens.
POSITIVES = ["the cat", "a dog that barks", *(" ".join(["fish"] * count) for count in (13, 14, 14))]
NEGATIVES = [["a", "dog"], [], ["what"], [], ["the", "fish", "swims"]]
# What the terms with a teacher need of a config.
DISTILLATION = ("data=distillation_ids", "data.path=unused", "loss=distillation")
MARGINS = ("data=distillation_ids", "data.path=unused", "loss=margin_mse")


# Nothing is set: all documents of a query are taken, at the encoder's own lengths.
SETTINGS: dict[str, Any] = dict.fromkeys((field.name for field in fields(SetConfig)), None)
NO_SETTINGS = SetConfig(**SETTINGS | {"format": DataFormat.pairs, "root": ""})
NO_MIX: dict[str, Any] = {
    "mix": {},
    "mix_by_size": 0.0,
    "mix_batches": MixedBatch.one_set,
    "sets": {},
    "length_window": None,
}


def make_data(*, negatives: bool = False, evaluation: RetrievalSet | None = None) -> Data:
    rows = zip(QUERIES, POSITIVES, NEGATIVES, strict=True)
    documents = [[positive, *(texts if negatives else [])] for _, positive, texts in rows]
    return Data([to_examples(documents, [[]] * len(QUERIES))], {} if evaluation is None else {"made": evaluation})


def to_examples(documents: list[list[str]], scores: list[list[float]]) -> TrainingSet:
    rows = [
        with_texts(f"made.jsonl:{row}", query, own, scores=given)
        for row, (query, own, given) in enumerate(zip(QUERIES, documents, scores, strict=False), start=1)
    ]
    return to_set(rows)


def to_set(rows: list[dict[str, object]], *, name: str = "made", **changes: Any) -> TrainingSet:
    """Rows as `with_texts` makes them; changes: keys of the set."""
    config = replace(NO_SETTINGS, **changes)
    return set_of_rows(name, config, Source(), Dataset.from_list(rows, features=WITH_TEXTS))


def make_data_config(**changes: Any) -> DataConfig:
    """Of one set without settings, or of a mix of sets that have their own."""
    return DataConfig(**vars(NO_SETTINGS) | NO_MIX | changes)


def with_config(data: Data, config: SetConfig) -> Data:
    """The same examples, trained with as a config says."""
    return replace(data, sets=[replace(each, config=config) for each in data.sets])


def chunked(encoder: MultiVectorEncoder, texts: list[str], task: Task, chunk_tokens: int) -> TokenizedTexts:
    table = tokenized(Dataset.from_dict({"text": texts}), encoder, task)
    return table.chunks(np.arange(len(texts)), chunk_tokens=chunk_tokens)
