"""Properties of the Jacobian as an operator that need no reference, over random shapes."""

import pytest
import torch
import torch.nn.functional as F
from helpers import BACKENDS, agreement, jacobian_agreement, mlp, perturb, rand, relative
from hypothesis import given, settings
from hypothesis import strategies as st

import pgdfast
from pgdfast.linear import Linearizer

networks = st.fixed_dictionaries(
    {
        "samples": st.integers(1, 9),
        "inputs": st.integers(1, 4),
        "hidden": st.lists(st.integers(1, 5), min_size=0, max_size=3),
        "outputs": st.integers(1, 4),
        "seed": st.integers(0, 99),
        "dtype": st.sampled_from([torch.float32, torch.float64]),
        "kind": st.sampled_from(
            [
                "mse",
                "residuals",
                "two blocks",
                "sum over samples",
                "cross-entropy",
                "penalty",
                "tied",
            ]
        ),
        "backend": st.sampled_from(BACKENDS),
    }
)
bounded = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def closure_of(spec):
    """A random network's parameters and closure."""
    dtype, seed, n = spec["dtype"], spec["seed"], spec["samples"]
    model = mlp(spec["inputs"], *spec["hidden"], spec["outputs"], seed=seed, dtype=dtype)
    x = rand(n, spec["inputs"], seed=seed + 1, dtype=dtype)
    y = rand(n, spec["outputs"], seed=seed + 2, dtype=dtype)
    params = list(model.parameters())
    kinds = {
        "mse": lambda: F.mse_loss(model(x), y),
        "residuals": lambda: model(x) - y,
        "two blocks": lambda: (model(x)[:, 0], 3 * model(y @ y.T @ x) - y),
        "sum over samples": lambda: (model(x).sum(0), model(x) - model(x).mean(0)),
        "cross-entropy": lambda: F.cross_entropy(model(x), y.argmax(1)),
        "penalty": lambda: F.mse_loss(model(x), y) + 0.1 * sum(p.square().sum() for p in params),
        "tied": lambda: (
            model(torch.tanh(model(x) @ params[-2][:, :1]) * params[0][0]) * params[0].sum()
        ),
    }
    return kinds[spec["kind"]], params


def tolerance(dtype):
    return 1e-12 if dtype == torch.float64 else 1e-4


@bounded
@given(networks)
def test_products_are_adjoint(spec):
    closure, params = closure_of(spec)
    lin = pgdfast.linearize(closure, params, backend=spec["backend"])
    v = rand(lin.num_parameters, seed=spec["seed"], dtype=lin.dtype)
    u = rand(lin.num_residuals, seed=spec["seed"] + 1, dtype=lin.dtype)
    Ju, Jv = lin.vjp(u).double(), lin.jvp(v).double()
    left, right = Jv @ u.double(), v.double() @ Ju
    size = Jv.norm() * u.double().norm() + v.double().norm() * Ju.norm()
    assert abs(left - right) <= 50 * torch.finfo(lin.dtype).eps * size


@bounded
@given(networks)
def test_forms_of_the_jacobian_agree(spec):
    closure, params = closure_of(spec)
    lin = pgdfast.linearize(closure, params, backend=spec["backend"])
    J, K, limit = lin.dense(), lin.gram(), tolerance(lin.dtype)
    v = rand(lin.num_parameters, seed=spec["seed"], dtype=lin.dtype)
    u = rand(lin.num_residuals, seed=spec["seed"] + 1, dtype=lin.dtype)
    assert torch.equal(K, K.T)
    assert relative(K, J.double() @ J.double().T) < limit
    assert relative(lin.jvp(v), J.double() @ v.double()) < limit
    assert relative(lin.vjp(u), J.double().T @ u.double()) < limit
    penalty = 0 if lin.penalty is None else lin.penalty.double()
    assert relative(lin.diagonal(), J.double().square().sum(0) + penalty) < limit
    assert float(torch.linalg.eigvalsh(K.double()).min()) >= -limit * float(K.double().norm())


@bounded
@given(networks)
def test_linear_in_its_argument(spec):
    closure, params = closure_of(spec)
    lin = pgdfast.linearize(closure, params, backend=spec["backend"])
    v, w = (rand(lin.num_parameters, seed=spec["seed"] + k, dtype=lin.dtype) for k in range(2))
    assert relative(lin.jvp(2 * v - 3 * w), 2 * lin.jvp(v) - 3 * lin.jvp(w)) < tolerance(lin.dtype)
    assert not lin.jvp(0 * v).any() and not lin.vjp(0 * lin.residual).any()


@bounded
@given(networks)
def test_the_same_again_bit_for_bit(spec):
    closure, params = closure_of(spec)
    a, b = (pgdfast.linearize(closure, params, backend=spec["backend"]) for _ in range(2))
    v = rand(a.num_parameters, seed=spec["seed"], dtype=a.dtype)
    for product in ("jvp", "ggn"):
        assert torch.equal(getattr(a, product)(v), getattr(b, product)(v))
    for product in ("gram", "dense", "diagonal", "gradient"):
        assert torch.equal(getattr(a, product)(), getattr(b, product)())


@bounded
@given(networks)
def test_backends_agree(spec):
    closure, params = closure_of(spec)
    native, plain = (pgdfast.linearize(closure, params, backend=name) for name in BACKENDS)
    for product in ("gram", "dense", "diagonal", "gradient"):
        assert relative(getattr(native, product)(), getattr(plain, product)()) < tolerance(
            native.dtype
        )


@bounded
@given(networks)
def test_agreement_with_the_reference(spec):
    closure, params = closure_of(spec | {"dtype": torch.float64})
    linearizer = Linearizer(params, spec["backend"])
    for _ in range(2):
        assert agreement(linearizer, closure, params) < 1e-12
        perturb(params, seed=spec["seed"])


def test_several_linearizations_of_one_structure_stay_apart():
    model = mlp(3, 4, 2)
    params = list(model.parameters())
    linearizer = Linearizer(params)
    x = [rand(5, 3, seed=k) for k in range(2)]
    first, second = (linearizer(lambda x=x: model(x)) for x in x)
    for lin, data in ((first, x[0]), (second, x[1]), (first, x[0])):
        assert (
            relative(lin.dense(), pgdfast.linearize(lambda data=data: model(data), params).dense())
            < 1e-15
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_shapes_and_dtypes(backend):
    model = mlp(3, 4, 2, dtype=torch.float32)
    lin = pgdfast.linearize(
        lambda: model(rand(5, 3, dtype=torch.float32)), model.parameters(), backend=backend
    )
    M, P = 10, 3 * 4 + 4 + 4 * 2 + 2
    assert (lin.num_residuals, lin.num_parameters) == (M, P)
    assert lin.loss.shape == () and not lin.loss.requires_grad
    for value, shape in (
        (lin.residual, (M,)),
        (lin.jvp(torch.ones(P)), (M,)),
        (lin.vjp(torch.ones(M)), (P,)),
        (lin.dense(), (M, P)),
        (lin.gram(), (M, M)),
        (lin.diagonal(), (P,)),
        (lin.gradient(), (P,)),
        (lin.ggn(torch.ones(P)), (P,)),
    ):
        assert value.shape == shape and value.dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_residuals(backend):
    model = mlp(3, 4, 2)
    lin = pgdfast.linearize(lambda: model(rand(0, 3)), model.parameters(), backend=backend)
    P = lin.num_parameters
    assert lin.num_residuals == 0 and lin.gram().shape == (0, 0) and lin.dense().shape == (0, P)
    assert (
        lin.jvp(torch.ones(P)).shape == (0,)
        and not lin.vjp(torch.ones(0)).any()
        and not lin.diagonal().any()
    )


@pytest.mark.parametrize("samples", [1, 127, 128, 129, 300])
@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gram_over_tile_edges(samples, outputs, dtype):
    model = mlp(2, 7, outputs, dtype=dtype)
    x = rand(samples, 2, dtype=dtype)
    lin = pgdfast.linearize(lambda: (model(x), model(x[:3]).sum(1)), model.parameters())
    J = lin.dense().double()
    assert relative(lin.gram(), J @ J.T) < (1e-12 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_do_not_separate(backend):
    model = mlp(2, 5, 2)
    params = list(model.parameters())
    x = rand(7, 2)
    closures = (
        lambda: model(x) - model(x).mean(0),
        lambda: torch.tanh(rand(4, 7) @ model(x)),
        lambda: (model(x).sum(), model(x).prod())[0].view(1),
        lambda: model(x).T @ model(x),
        lambda: torch.cat([model(x), model(x)[:1]]),
    )
    for closure in closures:
        assert jacobian_agreement(Linearizer(params, backend), closure, params) < 1e-12
