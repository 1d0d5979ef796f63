"""MaxSim in plain PyTorch, on any device: what every other backend must agree with.

Only what is scored is multiplied, and the similarities of one block at a time are in memory, never all Q x N x I x J of
them. A block gathers the scored tokens of documents of about one length; the shorter ones repeat their last token,
which cannot win before itself. So there is no -inf, and no masked document token is read.

Backward is a weighted sum of the winners for each query token, and of the query tokens that it won for each document
token: `embedding_bag` adds them in the order of their indices, without atomic additions, so all repeats bit for bit.

Q queries, N documents, I query tokens, J document tokens, H embedding size, L longest document of a block;
R rows that a document meets: Q x I for all pairs, I for candidates; S of them are scored in some query;
G groups of M documents that meet the same rows
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

# Similarities held at once, 4 MiB in float32: a CPU reduces them before they leave its cache.
BLOCK_ELEMENTS = 2**20
# Rows of one product at most. Of R = 8,192, products with one document and 5,825 rows run at 66 % of the rate of a
# large matrix product, with eleven documents and 512 rows at 94 % (2 cores of an AMD EPYC with AVX-512, torch 2.13.0).
BLOCK_ROWS = 512
# A GPU wants fewer and larger launches.
GPU_BLOCK_FACTOR = 16


def forward(
    queries: Tensor,
    documents: Tensor,
    query_mask: Tensor,
    document_mask: Tensor,
    candidates: int | None,
    *,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """Score all pairs or, with K candidates, query b against documents b * K to b * K + K - 1.

    queries: (Q, I, H); documents: (N, J, H); masks: bool (Q, I) and (N, J).
    Returns the scores, (Q, N) or (1, N), and the winners for `backward`, int32 (N, R), or (0, R) unless `save`.
    """
    dtype = torch.float64 if queries.dtype == torch.float64 else torch.float32
    device = queries.device
    num_queries, query_tokens, size = queries.shape
    num_documents, document_tokens, _ = documents.shape
    queries_met = num_queries if candidates is None else 1
    rows = queries_met * query_tokens
    scores_NQ = torch.zeros(num_documents, queries_met, dtype=dtype, device=device)
    winners_NR = torch.zeros(num_documents if save else 0, rows, dtype=torch.int32, device=device)

    # Masked query tokens are left out as well; of candidates, those that are masked in every query.
    row_S = (query_mask.flatten() if candidates is None else query_mask.any(dim=0)).nonzero().flatten()
    queries_SH = (queries.flatten(0, 1) if candidates is None else queries).index_select(-2, row_S).to(dtype)
    documents_TH = documents.flatten(0, 1)
    scored_T = document_mask.flatten().nonzero().flatten()
    length_N = document_mask.sum(dim=1)
    start_N = length_N.cumsum(dim=0) - length_N

    blocks = list(_blocks(length_N, len(row_S), size))
    # One for all blocks: fresh memory costs a product of this size a fifth of its time.
    most = max((len(block_N) * longest * row_step for block_N, longest, row_step in blocks), default=0)
    buffer = torch.empty(most, dtype=dtype, device=device)

    for block_N, longest, row_step in blocks:
        position_NL = torch.arange(longest, device=device).minimum(length_N[block_N, None] - 1)
        token_NL = scored_T[start_N[block_N, None] + position_NL]
        documents_NLH = documents_TH.index_select(0, token_NL.flatten()).view(*token_NL.shape, size).to(dtype)
        if candidates is None:
            rows_SH, mask_NQI = queries_SH, query_mask
        else:
            query_N = block_N // candidates
            rows_SH, mask_NQI = queries_SH.index_select(0, query_N), query_mask[query_N, None]
        best_NR = torch.zeros(len(block_N), rows, dtype=dtype, device=device)
        for start in range(0, len(row_S), row_step):
            some = slice(start, start + row_step)
            similarity_NLS = _similarity(documents_NLH, rows_SH[..., some, :], buffer)
            best_NS = similarity_NLS.amax(dim=1)
            best_NR[:, row_S[some]] = best_NS
            if save:
                winner_NS = token_NL.gather(1, _first_equal(similarity_NLS, best_NS)) % document_tokens
                winners_NR[block_N[:, None], row_S[some]] = winner_NS.int()
        best_NQI = best_NR.view(len(block_N), queries_met, query_tokens)
        scores_NQ[block_N] = torch.where(mask_NQI, best_NQI, 0.0).sum(dim=2)
    return scores_NQ.T.contiguous(), winners_NR


def _blocks(length_N: Tensor, rows: int, size: int) -> Iterator[tuple[Tensor, int, int]]:
    """Documents, from the longest on and without the empty; tokens of the block's longest; rows of one product."""
    elements = _block_elements(length_N.device)
    sorted_N, order_N = length_N.sort(descending=True, stable=True)
    lengths = [length for length in sorted_N.tolist() if length > 0]
    start = 0
    while start < len(lengths):
        longest = lengths[start]
        row_step = max(1, min(rows, BLOCK_ROWS, elements // longest))
        # The gathered documents count, too: few rows meet more of them than of their similarities.
        stop = min(start + max(1, elements // (longest * max(row_step, size))), len(lengths))
        yield order_N[start:stop], longest, row_step
        start = stop


def _block_elements(device: torch.device) -> int:
    return BLOCK_ELEMENTS * (1 if device.type == "cpu" else GPU_BLOCK_FACTOR)


def _similarity(documents_NLH: Tensor, rows_SH: Tensor, buffer: Tensor) -> Tensor:
    """Similarity of each document token to each row, (N, L, S); rows: (S, H), or (N, S, H) for candidates."""
    documents, longest, _ = documents_NLH.shape
    rows = rows_SH.shape[-2]
    similarity_NLS = buffer[: documents * longest * rows].view(documents, longest, rows)
    # Autocast would round the products to half precision: near 32, bfloat16 scores are 0.125 apart.
    with torch.autocast(documents_NLH.device.type, enabled=False):
        if rows_SH.dim() == 2:
            torch.mm(documents_NLH.flatten(0, 1), rows_SH.T, out=similarity_NLS.flatten(0, 1))
        else:
            torch.bmm(documents_NLH, rows_SH.mT, out=similarity_NLS)
    return similarity_NLS


def _first_equal(similarity_NLS: Tensor, best_NS: Tensor) -> Tensor:
    """Position of the first similarity that equals the best, (N, S); overwrites the similarities."""
    # Three passes over what is in the cache, in a twelfth of the time of `max(dim=1)` with its indices.
    longest = similarity_NLS.shape[1]
    countdown_L1 = torch.arange(longest, 0, -1, dtype=best_NS.dtype, device=best_NS.device)[:, None] - 1
    most_NS = similarity_NLS.eq_(best_NS[:, None]).mul_(countdown_L1).amax(dim=1)
    return longest - 1 - most_NS.long()


def backward(
    gradient: Tensor,
    queries: Tensor,
    documents: Tensor,
    query_mask: Tensor,
    document_mask: Tensor,
    winners: Tensor,
    candidates: int | None,
) -> tuple[Tensor, Tensor]:
    """Gradients of queries and documents, from that of the scores and the winners of `forward`."""
    dtype = gradient.dtype
    num_documents, document_tokens, size = documents.shape
    rows = winners.shape[1]
    query_gradient = torch.zeros(queries.shape, dtype=dtype, device=queries.device)
    if winners.numel() == 0 or documents.numel() == 0:
        return query_gradient.to(queries.dtype), torch.zeros_like(documents)
    document_gradient = torch.empty(documents.shape, dtype=dtype, device=queries.device)

    # 0 x NaN is NaN, so a weight of 0 keeps no masked vector out of a sum. The winners of a document are scored tokens
    # but where it has none, which is rare: else its vectors need no copy.
    scored_queries = queries.masked_fill(~query_mask[:, :, None], 0.0).to(dtype)
    scored_N = document_mask.any(dim=1)
    if not scored_N.all():
        documents = documents.masked_fill(~scored_N[:, None, None], 0.0)

    step = max(1, _block_elements(queries.device) // max(rows, document_tokens * size))
    if candidates is not None:
        step = max(1, step // candidates) * candidates
    for start in range(0, num_documents, step):
        block = slice(start, min(start + step, num_documents))
        own = slice(None) if candidates is None else slice(block.start // candidates, block.stop // candidates)
        groups = 1 if candidates is None else own.stop - own.start
        members = (block.stop - block.start) // groups
        documents_TH, queries_PH = documents[block].flatten(0, 1).to(dtype), scored_queries[own].flatten(0, 1)
        first_N1 = torch.arange(0, len(documents_TH), document_tokens, device=queries.device)[:, None]
        token_GMR = (winners[block] + first_N1).view(groups, members, rows)
        gradient_GMQ1 = torch.where(scored_N[block], gradient[:, block], 0.0).T.reshape(groups, members, -1, 1)
        mask_GMQI = query_mask[own].view(groups, 1, -1, queries.shape[1])
        weight_GMR = torch.where(mask_GMQI, gradient_GMQ1, 0.0).flatten(2)

        query_gradient[own] += F.embedding_bag(
            token_GMR.mT.flatten(0, 1), documents_TH, per_sample_weights=weight_GMR.mT.flatten(0, 1), mode="sum"
        ).view_as(query_gradient[own])

        # Number (g, m, r) of the sorted winners is one of row (g, r).
        sorted_token, order = token_GMR.flatten().sort(stable=True)
        document_gradient[block] = F.embedding_bag(
            order // (members * rows) * rows + order % rows,
            queries_PH,
            offsets=torch.searchsorted(sorted_token, torch.arange(len(documents_TH), device=queries.device)),
            per_sample_weights=weight_GMR.flatten()[order],
            mode="sum",
        ).view_as(document_gradient[block])
    # The winner of a masked query token is token 0, which may be masked.
    query_gradient.masked_fill_(~query_mask[:, :, None], 0.0)
    return query_gradient.to(queries.dtype), document_gradient.to(documents.dtype)
