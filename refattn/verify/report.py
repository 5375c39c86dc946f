"""What a check found: a verdict, and a line for each case."""

import json
import math
from dataclasses import asdict, dataclass, field


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
    diagnosis : tuple of str
        Known mistakes that the outcome equals, each with a sentence.
    """

    title: str
    lines: list = field(default_factory=list)
    hint: str = ""
    diagnosis: tuple = ()

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
        known = [f"It equals a known mistake. {mistake}." for mistake in self.diagnosis]
        return "\n".join([head, *known, columns, *map(str, self.lines)])

    __repr__ = __str__

    def to_json(self):
        """The report as JSON: title, passed, diagnosis, and each line; an endless error is null."""
        lines = [asdict(line) | {"passed": not line.trouble} for line in self.lines]
        for line in lines:
            line["error"] = line["error"] if math.isfinite(line["error"]) else None
        whole = {"title": self.title, "passed": self.passed, "hint": self.hint}
        whole |= {"diagnosis": list(self.diagnosis), "lines": lines}
        return json.dumps(whole, indent=2)
