"""The results as Markdown: a table per target, the default beside the best, and the verdict."""

import math
import statistics

from . import verdict
from .problems import PROBLEMS
from .variants import FIXED, VARIANTS


def page(runs, seconds) -> str:
    """The whole report. seconds: of the processor in steps, all runs together."""
    lines = ["# Globalization: every fixed combination of rule and acceleration, and the default", "",
             "`python -m bench globalization`; processor seconds of one thread in `step`, without the first step's analysis of "
             "the closure; medians over seeds (of two, the larger). In brackets: over the best fixed combination. A dash: most "
             "seeds did not get there within the budget. `today`: damping=1e-2, gain-ratio, no acceleration. `default`: "
             "`pgdfast.LM(params)`.",
             "", *verdict_lines(runs), ""]
    for target in verdict.TARGETS:
        lines += [f"## Seconds to the {target} target", "", *table(runs, target), ""]
    lines += ["## The default beside the best", "", *comparison_table(runs), ""]
    lines += ["## The problems", "", *problem_table(runs), ""]
    odd = [f"{name}, {r['variant']}, seed {r['seed']}" for name, mine in runs.items() for r in mine if not r["repeatable"]]
    lines += [f"Repeated runs that took other steps: {'; '.join(odd) or 'none'}.", f"All runs: {seconds:.0f} s in steps."]
    return "\n".join(lines) + "\n"


def verdict_lines(runs) -> list[str]:
    return [f"- {sentence}: {'met' if met else 'missed'}" for sentence, met in verdict.judged(verdict.comparisons(runs))]


def table(runs, target) -> list[str]:
    """Problem x variant: seconds (over the best fixed combination), steps; last the geometric mean and how many were solved."""
    shown = [v for v in VARIANTS if any(r["variant"] == v for records in runs.values() for r in records)]
    lines = [f"| problem (seeds) to {target} | " + " | ".join(shown) + " |", "|---|" + "---|" * len(shown)]
    ratios, solved, entered = ({v: [] for v in shown}, dict.fromkeys(shown, 0), dict.fromkeys(shown, 0))
    for problem, records in runs.items():
        row = verdict.cells(records, target)
        best = verdict.best_fixed(row)
        texts = []
        for variant in shown:
            cell = row.get(variant)
            entered[variant] += cell is not None
            if cell is None or not cell.solved:
                texts.append("" if cell is None else "-")
                continue
            solved[variant] += 1
            over = ""
            if best is not None:
                ratios[variant].append(cell.seconds / row[best].seconds)
                over = f" ({ratios[variant][-1]:.2f})"
            texts.append(f"{cell.seconds:.3g}{over}, {cell.steps:g} steps")
        seeds = max((cell.seeds for cell in row.values()), default=0)
        lines.append(f"| {problem} ({seeds}) | " + " | ".join(texts) + " |")
    lines.append("| solved | " + " | ".join(f"{solved[v]} of {entered[v]}" for v in shown) + " |")
    lines.append("| geometric mean where solved | " + " | ".join(
        f"{statistics.geometric_mean(ratios[v]):.2f}" if ratios[v] else "" for v in shown) + " |")
    return lines


def comparison_table(runs) -> list[str]:
    def number(value, form=".3g"):
        return "-" if value is None or not math.isfinite(value) else format(value, form)

    lines = ["| problem | target | best fixed combination | its seconds | default | over the best | over today's |",
             "|---|---|---|---|---|---|---|"]
    for c in verdict.comparisons(runs):
        lines.append(f"| {c.problem} | {c.target} | {c.best or '-'} | {number(c.best_seconds)} | {number(c.default_seconds)} "
                     f"| {number(c.ratio, '.2f')} | {number(c.over_today, '.2f')} |")
    return lines


def problem_table(runs) -> list[str]:
    lines = ["| problem | what | early | deep | budget | fixed combinations that solve it |", "|---|---|---|---|---|---|"]
    for name in runs:
        p = PROBLEMS[name]
        counts = []
        for target in verdict.TARGETS:
            row = {v: cell for v, cell in verdict.cells(runs[name], target).items() if v in FIXED}
            counts.append(f"{sum(cell.solved for cell in row.values())} of {len(row)}")
        of = "error" if p.by_error else "loss"
        lines.append(f"| {name} | {p.what} | {of} {p.early:g} | {p.deep:g} | {p.steps} steps, {p.seconds:g} s | "
                     f"{', '.join(counts)} |")
    return lines
