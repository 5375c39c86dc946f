"""Gates on the CPU: the formula, with the open rows' attention compiled."""

import numpy as np

from refattn.dispatch import ROW_FORMS, composed, rows_of
from refattn.gates import formula
from refattn.linear import chunked
from refattn.linear import formula as linear
from refattn.linear.inputs import keys_taken, up_to_last
from refattn.performer import formula as performer

gated_attention = composed(formula.gated_attention, "numba")
gated_attention_vjp = composed(formula.gated_attention_vjp, "numba")


def _causal_by_rows(attention, vjp, causal):
    """A causal form takes every key into its state anyway: closed queries are zeros on the way, and
    what they give is thrown away. ``causal`` is the attention's default."""

    def form(rows, n, m, **options):
        plain = ROW_FORMS[attention.__name__, "numpy"](rows, n, m, **options)
        if not options.get("causal", causal):
            return plain
        options, count = {**options, "causal": True}, keys_taken(rows)

        def whole(x):
            full = np.zeros((*x.shape[:-2], count, x.shape[-1]), x.dtype)
            full[..., rows, :] = x
            return full

        def forward(q, k, v, **few):
            return attention(whole(q), k, v, **few)[..., rows, :]

        def backward(dy, q, k, v, **few):
            dq, *rest = vjp(whole(dy), whole(q), k, v, **few)
            return dq[..., rows, :], *rest

        return *up_to_last(rows, m, forward, backward), options

    rows_of(attention, backend="numba")(form)


_causal_by_rows(linear.linear_attention, linear.linear_attention_vjp, False)
_causal_by_rows(chunked.linear_attention_chunked, chunked.linear_attention_chunked_vjp, True)
_causal_by_rows(performer.performer_attention, performer.performer_attention_vjp, False)
