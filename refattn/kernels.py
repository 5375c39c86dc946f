"""What the compiled kernels on the CPU share: how they are compiled, and how they are run."""

import contextlib
import contextvars
import functools
import math
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import scipy.linalg.cython_blas  # noqa: F401  cached kernels call it without asking for it
import threadpoolctl

from refattn.scalars import FASTMATH

PIECES = 8  # of the tasks, for each thread
SHARE = 2**16  # numbers of an array in a task
_ONE_AT_A_TIME = threading.RLock()


def compiled(function):
    """Compile with Numba, once per machine: the machine code is kept on disk where that can be
    written."""
    options = {"fastmath": FASTMATH, "nogil": True, "error_model": "numpy"}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # no folder that a cache could be in
        return numba.njit(**options)(function)


@functools.cache
def _pool(threads):
    return ThreadPoolExecutor(threads, thread_name_prefix="refattn")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # threads stay behind in the parent


def in_parallel(kernel, tasks, *arguments):
    """Call ``kernel(first, last, *arguments)`` on pieces that make up range(tasks), from as many
    threads as ``numba.get_num_threads`` says.

    Compiled kernels hold no lock of Python's, so plain threads do for a loop over tasks what
    ``prange`` would, and the compiler has half as much to do. A thread takes its next piece when
    it is free, so tasks may differ in size. Ctrl-C ends the call after the pieces under way.
    """
    threads = numba.get_num_threads()
    size = max(1, -(-tasks // (PIECES * threads)))
    starts = iter(range(0, tasks, size))  # shared: each piece goes to whoever comes first

    def stop():
        for _ in starts:  # nobody takes another piece
            pass

    def work():
        try:
            for first in starts:
                kernel(first, min(first + size, tasks), *arguments)
        finally:
            stop()

    if threads == 1 or size >= tasks:
        work()
        return
    runs = [
        _pool(threads).submit(contextvars.copy_context().run, work)
        for _ in range(min(threads, -(-tasks // size)))
    ]
    try:
        for run in runs:
            run.result()
    finally:
        stop()
        for run in runs:
            run.exception()


@functools.cache
def _blas():
    """The BLAS libraries of this process, found once."""
    controller = threadpoolctl.ThreadpoolController()
    return controller.select(user_api="blas").lib_controllers


@contextlib.contextmanager
def running():
    """One kernel at a time, with BLAS on one thread inside it.

    The kernels call BLAS from each of Numba's threads: with threads of its own it would fight
    them. What the caller had set is there again afterwards. Kernels called from several Python
    threads wait for each other, since each of them uses all cores.
    """
    with _ONE_AT_A_TIME:
        before = [(library, library.num_threads) for library in _blas()]
        for library, _ in before:
            library.set_num_threads(1)
        try:
            yield
        finally:
            for library, threads in before:
                library.set_num_threads(threads)


def all_finite(*arrays):
    """Whether every entry of these arrays is, with all threads."""
    return all(_finite_in_parallel(x.reshape(-1)) for x in arrays)


def _finite_in_parallel(x):
    found = np.ones(-(-len(x) // SHARE), np.bool_)
    in_parallel(_finite, len(found), x, found)
    return bool(found.all())


@compiled
def _finite(first, last, x, found):
    for t in range(first, last):
        part, count = x[t * SHARE : (t + 1) * SHARE], 0
        for i in range(len(part)):
            count += part[i] - part[i] == 0  # NaN for a NaN or an infinite number
        found[t] = count == len(part)


def ready(x):
    """The same numbers in memory as kernels take them: in C order, aligned, and writable, since
    Numba would compile a second time for an array that is not."""
    return np.require(x, requirements=["C", "A", "W"])


def spread(x, shape):
    """x in this shape, ``ready``; copied only where it has another."""
    return ready(x if x.shape == shape else np.broadcast_to(x, shape))


def heads_of(*arrays, axes=2):
    """Arrays (..., a, b) as (H, a, b), with leading axes that broadcast never copied: which of its
    heads each array gives to each head of the whole.

    Returns the arrays, an int64 array (heads, arrays), and the leading shape.
    """
    lead = np.broadcast_shapes(*(x.shape[:-axes] for x in arrays))
    flat = [ready(x).reshape(math.prod(x.shape[:-axes]), *x.shape[-axes:]) for x in arrays]
    index = [
        np.broadcast_to(np.arange(len(f)).reshape(x.shape[:-axes]), lead).reshape(-1)
        for x, f in zip(arrays, flat, strict=True)
    ]
    return flat, ready(np.stack(index, axis=-1).astype(np.int64)), lead


def joined(parts, plan, n):
    """Rows (H, n, d) from parts of them, added in their order: row r0 of part (., ., r0, r1, place)
    stands at ``place``."""
    if len(plan) == 1 and parts.shape[1] == n:
        return parts
    dq = np.zeros((len(parts), n, parts.shape[-1]), parts.dtype)
    for _, _, r0, r1, place in plan:
        dq[:, r0:r1] += parts[:, place : place + r1 - r0]
    return dq
