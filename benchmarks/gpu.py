"""python -m benchmarks.gpu: refattn's CUDA kernels judged and timed on a GPU, beside torch."""

import argparse
import functools
import json
import statistics
from pathlib import Path

import numpy as np
import tqdm

import refattn
from benchmarks import peers
from benchmarks.__main__ import commit, measured, rows_of
from refattn import bench, gpu
from refattn.course import table
from refattn.verify import check
from refattn.works import HEADS, SMALL, D, Work, both, forward

ROOT = Path(__file__).parents[1]
LONG, MIDDLE = (HEADS, 16384, D), (HEADS, 4096, D)


def judged(device, cases="default", n=133):
    """A line for each attention: the grader's verdict on its output and gradients, float32."""
    settings = [
        ("softmax_attention", {}),
        ("softmax_attention", {"causal": True}),
        ("local_attention", {"window": 3}),
        ("sparse_attention", {"mask": refattn.masks.bigbird(n, 16, rng=0)}),
        ("linear_attention", {}),
        ("linear_attention", {"causal": True}),
        ("performer_attention", {"omega": refattn.random_features(16, 8, rng=0)}),
        ("linformer_attention", {"E": np.random.default_rng(0).standard_normal((5, n)) / n}),
        ("block_attention", {"block": 4, "fuse": "exact"}),
        ("two_level_attention", {"block": 4}),
    ]
    for name, options in tqdm.tqdm(settings, desc="judged"):
        attention, vjp = (
            functools.partial(getattr(refattn, name + suffix), backend="cuda", **options)
            for suffix in ("", "_vjp")
        )
        report = check(
            attention,
            name,
            xp="torch",
            device=device,
            gradients=lambda *arrays, vjp=vjp: vjp(*arrays)[:3],
            cases=[(n, n, 8, 8)] if {"mask", "E"} & set(options) else cases,
            time_limit=600,
            **options,
        )
        yield [name, ", ".join(options), "right" if report.passed else str(report)]


def works(put):
    """What is timed, and beside what."""
    a, bigbird = refattn, refattn.masks.bigbird(16384, 64, rng=0)
    tree = refattn.masks.hierarchical(4096, 16)
    omega = put(refattn.random_features(256, D, rng=0).astype(np.float32))
    E = put(np.random.default_rng(0).standard_normal((256, 16384)).astype(np.float32) / 128)
    gate = put((np.arange(4096) % 2).astype(np.float32)[:, None])
    on = functools.partial(forward, backend="cuda")
    flex, formula = {"FlexAttention, compiled": 1.0}, {"the formula, torch.compile": 1.0}
    flops = {
        causal: a.softmax_attention_cost(4096, 4096, D, D, causal=causal).flops
        for causal in (False, True)
    }
    whole = both(a.softmax_attention, a.softmax_attention_vjp, True, backend="cuda")
    return [
        Work("softmax, full", MIDDLE, on(a.softmax_attention), flops[False], {"torch SDPA": 0.8}),
        Work(
            "softmax, causal",
            MIDDLE,
            on(a.softmax_attention, causal=True),
            flops[True],
            {"torch SDPA": 0.8},
        ),
        Work(
            "softmax, full, forward and backward",
            MIDDLE,
            whole,
            0,
            {"torch SDPA and autograd": 0.8},
        ),
        Work(
            "local, window 128 on each side",
            LONG,
            on(a.local_attention, window=128),
            a.local_attention_cost(16384, 16384, D, D, window=128).flops,
            flex,
        ),
        Work(
            "block-sparse, BigBird on blocks of 64",
            LONG,
            on(a.sparse_attention, mask=bigbird),
            a.sparse_attention_cost(16384, 16384, D, D, nnz=bigbird.nnz).flops,
            flex,
        ),
        Work(
            "csr, hierarchical b = 16",
            MIDDLE,
            on(a.sparse_attention, mask=tree),
            a.sparse_attention_cost(4096, 4096, D, D, nnz=tree.nnz).flops,
            flex,
        ),
        Work(
            "linear, elu + 1, full",
            LONG,
            on(a.linear_attention),
            a.linear_attention_cost(16384, 16384, D, D).flops,
            formula,
        ),
        Work(
            "linear, elu + 1, causal",
            LONG,
            on(a.linear_attention_chunked),
            a.linear_attention_cost(16384, 16384, D, D, causal=True).flops,
        ),
        Work(
            "Performer, 256 features, full",
            LONG,
            on(a.performer_attention, omega=omega),
            a.performer_attention_cost(16384, 16384, D, D, num_features=256).flops,
            formula,
            SMALL,
        ),
        Work(
            "Linformer, r = 256",
            LONG,
            on(a.linformer_attention, E=E),
            a.linformer_attention_cost(16384, 16384, D, D, r=256).flops,
            formula,
        ),
        Work(
            "gate, half of the rows off",
            MIDDLE,
            on(a.gated_attention, gate=gate),
            a.gated_attention_cost(4096, 4096, D, D, open_rows=2048).flops,
            {"the same, all rows on": 1.0},
        ),
    ]


def ungated(q, k, v, dy):
    return lambda: refattn.softmax_attention(q, k, v, backend="cuda")


def performer_formula(q, k, v, dy):
    """Positive features and linear attention over them, without a stabiliser: inputs are small."""
    import torch

    omega = refattn.random_features(256, D, rng=0).astype(np.float32)
    W = torch.from_numpy(omega).to(q.device).mT * D**-0.25

    def features(x):
        return torch.exp(x @ W - (x * x).sum(-1, keepdim=True) * (D**-0.5 / 2))

    def run(q, k, v):
        phi_q, phi_k = features(q), features(k)
        S, z = phi_k.mT @ v, phi_k.sum(-2)
        return (phi_q @ S) / (phi_q @ z[..., None])

    return peers.plain(peers.compiled(run), *peers.tensors(q, k, v))


BESIDE = {
    "softmax, full": ({"torch SDPA": peers.sdpa(False)}, 1e-5),
    "softmax, causal": ({"torch SDPA": peers.sdpa(True)}, 1e-5),
    "softmax, full, forward and backward": (
        {"torch SDPA and autograd": peers.sdpa(False, True)},
        1e-4,
    ),
    "local, window 128 on each side": (
        {"FlexAttention, compiled": peers.flex(peers.window_mod)},
        1e-4,
    ),
    "block-sparse, BigBird on blocks of 64": (
        {"FlexAttention, compiled": peers.flex(peers.pattern_mod(peers.bigbird_blocks, 64))},
        1e-4,
    ),
    "csr, hierarchical b = 16": (
        {"FlexAttention, compiled": peers.flex(peers.pattern_mod(peers.hierarchy, 1))},
        1e-4,
    ),
    "linear, elu + 1, full": ({"the formula, torch.compile": peers.linear_formula}, 1e-4),
    "Performer, 256 features, full": ({"the formula, torch.compile": performer_formula}, 1e-3),
    "Linformer, r = 256": ({"the formula, torch.compile": peers.linformer_formula(True)}, 1e-4),
    "gate, half of the rows off": ({"the same, all rows on": ungated}, None),
}


def by_events(run):
    """Seconds of one call on the device, between two events of its stream."""
    import torch

    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def limits(put, clock):
    """Bytes a second of a device copy, FLOP a second of a float32 matrix product."""
    x = put(np.ones(2**26, np.float32))
    a = put(np.ones((4096, 4096), np.float32))
    times = bench.alternate({"copy": x.clone, "matmul": lambda: a @ a}, clock=clock)
    copy, matmul = (statistics.median(times[name]) for name in ("copy", "matmul"))
    return 2 * 2**28 / copy, 2 * 4096**3 / matmul


def main(arguments=None):
    options = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    options.add_argument("--only", default="", help="works whose name holds this")
    options.add_argument("--seconds", type=float, default=5.0, help="about so long a work (5)")
    options.add_argument("--out", type=Path, help="the results file")
    options = options.parse_args(arguments)
    gpu.require()
    import torch

    torch.backends.cuda.matmul.allow_tf32 = False
    device = torch.cuda.get_device_name()

    def put(x):
        return torch.from_numpy(x).cuda()

    verdicts = list(judged("cuda"))
    print(table(["attention", "options", "verdict"], verdicts))
    bandwidth, rate = limits(put, by_events)
    records = []
    for work in tqdm.tqdm(works(put), desc="works"):
        if options.only in work.name:
            records.append(measured(work, options.seconds, BESIDE, put, by_events))
    header = ["work", "shape", "ours ms", "peer", "peer ms", "ratio", "goal", "reached"]
    print(table(header, [row for record in records for row in rows_of(record)]))
    print(table(*shares(records, bandwidth, rate)))
    name = device.lower().replace(" ", "-")
    out = options.out or ROOT / "benchmarks" / "results" / f"gpu-{name}.json"
    result = {
        "machine": {**bench.machine(), "gpu": device, "torch": torch.__version__},
        "commit": commit(),
        "copy GB/s": bandwidth / 1e9,
        "matmul GFLOP/s": rate / 1e9,
        "verdicts": verdicts,
        "works": records,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(out)


def shares(records, bandwidth, rate):
    """Header and rows: each work's share of the rate of a matrix product, and of a copy's bandwidth
    if q, k, v and y are moved once."""
    rows = []
    for record in records:
        heads, n, d = record["shape"]
        moved = 4 * heads * n * d * 4 / record["seconds"]["refattn"]
        flops = record["GFLOP/s"] * 1e9
        rows.append([record["work"], f"{moved / bandwidth:.0%}",
                     f"{flops / rate:.0%}" if flops else ""])  # fmt: skip
    return ["work", "of a copy's bandwidth", "of a matmul's rate"], rows


if __name__ == "__main__":
    main()
