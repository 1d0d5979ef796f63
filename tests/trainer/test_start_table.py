"""What the start-up table says about a run, made by hand."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from accelerate import Accelerator
from sentence_transformers import MultiVectorEncoder
from sentence_transformers.base.modules import Transformer

from configs.schema import Config
from losses.factory import build_loss
from tests.trainer.made import DISTILLATION, MARGINS, make_data, with_config
from trainer import start_table
from trainer.data import Data
from trainer.data.retrieval import RetrievalSet
from trainer.loop import build_batches
from trainer.optim import freeze
from trainer.start_table import describe_data, describe_run

MakeConfig = Callable[..., Config]


def describe(
    encoder: MultiVectorEncoder, config: Config, data: Data | None = None, *, backend: str = "reference"
) -> dict[str, str]:
    data, accelerator = with_config(data or make_data(), config.data), Accelerator(cpu=True)
    loss = build_loss(config.loss, width=encoder.get_embedding_dimension() or 0, maxsim=backend)
    freeze(encoder, loss.learnt, config.optimizer)
    batches = build_batches(config, data.sets, encoder, accelerator)
    return describe_run(config, data, batches, encoder, loss, accelerator)


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
        # Queries are filled to 8 tokens: two, two and one. Documents have 5, 7, 16, 16 and 16: two in a row, then one.
        (["trainer.chunk_tokens=16"], 1, "3 of queries and 4 of documents a step and process, of at most 16 tokens"),
        (
            ["trainer.cache_tokens=16"],
            1,
            "3 of queries and 4 of documents a step and process, of at most 16 tokens, each encoded twice",
        ),
        (["trainer.steps=1"], 1, "1 of queries and 1 of documents a step and process, of at most 2,048 tokens"),
        # Micro-batches of two and three, whose texts share no chunk.
        (
            ["trainer.accumulation_steps=2"],
            1,
            "2 of queries and 2 of documents a step and process, of at most 2,048 tokens",
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
    assert start_table._size(size) == words


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


def test_lengths_are_those_of_some_examples_evenly_over_the_data(
    encoder: MultiVectorEncoder, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(start_table, "SAMPLE", 3)
    facts = describe(encoder, make_config())
    assert facts["queries"].startswith("at most 8 tokens, which cuts 33% of 3, whose median is 6;")
    assert facts["documents"].startswith("at most 16 tokens, which cuts 33% of 3, whose median is 16;")


def test_the_remaining_facts_are_those_of_config_and_data(encoder: MultiVectorEncoder, make_config: MakeConfig) -> None:
    config = make_config("trainer.precision=bf16")
    retrieval = RetrievalSet({"q0": "a", "q1": "b"}, {f"d{number}": str(number) for number in range(1234)}, {})
    facts = describe(encoder, config, make_data(evaluation=retrieval))
    assert facts["data"] == "made, 5 training examples"
    assert facts["evaluation"] == "2 queries, 1,234 documents"
    assert facts["precision"] == "bf16 on cpu"
    assert facts["MaxSim"] == "reference, as the kernel needs an NVIDIA GPU, and this runs on cpu"
    assert facts["output"] == config.output_dir


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        # Weights of 1 and 3, the first times the roots of the sizes.
        (["data.mix_by_size=0.5"], "mix of one 30% of 5, two 70% of 3 training examples; steps of one set each"),
        (["data.mix_batches=all_sets"], "mix of one 25% of 5, two 75% of 3 training examples; steps of all sets"),
    ],
)
def test_a_mix_is_shown_with_the_shares_and_the_lengths_of_its_sets(
    overrides: list[str], words: str, encoder: MultiVectorEncoder, make_config: MakeConfig
) -> None:
    config = make_config("trainer.batch_size=3", *overrides)
    config = replace(config, data=replace(config.data, mix={"one": 1.0, "two": 3.0}))
    [examples] = make_data().sets
    short = replace(examples.config, query_length=6, document_prefix="")
    two = replace(examples.select([2, 3, 4]), name="two", config=short)
    accelerator, loss = Accelerator(cpu=True), build_loss(config.loss, width=128, maxsim="reference")
    data = Data([replace(examples, name="one"), two], {})
    batches = build_batches(config, data.sets, encoder, accelerator)
    facts = describe_run(config, data, batches, encoder, loss, accelerator)
    assert facts["data"] == words
    # Of 4, 5, 6, 9 and 10 tokens two are cut at 8, and of 6, 9 and 10 two at 6.
    assert facts["queries"].startswith("at most 8 tokens (two 6), which cuts 50% of 8, whose median is 6;")
    # Of 5, 7, 16, 17 and 17 tokens, and without the marker of 15, 16 and 16.
    assert facts["documents"].startswith("at most 16 tokens, which cuts 25% of 8, whose median is 16;")
    assert facts["steps"] == "110, 36.67 epochs"


def test_queries_that_rank_their_own_documents_say_so(encoder: MultiVectorEncoder, make_config: MakeConfig) -> None:
    retrieval = RetrievalSet({"q0": "a"}, {"d0": "b", "d1": "c"}, {}, candidates={"q0": ["d1"]})
    facts = describe(encoder, make_config(), make_data(evaluation=retrieval))
    assert facts["evaluation"] == "1 queries, 2 documents, each query's own re-ranked"


def test_a_maxsim_that_was_asked_for_stands_without_a_reason(
    encoder: MultiVectorEncoder, make_config: MakeConfig
) -> None:
    assert describe(encoder, make_config("trainer.maxsim=reference"))["MaxSim"] == "reference"


def test_a_run_that_asks_for_no_score_says_so(encoder: MultiVectorEncoder, make_config: MakeConfig) -> None:
    config = make_config("data.evaluation_fraction=0")
    assert describe(encoder, config)["evaluation"] == "none: data.evaluation_fraction holds out no example"


def test_the_data_is_described_as_the_check_does(encoder: MultiVectorEncoder, make_config: MakeConfig) -> None:
    config = make_config()
    retrieval = RetrievalSet({"1": "what"}, {"1": "the cat", "2": "a dog"}, {"1": {"1": 1}})
    data = with_config(make_data(negatives=True, evaluation=retrieval), config.data)
    assert describe_data(config, data, encoder) == {
        "sets": {
            "made": {
                "examples": "5, of 5 different queries",
                "documents": "11 of 11 named, 10 different",
                "a query's": "1 positives, 0 to 3 (median 1) others",
                # With [CLS], [SEP] and the marker: 4, 5, 6, 9 and 10; 5, 7, 16, 17 and 17.
                "query tokens": "5 % 4, 50 % 6, 95 % 9, 100 % 10; 8 cut 40.0% of 5",
                "document tokens": "5 % 5, 50 % 16, 95 % 17, 100 % 17; 16 cut 40.0% of 5",
            }
        },
        "evaluation": "1 queries, 2 documents, 1 judged",
    }
