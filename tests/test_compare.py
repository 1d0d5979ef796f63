"""Runs compared as a user types it, on the folders of tiny runs, against loops over their scores and vectors."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sentence_transformers import MultiVectorEncoder

from scripts import compare
from tests.conftest import ROOT, run_command, tiny_overrides, type_here
from tests.test_train import PAIRS, read_json, read_lines, write_pairs
from trainer.metrics import read_scores, write_scores
from trainer.significance import change_interval, holm, randomisation_p

pytestmark = pytest.mark.usefixtures("own_caches", "as_loud_as_before")


@pytest.fixture(scope="module")
def runs(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs a, b (another seed of it) and c (another head)."""
    folder = tmp_path_factory.mktemp("runs")
    pairs = write_pairs(folder)
    keys = [key for key in tiny_overrides(tiny_bert, folder) if not key.startswith("output_dir=")]
    keys += ["data=pairs", f"data.path={pairs}", f"data.evaluation_path={pairs}"]
    keys += ["trainer.batch_size=4", "trainer.steps=2", "optimizer.learning_rate=3e-3"]
    for name, own in (("a", ["seed=1"]), ("b", ["seed=2"]), ("c", ["seed=1", "head=mlp_residual"])):
        done = type_here(*keys, *own, f"output_dir={folder}/{name}", f"name={name}")
        assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def given(tmp_path: Path) -> Callable[..., str]:
    """A folder with scores alone."""

    def give(name: str, *values: float, metric: str = "ndcg@10", first: int = 0) -> str:
        (tmp_path / name).mkdir(exist_ok=True)
        scores = {f"q{number}": value for number, value in enumerate(values, start=first)}
        write_scores(tmp_path / name / "scores.jsonl", {metric: scores})
        return f"{tmp_path}/{name}"

    return give


Give = Callable[..., str]


def compared(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    output = tmp_path / "comparison.json"
    assert compare.main([*arguments, f"output={output}", "overwrite=true"]) == 0
    found: dict[str, Any] = read_json(output)
    return found


def lines_of(text: str) -> list[str]:
    return [" ".join(line.split()) for line in text.splitlines()]


# --- statistics ---


def test_each_run_is_compared_to_the_first_query_by_query(
    given: Give, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {
        "a": [0.0, 0.5, 1.0, 0.25, 0.5, 0.3],
        "b": [0.5, 0.5, 0.9, 1.0, 0.75, 0.3],
        "c": [0.0, 0.4, 1.0, 0.2, 0.1, 0.2],
    }
    found = compared(tmp_path, f"runs=[{','.join(given(name, *own) for name, own in values.items())}]")
    first, *others = values.values()
    p_values = [randomisation_p(first, other) for other in others]
    for row, other, p, p_holm in zip(found["comparisons"], others, p_values, holm(p_values), strict=True):
        assert row["difference"] == pytest.approx(sum(other) / 6 - sum(first) / 6)
        assert (row["low"], row["high"]) == change_interval(first, other)
        assert (row["p"], row["p_holm"]) == (p, p_holm)
    counts = [[row[key] for key in ("wins", "ties", "losses")] for row in found["comparisons"]]
    assert counts == [[3, 2, 1], [0, 2, 4]]
    assert [run["mean"] for run in found["runs"]] == pytest.approx([sum(own) / 6 for own in values.values()])
    lines = lines_of(capsys.readouterr().out)
    row = found["comparisons"][0]
    assert f"B 0.6583 +0.2333 {row['low']:+.4f} to {row['high']:+.4f} {row['p']:.4f} {row['p_holm']:.4f} 3 2 1" in lines
    assert "A 0.4250" in lines
    # The largest difference first; those that tie are no differences.
    assert [each["query"] for each in row["queries"]] == ["q3", "q0", "q4", "q2"]
    assert row["queries"][0] == {"query": "q3", "scores": [0.25, 1.0], "difference": 0.75}
    assert f"no texts of {tmp_path}/a: it has neither config.yaml nor result.json" in lines


def test_a_run_against_itself_has_p_1_and_no_difference(given: Give, tmp_path: Path) -> None:
    a = given("a", *(number / 50 for number in range(50)))
    [row] = compared(tmp_path, f"runs=[{a},{a}]")["comparisons"]
    assert (row["difference"], row["p"], row["p_holm"], row["ties"]) == (0.0, 1.0, 1.0, 50)
    assert row["queries"] == []


def test_seeds_in_brackets_are_averaged_by_query(given: Give, tmp_path: Path) -> None:
    seeds = [given("a1", 0.0, 1.0), given("a2", 0.5, 0.5), given("b1", 0.5, 0.0), given("b2", 1.0, 0.25)]
    found = compared(tmp_path, "runs=[[{},{}],[{},{}]]".format(*seeds))
    assert found["runs"][0]["runs"] == seeds[:2]
    [row] = found["comparisons"]
    assert {each["query"]: each["scores"] for each in row["queries"]} == {"q0": [0.25, 0.75], "q1": [0.75, 0.125]}


def test_the_order_of_the_queries_is_no_matter(given: Give, tmp_path: Path) -> None:
    a, b = given("a", 0.1, 0.2, 0.9), given("b", 0.1, 0.2, 0.9)
    path = Path(b, "scores.jsonl")
    path.write_text("".join(f"{line}\n" for line in reversed(path.read_text().splitlines())))
    assert compared(tmp_path, f"runs=[{a},{b}]")["comparisons"][0]["ties"] == 3


# --- real runs ---


def test_the_tokens_are_those_that_make_up_the_score(runs: Path, tmp_path: Path) -> None:
    found = compared(tmp_path, f"runs=[{runs}/a,{runs}/c]", "metric=map", "queries=3")
    rows = found["comparisons"][0]["queries"]
    scores = [read_scores(runs / name / "scores.jsonl")["map"] for name in "ac"]
    changes = sorted((abs(scores[1][query] - scores[0][query]) for query in scores[0]), reverse=True)
    assert changes[0] > 0
    assert [abs(row["difference"]) for row in rows] == [change for change in changes[:3] if change]
    encoders = [MultiVectorEncoder(str(runs / name / "model"), device="cpu") for name in "ac"]
    texts = {query: positive for query, positive, _ in PAIRS}
    for row in rows:
        assert row["document_text"] == texts[row["text"]]
        for encoder, matched in zip(encoders, row["matches"], strict=True):
            [query], [document] = encoder.encode_query([row["text"]]), encoder.encode_document([row["document_text"]])
            products = [[float(token.double() @ other.double()) for other in document] for token in query]
            assert [match["similarity"] for match in matched] == pytest.approx(list(map(max, products)), abs=1e-5)
            # Queries are filled up with masks, which are scored; documents lose their punctuation.
            features = encoder.tokenizer(row["text"])["input_ids"]
            assert [match["token"] for match in matched][3] == encoder.tokenizer.convert_ids_to_tokens(features)[2]
            assert len(matched) == 8
            score = float(encoder.similarity([query], [document])[0, 0])
            assert sum(match["similarity"] for match in matched) == pytest.approx(score, abs=1e-4)


def test_a_run_is_compared_to_its_own_beginning_as_typed(runs: Path, tmp_path: Path) -> None:
    done = run_command(
        f"runs=[{runs}/a/scores_before.jsonl,{runs}/a]",
        "metric=map",
        program=(sys.executable, str(ROOT / "scripts" / "compare.py")),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    lines = lines_of(done.stdout)
    result = read_json(runs / "a" / "result.json")
    assert f"A {result['before']['map']:.4f}" in lines
    assert any(line.startswith(f"B {result['after']['map']:.4f} ") for line in lines)
    assert any(line.startswith(f"no tokens of {runs}/a/scores_before.jsonl: no model is beside") for line in lines)
    assert "B: token matches similarity" in lines
    assert "one seed a side: nothing is said of other seeds; compare [[A1,A2],[B1,B2]]" in lines
    assert not list(tmp_path.iterdir())


def test_an_evaluation_is_loaded_as_its_result_says(runs: Path, tmp_path: Path) -> None:
    for name in ("a", "c"):
        (tmp_path / name).mkdir()
        shutil.copy(runs / name / "scores.jsonl", tmp_path / name)
        data = ["data=pairs", f"data.path={runs}/pairs.jsonl", f"data.evaluation_path={runs}/pairs.jsonl"]
        result = {"model": f"{runs}/{name}/model", "data": data}
        (tmp_path / name / "result.json").write_text(json.dumps(result))
    ours = compared(tmp_path, f"runs=[{tmp_path}/a,{tmp_path}/c]", "metric=map")
    theirs = compared(tmp_path, f"runs=[{runs}/a,{runs}/c]", "metric=map")
    assert ours["comparisons"] == theirs["comparisons"]
    assert ours["comparisons"][0]["queries"][0]["matches"][0]


def test_the_tokens_that_fill_a_query_up_are_one_line() -> None:
    found = [
        {"token": token, "document_token": "cat", "similarity": similarity}
        for token, similarity in (("[CLS]", 0.5), ("cat", 0.75), ("cat", 0.25), ("[MASK]", 0.5), ("[MASK]", 0.125))
    ]
    assert compare.shorten(found) == [
        *found[:3],
        {"token": "2 [MASK]", "document_token": "", "similarity": 0.625},
    ]
    assert found[3]["similarity"] == 0.5  # what is written keeps each


def test_without_a_model_the_texts_are_shown_all_the_same(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = Path(shutil.copytree(runs / "c", tmp_path / "c"))
    shutil.rmtree(moved / "model")
    [comparison] = compared(tmp_path, f"runs=[{runs}/a,{moved}]", "metric=map")["comparisons"]
    assert all(row["matches"][0] and row["matches"][1] is None for row in comparison["queries"])
    [problem] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("no tokens of ")]
    assert problem.startswith(f"no tokens of {moved}: backbone.name={moved}/model ")


def test_runs_that_were_scored_on_other_texts_are_no_pair(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Path(shutil.copytree(runs / "c", tmp_path / "c"))
    result = read_json(other / "result.json")
    (other / "result.json").write_text(json.dumps(result | {"evaluation_id": result["evaluation_id"] + 1}))
    assert compare.main([f"runs=[{runs}/a,{other}]"]) == 2
    assert f"{other} was scored on queries of other texts than {runs}/a" in capsys.readouterr().err
    assert len(read_lines(other / "scores.jsonl")) == len(PAIRS)


# --- mistakes ---


def test_what_cannot_be_compared_gets_one_line(given: Give, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, other, metric = given("a", 0.1, 0.2), given("b", 0.1, 0.2, 0.3, first=1), given("c", 0.1, 0.2, metric="map")
    (tmp_path / "sets").mkdir()
    given("sets/scifact", 0.1)
    written = tmp_path / "there.json"
    written.touch()
    for arguments, message in {
        (): "runs= must name two runs or more, as in runs=[A,B], or several seeds of each, as in "
        "'runs=[[A1,A2],[B1,B2]]'",
        (f"runs=[{a}]",): f"runs=[{a}] must name two runs or more, as in ",
        (f"runs={a}",): f"runs={a} must name two runs or more, as in ",
        (f"runs=[{a}",): f"runs=[{a} must name two runs or more, as in ",
        (f"runs=[{a},{other}]",): f"runs=[{a},{other}]: {other} was scored on other queries than {a}: 3 queries, "
        "2 that the other lacks, first q2 and none of 1 of the other's, first q0",
        (f"runs=[{a},{metric}]",): f"metric=ndcg@10 is not in {metric}/scores.jsonl, which has map",
        (f"runs=[{a},{tmp_path}/none]",): f"runs: there is no {tmp_path}/none: give the folder of a run that was",
        (f"runs=[{a},{tmp_path}/sets]",): f"runs: there is no {tmp_path}/sets/scores.jsonl: name one of scifact in it",
        (f"runs=[{a},{a}]", "metrics=map"): "metrics is no key; the nearest is metric, of runs, metric, ",
        (f"runs=[{a},{a}]", "queries=few"): "queries=few must be of type integer",
        (f"runs=[{a},{a}]", "queries=-1"): "queries=-1 must be 0 or more",
        (f"runs=[{a},{a}]", f"output={written}"): f"output={written} exists: name another file, or set overwrite=true",
        (f"runs=[{a},{a}]", f"output={tmp_path}/no/x.json"): f"output={tmp_path}/no/x.json cannot be written: ",
    }.items():
        assert compare.main(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {message}"), error
        assert error.count("\n") == 1
