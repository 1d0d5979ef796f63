"""The sets of a mix: each is what a member of configs/data says, and what was said otherwise.

The member has the set's own name, or the one that `data.sets.<name>.member` gives, so that several sets can be of one.
"""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, cast

from hydra import compose
from hydra.errors import MissingConfigException
from omegaconf import DictConfig, OmegaConf

from configs.schema import ConfigError, SetConfig, assignment


def spell_mix(arguments: Sequence[str]) -> list[str]:
    """The arguments of a command line, where the sets of a mix need neither data=mix nor a sign."""
    # Hydra would have names that no config knows, as those of the sets are, appended with a sign of its own.
    signed = [
        f"++{given}" if given.startswith(("data.mix=", "data.mix.", "data.sets.")) else given for given in arguments
    ]
    return with_member(signed, "data.mix", "data=mix")


def with_member(arguments: Sequence[str], key: str, member: str) -> list[str]:
    """The arguments, with this member of the key's group where the key stands without one."""
    keys = [argument.partition("=")[0].lstrip("+") for argument in arguments]
    if key not in keys or key.partition(".")[0] in keys:
        return list(arguments)
    # Beside the key: Hydra's parser takes overrides in one row, before the flags or behind them.
    place = keys.index(key)
    return [*arguments[:place], member, *arguments[place:]]


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
