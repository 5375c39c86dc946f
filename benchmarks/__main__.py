"""python -m benchmarks: refattn's compiled attentions and their peers, in one process, in turns."""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import tqdm

from benchmarks.peers import PEERS, numbers
from refattn import bench
from refattn.course import table
from refattn.works import inputs

ROOT = Path(__file__).parents[1]


def parser():
    main = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    main.add_argument("--only", default="", help="works whose name holds this")
    main.add_argument("--seconds", type=float, default=12.0, help="about so long a work (12)")
    main.add_argument("--alone", action="store_true", help="without growth, memory and first calls")
    main.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "cpu.json")
    return main


def peers_of(work, arrays, peers):
    """{name: function} of the peers that are there, and {name: reason} of those that are not."""
    makers, tolerance = peers.get(work.name, ({}, None))
    found, missing = {}, {}
    for name, make in makers.items():
        try:
            found[name] = make(*arrays)
        except Exception as error:
            missing[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return found, missing, tolerance


def disagreement(ours, theirs):
    """The largest difference of any array, relative to its largest entry."""
    pairs = zip(numbers(ours), numbers(theirs), strict=True)
    return max(float(abs(a - b.reshape(a.shape)).max() / abs(a).max()) for a, b in pairs)


def measured(work, seconds, peers=PEERS, put=lambda x: x, clock=bench.timed):
    """A record of one work: medians, spreads, ratios, and how far the answers lie apart.

    ``put`` brings an array to where the work is done, and ``clock`` times a call there.
    """
    arrays = [put(x) for x in inputs(work.shape, size=work.size)]
    ours = work.ours(*arrays)
    start = time.perf_counter()
    answer = ours()
    first = time.perf_counter() - start
    functions, missing, tolerance = peers_of(work, arrays, peers)
    apart = {}
    for name, run in list(functions.items()):
        try:
            theirs = run()
        except Exception as error:
            missing[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            del functions[name]
            continue
        if tolerance is not None:
            apart[name] = disagreement(answer, theirs)
            if not apart[name] <= tolerance:
                missing[name] = f"its answer lies {apart[name]:.1e} away"
                del functions[name]
    times = bench.alternate({"refattn": ours, **functions}, seconds=seconds, clock=clock)
    middle = {name: statistics.median(t) for name, t in times.items()}
    return {
        "work": work.name,
        "shape": work.shape,
        "first call": first,
        "seconds": middle,
        "spread": {name: bench.spread(t) for name, t in times.items()},
        "rounds": len(times["refattn"]),
        "GFLOP/s": work.flops * work.shape[0] / middle["refattn"] / 1e9,
        "ratio": {name: middle[name] / middle["refattn"] for name in functions},
        "goal": work.goals,
        "apart": apart,
        "missing": missing,
    }


def rows_of(record):
    """Lines of the table: one for each peer."""
    for peer, goal in record["goal"].items():
        ratio = record["ratio"].get(peer)
        yield [
            record["work"],
            "x".join(map(str, record["shape"])),
            f"{1e3 * record['seconds']['refattn']:.1f}",
            peer,
            f"{1e3 * record['seconds'][peer]:.1f}" if ratio else "",
            f"{ratio:.2f}" if ratio else record["missing"].get(peer, "not measured"),
            f"{goal:g}",
            "" if ratio is None else "yes" if ratio >= goal else "no",
        ]


def commit():
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    )
    return done.stdout.strip()


def versions():
    """Of the peers that are installed."""
    from importlib import metadata

    names = ("torch", "performer-pytorch", "local-attention", "pytorch-fast-transformers")
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def main(arguments=None):
    options = parser().parse_args(arguments)
    start = time.perf_counter()
    try:
        import torch

        torch.set_num_threads(bench.machine()["threads"])
    except ImportError:
        print("torch is not installed: no peers (benchmarks/requirements.txt)", file=sys.stderr)
    chosen = [work for work in bench.works() if options.only in work.name]
    records = []
    for work in tqdm.tqdm(chosen, desc="works"):
        records.append(measured(work, options.seconds))
    limit = bench.matmul_rate()
    header = ["work", "shape", "ours ms", "peer", "peer ms", "ratio", "goal", "reached"]
    print(table(header, [row for record in records for row in rows_of(record)]))
    for record in records:
        if record["work"].startswith("softmax") and record["GFLOP/s"]:
            share = record["GFLOP/s"] * 1e9 / limit
            print(f"{record['work']} {record['shape']}: {share:.0%} of a matrix product's rate")
    result = {
        "machine": bench.machine(),
        "peers": versions(),
        "commit": commit(),
        "matmul GFLOP/s": limit / 1e9,
        "works": records,
    }
    if not options.alone:
        for key, measure, written in (
            ("growth", bench.growth, bench.growth_table),
            ("memory", bench.memory, bench.memory_table),
            ("first calls", bench.first_calls, bench.first_table),
        ):
            result[key] = measure()
            print(written(result[key]), end="\n\n")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"{options.out} in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
