"""What bench/gpu.py runs on a GPU, each part in a process of its own: a function of (device, tiny) that returns its figures.

tiny: sizes that a CPU does in seconds, to try the script itself. The bounds that figures are judged by stand beside them.
"""

import time
from statistics import median

import torch
from torch.nn import functional

import pgdfast
from pgdfast import reference
from pgdfast_experiments import verification

from . import problems


def wait(device):
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(call, device, tiny, rounds=30):
    """The median time of a call, the GPU's work included; five calls warm up."""
    rounds, times = 3 if tiny else rounds, []
    for _ in range(2 if tiny else 5):
        call()
    for _ in range(rounds):
        wait(device)
        start = time.perf_counter()
        call()
        wait(device)
        times.append(time.perf_counter() - start)
    return median(times)


def moved(problem, device, dtype=torch.float32):
    """(model, closure) of a problem of bench/problems.py on a device."""
    torch.manual_seed(0)
    model = problem.model(dtype)
    closure = problem.closure(model)
    if device != "cpu":
        verification.on_device(verification.Problem(model, closure, {}, (), ""), device)
    return model, closure


def network(widths, rows, device, dtype=torch.float32):
    """A tanh network and its inputs, from fixed seeds."""
    torch.manual_seed(0)
    layers = [layer for a, b in zip(widths, widths[1:], strict=False) for layer in (torch.nn.Linear(a, b), torch.nn.Tanh())]
    model = torch.nn.Sequential(*layers[:-1]).to(device, dtype)
    return model, torch.randn(rows, widths[0]).to(device, dtype)


def check(device, tiny):
    """Products and steps at awkward sizes against the float64 reference; what compute-sanitizer looks at, too."""
    errors = {}
    for dtype in (torch.float64, torch.float32):
        for rows in (1, 31, 67) if tiny else (1, 31, 33, 127, 129, 211):
            for outputs in (1, 3):
                model, x = network((3, 17, 9, outputs), rows, device, dtype)
                params = list(model.parameters())
                lin = pgdfast.linearize(lambda: model(x) - 0.5, params)  # noqa: B023
                ref = reference.linearize(lambda: model(x) - 0.5, params)  # noqa: B023
                v, u = torch.ones_like(ref.vjp(ref.residual)), torch.ones_like(ref.residual)
                pairs = {"J v": (lin.jvp(v), ref.jvp(v)), "J^T u": (lin.vjp(u), ref.vjp(u)), "J": (lin.dense(), ref.dense()),
                         "Gram": (lin.gram(), ref.gram())}
                mu = 1e-2 * float(ref.gram().diagonal().sum())
                step = reference.solve(ref, mu).step
                limit = pgdfast.CG(2000, 1e-12 if dtype == torch.float64 else 1e-6)
                for solver in ("dual", "primal", "cg"):
                    pairs[solver] = pgdfast.solve(lin, mu, solver=solver, cg=limit).step, step
                bound = 1e-6 if dtype == torch.float64 else 1e-3
                for name, (found, expected) in pairs.items():
                    error = float((found.double() - expected.double()).norm() / expected.double().norm())
                    key = f"{name}, {str(dtype)[6:]}"
                    errors[key] = max(errors.get(key, 0.0), error)
                    assert error < bound, f"{key}, {rows} rows, {outputs} outputs: off by {error:.1e}"
    return {"largest relative errors": errors, "kernels": type(lin.kernels()).__module__}


def steps(device, tiny):
    """An exact LM step on A, B and C, as a call and as a captured graph, against one eager Adam step; bound 1."""
    found = {}
    for problem in (problems.A, problems.B, problems.C):
        model, closure = moved(problem, device)
        lm = pgdfast.LM(model.parameters(), lr=1e-3, damping=problem.damping, damping_rule="constant", solver=problem.solver)
        ours = seconds(lambda: lm.step(closure), device, tiny)  # noqa: B023
        model, closure = moved(problem, device)
        lm = pgdfast.LM(model.parameters(), lr=1e-3, damping=problem.damping, damping_rule="constant", solver=problem.solver)
        captured = seconds(pgdfast.CapturedStep(lm, closure).step, device, tiny)
        assert lm.report.status == "accepted"
        model, closure = moved(problem, device)
        adam = torch.optim.Adam(model.parameters())

        def first_order():
            adam.zero_grad()  # noqa: B023
            problems.as_loss(closure()).backward()  # noqa: B023
            adam.step()  # noqa: B023

        theirs = seconds(first_order, device, tiny)
        found[problem.name] = {"LM": ours, "captured": captured, "Adam": theirs, "ratio": ours / theirs,
                               "captured ratio": captured / theirs, "bound": 1.0}
    return found


def ensemble(device, tiny):
    """A step of 1,024 networks of A against one of one; bound 20."""
    from torch.func import functional_call, stack_module_state, vmap

    _, x = network((1, 80, 80, 1), 100, device)
    y = torch.sin(5 * x)

    def step_of(count):
        models = [problems.A.model().to(device) for _ in range(count)]
        params, buffers = stack_module_state(models)
        params = {name: p.detach().requires_grad_() for name, p in params.items()}

        def closure():
            outputs = vmap(lambda p, b: functional_call(models[0], (p, b), (x,)))(params, buffers)
            return functional.mse_loss(outputs, y.expand_as(outputs), reduction="none").mean((1, 2))

        lm = pgdfast.LM(list(params.values()), lr=1e-3, damping=1e-2, damping_rule="constant", solver="dual", ensemble=count)
        return seconds(lambda: lm.step(closure), device, tiny, rounds=10)

    many = 4 if tiny else 1024
    one, all_of_them = step_of(1), step_of(many)
    return {"one": one, str(many): all_of_them, "ratio": all_of_them / one, "bound": 20.0}


def gram(device, tiny):
    """The rate of the Gram matrix, unit sweep and packing included, against that of a float32 product; bound 1/2."""
    found, widths = {}, (16, 32, 1) if tiny else (64, 512, 512, 1)
    torch.backends.cuda.matmul.allow_tf32 = False
    for order in (64,) if tiny else (2048, 4096, 8192):
        model, x = network(widths, order, device)
        lin = pgdfast.linearize(lambda: model(x), model.parameters())  # noqa: B023
        lin.gram()
        flops = order**2 * sum(a + b for a, b in zip(widths, widths[1:], strict=False))   # one half
        rate = flops / seconds(lin.gram, device, tiny, rounds=10)
        left = torch.randn(order, order, device=device)
        out = torch.empty_like(left)
        whole = 2.0 * order**3 / seconds(lambda: torch.mm(left, left, out=out), device, tiny, rounds=10)  # noqa: B023
        found[str(order)] = {"Gram GFLOP/s": rate / 1e9, "GEMM GFLOP/s": whole / 1e9, "ratio": rate / whole, "least": 0.5}
    return found


def products(device, tiny):
    """J^T J v of a 4-layer network of width 1,024 against its products alone; bound 1.3."""
    width, rows = (32, 16) if tiny else (1024, 1024)
    torch.backends.cuda.matmul.allow_tf32 = False
    widths = (width, width, width, width, 1)
    model, x = network(widths, rows, device)
    lin = pgdfast.linearize(lambda: model(x), model.parameters())
    v = torch.randn(lin.num_parameters, device=device)
    ours = seconds(lambda: lin.ggn(v), device, tiny)
    shapes = []   # of J v and J^T u: with every weight's tangent or for its gradient, and through all layers but the first
    for k, (a, b) in enumerate(zip(widths, widths[1:], strict=False)):
        shapes += [(rows, a, b), (b, rows, a)] + ([(rows, a, b), (rows, b, a)] if k else [])
    operands = [(torch.randn(m, k, device=device), torch.randn(k, n, device=device), torch.empty(m, n, device=device))
                for m, k, n in shapes]
    alone = seconds(lambda: [torch.mm(a, b, out=c) for a, b, c in operands], device, tiny)
    return {"J^T J v": ours, "GEMMs": alone, "ratio": ours / alone, "bound": 1.3}


def cg(device, tiny):
    """150 iterations of CG on F; what the profiler saw the host wait for, and when. The one read of the result is last."""
    from torch.profiler import ProfilerActivity, profile

    if tiny:
        model, x = network((3, 17, 9, 1), 40, device)
        closure = lambda: model(x)  # noqa: E731
    else:
        model, closure = moved(problems.F, device)
    lin = pgdfast.linearize(closure, model.parameters())
    limit = pgdfast.CG(max_iterations=5 if tiny else 150, tolerance=1e-30)

    def solve():
        return pgdfast.solve(lin, 1.0, solver="cg", cg=limit)

    solve()
    wait(device)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    with profile(activities=activities) as trace:
        found = solve()
    events = sorted(trace.events(), key=lambda event: event.time_range.start)
    waits = [k for k, event in enumerate(events) if "Synchronize" in event.name]
    launches = [k for k, event in enumerate(events) if "LaunchKernel" in event.name]
    inside = sum(launches[0] < k < launches[-1] for k in waits) if launches else 0
    return {"iterations": found.iterations, "seconds": seconds(solve, device, tiny, rounds=5), "waits in all": len(waits),
            "waits between the first and the last launch": inside, "bound": 0, "launches": len(launches)}


PARTS = {part.__name__: part for part in (check, steps, ensemble, gram, products, cg)}
