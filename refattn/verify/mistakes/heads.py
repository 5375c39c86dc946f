"""A mistake of one head, in several."""

import numpy as np

# Axes of an option that belong to one head; those ahead of them are batch and heads.
OWN_AXES = {"mask": 2, "bias": 2, "gate": 2, "key_mask": 1}


def head_by_head(output):
    """``output`` for one head, (n, d) arrays, called on each of (..., n, d)."""

    def run(attend, *arrays_and_options):
        *arrays, options = arrays_and_options
        lead = np.broadcast_shapes(*(x.shape[:-2] for x in arrays))
        if not lead:
            return output(attend, *arrays, options)
        heads = []
        for at in np.ndindex(lead):
            own = {name: _of_head(x, OWN_AXES.get(name), lead, at) for name, x in options.items()}
            heads.append(output(attend, *(x[at] for x in arrays), own))
        if any(head is None for head in heads):
            return None
        if isinstance(heads[0], tuple):
            return tuple(_stacked(part, lead) for part in zip(*heads, strict=True))
        return _stacked(heads, lead)

    return run


def _of_head(x, axes, lead, at):
    if axes is None or not isinstance(x, np.ndarray) or x.ndim <= axes:
        return x
    return np.broadcast_to(x, (*lead, *x.shape[-axes:]))[at]


def _stacked(heads, lead):
    heads = np.stack(heads)
    return heads.reshape(*lead, *heads.shape[1:])
