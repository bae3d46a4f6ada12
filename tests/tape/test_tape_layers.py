"""Modules with state, memory or statistics: agreement over steps with changing data, and which of their rows separate."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import jacobian_agreement, perturb, rand, relative
from torch import nn
from torch.nn.utils import parametrizations, rnn

from pgdfast import reference
from pgdfast.linear import Linearizer

N = 5
POINTS, SIGNALS, IMAGES = rand(N, 4), rand(N, 4, 6, seed=1), rand(N, 2, 5, 6, seed=2)


class Last(nn.Module):
    """A recurrent layer's outputs at the last step."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)[0][:, -1]


class Steps(nn.Module):
    """A recurrent cell, step by step."""

    def __init__(self, cell):
        super().__init__()
        self.cell = cell

    def forward(self, x):
        state = None
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
        return state[0] if isinstance(state, tuple) else state


class Packed(nn.Module):
    """A recurrent layer over sequences of different lengths."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(rnn.pack_padded_sequence(x, torch.tensor([4, 4, 3, 2, 1]), batch_first=True))[1][-1]


class Slope(nn.Module):
    """The derivative of a network by its inputs."""

    def __init__(self, *layers):
        super().__init__()
        self.net = nn.Sequential(*layers)

    def forward(self, x):
        x = x.clone().requires_grad_()
        return torch.autograd.grad(self.net(x).square().sum(), x, create_graph=True)[0]


def settled(model):
    """In evaluation, with running statistics of its own."""
    for number, layer in enumerate(model.modules()):
        if getattr(layer, "running_mean", None) is not None:
            layer.running_mean.copy_(rand(*layer.running_mean.shape, seed=number))
            layer.running_var.copy_(0.5 + rand(*layer.running_var.shape, seed=number).abs())
    return model.eval()


# {name: (maker, input, (rows, outputs) of the residual, None where rows do not separate)}
MODULES = {
    "convolutions": (lambda: nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(4, 4, 2, groups=2), nn.Tanh(), nn.Flatten(),
        nn.Linear(8, 2)), IMAGES, (N, 2)),
    "a fully convolutional network": (lambda: nn.Sequential(
        nn.Conv1d(4, 5, 3, stride=2), nn.Tanh(), nn.ConvTranspose1d(5, 3, 3, stride=2)), SIGNALS, (N, 15)),
    "derivatives of convolutions": (lambda: Slope(
        nn.Conv1d(4, 5, 3, padding=1), nn.Tanh(), nn.ConvTranspose1d(5, 3, 2)), SIGNALS, (N, 24)),
    "response normalization": (lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten(),
                                                     nn.Linear(48, 2)), IMAGES, (N, 2)),
    "instance normalization": (lambda: nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.InstanceNorm2d(4, affine=True)), IMAGES, (4 * N, 12)),
    "batch normalization": (lambda: nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 5), nn.BatchNorm1d(5, affine=False)), POINTS, ...),
    "batch normalization of images": (lambda: nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 2)),
        IMAGES, ...),
    "batch normalization in evaluation": (lambda: settled(nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 2))), POINTS, (N, 2)),
    "weight_norm": (lambda: nn.Sequential(
        parametrizations.weight_norm(nn.Linear(4, 6)), nn.Tanh(), parametrizations.weight_norm(nn.Linear(6, 2))), POINTS, ...),
    "weight_norm of a kernel": (lambda: parametrizations.weight_norm(nn.Conv1d(4, 3, 2), dim=2), SIGNALS, ...),
    "spectral_norm": (lambda: nn.Sequential(
        parametrizations.spectral_norm(nn.Linear(4, 6)), nn.Tanh(), nn.Linear(6, 2)).eval(), POINTS, ...),
    "LSTM": (lambda: Last(nn.LSTM(6, 3, batch_first=True)), SIGNALS, (N, 3)),
    "LSTM, deep": (lambda: Last(nn.LSTM(6, 2, num_layers=2, bidirectional=True, batch_first=True)), SIGNALS, (N, 4)),
    "LSTM with projections": (lambda: Last(nn.LSTM(6, 3, proj_size=2, batch_first=True)), SIGNALS, (N, 2)),
    "GRU": (lambda: Last(nn.GRU(6, 3, batch_first=True)), SIGNALS, (N, 3)),
    "GRU, deep": (lambda: Last(nn.GRU(6, 2, num_layers=2, bidirectional=True, batch_first=True)), SIGNALS, (N, 4)),
    "RNN": (lambda: Last(nn.RNN(6, 3, bias=False, batch_first=True)), SIGNALS, (N, 3)),
    "RNN of packed sequences": (lambda: Packed(nn.RNN(6, 3, batch_first=True)), SIGNALS, (N, 3)),
    "GRU of packed sequences": (lambda: Packed(nn.GRU(6, 3, batch_first=True)), SIGNALS, (N, 3)),
    "LSTMCell": (lambda: Steps(nn.LSTMCell(6, 3)), SIGNALS, (N, 3)),
    "GRUCell": (lambda: Steps(nn.GRUCell(6, 3)), SIGNALS, (N, 3)),
    "RNNCell": (lambda: Steps(nn.RNNCell(6, 3)), SIGNALS, (N, 3)),
}


def made(maker):
    """A module in float64 with parameters of its own."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return maker().double()


@pytest.mark.parametrize("name", MODULES)
def test_module_agrees_with_the_reference(name):
    maker, x, rows = MODULES[name]
    model = made(maker)
    params = list(model.parameters())
    linearizer = Linearizer(params)
    for visit in range(4):   # from the third on the core reads the tape
        closure = lambda: model((1 + 0.1 * visit) * x)  # noqa: B023, E731
        assert jacobian_agreement(linearizer, closure, params, seed=visit) < 1e-12
        perturb(params, seed=visit)
    assert len(linearizer._plans) == 1
    if rows is not ...:
        layout = linearizer(closure).row_layout()
        assert (layout.num_rows, layout.max_outputs) == rows


class Started(nn.Module):
    """An LSTM with learned inputs and initial states; all that it returns."""

    def __init__(self, **options):
        super().__init__()
        self.first, self.lstm = nn.Linear(4, 4), nn.LSTM(4, 3, **options)
        count = self.lstm.num_layers * (1 + self.lstm.bidirectional)
        self.states = nn.ParameterList([torch.randn(count, 1, 3) for _ in range(2)])

    def forward(self, x):
        h, c = (s.expand(-1, x.shape[0 if self.lstm.batch_first else 1], -1).contiguous() for s in self.states)
        y, (h, c) = self.lstm(torch.tanh(self.first(x)), (h, c))
        return torch.cat([y.flatten(), h.flatten(), 2 * c.flatten()])


@pytest.mark.parametrize("options", [
    {}, {"batch_first": True}, {"bias": False}, {"num_layers": 2, "bidirectional": True},
], ids=str)
def test_lstm_of_one_operation_agrees_with_its_parts(options):
    """In float32 oneDNN runs it; in float64 it is many operations, which the reference differentiates."""
    torch.manual_seed(0)
    model = Started(**options)
    wide, x = copy.deepcopy(model).double(), torch.randn(4, 3, 4)
    params, linearizer = list(model.parameters()), Linearizer(model.parameters())
    for visit in range(4):
        lin = linearizer(lambda: model((1 + 0.1 * visit) * x))  # noqa: B023
        assert lin.kernels().name != "double-backward"
        wide.load_state_dict(model.state_dict())
        ref = reference.linearize(lambda: wide(((1 + 0.1 * visit) * x).double()), list(wide.parameters()))  # noqa: B023
        assert relative(lin.residual, ref.residual) < 1e-6 and relative(lin.dense(), ref.dense()) < 2e-6
        perturb(params, seed=visit)
    assert len(linearizer._plans) == 1
    rows = Last(nn.LSTM(6, 3, batch_first=True))
    layout = Linearizer(rows.parameters())(lambda: rows(SIGNALS.float())).row_layout()
    assert (layout.num_rows, layout.max_outputs) == (N, 3)


def test_positions_and_sparsity_may_change():
    """Bags of other lengths and matrices of other patterns: other programs, or other constants of the same."""
    table = rand(6, 3, seed=3).requires_grad_()
    linearizer = Linearizer([table])
    for bags, matrix in (
        (torch.tensor([0, 1, 3]), torch.eye(6)), (torch.tensor([0, 2, 3]), torch.eye(6).roll(1, 0)),
        (torch.tensor([0, 1, 4]), torch.diag(torch.ones(5), 1) + torch.diag(torch.ones(4), 2)),
        (torch.tensor([0, 0, 2]), torch.ones(6, 6)), (torch.tensor([0, 1, 3]), torch.eye(6)),
    ) * 2:
        def closure(bags=bags, matrix=matrix):
            bag = F.embedding_bag(torch.tensor([1, 5, 2, 2, 0]), torch.sin(table), bags, mode="mean")
            return bag, matrix.double().to_sparse() @ torch.cos(table)

        assert jacobian_agreement(linearizer, closure, [table]) < 1e-12


@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
@pytest.mark.parametrize("form", ["to_sparse_csr", "to_sparse_csc", "to_sparse_coo"])
def test_other_sparse_layouts(form):
    w = rand(6, 3, seed=3).requires_grad_()
    matrix = getattr(torch.diag(torch.ones(5).double(), 1) + 2 * torch.eye(6).double(), form)()
    linearizer = Linearizer([w])
    for visit in range(3):
        closure = lambda: (matrix @ torch.sin(w), torch.addmm(w, matrix, w * w))  # noqa: E731
        if form == "to_sparse_csc":
            closure = lambda: matrix @ torch.sin(w)  # noqa: E731
        assert jacobian_agreement(linearizer, closure, [w]) < 1e-12
        perturb([w], seed=visit)


def test_sparse_embeddings_have_dense_jacobians():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(6, 3, sparse=True), nn.Linear(3, 2)).double()
    params = list(model.parameters())
    assert jacobian_agreement(Linearizer(params), lambda: model(torch.tensor([[1, 2], [4, 4]])), params) < 1e-12
