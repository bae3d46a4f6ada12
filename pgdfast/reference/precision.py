"""Runs a float32 closure in float64, and leaves the model as it was."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

WIDE = {
    torch.float32: torch.float64, torch.float16: torch.float64, torch.bfloat16: torch.float64,
    torch.complex64: torch.complex128, torch.complex32: torch.complex128,
}
_CASTS_DOWN = {
    torch.Tensor.float: torch.Tensor.double, torch.Tensor.half: torch.Tensor.double,
    torch.Tensor.bfloat16: torch.Tensor.double, torch.Tensor.cfloat: torch.Tensor.cdouble,
}


@contextmanager
def float64_parameters(params: Sequence[Tensor]) -> Iterator[None]:
    """Inside the block every parameter holds float64 or complex128 data and no gradient.

    Afterwards each has its own data tensor (the same storage, so the same bits) and its own
    ``.grad`` object again, also when the block raised.
    """
    kept = [(p, p.data, p.grad) for p in params]
    try:
        for p in params:
            p.grad = None  # a float32 gradient may not hang on float64 data
            p.data = p.data.to(WIDE.get(p.dtype, p.dtype))
        yield
    finally:
        for p, data, grad in kept:
            p.grad = None
            p.data = data
            p.grad = grad


class Float64(TorchFunctionMode):
    """Inside this mode every torch function takes and returns float64 in place of float32 or half, and complex128 of complex64.

    Buffers, inputs and targets are promoted on their first use and the same copy serves every later
    use, so that ``torch.autograd.grad(u, x)`` finds the ``x`` that ``u`` was computed from. A cast
    down (``x.float()``, ``x.to(torch.float16)``) becomes a cast to float64. A factory such as
    ``torch.rand(3)`` draws the numbers that it would draw without the mode, and these are promoted.
    What the closure writes in place into a float32 tensor lands in the copy, not in the tensor.
    """

    def __init__(self):
        super().__init__()
        self._copies: dict[int, tuple[Tensor, Tensor]] = {}  # id -> (original kept alive, float64)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Promote the arguments, call ``func``, promote the result."""
        kwargs = kwargs or {}
        creates = not any(isinstance(a, Tensor) for a in args)
        args = self._promote(args, keep_dtypes=creates)
        kwargs = self._promote(kwargs, keep_dtypes=creates)
        func = _CASTS_DOWN.get(func, func)
        return self._promote(func(*args, **kwargs), keep_dtypes=True)

    def _promote(self, value, keep_dtypes: bool):
        if isinstance(value, Tensor):
            return self._copy(value) if value.dtype in WIDE else value
        if isinstance(value, torch.dtype):
            return value if keep_dtypes else WIDE.get(value, value)
        if type(value) in (tuple, list):
            return type(value)(self._promote(v, keep_dtypes) for v in value)
        if type(value) is dict:
            return {k: self._promote(v, keep_dtypes) for k, v in value.items()}
        return value

    def _copy(self, tensor: Tensor) -> Tensor:
        if id(tensor) not in self._copies:
            _refuse_nested_transform(tensor)
            with torch.enable_grad():  # a first use under no_grad must not cut later ones off
                self._copies[id(tensor)] = (tensor, tensor.to(WIDE[tensor.dtype]))
        return self._copies[id(tensor)][1]


def _refuse_nested_transform(tensor: Tensor) -> None:
    """Raise ValueError for a float32 tensor that two torch.func transforms differentiate.

    Each transform wraps the tensor without calling a torch function, so the copy at the inner level
    would not depend on the copy at the outer level, and the derivative would be 0.
    """
    inner, levels = tensor, 0
    while torch._C._functorch.is_functorch_wrapped_tensor(inner):
        levels += torch._C._functorch.is_gradtrackingtensor(inner)
        inner = torch._C._functorch.get_unwrapped(inner)
    if levels > 1:
        raise ValueError(
            f"pgdfast.reference: the closure hands a {tensor.dtype} tensor to nested torch.func "
            "transforms, which cannot be followed in float64; hand them x.clone() instead, "
            "taken inside the closure"
        )
