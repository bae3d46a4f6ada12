"""`pgdfast verify`: the fast solver against the reference on every task, as a table and an exit code."""

import time

import torch

from pgdfast_experiments import options, tasks, terminal, verification
from pgdfast_experiments.errors import UsageError
from pgdfast_experiments.methods import check_backend
from pgdfast_experiments.training import torch_threads

_DEVICES = {"cpu": "CPU", "cuda": "GPU"}
SUMMARY = """\
Compare a fast backend with the plain float64 reference on a problem of every task: residual,
gradient, J v, J^T u, Gram matrix and the step of each solver, at three points along training, in
float64 and float32; then the losses of 20 float64 steps of both. Problems are made small enough for
explicit Jacobians. The exit code is 1 if an error exceeds its bound; the last lines name it."""


def add_options(parser):
    """Add the options of the command to `parser`."""
    add = parser.add_argument
    add("tasks", nargs="*", metavar="TASK", help=f"which tasks (default: all of {', '.join(tasks.TASKS)})")
    add("--backend", choices=("auto", "native", "torch"), default="auto",
        help="which fast backend is compared (default: %(default)s)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where both run (default: %(default)s)")
    add("--threads", type=options.whole_number(1), default=1, metavar="N",
        help="CPU threads of PyTorch (default: %(default)s)")


def run(arguments):
    """Compare, print the table; return 0, or 1 if a bound is exceeded."""
    unknown = [name for name in arguments.tasks if name not in tasks.TASKS]
    if unknown:
        raise UsageError(f"unknown task {unknown[0]!r}; the tasks are: {', '.join(tasks.TASKS)}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: PyTorch sees no GPU; leave it out to compare on the CPU")
    terminal.require_extras("matplotlib", "rich")
    problems = [entry for name in arguments.tasks or tasks.TASKS for entry in _problems(name, arguments.device)]
    start, rows, wrong, sizes = time.perf_counter(), [], [], []
    with torch_threads(arguments.threads), terminal.progress(2 * len(problems)) as (announce, advance):
        check_backend((_LM,), arguments.backend)
        for name, make in problems:
            sizes.append(f"{name}: {make(torch.float64, 0).size}")
            for dtype in (torch.float64, torch.float32):
                announce(f"{name} {_short(dtype)}")
                found = verification.compare(make, dtype, arguments.backend)
                distance = None
                if dtype == torch.float64:
                    solver = make(dtype, 0).solvers[0]
                    distance = verification.curve_distance(make, arguments.backend, solver)
                rows.append(_row(name, found, distance))
                wrong += _wrong(name, found, distance)
                advance(1)
    terminal.show_table(
        f"{arguments.backend} against the reference on the {_DEVICES[arguments.device]}: largest relative error at steps "
        f"{', '.join(map(str, verification.POINTS))} of training",
        ["task", "dtype", "r", "J^T r", "J v", "J^T u", "Gram", "steps by solver", "condition", "20 losses"], rows,
        [f"bounds: {verification.BOUNDS[torch.float64]:g} in float64; {verification.BOUNDS[torch.float32]:g} in float32, "
         f"steps where the condition is at most {verification.CONDITION:g} (others in brackets); losses "
         f"{verification.CURVE_BOUND:g}", *sizes, f"{time.perf_counter() - start:.0f} seconds"],
    )
    for line in wrong:
        terminal.say(line, "bold red")
    if not wrong:
        terminal.say(f"all {len(rows)} comparisons are within their bounds", "green")
    return 1 if wrong else 0


def _problems(name, device):
    task = tasks.load(name)
    found = [(name, task.problem)]
    if hasattr(task, "problem_cross_entropy"):
        found.append((f"{name} (cross-entropy)", task.problem_cross_entropy))
    return found if device == "cpu" else [(title, _on(device, make)) for title, make in found]


def _on(device, make):
    return lambda dtype, seed=0: verification.on_device(make(dtype, seed), device)


def _short(dtype):
    return str(dtype).removeprefix("torch.")


def _row(name, found, distance):
    shown = {key: f"{error:.0e}" for key, error in found.errors.items()}
    steps = [f"{key.removeprefix('step ')} " + (f"({text})" if key in found.unbounded else text)
             for key, text in shown.items() if key.startswith("step ")]
    return [name, _short(found.dtype), shown["residual"], shown["gradient"], shown["J v"], shown["J^T u"], shown["Gram"],
            ", ".join(steps), f"{found.condition:.0e}", "" if distance is None else f"{distance:.0e}"]


def _wrong(name, found, distance):
    lines = [f"{name}, {_short(found.dtype)}: {quantity} is off by {error:.2e}, more than {bound:g}"
             for quantity, error, bound in found.violations()]
    if distance is not None and distance > verification.CURVE_BOUND:
        lines.append(f"{name}: the losses part by {distance:.2e}, more than {verification.CURVE_BOUND:g}")
    return lines


_LM = options.methods(("lm",))("lm")[0]
