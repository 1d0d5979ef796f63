"""From files to examples: what a run trains on and what it is scored on.

Examples are a `datasets.Dataset` with the columns query (text), query_id (int64), documents (list of texts, the
positive first), document_ids (list of int64, one a document), scores (list of float64: the teacher's, one a document,
or an empty list without a teacher) and place (where the example stands, as file:line). Ids are never 0, which stands
for no document. A new format gets a file here that returns such a table, and its line in `load_data`.
"""

from dataclasses import dataclass

from datasets import Dataset

from configs.schema import ConfigError, DataConfig, DataFormat
from trainer.data import distillation, pairs, python_functions
from trainer.data.retrieval import RetrievalSet


@dataclass(frozen=True)
class Data:
    """What a run needs: examples to train on, and a set to score on, or None."""

    train: Dataset
    evaluation: RetrievalSet | None


def load_data(config: DataConfig) -> Data:
    """Read, check and split the data.

    Raises ConfigError that names the key, or file:line, of what is missing, malformed or empty.
    """
    match config.format:
        case DataFormat.python_functions:
            train, held_out = python_functions.load(config)
        case DataFormat.pairs:
            train, held_out = pairs.load(config)
        case DataFormat.distillation:
            train, held_out = distillation.load(config)
    if not len(train):
        raise ConfigError(
            f"data.path={config.path}: no example is left to train on: give more, or lower data.evaluation_fraction"
        )
    if not len(held_out):
        return Data(train, None)
    has_teacher = config.format is DataFormat.distillation
    return Data(train, RetrievalSet.from_teacher(held_out) if has_teacher else RetrievalSet.from_examples(held_out))
