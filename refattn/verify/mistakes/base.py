"""What a known mistake is, and the pieces that several are made of."""

from collections.abc import Callable
from dataclasses import dataclass

from refattn import checks

SOFTMAX = ("softmax_attention", "local_attention", "sparse_attention")
SCALED = (*SOFTMAX, "linformer_attention", "performer_attention", "block_attention")
LINEAR = ("linear_attention", "linear_attention_chunked")
ALL = (*SCALED, "two_level_attention", *LINEAR, "gated_attention")


@dataclass(frozen=True)
class Mistake:
    """A mistake, a sentence that tells it, and its output.

    ``output(run, q, k, v, options)`` gives y or None where the mistake says nothing about these
    options; ``run(q, k, v, **options)`` is the right attention. Arrays are those of one head,
    (n, d), unless ``across_heads``. ``number`` is what tells it from others of its name, as it
    stands in ``tells``. ``met.py`` says where it, or what leads to it, was met.
    """

    name: str
    tells: str
    mechanisms: tuple
    output: Callable
    across_heads: bool = False
    number: str = ""


def changed(options, **new):
    """Options with some of them changed."""
    return {**options, **new}


def without(name):
    """The right attention without an option."""

    def output(run, q, k, v, options):
        if options.get(name) is None:
            return None
        return run(q, k, v, **{key: x for key, x in options.items() if key != name})

    return output


def scale_of(q, options):
    """The factor on q . k that the options ask for."""
    return checks.scale(options.get("scale"), q.shape[-1])
