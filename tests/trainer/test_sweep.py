"""What becomes of a job, whoever starts it, and how a sweep adds up. A script of a few lines stands for train.py."""

import csv
import io
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from rich.console import Console

from configs.schema import Config, ConfigError, save_config
from tests.conftest import ROOT
from trainer.sweep import Job, claim, job_name, report, run_job, summarise

MakeConfig = Callable[..., Config]
DEADLINE_SECONDS = 60
# What every job here does before its own lines: read its arguments, make its folder.
PROLOGUE = f"""
import json, os, signal, sys, time
from pathlib import Path

arguments = dict(argument.split("=", 1) for argument in sys.argv[1:])
folder = Path(arguments.get("resume") or arguments["output_dir"].strip("'"))
folder.mkdir(exist_ok=True)
(folder / "arguments.json").write_text(json.dumps(sys.argv[1:]))
(folder / "config.yaml").touch()

def finish(score):
    after = None if score is None else {{"mrr@10": 0.125, "ndcg@10": score}}
    (folder / "result.json").write_text(json.dumps({{"seconds": 12.5, "after": after}}))

def wait_for(path):
    (folder / "waits").write_text(str(os.getpid()))
    deadline = time.monotonic() + {DEADLINE_SECONDS}
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
"""
# A job that notes what it hears, and goes on.
NOTE_SIGNALS = """
def note(number, frame):
    with (folder / "heard").open("a") as file:
        print(number, file=file)

signal.signal(signal.SIGINT, note)
"""
# `run_job` as another process calls it.
DRIVER = """
import sys
from pathlib import Path
from omegaconf import OmegaConf
from configs.schema import parse_config
from trainer.sweep import run_job

config = parse_config(OmegaConf.load(sys.argv[2]))
try:
    print("score", run_job(Path(sys.argv[1]), config, ["seed=1"], number=0, sweep=Path(sys.argv[3])))
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    folder = tmp_path / "seed-0123abcd"
    folder.mkdir()
    return folder


@pytest.fixture
def make_train(tmp_path: Path) -> Callable[[str], Path]:
    """What stands for train.py, given what it does."""

    def make(lines: str) -> Path:
        path = tmp_path / "train.py"
        path.write_text(PROLOGUE + lines)
        return path

    return make


MakeTrain = Callable[[str], Path]


def run(
    train: Path, config: Config, sweep: Path, *, number: int = 0, overrides: tuple[str, ...] = ("seed=1",)
) -> tuple[float, Job]:
    """The score that `run_job` returns, and the row that it leaves."""
    score = run_job(train, config, list(overrides), number=number, sweep=sweep)
    return score, read_row(sweep, number)


def read_row(sweep: Path, number: int = 0) -> Job:
    return Job(**json.loads((sweep / "jobs" / f"{number:05d}.json").read_text()))


def read_arguments(folder: Path) -> Any:
    return json.loads((folder / "arguments.json").read_text())


def count_starts(log: Path) -> int:
    return sum(line.startswith("$ ") for line in log.read_text().splitlines())


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.01)


# --- the name of a job ---


@pytest.mark.parametrize(
    "override",
    ["output_dir=elsewhere", "overwrite=true", "tracker=wandb", "tracker.group=mine", "tracker.id=0", "sweep.launch=x"],
)
def test_what_does_not_change_the_weights_does_not_change_the_name(override: str, make_config: MakeConfig) -> None:
    assert job_name(make_config(override)) == job_name(make_config())


@pytest.mark.parametrize(
    "override",
    [
        "seed=2",
        "head=linear",
        "head=mlp_residual",
        "trainer.steps=7",
        "trainer.precision=bf16",
        "trainer.save_every_steps=7",
        "optimizer.learning_rate=1.0000001e-4",
        "optimizer.betas=[0.9,0.99]",
        "evaluation.metric=map",
        "evaluation.every_steps=5",
        "data.evaluation_fraction=0.25",
        "data.path=other.jsonl",
        "data.documents_per_query=8",
        "loss.contrastive.temperature=0.5",
        "loss.terms.contrastive=2",
        "loss.matryoshka={widths: [128, 32], weights: [1, 1]}",
        "optimizer=muon",
        "optimizer.groups=[{pattern: head.*, learning_rate: 1e-3}]",
        "trainer.cache_tokens=512",
        "backbone.revision=main",
        "backbone.skiplist=['.']",
    ],
)
def test_every_other_key_changes_the_name(override: str, make_config: MakeConfig) -> None:
    pairs = ("data=pairs", "data.path=mine.jsonl")
    assert job_name(make_config(*pairs, override)) != job_name(make_config(*pairs))


def test_the_width_of_a_layer_changes_the_name(make_config: MakeConfig) -> None:
    names = {job_name(make_config("head=mlp", f"head.layers.0.out_features={width}")) for width in (48, 64, 96)}
    assert len(names) == 3


def test_a_job_is_called_as_its_run_and_by_eight_digits_that_stay(make_config: MakeConfig) -> None:
    name = job_name(make_config("name=minilm-mlp"))
    assert name.startswith("minilm-mlp-")
    assert len(bytes.fromhex(name.removeprefix("minilm-mlp-"))) == 4
    assert job_name(make_config("name=minilm-mlp")) == name


# --- one job ---


def test_a_new_job_gets_its_overrides_and_a_folder(make_train: MakeTrain, make_config: MakeConfig, sweep: Path) -> None:
    config = make_config()
    score, row = run(make_train("finish(0.75)"), config, sweep, number=3, overrides=("seed=1", "head=mlp"))
    folder = sweep / job_name(config)
    assert read_arguments(folder) == ["seed=1", "head=mlp", f"output_dir='{folder}'"]
    assert score == 0.75
    assert row == Job(3, job_name(config), ["seed=1", "head=mlp"], "finished", 0.75, 12.5, None)


def test_the_log_lies_beside_the_folder_and_begins_with_the_command(
    make_train: MakeTrain, make_config: MakeConfig, sweep: Path
) -> None:
    config, train = make_config(), make_train("print('out', flush=True); print('err', file=sys.stderr); finish(0.5)")
    run(train, config, sweep)
    command, *said = (sweep / f"{job_name(config)}.log").read_text().splitlines()
    folder = sweep / job_name(config)
    assert shlex.split(command) == ["$", sys.executable, str(train), "seed=1", f"output_dir='{folder}'"]
    assert said == ["out", "err"]


def test_a_finished_job_is_found_and_not_started(make_train: MakeTrain, make_config: MakeConfig, sweep: Path) -> None:
    config = make_config("evaluation.metric=mrr@10")
    folder = sweep / job_name(config)
    folder.mkdir()
    (folder / "result.json").write_text('{"seconds": 3.5, "after": {"ndcg@10": 0.5, "mrr@10": 0.25}}')
    score, row = run(make_train("finish(0.75)"), config, sweep)
    assert score == 0.25
    assert row == Job(0, job_name(config), ["seed=1"], "finished before", 0.25, 3.5, None)
    assert {path.name for path in folder.iterdir()} == {"result.json"}
    assert not list(sweep.glob("*.log"))


def test_a_job_that_has_a_config_is_resumed(make_train: MakeTrain, make_config: MakeConfig, sweep: Path) -> None:
    config = make_config()
    folder = sweep / job_name(config)
    folder.mkdir()
    (folder / "config.yaml").touch()
    score, row = run(make_train("finish(0.5)"), config, sweep)
    assert read_arguments(folder) == [f"resume={folder}"]
    assert (score, row.state) == (0.5, "finished")


def test_a_job_that_failed_before_it_had_a_config_is_started_again(
    make_train: MakeTrain, make_config: MakeConfig, sweep: Path
) -> None:
    config = make_config()
    folder = sweep / job_name(config)
    _, row = run(make_train("(folder / 'config.yaml').unlink(); sys.exit(2)"), config, sweep)
    assert row.state == "failed"
    score, row = run(make_train("finish(0.5)"), config, sweep)
    assert read_arguments(folder) == ["seed=1", f"output_dir='{folder}'"]
    assert (score, row.state) == (0.5, "finished")
    assert count_starts(sweep / f"{job_name(config)}.log") == 2


def test_a_job_that_is_not_evaluated_has_no_score(make_train: MakeTrain, make_config: MakeConfig, sweep: Path) -> None:
    score, row = run(make_train("finish(None)"), make_config(), sweep)
    assert math.isnan(score)
    assert (row.state, row.score, row.seconds) == ("finished", None, 12.5)


@pytest.mark.parametrize(
    ("lines", "error"),
    [
        ("print('error: head=x is no member', file=sys.stderr); sys.exit(2)", "head=x is no member"),
        # A launcher of several processes has a page of its own to say after the one line of ours.
        ("print('error: step 2: the loss is nan'); print('launcher: exit code 1'); sys.exit(1)", "step 2: the loss is"),
        ("raise RuntimeError('out of\\nmemory: 3 bytes')", "memory: 3 bytes"),
        ("raise RuntimeError('all went wrong')", "RuntimeError: all went wrong"),
    ],
    ids=["line of ours", "launcher's page", "traceback of two lines", "traceback"],
)
def test_a_failure_is_a_row_that_says_why(
    lines: str, error: str, make_train: MakeTrain, make_config: MakeConfig, sweep: Path
) -> None:
    score, row = run(make_train(lines), make_config(), sweep)
    assert math.isnan(score)
    assert (row.state, row.score) == ("failed", None)
    assert row.error is not None
    assert row.error.startswith(error)
    assert row.seconds is not None
    assert 0 < row.seconds < DEADLINE_SECONDS


def test_the_reason_is_that_of_the_last_start(make_train: MakeTrain, make_config: MakeConfig, sweep: Path) -> None:
    config = make_config()
    _, row = run(make_train("print('error: no space left'); sys.exit(2)"), config, sweep)
    assert row.error == "no space left"
    _, row = run(make_train("raise RuntimeError('out of memory')"), config, sweep)
    assert row.error == "RuntimeError: out of memory"


def test_a_job_that_the_system_kills_is_told_from_one_that_fails(
    make_train: MakeTrain, make_config: MakeConfig, sweep: Path
) -> None:
    _, row = run(make_train("os.kill(os.getpid(), signal.SIGKILL)"), make_config(), sweep)
    assert (row.state, row.error) == ("failed", "killed by SIGKILL")


def test_a_job_that_says_nothing_is_known_by_its_status(
    make_train: MakeTrain, make_config: MakeConfig, sweep: Path
) -> None:
    _, row = run(make_train("sys.exit(3)"), make_config(), sweep)
    assert (row.state, row.error) == ("failed", "exit status 3")


@pytest.mark.parametrize("status", [130, 143])
def test_a_job_that_a_signal_stopped_has_not_failed(
    status: int, make_train: MakeTrain, make_config: MakeConfig, sweep: Path
) -> None:
    score, row = run(make_train(f"print('stopped after step 3 of 9'); sys.exit({status})"), make_config(), sweep)
    assert math.isnan(score)
    assert (row.state, row.score, row.error) == ("stopped", None, None)


def test_what_launches_a_job_stands_in_place_of_python(
    make_train: MakeTrain, make_config: MakeConfig, sweep: Path
) -> None:
    config = make_config(f"sweep.launch='env LAUNCHED=\"a b\" {sys.executable}'")
    _, row = run(make_train("print(os.environ['LAUNCHED'], flush=True); finish(0.5)"), config, sweep)
    assert row.state == "finished", row
    log = (sweep / f"{job_name(config)}.log").read_text().splitlines()
    assert shlex.split(log[0])[:4] == ["$", "env", "LAUNCHED=a b", sys.executable]
    assert log[1:] == ["a b"]


def test_a_launcher_beside_this_python_is_found_without_its_environment(
    make_train: MakeTrain, make_config: MakeConfig, sweep: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    _, row = run(make_train("finish(0.5)"), make_config(f"sweep.launch={Path(sys.executable).name}"), sweep)
    assert (row.state, row.score) == ("finished", 0.5)


def test_a_launcher_that_is_not_there_fails_the_job_alone(
    make_train: MakeTrain, make_config: MakeConfig, sweep: Path
) -> None:
    score, row = run(make_train("finish(0.5)"), make_config("sweep.launch=no-such-launcher"), sweep)
    assert math.isnan(score)
    assert row.state == "failed"
    assert row.error is not None
    assert "no-such-launcher" in row.error


def test_a_launcher_that_ran_nothing_has_finished_nothing(
    make_train: MakeTrain, make_config: MakeConfig, sweep: Path
) -> None:
    score, row = run(make_train("finish(0.5)"), make_config("sweep.launch=echo"), sweep)
    assert math.isnan(score)
    assert (row.state, row.score) == ("failed", None)
    assert not (sweep / row.job).exists()


def test_a_name_with_a_slash_is_one_folder(make_train: MakeTrain, make_config: MakeConfig, sweep: Path) -> None:
    config = make_config("name=team/tiny")
    _, row = run(make_train("finish(0.5)"), config, sweep)
    assert row.job.startswith("team-tiny-")
    assert (row.job, row.state, row.score) == (job_name(config), "finished", 0.5)
    assert {path.name for path in sweep.iterdir()} == {"jobs", row.job, f"{row.job}.log"}


@pytest.mark.parametrize(
    ("overrides", "added"),
    [
        (["tracker=wandb"], ["tracker.group=seed-0123abcd"]),
        (["tracker=wandb", "tracker.group=mine"], []),
        (["tracker=none"], []),
    ],
)
@pytest.mark.parametrize("resumed", [False, True])
def test_a_tracker_shows_the_jobs_of_a_sweep_together(
    resumed: bool, overrides: list[str], added: list[str], make_train: MakeTrain, make_config: MakeConfig, sweep: Path
) -> None:
    config = make_config(*overrides)
    folder = sweep / job_name(config)
    if resumed:
        folder.mkdir()
        (folder / "config.yaml").touch()
    run(make_train("finish(0.5)"), config, sweep)
    expected = [f"resume={folder}"] if resumed else ["seed=1", f"output_dir='{folder}'"]
    assert read_arguments(folder) == [*expected, *added]


# --- several drivers, and one that ends early ---


@dataclass
class Driver:
    """A process that calls `run_job`, in a group of its own, as one that a terminal starts."""

    process: subprocess.Popen[bytes]
    output: Path

    def kill(self) -> None:
        self.process.kill()
        assert self.process.wait(DEADLINE_SECONDS) == -signal.SIGKILL

    def press_ctrl_c(self) -> None:
        """Tell the whole group, as the terminal does."""
        os.killpg(self.process.pid, signal.SIGINT)

    def lines(self) -> list[str]:
        """What it has said when it ends."""
        assert self.process.wait(DEADLINE_SECONDS) == 0
        return self.output.read_text().splitlines()


def start_driver(train: Path, config: Config, sweep: Path) -> Driver:
    saved = sweep.parent / "saved.yaml"
    save_config(config, str(saved))
    output = sweep.parent / f"driver{len(list(sweep.parent.glob('driver*')))}.txt"
    with output.open("wb") as file:
        command = [sys.executable, "-c", DRIVER, str(train), str(saved), str(sweep)]
        return Driver(subprocess.Popen(command, cwd=ROOT, stdout=file, start_new_session=True), output)


@pytest.mark.parametrize("killed", [False, True], ids=["first goes on", "first is killed"])
def test_a_second_driver_waits_for_the_job_and_finds_it_finished(
    killed: bool, make_train: MakeTrain, make_config: MakeConfig, sweep: Path, tmp_path: Path
) -> None:
    config = make_config()
    folder = sweep / job_name(config)
    train = make_train(f"wait_for(Path({str(tmp_path / 'go')!r})); finish(0.75)")
    first = start_driver(train, config, sweep)
    wait_until((folder / "waits").exists, "the job")
    if killed:
        first.kill()
    second = start_driver(train, config, sweep)
    waiting = f"job 0  {job_name(config)} is still run by another process: waiting for it\n"
    wait_until(lambda: second.output.read_text() == waiting, "the second driver")
    assert not (folder / "result.json").exists()
    (tmp_path / "go").touch()
    assert second.lines()[1:] == ["job 0  finished before  0.7500", "score 0.75"]
    if not killed:
        assert first.lines()[1:] == ["job 0  finished  0.7500", "score 0.75"]
    assert count_starts(sweep / f"{job_name(config)}.log") == 1


def test_a_job_whose_driver_was_killed_and_that_fails_is_resumed(
    make_train: MakeTrain, make_config: MakeConfig, sweep: Path, tmp_path: Path
) -> None:
    config = make_config()
    folder = sweep / job_name(config)
    train = make_train(
        f"finish(0.5) if 'resume' in arguments else [wait_for(Path({str(tmp_path / 'go')!r})), sys.exit(1)]"
    )
    first = start_driver(train, config, sweep)
    wait_until((folder / "waits").exists, "the job")
    first.kill()
    second = start_driver(train, config, sweep)
    wait_until(lambda: "waiting" in second.output.read_text(), "the second driver")
    (tmp_path / "go").touch()
    assert second.lines()[-1] == "score 0.5"
    assert read_arguments(folder) == [f"resume={folder}"]
    assert read_row(sweep).state == "finished"


def test_ctrl_c_reaches_the_job_once_and_is_raised_again_when_it_has_saved(
    make_train: MakeTrain, make_config: MakeConfig, sweep: Path, tmp_path: Path
) -> None:
    config = make_config()
    folder = sweep / job_name(config)
    train = make_train(f"{NOTE_SIGNALS}\nwait_for(folder / 'heard'); (folder / 'saved').touch(); sys.exit(130)")
    driver = start_driver(train, config, sweep)
    wait_until((folder / "waits").exists, "the job")
    # In a group of its own, it hears of nothing from the terminal.
    assert os.getpgid(int((folder / "waits").read_text())) != driver.process.pid
    driver.press_ctrl_c()
    assert driver.lines()[1:] == ["job 0  stopped", "interrupted"]
    assert (folder / "heard").read_text() == f"{signal.SIGINT.value}\n"
    assert (folder / "saved").exists()
    assert read_row(sweep).state == "stopped"


def test_ctrl_c_twice_is_heard_twice(make_train: MakeTrain, make_config: MakeConfig, sweep: Path) -> None:
    config = make_config()
    folder = sweep / job_name(config)
    train = make_train(
        f"{NOTE_SIGNALS}\nwait_for(folder / 'heard'); signal.signal(signal.SIGINT, signal.SIG_DFL)\n"
        "(folder / 'saving').touch(); wait_for(folder / 'never')"
    )
    driver = start_driver(train, config, sweep)
    wait_until((folder / "waits").exists, "the job")
    driver.press_ctrl_c()
    wait_until((folder / "saving").exists, "the first signal")
    driver.press_ctrl_c()
    assert driver.lines()[-1] == "interrupted"
    assert read_row(sweep).state == "stopped"


def test_ctrl_c_reaches_a_job_whose_launcher_keeps_it_for_itself(
    make_train: MakeTrain, make_config: MakeConfig, sweep: Path, tmp_path: Path
) -> None:
    # As `accelerate launch` starts one process: it ends by itself, and at once.
    launcher = tmp_path / "launch.py"
    launcher.write_text("import subprocess, sys\nsys.exit(subprocess.Popen([sys.executable, *sys.argv[1:]]).wait())\n")
    config = make_config(f"sweep.launch='{sys.executable} {launcher}'")
    folder = sweep / job_name(config)
    train = make_train(
        f"{NOTE_SIGNALS}\nlauncher = os.getppid(); wait_for(folder / 'heard')\n"
        "while os.getppid() == launcher: time.sleep(0.01)\n"
        "time.sleep(0.5); (folder / 'saved').touch(); sys.exit(130)"  # a model takes a while to write
    )
    driver = start_driver(train, config, sweep)
    wait_until((folder / "waits").exists, "the job")
    driver.press_ctrl_c()
    assert driver.lines()[-1] == "interrupted"
    assert read_row(sweep).state == "stopped"
    wait_until((folder / "saved").exists, "the model that the job saves")
    assert (folder / "heard").read_text() == f"{signal.SIGINT.value}\n"


def test_a_job_whose_launcher_died_is_waited_for_by_its_folder(
    make_train: MakeTrain, make_config: MakeConfig, sweep: Path
) -> None:
    config = make_config()
    folder = sweep / job_name(config)
    folder.mkdir()
    with FileLock(folder / ".lock"):  # as its run holds it
        driver = start_driver(make_train("finish(0.75)"), config, sweep)
        waiting = f"job 0  {job_name(config)} is still run by another process: waiting for it\n"
        wait_until(lambda: driver.output.read_text() == waiting, "the driver")
        (folder / "result.json").write_text('{"seconds": 3.5, "after": {"ndcg@10": 0.25}}')
    assert driver.lines()[1:] == ["job 0  finished before  0.2500", "score 0.25"]


def test_ctrl_c_in_the_last_moment_of_a_job_still_ends_the_sweep(
    make_train: MakeTrain, make_config: MakeConfig, sweep: Path
) -> None:
    config = make_config()
    folder = sweep / job_name(config)
    # A run that hears of it in its last evaluation has nothing left to stop.
    driver = start_driver(make_train(f"{NOTE_SIGNALS}\nwait_for(folder / 'heard'); finish(0.5)"), config, sweep)
    wait_until((folder / "waits").exists, "the job")
    driver.press_ctrl_c()
    assert driver.lines()[-1] == "interrupted"
    assert (read_row(sweep).state, read_row(sweep).score) == ("finished", 0.5)


# --- the sum of a sweep ---


def table_of(sweep: Path) -> tuple[list[str], list[Job]]:
    """What `summarise` prints, a line each without the padding, and what it returns."""
    output = io.StringIO()
    jobs, _ = summarise(sweep, Console(file=output, width=200, soft_wrap=True))
    return [" ".join(line.split()) for line in output.getvalue().splitlines()], jobs


def test_jobs_without_a_score_are_named_by_what_differs_in_their_order(sweep: Path) -> None:
    made = [
        Job(10, "c", ["trainer.steps=3", "head=mlp", "seed=1"], "stopped", None, 2.0),
        Job(2, "b", ["trainer.steps=3", "head=linear", "seed=2"], "failed", None, 1.26, "no space left"),
        Job(11, "d", ["trainer.steps=3", "head=deep", "seed=2"], "failed", None, None, "head is too deep"),
    ]
    for job in made:
        report(sweep, job)
    lines, jobs = table_of(sweep)
    assert lines == [
        "",
        "no job has a score to compare",
        "left out: b head=linear seed=2: failed: no space left",
        "left out: c head=mlp seed=1: stopped",
        "left out: d head=deep seed=2: failed: head is too deep",
        "",
        f"tables: {sweep / 'groups.csv'} and, of the jobs, {sweep / 'sweep.csv'}",
    ]
    assert jobs == sorted(made, key=lambda job: job.number)


def test_a_job_alone_shows_all_its_overrides(sweep: Path) -> None:
    report(sweep, Job(0, "a", ["head=linear", "seed=1"], "stopped", None, 1.0))
    assert table_of(sweep)[0][2] == "left out: a head=linear seed=1: stopped"


def test_an_override_with_brackets_is_shown_as_it_was_typed(sweep: Path) -> None:
    report(sweep, Job(0, "a", ["backbone.skiplist=[bold]", "seed=1"], "stopped", None, 1.0))
    output = io.StringIO()
    summarise(sweep, Console(file=output, width=200, markup=False))
    assert "backbone.skiplist=[bold] seed=1" in output.getvalue()


def test_the_csv_holds_every_override_and_every_digit(sweep: Path) -> None:
    overrides = ["head.layers=[{out_features: 8, bias: true}]", "name='it''s, \"so\"'", "backbone.query_prefix='[Q] '"]
    report(sweep, Job(0, "a", overrides, "finished", 0.1234567890123456, 12.345678901))
    report(sweep, Job(1, "b", ["seed=2"], "failed", None, None, 'data.path="x, y": no such file'))
    table_of(sweep)
    with (sweep / "sweep.csv").open(newline="", encoding="utf-8") as file:
        header, first, second = list(csv.reader(file))
    assert header == ["job", "overrides", "score", "seconds", "state", "error"]
    assert first[0] == "a"
    assert shlex.split(first[1]) == overrides
    assert first[2:] == ["0.1234567890123456", "12.345678901", "finished", ""]
    assert second == ["b", "seed=2", "", "", "failed", 'data.path="x, y": no such file']


def test_the_csv_is_that_of_the_last_command(sweep: Path) -> None:
    for number in range(3):
        report(sweep, Job(number, f"job{number}", [f"seed={number}"], "finished", 0.5, 1.0))
    table_of(sweep)
    with claim(sweep):
        report(sweep, Job(0, "job0", ["seed=0"], "finished before", 0.25, 1.0))
        table_of(sweep)
    assert (sweep / "sweep.csv").read_text() == (
        "job,overrides,score,seconds,state,error\njob0,seed=0,0.25,1.0,finished before,\n"
    )


def test_a_sweep_without_a_job_has_no_table(sweep: Path) -> None:
    assert table_of(sweep) == ([], [])
    assert not list(sweep.iterdir())


def test_a_new_command_forgets_the_rows_alone(make_train: MakeTrain, make_config: MakeConfig, sweep: Path) -> None:
    run(make_train("finish(0.5)"), make_config(), sweep)
    before = {path for path in sweep.rglob("*") if path.is_file()}
    with claim(sweep):
        assert table_of(sweep) == ([], [])
    assert before - {path for path in sweep.rglob("*") if path.is_file()} == {sweep / "jobs" / "00000.json"}


def test_a_sweep_is_run_by_one_command_at_a_time(sweep: Path) -> None:
    report(sweep, Job(0, "a", ["seed=1"], "finished", 0.5, 1.0))
    with FileLock(sweep / ".lock"), pytest.raises(ConfigError) as caught, claim(sweep):
        pass
    assert str(caught.value) == f"hydra.sweep.dir={sweep}: another command runs this sweep: wait for its end"
    assert read_row(sweep).job == "a"


def test_a_sweep_that_did_nothing_leaves_nothing(tmp_path: Path) -> None:
    with claim(tmp_path / "outputs" / "sweeps" / "seed-0123abcd"):
        pass
    assert not list(tmp_path.iterdir())


def test_folders_that_were_there_stay(tmp_path: Path) -> None:
    (tmp_path / "outputs" / "empty").mkdir(parents=True)
    with claim(tmp_path / "outputs" / "empty"):
        pass
    with claim(tmp_path / "outputs" / "sweeps" / "seed-0123abcd"):
        pass
    assert list(tmp_path.rglob("*")) == [tmp_path / "outputs", tmp_path / "outputs" / "empty"]


def test_each_job_is_announced_and_its_end_is_said(
    make_train: MakeTrain, make_config: MakeConfig, sweep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config()
    run(make_train("print('error: no space left'); sys.exit(2)"), config, sweep, number=4)
    name = job_name(config)
    assert capsys.readouterr().out.splitlines() == [
        f"job 4  {name}  log: {sweep / name}.log",
        "job 4  failed  no space left",
    ]
