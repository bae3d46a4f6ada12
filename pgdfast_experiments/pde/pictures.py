"""The picture of a worked problem: solution, error field, and the error against seconds for each optimizer."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from pgdfast_experiments import plotting

_COLORS = {"lm": plotting.EMPHASIS[1], "lbfgs": plotting.EMPHASIS[2], "adam": plotting.EMPHASIS[0]}


@dataclass(frozen=True)
class Grid:
    """Where a solution is drawn: the product of two axes, and the reference there.

    first, second: names of the coordinates; the first goes along the picture's x axis. low, high: corners. truth: function of
    points (N, 2) returning the reference, (N, 1). count: points along each axis.
    """

    first: str
    second: str
    low: tuple[float, float]
    high: tuple[float, float]
    truth: Callable
    count: int = 121

    @property
    def shape(self):
        """(points along the first axis, points along the second)."""
        return self.count, self.count

    def points(self, dtype=torch.float64):
        """Return all points, (count^2, 2), the second coordinate running fastest."""
        axes = [torch.linspace(a, b, self.count, dtype=dtype) for a, b in zip(self.low, self.high, strict=True)]
        return torch.cartesian_prod(*axes)


def draw(worked, runs, settings):
    """Return the figure: a row of three panels for each variant that all optimizers ran."""
    shown = [v for v in worked.variants(settings) if worked.for_all(v, settings)] or list(worked.variants(settings))
    figure, axes, _ = plotting.panels(f"{worked.title}, {plotting.seeds(settings.seeds)}", 3 * len(shown), columns=3, width=4.4,
                                      height=3.5, legend_rows=1)
    handles = []
    for row, variant in enumerate(shown):
        mine = [run for run in runs if run.variant == variant]
        solution, error, race = axes[3 * row:3 * row + 3]
        _fields(figure, worked, mine, settings, solution, error)
        handles = _race(worked, mine, settings, race)
        plotting.name_panel(solution, " ".join(filter(None, ("solution", variant and f"({variant})"))))
    plotting.legend(figure, None, handles, rows_below=1)
    return figure


def _fields(figure, worked, runs, settings, solution, error):
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm

    best = settings.optimizers[-1]
    best = next((method for method in settings.optimizers if method.kind == "lm"), best)
    found = median_run([run for run in runs if run.optimizer == best.name]).outcome["solution"].numpy()
    grid = worked.grid
    distance = np.abs(found - grid.truth(grid.points()).reshape(grid.shape).numpy())
    extent = (grid.low[0], grid.high[0], grid.low[1], grid.high[1])
    plain = {"origin": "lower", "extent": extent, "aspect": "auto", "interpolation": "bilinear"}
    bound = np.abs(found).max()
    diverging, rising = (colormaps[name].resampled(64) for name in ("RdBu_r", "viridis"))   # few colours, for a small file
    image = solution.imshow(found.T, cmap=diverging, vmin=-bound, vmax=bound, **plain)
    figure.colorbar(image, ax=solution, pad=0.02).ax.tick_params(labelsize=8)
    top = max(distance.max(), 1e-15)
    image = error.imshow(np.maximum(distance, 1e-4 * top).T, cmap=rising, norm=LogNorm(1e-4 * top, top), **plain)
    figure.colorbar(image, ax=error, pad=0.02).ax.tick_params(labelsize=8)
    plotting.name_panel(error, "|error|", f"{best.label}, {distance.max():.1e} at most")
    for axes in (solution, error):
        axes.grid(False)
        axes.set_xlabel(grid.first, fontsize=9)
        axes.set_ylabel(grid.second, fontsize=9)


def _race(worked, runs, settings, axes):
    column = "error" if worked.truth is None else "coefficient_error"
    handles = []
    for place, method in enumerate(settings.optimizers):
        color = _COLORS.get(method.kind, plotting.SEQUENCE[place % len(plotting.SEQUENCE)])
        mine = [run for run in runs if run.optimizer == method.name]
        if not mine:
            continue
        middle = median_run(mine, column)
        for run in mine:
            strong = run is middle
            (line,) = axes.plot(np.maximum(run.seconds, 1e-3), run.columns[column], color=color, linewidth=2 if strong else 0.8,
                                alpha=1 if strong else 0.4, zorder=3 if strong else 2, label=plotting.math(method.label))
            if strong:
                handles.append(line)
                axes.plot(run.seconds[-1], run.columns[column][-1], "o", color=color, markersize=5, zorder=4)
    fastest = min((run.step_ms for run in runs if np.isfinite(run.step_ms)), default=1.0)
    axes.set_xlim(max(fastest / 1e3, 1e-3), 1.3 * max(max(run.seconds[-1] for run in runs), 2 * fastest / 1e3))
    plotting.log_axis(axes, "x")
    plotting.share_log_range([axes])
    plotting.name_panel(axes, "error" if worked.truth is None else "error of the coefficient")
    axes.set_xlabel("seconds in steps", fontsize=9)
    return handles


def median_run(runs, column="error"):
    """Return the run whose last value in `column` is the (lower) median."""
    return sorted(runs, key=lambda run: np.nan_to_num(run.columns[column][-1], nan=np.inf))[(len(runs) - 1) // 2]
