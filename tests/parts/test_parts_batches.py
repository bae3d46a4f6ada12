"""Steps over batches: equal to the step on all rows, whatever is kept of tapes; what is noticed and refused."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers import ByNumpy, forget_rules, mlp, rand, relative, snapshot, unchanged
from parts.step_problems import LOSSES, ROWS, TIGHT, data, parameters_of
from torch.utils.data import DataLoader, TensorDataset

import pgdfast
from pgdfast.parts import kernels as parts_kernels

BOUND = 1e-10
SOFT = {"damping": 30.0, "damping_rule": "constant"}   # few iterations of CG
SPLITS = {1: [ROWS], 2: [15, 11], 7: [4, 4, 4, 4, 4, 4, 2]}


def batches_of(count, dtype=torch.float64):
    return list(zip(*(t.split(SPLITS[count]) for t in data(dtype)), strict=True))


def steps(loss, options, batches=None, count=20, dtype=torch.float64, model=None, objective=None):
    """(optimizer, its parameters, statuses) after so many steps, on all rows where there are no batches."""
    outputs, given = LOSSES[loss]
    model = model or mlp(2, 7, outputs).to(dtype)
    objective = objective or given
    opt = pgdfast.LM(model.parameters(), **{"cg": TIGHT, **options})
    x, y = data(dtype)
    told = []
    for _ in range(count):
        if batches is None:
            opt.step(lambda: objective(model, x, y))
        else:
            opt.step(lambda batch: objective(model, *batch), batches)
        told.append((opt.report.status, opt.report.attempts, opt.report.solver))
    return opt, parameters_of(opt), told


CASES = [
    *[(loss, {}) for loss in LOSSES],
    *[(loss, {"solver": solver}) for loss in LOSSES for solver in ("dual", "primal", "eigh")],
    *[(loss, {"solver": "cg", **SOFT}) for loss in LOSSES],
    *[("mean", {"damping_rule": rule}) for rule in ("constant", "gain-ratio", "delayed", "longest", "sweep")],
    ("mean", {"solver": "lsmr", **SOFT}), ("mean", {"scaling": "marquardt"}), ("mean", {"backend": "torch"}),
    ("terms", {"damping_rule": "delayed", "acceleration": "chord"}), ("mean", {"backend": "torch", "solver": "primal"}),
    ("residuals", {"acceleration": "geodesic", "damping_rule": "delayed"}), ("mean", {"momentum": 0.5}),
    ("mean", {"line_search": "armijo", **SOFT}), ("penalty", {"weight_decay": 1e-3, "norm_constraint": 0.5}),
    ("mean", {"solver": "cg", "cg": pgdfast.CG(500, 1e-14, preconditioner=pgdfast.Nystrom(8)), **SOFT}),
    ("mean", {"solver": "cg", "cg": pgdfast.CG(500, 1e-14, warm_start=True, truncate=True), **SOFT}),
]


@pytest.mark.parametrize(("loss", "options", "count", "number"), [
    *[(loss, options, 7, 8) for loss, options in CASES],
    *[(loss, {}, 2, 20) for loss in LOSSES], ("mean", {}, 1, 20), ("terms", {}, 1, 3),
], ids=str)
def test_steps_over_batches_are_those_on_all_rows(loss, options, count, number):
    _, alone, told = steps(loss, options, count=number)
    for memory in (None, 0):
        opt, found, said = steps(loss, {**options, "memory": memory}, batches_of(count), number)
        assert relative(found, alone) < BOUND, memory
        assert said == told
        report = opt.report
        assert report.parts == count and report.kept == (0 if memory == 0 else count)
        assert (report.reruns > 0) == (memory == 0) and report.sent == 0


def test_the_reference_takes_all_batches_as_one():
    _, found, _ = steps("terms", {"damping_rule": "gain-ratio"}, batches_of(7), 6)
    _, expected, _ = steps("terms", {"backend": "reference", "damping_rule": "gain-ratio"}, batches_of(7), 6)
    assert relative(found, expected) < 1e-9


@pytest.mark.parametrize("solver", ["dual", "primal", "cg", "eigh"])
def test_float32_steps_widen_where_those_on_all_rows_do(solver):
    options = {"solver": solver, "damping_rule": "gain-ratio", "damping": 1e-6, "cg": pgdfast.CG(400, 1e-9)}
    _, alone, _ = steps("mean", options, count=3, dtype=torch.float32)
    for memory in (None, 0):
        _, found, _ = steps("mean", {**options, "memory": memory}, batches_of(2, torch.float32), 3, torch.float32)
        assert relative(found, alone) < 2e-4


def test_operations_without_rules_take_part(monkeypatch):
    forget_rules(monkeypatch)
    objective = lambda m, x, y: F.mse_loss(ByNumpy.apply(m(x)), y)   # noqa: E731
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for solver in ("dual", "primal"):
            _, alone, _ = steps("mean", {"solver": solver}, None, 4, objective=objective)
            for memory in (None, 0):
                _, found, _ = steps("mean", {"solver": solver, "memory": memory}, batches_of(2), 4, objective=objective)
                assert relative(found, alone) < BOUND


def test_a_loader_that_shuffles_gives_one_order_within_a_step():
    x, y = data()
    model, whole = mlp(2, 7, 1), mlp(2, 7, 1)
    opt, alone = pgdfast.LM(model.parameters(), memory=0), pgdfast.LM(whole.parameters())
    loader = DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True)
    for _ in range(4):
        opt.step(lambda batch: F.mse_loss(model(batch[0]), batch[1]), loader)
        alone.step(lambda: F.mse_loss(whole(x), y))
    assert relative(parameters_of(opt), parameters_of(alone)) < BOUND


def test_random_numbers_are_the_same_in_every_pass():
    model, y = mlp(2, 7, 1), data()[1]
    opt = pgdfast.LM(model.parameters(), memory=0, solver="cg", damping_rule="gain-ratio", **{"damping": 0.1})
    same = copy.deepcopy(model)
    kept = pgdfast.LM(same.parameters(), solver="cg", damping_rule="gain-ratio", **{"damping": 0.1})
    for k in range(3):
        for m, o in ((model, opt), (same, kept)):
            torch.manual_seed(k)
            o.step(lambda rows, m=m: F.mse_loss(m(F.dropout(rand(rows, 2, seed=1), 0.3)), y[:rows]), [10, 6])
            after = torch.rand(())
        assert torch.equal(parameters_of(opt), parameters_of(kept))
    torch.manual_seed(2)
    for rows in (10, 6):
        F.dropout(rand(rows, 2, seed=1), 0.3)
    assert torch.equal(after, torch.rand(()))   # as one run of each batch leaves it


class Changing:
    """Batches that are others at some pass."""

    def __init__(self, change, at):
        self.change, self.at, self.passes = change, at, 0

    def __iter__(self):
        self.passes += 1
        batches = batches_of(2)
        return iter(self.change(batches) if self.passes == self.at else batches)


def _rows_turned(batches):
    return [(x.flip(0), y.flip(0)) for x, y in batches]


@pytest.mark.parametrize(("change", "named"), [
    (lambda batches: batches[::-1], "another batch 0 than"),
    (lambda batches: batches[:1], "2 batches the first time and 1 now"),
    (lambda batches: [*batches, batches[0]], "2 batches the first time and more now"),
    (_rows_turned, "another batch 0 than"),
])
@pytest.mark.parametrize("at", [2, 3])
def test_batches_that_change_are_noticed(change, named, at):
    model = mlp(2, 7, 1)
    opt, before = pgdfast.LM(model.parameters(), memory=0), snapshot(model.parameters())
    with pytest.raises(ValueError, match=f"the batches have changed within a step .{named}"):
        opt.step(lambda batch: F.mse_loss(model(batch[0]), batch[1]), Changing(change, at))
    assert unchanged(model.parameters(), before) and opt.report.status == "none"


def test_a_closure_that_is_another_at_each_run_is_noticed():
    model, calls = mlp(2, 7, 1), []

    def closure(batch):
        calls.append(None)
        return F.mse_loss(model(batch[0]) * (1 + 1e-3 * len(calls)), batch[1])

    named = r"is multiplied by 1.00\d in batch 0 and by|loss on batch 0 was .* when it runs again"
    with pytest.raises(ValueError, match=named):
        pgdfast.LM(model.parameters(), memory=0, check="never").step(closure, batches_of(2))


class _Fails:
    def __init__(self, model, at):
        self.model, self.at, self.calls = model, at, 0

    def __call__(self, batch):
        self.calls += 1
        if self.calls == self.at:
            raise ZeroDivisionError("in the data")
        return F.mse_loss(self.model(batch[0]), batch[1])


@pytest.mark.parametrize("at", [2, 6, 9, 14])
def test_an_error_undoes_the_step_and_names_its_batch(at):
    model = mlp(2, 7, 1)
    opt = pgdfast.LM(model.parameters(), memory=0, solver="cg", damping=0.1, check="never")
    before = snapshot(model.parameters())
    with pytest.raises(ZeroDivisionError) as raised:
        opt.step(_Fails(model, at), batches_of(2))
    assert unchanged(model.parameters(), before)
    notes = getattr(raised.value, "__notes__", None)
    assert notes is None or notes[0].startswith("in batch ")


def _norms(m, x, y):
    z = m(x)
    return F.mse_loss((z - z.mean(0)) / z.std(0), y)


@pytest.mark.parametrize(("batches", "options", "objective", "error", "named"), [
    (lambda: iter(batches_of(2)), {}, None, ValueError, "batches is an iterator .list_iterator"),
    (lambda: 7, {}, None, TypeError, "batches is a int"),
    (list, {}, None, ValueError, "there are no batches"),
    (lambda: batches_of(2), {"balance": "trace"}, None, ValueError, "balance and batches do not work together"),
    (lambda: batches_of(2), {}, _norms, ValueError, "rows depend on each other"),
    (lambda: batches_of(2), {}, lambda m, x, y: (m(x) - y).norm(), ValueError, "takes all rows together"),
])
def test_what_steps_over_batches_refuse(batches, options, objective, error, named):
    model = mlp(2, 7, 1)
    opt, before = pgdfast.LM(model.parameters(), **options), snapshot(model.parameters())
    with pytest.raises(error, match=named):
        opt.step(lambda batch: (objective or LOSSES["mean"][1])(model, *batch), batches())
    assert unchanged(model.parameters(), before)


def test_ensembles_and_wrong_budgets_are_refused():
    with pytest.raises(ValueError, match="ensemble and batches do not work together"):
        pgdfast.LM([torch.zeros(2, 3, requires_grad=True)], ensemble=2).step(lambda b: None, batches_of(2))
    with pytest.raises(ValueError, match="memory is -1; it must be None or a number of bytes"):
        pgdfast.LM([torch.zeros(2, requires_grad=True)], memory=-1)


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_a_dual_solve_that_does_not_fit_is_refused_with_the_numbers(monkeypatch, backend):
    monkeypatch.setattr(parts_kernels, "memory_limit", lambda device: 1e3)
    monkeypatch.setattr(parts_kernels, "_SURELY_FITS", 0)
    model = mlp(2, 7, 1)
    opt, before = pgdfast.LM(model.parameters(), solver="dual", backend=backend), snapshot(model.parameters())
    with pytest.raises(MemoryError, match=r"J J\^T of all 26 residuals and .* GB in each process"):
        opt.step(lambda batch: F.mse_loss(model(batch[0]), batch[1]), batches_of(2))
    assert unchanged(model.parameters(), before)


def test_a_budget_between_keeps_some():
    opt, found, _ = steps("mean", {"memory": 1500}, batches_of(7), 4)
    assert 0 < opt.report.kept < 7 and relative(found, steps("mean", {}, count=4)[1]) < BOUND


def test_progress_is_told(capsys):
    model, told = mlp(2, 7, 1), []
    opt = pgdfast.LM(model.parameters())
    opt.step(lambda batch: F.mse_loss(model(batch[0]), batch[1]), batches_of(2), progress=lambda *one: told.append(one))
    assert told[:2] == [("linearization", 1), ("linearization", 2)] and ("trial", 2) in told
    opt.step(lambda batch: F.mse_loss(model(batch[0]), batch[1]), batches_of(2), progress=True)
    assert "pgdfast: trial, 2 batches" in capsys.readouterr().err


def test_linearize_and_spectrum_take_batches():
    model, (x, y) = mlp(2, 7, 1), data()
    whole = pgdfast.linearize(lambda: F.mse_loss(model(x), y), model.parameters())
    for memory in (None, 0):
        lin = pgdfast.linearize(
            lambda b: F.mse_loss(model(b[0]), b[1]), model.parameters(), batches=batches_of(7), memory=memory
        )
        v, u = rand(lin.num_parameters, seed=3), rand(ROWS, seed=4)
        for name, arguments in (("jvp", (v,)), ("vjp", (u,)), ("ggn", (v,)), ("gradient", ()), ("gram", ()), ("dense", ()),
                                ("diagonal", ())):
            assert relative(getattr(lin, name)(*arguments), getattr(whole, name)(*arguments)) < 1e-12, name
        assert relative(lin.residual, whole.residual) < 1e-12 and abs(float(lin.loss - whole.loss)) < 1e-14
        step = pgdfast.solve(lin, 1e-3).step
        assert relative(step, pgdfast.solve(whole, 1e-3).step) < 1e-9
        lin.release()
        with pytest.raises(RuntimeError, match="released"):
            lin.jvp(v)
    values = pgdfast.ntk_spectrum(lambda b: model(b[0]), model.parameters(), batches=batches_of(2)).eigenvalues
    assert relative(values, pgdfast.ntk_spectrum(lambda: model(x), model.parameters()).eigenvalues) < 1e-12


def test_parameters_that_have_moved_end_products():
    model = mlp(2, 7, 1)
    lin = pgdfast.linearize(lambda b: F.mse_loss(model(b[0]), b[1]), model.parameters(), batches=batches_of(2), memory=0)
    with torch.no_grad():
        next(model.parameters()).add_(1)
    with pytest.raises(RuntimeError, match="the parameters have changed"):
        lin.gradient()


def test_terms_with_counts_of_their_own_and_a_penalty_that_is_no_square():
    x, y = data()

    def objective(m, x, y):
        edge = x[:, 0] > 0.3   # another share of every batch
        return F.mse_loss(m(x), y) + 0.5 * m(x[edge]).square().mean() + 1e-3 * sum(p.abs().sum() for p in m.parameters())

    _, alone, _ = steps("mean", {}, None, 6, objective=objective)
    _, found, _ = steps("mean", {}, batches_of(2), 6, objective=objective)
    assert relative(found, alone) < BOUND
