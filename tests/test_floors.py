"""An import points down only: schema, MaxSim, losses and architectures, trainer, entry points."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# The longest matching prefix decides.
FLOORS = {
    "configs": 0,
    "losses.maxsim": 1,
    "losses": 2,
    "architectures": 2,
    "trainer": 3,
    "train": 4,
    "scripts": 4,
}
# What only the entry points, and the page that explains them, may know.
HYDRA_IS_KNOWN_IN = {"train", "configs.mix", "configs.reference"}


def modules() -> Iterator[tuple[str, Path]]:
    for folder in ("architectures", "configs", "losses", "trainer", "scripts"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"), path
    yield "train", ROOT / "train.py"


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            assert node.module is not None
            # `from losses import maxsim` names a module below the package.
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def floor(module: str) -> int | None:
    matches = [name for name in FLOORS if module == name or module.startswith(name + ".")]
    return FLOORS[max(matches, key=len)] if matches else None


@pytest.mark.parametrize(("module", "path"), [pytest.param(*item, id=item[0]) for item in modules()])
def test_imports_point_down(module: str, path: Path) -> None:
    own = floor(module)
    assert own is not None
    above = {name for name in imports(path) if (other := floor(name)) is not None and other > own}
    assert not above
    sideways = {
        name for name in imports(path) if {module.split(".")[0], name.split(".")[0]} == {"losses", "architectures"}
    }
    assert not sideways


@pytest.mark.parametrize(("module", "path"), [pytest.param(*item, id=item[0]) for item in modules()])
def test_hydra_stays_at_the_entry(module: str, path: Path) -> None:
    knows_hydra = any(name.split(".")[0] == "hydra" for name in imports(path))
    assert not knows_hydra or module in HYDRA_IS_KNOWN_IN or module.startswith("scripts.")


def test_only_a_report_draws() -> None:
    draws = {"trainer.theme", "trainer.figures", "trainer.report"}
    for module, path in modules():
        # What stands in a function is imported when that is called.
        tree = ast.parse(path.read_text(encoding="utf-8"))
        at_import = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        names = {node.module for node in at_import if isinstance(node, ast.ImportFrom)}
        names |= {alias.name for node in at_import if isinstance(node, ast.Import) for alias in node.names}
        found = {name for name in names if name in draws or (name or "").split(".")[0] == "matplotlib"}
        assert not found or module in draws, module


def test_maxsim_depends_on_torch_alone() -> None:
    for module, path in modules():
        if module.startswith("losses.maxsim"):
            outside = {name.split(".")[0] for name in imports(path)} - set(sys.stdlib_module_names)
            assert outside <= {"torch", "losses", "cuda"}, module


def test_the_config_is_checked_before_anything_slow_is_imported() -> None:
    code = (
        "import sys; sys.argv = ['train.py', 'head=mlp', 'head.layers.0.out_features=0']\n"
        "import train\n"
        "slow = {'torch', 'transformers', 'sentence_transformers', 'datasets', 'matplotlib'}\n"
        "try: train.main(sys.argv[1:])\n"
        "finally: print(sorted(slow & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stdout == "[]\n"
