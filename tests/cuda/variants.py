"""Kernels with one statement taken out, and whether that is noticed."""

import ast

import numpy as np

import simulator


def barriers(source):
    """The lines of the statements ``cuda.syncthreads()`` in a source."""
    return sorted(node.lineno for node in ast.walk(ast.parse(source)) if is_barrier(node))


def is_barrier(node):
    return isinstance(node, ast.Expr) and ast.unparse(node) == "cuda.syncthreads()"


class Without(ast.NodeTransformer):
    """Put ``pass`` in the place of the barrier on one line."""

    def __init__(self, line):
        self.line = line

    def visit_Expr(self, node):
        gone = is_barrier(node) and node.lineno == self.line
        return ast.copy_location(ast.Pass(), node) if gone else node


def without(source, line):
    """The code of a source without the barrier on this line; with all of them for None."""
    tree = Without(line).visit(ast.parse(source))
    return compile(ast.fix_missing_locations(tree), "<without one barrier>", "exec")


def notices(runs, wanted, seeds=range(5)):
    """Whether in some order of the threads a run gives another answer than wanted, or an error."""
    for number in seeds:
        for run, answers in zip(runs, wanted, strict=True):
            with simulator.seed(number):
                try:
                    found = run()
                except (simulator.Divergence, ArithmeticError, LookupError, ValueError):
                    return True
            pairs = zip(found, answers, strict=True)
            if not all(np.allclose(a, b, 1e-4, 1e-5) for a, b in pairs):
                return True
    return False
