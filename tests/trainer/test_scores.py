"""Lists in a cell, a teacher's numbers and the order that they give: values, and each mistake by its whole message."""

from typing import Any

import pytest

from configs.schema import ConfigError, Positive
from trainer.data.scores import checked_score, listed, ranked

PLACE = "a.jsonl:7"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ([1, "a"], [1, "a"]),
        ([], []),
        ('["a", "b"]', ["a", "b"]),
        (" [1, 2.5, -3e-2] ", [1, 2.5, -0.03]),
        ("['a', \"it's\"]", ["a", "it's"]),
        ("[1, None]", [1, None]),
        ("\"['a', 'b']\"", ["a", "b"]),
    ],
)
def test_a_list_is_one_or_a_text_that_holds_one_as_json_or_as_python_writes_it(value: Any, expected: Any) -> None:
    assert listed(PLACE, "scores", value) == expected


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "None"),
        (7, "7"),
        ("7", "7"),
        ("a dog", "'a dog'"),
        ("", "''"),
        ('{"a": 1}', "{'a': 1}"),
        ("(1, 2)", "(1, 2)"),
        ("[1, 2", "'[1, 2'"),
        ("[" * 9000, "'" + "[" * 39),
        ("__import__('os').getcwd()", "\"__import__('os').getcwd()\""),
        ("x" * 100, "'" + "x" * 39),
    ],
)
def test_what_is_no_list_is_named(value: Any, shown: str) -> None:
    with pytest.raises(ConfigError) as caught:
        listed(PLACE, "document_ids", value)
    assert str(caught.value) == (f"{PLACE}: document_ids={shown} must be a list, or a text that holds one as JSON")


@pytest.mark.parametrize(
    ("value", "expected"), [(3, 3.0), (-0.5, -0.5), (0, 0.0), (3.4028234663852886e38, 3.4028234663852886e38)]
)
def test_a_score_is_a_finite_number(value: Any, expected: float) -> None:
    score = checked_score(PLACE, value)
    assert (score, type(score)) == (expected, float)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (float("nan"), "nan"),
        (float("inf"), "inf"),
        (float("-inf"), "-inf"),
        (True, "True"),
        (False, "False"),
        (None, "None"),
        ("2", "'2'"),
        ([1], "[1]"),
        (1e39, "1e+39"),
        (-1e39, "-1e+39"),
        (10**309, "1" + "0" * 39),
    ],
)
def test_a_score_that_is_no_finite_number_of_float32_is_named(value: Any, shown: str) -> None:
    with pytest.raises(ConfigError) as caught:
        checked_score(PLACE, value)
    assert str(caught.value) == f"{PLACE}: scores holds {shown}, which must be a finite number"


@pytest.mark.parametrize(
    ("positive", "documents", "scores"),
    [
        (Positive.best, ["b", "d", "a", "c"], [9.0, 9.0, 0.5, -1.0]),
        (Positive.first, ["a", "b", "d", "c"], [0.5, 9.0, 9.0, -1.0]),
    ],
)
def test_the_positive_goes_first_and_the_others_from_the_best_to_the_worst(
    positive: Positive, documents: list[str], scores: list[float]
) -> None:
    given = ["a", "b", "c", "d"], [0.5, 9.0, -1.0, 9.0]
    assert ranked(PLACE, "documents", *given, positive=positive) == (documents, scores)
    assert given == (["a", "b", "c", "d"], [0.5, 9.0, -1.0, 9.0])


@pytest.mark.parametrize(
    ("documents", "scores", "problem"),
    [
        (["a", "b"], [1.0], "1 scores of 2 documents: give one score a document"),
        (["a"], [1.0, 2.0], "2 scores of 1 documents: give one score a document"),
        (["a"], [1.0], "documents has 1, and 2 or more can be compared: add some, or remove the row"),
        ([], [], "documents has 0, and 2 or more can be compared: add some, or remove the row"),
    ],
)
def test_documents_that_cannot_be_compared_are_named(documents: list[str], scores: list[float], problem: str) -> None:
    for positive in Positive:
        with pytest.raises(ConfigError) as caught:
            ranked(PLACE, "documents", documents, scores, positive=positive)
        assert str(caught.value) == f"{PLACE}: {problem}"
