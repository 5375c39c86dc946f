"""Which implementation runs: ``backend="numpy" | "numba" | "cuda"``, lazy and explicit.

A public function is written once, in ``refattn/MECHANISM/formula.py``, under the decorator
``backends``. A faster version has the same name and arguments in ``cpu.py`` (Numba) or ``cuda.py``
(Numba CUDA) of the same folder, and is imported when it is first asked for.
"""

import contextlib
import contextvars
import functools
import importlib
import inspect

MODULES = {"numba": "cpu", "cuda": "cuda"}
NEEDS = {"numba": "pip install numba", "cuda": "pip install 'numba-cuda[cu13]'"}
BACKENDS = ("numpy", *MODULES)
ROW_FORMS, ROW_COSTS, BY_POSITION = {}, {}, {}
# Where a composed formula's inner calls go: see ``composed``.
_INSIDE = contextvars.ContextVar("_INSIDE", default="numpy")


class BackendUnavailable(RuntimeError):
    """The backend asked for is not there: its code, its library or its driver is missing."""


def backends(formula):
    """Give ``formula`` the keyword ``backend``; a call goes to the implementation it names."""
    mechanism = formula.__module__.rsplit(".", 1)[0]

    @functools.wraps(formula)
    def run(*args, backend="numpy", **options):
        backend = _INSIDE.get() if backend == "numpy" else backend
        if backend == "numpy":
            return formula(*args, **options)
        kernel = _find(mechanism, formula.__name__, backend)
        with inside("numpy"), _launches(backend, options):  # a formula means the formula
            return kernel(*args, **options)

    signature = inspect.signature(formula)
    keyword = inspect.Parameter("backend", inspect.Parameter.KEYWORD_ONLY, default="numpy")
    parameters = [*signature.parameters.values(), keyword]
    parameters.sort(key=lambda p: p.kind)  # ahead of **options; the sort is stable
    run.__signature__ = signature.replace(parameters=parameters)
    return run


def composed(formula, backend):
    """An implementation made of others: the formula as it stands, every attention inside it on
    ``backend``. For what is only a few array operations around an attention that has a kernel."""
    body = formula.__wrapped__

    @functools.wraps(body)
    def run(*args, **options):
        with inside(backend):
            return body(*args, **options)

    return run


def _launches(backend, options):
    """On the stream of CUDA that ``stream=`` names, which is taken out of the options."""
    if backend != "cuda" or "stream" not in options:
        return contextlib.nullcontext()
    from refattn import gpu

    return gpu.on(options.pop("stream"))


@contextlib.contextmanager
def inside(backend):
    """Calls that name no backend go to this one."""
    token = _INSIDE.set(backend)
    try:
        yield
    finally:
        _INSIDE.reset(token)


def rows_of(attention, cost=None, by_position=lambda sizes: True, backend="numpy"):
    """Register how some rows of ``attention`` are computed without the others.

    The function registered takes (rows, n, m, **options), rows being sorted query positions, and
    returns (forward, vjp, options) such that ``forward(q[..., rows, :], k, v, **options)`` gives
    those rows of the attention, and vjp its gradient; or None where these options do not go row
    by row. Gates use it to leave closed rows out.

    ``cost``, (rows, n, m, d, e, **sizes) -> Cost, is needed where the work of a row depends on its
    position, and ``by_position`` says for which of the cost's sizes it does; else the attention's
    own cost serves with len(rows) for n. A ``backend`` may have a form of its own.
    """

    def register(form):
        ROW_FORMS[attention.__name__, backend] = form
        if cost is not None:
            ROW_COSTS[attention.__name__] = cost
            BY_POSITION[attention.__name__] = by_position
        return form

    return register


def row_form(name):
    """The registered form of an attention, that of the backend which runs here if it has one."""
    form, backend = ROW_FORMS[name, "numpy"], _INSIDE.get()
    if backend in MODULES:
        importlib.import_module(f"{form.__module__.rsplit('.', 1)[0]}.{MODULES[backend]}")
    return ROW_FORMS.get((name, backend), form)


def _find(mechanism, name, backend):
    if not isinstance(backend, str) or backend not in MODULES:
        raise ValueError(
            f"backend is {backend!r}; expected one of {', '.join(map(repr, BACKENDS))}"
        )
    module = f"{mechanism}.{MODULES[backend]}"
    kernel = None
    try:
        kernel = getattr(importlib.import_module(module), name, None)
    except ImportError as missing:
        if missing.name != module:
            raise BackendUnavailable(
                f"backend {backend!r} needs the package {missing.name!r} ({missing}): "
                f"{NEEDS[backend]}, or call with backend='numpy'"
            ) from missing
    if kernel is None:
        raise BackendUnavailable(
            f"{name} has no {backend!r} kernel in this version of refattn: "
            "call it with backend='numpy'"
        )
    return kernel
