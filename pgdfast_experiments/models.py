"""Networks that several tasks train."""

import torch
from torch import nn


def tanh_mlp(inputs, width, hidden_layers, outputs, seed, dtype=torch.float64):
    """Return the tanh network `inputs - width - ... - width - outputs` with a linear last layer.

    Weights are Kaiming uniform, U(-b, b) with b = sqrt(6 / fan_in) (the variance of He et al. 2015,
    eq. 10; the default gain of `torch.nn.init.kaiming_uniform_`); biases are zero. Same seed, same
    weights: the draw uses a generator of its own and leaves PyTorch's global one alone.

    Input (N, inputs), output (N, outputs).
    """
    generator = torch.Generator().manual_seed(seed)
    sizes = [inputs] + [width] * hidden_layers + [outputs]
    layers = []
    for fan_in, fan_out in zip(sizes[:-1], sizes[1:], strict=True):
        # skip_init: nn.Linear would first draw its own weights from the global generator.
        linear = nn.utils.skip_init(nn.Linear, fan_in, fan_out, dtype=dtype)
        nn.init.kaiming_uniform_(linear.weight, generator=generator)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def relu_mlp(sizes, alpha, seed, dtype=torch.float32):
    """Return a ReLU network of these layer sizes with a linear last layer.

    Weights are alpha times Glorot uniform (Glorot and Bengio 2010, eq. 16), biases zero, from a generator of the
    seed's own. Input (N, sizes[0]), output (N, sizes[-1]).
    """
    generator = torch.Generator().manual_seed(seed)
    layers = []
    for fan_in, fan_out in zip(sizes[:-1], sizes[1:], strict=True):
        linear = nn.utils.skip_init(nn.Linear, fan_in, fan_out, dtype=dtype)
        nn.init.xavier_uniform_(linear.weight, generator=generator)
        nn.init.zeros_(linear.bias)
        with torch.no_grad():
            linear.weight.mul_(alpha)
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])
