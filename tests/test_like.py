"""Kernels of other libraries, judged by their own conventions."""

import warnings

import numpy as np
import pytest

import refattn
from refattn.verify import check
from refattn.verify.like import CONVENTIONS, Reference

DTYPES = ["float32", "float64", "float16", "bfloat16"]


def mask_of(n=13, m=13):
    """Every kind of row, one with nothing to attend among them."""
    mask = np.random.default_rng(0).random((n, m)) < 0.6
    mask[2] = False
    return mask


class TestTorch:
    @pytest.fixture(autouse=True)
    def libraries(self):
        self.torch = pytest.importorskip("torch", reason="torch is not installed (extra: outside)")
        self.sdpa = self.torch.nn.functional.scaled_dot_product_attention

    @pytest.mark.parametrize("gradients", [False, True])
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("causal", [False, True])
    def test_sdpa(self, dtype, causal, gradients):
        report = check(
            lambda q, k, v: self.sdpa(q, k, v, is_causal=causal),
            "softmax_attention",
            like="torch",
            dtype=dtype,
            causal=causal,
            gradients=gradients,
        )
        assert report.passed, report
        assert {line.case for line in report.lines} >= {"more keys", "fewer keys", "two tiles"}

    @pytest.mark.parametrize("gradients", [False, True])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_sdpa_with_a_mask_and_a_bias(self, dtype, gradients):
        mask, bias = mask_of(), np.random.default_rng(1).standard_normal((13, 13))
        asked = {"like": "torch", "dtype": dtype, "gradients": gradients}
        report = check(
            lambda q, k, v: self.sdpa(q, k, v, attn_mask=self.torch.from_numpy(mask)),
            "softmax_attention",
            mask=mask,
            **asked,
        )
        assert report.passed, report
        report = check(
            lambda q, k, v: self.sdpa(q, k, v, attn_mask=self.torch.from_numpy(bias).to(q.dtype)),
            "softmax_attention",
            bias=bias,
            **asked,
        )
        assert report.passed, report

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_flex(self, dtype):
        """Eager: the compiled form needs a C++ compiler."""
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        def causal(b, h, i, j):
            return i >= j

        def window(b, h, i, j):
            return abs(i - j) <= 3

        def masked(rule):
            def run(q, k, v):
                block = create_block_mask(rule, None, None, q.shape[2], k.shape[2], device="cpu")
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # that it is slow when it is not compiled
                    return flex_attention(q, k, v, block_mask=block)

            return run

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            report = check(flex_attention, "softmax_attention", like="torch", dtype=dtype)
        assert report.passed, report
        asked = {"like": "torch", "dtype": dtype}
        report = check(masked(causal), "softmax_attention", causal=True, **asked)
        assert report.passed, report
        report = check(masked(window), "local_attention", window=3, **asked)
        assert report.passed, report

    def test_the_missing_scale_is_named(self):
        report = check(
            lambda q, k, v: self.sdpa(q, k, v, scale=1.0), "softmax_attention", like="torch"
        )
        assert not report.passed and report.diagnosis[0].startswith("scale missing: ")

    def test_the_other_alignment_is_named(self):
        """Correct by refattn's rule, wrong by torch's."""
        torch = self.torch

        def last_key(q, k, v):
            n, m = q.shape[-2], k.shape[-2]
            return self.sdpa(q, k, v, attn_mask=torch.ones(n, m, dtype=torch.bool).tril(m - n))

        report = check(last_key, "softmax_attention", like="torch", causal=True)
        assert report.diagnosis[0].startswith("bottom-right alignment: ")
        assert check(last_key, "softmax_attention", xp="torch", causal=True, lead=(1, 2)).passed

    def test_heads_in_the_other_order_are_named(self):
        report = check(
            lambda q, k, v: self.sdpa(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2),
            "softmax_attention",
            like="torch",
            cases="square",
        )
        assert report.diagnosis[0].startswith("heads and tokens swapped: ")

    def test_a_gradient_that_stops_is_named(self):
        def detached(q, k, v):
            return self.sdpa(q.detach(), k.detach(), v)

        report = check(detached, "softmax_attention", like="torch", gradients=True)
        assert [words.split(":")[0] for words in report.diagnosis] == ["weights detached"]
        none = check(
            lambda q, k, v: self.sdpa(q, k, v).detach(),
            "softmax_attention",
            like="torch",
            gradients=True,
        )
        assert "expected (dq, dk, dv), tracked from q, k and v to y" in str(none)

    def test_what_is_no_tensor_or_of_another_shape_is_told(self):
        def words(kernel):
            return str(check(kernel, "softmax_attention", like="torch"))

        assert "has shape (3, 13, 7), expected (2, 3, 13, 7)" in words(lambda q, k, v: v[0])
        assert "gave str, expected torch.Tensor" in words(lambda q, k, v: "y")
        assert "gave numpy.ndarray, expected torch.Tensor" in words(lambda q, k, v: v.numpy())
        assert "raised RuntimeError" in words(lambda q, k, v: q @ v)
        assert "gave float64, expected float32" in words(
            lambda q, k, v: self.sdpa(q, k, v).double()
        )
        assert "wrote to its input q" in words(lambda q, k, v: self.sdpa(q.mul_(1.0).add_(1), k, v))
        assert "on meta, expected one on cpu" in words(lambda q, k, v: v.to("meta"))

    def test_devices(self):
        report = check(self.sdpa, "softmax_attention", like="torch", device="cpu")
        assert report.passed, report
        with pytest.raises(ValueError, match="device is 'nowhere'"):
            check(self.sdpa, "softmax_attention", like="torch", device="nowhere")

    def test_a_gate_around_it_is_checked_where_the_alignments_agree(self):
        gate = np.array(0.5)
        asked = {"gate": gate, "causal": True, "like": "torch"}
        report = check(
            lambda q, k, v: 0.5 * self.sdpa(q, k, v, is_causal=True), "gated_attention", **asked
        )
        assert report.passed and "more keys" not in {line.case for line in report.lines}

    def test_tensors_that_numpy_cannot_hold(self):
        report = check(lambda q, k, v: v.to_sparse(), "softmax_attention", like="torch")
        assert "gave a tensor of torch.float32, torch.sparse_coo" in str(report)

    def test_strided_tensors(self):
        """A kernel may give a tensor that does not lie in order."""
        report = check(
            lambda q, k, v: self.sdpa(q, k, v).mT.contiguous().mT,
            "softmax_attention",
            like="torch",
            dtype="bfloat16",
        )
        assert report.passed, report


class TestJAX:
    @pytest.fixture(autouse=True)
    def libraries(self):
        self.jax = pytest.importorskip("jax", reason="jax is not installed (extra: outside)")
        self.attend = self.jax.nn.dot_product_attention

    @pytest.mark.parametrize("gradients", [False, True])
    @pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
    @pytest.mark.parametrize("causal", [False, True])
    def test_attention(self, dtype, causal, gradients):
        report = check(
            lambda q, k, v: self.attend(q, k, v, is_causal=causal),
            "softmax_attention",
            like="jax",
            dtype=dtype,
            causal=causal,
            gradients=gradients,
        )
        assert report.passed, report

    @pytest.mark.parametrize("gradients", [False, True])
    def test_a_row_with_nothing_to_attend_gives_the_mean(self, gradients):
        mask = mask_of()
        asked = {"mask": mask, "like": "jax", "gradients": gradients}
        kernel = lambda q, k, v: self.attend(q, k, v, mask=mask[None, None])
        report = check(kernel, "softmax_attention", **asked)
        assert report.passed, report

    @pytest.mark.parametrize("options", [{"window": 3}, {"window": (4, 0)}, {"window": (2, 5)}])
    def test_windows(self, options):
        for causal in (False, True):
            report = check(
                lambda q, k, v, c=causal: self.attend(
                    q, k, v, local_window_size=options["window"], is_causal=c
                ),
                "local_attention",
                like="jax",
                causal=causal,
                **options,
            )
            assert report.passed, report

    def test_the_softmax_is_float32_for_float64_too(self):
        """What the table's note says; the arrays keep their 64 bits."""
        report = check(self.attend, "softmax_attention", like="jax", dtype="float64")
        assert not report.passed
        assert max(line.error for line in report.lines if line.case == "two tiles") < 1e-6

        def own(q, k, v):
            s = self.jax.numpy.einsum("bnhd,bmhd->bhnm", q, k) / q.shape[-1] ** 0.5
            return self.jax.numpy.einsum("bhnm,bmhe->bnhe", self.jax.nn.softmax(s), v)

        asked = {"like": "jax", "dtype": "float64", "gradients": True}
        report = check(own, "softmax_attention", **asked)
        assert report.passed, report

    def test_devices(self):
        report = check(self.attend, "softmax_attention", like="jax", device="cpu")
        assert report.passed, report
        with pytest.raises(ValueError, match="device is 'nowhere'"):
            check(self.attend, "softmax_attention", like="jax", device="nowhere")

    def test_wrong_kernels_are_told(self):
        report = check(
            lambda q, k, v: self.attend(q, k, v, scale=1.0), "softmax_attention", like="jax"
        )
        assert report.diagnosis[0].startswith("scale missing: ")
        report = check(lambda q, k, v: np.asarray(v), "softmax_attention", like="jax")
        assert "gave numpy.ndarray, expected jax.Array" in str(report)


class TestOthers:
    """Libraries that are not installed: what their table entries do to the truth."""

    def test_a_window_that_counts_itself(self):
        """fla: w keys with the query's own, in (b, n, h, d)."""

        def kernel(q, k, v):
            q, k, v = (x.transpose(1, 2).numpy() for x in (q, k, v))
            y = refattn.local_attention(q, k, v, window=(3, 0))
            return torch.from_numpy(y).transpose(1, 2)

        torch = pytest.importorskip("torch")
        asked = {"window": 4, "causal": True, "like": "fla", "cases": "square"}
        assert check(kernel, "local_attention", **asked).passed
        report = check(kernel, "local_attention", **(asked | {"window": 3}))
        assert not report.passed
        with pytest.raises(ValueError, match="window is 0"):
            check(kernel, "local_attention", **(asked | {"window": 0}))

    @pytest.mark.parametrize("normalize", [True, False])
    def test_fla_scales_q_and_adds_its_epsilon(self, normalize):
        """Forward and gradient against num / (den + epsilon), written out and differenced."""
        reference = Reference("linear_attention", CONVENTIONS["fla"])
        rng = np.random.default_rng(0)
        q, k, v, dy = (rng.standard_normal((5, 4)) for _ in range(4))
        k -= 20  # where 1e-10 can be seen

        def written_out(q, k, v):
            phi_q, phi_k = (np.where(x > 0, x + 1, np.exp(x)) for x in (q, k))
            a = np.tril(phi_q @ phi_k.T) / 2
            return a @ v / (a.sum(axis=1, keepdims=True) + 1e-10 if normalize else 1)

        options = reference.translated({"causal": True, "normalize": normalize})
        y = reference.forward(q, k, v, **options)
        np.testing.assert_allclose(y, written_out(q, k, v), rtol=1e-12)
        plain = refattn.linear_attention(q, k, v, causal=True, normalize=normalize)
        assert abs(y - plain).max() > 1e-3 * abs(plain).max()
        grads = reference.vjp(dy, q, k, v, **options)
        for at, grad in enumerate(grads):
            for i, j in ((0, 0), (2, 3), (4, 1)):
                ends = []
                for h in (1e-6, -1e-6):
                    moved = [x.copy() for x in (q, k, v)]
                    moved[at][i, j] += h
                    ends.append((dy * written_out(*moved)).sum())
                slope = (ends[0] - ends[1]) / 2e-6
                assert abs(grad[i, j] - slope) <= 1e-6 * abs(grad).max()

    def test_a_row_that_is_nan(self):
        """xformers' reference."""
        y = Reference("softmax_attention", CONVENTIONS["xformers"]).forward(
            *np.ones((3, 3, 2)), mask=np.eye(3, k=-1, dtype=bool)
        )
        assert np.isnan(y[0]).all() and np.isfinite(y[1:]).all()

    def test_every_entry_says_what_it_is(self):
        for name, convention in CONVENTIONS.items():
            assert convention.causal in ("top-left", "bottom-right"), name
            assert convention.empty_row in ("0", "mean of v", "NaN"), name
            assert convention.layout in ("b h n d", "b n h d"), name
            assert convention.library and convention.release, name


def test_any_array_namespace():
    strict = pytest.importorskip("array_api_strict", reason="array-api-strict is not installed")

    def kernel(q, k, v):
        s = strict.matmul(q, strict.matrix_transpose(k)) / q.shape[-1] ** 0.5
        a = strict.exp(s - strict.max(s, axis=-1, keepdims=True))
        return strict.matmul(a / strict.sum(a, axis=-1, keepdims=True), v)

    for dtype in ("float32", "float64"):
        report = check(kernel, "softmax_attention", xp=strict, dtype=dtype)
        assert report.passed, report
    wrong = check(lambda q, k, v: np.zeros(3), "softmax_attention", xp=strict)
    assert "gave numpy.ndarray, expected array_api_strict.Array" in str(wrong)
    with pytest.raises(ValueError, match="has no bfloat16"):
        check(kernel, "softmax_attention", xp="array_api_strict", dtype="bfloat16")


def test_what_is_no_library():
    with pytest.raises(ValueError, match="xp is 'no_such_library', which cannot be imported"):
        check(len, "softmax_attention", xp="no_such_library")
    with pytest.raises(ValueError, match="it has no asarray"):
        check(len, "softmax_attention", xp="math")
    with pytest.raises(TypeError, match="xp is int"):
        check(len, "softmax_attention", xp=3)
    with pytest.raises(ValueError, match="like is 'abacus'"):
        check(len, "softmax_attention", like="abacus")
    with pytest.raises(ValueError, match="no automatic gradients"):
        check(refattn.softmax_attention, "softmax_attention", gradients=True)
