"""What a kernel should give on a case, in float64, and how far off it may be."""

import functools
from dataclasses import dataclass

import numpy as np

from refattn import checks
from refattn.linear.feature_maps import feature_map_of
from refattn.verify.cases import cast, eps_of
from refattn.verify.rounding import every_operation_rounded
from refattn.verify.visible import visible

GRADIENTS = ("dq", "dk", "dv")
NUDGE = 2.0**-26  # relative change of the inputs that measures conditioning


@dataclass(frozen=True)
class Wanted:
    """One array: its value, the largest error that is right, and its conditioning.

    ``conditioning`` is the relative change of the array's largest entry over a relative change
    of the inputs, for one draw of signs.
    """

    value: np.ndarray
    budget: float
    conditioning: float


def wanted_of(reference, trial, low, wide, gradients):
    """{"y": Wanted} and, with ``gradients``, {"dq", "dk", "dv"}; ``low`` and ``wide`` are the
    options rounded to the kernel's dtype and those in float64.

    ValueError where the case does not fit the mechanism.
    """
    inputs = dict(zip(("q", "k", "v", "dy"), (*trial.inputs, trial.dy), strict=True))
    run = functools.partial(_run, reference, gradients)
    exact = run(_wide(inputs), wide)
    budget = budgets(run, reference.mechanism, inputs, low, exact)
    signs = np.random.default_rng(0)
    nudged = {
        name: x.astype(float) * (1 + NUDGE * signs.choice([-1, 1], x.shape))
        for name, x in inputs.items()
    }
    moved = run(nudged, wide)
    wanted = {}
    for name, value in exact.items():
        change = _largest(moved[name] - value) / (NUDGE * (_largest(value) or 1.0))
        wanted[name] = Wanted(value, budget[name], change)
    return wanted


def _run(reference, gradients, inputs, options):
    q, k, v, dy = inputs.values()
    answers = {"y": reference.forward(q, k, v, **options)}
    if gradients:
        grads = reference.vjp(dy, q, k, v, **options)[:3]
        answers |= dict(zip(GRADIENTS, grads, strict=True))
    return {name: np.asarray(x) for name, x in answers.items()}


def budgets(run, mechanism, inputs, low, exact):
    """The largest right error of each array of ``exact``, {"y": 1e-6, ...}:

        2 E + 4 eps ((1 + max|s|) size + floor)

    with s the logits and eps of the kernel's dtype. E is the error of ``run(inputs, options)``,
    refattn's own formula, in that dtype; size and floor are those of ``_magnitudes``. ``inputs``
    (q, k, v, dy, ...) and the options ``low`` are rounded to the dtype.
    """
    eps = eps_of(inputs["q"].dtype)
    own_error = _own_error(run, inputs, low, exact)
    # What is hidden may be anything.
    clean = {name: np.where(np.isfinite(x), x, 0) for name, x in _wide(inputs).items()}
    wide = _wide(low)
    logits = 1 + largest_logit(mechanism, clean["q"], clean["k"], wide, eps)
    sizes = _magnitudes(mechanism, clean, wide, exact)
    return {
        name: 2 * own_error[name] + 4 * eps * (logits * size + floor)
        for name, (size, floor) in sizes.items()
    }


def _own_error(run, inputs, low, exact):
    """The error of refattn's formula in the kernel's dtype.

    For half types the larger of rounding once and rounding every operation, which may overflow and
    then says nothing. For float64, in which the truth itself is computed, the error in float32
    times the ratio of the two types' eps.
    """
    dtype = inputs["q"].dtype
    runs = [(run(inputs, low), 1.0)]
    if checks.compute_dtype(dtype) != dtype:
        with every_operation_rounded(dtype):
            runs.append((run(inputs, low), 1.0))
    elif dtype == np.float64:
        narrow = {name: x.astype(np.float32) for name, x in inputs.items()}
        low = {name: cast(x, np.float32) for name, x in low.items()}
        with np.errstate(all="ignore"):
            same = run(_wide(narrow), _wide(low))
            rough = run(narrow, low)
            rough = {name: x - same[name] + exact[name] for name, x in rough.items()}
        runs.append((rough, 2.0**-29))
    found = dict.fromkeys(exact, 0.0)
    for answers, factor in runs:
        for name, x in answers.items():
            with np.errstate(invalid="ignore"):  # -inf of both is no error: NaN, left aside
                error = factor * _largest(x.astype(float) - exact[name])
            found[name] = max(found[name], error if np.isfinite(error) else 0.0)
    return found


def _wide(arrays):
    return {name: cast(x, np.float64) for name, x in arrays.items()}


def largest_logit(mechanism, q, k, options, eps):
    """max|s| over the visible pairs; a bias far below its row's largest score hides a pair too.

    Of Linformer, those of the projected keys; of linear attention 0, which has none.
    """
    mechanism = _attention_in(mechanism, options)
    if mechanism.startswith("linear_"):
        return 0.0
    scale = checks.scale(options.get("scale"), q.shape[-1])
    if mechanism == "linformer_attention":
        k = np.asarray(options["E"], float) @ _hidden_as_zero(k, options.get("key_mask"))
    s = scale * (q @ k.mT)
    if options.get("softcap"):
        s = options["softcap"] * np.tanh(s / options["softcap"])
    if options.get("bias") is not None:
        s = s + options["bias"]
    if mechanism in ("softmax_attention", "local_attention", "sparse_attention"):
        s = np.where(visible(q.shape[-2], k.shape[-2], options), s, -np.inf)
    counts = s > -np.inf
    if options.get("bias") is not None:  # -1e9 hides a pair as well, and is no logit
        top = s.max(axis=-1, keepdims=True, initial=-np.inf)
        with np.errstate(invalid="ignore"):
            counts = counts & (s - top >= 2 * np.log(eps))
    return _largest(np.where(counts, s, 0.0))


def _attention_in(mechanism, options):
    """The attention inside a gated one; any other as it is."""
    if mechanism != "gated_attention":
        return mechanism
    return getattr(options.get("attention"), "__name__", "softmax_attention")


def _hidden_as_zero(k, key_mask):
    return k if key_mask is None else np.where(np.asarray(key_mask)[..., None], k, 0)


def _magnitudes(mechanism, inputs, options, exact):
    """For each array of ``exact`` the size that the logits' rounding acts on, and a floor for what
    cancels.

    The output is an average of values, or a sum of them where nothing is divided: the larger of
    max|v| and max|y|. A gradient of scores is P (dP - sum P dP + dlse), whose terms may cancel:
    each has the size of dP = dy v^T, or of dlse. lse is a score, known to eps of itself at best.
    States are sums of features and of their products with values.
    """
    q, k, v = (inputs[name] for name in "qkv")
    sizes = {name: (_largest(x), 0.0) for name, x in exact.items()}
    sizes["y"] = max(_largest(v), _largest(exact["y"])), 0.0
    floors = {}
    if "lse" in exact:
        sizes["lse"] = 1.0, 0.0
        floors["lse"] = _largest(np.where(np.isfinite(exact["lse"]), exact["lse"], 0))
    if "S" in exact:
        phi = abs(_key_features(k, options))
        floors |= {"S": _largest(phi.mT @ abs(v)), "z": _largest(phi.sum(axis=-2))}
    if "dq" in exact:
        floors |= _floors_of_gradients(inputs, options)
    inner = _attention_in(mechanism, options)
    if "dq" in exact and inner.startswith("linear_"):
        floors |= _floors_of_linear(inputs, options, exact["y"])
    if "dq" in exact and inner == "performer_attention":
        floors |= _floors_of_performer(inputs, options)
    return sizes | {name: (sizes[name][0], floors[name]) for name in floors if name in exact}


def _floors_of_gradients(inputs, options):
    q, k, v, dy = (inputs[name] for name in ("q", "k", "v", "dy"))
    scale = abs(checks.scale(options.get("scale"), q.shape[-1]))
    pull = _largest(dy @ v.mT) + _largest(inputs.get("dlse", np.zeros(1)))
    output = _largest(dy) * _largest(v)
    return {
        "dq": _largest(k) * scale * pull,
        "dk": _largest(q) * scale * pull,
        "dv": _largest(dy),
        "dbias": pull,
        "dE": _largest(q) * scale * pull * _largest(k) + output,
        "dF": output,
        "dgate": output,
        "dweights": output,
    }


def _floors_of_linear(inputs, options, y):
    """Of y = phi_q S / den: dphi_q = sum_j (dP_ij - pull_i) phi_k_j / den_i, and dphi_k likewise,
    whose terms grow as 1 / den where few features are alive."""
    q, k, v, dy = (inputs[name] for name in ("q", "k", "v", "dy"))
    phi_q = feature_map_of(options.get("feature_map", "elu")).query(q)
    phi_k = _key_features(k, options)
    start = np.asarray((options.get("initial_state") or (0.0, np.zeros(1)))[1], float)[..., None, :]
    if options.get("causal"):
        z, most = np.cumsum(phi_k, axis=-2), np.cumsum(abs(phi_k), axis=-2)  # (..., n, r)
    else:
        z, most = (x.sum(axis=-2, keepdims=True) for x in (phi_k, abs(phi_k)))
    den = (phi_q * (z + start)).sum(axis=-1, keepdims=True)  # (..., n, 1)
    share = np.divide(1.0, abs(den), where=den != 0, out=np.zeros_like(den))
    share = share if options.get("normalize", True) else np.ones_like(den)
    pull = _largest(dy @ v.mT) + _largest((abs(dy) * abs(y)).sum(axis=-1))
    sent = _largest((abs(phi_q) * share).sum(axis=-2))
    return {
        "dq": pull * _largest((most + abs(start)) * share),
        "dk": pull * sent,
        "dS0": _largest(dy) * sent,
        "dz0": pull * sent,
    }


def _floors_of_performer(inputs, options):
    """dx = sum_r dphi_r phi_r (omega_r - x), x = sqrt(scale) k: long keys cancel."""
    root = checks.scale(options.get("scale"), inputs["q"].shape[-1]) ** 0.5
    pull = _largest(inputs["dy"] @ inputs["v"].mT)
    omega = _largest(np.asarray(options["omega"], float))
    return {f"d{x}": root * (omega + root * _largest(inputs[x])) * pull for x in "qk"}


def _key_features(k, options):
    """phi_k of linear attention, 0 for hidden keys."""
    feature_map, seen = feature_map_of(options.get("feature_map", "elu")), options.get("key_mask")
    if seen is None:
        return feature_map.key(k)
    seen = np.asarray(seen)[..., None]
    return np.where(seen, feature_map.key(np.where(seen, k, feature_map.hidden)), 0)


def _largest(x):
    """The largest |entry|, NaN aside; 0 of nothing."""
    x = abs(x[~np.isnan(x)])
    return float(x.max(initial=0))
