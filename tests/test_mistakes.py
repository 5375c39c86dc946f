"""Every known mistake is refused, and named; a right kernel is never accused."""

import numpy as np
import pytest

import refattn
from refattn.verify import check
from refattn.verify.cases import Trial, cast, number_type
from refattn.verify.like import Convention, Reference, convention_of
from refattn.verify.mistakes import GRADIENT_MISTAKES, MISTAKES, output_of

# NumPy arrays under torch's alignment, so that its mistakes are named where torch is not installed.
FIRST_KEY = Convention("NumPy, aligned at the first key", "2", "numpy", causal="top-left")
MEAN = Convention("NumPy, the mean for nothing", "2", "numpy", "... n d", empty_row="mean of v")
SIZES = (13, 37, 130)


def settings(n):
    """Options under which each mechanism's mistakes show, for n tokens."""
    rng = np.random.default_rng(n)
    mask = rng.random((n, n)) < 0.6
    mask[2] = False
    gate = np.where(rng.random((n, 1)) < 0.3, 0.0, rng.random((n, 1)))
    some, omega = mask[0], refattn.random_features(16, 16, rng=0)
    E, F = rng.standard_normal((2, 4, n)) / n**0.5  # logits of order 1: half types have room
    few = refattn.masks.intersection(refattn.masks.local(n, 2), refattn.masks.random(n, 2, rng=1))
    csr = [refattn.masks.strided(n, 3, causal=True), refattn.masks.random(n, 9, rng=0), few]
    return {
        "softmax_attention": [
            {},
            {"causal": True},
            {"mask": mask},
            {"bias": rng.standard_normal((n, n))},
            {"softcap": 1.5, "causal": True},
            {"causal": True, "like": FIRST_KEY},
            {"scale": 0.7},
            {"mask": mask, "like": MEAN},
        ],
        "local_attention": [
            {"window": 3},
            {"window": (2, 4), "dilation": 2},
            {"window": 3, "causal": True},
            {"window": 0},
            {"window": 3, "like": FIRST_KEY},
            {"window": 3, "scale": 0.7},
            {"window": 3, "like": MEAN},
        ],
        "sparse_attention": [
            *({"mask": mask} for mask in csr),
            {"mask": csr[1], "scale": 0.7},
            {"mask": few, "like": MEAN},
        ],
        "linformer_attention": [
            {"E": E},
            {"E": E, "F": F, "key_mask": some},
            {"E": E, "scale": 0.7},
        ],
        "performer_attention": [
            {"omega": omega},
            {"omega": omega, "causal": True},
            {"omega": omega, "key_mask": some},
            {"omega": omega, "scale": 0.7},
        ],
        "block_attention": [
            {"block": 4, "fuse": "exact"},
            {"block": 5},
            {"block": 5, "scale": 0.7},
        ],
        "two_level_attention": [{"block": 4}, {"block": 3, "pool": "max"}],
        "linear_attention": [{}, {"causal": True}, {"key_mask": some}, {"feature_map": "relu"}],
        "linear_attention_chunked": [{}, {"chunk": 4, "key_mask": some}],
        "gated_attention": [{"gate": gate}, {"gate": gate, "causal": True}],
    }


def sizes_of(mechanism, n):
    """More keys than queries, fewer, and as many, where special cases stand too."""
    return [(n // 2, n, 16, 16), (n, n // 2, 16, 16), (n, n, 16, 16), (n, n, 16, 64)]


def made_by(mistake, mechanism, options, dtype):
    """(dy, q, k, v) -> what a kernel gives that makes the mistake; right where it says nothing."""
    reference = Reference(mechanism, convention_of(options.pop("like", None)))
    wide = {name: cast(cast(x, dtype), np.float64) for name, x in options.items()}
    wide = reference.translated(wide)

    def give(dy, q, k, v):
        arrays = output_of(mistake, reference, Trial("", q, k, v, dy), wide)
        if arrays is None:
            q, k, v, dy = (x.astype(float) for x in (q, k, v, dy))
            if mistake in GRADIENT_MISTAKES:
                arrays = reference.vjp(dy, q, k, v, **wide)
            else:
                arrays = (reference.forward(q, k, v, **wide),)
        with np.errstate(over="ignore"):
            return tuple(np.asarray(x).astype(dtype) for x in arrays[:3])

    return give


def named(report, mistake):
    return any(words.startswith(mistake.name + ": ") for words in report.diagnosis)


def checked(mistake, mechanism, n, dtype):
    """Reports of a kernel that makes the mistake, one for each setting; stops at the first that
    names it."""
    for options in settings(n)[mechanism]:
        give = made_by(mistake, mechanism, dict(options), number_type(dtype))
        asked = dict(options) | {"dtype": dtype, "cases": sizes_of(mechanism, n), "lead": ()}
        if mistake.across_heads:
            asked["lead"] = (2, 3)
        if mistake in GRADIENT_MISTAKES:
            right = made_by(NO_MISTAKE, mechanism, dict(options), number_type(dtype))
            report = check(
                lambda q, k, v, f=right: f(v, q, k, v)[0], mechanism, gradients=give, **asked
            )
        else:
            report = check(lambda q, k, v, f=give: f(v, q, k, v)[0], mechanism, **asked)
        yield report


class NO_MISTAKE:
    across_heads = True
    output = staticmethod(lambda run, *arrays: None)


def cases_of(catalogue):
    pairs = [(mistake, mechanism) for mistake in catalogue for mechanism in mistake.mechanisms]
    ids = [f"{mistake.name} {mistake.tells[:12]}-{mechanism}" for mistake, mechanism in pairs]
    return pytest.mark.parametrize(("mistake", "mechanism"), pairs, ids=ids)


@cases_of([*MISTAKES, *GRADIENT_MISTAKES])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("n", SIZES)
def test_a_known_mistake_is_refused_and_named(mistake, mechanism, dtype, n):
    if mistake.name == "tail tile dropped":
        n += int(mistake.tells.split()[-4])  # more than one whole tile
    assert any(
        not report.passed and named(report, mistake)
        for report in checked(mistake, mechanism, n, dtype)
    )


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize("mechanism", settings(13))
def test_a_right_kernel_is_not_accused(mechanism, dtype):
    run, vjp = getattr(refattn, mechanism), getattr(refattn, f"{mechanism}_vjp")
    for options in settings(13)[mechanism]:
        options = {name: x for name, x in options.items() if name != "like"}
        low = {name: cast(x, number_type(dtype)) for name, x in options.items()}
        report = check(
            lambda q, k, v, o=low: run(q, k, v, **o),
            mechanism,
            dtype=dtype,
            gradients=lambda dy, q, k, v, o=low: vjp(dy, q, k, v, **o),
            **options,
        )
        assert report.passed and report.diagnosis == report.findings == (), report
        assert {line.case.split(": ")[-1] for line in report.lines} >= {"dq", "dk", "dv"}


def test_a_mistake_of_its_own_is_not_called_a_known_one():
    def kernel(q, k, v):
        y = refattn.softmax_attention(q, k, v)
        y[..., 0] *= 1.5
        return y

    report = check(kernel, "softmax_attention")
    assert not report.passed and report.diagnosis == ()


def test_a_wrong_gradient_is_named_and_the_output_called_right():
    def no_row_sum(dy, q, k, v):
        scale = q.shape[1] ** -0.5
        p = refattn.softmax_attention(q, k, np.eye(len(k), dtype=k.dtype))
        ds = scale * p * (dy @ v.T)
        return ds @ k, ds.T @ q, p.T @ dy

    report = check(refattn.softmax_attention, "softmax_attention", gradients=no_row_sum)
    assert [x.split(":")[0] for x in report.diagnosis] == ["gradient without the normaliser path"]
    wrong = {line.case for line in report.lines if line.trouble}
    assert "two tiles: dq" in wrong and "two tiles" not in wrong and "two tiles: dv" not in wrong


def test_every_mechanism_has_settings_and_mistakes():
    known = {name for mistake in [*MISTAKES, *GRADIENT_MISTAKES] for name in mistake.mechanisms}
    assert set(settings(13)) == known


def test_mistakes_are_told_apart_by_their_words():
    words = [(x.name, x.tells, x.mechanisms) for x in [*MISTAKES, *GRADIENT_MISTAKES]]
    assert len(set(words)) == len(words)


# Known mistakes in the arithmetic of the kernel's own type


def diagnosed(kernel, mechanism="softmax_attention", **options):
    report = check(kernel, mechanism, **options)
    assert not report.passed, report
    return [words.split(": ")[0] for words in report.diagnosis]


def in_bfloat16(kernel):
    """Every input in float32, the answer rounded once."""
    wide = lambda *arrays: [x.astype(np.float32) for x in arrays]
    return lambda q, k, v: np.asarray(kernel(*wide(q, k, v))).astype(q.dtype)


def positive(x):
    return np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))


def running_sums(normaliser=0.0, chunk=1):
    """Causal linear attention by a state, chunk by chunk; without a normaliser where it is None."""

    def kernel(q, k, v):
        phi_q, phi_k, y = positive(q), positive(k), np.empty_like(v)
        state, z = np.zeros((q.shape[1], v.shape[1]), q.dtype), np.zeros(q.shape[1], q.dtype)
        for at in (slice(i, i + chunk) for i in range(0, len(q), chunk)):
            a = np.tril(phi_q[at] @ phi_k[at].T)
            y[at] = phi_q[at] @ state + a @ v[at]
            if normaliser is not None:
                den = phi_q[at] @ z + a.sum(axis=1) + q.dtype.type(normaliser)
                y[at] /= den[:, None]
            state, z = state + phi_k[at].T @ v[at], z + phi_k[at].sum(axis=0)
        return y

    return kernel


def plain(divided=True, shifted=True, scale=None):
    """Softmax attention in the type of its inputs."""

    def kernel(q, k, v):
        s = q @ k.T * q.dtype.type(q.shape[1] ** -0.5 if scale is None else scale)
        with np.errstate(all="ignore"):
            a = np.exp(s - s.max(axis=1, keepdims=True) if shifted else s)
            return (a / a.sum(axis=1, keepdims=True) if divided else a) @ v

    return kernel


def test_half_types_do_not_mistake_one_factor_for_another():
    factor = lambda q, k, v: refattn.softmax_attention(q, k, v, scale=0.8 * q.shape[1] ** -0.5)
    assert diagnosed(in_bfloat16(factor), dtype="bfloat16") == []
    base_2 = lambda q, k, v: plain(scale=np.log(2) * q.shape[1] ** -0.5)(q, k, v)
    assert diagnosed(in_bfloat16(base_2), dtype="bfloat16") == ["exp2 taken for exp"]


def test_half_types_do_not_take_one_key_for_a_tile():
    last = lambda q, k, v: refattn.softmax_attention(q, k[:-1], v[:-1]) if len(k) > 1 else v
    cases = [(130, 130, 16, 16), (200, 200, 16, 16)]
    assert diagnosed(in_bfloat16(last), dtype="bfloat16", cases=cases) == []


def test_tiles_that_give_the_same_are_one_line():
    def tail(q, k, v):
        whole = max(len(k) // 16 * 16, min(len(k), 16))
        return refattn.softmax_attention(q, k[:whole], v[:whole])

    report = check(tail, "softmax_attention", cases=[(130, 130, 16, 16)])
    assert report.diagnosis == (
        "tail tile dropped: keys beyond the last whole tile of 16, 32, 64 or 128 are not read",
    )


@pytest.mark.parametrize("epsilon", [1e-4, 1e-3])
def test_an_epsilon_has_one_name(epsilon):
    report = check(in_bfloat16(running_sums(epsilon)), "linear_attention", dtype="bfloat16",
        causal=True, cases=[(40, 40, 8, 8)])  # fmt: skip
    assert len(report.diagnosis) <= 1, report
    report = check(running_sums(epsilon), "linear_attention", causal=True, cases=[(40, 40, 8, 8)])
    (words,) = report.diagnosis
    assert words.startswith(f"epsilon in the denominator: {epsilon:g} is added")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("chunk", [1, 16])
def test_outputs_larger_than_the_truth_have_their_own_rounding(chunk, dtype):
    kernel = running_sums(None, chunk)
    kernel = kernel if dtype == "float32" else in_bfloat16(kernel)
    mechanism, options = ("linear_attention", {"causal": True})
    if chunk > 1:
        mechanism, options = ("linear_attention_chunked", {"chunk": chunk})
    cases = [(13, 13, 5, 7), (130, 130, 16, 16), (600, 600, 32, 32)]
    names = diagnosed(kernel, mechanism, dtype=dtype, cases=cases, **options)
    assert names == ["normaliser forgotten"]


def test_exchanged_gradients_in_float32():
    def exchanged(dy, q, k, v):
        dq, dk, dv = refattn.linear_attention_vjp(dy, q, k, v, causal=True)
        return dk, dq, dv

    right = lambda q, k, v: refattn.linear_attention(q, k, v, causal=True)
    cases = [(130, 130, 16, 16), (600, 600, 32, 32)]
    options = {"causal": True, "gradients": exchanged, "cases": cases}
    assert diagnosed(right, "linear_attention", **options) == ["dq and dk exchanged"]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_exponentials_that_overflow(dtype):
    options = {"dtype": dtype, "cases": [(130, 130, 16, 16), (13, 13, 5, 7)]}
    options["cases"] = options["cases"][::-1]  # large scores take the last size
    report = check(plain(shifted=False), "softmax_attention", **options)
    (words,) = report.diagnosis
    most = {"float32": 88, "float64": 709}[dtype]
    assert words.startswith(f"maximum not subtracted: exp overflows where scores pass {most}")
    names = diagnosed(plain(divided=False, shifted=False), **options)
    assert names == ["neither maximum nor normaliser"]


def test_a_scale_that_is_ignored():
    report = check(plain(), "softmax_attention", scale=0.3)
    assert report.diagnosis == (
        "scale ignored: the scores are q . k / sqrt(d), whatever scale is asked for",
    )
    (words,) = check(plain(scale=1), "softmax_attention", scale=0.3).diagnosis
    assert words == "scale missing: the scores are q . k: the factor on them is missing"


@pytest.mark.parametrize(
    ("given", "asked", "name"),
    [
        ((4, 0), (3, 0), "window one long on the left"),
        ((3, 5), (3, 4), "window one long on the right"),
        ((4, 5), (3, 4), "window one long on both sides"),
    ],
)
def test_windows_one_long(given, asked, name):
    kernel = lambda q, k, v: refattn.local_attention(q, k, v, window=given)
    assert diagnosed(kernel, "local_attention", window=asked) == [name]


def test_a_causal_window_has_one_side():
    kernel = lambda q, k, v: refattn.local_attention(q, k, v, window=4, causal=True)
    names = diagnosed(kernel, "local_attention", window=3, causal=True)
    assert names == ["window one long on the left"]


def test_a_window_aligned_at_the_last_key():
    kernel = lambda q, k, v: refattn.local_attention(q, k, v, window=3)
    names = diagnosed(kernel, "local_attention", window=3, like=FIRST_KEY, lead=())
    assert names == ["bottom-right alignment"]


def test_gradients_alone_are_no_reason_to_raise():
    """A kernel whose y has another shape, and whose gradients are as they should be."""
    kernel = lambda q, k, v: refattn.softmax_attention(q, k, v)[:, :1]
    report = check(kernel, "softmax_attention", gradients=refattn.softmax_attention_vjp)
    assert not report.passed and report.diagnosis == ()


@pytest.mark.parametrize("empty_row", ["0", "mean of v", "NaN"])
@pytest.mark.parametrize("value", ["0", "mean of v", "NaN"])
def test_a_row_of_nothing_is_held_to_the_convention(value, empty_row):
    mask = np.random.default_rng(0).random((13, 13)) < 0.6
    mask[[2, 5]] = False
    given, asked = (
        Convention("of its own", "1", "numpy", "... n d", empty_row=x) for x in (value, empty_row)
    )
    kernel = lambda q, k, v: Reference("softmax_attention", given).forward(q, k, v, mask=mask)
    report = check(kernel, "softmax_attention", mask=mask, like=asked, lead=())
    if value == empty_row:
        assert report.passed
    else:
        (words,) = report.diagnosis
        name = {"0": "0", "mean of v": "the mean", "NaN": "NaN"}[value]
        assert words.startswith(f"empty row gives {name}: ") and "here it gets" not in words


@pytest.mark.filterwarnings("error")
def test_no_mean_of_no_values():
    wrong = lambda q, k, v: np.full((len(q), v.shape[1]), 3, q.dtype)
    report = check(wrong, "softmax_attention", cases=[(3, 0, 4, 4), (3, 2, 4, 4)])
    assert not report.passed
