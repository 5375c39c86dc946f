"""The check of random features accepts what is right, and names each known mistake."""

import time

import numpy as np
import pytest
import scipy.stats

import refattn
from refattn.verify import check_features
from refattn.verify.features.mistakes import MISTAKES
from refattn.verify.features.sample import Sample, _norms_and_directions
from refusals import refused

SIZES = [2, 4, 8, 16]


def signs_of(diagonal):
    return np.where(diagonal < 0, -1.0, 1.0)


def of_r(Q, R, rng):
    """The right signs: Q[:, j] by that of R[j, j]."""
    return Q * signs_of(np.diagonal(R, axis1=1, axis2=2))[:, None]


def left_to_lapack(Q, R, rng):
    return Q


def of_q(Q, R, rng):
    return Q * signs_of(np.diagonal(Q, axis1=1, axis2=2))[:, None]


def of_q_first(Q, R, rng):
    return Q * signs_of(Q[:, :1])


def one_a_block(Q, R, rng):
    return Q * rng.choice([-1.0, 1.0], (len(Q), 1, 1))


def one_a_row(Q, R, rng):
    return Q * rng.choice([-1.0, 1.0], (len(Q), 1, Q.shape[-1]))


def draw_with(signs=of_r, norms=lambda W, n: n[..., None] * W, dtype=float, repeat=False):
    """Orthogonal features in which one thing is done in another way."""

    def draw(num_features, d, rng):
        rng = np.random.default_rng(rng)
        blocks = -(-num_features // d)
        G = rng.standard_normal((1 if repeat else blocks, d, d))
        W = signs(*np.linalg.qr(G), rng).mT
        W = np.broadcast_to(W, (blocks, d, d))
        omega = norms(W, np.sqrt(rng.chisquare(d, (blocks, d))))
        return omega.reshape(-1, d)[:num_features].astype(dtype)

    return draw


def independent(num_features, d, rng):
    return refattn.random_features(num_features, d, rng=rng, orthogonal=False)


def failed(report):
    return {line.case for line in report.lines if line.trouble}


RIGHT = {
    "refattn": (refattn.random_features, True),
    "refattn, independent": (independent, False),
    "by blocks": (draw_with(), True),
    "float32": (draw_with(dtype=np.float32), True),
    "random signs": (draw_with(one_a_row), True),
}


@pytest.mark.parametrize("d", [*SIZES, 3, 64])
@pytest.mark.parametrize("name", RIGHT)
def test_right_draws_pass(name, d):
    draw, orthogonal = RIGHT[name]
    report = check_features(draw, d=d, orthogonal=orthogonal)
    assert report.passed and not report.diagnosis, report


@pytest.mark.parametrize("seed", range(1, 6))
@pytest.mark.parametrize("orthogonal", [True, False])
def test_other_seeds_pass_too(seed, orthogonal):
    draw = refattn.random_features if orthogonal else independent
    assert check_features(draw, seed=seed, orthogonal=orthogonal).passed


@pytest.mark.parametrize("seed", [0, 1, 2, 1504])
def test_right_draws_made_in_another_way_pass(seed):
    """With seed 1504 the correlations of norms and directions are as large as 26.5, which chi^2
    with 6 degrees of freedom exceeds by two in ten thousand."""

    def draw(num_features, d, rng):
        rng = np.random.default_rng(rng)
        blocks = -(-num_features // d)
        W = scipy.stats.ortho_group.rvs(d, size=blocks, random_state=rng)
        omega = W * np.sqrt(rng.chisquare(d, (blocks, d, 1)))
        return omega.reshape(-1, d)[:num_features]

    report = check_features(draw, d=3, seed=seed)
    assert report.passed, report


def test_the_sum_of_correlations_is_chi_squared():
    """400 draws: its mean is d (d - 1), with a standard error of root(2 d (d - 1) / 400)."""
    d, found = 3, []
    for seed in range(400):
        omega = refattn.random_features(3 * 1000, d, rng=seed)
        found.append(_norms_and_directions(Sample(omega.reshape(-1, d, d))).error)
    assert abs(np.mean(found) - 6) < 4 * (12 / 400) ** 0.5


SIGNS = {"signs", "signs of two rows"}
# The line that must fail, and those that may: a bias of 1/d is lost in noise at larger d.
WRONG = {
    "uncorrected QR": (draw_with(left_to_lapack), SIGNS, {"unbiased"}),
    "signs fixed by an entry": (draw_with(of_q), SIGNS, {"unbiased"}),
    "one sign for a whole block": (draw_with(one_a_block), {"signs of two rows"}, set()),
    "rows of length sqrt(d)": (
        draw_with(norms=lambda W, n: W * W.shape[-1] ** 0.5),
        {"norms"},
        {"unbiased"},
    ),
    "rows of unit length": (draw_with(norms=lambda W, n: W), {"norms", "unbiased"}, set()),
    "one norm for a whole block": (
        draw_with(norms=lambda W, n: W * n[:, :1, None]),
        {"norms of two rows"},
        {"norms"},
    ),
    "norms on the columns": (
        draw_with(norms=lambda W, n: W * n[:, None]),
        {"rows orthogonal", "norms", "norms of two rows"},
        set(),
    ),
    "rows not orthogonal": (independent, {"rows orthogonal"}, set()),
    "one block repeated": (draw_with(repeat=True), SIGNS, {"unbiased"}),
}


@pytest.mark.parametrize("d", SIZES)
@pytest.mark.parametrize("name", WRONG)
def test_each_mistake_is_named_and_no_other(name, d):
    draw, must, may = WRONG[name]
    report = check_features(draw, d=d)
    assert [told.split(": ")[0] for told in report.diagnosis] == [name]
    assert must <= failed(report) <= must | may


@pytest.mark.parametrize("d", SIZES)
def test_orthogonal_rows_where_independent_ones_were_asked_for(d):
    report = check_features(refattn.random_features, d=d, orthogonal=False)
    assert report.diagnosis[0].startswith("rows orthogonal: ")
    assert failed(report) == {"rows independent"}


def test_every_mistake_is_tested():
    assert {mistake.name for mistake in MISTAKES} == {*WRONG, "rows orthogonal"}


@pytest.mark.parametrize("d", SIZES)
def test_signs_fixed_by_the_first_entry_are_told_from_uncorrected_qr(d):
    (told,) = check_features(draw_with(of_q_first), d=d).diagnosis
    assert told.startswith("signs fixed by an entry: ")


def test_two_mistakes_are_both_named():
    draw = draw_with(left_to_lapack, norms=lambda W, n: W * W.shape[-1] ** 0.5)
    told = [words.split(": ")[0] for words in check_features(draw).diagnosis]
    assert told == ["uncorrected QR", "rows of length sqrt(d)"]


def test_the_bias_of_uncorrected_qr_is_measured():
    """(2 Phi(-1.5) + 7) / 8 = 0.892 of the true value, with a standard error of 0.013."""
    text = str(check_features(draw_with(left_to_lapack)))
    (words,) = [line for line in text.split("\n") if line.startswith("unbiased")]
    share = float(words.split(" is ")[1].split()[0])
    assert abs(share - 0.892) < 4 * 0.013
    assert "entry (0, 0) of a block is negative in 100.0% of them" in text


def test_norms_that_know_their_direction():
    """The norms of the rows whose orthogonal form is taken."""

    def draw(num_features, d, rng):
        G = np.random.default_rng(rng).standard_normal((-(-num_features // d), d, d))
        W = of_r(*np.linalg.qr(G), rng).mT * np.linalg.norm(G, axis=2)[..., None]
        return W.reshape(-1, d)[:num_features]

    report = check_features(draw)
    assert failed(report) == {"norms, directions"} and not report.diagnosis


def test_chance_of_its_own():
    calls = np.random.default_rng(0)
    report = check_features(lambda m, d, rng: refattn.random_features(m, d, rng=calls))
    assert failed(report) == {"same seed", "same generator"}
    report = check_features(lambda m, d, rng: refattn.random_features(m, d, rng=0))
    assert failed(report) == {"another seed", "generator goes on"}
    seeded = lambda m, d, rng: refattn.random_features(m, d, rng=int(rng))
    report = check_features(seeded)
    assert failed(report) == {"same generator", "generator goes on"}
    assert "raised TypeError" in str(report)


def test_short_draws_are_looked_at_too():
    def whole_blocks(num_features, d, rng):
        return refattn.random_features(max(1, num_features // d) * d, d, rng=rng)

    report = check_features(whole_blocks)
    assert failed(report) == {"shape and dtype"}
    assert "1 rows: has shape (8, 8), expected (1, 8)" in str(report)

    def rest_is_not_orthogonal(num_features, d, rng):
        rng = np.random.default_rng(rng)
        whole = refattn.random_features(max(d, num_features // d * d), d, rng=rng)
        return np.concatenate([whole, rng.standard_normal((d, d))])[:num_features]

    assert failed(check_features(rest_is_not_orthogonal)) == {"rows orthogonal"}


EVERY_SEED = {"same seed", "another seed", "same generator", "generator goes on"}


@pytest.mark.parametrize(
    ("draw", "words"),
    [
        (lambda m, d, rng: 1 / 0, "raised ZeroDivisionError: division by zero"),
        (lambda m, d: np.ones((m, d)), "raised TypeError"),
        (lambda m, d, rng: np.ones((d, m)), "has shape (8, 40000), expected (40000, 8)"),
        (lambda m, d, rng: [[1.0] * d] * m, "gave list, expected a NumPy array"),
        (lambda m, d, rng: np.ones((m, d), int), "gave int64, expected a NumPy array"),
        (lambda m, d, rng: np.full((m, d), np.nan), "320000 of 320000 entries are NaN or infinite"),
        (3, "raised TypeError: 'int' object is not callable"),
    ],
)
def test_whatever_a_draw_does_is_a_line(draw, words):
    report = check_features(draw)
    assert failed(report) == {"shape and dtype"} | EVERY_SEED
    assert words in report.lines[0].trouble


@pytest.mark.parametrize("value", [0.0, 1.0, 1e300])
def test_degenerate_draws_end_as_lines(value):
    report = check_features(lambda m, d, rng: np.full((m, d), value))
    assert {"norms", "unbiased", "another seed"} <= failed(report)


def test_nothing_returned():
    assert not check_features(lambda m, d, rng: None).filled
    assert check_features(lambda m, d, rng: ..., title="hole").title == "hole"


def test_bad_arguments():
    with refused(ValueError, "d is 1; expected"):
        check_features(refattn.random_features, d=1)
    with refused(ValueError, "seed is -1"):
        check_features(refattn.random_features, seed=-1)
    with refused(TypeError, "orthogonal is 'yes'"):
        check_features(refattn.random_features, orthogonal="yes")


def test_it_is_quick():
    """Half a second where it was written; ten times that on a busy machine."""
    check_features(refattn.random_features)  # imports
    start = time.process_time()
    check_features(refattn.random_features)
    assert time.process_time() - start < 5
