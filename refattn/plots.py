"""Figures of the notebooks: their look, where they are written, and the numbers behind them."""

import csv
import os
from pathlib import Path

import numpy as np

FAST = os.environ.get("REFATTN_FAST") == "1"
STYLE = Path(__file__).parent / "data" / "course.mplstyle"


def draw_growth(found, title):
    """Time and memory against N, with their slopes; dotted what the cost says, time at NumPy's rate
    at the largest size. A colour an attention; dashed and hollow where a label ends in ", Numba".
    Returns the figure."""
    import matplotlib.pyplot as plt

    fig, (left, right) = plt.subplots(1, 2, figsize=(10, 4.6 if len(found) <= 4 else 5.6))
    looks = plt.rcParams["axes.prop_cycle"]()
    look = {what: next(looks) for what in dict.fromkeys(one.mechanism for one in found)}
    for one in found:
        color, marker = (look[one.mechanism][name] for name in ("color", "marker"))
        style = {"color": color, "marker": marker, "ls": "-"}
        if one.compiled:
            style |= {"ls": "--", "markerfacecolor": "white"}
        counted = one.flops / one.flops[-1] * one.seconds[-1]
        for ax, y, theory, what in (
            (left, 1e3 * one.seconds, 1e3 * counted, "seconds"),
            (right, one.peak / 1e6, one.workspace / 1e6, "peak"),
        ):
            p = one.slope(what)
            label = one.label if np.isnan(p) else f"{one.label}: $N^{{{p:.2f}}}$"
            ax.plot(one.n, np.where(y > 0, y, np.nan), label=label, **style)
            theory = np.where(theory > 0, theory, np.nan)
            if not one.compiled:  # the count is of the mathematics, and stands once
                ax.plot(one.n, theory, color=color, lw=1.4, ls=":", marker="")
    for ax, label in ((left, "time, ms"), (right, "memory beyond inputs and output, MB")):
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.plot([], [], color="0.3", lw=1.6, ls=":", marker="", label="counted")
        ax.set(xlabel="tokens N", ylabel=label)
        if len(found) > 4:
            ax.legend(fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)
        else:
            ax.legend(fontsize=9)
    fig.suptitle(title, x=0.02, ha="left")
    return fig


def growth_columns(found):
    """The columns of ``growth``'s numbers, for ``save_figure``."""
    columns = {"attention": np.concatenate([[one.label] * len(one.n) for one in found])}
    for name in ("n", "seconds", "peak", "flops", "workspace"):
        columns[name] = np.concatenate([getattr(one, name) for one in found])
    return columns


def explore(draw, **sliders):
    """A slider for each argument of ``draw``, where ipywidgets is installed and the notebook is
    open; else nothing but words. The static figure stands beside it.

    Parameters
    ----------
    draw : callable
        Draws a figure from its keyword arguments and shows it.
    **sliders : tuple of int, list or bool
        A range, as ipywidgets' ``interact`` takes it.
    """
    if os.environ.get("REFATTN_STATIC") == "1" or FAST:
        print("In an open notebook there are sliders here (pip install -e '.[widgets]').")
        return
    try:
        from ipywidgets import interact
    except ImportError:
        print("For sliders here: pip install -e '.[widgets]', then restart the kernel.")
        return
    interact(draw, **sliders)


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

    Columns must be of one length; a single value fills its column. ValueError where a text is cut
    off at the figure's edge, in runs whose figures are kept (REFATTN_STATIC=1).
    """
    cut = _cut_off(figure) if os.environ.get("REFATTN_STATIC") == "1" else []
    if cut:
        raise ValueError(f"{name}: cut off at the edge: {'; '.join(cut)}")
    folder = figures_folder()
    (folder / "data").mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
    values = np.broadcast_arrays(*(np.asarray(c) for c in columns.values()))
    write_csv(folder / "data" / f"{name}.csv", list(columns), zip(*values, strict=True))


def _cut_off(figure):
    """Texts that reach beyond the figure, by more than a pixel."""
    from matplotlib.text import Text

    for _ in range(2):  # one pass does not settle a layout with axes of a fixed shape
        figure.canvas.draw()
    edge = figure.bbox.padded(1.0)
    ticks = {
        label for ax in figure.axes for axis in (ax.xaxis, ax.yaxis) for label in _labels(axis)
    }
    texts = [t for t in figure.findobj(Text) if t.get_visible() and t not in ticks]
    boxes = [(t.get_text(), t.get_window_extent()) for t in texts if t.get_text().strip()]
    return [
        text
        for text, box in boxes
        if box.x0 < edge.x0 or box.x1 > edge.x1 or box.y0 < edge.y0 or box.y1 > edge.y1
    ]


def _labels(axis):
    """Tick labels, among them some beyond the axis that are never drawn."""
    ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
    return [label for tick in ticks for label in (tick.label1, tick.label2)]


def write_csv(path, header, rows):
    """A CSV file with floats to six significant digits."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows([_short(x) for x in row] for row in rows)


def _short(x):
    return f"{x:.6g}" if isinstance(x, (float, np.floating)) else x
