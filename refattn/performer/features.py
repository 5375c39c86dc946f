"""Random features: functions phi with E[phi(x) . phi(y)] = exp(x . y), as Performer uses them.

A feature is a factor times the exponential of an exponent. The public functions multiply the two
out; the attention keeps them apart, so that it can shift all exponents before it takes any.
"""

import numpy as np

from refattn import checks


def random_features(num_features, d, *, rng, orthogonal=True):
    r"""Directions omega (num_features, d) whose rows are distributed as N(0, I).

    Parameters
    ----------
    num_features : int >= 1
    d : int >= 1
    rng : numpy.random.Generator or int
        Chance is the caller's; an integer is a seed.
    orthogonal : bool
        Rows orthogonal in blocks of d: uniformly distributed directions, times independent
        chi-distributed norms with d degrees of freedom. Each row alone is still N(0, I), so the
        estimate stays unbiased.

    Returns
    -------
    array (num_features, d), float64

    Raises
    ------
    TypeError, ValueError
        num_features or d not an integer >= 1; an rng that is neither.

    Notes
    -----
    QR leaves the signs of R's diagonal to the library. LAPACK's choice makes q[0, 0] <= 0 in every
    draw, so that directions are not uniform and the estimate is biased for good; multiplying
    each column of Q by the sign of R's diagonal entry makes Q uniform (Mezzadri 2006,
    arXiv:math-ph/0609050). tests/test_performer.py shows both.

    References
    ----------
    Choromanski et al. 2020, arXiv:2009.14794, section 2.4.

    Examples
    --------
    >>> omega = random_features(4, 4, rng=0)
    >>> gram = omega @ omega.T
    >>> bool(abs(gram - np.diag(np.diag(gram))).max() < 1e-12)
    True
    """
    num_features = checks.whole("num_features", num_features, least=1)
    d, rng = checks.whole("d", d, least=1), checks.generator(rng)
    if not checks.flag("orthogonal", orthogonal):
        return rng.standard_normal((num_features, d))
    blocks = [_directions(d, rng) for _ in range(-(-num_features // d))]
    norms = np.sqrt(rng.chisquare(d, num_features))
    return np.concatenate(blocks)[:num_features] * norms[:, None]


def _directions(d, rng):
    """A uniformly distributed orthogonal matrix."""
    Q, R = np.linalg.qr(rng.standard_normal((d, d)))
    return (Q * np.where(np.diag(R) < 0, -1.0, 1.0)).T


def positive_features(x, omega):
    r"""Positive features, one for each row of omega (M, d).

    .. math:: \phi(x)_r = \tfrac{1}{\sqrt M} \exp(\omega_r \cdot x - |x|^2 / 2)

    Parameters
    ----------
    x : array (..., d)
    omega : array (M, d)

    Returns
    -------
    array (..., M)
        In x's dtype; not stabilised, so large x overflows or underflows.

    Raises
    ------
    TypeError, ValueError
        Not real floating point; an omega that is not (M, d) with M >= 1.

    References
    ----------
    Choromanski et al. 2020, arXiv:2009.14794, lemma 1.

    Examples
    --------
    >>> positive_features(np.zeros((1, 2)), np.ones((4, 2)))
    array([[0.5, 0.5, 0.5, 0.5]])
    """
    return _features(x, omega, "positive")


def hyperbolic_features(x, omega):
    r"""Positive features of each omega and of its opposite: 2M of them.

    .. math:: \phi(x) = \tfrac{1}{\sqrt{2 M}}
              (\exp(\omega x - |x|^2 / 2),\ \exp(-\omega x - |x|^2 / 2))

    Parameters
    ----------
    x : array (..., d)
    omega : array (M, d)

    Returns
    -------
    array (..., 2 M)
        In x's dtype; not stabilised.

    Raises
    ------
    TypeError, ValueError
        As ``positive_features``.

    References
    ----------
    Choromanski et al. 2020, arXiv:2009.14794, lemma 1.

    Examples
    --------
    >>> hyperbolic_features(np.zeros((1, 2)), np.ones((2, 2)))
    array([[0.5, 0.5, 0.5, 0.5]])
    """
    return _features(x, omega, "hyperbolic")


def trig_features(x, omega):
    r"""Trigonometric features, which may be negative: 2M of them.

    .. math:: \phi(x) = \tfrac{1}{\sqrt M} \exp(|x|^2 / 2)\, (\cos \omega x,\ \sin \omega x)

    Parameters
    ----------
    x : array (..., d)
    omega : array (M, d)

    Returns
    -------
    array (..., 2 M)
        In x's dtype; not stabilised.

    Raises
    ------
    TypeError, ValueError
        As ``positive_features``.

    References
    ----------
    Rahimi & Recht 2007, "Random features for large-scale kernel machines"; Choromanski et al.
    2020, arXiv:2009.14794, section 2.3.

    Examples
    --------
    >>> trig_features(np.zeros((1, 2)), np.ones((1, 2)))
    array([[1., 0.]])
    """
    return _features(x, omega, "trig")


def _features(x, omega, kind):
    x = checks.floating("x", x)
    dtype = x.dtype
    x = x.astype(checks.compute_dtype(dtype), copy=False)
    omega = directions(omega, x.shape[-1] if x.ndim else 0, dtype)
    factor, exponent = PARTS[kind](x, omega)
    count = exponent.shape[-1] if kind == "hyperbolic" else len(omega)
    return (factor * np.exp(exponent) / np.sqrt(x.dtype.type(count))).astype(dtype, copy=False)


def directions(omega, d, dtype):
    """omega (num_features, d), rounded to the inputs' dtype and held in that of the arithmetic."""
    omega = checks.real_option("omega", omega, dtype, checks.compute_dtype(dtype))
    if omega.ndim != 2 or omega.shape[1] != d or len(omega) < 1:
        raise ValueError(
            f"omega has shape {omega.shape}; expected (num_features, {d}), num_features >= 1"
        )
    return omega


# The two parts of each kind's features, without the constant that cancels in attention.


def positive(x, omega):
    """Factor 1 and the exponents (..., M)."""
    exponent = x @ omega.T - _half_square(x)
    return np.ones_like(exponent), exponent


def hyperbolic(x, omega):
    """Factor 1 and the exponents (..., 2M)."""
    t, h = x @ omega.T, _half_square(x)
    exponent = np.concatenate([t - h, -t - h], axis=-1)
    return np.ones_like(exponent), exponent


def trig(x, omega):
    """Factors cos and sin (..., 2M), and one exponent for all, (..., 1)."""
    t = x @ omega.T
    return np.concatenate([np.cos(t), np.sin(t)], axis=-1), _half_square(x)


def _half_square(x):
    return 0.5 * (x * x).sum(axis=-1, keepdims=True)


PARTS = {"positive": positive, "hyperbolic": hyperbolic, "trig": trig}

# From dphi and phi = factor * exp(exponent - constant) to dx.


def positive_vjp(dphi, phi, x, omega):
    """d exp(omega x - |x|^2/2) = phi (omega - x) dx."""
    g = dphi * phi  # (..., M)
    return g @ omega - g.sum(axis=-1, keepdims=True) * x


def hyperbolic_vjp(dphi, phi, x, omega):
    """As ``positive_vjp``, with omega and -omega."""
    plus, minus = np.split(dphi * phi, 2, axis=-1)
    return (plus - minus) @ omega - (plus + minus).sum(axis=-1, keepdims=True) * x


def trig_vjp(dphi, phi, x, omega):
    """d cos = -sin omega dx, d sin = cos omega dx, and phi x dx from exp(|x|^2/2)."""
    cos, sin = np.split(phi, 2, axis=-1)
    dcos, dsin = np.split(dphi, 2, axis=-1)
    return (dsin * cos - dcos * sin) @ omega + (dphi * phi).sum(axis=-1, keepdims=True) * x


PARTS_VJP = {"positive": positive_vjp, "hyperbolic": hyperbolic_vjp, "trig": trig_vjp}


def kernel_variance(x, y, num_features, kind="positive"):
    r"""Variance of phi(x) . phi(y) as an estimate of exp(x . y), for independent directions.

    .. math:: \mathrm{positive:}\ \tfrac1M e^{|x+y|^2} e^{2 x \cdot y} (1 - e^{-|x+y|^2}), \quad
              \mathrm{trig:}\ \tfrac1{2M} e^{|x+y|^2} e^{-2 x \cdot y} (1 - e^{-|x-y|^2})^2

    and hyperbolic (1 - exp(-|x+y|^2)) / 2 times positive: lemma 2 of Choromanski et al. 2020,
    arXiv:2009.14794. x and y (..., d).

    >>> float(kernel_variance(np.zeros(2), np.zeros(2), 8))
    0.0
    """
    checks.choice("kind", kind, PARTS)
    M = checks.whole("num_features", num_features, least=1)
    x, y = np.asarray(x, float), np.asarray(y, float)
    dot, plus, minus = (x * y).sum(-1), ((x + y) ** 2).sum(-1), ((x - y) ** 2).sum(-1)
    if kind == "trig":
        return np.exp(plus - 2 * dot) * (1 - np.exp(-minus)) ** 2 / (2 * M)
    positive = np.exp(plus + 2 * dot) * (1 - np.exp(-plus)) / M
    return positive if kind == "positive" else positive * (1 - np.exp(-plus)) / 2
