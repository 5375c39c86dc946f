"""Exercises of notebook 11, kernels: run here thread by thread, in an order drawn by chance.

No GPU and no simulator is needed: ``launch`` puts its own ``cuda`` in the place of a kernel's. One
thread runs at a time, up to its next barrier, so that a missing one shows; memory starts as NaN,
counts what is read, and refuses an index that is outside.
"""

import math
import random
import sys
import threading
import types
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from refattn.exercises.base import Design, Function, Refused
from refattn.verify.libraries import WrongKind


class Memory:
    """An array that counts what is read and written, and refuses what is outside."""

    def __init__(self, name, array, block=None, writable=True):
        self.name, self.array, self.block, self.writable = name, array, block, writable
        self.shape, self.loads, self.stores = array.shape, 0, 0

    def __len__(self):
        return len(self.array)

    def _place(self, index, what):
        index = index if isinstance(index, tuple) else (index,)
        if len(index) != self.array.ndim or any(isinstance(i, slice) for i in index):
            raise WrongKind(f"a kernel {what} one number of {self.name} at a time")
        if not all(isinstance(i, (int, np.integer)) for i in index):
            raise WrongKind(f"an index of {self.name} is no whole number: divide with //")
        if not all(0 <= i < size for i, size in zip(index, self.shape, strict=True)):
            at = ", ".join(str(int(i)) for i in index)
            words = f"{self.block.now} {what} {self.name}[{at}], outside its shape {self.shape}: a "
            raise WrongKind(words + "guard must keep such a thread from it")
        self.block.alive()
        return index

    def __getitem__(self, index):
        index = self._place(index, "reads")
        self.loads += 1
        self.block.now.reads += 1
        return self.array[index]

    def __setitem__(self, index, number):
        index = self._place(index, "writes")
        if not self.writable:
            raise WrongKind(f"wrote to its input {self.name}")
        self.stores += 1
        self.array[index] = number


class Thread(threading.Thread):
    """One thread of a block: it runs when it is told to, until it meets a barrier."""

    def __init__(self, block, index, call):
        super().__init__(daemon=True)
        self.block, self.index, self.call = block, index, call
        self.go, self.waits, self.done, self.error = threading.Semaphore(0), None, False, None
        self.reads = 0
        self.start()

    def __str__(self):
        t, b = self.index, self.block.blockIdx
        return f"thread ({t.x}, {t.y}) of block ({b.x}, {b.y})"

    def run(self):
        self.go.acquire()
        try:
            self.block.alive()
            with np.errstate(all="ignore"):
                self.call()
        except BaseException as error:  # raised again by the block, unless that has given up
            self.error = error
        self.done = True
        self.block.back.release()


class Block:
    """Runs the threads of one block, and is what they know as ``cuda``."""

    def __init__(self, grid, block, index, order):
        self.gridDim, self.blockDim, self.blockIdx = map(_three, (grid, block, index))
        self.order, self.back = order, threading.Semaphore(0)
        self.given_up, self.now, self.barriers, self.arrays = False, None, 0, {}
        self.shared = types.SimpleNamespace(array=self._shared)
        self.local = types.SimpleNamespace(array=_poisoned)

    threadIdx = property(lambda self: self.now.index)

    def __getattr__(self, name):
        raise WrongKind(f"cuda.{name} is not to be had here: shared memory and barriers are enough")

    def run(self, call):
        """Every thread to its end; the first error is raised. Returns the threads."""
        points = product(*map(range, vars(self.blockDim).values()))
        threads = [Thread(self, _three(point), call) for point in points]
        try:
            while ready := [t for t in threads if not t.done]:
                self.order.shuffle(ready)
                for t in ready:
                    self.now, t.waits = t, None
                    t.go.release()
                    self.back.acquire()
                    if t.error is not None:
                        raise t.error
                self._meet(threads)
        finally:
            self.given_up = True
            for t in threads:
                t.go.release()
        return threads

    def _meet(self, threads):
        """All threads of a block come to the same barrier, or none."""
        first = next((t for t in threads if not t.done), None)
        self.barriers += first is not None
        for t in threads if first else ():
            if t.done or t.waits != first.waits:
                where = "has returned" if t.done else f"at that of line {t.waits}"
                raise WrongKind(
                    f"thread {first.index.x} waits at the barrier of line {first.waits}, thread "
                    f"{t.index.x} {where}: all threads of a block must come to a barrier"
                )

    def alive(self):
        if self.given_up:
            raise SystemExit  # which ends the thread

    def _shared(self, shape, dtype):
        frame = sys._getframe(1)
        place = frame.f_code, frame.f_lasti
        if place not in self.arrays:
            self.arrays[place] = Memory("shared memory", _poisoned(shape, dtype), self)
        return self.arrays[place]

    def syncthreads(self):
        t = self.now
        t.waits = sys._getframe(1).f_lineno
        self.back.release()
        t.go.acquire()
        self.alive()

    def grid(self, ndim):
        parts = zip(*(vars(p).values() for p in (self.blockIdx, self.blockDim, self.threadIdx)))
        where = tuple(block * size + thread for block, size, thread in parts)
        return where[:ndim] if ndim > 1 else where[0]


def _three(x):
    return types.SimpleNamespace(**dict(zip("xyz", x)))


def _poisoned(shape, dtype):
    dtype = np.dtype(getattr(dtype, "name", dtype))  # types of Numba have a name too
    return np.full(shape, np.nan if dtype.kind == "f" else 77, dtype)


def launch(kernel, grid, block, inputs, output, seed=0):
    """``kernel[grid, block](*inputs, output)``, the order of threads drawn from a seed.

    ``inputs`` maps names to arrays and numbers; ``output`` is (shape, dtype), and starts as NaN.
    Returns the output (None where nothing was written), numbers read from each array, barriers of a
    block, and the most numbers that one thread read.
    """
    kernel = getattr(kernel, "py_func", kernel)
    grid, block = ((*np.atleast_1d(x).tolist(), 1, 1)[:3] for x in (grid, block))
    y = Memory("the output", np.full(output[0], np.nan, output[1]))
    given = [Memory(k, x, writable=False) if np.ndim(x) else x for k, x in inputs.items()]
    memories = [x for x in (*given, y) if isinstance(x, Memory)]
    barriers = longest = 0
    for index in product(*map(range, grid)):
        one = Block(grid, block, index, random.Random(f"{seed} {index}"))
        for x in memories:
            x.block = one
        names = kernel.__globals__ | {"cuda": one}
        ours = types.FunctionType(kernel.__code__, names, closure=kernel.__closure__)
        threads = one.run(lambda ours=ours: ours(*given, y))
        barriers, longest = one.barriers, max(longest, *(t.reads for t in threads))
    loads = {x.name: x.loads for x in memories}
    return y.array if y.stores else None, loads, barriers, longest


@dataclass(frozen=True)
class Launched(Function):
    """A kernel, launched in three orders of threads.

    ``plan(*case)`` gives what ``launch`` takes: grid, block, inputs, output. ``longest``: how many
    numbers a thread may read; more gets half of the points and the advice.
    """

    plan: Callable = None
    longest: int | None = None
    advice: str = ""
    seconds: float = 4.0

    def check(self, answer):
        traces = []
        mark = super().check(lambda *case: self._launched(answer, case, traces))
        if not mark.passed or self.longest is None:
            return mark
        *_, barriers, longest = map(max, zip(*(trace[2:] for trace in traces)))
        score = f"score: {longest} numbers read by the busiest thread (at most {self.longest})"
        score += f", {barriers} barriers"
        if longest > self.longest:
            return replace(mark, points=self.points / 2, words=(self.advice,), score=score)
        return replace(mark, score=score)

    def _launched(self, answer, case, traces):
        if not callable(answer):
            return answer
        found = [launch(answer, *self.plan(*case), seed=seed) for seed in range(3)]
        traces += found
        y, *others = (output for output, *_ in found)
        if y is None:
            return None
        if not all(np.array_equal(y, x, equal_nan=True) for x in others):
            words = "the answer changes with the order in which threads run: a thread reads what "
            raise WrongKind(words + "another one may not have written yet")
        if np.isnan(y).any():
            words = f"{np.isnan(y).sum()} of {y.size} numbers of the output are NaN: no thread "
            raise WrongKind(words + "wrote them, or what they were made of")
        return y


def _some(*shape):
    return np.random.default_rng(shape).standard_normal(shape).astype(np.float32)


def _plan_scores(q, k, scale):
    grid = -(-len(q) // 8), -(-len(k) // 4)
    return grid, (8, 4), {"q": q, "k": k, "scale": scale}, ((len(q), len(k)), np.float32)


def _scores(q, k, scale):
    return scale * (q.astype(float) @ k.astype(float).T)


def _loads(n, d, e, rows, causal=True):
    """Counted block by block: its queries once, then every key and value that one of them sees."""
    tiles = [range(i, min(i + rows, n)) for i in range(0, n, rows)]
    return sum(len(tile) * d + (tile[-1] + 1 if causal else n) * (d + e) for tile in tiles)


N, D = 4096, 32  # tokens, and columns of q, k and v, of exercise 5


def needs(rows, keys, down, across, d=D):
    """(bytes of shared memory, registers of a thread, products for a number from shared memory) of
    step 3. Registers: what a thread keeps, and 112 that the compiler takes for all else."""
    a, b, columns = rows // down, keys // across, d // across
    numbers = rows * (d + 4) + keys * (d + 4) + keys * d + rows * (keys + 4) + rows * across
    return 4 * numbers + rows * keys + 8 * rows, a * b + a * columns + 2 * a + 112, a * b / (a + b)


def _loads_of_tile(tile):
    good = isinstance(tile, (tuple, list)) and len(tile) == 4
    if not good or not all(isinstance(x, (int, np.integer)) for x in tile):
        raise Refused("Give four whole numbers: (rows, keys, down, across).")
    rows, keys, down, across = tile
    if any(x < 1 or x & (x - 1) for x in tile) or rows % down or keys % across or across > D // 4:
        raise Refused("Take powers of two; down divides rows, across divides keys and 8.")
    shared, registers, reuse = needs(*tile)
    if shared > 48 * 1024:
        raise Refused(f"These tiles take {shared:,} bytes of shared memory; a block has 49,152.")
    if registers > 255:
        raise Refused(f"A thread needs {registers} registers; it can have 255.")
    if not D <= down * across <= 1024:
        raise Refused(f"{down * across} threads: at least {D}, one a column, at most 1024.")
    if reuse < 2:
        words = f"A number from shared memory serves {reuse:.2g} products: at least 2 are wanted. "
        raise Refused(words + "Give each thread a larger patch of scores.")
    return _loads(N, D, D, rows, causal=False)


EXERCISES = {
    1: Launched(
        "scores",
        points=2,
        truth=_scores,
        plan=_plan_scores,
        cases=[(_some(n, d), _some(m, d), np.float32(0.5)) for n, m, d in [(9, 7, 5), (1, 5, 3)]],
        tolerance=1e-5,
        hint="i, j = cuda.grid(2); which i and j have no score?",
        mistakes={"The scores are not scaled.": lambda q, k, scale: _scores(q, k, 1)},
    ),
    2: Launched(
        "row_max",
        points=3,
        truth=lambda s: s.max(axis=1),
        plan=lambda s: (len(s), 32, {"s": s}, (len(s), np.float32)),
        cases=[(np.sort(_some(3, 70)),), (_some(2, 5),), (_some(1, 32),), (_some(1, 9) - 9,)],
        hint="First each thread alone: the largest of columns t, t + 32, ... Then halve.",
        longest=20,
        advice="Right, but one thread reads all numbers while 31 wait, or each reads all. Give "
        "each its columns, then halve the threads at work: 5 steps in place of 31.",
        mistakes={
            "A row of negative numbers has a negative maximum: start from -inf, not from 0.": (
                lambda s: np.maximum(s.max(axis=1), 0)
            ),
            "Only the first 32 columns are looked at: a thread must go on to t + 32, t + 64, ...": (
                lambda s: s[:, :32].max(axis=1)
            ),
        },
    ),
    3: Function(
        "loads",
        points=2,
        truth=_loads,
        cases=[(64, 8, 8, 16), (70, 8, 4, 32), (5, 3, 2, 8), (40, 4, 3, 1), (4096, 64, 64, 64)],
        hint="A block reads its own queries once. Which is its last one, and what does that see?",
        mistakes={
            "This is (3) as it stands: a causal block stops at the key of its last query.": (
                lambda *case: _loads(*case, causal=False)
            ),
            "The last block may be short: no key comes after that of query n - 1.": (
                lambda n, d, e, rows: n * d + sum(range(rows, n + rows, rows)) * (d + e)
            ),
            "The queries are read as well, each once.": lambda n, d, *x: _loads(n, d, *x) - n * d,
            "A key has d columns, a value has e.": lambda n, d, _, rows: _loads(n, d, d, rows),
            "A block reads a key once, not for each query.": lambda n, d, e, _: _loads(n, d, e, 1),
        },
    ),
    4: Function(
        "banks",
        points=1,
        truth=lambda width: len({(row * width) % 32 for row in range(32)}),
        cases=[(width,) for width in (1, 8, 12, 32, 33, 36, 64, 68)],
        hint="Thread t reads address t * width. When are two of them 32 apart, or 64, or ...?",
        mistakes={
            "This is how many threads meet in a bank; asked for are the banks that differ.": (
                lambda width: math.gcd(width, 32)
            ),
            "A width that is no multiple of 32 need not be free of conflicts: try 36.": (
                lambda width: 32 if width % 32 else 1
            ),
            "An odd width meets all 32 banks; an even one need not meet half of them.": (
                lambda width: 32 if width % 2 else 16
            ),
        },
    ),
    5: Design(
        "(rows, keys, down, across)",
        points=2,
        hint="Which of the four numbers is in equation (3)? What must shrink to make room for it?",
        score=_loads_of_tile,
        plain=lambda: _loads(N, D, D, 32, causal=False),
        best=lambda: _loads(N, D, D, 128, causal=False),
        unit="numbers read",
        notes={"There is room for more rows, if fewer keys come at a time.": lambda x: x[0] < 128},
    ),
}
