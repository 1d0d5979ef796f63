"""The sets of a mix: each is what a member of configs/data says, and what was said otherwise.

The member has the set's own name, or the one that `data.sets.<name>.member` gives, so that several sets can be of one.
"""

from dataclasses import fields
from typing import Any, cast

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
    sets: dict[str, Any] = {}
    members: dict[str, dict[str, Any]] = {}
    for name in data["mix"]:
        said = {key: value for key, value in data["sets"].get(name, {}).items() if value != "???"}
        if not keys <= set(said):
            member = said.pop("member", name)
            if member not in members:
                members[member] = _values(member, name, root=composed.data.root)
            said = {key: value for key, value in members[member].items() if key in keys} | said
        sets[name] = said
    if sets:
        composed.data.sets = sets
    return composed


def _values(member: str, name: str, *, root: str) -> dict[str, Any]:
    """What a member of data says, for the set of this name."""
    try:
        composed = compose("train", [f"data={member}", assignment("data.root", root)])
    except MissingConfigException:
        key = f"data.mix.{name}" if member == name else f"data.sets.{name}.member"
        raise ConfigError(
            f"{key}: {member} is no member of data: `python train.py --help` lists them; "
            f"data.sets.{name}.member=pairs makes {name} a set of that format"
        ) from None
    values = OmegaConf.to_container(composed.data)
    assert isinstance(values, dict)
    return cast(dict[str, Any], values)
