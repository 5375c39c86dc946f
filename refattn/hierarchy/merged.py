"""Softmax attention in a loop over blocks of keys: the weights that make 12.3.3's sum exact."""

import numpy as np

from refattn import checks
from refattn.softmax import merge_attention, softmax_attention, softmax_attention_vjp


def spans(n, block):
    """Slices of ``block`` positions; the last may be shorter."""
    return [slice(start, min(n, start + block)) for start in range(0, n, block)]


def merged(q, k, v, block, scale):
    """Softmax attention and its log-sum-exp, merged over one block of keys after the other."""
    lead = checks.lead(q, k, v)
    y = np.zeros((*lead, q.shape[-2], v.shape[-1]), q.dtype)
    lse = np.full(y.shape[:-1], -np.inf, q.dtype)
    for keys in spans(k.shape[-2], block):
        part = softmax_attention(q, k[..., keys, :], v[..., keys, :], scale=scale, return_lse=True)
        y, lse = merge_attention((y, part[0]), (lse, part[1]))
    return y, lse


def merged_vjp(dy, q, k, v, block, scale):
    """Gradient of ``merged``'s y, again one block of keys after the other."""
    y, lse = merged(q, k, v, block, scale)
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for keys in spans(k.shape[-2], block):
        inputs = q, k[..., keys, :], v[..., keys, :]
        a, lse_i = softmax_attention(*inputs, scale=scale, return_lse=True)
        # y = sum_i w_i a_i, w_i = exp(lse_i - lse)
        empty = lse_i == -np.inf
        w = np.where(empty, 0, np.exp(np.where(empty, 0, lse_i - np.where(empty, 0, lse))))
        a = np.where(empty[..., None], 0, a)
        da, dlse_i = w[..., None] * dy, w * (dy * (a - y)).sum(axis=-1)
        part = softmax_attention_vjp(da, *inputs, scale=scale, dlse=dlse_i)
        dq += part[0]
        dk[..., keys, :], dv[..., keys, :] = part[1:]
    return dq, dk, dv
