"""A model by what a person calls it: its folder, its Hub name, or a member of configs/backbone."""

import logging
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from sentence_transformers import MultiVectorEncoder
from transformers.utils import logging as transformers_logging

from architectures.factory import build_encoder
from configs.mix import spell_mix, with_sets
from configs.schema import Config, assignment, parse_config

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def compose_config(name: str, *overrides: str) -> Config:
    """The config of a run that starts from this model, with overrides as on the command line of train.py."""
    ConfigStore.instance().store("schema", Config)
    overrides = tuple(spell_mix(overrides))
    preset = (CONFIGS / "backbone" / f"{name}.yaml").is_file()
    backbone = [f"backbone={name}"] if preset else ["backbone=checkpoint", assignment("backbone.name", name)]
    # Prose, whatever the embedded default is trained on.
    chosen = any(override.startswith("data=") for override in overrides)
    fixed = ["name=model", *([] if chosen else ["data=pairs", "data.path=none"])]
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return parse_config(with_sets(compose("train", [*backbone, *fixed, *overrides])))


def load_model(name: str, *overrides: str) -> MultiVectorEncoder:
    """Build the encoder as a run would, in float32 on the CPU, for use and not for training.

    Raises ConfigError as a run does.
    """
    return build_model(compose_config(name, *overrides))


def build_model(config: Config) -> MultiVectorEncoder:
    """What `load_model` builds, of a config."""
    # What these warn of, the caller says in figures.
    logging.getLogger("sentence_transformers").setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    return build_encoder(config.backbone, config.head).eval()
