"""Vectors: what they hold, that they come out the same, and that others can read them."""

import hashlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import refattn
from definitions.softmax import softmax_attention as softmax_definition
from numbers_of import loops
from refattn.verify.cases import cast, number_type
from refattn.verify.compare import compare
from refattn.verify.vectors import Case, load, made, truth, write
from refattn.verify.vectors import files as folder_of_vectors
from refattn.verify.vectors.call import answers_of, gradients_of
from refattn.verify.vectors.draws import Draws
from refattn.verify.vectors.entry import DTYPES
from refattn.verify.vectors.formats import npz, read_safetensors, safetensors
from refattn.verify.vectors.table import entries

ROOT = Path(__file__).parents[1]
SHIPPED = folder_of_vectors.SHIPPED
ENTRIES = entries()
CASES = load()
MECHANISMS = [name for name in refattn.__all__ if hasattr(refattn, f"{name}_vjp")]
BESIDE = ["linear_attention_step", "merge_attention"]
DOCUMENT = (ROOT / "docs" / "vectors.md").read_text(encoding="utf-8")


def blocks(language):
    """The fenced code of docs/vectors.md in a language."""
    return re.findall(rf"```{language}\n(.*?)```", DOCUMENT, re.DOTALL)


def run(*command, **environment):
    return subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"TQDM_DISABLE": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def sha(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


# What the table holds.


def test_every_mechanism_has_entries_and_a_place_in_the_small_set():
    assert {e.mechanism for e in ENTRIES} == {*MECHANISMS, *BESIDE}
    small = {(c.mechanism, c.dtype) for c in CASES}
    assert small == {(m, dtype) for m in (*MECHANISMS, *BESIDE) for dtype in DTYPES}


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_every_mechanism_meets_the_edges(mechanism):
    mine = [e for e in ENTRIES if e.mechanism == mechanism]
    sizes = {e.sizes[:2] for e in mine}
    square = mechanism == "two_level_attention"
    assert (1, 1) in sizes
    assert any(n % 2 and n == m > 1 for n, m in sizes)
    assert any(n < m for n, m in sizes) or square
    assert any(n > m for n, m in sizes) or square or mechanism == "gated_attention"
    assert any(max(s) > 64 for s in sizes)
    assert any(len(e.sizes.heads) > 1 for e in mine)
    assert any(e.dtypes == DTYPES for e in mine)


def taken(mechanism):
    parameters = inspect.signature(getattr(refattn, mechanism)).parameters
    plain = [name for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY]
    return set(plain) - {"backend"}


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_every_option_of_every_mechanism_is_met(mechanism):
    met = set()
    for entry in ENTRIES:
        if entry.mechanism == mechanism:
            met |= set(entry.build("float64")[1])
    assert taken(mechanism) <= met


CHOICES = {
    ("linear_attention", "feature_map"): {"elu", "relu", "softmax", "taylor"},
    ("linear_attention_chunked", "feature_map"): {"elu", "relu", "softmax", "taylor"},
    ("performer_attention", "kind"): {"positive", "trig", "hyperbolic"},
    ("block_attention", "fuse"): {"concat", "sum", "mean", "max", "weighted", "exact"},
    ("two_level_attention", "pool"): {"mean", "max"},
}


def test_every_choice_is_met_and_every_attention_is_gated():
    for (name, option), wanted in CHOICES.items():
        built = [e.build("float64")[1] for e in ENTRIES if e.mechanism == name]
        default = {"fuse": "concat", "pool": "mean", "kind": "positive", "feature_map": "elu"}
        assert {o.get(option, default[option]) for o in built} == wanted, name
    gated = [e.build("float64")[1] for e in ENTRIES if e.mechanism == "gated_attention"]
    inner = {o.get("attention", refattn.softmax_attention).__name__ for o in gated}
    assert inner == set(MECHANISMS) - {"gated_attention"}


def test_a_name_stands_once(monkeypatch):
    from refattn.verify.vectors.table import linear

    monkeypatch.setattr(linear, "ENTRIES", [*linear.ENTRIES, linear.ENTRIES[0]])
    with pytest.raises(ValueError, match=r"linear_attention.*twice"):
        entries()


def test_numbers_that_a_dtype_has_no_room_for_are_refused():
    from dataclasses import replace

    def change(inputs, options, sizes, draws):
        inputs["k"] += 1e5

    with pytest.raises(ValueError, match="odd sizes: k has no room in float16"):
        replace(ENTRIES[[e.label for e in ENTRIES].index("odd sizes")], change=change).build(
            "float16"
        )


def test_draws_are_those_of_integers():
    """By hand from the generator's raw integers: nothing else goes in."""
    rng = np.random.default_rng(Draws("x").rng.bit_generator.seed_seq.entropy)
    raw = rng.bit_generator.random_raw(4 * 3).reshape(4, 3)
    u = [[(int(x) >> 11) * 2.0**-53 for x in row] for row in raw]
    wanted = [3.0**0.5 * (((a + b) + (c + d)) - 2.0) for a, b, c, d in zip(*u, strict=True)]
    assert Draws("x").normal((3,)).tolist() == wanted
    many = Draws("many").normal((40_000,))
    assert abs(many.mean()) < 5 / 200 and abs(many.var() - 1) < 5 * 2**0.5 / 200


# What a case says of kernels.


@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_our_own_kernels_pass(backend):
    lines = [line for case in CASES for line in case.compare(case.run(backend))]
    assert len(lines) == sum(len(case.wanted) for case in CASES)
    assert not [str(line) for line in lines if line.trouble]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_budget_is_above_the_error_and_below_a_mistake(case):
    answers = case.run()
    assert set(answers) == set(case.wanted)
    for part, wanted in case.wanted.items():
        eps = 2.0**-7 if case.dtype == "bfloat16" else np.finfo(case.dtype).eps
        size = abs(wanted[np.isfinite(wanted)]).max(initial=0)
        assert 0 <= case.error[part] < case.budget[part]
        assert case.error[part] <= 2.0**-52 * max(1.0, size)
        off = np.where(np.isfinite(wanted), wanted + 2 * case.budget[part], wanted)
        lines = case.compare({part: off})
        assert bool(lines[0].trouble) == bool(np.isfinite(wanted).any())
        assert case.budget[part] < 400 * eps * max(1.0, size), part  # a share of the array


@pytest.mark.parametrize("part", ["y", "dq", "lse"])
def test_one_wrong_entry_is_named(part):
    (case,) = [
        c for c in load(mechanism="softmax_attention", dtype="float32") if c.label == "lse pulled"
    ]
    answers = case.run()
    answers[part] = answers[part].copy()
    answers[part][-1] += 0.5
    troubles = {line.case.rpartition(": ")[2]: line.trouble for line in case.compare(answers)}
    assert [name for name, words in troubles.items() if words] == [part]
    assert f"({len(answers[part]) - 1}," in troubles[part]


def test_compare_says_what_it_was_not_given():
    case = CASES[0]
    with pytest.raises(ValueError, match=rf"nothing came for {case.name}; expected some of y"):
        case.compare({})
    with pytest.raises(ValueError, match=r"z came .* expected some of y"):
        case.compare({"z": 0})
    (line,) = case.compare({"y": np.zeros(3)})
    assert line.trouble.startswith("has shape (3,), expected")


def test_bfloat16_of_torch_is_taken():
    torch = pytest.importorskip("torch")
    case = load(mechanism="local_attention", dtype="bfloat16")[0]
    y = torch.from_numpy(case.run()["y"].astype(np.float32)).to(torch.bfloat16).requires_grad_()
    (line,) = case.compare({"y": y})
    assert not line.trouble


def test_gradients_stand_in_the_order_of_the_contract():
    options = {"initial_state": 1, "gate": 1, "E": 1, "F": 1, "bias": 1, "weights": None}
    wanted = ["dq", "dk", "dv", "dbias", "dE", "dF", "dgate", "dS0", "dz0"]
    assert gradients_of(options) == wanted


# Files.


@pytest.fixture(scope="module")
def again(tmp_path_factory):
    """The small set, written anew."""
    folder = tmp_path_factory.mktemp("vectors")
    write(folder, made(small=True))
    return folder


def test_the_small_set_is_what_the_table_gives(again):
    """Inputs to the byte, what is wanted within its error; E, and so budgets, about the same."""
    fresh = {case.name: case for case in load(again)}
    assert list(fresh) == [case.name for case in CASES]
    for case in CASES:
        new = fresh[case.name]
        for old_arrays, new_arrays in ((case.inputs, new.inputs), (case.options, new.options)):
            assert list(old_arrays) == list(new_arrays)
            for name, x in old_arrays.items():
                assert same(x, new_arrays[name]), (case.name, name)
        for part, wanted in case.wanted.items():
            line = compare(case.name, new.wanted[part], wanted, case.error[part] + new.error[part])
            assert not line.trouble, str(line)
            assert 0.25 < new.budget[part] / case.budget[part] < 4.0, (case.name, part)


def same(x, y):
    if isinstance(x, tuple):
        return all(map(same, x, y))
    if hasattr(x, "indptr"):
        return same(x.indptr, y.indptr) and same(x.indices, y.indices) and x.shape == y.shape
    if isinstance(x, np.ndarray):
        return x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()
    return x == y


@pytest.mark.slow
def test_the_same_bytes_for_any_number_of_threads(tmp_path):
    found = []
    for threads in "12":
        libraries = "OMP", "OPENBLAS", "NUMBA"
        counts = {f"{name}_NUM_THREADS": threads for name in libraries}
        folder = tmp_path / threads
        done = run(sys.executable, "-m", "refattn", "vectors", str(folder), "--small", **counts)
        assert done.returncode == 0, done.stderr
        digest = re.search("digest ([0-9a-f]{64})", done.stdout)[1]
        found.append((digest, {path.name: sha(path) for path in folder.iterdir()}))
    assert found[0] == found[1]


def test_writing_again_replaces_what_was_written(tmp_path):
    folder = tmp_path / "new" / "vectors"
    first = write(folder, load(mechanism=["merge_attention", "local_attention"]))
    second = write(folder, load(mechanism="merge_attention"))
    names = ["manifest.json", "merge_attention.npz", "merge_attention.safetensors"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert first != second == write(folder, load(folder))
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds notes.txt; expected an empty folder"):
        write(folder, CASES[:1])
    assert (folder / "notes.txt").read_text() == "mine"
    with pytest.raises(ValueError, match=r"notes.txt is a file; expected a folder"):
        write(folder / "notes.txt", CASES[:1])


def test_both_files_hold_the_same_and_safetensors_agrees():
    load_file = pytest.importorskip("safetensors.numpy").load_file
    manifest = json.loads((SHIPPED / "manifest.json").read_text())
    for name in MECHANISMS:
        arrays = load_file(SHIPPED / f"{name}.safetensors")
        records = [case for case in manifest["cases"] if case["mechanism"] == name]
        wanted = {f"{c['name']}/{role}": e for c in records for role, e in c["arrays"].items()}
        assert set(arrays) == set(wanted)
        with np.load(SHIPPED / f"{name}.npz") as file:
            assert set(file.files) == set(wanted)
            for key, entry in wanted.items():
                x, y = arrays[key], file[key]
                assert hashlib.sha256(x.tobytes()).hexdigest() == entry["sha256"]
                assert x.dtype.name == entry["dtype"] and list(x.shape) == entry["shape"]
                assert y.dtype.name == entry["dtype"].replace("bfloat16", "float32")
                assert same(x.astype(y.dtype), y)


def test_formats_by_hand(tmp_path):
    """One array of each file, from the bytes that their descriptions give."""
    arrays = {"b/y": np.array([[1.5, np.nan]], np.float32), "a": np.array([True, False])}
    data = safetensors(arrays)
    header = (
        b'{"b/y":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]},'
        b'"a":{"dtype":"BOOL","shape":[2],"data_offsets":[8,10]}}'
    )
    header += b" " * (-len(header) % 8)
    assert data[:8] == len(header).to_bytes(8, "little")
    assert data[8 : 8 + len(header)] == header
    assert data[8 + len(header) :] == bytes.fromhex("0000c03f 0000c07f 01 00")
    assert list(read_safetensors(data, lambda name: name == "a")) == ["a"]
    (tmp_path / "x.npz").write_bytes(npz(arrays))
    with np.load(tmp_path / "x.npz") as file:
        assert same(file["b/y"], arrays["b/y"]) and same(file["a"], arrays["a"])


def test_every_nan_is_the_same():
    odd = np.array([0x7FC00001, 0xFFC00000, 0x7F800001], np.uint32).view(np.float32)
    data = safetensors({"x": odd})
    assert data[-12:] == bytes.fromhex("0000c07f") * 3
    half = number_type("bfloat16").type(np.nan)
    assert safetensors({"x": -np.array([half])})[-2:] == bytes.fromhex("c07f")


def test_what_is_not_certain_is_refused(monkeypatch):
    def answers(mechanism, inputs, options):
        return {"y": (np.zeros((1, 3)), np.array([[0.0, np.inf, 0.0]]))}

    monkeypatch.setattr(truth, "answers", answers)
    monkeypatch.setattr(truth, "budgets", lambda *given: {"y": 1.0})
    with pytest.raises(ValueError, match=r"y is known to inf, a kernel to 1\.0e.00"):
        made("softmax_attention/one token/float32")


def test_the_manifest_is_plain_json():
    """Without NaN and Infinity, which only Python reads."""

    def refuse(word):
        raise AssertionError(word)

    json.loads((SHIPPED / "manifest.json").read_text(), parse_constant=refuse)


def test_the_sizes_are_kept():
    shipped = sum(path.stat().st_size for path in SHIPPED.iterdir())
    assert shipped < 1_100_000
    assert (SHIPPED / "manifest.json").read_bytes().count(b"\n") < 400  # a case a line


def broken(folder, change):
    """A copy of the small set with one file changed."""
    shutil.copytree(SHIPPED, folder)
    change(folder)
    return folder


def rewritten(name, old, new):
    def change(folder):
        text = (folder / name).read_bytes()
        assert old in text
        (folder / name).write_bytes(text.replace(old, new, 1))

    return change


def without(name):
    return lambda folder: (folder / name).unlink()


BROKEN = {
    "changed bytes": (
        lambda folder: _flip(folder / "local_attention.safetensors"),
        r"local_attention.safetensors has changed: its SHA-256 is",
    ),
    "another version": (
        rewritten("manifest.json", b'"format": 1', b'"format": 2'),
        r"manifest.json has format 2; this refattn .* reads 1",
    ),
    "no JSON": (rewritten("manifest.json", b"{", b"<"), r"manifest.json is no manifest of vectors"),
    "no format": (rewritten("manifest.json", b'"format"', b'"f"'), r"is no manifest of vectors"),
    "a missing file": (
        without("local_attention.safetensors"),
        r"has no local_attention.safetensors, which its manifest.json names",
    ),
    "no manifest": (without("manifest.json"), r"has no manifest.json; expected a folder that"),
}


def _flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_folder_is_refused(name, tmp_path):
    change, words = BROKEN[name]
    folder = broken(tmp_path / "vectors", change)
    with pytest.raises(ValueError, match=words):
        load(folder, mechanism="local_attention")


def test_a_folder_or_a_name_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere has no manifest.json"):
        load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="mechanism is 'softmax'; expected one of gated_attention"):
        load(mechanism="softmax")
    with pytest.raises(ValueError, match="dtype is 'float8'; expected one of float64, float32"):
        load(dtype=["float32", "float8"])


def test_a_choice_is_kept():
    two = load(mechanism=["local_attention", "sparse_attention"], dtype="float16")
    assert {(c.mechanism, c.dtype) for c in two} == {
        ("local_attention", "float16"),
        ("sparse_attention", "float16"),
    }
    assert all(isinstance(case, Case) for case in two)
    sparse = next(case for case in two if case.mechanism == "sparse_attention")
    assert sparse.options["mask"].dtype == bool
    gated = load(mechanism="gated_attention", dtype="float32")
    assert all(callable(c.options.get("attention", print)) for c in gated)


def test_without_ml_dtypes_bfloat16_is_left_out_unless_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    assert {case.dtype for case in load()} == set(DTYPES) - {"bfloat16"}
    with pytest.raises(ValueError, match="needs ml_dtypes"):
        load(dtype="bfloat16")


def test_what_is_wanted_is_what_loops_give():
    """By the definition that shares no code with refattn, in float64."""
    cases = load(mechanism="softmax_attention", dtype="float32")
    cases = [case for case in cases if "causal" in case.options]
    assert cases
    for case in cases:
        arrays = (case.inputs[name].astype(float) for name in "qkv")
        y = loops(softmax_definition, *arrays, {"causal": True})
        assert abs(y - case.wanted["y"]).max() < 32 * 2.0**-52 * abs(y).max()


# Others read them.


def test_the_reader_in_python_reads(tmp_path):
    (code,) = blocks("python")
    script = tmp_path / "reader.py"
    script.write_text(code)
    assert "refattn" not in re.sub(r"#.*", "", code)
    done = run(sys.executable, "-I", str(script), str(SHIPPED))
    assert done.returncode == 0, done.stderr
    held = re.findall(r"^softmax_attention/.*/(float64|float32): \S+ of \S+$", done.stdout, re.M)
    assert sorted(set(held)) == ["float32", "float64"]
    script.write_text(code.replace("/ np.sqrt(q.shape[-1])", ""))
    assert "AssertionError" in run(sys.executable, "-I", str(script), str(SHIPPED)).stderr


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """The reader in C++, compiled without a warning."""
    if shutil.which("g++") is None:
        pytest.skip("there is no g++")
    folder = tmp_path_factory.mktemp("reader")
    (code,) = blocks("cpp")
    (folder / "reader.cpp").write_text(code)
    strict = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror"]
    done = run("g++", *strict, str(folder / "reader.cpp"), "-o", str(folder / "reader"))
    assert done.returncode == 0, done.stderr
    return folder / "reader"


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_the_reader_in_cpp_reads(reader, dtype, tmp_path):
    case = load(mechanism="softmax_attention", dtype=dtype)[0]
    assert not set(case.options) - {"return_lse"}
    file = SHIPPED / "softmax_attention.safetensors"
    budget = f"{case.budget['y']:.17g}"
    done = run(str(reader), str(file), case.name, budget)
    assert done.returncode == 0 and case.name in done.stdout, done.stdout + done.stderr
    arrays = read_safetensors(file.read_bytes())
    arrays[f"{case.name}/y"][-1, -1] += 2 * case.budget["y"]
    (tmp_path / "wrong.safetensors").write_bytes(safetensors(arrays))
    done = run(str(reader), str(tmp_path / "wrong.safetensors"), case.name, budget)
    assert done.returncode == 1, done.stdout + done.stderr
    assert run(str(reader), str(file), "softmax_attention/none", budget).returncode not in (0, 1)


def test_the_document_tells_the_numbers_that_are():
    cases = sum(len(entry.dtypes) for entry in ENTRIES)
    assert f"({cases} cases, " in DOCUMENT
    assert f"A small set of {len(CASES)} cases" in DOCUMENT
    names = {role for case in CASES for role in case.wanted}
    roles = {role for case in CASES for role in folder_of_vectors._roles(case)}
    for role in names | roles:
        assert f"`{role}`" in DOCUMENT, role


# In float32 the formula of a case is within its budget in any dtype that is as wide.


def test_a_wider_kernel_passes_too():
    for case in load(dtype="float16"):
        if case.mechanism == "merge_attention":
            continue
        wide = {name: cast(x, np.dtype(np.float64)) for name, x in case.inputs.items()}
        options = {name: cast(x, np.dtype(np.float64)) for name, x in case.options.items()}
        again = Case(case.name, case.mechanism, "float64", options, wide, case.wanted, case.error,
                     case.budget)  # fmt: skip
        assert not [str(line) for line in again.compare(again.run()) if line.trouble]


@pytest.mark.slow
def test_all_cases_of_the_table_are_passed_by_both_backends(monkeypatch):
    """Beside the float64 formula, which is quick: what is certain is for tests/test_certain.py."""

    def answers(mechanism, inputs, options):
        parts = [
            {name: cast(x, np.dtype(np.float64)) for name, x in part.items()}
            for part in (inputs, options)
        ]
        return {part: (x, np.zeros(x.shape)) for part, x in answers_of(mechanism, *parts).items()}

    monkeypatch.setattr(truth, "answers", answers)
    wrong = []
    for case in made():
        for backend in ("numpy", "numba"):
            lines = case.compare(case.run(backend))
            wrong += [f"{backend} {line}" for line in lines if line.trouble]
    assert not wrong
