"""What the notebooks lean on: measuring, fitting, figures, the table."""

import csv

import numpy as np
import pytest

import refattn
from cases import MECHANISMS
from refattn import course, plots
from refattn.examples import examples


def test_measure_sees_time_and_memory():
    small = course.measure(lambda: np.ones(1000).sum())
    large = course.measure(lambda: np.ones(1_000_000).sum())
    assert 0 < small.fastest <= small.seconds < large.seconds
    assert 8e6 <= large.peak < 9e6
    assert course.measure(lambda: np.ones(1_000_000)).peak < 1e5  # what is returned is not counted


def test_slope_of_a_power():
    x = np.array([16, 64, 256, 1024])
    assert course.slope(x, 5 * x**1.5) == pytest.approx(1.5, abs=1e-12)


def test_relative_error():
    exact = np.ones((2, 3, 4))
    np.testing.assert_allclose(course.relative_error(1.5 * exact, exact), 0.5)


def test_figures_go_where_they_are_sent(tmp_path, monkeypatch):
    monkeypatch.setenv("REFATTN_FIGURES", str(tmp_path / "out"))
    course.use_style()
    from matplotlib.figure import Figure

    files = []
    for _ in range(2):
        figure = Figure()
        figure.subplots().plot([1, 2])
        course.save_figure(figure, "line", n=[1, 2], seconds=[0.123456789, 2.0], what="both")
        files.append((tmp_path / "out" / "line.svg").read_bytes())
    assert files[0] == files[1]
    with open(tmp_path / "out" / "data" / "line.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [["n", "seconds", "what"], ["1", "0.123457", "both"], ["2", "2", "both"]]


@pytest.mark.filterwarnings("ignore:constrained_layout")
def test_a_text_that_is_cut_off_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("REFATTN_FIGURES", str(tmp_path))
    from matplotlib.figure import Figure

    def drawn(title):
        figure = Figure(figsize=(4, 3))
        figure.subplots().set_title(title)
        return figure

    monkeypatch.setenv("REFATTN_STATIC", "1")
    course.save_figure(drawn("short"), "short", n=[1])
    with pytest.raises(ValueError, match="long: cut off at the edge: long long"):
        course.save_figure(drawn("long " * 40), "long", n=[1])
    monkeypatch.delenv("REFATTN_STATIC")
    course.save_figure(drawn("long " * 40), "long", n=[1])  # a student is not stopped


@pytest.mark.parametrize("n", [1, 7, 64, 500])
def test_examples_run_and_are_costed(n):
    q, k, v = np.random.default_rng(0).standard_normal((3, n, 8)).astype(np.float32)
    for example in examples(n, 8):
        assert example.attention(q, k, v, **example.options).shape == (n, 8)
        cost = example.counted(n, 8)
        assert cost.flops > 0 and cost.bytes > 0 and cost.workspace >= 0
        mask = example.options.get("mask")
        assert mask is None or example.sizes["nnz"] == mask.nnz


def test_every_mechanism_has_an_example():
    """One folder may hold several attentions; at least one of them stands in the tables."""
    folders = {mechanism.attention.__module__.split(".")[1] for mechanism in MECHANISMS.values()}
    shown = examples(64, 8)
    assert {example.attention.__module__.split(".")[1] for example in shown} == folders
    assert shown[0].label == "softmax"  # the chapter's order


def test_summary_lays_every_example_beside_exact_attention(tmp_path):
    text = course.summary(csv=tmp_path / "summary.csv")
    with open(tmp_path / "summary.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["mechanism"] for row in rows] == [e.label for e in examples(512, 32)]
    assert all(row["mechanism"] in text for row in rows)
    exact, *rest = rows
    assert float(exact["most"]) < 1e-5  # float32 against float64
    assert all(float(row["least"]) <= float(row["error"]) <= float(row["most"]) for row in rest)
    heads = refattn.datasets.load_heads()
    y = refattn.local_attention(heads.q, heads.k, heads.v, window=16)
    z = refattn.softmax_attention(heads.q, heads.k, heads.v)
    wanted = np.median(
        [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(y, z, strict=True)]
    )
    local = next(row for row in rows if row["mechanism"] == "local, 16 each side")
    assert float(local["error"]) == pytest.approx(wanted, rel=1e-4)
    assert int(local["FLOPs"]) == refattn.local_attention_cost(512, 512, 32, 32, window=16).flops


def test_resident_sees_what_numpy_does_not(tmp_path):
    held = course.resident(lambda: len(bytearray(b"x") * 30_000_000))
    assert np.isnan(held) or 25e6 < held < 40e6
    given_back = course.resident(lambda: np.ones(4_000_000))
    assert np.isnan(given_back) or given_back < 4e6  # what is returned is not counted


def test_growth_measures_and_counts():
    cost = lambda n: refattn.softmax_attention_cost(n, n, 8, 8)
    runs = {
        "softmax, NumPy": (refattn.softmax_attention, cost),
        "softmax, Numba": (
            lambda q, k, v: refattn.softmax_attention(q, k, v, backend="numba"),
            cost,
        ),
    }
    slow, quick = course.growth(runs, [64, 128, 256], d=8, budget=0.05)
    assert (slow.flops == [cost(n).flops for n in (64, 128, 256)]).all()
    assert slow.slope("flops") == pytest.approx(2)
    assert slow.mechanism == quick.mechanism and quick.compiled and not slow.compiled
    assert np.isnan(quick.slope("peak"))  # a few pages: no slope is to be had of that
    columns = course.growth_columns([slow, quick])
    assert {len(column) for column in columns.values()} == {6}
    assert list(columns["attention"][:3]) == ["softmax, NumPy"] * 3
    figure = course.draw_growth([slow, quick], "a title")
    assert [ax.get_xlabel() for ax in figure.axes] == ["tokens N", "tokens N"]
    labels = figure.axes[0].get_legend_handles_labels()[1]
    assert labels[-1] == "counted" and labels[0].startswith("softmax, NumPy: $N^{")


def test_explore_draws_nothing_where_no_notebook_is_open(monkeypatch, capsys):
    monkeypatch.setenv("REFATTN_STATIC", "1")
    course.explore(lambda window: 1 / 0, window=(1, 9))
    assert "sliders" in capsys.readouterr().out


def test_explore_hands_its_ranges_to_the_sliders(monkeypatch):
    import sys
    import types

    monkeypatch.delenv("REFATTN_STATIC", raising=False)
    monkeypatch.setattr(plots, "FAST", False)
    asked = []
    widgets = types.ModuleType("ipywidgets")
    widgets.interact = lambda draw, **sliders: asked.append((draw, sliders))
    monkeypatch.setitem(sys.modules, "ipywidgets", widgets)
    course.explore(print, window=(1, 9))
    assert asked == [(print, {"window": (1, 9)})]
    monkeypatch.setitem(sys.modules, "ipywidgets", None)  # not installed
    course.explore(print, window=(1, 9))
    assert len(asked) == 1
