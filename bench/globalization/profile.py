"""The performance profile as a picture: the share of problems and seeds solved within a factor of the best."""

import numpy as np

from pgdfast_experiments import plotting

from . import verdict
from .variants import DEFAULT, FIXED, TODAY, VARIANTS

MOST = 100.0   # the largest factor shown
_LINES = {None: "-", "geodesic": ":", "chord": "--"}
_COLORS = (*plotting.EMPHASIS, "#CC79A7", "#E69F00", "#56B4E9", "#6A3D9A")


def looks() -> dict[str, dict]:
    """{variant: line style}: a colour for each rule, a dash for each acceleration, the default bold."""
    rules = list(dict.fromkeys(o["damping_rule"] for o in FIXED.values()))
    found = {v: {"color": _COLORS[rules.index(o["damping_rule"]) % len(_COLORS)], "linewidth": 1.4,
                 "linestyle": _LINES.get(o["acceleration"], "-.")} for v, o in FIXED.items()}
    found[TODAY] = {"color": "#999999", "linestyle": "-", "linewidth": 3.0}
    found[DEFAULT] = {"color": plotting.INK, "linestyle": "-", "linewidth": 2.4}
    return found


def draw(path, runs) -> None:
    """Write the picture: a panel a target."""
    figure, axes, place = plotting.panels("Share of problems solved within a factor of the fastest variant",
                                          len(verdict.TARGETS), columns=2, width=5.0, height=4.0, legend_rows=3)
    taus, styles, handles = np.geomspace(1, MOST, 400), looks(), {}
    for panel, target in zip(axes, verdict.TARGETS, strict=True):
        ratios = verdict.profile(runs, target)
        for variant, values in ratios.items():
            shares = [verdict.share(values, tau) for tau in taus]
            handles[variant] = panel.step(taus, shares, where="post", label=variant,
                                          zorder=1 if variant == TODAY else 2 + (variant == DEFAULT), **styles[variant])[0]
        plotting.name_panel(panel, f"{target} target", f"{max(map(len, ratios.values()), default=0)} problems x seeds")
        panel.set_xlim(1, MOST)
        panel.set_ylim(0, 1.02)
        panel.set_xlabel("factor of the fastest variant's seconds", fontsize=9)
        panel.set_xscale("log")
        panel.set_xticks([1, 2, 5, 10, 20, 50, 100], ["1", "2", "5", "10", "20", "50", "100"])
        panel.minorticks_off()
    plotting.legend(figure, place, [handles[v] for v in VARIANTS if v in handles], rows_below=3)
    plotting.save(figure, path)
