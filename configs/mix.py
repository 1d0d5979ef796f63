"""The sets of a mix: each is what its member of configs/data says, and what was said otherwise."""

from dataclasses import fields

from hydra import compose
from hydra.errors import MissingConfigException
from omegaconf import DictConfig, OmegaConf

from configs.schema import ConfigError, SetConfig, assignment


def with_sets(composed: DictConfig) -> DictConfig:
    """The config with `data.sets` filled in, so that a saved one says all. Hydra must have been set up.

    Raises ConfigError where a set is no member of data, or not in the mix.
    """
    data = OmegaConf.to_container(composed.data)
    assert isinstance(data, dict)
    if set(data["sets"]) - set(data["mix"]):
        raise ConfigError(
            f"data.sets has {', '.join(data['sets'])} and data.mix {', '.join(data['mix'])}: name the same"
        )
    keys = {field.name for field in fields(SetConfig)}
    sets = {}
    for name in data["mix"]:
        said = {key: value for key, value in data["sets"].get(name, {}).items() if value != "???"}
        if keys <= set(said):
            sets[name] = said
            continue
        try:
            member = compose("train", [f"data={name}", assignment("data.root", str(composed.data.root))]).data
        except MissingConfigException:
            raise ConfigError(
                f"data.mix.{name}: {name} is no member of data: `python train.py --help` lists them"
            ) from None
        values = OmegaConf.to_container(member)
        assert isinstance(values, dict)
        sets[name] = {key: value for key, value in values.items() if key in keys} | said
    if sets:
        composed.data.sets = sets
    return composed
