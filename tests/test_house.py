"""The house rules that a reader relies on, checked over every public function."""

import ast
import inspect
import pathlib
import re

import numpy as np
import pytest

import refattn
from cases import MECHANISMS, arrays_in, cases, flat

ROOT = pathlib.Path(refattn.__file__).parent
SECTIONS = ["Parameters", "Returns", "Raises", "Notes", "References", "Examples"]
FUNCTIONS = [name for name in refattn.__all__ if inspect.isfunction(getattr(refattn, name))]
ATTENTIONS = [name for name in FUNCTIONS if hasattr(refattn, f"{name}_vjp")]


def test_every_attention_is_under_test():
    """An attention has a gradient and a cost, and is registered in cases.py."""
    named = {name for name in FUNCTIONS if name.endswith("_attention")} - {"merge_attention"}
    assert named <= set(ATTENTIONS) == set(MECHANISMS)
    assert all(hasattr(refattn, f"{name}_cost") for name in ATTENTIONS)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_docstrings(name):
    function = getattr(refattn, name)
    doc = inspect.getdoc(function)
    if name in ATTENTIONS:
        wanted = SECTIONS
        assert ".. math::" in doc and "Cost:" in doc and "Error:" in doc
    elif name.endswith("_cost"):
        wanted = ["Parameters", "Returns", "Examples"]
    else:
        wanted = ["Parameters", "Returns", "Raises", "Examples"]
    for section in wanted:
        assert f"{section}\n---" in doc, f"{name} has no section {section}"
    for parameter in inspect.signature(function).parameters.values():
        starred = parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        assert starred or parameter.name in doc, f"{name} does not document {parameter.name}"


@pytest.mark.parametrize("name", [n for n in dir(refattn.masks) if not n.startswith("_")])
def test_masks_are_documented(name):
    function = getattr(refattn.masks, name)
    if inspect.isfunction(function) and function.__module__ == "refattn.masks":
        assert ">>>" in function.__doc__


@pytest.mark.parametrize("name", ATTENTIONS)
def test_signatures_go_together(name):
    """Options are keyword-only; the gradient takes them all; the cost takes sizes for arrays."""
    forward = inspect.signature(getattr(refattn, name)).parameters
    forward = {n: p for n, p in forward.items() if p.kind is not inspect.Parameter.VAR_KEYWORD}
    assert list(forward)[:3] == ["q", "k", "v"] and list(forward)[-1] == "backend"
    options = list(forward)[3:]
    assert all(forward[option].kind is inspect.Parameter.KEYWORD_ONLY for option in options)
    backward = inspect.signature(getattr(refattn, f"{name}_vjp")).parameters
    assert list(backward)[:4] == ["dy", "q", "k", "v"]
    assert set(options) <= set(backward)
    assert all(backward[option].default == forward[option].default for option in options)
    cost = inspect.signature(getattr(refattn, f"{name}_cost")).parameters
    assert list(cost)[:4] == ["n", "m", "d", "e"] and cost["itemsize"].default == 4


@pytest.mark.parametrize("case", cases([(6, 6, 4, 5)]), ids=str)
def test_inputs_are_never_written_to(case):
    q, k, v, options = case.build()
    dy = np.ones_like(case.mechanism.attention(q, k, v, **options))
    arrays = [dy, q, k, v, *arrays_in(options)]
    copies = [x.copy() for x in arrays]
    for x in arrays:
        x.setflags(write=False)
    y = case.mechanism.attention(q, k, v, **options)
    grads = case.mechanism.vjp(dy, q, k, v, **options)
    for x, copy in zip(arrays, copies, strict=True):
        np.testing.assert_array_equal(x, copy)
    for result in (y, *flat(grads)):
        assert result.flags.writeable and result.base is None
        assert not any(np.shares_memory(result, x) for x in arrays)


@pytest.mark.parametrize("case", cases([(7, 7, 4, 5)]), ids=str)
def test_the_same_call_gives_the_same_bits(case):
    q, k, v, options = case.build()
    first, second = (case.mechanism.attention(q, k, v, **options) for _ in range(2))
    np.testing.assert_array_equal(first, second)


def imports(path):
    """Top-level names of what a file imports, relative to refattn where it is ours."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


@pytest.mark.parametrize("path", sorted(ROOT.glob("*/formula.py")), ids=lambda p: p.parent.name)
def test_a_formula_imports_numpy_scipy_and_formulas(path):
    for name in imports(path):
        top, *rest = name.split(".")
        assert top in ("numpy", "scipy", "refattn", "functools", "inspect", "sys"), name
        assert not {"cpu", "cuda", "verify"} & set(rest), name


def test_the_definitions_import_nothing_that_they_judge():
    folder = pathlib.Path(__file__).parent / "definitions"
    names = {name.split(".")[0] for path in folder.glob("*.py") for name in imports(path)}
    assert names <= {"cmath", "math", "functools", "itertools", "mpmath", "definitions"}


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_files_are_short_enough_to_read_in_one_go(path):
    assert len(path.read_text().splitlines()) <= 360


def test_the_examples_of_the_readme_run(capsys):
    text = (ROOT.parent / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names = {}
    for block in blocks:
        exec(block, names)
    printed = capsys.readouterr().out
    assert len(blocks) == 2 and "my_kernel: right" in printed


def test_the_links_of_the_documents_lead_somewhere():
    for name in ("README.md", "CONTRIBUTING.md", "refattn/data/README.md"):
        text = (ROOT.parent / name).read_text(encoding="utf-8")
        for link in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (ROOT.parent / name).parent.joinpath(link).exists(), f"{name}: {link}"
