"""Mixes of sets: every rule by its exact message, and what becomes of the keys of a set."""

from collections.abc import Callable
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

import train
from configs.mix import with_sets
from configs.schema import (
    Config,
    ConfigError,
    DataFormat,
    Draw,
    MixedBatch,
    SetConfig,
    as_dict,
    parse_config,
    save_config,
)
from tests.conftest import ROOT, tiny_overrides

MIX = "data.mix={medquad: 2, lfrqa: 1}"
Make = Callable[..., Config]


@cache
def members(name: str, *overrides: str) -> DictConfig:
    return compose(name, list(overrides))


@pytest.fixture
def make(tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Compose a config from arguments as they are typed, sets included."""

    # Each member is composed once.
    monkeypatch.setattr("configs.mix.compose", lambda name, overrides: deepcopy(members(name, *overrides)))

    def config(*arguments: str) -> Config:
        ConfigStore.instance().store("schema", Config)
        with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
            composed = compose("train", train.own_settings([*tiny_overrides(tiny_bert, tmp_path), *arguments]))
            return parse_config(with_sets(composed))

    return config


def refused(make: Make, *arguments: str) -> str:
    with pytest.raises(ConfigError) as caught:
        make(*arguments)
    return str(caught.value)


TAUGHT = "distillation_ids, scored, stanford"
PAIRS = ("data=pairs", "data.path=mine.jsonl")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["data=mix"],
            "data.mix={}: data=mix needs the weights of its sets, as in data.mix={medquad: 2, lfrqa: 1}",
        ),
        (
            [MIX, *PAIRS],
            "data.mix={'medquad': 2.0, 'lfrqa': 1.0} has no effect on data=pairs: use data=mix",
        ),
        *(
            ([f"data.mix={{medquad: 2, lfrqa: {weight}}}"], f"data.mix.lfrqa={weight} must be positive")
            for weight in (0.0, -1.0, "nan")
        ),
        ([MIX, "data.length_window=0"], "data.length_window=0 must be positive"),
        *(
            (
                [MIX, f"data.mix_by_size={power}"],
                f"data.mix_by_size={power} must lie between 0, the weights alone, and 1, the sizes",
            )
            for power in (-0.5, 1.5)
        ),
        (
            [MIX, "data.mix_batches=all_sets", "data.length_window=4"],
            "data.length_window=4 sorts batches of one set, and data.mix_batches=all_sets makes none: set one of them "
            "otherwise",
        ),
        # Keys of its sets at its own place, and of a set at the set's.
        (
            [MIX, "data.documents_per_query=4"],
            "data.documents_per_query=4 has no effect on data=mix: set data.sets.<set>.documents_per_query",
        ),
        ([MIX, "data.path=a"], "data.path=a has no effect on data=mix: set data.sets.<set>.path"),
        ([MIX, "data.sets.lfrqa.max_empty=2"], "data.sets.lfrqa.max_empty=2.0 must lie between 0 and 1"),
        ([MIX, "data.sets.lfrqa.document_length=0"], "data.sets.lfrqa.document_length=0 must be positive"),
        ([MIX, "data.sets.lfrqa.query_column=null"], "data.sets.lfrqa.query_column=null: data=pairs needs it"),
        (
            [MIX, "data.sets.medquad.positive_grade=1"],
            "data.sets.medquad.positive_grade=1 has no effect on data=pairs: set it to null",
        ),
        (
            [MIX, "data.sets.medquad.draw=stratified"],
            "data.sets.medquad.draw=stratified draws some of the documents that a teacher scored: set "
            f"data.sets.medquad.documents_per_query, and use one of data={TAUGHT}; or set it to uniform",
        ),
        (
            [MIX, "data.sets.medquad.document_length=long"],
            "data.sets.medquad.document_length=long must be of type integer",
        ),
        (
            [MIX, "data.sets.medquad.draw=best"],
            "data.sets.medquad.draw=best must be one of uniform, stratified",
        ),
        # Sets that are none.
        (
            ["data.mix={medquad: 1, medquat: 1}"],
            "data.mix.medquat: medquat is no member of data: `python train.py --help` lists them; "
            "data.sets.medquat.member=pairs makes medquat a set of that format",
        ),
        (
            ["data.mix={mine: 1}", "data.sets.mine.member=pears"],
            "data.sets.mine.member: pears is no member of data: `python train.py --help` lists them; "
            "data.sets.mine.member=pairs makes mine a set of that format",
        ),
        (["data.mix={medquad: 1, mix: 1}"], "data.mix.mix is a mix itself: name the sets that it is made of"),
        (
            ["data.sets.lfrqa.document_length=9", *PAIRS],
            "data.sets has lfrqa and data.mix : name the same",
        ),
        (
            ["data.mix={medquad: 1}", "data.sets.lfrqa.document_length=9"],
            "data.sets has lfrqa and data.mix medquad: name the same",
        ),
        # What the loss asks of each.
        (
            ["data.mix={msmarco_bge_gemma: 1, medquad: 1}", "loss=distillation"],
            "loss.terms.distillation=1 needs teacher scores, and data.sets.medquad is pairs: use data=scored, "
            "distillation_ids or stanford, or set it to 0",
        ),
        (
            [
                "data.mix={msmarco_bge_gemma: 1}",
                "loss=distillation",
                "data.sets.msmarco_bge_gemma.documents_per_query=2",
            ],
            "data.sets.msmarco_bge_gemma.documents_per_query=2 leaves loss.terms.distillation nothing to compare after "
            "loss.distillation.normalization=min_max: use 3 or more",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_bad_mix_is_named_with_its_rule(arguments: list[str], message: str, make: Make) -> None:
    assert refused(make, *arguments) == message


def test_an_unknown_key_of_a_set_names_the_nearest(make: Make) -> None:
    message = refused(make, MIX, "data.sets.medquad.documents_length=64")
    assert message.startswith("data.sets.medquad.documents_length is no key; the nearest is ")
    assert "document_length" in message


@pytest.mark.parametrize(
    "arguments",
    [
        [MIX, "data.length_window=8"],
        [MIX, "data.length_window=1", "data.mix_by_size=0"],
        [MIX, "data.mix_batches=all_sets", "data.mix_by_size=1"],
        ["data.mix={medquad: 0.001}"],
    ],
    ids=" ".join,
)
def test_a_mix_at_the_edge_of_its_rules_is_taken(arguments: list[str], make: Make) -> None:
    make(*arguments)


def test_each_set_is_what_its_member_says_and_what_was_said_otherwise(make: Make) -> None:
    config = make(MIX, "data.root=here", "data.sets.lfrqa.document_length=64", "data.sets.lfrqa.evaluation_fraction=0")
    medquad, lfrqa = (make(f"data={name}", "data.root=here").data for name in ("medquad", "lfrqa"))
    assert (config.data.format, config.data.mix) == (DataFormat.mix, {"medquad": 2.0, "lfrqa": 1.0})
    assert config.data.sets == {
        "medquad": as_set(medquad),
        "lfrqa": as_set(lfrqa, document_length=64, evaluation_fraction=0.0),
    }
    assert all(type(each) is SetConfig for each in config.data.sets.values())
    assert config.data.sets["medquad"].draw is Draw.uniform
    assert (config.data.mix_batches, config.data.mix_by_size) == (MixedBatch.one_set, 0.0)


def as_set(data: SetConfig, **changes: Any) -> SetConfig:
    values = {key: value for key, value in vars(data).items() if key in SetConfig.__dataclass_fields__}
    return SetConfig(**values | changes)


def test_a_member_without_a_path_takes_it_from_its_set(make: Make) -> None:
    config = make("data.mix={pairs: 1, lfrqa: 3}", "data.sets.pairs.path=mine.jsonl")
    assert config.data.sets["pairs"].path == "mine.jsonl"
    assert refused(make, "data.mix={pairs: 1, lfrqa: 3}").startswith("data.sets.pairs.path=null: data=pairs needs it")


def test_sets_of_one_member_have_names_of_their_own(make: Make) -> None:
    config = make(
        "data.mix={first: 1, second: 3}",
        *(f"data.sets.{name}.{key}" for name in ("first", "second") for key in ("member=pairs", f"path={name}.jsonl")),
        "data.sets.second.document_length=9",
    )
    pairs = make("data=pairs", "data.path=none").data
    assert config.data.sets == {
        "first": as_set(pairs, path="first.jsonl"),
        "second": as_set(pairs, path="second.jsonl", document_length=9),
    }


@pytest.mark.parametrize(
    "arguments",
    [
        [MIX],
        [MIX, "data.mix_batches=all_sets", "data.mix_by_size=0.5", "data.sets.lfrqa.document_prefix='a: '"],
        [
            *("data.mix={scored: 1, msmarco_bge_gemma: 2}", "data.sets.scored.path=a.jsonl", "loss=distillation"),
            "data.sets.scored.draw=stratified",
        ],
    ],
    ids=" ".join,
)
def test_a_saved_mix_is_read_back_equal(arguments: list[str], make: Make, tmp_path: Path) -> None:
    config = make(*arguments)
    save_config(config, str(tmp_path / "config.yaml"))
    loaded = OmegaConf.load(tmp_path / "config.yaml")
    assert isinstance(loaded, DictConfig)
    assert parse_config(loaded) == config
    assert parse_config(OmegaConf.create(as_dict(config))) == config
    # As a run that goes on fills it in again, which composes nothing.
    assert parse_config(with_sets(loaded)) == config


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["data.mix={a: 1}"], ["data=mix", "++data.mix={a: 1}"]),
        (["seed=2", "data.mix={a: 1}"], ["data=mix", "seed=2", "++data.mix={a: 1}"]),
        (["data=mix", "data.mix={a: 1}"], ["data=mix", "++data.mix={a: 1}"]),
        # A group that was named is not another.
        (["data=pairs", "data.mix={a: 1}"], ["data=pairs", "++data.mix={a: 1}"]),
        (["data=mix", "data.mix.a=1", "data.sets.a.path=b"], ["data=mix", "++data.mix.a=1", "++data.sets.a.path=b"]),
        (["++data.mix={a: 1}", "+data.sets.a.path=b"], ["data=mix", "++data.mix={a: 1}", "+data.sets.a.path=b"]),
        (["data.mix_by_size=1", "data.path=a"], ["data.mix_by_size=1", "data.path=a"]),
        (["-m", "data.mix={a: 1},{b: 1}"], ["-m", "data=mix", "++data.mix={a: 1},{b: 1}"]),
        (
            ["data.mix={a: 1}", "backbone.name=b"],
            ["data=mix", "backbone=checkpoint", "++data.mix={a: 1}", "backbone.name=b"],
        ),
    ],
    ids=lambda value: " ".join(value),
)
def test_a_mix_brings_its_member_and_needs_no_sign(arguments: list[str], expected: list[str]) -> None:
    assert sorted(train.own_settings(arguments)) == sorted(expected)
