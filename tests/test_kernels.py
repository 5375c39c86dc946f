"""What all compiled kernels promise: bits, threads, caches, and the step that they share."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import mpmath
import numba
import numpy as np
import pytest
import threadpoolctl

import refattn
from refattn import kernels, scalars

ROOT = Path(__file__).parents[1]


@numba.njit
def exp2_of(x):
    y = np.empty_like(x)
    for i in range(x.size):
        y[i] = scalars.exp2(x[i])
    return y


@numba.njit
def tanh_of(x):
    y = np.empty_like(x)
    for i in range(x.size):
        y[i] = scalars.tanh(x[i])
    return y


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_exp2_over_its_whole_range(dtype):
    """Within 3 eps down to the least exponent, exactly 0 below, never a denormal."""
    eps, least = np.finfo(dtype).eps, scalars.LEAST[np.dtype(dtype).name]
    rng = np.random.default_rng(0)
    t = np.concatenate(
        [
            rng.uniform(least, 0, 200_000),
            rng.uniform(-2, 0, 50_000),
            np.arange(least, 1),
            np.arange(least, 0) + 0.5,
            -(10.0 ** rng.uniform(-12, 0, 20_000)),
        ]
    ).astype(dtype)
    y = exp2_of(t)
    some = rng.choice(t.size, 3000, replace=False)
    with mpmath.workdps(40):
        for i in some:
            true = mpmath.power(2, mpmath.mpf(float(t[i])))
            assert abs(mpmath.mpf(float(y[i])) - true) <= 3 * eps * true
    wide = np.exp2(t.astype(np.longdouble))
    assert (abs(y - wide) <= 3 * eps * wide).all()
    assert (y >= np.finfo(dtype).tiny).all()
    below = np.array([least * (1 + 1e-6), 2 * least, -1e30, -np.inf], dtype)
    assert (exp2_of(below) == 0).all()
    assert exp2_of(np.zeros(1, dtype))[0] == 1
    assert np.isnan(exp2_of(np.array([np.nan], dtype))[0])
    assert [scalars.exp2(x) for x in below] == [0] * 4  # where nothing is compiled
    assert scalars.exp2(dtype(-3)) == 0.125


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_tanh(dtype):
    x = np.concatenate([np.linspace(-30, 30, 4001), [np.inf, -np.inf, 1e-8]]).astype(dtype)
    assert abs(tanh_of(x) - np.tanh(x.astype(np.longdouble))).max() <= 4 * np.finfo(dtype).eps
    assert np.isnan(tanh_of(np.array([np.nan], dtype))[0])


def arrays(*shapes, dtype=np.float32):
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


MASK = refattn.masks.bigbird(200, 32, global_blocks=1, random_blocks=1, rng=0)
OMEGA = refattn.random_features(32, 16, rng=0)
ALL = {
    "softmax_attention": {"causal": True, "softcap": 3.0},
    "local_attention": {"window": 20, "dilation": 2},
    "sparse_attention": {"mask": MASK},
    "linear_attention": {"causal": True},
    "linear_attention_chunked": {"chunk": 33},
    "linformer_attention": {"E": arrays((16, 200))[0]},
    "performer_attention": {"omega": OMEGA},
    "block_attention": {"block": 40, "fuse": "max"},
    "two_level_attention": {"block": 16},
    "gated_attention": {"gate": (np.arange(200) % 3 > 0).astype(np.float32)[:, None]},
}


def run(name, inputs, options):
    q, k, v, dy = inputs
    y = getattr(refattn, name)(q, k, v, backend="numba", **options)
    if dy.shape != y.shape:
        dy = np.ones_like(y)
    return [y, *getattr(refattn, f"{name}_vjp")(dy, q, k, v, backend="numba", **options)]


@pytest.mark.parametrize("name", ALL)
def test_the_same_bits_for_any_number_of_threads_and_run_to_run(name):
    inputs = arrays(*[(3, 200, 16)] * 4)
    runs = []
    before = numba.get_num_threads()
    try:
        for threads in (1, before, 1):
            numba.set_num_threads(threads)
            runs.append(run(name, inputs, ALL[name]))
    finally:
        numba.set_num_threads(before)
    for other in runs[1:]:
        for a, b in zip(runs[0], other, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", ALL)
def test_read_only_strided_and_broadcast_input(name):
    q, k, v, dy = arrays(*[(2, 200, 16)] * 4)
    plain = run(name, (q, k, v, dy), ALL[name])
    odd = []
    for x in (q, k, v, dy):
        strided = np.zeros((200, 16, 2, 2), x.dtype)
        strided[..., 0] = x.transpose(1, 2, 0)
        x = strided[..., 0].transpose(2, 0, 1)
        x.flags.writeable = False
        odd.append(x)
    for a, b in zip(plain, run(name, odd, ALL[name]), strict=True):
        np.testing.assert_array_equal(a, b)
    shared = getattr(refattn, name)(q, k[:1], v[:1], backend="numba", **ALL[name])
    spread = getattr(refattn, name)(
        q, *(np.broadcast_to(x[:1], x.shape) for x in (k, v)), backend="numba", **ALL[name]
    )
    np.testing.assert_array_equal(shared, spread)


@pytest.mark.parametrize("name", ALL)
def test_half_types_are_rounded_once(name):
    """As the formulas': the float32 answer, rounded."""
    inputs = arrays(*[(200, 16)] * 3, dtype=np.float16)
    options = {
        key: x.astype(np.float16) if isinstance(x, np.ndarray) else x
        for key, x in ALL[name].items()
    }
    wide = {
        key: x.astype(np.float32) if isinstance(x, np.ndarray) else x for key, x in options.items()
    }
    attention = getattr(refattn, name)
    y = attention(*inputs, backend="numba", **options)
    single = attention(*(x.astype(np.float32) for x in inputs), backend="numba", **wide)
    assert y.dtype == np.float16
    np.testing.assert_array_equal(y, single.astype(np.float16))


def test_blas_threads_are_what_they_were():
    q, k, v = arrays(*[(1, 64, 8)] * 3)
    blas = threadpoolctl.ThreadpoolController().select(user_api="blas")
    with threadpoolctl.threadpool_limits(2, user_api="blas"):
        before = [lib["num_threads"] for lib in blas.info()]
        with kernels.running(), kernels.running():
            assert {lib["num_threads"] for lib in blas.info()} == {1}
        assert [lib["num_threads"] for lib in blas.info()] == before
        with pytest.raises(ZeroDivisionError), kernels.running():
            1 / 0
        assert [lib["num_threads"] for lib in blas.info()] == before
        refattn.softmax_attention(q, k, v, backend="numba")
        assert [lib["num_threads"] for lib in blas.info()] == before


def test_several_python_threads_at_once():
    q, k, v = arrays(*[(2, 150, 16)] * 3)
    wanted = refattn.softmax_attention(q, k, v, backend="numba")
    wrong = []

    def work():
        for _ in range(20):
            y = refattn.softmax_attention(q, k, v, backend="numba")
            product = np.ones((200, 200)) @ np.ones((200, 200))  # BLAS of our own beside it
            if not (y == wanted).all() or product[0, 0] != 200:
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


SCRIPT = """
import numpy as np, refattn
q, k, v = np.random.default_rng(0).standard_normal((3, 70, 4)).astype(np.float32)
y = refattn.softmax_attention(q, k, v, causal=True, backend="numba")
print(float(abs(y - refattn.softmax_attention(q, k, v, causal=True)).max()) < 1e-6)
"""


def fresh(script, **environment):
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_without_compilation():
    assert fresh(SCRIPT, NUMBA_DISABLE_JIT="1") == "True"


def test_a_cache_that_cannot_be_written(tmp_path):
    folder = tmp_path / "file"
    folder.write_text("no folder")
    script = "from refattn import kernels\n@kernels.compiled\ndef f(x): return x\n"
    script = f"exec(compile({script!r}, 'nowhere', 'exec'))\nprint(f(3))"
    assert fresh(script, NUMBA_CACHE_DIR=str(folder / "below")) == "3"


def test_numba_is_imported_only_when_asked_for():
    script = "import sys, refattn; print('numba' in sys.modules, 'scipy.linalg' in sys.modules)"
    assert fresh(script) == "False False"


def test_a_lane_without_compilation(tmp_path):
    """The kernels' own Python, on one shape of every attention."""
    script = "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"
    done = subprocess.run(
        [
            *(sys.executable, "-c", script, "-q", "-p", "no:cacheprovider"),
            *("tests/test_backends.py", "-k", "forward_and_gradient and 7x7x4x5 and float32"),
        ],
        cwd=ROOT,
        env={**os.environ, "NUMBA_DISABLE_JIT": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.parametrize("name", ALL)
def test_every_entry_of_the_output_is_written(name, monkeypatch):
    """Memory that kernels get is full of NaN: what they do not write shows."""
    inputs = arrays(*[(2, 200, 16)] * 4)
    clean = run(name, inputs, ALL[name])
    empty = np.empty

    def poisoned(*args, **options):
        x = empty(*args, **options)
        if x.dtype.kind == "f":
            x.fill(np.nan)
        return x

    monkeypatch.setattr(np, "empty", poisoned)
    for a, b in zip(clean, run(name, inputs, ALL[name]), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("tasks", [0, 1, 2, 15, 16, 17, 1000])
def test_pieces_make_up_all_tasks_once(tasks):
    seen = np.zeros(tasks, int)

    def kernel(first, last, seen):
        seen[first:last] += 1

    kernels.in_parallel(kernel, tasks, seen)
    assert (seen == 1).all()


def test_after_an_error_no_further_piece_is_taken():
    begun = []

    def kernel(first, last):
        begun.append(first)
        if len(begun) == 2:  # whichever thread that is
            raise KeyboardInterrupt
        threading.Event().wait(0.02)

    with pytest.raises(KeyboardInterrupt):
        kernels.in_parallel(kernel, 10_000)
    assert len(begun) <= 2 + numba.get_num_threads()
    kernels.in_parallel(lambda first, last: None, 10)  # and the threads are there again


def test_the_settings_of_the_caller_hold_in_the_threads():
    found = []
    with np.errstate(over="raise"):
        kernels.in_parallel(lambda first, last: found.append(np.geterr()["over"]), 64)
    assert set(found) == {"raise"}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_has_threads_of_its_own():
    script = """
import os, numpy as np, refattn
q, k, v = np.random.default_rng(0).standard_normal((3, 4, 300, 8)).astype(np.float32)
y = refattn.softmax_attention(q, k, v, backend="numba")
child = os.fork()
if not child:
    same = (refattn.softmax_attention(q, k, v, backend="numba") == y).all()
    os._exit(0 if same else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert fresh(script) == "0"


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_all_finite(bad):
    x = np.ones((3, kernels.SHARE), np.float32)
    assert kernels.all_finite(x, np.zeros(0), x.astype(float))
    for place in (0, 1, x.size // 2, x.size - 1):
        y = x.copy()
        y.flat[place] = bad
        assert not kernels.all_finite(x, y)


@pytest.mark.parametrize("shape", [(), (6,), (1, 6), (6, 1), (6, 6)])
def test_the_gradient_of_a_bias_under_a_gate(shape):
    q, k, v, dy, bias = arrays((6, 3), (6, 3), (6, 3), (6, 3), shape, dtype=np.float64)
    gate = np.array([0.0, 1, 0, 1, 0, 1])[:, None]
    one, two = (
        refattn.gated_attention_vjp(dy, q, k, v, gate=gate, bias=bias, backend=backend)
        for backend in ("numpy", "numba")
    )
    for a, b in zip(one, two, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-14)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("rows", [1, 3])
def test_the_lowest_number_as_a_bias(dtype, rows):
    """Often used to hide: a row of nothing else weighs all its keys."""
    q, k, v, dy = arrays(*[(3, 4)] * 4, dtype=dtype)
    bias = np.zeros((3, 3), dtype)
    bias[:rows] = np.finfo(dtype).min
    bias[-1, 0] = np.finfo(dtype).min
    one, two = (
        [
            *refattn.softmax_attention(q, k, v, bias=bias, return_lse=True, backend=backend),
            *refattn.softmax_attention_vjp(dy, q, k, v, bias=bias, backend=backend),
        ]
        for backend in ("numpy", "numba")
    )
    for a, b in zip(one, two, strict=True):
        np.testing.assert_allclose(a, b, rtol=0.5 if a.ndim == 1 else 1e-5, atol=1e-5)
