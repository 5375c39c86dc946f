"""The pytest plugin, in the hands of a package that is not refattn's (tests/outside_package)."""

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import numpy as np
import pytest

import refattn
from refattn.verify import Convention
from refattn.verify.vectors import load, made, write
from refattn.verify.vectors.judged import Judged, differs

HERE = Path(__file__).parent
QUIET = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}


def plugin_is_found():
    entries = importlib.metadata.entry_points(group="pytest11")
    return any(entry.value == "refattn.verify.plugin" for entry in entries)


needs_installed = pytest.mark.skipif(
    not plugin_is_found(), reason="refattn is not installed with its entry point: pip install -e ."
)
needs_hatchling = pytest.mark.skipif(
    importlib.util.find_spec("hatchling") is None,
    reason="hatchling is missing: pip install .[test]",
)


def run(*command, cwd=None, **more):
    """The exit status and everything that was printed."""
    environment = {name: x for name, x in os.environ.items() if not name.startswith("PYTEST")}
    environment.pop("COVERAGE_PROCESS_START", None)
    done = subprocess.run(
        command,
        cwd=cwd,
        env=environment | QUIET | more,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def outside(tmp_path_factory):
    """(python, folder): an environment with the package installed, which finds refattn and pytest
    in ours by a .pth file."""
    place = tmp_path_factory.mktemp("outside")
    folder = shutil.copytree(HERE / "outside_package", place / "package")
    venv.create(place / "venv", with_pip=False)
    name = "Scripts/python.exe" if os.name == "nt" else "bin/python"
    python = place / "venv" / name
    status, purelib = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))")
    assert status == 0, purelib
    ours = sysconfig.get_path("purelib")
    line = f"import site; site.addsitedir({ours!r})\n"
    (Path(purelib.strip()) / "ours.pth").write_text(line)
    options = ["--no-deps", "--no-index", "--no-build-isolation", "--quiet"]
    pip = [sys.executable, "-m", "pip", "--python", python, "install", *options, folder]
    status, said = run(*pip)
    assert status == 0, said
    return python, folder


def pytest_in(outside, *arguments, alone=True):
    """pytest, with refattn's plugin ``alone`` since others take seconds to load; else with all that
    are found."""
    python, folder = outside
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    if not alone:
        return run(*command, *arguments, cwd=folder)
    alone = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return run(*command, "-p", "refattn", *arguments, cwd=folder, **alone)


def counts(said):
    """{"passed": 12, "failed": 1} of pytest's last line."""
    last = said.splitlines()[-1].rpartition(" in ")[0]
    return {word: int(number) for number, word in re.findall(r"(\d+) (\w+)", last)}


@needs_installed
@needs_hatchling
def test_a_package_of_its_own_is_judged(outside):
    status, said = pytest_in(outside, "--tb=short", alone=False)
    assert status == 1, said
    found = counts(said)
    failed = re.findall(r"^FAILED .*::(\w+)\[(\S+)\]", said, re.MULTILINE)
    # The right kernel passes everywhere, in both precisions; the wrong one only where n = m.
    assert failed == [("test_top_left", "softmax_attention-causal-more-keys-float32")], said
    assert found["failed"] == 1 and found["passed"] >= 8, said
    assert "softmax_attention/causal, more keys/float32: y not right" in said
    assert "It equals a known mistake. top-left alignment: query i stands at key i" in said, said


@needs_installed
@needs_hatchling
def test_the_command_line_narrows_and_brings_a_folder(outside, tmp_path):
    write(tmp_path / "vectors", made("softmax_attention/causal"))
    options = ["--refattn-vectors", str(tmp_path / "vectors"), "--refattn-dtype", "float32"]
    options += ["--refattn-mechanism", "softmax_attention"]
    status, said = pytest_in(outside, *options)
    found = counts(said)
    failed = re.findall(r"^FAILED .*\[(\S+)\]", said, re.MULTILINE)
    assert status == 1 and all(name.endswith("float32") for name in failed), said
    assert {"softmax_attention-causal-more-keys-float32"} < set(failed), said
    assert found["passed"] > found["failed"], said
    assert found["skipped"] == 1, said  # the gradients are tested in float16 alone
    status, said = pytest_in(outside, "--refattn-mechanism", "softmax")
    assert status == 2 and "on the command line mechanism is 'softmax'; expected" in said, said


WRONG = {
    "no mark": ("", "refattn_case is used, but no mechanism is named"),
    "unknown mechanism": ("mechanism='softmax'", "mechanism is 'softmax'; expected one of"),
    "unknown dtype": (
        "mechanism='softmax_attention', dtype='float8'",
        "dtype is 'float8'; expected one of float64",
    ),
    "unknown keyword": ("mecanism='softmax_attention'", "refattn(mecanism) came; expected"),
    "nothing fits": (
        "mechanism='linformer_attention', takes=[]",
        "no vector fits refattn(mechanism='linformer_attention', takes=[])",
    ),
    "unknown library": (
        "mechanism='softmax_attention', like='numpy2'",
        "like is 'numpy2'; expected one of 'torch'",
    ),
}


@needs_installed
@needs_hatchling
def test_marks_that_fit_nothing_are_errors(outside, tmp_path):
    for at, (keywords, _) in enumerate(WRONG.values()):
        mark = f"@pytest.mark.refattn({keywords})\n" if keywords else ""
        text = f"import pytest\n\n{mark}def test_it(refattn_case):\n    pass\n"
        (tmp_path / f"test_marked_{at}.py").write_text(text)
    status, said = pytest_in(outside, str(tmp_path))
    assert status == 2 and counts(said) == {"errors": len(WRONG)}, said
    for at, (name, (_, words)) in enumerate(WRONG.items()):
        assert f"test_marked_{at}.py::test_it: {words}" in said, (name, said)


LIBRARIES = """
import pytest
torch = pytest.importorskip("torch")

@pytest.mark.refattn(mechanism="softmax_attention", like="torch", takes=["mask", "causal"])
def test_sdpa(refattn_case):
    case, options = refattn_case, refattn_case.options
    q, k, v = (x.requires_grad_() for x in (case.q, case.k, case.v))
    assert q.ndim == 4 and q.dtype == getattr(torch, case.dtype)
    y = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=options.get("mask"), is_causal=options.get("causal", False)
    )
    case.check(y=y)
"""


@needs_installed
@needs_hatchling
@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is missing")
def test_torch_tensors_are_given_and_taken(outside, tmp_path):
    (tmp_path / "test_torch.py").write_text(LIBRARIES)
    status, said = pytest_in(outside, str(tmp_path / "test_torch.py"))
    assert status == 0 and counts(said)["passed"] >= 4, said


def test_loading_the_plugin_imports_nothing_heavy():
    code = (
        "import sys, refattn\n"
        "before = set(sys.modules)\n"
        "import refattn.verify.plugin\n"
        "new = set(sys.modules) - before\n"
        "print(sorted(name for name in new if name.startswith(('numba', 'refattn'))))\n"
        "print('numba' in sys.modules, 'scipy.sparse.linalg' in sys.modules)\n"
    )
    status, said = run(sys.executable, "-c", code, cwd=HERE.parent)
    assert status == 0 and said.split("\n")[:2] == ["['refattn.verify.plugin']", "False False"], (
        said
    )


# What the fixture gives, without pytest around it.


def named(label, **choice):
    (case,) = [case for case in load(**choice) if case.label == label]
    return case


SOFTMAX = {"mechanism": "softmax_attention", "dtype": "float32"}


def test_a_wrong_answer_is_explained():
    case = Judged(named("causal, more keys", **SOFTMAX))
    wrong = refattn.softmax_attention(case.q, case.k, case.v)
    with pytest.raises(AssertionError) as said:
        case.check(y=wrong, dq=case.case.run()["dq"])
    first, second, *table = str(said.value).splitlines()
    assert first == "softmax_attention/causal, more keys/float32: y not right"
    assert second.startswith("It equals a known mistake. causal missing")
    assert [line.split()[0] for line in table] == ["case", "y", "dq"]
    assert table[-1].endswith("right")
    with pytest.raises(AssertionError, match=r"y is 1\.5 times what is wanted"):
        case.assert_right(1.5 * case.case.run()["y"])
    grads = case.case.run()
    with pytest.raises(AssertionError, match="dk not right"):
        case.assert_gradients(dq=grads["dq"], dk=grads["dv"])


@pytest.mark.parametrize("case", load(dtype="float32"), ids=lambda case: case.name)
def test_every_wrong_answer_has_words(case):
    answers = {part: np.array(y, float) for part, y in case.run().items()}
    Judged(case).check(**answers)
    for change in (lambda y: 1.5 * y + 0.1, lambda y: y[..., ::-1] - 1, lambda y: y[..., :0]):
        with pytest.raises(AssertionError, match="not right"):
            Judged(case).check(**{part: change(y) for part, y in answers.items()})


def test_a_leak_is_told_from_a_mistake():
    case = Judged(named("NaN in hidden keys and queries", **SOFTMAX))
    y = case.case.run()["y"] * np.nan
    with pytest.raises(AssertionError, match="NaN or infinities stand in what nobody may see"):
        case.check(y=y)


def test_inputs_are_copies_and_say_their_names():
    case = Judged(named("lse pulled", **SOFTMAX))
    case.q[:] = 0
    assert case.q.any() and case.dlse.shape == (6,)
    assert case.label == "lse pulled" and case.budget is case.case.budget
    with pytest.raises(AttributeError, match="has no dS; it has q, k, v, dy, dlse"):
        _ = case.dS


ROWS_FIRST = Convention("rows first", "1", "numpy", layout="b n h d")


def test_a_layout_is_given_and_taken_back():
    case = Judged(named("causal, more keys", **SOFTMAX), ROWS_FIRST)
    plain = case.case.run()
    assert case.q.shape == (1, 7, 1, 4) and case.k.shape == (1, 12, 1, 4)
    answers = {part: plain[part][None, :, None, :] for part in ("y", "dq", "dk", "dv")}
    case.check(**answers)
    with pytest.raises(AssertionError, match=r"has shape \(1, 1, 7, 4\), expected \(1, 7, 1, 4\)"):
        case.check(y=plain["y"][None, None] + 1)


def test_a_csr_mask_stays_one_for_numpy():
    case = Judged(named("hierarchical", mechanism="sparse_attention", dtype="float32"))
    assert case.options["mask"].shape == (15, 15) and hasattr(case.options["mask"], "indptr")
    case.assert_right(refattn.sparse_attention(case.q, case.k, case.v, **case.options))


TOP_LEFT = Convention("top left", "1", "numpy", causal="top-left")
DIFFERENT = [
    (SOFTMAX, "causal, more keys", TOP_LEFT, "causal is top-left there"),
    (SOFTMAX, "odd sizes", TOP_LEFT, ""),
    (
        {"mechanism": "local_attention", "dtype": "float32"},
        "odd sizes",
        Convention("w", "1", "numpy", window="counts itself"),
        "a window counts itself there",
    ),
    (
        SOFTMAX,
        "NaN in hidden keys and queries",
        Convention("nan", "1", "numpy", empty_row="NaN"),
        "a query with nothing to attend gives NaN there",
    ),
    (SOFTMAX, "lse pulled", Convention("nan", "1", "numpy", empty_row="NaN"), ""),
    (
        SOFTMAX,
        "odd sizes",
        Convention("same", "1", "numpy", same_columns=True),
        "v has as many columns as k there",
    ),
]


@pytest.mark.parametrize(("choice", "label", "convention", "words"), DIFFERENT)
def test_what_another_library_answers_otherwise_is_left_out(choice, label, convention, words):
    assert differs(named(label, **choice), convention) == words
