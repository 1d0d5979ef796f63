"""Several processes train one run: commands as a user types them, against one process."""

import json
import random
import socket
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.conftest import ROOT, WORDS, run_command, tiny_overrides

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
    """A folder with examples whose documents differ in length: some of them with negatives, and the same without."""
    folder = tmp_path_factory.mktemp("data")
    generator = random.Random(1)

    def text(longest: int) -> str:
        return " ".join(generator.choices(WORDS, k=generator.randint(2, longest)))

    pairs: list[dict[str, Any]] = [{"query": text(5), "positive": text(14)} for _ in range(EXAMPLES)]
    negatives = [[text(14) for _ in range(generator.choice([0, 0, 1, 3]))] for _ in pairs]
    rows = {
        "pairs": pairs,
        "negatives": [{**pair, "negative": texts} for pair, texts in zip(pairs, negatives, strict=True)],
    }
    for name, examples in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(example) + "\n" for example in examples))
    return folder


@pytest.fixture(scope="module")
def run_with(tiny_bert: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """Train on the examples with negatives, by a program and in a folder of its own."""

    def run(program: list[str], *overrides: str, folder: Path | None = None) -> Run:
        folder = folder or tmp_path_factory.mktemp("run")
        path = data / "negatives.jsonl"
        done = run_on_cpus(
            program,
            *tiny_overrides(tiny_bert, folder),
            *OVERRIDES,
            *(f"data.path={path}", f"data.evaluation_path={path}"),
            *overrides,
            home=folder / "home",
        )
        return Run(done, folder / "run")

    return run


@pytest.fixture(scope="module")
def run_of(run_with: Callable[..., Run]) -> Callable[[int], Run]:
    """The run of some number of processes, trained once."""

    @cache
    def run(processes: int) -> Run:
        ours = run_with(torchrun(processes) if processes > 1 else [sys.executable, TRAIN])
        assert ours.done.returncode == 0, ours.done.stderr
        return ours

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
            for name in ("train/loss", "train/gradient_norm", "train/learning_rate"):
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


def test_two_processes_leave_one_run_and_say_everything_once(run_of: Callable[[int], Run]) -> None:
    ours = run_of(2)
    assert {path.name for path in ours.folder.iterdir()} == {
        ".lock",
        "config.yaml",
        "metrics.jsonl",
        "model",
        "result.json",
    }
    assert [line["step"] for line in ours.metrics()] == [0, 1, 2, 3]
    assert ours.result()["processes"] == 2
    lines = [" ".join(line.split()) for line in ours.done.stdout.splitlines()]
    batch = "batch 8 queries a step, 2 micro-batch(es) of 4, 2 process(es) of 2 queries each"
    once = [batch, "precision float32 on", "module what it does parameters", "before ndcg@10", "step 3/3", "model:"]
    for start in once:
        assert sum(line.startswith(start) for line in lines) == 1, start
    assert "Traceback" not in ours.done.stderr
    assert not errors(ours.done)


@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_have_the_losses_gradient_norms_and_scores_of_one(
    processes: int, run_of: Callable[[int], Run]
) -> None:
    one = run_of(1)
    assert len({line["eval/ndcg@10"] for line in one.metrics() if "eval/ndcg@10" in line}) == 2
    assert_same_run(run_of(processes), one, processes=processes)


@pytest.fixture(scope="module")
def gradients(tiny_bert: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the gradients of one process and of two."""
    folder = tmp_path_factory.mktemp("gradients")
    worker = ["-m", "tests.gradients_worker"]
    for program in ([sys.executable, *worker], torchrun(2, *worker)):
        done = run_on_cpus(
            program,
            str(data),
            *tiny_overrides(tiny_bert, folder),
            *OVERRIDES,
            *("trainer.steps=1", "data.evaluation_fraction=0"),
            home=folder / "home",
        )
        assert done.returncode == 0, done.stderr
    return data


@pytest.mark.parametrize("examples", ["pairs", "negatives"])
def test_two_processes_have_the_gradient_of_one_for_every_parameter(examples: str, gradients: Path) -> None:
    one, two = (load_file(gradients / f"{examples}_of_{processes}.safetensors") for processes in (1, 2))
    assert list(two) == list(one)
    largest = max(gradient.abs().max().item() for gradient in one.values())
    for name, gradient in one.items():
        if name.endswith("key.bias"):
            # It adds the same to all scores of a query, which the softmax takes away: what is left is rounding.
            assert max(gradient.abs().max().item(), two[name].abs().max().item()) < 1e-9 * largest
            continue
        error = ((two[name] - gradient).abs().max() / gradient.abs().max()).item()
        assert error < 1e-5, f"{name}: {error}"


def test_a_batch_that_the_processes_cannot_share_gets_one_line(run_with: Callable[..., Run]) -> None:
    ours = run_with(torchrun(2), "trainer.batch_size=2", "trainer.accumulation_steps=1")
    # Eleven steps, one of them of a single example.
    assert errors(ours.done) == [
        "trainer.batch_size=2 in trainer.accumulation_steps=1 leaves a micro-batch with 1 of its queries, fewer than "
        "the 2 processes: raise trainer.batch_size or start fewer processes"
    ]
    assert ours.done.returncode == 1
    assert ours.done.stdout == ""
    assert not ours.folder.exists()


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
        "several processes were asked for and each would train by itself: on GPUs, accelerate launch --multi_gpu "
        "--num_processes 2 train.py ...; without, ACCELERATE_USE_CPU=true before the same command, "
        "or torchrun --nproc_per_node 2 train.py ...; for one process, unset MASTER_ADDR"
    ]
    assert ours.done.returncode == 1
    assert ours.done.stdout == ""
    assert not ours.folder.exists()


def test_accelerate_launch_with_the_file_for_one_node_runs_two_processes(
    run_with: Callable[..., Run], run_of: Callable[[int], Run]
) -> None:
    arguments = ["--config_file", str(CONFIGS / "one_node.yaml"), "--num_processes", "2", "--main_process_port", "0"]
    ours = run_with(without_gpus(accelerate_launch(*arguments)))
    assert ours.done.returncode == 0, ours.done.stderr
    assert_same_run(ours, run_of(1), processes=2)


def test_two_launches_with_the_file_for_two_nodes_train_one_run(
    run_with: Callable[..., Run], run_of: Callable[[int], Run], tmp_path: Path
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
    assert_same_run(first, run_of(1), processes=2)
    assert "2 process(es)" in first.done.stdout
    assert second.done.stdout == ""
