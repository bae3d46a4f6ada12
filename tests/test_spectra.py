"""The spectrum of K = J J^T: exact on linear models, honest at rounding level, written and drawn."""

import builtins
import csv
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from helpers import fit, forget_rules, mlp, perturb, rand, relative, snapshot, unchanged

import pgdfast
from pgdfast import reference, spectra

VALUES = torch.tensor([9.0, 4.0, 1.0, 0.25, 0.01], dtype=torch.float64)


def linear(values=VALUES, P=8, dtype=torch.float64):
    """A linear model f = A w whose K = A A^T has these eigenvalues; parameters, closure, A, eigenvectors."""
    M = len(values)
    left, right = torch.linalg.qr(rand(M, M, seed=1))[0], torch.linalg.qr(rand(P, P, seed=2))[0][:, :M]
    A = (left * values.sqrt()) @ right.T
    w, y = rand(P, seed=3, dtype=dtype).requires_grad_(), rand(M, seed=4, dtype=dtype)
    A_model = A.to(dtype)
    return [w], lambda: A_model @ w - y, A, left


# --- exact on a linear model ----------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["native", "torch", "reference"])
def test_eigenvalues_eigenvectors_and_coefficients_of_a_linear_model(backend):
    params, closure, A, left = linear()
    before = snapshot(params)
    found = pgdfast.ntk_spectrum(closure, params, backend=backend)
    assert relative(found.eigenvalues, VALUES) < 1e-13 and found.resolved == 5
    assert bool((found.eigenvalues[:-1] >= found.eigenvalues[1:]).all())
    assert relative(found.eigenvectors.T @ found.eigenvectors, torch.eye(5)) < 1e-13
    assert relative((found.eigenvectors * left).sum(0).abs(), torch.ones(5)) < 1e-10
    signs = (found.eigenvectors * left).sum(0).sign()
    assert relative(found.coefficients, signs * (left.T @ closure())) < 1e-10
    assert unchanged(params, before) and params[0].grad is None
    for part in (found.eigenvalues, found.eigenvectors, found.coefficients):
        assert part.dtype == torch.float64 and not part.requires_grad


def test_condition_numbers_by_their_formulas():
    params, closure, _, _ = linear()
    found = pgdfast.ntk_spectrum(closure, params)
    largest, smallest = 9.0, 0.01
    assert found.kappa_gd == pytest.approx(largest / smallest, rel=1e-11)
    for mu in (1e-6, 1e-2, 0.5, 100.0):
        expected = (largest / smallest) * (smallest + mu) / (largest + mu)
        assert found.kappa_lm(mu) == pytest.approx(expected, rel=1e-11)
    assert found.kappa_lm(smallest) == pytest.approx(2 * largest / (largest + smallest), rel=1e-11)
    assert found.kappa_lm(0) == 1.0
    assert found.kappa_lm(1e12) == pytest.approx(found.kappa_gd, rel=1e-9)


def test_rates_by_their_formulas():
    params, closure, _, _ = linear()
    found = pgdfast.ntk_spectrum(closure, params)
    assert relative(found.rates_gd, VALUES) < 1e-13
    assert relative(found.rates_lm(0.3), VALUES / (VALUES + 0.3)) < 1e-12
    assert found.rates_gn().tolist() == [1.0] * 5
    assert found.rates_gn(0.02).tolist() == [1.0, 1.0, 1.0, 1.0, 0.0]
    with pytest.raises(ValueError, match="mu is -1; it must be a finite number that is not negative"):
        found.rates_lm(-1)
    with pytest.raises(ValueError, match="rcond is 1; it must lie between 0 and 1"):
        found.rates_gn(1)


@pytest.mark.parametrize("mu", [0.5, 0.1, 0.0])
def test_lm_steps_fall_at_these_rates(mu):
    """A step of length lr multiplies mode i by 1 - lr rate_i, exactly, in a linear model."""
    params, closure, _, _ = linear()
    lr, count = 0.1, 30
    found = pgdfast.ntk_spectrum(closure, params)
    rates = found.rates_lm(mu) if mu else found.rates_gn()
    optimizer = pgdfast.LM(params, lr=lr, damping=mu, damping_rule="constant")
    for _ in range(count):
        optimizer.step(closure)
    modes = found.eigenvectors.T @ closure().detach()
    expected = found.coefficients * (1 - lr * rates) ** count
    assert float((modes / expected - 1).abs().max()) < 1e-9


def test_gradient_descent_falls_at_these_rates():
    params, closure, _, _ = linear()
    found = pgdfast.ntk_spectrum(closure, params)
    optimizer = torch.optim.SGD(params, lr=0.05)
    for _ in range(20):
        optimizer.zero_grad()
        (0.5 * closure().square().sum()).backward()
        optimizer.step()
    modes = found.eigenvectors.T @ closure().detach()
    assert float((modes / (found.coefficients * (1 - 0.05 * found.rates_gd) ** 20) - 1).abs().max()) < 1e-9


# --- what is at rounding level --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_rank_deficient_kernel_has_no_finite_condition_number(dtype):
    w, x = rand(3, seed=1, dtype=dtype).requires_grad_(), rand(10, 3, seed=2, dtype=dtype)
    found = pgdfast.ntk_spectrum(lambda: x @ w - 1, [w])
    assert found.resolved == 3 and len(found.eigenvalues) == 10
    assert found.kappa_gd == math.inf and found.kappa_lm(0.1) == math.inf
    known = torch.linalg.svdvals(x.double()).square()
    resolved = found.resolved_modes
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert resolved.kappa_gd == pytest.approx(float(known[0] / known[-1]), rel=tolerance)
    assert resolved.eigenvectors.shape == (10, 3) and resolved.resolved == 3
    assert relative(resolved.coefficients, resolved.eigenvectors.T @ (x.double() @ w.detach().double() - 1)) < 1e-5


def test_eigenvalues_around_the_cutoff():
    """What is a hundred times above rounding is found; what is a hundred times below is not counted."""
    eps = torch.finfo(torch.float64).eps
    values = torch.tensor([1.0, 1e-6, 100 * 4 * eps, 1e-2 * 4 * eps], dtype=torch.float64)
    params, closure, _, _ = linear(values)
    found = pgdfast.ntk_spectrum(closure, params)
    assert found.cutoff == pytest.approx(4 * eps) and found.resolved == 3


def test_a_float32_model_is_summed_in_float64():
    """J in float32 resolves eigenvalues down to the square of its rounding, K in float32 only to the rounding."""
    values = torch.tensor([1.0, 1e-3, 1e-9], dtype=torch.float64)
    params, closure, _, _ = linear(values, dtype=torch.float32)
    found = pgdfast.ntk_spectrum(closure, params)
    assert found.resolved == 3
    assert float((found.eigenvalues / values - 1).abs().max()) < 1e-2


def test_no_kernel_at_all():
    w = rand(3).requires_grad_()
    found = pgdfast.ntk_spectrum(lambda: 0.0 * w - 1, [w])
    assert found.resolved == 0 and found.kappa_gd == math.inf and found.resolved_modes.kappa_lm(1.0) == math.inf
    assert found.rates_lm(0.0).tolist() == [0.0] * 3


# --- any model, any closure -----------------------------------------------------------------------


def jacobian(function, params):
    """J by autograd alone, (M, P)."""
    rows = [torch.autograd.grad(o, params, retain_graph=True) for o in function().reshape(-1)]
    return torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows])


def test_a_network_with_several_outputs():
    model, x = mlp(2, 5, 3), rand(4, 2, seed=7)
    params = list(model.parameters())
    found = pgdfast.ntk_spectrum(lambda: model(x), model.parameters())   # a generator serves too
    J = jacobian(lambda: model(x), params)
    assert relative(found.eigenvalues, torch.linalg.svdvals(J).square()[:12]) < 1e-12
    K = found.eigenvectors * found.eigenvalues @ found.eigenvectors.T
    assert relative(K, J @ J.T) < 1e-12


def test_a_mean_loss_carries_its_factor():
    params, closure = fit()
    model_out = pgdfast.ntk_spectrum(closure, params)
    lin = reference.linearize(closure, params)
    assert relative(model_out.eigenvalues[:6], torch.linalg.svdvals(lin.dense()).square()[:6]) < 1e-11
    assert float(model_out.coefficients.square().sum()) == pytest.approx(2 * float(closure().detach()), rel=1e-12)


def test_a_cross_entropy_is_weighted_by_its_output_hessian():
    model, x = mlp(2, 4, 3), rand(5, 2, seed=7)
    params, labels = list(model.parameters()), torch.tensor([0, 2, 1, 1, 0])
    found = pgdfast.ntk_spectrum(lambda: F.cross_entropy(model(x), labels, reduction="sum"), params)
    p = model(x).detach().softmax(1)
    H = torch.block_diag(*(torch.diag(row) - torch.outer(row, row) for row in p))
    J = jacobian(lambda: model(x), params)
    ggn = torch.linalg.eigvalsh(J.T @ H @ J).flip(0)   # shares its non-zero eigenvalues with S^T J J^T S
    assert relative(found.eigenvalues[:10], ggn[:10]) < 1e-11
    assert found.resolved == 10   # two of three logits a sample: H has rank 10


def test_an_operation_without_a_rule(monkeypatch):
    forget_rules(monkeypatch)
    params, closure = fit()
    plain = pgdfast.ntk_spectrum(lambda: torch.atan(params[2]) * 2, params)

    class Atan(torch.autograd.Function):
        @staticmethod
        def forward(x):
            return torch.atan(x)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, g):
            return g / (1 + ctx.saved_tensors[0] ** 2)

    with pytest.warns(UserWarning, match="no tape rule"):
        own = pgdfast.ntk_spectrum(lambda: Atan.apply(params[2]) * 2, params)
    assert relative(own.eigenvalues, plain.eigenvalues) < 1e-12


def test_frozen_parameters_do_not_count():
    params, closure = fit()
    whole = pgdfast.ntk_spectrum(closure, params)
    params[0].requires_grad_(False)
    part = pgdfast.ntk_spectrum(closure, params)
    assert relative(part.eigenvalues, pgdfast.ntk_spectrum(closure, params[1:]).eigenvalues) == 0
    assert float(part.eigenvalues.sum()) < float(whole.eigenvalues.sum())


def test_refused():
    params, closure = fit()
    with pytest.raises(TypeError, match="pgdfast.ntk_spectrum: closure is tensor.*must be a callable"):
        pgdfast.ntk_spectrum(closure().detach(), params)
    with pytest.raises(ValueError, match="pgdfast.ntk_spectrum: the closure has no residuals; give it samples"):
        pgdfast.ntk_spectrum(lambda: params[0][:0], params)
    with pytest.raises(ValueError, match="pgdfast.ntk_spectrum: no parameter requires a gradient"):
        pgdfast.ntk_spectrum(closure, [p.detach() for p in params])
    w = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    with pytest.raises(ValueError, match="pgdfast.ntk_spectrum: the Jacobian has NaN or infinity"):
        pgdfast.ntk_spectrum(lambda: torch.sqrt(w), [w])


def test_too_many_residuals_are_refused_before_the_matrix_is_made(monkeypatch):
    params, closure = fit()
    monkeypatch.setattr(spectra, "available_memory", lambda device: 8 * 5 * 12 * 12)
    assert pgdfast.ntk_spectrum(closure, params).resolved > 0   # just fits
    monkeypatch.setattr(spectra, "available_memory", lambda device: 8 * 5 * 12 * 12 - 1)
    monkeypatch.setattr(pgdfast.Linearization, "gram", lambda self: pytest.fail("the matrix was made"))
    with pytest.raises(MemoryError, match="ntk_spectrum: 5 matrices of M x M for M = 12 residuals take .* GB are free"):
        pgdfast.ntk_spectrum(closure, params)


# --- drift and alignment --------------------------------------------------------------------------


def test_drift():
    K0 = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    assert pgdfast.kernel_drift(K0, K0) == 0.0
    assert pgdfast.kernel_drift(2 * K0, K0) == pytest.approx(1.0)
    assert pgdfast.kernel_drift(K0 + torch.tensor([[0.0, 3.0], [4.0, 0.0]]), K0) == pytest.approx(1.0)
    with pytest.raises(ValueError, match=r"K0 has shape \(3, 3\) and K has \(2, 2\)"):
        pgdfast.kernel_drift(K0, torch.eye(3))
    with pytest.raises(ValueError, match=r"K has shape \(2, 3\); it must be a Gram matrix"):
        pgdfast.kernel_drift(torch.ones(2, 3), torch.ones(2, 3))


def test_alignment():
    y = torch.tensor([[1.0], [2.0], [2.0]])
    assert pgdfast.kernel_alignment(y @ y.T, -3 * y) == pytest.approx(1.0)
    assert pgdfast.kernel_alignment(torch.eye(3), y) == pytest.approx(1 / math.sqrt(3))
    across = torch.tensor([[2.0], [-1.0], [0.0]])
    assert pgdfast.kernel_alignment(across @ across.T, y) == pytest.approx(0.0, abs=1e-7)
    with pytest.raises(ValueError, match="the target has 2 entries and K has 3 rows"):
        pgdfast.kernel_alignment(torch.eye(3), y[:2])


# --- over training --------------------------------------------------------------------------------


def trained(records=4, **options):
    params, closure = fit()
    history, optimizer = pgdfast.SpectrumHistory(closure, params, **options), pgdfast.LM(params, damping=0.3)
    grams = []
    for step in range(records):
        history.record(step)
        lin = reference.linearize(closure, params)
        grams.append((lin.gram(), lin.residual))
        optimizer.step(closure)
    return history, grams


def test_a_history_against_explicit_jacobians():
    history, grams = trained(modes=3, target=rand(12, seed=5))
    K0, y = grams[0][0], rand(12, seed=5)
    basis = torch.linalg.eigh(K0)[1].flip(1)
    assert [row["step"] for row in history.rows] == [0, 1, 2, 3] and history.rows[0]["drift"] == 0.0
    for row, (K, r) in zip(history.rows, grams, strict=True):
        values = torch.linalg.eigvalsh(K).flip(0)
        assert [row[f"eigenvalue_{k}"] for k in (1, 2, 3)] == pytest.approx(values[:3].tolist(), rel=1e-9)
        assert [row[f"mode_{k}"] for k in (1, 2, 3)] == pytest.approx((basis.T @ r)[:3].abs().tolist(), rel=1e-6)
        assert row["drift"] == pytest.approx(float((K - K0).norm() / K0.norm()), rel=1e-9)
        assert row["alignment"] == pytest.approx(float(y @ K @ y / (K.norm() * (y @ y))), rel=1e-9)
        assert row["residual_norm"] == pytest.approx(float(r.norm()), rel=1e-12)
        assert row["kappa_gd"] == pytest.approx(float(values[0] / values[row["resolved"] - 1]), rel=1e-3)
        assert "eigenvalue_4" not in row
    assert history.rows[-1]["drift"] > 0


def test_the_target_of_a_history_is_its_first_residual():
    history, grams = trained(2)
    r0 = grams[0][1]
    for row, (K, _) in zip(history.rows, grams, strict=True):
        assert row["alignment"] == pytest.approx(float(r0 @ K @ r0 / (K.norm() * (r0 @ r0))), rel=1e-9)


def test_the_modes_of_a_linear_model_fall_at_their_rates_through_a_history():
    params, closure, _, _ = linear()
    history = pgdfast.SpectrumHistory(closure, params)
    optimizer = pgdfast.LM(params, lr=0.2, damping=0.1, damping_rule="constant")
    first = history.record(0)
    for _ in range(10):
        optimizer.step(closure)
    history.record(10)
    for k, rate in enumerate(first.rates_lm(0.1).tolist(), start=1):
        expected = history.rows[0][f"mode_{k}"] * (1 - 0.2 * rate) ** 10
        assert history.rows[1][f"mode_{k}"] == pytest.approx(expected, rel=1e-9)
    assert history.rows[1]["drift"] < 1e-14


def test_what_a_history_refuses():
    params, closure = fit()
    with pytest.raises(ValueError, match="SpectrumHistory: modes is 0; it must be a whole number of 1 or more"):
        pgdfast.SpectrumHistory(closure, params, modes=0)
    history = pgdfast.SpectrumHistory(closure, params, target=rand(5))
    for verb in (history.save_csv, history.plot):
        with pytest.raises(ValueError, match="nothing was recorded; call record"):
            verb("nowhere.csv")
    with pytest.raises(ValueError, match="the target has 5 entries and K has 12 rows"):
        history.record(0)
    assert history.rows == []
    batches = iter([3, 4])
    history = pgdfast.SpectrumHistory(lambda: params[0].reshape(-1)[:next(batches)], params)
    history.record(0)
    with pytest.raises(ValueError, match="both must be Gram matrices of the same closure"):
        history.record(1)
    assert len(history.rows) == 1


# --- files and pictures ---------------------------------------------------------------------------


def read(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_csv_of_a_spectrum_reads_back_to_the_last_digit(tmp_path):
    w, x = rand(3, seed=1).requires_grad_(), rand(5, 3, seed=2)
    found = pgdfast.ntk_spectrum(lambda: x @ w - 1, [w])
    found.save_csv(tmp_path / "s.csv")
    rows = read(tmp_path / "s.csv")
    assert [float(row["eigenvalue"]) for row in rows] == found.eigenvalues.tolist()
    assert [float(row["coefficient"]) for row in rows] == found.coefficients.tolist()
    assert [(row["mode"], row["resolved"]) for row in rows] == [("1", "1"), ("2", "1"), ("3", "1"), ("4", "0"), ("5", "0")]


def test_csv_of_a_history_reads_back_to_the_last_digit(tmp_path):
    history, _ = trained(3)
    history.save_csv(tmp_path / "h.csv")
    rows = read(tmp_path / "h.csv")
    assert [{name: float(value) for name, value in row.items()} for row in rows] == history.rows


def test_pictures_are_png(tmp_path):
    history, _ = trained(3)
    params, closure = fit()
    w = rand(3).requires_grad_()
    pictures = {
        "full": lambda path: pgdfast.ntk_spectrum(closure, params).plot(path, mus=(0.1, 1e-3)),
        "zero": lambda path: pgdfast.ntk_spectrum(lambda: 0.0 * w - 1, [w]).plot(path),
        "history": history.plot,
    }
    for name, draw in pictures.items():
        path = tmp_path / f"{name}.png"
        figure = draw(path)
        data = path.read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n" and len(data) > 5000
        assert len(figure.axes) == (4 if name == "history" else 2)


def test_the_curves_of_a_picture_are_the_numbers():
    params, closure, _, _ = linear()
    found = pgdfast.ntk_spectrum(closure, params)
    left, right = found.plot().axes
    assert list(left.lines[0].get_ydata()) == found.eigenvalues.tolist()
    assert list(right.lines[0].get_ydata()) == found.coefficients.abs().tolist()
    assert left.get_yscale() == right.get_yscale() == "log"


def test_drawing_makes_no_global_state():
    code = (
        "import sys, torch, pgdfast; w = torch.ones(2, requires_grad=True); "
        "s = pgdfast.ntk_spectrum(lambda: w * 2, [w]); assert 'matplotlib' not in sys.modules; "
        "s.plot(); assert 'matplotlib.pyplot' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_missing_matplotlib_is_named(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    params, closure = fit()
    found = pgdfast.ntk_spectrum(closure, params)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"Spectrum.plot: needs matplotlib; pip install 'pgdfast\[run\]'"):
        found.plot()


def test_a_spectrum_is_short_to_print_and_follows_the_parameters():
    params, closure = fit()
    first = pgdfast.ntk_spectrum(closure, params)
    assert "eigenvectors" not in repr(first)
    perturb(params)
    assert relative(pgdfast.ntk_spectrum(closure, params).eigenvalues, first.eigenvalues) > 1e-3
