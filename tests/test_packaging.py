"""The package as it is installed: its native core, its files, its version, and the commands that README.md gives."""

import importlib.util
import re
from importlib import metadata
from pathlib import Path

import pytest
import torch

import pgdfast

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(pgdfast.__file__).resolve().parent


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


def test_every_module_of_the_source_is_installed():
    source = {path.relative_to(ROOT / "pgdfast") for path in (ROOT / "pgdfast").rglob("*.py")}
    installed = {path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py")}
    assert source == installed
    assert (PACKAGE / "py.typed").is_file()
    assert (PACKAGE / "tasks" / "report.html.jinja").is_file()


def test_the_metadata_agree_with_the_source():
    distribution = _distribution()
    assert distribution.version == pgdfast.__version__
    required = " ".join(r.replace(" ", "") for r in distribution.requires if "extra" not in r)
    assert re.search(r"torch[<>=\d.,]*>=2\.11", required) and re.search(r"torch[<>=\d.,]*<2\.16", required)
    assert "numpy" in required
    assert {"run", "test", "bench"} <= set(distribution.metadata.get_all("Provides-Extra"))
    (script,) = [e for e in distribution.entry_points if e.group == "console_scripts"]
    assert (script.name, script.value) == ("pgdfast", "pgdfast.cli:main")


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
