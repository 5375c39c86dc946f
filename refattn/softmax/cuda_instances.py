"""Which of softmax attention's kernels ``scripts/cuda_compile.py`` compiles, for which types."""

import numba
import numpy as np

from refattn.softmax.cuda_first import ROWS, make_row_by_row, make_tile_by_tile
from refattn.softmax.cuda_tiles import Given, made_of, make_attend, tile_of
from refattn.softmax.cuda_tiles_backward import make_attend_keys, make_before
from refattn.softmax.cuda_tiles_backward import tile_of as backward_tile_of
from refattn.softmax.cuda_tiles_queries import make_attend_queries

PLAIN, ALL = Given(), Given(mask=True, bias=True, softcap=True)
# Options, d and e: the usual size of a head, and sizes that go by slices.
CALLS = [(PLAIN, 64, 64), (ALL, 64, 64), (PLAIN, 128, 128), (ALL, 128, 64)]


def instances():
    """(label, function, signature, tuned, threads) of each."""
    i2, i3, booleans = numba.int32[:, ::1], numba.int32[:, :, ::1], numba.boolean[:, :, ::1]
    for kind in (np.float32, np.float64):
        T, tuned = made_of(kind), kind is np.float32
        two, three, numbers = T[:, ::1], T[:, :, ::1], numba.types.UniTuple(T, 2)
        for given, d, e in CALLS:
            label = f"{'all options' if given.mask else 'plain'}, {d} x {e} columns, {T}"
            mask = booleans if given.mask else three
            inputs = (three, three, three, mask, three, i3, i2)
            tile = tile_of(d, e, kind, small=False)
            kernel = make_attend(tile, d > tile.d, given, kind)
            signature = (*inputs, numbers, three, two)
            yield f"softmax, {label}", kernel.py_func, signature, tuned, tile.threads
            tile = backward_tile_of(kind, small=False)
            sliced = d > tile.d or e > tile.e
            signature = (three, *inputs, i3, numbers, three, three, three)
            for name, make in (("keys", make_attend_keys), ("queries", make_attend_queries)):
                kernel = make(tile, sliced, given, kind)
                label_of = f"softmax gradient, {name}, {label}"
                yield label_of, kernel.py_func, signature, tuned, tile.threads
        tile = backward_tile_of(kind, small=False)
        kernel, signature = make_before(tile.rows, True, kind), (three, three, two, two, i3)
        label = f"softmax gradient, rows, {T}"
        yield label, kernel.py_func, (*signature, three, i3), tuned, tile.rows
        for step, make in enumerate((make_row_by_row, make_tile_by_tile), 1):
            signature = (two, two, two, numba.int32[::1], T, two)
            label = f"softmax, step {step}, {T}"
            yield label, make(64, 64, kind).py_func, signature, False, ROWS
