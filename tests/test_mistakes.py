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
SIZES = (13, 37, 130)


def settings(n):
    """Options under which each mechanism's mistakes show, for n tokens."""
    rng = np.random.default_rng(n)
    mask = rng.random((n, n)) < 0.6
    mask[2] = False
    gate = np.where(rng.random((n, 1)) < 0.3, 0.0, rng.random((n, 1)))
    some, omega = mask[0], refattn.random_features(16, 16, rng=0)
    E, F = rng.standard_normal((2, 4, n))
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
        ],
        "local_attention": [
            {"window": 3},
            {"window": (2, 4), "dilation": 2},
            {"window": 3, "causal": True},
            {"window": 0},
        ],
        "sparse_attention": [{"mask": mask} for mask in csr],
        "linformer_attention": [{"E": E}, {"E": E, "F": F, "key_mask": some}],
        "performer_attention": [
            {"omega": omega},
            {"omega": omega, "causal": True},
            {"omega": omega, "key_mask": some},
        ],
        "block_attention": [{"block": 4, "fuse": "exact"}, {"block": 5}],
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
