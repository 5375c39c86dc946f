"""Kinds of exercises: a function or a value, a kernel, a design."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from refattn.course import measure
from refattn.exercises.counting import count_flops
from refattn.exercises.mark import Mark
from refattn.verify.call import time_limit
from refattn.verify.check import check as hold
from refattn.verify.compare import compare, error_of, numbers
from refattn.verify.libraries import WrongKind
from refattn.verify.report import Report

UNSEEN = (
    "Right, but the count saw no arithmetic: write the formula with NumPy on q, k and v as they "
    "come (np.asarray hides them from the count, and a ready attention is no answer)."
)


class Refused(ValueError):
    """An answer of a form that has no score; the message says what was wanted."""


class Unfilled(Exception):
    """Raised by a score for a choice that is a function, and a hole still."""


def unfilled(exercise):
    """The mark of a hole: the exercise's hint."""
    return Mark(exercise.title, exercise.points, words=(exercise.hint,), filled=False)


@dataclass(frozen=True)
class Function:
    """A function, or with no cases a value, to be equal to ``truth`` on every case.

    Parameters
    ----------
    title : str
    points : int
    truth : callable or value
        What is right; a tuple has several parts.
    hint : str
        Said while nothing is filled in.
    cases : list of tuple, or a function that gives it
        Arguments; ``[()]`` for an answer that is no function.
    tolerance : float or function of the right answer
        Largest absolute error that is right.
    mistakes : {sentence: function or value}
        Wrong answers, each with what to say when the answer equals it on every case.
    parts : tuple of str
        Names of the parts of a tuple.
    seconds : float
        For one case.
    """

    title: str
    points: int
    truth: object
    hint: str
    cases: object = ((),)
    tolerance: object = 0.0
    mistakes: dict = field(default_factory=dict)
    parts: tuple = ()
    seconds: float = 20.0

    def check(self, answer):
        cases = self.cases() if callable(self.cases) else self.cases
        wanted = [_split(_called(self.truth, case), self.parts) for case in cases]
        given = [self._given(answer, case) for case in cases]
        if all(x is None or x is ... for x in given):
            return unfilled(self)
        lines, got = [], []
        for case, x, want in zip(cases, given, wanted, strict=True):
            x = self._parted(x)
            got.append(x)
            for part, w in want.items():
                name = ", ".join(filter(None, [_short(case), part])) or self.title
                y = x if isinstance(x, BaseException) else x[part]
                lines.append(compare(name, y, np.asarray(w, float), self._slack(w)))
        report = Report(self.title, lines)
        if report.passed:
            return Mark(self.title, self.points, points=self.points, report=report)
        words = self._equal(cases, got) or (_first_wrong(report), f"Hint: {self.hint}")
        return Mark(self.title, self.points, words=words, report=report)

    def _given(self, answer, case):
        """The answer to a case; an exception in its place; inputs are the caller's to keep."""
        case = copy.deepcopy(case)
        kept = copy.deepcopy(case)
        try:
            with time_limit(self.seconds):
                given = _called(answer, case)
        except (Exception, SystemExit) as error:
            return error
        if not all(
            np.array_equal(a, b, equal_nan=_real(a)) for a, b in zip(case, kept, strict=True)
        ):
            return WrongKind("wrote to its inputs: work on a copy")
        return given

    def _parted(self, given):
        """{part: value}, or the exception in its place; a list or an array of parts will do."""
        if isinstance(given, BaseException) or not self.parts:
            return given if isinstance(given, BaseException) else {"": given}
        several = isinstance(given, (tuple, list)) or np.ndim(given) > 0
        if not several or len(given) != len(self.parts):
            came = type(given).__name__ + (f" of {len(given)}" if several else "")
            return WrongKind(f"expected ({', '.join(self.parts)}), got {came}")
        return dict(zip(self.parts, given, strict=True))

    def _slack(self, wanted):
        return float(self.tolerance(wanted) if callable(self.tolerance) else self.tolerance)

    def _equal(self, cases, got):
        """The sentence of the first mistake that the answer equals."""
        if any(isinstance(x, BaseException) for x in got):
            return ()
        for sentence, wrong in self.mistakes.items():
            with np.errstate(all="ignore"):
                outputs = [_split(_called(wrong, copy.deepcopy(c)), self.parts) for c in cases]
            if all(self._same(x, y) for x, y in zip(got, outputs, strict=True)):
                return (sentence,)
        return ()

    def _same(self, got, wrong):
        for name, w in wrong.items():
            y, w = numbers(got[name]), np.asarray(w, float)
            if y is None or y.shape != w.shape:
                return False
            size = np.max(abs(w), initial=0, where=np.isfinite(w))
            error = np.max(error_of(y, w), initial=0)
            if not error <= max(self._slack(w), 1e-9 * size):  # NaN is not the same either
                return False
        return True


@dataclass(frozen=True)
class Kernel:
    """A function (q, k, v) -> y to be equal to one of refattn's attentions.

    Parameters
    ----------
    title, points, hint
        As of ``Function``.
    mechanism : str
    options : dict, or a function that gives it
    cases, dtype
        Of ``refattn.verify.check``.
    mistakes : {sentence: kernel}
        Wrong kernels beyond those that the check knows.
    flops : function (n, d) -> float, optional
        What it may cost on n tokens of d columns; more gets half of the points.
    memory : function (n, d) -> float, optional
        Bytes that it may take beyond inputs and output, likewise.
    at : (n, d)
        Where cost and memory are taken.
    advice : str
        What to say to one that is right and costs too much.
    """

    title: str
    points: int
    mechanism: str
    hint: str
    options: object = field(default_factory=dict)
    cases: object = "default"
    dtype: str = "float32"
    mistakes: dict = field(default_factory=dict)
    flops: Callable | None = None
    memory: Callable | None = None
    at: tuple = (1024, 32)
    advice: str = ""

    def check(self, answer):
        if answer is None or answer is ...:
            return unfilled(self)
        if not callable(answer):
            words = f"expected a function of q, k and v, got {type(answer).__name__}"
            return Mark(self.title, self.points, words=(words,))
        options = self.options() if callable(self.options) else self.options
        report = hold(
            answer, self.mechanism, cases=self.cases, dtype=self.dtype, title=self.title, **options
        )
        if not report.filled:
            return unfilled(self)
        if not report.passed:
            words = self._equal(report) or tuple(report.explained)
            words = words or (_first_wrong(report),)
            words = (*words, f"Hint: {self.hint}")
            return Mark(self.title, self.points, words=words, report=report)
        score, dear, unseen = self._cost(answer)
        if dear or unseen:
            words = (UNSEEN,) if unseen else (self.advice,) if self.advice else ()
            return Mark(self.title, self.points, self.points / 2, words, score, report)
        return Mark(self.title, self.points, self.points, (), score, report)

    def _equal(self, report):
        for sentence, wrong in self.mistakes.items():
            if report.seen and all(self._same(wrong, x) for x in report.seen):
                return (sentence,)
        return ()

    def _same(self, wrong, seen):
        """Whether the answer's error is that of a wrong kernel, up to rounding."""
        with np.errstate(all="ignore"):
            y = np.asarray(wrong(*(x.astype(float) for x in seen.trial.inputs)), float)
        part = seen.wanted["y"]
        if "y" not in seen.got or y.shape != seen.got["y"].shape:
            return False
        budget = part.budget + 64 * seen.eps * np.max(abs(y), initial=0, where=np.isfinite(y))
        return bool(np.all(error_of(seen.got["y"], y) <= budget))

    def _cost(self, answer):
        """Words for what it costs, whether that is too much, and whether the count saw nothing."""
        if self.flops is None and self.memory is None:
            return "", False, False
        n, d = self.at
        arrays = np.random.default_rng(1).standard_normal((3, n, d)).astype(np.float32)
        said, dear, unseen = [], False, False
        if self.flops is not None:
            used, most = count_flops(answer, *arrays), self.flops(n, d)
            said.append(f"{used:,} FLOPs on {n} tokens of {d} columns (at most {round(most):,})")
            dear, unseen = used > most, used == 0
        if self.memory is not None:
            used, most = measure(lambda: answer(*arrays), repeat=1).peak, self.memory(n, d)
            # In halves of a megabyte: the last bytes are Python's own and change from run to run.
            said.append(f"{_megabytes(used)} beyond inputs and output (at most {_megabytes(most)})")
            dear |= used > most
        return "score: " + ", ".join(said), dear, unseen


@dataclass(frozen=True)
class Design:
    """A choice with a score, from that of a plain choice to the best known.

    Parameters
    ----------
    title, points, hint
        As of ``Function``.
    score : function of the choice
        A number; raises ``Refused`` with what was wanted for a choice that has none: of another
        form, over the budget.
    plain, best : float, or functions that give it
        The score that gets no points, and the one that gets all; the smaller is the better where
        ``best`` is smaller.
    unit : str
        What the score counts.
    notes : {sentence: function of the choice}
        What to say where the function is true.
    enough : float
        Share of the way from plain to best that gets all points.
    """

    title: str
    points: int
    hint: str
    score: Callable
    plain: object
    best: object
    unit: str = ""
    notes: dict = field(default_factory=dict)
    enough: float = 0.98

    def check(self, answer):
        if _hollow(answer):
            return unfilled(self)
        try:
            with time_limit(60.0):
                score = self.score(copy.deepcopy(answer))
        except Unfilled:
            return unfilled(self)
        except Refused as error:
            return Mark(self.title, self.points, words=(str(error), *self._notes(answer)))
        except (Exception, SystemExit) as error:
            words = (f"raised {type(error).__name__}: {error}", f"Hint: {self.hint}")
            return Mark(self.title, self.points, words=words)
        plain, best = (x() if callable(x) else x for x in (self.plain, self.best))
        share = (score - plain) / (best - plain) / self.enough
        points = round(self.points * min(1.0, max(0.0, share)), 1)
        said = f"score: {score:.4g} {self.unit}".rstrip()
        said += f" (a plain choice: {plain:.4g}, the best known: {best:.4g})"
        words = self._notes(answer) if points < self.points else ()
        if points < self.points and not words:
            words = (f"Hint: {self.hint}",)
        return Mark(self.title, self.points, points, words, said)

    def _notes(self, answer):
        for sentence, applies in self.notes.items():
            try:
                if applies(copy.deepcopy(answer)):
                    return (sentence,)
            except Exception:  # a note about one form of choice says nothing of another
                continue
        return ()


def _hollow(answer):
    """Whether nothing, or not everything, has been filled in."""
    if isinstance(answer, dict):
        answer = list(answer.values())
    if isinstance(answer, (tuple, list)):
        return any(_hollow(x) for x in answer)
    return answer is None or answer is ...


def _called(function, case):
    return function(*case) if callable(function) else function


def _split(value, parts):
    return dict(zip(parts, value, strict=True)) if parts else {"": value}


def _real(x):
    return np.asarray(x).dtype.kind in "fc"


def _short(case):
    """The arguments of a case in a few words."""
    return ", ".join(f"{np.shape(x)}" if np.ndim(x) else str(x) for x in case)


def _first_wrong(report):
    line = next(line for line in report.lines if line.trouble)
    return f"{line.case}: {line.trouble}" if line.case != report.title else line.trouble


def _megabytes(count):
    return f"{round(count / 5e5) / 2:g} MB"
