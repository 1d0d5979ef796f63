// The forward kernel of every GPU from sm_80 on: cp.async and mma.sync.
//
// A warp holds the vectors of SLABS_A_WARP slabs in registers for the whole kernel. The block's documents pass by in
// tiles of TILE tokens through a ring of STAGES buffers in shared memory, which all warps fill and read.
//
// grid: work_of_block; block: 32 threads for every SLABS_A_WARP slabs; shared memory: FORWARD_SHARED_BYTES.

// 16 bytes more than the vector: the stride is odd in chunks, so that the 8 rows of a matrix lie in 8 banks.
constexpr int ROW_BYTES = EMBEDDING * 2 + 16;
static_assert(FORWARD_SHARED_BYTES == STAGES * TILE * ROW_BYTES);

// Brings the tiles of documents [document, end) one after the other; documents without a scored token have none.
struct Loader {
    int document, end, token;

    __device__ __forceinline__ void load_next(const Arguments& a, unsigned char* stage) {
        while (document < end && token >= abs(a.document_lengths[document])) {
            document++;
            token = 0;
        }
        if (document < end) {
            const int length = a.document_lengths[document], rows = min(TILE, abs(length) - token);
            const i64 first = first_token(a.document_offsets, document, a.document_tokens) + token;
            const u16* vectors = (length < 0 ? a.compacted : a.documents) + first * EMBEDDING;
            for (int chunk = threadIdx.x; chunk < rows * CHUNKS; chunk += blockDim.x)
                copy_async(stage + chunk / CHUNKS * ROW_BYTES + chunk % CHUNKS * 16, vectors + chunk * 8);
            token += TILE;
        }
        copy_async_commit();  // also when empty, so that every turn has one group to wait for
    }
};

// Maxima of a tile of `columns` tokens, the first of which is `token`, for each slab of the warp.
__device__ __forceinline__ void score_tile(const u32 (&fragments)[SLABS_A_WARP][STEPS][4], const unsigned char* stage,
                                           int columns, int token, Best (&best)[SLABS_A_WARP]) {
    const int lane = threadIdx.x % 32;
    // Lanes 0-7 and 8-15 point at both halves of a step of the first 8 tokens, 16-23 and 24-31 of the next 8.
    const unsigned char* operand = stage + (lane / 16 * 8 + lane % 8) * ROW_BYTES + lane / 8 % 2 * 16;
    for (int group = 0; group < columns; group += 16) {
        float similarity[SLABS_A_WARP][2][4] = {};
#pragma unroll
        for (int step = 0; step < STEPS; step++) {
            u32 tokens[4];
            load_matrices(tokens, operand + group * ROW_BYTES + step * 32);
#pragma unroll
            for (int slab = 0; slab < SLABS_A_WARP; slab++) {
                multiply(similarity[slab][0], fragments[slab][step], tokens[0], tokens[1]);
                multiply(similarity[slab][1], fragments[slab][step], tokens[2], tokens[3]);
            }
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int column = group + i / 2 * 8 + lane % 4 * 2 + i % 2;
            if (column < columns) {
#pragma unroll
                for (int slab = 0; slab < SLABS_A_WARP; slab++)
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        const float value = similarity[slab][i / 2][half * 2 + i % 2];
                        // Both read the old maximum, so that the chain from column to column is one instruction.
                        if (!(value <= best[slab].value[half])) best[slab].token[half] = token + column;
                        best[slab].value[half] = larger(best[slab].value[half], value);
                    }
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(256, 2) forward(const __grid_constant__ Arguments a) {
    unsigned char* stages = shared_memory();
    const int warp = threadIdx.x / 32;
    const Work work = work_of_block(a, blockDim.x / 32 * SLABS_A_WARP);
    if (work.first_slab >= work.end_slab) return;

    u32 fragments[SLABS_A_WARP][STEPS][4];
    Slab slabs[SLABS_A_WARP];
#pragma unroll
    for (int i = 0; i < SLABS_A_WARP; i++)
        slabs[i] = load_slab(a, work.first_slab + warp * SLABS_A_WARP + i, work.end_slab, fragments[i]);

    Loader loader = {work.first_document, work.end_document, 0};
    for (int stage = 0; stage < STAGES - 1; stage++) loader.load_next(a, stages + stage * TILE * ROW_BYTES);
    int tile = 0;
    for (int document = work.first_document; document < work.end_document; document++) {
        const int length = abs(a.document_lengths[document]);
        Best best[SLABS_A_WARP];
#pragma unroll
        for (int i = 0; i < SLABS_A_WARP; i++) best[i] = no_best();
        for (int token = 0; token < length; token += TILE, tile++) {
            copy_async_wait<STAGES - 2>();
            __syncthreads();  // the tile is whole, and all warps are done with the one before, whose stage is next
            loader.load_next(a, stages + (tile + STAGES - 1) % STAGES * TILE * ROW_BYTES);
            if (slabs[0].rows)
                score_tile(fragments, stages + tile % STAGES * TILE * ROW_BYTES, min(TILE, length - token), token, best);
        }
#pragma unroll
        for (int i = 0; i < SLABS_A_WARP; i++) finish_document(a, slabs[i], document, length, best[i]);
    }
}
