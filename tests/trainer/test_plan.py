"""What is refused before the first step."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from sentence_transformers import MultiVectorEncoder
from sentence_transformers.base.modules import Transformer

from configs.schema import Config, ConfigError
from losses.maxsim import kernels
from tests.trainer.made import DISTILLATION, MARGINS, make_data, to_examples, with_config
from trainer import plan
from trainer.data import Data
from trainer.data.batches import choose_documents, cut
from trainer.data.order import Place
from trainer.plan import (
    build_accelerator,
    check_batch,
    check_encoder,
    check_steps,
    check_teacher,
    choose_maxsim,
)

MakeConfig = Callable[..., Config]

# Refusals


def check(config: Config, data: Data) -> None:
    check_teacher(config, with_config(data, config.data), query_length=config.backbone.query_length)


@cache
def of_size(examples: int) -> Data:
    [five] = make_data().sets
    return Data([five.select([row % 5 for row in range(examples)])], {})


@pytest.mark.parametrize(("examples", "refused"), [(3, True), (4, False), (5, False)])
def test_a_batch_larger_than_the_training_set_is_refused(examples: int, refused: bool, make_config: MakeConfig) -> None:
    config = make_config("trainer.batch_size=4")
    if not refused:
        check_batch(config, of_size(examples), 1)
        return
    with pytest.raises(ConfigError) as caught:
        check_batch(config, of_size(examples), 1)
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
    "processes were asked for and each would run by itself: on GPUs, accelerate launch --multi_gpu "
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
        check_batch(config, of_size(examples), processes)
        return
    with pytest.raises(ConfigError) as caught:
        check_batch(config, of_size(examples), processes)
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
            steps = cut([Place(0, 0, row) for row in range(examples)], math.ceil(examples / batch_size))
            for processes in range(1, 6):
                parts = [
                    part
                    for step in steps
                    for micro_batch in cut(step, accumulation_steps)
                    for part in cut(micro_batch, processes)
                ]
                try:
                    check_batch(replace(config, trainer=trainer), of_size(examples), processes)
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


def mixed(*sizes: int) -> Data:
    sets = [of_size(size).sets[0] for size in sizes]
    return Data([replace(each, name=f"set{number}") for number, each in enumerate(sets)], {})


def test_a_set_of_a_mix_that_does_not_fill_its_batch_is_refused_by_name(make_config: MakeConfig) -> None:
    config = make_config("trainer.batch_size=4")
    check_batch(config, mixed(9, 4), 1)
    with pytest.raises(ConfigError) as caught:
        check_batch(config, mixed(9, 3, 8), 1)
    assert str(caught.value) == "trainer.batch_size=4 is larger than the 3 training examples of set1: set 3 or less"
    # Micro-batches of two and three: of nine examples, a step has four or five; of five, two or three.
    halves = make_config("trainer.batch_size=8", "trainer.accumulation_steps=2")
    check_batch(halves, mixed(16, 9), 2)
    with pytest.raises(ConfigError) as caught:
        check_batch(halves, mixed(16, 9), 3)
    assert str(caught.value).startswith("trainer.batch_size=8 in trainer.accumulation_steps=2 ")


def test_batches_of_all_sets_are_filled_by_all_together(make_config: MakeConfig) -> None:
    config = make_config("trainer.batch_size=4", "data.mix_batches=all_sets")
    check_batch(config, mixed(1, 3), 1)
    with pytest.raises(ConfigError) as caught:
        check_batch(config, mixed(1, 2), 1)
    assert str(caught.value) == "trainer.batch_size=4 is larger than the 3 training examples: set 3 or less"


def taught(scores: list[list[float]]) -> Data:
    """A query for each of these scores, the best first."""
    return Data([to_examples([[f"the {place}" for place in range(len(own))] for own in scores], scores)], {})


GOOD, FLAT, STEEP = [1.0, 0.5, 0.0], [7.0, 7.0, 7.0], [10.0, 0.0]


@pytest.mark.parametrize("overrides", [DISTILLATION, MARGINS])
def test_scores_that_are_the_same_in_most_queries_are_refused(
    overrides: tuple[str, ...], make_config: MakeConfig
) -> None:
    with pytest.raises(ConfigError) as caught:
        check(make_config(*overrides), taught([GOOD, FLAT, [0.0, 0.0], GOOD, FLAT]))
    assert str(caught.value) == (
        "the teacher's scores are all the same in 60% of 5 queries, such as made.jsonl:2 (7, 7, 7, ...): "
        "there is nothing to learn from; check data.path"
    )
    check(make_config(*overrides), taught([GOOD, FLAT, FLAT, GOOD]))


@pytest.mark.parametrize(
    ("steep", "overrides", "message"),
    [
        (
            STEEP,
            ("loss.distillation.normalization=none",),
            "loss.distillation.teacher_temperature=1 leaves one document more than 99% in 60% of 5 queries, such as "
            "made.jsonl:1 (10, 0, ...): raise it; the scores of a query have a standard deviation of 5",
        ),
        (
            # As a sum of quantised impacts.
            [246_912.0, 0.0],
            ("loss.distillation.normalization=none", "loss.distillation.teacher_temperature=2.5"),
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
        check(make_config(*DISTILLATION, *overrides), data)
    assert str(caught.value) == message
    # Its own temperature does not matter where it gives margins, and neither where it is not asked.
    check(make_config(*MARGINS, *overrides, "loss.margin_mse.teacher_temperature=1e6"), data)
    check(make_config("data=distillation_ids", "data.path=unused", *overrides), data)
    check(make_config(*DISTILLATION, *overrides), taught([steep, GOOD, steep, GOOD, GOOD]))


def test_two_documents_in_most_queries_are_refused_where_min_max_makes_0_and_1_of_them(make_config: MakeConfig) -> None:
    two = [0.5, 0.0]
    with pytest.raises(ConfigError) as caught:
        check(make_config(*DISTILLATION), taught([two, GOOD, two, two, GOOD]))
    assert str(caught.value) == (
        "loss.distillation.normalization=min_max makes 0 and 1 of two documents in 60% of 5 queries, such as "
        "made.jsonl:1 (0.5, 0, ...): give a query 3 or more, or set it to none"
    )
    check(make_config(*DISTILLATION), taught([two, GOOD, two, GOOD, GOOD]))
    check(make_config(*DISTILLATION, "loss.distillation.normalization=none"), taught([two] * 5))


def test_one_document_of_two_has_99_percent_where_its_score_is_ln_99_temperatures_above(
    make_config: MakeConfig,
) -> None:
    # ln 99 = 4.5951
    two = ("loss.distillation.normalization=none", "loss.distillation.teacher_temperature=3")
    config = make_config(*DISTILLATION, *two)
    check(config, taught([[3 * 4.5950, 0.0]] * 5))
    with pytest.raises(ConfigError, match=r"^loss\.distillation\.teacher_temperature=3 leaves one document"):
        check(config, taught([[3 * 4.5952, 0.0]] * 5))


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
        check(make_config(*overrides), taught([GOOD, steep, steep, GOOD, steep]))
    assert str(caught.value) == (
        f"loss.margin_mse.teacher_temperature=1 leaves margins above {highest}, which {score} cannot have, in 60% of "
        f"5 queries, such as made.jsonl:2 ({', '.join(f'{value:g}' for value in steep)}, ...): "
        f"raise it; the margins of a query are {average} on average"
    )
    check(make_config(*overrides), taught([GOOD, steep, steep, GOOD, GOOD]))
    check(make_config(*overrides), taught([[float(highest), 0.0]] * 5))
    check(make_config(*overrides, "loss.margin_mse.teacher_temperature=2"), taught([steep] * 5))
    # The checkpoint says how long its queries are.
    unknown = ("backbone.query_length=null", "backbone.expansion=none")
    check(make_config(*overrides, *unknown), taught([steep] * 5))
    check(make_config("data=distillation_ids", "data.path=unused"), taught([steep] * 5))


@pytest.mark.parametrize("term", [DISTILLATION, MARGINS])
def test_a_set_of_a_mix_without_scores_is_refused_by_name(term: tuple[str, ...], make_config: MakeConfig) -> None:
    config = make_config(*term)
    [with_scores], [without] = taught([GOOD] * 5).sets, make_data().sets
    partly = to_examples([["a", "b", "c"]] * 2, [GOOD, []])
    check(config, Data([with_scores, replace(with_scores, name="other")], {}))
    for other in (without, partly):
        with pytest.raises(ConfigError) as caught:
            check(config, Data([with_scores, replace(other, name="answers")], {}))
        assert str(caught.value) == (
            "loss.terms.distillation and margin_mse need teacher scores, and answers has none: give some, or set both "
            "to 0"
        )
        check(make_config("data=pairs", "data.path=unused"), Data([with_scores, other], {}))


def test_the_teacher_of_each_set_of_a_mix_is_looked_at(make_config: MakeConfig) -> None:
    flat = taught([FLAT] * 5).sets[0]
    with pytest.raises(ConfigError, match=r"^the teacher's scores are all the same in 100% of 5 queries"):
        check(make_config(*DISTILLATION), Data([*taught([GOOD] * 5).sets, flat], {}))


def test_the_documents_that_are_looked_at_are_those_of_the_first_epoch(make_config: MakeConfig) -> None:
    rows = []
    for row in range(5):
        _, first, second = choose_documents(9, 3, positives=1, stratified=False, seed=(1, 0, row, 0))
        rows.append([0.5 if place in (0, first, second) else 0.0 for place in range(9)])
    with pytest.raises(ConfigError, match=r"^the teacher's scores are all the same in 100% of 5 queries"):
        check(make_config(*DISTILLATION, "data.documents_per_query=3"), taught(rows))
    check(make_config(*DISTILLATION, "data.documents_per_query=3", "seed=2"), taught(rows))
    check(make_config(*DISTILLATION), taught(rows))


def test_of_a_large_set_a_sample_is_looked_at_evenly_over_it(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "TEACHER_SAMPLE", 2)
    # The first, third and fifth.
    check(make_config(*DISTILLATION), taught([GOOD, FLAT, GOOD, FLAT, FLAT]))
    with pytest.raises(ConfigError, match=r"in 67% of 3 queries, such as made\.jsonl:3 \(7, 7, 7, \.\.\.\)"):
        check(make_config(*DISTILLATION), taught([GOOD, GOOD, FLAT, GOOD, FLAT]))


def test_without_a_term_that_needs_a_teacher_no_score_is_read(make_config: MakeConfig) -> None:
    check(make_config(), make_data())


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
