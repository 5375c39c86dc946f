"""What holds for an attention kernel whatever its formula is: a function for each, which asks the
kernel and gives a line.

Each takes a ``Bench``, the name of its line, and what it needs beside.
"""

import itertools
from dataclasses import replace
from functools import partial

import numpy as np

from refattn.verify.compare import compare
from refattn.verify.libraries import WrongKind
from refattn.verify.probes.bench import Bench, as_numbers, times, worst

# What an unseen key and its value are multiplied by, in turn.
POISON = {
    ("keys", "x 1e5"): (1e5, 1e5),
    ("keys", "NaN"): (np.nan, 1.0),
    ("values", "NaN"): (1.0, np.nan),
}


def same_again(bench, case):
    """The same bits from another call, and from one after NaN has gone through: nothing may be
    left from call to call."""

    def lines():
        yield "another call", bench.line(case, bench.inputs, 0.0)
        bench.ask(*(np.full_like(x, np.nan) for x in bench.inputs))
        yield "after a call on NaN", bench.line(case, bench.inputs, 0.0)

    return worst(lines())


def batch_independence(bench, case):
    """Some heads' inputs become huge, or NaN: the others' answers stay.

    For each bit, the heads whose number has it set, and those that have not: any two heads are
    told apart by some bit, so a leak from any to any other shows. Not to the bit, since work that
    is dealt out anew may be summed in another order; a leak of NaN or of 1e5 is no rounding.
    """
    lead = bench.q.shape[:-2]
    heads = int(np.prod(lead))
    number = np.arange(heads).reshape(*lead, 1, 1)

    def lines():
        for bit, side in itertools.product(range((heads - 1).bit_length()), (0, 1)):
            changed = (number >> bit) % 2 == side
            for factor, word in ((1e5, "x 1e5"), (np.nan, "NaN")):
                inputs = [times(x, factor, changed) for x in bench.inputs]
                label = f"{changed.sum()} of {heads} heads {word}"
                yield label, bench.line(case, inputs, bench.reordered, ~changed)

    return worst(lines())


def linear_in_v(bench, case, w):
    """Twice one answer less three times another is the answer to values mixed so.

    Two answers, three answers, and one to values five times as large: the rounding of ten, where
    ``reordered`` is that of two. To round the mixture itself is less than one more.
    """
    q, k, v = bench.inputs
    mixed = (2 * v.astype(float) - 3 * w.astype(float)).astype(v.dtype)
    found = bench.ask(q, k, w)
    other = as_numbers(found, bench.y.shape)
    if other is None:
        return compare(case, found, bench.y, 6 * bench.reordered)
    wanted = 2 * bench.y - 3 * other
    return bench.line(case, (q, k, mixed), 6 * bench.reordered, wanted=wanted)


def keys_shuffled(bench, case):
    """Keys and values in another order: the same answer, from scores and sums in another order."""
    order = np.random.default_rng(1).permutation(bench.n)
    q, k, v = bench.inputs
    return bench.line(case, (q, k[..., order, :], v[..., order, :]), bench.recomputed)


def queries_shuffled(bench, case):
    """Queries in another order: the same rows in that order."""
    order = np.random.default_rng(2).permutation(bench.n)
    q, k, v = bench.inputs
    inputs = (q[..., order, :], k, v)
    return bench.line(case, inputs, bench.recomputed, wanted=bench.y[..., order, :])


def unseen(name, who):
    """{name: promise} on keys that some rows do not see: made huge or NaN, they change nothing.

    ``who`` lists pairs (keys (n, 1), rows (n, 1)): these rows see none of these keys. Where it is
    false, so are the promises.
    """
    return {name.format(*words): who and partial(_stays, who, by) for words, by in POISON.items()}


def _stays(who, factors, bench, case):
    """Every score that counts is the same sum of the same numbers; those over keys may differ."""

    def lines():
        for keys, rows in who:
            pairs = zip((bench.k, bench.v), factors)
            inputs = (bench.q, *(times(x, factor, keys) for x, factor in pairs))
            label = f"{keys.sum()} of {bench.n} keys changed"
            yield label, bench.line(case, inputs, bench.reordered, rows)

    return worst(lines())


def far_keys_later_near(bench, case):
    """Every key is far from every query; then those after row i come near, and rows up to i stay.

    Under a maximum over all keys the far ones vanish: exp(-1000) is 0 in float64 too.
    """
    q, k = bench.q.copy(), bench.k.copy()
    q[..., 0], k[..., 0] = 1, -1000 * np.sqrt(q.shape[-1])  # scores of -1000 at scale 1/sqrt(d)
    far = Bench(bench.call, q, k, bench.v, troubles=bench.troubles)
    found = far.ask(*far.inputs)
    line = far.start(case, found)
    if far.y is None:
        return line

    def lines():
        for later, rows in later_than(far.n):
            inputs = (q, times(k, 1e-5, later), far.v)
            yield f"last {later.sum()} near", far.line(case, inputs, far.reordered, rows)

    return worst(lines())


def later_than(n):
    """(keys after i, rows up to i), for several i."""
    at = np.arange(n)[:, None]
    return [(at > i, at <= i) for i in sorted({0, 1, n // 2, n - 2})]


def out_of_window(n, left, right):
    """(keys out of the window of i, row i), for several i."""
    at = np.arange(n)[:, None]
    return [((at < i - left) | (at > i + right), at == i) for i in (0, n // 2, n - 1)]


def prefix_alone(bench, case):
    """The first tokens alone give the first rows of the whole answer. Another size may go by other
    tiles, so scores and sums run in another order."""

    def lines():
        for cut in sorted({1, bench.n // 3, bench.n // 2, bench.n - 1}):
            first = [x[..., :cut, :] for x in bench.inputs]
            wanted = bench.y[..., :cut, :]
            line = bench.line(case, first, bench.recomputed, wanted=wanted)
            yield f"first {cut} of {bench.n} tokens", line

    return worst(lines())


def split_and_resume(bench, case, resume):
    """Part after part, each with the state that the one before left, gives the rows of the whole.

    The same terms in another order of sums. An empty part is not tried: many a right kernel
    refuses it.
    """
    n = bench.n

    def lines():
        for cuts in ([n // 2], [1, n - 1], [n // 3, n // 3 + 1], list(range(1, n))):
            call = replace(bench.call, kernel=_Resumed(resume))
            parts = "one by one" if len(cuts) == n - 1 else f"cut at {', '.join(map(str, cuts))}"
            for start, end in itertools.pairwise([0, *cuts, n]):
                part = [x[..., start:end, :] for x in bench.inputs]
                wanted = bench.y[..., start:end, :]
                line = bench.line(case, part, bench.recomputed, wanted=wanted, call=call)
                yield f"{parts}, from token {start}", line

    return worst(lines())


class _Resumed:
    """resume(q, k, v, state) -> (y, state) as a kernel that keeps its state."""

    def __init__(self, resume):
        self.resume, self.state = resume, None

    def __call__(self, q, k, v):
        answer = self.resume(q, k, v, self.state)
        if not isinstance(answer, (tuple, list)) or len(answer) != 2:
            raise WrongKind(f"gave {type(answer).__name__}, expected a pair (y, state)")
        y, self.state = answer
        return y


def wide_window(bench, case, windowed):
    """A window that holds all n tokens hides none. Two kernels: scores and sums in two orders."""

    def lines():
        for width in (bench.n, bench.n + 1, 100 * bench.n):
            call = replace(bench.call, kernel=lambda *qkv, width=width: windowed(width)(*qkv))
            yield f"window {width}", bench.line(case, bench.inputs, bench.recomputed, call=call)

    return worst(lines())
