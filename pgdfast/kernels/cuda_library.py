"""The shared library of CUDA kernels, by ctypes: no framework inside, memory and streams go over as numbers."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

PATH = Path(__file__).resolve().parent.parent / "_cuda.so"
MINIMUM = (8, 0)   # compute capability: asynchronous copies to shared memory
_PREFIX = "pgdfast_cuda_"
_POINTER, _NUMBER, _INT, _TEXT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_char_p

# Result and arguments of csrc/cuda/api.cu's functions; those with None return 0 or 1, and fail with a message.
_SIGNATURES = {
    "error": (_TEXT,),
    "load_blas": (_TEXT, _TEXT),
    "built_for": (_TEXT,),
    "set_device": (None, _INT),
    "new": (_POINTER, _INT, _POINTER, _NUMBER, _POINTER, _NUMBER),
    "free": (_POINTER, _POINTER),
    "info": (_NUMBER, _POINTER, _INT),
    "flops": (ctypes.c_double, _POINTER),
    "bind": (None, _POINTER, _NUMBER, _POINTER, _POINTER, _POINTER),
    "evaluate": (None, _INT, _INT, _NUMBER, _POINTER, _INT, _POINTER, _POINTER),
    "jvp": (None, *[_POINTER] * 6),
    "vjp": (None, *[_POINTER] * 6),
    "set_rows": (None, _POINTER, _POINTER, _NUMBER),
    "table": (_NUMBER, _POINTER, _INT, _POINTER),
    "unit_sweeps": (None, *[_POINTER] * 6),
    "gram": (None, *[_POINTER] * 7),
    "dense": (None, *[_POINTER] * 7),
    "squares": (None, _INT, _NUMBER, _NUMBER, _POINTER, _POINTER, _POINTER),
    "product": (None, _INT, *[_POINTER] * 6),
    "cg_vectors": (_NUMBER, _NUMBER, _NUMBER, _NUMBER),
    "cg_scalars": (_NUMBER, _INT),
    "cg": (None, *[_POINTER] * 5),
    "ensemble_bytes": (_NUMBER, _POINTER, _INT, _NUMBER),
    "ensemble": (None, *[_POINTER] * 5),
    "schedule": (_NUMBER, _POINTER, _INT, _POINTER, _NUMBER),
    "gram_tile": (_INT, _NUMBER, _INT, _INT),
}


class Library:
    """The functions of a library of kernels: the built one, or the emulated one of the tests."""

    def __init__(self, path):
        self._loaded = ctypes.CDLL(str(path))
        for name, (result, *arguments) in _SIGNATURES.items():
            function = getattr(self._loaded, _PREFIX + name)
            function.restype = _INT if result is None else result
            function.argtypes = arguments
            setattr(self, name, self._checked(function) if result is None else function)

    def _checked(self, function):
        def call(*arguments):
            if function(*arguments):
                raise RuntimeError(f"pgdfast's CUDA kernels: {self.error().decode()}")

        return call

    @property
    def emulated(self) -> bool:
        """Whether these kernels run on the CPU, for tests."""
        return self.built_for() == b"emulated"


_found: Library | str | None = None


def library() -> Library | str:
    """The built library, or why there is none."""
    global _found
    if _found is None:
        _found = _load()
    return _found


def _load() -> Library | str:
    if not PATH.exists():
        return "the CUDA kernels are not built; install with PGDFAST_CUDA=ON where a CUDA compiler is"
    try:
        return Library(PATH)
    except (OSError, AttributeError) as error:
        return f"the CUDA kernels do not load ({error}); rebuild them with pip install ."


_blas: dict[int, str | None] = {}


def blas_missing() -> str | None:
    """None once the kernels have PyTorch's cuBLAS, or why they have not."""
    version = int((torch.version.cuda or "0").split(".")[0])
    if version not in _blas:
        reason = library().load_blas(f"libcublas.so.{version}".encode())
        _blas[version] = reason and f"no cuBLAS of CUDA {version}: {reason.decode()}"
    return _blas[version]


def unusable() -> str | None:
    """None, or why the kernels cannot run on this machine's GPU."""
    found = library()
    if isinstance(found, str):
        return found
    if torch.version.cuda is None:
        return "PyTorch is not a CUDA build"
    if not torch.cuda.is_available():
        return "PyTorch sees no GPU"
    capability = torch.cuda.get_device_capability()
    if capability < MINIMUM:
        return (
            f"the CUDA kernels need compute capability {MINIMUM[0]}.{MINIMUM[1]}, and {torch.cuda.get_device_name()} has "
            f"{capability[0]}.{capability[1]}"
        )
    torch.cuda.init()
    torch.cuda.current_blas_handle()   # PyTorch loads cuBLAS when it is first needed
    return blas_missing()


def built() -> str:
    """For build_info: what the library was compiled for."""
    found = library()
    return "not built" if isinstance(found, str) and not PATH.exists() else found if isinstance(found, str) else (
        f"built for {found.built_for().decode()}"
    )


def pointers(tensors) -> ctypes.Array:
    """An array of pointers to tensors; None is null."""
    return (_POINTER * len(tensors))(*(None if t is None else t.data_ptr() for t in tensors))
