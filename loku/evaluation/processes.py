"""Rows shared out among the processes of ``torchrun`` or ``accelerate launch``."""

import torch.distributed as dist

from loku.evaluation.extraction import extraction_likelihood, mean_over_rows
from loku.evaluation.scores import token_scores
from loku.processes import is_main_process, rank_and_size


def spread(function, *columns):
    """``function(*columns)``, where it maps lists to one list of results, in order, one a row.

    Where torch.distributed is set up each process is given every so-many-th row; all of them get all the
    results, in the order of the rows, and so must all call this.
    """
    rank, size = rank_and_size()
    share = [column[rank::size] for column in columns]
    results = function(*share) if share[0] else []
    if size == 1:
        return results
    gathered = [None] * size
    dist.all_gather_object(gathered, results)
    merged = [None] * len(columns[0])
    for other, part in enumerate(gathered):
        merged[other::size] = part
    return merged


def spread_token_scores(model, rows, batch_size=16, progress=True, description="scoring"):
    """``token_scores`` of rows that are shared out."""
    progress = progress and is_main_process()
    return spread(lambda rows: token_scores(model, rows, batch_size, progress, description), rows)


def spread_extraction_likelihood(model, rows, scores, n=10, stride=1, batch_size=16, progress=True):
    """The mean of ``extraction_likelihood`` over rows that are shared out; ``scores`` are theirs."""
    progress = progress and is_main_process()

    def per_row(rows, scores):
        return extraction_likelihood(model, rows, n, stride, batch_size, progress, scores).per_row

    return mean_over_rows(spread(per_row, rows, scores))
