"""First-fit decreasing: the starting point of every search and the bound it never exceeds."""

from collections.abc import Sequence

from lorafusion_sched.problem import padded

type Item = tuple[int, int]  # (job number, tokens)


def first_fit_decreasing(
    items: Sequence[Item], capacity: int, tile: int, max_jobs: int | None = None
) -> list[list[int]]:
    """Packs items into bins: longest first, each into the first bin with room.

    Args:
        items: (job number, tokens) of each sample; tokens at most `capacity`.
        capacity: rows of a bin, a multiple of `tile`.
        tile: padding multiple of one job's share of a bin.
        max_jobs: jobs per bin at most; None is no limit.

    Returns:
        Bins as lists of item indices, in order of opening.
    """
    bins: list[list[int]] = []
    shares: list[dict[int, int]] = []  # tokens per job
    rows: list[int] = []
    for index in sorted(range(len(items)), key=lambda i: (-items[i][1], i)):
        job, tokens = items[index]
        for number, share in enumerate(shares):
            before = share.get(job, 0)
            grown = rows[number] + padded(before + tokens, tile) - padded(before, tile)
            full = max_jobs is not None and job not in share and len(share) >= max_jobs
            if grown <= capacity and not full:
                bins[number].append(index)
                share[job], rows[number] = before + tokens, grown
                break
        else:
            bins.append([index])
            shares.append({job: tokens})
            rows.append(padded(tokens, tile))
    return bins
