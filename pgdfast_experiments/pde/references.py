"""Reference solutions of the worked problems, by formula and by quadrature."""

import math

import numpy as np
import torch

HERMITE = 200
"""Nodes of the quadrature of `cole_hopf`: at viscosity 0.01 / pi, 100 agree with 200 to 1e-15."""


def heat_modes(x, t, diffusivity, modes):
    """Return u(x, t) = sum_k c_k sin(k pi x) exp(-D (k pi)^2 t) in the shape of x; modes: pairs (k, c_k).

    It solves u_t = D u_xx on [0, 1] with u = 0 at both ends.
    """
    return sum(c * torch.sin(k * math.pi * x) * torch.exp(-diffusivity * (k * math.pi) ** 2 * t) for k, c in modes)


def cole_hopf(x, t, viscosity, nodes=HERMITE):
    """Return the solution of u_t + u u_x = nu u_xx with u(x, 0) = -sin(pi x), of period 2, in the shape of x.

    By the Cole-Hopf transform, with F(y) = exp(-cos(pi y) / (2 pi nu)) and G the heat kernel (Basdevant et al.,
    Computers and Fluids 14 (1986), eq. 2.5),

        u(x, t) = - int sin(pi (x - y)) F(x - y) G(y, t) dy / int F(x - y) G(y, t) dy,

    both by Gauss-Hermite quadrature in y = 2 sqrt(nu t) z. Cost: `nodes` exponentials a point.
    """
    z, weight = (torch.from_numpy(part) for part in np.polynomial.hermite.hermgauss(nodes))
    y = x.double().reshape(-1, 1) - 2 * torch.sqrt(viscosity * t.double().reshape(-1, 1)) * z
    exponent = -torch.cos(math.pi * y) / (2 * math.pi * viscosity)
    density = weight * torch.exp(exponent - exponent.amax(1, keepdim=True))   # the common factor cancels
    u = -(density * torch.sin(math.pi * y)).sum(1) / density.sum(1)
    return u.reshape(x.shape).to(x.dtype)
