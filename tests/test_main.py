"""The command line: exit status, words, JSON."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import refattn
from refattn.__main__ import main
from refattn.verify.shell import MECHANISMS
from refattn.verify.vectors import load as load_vectors

KERNELS = """
import sys
import time
import numpy as np
import refattn

def right(q, k, v):
    return refattn.local_attention(q, k, v, window=(4, 0))

def softmax(q, k, v):
    return refattn.softmax_attention(q, k, v)

def softmax_vjp(dy, q, k, v):
    return refattn.softmax_attention_vjp(dy, q, k, v)

def wrong_vjp(dy, q, k, v):
    dq, dk, dv = refattn.softmax_attention_vjp(dy, q, k, v)
    return dq, 3 * dk, dv

def unscaled(q, k, v):
    return refattn.softmax_attention(q, k, v, scale=1.0)

def square_only(q, k, v):
    if len(q) != len(k):
        raise ValueError("n != m")
    return softmax(q, k, v)

def slow(q, k, v):
    time.sleep(5)

def empty(q, k, v):
    pass

def on_heads(q, k, v):
    assert q.shape[:2] == (2, 3)
    return softmax(q, k, v)

def prints(q, k, v):
    print("here I am")
    return softmax(q, k, v)

def leaves(q, k, v):
    sys.exit(0)

class Kernels:
    right = staticmethod(softmax)

number = 3
omega = {"omega": refattn.random_features(4, 6, rng=0)}
gate = {"gate": np.array(0.5), "window": 2, "attention": refattn.local_attention}
E = {"E": np.ones((2, 13)) / 13}
twice = {"window": 3}
unknown = {"dtype": "float16"}

def mask():
    return {"mask": refattn.masks.strided(13, 3)}

def leaving_options():
    sys.exit()

def broken_options():
    raise KeyError("no file")

def performer(q, k, v):
    return refattn.performer_attention(q, k, v, **omega)

def linformer(q, k, v):
    return refattn.linformer_attention(q, k, v, **E)

def sparse(q, k, v):
    return refattn.sparse_attention(q, k, v, **mask())

def gated(q, k, v):
    return refattn.gated_attention(q, k, v, **gate)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "my_kernels.py").write_text(KERNELS)
    (tmp_path / "my_broken.py").write_text("1 / 0")
    (tmp_path / "my_exit.py").write_text("import sys; print('bye'); sys.exit()")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "my_kernels", raising=False)
    return tmp_path


@pytest.fixture
def ask(folder, capsys):
    """The exit status, what was printed, and what went to stderr."""

    def run(kernel, mechanism, *options):
        try:
            status = main(["check", f"my_kernels:{kernel}", "--mechanism", mechanism, *options])
        except SystemExit as stopped:  # argparse's way out
            status = stopped.code
        return status, *capsys.readouterr()

    return run


def cases(out):
    return [line["case"] for line in json.loads(out)["lines"]]


def test_a_right_kernel_exits_with_0(ask):
    status, out, _ = ask("right", "local_attention", "--window", "4", "--causal")
    assert status == 0 and "right: right" in out
    status, *_ = ask("right", "local_attention", "--window", "4,0", "--dtype", "float16")
    assert status == 0
    assert ask("Kernels.right", "softmax_attention")[0] == 0


def test_a_wrong_kernel_exits_with_1_and_is_told_why(ask):
    status, out, _ = ask("unscaled", "softmax_attention")
    assert status == 1 and "scale missing" in out
    status, out, _ = ask("unscaled", "softmax_attention", "--json")
    report = json.loads(out)
    assert status == 1 and report["passed"] is False and "scale missing" in report["diagnosis"][0]
    assert {line["case"] for line in report["lines"]} >= {"one token", "more keys"}
    status, out, _ = ask("empty", "softmax_attention")
    assert status == 1 and "returned nothing" in out


def test_the_cases_can_be_chosen(ask):
    assert ask("square_only", "softmax_attention")[0] == 1
    status, out, _ = ask("square_only", "softmax_attention", "--cases", "square", "--json")
    assert status == 0 and not {"more keys", "fewer keys"} & set(cases(out))
    status, out, _ = ask("softmax", "softmax_attention", "--cases", "tiles", "--json")
    assert status == 0 and "three tiles" in cases(out)
    sizes = ["--size", "3,3,2,2", "--size", "5,4,2,3"]
    status, out, _ = ask("softmax", "softmax_attention", *sizes, "--json")
    assert status == 0 and cases(out)[:2] == ["n 3, m 3, d 2, e 2", "n 5, m 4, d 2, e 3"]


def test_leading_axes_can_be_asked_for(ask):
    assert ask("on_heads", "softmax_attention")[0] == 1
    assert ask("on_heads", "softmax_attention", "--lead", "2,3")[0] == 0


def test_gradients_of_a_function(ask):
    options = ["--size", "5,5,4,3", "--gradients"]
    assert ask("softmax", "softmax_attention", *options, "my_kernels:softmax_vjp")[0] == 0
    status, out, _ = ask("softmax", "softmax_attention", *options, "my_kernels:wrong_vjp")
    assert status == 1 and "dk is 3 times what is wanted" in out


def test_automatic_gradients_of_a_library(ask, folder):
    pytest.importorskip("torch")
    (folder / "my_tensors.py").write_text(
        "import torch\n"
        "def kernel(q, k, v):\n"
        "    return torch.nn.functional.scaled_dot_product_attention(q, k, v)\n"
    )
    for library in (["--like", "torch"], ["--xp", "torch", "--device", "cpu"]):
        options = ["--mechanism", "softmax_attention", "--size", "5,5,4,4", "--gradients"]
        assert main(["check", "my_tensors:kernel", *options, *library]) == 0
    status, _, words = ask("softmax", "softmax_attention", "--xp", "torch", "--device", "abacus")
    assert status == 2 and "device is 'abacus'" in words


@pytest.mark.parametrize(
    ("kernel", "mechanism", "named"),
    [
        ("performer", "performer_attention", "omega"),
        ("linformer", "linformer_attention", "E"),
        ("sparse", "sparse_attention", "mask"),
        ("gated", "gated_attention", "gate"),
    ],
)
def test_options_that_are_arrays_come_from_python(ask, kernel, mechanism, named):
    options = ["--options", f"my_kernels:{named}"]
    status, out, _ = ask(kernel, mechanism, *options)
    assert status == 0, out
    assert ask("empty", mechanism, *options)[0] == 1
    status, _, words = ask(kernel, mechanism)
    assert status == 2
    assert f"{mechanism} needs {named}: give it by --options MODULE:NAME" in words


def test_flags_join_the_options_from_python(ask):
    options = ["--options", "my_kernels:omega", "--scale", "0.5"]
    assert ask("performer", "performer_attention", *options)[0] == 1


@pytest.mark.parametrize(
    ("kernel", "options", "words"),
    [
        ("my_kernels", [], "expected MODULE:NAME"),
        (":right", [], "expected MODULE:NAME"),
        ("no_such:thing", [], "'no_such' cannot be imported: ModuleNotFoundError"),
        ("my_broken:thing", [], "'my_broken' cannot be imported: ZeroDivisionError"),
        ("my_kernels:missing", [], "has no 'missing'"),
        ("my_exit:thing", [], "'my_exit' cannot be imported: SystemExit"),
        ("my_kernels.py:right", [], "expected MODULE:NAME, such as my_kernels:right"),
        ("my_kernels:right", ["--options", "my_kernels:leaving_options"], "raised SystemExit"),
        ("my_kernels:number", [], "kernel my_kernels:number is int; expected a function"),
        ("my_kernels:right", ["--window", "3"], "softmax_attention has no option window"),
        ("my_kernels:right", ["--softcap", "-1"], "softcap is -1.0"),
        ("my_kernels:right", ["--xp", "no_such"], "xp is 'no_such', which cannot be imported"),
        ("my_kernels:right", ["--gradients"], "gradients=True came for arrays of numpy"),
        ("my_kernels:right", ["--gradients", "my_kernels:number"], "gradients my_kernels:number"),
        ("my_kernels:right", ["--options", "my_kernels:number"], "is int; expected a dict"),
        ("my_kernels:right", ["--options", "my_kernels:broken_options"], "raised KeyError"),
        ("my_kernels:right", ["--options", "my_kernels:omega"], "has no option omega"),
        ("my_kernels:right", ["--options", "my_kernels:unknown"], "has no option dtype"),
    ],
)
def test_what_cannot_be_asked_exits_with_2(folder, capsys, kernel, options, words):
    assert main(["check", kernel, "--mechanism", "softmax_attention", *options]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("mechanism", "options", "words"),
    [
        ("local_attention", [], "local_attention needs window: give it by --window"),
        (
            "local_attention",
            ["--window", "3", "--options", "my_kernels:twice"],
            "window came twice: as --window and in my_kernels:twice",
        ),
        ("local_attention", ["--window", "1,2,3"], "expected 1 or 2 integers >= 0, such as 8,4"),
        ("local_attention", ["--window", "wide"], "'wide' came; expected 1 or 2 integers"),
        ("softmax_attention", ["--size", "3,3"], "'3,3' came; expected 4 integers >= 0"),
        ("softmax_attention", ["--lead", "0"], "integers >= 1"),
        ("softmax_attention", ["--time-limit", "0"], "'0' came; expected seconds > 0"),
        ("softmax_attention", ["--time-limit", "soon"], "'soon' came; expected seconds > 0"),
        ("softmax_attention", ["--cases", "few"], "invalid choice: 'few'"),
        ("softmax_attention", ["--cases", "tiles", "--size", "1,1,1,1"], "not allowed with"),
        ("softmax_attention", ["--like", "abacus"], "invalid choice: 'abacus'"),
    ],
)
def test_what_is_misspelt_exits_with_2(ask, mechanism, options, words):
    status, _, told = ask("right", mechanism, *options)
    assert status == 2 and words in told


def test_a_time_limit(ask):
    options = ["--size", "2,2,2,2", "--time-limit", "0.02"]
    status, out, _ = ask("slow", "softmax_attention", *options)
    assert status == 1 and "took longer than 0.02 s" in out


@pytest.mark.parametrize(
    ("terminal", "disabled", "options", "shown"),
    [
        (True, "", [], True),
        (False, "", [], False),
        (True, "1", [], False),
        (True, "", ["--json"], False),
    ],
)
def test_a_bar_where_somebody_looks(ask, monkeypatch, terminal, disabled, options, shown):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    monkeypatch.setenv("TQDM_DISABLE", disabled)
    status, out, words = ask("softmax", "softmax_attention", "--size", "2,2,2,2", *options)
    assert status == 0 and ("n 2, m 2, d 2, e 2" in words) is shown
    assert "n 2, m 2, d 2, e 2" in out


def test_costs(capsys):
    assert main(["cost", "--n", "256", "--d", "16", "--only", "soft"]) == 0
    out = capsys.readouterr().out
    flops = refattn.softmax_attention_cost(256, 256, 16, 16).flops
    assert f"{flops:,}" in out and "n = m = 256" in out
    assert main(["cost", "--only", "nothing like it"]) == 2
    assert main(["cost", "--n", "64"]) == 0


@pytest.mark.parametrize("option", ["--n", "--d", "--itemsize"])
@pytest.mark.parametrize("value", ["0", "-1", "1.5", "many"])
def test_costs_of_no_size(capsys, option, value):
    with pytest.raises(SystemExit) as stopped:
        main(["cost", f"{option}={value}"])
    assert stopped.value.code == 2
    assert f"{value!r} came; expected an integer >= 1" in capsys.readouterr().err


def test_costs_of_too_many_tokens(capsys):
    assert main(["cost", "--n", "1000000"]) == 2
    assert "n is 1,000,000" in capsys.readouterr().err


def test_json_stands_alone(ask):
    status, out, words = ask("prints", "softmax_attention", "--size", "2,2,2,2", "--json")
    assert status == 0 and json.loads(out)["passed"] and "here I am" in words
    assert "here I am" in ask("prints", "softmax_attention", "--size", "2,2,2,2")[1]


def test_a_kernel_that_exits_is_not_right(ask):
    status, out, words = ask("leaves", "softmax_attention", "--size", "2,2,2,2")
    assert status in (1, 2) and "SystemExit" in out + words


def test_what_check_refuses_is_not_offered(ask):
    _, _, words = ask("right", "softmax_attention", "--window", "3")
    assert "it has mask" in words and "return_" not in words


def test_help_teaches(capsys):
    with pytest.raises(SystemExit):
        main(["check", "--help"])
    out = capsys.readouterr().out
    assert out.count("python -m refattn check kernels:") == 3
    assert all(name in out for name in MECHANISMS)


def test_as_a_module():
    run = subprocess.run(
        [sys.executable, "-m", "refattn", "cost", "--n", "64", "--d", "8"],
        cwd=Path(refattn.__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "softmax" in run.stdout


def test_bench(capsys, monkeypatch):
    from refattn import bench
    from refattn.works import Work, both, forward

    small = [
        Work("local", (1, 64, 8), forward(refattn.local_attention, window=4), 10),
        Work(
            "both",
            (1, 64, 8),
            both(refattn.softmax_attention, refattn.softmax_attention_vjp, True),
        ),
        Work(
            "neither",
            (1, 64, 8),
            both(refattn.local_attention, refattn.local_attention_vjp, window=2),
        ),
    ]
    monkeypatch.setattr(bench, "works", lambda: small)
    monkeypatch.setattr(bench, "matmul_rate", lambda: 1e9)
    sizes = ((64, 128), lambda n: {"window": 4}, "local_attention", 1.05)
    monkeypatch.setattr(bench, "GROWTH", {"local": sizes})
    monkeypatch.setattr(bench, "MEMORY_OF", {"local_attention": ("{'window': 4}", (64,))})
    monkeypatch.setattr(bench, "FIRST_OF", {"local_attention": "{'window': 4}"})
    assert main(["bench", "--seconds", "0.01", "--growth", "--memory", "--starts"]) == 0
    out = capsys.readouterr().out
    assert "local" in out and "slope" in out and "MB by N" in out and "64: " in out
    compiled, cached = map(float, out.splitlines()[-1].split()[-2:])
    assert compiled > cached > 0
    assert main(["bench", "--only", "abacus"]) == 2
    assert "no work's name holds 'abacus'" in capsys.readouterr().err


def vectors(capsys, *arguments):
    """The exit status, what was printed, and what went to stderr."""
    try:
        status = main(["vectors", *map(str, arguments)])
    except SystemExit as stopped:
        status = stopped.code
    return status, *capsys.readouterr()


def test_vectors_are_written_and_counted(tmp_path, capsys):
    folder = tmp_path / "new" / "vectors"
    status, out, err = vectors(capsys, folder, "--only", "merge_attention/two parts")
    counted, digest = out.splitlines()
    assert status == 0 and err == ""
    assert counted == f"4 cases of 1 mechanism in {folder}"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert digest == f"digest {manifest['digest']}"
    cases = load_vectors(folder)
    assert [case.label for case in cases] == ["two parts"] * 4


def test_vectors_of_the_small_set_alone(tmp_path, capsys):
    status, out, _ = vectors(capsys, tmp_path, "--small", "--only", "merge_attention/")
    shipped = load_vectors(mechanism="merge_attention")
    assert status == 0 and out.startswith(f"{len(shipped)} cases")


def test_vectors_that_cannot_be_written_are_refused(tmp_path, capsys):
    status, out, err = vectors(capsys, tmp_path, "--only", "no such case")
    assert (status, out) == (2, "")
    assert "no case's name holds 'no such case'; names are like 'gated_attention/" in err
    (tmp_path / "notes.txt").write_text("mine")
    status, out, err = vectors(capsys, tmp_path, "--only", "merge_attention/two parts/float32")
    assert (status, out) == (2, "") and "holds notes.txt; expected an empty folder" in err
    assert vectors(capsys)[0] == 2


def test_vectors_show_a_bar_where_somebody_looks(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    _, _, err = vectors(capsys, tmp_path, "--only", "merge_attention/two parts")
    assert "merge_attention/two parts/float32" in err and "%" in err
