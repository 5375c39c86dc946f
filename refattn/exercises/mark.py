"""The outcome of an exercise."""

from dataclasses import dataclass, replace
from html import escape

from refattn.verify.report import Report


@dataclass(frozen=True)
class Mark:
    """What is right or wrong with an answer; printing it, or showing it in a notebook, explains.

    Attributes
    ----------
    title : str
    points, of : float, int
        Points that it gets, and the most there are.
    words : tuple of str
        What is wrong, or what would make it better; the hint while nothing is filled in.
    score : str
        What the answer costs or reaches, beside the best known.
    report : Report, optional
        The cases, where there are several.
    filled : bool
        Whether there was an answer.
    """

    title: str
    of: int
    points: float = 0.0
    words: tuple = ()
    score: str = ""
    report: Report | None = None
    filled: bool = True

    @property
    def passed(self):
        """Whether it has all its points."""
        return self.points == self.of

    @property
    def head(self):
        """The verdict in a line."""
        if not self.filled:
            return f"{self.title}: nothing here yet."
        verdict = "right" if self.passed else "not right yet" if not self.points else "in part"
        return f"{self.title}: {verdict}, {self.points:g} of {self.of} points."

    @property
    def lines(self):
        """All that is said, without the table."""
        return [self.head, *filter(None, [self.score]), *self.words]

    @property
    def cases(self):
        """The report to be shown below the words: of an answer that fails in some case."""
        if self.report is None or self.report.passed:
            return None
        return replace(self.report, diagnosis=(), findings=())  # they stand among the words

    def __str__(self):
        table = [] if self.cases is None else str(self.cases).splitlines()[1:]
        return "\n".join([*self.lines, *table])

    __repr__ = __str__

    def _repr_html_(self):
        from refattn.verify.html import page

        first, *rest = (escape(line) for line in self.lines)
        items = "".join(f"<li>{line}</li>" for line in rest)
        table = "" if self.cases is None else page(self.cases)
        return f"<p><strong>{first}</strong></p><ul>{items}</ul>{table}"

    def as_dict(self):
        """For the grade book: points, the most there are, the score, the reason."""
        reason = " ".join([*self.words, *self._trouble()])
        if not self.filled:
            reason = "nothing filled in"
        return {"points": self.points, "of": self.of, "score": self.score, "reason": reason}

    def _trouble(self):
        wrong = [line for line in self.report.lines if line.trouble] if self.report else []
        return [f"{wrong[0].case}: {wrong[0].trouble}"] if wrong else []
