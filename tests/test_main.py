"""The command line: exit status, words, JSON."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import refattn
from refattn.__main__ import MECHANISMS, main

KERNELS = """
import numpy as np
import refattn

def right(q, k, v):
    return refattn.local_attention(q, k, v, window=(4, 0))

def unscaled(q, k, v):
    return refattn.softmax_attention(q, k, v, scale=1.0)

def empty(q, k, v):
    pass

number = 3
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "my_kernels.py").write_text(KERNELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "my_kernels", raising=False)
    return tmp_path


def test_a_right_kernel_exits_with_0(folder, capsys):
    options = ["--mechanism", "local_attention", "--window", "4", "--causal"]
    assert main(["check", "my_kernels:right", *options]) == 0
    assert "right: right" in capsys.readouterr().out
    options = ["--mechanism", "local_attention", "--window", "4,0", "--dtype", "float16"]
    assert main(["check", "my_kernels:right", *options, "--square"]) == 0


def test_a_wrong_kernel_exits_with_1_and_is_told_why(folder, capsys):
    assert main(["check", "my_kernels:unscaled", "--mechanism", "softmax_attention"]) == 1
    assert "scale missing" in capsys.readouterr().out
    main(["check", "my_kernels:unscaled", "--mechanism", "softmax_attention", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["passed"] is False and "scale missing" in report["diagnosis"][0]
    assert {line["case"] for line in report["lines"]} >= {"one token", "more keys"}
    assert main(["check", "my_kernels:empty", "--mechanism", "softmax_attention"]) == 1
    assert "returned nothing" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("kernel", "options", "words"),
    [
        ("my_kernels", [], "expected MODULE:FUNCTION"),
        ("no_such:thing", [], "'no_such' cannot be imported"),
        ("my_kernels:missing", [], "has no function 'missing'"),
        ("my_kernels:number", [], "has no function 'number'"),
        ("my_kernels:right", ["--window", "3"], "softmax_attention has no option window"),
        ("my_kernels:right", ["--softcap", "-1"], "softcap is -1.0"),
    ],
)
def test_what_cannot_be_asked_exits_with_2(folder, capsys, kernel, options, words):
    assert main(["check", kernel, "--mechanism", "softmax_attention", *options]) == 2
    assert words in capsys.readouterr().err


def test_costs(capsys):
    assert main(["cost", "--n", "256", "--d", "16", "--only", "soft"]) == 0
    out = capsys.readouterr().out
    flops = refattn.softmax_attention_cost(256, 256, 16, 16).flops
    assert f"{flops:,}" in out and "n = m = 256" in out
    assert main(["cost", "--only", "nothing like it"]) == 2
    assert main(["cost", "--n", "64"]) == 0


def test_help_teaches(capsys):
    with pytest.raises(SystemExit):
        main(["check", "--help"])
    out = capsys.readouterr().out
    assert "example:" in out and all(name in out for name in MECHANISMS)


def test_as_a_module():
    run = subprocess.run(
        [sys.executable, "-m", "refattn", "cost", "--n", "64", "--d", "8"],
        cwd=Path(refattn.__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "softmax" in run.stdout
