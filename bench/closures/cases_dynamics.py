"""Recurrent networks, integrators, and other things that run through time."""

import torch
import torch.nn.functional as F
from torch import nn

from .corpus import case

TIMES = 6


def recurrent(name, layer, **more):
    """A recurrent module over sequences, with a linear readout of every time step."""
    @case("recurrent", name)
    def make(g):
        module = g.of(layer())
        head = g.net(module.hidden_size * (2 if module.bidirectional else 1), 1)
        d = g.batch(x=(max(g.n // TIMES, 3), TIMES, 2), y=(max(g.n // TIMES, 3), TIMES, 1))
        return g.fit([module, head], lambda x: head(module(x)[0]), d, **more)


recurrent("rnn", lambda: nn.RNN(2, 8, batch_first=True))
recurrent("rnn-relu", lambda: nn.RNN(2, 8, batch_first=True, nonlinearity="relu"))
recurrent("lstm", lambda: nn.LSTM(2, 8, batch_first=True))
recurrent("gru", lambda: nn.GRU(2, 8, batch_first=True))
recurrent("lstm-two-layers", lambda: nn.LSTM(2, 6, 2, batch_first=True))
recurrent("gru-bidirectional", lambda: nn.GRU(2, 6, batch_first=True, bidirectional=True))
recurrent("lstm-without-bias", lambda: nn.LSTM(2, 8, batch_first=True, bias=False))


def stepped(name, make_cell, size=8, count=None, times=TIMES):
    """A cell that is called at every time step; the prediction is from the last state. make_cell: g -> (modules, step)."""
    @case("recurrent", name)
    def make(g):
        modules, step = make_cell(g)
        head, m = g.net(size, 1), count or max(g.n // 2, 6)
        d = g.batch(x=(m, times, 2), y=(m, 1))

        def predict(x):
            state = None
            for t in range(times):
                h, state = step(x[:, t], state)
            return head(h)

        return g.fit([*modules, head], predict, d)


def _cell(kind):
    def make(g):
        cell = g.of(kind(2, 8))

        def step(x, state):
            state = cell(x, state)
            return (state[0] if isinstance(state, tuple) else state), state

        return [cell], step

    return make


def _lstm_by_hand(g, size=8):
    gates, inputs = g.net(size, 4 * size), g.net(2, 4 * size)

    def step(x, state):
        h, c = state or (x.new_zeros(len(x), size), x.new_zeros(len(x), size))
        i, f, o, n = (gates(h) + inputs(x)).chunk(4, 1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(n)
        h = torch.sigmoid(o) * torch.tanh(c)
        return h, (h, c)

    return [gates, inputs], step


def _gru_by_hand(g):
    gates, new = g.net(10, 16), g.net(10, 8)

    def step(x, h):
        h = x.new_zeros(len(x), 8) if h is None else h
        r, z = torch.sigmoid(gates(torch.cat([x, h], 1))).chunk(2, 1)
        n = torch.tanh(new(torch.cat([x, r * h], 1)))
        h = (1 - z) * n + z * h
        return h, h

    return [gates, new], step


def _elman_by_hand(g):
    p = g.values(W=(8, 8), U=(8, 2), b=(8,))

    def step(x, h):
        h = torch.tanh(x @ p.U.T + (0 if h is None else h @ p.W.T) + p.b)
        return h, h

    return [p], step


stepped("rnn-cell", _cell(nn.RNNCell))
stepped("lstm-cell", _cell(nn.LSTMCell))
stepped("gru-cell", _cell(nn.GRUCell))
stepped("lstm-by-hand", _lstm_by_hand)
stepped("lstm-48x12-by-hand", lambda g: _lstm_by_hand(g, 16), 16, 48, 12)
stepped("gru-by-hand", _gru_by_hand)
stepped("elman-by-hand", _elman_by_hand)


@case("recurrent", "lstm-48x12")
def _lstm(g):
    """nn.LSTM over 48 sequences of 12 steps, read at the last."""
    module, head = g.of(nn.LSTM(2, 16, batch_first=True)), g.net(16, 1)
    return g.fit([module, head], lambda x: head(module(x)[0][..., -1, :]), g.batch(x=(48, 12, 2), y=(48, 1)))


@case("recurrent")
def linear_state_space(g):
    p = g.values(a=(6,), B=(6, 2), C=(1, 6))
    m = max(g.n // TIMES, 4)
    d = g.batch(x=(m, TIMES, 2), y=(m, TIMES, 1))

    def outputs():
        h, found = torch.zeros(m, 6, dtype=g.dtype), []
        for t in range(TIMES):
            h = torch.sigmoid(p.a) * h + d.x[:, t] @ p.B.T
            found.append(h @ p.C.T)
        return torch.stack(found, 1) - d.y

    return g.residuals(p, outputs)


@case("recurrent")
def states_written_in_place(g):
    cell, head = g.of(nn.RNNCell(2, 6)), g.net(6, 1)
    m = max(g.n // TIMES, 4)
    d = g.batch(x=(m, TIMES, 2), y=(m, TIMES, 1))

    def outputs():
        h, found = None, torch.zeros(m, TIMES, 6, dtype=g.dtype)
        for t in range(TIMES):
            h = cell(d.x[:, t], h)
            found[:, t] = h
        return head(found) - d.y

    return g.residuals([cell, head], outputs)


@case("recurrent")
def deep_equilibrium_unrolled(g):
    p, head = g.values(W=(8, 8), U=(8, 3)), g.net(8, 1)
    d = g.batch(x=(g.n, 3), y=(g.n, 1))

    def predict(x):
        z = torch.zeros(*x.shape[:-1], 8, dtype=x.dtype)
        for _ in range(6):
            z = torch.tanh(0.5 * z @ p.W.T + x @ p.U.T)
        return head(z)

    return g.fit([p, head], predict, d)


# Integrators.

def integrator(name, step, count=5):
    """A neural ODE: step(f, z, dt) -> z, `count` times."""
    @case("dynamics", name)
    def make(g):
        net, m = g.net(2, 12, 2), max(g.n // 4, 8)
        d = g.batch(x=(m, 2), y=(m, 2))

        def predict(z):
            for _ in range(count):
                z = step(net, z, 0.1)
            return z

        return g.fit(net, predict, d)


def _rk4(f, z, dt):
    a = f(z)
    b = f(z + dt / 2 * a)
    c = f(z + dt / 2 * b)
    return z + dt / 6 * (a + 2 * b + 2 * c + f(z + dt * c))


def _midpoint(f, z, dt):
    return z + dt * f(z + dt / 2 * f(z))


integrator("euler", lambda f, z, dt: z + dt * f(z))
integrator("midpoint", _midpoint)
integrator("runge-kutta-4", _rk4, 3)


@case("dynamics")
def trajectory_at_all_times(g):
    net, m = g.net(2, 12, 2), max(g.n // 12, 4)
    d = g.batch(x=(m, 2), y=(m, TIMES, 2))

    def outputs():
        z, found = d.x, []
        for _ in range(TIMES):
            z = _rk4(net, z, 0.1)
            found.append(z)
        return torch.stack(found, 1) - d.y

    return g.residuals(net, outputs)


@case("dynamics")
def lotka_volterra_parameters(g):
    p = g.values(a=1.0, b=0.4, c=0.4, d=0.9)
    f = lambda z: torch.stack([p.a * z[..., 0] - p.b * z[..., 0] * z[..., 1],   # noqa: E731
                               p.c * z[..., 0] * z[..., 1] - p.d * z[..., 1]], -1)
    d = g.batch(x=lambda: g.uniform(10, 2, low=0.5, high=1.5), y=(8, 10, 2))

    def outputs():
        z, found = d.x, []
        for _ in range(8):
            z = _rk4(f, z, 0.1)
            found.append(z)
        return torch.stack(found) - d.y

    return g.residuals(p, outputs)


@case("dynamics")
def unknown_initial_state(g):
    net, p = g.net(2, 12, 2), g.values(start=(2,))
    d = g.batch(y=(12, 2))

    def outputs():
        z, found = p.start, []
        for _ in range(12):
            z = z + 0.1 * net(z)
            found.append(z)
        return torch.stack(found) - d.y

    return g.residuals([net, p], outputs)


@case("dynamics")
def diffusion_by_finite_differences(g):
    p, m = g.values(logk=(1,)), 16
    d = g.batch(x=(m,), y=(5, m))

    def outputs():
        u, found = d.x, []
        for _ in range(5):
            u = u + 0.2 * torch.exp(p.logk) * (u.roll(1) - 2 * u + u.roll(-1))
            found.append(u)
        return torch.stack(found) - d.y

    return g.residuals(p, outputs)


@case("dynamics")
def explicit_scheme_with_slices(g):
    net, m = g.net(1, 8, 1), 14
    d = g.batch(x=(m,), y=(4, m))

    def outputs():
        u, found = d.x, []
        for _ in range(4):
            flux = net((u[1:] - u[:-1])[:, None])[:, 0]
            u = u + 0.1 * F.pad(flux, (0, 1)) - 0.1 * F.pad(flux, (1, 0))
            found.append(u)
        return torch.stack(found) - d.y

    return g.residuals(net, outputs)


@case("dynamics")
def lagrangian(g):
    net, m = g.net(2, 10, 1), max(g.n // 4, 8)
    d = g.batch(x=(m, 2), y=(m, 1))

    def outputs():
        x = d.x.clone().requires_grad_()
        L = net(x)
        first = torch.autograd.grad(L.sum(), x, create_graph=True)[0]
        second = torch.autograd.grad(first[:, 1].sum(), x, create_graph=True)[0]
        return (first[:, :1] - second[:, :1] * x[:, 1:]) / (1 + second[:, 1:] ** 2) - d.y

    return g.residuals(net, outputs)


@case("dynamics")
def shooting_with_a_tuple(g):
    net, p = g.net(2, 12, 2), g.values(states=(4, 2))
    d = g.batch(y=(4, 2))

    def outputs():
        ends = p.states
        for _ in range(3):
            ends = _midpoint(net, ends, 0.2)
        return 3 * (ends[:-1] - p.states[1:]), p.states - d.y

    return g.residuals([net, p], outputs)
