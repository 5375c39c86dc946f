"""scripts/grade.py: every solution gets all points, and whatever a student hands in gets a row."""

import argparse
import csv
import importlib.util
import sys

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from refattn.exercises import exercises, notebooks
from test_setup import ROOT

NAME = "02_local"
SETUP = 'from refattn.exercises import checker\ncheck = checker("02_local")'
RIGHT = "def pairs(n, a, b):\n    return n * (a + b + 1) - a * (a + 1) // 2 - b * (b + 1) // 2"
LIMITS = argparse.Namespace(seconds=120, cell_seconds=60, memory=8)


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("grade_script", ROOT / "scripts" / "grade.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["grade_script"] = module
    spec.loader.exec_module(module)
    return module


def save(path, *sources):
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(new_notebook(cells=[new_code_cell(source) for source in sources]), path)
    return path


def graded(script, tmp_path, *sources, **limits):
    """{exercise: (points, reason)} of a notebook with these cells."""
    path = save(tmp_path / "ann" / "mine.ipynb", *sources)
    limits = argparse.Namespace(**vars(LIMITS) | limits)
    return {row[2]: (row[3], row[6]) for row in script.grade(path, tmp_path, limits)}


@pytest.mark.parametrize("name", notebooks())
def test_each_solution_gets_all_points(script, name):
    folder = ROOT / "notebooks" / "solutions"
    rows = script.grade(folder / f"{name}.ipynb", folder, LIMITS)
    assert [row[2] for row in rows] == list(exercises(name))
    assert all(row[3] == row[4] for row in rows), rows


def test_right_wrong_and_empty_answers(script, tmp_path):
    got = graded(
        script,
        tmp_path,
        SETUP,
        RIGHT,
        "check(1, pairs)",
        "dilations = [1, 1, 1, 1]",
        "choice = ...",
    )
    assert got[1] == (2, "")
    assert got[4][0] == 0 and "heard twice" in got[4][1]  # checked though no cell asks for it
    assert got[3] == (0, "nothing filled in")
    assert got[2] == (0, "no check")


def test_an_error_leaves_the_other_cells_standing(script, tmp_path):
    got = graded(script, tmp_path, SETUP, "1 / 0", RIGHT, "raise SystemExit", "check(1, pairs)")
    assert got[1] == (2, "")


def test_a_cell_that_loops_is_stopped(script, tmp_path):
    loop = "while True:\n    pass"
    got = graded(script, tmp_path, SETUP, loop, RIGHT, "check(1, pairs)", cell_seconds=2)
    assert got[1] == (2, "")


def test_a_notebook_that_cannot_be_stopped_is_ended(script, tmp_path):
    stubborn = (
        "import time\nwhile True:\n    try:\n        time.sleep(1)\n"
        "    except BaseException:\n        pass"
    )
    cells = (SETUP, RIGHT, "check(1, pairs)", stubborn)
    got = graded(script, tmp_path, *cells, cell_seconds=2, seconds=20)
    assert got[1] == (2, "")
    assert got[4] == (0, "took longer than 20 s")


def test_a_notebook_that_ends_its_kernel_keeps_what_it_had(script, tmp_path):
    got = graded(script, tmp_path, SETUP, RIGHT, "check(1, pairs)", "import os\nos._exit(1)")
    assert got[1] == (2, "")
    assert got[2] == (0, "the kernel died")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits a process's memory")
def test_memory_is_limited(script, tmp_path):
    wild = "import numpy as np\nx = np.ones(2**30)\ndel pairs"
    got = graded(script, tmp_path, SETUP, RIGHT, wild, "check(1, pairs)", memory=4)
    assert got[1] == (2, "")  # the array could not be made, so pairs was not deleted


def test_files_that_are_no_notebook_of_the_course_get_a_row(script, tmp_path, capsys):
    (tmp_path / "ann").mkdir()
    (tmp_path / "ann" / "broken.ipynb").write_text("{ not json")
    (tmp_path / "ann" / "empty.ipynb").write_text("")
    (tmp_path / "ann" / "list.ipynb").write_text("[1, 2]")
    save(tmp_path / "bob" / "poem.ipynb", "print('a poem')")
    out = tmp_path / "grades.csv"
    assert script.main([str(tmp_path), "--out", str(out)]) == 0
    with open(out, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == [
        "ann/broken.ipynb",
        "ann/empty.ipynb",
        "ann/list.ipynb",
        "bob/poem.ipynb",
    ]
    assert all(row["reason"].startswith("not a notebook") for row in rows[:3])
    assert rows[3]["reason"] == "names no notebook of the course"
    assert "ann/broken.ipynb" in capsys.readouterr().out


def test_a_folder_without_notebooks_and_no_folder(script, tmp_path, capsys):
    with pytest.raises(SystemExit, match=r"holds no \.ipynb"):
        script.main([str(tmp_path)])
    assert script.main([str(tmp_path / "none")]) == 2
    assert "is no folder" in capsys.readouterr().err
