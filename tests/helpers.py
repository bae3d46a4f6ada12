"""The one comparison and the small problems that the tests share."""

import copy
import io
import itertools
import math
import random

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import BackwardCFunction

import pgdfast
from pgdfast import reference
from pgdfast.step import Parameters, Point
from pgdfast.step.corrected import CorrectedStep
from pgdfast.tape import trace, walk

SOLVERS = ("dual", "primal", "cg", "lsmr", "eigh", "auto")
BACKENDS = ("native", "torch")
EVERYWHERE = (*BACKENDS, "reference")
TIGHT = pgdfast.CG(max_iterations=20000, tolerance=1e-14)


def forget_rules(monkeypatch, *operations):
    """Let these types of nodes be without a tape rule, and every torch.autograd.Function written in Python."""
    known = trace.rule_of

    def rule_of(node):
        function = isinstance(node, BackwardCFunction) and not walk.kind_of(node).startswith("pgdfast.")
        if function or type(node).__name__ in operations:
            raise walk.Fallback(walk.name_of(node))
        return known(node)

    monkeypatch.setattr(trace, "rule_of", rule_of)


class ByNumpy(torch.autograd.Function):
    """Tripled, by a backward that neither autograd nor a batch can follow."""

    @staticmethod
    def forward(ctx, x):
        return 3 * x

    @staticmethod
    def backward(ctx, g):
        return torch.from_numpy(3 * g.detach().numpy())


def relative(a, b):
    """||a - b|| / ||b|| in float64, or ||a|| where b is zero."""
    a, b = a.detach().double(), b.detach().double()
    assert a.shape == b.shape, f"{tuple(a.shape)} against {tuple(b.shape)}"
    norm = float(b.norm())
    return float((a - b).norm()) / (norm or 1.0)


def rand(*shape, seed=0, dtype=torch.float64):
    """Standard normal numbers from a seed of their own."""
    return torch.randn(
        *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    ).to(dtype)


def mlp(*widths, activation=nn.Tanh, seed=0, dtype=torch.float64):
    """Linear layers of these widths with an activation between them."""
    layers = []
    for k, (a, b) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
        layer = nn.Linear(a, b, dtype=dtype)
        with torch.no_grad():
            layer.weight.copy_(rand(b, a, seed=100 * seed + 2 * k) / a**0.5)
            layer.bias.copy_(0.3 * rand(b, seed=100 * seed + 2 * k + 1))
        layers += [layer, activation()]
    return nn.Sequential(*layers[:-1])


def flat(params):
    """A copy of all parameters as one vector."""
    return torch.cat([p.detach().reshape(-1) for p in params])


def snapshot(params):
    """Copies to compare with torch.equal."""
    return [p.detach().clone() for p in params]


def unchanged(params, before):
    """Are the parameters bit for bit those of a snapshot?"""
    return all(torch.equal(p.detach(), q) for p, q in zip(params, before, strict=True))


def perturb(params, seed=0, size=0.1):
    """Move the parameters in place."""
    with torch.no_grad():
        for k, p in enumerate(params):
            p.add_(size * rand(*p.shape, seed=seed + k, dtype=p.dtype))


def damping_of(ref, condition=1e3, scale=None):
    """The mu that bounds cond(mu I + J^T J), in the variables D^1/2 theta, by this number."""
    J = ref.dense() if scale is None else ref.dense() / scale.double().sqrt()
    return float(torch.linalg.matrix_norm(J, 2)) ** 2 / (condition - 1)


def condition(ref, mu):
    """cond(mu I + J^T J)."""
    values = torch.linalg.eigvalsh(ref.dense().T @ ref.dense()).clamp_min(0) + mu
    return float(values[-1] / values[0])


def agreement(linearizer, closure, params, seed=0):
    """The largest relative difference from the reference that the order of rows leaves alone."""
    lin, ref = linearizer(closure), reference.linearize(closure, params)
    v = rand(lin.num_parameters, seed=seed)
    pairs = [
        (lin.loss, ref.loss),
        (lin.gradient(), ref.vjp(ref.residual)),
        (lin.ggn(v), ref.ggn(v)),
        (lin.diagonal(), ref.diagonal()),
    ]
    return max(relative(a, b) for a, b in pairs)


def jacobian_agreement(linearizer, closure, params, seed=0):
    """The largest relative difference from the reference: residual, Jacobian, products."""
    lin, ref = linearizer(closure), reference.linearize(closure, params)
    v, u = rand(lin.num_parameters, seed=seed), rand(lin.num_residuals, seed=seed + 1)
    pairs = [
        (lin.residual, ref.residual),
        (lin.dense(), ref.dense()),
        (lin.jvp(v), ref.jvp(v)),
        (lin.vjp(u), ref.vjp(u)),
        (lin.gram(), ref.gram()),
        (lin.diagonal(), ref.diagonal()),
    ]
    return max(relative(a, b) for a, b in pairs)


def parameters(*shapes):
    """Leaf tensors of these shapes."""
    return [rand(*shape, seed=k + 1).requires_grad_() for k, shape in enumerate(shapes)]


def gradient(y, x):
    """dy/dx with its graph, zero where y does not depend on x."""
    if not y.requires_grad:
        return torch.zeros_like(x)
    return torch.autograd.grad(y.sum(), x, create_graph=True, materialize_grads=True)[0]


ACTIVATIONS = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "gelu": F.gelu,
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "mish": F.mish,
    "sigmoid": torch.sigmoid,
    "logsigmoid": F.logsigmoid,
    "sin": torch.sin,
    "cos": torch.cos,
    "softplus": F.softplus,
    "softplus with options": lambda x: F.softplus(x, beta=2.0, threshold=1.0),
    "elu": lambda x: F.elu(x, alpha=0.7),
    "elu in place": lambda x: F.elu(1.0 * x, alpha=0.7, inplace=True),
    "selu": F.selu,
    "celu": lambda x: F.celu(x, alpha=0.5),
    "leaky_relu": lambda x: F.leaky_relu(x, 0.2),
    "hardtanh": F.hardtanh,
    "softsign": F.softsign,
    "exp": torch.exp,
    "erf": torch.erf,
    "atan": torch.atan,
    "square": torch.square,
    "quotient": lambda x: x / (1 + x * x),
    "root": lambda x: torch.sqrt(1 + x * x),
    "log": lambda x: torch.log(1 + x * x),
}


RULES = ("constant", "gain-ratio", "delayed", "sweep")


def fit(dtype=torch.float64, seed=0):
    """A small regression: parameters and closure."""
    model = mlp(2, 6, 1, seed=seed, dtype=dtype)
    x, y = rand(12, 2, seed=1), rand(12, 1, seed=2)
    x, y = x.to(dtype), (torch.sin(3 * x[:, :1]) + y).to(dtype)
    return list(model.parameters()), lambda: F.mse_loss(model(x), y)


def pinn():
    """Residuals with a Laplacian and a second block: parameters and closure."""
    model = mlp(2, 12, 1)
    x, edge = rand(30, 2, seed=4).requires_grad_(), rand(8, 2, seed=5)

    def residuals():
        slope = gradient(model(x).sum(), x)
        return sum(gradient(slope[:, d].sum(), x)[:, d] for d in range(2)) + torch.sin(3 * x[:, 0]), 3 * model(edge)[:, 0]

    return list(model.parameters()), residuals


def sine_fit(dtype=torch.float64, device="cpu", **options):
    """(model, optimizer, closure) of a fit of a sine wave by a tanh network of two hidden layers."""
    model = mlp(1, 20, 20, 1, dtype=dtype).to(device)
    x = torch.linspace(-1, 1, 40, dtype=dtype, device=device)[:, None]
    y = torch.sin(5 * x)
    return model, pgdfast.LM(model.parameters(), **options), lambda: F.mse_loss(model(x), y)


LOSSES = {   # a model and its inputs -> closure
    "residuals": lambda m, x: lambda: (m(x), m(2 * x)[:3]),
    "cross-entropy": lambda m, x: lambda: F.cross_entropy(m(x), torch.arange(12, device=x.device) % 3),
    "weighted": lambda m, x: lambda: F.cross_entropy(
        m(x), torch.arange(12, device=x.device) % 3, weight=1 + x[:3, 0].detach().abs(), ignore_index=1),
    "logistic": lambda m, x: lambda: F.binary_cross_entropy_with_logits(
        m(x), x.detach().abs().clamp_max(1)[:, :1].expand(12, 3), pos_weight=1 + x[0].detach().abs()[:1].expand(3)),
    "penalty": lambda m, x: lambda: F.mse_loss(m(x), x[:, :1].expand(12, 3)) + sum(0.01 * (p**2).sum() for p in m.parameters()),
    "on the device": lambda m, x: lambda: (m(x) ** 2).mean() * x.detach()[0, 0].abs(),
    "pinn": lambda m, x: lambda: (gradient(m(x).sum(), x), m(x)[:2]),
    "batch": lambda m, x: lambda: m(x) - m(x).mean(0),
}


def fit_by(name, device="cpu", **options):
    """(optimizer, closure) of a fit under one of LOSSES."""
    model = mlp(2, 9, 3).to(device)
    x = rand(12, 2).to(device).requires_grad_(name == "pinn")
    return pgdfast.LM(model.parameters(), **options), LOSSES[name](model, x)


DRAWS = {
    "torch": lambda: torch.rand(8, 2, dtype=torch.float64),
    "torch normal": lambda: torch.randn(8, 2, dtype=torch.float64),
    "permutation": lambda: rand(20, 2)[torch.randperm(20)[:8]],
    "numpy": lambda: torch.from_numpy(np.random.uniform(size=(8, 2))),
    "numpy normal": lambda: torch.from_numpy(np.random.randn(8, 2)),
    "python": lambda: torch.tensor([[random.random(), random.gauss(0, 1)] for _ in range(8)], dtype=torch.float64),
}


def resampled(source="torch", jump=0.0):
    """A regression on points that every call draws, and a loss that trials find larger by a jump.

    Returns the parameters, the closure, and the list of the points of all its calls.
    """
    model, seen = mlp(2, 6, 1), []
    start = flat(model.parameters())

    def closure():
        x = DRAWS[source]()
        seen.append(x)
        moved = float(not torch.equal(flat(model.parameters()), start))
        return torch.cat([model(x) - torch.sin(3 * x[:, :1]), torch.full((1, 1), jump * moved, dtype=x.dtype)])

    return list(model.parameters()), closure, seen


def seed_all(number=0):
    """Seed the three generators that are replayed."""
    torch.manual_seed(number)
    np.random.seed(number)
    random.seed(number)


def generator_states():
    """The states of the three generators, comparable with ==."""
    name, words, *rest = np.random.get_state()
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), (name, words.tobytes(), *rest)


_numbers = itertools.count()


def counted(closure):
    """(function, list that grows with each of its runs). Its code equals no other: what is remembered of one stays there."""
    runs = []
    scope = {"closure": closure, "runs": runs}
    exec(f"def run():\n    runs.append({next(_numbers)})\n    return closure()", scope)
    return scope["run"], runs


def momentum_of(optimizer):
    """phi_(k-1) as the optimizer's state holds it, flat."""
    return flat([optimizer.state[p]["momentum"] for group in optimizer.param_groups for p in group["params"]])


def memory_of(optimizer):
    """What the optimizer remembers beside its parameters: {"step": n, "members": [...]}."""
    return next(values for values in optimizer.state.values() if "step" in values)


def through_a_file(state):
    """A state_dict that was saved and loaded, weights only."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


# A sine with noise that networks cannot fit: mu stays away from 0.
NOISY_SINE = (
    torch.linspace(-1, 1, 24, dtype=torch.float64)[:, None],
    torch.sin(4 * torch.linspace(-1, 1, 24, dtype=torch.float64)[:, None]) + 0.3 * rand(24, 1, seed=7),
)


def networks_of(count, dtype=torch.float64, widths=(1, 5, 4, 1)):
    """Networks of one shape, each from a seed of its own."""
    return [mlp(*widths, seed=b, dtype=dtype) for b in range(count)]


def stack_of(count, dtype=torch.float64):
    """The same networks as an ensemble."""
    return pgdfast.functional_ensemble(networks_of(count, dtype))


def losses_of(networks, x=NOISY_SINE[0], y=NOISY_SINE[1]):
    """The closure of an ensemble's mean squared errors, (B,)."""
    return lambda: ((networks(x) - y) ** 2).mean((1, 2))


def nudged(module):
    """The same network with every parameter changed by about a rounding unit."""
    twin = copy.deepcopy(module)
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(1 + torch.finfo(p.dtype).eps)
    return twin


def apart(a, b):
    """The largest difference of a parameter of two networks."""
    return float((flat(a.parameters()) - flat(b.parameters())).abs().max())


class Correcting:
    """One network's step apart from an optimizer, as corrections see it; `at(e)` runs the closure at theta - e."""

    def __init__(self, closure, params, lin, solution, rates=None):
        self.lin, self.solution, self.count, self._closure = lin, solution, 0, closure
        self.parameters = Parameters(params, None)
        self.parameters.begin([rates or [1.0] * len(params)], None)
        self.delta = self.parameters.scaled(0, solution.step)
        self._model = model = CorrectedStep(lin, solution, self.parameters, 0, float(lin.loss))
        self.missed, self.correction, self.size, self.ratio = model.missed, model.correction, model.size, model.ratio

    def at(self, e):
        """The loss at theta - e, with the parameters back at theta."""
        self.parameters.go({0: Point(e, displacement=True)})
        loss, self._model.residual = self.lin.residual_at(self._closure)
        self._model.tried, self.count = e, self.count + 1
        self.parameters.all_back()
        self.lin.parameters_unchanged()
        return loss

    def ended(self, acceleration):
        """(e, loss) where a correction of the step ends."""
        proposal, answer = acceleration.correct(self, self.delta), None
        while True:
            try:
                answer = self.at(proposal.send(answer))
            except StopIteration as end:
                return end.value


class Uphill:
    """A closure whose loss is 1/2 ||w||^2 at the start and larger by a jump anywhere else."""

    def __init__(self, jump=100.0):
        self.w = rand(5).requires_grad_()
        self.start, self.jump, self.calls = self.w.detach().clone(), jump, 0

    def __call__(self):
        self.calls += 1
        moved = not torch.equal(self.w.detach(), self.start)
        return torch.cat([self.w, torch.tensor([self.jump if moved else 0.0], dtype=self.w.dtype)])


def tanh_fit(dtype=torch.float64, penalty=False, samples=60):
    """A tanh network that CG needs some iterations for: its parameters and closure."""
    model = mlp(2, 8, 8, 1, dtype=dtype)
    x, y = rand(samples, 2, seed=1, dtype=dtype), rand(samples, 1, seed=2, dtype=dtype)
    params = list(model.parameters())
    squares = (lambda: 1e-2 * params[0].square().sum()) if penalty else (lambda: 0.0)
    return params, lambda: F.mse_loss(model(x), y) + squares()


def linear_problem(J, b, dtype=torch.float64):
    """The closure of residuals J w - b at w = 0, whose Jacobian is J."""
    J, b = J.to(dtype), b.to(dtype)
    w = torch.zeros(J.shape[1], dtype=dtype, requires_grad=True)
    return [w], lambda: J @ w - b


def spectrum(M, P, low, seed=0):
    """An M x P matrix with singular values from 1 down to `low`."""
    n = min(M, P)
    U, V = (torch.linalg.qr(rand(k, n, seed=seed + k))[0] for k in (M, P))
    return U @ torch.diag(torch.logspace(0, math.log10(low), n, dtype=torch.float64)) @ V.T


def model_value(lin, step, mu, scale=1.0):
    """The damped model's reduction by a step: g . step - 1/2 step . (mu D + J^T J) step."""
    step = step.double()
    curvature = float(step.dot(lin.ggn(step).double() + mu * scale * step))
    return float(lin.gradient().double().dot(step)) - 0.5 * curvature
