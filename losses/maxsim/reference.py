"""MaxSim in plain PyTorch, on any device: what every other backend must agree with.

Both operators are lists of blocks, each a slice of queries against a slice of documents, so that the similarities of
one block at a time are in memory and never all Q x N x I x J of them. Forward saves the winner of each query token;
backward turns the winners of a block into one matrix and multiplies, which needs no atomic addition and so repeats bit
for bit.

Q queries, N documents, I query tokens, J document tokens, H embedding size; R rows of a block = its queries x I
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Similarities held at once, 16 MiB in float32; on a CPU larger blocks leave the cache and are slower.
BLOCK_ELEMENTS = 2**22


class Block(NamedTuple):
    """Queries against documents, and where their results lie."""

    queries: slice
    documents: slice
    scores: slice
    """Rows of the scores (Q, N), of which candidates have one."""
    winners: slice
    """Columns of the winners (N, R)."""


def maxsim(queries: Tensor, documents: Tensor, query_mask: Tensor, document_mask: Tensor) -> Tensor:
    scores: Tensor = _MaxSim.apply(queries, documents, query_mask, document_mask, None)
    return scores


def maxsim_candidates(queries: Tensor, documents: Tensor, query_mask: Tensor, document_mask: Tensor) -> Tensor:
    candidates = documents.shape[1]
    scores: Tensor = _MaxSim.apply(
        queries, documents.flatten(0, 1), query_mask, document_mask.flatten(0, 1), candidates
    )
    return scores.view(queries.shape[0], candidates)


class _MaxSim(torch.autograd.Function):
    """candidates: None scores all pairs, (Q, N); a number scores query b against documents b * candidates and on."""

    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, documents: Tensor, query_mask: Tensor, document_mask: Tensor, candidates: int | None
    ) -> Tensor:
        dtype = torch.float64 if queries.dtype == torch.float64 else torch.float32
        num_queries, query_tokens, _ = queries.shape
        num_documents, document_tokens, _ = documents.shape
        queries_per_document = num_queries if candidates is None else 1
        scores_QN = torch.zeros(queries_per_document, num_documents, dtype=dtype, device=queries.device)
        needs_winners = any(ctx.needs_input_grad)
        winners = torch.zeros(
            num_documents if needs_winners else 0,
            queries_per_document * query_tokens,
            dtype=torch.int32,
            device=queries.device,
        )
        if document_tokens > 0:
            for block in _blocks(num_queries, num_documents, query_tokens, document_tokens, candidates):
                block_mask = document_mask[block.documents]
                similarity_NJR = _similarity(queries[block.queries], documents[block.documents], block_mask, dtype)
                if needs_winners:
                    best_NR, winners[block.documents, block.winners] = similarity_NJR.max(dim=1)
                else:
                    best_NR = similarity_NJR.amax(dim=1)
                best_NQI = best_NR.view(best_NR.shape[0], block.queries.stop - block.queries.start, query_tokens)
                best_NQI = torch.where(query_mask[block.queries], best_NQI, 0.0)
                scores_QN[block.scores, block.documents] = torch.where(
                    block_mask.any(dim=1), best_NQI.sum(dim=2).T, 0.0
                )
        ctx.save_for_backward(queries, documents, query_mask, document_mask, winners)
        ctx.candidates = candidates
        return scores_QN

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_QN: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        queries, documents, query_mask, document_mask, winners = ctx.saved_tensors
        candidates: int | None = ctx.candidates
        dtype = gradient_QN.dtype
        num_queries, query_tokens, _ = queries.shape
        num_documents, document_tokens, _ = documents.shape
        query_gradient = torch.zeros(queries.shape, dtype=dtype, device=queries.device)
        document_gradient = torch.zeros(documents.shape, dtype=dtype, device=documents.device)
        if document_tokens > 0:
            for block in _blocks(num_queries, num_documents, query_tokens, document_tokens, candidates):
                scored = document_mask[block.documents].any(dim=1)
                gradient_NQ = torch.where(scored, gradient_QN[block.scores, block.documents], 0.0).T
                weight_NR = (gradient_NQ.unsqueeze(2) * query_mask[block.queries]).flatten(1)
                # Each row has one winner, so every element is written once.
                choice_NJR = torch.zeros(
                    weight_NR.shape[0], document_tokens, weight_NR.shape[1], dtype=dtype, device=queries.device
                )
                block_winners = winners[block.documents, block.winners].long()
                choice_NJR.scatter_(1, block_winners.unsqueeze(1), weight_NR.unsqueeze(1))
                queries_RH = queries[block.queries].flatten(0, 1).to(dtype)
                with torch.autocast(queries.device.type, enabled=False):
                    document_gradient[block.documents] += choice_NJR @ queries_RH
                    flat_gradient = choice_NJR.flatten(0, 1).T @ documents[block.documents].flatten(0, 1).to(dtype)
                query_gradient[block.queries] += flat_gradient.view_as(queries[block.queries])
        return query_gradient.to(queries.dtype), document_gradient.to(documents.dtype), None, None, None


def _similarity(queries: Tensor, documents: Tensor, document_mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Similarity of each query token to each document token, (N, J, R), -inf where the document token is masked."""
    queries_RH, documents_NJH = queries.flatten(0, 1).to(dtype), documents.to(dtype)
    # Autocast would round the products to half precision: near 32, bfloat16 scores are 0.125 apart.
    with torch.autocast(queries.device.type, enabled=False):
        similarity_NJR = documents_NJH @ queries_RH.T
    return similarity_NJR.masked_fill_(~document_mask.unsqueeze(2), float("-inf"))


def _blocks(
    queries: int, documents: int, query_tokens: int, document_tokens: int, candidates: int | None
) -> Iterator[Block]:
    """Slices of queries and documents whose similarities fit BLOCK_ELEMENTS, one pair at least."""
    pair = max(1, query_tokens * document_tokens)
    if candidates is not None:
        step = max(1, BLOCK_ELEMENTS // pair)
        for query in range(queries):
            end = (query + 1) * candidates
            for start in range(query * candidates, end, step):
                own = slice(start, min(start + step, end))
                yield Block(slice(query, query + 1), own, scores=slice(0, 1), winners=slice(0, query_tokens))
        return
    query_step = max(1, min(queries, BLOCK_ELEMENTS // pair))
    document_step = max(1, BLOCK_ELEMENTS // (pair * query_step))
    for query in range(0, queries, query_step):
        some = slice(query, min(query + query_step, queries))
        rows = slice(some.start * query_tokens, some.stop * query_tokens)
        for document in range(0, documents, document_step):
            yield Block(some, slice(document, min(document + document_step, documents)), scores=some, winners=rows)
