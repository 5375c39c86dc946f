"""Every barrier and every guard of the kernels is needed: without it, some order of the threads
gives another answer, or an index leaves its array.

A kernel module is compiled again without the one statement and put in the place of the module as it
is, so the calls below go through its wrappers as always. A new module needs calls that reach all of
its barriers, under its folder's name.
"""

import ast
import functools
import importlib
import inspect
import pathlib
import sys
from types import ModuleType

import numpy as np
import pytest
from scipy.sparse import csr_array

import refattn
from refattn.linear import cuda_maps
from variants import barriers, notices, without

ROOT = pathlib.Path(refattn.__file__).parent


def arrays(n, m, d, e):
    rng = np.random.default_rng([n, m, d, e])
    return [rng.standard_normal(s).astype(np.float32) for s in ((n, e), (n, d), (m, d), (m, e))]


def call(attention, shape, **options):
    """Run an attention and its gradient on arrays of this shape."""

    def run():
        dy, *inputs = arrays(*shape)
        forward, vjp = (getattr(refattn, name) for name in (attention, f"{attention}_vjp"))
        y = forward(*inputs, backend="cuda", **options)
        return y, *vjp(dy, *inputs, backend="cuda", **options)

    return run


def with_depth(depth, run):
    """Where linear attention multiplies this many rows of a tile at a time."""

    def deeper():
        before = dict(cuda_maps.SIZES)
        try:
            for kind, sizes in before.items():
                cuda_maps.SIZES[kind] = sizes._replace(depth=depth)
            return run()
        finally:
            cuda_maps.SIZES.update(before)

    return deeper


def rows(n, m):
    """A csr mask with a row that is shorter than the others."""
    dense = np.ones((n, m), bool)
    dense[1, 5:] = False
    return csr_array(dense)


def first(module, shape, heads=0, **options):
    """Run a kernel that is there for reading, and is called by its module's own function."""

    def run():
        _, *inputs = arrays(*shape)
        inputs = [x[None] for x in inputs] if heads else inputs
        functions = vars(importlib.import_module(f"refattn.{module}"))
        name = next(name for name in functions if name.endswith("_attention"))
        return [functions[name](*inputs, **options)]

    return run


OMEGA = np.random.default_rng(0).standard_normal((11, 9))

# By module, or else by mechanism.
CALLS = {
    "sparse": [
        call("sparse_attention", (3, 40, 4, 3), mask=rows(3, 40)),
        call("sparse_attention", (40, 2, 4, 3), mask=rows(40, 2)),
    ],
    "softmax": [
        call("softmax_attention", (11, 13, 5, 5), causal=True),
        call("softmax_attention", (11, 13, 20, 19)),
    ],
    "softmax.cuda_first": [first("softmax.cuda_first", (5, 40, 4, 3), step=2)],
    "linear": [
        call("linear_attention", (18, 18, 5, 5), causal=True),
        call("linear_attention", (3, 9, 9, 3)),
        with_depth(8, call("linear_attention", (18, 18, 3, 3), causal=True)),
    ],
    "linear.cuda_first": [
        first("linear.cuda_first", (9, 9, 5, 3), heads=1, step=1),
        first("linear.cuda_first", (9, 9, 5, 3), heads=1, step=2, chunk=4),
    ],
    "performer": [
        call("performer_attention", (18, 18, 9, 3), omega=OMEGA, causal=True),
        call("performer_attention", (3, 9, 9, 3), omega=OMEGA, kind="hyperbolic"),
        call("performer_attention", (9, 9, 9, 3), omega=OMEGA, scale=1e4),
    ],
}


MODULES = [
    importlib.import_module(f"refattn.{path.parent.name}.{path.stem}")
    for path in sorted(ROOT.glob("*/cuda_*.py"))
    if "cuda.syncthreads()" in path.read_text()
]
EVERY_MODULE = pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__[8:])
EVERY_BARRIER = pytest.mark.parametrize(
    ("module", "line"),
    [
        pytest.param(module, line, id=f"{module.__name__[8:]}-line-{line}")
        for module in MODULES
        for line in barriers(inspect.getsource(module))
    ],
)


@pytest.fixture
def replaced(monkeypatch):
    """A function that puts what a code defines into the place of a module's own kernels."""

    def replace(module, code):
        variant = ModuleType(module.__name__)
        exec(code, variant.__dict__)
        for user in [m for name, m in sys.modules.items() if name.startswith("refattn.")]:
            for name, value in list(vars(user).items()):
                ours = getattr(value, "__module__", None) == module.__name__
                if ours and name.startswith("make_"):
                    monkeypatch.setattr(user, name, getattr(variant, name))
        forget()

    yield replace
    monkeypatch.undo()
    forget()


def forget():
    """Kernels hold the device functions that they were made with."""
    for name, module in list(sys.modules.items()):
        if name.startswith("refattn.") and "cuda" in name:
            for value in vars(module).values():
                if hasattr(value, "cache_clear"):
                    value.cache_clear()


def calls_of(module):
    name = module.__name__.removeprefix("refattn.")
    return CALLS.get(name) or CALLS[name.split(".")[0]]


@functools.cache
def answers(module):
    return [run() for run in calls_of(module)]


@EVERY_MODULE
def test_as_they_are_the_kernels_are_right_in_every_order(module, replaced):
    wanted = answers(module)
    replaced(module, without(inspect.getsource(module), None))
    assert not notices(calls_of(module), wanted, seeds=range(2))


@EVERY_BARRIER
def test_every_barrier_is_needed(module, line, replaced):
    wanted = answers(module)
    replaced(module, without(inspect.getsource(module), line))
    assert notices(calls_of(module), wanted)


class Unguarded(ast.NodeTransformer):
    """Without ``if column < x.shape[2]`` and the like around what is written."""

    def visit_If(self, node):
        self.generic_visit(node)
        return node.body if ".shape[" in ast.unparse(node.test) else node


@pytest.mark.parametrize("name", ["cuda_csr", "cuda_csr_backward"])
def test_without_its_guards_a_kernel_leaves_its_arrays(name, replaced):
    module = importlib.import_module(f"refattn.sparse.{name}")
    tree = ast.fix_missing_locations(Unguarded().visit(ast.parse(inspect.getsource(module))))
    replaced(module, compile(tree, "<unguarded>", "exec"))
    with pytest.raises(IndexError):
        calls_of(module)[0]()
