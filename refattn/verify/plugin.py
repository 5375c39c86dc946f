"""A pytest plugin: the fixture ``refattn_case`` runs a test over vectors (docs/vectors.md).

pytest finds it wherever refattn is installed; what it needs is imported when a test asks for it.
"""

from collections import Counter

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
    words, where = "", ""
    try:
        cases, why_not = _cases(metafunc.config, asked)
        if cases:
            where = "on the command line "
            chosen = _of_command_line(metafunc.config, cases)
        else:
            came = ", ".join(f"{name}={x!r}" for name, x in asked.items())
            words = f"no vector fits refattn({came}): {why_not}"
    except (ValueError, TypeError) as error:
        words = f"{where}{error}"
    if words:  # outside of the except: pytest would print what was caught a second time
        _refuse(metafunc, words)
    if not chosen:
        skip = pytest.mark.skip(reason="the command line leaves none of its vectors")
        metafunc.parametrize(FIXTURE, [pytest.param(None, marks=skip)], ids=["none"], indirect=True)
        return
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

    convention, takes = convention_of(asked.get("like")), _takes(asked)
    found, left_out = [], Counter()
    for case in _loaded(config, asked["mechanism"], asked.get("dtype")):
        more = set() if takes is None else set(case.options) - takes
        pulled = "dy" not in case.inputs or {"dlse", "dS"} & set(case.inputs)
        why = differs(case, convention)
        if not why and more:
            why = f"takes lacks {', '.join(sorted(more))}"
        elif not why and asked.get("gradients") and pulled:
            why = "no gradients through y alone"
        if why:
            left_out[why] += 1
        else:
            found.append(case)
    why_not = "; ".join(f"{count} left out, {why}" for why, count in left_out.items())
    if config.getoption("--refattn-vectors") is None:
        why_not += ". `python -m refattn vectors DIR` writes more, for --refattn-vectors DIR"
    return found, why_not


def _takes(asked):
    """The options of ``takes``, which some mechanism must have."""
    from refattn.verify.shell import MECHANISMS, taken
    from refattn.verify.vectors.judged import RETURNS

    if asked.get("takes") is None:
        return None
    takes = {asked["takes"]} if isinstance(asked["takes"], str) else set(asked["takes"])
    known = set(RETURNS).union(*map(taken, MECHANISMS)) - {"options"}
    if takes - known:
        came, expected = (", ".join(sorted(map(str, x))) for x in (takes - known, known))
        raise ValueError(f"takes has {came}; expected some of {expected}")
    return takes | set(RETURNS)


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
