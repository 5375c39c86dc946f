"""Kernels of other software before the grader: it passes them, or names what they do otherwise."""

import warnings

import numpy as np
import pytest

import refattn
from refattn.verify import check, probe

torch = pytest.importorskip("torch", reason="torch is not installed (extra: outside)")
SIZES = {"like": "torch", "cases": [(16, 16, 8, 8), (48, 48, 8, 8)]}
OMEGA = refattn.random_features(16, 8, rng=0)


def package(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its imports: distutils, autocast
        return pytest.importorskip(name, reason=f"{name} is not installed (extra: outside)")


def favor(causal=False, **options):
    module = package("performer_pytorch.performer_pytorch")
    attend = module.causal_linear_attention_noncuda if causal else module.linear_attention

    def kernel(q, k, v):
        told = {"projection_matrix": torch.from_numpy(OMEGA).to(q.dtype), **options}
        features = (module.softmax_kernel(x, is_query=x is q, **told) for x in (q, k))
        return attend(*features, v)

    return kernel


def local(window=8, **options):
    attention = package("local_attention").LocalAttention
    return attention(window, use_rotary_pos_emb=False, **options)


def elu_plus_one(q, k, v):
    """As it is mostly written."""
    phi_q, phi_k = (torch.nn.functional.elu(x) + 1 for x in (q, k))
    return phi_q @ (phi_k.mT @ v) / (phi_q @ phi_k.sum(-2)[..., None])


def softmax_maps(q, k, v):
    return package("linear_attention_transformer.linear_attention_transformer").linear_attn(q, k, v)


def told(report):
    """The name of the known mistake, or what is found out about an unknown one."""
    assert not report.passed
    return (report.diagnosis or report.findings)[0]


class TestPasses:
    @pytest.mark.parametrize("causal", [False, True])
    def test_exact_windows_of_local_attention(self, causal):
        window = {"window": (8, 0 if causal else 8)}
        kernel = local(exact_windowsize=True, causal=causal)
        report = check(kernel, "local_attention", gradients=True, **window, **SIZES)
        assert report.passed, report

    def test_performer_without_its_epsilon_where_keys_are_near(self):
        """Two kinds of cases have large norms: there its one maximum for all features underflows,
        and the report says so."""
        report = check(favor(eps=0.0), "performer_attention", omega=OMEGA, **SIZES)
        failed = {line.case for line in report.lines if line.trouble}
        assert failed == {"large scores", "very far keys"}
        assert told(report).startswith("leak through a global maximum: ")


class TestNames:
    def test_the_epsilon_of_performer(self):
        report = check(favor(), "performer_attention", omega=OMEGA, **SIZES)
        assert told(report).startswith("epsilon in the features: 0.0001 is added")

    def test_the_one_of_elu(self):
        report = check(elu_plus_one, "linear_attention", **SIZES)
        failed = {line.case for line in report.lines if line.trouble}
        assert "faint keys" in failed and failed <= {"faint keys", "large scores"}
        assert told(report).startswith("one added after elu: ")

    def test_a_window_that_counts_from_the_other_end(self):
        kernel = local(exact_windowsize=True, causal=True)
        report = check(kernel, "local_attention", window=7, causal=True, **SIZES)
        assert told(report).startswith("window one long on the left: ")

    def test_a_factor(self):
        report = check(softmax_maps, "linear_attention", feature_map="softmax", **SIZES)
        assert "0.353553 times what is wanted, which is 1/sqrt(d)" in told(report)

    def test_a_last_row_that_sees_all(self):
        """ONNX Runtime's MultiHeadAttention with its causal flag."""
        pytest.importorskip("onnx", reason="onnx is not installed (extra: outside)")
        pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (extra: outside)")
        from test_onnx import by_runtime, packed

        def kernel(q, k, v):
            b, h, n, _ = q.shape
            inputs = {"query": packed(q), "key": packed(k), "value": packed(v)}
            asked = {"num_heads": h, "unidirectional": 1}
            y, *_ = by_runtime(
                "MultiHeadAttention", 21, inputs, ("output",), "com.microsoft", **asked
            )
            return np.ascontiguousarray(y.reshape(b, n, h, -1).swapaxes(1, 2))

        report = check(kernel, "softmax_attention", causal=True, like="onnx")
        assert told(report).startswith("last row unmasked: ")

    def test_later_keys_that_are_felt(self):
        """The probes need no reference: performer-pytorch's causal form changes with later keys."""
        report = probe(favor(causal=True), like="torch", causal=True)
        failed = {line.case for line in report.lines if line.trouble}
        assert {"later keys x 1e5", "prefix alone"} <= failed

        def ours(q, k, v):
            arrays = (x.numpy() for x in (q, k, v))
            return torch.from_numpy(refattn.performer_attention(*arrays, omega=OMEGA, causal=True))

        right = probe(ours, like="torch", causal=True)
        assert right.passed, right
