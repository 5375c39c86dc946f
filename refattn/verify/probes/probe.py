"""Probes that need no reference: what must hold for a kernel whatever its formula is."""

from collections.abc import Collection
from functools import partial

import numpy as np

from refattn import checks
from refattn.verify.call import Caller
from refattn.verify.cases import number_type
from refattn.verify.libraries import library_of
from refattn.verify.like import Reference, convention_of, lead_of
from refattn.verify.probes import promises
from refattn.verify.probes.bench import Bench
from refattn.verify.probes.promises import later_than, out_of_window, unseen
from refattn.verify.report import Report


def probe(
    kernel,
    *,
    causal=False,
    window=None,
    hidden=None,
    linear=True,
    resume=None,
    windowed=None,
    dtype="float32",
    like=None,
    xp=None,
    lead=None,
    shape=(24, 8),
    device=None,
    skip=(),
    title=None,
):
    """Change the inputs of ``kernel(q, k, v)`` and see that what must stay the same does.

    Parameters
    ----------
    kernel : callable
        ``kernel(q, k, v) -> y``, arrays (..., n, d) each, as many keys as queries.
    causal : bool
        Query i sees keys j <= i only.
    window : int or (int, int), optional
        Query i sees keys of its window only, as in ``local_attention``; counted as ``like``
        counts; a token must see less than all others on each side.
    hidden : bool array (n,), optional
        True for keys that no query sees, such as ``~key_mask``. The kernel is then asked for n
        tokens in their order only.
    linear : bool
        Whether y is linear in v, as that of any attention with weights is.
    resume : callable, optional
        ``resume(q, k, v, state) -> (y, state)``, the causal kernel on the next tokens; the state
        is None at first, and otherwise what the call before gave.
    windowed : callable, optional
        ``windowed(window) -> kernel``: with a window of n tokens or more it must equal ``kernel``.
    dtype : {"float32", "float64", "float16", "bfloat16"}
    like : {"torch", "jax", "flash_attn", "onnx", "fla", "xformers"}, optional
        Whose arrays, layout and windows they are, as in ``check``. The kernel then gets a batch
        of 2 with 3 heads.
    xp : module or str, optional
        The library of the arrays alone, as in ``check``.
    lead : tuple of int, optional
        Leading axes: (batch, heads) where ``like`` is given, none else.
    shape : (int, int)
        n >= 4 and d.
    device : optional
        Where the library's arrays lie, such as "cuda".
    skip : collection of str
        Lines to leave out, for what a kernel does not promise.
    title : str, optional
        The name in the report; the kernel's own if None.

    Returns
    -------
    Report
        Whatever the kernel does is a line of it. Always "finite" (and of the right shape and
        dtype; without that shape nothing else is asked), "inputs unchanged" (in all calls; nor
        given back) and "same again" (to the bit, after all other calls, and after one on NaN).
        Where it applies:

        - "batch independence": a head's answer, while others are made huge, and NaN;
        - "linear in v";
        - "keys shuffled", "queries shuffled": neither causal nor windowed;
        - "later keys x 1e5" (and values), "later keys NaN", "later values NaN", "far keys, later
          near", "prefix alone" (the first tokens without the rest): causal;
        - "keys out of window x 1e5", and NaN as before; "hidden keys x 1e5", and so on;
        - "split and resume": parts of many sizes, and token by token;
        - "window of n equals full": n, n + 1 and 100 n.

    Raises
    ------
    TypeError, ValueError
        Unknown dtype, library or line to skip; ``resume`` without ``causal``; ``windowed`` with
        ``window``; a shape, window or hidden keys that do not fit.

    Notes
    -----
    A kernel that masks scores, and then multiplies masked weights of 0 with values, turns NaN in a
    value that it may not see into NaN in its output, as torch's and jax's do: "later values NaN"
    tells. Where the rest of a cache is cleared ahead, skip it.

    Each budget is derived where its line is made (refattn/verify/promises.py); none needs the
    kernel's formula.

    Examples
    --------
    A cumulative form that divides by the sum over all keys sees the future:

    >>> import numpy as np
    >>> def kernel(q, k, v):
    ...     a = np.tril(np.exp(q @ k.T))
    ...     return (a @ v) / np.exp(q @ k.T).sum(axis=1, keepdims=True)
    >>> report = probe(kernel, causal=True, skip=["later values NaN"])
    >>> [line.case for line in report.lines if line.trouble]
    ['later keys x 1e5', 'later keys NaN', 'far keys, later near', 'prefix alone']
    """
    convention = convention_of(like)
    call = Caller(kernel, library_of(xp or convention.arrays, device), convention.layout)
    n, d = _shape(shape)
    bench, w = _inputs(call, (*lead_of(lead, like), n, d), number_type(dtype))
    window = _window(window, causal, windowed, convention, n)
    hidden = None if hidden is None else _hidden(hidden, n)
    _callables(causal, resume, windowed)
    table = _table(bench, w, causal, window, hidden, linear, resume, windowed)
    left_out = _left_out(skip, (*table, "inputs unchanged"))
    title = title or getattr(kernel, "__name__", type(kernel).__name__)
    with np.errstate(all="ignore"):  # NaN and infinity are wanted here
        return _report(bench, title, table, left_out)


def _report(bench, title, table, left_out):
    found = bench.ask(*bench.inputs)
    if found is None or found is ...:
        return Report(title, hint="The kernel returned nothing.")
    lines = [bench.start("finite", found)]
    if bench.y is None:
        return Report(title, lines)
    for case, promise in table.items():
        if promise and case not in left_out:
            lines.append(promise(bench, case))
    if "inputs unchanged" not in left_out:
        lines.insert(1, bench.unchanged("inputs unchanged"))
    return Report(title, lines)


def _table(bench, w, causal, window, hidden, linear, resume, windowed):
    """{line's name: promise(bench, case)}, in order; a false one where it does not apply."""
    n, anyhow = bench.n, not causal and window is None
    return {
        "batch independence": bench.q[..., 0, 0].size > 1 and promises.batch_independence,
        "linear in v": checks.flag("linear", linear) and partial(promises.linear_in_v, w=w),
        "keys shuffled": anyhow and hidden is None and promises.keys_shuffled,
        "queries shuffled": anyhow and promises.queries_shuffled,
        **unseen("later {} {}", causal and later_than(n)),
        "far keys, later near": causal and promises.far_keys_later_near,
        "prefix alone": causal and hidden is None and promises.prefix_alone,
        "split and resume": resume and partial(promises.split_and_resume, resume=resume),
        **unseen("{} out of window {}", window and out_of_window(n, *window)),
        **unseen("hidden {} {}", hidden is not None and [(hidden, True)]),
        "window of n equals full": windowed and partial(promises.wide_window, windowed=windowed),
        "same again": promises.same_again,  # last: nothing may be left of all the calls before
    }


def _inputs(call, shape, dtype):
    """A bench with the same numbers on every call, and other values.

    Scores are of order 1 at scale 1. Values are of one size, so that an error of a whole value
    stands out against a budget for the largest.
    """
    rng = np.random.default_rng(0)
    q, k = (rng.standard_normal(shape) / shape[-1] ** 0.25 for _ in range(2))
    v, w = (rng.uniform(0.5, 1, shape) * rng.choice([-1, 1], shape) for _ in range(2))
    q, k, v, w = (x.astype(dtype) for x in (q, k, v, w))
    return Bench(call, q, k, v), w


def _shape(shape):
    if not isinstance(shape, (tuple, list)) or len(shape) != 2:
        raise ValueError(f"shape is {shape!r}; expected (n, d), such as (24, 8)")
    n, d = shape
    return checks.whole("n", n, least=4), checks.whole("d", d, least=1)


def _window(window, causal, windowed, convention, n):
    """(left, right) as refattn counts, or None."""
    causal = checks.flag("causal", causal)
    if window is None:
        return None
    if windowed is not None:
        raise ValueError("windowed came with window; expected a kernel without one, to equal")
    options = Reference("local_attention", convention).translated(
        {"window": window, "causal": causal}
    )
    left, right = checks.window(options["window"], causal)
    if max(left, right) >= n - 1:
        raise ValueError(
            f"window is {window!r}; expected sides below {n - 1} with {n} tokens, so that some "
            "keys lie out of it: choose a larger shape"
        )
    return left, right


def _hidden(hidden, n):
    """(n, 1) bool."""
    hidden = np.asarray(hidden)
    if hidden.dtype != bool:
        raise TypeError(f"hidden has dtype {hidden.dtype}; expected bool, True where no query sees")
    if hidden.shape != (n,) or not hidden.any():
        came = f"shape {hidden.shape}" if hidden.shape != (n,) else "no True"
        raise ValueError(f"hidden has {came}; expected ({n},), some of it True")
    return hidden[:, None]


def _callables(causal, resume, windowed):
    named = {"resume(q, k, v, state)": resume, "windowed(window)": windowed}
    for name, function in named.items():
        if function is not None and not callable(function):
            came = type(function).__name__
            raise TypeError(f"{name.split('(')[0]} is {came}; expected a function {name}")
    if resume is not None and not causal:
        raise ValueError("resume came without causal=True; a part cannot see what comes later")


def _left_out(skip, names):
    if isinstance(skip, str) or not isinstance(skip, Collection):
        raise TypeError(f"skip is {skip!r}; expected a collection of names, such as ['same again']")
    for name in skip:
        checks.choice("an entry of skip", name, names)
    return set(skip)
