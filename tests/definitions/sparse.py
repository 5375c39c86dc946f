"""Local and sparse attention, and who sees whom in each pattern."""

from definitions.softmax import attend


def window_sees(i, j, n, m, window, causal=False, dilation=1):
    left, right = window if isinstance(window, tuple) else (window, window)
    if causal:
        right = 0
    return any(j == i + (m - n) + t * dilation for t in range(-left, right + 1))


def hierarchical_sees(i, j, n, b):
    levels = 1
    while b**levels < n:
        levels += 1
    for level in range(levels):
        same_block = i // b ** (level + 1) == j // b ** (level + 1)
        if same_block and (j + 1) % b**level == 0:
            return True
    return False


def strided_sees(i, j, stride, causal):
    return (abs(i - j) <= stride or (i - j) % stride == 0) and (j <= i or not causal)


def fixed_sees(i, j, block, summary, causal):
    return (i // block == j // block or j % block >= block - summary) and (j <= i or not causal)


def local_attention(q, k, v, *, window, causal=False, dilation=1, scale=None):
    n, m = len(q), len(k)
    scale = len(q[0]) ** -0.5 if scale is None else scale
    return attend(q, k, v, lambda i, j: window_sees(i, j, n, m, window, causal, dilation), scale)


def sparse_attention(q, k, v, *, mask, scale=None):
    """mask: rows of booleans."""
    scale = len(q[0]) ** -0.5 if scale is None else scale
    return attend(q, k, v, lambda i, j: mask[i][j], scale)
