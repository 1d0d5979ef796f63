"""The key=value arguments of a script, as the fields of a dataclass state them."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from configs.schema import ConfigError, explain

Options = TypeVar("Options")


def split_arguments(kind: type[Any], arguments: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """What is given for the fields of a dataclass, as it is typed, and the other arguments."""
    names = {field.name for field in fields(kind)}
    given, rest = dict[str, str](), list[str]()
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key in names:
            # As it is typed: a folder may have the name of a number, and a file a `#` in it.
            given[key] = value
        else:
            rest.append(argument)
    return given, rest


def read_options(kind: type[Options], given: Mapping[str, str | None]) -> Options:
    """The dataclass with these values. Raises ConfigError for a key or a value that cannot be."""
    try:
        options = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), given))
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error)) from error
    assert isinstance(options, kind)
    return options
