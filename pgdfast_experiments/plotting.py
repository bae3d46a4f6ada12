"""Pictures: a grid of panels with one look, curves with their band over seeds, one legend below."""

from math import ceil

import numpy as np

EMPHASIS = ("#0072B2", "#D55E00", "#009E73")
"""Colours that stay apart for colour-blind readers (Okabe and Ito)."""

SEQUENCE = ("#111111", "#6A3D9A", "#CC79A7", "#E69F00", "#56B4E9", "#999999")
"""Colours for optimizers, apart from those of `EMPHASIS` that pictures use for modes."""

INK = "#222222"


def panels(title, count, columns=3, width=4.0, height=3.1, legend_rows=2):
    """Return a figure titled `title`, `count` axes in rows of `columns`, and the legend's place.

    The legend goes into the cell after the last panel where the grid has one left, else below
    (None), where there is room for `legend_rows`. Sizes are in inches, per panel.
    """
    from matplotlib.figure import Figure  # without pyplot: no global state, no window
    from matplotlib.ticker import MaxNLocator

    columns = min(columns, count)
    rows = ceil(count / columns)
    foot = 0.0 if count < rows * columns else 0.25 + 0.3 * legend_rows
    total = rows * height + foot + 0.4
    figure = Figure(figsize=(columns * width, total), dpi=150, layout="constrained")
    below = foot / total
    figure.get_layout_engine().set(rect=(0, below, 1, 1 - below), w_pad=0.08, h_pad=0.08)
    figure.suptitle(title, fontsize=13 if columns > 2 else 11, color=INK)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid[:count]:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, which="major", color="#e6e6e6", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=9)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    for axes in grid[count:]:
        axes.axis("off")
    return figure, list(grid[:count]), grid[count] if count < len(grid) else None


def band(axes, steps, curves, color, label=None, width=1.8, fill=0.15, order=2, log=True, **line):
    """Draw the median of `curves` (S seeds, R rows) over `steps` (R,); fill from their minimum to their maximum.

    On a logarithmic axis (`log`) values that are not positive leave a gap, as those that are not finite do anywhere.
    """
    good = np.isfinite(curves) & (curves > 0) if log else np.isfinite(curves)
    curves = np.where(good, curves, np.nan)
    shown = np.flatnonzero(~np.isnan(curves).all(axis=0))
    middle = np.full(curves.shape[1], np.nan)
    low, high = middle.copy(), middle.copy()
    middle[shown] = np.nanmedian(curves[:, shown], axis=0)
    low[shown] = np.nanmin(curves[:, shown], axis=0)
    high[shown] = np.nanmax(curves[:, shown], axis=0)
    if fill and len(curves) > 1:
        axes.fill_between(steps, low, high, color=color, alpha=fill, linewidth=0, zorder=order - 0.5)
    (drawn,) = axes.plot(steps, middle, color=color, linewidth=width, label=label, zorder=order, **line)
    return drawn


def seeds(count):
    """Return "1 seed" or "5 seeds"."""
    return "1 seed" if count == 1 else f"{count} seeds"


def of_seeds(count):
    """Return what the bands of a picture show."""
    return f"median and range of {seeds(count)}" if count > 1 else "1 seed"


def math(label):
    """Return a label with the Greek letter for mu."""
    return label.replace("mu", "\u03bc")


def of(runs, column, optimizer=None, variant=None):
    """Return (steps (R,), curves (S, R)) of the runs of one optimizer and variant; None takes all of them."""
    mine = [run for run in runs if optimizer in (None, run.optimizer) and variant in (None, run.variant)]
    return mine[0].at, np.stack([run.columns[column] for run in mine])


def name_panel(axes, title, note=""):
    """Put the panel's name above it on the left and a short note on the right."""
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK)
    if note:
        axes.set_title(note, loc="right", fontsize=9, color="#555555")


def share_log_range(panels, lowest=1e-14, highest=1e4):
    """Give all `panels` one logarithmic range that holds every line and band, within two limits."""
    low = np.clip(min(panel.dataLim.y0 for panel in panels), lowest, highest / 100) / 1.5
    high = np.clip(max(panel.dataLim.y1 for panel in panels), low * 10, highest) * 1.5
    for panel in panels:
        panel.set_ylim(low, high)  # first: a change of scale looks at the limits in force
        log_axis(panel, "y")


def log_axis(axes, which):
    """Make the x or y axis of a panel logarithmic, with labels at decades, or at 1, 2, 5 where it spans few of them.

    To be called when the limits stand.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis = getattr(axes, f"{which}axis")
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    low, high = axis.get_view_interval()
    if high / max(low, 1e-300) > 150:
        axis.set_minor_formatter(NullFormatter())
        return
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def legend(figure, place, handles, rows_below=2):
    """Put one legend for all panels into the free cell `place`; below them when it is None."""
    style = {"handles": handles, "frameon": False, "fontsize": 10.5, "handlelength": 2.4}
    if place is None:
        ncols = ceil(len(handles) / rows_below)
        figure.legend(loc="lower center", ncols=ncols, columnspacing=1.8, **style)
    else:
        place.legend(loc="center left", labelspacing=0.9, **style)


def save(figure, path):
    """Write a figure as PNG with a palette of 256 colours: a third of the size, with no difference to the eye."""
    from io import BytesIO

    from PIL import Image

    full = BytesIO()
    figure.savefig(full)
    image = Image.open(full).convert("RGB")
    image.quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(path, "PNG", optimize=True)
