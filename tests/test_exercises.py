"""Each exercise: three typical wrong answers get the right words, a hole gets its hint; and the
kinds of exercises themselves."""

import importlib
import json
import pkgutil

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
    found = pkgutil.iter_modules([str(ROOT / "tests" / "wrong_answers")])
    for name in sorted(module.name[1:] for module in found):
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


def textbook(q, k, v):
    s = q @ k.T * 0.5  # (n, m)
    p = np.exp(s - s.max(axis=1, keepdims=True))
    return p / p.sum(axis=1, keepdims=True) @ v


def rows(q, k, v):
    y = np.empty((len(q), v.shape[1]))
    for i in range(len(q)):
        near = slice(max(0, i - 2), i + 3)
        s = k[near] @ q[i] * 0.5
        p = np.exp(s - s.max())
        y[i] = p / p.sum() @ v[near]
    return y


def by_einsum(q, k, v):
    s = np.einsum("id,jd->ij", q, k) * 0.5
    p = np.exp(s - np.max(s, axis=-1)[:, None])
    return np.einsum("ij,je->ie", p / np.sum(p, axis=-1)[:, None], v)


def by_dot(q, k, v):
    s = np.dot(q, k.T)
    s *= 0.5
    s -= s.max(axis=1)[:, None]
    np.exp(s, out=s)
    return np.tensordot(s / s.sum(axis=1)[:, None], v, axes=1)


@pytest.mark.parametrize("kernel", [textbook, by_einsum, by_dot])
def test_flops_are_those_of_the_cost(kernel):
    q, k, v = np.ones((5, 4)), np.ones((7, 4)), np.ones((7, 3))
    assert count_flops(kernel, q, k, v) == refattn.softmax_attention_cost(5, 7, 4, 3).flops


def test_flops_of_rows_are_those_of_the_pairs():
    q, k, v = np.ones((3, 9, 4))
    wanted = refattn.local_attention_cost(9, 9, 4, 4, window=2).flops
    assert count_flops(rows, q, k, v) == wanted


def test_bookkeeping_is_not_counted():
    a = np.ones((3, 4))
    assert count_flops(lambda a: a.T.reshape(2, 6)[np.arange(2) + 0 > 0], a) == 0
    assert count_flops(lambda a: np.where(np.arange(4) < 2, a, 0), a) == 0
    assert count_flops(lambda a: np.cumsum(a, axis=0), a) == 12
    assert count_flops(lambda a: np.concatenate([a, a]) + 1, a) == 24


def test_a_counted_array_leaves_the_inputs_alone():
    a = np.arange(3.0)

    def doubled(x):
        x *= 2

    assert count_flops(doubled, a) == 3
    np.testing.assert_array_equal(a, [0, 1, 2])


def double(n):
    return 2 * n


FUNCTION = Function(
    "double",
    2,
    double,
    "Two of them.",
    cases=[(1,), (4,)],
    mistakes={"It is the half.": lambda n: n / 2},
)


def test_a_function_right_wrong_and_raising():
    assert FUNCTION.check(double).passed
    assert "It is the half." in str(FUNCTION.check(lambda n: 0.5 * n))
    assert "4: gave 5, expected 8" in str(FUNCTION.check(lambda n: n + 1))
    raised = FUNCTION.check(lambda n: 1 / 0)
    assert "raised ZeroDivisionError" in str(raised) and raised.points == 0
    assert "expected real numbers" in str(FUNCTION.check(lambda n: "8"))


def test_a_function_of_several_parts():
    both = Function("both", 1, lambda n: (n, [n, n]), "", cases=[(1.0,)], parts=("a", "b"))
    assert both.check(lambda n: (n, np.array([n, n]))).passed
    assert both.check(lambda n: [n, [n, n]]).passed
    assert "expected (a, b), got float" in str(both.check(lambda n: n))
    assert "raised" not in str(both.check(lambda n: n))
    assert "expected (a, b), got tuple of 3" in str(both.check(lambda n: (n, n, n)))
    assert "1.0, b" in str(both.check(lambda n: (n, [n, 0])))


def test_a_function_may_not_write_to_its_inputs():
    total = Function("total", 1, lambda x: x.sum(), "", cases=[(np.ones(3),)])

    def careless(x):
        x += 0.5
        return x.sum() - 1.5

    assert "wrote to its inputs" in str(total.check(careless))


def test_a_function_that_does_not_end_is_stopped():
    slow = Function("slow", 1, 1.0, "", seconds=0.1)

    def forever():
        while True:
            pass

    assert "took longer than 0.1 s" in str(slow.check(forever))


KERNEL = Kernel(
    "mine", 4, "softmax_attention", "Scores first.", options={"scale": 0.5},
    flops=lambda n, d: 1.1 * refattn.softmax_attention_cost(n, n, d, d).flops,
    memory=lambda n, d: 4 * 5 * n * n, at=(64, 8), advice="Fewer products.",
)  # fmt: skip


def twice(q, k, v):
    return (textbook(q, k, v) + textbook(q, k, v)) / 2


def test_a_kernel_is_judged_by_its_numbers_and_its_cost():
    assert KERNEL.check(textbook).passed
    dear = KERNEL.check(twice)
    assert dear.points == 2 and "Fewer products." in dear.words and "in part" in str(dear)
    ready = KERNEL.check(lambda q, k, v: refattn.softmax_attention(q, k, v, scale=0.5))
    assert ready.points == 2 and "the count saw no arithmetic" in str(ready)
    wrong = KERNEL.check(lambda q, k, v: textbook(2 * q, k, v))
    assert wrong.points == 0 and "Scores first." in str(wrong)
    assert "expected a function" in str(KERNEL.check(3))


DESIGN = Design(
    "choice",
    4,
    "Larger.",
    lambda x: float(x),
    plain=2,
    best=10,
    notes={"Even.": lambda x: x % 2 == 0},
)


def test_a_design_gets_points_by_its_score():
    assert DESIGN.check(10).passed and DESIGN.check(9.9).passed
    half = DESIGN.check(6)
    assert half.points == 2 and "Even." in str(half) and "score: 6" in str(half)
    assert DESIGN.check(0).points == 0
    assert "Hint: Larger." in str(DESIGN.check(5))
    assert not DESIGN.check([1, ...]).filled and not DESIGN.check({"a": None}).filled

    def refuse(x):
        raise Refused("A whole number.")

    assert "A whole number." in str(Design("none", 1, "", refuse, 0, 1).check(3))
    assert "raised ZeroDivisionError" in str(Design("none", 1, "", lambda x: 1 / x, 0, 1).check(0))


def test_marks_are_written_down_where_a_grader_asks(tmp_path, monkeypatch):
    path = tmp_path / "marks.jsonl"
    monkeypatch.setenv(MARKS, str(path))
    check = checker("02_local")
    check(1, lambda n, left, right: n)
    check(4, [1, 3, 9, 27])
    first, second = (json.loads(line) for line in path.read_text().splitlines())
    assert (first["notebook"], first["exercise"], first["points"]) == ("02_local", 1, 0)
    assert "expected 51" in first["reason"]
    assert second["points"] == second["of"] == 2 and second["reason"] == ""
    with pytest.raises(ValueError, match="no 9"):
        check(9, 1)
    with pytest.raises(ValueError, match="no exercises for"):
        checker("99_none")
