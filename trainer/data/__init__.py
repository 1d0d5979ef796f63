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
    """What a run needs: examples to train on, and a set to score on, or None."""

    sets: Sequence[TrainingSet]
    """One, or those of a mix."""
    evaluation: RetrievalSet | None

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
    for name, each in _named(config).items():
        try:
            examples, evaluation = _load_set(name, each)
        except ConfigError as error:
            errors.append(str(error))
            continue
        sets.append(examples)
        if evaluation is not None:
            evaluations[name] = evaluation
    return Data(sets, RetrievalSet.union(evaluations) if evaluations else None), errors


def load_evaluation(config: DataConfig) -> tuple[RetrievalSet, list[str]]:
    """Return what a run with this data is scored on, and what was left out, in words. Of a BEIR folder with an
    evaluation split, nothing else is read.

    Raises ConfigError as `load_data` does, and where the run has no score.
    """
    evaluations, warnings = dict[str, RetrievalSet](), list[str]()
    for name, each in _named(config).items():
        if each.format is DataFormat.beir and each.evaluation_split is not None:
            evaluations[name], left_out = beir.load_evaluation(each)
            warnings += left_out
            continue
        examples, evaluation = _load_set(name, each)
        warnings += examples.warnings
        if evaluation is not None:
            evaluations[name] = evaluation
    if not evaluations:
        raise ConfigError(
            "the data has no example to score on: set data.evaluation_split, data.evaluation_path or "
            "data.evaluation_fraction"
        )
    return RetrievalSet.union(evaluations), warnings


def _named(config: DataConfig) -> Mapping[str, SetConfig]:
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
    return train, held_out
