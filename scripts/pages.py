"""Write docs/conventions.md and docs/mistakes.md from the tables in refattn.verify."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from refattn.verify.features.mistakes import MISTAKES as FEATURE_MISTAKES  # noqa: E402
from refattn.verify.like import CONVENTIONS, HOUSE  # noqa: E402
from refattn.verify.mistakes import GRADIENT_MISTAKES, MISTAKES  # noqa: E402
from refattn.verify.mistakes.met import MET  # noqa: E402

WRITTEN = "<!-- written by scripts/pages.py: change the table in the code, then `make pages` -->\n"


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


PAGES = {"docs/conventions.md": conventions, "docs/mistakes.md": mistakes}


def main():
    for path, write in PAGES.items():
        (ROOT / path).parent.mkdir(exist_ok=True)
        (ROOT / path).write_text(write(), encoding="utf-8")
        print(path)


if __name__ == "__main__":
    main()
