// The backward kernels: rows of vectors, gathered by the saved winners and summed in float32 in a fixed order. Each row of
// a gradient has one owner that writes it once, so there is no atomic addition, and the same inputs give the same bits.
//
// A pair of query and document whose gradient is exactly 0 is left out.

// Queries: the gradient of a row is the sum of its winners, over the documents in their order.
//
// grid: SLAB / QUERY_ROWS blocks for each slab (upper bound); block: two warps for each of QUERY_ROWS rows, each with half
// of the documents. LANES lanes read one vector in chunks of 16 bytes, so a warp reads READS documents at once. The
// winners of STAGED documents lie in shared memory at a time.

constexpr int QUERY_WARPS = 2 * QUERY_ROWS;
constexpr int LANES = CHUNKS <= 2 ? 2 : CHUNKS <= 4 ? 4 : CHUNKS <= 8 ? 8 : CHUNKS <= 16 ? 16 : 32;
constexpr int READS = 32 / LANES;
static_assert(QUERY_SHARED_BYTES == STAGED * (QUERY_ROWS * (int)sizeof(i64) + (int)sizeof(float)));
static_assert(QUERY_SHARED_BYTES >= QUERY_ROWS * 32 * 8 * (int)sizeof(float));

extern "C" __global__ void __launch_bounds__(QUERY_WARPS * 32, 2) query_gradient(const __grid_constant__ Arguments a) {
    const int slab = blockIdx.x / (SLAB / QUERY_ROWS), first_row = blockIdx.x % (SLAB / QUERY_ROWS) * QUERY_ROWS;
    if (slab >= a.slab_starts[a.num_queries]) return;
    i64* winner_rows = (i64*)shared_memory();  // (STAGED, QUERY_ROWS) rows of `documents`, -1 = none
    float* weights = (float*)(winner_rows + STAGED * QUERY_ROWS);
    const int query = a.slab_queries[slab], first = (slab - a.slab_starts[query]) * SLAB + first_row;
    const int own_row = threadIdx.x / 64, half = threadIdx.x / 32 % 2, lane = threadIdx.x % 32, chunk = lane % LANES;
    const Documents documents = documents_of(a, query);
    const int row_in_winners = (slab - base_slab(a, query)) * SLAB + first_row;

    float sums[8] = {};
    for (int start = 0; start < documents.count; start += STAGED) {
        __syncthreads();  // the winners staged before are used
        for (int i = threadIdx.x; i < STAGED * QUERY_ROWS; i += blockDim.x) {
            const int staged = i / QUERY_ROWS, row = i % QUERY_ROWS;
            i64 winner_row = -1;
            if (start + staged < documents.count) {
                const int document = documents.first + start + staged;
                const float weight = a.gradient[(i64)query * documents.count + start + staged];
                const u16 winner = a.winners[(i64)document * a.slabs * SLAB + row_in_winners + row];
                if (winner != NO_WINNER && weight != 0) {
                    const i64 first_of_document = first_token(a.document_offsets, document, a.document_tokens);
                    winner_row = first_of_document + document_position(a, first_of_document, winner);
                }
                if (row == 0) weights[staged] = weight;
            }
            winner_rows[i] = winner_row;
        }
        __syncthreads();
        constexpr int AHEAD = 8;  // documents whose vectors are on their way, for each group of lanes
        const int end = STAGED / 2 * (half + 1);
        for (int block = STAGED / 2 * half; block < end; block += READS * AHEAD) {
            Chunk vectors[AHEAD];
            bool present[AHEAD];
#pragma unroll
            for (int i = 0; i < AHEAD; i++) {
                const int staged = block + i * READS + lane / LANES;
                const i64 from = staged < end ? winner_rows[staged * QUERY_ROWS + own_row] : -1;
                present[i] = from >= 0 && chunk < CHUNKS;
                if (present[i]) vectors[i] = ((const Chunk*)a.documents)[from * CHUNKS + chunk];
            }
#pragma unroll
            for (int i = 0; i < AHEAD; i++)
                if (present[i]) {
                    const float weight = weights[block + i * READS + lane / LANES];
#pragma unroll
                    for (int pair = 0; pair < 4; pair++) {
                        float low, high;
                        unpack_halves(vectors[i].pairs[pair], low, high);
                        sums[pair * 2] += weight * low;
                        sums[pair * 2 + 1] += weight * high;
                    }
                }
        }
    }
#pragma unroll
    for (int i = 0; i < 8; i++)
#pragma unroll
        for (int distance = LANES; distance < 32; distance *= 2) sums[i] += __shfl_xor_sync(~0u, sums[i], distance);
    // The second half's sums go to the first half.
    float* others = (float*)shared_memory() + (own_row * 32 + lane) * 8;
    __syncthreads();  // the last winners are used
    if (half == 1)
        for (int i = 0; i < 8; i++) others[i] = sums[i];
    __syncthreads();
    if (half == 0 && first + own_row < a.query_lengths[query] && lane < CHUNKS) {
        Chunk vector;
#pragma unroll
        for (int pair = 0; pair < 4; pair++)
            vector.pairs[pair] = pack_halves(sums[pair * 2] + others[pair * 2], sums[pair * 2 + 1] + others[pair * 2 + 1]);
        ((Chunk*)a.query_gradient)[query_row(a, query, first + own_row) * CHUNKS + lane] = vector;
    }
}

// Documents: the gradient of a token is the sum of the query tokens that it won, in the queries' order.
//
// A warp owns SLICE dimensions of RANGE tokens of one document, and sums in shared memory that no other warp touches, a
// lane two dimensions: a token that wins everywhere costs no more than another. It goes over the document's winners,
// keeps those of its own tokens in a list, and adds 32 of them at a time.
//
// grid: warps of all documents, ranges and slices over DOCUMENT_WARPS; block: DOCUMENT_WARPS warps.

constexpr int SLICES = (EMBEDDING + SLICE - 1) / SLICE;
// Of SCANNED winners looked at in one go none to all are listed, after up to 31 that wait.
constexpr int LISTED = SCANNED + 32;
constexpr int DOCUMENT_WARP_BYTES = RANGE * SLICE * (int)sizeof(float) + LISTED * 2 * (int)sizeof(int);
static_assert(DOCUMENT_SHARED_BYTES == DOCUMENT_WARPS * DOCUMENT_WARP_BYTES);

struct alignas(8) Pair {  // a lane's two dimensions, one access
    float low, high;
};

// Add `count` of up to 32 listed winners to the lane's column of sums.
__device__ __forceinline__ void add_winners(const Arguments& a, const int* rows, const int* tokens, int count,
                                            int document, int first_slab, int dimension, Pair* sums) {
    const int lane = threadIdx.x % 32;
    int source = -1, token = 0;
    float weight = 0;
    if (lane < count) {
        const int slab = first_slab + rows[lane] / SLAB, query = a.slab_queries[slab];
        const Documents documents = documents_of(a, query);
        weight = a.gradient[(i64)query * documents.count + document - documents.first];
        token = tokens[lane];
        if (weight != 0) source = (int)query_row(a, query, (slab - a.slab_starts[query]) * SLAB + rows[lane] % SLAB);
    }
    constexpr int AHEAD = 8;  // vectors on their way
    for (int start = 0; start < count; start += AHEAD) {
        u32 pairs[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            const int from = __shfl_sync(~0u, source, start + i);
            if (from >= 0 && dimension < EMBEDDING)
                pairs[i] = ((const u32*)a.queries)[((i64)from * EMBEDDING + dimension) / 2];
        }
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            const int from = __shfl_sync(~0u, source, start + i), to = __shfl_sync(~0u, token, start + i);
            const float factor = __shfl_sync(~0u, weight, start + i);
            if (from >= 0 && dimension < EMBEDDING) {
                float low, high;
                unpack_halves(pairs[i], low, high);
                const Pair sum = sums[to * (SLICE / 2)];
                sums[to * (SLICE / 2)] = {sum.low + factor * low, sum.high + factor * high};
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(DOCUMENT_WARPS * 32, 3) document_gradient(const __grid_constant__ Arguments a) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int ranges = divide_up(a.document_tokens, RANGE);
    const i64 part = (i64)blockIdx.x * DOCUMENT_WARPS + warp;
    const i64 owner = part / SLICES / ranges;
    if (owner >= a.num_documents) return;
    const int document = (int)owner, begin = (int)(part / SLICES % ranges) * RANGE;
    const int dimension = (int)(part % SLICES) * SLICE + lane * 2;
    const i64 first_row = first_token(a.document_offsets, document, a.document_tokens);
    const int tokens = min(RANGE, token_count(a.document_offsets, document, a.document_tokens) - begin);
    if (tokens <= 0) return;

    unsigned char* own_memory = shared_memory() + warp * DOCUMENT_WARP_BYTES;
    Pair* sums = (Pair*)own_memory + lane;  // (RANGE, SLICE / 2), from the lane's column on
    int* listed_rows = (int*)(own_memory + RANGE * SLICE * sizeof(float));
    int* listed_tokens = listed_rows + LISTED;
    for (int token = 0; token < tokens; token++) sums[token * (SLICE / 2)] = {0, 0};

    const int query = a.candidates ? document / a.candidates : 0;
    const int end_query = a.candidates ? query + 1 : a.num_queries;
    const int first_slab = a.slab_starts[query], rows = (a.slab_starts[end_query] - first_slab) * SLAB;
    const u16* winners = a.winners + (i64)document * a.slabs * SLAB;
    int listed = 0;
    for (int start = 0; start < rows; start += SCANNED) {
        int token[SCANNED / 32];
#pragma unroll
        for (int i = 0; i < SCANNED / 32; i++) {
            const int row = start + i * 32 + lane;
            token[i] = row < rows ? winners[row] : NO_WINNER;
        }
#pragma unroll
        for (int i = 0; i < SCANNED / 32; i++) {
            // Also where there is none, so that all are on their way at once.
            const int position = document_position(a, first_row, token[i] == NO_WINNER ? 0 : token[i]);
            token[i] = token[i] == NO_WINNER ? -1 : position - begin;
        }
#pragma unroll
        for (int i = 0; i < SCANNED / 32; i++) {
            const bool own = token[i] >= 0 && token[i] < tokens;
            const u32 ballot = __ballot_sync(~0u, own);
            const int place = listed + __popc(ballot & ((1u << lane) - 1));
            if (own) {
                listed_rows[place] = start + i * 32 + lane;
                listed_tokens[place] = token[i];
            }
            listed += __popc(ballot);
        }
        __syncwarp();
        int added = 0;
        for (; added + 32 <= listed; added += 32)
            add_winners(a, listed_rows + added, listed_tokens + added, 32, document, first_slab, dimension, sums);
        if (added) {
            listed -= added;
            const int row = lane < listed ? listed_rows[added + lane] : 0;
            const int waiting = lane < listed ? listed_tokens[added + lane] : 0;
            __syncwarp();
            listed_rows[lane] = row;
            listed_tokens[lane] = waiting;
            __syncwarp();
        }
    }
    add_winners(a, listed_rows, listed_tokens, listed, document, first_slab, dimension, sums);
    if (dimension >= EMBEDDING) return;
    u32* gradient = (u32*)(a.document_gradient + (first_row + begin) * EMBEDDING + dimension);
    for (int token = 0; token < tokens; token++) {
        const Pair sum = sums[token * (SLICE / 2)];
        gradient[(i64)token * EMBEDDING / 2] = pack_halves(sum.low, sum.high);
    }
}
