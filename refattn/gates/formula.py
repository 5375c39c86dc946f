"""Gated attention (12.3.4): G(Q, K, V) times attention, closed rows not computed at all."""

import inspect
import sys

import numpy as np

from refattn import checks
from refattn.arrays import sum_to_shape
from refattn.cost import Cost
from refattn.dispatch import BY_POSITION, ROW_COSTS, backends, row_form
from refattn.gates.options import Heads, gradient_names, rounded_options
from refattn.softmax.formula import softmax_attention


@backends
def gated_attention(q, k, v, *, gate, attention=softmax_attention, **options):
    r"""Attention times a gate; where the gate is closed, nothing is computed.

    .. math:: y = G(Q, K, V) \odot \mathrm{attention}(Q, K, V)

    Parameters
    ----------
    q : array (..., n, d)
    k : array (..., m, d)
    v : array (..., m, e)
        One dtype for the three; leading axes broadcast.
    gate : array broadcasting to (..., n, e), or callable
        A number a row (..., n, 1) or an entry (..., n, e); or G itself, called as
        ``gate(q, k, v)``. ``refattn.gates`` has some. A row whose gate is all zero is closed.
    attention : callable
        One of refattn's attentions, of which closed rows are left out, causal and local forms
        keeping their positions; or any ``attention(q, k, v, **options)``, which runs in full.
    options
        Passed on to ``attention``.
    backend : {"numpy", "numba", "cuda"}

    Returns
    -------
    y : array (..., n, e)
        0 in closed rows.

    Raises
    ------
    TypeError
        A dtype that is not real floating point, mixed dtypes.
    ValueError
        A gate that does not fit; options that ``attention`` refuses; ``return_lse`` and
        ``return_state``, since closed rows have neither.
    BackendUnavailable
        The backend's code, library or driver is missing.

    Notes
    -----
    Cost: that of the open rows, and e multiplications for each of them
    (``gated_attention_cost``). A gate of ones gives the ungated answer bit for bit. Where rows are
    closed, heads are computed one by one, unless they share one gate.

    Error: that of ``attention``, times the gate.
    Measured worst, on refattn.verify.certain.hard: 5.0e-14 max|v|
    (logits of 1e4, cancelling values).

    A causal linear form must still take every key into its state; only reading is saved.

    References
    ----------
    Raposo et al. 2024 (mixture of depths), arXiv:2404.02258; Qiu et al. 2025, arXiv:2505.06708.

    Examples
    --------
    >>> import numpy as np
    >>> x, v = np.zeros((3, 1)), np.array([[2.0], [4.0], [9.0]])
    >>> gated_attention(x, x, v, gate=np.array([[0.0], [0.5], [1.0]]), causal=True).T
    array([[0. , 1.5, 5. ]])
    """
    heads, gate, _, whole, dtype = _prepare(q, k, v, gate, attention, options)
    if whole is not None:
        return (gate * whole).astype(dtype, copy=False)
    y = np.zeros((*heads.lead, heads.n, heads.v.shape[-1]), heads.v.dtype)
    for at, rows in heads.together(gate):
        forward, _, few = _row_form(attention, rows, heads, at)
        inputs = heads.inputs(at)
        y[(*at, ..., rows, slice(None))] = forward(inputs[0][..., rows, :], *inputs[1:], **few)
    y *= gate  # closed rows are 0 as they stand
    return y.astype(dtype, copy=False)


@backends
def gated_attention_vjp(
    dy, q, k, v, *, gate, attention=softmax_attention, attention_vjp=None, **options
):
    r"""Gradient of ``gated_attention``: (dq, dk, dv), the gate's, and those of other arrays.

    .. math:: dG = dy \odot \mathrm{attention}(Q, K, V) \text{, summed to the gate's shape}

    and the attention's own gradient from G dy. Closed rows are constants: their dG is 0.

    Parameters
    ----------
    dy : array (..., n, e)
        Gradient of a scalar with respect to y.
    attention_vjp : callable, optional
        The gradient of a foreign ``attention``, called as ``attention_vjp(dy, q, k, v,
        **options)``; refattn's own are found. What it returns after dv follows the gate's.
    q, k, v, gate, attention, options, backend
        As in the forward. For a callable gate the gradient is that of its value: hand it on
        through the gate's own gradient, such as ``gates.sigmoid_vjp``.

    Returns
    -------
    tuple of arrays
        dq, dk, dv, then those given among bias, E, F, gate, weights, initial_state, in this order,
        each in the shape of its input.

    Raises
    ------
    TypeError, ValueError, BackendUnavailable
        As the forward; ValueError for a dy that has not the shape of y, or a foreign attention
        without ``attention_vjp``.

    Examples
    --------
    >>> import numpy as np
    >>> x, v = np.zeros((2, 1)), np.array([[2.0], [4.0]])
    >>> *_, dgate = gated_attention_vjp(np.ones((2, 1)), x, x, v, gate=np.array([[0.0], [1.0]]))
    >>> dgate.T
    array([[0., 3.]])
    """
    heads, gate, shape, whole, dtype = _prepare(q, k, v, gate, attention, options)
    ours = companion(attention, "vjp")
    if (ours is None) == (attention_vjp is None):
        raise ValueError(
            "a foreign attention's gradient needs attention_vjp"
            if ours is None
            else "attention_vjp came, but refattn's own attentions bring their gradient"
        )
    if ours is None:
        dy = checks.cotangent("dy", dy, whole.shape, dtype)
        dq, dk, dv, *rest = attention_vjp(gate * dy, *heads.inputs(()), **heads.options)
        grads = dq, dk, dv, sum_to_shape(dy * whole, shape)
        return *(np.asarray(g).astype(dtype, copy=False) for g in grads), *rest
    names = gradient_names(options)
    if whole is not None:
        dy = checks.cotangent("dy", dy, whole.shape, dtype)
        dq, dk, dv, *rest = ours(gate * dy, *heads.inputs(()), **heads.options)
        found = dict(zip(names, rest, strict=True)) | {"gate": sum_to_shape(dy * whole, shape)}
        return _in_order(dq, dk, dv, found, dtype)
    dy = checks.cotangent("dy", dy, (*heads.lead, heads.n, heads.v.shape[-1]), dtype)
    grads = heads.zeros(names)
    y = np.zeros_like(dy)
    for at, rows in heads.open_rows(gate):
        forward, vjp, few = _row_form(attention, rows, heads, at)
        inputs = heads.inputs(at)
        some = inputs[0][rows], *inputs[1:]
        y[at][rows] = forward(*some, **few)
        # y = gate * attention
        dq, dk, dv, *rest = vjp((gate * dy)[at][rows], *some, **few)
        heads.collect(grads, at, rows, dq, dk, dv, dict(zip(names, rest, strict=True)))
    dq, dk, dv, found = heads.summed(grads)
    found["gate"] = sum_to_shape(np.where(_opened(gate), dy * y, 0), shape)
    return _in_order(dq, dk, dv, found, dtype)


def gated_attention_cost(
    n,
    m,
    d,
    e,
    *,
    open_rows,
    gate_width=1,
    attention=softmax_attention,
    itemsize=4,
    **sizes,
):
    """Counted cost of ``gated_attention`` for one head, by the rule of ``refattn.cost``.

    Parameters
    ----------
    n, m, d, e : int
        Queries, keys, columns of q and k, columns of v.
    open_rows : int or positions
        How many rows are open; or which, where a row's work depends on its position.
    gate_width : int
        1 or e: columns of the gate.
    attention : callable
        One of refattn's.
    itemsize : int
        Bytes of one number.
    sizes
        Passed on to the attention's cost. Pairs (``nnz``) are those of open rows.

    Returns
    -------
    Cost
        The open rows' attention and e multiplications a row; the gate is read once and all of y
        is written.

    Examples
    --------
    >>> half = gated_attention_cost(64, 64, 8, 8, open_rows=32).flops
    >>> half == gated_attention_cost(64, 64, 8, 8, open_rows=64).flops / 2
    True
    """
    n, m, d, e = checks.sizes(n, m, d, e)
    name = getattr(attention, "__name__", attention)
    own_cost = companion(attention, "cost")
    if own_cost is None:
        raise ValueError(f"attention is {name!r}; expected one of refattn's, which can be costed")
    if checks.whole("gate_width", gate_width, least=1) not in (1, e):
        raise ValueError(f"gate_width is {gate_width}; expected 1 or e = {e}")
    if np.ndim(open_rows):
        rows = _positions(open_rows, n)
    else:
        rows = np.arange(checks.whole("open_rows", open_rows, least=0, most=n))
        if len(rows) < n and name in BY_POSITION and BY_POSITION[name](sizes):
            raise ValueError(
                f"open_rows is {open_rows}; a row of {name} with these options costs what its "
                "position says: give the positions"
            )
    if name in ROW_COSTS:
        inner = ROW_COSTS[name](rows, n, m, d, e, itemsize=itemsize, **sizes)
    else:
        inner = own_cost(len(rows), m, d, e, itemsize=itemsize, **sizes)
    moved = inner.bytes + itemsize * ((n - len(rows)) * e + n * gate_width)
    return Cost(inner.flops + len(rows) * e, moved, inner.workspace)


def _positions(open_rows, n):
    """Open rows as sorted, different positions."""
    rows = np.asarray(open_rows)
    if rows.ndim != 1 or rows.dtype.kind not in "iu":
        raise TypeError(f"open_rows is {open_rows!r}; expected a number or a list of positions")
    if len(rows) and (rows[0] < 0 or rows[-1] >= n or (np.diff(rows) < 1).any()):
        raise ValueError(f"open_rows is {open_rows!r}; expected rising positions from 0 to {n - 1}")
    return rows


def companion(attention, suffix):
    """NAME_vjp or NAME_cost of one of refattn's attentions; None for a foreign one."""
    module = sys.modules.get(getattr(attention, "__module__", None))
    if not module or not module.__name__.startswith("refattn."):
        return None
    return getattr(module, f"{attention.__name__}_{suffix}", None)


def _row_form(attention, rows, heads, at):
    return row_form(attention.__name__)(rows, heads.n, heads.m, **heads.head_options(at))


def _opened(gate):
    """Rows with some gate that is not zero, (..., n, 1)."""
    return (gate != 0).any(axis=-1, keepdims=True)


def _prepare(q, k, v, gate, attention, options):
    """Inputs, the gate, the shape it came in, and y in full where rows cannot be left out.

    y is in full where the attention is foreign or not row by row, and where every row is open.
    """
    for name in ("return_lse", "return_state"):
        if options.get(name):
            raise ValueError(f"{name}=True came; a gated attention returns y alone")
    if not callable(attention):
        raise TypeError(f"attention is {attention!r}; expected a function of q, k, v")
    inspect.signature(attention).bind(q, k, v, **options)  # unknown options: TypeError
    came = q, k, v
    q, k, v, dtype = checks.qkv(q, k, v)
    gate = checks.real_option("gate", gate(*came) if callable(gate) else gate, dtype, q.dtype)
    shape = gate.shape
    ours = companion(attention, "vjp") is not None
    heads = Heads(q, k, v, rounded_options(options, dtype) if ours else options)
    form = None
    if ours:
        form = row_form(attention.__name__)(np.arange(0), heads.n, heads.m, **heads.options)
    if form is not None:
        checks.fits("gate", gate, (*heads.lead, heads.n, v.shape[-1]))
        gate = np.broadcast_to(gate, np.broadcast_shapes(gate.shape, (heads.n, 1)))
        if not _opened(gate).all():
            return heads, gate, shape, None, dtype
    whole = np.asarray(attention(*((q, k, v) if ours else came), **heads.options))
    whole = whole.astype(q.dtype, copy=False)
    checks.fits("gate", gate, whole.shape)
    return heads, gate, shape, whole, dtype


def _in_order(dq, dk, dv, found, dtype):
    order = [
        name for name in ("bias", "E", "F", "gate", "weights", "initial_state") if name in found
    ]
    arrays = [np.asarray(g).astype(dtype, copy=False) for g in (dq, dk, dv)]
    for name in order:
        g = found[name]
        arrays.append(g if isinstance(g, tuple) else np.asarray(g).astype(dtype, copy=False))
    return tuple(arrays)
