"""The pages of runs and sweeps, read as a browser reads them, from folders made by hand."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread

from configs.schema import Config, ConfigError, save_config
from tests.pages import Page
from tests.trainer.made_groups import make_group
from trainer.report import read_run, report_run, report_sweep
from trainer.sweep import Job, report
from trainer.theme import DARK, LIGHT

Metrics = list[dict[str, Any]]

STEPS = 40
NAME = "<i>mine</i> & 'yours'"
BEFORE = {"ndcg@10": 0.25, "mrr@10": 0.5, "map": 0.375, "recall@100": 1.0}
AFTER = {"ndcg@10": 0.5, "mrr@10": 0.75, "map": 0.625, "recall@100": 1.0}
RESULT: dict[str, Any] = {
    "model": "outputs/run/model",
    "best": {"model": "outputs/run/best", "step": 20, "ndcg@10": 0.5625},
    "steps": STEPS,
    "queries": 1280,
    "seconds": 191.4,
    "processes": 1,
    "before": BEFORE,
    "after": AFTER,
    "change": {"metric": "ndcg@10", "change": 0.25, "low": 0.125, "high": 0.3125},
    "phases": {"queries": 0.125, "backward": 0.5},
}
MADE: dict[str, Any] = {
    "command": "python train.py 'backbone.query_prefix=<q> '",
    "versions": {"python": "3.11.7", "torch": "2.13.0"},
    "hardware": {"processor": "a <fast> one", "memory": "24 GiB"},
    "facts": {
        "checkpoint": "x, a plain model",
        "warnings": "3 of 40 examples repeat\n1 <empty>",
        "loss": "1 contrastive",
    },
    "modules": [["Transformer", "BertModel, 32 wide", 22_592], ["Normalize", "unit length", 0]],
    "data": {"sets": {"medquad": {"examples": "40, of 39 different queries"}}, "evaluation": "50 queries"},
}
CURVES = [
    "loss",
    "queries_per_second",
    "document_tokens_per_second",
    "padding",
    "learning_rate",
    "gradient_norm",
]


def make_lines(steps: int = STEPS) -> Metrics:
    """Metrics as the loop logs them, scored before, halfway and after."""
    lines: Metrics = [{"step": 0, **{f"eval/{name}": value for name, value in BEFORE.items()}}]
    for step in range(1, steps + 1):
        loss = 2 ** (-step / 10)
        lines.append(
            {
                "step": step,
                "train/loss": loss,
                "train/contrastive": loss,
                "train/same_document_masked": 0.0,
                "train/learning_rate": 1e-4 * (1 - step / steps),
                "train/gradient_norm": 4 * loss,
                "train/queries_per_second": 10.0 if step % 2 else 30.0,
                "train/document_tokens_per_second": 1000.0,
                "train/padding_fraction": 0.25 if step % 2 else 0.0,
                "train/seconds": 3.0 if step % 2 else 1.0,
            }
        )
    lines[20] |= {f"eval/{name}": value + 0.0625 for name, value in AFTER.items()}
    lines[-1] |= {f"eval/{name}": value for name, value in AFTER.items()}
    return lines


@pytest.fixture(scope="session")
def drawn() -> dict[str, Any]:
    """What several tests look at, and is made once: the config, and the page of a finished run."""
    return {}


@pytest.fixture
def make_run(make_config: Callable[..., Config], drawn: dict[str, Any], tmp_path: Path) -> Callable[..., Path]:
    """A run folder of these metrics and this result."""
    if "config" not in drawn:
        drawn["config"] = make_config()

    def make(lines: Metrics | None = None, result: Any = None, *, folder: Path | None = None, name: str = NAME) -> Path:
        folder = folder or tmp_path / "run"
        folder.mkdir(parents=True)
        save_config(replace(drawn["config"], name=name), str(folder / "config.yaml"))
        rows = make_lines() if lines is None else lines
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in rows))
        if result is not None:
            (folder / "result.json").write_text(json.dumps(result))
        return folder

    return make


@pytest.fixture
def finished(make_run: "MakeRun", drawn: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a finished run, in its folder, for tests that change neither."""
    if "page" not in drawn:
        folder = make_run(result=RESULT | MADE, folder=tmp_path_factory.mktemp("finished") / "run")
        (folder / "figures").mkdir()
        (folder / "figures" / "mine.png").write_text("mine")
        drawn["page"] = report_run(folder)
    path: Path = drawn["page"]
    return path


@pytest.fixture
def without_png(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that read the page: a PNG takes longer than all else."""
    monkeypatch.setattr("trainer.report.to_png", lambda figure: b"")


MakeRun = Callable[..., Path]


def titles(page: Page) -> list[str]:
    return page.of_element("strong")


def drawings(page: Page) -> list[str]:
    """Names of the figures, in the page's order."""
    found = [own["href"] or "" for tag, own in page.elements if tag == "a" and (own["href"] or "").endswith(".png")]
    assert len(found) == sum(tag == "svg" for tag, _ in page.elements)
    return [path.removeprefix("figures/").removesuffix(".png") for path in found]


def path_points(page: Page, line: str) -> int:
    """Through how many points a line of a figure goes."""
    [path] = re.findall(rf'<g id="{line}">\s*<path d="([^"]*)"', page.text)
    return len(re.findall(r"[ML]", path))


# --- a finished run ---


def test_a_page_is_one_whole_file_that_fetches_nothing(finished: Path) -> None:
    page = Page.of(finished)
    assert page.loaded() == []
    assert "@import" not in page.text
    assert "url(" not in re.sub(r'clip-path="url\(#[\w.-]+\)"', "", page.text)
    tags = {tag for tag, _ in page.elements}
    assert {"main", "header", "section", "figure", "figcaption", "svg", "details"} <= tags
    assert "script" not in tags
    assert page.attributes("lang") == ["en"]
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.elements
    ids = page.attributes("id")
    assert len(ids) == len(set(ids))
    labels = [own.get("aria-label") for tag, own in page.elements if tag == "svg"]
    assert labels == titles(page)


def test_a_page_is_light_and_dark(finished: Path) -> None:
    page = Page.of(finished)
    [style] = page.of_element("style")
    root, _, rest = style.partition("@media (prefers-color-scheme: dark)")
    for name in LIGHT:
        assert f"--{name}: {LIGHT[name]};" in root
        assert f"--{name}: {DARK[name]};" in rest
    # No colour stands anywhere else.
    assert not re.findall(r"#[0-9a-f]{6}\b", page.text.replace(style, "").split("<body>")[1])


def test_what_was_given_is_escaped(finished: Path) -> None:
    page = Page.of(finished)
    assert page.of_element("h1") == page.of_element("title") == [NAME]
    assert MADE["command"] in page.of_element("code")
    assert "Warning: 1 <empty>" in page.of_element("p")
    assert "a <fast> one" in page.of_element("td")
    assert not {tag for tag, _ in page.elements} & {"i", "q", "fast", "empty"}


def test_each_curve_goes_through_each_step(finished: Path) -> None:
    page = Page.of(finished)
    assert drawings(page) == ["before_after", "metrics", *CURVES]
    for name in CURVES:
        if name != "learning_rate":
            assert path_points(page, f"{name}-each") == STEPS
        assert path_points(page, f"{name}-line-0") == STEPS
    assert path_points(page, "metrics-line-0") == 3


def test_titles_say_what_is_seen(finished: Path) -> None:
    page = Page.of(finished)
    losses = [2 ** (-step / 10) for step in range(1, STEPS + 1)]
    assert titles(page) == [
        "ndcg@10: 0.2500 before, 0.5000 after",
        "ndcg@10: 0.2500 at step 0, 0.5000 at step 40",
        f"Loss: {sum(losses[:5]) / 5:.3g} at first, {sum(losses[-5:]) / 5:.3g} at the end",
        # In 3 seconds 30 queries, in 1 second 30.
        "15.0 queries a second",
        "1,000 document tokens a second",
        # In 3 seconds 3000 tokens of 4000, in 1 second 1000 of 1000.
        "20.0% of the document tokens that were computed are padding",
        "Learning rate: up to 9.75e-05",
        f"Gradient norm: median {2 * (losses[19] + losses[20]):.3g}, cut to 1 in 48% of the steps",
    ]
    assert any("ndcg@10 is best at step 20." in words for words in page.of_element("figcaption"))
    assert any("Thick: mean of the 5 values around each" in words for words in page.of_element("p"))


def test_the_tables_are_those_of_the_run(finished: Path) -> None:
    page = Page.of(finished)
    lines = page.of_element("p")
    assert lines[:4] == [
        "Finished: 40 steps, 1,280 queries, 3 min 11 s in 1 process",
        "Seconds of a step: encode queries 0.125, backward 0.500",
        "The best model is that of step 20: outputs/run/best",
        "Model: outputs/run/model",
    ]
    assert "Change of ndcg@10: +0.2500, 95 % interval over the queries +0.1250 to +0.3125." in lines
    cells = page.of_element("td")
    assert cells[:4] == ["ndcg@10", "0.2500", "0.5000", "+0.2500"]
    assert cells[12:16] == ["recall@100", "1.0000", "1.0000", "+0.0000"]
    place = cells.index("Transformer")
    assert cells[place : place + 5] == ["Transformer", "BertModel, 32 wide", "22,592", "Normalize", "unit length"]
    assert {"40, of 39 different queries", "2.13.0", "24 GiB", "1 contrastive"} <= set(cells)
    assert {"medquad", "Evaluation", "Command", "Versions", "Hardware"} <= set(page.of_element("h3"))
    [config] = [words for words in page.of_element("code") if words.startswith("name:")]
    assert config == " ".join((finished.parent / "config.yaml").read_text().split())


def test_the_same_run_gives_the_same_bytes(finished: Path, tmp_path: Path) -> None:
    again = shutil.copytree(finished.parent, tmp_path / "again")
    for path in (again / "report.html", *(again / "figures" / f"{name}.png" for name in CURVES)):
        path.unlink()
    report_run(again)
    files = [path.relative_to(again) for path in again.rglob("*") if path.is_file()]
    assert len(files) == 5 + 2 + len(CURVES)
    for file in files:
        assert (again / file).read_bytes() == (finished.parent / file).read_bytes(), file


def test_figures_lie_beside_the_page(finished: Path) -> None:
    figures = finished.parent / "figures"
    assert {path.stem for path in figures.iterdir()} == {*drawings(Page.of(finished)), "mine"}
    assert (figures / "mine.png").read_text() == "mine"
    assert imread(figures / "loss.png").shape == (866, 1440, 4)


@pytest.mark.usefixtures("without_png")
def test_figures_that_a_page_no_longer_shows_go(make_run: MakeRun) -> None:
    folder = make_run(result=RESULT)
    report_run(folder)
    assert (folder / "figures" / "metrics.png").exists()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in make_lines()[:5]))
    report_run(folder)
    assert not (folder / "figures" / "metrics.png").exists()


# --- runs that have more, or less ---


@pytest.mark.usefixtures("without_png")
def test_terms_and_widths_and_sets_have_figures_of_their_own(make_run: MakeRun) -> None:
    lines = make_lines()
    for line in lines:
        line |= {f"{key}/32": line[key] / 2 for key in list(line) if key.startswith("eval/")}
        if step := line["step"]:
            del line["train/contrastive"]
            line |= {
                f"train/{name}@{width}": width / step for name in ("contrastive", "distillation") for width in (128, 32)
            }
            line |= {"train/temperature": 1 / step, "train/learning_rate/muon": 1e-3, "train/learning_rate/adamw": 8e-5}
            line[f"train/{'lfrqa' if step % 4 else 'medquad'}/loss"] = 1.0
    page = Page.of(report_run(make_run(lines, RESULT)))
    own = ["contrastive", "distillation", "loss_by_set"]
    assert drawings(page) == ["before_after", "metrics", "widths", "loss", *own, *CURVES[1:], "temperature"]
    assert {"width 128", "width 32", "full", "32", "lfrqa", "medquad", "muon", "adamw"} <= set(page.of_element("text"))
    assert path_points(page, "loss_by_set-line-0") == 30
    assert path_points(page, "loss_by_set-line-1") == 10
    assert "ndcg@10 by width: 0.5000 at full, 0.2500 at 32" in titles(page)
    assert "Learning rate: up to 0.001 of muon, 8e-05 of adamw" in titles(page)
    # A row a metric: those of each width are in the table alone.
    assert not any("/32" in words for words in page.of_element("text"))


@pytest.mark.usefixtures("without_png")
def test_a_run_of_an_earlier_version_has_a_page_without_what_it_lacks(make_run: MakeRun) -> None:
    page = Page.of(report_run(make_run(result=RESULT)))
    assert page.of_element("h2") == ["Scores", "Training", "How it was made"]
    assert drawings(page) == ["before_after", "metrics", *CURVES]


@pytest.mark.usefixtures("without_png")
def test_a_run_that_is_not_finished_has_a_page_of_what_there_is(make_run: MakeRun) -> None:
    folder = make_run(make_lines()[:25])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 25, "train/lo')  # killed in the middle
    page = Page.of(report_run(folder))
    assert (
        page.of_element("p")[0] == f"Not finished: 24 of 110 steps are logged; python train.py resume={folder} goes on"
    )
    assert path_points(page, "loss-line-0") == 24
    assert path_points(page, "metrics-line-0") == 2
    assert not (folder / "result.json").exists()


@pytest.mark.usefixtures("without_png")
def test_a_run_that_evaluates_nothing_has_its_curves(make_run: MakeRun) -> None:
    lines = [{key: value for key, value in line.items() if not key.startswith("eval/")} for line in make_lines()]
    nothing = dict.fromkeys(("best", "before", "after", "change"))
    page = Page.of(report_run(make_run(lines[1:], RESULT | nothing)))
    assert drawings(page) == CURVES


def test_a_run_that_was_stopped_before_its_first_step_has_its_config(make_run: MakeRun) -> None:
    page = Page.of(report_run(make_run([])))
    assert drawings(page) == []
    assert page.of_element("h2") == ["How it was made"]


@pytest.mark.usefixtures("without_png")
def test_values_that_were_not_finite_are_left_out(make_run: MakeRun) -> None:
    lines = make_lines()
    lines[7]["train/gradient_norm"] = None
    page = Page.of(report_run(make_run(lines, RESULT)))
    norms = sorted(4 * 2 ** (-step / 10) for step in range(1, STEPS + 1) if step != 7)
    assert any(title.startswith(f"Gradient norm: median {norms[19]:.3g},") for title in titles(page))
    assert path_points(page, "gradient_norm-each") == STEPS - 1


@pytest.mark.usefixtures("without_png")
def test_a_long_run_is_drawn_by_its_extremes(make_run: MakeRun) -> None:
    lines = make_lines(3000)
    lines[1234]["train/loss"] = 9.0
    page = Page.of(report_run(make_run(lines, RESULT)))
    assert 500 < path_points(page, "loss-each") <= 1000
    assert any("Thin: least and largest of 6 steps" in words for words in page.of_element("p"))
    assert (len(page.text) - 100_000) / 3000 < 100  # bytes a step


# --- what is no run ---


@pytest.mark.parametrize("missing", ["config.yaml", "metrics.jsonl"])
def test_a_folder_that_is_no_run_is_named_with_what_it_lacks(missing: str, make_run: MakeRun) -> None:
    folder = make_run()
    (folder / missing).unlink()
    with pytest.raises(ConfigError) as caught:
        report_run(folder)
    assert str(caught.value) == f"run={folder}: the folder has no {missing}: give the output folder of a run"


def test_a_line_that_is_no_json_is_named(make_run: MakeRun) -> None:
    folder = make_run()
    text = (folder / "metrics.jsonl").read_text().replace('"step": 3,', '"step": ,')
    (folder / "metrics.jsonl").write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_run(folder)
    assert str(caught.value).startswith(f"{folder}/metrics.jsonl:4 is no JSON (Expecting value")


@pytest.mark.usefixtures("without_png")
def test_a_page_that_cannot_be_written_says_why(make_run: MakeRun) -> None:
    folder = make_run(result=RESULT)
    (folder / "figures").write_text("in the way")
    with pytest.raises(ConfigError, match=r"report\.html cannot be written: .*File exists"):
        report_run(folder)
    assert not (folder / "report.html").exists()


# --- a sweep ---


@pytest.mark.usefixtures("without_png")
def test_a_sweep_has_a_page_of_its_groups_and_jobs(make_run: MakeRun, tmp_path: Path) -> None:
    sweep = tmp_path / "head-0123abcd"
    groups = [
        make_group("head=linear", [0.5, 0.6], jobs=["l1", "l2"]),
        make_group("head=<mlp>", [0.7, 0.75], difference=0.175, low=0.125, high=0.25, p=0.00001, jobs=["m1", "m2"]),
    ]
    for name in ("l1", "l2", "m1", "m2"):
        make_run(result=RESULT | MADE, folder=sweep / name, name=name)
    (sweep / "l1" / "report.html").touch()
    heads = {"l1": "linear", "l2": "linear", "m1": "<mlp>", "m2": "<mlp>", "x": "?"}
    for number, (name, head) in enumerate(heads.items()):
        job = Job(number, name, ["trainer.steps=3", f"head={head}", f"seed={number % 2 + 1}"], error="no <member>")
        report(sweep, job if name == "x" else replace(job, state="finished", score=0.5, seconds=2.0, error=None))
    path = report_sweep(sweep, groups)
    assert path == sweep / "report.html"
    page = Page.of(path)
    assert page.loaded() == []
    assert page.of_element("h1") == ["head-0123abcd"]
    assert page.of_element("p")[0] == "2 groups of 4 finished jobs, scored by ndcg@10"
    assert drawings(page) == ["differences", "seeds", "quality_and_size"]
    assert "ndcg@10 by group and seed: head=<mlp> has the highest mean, 0.7250" in titles(page)
    cells = page.of_element("td")
    assert cells[:6] == ["head=linear", "2", "0.5500 ± 0.0707", "49,152", "256", "12.5"]
    assert cells[7:12] == ["head=<mlp>", "2", "0.7250 ± 0.0354", "+0.1750 (+0.1250 to +0.2500)", "<0.0001"]
    assert "trainer.steps=3" in page.of_element("code")
    place = cells.index("finished")
    assert cells[place - 3 : place + 1] == ["head=linear seed=1", "0.5000", "2.0", "finished"]
    assert "failed: no <member>" in cells
    links = [own["href"] for tag, own in page.elements if tag == "a"]
    assert "l1/report.html" in links
    assert "l2/report.html" not in links
    assert any(words.startswith("Difference: to head=linear, over the queries") for words in page.of_element("p"))
    first = path.read_bytes()
    assert report_sweep(sweep, groups).read_bytes() == first


@pytest.mark.usefixtures("without_png")
def test_a_sweep_of_one_group_has_no_differences(make_run: MakeRun, tmp_path: Path) -> None:
    make_run(result=RESULT, folder=tmp_path / "sweep" / "job", name="job")
    page = Page.of(report_sweep(tmp_path / "sweep", [make_group("all jobs", [0.5], jobs=["job"])]))
    assert drawings(page) == ["seeds", "quality_and_size"]


def test_a_sweep_without_scores_has_no_page(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no job with a score"):
        report_sweep(tmp_path, [])
