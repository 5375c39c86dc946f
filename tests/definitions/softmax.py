"""Softmax attention. ``sees(i, j)`` says whether query i may attend to key j."""

import math

from definitions.numbers import dot, exp, log, number_like, plain, tanh


def softmax_row(q_i, keys, scale, bias=None, softcap=None):
    """Weights {j: P_ij} over ``keys`` {j: k_j}, the maximum and the sum. bias {j: number}."""
    zero = number_like(q_i[0])
    scores = {}
    for j, k_j in keys.items():
        s = dot(q_i, k_j, zero) * scale
        if softcap is not None:
            s = tanh(s / softcap) * softcap
        if bias is not None:
            s = s + bias[j]
        scores[j] = s
    top = number_like(q_i[0]) if not scores else None
    for s in scores.values():
        # the first score is compared too, with minus infinity
        if s.real > (-math.inf if top is None else top.real):
            top = s
    weights, total = {}, zero
    for j, s in scores.items():
        weights[j] = exp(s - top)
        total = total + weights[j]
    return {j: w / total for j, w in weights.items()}, top, total


def attend(q, k, v, sees, scale, bias=None, softcap=None, return_lse=False):
    """y_i = sum_j P_ij v_j over the keys that query i sees."""
    zero = number_like(q[0][0]) if q else 0
    y, lse = [], []
    for i, q_i in enumerate(q):
        keys = {j: k_j for j, k_j in enumerate(k) if sees(i, j)}
        row_bias = None if bias is None else bias[i]
        weights, top, total = softmax_row(q_i, keys, scale, row_bias, softcap)
        row = [zero] * len(v[0]) if v else []
        for j, p in weights.items():
            for c, x in enumerate(v[j]):
                row[c] = row[c] + p * x
        y.append(row)
        if return_lse:
            lse.append(log(total) + top)
    return (y, lse) if return_lse else y


def causal_sees(i, j, n, m):
    return j <= i + (m - n)


def softmax_attention(
    q, k, v, *, mask=None, bias=None, causal=False, scale=None, softcap=None, return_lse=False
):
    n, m = len(q), len(k)

    def sees(i, j):
        return (
            (mask is None or mask[i][j])
            and (bias is None or plain(bias[i][j]).real != -math.inf)
            and (not causal or causal_sees(i, j, n, m))
        )

    scale = len(q[0]) ** -0.5 if scale is None else scale
    return attend(q, k, v, sees, scale, bias, softcap, return_lse)
