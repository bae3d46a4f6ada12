"""What the grokking tasks share: when a curve crosses a level, panels of curves by variant."""

import numpy as np

from pgdfast_experiments import plotting


def by_group(runs):
    """Return {(optimizer, variant): runs}, in the order in which they were made."""
    groups = {}
    for run in runs:
        groups.setdefault((run.optimizer, run.variant), []).append(run)
    return groups


def crossing(run, column, level, below=False):
    """Return the first measured step at which `column` has reached `level` (from above if `below`), or NaN."""
    values = run.columns[column]
    hits = np.flatnonzero(values <= level if below else values >= level)
    return float(run.at[hits[0]]) if hits.size else float("nan")


def median(values):
    """Return the median where most values are numbers, a missing one counting as later than all; else NaN."""
    values = np.sort(np.where(np.isnan(values), np.inf, values))
    middle = float(np.median(values)) if len(values) % 2 else float(values[len(values) // 2])
    return middle if np.isfinite(middle) else float("nan")


def spread(values):
    """Return the largest over the smallest of some positive numbers, NaN if one is missing."""
    values = np.asarray(values, dtype=float)
    return float(values.max() / values.min()) if values.size and not np.isnan(values).any() else float("nan")


def shown(value, form="g"):
    """Return a number as text, a missing one as a dash."""
    return "-" if value is None or np.isnan(value) else format(value, form)


def draw(panel, runs, column, groups, **line):
    """Draw `column` of each (optimizer, variant, color, label) in `groups`; returns the lines."""
    handles = []
    for optimizer, variant, color, label in groups:
        steps, curves = plotting.of(runs, column, optimizer, variant)
        handles.append(plotting.band(panel, steps, curves, color, label, fill=0.12, **line))
    return handles


def shades(count):
    """Return `count` colours in order, dark to light, for values of one quantity."""
    from matplotlib import colormaps

    return [colormaps["viridis"](value) for value in np.linspace(0.0, 0.88, max(count, 1))]
