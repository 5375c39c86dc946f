"""What can be said of a failure that equals no known mistake: which cases, where, how it grows."""

import numpy as np

from refattn.verify.findings import places
from refattn.verify.findings.failing import which_fail
from refattn.verify.findings.parts import Part, listed
from refattn.verify.findings.precision import growing, low_precision, not_numbers, out_of_range
from refattn.verify.findings.relations import relation

MOST = 5
ARRAYS = ("y", "dq", "dk", "dv")
PLACES = (places.rows, places.columns, places.heads)
SIZES = (low_precision, growing, not_numbers, out_of_range)  # said where nothing else is


@np.errstate(all="ignore")  # infinities are among what is looked at
def findings(seen):
    """Sentences about the errors of a kernel, from what was wanted and got in each case.

    Parameters
    ----------
    seen : list of Seen
        The cases as ``refattn.verify.check`` keeps them.

    Returns
    -------
    tuple of str
        At most five, the most telling first. Each says what the numbers show in every case and no
        more: what the array is instead ("1.5 times what is wanted"), which cases fail, which rows,
        columns or heads, and how large the error is. Where y is right, they are about the
        gradients.

    Examples
    --------
    >>> import numpy as np
    >>> from refattn import softmax_attention
    >>> from refattn.verify import check
    >>> report = check(lambda q, k, v: 1.5 * softmax_attention(q, k, v), "softmax_attention")
    >>> report.findings
    ('y is 1.5 times what is wanted.',)
    """
    parts = {name: [Part(name, x) for x in seen if name in x.got] for name in ARRAYS}
    wrong = [name for name in ARRAYS if any(part.failed for part in parts[name])]
    asked = [name for name in ARRAYS if any(name in x.wanted for x in seen)]
    about = ["y"] if "y" in wrong else wrong
    what = _each(_what, about, parts)
    where = [x for look in PLACES for x in _each(look, about, parts)]
    size = []
    for look in SIZES:
        if not (what or where or size):
            size = _each(look, about, parts)
    ahead, cases = _right_and_wrong(asked, wrong, parts), which_fail(seen, about or ["y"])
    return tuple(sentence for sentence in (ahead, *what, cases, *where, *size) if sentence)[:MOST]


def _each(look, names, parts):
    """What ``look`` says of each array; arrays of which it says the same share a sentence."""
    said = {}
    for name in names:
        words = look(parts[name])
        if words:
            said.setdefault(words, []).append(name)
    return [
        words.format(it=listed(names), is_="is" if len(names) == 1 else "are")
        for words, names in said.items()
    ]


def _what(parts):
    return places.instead(parts) or relation(parts)


def _right_and_wrong(asked, wrong, parts):
    """Which of y and the gradients are right; nothing where only y was asked for."""
    right = [name for name in asked if name not in wrong and len(parts[name]) == len(parts["y"])]
    if len(asked) == 1 or not wrong or not right:
        return ""
    verbs = ["is" if len(names) == 1 else "are" for names in (right, wrong)]
    return f"{listed(right)} {verbs[0]} right, {listed(wrong)} {verbs[1]} not."
