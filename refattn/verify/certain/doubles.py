"""Double-double numbers: an unevaluated sum of two float64, hi + lo, about 31 digits.

Sums and products are put together from steps whose rounding error is itself a float64 (Dekker 1971,
Knuth 1969); each operation here is right within ``UNIT`` of its result, and says where it is not.
"""

import functools

import numpy as np

# A relative bound for +, *, / and the functions on (-1000, 1000): proven bounds for the first three
# are 3, 7 and 10 times 2**-106 (Joldes, Muller and Popescu 2017), the rest is measured against
# mpmath in tests/test_certain.py and has 2 bits to spare.
UNIT = 2.0**-100
TINY = 2.0**-960  # absolute error where a product's low part underflows
SPLITTER = 2.0**27 + 1
PIECE = 2**14  # entries at a time: intermediates stay in the cache


class Double:
    """hi + lo with |lo| <= ulp(hi) / 2: arrays of one shape."""

    __slots__ = ("hi", "lo")

    def __init__(self, hi, lo=None):
        self.hi = hi
        self.lo = np.zeros_like(hi) if lo is None else lo

    @property
    def shape(self):
        return self.hi.shape


def two_sum(a, b):
    """s = fl(a + b) and what it lacks."""
    s = a + b
    of_b = s - a
    return s, (a - (s - of_b)) + (b - of_b)


def quick_two_sum(a, b):
    """The same for |a| >= |b| or a = 0."""
    s = a + b
    return s, b - (s - a)


def halves(a):
    """a as a sum of two numbers of 26 bits."""
    c = SPLITTER * a
    high = c - (c - a)
    return high, a - high


def two_product(a, b):
    """p = fl(a b) and what it lacks."""
    p = a * b
    (ah, al), (bh, bl) = halves(a), halves(b)
    return p, ((ah * bh - p) + ah * bl + al * bh) + al * bl


def add(x, y):
    s, e = two_sum(x.hi, y.hi)
    t, f = two_sum(x.lo, y.lo)
    s, e = quick_two_sum(s, e + t)
    return Double(*quick_two_sum(s, e + f))


def negative(x):
    return Double(-x.hi, -x.lo)


def multiply(x, y):
    p, e = two_product(x.hi, y.hi)
    return Double(*quick_two_sum(p, e + (x.hi * y.lo + x.lo * y.hi)))


def times(x, a):
    """x times plain numbers."""
    p, e = two_product(x.hi, a)
    return Double(*quick_two_sum(p, e + x.lo * a))


def plus(x, a):
    """x plus plain numbers."""
    s, e = two_sum(x.hi, a)
    return Double(*quick_two_sum(s, e + x.lo))


def divide(x, y):
    """Long division, three digits of 53 bits."""
    digits, rest = [], x
    for _ in range(3):
        digits.append(rest.hi / y.hi)
        rest = add(rest, negative(times(y, digits[-1])))
    return plus(Double(*quick_two_sum(*digits[:2])), digits[2])


def square_root(x):
    """Newton's step from the float64 root."""
    root = np.sqrt(x.hi)
    p, e = two_product(root, root)
    rest = add(x, Double(-p, -e))
    return Double(
        *quick_two_sum(root, np.where(root == 0, 0, rest.hi / np.where(root, 2 * root, 1)))
    )


@functools.cache
def split(name, parts):
    """A constant of mpmath's as a sum of float64: ``parts`` numbers, largest first."""
    import mpmath

    with mpmath.workprec(60 * (parts + 1)):
        value, found = mpmath.mpf(eval(name, {"mp": mpmath})), []
        for _ in range(parts):
            found.append(float(value))
            value -= found[-1]
    return tuple(found)


def inverse_factorial(k):
    return Double(*map(np.float64, split(f"1 / mp.factorial({k})", 2)))


def less_multiples(x, k, constant):
    """x - k times a constant of four parts, for whole numbers |k| < 2**40."""
    for part in split(constant, 4):
        x = add(x, negative(Double(*two_product(k, np.float64(part)))))
    return x


def by_pieces(function):
    """Long arrays in pieces that fit the cache."""

    @functools.wraps(function)
    def run(x):
        if x.hi.size <= PIECE:
            return function(x)
        hi, lo = np.ravel(x.hi), np.ravel(x.lo)
        results = None
        for start in range(0, hi.size, PIECE):
            part = slice(start, start + PIECE)
            found = function(Double(hi[part], lo[part]))
            found = found if isinstance(found, tuple) else (found,)
            if results is None:
                results = [Double(np.empty(hi.size), np.empty(hi.size)) for _ in found]
            for result, piece in zip(results, found, strict=True):
                result.hi[part], result.lo[part] = piece.hi, piece.lo
        results = [Double(r.hi.reshape(x.shape), r.lo.reshape(x.shape)) for r in results]
        return results[0] if len(results) == 1 else tuple(results)

    return run


HALVINGS = 8  # exp takes its series at r / 2**8, |r| <= log(2) / 2: ten terms are 2**-113


@by_pieces
def exp(x):
    """2^k e^r with r = x - k log 2, and e^r - 1 by its series at r / 2^8, doubled eight times."""
    low = x.hi < -2000
    x = Double(np.where(low, 0.0, x.hi), np.where(low, 0.0, x.lo))
    k = np.rint(x.hi / split("mp.log(2)", 1)[0])
    r = times(less_multiples(x, k, "mp.log(2)"), 2.0**-HALVINGS)
    series = inverse_factorial(10)
    for term in range(9, 0, -1):
        series = add(multiply(series, r), inverse_factorial(term))
    less_one = multiply(series, r)  # e^(r / 256) - 1
    for _ in range(HALVINGS):  # (1 + a)^2 - 1 = 2 a + a^2
        less_one = add(times(less_one, 2.0), multiply(less_one, less_one))
    found = plus(less_one, 1.0)
    k = np.clip(k, -4000, 4000).astype(int)
    with np.errstate(under="ignore", over="ignore"):
        hi, lo = np.ldexp(found.hi, k), np.ldexp(found.lo, k)
    return Double(np.where(low, 0.0, hi), np.where(low, 0.0, lo))


def log(x):
    """Newton's step for e^y = x from the float64 logarithm."""
    y = np.log(x.hi)
    rest = plus(multiply(x, exp(Double(-y))), -1.0)
    return add(Double(y), add(rest, times(multiply(rest, rest), -0.5)))


@by_pieces
def tanh(x):
    """(1 - e^(-2|x|)) / (1 + e^(-2|x|)), with x's sign: an absolute error."""
    sign = np.where(x.hi < 0, -1.0, 1.0)
    a = exp(times(x, -2 * sign))
    return times(divide(plus(negative(a), 1.0), plus(a, 1.0)), sign)


@by_pieces
def cos_sin(x):
    """Series at x - k pi/2, |x| < 2**40; then a quarter turn k times."""
    far = ~(np.abs(x.hi) < 2.0**40)
    x = Double(np.where(far, np.nan, x.hi), x.lo)
    k = np.rint(x.hi / split("mp.pi / 2", 1)[0])
    r = less_multiples(x, k, "mp.pi / 2")
    square = negative(multiply(r, r))
    c, s = inverse_factorial(30), inverse_factorial(31)
    for term in range(28, -1, -2):
        c = add(multiply(c, square), inverse_factorial(term))
        s = add(multiply(s, square), inverse_factorial(term + 1))
    s = multiply(s, r)
    turn = np.where(far, 0, k).astype(int) % 4

    def turned(*four):  # what cos or sin becomes after 0 to 3 quarter turns
        parts = [(f.hi, f.lo) for f in four]
        return Double(*(np.choose(turn, [p[i] for p in parts]) for i in (0, 1)))

    return turned(c, negative(s), negative(c), s), turned(s, c, negative(s), negative(c))


def total(x, axis):
    """The sum along an axis, in halves; each level's error is within UNIT of the sum of sizes."""
    hi, lo = np.moveaxis(x.hi, axis, 0), np.moveaxis(x.lo, axis, 0)
    if not len(hi):
        return Double(np.zeros(hi.shape[1:]))
    while len(hi) > 1:
        half = len(hi) // 2
        both = add(Double(hi[:half], lo[:half]), Double(hi[half : 2 * half], lo[half : 2 * half]))
        rest = (hi[2 * half :], lo[2 * half :])
        hi, lo = np.concatenate([both.hi, rest[0]]), np.concatenate([both.lo, rest[1]])
    return Double(hi[0], lo[0])


BITS = 122  # of the largest entry of a row, or column, that a product reads


def slices(x, axis, bits, count):
    """x as a sum of ``count`` arrays of ``bits`` bits each, on a grid that a row (axis -1) or a
    column (-2) shares; and the largest power of two of each row."""
    top = np.abs(x.hi).max(axis=axis, keepdims=True, initial=0)
    grid = np.ldexp(1.0, np.frexp(top)[1])  # > top
    rest, found = x, []
    for i in range(1, count + 1):
        with np.errstate(under="ignore"):
            at = np.ldexp(1.5 * grid, 53 - bits * i - 1)  # adding it rounds to the grid below
            piece = np.where(grid == 0, 0, (rest.hi + at) - at)
        found.append(piece)
        rest = Double(*quick_two_sum(*two_sum(rest.hi - piece, rest.lo)))
    return found, grid


def matmul(x, y):
    """x @ y and a bound on its error.

    Ozaki, Ogita, Oishi and Rump 2012: both are cut into slices of so few bits that products of
    slices, and their sums over the inner axis, are exact in float64, so that BLAS may make them.
    Slices i and j matter at 2^-bits(i + j): those with one i + j lie side by side in one product.
    """
    inner = x.shape[-1]
    if inner == 0:
        shape = (*np.broadcast_shapes(x.shape[:-2], y.shape[:-2]), x.shape[-2], y.shape[-1])
        return Double(np.zeros(shape)), np.zeros(shape)
    bits, count = 22, 6
    while 2 * bits + int(np.ceil(np.log2(inner * count))) > 53:
        bits -= 1
        count = -(-BITS // bits)
    a, high = slices(x, -1, bits, count)
    b, wide = slices(y, -2, bits, count)
    found, error = None, 0.0
    for order in reversed(range(count)):  # small terms first
        left = np.concatenate([a[i] for i in range(order + 1)], axis=-1)
        right = np.concatenate([b[order - i] for i in range(order + 1)], axis=-2)
        part = left @ right
        found = Double(part) if found is None else plus(found, part)
        error = error + UNIT / 8 * np.abs(found.hi)
    cut = 4 * count * inner * 2.0 ** (-bits * count) * (high * wide) + inner * TINY
    if (found.hi == 0).any():  # exactly, where in each term a factor is 0
        terms = (x.hi != 0).astype(float) @ (y.hi != 0).astype(float)
        cut = np.where(terms == 0, 0.0, cut)
    return found, error + cut
