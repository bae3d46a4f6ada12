"""The types of the public names, as a checker sees them in a user's script; and the script runs."""

import os
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import pgdfast

SCRIPT = Path(__file__).with_name("typed_user.py")


def test_a_strict_checker_accepts_a_script_that_touches_every_public_name(tmp_path):
    pytest.importorskip("mypy")
    text = SCRIPT.read_text()
    missing = [name for name in pgdfast.__all__ if f"pgdfast.{name}" not in text]
    assert not missing, f"typed_user.py does not touch {', '.join(missing)}"
    root = Path(pgdfast.__file__).parent.parent
    environment = os.environ | ({} if root.name == "site-packages" else {"MYPYPATH": str(root)})
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path), str(SCRIPT)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_script_runs():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        runpy.run_path(str(SCRIPT))
