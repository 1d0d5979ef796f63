// Runs the text of a CUDA kernel on the host: one block at a time, one fibre (a stack and a saved stack pointer) per
// thread. Stands in the place of ptx.cuh, so the text that NVRTC compiles for a GPU compiles unchanged with
//
//     g++ -std=c++20 -O2 -march=native -Wall -Wextra -Wno-unknown-pragmas -DBFLOAT16=1
//
// (g++ 12 ignores a diagnostic pragma for -Wunknown-pragmas, hence the flag for `#pragma unroll`.)
//
// Whatever is asynchronous on the GPU is late here too, and threads run in an order drawn from a seed, so that a
// missing wait or barrier shows as a wrong result, an exception or a deadlock, which is detected and thrown.
// Threads change only inside the primitives below: a race between two plain accesses with no primitive in between
// does not show, nor does any rule of the GPU's memory model (proxies, store order).
//
// State is global and static: one translation unit per program or shared library, one host thread.
#pragma once

#include <stdarg.h>
#include <stdio.h>
#include <sys/mman.h>

#include <stdexcept>
#include <vector>

#if defined(__x86_64__) && !defined(EMULATOR_UCONTEXT)
#define EMULATOR_ASSEMBLY 1
#else
#define EMULATOR_ASSEMBLY 0
#include <ucontext.h>
#endif

#ifndef BFLOAT16
#error "compile with -DBFLOAT16=1 for bf16 operands or -DBFLOAT16=0 for f16"
#endif

#ifndef LATEFORGE_TYPES
#define LATEFORGE_TYPES
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;
#endif

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

// ---------------------------------------------------------------------------------------------------------------------
// Types and CUDA built-ins that kernels name
// ---------------------------------------------------------------------------------------------------------------------

struct EmulatedIndex {
    u32 x, y, z;
};
static EmulatedIndex threadIdx, blockIdx, blockDim, gridDim;

// What the host fills in place of the opaque 128-byte CUtensorMap: a row-major matrix of 2-byte elements, cut into
// boxes that land in shared memory with the 128-byte swizzle.
struct alignas(64) TensorMap {
    const u16* base;
    i64 rows;
    i64 columns;
    int box_rows;
    int box_columns;  // always 64: one swizzled row of 128 bytes
    unsigned char padding[96] = {};
};
static_assert(sizeof(TensorMap) == 128);

// An mbarrier. Shared memory starts as all ones, which no initialised barrier is (expected never reaches 2^20 - 1).
struct Barrier {
    u64 expected : 20;  // arrivals that complete a phase
    u64 pending : 20;   // arrivals still missing in this phase
    i64 bytes : 22;     // announced by barrier_expect and not yet landed; below zero when they land first
    u64 phase : 1;      // parity of the phase in progress
};
static_assert(sizeof(Barrier) == 8);

#ifdef __SANITIZE_ADDRESS__
extern "C" void __asan_unpoison_memory_region(const volatile void*, size_t);
#endif

// ---------------------------------------------------------------------------------------------------------------------
// The machine: fibres, the scheduler, copies and products in flight
// ---------------------------------------------------------------------------------------------------------------------

namespace emulator {
namespace {

constexpr int MAX_THREADS = 1024;
constexpr int MAX_WARPS = MAX_THREADS / 32;
constexpr int HOST = MAX_THREADS;                // index of run_blocks's own context among the fibres'
constexpr size_t MAX_SHARED_BYTES = 227 * 1024;  // what an H100 grants a block
constexpr size_t CANARY_BYTES = 1024;            // past the block's shared memory, checked when the block ends
constexpr unsigned char CANARY = 0xA5;
constexpr size_t STACK_BYTES = 64 * 1024;
constexpr size_t GUARD_BYTES = 64 * 1024;  // no access below each stack, so that an overflow faults
constexpr i64 WHEN_STUCK = 1ll << 62;      // due only when no thread can run

alignas(1024) unsigned char shared[MAX_SHARED_BYTES + CANARY_BYTES];
size_t shared_bytes;

// --- Fibres ---

#if EMULATOR_ASSEMBLY
struct Context {
    void* stack_pointer;
};

// Saves the callee-saved registers of System V on one stack, restores them from another, returns there. swapcontext
// would do the same with a system call for the signal mask. noipa: the compiler must assume all memory changes.
__attribute__((naked, noipa)) void switch_context(Context* /* rdi: from */, Context* /* rsi: to */) {
    __asm__(
        "push %rbp\n push %rbx\n push %r12\n push %r13\n push %r14\n push %r15\n"
        "mov %rsp, (%rdi)\n"
        "mov (%rsi), %rsp\n"
        "pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbx\n pop %rbp\n"
        "ret\n");
}

inline void prepare_context(Context& context, unsigned char* stack, size_t bytes, void (*entry)()) {
    void** top = reinterpret_cast<void**>(stack + bytes);
    *--top = nullptr;  // where entry would return to; leaves the stack aligned as a call does
    *--top = reinterpret_cast<void*>(entry);
    for (int callee_saved = 0; callee_saved < 6; callee_saved++) *--top = nullptr;
    context.stack_pointer = top;
}
#else
struct Context {
    ucontext_t context;
};

__attribute__((noipa)) void switch_context(Context* from, Context* to) { swapcontext(&from->context, &to->context); }

inline void prepare_context(Context& context, unsigned char* stack, size_t bytes, void (*entry)()) {
    getcontext(&context.context);
    context.context.uc_stack.ss_sp = stack;
    context.context.uc_stack.ss_size = bytes;
    context.context.uc_link = nullptr;
    makecontext(&context.context, entry, 0);
}
#endif

struct SharedCopy {
    void* destination;
    const void* source;
    int group;
};

enum Place { RUNNING, AT_SYNCTHREADS, AT_WARP_OPERATION, AT_BARRIER_WAIT, AT_WGMMA_WAIT };

struct Fibre {
    unsigned char* stack;    // allocated once, reused by every block
    Place place;             // where it waits
    const Barrier* barrier;  // awaited there with this parity, if AT_BARRIER_WAIT
    u32 parity;

    std::vector<SharedCopy> copies;  // issued by cp.async and not landed, oldest first
    int open_group;                  // cp.async group that the next commit closes

    // A batch is what lies between two wgmma_waits; accumulators are the d's that it writes.
    int batch;
    size_t issued;
    bool fenced, committed;
    std::vector<float*> accumulators;
};

Fibre fibres[MAX_THREADS];
Context contexts[MAX_THREADS + 1];
int current = HOST;

// --- Warps ---

struct Warp {
    u32 runnable;               // bit per lane
    u32 polling;                // bit per lane that waits for a barrier or for wgmma
    int arrived;                // lanes at the warp operation in progress
    void (*operation)(void**);  // which operation that is
    void* calls[32];            // its arguments and results, on the stacks of the lanes
};

// --- Work in flight ---

struct Box {
    unsigned char* destination;
    TensorMap map;  // a copy: the kernel's parameter is gone when its thread returns
    int column, row;
    Barrier* barrier;
    i64 due;
};

constexpr int MAX_COLUMNS = 128;

struct Product {
    u64 descriptor;
    int columns;
    int accumulate;
    size_t accumulator;
    int issued;              // by how many of the 128 threads
    u32 a[128][4];           // each thread's fragment
    u16 b[MAX_COLUMNS][16];  // what shared memory held when the first thread issued it
};

struct Accumulator {
    float values[64][MAX_COLUMNS];
};

struct Batch {
    std::vector<Product> products;
    std::vector<Accumulator> accumulators;
    size_t ready;     // products issued by all 128 threads
    size_t executed;  // of those
    int departed;     // threads that took their results
};

// Two batches, because the first threads start the next batch while the last ones still take results of this one.
struct Warpgroup {
    Batch batches[2];
    i64 due;  // turn at which the ready products execute
};

// --- The block ---

struct Block {
    u32 seed;
    u64 random;
    int threads, warps;
    int running;  // threads that have not returned
    int at_syncthreads;
    Warp warp[MAX_WARPS];
    Warpgroup warpgroup[MAX_WARPS / 4];
    std::vector<Box> boxes;

    // One round gives each warp a turn; a turn is some passes over the lanes of a warp.
    int round[MAX_WARPS];
    int next_in_round;
    i64 turn;
    int turn_warp;
    int passes_left;
    int lane_position;
    u32 lane_stride, lane_offset;

    void (*invoke)(void* kernel);
    void* kernel;
    char failure[400];
};
Block block;

inline u32 draw(u32 bound) {
    // xorshift64*; a modulo bias does not matter here
    block.random ^= block.random >> 12;
    block.random ^= block.random << 25;
    block.random ^= block.random >> 27;
    return static_cast<u32>((block.random * 2685821657736338717ull) >> 33) % bound;
}

inline void resume(int next) {
    if (next == current) return;
    const int previous = current;
    current = next;
    threadIdx.x = static_cast<u32>(next);
    switch_context(&contexts[previous], &contexts[next]);
}

// An exception cannot cross from one stack to another: leave the text for run_blocks, which throws it.
[[noreturn]] __attribute__((noinline, format(printf, 1, 2))) void fail(const char* format, ...) {
    int length = snprintf(block.failure, sizeof(block.failure), "block (%u, %u), thread %d: ", blockIdx.x, blockIdx.y,
                          current);
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(block.failure + length, sizeof(block.failure) - static_cast<size_t>(length), format, arguments);
    va_end(arguments);
    resume(HOST);
    __builtin_unreachable();
}

inline i64 shared_offset(const void* pointer) { return static_cast<const unsigned char*>(pointer) - shared; }

inline void require_shared(const char* primitive, const void* pointer, size_t bytes, size_t alignment) {
    const i64 offset = shared_offset(pointer);
    if (offset < 0 || static_cast<u64>(offset) + bytes > shared_bytes) {
        fail("%s: bytes %lld to %lld are outside the %zu bytes of shared memory", primitive, offset,
             offset + static_cast<i64>(bytes), shared_bytes);
    }
    if (static_cast<u64>(offset) % alignment != 0) {
        fail("%s: shared offset %lld is not a multiple of %zu", primitive, offset, alignment);
    }
}

// The 128-byte swizzle: the 16-byte chunk of an address (bits 4-6) is XORed with its 128-byte row (bits 7-9).
inline u64 swizzle(u64 offset) { return offset ^ ((offset >> 7 & 7) << 4); }

// --- Number formats ---

template <class To, class From>
inline To bits_of(From value) {
    return __builtin_bit_cast(To, value);
}

inline float half_to_float(u16 half) {
    if constexpr (BFLOAT16) return bits_of<float>(static_cast<u32>(half) << 16);
    // By hand, because without -mf16c each conversion of _Float16 is a call into libgcc. Moves exponent and mantissa in
    // place and corrects the exponent's bias by a product, which also normalises subnormals.
    const float magnitude = bits_of<float>((half & 0x7FFFu) << 13) * 0x1p112f;
    const u32 infinite = magnitude >= 65536.0f ? 0x7F800000u : 0u;
    return bits_of<float>(bits_of<u32>(magnitude) | infinite | (half & 0x8000u) << 16);
}

// To nearest, ties to even; every NaN becomes 0x7FFF, as cvt.rn does.
inline u16 float_to_half(float value) {
    const u32 bits = bits_of<u32>(value), magnitude = bits & 0x7FFFFFFFu, sign = bits >> 16 & 0x8000u;
    if (magnitude > 0x7F800000u) return 0x7FFF;
    if constexpr (BFLOAT16) return static_cast<u16>((bits + 0x7FFFu + (bits >> 16 & 1)) >> 16);
    if (magnitude >= 0x477FF000u) return static_cast<u16>(sign | 0x7C00u);  // from 65520 on: infinity
    if (magnitude < 0x38800000u) {
        // Subnormal below 2^-14. The sum is rounded at 2^-24, an f16 subnormal's last place, by the addition itself.
        return static_cast<u16>(sign | (bits_of<u32>(bits_of<float>(magnitude) + 0.5f) - bits_of<u32>(0.5f)));
    }
    return static_cast<u16>(sign | ((magnitude - 0x38000000u + 0xFFFu + (magnitude >> 13 & 1)) >> 13));
}

inline float low_half(u32 pair) { return half_to_float(static_cast<u16>(pair)); }
inline float high_half(u32 pair) { return half_to_float(static_cast<u16>(pair >> 16)); }

// --- Barriers ---

inline void complete_phase_if_due(Barrier* barrier) {
    if (barrier->pending != 0 || barrier->bytes != 0) return;
    barrier->phase ^= 1;
    barrier->pending = barrier->expected;
}

inline void require_barrier(const char* primitive, const Barrier* barrier) {
    require_shared(primitive, barrier, sizeof(Barrier), sizeof(Barrier));
    if (barrier->expected == 0xFFFFF) fail("%s: the barrier was never initialised", primitive);
}

inline void arrive(const char* primitive, Barrier* barrier, u32 bytes) {
    require_barrier(primitive, barrier);
    if (bytes > 0xFFFFF) fail("%s: %u bytes are more than a barrier counts", primitive, bytes);
    if (barrier->pending == 0) fail("%s: more arrivals than barrier_init announced", primitive);
    barrier->bytes += bytes;
    barrier->pending--;
    complete_phase_if_due(barrier);
}

// --- Boxes (cp.async.bulk.tensor) ---

inline void land(const Box& box) {
    const TensorMap& map = box.map;
    for (int r = 0; r < map.box_rows; r++) {
        const i64 row = static_cast<i64>(box.row) + r;
        const u64 start = static_cast<u64>(shared_offset(box.destination)) + static_cast<u64>(r) * 128;
        for (int chunk = 0; chunk < 8; chunk++) {
            const i64 column = static_cast<i64>(box.column) + chunk * 8;
            u16 values[8] = {};
            if (row >= 0 && row < map.rows) {
                const u16* source = map.base + row * map.columns;
                for (int c = 0; c < 8; c++) {
                    if (column + c >= 0 && column + c < map.columns) values[c] = source[column + c];
                }
            }
            __builtin_memcpy(shared + swizzle(start + static_cast<u64>(chunk) * 16), values, 16);
        }
    }
    box.barrier->bytes -= map.box_rows * map.box_columns * 2;
    complete_phase_if_due(box.barrier);
}

// --- Products (wgmma) ---

// Compile with -march=native: three times as fast where that brings AVX2.
#ifdef __AVX2__
typedef float Vector __attribute__((vector_size(32), aligned(4), may_alias));
#else
typedef float Vector __attribute__((vector_size(16), aligned(4), may_alias));
#endif
constexpr int VECTOR_COLUMNS = sizeof(Vector) / sizeof(float);

// sum (ROWS x COLUMNS) += a (ROWS x 16) * b (16 x COLUMNS), with sums of eight rows kept in registers. A product of two
// halves is exact in float32, so it does not matter whether the compiler fuses it with the addition.
template <int ROWS, int STRIDE>
inline void add_product(float (&sum)[ROWS][STRIDE], const float (&a)[ROWS][16], const float (&b)[16][STRIDE],
                        int columns) {
    for (int row = 0; row < ROWS; row += 8) {
        for (int column = 0; column < columns; column += VECTOR_COLUMNS) {
            Vector partial[8];
#pragma GCC unroll 8
            for (int r = 0; r < 8; r++) partial[r] = *reinterpret_cast<Vector*>(&sum[row + r][column]);
            for (int k = 0; k < 16; k++) {
                const Vector right = *reinterpret_cast<const Vector*>(&b[k][column]);
#pragma GCC unroll 8
                for (int r = 0; r < 8; r++) partial[r] += a[row + r][k] * right;
            }
#pragma GCC unroll 8
            for (int r = 0; r < 8; r++) *reinterpret_cast<Vector*>(&sum[row + r][column]) = partial[r];
        }
    }
}

// Rows and columns of the fragments of mma.sync.m16n8k16; wgmma's are four of these below each other, one per warp.
inline int fragment_row(int lane, int half) { return lane / 4 + half * 8; }
inline int fragment_column(int lane) { return lane % 4 * 2; }

// Register i of fragment a: rows in halves by i % 2, columns in halves by i / 2.
inline void unpack_rows(float (*a)[16], int lane, const u32* fragment) {
    for (int i = 0; i < 4; i++) {
        float* pair = &a[fragment_row(lane, i % 2)][i / 2 * 8 + fragment_column(lane)];
        pair[0] = low_half(fragment[i]);
        pair[1] = high_half(fragment[i]);
    }
}

inline void read_operand(u16 (*b)[16], u64 descriptor, int columns) {
    const u64 start = (descriptor & 0x3FFF) << 4, stride = (descriptor >> 32 & 0x3FFF) << 4;
    for (int n = 0; n < columns; n++) {
        const u64 row = start + static_cast<u64>(n / 8) * stride + static_cast<u64>(n % 8) * 128;
        __builtin_memcpy(&b[n][0], shared + swizzle(row), 16);
        __builtin_memcpy(&b[n][8], shared + swizzle(row + 16), 16);
    }
}

inline void require_operand(u64 descriptor, int columns) {
    const u64 start = (descriptor & 0x3FFF) << 4, stride = (descriptor >> 32 & 0x3FFF) << 4;
    if (descriptor >> 62 != 1) fail("wgmma: the descriptor does not ask for the 128-byte swizzle");
    if (stride != 1024) fail("wgmma: stride between groups of 8 rows is %llu bytes, not 1024", stride);
    if ((start & 0x380) != 0) fail("wgmma: operand at shared offset %llu does not start at a swizzle atom", start);
    if ((start & 0x7F) > 96) fail("wgmma: 16 columns from shared offset %llu leave the 128-byte row", start);
    if ((start & ~0x7Full) + static_cast<u64>(columns) * 128 > shared_bytes) {
        fail("wgmma: operand at shared offset %llu ends outside shared memory", start);
    }
}

inline void execute(Batch& batch, const Product& product) {
    static float a[64][16], b[16][MAX_COLUMNS];
    static u16 operand[MAX_COLUMNS][16];
    float(&sum)[64][MAX_COLUMNS] = batch.accumulators[product.accumulator].values;
    const size_t operand_bytes = static_cast<size_t>(product.columns) * sizeof(operand[0]);
    read_operand(operand, product.descriptor, product.columns);
    if (__builtin_memcmp(operand, product.b, operand_bytes) != 0) {
        fprintf(stderr, "emulator: block (%u, %u): shared memory under a wgmma changed before it was complete\n",
                blockIdx.x, blockIdx.y);
        __builtin_memset(sum, 0xFF, sizeof(sum));  // NaN, as the GPU may see any mixture
        return;
    }
    for (int thread = 0; thread < 128; thread++) unpack_rows(a + thread / 32 * 16, thread % 32, product.a[thread]);
    for (int n = 0; n < product.columns; n++) {
        for (int k = 0; k < 16; k++) b[k][n] = half_to_float(operand[n][k]);
    }
    if (!product.accumulate) __builtin_memset(sum, 0, sizeof(sum));
    add_product(sum, a, b, product.columns);
}

// At most one batch of a warpgroup has ready products: the other waits for its last threads.
inline Batch* ready_batch(Warpgroup& warpgroup) {
    for (Batch& batch : warpgroup.batches) {
        if (batch.ready > batch.executed) return &batch;
    }
    return nullptr;
}

inline void execute_ready(Warpgroup& warpgroup) {
    Batch& batch = *ready_batch(warpgroup);
    while (batch.executed < batch.ready) {
        execute(batch, batch.products[batch.executed]);
        batch.executed++;
    }
}

// --- The scheduler ---

inline bool may_continue(const Fibre& fibre, int thread) {
    if (fibre.place == AT_BARRIER_WAIT) return fibre.barrier->phase != fibre.parity;
    return block.warpgroup[thread / 128].batches[fibre.batch % 2].executed >= fibre.issued;
}

inline void wake_polling_lanes(int warp_index) {
    Warp& warp = block.warp[warp_index];
    for (u32 lanes = warp.polling; lanes != 0; lanes &= lanes - 1) {
        const int lane = __builtin_ctz(lanes), thread = warp_index * 32 + lane;
        if (!may_continue(fibres[thread], thread)) continue;
        warp.polling &= ~(1u << lane);
        warp.runnable |= 1u << lane;
    }
}

inline void finish_due_work() {
    for (size_t i = 0; i < block.boxes.size();) {
        if (block.boxes[i].due > block.turn) {
            i++;
            continue;
        }
        land(block.boxes[i]);
        block.boxes.erase(block.boxes.begin() + static_cast<i64>(i));
    }
    for (int i = 0; i < block.threads / 128; i++) {
        Warpgroup& warpgroup = block.warpgroup[i];
        if (warpgroup.due <= block.turn && ready_batch(warpgroup)) execute_ready(warpgroup);
    }
}

// When no thread can run. Returns whether anything was in flight.
inline bool finish_any_work() {
    Warpgroup* ready[MAX_WARPS / 4];
    u32 num_ready = 0, num_boxes = static_cast<u32>(block.boxes.size());
    for (int i = 0; i < block.threads / 128; i++) {
        if (ready_batch(block.warpgroup[i])) ready[num_ready++] = &block.warpgroup[i];
    }
    if (num_boxes + num_ready == 0) return false;
    // Plain order takes boxes first: a box that overwrites an operand too early does so before the product reads it.
    const u32 choice = block.seed == 0 ? 0 : draw(num_boxes + num_ready);
    if (choice < num_boxes) {
        land(block.boxes[choice]);
        block.boxes.erase(block.boxes.begin() + choice);
    } else {
        execute_ready(*ready[choice - num_boxes]);
    }
    return true;
}

inline void start_pass() {
    block.lane_position = 0;
    block.lane_stride = block.seed == 0 ? 1 : draw(16) * 2 + 1;  // odd, so that it visits all 32 lanes
    block.lane_offset = block.seed == 0 ? 0 : draw(32);
    block.passes_left--;
}

inline void report_deadlock() {
    static const char* const names[] = {"", "__syncthreads", "a warp operation", "barrier_wait", "wgmma_wait"};
    char* text = block.failure;
    char* const end = text + sizeof(block.failure);
    text += snprintf(text, sizeof(block.failure), "deadlock in block (%u, %u): %d of %d threads returned", blockIdx.x,
                     blockIdx.y, block.threads - block.running, block.threads);
    for (Place place : {AT_SYNCTHREADS, AT_WARP_OPERATION, AT_BARRIER_WAIT, AT_WGMMA_WAIT}) {
        int waiting = 0, first = 0;
        for (int thread = block.threads - 1; thread >= 0; thread--) {
            if (fibres[thread].place != place) continue;
            waiting++;
            first = thread;
        }
        if (waiting == 0) continue;
        text += snprintf(text, static_cast<size_t>(end - text), ", %d at %s (first %d)", waiting, names[place], first);
        if (place != AT_BARRIER_WAIT) continue;
        text += snprintf(text, static_cast<size_t>(end - text), " for parity %u of the barrier at shared offset %lld",
                         fibres[first].parity, shared_offset(fibres[first].barrier));
    }
}

// Chooses the next warp that can run. A turn lasts from one pass (up to the next operation of the warp) to many, so
// that warps run close together at times and far apart at others; in plain order, until the warp can do no more.
inline bool start_turn() {
    for (;;) {
        block.turn++;
        finish_due_work();
        for (int tried = 0; tried < block.warps * 2; tried++) {  // the rest of this round and all of the next
            if (block.next_in_round == block.warps) {
                block.next_in_round = 0;
                for (int i = block.warps - 1; block.seed != 0 && i > 0; i--) {
                    const u32 other = draw(static_cast<u32>(i) + 1);
                    const int warp = block.round[i];
                    block.round[i] = block.round[other];
                    block.round[other] = warp;
                }
            }
            block.turn_warp = block.round[block.next_in_round++];
            wake_polling_lanes(block.turn_warp);
            if (block.warp[block.turn_warp].runnable == 0) continue;
            block.passes_left = block.seed == 0 ? 0x7FFFFFFF : 1 << draw(8);
            start_pass();
            return true;
        }
        if (!finish_any_work()) {
            report_deadlock();
            return false;
        }
    }
}

// Runs on the stack of whoever stops, so that a change of threads is a single switch.
inline int choose_next() {
    for (;;) {
        const Warp& warp = block.warp[block.turn_warp];
        while (block.lane_position < 32) {
            const u32 lane = (static_cast<u32>(block.lane_position++) * block.lane_stride + block.lane_offset) % 32;
            if (warp.runnable >> lane & 1) return block.turn_warp * 32 + static_cast<int>(lane);
        }
        if (block.passes_left > 0) wake_polling_lanes(block.turn_warp);
        if (block.passes_left > 0 && warp.runnable != 0) {
            start_pass();
        } else if (!start_turn()) {
            return HOST;
        }
    }
}

// Stops the current thread until its bit in runnable is set again. noinline: with a single call of switch_context the
// processor predicts its return.
__attribute__((noinline)) void suspend(Place place) {
    Warp& warp = block.warp[current / 32];
    const u32 lane = 1u << current % 32;
    warp.runnable &= ~lane;
    if (place == AT_BARRIER_WAIT || place == AT_WGMMA_WAIT) warp.polling |= lane;
    const int thread = current;
    fibres[thread].place = place;
    resume(choose_next());
    fibres[thread].place = RUNNING;
}

// All 32 lanes bring their call; the last one performs the operation for all.
template <class Call>
inline void meet_warp(Call& call) {
    Warp& warp = block.warp[current / 32];
    if (warp.arrived == 0) warp.operation = Call::perform;
    if (warp.operation != Call::perform) fail("lanes of a warp are at different warp operations");
    warp.calls[current % 32] = &call;
    if (++warp.arrived < 32) return suspend(AT_WARP_OPERATION);
    warp.arrived = 0;
    Call::perform(warp.calls);
    warp.runnable = ~0u;
}

template <class Call>
inline Call& call_of(void** calls, int lane) {
    return *static_cast<Call*>(calls[lane]);
}

inline void require_full_mask(const char* primitive, u32 mask) {
    if (mask != ~0u) fail("%s: mask %08x leaves lanes out", primitive, mask);
}

struct Synchronize {
    static void perform(void**) {}
};

struct Ballot {
    u32 predicate;  // 0 or 1
    u32 result;

    static void perform(void** calls) {
        u32 ballot = 0;
        for (int lane = 0; lane < 32; lane++) ballot |= call_of<Ballot>(calls, lane).predicate << lane;
        for (int lane = 0; lane < 32; lane++) call_of<Ballot>(calls, lane).result = ballot;
    }
};

struct Shuffle {
    u32 value;
    u32 source;
    u32 result;

    static void perform(void** calls) {
        for (int lane = 0; lane < 32; lane++) {
            Shuffle& call = call_of<Shuffle>(calls, lane);
            call.result = call_of<Shuffle>(calls, static_cast<int>(call.source % 32)).value;
        }
    }
};

template <class Value>
inline Value shuffle(Value value, u32 source) {
    static_assert(sizeof(Value) == 4);
    Shuffle call{bits_of<u32>(value), source, 0};
    meet_warp(call);
    return bits_of<Value>(call.result);
}

struct LoadMatrices {
    u32* fragment;
    const void* row;

    static void perform(void** calls) {
        for (int lane = 0; lane < 32; lane++) {
            for (int matrix = 0; matrix < 4; matrix++) {
                const void* row = call_of<LoadMatrices>(calls, matrix * 8 + lane / 4).row;
                __builtin_memcpy(&call_of<LoadMatrices>(calls, lane).fragment[matrix],
                                 static_cast<const unsigned char*>(row) + lane % 4 * 4, 4);
            }
        }
    }
};

struct Multiply {
    float* c;
    const u32* a;
    u32 b[2];

    static void perform(void** calls) {
        float a[16][16], b[16][8], c[16][8];
        for (int lane = 0; lane < 32; lane++) {
            const Multiply& call = call_of<Multiply>(calls, lane);
            unpack_rows(a, lane, call.a);
            for (int i = 0; i < 2; i++) {
                // b is a 16 x 8 matrix stored by columns: a lane's pair runs along k
                const int k = fragment_column(lane) + i * 8, n = lane / 4;
                b[k][n] = low_half(call.b[i]);
                b[k + 1][n] = high_half(call.b[i]);
            }
            for (int i = 0; i < 4; i++) c[fragment_row(lane, i / 2)][fragment_column(lane) + i % 2] = call.c[i];
        }
        add_product(c, a, b, 8);
        for (int lane = 0; lane < 32; lane++) {
            float* result = call_of<Multiply>(calls, lane).c;
            for (int i = 0; i < 4; i++) result[i] = c[fragment_row(lane, i / 2)][fragment_column(lane) + i % 2];
        }
    }
};

inline void issue_product(float* d, int columns, const u32* a, u64 descriptor, int accumulate) {
    Fibre& fibre = fibres[current];
    Warpgroup& warpgroup = block.warpgroup[current / 128];
    Batch& batch = warpgroup.batches[fibre.batch % 2];
    const int thread = current % 128;
    if (!fibre.fenced) fail("wgmma: no wgmma_fence since the last wgmma_wait");
    fibre.committed = false;

    size_t accumulator = 0;
    while (accumulator < fibre.accumulators.size() && fibre.accumulators[accumulator] != d) accumulator++;
    if (accumulator == fibre.accumulators.size()) {
        fibre.accumulators.push_back(d);
        if (accumulator == batch.accumulators.size()) batch.accumulators.emplace_back();
        float(*values)[MAX_COLUMNS] = batch.accumulators[accumulator].values + thread / 32 * 16;
        for (int i = 0; accumulate && i < columns / 2; i++) {
            values[fragment_row(thread % 32, i / 2 % 2)][i / 4 * 8 + fragment_column(thread % 32) + i % 2] = d[i];
        }
        __builtin_memset(d, 0xFF, static_cast<size_t>(columns / 2) * sizeof(float));  // NaN until wgmma_wait
    }

    const size_t index = fibre.issued++;
    if (index == batch.products.size()) {
        require_operand(descriptor, columns);
        Product& created = batch.products.emplace_back();
        created.descriptor = descriptor;
        created.columns = columns;
        created.accumulate = accumulate != 0;
        created.accumulator = accumulator;
        read_operand(created.b, descriptor, columns);
    }
    Product& product = batch.products[index];
    if (product.descriptor != descriptor || product.columns != columns || product.accumulate != (accumulate != 0) ||
        product.accumulator != accumulator) {
        fail("wgmma: differs from what another thread of the warpgroup issued");
    }
    __builtin_memcpy(product.a[thread], a, sizeof(product.a[thread]));
    if (++product.issued < 128) return;
    if (batch.ready++ > batch.executed) return;
    // As late as possible in plain order and in half of the draws: that is what finds an operand released too early.
    const u32 delay = block.seed == 0 ? 2 : draw(4);
    warpgroup.due = delay == 0 ? block.turn : delay == 1 ? block.turn + draw(8) : WHEN_STUCK;
}

inline void wait_for_products() {
    Fibre& fibre = fibres[current];
    Batch& batch = block.warpgroup[current / 128].batches[fibre.batch % 2];
    const int thread = current % 128;
    fibre.fenced = false;
    if (fibre.issued == 0) return;
    if (!fibre.committed) fail("wgmma_wait: a wgmma was issued without wgmma_commit");
    if (fibre.issued != batch.products.size()) fail("wgmma_wait: another thread issued more wgmmas");
    if (batch.executed < fibre.issued) suspend(AT_WGMMA_WAIT);
    for (size_t i = 0; i < fibre.accumulators.size(); i++) {
        float* d = fibre.accumulators[i];
        const float(*values)[MAX_COLUMNS] = batch.accumulators[i].values + thread / 32 * 16;
        int columns = 0;
        for (const Product& product : batch.products) {
            if (product.accumulator == i) columns = product.columns;
        }
        for (int j = 0; j < columns / 2; j++) {
            if (bits_of<u32>(d[j]) != ~0u) fail("wgmma_wait: the accumulator was written while in flight");
            d[j] = values[fragment_row(thread % 32, j / 2 % 2)][j / 4 * 8 + fragment_column(thread % 32) + j % 2];
        }
    }
    fibre.accumulators.clear();
    fibre.issued = 0;
    fibre.batch++;
    if (++batch.departed < 128) return;
    batch.products.clear();
    batch.accumulators.clear();
    batch.ready = batch.executed = 0;
    batch.departed = 0;
}

// --- Running a block ---

inline void fibre_main() {
    block.invoke(block.kernel);
    Warp& warp = block.warp[current / 32];
    warp.runnable &= ~(1u << current % 32);
    resume(--block.running == 0 ? HOST : choose_next());
    __builtin_unreachable();
}

inline void prepare_fibre(int thread) {
    Fibre& fibre = fibres[thread];
    if (!fibre.stack) {
        void* memory = mmap(nullptr, GUARD_BYTES + STACK_BYTES, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED || mprotect(memory, GUARD_BYTES, PROT_NONE) != 0) {
            throw std::runtime_error("emulator: no memory for the stack of a fibre");
        }
        fibre.stack = static_cast<unsigned char*>(memory) + GUARD_BYTES;
    }
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(fibre.stack, STACK_BYTES);  // a run that failed left its frames there
#endif
    fibre.place = RUNNING;
    fibre.copies.clear();
    fibre.open_group = 0;
    fibre.batch = 0;
    fibre.issued = 0;
    fibre.fenced = fibre.committed = false;
    fibre.accumulators.clear();
    // Stacks start 256 bytes apart modulo 4096, or the frames of all fibres would compete for the same cache sets.
    prepare_context(contexts[thread], fibre.stack, STACK_BYTES - static_cast<size_t>(thread % 16) * 256, fibre_main);
}

inline void prepare_block(u32 seed) {
    block.seed = seed;
    block.random = ((seed * 1000003ull + blockIdx.x) * 1000003ull + blockIdx.y) * 2654435761ull + 88172645463325252ull;
    for (int i = 0; i < 4; i++) draw(1);  // seeds that differ in a few bits differ in all after some steps
    block.running = block.threads;
    block.at_syncthreads = 0;
    for (int i = 0; i < block.warps; i++) {
        block.warp[i].runnable = ~0u;
        block.warp[i].polling = 0;
        block.warp[i].arrived = 0;
        block.round[i] = i;
    }
    for (Warpgroup& warpgroup : block.warpgroup) {
        for (Batch& batch : warpgroup.batches) {
            batch.products.clear();
            batch.accumulators.clear();
            batch.ready = batch.executed = 0;
            batch.departed = 0;
        }
    }
    block.boxes.clear();
    block.next_in_round = block.warps;
    block.turn = 0;
    block.turn_warp = 0;
    block.passes_left = 0;
    block.lane_position = 32;
    block.failure[0] = 0;
    __builtin_memset(shared, 0xFF, shared_bytes);
    __builtin_memset(shared + shared_bytes, CANARY, CANARY_BYTES);
    for (int thread = 0; thread < block.threads; thread++) prepare_fibre(thread);
}

inline void run_block(u32 seed) {
    prepare_block(seed);
    resume(choose_next());
    if (block.failure[0] == 0 && !block.boxes.empty()) {
        snprintf(block.failure, sizeof(block.failure), "block (%u, %u) ended with %zu boxes in flight", blockIdx.x,
                 blockIdx.y, block.boxes.size());
    }
    for (size_t i = 0; block.failure[0] == 0 && i < CANARY_BYTES; i++) {
        if (shared[shared_bytes + i] == CANARY) continue;
        snprintf(block.failure, sizeof(block.failure), "block (%u, %u) wrote %zu bytes past its shared memory",
                 blockIdx.x, blockIdx.y, i);
    }
    if (block.failure[0] == 0) return;
    fprintf(stderr, "emulator: %s\n", block.failure);
    throw std::runtime_error(block.failure);
}

}  // namespace
}  // namespace emulator

// ---------------------------------------------------------------------------------------------------------------------
// Running a grid
// ---------------------------------------------------------------------------------------------------------------------

// Calls kernel() once per thread of each block. Seed 0 runs warps and lanes in plain order, any other seed in an order
// of its own. Throws std::runtime_error, after a line on stderr, on a deadlock or a misuse of a primitive.
template <class Function>
void run_blocks(u32 grid_x, u32 grid_y, u32 threads, size_t shared_bytes, u32 seed, Function kernel) {
    using namespace emulator;
    if (threads == 0 || threads > MAX_THREADS || threads % 32 != 0) {
        throw std::runtime_error("run_blocks: threads must be a multiple of 32, at most 1024");
    }
    if (shared_bytes > MAX_SHARED_BYTES) throw std::runtime_error("run_blocks: more than 227 KiB of shared memory");
    emulator::shared_bytes = shared_bytes;
    block.threads = static_cast<int>(threads);
    block.warps = block.threads / 32;
    block.kernel = &kernel;
    block.invoke = [](void* function) { (*static_cast<Function*>(function))(); };
    gridDim = {grid_x, grid_y, 1};
    blockDim = {threads, 1, 1};
    for (u32 y = 0; y < grid_y; y++) {
        for (u32 x = 0; x < grid_x; x++) {
            blockIdx = {x, y, 0};
            run_block(seed);
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// CUDA built-in functions
// ---------------------------------------------------------------------------------------------------------------------

// CUDA's overloads: two integers of one width, unsigned if either is. Mixed widths are ambiguous there too.
#define EMULATED_MIN_AND_MAX(Left, Right, Result)                                     \
    static inline Result min(Left left, Right right) {                                \
        const Result a = static_cast<Result>(left), b = static_cast<Result>(right);   \
        return a < b ? a : b;                                                         \
    }                                                                                 \
    static inline Result max(Left left, Right right) {                                \
        const Result a = static_cast<Result>(left), b = static_cast<Result>(right);   \
        return a > b ? a : b;                                                         \
    }
#define EMULATED_MIN_AND_MAX_OF_WIDTH(Integer)                                        \
    EMULATED_MIN_AND_MAX(Integer, Integer, Integer)                                   \
    EMULATED_MIN_AND_MAX(Integer, unsigned Integer, unsigned Integer)                 \
    EMULATED_MIN_AND_MAX(unsigned Integer, Integer, unsigned Integer)                 \
    EMULATED_MIN_AND_MAX(unsigned Integer, unsigned Integer, unsigned Integer)
EMULATED_MIN_AND_MAX_OF_WIDTH(int)
EMULATED_MIN_AND_MAX_OF_WIDTH(long)
EMULATED_MIN_AND_MAX_OF_WIDTH(long long)
#undef EMULATED_MIN_AND_MAX_OF_WIDTH
#undef EMULATED_MIN_AND_MAX

static inline int __popc(u32 bits) { return __builtin_popcount(bits); }

static inline void __syncthreads() {
    using namespace emulator;
    if (++block.at_syncthreads < block.threads) return suspend(AT_SYNCTHREADS);
    block.at_syncthreads = 0;
    for (int i = 0; i < block.warps; i++) block.warp[i].runnable = ~0u;
}

static inline void __syncwarp(u32 mask = ~0u) {
    emulator::require_full_mask("__syncwarp", mask);
    emulator::Synchronize call;
    emulator::meet_warp(call);
}

static inline u32 __ballot_sync(u32 mask, int predicate) {
    emulator::require_full_mask("__ballot_sync", mask);
    emulator::Ballot call{predicate != 0, 0};
    emulator::meet_warp(call);
    return call.result;
}

template <class Value>
inline Value __shfl_sync(u32 mask, Value value, int lane) {
    emulator::require_full_mask("__shfl_sync", mask);
    return emulator::shuffle(value, static_cast<u32>(lane));
}

template <class Value>
inline Value __shfl_xor_sync(u32 mask, Value value, int lane_mask) {
    emulator::require_full_mask("__shfl_xor_sync", mask);
    return emulator::shuffle(value, threadIdx.x % 32 ^ static_cast<u32>(lane_mask));
}

// ---------------------------------------------------------------------------------------------------------------------
// Primitives of ptx.cuh for all architectures
// ---------------------------------------------------------------------------------------------------------------------

static inline unsigned char* shared_memory() { return emulator::shared; }

// cp.async.cg of 16 bytes. The bytes land when the thread waits for their group; with a seed other than 0 one copy in
// four lands at once, which the GPU may do too and which shows a destination that is still being read.
static inline void copy_async(void* destination, const void* source) {
    using namespace emulator;
    require_shared("copy_async", destination, 16, 16);
    if (reinterpret_cast<u64>(source) % 16 != 0) fail("copy_async: the source is not aligned to 16 bytes");
    if (block.seed != 0 && draw(4) == 0) {
        __builtin_memcpy(destination, source, 16);
    } else {
        fibres[current].copies.push_back({destination, source, fibres[current].open_group});
    }
}

static inline void copy_async_commit() { emulator::fibres[emulator::current].open_group++; }

template <int PENDING>
inline void copy_async_wait() {
    emulator::Fibre& fibre = emulator::fibres[emulator::current];
    size_t landed = 0;
    while (landed < fibre.copies.size() && fibre.copies[landed].group < fibre.open_group - PENDING) {
        __builtin_memcpy(fibre.copies[landed].destination, fibre.copies[landed].source, 16);
        landed++;
    }
    fibre.copies.erase(fibre.copies.begin(), fibre.copies.begin() + static_cast<i64>(landed));
}

// ldmatrix.sync.aligned.m8n8.x4.shared.b16
static inline void load_matrices(u32 (&fragment)[4], const void* row) {
    emulator::require_shared("load_matrices", row, 16, 16);
    emulator::LoadMatrices call{fragment, row};
    emulator::meet_warp(call);
}

// mma.sync.aligned.m16n8k16.row.col.f32: c += a * b
static inline void multiply(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    emulator::Multiply call{c, a, {b0, b1}};
    emulator::meet_warp(call);
}

static inline float larger(float a, float b) {
    if (a != a || b != b) return __builtin_nanf("");
    return a > b ? a : b;
}

static inline u32 pack_halves(float low, float high) {
    return emulator::float_to_half(low) | static_cast<u32>(emulator::float_to_half(high)) << 16;
}

static inline void unpack_halves(u32 pair, float& low, float& high) {
    low = emulator::low_half(pair);
    high = emulator::high_half(pair);
}

// ---------------------------------------------------------------------------------------------------------------------
// Primitives of ptx.cuh for sm_90a
// ---------------------------------------------------------------------------------------------------------------------

static inline void barrier_init(Barrier* barrier, u32 arrivals) {
    emulator::require_shared("barrier_init", barrier, sizeof(Barrier), sizeof(Barrier));
    if (arrivals == 0 || arrivals >= 0xFFFFF) emulator::fail("barrier_init: %u arrivals", arrivals);
    barrier->expected = arrivals & 0xFFFFF;
    barrier->pending = arrivals & 0xFFFFF;
    barrier->bytes = 0;
    barrier->phase = 0;
}

static inline void barrier_fence() {}

static inline void barrier_expect(Barrier* barrier, u32 bytes) { emulator::arrive("barrier_expect", barrier, bytes); }

static inline void barrier_arrive(Barrier* barrier) { emulator::arrive("barrier_arrive", barrier, 0); }

static inline void barrier_wait(Barrier* barrier, u32 parity) {
    emulator::require_barrier("barrier_wait", barrier);
    if (parity > 1) emulator::fail("barrier_wait: parity %u", parity);
    if (barrier->phase != parity) return;
    emulator::Fibre& fibre = emulator::fibres[emulator::current];
    fibre.barrier = barrier;
    fibre.parity = parity;
    emulator::suspend(emulator::AT_BARRIER_WAIT);
}

// cp.async.bulk.tensor.2d with complete_tx. Lands up to 64 turns later; in plain order, and in a quarter of the draws,
// only when no thread can run, which finds a read that does not wait.
static inline void load_box(void* destination, const TensorMap* map, int column, int row, Barrier* barrier) {
    using namespace emulator;
    require_barrier("load_box", barrier);
    if (map->box_columns != 64 || map->box_rows < 1 || map->box_rows > 256) {
        fail("load_box: box of %d rows, %d columns", map->box_rows, map->box_columns);
    }
    if (map->columns % 8 != 0 || reinterpret_cast<u64>(map->base) % 16 != 0) {
        fail("load_box: a row of %lld elements or the base is not aligned to 16 bytes", map->columns);
    }
    require_shared("load_box", destination, static_cast<size_t>(map->box_rows) * 128, 1024);
    const i64 due = block.seed == 0 || draw(4) == 0 ? WHEN_STUCK : block.turn + 1 + draw(1u << draw(7));
    block.boxes.push_back({static_cast<unsigned char*>(destination), *map, column, row, barrier, due});
}

// wgmma's matrix descriptor: address, leading offset (unused with a swizzle), 1024 bytes between groups of eight rows,
// 128-byte swizzle. Addresses count from the start of shared memory.
static inline u64 descriptor(const void* pointer) {
    emulator::require_shared("descriptor", pointer, 16, 16);
    const u64 address = static_cast<u64>(emulator::shared_offset(pointer));
    return (address & 0x3FFFF) >> 4 | 1ull << 16 | (1024ull >> 4) << 32 | 1ull << 62;
}

static inline void wgmma_fence() { emulator::fibres[emulator::current].fenced = true; }
static inline void wgmma_commit() { emulator::fibres[emulator::current].committed = true; }
template <int SUMS>
static inline void wgmma_wait(float (&)[SUMS]) {
    emulator::wait_for_products();
}

// wgmma.mma_async m64nNk16. d holds NaN until wgmma_wait. The operand in shared memory is read when the first thread
// issues the product and again when it executes; if the two differ, d becomes NaN.
template <int N>
inline void wgmma(float (&d)[N / 2], const u32 (&a)[4], u64 b, int accumulate) {
    static_assert(N == 32 || N == 64 || N == 96 || N == 128);
    emulator::issue_product(d, N, a, b, accumulate);
}

template <int REGISTERS>
inline void raise_registers() {}

template <int REGISTERS>
inline void drop_registers() {}
