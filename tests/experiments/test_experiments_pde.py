"""The worked problems: references against independent methods, residuals that vanish at the solution, and their verdicts."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

import pgdfast
from pgdfast_experiments import tasks
from pgdfast_experiments.cli import main
from pgdfast_experiments.measures import FAIL, OPEN, PASS
from pgdfast_experiments.options import fill, task_parser
from pgdfast_experiments.pde import burgers, heat_1d, helmholtz, inverse_heat, poisson_2d, worked
from pgdfast_experiments.pde.references import cole_hopf, heat_modes
from pgdfast_experiments.training import Run, torch_threads, train

PI = math.pi
ALL = [poisson_2d, heat_1d, burgers, helmholtz, inverse_heat]


# --- references


def _spectral_burgers(viscosity, modes, steps, until):
    """u at x_j = -1 + 2 j / modes by a Fourier method: diffusion exactly, the rest by classical Runge-Kutta."""
    x = -1 + 2 * np.arange(modes) / modes
    k = PI * np.fft.rfftfreq(modes, 1 / modes)
    keep = k < k[-1] * 2 / 3   # products of two modes then fold onto none that is kept
    u, dt = np.fft.rfft(-np.sin(PI * x)), until / steps
    half, whole = np.exp(-viscosity * k**2 * dt / 2), np.exp(-viscosity * k**2 * dt)

    def slope(v):
        return -0.5j * k * keep * np.fft.rfft(np.fft.irfft(v * keep, modes) ** 2)

    for _ in range(steps):
        a = slope(u)
        b = slope(half * (u + dt / 2 * a))
        c = slope(half * u + dt / 2 * b)
        d = slope(whole * u + dt * half * c)
        u = whole * u + dt / 6 * (whole * a + 2 * half * (b + c) + d)
    return x, np.fft.irfft(u, modes)


@pytest.mark.parametrize(("viscosity", "modes", "steps", "until", "bound"), [
    (0.05, 256, 400, 1.0, 1e-8), (0.01 / PI, 1536, 700, 0.4, 1e-6)])
def test_cole_hopf_agrees_with_a_spectral_method(viscosity, modes, steps, until, bound):
    x, u = _spectral_burgers(viscosity, modes, steps, until)
    x = torch.from_numpy(x)
    found = cole_hopf(x, torch.full_like(x, until), viscosity)
    assert float(np.abs(found.numpy() - u).max()) < bound


def test_cole_hopf_has_the_initial_values_and_needs_no_more_nodes():
    x = torch.linspace(-1, 1, 101, dtype=torch.float64)
    torch.testing.assert_close(cole_hopf(x, 0 * x, burgers.VISCOSITY), -torch.sin(PI * x))
    t = torch.rand(101, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    few, many = (cole_hopf(x, t, burgers.VISCOSITY, nodes) for nodes in (100, 200))
    assert float((few - many).abs().max()) < 1e-12


def test_the_modes_of_heat_agree_with_finite_differences():
    def differences(cells):
        x = torch.arange(1, cells, dtype=torch.float64) / cells
        ones = torch.ones(cells - 2, dtype=torch.float64)
        laplacian = cells**2 * (torch.diag(ones, 1) + torch.diag(ones, -1) - 2 * torch.eye(cells - 1, dtype=torch.float64))
        start = torch.sin(PI * x) + torch.sin(3 * PI * x) / 2
        return (torch.linalg.matrix_exp(0.7 * heat_1d.DIFFUSIVITY * laplacian) @ start)[cells // 30 - 1::cells // 30]

    at = torch.arange(1, 30, dtype=torch.float64)[:, None] / 30
    extrapolated = (4 * differences(120) - differences(60)) / 3
    exact = heat_1d.exact(torch.cat([at, torch.full_like(at, 0.7)], 1))[:, 0]
    assert float((extrapolated - exact).abs().max()) < 2e-6


def test_the_least_error_of_the_inverse_problem_is_that_of_its_slope():
    where, _ = inverse_heat.data(0)
    u = [heat_modes(where[:, :1], where[:, 1:], inverse_heat.DIFFUSIVITY * (1 + h), inverse_heat.MODES) for h in (1e-5, -1e-5)]
    slope = (u[0] - u[1]) / 2e-5   # du / d ln D
    noise = inverse_heat.NOISE * float(inverse_heat.exact(where).square().mean().sqrt())
    assert inverse_heat.least_error() == pytest.approx(noise / float(slope.norm()), rel=1e-6)
    assert inverse_heat.least_error() < 0.5 * inverse_heat.WORKED.goals[0].error, "the noise leaves three digits"


def test_the_data_of_the_inverse_problem_have_one_percent_of_noise():
    where, values = inverse_heat.data(3)
    exact = inverse_heat.exact(where)
    assert where.shape == (inverse_heat.DATA, 2)
    ratio = float((values - exact).square().mean().sqrt() / exact.square().mean().sqrt())
    assert ratio == pytest.approx(0.01, rel=0.03)
    assert torch.equal(inverse_heat.data(3)[1], values) and not torch.equal(inverse_heat.data(4)[1], values)


# --- residuals


class Inner(torch.nn.Module):
    """What the network has to be for the trial to be a given solution."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, points):
        return self.function(points)


def _heat(p):
    x, t = p[:, :1], p[:, 1:]
    start = heat_modes(x, 0 * t, heat_1d.DIFFUSIVITY, heat_1d.MODES)
    return (heat_1d.exact(p) - start) / (4 * t * x * (1 - x))


def _burgers(p):
    s, t = (p[:, :1] + 1) / 2, (p[:, 1:] + 1) / 2
    x = burgers.STRETCH * torch.sinh(burgers.A * s)
    z, weight = (torch.from_numpy(part) for part in np.polynomial.hermite.hermgauss(120))
    y = x - 2 * torch.sqrt(burgers.VISCOSITY * t) * z
    exponent = -torch.cos(PI * y) / (2 * PI * burgers.VISCOSITY)
    density = weight * torch.exp(exponent - exponent.detach().amax(1, keepdim=True))
    u = -(density * torch.sin(PI * y)).sum(1, keepdim=True) / density.sum(1, keepdim=True)
    return (u + torch.sin(PI * x)) / (4 * t * s * (1 - s))


def _helmholtz(p):
    x, y = p[:, :1], p[:, 1:]
    return helmholtz.exact(p) / (16 * x * (1 - x) * y * (1 - y))


@pytest.mark.filterwarnings("ignore:pgdfast.pde. no Taylor rule")
@pytest.mark.parametrize(("task", "inner", "bound"), [
    (heat_1d, _heat, 1e-9), (burgers, _burgers, 1e-8), (helmholtz, _helmholtz, 1e-9)])
def test_the_exact_solution_has_no_residual_and_no_error(task, inner, bound):
    trial = task.make(0, count=200)
    started = float(sum(r.detach().square().sum() for r in trial.residuals()))
    trial.model.net = Inner(inner)
    left = math.sqrt(float(sum(r.detach().square().sum() for r in trial.residuals())))
    assert left < bound < 1e-3 * math.sqrt(started), left
    points = task.WORKED.grid.points()
    inside = ((points - torch.tensor(task.WORKED.grid.low)) % (torch.tensor(task.WORKED.grid.high) / 2) != 0).all(1)
    torch.testing.assert_close(trial.solution(points[inside]), task.exact(points[inside]), rtol=0, atol=1e-9)


def test_the_exact_solution_of_poisson_has_no_residual():
    interior, boundary, test = poisson_2d.points(0)
    assert (len(interior), len(boundary), len(test)) == (900, 120, 9000)
    assert ((boundary == 0) | (boundary == 1)).any(1).all() and float(poisson_2d.exact(boundary).abs().max()) < 1e-15
    laplacian = poisson_2d.nested_laplacian(poisson_2d.exact, interior)
    torch.testing.assert_close(laplacian, -2 * PI**2 * poisson_2d.exact(interior))


@pytest.mark.parametrize(("net", "count"), [("small", 257), ("large", 9873)])
def test_both_ways_to_derivatives_give_the_same_residuals(net, count):
    fused, nested = (poisson_2d.make(1, variant) for variant in (net, f"{net} nested"))
    assert sum(p.numel() for p in fused.model.parameters()) == count
    for a, b in zip(fused.residuals(), nested.residuals(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("task", [heat_1d, burgers, helmholtz, inverse_heat])
def test_initial_and_boundary_values_hold_by_construction(task):
    trial = task.make(2, count=50)
    grid = task.WORKED.grid
    points = grid.points()
    edge = (points[:, 0] == grid.low[0]) | (points[:, 0] == grid.high[0])
    if task is helmholtz:
        edge |= (points[:, 1] == 0) | (points[:, 1] == 1)
    elif task is not inverse_heat:
        edge |= points[:, 1] == 0
    with torch.no_grad():
        torch.testing.assert_close(trial.solution(points[edge]), task.exact(points[edge]), rtol=0, atol=1e-14)


@pytest.mark.parametrize("task", ALL)
def test_a_few_steps_lower_loss_and_error(task):
    trial = task.make(0, "small") if task is poisson_2d else task.make(0, count=150)
    lm = pgdfast.LM(trial.model.parameters(), **worked.LM | (task.WORKED.lm or {}))
    before = trial.error()
    first = float(lm.step(trial.residuals))
    for _ in range(12):
        last = float(lm.step(trial.residuals))
    assert last < 0.1 * first and trial.error() < before


# --- verdicts


def _settings(task, *argv):
    return fill(task, task_parser(task).parse_args(list(argv)))


def _run(name, variant, seed, seconds, error, **more):
    """A run of evenly spaced steps, measured at each."""
    steps = np.full(len(error) - 1, seconds / (len(error) - 1))
    columns = {"loss": np.ones(len(error)), "error": np.asarray(error, float), **more}
    return Run(name, variant, seed, np.arange(len(error)), columns, steps, len(error) - 1)


def _outcomes(task, settings, runs):
    return [check.outcome for check in task.judge(task.summarize(runs, settings), settings)]


@pytest.mark.parametrize(("lm", "adam", "expected"), [
    ([1, 1e-3, 1e-6], [1, 0.1, 0.01], [PASS, PASS]),
    ([1, 1e-3, 2e-5], [1, 0.1, 0.01], [FAIL, PASS]),
    ([1, 1e-3, 1e-6], [1, 1e-7, 1e-7], [PASS, FAIL]),
    ([1, 1e-3, math.nan], [1, 0.1, 0.01], [FAIL, FAIL]),
])
def test_checks_of_a_worked_problem(lm, adam, expected):
    settings = _settings(helmholtz, "--seeds", "3")
    runs = [run for seed in range(3) for run in (
        _run("lm", "", seed, 10.0, lm), _run("adam", "", seed, 20.0, adam), _run("lbfgs", "", seed, 20.0, [1, 1, 1]))]
    assert _outcomes(helmholtz, settings, runs) == expected


def test_what_the_budget_does_not_allow_is_not_judged_unless_it_held():
    settings = _settings(helmholtz, "--optimizer", "lm", "--seconds", "2", "--seeds", "1")
    assert _outcomes(helmholtz, settings, [_run("lm", "", 0, 2.0, [1, 1e-4])]) == [OPEN, OPEN]
    assert _outcomes(helmholtz, settings, [_run("lm", "", 0, 2.0, [1, 1e-6])]) == [PASS, OPEN]


def test_times_are_medians_over_seeds_and_the_others_are_read_at_lms_end():
    settings = _settings(poisson_2d, "--net", "small", "--derivatives", "pde", "--seeds", "3", "--optimizers", "lm,adam")
    runs = [_run("lm", "small", seed, 4.0 * (seed + 1), [1, 1e-5, 1e-6, 1e-7, 1e-8]) for seed in range(3)]
    runs += [_run("adam", "small", seed, 16.0, [1, 0.5, 0.25, 0.125, 0.0625]) for seed in range(3)]
    summary = poisson_2d.summarize(runs, settings)
    assert summary["lm small"]["seconds_to"] == {"1e-05": 2.0, "1e-06": 4.0, "1e-07": 6.0}
    assert summary["adam small"]["error_at_lm_seconds"] == 0.25 and summary["adam small"]["error"] == 0.0625
    assert math.isinf(summary["adam small"]["seconds_to"]["1e-05"])
    outcomes = {check.claim: check.outcome for check in poisson_2d.judge(summary, settings)}
    assert outcomes == {"LM's error (small) is below 1e-05 within 0.6 s": FAIL,
                        "LM's error (small) is below 1e-07 within 6 s": PASS,
                        "LM ends (small) more accurate than Adam and L-BFGS after the same seconds": PASS}
    rows = poisson_2d.table(summary, settings).rows
    assert rows[0][:4] == ["small, LM", "2", "4", "6"] and rows[1][1:4] == ["-", "-", "-"]


def test_the_coefficient_is_judged_by_its_own_error():
    settings = _settings(inverse_heat, "--seeds", "1", "--optimizers", "lm,adam")
    ends = {"coefficient": np.array([0.4, 0.1]), "coefficient_error": np.array([3.0, 1e-4])}
    worse = {"coefficient": np.array([0.4, 0.2]), "coefficient_error": np.array([3.0, 1.0])}
    runs = [_run("lm", "", 0, 20.0, [1, 1e-3], **ends), _run("adam", "", 0, 20.0, [1, 1e-3], **worse)]
    assert _outcomes(inverse_heat, settings, runs) == [PASS, PASS]
    runs = [_run("lm", "", 0, 20.0, [1, 1e-3], **worse), _run("adam", "", 0, 20.0, [1, 1e-3], **ends)]
    assert _outcomes(inverse_heat, settings, runs) == [FAIL, FAIL]


# --- from end to end


def test_lm_ends_early_where_it_has_what_is_asked_and_adam_takes_all_seconds():
    easy = dataclasses.replace(heat_1d.WORKED, goals=(worked.Goal(0.05, 60.0),))
    settings = _settings(heat_1d, "--optimizer", "lm,adam", "--seeds", "1")
    cases = zip(easy.cases(settings), (60, 0.5), strict=True)
    lm, adam = (train(dataclasses.replace(case, seconds=seconds), case.start()) for case, seconds in cases)
    assert lm.columns["error"][-1] <= 0.025 and lm.seconds[-1] < 60 and 0.5 <= adam.seconds[-1] < 10
    assert (lm.columns["error"][:-1] > 0.025).all(), "it ends with the first row that has it"
    assert adam.columns["error"][-1] < adam.columns["error"][0]
    assert lm.outcome["solution"].shape == heat_1d.WORKED.grid.shape
    assert easy.judge(easy.summarize([lm, adam], settings), settings)[0].outcome == PASS


def test_the_rate_of_adam_falls_over_the_seconds():
    settings = _settings(heat_1d, "--optimizer", "adam", "--seconds", "1", "--seeds", "1")
    session = heat_1d.cases(settings)[0].start()
    rates = []
    for share in (0.0, 0.5, 1.0):
        session.schedule(share)
        rates.append(session.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([1e-2, 1e-2 * 1e-3**0.5, 1e-5])


@pytest.mark.parametrize("argv", [["--optimizer", "adam"], ["--optimizer", "lbfgs"], ["--optimizer", "lm"],
                                  ["--optimizers", "lm,lm-0.01", "--derivatives", "nested", "--boundary-weight", "3"],
                                  ["--optimizers", "lm,adam", "--dtype", "float32"]])
def test_one_optimizer_runs_alone(argv, tmp_path, capsys):
    assert main(["run", "poisson-2d", "--net", "small", "--steps", "2", "--seeds", "1", *argv, "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "poisson-2d.json").read_text())
    assert set(record["settings"]["optimizers"]) == set(argv[1].split(","))
    assert (tmp_path / "poisson-2d.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("task", ALL)
def test_the_native_backend_agrees_with_the_reference(task):
    from pgdfast_experiments import verification

    with torch_threads(1):   # as `pgdfast verify` has it: more of them wait for each other where other work goes on
        found = verification.compare(task.problem, torch.float64, "native")
    assert not found.violations(), found.violations()


def test_worked_problems_are_tasks():
    assert {task.NAME for task in ALL} <= set(tasks.TASKS)
