"""Makes `bench`, which is not installed, importable from the source tree; tests that import this are skipped without it."""

import importlib.util
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "bench"

if not FOLDER.is_dir():
    pytest.skip("the source tree is not here", allow_module_level=True)
if "bench" not in sys.modules:
    _spec = importlib.util.spec_from_file_location("bench", FOLDER / "__init__.py", submodule_search_locations=[str(FOLDER)])
    sys.modules["bench"] = importlib.util.module_from_spec(_spec)
