"""python -m benchmarks.figures: draw a results file, and print README's table of it."""

import argparse
import json
from pathlib import Path

import matplotlib.pyplot as plt

from refattn.course import save_figure, use_style

ROOT = Path(__file__).parents[1]
MARKERS = "osD^v"
TOKEN = 4 * 64 * 4  # bytes of a token's q, k, v and y


def ratios(result):
    """How many times a peer takes as long, beside the goal."""
    bars = [
        (f"{work['work']} {'x'.join(map(str, work['shape']))}\n{peer}", ratio, work["goal"][peer])
        for work in result["works"]
        for peer, ratio in work["ratio"].items()
    ]
    labels, found, goals = zip(*bars[::-1], strict=True)
    figure, axis = plt.subplots(figsize=(8, 0.42 * len(bars) + 1))
    axis.barh(labels, found, height=0.6)
    axis.plot(goals, labels, "k|", markersize=12, label="goal")
    axis.axvline(1, color="0.5", linewidth=0.8)
    axis.set_xscale("log")
    axis.set_xlabel("time of the peer / time of refattn, same machine, same run")
    reached = sum(ratio >= goal for ratio, goal in zip(found, goals, strict=True))
    axis.set_title(f"{reached} of {len(bars)} goals reached on {threads(result)}")
    axis.tick_params(axis="y", labelsize=7)
    axis.legend()
    save_figure(figure, "bench_ratios", work=labels, ratio=found, goal=goals)


def against_n(result, key, name, scale, unit, title):
    """Lines of one quantity against N."""
    figure, axis = plt.subplots()
    columns = {"work": [], "n": [], unit: []}
    for (work, found), marker in zip(result[key].items(), MARKERS, strict=False):
        sizes, values = found[0], [scale * x for x in found[1]]
        label = f"{work}: slope {found[2]:.2f}" if key == "growth" else work
        axis.loglog(sizes, values, marker=marker, label=label)
        columns["work"] += [work] * len(sizes)
        columns["n"] += sizes
        columns[unit] += values
    if key == "memory":
        ends = [min(columns["n"]), max(columns["n"])]
        axis.loglog(ends, [scale * TOKEN * n for n in ends], color="0.6", label="q, k, v and y")
    axis.set_xlabel("tokens N")
    axis.set_ylabel(unit)
    axis.set_title(title)
    axis.legend(fontsize=7)
    save_figure(figure, name, **columns)


def summary(result):
    """README's table: for each work and peer the ratio, from the least to the largest size."""
    found = {}
    for work in result["works"]:
        for peer, ratio in work["ratio"].items():
            shown = f"{ratio:.1f}" if ratio < 10 else f"{ratio:.0f}"
            found.setdefault((work["work"], peer), []).append((work["shape"][1], shown))
    lines = ["| work | tokens | beside | times as fast |", "|---|---|---|---|"]
    for (work, peer), pairs in found.items():
        sizes, ratios = (", ".join(map(str, column)) for column in zip(*pairs, strict=True))
        lines.append(f"| {work} | {sizes} | {peer} | {ratios} |")
    return "\n".join(lines)


def threads(result):
    machine = result["machine"]
    return f"{machine['threads']} threads of {machine['processor']}"


def main(arguments=None):
    options = argparse.ArgumentParser(prog="python -m benchmarks.figures", description=__doc__)
    default = ROOT / "benchmarks" / "results" / "cpu.json"
    options.add_argument("results", nargs="?", type=Path, default=default)
    result = json.loads(options.parse_args(arguments).results.read_text(encoding="utf-8"))
    print(summary(result))
    use_style()
    ratios(result)
    if "growth" in result:
        title = "Local and linear forms grow as N, softmax attention as N²"
        against_n(result, "growth", "bench_growth", 1e3, "ms", title)
        title = "Memory beyond inputs and output, beside what these take"
        against_n(result, "memory", "bench_memory", 1e-6, "MB", title)


if __name__ == "__main__":
    main()
