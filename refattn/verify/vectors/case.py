"""A vector as it is used."""

from dataclasses import dataclass, field

import numpy as np

from refattn.verify.compare import compare
from refattn.verify.vectors.call import answers_of


@dataclass(frozen=True, eq=False)
class Case:
    """Inputs, options, right outputs, and how far off a kernel may be.

    Attributes
    ----------
    name : str
        "mechanism/label/dtype".
    mechanism, dtype : str
    options : dict
        What the mechanism takes beside q, k and v.
    inputs : dict
        q, k, v, and the cotangents dy, dlse, dS and dz of what the forward gives.
    wanted : dict
        The right arrays in float64: y, lse, S, z, dq, dk, dv and the gradients of options.
    error, budget : dict
        For each of ``wanted`` a bound on its own error, and the largest error of a right kernel.

    Examples
    --------
    >>> from refattn.verify.vectors import load
    >>> case = load(mechanism="softmax_attention", dtype="float32")[0]
    >>> [line.trouble for line in case.compare(case.run())] == [""] * len(case.wanted)
    True
    """

    name: str
    mechanism: str
    dtype: str
    options: dict = field(repr=False)
    inputs: dict = field(repr=False)
    wanted: dict = field(repr=False)
    error: dict = field(repr=False)
    budget: dict = field(repr=False)

    @property
    def label(self):
        return self.name.split("/")[1]

    def run(self, backend="numpy"):
        """{"y": array, ...} as refattn's own forward and gradient give them."""
        with np.errstate(all="ignore"):
            return answers_of(self.mechanism, self.inputs, self.options, backend)

    def compare(self, answers):
        """A ``refattn.verify.report.Line`` for each of ``answers``, {"y": array, ...}; one with
        trouble is not right. Arrays of other libraries are taken as they are."""
        if not isinstance(answers, dict):
            kind = type(answers).__name__
            raise TypeError(f"answers is a {kind}; expected a dict, such as {{'y': y}}")
        unknown = sorted(set(answers) - set(self.wanted))
        if unknown or not answers:
            raise ValueError(
                f"{', '.join(unknown) or 'nothing'} came for {self.name}; "
                f"expected some of {', '.join(self.wanted)}"
            )
        return [
            compare(f"{self.name}: {part}", as_numpy(y), self.wanted[part], self.budget[part])
            for part, y in answers.items()
        ]


def as_numpy(y):
    """The numbers of an array of any library, as NumPy's; what is none stays as it is."""
    kind = type(y).__module__.split(".")[0]
    if kind == "torch" and hasattr(y, "detach"):
        y = y.detach().cpu()
        y = y.double() if y.dtype.is_floating_point else y  # NumPy has no bfloat16
        return y.numpy()
    if kind == "cupy":
        return y.get()
    return y
