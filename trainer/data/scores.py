"""What a teacher says of a query's documents: lists in a cell, numbers, and the order that they give."""

import ast
import json
from contextlib import suppress
from typing import Any

import numpy as np

from configs.schema import ConfigError, Positive

# The largest number of float32, in which losses are computed.
LARGEST = 3.4028234663852886e38
# A teacher's distribution is one document's where that has more than this share.
ONE_HOT = 0.99


def listed(place: str, name: str, value: Any) -> list[Any]:
    """A list, or a text that holds one, as JSON or as Python writes it."""
    if isinstance(value, str):
        with suppress(json.JSONDecodeError, RecursionError):
            value = json.loads(value)
    if isinstance(value, str):
        with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            value = ast.literal_eval(value)
    if not isinstance(value, list):
        raise ConfigError(f"{place}: {name}={value!r:.40} must be a list, or a text that holds one as JSON")
    return value


def checked_score(place: str, value: Any) -> float:
    # No comparison holds of NaN.
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= LARGEST:
        raise ConfigError(f"{place}: scores holds {value!r:.40}, which must be a finite number")
    return float(value)


def is_one_hot(scores: "np.ndarray[tuple[int], np.dtype[np.float64]]", temperature: float) -> bool:
    """Whether the softmax of a query's scores leaves one document nearly all."""
    # The largest of a softmax is one over the sum of all relative to it.
    return bool(1 / np.exp((scores - scores.max()) / temperature).sum() > ONE_HOT)


def ranked(
    place: str, name: str, documents: list[str], scores: list[float], *, positive: Positive
) -> tuple[list[str], list[float]]:
    """Documents and their scores from the best to the worst, the positive first. Raises ConfigError where there is not
    one score a document, or nothing to compare."""
    if len(scores) != len(documents):
        raise ConfigError(f"{place}: {len(scores)} scores of {len(documents)} {name}: give one score a document")
    if len(documents) < 2:
        raise ConfigError(
            f"{place}: {name} has {len(documents)}, and 2 or more can be compared: add some, or remove the row"
        )
    pairs = list(zip(documents, scores, strict=True))
    first = [pairs.pop(0)] if positive is Positive.first else []
    # sorted keeps the order of the file among equal scores, in reverse as well.
    pairs = first + sorted(pairs, key=lambda pair: pair[1], reverse=True)
    return [document for document, _ in pairs], [score for _, score in pairs]
