"""One experiment from end to end: train every case, judge the curves, write the files, print the table.

What a task module gives (see `tasks`) is put together here, so that tasks hold data, model, loss and pictures
and nothing else.
"""

import os
import time
from dataclasses import dataclass

import numpy as np

from pgdfast_experiments import locks, options, plotting, processes, records, report, terminal
from pgdfast_experiments.checkpoints import Checkpoint
from pgdfast_experiments.errors import UsageError
from pgdfast_experiments.measures import FAIL, OPEN, PASS, Check
from pgdfast_experiments.methods import check_backend
from pgdfast_experiments.together import TIMING, train_together
from pgdfast_experiments.training import torch_threads, train


@dataclass(frozen=True)
class Table:
    """What a run prints: a title, headings, rows of text, and notes below."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    notes: list[str]


def run(task, arguments, argv=()):
    """Run a task with its parsed options; returns the exit code. argv: the command line, with which it starts processes."""
    settings = options.fill(task, arguments)
    terminal.require_extras("matplotlib", "rich")
    folder = records.prepare_folder(settings.out)
    several = getattr(settings, "nproc", 1) > 1
    if several and processes.inside():
        with processes.joined(settings) as rank:
            return _run_in(folder, task, settings, rank)
    with locks.only_run(folder):
        records.clear_leftovers(folder)
        if several:   # what can be refused is, before they start
            called = result_name(task, settings)
            _continue_or_start(task, Checkpoint(folder / f"{called}.checkpoint", settings.plain()), settings.resume)
            check_backend(settings.optimizers, settings.backend)
            return processes.launch(argv, settings)
        return _run_in(folder, task, settings)


def _run_in(folder, task, settings, rank=0):
    """Run a task in a folder that no other run writes to; returns the exit code. rank: 0 writes."""
    called = result_name(task, settings)
    checkpoint = Checkpoint(folder / f"{called}.checkpoint", settings.plain(), writes=rank == 0)
    _continue_or_start(task, checkpoint, settings.resume)
    if settings.resume and not checkpoint.exists:
        if complete(folder, called, settings.plain()):
            print(f"{called} is complete in {folder} with these settings; without --resume it runs anew")
            return 0
        print(f"note: --resume: {called} starts from the beginning: {_why_anew(folder, called, settings.plain())}")

    started, clock = time.gmtime(), time.perf_counter()
    with torch_threads(settings.threads):
        check_backend(settings.optimizers, settings.backend)
        cases = task.cases(settings)
        resumed = bool(checkpoint.runs or checkpoint.current)
        runs, ensembles = _train(cases, checkpoint, settings)
        checkpoint.write()  # whatever goes wrong below loses no training
        if rank:
            return 0
        extra = task.extra(settings) if hasattr(task, "extra") else {}
    summary = task.summarize(runs, settings) | extra
    checks = task.judge(summary, settings)
    table = task.table(summary, settings)
    table.notes.extend(
        f"{name}: {count} networks in one ensemble; ms/step is the time of its step over the networks that took it"
        for name, count in ensembles.items())
    pictures = task.pictures(runs, summary, settings)

    names = {suffix: f"{called}{suffix}.png" for suffix in pictures}
    record = {
        "task": called,
        "source": task.SOURCE,
        "paper": task.paper(settings) if hasattr(task, "paper") else task.PAPER,
        "figures": [{"file": names[suffix], "caption": caption} for suffix, (_, caption) in pictures.items()],
        "settings": settings.plain(),
        "problem": task.describe(settings),
        "seeds": list(range(settings.seeds)),
        "summary": summary,
        "step_ms": _step_times(runs),
        "ensembles": {"networks": ensembles, "times": TIMING} if ensembles else None,
        "table": vars(table),
        "checks": [vars(check) for check in checks],
        "versions": records.versions(),
        "machine": records.machine(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", started),
        "seconds": round(time.perf_counter() - clock, 3),
        "resumed": resumed,
        "quick": settings.quick,
    }
    with records.all_or_nothing(folder, "; make room; --resume then writes them without training again") as scratch:
        records.write_csv(scratch / f"{called}.csv", runs)
        records.write_json(scratch / f"{called}.json", record)
        for suffix, (figure, _) in pictures.items():
            plotting.save(figure, scratch / names[suffix])
    checkpoint.remove()

    terminal.show_table(table.title, table.columns, table.rows, table.notes)
    terminal.show_checks(checks)
    terminal.show_files(folder / name for name in (*names.values(), f"{called}.csv", f"{called}.json"))
    return 0


def result_name(task, settings):
    """Return the name of the result files: the task's, or that of a variant of it."""
    return task.name(settings) if hasattr(task, "name") else task.NAME


def complete(folder, called, settings):
    """Whether the folder holds all results of a run with these settings, and no checkpoint of a later one."""
    try:
        record = report.read(folder / f"{called}.json")
    except report.Unreadable:
        return False
    files = [f"{called}.csv", *(figure["file"] for figure in record["figures"])]
    return (record["settings"] == records.as_read(settings) and all((folder / file).is_file() for file in files)
            and not (folder / f"{called}.checkpoint").exists())


def _why_anew(folder, called, settings):
    """Return why there is nothing to go on with in a folder that has no checkpoint."""
    try:
        record = report.read(folder / f"{called}.json")
    except report.Unreadable:
        return f"{str(folder)!r} has no checkpoint of it"
    other = records.differences(record["settings"], records.as_read(settings))
    which = f"with other settings ({other})" if other else "that lacks some of its files"
    return (f"{str(folder)!r} has a finished run {which}, and a finished run leaves no checkpoint to go on from; its files "
            "stay until the new ones are written")


def _continue_or_start(task, checkpoint, resume):
    if resume and checkpoint.exists:
        checkpoint.load()
    elif checkpoint.exists:
        raise UsageError(
            f"{str(checkpoint.path)!r} is left of an interrupted run of {task.NAME}; add --resume to go on with it, or "
            "delete it to start again"
        )


def _train(cases, checkpoint, settings):
    """Train what is not finished; returns the runs, in the order of `cases`, and by optimizer the size of its ensemble."""
    together = ensembles_wanted(settings)
    unit, sizes = "steps" if cases[0].seconds is None else "seconds", {}
    with terminal.progress(sum(case.work for case in cases), unit) as (announce, advance):
        for case in cases:
            run, saved = checkpoint.done(case.key), checkpoint.saved(case.key)
            advance(case.work if run else 0 if saved is None else _spent(case, saved["seconds"].numpy()))
        while pending := [case for case in cases if checkpoint.done(case.key) is None]:
            group = _company(pending, checkpoint) if together else pending[:1]
            saved = [checkpoint.saved(case.key) for case in group]
            if len(group) == 1:
                case = group[0]
                announce(" ".join(filter(None, (case.optimizer, case.variant, f"seed {case.seed}"))))
                ended = [train(case, case.start(), saved[0], advance, lambda state: checkpoint.keep(lambda: [state()]))]
            else:
                announce(f"{group[0].optimizer}, {len(group)} networks")
                sizes.setdefault(group[0].optimizer, len(group))
                with torch_threads(min(settings.ensemble_threads, len(group))):
                    ended, states = train_together(group, saved, advance, checkpoint.keep)
                checkpoint.note(states)
            work = {case.key: case for case in group}
            for run in ended:
                checkpoint.finish(run)
                advance(work[run.key].work - _spent(work[run.key], run.step_seconds))   # of a run that ended early
    return [checkpoint.done(case.key) for case in cases], sizes


def ensembles_wanted(settings):
    """Whether cases that allow it are trained as ensembles: not with --sequential, nor by the reference, which has none."""
    backend = os.environ.get("PGDFAST_BACKEND") if settings.backend == "auto" else settings.backend
    return not (getattr(settings, "sequential", True) or backend == "reference")


def _company(pending, checkpoint):
    """The first of the pending cases with those that can be trained in one ensemble with it."""
    def kind(case):
        saved = checkpoint.saved(case.key)
        return case.optimizer, case.steps, case.together, 0 if saved is None else len(saved["seconds"])

    first = pending[0]
    return [case for case in pending if kind(case) == kind(first)] if first.together else [first]


def _spent(case, step_seconds):
    """How much of a case's work is done, in the unit of `Case.work`."""
    taken = step_seconds[np.isfinite(step_seconds)]
    return len(taken) if case.seconds is None else float(taken.sum())


def _step_times(runs):
    """Median milliseconds of a step by optimizer and variant."""
    groups = {}
    for run in runs:
        groups.setdefault(" ".join(filter(None, (run.optimizer, run.variant))), []).append(run.step_ms)
    return {name: sorted(times)[len(times) // 2] for name, times in groups.items()}


def check(claim, summary, needed, verdict, ready=True, why=""):
    """Return the `Check` of a claim.

    Args:
        claim: what is claimed.
        summary: by run name; entries may hold "stopped_at", the seeds that were no longer finite.
        needed: the names in `summary` that the claim is about; None among them means it cannot be judged.
        verdict: called if all `needed` ran; returns (held or None, text).
        ready: whether the settings allow a judgement.
        why: why not, otherwise.

    """
    if None in needed or not set(needed) <= set(summary):
        return Check(claim, "the optimizers or settings that it is about were not run", OPEN)
    if not ready:
        return Check(claim, why, OPEN)
    held, text = verdict()
    return Check(claim, text, OPEN if held is None else PASS if held else FAIL)
