"""Every task: a short run from end to end, its verification problem, and what its checks say of made-up curves."""

import json
import math

import numpy as np
import pytest
import torch

from pgdfast_experiments import (
    mnist,
    mnist_data,
    modular_mlp,
    poisson_pinn,
    polynomial,
    regression_2d,
    tasks,
    transformer,
    verification,
)
from pgdfast_experiments.cli import main
from pgdfast_experiments.measures import FAIL, OPEN, PASS
from pgdfast_experiments.methods import parse
from pgdfast_experiments.options import OneLineParser, add_common, fill
from pgdfast_experiments.training import Run, torch_threads

TINY = {
    "regression-1d": ["--steps", "2", "--seeds", "1", "--width", "6"],
    "regression-2d": ["--steps", "2", "--seeds", "1", "--width", "6"],
    "poisson-pinn": ["--steps", "2", "--seeds", "1", "--frequencies", "1,3"],
    "modular-mlp": ["--steps", "2", "--seeds", "1", "--alphas", "0.5,1"],
    "polynomial": ["--steps", "2", "--seeds", "1", "--alphas", "0.5,1"],
    "transformer": ["--steps", "2", "--seeds", "1", "--cg-iterations", "1", "--switch", "1", "--threads", "1"],
    "mnist": ["--steps", "2", "--seeds", "1", "--alphas", "1,2", "--switch", "1", "--train-size", "20", "--threads", "1"],
    "poisson-2d": ["--steps", "2", "--seeds", "1", "--net", "small"],
    "heat-1d": ["--steps", "2", "--seeds", "1"],
    "burgers": ["--steps", "1", "--seeds", "1"],
    "helmholtz": ["--steps", "1", "--seeds", "1"],
    "inverse-heat": ["--steps", "1", "--seeds", "1"],
}


@pytest.fixture
def noise_for_digits(monkeypatch):
    """No file is read: random pixels stand for the images."""

    def noise(folder, size, seed):
        generator = torch.Generator().manual_seed(seed)
        images = [torch.rand(n, 784, generator=generator) for n in (size, 30)]
        labels = [torch.arange(len(x)) % 10 for x in images]
        return mnist_data.Data(images[0], labels[0], images[1], labels[1], "noise")

    monkeypatch.setattr(mnist_data, "train_and_test", noise)


def test_every_task_has_a_tiny_run():
    assert set(TINY) == set(tasks.TASKS)


@pytest.mark.parametrize(("name", "extra"), [*((name, []) for name in TINY), ("mnist", ["--loss", "cross-entropy"]),
                                             ("poisson-pinn", ["--batch", "200"]), ("mnist", ["--normalization", "sum"])])
def test_a_short_run_writes_pictures_numbers_and_record(name, extra, tmp_path, capsys, noise_for_digits):
    assert main(["run", name, *TINY[name], *extra, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    (file,) = tmp_path.glob("*.json")
    record = json.loads(file.read_text())
    assert record["task"] == file.stem and record["paper"] and record["source"]
    assert record["checks"] and {check["outcome"] for check in record["checks"]} <= {PASS, FAIL, OPEN}
    assert all(check["measured"] for check in record["checks"])
    for figure in record["figures"]:
        assert (tmp_path / figure["file"]).read_bytes().startswith(b"\x89PNG") and figure["caption"]
    lines = (tmp_path / f"{file.stem}.csv").read_text().splitlines()
    assert lines[0].startswith("optimizer,variant,seed,step,") and lines[0].endswith(",seconds")
    assert len(lines) > 1 + len(record["settings"]["optimizers"])
    assert all(f"wrote {path}" in printed for path in tmp_path.iterdir())
    assert all(value > 0 for value in record["step_ms"].values())


@pytest.mark.parametrize("name", sorted(TINY))
def test_quick_and_default_options_are_complete(name):
    task = tasks.load(name)
    for argv in ([], ["--quick"]):
        parser = OneLineParser()
        add_common(parser, task)
        task.add_options(parser)
        settings = fill(task, parser.parse_args(argv))
        assert settings.optimizers and settings.seeds >= 1
        for method in settings.optimizers:
            assert settings.steps_of(method) >= 1 and settings.rate(method) > 0
        json.dumps(settings.plain())


def _settings(task, **changes):
    parser = OneLineParser()
    add_common(parser, task)
    task.add_options(parser)
    settings = fill(task, parser.parse_args([]))
    vars(settings).update(changes)
    return settings


# --- the problems


def test_the_checkerboard_has_no_point_on_a_jump_and_its_modes():
    x, y = regression_2d.data()
    assert x.shape == (400, 2) and set(y.unique().tolist()) == {-1.0, 1.0} and y.sum() == 0
    amplitude = dict(zip(regression_2d.MODES, regression_2d.amplitudes(y[:, 0].numpy()), strict=True))
    assert amplitude[2, 2] > 1.0 and amplitude[2, 6] > 0.5 and amplitude[6, 6] > 0.1
    assert max(value for mode, value in amplitude.items() if mode not in {(2, 2), (2, 6), (6, 6)}) < 1e-12


@pytest.mark.parametrize("n", [1, 2, 3])
def test_the_exact_solution_has_no_residual(n):
    class Exact(torch.nn.Module):
        def forward(self, x):
            return poisson_pinn.exact(x, n)

    interior, boundary = poisson_pinn.points(0)
    assert interior.shape == (640, 2) and boundary.shape == (40, 2)
    assert ((boundary == 0) | (boundary == 1)).any(dim=1).all()
    assert max(float(r.detach().abs().max()) for r in poisson_pinn.residuals(Exact(), interior, boundary, n)) < 1e-10


def test_modular_pairs_are_split_and_labelled():
    (x, y), (x_test, y_test) = modular_mlp.data(0)
    assert x.shape == (476, 46) and y.shape == (476, 23) and len(x_test) == 53
    a, b = x[:, :23].argmax(1), x[:, 23:].argmax(1)
    assert torch.equal(y.argmax(1), (a + b) % 23)
    assert len(torch.unique(torch.cat([x, x_test]), dim=0)) == 529
    model = modular_mlp.QuadraticNetwork(23, 100, 4.0, 0, torch.float64)
    assert sum(p.numel() for p in model.parameters()) == 6900
    hand = 4.0 / 100 * (x[:1] @ model.first.T) ** 2 @ model.second.T
    torch.testing.assert_close(model(x[:1]), hand)


def test_the_polynomial_network_is_its_formula():
    model = polynomial.PolynomialNetwork(2.0, 0.25, 0, torch.float64)
    (x, y), (x_test, _), target = polynomial.data(0)
    assert x.shape == (550, 100) and len(x_test) == 1000 and model.weight.numel() == 50_000
    h = model.weight @ x[3]
    assert float(model(x[3:4])[0].detach()) == pytest.approx(2.0 / 500 * float((h + 0.125 * h**2).sum().detach()))
    torch.testing.assert_close(target(2 * x), 4 * y)


def test_the_transformer_answers_at_the_last_token_and_does_not_look_ahead():
    (tokens, answers), (validation, _) = transformer.data(0)
    assert len(tokens) + len(validation) == 97**2 and torch.equal(answers, (tokens[:, 0] + tokens[:, 2]) % 97)
    assert (tokens[:, 1] == 97).all() and (tokens[:, 3] == 98).all()
    model = transformer.Transformer(99, 16, 4, 2, 4, 0, torch.float64)
    assert model(tokens[:5]).shape == (5, 99)
    hidden = []
    model.layers[0]["norm1"].register_forward_hook(lambda module, inputs, output: hidden.append(output))
    changed = tokens[:5].clone()
    changed[:, 3] = 0
    model(tokens[:5]), model(changed)
    torch.testing.assert_close(hidden[0][:, :3], hidden[1][:, :3], rtol=0, atol=0)
    assert not torch.equal(hidden[0][:, 3], hidden[1][:, 3])
    full = transformer.Transformer(99, 128, 4, 2, 4, 0, torch.float32)
    assert sum(p.numel() for p in full.parameters()) == 419_584


def test_the_damping_of_mnist_is_the_schedule_of_the_paper():
    assert mnist.damping(0) == pytest.approx(1e-2) and mnist.damping(250) == pytest.approx(1e-3)
    assert mnist.damping(500) == mnist.damping(9999) == pytest.approx(1e-4)
    model = mnist.network("mse", 8.0, 0)
    assert sum(p.numel() for p in model.parameters()) == 198_760
    bound = 8 * math.sqrt(6 / (784 + 250))
    assert 0.99 * bound < model[0].weight.abs().max() <= bound


# --- the checks, on curves whose verdict is known


def _runs(name, variant, at, seeds=3, **columns):
    return [Run(name, variant, seed, np.asarray(at), {k: np.asarray(v, float) for k, v in columns.items()},
                np.full(at[-1], 1e-3), int(at[-1])) for seed in range(seeds)]


def _outcomes(task, settings, runs):
    return [check.outcome for check in task.judge(task.summarize(runs, settings), settings)]


def _pinn(lm_rates, adam_rates, error=1e-2):
    at = np.arange(0, 205, 5)
    runs = []
    for n, a, b in zip((1, 2, 3), lm_rates, adam_rates, strict=True):
        for name, rate, end in (("lm-0.1", a, error), ("adam", b, 1.0), ("sgd", b / 9, 1.0)):
            runs += _runs(name, f"n={n}", at, loss=1e4 * np.exp(-rate * at), relative_l2=np.full(at.size, end))
    return runs


@pytest.mark.parametrize(("lm", "adam", "error", "expected"), [
    ((0.16, 0.17, 0.168), (0.02, 0.01, 0.005), 1e-2, [PASS] * 4),
    ((0.16, 0.20, 0.199), (0.02, 0.01, 0.005), 1e-2, [FAIL, PASS, PASS, PASS]),
    ((0.16, 0.17, 0.168), (0.02, 0.01, 0.005), 5e-2, [PASS, FAIL, PASS, PASS]),
    ((0.16, 0.17, 0.168), (0.2, 0.3, 0.4), 1e-2, [PASS, PASS, FAIL, FAIL]),
])
def test_checks_of_the_pinn(lm, adam, error, expected):
    settings = _settings(poisson_pinn)
    assert _outcomes(poisson_pinn, settings, _pinn(lm, adam, error)) == expected


def _grokked(name, alpha, train, test, at):
    return _runs(name, f"alpha={alpha:g}", at, train_loss=np.ones(len(at)), test_loss=np.ones(len(at)),
                 train_accuracy=np.where(at >= train, 1.0, 0.1), test_accuracy=np.where(at >= test, 1.0, 0.1))


@pytest.mark.parametrize(("lm", "sgd", "expected"), [
    ((8, 10), ((100, 200), (300, 3000)), [PASS, PASS, PASS]),
    ((8, 20), ((100, 200), (300, 3000)), [FAIL, PASS, PASS]),
    ((8, 10), ((100, 2000), (300, 3000)), [PASS, FAIL, PASS]),
    ((8, 10), ((100, 2900), (2900, 3000)), [PASS, FAIL, FAIL]),
    ((8, 10**9), ((100, 200), (300, 10**9)), [FAIL, FAIL, FAIL]),
])
def test_checks_of_the_modular_network(lm, sgd, expected):
    settings = _settings(modular_mlp, alphas=(0.5, 2.0))
    runs = []
    for alpha, a, (b, c) in zip((0.5, 2.0), lm, sgd, strict=True):
        runs += _grokked("lm-0.1", alpha, 3, a, np.arange(31)) + _grokked("sgd", alpha, b, c, np.arange(0, 4001, 100))
    assert _outcomes(modular_mlp, settings, runs) == expected


def _polynomial(name, alpha, train, test, ones):
    at = np.arange(0, 101)
    column = {step: np.where(at >= step, 0.01, 1.0) for step in (train, test, ones)}
    return _runs(name, f"alpha={alpha:g}", at, train_loss=column[train], test_loss=column[test], largest_train=column[train],
                 largest_ones=column[ones], highest_train=column[train], highest_ones=column[ones])


@pytest.mark.parametrize(("lm", "sgd", "expected"), [
    ([(14, 14, 20), (14, 19, 20)], [(20, 30, 60), (30, 90, 99)], [PASS, PASS, PASS, PASS]),
    ([(14, 14, 20), (14, 39, 20)], [(20, 30, 60), (30, 90, 99)], [FAIL, PASS, PASS, PASS]),
    ([(14, 14, 20), (14, 19, 20)], [(20, 60, 60), (30, 90, 99)], [PASS, FAIL, PASS, PASS]),
    ([(14, 14, 40), (14, 19, 20)], [(20, 30, 20), (30, 90, 99)], [PASS, PASS, FAIL, FAIL]),
    ([(14, 14, 20), (14, 19, 20)], [(20, 30, 60), (999, 999, 999)], [PASS, OPEN, OPEN, PASS]),
    ([(14, 14, 20), (14, 19, 20)], [(20, 30, 60), (30, 90, 999)], [PASS, PASS, PASS, PASS]),
])
def test_checks_of_the_polynomial(lm, sgd, expected):
    settings = _settings(polynomial, alphas=(0.25, 4.0))
    runs = []
    for alpha, a, b in zip((0.25, 4.0), lm, sgd, strict=True):
        runs += _polynomial("lm-1e-05", alpha, *a) + _polynomial("sgd", alpha, *b)
    assert _outcomes(polynomial, settings, runs) == expected


def _digits(name, alpha, train, test, end, norm=(100.0, 50.0)):
    at = np.arange(0, 401, 10)
    accuracy = np.where(at >= test, 0.7, 0.1)
    accuracy[-1] = end
    return _runs(name, f"alpha={alpha:g}", at, loss=np.ones(at.size), train_accuracy=np.where(at >= train, 1.0, 0.1),
                 test_accuracy=accuracy, weight_norm=np.linspace(*norm, at.size), first_order=np.ones(at.size))


@pytest.mark.parametrize(("lm", "adamw", "hybrid", "expected"), [
    ([(20, 0.8), (50, 0.7)], [(100, 0.9), (300, 0.8)], [0.9, 0.85], [PASS, PASS, PASS, PASS]),
    ([(20, 0.8), (350, 0.7)], [(100, 0.9), (300, 0.8)], [0.9, 0.85], [FAIL, PASS, PASS, PASS]),
    ([(20, 0.8), (50, 0.9)], [(100, 0.9), (300, 0.8)], [0.9, 0.75], [PASS, FAIL, PASS, FAIL]),
    ([(20, 0.1), (999, 0.1)], [(300, 0.9), (100, 0.8)], [0.9, 0.85], [FAIL, PASS, FAIL, PASS]),
])
def test_checks_of_mnist(lm, adamw, hybrid, expected, noise_for_digits):
    settings = _settings(mnist, alphas=(1.0, 8.0))
    runs = []
    for alpha, (a, a_end), (b, b_end), c_end in zip((1.0, 8.0), lm, adamw, hybrid, strict=True):
        runs += _digits("lm", alpha, 10, a, a_end, (50.0, 60.0)) + _digits("adamw", alpha, 10, b, b_end)
        runs += _digits("hybrid", alpha, 10, a, c_end)
    assert _outcomes(mnist, settings, runs)[:4] == expected


def test_checks_of_the_transformer():
    settings = _settings(transformer, switch=10)
    at = np.arange(0, 121, 5)
    low, high = np.linspace(0.01, 0.05, at.size), np.linspace(0.02, 0.5, at.size)
    late = np.where(at > 100, 1.0, low)
    loss = np.where((at > 10) & (at < 20), 9.0, 1.0)

    def runs(lm, adam, hybrid):
        return [run for name, curve in (("lm", lm), ("adam", adam), ("hybrid", hybrid)) for run in _runs(
            name, "", at, 1, train_loss=loss, validation_loss=loss, train_accuracy=curve, validation_accuracy=curve,
            first_order=curve)]

    behind = late - 0.01 * (at < 100)
    assert _outcomes(transformer, settings, runs(high, behind, late)) == [FAIL, OPEN, PASS, PASS, PASS]
    assert _outcomes(transformer, settings, runs(np.where(at > 0, 1.0, 0.0), low, low)) == [PASS, FAIL, FAIL, FAIL, PASS]
    assert _outcomes(transformer, settings, runs(np.full(at.size, 0.4), low, low))[:2] == [PASS, PASS]
    assert _outcomes(transformer, settings, runs(low / 5, low / 5, low))[0] == OPEN, "below chance there is no lead"


# --- verify


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("name", "make"), [
    ("modular-mlp", modular_mlp.problem), ("polynomial", polynomial.problem), ("mnist", mnist.problem),
    ("mnist cross-entropy", mnist.problem_cross_entropy), ("transformer", transformer.problem)])
def test_the_native_backend_agrees_with_the_reference_on_the_problems_of_the_tasks(name, make, dtype):
    with torch_threads(1):   # as `pgdfast verify` has it: more of them wait for each other where other work goes on
        found = verification.compare(make, dtype, "native")
    assert not found.violations() and not found.unbounded
    assert {"residual", "gradient", "J v", "J^T u", "Gram", "step dual", "step cg"} <= set(found.errors)


def test_verify_prints_a_table_and_passes(capsys):
    assert main(["verify", "mnist", "--backend", "torch"]) == 0
    printed = capsys.readouterr().out
    assert "float32" in printed and "all 4 comparisons are within their bounds" in printed


def test_verify_names_what_exceeds_its_bound(capsys, monkeypatch):
    monkeypatch.setitem(verification.BOUNDS, torch.float64, 1e-20)
    assert main(["verify", "modular-mlp"]) == 1
    assert "modular-mlp, float64: step dual is off by" in capsys.readouterr().out


def test_verify_names_losses_that_part(capsys, monkeypatch):
    monkeypatch.setattr(verification, "curve_distance", lambda *_: 3e-6)
    assert main(["verify", "modular-mlp"]) == 1
    assert "modular-mlp: the losses part by 3.00e-06, more than 1e-06" in capsys.readouterr().out


def test_an_error_that_is_no_number_is_a_violation():
    found = verification.Comparison(torch.float64)
    found.note("Gram", float("nan"))
    assert found.violations() == [("Gram", float("inf"), 1e-9)]


def test_verify_refuses_an_unknown_task(capsys):
    assert main(["verify", "mnist", "regression-9d"]) == 2
    assert "unknown task 'regression-9d'" in capsys.readouterr().err


def test_names_of_lm_are_known_where_a_task_says_so():
    assert parse("lm", mnist.KNOWN).kind == "lm" and parse("lm-0.5", transformer.KNOWN) is None
