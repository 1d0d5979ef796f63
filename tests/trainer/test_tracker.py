"""What a tracker is told, read back by its own reader, and that one which fails stops nothing. Nothing goes online."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import wandb
from omegaconf import DictConfig, OmegaConf

from configs.schema import Config, ConfigError, as_dict, parse_config
from tests.conftest import ENVIRONMENT, ROOT, refused, run_command, tiny_overrides, type_here
from tests.test_train import read_json, read_lines, write_pairs
from trainer.tracker import Tracker, check_tracker, new_id

MakeConfig = Callable[..., Config]
DEADLINE_SECONDS = 240
NOT_LOGGED_IN = (
    "tracker=wandb: nobody is logged in: type `wandb login`, set WANDB_API_KEY, or set WANDB_MODE=offline to keep the "
    "run in its folder"
)


@pytest.fixture(scope="module", autouse=True)
def apart(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep wandb off the user's folders and key, and off the network."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("WANDB_")]:
            patch.delenv(name)
        patch.setenv("HOME", str(home))
        patch.setenv("NETRC", str(home / "netrc"))
        for name in ("CONFIG", "CACHE", "DATA"):
            patch.setenv(f"WANDB_{name}_DIR", str(home / name.lower()))
        patch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
        patch.setenv("WANDB_MODE", "offline")
        yield


@pytest.fixture(autouse=True)
def new_wandb() -> Iterator[None]:
    """It reads the environment once."""
    wandb.teardown()
    yield
    wandb.teardown()


@dataclass(frozen=True)
class Recorded:
    """What wandb's own reader finds in the folder of a run."""

    run: dict[str, Any]
    config: dict[str, Any]
    history: list[dict[str, Any]]
    """A step each, without what wandb adds of its own."""
    summary: dict[str, Any]
    exit_code: int | None
    """None for a run whose process did not end it."""


def read_run(folder: Path) -> Recorded:
    done = subprocess.run(
        [str(Path(sys.executable).with_name("wandb")), "leet", "inspect", "--json", str(folder)],
        capture_output=True,
        text=True,
        check=True,
    )
    records = [json.loads(line) for line in done.stdout.splitlines()]

    def of(kind: str) -> list[dict[str, Any]]:
        return [record[kind] for record in records if record["type"] == kind]

    run = of("run")[0]
    summary: dict[str, Any] = {}
    for record in of("summary"):
        summary |= record.get("update", {})
    return Recorded(
        run,
        without_own(run["config"]["update"]),
        [{"step": record["step"]["num"], **without_own(record["item"])} for record in of("history")],
        without_own(summary),
        next((record.get("exit_code", 0) for record in of("exit")), None),
    )


def without_own(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if not name.startswith("_")}


def recorded_runs(output: Path) -> list[Path]:
    """Folders that wandb left in the folder of a run, the oldest first."""
    return sorted((output / "wandb").glob("offline-run-*"))


def start(config: Config, said: list[str]) -> Tracker:
    Path(config.output_dir).mkdir(exist_ok=True)
    return Tracker(config, main=True, say=said.append)


# --- no tracker ---


@pytest.mark.parametrize(("overrides", "main"), [([], True), (["tracker=wandb", "tracker.id=0123abcd"], False)])
def test_without_a_tracker_or_in_a_second_process_nothing_happens(
    overrides: list[str], main: bool, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import of it raises
    said: list[str] = []
    with Tracker(make_config(*overrides), main=main, say=said.append) as tracker:
        tracker.log(0, {"eval/map": 0.5})
        assert tracker.where() is None
        tracker.finish({"model": "here"})
    assert said == []
    assert not (tmp_path / "run").exists()


def test_no_tracker_needs_no_login(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    check_tracker(make_config())


def test_ids_are_eight_letters_and_differ() -> None:
    ids = {new_id() for _ in range(100)}
    assert len(ids) == 100
    assert {len(bytes.fromhex(name)) for name in ids} == {4}


# --- what is recorded ---


def test_an_offline_run_records_config_steps_and_result(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(
        *("tracker=wandb", "tracker.id=0123abcd", "tracker.project=mine", "tracker.group=seed-89abcdef"),
        *("name=tiny", "head=mlp_residual", "data=pairs", "data.path=mine.jsonl", "backbone.skiplist=['#', ': ']"),
    )
    said: list[str] = []
    result = {"model": "outputs/tiny/model", "steps": 2, "best": {"step": 1, "map": 0.5}, "after": {"map": 0.25}}
    with start(config, said) as tracker:
        where = tracker.where()
        tracker.log(0, {"eval/ndcg@10": 0.1234567890123456})
        tracker.log(1, {"train/loss": 1e-7, "train/gradient_norm": 3.0})
        tracker.log(2, {"train/loss": 0.5, "eval/ndcg@10": 1 / 3})
        tracker.finish(result)
    [folder] = recorded_runs(tmp_path / "run")
    assert where == f"wandb offline: wandb sync {folder}"
    recorded = read_run(folder)
    assert recorded.config == as_dict(config)
    assert {key: recorded.run[key] for key in ("run_id", "project", "run_group", "display_name")} == {
        "run_id": "0123abcd",
        "project": "mine",
        "run_group": "seed-89abcdef",
        "display_name": "tiny",
    }
    assert recorded.history == [
        {"step": 0, "eval/ndcg@10": 0.1234567890123456},
        {"step": 1, "train/loss": 1e-7, "train/gradient_norm": 3.0},
        {"step": 2, "train/loss": 0.5, "eval/ndcg@10": 1 / 3},
    ]
    last = {"eval/ndcg@10": 1 / 3, "train/loss": 0.5, "train/gradient_norm": 3.0}
    assert recorded.summary == result | last
    assert recorded.exit_code == 0
    assert said == []


def test_a_norm_without_a_bound_is_recorded_as_one(make_config: MakeConfig, tmp_path: Path) -> None:
    said: list[str] = []
    with start(make_config("tracker=wandb"), said) as tracker:
        # As of a skipped fp16 step; metrics.jsonl, which is JSON, has null.
        tracker.log(1, {"train/gradient_norm": float("inf"), "train/loss": 0.5})
        tracker.log(2, {"train/gradient_norm": 2.0, "train/loss": 0.25})
        tracker.finish({})
    recorded = read_run(*recorded_runs(tmp_path / "run"))
    assert recorded.history == [
        {"step": 1, "train/gradient_norm": "Infinity", "train/loss": 0.5},
        {"step": 2, "train/gradient_norm": 2.0, "train/loss": 0.25},
    ]
    assert said == []


def test_a_run_that_raises_is_recorded_as_failed(make_config: MakeConfig, tmp_path: Path) -> None:
    def fail() -> None:
        with start(make_config("tracker=wandb"), []) as tracker:
            tracker.log(1, {"train/loss": 0.5})
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        fail()
    recorded = read_run(*recorded_runs(tmp_path / "run"))
    assert recorded.history == [{"step": 1, "train/loss": 0.5}]
    assert recorded.exit_code == 1


def test_a_step_that_the_tracker_has_already_is_not_sent_again(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[tuple[int, dict[str, float]]] = []
    # As a run that was told of steps 0 to 4 before it was killed, and that goes on from a checkpoint of step 2.
    run = SimpleNamespace(step=5, log=lambda metrics, step: sent.append((step, metrics)), finish=lambda exit_code: None)
    monkeypatch.setattr(wandb, "init", lambda **_: run)
    with start(make_config("tracker=wandb"), []) as tracker:
        for step in range(3, 7):
            tracker.log(step, {"train/loss": step / 10})
    assert sent == [(5, {"train/loss": 0.5}), (6, {"train/loss": 0.6})]


def test_a_tracker_that_the_environment_switches_off_is_silent(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    said: list[str] = []
    config = make_config("tracker=wandb")
    check_tracker(config)
    with start(config, said) as tracker:
        assert tracker.where() is None
        tracker.log(0, {"eval/map": 0.5})
        tracker.finish({"model": "here"})
    assert said == []
    assert not list((tmp_path / "run").iterdir())


# --- a tracker that fails ---


def failing(error: Exception) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


def warning(reason: str) -> str:
    return f"the tracker failed ({reason}): training goes on without it, metrics.jsonl has everything"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(28, "No space left on device"), "[Errno 28] No space left on device"),
        (RuntimeError("\nno answer\nafter 90 seconds\n"), "no answer"),
        (TimeoutError(), "TimeoutError"),
    ],
)
def test_a_log_that_fails_warns_once_and_ends_the_tracker(
    error: Exception, reason: str, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    said: list[str] = []
    with start(make_config("tracker=wandb"), said) as tracker:
        tracker.log(0, {"eval/map": 0.5})
        with monkeypatch.context() as patch:
            patch.setattr(wandb.Run, "log", failing(error))
            tracker.log(1, {"train/loss": 0.5})
        assert tracker.where() is None
        tracker.log(2, {"train/loss": 0.25})
        tracker.finish({"model": "here"})
    assert said == [warning(reason)]
    wandb.teardown()  # what the end of the process does
    recorded = read_run(*recorded_runs(tmp_path / "run"))
    assert recorded.history == [{"step": 0, "eval/map": 0.5}]


def test_a_tracker_that_cannot_start_warns_once(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wandb, "init", failing(wandb.errors.CommError("no answer")))
    said: list[str] = []
    with start(make_config("tracker=wandb"), said) as tracker:
        assert tracker.where() is None
        tracker.log(0, {"eval/map": 0.5})
        tracker.finish({"model": "here"})
    assert said == [warning("no answer")]


@pytest.mark.parametrize("ends_well", [True, False])
def test_a_tracker_that_cannot_end_warns_once(
    ends_well: bool, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    with start(make_config("tracker=wandb"), said) as tracker, monkeypatch.context() as patch:
        patch.setattr(wandb.Run, "finish", failing(OSError("no answer")))
        if ends_well:
            tracker.finish({"model": "here"})
        else:
            tracker.__exit__(None, None, None)
    assert said == [warning("no answer")]


def test_ctrl_c_is_no_failure_of_the_tracker(make_config: MakeConfig) -> None:
    said: list[str] = []
    with pytest.raises(KeyboardInterrupt), start(make_config("tracker=wandb"), said):
        raise KeyboardInterrupt
    assert said == []


# --- login ---


def test_online_without_a_login_is_refused(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE")
    asked: list[dict[str, Any]] = []

    def login(**arguments: Any) -> bool:
        asked.append(arguments)
        return False

    monkeypatch.setattr(wandb, "login", login)
    with pytest.raises(ConfigError) as caught:
        check_tracker(make_config("tracker=wandb"))
    assert str(caught.value) == NOT_LOGGED_IN
    assert asked == [{"prompt": False}]


def test_a_login_or_a_server_that_does_not_answer_lets_the_run_begin(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_MODE")
    for login in (lambda prompt: True, failing(wandb.errors.CommError("no answer"))):
        monkeypatch.setattr(wandb, "login", login)
        check_tracker(make_config("tracker=wandb"))


def test_a_mode_that_is_none_is_refused(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "of line")
    with pytest.raises(ConfigError, match=r"^tracker=wandb: .*of line") as caught:
        check_tracker(make_config("tracker=wandb"))
    assert "\n" not in str(caught.value)


def test_offline_needs_no_login(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wandb, "login", failing(AssertionError("asked for a login")))
    check_tracker(make_config("tracker=wandb"))


# --- the command line ---


@pytest.fixture(scope="module")
def tiny_tracked(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments of a tracked run of seconds: tiny weights, eight pairs, scored on themselves."""
    folder = tmp_path_factory.mktemp("tracked")
    path = write_pairs(folder)
    return [
        *tiny_overrides(tiny_bert, folder),
        *("data=pairs", f"data.path={path}", f"data.evaluation_path={path}", "trainer.batch_size=4"),
        *("tracker=wandb", "tracker.project=mine"),
    ]


@dataclass(frozen=True)
class Resumed:
    """A run that was killed after some checkpoint, and what there was when it had gone on to its end."""

    output: Path
    id: str
    """Of the config that the killed part had left."""
    step: int
    """Of the checkpoint that it went on from."""
    said: str


@pytest.fixture(scope="module")
def resumed(tiny_tracked: list[str], tmp_path_factory: pytest.TempPathFactory) -> Resumed:
    cwd = tmp_path_factory.mktemp("cwd")
    output = cwd / "run"
    # Long enough to be met in the middle.
    arguments = [*tiny_tracked, f"output_dir={output}", "trainer.steps=200", "trainer.save_every_steps=20"]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *arguments, "evaluation.every_steps=50"],
        cwd=cwd,
        env=os.environ | ENVIRONMENT,
        stdout=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not (output / "checkpoints" / "step_00000040").exists():
        assert process.poll() is None, "the run ended before its second checkpoint"
        assert time.monotonic() < deadline, "waited in vain for the second checkpoint"
        time.sleep(0.01)
    process.kill()
    assert process.wait(DEADLINE_SECONDS) == -signal.SIGKILL
    config = load_config(output)
    assert config.tracker.id is not None
    done = run_command(f"resume={output}", cwd=cwd)
    assert done.returncode == 0, done.stderr
    match = re.search(r"^resumed after step (\d+), ", done.stdout, re.MULTILINE)
    assert match is not None
    return Resumed(output, config.tracker.id, int(match[1]), done.stdout)


def load_config(output: Path) -> Config:
    saved = OmegaConf.load(output / "config.yaml")
    assert isinstance(saved, DictConfig)
    return parse_config(saved)


def test_a_resumed_run_goes_on_under_its_id(resumed: Resumed) -> None:
    first, second = map(read_run, recorded_runs(resumed.output))
    assert first.run["run_id"] == second.run["run_id"] == resumed.id
    assert load_config(resumed.output).tracker.id == resumed.id
    assert first.run["project"] == second.run["project"] == "mine"
    assert (first.exit_code, second.exit_code) == (None, 0)
    assert f"wandb offline: wandb sync {recorded_runs(resumed.output)[1]}" in resumed.said


def test_both_parts_record_the_whole_config(resumed: Resumed) -> None:
    expected = as_dict(load_config(resumed.output))
    assert [read_run(folder).config for folder in recorded_runs(resumed.output)] == [expected, expected]


def test_what_both_parts_record_is_what_the_metrics_say(resumed: Resumed) -> None:
    lines = {line["step"]: line for line in read_lines(resumed.output / "metrics.jsonl")}
    first, second = [read_run(folder).history for folder in recorded_runs(resumed.output)]
    assert len(first) > 20
    assert second[-1]["step"] == 200
    for part in (first, second):
        steps = [line["step"] for line in part]
        assert steps == list(range(steps[0], steps[-1] + 1))
        assert all(set(line) == set(lines[line["step"]]) for line in part)
    assert [line for line in first if line["step"] <= resumed.step] == [
        lines[line["step"]] for line in first if line["step"] <= resumed.step
    ]
    assert second == [lines[line["step"]] for line in second]
    # What was trained twice took other seconds, and came to the same.
    for line in first[resumed.step + 1 :]:
        assert line["train/loss"] == pytest.approx(lines[line["step"]]["train/loss"], rel=1e-6)


def test_no_step_is_lost_between_the_parts(resumed: Resumed) -> None:
    steps = {line["step"] for folder in recorded_runs(resumed.output) for line in read_run(folder).history}
    assert [step for step in range(201) if step not in steps] == []


def test_the_summary_holds_the_result(resumed: Resumed) -> None:
    result = read_json(resumed.output / "result.json")
    summary = read_run(recorded_runs(resumed.output)[1]).summary
    assert summary["model"] == str(resumed.output / "model")
    # Without what the run's config and page say as well.
    made = {"command", "versions", "hardware", "facts", "modules", "data"}
    assert {name: summary[name] for name in result if name not in made} == {
        name: value for name, value in result.items() if name not in made
    }


def test_a_rerun_is_another_run_to_the_tracker(resumed: Resumed, tmp_path: Path) -> None:
    again = tmp_path / "again"
    done = type_here(f"rerun={resumed.output}", f"output_dir={again}", "trainer.steps=1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    config = load_config(again)
    assert config.tracker.id != resumed.id
    recorded = read_run(*recorded_runs(again))
    assert recorded.run["run_id"] == config.tracker.id
    assert recorded.config == as_dict(config)
    saved = load_config(resumed.output)
    assert (
        replace(
            config,
            output_dir=saved.output_dir,
            tracker=saved.tracker,
            trainer=saved.trainer,
        )
        == saved
    )


def test_a_tracker_that_fails_does_not_stop_the_run(tiny_tracked: list[str], tmp_path: Path) -> None:
    output = tmp_path / "run"
    # No id may have a slash.
    done = type_here(*tiny_tracked, f"output_dir={output}", "trainer.steps=2", "tracker.id=a/b", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the tracker failed (") == 1
    assert [line["step"] for line in read_lines(output / "metrics.jsonl")] == [0, 1, 2]
    assert read_json(output / "result.json")["steps"] == 2


def test_a_run_online_without_a_login_gets_one_line_and_leaves_nothing(tiny_tracked: list[str], tmp_path: Path) -> None:
    done = run_command(*tiny_tracked, f"output_dir={tmp_path}/run", cwd=tmp_path, WANDB_MODE="online")
    assert refused(done) == NOT_LOGGED_IN
    assert not list(tmp_path.iterdir())
