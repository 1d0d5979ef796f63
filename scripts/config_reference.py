"""Write the config reference of README.md from configs/schema.py: `python -m scripts.config_reference`."""

import inspect
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from enum import EnumMeta
from pathlib import Path
from typing import Any, get_args, get_type_hints

from docstring_parser import parse_from_object

from configs.schema import Config
from scripts.regions import with_region

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- config reference -->\n", "<!-- end of config reference -->\n"


def reference(node: type = Config, prefix: str = "") -> Iterator[str]:
    """Yield the lines of a Markdown table: every key, its type, its meaning."""
    if not prefix:
        yield from ("| key | type | meaning |", "|---|---|---|")
    # A dataclass that extends another has its fields, whose words stand there.
    documented = [parse_from_object(each) for each in node.__mro__ if is_dataclass(each)]
    meanings = {
        item.arg_name: " ".join((item.description or "").split()) for each in documented for item in each.params
    }
    hints = get_type_hints(node)
    for field in fields(node):
        key, hint = prefix + field.name, hints[field.name]
        element = next((inner for inner in get_args(hint)[:1] if is_dataclass(inner)), None)
        if is_dataclass(hint):
            assert isinstance(hint, type)
            yield f"| **`{key}`** | group | {' '.join(str(inspect.getdoc(hint)).split())} |"
            yield from reference(hint, f"{key}.")
        else:
            yield f"| `{key}` | {_type(hint)} | {meanings[field.name]} |"
            if isinstance(element, type):
                yield from reference(element, f"{key}.0.")


def updated(readme: str) -> str:
    """The README with its reference replaced by the schema's."""
    return with_region(readme, BEGIN, END, "\n".join(reference()) + "\n")


def _type(hint: Any) -> str:
    if isinstance(hint, EnumMeta):
        return " \\| ".join(member.name for member in hint)  # type: ignore[var-annotated]
    if arguments := get_args(hint):
        if getattr(hint, "__origin__", None) is list:
            return f"list of {_type(arguments[0])}"
        if getattr(hint, "__origin__", None) is dict:
            return f"{_type(arguments[1])} by name"
        return " \\| ".join(_type(argument) for argument in arguments)
    if hint is type(None):
        return "null"
    words = {str: "text", int: "integer", float: "number", bool: "true \\| false"}
    return words.get(hint) or str(hint.__name__)


if __name__ == "__main__":
    README.write_text(updated(README.read_text(encoding="utf-8")), encoding="utf-8")
