"""`pgdfast report`: the records and pictures of a folder as one HTML page that needs nothing beside itself.

Everything on the page is read from the folder; `report.html.jinja` says how it looks.
"""

import base64
import json
import os
import re
import shlex
import struct
from importlib import resources
from pathlib import Path
from urllib.parse import quote

from pgdfast_experiments import records, tasks, terminal
from pgdfast_experiments.errors import UsageError, WriteError
from pgdfast_experiments.measures import FAIL, OPEN, PASS

SUMMARY = """\
Put what 'pgdfast run' wrote into a folder on one page: the figure of each task beside what
was reported elsewhere, the checks and their verdicts, the results and every setting. The page is one HTML
file with the pictures in it. Tasks without a record are listed with the command that runs them;
records that cannot be read and pictures that are missing are named."""
NAME = "report.html"
VERDICTS = (PASS, FAIL, OPEN)

_TEXTS = dict.fromkeys(("task", "source", "paper", "started"), str)
_SHAPE = {**_TEXTS, **dict.fromkeys(("settings", "problem", "versions", "machine"), dict), "figures": list, "checks": list,
          "table": dict, "seeds": list, "seconds": (int, float), "quick": bool, "resumed": bool}
_CHECK = dict.fromkeys(("claim", "measured", "outcome"), str)
_FIGURE = dict.fromkeys(("file", "caption"), str)
_TABLE = {"title": str, "columns": list, "rows": list, "notes": list}


class Unreadable(Exception):
    """A file is not the record of a run: the message says in a few words what is wrong."""


def add_options(parser):
    """Add the options of the command to `parser`."""
    parser.add_argument("folder", metavar="DIR", help="folder with the results of one or more runs (their --out)")
    parser.add_argument("--out", metavar="FILE", help=f"the page to write (default: {NAME} in DIR)")


def run(arguments):
    """Write the page; returns the exit code."""
    write(arguments.folder, arguments.out)
    return 0


def write(folder, out=None):
    """Write the page about `folder` to `out` (default: report.html in it), and print where and what is wrong with it.

    Raises UsageError if the folder has no record that can be read, `out` cannot be a page, or jinja2 is missing; WriteError
    if the page cannot be written.
    """
    terminal.require_extras("jinja2")
    folder = Path(folder)
    out = folder / NAME if out is None else Path(out)
    if out.suffix not in (".html", ".htm") or out.is_dir():
        raise UsageError(f"--out: got {str(out)!r}; needed: a file whose name ends in .html")
    found, damaged = collect(folder)
    records.prepare_folder(out.parent)
    page, notes = render(folder, found, damaged, out.parent)
    try:
        records.write_whole(out, page.encode())
    except OSError as error:
        raise WriteError(f"could not write {str(out)!r}: {error.strerror or error}") from error
    for note in notes:
        print(f"note: {note}")
    print(f"wrote {out}")


def collect(folder):
    """Return the records in `folder` by name, and what is wrong with its other JSON files by file name."""
    if not folder.is_dir():
        raise UsageError(f"got {str(folder)!r}, which is not a folder; needed: one that 'pgdfast run TASK --out DIR' wrote to")
    found, damaged = {}, {}
    for path in sorted(folder.glob("*.json")):
        try:
            found[path.stem] = read(path)
        except Unreadable as error:
            damaged[path.name] = str(error)
    if not found:
        wrong = "; ".join(f"{name}: {why}" for name, why in damaged.items()) or "it has no JSON file"
        raise UsageError(
            f"{str(folder)!r} has no record of a run ({wrong}); needed: a folder that 'pgdfast run TASK --out DIR' wrote to"
        )
    return found, damaged


def read(path):
    """Return the record in a file; raises `Unreadable` where it is none."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise Unreadable("there is no such file") from error
    except OSError as error:
        raise Unreadable(f"cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise Unreadable("is damaged: it does not read as JSON") from error
    _expect(record, _SHAPE, "the record")
    _expect(record["table"], _TABLE, "its table")
    for check in record["checks"]:
        _expect(check, _CHECK, "a check")
        if check["outcome"] not in VERDICTS:
            raise Unreadable(f"has a check whose outcome is {check['outcome']!r}")
    for figure in record["figures"]:
        _expect(figure, _FIGURE, "a figure")
    if not all(isinstance(row, list) for row in record["table"]["rows"]):
        raise Unreadable("is not the record of a run: a row of its table is not a list")
    return record


def _expect(value, shape, what):
    wrong = list(shape)[:1] if not isinstance(value, dict) else [
        name for name, kind in shape.items() if not isinstance(value.get(name), kind)]
    if wrong:
        raise Unreadable(f"is not the record of a run: {what} has no usable {wrong[0]!r}")


def render(folder, found, damaged, beside):
    """Return the page as text, and notes on what is missing or damaged.

    found, damaged: from `collect`. beside: the folder of the page, which links to other files start from.
    """
    from jinja2 import Environment, StrictUndefined

    sections = [_entry(name, found[name], folder, beside) if name in found else _absent(name, tasks.ALL[name], folder)
                for name in dict.fromkeys((*tasks.ALL, *found))]
    entries = [section for section in sections if section["record"]]
    notes = [f"{file} {why}" for file, why in damaged.items()]
    notes += [f"{figure['file']} {figure['missing']}" for entry in entries for figure in entry["figures"] if figure["missing"]]

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(shown=_shown, seconds=_seconds, moment=_moment)
    template = environment.from_string(resources.files(__package__).joinpath("report.html.jinja").read_text(encoding="utf-8"))
    page = template.render(
        sections=sections, entries=entries, notes=notes, verdicts=VERDICTS,
        total={verdict: sum(entry["counts"][verdict] for entry in entries) for verdict in VERDICTS},
        versions=_distinct(record["versions"] for record in found.values()),
        machines=_distinct(record["machine"] for record in found.values()),
        started=sorted({record["started"] for record in found.values()}), quick=sum(r["quick"] for r in found.values()),
    )
    return page, notes


def _entry(name, record, folder, beside):
    """Return what the section of one record shows."""
    csv = folder / f"{name}.csv"
    return {
        "id": _identifier(name), "name": name, "record": record, "about": tasks.TASKS[name][1] if name in tasks.TASKS else "",
        "counts": {verdict: sum(check["outcome"] == verdict for check in record["checks"]) for verdict in VERDICTS},
        "figures": [{**figure, **_picture(folder, figure["file"], beside)} for figure in record["figures"]],
        "files": [(file.name, _link(file, beside)) for file in (csv, folder / f"{name}.json") if file.is_file()],
    }


def _absent(name, command, folder):
    """Return what is said of a task without a record, with the command that makes it."""
    interrupted = (folder / f"{name}.checkpoint").exists()
    words = ["pgdfast", "run", *command, "--out", str(folder), *(["--resume"] if interrupted else [])]
    return {"id": _identifier(name), "name": name, "record": None, "about": tasks.TASKS[command[0]][1],
            "interrupted": interrupted, "command": shlex.join(words)}


def _picture(folder, name, beside):
    """Return a picture as a data URI with its size in pixels, or what is wrong with it."""
    path, nothing = folder / name, {"data": "", "width": 0, "height": 0, "link": ""}
    if Path(name).name != name or not path.is_file():
        return {**nothing, "missing": "is missing"}
    try:
        content = path.read_bytes()
    except OSError as error:
        return {**nothing, "missing": f"cannot be read ({error.strerror})"}
    if content[:8] != b"\x89PNG\r\n\x1a\n" or len(content) < 33:
        return {**nothing, "missing": "is damaged: it is not a PNG picture"}
    width, height = struct.unpack(">II", content[16:24])
    data = f"data:image/png;base64,{base64.b64encode(content).decode('ascii')}"
    return {"data": data, "width": width, "height": height, "link": _link(path, beside), "missing": ""}


def _link(path, beside):
    """Return the address of a file as seen from the folder `beside`."""
    address = quote(os.path.relpath(path, beside).replace(os.sep, "/"))
    return address if address.startswith("../") else f"./{address}"


def _identifier(name):
    return "task-" + re.sub(r"[^A-Za-z0-9]+", "-", name)


def _distinct(values):
    """Return the different ones among dicts, in order."""
    return [json.loads(text) for text in dict.fromkeys(json.dumps(value) for value in values)]


def _shown(value):
    """Return a setting that is no dict as text."""
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "not set"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _seconds(value):
    """Return a duration in words."""
    if value < 60:
        return f"{value:.1f} s" if value < 10 else f"{value:.0f} s"
    minutes, seconds = divmod(round(value), 60)
    return f"{minutes} min {seconds} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _moment(text):
    """Return a record's time with a space for its T, to the minute: 2026-01-31 08:15 UTC."""
    found = re.fullmatch(r"(\d{4}-\d\d-\d\d)T(\d\d:\d\d):\d\dZ", text)
    return f"{found[1]} {found[2]} UTC" if found else text
