"""The recipes that others published, against what they published."""

from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from configs.mix import with_sets
from configs.schema import Config, as_dict, parse_config
from tests.conftest import ROOT

EXPERIMENTS = sorted(path.stem for path in (ROOT / "configs" / "experiment").glob("*.yaml"))
# Of each recipe what its source says of it.
KL = {"loss.terms.distillation": 1.0, "loss.terms.contrastive": 0.0, "loss.distillation.normalization": "min_max"}
GEMMA = {"data.path": "lightonai/ms-marco-en-bge-gemma", "backbone.query_length": 32, **KL}
NOMIC = {"loss.terms.contrastive": 1.0, "backbone.query_length": 39, "data.mix_by_size": 1.0, "trainer.epochs": 1.0}
PUBLISHED: dict[str, dict[str, Any]] = {
    "gte_moderncolbert": {
        **GEMMA,
        "backbone.name": "Alibaba-NLP/gte-modernbert-base",
        "backbone.document_length": 300,
        "data.documents_per_query": 32,
        "optimizer.learning_rate": 3e-5,
        "optimizer.warmup_fraction": 0.0,
        "trainer.epochs": 3.0,
        "trainer.batch_size": 16,
        "trainer.precision": "bf16",
    },
    **{
        f"mxbai_edge_colbert_{size}": {
            **GEMMA,
            "backbone.name": f"jhu-clsp/ettin-encoder-{size}",
            "backbone.document_length": 220,
            "data.documents_per_query": 16,
            "trainer.batch_size": 128,
            "optimizer.name": "muon",
            "optimizer.muon_learning_rate": 1e-3,
            "optimizer.learning_rate": 8e-5,
            "head.layers.1.out_features": width,
        }
        for size, width in (("17m", 48), ("32m", 64))
    },
    "sentence_transformers_distillation": {
        **GEMMA,
        "backbone.name": "Alibaba-NLP/gte-modernbert-base",
        "data.documents_per_query": 32,
        "loss.distillation.normalization": "none",
        "loss.distillation.student_temperature": 0.25,
        "loss.distillation.teacher_temperature": 0.25,
        "optimizer.learning_rate": 3e-5,
        "optimizer.warmup_fraction": 0.05,
        "trainer.batch_size": 4,
        "trainer.steps": 20_000 // 4,
    },
    "colbertv2": {
        "backbone.name": "google-bert/bert-base-uncased",
        "backbone.document_length": 180,
        "data.documents_per_query": 64,
        "loss.terms.contrastive": 1.0,
        "loss.contrastive.own_negatives": False,
        "optimizer.learning_rate": 1e-5,
        "optimizer.warmup_fraction": 20_000 / 400_000,
        "trainer.batch_size": 32,
        "trainer.steps": 400_000,
    },
    "colbert_zero_unsupervised": {
        **NOMIC,
        "backbone.document_length": 187,
        "loss.contrastive.temperature": 0.02,
        "optimizer.learning_rate": 3e-4,
        "trainer.batch_size": 16_384,
        "data.sets.paq.split": "paq",
        "data.sets.wikipedia.query_prefix": "[Q] search_query: ",
    },
    "colbert_zero_supervised": {
        **NOMIC,
        "backbone.document_length": 519,
        "loss.contrastive.temperature": 0.2,
        "optimizer.learning_rate": 8e-6,
        "trainer.batch_size": 64,
        "data.sets.reddit_triples.negative_columns": ["negative"],
    },
    "colbert_zero_distillation": {
        **KL,
        "backbone.document_length": 519,
        "data.query_prefix": "[Q] search_query: ",
        "optimizer.learning_rate": 4e-6,
        "trainer.batch_size": 128,
    },
}


def config_of(experiment: str) -> Config:
    ConfigStore.instance().store("schema", Config)
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return parse_config(with_sets(compose("train", [f"experiment={experiment}", "name=recipe"])))


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_a_recipe_is_what_its_source_says_and_names_source_and_figure(experiment: str) -> None:
    values = OmegaConf.create(as_dict(config_of(experiment)))
    published = PUBLISHED.get(experiment, {})
    assert {key: OmegaConf.select(values, key) for key in published} == published
    if published:
        head = (ROOT / "configs" / "experiment" / f"{experiment}.yaml").read_text().splitlines()[2:4]
        assert [line.split(":")[0] for line in head] == ["# Expected", "# Source"]


def test_the_projection_study_is_six_heads_by_three_seeds() -> None:
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        composed = compose("train", ["experiment=projection_study", "name=study"], return_hydra_config=True)
    params = composed.hydra.sweeper.params
    swept = [f"{key}={value}" for key, value in params.items()]
    overrides = OverridesParser.create().parse_overrides(swept)
    heads, seeds = ([str(value) for value in override.sweep_iterator()] for override in overrides)
    assert (heads[0], len(set(heads)), seeds) == ("study/linear", 6, ["1", "2", "3"])
    assert config_of("projection_study").trainer.steps == 40
