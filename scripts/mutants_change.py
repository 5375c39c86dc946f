"""Single changes of a Python file, found by its syntax tree and made in its text.

A change has a place and a text that goes there; everything else of the file stays as it is, so the
numbers of lines do too. Six classes:

operator  + - * / @ and the like, and or, min max, any all, == !=, in, += and the like
bound     < <=, > >=, ends of range and arange, ends of slices
index     a number or name in a subscript, two subscripts exchanged, an axis
constant  a number, True and False, zeros and ones
sign      a minus taken away, or put ahead of a product or sum
branch    one side of where or of "a if c else b" in place of both; a transpose left out

Docstrings, imports, annotations, decorators, what raises, the condition of an `if` that only
raises, and keywords that change no number (copy=, strict=) are left alone. Functions that count
costs are changed where they are asked for, and then nothing else is.
"""

import ast
import io
import itertools
import random
import tokenize
import warnings
from dataclasses import dataclass

CLASSES = ("operator", "bound", "index", "constant", "sign", "branch")
MODULE = "(module)"
SYMBOLS = {
    ast.Add: ("+", ("-",)), ast.Sub: ("-", ("+",)), ast.Mult: ("*", ("/", "+")),
    ast.Div: ("/", ("*",)), ast.MatMult: ("@", ("*",)), ast.FloorDiv: ("//", ("%", "*")),
    ast.Mod: ("%", ("//",)), ast.Pow: ("**", ("*",)), ast.BitAnd: ("&", ("|",)),
    ast.BitOr: ("|", ("&",)), ast.BitXor: ("^", ("|",)), ast.LShift: ("<<", (">>",)),
    ast.RShift: (">>", ("<<",)),
}  # fmt: skip
COMPARED = {
    ast.Lt: ("<", "<=", ">"), ast.LtE: ("<=", "<", ">="), ast.Gt: (">", ">=", "<"),
    ast.GtE: (">=", ">", "<="), ast.Eq: ("==", None, "!="), ast.NotEq: ("!=", None, "=="),
    ast.Is: ("is", None, "is not"), ast.IsNot: ("is not", None, "is"),
    ast.In: ("in", None, "not in"), ast.NotIn: ("not in", None, "in"),
}  # fmt: skip
NAMES = {
    "min": "max", "max": "min", "minimum": "maximum", "maximum": "minimum", "any": "all",
    "all": "any", "floor": "ceil", "argmax": "argmin",
}  # fmt: skip
FILLED = {"zeros": "ones", "zeros_like": "ones_like", "ones": "zeros", "ones_like": "zeros_like"}
RANGES = ("range", "arange")
SILENT = ("copy", "strict", "casting", "cache", "nogil", "least", "flops", "width")
SIGNED = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.MatMult, ast.Pow)


@dataclass(frozen=True)
class Change:
    """Bytes ``start`` to ``end`` of a file become ``new``."""

    group: str
    function: str
    line: int
    start: int
    end: int
    new: str

    def made(self, text):
        data = text.encode()
        return (data[: self.start] + self.new.encode() + data[self.end :]).decode()


def changes(text, costs=False):
    """Every change of a file; some may leave no Python file: see ``valid``."""
    finder = _Finder(text, costs)
    finder.visit(ast.parse(text))
    return list(dict.fromkeys(finder.found))


def valid(text, change):
    """Whether it leaves a Python file with another syntax tree."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # "1if" is a number and a word, with a warning
        try:
            return ast.dump(ast.parse(change.made(text))) != ast.dump(ast.parse(text))
        except (SyntaxError, SyntaxWarning):
            return False


def sample(texts, seed, costs=False):
    """(file, change), again and again: one of every function before a second of any, classes in
    turn. The same seed gives the same changes in the same order, and what it chooses in a function
    hangs on that function alone.

    ``texts`` = {file: text}.
    """
    places = {}  # (file, function): its changes, in the order in which they are taken
    for file, text in texts.items():
        functions = {}
        for change in changes(text, costs):
            functions.setdefault(change.function, []).append(change)
        for function, found in functions.items():
            rng = random.Random(f"{seed} {file} {function}")
            place = rng.random(), file, function
            places[place] = (c for c in _in_turn(found, rng) if valid(text, c))
    while places:
        for place in sorted(places):
            change = next(places[place], None)
            if change is None:
                del places[place]
            else:
                yield place[1], change


def _in_turn(found, rng):
    """Changes in a random order, one of each class before a second of any."""
    classes = {group: [c for c in found if c.group == group] for group in CLASSES}
    for changes_of in classes.values():
        rng.shuffle(changes_of)
    while any(classes.values()):
        groups = [group for group, left in classes.items() if left]
        rng.shuffle(groups)
        for group in groups:
            yield classes[group].pop()


class _Finder(ast.NodeVisitor):
    def __init__(self, text, costs):
        self.text, self.data, self.costs = text, text.encode(), costs
        self.starts = [0]  # of each line, in bytes
        for line in self.data.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))
        self.tokens = self._tokens()
        self.functions, self.found = [], []

    def _tokens(self):
        found = []
        for token in tokenize.generate_tokens(io.StringIO(self.text).readline):
            if token.type in (tokenize.OP, tokenize.NAME):
                line, column = token.start
                before = self.text.splitlines()[line - 1][:column]
                found.append((self.starts[line - 1] + len(before.encode()), token.string))
        return found

    # places in the text

    def at(self, node):
        return self.starts[node.lineno - 1] + node.col_offset

    def to(self, node):
        return self.starts[node.end_lineno - 1] + node.end_col_offset

    def source(self, node):
        return self.data[self.at(node) : self.to(node)].decode()

    def held(self, node):
        """Its text, in brackets where what stands beside it might come between."""
        atoms = ast.Name, ast.Constant, ast.Call, ast.Attribute, ast.Subscript
        text = self.source(node)
        return text if isinstance(node, atoms) else f"({text})"

    def between(self, left, right, symbol):
        """Where the symbol stands after ``left`` and before ``right``: start and end."""
        words = symbol.split()
        inside = [t for t in self.tokens if self.to(left) <= t[0] < self.at(right)]
        for i in range(len(inside) - len(words) + 1):
            if [t[1] for t in inside[i : i + len(words)]] == words:
                last = inside[i + len(words) - 1]
                return inside[i][0], last[0] + len(last[1])
        return None

    def put(self, group, start, end, *news):
        line = self.data[:start].count(b"\n") + 1
        if b"\n" in self.data[start:end]:
            return
        name = ".".join(self.functions) or MODULE
        self.found += [Change(group, name, line, start, end, new) for new in news]

    def change(self, group, node, *news):
        self.put(group, self.at(node), self.to(node), *news)

    # what is left alone

    def visit_FunctionDef(self, node):
        within = any("cost" in name for name in self.functions)
        if self.costs != ("cost" in node.name or within):
            return
        self.functions.append(node.name)
        for default in [*node.args.defaults, *node.args.kw_defaults]:
            if default is not None:
                self.visit(default)
        self.statements(node.body)
        self.functions.pop()

    def visit_ClassDef(self, node):
        self.functions.append(node.name)
        self.statements(node.body)
        self.functions.pop()

    def visit_Module(self, node):
        kinds = (ast.FunctionDef, ast.ClassDef) if self.costs else ast.AST
        self.statements([x for x in node.body if isinstance(x, kinds)])

    def statements(self, body):
        for statement in body:
            text = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
            if not text:
                self.visit(statement)

    def visit_AnnAssign(self, node):
        if node.value is not None:
            self.visit(node.value)

    def visit_If(self, node):
        if not all(isinstance(x, ast.Raise) for x in node.body):
            self.visit(node.test)
            self.statements(node.body)
        self.statements(node.orelse)

    def leave(self, node):
        pass

    visit_Raise = visit_Assert = visit_JoinedStr = visit_Import = visit_ImportFrom = leave

    def visit_keyword(self, node):
        if node.arg in SILENT:
            return
        if node.arg == "axis" and (number := _integer(node.value)) is not None:
            self.change("index", node.value, str(number - 1 if number < 0 else number + 1))
            return
        self.visit(node.value)

    # what is changed

    def visit_BinOp(self, node):
        symbol, others = SYMBOLS[type(node.op)]
        if where := self.between(node.left, node.right, symbol):
            self.put("operator", *where, *others)
        self.generic_visit(node)

    def visit_AugAssign(self, node):
        symbol, others = SYMBOLS[type(node.op)]
        if where := self.between(node.target, node.value, symbol + "="):
            self.put("operator", *where, *(other + "=" for other in others))
        self.signed(node.value)
        self.generic_visit(node)

    def visit_Assign(self, node):
        self.signed(node.value)
        self.generic_visit(node)

    def visit_Return(self, node):
        if node.value is not None:
            self.signed(node.value)
            self.visit(node.value)

    def signed(self, value):
        parts = value.elts if isinstance(value, ast.Tuple) else [value]
        for part in parts:
            arithmetic = isinstance(part, ast.BinOp) and isinstance(part.op, SIGNED)
            texts = isinstance(part, ast.BinOp) and any(
                isinstance(x, (ast.Tuple, ast.List)) for x in (part.left, part.right)
            )
            if arithmetic and not texts:
                self.change("sign", part, f"-({self.source(part)})")

    def visit_BoolOp(self, node):
        symbol, other = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
        for left, right in zip(node.values, node.values[1:], strict=False):
            if where := self.between(left, right, symbol):
                self.put("operator", *where, other)
        self.generic_visit(node)

    def visit_Compare(self, node):
        sides = [node.left, *node.comparators]
        for left, operation, right in zip(sides, node.ops, sides[1:], strict=False):
            symbol, closed, other = COMPARED[type(operation)]
            if where := self.between(left, right, symbol):
                self.put("operator", *where, other)
                if closed:
                    self.put("bound", *where, closed)
        self.generic_visit(node)

    def visit_UnaryOp(self, node):
        if isinstance(node.op, ast.USub):
            self.change("sign", node, self.held(node.operand))
        elif isinstance(node.op, (ast.Not, ast.Invert)):
            self.change("operator", node, self.held(node.operand))
        self.generic_visit(node)

    def visit_Call(self, node):
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        if name in NAMES or name in FILLED:
            group = "operator" if name in NAMES else "constant"
            end = self.to(node.func)
            self.put(group, end - len(name), end, {**NAMES, **FILLED}[name])
        if name == "where" and len(node.args) == 3:
            self.change("branch", node, *map(self.held, node.args[1:]))
        if name in RANGES:
            self.visit(node.func)
            for argument in node.args:
                self.end_of_range(argument)
            for keyword in node.keywords:
                self.visit(keyword)
            return
        self.generic_visit(node)

    def visit_IfExp(self, node):
        if not any(isinstance(x, ast.JoinedStr) for x in (node.body, node.orelse)):
            self.change("branch", node, self.held(node.body), self.held(node.orelse))
        self.generic_visit(node)

    def visit_Attribute(self, node):
        if node.attr in ("T", "mT"):
            self.put("branch", self.to(node.value), self.to(node), "")
        self.generic_visit(node)

    def end_of_range(self, node):
        if isinstance(node, ast.Starred):
            return
        number = _integer(node)
        if number is not None:
            self.change("bound", node, str(number + 1), str(number - 1))
            return
        self.change("bound", node, f"{self.source(node)} + 1", f"{self.source(node)} - 1")
        self.visit(node)

    def visit_Constant(self, node):
        value = node.value
        if isinstance(value, bool):
            self.change("constant", node, str(not value))
        elif isinstance(value, int):
            self.change("constant", node, *([str(value + 1)] + ([str(value - 1)] * (value > 0))))
        elif isinstance(value, float):
            self.change("constant", node, *(["1.0"] if value == 0 else [repr(2 * value)]))

    def visit_Subscript(self, node):
        self.visit(node.value)
        parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        for part in parts:
            if isinstance(part, ast.Slice):
                self.slice(part)
            else:
                self.index(part)
        plain = [x for x in parts if isinstance(x, (ast.Name, ast.BinOp))]
        for one, two in itertools.pairwise(plain):
            swapped = f"{self.source(two)}, {self.source(one)}"
            if parts.index(two) == parts.index(one) + 1:
                self.put("index", self.at(one), self.to(two), swapped)

    def slice(self, node):
        if node.lower is not None:
            self.end_of_range(node.lower)
        elif node.step is None:
            self.put("bound", self.at(node), self.at(node), "1")
        if node.upper is not None:
            self.end_of_range(node.upper)
        elif node.step is None:
            self.put("bound", self.to(node), self.to(node), "-1")
        if node.step is not None:
            self.visit(node.step)

    def index(self, node):
        number = _integer(node)
        if number is not None:
            beside = {number + 1, number - 1}
            self.change("index", node, *(str(x) for x in sorted(beside)))
        elif isinstance(node, ast.Name) and len(node.id) <= 2:
            self.change("index", node, f"{node.id} + 1", f"{node.id} - 1")
        elif not isinstance(node, ast.Constant):
            self.visit(node)


def _integer(node):
    """The whole number that stands there, or None."""
    minus = isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub)
    inner = node.operand if minus else node
    if isinstance(inner, ast.Constant) and type(inner.value) is int:
        return -inner.value if minus else inner.value
    return None
