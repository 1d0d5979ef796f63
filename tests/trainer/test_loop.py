"""The loop against a plain one written here: no chunks, no fused optimiser, no Accelerate, scores by einsum."""

import io
import json
import math
import shlex
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache
from itertools import count
from pathlib import Path
from signal import SIGINT, SIGTERM
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from rich.console import Console
from sentence_transformers import MultiVectorEncoder
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from architectures.factory import build_encoder
from configs.schema import Config
from losses.factory import Loss, Term, build_loss
from losses.maxsim import kernels
from losses.scores import Scores
from scripts.kill_and_resume import CLOCK
from tests.losses import emulation
from tests.trainer.made import to_set, with_config
from trainer import loop, stop
from trainer.data import Data
from trainer.data.batches import StepBatches
from trainer.data.retrieval import RetrievalSet
from trainer.data.tables import with_texts
from trainer.encoding import encode_batch
from trainer.evaluation import Progress, evaluate
from trainer.loop import Stopped, TrainingError, build_batches, count_steps, train
from trainer.metrics import QueryScores, read_scores
from trainer.optim import freeze
from trainer.phases import PHASES
from trainer.run_folder import RunFolder
from trainer.significance import change_interval
from trainer.tracker import Tracker

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
    "loss.contrastive.temperature=0.5",
    "optimizer.learning_rate=0.01",
    "optimizer.weight_decay=0.1",
    "optimizer.warmup_fraction=0.4",
]
ITERATION = {
    *("train/loss", "train/contrastive", "train/same_document_masked", "train/known_positives_masked"),
    *("train/learning_rate", "train/gradient_norm", "train/seconds"),
}
RATES = {"queries_per_second", "document_tokens_per_second", "padding_fraction"}
METRICS = {"ndcg@10", "mrr@10", "map", "recall@100"}
MATRYOSHKA = "loss.matryoshka={widths: [128, 32], weights: [1, 0.5]}"
DISTILLATION = ("data=distillation_ids", "loss=distillation_contrastive")
DRAWN = ("data.documents_per_query=2", "loss.distillation.normalization=none")
LEARNT = ("loss.contrastive.learn_temperature=true", "optimizer.groups=[{pattern: loss.*, learning_rate: 0.05}]")


@dataclass(frozen=True)
class Run:
    result: dict[str, Any]
    metrics: list[dict[str, float]]
    gradients: list[list[Tensor]]
    """What the optimiser saw at each step, in the order of encoder.parameters()."""
    folder: RunFolder
    said: str


def make_data(*, evaluated: bool = False, taught: bool = False) -> Data:
    """taught: each query has three documents, and a teacher that gives document d of row r the score r - d / 2."""
    rows = [(query, [positive, *negatives]) for query, positive, negatives in EXAMPLES]
    if taught:
        rows = [(query, [*documents, "fish", "what is that"][:3]) for query, documents in rows]
    examples = to_set(
        [
            with_texts(
                f"made.jsonl:{row + 1}",
                query,
                documents,
                scores=[row - place / 2 for place in range(len(documents))] if taught else [],
            )
            for row, (query, documents) in enumerate(rows)
        ]
    )
    return Data([examples], {"made": RetrievalSet.from_examples(examples)} if evaluated else {})


def first_five(data: Data) -> Data:
    [examples] = data.sets
    return replace(data, sets=[examples.select(range(5))])


def run(
    encoder: MultiVectorEncoder,
    config: Config,
    *,
    data: Data | None = None,
    loss: Loss | None = None,
    mixed_precision: str = "no",
    resume: bool = False,
) -> Run:
    """Train on the CPU and collect all that the run leaves."""
    folder = RunFolder(config, resume=resume)
    folder.open()
    parameters, data, loss = list(encoder.parameters()), data or make_data(), loss or loss_of(config)
    freeze(encoder, loss.learnt, config.optimizer)
    said = io.StringIO()
    accelerator = Accelerator(cpu=True, mixed_precision=mixed_precision)
    with collect_gradients(parameters) as gradients, unlocked_at_the_end(folder):
        result = train(
            accelerator,
            encoder,
            loss=loss,
            batches=make_batches(encoder, config, data, accelerator),
            evaluation=data.evaluation,
            config=config,
            folder=folder,
            tracker=Tracker(config, main=True, say=print),
            console=Console(file=said, soft_wrap=True),
        )
    return Run(result, read_metrics(folder), gradients, folder, said.getvalue())


def loss_of(config: Config, term: Term | None = None, *, maxsim: str = "reference") -> Loss:
    """The loss of the config, or the same with another term in place of the contrastive one."""
    loss = build_loss(config.loss, width=128, maxsim=maxsim)
    return loss if term is None else replace(loss, terms=loss.terms | {"contrastive": term})


def read_metrics(folder: RunFolder) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder.path / "metrics.jsonl").read_text().splitlines()]


@contextmanager
def collect_gradients(parameters: list[nn.Parameter]) -> Iterator[list[list[Tensor]]]:
    steps: list[list[Tensor]] = []

    def collect(*_: object) -> None:
        steps.append([p.grad.clone() if p.grad is not None else torch.zeros_like(p) for p in parameters])

    handle = register_optimizer_step_pre_hook(collect)
    try:
        yield steps
    finally:
        handle.remove()


@contextmanager
def unlocked_at_the_end(folder: RunFolder) -> Iterator[None]:
    """Give the folder back as the end of a process does, so that the next run of this one may have it."""
    try:
        yield
    finally:
        folder._lock.release()


def without_dropout(encoder: MultiVectorEncoder) -> MultiVectorEncoder:
    for module in encoder.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return encoder


def rows_of(encoder: MultiVectorEncoder, config: Config, step: int) -> list[int]:
    """Rows of a step, from 1."""
    return rows_in(make_batches(encoder, config, make_data()), step - 1)


def make_batches(
    encoder: MultiVectorEncoder, config: Config, data: Data, accelerator: Accelerator | None = None
) -> StepBatches:
    """The sets of a mix keep what each says of itself."""
    sets = with_config(data, config.data).sets if len(data.sets) == 1 else data.sets
    return build_batches(config, sets, encoder, accelerator or Accelerator(cpu=True))


def rows_in(batches: StepBatches, step: int) -> list[int]:
    return [place.row for place in batches.order.step(step)]


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
    five = first_five(data)
    encoder = without_dropout(encoder).double().train()
    order = rows_in(make_batches(encoder, config, five), 0)
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


def test_dropout_is_on_also_after_an_evaluation(encoder: MultiVectorEncoder, make_config: MakeConfig) -> None:
    modes = []

    def term(scores: Scores) -> tuple[Tensor, dict[str, Tensor]]:
        modes.append({module.training for module in encoder.modules()})
        return scores.batch.queries.sum(dim=(1, 2)), {}

    config = make_config(*OVERRIDES, "evaluation.every_steps=1")
    run(encoder, config, data=make_data(evaluated=True), loss=loss_of(config, term))
    assert modes == [{True}] * 5


def test_batches_are_cut_and_drawn_as_the_config_says(encoder: MultiVectorEncoder, make_config: MakeConfig) -> None:
    config = make_config(*OVERRIDES, "data.documents_per_query=2", "trainer.accumulation_steps=2")
    batches = make_batches(encoder, config, make_data())
    assert (batches.batch_size, batches.accumulation_steps, batches.seed) == (4, 2, 7)
    assert [each.config.documents_per_query for each in batches.sets] == [2]
    assert (batches.process, batches.processes) == (0, 1)
    assert batches.chunk_tokens == 24
    assert make_batches(encoder, make_config("trainer.cache_tokens=16"), make_data()).chunk_tokens == 16


# What the loss is made of


def test_each_term_is_logged_by_itself_at_each_width_as_the_mean_over_the_queries(
    encoder: MultiVectorEncoder, make_config: MakeConfig
) -> None:
    config = make_config(
        *(*OVERRIDES, *DISTILLATION, "loss.terms.margin_mse=0.25", MATRYOSHKA),
        *("trainer.steps=1", "trainer.batch_size=6", "trainer.accumulation_steps=2"),
    )
    data = make_data(taught=True)
    # Two micro-batches: of two queries, and of three.
    five = first_five(data)
    encoder = without_dropout(encoder).train()
    expected: dict[str, float] = {}
    for batch in make_batches(encoder, config, five)[0]:
        with torch.no_grad():
            _, logged = loss_of(config)(encode_batch(encoder, batch, torch.device("cpu")))
        for name, value in logged.items():
            expected[name] = expected.get(name, 0.0) + value.item() * len(batch.places) / 5
    terms = {"contrastive": 0.1, "distillation": 1.0, "margin_mse": 0.25}
    facts = {"same_document_masked", "known_positives_masked"}
    assert set(expected) == {f"{name}@{width}" for name in terms for width in (128, 32)} | facts

    ours = run(encoder, config, data=five)

    line = ours.metrics[1]
    assert {name: line[f"train/{name}"] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert line["train/loss"] == pytest.approx(
        sum(
            width_weight * weight * expected[f"{name}@{width}"]
            for width, width_weight in ((128, 1.0), (32, 0.5))
            for name, weight in terms.items()
        ),
        rel=1e-5,
    )
    shown = ", ".join(f"{name} {line[f'train/{name}@128']:.4f}" for name in terms)
    assert f"step 1/1  loss {line['train/loss']:.4f} ({shown})  lr " in ours.said


def test_what_is_left_out_of_the_negatives_is_logged_in_documents_a_query(
    encoder: MultiVectorEncoder, make_config: MakeConfig
) -> None:
    answers = [("what is a cat", "it meows"), ("what is a cat", "an animal"), ("what is it", "it meows"), ("a", "fish")]
    examples = to_set([with_texts("made.jsonl:1", query, [text]) for query, text in answers])
    config = make_config(*OVERRIDES, "trainer.steps=1", "loss.contrastive.max_negative_ratio=1e-6")
    line = run(encoder, config, data=Data([examples], {})).metrics[1]
    # "it meows" stands again for the first and the third query, "an animal" and twice "it meows" are known of the two
    # about a cat, and the other seven of twelve negatives score more than next to nothing.
    assert line["train/same_document_masked"] == pytest.approx(2 / 4)
    assert line["train/known_positives_masked"] == pytest.approx(3 / 4)
    assert line["train/above_ratio_masked"] == pytest.approx(7 / 4)
    assert line["train/loss"] == pytest.approx(0, abs=1e-6)


def test_a_learnt_temperature_starts_as_configured_and_moves_at_its_own_rate(
    encoder: MultiVectorEncoder, make_config: MakeConfig
) -> None:
    ours = run(encoder, make_config(*OVERRIDES, *LEARNT))
    lines = ours.metrics[1:]
    # The first step is of the warm-up, from 0.
    rates = [0.0, 0.025, 0.05, 0.05 * 2 / 3, 0.05 / 3]
    assert [line["train/learning_rate/loss.*"] for line in lines] == pytest.approx(rates, rel=1e-9)
    for line in lines:
        assert line["train/learning_rate"] == line["train/learning_rate/adamw"]
        assert line["train/learning_rate/loss.*"] == pytest.approx(5 * line["train/learning_rate"], rel=1e-9)
    temperatures = [line["train/temperature"] for line in lines]
    assert temperatures[:2] == pytest.approx([0.5, 0.5], rel=1e-6)
    for rate, before, after in zip(rates[1:], temperatures[1:], temperatures[2:], strict=False):
        # In its logarithm, by steps of Adam, which are not much larger than the rate.
        assert 0 < abs(math.log(after / before)) < 1.5 * rate
    assert abs(math.log(temperatures[-1] / 0.5)) > 0.02


def test_rates_are_logged_by_group_where_there_are_several(
    encoder: MultiVectorEncoder, make_config: MakeConfig
) -> None:
    groups = "optimizer.groups=[{pattern: head.*, learning_rate: 0.04}]"
    config = make_config(*OVERRIDES, "optimizer=muon", "optimizer.muon_learning_rate=0.02", groups)
    names = {"adamw": 0.01, "muon": 0.02, "head.*": 0.04}
    for line, share in zip(run(encoder, config).metrics[1:], (0, 0.5, 1, 2 / 3, 1 / 3), strict=True):
        logged = {name: line[f"train/learning_rate/{name}"] for name in names}
        assert logged == pytest.approx({name: share * rate for name, rate in names.items()}, rel=1e-9)
        assert line["train/learning_rate"] == logged["adamw"]


def test_every_width_is_scored_and_the_models_own_is_watched(
    encoder: MultiVectorEncoder, make_config: MakeConfig
) -> None:
    ours = run(encoder, make_config(*OVERRIDES, MATRYOSHKA, "trainer.steps=1"), data=make_data(evaluated=True))
    names = METRICS | {f"{name}/32" for name in METRICS}
    for line, when in zip(ours.metrics, ("before", "after"), strict=True):
        assert {key for key in line if key.startswith("eval/")} == {f"eval/{name}" for name in names}
        assert ours.result[when] == {name: line[f"eval/{name}"] for name in names}
    assert ours.result["best"]["ndcg@10"] == ours.result["after"]["ndcg@10"]
    assert ours.result["before"]["ndcg@10/32"] != ours.result["before"]["ndcg@10"]


# A mix

MIXES = [(), ("data.mix_batches=all_sets",)]


def make_mix() -> Data:
    """Of three, of five and of six examples, of which the last draws its negatives anew each epoch."""
    [examples], [taught] = make_data().sets, make_data(taught=True).sets
    return Data(
        [
            replace(examples.select([0, 2, 4]), name="first", config=replace(examples.config, document_length=9)),
            replace(examples.select(range(5)), name="second", config=replace(examples.config, query_prefix="is ")),
            replace(taught, name="third", config=replace(taught.config, documents_per_query=2)),
        ],
        {},
    )


@pytest.mark.parametrize("cached", [False, True], ids=["plain", "accumulated and cached"])
@pytest.mark.parametrize("mix", MIXES, ids=["one set", "all sets"])
def test_each_set_of_a_mix_is_logged_with_its_loss_and_its_queries(
    mix: tuple[str, ...], cached: bool, encoder: MultiVectorEncoder, make_config: MakeConfig
) -> None:
    # At this rate the weights stay, and with them what each step costs.
    overrides = [*OVERRIDES, "trainer.steps=9", "optimizer.learning_rate=1e-30", *mix]
    overrides += ["trainer.accumulation_steps=2", "trainer.cache_tokens=24"] if cached else []
    config = make_config(*overrides)
    data, encoder = make_mix(), without_dropout(encoder).train()
    batches = make_batches(encoder, config, data)
    names = [each.name for each in data.sets]
    seen: list[set[str]] = []
    for line in run(deepcopy(encoder), config, data=data).metrics[1:]:
        values: dict[str, list[float]] = {name: [] for name in names}
        for batch in batches[int(line["step"]) - 1]:
            with torch.no_grad():
                losses, _ = loss_of(config)(encode_batch(encoder, batch, torch.device("cpu")))
            for place, value in zip(batch.places, losses.tolist(), strict=True):
                values[names[place.set]].append(value)
        logged = {name for name in names if values[name]}
        assert {key for key in line if key.endswith(("/queries", "/loss"))} == {
            "train/loss",
            *(f"train/{name}/{what}" for name in logged for what in ("loss", "queries")),
        }
        for name in logged:
            assert line[f"train/{name}/queries"] == len(values[name])
            assert line[f"train/{name}/loss"] == pytest.approx(math.fsum(values[name]) / len(values[name]), rel=1e-5)
        queries = {name: line[f"train/{name}/queries"] for name in logged}
        mean = sum(line[f"train/{name}/loss"] * queries[name] for name in logged) / sum(queries.values())
        assert mean == pytest.approx(line["train/loss"], rel=1e-5)
        seen.append(logged)
    assert set().union(*seen) == set(names)
    assert max(map(len, seen)) == (3 if mix else 1)


def test_a_single_set_is_logged_as_the_loss_alone(encoder: MultiVectorEncoder, make_config: MakeConfig) -> None:
    for line in run(encoder, make_config(*OVERRIDES)).metrics[1:]:
        assert {key for key in line if key.endswith(("/queries", "/loss"))} == {"train/loss"}


def test_each_set_of_several_is_scored_by_itself_and_with_the_others(
    encoder: MultiVectorEncoder, make_config: MakeConfig
) -> None:
    data = make_data(evaluated=True)
    [one] = data.evaluation.values()
    sets = {"one": one, "two": replace(one, query_prefix="no ", document_length=5)}
    expected = {name: evaluate(encoder, {name: own}, batch_size=8, widths=[])[name] for name, own in sets.items()}
    ours = run(encoder, make_config(*OVERRIDES, "evaluation.metric=map"), data=replace(data, evaluation=sets))
    logged, queries = ours.metrics[0], len(one.queries)
    means_of = {name: math.fsum(own["map"].values()) / queries for name, own in expected.items()}
    assert means_of["one"] != means_of["two"]
    assert {key for key in logged if key.count("/") == 2} == {"eval/one/map", "eval/two/map"}
    assert logged["eval/one/map"] == pytest.approx(means_of["one"], rel=1e-12)
    assert logged["eval/two/map"] == pytest.approx(means_of["two"], rel=1e-12)
    assert logged["eval/map"] == pytest.approx((means_of["one"] + means_of["two"]) / 2, rel=1e-12)
    written = read_scores(ours.folder.path / "scores_before.jsonl")["map"]
    assert written == {
        f"{name}/{query}": value for name, own in expected.items() for query, value in own["map"].items()
    }


# Numbers that are read a step late, as those of a GPU


def test_numbers_that_are_read_late_are_the_same(
    encoder: MultiVectorEncoder, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = [*OVERRIDES, "evaluation.every_steps=2", "trainer.save_every_steps=3"]
    data = make_data(evaluated=True)
    at_once = run(deepcopy(encoder), make_config(*overrides, *beside(make_config, "at once")), data=data)
    monkeypatch.setattr(loop, "STEPS_AHEAD", {"cpu": 1})
    late = run(encoder, make_config(*overrides, *beside(make_config, "late")), data=data)
    assert_equal(late, at_once)
    assert [line["step"] for line in late.metrics] == list(range(6))


def test_a_step_whose_numbers_come_late_is_named_all_the_same_and_not_saved(
    encoder: MultiVectorEncoder, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "STEPS_AHEAD", {"cpu": 1})
    config = make_config(*OVERRIDES, "trainer.save_every_steps=2")
    folder, seen = RunFolder(config), count(1)
    term = loss_of(config).terms["contrastive"]

    def broken(scores: Scores) -> tuple[Tensor, dict[str, Tensor]]:
        values, facts = term(scores)
        return values * (math.nan if next(seen) == 3 else 1.0), facts

    with pytest.raises(TrainingError, match=r"^step 3: the loss is nan"):
        run(encoder, config, loss=loss_of(config, broken))
    assert folder.saved_step() == 2
    assert [line["step"] for line in read_metrics(folder)] == [0, 1, 2]


# Where the time goes


def test_a_profile_has_the_seconds_of_each_phase_of_every_step_and_a_trace(
    encoder: MultiVectorEncoder, make_config: MakeConfig
) -> None:
    ours = run(encoder, make_config(*OVERRIDES, "trainer.profile=true"))
    for line in ours.metrics[1:]:
        own = {key.removeprefix("train/seconds/"): value for key, value in line.items() if "seconds/" in key}
        assert set(PHASES) - set(own) <= {"numbers"}
        assert 0 < sum(own.values()) <= line["train/seconds"] * 1.05 + 0.01
    assert list(ours.result["phases"]) == list(PHASES)
    assert ours.result["phases"]["documents"] == pytest.approx(
        sum(line["train/seconds/documents"] for line in ours.metrics[1:]) / 5
    )
    assert (ours.folder.path / "trace.json.gz").stat().st_size > 0


def test_without_a_profile_no_phase_is_logged(encoder: MultiVectorEncoder, make_config: MakeConfig) -> None:
    ours = run(encoder, make_config(*OVERRIDES))
    assert not [key for line in ours.metrics for key in line if "seconds/" in key]
    assert ours.result["phases"] == {}
    assert not (ours.folder.path / "trace.json.gz").exists()


# What takes less memory, or another step


@pytest.mark.parametrize("override", ["trainer.cache_tokens=24", "trainer.gradient_checkpointing=true"])
def test_less_memory_takes_a_second_pass_and_leaves_the_same_weights(
    override: str, encoder: MultiVectorEncoder, make_config: MakeConfig
) -> None:
    # With dropout, which both passes must draw alike. float64, as Adam divides small gradients by themselves.
    encoder = encoder.double()
    overrides = [*OVERRIDES, *LEARNT, "trainer.accumulation_steps=2", "trainer.steps=4"]
    runs, weights, passes = [], [], []
    for name, extra in (("plain", []), ("other", [override])):
        trained = deepcopy(encoder)
        calls: list[bool] = []
        [query] = [module for name, module in trained.named_modules() if name.endswith("layer.0.attention.self.query")]
        handle = query.register_forward_pre_hook(lambda module, _, calls=calls: calls.append(module.training))
        runs.append(run(trained, make_config(*overrides, *extra, *beside(make_config, name))))
        handle.remove()
        weights.append(dict(trained.named_parameters()))
        passes.append(sum(calls))
    assert passes[1] == 2 * passes[0]
    for name, parameter in weights[1].items():
        torch.testing.assert_close(parameter, weights[0][name], atol=1e-7, rtol=1e-6)
        assert not torch.equal(parameter, dict(encoder.named_parameters())[name])
    for line, plain in zip(runs[1].metrics[1:], runs[0].metrics[1:], strict=True):
        for key in ("train/loss", "train/temperature", "train/gradient_norm"):
            assert line[key] == pytest.approx(plain[key], rel=1e-6), key


def test_muon_and_a_rate_of_the_heads_own_leave_other_weights(
    encoder: MultiVectorEncoder, make_config: MakeConfig
) -> None:
    weights = []
    for name, extra in {
        "adamw": [],
        "muon": ["optimizer=muon"],
        "fast": ["optimizer.groups=[{pattern: head.*, learning_rate: 0.1}]"],
        "frozen": ["optimizer.groups=[{pattern: head.*, learning_rate: 0}]"],
    }.items():
        trained = deepcopy(encoder)
        run(trained, make_config(*OVERRIDES, *extra, *beside(make_config, name)))
        weights.append(dict(trained.named_parameters()))
    before = dict(encoder.named_parameters())
    [head] = [name for name in before if name.endswith("linear.weight")]
    [query] = [name for name in before if name.endswith("layer.0.attention.self.query.weight")]
    plain, _, fast, frozen = ({name: change(own, before, name) for name in (head, query)} for own in weights)
    assert fast[head] > 5 * plain[head]
    assert frozen[head] == 0
    assert frozen[query] > 0.5 * plain[query] > 0
    assert not torch.allclose(weights[1][query], weights[0][query], atol=1e-3)


def change(after: dict[str, nn.Parameter], before: dict[str, nn.Parameter], name: str) -> float:
    return float((after[name] - before[name]).detach().norm())


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
    assert [ours.result[key] for key in ("before", "after", "best", "change")] == [None] * 4
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
        "change",
        "evaluation_id",
        "phases",
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


@pytest.mark.parametrize(("chunk_tokens", "pack"), [(1, "false"), (999, "false"), (999, "true")])
def test_rates_and_padding_are_those_of_the_documents(
    chunk_tokens: int, pack: str, encoder: MultiVectorEncoder, make_config: MakeConfig
) -> None:
    config = make_config(*OVERRIDES, f"trainer.chunk_tokens={chunk_tokens}", f"trainer.pack={pack}")
    ours = run(encoder, config)
    all_tokens = all_padded = 0
    for step, line in enumerate(ours.metrics[1:], start=1):
        rows = rows_of(encoder, config, step)
        documents = [EXAMPLES[row][1] for row in rows] + [text for row in rows for text in EXAMPLES[row][2]]
        encoded = encoder.tokenizer(["[D] " + text for text in documents], truncation=True, max_length=16)
        lengths = [len(ids) for ids in encoded["input_ids"]]
        tokens = sum(lengths)
        padded = tokens if chunk_tokens == 1 or pack == "true" else len(lengths) * max(lengths)
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

    def __init__(self, *scores: float | list[float]) -> None:
        """scores: of one query, or of several in a list."""
        self.scores = iter(scores)
        self.vectors: list[Tensor] = []

    def __call__(
        self,
        encoder: MultiVectorEncoder,
        sets: Mapping[str, RetrievalSet],
        *,
        batch_size: int,
        widths: Sequence[int],
        progress: Progress,
    ) -> dict[str, QueryScores]:
        self.vectors.append(encoder.encode_document(["a cat, a dog."])[0])
        score = next(self.scores)
        values = {f"q{index}": value for index, value in enumerate(score if isinstance(score, list) else [score])}
        others = dict.fromkeys(values, 0.5)
        scores = {"ndcg@10": others, "mrr@10": values, "map": others, "recall@100": others}
        return dict.fromkeys(sets, scores)


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


def test_the_change_of_the_metric_has_an_interval_over_the_queries(
    encoder: MultiVectorEncoder, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, after = [0.1, 0.9, 0.5, 0.2], [0.4, 0.8, 0.9, 0.2]
    monkeypatch.setattr(loop, "evaluate", Script(before, [0.0] * 4, after))
    config = make_config(*OVERRIDES, "evaluation.metric=mrr@10", "evaluation.every_steps=4")
    result = run(encoder, config, data=make_data(evaluated=True)).result
    low, high = change_interval(before, after)
    assert low < 0.15 < high
    assert result["change"] == {"metric": "mrr@10", "change": pytest.approx(0.15), "low": low, "high": high}


# What stops a run


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_batch(
    value: float, encoder: MultiVectorEncoder, make_config: MakeConfig
) -> None:
    config = make_config(*OVERRIDES, "trainer.accumulation_steps=2")
    calls = []

    def term(scores: Scores) -> tuple[Tensor, dict[str, Tensor]]:
        calls.append(len(scores.batch.queries))
        # Two micro-batches a step: the fourth is the last of step 2.
        return scores.batch.queries.sum(dim=(1, 2)) * 0 + (value if len(calls) == 4 else 1.0), {}

    rows = rows_of(encoder, config, 2)
    with pytest.raises(TrainingError) as caught:
        run(encoder, config, loss=loss_of(config, term))
    folder = RunFolder(config)
    assert str(caught.value) == (
        f"step 2: the loss is {value}; the batch is made.jsonl:{rows[0] + 1} and 2 more examples, "
        f"all in {folder.path}/failed_batch.jsonl: look at them, or lower optimizer.learning_rate"
    )
    written = [json.loads(line) for line in (folder.path / "failed_batch.jsonl").read_text().splitlines()]
    assert written == [make_data().sets[0].example(row) for row in rows]
    assert [line["step"] for line in read_metrics(folder)] == [0, 1]
    assert not (folder.path / "model").exists()


def test_a_gradient_that_is_not_finite_stops_the_run_before_anything_is_saved(
    encoder: MultiVectorEncoder, make_config: MakeConfig
) -> None:
    def term(scores: Scores) -> tuple[Tensor, dict[str, Tensor]]:
        # Finite, with the gradient of a root at 0.
        return (scores.batch.queries * 0).sum().sqrt(), {}

    config = make_config(*OVERRIDES, "trainer.save_every_steps=1")
    with pytest.raises(TrainingError, match=r"^step 1: the gradient norm is nan"):
        run(encoder, config, loss=loss_of(config, term))
    assert RunFolder(config).saved_step() == 0
    assert not (RunFolder(config).path / "model").exists()


# Checkpoints


def checkpoints(config: Config) -> list[str]:
    """Names of the checkpoints that a run has left, newest first."""
    return [path.name for path in RunFolder(config).checkpoints()]


def test_a_checkpoint_is_saved_every_so_many_steps_and_the_newest_are_kept(
    encoder: MultiVectorEncoder, make_config: MakeConfig
) -> None:
    config = make_config(*OVERRIDES, "trainer.steps=8", "trainer.save_every_steps=2", "trainer.keep_checkpoints=2")
    run(encoder, config)
    # After the last step the model is saved instead.
    assert checkpoints(config) == ["step_00000006", "step_00000004"]


@pytest.mark.parametrize("every", ["null", "5", "99"])
def test_no_checkpoint_is_saved_unasked_or_at_the_last_step(
    every: str, encoder: MultiVectorEncoder, make_config: MakeConfig
) -> None:
    config = make_config(*OVERRIDES, f"trainer.save_every_steps={every}")
    run(encoder, config)
    assert checkpoints(config) == []


def test_saving_changes_nothing_of_the_run(encoder: MultiVectorEncoder, make_config: MakeConfig) -> None:
    runs = []
    for every in ("null", "1"):
        config = make_config(*OVERRIDES, f"trainer.save_every_steps={every}", *beside(make_config, f"every_{every}"))
        runs.append(run(deepcopy(encoder), config))
    assert_equal(*runs)


# Runs that go on


class Killed(Exception):
    """Stands for the end of a process in the middle of a step."""


def beside(make_config: MakeConfig, name: str) -> list[str]:
    """A folder of its own."""
    return [f"output_dir={Path(make_config().output_dir).parent / name}"]


def dying(config: Config, *, step: int) -> Loss:
    """The loss of the config, until it is asked for that of a step, counted from 1 in this process."""
    asked_before = (step - 1) * config.trainer.accumulation_steps * max(1, len(config.loss.matryoshka.widths))

    def die(call: int) -> None:
        if call > asked_before:
            raise Killed

    return after_calling(die, config)


def signalling(config: Config, number: signal.Signals, *, step: int, times: int = 1) -> Loss:
    """The loss of the config, which sends this process a signal in the middle of a step."""

    def send(call: int) -> None:
        if call == step:
            for _ in range(times):
                signal.raise_signal(number)

    return after_calling(send, config)


def after_calling(first: Callable[[int], None], config: Config) -> Loss:
    """The loss of the config, which calls something else first, with the number of the call, from 1."""
    loss, calls = loss_of(config), count(1)
    name, term = next(iter(loss.terms.items()))

    def both(scores: Scores) -> tuple[Tensor, dict[str, Tensor]]:
        first(next(calls))
        return term(scores)

    return replace(loss, terms=loss.terms | {name: both})


def kill(encoder: MultiVectorEncoder, config: Config, *, step: int, **options: Any) -> None:
    """Train, and die in a step."""
    with pytest.raises(Killed):
        run(deepcopy(encoder), config, loss=dying(config, step=step), **options)


def go_on(encoder: MultiVectorEncoder, config: Config, **options: Any) -> Run:
    """Resume with other weights and other random numbers, as a new process would have them."""
    encoder = deepcopy(encoder)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.normal_()
    torch.manual_seed(12345)
    return run(encoder, config, resume=True, **options)


def start_again(encoder: MultiVectorEncoder, config: Config, **options: Any) -> Run:
    """Resume where there is no checkpoint, with the encoder as a new process builds it, and other random numbers."""
    torch.manual_seed(12345)
    return run(deepcopy(encoder), config, resume=True, **options)


def weights_of(ours: Run) -> dict[str, bytes]:
    """Every file of weights that a run has left, its checkpoints aside."""
    return {
        str(path.relative_to(ours.folder.path)): path.read_bytes()
        for name in ("model", "best")
        for path in sorted((ours.folder.path / name).rglob("*.safetensors"))
    }


def without_clock(metrics: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{key: value for key, value in line.items() if key not in CLOCK} for line in metrics]


def assert_equal(ours: Run, straight: Run) -> None:
    """Bit for bit, but for the clock and the name of the folder."""
    assert without_clock(ours.metrics) == without_clock(straight.metrics)
    assert weights_of(ours) == weights_of(straight)
    for key in ("steps", "queries", "processes", "before", "after", "change", "padding_fraction"):
        assert ours.result[key] == straight.result[key], key
    for one in (ours, straight):
        if one.result["best"] is not None:
            one.result["best"]["model"] = Path(one.result["best"]["model"]).name
    assert ours.result["best"] == straight.result["best"]


@pytest.mark.parametrize(
    ("overrides", "evaluated", "mixed_precision"),
    [
        ([], False, "no"),
        (["evaluation.every_steps=2"], True, "no"),
        (["trainer.accumulation_steps=2", "trainer.max_gradient_norm=0.01"], False, "no"),
        (["trainer.precision=bf16", "optimizer.schedule=cosine"], True, "bf16"),
    ],
    ids=["plain", "evaluated", "accumulated", "bf16"],
)
@pytest.mark.parametrize("killed_in", [2, 4, 5], ids="killed in step {}".format)
def test_a_run_that_was_killed_and_goes_on_equals_one_that_was_not(
    killed_in: int,
    overrides: list[str],
    evaluated: bool,
    mixed_precision: str,
    encoder: MultiVectorEncoder,
    make_config: MakeConfig,
) -> None:
    # Of six examples an epoch is two steps: after the third, an epoch is half done.
    overrides = [*OVERRIDES, "trainer.save_every_steps=3", *overrides]
    options: dict[str, Any] = {"data": make_data(evaluated=evaluated), "mixed_precision": mixed_precision}
    straight = run(deepcopy(encoder), make_config(*overrides, *beside(make_config, "straight")), **options)
    config = make_config(*overrides)
    kill(encoder, config, step=killed_in, **options)
    assert checkpoints(config) == (["step_00000003"] if killed_in > 3 else [])
    assert len(read_metrics(RunFolder(config))) == killed_in

    # Without a checkpoint, what counts is how the encoder was built.
    ours = (go_on if killed_in > 3 else start_again)(encoder, config, **options)

    assert_equal(ours, straight)
    checkpoint = RunFolder(config).path / "checkpoints" / "step_00000003"
    assert (f"resumed after step 3, from {checkpoint}\n" in ours.said) == (killed_in > 3)
    assert len(ours.gradients) == (2 if killed_in > 3 else 5)


@pytest.mark.parametrize(
    "overrides",
    [
        ["optimizer=muon", "optimizer.groups=[{pattern: head.*, learning_rate: 0.1}]"],
        [*LEARNT, "trainer.cache_tokens=24", "trainer.accumulation_steps=2"],
        ["trainer.gradient_checkpointing=true"],
        [*DISTILLATION, *DRAWN, MATRYOSHKA, "evaluation.every_steps=2"],
    ],
    ids=["muon and a group", "learnt temperature and cache", "checkpointing", "drawn documents and widths"],
)
def test_what_a_run_is_made_of_goes_on_with_it(
    overrides: list[str], encoder: MultiVectorEncoder, make_config: MakeConfig
) -> None:
    overrides = [*OVERRIDES, "trainer.save_every_steps=3", *overrides]
    data = make_data(taught=MATRYOSHKA in overrides, evaluated=MATRYOSHKA in overrides)
    straight = run(deepcopy(encoder), make_config(*overrides, *beside(make_config, "straight")), data=data)
    config = make_config(*overrides)
    kill(encoder, config, step=4, data=data)
    assert_equal(go_on(encoder, config, data=data), straight)


@pytest.mark.parametrize("mix", MIXES, ids=["one set", "all sets"])
def test_a_run_on_a_mix_goes_on_with_the_epochs_and_the_draws_of_each_set(
    mix: tuple[str, ...], encoder: MultiVectorEncoder, make_config: MakeConfig
) -> None:
    overrides = [*OVERRIDES, "trainer.save_every_steps=3", "trainer.steps=8", *mix]
    data, config = make_mix(), make_config(*overrides)
    straight = run(deepcopy(encoder), make_config(*overrides, *beside(make_config, "straight")), data=data)
    order = make_batches(encoder, config, data).order
    # Sets are in several epochs of their own, also after the checkpoint.
    assert len({(place.set, place.epoch) for step in range(3, 8) for place in order.step(step)}) > 3
    kill(encoder, config, step=6, data=data)
    assert_equal(go_on(encoder, config, data=data), straight)


def test_a_run_that_is_killed_again_and_again_equals_one_that_was_not(
    encoder: MultiVectorEncoder, make_config: MakeConfig
) -> None:
    overrides = [*OVERRIDES, "trainer.steps=8", "trainer.save_every_steps=2"]
    straight = run(deepcopy(encoder), make_config(*overrides, *beside(make_config, "straight")))
    config = make_config(*overrides)
    kill(encoder, config, step=4)
    for _ in range(2):
        # Two more steps are done and saved, and one more that is lost.
        with pytest.raises(Killed):
            go_on(encoder, config, loss=dying(config, step=4))
    assert checkpoints(config) == ["step_00000006", "step_00000004"]
    assert_equal(go_on(encoder, config), straight)


def test_dropout_that_is_drawn_anew_would_be_seen(
    encoder: MultiVectorEncoder, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = [*OVERRIDES, "trainer.save_every_steps=3"]
    straight = run(deepcopy(encoder), make_config(*overrides, *beside(make_config, "straight")))
    config = make_config(*overrides)
    kill(encoder, config, step=4)
    monkeypatch.setattr(loop, "set_random_state", lambda state: None)
    ours = go_on(encoder, config)
    assert ours.metrics[4]["train/loss"] != straight.metrics[4]["train/loss"]


def test_a_run_goes_on_with_the_metrics_before_training_that_it_had(
    encoder: MultiVectorEncoder, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(*OVERRIDES, "trainer.save_every_steps=3", "evaluation.metric=mrr@10")
    monkeypatch.setattr(loop, "evaluate", Script([1.0, 0.8]))
    kill(encoder, config, step=4, data=make_data(evaluated=True))
    script = Script([0.5, 0.3])
    monkeypatch.setattr(loop, "evaluate", script)
    ours = go_on(encoder, config, data=make_data(evaluated=True))
    assert len(script.vectors) == 1, "the model was scored after the last step only"
    assert (ours.result["before"]["mrr@10"], ours.result["after"]["mrr@10"]) == (0.9, 0.4)
    # Each query has lost as much.
    assert [ours.result["change"][key] for key in ("change", "low", "high")] == pytest.approx([-0.5] * 3)
    assert "before  ndcg@10 0.5000  mrr@10 0.9000" in ours.said


@pytest.mark.parametrize(
    ("killed_in", "scores", "best_step"),
    [
        # Before training and after steps 2, 4 and 5; the checkpoint is that of step 3.
        (4, [0.9, 0.6, 0.3, 0.2], 2),
        (4, [0.9, 0.3, 0.6, 0.2], 4),
        (4, [0.9, 0.2, 0.3, 0.6], 5),
        (5, [0.9, 0.6, 0.3, 0.2], 2),
        (5, [0.9, 0.3, 0.6, 0.2], 4),
        (5, [0.9, 0.2, 0.3, 0.6], 5),
    ],
)
def test_the_best_model_is_that_of_a_run_that_was_not_killed(
    killed_in: int,
    scores: list[float],
    best_step: int,
    encoder: MultiVectorEncoder,
    make_config: MakeConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    overrides = [*OVERRIDES, "trainer.save_every_steps=3", "evaluation.every_steps=2", "evaluation.metric=mrr@10"]
    data = make_data(evaluated=True)
    monkeypatch.setattr(loop, "evaluate", Script(*scores))
    straight = run(deepcopy(encoder), make_config(*overrides, *beside(make_config, "straight")), data=data)
    config = make_config(*overrides)
    monkeypatch.setattr(loop, "evaluate", Script(*scores[: 3 if killed_in == 5 else 2]))
    kill(encoder, config, step=killed_in, data=data)
    monkeypatch.setattr(loop, "evaluate", Script(*scores[2:]))
    ours = go_on(encoder, config, data=data)
    assert_equal(ours, straight)
    assert ours.result["best"]["step"] == best_step
    assert any(name.startswith("best/") for name in weights_of(ours)) == (best_step < 5)


@pytest.mark.parametrize("killed_in", [5, None], ids=["killed in step 5", "killed after the last step"])
def test_the_best_model_is_the_one_whose_score_the_result_has_also_where_the_run_goes_on_otherwise(
    killed_in: int | None, encoder: MultiVectorEncoder, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = [*OVERRIDES, "trainer.save_every_steps=3", "evaluation.every_steps=2", "evaluation.metric=mrr@10"]
    config, data = make_config(*overrides), make_data(evaluated=True)
    # The checkpoint of step 3 knows of the best of step 2; then the run finds a better one, and dies.
    first = Script(0.1, 0.5, 0.6) if killed_in else Script(0.1, 0.5, 0.2, 0.6)
    monkeypatch.setattr(loop, "evaluate", first)
    if killed_in:
        kill(encoder, config, step=killed_in, data=data)
    else:
        run(deepcopy(encoder), config, data=data)  # all but result.json is written
    # Another schedule, and with it other scores.
    second = Script(0.4, 0.3, 0.25)
    monkeypatch.setattr(loop, "evaluate", second)
    best = go_on(encoder, make_config(*overrides, "trainer.steps=7"), data=data).result["best"]
    scored = dict(zip((0.1, 0.5, 0.6) if killed_in else (0.1, 0.5, 0.2, 0.6), first.vectors, strict=True))
    scored |= dict(zip((0.4, 0.3, 0.25), second.vectors, strict=True))
    assert Path(best["model"]).exists()
    saved = MultiVectorEncoder(best["model"], device="cpu").encode_document(["a cat, a dog."])[0]
    assert torch.equal(saved, scored[best["mrr@10"]])


def test_time_counts_from_the_first_process_on(encoder: MultiVectorEncoder, make_config: MakeConfig) -> None:
    config = make_config(*OVERRIDES, "trainer.save_every_steps=3")
    kill(encoder, config, step=4)
    [checkpoint] = RunFolder(config).checkpoints()
    state = json.loads((checkpoint / "state.json").read_text())
    assert 0 < state["progress"]["totals"]["seconds"] <= state["progress"]["seconds"]
    state["progress"]["seconds"] += 5000
    state["progress"]["totals"]["seconds"] += 1000
    (checkpoint / "state.json").write_text(json.dumps(state))
    # The second of three processes does one step.
    with pytest.raises(Stopped):
        go_on(encoder, config, loss=signalling(config, SIGTERM, step=1))
    ours = go_on(encoder, config)
    assert 5000 < ours.result["seconds"] < 5600
    assert 15 / 1600 < ours.result["queries_per_second"] < 15 / 1000


def test_a_longer_run_follows_its_own_schedule_from_the_first_new_step_on(
    encoder: MultiVectorEncoder, make_config: MakeConfig
) -> None:
    overrides = [*OVERRIDES, "trainer.save_every_steps=3"]
    longer = run(deepcopy(encoder), make_config(*overrides, "trainer.steps=9", *beside(make_config, "longer")))
    shorter = make_config(*overrides)
    kill(encoder, shorter, step=4)
    ours = go_on(encoder, make_config(*overrides, "trainer.steps=9"))
    rates = [line["train/learning_rate"] for line in ours.metrics[1:]]
    assert len(rates) == 9
    assert rates[3:] == [line["train/learning_rate"] for line in longer.metrics[4:]]
    # Of five steps two are warm-up; of nine, four.
    assert rates[:3] == pytest.approx([0.0, 0.005, 0.01], rel=1e-9)
    assert ours.result["steps"] == 9


def test_another_number_of_processes_draws_dropout_anew_and_says_so(
    encoder: MultiVectorEncoder, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(*OVERRIDES, "trainer.save_every_steps=3")
    kill(encoder, config, step=4)
    [checkpoint] = RunFolder(config).checkpoints()
    state = json.loads((checkpoint / "state.json").read_text())
    state["random_states"] *= 2
    (checkpoint / "state.json").write_text(json.dumps(state))
    monkeypatch.setattr(loop, "set_random_state", lambda state: pytest.fail("a state of another process was taken"))
    ours = go_on(encoder, config)
    assert "2 process(es) saved it and 1 go on: the examples stay the same, dropout is drawn anew\n" in ours.said
    assert [line["step"] for line in ours.metrics] == [0, 1, 2, 3, 4, 5]


def test_processes_that_see_other_checkpoints_do_not_go_on(
    encoder: MultiVectorEncoder, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(*OVERRIDES, "trainer.save_every_steps=3")
    kill(encoder, config, step=4)
    before = (RunFolder(config).path / "metrics.jsonl").read_text()
    monkeypatch.setattr(loop, "gather_object", lambda steps: [*steps, 0])
    with pytest.raises(TrainingError) as caught:
        go_on(encoder, config)
    assert str(caught.value) == (
        f"the processes read checkpoints of steps [3, 0]: do all see one folder {config.output_dir}?"
    )
    assert (RunFolder(config).path / "metrics.jsonl").read_text() == before


def test_a_run_that_was_scored_on_other_queries_does_not_go_on(
    encoder: MultiVectorEncoder, make_config: MakeConfig
) -> None:
    config, data = make_config(*OVERRIDES, "trainer.save_every_steps=3"), make_data(evaluated=True)
    kill(encoder, config, step=4, data=data)
    made = data.evaluation["made"]
    others = {"made": replace(made, queries=made.queries | {"q0": "what is a fish"})}
    for other in (others, dict[str, RetrievalSet]()):
        with pytest.raises(TrainingError) as caught:
            go_on(encoder, config, data=replace(data, evaluation=other))
        assert str(caught.value) == (
            f"{config.output_dir} was scored on other queries before it stopped: give it the data that it had, or "
            f"start again with rerun={config.output_dir} output_dir=..."
        )
    assert go_on(encoder, config, data=data).result["steps"] == 5


# Checkpoints that are not whole


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_a_checkpoint_that_is_cut_short_is_left_out_for_the_one_before(
    name: str, encoder: MultiVectorEncoder, make_config: MakeConfig
) -> None:
    overrides = [*OVERRIDES, "trainer.save_every_steps=1"]
    straight = run(deepcopy(encoder), make_config(*overrides, *beside(make_config, "straight")))
    config = make_config(*overrides)
    kill(encoder, config, step=4)
    newest, older = RunFolder(config).checkpoints()
    cut_short(newest / name)
    ours = go_on(encoder, config)
    assert f"left out: {newest} is not whole (" in ours.said
    assert f"resumed after step 2, from {older}\n" in ours.said
    assert_equal(ours, straight)


def test_a_checkpoint_that_is_left_out_is_set_aside(encoder: MultiVectorEncoder, make_config: MakeConfig) -> None:
    config = make_config(*OVERRIDES, "trainer.save_every_steps=1")
    kill(encoder, config, step=4)
    cut_short(RunFolder(config).checkpoints()[0] / "state.json")
    with pytest.raises(Killed):
        go_on(encoder, config, loss=dying(config, step=1))
    assert checkpoints(config) == ["step_00000002"]
    assert [line["step"] for line in read_metrics(RunFolder(config))] == [0, 1, 2]


def test_without_a_whole_checkpoint_the_run_does_not_go_on_and_loses_nothing(
    encoder: MultiVectorEncoder, make_config: MakeConfig
) -> None:
    config = make_config(*OVERRIDES, "trainer.save_every_steps=1")
    kill(encoder, config, step=4)
    saved = RunFolder(config).checkpoints()
    for checkpoint, name in zip(saved, ["state.json", "model.safetensors"], strict=True):
        cut_short(checkpoint / name)
    before = (RunFolder(config).path / "metrics.jsonl").read_text()
    with pytest.raises(TrainingError) as caught:
        go_on(encoder, config)
    assert str(caught.value) == (
        f"no checkpoint of {config.output_dir} is whole: rerun={config.output_dir} output_dir=... starts again"
    )
    assert (RunFolder(config).path / "metrics.jsonl").read_text() == before
    assert set(saved[0].parent.iterdir()) == set(saved)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_a_disk_that_does_not_answer_is_no_reason_to_leave_a_checkpoint_out(
    name: str, encoder: MultiVectorEncoder, make_config: MakeConfig
) -> None:
    config = make_config(*OVERRIDES, "trainer.save_every_steps=1")
    kill(encoder, config, step=4)
    newest = RunFolder(config).checkpoints()[0]
    (newest / name).rename(newest / "kept")
    (newest / name).mkdir()  # which no one, not even root, can read as a file
    with pytest.raises(TrainingError) as caught:
        go_on(encoder, config)
    assert str(caught.value).startswith(f"{newest} cannot be read (")
    assert str(caught.value).endswith("): mend that and resume again")
    assert checkpoints(config) == ["step_00000003", "step_00000002"]


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


# Signals


@pytest.mark.parametrize("number", [SIGINT, SIGTERM])
def test_a_signal_ends_the_run_after_its_step_with_all_saved(
    number: signal.Signals, encoder: MultiVectorEncoder, make_config: MakeConfig
) -> None:
    overrides = [*OVERRIDES, "trainer.save_every_steps=null"]
    straight = run(deepcopy(encoder), make_config(*overrides, *beside(make_config, "straight")))
    config = make_config(*overrides)
    before = [signal.getsignal(SIGINT), signal.getsignal(SIGTERM)]
    with pytest.raises(Stopped) as caught:
        run(deepcopy(encoder), config, loss=signalling(config, number, step=2))
    assert caught.value.signal == number
    assert str(caught.value) == (
        f"stopped after step 2 of 5; go on with: python train.py resume={shlex.quote(config.output_dir)}"
    )
    assert [signal.getsignal(SIGINT), signal.getsignal(SIGTERM)] == before
    assert checkpoints(config) == ["step_00000002"]
    assert [line["step"] for line in read_metrics(RunFolder(config))] == [0, 1, 2]
    assert not (RunFolder(config).path / "model").exists()
    assert_equal(go_on(encoder, config), straight)


def test_the_command_that_goes_on_is_quoted_for_a_shell(encoder: MultiVectorEncoder, make_config: MakeConfig) -> None:
    config = make_config(*OVERRIDES, *beside(make_config, "my run"))
    with pytest.raises(Stopped) as caught:
        run(encoder, config, loss=signalling(config, SIGTERM, step=1))
    assert shlex.split(str(caught.value).partition("go on with: ")[2])[2] == f"resume={config.output_dir}"


def test_a_signal_in_the_last_step_lets_the_run_finish(encoder: MultiVectorEncoder, make_config: MakeConfig) -> None:
    overrides = [*OVERRIDES, "trainer.save_every_steps=null"]
    straight = run(deepcopy(encoder), make_config(*overrides, *beside(make_config, "straight")))
    config = make_config(*overrides)
    ours = run(deepcopy(encoder), config, loss=signalling(config, SIGTERM, step=5))
    assert_equal(ours, straight)
    assert checkpoints(config) == []


def test_a_later_signal_stops_the_step_and_leaves_the_last_checkpoint(
    encoder: MultiVectorEncoder, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stop, "SAME_WISH_SECONDS", -1)
    overrides = [*OVERRIDES, "trainer.save_every_steps=2"]
    straight = run(deepcopy(encoder), make_config(*overrides, *beside(make_config, "straight")))
    config = make_config(*overrides)
    with pytest.raises(KeyboardInterrupt):
        run(deepcopy(encoder), config, loss=signalling(config, SIGINT, step=4, times=2))
    assert checkpoints(config) == ["step_00000002"]
    assert [line["step"] for line in read_metrics(RunFolder(config))] == [0, 1, 2, 3]
    assert_equal(go_on(encoder, config), straight)


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


@pytest.mark.parametrize("sm90", [False, True], ids=["forward", "forward_sm90"])
def test_training_by_the_kernels_follows_the_reference(
    sm90: bool, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    kernels_of_the_host = cache(lambda *vectors: emulation.program(tmp_path, *vectors[1:], sm90=sm90))
    monkeypatch.setattr(kernels, "load", kernels_of_the_host)
    monkeypatch.setattr(kernels, "_machine_obstacle", lambda device: None)
    runs = {}
    for backend in ("cuda", "reference"):
        AcceleratorState._reset_state(reset_partial_state=True)
        config = make_config(*OVERRIDES, "trainer.precision=bf16", *beside(make_config, backend))
        torch.manual_seed(3)
        encoder = without_dropout(build_encoder(config.backbone, config.head))
        runs[backend] = run(encoder, config, loss=loss_of(config, maxsim=backend), mixed_precision="bf16")
    module = kernels_of_the_host(torch.device("cpu"), encoder.get_embedding_dimension(), torch.bfloat16).module
    assert isinstance(module, emulation.EmulatedModule)
    launched = ["index_queries", "index_documents", "compact_documents", "forward_sm90" if sm90 else "forward"]
    assert module.launched == [*launched, "sum_slabs", "query_gradient", "document_gradient"] * 5
    # The kernels' vectors are bfloat16 (8 bits), the reference's are not.
    ours, theirs = (torch.cat([gradient.flatten() for gradient in run.gradients[0]]) for run in runs.values())
    assert torch.linalg.vector_norm(ours - theirs) <= 0.03 * torch.linalg.vector_norm(theirs)
    ours, theirs = (torch.tensor([line["train/loss"] for line in run.metrics[1:]]) for run in runs.values())
    torch.testing.assert_close(ours, theirs, atol=0.06, rtol=0)
