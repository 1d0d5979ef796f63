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
from losses.maxsim import kernels
from trainer import plan
from trainer.data import Data
from trainer.data.batches import cut
from trainer.data.retrieval import RetrievalSet
from trainer.plan import build_accelerator, check_batch, check_steps, choose_maxsim, describe_run

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
    return Data(
        Dataset.from_list(
            [
                {"query": query, "positive": positive, "negatives": texts if negatives else [], "place": "made.jsonl:1"}
                for query, positive, texts in rows
            ]
        ),
        evaluation,
    )


def describe(encoder: MultiVectorEncoder, config: Config, data: Data | None = None) -> dict[str, str]:
    return describe_run(config, data or make_data(), encoder, Accelerator(cpu=True), "reference")


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


# The start-up table


@pytest.mark.parametrize(
    ("overrides", "negatives", "words"),
    [
        ([], False, "3 in the batch"),
        (["trainer.accumulation_steps=2"], False, "1 in the batch"),
        # Six of five queries: 1.2 each, times the queries of a micro-batch.
        ([], True, "3 in the batch + 4.8 explicit of all its queries"),
        (["trainer.accumulation_steps=2"], True, "1 in the batch + 2.4 explicit of all its queries"),
    ],
)
def test_negatives_are_those_of_a_micro_batch(
    overrides: list[str], negatives: bool, words: str, encoder: MultiVectorEncoder, make_config: MakeConfig
) -> None:
    config = make_config("trainer.batch_size=4", *overrides)
    assert describe(encoder, config, make_data(negatives=negatives))["negatives a query"] == words


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
            "5 in the batch gathered from all processes",
        ),
        (
            2,
            True,
            "2 micro-batch(es) of 3, 2 process(es) of about 1.5 queries each",
            "2 in the batch gathered from all processes + 3.6 explicit of all its queries",
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
