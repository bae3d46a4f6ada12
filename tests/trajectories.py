"""Records some 300 optimizer trajectories, and compares two recordings: did a change of the library change any number?

    python tests/trajectories.py record FILE [--only PATTERN]
    python tests/trajectories.py compare BEFORE AFTER

Run `record` with PYTHONPATH set to the tree in question: only pgdfast's public names are used, so the same script runs on
older and later trees. A recording holds bits: losses and report fields as hexadecimal floats, parameters as bytes.
`compare` exits with 1 where a number differs by more than 1e-10 (1e-5 for float32 problems) or anything else differs.
"""

from __future__ import annotations

import argparse
import base64
import copy
import fnmatch
import hashlib
import json
import random
import sys
import time
import warnings

import numpy as np
import torch
from trajectory_problems import ENSEMBLES, PROBLEMS, ensemble, ensemble_residuals, rand

import pgdfast

BOUNDS = {"float64": 1e-10, "float32": 1e-5}
# What is recorded of a report, under the first of these names that it has.
FIELDS = {
    "status": ("status",), "solver": ("solver",), "solve_status": ("solve_status",), "damping": ("damping",),
    "next_damping": ("next_damping",), "gain_ratio": ("gain_ratio",), "predicted_reduction": ("predicted_reduction",),
    "iterations": ("iterations",), "attempts": ("attempts",), "trials": ("trials",), "line_search": ("line_search",),
    "correction": ("correction",), "momentum": ("momentum",), "loss_after": ("loss_after",),
    "residuals": ("residuals",), "parameters": ("parameters",),
}
# Where the loss is at its rounding level, these say nothing beyond this fraction of the first loss.
LOSS_LIKE = ("loss", "loss_after", "predicted_reduction")
SOLVERS = ("auto", "dual", "primal", "cg", "lsmr", "eigh")


# --- ways to run ------------------------------------------------------------------------------------------------------------

def plain(make, dtype, options, steps, save_at=None):
    """LM.step, with the optimizer saved and made anew where asked for."""
    params, closure = make(dtype)
    params = list(params)
    optimizer = pgdfast.LM(params, **options())
    for step in range(steps):
        if step == save_at:
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = pgdfast.LM(params, **options())
            optimizer.load_state_dict(state)
        loss = optimizer.step(lambda step=step: closure(step))
        yield loss, optimizer.report, params


def captured(make, dtype, options, steps, save_at=None):
    """CapturedStep, with ordinary steps from the save on."""
    params, closure = make(dtype)
    params = list(params)
    optimizer = pgdfast.LM(params, **options())
    launch = pgdfast.CapturedStep(optimizer, lambda: closure(0))
    for step in range(steps):
        loss = optimizer.step(lambda: closure(0)) if save_at is not None and step >= save_at else launch.step()
        yield loss, optimizer.report, params


def hybrid(make, dtype, options, steps, save_at=None):
    """LM first, Adam from the switch on."""
    params, closure = make(dtype)
    params, options = list(params), options()
    switch = options.pop("switch", 4)

    def build():
        lm = pgdfast.LM(params, **options)
        wanted = switch(lambda: closure(0)) if callable(switch) else switch
        return pgdfast.Hybrid(lm, torch.optim.Adam(params, lr=1e-2), switch=wanted)

    optimizer = build()
    for step in range(steps):
        if step == save_at:
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = build()
            optimizer.load_state_dict(state)
        loss = optimizer.step(lambda: closure(0))
        yield loss, optimizer.report, params


def products(make, dtype, options, steps, save_at=None):
    """Linearization, its products and solves, and the spectrum; no steps."""
    params, closure = make(dtype)
    params, backend = list(params), options().get("backend", "auto")
    lin = pgdfast.linearize(lambda: closure(0), params, backend=backend)
    v, u = rand(lin.num_parameters, seed=1, dtype=dtype), rand(lin.num_residuals, seed=2, dtype=dtype)
    results = [lin.residual, lin.jvp(v), lin.vjp(u), lin.ggn(v), lin.gradient(), lin.gram(), lin.diagonal(), lin.dense()]
    for solver in SOLVERS:
        results.append(pgdfast.solve(lin, 1e-2, solver=solver).step)
    for solver in ("auto", "cg", "eigh"):
        results += [solution.step for solution in pgdfast.solve(lin, [1e-3, 1e-2, 1e-1], solver=solver)]
    results.append(pgdfast.ntk_spectrum(lambda: closure(0), params).eigenvalues)
    yield lin.loss, None, results


# --- the table --------------------------------------------------------------------------------------------------------------

def table() -> dict:
    """{name: (run, make, dtype, options, steps, save_at)}."""
    runs = {}

    def add(name, make, options=dict, dtype="float64", steps=10, run=plain, save_at=None):
        make = PROBLEMS[make] if isinstance(make, str) else make
        assert name not in runs, name
        runs[name] = run, make, getattr(torch, dtype), options, steps, save_at

    def under(**options):   # a new set of option objects for every run
        return lambda: copy.deepcopy(options)

    for name in PROBLEMS:
        for dtype in ("float64", "float32"):
            add(f"default/{name}/{dtype}", name, dtype=dtype)
    for name in ("A", "curve", "C_laplacian", "G_entropy", "fallback_conv"):
        for rule in ("constant", "delayed", "sweep"):
            add(f"rule/{rule}/{name}", name, under(damping_rule=rule, damping=1e-2 if rule != "constant" else 0.1))
    for rule in ("constant", "delayed", "sweep"):
        add(f"rule/{rule}/A/float32", "A", under(damping_rule=rule), "float32")
    for name in ("A", "rosenbrock", "groups"):
        add(f"rule/schedule/{name}", name, lambda: {"damping": lambda step: 0.5 * 0.7**step, "damping_rule": "constant"})
    for name in ("rosenbrock", "logarithm", "curve", "A"):
        for rule in ("gain-ratio", "delayed", "sweep"):
            add(f"rejections/{rule}/{name}", name, under(damping_rule=rule, damping=1e-7), steps=12)
    for name in ("A", "E", "G_entropy", "penalty", "fallback_conv", "mixed_rows"):
        for solver in SOLVERS[1:]:
            add(f"solver/{solver}/{name}", name, under(solver=solver), steps=6)
    for solver in SOLVERS[1:]:
        add(f"solver/{solver}/A/float32", "A", under(solver=solver), "float32")
        add(f"scaling/{solver}/curve", "curve", under(solver=solver, scaling="marquardt"))
        add(f"scaling/{solver}/A", "A", under(solver=solver, scaling="marquardt", damping_rule="delayed"), steps=6)
    for name in ("A", "curve", "D", "penalty"):
        for solver in ("auto", "lsmr", "cg"):
            add(f"gauss-newton/{solver}/{name}", name,
                under(damping=0, damping_rule="constant", solver=solver, rcond=1e-6, lr=0.5), steps=6)
    for name in ("A", "rosenbrock", "transformer"):
        for rule in ("constant", "gain-ratio"):
            add(f"armijo/{rule}/{name}", name, under(damping_rule=rule, line_search="armijo", damping=1e-3), steps=6)
    for kind in ("geodesic", "chord"):
        for name in ("A", "curve", "rosenbrock", "C_laplacian", "groups"):
            add(f"acceleration/{kind}/{name}", name, under(acceleration=kind), steps=6)
        for rule in ("delayed", "constant"):
            add(f"acceleration/{kind}/{rule}/curve", "curve", under(acceleration=kind, damping_rule=rule, scaling="marquardt"))
        add(f"acceleration/{kind}/cg/A", "A", under(acceleration=kind, solver="cg", momentum=0.3), steps=6)
    krylov = {
        "jacobi": {"preconditioner": "jacobi"}, "nystrom": {"preconditioner": "nystrom"},
        "nystrom-kept": {"preconditioner": pgdfast.Nystrom(rank=5, refresh=3, seed=1)}, "warm": {"warm_start": True},
        "truncate": {"truncate": True, "max_iterations": 40}, "progress": {"progress": 5e-3}, "absolute": {"absolute": 1e-3},
        "loose": {"max_iterations": 12, "tolerance": 1e-2}, "all": {"preconditioner": "jacobi", "warm_start": True,
                                                                    "truncate": True, "progress": 1e-4},
    }
    for kind, limits in krylov.items():
        for name, rule in (("A", "gain-ratio"), ("D", "delayed")):
            add(f"cg/{kind}/{name}", name, lambda limits=limits, rule=rule: {
                "solver": "cg", "damping": 1e-4, "damping_rule": rule, "cg": pgdfast.CG(**limits)}, steps=6)
    for solver in SOLVERS:
        add(f"momentum/{solver}", "batches", under(solver=solver, momentum=0.6, norm_constraint=0.01, lr=0.3))
    for rule in ("constant", "delayed", "sweep"):
        add(f"momentum/{rule}", "fresh_points", under(damping_rule=rule, momentum=0.8, lr=0.2, norm_constraint=1e-3))
        add(f"draws/{rule}", "dropout", under(damping_rule=rule, damping=0.1), steps=6)
    add("norm-constraint/A", "A", under(norm_constraint=1e-3))
    for rule in ("constant", "gain-ratio", "delayed", "sweep"):
        add(f"decay/{rule}", "A", under(damping_rule=rule, weight_decay=1e-2, lr=0.7), steps=6)
    for backend in ("torch", "reference"):
        for name in ("A", "C_laplacian", "D", "transformer", "G_squares", "curve", "penalty", "fallback_conv", "mixed_rows"):
            add(f"backend/{backend}/{name}", name, under(backend=backend), steps=6)
        for solver in SOLVERS[1:]:
            add(f"backend/{backend}/{solver}/A", "A", under(backend=backend, solver=solver, damping_rule="delayed"), steps=6)
        add(f"backend/{backend}/A/float32", "A", under(backend=backend), "float32", steps=6)
        add(f"backend/{backend}/geodesic", "curve", under(backend=backend, acceleration="geodesic", scaling="marquardt"))
        add(f"backend/{backend}/sweep", "A", under(backend=backend, damping_rule="sweep"), steps=6)
    for name, make in ENSEMBLES.items():
        for dtype in ("float64", "float32"):
            add(f"ensemble{name}/{dtype}", make, under(ensemble=3), dtype)
    for solver in SOLVERS[1:]:
        add(f"ensemble/{solver}", ensemble, under(ensemble=3, solver=solver), steps=6)
    ways = {
        "delayed": {"damping_rule": "delayed", "damping": 1e-5}, "constant": {"damping_rule": "constant"},
        "lists": {"lr": [1.0, 0.5, 0.8], "damping": [0.1, 1e-3, 1e-2]}, "marquardt": {"scaling": "marquardt"},
        "armijo": {"line_search": "armijo"}, "decay": {"weight_decay": 1e-2}, "torch": {"backend": "torch"},
        "sweep": {"damping_rule": "sweep"}, "chord": {"acceleration": "chord"}, "momentum": {"momentum": 0.5},
        "warm": {"solver": "cg", "cg": pgdfast.CG(warm_start=True, preconditioner="jacobi")},
    }
    for kind, options in ways.items():
        add(f"ensemble/{kind}", ensemble_residuals if kind == "chord" else ensemble, under(ensemble=3, **options), steps=6)
    switches = {"steps": 4, "drift": lambda probe: pgdfast.KernelDrift(probe, threshold=0.05, every=2),
                "alignment": lambda probe: pgdfast.Alignment(probe, every=2)}
    for kind, switch in switches.items():
        add(f"hybrid/{kind}", "A_residuals", lambda switch=switch: {"switch": switch}, steps=10, run=hybrid)
    for dtype in ("float64", "float32"):
        for rule in ("constant", "gain-ratio", "delayed"):
            add(f"captured/{rule}/A/{dtype}", "A", under(damping_rule=rule, damping=1e-3), dtype, run=captured)
    for name in ("G_entropy", "penalty", "groups", "C_laplacian", "rosenbrock"):
        add(f"captured/{name}", name, under(solver="primal" if name == "rosenbrock" else "auto"), run=captured)
    saved = {
        "default": {}, "delayed": {"damping_rule": "delayed", "scaling": "marquardt"}, "sweep": {"damping_rule": "sweep"},
        "warm": {"solver": "cg", "cg": pgdfast.CG(warm_start=True, preconditioner="nystrom")}, "momentum": {"momentum": 0.5},
    }
    for kind, options in saved.items():
        add(f"resume/{kind}", "A", under(**options), save_at=4)
    add("resume/ensemble", ensemble, under(ensemble=3, scaling="marquardt"), save_at=4)
    for when in (2, 6):
        add(f"resume/hybrid-{when}", "A", dict, run=hybrid, save_at=when)
    add("resume/captured", "A", under(damping_rule="delayed"), run=captured, save_at=4)
    for name in ("A", "C_nested", "C_laplacian", "transformer", "G_entropy", "penalty", "tied", "fallback_conv", "mixed_rows"):
        add(f"products/{name}", name, steps=1, run=products)
    for backend in ("torch", "native"):
        add(f"products/{backend}/B/float32", "B", under(backend=backend), "float32", steps=1, run=products)
    return runs


# --- recording --------------------------------------------------------------------------------------------------------------

def bits(value):
    """A value for JSON, floats as hexadecimals."""
    if isinstance(value, torch.Tensor):
        value = value.tolist()
    if isinstance(value, list):
        return [bits(v) for v in value]
    return value.hex() if isinstance(value, float) else value


def contents(tensor) -> dict:
    array = tensor.detach().contiguous().numpy()
    return {"dtype": str(array.dtype), "bytes": base64.b64encode(array.tobytes()).decode()}


def fields(report) -> dict:
    """What a report says; every field a list over its members for an ensemble."""
    found = {}
    for field, names in FIELDS.items():
        name = next((n for n in names if report is not None and hasattr(report, n)), None)
        if name is not None:
            found[field] = bits(getattr(report, name))
    return found


def record(run, make, dtype, options, steps, save_at) -> dict:
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    entry, last = {"dtype": str(dtype).removeprefix("torch."), "steps": []}, ()
    try:
        for loss, report, values in run(make, dtype, options, steps, save_at):
            entry["steps"].append({"loss": bits(loss.detach())} | fields(report))
            last = values
    except Exception as error:   # what is refused is part of the record
        entry["error"] = type(error).__name__
        entry["message"] = str(error)[:300]
    tensors = [p for part in last for p in (part["params"] if isinstance(part, dict) else [part])]
    entry["values"] = [contents(p) for p in tensors]
    state = repr((torch.get_rng_state().tolist(), random.getstate(), [str(part) for part in np.random.get_state()]))
    entry["random"] = hashlib.sha256(state.encode()).hexdigest()
    return entry


def record_all(path: str, only: str | None) -> int:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    start, entries = time.perf_counter(), {}
    for name, arguments in table().items():
        if only is None or fnmatch.fnmatch(name, f"*{only}*"):
            entries[name] = record(*arguments)
    with open(path, "w") as file:
        json.dump({"torch": torch.__version__, "pgdfast": pgdfast.__file__, "trajectories": entries}, file, indent=0)
    refused = {name: e["message"] for name, e in entries.items() if "error" in e}
    print(f"{len(entries)} trajectories of {pgdfast.__file__} in {time.perf_counter() - start:.0f} s; {len(refused)} raised:")
    for name, message in refused.items():
        print(f"  {name}: {message[:150]}")
    return 0


# --- comparing --------------------------------------------------------------------------------------------------------------

class Difference:
    """What differs between two records of one trajectory."""

    def __init__(self, before: dict, after: dict):
        self.worst, self.where, self.others = 0.0, "", []
        eps = 2.0**-52 if before["dtype"] == "float64" else 2.0**-23
        first = before["steps"][0]["loss"] if before["steps"] else "0x0p0"
        floor = eps * max(abs(float.fromhex(v)) for v in (first if isinstance(first, list) else [first]))
        if before.get("error") != after.get("error"):
            self.others.append(f"error {before.get('error')} -> {after.get('error')}")
        if len(before["steps"]) != len(after["steps"]):
            self.others.append(f"steps {len(before['steps'])} -> {len(after['steps'])}")
        for k, (a, b) in enumerate(zip(before["steps"], after["steps"], strict=False)):
            for field in a.keys() & b.keys():
                self._compare(f"{field} of step {k}", a[field], b[field], floor if field in LOSS_LIKE else 0.0)
        if len(before["values"]) != len(after["values"]):
            self.others.append("number of parameters")
        for k, (a, b) in enumerate(zip(before["values"], after["values"], strict=False)):
            if a != b:
                p, q = (np.frombuffer(base64.b64decode(v["bytes"]), v["dtype"]).astype("float64") for v in (a, b))
                if p.shape != q.shape or not np.isfinite([p, q]).all():
                    self.others.append(f"values {k}")
                else:
                    self._number(f"values {k}", abs(p - q).max(), max(abs(p).max(), abs(q).max()))
        if before["random"] != after["random"]:
            self.others.append("state of the random numbers")

    def _compare(self, where, a, b, floor):
        if a == b:
            return
        if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
            for k, (x, y) in enumerate(zip(a, b, strict=True)):
                self._compare(f"{where}, member {k}", x, y, floor)
            return
        try:
            x, y = float.fromhex(a), float.fromhex(b)
        except (TypeError, ValueError):
            self.others.append(f"{where}: {a} -> {b}")
            return
        if np.isfinite([x, y]).all():
            self._number(where, abs(x - y), max(abs(x), abs(y), floor))
        else:
            self.others.append(f"{where}: {x} -> {y}")

    def _number(self, where, difference, size):
        relative = difference / size if size else difference
        if relative > self.worst:
            self.worst, self.where = float(relative), where


def compare(before: str, after: str) -> int:
    a, b = (json.load(open(path))["trajectories"] for path in (before, after))
    equal, close, failed, news = [], [], [], []
    for name in sorted(a.keys() & b.keys()):
        found, bound = Difference(a[name], b[name]), BOUNDS[a[name]["dtype"]]
        if "error" in a[name] and "error" not in b[name]:
            news.append(f"{name}: was refused, works now")
        elif not found.worst and not found.others:
            equal.append(name)
        elif found.worst <= bound and not found.others:
            close.append((found.worst, name, found.where))
        else:
            failed.append((found.worst, name, "; ".join([found.where, *found.others[:3]][:4]).strip("; ")))
    for title, rows in (("within the bound", close), ("DIFFERENT", failed)):
        for worst, name, where in sorted(rows, reverse=True):
            print(f"{title}: {name}: {worst:.1e} ({where})")
    for line in news:
        print(line)
    missing = sorted(a.keys() - b.keys())
    print(f"{len(equal)} equal bit for bit, {len(close)} within the bound (worst {max(close, default=(0.0,))[0]:.1e}), "
          f"{len(failed)} different, {len(news)} work now, {len(missing)} missing, {len(b.keys() - a.keys())} new")
    for name in missing:
        print(f"missing: {name}")
    return 1 if failed or missing else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record", help="run the trajectories and write them to a file")
    recording.add_argument("file")
    recording.add_argument("--only", metavar="PATTERN", help="names that contain this (with * as wildcard)")
    comparing = commands.add_parser("compare", help="compare two recordings; exit code 1 where they differ")
    comparing.add_argument("before")
    comparing.add_argument("after")
    given = parser.parse_args()
    return record_all(given.file, given.only) if given.command == "record" else compare(given.before, given.after)


if __name__ == "__main__":
    sys.exit(main())
