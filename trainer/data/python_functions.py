"""Real text without a download: the documented functions of the running Python's standard library.

Query: the first sentence of the docstring's first paragraph. Document: the source without the docstring, as
`ast.unparse` writes it. Whole modules are held out for evaluation, by a hash of their path: no file is on both sides.
"""

import ast
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from hashlib import md5
from pathlib import Path
from typing import Any

import numpy as np

from configs.schema import SetConfig
from trainer.data.files import Source
from trainer.data.tables import WITH_TEXTS, TrainingSet, kept_table, set_of_rows, values, with_texts

LEFT_OUT = {"test", "tests", "site-packages", "idlelib", "lib2to3", "turtledemo"}
MINIMUM_CHARACTERS = 60
QUERY_WORDS = range(5, 41)


def load(name: str, config: SetConfig) -> tuple[TrainingSet, TrainingSet | None]:
    """Return training and held-out examples, each query once; the counts depend on the Python that runs."""
    library = Path(sysconfig.get_paths()["stdlib"])
    table = kept_table(_examples, [], [str(library), sys.version], features=WITH_TEXTS)
    examples = set_of_rows(name, config, Source(), table)
    threshold = round(100 * (config.evaluation_fraction or 0))
    modules = [place.rpartition(":")[0] for place in values(table, "place")]
    is_held_out = np.array([_bucket(Path(module).relative_to(library).as_posix()) < threshold for module in modules])
    if not is_held_out.any():
        return examples, None
    return examples.select(np.flatnonzero(~is_held_out)), examples.select(np.flatnonzero(is_held_out))


def _bucket(module: str) -> int:
    return int(md5(module.encode(), usedforsecurity=False).hexdigest(), 16) % 100


def _examples(folder: str, version: str) -> Iterator[dict[str, Any]]:
    """Yield the examples; version: of the Python whose library it is."""
    seen: set[str] = set()
    for module in _modules(Path(folder)):
        for query, source, line in _functions(module):
            if query not in seen:
                seen.add(query)
                yield with_texts(f"{module}:{line}", query, [source])


def _modules(library: Path) -> Iterator[Path]:
    for path in sorted(library.rglob("*.py")):
        if not LEFT_OUT.intersection(path.relative_to(library).parts):
            yield path


def _functions(module: Path) -> Iterator[tuple[str, str, int]]:
    """Yield the query, the source and the line of each documented function of a module."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(module.read_bytes())
    except (SyntaxError, ValueError):
        return  # Templates such as those of lib2to3 are no Python of this version.
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        docstring = ast.get_docstring(node)
        # A body of the docstring alone leaves nothing to find.
        if not docstring or len(node.body) == 1:
            continue
        first_paragraph = " ".join(docstring.split("\n\n")[0].split())
        query = re.split(r"(?<=[.!?])\s", first_paragraph, maxsplit=1)[0]
        if len(query.split()) not in QUERY_WORDS:
            continue
        node.body = node.body[1:]
        source = ast.unparse(node)
        if len(source) >= MINIMUM_CHARACTERS:
            yield query, source, node.lineno
