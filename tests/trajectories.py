"""Records some 300 optimizer trajectories, and compares two recordings: did a change of the library change any number?

    python tests/trajectories.py record FILE [--only PATTERN]
    python tests/trajectories.py compare BEFORE AFTER

Run `record` with PYTHONPATH set to the tree in question: only pgdfast's public names are used, so the same script runs on
older and later trees. A recording holds bits: losses and report fields as hexadecimal floats, parameters as bytes.
`compare` exits with 1 where a number differs by more than 1e-10 (1e-5 for float32 problems) or anything else differs.
"""

from __future__ import annotations

import argparse
import base64
import fnmatch
import hashlib
import json
import random
import sys
import time
import warnings

import numpy as np
import torch

BOUNDS = {"float64": 1e-10, "float32": 1e-5}
# What is recorded of a report, under the first of these names that it has.
FIELDS = {
    "status": ("status",), "solver": ("solver",), "solve_status": ("solve_status",), "damping": ("damping",),
    "next_damping": ("next_damping",), "gain_ratio": ("gain_ratio",), "predicted_reduction": ("predicted_reduction",),
    "iterations": ("iterations",), "attempts": ("attempts",), "trials": ("trials",), "line_search": ("line_search",),
    "correction": ("correction",), "momentum": ("momentum",), "loss_after": ("loss_after",),
    "residuals": ("residuals",), "parameters": ("parameters",),
}
# Where the loss is at its rounding level, these say nothing beyond this fraction of the first loss.
LOSS_LIKE = ("loss", "loss_after", "predicted_reduction")


# --- recording --------------------------------------------------------------------------------------------------------------

def bits(value):
    """A value for JSON, floats as hexadecimals."""
    if isinstance(value, torch.Tensor):
        value = value.tolist()
    if isinstance(value, list):
        return [bits(v) for v in value]
    return value.hex() if isinstance(value, float) else value


def contents(tensor) -> dict:
    array = tensor.detach().contiguous().numpy()
    return {"dtype": str(array.dtype), "bytes": base64.b64encode(array.tobytes()).decode()}


def fields(report) -> dict:
    """What a report says; every field a list over its members for an ensemble."""
    found = {}
    for field, names in FIELDS.items():
        name = next((n for n in names if report is not None and hasattr(report, n)), None)
        if name is not None:
            found[field] = bits(getattr(report, name))
    return found


def record(run, make, dtype, options, steps, save_at) -> dict:
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    entry, last = {"dtype": str(dtype).removeprefix("torch."), "steps": []}, ()
    try:
        for loss, report, values in run(make, dtype, options, steps, save_at):
            entry["steps"].append({"loss": bits(loss.detach())} | fields(report))
            last = values
    except Exception as error:   # what is refused is part of the record
        entry["error"] = type(error).__name__
        entry["message"] = str(error)[:300]
    tensors = [p for part in last for p in (part["params"] if isinstance(part, dict) else [part])]
    entry["values"] = [contents(p) for p in tensors]
    state = repr((torch.get_rng_state().tolist(), random.getstate(), [str(part) for part in np.random.get_state()]))
    entry["random"] = hashlib.sha256(state.encode()).hexdigest()
    return entry


def record_all(path: str, only: str | None) -> int:
    from trajectory_table import table

    import pgdfast  # here, so that recordings can be compared without it

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    start, entries = time.perf_counter(), {}
    for name, arguments in table().items():
        if only is None or fnmatch.fnmatch(name, f"*{only}*"):
            entries[name] = record(*arguments)
    with open(path, "w") as file:
        json.dump({"torch": torch.__version__, "pgdfast": pgdfast.__file__, "trajectories": entries}, file, indent=0)
    refused = {name: e["message"] for name, e in entries.items() if "error" in e}
    print(f"{len(entries)} trajectories of {pgdfast.__file__} in {time.perf_counter() - start:.0f} s; {len(refused)} raised:")
    for name, message in refused.items():
        print(f"  {name}: {message[:150]}")
    return 0


# --- comparing --------------------------------------------------------------------------------------------------------------

class Difference:
    """What differs between two records of one trajectory."""

    def __init__(self, before: dict, after: dict):
        self.worst, self.where, self.others = 0.0, "", []
        eps = 2.0**-52 if before["dtype"] == "float64" else 2.0**-23
        first = before["steps"][0]["loss"] if before["steps"] else "0x0p0"
        floor = eps * max(abs(float.fromhex(v)) for v in (first if isinstance(first, list) else [first]))
        if before.get("error") != after.get("error"):
            self.others.append(f"error {before.get('error')} -> {after.get('error')}")
        if len(before["steps"]) != len(after["steps"]):
            self.others.append(f"steps {len(before['steps'])} -> {len(after['steps'])}")
        for k, (a, b) in enumerate(zip(before["steps"], after["steps"], strict=False)):
            for field in a.keys() & b.keys():
                self._compare(f"{field} of step {k}", a[field], b[field], floor if field in LOSS_LIKE else 0.0)
        if len(before["values"]) != len(after["values"]):
            self.others.append("number of parameters")
        for k, (a, b) in enumerate(zip(before["values"], after["values"], strict=False)):
            if a != b:
                p, q = (np.frombuffer(base64.b64decode(v["bytes"]), v["dtype"]).astype("float64") for v in (a, b))
                if p.shape != q.shape or not np.isfinite([p, q]).all():
                    self.others.append(f"values {k}")
                else:
                    self._number(f"values {k}", abs(p - q).max(), max(abs(p).max(), abs(q).max()))
        if before["random"] != after["random"]:
            self.others.append("state of the random numbers")

    def _compare(self, where, a, b, floor):
        if a == b:
            return
        if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
            for k, (x, y) in enumerate(zip(a, b, strict=True)):
                self._compare(f"{where}, member {k}", x, y, floor)
            return
        try:
            x, y = float.fromhex(a), float.fromhex(b)
        except (TypeError, ValueError):
            self.others.append(f"{where}: {a} -> {b}")
            return
        if np.isfinite([x, y]).all():
            self._number(where, abs(x - y), max(abs(x), abs(y), floor))
        else:
            self.others.append(f"{where}: {x} -> {y}")

    def _number(self, where, difference, size):
        relative = difference / size if size else difference
        if relative > self.worst:
            self.worst, self.where = float(relative), where


def compare(before: str, after: str) -> int:
    a, b = (json.load(open(path))["trajectories"] for path in (before, after))
    equal, close, failed, news = [], [], [], []
    for name in sorted(a.keys() & b.keys()):
        found, bound = Difference(a[name], b[name]), BOUNDS[a[name]["dtype"]]
        if "error" in a[name] and "error" not in b[name]:
            news.append(f"{name}: was refused, works now")
        elif not found.worst and not found.others:
            equal.append(name)
        elif found.worst <= bound and not found.others:
            close.append((found.worst, name, found.where))
        else:
            failed.append((found.worst, name, "; ".join([found.where, *found.others[:3]][:4]).strip("; ")))
    for title, rows in (("within the bound", close), ("DIFFERENT", failed)):
        for worst, name, where in sorted(rows, reverse=True):
            print(f"{title}: {name}: {worst:.1e} ({where})")
    for line in news:
        print(line)
    missing = sorted(a.keys() - b.keys())
    print(f"{len(equal)} equal bit for bit, {len(close)} within the bound (worst {max(close, default=(0.0,))[0]:.1e}), "
          f"{len(failed)} different, {len(news)} work now, {len(missing)} missing, {len(b.keys() - a.keys())} new")
    for name in missing:
        print(f"missing: {name}")
    return 1 if failed or missing else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record", help="run the trajectories and write them to a file")
    recording.add_argument("file")
    recording.add_argument("--only", metavar="PATTERN", help="names that contain this (with * as wildcard)")
    comparing = commands.add_parser("compare", help="compare two recordings; exit code 1 where they differ")
    comparing.add_argument("before")
    comparing.add_argument("after")
    given = parser.parse_args()
    return record_all(given.file, given.only) if given.command == "record" else compare(given.before, given.after)


if __name__ == "__main__":
    sys.exit(main())
