"""python -m refattn check | cost: hold a kernel against the truth; show what each form costs."""

import argparse
import importlib
import inspect
import sys
from pathlib import Path

import refattn
from refattn.course import table
from refattn.examples import examples
from refattn.verify import check
from refattn.verify.like import CONVENTIONS


def window(text):
    """64 or 64,0."""
    sides = [int(side) for side in text.split(",")]
    return sides[0] if len(sides) == 1 else tuple(sides)


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
}
MECHANISMS = [
    name
    for name in refattn.__all__
    if hasattr(refattn, f"{name}_vjp") and name != "gated_attention"
]


def parser():
    main = argparse.ArgumentParser(prog="python -m refattn", description=__doc__.split(": ", 1)[1])
    commands = main.add_subparsers(dest="command", required=True)
    one = commands.add_parser(
        "check",
        help="hold a kernel against refattn and be told what is wrong with it",
        description="Call MODULE:FUNCTION as kernel(q, k, v) on one head, arrays (n, d), (m, d), "
        "(m, e) to (n, e), and compare with the truth in float64. Exit status 0 where it is right, "
        "1 where it is not, 2 where it could not be asked.",
        epilog="example: python -m refattn check my_module:my_kernel --mechanism local_attention "
        "--window 64 --causal",
    )
    one.add_argument("kernel", help="MODULE:FUNCTION, found from the current folder too")
    one.add_argument("--mechanism", required=True, choices=MECHANISMS)
    one.add_argument(
        "--dtype", default="float32", choices=["float32", "float64", "float16", "bfloat16"]
    )
    one.add_argument("--like", choices=list(CONVENTIONS), help="the library of the kernel's arrays")
    one.add_argument("--square", action="store_true", help="leave out the cases with n != m")
    one.add_argument("--json", action="store_true", help="print the report as JSON")
    for name, read in OPTIONS.items():
        flag = "--" + name.replace("_", "-")
        kind = {"action": "store_true"} if read is None else {"type": read}
        one.add_argument(flag, **kind, default=None, help="an option of the mechanism")
    costs = commands.add_parser(
        "cost",
        help="counted FLOPs, bytes and workspace of every mechanism",
        description="Counted cost of one head for n tokens with head size d, in typical settings.",
        epilog="example: python -m refattn cost --n 65536 --d 128 --only local",
    )
    costs.add_argument("--n", type=int, default=4096, help="tokens (default 4096)")
    costs.add_argument("--d", type=int, default=64, help="columns of q, k and v (default 64)")
    costs.add_argument("--itemsize", type=int, default=4, help="bytes of a number (default 4)")
    costs.add_argument("--only", default="", help="settings whose name holds this")
    return main


def load(name):
    """The function MODULE:FUNCTION, or ValueError saying what is not there."""
    module, _, function = name.partition(":")
    if not function:
        raise ValueError(f"kernel is {name!r}; expected MODULE:FUNCTION, such as my_module:kernel")
    sys.path.insert(0, str(Path.cwd()))
    try:
        found = getattr(importlib.import_module(module), function, None)
    except ImportError as error:
        raise ValueError(f"module {module!r} cannot be imported: {error}") from error
    if not callable(found):
        raise ValueError(f"module {module!r} has no function {function!r}")
    return found


def run_check(options):
    given = {name: getattr(options, name) for name in OPTIONS}
    given = {name: value for name, value in given.items() if value is not None}
    taken = inspect.signature(getattr(refattn, options.mechanism)).parameters
    for name in given:
        if name not in taken:
            known = ", ".join("--" + o.replace("_", "-") for o in OPTIONS if o in taken)
            raise ValueError(f"{options.mechanism} has no option {name}; it has {known}")
    report = check(
        load(options.kernel),
        options.mechanism,
        dtype=options.dtype,
        cases="square" if options.square else "default",
        like=options.like,
        hint="The kernel returned nothing.",
        **given,
    )
    print(report.to_json() if options.json else report)
    return 0 if report.passed else 1


def run_cost(options):
    n, d = options.n, options.d
    header = ["mechanism", "FLOPs", "bytes", "workspace", "FLOPs of softmax", "FLOPs per byte"]
    whole = refattn.softmax_attention_cost(n, n, d, d).flops
    rows = []
    for example in examples(n, d):
        if options.only in example.label:
            cost = example.counted(n, d, itemsize=options.itemsize)
            share = cost.flops / whole
            rows.append(
                [example.label, cost.flops, cost.bytes, cost.workspace, share, cost.intensity]
            )
    if not rows:
        raise ValueError(f"no setting's name holds {options.only!r}")
    print(f"one head, n = m = {n:,}, d = e = {d}, {options.itemsize} bytes a number")
    print(table(header, rows))
    return 0


def main(arguments=None):
    """Run a command; the exit status."""
    options = parser().parse_args(arguments)
    try:
        return run_check(options) if options.command == "check" else run_cost(options)
    except (ValueError, TypeError) as error:
        print(f"python -m refattn {options.command}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
