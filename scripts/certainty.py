"""Measure how far the formulas, and the certified truth, are from the exact answer on hard inputs.

    python scripts/certainty.py        # writes docs/certainty.md, about a minute

The exact answer is that of the loops in tests/definitions, in 60 digits.
"""

import sys
from pathlib import Path

import mpmath
import numpy as np
import tqdm

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import refattn  # noqa: E402
from exact_of import exact_of  # noqa: E402
from refattn.verify import truth  # noqa: E402
from refattn.verify.certain.hard import hard_cases  # noqa: E402

PAGE = ROOT / "docs" / "certainty.md"
INTRODUCTION = """# Answers that know their own error

<!-- written by scripts/certainty.py from a run: `make certainty` -->

`refattn.verify.truth(mechanism, q, k, v, with_error=True, **options)` gives the exact answer
rounded to float64, and for each number a bound on what is left; `truth_vjp` does so for gradients.

- **How.** Every attention is stated a second time, pair by pair, on *balls*: a midpoint and a
  radius, which each operation carries along and enlarges by its own rounding. Gradients go back
  through these operations, so nothing is shared with the formulas or their vjps.
- **In what arithmetic.** Double-double (two float64, about 31 digits) at every size; products of
  matrices by slices whose products are exact in BLAS (Ozaki et al. 2012). Where that leaves more
  than half a unit in the last place and the work is small, at most 2^17 multiplications (with
  gradients 2^15), mpmath with 50, 100, then 200 digits. Above that, double-double's bound stands.
- **What is exact.** The mathematics: `scale=None` is 1/sqrt(d), not its float64. A kernel whose
  features underflow differs from it by more than rounding.
- **What is proven.** Bounds of sums and products; those of exp, log, cos and tanh in double-double
  are measured against mpmath, with two bits to spare.
- **Where it gives up.** Exponents have no end in mpmath; in double-double numbers end at 1e299, and
  what lies under 2^-960 is lost. An infinite bound says that 0 could not be told from not 0, which
  of two maxima is the first, that a number left that range, or that a logit is known to no better
  than 1/2; the value beside it means nothing and may be NaN.

"""


def measured(case):
    """Largest error of the formula, of the truth, and largest bound of the truth."""
    y, bound = truth(case.mechanism, *case.inputs, with_error=True, **case.options)
    formula = getattr(refattn, case.mechanism)(*case.inputs, **case.options)
    exact = exact_of(case.mechanism, *case.inputs, case.options)
    with mpmath.workdps(60):
        error = float(np.abs(exact - y).max())
    return abs(formula - y).max(), error, bound.max()


def page(rows):
    """The document, from (case, formula's error, truth's error, bound)."""
    ratios = np.array([bound / error if error else np.inf for _, _, error, bound in rows])
    within = ratios <= 100
    lines = [
        f"{len(rows)} hard inputs (`refattn/verify/certain/hard.py`); errors are absolute, the",
        "largest of all entries, and the true one is that against 60 digits.",
        "",
        f"The bound holds on all {len(rows)}. It is within a factor of 100 of the true error on",
        f"{within.sum()} of them ({within.mean():.0%}); where it is not, the answer is itself a",
        "float64 and the true error next to nothing.",
        "",
        "| attention | input | formula's error | truth's error | its bound | bound / error |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    if not (ratios >= 1).all():
        raise AssertionError("a bound is smaller than the error: nothing is written")
    for (case, formula, error, bound), ratio in zip(rows, ratios, strict=True):
        words = f"{ratio:.2f}" if ratio < 1e4 else "large"
        lines.append(
            f"| {case.mechanism.removesuffix('_attention')} | {case.name} | {formula:.1e} | "
            f"{error:.1e} | {bound:.1e} | {words} |"
        )
    return INTRODUCTION + "\n".join(lines) + "\n"


def main():
    rows = [(case, *measured(case)) for case in tqdm.tqdm(hard_cases())]
    PAGE.write_text(page(rows), encoding="utf-8")
    print(PAGE.relative_to(ROOT))


if __name__ == "__main__":
    main()
