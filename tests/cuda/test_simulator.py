"""The runner of these tests sees what it is there to see: barriers that are missing or not met by
all, and indices past an array's end."""

import inspect
import textwrap

import numba
import numpy as np
import pytest

import refattn
import refattn.sparse.cuda_csr
import simulator
from refattn import gpu
from refattn.gpu import cuda
from variants import barriers, notices, without


def prefix_sums(x, y):
    """y[i] = x[0] + ... + x[i] of 64 numbers, in six steps, then reversed."""
    a = cuda.shared.array(64, numba.float64)
    b = cuda.shared.array(64, numba.float64)
    t = cuda.threadIdx.x
    a[t] = x[t]
    cuda.syncthreads()
    for step in (1, 4, 16):
        b[t] = a[t] + (a[t - step] if t >= step else 0.0)
        cuda.syncthreads()
        a[t] = b[t] + (b[t - 2 * step] if t >= 2 * step else 0.0)
        cuda.syncthreads()
    b[63 - t] = a[t]
    cuda.syncthreads()
    y[t] = b[t]


def run_prefix_sums(kernel):
    x, y = np.arange(64.0), np.zeros(64)
    cuda.jit(kernel)[1, 64](x, y)
    return [y]


def test_a_right_kernel_is_right_in_every_order():
    wanted = [np.cumsum(np.arange(64.0))[::-1]]
    assert not notices([lambda: run_prefix_sums(prefix_sums)], [wanted])


@pytest.mark.parametrize("line", barriers(inspect.getsource(prefix_sums)))
def test_a_barrier_that_is_missing_is_noticed(line):
    names = {"cuda": cuda, "numba": numba}
    exec(without(textwrap.dedent(inspect.getsource(prefix_sums)), line), names)
    assert notices([lambda: run_prefix_sums(names["prefix_sums"])], [run_prefix_sums(prefix_sums)])


def some_lanes(y):
    if cuda.threadIdx.x < 16:
        cuda.syncthreads()


def some_return(y):
    if cuda.threadIdx.x > 60:
        return
    cuda.syncthreads()


def two_places(y):
    if cuda.threadIdx.x < 32:
        cuda.syncthreads()
    else:
        cuda.syncthreads()


def warp_and_block(y):
    if cuda.threadIdx.x % 2:
        cuda.syncwarp()
    else:
        cuda.syncthreads()


def not_in_the_mask(y):
    cuda.syncwarp(0xFFFF)


@pytest.mark.parametrize(
    "kernel", [some_lanes, some_return, two_places, warp_and_block, not_in_the_mask]
)
def test_a_barrier_that_not_all_reach_is_an_error(kernel):
    with pytest.raises(simulator.Divergence, match="thread"):
        cuda.jit(kernel)[1, 64](np.zeros(1))


def exchange(y, votes):
    t = cuda.threadIdx.x
    y[0, t] = cuda.shfl_sync(0xFFFFFFFF, t, 3)
    y[1, t] = cuda.shfl_xor_sync(0xFFFFFFFF, t, 5)
    y[2, t] = cuda.shfl_up_sync(0xFFFFFFFF, t, 2)
    y[3, t] = cuda.shfl_down_sync(0xFFFFFFFF, t, 2)
    total = t
    for flip in (16, 8, 4, 2, 1):
        total += cuda.shfl_xor_sync(0xFFFFFFFF, total, flip)
    y[4, t] = total
    votes[0, t] = cuda.syncthreads_or(t == 5)
    votes[1, t] = cuda.syncthreads_and(t != 5)
    votes[2, t] = cuda.syncthreads_count(t < 40)
    votes[3, t] = cuda.ballot_sync(0xFFFFFFFF, t % 32 == 1)


def test_shuffles_and_votes():
    y, votes = np.zeros((5, 64)), np.zeros((4, 64))
    cuda.jit(exchange)[1, 64](y, votes)
    t = np.arange(64)
    lane, warp = t % 32, t // 32 * 32
    assert (y[0] == warp + 3).all()
    assert (y[1] == warp + (lane ^ 5)).all()
    assert (y[2] == np.where(lane < 2, t, t - 2)).all()
    assert (y[3] == np.where(lane > 29, t, t + 2)).all()
    assert (y[4] == 32 * warp + 31 * 16).all()
    assert (votes == [[1], [0], [40], [2]]).all()


def leftovers(y, write):
    a, b = cuda.shared.array(1, numba.float32), cuda.shared.array(1, numba.float32)
    own = cuda.local.array(1, numba.float32)
    y[cuda.blockIdx.x] = a[0], b[0], own[0]
    if write:
        a[0] = b[0] = own[0] = 1


def test_arrays_start_as_nan_in_every_block():
    y = np.zeros((3, 3))
    cuda.jit(leftovers)[3, 1](y, True)
    assert np.isnan(y).all()


def one_each(y):
    a, b = cuda.shared.array(1, numba.float32), cuda.shared.array(1, numba.float32)
    a[0] = 1
    b[0] = 2
    y[0] = a[0]


def test_two_arrays_on_one_line_are_two():
    y = np.zeros(1)
    cuda.jit(one_each)[1, 1](y)
    assert y == 1


def past_the_end(y):
    y[cuda.grid(1)] = 1


def test_an_index_past_the_end_names_the_thread():
    with pytest.raises(IndexError, match="out of bounds") as caught:
        cuda.jit(past_the_end)[3, 32](np.zeros(70))
    assert any("of block (2, 0, 0)" in note for note in caught.value.__notes__)


def test_arrays_inside_larger_ones():
    """What lies around inputs is not read, and around outputs not written: all of it is NaN."""
    rng = np.random.default_rng(2)
    around = {}

    def inside(name, shape, dtype, value=None):
        around[name] = np.full(np.prod(shape) + 200, np.nan, dtype)
        x = around[name][100:-100].reshape(shape)
        x[...] = rng.standard_normal(shape) if value is None else value
        return x

    n, m, d, e = 3, 40, 33, 5
    q = inside("q", (1, n, d), np.float32)
    k, v = inside("k", (1, m, d), np.float32), inside("v", (1, m, e), np.float32)
    y, lse = inside("y", (1, n, e), np.float32, 0), inside("lse", (1, n), np.float32, 0)
    indptr, indices = np.arange(n + 1) * m, np.tile(np.arange(m, dtype=np.int32), n)
    heads = np.zeros((1, 3), np.int32)
    kernel = refattn.sparse.cuda_csr.make_forward(1, np.float32)
    given = q, k, v, heads, indptr, indices, np.float32(0.3)
    gpu.launch(kernel, (n, 1), 32, given, (y, lse))
    wanted, wanted_lse = refattn.softmax_attention(q, k, v, scale=0.3, return_lse=True)
    np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(lse, wanted_lse, rtol=1e-5)
    for x in around.values():
        assert np.isnan(x[:100]).all() and np.isnan(x[-100:]).all()
