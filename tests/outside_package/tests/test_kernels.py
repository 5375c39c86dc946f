import outside_attention
import pytest

TAKES = ("causal", "scale")


def flags(case):
    return {name: x for name, x in case.options.items() if name in TAKES}


@pytest.mark.refattn(mechanism="softmax_attention", dtype=["float64", "float32"], takes=TAKES)
def test_attention(refattn_case):
    case = refattn_case
    case.assert_right(outside_attention.attention(case.q, case.k, case.v, **flags(case)))


@pytest.mark.refattn(mechanism="softmax_attention", dtype="float16", takes=TAKES, gradients=True)
def test_gradients(refattn_case):
    case = refattn_case
    dq, dk, dv = outside_attention.gradients(case.dy, case.q, case.k, case.v, **flags(case))
    case.assert_gradients(dq=dq, dk=dk, dv=dv)


@pytest.mark.refattn(mechanism="softmax_attention", dtype="float32", takes=TAKES)
def test_top_left(refattn_case):
    case = refattn_case
    case.check(y=outside_attention.top_left(case.q, case.k, case.v, **flags(case)))
