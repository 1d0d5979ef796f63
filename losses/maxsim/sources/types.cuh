// What all kernels share: their types, their one argument, and where a text's tokens lie.
//
// The sources are one translation unit, put together in the order that losses/maxsim/kernels.py names, and include
// nothing, so that NVRTC compiles them without a header at hand. What a launch must know too, such as EMBEDDING, the
// embedding size, comes from `constants` in that file, as macros.
//
// Words: a text is a query or a document. Its scored tokens are those that its mask keeps, in their order; `length`
// counts them. A slab is 16 scored tokens of one query, the rows of one tensor-core tile; the last slab of a query may
// be short. A winner is the index of a document's scored token, or NO_WINNER.

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

constexpr int SLAB = 16;
constexpr u16 NO_WINNER = 0xffff;
constexpr int CHUNKS = EMBEDDING / 8;  // 16-byte chunks of a token's vector

struct alignas(16) Chunk {
    u32 pairs[4];
};

// One type for all kernels; losses/maxsim/kernels.py mirrors it. Vectors are of the half type.
struct Arguments {
    const u16* queries;                  // (Q, I, H), or packed: (tokens, H)
    const u16* documents;                // (N, J, H), or packed
    u16* compacted;                      // like documents: those whose mask has holes, holes removed
    const unsigned char* query_mask;     // (Q, I) bool, null = all scored
    const unsigned char* document_mask;  // (N, J) bool, null = all scored
    const i64* query_offsets;            // (Q + 1) first token of each packed text, null = padded
    const i64* document_offsets;         // (N + 1)
    int* query_lengths;                  // (Q)
    int* slab_starts;                    // (Q + 1) first slab of each query
    int* slab_queries;                   // query of each slab
    u16* query_positions;                // (Q, I) place of each scored token among all of its text; unset without a mask
    int* document_lengths;               // (N), negative = read `compacted`
    u16* document_positions;             // (N, J)
    float* partial;                      // (slabs, N) scores by slab
    float* scores;                       // (Q, N), or (B, K) for candidates
    u16* winners;                        // (N, slabs, 16), null = not saved
    const float* gradient;               // like scores
    u16* query_gradient;                 // like queries, null = not wanted; zero where no scored token lies
    u16* document_gradient;              // like documents, null = not wanted
    int num_queries, query_tokens;       // Q, I (packed: of the longest)
    int num_documents, document_tokens;  // N, J (packed: of the longest)
    int candidates;                      // K, documents of each query; 0 = every query meets every document
    int slabs;                           // upper bound: of all queries, or for candidates of one
    int blocks_at_once;                  // of the forward kernel, on the whole device
};

__device__ __forceinline__ int divide_up(int value, int by) { return (value + by - 1) / by; }

__device__ __forceinline__ i64 first_token(const i64* offsets, int text, int tokens) {
    return offsets ? offsets[text] : (i64)text * tokens;
}

// No more than `tokens`, for which the lists have room.
__device__ __forceinline__ int token_count(const i64* offsets, int text, int tokens) {
    return offsets ? max(0, min((int)(offsets[text + 1] - offsets[text]), tokens)) : tokens;
}

// Row of a query's scored token in `queries`.
__device__ __forceinline__ i64 query_row(const Arguments& a, int query, int scored) {
    i64 first = first_token(a.query_offsets, query, a.query_tokens);
    return first + (a.query_mask ? a.query_positions[first + scored] : scored);
}

// Place of a document's scored token among all tokens of the document, which begins at row `first`.
__device__ __forceinline__ int document_position(const Arguments& a, i64 first, int scored) {
    return a.document_mask ? a.document_positions[first + scored] : scored;
}

// The documents that a query meets: `count` from `first`.
struct Documents {
    int first, count;
};

__device__ __forceinline__ Documents documents_of(const Arguments& a, int query) {
    return a.candidates ? Documents{query * a.candidates, a.candidates} : Documents{0, a.num_documents};
}

// First slab of those that a winner row counts from: the query's own for candidates, else the first of all.
__device__ __forceinline__ int base_slab(const Arguments& a, int query) {
    return a.candidates ? a.slab_starts[query] : 0;
}
