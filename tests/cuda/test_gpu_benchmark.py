"""benchmarks/gpu.py as far as it goes without a GPU: verdicts, works, shares."""

import numpy as np
import pytest

import refattn
from refattn.works import inputs

torch = pytest.importorskip("torch")
pytest.importorskip("array_api_compat")
from benchmarks import __main__ as run  # noqa: E402
from benchmarks import gpu as bench_gpu  # noqa: E402


def test_the_grader_finds_every_attention_right():
    found = list(bench_gpu.judged("cpu", cases=[(6, 6, 8, 2)], n=90))
    assert len(found) == 10
    for name, options, verdict in found:
        assert verdict == "right", (name, options, verdict)


def test_works_have_peers_or_none_and_run():
    works = bench_gpu.works(torch.from_numpy)
    for work in works:
        assert set(work.goals) == set(bench_gpu.BESIDE.get(work.name, ({}, 0))[0]), work.name
        assert work.flops >= 0
    work = next(work for work in works if work.name == "softmax, causal")
    arrays = [torch.from_numpy(x) for x in inputs((1, 5, 4))]
    y = work.ours(*arrays)()
    wanted = refattn.softmax_attention(*(x.numpy() for x in arrays[:3]), causal=True)
    np.testing.assert_allclose(y.numpy(), wanted, atol=1e-5)


def test_a_work_is_measured_beside_its_peer_and_in_shares():
    work = bench_gpu.Work("softmax, full", (1, 4, 4), bench_gpu.works(torch.from_numpy)[0].ours,
                          1000, {"torch SDPA": 0.8})  # fmt: skip
    record = run.measured(work, 0.01, bench_gpu.BESIDE, torch.from_numpy)
    assert record["apart"]["torch SDPA"] <= 1e-5 and record["ratio"]["torch SDPA"] > 0
    header, rows = bench_gpu.shares([record], bandwidth=1.0, rate=1.0)
    assert len(header) == len(rows[0]) == 3 and rows[0][2].endswith("%")


def test_performers_formula_is_performer():
    q, k, v, dy = (torch.from_numpy(x) for x in inputs((1, 6, 64), size=0.1))
    omega = refattn.random_features(256, 64, rng=0).astype(np.float32)
    wanted = refattn.performer_attention(*(x.numpy() for x in (q, k, v)), omega=omega)
    plain = bench_gpu.peers.compiled
    try:
        bench_gpu.peers.compiled = lambda run: run
        y = bench_gpu.performer_formula(q, k, v, dy)()
    finally:
        bench_gpu.peers.compiled = plain
    np.testing.assert_allclose(y.numpy(), wanted, atol=1e-5)
