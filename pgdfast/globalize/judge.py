"""Whether the point that was tried is kept."""

from __future__ import annotations

import math

import torch


def judged(report, after: float, predicted: float, found: bool, first: bool, dtype: torch.dtype) -> bool:
    """Whether the point tried is kept, by its loss. Notes the ratio test. found: a search, if any, has ended at a point."""
    loss = report.loss
    # A first step that promises less than the loss's rounding means convergence, and may as well stand if it does not
    # climb. Later attempts are small because mu rose: they must descend. Promises of a rise, which different learning
    # rates and momentum can make, are a poor model.
    stalled = first and abs(predicted) <= 8 * torch.finfo(dtype).eps * abs(loss)
    kept = found and (after < loss or (stalled and after == loss))
    report.predicted_reduction = predicted
    if predicted > 0 and not stalled:
        report.gain_ratio = (loss - after) / predicted if math.isfinite(after) else -math.inf
    else:
        report.gain_ratio = None if stalled else -math.inf
    report.loss_after = after if kept else loss
    report.status = "stalled" if stalled else "accepted" if kept else "rejected"
    return kept
