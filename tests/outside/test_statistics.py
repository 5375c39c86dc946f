"""Signal processing and statistics that state one of refattn's mechanisms in other words: SciPy,
which is always there, and scikit-learn."""

import numpy as np
import pytest
import scipy
from judge import draw, hold, logits

import refattn

N, M, D = 40, 60, 5


def skl(name):
    return pytest.importorskip(
        f"sklearn.{name}", reason="scikit-learn is not installed (extra: outside)"
    )


def test_the_judge_is_not_blind():
    """Off by one in 2^36, NaN, or finite where -inf belongs: refused."""
    q, k, v = draw(0, (N, D), (M, D), (M, 3))
    seen = np.ones((N, M), bool)
    seen[3] = False

    def ours(kind):
        args = [x.astype(kind) for x in (q, k, v)]
        y, lse = refattn.softmax_attention(*args, mask=seen, return_lse=True)
        return {"y": y, "lse": lse}

    right = ours(np.float64)
    hold(right, ours, logits(q, k))
    near, hole, full = right["y"] * (1 + 2.0**-36), right["y"].copy(), right["lse"].copy()
    hole[1, 1], full[3] = np.nan, 0
    for wrong in ({"y": near}, {"y": hole}, {"lse": full}, {"y": right["y"][:1]}):
        with pytest.raises(AssertionError):
            hold(right | wrong, ours, logits(q, k))


class TestSciPy:
    def test_softmax_and_logsumexp(self):
        q, k, v = draw(1, (2, N, D), (2, M, D), (2, M, 3))
        s = q @ k.mT * 0.7
        got = {"y": scipy.special.softmax(s, axis=-1) @ v, "lse": scipy.special.logsumexp(s, -1)}

        def ours(kind):
            args = [x.astype(kind) for x in (q, k, v)]
            y, lse = refattn.softmax_attention(*args, scale=0.7, return_lse=True)
            return {"y": y, "lse": lse}

        hold(got, ours, logits(q, k, 0.7))

    def test_masks_are_diagonals_and_blocks(self):
        ones = lambda offsets: [np.ones(N, bool) for _ in offsets]
        for dilation, left, right in ((1, 3, 2), (4, 2, 1)):
            offsets = [dilation * step for step in range(-left, right + 1)]
            band = scipy.sparse.dia_array((ones(offsets), offsets), shape=(N, N)).toarray()
            mask = refattn.masks.local(N, (left, right), dilation=dilation)
            np.testing.assert_array_equal(mask.toarray(), band)
        blocks = scipy.linalg.block_diag(*[np.ones((b, b), bool) for b in (12, 12, 12, 4)])
        np.testing.assert_array_equal(refattn.masks.block_diagonal(N, 12).toarray(), blocks)

    @pytest.mark.parametrize("dilation", [1, 3])
    def test_a_moving_average(self, dilation):
        """Equal scores: a window's sum over its length, both by convolution."""
        (v,) = draw(2, (N,))
        kernel = np.zeros(4 * dilation + 1)
        kernel[::dilation] = 1
        total, count = (
            scipy.ndimage.convolve1d(x, kernel, mode="constant") for x in (v, np.ones(N))
        )

        def ours(kind):
            zero = np.zeros((N, 1), kind)
            told = {"window": 2, "dilation": dilation}
            return {"y": refattn.local_attention(zero, zero, v[:, None].astype(kind), **told)[:, 0]}

        hold({"y": total / count}, ours, 5.0)

    def test_an_exponential_moving_average(self):
        """A filter with one pole: softmax attention with a bias of -(i - j) times a rate (ALiBi),
        and linear attention by a map that grows with the position; the filter of ones is exp(lse).
        """
        (v,) = draw(3, (N,))
        keep = 0.875
        total, count = (scipy.signal.lfilter([1.0], [1.0, -keep], x) for x in (v, np.ones(N)))
        got = {"y": total / count, "lse": np.log(count), "linear": total / count, "S": total[-1:]}
        at = np.arange(N)

        def ours(kind):
            zero, column = np.zeros((N, 1), kind), v[:, None].astype(kind)
            bias = ((at[:, None] - at) * np.log(keep)).astype(kind)
            y, lse = refattn.softmax_attention(
                zero, zero, column, bias=bias, causal=True, return_lse=True
            )
            grown = (keep ** (N - 1.0 - at))[:, None].astype(kind)
            rows = refattn.linear.FeatureMap(np.ones_like, lambda x: x + grown)
            linear, (S, _) = refattn.linear_attention(
                zero, zero, column, feature_map=rows, causal=True, return_state=True
            )
            return {"y": y[:, 0], "lse": lse, "linear": linear[:, 0], "S": S[0]}

        hold(got, ours, 1 - N * np.log(keep))

    def test_running_sums_of_exponentials(self):
        k = draw(4, (N,))[0] * 30

        def ours(kind):
            one = np.ones((N, 1), kind)
            args = one, k[:, None].astype(kind), one
            told = {"scale": 1.0, "causal": True, "return_lse": True}
            return {"lse": refattn.softmax_attention(*args, **told)[1]}

        hold({"lse": np.logaddexp.accumulate(k)}, ours, 1 + abs(k).max())

    def test_a_kernel_density(self):
        """Its logarithm is the log-sum-exp of attention with the bias -|k|^2 / 2 and the logarithms
        of the weights, but for the normal density's own constant."""
        q, k = draw(5, (N, 2), (M, 2))
        weights = np.random.default_rng(5).random(M)
        density = scipy.stats.gaussian_kde(k.T, bw_method=0.6, weights=weights)
        root = np.linalg.inv(np.linalg.cholesky(density.covariance))
        x, y = q @ root.T, k @ root.T
        constant = np.log(np.linalg.det(root)) - np.log(2 * np.pi)
        bias = np.log(density.weights) - (y * y).sum(-1) / 2

        def ours(kind):
            args = x.astype(kind), y.astype(kind), np.ones((M, 1), kind)
            told = {"scale": 1.0, "bias": bias.astype(kind), "return_lse": True}
            _, lse = refattn.softmax_attention(*args, **told)
            return {"log density": lse - ((x * x).sum(-1) / 2).astype(kind) + kind(constant)}

        hold({"log density": density.logpdf(q.T)}, ours, logits(x, y, 1.0, abs(bias).max()))


class TestScikitLearn:
    arrays = draw(6, (N, D), (M, D), (M, 3))

    def gaussian(self, kind, mask=None):
        """Softmax attention whose weights are exp(-|q - k|^2 / 2) up to what a row shares."""
        q, k, v = (x.astype(kind) for x in self.arrays)
        told = {"scale": 1.0, "bias": -(k * k).sum(-1) / 2}
        told |= {} if mask is None else {"mask": mask}
        return refattn.softmax_attention(q, k, v, **told)

    @property
    def size(self):
        q, k, _ = self.arrays
        return logits(q, k, 1.0, (k * k).sum(-1).max() / 2)

    def test_kernel_regression(self):
        """Nadaraya and Watson's estimate, as neighbours with weights: attention with the bias
        -|k|^2 / 2."""
        neighbors = skl("neighbors")
        q, k, v = self.arrays
        weigh = lambda distance: np.exp(-(distance**2) / 2)
        y = neighbors.KNeighborsRegressor(M, weights=weigh).fit(k, v).predict(q)
        hold({"y": y}, lambda kind: {"y": self.gaussian(kind)}, self.size)

    def test_nearest_neighbours_are_a_csr_mask(self):
        """Its graph is a csr matrix, and with it the masked attention is the local regression."""
        neighbors = skl("neighbors")
        q, k, v = self.arrays
        weigh = lambda distance: np.exp(-(distance**2) / 2)
        model = neighbors.KNeighborsRegressor(7, weights=weigh).fit(k, v)
        seen = scipy.sparse.csr_array(model.kneighbors_graph(q)).astype(bool)
        assert (np.diff(seen.indptr) == 7).all()

        def ours(kind):
            # equal norms of keys need no bias: sparse_attention has none
            q, k, v = (x.astype(kind) for x in self.arrays)
            short = (k * k).sum(-1, keepdims=True)
            longer = np.concatenate([k, short], axis=-1)
            asking = np.concatenate([q, np.full_like(q[:, :1], -0.5)], axis=-1)
            sparse = refattn.sparse_attention(asking, longer, v, mask=seen, scale=1.0)
            return {"y": self.gaussian(kind, seen.toarray()), "sparse": sparse}

        y = model.predict(q)
        hold({"y": y, "sparse": y}, ours, self.size)

    def test_a_radius_is_a_window(self):
        """Positions as the only feature: the mean of those within 4 is local attention to them."""
        neighbors = skl("neighbors")
        v = self.arrays[2]
        at = np.arange(M, dtype=float)[:, None]
        y = neighbors.RadiusNeighborsRegressor(4.0, weights="uniform").fit(at, v).predict(at)

        def ours(kind):
            zero = np.zeros((M, 1), kind)
            return {"y": refattn.local_attention(zero, zero, v.astype(kind), window=4)}

        hold({"y": y}, ours, 9.0)

    def test_the_taylor_map_is_a_polynomial_kernel(self):
        """1 + t + t^2 / 2 = ((1 + t)^2 + 1) / 2."""
        kernels = skl("metrics.pairwise")
        q, k, v = self.arrays
        weights = (kernels.polynomial_kernel(q, k, degree=2, gamma=1, coef0=1) + 1) / 2
        got = {"y": weights @ v / weights.sum(-1, keepdims=True), "num": weights @ v}

        def ours(kind):
            args = [x.astype(kind) for x in self.arrays]
            y = refattn.linear_attention(*args, feature_map="taylor")
            num = refattn.linear_attention(*args, feature_map="taylor", normalize=False)
            return {"y": y, "num": num}

        hold(got, ours, 21.0)

    @pytest.mark.parametrize("causal", [False, True])
    def test_random_fourier_features(self, causal):
        """RBFSampler has cosines with a phase. The same directions with two phases a quarter turn
        apart are our trig kind: its kernel exp(-|x - y|^2 / 2), and times exp(|x|^2 / 2) and
        exp(|y|^2 / 2) softmax's."""
        approximation = skl("kernel_approximation")
        x, y, v = draw(7, (N, D), (N, D), (N, 3))
        sampler = approximation.RBFSampler(gamma=0.5, n_components=30, random_state=0).fit(x)
        phase = sampler.random_offset_.copy()
        found = []
        for z in (x, y):
            turned = []
            for turn in (0, np.pi / 2):
                sampler.random_offset_ = phase - turn
                turned.append(sampler.transform(z) / np.sqrt(2))
            found.append(np.concatenate(turned, axis=1))
        omega = np.ascontiguousarray(sampler.random_weights_.T)
        rbf = found[0] @ found[1].T
        grow = lambda z: np.exp((z * z).sum(-1) / 2)
        weights = rbf * grow(y) * (np.tri(N) if causal else 1)
        total = weights.sum(-1, keepdims=True)
        got = {"kernel": rbf * grow(x)[:, None] * grow(y), "y": weights @ v / total}
        root = D**0.25  # Performer's scale is 1/sqrt(d)

        def ours(kind):
            phi_x, phi_y = (refattn.trig_features(z.astype(kind), omega) for z in (x, y))
            args = (root * x).astype(kind), (root * y).astype(kind), v.astype(kind)
            told = {"omega": omega, "kind": "trig", "causal": causal}
            return {"kernel": phi_x @ phi_y.T, "y": refattn.performer_attention(*args, **told)}

        hold(got, ours, 1 + np.log(grow(x).max() * grow(y).max()))

    def test_a_kernel_density(self):
        """score_samples is the log-sum-exp, but for the normal density's constant."""
        neighbors = skl("neighbors")
        q, k, _ = self.arrays
        density = neighbors.KernelDensity(bandwidth=1.0, rtol=0, atol=0).fit(k)

        def ours(kind):
            a, b = q.astype(kind), k.astype(kind)
            told = {"scale": 1.0, "bias": -(b * b).sum(-1) / 2, "return_lse": True}
            _, lse = refattn.softmax_attention(a, b, np.ones((M, 1), kind), **told)
            constant = np.log(M) + D / 2 * np.log(2 * np.pi)
            return {"log density": lse - (a * a).sum(-1) / 2 - kind(constant)}

        hold({"log density": density.score_samples(q)}, ours, self.size)
