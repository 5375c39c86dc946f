"""fla-core, the operators of flash-linear-attention: the plain references that its Triton kernels
are tested with. They are read from their files, since importing the package needs Triton.
"""

import functools
import importlib.util
from pathlib import Path

import numpy as np
import pytest
from by_torch import with_gradients
from judge import draw, hold, logits

import refattn
from refattn.verify import check

torch = pytest.importorskip("torch", reason="torch is not installed (extra: outside)")
pytest.importorskip("einops", reason="einops is not installed (extra: outside)")
FOUND = importlib.util.find_spec("fla")
if FOUND is None:
    pytest.skip("fla-core is not installed (extra: outside)", allow_module_level=True)


def phi(x):
    """elu + 1, without the 1 that would round a small exp(x) away."""
    return torch.where(x > 0, x + 1, x.clamp(max=0).exp())


@functools.cache
def naive(name):
    """The module of references of one operator."""
    path = Path(FOUND.submodule_search_locations[0]) / "ops" / name / "naive.py"
    spec = importlib.util.spec_from_file_location(f"fla_naive_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def leaves(*arrays):
    return [torch.from_numpy(x).float().requires_grad_() for x in arrays]


# its length is a multiple of 64 in the form by chunks
SHAPES = {"cases": [(64, 64, 8, 8), (128, 128, 16, 8)]}


class TestByTheGrader:
    """like="fla": its layout, its windows, its scale on q and its 1e-10 in the denominator."""

    @pytest.mark.parametrize("normalize", [False, True])
    @pytest.mark.parametrize("form", ["naive_recurrent_linear_attn", "naive_chunk_linear_attn"])
    def test_linear_attention(self, form, normalize):
        def kernel(q, k, v):
            y = getattr(naive("linear_attn"), form)(phi(q), phi(k), v, normalize=normalize)
            return y[0] if isinstance(y, tuple) else y

        asked = {"causal": True, "normalize": normalize, "like": "fla", **SHAPES}
        report = check(kernel, "linear_attention", gradients=True, **asked)
        assert report.passed, report
        assert "faint keys" in {line.case for line in report.lines}  # where 1e-10 shows

    def test_the_epsilon_shows(self):
        """By refattn's own rule, which has none, the same kernel fails at faint keys alone."""

        def kernel(q, k, v):
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            y, _ = naive("linear_attn").naive_recurrent_linear_attn(
                phi(q), phi(k), v, normalize=True
            )
            return y.transpose(1, 2)

        asked = {"causal": True, "xp": "torch", "lead": (1, 2), **SHAPES}
        report = check(kernel, "linear_attention", **asked)
        assert {line.case for line in report.lines if line.trouble} == {"faint keys"}

    @pytest.mark.parametrize("window", [None, 1, 7])
    def test_attention(self, window):
        """A window of w has w keys, the query's own among them."""

        def kernel(q, k, v):
            return naive("attn").naive_parallel_attn(q, k, v, window_size=window)[0]

        name, told = ("softmax_attention", {}) if window is None else ("local_attention", {})
        told = {"causal": True} | ({} if window is None else {"window": window})
        report = check(kernel, name, like="fla", gradients=True, cases="square", **told)
        assert report.passed, report


def test_the_taylor_map():
    """Based: 1 + t + t^2 / 2 at t = q . k / sqrt(d), and 1e-6 in the denominator: the first of our
    features is 1, so that a state with z = (1e-6, 0, ...) is the same. By chunks too, whose
    features are sums over columns."""
    q, k, v, dy = draw(1, *[(2, 3, 64, 4)] * 4)
    inputs = leaves(q, k, v)
    whole = naive("based").naive_parallel_based(*inputs)
    chunked = naive("based").naive_chunk_based(*inputs, chunk_size=16)
    named = dict(zip("qkv", inputs, strict=True))
    got = with_gradients(whole, dy, **named)
    got |= {f"chunked {name}": x for name, x in with_gradients(chunked, dy, **named).items()}

    def ours(kind):
        args = [x.astype(kind) for x in (q / 2, k, v)]
        z = np.zeros(1 + 4 + 10, kind)
        z[0] = 1e-6
        told = {"feature_map": "taylor", "causal": True}
        told["initial_state"] = (np.zeros((15, 4), kind), z)
        y = refattn.linear_attention(*args, **told)
        dq, dk, dv, _ = refattn.linear_attention_vjp(dy.astype(kind), *args, **told)
        found = {"y": y, "dq": dq / 2, "dk": dk, "dv": dv}
        return found | {f"chunked {name}": x for name, x in found.items()}

    hold(got, ours, 15.0)


def test_retention():
    """Linear attention that forgets, as a feature map that knows its row: phi(q)_i = g^i q_i and
    phi(k)_j = g^-j k_j, g = 1 - 2^-5 of the first head, without a denominator."""
    q, k, v, dy = draw(2, *[(2, 1, 40, 4)] * 4)
    inputs = leaves(q, k, v)
    y = naive("retention").naive_retention(*inputs)
    rows = (1 - 2.0**-5) ** np.arange(40)[:, None]
    turned = lambda x: x * rows.astype(x.dtype)
    back = lambda x: x / rows.astype(x.dtype)
    decay = refattn.linear.FeatureMap(turned, back, lambda g, x: turned(g), lambda g, x: back(g))

    def ours(kind):
        args = [x.astype(kind) for x in (q / 2, k, v)]
        told = {"feature_map": decay, "causal": True, "normalize": False}
        dq, dk, dv = refattn.linear_attention_vjp(dy.astype(kind), *args, **told)
        return {"y": refattn.linear_attention(*args, **told), "dq": dq / 2, "dk": dk, "dv": dv}

    hold(with_gradients(y, dy, **dict(zip("qkv", inputs))), ours, 8.0)


@pytest.mark.parametrize("window", [None, 9])
def test_forgetting_attention(window):
    """Softmax attention with running sums of gates as bias, whose gradient is theirs."""
    q, k, v, dy, g = draw(3, *[(2, 40, 2, 8)] * 4, (2, 40, 2))
    g = -abs(g) / 4
    inputs = leaves(q, k, v, g)
    y = naive("forgetting_attn").naive_forgetting_attn(*inputs, window_size=window)
    named = dict(zip("qkvg", inputs, strict=True))
    got = with_gradients(y, dy, **named)

    def ours(kind):
        turn = lambda x: x.swapaxes(1, 2).astype(kind)
        total = np.cumsum(g.astype(kind), axis=1).swapaxes(1, 2)  # (b, h, n)
        args = [turn(x) for x in (q, k, v)]
        told = {"bias": total[..., :, None] - total[..., None, :]}
        told["mask"] = refattn.masks.local(40, (40 if window is None else window - 1, 0)).toarray()
        y = refattn.softmax_attention(*args, **told)
        *grads, dbias = refattn.softmax_attention_vjp(turn(dy), *args, **told)
        dtotal = dbias.sum(-1) - dbias.sum(-2)
        dg = np.cumsum(dtotal[..., ::-1], axis=-1)[..., ::-1]
        found = dict(zip(("y", "dq", "dk", "dv"), (turn(x) for x in (y, *grads)), strict=True))
        return found | {"dg": dg.swapaxes(1, 2)}

    hold(got, ours, logits(q, k, bias=abs(g).sum(1).max()))
