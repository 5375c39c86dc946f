"""The heads of a gated attention one by one: their inputs, their options, their gradients."""

import numpy as np

from refattn import checks
from refattn.arrays import sum_to_shape

# Array options of refattn's attentions and how many of their last axes belong to one head.
CORE = {"mask": 2, "bias": 2, "key_mask": 1, "E": 2, "F": 2, "weights": 1, "initial_state": (2, 1)}
GRADIENTS = ("bias", "E", "F", "weights", "initial_state")
ROUNDED = ("bias", "E", "F", "weights", "omega")


def rounded_options(options, dtype):
    """Real arrays rounded to q's dtype and held in that of the arithmetic, as the attention would
    do were it given q itself."""
    compute = checks.compute_dtype(dtype)
    result = dict(options)
    for name in ROUNDED:
        if dtype != compute and result.get(name) is not None:
            result[name] = checks.real_option(name, result[name], dtype, compute)
    return result


def gradient_names(options):
    """Options whose gradients an attention returns, in its order."""
    return [name for name in GRADIENTS if options.get(name) is not None]


class Heads:
    """q, k, v of all heads and the options they share; an index ``at`` picks a head, () all."""

    def __init__(self, q, k, v, options):
        self.q, self.k, self.v, self.options = q, k, v, options
        self.lead = checks.lead(q, k, v)
        self.n, self.m = q.shape[-2], k.shape[-2]

    def open_rows(self, gate):
        """(index, open rows), head by head; heads without any are left out."""
        opened = np.broadcast_to((gate != 0).any(axis=-1), (*self.lead, self.n))
        for at in np.ndindex(self.lead):
            if opened[at].any():
                yield at, np.flatnonzero(opened[at])

    def together(self, gate):
        """The same, at once for all heads where they have one gate."""
        opened = (gate != 0).any(axis=-1)  # (..., n)
        if opened.size == self.n:
            return [((), np.flatnonzero(opened))] if opened.any() else []
        return self.open_rows(gate)

    def inputs(self, at):
        """q, k, v of one head, or as they are."""
        if not at:
            return self.q, self.k, self.v
        return tuple(self._of_head(x, 2, at) for x in (self.q, self.k, self.v))

    def head_options(self, at):
        """The options of one head, or as they are."""
        result = dict(self.options)
        for name, core in CORE.items():
            value = result.get(name)
            if not at or value is None or hasattr(value, "indptr"):
                continue
            if isinstance(core, tuple):
                parts = zip(value, core, strict=True)
                result[name] = tuple(self._of_head(part, axes, at) for part, axes in parts)
            else:
                result[name] = self._of_head(value, core, at)
        return result

    def _of_head(self, x, core, at):
        x = np.asarray(x)
        if x.ndim <= core:
            return x
        return np.broadcast_to(x, (*self.lead, *x.shape[x.ndim - core :]))[at]

    def zeros(self, names):
        """A place for each gradient, with all leading axes; of a bias, for all pairs."""
        shapes = {"q": self.q.shape, "k": self.k.shape, "v": self.v.shape}
        grads = {name: np.zeros((*self.lead, *s[-2:]), self.q.dtype) for name, s in shapes.items()}
        for name in names:
            value = self.options[name]
            if name == "bias":
                grads[name] = np.zeros((*self.lead, self.n, self.m), self.q.dtype)
            elif isinstance(CORE[name], tuple):
                grads[name] = tuple(
                    self._place(p, c) for p, c in zip(value, CORE[name], strict=True)
                )
            else:
                grads[name] = self._place(value, CORE[name])
        return grads

    def _place(self, value, core):
        return np.zeros((*self.lead, *np.shape(value)[np.ndim(value) - core :]), self.q.dtype)

    def collect(self, grads, at, rows, dq, dk, dv, rest):
        """Put one head's gradients in their place."""
        grads["q"][at][rows] = dq
        for name, g in {"k": dk, "v": dv, **rest}.items():
            if name == "bias":
                grads[name][at][rows] = g
            elif isinstance(g, tuple):
                for place, part in zip(grads[name], g, strict=True):
                    place[at] = part
            else:
                grads[name][at] = g

    def summed(self, grads):
        """dq, dk, dv and the rest, summed to the shapes of their inputs."""
        shapes = {"q": self.q.shape, "k": self.k.shape, "v": self.v.shape}
        dq, dk, dv = (sum_to_shape(grads[name], shape) for name, shape in shapes.items())
        found = {}
        for name in gradient_names(self.options):
            value = self.options[name]
            if isinstance(CORE[name], tuple):
                pairs = zip(grads[name], value, strict=True)
                found[name] = tuple(sum_to_shape(g, np.shape(part)) for g, part in pairs)
            else:
                found[name] = sum_to_shape(grads[name], np.shape(value))
        return dq, dk, dv, found
