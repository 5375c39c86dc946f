"""The public face: an answer in float64 that knows its own error."""

import numpy as np

import refattn
from refattn import checks
from refattn.verify.cases import attention_name, cast
from refattn.verify.certain.parts import ARRAYS, PARTS, answers


def truth(mechanism, q, k, v, *, with_error=False, **options):
    r"""An attention's exact answer, rounded to float64, with a bound on what rounding left.

    .. math:: |y_{ic} - \mathrm{exact}_{ic}| \le \mathrm{error}_{ic}

    The attention is computed a second time, by definitions that share no code with the formulas,
    on balls: numbers with a radius, which every operation carries along and adds its own rounding
    to. Arithmetic is double-double, about 31 digits, at every size. Where that leaves more than
    half a unit in the last place and the work is small (2^17 products; with gradients 2^15), it is
    mpmath's with 50, 100 and then 200 digits. Above that size the radius of double-double stands.

    Parameters
    ----------
    mechanism : str or function
        One of refattn's attentions, such as "local_attention".
    q : array (..., n, d)
    k : array (..., m, d)
    v : array (..., m, e)
        Of any real floating type, taken as exact. They must be finite, but for keys that nobody
        sees and queries that see nothing.
    with_error : bool
        Also return the bound.
    **options
        The mechanism's; real arrays are rounded to q's dtype, as the contract has it.
        ``scale=None`` is 1/sqrt(d) itself, not the nearest float64. Feature maps by name, or made
        of ``identity``, ``np.exp`` and the named maps' functions. With ``return_lse`` or
        ``return_state`` the answer is the pair that the attention returns.

    Returns
    -------
    y : float64 array, or the pair (y, lse) or (y, (S, z))
    error : the same, with ``with_error``
        Elementwise. Infinite where 0 could not be told from not 0, where a number left the range
        of double-double (1e299), or a logit is known to no better than 1/2: the value beside it
        then means nothing, and may be NaN.

    Raises
    ------
    TypeError, ValueError
        As the attention; ValueError for NaN or infinity that is seen in q, k, v, dy or a state, and
        for a feature map or an attention inside a gate that is not refattn's own.

    Notes
    -----
    Cost: some 50 times the formula's time. Memory grows with the leading axes, and for gradients
    with n m, about 0.4 kB a pair.

    What is exact is the mathematics: a kernel whose features underflow is wrong by its range, and a
    denominator of linear attention is 0 only where every term of it is. Bounds of sums and
    products are proven; those of exp, log, cos and tanh in double-double are measured against
    mpmath, with two bits to spare (tests/test_certain.py). Entries of less than 1e-40 of the
    largest answer are not made more certain than that.

    References
    ----------
    Johansson 2017, arXiv:1611.02831 (balls); Ozaki et al. 2012, "Error-free transformations of
    matrix multiplication", Numerical Algorithms 59.

    Examples
    --------
    One third is no float64, and half a unit in its last place is 2^-55:

    >>> import numpy as np
    >>> x, v = np.zeros((3, 1)), np.array([[1.0], [0.0], [0.0]])
    >>> y, error = truth("softmax_attention", x, x, v, with_error=True)
    >>> float(y[0, 0]), bool(abs(3 * error[0, 0] - 2**-54) < 1e-19)
    (0.3333333333333333, True)
    """
    name, arrays, options = _asked(mechanism, (q, k, v), options)
    getattr(refattn, name)(*arrays, **options)  # its errors are ours
    found = answers(name, dict(zip("qkv", arrays, strict=True)), options)
    answer = _as_returned(found, options)
    return answer if with_error else answer[0]


def truth_vjp(mechanism, dy, q, k, v, *, dlse=None, dstate=None, with_error=False, **options):
    """The exact gradient of an attention, rounded to float64: what NAME_vjp returns.

    Derived from the definitions of ``truth`` operation by operation, not from the formulas' vjps.

    Parameters
    ----------
    dy : array (..., n, e)
    dlse, dstate : optional
        Cotangents of what ``return_lse`` and ``return_state`` add; these are then implied.
    mechanism, q, k, v, with_error, **options
        As in ``truth``.

    Returns
    -------
    tuple of float64 arrays
        dq, dk, dv, then those given among bias, E, F, gate, weights, initial_state. With
        ``with_error`` (gradients, errors), two such tuples. An error is infinite where the gradient
        hangs on which of two equal maxima is the first.

    Raises
    ------
    TypeError, ValueError
        As ``truth``.

    Examples
    --------
    >>> import numpy as np
    >>> zero = np.zeros((2, 1))
    >>> dq, dk, dv = truth_vjp("softmax_attention", np.ones((2, 1)), zero, zero, zero)
    >>> dv.T
    array([[1., 1.]])
    """
    name, arrays, options = _asked(mechanism, (q, k, v), options)
    dtype = arrays[0].dtype
    inputs = dict(zip("qkv", arrays, strict=True)) | {"dy": np.asarray(dy).astype(dtype)}
    more = {}
    if dlse is not None:
        more["dlse"] = inputs["dlse"] = dlse
        options["return_lse"] = True
    if dstate is not None:
        more["dstate"] = dstate
        inputs["dS"], inputs["dz"] = dstate
        options["return_state"] = True
    getattr(refattn, f"{name}_vjp")(dy, *arrays, **options, **more)
    found = answers(name, inputs, options)
    wanted = [found[part] for part in PARTS[:-2] if part in found]
    if "dS0" in found:
        wanted.append(tuple(zip(found["dS0"], found["dz0"], strict=True)))
    values = tuple(x[0] for x in wanted)
    return (values, tuple(x[1] for x in wanted)) if with_error else values


def _asked(mechanism, arrays, options):
    """The attention's name, arrays of one dtype, and options rounded to it."""
    name = attention_name(mechanism)
    arrays = [checks.floating(x, array) for x, array in zip("qkv", arrays, strict=True)]
    dtype, found = arrays[0].dtype, dict(options)
    if callable(found.get("gate")):
        found["gate"] = found["gate"](*arrays)
    for x in ARRAYS:
        if found.get(x) is not None:
            found[x] = np.asarray(found[x])
    return name, arrays, {x: cast(value, dtype) for x, value in found.items()}


def _as_returned(found, options):
    """Pairs (value, error) in the form that the attention returns."""
    if options.get("return_lse"):
        return tuple(zip(found["y"], found["lse"], strict=True))
    if options.get("return_state"):
        states = tuple(zip(found["S"], found["z"], strict=True))
        return tuple(zip(found["y"], states, strict=True))
    return found["y"]
