"""Each exercise: three typical wrong answers get the right words, a hole gets its hint; and the kinds
of exercises themselves."""

import importlib
import json

import nbformat
import numpy as np
import pytest

import refattn
from refattn.exercises import MARKS, checker, exercises, notebooks
from refattn.exercises.base import Design, Function, Kernel, Refused
from refattn.exercises.counting import count_flops
from test_setup import ROOT

ALL = [(name, number) for name in notebooks() for number in exercises(name)]


def wrong_answers(name):
    return importlib.import_module(f"wrong_answers.n{name}").WRONG


def cases():
    for name in notebooks():
        for number, pairs in wrong_answers(name).items():
            for i, (answer, words) in enumerate(pairs):
                yield pytest.param(name, number, answer, words, id=f"{name}-{number}-{i}")


@pytest.mark.parametrize(("name", "number", "answer", "words"), list(cases()))
def test_a_wrong_answer_is_told_what_is_wrong(name, number, answer, words):
    mark = exercises(name)[number].check(answer)
    assert mark.points < mark.of
    assert words in str(mark), str(mark)
    assert mark.head in mark._repr_html_()


@pytest.mark.parametrize("name", notebooks())
def test_each_exercise_has_three_wrong_answers(name):
    wrong = wrong_answers(name)
    assert set(wrong) == set(exercises(name)) and len(wrong) >= 3
    assert all(len(pairs) >= 3 for pairs in wrong.values())


@pytest.mark.parametrize(("name", "number"), ALL)
def test_a_hole_gets_the_hint(name, number):
    exercise = exercises(name)[number]
    hole = ... if isinstance(exercise, Design) else lambda *args: None
    mark = exercise.check(hole)
    assert not mark.filled and mark.points == 0
    assert exercise.hint in str(mark) and "nothing here yet" in str(mark)


@pytest.mark.parametrize("name", notebooks())
@pytest.mark.parametrize("folder", ["notebooks", "notebooks/solutions"])
def test_the_notebook_asks_for_each_exercise(name, folder):
    nb = nbformat.read(ROOT / folder / f"{name}.ipynb", as_version=4)
    code = [cell.source for cell in nb.cells if cell.cell_type == "code"]
    assert any(f'checker("{name}")' in source for source in code)
    for number in exercises(name):
        assert any(source.startswith(f"# Exercise {number}\n") for source in code)
        assert any(f"check({number}, " in source for source in code)
