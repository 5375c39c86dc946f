import numpy as np

from cases import Mechanism, softmax_gradient_tolerance
from definitions import linformer as definitions


def matrix(r, s, rng):
    return rng.standard_normal((r, s.m)) / 2


def positive(r, s, rng):
    return 0.1 + rng.random((r, s.m))


def mask(s, rng):
    """Some keys hidden, the last one visible."""
    visible = rng.random(s.m) < 0.6
    visible[-1:] = True
    return visible


def sees(i, j, shape, options):
    return bool(options.get("key_mask", np.ones(shape.m, bool))[j])


def sizes(options, shape):
    sizes = {"r": len(options["E"]), "F": "F" in options, "scale": options.get("scale")}
    if "key_mask" in options:
        sizes["key_mask"] = int(options["key_mask"].sum())
    return sizes


def dead(shape, rng):
    visible = np.ones(shape.m, bool)
    visible[[0, 3, 7]] = False
    options = {"E": matrix(3, shape, rng), "F": matrix(3, shape, rng), "key_mask": visible}
    return options, [], [0, 3, 7]


def magnitudes(q, k, v, options):
    """sum_j |E_tj k_jc| and sum_j |F_tj v_jc|: what the entries of E k and F v round like."""
    E, F = abs(options["E"]), abs(options.get("F", options["E"]))
    return E @ abs(k), F @ abs(v)


def tolerance(q, k, v, options, eps):
    """The docstring's bound: a projected key is off by m eps of its terms' sum, so a logit by
    (d + m + 3) eps A; a projected value by m eps B."""
    (m, d), r = k.shape[-2:], len(options["E"])
    k_r, v_r = magnitudes(q, k, v, options)
    scale = abs(options.get("scale") or d**-0.5)
    A = 1 + (scale * (abs(q) @ k_r.mT)).max(initial=0)
    return eps * (2 * (d + m + 4) * A + r + m + 8) * v_r.max(initial=0)


def gradient_tolerance(q, k, v, dy, options, eps):
    """softmax_attention's on the projected rows, with m more roundings in each of their entries;
    then one more product, with E, F, k or v, of at most max(r, d, e) terms."""
    m, r = k.shape[-2], len(options["E"])
    k_r, v_r = magnitudes(q, k, v, options)
    inner = softmax_gradient_tolerance(q, k_r, v_r, dy, options, eps)
    arrays = [k, v, options["E"], options.get("F", options["E"])]
    factor = max(abs(x).max(initial=1) for x in arrays)
    return inner * (1 + m) * max(r, k.shape[-1], v.shape[-1]) * factor


MECHANISMS = [
    Mechanism(
        "linformer_attention",
        definitions.linformer_attention,
        sees,
        {
            "shared": lambda s, rng: {"E": matrix(3, s, rng)},
            "two": lambda s, rng: {"E": matrix(2, s, rng), "F": matrix(2, s, rng)},
            "one-row": lambda s, rng: {"E": matrix(1, s, rng)},
            "many-rows": lambda s, rng: {"E": matrix(11, s, rng), "scale": -0.6},
            "masked": lambda s, rng: {"E": matrix(3, s, rng), "key_mask": mask(s, rng)},
            "masked-two": lambda s, rng: {
                "E": matrix(4, s, rng),
                "F": matrix(4, s, rng),
                "key_mask": mask(s, rng),
                "scale": 0.7,
            },
            "positive": lambda s, rng: {"E": positive(2, s, rng), "key_mask": mask(s, rng)},
            "none": lambda s, rng: {"E": matrix(2, s, rng), "key_mask": np.zeros(s.m, bool)},
        },
        signed=("shared", "two", "one-row", "many-rows", "masked", "masked-two"),
        arrays=("E", "F"),
        cost_sizes=sizes,
        dead=dead,
        tolerance=tolerance,
        gradient_tolerance=gradient_tolerance,
    )
]
