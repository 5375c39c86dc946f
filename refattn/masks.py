"""Boolean masks as ``scipy.sparse.csr_array``: True at (i, j) lets query i attend to key j.

Each is built from index arithmetic in O(nnz) and never passes through a dense n x n array.
``union`` and ``intersection`` compose them; ``mask.toarray()`` shows a small one;
``np.diff(mask.indptr)`` counts each query's keys.
"""

from collections.abc import Iterable

import numpy as np
import scipy

from refattn import checks


def union(*masks):
    """Pairs that are in any of the masks.

    >>> union(local(4, 0), global_tokens(4, [0])).toarray().astype(int)
    array([[1, 1, 1, 1],
           [1, 1, 0, 0],
           [1, 0, 1, 0],
           [1, 0, 0, 1]])
    """
    first, *rest = _same_shape("union", masks)
    for mask in rest:
        first = first.maximum(mask)
    return first.copy()


def intersection(*masks):
    """Pairs that are in all of the masks.

    >>> intersection(local(3, 1), causal(3)).toarray().astype(int)
    array([[1, 0, 0],
           [1, 1, 0],
           [0, 1, 1]])
    """
    first, *rest = _same_shape("intersection", masks)
    for mask in rest:
        first = first.multiply(mask).tocsr()
    return first.copy()


def local(n, window, *, m=None, causal=False, dilation=1):
    """The window of ``local_attention``: -left <= t <= right around position i + (m - n).

    Row count: left + right + 1 away from the ends. Beltagy et al. 2020, arXiv:2004.05150.

    >>> np.diff(local(6, (1, 2)).indptr)
    array([3, 4, 4, 4, 3, 2], dtype=int32)
    """
    n, m = _sizes(n, m)
    first, count = window_keys(n, m, window, causal, dilation)
    return _progressions(first, count, min(dilation, n + m + 1), m)


def dilated(n, window, dilation, *, m=None, causal=False):
    """A window with gaps: ``local`` with every ``dilation``-th key.

    >>> dilated(5, 1, 2).toarray().astype(int)[2]
    array([1, 0, 1, 0, 1])
    """
    return local(n, window, m=m, causal=causal, dilation=dilation)


def causal(n, m=None):
    """Keys j <= i + (m - n): bottom-right aligned, the last query sees the last key.

    >>> causal(2, 3).toarray().astype(int)
    array([[1, 1, 0],
           [1, 1, 1]])
    """
    n, m = _sizes(n, m)
    return _spans(np.zeros(n, int), np.arange(n) + (m - n) + 1, 1, m)


def strided(n, stride, *, causal=False):
    """The last ``stride`` positions, and every ``stride``-th one counted from the query.

    Both of the Sparse Transformer's strided heads in one: i - j <= stride, or stride | i - j.
    ``causal`` is the paper's form; else both directions. Row count O(stride + n / stride), least
    near stride = sqrt(n / 2). Child et al. 2019, arXiv:1904.10509, section 4.3.

    >>> strided(6, 2, causal=True).toarray().astype(int)[5]
    array([0, 1, 0, 1, 1, 1])
    """
    n, _ = _sizes(n)
    stride = min(checks.whole("stride", stride, least=1), n + 1)  # more changes nothing
    i = np.arange(n)
    stop = i + 1 if checks.flag("causal", causal) else np.full(n, n)
    return union(local(n, stride, causal=causal), _spans(i % stride, stop, stride, n))


def fixed(n, block, *, summary=1, causal=False):
    """The query's own block, and the last ``summary`` positions of every block.

    Both of the Sparse Transformer's fixed heads in one; ``causal`` is the paper's form. Row count
    O(block + summary n / block). Child et al. 2019, arXiv:1904.10509, section 4.3.

    >>> fixed(6, 3, causal=True).toarray().astype(int)[4]
    array([0, 0, 1, 1, 1, 0])
    """
    n, _ = _sizes(n)
    block = checks.whole("block", block, least=1)
    summary = checks.whole("summary", summary, least=1, most=block)
    summary, block = min(summary, n + 1), min(block, n + 1)
    i = np.arange(n)
    stop = i + 1 if checks.flag("causal", causal) else np.full(n, n)
    start = i // block * block
    own = _spans(start, np.minimum(stop, start + block), 1, n)
    ends = range(block - summary, block)
    return union(own, *(_spans(np.full(n, end), stop, block, n) for end in ends))


def global_tokens(n, tokens):
    """The rows and the columns of these tokens: they see all, and all see them.

    >>> global_tokens(3, [1]).toarray().astype(int)
    array([[0, 1, 0],
           [1, 1, 1],
           [0, 1, 0]])
    """
    n, _ = _sizes(n)
    if not isinstance(tokens, Iterable):
        raise TypeError(f"tokens is {tokens!r}; expected a list of positions")
    tokens = [checks.whole("a position in tokens", t, least=0, most=n - 1) for t in tokens]
    chosen = np.zeros(n, bool)
    chosen[tokens] = True
    rows = _spans(np.zeros(n, int), np.where(chosen, n, 0), 1, n)
    return union(rows, _rows(np.tile(np.flatnonzero(chosen), (n, 1)), n))


def random(n, keys, *, rng, m=None):
    """``keys`` different keys for each query, uniformly at random.

    rng: a numpy Generator or an integer seed. Zaheer et al. 2020, arXiv:2007.14062, section 2.

    >>> np.diff(random(4, 3, rng=0, m=8).indptr)
    array([3, 3, 3, 3], dtype=int32)
    """
    n, m = _sizes(n, m)
    keys = checks.whole("keys", keys, least=0, most=m)
    rng = checks.generator(rng)
    chosen = [np.sort(rng.choice(m, keys, replace=False, shuffle=False)) for _ in range(n)]
    return _rows(np.array(chosen, int).reshape(n, keys), m)


def block_diagonal(n, block):
    """The query's own block; the last may be short.

    >>> block_diagonal(3, 2).toarray().astype(int)
    array([[1, 1, 0],
           [1, 1, 0],
           [0, 0, 1]])
    """
    n, _ = _sizes(n)
    block = min(checks.whole("block", block, least=1), n + 1)
    start = np.arange(n) // block * block
    return _spans(start, start + block, 1, n)


def block_causal(n, block):
    """The query's own block, whole, and all blocks before it.

    >>> block_causal(3, 2).toarray().astype(int)
    array([[1, 1, 0],
           [1, 1, 0],
           [1, 1, 1]])
    """
    n, _ = _sizes(n)
    block = min(checks.whole("block", block, least=1), n + 1)
    return _spans(np.zeros(n, int), (np.arange(n) // block + 1) * block, 1, n)


def hierarchical(n, b, causal=False):
    """Near keys one by one, far keys by representatives of ever larger blocks.

    Key j is a level-l representative when b^l divides j + 1. Query i attends to j when, at a level
    l = 0 .. L-1, j is a representative of level l in i's block of b^(l+1) positions;
    L = max(1, ceil(log_b n)). At most L (b - 1) + 1 keys a query, and exactly that for every query
    when n = b^L: O(n log n) pairs at fixed b.

    A short last block has no representative. At n = 126, b = 5 the last key is seen by itself
    alone.

    >>> hierarchical(9, 3).toarray().astype(int)[0]
    array([1, 1, 1, 0, 0, 1, 0, 0, 1])
    """
    n, _ = _sizes(n)
    b = min(checks.whole("b", b, least=2), n + 2)
    i = np.arange(n)
    stop = i + 1 if checks.flag("causal", causal) else np.full(n, n)
    levels, size = [], 1
    while not levels or size < n:
        start = i // (size * b) * (size * b)
        levels.append(_spans(start + size - 1, np.minimum(start + size * b, stop), size, n))
        size *= b
    return union(*levels)


def longformer(n, window, tokens, *, dilation=1):
    """A local window and global tokens. Beltagy et al. 2020, arXiv:2004.05150, section 3.1.

    >>> longformer(5, 1, [0]).toarray().astype(int)[3]
    array([1, 0, 1, 1, 1])
    """
    return union(local(n, window, dilation=dilation), global_tokens(n, tokens))


def bigbird(n, block, *, window=1, global_blocks=2, random_blocks=3, rng):
    """Local, global and random attention on blocks of ``block`` positions.

    window: blocks to each side; global_blocks: the first blocks, which see all and are seen by
    all; random_blocks: further draws for each row of blocks (some may fall on blocks that are
    already seen). The defaults are the paper's, and need at least 3 blocks. Zaheer et al. 2020,
    arXiv:2007.14062, appendix D.

    >>> bigbird(8, 2, window=0, global_blocks=1, random_blocks=0, rng=0).toarray().astype(int)[5]
    array([1, 1, 0, 0, 1, 1, 0, 0])
    """
    n, _ = _sizes(n)
    block = checks.whole("block", block, least=1)
    blocks = -(-n // block)
    global_blocks = checks.whole("global_blocks", global_blocks, least=0, most=blocks)
    random_blocks = checks.whole("random_blocks", random_blocks, least=0, most=blocks)
    pattern = union(
        local(blocks, window),
        global_tokens(blocks, range(global_blocks)),
        random(blocks, random_blocks, rng=rng),
    )
    return expand_blocks(pattern, block, n)


def expand_blocks(pattern, block, n, m=None):
    """Each pair of blocks becomes block x block pairs of positions, cut off at (n, m).

    >>> import scipy
    >>> expand_blocks(scipy.sparse.csr_array(np.eye(2, dtype=bool)), 2, 3).toarray().astype(int)
    array([[1, 1, 0],
           [1, 1, 0],
           [0, 0, 1]])
    """
    n, m = _sizes(n, m)
    block = checks.whole("block", block, least=1)
    pattern = checks.csr_mask(pattern, -(-n // block), -(-m // block))
    whole = scipy.sparse.kron(pattern, np.ones((block, block), bool), format="csr")
    return scipy.sparse.csr_array(whole[:n, :m]).astype(bool)


def window_keys(n, m, window, causal=False, dilation=1):
    """First key and number of keys that each query's window holds: two arrays (n,).

    >>> window_keys(3, 5, (1, 0))
    (array([1, 2, 3]), array([2, 2, 2]))
    """
    left, right, dilation = reach(n, m, window, causal, dilation)
    i = np.arange(n) + (m - n)
    low = np.maximum(-left, -(i // dilation))  # smallest t with i + t * dilation >= 0
    high = np.minimum(right, (m - 1 - i) // dilation)
    return i + low * dilation, np.maximum(0, high - low + 1)


def reach(n, m, window, causal, dilation):
    """left, right and dilation, no larger than matters for n queries and m keys.

    >>> reach(3, 5, 10**30, True, 2)
    (8, 0, 2)
    """
    left, right = (min(side, n + m) for side in checks.window(window, causal))
    return left, right, min(checks.whole("dilation", dilation, least=1), n + m + 1)


def _sizes(n, m=None):
    n = checks.whole("n", n, least=0)
    return n, n if m is None else checks.whole("m", m, least=0)


def _same_shape(name, masks):
    if not masks:
        raise ValueError(f"{name} came without masks; expected at least one")
    shape = masks[0].shape if scipy.sparse.issparse(masks[0]) else (0, 0)
    return [checks.csr_mask(mask, *shape[-2:]) for mask in masks]


def _spans(start, stop, step, m):
    """Row i holds start_i, start_i + step, ... below both stop_i and m."""
    count = np.maximum(0, -(-(np.minimum(stop, m) - start) // step))
    return _progressions(start, count, step, m)


def _progressions(first, count, step, m):
    """Row i holds count_i columns: first_i, first_i + step, ..."""
    start = np.concatenate(([0], np.cumsum(count)))
    place = np.arange(start[-1]) - np.repeat(start[:-1], count)  # 0, 1, 2, ... in each row
    return _csr(np.repeat(first, count) + step * place, start, m)


def _rows(columns, m):
    """Row i holds the sorted columns[i], an array (n, keys)."""
    n, keys = columns.shape
    return _csr(columns.ravel(), np.arange(n + 1) * keys, m)


def _csr(indices, indptr, m):
    """A canonical mask of stored Trues, with 4-byte indices wherever they suffice."""
    index = np.int32 if max(indptr[-1], m) < 2**31 else np.int64
    parts = np.ones(len(indices), bool), indices.astype(index), indptr.astype(index)
    return scipy.sparse.csr_array(parts, shape=(len(indptr) - 1, m))
