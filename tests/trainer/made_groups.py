"""A group of a sweep, made by hand."""

from statistics import fmean, stdev

from trainer.comparison import Group


def make_group(
    name: str,
    scores: list[float],
    *,
    difference: float | None = None,
    low: float | None = None,
    high: float | None = None,
    p: float | None = None,
    size: int = 256,
    jobs: list[str] | None = None,
) -> Group:
    return Group(
        name=name,
        seeds=list(range(1, len(scores) + 1)),
        scores=scores,
        mean=fmean(scores),
        sd=stdev(scores) if len(scores) > 1 else None,
        difference=difference,
        low=low,
        high=high,
        p=p,
        p_holm=None if p is None else min(1.0, 2 * p),
        parameters=49_152,
        bytes_per_token=size,
        queries_per_second=12.5,
        peak_memory_bytes=2_351_751_168,
        jobs=jobs or [f"{name}-{seed}" for seed in range(1, len(scores) + 1)],
    )
