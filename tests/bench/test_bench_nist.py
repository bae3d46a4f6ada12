"""NIST's data against its own certificates, and LM's fits of the quick ones."""

import json
from decimal import Decimal

import bench_folder  # noqa: F401 - makes `bench` importable
import mpmath
import pytest
import torch

from bench.nist import CERTIFIED, DATA, PROBLEMS, command
from bench.nist.runs import Fit, by_lm

QUICK = ("BoxBOD", "Eckerle4", "Gauss1", "Hahn1", "Kirby2", "MGH09", "Misra1a", "Misra1d", "Rat43", "Roszman1", "Thurber")


def test_there_are_27():
    assert len(PROBLEMS) == 27 and sum(len(problem.certified) for problem in PROBLEMS.values()) == 120
    assert all(len(start) == len(problem.certified) for problem in PROBLEMS.values() for start in problem.starts)


@pytest.mark.parametrize("name", [name for name in PROBLEMS if name != "Lanczos1"])
def test_the_certified_sum_of_squares(name):
    problem = PROBLEMS[name]
    found = problem.residuals(torch.tensor(problem.certified, dtype=torch.float64)).square().sum()
    assert float(found) == pytest.approx(problem.rss, rel=1e-9)


def test_the_certified_sum_of_squares_of_lanczos1():
    """It is 1e-25, less than what 11 digits of the parameters leave: so from one Gauss-Newton step, with 40 digits."""
    given = json.loads(DATA.read_text(), parse_float=Decimal)["Lanczos1"]
    with mpmath.workdps(40):
        x, y, b = (mpmath.matrix([mpmath.mpf(str(value)) for value in given[key]]) for key in ("x", "y", "certified"))
        rows = range(len(x))

        def residuals(b):
            return mpmath.matrix([sum(b[k] * mpmath.exp(-b[k + 1] * x[i]) for k in (0, 2, 4)) - y[i] for i in rows])

        J = mpmath.matrix(len(x), 6)
        for i in rows:
            for k in (0, 2, 4):
                J[i, k] = mpmath.exp(-b[k + 1] * x[i])
                J[i, k + 1] = -b[k] * x[i] * J[i, k]
        r = residuals(b - mpmath.lu_solve(J.T * J, J.T * residuals(b)))
        assert float((r.T * r)[0]) == pytest.approx(PROBLEMS["Lanczos1"].rss, rel=1e-8)


def test_digits():
    problem = PROBLEMS["Misra1a"]
    assert problem.digits(problem.certified) == CERTIFIED and problem.digits(problem.starts[0]) == 0
    assert problem.digits([problem.certified[0], problem.certified[1] * 1.001]) == pytest.approx(3)
    assert problem.digits([float("nan"), problem.certified[1]]) == 0


@pytest.mark.parametrize("start", [0, 1])
@pytest.mark.parametrize("name", QUICK)
def test_fits_without_options(name, start):
    fit = by_lm(PROBLEMS[name], start, 150)
    assert fit.digits >= command.DIGITS and fit.loss == pytest.approx(0.5 * PROBLEMS[name].rss, rel=1e-7)


def test_the_bound():
    reached, missed, there = (Fit("x", 0, digits, 9, loss, "") for digits, loss in ((4.5, 1.0), (0.0, 1.0), (0.0, 2.0)))
    assert command.holds(reached, None) and not command.holds(missed, None) and not command.holds(missed, reached)
    assert command.holds(missed, there) and command.holds(missed, missed) and not command.holds(there, missed)


def test_the_command(capsys):
    assert command.main(["Misra1d", "--rule", "delayed", "--acceleration", "chord"]) == 0
    assert "2 of 2 fits to 4 digits" in capsys.readouterr().out
    assert command.main(["Misra1d", "--steps", "1"]) == 1
    assert "MISSED: Misra1d from start 1" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        command.main(["Misra1"])
    assert "unknown data set 'Misra1'" in capsys.readouterr().err
