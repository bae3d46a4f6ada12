"""The package as it is installed: its native core, its files, its version, and the commands that README.md gives."""

import ast
import importlib.util
import re
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

import pgdfast
import pgdfast_experiments

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(pgdfast.__file__).resolve().parent
EXPERIMENTS = Path(pgdfast_experiments.__file__).resolve().parent


def _distribution():
    try:
        return metadata.distribution("pgdfast")
    except metadata.PackageNotFoundError:
        pytest.skip("pgdfast is not installed, only on the path")


def test_the_native_core_is_built_for_this_pytorch():
    assert pgdfast.backends()["native"] == "available"
    info = pgdfast.build_info()
    assert set(info) >= {"core", "torch built against", "torch", "blas", "instruction set", "threads"}
    assert info["core"] == "built"
    assert info["torch built against"] == info["torch"] == torch.__version__
    assert all(isinstance(value, str) and value for value in info.values())


def test_the_native_core_lies_beside_the_package_under_test():
    spec = importlib.util.find_spec("pgdfast._C")
    assert spec is not None and Path(spec.origin).resolve().parent == PACKAGE


def test_the_installed_package_is_under_test_not_the_source_folder():
    installed = Path(_distribution().locate_file("pgdfast/__init__.py")).resolve()
    if not installed.exists():
        pytest.skip("pgdfast is installed in editable mode")
    assert PACKAGE == installed.parent


@pytest.mark.parametrize("folder", [PACKAGE, EXPERIMENTS], ids=lambda folder: folder.name)
def test_every_module_of_the_source_is_installed(folder):
    source = {path.relative_to(ROOT / folder.name) for path in (ROOT / folder.name).rglob("*.py")}
    installed = {path.relative_to(folder) for path in folder.rglob("*.py")}
    assert source == installed and len(source) > 20


def test_files_beside_the_modules_are_installed():
    assert (PACKAGE / "py.typed").is_file()
    assert (EXPERIMENTS / "report.html.jinja").is_file()


def test_every_package_that_the_commands_import_is_declared():
    """In the extra `run`, or with the library: what `pip install '.[run]'` brings is all that `pgdfast run` needs."""
    required = _distribution().requires
    run = {re.match(r"[\w-]+", r)[0].lower() for r in required if "extra" not in r or re.search(r"extra == .run.", r)}
    imported = {module.split(".")[0] for path in EXPERIMENTS.rglob("*.py") for module in _imports(path)}
    foreign = imported - set(sys.stdlib_module_names) - {"pgdfast", "pgdfast_experiments"}
    packages = metadata.packages_distributions()   # PIL is pillow's
    assert {name.lower() for module in foreign for name in packages[module]} <= run


def _imports(path):
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module


def test_the_metadata_agree_with_the_source():
    distribution = _distribution()
    assert distribution.version == pgdfast.__version__
    required = " ".join(r.replace(" ", "") for r in distribution.requires if "extra" not in r)
    assert re.search(r"torch[<>=\d.,]*>=2\.11", required) and re.search(r"torch[<>=\d.,]*<2\.16", required)
    assert "numpy" in required
    assert {"run", "test", "bench"} <= set(distribution.metadata.get_all("Provides-Extra"))
    (script,) = [e for e in distribution.entry_points if e.group == "console_scripts"]
    assert (script.name, script.value) == ("pgdfast", "pgdfast_experiments.cli:main")


@pytest.mark.parametrize(("marker", "command"), [
    ("run", "python3 -m venv .venv && . .venv/bin/activate && pip install '.[run]' && pgdfast run regression-1d"),
    ("test", "python3 -m venv .venv && . .venv/bin/activate && pip install '.[test]' && pytest"),
])
def test_the_readme_gives_the_commands_that_ci_runs(marker, command):
    readme = ROOT / "README.md"
    if not readme.exists():
        pytest.skip("there is no README.md")
    block = rf"^<!-- {marker} -->\s*^```[^\n]*\n(.*?)^```"
    found = re.search(block, readme.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    assert found is not None, f"no fenced block after <!-- {marker} -->"
    assert found[1].strip() == command
