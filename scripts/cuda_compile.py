"""Compile every CUDA kernel for real, where there is no GPU: registers, memory, spills, float64.

    python scripts/cuda_compile.py [WORD] [--out FILE]

Only kernels with WORD in their label; FILE gets the table as JSON.

A module ``refattn/MECHANISM/cuda_*.py`` takes part by a function ``instances()``, which yields
tuples (label, function, signature, tuned, threads): the Python function of a kernel for some sizes,
the Numba types of its arguments, whether it is made to be fast, and the threads of a block. A tuned
kernel computes in float32.

Every kernel must fit: its registers times its threads on a multiprocessor, its shared memory into
the 48 KiB that every block may have. A tuned one must keep its arrays in registers, so no stack and
no spills, and must not have a number of float64 in it, which one careless constant is enough for.

Needs the packages of the extra ``cuda-check``.
"""

import argparse
import functools
import importlib
import json
import multiprocessing
import pathlib
import re
import subprocess
import sys
import tempfile
import types
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass

import refattn

CARDS = ((8, 0), (9, 0))  # compute capability: A100, H100
REGISTERS = 2**16  # of a multiprocessor
SHARED = 48 * 1024


@dataclass(frozen=True)
class Compiled:
    """What the assembler says of one kernel on one card."""

    label: str
    card: tuple[int, int]
    registers: int
    shared: int
    stack: int
    spills: int
    float64: int
    tuned: bool
    threads: int

    @property
    def architecture(self):
        return "sm_{}{}".format(*self.card)

    def complaints(self):
        """What is wrong with it, in words."""
        taken = -(-self.registers // 8) * 8 * self.threads  # registers are given out by eights
        if taken > REGISTERS:
            yield f"{self.threads} threads of {self.registers} registers: at most {REGISTERS} fit"
        if self.shared > SHARED:
            yield f"{self.shared} bytes of shared memory: a block has {SHARED}"
        for name in ("stack", "spills", "float64") if self.tuned else ():
            if getattr(self, name):
                yield f"tuned, and its {name} is {getattr(self, name)}; expected 0"


def missing():
    """What is needed and not there, in words; None where all is."""
    try:
        import numba_cuda  # noqa: F401

        assembler()
    except (ImportError, FileNotFoundError) as error:
        return f"{error}: pip install -e '.[cuda-check]'"
    return None


def assembler():
    """The path of ptxas, which comes with cuda-toolkit[nvcc]."""
    import nvidia

    for folder in nvidia.__path__:
        for path in sorted(pathlib.Path(folder).glob("*/bin/ptxas*")):
            return path
    raise FileNotFoundError("no ptxas in the package cuda-toolkit[nvcc]")


def instances():
    """Those of every kernel module."""
    root = pathlib.Path(refattn.__file__).parent
    for path in sorted(root.glob("*/cuda_*.py")):
        module = importlib.import_module(f"refattn.{path.parent.name}.{path.stem}")
        if hasattr(module, "instances"):
            yield from module.instances()


def compiled(instance, card):
    """Compile one instance for one card."""
    import numba.cuda.dispatcher as dispatcher

    from refattn.gpu import cuda

    label, function, signature, tuned, threads = instance
    # Device functions are compiled for the device that is there; none is.
    dispatcher.get_current_device = lambda: types.SimpleNamespace(compute_capability=card)
    ptx, _ = cuda.compile_ptx(function, signature, cc=card)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "kernel.ptx")
        path.write_text(ptx)
        command = [assembler(), "-v", "-arch=sm_{}{}".format(*card), path, "-o", f"{path}.bin"]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{label}: {done.stderr}")

    def largest(pattern):
        return max((int(x) for x in re.findall(pattern, done.stderr)), default=0)

    return Compiled(
        label,
        card,
        registers=largest(r"Used (\d+) registers"),
        shared=largest(r"(\d+) bytes smem"),
        stack=largest(r"(\d+) bytes stack frame"),
        spills=largest(r"(\d+) bytes spill"),
        float64=len(re.findall(r"\.f64", ptx)),
        tuned=tuned,
        threads=threads,
    )


@functools.cache
def numbered():
    return list(instances())


def compiled_by_number(number, card):
    """For other processes, to which an instance cannot be sent."""
    return compiled(numbered()[number], card)


def main(argv=None):
    """Print the table; the exit status is 1 where something does not fit."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("word", nargs="?", default="", help="only kernels with it in their label")
    parser.add_argument("--out", type=pathlib.Path, help="where to write the table as JSON")
    args = parser.parse_args(argv)
    if missing():
        sys.exit(missing())
    chosen = [i for i, (label, *_) in enumerate(numbered()) if args.word in label]
    if not chosen:
        sys.exit(f"no kernel has {args.word!r} in its label")
    jobs = [(i, card) for i in chosen for card in CARDS]
    columns = "registers", "shared", "stack", "spills", "float64"
    width = 3 + max(len(numbered()[i][0]) for i in chosen)
    print(f"{'kernel':<{width}}{'card':>6}" + "".join(f"{name:>10}" for name in columns))
    wrong, lines = [], []
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        for found in pool.map(compiled_by_number, *zip(*jobs, strict=True)):
            numbers = "".join(f"{getattr(found, name):>10}" for name in columns)
            name = f"{found.label}{' *' * found.tuned}"
            print(f"{name:<{width}}{found.architecture:>6}{numbers}", flush=True)
            wrong += [f"{found.label}, {found.architecture}: {x}" for x in found.complaints()]
            lines.append(json.dumps(asdict(found) | {"card": found.architecture}))
    print("* tuned: expected to have no stack, no spills and no float64", *wrong, sep="\n")
    if args.out:
        args.out.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
