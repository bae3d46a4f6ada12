"""`pgdfast report`: the page holds everything that the records hold, needs nothing from outside, and names what is wrong."""

import base64
import html
import json
import shutil
from html.parser import HTMLParser

import pytest

from pgdfast_experiments import report, tasks
from pgdfast_experiments.cli import main

VOID = {"meta", "img", "br", "link", "input"}


class Page(HTMLParser):
    """Elements by name, ids, and whether every element is closed in its place."""

    def __init__(self, text):
        super().__init__()
        self.text, self.open, self.elements = text, [], []
        self.feed(text)
        assert self.open == []
        ids = [found["id"] for _, found in self.elements if "id" in found]
        assert len(ids) == len(set(ids))
        self.ids = set(ids)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def all(self, tag):
        return [found for name, found in self.elements if name == tag]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with the results of a tiny real run."""
    folder = tmp_path_factory.mktemp("runs")
    assert main(["run", "regression-1d", "--optimizers", "sgd,gn", "--steps", "3", "--seeds", "1", "--width", "4", "--quick",
                 "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def runs(made, tmp_path):
    return shutil.copytree(made, tmp_path / "runs")


def _record(folder):
    return json.loads((folder / "regression-1d.json").read_text())


def _with(folder, name, **changes):
    (folder / f"{name}.json").write_text(json.dumps({**_record(folder), "task": name, **changes}))


def _page(folder, *options):
    assert main(["report", str(folder), *options]) == 0
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def _refused(capsys, *argv):
    assert main(["report", *map(str, argv)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("pgdfast report: ")
    return err


def test_the_page_holds_what_the_record_holds(runs, capsys):
    record = _record(runs)
    outcomes = ("pass", "not reproduced", "not judged", "pass", "pass")
    checks = [{**check, "outcome": outcome} for check, outcome in zip(record["checks"], outcomes, strict=True)]
    _with(runs, "regression-1d", checks=checks)
    page = _page(runs)
    assert capsys.readouterr().out.splitlines()[-1] == f"wrote {runs / 'report.html'}"

    def shows(text):
        return str(html.escape(text).replace("&#x27;", "&#39;").replace("&quot;", "&#34;")) in page.text

    for check in checks:
        assert shows(check["claim"]) and shows(check["measured"])
    verdicts = [found["class"] for found in page.all("span") if found.get("class", "").startswith("verdict")]
    assert verdicts == 2 * [f"verdict {outcome.replace(' ', '-')}" for outcome in outcomes], "in the overview and the section"
    counts = [found["class"].split()[1] for found in page.all("td") if found.get("class", "").startswith("count")]
    assert counts == 2 * ["pass", "not-reproduced", "not-judged"]
    assert shows(record["paper"]) and shows(record["source"]) and shows(record["table"]["title"])
    assert all(shows(cell) for row in record["table"]["rows"] for cell in row)
    assert all(name in page.text for name in record["settings"])
    assert all(shows(str(fact)) for fact in (*record["versions"].values(), *record["machine"].values()))
    assert "quick run (--quick)" in page.text
    assert 'href="./regression-1d.csv"' in page.text


def test_the_page_needs_nothing_from_outside(runs):
    page = _page(runs)
    (image,) = page.all("img")
    kind, _, data = image["src"].partition(",")
    assert kind == "data:image/png;base64"
    assert base64.b64decode(data) == (runs / "regression-1d.png").read_bytes()
    assert int(image["width"]) > 100 and int(image["height"]) > 100 and image["alt"].startswith("regression-1d: ")
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.elements}
    assert "http:" not in page.text and "https:" not in page.text and "url(" not in page.text
    inside = [found["href"][1:] for found in page.all("a") if found["href"].startswith("#")]
    assert inside and set(inside) <= page.ids
    assert all((runs / found["href"]).is_file() for found in page.all("a") if found["href"][0] != "#")


def test_tasks_stand_in_order_and_those_not_run_have_their_command(runs):
    _with(runs, "mnist-cross-entropy")
    _with(runs, "another")
    (runs / "polynomial.checkpoint").write_bytes(b"")
    page = _page(runs)
    sections = [found["id"] for found in page.all("section")]
    assert sections == ["overview", *(f"task-{name}" for name in (*tasks.ALL, "another"))]
    assert f"pgdfast run transformer --out {runs}</code>" in page.text
    assert f"pgdfast run polynomial --out {runs} --resume</code>" in page.text
    assert "run mnist --loss" not in page.text
    assert "pgdfast run regression-1d" not in page.text


def test_texts_are_escaped(runs):
    evil = "<script>alert('1')</script> & \"x\""
    record = _record(runs)
    checks = [{"claim": evil, "measured": evil, "outcome": "pass"}]
    _with(runs, "regression-1d", paper=evil, source=evil, started=evil, checks=checks, settings={evil: evil}, seeds=[evil],
          figures=[{"file": "regression-1d.png", "caption": evil}], versions={evil: [evil]},
          table={**record["table"], "title": evil, "columns": [evil], "rows": [[evil, evil]], "notes": [evil]})
    page = _page(runs)
    assert page.all("script") == [] and page.text.count("&lt;script&gt;") > 12
    assert page.all("img")[0]["alt"] == f"regression-1d: {evil}"


@pytest.mark.parametrize(("content", "why"), [
    ('{"task": "poisson-pinn", ', "poisson-pinn.json is damaged: it does not read as JSON"),
    (b"\xff\xfe\x00", "poisson-pinn.json is damaged"),
    ("[" * 100_000, "poisson-pinn.json is damaged"),
    ("[1, 2]", "poisson-pinn.json is not the record of a run: the record has no usable &#39;task&#39;"),
    ('{"task": "poisson-pinn"}', "the record has no usable &#39;source&#39;"),
    ({"checks": [{"claim": "c", "measured": "m"}]}, "a check has no usable &#39;outcome&#39;"),
    ({"checks": [{"claim": "c", "measured": "m", "outcome": "maybe"}]}, "a check whose outcome is &#39;maybe&#39;"),
    ({"figures": ["x.png"]}, "a figure has no usable &#39;file&#39;"),
    ({"table": {"title": "t", "columns": [], "rows": ["x"], "notes": []}}, "a row of its table is not a list"),
])
def test_a_damaged_record_is_named_and_the_others_stand(runs, capsys, content, why):
    if isinstance(content, dict):
        _with(runs, "poisson-pinn", **content)
    else:
        (runs / "poisson-pinn.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    page = _page(runs)
    assert why in page.text and "task-regression-1d" in page.ids
    assert f"pgdfast run poisson-pinn --out {runs}</code>" in page.text, "what is damaged counts as not run"
    assert "note: poisson-pinn.json " in capsys.readouterr().out


@pytest.mark.parametrize(("file", "content", "why"), [
    ("gone.png", None, "gone.png is missing"),
    ("text.png", b"no picture", "text.png is damaged: it is not a PNG picture"),
    ("../outside.png", b"\x89PNG\r\n\x1a\n" + bytes(40), "../outside.png is missing"),
])
def test_a_picture_that_cannot_be_shown_is_named_in_its_place(runs, capsys, file, content, why):
    if content is not None:
        (runs / file).write_bytes(content)
    _with(runs, "regression-1d", figures=[{"file": file, "caption": "the caption"}])
    page = _page(runs)
    assert page.all("img") == [] and f"The picture {why}." in page.text and "the caption" in page.text
    assert f"note: {why}" in capsys.readouterr().out


def test_out_names_another_page_whose_links_still_lead_to_the_files(runs, tmp_path):
    assert main(["report", str(runs), "--out", str(tmp_path / "new" / "page.html")]) == 0
    page = Page((tmp_path / "new" / "page.html").read_text())
    assert 'href="../runs/regression-1d.csv"' in page.text
    assert not (runs / "report.html").exists()


def test_what_cannot_be_reported_on_is_one_sentence(runs, tmp_path, capsys):
    assert "not a folder" in _refused(capsys, tmp_path / "nowhere")
    assert "not a folder" in _refused(capsys, runs / "regression-1d.json")
    (tmp_path / "empty").mkdir()
    assert "has no record of a run (it has no JSON file)" in _refused(capsys, tmp_path / "empty")
    (tmp_path / "empty" / "mnist.json").write_text("{")
    assert "mnist.json: is damaged" in _refused(capsys, tmp_path / "empty")
    assert "DIR" in _refused(capsys)
    assert "ends in .html" in _refused(capsys, runs, "--out", runs / "regression-1d.csv")
    (tmp_path / "file").write_text("")
    assert "can be made and written to" in _refused(capsys, runs, "--out", tmp_path / "file" / "page.html")


def test_durations_and_moments_in_words():
    assert [report._seconds(value) for value in (0.04, 9.94, 59.4, 60, 131.6, 3661)] == [
        "0.0 s", "9.9 s", "59 s", "1 min 0 s", "2 min 12 s", "1 h 1 min"]
    assert report._moment("2026-01-31T08:15:59Z") == "2026-01-31 08:15 UTC"
    assert report._moment("yesterday") == "yesterday"
