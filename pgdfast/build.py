"""What was built, and against what."""

from __future__ import annotations

import torch

from .kernels import cuda_library, native


def check_build() -> None:
    """Raise ImportError if the C++ core was built against another PyTorch than the one that runs."""
    core = native._C
    if core is not None and core.torch_version != torch.__version__:
        raise ImportError(
            f"pgdfast was built against PyTorch {core.torch_version} but PyTorch {torch.__version__} is installed; "
            f"{native.REBUILD}."
        )


def build_info() -> dict[str, str]:
    """The parts of this build: PyTorch built against and running, BLAS, instruction set, threads, CUDA kernels."""
    core = native._C
    if core is None:
        return {"core": native.available() or "", "torch": torch.__version__, "cuda": cuda_library.built()}
    return {
        "core": "built",
        "torch built against": core.torch_version,
        "torch": torch.__version__,
        "blas": core.blas(),
        "instruction set": core.instruction_set(),
        "threads": str(torch.get_num_threads()),
        "cuda": cuda_library.built(),
    }
