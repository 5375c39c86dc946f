"""What a command line says, as ``refattn.verify.check`` takes it: numbers, options, functions."""

import argparse
import importlib
import inspect
import operator
import sys
from pathlib import Path

import refattn


def whole_numbers(*counts, least=0):
    """A reader of "64" or "64,0": as many integers as one of ``counts``, all at least ``least``."""
    example = ",".join("8421"[: max(counts)])

    def read(text):
        try:
            numbers = tuple(int(part) for part in text.split(","))
        except ValueError:
            numbers = ()
        if len(numbers) not in counts or min(numbers) < least:
            often = " or ".join(map(str, counts))
            raise argparse.ArgumentTypeError(
                f"{text!r} came; expected {often} integers >= {least}, such as {example}"
            )
        return numbers

    return read


def window(text):
    sides = whole_numbers(1, 2)(text)
    return sides[0] if len(sides) == 1 else sides


def count(text):
    """A whole number above 0."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} came; expected an integer >= 1, such as 64")
    return number


def seconds(text):
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} came; expected seconds > 0, such as 10")
    return number


# Options that a command line can give, and how their values are read; None for a switch.
OPTIONS = {
    "causal": None,
    "window": window,
    "dilation": int,
    "scale": float,
    "softcap": float,
    "feature_map": str,
    "chunk": int,
    "block": int,
    "fuse": str,
    "pool": str,
    "kind": str,
}
NOT_OPTIONS = ("backend", "return_lse", "return_state")  # check compares y, of the formula itself
MECHANISMS = [name for name in refattn.__all__ if hasattr(refattn, f"{name}_vjp")]


def flag(name):
    return "--" + name.replace("_", "-")


def taken(mechanism):
    """The options of an attention: name and default."""
    parameters = list(inspect.signature(getattr(refattn, mechanism)).parameters.values())[3:]
    return {p.name: p.default for p in parameters if p.name not in NOT_OPTIONS}


def load(name, what="kernel"):
    """The object MODULE:NAME, or ValueError saying what is not there."""
    module, _, inside = name.partition(":")
    if not module or not inside or module.endswith(".py"):
        such = f"{Path(module).stem}:{inside}" if module and inside else f"my_module:my_{what}"
        raise ValueError(f"{what} is {name!r}; expected MODULE:NAME, such as {such}")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found = importlib.import_module(module)
    except (Exception, SystemExit) as error:  # whatever the module does while it is imported
        kind = type(error).__name__
        raise ValueError(f"module {module!r} cannot be imported: {kind}: {error}") from error
    try:
        return operator.attrgetter(inside)(found)
    except AttributeError:
        raise ValueError(f"module {module!r} has no {inside!r}") from None


def load_function(name, what):
    found = load(name, what)
    if not callable(found):
        raise ValueError(f"{what} {name} is {type(found).__name__}; expected a function")
    return found


def mechanism_options(options):
    """What the attention is called with: from the flags, and from the dict that --options names."""
    given = {name: getattr(options, name) for name in OPTIONS}
    given = {name: value for name, value in given.items() if value is not None}
    more = named_options(options.options) if options.options else {}
    twice = sorted(given.keys() & more.keys())
    if twice:
        raise ValueError(f"{twice[0]} came twice: as {flag(twice[0])} and in {options.options}")
    given |= more
    known = taken(options.mechanism)
    if "options" in known:  # a gated attention takes those of the attention inside it
        del known["options"]
        inner = getattr(given.get("attention", known["attention"]), "__name__", None)
        known |= taken(inner) if inner in MECHANISMS else dict.fromkeys(given)
    for name in given:
        if name not in known:
            words = ", ".join(flag(o) if o in OPTIONS else o for o in known)
            raise ValueError(f"{options.mechanism} has no option {name}; it has {words}")
    for name, default in known.items():
        if default is inspect.Parameter.empty and name not in given:
            how = flag(name) if name in OPTIONS else "--options MODULE:NAME, a dict that holds it"
            raise ValueError(f"{options.mechanism} needs {name}: give it by {how}")
    return given


def named_options(name):
    found = load(name, "options")
    if callable(found):
        try:
            found = found()
        except (Exception, SystemExit) as error:
            raise ValueError(f"options {name} raised {type(error).__name__}: {error}") from error
    if not isinstance(found, dict):
        kind = type(found).__name__
        raise ValueError(f"options {name} is {kind}; expected a dict or a function that gives one")
    return found
