"""Times of refattn's compiled attentions, and of whatever stands beside them in the same run."""

import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
import tqdm

import refattn
from refattn.course import slope, table
from refattn.works import D, forward, inputs, works

WARM = 0.05  # seconds: by then threads that another library left spinning have come to rest


def timed(run):
    """Seconds of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def alternate(functions, *, repeats=7, seconds=20.0, clock=timed):
    """Times in seconds of each function, called in turn.

    Each turn begins with calls that are not timed, for ``WARM`` seconds, but where one call takes
    twenty times as long.

    Parameters
    ----------
    functions : {name: callable of no arguments}
    repeats : int
        Rounds; fewer, but two at least, once ``seconds`` are over.
    clock : callable
        Calls its argument and returns the seconds that this took.

    Returns
    -------
    {name: list of float}
    """
    times = {name: [] for name in functions}
    last = {name: clock(run) for name, run in functions.items()}
    start = time.perf_counter()
    for done in range(repeats):
        if done >= 2 and time.perf_counter() - start > seconds:
            break
        for name, run in functions.items():
            warm = time.perf_counter() + WARM
            while last[name] < 20 * WARM and time.perf_counter() < warm:
                run()
            last[name] = clock(run)
            times[name].append(last[name])
    return times


def spread(times):
    """Half the distance of the quartiles over the median; 0 of one time."""
    if len(times) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
    return (high - low) / 2 / middle


GROWTH = {
    "softmax, full": ((4096, 8192, 16384), lambda n: {}, "softmax_attention", 2.05),
    "local, window 128": ((4096, 16384, 65536), lambda n: {"window": 128}, "local_attention", 1.05),
    "linear, full": ((4096, 16384, 65536), lambda n: {}, "linear_attention", 1.05),
    "linear, causal": ((4096, 16384, 65536), lambda n: {}, "linear_attention_chunked", 1.05),
    "Performer, full": (
        (4096, 16384, 65536),
        lambda n: {"omega": refattn.random_features(256, D, rng=0).astype(np.float32)},
        "performer_attention",
        1.05,
    ),
}


def growth(progress=True):
    """{name: (sizes, median seconds, fitted slope of log time over log n, goal)}, two heads."""
    found = {}
    for name, (sizes, options, attention, goal) in tqdm.tqdm(
        GROWTH.items(), desc="growth", disable=not progress
    ):
        seconds = []
        for n in sizes:
            q, k, v, _ = inputs((2, n, D))
            run = forward(getattr(refattn, attention), **options(n))(q, k, v, None)
            seconds.append(statistics.median(alternate({"": run}, repeats=5)[""]))
        found[name] = (list(sizes), seconds, slope(sizes, seconds), goal)
    return found


MEMORY = """
import sys
import numpy as np, refattn
from refattn.course import resident
name, n, options = sys.argv[1], int(sys.argv[2]), eval(sys.argv[3])
def arrays(n):
    rng = np.random.default_rng(0)
    return [rng.standard_normal((1, n, 64), dtype=np.float32) for _ in range(3)]
run = getattr(refattn, name)
run(*arrays(64), backend="numba", **options)  # compiled, and threads there
q, k, v = arrays(n)
print(int(resident(lambda: run(q, k, v, backend="numba", **options), warm=False)))
"""
MEMORY_OF = {
    "softmax_attention": ("{}", (4096, 16384, 65536)),
    "local_attention": ("{'window': 128}", (4096, 16384, 65536, 2**20)),
    "linear_attention": ("{}", (4096, 16384, 65536, 2**20)),
    "linear_attention_chunked": ("{}", (4096, 16384, 65536, 2**20)),
    "performer_attention": (
        "{'omega': refattn.random_features(256, 64, rng=0).astype(np.float32)}",
        (4096, 16384, 65536, 2**20),
    ),
}


def memory(progress=True):
    """{name: (sizes, bytes)}: growth of the peak resident memory in one call, one head, beyond
    inputs and an output; each in a process of its own."""
    found = {}
    pairs = [(name, n) for name, (_, sizes) in MEMORY_OF.items() for n in sizes]
    for name, n in tqdm.tqdm(pairs, desc="memory", disable=not progress):
        done = subprocess.run(
            [sys.executable, "-c", MEMORY, name, str(n), MEMORY_OF[name][0]],
            capture_output=True,
            text=True,
            check=True,
        )
        sizes, used = found.setdefault(name, ([], []))
        sizes.append(n)
        used.append(int(done.stdout))
    return found


FIRST = """
import sys, time
import numpy as np, refattn
x = np.zeros((1, 256, 64), np.float32)
start = time.perf_counter()
getattr(refattn, sys.argv[1])(x, x, x, backend="numba", **eval(sys.argv[2]))
print(time.perf_counter() - start)
"""
FIRST_OF = {name: options for name, (options, _) in MEMORY_OF.items()} | {
    "sparse_attention": "{'mask': refattn.masks.local(256, 16)}"
}


def first_calls(progress=True):
    """{name: (seconds, seconds)} of the first call in a process: with nothing compiled before, and
    with machine code on disk. Numba's import is part of both."""
    found = {}
    for name, options in tqdm.tqdm(FIRST_OF.items(), desc="first calls", disable=not progress):
        with tempfile.TemporaryDirectory() as folder:
            runs = [
                subprocess.run(
                    [sys.executable, "-c", FIRST, name, options],
                    env={**os.environ, "NUMBA_CACHE_DIR": folder},
                    capture_output=True,
                    text=True,
                    check=True,
                )
                for _ in range(2)
            ]
        found[name] = [float(run.stdout) for run in runs]
    return found


def machine():
    """Processor, cores, threads, Python and the versions that matter."""
    import numba
    import scipy

    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            name = next(x.split(":")[1].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return {
        "processor": name,
        "threads": numba.get_num_threads(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "scipy": scipy.__version__,
        "numba": numba.__version__,
        "refattn": refattn.__version__,
    }


def matmul_rate(n=4096):
    """FLOP/s of a float32 matrix product with all threads: the limit of dense attention."""
    a, b = inputs((n, n))[:2]
    return 2 * n**3 / statistics.median(alternate({"": lambda: a @ b}, repeats=5)[""])


def alone(only="", seconds=2.0, *, growing=False, peaks=False, starts=False, progress=True):
    """The table of refattn's own times, as text.

    Parameters
    ----------
    only : str
        Works whose name holds this.
    seconds : float
        About so long a work.
    growing, peaks, starts : bool
        Also the slope of time against N, the peak of memory, and the first calls, compiled and from
        the cache: a minute each.
    progress : bool
        Show a bar.

    Returns
    -------
    str

    Raises
    ------
    ValueError
        No work of that name.
    """
    chosen = [work for work in works() if only in work.name]
    if not chosen:
        names = ", ".join(sorted({repr(work.name) for work in works()}))
        raise ValueError(f"no work's name holds {only!r}; they are {names}")
    limit, rows = matmul_rate(), []
    for work in tqdm.tqdm(chosen, desc="bench", disable=not progress, leave=False):
        run = work.ours(*inputs(work.shape, size=work.size))
        first = timed(run)
        times = alternate({"": run}, seconds=seconds)[""]
        middle = statistics.median(times)
        rate = work.flops * work.shape[0] / middle
        share = f"{rate / limit:.0%}" if work.flops else ""
        shape = "x".join(map(str, work.shape))
        rows.append(
            [work.name, shape, f"{1e3 * middle:.1f}", f"{spread(times):.0%}", f"{first:.1f}", share]
        )
    header = ["work", "heads x n x d", "ms", "spread", "first call s", "of a matmul's rate"]
    parts = [f"{machine()['threads']} threads, float32", table(header, rows)]
    parts += [growth_table(growth(progress))] if growing else []
    parts += [memory_table(memory(progress))] if peaks else []
    parts += [first_table(first_calls(progress))] if starts else []
    return "\n\n".join(parts)


def growth_table(found):
    """Slopes, as text."""
    rows = [[name, f"{p:.3f}", f"{goal:g}"] for name, (_, _, p, goal) in found.items()]
    return table(["time against N, 2 heads", "slope", "goal"], rows)


def memory_table(found):
    """Peaks, as text."""
    rows = []
    for name, (sizes, used) in found.items():
        peaks = ", ".join(f"{n}: {b / 1e6:.1f}" for n, b in zip(sizes, used, strict=True))
        rows.append([name, peaks])
    return table(["memory beyond inputs and output, 1 head", "MB by N"], rows)


def first_table(found):
    """First calls, as text."""
    rows = [[name, *(f"{seconds:.1f}" for seconds in both)] for name, both in found.items()]
    return table(["first call in a process, s", "compiled then", "from the cache"], rows)
