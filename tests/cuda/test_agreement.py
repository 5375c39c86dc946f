"""Every attention and its gradient on the CUDA kernels, in the simulator: what test_backends.py
asks of the compiled kernels on the CPU, on fewer and smaller cases."""

import numpy as np
import pytest

import test_backends
from cases import MECHANISMS, Shape, cases

SQUARE, UNEVEN = Shape(7, 7, 4, 5), Shape(5, 9, 3, 1)


def some(shapes, first=False):
    """The cases of these shapes; with ``first``, those of each mechanism's first options and of its
    first causal ones."""
    found = cases(shapes)
    if first:
        kept = {}
        for case in found:
            causal = "causal" in case.label
            kept.setdefault((case.mechanism.name, case.shape, causal), case)
        found = list(kept.values())
    return pytest.mark.parametrize("case", found, ids=str)


@some([SQUARE, UNEVEN])
def test_float32(case):
    test_backends.agrees(case, np.float32, "cuda")


@some([SQUARE], first=True)
def test_float64(case):
    test_backends.agrees(case, np.float64, "cuda")


@some([Shape(1, 1, 1, 1), Shape(1, 6, 3, 2), Shape(9, 5, 1, 2)], first=True)
def test_one_token_and_more_queries_than_keys(case):
    test_backends.agrees(case, np.float32, "cuda")


@some([Shape(70, 70, 3, 2), Shape(66, 131, 3, 2)], first=True)
def test_more_than_one_tile(case):
    test_backends.agrees(case, np.float32, "cuda")


@some([SQUARE])
def test_extreme_logits(case):
    extreme = type(case)(case.mechanism, case.label, case.shape, scale=1e4)
    test_backends.test_extreme_logits(extreme, "cuda")


@pytest.mark.real_tiles
@some([Shape(70, 70, 3, 2)], first=True)
def test_tiles_as_on_a_gpu(case):
    test_backends.agrees(case, np.float32, "cuda")


@some([SQUARE])
def test_a_key_that_is_nan(case):
    check = test_backends.test_a_poisoned_key_reaches_only_the_queries_that_see_it
    check(case, "cuda", np.nan)


@some([SQUARE], first=True)
def test_an_infinite_key(case):
    check = test_backends.test_a_poisoned_key_reaches_only_the_queries_that_see_it
    check(case, "cuda", np.inf)


@some([SQUARE])
def test_a_poisoned_query(case):
    check = test_backends.test_a_poisoned_query_reaches_only_the_keys_that_it_sees
    check(case, "cuda")


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0)])
@pytest.mark.parametrize("name", MECHANISMS)
def test_no_queries_no_keys_no_heads(name, shape):
    test_backends.test_no_queries_no_keys_no_heads(name, "cuda", shape)


@pytest.mark.parametrize("name", MECHANISMS)
def test_bad_input_is_refused_in_the_same_words(name):
    test_backends.test_bad_input_is_refused_in_the_same_words(name, "cuda")
