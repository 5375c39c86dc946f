"""Which kernels of Performer ``scripts/cuda_compile.py`` compiles, for which types."""

import numba
import numpy as np

from refattn.linear.cuda_instances import types_of
from refattn.linear.cuda_maps import POSITIVE, SIZES, TRIG
from refattn.performer.cuda_features import make_exponents, make_rows_vjp
from refattn.performer.cuda_shifts import make_lines, make_running, make_tops

KINDS = {"positive": (POSITIVE, False), "hyperbolic": (POSITIVE, True), "trig": (TRIG, True)}


def instances():
    """(label, function, signature, tuned, threads) of each."""
    whole, ints = numba.int64, numba.int32[:, ::1]
    for kind, sizes in SIZES.items():
        T, _, two, three, _ = types_of(kind)
        tuned, threads = kind is np.float32, sizes.side**2
        for name, (of, both) in KINDS.items():
            kernel = make_exponents(kind, of, both, sizes)
            signature = three, two, T, three, two
            yield f"performer features, {name}, {T}", kernel.py_func, signature, tuned, threads
            kernel, signature = make_rows_vjp(kind, of, both, sizes), (*(three,) * 3, two, T, three)
            yield f"performer rows, {name}, {T}", kernel.py_func, signature, tuned, threads
            for causal in (False, True):
                kernel = make_lines(kind, of, causal, sizes.side)
                signature = three, three, two, ints, three, three, ints, whole, two
                label = f"performer lines, {name}, {'causal' if causal else 'full'}, {T}"
                yield label, kernel.py_func, signature, tuned, threads
        for label, kernel, signature in (
            ("tops", make_tops(kind), (three, two, ints, whole, three, three)),
            ("running", make_running(kind), (three, three, three, three, ints)),
        ):
            yield f"performer {label}, {T}", kernel.py_func, signature, tuned, 128
