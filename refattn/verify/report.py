"""What a check found: a verdict, and a line for each case."""

import json
import math
from dataclasses import asdict, dataclass, field


@dataclass(frozen=True)
class Line:
    """One case: its name, the worst error, the budget for it, words where it is not right, and
    its conditioning: relative change of the truth over relative change of the inputs."""

    case: str
    error: float
    budget: float
    trouble: str = ""
    conditioning: float | None = None

    @property
    def cells(self):
        """The columns of a table, as text."""
        amplified = "" if self.conditioning is None else f"{self.conditioning:.2g}"
        verdict = " ".join(self.trouble.split()) or "right"  # an exception may speak in lines
        return self.case, f"{self.error:.2e}", f"{self.budget:.2e}", amplified, verdict

    def __str__(self):
        return _in_columns(self.cells)


HEADER = ("case", "error", "budget", "condition", "verdict")


@dataclass(frozen=True)
class Report:
    """The outcome of a check; printing it gives a readable table, a notebook shows it with a map
    of the worst case.

    The column "condition" says by how much a case multiplies relative changes of its inputs.

    Attributes
    ----------
    title : str
        What was checked.
    lines : list of Line
    hint : str
        Shown instead of a verdict when nothing has been filled in yet.
    diagnosis : tuple of str
        Known mistakes that the outcome equals, each with a sentence.
    findings : tuple of str
        Where the error sits and how it grows, if it equals none.
    seen : list
        What was given, wanted and got in each case, in float64; not in the JSON.
    """

    title: str
    lines: list = field(default_factory=list)
    hint: str = ""
    diagnosis: tuple = ()
    findings: tuple = ()
    seen: list = field(default_factory=list, repr=False, compare=False)

    @property
    def filled(self):
        """Whether there was anything to check."""
        return bool(self.lines)

    @property
    def passed(self):
        """Whether every case is right."""
        return self.filled and not any(line.trouble for line in self.lines)

    @property
    def worst(self):
        """The array of ``seen`` with the largest error over its budget, a
        ``refattn.verify.findings.parts.Part``; None where none was seen."""
        from refattn.verify.findings.parts import Part  # which imports this module for its lines

        parts = [Part(name, x) for x in self.seen for name in x.got]
        return max(parts, key=lambda part: part.over, default=None)

    @property
    def conditioned(self):
        """Whether the column "condition" has anything in it."""
        return any(line.conditioning is not None for line in self.lines)

    @property
    def head(self):
        """The verdict in a line."""
        if not self.filled:
            return f"{self.title}: nothing here yet. {self.hint}".rstrip()
        wrong = sum(bool(line.trouble) for line in self.lines)
        verdict = "right" if not wrong else f"not right in {wrong} of {len(self.lines)} cases"
        return f"{self.title}: {verdict}"

    @property
    def explained(self):
        """Sentences on what is wrong: the known mistakes, or the findings."""
        known = [f"It equals a known mistake. {mistake}." for mistake in self.diagnosis]
        return [*known, *self.findings]

    def __str__(self):
        if not self.filled:
            return self.head
        width = max(24, *(len(line.case) for line in self.lines))
        table = [HEADER, *(line.cells for line in self.lines)]
        rows = [_in_columns(cells, width, self.conditioned) for cells in table]
        return "\n".join([self.head, *self.explained, *rows])

    __repr__ = __str__

    def _repr_html_(self):
        from refattn.verify.html import page

        return page(self)

    def to_json(self):
        """The report as JSON: title, passed, diagnosis, findings and each line; a number that is
        infinite or NaN is null."""
        lines = [asdict(line) | {"passed": not line.trouble} for line in self.lines]
        for line in lines:
            for name in ("error", "budget", "conditioning"):
                line[name] = _finite(line[name])
        whole = {"title": self.title, "passed": self.passed, "hint": self.hint}
        whole |= {"diagnosis": list(self.diagnosis), "findings": list(self.findings)}
        whole |= {"lines": lines}
        return json.dumps(whole, indent=2, allow_nan=False)


def _in_columns(cells, width=24, conditioned=True):
    case, error, budget, amplified, verdict = cells
    middle = f" {amplified:>9}" if conditioned else ""
    return f"{case:<{width}} {error:>9} {budget:>9}{middle}  {verdict}"


def _finite(x):
    """A plain number, None where there is none."""
    return None if x is None or not math.isfinite(x) else float(x)
