"""Break the formulas on purpose, one line at a time, and see whether the tests notice.

    python tests/mutations.py [--only WORD] [--jobs 2]

Each mutation is made in a copy of the project and must make a test fail. Prints a line for each,
then how many were caught; exits 1 if one survived. Doctests and notebooks do not take part.
"""

import argparse
import concurrent.futures
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).parents[1]
TESTS = "formulas vjps costs leaks masks properties steps errors house verify linear performer"
DESELECT = "not readme and not links"  # the copy has no documents

SOFTMAX, MERGE, SPARSE, PAIRS = (
    "softmax/formula.py",
    "softmax/merge.py",
    "sparse/formula.py",
    "sparse/pairs.py",
)
STEPS, MASKS, ARRAYS = "softmax/steps.py", "masks.py", "arrays.py"
COST, CHECKS = "cost.py", "checks.py"

# (file under refattn/, the text that stands there once, what it is changed to)
MUTATIONS = [
    # signs
    (MERGE, "p = np.exp(s - top)", "p = np.exp(s + top)"),
    (MERGE, "lse = top + np.log(l)", "lse = top - np.log(l)"),
    (SOFTMAX, "ds = seen(ds - p * pull)", "ds = seen(ds + p * pull)"),
    (SOFTMAX, 'pull = pull - checks.cotangent("dlse"', 'pull = pull + checks.cotangent("dlse"'),
    (SPARSE, "(dp - per_pair(", "(dp + per_pair("),
    (STEPS, "keep, add = np.exp(top - new)", "keep, add = np.exp(new - top)"),
    # factors
    (CHECKS, "1 / math.sqrt(d) if value", "1 / d if value"),
    (SOFTMAX, "s, slope = softcap * t, 1 - t * t", "s, slope = softcap * t, 1 - t"),
    (SOFTMAX, "s, slope = softcap * t", "s, slope = t"),
    (SOFTMAX, "ds = checks.scale(scale, q.shape[-1]) * (ds", "ds = 1.0 * (ds"),
    (SPARSE, "ds = scale * p * (dp", "ds = p * (dp"),
    (STEPS, "keep * l[rows] * y[rows] + p @ v_j", "keep * y[rows] + p @ v_j"),
    (COST, "pairs * (2 * d + 1 + 5 + 2 * e)", "pairs * (2 * d + 1 + 4 + 2 * e)"),
    (COST, "(n * d + m * d + m * e + n * e)", "(n * d + m * d + m * e + m * e)"),
    (SOFTMAX, "flops += pairs * (3 if softcap", "flops += pairs * (2 if softcap"),
    # off by one
    (SOFTMAX, "np.arange(n)[:, None] + (m - n)", "np.arange(n)[:, None] + (m - n) - 1"),
    (SOFTMAX, "np.arange(n)[:, None] + (m - n)", "np.arange(n)[:, None]"),
    (SPARSE, "(i[:, None] - left <= j)", "(i[:, None] - left < j)"),
    (SPARSE, "(j <= i[:, None] + right)", "(j < i[:, None] + right)"),
    (SPARSE, "j = np.arange(low, high + 1)", "j = np.arange(low + 1, high + 1)"),
    (SPARSE, "low, high = max(0, i[0] - left)", "low, high = max(1, i[0] - left)"),
    (SPARSE, "np.maximum(0, high - low + 1)", "np.maximum(0, high - low)"),
    (MASKS, "_spans(start + size - 1, start", "_spans(start + size, start"),
    (MASKS, "while not levels or size < n:", "while not levels:"),
    (MASKS, "ends = range(block - summary, block)", "ends = range(block - summary, block - 1)"),
    (MASKS, "_spans(i % stride, stop, stride, n)", "_spans(i % stride + 1, stop, stride, n)"),
    (COST, "short * (short + 1) // 2", "short * (short - 1) // 2"),
    (SPARSE, "range((residue - (m - n)) % dilation", "range((residue + (m - n)) % dilation"),
    # axes
    (MERGE, "l = p.sum(axis=-1, keepdims=True)", "l = p.sum(axis=-2, keepdims=True)"),
    (MERGE, "top = s.max(axis=-1, keepdims", "top = s.max(axis=None, keepdims"),
    (SOFTMAX, "pull = ds.sum(axis=-1, keepdims", "pull = ds.sum(axis=-2, keepdims"),
    (MERGE, "0, ys)).sum(axis=0)", "0, ys)).mean(axis=0)"),
    (ARRAYS, "axis=tuple(range(x.ndim - len(shape)))", "axis=tuple(range(0))"),
    # transposed arguments
    (SOFTMAX, "dv = masked_matmul(p.mT, dy", "dv = masked_matmul(p, dy"),
    (SOFTMAX, "dk = masked_matmul(ds.mT, q", "dk = masked_matmul(ds, q"),
    (SOFTMAX, "* (q @ k.mT)  # (..., n, m)", "* (k @ q.mT)  # (..., n, m)"),
    (PAIRS, "(weights.T if transpose else weights)", "weights"),
    (PAIRS, "a[..., i[part], :], b[..., j[part], :]", "a[..., j[part], :], b[..., i[part], :]"),
    # what must not leak, and what must not be written to
    (ARRAYS, "bad = None if allowed is None else", "bad = None if True else"),
    (MERGE, "top = np.where(top == -np.inf, 0, top)", "top = top + 0"),
    (MERGE, "p / np.where(l == 0, 1, l)", "p / l"),
    (MERGE, "np.where(lses[..., None] == -np.inf, 0, ys)", "ys"),
    (CHECKS, "mask = mask.copy()  #", "mask = mask  #"),
    (CHECKS, "mask.eliminate_zeros()", "mask.sort_indices()"),
]


def stands_once(mutation):
    file, old, _ = mutation
    return (ROOT / "refattn" / file).read_text().count(old) == 1


def caught(mutation=None):
    """Whether some test fails on a copy of the project with this mutation in it, or with none."""
    with tempfile.TemporaryDirectory() as folder:
        for part in ("refattn", "tests"):
            skip = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / part, Path(folder) / part, ignore=skip)
        shutil.copy(ROOT / "pyproject.toml", folder)
        if mutation:
            file, old, new = mutation
            path = Path(folder) / "refattn" / file
            path.write_text(path.read_text().replace(old, new))
        tests = [f"tests/test_{name}.py" for name in TESTS.split()]
        environment = {**os.environ, "PYTHONPATH": folder, "PYTHONDONTWRITEBYTECODE": "1"}
        environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
        command += ["-k", DESELECT, *tests]
        run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if run.returncode not in (0, 1, 2):
        raise RuntimeError(f"pytest could not run: {run.stdout[-2000:]}{run.stderr[-2000:]}")
    return run.returncode != 0


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="mutations whose file or text holds this word")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="how many at a time")
    options = parser.parse_args()
    chosen = [m for m in MUTATIONS if options.only in " ".join(m)]
    stale = [m for m in chosen if not stands_once(m)]
    for file, old, _ in stale:
        print(f"no longer stands once in {file}: {old}")
    if stale or not chosen:
        return 2
    if caught():
        print("the tests fail on the project as it is: nothing can be learned from mutations")
        return 2
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        results = list(tqdm(pool.map(caught, chosen), total=len(chosen)))
    for (file, old, new), found in zip(chosen, results, strict=True):
        print(f"{'caught  ' if found else 'SURVIVED'}  {file}: {old}  ->  {new}")
    print(f"{sum(results)} of {len(results)} caught")
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
