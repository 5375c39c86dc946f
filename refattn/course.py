"""What the notebooks share: sizes, measuring, the summary table; figures are in
``refattn.plots``.

Environment: REFATTN_FAST=1 asks for small sizes; REFATTN_FIGURES names the folder that figures are
written to (build/figures beside the package's clone, if unset). Matplotlib is imported when used.
"""

import contextlib
import ctypes
import gc
import sys
import textwrap
import time
import tracemalloc
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from refattn.datasets import load_heads
from refattn.examples import examples
from refattn.plots import (
    FAST,
    draw_growth,
    explore,
    figures_folder,
    growth_columns,
    save_figure,
    use_style,
    write_csv,
)
from refattn.softmax import softmax_attention

__all__ = [
    "Growth",
    "Measurement",
    "by_mode",
    "draw_growth",
    "explore",
    "figures_folder",
    "growth",
    "growth_columns",
    "measure",
    "relative_error",
    "resident",
    "save_figure",
    "slope",
    "summary",
    "table",
    "use_style",
    "write_csv",
]


def by_mode(full, fast):
    """``full``, or ``fast`` when REFATTN_FAST=1: sizes for reading and for testing."""
    return fast if FAST else full


@dataclass(frozen=True)
class Measurement:
    """Median and fastest time of a call in seconds, and the peak of NumPy's memory in bytes."""

    seconds: float
    fastest: float
    peak: int


def measure(function, *, repeat=5, budget=1.0):
    """Time ``function()`` and find the memory it takes beyond what it is given and returns
    (an array or a tuple of arrays).

    Runs once to warm up and once more for the memory, then up to ``repeat`` times or until
    ``budget`` seconds are spent.
    """
    function()
    tracemalloc.start()
    result = function()
    kept = result if isinstance(result, tuple) else (result,)
    peak = tracemalloc.get_traced_memory()[1] - sum(getattr(x, "nbytes", 0) for x in kept)
    tracemalloc.stop()
    times = []
    while len(times) < repeat and sum(times) < budget:
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return Measurement(float(np.median(times)), min(times), max(0, peak))


def resident(function, *, warm=True):
    """Bytes by which a call raises the process's memory at its peak, what it returns left out: for
    compiled code, which NumPy's own count does not see.

    Calls ``function()`` once more before, unless ``warm`` is False. Exact on Linux; elsewhere what
    lies beyond the peak so far, and NaN where the system does not tell at all.
    """
    if warm:
        function()
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)  # else what is free in the heap is used, and not seen
    try:
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        before, peak = _status("VmRSS:"), lambda: _status("VmHWM:")
    except OSError:
        before, peak = _highest(), _highest
    result = function()
    kept = result if isinstance(result, tuple) else (result,)
    used = peak() - before - sum(getattr(x, "nbytes", 0) for x in kept)
    return max(0, used) if used == used else used  # NaN stays NaN


def _status(key):
    with open("/proc/self/status", encoding="ascii") as lines:
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))


def _highest():
    """The process's peak so far in bytes; NaN where the system does not tell."""
    try:
        import resource
    except ImportError:
        return float("nan")
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@dataclass(frozen=True)
class Growth:
    """What one attention takes for several numbers of tokens, measured and counted."""

    label: str
    n: np.ndarray
    seconds: np.ndarray
    peak: np.ndarray
    flops: np.ndarray
    workspace: np.ndarray

    @property
    def compiled(self):
        return "Numba" in self.label

    @property
    def mechanism(self):
        return self.label.replace(", Numba", "").replace(", NumPy", "")

    def slope(self, what="seconds"):
        """Fitted slope of "seconds" or "peak" against n on the four largest sizes."""
        y = getattr(self, what)[-4:]
        seen = y > (4e6 if what == "peak" and self.compiled else 0)  # two huge pages are noise
        return slope(self.n[-4:], y) if np.all(seen) else float("nan")


def growth(runs, sizes, *, d=64, budget=1.0, seed=0):
    """Measure attentions on one head of random float32 input, N = n = m tokens of d columns.

    Parameters
    ----------
    runs : {label: (run, cost)}
        ``run(q, k, v)`` and ``cost(n) -> Cost``. Memory is NumPy's peak; for a label that holds
        "Numba" that of the process.
    sizes : list of int, or {label: list of int}
    d : int
    budget : float
        Seconds for each measurement.

    Returns
    -------
    list of Growth
    """
    rng, found = np.random.default_rng(seed), []
    for label, (run, cost) in runs.items():
        tokens = np.array(sizes[label] if isinstance(sizes, dict) else sizes)
        rows = []
        for n in tokens:
            q, k, v = rng.standard_normal((3, n, d), dtype=np.float32)
            call = lambda: run(q, k, v)  # noqa: B023, it is called before the next n
            took, counted = measure(call, budget=budget), cost(int(n))
            peak = resident(call) if "Numba" in label else took.peak
            rows.append((took.seconds, peak, counted.flops, counted.workspace))
        found.append(Growth(label, tokens, *np.array(rows, float).T))
    return found


def slope(x, y):
    """The p of a least-squares fit y = c x^p: the slope of log y over log x.

    >>> round(slope([1, 2, 4], [3, 12, 48]), 6)
    2.0
    """
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def relative_error(y, exact):
    """Size of the difference over the size of ``exact`` (Frobenius norms of the last two axes)."""
    size = np.sqrt((np.asarray(exact, float) ** 2).sum(axis=(-2, -1)))
    return np.sqrt(((np.asarray(y, float) - exact) ** 2).sum(axis=(-2, -1))) / size


def summary(csv=None, *, progress=False):
    """Every mechanism on the real heads: cost, time, and error against exact attention.

    Parameters
    ----------
    csv : path, optional
        Also write the table there.
    progress : bool
        Show a progress bar.

    Returns
    -------
    str
        Counted FLOPs, bytes and workspace are of one head in float32; the time is NumPy's for one
        head; the error is |y - exact| / |exact|, the median over the heads, and its range.
    """
    from tqdm import tqdm

    heads = load_heads()
    count, n, d = heads.q.shape
    exact = softmax_attention(*(x.astype(np.float64) for x in (heads.q, heads.k, heads.v)))
    header = ["mechanism", "N", "FLOPs", "bytes", "workspace", "ms", "error", "least", "most"]
    rows = []
    for example in tqdm(examples(n, d), desc="summary", disable=not progress, leave=False):
        error = relative_error(
            example.attention(heads.q, heads.k, heads.v, **example.options), exact
        )
        took = measure(
            lambda one=example: one.attention(heads.q, heads.k, heads.v, **one.options), repeat=3
        )
        cost = example.counted(n, d)
        sizes = [cost.flops, cost.bytes, cost.workspace, 1e3 * took.seconds / count]
        rows.append([example.label, n, *sizes, np.median(error), error.min(), error.max()])
    if csv is not None:
        write_csv(csv, header, rows)
    legend = (
        f"One head, float32, {count} trained heads of {n} tokens: FLOPs, bytes in and out and "
        "workspace in bytes as counted; ms of NumPy a head; error = |y - exact| / |exact|: the "
        "median over the heads, the least and the most."
    )
    return f"{table(header, rows)}\n\n{textwrap.fill(legend, 100)}"


def table(header, rows):
    """Rows under a header, as text in columns."""
    cells = [header] + [[_readable(x) for x in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = []
    for row in cells:
        numbers = [cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *numbers]))
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _readable(x):
    if isinstance(x, str):
        return x
    return f"{x:,}" if isinstance(x, (int, np.integer)) else f"{x:.2g}" if x < 10 else f"{x:.1f}"
