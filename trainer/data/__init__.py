"""From files to examples: what a run trains on and what it is scored on.

A set of examples (`tables.TrainingSet`) is three tables on disk: queries, documents, and examples that name rows of
both, the positives first, with a teacher's scores and the place, file:line, where each stands. A new format gets a file
here that returns such a set, and its line in `_load_set`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from configs.schema import ConfigError, DataConfig, DataFormat, SetConfig
from trainer.data import beir, distillation_ids, pairs, python_functions, stanford
from trainer.data.retrieval import RetrievalSet
from trainer.data.tables import TrainingSet


@dataclass(frozen=True)
class Data:
    """What a run needs: examples to train on, and what to score on."""

    sets: Sequence[TrainingSet]
    """One, or those of a mix."""
    evaluation: Mapping[str, RetrievalSet]
    """By the name of the set that it is of; a set may have none."""

    @property
    def size(self) -> int:
        """Examples of all sets."""
        return sum(map(len, self.sets))


def load_data(config: DataConfig) -> Data:
    """Read, check and split the data.

    Raises ConfigError that names the key, or file:line, of what is missing, malformed or empty.
    """
    data, errors = load_sets(config)
    if errors:
        raise ConfigError(errors[0])
    return data


def load_sets(config: DataConfig) -> tuple[Data, list[str]]:
    """Read, check and split the data; of a set that cannot be read, what is wrong with it, in a line."""
    sets, evaluations, errors = list[TrainingSet](), dict[str, RetrievalSet](), list[str]()
    for name, each in named_sets(config).items():
        try:
            examples, evaluation = _load_set(name, each)
        except ConfigError as error:
            errors.append(str(error))
            continue
        sets.append(examples)
        if evaluation is not None:
            evaluations[name] = evaluation
    return Data(sets, evaluations), errors


def load_evaluation(name: str, config: SetConfig) -> tuple[RetrievalSet | None, list[str]]:
    """Return what a run is scored on of one set, if anything, and what was left out, in words. Of a BEIR folder with an
    evaluation split, nothing else is read.

    Raises ConfigError as `load_data` does.
    """
    if config.format is DataFormat.beir and config.evaluation_split is not None:
        retrieval, warnings = beir.load_evaluation(config)
        return retrieval.read_as(config), warnings
    examples, evaluation = _load_set(name, config)
    return evaluation, list(examples.warnings)


def named_sets(config: DataConfig) -> Mapping[str, SetConfig]:
    """The sets of a mix, or the one set, by name."""
    return config.sets or {Path(config.path or config.format.name).stem: config}


def _what(name: str, config: SetConfig) -> str:
    return f"data.path={config.path}" if config.path is not None else f"data={name}"


def _load_set(name: str, config: SetConfig) -> tuple[TrainingSet, RetrievalSet | None]:
    held_out: TrainingSet | RetrievalSet | None
    match config.format:
        case DataFormat.pairs | DataFormat.scored:
            train, held_out = pairs.load(name, config)
        case DataFormat.beir:
            train, held_out = beir.load(name, config)
        case DataFormat.distillation_ids:
            train, held_out = distillation_ids.load(name, config)
        case DataFormat.stanford:
            train, held_out = stanford.load(name, config)
        case DataFormat.python_functions:
            train, held_out = python_functions.load(name, config)
        case DataFormat.mix:
            raise AssertionError("parse_config lets no mix of mixes pass")
    if not len(train):
        raise ConfigError(
            f"{_what(name, config)}: no example is left to train on: give more, or lower data.evaluation_fraction or "
            "data.max_empty"
        )
    if isinstance(held_out, TrainingSet):
        held_out = RetrievalSet.of(held_out)
    return train, held_out.read_as(config) if held_out is not None else None
