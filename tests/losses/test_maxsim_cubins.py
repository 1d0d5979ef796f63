"""What NVRTC makes of the kernels for each GPU: needs no GPU, so it runs where cuda-bindings is installed."""

import re
import shutil
import subprocess
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from losses.maxsim import compiler, kernels

pytestmark = pytest.mark.skipif(compiler.unavailable() is not None, reason=str(compiler.unavailable()))

BF16, F16 = torch.bfloat16, torch.float16
# Every size in one type: types differ in two instructions only, so the other one takes four sizes.
VARIANTS = [(embedding, BF16) for embedding in range(16, 257, 16)] + [(16, F16), (48, F16), (128, F16), (256, F16)]
# Ampere and Ada gaming GPUs have less shared memory than an A100, Blackwell has no wgmma.
OTHERS = [("sm_86", 128), ("sm_89", 256), ("sm_100", 128), ("sm_100", 256), ("sm_120", 128), ("sm_120", 256)]
COMPILED = [(architecture, *variant) for variant in VARIANTS for architecture in ("sm_80", "sm_90a")]
COMPILED += [(architecture, embedding, BF16) for architecture, embedding in OTHERS]
KERNELS = {"index_queries", "index_documents", "compact_documents", "forward", "sum_slabs"}
KERNELS |= {"query_gradient", "document_gradient"}
ATOMICS = {"ATOM", "ATOMG", "ATOMS", "RED", "REDG"}
LOCAL_MEMORY = {"LDL", "STL"}


@cache
def compiled(architecture: str, embedding: int, dtype: torch.dtype) -> tuple[bytes, str]:
    text = kernels.source(sm90=architecture == "sm_90a")
    return compiler.compile_with_log(text, architecture=architecture, defines=kernels.constants(embedding, dtype))


def names(architecture: str) -> set[str]:
    return KERNELS | {"forward_sm90"} if architecture == "sm_90a" else KERNELS


@pytest.mark.parametrize(
    ("architecture", "embedding", "dtype"), COMPILED, ids=[f"{a}-{h}-{str(t)[6:]}" for a, h, t in COMPILED]
)
def test_every_kernel_compiles_without_spills_and_with_wgmmas_that_overlap(
    architecture: str, embedding: int, dtype: torch.dtype
) -> None:
    cubin, log = compiled(architecture, embedding, dtype)
    assert cubin.startswith(b"\x7fELF")
    properties = re.findall(
        r"Function properties for (\w+)\n.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads",
        log,
    )
    assert {name: spilled for name, *spilled in properties} == dict.fromkeys(names(architecture), ["0"] * 3)
    assert "(C75" not in log  # ptxas's notes on wgmma that it had to put one after the other
    assert "warning" not in log


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_shared_memory_fits_every_gpu_and_that_of_wgmma_an_h100(dtype: torch.dtype) -> None:
    for embedding in range(16, 257, 16):
        numbers = kernels.constants(embedding, dtype)
        for kernel in ("FORWARD", "QUERY", "DOCUMENT"):
            assert 0 < numbers[f"{kernel}_SHARED_BYTES"] <= 99 * 1024
        assert 0 < numbers["SM90_SHARED_BYTES"] <= 227 * 1024


def disassembler() -> str | None:
    """The one of the package nvidia-cuda-nvdisasm, or of a toolkit."""
    package = find_spec("nvidia")
    folders = (package.submodule_search_locations or []) if package else []
    found = [str(path) for folder in folders for path in Path(folder).glob("cu*/bin/nvdisasm")]
    return found[0] if found else shutil.which("nvdisasm")


@cache
def operations(folder: Path, architecture: str, embedding: int, dtype: torch.dtype) -> dict[str, set[str]]:
    """For each kernel the names of its machine instructions, without what follows the first dot."""
    program = disassembler()
    assert program is not None
    file = folder / f"{architecture}-{embedding}-{dtype}.cubin"
    file.write_bytes(compiled(architecture, embedding, dtype)[0])
    text = subprocess.run([program, "-c", str(file)], check=True, capture_output=True, text=True).stdout
    _, *sections = re.split(r"^\s*\.section\s+\.text\.(\w+),.*$", text, flags=re.MULTILINE)
    instruction = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)", re.MULTILINE)
    return {
        kernel: set(instruction.findall(section)) for kernel, section in zip(sections[::2], sections[1::2], strict=True)
    }


@pytest.mark.skipif(disassembler() is None, reason="no nvdisasm: pip install nvidia-cuda-nvdisasm")
@pytest.mark.parametrize(("embedding", "dtype"), [(16, BF16), (48, F16), (128, BF16), (256, BF16)])
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
def test_the_machine_code_has_the_tensor_cores_no_local_memory_and_no_atomic_addition(
    tmp_path_factory: pytest.TempPathFactory, architecture: str, embedding: int, dtype: torch.dtype
) -> None:
    of = operations(tmp_path_factory.getbasetemp(), architecture, embedding, dtype)
    assert set(of) == names(architecture)
    for kernel, used in of.items():
        assert "EXIT" in used
        assert not used & LOCAL_MEMORY, kernel
        assert not used & ATOMICS, kernel
    assert {"HMMA", "LDGSTS", "LDSM"} <= of["forward"]
    if architecture == "sm_90a":
        assert {"HGMMA", "UTMALDG", "SYNCS", "USETMAXREG"} <= of["forward_sm90"]
        assert "HMMA" not in of["forward_sm90"]
