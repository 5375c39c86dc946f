"""Write docs/conventions.md and docs/mistakes.md from the tables in refattn.verify, and
docs/mutants.md from the record of scripts/mutants.py."""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from refattn.verify.features.mistakes import MISTAKES as FEATURE_MISTAKES  # noqa: E402
from refattn.verify.like import CONVENTIONS, HOUSE  # noqa: E402
from refattn.verify.mistakes import GRADIENT_MISTAKES, MISTAKES  # noqa: E402
from refattn.verify.mistakes.met import MET  # noqa: E402

WRITTEN = "<!-- written by scripts/pages.py: change the table in the code, then `make pages` -->\n"


RECORD = ROOT / "scripts" / "data" / "mutants.json"
RECORDED = "<!-- written by scripts/pages.py from scripts/data/mutants.json: `make pages` -->\n"
GRADERS = ("vectors", "check", "tests")
KINDS = {
    "numba": 'the compiled kernels (`backend="numba"`)',
    "truth": "the formulas in NumPy",
}
HOW = {
    "numbers": "wrong numbers",
    "raised": "an exception, or a failing test",
    "crashed": "a crash of the process",
    "endless": "no end within the limit of time",
}


def table(header, rows):
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return (
        "\n".join(
            "| " + " | ".join(str(x).replace("|", "\\|") for x in line) + " |" for line in lines
        )
        + "\n"
    )


def conventions():
    rows = [
        [
            f"`{name}`" if name else "refattn",
            c.layout,
            c.causal,
            c.window,
            c.mask,
            c.empty_row,
        ]
        for name, c in (("", HOUSE), *CONVENTIONS.items())
    ]
    header = ["like", "axes", "causal, n != m", "window", "mask", "nothing to attend"]
    notes = [
        f"- `{name}`: {c.library}, {c.release}; "
        + ("the tests run it. " if c.tested else "read, not run by the tests. ")
        + (f"{c.note} " if c.note else "")
        + (f"Linear attention's denominator gets {c.epsilon:g}. " if c.epsilon else "")
        + ("Linear attention multiplies q by 1/sqrt(d). " if c.scaled_linear else "")
        + ("v needs as many columns as k. " if c.same_columns else "")
        for name, c in CONVENTIONS.items()
    ]
    return (
        f"# Conventions\n\n{WRITTEN}\n"
        "`check(kernel, mechanism, like=NAME)` judges a kernel by these lines. Axes: b batch, "
        "h heads, n tokens, d columns. Top-left: query i sees keys j <= i; bottom-right: "
        "j <= i + (m - n). An inclusive window (left, right) has left + right + 1 keys.\n\n"
        + table(header, rows)
        + "\n"
        + "\n".join(note.rstrip() for note in notes)
        + "\n"
    )


def mistakes():
    parts = [
        f"# Known mistakes\n\n{WRITTEN}\n"
        "A kernel that fails is compared with each of these; the report names the one that it "
        'equals in every case. "Met" is a public thread or file where the mistake, or the '
        "confusion that leads to it, was seen; where there is none, none was found.\n"
    ]
    for title, catalogue in (("Of the output", MISTAKES), ("Of the gradients", GRADIENT_MISTAKES)):
        rows = [
            [
                m.name,
                m.tells,
                ", ".join(x.removesuffix("_attention") for x in m.mechanisms),
                MET[m.name],
            ]
            for m in catalogue
        ]
        parts.append(
            f"\n## {title}\n\n" + table(["name", "what it says", "attentions", "met"], rows)
        )
    rows = [[m.name, m.tells, m.met] for m in FEATURE_MISTAKES]
    parts.append("\n## Of random features\n\n`check_features` names these by their statistics.\n\n")
    parts.append(table(["name", "what it says", "met"], rows))
    return "".join(parts)


def mutants():
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    every = record["mutants"]
    left = [m for m in every if m["verdict"] == "survived"]
    open_ = [m for m in left if not m["explanation"]]
    became = [m for m in every if m.get("became")]
    parts = [
        f"# Random mutants\n\n{RECORDED}\n",
        _how_it_is_done(record),
        f"\n{len(every)} mutants with seed {record['seed']}: {len(every) - len(left)} caught, "
        f"{len(left)} survived, of which {len(left) - len(open_)} compute the same or differ only "
        f"where nothing is promised, and {len(open_)} show that a case is missing. Of those caught "
        f"{len(became)} had survived at first: each became a case "
        "(refattn/verify/vectors/table/survivors.py), which was then seen to catch it.\n",
    ]
    for kind, words in KINDS.items():
        ours = [m for m in every if m["kind"] == kind]
        parts.append(f"\n## In {words}\n\n" + _who(ours, "class") + "\n" + _ways(ours))
        parts.append("\n" + _who(ours, "file"))
    parts.append("\n## What survived\n")
    for m in sorted(left, key=lambda m: bool(m["explanation"])):
        parts.append(_survivor(m))
    return "".join(parts)


def _how_it_is_done(record):
    cases = record["vectors"]["cases"]
    wrong = [line for lines in record["left_out"].values() for line in lines]
    text = (
        "`make mutants` changes refattn in one place at random, again and again: one operator, "
        "bound, index, constant, sign, or branch (one side of `where` or of `a if c else b` in "
        "place of both, a transpose left out). Each function has a mutant before any has a second. "
        "Argument checks, error messages and costs are left alone.\n\n"
        "A mutant is a copy of the package, judged in a process of its own with limits of time and "
        f"memory. It must answer the full set of vectors, {cases} cases that the unchanged code "
        "wrote (`python -m refattn vectors DIR`), those that can reach the changed file. What they "
        "let through goes to `refattn.verify.check`, with gradients, where it is a kernel; the "
        "mutated formula cannot be its own judge. What is left goes to the tests of its mechanism. "
        "The first that finds fault counts.\n"
    )
    if wrong:
        text += (
            f"\n{len(wrong)} lines that the unchanged code does not answer within the budget were "
            "left out: " + "; ".join(wrong) + ".\n"
        )
    return text


def _who(ours, column):
    """Who caught the mutants of each class, or of each file."""
    names = sorted({m[column] for m in ours})
    groups = [(name, [m for m in ours if m[column] == name]) for name in names]
    rows = [[name, *_counts(group)] for name, group in [*groups, ("all", ours)]]
    return table([column, "mutants", *GRADERS, "survived", "unexplained"], rows)


def _counts(group):
    left = [m for m in group if m["verdict"] == "survived"]
    by = [sum(m["by"] == name for m in group) for name in GRADERS]
    return len(group), *by, len(left), sum(not m["explanation"] for m in left)


def _ways(ours):
    counts = {words: sum(m["how"] == how for m in ours) for how, words in HOW.items()}
    return "Caught by " + ", ".join(f"{words}: {n}" for words, n in counts.items()) + ".\n"


def _survivor(m):
    diff = f"```diff\n- {m['before']}\n+ {m['after']}\n```\n"
    return (
        f"\n`{m['file']}`, line {m['line']}, `{m['function']}`, {m['class']}:\n\n{diff}\n"
        f"{m['explanation'] or 'Not explained: a case is missing.'}\n"
    )


PAGES = {
    "docs/conventions.md": conventions,
    "docs/mistakes.md": mistakes,
    "docs/mutants.md": mutants,
}


def main():
    for path, write in PAGES.items():
        (ROOT / path).parent.mkdir(exist_ok=True)
        (ROOT / path).write_text(write(), encoding="utf-8")
        print(path)


if __name__ == "__main__":
    main()
