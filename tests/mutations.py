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
TESTS = """formulas vjps costs leaks masks properties steps errors house verify
    linear performer linformer hierarchy gates"""
DESELECT = "not readme and not links"  # the copy has no documents

SOFTMAX, MERGE, SPARSE, PAIRS = (
    "softmax/formula.py",
    "softmax/merge.py",
    "sparse/formula.py",
    "sparse/pairs.py",
)
STEPS, MASKS, ARRAYS = "softmax/steps.py", "masks.py", "arrays.py"
COST, CHECKS = "cost.py", "checks.py"
MAPS, CORE, CHUNKED = "linear/feature_maps.py", "linear/core.py", "linear/chunked.py"
LINEAR, INPUTS = "linear/formula.py", "linear/inputs.py"
FEATURES, PERFORMER = "performer/features.py", "performer/formula.py"
LINFORMER, PROJECTIONS = "linformer/formula.py", "linformer/projections.py"
BLOCKS, MERGED, LEVELS = "hierarchy/formula.py", "hierarchy/merged.py", "hierarchy/two_level.py"
GATED, GATES, HEADS = "gates/formula.py", "gates/functions.py", "gates/options.py"

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
    (MASKS, "np.maximum(0, high - low + 1)", "np.maximum(0, high - low)"),
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
    # linear attention
    (MAPS, "np.where(x > 0, x + 1, np.exp", "np.where(x > 0, x, np.exp"),
    (MAPS, "dphi * np.where(x > 0, 1, np.exp", "dphi * np.where(x > 0, x, np.exp"),
    (MAPS, "np.where(b == c, 0.5**0.5, 1)", "np.where(b == c, 0.5, 1)"),
    (MAPS, "(pairs + pairs.mT)", "(pairs + pairs)"),
    (MAPS, "return _softmax(x, -2)\n", "return _softmax(x, -1)\n"),
    (MAPS, "hidden=-np.inf,", "hidden=0.0,"),
    (CORE, "return np.where(zero, 0, num / np.where(zero, 1, den))", "return num / (den + 1e-10)"),
    (CORE, "dphi_q = dnum @ S.mT + dden * z", "dphi_q = dnum @ S.mT - dden * z"),
    (CORE, "dS = phi_q.mT @ dnum + dstate[0]", "dS = phi_q.mT @ dnum"),
    (CORE, "for i, at in reversed(_positions", "for i, at in (_positions"),
    (CORE, "return dnum, -(dnum * divide", "return dnum, (dnum * divide"),
    (CORE, "S + phi_k[..., i, :, None] * v", "S - phi_k[..., i, :, None] * v"),
    (CORE, "R, u = decay[..., i, :, None] * R, decay[..., i, :] * u", "R, u = R, u"),
    (LINEAR, "flops += keys * (2 * r * e + r)  # S, z", "flops += keys * 2 * r * e"),
    (INPUTS, "phi_k = np.where(seen, phi_k, 0)", "phi_k = phi_k + 0"),
    (INPUTS, "        if rows is None:\n", "        if False:\n"),
    (INPUTS, "if not feature_map.causal:", "if False:"),
    (CHUNKED, "a = np.where(past, phi_q @ phi_k.mT, 0)", "a = phi_q @ phi_k.mT"),
    (CHUNKED, "masked_matmul(a, v, past) + phi_q @ S", "a @ v + phi_q @ S"),
    (CHUNKED, "S, z = _advance(g, x, S, z)", "S, z = S, z"),
    (CHUNKED, "size * (size + 1) // 2 for size", "size * size // 2 for size"),
    # Performer
    (FEATURES, "np.where(np.diag(R) < 0, -1.0, 1.0)", "1.0"),
    (FEATURES, "rng.chisquare(d, num_features)", "np.full(num_features, d)"),
    (FEATURES, "0.5 * (x * x).sum", "(x * x).sum"),
    (FEATURES, "exponent = x @ omega.T - _half_square(x)", "exponent = x @ omega.T"),
    (FEATURES, "g @ omega - g.sum(axis=-1, keepdims=True) * x", "g @ omega"),
    (FEATURES, "(dsin * cos - dcos * sin)", "(dsin * cos + dcos * sin)"),
    (FEATURES, "count = exponent.shape[-1] if kind", "count = len(omega) if kind"),
    (FEATURES, "(1 - np.exp(-minus)) ** 2 / (2 * M)", "(1 - np.exp(-minus)) / (2 * M)"),
    (PERFORMER, "x, y = scale**0.5 * q, scale**0.5 * k", "x, y = scale * q, scale * k"),
    (
        PERFORMER,
        "running = np.maximum.accumulate(b, axis=-2)",
        "running = b.max(-2, keepdims=True) + 0 * b",
    ),
    (PERFORMER, "total = a + top", "total = a"),
    (PERFORMER, "np.where(seen, b, -np.inf)", "b"),
    (PERFORMER, "dk = root * vjp(dphi_k", "dk = vjp(dphi_k"),
    (PERFORMER, "(shifts * 2 + r * (e + 1))", "(shifts * 2 + r * e)"),
    # Linformer
    (LINFORMER, "k_r, v_r = E @ k, F @ v  #", "k_r, v_r = E @ k, E @ v  #"),
    (LINFORMER, "softmax_attention(q, k_r, v_r, scale=scale)", "softmax_attention(q, k_r, v_r)"),
    (LINFORMER, "_hide_rows(E.mT @ dk_r, visible)", "E.mT @ dk_r"),
    (LINFORMER, "_hide_columns(dv_r @ v.mT, visible)", "_hide_columns(dk_r @ k.mT, visible)"),
    (LINFORMER, "dE + dF]", "dE]"),
    (LINFORMER, "2 * r * keys * (d + e)", "2 * r * m * (d + e)"),
    (LINFORMER, "np.where(visible[..., None, :], x, 0)", "np.where(visible[..., :, None], x, 0)"),
    (PROJECTIONS, "/ math.sqrt(r)", "/ r"),
    (PROJECTIONS, "(j < cuts[1:, None])", "(j <= cuts[1:, None])"),
    (PROJECTIONS, "(eps**2 - eps**3)", "eps**2"),
    # hierarchy
    (BLOCKS, "np.maximum(y, a, out=y)", "np.fmax(y, a, out=y)"),
    (BLOCKS, "y += weights[..., i, None, None] * a", "y += a"),
    (BLOCKS, "y /= len(parts)", "y /= block"),
    (BLOCKS, "da = dy / len(parts)", "da = dy"),
    (BLOCKS, "da = np.where(first == i, dy, 0)", "da = dy"),
    (BLOCKS, "n * parts * (2 + 5 + 2 * e)", "n * parts * (5 + 2 * e)"),
    (MERGED, "scale=scale, dlse=dlse_i)", "scale=scale)"),
    (MERGED, "(dy * (a - y))", "(dy * (a + y))"),
    (LEVELS, "np.log(sizes[far])", "np.zeros(len(far))"),
    (LEVELS, "inside += d / (own.stop - own.start)", "inside += d"),
    (LEVELS, "far = n * max(0, parts - 1)", "far = n * parts"),
    # gates
    (GATED, "return np.where(_opened(gate), gate * y, 0)", "return np.where(_opened(gate), y, 0)"),
    (GATED, "vjp((gate * dy)[at][rows], *some", "vjp(dy[at][rows], *some"),
    (GATED, "np.where(_opened(gate), dy * y, 0), shape", "dy * y, shape"),
    (GATED, "if not _opened(gate).all():", "if False:"),
    (GATED, "return Cost(inner.flops + len(rows) * e", "return Cost(inner.flops + n * e"),
    (HEADS, 'grads["q"][at][rows] = dq', 'grads["q"][at][: len(rows)] = dq'),
    (GATES, "dt = dg * g * (1 - g)", "dt = dg * g"),
    (GATES, "(wide >= checks", "(wide > checks"),
    (GATES, "np.argsort(-scores, axis=-1", "np.argsort(scores, axis=-1"),
    (GATES, "/ sizes[:, None]", "/ block"),
    (SOFTMAX, "np.asarray(rows)[:, None] + (m - n)", "np.arange(len(rows))[:, None] + (m - n)"),
    (
        SPARSE,
        "causal=causal, dilation=dilation)[rows]",
        "causal=causal, dilation=dilation)[: len(rows)]",
    ),
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
