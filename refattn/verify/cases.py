"""What a kernel is given: sizes, and numbers that bring mistakes to light."""

import zlib
from dataclasses import dataclass

import numpy as np

import refattn
from refattn import checks

# n, m, d, e: one token, odd sizes, more keys than queries and fewer, more than one tile
SIZES = {
    "one token": (1, 1, 4, 3),
    "odd sizes": (13, 13, 5, 7),
    "two tiles": (130, 130, 16, 16),
    "more keys": (7, 12, 4, 4),
    "fewer keys": (12, 7, 4, 4),
    "one query": (1, 33, 16, 16),
    "one key": (9, 1, 4, 4),
    "whole tiles": (128, 128, 32, 32),
}
# For kernels that take whole tiles only.
TILES = {
    "one tile": (64, 64, 64, 64),
    "more keys": (64, 192, 64, 64),
    "fewer keys": (192, 64, 64, 64),
    "wide heads": (128, 128, 128, 128),
    "three tiles": (192, 192, 64, 64),
}
LONGEST = 1100  # tokens of a case that is made longer than a window or block
VALUES = -0.5, 1.5  # a mean that is not 0 tells an average of all from nothing
LARGE, PEAK, FAINT, FAR, VERY_FAR = 300.0, 8.0, 30.0, 6.0, 30.0


@dataclass(frozen=True)
class Trial:
    """A case: its name and what the kernel gets, rounded to its dtype; dy pulls the gradients."""

    name: str
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    dy: np.ndarray

    @property
    def inputs(self):
        return self.q, self.k, self.v


def _large_scores(q, k, v, rng, scale):
    """Only a softmax that subtracts its maximum survives."""
    return LARGE * q, k, v


def _one_key_each(q, k, v, rng, scale):
    """Entries of one size, and for each query a key that takes most of its weight, its own or an
    earlier one; values of mean 1/2: losing a key or a factor shows even in eight bits."""
    k, v = np.where(k < 0, -1.0, 1.0), np.where(v < 0, -1.0, 1.0)
    n, m = q.shape[-2], k.shape[-2]
    at = np.maximum(np.arange(n) + m - n, 0)
    peak = np.where(np.arange(n)[::-1] % 2 == 0, at, rng.integers(0, at + 1)) if m else at
    factor = PEAK / (abs(scale) * q.shape[-1]) if scale else 1.0
    return (factor * k[..., peak, :] if m else q), k, v


def _faint_keys(q, k, v, rng, scale):
    """elu + 1 is exp there: features of 1e-13, which an epsilon buries."""
    return q, k - FAINT, v


def _far_keys(factor):
    """Keys of large norm: their random features span many powers of ten."""
    return lambda q, k, v, rng, scale: (q, factor * k, np.where(v < 0, -1.0, 1.0))


# What each special case does to normal draws, the size it stands at, and for which mechanisms.
SPECIAL = {
    "one key each": (_one_key_each, (130, 130, 16, 64), ""),
    "large scores": (_large_scores, (130, 130, 16, 16), ""),
    "faint keys": (_faint_keys, (13, 13, 5, 7), "linear"),
    "far keys": (_far_keys(FAR), (13, 13, 4, 4), "performer"),
    "very far keys": (_far_keys(VERY_FAR), (13, 13, 4, 4), "performer"),
}


def attention_name(mechanism):
    """The name of one of refattn's attentions, given as such or as the function; or ValueError."""
    name = getattr(mechanism, "__name__", mechanism)
    if not hasattr(refattn, str(name)) or not hasattr(refattn, f"{name}_vjp"):
        raise ValueError(f"mechanism is {name!r}; expected an attention such as 'local_attention'")
    return name


def number_type(name):
    """The NumPy dtype of a name; bfloat16 comes from the package ml_dtypes."""
    checks.choice("dtype", name, tuple(checks.COMPUTE))
    if name != "bfloat16":
        return np.dtype(name)
    try:
        import ml_dtypes
    except ImportError as missing:
        raise ValueError("dtype 'bfloat16' needs ml_dtypes: pip install ml_dtypes") from missing
    return np.dtype(ml_dtypes.bfloat16)


def eps_of(dtype):
    """Spacing of numbers just above 1."""
    return 2.0**-7 if dtype.name == "bfloat16" else float(np.finfo(dtype).eps)


def cast(value, dtype):
    """Real arrays among the options, rounded to what the kernel is given."""
    if isinstance(value, tuple):
        return tuple(cast(part, dtype) for part in value)
    if isinstance(value, np.ndarray) and value.dtype.name in checks.COMPUTE:
        return value.astype(dtype)
    return value


# Of block_attention: an output of one block's rows.
FUSED = ("sum", "mean", "max", "weighted")
# Which sizes the last axes of an option's array are.
AXES = {"mask": "nm", "bias": "nm", "gate": "ne", "key_mask": "m", "E": "m", "omega": "d"}


def _fixed_sizes(options):
    """Sizes that the options' arrays fix: {"n": ..., "m": ..., "d": ...}."""
    fixed = {}
    for name, sizes in AXES.items():
        shape = np.shape(options[name]) if options.get(name) is not None else ()
        for size, length in zip(sizes[::-1], shape[::-1], strict=False):
            if length > 1 or name in ("E", "omega"):  # an axis of 1 fits any size
                fixed[size] = length
    return fixed


def _sizes_of(cases):
    """{name: (n, m, d, e)} of the plain cases, and the size of the special ones if it is given."""
    if isinstance(cases, str):
        checks.choice("cases", cases, ("default", "square", "tiles"))
        if cases == "tiles":
            return TILES, TILES["three tiles"]
        return {name: s for name, s in SIZES.items() if cases == "default" or s[0] == s[1]}, None
    try:
        given = [checks.sizes(*size) for size in cases]
    except TypeError:
        given = []
    if not given:
        raise ValueError(
            f"cases is {cases!r}; expected 'default', 'square', 'tiles' or [(n, m, d, e), ...]"
        )
    return {"n {}, m {}, d {}, e {}".format(*size): size for size in given}, given[-1]


def trials(mechanism, cases, dtype, options, lead=(), same_columns=False):
    """The cases, in the sizes that the options' arrays ask for, with ``lead`` axes ahead; with
    ``same_columns``, e is made equal to d."""
    plain, special_size = _sizes_of(cases)
    table = [(name, None, size) for name, size in plain.items()]
    for name, (make, size, only) in SPECIAL.items():
        if mechanism.startswith(only):
            table.append((name, make, special_size or size))
    fixed = _fixed_sizes(options)
    if isinstance(cases, str) and not {"n", "m"} & set(fixed):
        table += _longer(options, 64 if cases == "tiles" else 1)
    done = set()
    for name, make, asked in table:
        n, m, d, e = (fixed.get(axis, x) for axis, x in zip("nmde", asked, strict=True))
        e = d if same_columns else e
        own = cases == "tiles" or not isinstance(cases, str)
        if (make, n, m, d, e) in done or (cases == "square" and n != m):
            continue
        if own and (n, m) != asked[:2]:  # these sizes were asked for, and no others
            continue
        done.add((make, n, m, d, e))
        rng = np.random.default_rng([n, m, d, e, zlib.crc32(name.encode())])
        rows = options["block"] if options.get("fuse") in FUSED else n
        shapes = ((n, d), (m, d), (m, e), (rows, e))
        q, k, v, dy = (rng.standard_normal((*lead, *shape)) for shape in shapes)
        v = rng.uniform(*VALUES, v.shape)
        if make is not None:
            q, k, v = make(q, k, v, rng, checks.scale(options.get("scale"), d))
        label = name if make is not None or not fixed else f"n {n}, m {m}, d {d}, e {e}"
        yield Trial(label, *(x.astype(dtype) for x in (q, k, v, dy)))


def _longer(options, multiple):
    """A case with more tokens than a window, block or chunk spans; none where one of the usual
    is, or where it would be too long."""
    reach = reach_of(options)
    if not 128 < reach <= LONGEST:
        return []
    n, d = -(-reach // multiple) * multiple, 64 if multiple > 1 else 8
    return [("longer than its reach", None, (n, n, d, d))]


def reach_of(options):
    """Tokens that it takes for a window, block or chunk not to span them all."""
    reach = 0
    for name in ("window", "block", "chunk"):
        value = options.get(name)
        sides = value if isinstance(value, (tuple, list)) else [value]
        step = options.get("dilation", 1) if name == "window" else 1
        reach = max([reach, *(2 * x * step + 3 for x in sides if isinstance(x, int))])
    return reach


def too_short(cases, options):
    """Words for options whose reach no case exceeds; "" where one does."""
    reach = reach_of(options)
    if not isinstance(cases, str) or reach <= LONGEST or {"n", "m"} & set(_fixed_sizes(options)):
        return ""
    return (
        f"No case is long enough to see these options at work: give cases=[(n, m, d, e)] with "
        f"{reach} tokens or more."
    )
