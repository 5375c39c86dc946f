"""A pytest plugin: the fixture ``refattn_case`` runs a test over vectors (docs/vectors.md).

pytest finds it wherever refattn is installed; what it needs is imported when a test asks for it.
"""

import pytest

FIXTURE = "refattn_case"
ASKED = "@pytest.mark.refattn(mechanism=NAME, dtype=NAME, like=..., takes=..., gradients=True)"

LOADED = pytest.StashKey()


def pytest_addoption(parser):
    group = parser.getgroup("refattn", "vectors of refattn")
    group.addoption(
        "--refattn-vectors",
        metavar="DIR",
        help="a folder that `python -m refattn vectors` wrote (default: those of refattn)",
    )
    group.addoption("--refattn-mechanism", metavar="NAME[,NAME]", help="such as softmax_attention")
    group.addoption("--refattn-dtype", metavar="NAME[,NAME]", help="such as float32,bfloat16")


def pytest_configure(config):
    config.addinivalue_line(
        "markers",
        "refattn(mechanism, dtype, like, takes, gradients): the vectors that refattn_case goes "
        "through: names or lists of names, a library whose arrays it has, the options that the "
        "kernel takes, and whether only those with gradients through y alone.",
    )


def pytest_generate_tests(metafunc):
    if FIXTURE not in metafunc.fixturenames:
        return
    asked = _asked(metafunc)
    try:
        cases = _cases(metafunc.config, asked)
    except ValueError as error:
        _refuse(metafunc, str(error))
    if not cases:
        words = ", ".join(f"{name}={x!r}" for name, x in asked.items())
        _refuse(metafunc, f"no vector fits refattn({words})")
    try:
        chosen = _of_command_line(metafunc.config, cases)
    except ValueError as error:
        _refuse(metafunc, f"on the command line {error}")
    ids = [case.name.replace(", ", "-").replace("/", "-").replace(" ", "-") for case in chosen]
    given = [(case, asked.get("like")) for case in chosen]
    metafunc.parametrize(FIXTURE, given, ids=ids, indirect=True)


@pytest.fixture
def refattn_case(request):
    """A vector: q, k, v, dy and options as a kernel gets them, and ``check(y=..., dq=...)``, which
    fails with words on what is wrong."""
    from refattn.verify.cases import number_type
    from refattn.verify.vectors.judged import Judged

    case = Judged(*request.param)
    with case.library.session(number_type(case.dtype)):
        yield case


def _asked(metafunc):
    """The keywords of the test's marks; those nearest to the test win."""
    marks = list(metafunc.definition.iter_markers("refattn"))
    known = ("mechanism", "dtype", "like", "takes", "gradients")
    asked = {}
    for mark in reversed(marks):
        wrong = [name for name in mark.kwargs if name not in known]
        if mark.args or wrong:
            came = ", ".join([*map(repr, mark.args), *wrong])
            _refuse(metafunc, f"refattn({came}) came; expected {ASKED}")
        asked |= mark.kwargs
    if "mechanism" not in asked:
        _refuse(metafunc, f"{FIXTURE} is used, but no mechanism is named; expected {ASKED}")
    return asked


def _refuse(metafunc, words):
    """An error of the test's file, not of the kernel."""
    pytest.fail(f"{metafunc.definition.nodeid}: {words}", pytrace=False)


def _cases(config, asked):
    """The vectors that a mark asks for."""
    from refattn.verify.like import convention_of
    from refattn.verify.vectors.judged import differs

    convention = convention_of(asked.get("like"))
    takes = asked.get("takes")
    takes = [takes] if isinstance(takes, str) else takes
    found = []
    for case in _loaded(config, asked["mechanism"], asked.get("dtype")):
        given = set(case.options) - {"return_lse", "return_state"}
        fits = not differs(case, convention) and (takes is None or given <= set(takes))
        if asked.get("gradients"):
            fits = fits and "dy" in case.inputs and not {"dlse", "dS"} & set(case.inputs)
        if fits:
            found.append(case)
    return found


def _of_command_line(config, cases):
    """Those that the command line leaves; a test without any is skipped."""
    asked = {name: config.getoption(f"--refattn-{name}") for name in ("mechanism", "dtype")}
    asked = {name: names.split(",") for name, names in asked.items() if names}
    if not asked:
        return cases
    left = {case.name for case in _loaded(config, **asked)}
    return [case for case in cases if case.name in left]


def _loaded(config, mechanism=None, dtype=None):
    """``load`` of the folder that the command line names, once for each question."""
    from refattn.verify.vectors import load

    known = config.stash.setdefault(LOADED, {})
    asked = repr((mechanism, dtype))
    if asked not in known:
        folder = config.getoption("--refattn-vectors")
        known[asked] = load(folder, mechanism=mechanism, dtype=dtype)
    return known[asked]
