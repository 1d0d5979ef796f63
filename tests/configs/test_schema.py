"""Every rule of the config by its exact key, and every preset by composing it."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from configs.schema import (
    Activation,
    Config,
    ConfigError,
    HeadLayer,
    Norm,
    as_dict,
    changed_keys,
    known_keys,
    parse_config,
    save_config,
    unknown_key,
)
from tests.conftest import ROOT, tiny_overrides

MakeConfig = Callable[..., Config]
PRESETS = sorted(
    f"{path.parts[0]}={path.relative_to(path.parts[0]).with_suffix('').as_posix()}"
    for path in (found.relative_to(ROOT / "configs") for found in (ROOT / "configs").glob("*/**/*.yaml"))
    # What others of data begin with, and what has sets of its own, in test_mix.py.
    if path.parts[0] != "accelerate" and path.as_posix() not in ("data/base.yaml", "data/mix.yaml")
)
PAIRS = ("data=pairs", "data.path=mine.jsonl")
DISTILLATION = ("data=distillation_ids", "data.path=folder")
# What a preset needs beside it.
EXTRA = {
    "data=pairs": [*PAIRS],
    **{f"data={name}": ["data.path=folder"] for name in ("beir", "distillation_ids", "scored")},
    "data=stanford": [f"data.{key}=some.tsv" for key in ("path", "queries_path", "documents_path")],
    **{f"loss={name}": [*DISTILLATION] for name in ("distillation", "distillation_contrastive", "margin_mse")},
}


@pytest.fixture(scope="session")
def composed() -> dict[tuple[str, ...], DictConfig]:
    """What the groups of a command compose to, by these."""
    return {}


@pytest.fixture
def merge_config(tiny_bert: Path, tmp_path: Path, composed: dict[tuple[str, ...], DictConfig]) -> MakeConfig:
    """As make_config for keys that exist: groups are composed once and keys merged in, in a fifth of the time."""

    def merge(*overrides: str) -> Config:
        groups = tuple(override for override in overrides if "." not in override.partition("=")[0])
        keys = [override for override in overrides if override not in groups]
        if groups not in composed:
            ConfigStore.instance().store("schema", Config)
            with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
                composed[groups] = compose("train", [*tiny_overrides(tiny_bert, tmp_path), *groups])
        merged = composed[groups].copy()
        for override in OverridesParser.create().parse_overrides(keys):
            OmegaConf.update(merged, override.key_or_group, override.value(), merge=True)
        return parse_config(merged)

    return merge


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_composes_and_states_every_value(preset: str, make_config: MakeConfig) -> None:
    config = make_config(preset, *EXTRA.get(preset, []))
    assert "???" not in OmegaConf.to_yaml(OmegaConf.structured(config))


def test_the_quickstart_is_the_embedded_default_under_another_name(make_config: MakeConfig) -> None:
    quickstart, default = make_config("experiment=quickstart"), make_config()
    assert quickstart == default  # the fixture names both


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("head.layers.0.out_features=0", r"^head\.layers\[0\]\.out_features=0 must be positive$"),
        ("head.layers.0.out_features=-3", r"^head\.layers\[0\]\.out_features=-3 must be positive$"),
        ("head.layers.0.out_features=null", r"^head\.layers\[0\] has no width: set its out_features"),
        ("head.layers=[]", r"^head\.layers=\[\] with head\.keep=none leaves no layer"),
        ("backbone.query_length=0", r"^backbone\.query_length=0 must be positive$"),
        ("backbone.dropout=1", r"^backbone\.dropout=1\.0 must be at least 0 and below 1$"),
        ("backbone.sha256=abc", r"^backbone\.sha256=abc must be 64 lower-case hexadecimal digits$"),
        ("data.evaluation_fraction=1", r"^data\.evaluation_fraction=1\.0 must be at least 0 and below 1$"),
        ("data.path=x.jsonl", r"^data\.path=x\.jsonl has no effect on data=python_functions"),
        ("data=pairs", r"^data\.path=null: data=pairs needs it, as in data\.path=mine\.jsonl, a folder or owner/name$"),
        ("output_dir=", r"^output_dir= is empty: name the folder"),
        ("seed=-1", r"^seed=-1 must lie between 0 and 4294967295$"),
        ("optimizer.learning_rate=nan", r"^optimizer\.learning_rate=nan must be positive$"),
        ("optimizer.weight_decay=-1", r"^optimizer\.weight_decay=-1\.0 must be 0 or more, and finite$"),
        ("optimizer.weight_decay=nan", r"^optimizer\.weight_decay=nan must be 0 or more, and finite$"),
        ("optimizer.betas=[0.9]", r"^optimizer\.betas=\[0\.9\] must be two numbers"),
        ("optimizer.warmup_fraction=2", r"^optimizer\.warmup_fraction=2\.0 must lie between 0 and 1$"),
        ("trainer.epochs=1", r"^trainer\.steps=110 and trainer\.epochs=1\.0: exactly one must be set"),
        ("trainer.steps=null", r"^trainer\.steps=None and trainer\.epochs=None: exactly one must be set"),
        ("trainer.accumulation_steps=5", r"^trainer\.accumulation_steps=5 must divide trainer\.batch_size=32$"),
        ("trainer.batch_size=1", r"^trainer\.batch_size=1 in trainer\.accumulation_steps=1 leaves one query"),
        ("trainer.cache_tokens=0", r"^trainer\.cache_tokens=0 must be positive$"),
        ("trainer.save_every_steps=0", r"^trainer\.save_every_steps=0 must be positive$"),
        ("trainer.save_every_steps=-5", r"^trainer\.save_every_steps=-5 must be positive$"),
        ("trainer.keep_checkpoints=0", r"^trainer\.keep_checkpoints=0 must be positive$"),
        ("evaluation.every_steps=0", r"^evaluation\.every_steps=0 must be positive$"),
        ("head.layers=[{out_features: 64}]", r"^head\.layers\[0\]\.bias has no value"),
    ],
)
def test_a_bad_value_is_named_with_its_rule(override: str, message: str, merge_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match=message):
        merge_config("head=linear", override)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+head.kept=1", r"^head\.kept is no key; the nearest is head\.keep"),
        ("+optimiser=1", r"^optimiser is no key; the nearest is optimizer"),
    ],
)
def test_a_key_that_is_added_names_the_nearest(override: str, message: str, make_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config("head=linear", override)


LAYERS_TO_KEEP = "must be all, none or the number of layers to keep, the first so many"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        *((f"head.keep={keep}", f"head.keep={keep} {LAYERS_TO_KEEP}") for keep in ("some", "-1", "1.5", "All", "")),
        *((f"head.embedding_size={size}", f"head.embedding_size={size} must be positive") for size in (0, -128)),
        *((f"head.seed={seed}", f"head.seed={seed} must lie between 0 and 4294967295") for seed in (-1, 2**32)),
        ("head.layers.0.in_features=0", "head.layers[0].in_features=0 must be positive"),
        ("head.layers.0.factor=0", "head.layers[0].factor=0.0 must be positive"),
        *(
            (f"head.layers.0.dropout={share}", f"head.layers[0].dropout={share} must be at least 0 and below 1")
            for share in (1.0, -0.5, math.nan)
        ),
    ],
)
def test_a_bad_head_is_named_with_its_rule(override: str, message: str, merge_config: MakeConfig) -> None:
    with pytest.raises(ConfigError) as caught:
        merge_config("head=linear", override)
    assert str(caught.value) == message


ACTIVATIONS = "identity, relu, leaky_relu, gelu, silu, mish, tanh, sigmoid"


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        # Nothing that the saved head would hold: its arguments are not saved, its class is not the loaders'.
        ("activation", "leaky_relu(0.3)", f"must be one of {ACTIVATIONS}"),
        ("activation", "softmax", f"must be one of {ACTIVATIONS}"),
        ("activation", "GELU", f"must be one of {ACTIVATIONS}"),
        ("norm", "batch_norm", "must be one of none, layer_norm, rms_norm"),
        ("norm", "LayerNorm", "must be one of none, layer_norm, rms_norm"),
    ],
)
def test_an_activation_or_norm_outside_the_table_is_named_with_its_list(
    key: str, value: str, rule: str, merge_config: MakeConfig
) -> None:
    values = as_dict(merge_config("head=mlp"))
    values["head"]["layers"][1][key] = value
    with pytest.raises(ConfigError) as caught:
        parse_config(OmegaConf.create(values))
    assert str(caught.value) == f"head.layers[].{key}={value} {rule}"


@pytest.mark.parametrize("keep", ["none", "0"])
def test_a_head_of_nothing_is_refused_and_a_width_alone_is_a_head(keep: str, merge_config: MakeConfig) -> None:
    nothing = ["head=default", f"head.keep={keep}"]
    message = (
        f"head.layers=[] with head.keep={keep} leaves no layer: add one, set head.embedding_size, or set head.keep=all"
    )
    with pytest.raises(ConfigError) as caught:
        merge_config(*nothing)
    assert str(caught.value) == message
    assert merge_config(*nothing, "head.embedding_size=64").head.embedding_size == 64


def test_a_number_of_layers_to_keep_is_a_text(merge_config: MakeConfig) -> None:
    assert merge_config("head.keep=2").head.keep == "2"


def test_a_layer_leaves_out_what_few_layers_have(merge_config: MakeConfig) -> None:
    (layer,) = merge_config(
        "head.layers=[{out_features: 8, bias: false, activation: relu, residual: true}]"
    ).head.layers
    assert (layer.in_features, layer.factor, layer.norm, layer.gated, layer.dropout) == (
        None,
        None,
        Norm.none,
        False,
        0,
    )


def test_every_key_of_a_layer_arrives(merge_config: MakeConfig) -> None:
    spec = "in_features: 4, out_features: 8, bias: true, activation: leaky_relu, residual: true"
    (layer,) = merge_config(f"head.layers=[{{{spec}, norm: rms_norm, gated: true, dropout: 0.25}}]").head.layers
    assert layer == HeadLayer(
        bias=True,
        activation=Activation.leaky_relu,
        residual=True,
        out_features=8,
        in_features=4,
        norm=Norm.rms_norm,
        gated=True,
        dropout=0.25,
    )


ASK_A_TEACHER = "use data=scored, distillation_ids or stanford, or set it to 0"
NEEDED = "needs it, as in data.path=mine.jsonl, a folder or owner/name"
LEARNT = "loss.contrastive.learn_temperature=true"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["loss.terms.contrastive=-0.5"], "loss.terms.contrastive=-0.5 must be 0 or more, and finite"),
        (["loss.terms.distillation=nan"], "loss.terms.distillation=nan must be 0 or more, and finite"),
        (["loss.terms.margin_mse=inf"], "loss.terms.margin_mse=inf must be 0 or more, and finite"),
        (
            ["loss.terms.contrastive=0"],
            "loss.terms are all 0: give one a weight, as in loss.terms.contrastive=1",
        ),
        (["loss.contrastive.temperature=0"], "loss.contrastive.temperature=0.0 must be positive"),
        (["loss.contrastive.max_negative_ratio=0"], "loss.contrastive.max_negative_ratio=0.0 must be positive"),
        (["loss.distillation.student_temperature=-1"], "loss.distillation.student_temperature=-1.0 must be positive"),
        (["loss.distillation.teacher_temperature=0"], "loss.distillation.teacher_temperature=0.0 must be positive"),
        (["loss.margin_mse.teacher_temperature=nan"], "loss.margin_mse.teacher_temperature=nan must be positive"),
        *(
            (
                [LEARNT, f"loss.contrastive.temperature_bounds={bounds}"],
                f"loss.contrastive.temperature_bounds={bounds} must be two rising numbers above 0",
            )
            for bounds in ([0.1], [0.1, 1.0, 2.0], [0.0, 1.0], [-1.0, 1.0], [1.0, 1.0], [2.0, 0.5], [0.1, math.inf])
        ),
        *(
            (
                [LEARNT, f"loss.contrastive.temperature={temperature}"],
                f"loss.contrastive.temperature={temperature} lies outside "
                "loss.contrastive.temperature_bounds=[0.01, 10.0]: start within them",
            )
            for temperature in (0.005, 10.5)
        ),
        (
            ["loss.matryoshka={widths: [128, 0], weights: [1, 1]}"],
            "loss.matryoshka.widths[1]=0 must be positive",
        ),
        *(
            (
                [f"loss.matryoshka={{widths: {widths}, weights: [1, 1, 1]}}"],
                f"loss.matryoshka.widths={widths} must descend, from the model's own width to the narrowest",
            )
            for widths in ([32, 64, 128], [128, 64, 64], [128, 32, 64])
        ),
        (
            ["loss.matryoshka={widths: [128], weights: [1]}"],
            "loss.matryoshka.widths=[128] must be two or more, or [] for the model's own alone",
        ),
        *(
            (
                [f"loss.matryoshka={{widths: {widths}, weights: {weights}}}"],
                f"loss.matryoshka.weights={weights} must be as many as loss.matryoshka.widths={widths}",
            )
            for widths, weights in (([128, 64], [1.0]), ([128, 64], []), ([], [1.0]))
        ),
        (
            ["loss.matryoshka={widths: [128, 64], weights: [1, 0]}"],
            "loss.matryoshka.weights[1]=0.0 must be positive",
        ),
        (
            ["loss=distillation"],
            f"loss.terms.distillation=1 needs teacher scores, and data=python_functions has none: {ASK_A_TEACHER}",
        ),
        (
            ["loss.terms.margin_mse=0.25", *PAIRS],
            f"loss.terms.margin_mse=0.25 needs teacher scores, and data=pairs has none: {ASK_A_TEACHER}",
        ),
        (
            ["loss=distillation", "loss.terms.margin_mse=1", *PAIRS],
            f"loss.terms.distillation=1 needs teacher scores, and data=pairs has none: {ASK_A_TEACHER}",
        ),
        *(
            (
                ["loss=distillation", *DISTILLATION, f"data.documents_per_query={count}"],
                f"data.documents_per_query={count} leaves loss.terms.distillation nothing to compare after "
                "loss.distillation.normalization=min_max: use 3 or more",
            )
            for count in (1, 2)
        ),
        (
            [
                *("loss=distillation", *DISTILLATION, "data.documents_per_query=1"),
                "loss.distillation.normalization=none",
            ],
            "data.documents_per_query=1 leaves loss.terms.distillation nothing to compare: use 2 or more",
        ),
        (
            ["loss=margin_mse", *DISTILLATION, "data.documents_per_query=1"],
            "data.documents_per_query=1 leaves loss.terms.margin_mse nothing to compare: use 2 or more",
        ),
        (["optimizer.learning_rate=0"], "optimizer.learning_rate=0.0 must be positive"),
        (["optimizer.epsilon=0"], "optimizer.epsilon=0.0 must be positive"),
        (["optimizer=muon", "optimizer.muon_learning_rate=0"], "optimizer.muon_learning_rate=0.0 must be positive"),
        *(
            (
                ["optimizer=muon", f"optimizer.muon_momentum={momentum}"],
                f"optimizer.muon_momentum={momentum} must be at least 0 and below 1",
            )
            for momentum in (1.0, -0.5, math.nan)
        ),
        *(
            (
                [f"optimizer.muon_{key}=0.5"],
                f"optimizer.muon_{key}=0.5 has no effect on optimizer=adamw: use optimizer=muon",
            )
            for key in ("learning_rate", "momentum")
        ),
        *(
            (
                ["optimizer=muon", f"optimizer.muon_{key}=null"],
                f"optimizer.muon_{key}=null is needed by optimizer=muon: set a number",
            )
            for key in ("learning_rate", "momentum")
        ),
        (
            ["optimizer.groups=[{pattern: a, learning_rate: 0}, {pattern: b, learning_rate: -1}]"],
            "optimizer.groups[1].learning_rate=-1.0 must be 0 or more, and finite",
        ),
        (
            ["optimizer.groups=[{pattern: a, learning_rate: nan}]"],
            "optimizer.groups[0].learning_rate=nan must be 0 or more, and finite",
        ),
        (
            ["optimizer.groups=[{pattern: a}]"],
            "optimizer.groups[0].learning_rate has no value: set optimizer.groups[0].learning_rate=...",
        ),
        *(
            (
                [f"data.documents_per_query={count}"],
                f"data.documents_per_query={count} must be 1 or more: a query keeps its positive",
            )
            for count in (0, -2)
        ),
        (
            ["data=distillation_ids"],
            f"data.path=null: data=distillation_ids {NEEDED}",
        ),
        (
            [*DISTILLATION, "data.negative_columns=[no]"],
            "data.negative_columns=['no'] has no effect on data=distillation_ids: set it to null",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_bad_loss_optimiser_or_set_is_named_with_its_rule(
    overrides: list[str], message: str, merge_config: MakeConfig
) -> None:
    with pytest.raises(ConfigError) as caught:
        merge_config(*overrides)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "overrides",
    [
        # Read where the temperature is learnt.
        ["loss.contrastive.temperature=20", "loss.contrastive.temperature_bounds=[]"],
        [LEARNT, "loss.contrastive.temperature=10"],
        [LEARNT, "loss.contrastive.temperature=0.01"],
        ["loss.matryoshka={widths: [128, 127], weights: [2, 1e-9]}"],
        ["loss=distillation", "loss.terms.margin_mse=1", *DISTILLATION],
        ["loss=distillation", *DISTILLATION, "data.documents_per_query=3"],
        ["loss=margin_mse", *DISTILLATION, "data.documents_per_query=2"],
        ["loss=contrastive", *DISTILLATION, "data.documents_per_query=1"],
        [*DISTILLATION, "data.evaluation_path=other", "data.evaluation_split=test"],
        ["optimizer=muon", "optimizer.muon_momentum=0"],
        ["optimizer.groups=[{pattern: head.*, learning_rate: 0}]"],
        ["data.documents_per_query=1"],
    ],
    ids=" ".join,
)
def test_a_value_at_the_edge_of_its_rule_is_taken(overrides: list[str], merge_config: MakeConfig) -> None:
    merge_config(*overrides)


# One set of examples

SCORED = ("data=scored", "data.path=mine.jsonl")
BEIR = ("data=beir", "data.path=scifact")
STANFORD = ("data=stanford", "data.path=triples.tsv", "data.queries_path=queries.tsv", "data.documents_path=docs.tsv")
TAUGHT = "distillation_ids, scored, stanford"
DRAWS = "data.draw=stratified draws some of the documents that a teacher scored: set data.documents_per_query, and use "


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        *(
            ([*PAIRS, f"data.max_empty={share}"], f"data.max_empty={share} must lie between 0 and 1")
            for share in (-0.1, 1.5)
        ),
        *(
            (
                [*PAIRS, f"data.evaluation_fraction={share}"],
                f"data.evaluation_fraction={share} must be at least 0 and below 1",
            )
            for share in (1.0, -0.5)
        ),
        *(
            ([*PAIRS, f"data.{side}_length=0"], f"data.{side}_length=0 must be positive")
            for side in ("query", "document")
        ),
        ([*BEIR, "data.positive_grade=0"], "data.positive_grade=0 must be positive"),
        (
            [*PAIRS, "data.documents_per_query=0"],
            "data.documents_per_query=0 must be 1 or more: a query keeps its positive",
        ),
        # What another format reads.
        (
            [*PAIRS, "data.scores_column=scores"],
            "data.scores_column=scores has no effect on data=pairs: set it to null",
        ),
        ([*PAIRS, "data.positive=best"], "data.positive=best has no effect on data=pairs: set it to null"),
        ([*SCORED, "data.positive_column=a"], "data.positive_column=a has no effect on data=scored: set it to null"),
        ([*BEIR, "data.revision=main"], "data.revision=main has no effect on data=beir: set it to null"),
        ([*BEIR, "data.evaluation_path=a"], "data.evaluation_path=a has no effect on data=beir: set it to null"),
        ([*STANFORD, "data.split=train"], "data.split=train has no effect on data=stanford: set it to null"),
        (
            ["data=python_functions", "data.path=mine.jsonl"],
            "data.path=mine.jsonl has no effect on data=python_functions: use data=pairs for files of your own",
        ),
        # What the format must have.
        (["data=scored"], "data.path=null: data=scored needs it, as in data.path=mine.jsonl, a folder or owner/name"),
        ([*PAIRS, "data.query_column=null"], "data.query_column=null: data=pairs needs it"),
        ([*SCORED, "data.scores_column=null"], "data.scores_column=null: data=scored needs it"),
        ([*SCORED, "data.positive=null"], "data.positive=null: data=scored needs it"),
        ([*BEIR, "data.negatives=null"], "data.negatives=null: data=beir needs it"),
        (
            [*STANFORD, "data.queries_path=null"],
            "data.queries_path=null: data=stanford needs it, as in data.queries_path=queries.tsv",
        ),
        (
            [*STANFORD, "data.documents_path=null"],
            "data.documents_path=null: data=stanford needs it, as in data.documents_path=collection.tsv",
        ),
        (
            [*BEIR, "data.split=null"],
            "data.split=null: data=beir reads qrels/<split>.tsv: name it, as in data.split=train",
        ),
        *(
            (
                [*BEIR, *given],
                f"data.run_path={path} and data.negatives={negatives}: a ranking is read where both are set: name the "
                "file, and set data.negatives=run",
            )
            for given, path, negatives in (
                (["data.negatives=run"], None, "run"),
                (["data.run_path=bm25.trec"], "bm25.trec", "none"),
                (["data.run_path=bm25.trec", "data.negatives=judged"], "bm25.trec", "judged"),
            )
        ),
        *(
            ([*given, "data.draw=stratified"], f"{DRAWS}one of data={TAUGHT}; or set it to uniform")
            for given in (
                [*PAIRS, "data.documents_per_query=4"],
                [*BEIR, "data.documents_per_query=4"],
                [*SCORED, "data.documents_per_query=null"],
            )
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_bad_set_is_named_with_its_rule(arguments: list[str], message: str, merge_config: MakeConfig) -> None:
    with pytest.raises(ConfigError) as caught:
        merge_config(*arguments)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "arguments",
    [
        [*PAIRS, "data.max_empty=0", "data.evaluation_fraction=0", "data.query_length=1"],
        [*PAIRS, "data.max_empty=1", "data.split=null", "data.revision=main", "data.subset=a"],
        [*SCORED, "data.draw=stratified", "data.documents_per_query=2"],
        [*STANFORD, "data.draw=stratified", "data.documents_per_query=2"],
        [*BEIR, "data.negatives=run", "data.run_path=bm25.trec"],
        [*BEIR, "data.evaluation_split=test", "data.negatives=judged"],
        ["data=python_functions", "data.documents_per_query=1", "data.document_prefix=''"],
        [*PAIRS, "data.length_window=1"],
    ],
    ids=" ".join,
)
def test_a_set_at_the_edge_of_its_rules_is_taken(arguments: list[str], merge_config: MakeConfig) -> None:
    merge_config(*arguments)


# What arrives


def test_the_values_of_accepted_keys_arrive(make_config: MakeConfig) -> None:
    config = make_config("head=mlp_residual", "head.layers.0.out_features=512", "optimizer.learning_rate=3e-5")
    assert config.head.layers[0].out_features == 512
    assert config.head.layers[0].activation is Activation.gelu
    assert config.optimizer.learning_rate == 3e-5


def test_punctuation_is_skipped_in_prose_and_scored_in_source_code(make_config: MakeConfig) -> None:
    assert make_config().backbone.skiplist == []
    assert make_config("data=pairs", "data.path=mine.jsonl").backbone.skiplist is None


def test_a_checkpoint_keeps_its_own_skiplist_on_source_code_too(make_config: MakeConfig) -> None:
    assert make_config("backbone=checkpoint").backbone.skiplist is None


def test_everything_that_a_checkpoint_says_may_be_left_to_it(merge_config: MakeConfig) -> None:
    lengths = ["backbone.query_length=null", "backbone.document_length=null"]
    backbone = merge_config("backbone=checkpoint", "data=pairs", "data.path=mine.jsonl", *lengths).backbone
    assert {key for key, value in vars(backbone).items() if value is None} == {
        *("revision", "sha256", "dropout", "query_length", "document_length", "query_prefix", "document_prefix"),
        *("expansion", "attend_to_expansion", "skiplist", "skiplist_sides"),
    }
    assert (backbone.trust_remote_code, backbone.allow_pickle) == (False, False)


def test_the_data_root_comes_from_the_environment(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LATEFORGE_DATA", raising=False)
    assert make_config().data.root == "data"
    monkeypatch.setenv("LATEFORGE_DATA", "elsewhere")
    assert make_config().data.root == "elsewhere"


def test_a_saved_config_is_read_back_equal(make_config: MakeConfig, tmp_path: Path) -> None:
    groups = "optimizer.groups=[{pattern: 'backbone.*.[0-3].*', learning_rate: 0}, {pattern: '*', learning_rate: 1e-7}]"
    config = make_config("head=deep", "evaluation.metric=mrr@10", "backbone.skiplist=null", groups)
    save_config(config, str(tmp_path / "config.yaml"))
    loaded = OmegaConf.load(tmp_path / "config.yaml")
    assert OmegaConf.is_dict(loaded)
    assert parse_config(loaded) == config  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["head=deep", "evaluation.metric=mrr@10", "backbone.skiplist=null", "backbone.expansion=min"],
        ["data=pairs", "data.path=a.jsonl", "data.negative_columns=[no, never]", "backbone.skiplist=['#', ': ', 'no']"],
        ["trainer.steps=null", "trainer.epochs=0.1", "optimizer.epsilon=1e-12", "optimizer.learning_rate=1e-30"],
        ["loss=distillation_contrastive", *DISTILLATION, "loss.matryoshka={widths: [128, 8], weights: [1, 0.5]}"],
        ["optimizer=muon", "optimizer.groups=[{pattern: 'backbone.*.[0-3].*', learning_rate: 1e-7}]"],
        ["tracker=wandb", "tracker.id='0123'", "name='a: b, {c}'", "sweep.launch='accelerate launch'"],
    ],
)
def test_a_config_as_a_dictionary_is_read_back_equal(overrides: list[str], merge_config: MakeConfig) -> None:
    config = merge_config(*overrides)
    values = as_dict(config)
    assert parse_config(OmegaConf.create(values)) == config
    assert parse_config(OmegaConf.create(json.loads(json.dumps(values)))) == config


def test_a_dictionary_has_the_names_that_the_command_line_takes(make_config: MakeConfig) -> None:
    values = as_dict(make_config("head=mlp", "trainer.precision=bf16", "evaluation.metric=recall@100"))
    assert values["trainer"]["precision"] == "bf16"
    assert values["evaluation"]["metric"] == "recall@100"
    assert values["head"]["layers"][0]["activation"] == "gelu"


# What differs


def test_equal_configs_differ_in_nothing(make_config: MakeConfig) -> None:
    assert changed_keys(make_config("head=mlp"), make_config("head=mlp")) == {}


def test_every_key_that_differs_is_named_with_both_values(make_config: MakeConfig) -> None:
    old = make_config("data=pairs", "data.path=a.jsonl")
    new = make_config(
        *("data=pairs", "data.path=b.jsonl", "trainer.steps=null", "trainer.epochs=2", "trainer.precision=bf16"),
        *("tracker=wandb", "tracker.group=heads", "overwrite=true", "backbone.expansion=none"),
    )
    assert changed_keys(old, new) == {
        "overwrite": (False, True),
        "backbone.expansion": (None, "none"),
        "data.path": ("a.jsonl", "b.jsonl"),
        "trainer.steps": (110, None),
        "trainer.epochs": (None, 2.0),
        "trainer.precision": ("float32", "bf16"),
        "tracker.name": ("none", "wandb"),
        "tracker.group": (None, "heads"),
    }


def test_a_list_differs_as_a_whole(make_config: MakeConfig) -> None:
    old, new = make_config("head=linear"), make_config("head=linear", "head.layers.0.bias=true")
    layer = {"bias": False, "activation": "identity", "residual": False, "out_features": 128, "factor": None}
    layer |= {"in_features": None, "norm": "none", "gated": False, "dropout": 0.0}
    assert changed_keys(old, new) == {"head.layers": ([layer], [layer | {"bias": True}])}
    assert changed_keys(make_config(), make_config("optimizer.betas=[0.9,0.98]")) == {
        "optimizer.betas": ([0.9, 0.999], [0.9, 0.98])
    }


# Keys


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("trainer.stepz", "trainer.steps"),
        ("head.layers[0].activations", "head.layers.0.activation"),
        ("learning_rate", "optimizer.learning_rate"),
        ("hed", "head"),
        ("loss.temperature", "loss.contrastive.temperature"),
        ("optimizer.groups[1].patern", "optimizer.groups.0.pattern"),
    ],
)
def test_an_unknown_key_names_the_nearest(key: str, nearest: str) -> None:
    assert unknown_key(key) == f"{key} is no key; the nearest is {nearest} (README.md lists all)"


def test_known_keys_reach_into_groups_and_lists() -> None:
    keys = set(known_keys())
    assert {"seed", "backbone.name", "head.layers", "head.layers.0.out_features", "trainer.maxsim"} <= keys
    assert {"loss.terms.margin_mse", "optimizer.groups", "optimizer.groups.0.pattern"} <= keys
