"""Hold the refattn that is on PYTHONPATH against stored vectors, or against its own truth.

    python scripts/mutants_grade.py JOB        JOB is JSON, see ``Job``

``mutants.py`` runs this in a process of its own, since what is judged may crash, hang or fill the
memory. It prints a line of JSON ahead of each case, and one with the verdict at the end.
"""

import json
import resource
import signal
import sys
from dataclasses import asdict, dataclass, replace

MEMORY = 6 * 2**30  # bytes of address space
COTANGENTS = ("dy", "dlse", "dS", "dz")


@dataclass(frozen=True)
class Job:
    """What is asked of one process.

    ``stage`` is "vectors" or "check"; mechanisms stand in the order in which they are tried;
    ``processor`` limits the processor's seconds of a case, ``wall`` those of the clock.
    """

    stage: str
    backend: str
    mechanisms: tuple
    vectors: str
    home: str  # the folder that refattn must come from
    processor: float
    wall: float
    forward: bool = True  # whether the forward alone is tried ahead of the gradients
    gradients: bool = True
    dtypes: tuple = ("float32", "float16", "float64")
    wide: tuple = ()  # mechanisms that are tried in float64 too: a second compilation of all
    known: tuple = ()  # lines that the code as it is gets wrong: left out
    whole: bool = False  # go on after a wrong line, and give all of them

    def to_json(self):
        return json.dumps(asdict(self))


def say(**words):
    print(json.dumps(words), flush=True)


def within(job):
    """Start the clocks of a case anew; the system ends the process when one runs out."""
    signal.setitimer(signal.ITIMER_PROF, job.processor)
    signal.setitimer(signal.ITIMER_REAL, job.wall)


def judged(job, name, lines):
    """Start the clocks, ask for the lines, and give what is wrong with any that is."""
    within(job)
    say(at=name)
    try:
        bad = [line for line in lines() if line.trouble]
    except Exception as error:
        return [{"how": "raised", "where": name, "words": f"{type(error).__name__}: {error}"}]
    found = []
    for line in bad:
        where = line.case if line.case.startswith(name) else f"{name}, {line.case}"
        raised = line.trouble.startswith("raised ")
        how = "raised" if raised else "numbers"
        found.append({"how": how, "where": where, "words": line.trouble, "over": over(line)})
    return [x for x in found if x["where"] not in job.known]


def over(line):
    """Error over budget; None where either is no number."""
    ratio = line.error / line.budget if line.budget else float("inf")
    return round(ratio, 2) if ratio < 1e6 else None


def by_vectors(job):
    """What is wrong with each vector in turn, a list that is empty where nothing is."""
    from refattn.verify.vectors import load

    steps = (True, False) if job.forward else (False,)
    steps = steps if job.gradients else (True,)
    for dtype in job.dtypes:
        for mechanism in job.wide if dtype == "float64" else job.mechanisms:
            within(job)
            cases = load(job.vectors, mechanism=mechanism, dtype=dtype)
            for plain in steps if dtype != "float16" else steps[-1:]:
                for case in cases:
                    case = forward_of(case) if plain else case
                    run = lambda case=case: case.compare(case.run(job.backend))
                    yield judged(job, case.name, run)


def forward_of(case):
    """The same case without cotangents, so that no gradient is compiled for it."""
    return replace(case, inputs={k: x for k, x in case.inputs.items() if k not in COTANGENTS})


def by_check(job):
    """What ``refattn.verify.check`` finds with each set of options in turn."""
    import refattn
    from refattn.verify import check

    for dtype in ("float32", "float64"):
        for mechanism in job.wide if dtype == "float64" else job.mechanisms:
            forward, vjp = getattr(refattn, mechanism), getattr(refattn, f"{mechanism}_vjp")
            for options, cases in OPTIONS[mechanism]:
                made = {name: x() if callable(x) else x for name, x in options.items()}

                def run(forward=forward, vjp=vjp, made=made, cases=cases, dtype=dtype):
                    kernel = lambda q, k, v: forward(q, k, v, **made, backend=job.backend)
                    pull = lambda dy, *qkv: vjp(dy, *qkv, **made, backend=job.backend)
                    more = {"gradients": pull, "dtype": dtype, "cases": cases}
                    return check(kernel, forward.__name__, **more, **made).lines

                yield judged(job, f"{mechanism} {label(options, cases)} {dtype}", run)


def label(options, cases):
    words = [
        f"{k}={x}" if isinstance(x, (int, float, str, tuple)) else k for k, x in options.items()
    ]
    return f"({', '.join(words)}) {cases if isinstance(cases, str) else cases[0]}"


def arrays(*shape, low=-1.0):
    """Numbers that are the same each time."""

    def make():
        import numpy as np

        return np.random.default_rng(list(shape)).uniform(low, 1.0, shape)

    return make


def some_pairs():
    import refattn

    masks = refattn.masks
    return masks.union(masks.local(150, 9), masks.global_tokens(150, [0, 70]))


def rows_open():
    return (arrays(130, 1)() > 0) * 1.0


D, LONG = "default", [(70, 70, 5, 4), (700, 700, 4, 5)]
ORDINARY = [(13, 13, 5, 7), (130, 130, 16, 16)]
# For each mechanism, sets of options and the sizes to try them with.
OPTIONS = {
    "softmax_attention": [
        ({}, D), ({"causal": True}, D), ({"softcap": 2.0, "scale": -0.3}, D),
        ({"bias": arrays(130, 150), "mask": lambda: arrays(130, 150)() > -0.3}, D),
        ({"causal": True}, [(700, 700, 4, 5), (300, 650, 7, 3)]),
    ],
    "local_attention": [
        ({"window": (7, 3)}, D), ({"window": 40, "causal": True}, D),
        ({"window": 5, "dilation": 3}, D), ({"window": (90, 70)}, LONG),
    ],
    "sparse_attention": [({"mask": some_pairs}, D), ({"mask": some_pairs, "scale": 0.9}, D)],
    "linear_attention": [
        ({}, D), ({"causal": True}, D), ({"feature_map": "relu", "normalize": False}, D),
        ({"feature_map": "taylor", "causal": True}, ORDINARY), ({}, LONG), ({"causal": True}, LONG),
        ({"key_mask": lambda: arrays(130)() > 0}, D),
    ],
    "linear_attention_chunked": [({"chunk": 16}, D), ({"chunk": 100}, LONG)],
    "linformer_attention": [
        ({"E": arrays(12, 130)}, D), ({"E": arrays(150, 130), "F": arrays(150, 130)}, D),
    ],
    "performer_attention": [
        ({"omega": arrays(24, 4), "causal": causal}, cases)
        for causal in (False, True) for cases in (D, [(700, 700, 4, 5)])
    ] + [({"omega": arrays(150, 4), "kind": "hyperbolic"}, D)],
    "block_attention": [
        ({"block": 13}, [(13, 13, 5, 7), (130, 130, 16, 16)]), ({"block": 7, "fuse": "exact"}, D),
    ],
    "two_level_attention": [({"block": 8}, D), ({"block": 8, "pool": "max"}, D)],
    "gated_attention": [({"gate": rows_open}, D), ({"gate": rows_open, "causal": True}, D)],
}  # fmt: skip


def main():
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    job = Job(**json.loads(sys.argv[1]))
    within(job)
    try:
        import refattn
    except Exception as error:
        words = f"{type(error).__name__}: {error}"
        return say(found=[{"how": "raised", "where": "import refattn", "words": words}])
    if not refattn.__file__.startswith(job.home):
        raise SystemExit(f"refattn came from {refattn.__file__}; expected it in {job.home}")
    by = {"vectors": by_vectors, "check": by_check}[job.stage]
    every = []
    for found in by(job):
        every += found
        if found and not job.whole:
            break
    say(found=every)


if __name__ == "__main__":
    main()
