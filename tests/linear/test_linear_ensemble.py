"""Members of a linearized ensemble against the same networks linearized alone."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, stack_module_state

import pgdfast
from pgdfast.linear import EnsembleLinearizer

B = 3
X = torch.linspace(-1, 1, 6, dtype=torch.float64)[:, None]
IMAGES = torch.randn(6, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
LABELS = torch.arange(6) % 2


def network(seed, inputs=1, outputs=2, act=nn.Tanh):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(inputs, 5), act(), nn.Linear(5, 4), act(), nn.Linear(4, outputs)).double()


FIRST = network(0)


class Block(nn.Module):
    """Attention over 4 tokens, a layer norm and a readout."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.q, self.k, self.v = (nn.Linear(4, 4, bias=False).double() for _ in range(3))
        self.norm, self.out = nn.LayerNorm(4).double(), nn.Linear(4, 2).double()

    def forward(self, x):
        attention = F.softmax(self.q(x) @ self.k(x).transpose(-1, -2) / 2, -1)
        return self.out(self.norm(x + attention @ self.v(x))).mean(-2)


def residual(net):
    return net(X) - torch.sin(X)


def weighted(net):
    return torch.linspace(1, 2, 6, dtype=torch.float64)[:, None] * (net(X) - 1)


def poisson(net):
    def u(point):
        return net(point[None])[0, 0]

    inside = torch.vmap(lambda p: torch.func.jacrev(torch.func.grad(u))(p).diagonal().sum())(X)
    return inside - torch.sin(X[:, 0])


# name: (members, loss or residual of one, does its tape separate by strides?)
CASES = {
    "residual": (network, residual, True),
    "weighted": (network, weighted, True),
    "mse": (network, lambda net: F.mse_loss(net(X), X.expand(-1, 2)), True),
    "sum of squares": (network, lambda net: (net(X) ** 2).sum() / 3, True),
    "cross-entropy": (network, lambda net: F.cross_entropy(net(X), LABELS), True),
    "two terms": (network, lambda net: F.mse_loss(net(X), X.expand(-1, 2)) + 0.3 * (net(2 * X)[:, :1] ** 2).mean(), True),
    "relu": (lambda seed: network(seed, act=nn.ReLU), residual, True),
    "one output": (lambda seed: network(seed, outputs=1), residual, True),
    "PINN": (lambda seed: network(seed, outputs=1), poisson, True),
    "attention": (Block, lambda net: net(IMAGES), True),
}


def ensemble(make, of_one, backend="auto", each=False):
    """(linearization of the stacked closure, those of the members alone)."""
    members = [make(seed) for seed in range(B)]
    values, buffers = stack_module_state(members)

    def closure():
        return torch.vmap(lambda p, b: of_one(lambda x: functional_call(members[0], (p, b), (x,))))(values, buffers)

    singles = [pgdfast.linearize(lambda m=m: of_one(m), m.parameters(), backend=backend) for m in members]
    return EnsembleLinearizer(list(values.values()), B, backend)(closure), singles


def close(a, b, tolerance=1e-12):
    return float((a - b).detach().abs().max()) <= tolerance * max(1.0, float(b.detach().abs().max()))


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("case", CASES)
def test_members_are_what_they_would_be_alone(case, backend):
    make, of_one, separates = CASES[case]
    lin, singles = ensemble(make, of_one, backend)
    assert lin.separates == (separates and backend == "native")
    assert lin.residual.shape == (B, singles[0].num_residuals) and lin.num_parameters == singles[0].num_parameters
    v, u = (torch.randn(B, n, dtype=torch.float64) for n in (lin.num_parameters, lin.num_residuals))
    pushed, pulled, J = lin.jvp(v), lin.vjp(u), lin.dense()
    for b, alone in enumerate(singles):
        member = lin.member(b)
        assert close(lin.loss[b], alone.loss) and close(member.gradient(), alone.gradient())
        # Residuals may come in another order.
        assert close(J[b].T @ J[b], alone.dense().T @ alone.dense()) and close(member.dense(), J[b])
        assert close(pushed[b], J[b] @ v[b]) and close(pulled[b], J[b].T @ u[b])
        assert close(member.gram(), J[b] @ J[b].T) and close(member.diagonal(), alone.diagonal())
        assert close(member.ggn(v[b]), alone.ggn(v[b]))


def test_rows_of_members_separate_as_those_of_one_network_do():
    for case in ("residual", "mse", "cross-entropy", "PINN"):
        lin, singles = ensemble(*CASES[case][:2], "native")
        assert (lin.member(0).row_layout() is None) == (singles[0].row_layout() is None), case
        assert lin.member(0).row_layout().max_outputs == singles[0].row_layout().max_outputs, case


@pytest.mark.parametrize("stack", [
    lambda nets: torch.stack([residual(net) for net in nets]),
    lambda nets: torch.stack([residual(net).square().sum() for net in nets]),
    lambda nets: torch.stack([torch.special.i0(net(X)) for net in nets]),
    lambda nets: (torch.stack([net(X) for net in nets]), torch.stack([net(X[:2]) for net in nets])),
], ids=["residuals", "losses", "no rule", "tuple"])
@pytest.mark.filterwarnings("ignore:pgdfast. no tape rule")
def test_members_written_out_one_by_one(stack):
    members = [network(seed) for seed in range(B)]
    values, _ = stack_module_state(members)
    nets = [lambda x, b=b: functional_call(members[0], {k: v[b] for k, v in values.items()}, (x,)) for b in range(B)]
    lin = EnsembleLinearizer(list(values.values()), B, "native")(lambda: stack(nets))
    for b, member in enumerate(members):
        def alone(member=member):
            result = stack([member])
            return tuple(part[0] for part in result) if isinstance(result, tuple) else result[0]

        single = pgdfast.linearize(alone, member.parameters())
        assert close(lin.loss[b], single.loss) and close(lin.member(b).gradient(), single.gradient())
        assert close(lin.dense()[b].T @ lin.dense()[b], single.dense().T @ single.dense())


def test_penalties_belong_to_each_member():
    members = [network(seed) for seed in range(B)]
    values, _ = stack_module_state(members)

    def closure():
        fit = torch.vmap(lambda p: F.mse_loss(functional_call(members[0], p, (X,)), X.expand(-1, 2)))(values)
        return fit + 0.1 * sum(v.square().flatten(1).sum(1) for v in values.values())

    lin = EnsembleLinearizer(list(values.values()), B)(closure)
    for b, m in enumerate(members):
        alone = pgdfast.linearize(
            lambda m=m: F.mse_loss(m(X), X.expand(-1, 2)) + 0.1 * sum(p.square().sum() for p in m.parameters()), m.parameters()
        )
        assert lin.separates and len(lin.penalties) == len(values)
        assert close(lin.member(b).gradient(), alone.gradient()) and close(lin.member(b).diagonal(), alone.diagonal())
        assert close(lin.loss[b], alone.loss)


def test_logistic_losses_outside_of_vmap():
    members = [network(seed) for seed in range(B)]
    values, _ = stack_module_state(members)
    targets = LABELS.double()

    def closure():
        z = torch.vmap(lambda p: functional_call(FIRST, p, (X,)))(values)[..., 0]
        return F.binary_cross_entropy_with_logits(z, targets.expand_as(z), reduction="none").mean(1)

    lin = EnsembleLinearizer(list(values.values()), B)(closure)
    for b, m in enumerate(members):
        alone = pgdfast.linearize(
            lambda m=m: F.binary_cross_entropy_with_logits(m(X)[:, 0], targets), m.parameters()
        )
        assert lin.separates and close(lin.member(b).gradient(), alone.gradient()) and close(lin.loss[b], alone.loss)
        assert close(lin.member(b).diagonal(), alone.diagonal())


@pytest.mark.parametrize("count", [1, 2, 5])
def test_any_number_of_members(count):
    members = [network(seed) for seed in range(count)]
    values, _ = stack_module_state(members)
    lin = EnsembleLinearizer(list(values.values()), count)(
        lambda: torch.vmap(lambda p: functional_call(members[0], p, (X,)))(values) - X
    )
    assert lin.separates
    for b, m in enumerate(members):
        alone = pgdfast.linearize(lambda m=m: m(X) - X, m.parameters())
        assert close(lin.member(b).gradient(), alone.gradient())


def test_data_of_their_own_and_members_on_another_dimension():
    members = [network(seed) for seed in range(B)]
    values, _ = stack_module_state(members)
    data = torch.randn(6, B, 1, dtype=torch.float64)

    def closure():
        out = torch.vmap(lambda p, x: functional_call(members[0], p, (x,)), in_dims=(0, 1), out_dims=1)(values, data)
        return (out - data).transpose(0, 1)

    lin = EnsembleLinearizer(list(values.values()), B)(closure)
    for b, m in enumerate(members):
        alone = pgdfast.linearize(lambda m=m, b=b: m(data[:, b]) - data[:, b], m.parameters())
        assert close(lin.member(b).gradient(), alone.gradient()) and lin.separates


def stacked():
    return stack_module_state([network(seed) for seed in range(B)])[0]


def test_a_closure_that_mixes_members_is_refused():
    values = stacked()

    def closure():
        out = torch.vmap(lambda p: functional_call(FIRST, p, (X,)))(values)
        return out - out.mean(0, keepdim=True)

    with pytest.raises(ValueError, match=f"depends on several of the {B} members.*one member's parameters alone"):
        EnsembleLinearizer(list(values.values()), B)(closure)


def test_members_with_unequally_many_residuals_are_refused():
    values = stacked()

    def closure():
        net = [lambda x, b=b: functional_call(FIRST, {k: v[b] for k, v in values.items()}, (x,)) for b in range(B)]
        return torch.stack([(net[b](X[: 2 + b]) ** 2).sum() for b in range(B)])

    with pytest.raises(ValueError, match="have 4, 6, 8 residuals; all need equally many"):
        EnsembleLinearizer(list(values.values()), B)(closure)


@pytest.mark.parametrize("result, shape", [
    (lambda out: out.square().mean(), r"\(\)"), (lambda out: out.mean(0), r"\(6, 2\)"), (lambda out: [], "nothing"),
    (lambda out: (out, out.sum()), r"\(3, 6, 2\), \(\)"),
], ids=["one loss", "no members", "empty", "a scalar among residuals"])
def test_results_of_another_shape_are_refused(result, shape):
    values = stacked()
    with pytest.raises(ValueError, match=f"ensemble of 3 returned {shape}; it must return 3 losses"):
        EnsembleLinearizer(list(values.values()), B)(
            lambda: result(torch.vmap(lambda p: functional_call(FIRST, p, (X,)))(values))
        )


def test_changed_parameters_are_noticed():
    lin, _ = ensemble(network, residual)
    with torch.no_grad():
        lin.params[0] += 1
    with pytest.raises(RuntimeError, match="the parameters have changed since"):
        lin.jvp(torch.zeros(B, lin.num_parameters, dtype=torch.float64))
