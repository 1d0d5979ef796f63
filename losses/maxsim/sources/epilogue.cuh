// What both forward kernels do with their tiles: which slabs and documents a block has, a slab's rows as a tensor-core
// operand, the first maximum of each row, and the sum of a document's maxima.
//
// Similarities come in the layout that mma.m16n8k16 and wgmma share: a lane has rows lane / 4 and lane / 4 + 8, and of
// every 8 columns (document tokens) the two from lane % 4 * 2. So four lanes share a row, and each sees its columns in
// rising order: what is not larger does not replace a maximum, so the first of equal ones stays within a lane, and
// finish_document compares tokens between lanes. NaN replaces everything and stays, as in torch.amax.

constexpr int STEPS = EMBEDDING / 16;  // of the product over the embedding
constexpr float LOWEST = __builtin_bit_cast(float, 0xff800000);  // minus infinity, for which NVRTC has no name

// The part of a block: slabs [first_slab, end_slab) against documents [first_document, end_document).
struct Work {
    int first_slab, end_slab, first_document, end_document;
};

// Parts that the documents of each group of slabs are cut into, so that the last wave of blocks is nearly full. How many
// groups there are, the host does not know.
__device__ __forceinline__ int document_parts(const Arguments& a, int groups, int documents) {
    int best = 1;
    i64 best_time = -1;
    for (int waves = 1; waves <= MOST_WAVES; waves++) {
        const int parts = min(documents, max(1, waves * a.blocks_at_once / groups));
        const i64 time = (i64)divide_up(groups * parts, a.blocks_at_once) * (divide_up(documents, parts) + START_UP_DOCUMENTS);
        if (best_time < 0 || time < best_time) {
            best = parts;
            best_time = time;
        }
    }
    return best;
}

// A block has `slabs` slabs, of all queries or, for candidates, of one query, and a part of the documents that they meet.
// Blocks next to each other have the same documents. There may be more blocks than work; theirs has no slabs.
__device__ __forceinline__ Work work_of_block(const Arguments& a, int slabs) {
    const int of_a_query = divide_up(a.slabs, slabs);
    const int groups = a.candidates ? of_a_query * a.num_queries : divide_up(a.slab_starts[a.num_queries], slabs);
    if (groups == 0) return {0, 0, 0, 0};
    const int group = blockIdx.x % groups, part = blockIdx.x / groups;
    const int query = a.candidates ? group / of_a_query : 0, end_query = a.candidates ? query + 1 : a.num_queries;
    const Documents documents = documents_of(a, query);
    const int parts = document_parts(a, groups, documents.count);
    if (part >= parts) return {0, 0, 0, 0};
    const int first = a.candidates ? a.slab_starts[query] + group % of_a_query * slabs : group * slabs;
    return {first, min(a.slab_starts[end_query], first + slabs),
            documents.first + (int)((i64)documents.count * part / parts),
            documents.first + (int)((i64)documents.count * (part + 1) / parts)};
}

// One slab as a warp holds it.
struct Slab {
    int row;   // its place among the slabs of a winner row
    int rows;  // scored tokens, 0 = no slab
};

// Read a slab's vectors from where they lie as the A operand; rows past the slab's end are zero.
__device__ __forceinline__ Slab load_slab(const Arguments& a, int slab, int end_slab, u32 (&fragment)[STEPS][4]) {
    const int lane = threadIdx.x % 32;
    int query = 0, first = 0, rows = 0;
    if (slab < end_slab) {
        query = a.slab_queries[slab];
        first = (slab - a.slab_starts[query]) * SLAB;
        rows = min(SLAB, a.query_lengths[query] - first);
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = lane / 4 + half * 8;
        const u32* vector = nullptr;
        if (row < rows) vector = (const u32*)(a.queries + query_row(a, query, first + row) * EMBEDDING);
#pragma unroll
        for (int step = 0; step < STEPS; step++) {
            fragment[step][half] = vector ? vector[step * 8 + lane % 4] : 0;
            fragment[step][half + 2] = vector ? vector[step * 8 + lane % 4 + 4] : 0;
        }
    }
    return {slab - base_slab(a, query), rows};
}

// First maximum of a lane's two rows over its own columns; token -1 = none yet.
struct Best {
    float value[2];
    int token[2];
};

__device__ __forceinline__ Best no_best() { return {{LOWEST, LOWEST}, {-1, -1}}; }

// Join the lanes that share a row, write the row's winner and the slab's part of the score.
__device__ __forceinline__ void finish_document(const Arguments& a, Slab slab, int document, int length, Best best) {
    if (slab.rows == 0) return;
    const int lane = threadIdx.x % 32;
    float sum = 0;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float value = best.value[half];
        int token = best.token[half];
#pragma unroll
        for (int distance = 1; distance < 4; distance *= 2) {
            const float other_value = __shfl_xor_sync(~0u, value, distance);
            const int other_token = __shfl_xor_sync(~0u, token, distance);
            // As unsigned numbers, no token is behind all tokens.
            const bool earlier = other_value == value && (u32)other_token < (u32)token;
            if (other_value > value || earlier || other_value != other_value) {
                value = other_value;
                token = other_token;
            }
        }
        const int row = lane / 4 + half * 8;
        const bool scored = row < slab.rows && length > 0;
        if (scored) sum += value;
        // After NaN a column past the document's end may have come last, and backward would read there.
        token = min(token, length - 1);
        if (a.winners && lane % 4 == 0)
            a.winners[((i64)document * a.slabs + slab.row) * SLAB + row] = scored && token >= 0 ? (u16)token : NO_WINNER;
    }
#pragma unroll
    for (int distance = 4; distance < 32; distance *= 2) sum += __shfl_xor_sync(~0u, sum, distance);
    if (lane == 0) a.partial[(i64)slab.row * a.num_documents + document] = sum;
}

// A thread a score: the sum over the query's slabs, in their order.
extern "C" __global__ void __launch_bounds__(SUM_THREADS, 1) sum_slabs(const __grid_constant__ Arguments a) {
    const i64 score = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    const int count = a.candidates ? a.candidates : a.num_documents;
    if (score >= (i64)a.num_queries * count) return;
    const int query = (int)(score / count), document = documents_of(a, query).first + (int)(score % count);
    const int base = base_slab(a, query);
    float sum = 0;
    for (int slab = a.slab_starts[query]; slab < a.slab_starts[query + 1]; slab++)
        sum += a.partial[(i64)(slab - base) * a.num_documents + document];
    a.scores[score] = sum;
}
