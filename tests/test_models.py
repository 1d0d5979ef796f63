"""Every system of the model page, tiny, in its own layout: from the command to a trained model and its exports."""

import io
import json
import math
import re
import shlex
import string
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from sentence_transformers import MultiVectorEncoder
from sentence_transformers.base.modules import Transformer
from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
from torch import Tensor

import architectures.factory
import scripts.export
import train
import trainer.loop
from architectures.export import Format, obstacle, write_layout
from architectures.heads import head_of
from architectures.readers import vectors_of
from scripts.export import scores_of
from scripts.models import compose_config, load_model
from tests.checkpoints import Row, modernbert, pylate, stanford
from tests.conftest import ROOT, lines_of, run_command, type_here
from tests.systems import (
    answerai_colbert_small,
    bert_base,
    colbertv2,
    colbertv2_lightonai,
    embeddinggemma_300m,
    ettin_32m,
    gte_moderncolbert,
    jina_colbert_v2,
    modernbert_base,
    multi_vector,
    pylate_mlp,
    sentence_transformer,
)
from trainer.data.batches import StepBatches

# Fixtures, which pytest finds by their names here.
__all__ = [
    "answerai_colbert_small",
    "bert_base",
    "colbertv2",
    "colbertv2_lightonai",
    "embeddinggemma_300m",
    "ettin_32m",
    "gte_moderncolbert",
    "jina_colbert_v2",
    "modernbert",
    "modernbert_base",
    "multi_vector",
    "pylate",
    "pylate_mlp",
    "sentence_transformer",
    "stanford",
]

pytestmark = pytest.mark.usefixtures("own_caches")

SUBJECTS = ["cat", "dog", "fish", "animal"]
VERBS = ["barks", "meows", "swims", "is the cat", "is the dog"]
OWN = {"sentence_transformers"}
TWO = OWN | {"pylate"}
ALL = TWO | {"stanford"}
MARKS = "32 tokens not scored in a document"
LINEAR_128: list[Row] = [(32, 128, "Identity", False, False)]


def typed_layer(out_features: int, activation: str) -> str:
    return f"{{out_features: {out_features}, bias: false, activation: {activation}, residual: false}}"


@dataclass(frozen=True, kw_only=True)
class System:
    """What is typed beside backbone.name, and what the start-up table then says; no key of the backbone is among it."""

    typed: tuple[str, ...] = ()
    backbone: str
    rows: list[Row]
    queries: str
    documents: str
    mask: str = MARKS
    exports: set[str]


SYSTEMS = {
    "colbertv2": System(
        typed=("backbone=colbertv2",),
        backbone="BertModel",
        rows=[(32, 24, "Identity", False, False)],
        queries="at most 12 tokens; filled to 12 with unattended mask tokens; prefix '[unused0]'",
        documents="at most 20 tokens; prefix '[unused1]'",
        exports=ALL,
    ),
    "answerai_colbert_small": System(
        typed=("backbone=answerai_colbert_small",),
        backbone="BertModel",
        rows=[(32, 12, "Identity", False, False)],
        queries="at most 32 tokens; filled to 32 with unattended mask tokens; prefix '[unused0]'",
        documents="at most 30 tokens; prefix '[unused1]'",
        exports=ALL,
    ),
    "jina_colbert_v2": System(
        typed=("backbone=jina_colbert_v2", "backbone.trust_remote_code=true"),
        backbone="TinyModel",
        rows=[(32, 16, "Identity", False, False)],
        queries="at most 14 tokens; filled to 14 with attended mask tokens; prefix '[QueryMarker]'",
        documents="at most 40 tokens; prefix '[DocumentMarker]'",
        # Stanford's ColBERT skips the first token of each mark, which here is the space before it.
        mask="1 tokens not scored in a document",
        exports=ALL,
    ),
    "colbertv2_lightonai": System(
        typed=("backbone=colbertv2_lightonai",),
        backbone="BertModel",
        rows=[(32, 24, "Identity", False, False)],
        queries="at most 11 tokens; filled to 11 with unattended mask tokens; prefix '[unused0]'",
        documents="at most 22 tokens; prefix '[unused1]'",
        exports=ALL,
    ),
    "gte_moderncolbert": System(
        typed=("backbone=gte_moderncolbert",),
        backbone="ModernBertModel",
        rows=[(32, 16, "Identity", False, False)],
        queries="at most 32 tokens; filled to 32 with unattended mask tokens; prefix '[Q] '",
        documents="at most 300 tokens; prefix '[D] '",
        exports=ALL,
    ),
    "pylate_mlp": System(
        backbone="BertModel",
        rows=[(32, 48, "GELU", True, True), (48, 16, "Identity", False, False)],
        queries="at most 10 tokens; filled to 10 with attended mask tokens; prefix '[Q] '",
        documents="at most 18 tokens; prefix '[D] '",
        mask="2 tokens not scored in a document",
        exports=TWO,
    ),
    "bert_base": System(
        typed=("backbone=bert_base",),
        backbone="BertModel",
        rows=LINEAR_128,
        queries="at most 32 tokens; filled to 32 with unattended mask tokens; prefix '[Q] '",
        documents="at most 180 tokens; prefix '[D] '",
        exports=ALL,
    ),
    "modernbert_base": System(
        typed=(
            "backbone=modernbert_base",
            "head=linear",
            f"head.layers=[{typed_layer(512, 'gelu')}, {typed_layer(128, 'identity')}]",
        ),
        backbone="ModernBertModel",
        rows=[(32, 512, "GELU", False, False), (512, 128, "Identity", False, False)],
        queries="at most 32 tokens; filled to 32 with unattended mask tokens; prefix '[Q] '",
        documents="at most 300 tokens; prefix '[D] '",
        exports=TWO,
    ),
    "ettin_32m": System(
        typed=("backbone=ettin_32m", "head=ettin_mlp"),
        backbone="ModernBertModel",
        rows=[(32, 64, "Identity", False, True), (64, 32, "Identity", False, False)],
        queries="at most 32 tokens; filled to 32 with unattended mask tokens; prefix '[Q] '",
        documents="at most 180 tokens; prefix '[D] '",
        exports=TWO,
    ),
    "embeddinggemma_300m": System(
        typed=("backbone=embeddinggemma_300m",),
        backbone="Gemma3TextModel",
        rows=[(32, 128, "Identity", False, False), (128, 32, "Identity", False, False)],
        queries="at most 2048 tokens; prefix 'task: search result | query: '",
        documents="at most 2048 tokens; prefix 'title: none | text: '",
        mask="scores every token",
        exports=OWN,
    ),
    "sentence_transformer": System(
        backbone="BertModel",
        rows=[(32, 20, "Tanh", True, False)],
        queries="at most 32 tokens; filled to 32 with unattended mask tokens; prefix '[Q] '",
        documents="at most 64 tokens; prefix '[D] '",
        exports=TWO,
    ),
    "multi_vector": System(
        backbone="BertModel",
        rows=[(32, 40, "GELU", True, True), (40, 16, "Identity", False, False)],
        queries="at most 64 tokens; filled to at least 9 with attended mask tokens; prefix 'what is : '",
        documents="at most 21 tokens",
        mask="2 tokens not scored in a query and document",
        exports=OWN,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run that is over: the encoder as it was trained, in memory, and as it was at the start."""

    done: CompletedProcess[str]
    folder: Path
    encoder: MultiVectorEncoder
    start: dict[str, Tensor]
    start_scores: Tensor
    first_batch: list[int]

    @property
    def result(self) -> Any:
        return json.loads((self.folder / "result.json").read_text())


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments: twenty pairs, some of them held out, two steps of four."""
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    rows = [
        {"query": f"which {subject} {verb}?", "positive": f"the {subject}, that {verb}, is what {verb}."}
        for subject in SUBJECTS
        for verb in VERBS
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        *("data=pairs", f"data.path={path}", "data.evaluation_fraction=0.3"),
        *("trainer.batch_size=4", "trainer.steps=2", "trainer.precision=float32"),
        *("optimizer.learning_rate=1e-2", "optimizer.warmup_fraction=0"),
    ]


@pytest.fixture(scope="module")
def run_of(
    pairs: list[str], tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Callable[[str], Run]:
    """The run of a system, the same for all tests that ask for it."""

    @cache
    def run(system: str) -> Run:
        name = f"backbone.name={request.getfixturevalue(system)}"
        return train_here(tmp_path_factory.mktemp("runs") / system, *SYSTEMS[system].typed, name, *pairs)

    return run


@pytest.fixture(params=SYSTEMS)
def system(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def run(system: str, run_of: Callable[[str], Run]) -> Run:
    return run_of(system)


@pytest.fixture
def colbertv2_run(run_of: Callable[[str], Run]) -> Run:
    return run_of("colbertv2")


def train_here(folder: Path, *arguments: str) -> Run:
    """Type a run and keep the encoder that it trains."""
    seen: dict[str, Any] = {}
    build_encoder, build_batches = architectures.factory.build_encoder, trainer.loop.build_batches

    def build(*given: Any, **keys: Any) -> MultiVectorEncoder:
        encoder = seen["encoder"] = build_encoder(*given, **keys)
        seen["start"] = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
        seen["start_scores"] = scores(encoder)
        return encoder

    def batches(*given: Any) -> StepBatches:
        found = build_batches(*given)
        seen["first_batch"] = [place.row for place in found.order.step(0)]
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(architectures.factory, "build_encoder", build)
        patch.setattr(trainer.loop, "build_batches", batches)
        done = type_here(*arguments, f"output_dir={folder}")
    assert done.returncode == 0, done.stderr
    return Run(done=done, folder=folder, **seen)


def scores(encoder: MultiVectorEncoder) -> Tensor:
    """Of the texts that exports are compared on."""
    training = encoder.training
    values = scores_of(lambda texts, *, task: vectors_of(encoder.eval(), texts, task=task))
    encoder.train(training)
    return values


def assert_same_scores(actual: Tensor, expected: Tensor) -> None:
    """Up to sums of float32 numbers in another order."""
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def export_here(model: Path, output: Path, format: str) -> None:
    """`python scripts/export.py ...` in this process."""
    stdout, stderr = io.StringIO(), io.StringIO()
    arguments = [f"model={model}", f"format={format}", f"output={output}", "trust_remote_code=true"]
    with redirect_stdout(stdout), redirect_stderr(stderr):
        status = scripts.export.main(arguments)
    assert status == 0, stderr.getvalue()


def by_the_card(folder: Path) -> MultiVectorEncoder:
    """Run the lines that the card of a model shows for sentence-transformers."""
    names: dict[str, Any] = {}
    exec(lines_of_the_card(folder)["sentence-transformers 6"], names)
    assert names["scores"].shape == (1, 1)
    model = names["model"]
    assert isinstance(model, MultiVectorEncoder)
    return model


def lines_of_the_card(folder: Path) -> dict[str, str]:
    """For each library what the card says: its lines of Python, or why it cannot hold the model."""
    card = (folder / "README.md").read_text(encoding="utf-8").partition("## How to load it")[2]
    found = re.findall(r"^\*\*(.+?)\*\*(?:: (.+)|\n\n```python\n((?:.*\n)*?)```)$", card, re.MULTILINE)
    return {library: reason or lines for library, reason, lines in found}


def held_by(card: dict[str, str]) -> set[str]:
    """The layouts that can hold the model, by what its card says."""
    assert card.keys() == {layout.value for layout in Format}
    return {layout.name for layout in Format if "\n" in card[layout.value]}


# --- every system, in its own layout ---


def layer_line(row: Row) -> str:
    """The start-up table's line about a Dense layer, without spaces that align."""
    in_features, out_features, activation, bias, residual = row
    learned = residual and in_features != out_features
    words = f"Dense {in_features} -> {out_features}, {activation}, {'bias' if bias else 'no bias'}"
    words += ", residual over a learned map" if learned else ", residual" if residual else ""
    count = in_features * out_features * (2 if learned else 1) + (out_features if bias else 0)
    return f"{words} {count:,}"


def test_the_start_up_table_shows_the_layers_of_the_page(run: Run, system: str) -> None:
    expected = SYSTEMS[system]
    header, backbone, *rest = lines_of(run.done)
    assert header == "module what it does parameters"
    assert re.fullmatch(rf"Transformer {expected.backbone}, 32 wide [0-9,]+", backbone)
    layers = [layer_line(row) for row in expected.rows]
    assert rest[: len(layers) + 2] == [*layers, f"MultiVectorMask {expected.mask}", "Normalize unit length"]


def test_the_start_up_table_shows_the_lengths_the_prefixes_and_the_expansion(run: Run, system: str) -> None:
    # A long line is broken.
    text = re.sub(r", which cuts \d+% of \d+, whose median is \d+", "", " ".join(run.done.stdout.split()))
    assert f" queries {SYSTEMS[system].queries} documents {SYSTEMS[system].documents} batch 4 " in text


def test_two_steps_train_the_backbone_and_every_layer_of_the_head(run: Run) -> None:
    metrics = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == [0, 1, 2]
    assert all(math.isfinite(line["train/loss"]) and line["train/gradient_norm"] > 0 for line in metrics[1:])
    moved = {name for name, tensor in run.encoder.state_dict().items() if not torch.equal(tensor, run.start[name])}
    for index in range(len(head_of(run.encoder)) + 1):
        trained = {name for name, _ in run.encoder[index].named_parameters()}
        assert {f"{index}.{name}" for name in trained if name.endswith("weight")} & moved, index
    # Ten times the limit of an export: the scores below are not those of the start.
    assert (scores(run.encoder) - run.start_scores).abs().max() > 1e-3


def test_the_lines_of_the_card_load_the_model_that_was_trained(run: Run, system: str) -> None:
    card = lines_of_the_card(run.folder / "model")
    assert held_by(card) == SYSTEMS[system].exports
    trusted = "backbone.trust_remote_code=true" in SYSTEMS[system].typed
    assert ("trust_remote_code=True" in card["sentence-transformers 6"]) == trusted
    assert_same_scores(scores(by_the_card(run.folder / "model")), scores(run.encoder))


def test_every_layout_that_can_hold_a_model_gives_back_its_scores(run: Run, system: str, tmp_path: Path) -> None:
    expected = scores(run.encoder)
    # Other texts have other scores, or equal ones would say little.
    assert (expected[0, :4] - expected[0, 0]).abs().max() > 1e-3
    export_here(run.folder / "model", tmp_path / "exports", "all")
    exported = {path.name: path for path in (tmp_path / "exports").iterdir()}
    assert set(exported) == SYSTEMS[system].exports
    for path in [run.folder / "model", *exported.values()]:
        assert_same_scores(scores(load_model(str(path), "backbone.trust_remote_code=true")), expected)


@pytest.mark.parametrize("format", ["pylate", "stanford"])
def test_training_goes_on_from_an_export_where_the_first_run_ended(
    format: str, colbertv2_run: Run, pairs: list[str], tmp_path: Path
) -> None:
    export_here(colbertv2_run.folder / "model", tmp_path / "export", format)
    more = train_here(tmp_path / "more", f"backbone.name={tmp_path}/export", *pairs, "trainer.steps=1")
    assert_same_scores(more.start_scores, scores(colbertv2_run.encoder))
    assert more.result["before"] == pytest.approx(colbertv2_run.result["after"], rel=1e-5)
    assert more.result["after"] is not None
    assert more.result["steps"] == 1


def test_code_of_the_checkpoint_is_refused_in_one_line_that_says_how_to_allow_it(
    jina_colbert_v2: Path, pairs: list[str], tmp_path: Path
) -> None:
    done = type_here(
        "backbone=jina_colbert_v2", f"backbone.name={jina_colbert_v2}", *pairs, f"output_dir={tmp_path}/run"
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        f"error: backbone.name={jina_colbert_v2} runs Python code of its own (configuration_tiny.py, "
        "modeling_tiny.py): read it, then set backbone.trust_remote_code=true\n"
    )
    assert not (tmp_path / "run").exists()


def test_a_backbone_of_its_own_code_is_exported_to_stanfords_layout_with_that_code(
    jina_colbert_v2: Path, tmp_path: Path
) -> None:
    encoder = load_model(str(jina_colbert_v2), "backbone.trust_remote_code=true")
    assert obstacle(encoder, Format.stanford) is None
    write_layout(encoder, Format.stanford, tmp_path)
    assert (tmp_path / "modeling_tiny.py").read_text() == (jina_colbert_v2 / "modeling_tiny.py").read_text()
    exported = load_model(str(tmp_path), "backbone.trust_remote_code=true")
    assert type(exported.transformers_model).__name__ == "TinyModel"
    assert_same_scores(scores(exported), scores(encoder))


def rows_of(encoder: MultiVectorEncoder) -> list[Row]:
    return [
        (
            layer.in_features,
            layer.out_features,
            type(layer.activation_function).__name__,
            layer.bias,
            layer.use_residual,
        )
        for layer in head_of(encoder)
    ]


def test_embeddinggemma_gets_one_more_layer_and_loses_it_again(embeddinggemma_300m: Path, tmp_path: Path) -> None:
    own = SYSTEMS["embeddinggemma_300m"].rows
    keys = ["backbone.expansion=none", "backbone.skiplist=[]"]
    torch.manual_seed(0)
    appended = load_model(str(embeddinggemma_300m), "head.embedding_size=128", *keys)
    assert rows_of(appended) == [*own, *LINEAR_128]
    appended.save_pretrained(str(tmp_path), create_model_card=False)
    again = load_model(str(tmp_path))
    assert rows_of(again) == [*own, *LINEAR_128]
    assert_same_scores(scores(again), scores(appended))
    deleted = load_model(str(tmp_path), "head.keep=2")
    assert rows_of(deleted) == own
    assert_same_scores(scores(deleted), scores(load_model(str(embeddinggemma_300m), *keys)))


@pytest.mark.parametrize(("size", "more"), [("null", []), ("20", []), ("16", [(20, 16, "Identity", False, False)])])
def test_a_sentence_transformer_gets_one_more_layer_only_where_another_width_is_given(
    size: str, more: list[Row], sentence_transformer: Path
) -> None:
    encoder = load_model(str(sentence_transformer), f"head.embedding_size={size}")
    assert rows_of(encoder) == [*SYSTEMS["sentence_transformer"].rows, *more]


# --- what is taken over, key by key ---


def settings_of(encoder: MultiVectorEncoder) -> dict[str, Any]:
    """What the keys of the backbone have become, by key."""
    transformer = encoder[0]
    assert isinstance(transformer, Transformer)
    mask = next(module for module in encoder if isinstance(module, MultiVectorMask))
    expansion: Any = transformer.query_expansion
    return {
        "query_length": expansion["length"] if expansion else transformer.query_length,
        "document_length": transformer.document_length,
        "query_prefix": (encoder.prompts["query"] or "").strip(),
        "document_prefix": (encoder.prompts["document"] or "").strip(),
        "expansion": expansion["strategy"] if expansion else "none",
        "attend_to_expansion": expansion["attend"] if expansion else None,
        "skiplist": mask.skiplist_words,
        "skiplist_sides": mask.skiplist_tasks,
    }


OWN_SETTINGS: dict[str, dict[str, Any]] = {
    "colbertv2": {
        "query_length": 12,
        "document_length": 20,
        "query_prefix": "[unused0]",
        "document_prefix": "[unused1]",
        "expansion": "fixed",
        "attend_to_expansion": False,
        "skiplist": list(string.punctuation),
        "skiplist_sides": ["document"],
    },
    "pylate_mlp": {
        "query_length": 10,
        "document_length": 18,
        "query_prefix": "[Q]",
        "document_prefix": "[D]",
        "expansion": "fixed",
        "attend_to_expansion": True,
        "skiplist": [",", "cat"],
        "skiplist_sides": ["document"],
    },
    "sentence_transformer": {
        "query_length": 32,
        "document_length": 64,
        "query_prefix": "[Q]",
        "document_prefix": "[D]",
        "expansion": "fixed",
        "attend_to_expansion": False,
        "skiplist": list(string.punctuation),
        "skiplist_sides": ["document"],
    },
    "multi_vector": {
        "query_length": 9,
        "document_length": 21,
        "query_prefix": "what is :",
        "document_prefix": "",
        "expansion": "min",
        "attend_to_expansion": True,
        "skiplist": [".", ","],
        "skiplist_sides": ["query", "document"],
    },
}


@pytest.mark.parametrize("name", OWN_SETTINGS)
def test_each_key_that_is_given_changes_that_key_alone(name: str, request: pytest.FixtureRequest) -> None:
    own, folder = OWN_SETTINGS[name], str(request.getfixturevalue(name))
    assert settings_of(load_model(folder)) == own
    given = {
        "query_length": 15,
        "document_length": 12,
        "query_prefix": "[ask]",
        "document_prefix": "[text]",
        "expansion": "fixed" if own["expansion"] == "min" else "min",
        "attend_to_expansion": not own["attend_to_expansion"],
        "skiplist": ["a", "!"],
        "skiplist_sides": ["query"],
    }
    assert given.keys() == own.keys()
    found = {}
    for key, value in given.items():
        typed = f"[{','.join(map(repr, value))}]" if isinstance(value, list) else f"{value!r}"
        found[key] = settings_of(load_model(folder, f"backbone.{key}={typed}"))
    assert found == {key: own | {key: value} for key, value in given.items()}


# --- a name alone ---


@pytest.fixture
def minilm() -> dict[str, Any]:
    """The keys of the default preset that are its own."""
    own: dict[str, Any] = vars(compose_config("minilm").backbone)
    assert own["sha256"] is not None
    assert own["document_length"] == 96
    return own


def backbone_of(done: CompletedProcess[str]) -> Any:
    """The backbone that `--cfg job` prints."""
    assert done.returncode == 0, done.stderr
    composed: Any = OmegaConf.create(done.stdout)
    return OmegaConf.to_container(composed.backbone)


@pytest.mark.parametrize(
    "typed",
    [["{name}", "--cfg", "job"], ["--cfg", "job", "{name}"], ["experiment=quickstart", "{name}", "--cfg", "job"]],
    ids=["before a flag", "behind a flag", "with an experiment"],
)
def test_a_name_alone_takes_nothing_from_the_default_preset(typed: list[str], colbertv2: Path) -> None:
    composed = backbone_of(type_here(*(word.format(name=f"backbone.name={colbertv2}") for word in typed)))
    assert composed == {
        "name": str(colbertv2),
        "trust_remote_code": False,
        "allow_pickle": False,
        "attention": "sdpa",
        **dict.fromkeys(["revision", "sha256", "dropout", "query_length", "document_length", "query_prefix"]),
        **dict.fromkeys(["document_prefix", "expansion", "attend_to_expansion", "skiplist", "skiplist_sides"]),
    }


def test_a_name_beside_its_preset_keeps_the_keys_of_the_preset(
    colbertv2: Path, minilm: dict[str, Any], pairs: list[str], tmp_path: Path
) -> None:
    arguments = ["backbone=minilm", f"backbone.name={colbertv2}"]
    composed = backbone_of(type_here(*arguments, "--cfg", "job"))
    assert composed["sha256"] == minilm["sha256"]
    assert composed["document_length"] == 96
    assert composed["skiplist"] == []  # what configs/pairing says of this backbone on this data
    refused = type_here(*arguments, *pairs, "backbone.document_length=64", f"output_dir={tmp_path}/run")
    assert refused.returncode == 2
    assert refused.stderr.startswith(f"error: backbone.sha256={minilm['sha256']}: {colbertv2}/model.safetensors has ")
    assert refused.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], []),
        (["seed=2"], ["seed=2"]),
        (["backbone=ettin_17m"], ["backbone=ettin_17m"]),
        (["backbone.name=a"], ["backbone=checkpoint", "backbone.name=a"]),
        (["seed=2", "++backbone.name=a"], ["backbone=checkpoint", "seed=2", "++backbone.name=a"]),
        (["-m", "backbone.name=a,b", "seed=1,2"], ["-m", "backbone=checkpoint", "backbone.name=a,b", "seed=1,2"]),
        (["backbone.name=a", "backbone=minilm"], ["backbone.name=a", "backbone=minilm"]),
        (["backbone.document_length=9"], ["backbone.document_length=9"]),
    ],
    ids=" ".join,
)
def test_only_a_name_without_a_preset_gets_the_preset_without_settings(
    arguments: list[str], expected: list[str]
) -> None:
    assert sorted(train.own_settings(arguments)) == sorted(expected)


def test_a_name_alone_in_a_sweep_brings_its_own_settings_to_the_processes_of_the_jobs(
    pylate_mlp: Path, pairs: list[str], tmp_path: Path
) -> None:
    done = type_here(
        *("-m", f"backbone.name={pylate_mlp}", "seed=3", *pairs, f"hydra.sweep.dir={tmp_path}/sweep"), cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "sweep").glob("*/config.yaml")
    config: Any = OmegaConf.load(path)
    assert config.seed == 3
    assert (config.backbone.sha256, config.backbone.document_length, config.backbone.skiplist) == (None, None, None)
    assert settings_of(load_model(str(path.parent / "model"))) == OWN_SETTINGS["pylate_mlp"]


# --- presets ---

PUBLISHED = {
    "answerai_colbert_small": "answerdotai/answerai-colbert-small-v1",
    "bert_base": "google-bert/bert-base-uncased",
    "colbertv2": "colbert-ir/colbertv2.0",
    "colbertv2_lightonai": "lightonai/colbertv2.0",
    "embeddinggemma_300m": "google/embeddinggemma-300m",
    "ettin_17m": "jhu-clsp/ettin-encoder-17m",
    "ettin_32m": "jhu-clsp/ettin-encoder-32m",
    "gte_modernbert_base": "Alibaba-NLP/gte-modernbert-base",
    "gte_moderncolbert": "lightonai/GTE-ModernColBERT-v1",
    "jina_colbert_v2": "jinaai/jina-colbert-v2",
    "modernbert_base": "answerdotai/ModernBERT-base",
}


def test_every_preset_but_the_embedded_one_is_listed_with_its_published_name() -> None:
    members = {path.stem for path in (ROOT / "configs" / "backbone").glob("*.yaml")}
    assert members == PUBLISHED.keys() | {"minilm", "checkpoint"}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_a_preset_without_the_network_says_in_one_line_what_cannot_be_reached(preset: str, tmp_path: Path) -> None:
    composed = backbone_of(type_here(f"backbone={preset}", "--cfg", "job"))
    assert composed["name"] == PUBLISHED[preset]
    done = type_here(f"backbone={preset}", f"output_dir={tmp_path}/run")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(
        f"error: backbone.name={PUBLISHED[preset]} is neither a folder, an installed package "
        "(package:<module>/<folder>) nor a reachable Hub name (config.json: "
    )
    assert done.stderr.endswith("): check the spelling, the network and HF_TOKEN\n")
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_preset_that_is_typed_without_the_network_ends_with_status_2(tmp_path: Path) -> None:
    done = run_command("backbone=bert_base", cwd=tmp_path, HF_HUB_OFFLINE="1", HF_HUB_CACHE=str(tmp_path / "hub"))
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: backbone.name=google-bert/bert-base-uncased is neither a folder, ")
    assert done.stderr.count("\n") == 1


# --- heads of the projection study ---

LAST = "Dense 32 -> 128, Identity, no bias 4,096"
STUDY = {
    "linear": [LAST],
    "deeper": ["Dense 32 -> 32, Identity, no bias 1,024", LAST],
    "deepest": ["Dense 32 -> 32, Identity, no bias 1,024", "Dense 32 -> 32, Identity, no bias 1,024", LAST],
    "relu": ["Dense 32 -> 32, ReLU, no bias 1,024", LAST],
    "gelu": ["Dense 32 -> 32, GELU, no bias 1,024", LAST],
    "silu": ["Dense 32 -> 32, SiLU, no bias 1,024", LAST],
    "glu": ["Projection 32 -> 32, Sigmoid, no bias, gated 2,048", LAST],
    "swiglu": ["Projection 32 -> 32, SiLU, no bias, gated 2,048", LAST],
    "upscaled": ["Dense 32 -> 64, Identity, no bias 2,048", "Dense 64 -> 128, Identity, no bias 8,192"],
    "residual": ["Dense 32 -> 32, Identity, no bias, residual 1,024", LAST],
    "best": [
        "Dense 32 -> 64, Identity, no bias, residual over a learned map 4,096",
        "Dense 64 -> 128, Identity, no bias 8,192",
    ],
}
NATIVE = {"glu", "swiglu"}


def test_every_head_of_the_study_is_listed_and_says_whether_it_is_portable() -> None:
    files = {path.stem: path for path in (ROOT / "configs" / "head" / "study").glob("*.yaml")}
    assert files.keys() == STUDY.keys()
    said = {name: path.read_text().splitlines()[0].rpartition("; ")[2] for name, path in files.items()}
    assert said == {name: "native" if name in NATIVE else "portable" for name in STUDY}


@pytest.mark.parametrize("head", STUDY)
def test_a_head_of_the_study_trains_and_the_lines_of_its_card_give_its_scores(
    head: str, tiny_bert: Path, pairs: list[str], tmp_path: Path
) -> None:
    run = train_here(tmp_path / "run", f"backbone.name={tiny_bert}", f"head=study/{head}", *pairs, "trainer.steps=3")
    assert run.result["steps"] == 3
    assert lines_of(run.done)[2 : 2 + len(STUDY[head])] == STUDY[head]
    assert (scores(run.encoder) - run.start_scores).abs().max() > 1e-3
    card = lines_of_the_card(run.folder / "model")
    assert held_by(card) == (OWN if head in NATIVE else ALL if head == "linear" else TWO)
    assert f'MultiVectorEncoder("{run.folder}/model"' in card["sentence-transformers 6"]
    assert ("trust_remote_code=True" in card["sentence-transformers 6"]) == (head in NATIVE)
    assert_same_scores(scores(by_the_card(run.folder / "model")), scores(run.encoder))
    if head in NATIVE:
        with pytest.raises(ValueError, match="trust_remote_code"):
            MultiVectorEncoder(str(run.folder / "model"), device="cpu")


def test_the_commands_of_the_card_write_the_folders_that_its_lines_load(colbertv2_run: Run) -> None:
    model = colbertv2_run.folder / "model"
    for layout in (Format.pylate, Format.stanford):
        command, _, lines = lines_of_the_card(model)[layout.value].partition("\n")
        python, script, *arguments = shlex.split(command.removeprefix("# after "))
        assert (python, script) == ("python", "scripts/export.py")
        with redirect_stdout(io.StringIO()):
            assert scripts.export.main(arguments) == 0
        folder = re.findall(r'"(/[^"]+)"', lines)[0]
        assert_same_scores(scores(load_model(folder)), scores(colbertv2_run.encoder))


# --- seeds ---


def head_at_start(run: Run) -> list[Tensor]:
    return [tensor for name, tensor in run.start.items() if re.match(r"[12]\.", name)]


@pytest.mark.parametrize(("seed", "same"), [("7", True), ("null", False)])
def test_a_head_with_a_seed_of_its_own_starts_equal_in_runs_of_other_seeds_and_data_order(
    seed: str, same: bool, tiny_bert: Path, pairs: list[str], tmp_path: Path
) -> None:
    arguments = [f"backbone.name={tiny_bert}", "head=study/best", f"head.seed={seed}", *pairs, "trainer.steps=1"]
    one, other = (train_here(tmp_path / seed, *arguments, f"seed={seed}") for seed in ("1", "2"))
    assert len(head_at_start(one)) == 3
    for ours, theirs in zip(head_at_start(one), head_at_start(other), strict=True):
        assert torch.equal(ours, theirs) == same
    assert one.first_batch != other.first_batch
