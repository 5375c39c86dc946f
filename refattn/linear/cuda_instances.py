"""Which kernels of linear attention ``scripts/cuda_compile.py`` compiles, for which types."""

import numba
import numpy as np

from refattn.linear.cuda_first import make_chunked, make_recurrent
from refattn.linear.cuda_maps import ELU, POSITIVE, SIZES, TRIG, real
from refattn.linear.cuda_step import COLUMNS, make_step
from refattn.linear.cuda_tiles import make_read, make_scan, make_sums
from refattn.linear.cuda_tiles_backward import make_pull

NAMES = {ELU: "elu", POSITIVE: "positive", TRIG: "trig"}  # other maps are parts of these


def types_of(kind):
    """Numba's types of a number, and of arrays of one to four axes, in C order."""
    T = real(kind)
    return T, T[::1], T[:, ::1], T[:, :, ::1], T[:, :, :, ::1]


def instances():
    """(label, function, signature, tuned, threads) of each."""
    whole, ints = numba.int64, numba.int32[:, ::1]
    for kind, sizes in SIZES.items():
        T, _, two, three, four = types_of(kind)
        tuned, threads = kind is np.float32, sizes.side**2
        side, state = (
            numba.types.Tuple(parts) for parts in ((three, two, three, two, ints), (four, three))
        )
        given = side, side, state, three, three, ints, whole
        for of, name in NAMES.items() if tuned else ((POSITIVE, "positive"),):
            for query, who in ((False, "keys"), (True, "queries")):
                kernel = make_sums(kind, of, query, sizes)
                signature = side, three, whole, four, three
                yield f"linear sums, {who}, {name}, {T}", kernel.py_func, signature, tuned, threads
                for causal in (False, True):
                    form = f"{who}, {name}, {'causal' if causal else 'full'}, {T}"
                    kernel = make_read(kind, of, query, causal, query, sizes)
                    signature = *given, three, two
                    yield f"linear read, {form}", kernel.py_func, signature, tuned, threads
                    kernel = make_pull(kind, of, query, causal, sizes)
                    signature = *given, three
                    yield f"linear pull, {form}", kernel.py_func, signature, tuned, threads
        kernel, signature = make_scan(kind, True, False), (three, four, three, three, two)
        yield f"linear scan, {T}", kernel.py_func, signature, tuned, 256
        kernel, signature = make_step(kind, ELU, True), (*(three,) * 3, ints, three, two)
        signature = *signature, three, three, two
        yield f"linear step, {T}", kernel.py_func, signature, tuned, COLUMNS
        for label, kernel in (
            ("recurrent", make_recurrent(kind, 16, 32)),
            ("chunked", make_chunked(kind, 16, 32, 16)),
        ):
            yield f"linear first, {label}, {T}", kernel.py_func, (three,) * 4, False, 32
