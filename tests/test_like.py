"""Kernels of other libraries, judged by their own conventions."""

import numpy as np
import pytest

from refattn.verify import check

torch = pytest.importorskip("torch", reason="torch is not installed (extra: model)")
sdpa = torch.nn.functional.scaled_dot_product_attention


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("causal", [False, True])
def test_torch_is_right_by_its_own_rules(dtype, causal):
    report = check(
        lambda q, k, v: sdpa(q, k, v, is_causal=causal),
        "softmax_attention",
        like="torch",
        dtype=dtype,
        causal=causal,
    )
    assert report.passed, report
    assert {line.case for line in report.lines} >= {"more keys", "fewer keys", "two tiles"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_torch_with_a_mask(dtype):
    mask = np.random.default_rng(0).random((13, 13)) < 0.6
    mask[:, 0] = True
    report = check(
        lambda q, k, v: sdpa(q, k, v, attn_mask=torch.from_numpy(mask)),
        "softmax_attention",
        like="torch",
        dtype=dtype,
        mask=mask,
    )
    assert report.passed, report


def test_the_missing_scale_is_named():
    report = check(
        lambda q, k, v: sdpa(q, k, v, scale=1.0), "softmax_attention", like="torch", title="sdpa"
    )
    assert not report.passed and report.diagnosis[0].startswith("scale missing: ")


def test_the_other_alignment_is_named():
    """Correct by refattn's rule, wrong by torch's."""

    def last_key(q, k, v):
        n, m = q.shape[-2], k.shape[-2]
        mask = torch.ones(n, m, dtype=torch.bool).tril(m - n)
        y = sdpa(q, k, v, attn_mask=mask)
        return torch.where(mask.any(-1)[:, None], y, torch.zeros_like(y))

    report = check(last_key, "softmax_attention", like="torch", causal=True)
    assert report.diagnosis[0].startswith("bottom-right alignment: ")
    right = check(
        lambda q, k, v: last_key(*(torch.from_numpy(x) for x in (q, k, v))).numpy(),
        "softmax_attention",
        causal=True,
    )
    assert right.passed, right


def test_what_is_no_tensor_or_of_another_shape_is_told():
    assert "has shape" in str(check(lambda q, k, v: v[0], "softmax_attention", like="torch"))
    assert "gave str" in str(check(lambda q, k, v: "y", "softmax_attention", like="torch"))
    assert "raised" in str(check(lambda q, k, v: q @ v, "softmax_attention", like="torch"))


def test_other_mechanisms_take_tensors_too():
    def window(q, k, v):
        i = torch.arange(q.shape[-2])[:, None] + (k.shape[-2] - q.shape[-2])
        mask = (torch.arange(k.shape[-2]) - i).abs() <= 3
        return torch.nan_to_num(sdpa(q, k, v, attn_mask=mask))

    assert check(window, "local_attention", like="torch", window=3).passed
