"""What a case is: modules with parameters, a closure as users write it, and the same loss for an oracle, over drawn data.

A case is a function of a `Maker`, which draws its numbers; made twice, in two precisions, it gives twins with the same
parameters and data. The oracle reads `outputs` and `loss` of the float64 twin, never the closure.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

CASES: dict[str, Case] = {}


@dataclass(frozen=True)
class Case:
    """make: Maker -> Problem. raises: a pattern of the message where raising is right. either: may also be right then.

    options: for LM.
    """

    kind: str
    name: str
    make: Callable
    dtype: torch.dtype = torch.float64
    raises: str | None = None
    either: bool = False
    options: dict = field(default_factory=dict)

    @property
    def label(self) -> str:
        return f"{self.kind}/{self.name}"


def case(kind: str, name: str | None = None, **expected):
    """Register the function below as a case; its own name, with dashes, unless `name` is given."""
    def register(make):
        found = Case(kind, name or make.__name__.strip("_").replace("_", "-"), make, **expected)
        if found.label in CASES:
            raise ValueError(f"two cases are called {found.label}")
        CASES[found.label] = found
        return make

    return register


@dataclass
class Problem:
    """A loss over the parameters of some modules.

    closure: what a user passes to `step`. outputs: () -> tensor or tuple z, written for the oracle. loss: z -> scalar; None
    for 1/2 ||z||^2. curvatures: functions of z that give acceptable output Hessians beside that of `loss`, as a diagonal
    or a matrix over all of z; `exact`: is the Hessian of `loss` acceptable, too? by_hand: outputs as torch.func can run
    them, where those of the oracle can't. samples: pairs (function of one sample, names of what it takes from the first
    batch), for vmap, which together give the outputs. plain: the loss as a scalar, where the closure returns another shape.
    """

    modules: list
    closure: Callable
    outputs: Callable
    loss: Callable | None = None
    curvatures: tuple = ()
    exact: bool = True
    by_hand: Callable | None = None
    samples: tuple = ()
    plain: Callable | None = None
    maker: Maker | None = field(default=None, repr=False)

    @property
    def params(self) -> list[torch.Tensor]:
        """The trained parameters, each once."""
        found = {id(p): p for module in self.modules for p in module.parameters() if p.requires_grad}
        return list(found.values())

    def next(self) -> None:
        """Draw the data of the next step."""
        self.maker.redraw()


class Values(nn.Module):
    """Parameters by name."""

    def __init__(self, **values):
        super().__init__()
        for name, value in values.items():
            setattr(self, name, nn.Parameter(value))


class Batch:
    """The data of the present step, by name."""


class Maker:
    """Draws parameters and data, as float32 numbers in whatever precision is asked for; n is the size of a batch."""

    def __init__(self, dtype: torch.dtype, n: int, seed: int = 0):
        self.dtype, self.n = dtype, n
        self.generator = torch.Generator().manual_seed(seed)
        self._batches: list[tuple[Batch, dict]] = []

    @property
    def complex(self) -> torch.dtype:
        return torch.complex128 if self.dtype == torch.float64 else torch.complex64

    def randn(self, *shape, scale: float = 1.0) -> torch.Tensor:
        return (scale * torch.randn(shape, generator=self.generator)).to(self.dtype)

    def uniform(self, *shape, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
        return (low + (high - low) * torch.rand(shape, generator=self.generator)).to(self.dtype)

    def integers(self, high: int, *shape) -> torch.Tensor:
        return torch.randint(high, shape, generator=self.generator)

    def of(self, module: nn.Module) -> nn.Module:
        """A module in this precision. PyTorch drew its parameters; the runner has seeded that."""
        return module.to(self.dtype)

    def net(self, *widths: int, activation=nn.Tanh) -> nn.Sequential:
        """Linear layers with an activation between them."""
        layers = []
        for a, b in zip(widths[:-1], widths[1:], strict=True):
            layers += [nn.Linear(a, b), activation()]
        return self.of(nn.Sequential(*layers[:-1]))

    def values(self, **shapes) -> Values:
        """Parameters by name: standard normal of a shape, or from a number or list."""
        return Values(**{
            name: 0.5 * self.randn(*shape) if isinstance(shape, tuple) else self.number(shape)
            for name, shape in shapes.items()
        })

    def number(self, value) -> torch.Tensor:
        """A constant, as float32 knows it."""
        return torch.as_tensor(value, dtype=torch.float32).to(self.dtype)

    def batch(self, **draws) -> Batch:
        """Data that `next` draws anew: a shape, for standard normal numbers, or a function without arguments."""
        found = Batch()
        self._batches.append((found, draws))
        self._fill(found, draws)
        return found

    @property
    def data(self) -> Batch:
        """The first batch."""
        return self._batches[0][0]

    def redraw(self) -> None:
        for batch, draws in self._batches:
            self._fill(batch, draws)

    def _fill(self, batch: Batch, draws: dict) -> None:
        for name, draw in draws.items():
            setattr(batch, name, self.randn(*draw) if isinstance(draw, tuple) else draw())

    def problem(self, modules, closure, outputs, loss=None, **more) -> Problem:
        modules = list(modules) if isinstance(modules, (list, tuple)) else [modules]
        return Problem(modules, closure, outputs, loss, maker=self, **more)

    def residuals(self, modules, closure, **more) -> Problem:
        """A closure that returns residuals."""
        return self.problem(modules, closure, closure, **more)

    def fit(self, modules, predict, batch=None, closure=None, **more) -> Problem:
        """The mean square of predict(x) - y over a batch with x and y, which separates by rows for vmap."""
        d = batch

        def outputs():
            error = predict(d.x) - d.y
            return error * (2 / error.numel()) ** 0.5

        def sample(x, y):
            error = predict(x[None])[0] - y
            return error * (2 / d.y.numel()) ** 0.5

        return self.problem(modules, closure or (lambda: nn.functional.mse_loss(predict(d.x), d.y)), outputs,
                            samples=((sample, ("x", "y")),), **more)
