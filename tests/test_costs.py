"""Costs are counted: the definitions run on numbers that count, and the formulas must agree."""

import tracemalloc

import numpy as np
import pytest

import refattn
from cases import LONG, MECHANISMS, SHAPES, Case, Shape, arrays_in, cases, options_in
from definitions.numbers import Counted
from numbers_of import run
from refattn.cost import Cost, causal_pairs


def counted_flops(case, extra=None):
    q, k, v, options = case.build()
    Counted.flops = 0
    definition = case.mechanism.counted or case.mechanism.definition
    run(definition, q, k, v, {**options, **(extra or {})}, Counted)
    return Counted.flops


@pytest.mark.parametrize("case", cases(SHAPES + LONG), ids=str)
def test_flops_equal_the_count(case):
    options = case.build()[3]
    cost = case.mechanism.cost(*case.shape, **case.mechanism.cost_sizes(options, case.shape))
    assert isinstance(cost, Cost)
    assert all(isinstance(part, int) for part in (cost.flops, cost.bytes, cost.workspace))
    assert cost.flops == counted_flops(case)


@pytest.mark.parametrize("label", MECHANISMS["softmax_attention"].options)
def test_flops_of_the_log_sum_exp(label):
    case = Case(MECHANISMS["softmax_attention"], label, Shape(5, 4, 3, 2))
    sizes = case.mechanism.cost_sizes(case.build()[3], case.shape)
    cost = refattn.softmax_attention_cost(5, 4, 3, 2, **sizes, return_lse=True)
    assert cost.flops == counted_flops(case, {"return_lse": True})


@pytest.mark.parametrize("itemsize", [4, 8])
@pytest.mark.parametrize("case", cases([(7, 7, 4, 5), (5, 9, 3, 1)]), ids=str)
def test_bytes_are_those_of_the_arrays(case, itemsize):
    """Inputs once, outputs once: the sizes that NumPy and SciPy themselves report."""
    dtype = {4: np.float32, 8: np.float64}[itemsize]
    q, k, v, options = case.build()
    options = options_in(options, dtype)
    arrays = [x.astype(dtype) for x in (q, k, v)]
    arrays.append(case.mechanism.attention(*arrays, **options))
    arrays += arrays_in(options)
    sizes = case.mechanism.cost_sizes(options, case.shape)
    cost = case.mechanism.cost(*case.shape, **sizes, itemsize=itemsize)
    unread = case.mechanism.unread(options, case.shape, itemsize)
    assert cost.bytes == sum(x.nbytes for x in arrays) - unread


def peak_bytes(function):
    """Peak of NumPy's allocations during one call, less what it returns."""
    function()  # imports and caches
    tracemalloc.start()
    result = function()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak - result.nbytes


@pytest.mark.parametrize("n", [256, 1024])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("softmax_attention", {}),
        ("local_attention", {"window": 40}),
        ("local_attention", {"window": 40, "dilation": 2}),
        ("sparse_attention", {"mask": 40}),
    ],
)
def test_workspace_is_what_is_allocated(name, options, n):
    """Between one and eight times the count: NumPy does not write every step over its input."""
    if "mask" in options:
        options = {"mask": refattn.masks.local(n, options["mask"])}
    q = k = v = np.ones((n, 16), np.float32)
    sizes = MECHANISMS[name].cost_sizes(options, Shape(n, n, 16, 16))
    counted = MECHANISMS[name].cost(n, n, 16, 16, **sizes).workspace
    peak = peak_bytes(lambda: MECHANISMS[name].attention(q, k, v, **options))
    assert counted <= peak <= 8 * counted + 20_000


def test_local_workspace_does_not_grow_with_n():
    peaks = []
    for n in (1024, 8192):
        q = k = v = np.ones((n, 16), np.float32)
        peaks.append(peak_bytes(lambda x=q, y=k, z=v: refattn.local_attention(x, y, z, window=40)))
    assert peaks[1] <= 1.1 * peaks[0]
    first, second = (refattn.local_attention_cost(n, n, 16, 16, window=40) for n in (1024, 8192))
    assert first.workspace == second.workspace
    assert second.flops < 8.2 * first.flops  # a little over 8: fewer windows are cut off


@pytest.mark.parametrize(("n", "m"), [(1, 1), (5, 5), (3, 7), (7, 3), (0, 4), (4, 0)])
def test_causal_pairs(n, m):
    assert causal_pairs(n, m) == sum(j <= i + m - n for i in range(n) for j in range(m))


def test_bytes_and_workspace_by_hand():
    """n = 5, m = 4, d = 3, e = 2: 15 + 12 + 8 + 10 = 45 numbers in and out, 20 scores."""
    sizes = 5, 4, 3, 2
    cost = refattn.softmax_attention_cost
    plain = cost(*sizes)
    assert (plain.bytes, plain.workspace) == (4 * 45, 4 * 20)
    assert cost(*sizes, return_lse=True).bytes == 4 * (45 + 5)
    assert cost(*sizes, nnz=7).bytes == 4 * 45 + 20  # a boolean mask
    assert cost(*sizes, nnz=7, mask=False, bias=True).bytes == 4 * (45 + 20)
    half = cost(*sizes, return_lse=True, itemsize=2)
    assert (half.bytes, half.workspace) == (2 * 45 + 4 * 5, 4 * 20)  # arithmetic in float32
    double = cost(*sizes, itemsize=8)
    assert (double.bytes, double.workspace) == (8 * 45, 8 * 20)
    local = refattn.local_attention_cost
    assert local(200, 200, 3, 2, window=(2, 3)).workspace == 4 * 64 * (6 + 63)
    assert local(200, 200, 3, 2, window=100, dilation=10).workspace == 4 * 64 * 20
    assert local(5, 5, 3, 2, window=1).workspace == 4 * 5 * 5
    assert refattn.sparse_attention_cost(5, 4, 3, 2, nnz=7).workspace == 4 * (7 + 7 * 2 * 3)
    assert refattn.sparse_attention_cost(99, 99, 3, 2, nnz=5000).workspace == 4 * (5000 + 6144)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: refattn.softmax_attention_cost(-1, 1, 1, 1), ValueError),
        (lambda: refattn.softmax_attention_cost(1, 2.5, 1, 1), TypeError),
        (lambda: refattn.softmax_attention_cost(2, 2, 1, 1, nnz=5), ValueError),
        (lambda: refattn.softmax_attention_cost(2, 2, 1, 1, nnz=1.5), TypeError),
        (lambda: refattn.softmax_attention_cost(2, 2, 1, 1, bias=np.ones(2)), TypeError),
        (lambda: refattn.softmax_attention_cost(2, 2, 1, 1, causal=1), TypeError),
        (lambda: refattn.sparse_attention_cost(2, 2, 1, 1, nnz=-1), ValueError),
        (lambda: refattn.local_attention_cost(2, 2, 0, 1, window=1), ValueError),
        (lambda: refattn.linear_attention_cost(2, 2, 1, 1, key_mask=3), ValueError),
        (lambda: refattn.performer_attention_cost(2, 2, 1, 1, num_features=0), ValueError),
    ],
)
def test_costs_refuse_sizes_that_cannot_be(call, error):
    with pytest.raises(error):
        call()


def test_counts_from_arrays_do_not_overflow():
    mask = refattn.masks.local(20_000, 100)
    cost = refattn.sparse_attention_cost(20_000, 20_000, 512, 512, nnz=mask.indptr[-1])
    assert isinstance(cost.flops, int) and cost.flops == mask.nnz * (4 * 512 + 6)


def test_intensity():
    assert Cost(flops=8, bytes=4, workspace=0).intensity == 2
