// The kernels of losses/maxsim/sources as a shared library for the host: `emulator.h` stands where ptx.cuh stands on a GPU.

#include <cmath>
#include <cstdio>
#include <cstring>
#include <exception>
#include <string>

#include "emulator.h"
#include "types.cuh"

// The kernels' text, in the order of losses/maxsim/kernels.py.
#include "index.cuh"
#include "epilogue.cuh"
#include "forward.cuh"
#include "forward_sm90.cuh"
#include "backward.cuh"

extern "C" int parts(int groups, int documents, int blocks_at_once) {
    Arguments arguments = {};
    arguments.blocks_at_once = blocks_at_once;
    return document_parts(arguments, groups, documents);
}

// Run a kernel by name; `arguments` point at its parameters. Returns 0, or 1 with what went wrong in `error`.
extern "C" int launch(const char* kernel, u32 grid_x, u32 grid_y, u32 threads, u64 shared_bytes, u32 seed,
                      const void* const* arguments, char* error, u64 error_bytes) {
    const Arguments& a = *static_cast<const Arguments*>(arguments[0]);
    auto run = [&](auto function) { run_blocks(grid_x, grid_y, threads, shared_bytes, seed, function); };
    try {
        if (!strcmp(kernel, "index_queries")) run([&] { index_queries(a); });
        else if (!strcmp(kernel, "index_documents")) run([&] { index_documents(a); });
        else if (!strcmp(kernel, "compact_documents")) run([&] { compact_documents(a); });
        else if (!strcmp(kernel, "forward")) run([&] { forward(a); });
        else if (!strcmp(kernel, "forward_sm90")) {
            const TensorMap& documents = *static_cast<const TensorMap*>(arguments[1]);
            const TensorMap& compacted = *static_cast<const TensorMap*>(arguments[2]);
            run([&] { forward_sm90(a, documents, compacted); });
        } else if (!strcmp(kernel, "sum_slabs")) run([&] { sum_slabs(a); });
        else if (!strcmp(kernel, "query_gradient")) run([&] { query_gradient(a); });
        else if (!strcmp(kernel, "document_gradient")) run([&] { document_gradient(a); });
        else throw std::runtime_error(std::string("no kernel ") + kernel);
    } catch (const std::exception& failure) {
        snprintf(error, error_bytes, "%s: %s", kernel, failure.what());
        return 1;
    }
    return 0;
}
