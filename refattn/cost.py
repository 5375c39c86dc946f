"""What an attention costs, by one counting rule.

* A multiplication and an addition are one FLOP each; so are exp, tanh, log, sqrt, a division and a
  comparison. A sum (or maximum) of m terms is m additions (comparisons). Index arithmetic and the
  reading of masks are not FLOPs.
* Masked and causal forms count the pairs (i, j) that are visited, and no others.
* bytes: each input is read once and each output written once. A boolean mask is one byte an entry;
  a csr mask is its three arrays with 4-byte indices.
* workspace: bytes of the intermediate arrays that must live at the same time, as if each
  elementwise step wrote over its input.

The sizes are of one head: multiply by the number of heads. The tests run each definition on
numbers that count their own operations, and want equality.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """Work and memory of one head: FLOPs, bytes in and out, bytes of workspace."""

    flops: int
    bytes: int
    workspace: int

    @property
    def intensity(self):
        """Arithmetic intensity, FLOPs per byte."""
        return self.flops / self.bytes


def softmax_flops(pairs, d, e):
    """FLOPs of scores, softmax and weighted sum over this many visited pairs.

    A pair costs a dot product (2d), the scale (1), comparison, subtraction, exp, addition and
    division of the softmax (5), and its part of the weighted sum of values (2e).
    """
    return pairs * (2 * d + 1 + 5 + 2 * e)


def qkvy_bytes(n, m, d, e, itemsize):
    """Bytes of q, k and v read once and y written once."""
    return itemsize * (n * d + m * d + m * e + n * e)


def working_size(itemsize):
    """Bytes of one number in the arithmetic: half types are computed in float32."""
    return max(itemsize, 4)


def causal_pairs(n, m):
    """Pairs with j <= i + (m - n): bottom-right causal."""
    short = min(n, m)  # the last `short` queries see m - short + 1, ..., m keys
    return short * (m - short) + short * (short + 1) // 2
