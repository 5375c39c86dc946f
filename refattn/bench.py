"""Times of refattn's compiled attentions, and of whatever stands beside them in the same run."""

import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import tqdm

import refattn
from refattn.course import slope, table

HEADS, D = 8, 64
# Of q and k for Performer: performer-pytorch adds 1e-4 to each feature, which among larger inputs
# is most of it, so that nothing could be compared.
SMALL = 0.1
PAUSE = 0.03  # seconds, in which threads that a library left spinning come to rest


@dataclass(frozen=True)
class Work:
    """A piece of work: its name, (heads, n, d), and how refattn does it.

    ``ours(q, k, v, dy)`` makes the function that is timed; ``flops`` are those of one head, of
    useful work; ``goals`` maps a peer's name to the ratio of its time to ours that is aimed at;
    ``size`` is the standard deviation of q and k.
    """

    name: str
    shape: tuple
    ours: Callable
    flops: int = 0
    goals: dict = field(default_factory=dict)
    size: float = 1.0


def inputs(shape, dtype=np.float32, size=1.0):
    """q and k of normal numbers of this size, v and dy of size 1: the same on every call."""
    rng = np.random.default_rng(list(shape))
    return [(s * rng.standard_normal(shape)).astype(dtype) for s in (size, size, 1, 1)]


def forward(attention, **options):
    """``Work.ours`` of a forward pass."""
    return lambda q, k, v, dy: lambda: attention(q, k, v, backend="numba", **options)


def both(attention, vjp, keeps_lse=False, **options):
    """``Work.ours`` of a forward and a backward pass, which gives y and the gradients."""

    def make(q, k, v, dy):
        def run():
            if not keeps_lse:
                y = attention(q, k, v, backend="numba", **options)
                return y, *vjp(dy, q, k, v, backend="numba", **options)
            saved = attention(q, k, v, backend="numba", return_lse=True, **options)
            return saved[0], *vjp(dy, q, k, v, backend="numba", saved=saved, **options)

        return run

    return make


def works():
    """The table: every kernel at the sizes that its peers are measured at."""
    local, long = {"window": 128}, (HEADS, 16384, D)
    bigbird = refattn.masks.bigbird(16384, 64, rng=0)
    tree = refattn.masks.hierarchical(4096, 16)
    omega = refattn.random_features(256, D, rng=0).astype(np.float32)
    E = np.random.default_rng(0).standard_normal((256, 16384)).astype(np.float32) / 128
    gate = (np.arange(4096) % 2).astype(np.float32)[:, None]
    a, cost = refattn, {}
    for n in (1024, 2048, 4096, 16384):
        cost[n] = a.softmax_attention_cost(n, n, D, D).flops
    found = []
    for n in (1024, 2048, 4096):
        for causal, goal in ((False, 1.05), (True, 1.1)):
            kind = "causal" if causal else "full"
            flops = a.softmax_attention_cost(n, n, D, D, causal=causal).flops
            ours = forward(a.softmax_attention, causal=causal)
            goals = {"torch SDPA": goal}
            found.append(Work(f"softmax, {kind}", (HEADS, n, D), ours, flops, goals))
    for causal in (False, True):
        kind = "causal" if causal else "full"
        ours = both(a.softmax_attention, a.softmax_attention_vjp, True, causal=causal)
        name = f"softmax, {kind}, forward and backward"
        found.append(Work(name, (HEADS, 4096, D), ours, 0, {"torch SDPA and autograd": 1.1}))
    flops = a.local_attention_cost(16384, 16384, D, D, **local).flops
    found += [
        Work(
            "local, window 128 on each side",
            long,
            forward(a.local_attention, **local),
            flops,
            {"FlexAttention, compiled": 3.5, "local-attention": 6.0},
        ),
        Work(
            "local, forward and backward",
            long,
            both(a.local_attention, a.local_attention_vjp, **local),
            0,
            {"local-attention and autograd": 6.0},
        ),
        Work(
            "block-sparse, BigBird on blocks of 64",
            long,
            forward(a.sparse_attention, mask=bigbird),
            a.sparse_attention_cost(16384, 16384, D, D, nnz=bigbird.nnz).flops,
            {"FlexAttention, compiled": 2.0},
        ),
        Work(
            "csr, hierarchical b = 16",
            (HEADS, 4096, D),
            forward(a.sparse_attention, mask=tree),
            a.sparse_attention_cost(4096, 4096, D, D, nnz=tree.nnz).flops,
            {"FlexAttention, compiled": 2.0},
        ),
        Work(
            "linear, elu + 1, full",
            long,
            forward(a.linear_attention),
            a.linear_attention_cost(16384, 16384, D, D).flops,
            {"the formula, torch.compile": 2.0},
        ),
        Work(
            "linear, elu + 1, causal",
            long,
            forward(a.linear_attention_chunked),
            a.linear_attention_cost(16384, 16384, D, D, causal=True).flops,
            {"pytorch-fast-transformers, numerator": 3.0},
        ),
        Work(
            "Performer, 256 features, full",
            long,
            forward(a.performer_attention, omega=omega),
            a.performer_attention_cost(16384, 16384, D, D, num_features=256).flops,
            {"performer-pytorch": 6.0},
            SMALL,
        ),
        Work(
            "Performer, 256 features, causal",
            long,
            forward(a.performer_attention, omega=omega, causal=True),
            a.performer_attention_cost(16384, 16384, D, D, num_features=256, causal=True).flops,
            {"performer-pytorch": 50.0},
            SMALL,
        ),
        Work(
            "Linformer, r = 256",
            long,
            forward(a.linformer_attention, E=E),
            a.linformer_attention_cost(16384, 16384, D, D, r=256).flops,
            {"the formula, torch": 2.0, "the formula, torch.compile": 2.0},
        ),
        Work(
            "gate, half of the rows off",
            (HEADS, 4096, D),
            forward(a.gated_attention, gate=gate),
            a.gated_attention_cost(4096, 4096, D, D, open_rows=2048).flops,
            {"the same, all rows on": 1.85},
        ),
    ]
    return found


def alternate(functions, *, repeats=7, seconds=20.0):
    """Times in seconds of each function, called in turn after one call to warm up.

    Parameters
    ----------
    functions : {name: callable of no arguments}
    repeats : int
        Rounds; fewer, but two at least, once ``seconds`` are over.

    Returns
    -------
    {name: list of float}
    """
    times = {name: [] for name in functions}
    for run in functions.values():
        run()
    start = time.perf_counter()
    for done in range(repeats):
        if done >= 2 and time.perf_counter() - start > seconds:
            break
        for name, run in functions.items():
            time.sleep(PAUSE)
            before = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - before)
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
import resource, sys
import numpy as np, refattn
name, n, options = sys.argv[1], int(sys.argv[2]), eval(sys.argv[3])
def arrays(n):
    rng = np.random.default_rng(0)
    return [rng.standard_normal((1, n, 64), dtype=np.float32) for _ in range(3)]
run = getattr(refattn, name)
run(*arrays(4096), backend="numba", **options)  # compiled, threads and their buffers there
q, k, v = arrays(n)
y = np.empty_like(q); y[:] = 0; del y
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
y = run(q, k, v, backend="numba", **options)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print((after - before) * 1024)
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


def alone(only="", seconds=2.0, *, growing=False, peaks=False, progress=True):
    """The table of refattn's own times, as text.

    Parameters
    ----------
    only : str
        Works whose name holds this.
    seconds : float
        About so long a work.
    growing, peaks : bool
        Also the slope of time against N, and the peak of memory: a minute each.
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
        start = time.perf_counter()
        run()
        first = time.perf_counter() - start
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
