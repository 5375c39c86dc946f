"""Run the notebooks: `course` for reading, `figures` to refresh them, `check` to compare them.

course   every notebook at full size into build/: notebooks, HTML pages, figures, the summary
figures  the notebooks and the solutions in place, their figures into figures/
check    the same run, written nowhere: its outputs are compared with those in the files
"""

import argparse
import asyncio
import base64
import io
import os
import re
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from pathlib import Path

import nbformat
import numpy as np
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from tqdm import tqdm

PNG_TOLERANCE = 2 / 255  # mean difference of a pixel: fonts may differ a little, a curve may not
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


class NotebookError(Exception):
    """A notebook failed, or its outputs differ; the message says where and why."""


# Running


def kernel_environment(figures):
    """Full size, plots inside the notebook, no progress bars or sliders in the outputs."""
    env = {k: v for k, v in os.environ.items() if k not in ("REFATTN_FAST", "MPLBACKEND")}
    return env | {"REFATTN_FIGURES": str(figures), "TQDM_DISABLE": "1", "REFATTN_STATIC": "1"}


def read(path):
    """The notebook at `path`; a cell without an id gets one that stays the same."""
    nb = nbformat.reader.reads(path.read_text(encoding="utf-8"))
    for i, cell in enumerate(nb.cells):
        cell.setdefault("id", f"cell-{i:02d}")
    nb.nbformat, nb.nbformat_minor = 4, 5
    return nb


def write(nb, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nb, path)


def strip(nb):
    """Remove what changes from run to run and says nothing to a reader."""
    nb.metadata.pop("language_info", None)
    nb.metadata["kernelspec"] = KERNEL
    for cell in nb.cells:
        cell.metadata.pop("execution", None)


def execute(nb, path, env, bar):
    """Run every cell of `nb` in a kernel of its own that stands in the folder of `path`."""
    at = 0

    def started(cell, cell_index):
        nonlocal at
        at = cell_index

    client = NotebookClient(
        nb,
        kernel_name="python3",
        timeout=None,
        record_timing=False,
        coalesce_streams=True,
        extra_arguments=["--log-level=ERROR"],  # a warning would tear the progress bar
        resources={"metadata": {"path": str(path.parent)}},
        on_cell_start=started,
        on_cell_executed=lambda **_: bar.update(),
    )
    try:
        asyncio.run(client.async_execute(env=env))  # a loop of its own, closed at the end
    except (CellExecutionError, DeadKernelError) as error:
        raise NotebookError(failure(nb, path, at, error)) from error
    strip(nb)


def failure(nb, path, at, error):
    """The notebook, the cell, its source and the traceback, without terminal colours."""
    source = "\n".join("    " + line for line in nb.cells[at].source.splitlines())
    outputs = nb.cells[at].get("outputs", [])
    tracebacks = ["\n".join(out.traceback) for out in outputs if out.output_type == "error"]
    trace = re.sub(r"\x1b\[[0-9;]*m", "", (tracebacks or [str(error)])[-1])
    return f"{path.name}, cell {at + 1} of {len(nb.cells)} failed.\n\n{source}\n\n{trace}"


def run_all(paths, figures, jobs=1):
    """Yield (path, executed notebook) in order, with one progress bar over all code cells; with
    more than one job several run side by side, which times measured in them would show."""
    figures.mkdir(parents=True, exist_ok=True)
    notebooks = [(path, read(path)) for path in paths]
    total = sum(cell.cell_type == "code" for _, nb in notebooks for cell in nb.cells)
    env = kernel_environment(figures)
    if jobs > 1:
        env |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    with tqdm(total=total, unit="cell") as bar, ThreadPoolExecutor(jobs) as pool:

        def run(i, path, nb):
            bar.set_description(f"{path.stem} ({i} of {len(notebooks)})")
            execute(nb, path, env, bar)
            return path, nb

        runs = [pool.submit(run, i, *pair) for i, pair in enumerate(notebooks, start=1)]
        try:
            yield from (one.result() for one in runs)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


# Pages


def relink(source):
    """Links as seen from build/html: to the other pages, else to the files beside the notebooks."""

    def moved(match):
        opening, link = match.groups()
        if re.match(r"[a-z]+:|[#/]", link):  # an address, a heading, an attachment
            return match[0]
        if re.match(r"\w+\.ipynb", link):
            return opening + link.replace(".ipynb", ".html", 1)
        return f"{opening}../../notebooks/{link}"

    return re.sub(r"(\]\()([^)\s]+)", moved, source)


def write_page(nb, path):
    """`nb` as an HTML page."""
    from nbconvert import HTMLExporter

    for cell in nb.cells:
        if cell.cell_type == "markdown":
            cell.source = relink(cell.source)
    page, _ = HTMLExporter().from_notebook_node(nb, {"metadata": {"name": path.stem}})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


# Comparing


def compare_png(old, new):
    from matplotlib.image import imread

    a, b = (np.array(imread(io.BytesIO(base64.b64decode(png)), format="png")) for png in (old, new))
    if a.shape != b.shape:
        return [f"the picture's size was {a.shape}, now {b.shape}"]
    off = np.abs(a - b).mean()
    return [f"the picture differs by {255 * off:.1f}/255 a pixel"] if off >= PNG_TOLERANCE else []


def compare_text(old, new):
    for was, now in zip_longest(old.splitlines(), new.splitlines(), fillvalue="(no such line)"):
        if was != now:
            return [f"was: {was}", f"now: {now}"]
    return [] if old == new else ["line ends differ"]


def parts(cell):
    """The outputs of a cell as (kind, content)."""
    for out in cell.get("outputs", []):
        if out.output_type == "stream":
            yield out.name, out.text
        elif out.output_type == "error":
            yield "error", f"{out.ename}: {out.evalue}"
        else:
            yield from ((kind, data) for kind, data in sorted(out.data.items()))


def compare_cell(old, new):
    """What differs between two runs of a cell, as lines."""
    was, now = list(parts(old)), list(parts(new))
    if [kind for kind, _ in was] != [kind for kind, _ in now]:
        return [f"outputs were {[kind for kind, _ in was]}, now {[kind for kind, _ in now]}"]
    lines = []
    for (kind, a), (_, b) in zip(was, now, strict=True):
        lines += compare_png(a, b) if kind == "image/png" else compare_text(str(a), str(b))
    return lines


def compare(old, new, name):
    """What differs between two runs of a notebook, cells tagged `volatile` left out."""
    lines = []
    for i, (a, b) in enumerate(zip(old.cells, new.cells, strict=True), start=1):
        if "volatile" not in a.metadata.get("tags", []):
            lines += [f"{name}, cell {i}: {line}" for line in compare_cell(a, b)]
    return lines


# Commands


def everything(root):
    folder = root / "notebooks"
    return sorted(folder.glob("*.ipynb")) + sorted((folder / "solutions").glob("*.ipynb"))


def course(root):
    build = root / "build"
    os.environ.pop("REFATTN_FAST", None)  # the summary below is at full size as well
    for path, nb in run_all(sorted((root / "notebooks").glob("*.ipynb")), build / "figures"):
        write(nb, build / "notebooks" / path.name)
        write_page(nb, build / "html" / f"{path.stem}.html")
    from refattn.course import summary

    print(summary(csv=build / "summary.csv", progress=True))
    print(f"\nRead     {build / 'html'}")
    print(f"Figures  {build / 'figures'}")
    print(f"Table    {build / 'summary.csv'}")


def figures(root):
    for path, nb in run_all(everything(root), root / "figures"):
        write(nb, path)


def check(root):
    lines = []
    with tempfile.TemporaryDirectory() as scratch:
        # Side by side: what is measured is not compared.
        for path, nb in run_all(everything(root), Path(scratch), jobs=os.cpu_count() or 1):
            lines += compare(read(path), nb, path.relative_to(root).as_posix())
    if lines:
        raise NotebookError("\n".join(["Not what the notebooks show:", *lines]))
    print("The outputs are those in the notebooks.")


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["course", "figures", "check"])
    parser.add_argument("--root", type=Path, default=Path(__file__).parents[1])
    args = parser.parse_args(argv)
    if args.command != "course" and os.environ.get("REFATTN_FAST") == "1":
        print(f"{args.command} works at full size only: unset REFATTN_FAST.", file=sys.stderr)
        return 1
    try:
        {"course": course, "figures": figures, "check": check}[args.command](args.root.resolve())
    except NotebookError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
