"""How the benchmarks turn samples into figures: rounds, ratios, exponents, verdicts, and the places of names in pictures."""

import bench_folder  # noqa: F401
import pytest
import torch

from bench import bounds, interleave, parts, plots, problems, sweeps, tables, truth


def timing(name="row", **seconds):
    """seconds: t1=[...] by round for one thread, t2 for two; None for a round sat out."""
    return interleave.Timing(interleave.Row(name, None), {
        int(key[1:]): {k: s for k, s in enumerate(values, 1) if s is not None} for key, values in seconds.items()})


def test_a_row_stands_at_its_best_thread_count():
    row = timing(t1=[3.0, 3.0, 9.0], t2=[2.0, 4.0, 4.0])
    assert row.threads == 1 and row.median == 3.0


def test_ratios_are_taken_round_by_round():
    a, b = timing(t1=[1.0, 20.0, 3.0]), timing(t1=[2.0, 10.0, 1.0])
    ratio = interleave.Ratio.of(a, b)
    assert (ratio.min, ratio.median, ratio.max) == (0.5, 2.0, 3.0)


def test_a_ratio_takes_the_rounds_that_all_rows_ran_in():
    slow, fast, other = timing(t1=[None, 8.0, None]), timing(t1=[1.0, 2.0, 3.0]), timing(t1=[9.0, 2.0, 9.0])
    assert interleave.Ratio.of(slow, fast, other).median == 2.0


def test_a_ratio_of_rows_that_never_met_is_that_of_their_medians():
    assert interleave.Ratio.of(timing(t1=[6.0, None]), timing(t1=[None, 2.0])).median == 3.0


def test_one_step_is_the_difference_of_two_solves_over_their_steps():
    one = interleave.difference("step", timing(t1=[1.0, 2.0]), timing(t1=[7.0, 5.0], t2=[9.0, 9.0]), 6)
    assert one.best == [1.0, 0.5] and one.threads == 1


@pytest.mark.parametrize(("seconds", "rounds", "count"), [
    (1e-6, 40, 40), (0.04, 40, 25), (0.3, 40, 6), (2.0, 40, 3), (2.0, 2, 2), (2.0, 1, 1),
])
def test_slow_rows_run_in_fewer_rounds_from_the_first_to_the_last(seconds, rounds, count):
    chosen = interleave.spread(rounds, seconds, 2.0)
    assert len(chosen) == count and min(chosen) == 1 and max(chosen) in (rounds, 1)


def test_rows_are_timed_in_all_thread_counts_and_the_count_is_put_back():
    before, seen = torch.get_num_threads(), set()
    found = interleave.interleaved([interleave.Row("row", lambda: seen.add(torch.get_num_threads()))], 2)
    assert torch.get_num_threads() == before and seen == set(interleave.THREADS) == set(found["row"].seconds)
    assert all(len(rounds) == 2 for rounds in found["row"].seconds.values())


def test_a_call_of_equal_parts_counts_as_one_of_them():
    whole, part = (interleave.Row("row", lambda: sum(range(20000)), share=share) for share in (1, 10))
    found = interleave.interleaved([whole], 3)["row"].median / interleave.interleaved([part], 3)["row"].median
    assert 3 < found < 33


def test_exponents():
    sizes = [10, 20, 40, 80]
    assert sweeps.slope(sizes, [3 * n**2.5 for n in sizes]) == pytest.approx(2.5)
    assert sweeps.upper_half([1, 2, 3, 4, 5]) == [3, 4, 5] and sweeps.upper_half([1, 2]) == [1, 2]
    with pytest.raises(ValueError, match="two different"):
        sweeps.slope([4, 4], [1.0, 2.0])


def test_exponents_over_rows_part_where_the_cholesky_begins_to_matter():
    def point(n):
        seconds = n**2 if n < 400 else n**3 / 400
        return tables.Measured("", {"LM step": timing(t1=[seconds])}, facts={"cholesky_share": 0.1 if n < 400 else 0.5})

    found = sweeps.slopes("rows", {n: point(n) for n in (50, 100, 200, 400, 800)}, "LM step")
    assert found["N, Gram matrix"] == (pytest.approx(2), [100, 200])
    assert found["N, Cholesky"] == (pytest.approx(3), [400, 800])


def measured(**medians):
    return tables.Measured("", {name: timing(t1=[value]) for name, value in medians.items()}, {"gone": "gone is not installed"})


def test_a_bound_holds_if_one_of_its_sides_does():
    sides = (bounds.Side(lambda m: 1e3 * m.timing("a").median, 32, form="{:.3g} ms"),
             bounds.Side(lambda m: m.ratio("a", "b"), 1.4, "of b"))
    bound = bounds.Bound("G", "step", sides)
    verdict = bound.judge(measured(a=0.064, b=0.05))
    assert verdict["verdict"] == "pass"
    assert (verdict["bound"], verdict["measured"]) == ("<= 32 ms or <= 1.4 of b", "64 ms, 1.28")
    verdict = bound.judge(measured(a=0.064, b=0.04))
    assert verdict["verdict"] == "FAIL"
    assert bounds.sentence(verdict) == "G: step must be <= 32 ms or <= 1.4 of b, and is 64 ms, 1.6."


@pytest.mark.parametrize(("peer", "verdict"), [(4.9, "FAIL"), (5.0, "pass")])
def test_a_peer_has_to_be_slower_by_at_least_its_limit(peer, verdict):
    bound = bounds.Bound("A", "peer", (bounds.Side(lambda m: m.ratio("peer", "ours"), 5, at_least=True),))
    assert bound.judge(measured(peer=peer, ours=1.0))["verdict"] == verdict


def test_a_bound_on_a_missing_peer_says_what_is_missing():
    bound = bounds.Bound("A", "peer", (bounds.Side(lambda m: m.ratio("gone", "ours"), 5),))
    with pytest.raises(bounds.Absent, match="gone is not installed"):
        bound.judge(measured(ours=1.0))


def test_no_claim_is_made_twice():
    claims = [(bound.section, bound.claim) for bound in bounds.BOUNDS]
    assert len(claims) == len(set(claims)) and {section for section, _ in claims} == set(problems.PROBLEMS)


@pytest.mark.parametrize(("name", "residuals", "parameters"), [
    ("A", 100, 6721), ("B", 400, 6801), ("C", 680, 1025), ("D", 10948, 6900), ("E", 550, 50000), ("F", None, None),
    ("G", 2000, 198760),
])
def test_the_problems_have_the_papers_sizes(name, residuals, parameters):
    problem = problems.PROBLEMS[name]
    model = problem.model()
    assert problem.parameters == sum(p.numel() for p in model.parameters())
    if parameters is None:
        assert 4.1e5 < problem.parameters < 4.3e5 and problem.samples == 512
    else:
        assert (problem.residuals, problem.parameters) == (residuals, parameters)


def test_operations_of_the_products_are_those_of_their_shapes():
    for name in "ABDEG":
        problem = problems.PROBLEMS[name]
        counted = sum(2 * m * k * n for m, k, n in problem.sweep_shapes())
        assert 2 * problem.sweep_flops == counted


def test_half_a_square_is_its_upper_half():
    generator = torch.Generator().manual_seed(0)
    call = parts.half_square(10, 3, generator, width=4)
    call()
    (panels,) = (cell.cell_contents for cell in call.__closure__)
    Y = torch.cat([rows for rows, _, _ in panels])
    for (_, _, panel), j in zip(panels, (0, 4, 8), strict=True):
        assert torch.allclose(panel, (Y @ Y.T)[j:j + 4, j:], atol=1e-6)


def test_the_plain_truth_is_the_references():
    """G's in small: its products and step by torch.func and conjugate gradients, against the explicit Jacobian."""
    class Small(problems.Digits):
        def data(self, dtype=torch.float32):
            x = torch.rand(4, 12, generator=torch.Generator().manual_seed(0))
            return x.to(dtype), torch.eye(3, dtype=dtype)[[0, 1, 2, 1]]

    small, whole = (Small("G", "", (12, 5, 3), 4, 1e-2, reference=known) for known in (False, True))
    plain, explicit = truth.Truth(small), truth.Truth(whole)
    v = torch.randn(small.parameters)
    assert truth.relative_error(plain.product(v), explicit.product(v)) < 1e-6   # weights of float32, sums of float64
    (a, bound_a), (b, bound_b) = plain.step(), explicit.step()
    assert truth.relative_error(a, b) < 1e-6
    exact = float(torch.linalg.eigvalsh(explicit._lin.gram())[-1]) / small.damping + 1
    assert bound_a == pytest.approx(bound_b, rel=1e-3) and bound_a == pytest.approx(exact, rel=0.05)


def test_names_beside_lines_keep_apart_and_in_order():
    moved = plots.spread([0.5, 0.1, 0.49, 0.51], 0.1)
    order = sorted(range(4), key=moved.__getitem__)
    assert order == [1, 2, 0, 3]
    gaps = [moved[b] - moved[a] for a, b in zip(order, order[1:], strict=False)]
    assert min(gaps) >= 0.1 - 1e-12 and moved[1] == 0.1
    assert sum(moved) == pytest.approx(0.5 + 0.1 + 0.49 + 0.51)
    assert plots.spread([0.3, 0.9], 0.1) == pytest.approx([0.3, 0.9])


def test_curves_leave_out_what_has_one_size():
    points = {str(n): {"parameters": 10 * n, "rows": {"a": {"median_ms": n}, **({"b": {"median_ms": 1}} if n == 2 else {})}}
              for n in (4, 2)}
    assert plots.curves(points, None, ("a", "b", "c")) == {"a": ((2.0, 4.0), (2, 4))}
    assert plots.curves(points, "parameters", ("a",)) == {"a": ((20.0, 40.0), (2, 4))}
