"""Gradients of the definitions, by a complex step: x + ih has no cancellation, and
Im f(x + ih) / h is f'(x) to full precision when h is tiny."""

import numpy as np

from numbers_of import rows

STEP = 1e-30


def parts(name, value):
    """An input as named arrays: the parts of a tuple are inputs of their own."""
    if isinstance(value, tuple):
        return {(name, i): part for i, part in enumerate(value)}
    return {(name, None): value}


def pieces_of(case):
    """Everything that has a gradient, by name; and the options that have none."""
    q, k, v, options = case.build()
    pieces = {**parts("q", q), **parts("k", k), **parts("v", v)}
    for name in case.mechanism.arrays:
        if name in options:
            pieces |= parts(name, options.pop(name))
    return pieces, options


def assemble(pieces):
    """The inverse of ``parts``, for all inputs at once."""
    whole = {}
    for (name, i), piece in pieces.items():
        whole[name] = piece if i is None else (*whole.get(name, ()), piece)
    return whole


def nudged(array, at, kind):
    """The array as nested lists of complex numbers, one of them moved by i * STEP."""
    shifted = array.astype(complex)
    shifted[at] += 1j * STEP
    return rows(shifted, kind)


def definition_gradients(case, dy, dlse=None, kind=complex, dtype=float, **more):
    """d/dx of sum(dy * y) (+ sum(dlse * lse)) for q, k, v and each array among the options;
    ``dtype=object`` keeps the numbers of ``kind``; ``more`` are options."""
    pieces, options = pieces_of(case)
    options |= more
    if dlse is not None:
        options["return_lse"] = True

    def loss(inputs):
        y = case.mechanism.definition(**assemble(inputs), **options)
        y, lse = y if dlse is not None else (y, [])
        total = sum(g * x for dy_i, y_i in zip(dy, y) for g, x in zip(dy_i, y_i))
        return total + sum(g * x for g, x in zip(dlse, lse) if x.real != -np.inf) if lse else total

    plain = {name: rows(piece, kind) for name, piece in pieces.items()}
    gradients = []
    for name, piece in pieces.items():
        grad = np.zeros(piece.shape, dtype)
        for at in np.ndindex(piece.shape):
            grad[at] = loss({**plain, name: nudged(piece, at, kind)}).imag / STEP
        gradients.append(grad)
    return gradients
