"""What the notebooks share: sizes, measuring, figures, and the summary table.

Environment: REFATTN_FAST=1 asks for small sizes; REFATTN_FIGURES names the folder that figures are
written to (build/figures beside the package's clone, if unset). Matplotlib is imported when used.
"""

import csv
import os
import textwrap
import time
import tracemalloc
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from refattn.datasets import load_heads
from refattn.examples import examples
from refattn.softmax import softmax_attention

FAST = os.environ.get("REFATTN_FAST") == "1"
STYLE = Path(__file__).parent / "data" / "course.mplstyle"


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


def use_style():
    """The course's look for Matplotlib: told apart in greyscale, and the same file every run."""
    import matplotlib.pyplot as plt

    plt.style.use(STYLE)


def figures_folder():
    """Where figures are written."""
    default = Path(__file__).parents[1] / "build" / "figures"
    return Path(os.environ.get("REFATTN_FIGURES", default))


def save_figure(figure, name, **columns):
    """Write NAME.svg, and the numbers behind it as data/NAME.csv: one column a keyword.

    Columns must be of one length; a single value fills its column.
    """
    folder = figures_folder()
    (folder / "data").mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
    values = np.broadcast_arrays(*(np.asarray(c) for c in columns.values()))
    write_csv(folder / "data" / f"{name}.csv", list(columns), zip(*values, strict=True))


def write_csv(path, header, rows):
    """A CSV file with floats to six significant digits."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows([_short(x) for x in row] for row in rows)


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


def _short(x):
    return f"{x:.6g}" if isinstance(x, (float, np.floating)) else x
