"""docs/outside.md says what the tests hold, of the releases that are installed."""

import ast
import importlib.metadata
from pathlib import Path

import page
import pytest

import refattn

HERE = Path(__file__).parent


def names_in(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_the_page_is_as_the_table_has_it():
    assert page.PAGE.read_text(encoding="utf-8") == page.page(), "run tests/outside/page.py"


@pytest.mark.parametrize("test", sorted({x.test for x in [*page.HELD, *page.DIFFERENCES]}))
def test_what_it_names_is_there(test):
    file, name = test.split("::")
    assert name in names_in(HERE / file)


def test_every_attention_is_held_with_its_gradient():
    attentions = {name for name in refattn.__all__ if hasattr(refattn, f"{name}_vjp")}
    held = {row.mechanism for row in page.HELD if "all gradients" in row.parts}
    assert attentions <= held


def test_every_package_of_the_table_is_used_and_no_other():
    named = {package for row in page.HELD for package in row.packages.split(", ")}
    named |= {row.package for row in page.DIFFERENCES}
    assert named == {row.package for row in page.SOFTWARE}


@pytest.mark.parametrize(
    "row", [row for row in page.SOFTWARE if row.release], ids=lambda r: r.package
)
def test_the_releases_are_those_that_are_installed(row):
    try:
        installed = importlib.metadata.version(row.package)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{row.package} is not installed (extra: outside)")
    assert installed.split("+")[0] == row.release, (
        "read its differences again, and change the table"
    )


def test_the_formulas_import_nothing_that_they_judge():
    tree = ast.parse((HERE / "formulas.py").read_text(encoding="utf-8"))
    names = {alias.name for x in ast.walk(tree) if isinstance(x, ast.Import) for alias in x.names}
    names |= {x.module for x in ast.walk(tree) if isinstance(x, ast.ImportFrom)}
    assert names == {"numpy", "array_api_compat"}
