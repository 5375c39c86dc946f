import numpy as np

from cases import Mechanism
from definitions import linear as definitions
from refattn.linear import FeatureMap, identity, identity_vjp

# The chapter's Q f(K) V with a bare Q and f = exp.
BARE = FeatureMap(
    identity,
    np.exp,
    identity_vjp,
    lambda dphi, k: dphi * np.exp(k),
    flops=lambda d: (0, d),
)


def named(definition):
    """The definitions know feature maps by name."""

    def run(q, k, v, *, feature_map="elu", **options):
        name = feature_map if isinstance(feature_map, str) else "bare"
        return definition(q, k, v, feature_map=name, **options)

    return run


def sees(i, j, shape, options):
    mask = options.get("key_mask")
    return bool((mask is None or mask[j]) and (j <= i or not options.get("causal")))


def key_mask(s, rng):
    mask = rng.random(s.m) < 0.6
    mask[-1:] = True
    return mask


def state(s, rng, r=None):
    r = s.d if r is None else r
    return rng.standard_normal((r, s.e)), 1 + rng.random(r)


def sizes(options, shape):
    sizes = {**options, "initial_state": "initial_state" in options}
    if "key_mask" in options:
        sizes["key_mask"] = int(options["key_mask"].sum())
    if options.get("feature_map") is BARE:
        sizes["r"] = shape.d
    return sizes


def dead(shape, rng):
    mask = np.ones(shape.m, bool)
    mask[[0, 3, 7]] = False
    return {"key_mask": mask}, [], [0, 3, 7]


def softmax_along(x, axis):
    p = np.exp(x - x.max(axis=axis, keepdims=True, initial=-1e300))
    return p / p.sum(axis=axis, keepdims=True)


def taylor(x):
    b, c = np.triu_indices(x.shape[-1])
    squares = x[..., b] * x[..., c] * np.where(b == c, 0.5**0.5, 1)
    return np.concatenate([np.ones_like(x[..., :1]), x, squares], axis=-1)


def both(phi):
    return phi, phi


PHI = {
    "elu": both(lambda x: np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))),
    "relu": both(lambda x: np.maximum(x, 0)),
    "taylor": both(taylor),
    "softmax": (lambda x: softmax_along(x, -1), lambda x: softmax_along(x, -2)),
    BARE: (lambda x: x, np.exp),
}


def sums(q, k, v, options):
    """Sums of absolute terms of num (largest column) and of den, and den itself, for each row."""
    on_q, on_k = PHI[options.get("feature_map", "elu")]
    phi_q, phi_k = on_q(q), on_k(k)
    n, m = q.shape[-2], k.shape[-2]
    seen = np.tri(n, m, dtype=bool) if options.get("causal") else np.ones((n, m), bool)
    seen = seen & options.get("key_mask", np.ones(m, bool))
    r, e = phi_q.shape[-1], v.shape[-1]
    S, z = options.get("initial_state", (np.zeros((r, e)), np.zeros(r)))
    sizes = seen * (abs(phi_q) @ abs(phi_k).mT)
    num = (sizes @ abs(v) + abs(phi_q) @ abs(S)).max(axis=-1, initial=0)
    den_size = sizes.sum(axis=-1) + abs(phi_q) @ abs(z)
    den = (seen * (phi_q @ phi_k.mT)).sum(axis=-1) + phi_q @ z
    return num, den_size, den, m + r + 16


def tolerance(q, k, v, options, eps):
    """num and den are sums of m + r terms, each right to a few eps of its size; y = num / den."""
    num, den_size, den, terms = sums(q, k, v, options)
    if not options.get("normalize", True):
        return eps * terms * num.max(initial=0)
    num, den_size, den = num[den != 0], den_size[den != 0], abs(den[den != 0])
    return eps * terms * ((num + num / den * den_size) / den).max(initial=0)


def gradient_tolerance(q, k, v, dy, options, eps):
    """A gradient is a sum of m n terms of the forward's sizes, once more divided by den."""
    num, den_size, den, terms = sums(q, k, v, options)
    size = 1 + max(abs(x).max(initial=0) for x in (q, k, v, dy, *options.get("initial_state", ())))
    small = 1.0
    if options.get("normalize", True):
        small = min(1.0, abs(den[den != 0]).min(initial=1.0))
    worst = 1 + (den_size / np.where(den == 0, 1, abs(den))).max(initial=0)
    return eps * terms * (len(q) + 1) * size**5 * worst**2 / small


def own(s, rng):
    return {"feature_map": BARE, "normalize": False}


FULL = {
    "elu": lambda s, rng: {},
    "relu": lambda s, rng: {"feature_map": "relu"},
    "softmax": lambda s, rng: {"feature_map": "softmax"},
    "taylor": lambda s, rng: {"feature_map": "taylor"},
    "bare": own,
    "unnormalized": lambda s, rng: {"normalize": False},
    "key_mask": lambda s, rng: {"key_mask": key_mask(s, rng)},
    "softmax-key_mask": lambda s, rng: {"feature_map": "softmax", "key_mask": key_mask(s, rng)},
    "state": lambda s, rng: {"initial_state": state(s, rng)},
}
CAUSAL = {
    "causal-elu": lambda s, rng: {"causal": True},
    "causal-relu": lambda s, rng: {"causal": True, "feature_map": "relu"},
    "causal-taylor": lambda s, rng: {"causal": True, "feature_map": "taylor"},
    "causal-bare": lambda s, rng: {"causal": True, **own(s, rng)},
    "causal-key_mask": lambda s, rng: {"causal": True, "key_mask": key_mask(s, rng)},
    "causal-state": lambda s, rng: {"causal": True, "initial_state": state(s, rng)},
}


def chunked(options):
    """The causal options with chunks of 3; the default chunk, and the full form, once each."""
    cut = {f"{label}-chunks": lambda s, rng, o=o: {**o(s, rng), "chunk": 3} for label, o in options}
    return {
        **cut,
        "causal-default-chunk": lambda s, rng: {"causal": True},
        "full": lambda s, rng: {"causal": False, "chunk": 3},
    }


FORMS = {
    "takes": lambda label, s: s.n == s.m or not label.startswith("causal"),
    "signed": tuple(
        label
        for label in [*FULL, *CAUSAL, *chunked(CAUSAL.items())]
        if any(word in label for word in ("relu", "taylor", "bare"))
    ),
    "nonlinear": ("state", "causal-state", "causal-state-chunks"),  # affine in v
    "arrays": ("initial_state",),
    "tolerance": tolerance,
    "gradient_tolerance": gradient_tolerance,
}

MECHANISMS = [
    Mechanism(
        "linear_attention",
        named(definitions.linear_attention),
        sees,
        {**FULL, **CAUSAL},
        cost_sizes=sizes,
        counted=named(definitions.linear_attention_recurrence),
        dead=dead,
        **FORMS,
    ),
    Mechanism(
        "linear_attention_chunked",
        named(definitions.linear_attention),
        sees,
        chunked(CAUSAL.items()),
        cost_sizes=sizes,
        counted=named(definitions.linear_attention_by_chunks),
        **FORMS,
    ),
]
