"""A report as a notebook shows it: verdict, sentences, table, and a map of the worst errors."""

import base64
import io
from html import escape

import numpy as np

from refattn.plots import STYLE
from refattn.verify.findings.parts import Part
from refattn.verify.report import HEADER

LOWEST = -3.0  # errors below a thousandth of the budget look alike
MOST = 256  # rows and columns of a map; beyond, a cell is the largest of several
AS_BAD = 100.0  # an array this many times less wrong may be drawn for a smaller one
RIGHT, WRONG = "✓", "✗"
CONDITION = "condition: by how much a case multiplies relative changes of its inputs."
CELL = 'style="text-align: {}; padding: 0.1em 0.8em;"'


def page(report):
    """The report as an HTML fragment; with a map where it failed and Matplotlib is there."""
    if not report.filled:
        return f"<p>{escape(report.head)}</p>"
    sign = RIGHT if report.passed else WRONG
    parts = [f"<p><strong>{sign} {escape(report.head)}</strong></p>"]
    if report.explained:
        items = "".join(f"<li>{escape(sentence)}</li>" for sentence in report.explained)
        parts.append(f"<ul>{items}</ul>")
    parts.append(_table(report))
    part = mapped(report)
    if part is not None:
        parts.append(_figure(part))
    return f"<div>{''.join(parts)}</div>"


def _table(report):
    shown = [i for i, name in enumerate(HEADER) if name != "condition" or report.conditioned]
    rows = [_row([HEADER[i] for i in shown], "th")]
    for line in report.lines:
        *cells, verdict = line.cells
        verdict = f"{WRONG if line.trouble else RIGHT} {verdict}"
        cells = [[*cells, verdict][i] for i in shown]
        rows.append(_row(cells, "td", bold=bool(line.trouble)))
    note = f"<small>{CONDITION}</small>" if report.conditioned else ""
    return f"<table>{''.join(rows)}</table>{note}"


def _row(cells, tag, bold=False):
    """The case and the verdict are words, what stands between them numbers."""
    sides = ["left", *["right"] * (len(cells) - 2), "left"]
    words = [f"<strong>{escape(x)}</strong>" if bold else escape(x) for x in cells]
    filled = (f"<{tag} {CELL.format(side)}>{x}</{tag}>" for side, x in zip(sides, words))
    return f"<tr>{''.join(filled)}</tr>"


def _figure(part):
    """The map of an array as an inline image with its title as text; "" without Matplotlib."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return ""
    ratio, where = worst_head(part)
    title = _title(part, ratio, where)
    png = base64.b64encode(draw(ratio, part.name, title)).decode()
    caption = (
        "log10 of error / budget for each entry: above 0 it is wrong. Hatched: NaN or infinite."
    )
    image = f'<img alt="{escape(title)}" src="data:image/png;base64,{png}">'
    return f"<figure>{image}<figcaption><small>{caption}</small></figcaption></figure>"


def _title(part, ratio, where):
    lost = int((~np.isfinite(ratio)).sum())
    what = f"{part.seen.trial.name}, {part.name}{where}"
    if lost == ratio.size:
        return f"{what}: every entry is NaN or infinite"
    top = np.max(ratio, where=np.isfinite(ratio), initial=0)
    words = f"{what}: errors up to {top:.2g} times the budget"
    return words + (f", {lost} of {ratio.size} entries NaN or infinite" if lost else "")


def mapped(report):
    """The array to be drawn: the worst; or, where it is small, the largest one that is nearly as
    bad. None where all are right."""
    worst = report.worst
    if worst is None or not worst.failed:
        return None
    parts = [Part(name, x) for x in report.seen for name in x.got]
    return max((p for p in parts if p.over * AS_BAD >= worst.over), key=lambda p: p.y.size)


def worst_head(part):
    """error / budget, (rows, columns), of the head with the most NaN or else the largest error,
    and words for which head that is."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(part.error == 0, 0, part.error / part.budget)
    if ratio.ndim == 2:
        return ratio, ""
    lost = (~np.isfinite(ratio)).sum(axis=(-2, -1))
    largest = np.max(ratio, axis=(-2, -1), where=np.isfinite(ratio), initial=0)
    order = np.lexsort((-largest.ravel(), -lost.ravel()))
    at = tuple(map(int, np.unravel_index(order[0], lost.shape)))
    return ratio[at], f" in head {at[0] if len(at) == 1 else at}"


def draw(ratio, name, title):
    """PNG of log10 of ``ratio``; the same bytes for the same numbers."""
    import matplotlib.style
    from matplotlib.figure import Figure

    with np.errstate(divide="ignore"):
        shown, steps = pooled(np.log10(np.where(np.isfinite(ratio), ratio, np.nan)))
    top = np.max(shown, where=np.isfinite(shown), initial=0)
    rows, columns = ratio.shape
    owner = "key" if name in ("dk", "dv") else "query"
    with matplotlib.style.context(["default", STYLE]):
        figure = Figure(figsize=(5.2, 3.4), dpi=100)
        axes = figure.add_subplot()
        axes.patch.set(hatch="////", facecolor="white", edgecolor="black")
        axes.grid(False)
        image = axes.imshow(
            np.ma.masked_invalid(np.maximum(shown, LOWEST)),
            cmap="cividis_r",  # light where it is right, dark where it is wrong
            vmin=LOWEST,
            vmax=max(1.0, np.ceil(top)),
            aspect="auto",
            extent=(-0.5, columns - 0.5, rows - 0.5, -0.5),
        )
        axes.set_title(title, wrap=True, fontsize=10)
        axes.set_xlabel(f"column of {name}{_cells(steps[1])}")
        axes.set_ylabel(f"row of {name}: {owner}{_cells(steps[0])}")
        for axis in (axes.xaxis, axes.yaxis):
            axis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        bar = figure.colorbar(image, label="log10(error / budget), line at the budget")
        bar.ax.axhline(0, color="black", linewidth=2)
        file = io.BytesIO()
        figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def pooled(x):
    """At most MOST rows and columns, each cell the largest of a block, NaN if one is; and how many
    rows and columns a block has."""
    steps = []
    for axis in (0, 1):
        step = -(-x.shape[axis] // MOST)
        starts = np.arange(0, x.shape[axis], step)
        x = np.maximum.reduceat(x, starts, axis=axis)
        steps.append(step)
    return x, steps


def _cells(step):
    return f" ({step} to a cell)" if step > 1 else ""
