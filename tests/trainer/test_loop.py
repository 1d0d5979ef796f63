"""The loop against a plain one written here: no chunks, no fused optimiser, no Accelerate, scores by einsum."""

import io
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from datasets import Dataset
from rich.console import Console
from sentence_transformers import MultiVectorEncoder
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from architectures.factory import build_encoder
from configs.schema import Config
from losses import Loss, build_loss
from losses.batch import EncodedBatch
from trainer import loop
from trainer.data import Data
from trainer.data.batches import StepBatches
from trainer.data.retrieval import RetrievalSet
from trainer.loop import TrainingError, count_steps, train
from trainer.run_folder import RunFolder

MakeConfig = Callable[..., Config]

EXAMPLES = [
    ("what is a cat", "the cat is an animal that meows", ["a dog"]),
    ("which animal barks", "a dog barks.", []),
    ("what swims", "the fish, that swims", ["the cat", "is it a dog or a fish"]),
    ("a fish", "fish is what swims in the sea", []),
    ("is a dog an animal", "which animal is it", ["what"]),
    ("what meows", "that cat meows!", []),
]
# Four queries a step of the six, so every second step takes the two that are left; chunks of one to four texts.
OVERRIDES = [
    "data=pairs",
    "data.path=unused",
    "seed=7",
    "trainer.steps=5",
    "trainer.batch_size=4",
    "trainer.chunk_tokens=24",
    "trainer.max_gradient_norm=null",
    "loss.temperature=0.5",
    "optimizer.learning_rate=0.01",
    "optimizer.weight_decay=0.1",
    "optimizer.warmup_fraction=0.4",
]
ITERATION = {"train/loss", "train/learning_rate", "train/gradient_norm", "train/seconds"}
RATES = {"queries_per_second", "document_tokens_per_second", "padding_fraction"}
METRICS = {"ndcg@10", "mrr@10", "map", "recall@100"}


@pytest.fixture(autouse=True)
def new_accelerator_state() -> Iterator[None]:
    """Each test chooses its precision, which the state of a process otherwise keeps."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@dataclass(frozen=True)
class Run:
    result: dict[str, Any]
    metrics: list[dict[str, float]]
    gradients: list[list[Tensor]]
    """What the optimiser saw at each step, in the order of encoder.parameters()."""
    folder: RunFolder


def make_data(*, evaluated: bool = False) -> Data:
    examples = Dataset.from_list(
        [
            {"query": query, "positive": positive, "negatives": negatives, "place": f"made.jsonl:{row + 1}"}
            for row, (query, positive, negatives) in enumerate(EXAMPLES)
        ]
    )
    return Data(examples, RetrievalSet.from_examples(examples) if evaluated else None)


def run(
    encoder: MultiVectorEncoder,
    config: Config,
    *,
    data: Data | None = None,
    loss: Loss | None = None,
    mixed_precision: str = "no",
) -> Run:
    """Train on the CPU and collect all that the run leaves."""
    folder = RunFolder(config)
    folder.create()
    parameters = list(encoder.parameters())
    with collect_gradients(parameters) as gradients:
        result = train(
            Accelerator(cpu=True, mixed_precision=mixed_precision),
            encoder,
            loss=loss or build_loss(config.loss),
            data=data or make_data(),
            config=config,
            folder=folder,
            console=Console(file=io.StringIO()),
        )
    return Run(result, read_metrics(folder), gradients, folder)


def read_metrics(folder: RunFolder) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder.path / "metrics.jsonl").read_text().splitlines()]


@contextmanager
def collect_gradients(parameters: list[nn.Parameter]) -> Iterator[list[list[Tensor]]]:
    steps: list[list[Tensor]] = []

    def collect(*_: object) -> None:
        steps.append([p.grad.clone() if p.grad is not None else torch.zeros_like(p) for p in parameters])

    handle = register_optimizer_step_pre_hook(collect)
    yield steps
    handle.remove()


def without_dropout(encoder: MultiVectorEncoder) -> MultiVectorEncoder:
    for module in encoder.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return encoder


def rows_of(encoder: MultiVectorEncoder, config: Config, step: int) -> list[int]:
    """Rows of a step, from 1."""
    batches = StepBatches(
        make_data().train,
        encoder,
        batch_size=config.trainer.batch_size,
        accumulation_steps=1,
        chunk_tokens=1,
        seed=config.seed,
    )
    return batches.rows(step - 1)


def plain_loss(encoder: MultiVectorEncoder, rows: list[int], temperature: float) -> Tensor:
    """Cross-entropy over the batch, all texts of a side in one padded forward, MaxSim as one einsum."""
    queries = [EXAMPLES[row][0] for row in rows]
    documents = [EXAMPLES[row][1] for row in rows] + [text for row in rows for text in EXAMPLES[row][2]]
    outputs = [
        encoder(encoder.preprocess(texts, prompt=encoder.prompts[task], task=task), task=task)
        for task, texts in (("query", queries), ("document", documents))
    ]
    (query_vectors, query_mask), (document_vectors, document_mask) = [
        (output["token_embeddings"], output["attention_mask"].bool()) for output in outputs
    ]
    similarities = torch.einsum("qih,njh->qnij", query_vectors, document_vectors)
    similarities = similarities.masked_fill(~document_mask[None, :, None, :], -math.inf)
    scores = (similarities.max(dim=3).values * query_mask[:, None, :]).sum(dim=2)
    positives = torch.arange(len(rows))
    return -torch.log_softmax(scores / temperature, dim=1)[positives, positives].mean()


def gradients_of(encoder: MultiVectorEncoder, loss: Tensor) -> list[Tensor]:
    gradients = torch.autograd.grad(loss, list(encoder.parameters()), allow_unused=True)
    return [
        torch.zeros_like(parameter) if gradient is None else gradient
        for parameter, gradient in zip(encoder.parameters(), gradients, strict=True)
    ]


def total_norm(gradients: list[Tensor]) -> float:
    return math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients))


# Number of steps


@pytest.mark.parametrize(
    ("epochs", "examples", "batch_size", "steps"),
    [(1, 8, 4, 2), (1, 9, 4, 3), (2, 9, 4, 6), (0.5, 16, 4, 2), (0.5, 12, 4, 2), (2.5, 16, 4, 10), (0.07, 400, 4, 7)],
)
def test_epochs_take_their_share_of_the_steps_of_one_rounded_up(
    epochs: float, examples: int, batch_size: int, steps: int, make_config: MakeConfig
) -> None:
    config = make_config("trainer.steps=null", f"trainer.epochs={epochs}", f"trainer.batch_size={batch_size}")
    assert count_steps(config, examples) == steps


def test_steps_are_taken_as_configured(make_config: MakeConfig) -> None:
    assert count_steps(make_config("trainer.steps=17"), 3) == 17


# Against the plain loop


def test_losses_and_weights_equal_a_plain_loop(encoder: MultiVectorEncoder, make_config: MakeConfig) -> None:
    config = make_config(*OVERRIDES)
    # float64: float32 rounding would grow with the steps, as Adam divides small gradients by themselves.
    encoder = without_dropout(encoder).double()
    start = {name: parameter.detach().clone() for name, parameter in encoder.named_parameters()}
    ours = run(encoder, config)
    trained = {name: parameter.detach().clone() for name, parameter in encoder.named_parameters()}

    encoder.load_state_dict(start, strict=False)
    encoder.train()
    parameters = list(encoder.parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.999),
        eps=1e-8,
        foreach=False,
    )
    # Two steps of warm-up from 0, then down by a third a step.
    rates = [0.0, 0.005, 0.01, 0.01 * 2 / 3, 0.01 / 3]
    losses, norms = [], []
    for step, rate in enumerate(rates, start=1):
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = plain_loss(encoder, rows_of(encoder, config, step), 0.5)
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        norms.append(total_norm([p.grad for p in parameters if p.grad is not None]))
        optimizer.step()

    steps = ours.metrics[1:]
    # The loss is summed over micro-batches in float32.
    assert [line["train/loss"] for line in steps] == pytest.approx(losses, rel=1e-6)
    assert [line["train/gradient_norm"] for line in steps] == pytest.approx(norms, rel=1e-6)
    assert [line["train/learning_rate"] for line in steps] == pytest.approx(rates, rel=1e-9)
    for name, parameter in encoder.named_parameters():
        torch.testing.assert_close(trained[name], parameter.detach(), atol=1e-7, rtol=1e-6)
    assert sum(not torch.equal(trained[name], start[name]) for name in start) > len(start) / 2


def test_an_accumulated_step_has_the_gradient_of_the_weighted_mean_of_its_micro_batches(
    encoder: MultiVectorEncoder, make_config: MakeConfig
) -> None:
    # Five queries in two micro-batches: two and three.
    config = make_config(
        *OVERRIDES,
        "trainer.steps=1",
        "trainer.batch_size=6",
        "trainer.accumulation_steps=2",
        "trainer.chunk_tokens=999",
    )
    data = make_data()
    five = replace(data, train=data.train.select(range(5)))
    encoder = without_dropout(encoder).double().train()
    order = StepBatches(five.train, encoder, batch_size=6, accumulation_steps=2, chunk_tokens=1, seed=7).rows(0)
    first, second = plain_loss(encoder, order[:2], 0.5), plain_loss(encoder, order[2:], 0.5)
    expected_loss = first * 2 / 5 + second * 3 / 5
    expected = gradients_of(encoder, expected_loss)

    ours = run(encoder, config, data=five)

    assert ours.metrics[1]["train/loss"] == pytest.approx(expected_loss.item(), rel=1e-6)
    assert first.item() != pytest.approx(second.item(), rel=0.01)
    [gradients] = ours.gradients
    for gradient, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, other, atol=1e-9, rtol=1e-6)


def test_gradients_do_not_pile_up_from_one_step_to_the_next(
    encoder: MultiVectorEncoder, make_config: MakeConfig
) -> None:
    # A rate of almost 0 keeps the weights, so steps 1 and 4 have the gradients of one and the same encoder.
    config = make_config(*OVERRIDES, "optimizer.learning_rate=1e-30", "optimizer.weight_decay=0", "trainer.steps=4")
    encoder = without_dropout(encoder).double().train()
    ours = run(encoder, config)
    for step, gradients in enumerate(ours.gradients, start=1):
        expected = gradients_of(encoder, plain_loss(encoder, rows_of(encoder, config, step), 0.5))
        for gradient, other in zip(gradients, expected, strict=True):
            torch.testing.assert_close(gradient, other, atol=1e-9, rtol=1e-6)


def test_the_same_seed_gives_the_same_losses_with_dropout(make_config: MakeConfig) -> None:
    losses = []
    for name in ("first", "second"):
        config = make_config(*OVERRIDES, f"output_dir={Path(make_config().output_dir).parent}/{name}")
        torch.manual_seed(3)
        ours = run(build_encoder(config.backbone, config.head), config)
        losses.append([line["train/loss"] for line in ours.metrics[1:]])
    assert losses[0] == losses[1]


def test_dropout_is_on_also_after_an_evaluation(
    encoder: MultiVectorEncoder, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes = []

    def loss(batch: EncodedBatch) -> Tensor:
        modes.append({module.training for module in encoder.modules()})
        return batch.queries.sum()

    run(encoder, make_config(*OVERRIDES, "evaluation.every_steps=1"), data=make_data(evaluated=True), loss=loss)
    assert modes == [{True}] * 5


# Clipping


def test_gradients_are_scaled_down_to_the_largest_norm(encoder: MultiVectorEncoder, make_config: MakeConfig) -> None:
    config = make_config(*OVERRIDES, "trainer.steps=1", "trainer.max_gradient_norm=0.01")
    encoder = without_dropout(encoder).train()
    whole = gradients_of(encoder, plain_loss(encoder, rows_of(encoder, config, 1), 0.5))
    norm = total_norm(whole)
    assert norm > 0.1

    ours = run(encoder, config)

    assert total_norm(ours.gradients[0]) == pytest.approx(0.01, rel=1e-4)
    for clipped, gradient in zip(ours.gradients[0], whole, strict=True):
        # float32 gradients of norm 0.01.
        torch.testing.assert_close(clipped, gradient * 0.01 / norm, atol=1e-7, rtol=1e-3)
    assert ours.metrics[1]["train/gradient_norm"] == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize("largest", ["1e6", "null"])
def test_gradients_below_the_largest_norm_are_left_as_they_are(
    largest: str, encoder: MultiVectorEncoder, make_config: MakeConfig
) -> None:
    config = make_config(*OVERRIDES, "trainer.steps=1", f"trainer.max_gradient_norm={largest}")
    encoder = without_dropout(encoder).train()
    norm = total_norm(gradients_of(encoder, plain_loss(encoder, rows_of(encoder, config, 1), 0.5)))
    ours = run(encoder, config)
    assert total_norm(ours.gradients[0]) == pytest.approx(norm, rel=1e-5)
    assert ours.metrics[1]["train/gradient_norm"] == pytest.approx(norm, rel=1e-5)


# What is left behind


def test_metrics_have_step_0_and_one_line_a_step_of_finite_numbers(
    encoder: MultiVectorEncoder, make_config: MakeConfig
) -> None:
    ours = run(encoder, make_config(*OVERRIDES, "evaluation.every_steps=2"), data=make_data(evaluated=True))
    evaluated = {f"eval/{name}" for name in METRICS}
    iteration = ITERATION | {f"train/{name}" for name in RATES}
    assert [line["step"] for line in ours.metrics] == [0, 1, 2, 3, 4, 5]
    assert [set(line) - {"step"} for line in ours.metrics] == [
        evaluated,
        iteration,
        iteration | evaluated,
        iteration,
        iteration | evaluated,
        iteration | evaluated,
    ]
    assert all(math.isfinite(value) for line in ours.metrics for value in line.values())


def test_without_an_evaluation_set_step_0_is_bare_and_there_is_no_best_model(
    encoder: MultiVectorEncoder, make_config: MakeConfig
) -> None:
    ours = run(encoder, make_config(*OVERRIDES))
    assert ours.metrics[0] == {"step": 0}
    assert (ours.result["before"], ours.result["after"], ours.result["best"]) == (None, None, None)
    assert not (ours.folder.path / "best").exists()


def test_the_result_says_what_the_run_did(encoder: MultiVectorEncoder, make_config: MakeConfig) -> None:
    ours = run(encoder, make_config(*OVERRIDES), data=make_data(evaluated=True))
    result, steps = ours.result, ours.metrics[1:]
    assert set(result) == RATES | {
        "model",
        "best",
        "steps",
        "queries",
        "seconds",
        "processes",
        "before",
        "after",
        "peak_memory_bytes",
    }
    seconds = sum(line["train/seconds"] for line in steps)
    assert result["model"] == str(ours.folder.path / "model")
    # Six examples in batches of four at most: three a step.
    assert (result["steps"], result["queries"], result["processes"]) == (5, 15, 1)
    assert result["queries_per_second"] == pytest.approx(15 / seconds, rel=1e-9)
    assert result["seconds"] >= seconds
    assert result["before"] == {name: ours.metrics[0][f"eval/{name}"] for name in METRICS}
    assert result["after"] == {name: ours.metrics[5][f"eval/{name}"] for name in METRICS}
    assert result["best"] == {"model": result["model"], "step": 5, "ndcg@10": result["after"]["ndcg@10"]}
    # Python, torch and the encoder take more than 100 MB, and no machine of a test has a terabyte.
    assert 1e8 < result["peak_memory_bytes"] < 1e12
    json.dumps(result, allow_nan=False)


@pytest.mark.parametrize("chunk_tokens", [1, 999])
def test_rates_and_padding_are_those_of_the_documents(
    chunk_tokens: int, encoder: MultiVectorEncoder, make_config: MakeConfig
) -> None:
    config = make_config(*OVERRIDES, f"trainer.chunk_tokens={chunk_tokens}")
    ours = run(encoder, config)
    all_tokens = all_padded = 0
    for step, line in enumerate(ours.metrics[1:], start=1):
        rows = rows_of(encoder, config, step)
        documents = [EXAMPLES[row][1] for row in rows] + [text for row in rows for text in EXAMPLES[row][2]]
        encoded = encoder.tokenizer(["[D] " + text for text in documents], truncation=True, max_length=16)
        lengths = [len(ids) for ids in encoded["input_ids"]]
        tokens = sum(lengths)
        padded = tokens if chunk_tokens == 1 else len(lengths) * max(lengths)
        assert line["train/padding_fraction"] == pytest.approx(1 - tokens / padded, abs=1e-12)
        assert line["train/document_tokens_per_second"] * line["train/seconds"] == pytest.approx(tokens, rel=1e-9)
        assert line["train/queries_per_second"] * line["train/seconds"] == pytest.approx(len(rows), rel=1e-9)
        all_tokens, all_padded = all_tokens + tokens, all_padded + padded
    assert ours.result["padding_fraction"] == pytest.approx(1 - all_tokens / all_padded, abs=1e-12)


def test_the_saved_model_is_the_trained_encoder(encoder: MultiVectorEncoder, make_config: MakeConfig) -> None:
    before = encoder.encode_document(["a cat, a dog."])[0]
    ours = run(encoder, make_config(*OVERRIDES))
    saved = MultiVectorEncoder(ours.result["model"], device="cpu").encode_document(["a cat, a dog."])[0]
    assert torch.equal(saved, encoder.encode_document(["a cat, a dog."])[0])
    assert not torch.allclose(saved, before, atol=1e-3)


# The best model


class Script:
    """Stands for `evaluate`: gives the next score, and keeps how the encoder saw a text at that time."""

    def __init__(self, *scores: float) -> None:
        self.scores = iter(scores)
        self.vectors: list[Tensor] = []

    def __call__(self, encoder: MultiVectorEncoder, retrieval: RetrievalSet, *, batch_size: int) -> dict[str, float]:
        self.vectors.append(encoder.encode_document(["a cat, a dog."])[0])
        return {"ndcg@10": 0.5, "mrr@10": next(self.scores), "map": 0.5, "recall@100": 0.5}


def run_script(
    script: Script, encoder: MultiVectorEncoder, config: Config, monkeypatch: pytest.MonkeyPatch
) -> tuple[Run, Tensor | None]:
    """Train with scripted scores; return the run and how the model in best/ sees the text."""
    monkeypatch.setattr(loop, "evaluate", script)
    ours = run(encoder, config, data=make_data(evaluated=True))
    best = ours.folder.path / "best"
    reloaded = MultiVectorEncoder(str(best), device="cpu") if best.exists() else None
    return ours, None if reloaded is None else reloaded.encode_document(["a cat, a dog."])[0]


def test_the_best_model_of_the_metric_is_kept_and_reloads(
    encoder: MultiVectorEncoder, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Before training 0.9; of the steps the third is best, and the fourth as good.
    script = Script(0.9, 0.1, 0.3, 0.6, 0.6, 0.2)
    config = make_config(*OVERRIDES, "evaluation.every_steps=1", "evaluation.metric=mrr@10")
    ours, best = run_script(script, encoder, config, monkeypatch)
    assert ours.result["best"] == {"model": str(ours.folder.path / "best"), "step": 3, "mrr@10": 0.6}
    assert ours.result["after"]["mrr@10"] == 0.2
    assert best is not None
    assert torch.equal(best, script.vectors[3])
    assert not torch.allclose(best, script.vectors[5], atol=1e-3)


def test_a_last_model_that_is_best_is_named_as_best_and_replaces_the_one_before(
    encoder: MultiVectorEncoder, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(*OVERRIDES, "evaluation.every_steps=2", "evaluation.metric=mrr@10")
    ours, best = run_script(Script(0.1, 0.2, 0.3, 0.4), encoder, config, monkeypatch)
    assert ours.result["best"] == {"model": ours.result["model"], "step": 5, "mrr@10": 0.4}
    assert best is None, "what was best before is no longer"


def test_without_evaluations_in_between_no_second_model_is_written(
    encoder: MultiVectorEncoder, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = Script(0.9, 0.4)
    config = make_config(*OVERRIDES, "evaluation.metric=mrr@10")
    ours, best = run_script(script, encoder, config, monkeypatch)
    assert ours.result["best"] == {"model": ours.result["model"], "step": 5, "mrr@10": 0.4}
    assert best is None


# What stops a run


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_batch(
    value: float, encoder: MultiVectorEncoder, make_config: MakeConfig
) -> None:
    config = make_config(*OVERRIDES, "trainer.accumulation_steps=2")
    calls = []

    def loss(batch: EncodedBatch) -> Tensor:
        calls.append(len(batch.queries))
        # Two micro-batches a step: the fourth is the last of step 2.
        return batch.queries.sum() * 0 + (value if len(calls) == 4 else 1.0)

    rows = rows_of(encoder, config, 2)
    with pytest.raises(TrainingError) as caught:
        run(encoder, config, loss=loss)
    folder = RunFolder(config)
    assert str(caught.value) == (
        f"step 2: the loss is {value}; the batch is made.jsonl:{rows[0] + 1} and 2 more examples, "
        f"all in {folder.path}/failed_batch.jsonl: look at them, or lower optimizer.learning_rate"
    )
    written = [json.loads(line) for line in (folder.path / "failed_batch.jsonl").read_text().splitlines()]
    assert written == [make_data().train[row] for row in rows]
    assert [line["step"] for line in read_metrics(folder)] == [0, 1]
    assert not (folder.path / "model").exists()


def test_a_gradient_that_is_not_finite_stops_the_run_before_it_reaches_the_weights(
    encoder: MultiVectorEncoder, make_config: MakeConfig
) -> None:
    def loss(batch: EncodedBatch) -> Tensor:
        # Finite, with the gradient of a root at 0.
        return (batch.queries * 0).sum().sqrt()

    config = make_config(*OVERRIDES)
    with pytest.raises(TrainingError, match=r"^step 1: the gradient"):
        run(encoder, config, loss=loss)
    assert all(parameter.isfinite().all() for parameter in encoder.parameters())
    assert not (RunFolder(config).path / "model").exists()


# Precision


def test_bf16_changes_the_forward_pass_and_leaves_the_weights_in_float32(make_config: MakeConfig) -> None:
    losses = {}
    for precision, mixed_precision in (("float32", "no"), ("bf16", "bf16")):
        AcceleratorState._reset_state(reset_partial_state=True)
        folder = Path(make_config().output_dir).parent / precision
        config = make_config(*OVERRIDES, f"trainer.precision={precision}", f"output_dir={folder}")
        torch.manual_seed(3)
        encoder = without_dropout(build_encoder(config.backbone, config.head))
        ours = run(encoder, config, mixed_precision=mixed_precision)
        losses[precision] = [line["train/loss"] for line in ours.metrics[1:3]]
        assert {parameter.dtype for parameter in encoder.parameters()} == {torch.float32}
        reloaded = MultiVectorEncoder(ours.result["model"], device="cpu")
        assert {parameter.dtype for parameter in reloaded.parameters()} == {torch.float32}
    # bfloat16 has 8 bits: 1/256 of scores near 8, which a temperature of 0.5 doubles.
    assert losses["bf16"] == pytest.approx(losses["float32"], abs=0.06)
    assert losses["bf16"] != losses["float32"]
