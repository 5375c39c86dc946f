"""From the arguments of a linear form to what its CUDA kernels take, and back to gradients."""

import math
from typing import Any, NamedTuple

import numpy as np

from refattn import checks, gpu
from refattn.linear.cuda_maps import ELU, READY, RELU, SIZES
from refattn.linear.cuda_named import map_for
from refattn.linear.cuda_over_features import Work
from refattn.linear.feature_maps import FEATURE_MAPS, FeatureMap, feature_map_of
from refattn.linear.inputs import cotangents, prepare

# Maps that the kernels compute, so that no features are held in memory.
INSIDE = {id(FEATURE_MAPS["elu"]): ELU, id(FEATURE_MAPS["relu"]): RELU}


class Given(NamedTuple):
    """Checked arguments, in the dtype of the arithmetic, and the features of q and k, or q and k
    where the kernels make them; ``dtype`` came in, ``outlines`` is what ``prepare`` gives for
    their shapes."""

    xp: Any
    q: Any
    k: Any
    v: Any
    phi_q: Any
    phi_k: Any
    dtype: np.dtype
    feature_map: FeatureMap
    of: int
    seen: Any
    state: tuple
    lead: tuple
    outlines: tuple

    @property
    def nothing(self):
        """No positions, columns or heads."""
        return 0 in (*self.q.shape, *self.k.shape, *self.v.shape, *self.lead)


def given(q, k, v, feature_map, causal, key_mask, initial_state):
    """Arguments of any library, checked in the words of the formula."""
    xp, q, k, v, dtype = gpu.qkv(q, k, v)
    shapes, kind = [gpu.outline(x) for x in (q, k, v)], gpu.dtype_of(q)
    lead = checks.lead(*shapes)
    feature_map = feature_map_of(feature_map)
    prepare(*shapes, outline_map(feature_map, 1), causal, None, None)
    seen = seen_of(xp, q, key_mask, (*lead, k.shape[-2]))
    of, phi_q, phi_k = INSIDE.get(id(feature_map), READY), q, k
    if of == READY:
        feature_map = map_for(xp, feature_map)
        if seen is not None:
            hidden = gpu.empty(xp, k, (1,), kind, feature_map.hidden)
            k = xp.where(seen[..., None], k, hidden)
        phi_q, phi_k = feature_map.query(q), feature_map.key(k)
        check_features(phi_q, phi_k, q, k)
        phi_q, phi_k = gpu.cast(xp, phi_q, kind), gpu.cast(xp, phi_k, kind)
    width = outline_map(feature_map, phi_q.shape[-1])
    outlines = prepare(*shapes, width, causal, None, outline_of_pair(initial_state))
    outlines = (*outlines[:3], dtype, *outlines[4:])
    if initial_state is None:
        state = tuple(gpu.empty(xp, q, x.shape, kind, 0) for x in outlines[-1])
    else:
        state = tuple(gpu.cast(xp, gpu.placed(xp, q, x), kind) for x in initial_state)
    return Given(
        xp, q, k, v, phi_q, phi_k, dtype, feature_map, of, seen, state, lead, outlines
    )  # fmt: skip


def seen_of(xp, q, key_mask, shape):
    """A checked mask of keys, spanning at least the last axis, or None."""
    if key_mask is None:
        return None
    checks.key_mask(gpu.outline(key_mask), shape)
    seen = gpu.placed(xp, q, key_mask)
    return xp.broadcast_to(seen, np.broadcast_shapes(tuple(seen.shape), shape[-1:]))


def check_features(phi_q, phi_k, q, k):
    for name, phi, x in (("query", phi_q, q), ("key", phi_k, k)):
        if phi.shape[:-1] != x.shape[:-1] or phi.shape[-1] != phi_q.shape[-1]:
            wanted = (*x.shape[:-1], phi_q.shape[-1])
            raise ValueError(f"the feature map's {name} gave {tuple(phi.shape)}; expected {wanted}")


def outline_of_pair(pair):
    if isinstance(pair, (tuple, list)):
        return tuple(gpu.outline(x) for x in pair)
    return gpu.outline(pair)


def outline_map(feature_map, width):
    """A map that gives the shapes of another's features, without memory."""

    def features(x):
        return np.broadcast_to(np.zeros((), x.dtype), (*x.shape[:-1], width))

    return FeatureMap(features, features, causal=feature_map.causal)


def work_of(found):
    """The features and values of checked arguments, as kernels take them, and the state before,
    (H, ...)."""
    xp, q, kind = found.xp, found.q, gpu.dtype_of(found.q)
    seen = weights_of(xp, q, found.seen, found.k.shape[-2])
    (*flat, seen), heads, _ = gpu.heads_of(xp, found.phi_q, found.phi_k, found.v, seen)
    work = Work(xp, found.of, *flat, seen[:, 0], heads, SIZES[kind.type])
    r, e = work.shape[-2:]
    return work, for_heads(xp, found.state, found.lead, ((r, e), (r,)))


def weights_of(xp, q, seen, m):
    """A mask of keys as numbers, (..., 1, m): 0 hides a key."""
    kind = gpu.dtype_of(q)
    if seen is None:
        return gpu.empty(xp, q, (1, m), kind, 1)
    return gpu.cast(xp, seen, kind)[..., None, :]


def for_heads(xp, pair, lead, shapes):
    """(S, z) with one leading axis of all heads."""
    return tuple(
        xp.reshape(gpu.contiguous(xp, xp.broadcast_to(x, (*lead, *core))), (-1, *core))
        if math.prod(lead) and math.prod(core)
        else gpu.empty(xp, x, (math.prod(lead), *core), gpu.dtype_of(x))
        for x, core in zip(pair, shapes, strict=True)
    )


def cotangents_of(found, dy, dstate, H):
    """dy (H, n, e), and dstate (H, ...) or zeros, checked and rounded as the formula does."""
    xp, q, *_, lead, outlines = found
    cotangents(gpu.outline(dy), outline_of_pair(dstate), outlines)
    compute = gpu.dtype_of(q)
    dy = gpu.cast(xp, gpu.cast(xp, gpu.placed(xp, q, dy), found.dtype), compute)
    shapes = [x.shape[-axes:] for axes, x in zip((2, 1), outlines[-1], strict=True)]
    if dstate is None:
        parts = [gpu.empty(xp, q, (H, *shape), compute, 0) for shape in shapes]
    else:
        parts = [gpu.cast(xp, gpu.placed(xp, q, x), compute) for x in dstate]
        parts = for_heads(xp, parts, lead, shapes)
    n, e = dy.shape[-2:]
    return xp.reshape(gpu.contiguous(xp, dy), (H, n, e)), tuple(parts)


def gradients_of(found, grads, dstate, shapes, initial_state):
    """From gradients (H, ...) of features, values and state to those of what came in."""
    xp, q, k, feature_map, lead = found.xp, found.q, found.k, found.feature_map, found.lead
    dq, dk, dv, *dstate = (xp.reshape(g, (*lead, *g.shape[1:])) for g in (*grads, *dstate))
    if found.of == READY:
        # phi_q = query(q), phi_k = key(k): on the rows as they came, before any broadcasting
        dq = feature_map.query_vjp(gpu.summed(xp, dq, (*q.shape[:-1], dq.shape[-1])), q)
        dk = feature_map.key_vjp(gpu.summed(xp, dk, (*k.shape[:-1], dk.shape[-1])), k)
        if found.seen is not None:
            dk = xp.where(found.seen[..., None], dk, xp.zeros_like(dk))
    pairs = zip((dq, dk, dv), shapes, strict=True)
    result = tuple(gpu.cast(xp, gpu.summed(xp, g, shape), found.dtype) for g, shape in pairs)
    if initial_state is None:
        return result
    pairs = zip(dstate, initial_state, strict=True)
    return *result, tuple(gpu.summed(xp, g, np.shape(gpu.outline(x))) for g, x in pairs)


def by_formula(found, function, *first, **options):
    """Nothing for kernels to do: the formula's answer, as arrays of the library."""
    arrays, mask = (found.q, found.k, found.v), options["key_mask"]
    options["key_mask"] = None if mask is None else host(mask)
    for name in ("initial_state", "dstate"):
        if options.get(name) is not None:
            options[name] = tuple(host(x) for x in options[name])
    answer = function(*(host(x) for x in (*first, *arrays)), **options)

    def back(x):
        if isinstance(x, tuple):
            return tuple(back(part) for part in x)
        return gpu.like(found.xp, found.q, x)

    return back(answer)


def host(x):
    """An array of any library as NumPy's; bfloat16 as float32, which NumPy knows."""
    if hasattr(x, "__dlpack__") and gpu.dtype_of(x).name == "bfloat16":
        x = gpu.cast(gpu.namespace(x), x, np.float32)
    for step in ("detach", "cpu", "get"):
        x = getattr(x, step)() if hasattr(x, step) else x
    return np.asarray(x)
