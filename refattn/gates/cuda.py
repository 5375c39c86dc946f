"""Gates on a GPU: the formula, with the open rows' attention by the kernels.

Open rows are gathered, so that closed ones launch no work. Which rows are open is looked at on the
host: their number is the size of what is launched.
"""

import inspect
import math

import numpy as np

from refattn import checks, gpu
from refattn.dispatch import ROW_FORMS, composed, inside, row_form, rows_of
from refattn.gates import formula
from refattn.gates.options import CORE, ROUNDED, gradient_names
from refattn.linear import chunked
from refattn.linear import formula as linear
from refattn.linear.inputs import keys_taken
from refattn.performer import formula as performer
from refattn.softmax.formula import softmax_attention

_gated_attention = composed(formula.gated_attention, "cuda")
_gated_attention_vjp = composed(formula.gated_attention_vjp, "cuda")
ORDER = "bias", "E", "F", "gate", "weights", "initial_state"


def gated_attention(q, k, v, *, gate, attention=softmax_attention, **options):
    """``refattn.gated_attention``."""
    gpu.require()
    if gpu.namespace(q, k, v) is np:
        return _gated_attention(q, k, v, gate=gate, attention=attention, **options)
    with inside("cuda"):  # where calls that name no backend go
        call = _Call(q, k, v, gate, attention, options)
        y = call.whole
        if y is None:
            y = call.of_heads(lambda forward, vjp, few, *inputs: [forward(*inputs, **few)])[0]
    return gpu.cast(call.xp, call.gate * y, call.dtype)


def gated_attention_vjp(
    dy, q, k, v, *, gate, attention=softmax_attention, attention_vjp=None, **options
):
    """``refattn.gated_attention_vjp``."""
    gpu.require()
    if gpu.namespace(q, k, v) is np:
        given = {"gate": gate, "attention": attention, "attention_vjp": attention_vjp}
        return _gated_attention_vjp(dy, q, k, v, **given, **options)
    with inside("cuda"):
        call = _Call(q, k, v, gate, attention, options)
        if (call.vjp is None) == (attention_vjp is None):
            raise ValueError(
                "a foreign attention's gradient needs attention_vjp"
                if call.vjp is None
                else "attention_vjp came, but refattn's own attentions bring their gradient"
            )
        y, dq, dk, dv, *rest = _gradients(dy, call, call.vjp or attention_vjp)
    xp, dtype, more = call.xp, call.dtype, []
    if call.vjp is None:
        rest, more = [], rest
    named = zip(gradient_names(options), rest)
    found = {name: _summed(xp, g, options[name], dtype) for name, g in named}
    # y = gate * attention
    dy = gpu.cotangent(xp, call.q, "dy", dy, tuple(y.shape), dtype)
    dy = dy * y if call.whole is not None else xp.where(call.opened, dy * y, 0)
    found["gate"] = gpu.cast(xp, gpu.summed(xp, dy, call.shape), dtype)
    inputs = (dq, call.q), (dk, call.k), (dv, call.v)
    first = [gpu.cast(xp, gpu.summed(xp, g, x.shape), dtype) for g, x in inputs]
    return *first, *(found[name] for name in ORDER if name in found), *more


def _gradients(dy, call, vjp):
    """The attention's output, and its gradients from gate * dy."""
    shape = (*call.lead, call.n, call.v.shape[-1]) if call.whole is None else call.whole.shape
    dy = call.gate * gpu.cotangent(call.xp, call.q, "dy", dy, tuple(shape), call.dtype)
    if call.whole is not None:
        return call.whole, *vjp(dy, call.q, call.k, call.v, **call.options)

    def both(forward, vjp, few, q, k, v, dy):
        return [forward(q, k, v, **few), *vjp(dy, q, k, v, **few)]

    return call.of_heads(both, dy)


def _summed(xp, g, option, dtype):
    """A gradient summed to the shape of its option, rounded; both may be pairs."""
    if isinstance(g, tuple):
        return tuple(gpu.summed(xp, a, gpu.shape_of(b)) for a, b in zip(g, option, strict=True))
    return gpu.cast(xp, gpu.summed(xp, g, gpu.shape_of(option)), dtype)


class _Call:
    """A call on arrays of another library, checked: q, k, v and the gate ready for arithmetic, the
    dtype that came in, and y in full where rows cannot be left out: the attention is foreign, or
    not row by row, or every row is open."""

    def __init__(self, q, k, v, gate, attention, options):
        for name in ("return_lse", "return_state"):
            if options.get(name):
                raise ValueError(f"{name}=True came; a gated attention returns y alone")
        if not callable(attention):
            raise TypeError(f"attention is {attention!r}; expected a function of q, k, v")
        inspect.signature(attention).bind(q, k, v, **options)  # unknown options: TypeError
        came = q, k, v
        self.xp, self.q, self.k, self.v, self.dtype = gpu.qkv(q, k, v)
        gate = gate(*came) if callable(gate) else gate
        self.gate = gpu.real_option(self.xp, self.q, "gate", gate, self.dtype)
        self.shape, self.name = tuple(self.gate.shape), getattr(attention, "__name__", None)
        self.lead = checks.lead(self.q, self.k, self.v)
        self.n, self.m = self.q.shape[-2], self.k.shape[-2]
        self.vjp, self.options, self.whole = formula.companion(attention, "vjp"), options, None
        if self.vjp is not None:
            self.options = self._rounded(options)
            if self._form(np.arange(0), self.options) is not None:
                self._fit((*self.lead, self.n, self.v.shape[-1]))
                self.opened = self._opened()
                if not self.rows.all():
                    return
        inputs = came if self.vjp is None else (self.q, self.k, self.v)
        whole = attention(*inputs, **self.options)
        self.whole = gpu.cast(self.xp, whole, gpu.dtype_of(self.q))
        self._fit(tuple(self.whole.shape))

    def _rounded(self, options):
        """As ``gates.options.rounded_options``."""
        result = dict(options)
        for name in ROUNDED:
            if result.get(name) is not None:
                result[name] = gpu.real_option(self.xp, self.q, name, result[name], self.dtype)
        return result

    def _fit(self, shape):
        checks.fits("gate", gpu.outline(self.gate), shape)
        wide = (1,) * max(0, 2 - len(self.gate.shape)) + tuple(self.gate.shape)
        self.gate = self.xp.reshape(self.gate, wide)

    def _opened(self):
        """Rows with some gate that is not zero, (..., n or 1, 1); ``rows`` are those of the host,
        (n,) where all heads have the same, else (..., n)."""
        opened = self.xp.any(self.gate != 0, axis=-1)
        rows = opened.cpu().numpy() if hasattr(opened, "cpu") else np.asarray(opened)
        if math.prod(rows.shape[:-1]) == 1:
            self.rows = np.broadcast_to(rows.reshape(-1), (self.n,))
        else:
            self.rows = np.broadcast_to(rows, (*self.lead, self.n))
        return opened[..., None]

    def _form(self, rows, options):
        return row_form(self.name)(rows, self.n, self.m, **options)

    def of_heads(self, run, *more):
        """What ``run`` gives of the open rows of each head, or of all heads together where they
        have the same, as arrays of all rows: closed ones are 0. ``more`` are arrays like y."""
        if self.rows.ndim == 1:
            return self._of_rows(run, (), np.flatnonzero(self.rows), more)
        found = [
            self._of_rows(run, at, np.flatnonzero(self.rows[at]), more)
            for at in np.ndindex(self.lead)
        ]
        return [self._stacked(parts) for parts in zip(*found, strict=True)]

    def _stacked(self, parts):
        if isinstance(parts[0], tuple):
            return tuple(map(self._stacked, zip(*parts, strict=True)))
        return self.xp.reshape(self.xp.stack(parts), (*self.lead, *parts[0].shape))

    def _of_rows(self, run, at, rows, more):
        options = {x: self._option(x, value, at) for x, value in self.options.items()}
        inputs = [self._of_head(x, 2, at) for x in (self.q, self.k, self.v, *more)]
        for place in (0, *range(3, len(inputs))):
            inputs[place] = gpu.rows(inputs[place], rows)
        forward, vjp, few = self._form(rows, options)
        y, *grads = run(forward, vjp, few, *inputs)
        if not grads:
            return [_spread(self.xp, y, rows, self.n)]
        dq, dk, dv, *rest = grads
        if self.options.get("bias") is not None:
            rest[0] = _spread(self.xp, rest[0], rows, self.n)
        y, dq = (_spread(self.xp, x, rows, self.n) for x in (y, dq))
        return [y, dq, dk, dv, *rest]

    def _option(self, name, value, at):
        core = CORE.get(name)
        if core is None or value is None or hasattr(value, "indptr"):
            return value
        if isinstance(core, tuple):
            return tuple(self._of_head(x, axes, at) for x, axes in zip(value, core, strict=True))
        return self._of_head(value, core, at)

    def _of_head(self, x, core, at):
        x = gpu.placed(self.xp, self.q, x)
        if not at or len(x.shape) <= core:
            return x
        return self.xp.broadcast_to(x, (*self.lead, *x.shape[len(x.shape) - core :]))[at]


def _spread(xp, x, rows, n):
    """x (..., len(rows), c) as (..., n, c): its rows stand at ``rows``, the others are 0."""
    none = gpu.empty(xp, x, (*x.shape[:-2], 1, x.shape[-1]), gpu.dtype_of(x), fill=0)
    source = np.full(n, len(rows))
    source[rows] = np.arange(len(rows))
    return gpu.rows(xp.concat([x, none], axis=-2), source)


def _causal_by_rows(attention, vjp, causal):
    """A causal form takes every key into its state anyway, up to the last open row: closed queries
    are zeros on the way, and what they give is left out. ``causal`` is the attention's default."""

    def form(rows, n, m, **options):
        plain = ROW_FORMS[attention.__name__, "numpy"](rows, n, m, **options)
        if not options.get("causal", causal):
            return plain
        options, stop = {**options, "causal": True}, keys_taken(rows)
        mask = options.get("key_mask")
        if mask is not None:
            checks.key_mask(gpu.outline(mask), (*gpu.shape_of(mask)[:-1], m))
            mask = mask if hasattr(mask, "__dlpack__") else np.asarray(mask)
            options["key_mask"] = mask[..., :stop]

        def forward(q, k, v, **few):
            q = _spread(gpu.namespace(q), q, rows, stop)
            return gpu.rows(attention(q, k[..., :stop, :], v[..., :stop, :], **few), rows)

        def backward(dy, q, k, v, **few):
            xp = gpu.namespace(q)
            dy, q = (_spread(xp, x, rows, stop) for x in (dy, q))
            dq, dk, dv, *rest = vjp(dy, q, k[..., :stop, :], v[..., :stop, :], **few)
            dk, dv = (_spread(xp, g, np.arange(stop), m) for g in (dk, dv))
            return gpu.rows(dq, rows), dk, dv, *rest

        return forward, backward, options

    rows_of(attention, backend="cuda")(form)


_causal_by_rows(linear.linear_attention, linear.linear_attention_vjp, False)
_causal_by_rows(chunked.linear_attention_chunked, chunked.linear_attention_chunked_vjp, True)
_causal_by_rows(performer.performer_attention, performer.performer_attention_vjp, False)
