"""Several processes train one run: commands as a user types them, against one process."""

import json
import pickle
import random
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore

from configs.schema import Config, parse_config
from tests.conftest import ROOT, WORDS, run_command, tiny_overrides
from tests.gradients_worker import ALL_TERMS, FROZEN, LOSSES, STEP, Case, Step, largest_error, take_step

SCRIPTS = Path(sys.executable).parent
TRAIN = str(ROOT / "train.py")
CONFIGS = ROOT / "configs" / "accelerate"
EXAMPLES = 21
# An epoch is three steps of seven, micro-batches of three and four; chunks of one to a few texts, so that the
# processes differ in their number of queries, of documents and of forward passes.
OVERRIDES = [
    "data=pairs",
    "trainer.steps=3",
    "trainer.batch_size=8",
    "trainer.accumulation_steps=2",
    "trainer.chunk_tokens=24",
    # Each process drops other activations.
    "backbone.dropout=0",
    # The whole gradient and not its direction alone.
    "trainer.max_gradient_norm=null",
    "loss.contrastive.learn_temperature=true",
    "optimizer.learning_rate=1e-3",
]


def torchrun(processes: int, *program: str) -> list[str]:
    """Standalone: on a free port, so that nothing collides."""
    return [str(SCRIPTS / "torchrun"), "--standalone", "--nproc_per_node", str(processes), *(program or [TRAIN])]


def accelerate_launch(*arguments: str) -> list[str]:
    return [str(SCRIPTS / "accelerate"), "launch", *arguments, TRAIN]


def without_gpus(launch: list[str]) -> list[str]:
    """What a machine without GPUs needs before it."""
    return ["env", "ACCELERATE_USE_CPU=true", *launch]


def run_on_cpus(program: list[str], *arguments: str, home: Path) -> subprocess.CompletedProcess[str]:
    """Where there are GPUs, they may be fewer than the processes.

    home: where a user's own settings for accelerate would lie, and the tables that are read.
    """
    return run_command(*arguments, program=program, timeout=200, CUDA_VISIBLE_DEVICES="", HF_HOME=str(home))


@dataclass(frozen=True)
class Run:
    done: subprocess.CompletedProcess[str]
    folder: Path

    def result(self) -> dict[str, Any]:
        result: dict[str, Any] = json.loads((self.folder / "result.json").read_text())
        return result

    def metrics(self) -> list[dict[str, float]]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of examples whose documents differ in length, some of them with negatives."""
    generator = random.Random(1)

    def text(longest: int) -> str:
        return " ".join(generator.choices(WORDS, k=generator.randint(2, longest)))

    rows = [
        {
            "query": text(5),
            "positive": text(14),
            "negative": [text(14) for _ in range(generator.choice([0, 0, 1, 3]))],
        }
        for _ in range(EXAMPLES)
    ]
    path = tmp_path_factory.mktemp("data") / "negatives.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def run_with(tiny_bert: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """Train on the examples with negatives, by a program and in a folder of its own."""

    def run(program: list[str], *overrides: str, folder: Path | None = None) -> Run:
        folder = folder or tmp_path_factory.mktemp("run")
        done = run_on_cpus(
            program,
            *tiny_overrides(tiny_bert, folder),
            *OVERRIDES,
            *(f"data.path={data}", f"data.evaluation_path={data}"),
            *overrides,
            home=folder / "home",
        )
        return Run(done, folder / "run")

    return run


@pytest.fixture(scope="module")
def one(run_with: Callable[..., Run]) -> Run:
    """The run of one process."""
    run = run_with([sys.executable, TRAIN])
    assert run.done.returncode == 0, run.done.stderr
    return run


def assert_same_run(ours: Run, one: Run, *, processes: int) -> None:
    """Compare what several processes and one have left."""
    assert ours.result()["processes"] == processes
    assert one.result()["processes"] == 1
    assert ours.result()["queries"] == one.result()["queries"] == EXAMPLES
    for line, expected in zip(ours.metrics(), one.metrics(), strict=True):
        assert line["step"] == expected["step"]
        if line["step"] > 0:
            # Sums in another order, in float32, and at most two steps from it.
            for name in ("train/loss", "train/temperature", "train/gradient_norm", "train/learning_rate"):
                assert line[name] == pytest.approx(expected[name], rel=1e-5), (name, line["step"])
            tokens, expected_tokens = (
                each["train/document_tokens_per_second"] * each["train/seconds"] for each in (line, expected)
            )
            assert tokens == pytest.approx(expected_tokens, rel=1e-6)
    for when in ("before", "after"):
        # The same rankings: no two scores are as close as their rounding.
        assert ours.result()[when] == pytest.approx(one.result()[when], rel=1e-9)


def errors(done: subprocess.CompletedProcess[str]) -> list[str]:
    """The lines that a mistake gets, among those of the launcher."""
    return [line.removeprefix("error: ") for line in done.stderr.splitlines() if line.startswith("error: ")]


# --- torchrun ---


def test_several_processes_with_a_cache_have_the_losses_gradient_norms_and_scores_of_one(
    run_with: Callable[..., Run], one: Run
) -> None:
    assert len({line["eval/ndcg@10"] for line in one.metrics() if "eval/ndcg@10" in line}) == 2
    ours = run_with(torchrun(3), "trainer.cache_tokens=24")
    assert ours.done.returncode == 0, ours.done.stderr
    assert_same_run(ours, one, processes=3)


def test_two_processes_log_the_loss_of_each_set_of_a_mix_as_one_does(
    data: Path, tiny_bert: Path, tmp_path: Path
) -> None:
    few = tmp_path / "few.jsonl"
    few.write_text("".join(data.read_text().splitlines(keepends=True)[:6]))
    keys = [
        *("data.mix={pairs: 2, lfrqa: 1}", "data.mix_batches=all_sets"),
        *(f"data.sets.pairs.path={data}", "data.sets.pairs.documents_per_query=2", f"data.sets.lfrqa.path={few}"),
        *(f"data.sets.{name}.evaluation_fraction=0" for name in ("pairs", "lfrqa")),
        *(key for key in OVERRIDES if key != "data=pairs"),
    ]

    def train(program: list[str], folder: Path) -> Run:
        done = run_on_cpus(program, *tiny_overrides(tiny_bert, folder), *keys, home=folder / "home")
        assert done.returncode == 0, done.stderr
        return Run(done, folder / "run")

    with ThreadPoolExecutor() as pool:
        runs = [pool.submit(train, *given) for given in (
            ([sys.executable, TRAIN], tmp_path / "one"), (torchrun(2), tmp_path / "two"),
        )]  # fmt: skip
        one, two = (each.result() for each in runs)
    assert (one.result()["processes"], two.result()["processes"]) == (1, 2)
    seen = set()
    for line, expected in list(zip(two.metrics(), one.metrics(), strict=True))[1:]:
        logged, wanted = (
            {key: value for key, value in each.items() if key.endswith(("/loss", "/queries"))}
            for each in (line, expected)
        )
        assert logged == pytest.approx(wanted, rel=1e-5), line["step"]
        names = [name for name in ("pairs", "lfrqa") if f"train/{name}/loss" in logged]
        queries = [logged[f"train/{name}/queries"] for name in names]
        assert sum(queries) in (6, 7)  # of 27 examples in steps of 8
        mean = sum(logged[f"train/{name}/loss"] * count for name, count in zip(names, queries, strict=True))
        assert mean / sum(queries) == pytest.approx(line["train/loss"], rel=1e-5)
        seen.add(tuple(names))
    assert ("pairs", "lfrqa") in seen


# --- One gradient ---

# Without dropout, the number of processes changes nothing.
CASES = {
    **{loss: (overrides, torch.float64) for loss, overrides in LOSSES.items()},
    "float32": (ALL_TERMS, torch.float32),
    "frozen": ([*ALL_TERMS, FROZEN], torch.float64),
    "frozen_temperature": ([*ALL_TERMS, "optimizer.groups=[{pattern:loss.*,learning_rate:0}]"], torch.float64),
    "checkpointing": ([*ALL_TERMS, "trainer.gradient_checkpointing=true"], torch.float64),
}
DROPOUT = {
    "dropout": [*ALL_TERMS, "backbone.dropout=0.1"],
    "dropout_frozen_checkpointing": [
        *(*ALL_TERMS, FROZEN),
        *("backbone.dropout=0.1", "trainer.gradient_checkpointing=true"),
    ],
}
Steps = dict[tuple[str, str], Step]
"""By the case's name and by `plain` or `cached`."""


@pytest.fixture(scope="module")
def cases(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    ConfigStore.instance().store("schema", Config)
    base = [*tiny_overrides(tiny_bert, tmp_path_factory.mktemp("unused")), *STEP]
    every = CASES | {name: (overrides, torch.float64) for name, overrides in DROPOUT.items()}
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return {
            name: Case(parse_config(compose("train", [*base, *overrides])), dtype)
            for name, (overrides, dtype) in every.items()
        }


PROCESSES = 3


@pytest.fixture(scope="module")
def each(cases: dict[str, Case], tmp_path_factory: pytest.TempPathFactory) -> list[Steps]:
    """What each process has of every case, all of them in one launch."""
    folder = tmp_path_factory.mktemp("steps")
    (folder / "cases").write_bytes(pickle.dumps(cases))
    done = run_on_cpus(torchrun(PROCESSES, "-m", "tests.gradients_worker"), str(folder), home=folder / "home")
    assert done.returncode == 0, done.stderr
    return [pickle.loads((folder / f"{rank}_of_{PROCESSES}").read_bytes()) for rank in range(PROCESSES)]


@pytest.fixture
def plain_step(cases: dict[str, Case]) -> Iterator[Callable[[str], Step]]:
    """That of one process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield lambda name: take_step(Accelerator(cpu=True), cases[name])
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("name", CASES)
def test_several_processes_plain_or_cached_have_the_gradient_and_the_losses_of_a_plain_one(
    name: str, each: list[Steps], plain_step: Callable[[str], Step]
) -> None:
    one = plain_step(name)
    tolerance = 1e-5 if CASES[name][1] is torch.float32 else 1e-10
    for kind in ("plain", "cached"):
        for steps in each:
            error, parameter = largest_error(steps[name, kind], one)
            assert error <= tolerance, f"{kind}, {parameter}: {error}"
        logged = {what: sum(steps[name, kind].logged[what] for steps in each) for what in one.logged}
        assert logged["loss"] == pytest.approx(one.logged["loss"], rel=tolerance), kind
        # What was masked is counted in float32.
        assert logged == pytest.approx(one.logged, rel=max(tolerance, 1e-6)), kind


@pytest.mark.parametrize("name", DROPOUT)
def test_cached_processes_drop_what_as_many_plain_ones_of_the_same_chunks_drop(
    name: str, each: list[Steps], plain_step: Callable[[str], Step]
) -> None:
    for steps in each:
        error, parameter = largest_error(steps[name, "cached"], steps[name, "plain"])
        assert error <= 1e-10, f"{parameter}: {error}"
        assert steps[name, "cached"].logged == pytest.approx(steps[name, "plain"].logged, rel=1e-10)
        # Each drops something, which one process does not.
        assert largest_error(steps[name, "plain"], plain_step(name))[0] > 0.01


def test_a_step_synchronises_once_plain_or_cached(each: list[Steps]) -> None:
    for steps in each:
        assert {key: step.synchronisations for key, step in steps.items()} == dict.fromkeys(steps, 1)


# --- Mistakes ---


def test_an_unknown_key_under_torchrun_gets_one_line(run_with: Callable[..., Run]) -> None:
    ours = run_with(torchrun(2), "trainer.stepz=5")
    [error] = errors(ours.done)
    assert error.startswith("trainer.stepz is no key; the nearest is trainer.steps ")
    assert ours.done.returncode == 1
    assert ours.done.stdout == ""
    assert not ours.folder.exists()


# --- accelerate launch ---


def test_accelerate_launch_on_cpus_that_starts_one_process_of_two_is_refused(run_with: Callable[..., Run]) -> None:
    ours = run_with(accelerate_launch("--cpu", "--num_processes", "2"))
    assert errors(ours.done) == [
        "several processes were asked for and each would run by itself: on GPUs, accelerate launch --multi_gpu "
        "--num_processes 2 train.py ...; without, ACCELERATE_USE_CPU=true before the same command, "
        "or torchrun --nproc_per_node 2 train.py ...; for one process, unset MASTER_ADDR"
    ]
    assert ours.done.returncode == 1
    assert ours.done.stdout == ""
    assert not ours.folder.exists()


def test_accelerate_launch_with_the_file_for_one_node_leaves_one_run_and_says_everything_once(
    run_with: Callable[..., Run], one: Run
) -> None:
    arguments = ["--config_file", str(CONFIGS / "one_node.yaml"), "--num_processes", "2", "--main_process_port", "0"]
    ours = run_with(without_gpus(accelerate_launch(*arguments)))
    assert ours.done.returncode == 0, ours.done.stderr
    assert_same_run(ours, one, processes=2)
    assert {path.name for path in ours.folder.iterdir()} == {
        ".lock",
        "config.yaml",
        "metrics.jsonl",
        "model",
        "result.json",
        "scores.jsonl",
        "scores_before.jsonl",
    }
    lines = [" ".join(line.split()) for line in ours.done.stdout.splitlines()]
    batch = "batch 8 queries a step, 2 micro-batch(es) of 4, 2 process(es) of 2 queries each"
    once = [batch, "precision float32 on", "module what it does parameters", "before ndcg@10", "step 3/3", "model:"]
    for start in once:
        assert sum(line.startswith(start) for line in lines) == 1, start
    assert "Traceback" not in ours.done.stderr
    assert not errors(ours.done)


def test_two_launches_with_the_file_for_two_nodes_train_one_run(
    run_with: Callable[..., Run], one: Run, tmp_path: Path
) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    arguments = ["--config_file", str(CONFIGS / "two_nodes.yaml"), "--num_processes", "2"]
    arguments += ["--main_process_ip", "127.0.0.1", "--main_process_port", str(port)]

    def launch(rank: int) -> Run:
        program = accelerate_launch(*arguments, "--machine_rank", str(rank))
        return run_with(without_gpus(program), folder=tmp_path)

    with ThreadPoolExecutor(2) as machines:
        first, second = machines.map(launch, range(2))
    assert first.done.returncode == 0, first.done.stderr
    assert second.done.returncode == 0, second.done.stderr
    assert_same_run(first, one, processes=2)
    assert "2 process(es)" in first.done.stdout
    assert second.done.stdout == ""
