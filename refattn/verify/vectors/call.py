"""A mechanism on a case: from inputs and options to every array that it gives, by name."""

import numpy as np

import refattn

# Options that have a gradient, in the order in which a _vjp hands them out.
WITH_GRADIENT = {
    "bias": ("dbias",),
    "E": ("dE",),
    "F": ("dF",),
    "gate": ("dgate",),
    "weights": ("dweights",),
    "initial_state": ("dS0", "dz0"),
}


def answers_of(mechanism, inputs, options, backend="numpy"):
    """{"y": ..., "lse": ..., "dq": ...} of refattn's own forward and gradient."""
    forward = getattr(refattn, mechanism)
    if mechanism == "merge_attention":  # has one implementation
        return dict(zip(("y", "lse"), forward(inputs["ys"], inputs["lses"]), strict=True))
    arrays = [inputs[name] for name in "qkv"]
    if mechanism == "linear_attention_step":
        rest = {name: x for name, x in options.items() if name != "initial_state"}
        y, state = forward(options.get("initial_state"), *arrays, **rest, backend=backend)
        return {"y": y, "S": state[0], "z": state[1]}
    given = forward(*arrays, **options, backend=backend)
    found = dict(zip(_outputs(options), _flat(given), strict=True))
    if "dy" in inputs:
        vjp = getattr(refattn, f"{mechanism}_vjp")
        more = {"dlse": inputs["dlse"]} if "dlse" in inputs else {}
        if "dS" in inputs:
            more["dstate"] = inputs["dS"], inputs["dz"]
        grads = vjp(inputs["dy"], *arrays, **options, **more, backend=backend)
        found |= dict(zip(gradients_of(options), _flat(grads), strict=True))
    return {name: np.asarray(x) for name, x in found.items()}


def gradients_of(options):
    """The names of what a _vjp gives with these options."""
    names = ["dq", "dk", "dv"]
    for option, parts in WITH_GRADIENT.items():
        if options.get(option) is not None:
            names += parts
    return names


def _outputs(options):
    if options.get("return_lse"):
        return "y", "lse"
    return ("y", "S", "z") if options.get("return_state") else ("y",)


def _flat(arrays):
    """Arrays, and those of pairs among them, as one list."""
    if not isinstance(arrays, tuple):
        return [arrays]
    return [x for part in arrays for x in _flat(part)]
