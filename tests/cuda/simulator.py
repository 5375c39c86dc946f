"""Numba's CUDA simulator made strict, for tests: one greenlet per CUDA thread, in a random order.

The simulator as it comes runs each CUDA thread in a thread of the operating system, in nearly the
same order each time, so that a missing barrier often goes unnoticed. Here the threads of a block
run one at a time, warp by warp, each up to its next barrier, and which warp and which lane comes
next is drawn by chance from a seed.

What differs from Numba's:

- A barrier that not all threads reach is an error: threads that have returned, that wait at another
  barrier or, for the lanes of a warp, elsewhere.
- Shuffles, votes and ``syncwarp`` exist.
- Shared and local arrays start as NaN (integers as a huge number), shared ones in each block, and
  several on one line are several.
- NumPy's numbers overflow and divide as in C, without a warning.

``install()`` puts it in place, for the whole process; ``seed(number)`` chooses the order.
"""

import contextlib
import random
import sys

import greenlet
import numpy as np
from numba import cuda
from numba.core import types
from numba.cuda.simulator import kernel, kernelapi
from numba.np import numpy_support

WARP = 32


class Divergence(RuntimeError):
    """Threads that should have met at a barrier did not."""


class _State:
    """The thread that runs, the seed of the order, and the modules whose ``cuda`` is replaced."""

    thread = None
    seed = 0
    swapped = []


@contextlib.contextmanager
def seed(number):
    """Draw the order of threads from this seed."""
    before, _State.seed = _State.seed, number
    try:
        yield
    finally:
        _State.seed = before


class Thread:
    """One CUDA thread: where it stands in its block, and what it waits for.

    ``waits`` is None, or (kind, place in the source, lanes that must come too); ``given`` is what
    it brought to the barrier, and ``found`` what all who met there brought, by thread or lane.
    """

    def __init__(self, block, block_index, index, run):
        shape = kernelapi.Dim3(*block.shape)
        self.blockIdx, self.threadIdx = block_index, kernelapi.Dim3(*index)
        x, y, z = index
        self.number = x + shape.x * (y + shape.y * z)
        self.lane = self.number % WARP
        self.block, self.waits, self.given, self.found = block, None, None, None
        self.greenlet = greenlet.greenlet(run)

    def meet(self, kind, given=None, lanes=None):
        """Wait for the others; returns what each brought."""
        frame = sys._getframe(2)
        self.waits = kind, (frame.f_code.co_filename, frame.f_lineno), lanes
        self.given = given
        self.block.hub.switch()
        return self.found

    def __str__(self):
        index, block = (tuple(map(int, x)) for x in (self.threadIdx, self.blockIdx))
        return f"thread {index} of block {block}"


class Block:
    """Runs the threads of one block; stands in for the simulator's BlockManager."""

    def __init__(self, function, grid, shape, debug):
        self.function, self.shape = function, shape

    def run(self, grid_point, *arguments):
        def run():
            with np.errstate(all="ignore"):
                self.function(*arguments)

        context = kernel._get_kernel_context()
        context._shared = Shared(context._shared._dynshared_size)
        self.hub = greenlet.getcurrent()
        where = kernelapi.Dim3(*grid_point)
        self.threads = [Thread(self, where, index, run) for index in np.ndindex(*self.shape)]
        self.threads.sort(key=lambda t: t.number)
        order = random.Random(f"{_State.seed} {grid_point}")
        try:
            while any(not t.greenlet.dead for t in self.threads):
                warps = [self.threads[i : i + WARP] for i in range(0, len(self.threads), WARP)]
                order.shuffle(warps)
                for warp in warps:
                    self._run_warp(warp, order)
                self._release_block()
        finally:
            for t in self.threads:
                if t.greenlet and not t.greenlet.dead:
                    t.greenlet.throw()  # GreenletExit: the frame is left

    def _run_warp(self, warp, order):
        """Each lane up to a barrier of the block, meeting the others at those of the warp."""
        while True:
            ready = [t for t in warp if t.waits is None and not t.greenlet.dead]
            order.shuffle(ready)
            for t in ready:
                self._step(t)
            waiting = [t for t in warp if t.waits and t.waits[2] is not None]
            if not waiting:
                return
            for t in waiting:
                if t.waits is not None:
                    self._release_lanes(t, warp)

    def _step(self, t):
        _State.thread = t
        try:
            t.greenlet.switch()
        except Exception as error:
            error.add_note(str(t))
            raise

    def _release_lanes(self, t, warp):
        kind, place, lanes = t.waits
        called = [other for other in warp if lanes >> other.lane & 1]
        if t not in called:
            raise Divergence(f"{t} is not among the lanes of its own {kind}: {lanes:#x}")
        self._all_here(called, t)
        found = {other.lane: other.given for other in called}
        for other in called:
            other.waits, other.found = None, found

    def _release_block(self):
        waiting = [t for t in self.threads if t.waits is not None]
        if not waiting:
            return
        self._all_here(self.threads, waiting[0])
        found = [t.given for t in self.threads]
        for t in waiting:
            t.waits, t.found = None, found

    def _all_here(self, called, t):
        kind, place, _ = t.waits
        for other in called:
            if other.greenlet.dead:
                raise Divergence(f"{t} waits at {kind} (line {place[1]}), but {other} has returned")
            if other.waits != t.waits:
                there = f"{other.waits[0]} (line {other.waits[1][1]})"
                raise Divergence(f"{t} waits at {kind} (line {place[1]}), but {other} at {there}")


def _poisoned(shape, dtype):
    if isinstance(dtype, types.Type):
        dtype = numpy_support.as_dtype(dtype)
    dtype = np.dtype(dtype)
    if dtype.kind in "fc":
        return np.full(shape, np.nan, dtype)
    return np.full(shape, np.iinfo(dtype).max if dtype.kind in "iu" else 1, dtype)


class Shared(kernelapi.FakeCUDAShared):
    """Shared arrays by the instruction that asks for them."""

    def array(self, shape, dtype):
        if np.ndim(shape) == 0 and shape == 0:
            return super().array(shape, dtype)  # dynamic
        frame = sys._getframe(1)
        place = frame.f_code, frame.f_lasti
        if place not in self._allocations:
            self._allocations[place] = _poisoned(shape, dtype)
        return self._allocations[place]


class Local:
    def array(self, shape, dtype):
        return _poisoned(shape, dtype)


@contextlib.contextmanager
def _swapped(function, module):
    """As the simulator's, but what a device function swaps stays so until the launch ends: other
    threads may still be inside that function."""
    outermost = not _State.swapped
    names = [name for name, value in function.__globals__.items() if value is cuda]
    _State.swapped.append((function.__globals__, names))
    function.__globals__.update(dict.fromkeys(names, module))
    try:
        yield
    finally:
        if outermost:
            for where, names in _State.swapped:
                where.update(dict.fromkeys(names, cuda))
            _State.swapped.clear()


def _shuffle(kind, source):
    def shuffle(self, mask, value, operand, width=WARP):
        t = _State.thread
        found = t.meet(kind, value, int(mask) & 0xFFFFFFFF)
        start = t.lane - t.lane % width
        lane = source(t.lane - start, int(operand), width)
        lane = start + lane if 0 <= lane < width else t.lane
        if lane not in found:
            raise Divergence(f"{t} reads from lane {lane}, which is not in {kind}")
        return found[lane]

    return shuffle


def _warp_vote(kind, decide):
    def vote(self, mask, value=None):
        return decide(_State.thread.meet(kind, value, int(mask) & 0xFFFFFFFF))

    return vote


def _block_vote(kind, decide):
    def vote(self, value):
        return decide([bool(x) for x in _State.thread.meet(kind, value)])

    return vote


WORDS = {
    "threadIdx": property(lambda self: _State.thread.threadIdx),
    "blockIdx": property(lambda self: _State.thread.blockIdx),
    "laneid": property(lambda self: _State.thread.lane),
    "local": property(lambda self: Local()),
    "syncthreads": lambda self: _State.thread.meet("syncthreads") and None,
    "syncthreads_count": _block_vote("syncthreads_count", sum),
    "syncthreads_and": _block_vote("syncthreads_and", lambda votes: int(all(votes))),
    "syncthreads_or": _block_vote("syncthreads_or", lambda votes: int(any(votes))),
    "syncwarp": lambda self, mask=0xFFFFFFFF: (
        _State.thread.meet("syncwarp", None, int(mask) & 0xFFFFFFFF) and None
    ),
    "shfl_sync": _shuffle("shfl_sync", lambda lane, source, width: source % width),
    "shfl_xor_sync": _shuffle("shfl_xor_sync", lambda lane, flip, width: lane ^ flip),
    "shfl_up_sync": _shuffle("shfl_up_sync", lambda lane, by, width: lane - by),
    "shfl_down_sync": _shuffle("shfl_down_sync", lambda lane, by, width: lane + by),
    "all_sync": _warp_vote("all_sync", lambda votes: all(votes.values())),
    "any_sync": _warp_vote("any_sync", lambda votes: any(votes.values())),
    "ballot_sync": _warp_vote(
        "ballot_sync", lambda votes: sum(1 << lane for lane, vote in votes.items() if vote)
    ),
}


def install():
    """Replace the simulator's threads, barriers and arrays, in this process."""
    kernel.BlockManager = Block
    kernel.swapped_cuda_module = _swapped
    kernel.FakeWithinKernelCUDAArray = lambda array: array._ary  # the wrapper is slow
    for name, word in WORDS.items():
        setattr(kernelapi.FakeCUDAModule, name, word)
