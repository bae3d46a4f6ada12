"""Which trajectories `trajectories.py` records: a problem, options, and a way to run."""

from __future__ import annotations

import copy

import torch
from trajectory_problems import ENSEMBLES, PROBLEMS, ensemble, ensemble_residuals, rand

import pgdfast

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
