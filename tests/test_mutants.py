"""scripts/mutants.py: single changes that a seed fixes, in a sandbox that sees who is wrong."""

import difflib
import importlib
import itertools
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHIPPED = ROOT / "refattn" / "data" / "vectors"
FEW = ["softmax/merge.py", "sparse/plan.py", "linear/feature_maps.py"]
EXAMPLE = '''
"""2 words."""
import numpy as np

def shares(x, axis=-1):
    """A sum of 1, for 2 or more."""
    if x.ndim < 2:
        raise ValueError(f"{x.ndim + 1} came; expected {2}")
    total = np.where(x > 0, x, 0).sum(axis=axis)
    return x[:, 0] / total

def shares_cost(n):
    return 2 * n
'''


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(ROOT / "scripts"))
    yield importlib.import_module("mutants")
    sys.path.remove(str(ROOT / "scripts"))


@pytest.fixture(scope="module")
def grader(script, tmp_path_factory):
    """One sandbox for all, with the small set of vectors."""
    return script.Grader(tmp_path_factory.mktemp("mutants") / "home", SHIPPED, ("vectors",))


def texts(files):
    return {name: (ROOT / "refattn" / name).read_text(encoding="utf-8") for name in files}


def test_a_change_is_one_place_of_one_line_and_leaves_python(script):
    sources = texts(FEW)
    for file, change in itertools.islice(script.sample(sources, 1), 80):
        made = change.made(sources[file])
        compile(made, file, "exec")
        pairs = zip(sources[file].splitlines(), made.splitlines(), strict=True)
        assert [i for i, (a, b) in enumerate(pairs, 1) if a != b] == [change.line]
        old, new = (x.encode() for x in (sources[file], made))
        assert old[: change.start] == new[: change.start]
        assert old[change.end :] == new[change.start + len(change.new.encode()) :]


def test_what_is_changed_and_what_is_left_alone(script):
    found = {}
    for _, change in script.sample({"example.py": EXAMPLE}, 0):
        made = change.made(EXAMPLE)
        lines = difflib.ndiff(EXAMPLE.splitlines(), made.splitlines())
        after = next(line[2:].strip() for line in lines if line.startswith("+ "))
        found.setdefault(change.group, set()).add(after)
    assert found == {
        "operator": {
            "total = np.where(x < 0, x, 0).sum(axis=axis)",
            "return x[:, 0] * total",
        },
        "bound": {
            "total = np.where(x >= 0, x, 0).sum(axis=axis)",
            "return x[1:, 0] / total",
            "return x[:-1, 0] / total",
        },
        "index": {"return x[:, -1] / total", "return x[:, 1] / total"},
        "constant": {
            "total = np.where(x > 1, x, 0).sum(axis=axis)",
            "total = np.where(x > 0, x, 1).sum(axis=axis)",
            "def shares(x, axis=-2):",
            "def shares(x, axis=-0):",
        },
        "sign": {"def shares(x, axis=1):", "return -(x[:, 0] / total)"},
        "branch": {"total = x.sum(axis=axis)"},  # the other side is no Python: 0.sum
    }


def test_the_same_seed_gives_the_same_mutants(script):
    sources = texts(FEW[:1])
    first, again, other = (
        list(itertools.islice(script.sample(sources, seed), 60)) for seed in (3, 3, 4)
    )
    assert first == again != other
    assert len(set(first)) == len(first) > 20


def test_every_function_has_a_mutant_before_any_has_a_second(script):
    sources = texts(FEW[:2])
    places = [(file, change.function) for file, change in script.sample(sources, 0)]
    functions = set(places)
    assert set(places[: len(functions)]) == functions


def changed(script, kind, file, before, after):
    text = (ROOT / "refattn" / file).read_text(encoding="utf-8")
    assert text.count(before) == 1
    return {"kind": kind, "file": file, "function": "", "text": text.replace(before, after)}


@pytest.mark.parametrize(
    ("before", "after", "how"),
    [
        ("exp(s - top)", "exp(s - top)", ""),
        ("exp(s - top)", "exp(s + top)", "numbers"),
        ("lse = top + np.log(l)", "lse = top @ np.log(l)", "raised"),
        ("from refattn import checks", "from refattn import check", "raised"),
        ("    p = np.exp(s - top)", "    while True: p = np.exp(s - top)", "endless"),
        ("    p = np.exp(s - top)", "    __import__('os').abort()", "crashed"),
        ("    p = np.exp(s - top)", "    p = np.ones(2**40)", "raised"),
    ],
)
def test_the_truth(script, grader, monkeypatch, before, after, how):
    monkeypatch.setattr(script, "PROCESSOR", 1.5)
    result = grader.grade(changed(script, "truth", "softmax/merge.py", before, after))
    assert result["how"] == how, result
    assert result["verdict"] == ("caught" if how else "survived")
    assert result["by"] == ("vectors" if how else "")


def test_a_kernel(script, grader):
    """The forward alone: a copy as it is, then one that is wrong, with what was compiled kept."""
    ask = {"mechanisms": ["linformer_attention"], "gradients": False, "dtypes": ("float32",)}
    file = "linformer/cpu.py"
    mutant = changed(script, "numba", file, "cuts[part + 1]", "cuts[part + 0]")
    grader.sandbox.set("linformer/formula.py", grader.sandbox.text("linformer/formula.py"))
    found = grader.ask("numba", "vectors", **ask)
    assert (found["how"], found["lines"]) == ("", [])
    grader.sandbox.keep()
    grader.sandbox.set(file, mutant["text"])
    kept = [path.name for path in grader.sandbox.numba.glob("*/*")]
    assert any(name.startswith("tiles.attend-") for name in kept)
    assert not any(name.startswith("cpu._products-") for name in kept)
    found = grader.ask("numba", "vectors", **ask)
    grader.sandbox.reset()
    assert found["lines"][0]["how"] == "numbers"
    assert "linformer_attention" in found["lines"][0]["where"]


def test_the_record(script):
    """Enough of each kind, each once; caught by someone or not, and only survivors explained."""
    record = json.loads(script.RECORD.read_text(encoding="utf-8"))
    kinds = [m["kind"] for m in record["mutants"]]
    assert min(kinds.count(kind) for kind in ("numba", "truth")) >= 150
    assert len({script.key(m) for m in record["mutants"]}) == len(kinds)
    for m in record["mutants"]:
        assert m["before"] != m["after"]
        assert (m["verdict"] == "caught") == (m["by"] in script.STAGES)
        assert (m["verdict"] == "survived") == bool(m.get("explanation"))


def test_help(script, capsys):
    with pytest.raises(SystemExit):
        script.main(["--help"])
    assert "--resume FILE" in capsys.readouterr().out
