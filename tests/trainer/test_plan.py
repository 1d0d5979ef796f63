"""What is refused before any weight is loaded, and what the start-up table says about a run, made by hand."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from datasets import Dataset
from sentence_transformers import MultiVectorEncoder
from sentence_transformers.base.modules import Transformer

from configs.schema import Config, ConfigError
from losses.factory import build_loss
from losses.maxsim import kernels
from trainer import plan
from trainer.data import Data
from trainer.data.batches import choose_documents, cut
from trainer.data.files import identity
from trainer.data.retrieval import RetrievalSet
from trainer.loop import build_batches
from trainer.optim import freeze
from trainer.plan import (
    build_accelerator,
    check_batch,
    check_encoder,
    check_steps,
    check_teacher,
    choose_maxsim,
    describe_run,
)

MakeConfig = Callable[..., Config]

# Each word is one token; [CLS], the marker and [SEP] make three more: 4, 5, 6, 9 and 10 tokens.
QUERIES = ["what", "what is", "what is a", "what is a cat that meows", "which animal is a cat that meows"]
# 5, 7, 16, 17 and 17 tokens.
POSITIVES = ["the cat", "a dog that barks", *(" ".join(["fish"] * count) for count in (13, 14, 14))]
NEGATIVES = [["a", "dog"], [], ["what"], [], ["the", "fish", "swims"]]


@pytest.fixture(autouse=True)
def new_accelerator_state() -> Iterator[None]:
    """Each test chooses its precision, which the state of a process otherwise keeps."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def make_data(*, negatives: bool = False, evaluation: RetrievalSet | None = None) -> Data:
    rows = zip(QUERIES, POSITIVES, NEGATIVES, strict=True)
    documents = [[positive, *(texts if negatives else [])] for _, positive, texts in rows]
    return Data(to_examples(documents, [[]] * len(QUERIES)), evaluation)


def to_examples(documents: list[list[str]], scores: list[list[float]]) -> Dataset:
    return Dataset.from_list(
        [
            {
                "query": query,
                "query_id": identity(query),
                "documents": own,
                "document_ids": [identity(text) for text in own],
                "scores": given,
                "place": f"made.jsonl:{row}",
            }
            for row, (query, own, given) in enumerate(zip(QUERIES, documents, scores, strict=False), start=1)
        ]
    )


def describe(
    encoder: MultiVectorEncoder, config: Config, data: Data | None = None, *, backend: str = "reference"
) -> dict[str, str]:
    data, accelerator = data or make_data(), Accelerator(cpu=True)
    loss = build_loss(config.loss, width=encoder.get_embedding_dimension() or 0, maxsim=backend)
    freeze(encoder, loss.learnt, config.optimizer)
    batches = build_batches(config, data.train, encoder, accelerator)
    return describe_run(config, data, batches, encoder, loss, accelerator)


# Refusals


@pytest.mark.parametrize(("examples", "refused"), [(3, True), (4, False), (5, False)])
def test_a_batch_larger_than_the_training_set_is_refused(examples: int, refused: bool, make_config: MakeConfig) -> None:
    config = make_config("trainer.batch_size=4")
    if not refused:
        check_batch(config, examples, 1)
        return
    with pytest.raises(ConfigError) as caught:
        check_batch(config, examples, 1)
    assert str(caught.value) == "trainer.batch_size=4 is larger than the 3 training examples: set 3 or less"


def test_fp16_without_a_gpu_is_refused(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError) as caught:
        build_accelerator(make_config("trainer.precision=fp16"))
    assert str(caught.value) == ("trainer.precision=fp16 needs a GPU and this machine has none: use float32 or bf16")


@pytest.mark.parametrize(("precision", "mixed_precision"), [("float32", "no"), ("bf16", "bf16")])
def test_the_accelerator_has_the_precision_of_the_config(
    precision: str, mixed_precision: str, make_config: MakeConfig
) -> None:
    assert build_accelerator(make_config(f"trainer.precision={precision}")).mixed_precision == mixed_precision


NOT_SEVERAL = (
    "processes were asked for and each would train by itself: on GPUs, accelerate launch --multi_gpu "
    "--num_processes 2 train.py ...; without, ACCELERATE_USE_CPU=true before the same command, "
    "or torchrun --nproc_per_node 2 train.py ...; for one process, unset MASTER_ADDR"
)


@pytest.fixture
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No launcher has started these tests, and accelerate finds a device, so that it looks no further for processes."""
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)


@pytest.mark.usefixtures("bare_environment")
@pytest.mark.parametrize(
    ("environment", "asked"),
    [
        # Of accelerate launch --cpu --num_processes 2, which starts one.
        ({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1"}, "several"),
        ({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "1"}, "several"),
        ({"WORLD_SIZE": "2"}, "2"),
        ({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "16"}, "16"),
    ],
)
def test_one_process_where_several_were_asked_for_is_refused(
    environment: dict[str, str], asked: str, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as caught:
        build_accelerator(make_config())
    assert str(caught.value) == f"{asked} {NOT_SEVERAL}"


@pytest.mark.usefixtures("bare_environment")
@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"WORLD_SIZE": "1"},
        # accelerate launch --num_processes 1
        {"ACCELERATE_MIXED_PRECISION": "no"},
        # An address that the machine's administrator has set.
        {"MASTER_ADDR": "127.0.0.1"},
    ],
)
def test_one_process_where_one_was_asked_for_runs(
    environment: dict[str, str], make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    accelerator = build_accelerator(make_config())
    assert accelerator.num_processes == 1
    assert accelerator.distributed_type is DistributedType.NO


@pytest.mark.parametrize("kind", [DistributedType.FSDP, DistributedType.DEEPSPEED])
def test_processes_that_share_the_weights_are_refused(
    kind: DistributedType, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Accelerator, "distributed_type", kind)
    with pytest.raises(ConfigError) as caught:
        build_accelerator(make_config())
    assert str(caught.value) == (
        f"accelerate launch was asked for {kind.value}, and several processes train here by data parallelism alone: "
        "launch with --multi_gpu, or --config_file configs/accelerate/one_node.yaml"
    )


@pytest.mark.parametrize("kind", [DistributedType.MULTI_GPU, DistributedType.MULTI_CPU])
def test_processes_that_each_have_the_weights_are_taken(
    kind: DistributedType, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Accelerator, "distributed_type", kind)
    monkeypatch.setattr(Accelerator, "num_processes", 2)
    assert build_accelerator(make_config()).num_processes == 2


@pytest.mark.parametrize(
    ("overrides", "examples", "processes", "smallest"),
    [
        (["trainer.batch_size=4"], 8, 4, None),
        (["trainer.batch_size=4"], 8, 5, 4),
        # Nine examples in batches of four at most are three steps of three.
        (["trainer.batch_size=4"], 9, 3, None),
        (["trainer.batch_size=4"], 9, 4, 3),
        (["trainer.batch_size=8", "trainer.accumulation_steps=2"], 16, 4, None),
        (["trainer.batch_size=8", "trainer.accumulation_steps=2"], 16, 5, 4),
        # Three steps of five or six, so micro-batches of two or three.
        (["trainer.batch_size=8", "trainer.accumulation_steps=2"], 17, 2, None),
        (["trainer.batch_size=8", "trainer.accumulation_steps=2"], 17, 3, 2),
    ],
)
def test_a_micro_batch_with_less_than_a_query_for_each_process_is_refused(
    overrides: list[str], examples: int, processes: int, smallest: int | None, make_config: MakeConfig
) -> None:
    config = make_config(*overrides)
    if smallest is None:
        check_batch(config, examples, processes)
        return
    with pytest.raises(ConfigError) as caught:
        check_batch(config, examples, processes)
    trainer = config.trainer
    assert str(caught.value) == (
        f"trainer.batch_size={trainer.batch_size} in trainer.accumulation_steps={trainer.accumulation_steps} "
        f"leaves a micro-batch with {smallest} of its queries, fewer than the {processes} processes: "
        "raise trainer.batch_size or start fewer processes"
    )


def test_exactly_those_batches_are_refused_that_leave_some_process_without_a_query(make_config: MakeConfig) -> None:
    config = make_config()
    outcomes = set()
    for batch_size, accumulation_steps in [(4, 1), (4, 2), (6, 3), (7, 1), (8, 2)]:
        trainer = replace(config.trainer, batch_size=batch_size, accumulation_steps=accumulation_steps)
        for examples in range(batch_size, 4 * batch_size):
            steps = cut(list(range(examples)), math.ceil(examples / batch_size))
            for processes in range(1, 6):
                parts = [
                    part
                    for step in steps
                    for micro_batch in cut(step, accumulation_steps)
                    for part in cut(micro_batch, processes)
                ]
                try:
                    check_batch(replace(config, trainer=trainer), examples, processes)
                    outcome = True
                except ConfigError:
                    outcome = False
                assert outcome == all(parts), (batch_size, accumulation_steps, examples, processes)
                outcomes.add(outcome)
    assert outcomes == {True, False}


@pytest.mark.parametrize("done", [5, 6])
def test_a_resumed_run_without_a_step_left_is_refused(done: int) -> None:
    with pytest.raises(ConfigError) as caught:
        check_steps(5, done)
    assert str(caught.value) == (
        f"trainer.steps=5: the run has done {done} steps: set more, or more trainer.epochs, to go on"
    )


@pytest.mark.parametrize("done", [0, 4])
def test_a_run_with_a_step_left_goes_on(done: int) -> None:
    check_steps(5, done)


# What a teacher cannot teach


def taught(scores: list[list[float]]) -> Data:
    """A query for each of these scores, the best first."""
    return Data(to_examples([[f"the {place}" for place in range(len(own))] for own in scores], scores), None)


DISTILLATION = ("data=distillation", "data.path=unused", "loss=distillation")
MARGINS = ("data=distillation", "data.path=unused", "loss=margin_mse")
GOOD, FLAT, STEEP = [1.0, 0.5, 0.0], [7.0, 7.0, 7.0], [10.0, 0.0]


@pytest.mark.parametrize("overrides", [DISTILLATION, MARGINS])
def test_scores_that_are_the_same_in_most_queries_are_refused(
    overrides: tuple[str, ...], make_config: MakeConfig
) -> None:
    with pytest.raises(ConfigError) as caught:
        check_teacher(make_config(*overrides), taught([GOOD, FLAT, [0.0, 0.0], GOOD, FLAT]))
    assert str(caught.value) == (
        "the teacher's scores are all the same in 60% of 5 queries, such as made.jsonl:2 (7, 7, 7, ...): "
        "there is nothing to learn from; check data.path"
    )
    check_teacher(make_config(*overrides), taught([GOOD, FLAT, FLAT, GOOD]))


@pytest.mark.parametrize(
    ("steep", "overrides", "message"),
    [
        (
            STEEP,
            (),
            "loss.distillation.teacher_temperature=1 leaves one document more than 99% in 60% of 5 queries, such as "
            "made.jsonl:1 (10, 0, ...): raise it; the scores of a query have a standard deviation of 5",
        ),
        (
            # As a sum of quantised impacts.
            [246_912.0, 0.0],
            ("loss.distillation.teacher_temperature=2.5",),
            "loss.distillation.teacher_temperature=2.5 leaves one document more than 99% in 60% of 5 queries, such as "
            "made.jsonl:1 (246912, 0, ...): raise it; the scores of a query have a standard deviation of 1.23e+05",
        ),
    ],
)
def test_a_teacher_that_leaves_one_document_in_most_queries_is_refused(
    steep: list[float], overrides: tuple[str, ...], message: str, make_config: MakeConfig
) -> None:
    data = taught([steep, GOOD, steep, steep, GOOD])
    with pytest.raises(ConfigError) as caught:
        check_teacher(make_config(*DISTILLATION, *overrides), data)
    assert str(caught.value) == message
    # Its own temperature does not matter where it gives margins, and neither where it is not asked.
    check_teacher(make_config(*MARGINS, *overrides, "loss.margin_mse.teacher_temperature=1e6"), data)
    check_teacher(make_config("data=distillation", "data.path=unused", *overrides), data)
    check_teacher(make_config(*DISTILLATION, *overrides), taught([steep, GOOD, steep, GOOD, GOOD]))


def test_one_document_of_two_has_99_percent_where_its_score_is_ln_99_temperatures_above(
    make_config: MakeConfig,
) -> None:
    # ln 99 = 4.5951
    config = make_config(*DISTILLATION, "loss.distillation.teacher_temperature=3")
    check_teacher(config, taught([[3 * 4.5950, 0.0]] * 5))
    with pytest.raises(ConfigError, match=r"^loss\.distillation\.teacher_temperature=3 leaves one document"):
        check_teacher(config, taught([[3 * 4.5952, 0.0]] * 5))


@pytest.mark.parametrize(
    ("score", "steep", "highest", "average"),
    # Queries have 8 tokens: their scores are from -8 to 8, and their means from -1 to 1.
    [("maxsim", [20.0, 1.0, 0.0], 16, "19.5"), ("mean_maxsim", [3.0, 0.5, 0.0], 2, "2.75")],
)
def test_margins_that_no_maxsim_has_in_most_queries_are_refused(
    score: str, steep: list[float], highest: int, average: str, make_config: MakeConfig
) -> None:
    overrides = (*MARGINS, f"loss.margin_mse.score={score}")
    with pytest.raises(ConfigError) as caught:
        check_teacher(make_config(*overrides), taught([GOOD, steep, steep, GOOD, steep]))
    assert str(caught.value) == (
        f"loss.margin_mse.teacher_temperature=1 leaves margins above {highest}, which {score} cannot have, in 60% of "
        f"5 queries, such as made.jsonl:2 ({', '.join(f'{value:g}' for value in steep)}, ...): "
        f"raise it; the margins of a query are {average} on average"
    )
    check_teacher(make_config(*overrides), taught([GOOD, steep, steep, GOOD, GOOD]))
    check_teacher(make_config(*overrides), taught([[float(highest), 0.0]] * 5))
    check_teacher(make_config(*overrides, "loss.margin_mse.teacher_temperature=2"), taught([steep] * 5))
    # The checkpoint says how long its queries are.
    unknown = ("backbone.query_length=null", "backbone.expansion=none")
    check_teacher(make_config(*overrides, *unknown), taught([steep] * 5))
    check_teacher(make_config("data=distillation", "data.path=unused"), taught([steep] * 5))


def test_the_documents_that_are_looked_at_are_those_of_the_first_epoch(make_config: MakeConfig) -> None:
    rows = []
    for row in range(5):
        _, first, second = choose_documents(9, 3, seed=(1, 0, row))
        rows.append([0.5 if place in (0, first, second) else 0.0 for place in range(9)])
    with pytest.raises(ConfigError, match=r"^the teacher's scores are all the same in 100% of 5 queries"):
        check_teacher(make_config(*DISTILLATION, "data.documents_per_query=3"), taught(rows))
    check_teacher(make_config(*DISTILLATION, "data.documents_per_query=3", "seed=2"), taught(rows))
    check_teacher(make_config(*DISTILLATION), taught(rows))


def test_of_a_large_set_a_sample_is_looked_at_evenly_over_it(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "TEACHER_SAMPLE", 2)
    # The first, third and fifth.
    check_teacher(make_config(*DISTILLATION), taught([GOOD, FLAT, GOOD, FLAT, FLAT]))
    with pytest.raises(ConfigError, match=r"in 67% of 3 queries, such as made\.jsonl:3 \(7, 7, 7, \.\.\.\)"):
        check_teacher(make_config(*DISTILLATION), taught([GOOD, GOOD, FLAT, GOOD, FLAT]))


def test_without_a_term_that_needs_a_teacher_no_score_is_read(make_config: MakeConfig) -> None:
    check_teacher(make_config(), make_data())


# What a model cannot do


@pytest.mark.parametrize(
    ("widths", "remedy"),
    [([64, 32], [128, 64, 32]), ([256, 128, 64], [128, 64]), ([129, 127], [128, 127])],
)
def test_widths_that_do_not_begin_with_the_models_are_refused(
    widths: list[int], remedy: list[int], encoder: MultiVectorEncoder, make_config: MakeConfig
) -> None:
    matryoshka = f"loss.matryoshka={{widths: {widths}, weights: {[1] * len(widths)}}}"
    with pytest.raises(ConfigError) as caught:
        check_encoder(make_config(matryoshka), encoder)
    assert str(caught.value) == (
        f"loss.matryoshka.widths={widths} must begin with the model's own width, 128: "
        f"set it to {remedy}, or give the head another width"
    )


@pytest.mark.parametrize("widths", [[], [128, 127], [128, 32, 1]])
def test_widths_that_begin_with_the_models_are_taken(
    widths: list[int], encoder: MultiVectorEncoder, make_config: MakeConfig
) -> None:
    check_encoder(make_config(f"loss.matryoshka={{widths: {widths}, weights: {[1] * len(widths)}}}"), encoder)


def test_checkpointing_of_a_backbone_that_cannot_is_refused(
    encoder: MultiVectorEncoder, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config("trainer.gradient_checkpointing=true")
    check_encoder(config, encoder)
    transformer = encoder[0]
    assert isinstance(transformer, Transformer)
    monkeypatch.setattr(type(transformer.model), "supports_gradient_checkpointing", False)
    with pytest.raises(ConfigError) as caught:
        check_encoder(config, encoder)
    assert str(caught.value) == (
        "trainer.gradient_checkpointing=true: BertModel cannot; set it to false, and trainer.cache_tokens for memory"
    )
    check_encoder(make_config(), encoder)


# The start-up table


KNOWN = "; known positives masked (train/..._masked)"


@pytest.mark.parametrize(
    ("overrides", "negatives", "words"),
    [
        ([], False, f"3 in the batch{KNOWN}"),
        (["trainer.accumulation_steps=2"], False, f"1 in the batch{KNOWN}"),
        # Six of five queries: 1.2 each, times the other queries of a micro-batch.
        ([], True, f"3 in the batch + 3.6 explicit of other queries + 1.2 of its own{KNOWN}"),
        (
            ["trainer.accumulation_steps=2"],
            True,
            f"1 in the batch + 1.2 explicit of other queries + 1.2 of its own{KNOWN}",
        ),
        (
            ["loss.contrastive.own_negatives=false"],
            True,
            f"3 in the batch + 3.6 explicit of other queries{KNOWN}",
        ),
        # Three of five queries keep one.
        (
            ["data.documents_per_query=2"],
            True,
            f"3 in the batch + 1.8 explicit of other queries + 0.6 of its own{KNOWN}",
        ),
        (["data.documents_per_query=1"], True, f"3 in the batch{KNOWN}"),
        (["loss.contrastive.mask_known_positives=false"], False, "3 in the batch"),
        (
            ["loss.contrastive.max_negative_ratio=0.95"],
            False,
            "3 in the batch; known positives and those above 0.95 of the positive's score masked (train/..._masked)",
        ),
        (
            ["loss.contrastive.max_negative_ratio=0.95", "loss.contrastive.mask_known_positives=false"],
            False,
            "3 in the batch; those above 0.95 of the positive's score masked (train/..._masked)",
        ),
        ([*MARGINS], True, "none: no contrastive term"),
    ],
)
def test_negatives_are_those_of_a_micro_batch(
    overrides: list[str], negatives: bool, words: str, encoder: MultiVectorEncoder, make_config: MakeConfig
) -> None:
    config = make_config("trainer.batch_size=4", *overrides)
    assert describe(encoder, config, make_data(negatives=negatives))["negatives a query"] == words


@pytest.mark.parametrize(
    ("documents_per_query", "negatives", "words"),
    [
        ("null", False, "1, its positive"),
        ("1", True, "1, its positive"),
        ("null", True, "its positive and 1.2 more"),
        ("4", True, "its positive and 1.2 more"),
        ("3", True, "its positive and 1 more, drawn from up to 3 anew each epoch"),
        ("2", True, "its positive and 0.6 more, drawn from up to 3 anew each epoch"),
    ],
)
def test_documents_are_those_that_a_query_is_trained_with(
    documents_per_query: str, negatives: bool, words: str, encoder: MultiVectorEncoder, make_config: MakeConfig
) -> None:
    config = make_config(f"data.documents_per_query={documents_per_query}")
    assert describe(encoder, config, make_data(negatives=negatives))["documents a query"] == words


@pytest.mark.parametrize(
    ("overrides", "processes", "words"),
    [
        # Queries are filled to 8 tokens: two, two and one. Documents have 5, 7, 16, 16 and 16.
        (["trainer.chunk_tokens=16"], 1, "3 of queries and 4 of documents a step and process, of at most 16 tokens"),
        (
            ["trainer.cache_tokens=16"],
            1,
            "3 of queries and 4 of documents a step and process, of at most 16 tokens, each encoded twice",
        ),
        (["trainer.steps=1"], 1, "1 of queries and 1 of documents a step and process, of at most 1,024 tokens"),
        # Micro-batches of two and three, whose texts share no chunk.
        (
            ["trainer.accumulation_steps=2"],
            1,
            "2 of queries and 2 of documents a step and process, of at most 1,024 tokens",
        ),
        # Of five queries, the first process has two.
        (["trainer.chunk_tokens=1"], 2, "2 of queries and 2 of documents a step and process, of at most 1 tokens"),
    ],
)
def test_chunks_are_those_of_the_first_step_on_one_process(
    overrides: list[str],
    processes: int,
    words: str,
    encoder: MultiVectorEncoder,
    make_config: MakeConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Accelerator, "num_processes", processes)
    assert describe(encoder, make_config("trainer.batch_size=6", *overrides))["chunks"] == words


@pytest.mark.parametrize(
    ("overrides", "processes", "words"),
    [
        ([], 1, "none, one process"),
        # 104 words, 64 positions and 2 types of width 32, and a norm: 5,504; two layers of 8,544; a head of 32 x 128.
        ([], 2, "1 a step, of 107 kB of gradients"),
        (
            ["optimizer.groups=[{pattern: backbone.*, learning_rate: 0}]"],
            2,
            "1 a step, of 16.4 kB of gradients",
        ),
    ],
)
def test_processes_synchronise_the_gradients_of_what_is_trained(
    overrides: list[str],
    processes: int,
    words: str,
    encoder: MultiVectorEncoder,
    make_config: MakeConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Accelerator, "num_processes", processes)
    assert describe(encoder, make_config("trainer.batch_size=4", *overrides))["synchronisations"] == words


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([], "1 contrastive of maxsim"),
        (
            [
                *(*DISTILLATION, "loss=distillation_contrastive", "loss.contrastive.score=mean_maxsim"),
                "loss.terms.margin_mse=1e-3",
            ],
            "0.1 contrastive of mean_maxsim + 1 distillation of maxsim + 0.001 margin_mse of maxsim",
        ),
        (
            ["loss.matryoshka={widths: [128, 32], weights: [1, 0.5]}"],
            "1 contrastive of maxsim, at the widths 128 x 1, 32 x 0.5",
        ),
    ],
)
def test_the_loss_is_shown_with_its_weights(
    overrides: list[str], words: str, encoder: MultiVectorEncoder, make_config: MakeConfig
) -> None:
    assert describe(encoder, make_config(*overrides))["loss"] == words


@pytest.mark.parametrize(
    ("overrides", "backend", "processes", "words"),
    [
        # A score, its softmax and the gradients of both, of 4 bytes each; for each of 8 query tokens an index of 4.
        ([], "reference", 1, "5 queries x 11 documents of all, 2.64 kB with gradients and winners"),
        # An index of 2.
        ([], "cuda", 1, "5 queries x 11 documents of all, 1.76 kB with gradients and winners"),
        (
            ["loss.matryoshka={widths: [128, 32], weights: [1, 1]}"],
            "reference",
            1,
            "5 queries x 11 documents of all, 5.28 kB with gradients and winners",
        ),
        # As many as the query has that has most.
        ([*MARGINS], "reference", 1, "5 queries x 4 documents of its own, 960 B with gradients and winners"),
        (
            ["data.documents_per_query=1"],
            "reference",
            1,
            "5 queries x 5 documents of all, 1.2 kB with gradients and winners",
        ),
        # Of five queries, with one document each, the first process has two.
        (
            ["data.documents_per_query=1"],
            "reference",
            2,
            "2 queries x 4 documents of all processes, 384 B with gradients and winners",
        ),
    ],
)
def test_scores_are_counted_with_the_memory_they_take(
    overrides: list[str],
    backend: str,
    processes: int,
    words: str,
    encoder: MultiVectorEncoder,
    make_config: MakeConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Accelerator, "num_processes", processes)
    facts = describe(encoder, make_config(*overrides), make_data(negatives=True), backend=backend)
    assert facts["scores"] == words


def test_scores_are_those_of_the_largest_micro_batch(encoder: MultiVectorEncoder, make_config: MakeConfig) -> None:
    # Two queries and three.
    config = make_config("trainer.batch_size=6", "trainer.accumulation_steps=2")
    assert describe(encoder, config)["scores"] == "3 queries x 3 documents of all, 432 B with gradients and winners"


@pytest.mark.parametrize(
    ("size", "words"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (123_456, "123 kB"), (54_321_000, "54.3 MB"), (2e9, "2 GB")],
)
def test_sizes_have_three_digits_and_a_unit(size: float, words: str) -> None:
    assert plan._size(size) == words


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([], "adamw 0.0001"),
        (
            ["optimizer.groups=[{pattern: head.*, learning_rate: 1e-3}, {pattern: backbone.*, learning_rate: 0}]"],
            "adamw; head.* 0.001; frozen: backbone.* (22,592 parameters)",
        ),
        # Of two layers with six matrices each, and the head.
        (["optimizer=muon"], "muon 0.001 for 13 matrices, adamw 8e-05 for the rest"),
    ],
)
def test_the_optimizer_is_shown_with_its_rates_and_what_is_frozen(
    overrides: list[str], words: str, encoder: MultiVectorEncoder, make_config: MakeConfig
) -> None:
    assert describe(encoder, make_config(*overrides))["optimizer"] == words


def test_the_batch_is_shown_with_its_micro_batches(encoder: MultiVectorEncoder, make_config: MakeConfig) -> None:
    config = make_config("trainer.batch_size=6", "trainer.accumulation_steps=3")
    assert describe(encoder, config)["batch"] == "6 queries a step, 3 micro-batch(es) of 2, 1 process(es)"


@pytest.mark.parametrize(
    ("accumulation_steps", "negatives", "batch", "words"),
    [
        (
            1,
            False,
            "1 micro-batch(es) of 6, 2 process(es) of 3 queries each",
            f"2 in the batch + 3 gathered from other processes{KNOWN}",
        ),
        (
            2,
            True,
            "2 micro-batch(es) of 3, 2 process(es) of about 1.5 queries each",
            "0.5 in the batch + 1.5 gathered from other processes + 2.4 explicit of other queries + 1.2 of its own"
            + KNOWN,
        ),
    ],
)
def test_batch_and_negatives_are_those_of_all_processes(
    accumulation_steps: int,
    negatives: bool,
    batch: str,
    words: str,
    encoder: MultiVectorEncoder,
    make_config: MakeConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Accelerator, "num_processes", 2)
    config = make_config("trainer.batch_size=6", f"trainer.accumulation_steps={accumulation_steps}")
    facts = describe(encoder, config, make_data(negatives=negatives))
    assert facts["batch"] == f"6 queries a step, {batch}"
    assert facts["negatives a query"] == words


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["trainer.batch_size=5", "trainer.steps=2000"], "2,000, 2000.00 epochs"),
        (["trainer.batch_size=5", "trainer.steps=null", "trainer.epochs=3"], "3, 3.00 epochs"),
        # An epoch of five examples has three steps of two, the last of which takes the one that is left.
        (["trainer.batch_size=2", "trainer.steps=null", "trainer.epochs=1"], "3, 1.00 epochs"),
        (["trainer.batch_size=2", "trainer.steps=9"], "9, 3.00 epochs"),
    ],
)
def test_steps_are_shown_with_the_passes_over_the_examples(
    overrides: list[str], words: str, encoder: MultiVectorEncoder, make_config: MakeConfig
) -> None:
    assert describe(encoder, make_config(*overrides))["steps"] == words


def test_lengths_say_the_cap_what_it_cuts_the_median_and_what_is_added(
    encoder: MultiVectorEncoder, make_config: MakeConfig
) -> None:
    facts = describe(encoder, make_config())
    assert facts["queries"] == (
        "at most 8 tokens, which cuts 40% of 5, whose median is 6; filled to 8 with unattended mask tokens; "
        "prefix '[Q] '"
    )
    assert facts["documents"] == "at most 16 tokens, which cuts 40% of 5, whose median is 16; prefix '[D] '"


def test_queries_filled_to_a_least_length_are_cut_where_the_backbone_ends(
    encoder: MultiVectorEncoder, make_config: MakeConfig
) -> None:
    transformer = encoder[0]
    assert isinstance(transformer, Transformer)
    transformer.query_length = None
    transformer.query_expansion = {"strategy": "min", "attend": True, "length": 8}
    assert describe(encoder, make_config())["queries"] == (
        "at most 64 tokens, which cuts 0% of 5, whose median is 6; filled to at least 8 with attended mask tokens; "
        "prefix '[Q] '"
    )


def test_without_prefix_and_expansion_the_text_alone_is_measured(
    encoder: MultiVectorEncoder, make_config: MakeConfig
) -> None:
    transformer = encoder[0]
    assert isinstance(transformer, Transformer)
    transformer.query_expansion = None
    encoder.prompts["query"] = ""
    assert describe(encoder, make_config())["queries"] == "at most 8 tokens, which cuts 20% of 5, whose median is 5"


def test_lengths_are_those_of_the_first_examples(
    encoder: MultiVectorEncoder, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "SAMPLE", 3)
    facts = describe(encoder, make_config())
    assert facts["queries"].startswith("at most 8 tokens, which cuts 0% of 3, whose median is 5;")
    assert facts["documents"].startswith("at most 16 tokens, which cuts 0% of 3, whose median is 7;")


def test_the_remaining_facts_are_those_of_config_and_data(encoder: MultiVectorEncoder, make_config: MakeConfig) -> None:
    config = make_config("trainer.precision=bf16")
    retrieval = RetrievalSet({"q0": "a", "q1": "b"}, {f"d{number}": str(number) for number in range(1234)}, {})
    facts = describe(encoder, config, make_data(evaluation=retrieval))
    assert facts["data"] == "python_functions, 5 training examples"
    assert facts["evaluation"] == "2 queries, 1,234 documents"
    assert facts["precision"] == "bf16 on cpu"
    assert facts["MaxSim"] == "reference, as the kernel needs an NVIDIA GPU, and this runs on cpu"
    assert facts["output"] == config.output_dir


def test_queries_that_rank_their_own_documents_say_so(encoder: MultiVectorEncoder, make_config: MakeConfig) -> None:
    retrieval = RetrievalSet({"q0": "a"}, {"d0": "b", "d1": "c"}, {}, candidates={"q0": ["d1"]})
    facts = describe(encoder, make_config(), make_data(evaluation=retrieval))
    assert facts["evaluation"] == "1 queries, 2 documents, each query's own re-ranked"


def test_a_maxsim_that_was_asked_for_stands_without_a_reason(
    encoder: MultiVectorEncoder, make_config: MakeConfig
) -> None:
    assert describe(encoder, make_config("trainer.maxsim=reference"))["MaxSim"] == "reference"


CPU = torch.device("cpu")


def test_a_kernel_that_cannot_run_here_is_refused_before_there_is_an_encoder(make_config: MakeConfig) -> None:
    with pytest.raises(ConfigError) as caught:
        choose_maxsim(make_config("trainer.maxsim=cuda"), CPU)
    assert str(caught.value) == (
        "trainer.maxsim=cuda: the kernel needs an NVIDIA GPU, and this runs on cpu; "
        "or use maxsim=auto or maxsim=reference"
    )
    assert choose_maxsim(make_config(), CPU) == "reference"


@pytest.mark.parametrize(
    ("overrides", "refusal"),
    [
        ((), "the kernel takes bfloat16 and float16, not float32: set trainer.precision=bf16"),
        (("trainer.precision=bf16",), "the kernel takes embedding sizes that 16 divides, up to 256, not 24"),
    ],
)
def test_what_the_kernel_gets_is_that_of_precision_and_encoder(
    overrides: tuple[str, ...],
    refusal: str,
    encoder: MultiVectorEncoder,
    make_config: MakeConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernels, "_machine_obstacle", lambda device: None)
    monkeypatch.setattr(encoder, "get_embedding_dimension", lambda: 24)
    assert choose_maxsim(make_config(*overrides), CPU, encoder) == "reference"
    with pytest.raises(ConfigError) as caught:
        choose_maxsim(make_config("trainer.maxsim=cuda", *overrides), CPU, encoder)
    assert str(caught.value) == f"trainer.maxsim=cuda: {refusal}; or use maxsim=auto or maxsim=reference"


def test_every_width_must_be_one_that_the_kernel_takes(
    encoder: MultiVectorEncoder, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked = []
    monkeypatch.setattr(kernels, "_machine_obstacle", lambda device: None)
    monkeypatch.setattr(plan, "check_kernel", lambda device, dtype, width: checked.append(width))

    def choose(*widths: int, choice: str = "auto") -> str:
        matryoshka = f"loss.matryoshka={{widths: {[*widths]}, weights: {[1] * len(widths)}}}"
        config = make_config("trainer.precision=bf16", f"trainer.maxsim={choice}", matryoshka)
        return choose_maxsim(config, CPU, encoder)

    assert choose(128, 64, 16) == "cuda"
    assert checked == [128, 64, 16]
    assert choose(128, 24) == "reference"
    with pytest.raises(ConfigError) as caught:
        choose(128, 24, choice="cuda")
    assert str(caught.value) == (
        "trainer.maxsim=cuda: the kernel takes embedding sizes that 16 divides, up to 256, not 24; "
        "or use maxsim=auto or maxsim=reference"
    )
    assert checked == [128, 64, 16]


@pytest.mark.parametrize("choice", ["auto", "cuda"])
def test_a_kernel_that_fails_its_check_stops_the_run_with_what_it_said(
    choice: str, encoder: MultiVectorEncoder, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("NVRTC 13.0 cannot compile for sm_90a\nforward.cuh(7): error")

    monkeypatch.setattr(kernels, "obstacle", lambda *arguments: None)
    monkeypatch.setattr(plan, "check_kernel", fail)
    config = make_config(f"trainer.maxsim={choice}", "trainer.precision=bf16")
    assert choose_maxsim(config, CPU) == "cuda"
    with pytest.raises(ConfigError) as caught:
        choose_maxsim(config, CPU, encoder)
    assert str(caught.value) == (
        f"trainer.maxsim={choice}: NVRTC 13.0 cannot compile for sm_90a\nforward.cuh(7): error\n"
        "Use trainer.maxsim=reference"
    )


def test_a_run_that_asks_for_no_score_says_so(encoder: MultiVectorEncoder, make_config: MakeConfig) -> None:
    config = make_config("data.evaluation_fraction=0")
    assert describe(encoder, config)["evaluation"] == "none: data.evaluation_fraction=0 holds out no example"


def test_a_share_that_holds_nothing_out_of_a_small_set_is_shown_as_it_is(
    encoder: MultiVectorEncoder, make_config: MakeConfig
) -> None:
    config = make_config("data.evaluation_fraction=0.05")
    line = describe(encoder, config)["evaluation"]
    assert line.startswith("none: ")
    assert "data.evaluation_fraction=0.05" in line
