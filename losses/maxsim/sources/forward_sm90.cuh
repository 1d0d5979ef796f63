// The forward kernel of sm_90a: TMA and wgmma.
//
// WARPGROUPS consumers of four warps each hold the vectors of four slabs in registers; one more warpgroup, of which one
// thread works, brings the documents in tiles of TILE_90 tokens into a ring of STAGES_90 buffers. Each consumer scores a
// tile when it comes and then looks for maxima, while the others keep the tensor cores busy: at 128 dimensions a tile
// takes 512 cycles of them, and its maxima 384 cycles of a scheduler, 3 instructions an element at half rate. At 64
// dimensions and less the maxima take longer than the products.
//
// A tile is cut into panels of 64 dimensions (128 bytes, the swizzle's width) and boxes of BOX tokens, so that a short
// last tile of a document loads and multiplies no more than BOX - 1 tokens of something else.
//
// grid: work_of_block; block: (WARPGROUPS + 1) * 128 threads; shared memory: SM90_SHARED_BYTES.

constexpr int PANELS = (EMBEDDING + 63) / 64;
constexpr int BOX_BYTES = BOX * 128;
constexpr int PANEL_BYTES = TILE_90 * 128;
constexpr int STAGE_BYTES = PANELS * PANEL_BYTES;
static_assert(SM90_SHARED_BYTES == STAGES_90 * (STAGE_BYTES + 2 * (int)sizeof(Barrier)));
// Of the 65,536 registers of a multiprocessor: 40 for a producer's thread, the rest for consumers.
constexpr int PRODUCER_REGISTERS = 40;
constexpr int CONSUMER_REGISTERS = WARPGROUPS == 3 ? 152 : 232;

struct Ring {
    unsigned char* tiles;
    Barrier *full, *empty;
    int turn;  // tiles so far

    __device__ __forceinline__ int stage() const { return turn % STAGES_90; }
    __device__ __forceinline__ u32 parity() const { return turn / STAGES_90 % 2; }
};

__device__ __forceinline__ void produce_tiles(const Arguments& a, Work work, Ring ring, const TensorMap* documents,
                                              const TensorMap* compacted) {
    for (int document = work.first_document; document < work.end_document; document++) {
        const int signed_length = a.document_lengths[document], length = abs(signed_length);
        const TensorMap* source = signed_length < 0 ? compacted : documents;
        const int first = (int)first_token(a.document_offsets, document, a.document_tokens);
        for (int token = 0; token < length; token += TILE_90, ring.turn++) {
            barrier_wait(&ring.empty[ring.stage()], ring.parity() ^ 1);
            const int boxes = divide_up(min(TILE_90, length - token), BOX);
            barrier_expect(&ring.full[ring.stage()], boxes * PANELS * BOX_BYTES);
            unsigned char* tile = ring.tiles + ring.stage() * STAGE_BYTES;
            for (int panel = 0; panel < PANELS; panel++)
                for (int box = 0; box < boxes; box++)
                    load_box(tile + panel * PANEL_BYTES + box * BOX_BYTES, source, panel * 64, first + token + box * BOX,
                             &ring.full[ring.stage()]);
        }
    }
}

// Score the tile of the ring's turn, `columns` tokens from `token` on, N = columns rounded up to boxes.
template <int N>
__device__ __forceinline__ void score_tile_90(const u32 (&fragment)[STEPS][4], const Ring& ring, int columns, int token,
                                              Best& best) {
    const unsigned char* tile = ring.tiles + ring.stage() * STAGE_BYTES;
    float similarity[N / 2];
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < STEPS; step++)
        wgmma<N>(similarity, fragment[step], descriptor(tile + step / 4 * PANEL_BYTES + step % 4 * 32), step != 0);
    wgmma_commit();
    wgmma_wait(similarity);
    if (threadIdx.x % 128 == 0) barrier_arrive(&ring.empty[ring.stage()]);

    const int shift = threadIdx.x % 4 * 2;
    if (columns < N) {
#pragma unroll
        for (int i = (N - BOX) / 2; i < N / 2; i++)
            if (i / 4 * 8 + i % 2 + shift >= columns) similarity[i] = LOWEST;
    }
    // The column is a constant of the instruction; where the tile lies is added once.
    Best own = no_best();
#pragma unroll
    for (int i = 0; i < N / 2; i++) {
        const int half = i / 2 % 2;
        // As in score_tile: one instruction from column to column.
        own.token[half] = similarity[i] <= own.value[half] ? own.token[half] : i / 4 * 8 + i % 2;
        own.value[half] = larger(own.value[half], similarity[i]);
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        if (!(own.value[half] <= best.value[half])) best.token[half] = token + shift + own.token[half];
        best.value[half] = larger(best.value[half], own.value[half]);
    }
}

__device__ __forceinline__ void consume_tiles(const Arguments& a, Work work, Ring ring) {
    const int first_slab = work.first_slab + threadIdx.x / 128 * 4;
    if (first_slab >= work.end_slab) return;  // the whole warpgroup has none, and nobody waits for it
    u32 fragment[STEPS][4];
    const Slab slab = load_slab(a, first_slab + threadIdx.x / 32 % 4, work.end_slab, fragment);
    for (int document = work.first_document; document < work.end_document; document++) {
        const int length = abs(a.document_lengths[document]);
        Best best = no_best();
        for (int token = 0; token < length; token += TILE_90, ring.turn++) {
            const int columns = min(TILE_90, length - token);
            barrier_wait(&ring.full[ring.stage()], ring.parity());
            switch (divide_up(columns, BOX)) {
                case 1: score_tile_90<32>(fragment, ring, columns, token, best); break;
                case 2: score_tile_90<64>(fragment, ring, columns, token, best); break;
                case 3: score_tile_90<96>(fragment, ring, columns, token, best); break;
                default: score_tile_90<128>(fragment, ring, columns, token, best);
            }
        }
        finish_document(a, slab, document, length, best);
    }
}

extern "C" __global__ void __launch_bounds__((WARPGROUPS + 1) * 128, 1)
    forward_sm90(const __grid_constant__ Arguments a, const __grid_constant__ TensorMap documents,
                 const __grid_constant__ TensorMap compacted) {
    const Work work = work_of_block(a, WARPGROUPS * 4);
    if (work.first_slab >= work.end_slab) return;
    unsigned char* tiles = shared_memory();
    Barrier* barriers = (Barrier*)(tiles + STAGES_90 * STAGE_BYTES);
    const Ring ring = {tiles, barriers, barriers + STAGES_90, 0};
    if (threadIdx.x == 0) {
        const int consumers = min(WARPGROUPS, divide_up(work.end_slab - work.first_slab, 4));
        for (int stage = 0; stage < STAGES_90; stage++) {
            barrier_init(&ring.full[stage], 1);
            barrier_init(&ring.empty[stage], consumers);
        }
        barrier_fence();
    }
    __syncthreads();
    if (threadIdx.x / 128 == WARPGROUPS) {
        drop_registers<PRODUCER_REGISTERS>();
        if (threadIdx.x % 128 == 0) produce_tiles(a, work, ring, &documents, &compacted);
    } else {
        raise_registers<CONSUMER_REGISTERS>();
        consume_tiles(a, work, ring);
    }
}
