"""benchmarks/: records, the table, the figures, on small work and peers made up for it."""

import json
from pathlib import Path

import numpy as np
import pytest

import refattn
from benchmarks import __main__ as run
from benchmarks import figures, peers
from refattn import bench
from refattn.works import HEADS, D, Work, both, forward, inputs, works


def slower(q, k, v, dy):
    return lambda: refattn.local_attention(q, k, v, window=4)


def wrong(q, k, v, dy):
    return lambda: v.copy()


def absent(q, k, v, dy):
    raise ImportError("No module named 'abacus'")


def fails(q, k, v, dy):
    return lambda: 1 / 0


@pytest.fixture
def small(monkeypatch):
    goals = {"slower": 1e-6, "wrong": 2.0, "absent": 2.0, "fails": 2.0}
    ours = forward(refattn.local_attention, window=4)
    work = Work("local", (2, 64, 8), ours, 1000, goals)
    makers = {"slower": slower, "wrong": wrong, "absent": absent, "fails": fails}
    monkeypatch.setitem(peers.PEERS, "local", (makers, 1e-5))
    monkeypatch.setattr(bench, "works", lambda: [work])
    monkeypatch.setattr(bench, "matmul_rate", lambda: 1e9)
    return work


def test_a_record_says_what_was_measured_and_what_was_not(small):
    record = run.measured(small, 0.01)
    assert record["apart"]["slower"] <= 1e-5 and record["seconds"]["slower"] > 0
    assert set(record["ratio"]) == {"slower"}
    assert record["missing"]["absent"] == "ImportError: No module named 'abacus'"
    assert "lies" in record["missing"]["wrong"] and "ZeroDivision" in record["missing"]["fails"]
    rows = {row[3]: row for row in run.rows_of(record)}
    assert rows["slower"][-1] == "yes" and rows["absent"][-1] == ""
    assert "abacus" in rows["absent"][5]


def test_the_whole_run_and_its_figures(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "growth", lambda: {"local": ([64, 128], [1e-3, 2e-3], 1.0, 1.05)})
    monkeypatch.setattr(bench, "memory", lambda: {"local_attention": ([64, 128], [1e6, 1e6])})
    monkeypatch.setattr(bench, "first_calls", lambda: {"local_attention": [5.0, 0.5]})
    monkeypatch.setenv("REFATTN_FIGURES", str(tmp_path))
    out = tmp_path / "results" / "cpu.json"
    run.main(["--seconds", "0.01", "--out", str(out)])
    printed = capsys.readouterr().out
    assert "slower" in printed and "slope" in printed and "MB by N" in printed
    result = json.loads(out.read_text())
    assert result["machine"]["threads"] >= 1 and result["works"][0]["work"] == "local"
    figures.main([str(out)])
    for name in ("bench_ratios", "bench_growth", "bench_memory"):
        assert (tmp_path / f"{name}.svg").exists()
        assert (tmp_path / "data" / f"{name}.csv").read_text().count("\n") >= 2


def test_every_work_has_its_peers_and_goals():
    for work in works():
        makers, _ = peers.PEERS[work.name]
        assert set(makers) == set(work.goals), work.name
        assert work.shape[0] == HEADS and work.shape[2] == D


def test_ours_gives_what_the_formula_gives():
    """The timed functions, on few tokens."""
    q, k, v, dy = inputs((2, 70, 8))
    y = forward(refattn.local_attention, window=4)(q, k, v, dy)()
    np.testing.assert_allclose(y, refattn.local_attention(q, k, v, window=4), atol=1e-6)
    pair = refattn.softmax_attention, refattn.softmax_attention_vjp
    for keeps in (False, True):
        y, dq, dk, dv = both(*pair, keeps, causal=True)(q, k, v, dy)()
        np.testing.assert_allclose(y, pair[0](q, k, v, causal=True), atol=1e-5)
        for a, b in zip((dq, dk, dv), pair[1](dy, q, k, v, causal=True), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)


def test_the_table_in_the_readme_is_that_of_the_results():
    root = Path(run.__file__).parents[1]
    result = json.loads((root / "benchmarks" / "results" / "cpu.json").read_text(encoding="utf-8"))
    assert figures.summary(result) in (root / "README.md").read_text(encoding="utf-8")
