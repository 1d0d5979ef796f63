"""What a run was made with: versions of the libraries, and the machine."""

import os
import platform
from importlib.metadata import version
from pathlib import Path

import torch

PACKAGES = (
    *("lateforge", "torch", "transformers", "tokenizers", "sentence-transformers", "accelerate", "datasets"),
    "pytrec-eval-terrier",
)


def versions() -> dict[str, str]:
    """Versions by package, Python's first."""
    return {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}}


def hardware(device: torch.device) -> dict[str, str]:
    """The machine of this process, in words by name. device: what it trains on."""
    facts = {
        "processor": _processor(),
        "cores": f"{os.cpu_count()}, {torch.get_num_threads()} threads a process",
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        "system": f"{platform.system()} {platform.release()}",
        "device": str(device.type),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts["device"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
    return facts


def _processor() -> str:
    """Its name, where the system says it."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text(encoding="utf-8").splitlines() if information.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return ", ".join(filter(None, [*names[:1], platform.machine()]))
