"""One run: a variant on a problem from one seed, until the deep target, the end of its budget, or a report that it is over."""

import time

import torch

import pgdfast

from .variants import VARIANTS

SHORT, REPEATS = 0.5, 7   # runs of fewer seconds are timed so often, and the least time counts: others' work only adds
CURVE = 40                # points of a curve that are kept
OVER = ("stalled", "converged", "empty", "failed")


def fingerprint(problem) -> list:
    """What a finished run depends on, beside the code: runs of other targets or budgets are not taken up again."""
    return [problem.early, problem.deep, problem.by_error, problem.steps, problem.seconds, dict(problem.options)]


def run(problem, variant, seed, repeats=1) -> dict:
    """The record of a run, repeated where it is short or `repeats` asks for it: equal steps, the least of the times."""
    trainer = Trainer(problem, variant, seed)
    trainer.warm_up()
    runs = [trainer.train()]
    while len(runs) < repeats or (sum(r["seconds"] for r in runs) < SHORT and len(runs) < REPEATS):
        trainer.restore()
        runs.append(trainer.train())
    fastest = min(runs, key=lambda r: r["seconds"])
    for target in ("early", "deep"):
        if fastest[target]:
            fastest[target]["seconds"] = min(r[target]["seconds"] for r in runs if r[target])
    fastest["repeated"] = len(runs)
    fastest["repeatable"] = all((r["steps"], r["loss"]) == (fastest["steps"], fastest["loss"]) for r in runs)
    return {"variant": variant, "seed": seed, "options": VARIANTS[variant], "fingerprint": fingerprint(problem), **fastest}


class Trainer:
    """A problem, its optimizer, and the point where both began."""

    def __init__(self, problem, variant, seed):
        self.problem = problem
        module, self.closure, self.error = problem.make(seed)
        self.params = list(module.parameters() if isinstance(module, torch.nn.Module) else module)
        self.optimizer = pgdfast.LM(self.params, **{**VARIANTS[variant], **problem.options})
        self._start = [p.detach().clone() for p in self.params], self.optimizer.state_dict()

    def restore(self) -> None:
        """Put parameters and optimizer back to the start; what was analysed and loaded stays."""
        values, state = self._start
        with torch.no_grad():
            for p, value in zip(self.params, values, strict=True):
                p.copy_(value)
        self.optimizer.load_state_dict(state)

    def warm_up(self) -> None:
        """Take a step that is not timed, for what the first one of a structure analyses and loads."""
        try:
            self.optimizer.step(self.closure)
        except (ValueError, RuntimeError):
            pass   # the first timed step will say so
        self.restore()

    def train(self) -> dict:
        """Train once; seconds are the processor's, in `step` alone."""
        problem, steps, solves, trials, spent, why = self.problem, 0, 0, 0, 0.0, "budget"
        losses, values, seconds, reached = [], [], [], {"early": None, "deep": None}
        while steps < problem.steps and spent < problem.seconds:
            start = time.process_time()
            try:
                self.optimizer.step(self.closure)
            except (ValueError, RuntimeError) as fault:
                why = f"raised {type(fault).__name__}: {str(fault)[:200]}"
                break
            spent += time.process_time() - start
            report = self.optimizer.report
            steps, solves, trials = steps + 1, solves + report.attempts, trials + report.trials
            losses.append(report.loss if report.loss_after is None else report.loss_after)
            values.append(self.error() if problem.by_error else losses[-1])
            seconds.append(spent)
            for target, level in (("early", problem.early), ("deep", problem.deep)):
                if reached[target] is None and values[-1] <= level:
                    reached[target] = {"steps": steps, "solves": solves, "trials": trials, "seconds": spent}
            if reached["deep"]:
                why = "deep target"
                break
            if report.status in OVER:
                why = report.status
                break
        return {**reached, "steps": steps, "solves": solves, "trials": trials, "seconds": spent, "end": why,
                "loss": losses[-1] if losses else None, "error": self.error() if self.error else None,
                "curve": thinned(seconds, values)}


def thinned(seconds, values) -> list[list[float]]:
    """[seconds, values] at CURVE steps at most, spread by their numbers' logarithm, of four digits."""
    n = len(values)
    kept = sorted({round(n ** (k / (CURVE - 1))) - 1 for k in range(CURVE)}) if n else []
    return [[float(f"{column[k]:.4g}") for k in kept] for column in (seconds, values)]
