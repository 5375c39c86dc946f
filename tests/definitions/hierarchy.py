"""Blocks, fused; and blocks that see one summary of each other block."""

import math

from definitions.numbers import dot, exp, log, number_like
from definitions.softmax import attend


def blocks(n, block):
    """Lists of positions."""
    return [[j for j in range(n) if j // block == i] for i in range(-(-n // block))]


def largest(numbers):
    top = None
    for x in numbers:
        # the first is compared too, with minus infinity
        if x.real > (-math.inf if top is None else top.real):
            top = x
    return top


def softmax(scores, zero):
    top, weights, total = largest(scores), [], zero
    for s in scores:
        weights.append(exp(s - top))
        total = total + weights[-1]
    return [w / total for w in weights]


def mixture(weights, rows, zero):
    mixed = [zero] * len(rows[0])
    for w, row in zip(weights, rows, strict=True):
        for c, x in enumerate(row):
            mixed[c] = mixed[c] + x * w
    return mixed


def fused_entry(entries, fuse, weights, zero):
    """One number from the same entry of all blocks."""
    if fuse == "max":
        return largest(entries)
    total = zero
    for i, x in enumerate(entries):
        total = total + (x * weights[i] if fuse == "weighted" else x)
    return total / len(entries) if fuse == "mean" else total


def block_attention(q, k, v, *, block, fuse="concat", weights=None, scale=None):
    zero = number_like(q[0][0])
    scale = len(q[0]) ** -0.5 if scale is None else scale

    def everything(i, j):
        return True

    if fuse == "exact":
        parts = [
            attend(q, [k[j] for j in own], [v[j] for j in own], everything, scale, return_lse=True)
            for own in blocks(len(k), block)
        ]
        return [
            mixture(softmax([lse[i] for _, lse in parts], zero), [y[i] for y, _ in parts], zero)
            for i in range(len(q))
        ]
    parts = [
        attend([q[j] for j in own], [k[j] for j in own], [v[j] for j in own], everything, scale)
        for own in blocks(len(q), block)
    ]
    if fuse == "concat":
        return [row for part in parts for row in part]
    return [
        [fused_entry([part[p][c] for part in parts], fuse, weights, zero) for c in range(len(v[0]))]
        for p in range(block)
    ]


def summary(rows, pool, zero):
    """One row for a block: column means or maxima."""
    if pool == "max":
        return [largest(column) for column in zip(*rows)]
    means = []
    for column in zip(*rows):
        total = zero
        for x in column:
            total = total + x
        means.append(total / len(rows))
    return means


def two_level_attention(q, k, v, *, block, pool="mean", scale=None):
    zero = number_like(q[0][0])
    scale = len(q[0]) ** -0.5 if scale is None else scale
    parts = blocks(len(k), block)
    far_k = [summary([k[j] for j in own], pool, zero) for own in parts]
    far_v = [summary([v[j] for j in own], pool, zero) for own in parts]
    mass = [log(type(zero)(len(own))) for own in parts]
    y = []
    for i, q_i in enumerate(q):
        scores, values = [], []
        for part, own in enumerate(parts):
            if i in own:
                scores += [dot(q_i, k[j], zero) * scale for j in own]
                values += [v[j] for j in own]
            else:
                scores.append(dot(q_i, far_k[part], zero) * scale + mass[part])
                values.append(far_v[part])
        y.append(mixture(softmax(scores, zero), values, zero))
    return y
