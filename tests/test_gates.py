"""What is special to gates: closed rows are not computed, whatever the attention inside."""

import numpy as np
import pytest

import refattn
from cases import flat
from refattn import gates, masks
from refusals import refused

rng = np.random.default_rng(0)
B, H, N, D = 2, 3, 11, 4
q, k, v, dy = rng.standard_normal((4, B, H, N, D))
HARD = (rng.random((B, H, N, 1)) < 0.5) * 1.0
HARD[0, 0] = 0  # a head that is closed altogether
OMEGA, E = rng.standard_normal((8, D)), rng.standard_normal((H, 5, N))
STATE = rng.standard_normal((H, D, D)), 1 + rng.random((H, D))

SETTINGS = {
    "softmax": (refattn.softmax_attention, {}),
    "softmax-all": (
        refattn.softmax_attention,
        {
            "mask": rng.random((B, 1, N, N)) < 0.7,
            "bias": rng.standard_normal((H, 1, N)),
            "causal": True,
            "softcap": 2.0,
        },
    ),
    "local": (refattn.local_attention, {"window": 2, "causal": True}),
    "dilated": (refattn.local_attention, {"window": 1, "dilation": 3, "scale": 0.3}),
    "sparse": (refattn.sparse_attention, {"mask": masks.hierarchical(N, 3)}),
    "linear": (refattn.linear_attention, {"feature_map": "taylor"}),
    "linear-softmax": (refattn.linear_attention, {"feature_map": "softmax"}),
    "linear-causal": (
        refattn.linear_attention,
        {"causal": True, "initial_state": STATE, "key_mask": rng.random((B, 1, N)) < 0.8},
    ),
    "chunked": (refattn.linear_attention_chunked, {"chunk": 4, "initial_state": STATE}),
    "performer": (refattn.performer_attention, {"omega": OMEGA}),
    "performer-causal": (
        refattn.performer_attention,
        {"omega": OMEGA, "causal": True, "kind": "hyperbolic", "scale": 0.2},
    ),
    "linformer": (refattn.linformer_attention, {"E": E, "F": E[:1]}),
    "blocks": (refattn.block_attention, {"block": 4}),
    "blocks-exact": (refattn.block_attention, {"block": 4, "fuse": "exact"}),
    "two-level": (refattn.two_level_attention, {"block": 4}),
    "two-level-max": (refattn.two_level_attention, {"block": 3, "pool": "max"}),
}


def vjp_of(attention):
    return getattr(refattn, f"{attention.__name__}_vjp")


@pytest.mark.parametrize("gate", [HARD, HARD[0, 1], HARD * rng.random((B, H, N, D))])
@pytest.mark.parametrize("name", SETTINGS)
def test_skipping_equals_computing_and_gating(name, gate):
    attention, options = SETTINGS[name]
    y = refattn.gated_attention(q, k, v, gate=gate, attention=attention, **options)
    full = attention(q, k, v, **options)
    np.testing.assert_allclose(y, gate * full, rtol=1e-10, atol=1e-12)
    options_in_order = ("bias", "E", "F", "gate", "weights", "initial_state")
    grads = refattn.gated_attention_vjp(dy, q, k, v, gate=gate, attention=attention, **options)
    names = [n for n in options_in_order if n in {**options, "gate": gate}]
    assert len(grads) == 3 + len(names)
    at = 3 + names.index("gate")
    opened = (gate != 0).any(axis=-1, keepdims=True)
    dgate = np.where(opened, dy * full, 0)
    stretched = tuple(
        i
        for i in range(4)
        if (1,) * (4 - gate.ndim) + gate.shape != dgate.shape
        and ((1,) * (4 - gate.ndim) + gate.shape)[i] == 1
    )
    dgate = dgate.sum(axis=stretched, keepdims=True).reshape(gate.shape)
    np.testing.assert_allclose(grads[at], dgate, rtol=1e-9, atol=1e-11)
    rest = flat(grads[:at] + grads[at + 1 :])
    for g, w in zip(rest, flat(vjp_of(attention)(gate * dy, q, k, v, **options)), strict=True):
        assert g.shape == w.shape
        np.testing.assert_allclose(g, w, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_gate_of_ones_is_no_gate_bit_for_bit(name):
    attention, options = SETTINGS[name]
    full = attention(q, k, v, **options)
    for gate in (np.ones((N, 1)), np.ones((1, 1)), np.ones((B, H, N, D))):
        y = refattn.gated_attention(q, k, v, gate=gate, attention=attention, **options)
        np.testing.assert_array_equal(y, full)


@pytest.mark.parametrize("name", SETTINGS)
def test_closed_rows_are_not_looked_at(name):
    """NaN in the queries of closed rows reaches nothing, forward or backward."""
    attention, options = SETTINGS[name]
    closed = HARD[..., 0] == 0
    bad, bad_dy = q.copy(), dy.copy()
    bad[closed], bad_dy[closed] = np.nan, np.nan
    clean = refattn.gated_attention(q, k, v, gate=HARD, attention=attention, **options)
    y = refattn.gated_attention(bad, k, v, gate=HARD, attention=attention, **options)
    np.testing.assert_array_equal(y, clean)
    grads = refattn.gated_attention_vjp(
        bad_dy, bad, k, v, gate=HARD, attention=attention, **options
    )
    assert all(np.isfinite(g).all() for g in flat(grads))
    assert not grads[0][closed].any()


def test_rows_computed_are_counted(monkeypatch):
    """Every row that the softmax underneath is given, over all heads: the open ones."""
    from refattn.softmax import formula

    rows = []
    inner = formula.row_softmax
    monkeypatch.setattr(formula, "row_softmax", lambda s: rows.append(s.shape[-2]) or inner(s))
    refattn.gated_attention(q, k, v, gate=HARD, causal=True)
    assert sum(rows) == HARD.sum()
    rows.clear()
    refattn.gated_attention_vjp(dy, q, k, v, gate=HARD)
    assert sum(rows) == 2 * HARD.sum()  # once for y, which the gate's gradient needs


def test_work_falls_with_the_open_rows():
    cost = refattn.gated_attention_cost
    for attention, sizes in (
        (refattn.softmax_attention, {}),
        (refattn.softmax_attention, {"causal": True}),
        (refattn.local_attention, {"window": 3}),
    ):
        costs = [
            cost(64, 64, 8, 8, open_rows=np.arange(c), attention=attention, **sizes).flops
            for c in (0, 16, 32, 64)
        ]
        assert costs[0] == 0 and costs == sorted(costs)
        whole = getattr(refattn, f"{attention.__name__}_cost")(64, 64, 8, 8, **sizes).flops
        assert costs[-1] == whole + 64 * 8
    half = cost(64, 64, 8, 8, open_rows=32, attention=refattn.linear_attention)
    full = cost(64, 64, 8, 8, open_rows=64, attention=refattn.linear_attention)
    assert full.flops / 2 < half.flops < full.flops  # keys still enter the state
    with refused(ValueError, "open_rows is 3", "positions"):
        cost(8, 8, 2, 2, open_rows=3, causal=True)
    with refused(ValueError, "open_rows is 9", "from 0 to 8"):
        cost(8, 8, 2, 2, open_rows=9)


@pytest.mark.parametrize("rows", [[0], [3, 4], [1, 5, 6, 10], list(range(N))])
@pytest.mark.parametrize("name", [n for n in SETTINGS if n not in ("softmax-all", "sparse")])
def test_costs_of_rows_add_up(name, rows):
    """All rows cost what the attention costs; closing a row never costs more."""
    attention, options = SETTINGS[name]
    sizes = {key: x for key, x in options.items() if key not in ("initial_state", "key_mask")}
    for array, size in (("omega", "num_features"), ("E", "r"), ("mask", "nnz")):
        if array in sizes:
            x = sizes.pop(array)
            sizes[size] = x.nnz if array == "mask" else x.shape[-2]
    sizes |= {"F": True} if "F" in sizes else {}
    few, whole = (
        refattn.gated_attention_cost(N, N, D, D, open_rows=r, attention=attention, **sizes)
        for r in (rows, np.arange(N))
    )
    alone = getattr(refattn, f"{attention.__name__}_cost")(N, N, D, D, **sizes)
    assert whole.flops == alone.flops + N * D
    assert few.flops <= whole.flops and few.bytes <= whole.bytes


@pytest.mark.parametrize(
    ("open_rows", "error"),
    [([9], ValueError), ([-1], ValueError), ([3, 3], ValueError), ([0.7, 1.9], TypeError)]
    + [(np.array([True, False]), TypeError), ([[1]], TypeError), (-1, ValueError)],
)
def test_positions_that_cannot_be(open_rows, error):
    with pytest.raises(error):
        refattn.gated_attention_cost(4, 4, 2, 2, open_rows=open_rows)


def test_costs_that_cannot_be_told():
    cost = refattn.gated_attention_cost
    with refused(ValueError, "gate_width is 3", "1 or e = 8"):
        cost(4, 4, 8, 8, open_rows=2, gate_width=3)
    with refused(ValueError, "expected one of refattn's"):
        cost(4, 4, 8, 8, open_rows=2, attention=lambda q, k, v: v)
    with refused(ValueError, "fuse='sum'", "block_attention_cost"):
        cost(4, 4, 8, 8, open_rows=[1], attention=refattn.block_attention, block=2, fuse="sum")


@pytest.mark.parametrize("name", ["linear-causal", "chunked", "performer-causal"])
def test_causal_forms_check_their_arguments_behind_a_closed_gate(name):
    attention, options = SETTINGS[name]
    options = {key: x for key, x in options.items() if key not in ("key_mask", "initial_state")}
    gate = HARD[0, 1]
    for wrong, words in (
        ({"k": k[..., :9, :], "v": v[..., :9, :]}, ["n = 11, m = 9"]),
        ({"q": q[..., :9, :], "gate": gate[:9]}, ["n = 9, m = 11"]),
    ):
        inputs = {"q": q, "k": k, "v": v, "gate": gate, **wrong}
        with refused(ValueError, *words):
            refattn.gated_attention(**inputs, attention=attention, **options)
    with refused(TypeError, "causal is 1"):
        refattn.gated_attention(q, k, v, gate=gate, attention=attention, **{**options, "causal": 1})


def test_chunk_is_checked_behind_a_closed_gate():
    with refused(ValueError, "chunk is 0"):
        refattn.gated_attention(
            q, k, v, gate=HARD, attention=refattn.linear_attention_chunked, chunk=0
        )


@pytest.mark.parametrize("name", SETTINGS)
def test_keys_that_no_open_row_sees_reach_nothing(name):
    """NaN in the last key, closed from the row before it on; and with every row closed."""
    attention, options = SETTINGS[name]
    bad_k, bad_v = k.copy(), v.copy()
    bad_k[..., -1, :], bad_v[..., -1, :] = np.nan, np.nan
    shut = np.zeros((N, 1))
    y = refattn.gated_attention(q, bad_k, bad_v, gate=shut, attention=attention, **options)
    grads = refattn.gated_attention_vjp(
        dy, q, bad_k, bad_v, gate=shut, attention=attention, **options
    )
    assert not y.any() and not any(g.any() for g in flat(grads))
    if not options.get("causal", attention is refattn.linear_attention_chunked):
        return
    gate = (np.arange(N)[:, None] < N - 2) * 1.0
    grads = refattn.gated_attention_vjp(
        dy, q, bad_k, bad_v, gate=gate, attention=attention, **options
    )
    assert all(np.isfinite(g).all() for g in flat(grads))
    clean = refattn.gated_attention_vjp(dy, q, k, v, gate=gate, attention=attention, **options)
    for g, c in zip(flat(grads), flat(clean), strict=True):
        np.testing.assert_allclose(g, c, rtol=1e-12, atol=1e-13)


def test_a_callable_gate_is_called_once():
    calls = []

    def gate(q, k, v):
        calls.append(1)
        return HARD

    refattn.gated_attention_vjp(dy, q, k, v, gate=gate)
    refattn.gated_attention(q, k, v, gate=gate)
    assert len(calls) == 2


def test_a_state_may_come_as_a_list():
    pair = [x[0] for x in STATE]
    gate = HARD[0, 1]
    *_, as_list = refattn.gated_attention_vjp(
        dy, q, k, v, gate=gate, attention=refattn.linear_attention, initial_state=pair
    )
    *_, as_tuple = refattn.gated_attention_vjp(
        dy, q, k, v, gate=gate, attention=refattn.linear_attention, initial_state=tuple(pair)
    )
    for a, b in zip(as_list, as_tuple, strict=True):
        np.testing.assert_array_equal(a, b)


def test_arrays_are_rounded_to_the_dtype_of_q():
    """A float64 gate, E or bias with float16 q counts as rounded: the contract's cast."""
    low = [x.astype(np.float16) for x in (q, k, v)]
    gate, wide = rng.random((N, 1)), rng.standard_normal((5, N))
    for options in (
        {},
        {"bias": rng.standard_normal((N, N))},
        {"attention": refattn.linformer_attention, "E": wide},
        {"attention": refattn.performer_attention, "omega": OMEGA},
    ):
        rounded = {
            name: x.astype(np.float16) if isinstance(x, np.ndarray) else x
            for name, x in options.items()
        }
        y = refattn.gated_attention(*low, gate=gate, **options)
        z = refattn.gated_attention(*low, gate=gate.astype(np.float16), **rounded)
        np.testing.assert_array_equal(y, z)


def test_weights_of_a_gated_attention():
    """attention_matrix hands ``attention`` on as an option."""
    a = refattn.attention_matrix(
        refattn.gated_attention,
        q,
        k,
        gate=HARD,
        attention=refattn.sparse_attention,
        mask=masks.hierarchical(N, 3),
    )
    np.testing.assert_allclose(a.sum(axis=-1), HARD[..., 0], atol=1e-14)


def test_a_foreign_attention_runs_in_full():
    seen = []

    def foreign(q, k, v, factor):
        seen.append(q.shape)
        return factor * v

    y = refattn.gated_attention(q, k, v, gate=HARD, attention=foreign, factor=2.0)
    np.testing.assert_array_equal(y, HARD * 2 * v)
    assert seen == [(B, H, N, D)]

    def foreign_vjp(dy, q, k, v, factor):
        return np.zeros_like(q), np.zeros_like(k), factor * dy

    grads = refattn.gated_attention_vjp(
        dy, q, k, v, gate=HARD, attention=foreign, attention_vjp=foreign_vjp, factor=2.0
    )
    np.testing.assert_array_equal(grads[2], 2 * HARD * dy)
    np.testing.assert_allclose(grads[3], (dy * 2 * v).sum(-1, keepdims=True), rtol=1e-13)
    with refused(ValueError, "attention_vjp"):
        refattn.gated_attention_vjp(dy, q, k, v, gate=HARD, attention=foreign, factor=2.0)
    with refused(ValueError, "attention_vjp", "their gradient"):
        refattn.gated_attention_vjp(dy, q, k, v, gate=HARD, attention_vjp=foreign_vjp)
    half = refattn.gated_attention(
        *(x.astype(np.float32) for x in (q, k, v)), gate=HARD, attention=lambda q, k, v: v * 1.0
    )
    assert half.dtype == np.float32


def test_fused_blocks_are_gated_as_a_whole():
    """sum, mean, max and weighted have no row for each query: the gate fits the output."""
    options = {"attention": refattn.block_attention, "block": 5, "fuse": "sum"}
    some = q[..., :10, :], k[..., :10, :], v[..., :10, :]
    gate = HARD[..., :5, :]
    y = refattn.gated_attention(*some, gate=gate, **options)
    full = refattn.block_attention(*some, block=5, fuse="sum")
    np.testing.assert_array_equal(y, gate * full)
    *_, dgate = refattn.gated_attention_vjp(dy[..., :5, :], *some, gate=gate, **options)
    np.testing.assert_allclose(dgate, (dy[..., :5, :] * full).sum(-1, keepdims=True), rtol=1e-12)


def test_a_callable_gate_sees_q_k_v_and_chains_through_its_own_gradient():
    """G(Q, K, V) = sigmoid(q w + b): the whole gradient against differences."""
    gen = np.random.default_rng(1)
    w, b = gen.standard_normal((D, 1)), gen.standard_normal(1)
    u = gen.standard_normal(q.shape)

    def loss(x):
        y = refattn.gated_attention(x, k, v, gate=lambda q, k, v: gates.sigmoid(q, w, b))
        return (dy * y).sum()

    dq, _, _, dgate = refattn.gated_attention_vjp(
        dy, q, k, v, gate=lambda q, k, v: gates.sigmoid(q, w, b)
    )
    dq = dq + gates.sigmoid_vjp(dgate, q, w, b)[0]
    slope = (loss(q + 1e-6 * u) - loss(q - 1e-6 * u)) / 2e-6
    assert abs(slope - (dq * u).sum()) < 1e-7 * (1 + abs(slope))


def test_sigmoid_and_its_gradient():
    gen = np.random.default_rng(2)
    x, w, b = gen.standard_normal((2, 7, 3)), gen.standard_normal((3, 5)), gen.standard_normal(5)
    np.testing.assert_allclose(gates.sigmoid(x, w, b), 1 / (1 + np.exp(-(x @ w + b))), rtol=1e-14)
    assert (gates.sigmoid(x, w, b + 1e4) == 1).all() and (gates.sigmoid(x, w, b - 1e4) == 0).all()
    dg = gen.standard_normal((2, 7, 5))
    grads, moves = gates.sigmoid_vjp(dg, x, w, b), [gen.standard_normal(a.shape) for a in (x, w, b)]

    def loss(h):
        moved = (a + h * u for a, u in zip((x, w, b), moves, strict=True))
        return (dg * gates.sigmoid(*moved)).sum()

    slope = (loss(1e-6) - loss(-1e-6)) / 2e-6
    claimed = sum((g * u).sum() for g, u in zip(grads, moves, strict=True))
    assert abs(slope - claimed) < 1e-8 * (1 + abs(slope))
    assert gates.sigmoid(x.astype(np.float16), w, b).dtype == np.float16


def test_top_k_keeps_exactly_k_and_ties_go_to_the_lower_index():
    scores = np.array([[2.0, 2.0, 1.0, 2.0, -np.inf], [0.0, 0.0, 0.0, 0.0, 0.0]])
    for count in range(6):
        kept = gates.top_k(scores, count)
        assert kept.shape == (2, 5, 1) and (kept.sum(axis=1) == count).all()
    np.testing.assert_array_equal(gates.top_k(scores, 2)[..., 0], [[1, 1, 0, 0, 0]] * 2)
    np.testing.assert_array_equal(gates.top_k(scores, 4)[0, :, 0], [1, 1, 1, 1, 0])
    assert gates.top_k(scores.astype(np.float32), 2).dtype == np.float32
    np.testing.assert_array_equal(np.flatnonzero(gates.top_k(np.zeros(99), 40)), np.arange(40))


def test_threshold_is_open_at_its_value():
    kept = gates.threshold(np.array([0.4, 0.5, 0.6, np.nan]), 0.5)
    np.testing.assert_array_equal(kept[:, 0], [0, 1, 1, 0])
    assert not gates.threshold(np.ones(3, np.float16), 70_000.0).any()


def test_block_top_k_chooses_by_mean_key():
    gen = np.random.default_rng(3)
    a, b = gen.standard_normal((2, 3, 5, 4)), gen.standard_normal((3, 10, 4))
    chosen = gates.block_top_k(a, b, block=4, top=2)
    assert len(chosen) == 6
    for head, mask in enumerate(chosen):
        at = np.unravel_index(head, (2, 3))
        dense = mask.toarray()
        for i in range(5):
            means = [b[at[1], s : s + 4].mean(axis=0) for s in (0, 4, 8)]
            best = sorted(range(3), key=lambda c: -(a[at][i] @ means[c]))[:2]
            wanted = [j // 4 in best for j in range(10)]
            np.testing.assert_array_equal(dense[i], wanted)
    assert gates.block_top_k(a, b, block=10**30, top=1)[0].toarray().all()
    assert gates.block_top_k(a[:, :, :0], b, block=4, top=1)[0].shape == (0, 10)
    ties = gates.block_top_k(np.zeros((2, 1)), np.ones((6, 1)), block=2, top=1)[0].toarray()
    assert ties[:, :2].all() and not ties[:, 2:].any()  # ties go to the lower block
    y = refattn.sparse_attention(a[0, 0], b[0], b[0], mask=chosen[0])
    assert y.shape == (5, 4)


ones = np.ones((4, 3))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: gates.sigmoid(ones, np.ones((2, 1)), np.ones(1)), ValueError, ["w has shape"]),
        (lambda: gates.sigmoid(ones, np.ones((3, 1)), np.ones(2)), ValueError, ["b has shape"]),
        (lambda: gates.sigmoid(ones[0], np.ones((3, 1)), np.ones(1)), ValueError, ["x has shape"]),
        (lambda: gates.threshold(np.ones(3, int), 0.5), TypeError, ["scores has dtype int64"]),
        (lambda: gates.threshold(np.float64(1), 0.5), ValueError, [r"scores has shape \(\)"]),
        (lambda: gates.threshold(ones, "high"), TypeError, ["at is 'high'"]),
        (lambda: gates.top_k(ones, 4), ValueError, ["k is 4", "from 0 to 3"]),
        (lambda: gates.top_k(ones, -1), ValueError, ["k is -1"]),
        (lambda: gates.block_top_k(ones, ones, block=0, top=1), ValueError, ["block is 0"]),
        (lambda: gates.block_top_k(ones, ones, block=2, top=3), ValueError, ["top is 3", "1 to 2"]),
        (lambda: gates.block_top_k(ones, ones[:0], block=1, top=1), ValueError, ["0 rows"]),
        (lambda: gates.block_top_k(ones, ones[:, :2], block=2, top=1), ValueError, ["columns"]),
    ],
)
def test_errors_of_gates(call, error, words):
    with refused(error, *words):
        call()


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"gate": np.ones((3, 1))}, ValueError, [r"gate has shape \(3, 1\)", r"\(4, 3\)"]),
        ({"gate": np.ones((4, 2))}, ValueError, [r"gate has shape \(4, 2\)"]),
        ({"gate": np.ones((2, 4, 1))}, ValueError, [r"gate has shape \(2, 4, 1\)"]),
        ({"gate": np.ones((4, 1), bool)}, TypeError, ["gate has dtype bool"]),
        ({"gate": lambda q, k, v: np.ones((4, 1), int)}, TypeError, ["gate has dtype int64"]),
        ({"gate": ones, "attention": "softmax"}, TypeError, ["attention is 'softmax'"]),
        ({"gate": ones, "return_lse": True}, ValueError, ["return_lse=True"]),
        ({"gate": ones * 0, "mask": np.ones((3, 4), bool)}, ValueError, ["mask has shape"]),
        ({"gate": ones * 0, "causal": 1}, TypeError, ["causal is 1"]),
        ({"gate": ones * 0, "window": 1}, TypeError, ["window"]),
    ],
)
def test_errors(options, error, words):
    with refused(error, *words):
        refattn.gated_attention(ones, ones, ones, **options)
    with refused(error, *words):
        refattn.gated_attention_vjp(ones, ones, ones, ones, **options)
