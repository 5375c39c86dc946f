"""Linformer, and projections as sums over segments."""

from definitions.numbers import number_like
from definitions.softmax import attend


def project(E, x, columns, visible):
    """E x over the visible rows of x, which has this many columns."""
    zero, rows = number_like(E[0][0]) if E[0] else 0.0, []
    for weights in E:
        row = [zero] * columns
        for j in visible:
            for c in range(columns):
                row[c] = row[c] + x[j][c] * weights[j]
        rows.append(row)
    return rows


def linformer_attention(q, k, v, *, E, F=None, key_mask=None, scale=None):
    visible = [j for j in range(len(k)) if key_mask is None or key_mask[j]]
    mixed_k = project(E, k, len(q[0]), visible)
    mixed_v = project(E if F is None else F, v, len(v[0]), visible)
    scale = len(q[0]) ** -0.5 if scale is None else scale
    return attend(q, mixed_k, mixed_v, lambda i, t: True, scale)


def segment_means(x, r):
    """Means of r segments, segment t being the j with floor((j + 1) r - 1) / m) = t."""
    m, means = len(x), []
    for t in range(r):
        inside = [x[j] for j in range(m) if ((j + 1) * r - 1) // m == t]
        means.append([sum(column) / len(inside) for column in zip(*inside)])
    return means
