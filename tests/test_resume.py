"""Runs that are killed, stopped or out of disk, gone on with as typed, against one that nobody stopped."""

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from signal import SIGINT, SIGKILL, SIGTERM, Signals
from typing import Any

import pytest
from filelock import FileLock
from sentence_transformers import MultiVectorEncoder
from sentence_transformers.base.modules import Dense
from torch import nn

from configs.schema import Config
from scripts.kill_and_resume import CLOCK
from tests.conftest import ENVIRONMENT, ROOT, refused, run_command, tiny_overrides, type_here
from tests.pages import Page
from tests.test_train import PAIRS, read_json, read_lines, write_pairs
from trainer.optim import build_optimizer, build_schedule

pytestmark = pytest.mark.usefixtures("own_caches")

# A second of training, so that its moments can be met; the tiny BERT drops a tenth of its activations.
STEPS, SAVE_EVERY = 120, 10


@pytest.fixture(scope="module")
def keys(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments of a run, but for its folder."""
    folder = tmp_path_factory.mktemp("data")
    pairs = write_pairs(folder)
    return [
        *(key for key in tiny_overrides(tiny_bert, folder) if not key.startswith("output_dir=")),
        *("data=pairs", f"data.path={pairs}", f"data.evaluation_path={pairs}"),
        *("trainer.batch_size=4", f"trainer.steps={STEPS}", f"trainer.save_every_steps={SAVE_EVERY}"),
        *("evaluation.every_steps=35", "optimizer.learning_rate=3e-3"),
    ]


@pytest.fixture(scope="module")
def straight(keys: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nobody stopped; in its middle the model was better than at its end."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    done = run_command(*keys, f"output_dir={folder}")
    assert done.returncode == 0, done.stderr
    assert len(read_lines(folder / "metrics.jsonl")) == STEPS + 1
    assert (folder / "best").exists()
    return folder


@pytest.fixture(scope="module")
def killed(keys: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was killed right after its second checkpoint; tests take copies of it."""
    folder = tmp_path_factory.mktemp("killed") / "run"
    process = start(*keys, f"output_dir={folder}")
    wait_for(lambda: (folder / "checkpoints" / f"step_{2 * SAVE_EVERY:08d}").exists(), process)
    kill(process)
    assert 2 <= len(checkpoints(folder)) <= 3
    assert checkpoints(folder)[0] < STEPS - SAVE_EVERY
    return folder


def start(*arguments: str) -> "subprocess.Popen[str]":
    """Type `python train.py ...` as `run_command` does, and do not wait for its end."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *arguments],
        cwd=ROOT,
        env=os.environ | ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(happened: Callable[[], bool], process: "subprocess.Popen[str]") -> None:
    """Look until something has happened; the run must still be going on then."""
    deadline = time.monotonic() + 200
    while not happened():
        if process.poll() is not None:
            pytest.fail(f"the run ended before its moment came: {process.communicate()}")
        if time.monotonic() > deadline:
            process.kill()
            pytest.fail("the moment did not come")
        time.sleep(0.0005)  # leaves the core to the run


def kill(process: "subprocess.Popen[str]") -> None:
    process.kill()
    process.communicate()
    assert process.returncode == -SIGKILL, "the run had ended"


def checkpoints(folder: Path) -> list[int]:
    """Steps of the whole checkpoints, newest first."""
    names = (path.name for path in (folder / "checkpoints").glob("step_*"))
    return sorted((int(name.removeprefix("step_")) for name in names if "." not in name), reverse=True)


def half_written(folder: Path) -> bool:
    """Whether a checkpoint has some of its files, and not yet its name."""
    return any((folder / "checkpoints").glob("*.unfinished/optimizer.safetensors"))


def metrics_lines(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def contents(folder: Path) -> dict[str, bytes]:
    """Every file with its bytes, the lock aside."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def without_clock(folder: Path) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in line.items() if key not in CLOCK} for line in read_lines(folder / "metrics.jsonl")
    ]


def assert_finished(done: "subprocess.CompletedProcess[str]") -> None:
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "Warning" not in done.stderr


def assert_equal(folder: Path, straight: Path) -> None:
    """Bit for bit: every line of the metrics without the clock's columns, and every file of weights."""
    assert without_clock(folder) == without_clock(straight)
    ours, theirs = contents(folder), contents(straight)
    weights = {name for name in theirs if name.endswith(".safetensors")}
    assert len(weights) == 4  # of the backbone and of the head, last and best
    assert {name for name in ours if name.endswith(".safetensors")} == weights
    for name in (*sorted(weights), "scores.jsonl", "scores_before.jsonl"):
        assert ours[name] == theirs[name], name
    results = [read_json(path / "result.json") for path in (folder, straight)]
    for result, path in zip(results, (folder, straight), strict=True):
        assert path.parent / result["model"] == path / "model"
        assert path.parent / result["best"].pop("model") == path / "best"
    for key in ("best", "steps", "queries", "before", "after", "change", "evaluation_id", "padding_fraction"):
        assert results[0][key] == results[1][key], key
    # Nothing is left half written, and nothing that only a resumed run needs.
    assert {path.name for path in folder.iterdir()} == {path.name for path in straight.iterdir()}


# --- killed ---


def test_a_run_killed_before_its_first_checkpoint_starts_again_and_equals_the_straight_one(
    keys: list[str], straight: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    process = start(*keys, f"output_dir={folder}", f"trainer.save_every_steps={STEPS - 1}")
    wait_for(lambda: metrics_lines(folder) >= 5, process)
    kill(process)
    assert checkpoints(folder) == []
    done = type_here(f"resume={folder}")
    assert_finished(done)
    assert "no checkpoint was saved: the run starts again at its first step\n" in done.stdout
    assert_equal(folder, straight)


def test_a_run_killed_while_it_writes_a_checkpoint_goes_on_from_the_one_before(
    keys: list[str], straight: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    process = start(*keys, f"output_dir={folder}")
    wait_for(lambda: bool(checkpoints(folder)) and half_written(folder), process)
    kill(process)
    newest = checkpoints(folder)[0]
    if not half_written(folder):
        # It was whole between the look and the signal: what a kill a moment earlier leaves is put beside it.
        whole = folder / "checkpoints" / f"step_{newest:08d}"
        unfinished = Path(shutil.copytree(whole, whole.with_name(f"step_{newest + SAVE_EVERY:08d}.unfinished")))
        (unfinished / "state.json").unlink()
    done = type_here(f"resume={folder}")
    assert_finished(done)
    assert f"resumed after step {newest}, from {folder}/checkpoints/step_{newest:08d}\n" in done.stdout
    assert_equal(folder, straight)


def test_a_killed_run_whose_folder_was_moved_goes_on_where_it_lies_now(
    killed: Path, straight: Path, tmp_path: Path
) -> None:
    before = contents(killed)
    folder = Path(shutil.copytree(killed, tmp_path / "moved"))
    newest = checkpoints(folder)[0]
    # By a name that holds from here alone, as a person types it.
    done = type_here("resume=moved/", cwd=tmp_path)
    assert_finished(done)
    assert f"resumed after step {newest}, from moved/checkpoints/step_{newest:08d}\n" in done.stdout
    assert "changed  " not in done.stdout
    assert "\noutput_dir: moved\n" in (folder / "config.yaml").read_text()
    assert contents(killed) == before
    assert read_json(folder / "result.json")["model"] == "moved/model"
    assert_equal(folder, straight)


# The keys of a command have a grammar, in which some of these characters have a meaning.
@pytest.mark.parametrize("name", ["two words", "it's", "a=b,[c]", "#1", "null"])
def test_a_killed_run_goes_on_under_any_name_of_its_folder(name: str, killed: Path, tmp_path: Path) -> None:
    shutil.copytree(killed, tmp_path / name)
    # The name has been read, where it is the change that is refused.
    assert refused(type_here(f"resume={name}", "seed=2", cwd=tmp_path)).startswith(
        f"resume={name} cannot change seed=2: only trainer.steps"
    )


def test_a_newest_checkpoint_that_is_cut_short_is_left_out_for_the_one_before(
    killed: Path, straight: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(killed, tmp_path / "run"))
    newest, older, *_ = checkpoints(folder)
    damaged = folder / "checkpoints" / f"step_{newest:08d}" / "optimizer.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    # What was being written when the machine went down.
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 999, "train/lo')
    done = type_here(f"resume={folder}")
    assert_finished(done)
    assert f"left out: {damaged.parent} is not whole (" in done.stdout
    assert f"resumed after step {older}, from {folder}/checkpoints/step_{older:08d}\n" in done.stdout
    assert_equal(folder, straight)


def test_a_killed_run_on_a_mix_with_drawn_negatives_goes_on_within_the_epochs_of_its_sets(
    tiny_bert: Path, tmp_path: Path
) -> None:
    texts = [text for _, *documents in PAIRS for text in documents]
    rows = [
        {"query": query, "positive": positive, "negatives": [text for text in texts if text != positive][row:][:5]}
        for row, (query, positive, _) in enumerate(PAIRS)
    ]
    (tmp_path / "negatives.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = [
        *(key for key in tiny_overrides(tiny_bert, tmp_path) if not key.startswith("output_dir=")),
        *("data.mix={pairs: 2, lfrqa: 1}", "data.sets.pairs.documents_per_query=3"),
        *(f"data.sets.pairs.path={tmp_path}/negatives.jsonl", f"data.sets.lfrqa.path={write_pairs(tmp_path)}"),
        *(f"data.sets.{name}.evaluation_fraction=0" for name in ("pairs", "lfrqa")),
        *("trainer.batch_size=3", "trainer.steps=40", "trainer.save_every_steps=10", "optimizer.learning_rate=3e-3"),
    ]
    straight, folder = tmp_path / "straight", tmp_path / "run"
    assert_finished(type_here(*keys, f"output_dir={straight}"))
    process = start(*keys, f"output_dir={folder}")
    wait_for(lambda: bool(checkpoints(folder)), process)
    kill(process)
    newest = checkpoints(folder)[0]
    done = type_here(f"resume={folder}")
    assert_finished(done)
    assert f"resumed after step {newest}, " in done.stdout

    assert without_clock(folder) == without_clock(straight)
    # An epoch of the mix has six steps, so no checkpoint before the thirtieth step is at the end of one.
    assert newest < 30
    sets = [[name for name in ("pairs", "lfrqa") if f"train/{name}/loss" in line] for line in without_clock(folder)[1:]]
    assert sets.count(["pairs"]) > sets.count(["lfrqa"]) > 0
    ours, theirs = contents(folder), contents(straight)
    weights = {name for name in theirs if name.endswith(".safetensors")}
    assert len(weights) == 2
    assert all(ours[name] == theirs[name] for name in weights)


def test_a_killed_run_without_the_scores_that_it_began_with_says_so(killed: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(killed, tmp_path / "run"))
    (folder / "scores_before.jsonl").unlink()
    done = type_here(f"resume={folder}")
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {folder}/scores_before.jsonl cannot be read (")


# --- stopped ---


def stop(number: Signals, keys: list[str], folder: Path) -> tuple[str, int]:
    """Start a run, send it a signal during its steps, and return the command it prints and the last step it did."""
    process = start(*keys, f"output_dir={folder}")
    wait_for(lambda: metrics_lines(folder) >= 6, process)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=200)
    assert process.returncode == 128 + number, stderr
    assert "Traceback" not in stderr
    assert f"{number.name}: finishing the step, then saving; once more stops at once\n" in stdout
    step = metrics_lines(folder) - 1
    assert checkpoints(folder)[0] == step
    assert step < STEPS
    said, _, command = stderr.splitlines()[-1].partition("; go on with: ")
    assert said == f"stopped after step {step} of {STEPS}"
    assert not (folder / "result.json").exists()
    return command, step


def test_term_saves_and_prints_the_command_that_finishes_the_run_as_if_nothing_had_been(
    keys: list[str], straight: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "my run"
    command, step = stop(SIGTERM, keys, folder)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command,
        shell=True,
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": path},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert_finished(done)
    assert f"resumed after step {step}, from {folder}/checkpoints/step_{step:08d}\n" in done.stdout
    assert_equal(folder, straight)


def test_ctrl_c_saves_and_prints_the_command_that_goes_on(keys: list[str], tmp_path: Path) -> None:
    command, step = stop(SIGINT, [*keys, "report=true"], tmp_path / "run")
    assert command == f"python train.py resume={tmp_path}/run"
    page = Page.of(tmp_path / "run" / "report.html")
    said = f"Not finished: {step} of {STEPS} steps are logged; {command} goes on"
    assert page.of_element("p")[0] == said


# --- out of disk ---


def test_a_full_disk_leaves_the_last_good_checkpoint_whole(killed: Path, straight: Path, tmp_path: Path) -> None:
    def limit() -> None:
        # Files may grow to 150 kB: the weights fit, the moments of the optimiser, twice as many numbers, do not.
        resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))

    folder = Path(shutil.copytree(killed, tmp_path / "run"))
    before = contents(folder / "checkpoints")
    newest = checkpoints(folder)[0]
    done = run_command(f"resume={folder}", before=limit)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    error = done.stderr.splitlines()[-1]
    assert error.startswith(
        f"error: output_dir={folder}: checkpoints/step_{newest + SAVE_EVERY:08d} cannot be written ("
    )
    assert error.endswith("): free space on the disk or name another folder")
    whole = {name: content for name, content in before.items() if ".unfinished" not in name}
    assert contents(folder / "checkpoints") == whole

    done = type_here(f"resume={folder}")
    assert_finished(done)
    assert f"resumed after step {newest}, " in done.stdout
    assert_equal(folder, straight)


# --- changed on the way ---


def test_a_run_that_is_made_longer_follows_the_new_schedule_at_once(
    killed: Path, straight: Path, make_config: Callable[..., Config], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(killed, tmp_path / "run"))
    newest, steps = checkpoints(folder)[0], STEPS + 15
    pairs = next(line for line in (folder / "config.yaml").read_text().splitlines() if line.startswith("  path: "))
    data = Path(shutil.copy(pairs.removeprefix("  path: "), tmp_path / "moved.jsonl"))
    done = type_here(f"resume={folder}", f"trainer.steps={steps}", f"data.path={data}", "tracker.group=heads")
    assert_finished(done)
    assert [line for line in done.stdout.splitlines() if line.startswith("changed  ")] == [
        f"changed  data.path: {pairs.removeprefix('  path: ')} -> {data}",
        f"changed  trainer.steps: {STEPS} -> {steps}",
        "changed  tracker.group: None -> heads",
    ]
    assert without_clock(folder)[: newest + 1] == without_clock(straight)[: newest + 1]
    rates = [line["train/learning_rate"] for line in read_lines(folder / "metrics.jsonl")[1:]]
    settings = make_config("optimizer.learning_rate=3e-3").optimizer
    layer = MultiVectorEncoder(modules=[Dense(1, 1, bias=False)], device="cpu")
    optimizer = build_optimizer(layer, nn.ModuleDict(), settings)
    schedule = build_schedule(optimizer, settings, steps=steps)
    expected = []
    for _ in range(steps):
        expected.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates[newest:] == expected[newest:]
    assert rates[newest] != without_clock(straight)[newest + 1]["train/learning_rate"]
    assert read_json(folder / "result.json")["steps"] == steps
    # The next command sees what has changed.
    saved = (folder / "config.yaml").read_text()
    assert f"\n  steps: {steps}\n" in saved
    assert f"\n  path: {data}\n" in saved
    assert f"\noutput_dir: {folder}\n" in saved


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["trainer.batch_size=2", "trainer.steps=200", "seed=2", "tracker.group=heads"],
            "resume={folder} cannot change seed=2, trainer.batch_size=2: only trainer.steps, trainer.epochs, data.path "
            "and the tracker may differ; rerun={folder} repeats it otherwise",
        ),
        (
            ["trainer.save_every_steps=7"],
            "resume={folder} cannot change trainer.save_every_steps=7: only trainer.steps, trainer.epochs, data.path "
            "and the tracker may differ; rerun={folder} repeats it otherwise",
        ),
        (
            ["output_dir=elsewhere"],
            "output_dir=elsewhere: resume={folder} goes on in its own folder: leave it out",
        ),
        (["trainer.stepz=5"], "trainer.stepz is no key; the nearest is trainer.steps (README.md lists all)"),
        (["trainer.epochs=3"], "trainer.steps=120 and trainer.epochs=3.0: exactly one must be set"),
        (["-m", "trainer.steps=200"], "resume={folder} takes key=value only, not -m"),
        (["data.path=no.jsonl"], "data.path=no.jsonl: there is no"),
    ],
    ids=["other run", "other checkpoints", "other folder", "no key", "steps and epochs", "sweep", "no data"],
)
def test_a_change_that_makes_another_run_is_refused_and_leaves_the_folder_alone(
    arguments: list[str], message: str, killed: Path, tmp_path: Path
) -> None:
    before = contents(killed)
    assert refused(type_here(f"resume={killed}", *arguments)).startswith(message.format(folder=killed))
    assert contents(killed) == before


# --- no run to go on with ---


def test_a_finished_run_does_not_go_on(straight: Path) -> None:
    before = contents(straight)
    assert refused(type_here(f"resume={straight}", "trainer.steps=200")) == (
        f"resume={straight} is finished: train its model further with backbone=checkpoint "
        f"backbone.name={straight}/model, or repeat it with rerun={straight} output_dir=..."
    )
    assert contents(straight) == before


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert refused(type_here(f"resume={tmp_path}")) == (
        f"resume={tmp_path}: the folder has no config.yaml: give the output folder of a run"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_folder_that_another_process_writes_is_refused(killed: Path) -> None:
    before = contents(killed)
    with FileLock(killed / ".lock"):
        assert refused(type_here(f"resume={killed}")) == (
            f"output_dir={killed} is being written by another process: wait for its end, or stop it"
        )
    assert contents(killed) == before


def test_a_new_run_in_the_folder_of_a_killed_one_is_told_how_that_goes_on(killed: Path, keys: list[str]) -> None:
    before = contents(killed)
    message = refused(type_here(*keys, f"output_dir={killed}"))
    assert message.startswith(f"output_dir={killed} holds a run that did not finish (config.yaml, metrics.jsonl, ")
    assert f"): resume={killed} goes on with it; else set another name= or output_dir=" in message
    assert contents(killed) == before
