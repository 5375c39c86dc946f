"""Hugging Face transformers: Longformer's and BigBird's block code, a softcap, an output gate, and
its mask functions. Small layers with given inputs; nothing is downloaded."""

import types

import numpy as np
import pytest
import scipy
from by_torch import Given, leaves, with_gradients
from judge import draw, hold, logits, numbers

import refattn

torch = pytest.importorskip("torch", reason="torch is not installed (extra: outside)")
pytest.importorskip("transformers", reason="transformers is not installed (extra: outside)")
BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def packed(x):
    """(b, h, n, c) as (b, n, h c), contiguous as a projection's output is."""
    turned = x.swapaxes(1, 2)
    return turned.reshape(turned.shape[0], turned.shape[1], -1)


def ours(name, dy, q, k, v, **options):
    def run(kind):
        args, pull = [x.astype(kind) for x in (q, k, v)], dy.astype(kind)
        told = {n: x.astype(kind) if n == "bias" else x for n, x in options.items()}
        y = getattr(refattn, name)(*args, **told)
        grads = getattr(refattn, f"{name}_vjp")(pull, *args, **told)
        return {"y": y, **dict(zip(("dq", "dk", "dv"), grads))}

    return run


@pytest.mark.parametrize("tokens", [[], [0], [3, 17, 40]])
def test_longformer(tokens):
    """Sliding chunks of w keys, w / 2 on each side, and global tokens with projections of their
    own, here the same: the mask longformer. Its softmax is in float32 for every type."""
    from transformers import LongformerConfig
    from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

    config = LongformerConfig(
        hidden_size=16, num_attention_heads=2, attention_window=[8], num_hidden_layers=1
    )
    layer = LongformerSelfAttention(config, 0).eval()
    q, k, v, dy = draw(1, *[(2, 2, 48, 8)] * 4)
    tq, tk, tv = leaves(torch.float32, q, k, v)
    forward = lambda x: packed(x).transpose(0, 1) * 1  # it scales q in place
    rows = lambda x: packed(x).transpose(0, 1)
    layer.query, layer.key, layer.value = Given(forward(tq)), Given(rows(tk)), Given(rows(tv))
    layer.key_global, layer.value_global = Given(rows(tk)), Given(rows(tv))
    chosen = torch.zeros(2, 48, dtype=torch.bool)
    chosen[:, tokens] = True
    if tokens:  # it gets the rows of the global tokens alone
        layer.query_global = Given(rows(tq)[tokens] * 1)
    y = (
        layer(
            torch.zeros(2, 48, 16),
            attention_mask=chosen * 10000.0,
            is_index_masked=torch.zeros(2, 48, dtype=torch.bool),
            is_index_global_attn=chosen,
            is_global_attn=bool(tokens),
        )[0]
        .reshape(2, 48, 2, 8)
        .transpose(1, 2)
    )
    mask = refattn.masks.longformer(48, 4, tokens) if tokens else refattn.masks.local(48, 4)
    got = with_gradients(y, dy, q=tq, k=tk, v=tv)
    hold(got, ours("sparse_attention", dy, q, k, v, mask=mask), logits(q, k))


class TestBigBird:
    """Blocks of 4, the first and the last global, a window of three, random ones."""

    N, BLOCK, RANDOM = 64, 4, 2
    arrays = draw(2, *[(1, 2, 64, 8)] * 4)

    def attend(self, training):
        from transformers import BigBirdConfig
        from transformers.models.big_bird.modeling_big_bird import (
            BigBirdBlockSparseAttention,
            BigBirdModel,
        )

        config = BigBirdConfig(
            hidden_size=16,
            num_attention_heads=2,
            block_size=self.BLOCK,
            num_random_blocks=self.RANDOM,
            max_position_embeddings=self.N,
        )
        layer = BigBirdBlockSparseAttention(config, seed=3).train(training)
        drawn = []
        draw_blocks = layer._bigbird_block_rand_mask_with_head

        def keep(*args, **options):
            drawn.append(draw_blocks(*args, **options))
            return drawn[0]

        layer._bigbird_block_rand_mask_with_head = keep
        q, k, v, dy = self.arrays
        inputs = leaves(torch.float32, q, k, v)
        layer.query, layer.key, layer.value = (Given(packed(x)) for x in inputs)
        masks = BigBirdModel.create_masks_for_block_sparse_attn(torch.ones(1, self.N), self.BLOCK)
        blocked, band, rows, columns = masks
        # it seeds NumPy's one generator for all
        state = np.random.get_state()  # noqa: NPY002
        try:
            y, _ = layer(torch.zeros(1, self.N, 16), band, rows, columns, blocked, blocked)
        finally:
            np.random.set_state(state)  # noqa: NPY002
        y = y.reshape(1, self.N, 2, 8).transpose(1, 2)
        return with_gradients(y, dy, **dict(zip("qkv", inputs))), np.array(drawn[0])

    def times_seen(self, drawn):
        """(heads, blocks, blocks): how often each block of keys stands in a row's softmax."""
        blocks = self.N // self.BLOCK
        plain = refattn.masks.union(
            refattn.masks.local(blocks, 1), refattn.masks.global_tokens(blocks, [0, blocks - 1])
        ).toarray()
        times = np.tile(plain.astype(int), (2, 1, 1))
        for head, rows in enumerate(drawn):
            for row, chosen in enumerate(rows, start=1):
                np.add.at(times[head, row], chosen, 1)
        return times

    def held(self, got, times):
        q, k, v, dy = self.arrays
        wide = times.repeat(self.BLOCK, axis=1).repeat(self.BLOCK, axis=2)
        bias = np.log(np.maximum(wide, 1))
        run = ours("softmax_attention", dy, q, k, v, mask=wide > 0, bias=bias)
        hold(got, run, logits(q, k, bias=bias.max()))

    def test_in_training(self):
        """Each head has a csr mask of blocks of its own; no block comes twice."""
        got, drawn = self.attend(training=True)
        times = self.times_seen(drawn)
        assert drawn.any() and times.max() == 1
        self.held(got, times)
        q, k, v, dy = self.arrays
        for head in range(2):
            pattern = scipy.sparse.csr_array(times[head] > 0)
            mask = refattn.masks.expand_blocks(pattern, self.BLOCK, self.N)
            run = ours("sparse_attention", *(x[:, head] for x in (dy, q, k, v)), mask=mask)
            hold({name: x[:, head] for name, x in got.items()}, run, logits(q, k))

    def test_when_it_is_used_block_0_counts_three_times(self):
        """Outside training all random blocks are block 0, which is global already: its keys stand
        in the softmax once more for each. That is a bias of log 3 on them."""
        got, drawn = self.attend(training=False)
        assert not drawn.any()
        times = self.times_seen(drawn)
        assert set(times[:, 1:-1, 0].ravel()) == {1 + self.RANDOM}
        self.held(got, times)


@BOTH
def test_a_softcap_and_grouped_heads(dtype):
    """Gemma 2: cap, then mask, in our order; the softmax is float32 for float64 too."""
    from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

    module = types.SimpleNamespace(num_key_value_groups=3, head_dim=8, training=False)
    q, k, v, dy = draw(3, (2, 6, 40, 8), (2, 2, 50, 8), (2, 2, 50, 8), (2, 6, 40, 8))
    seen = refattn.masks.local(40, (20, 0), m=50).toarray()
    added = torch.where(torch.from_numpy(seen), 0.0, -torch.inf).to(dtype)
    inputs = leaves(dtype, q, k, v)
    y, weights = eager_attention_forward(module, *inputs, added, softcap=2.0, scaling=0.5)
    got = with_gradients(y.transpose(1, 2), dy, **dict(zip("qkv", inputs))) | {"weights": weights}
    got = {name: x.float() for name, x in got.items()}

    def run(kind):
        grouped = lambda x: x.reshape(2, 2, 3, 40, 8).astype(kind)
        args = [grouped(q), k[:, :, None].astype(kind), v[:, :, None].astype(kind)]
        told = {"mask": seen, "softcap": 2.0, "scale": 0.5}
        matrix = refattn.attention_matrix(refattn.softmax_attention, *args[:2], **told)
        found = {"y": refattn.softmax_attention(*args, **told), "weights": matrix}
        grads = refattn.softmax_attention_vjp(grouped(dy), *args, **told)
        found |= dict(zip(("dq", "dk", "dv"), grads))
        return {name: x.reshape(got[name].shape) for name, x in found.items()}

    hold(got, run, 3.0)
    if dtype == torch.float64:  # right in float64 would be 2^-29 as far off
        assert abs(numbers(got["weights"]) - run(np.float64)["weights"]).max() > 2.0**-40


def test_an_output_gate():
    """Qwen3-Next: attention times the sigmoid of a projection, an entry each, causal, grouped."""
    from transformers import Qwen3NextConfig
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextAttention

    config = Qwen3NextConfig(
        hidden_size=16, num_attention_heads=4, num_key_value_heads=2, head_dim=8
    )
    config._attn_implementation = "eager"
    layer = Qwen3NextAttention(config, 0).eval()
    q, k, v, g, dy = draw(
        4, (2, 4, 40, 8), (2, 2, 40, 8), (2, 2, 40, 8), (2, 4, 40, 8), (2, 4, 40, 8)
    )
    inputs = tq, tk, tv, tg = leaves(torch.float32, q, k, v, g)
    layer.q_proj = Given(packed(torch.cat([tq, tg], dim=-1)))
    layer.k_proj, layer.v_proj = Given(packed(tk)), Given(packed(tv))
    layer.q_norm = layer.k_norm = layer.o_proj = torch.nn.Identity()
    unturned = torch.ones(2, 40, 2), torch.zeros(2, 40, 2)
    causal = torch.full((40, 40), -torch.inf).triu(1)
    y, _ = layer(torch.zeros(2, 40, 16), unturned, causal)
    y = y.reshape(2, 40, 4, 8).transpose(1, 2)
    got = with_gradients(y, dy, **dict(zip("qkvg", inputs)))

    def run(kind):
        grouped = lambda x: x.reshape(2, 2, 2, 40, 8).astype(kind)
        args = [grouped(q), k[:, :, None].astype(kind), v[:, :, None].astype(kind)]
        one, none = np.eye(8, dtype=kind), np.zeros(8, kind)
        told = {"gate": refattn.gates.sigmoid(grouped(g), one, none), "causal": True}
        *grads, dgate = refattn.gated_attention_vjp(grouped(dy), *args, **told)
        dg, *_ = refattn.gates.sigmoid_vjp(dgate, grouped(g), one, none)
        found = {"y": refattn.gated_attention(*args, **told), "dg": dg}
        found |= dict(zip(("dq", "dk", "dv"), grads, strict=True))
        return {name: x.reshape(got[name].shape) for name, x in found.items()}

    hold(got, run, logits(q[:, ::2], k))


def test_mask_functions():
    """A causal window of w counts the query's own key, one to both sides does not: w and 2 w + 1
    keys."""
    from transformers import masking_utils as theirs

    n = 40
    i, j = torch.arange(n)[:, None], torch.arange(n)
    left = torch.zeros(1, dtype=torch.long)
    pairs = {
        theirs.causal_mask_function: refattn.masks.causal(n),
        theirs.sliding_window_causal_mask_function(7): refattn.masks.local(n, (6, 0)),
        theirs.sliding_window_bidirectional_mask_function(7): refattn.masks.local(n, 7),
        theirs.chunked_causal_mask_function(9, left): refattn.masks.intersection(
            refattn.masks.block_diagonal(n, 9), refattn.masks.causal(n)
        ),
    }
    for function, mask in pairs.items():
        seen = torch.as_tensor(function(0, 0, i, j)).expand(n, n)
        np.testing.assert_array_equal(seen.numpy(), mask.toarray())
