"""What a check found: a verdict, and a line for each case."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Line:
    """One case: its name, the worst error, the budget for it, and words where it is not right."""

    case: str
    error: float
    budget: float
    trouble: str = ""

    def __str__(self):
        verdict = self.trouble or "right"
        return f"{self.case:<24} {self.error:>9.2e} {self.budget:>9.2e}  {verdict}"


@dataclass(frozen=True)
class Report:
    """The outcome of a check; printing it gives a readable table.

    Attributes
    ----------
    title : str
        What was checked.
    lines : list of Line
    hint : str
        Shown instead of a verdict when nothing has been filled in yet.
    """

    title: str
    lines: list = field(default_factory=list)
    hint: str = ""

    @property
    def filled(self):
        """Whether there was anything to check."""
        return bool(self.lines)

    @property
    def passed(self):
        """Whether every case is right."""
        return self.filled and not any(line.trouble for line in self.lines)

    def __str__(self):
        if not self.filled:
            return f"{self.title}: nothing here yet. {self.hint}".rstrip()
        wrong = sum(bool(line.trouble) for line in self.lines)
        verdict = "right" if not wrong else f"not right in {wrong} of {len(self.lines)} cases"
        head = f"{self.title}: {verdict}"
        columns = f"{'case':<24} {'error':>9} {'budget':>9}  verdict"
        return "\n".join([head, columns, *map(str, self.lines)])

    __repr__ = __str__
