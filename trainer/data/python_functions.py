"""Real text without a download: the documented functions of the running Python's standard library.

Query: the first sentence of the docstring's first paragraph. Document: the source without the docstring, as
`ast.unparse` writes it. Whole modules are held out for evaluation, by a hash of their path: no file is on both sides.
"""

import ast
import re
import sysconfig
import warnings
from collections.abc import Iterator
from hashlib import md5
from pathlib import Path
from typing import Any

from datasets import Dataset

from configs.schema import DataConfig
from trainer.data.files import FEATURES, identity

LEFT_OUT = {"test", "tests", "site-packages", "idlelib", "lib2to3", "turtledemo"}
MINIMUM_CHARACTERS = 60
QUERY_WORDS = range(5, 41)


def load(config: DataConfig) -> tuple[Dataset, Dataset]:
    """Return training and held-out examples, each query once; the counts depend on the Python that runs."""
    library = Path(sysconfig.get_paths()["stdlib"])
    train: list[dict[str, Any]] = []
    held_out: list[dict[str, Any]] = []
    seen: set[str] = set()
    for module in _modules(library):
        name = module.relative_to(library).as_posix()
        bucket = int(md5(name.encode(), usedforsecurity=False).hexdigest(), 16) % 100
        for query, source, line in _functions(module):
            if query not in seen:
                seen.add(query)
                side = held_out if bucket < round(100 * config.evaluation_fraction) else train
                side.append(
                    {
                        "query": query,
                        "query_id": identity(query),
                        "documents": [source],
                        "document_ids": [identity(source)],
                        "scores": [],
                        "place": f"{module}:{line}",
                    }
                )
    return _table(train), _table(held_out)


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


def _table(examples: list[dict[str, Any]]) -> Dataset:
    # from_list does not take features together with an empty list.
    columns = {column: [example[column] for example in examples] for column in FEATURES}
    return Dataset.from_dict(columns, features=FEATURES)
