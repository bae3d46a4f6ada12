"""The guide docs/pinns.md: its Python runs from top to bottom, and solves what it says it solves."""

import re
import warnings
from pathlib import Path

import pytest
import torch

GUIDE = Path(__file__).resolve().parent.parent / "docs" / "pinns.md"


@pytest.mark.skipif(not GUIDE.exists(), reason="the source tree is not here")
def test_the_code_of_the_guide_runs_and_lm_solves_what_adam_does_not(capsys):
    blocks = re.findall(r"^```python\n(.*?)^```", GUIDE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 7
    names, dtype = {"__name__": "guide"}, torch.get_default_dtype()

    def error():
        with torch.no_grad():
            return float((names["net"](names["inside"]) - names["exact"](names["inside"])).square().mean().sqrt())

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")   # no operation of the guide falls back to a slower form
            for number, block in enumerate(blocks):
                exec(compile(block, f"{GUIDE.name}, block {number + 1}", "exec"), names)
                if number == 0:
                    assert error() > 0.05
                if number == 1:
                    assert names["error"] == error() < 2e-3
                if number == 2:
                    assert error() < names["error"]
                if number == 5:
                    assert error() < 2e-3, "at points that the last step has not seen before"
    finally:
        torch.set_default_dtype(dtype)
    points, model = names["points"], names["model"]
    decay = torch.exp(-0.1 * torch.pi**2 * points[:, 1:])
    truth = torch.sin(torch.pi * points[:, :1]) * decay
    assert float((model(points).detach() - truth).abs().max()) < 1e-3
    assert "accepted: loss" in capsys.readouterr().out
