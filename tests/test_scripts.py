"""scripts/notebooks.py on small notebooks: what it writes, what it reports, what it catches."""

import importlib.util
import sys
import types
from functools import partial
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from tqdm import tqdm

SCRIPT = Path(__file__).parents[1] / "scripts" / "notebooks.py"

TEXT = "import os\nprint('scale', 8**-0.5)\nsize = os.environ.get('REFATTN_FAST', 'full')\nsize"
CLOCK = "import time\ntime.perf_counter()"
PLOT = """\
import os, pathlib
import matplotlib.pyplot as plt
plt.figure(figsize=(2, 2))
plt.fill_between([0, 1], [1, 1])
plt.savefig(pathlib.Path(os.environ["REFATTN_FIGURES"]) / "square.svg")
plt.show()"""


def load():
    spec = importlib.util.spec_from_file_location("notebooks_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def notebooks(tmp_path, monkeypatch):
    """Run a command on the notebooks below tmp_path; a stand-in makes the summary."""
    course = types.ModuleType("refattn.course")
    course.summary = lambda csv, progress: (csv.write_text("n\n1\n"), "THE SUMMARY")[1]
    monkeypatch.setitem(sys.modules, "refattn.course", course)
    monkeypatch.delenv("REFATTN_FAST", raising=False)
    script = load()
    monkeypatch.setattr(script, "tqdm", partial(tqdm, disable=False))  # whatever TQDM_DISABLE says
    return lambda command: script.main([command, "--root", str(tmp_path)])


def save(path, *sources, volatile=()):
    cells = [new_markdown_cell("See [the next](02_next.ipynb), [the plan](../README.md).")]
    for i, source in enumerate(sources):
        tags = {"tags": ["volatile"]} if i in volatile else {}
        cells.append(new_code_cell(source, metadata=tags))
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(new_notebook(cells=cells), path)
    return path


def without_ids(path):
    """The notebook in the older format, whose cells have no ids."""
    nb = nbformat.read(path, as_version=4)
    nb.nbformat_minor = 4
    for cell in nb.cells:
        del cell["id"]
    nbformat.write(nb, path)


def rewrite(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_course(notebooks, tmp_path, monkeypatch, capsys):
    source = save(tmp_path / "notebooks" / "01_first.ipynb", TEXT, PLOT)
    before = source.read_bytes()
    monkeypatch.setenv("REFATTN_FAST", "1")  # a course is at full size all the same
    assert notebooks("course") == 0
    build = tmp_path / "build"
    page = (build / "html" / "01_first.html").read_text()
    assert "scale 0.35" in page
    assert "data:image/png" in page
    assert 'href="02_next.html"' in page
    assert 'href="../../notebooks/../README.md"' in page
    run = nbformat.read(build / "notebooks" / "01_first.ipynb", as_version=4)
    assert run.cells[1].outputs[1].data["text/plain"] == "'full'"
    assert (build / "figures" / "square.svg").exists()
    assert (build / "summary.csv").exists()
    assert source.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["build", "notebooks"]
    shown = capsys.readouterr()
    assert "THE SUMMARY" in shown.out
    assert str(build / "html") in shown.out
    assert "01_first (1 of 1)" in shown.err


def test_course_stops_at_an_error(notebooks, tmp_path, capsys):
    save(tmp_path / "notebooks" / "01_bad.ipynb", "x = 0", "# the ratio\n1 / x")
    assert notebooks("course") == 1
    shown = capsys.readouterr().err
    assert "01_bad.ipynb, cell 3 of 3 failed" in shown
    assert "    # the ratio" in shown
    assert "ZeroDivisionError" in shown
    assert "\x1b[0;31m" not in shown


def test_figures_then_check(notebooks, tmp_path, capsys):
    first = save(tmp_path / "notebooks" / "01_first.ipynb", TEXT, PLOT)
    without_ids(first)
    second = save(
        tmp_path / "notebooks" / "solutions" / "01_first.ipynb", CLOCK, "print(6 * 7)", volatile=[0]
    )
    drawn = tmp_path / "figures" / "square.svg"
    assert notebooks("figures") == 0
    nb = nbformat.read(first, as_version=4)
    assert "language_info" not in nb.metadata
    assert all("execution" not in cell.metadata for cell in nb.cells)
    assert "image/png" in nb.cells[2].outputs[0].data
    assert "42" in second.read_text()
    assert drawn.exists()

    drawn.unlink()
    assert notebooks("check") == 0  # though the volatile cell shows another time
    assert not drawn.exists()

    good = first.read_bytes()
    rewrite(first, "scale 0.35", "scale 0.36")
    rewrite(first, "fill_between([0, 1], [1, 1])", "fill_between([0, 1], [1, 0])")
    rewrite(second, '"42', '"43')
    capsys.readouterr()
    assert notebooks("check") == 1
    shown = capsys.readouterr().err
    assert "notebooks/01_first.ipynb, cell 2: was: scale 0.36" in shown
    assert "notebooks/01_first.ipynb, cell 2: now: scale 0.35" in shown
    assert "notebooks/01_first.ipynb, cell 3: the picture differs by" in shown
    assert "notebooks/solutions/01_first.ipynb, cell 3: was: 43" in shown

    second.unlink()
    rewrite(first, "fill_between([0, 1], [1, 0])", "fill_between([0, 1], [1, 1])")
    assert notebooks("figures") == 0
    assert first.read_bytes() == good


@pytest.mark.parametrize("command", ["figures", "check"])
def test_fast_runs_never_write_back(notebooks, tmp_path, monkeypatch, capsys, command):
    path = save(tmp_path / "notebooks" / "01_first.ipynb", TEXT)
    before = path.read_bytes()
    monkeypatch.setenv("REFATTN_FAST", "1")
    assert notebooks(command) == 1
    assert "REFATTN_FAST" in capsys.readouterr().err
    assert path.read_bytes() == before


def test_outputs_that_came_or_went_are_reported():
    script = load()
    cell = new_code_cell("x", outputs=[nbformat.v4.new_output("stream", text="1\n2\n")])
    assert script.compare_cell(cell, new_code_cell("x")) == ["outputs were ['stdout'], now []"]
    longer = new_code_cell("x", outputs=[nbformat.v4.new_output("stream", text="1\n2\n3\n")])
    assert script.compare_cell(cell, longer) == ["was: (no such line)", "now: 3"]
    assert script.compare_cell(cell, cell) == []
