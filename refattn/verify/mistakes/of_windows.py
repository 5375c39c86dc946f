"""Mistakes in windows: a key more or less at an end, and gaps forgotten."""

from refattn import checks
from refattn.verify.mistakes.base import Mistake, changed, without


def _window(change):
    """A window whose sides are a little other than asked for."""

    def output(run, q, k, v, options):
        left, right = checks.window(options["window"], options.get("causal", False))
        sides = change(left, right)
        if options.get("causal") and sides[1]:  # causal takes the right side away
            return None
        if min(sides) < 0:
            return None
        return run(q, k, v, **changed(options, window=sides))

    return output


MISTAKES = [
    Mistake(
        "dilation ignored", "the window has no gaps", ("local_attention",), without("dilation")
    ),
    Mistake(
        "window one short on the left",
        "left is exclusive: the farthest key before the query is missing",
        ("local_attention",),
        _window(lambda left, right: (left - 1, right)),
    ),
    Mistake(
        "window one short on the right",
        "right is exclusive: the farthest key after the query is missing",
        ("local_attention",),
        _window(lambda left, right: (left, right - 1)),
    ),
    Mistake(
        "window one short on both sides",
        "both ends are exclusive",
        ("local_attention",),
        _window(lambda left, right: (left - 1, right - 1)),
    ),
    Mistake(
        "window one long on the left",
        "there is a key too many before the query",
        ("local_attention",),
        _window(lambda left, right: (left + 1, right)),
    ),
    Mistake(
        "window one long on the right",
        "there is a key too many after the query",
        ("local_attention",),
        _window(lambda left, right: (left, right + 1)),
    ),
    Mistake(
        "window one long on both sides",
        "there is a key too many at each end",
        ("local_attention",),
        _window(lambda left, right: (left + 1, right + 1)),
    ),
    Mistake(
        "window on one side only",
        "no key after the query is seen",
        ("local_attention",),
        _window(lambda left, right: (left, 0) if right else (-1, -1)),
    ),
]
