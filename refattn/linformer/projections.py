"""Matrices E (r, m) for ``linformer_attention``, and how large r should be.

Row t of E says how the t-th mixture is made of the m keys. The paper learns E and F by training;
those here need none.
"""

import math

import numpy as np

from refattn import checks


def gaussian(r, m, *, rng):
    """Independent entries of N(0, 1/r): the Johnson-Lindenstrauss matrix of the paper's proofs.

    E^T E is the identity on average, so (E x) . (E y) is x . y on average; its standard deviation
    is at most sqrt(2 / r) |x| |y|.

    Parameters
    ----------
    r, m : int
        1 <= r <= m.
    rng : numpy Generator or integer seed

    Returns
    -------
    array (r, m) of float64

    Raises
    ------
    TypeError, ValueError
        A size that is no integer, or r > m.

    References
    ----------
    Wang et al. 2020, arXiv:2006.04768, lemma 1.

    Examples
    --------
    >>> gaussian(2, 5, rng=0).shape
    (2, 5)
    """
    r, m = _sizes(r, m)
    return checks.generator(rng).standard_normal((r, m)) / math.sqrt(r)


def mean_pool(r, m):
    """Row t averages the t-th of r nearly equal segments, which hold m // r or one more key each.

    Every weight is positive or zero and each row sums to 1. It is the pooling that the paper names
    beside learned projections (section 4).

    Parameters
    ----------
    r, m : int
        1 <= r <= m.

    Returns
    -------
    array (r, m) of float64

    Raises
    ------
    TypeError, ValueError
        A size that is no integer, or r > m.

    Examples
    --------
    >>> mean_pool(2, 4)
    array([[0.5, 0.5, 0. , 0. ],
           [0. , 0. , 0.5, 0.5]])
    """
    r, m = _sizes(r, m)
    cuts = np.arange(r + 1) * m // r  # segment t is cuts[t] .. cuts[t + 1] - 1
    j = np.arange(m)
    inside = (cuts[:-1, None] <= j) & (j < cuts[1:, None])  # (r, m)
    return inside / np.diff(cuts)[:, None]


def svd(x, r):
    r"""The rows are the first r left singular vectors of x, so they are orthonormal.

    .. math:: x = U S W^T, \qquad E = U_r^T, \qquad E^T E x = U_r S_r W_r^T

    which is the matrix of rank r nearest to x. It knows x: it is a bound on what a projection can
    keep of these keys or values, not a way to save work.

    Parameters
    ----------
    x : array (..., m, c)
        Keys or values.
    r : int
        1 <= r <= m; beyond the rank of x, further rows complete the basis.

    Returns
    -------
    array (..., r, m)
        In x's dtype. Each row is determined up to its sign where singular values differ.

    Raises
    ------
    TypeError, ValueError
        An x that is not real floating point, or r > m.

    Notes
    -----
    E^T E x is near x, but linformer's softmax is over E x: its r scores are not those of the m
    keys, so a small error in x does not make a small error in the output.

    References
    ----------
    Eckart and Young 1936, doi:10.1007/BF02288367.

    Examples
    --------
    >>> x = np.array([[3.0, 0.0], [0.0, 2.0], [4.0, 0.0]])
    >>> abs(svd(x, 1)).round(12)
    array([[0.6, 0. , 0.8]])
    """
    x = _matrix(x)
    m, c = x.shape[-2:]
    r = checks.whole("r", r, least=1, most=m)
    work = x.astype(checks.compute_dtype(x.dtype), copy=False)
    u = np.linalg.svd(work, full_matrices=r > min(m, c))[0]  # (..., m, >= r)
    return np.array(u[..., :r].mT, x.dtype)


def low_rank(x, rank):
    r"""The matrix of this rank that is nearest to x in the Frobenius and the spectral norm.

    .. math:: x = \sum_i s_i u_i w_i^T, \qquad x_{rank} = \sum_{i \le rank} s_i u_i w_i^T

    The chapter says that matrix factors of low rank replace the originals. Read of Q, K or V
    themselves, that is this function: attention on ``low_rank(k, rank)`` has scores of that rank.
    Linformer instead shortens the sequence. The error is the square root of the sum of the squares
    of the singular values left out.

    Parameters
    ----------
    x : array (..., m, c)
    rank : int
        1 <= rank <= min(m, c).

    Returns
    -------
    array (..., m, c)
        In x's dtype.

    Raises
    ------
    TypeError, ValueError
        An x that is not real floating point, or a rank above min(m, c).

    References
    ----------
    Eckart and Young 1936, doi:10.1007/BF02288367.

    Examples
    --------
    >>> low_rank(np.array([[3.0, 0.0], [0.0, 2.0]]), 1).round(12) + 0.0
    array([[3., 0.],
           [0., 0.]])
    """
    x = _matrix(x)
    rank = checks.whole("rank", rank, least=1, most=min(x.shape[-2:]))
    work = x.astype(checks.compute_dtype(x.dtype), copy=False)
    u, s, w = np.linalg.svd(work, full_matrices=False)
    kept = u[..., :rank] * s[..., None, :rank] @ w[..., :rank, :]  # (..., m, c)
    return kept.astype(x.dtype, copy=False)


def theorem_1_rank(n, eps):
    r"""Rank that approximates one column of P V within eps, by the proof of theorem 1.

    .. math:: k = \left\lceil \frac{5 \log n}{\epsilon^2 - \epsilon^3} \right\rceil

    The 5 is the paper's own constant, no Theta hides it. With it the proof's union bound over n
    rows allows failure with probability 2 n e^{-(eps^2 - eps^3) k / 4} = 2 n^{-1/4}, which says
    something only from n = 17 on. The matrix that the theorem speaks of is P R^T R with R
    ``gaussian(k, n)``: it exists, but to make it one needs P.

    Parameters
    ----------
    n : int >= 1
        Length of the sequence.
    eps : float
        Relative error, 0 < eps < 1.

    Returns
    -------
    int
        At least 1, and not capped at n: a k above n says that the theorem asks for full rank.

    Raises
    ------
    TypeError, ValueError
        An n that is no integer >= 1, an eps outside (0, 1).

    References
    ----------
    Wang et al. 2020, arXiv:2006.04768, theorem 1 and appendix A.

    Examples
    --------
    >>> theorem_1_rank(512, 0.5), theorem_1_rank(2**20, 0.5)
    (250, 555)
    """
    n, eps = checks.whole("n", n, least=1), _tolerance(eps)
    return max(1, math.ceil(5 * math.log(n) / (eps**2 - eps**3)))


def theorem_2_rank(n, d, eps):
    r"""The size of r in theorem 2, linear attention with E and F, with every Theta read as 1.

    .. math:: k = \min\left\{ \Theta\!\left(\frac{9 d \log d}{\epsilon^2}\right),
                  5\, \Theta\!\left(\frac{\log n}{\epsilon^2}\right) \right\}

    The 9 and the 5 stand in the paper, but beside a Theta, which hides a constant factor that is
    not given: this is how r grows, not a guarantee. The first term does not grow with n, whence
    linear cost; it is the smaller one only where log n > 1.8 d log d. The proof takes
    E = delta R and F = e^{-delta} R with R ``gaussian`` and a tiny delta: it shows that matrices
    exist, and is no recipe for good ones.

    Parameters
    ----------
    n : int >= 1
        Length of the sequence.
    d : int >= 1
        Columns of the keys. At d = 1 the first term is 0.
    eps : float
        Relative error, 0 < eps < 1.

    Returns
    -------
    int
        At least 1, and not capped at n.

    Raises
    ------
    TypeError, ValueError
        An n or d that is no integer >= 1, an eps outside (0, 1).

    References
    ----------
    Wang et al. 2020, arXiv:2006.04768, theorem 2 and appendix B.

    Examples
    --------
    >>> theorem_2_rank(512, 64, 0.5), theorem_2_rank(512, 2, 0.5)
    (125, 50)
    """
    n, d = checks.whole("n", n, least=1), checks.whole("d", d, least=1)
    eps = _tolerance(eps)
    return max(1, math.ceil(min(9 * d * math.log(d), 5 * math.log(n)) / eps**2))


def _sizes(r, m):
    m = checks.whole("m", m, least=0)
    return checks.whole("r", r, least=1, most=m), m


def _matrix(x):
    x = checks.floating("x", x)
    if x.ndim < 2:
        raise ValueError(f"x has shape {x.shape}; expected (..., m, c)")
    return x


def _tolerance(eps):
    eps = checks.number("eps", eps, positive=True)
    if eps >= 1:
        raise ValueError(f"eps is {eps}; expected 0 < eps < 1")
    return eps
