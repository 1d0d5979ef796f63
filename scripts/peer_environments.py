"""The environments of PyLate and Stanford's ColBERT, which need older releases of transformers than ours."""

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

NEIGHBOURS = ("torch", "transformers", "sentence-transformers", "tokenizers", "numpy")


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A library, and the environment that it needs."""

    name: str
    package: str
    version: str
    requirements: tuple[str, ...]
    """What it is installed beside. The package itself comes without its requirements, of which some are unused here and
    cannot be had for every machine; torch is the release that runs here."""

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


PEERS = {
    "pylate": Peer(
        name="PyLate",
        package="pylate",
        version="1.6.0",
        # Its indexes, which need fast-plaid and fastkmeans, stay out.
        requirements=(
            "sentence-transformers==5.3.0",
            "transformers==5.3.0",
            "accelerate>=0.31",
            "datasets>=2.20",
            "pandas>=2.2.1",
            "scipy",
            "ujson==5.12.0",
        ),
    ),
    "stanford": Peer(
        name="Stanford ColBERT",
        package="colbert-ai",
        version="0.2.22",
        # Of the time of its release; torch compiles its extension with setuptools and ninja.
        requirements=(
            "transformers==4.49.0",
            "huggingface-hub<1",
            "datasets<4",
            "setuptools<81",
            "bitarray",
            "flask",
            "GitPython",
            "ninja",
            "python-dotenv",
            "scipy",
            "tqdm",
            "ujson",
        ),
    ),
}


class PeerError(Exception):
    """A library cannot be installed, or did not do what it was asked; the text is one line."""


def require_own(folder: Path) -> None:
    """Raise ValueError for a folder that was not made here, since `install` deletes what is not whole."""
    if folder.parent.exists() and not folder.parent.is_dir():
        raise ValueError(f"peers={folder.parent} is no folder: name one, which need not be there")
    if folder.exists() and not _stamp(folder).is_file():
        raise ValueError(f"peers={folder.parent}: {folder} is there, and not from this script: name another folder")


def install(peer: Peer, folder: Path) -> None:
    """Make the environment of a library, unless it is there, whole, and of these requirements.

    Raises PeerError where a part cannot be installed.
    """
    alone = f"{peer.package}=={peer.version}"
    others = [f"torch=={torch.__version__.partition('+')[0]}", *peer.requirements]
    stamp, whole = _stamp(folder), "\n".join([f"# Python {platform.python_version()}", alone, *others]) + "\n"
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == whole and folder.is_dir():
        return
    print(f"installing {peer} into {folder}, which takes minutes", file=sys.stderr, flush=True)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Empty until the environment is whole.
        stamp.write_text("", encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        run([sys.executable, "-m", "venv", str(folder)], f"an environment for {peer} cannot be made", cwd=folder)
        pip = [str(python_of(folder)), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        for requirements in (others, ["--no-deps", alone]):
            run([*pip, *requirements], f"{peer} cannot be installed", cwd=folder)
        stamp.write_text(whole, encoding="utf-8")
    except OSError as error:
        raise PeerError(f"peers={folder.parent} cannot be written ({error})") from error


def _stamp(folder: Path) -> Path:
    """The file beside an environment that says it is ours and, once it is whole, what it was installed from."""
    return folder.with_suffix(".installed")


def python_of(folder: Path) -> Path:
    """The interpreter of an environment."""
    return folder / "bin" / "python"


def run(command: Sequence[str], problem: str, *, cwd: Path, variables: dict[str, str] | None = None) -> None:
    """Run a command without showing its output.

    Raises PeerError with the problem and the last error that the command reports.
    """
    done = subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR:")] or lines[-1:]
        raise PeerError(f"{problem}: {errors[-1] if errors else f'status {done.returncode}'}")


def variables_of(folder: Path) -> dict[str, str]:
    """The variables of a process that asks no Hub, sees no GPU, and finds the building tools of its environment."""
    return os.environ | {
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "PATH": f"{python_of(folder).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        "TORCH_EXTENSIONS_DIR": str(folder / "extensions"),
    }


def versions_of(folder: Path, *packages: str) -> dict[str, str]:
    """The versions in an environment: of Python, which is the one that runs here, of the packages and of the rest."""
    return versions((*packages, *NEIGHBOURS), [str(path) for path in (folder / "lib").glob("python*/site-packages")])


def versions(packages: Sequence[str], paths: Sequence[str]) -> dict[str, str]:
    """The version of Python, and of each package that is installed in the folders."""
    found = {name: next(iter(metadata.distributions(name=name, path=list(paths))), None) for name in packages}
    installed = {name: package.version for name, package in found.items() if package is not None}
    return {"python": platform.python_version()} | installed
