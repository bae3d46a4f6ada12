"""The documents: their Python runs and does what they say, their links lead somewhere."""

import inspect
import re
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import rand

import pgdfast

ROOT = Path(__file__).resolve().parent.parent
README, GUIDE, REFERENCE = ROOT / "README.md", ROOT / "docs" / "pinns.md", ROOT / "docs" / "behaviour.md"
DOCUMENTS = sorted(p for folder in (".", "docs", "bench", "csrc", "examples", "pgdfast/*") for p in ROOT.glob(f"{folder}/*.md"))

pytestmark = pytest.mark.skipif(not GUIDE.exists(), reason="the source tree is not here")


@pytest.fixture(autouse=True)
def one_thread():
    """Small problems: a second thread only waits. The guide sets the default dtype."""
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)


def blocks_of(path):
    return re.findall(r"^```python\n(.*?)^```", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def run(path, number, block, names):
    exec(compile(block, f"{path.name}, block {number + 1}", "exec"), names)


def name_of(path):
    return str(path.relative_to(ROOT))


def test_the_code_of_the_guide_runs_and_lm_solves_what_adam_does_not(capsys):
    blocks = blocks_of(GUIDE)
    assert len(blocks) == 7
    names = {"__name__": "guide"}

    def error():
        with torch.no_grad():
            return float((names["net"](names["inside"]) - names["exact"](names["inside"])).square().mean().sqrt())

    with warnings.catch_warnings():
        warnings.simplefilter("error")   # no operation of the guide falls back to a slower form
        for number, block in enumerate(blocks):
            run(GUIDE, number, block, names)
            if number == 0:
                assert error() > 0.05
            if number == 1:
                assert names["error"] == error() < 2e-3
            if number == 2:
                assert error() < names["error"]
            if number == 5:
                assert error() < 2e-3, "at points that the last step has not seen before"
    points, model = names["points"], names["model"]
    decay = torch.exp(-0.1 * torch.pi**2 * points[:, 1:])
    truth = torch.sin(torch.pi * points[:, :1]) * decay
    assert float((model(points).detach() - truth).abs().max()) < 1e-3
    assert "accepted: loss" in capsys.readouterr().out


def test_the_readme_prints_what_it_says_and_adam_ends_where_it_says(capsys):
    opening, batches, ensemble, _ = blocks_of(README)
    names = {}
    run(README, 0, opening, names)
    printed, = re.findall(r"^loss: (.*)$", capsys.readouterr().out, re.MULTILINE)
    text = README.read_text(encoding="utf-8")
    said, = re.findall(r"^    loss: (.*)$", text, re.MULTILINE)
    assert float(printed) == pytest.approx(float(said), rel=0.5)   # other processors round otherwise
    run(README, 1, batches, names)
    assert names["opt"].report.parts == 4 and float(names["loss"]) < 2 * float(printed)
    run(README, 2, ensemble.replace("range(100)", "range(12)"), names)
    assert names["losses"].shape == (64,) and float(names["losses"].detach().max()) < 0.1

    for make, said in (
        (lambda p: torch.optim.Adam(p, lr=1e-3), r"Adam ends at ([\d.]+)"),
        (lambda p: pgdfast.LM(p, lr=1e-3), r"LM then ends at ([\d.]+)"),
    ):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(1, 80), torch.nn.Tanh(), torch.nn.Linear(80, 1))
        x, optimizer = names["x"], make(model.parameters())

        def closure(model=model, x=x, optimizer=optimizer):
            loss = F.mse_loss(model(x), torch.sin(5 * x))
            if not isinstance(optimizer, pgdfast.LM):
                optimizer.zero_grad()
                loss.backward()
            return loss

        for _ in range(100):
            loss = optimizer.step(closure)
        assert float(loss.detach()) == pytest.approx(float(re.search(said, text)[1]), rel=1e-2)


def test_the_loop_in_the_readme_is_that_of_lm():
    said = [line.split("#")[0].strip() for line in blocks_of(README)[3].splitlines()]
    source = [line.split("#")[0].strip() for line in inspect.getsource(pgdfast.LM._step).splitlines()]
    first = source.index(said[0])
    assert len(said) == 6 and source[first:first + 6] == said


# --- the custom rule, search and correction of behaviour.md -----------------------------------------------------------------

X = torch.linspace(-1, 1, 40, dtype=torch.float64)[:, None]


@pytest.fixture(scope="module")
def customs():
    """The classes that behaviour.md defines, by option of LM."""
    names = {}
    for number, block in enumerate(blocks_of(REFERENCE)):
        run(REFERENCE, number, block, names)
    return {"damping_rule": names["Patient"], "line_search": names["Quarters"], "acceleration": names["OneChord"]}


def fitted(networks, steps=25, **options):
    optimizer = pgdfast.LM(networks.parameters(), **options)
    axes = (1, 2) if "ensemble" in options else (0, 1)
    losses = [optimizer.step(lambda: (networks(X) - torch.sin(5 * X)).square().mean(axes)) for _ in range(steps)]
    return torch.stack(losses), optimizer


def network(seed):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(1, 12), torch.nn.Tanh(), torch.nn.Linear(12, 1)).double()


@pytest.mark.parametrize("option", ["damping_rule", "line_search", "acceleration"])
def test_customs_train_one_network_and_an_ensemble(customs, option):
    custom = {option: customs[option]()}
    losses, optimizer = fitted(network(0), **custom)
    assert losses[-1] < 1e-3 * losses[0] and bool((losses.diff() <= 0).all())
    if option == "acceleration":
        plain, _ = fitted(network(0), damping_rule="gain-ratio")
        assert losses[-1] < 0.1 * plain[-1], "the correction is worth its solves"
        assert optimizer.report.correction is not None
    together, _ = fitted(pgdfast.functional_ensemble([network(0), network(1)]), steps=6, ensemble=2, **custom)
    assert torch.allclose(together[:, 0], losses[:6], rtol=1e-8, atol=0)


def test_the_custom_rule_moves_mu_as_it_says_and_resumes(customs):
    model = network(0)
    optimizer = pgdfast.LM(model.parameters(), damping=0.1, damping_rule=customs["damping_rule"]())
    closure = lambda: model(X) - torch.sin(5 * X)  # noqa: E731
    optimizer.step(closure)
    assert optimizer.report.status == "accepted" and optimizer.report.next_damping == 0.1
    other = pgdfast.LM(model.parameters(), damping_rule=customs["damping_rule"]())
    other.load_state_dict(optimizer.state_dict())
    other.step(closure)
    assert other.report.status == "accepted" and other.report.next_damping == pytest.approx(0.1 / 3)


def test_the_custom_search_takes_the_longest_step_that_descends(customs):
    p = torch.tensor([3.0], dtype=torch.float64, requires_grad=True)
    optimizer = pgdfast.LM([p], damping=0, damping_rule="constant", line_search=customs["line_search"]())
    optimizer.step(lambda: torch.atan(p))   # the full Newton step overshoots: 3 -> -9.5
    assert optimizer.report.line_search == 1 / 4 and abs(float(p.detach())) < 3


def test_the_custom_correction_leaves_a_step_into_nan_alone(customs):
    p = rand(3, seed=1).abs().add(0.5).requires_grad_()
    optimizer = pgdfast.LM([p], damping=1e-3, acceleration=customs["acceleration"]())
    for _ in range(8):
        optimizer.step(lambda: torch.log(p) + 2)   # the first full steps end below 0, where the logarithm is NaN
    assert float(torch.log(p.detach()).add(2).abs().max()) < 1e-6


# --- links ------------------------------------------------------------------------------------------------------------------


def anchors_of(path):
    """The names by which a Markdown file's headings are linked, as code hosts make them."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(path):
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if re.match(r"\w+://", target):
            continue
        file, _, anchor = target.partition("#")
        there = (path.parent / file).resolve() if file else path
        if not there.exists() or (anchor and anchor not in anchors_of(there)):
            broken.append(target)
    assert not broken


def test_a_link_that_leads_nowhere_is_seen():
    assert "many-networks-at-once" in anchors_of(README) and "pgdfast-run" not in anchors_of(README)
    assert len(DOCUMENTS) >= 9
