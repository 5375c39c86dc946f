"""python -m refattn check | vectors | cost | bench: hold a kernel against the truth, or write the
truth down; count and time ours."""

import argparse
import contextlib
import os
import sys
import textwrap

import refattn
from refattn.course import table
from refattn.examples import examples
from refattn.verify import check
from refattn.verify.like import CONVENTIONS
from refattn.verify.shell import (
    MECHANISMS,
    OPTIONS,
    count,
    flag,
    load_function,
    mechanism_options,
    seconds,
    taken,
    whole_numbers,
)

MOST_TOKENS = 2**17  # of cost: the strided mask there has 2 n sqrt(n) pairs, 10^8 of them
DTYPES = ("float32", "float64", "float16", "bfloat16")
CHECK = (
    "Call MODULE:FUNCTION as kernel(q, k, v), arrays (..., n, d), (..., m, d), (..., m, e) to "
    "(..., n, e), and compare with the truth in float64. Exit status 0 where it is right, 1 where "
    "it is not, 2 where it could not be asked."
)
VECTORS = (
    "Write inputs, options, right outputs and gradients in float64, and how far off a kernel may "
    "be: every mechanism, dtype and edge case, as .safetensors and .npz with a manifest.json. The "
    "same bytes each time. docs/vectors.md has readers in Python and C++."
)
CHECK_EXAMPLES = """examples:
  Your own local attention, in kernels.py of this folder, on NumPy arrays:
    python -m refattn check kernels:local --mechanism local_attention --window 64 --causal

  A kernel of torch tensors with batch and heads, with its automatic gradients, on a GPU:
    python -m refattn check kernels:flash --mechanism softmax_attention --causal \\
        --like torch --device cuda --dtype float16 --gradients --cases tiles

  Options that are arrays come from Python: in kernels.py, chosen = {"omega": ...}, then
    python -m refattn check kernels:mine --mechanism performer_attention --options kernels:chosen
"""


def parser():
    main = argparse.ArgumentParser(prog="python -m refattn", description=__doc__.split(": ", 1)[1])
    commands = main.add_subparsers(dest="command", required=True)
    one = commands.add_parser(
        "check",
        help="hold a kernel against refattn and be told what is wrong with it",
        usage="python -m refattn check MODULE:FUNCTION --mechanism NAME [--OPTION VALUE ...]",
        description=textwrap.fill(CHECK, 90),
        epilog=CHECK_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_kernel(one)
    add_cases(one)
    group = one.add_argument_group("options of the mechanism")
    for name, read in OPTIONS.items():
        kind = {"action": "store_true"} if read is None else {"type": read}
        takers = ", ".join(m.removesuffix("_attention") for m in MECHANISMS if name in taken(m))
        group.add_argument(flag(name), **kind, default=None, help=f"of {takers}")
    group.add_argument(
        "--options",
        metavar="MODULE:NAME",
        help="a dict of options, or a function that returns one: for arrays and functions, such as "
        "mask, omega, E or gate",
    )
    add_vectors(commands)
    add_cost(commands)
    times = commands.add_parser(
        "bench",
        help="times of the compiled attentions on this machine",
        description="Median time of each compiled attention, and its share of the rate of a "
        "float32 matrix product. `make bench` sets other software beside it.",
        epilog="example: python -m refattn bench --only local --memory",
    )
    times.add_argument("--only", default="", help="works whose name holds this")
    times.add_argument("--seconds", type=seconds, default=2.0, help="for each work (default 2)")
    times.add_argument("--growth", action="store_true", help="fit the slope of time against N")
    times.add_argument("--memory", action="store_true", help="measure the peak of memory")
    times.add_argument(
        "--starts", action="store_true", help="time first calls, compiled then and from the cache"
    )
    return main


def add_kernel(one):
    one.add_argument(
        "kernel", metavar="MODULE:FUNCTION", help="the kernel, found from the current folder too"
    )
    one.add_argument(
        "--mechanism",
        required=True,
        choices=MECHANISMS,
        metavar="NAME",
        help="what it should be equal to: " + ", ".join(MECHANISMS),
    )
    one.add_argument("--dtype", default="float32", choices=DTYPES, help="default float32")
    one.add_argument(
        "--like",
        choices=list(CONVENTIONS),
        help="the library whose arrays, layout and conventions the kernel follows",
    )
    one.add_argument("--xp", metavar="NAME", help="the library of its arrays alone, such as torch")
    one.add_argument("--device", help="where the arrays lie, such as cuda")
    one.add_argument(
        "--gradients",
        nargs="?",
        const=True,
        default=False,
        metavar="MODULE:FUNCTION",
        help="check dq, dk and dv too: the library's automatic ones, or those of a function "
        "(dy, q, k, v) -> (dq, dk, dv)",
    )
    one.add_argument(
        "--time-limit",
        type=seconds,
        default=60.0,
        metavar="SECONDS",
        help="for one case (default 60)",
    )
    one.add_argument("--json", action="store_true", help="print the report as JSON")


def add_cases(one):
    sizes = one.add_mutually_exclusive_group()
    sizes.add_argument(
        "--cases",
        default="default",
        choices=["default", "square", "tiles"],
        help="square: n = m only; tiles: multiples of 64 only",
    )
    sizes.add_argument(
        "--size",
        type=whole_numbers(4),
        action="append",
        metavar="N,M,D,E",
        help="sizes of your own: queries, keys, columns of q and k, of v; may be given again",
    )
    one.add_argument(
        "--lead",
        type=whole_numbers(1, 2, 3, least=1),
        metavar="B,H",
        help="axes ahead of the tokens: batch and heads (default 2,3 with --like, else none)",
    )


def add_vectors(commands):
    one = commands.add_parser(
        "vectors",
        help="write cases with their right outputs and budgets, for kernels in any language",
        description=textwrap.fill(VECTORS, 90),
        epilog="example: python -m refattn vectors build/vectors --only softmax_attention",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    one.add_argument("folder", metavar="OUT", help="where to write; made where it is missing")
    one.add_argument(
        "--only", default="", metavar="WORD", help="cases whose name holds this, such as float32"
    )
    one.add_argument("--small", action="store_true", help="the few that come with refattn")


def add_cost(commands):
    costs = commands.add_parser(
        "cost",
        help="counted FLOPs, bytes and workspace of every mechanism",
        description="Counted cost of one head for n tokens with head size d, in typical settings.",
        epilog="example: python -m refattn cost --n 65536 --d 128 --only local",
    )
    costs.add_argument("--n", type=count, default=4096, help="tokens (default 4096)")
    costs.add_argument("--d", type=count, default=64, help="columns of q, k and v (default 64)")
    costs.add_argument("--itemsize", type=count, default=4, help="bytes of a number (default 4)")
    costs.add_argument("--only", default="", help="settings whose name holds this")


def run_check(options):
    """Whatever a kernel prints stays out of the JSON."""
    quiet = contextlib.redirect_stdout(sys.stderr) if options.json else contextlib.nullcontext()
    with quiet:
        report = checked(options)
    print(report.to_json() if options.json else report)
    return 0 if report.passed else 1


def shown():
    """Whether somebody is there to look at a bar."""
    return sys.stderr.isatty() and not os.environ.get("TQDM_DISABLE")


def checked(options):
    gradients = options.gradients
    if isinstance(gradients, str):
        gradients = load_function(gradients, "gradients")
    kernel, inner = load_function(options.kernel, "kernel"), mechanism_options(options)
    return check(
        kernel,
        options.mechanism,
        dtype=options.dtype,
        like=options.like,
        xp=options.xp,
        device=options.device,
        gradients=gradients,
        cases=options.size or options.cases,
        lead=options.lead,
        time_limit=options.time_limit,
        progress=not options.json and shown(),
        hint="The kernel returned nothing.",
        **inner,
    )


def run_vectors(options):
    from refattn.verify import vectors  # whose table is built when it is imported

    vectors.free(options.folder)  # refused before minutes of work
    cases = vectors.made(options.only, small=options.small, progress=shown())
    digest = vectors.write(options.folder, cases)
    print(f"{vectors.counted(cases)} in {options.folder}")
    print(f"digest {digest}")
    return 0


def run_cost(options):
    n, d = options.n, options.d
    if n > MOST_TOKENS:
        raise ValueError(
            f"n is {n:,}; the masks of the sparse settings are built to count their pairs: "
            f"expected at most {MOST_TOKENS:,}. refattn.softmax_attention_cost takes any"
        )
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


def run_bench(options):
    from refattn import bench  # which imports the compiler

    more = {"growing": options.growth, "peaks": options.memory, "starts": options.starts}
    print(bench.alone(options.only, options.seconds, **more))
    return 0


RUN = {"check": run_check, "vectors": run_vectors, "cost": run_cost, "bench": run_bench}


def main(arguments=None):
    """Run a command; the exit status."""
    options = parser().parse_args(arguments)
    try:
        return RUN[options.command](options)
    except (ValueError, TypeError, OSError) as error:
        print(f"python -m refattn {options.command}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
