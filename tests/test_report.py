"""Pages as a user gets them: at the end of a run, and by the script."""

import json
import sys
from pathlib import Path

import pytest

from scripts import report
from tests.conftest import ROOT, run_command, tiny_overrides, type_here
from tests.pages import Page
from tests.test_train import read_json, write_pairs

pytestmark = pytest.mark.usefixtures("own_caches")


@pytest.fixture
def tiny_run(tiny_bert: Path, tmp_path: Path) -> list[str]:
    """Arguments of a run of seconds that ends in a page: tiny weights, eight pairs, scored on themselves."""
    path = write_pairs(tmp_path)
    return [
        *(item for item in tiny_overrides(tiny_bert, tmp_path) if item != "report=false"),
        *("data=pairs", f"data.path={path}", f"data.evaluation_path={path}", "trainer.batch_size=4"),
        *("trainer.steps=3", "evaluation.every_steps=1"),
    ]


def test_a_run_ends_in_a_page_that_the_script_draws_again(
    tiny_run: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = type_here(*tiny_run, "head=mlp_residual")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "run"
    assert f"report: {folder}/report.html" in done.stdout.splitlines()
    result = read_json(folder / "result.json")
    assert result["command"].startswith("python train.py name=test ")
    assert [name for name, *_ in result["modules"]] == ["Transformer", "Dense", "Dense", "MultiVectorMask", "Normalize"]
    assert set(result["versions"]) >= {"python", "torch", "sentence-transformers"}
    assert set(result["hardware"]) == {"processor", "cores", "memory", "system", "device"}
    # Two texts for each of 8 queries, with [CLS], [SEP] and the marker.
    assert result["data"]["sets"]["pairs"]["examples"] == "8, of 8 different queries"
    assert result["data"]["sets"]["pairs"]["query tokens"].endswith("; 8 cut 0.0% of 8")
    assert result["facts"]["loss"] == "1 contrastive of maxsim"

    written = (folder / "report.html").read_bytes()
    page = Page.of(folder / "report.html")
    assert page.loaded() == []
    assert page.of_element("h2") == ["Scores", "Training", "Model", "Data", "How it was made"]
    assert result["command"] in page.of_element("code")
    assert "8 of 8 queries of the evaluation are training queries" in " ".join(page.of_element("p"))
    assert (folder / "figures" / "loss.png").exists()

    (folder / "report.html").unlink()
    assert report.main([f"run={folder}"]) == 0
    assert capsys.readouterr().out == f"report: {folder}/report.html\n"
    assert (folder / "report.html").read_bytes() == written

    # A new run in its place takes page and figures with it.
    done = type_here(*tiny_run, "overwrite=true", "report=false")
    assert done.returncode == 0, done.stderr
    assert not (folder / "report.html").exists()
    assert not (folder / "figures").exists()


def test_a_page_that_cannot_be_drawn_costs_no_run(
    tiny_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("no font\nat all")

    monkeypatch.setattr("trainer.report.to_svg", fail)
    done = type_here(*tiny_run)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "run"
    assert f"no report (no font): python scripts/report.py run={folder} draws it" in done.stdout.splitlines()
    assert read_json(folder / "result.json")["steps"] == 3
    assert done.stdout.splitlines()[-1].strip().startswith("scores = ")
    assert not (folder / "report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing is given: give one run=<folder> or one sweep=<folder>"),
        (["run=a", "run=b"], "run=a run=b is given: give one run=<folder> or one sweep=<folder>"),
        (["folder=a"], "folder=a is not known: give run=<folder> or sweep=<folder>"),
        (["run="], "run= is no folder: give the output folder of a run"),
        (["sweep=nowhere"], "sweep=nowhere is no folder: give the output folder of a sweep"),
        (["run=."], "run=.: the folder has no config.yaml: give the output folder of a run"),
        (["sweep=."], "sweep=. has no finished job: give the folder of a sweep, or run it to its end"),
    ],
)
def test_what_cannot_be_drawn_gets_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert report.main(arguments) == 2
    assert capsys.readouterr() == ("", f"report: {message}\n")
    assert not list(tmp_path.iterdir())


def test_the_script_is_typed_from_anywhere(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 0}) + "\n")
    done = run_command(
        "run=.", cwd=tmp_path, program=(sys.executable, str(ROOT / "scripts" / "report.py")), PYTHONPATH=""
    )
    assert done.returncode == 2
    assert done.stderr == "report: run=.: the folder has no config.yaml: give the output folder of a run\n"
