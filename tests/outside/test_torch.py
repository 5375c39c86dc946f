"""What torch ships: scaled_dot_product_attention by each of its CPU kernels, FlexAttention, the
multi-head layer, and small operators that are one of refattn's mechanisms in disguise."""

import functools
import warnings

import numpy as np
import pytest
from by_torch import leaves
from judge import draw, hold, logits, numbers

import refattn
from refattn.verify import check

torch = pytest.importorskip("torch", reason="torch is not installed (extra: outside)")
from torch.nn.attention import SDPBackend, bias, flex_attention, sdpa_kernel  # noqa: E402

SDPA = torch.nn.functional.scaled_dot_product_attention
KERNELS = [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION]
BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


# d = e, which the flash kernel asks for
SIZES = [(1, 1, 4, 4), (45, 70, 8, 8), (70, 45, 16, 16), (130, 130, 16, 16)]


def tensors(dtype, *arrays):
    return [torch.from_numpy(x).to(dtype) for x in arrays]


def pulled(y, dy, inputs):
    """The gradients, named after the inputs of refattn."""
    grads = torch.autograd.grad(y, inputs, torch.from_numpy(dy).to(y.dtype))
    return dict(zip(("dq", "dk", "dv", "dbias"), grads, strict=False))


def on(kernel, **options):
    def run(q, k, v):
        with sdpa_kernel(kernel):
            return SDPA(q, k, v, **options)

    return run


def quiet(function):
    """Without what it says about speed, or about the kernels that it left out."""

    @functools.wraps(function)
    def run(*args, **options):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return function(*args, **options)

    return run


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize(
    "options", [{}, {"causal": True}, {"scale": 0.2}, {"mask": True}], ids=lambda o: " ".join(o)
)
def test_each_kernel_of_sdpa_by_the_grader(kernel, options, dtype):
    told = dict(options)
    if "causal" in told:
        told["is_causal"] = told.pop("causal")
    if "mask" in told:
        seen = np.random.default_rng(0).random((45, 70)) < 0.5
        seen[3] = False
        options, told = {"mask": seen}, {"attn_mask": torch.from_numpy(seen)}
    asked = {"like": "torch", "dtype": dtype, "gradients": True, "cases": SIZES}
    report = check(on(kernel, **told), "softmax_attention", **asked, **options)
    assert report.passed, report


def test_the_flash_kernel_wants_as_many_columns_in_v():
    """Left to itself SDPA then takes the plain kernel, in silence."""
    q, k, v = torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, 4, 6)
    flash = quiet(on(SDPBackend.FLASH_ATTENTION))
    with pytest.raises(RuntimeError, match="No available kernel"):
        flash(q, k, v)
    assert SDPA(q, k, v).shape == (1, 1, 4, 6)


@BOTH
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_grouped_heads(kernel, dtype):
    """Query heads 3 g, 3 g + 1, 3 g + 2 share the keys of head g; the gradients of those add up."""
    q, k, v, dy = draw(1, (2, 6, 70, 8), (2, 2, 90, 8), (2, 2, 90, 8), (2, 6, 70, 8))
    inputs = leaves(dtype, q, k, v)
    y = on(kernel, enable_gqa=True)(*inputs)

    def ours(kind):
        grouped = lambda x: x.reshape(2, 2, 3, 70, 8)
        args = [x.astype(kind) for x in (grouped(q), k[:, :, None], v[:, :, None])]
        y = refattn.softmax_attention(*args)
        grads = refattn.softmax_attention_vjp(grouped(dy).astype(kind), *args)
        shapes = [q.shape, k.shape, v.shape]
        found = {n: g.reshape(s) for n, g, s in zip(("dq", "dk", "dv"), grads, shapes)}
        return {"y": y.reshape(dy.shape), **found}

    hold({"y": y, **pulled(y, dy, inputs)}, ours, logits(q[:, ::3], k))


@BOTH
@pytest.mark.parametrize("shape", [(40, 50), (3, 40, 50), (2, 1, 40, 50)], ids=str)
def test_the_gradient_of_a_bias(shape, dtype):
    """Summed over what it was broadcast to."""
    q, k, v, b, dy = draw(2, (2, 3, 40, 8), (2, 3, 50, 8), (2, 3, 50, 4), shape, (2, 3, 40, 4))
    inputs = leaves(dtype, q, k, v, b)
    y = on(SDPBackend.MATH, attn_mask=inputs[3])(*inputs[:3])

    def ours(kind):
        *args, bias, pull = (x.astype(kind) for x in (q, k, v, b, dy))
        grads = refattn.softmax_attention_vjp(pull, *args, bias=bias)
        y = refattn.softmax_attention(*args, bias=bias)
        return {"y": y, **dict(zip(("dq", "dk", "dv", "dbias"), grads, strict=True))}

    hold({"y": y, **pulled(y, dy, inputs)}, ours, logits(q, k, bias=abs(b).max()))


@pytest.mark.parametrize(("n", "m"), [(13, 17), (64, 130), (20, 20)])
def test_lower_right_is_our_causal(n, m):
    """is_causal of SDPA stands at the first key; this mask of torch's own at the last, as here."""
    report = check(
        lambda q, k, v: SDPA(q, k, v, attn_mask=bias.causal_lower_right(n, m)),
        "softmax_attention",
        xp="torch",
        causal=True,
        gradients=True,
        lead=(1, 2),
        cases=[(n, m, 8, 8)],
    )
    assert report.passed, report


flex = quiet(flex_attention.flex_attention)
N = 150
MASKS = {
    "local": refattn.masks.local(N, (20, 3)),
    "dilated": refattn.masks.dilated(N, 5, 4),
    "strided": refattn.masks.strided(N, 12, causal=True),
    "fixed": refattn.masks.fixed(N, 16, summary=2),
    "hierarchical": refattn.masks.hierarchical(N, 5),
    "hierarchical, causal": refattn.masks.hierarchical(N, 3, causal=True),
    "longformer": refattn.masks.longformer(N, 6, [0, 77]),
    "bigbird": refattn.masks.bigbird(N, 10, rng=0),
    "block diagonal": refattn.masks.block_diagonal(N, 32),
    "block causal": refattn.masks.block_causal(N, 32),
    "empty rows": refattn.masks.intersection(
        refattn.masks.random(N, 9, rng=1), refattn.masks.local(N, 5)
    ),
}


@BOTH
@pytest.mark.parametrize("name", MASKS)
def test_flex_on_each_mask(name, dtype):
    """Its mask_mod looks each pair up; blocks without one are left out. Rows that see nothing get
    0, and -inf as log-sum-exp, as here."""
    mask = MASKS[name]
    q, k, v = draw(3, (2, 2, N, 8), (2, 2, N, 8), (2, 2, N, 8))
    table = torch.from_numpy(mask.toarray())
    seen = flex_attention.create_block_mask(
        lambda b, h, i, j: table[i, j], None, None, N, N, device="cpu", BLOCK_SIZE=16
    )
    y, lse = flex(*tensors(dtype, q, k, v), block_mask=seen, return_lse=True)

    def ours(kind):
        args = [x.astype(kind) for x in (q, k, v)]
        y, lse = refattn.softmax_attention(*args, mask=mask.toarray(), return_lse=True)
        sparse = refattn.sparse_attention(*args, mask=mask)
        compiled = refattn.sparse_attention(*args, mask=mask, backend="numba")
        return {"y": y, "lse": lse, "sparse": sparse, "compiled": compiled}

    hold({"y": y, "lse": lse, "sparse": y, "compiled": y}, ours, logits(q, k))


@BOTH
def test_flex_with_a_softcap_a_bias_and_grouped_heads(dtype):
    """score_mod gets the scaled score, so that cap and bias follow in the order that is ours."""
    q, k, v, b = draw(4, (2, 6, 40, 8), (2, 2, 50, 8), (2, 2, 50, 8), (6, 40, 50))
    added = torch.from_numpy(b).to(dtype)

    def mod(s, batch, head, i, j):
        return 1.5 * torch.tanh(s / 1.5) + added[head, i, j]

    args = tensors(dtype, q, k, v)
    y, lse = flex(*args, score_mod=mod, scale=0.7, enable_gqa=True, return_lse=True)

    def ours(kind):
        grouped = q.reshape(2, 2, 3, 40, 8), k[:, :, None], v[:, :, None]
        y, lse = refattn.softmax_attention(
            *(x.astype(kind) for x in grouped),
            bias=b.reshape(2, 3, 40, 50).astype(kind),
            softcap=1.5,
            scale=0.7,
            return_lse=True,
        )
        return {"y": y.reshape(2, 6, 40, 8), "lse": lse.reshape(2, 6, 40)}

    hold({"y": y, "lse": lse}, ours, 2.5 + abs(b).max())


@BOTH
def test_parts_of_flex_merge_to_the_whole(dtype):
    """Its outputs and log-sum-exps over two halves of the keys, put together by merge_attention."""
    q, k, v = draw(11, (2, 40, 8), (2, 50, 8), (2, 50, 8))
    parts = [
        flex(*(x[None] for x in tensors(dtype, q, k[:, keys], v[:, keys])), return_lse=True)
        for keys in (slice(0, 30), slice(30, None))
    ]
    ys, lses = ([numbers(x[0]) for x in some] for some in zip(*parts, strict=True))
    y, lse = refattn.merge_attention(ys, lses)

    def ours(kind):
        args = [x.astype(kind) for x in (q, k, v)]
        return dict(zip(("y", "lse"), refattn.softmax_attention(*args, return_lse=True)))

    hold({"y": y, "lse": lse}, ours, logits(q, k))


@BOTH
def test_the_multi_head_layer(dtype):
    """torch.nn.MultiheadAttention around refattn's attention and attention_matrix."""
    torch.manual_seed(0)
    layer = torch.nn.MultiheadAttention(12, 3, batch_first=True, dtype=dtype).eval()
    x, context = draw(5, (2, 40, 12), (2, 50, 12))
    hidden = np.random.default_rng(5).random((2, 50)) < 0.3  # True is hidden, here
    a, b = leaves(dtype, x, context)
    with torch.no_grad():
        y, weights = layer(
            a, b, b, key_padding_mask=torch.from_numpy(hidden), average_attn_weights=False
        )
    w, c, w_out, c_out = (
        numbers(p).astype(float)
        for p in (
            layer.in_proj_weight,
            layer.in_proj_bias,
            layer.out_proj.weight,
            layer.out_proj.bias,
        )
    )

    def ours(kind):
        rows = [
            (source @ w[part].T + c[part]).reshape(2, -1, 3, 4).swapaxes(1, 2).astype(kind)
            for source, part in zip(
                (x, context, context), (slice(0, 12), slice(12, 24), slice(24, 36))
            )
        ]
        mask = ~hidden[:, None, None, :]
        y = refattn.softmax_attention(*rows, mask=mask)
        matrix = refattn.attention_matrix(refattn.softmax_attention, *rows[:2], mask=mask)
        y = y.swapaxes(1, 2).reshape(2, 40, 12) @ w_out.T.astype(kind) + c_out.astype(kind)
        return {"y": y, "weights": matrix}

    # the projections of 12 terms round too
    hold({"y": y, "weights": weights}, ours, 12.0)


@BOTH
def test_a_running_logsumexp_is_causal_attention_to_one_column(dtype):
    """torch.logcumsumexp(k): q = 1, d = 1; and its gradient is that of the log-sum-exp alone."""
    k, dlse = draw(6, (3, 200), (3, 200))
    (x,) = leaves(dtype, k)
    lse = torch.logcumsumexp(x, dim=-1)
    (dk,) = torch.autograd.grad(lse, x, torch.from_numpy(dlse).to(dtype))

    def ours(kind):
        one, column = np.ones((3, 200, 1), kind), k[..., None].astype(kind)
        asked = {"causal": True, "scale": 1.0}
        _, lse = refattn.softmax_attention(one, column, one, return_lse=True, **asked)
        _, dk, _ = refattn.softmax_attention_vjp(
            0 * one, one, column, one, dlse=dlse.astype(kind), **asked
        )
        return {"lse": lse, "dk": dk[..., 0]}

    hold({"lse": lse, "dk": dk}, ours, 1 + abs(k).max())


@BOTH
def test_average_pooling_is_a_window_of_equal_scores(dtype):
    """Shorter at the edges, as count_include_pad=False is; the gradient of the values too."""
    v, dy = draw(7, (4, 90), (4, 90))
    (x,) = leaves(dtype, v)
    pool = functools.partial(
        torch.nn.functional.avg_pool1d, kernel_size=9, stride=1, padding=4, count_include_pad=False
    )
    y = pool(x[:, None])[:, 0]
    (dv,) = torch.autograd.grad(y, x, torch.from_numpy(dy).to(dtype))

    def ours(kind):
        zero, column = np.zeros((4, 90, 1), kind), v[..., None].astype(kind)
        y = refattn.local_attention(zero, zero, column, window=4)
        *_, dv = refattn.local_attention_vjp(
            dy[..., None].astype(kind), zero, zero, column, window=4
        )
        return {"y": y[..., 0], "dv": dv[..., 0]}

    hold({"y": y, "dv": dv}, ours, 9.0)


@BOTH
def test_max_pooling_is_the_pool_of_two_levels(dtype):
    """Blocks of one token's queries: with q = 0 each row is a mean of its block and of the others'
    maxima, counted as often as they are long."""
    (v,) = draw(8, (4, 60))
    (x,) = leaves(dtype, v)
    top = torch.nn.functional.max_pool1d(x[:, None], 10)[:, 0]  # (4, 6)
    own = x.reshape(4, 6, 10).sum(-1)
    y = (own + 10 * (top.sum(-1, keepdim=True) - top)) / 60

    def ours(kind):
        zero = np.zeros((4, 60, 1), kind)
        y = refattn.two_level_attention(zero, zero, v[..., None].astype(kind), block=10, pool="max")
        return {"y": y[:, ::10, 0]}

    hold({"y": y}, ours, 10.0)


@BOTH
def test_the_gates_sigmoid(dtype):
    x, w, b, dg = draw(9, (2, 30, 8), (8, 5), (5,), (2, 30, 5))
    inputs = leaves(dtype, x, w, b)
    gate = torch.sigmoid(inputs[0] @ inputs[1] + inputs[2])
    grads = torch.autograd.grad(gate, inputs, torch.from_numpy(dg).to(dtype))

    def ours(kind):
        args = [a.astype(kind) for a in (x, w, b)]
        grads = refattn.gates.sigmoid_vjp(dg.astype(kind), *args)
        return {"gate": refattn.gates.sigmoid(*args), **dict(zip(("dx", "dw", "db"), grads))}

    hold({"gate": gate, **dict(zip(("dx", "dw", "db"), grads))}, ours, 8.0)


def test_the_gates_top_k():
    """The rows that torch.topk names; without ties, of which it says nothing."""
    (scores,) = draw(10, (3, 40))
    chosen = torch.topk(torch.from_numpy(scores), 11).indices.numpy()
    gate = refattn.gates.top_k(scores, 11)[..., 0]
    np.testing.assert_array_equal(np.sort(chosen, -1), np.nonzero(gate)[1].reshape(3, 11))


def test_the_blocks_that_a_query_likes_best():
    """Mean keys by average pooling, the best three of ten blocks by topk, and attention to them."""
    q, k, v = draw(12, (2, 40, 8), (2, 80, 8), (2, 80, 8))
    tq, tk, tv = tensors(torch.float64, q, k, v)
    mean = torch.nn.functional.avg_pool1d(tk.mT, 8).mT  # (2, 10, 8)
    best = torch.topk(tq @ mean.mT, 3).indices
    chosen = torch.zeros(2, 40, 10, dtype=torch.bool).scatter_(2, best, True)
    y = SDPA(tq, tk, tv, attn_mask=chosen.repeat_interleave(8, dim=2))

    def ours(kind):
        args = [x.astype(kind) for x in (q, k, v)]
        masks = refattn.gates.block_top_k(q, k, block=8, top=3)
        heads = zip(masks, *args, strict=True)
        return {"y": np.stack([refattn.sparse_attention(*x, mask=mask) for mask, *x in heads])}

    hold({"y": y}, ours, logits(q, k))


def test_matrix_products_cost_what_torch_counts():
    """Its counter knows products alone: that part of a cost is what twice the columns add. Linear
    attention divides by its denominator as well, once an entry."""
    from torch.utils.flop_counter import FlopCounterMode

    n, m, d, r = 40, 50, 8, 9
    q, k, v, E = (torch.zeros(s) for s in ((1, 1, n, d), (1, 1, m, d), (1, 1, m, d), (r, m)))
    works = {
        "softmax_attention": (lambda: on(SDPBackend.MATH)(q, k, v), {}, 0),
        "linformer_attention": (lambda: on(SDPBackend.MATH)(q, E @ k, E @ v), {"r": r}, 0),
        "linear_attention": (lambda: q[0, 0] @ (k[0, 0].T @ v[0, 0]), {}, n * d),
    }
    for name, (work, sizes, divisions) in works.items():
        with FlopCounterMode(display=False) as counter:
            work()
        cost = getattr(refattn, f"{name}_cost")
        wide = (d, 2 * d) if name == "linear_attention" else (2 * d, 2 * d)
        added = cost(n, m, *wide, **sizes).flops - cost(n, m, d, d, **sizes).flops
        assert added == counter.get_total_flops() + divisions, name
