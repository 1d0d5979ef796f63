"""The benchmark of a step: what is measured, the trainer's gradient, the table, and what a mistake gets."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

from configs.schema import Config
from losses.factory import build_loss
from scripts import benchmark_cache as benchmark
from scripts.benchmark_cache import Case, Measured
from tests.conftest import ROOT
from trainer.data.batches import Batch
from trainer.data.order import Place
from trainer.data.tokens import TokenizedTexts
from trainer.encoding import TrainedModel
from trainer.step import compute_gradient

TINY = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "pad_token_id": 0,
}
PLAIN = Measured(chunks=4, seconds=0.8512, before_bytes=3 * 2**28, peak_bytes=2**30, maxsim="reference")


@pytest.fixture(autouse=True)
def new_accelerator_state() -> Iterator[None]:
    """Each test chooses its precision, which the state of a process otherwise keeps."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def case(queries: int = 32, *, cached: bool, cache_tokens: int = 0, steps: int = 1) -> Case:
    return Case("cpu", cache_tokens, queries, cached, steps)


def test_a_row_has_memory_over_that_of_the_plain_step() -> None:
    assert benchmark.row(case(cached=False), PLAIN, PLAIN) == "| plain | 32 | 4 | 0.851 | 1,024 MiB | 768 MiB | 1.00x |"
    large = Measured(chunks=1234, seconds=94.31, before_bytes=2**29, peak_bytes=5 * 2**28, maxsim="reference")
    expected = "| cached | 1,024 | 1,234 | 94.3 | 1,280 MiB | 512 MiB | 1.25x |"
    assert benchmark.row(case(1024, cached=True), large, PLAIN) == expected
    assert benchmark.row(case(1024, cached=True), large, "killed").endswith("| 512 MiB | - |")
    failed = benchmark.row(case(1024, cached=True), "OutOfMemoryError: a | b", PLAIN)
    assert failed == "| cached | 1,024 | OutOfMemoryError: a / b | - | - | - | - |"


def test_the_plan_has_the_batches_of_the_device_the_plain_one_first() -> None:
    def planned(device: str, queries: int) -> list[tuple[int, bool, int]]:
        cases = benchmark.plan(device=device, queries=queries, cache_tokens=0)
        return [(each.queries, each.cached, each.steps) for each in cases]

    small = [(32, False, 3), (32, True, 3)]
    assert planned("cpu", 0) == [*small, (1024, True, 1)]
    assert planned("cpu", 64) == [*small, (64, True, 1)]
    assert planned("cuda", 0) == [*small, (1024, True, 3), (16384, True, 1)]


def test_a_step_that_fails_is_a_row_and_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measured(each: Case) -> Measured:
        if each.queries == 1024:
            raise torch.OutOfMemoryError("no memory\nmore")
        return PLAIN

    monkeypatch.setattr(benchmark, "ProcessPoolExecutor", lambda workers, mp_context: ThreadPoolExecutor(workers))
    monkeypatch.setattr(benchmark, "measure_alone", measured)
    assert benchmark.main(["device=cpu"]) == 1
    head, rule, plain, cached, large, machine = capsys.readouterr().out.splitlines()
    assert head.count("|") == rule.count("|") == plain.count("|") == large.count("|")
    assert cached.endswith("| 1.00x |")
    assert large == "| cached | 1,024 | OutOfMemoryError: no memory | - | - | - | - |"
    assert machine.endswith("MaxSim reference")
    assert f"torch {torch.__version__}" in machine
    assert benchmark.main(["device=cpu", "queries=64"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "device= is missing: one of cpu, cuda"),
        (["device=tpu"], "device=tpu: must be one of cpu, cuda"),
        (["device=cpu", "queries=-1"], "queries=-1: must be a whole number"),
        (["device=cpu", "steps=3"], "steps=3: the arguments are device=, queries=, cache_tokens="),
        pytest.param(
            ["device=cuda"],
            "device=cuda needs a GPU, and torch sees none: take device=cpu",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU"),
        ),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert benchmark.main(arguments) == 2
    assert capsys.readouterr().err == f"benchmark_cache: {message}\n"


def test_the_config_is_the_default_with_the_batch_and_the_cache_of_the_case() -> None:
    plain, cached = (benchmark.compose_config(case(1024, cached=cached)).trainer for cached in (False, True))
    assert (plain.batch_size, plain.cache_tokens) == (1024, None)
    assert (cached.batch_size, cached.cache_tokens) == (1024, plain.chunk_tokens)
    assert benchmark.compose_config(case(cached=True, cache_tokens=300)).trainer.cache_tokens == 300


@pytest.mark.parametrize("cached", [False, True])
def test_steps_of_the_trainer_are_full_batches(
    cached: bool, make_config: Callable[..., Config], tmp_path: Path
) -> None:
    # 70 examples would be cut into three steps of 23 or 24 instead of 32.
    pairs = [{"query": f"what is {number}", "positive": f"the animal {number}"} for number in range(70)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    config = make_config(
        "data=pairs",
        f"data.path={tmp_path}/pairs.jsonl",
        "data.evaluation_fraction=0",
        "trainer.batch_size=40",
        # Each text is a chunk of its own.
        "trainer.chunk_tokens=1",
        f"trainer.cache_tokens={1 if cached else 'null'}",
    )
    step, optimizer, maxsim = benchmark.prepare_training(config)
    assert maxsim == "reference"
    assert step(32, 0) == 64
    measured = benchmark.measure(case(40, cached=cached, steps=2), step, optimizer, maxsim)
    assert measured.chunks == 80
    assert measured.seconds > 0
    assert measured.peak_bytes >= measured.before_bytes > 0


# A plain step has a chunk of each side; 28 queries of 32 tokens, or 3 documents of 300, fit into 900.
@pytest.mark.parametrize(("cached", "chunks"), [(False, 2), (True, 2 + 11)])
def test_the_step_of_a_gpu_runs_at_a_tiny_size(cached: bool, chunks: int) -> None:
    chosen = case(32, cached=cached, cache_tokens=900, steps=2)
    step, optimizer, maxsim = benchmark.prepare_random(chosen, TINY)
    before = [parameter.clone() for group in optimizer.param_groups for parameter in group["params"]]
    measured = benchmark.measure(chosen, step, optimizer, maxsim)
    assert measured.chunks == chunks
    after = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert all(not torch.equal(old, new) for old, new in zip(before, after, strict=True))


@pytest.mark.parametrize("cached", [False, True])
def test_the_gradient_of_a_gpu_step_is_the_trainers(cached: bool, make_config: Callable[..., Config]) -> None:
    torch.manual_seed(0)
    encoder = benchmark.RandomEncoder(TINY)
    accelerator = Accelerator(cpu=True)
    ids = {"query": torch.randint(50, (6, 4)), "document": torch.randint(50, (6, 9))}
    chunks = {task: several.split(4) for task, several in ids.items()}

    def gradient(leave: Callable[[], object]) -> list[torch.Tensor]:
        encoder.zero_grad()
        leave()
        return [parameter.grad.clone() for parameter in encoder.parameters() if parameter.grad is not None]

    def texts(task: str) -> TokenizedTexts:
        features = [{"input_ids": each, "attention_mask": torch.ones_like(each)} for each in chunks[task]]
        return TokenizedTexts(features, torch.arange(6), ids[task].numel(), ids[task].numel())

    places = torch.arange(6)
    batch = Batch(
        queries=texts("query"),
        documents=texts("document"),
        candidates=places[:, None],
        teacher_scores=None,
        document_ids=places + 1,
        known_positives=places[:, None] + 1,
        places=[Place(0, 0, row) for row in range(6)],
        share=1.0,
    )
    loss = build_loss(make_config().loss, width=benchmark.WIDTH, maxsim="reference")
    model = TrainedModel(encoder, nn.ModuleDict())  # type: ignore[arg-type]
    expected = gradient(lambda: compute_gradient(accelerator, model, loss, [batch], cached=cached))
    ours = gradient(lambda: benchmark.leave_gradient(accelerator, encoder, chunks, cached=cached, maxsim="reference"))
    assert len(ours) == len(list(encoder.parameters()))
    assert max(float(each.abs().max()) for each in expected) > 1e-3
    # The same operations in the same order.
    assert all(torch.equal(one, other) for one, other in zip(ours, expected, strict=True))


def test_the_step_of_a_gpu_needs_no_package_that_only_training_needs() -> None:
    absent = ["hydra", "omegaconf", "datasets", "wandb", "pytrec_eval", "sentence_transformers"]
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({absent}));"
        "from scripts.benchmark_cache import Case, prepare_random;"
        f"print(prepare_random(Case('cpu', 0, 4, True, 1), {TINY})[0](4, 0))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == "2\n", done.stderr
