"""What a run may replace or go on with, who may write, and that nothing is left half-written."""

import errno
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from safetensors import SafetensorError
from sentence_transformers import MultiVectorEncoder
from sentence_transformers.base.modules import Dense
from torch import nn

from configs.schema import Config, ConfigError, parse_config, save_config
from tests.conftest import ROOT
from trainer import run_folder
from trainer.checkpoint import Progress, TrainState
from trainer.encoding import TrainedModel
from trainer.optim import build_optimizer, build_schedule
from trainer.run_folder import RunFolder

MakeConfig = Callable[..., Config]
NO_SPACE = "[Errno 28] No space left on device"
# As libraries written in Rust report it, by exceptions of their own.
FULL = "No space left on device (os error 28)"


def make_folder(make_config: MakeConfig, *overrides: str) -> RunFolder:
    return RunFolder(make_config(*overrides))


def fill(path: Path, *names: str) -> None:
    path.mkdir(parents=True, exist_ok=True)
    for name in names:
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text(f"old {name}")


def left(folder: RunFolder) -> set[str]:
    """What lies in the folder, the lock that opens it aside."""
    return {path.name for path in folder.path.iterdir()} - {".lock"}


# Refusals


@pytest.mark.parametrize(
    ("files", "kind"),
    [
        (["config.yaml", "metrics.jsonl", "result.json"], "a finished run"),
        (["result.json"], "a finished run"),
        (["config.yaml", "metrics.jsonl"], "a run that did not finish (config.yaml, metrics.jsonl)"),
        (["model"], "a run that did not finish (model)"),
        (["config.yaml", "checkpoints"], "a run that did not finish (config.yaml, checkpoints)"),
    ],
)
@pytest.mark.parametrize("method", ["check", "open"])
def test_a_folder_with_a_run_is_refused_and_left_alone(
    method: str, files: list[str], kind: str, make_config: MakeConfig
) -> None:
    folder = make_folder(make_config)
    fill(folder.path, *files)
    with pytest.raises(ConfigError) as caught:
        getattr(folder, method)()
    # Without its config, a run cannot go on.
    resumable = "config.yaml" in files and "result.json" not in files
    assert str(caught.value) == (
        f"output_dir={folder.path} holds {kind}: "
        + (f"resume={folder.path} goes on with it; else " if resumable else "")
        + "set another name= or output_dir=, or overwrite=true to replace it"
    )
    assert left(folder) == set(files)
    assert all((folder.path / name).read_text() == f"old {name}" for name in files)


@pytest.mark.parametrize("key", ["backbone.name", "data.path"])
def test_a_run_that_would_replace_its_own_input_is_refused(key: str, make_config: MakeConfig, tmp_path: Path) -> None:
    fill(tmp_path / "run", "model", "config.yaml")
    source = tmp_path / "run" / "model"
    folder = make_folder(make_config, "data=pairs", "data.path=other", f"{key}={source}", "overwrite=true")
    with pytest.raises(ConfigError, match=rf"^{key}={source} lies in output_dir={tmp_path}/run, which is replaced"):
        folder.open()
    assert source.read_text() == "old model"


@pytest.mark.parametrize("overwrite", ["true", "false"])
def test_a_file_in_the_place_of_the_folder_is_refused(overwrite: str, make_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    with pytest.raises(ConfigError) as caught:
        make_folder(make_config, f"overwrite={overwrite}").check()
    assert str(caught.value) == f"output_dir={tmp_path}/run is a file: name a folder"
    assert (tmp_path / "run").read_text() == "mine"


def test_a_folder_that_cannot_be_made_is_an_error_of_the_config(make_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    folder = make_folder(make_config, f"output_dir={tmp_path}/file/run")
    with pytest.raises(ConfigError) as caught:
        folder.open()
    assert str(caught.value) == (
        f"output_dir={tmp_path}/file/run: config.yaml cannot be written ([Errno 20] Not a directory: "
        f"'{tmp_path}/file/run'): free space on the disk or name another folder"
    )


def test_check_makes_nothing(make_config: MakeConfig) -> None:
    folder = make_folder(make_config)
    folder.check()
    assert not folder.path.exists()


# Runs that go on


def resumed(config: Config) -> RunFolder:
    return RunFolder(config, resume=True)


def test_a_finished_run_does_not_go_on(make_config: MakeConfig) -> None:
    folder = resumed(make_config())
    fill(folder.path, "config.yaml", "metrics.jsonl", "result.json", "model/weights")
    for method in (folder.check, folder.open):
        with pytest.raises(ConfigError) as caught:
            method()
        assert str(caught.value) == (
            f"resume={folder.path} is finished: train its model further with backbone=checkpoint "
            f"backbone.name={folder.path}/model, or repeat it with rerun={folder.path} output_dir=..."
        )
    assert left(folder) == {"config.yaml", "metrics.jsonl", "result.json", "model"}


@pytest.mark.parametrize("files", [["notes.txt"], ["metrics.jsonl", "checkpoints/state.json"]])
def test_a_folder_without_a_config_is_no_run_that_goes_on(files: list[str], make_config: MakeConfig) -> None:
    folder = resumed(make_config())
    fill(folder.path, *files)
    with pytest.raises(ConfigError) as caught:
        folder.check()
    assert str(caught.value) == f"resume={folder.path} has no config.yaml: give the output folder of a run"


def test_a_run_that_goes_on_keeps_all_that_it_has_but_the_config_and_why_it_failed(make_config: MakeConfig) -> None:
    config = make_config("overwrite=true")
    folder = resumed(config)
    kept = ["metrics.jsonl", "model/weights", "best/weights", "checkpoints/x", "notes.txt"]
    fill(folder.path, "config.yaml", "failed_batch.jsonl", *kept)
    folder.check()
    folder.open()
    assert {str(path.relative_to(folder.path)) for path in folder.path.rglob("*") if path.is_file()} == {
        *(".lock", "config.yaml", *kept)
    }
    assert all((folder.path / name).read_text() == f"old {name}" for name in kept)
    saved = OmegaConf.load(folder.path / "config.yaml")
    assert isinstance(saved, DictConfig)
    assert parse_config(saved) == config


@pytest.mark.parametrize("name", ["model", "best", "checkpoints/step_00000003"])
def test_what_was_half_written_is_finished_or_undone(name: str, make_config: MakeConfig) -> None:
    folder = resumed(make_config())
    fill(folder.path, "config.yaml")
    fill(folder.path / f"{name}.unfinished", "weights")
    fill(folder.path / f"{name}.replaced", "weights")
    folder.open()
    # Between the two moves of a replacement, the old one is the only one that is whole.
    target = folder.path / name
    assert (target / "weights").read_text() == "old weights"
    assert [path.name for path in target.parent.glob(f"{target.name}*")] == [target.name]


@pytest.mark.parametrize("name", ["model", "best", "checkpoints/step_00000003"])
def test_what_was_wholly_written_replaces_what_was_there_before(name: str, make_config: MakeConfig) -> None:
    folder = resumed(make_config())
    fill(folder.path, "config.yaml")
    fill(folder.path / f"{name}.replaced", "weights")
    (folder.path / name).mkdir()
    (folder.path / name / "weights").write_text("new weights")
    folder.open()
    target = folder.path / name
    assert (target / "weights").read_text() == "new weights"
    assert [path.name for path in target.parent.glob(f"{target.name}*")] == [target.name]


def test_a_file_that_was_half_written_is_undone(make_config: MakeConfig) -> None:
    folder = resumed(make_config())
    fill(folder.path, "config.yaml", "metrics.jsonl", "metrics.jsonl.unfinished", "result.json.unfinished")
    folder.open()
    assert left(folder) == {"config.yaml", "metrics.jsonl"}
    assert (folder.path / "metrics.jsonl").read_text() == "old metrics.jsonl"


def test_files_that_no_run_has_written_are_left_as_they_are(make_config: MakeConfig) -> None:
    folder = resumed(make_config())
    foreign = ["notes.unfinished", "notes.txt", "notes.txt.old", "thesis.replaced", "metrics.jsonl.bak"]
    fill(folder.path, "config.yaml", *foreign)
    folder.open()
    assert left(folder) == {"config.yaml", *foreign}
    assert all((folder.path / name).read_text() == f"old {name}" for name in foreign)


def test_checking_a_run_that_goes_on_mends_nothing(make_config: MakeConfig) -> None:
    folder = resumed(make_config())
    fill(folder.path, "config.yaml", "model.unfinished/weights", "best.replaced/weights")
    folder.check()
    assert {path.name for path in folder.path.iterdir()} == {"config.yaml", "model.unfinished", "best.replaced"}


def test_a_new_run_does_not_inherit_what_another_left_half_written(make_config: MakeConfig) -> None:
    folder = make_folder(make_config, "overwrite=true")
    fill(folder.path, "config.yaml", "best.replaced/weights", "model.unfinished/x", "result.json.unfinished")
    folder.open()
    assert left(folder) == {"config.yaml"}


METRICS = '{"step": 0}\n{"step": 1, "train/loss": 0.5}\n{"step": 2, "train/loss": 0.25}\n'


@pytest.mark.parametrize(
    ("content", "step", "kept"),
    [
        (METRICS, 1, METRICS[: METRICS.index('{"step": 2')]),
        (METRICS, 2, METRICS),
        (METRICS, 9, METRICS),
        (METRICS, None, ""),
        (METRICS + '{"step": 3, "tr', 2, METRICS),
        (METRICS + '{"step": 3, "tr', 9, METRICS),
        # All of a line but its end: the next one would be written behind it.
        (METRICS + '{"step": 3}', 3, METRICS),
        (METRICS + '{"step": 3, "tr', None, ""),
        ("", 2, ""),
    ],
    ids=[
        *("earlier step", "last step", "later step", "no step", "half a line", "half a line, later step"),
        *("line without end", "half a line, no step", "empty"),
    ],
)
def test_the_metrics_are_cut_after_a_step(content: str, step: int | None, kept: str, make_config: MakeConfig) -> None:
    folder = resumed(make_config())
    fill(folder.path, "config.yaml")
    (folder.path / "metrics.jsonl").write_text(content)
    folder.open()
    folder.cut_metrics(step)
    assert (folder.path / "metrics.jsonl").read_text() == kept
    folder.log(7, {"train/loss": 0.125})
    assert (folder.path / "metrics.jsonl").read_text() == kept + '{"step": 7, "train/loss": 0.125}\n'


def test_metrics_that_are_not_there_are_not_made(make_config: MakeConfig) -> None:
    folder = make_folder(make_config)
    folder.open()
    folder.cut_metrics(None)
    assert left(folder) == {"config.yaml"}


# One writer

WRITER = """
import sys
from omegaconf import OmegaConf
from configs.schema import parse_config
from trainer.run_folder import RunFolder
folder = RunFolder(parse_config(OmegaConf.load(sys.argv[1])))
folder.open()
print("open", flush=True)
sys.stdin.read()
"""


@contextmanager
def another_process(config: Config, file: Path) -> Iterator["subprocess.Popen[str]"]:
    """A process that has opened the folder of a run, and holds it until it is killed."""
    save_config(config, str(file))
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(file)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "open\n"
            yield process
        finally:
            process.kill()


def test_a_folder_that_another_process_writes_is_refused_until_that_is_killed(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    config, replacing = make_config(), make_config("overwrite=true")
    with another_process(config, tmp_path / "theirs.yaml") as process:
        before = {path: path.stat().st_mtime_ns for path in Path(config.output_dir).iterdir()}
        assert {path.name for path in before} == {".lock", "config.yaml"}
        for method in (resumed(config).check, resumed(config).open, RunFolder(replacing).open):
            with pytest.raises(ConfigError) as caught:
                method()
            assert str(caught.value) == (
                f"output_dir={config.output_dir} is being written by another process: wait for its end, or stop it"
            )
        for path, time in before.items():
            # The lock itself may be touched by who asks for it.
            assert path.name == ".lock" or path.stat().st_mtime_ns == time
        process.kill()
        process.wait()
        # The file of the lock is still there; the lock is not.
        assert (Path(config.output_dir) / ".lock").exists()
        folder = resumed(config)
        folder.check()
        folder.open()


def test_a_new_run_of_the_same_name_does_not_start_beside_the_first(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config()
    with another_process(config, tmp_path / "theirs.yaml"), pytest.raises(ConfigError):
        RunFolder(config).check()


def test_who_has_opened_the_folder_may_check_it_again(make_config: MakeConfig) -> None:
    folder = make_folder(make_config, "overwrite=true")
    folder.open()
    folder.check()


def test_processes_that_do_not_write_leave_nothing(encoder: MultiVectorEncoder, make_config: MakeConfig) -> None:
    folder = make_folder(make_config)
    folder.open(main=False)
    folder.log(1, {"train/loss": 1.0})
    folder.cut_metrics(None)
    assert folder.save_model(encoder, "model", step=3) == folder.path / "model"
    folder.write_card("model", "a card")
    folder.save_checkpoint(make_state(make_config(), 3), [], keep=2)
    assert folder.write_failed_batch([{"query": "a"}]) == folder.path / "failed_batch.jsonl"
    folder.write_result({"steps": 3})
    assert not folder.path.exists()


def test_processes_that_do_not_write_remove_and_cut_nothing(make_config: MakeConfig) -> None:
    folder = resumed(make_config())
    files = [
        "config.yaml",
        "metrics.jsonl",
        "best/weights",
        "checkpoints/x",
        "model.replaced/weights",
        "best.unfinished/x",
    ]
    fill(folder.path, *files)
    folder.open(main=False)
    folder.cut_metrics(None)
    folder.remove_model("best")
    folder.write_card("best", "a card")
    folder.set_aside(folder.path / "checkpoints")
    folder.write_result({"steps": 3})
    assert {str(path.relative_to(folder.path)) for path in folder.path.rglob("*") if path.is_file()} == set(files)
    assert all((folder.path / name).read_text() == f"old {name}" for name in files)


def test_a_process_that_does_not_write_leaves_the_lock_to_the_one_that_does(make_config: MakeConfig) -> None:
    config = make_config()
    RunFolder(config).open(main=False)
    writer = RunFolder(config)
    writer.open()
    RunFolder(config, resume=True).open(main=False)


# What a run writes


def test_a_new_run_keeps_the_files_that_are_no_runs(make_config: MakeConfig) -> None:
    folder = make_folder(make_config)
    fill(folder.path, "notes.txt")
    folder.open()
    assert left(folder) == {"config.yaml", "notes.txt"}
    assert (folder.path / "notes.txt").read_text() == "old notes.txt"


def test_overwrite_replaces_what_a_run_writes_and_nothing_else(make_config: MakeConfig) -> None:
    folder = make_folder(make_config, "overwrite=true")
    ours = ["config.yaml", "metrics.jsonl", "result.json", "failed_batch.jsonl", "model/weights", "best/weights"]
    ours += ["checkpoints/state.json", "scores.jsonl", "scores_before.jsonl"]
    foreign = ["notes.txt", "models/weights", "metrics.jsonl.bak"]
    fill(folder.path, *ours, *foreign)
    folder.open()
    assert left(folder) == {"config.yaml", "notes.txt", "models", "metrics.jsonl.bak"}
    assert all((folder.path / name).read_text() == f"old {name}" for name in foreign)
    assert "old" not in (folder.path / "config.yaml").read_text()


def test_a_page_goes_with_its_run_and_takes_its_figures_alone(make_config: MakeConfig) -> None:
    folder = make_folder(make_config, "overwrite=true")
    fill(folder.path, "config.yaml", "report.html", "figures/loss.png", "figures/mine.svg")
    folder.open()
    assert left(folder) == {"config.yaml", "figures"}
    assert [path.name for path in (folder.path / "figures").iterdir()] == ["mine.svg"]


def test_figures_without_a_page_are_no_runs(make_config: MakeConfig) -> None:
    folder = make_folder(make_config)
    fill(folder.path, "figures/loss.png")
    folder.check()
    folder.open()
    assert (folder.path / "figures" / "loss.png").read_text() == "old figures/loss.png"


def test_a_resumed_run_keeps_its_page(make_config: MakeConfig) -> None:
    config = make_config()
    fill(Path(config.output_dir), "config.yaml", "metrics.jsonl", "report.html", "figures/loss.png")
    RunFolder(config, resume=True).open()
    assert (Path(config.output_dir) / "report.html").exists()
    assert (Path(config.output_dir) / "figures" / "loss.png").exists()


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["head=mlp_residual", "trainer.steps=null", "trainer.epochs=0.5", "trainer.max_gradient_norm=null"],
        ["data=pairs", "data.path=a.jsonl", "data.negative_columns=[no, never]", "backbone.skiplist=['#', ': ', 'no']"],
        [
            "backbone.expansion=null",
            "backbone.query_length=null",
            "optimizer.epsilon=1e-12",
            "optimizer.schedule=cosine",
        ],
    ],
)
def test_the_saved_config_is_read_back_equal(overrides: list[str], make_config: MakeConfig) -> None:
    config = make_config(*overrides)
    folder = RunFolder(config)
    folder.open()
    saved = OmegaConf.load(folder.path / "config.yaml")
    assert isinstance(saved, DictConfig)
    assert parse_config(saved) == config


def test_each_logged_step_is_one_line_of_json(make_config: MakeConfig) -> None:
    folder = make_folder(make_config)
    folder.open()
    folder.log(0, {"eval/map": 0.25})
    folder.log(1, {"train/loss": 1e-7})
    lines = (folder.path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 0, "eval/map": 0.25}, {"step": 1, "train/loss": 1e-7}]


def test_the_failed_batch_is_one_example_a_line(make_config: MakeConfig) -> None:
    folder = make_folder(make_config)
    folder.open()
    examples = [{"query": "a\nb", "place": "f:1"}, {"query": "é", "place": "f:2"}]
    path = folder.write_failed_batch(examples)
    assert path == folder.path / "failed_batch.jsonl"
    assert [json.loads(line) for line in path.read_text().splitlines()] == examples


def test_the_result_marks_the_run_as_finished(make_config: MakeConfig) -> None:
    folder = make_folder(make_config)
    folder.open()
    folder.write_result({"steps": 3, "best": None})
    assert json.loads((folder.path / "result.json").read_text()) == {"steps": 3, "best": None}
    assert left(folder) == {"config.yaml", "result.json"}
    with pytest.raises(ConfigError, match="holds a finished run"):
        folder.check()


def test_the_result_ends_the_checkpoints(make_config: MakeConfig) -> None:
    folder = make_folder(make_config)
    folder.open()
    folder.save_checkpoint(make_state(make_config(), 3), [], keep=2)
    folder.write_result({"steps": 3})
    assert left(folder) == {"config.yaml", "result.json"}


def test_a_result_that_cannot_be_written_keeps_the_checkpoints(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_folder(make_config)
    folder.open()
    folder.save_checkpoint(make_state(make_config(), 3), [], keep=2)
    monkeypatch.setattr(Path, "write_text", lambda self, text, **_: full_disk(self, text))
    with pytest.raises(ConfigError, match=r"result\.json cannot be written"):
        folder.write_result({"steps": 3})
    assert checkpoint_names(folder) == ["step_00000003"]


# Checkpoints


def make_state(config: Config, step: int) -> TrainState:
    """A small model after some steps."""
    encoder, learnt = MultiVectorEncoder(modules=[Dense(3, 2)], device="cpu"), nn.ModuleDict()
    optimizer = build_optimizer(encoder, learnt, config.optimizer)
    schedule = build_schedule(optimizer, config.optimizer, steps=20)
    optimizer.step()
    schedule.step()
    return TrainState(TrainedModel(encoder, learnt), optimizer, schedule, None, Progress(step))


def checkpoint_names(folder: RunFolder) -> list[str]:
    return [path.name for path in folder.checkpoints()]


def test_a_run_that_saved_nothing_has_no_checkpoint(make_config: MakeConfig) -> None:
    folder = make_folder(make_config)
    assert folder.checkpoints() == []
    assert folder.saved_step() == 0
    folder.open()
    assert folder.checkpoints() == []


def test_a_checkpoint_lies_under_its_step_and_is_read_back(make_config: MakeConfig) -> None:
    config = make_config()
    folder = RunFolder(config)
    folder.open()
    state, states = make_state(config, 10), [{"python": "a"}, {"python": "b"}]
    folder.save_checkpoint(state, states, keep=2)
    [checkpoint] = folder.checkpoints()
    assert checkpoint == folder.path / "checkpoints" / "step_00000010"
    assert {path.name for path in (folder.path / "checkpoints").rglob("*")} == {
        *("step_00000010", "model.safetensors", "optimizer.safetensors", "state.json")
    }
    read = make_state(config, 0)
    assert read.load(checkpoint) == states
    assert read.progress.step == 10
    assert all(map(torch.equal, read.model.parameters(), state.model.parameters()))


@pytest.mark.parametrize(
    ("keep", "kept"),
    [
        (1, ["step_00000010"]),
        (2, ["step_00000010", "step_00000009"]),
        (4, ["step_00000010", "step_00000009", "step_00000006", "step_00000003"]),
        (9, ["step_00000010", "step_00000009", "step_00000006", "step_00000003"]),
    ],
)
def test_the_newest_checkpoints_are_kept_and_listed_newest_first(
    keep: int, kept: list[str], make_config: MakeConfig
) -> None:
    config = make_config()
    folder = RunFolder(config)
    folder.open()
    for step in (3, 6, 9, 10):
        folder.save_checkpoint(make_state(config, step), [], keep=keep)
    assert checkpoint_names(folder) == kept
    assert {path.name for path in (folder.path / "checkpoints").iterdir()} == set(kept)
    assert folder.saved_step() == 10


def test_what_is_half_written_is_no_checkpoint(make_config: MakeConfig) -> None:
    folder = make_folder(make_config)
    names = ["step_00000003", "step_00000006.unfinished", "step_00000009.replaced", "step_12", "notes", "step_0000000x"]
    for name in names:
        fill(folder.path / "checkpoints" / name, "state.json")
    assert checkpoint_names(folder) == ["step_00000003"]
    assert folder.saved_step() == 3


def test_a_checkpoint_that_is_set_aside_is_none_and_keeps_its_files(make_config: MakeConfig) -> None:
    config = make_config()
    folder = RunFolder(config)
    folder.open()
    for step in (3, 6):
        folder.save_checkpoint(make_state(config, step), [], keep=2)
    newest = folder.checkpoints()[0]
    content = {path.name: path.read_bytes() for path in newest.iterdir()}
    fill(folder.path / "checkpoints" / "step_00000006.unreadable", "of an earlier time")
    folder.set_aside(newest)
    assert checkpoint_names(folder) == ["step_00000003"]
    assert folder.saved_step() == 3
    aside = folder.path / "checkpoints" / "step_00000006.unreadable"
    assert {path.name: path.read_bytes() for path in aside.iterdir()} == content
    # Its step may be saved again.
    folder.save_checkpoint(make_state(config, 6), [], keep=2)
    assert checkpoint_names(folder) == ["step_00000006", "step_00000003"]


@pytest.mark.parametrize(
    ("error", "reason"),
    [(OSError(errno.ENOSPC, "No space left on device"), NO_SPACE), (SafetensorError(FULL), FULL)],
    ids=["OSError", "SafetensorError"],
)
def test_a_checkpoint_that_cannot_be_written_leaves_the_ones_before(
    error: Exception, reason: str, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config()
    folder = RunFolder(config)
    folder.open()
    folder.save_checkpoint(make_state(config, 3), [], keep=1)
    before = {path: path.read_bytes() for path in folder.checkpoints()[0].iterdir()}

    def save(self: TrainState, path: Path, random_states: list[dict[str, Any]]) -> None:
        fill(path, "model.safetensors")
        raise error

    monkeypatch.setattr(TrainState, "save", save)
    with pytest.raises(ConfigError) as caught:
        folder.save_checkpoint(make_state(config, 6), [], keep=1)
    assert str(caught.value) == (
        f"output_dir={folder.path}: checkpoints/step_00000006 cannot be written ({reason}): "
        "free space on the disk or name another folder"
    )
    assert [path.name for path in (folder.path / "checkpoints").iterdir()] == ["step_00000003"]
    assert {path: path.read_bytes() for path in folder.checkpoints()[0].iterdir()} == before


def test_no_checkpoint_is_removed_before_the_newer_one_is_whole(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config()
    folder = RunFolder(config)
    folder.open()
    folder.save_checkpoint(make_state(config, 3), [], keep=1)
    removed = []

    def remove(path: Path) -> None:
        if path.exists():
            removed.append((path.name, checkpoint_names(folder)))

    monkeypatch.setattr(run_folder, "_remove", remove)
    folder.save_checkpoint(make_state(config, 6), [], keep=1)
    assert removed == [("step_00000003", ["step_00000006", "step_00000003"])]


# Models


def test_a_saved_model_reloads_with_the_same_vectors(encoder: MultiVectorEncoder, make_config: MakeConfig) -> None:
    folder = make_folder(make_config)
    folder.open()
    path = folder.save_model(encoder, "model", step=3)
    assert path == folder.path / "model"
    assert left(folder) == {"config.yaml", "model"}
    reloaded = MultiVectorEncoder(str(path), device="cpu")
    for ours, theirs in (
        (encoder.encode_query(["what is it"]), reloaded.encode_query(["what is it"])),
        (encoder.encode_document(["a dog, a cat."]), reloaded.encode_document(["a dog, a cat."])),
    ):
        assert torch.equal(ours[0], theirs[0])


def test_a_saved_model_says_which_step_it_is_of(encoder: MultiVectorEncoder, make_config: MakeConfig) -> None:
    folder = make_folder(make_config)
    folder.open()
    assert folder.model_step("best") is None
    for step in (3, 12):
        folder.save_model(encoder, "best", step=step)
        assert folder.model_step("best") == step
    folder.remove_model("best")
    assert folder.model_step("best") is None


def test_saving_again_replaces_the_model(encoder: MultiVectorEncoder, make_config: MakeConfig) -> None:
    folder = make_folder(make_config)
    fill(folder.path, "model/old_weights", "model.unfinished/older_weights")
    folder.save_model(encoder, "model", step=3)
    names = {path.name for path in folder.path.rglob("*")}
    assert "modules.json" in names
    assert not {"old_weights", "older_weights", "model.unfinished"} & names


def test_a_saved_model_gets_its_card_and_no_other(encoder: MultiVectorEncoder, make_config: MakeConfig) -> None:
    folder = make_folder(make_config)
    folder.open()
    for name in ("model", "best"):
        folder.save_model(encoder, name, step=3)
        files = {path.name for path in (folder.path / name).iterdir()}
        assert "README.md" not in files
        for text in ("# a first card\n", "# naïve card of the [Q]\n"):
            folder.write_card(name, text)
            assert (folder.path / name / "README.md").read_text(encoding="utf-8") == text
        assert {path.name for path in (folder.path / name).iterdir()} == files | {"README.md"}


# Failures


def fail_to_save(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Make every save write a part of a model, then fail."""

    def save(self: MultiVectorEncoder, path: str, *, create_model_card: bool) -> None:
        Path(path).mkdir(parents=True)
        Path(path, "modules.json").write_text("[")
        raise error

    monkeypatch.setattr(MultiVectorEncoder, "save_pretrained", save)


@pytest.mark.parametrize("name", ["model", "best"])
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), NO_SPACE),
        (SafetensorError(FULL), FULL),
        (Exception(FULL), FULL),
    ],
    ids=["OSError", "SafetensorError", "tokenizers"],
)
def test_a_failed_save_leaves_no_half_written_model(
    error: Exception,
    reason: str,
    name: str,
    encoder: MultiVectorEncoder,
    make_config: MakeConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = make_folder(make_config)
    folder.open()
    fail_to_save(monkeypatch, error)
    with pytest.raises(ConfigError) as caught:
        folder.save_model(encoder, name, step=3)
    assert str(caught.value) == (
        f"output_dir={folder.path}: {name} cannot be written ({reason}): free space on the disk or name another folder"
    )
    assert left(folder) == {"config.yaml"}


@pytest.mark.parametrize(
    ("error", "raised"), [(OSError(errno.ENOSPC, "full"), ConfigError), (KeyboardInterrupt(), KeyboardInterrupt)]
)
def test_a_failed_save_leaves_the_model_that_was_there(
    error: BaseException,
    raised: type[BaseException],
    encoder: MultiVectorEncoder,
    make_config: MakeConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = make_folder(make_config)
    fill(folder.path, "model/modules.json", "model/weights")
    fail_to_save(monkeypatch, error)
    with pytest.raises(raised):
        folder.save_model(encoder, "model", step=3)
    assert [path.name for path in folder.path.iterdir()] == ["model"]
    assert {path.name: path.read_text() for path in (folder.path / "model").iterdir()} == {
        "modules.json": "old model/modules.json",
        "weights": "old model/weights",
    }


def full_disk(path: Path, text: str) -> None:
    """Write the half of a text that still fits."""
    path.open("w").write(text[: len(text) // 2])
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_config_that_cannot_be_written_leaves_no_half_of_it(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_folder(make_config)
    monkeypatch.setattr(
        run_folder, "save_config", lambda config, path: full_disk(Path(path), OmegaConf.to_yaml(config))
    )
    with pytest.raises(ConfigError) as caught:
        folder.open()
    assert str(caught.value) == (
        f"output_dir={folder.path}: config.yaml cannot be written ({NO_SPACE}): "
        "free space on the disk or name another folder"
    )
    assert not (folder.path / "config.yaml").exists()


def test_a_result_that_cannot_be_written_does_not_mark_the_run_as_finished(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_folder(make_config)
    folder.open()
    monkeypatch.setattr(Path, "write_text", lambda self, text, **_: full_disk(self, text))
    with pytest.raises(ConfigError) as caught:
        folder.write_result({"steps": 3})
    assert str(caught.value) == (
        f"output_dir={folder.path}: result.json cannot be written ({NO_SPACE}): "
        "free space on the disk or name another folder"
    )
    assert not (folder.path / "result.json").exists()


def test_a_card_that_cannot_be_written_leaves_the_model_and_its_card(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_folder(make_config)
    fill(folder.path, "best/README.md", "best/weights")
    monkeypatch.setattr(Path, "write_text", lambda self, text, **_: full_disk(self, text))
    with pytest.raises(ConfigError) as caught:
        folder.write_card("best", "# a new card")
    assert str(caught.value) == (
        f"output_dir={folder.path}: best/README.md cannot be written ({NO_SPACE}): "
        "free space on the disk or name another folder"
    )
    assert {path.name: path.read_text() for path in (folder.path / "best").iterdir()} == {
        "README.md": "old best/README.md",
        "weights": "old best/weights",
    }
