"""docs/ says what the tables in the code say."""

import importlib.util
from pathlib import Path

import pytest

from refattn.verify.like import CONVENTIONS
from refattn.verify.mistakes import GRADIENT_MISTAKES, MISTAKES
from refattn.verify.mistakes.met import MET

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("pages_script", ROOT / "scripts" / "pages.py")
pages = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pages)


@pytest.mark.parametrize("path", pages.PAGES)
def test_a_page_is_as_the_code_has_it(path):
    assert (ROOT / path).read_text(encoding="utf-8") == pages.PAGES[path](), "run make pages"


def test_every_mistake_says_where_it_was_met_and_nothing_else_does():
    assert {mistake.name for mistake in [*MISTAKES, *GRADIENT_MISTAKES]} == set(MET)


def test_every_library_is_on_the_page():
    page = pages.conventions()
    assert all(f"| `{name}` |" in page and f"- `{name}`: " in page for name in CONVENTIONS)
