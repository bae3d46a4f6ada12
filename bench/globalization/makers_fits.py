"""Curve fits and a stiff ODE fit: few parameters, data that do not depend on the seed, starts that do (10 % around one point).

Each function takes the seed and returns (parameters, closure, None).
"""

import torch

DOUBLE = torch.float64


def _started(seed, start, spread=0.1):
    """Parameters at `start` times 1 + N(0, spread^2); seed 0 starts at `start` itself."""
    start = torch.tensor(start, dtype=DOUBLE)
    if seed:
        start = start * (1 + spread * torch.randn(start.shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE))
    return [torch.nn.Parameter(start)]


def _noise(count, size):
    return size * torch.randn(count, generator=torch.Generator().manual_seed(7), dtype=DOUBLE)


def enzyme(seed):
    """Kowalik and Osborne's enzyme reaction: NIST StRD MGH09, 11 observations, its first start, far away."""
    x = torch.tensor([4, 2, 1, 0.5, 0.25, 0.167, 0.125, 0.1, 0.0833, 0.0714, 0.0625], dtype=DOUBLE)
    y = torch.tensor([0.1957, 0.1947, 0.1735, 0.16, 0.0844, 0.0627, 0.0456, 0.0342, 0.0323, 0.0235, 0.0246], dtype=DOUBLE)
    params = _started(seed, [25.0, 39.0, 41.5, 39.0])

    def closure():
        a, b, c, d = params[0]
        return a * (x * x + b * x) / (x * x + c * x + d) - y

    return params, closure, None


def _cubic_ratio(b, x):
    return (b[0] + b[1] * x + b[2] * x**2 + b[3] * x**3) / (1 + b[4] * x + b[5] * x**2 + b[6] * x**3)


def expansion(seed):
    """A ratio of cubics as in NIST StRD Hahn1 (thermal expansion of copper): 7 parameters between 1e-7 and 1, 236 points."""
    x = torch.linspace(14, 850, 236, dtype=DOUBLE)
    true = [1.078, -0.1227, 4.086e-3, -1.426e-6, -5.761e-3, 2.405e-4, -1.231e-7]
    y = _cubic_ratio(true, x) + _noise(236, 0.08)
    params = _started(seed, [10.0, -1.0, 0.05, -1e-5, -0.05, 1e-3, -1e-6])
    return params, lambda: _cubic_ratio(params[0], x) - y, None


def exponentials(seed):
    """Three decays as in NIST StRD Lanczos: 6 parameters, 24 points, noise 1e-5: nearly degenerate."""
    x = torch.arange(24, dtype=DOUBLE) * 0.05
    true = (0.0951, 1.0, 0.8607, 3.0, 1.5576, 5.0)

    def curve(b):
        return b[0] * torch.exp(-b[1] * x) + b[2] * torch.exp(-b[3] * x) + b[4] * torch.exp(-b[5] * x)

    y = curve(true) + _noise(24, 1e-5)
    params = _started(seed, [1.2, 0.3, 5.6, 5.5, 6.5, 7.6])
    return params, lambda: curve(params[0]) - y, None


def peaks(seed):
    """Two peaks on a decaying ground as in NIST StRD Gauss1: 8 parameters, 250 points."""
    x = torch.arange(1, 251, dtype=DOUBLE)
    true = (98.8, 0.0105, 100.5, 67.5, 23.1, 72.0, 179.0, 18.4)

    def curve(b):
        return (b[0] * torch.exp(-b[1] * x) + b[2] * torch.exp(-((x - b[3]) / b[4]) ** 2)
                + b[5] * torch.exp(-((x - b[6]) / b[7]) ** 2))

    y = curve(true) + _noise(250, 2.5)
    params = _started(seed, [60.0, 0.02, 60.0, 60.0, 30.0, 40.0, 170.0, 30.0], 0.02)
    return params, lambda: curve(params[0]) - y, None


TIMES = torch.logspace(-4, 4, 13, dtype=DOUBLE)
NEWTON = 3   # iterations for each implicit step


def _kinetics(theta, inverse_temperature):
    """Robertson's y1 -> y2, 2 y2 -> y2 + y3, y2 + y3 -> y1 + y3, implicit Euler: (T, B, 3), y2 times 1e4.

    theta: ln k and activation energy of each reaction, (6,). y1 = 1 - y2 - y3 leaves two equations, and Newton's 2 x 2 systems
    are solved by Cramer's rule.
    """
    k1, k2, k3 = torch.exp(theta[:3, None] - theta[3:, None] * inverse_temperature)
    a = b = torch.zeros_like(inverse_temperature)   # y2, y3
    last, found = 0.0, []
    for t in TIMES.tolist():
        h, a0, b0 = t - last, a, b
        for _ in range(NEWTON):
            square, cross = k2 * a * a, k3 * a * b
            f = a - a0 - h * (k1 * (1 - a - b) - square - cross)
            g = b - b0 - h * square
            f_a, f_b = 1 + h * (k1 + 2 * k2 * a + k3 * b), h * (k1 + k3 * a)
            g_a = -2 * h * k2 * a
            det = f_a - f_b * g_a
            a, b = a - (f - f_b * g) / det, b - (f_a * g - g_a * f) / det
        last = t
        found.append(torch.stack([1 - a - b, 1e4 * a, b], dim=-1))
    return torch.stack(found)


def robertson(seed):
    """Rates and activation energies of Robertson's kinetics (0.04, 3e7, 1e4) from three temperatures, noise 1e-3."""
    inverse_temperature = torch.tensor([-0.5, 0.0, 0.5], dtype=DOUBLE)
    true = torch.cat([torch.tensor([0.04, 3e7, 1e4], dtype=DOUBLE).log(), torch.tensor([1.0, 2.0, 1.5], dtype=DOUBLE)])
    data = _kinetics(true, inverse_temperature)
    data = data + _noise(data.numel(), 1e-3).reshape(data.shape)
    params = _started(seed, [0.0, 12.0, 12.0, 0.0, 0.0, 0.0])
    return params, lambda: _kinetics(params[0], inverse_temperature) - data, None
