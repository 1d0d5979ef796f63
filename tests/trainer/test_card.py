"""model_card read back as the Hub reads it: metadata, scores, how to load the model, and what made it."""

import platform
import re
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard, ModelCardData
from omegaconf import DictConfig, OmegaConf

from configs.schema import Config, parse_config
from trainer.card import model_card

MODULES = [("Transformer", "BertModel, 32 wide", 22_592), ("Dense", "32 -> 128, Identity, no bias", 4_096)]
FACTS = {
    "checkpoint": "google-bert/bert-base-uncased, a plain backbone",
    "data": "pairs, 1,000 training examples",
    "evaluation": "50 queries, 1,000 documents",
    "queries": "at most 32 tokens; prefix '[Q] '",
}
BEFORE = {"ndcg@10": 0.25, "mrr@10": 0.3, "recall@100": 0.5}
AFTER = {"ndcg@10": 0.5, "mrr@10": 0.28125, "recall@100": 0.5}
RESULT: dict[str, Any] = {
    "steps": 1200,
    "seconds": 61.6,
    "model": "outputs/run/model",
    "best": {"step": 800, "ndcg@10": 0.625, "model": "outputs/run/best"},
    "before": BEFORE,
    "after": AFTER,
    "change": {"metric": "ndcg@10", "change": 0.25, "low": -0.0125, "high": 0.5},
}
NOT_EVALUATED = RESULT | {"before": None, "after": None, "change": None, "best": None}
LOADING = {
    "sentence-transformers 6": "from sentence_transformers import MultiVectorEncoder\nmodel = MultiVectorEncoder()",
    "PyLate 1.6": "# after a command\nfrom pylate import models",
    "Stanford ColBERT 0.2": "cannot hold it: its head is no linear map",
}
COMMAND = "python train.py data=pairs data.path=pairs.jsonl 'backbone.query_prefix=[Q] '"


@pytest.fixture
def config(make_config: Callable[..., Config], composed: dict[str, Config]) -> Config:
    if not composed:
        made = make_config("data=pairs", "data.path=pairs.jsonl")
        composed["config"] = replace(made, name="a-run", backbone=replace(made.backbone, name="google-bert/bert-base"))
    return composed["config"]


@pytest.fixture(scope="session")
def composed() -> dict[str, Config]:
    """Where the config is kept, which takes longer to compose than a card."""
    return {}


def write(config: Config, **changes: Any) -> ModelCard:
    """The card, as the Hub reads it."""
    given: dict[str, Any] = {
        "modules": MODULES,
        "facts": FACTS,
        "result": RESULT,
        "loading": LOADING,
        "command": COMMAND,
    }
    text = model_card(config, **(given | changes))
    assert text.startswith("---\n")
    return ModelCard(text)


def section(card: ModelCard, title: str) -> str:
    """What stands below a heading."""
    below: str = card.text.split(f"\n## {title}\n")[1]
    return below.split("\n## ")[0].strip()


def data_of(card: ModelCard) -> ModelCardData:
    assert isinstance(card.data, ModelCardData)
    return card.data


def table(text: str) -> list[list[str]]:
    """The cells of the one table in a text, its line of dashes left out."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    rows = [[cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    assert set(rows[1]) == {"---"}
    assert {len(row) for row in rows} == {len(rows[0])}
    return [rows[0], *rows[2:]]


# Metadata


def test_the_metadata_says_what_the_hub_sorts_models_by(config: Config) -> None:
    data = write(config).data.to_dict()
    data.pop("model-index")
    assert data == {
        "library_name": "sentence-transformers",
        "pipeline_tag": "sentence-similarity",
        "tags": ["ColBERT", "late-interaction", "multi-vector", "lateforge"],
        "base_model": "google-bert/bert-base",
    }


def test_each_metric_of_the_evaluation_is_a_result_in_the_metadata(config: Config) -> None:
    data = data_of(write(config))
    assert data.model_name == "a-run"
    assert data.eval_results is not None
    found = [(one.metric_type, one.metric_value, one.dataset_name, one.dataset_type) for one in data.eval_results]
    where = "50 queries, 1,000 documents of pairs.jsonl"
    assert found == [(metric, value, where, "pairs") for metric, value in AFTER.items()]
    assert {one.task_type for one in data.eval_results} == {"retrieval"}


@pytest.mark.parametrize("name", ["package:some_module/folder", "folder"])
def test_a_backbone_that_is_no_hub_name_is_no_base_model(config: Config, tmp_path: Path, name: str) -> None:
    local = str(tmp_path) if name == "folder" else name
    card = write(replace(config, backbone=replace(config.backbone, name=local)))
    assert "base_model" not in card.data.to_dict()
    assert f"`{local}`" in card.text


@pytest.mark.parametrize("name", ["it's: a #run", "1e3", "- x", "[Q]", "naïve | café"])
def test_any_name_of_a_run_is_kept_by_the_metadata(config: Config, name: str) -> None:
    card = write(replace(config, name=name))
    assert data_of(card).model_name == name
    assert f"\n# {name}\n" in card.text


# Scores


def test_the_scores_stand_before_and_after_with_their_change(config: Config) -> None:
    scores = section(write(config), "Scores")
    assert scores.startswith("On 50 queries, 1,000 documents:\n")
    assert table(scores) == [
        ["metric", "before", "after step 1200", "change"],
        ["ndcg@10", "0.2500", "0.5000", "+0.2500"],
        ["mrr@10", "0.3000", "0.2812", "-0.0187"],
        ["recall@100", "0.5000", "0.5000", "+0.0000"],
    ]
    assert scores.endswith("Change of ndcg@10: +0.2500, 95 % interval over the queries -0.0125 to +0.5000.")


def test_the_best_model_has_the_one_score_that_chose_it(config: Config) -> None:
    card = write(config, best=True)
    results = data_of(card).eval_results
    assert results is not None
    assert [(one.metric_type, one.metric_value) for one in results] == [("ndcg@10", 0.625)]
    assert table(section(card, "Scores")) == [
        ["metric", "before", "after step 800", "change"],
        ["ndcg@10", "0.2500", "0.6250", "+0.3750"],
    ]
    # The interval is of the last model's queries.
    assert "95 %" not in card.text


def test_a_run_without_evaluation_claims_no_score(config: Config) -> None:
    facts = FACTS | {"evaluation": "none: data.evaluation_fraction=0 holds out no example"}
    card = write(config, result=NOT_EVALUATED, facts=facts)
    assert data_of(card).eval_results is None
    assert "model-index" not in card.data.to_dict()
    assert card.data.to_dict()["base_model"] == "google-bert/bert-base"
    assert section(card, "Scores") == "The run held nothing out, so nothing is known of its quality."


# The model and how to load it


def test_the_modules_stand_with_their_parameters(config: Config) -> None:
    assert table(section(write(config), "Model")) == [
        ["module", "what it does", "parameters"],
        ["Transformer", "BertModel, 32 wide", "22,592"],
        ["Dense", "32 -> 128, Identity, no bias", "4,096"],
    ]


def test_each_library_has_its_lines_or_the_reason_why_it_cannot(config: Config) -> None:
    loading = section(write(config), "How to load it")
    blocks = re.findall(r"\*\*(.*?)\*\*\n\n```python\n(.*?)\n```", loading, flags=re.DOTALL)
    assert blocks == [(library, LOADING[library]) for library in ("sentence-transformers 6", "PyLate 1.6")]
    assert loading.endswith("**Stanford ColBERT 0.2**: cannot hold it: its head is no linear map")
    assert loading.count("```") == 4


# What made it


def test_the_command_stands_as_it_was_typed(config: Config) -> None:
    assert section(write(config), "How it was made").startswith(f"```\n{COMMAND}\n```\n")


def test_the_facts_of_the_start_up_table_stand_in_a_table_without_a_header(config: Config) -> None:
    made = section(write(config), "How it was made")
    assert table(made) == [["", ""], *([key, value] for key, value in FACTS.items())]


def test_the_time_the_machine_and_the_versions_are_named(config: Config) -> None:
    packages = ["lateforge", "torch", "transformers", "tokenizers", "sentence-transformers", "accelerate", "datasets"]
    packages.append("pytrec-eval-terrier")
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    line = f"1200 steps, 62 seconds on {platform.machine()}, Python {platform.python_version()}, {versions}."
    assert f"\n{line}\n" in write(config).text


def test_the_keys_of_the_run_are_read_back_as_its_config(config: Config) -> None:
    words = replace(config.backbone, query_prefix="[Q] ", skiplist=["|", "```", "'", "#", "yes", "é"])
    config = replace(config, backbone=words)
    found = re.search(
        r"<details><summary>Every key of the run</summary>\n\n```yaml\n(.*?)```\n\n</details>",
        write(config).text,
        flags=re.DOTALL | re.MULTILINE,
    )
    assert found is not None
    # As Markdown ends the block: at a fence of its own line.
    inside = re.split(r"^```$", found[1], flags=re.MULTILINE)[0]
    merged = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.create(inside))
    assert isinstance(merged, DictConfig)
    assert parse_config(merged) == config


def test_a_pipe_in_a_text_does_not_end_its_cell(config: Config) -> None:
    facts = FACTS | {"queries": "prefix '|Q| '", "a|b": "c|d"}
    modules = [("Dense", "32 | 128", 1)]
    card = write(config, facts=facts, modules=modules)
    assert table(section(card, "How it was made"))[-2:] == [["queries", "prefix '|Q| '"], ["a|b", "c|d"]]
    assert table(section(card, "Model"))[1] == ["Dense", "32 | 128", "1"]
    assert r"| a\|b | c\|d |" in card.text
