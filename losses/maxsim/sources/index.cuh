// From masks to lists of scored tokens, so that no kernel after these meets a hole or padding.
//
// index_queries:   1 block of QUERY_INDEX_THREADS; lengths, positions and slabs of all queries.
// index_documents: a warp a document, INDEX_WARPS a block; lengths and positions.
// compact_documents: a warp for COMPACTED tokens of a document, INDEX_WARPS a block; a copy without holes where the mask
//                  has holes. Documents whose scored tokens come first, as in mere padding, are read where they lie.

// By one warp: list the scored tokens of one text. Returns how many, and whether they are not the first ones.
struct Scan {
    int length;
    bool holes;
};

__device__ __forceinline__ Scan scan_mask(const unsigned char* mask, int tokens, u16* positions) {
    constexpr int AHEAD = 8;  // loads in flight
    const int lane = threadIdx.x % 32;
    int length = 0;
    bool moved = false;
    for (int start = 0; start < tokens; start += 32 * AHEAD) {
        bool scored[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            const int token = start + i * 32 + lane;
            scored[i] = token < tokens && mask[token];
        }
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            const u32 ballot = __ballot_sync(~0u, scored[i]);
            const int token = start + i * 32 + lane, place = length + __popc(ballot & ((1u << lane) - 1));
            if (scored[i]) {
                positions[place] = (u16)token;
                moved |= place != token;
            }
            length += __popc(ballot);
        }
    }
    // The rest of the list too, so that the same masks give the same bits.
    for (int place = length + lane; place < tokens; place += 32) positions[place] = NO_WINNER;
    return {length, __ballot_sync(~0u, moved) != 0};
}

extern "C" __global__ void __launch_bounds__(QUERY_INDEX_THREADS, 1) index_queries(const __grid_constant__ Arguments a) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    for (int query = warp; query < a.num_queries; query += warps) {
        const i64 first = first_token(a.query_offsets, query, a.query_tokens);
        int length = token_count(a.query_offsets, query, a.query_tokens);
        if (a.query_mask) length = scan_mask(a.query_mask + first, length, a.query_positions + first).length;
        if (lane == 0) a.query_lengths[query] = length;
    }
    __syncthreads();
    if (warp == 0) {
        int slabs = 0;  // of all queries before
        for (int start = 0; start < a.num_queries; start += 32) {
            const int query = start + lane;
            const int own = query < a.num_queries ? divide_up(a.query_lengths[query], SLAB) : 0;
            int end = own;  // becomes the sum of all lanes up to this one
#pragma unroll
            for (int distance = 1; distance < 32; distance *= 2) {
                const int before = __shfl_sync(~0u, end, max(lane - distance, 0));
                if (lane >= distance) end += before;
            }
            if (query < a.num_queries) a.slab_starts[query] = slabs + end - own;
            slabs += __shfl_sync(~0u, end, 31);
        }
        if (lane == 0) a.slab_starts[a.num_queries] = slabs;
    }
    __syncthreads();
    for (int query = threadIdx.x; query < a.num_queries; query += blockDim.x)
        for (int slab = a.slab_starts[query]; slab < a.slab_starts[query + 1]; slab++) a.slab_queries[slab] = query;
}

extern "C" __global__ void __launch_bounds__(INDEX_WARPS * 32, 1) index_documents(const __grid_constant__ Arguments a) {
    const int lane = threadIdx.x % 32;
    const int document = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    if (document >= a.num_documents) return;
    const i64 first = first_token(a.document_offsets, document, a.document_tokens);
    const int tokens = token_count(a.document_offsets, document, a.document_tokens);
    if (!a.document_mask) {
        if (lane == 0) a.document_lengths[document] = tokens;
        return;
    }
    const Scan scan = scan_mask(a.document_mask + first, tokens, a.document_positions + first);
    if (lane == 0) a.document_lengths[document] = scan.holes ? -scan.length : scan.length;
}

extern "C" __global__ void __launch_bounds__(INDEX_WARPS * 32, 1) compact_documents(const __grid_constant__ Arguments a) {
    const int lane = threadIdx.x % 32;
    const int ranges = divide_up(a.document_tokens, COMPACTED);
    const i64 part = (i64)blockIdx.x * INDEX_WARPS + threadIdx.x / 32;
    if (part / ranges >= a.num_documents) return;
    const int document = (int)(part / ranges), begin = (int)(part % ranges) * COMPACTED;
    const int length = -a.document_lengths[document];  // not positive: no holes
    const i64 first = first_token(a.document_offsets, document, a.document_tokens);
    const u16* positions = a.document_positions + first;
    const Chunk* from = (const Chunk*)a.documents + first * CHUNKS;
    Chunk* to = (Chunk*)a.compacted + first * CHUNKS;
    constexpr int AHEAD = 8;  // chunks on their way; all are read before one is written
    const int end = min(length, begin + COMPACTED) * CHUNKS;
    for (int start = begin * CHUNKS + lane; start < end; start += 32 * AHEAD) {
        Chunk chunks[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            const int chunk = start + i * 32;
            if (chunk < end) chunks[i] = from[(i64)positions[chunk / CHUNKS] * CHUNKS + chunk % CHUNKS];
        }
#pragma unroll
        for (int i = 0; i < AHEAD; i++)
            if (start + i * 32 < end) to[start + i * 32] = chunks[i];
    }
}
