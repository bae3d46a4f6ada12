"""Files are written all together or not at all, and read back as they were."""

import csv
import json
import math

import numpy as np
import pytest

from pgdfast_experiments import records
from pgdfast_experiments.errors import UsageError, WriteError
from pgdfast_experiments.training import Run


def _run(optimizer="gn", seed=3, stopped_at=None):
    columns = {"loss": np.array([1 / 3, 0.1, np.pi]), "mode_1": np.ones(3)}
    return Run(optimizer, "alpha=2", seed, np.array([0, 1, 3]), columns, np.array([1e-3, 2e-3, 3e-3]),
               3 if stopped_at is None else stopped_at, stopped_at)


def test_csv_reads_back_to_the_last_digit(tmp_path):
    records.write_csv(tmp_path / "n.csv", [_run(), _run("lm-0.5", 0)])
    with open(tmp_path / "n.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["optimizer"] for row in rows] == ["gn"] * 3 + ["lm-0.5"] * 3
    assert {row["variant"] for row in rows} == {"alpha=2"}
    assert [int(row["step"]) for row in rows[:3]] == [0, 1, 3]
    assert [float(row["loss"]) for row in rows[:3]] == [1 / 3, 0.1, np.pi]
    assert [float(row["seconds"]) for row in rows[:3]] == pytest.approx([0, 1e-3, 6e-3])


def test_csv_ends_where_a_run_stopped(tmp_path):
    records.write_csv(tmp_path / "n.csv", [_run(stopped_at=1)])
    assert len((tmp_path / "n.csv").read_text().splitlines()) == 1 + 2


def test_json_has_null_for_what_is_not_finite(tmp_path):
    records.write_json(tmp_path / "r.json", {"a": (1, math.nan), "b": {2: math.inf}})
    assert json.loads((tmp_path / "r.json").read_text()) == {"a": [1, None], "b": {"2": None}}


def test_an_interrupted_block_leaves_the_folder_as_it_was(tmp_path):
    (tmp_path / "a.txt").write_text("before")
    with pytest.raises(KeyboardInterrupt), records.all_or_nothing(tmp_path) as scratch:
        (scratch / "a.txt").write_text("half")
        raise KeyboardInterrupt
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "before"


def test_a_finished_block_replaces_the_files(tmp_path):
    (tmp_path / "a.txt").write_text("before")
    with records.all_or_nothing(tmp_path) as scratch:
        (scratch / "a.txt").write_text("after")
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "after"


def test_a_folder_that_went_away_is_a_write_error(tmp_path):
    with pytest.raises(WriteError, match="gone"), records.all_or_nothing(tmp_path / "gone"):
        pass


def test_prepare_folder_makes_it_and_leaves_nothing_in_it(tmp_path):
    folder = records.prepare_folder(tmp_path / "a" / "b")
    assert folder.is_dir() and not list(folder.iterdir())


@pytest.mark.parametrize("tail", ["file", "file/below", "null\0byte"])
def test_prepare_folder_refuses_what_cannot_be_a_folder(tmp_path, tail):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="--out"):
        records.prepare_folder(tmp_path / tail)
