"""Every rule of the config by its exact key, and every preset by composing it."""

import json
import string
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from configs.schema import (
    Activation,
    Config,
    ConfigError,
    as_dict,
    changed_keys,
    known_keys,
    parse_config,
    save_config,
    unknown_key,
)
from tests.conftest import ROOT

MakeConfig = Callable[..., Config]
PRESETS = sorted(
    f"{path.parent.name}={path.stem}"
    for path in (ROOT / "configs").glob("*/*.yaml")
    if path.parent.name not in ("experiment", "accelerate")
)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_composes_and_states_every_value(preset: str, make_config: MakeConfig) -> None:
    extra = ["data.path=mine.jsonl"] if preset == "data=pairs" else []
    config = make_config(preset, *extra)
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
        ("backbone.query_length=null", r"^backbone\.query_length=null: expansion=fixed fills queries"),
        ("backbone.attention=flash_attention_2", r"^backbone\.attention=flash_attention_2 cannot keep unattended"),
        ("backbone.dropout=1", r"^backbone\.dropout=1\.0 must be at least 0 and below 1$"),
        ("backbone.sha256=abc", r"^backbone\.sha256=abc must be 64 lower-case hexadecimal digits$"),
        ("data.evaluation_fraction=1", r"^data\.evaluation_fraction=1\.0 must be at least 0 and below 1$"),
        ("data.path=x.jsonl", r"^data\.path=x\.jsonl has no effect on data=python_functions"),
        ("data=pairs", r"^data\.path=null: data=pairs needs a file"),
        ("output_dir=", r"^output_dir= is empty: name the folder"),
        ("seed=-1", r"^seed=-1 must lie between 0 and 4294967295$"),
        ("loss.temperature=0", r"^loss\.temperature=0\.0 must be positive$"),
        ("optimizer.learning_rate=nan", r"^optimizer\.learning_rate=nan must be positive$"),
        ("optimizer.weight_decay=-1", r"^optimizer\.weight_decay=-1\.0 must be 0 or more, and finite$"),
        ("optimizer.weight_decay=nan", r"^optimizer\.weight_decay=nan must be 0 or more, and finite$"),
        ("optimizer.betas=[0.9]", r"^optimizer\.betas=\[0\.9\] must be two numbers"),
        ("optimizer.warmup_fraction=2", r"^optimizer\.warmup_fraction=2\.0 must lie between 0 and 1$"),
        ("trainer.epochs=1", r"^trainer\.steps=110 and trainer\.epochs=1\.0: exactly one must be set"),
        ("trainer.steps=null", r"^trainer\.steps=None and trainer\.epochs=None: exactly one must be set"),
        ("trainer.accumulation_steps=5", r"^trainer\.accumulation_steps=5 must divide trainer\.batch_size=32$"),
        ("trainer.batch_size=1", r"^trainer\.batch_size=1 in trainer\.accumulation_steps=1 leaves one query"),
        ("trainer.save_every_steps=0", r"^trainer\.save_every_steps=0 must be positive$"),
        ("trainer.save_every_steps=-5", r"^trainer\.save_every_steps=-5 must be positive$"),
        ("trainer.keep_checkpoints=0", r"^trainer\.keep_checkpoints=0 must be positive$"),
        ("evaluation.every_steps=0", r"^evaluation\.every_steps=0 must be positive$"),
        ("+head.foo=1", r"^head\.foo is no key; the nearest is head\.keep"),
        ("+optimiser=1", r"^optimiser is no key; the nearest is optimizer"),
        ("head.layers=[{out_features: 64}]", r"^head\.layers\[0\]\.bias has no value"),
    ],
)
def test_a_bad_value_is_named_with_its_rule(override: str, message: str, make_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config("head=linear", override)


def test_the_values_of_accepted_keys_arrive(make_config: MakeConfig) -> None:
    config = make_config("head=mlp_residual", "head.layers.0.out_features=512", "optimizer.learning_rate=3e-5")
    assert config.head.layers[0].out_features == 512
    assert config.head.layers[0].activation is Activation.gelu
    assert config.optimizer.learning_rate == 3e-5


def test_punctuation_is_skipped_in_prose_and_scored_in_source_code(make_config: MakeConfig) -> None:
    assert make_config().backbone.skiplist == []
    prose = make_config("data=pairs", "data.path=mine.jsonl").backbone
    assert prose.skiplist is not None
    assert set(prose.skiplist) == set(string.punctuation)
    assert [side.name for side in prose.skiplist_sides] == ["document"]


def test_a_checkpoint_keeps_its_own_skiplist_on_source_code_too(make_config: MakeConfig) -> None:
    assert make_config("backbone=checkpoint").backbone.skiplist is None


def test_the_data_root_comes_from_the_environment(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LATEFORGE_DATA", raising=False)
    assert make_config().data.root == "data"
    monkeypatch.setenv("LATEFORGE_DATA", "elsewhere")
    assert make_config().data.root == "elsewhere"


def test_a_saved_config_is_read_back_equal(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config("head=deep", "evaluation.metric=mrr@10", "backbone.skiplist=null")
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
        ["tracker=wandb", "tracker.id='0123'", "name='a: b, {c}'", "sweep.launch='accelerate launch'"],
    ],
)
def test_a_config_as_a_dictionary_is_read_back_equal(overrides: list[str], make_config: MakeConfig) -> None:
    config = make_config(*overrides)
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
        *("tracker=wandb", "tracker.group=heads", "overwrite=true", "backbone.expansion=null"),
    )
    assert changed_keys(old, new) == {
        "overwrite": (False, True),
        "backbone.expansion": ("fixed", None),
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
    ],
)
def test_an_unknown_key_names_the_nearest(key: str, nearest: str) -> None:
    assert unknown_key(key) == f"{key} is no key; the nearest is {nearest} (README.md lists all)"


def test_known_keys_reach_into_lists_of_layers() -> None:
    keys = set(known_keys())
    assert {"seed", "backbone.name", "head.layers", "head.layers.0.out_features", "trainer.maxsim"} <= keys
