"""JAX by hand, compiled, and optimistix: the same networks, data and weights as the other contenders.

They run in this process beside PyTorch. XLA keeps threads of its own, as many as there are cores, whatever
torch.set_num_threads says; their rows stand under "own" threads. Compilation is not timed.
"""

import numpy as np
import torch

from .interleave import OWN
from .peers import Contender, need
from .products import Product

ITERATIONS = 50   # of the CG whose length over their number is JAX's J^T J v


class _Network:
    """theta -> residuals (M,) and J (M, P) of a problem, as jax functions of the flat parameter vector."""

    def __init__(self, problem):
        self.jax = jax = need("jax", "jax")
        self.np = jax.numpy
        self.problem = problem
        model = problem.model()
        self._shapes = [tuple(p.shape) for p in model.parameters()]
        self.start = _array(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
        self._data = [_array(part) for part in problem.data()]

    def _split(self, theta):
        sizes = np.cumsum([int(np.prod(shape)) for shape in self._shapes])[:-1]
        return [part.reshape(shape) for part, shape in zip(self.np.split(theta, sizes), self._shapes, strict=True)]

    def output(self, theta, x):
        """The network at one input: (d,) -> (O,), or () for E."""
        parts = self._split(theta)
        if self.problem.name == "E":
            h = parts[0] @ x
            return (h + 0.125 * h**2).mean()
        act = (lambda h: self.np.maximum(h, 0)) if self.problem.name == "G" else self.np.tanh
        for W, b in zip(parts[:-2:2], parts[1:-2:2], strict=True):
            x = act(W @ x + b)
        return parts[-2] @ x + parts[-1]

    def _blocks(self):
        """(inputs, function of (theta, x), shift) of each kind of residual."""
        if self.problem.name != "C":
            x, y = self._data
            return [(x, self.output, -y)]
        interior, boundary, f = self._data

        def value(theta, x):
            return self.output(theta, x)[0]

        def laplacian(theta, x):
            return self.np.trace(self.jax.hessian(value, argnums=1)(theta, x))

        return [(interior, laplacian, f[:, 0]), (boundary, value, 0.0)]

    def residuals(self, theta):
        parts = [(self.jax.vmap(u, (None, 0))(theta, x) + shift).reshape(-1) for x, u, shift in self._blocks()]
        return self.problem.scale * self.np.concatenate(parts)

    def jacobian(self, theta):
        J = [self.jax.vmap(self.jax.jacrev(u), (None, 0))(theta, x).reshape(-1, theta.size) for x, u, _ in self._blocks()]
        return self.problem.scale * self.np.concatenate(J)


def _array(tensor):
    import jax

    return jax.device_put(tensor.numpy().copy())


class _JaxContender(Contender):
    threads = (OWN,)

    def __init__(self, problem, lr=1e-2):
        self.problem, self.lr = problem, lr
        self.network = _Network(problem)
        self._theta = self.network.start

    def reset(self):
        self._theta = self.network.start

    def step(self):
        self._theta = self._compiled(self._theta).block_until_ready()

    def taken(self):
        self.reset()
        self.step()
        return torch.from_numpy(np.asarray(self.network.start, dtype=np.float64) - np.asarray(self._theta, dtype=np.float64))


class Jax(_JaxContender):
    """jit of one dual Cholesky step: per-sample Jacobians by vmap."""

    name, problems = "JAX jit step", "ABCE"

    def __init__(self, problem, lr=1e-2):
        super().__init__(problem, lr)
        net, jnp = self.network, self.network.np
        scipy = need("jax.scipy.linalg", "jax")

        def step(theta):
            J, r = net.jacobian(theta), net.residuals(theta)
            factor = scipy.cho_factor(J @ J.T + problem.damping * jnp.eye(len(r)), lower=True)
            return theta - lr * (J.T @ scipy.cho_solve(factor, r))

        self._compiled = net.jax.jit(step).lower(self._theta).compile()


class Optimistix(_JaxContender):
    """optimistix.LevenbergMarquardt's first step, by lineax's QR of [J; sqrt(mu) I]; the whole step."""

    name, problems = "optimistix LM step (QR)", "A"

    def __init__(self, problem, lr=1.0):
        optimistix, lineax = need("optimistix", "optimistix"), need("lineax", "lineax")
        super().__init__(problem, lr)
        solver = optimistix.LevenbergMarquardt(rtol=1e-9, atol=1e-9, linear_solver=lineax.QR())
        net, start = self.network, self._theta

        def scaled(theta, _):
            return net.residuals(theta) / problem.damping**0.5, None   # its first damping is 1

        shape = net.jax.eval_shape(lambda theta: scaled(theta, None)[0], start)

        def step(theta):
            state = solver.init(scaled, theta, None, {}, shape, None, frozenset())
            return solver.step(scaled, theta, None, {}, state, frozenset())[1].y_eval

        self._compiled = net.jax.jit(step).lower(start).compile()


class JaxProduct(Product):
    """J^T J v inside a compiled CG of 50 iterations: a call is one iteration's share."""

    name, problems, threads, share = "JAX J^T J v", "ABG", (OWN,), ITERATIONS

    def __init__(self, problem, v):
        super().__init__(problem, v)
        self._network = net = _Network(problem)
        jax, jnp = net.jax, net.np

        def product(theta, v):
            _, forward = jax.linearize(net.residuals, theta)
            return jax.linear_transpose(forward, theta)(forward(v))[0]

        def cg(theta, b):
            _, forward = jax.linearize(net.residuals, theta)
            backward = jax.linear_transpose(forward, theta)

            def iteration(_, state):
                x, r, p, rr = state
                Ap = backward(forward(p))[0] + problem.damping * p
                alpha = rr / (p @ Ap)
                x, r = x + alpha * p, r - alpha * Ap
                following = r @ r
                return x, r, r + following / rr * p, following

            return jax.lax.fori_loop(0, ITERATIONS, iteration, (jnp.zeros_like(b), b, b, b @ b))[0]

        self._v = _array(v)
        self._product = jax.jit(product)
        self._cg = jax.jit(cg).lower(net.start, self._v).compile()

    def __call__(self):
        self._cg(self._network.start, self._v).block_until_ready()

    def value(self):
        """One product, to be checked."""
        return torch.from_numpy(np.array(self._product(self._network.start, self._v)))
