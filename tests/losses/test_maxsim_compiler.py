"""CUDA C++ to a cubin and its cache: NVRTC needs no GPU, so everything here runs where cuda-bindings is installed."""

import hashlib
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from losses.maxsim import compiler
from tests.conftest import ROOT

needs_nvrtc = pytest.mark.skipif(compiler.unavailable() is not None, reason=str(compiler.unavailable()))
SOURCE = """extern "C" __global__ void fill(int* numbers) {
    numbers[threadIdx.x] = NUMBER;
}
"""
# The accumulator is touched between two wgmmas of one group: ptxas can keep them right only one after the other.
SERIALISED = """extern "C" __global__ void multiply(float* sums, long long left, long long right, int n) {
    float a = 0, b = 0, c = 0, d = 0;
    for (int i = 0; i < n; ++i) {
        asm volatile("wgmma.fence.sync.aligned;");
        asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0, %1, %2, %3}, %4, %5, 1, 1, 1, 0, 0;"
                     : "+f"(a), "+f"(b), "+f"(c), "+f"(d) : "l"(left), "l"(right));
        a += 1;
        asm volatile("wgmma.commit_group.sync.aligned;");
    }
    asm volatile("wgmma.wait_group.sync.aligned 0;");
    sums[threadIdx.x] = a + b + c + d;
}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "lateforge" / "maxsim"


def fresh_process(cache: Path, architecture: str) -> subprocess.Popen[str]:
    code = (
        "import hashlib, sys; from losses.maxsim import compiler; "
        "print(hashlib.sha256(compiler.compile_cubin(sys.argv[1], architecture=sys.argv[2], defines={'NUMBER': 7}))"
        ".hexdigest())"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, SOURCE, architecture],
        cwd=ROOT,
        env=os.environ | {"XDG_CACHE_HOME": str(cache)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@needs_nvrtc
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
def test_a_fresh_process_compiles_what_this_one_does(tmp_path: Path, architecture: str) -> None:
    process = fresh_process(tmp_path, architecture)
    printed, errors = process.communicate(timeout=120)
    cubin, _ = compiler.compile_with_log(SOURCE, architecture=architecture, defines={"NUMBER": 7})
    assert cubin.startswith(b"\x7fELF")
    assert printed.strip() == hashlib.sha256(cubin).hexdigest(), errors


@needs_nvrtc
def test_two_processes_at_once_leave_one_file_and_get_the_same_bytes(tmp_path: Path, folder: Path) -> None:
    processes = [fresh_process(tmp_path, "sm_90a") for _ in range(2)]
    digests = [process.communicate(timeout=120)[0].strip() for process in processes]
    (file,) = folder.iterdir()
    content = file.read_bytes()
    assert digests == [hashlib.sha256(content[:-32]).hexdigest()] * 2
    assert content[-32:].hex() == digests[0]


@needs_nvrtc
def test_a_cubin_is_compiled_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = compiler.compile_cubin(SOURCE, architecture="sm_80", defines={"NUMBER": 7, "OTHER": 1})
    monkeypatch.setattr(compiler, "compile_with_log", None)
    assert compiler.compile_cubin(SOURCE, architecture="sm_80", defines={"OTHER": 1, "NUMBER": 7}) == first


@needs_nvrtc
@pytest.mark.parametrize(
    ("source", "architecture", "number"),
    [(SOURCE.replace("=", "+="), "sm_80", 7), (SOURCE, "sm_90a", 7), (SOURCE, "sm_80", 8)],
    ids=["source", "architecture", "define"],
)
def test_a_change_is_another_cubin(folder: Path, source: str, architecture: str, number: int) -> None:
    first = compiler.compile_cubin(SOURCE, architecture="sm_80", defines={"NUMBER": 7})
    second = compiler.compile_cubin(source, architecture=architecture, defines={"NUMBER": number})
    assert first != second
    assert len(list(folder.iterdir())) == 2
    assert compiler.compile_cubin(SOURCE, architecture="sm_80", defines={"NUMBER": 7}) == first


@needs_nvrtc
@pytest.mark.parametrize(
    "damage",
    [lambda old: b"", lambda old: old[:100], lambda old: old[:50] + b"\xff" + old[51:], lambda old: old + b"\0"],
    ids=["empty", "truncated", "a byte changed", "a byte more"],
)
def test_a_damaged_file_is_replaced(folder: Path, damage: Callable[[bytes], bytes]) -> None:
    first = compiler.compile_cubin(SOURCE, architecture="sm_80", defines={"NUMBER": 7})
    (file,) = folder.iterdir()
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    assert file.read_bytes() != whole
    assert compiler.compile_cubin(SOURCE, architecture="sm_80", defines={"NUMBER": 7}) == first
    assert file.read_bytes() == whole


@needs_nvrtc
def test_files_are_as_readable_as_the_umask_says(folder: Path) -> None:
    before = os.umask(0o027)
    try:
        compiler.compile_cubin(SOURCE, architecture="sm_80", defines={"NUMBER": 7})
    finally:
        os.umask(before)
    (file,) = folder.iterdir()
    assert file.stat().st_mode & 0o777 == 0o640


@needs_nvrtc
def test_a_folder_that_cannot_be_made_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")  # root may write into any folder, but into no file as if it were one
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    compiler._warn_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        for number in (7, 8):
            expected, _ = compiler.compile_with_log(SOURCE, architecture="sm_80", defines={"NUMBER": number})
            assert compiler.compile_cubin(SOURCE, architecture="sm_80", defines={"NUMBER": number}) == expected
    assert caplog.messages == [
        "MaxSim's kernels are compiled anew by each process: "
        f"{tmp_path}/file/lateforge/maxsim cannot be written: Not a directory"
    ]


@needs_nvrtc
def test_a_mistake_in_the_text_is_shown_with_its_line_and_architecture(folder: Path) -> None:
    with pytest.raises(compiler.CompileError, match=r'sm_80(?s:.)*maxsim\.cu\(2\): error: identifier "NUMBER"'):
        compiler.compile_cubin(SOURCE, architecture="sm_80", defines={})
    assert not folder.exists()


@needs_nvrtc
def test_an_unknown_architecture_is_an_error_that_names_it(folder: Path) -> None:
    with pytest.raises(compiler.CompileError, match=r"sm_1: NVRTC_ERROR_INVALID_OPTION"):
        compiler.compile_cubin(SOURCE, architecture="sm_1", defines={"NUMBER": 7})


@needs_nvrtc
def test_the_log_tells_registers_spills_and_serialised_tensor_instructions() -> None:
    _, log = compiler.compile_with_log(SOURCE, architecture="sm_90a", defines={"NUMBER": 7})
    assert "Compiling entry function 'fill' for 'sm_90a'" in log
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in log
    assert "registers" in log
    assert "(C75" not in log
    _, log = compiler.compile_with_log(SERIALISED, architecture="sm_90a", defines={})
    assert "(C75" in log
    assert "wgmma.mma_async instructions are serialized" in log


@needs_nvrtc
def test_wgmma_needs_the_a_of_sm_90a() -> None:
    with pytest.raises(compiler.CompileError, match=r"wgmma\.fence' not supported on \.target 'sm_90'"):
        compiler.compile_with_log(SERIALISED, architecture="sm_90", defines={})


def test_without_the_package_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda", None)
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    missing = compiler.unavailable()
    assert missing is not None
    assert missing.startswith("cuda-bindings cannot be imported (")
    assert missing.endswith("): pip install 'lateforge[cuda]'")
    with pytest.raises(compiler.CompileError) as refusal:
        compiler.compile_cubin(SOURCE, architecture="sm_80", defines={"NUMBER": 7})
    assert str(refusal.value) == missing


def test_without_the_library_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def version() -> None:
        raise RuntimeError('Failure finding "libnvrtc.so.13"\n  listdir("/somewhere")')

    bindings = ModuleType("cuda.bindings")
    bindings.nvrtc = SimpleNamespace(nvrtcVersion=version)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cuda", ModuleType("cuda"))
    monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
    assert compiler.unavailable() == (
        "libnvrtc cannot be loaded (Failure finding \"libnvrtc.so.13\"): pip install 'lateforge[cuda]'"
    )


def test_the_cache_stands_where_the_platform_keeps_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    for given, expected in (("/caches", "/caches"), ("relative", "/home/someone/.cache"), ("", "/home/someone/.cache")):
        monkeypatch.setenv("XDG_CACHE_HOME", given)
        assert compiler.cache_folder() == Path(expected, "lateforge", "maxsim")
