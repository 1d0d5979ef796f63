"""What a launch hands to the CUDA driver, without one: first to a fake binding, then through the real binding to a
library of C that stands in for libcuda and prints what reaches it."""

import ctypes
import importlib.util
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from losses.maxsim import driver
from tests.conftest import ROOT

DEVICE = torch.device("cuda", 1)
TORCHS_CONTEXT = 101
STREAM = 0xBEEF


class Arguments(ctypes.Structure):
    _fields_ = [("address", ctypes.c_void_p), ("rows", ctypes.c_int32), ("scale", ctypes.c_float)]


class Result(int):
    """As cuda.bindings' CUresult: an int, 0 for success."""


class Binding(ModuleType):
    """cuda.bindings.driver as far as it is used; a context is a number, and each thread has its own."""

    CUresult = Result
    CUfunction_attribute = SimpleNamespace(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES=8)

    def __init__(self) -> None:
        super().__init__("cuda.bindings.driver")
        self.calls: list[tuple[Any, ...]] = []
        self.contexts: dict[int, int] = {}
        self.launch_status = 0

    def cuInit(self, flags: int) -> tuple[Result]:
        return (Result(0),)

    def cuDeviceGet(self, index: int) -> tuple[Result, int]:
        return Result(0), index

    def cuDevicePrimaryCtxRetain(self, device: int) -> tuple[Result, int]:
        self.calls.append(("retain", device))
        return Result(0), 100 + device

    def cuCtxGetCurrent(self) -> tuple[Result, int]:
        return Result(0), self.contexts.get(threading.get_ident(), 0)

    def cuCtxSetCurrent(self, context: int) -> tuple[Result]:
        self.contexts[threading.get_ident()] = context
        return (Result(0),)

    def cuModuleLoadData(self, image: bytes) -> tuple[Result, str]:
        self.calls.append(("load", image, self.cuCtxGetCurrent()[1]))
        return Result(0), "module"

    def cuModuleGetFunction(self, module: str, name: bytes) -> tuple[Result, str | None]:
        self.calls.append(("function", name))
        return (Result(500), None) if name == b"missing" else (Result(0), f"handle of {name.decode()}")

    def cuFuncSetAttribute(self, function: str, attribute: int, value: int) -> tuple[Result]:
        self.calls.append(("attribute", function, attribute, value))
        return (Result(0),)

    def cuLaunchKernel(self, function: str, *numbers: int) -> tuple[Result]:
        *shape, stream, pointers, extra = numbers
        self.calls.append(("launch", function, tuple(shape), stream, pointers, extra, self.cuCtxGetCurrent()[1]))
        return (Result(self.launch_status),)

    def cuGetErrorName(self, status: int) -> tuple[Result, bytes]:
        return Result(0), b"CUDA_ERROR_OF_THE_FAKE"

    def cuGetErrorString(self, status: int) -> tuple[Result, bytes]:
        return Result(0), b"why it failed"

    def of(self, kind: str) -> list[tuple[Any, ...]]:
        return [call[1:] for call in self.calls if call[0] == kind]


def forget() -> None:
    for remembered in (driver._primary_context, driver._encoder):
        remembered.cache_clear()


@pytest.fixture
def binding(monkeypatch: pytest.MonkeyPatch) -> Iterator[Binding]:
    fake, package = Binding(), ModuleType("cuda.bindings")
    package.driver = fake  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cuda", ModuleType("cuda"))
    monkeypatch.setitem(sys.modules, "cuda.bindings", package)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda index: SimpleNamespace(cuda_stream=STREAM + index))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    forget()
    yield fake
    forget()


def test_a_launch_is_of_the_kernels_handle_on_the_devices_current_stream(binding: Binding) -> None:
    binding.cuCtxSetCurrent(TORCHS_CONTEXT)
    module = driver.Module(b"cubin", DEVICE)
    module.launch("score", grid=(3, 4), threads=128, shared_bytes=0, arguments=[Arguments()])
    assert binding.of("load") == [(b"cubin", TORCHS_CONTEXT)]
    ((function, shape, stream, _, extra, context),) = binding.of("launch")
    assert function == "handle of score"
    assert shape == (3, 4, 1, 128, 1, 1, 0)
    assert (stream, extra, context) == (STREAM + 1, 0, TORCHS_CONTEXT)


def test_a_device_without_a_number_is_torchs_current_one(binding: Binding) -> None:
    driver.Module(b"cubin", torch.device("cuda"))
    assert binding.of("load") == [(b"cubin", 100)]


def test_handle_and_shared_memory_are_settled_once_and_only_ever_raised(binding: Binding) -> None:
    module = driver.Module(b"cubin", DEVICE)
    for kernel, shared_bytes in (("a", 60_000), ("a", 60_000), ("a", 50_000), ("a", 70_000), ("b", 0), ("b", 0)):
        module.launch(kernel, grid=(1, 1), threads=32, shared_bytes=shared_bytes, arguments=[])
    assert binding.of("function") == [(b"a",), (b"b",)]
    assert binding.of("attribute") == [("handle of a", 8, 60_000), ("handle of a", 8, 70_000)]
    assert [shape[-1] for _, shape, *_ in binding.of("launch")] == [60_000, 60_000, 50_000, 70_000, 0, 0]


@pytest.mark.parametrize("before", [0, 100], ids=["no context", "another device's"])
def test_a_thread_launches_in_torchs_context_and_keeps_its_own(binding: Binding, before: int) -> None:
    module = driver.Module(b"cubin", DEVICE)
    after: list[int] = []

    def backward() -> None:
        binding.cuCtxSetCurrent(before)
        module.launch("score", grid=(1, 1), threads=32, shared_bytes=0, arguments=[])
        binding.launch_status = 719
        with pytest.raises(RuntimeError):
            module.launch("score", grid=(1, 1), threads=32, shared_bytes=0, arguments=[])
        after.append(binding.cuCtxGetCurrent()[1])

    thread = threading.Thread(target=backward)
    thread.start()
    thread.join()
    assert [call[-1] for call in binding.of("launch")] == [TORCHS_CONTEXT, TORCHS_CONTEXT]
    assert after == [before]
    assert binding.of("retain") == [(1,)]


def test_a_refused_launch_tells_kernel_shape_and_the_drivers_reason(binding: Binding) -> None:
    module = driver.Module(b"cubin", DEVICE)
    binding.launch_status = 701
    with pytest.raises(RuntimeError) as refusal:
        module.launch("score", grid=(3, 4), threads=2048, shared_bytes=512, arguments=[])
    assert str(refusal.value) == (
        "score with grid (3, 4), 2048 threads, 512 bytes of shared memory: CUDA_ERROR_OF_THE_FAKE (701): why it failed"
    )


def test_a_kernel_that_the_cubin_lacks_is_an_error_each_time(binding: Binding) -> None:
    module = driver.Module(b"cubin", DEVICE)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"^loading missing: CUDA_ERROR_OF_THE_FAKE \(500\)"):
            module.launch("missing", grid=(1, 1), threads=32, shared_bytes=0, arguments=[])
    assert binding.of("launch") == []


# What the driver would see. Each call prints a line of JSON; a context is 0xC0000 + its device.
STAND_IN = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
typedef unsigned u;
static __thread void* current;
static void print_bytes(const void* at, int n) { for (int i = 0; i < n; ++i) printf("%02x", ((uint8_t*)at)[i]); }
int cuInit(u flags) { return 0; }
int cuDriverGetVersion(int* version) { *version = 13000; return 0; }
int cuGetProcAddress_v2(const char* name, void** address, int version, uint64_t flags, int* status) {
    char versioned[64];
    snprintf(versioned, sizeof versioned, "%s_v2", name);
    *address = dlsym(RTLD_DEFAULT, versioned);
    if (!*address) *address = dlsym(RTLD_DEFAULT, name);
    if (status) *status = !*address;
    return *address ? 0 : 500;
}
int cuDeviceGet(int* device, int index) { *device = index; return 0; }
int cuDevicePrimaryCtxRetain(void** context, int device) { *context = (void*)(0xC0000L + device); return 0; }
int cuCtxGetCurrent(void** context) { *context = current; return 0; }
int cuCtxSetCurrent(void* context) { current = context; return 0; }
int cuGetErrorName(int error, const char** text) { *text = "CUDA_ERROR_STAND_IN"; return 0; }
int cuGetErrorString(int error, const char** text) { *text = "said by C"; return 0; }
int cuModuleLoadData(void** module, const char* image) {
    *module = (void*)0xA0000;
    printf("{\"call\": \"load\", \"image\": \"%.5s\", \"context\": %lu}\n", image, (long)current);
    return 0;
}
int cuModuleGetFunction(void** function, void* module, const char* name) { *function = (void*)0xF0000; return 0; }
int cuFuncSetAttribute(void* function, int attribute, int value) {
    printf("{\"call\": \"attribute\", \"function\": %lu, \"number\": %d, \"value\": %d}\n",
           (long)function, attribute, value);
    return 0;
}
int cuLaunchKernel(void* function, u gx, u gy, u gz, u bx, u by, u bz, u shared, void* stream, void** arguments,
                   void** extra) {
    printf("{\"call\": \"launch\", \"function\": %lu, \"shape\": [%u, %u, %u, %u, %u, %u, %u], \"stream\": %lu, "
           "\"extra\": %lu, \"context\": %lu, \"arguments\": [\"", (long)function, gx, gy, gz, bx, by, bz, shared,
           (long)stream, (long)extra, (long)current);
    print_bytes(arguments[0], 16);
    printf("\", \"");
    print_bytes(arguments[1], 128);
    printf("\"]}\n");
    return gx == 7;
}
int cuTensorMapEncodeTiled(void* map, int type, u rank, void* address, const uint64_t* sizes, const uint64_t* strides,
                           const u* box, const u* steps, int interleave, int swizzle, int promotion, int fill) {
    printf("{\"call\": \"map\", \"misaligned\": %lu, \"type\": %d, \"rank\": %u, \"address\": %lu, "
           "\"sizes\": [%lu, %lu], \"stride\": %lu, \"box\": [%u, %u], \"steps\": [%u, %u], "
           "\"options\": [%d, %d, %d, %d], \"context\": %lu}\n",
           (long)map % 64, type, rank, (long)address, sizes[0], sizes[1], strides[0], box[0], box[1],
           steps[0], steps[1], interleave, swizzle, promotion, fill, (long)current);
    for (int i = 0; i < 128; ++i) ((uint8_t*)map)[i] = i;
    return box[1] == 99;
}
"""
USER = """
import ctypes, json, sys
ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)  # the binding's dlopen of libcuda.so.1 finds it by its soname
import torch
from types import SimpleNamespace
torch.cuda.current_stream = lambda index: SimpleNamespace(cuda_stream=0xBEEF + index)
torch.cuda.current_device = lambda: 1
from losses.maxsim import driver
from tests.losses.test_maxsim_driver import Arguments
module = driver.Module(b"cubin", torch.device("cuda", 1))
whole = torch.zeros(1000, 128, dtype=torch.bfloat16)
part = torch.zeros(40, 256, dtype=torch.float16)[8:, 64:160]
maps = [driver.tensor_map(whole, box_rows=128), driver.tensor_map(part, box_rows=32)]
arguments = [Arguments(0x1122334455667788, -2, 0.5), maps[0]]
errors = []
for call in (
    lambda: module.launch("score", grid=(3, 4), threads=384, shared_bytes=200_000, arguments=arguments),
    lambda: module.launch("score", grid=(7, 4), threads=384, shared_bytes=0, arguments=arguments),
    lambda: driver.tensor_map(whole, box_rows=99),
):
    try:
        call()
    except RuntimeError as error:
        errors.append(str(error))
ctypes.CDLL(None).fflush(None)
print(json.dumps({"call": "end", "addresses": [whole.data_ptr(), part.data_ptr()], "errors": errors}))
"""


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Every call that reached the stand-in, by kind."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("the stand-in for libcuda needs Linux and a C compiler")
    if importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.bindings") is None:
        pytest.skip("cuda-bindings is not installed")
    folder = tmp_path_factory.mktemp("stand_in")
    (folder / "cuda.c").write_text(STAND_IN)
    library = folder / "libcuda.so.1"
    soname = f"-Wl,-soname,{library.name}"
    subprocess.run([compiler, "-shared", "-fPIC", soname, "-o", library, folder / "cuda.c", "-ldl"], check=True)
    done = subprocess.run(
        [sys.executable, "-c", USER, library], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    calls: dict[str, list[dict[str, Any]]] = {}
    for line in done.stdout.splitlines():
        call = json.loads(line)
        calls.setdefault(call.pop("call"), []).append(call)
    return calls


def test_the_binding_passes_a_launch_on_byte_for_byte(seen: dict[str, list[dict[str, Any]]]) -> None:
    assert seen["load"] == [{"image": "cubin", "context": 0xC0001}]
    # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    assert seen["attribute"] == [{"function": 0xF0000, "number": 8, "value": 200_000}]
    assert seen["launch"][0] == {
        "function": 0xF0000,
        "shape": [3, 4, 1, 384, 1, 1, 200_000],
        "stream": 0xBEEF + 1,
        "extra": 0,
        "context": 0xC0001,
        "arguments": ["8877665544332211feffffff0000003f", bytes(range(128)).hex()],
    }


def test_a_tensor_map_is_aligned_and_describes_rows_that_lie_apart(seen: dict[str, list[dict[str, Any]]]) -> None:
    whole, part = seen["end"][0]["addresses"]
    # cuda.h: no interleave 0, 128-byte swizzle 3, 256-byte promotion 3, zeros outside 0; bfloat16 9, float16 6.
    common = {"misaligned": 0, "rank": 2, "steps": [1, 1], "options": [0, 3, 3, 0], "context": 0xC0001}
    assert seen["map"][:2] == [
        common | {"type": 9, "address": whole, "sizes": [128, 1000], "stride": 256, "box": [64, 128]},
        common | {"type": 6, "address": part, "sizes": [96, 32], "stride": 512, "box": [64, 32]},
    ]


def test_what_the_driver_refuses_is_told_with_its_name_and_text(seen: dict[str, list[dict[str, Any]]]) -> None:
    assert seen["end"][0]["errors"] == [
        "score with grid (7, 4), 384 threads, 0 bytes of shared memory: CUDA_ERROR_STAND_IN (1): said by C",
        "a tensor map of (1000, 128), stride 256 bytes, box of 99 rows: CUDA_ERROR_STAND_IN (1): said by C",
    ]
