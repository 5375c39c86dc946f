"""Phil Wang's PyTorch packages: local-attention, performer-pytorch, linformer,
linear-attention-transformer, h-transformer-1d; and where each leaves its paper, shown exactly."""

import warnings

import numpy as np
import pytest
from by_torch import Given, leaves, with_gradients
from judge import draw, hold, logits

import refattn
from refattn.linear.feature_maps import softmax_over_features, softmax_over_features_vjp

torch = pytest.importorskip("torch", reason="torch is not installed (extra: outside)")
BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
FeatureMap = refattn.linear.FeatureMap


def package(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its imports: distutils, autocast
        return pytest.importorskip(name, reason=f"{name} is not installed (extra: outside)")


def ours(name, dy, q, k, v, **options):
    """Outputs and gradients of one of refattn's attentions, for ``hold``."""

    def run(kind):
        cast = lambda x: x.astype(kind) if isinstance(x, np.ndarray) and x.dtype == float else x
        args, told = [cast(x) for x in (q, k, v)], {n: cast(x) for n, x in options.items()}
        y = getattr(refattn, name)(*args, **told)
        grads = getattr(refattn, f"{name}_vjp")(cast(dy), *args, **told)
        return {"y": y, **dict(zip(("dq", "dk", "dv", "dE", "dF"), grads, strict=False))}

    return run


class TestLocalAttention:
    """local-attention: buckets that look around, and exact windows inside them."""

    def attend(self, dtype, arrays, mask=None, window=8, **options):
        local = package("local_attention").LocalAttention(
            window, use_rotary_pos_emb=False, **options
        )
        *inputs, dy = arrays
        q, k, v = leaves(dtype, *inputs)
        y = local(q, k, v, mask=None if mask is None else torch.from_numpy(mask))
        return with_gradients(y, dy, q=q, k=k, v=v)

    arrays = draw(1, *[(2, 3, 64, 8)] * 4)

    @BOTH
    @pytest.mark.parametrize(
        ("options", "window"),
        [
            ({}, (8, 8)),
            ({"look_backward": 2, "look_forward": 1}, (16, 8)),
            ({"causal": True}, (8, 0)),
            ({"causal": True, "look_backward": 3}, (24, 0)),
        ],
    )
    def test_exact_windows(self, options, window, dtype):
        """An exact window of w looks at w keys each way beside the query's own."""
        q, k, v, dy = self.arrays
        got = self.attend(dtype, self.arrays, exact_windowsize=True, **options)
        hold(got, ours("local_attention", dy, q, k, v, window=window), logits(q, k))

    @BOTH
    @pytest.mark.parametrize("causal", [False, True])
    def test_buckets(self, causal, dtype):
        """Without the exact window a query sees all of its bucket and of the next ones: a mask of
        blocks, causal inside."""
        q, k, v, dy = self.arrays
        masks = refattn.masks
        mask = masks.expand_blocks(masks.local(8, (1, 0 if causal else 1)), 8, 64)
        mask = masks.intersection(mask, masks.causal(64)) if causal else mask
        got = self.attend(dtype, self.arrays, causal=causal)
        hold(got, ours("sparse_attention", dy, q, k, v, mask=mask), logits(q, k))

    @BOTH
    def test_a_key_mask(self, dtype):
        q, k, v, dy = self.arrays
        seen = np.random.default_rng(1).random((2, 64)) < 0.7
        near = refattn.masks.local(64, 8).toarray() & seen[:, None, None, :]
        assert near.any(-1).all()
        got = self.attend(dtype, self.arrays, seen, exact_windowsize=True)
        hold(got, ours("softmax_attention", dy, q, k, v, mask=near), logits(q, k))

    def test_a_row_with_nothing_to_attend_averages_its_padding_too(self):
        """It gets the mean of its three buckets, in which places outside the sequence hold -1:
        refattn gives 0."""
        got = self.attend(torch.float64, self.arrays, np.zeros((2, 64), bool))["y"]
        v = self.arrays[2]
        edge = (v[:, :, :16].sum(2) - 8) / 24
        inner = v[:, :, :24].mean(2)
        for row, mean in ((0, edge), (8, inner)):
            error = abs(got[:, :, row].detach().numpy() - mean).max()
            assert error <= 24 * np.finfo(float).eps * abs(v).max()


class TestPerformer:
    """performer-pytorch: FAVOR+ with an epsilon on every feature."""

    arrays = draw(2, *[(2, 3, 40, 8)] * 4)
    omega = draw(3, (16, 8))[0]

    def features(self, x, is_query, dtype, **options):
        kernel = package("performer_pytorch.performer_pytorch").softmax_kernel
        omega = torch.from_numpy(self.omega).to(dtype)
        return kernel(x, projection_matrix=omega, is_query=is_query, **options)

    def attend(self, dtype, causal=False, **options):
        module = package("performer_pytorch.performer_pytorch")
        *inputs, dy = self.arrays
        q, k, v = leaves(dtype, *inputs)
        phi_q, phi_k = (
            self.features(q, True, dtype, **options),
            self.features(k, False, dtype, **options),
        )
        attend = module.causal_linear_attention_noncuda if causal else module.linear_attention
        return with_gradients(attend(phi_q, phi_k, v), dy, q=q, k=k, v=v)

    @property
    def size(self):
        """The largest exponents of a query and of a key together."""
        q, k, *_ = self.arrays
        root = q.shape[-1] ** -0.25
        top = [abs(root * x @ self.omega.T).max() + root**2 * (x**2).sum(-1).max() for x in (q, k)]
        return 1 + sum(top)

    @BOTH
    def test_without_the_epsilon_it_is_our_positive_kind(self, dtype):
        """Its maxima are over all keys and features, refattn's over keys for each feature: both
        cancel."""
        q, k, v, dy = self.arrays
        got = self.attend(dtype, eps=0.0)
        hold(got, ours("performer_attention", dy, q, k, v, omega=self.omega), self.size)

    @BOTH
    @pytest.mark.parametrize("causal", [False, True])
    def test_with_its_epsilons(self, causal, dtype):
        """Every feature gets 1e-4 after its maximum was taken off; causally, the denominator
        1e-6 sum_r phi(q)_r: linear attention over other features and from another start."""
        q, k, v, dy = self.arrays
        got = self.attend(dtype, causal)
        root = q.shape[-1] ** -0.25

        def run(kind):
            x, y, omega = (root * q).astype(kind), (root * k).astype(kind), self.omega.astype(kind)
            raised = []
            for z, over in ((x, -1), (y, (-1, -2))):
                t = z @ omega.T
                top = t.max(axis=over, keepdims=True)
                raised.append(np.exp(t - (z * z).sum(-1, keepdims=True) / 2 - top) + kind(1e-4))
            z = np.full(16, 1e-6 * 4, kind)  # its features are 1/sqrt(16) of these
            start = np.zeros((16, 8), kind), z
            bare = FeatureMap(refattn.linear.identity, refattn.linear.identity)
            return {
                "y": refattn.linear_attention(
                    *raised,
                    v.astype(kind),
                    feature_map=bare,
                    causal=causal,
                    initial_state=start if causal else None,
                )
            }

        hold({"y": got["y"]}, run, self.size)
        plain = refattn.performer_attention(q, k, v, omega=self.omega, causal=causal)
        assert abs(got["y"].detach().numpy() - plain).max() > 1e-4 * abs(plain).max()

    def test_a_later_key_changes_the_causal_output(self):
        """The maximum is over the whole sequence: beside a large last key all others' features are
        the epsilon alone, and rows before it become means of the values so far. refattn's do not
        change."""
        module = package("performer_pytorch.performer_pytorch")
        q, k, v, _ = (x[:1, :1] for x in self.arrays)
        large = k.copy()
        large[:, :, -1] = 30 * self.omega[0] / np.linalg.norm(self.omega[0])
        phi_q = self.features(torch.from_numpy(q), True, torch.float64)
        phi_k = self.features(torch.from_numpy(large), False, torch.float64)
        y = module.causal_linear_attention_noncuda(phi_q, phi_k, torch.from_numpy(v)).numpy()
        # features of 1e-4 / 4 against the denominator's own 1e-6
        counts = np.arange(1, 40)[:, None] + 1e-6 / (1e-4 / 4)
        means = np.cumsum(v[0, 0, :-1], axis=0) / counts
        root = 8**-0.25
        top = root * (large[0, 0, -1] @ self.omega[0])
        left = np.exp(root * (k[0, 0, :-1] @ self.omega.T).max() - top) / 1e-4
        assert left < 1e-12
        error = abs(y[0, 0, :-1] - means).max()
        assert error <= (2 * left + 64 * np.finfo(float).eps) * abs(v).max()
        asked = {"omega": self.omega, "causal": True}
        before, after = (refattn.performer_attention(q, x, v, **asked) for x in (k, large))
        np.testing.assert_array_equal(before[:, :, :-1], after[:, :, :-1])

    @BOTH
    def test_generalised_attention_is_linear_attention_of_relu(self, dtype):
        module = package("performer_pytorch.performer_pytorch")
        *inputs, dy = self.arrays
        q, k, v = leaves(dtype, *inputs)
        # both signs of each column, so that no query is left without a key
        sign = torch.cat([torch.eye(8), -torch.eye(8)]).to(dtype)
        phi = [
            module.generalized_kernel(x, projection_matrix=sign, kernel_epsilon=0.0) for x in (q, k)
        ]
        got = with_gradients(module.linear_attention(*phi, v), dy, q=q, k=k, v=v)
        both = lambda x: np.concatenate([np.maximum(x, 0), np.maximum(-x, 0)], axis=-1)
        slope = lambda g, x: np.where(x > 0, g[..., :8], 0) - np.where(x < 0, g[..., 8:], 0)
        relu = FeatureMap(both, both, slope, slope)
        hold(got, ours("linear_attention", dy, *self.arrays[:3], feature_map=relu), 16.0)

    @BOTH
    def test_no_projection_is_our_softmax_map(self, dtype):
        module = package("performer_pytorch.performer_pytorch")
        *inputs, dy = self.arrays
        q, k, v = leaves(dtype, *inputs)
        y = module.FastAttention(8, nb_features=16, no_projection=True)(q, k, v)
        got = with_gradients(y, dy, q=q, k=k, v=v)
        run = ours("linear_attention", dy, *self.arrays[:3], feature_map="softmax")
        hold(got, run, 1 + max(abs(x).max() for x in self.arrays))

    def test_its_orthogonal_directions_are_one_sided(self):
        """Q of a QR decomposition without the correction of signs: an entry that is never
        positive, where random_features has both signs."""
        module = package("performer_pytorch.performer_pytorch")
        torch.manual_seed(0)
        first = [float(module.orthogonal_matrix_chunk(6)[0, 0]) for _ in range(64)]
        assert max(first) <= 0
        rng = np.random.default_rng(0)
        right = [refattn.random_features(6, 6, rng=rng)[0, 0] for _ in range(64)]
        assert min(right) < 0 < max(right)


@BOTH
@pytest.mark.parametrize("shared", [False, True])
def test_linformer(shared, dtype):
    """linformer's layer with its projections along the sequence; one for both is E alone."""
    module = (
        package("linformer").LinformerSelfAttention(24, 50, k=9, heads=3, share_kv=shared).to(dtype)
    )
    q, k, v, E, F, dy = draw(4, *[(2, 3, 50, 8)] * 3, (9, 50), (9, 50), (2, 3, 50, 8))
    E, F = E / 8, F / 8
    v = k if shared else v
    tq, tk, tv = leaves(dtype, q, k, v)
    packed = lambda x: x.swapaxes(1, 2).reshape(2, 50, 24)
    module.to_q, module.to_k, module.to_v = (Given(packed(x)) for x in (tq, tk, tv))
    module.to_out = torch.nn.Identity()
    with torch.no_grad():
        module.proj_k.copy_(torch.from_numpy(E.T))
        if not shared:
            module.proj_v.copy_(torch.from_numpy(F.T))
    y = module(torch.zeros(2, 50, 24, dtype=dtype)).reshape(2, 50, 3, 8).swapaxes(1, 2)
    inputs = {"q": tq, "k": tk} | ({} if shared else {"v": tv}) | {"E": module.proj_k}
    inputs |= {} if shared else {"F": module.proj_v}
    got = with_gradients(y, dy, **inputs)
    got = {name: x.mT if name in ("dE", "dF") else x for name, x in got.items()}
    run = ours("linformer_attention", dy, q, k, v, E=E, **({} if shared else {"F": F}))

    def summed(kind):
        parts = run(kind)
        if shared:  # its values are its keys
            parts["dk"] = parts["dk"] + parts.pop("dv")
        return parts

    hold(got, summed, logits(q, E @ k))


class TestLinearAttentionTransformer:
    """linear-attention-transformer: softmax maps, and a causal form by buckets."""

    arrays = draw(5, *[(2, 3, 64, 8)] * 4)

    @BOTH
    def test_full(self, dtype):
        """As ours, times 1/sqrt(d)."""
        attend = package("linear_attention_transformer.linear_attention_transformer").linear_attn
        *inputs, dy = self.arrays
        q, k, v = leaves(dtype, *inputs)
        got = with_gradients(attend(q, k, v), dy, q=q, k=k, v=v)
        run = ours("linear_attention", dy, *inputs, feature_map="softmax")

        def scaled(kind):
            return {name: x / kind(8) ** kind(0.5) for name, x in run(kind).items()}

        hold(got, scaled, 1 + max(abs(x).max() for x in inputs))

    def bucketed(self, dtype, bucket):
        module = package("linear_attention_transformer.linear_attention_transformer")
        *inputs, dy = self.arrays
        q, k, v = leaves(dtype, *inputs)
        y = module.causal_linear_attn(q, k, v, bucket_size=bucket)
        return with_gradients(y, dy, q=q, k=k, v=v)

    maps = FeatureMap(
        softmax_over_features,
        np.exp,
        softmax_over_features_vjp,
        lambda g, x: g * np.exp(x),
    )

    @BOTH
    def test_causal_in_buckets_of_one(self, dtype):
        """exp of keys and softmax of queries; the denominator stays above its floor of 1e-3."""
        run = ours(
            "linear_attention", self.arrays[3], *self.arrays[:3], feature_map=self.maps, causal=True
        )
        hold(self.bucketed(dtype, 1), run, 1 + max(abs(x).max() for x in self.arrays))

    @BOTH
    def test_larger_buckets_do_not_see_their_own(self, dtype):
        """A query sees the buckets before its own, and none of its own: the first gets 0."""
        q, k, v, _ = self.arrays

        def run(kind):
            parts = [np.zeros((2, 3, 16, 8), kind)]
            for at in range(16, 64, 16):
                args = q[:, :, at : at + 16], k[:, :, :at], v[:, :, :at]
                parts.append(
                    refattn.linear_attention(*(x.astype(kind) for x in args), feature_map=self.maps)
                )
            return {"y": np.concatenate(parts, axis=2)}

        got = {"y": self.bucketed(dtype, 16)["y"]}
        hold(got, run, 1 + max(abs(x).max() for x in self.arrays))


def test_h_transformer_counts_a_summary_once():
    """h-transformer-1d adds up the values of a summary, and counts it once in the denominator:
    equal scores of values of 1 do not give 1. refattn's two levels count a summary as often as it
    has keys. So its output is no reference for ours; what it gives here is asserted."""
    module = package("h_transformer_1d.h_transformer_1d")
    layer = module.HAttention1D(4, heads=1, dim_head=4, block_size=2).double()
    layer.to_out = torch.nn.Identity()
    n = 16
    x = torch.zeros(1, n, 12, dtype=torch.float64)
    x[..., 8:] = 1
    layer.to_qkv = Given(x)
    y = layer(torch.zeros(1, n, 4, dtype=torch.float64))[0, :, 0].detach().numpy()
    # own block of 2, the neighbour of 2, and one block of 2 summaries of 2 keys
    counts, values = np.array([2, 2, 2]), np.array([2, 2, 4])
    assert abs(y - values.sum() / counts.sum()).max() <= 1e-8  # its epsilon
    one = np.ones((n, 1))
    assert (refattn.two_level_attention(0 * one, 0 * one, one, block=2) == 1).all()
