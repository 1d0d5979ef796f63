"""Sweeps as a user types them: what each job leaves, how they add up, and what typing the same again does."""

import csv
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from configs.schema import Config, parse_config
from scripts import report
from tests.conftest import ENVIRONMENT, ROOT, refused, run_command, tiny_overrides, type_here
from tests.pages import Page
from tests.test_train import read_json, read_lines, write_pairs
from train import sweep_folder
from trainer.sweep import job_name

DEADLINE_SECONDS = 240
Row = dict[str, str]
INTERRUPTED = "interrupted; the same command goes on with what is left"


@pytest.fixture(scope="module")
def tiny_jobs(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments that make every job a run of seconds: tiny weights, eight pairs, scored on themselves."""
    path = write_pairs(tmp_path_factory.mktemp("pairs"))
    return [
        # Each job is named and placed by the sweep, after the preset that is typed.
        "backbone=minilm",
        *(item for item in tiny_overrides(tiny_bert, path) if not item.startswith(("name=", "output_dir="))),
        *("data=pairs", f"data.path={path}", f"data.evaluation_path={path}", "trainer.batch_size=4"),
    ]


def named(overrides: list[str], name: str) -> str:
    """The folder of the job that gets these overrides."""
    ConfigStore.instance().store("schema", Config)
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return job_name(parse_config(compose("train", [*overrides, f"name={name}"])))


def folder_of(arguments: list[str]) -> Path:
    return sweep_folder([argument for argument in arguments if not argument.startswith("-")])[0]


def read_rows(sweep: Path) -> list[Row]:
    with (sweep / "sweep.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def read_groups(output: str) -> list[list[str]]:
    """The cells of the table that ends what a sweep prints, without the header."""
    lines = output.splitlines()
    first = next(number for number, line in enumerate(lines) if line.split()[:2] == ["seeds", "score"])
    last = next(number for number, line in enumerate(lines) if line.startswith("score: "))
    return [line.split() for line in lines[first + 1 : last]]


def states(rows: list[Row]) -> list[str]:
    return [row["state"] for row in rows]


def starts(sweep: Path, job: str) -> list[list[str]]:
    """The arguments of each process that was started for a job."""
    lines = (sweep / f"{job}.log").read_text(encoding="utf-8").splitlines()
    return [shlex.split(line)[3:] for line in lines if line.startswith("$ ")]


def files_of(sweep: Path, job: str) -> dict[str, tuple[int, int]]:
    """When each file of a job was written, and its size."""
    paths = [sweep / f"{job}.log", *(path for path in (sweep / job).rglob("*") if path.is_file())]
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in paths}


def steps_of(folder: Path) -> list[int]:
    return [line["step"] for line in read_lines(folder / "metrics.jsonl")]


# --- four jobs, of which one fails at first ---


@dataclass(frozen=True)
class Typed:
    """A command, and what there was after it."""

    done: subprocess.CompletedProcess[str]
    rows: list[Row]
    files: dict[str, dict[str, tuple[int, int]]]
    """By job."""


@dataclass(frozen=True)
class FourJobs:
    """The same sweep typed twice."""

    sweep: Path
    jobs: list[str]
    failing: str
    """The job that cannot be run the first time, as a file lies in the place of its folder."""
    first: Typed
    again: Typed


@pytest.fixture(scope="module")
def four(tiny_jobs: list[str], tmp_path_factory: pytest.TempPathFactory) -> FourJobs:
    cwd = tmp_path_factory.mktemp("four")
    command = ["-m", *tiny_jobs, "trainer.steps=3", "head=linear,mlp_residual", "seed=1,2"]
    jobs = [
        named([*tiny_jobs, "trainer.steps=3", f"head={head}", f"seed={seed}"], f"minilm-{head}-pairs-{seed}")
        for head in ("linear", "mlp_residual")
        for seed in (1, 2)
    ]
    sweep, failing = cwd / folder_of(command), jobs[1]
    sweep.mkdir(parents=True)
    (sweep / failing).write_text("in the way")

    def typed(done: subprocess.CompletedProcess[str]) -> Typed:
        return Typed(done, read_rows(sweep), {job: files_of(sweep, job) for job in jobs})

    first = typed(type_here(*command, cwd=cwd))
    (sweep / failing).unlink()
    return FourJobs(sweep, jobs, failing, first, typed(type_here(*command, cwd=cwd)))


def test_a_job_that_fails_is_a_row_and_the_others_finish(four: FourJobs) -> None:
    assert four.first.done.returncode == 0, four.first.done.stderr
    assert [row["job"] for row in four.first.rows] == four.jobs
    assert states(four.first.rows) == ["finished", "failed", "finished", "finished"]
    errors = [row["error"] for row in four.first.rows]
    where = four.sweep.relative_to(four.sweep.parents[2]) / four.failing
    assert errors == ["", f"output_dir={where} is a file: name a folder", "", ""]
    assert four.first.done.stderr == "1 of 4 jobs did not finish; the same command goes on\n"


def test_each_job_trains_what_its_overrides_say(four: FourJobs) -> None:
    configs: list[Any] = [OmegaConf.load(four.sweep / job / "config.yaml") for job in four.jobs]
    assert [(len(config.head.layers), config.seed) for config in configs] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert [config.head.layers[0].residual for config in configs] == [False, False, True, True]
    losses = {read_lines(four.sweep / job / "metrics.jsonl")[1]["train/loss"] for job in four.jobs}
    assert len(losses) == 4
    overrides = [shlex.split(row["overrides"])[-3:] for row in four.again.rows]
    assert overrides == [
        ["trainer.steps=3", f"head={head}", f"seed={seed}"] for head in ("linear", "mlp_residual") for seed in (1, 2)
    ]


def test_the_page_compares_the_groups_and_the_script_draws_it_again(
    four: FourJobs, capsys: pytest.CaptureFixture[str]
) -> None:
    path = four.sweep / "report.html"
    written, page = path.read_bytes(), Page.of(path)
    assert four.again.done.stdout.splitlines()[-1] == f"report: {path.relative_to(four.sweep.parents[2])}"
    assert page.loaded() == []
    assert page.of_element("p")[0] == "2 groups of 4 finished jobs, scored by ndcg@10"
    cells = page.of_element("td")
    assert [cell for cell in cells if cell.startswith("head=")][:2] == ["head=linear", "head=mlp_residual"]
    assert [cell for cell in cells if cell.startswith("finished")] == [row["state"] for row in four.again.rows]
    assert len(list((four.sweep / "figures").glob("*.png"))) == 3
    assert report.main([f"sweep={four.sweep}"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == f"report: {path}"
    assert any(line.startswith("head=linear  ") for line in printed)
    assert path.read_bytes() == written


def test_typed_again_only_the_job_that_failed_runs(four: FourJobs) -> None:
    assert four.again.done.returncode == 0, four.again.done.stderr
    assert four.again.done.stderr == ""
    assert states(four.again.rows) == ["finished before", "finished", "finished before", "finished before"]
    for job in set(four.jobs) - {four.failing}:
        assert four.again.files[job] == four.first.files[job]
        assert len(starts(four.sweep, job)) == 1
    # It left no folder, so there was nothing to go on with.
    arguments = starts(four.sweep, four.failing)
    assert len(arguments) == 2
    assert arguments[0] == arguments[1]


def test_the_scores_are_those_of_the_runs_and_stay(four: FourJobs) -> None:
    scores = [row["score"] for row in four.again.rows]
    results = [read_json(four.sweep / job / "result.json") for job in four.jobs]
    assert [float(score) for score in scores] == [result["after"]["ndcg@10"] for result in results]
    assert [float(row["seconds"]) for row in four.again.rows] == [result["seconds"] for result in results]
    assert [row["score"] for row in four.first.rows] == [scores[0], "", *scores[2:]]


@pytest.mark.parametrize("time", ["first", "again"])
def test_the_sweep_ends_in_a_table_of_its_groups(time: str, four: FourJobs) -> None:
    typed: Typed = getattr(four, time)
    scores: dict[str, list[float]] = {}
    for row in typed.rows:
        if row["score"]:
            head = next(word for word in shlex.split(row["overrides"])[::-1] if word.startswith("head="))
            scores.setdefault(head, []).append(float(row["score"]))
    rows = read_groups(typed.done.stdout)
    assert [row[:3] for row in rows] == [[head, f"{len(own)}", f"{fmean(own):.4f}"] for head, own in scores.items()]
    linear, residual = scores.values()
    assert rows[1][3:5] == [f"{stdev(residual):.4f}", f"{fmean(residual) - fmean(linear):+.4f}"]
    left_out = [line for line in typed.done.stdout.splitlines() if line.startswith("left out: ")]
    assert [line.split(" ")[2:5] for line in left_out] == [
        [row["job"], "head=linear", "seed=2:"] for row in typed.rows if not row["score"]
    ]
    folder = four.sweep.relative_to(four.sweep.parents[2])
    assert typed.done.stdout.splitlines()[-2:] == [
        f"tables: {folder}/groups.csv and, of the jobs, {folder}/sweep.csv",
        f"report: {folder}/report.html",
    ]


def test_a_sweep_leaves_its_jobs_their_logs_and_a_table(four: FourJobs) -> None:
    assert {path.name for path in four.sweep.iterdir()} == {
        *four.jobs,
        *(f"{job}.log" for job in four.jobs),
        *("jobs", "sweep.csv", "groups.csv", "report.html", "figures", ".lock"),
    }
    assert [path.name for path in four.sweep.parents[2].iterdir()] == ["outputs"]


# --- the folder of a sweep ---


def test_the_folder_is_named_by_what_is_swept_and_a_hash_of_all_that_was_typed() -> None:
    folder = folder_of(["-m", "head=linear,mlp", "trainer.steps=3", "optimizer.learning_rate=1e-4,1e-3"])
    assert folder.parent == Path("outputs/sweeps")
    assert folder.name.startswith("head-learning_rate-")
    assert len(bytes.fromhex(folder.name.removeprefix("head-learning_rate-"))) == 4


@pytest.mark.parametrize(
    "typed",
    [
        ["head=linear,mlp", "-m", "seed=1"],
        ["-m", "seed=1", "head=linear,mlp"],
        ["--multirun", "head=linear,mlp", "seed=1"],
        ["hydra.mode=MULTIRUN", "head=linear,mlp", "seed=1"],
        ["-m", "head=linear,mlp", "seed=1", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
        ["-m", "head=linear,mlp", "seed=1", "tracker=wandb", "tracker.project=other"],
        ["-m", "head=linear,mlp", "seed=1", "sweep.launch='accelerate launch'"],
    ],
    ids=lambda typed: " ".join(typed),
)
def test_how_the_jobs_are_run_and_shown_leaves_the_folder_as_it_is(typed: list[str]) -> None:
    assert folder_of(typed) == folder_of(["-m", "head=linear,mlp", "seed=1"])


@pytest.mark.parametrize("typed", [["head=linear,mlp", "seed=2"], ["head=linear,deep", "seed=1"], ["head=linear,mlp"]])
def test_another_sweep_has_another_folder(typed: list[str]) -> None:
    assert folder_of(["-m", *typed]) != folder_of(["-m", "head=linear,mlp", "seed=1"])


# --- a sweep that is ended early ---


def start(*arguments: str, cwd: Path) -> subprocess.Popen[bytes]:
    """Type a command and go on; what it says goes to files, which the end of this process does not close."""
    with (cwd / "stdout").open("ab") as stdout, (cwd / "stderr").open("ab") as stderr:
        return subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), *arguments],
            cwd=cwd,
            env=os.environ | ENVIRONMENT,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
        )


def wait_until(condition: Callable[[], bool], what: str, driver: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert driver.poll() is None, f"the driver ended before {what}"
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.02)


def has_trained(folder: Path) -> bool:
    """Whether the run in the folder has some steps behind it."""
    with suppress(FileNotFoundError):
        return (folder / "metrics.jsonl").read_bytes().count(b"\n") > 3
    return False


def job_of(tiny_jobs: list[str], *overrides: str) -> str:
    return named([*tiny_jobs, *overrides], "minilm-default-pairs-1")


def test_a_killed_sweep_typed_again_repeats_nothing(tiny_jobs: list[str], tmp_path: Path) -> None:
    # The second is long enough to be met in the middle.
    command = ["-m", *tiny_jobs, "trainer.save_every_steps=20", "trainer.steps=2,150,3"]
    sweep = tmp_path / folder_of(command)
    jobs = [job_of(tiny_jobs, "trainer.save_every_steps=20", f"trainer.steps={steps}") for steps in (2, 150, 3)]
    driver = start(*command, cwd=tmp_path)
    wait_until(lambda: has_trained(sweep / jobs[1]), "the second job", driver)
    driver.kill()
    assert driver.wait(DEADLINE_SECONDS) == -signal.SIGKILL
    assert not (sweep / jobs[1] / "result.json").exists()
    files = files_of(sweep, jobs[0])

    again = type_here(*command, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    rows = read_rows(sweep)
    assert [row["job"] for row in rows] == jobs
    # The process of the second outlived its driver.
    assert states(rows) == ["finished before", "finished before", "finished"]
    assert files_of(sweep, jobs[0]) == files
    assert [len(starts(sweep, job)) for job in jobs] == [1, 1, 1]
    assert [steps_of(sweep / job) for job in jobs] == [list(range(steps + 1)) for steps in (2, 150, 3)]
    assert [float(row["score"]) for row in rows] == [
        read_json(sweep / job / "result.json")["after"]["ndcg@10"] for job in jobs
    ]


def test_term_lets_the_job_save_and_the_same_command_goes_on(tiny_jobs: list[str], tmp_path: Path) -> None:
    # A second job, which fails at once, shows whether the sweep has come to it.
    command = ["-m", *tiny_jobs, "trainer.steps=150,0"]
    sweep = tmp_path / folder_of(command)
    job = job_of(tiny_jobs, "trainer.steps=150")
    driver = start(*command, cwd=tmp_path)
    wait_until(lambda: has_trained(sweep / job), "the first job", driver)
    driver.terminate()
    assert driver.wait(DEADLINE_SECONDS) == 128 + signal.SIGTERM
    assert (tmp_path / "stderr").read_text() == f"{INTERRUPTED}\n"
    rows = read_rows(sweep)
    assert [(row["job"], row["state"], row["score"]) for row in rows] == [(job, "stopped", "")]
    said = (sweep / f"{job}.log").read_text().splitlines()[-1]
    assert said.startswith("stopped after step ")
    stopped = int(said.split()[3])
    assert [path.name for path in (sweep / job / "checkpoints").iterdir()] == [f"step_{stopped:08d}"]
    assert steps_of(sweep / job) == list(range(stopped + 1))

    again = type_here(*command, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert again.stderr == "1 of 2 jobs did not finish; the same command goes on\n"
    rows = read_rows(sweep)
    assert states(rows) == ["finished", "failed"]
    # Found before the job is started.
    assert [row["error"] for row in rows] == ["", "trainer.steps=0 must be positive"]
    assert not (sweep / f"{rows[1]['job']}.log").exists()
    assert starts(sweep, job)[1:] == [[f"resume={sweep.relative_to(tmp_path) / job}"]]
    assert f"resumed after step {stopped}, from " in (sweep / f"{job}.log").read_text()
    assert steps_of(sweep / job) == list(range(151))


# --- jobs that fail ---


@pytest.mark.parametrize(
    ("swept", "error"),
    [
        ("trainer.steps=0,-1", "trainer.steps=0 must be positive"),
        (
            "data.path=first.jsonl,second.jsonl",
            "data.path=first.jsonl: there is no data/first.jsonl or first.jsonl: give an existing file, or set "
            "data.root",
        ),
    ],
    ids=["config", "run"],
)
def test_where_every_job_fails_the_first_error_is_said(
    swept: str, error: str, tiny_jobs: list[str], tmp_path: Path
) -> None:
    command = ["-m", *tiny_jobs, swept]
    done = type_here(*command, cwd=tmp_path, LATEFORGE_DATA="data")
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "2 of 2 jobs did not finish; the same command goes on",
        f"error: {error}",
    ]
    rows = read_rows(tmp_path / folder_of(command))
    assert states(rows) == ["failed", "failed"]
    assert [row["score"] for row in rows] == ["", ""]
    assert rows[0]["error"] == error


def test_any_name_reaches_the_job_and_the_command_names_the_folder_of_the_sweep(
    tiny_jobs: list[str], tmp_path: Path
) -> None:
    # The run says what is wrong with the data, not its command line with the names.
    given = ["data.path=none.jsonl", 'name="it\'s tiny",team/tiny', "hydra.sweep.dir='my sweeps/one'"]
    done = type_here("-m", *tiny_jobs, *given, cwd=tmp_path)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["my sweeps"]
    sweep = tmp_path / "my sweeps" / "one"
    rows = read_rows(sweep)
    jobs = [row["job"] for row in rows]
    assert [job[:-9] for job in jobs] == ["it's tiny", "team-tiny"]
    assert {row["error"].split(":")[0] for row in rows} == {"data.path=none.jsonl"}
    assert {path.name for path in sweep.iterdir()} == {
        *("jobs", "sweep.csv", "groups.csv", ".lock"),
        *(f"{job}.log" for job in jobs),
    }
    assert starts(sweep, jobs[1])[0][-1] == f"output_dir='my sweeps/one/{jobs[1]}'"


@pytest.mark.parametrize("flag", ["--multirun", "hydra.mode=MULTIRUN"])
def test_a_sweep_can_be_asked_for_in_other_words(flag: str, tmp_path: Path) -> None:
    done = type_here(flag, "trainer.steps=0,-1", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "error: trainer.steps=0 must be positive"
    assert states(read_rows(tmp_path / folder_of(["-m", "trainer.steps=0,-1"]))) == ["failed", "failed"]


# --- mistakes in the command ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trainer.stepz=1,2"], "trainer.stepz is no key; the nearest is trainer.steps "),
        (["head=linear,mlp_residul"], "head=mlp_residul is no member; the nearest is mlp_residual, of deep, default"),
        (["hed=linear,mlp"], "hed is no key; the nearest is head "),
        (["seed=[1,2"], "seed=[1,2 cannot be parsed: write key=value"),
        (["seed=1,2", "trainer.steps=many"], "trainer.steps=many must be of type integer"),
        (["seed=1,2", "hydra/launcher=no_such"], "hydra/launcher/no_such: there is no such config"),
        (
            ["seed=1,2", "output_dir=mine"],
            "output_dir=mine: each job of a sweep has its folder in hydra.sweep.dir: name another one with hydra.s",
        ),
        (["seed=1,2", "overwrite=true"], "overwrite=true: each job of a sweep has its folder in hydra.sweep.dir: "),
        (
            ["seed=1,2", "hydra.sweep.dir=outputs/${now:%Y}"],
            "hydra.sweep.dir=outputs/${now:%Y}: write the folder out: typed again, the sweep must find it",
        ),
        (["seed=1,2", "resume=outputs/mine"], "resume=outputs/mine: the folder has no config.yaml"),
        (["--cfg", "job", "seed=1,2"], "Only one of --run, --multirun, --cfg, --info and --shell_completion"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_in_the_command_gets_one_line_and_leaves_nothing(
    arguments: list[str], message: str, tmp_path: Path
) -> None:
    assert refused(type_here("-m", *arguments, cwd=tmp_path)).startswith(message)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("variable", ["RANK=0", "ACCELERATE_MIXED_PRECISION=no"], ids=["torchrun", "accelerate"])
def test_a_sweep_inside_a_launcher_is_refused(variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(*variable.split("="))
    assert refused(type_here("-m", "seed=1,2", cwd=tmp_path)) == (
        "-m under a launcher would start every job in each of its processes: python train.py -m ... "
        "sweep.launch='accelerate launch --num_processes 4' launches each job by itself"
    )
    assert not list(tmp_path.iterdir())


# --- other launchers ---


def test_joblib_runs_jobs_side_by_side(tiny_jobs: list[str], tmp_path: Path) -> None:
    layer = "[{{out_features: {}, bias: true, activation: gelu, residual: false}}]"
    swept = f"head.layers={layer.format(8)},{layer.format(16)}"
    command = ["-m", *tiny_jobs, "trainer.steps=1", "head=linear", swept]
    done = run_command(*command, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    sweep = tmp_path / folder_of(command)
    rows = read_rows(sweep)
    assert states(rows) == ["finished", "finished"]
    # Values of several parts arrive whole.
    layers = [read_layers(sweep / row["job"]) for row in rows]
    assert [[layer["out_features"] for layer in layers[number]] for number in (0, 1)] == [[8], [16]]
    assert [len(starts(sweep, row["job"])) for row in rows] == [1, 1]
    with (sweep / "groups.csv").open(newline="", encoding="utf-8") as file:
        assert [float(group["mean"]) for group in csv.DictReader(file)] == [float(row["score"]) for row in rows]


def read_layers(folder: Path) -> list[dict[str, Any]]:
    config: Any = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
    layers: list[dict[str, Any]] = config["head"]["layers"]
    return layers


def test_submitit_runs_a_job_to_the_end(tiny_jobs: list[str], tmp_path: Path) -> None:
    command = ["-m", *tiny_jobs, "trainer.steps=1", "backbone.query_prefix='[Q], '", "seed=2"]
    done = run_command(*command, "hydra/launcher=submitit_local", "hydra.launcher.timeout_min=5", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    sweep = tmp_path / folder_of(command)
    [row] = read_rows(sweep)
    assert row["state"] == "finished"
    config: Any = OmegaConf.load(sweep / row["job"] / "config.yaml")
    assert (config.backbone.query_prefix, config.seed) == ("[Q], ", 2)
    assert float(row["score"]) == read_json(sweep / row["job"] / "result.json")["after"]["ndcg@10"]
    with (sweep / "groups.csv").open(newline="", encoding="utf-8") as file:
        [group] = csv.DictReader(file)
    assert (group["seeds"], float(group["mean"])) == ("2", float(row["score"]))
