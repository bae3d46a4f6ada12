"""Builds the C++ core with CMake against the PyTorch of the environment that pip installs into."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
TORCH = "torch>=2.11,<2.16"
TORCH_MINORS = range(11, 16)


def installed_torch():
    """Return the folder of a PyTorch that fits, not imported; None where there is none.

    Under build isolation sys.path hides the target environment, but sysconfig still names its packages' folder.
    """
    target = Path(sysconfig.get_paths()["purelib"]) / "torch"
    if fits(target):
        return target
    spec = importlib.util.find_spec("torch")
    folder = Path(spec.origin).parent if spec is not None and spec.origin else None
    return folder if folder is not None and fits(folder) else None


def fits(folder):
    """Tell whether a folder holds a torch package of a version that the install requirement keeps."""
    try:
        text = (folder / "version.py").read_text(encoding="utf-8")
    except OSError:
        return False
    found = re.search(r"""^__version__\s*=\s*["']2\.(\d+)\.""", text, re.MULTILINE)
    return found is not None and int(found[1]) in TORCH_MINORS


class CMakeExtension(Extension):
    """An extension module whose sources CMakeLists.txt lists."""

    def __init__(self, name):
        super().__init__(name, sources=[])


class BuildExtension(build_ext):
    """Runs CMake, then the build tool it chose."""

    def build_extension(self, ext):
        """Build one extension into the folder where setuptools looks for it."""
        torch = installed_torch()
        if torch is None:
            raise SystemExit(f"pgdfast: no PyTorch to build against; install it first: pip install '{TORCH}'.")
        if not (torch / "include/torch/csrc/autograd/python_variable.h").is_file():
            raise SystemExit(
                f"pgdfast: the PyTorch in {torch} has no C++ headers; install one from a wheel: pip install '{TORCH}'."
            )
        if not has_compiler():
            raise SystemExit("pgdfast: no C++ compiler found; install one (g++ or clang++) or name it in CXX.")
        cmake = tool("cmake")
        if cmake is None:
            raise SystemExit("pgdfast: no cmake found; install it: pip install cmake.")

        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        # Not build_temp, which an editable install puts into a folder that goes: objects are kept between builds.
        build = ROOT / "build" / f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        config = "Debug" if self.debug else "Release"
        ninja = tool("ninja")
        configure = [cmake, "-S", ROOT, "-B", build]
        if ninja is not None:
            configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        configure += [
            f"-DPGDFAST_TORCH_DIR={torch.as_posix()}",
            f"-Dpybind11_DIR={pybind11_folder()}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output.as_posix()}",
            f"-DCMAKE_BUILD_TYPE={config}",
            f"-DPGDFAST_CUDA={cuda_option()}",
            "-DCMAKE_SKIP_RPATH=ON",  # PyTorch is imported first: its libraries are found by name, wherever they lie
        ]
        # An earlier build's cache names tools in an isolated environment that is gone; its objects are kept.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        os.environ.setdefault("CMAKE_BUILD_PARALLEL_LEVEL", str(os.cpu_count() or 1))
        for command in (configure, [cmake, "--build", build, "--config", config]):
            if subprocess.run(command).returncode != 0:
                raise SystemExit("pgdfast: the C++ core did not build; the messages of CMake above say why.")
        if getattr(self, "editable_mode", False) and (output / "_cuda.so").exists():
            shutil.copy2(output / "_cuda.so", ROOT / "pgdfast")   # setuptools knows of extension modules alone


class BuildPackage(build_py):
    """Starts from an empty folder, so that a module removed since an earlier build is not installed."""

    def run(self):
        """Copy the package's modules."""
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


def tool(name):
    """Find a program beside this Python, then on PATH; None if there is none."""
    return shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))


def cuda_option():
    """Return whether the CUDA kernels are built, from the environment: AUTO, ON or OFF."""
    option = os.environ.get("PGDFAST_CUDA", "AUTO").upper()
    if option not in ("AUTO", "ON", "OFF"):
        raise SystemExit(f"pgdfast: PGDFAST_CUDA is {option!r}; it must be AUTO, ON or OFF.")
    return option


def has_compiler():
    """Tell whether CMake can be expected to find a C++ compiler."""
    if os.name == "nt" or "CXX" in os.environ:  # CMake asks Visual Studio, and says itself what is wrong with CXX
        return True
    return any(shutil.which(name) for name in ("c++", "g++", "clang++", "icpx"))


def pybind11_folder():
    """Return the folder of pybind11's CMake files."""
    try:
        import pybind11
    except ImportError:
        raise SystemExit("pgdfast: no pybind11 found; install it: pip install pybind11.") from None
    return Path(pybind11.get_cmake_dir()).as_posix()


setup(
    ext_modules=[CMakeExtension("pgdfast._C")],
    cmdclass={"build_ext": BuildExtension, "build_py": BuildPackage},
    setup_requires=[] if installed_torch() else [TORCH],
    install_requires=[TORCH, "numpy"],
)
