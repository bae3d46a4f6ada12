"""Problems whose rows are split over ranks and batches, and runs of LM on them; each function gets its group first."""

import math
import os
import signal
import threading
import time

import torch
import torch.nn.functional as F
from helpers import gradient, mlp, rand

import pgdfast

ROWS = 26
TIGHT = pgdfast.CG(max_iterations=5000, tolerance=1e-14)


def shares(size):
    """The rows of each rank: unequal, none on rank 1."""
    cuts = {1: [0, ROWS], 2: [0, ROWS, ROWS], 3: [0, 9, 9, ROWS], 4: [0, 5, 5, 18, ROWS]}[size]
    return [slice(a, b) for a, b in zip(cuts[:-1], cuts[1:], strict=True)]


def data(dtype=torch.float64):
    x = rand(ROWS, 2, seed=1, dtype=dtype)
    return x, (torch.sin(3 * x[:, :1]) + 0.1 * rand(ROWS, 1, seed=2).to(dtype))


def _residuals(model, x, y):
    z = x.detach().requires_grad_()
    u = model(z)
    slope = gradient(u, z)
    return slope[:, :1] + u - y, 2 * model(x[x[:, 0] > 0])


LOSSES = {   # model, rows -> what a closure returns
    "mean": (1, lambda m, x, y: F.mse_loss(m(x), y)),
    "sum": (1, lambda m, x, y: F.mse_loss(m(x), y, reduction="sum")),
    "terms": (1, lambda m, x, y: F.mse_loss(m(x), y) + 3 * (m(-x) - y).square().sum() + 0.5 * (m(2 * x) ** 2).mean()),
    "residuals": (1, _residuals),
    "cross-entropy": (3, lambda m, x, y: F.cross_entropy(m(x), (7 * x[:, 0].abs()).long() % 3)),
    "cross-entropy sum": (3, lambda m, x, y: F.cross_entropy(m(x), (7 * x[:, 0].abs()).long() % 3, reduction="sum")),
    "penalty": (1, lambda m, x, y: F.mse_loss(m(x), y) + 1e-3 * sum(p.square().sum() for p in m.parameters())),
}


def problem(group, loss, options, whole=False):
    """(optimizer, closure of rows, this rank's rows) of a loss; whole: all rows on every rank."""
    outputs, objective = LOSSES[loss]
    model = mlp(2, 7, outputs)
    x, y = data()
    if group is not None and not whole:
        rows = shares(group.size())[group.rank()]
        x, y = x[rows], y[rows]
    opt = pgdfast.LM(model.parameters(), process_group=group, cg=TIGHT, **options)
    return opt, lambda x, y: objective(model, x, y), (x, y)


def parameters_of(opt):
    return torch.cat([p.detach().reshape(-1) for group in opt.param_groups for p in group["params"]])


def run(group, loss, options, steps=20, batch=None):
    """(parameters, last loss, what each step did) of steps of LM; batch: rows of a batch, None without batches."""
    opt, closure, (x, y) = problem(group, loss, options)
    told = []
    for _ in range(steps):
        if batch is None:
            value = opt.step(lambda: closure(x, y))
        else:
            value = opt.step(lambda one: closure(*one), list(zip(x.split(batch), y.split(batch), strict=True)))
        told.append((opt.report.status, opt.report.solver, opt.report.attempts))
    return parameters_of(opt), float(value), told


def runs(group, cases):
    """`run` of each case."""
    return [run(group, *case) for case in cases]


def sent(group, solver, widths):
    """(M, P, iterations, numbers sent) of a rank's first step on a network of these widths."""
    model, (x, y) = mlp(2, *widths, 1), data()
    rows = shares(group.size())[group.rank()]
    opt = pgdfast.LM(model.parameters(), solver=solver, damping=1.0, damping_rule="constant", process_group=group)
    opt.step(lambda: F.mse_loss(model(x[rows]), y[rows]))
    return opt.report.residuals, opt.report.parameters, opt.report.iterations, opt.report.sent


class Trouble:
    """A closure that fails on rank 1 in a given way: at its first run of the third step, or at the second."""

    def __init__(self, group, closure, rows, kind):
        self.rank, self.closure, self.rows, self.kind, self.calls, self.armed = group.rank(), closure, rows, kind, 0, False

    def __call__(self):
        self.calls += 1
        when, _, what = self.kind.partition(" ")
        due = self.armed and self.rank == 1 and self.calls == {"first": 1, "trial": 2}[when]
        if due and what == "closure":
            raise ZeroDivisionError("in the data")
        if due and what == "memory":
            raise MemoryError("of 8 GB")
        if due and what == "ctrl-c":
            raise KeyboardInterrupt
        x, y = self.rows
        if due and what == "nan":
            y = y * math.nan
        if due and what == "result":
            return "no tensor"
        if due and what == "terms":
            return self.closure(x, y) + self.closure(-x, y)
        return self.closure(x, y)


def trouble(group, kind, options):
    """What every rank raises at the third of four steps, whether it left everything unchanged; where the fourth ends."""
    opt, closure, rows = problem(group, "mean", options)
    if group.rank() == 1:   # elsewhere this rank has none
        rows = data()[0][:4], data()[1][:4]
    run = Trouble(group, closure, rows, kind)
    for _ in range(2):
        opt.step(run)
    before, state = parameters_of(opt), repr(opt.state_dict()["state"])
    run.calls, run.armed, raised = 0, True, None
    try:
        opt.step(run)
    except BaseException as error:
        raised = type(error).__name__, str(error)
    unchanged = torch.equal(before, parameters_of(opt)) and state == repr(opt.state_dict()["state"])
    status, run.armed = opt.report.status, False
    opt.step(run)
    return raised, unchanged, status, parameters_of(opt)


def refused(group, kind):
    """What two steps end in, of which the first is refused on every rank alike."""
    opt, closure, (x, y) = problem(group, "mean", {}, whole=True)
    x, y = x[group.rank()::group.size()], y[group.rank()::group.size()]
    bad = {
        "kinds": lambda: closure(x, y) * (1 if group.rank() else len(x)),
        "penalties": lambda: closure(x, y) + (1 + group.rank()) * sum(p.square().sum() for p in opt.param_groups[0]["params"]),
    }[kind]
    try:
        opt.step(bad)
    except ValueError as error:
        said = str(error)
    return said, float(opt.step(lambda: closure(x, y)))


def nothing(group):
    """What a step without rows on any rank says."""
    opt, closure, (x, y) = problem(group, "sum", {})
    before = parameters_of(opt)
    opt.step(lambda: (closure(x[:0], y[:0]).reshape(1) * 0)[:0])
    return opt.report.status, torch.equal(before, parameters_of(opt))


def no_batches(group, ranks):
    """Where two steps end if these ranks have no batch at all."""
    opt, closure, (x, y) = problem(group, "mean", {}, whole=True)
    batches = [] if group.rank() in ranks else list(zip(x.split(9), y.split(9), strict=True))
    for _ in range(2):
        opt.step(lambda one: closure(*one), batches)
    return parameters_of(opt)


def saved(group, path, loss, options, steps, first=0):
    """Steps from a checkpoint, where first > 0, to another, which rank 0 writes; where they end."""
    opt, closure, rows = problem(group, loss, options)
    if first:
        state = torch.load(f"{path}-{first}", weights_only=True)
        opt.load_state_dict(state["optimizer"])
        with torch.no_grad():
            for p, value in zip(opt.param_groups[0]["params"], state["parameters"], strict=True):
                p.copy_(value)
    for step in range(first, steps):
        opt.step(lambda: closure(*rows))
        if group is None or group.rank() == 0:
            write(f"{path}-{step + 1}", opt)
    return parameters_of(opt)


def write(path, opt):
    """A checkpoint, whole or not at all."""
    state = {"optimizer": opt.state_dict(), "parameters": [p.detach() for p in opt.param_groups[0]["params"]]}
    torch.save(state, f"{path}.part")
    os.replace(f"{path}.part", path)


def killed(group, path, options, delay):
    """Steps with checkpoints until rank 1 is killed; (error, seconds that it took the others to see it, last step)."""
    opt, closure, rows = problem(group, "mean", options)
    rows = data()[0][group.rank()::2], data()[1][group.rank()::2]
    opt.step(lambda: closure(*rows))
    if group.rank() == 1:
        threading.Timer(delay, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
    start, step = time.monotonic(), 1
    before = parameters_of(opt)
    try:
        while time.monotonic() - start < 30:
            if group.rank() == 0:
                write(f"{path}-{step}", opt)
            before = parameters_of(opt)
            opt.step(lambda: closure(*rows))
            step += 1
    except RuntimeError as error:
        undone = torch.equal(before, parameters_of(opt))
        return type(error).__name__, str(error), time.monotonic() - start - delay, step, undone
    return None


def wrapped(group, options, steps, batch_norm=False):
    """Where steps end with the bare module and in DistributedDataParallel; what is said without a group, and of hooks."""
    import warnings

    from torch.nn.parallel import DistributedDataParallel

    x, y = data()
    x, y = x[group.rank()::group.size()], y[group.rank()::group.size()]

    def ends(wrap):
        model = mlp(2, 7, 7, 1)
        if batch_norm:
            model.insert(2, torch.nn.BatchNorm1d(7, dtype=torch.float64).eval())
        model = wrap(model)
        opt = pgdfast.LM(model.parameters(), process_group=group)
        first = torch.optim.SGD(model.parameters(), lr=1e-3)   # DDP's own way before and between
        for step in range(steps):
            opt.step(lambda: F.mse_loss(model(x), y))
            if wrap is not plain and step == 1:
                F.mse_loss(model(x), y).backward()
                first.zero_grad()
        return model, parameters_of(opt)

    def plain(model):
        return model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bare = ends(plain)[1]
        model, end = ends(lambda m: DistributedDataParallel(m, process_group=group, **options))
        refused = None
        try:
            pgdfast.LM(model.parameters()).step(lambda: F.mse_loss(model(x), y))
        except ValueError as error:
            refused = str(error)
        hook = model.module[0].weight.register_hook(lambda g: 2 * g)
        try:
            pgdfast.LM(model.parameters(), process_group=group).step(lambda: F.mse_loss(model(x), y))
        except ValueError as error:
            hooked = str(error)
        hook.remove()
    return bare, end, refused, hooked


def distributed(group, kind):
    """What LM, in the group and without, and linearize say of parameters that are no plain tensors."""
    import torch.distributed.tensor as dt
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    model = mlp(2, 8, 1)
    if kind == "fsdp2":
        fully_shard(model, mesh=init_device_mesh("cpu", (4,)))
    elif kind == "hybrid":
        fully_shard(model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
    elif kind.startswith("fsdp1"):
        model = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=kind.endswith("original"))
    else:
        mesh = init_device_mesh("cpu", (4,))
        place = dt.Replicate() if kind == "replicated" else dt.Shard(0)
        for layer in model:
            for name, p in list(layer.named_parameters()):
                layer.register_parameter(name, torch.nn.Parameter(dt.distribute_tensor(p.data, mesh, [place])))
    said = []
    for act in (
        lambda: pgdfast.LM(model.parameters()), lambda: pgdfast.LM(model.parameters(), process_group=group),
        lambda: pgdfast.linearize(lambda: model(data()[0]), model.parameters()),
    ):
        try:
            act()
            said.append(None)
        except ValueError as error:
            said.append(str(error))
    return said


def other_options(group):
    """What an LM says whose damping is another on rank 1."""
    try:
        pgdfast.LM(mlp(2, 3, 1).parameters(), damping=0.5 if group.rank() == 1 else 0.25, process_group=group)
    except ValueError as error:
        return str(error)
