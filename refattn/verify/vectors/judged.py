"""A vector in the hands of a user's test: arrays of a library, and a verdict with words."""

from dataclasses import dataclass, field, replace

import numpy as np

import refattn
from refattn.verify.call import Caller
from refattn.verify.cases import Trial, cast
from refattn.verify.check import Seen
from refattn.verify.compare import numbers
from refattn.verify.findings import findings
from refattn.verify.libraries import WrongKind, library_of
from refattn.verify.like import HOUSE, Reference, convention_of
from refattn.verify.mistakes import equal_mistakes
from refattn.verify.report import Report
from refattn.verify.vectors.case import Case, as_numpy
from refattn.verify.visible import visible
from refattn.verify.wanted import Wanted

FAINT = -8.0  # keys whose features elu makes as small as some epsilons
RETURNS = "return_lse", "return_state"  # what comes back, not how it is computed
LEAKS = (
    "NaN or infinities stand in what nobody may see, and come through: 0 times NaN is NaN, so a "
    "weight of 0 does not hide a value."
)


@dataclass(frozen=True)
class Judged:
    """A case with its arrays as a library has them.

    ``q``, ``k``, ``v``, ``dy`` and the other inputs are attributes; ``options`` is what the
    mechanism takes beside them, keyword by keyword.

    Attributes
    ----------
    case : Case
        As it is stored.
    like : str or Convention, optional
        Whose arrays and layout q, k, v and the answers have; NumPy's and (..., n, d) if None.

    Examples
    --------
    >>> from refattn.verify.vectors import load
    >>> case = Judged(load(mechanism="softmax_attention", dtype="float64")[0])
    >>> case.check(y=np.zeros((13, 7)))
    Traceback (most recent call last):
    ...
    AssertionError: softmax_attention/odd sizes/float64: y not right
    ...
    """

    case: Case
    like: object = None
    name: str = field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "name", self.case.name)

    def __getattr__(self, name):
        inputs = object.__getattribute__(self, "case").inputs
        if name in inputs:
            return self._given(inputs[name], laid_out=name in ("q", "k", "v", "dy"))
        kept = ("mechanism", "dtype", "label", "wanted", "budget", "error", "inputs")
        if name in kept:
            return getattr(self.case, name)
        raise AttributeError(f"{self.case.name} has no {name}; it has {', '.join(inputs)}")

    def __repr__(self):
        return f"<{self.case.name}>"

    @property
    def convention(self):
        return convention_of(self.like)

    @property
    def library(self):
        return library_of(self.convention.arrays)

    @property
    def options(self):
        """Keyword arguments; arrays as the library has them, a csr mask dense where it has none."""
        options = self.case.options.items()
        return {name: self._option(x) for name, x in options if name not in RETURNS}

    def check(self, **answers):
        """AssertionError where an answer, y=..., dq=..., is not right, with words on what is wrong:
        the known mistake that it equals, or where the error sits."""
        __tracebackhide__ = True
        plain = {part: self._plain(part, x) for part, x in answers.items()}
        lines = self.case.compare(plain)
        if not any(line.trouble for line in lines):
            return
        seen = self._seen(plain)
        known, found = (), ()
        if self._leaks(plain):
            found = (LEAKS,)
        elif seen is not None:
            reference = Reference(self.mechanism)
            mistakes = equal_mistakes(self.mechanism, reference, [seen])
            known = tuple(f"{m.name}: {m.tells}" for m in mistakes)
            found = () if known else findings([seen])
        raise AssertionError(self._words(lines, known, found))

    def assert_right(self, y):
        """``check`` of the output alone."""
        __tracebackhide__ = True
        self.check(y=y)

    def assert_gradients(self, **gradients):
        """``check`` of dq=..., dk=... and so on."""
        __tracebackhide__ = True
        self.check(**gradients)

    def _leaks(self, plain):
        """Whether a NaN comes out where NaN or infinities went in that nobody may see."""
        hidden = not all(np.isfinite(self.case.inputs[x].astype(float)).all() for x in self.inputs)
        answers = [y for y in map(numbers, plain.values()) if y is not None]
        return hidden and any(np.isnan(y).any() for y in answers)

    def _words(self, lines, known, found):
        """A report of one case, whose lines are arrays."""
        lines = [replace(line, case=line.case.rpartition(": ")[2]) for line in lines]
        wrong = [line.case for line in lines if line.trouble]
        _, rest = str(Report(self.name, lines, diagnosis=known, findings=found)).split("\n", 1)
        return f"{self.name}: {', '.join(wrong)} not right\n{rest}"

    def _given(self, x, laid_out=False):
        if isinstance(x, tuple):
            return tuple(self._given(part) for part in x)
        if self.convention is HOUSE:
            return x.copy()
        if laid_out:
            x = _with_heads(x, x.ndim)
            x = Caller(None, layout=self.convention.layout)._laid_out(x)
        return self.library.give(np.ascontiguousarray(x).copy())

    def _option(self, x):
        if hasattr(x, "indptr"):
            return x.copy() if self.convention.arrays == "numpy" else self._given(x.toarray())
        return self._given(x) if isinstance(x, (np.ndarray, tuple)) and _arrays(x) else x

    def _plain(self, part, y):
        """An answer in refattn's layout, without the axes that were added for the library."""
        y = as_numpy(y)
        wanted = self.case.wanted.get(part)
        if self.convention is HOUSE or wanted is None or not hasattr(y, "shape"):
            return y
        if part in ("y", "dq", "dk", "dv"):
            turned = Caller(None, layout=self.convention.layout)._laid_out  # its own inverse
            expected = turned(_with_heads(wanted, wanted.ndim)).shape
            if y.shape != expected:
                return WrongKind(f"has shape {tuple(y.shape)}, expected {expected}")
            return turned(np.asarray(y)).reshape(wanted.shape)
        missing = y.ndim - wanted.ndim
        if missing > 0 and y.shape == (1,) * missing + wanted.shape:
            y = y.reshape(wanted.shape)
        return y

    def _seen(self, plain):
        """The case as a diagnosis takes it; None where there is none for this mechanism."""
        case = self.case
        if not hasattr(refattn, f"{case.mechanism}_vjp"):
            return None
        q, k, v = (case.inputs[name] for name in "qkv")
        if case.wanted["y"].shape[-2] != q.shape[-2]:  # blocks fused into one
            return None
        lead = np.broadcast_shapes(*(x.shape[:-2] for x in (q, k, v)))
        whole = [np.broadcast_to(x, (*lead, *x.shape[-2:])) for x in (q, k, v)]
        dy = case.inputs.get("dy", np.zeros(case.wanted["y"].shape, q.dtype))
        options = {
            name: cast(x, np.float64)
            for name, x in case.options.items()
            if name not in ("return_lse", "return_state")
        }
        wanted = {
            part: Wanted(case.wanted[part], case.budget[part], 1.0)
            for part in ("y", "dq", "dk", "dv")
            if part in case.wanted
        }
        got = {part: numbers(y) for part, y in plain.items() if part in wanted}
        got = {
            part: y
            for part, y in got.items()
            if y is not None and y.shape == wanted[part].value.shape
        }
        if not got:
            return None
        return Seen(Trial(case.label, *whole, dy), options, wanted, got)


def differs(case, convention):
    """Why a library's right answer is another one, or why it cannot be asked; "" where it is ours.

    >>> from refattn.verify.like import CONVENTIONS
    >>> from refattn.verify.vectors import load
    >>> case = load(mechanism="softmax_attention", dtype="float32")[3]
    >>> case.name, differs(case, CONVENTIONS["torch"])
    ('softmax_attention/causal, more keys/float32', 'causal is top-left there')
    """
    if convention is HOUSE or "q" not in case.inputs:
        return ""
    q, k, v = (case.inputs[name] for name in "qkv")
    n, m = q.shape[-2] if q.ndim > 1 else 1, k.shape[-2] if k.ndim > 1 else 1
    linear = case.mechanism.startswith("linear_")
    options = case.options
    aligned = options.get("causal") or "window" in options
    if aligned and n != m and convention.causal != HOUSE.causal:
        return f"causal is {convention.causal} there"
    if "window" in options and convention.window == "counts itself":
        return f"a window {convention.window} there"
    if convention.empty_row != HOUSE.empty_row and not linear and _empty(n, m, options):
        return f"a query with nothing to attend gives {convention.empty_row} there"
    shows = case.dtype == "float64" or np.nanmin(k, initial=0) < FAINT  # more than rounding does
    if linear and convention.epsilon and options.get("normalize", True) and shows:
        return "an epsilon is added there"
    if linear and convention.scaled_linear and not options.get("normalize", True):
        return "queries are scaled there"
    if convention.same_columns and q.shape[-1] != v.shape[-1]:
        return "v has as many columns as k there"
    if max(x.ndim for x in (q, k, v)) > 4 or len({x.shape[:-2] for x in (q, k, v)}) > 1:
        return "batch and heads are those of q, k and v alike there"
    return ""


def _empty(n, m, options):
    mask = options.get("mask")
    if mask is None and options.get("bias") is None and n <= m and "window" not in options:
        return False
    return not visible(n, m, options).any(axis=-1).all()


def _with_heads(x, ndim):
    """(batch, heads, rows, columns)."""
    return x.reshape((1,) * (4 - ndim) + x.shape) if ndim < 4 else x


def _arrays(x):
    return all(isinstance(part, np.ndarray) for part in (x if isinstance(x, tuple) else (x,)))
