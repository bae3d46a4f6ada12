"""One table of thresholds for C++, CUDA and Python; one set of rules for CG."""

import ast
import math
import re
from pathlib import Path

import pytest
import torch
from helpers import mlp, rand

import pgdfast
from pgdfast.kernels import limits, native, protocol

core = native._C
ROOT = Path(__file__).resolve().parents[2]
needs_core = pytest.mark.skipif(core is None, reason="the C++ core is not built")
needs_source = pytest.mark.skipif(not (ROOT / "csrc").exists(), reason="the source tree is not here")


@needs_core
@needs_source
def test_the_header_reads_the_same_with_and_without_the_core():
    assert limits.read_header((ROOT / "csrc/plan/limits.h").read_text()) == core.limits()


@needs_core
def test_every_threshold_is_a_constant_of_python():
    known = {name for name in vars(limits) if name.isupper() and not name.startswith("_")}
    assert len(known) == len(core.limits()) - 1   # all but the tolerance that `claims` is derived from


@needs_core
@pytest.mark.parametrize(("words", "alphas", "message"), [
    ([1, 0], [], "ends early"), ([0, 0, 7], [], "left over"), ([0, 1], [], "one factor too few"),
    ([1, 0, 4, 4, 1, 0, 0, 0, 9, 0, -1, 0, 4, 1, 4, 1, 1, 1, 1, 1, 1], [1.0], "a buffer that there is not"),
])
def test_a_program_that_does_not_read_well_is_refused(words, alphas, message):
    with pytest.raises(RuntimeError, match=message):
        core.PlanDouble(torch.tensor(words), alphas, [], [])


@needs_core
def test_status_is_numbered_alike():
    assert core.STATUS == protocol.STATUS


@needs_source
@pytest.mark.parametrize("written", [r"= 192\b", r"\b1 - 1e-3", r"= 50;", r"> 1\.1 \*", r"% 50\b"])
def test_no_threshold_is_written_a_second_time(written):
    sources = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".cpp", ".cu", ".h") and p.name != "limits.h"]
    found = [p.name for p in sources if re.search(written, p.read_text())]
    assert found in ([], ["normal.cpp"]), found   # whose tile depth happens to be 192


class State(dict):
    """CG's state by name, as the core returns it."""

    def __init__(self, numbers):
        super().__init__(zip(core.CG_STATE, numbers, strict=True))

    def numbers(self):
        return [float(self[name]) for name in core.CG_STATE]

    def phase(self):
        return core.CG_PHASES[int(self["phase"])]


@needs_core
def test_a_solve_begins_and_steps():
    options = [150.0, 1e-6, 1e-9, 0.0, 0.0]
    begun = State(core.cg_begin(2.0, options, False))
    assert begun.phase() == "check" and begun["target"] == 2e-6 and begun["last_claim"] == 2.0
    assert State(core.cg_begin(0.0, options, True)).phase() == "ended"
    started = State(core.cg_start(core.cg_begin(2.0, options, True), 3.0, 6.0))
    assert (started["step"], started["value"]) == (0.5, 0.75)
    for along, curvature in ((math.nan, 1.0), (1.0, 0.0), (1.0, math.inf)):
        assert State(core.cg_start(core.cg_begin(2.0, options, True), along, curvature))["step"] == 0.0
    begun["rz"] = 8.0
    assert State(core.cg_step(begun.numbers(), 4.0))["step"] == 2.0
    assert State(core.cg_step(begun.numbers(), -4.0))["broken"] == 1


@needs_core
def test_a_claim_that_fails_before_the_first_check_returns_to_the_start():
    """With few iterations no iterate to go back to used to be kept: what was read then was anybody's memory."""
    model, x = mlp(2, 30, 1, dtype=torch.float32), rand(40, 2, seed=1, dtype=torch.float32)
    lin = pgdfast.linearize(lambda: 1e15 * model(x), model.parameters())
    for limit in (3, 20, 50, 60):
        for start in (None, rand(lin.num_parameters, seed=2, dtype=torch.float32)):
            keep = {} if start is None else {"start": start}
            found = pgdfast.solve(lin, 1e-30, solver="cg", cg=pgdfast.CG(limit, 1e-3, warm_start=True), keep=keep)
            assert found.status != "not_finite" and bool(torch.isfinite(found.step).all())


@needs_core
def test_the_stub_names_all_that_the_core_has():
    stub = ROOT / "pgdfast/_C.pyi"
    if not stub.exists():
        stub = Path(native.__file__).resolve().parents[1] / "_C.pyi"
    tree = ast.parse(stub.read_text())
    bodies = {node.name: node.body for node in tree.body if isinstance(node, ast.ClassDef)}
    bases = {node.name: [base.id for base in node.bases] for node in tree.body if isinstance(node, ast.ClassDef)}

    def names(body):
        found = {node.name for node in body if isinstance(node, ast.FunctionDef)}
        return found | {node.target.id for node in body if isinstance(node, ast.AnnAssign)}

    public = {name for name in vars(core) if not name.startswith("_")}
    assert names(tree.body) | {name for name in bodies if not name.startswith("_")} == public
    for name in bodies:
        if not name.startswith("_"):
            told = names(bodies[name]).union(*(names(bodies[base]) for base in bases[name])) - {"__init__"}
            assert told == {member for member in vars(getattr(core, name)) if not member.startswith("_")}, name
