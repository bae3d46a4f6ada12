"""Networks and points of the worked problems."""

import torch
from torch import nn


class Sine(nn.Module):
    """sin(x), elementwise."""

    def forward(self, x):
        """Return sin(x), in the shape of x."""
        return torch.sin(x)


def mlp(sizes, seed, activation=nn.Tanh, dtype=torch.float64):
    """Return the network of these layer sizes with a linear last layer; input (N, sizes[0]), output (N, sizes[-1]).

    Weights are Glorot normal (Glorot and Bengio 2010, eq. 12), biases U(-b, b) with b = 1 / sqrt(fan_in), as nn.Linear has
    them; from a generator of the seed's own.
    """
    generator = torch.Generator().manual_seed(seed)
    layers = []
    for fan_in, fan_out in zip(sizes[:-1], sizes[1:], strict=True):
        linear = nn.utils.skip_init(nn.Linear, fan_in, fan_out, dtype=dtype)
        nn.init.xavier_normal_(linear.weight, generator=generator)
        nn.init.uniform_(linear.bias, -fan_in**-0.5, fan_in**-0.5, generator=generator)
        layers += [linear, activation()]
    return nn.Sequential(*layers[:-1])


def sobol(count, seed, dtype=torch.float64, dimensions=2):
    """Return `count` points in the unit cube, (count, dimensions): a scrambled Sobol sequence of the seed's own."""
    engine = torch.quasirandom.SobolEngine(dimensions, scramble=True, seed=seed)
    return engine.draw(count, dtype=torch.float64).to(dtype)
