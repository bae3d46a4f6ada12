"""The rooms of the house and the arrows between them, read from the source text."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import pgdfast

ROOT = Path(__file__).resolve().parent.parent
PACKAGE, CORE = ROOT / "pgdfast", ROOT / "csrc"
MODULES = sorted(PACKAGE.rglob("*.py"))
EXPERIMENTS = sorted((ROOT / "pgdfast_experiments").rglob("*.py"))
SOURCES = MODULES + EXPERIMENTS + sorted(
    p for p in CORE.rglob("*") if p.suffix in (".cpp", ".h", ".inl", ".cu", ".cuh")
)

# Each room may import itself and what stands below it.
BELOW = {
    "kernels": {"_C"},
    "tape": {"kernels"},
    "linear": {"tape", "kernels"},
    "parts": {"linear", "tape", "kernels"},
    "solve": {"linear", "tape", "kernels"},
    "step": {"report", "solve", "parts", "linear", "tape", "kernels"},
    "networks": {"step", "solve", "linear"},
    "reference": set(),
    "reference_backend": {"networks", "reference", "step", "solve", "linear"},
    "pde": {"kernels"},
    "report": set(),
    "build": {"kernels", "_C"},
    "backend": {"reference_backend", "networks", "parts", "solve", "linear", "kernels"},
    "lm": {"backend", "step", "report", "solve", "parts", "linear"},
    "ensembles": set(),
    "spectra": {"backend", "parts", "linear", "kernels"},
    "switches": {"spectra"},
    "hybrid": {"lm", "report", "switches"},
    "captured": {"lm", "step", "report", "solve", "linear"},
    "__main__": set(),
    "__init__": {
        "captured",
        "ensembles",
        "hybrid",
        "switches",
        "spectra",
        "lm",
        "backend",
        "report",
        "build",
        "pde",
        "reference",
        "solve",
        "step",
        "parts",
        "linear",
        "tape",
        "kernels",
    },
}


def name_of(path):
    return str(path.relative_to(ROOT))


def room_of(path):
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(path):
    """(module as absolute dotted name, imported names) of every import statement in a file."""
    package = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            yield (
                ".".join([*base, *([node.module] if node.module else [])]),
                [alias.name for alias in node.names],
            )


def rooms_imported(path):
    """The rooms of the package that a file imports; "pgdfast" for the public names."""
    for module, names in imports(path):
        parts = module.split(".")
        if parts[0] != "pgdfast":
            continue
        if len(parts) > 1:
            yield parts[1]
        else:
            yield from (
                name if name in BELOW or name == "_C" else "pgdfast"
                for name in names or ["pgdfast"]
            )


@pytest.mark.skipif(not CORE.exists(), reason="the source tree is not here")
def test_there_is_something_to_read():
    assert len(MODULES) > 30 and len(EXPERIMENTS) > 20 and len(SOURCES) > len(MODULES) + 8
    assert {room_of(path) for path in MODULES} <= set(BELOW), "a new room: say what stands below it"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_arrows_go_down_only(path):
    room = room_of(path)
    above = set(rooms_imported(path)) - BELOW[room] - {room}
    assert not above, f"{name_of(path)} imports {', '.join(sorted(above))}"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_the_reference_is_met_at_the_door_only(path):
    if "reference" in rooms_imported(path):
        assert room_of(path) in ("reference", "reference_backend", "__init__")


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_the_library_knows_nothing_of_the_experiments(path):
    foreign = [module for module, _ in imports(path) if module.startswith("pgdfast_experiments")]
    assert foreign == (["pgdfast_experiments.cli"] if room_of(path) == "__main__" else [])


@pytest.mark.parametrize("path", EXPERIMENTS, ids=name_of)
def test_experiments_use_the_public_names_alone(path):
    for module, names in imports(path):
        if module.split(".")[0] == "pgdfast":
            assert module == "pgdfast" and set(names) <= {*pgdfast.__all__, "__version__"}, (
                f"{name_of(path)} imports {names or ''} from {module}"
            )
    for node in ast.walk(ast.parse(path.read_text())):
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id == "pgdfast"
        ):
            assert node.attr in {*pgdfast.__all__, "__version__"}, (
                f"{name_of(path)} uses pgdfast.{node.attr}"
            )


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_no_file_is_long(path):
    assert len(path.read_text().splitlines()) <= 500


@pytest.mark.parametrize("path", [p for p in SOURCES if p.suffix != ".py"], ids=name_of)
def test_kernels_see_no_framework(path):
    included = [
        line.split()[1].strip('<>"')
        for line in path.read_text().splitlines()
        if line.startswith("#include")
    ]
    assert "torch/extension.h" not in included
    if path.parent.name in ("plan", "cpu", "cuda"):
        foreign = [
            name
            for name in included
            if name.split("/")[0].lower() in ("torch", "aten", "c10", "pybind11")
            or name == "Python.h"
        ]
        assert not foreign, f"{name_of(path)} includes {foreign}"
    if not path.name.startswith("bindings"):
        assert not any(name.startswith("pybind11") for name in included)


def python(code):
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT / "tests",  # not the source folder, whose package has no core
        timeout=120,
    )


def test_import_is_silent_and_light():
    done = python(
        "import sys, torch; before = set(sys.modules); import pgdfast; "
        "print(sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert not {"matplotlib", "rich", "pandas", "scipy", "triton", "pgdfast_experiments"} & set(
        ast.literal_eval(done.stdout)
    )


def test_public_names_exist_and_are_documented():
    for name in pgdfast.__all__:
        assert getattr(pgdfast, name).__doc__, name
    assert pgdfast.build_info()["torch"] and set(pgdfast.backends()) >= {
        "native",
        "torch",
        "reference",
    }
