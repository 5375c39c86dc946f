"""What an attention and its gradient are on given inputs, each number with a bound on its error."""

import itertools

import numpy as np

from refattn import checks
from refattn.verify.cases import FUSED
from refattn.verify.certain.ball import Ball, gradients
from refattn.verify.certain.definitions import (
    DEFINITIONS,
    cuts_of_exponents,
    key_pairs,
    keys_of,
    visible_pairs,
)
from refattn.verify.certain.numbers import Digits, DoubleDouble

# Options that are real arrays; those with a gradient first, in signature order.
ARRAYS = ("bias", "E", "F", "gate", "weights", "omega")
PARTS = ("dq", "dk", "dv", "dbias", "dE", "dF", "dgate", "dweights", "dS0", "dz0")
PAIRS = 2**18  # queries times keys at a time
FEW = 2**17  # products up to which mpmath is tried: a second or two
DIGITS = (50, 100, 200)
SLACK = 1.01  # a bound is good enough within this of what rounding to float64 alone costs,
NOTHING = 1e-40  # or where it is so small beside the largest of all answers


@np.errstate(all="ignore")  # what overflows or is undecided ends as an infinite error
def answers(mechanism, inputs, options):
    """{part: (float64 array, elementwise bound on its error)}.

    The parts are y; lse or S and z where they are asked for; and with "dy" among the inputs the
    gradients dq, dk, dv, then those of PARTS that there are. Cotangents of lse, S and z are inputs
    too: dlse, dS, dz.
    """
    inputs, options = _as_floats(mechanism, inputs, options)
    found = _in(DoubleDouble(), mechanism, inputs, options)
    work = _products(inputs, options)
    for digits in DIGITS:
        if work > FEW or _certain(found):
            break
        again = _in(Digits(digits), mechanism, inputs, options)
        found = {name: _better(found[name], again[name]) for name in found}
    return found


def _certain(found):
    """Whether errors are hardly more than half a unit in the last place, or beneath notice."""
    scale = max(float(np.abs(v[np.isfinite(v)]).max(initial=0)) for v, _ in found.values())
    return all(
        np.all((e <= SLACK / 2 * np.spacing(np.abs(v))) | (e <= NOTHING * scale) | np.isinf(v))
        for v, e in found.values()
    )


def _better(old, new):
    """Entry by entry the one with the smaller bound."""
    first = old[1] <= new[1]
    return np.where(first, old[0], new[0]), np.where(first, old[1], new[1])


def _products(inputs, options):
    """About how many multiplications the definition takes."""
    n, d = inputs["q"].shape[-2:]
    m, e = inputs["v"].shape[-2:]
    heads = np.prod(checks.lead(inputs["q"], inputs["k"], inputs["v"]), dtype=int)
    features = d if options.get("omega") is None else max(d, len(options["omega"]))
    back = 4 if "dy" in inputs else 1
    return back * heads * (n * m * (features + e) + (n + m) * features * d)


def _as_floats(mechanism, inputs, options):
    """float64 copies; 0 at keys that nobody sees and in queries that see nothing, which may hold
    anything."""
    options = dict(options)
    inputs = {name: np.array(x, float) for name, x in inputs.items()}
    for name in ARRAYS:
        if options.get(name) is not None:
            options[name] = np.array(options[name], float)
    if options.get("initial_state") is not None:
        state = zip(("S0", "z0"), options["initial_state"], strict=True)
        inputs |= {name: np.array(x, float) for name, x in state}
    if not all(np.isfinite(inputs[x]).all() for x in "qkv"):
        rows, keys = _met(mechanism, inputs, options)
        for name, used in (("q", rows), ("k", keys), ("v", keys)):
            inputs[name] = _cleared(inputs[name], used)
    for name, x in inputs.items():
        if not np.isfinite(x).all():
            raise ValueError(f"{name} holds NaN or infinity where it is seen: nothing is certain")
    return inputs, options


def _met(mechanism, inputs, options):
    """Queries that see a key and are computed, (..., n); keys that such queries see, (..., m)."""
    n, m = inputs["q"].shape[-2], inputs["k"].shape[-2]
    inner = getattr(options.get("attention"), "__name__", mechanism)
    if "key_mask" in options or inner.startswith(("linear_", "linformer", "performer")):
        chunked = {"causal": inner == "linear_attention_chunked"}
        pairs = key_pairs(inputs, {**chunked, **options}, np.arange(n))
    else:
        pairs = visible_pairs(n, m, options, np.arange(n))
    if "gate" in options:
        pairs = pairs & (options["gate"] != 0).any(axis=-1)[..., None]
    rows, keys = pairs.any(axis=-1), pairs.any(axis=-2)
    if "S0" in inputs:  # a row without keys still reads the state
        rows = rows | ((options["gate"] != 0).any(axis=-1) if "gate" in options else True)
    if options.get("return_state"):  # which holds keys that no query sees
        keys = keys | keys_of(inputs, options)
    return rows, keys


def _cleared(x, used):
    """Rows that are not used in any head become 0."""
    used = np.broadcast_to(used, np.broadcast_shapes(used.shape, x.shape[:-1]))
    while used.ndim > x.ndim - 1:
        used = used.any(axis=0)
    for axis, length in enumerate(x.shape[:-1]):
        if length == 1 and used.shape[axis] > 1:
            used = used.any(axis=axis, keepdims=True)
    return np.where(used[..., None], x, 0)


def _in(numbers, mechanism, inputs, options):
    """The parts, in this arithmetic."""
    backward = "dy" in inputs

    def leaf(x):
        return Ball(numbers, numbers.of(x), leaf=backward)

    leaves = {x: leaf(inputs[x]) for x in ("q", "k", "v", "S0", "z0") if x in inputs}
    arrays = {x: options[x] for x in ARRAYS if options.get(x) is not None}
    if "bias" in arrays:  # -inf hides a pair: visible_pairs
        arrays["bias"] = np.where(np.isneginf(arrays["bias"]), 0, arrays["bias"])
    leaves |= {x: leaf(array) for x, array in arrays.items()}
    bands = _bands(DEFINITIONS[mechanism], leaves, options, backward)
    lead = checks.lead(inputs["q"], inputs["k"], inputs["v"])
    found = {"y": _over_rows(bands, "y", lead, axes=2)}
    if options.get("return_lse"):
        found["lse"] = _over_rows(bands, "lse", lead, axes=1)
    for name, axes in (("S", 2), ("z", 1)) if options.get("return_state") else ():
        found[name] = _over_heads(bands[0][1][name].rounded(), lead, axes)
    if backward:
        outputs = [(parts["y"], inputs["dy"][..., rows, :]) for rows, parts in bands]
        if "dlse" in inputs:
            outputs += [(parts["lse"], inputs["dlse"][..., rows]) for rows, parts in bands]
        outputs += [(bands[0][1][x[1:]], inputs[x]) for x in ("dS", "dz") if x in inputs]
        wanted = [x for x in (name[1:] for name in PARTS) if x in leaves]
        grads = gradients(outputs, [leaves[x] for x in wanted])
        found |= {f"d{x}": g.rounded() for x, g in zip(wanted, grads, strict=True)}
    return found


def _bands(definition, leaves, options, backward):
    """[(rows, parts)], some rows at a time; as many as possible where gradients go back."""
    n, m = leaves["q"].shape[-2], leaves["k"].shape[-2]
    step = max(1, n if backward else PAIRS // max(1, m))
    if options.get("fuse") in FUSED:
        n = step = options["block"]
    cuts = {0, *range(0, n, step)}
    if options.get("causal") and "omega" in leaves:
        cuts |= cuts_of_exponents(leaves, options)
    cuts = [*sorted(cuts), max(n, 0)]
    rows = [np.arange(*ends) for ends in itertools.pairwise(cuts)]
    return [(some, definition(leaves, options, some)) for some in rows]


def _over_rows(bands, name, lead, axes):
    """One array of what the bands give, and its errors."""
    pairs = []
    for _, parts in bands:
        value, error = parts[name].rounded()
        if name == "lse":
            empty = np.broadcast_to(parts["empty"], value.shape)
            value, error = np.where(empty, -np.inf, value), np.where(empty, 0, error)
        pairs.append((value, error))
    value, error = (np.concatenate(x, axis=-axes) for x in zip(*pairs, strict=True))
    return _over_heads((value, error), lead, axes)


def _over_heads(part, lead, axes):
    """Outputs have every leading axis of the inputs."""
    shape = (*lead, *part[0].shape[part[0].ndim - axes :])
    return tuple(np.array(np.broadcast_to(x, shape)) for x in part)
