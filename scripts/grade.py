"""Grade a folder of students' notebooks: run each, check its exercises, write a CSV.

Each notebook runs in a process of its own, with limits of time and memory, in a scratch folder and
with small sizes; what fails in one cell leaves the others standing. A row of the CSV is an
exercise, its points and reasons are what the student saw. A check that was taken out is run at the
end.

The code of a notebook runs with your rights: where you do not trust it, grade in a container.
"""

import argparse
import concurrent.futures
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import DeadKernelError
from tqdm import tqdm

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from refattn.course import table, write_csv  # noqa: E402
from refattn.exercises import MARKS, exercises, notebooks  # noqa: E402

HEADER = ["file", "notebook", "exercise", "points", "of", "score", "reason"]
KERNEL_DIED = 3  # exit status of the process that runs one notebook
QUIET = {"REFATTN_FAST": "1", "REFATTN_STATIC": "1", "TQDM_DISABLE": "1", "MPLBACKEND": "Agg"}


# In the process of one notebook


def run_one(path, name, seconds, gigabytes):
    """Run the notebook at `path`, then the checks of the course's own notebook `name`."""
    if gigabytes:
        limit_memory(gigabytes)
    nb = nbformat.read(path, as_version=4)
    own = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    nb.cells += [cell for cell in own.cells if re.match(r"check\(\d+, ", cell.source)]
    client = NotebookClient(
        nb,
        kernel_name="python3",
        allow_errors=True,
        timeout=seconds,
        interrupt_on_timeout=True,
        extra_arguments=["--log-level=CRITICAL"],
    )
    client.log.disabled = True
    try:
        client.execute(env=os.environ | QUIET)
    except DeadKernelError:
        return KERNEL_DIED
    return 0


def limit_memory(gigabytes):
    """Of this process and its kernel, where the system can."""
    try:
        import resource

        most = int(gigabytes * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    except (ImportError, ValueError, OSError):
        print("no limit of memory on this system", file=sys.stderr)


# For all of them


def course_name(path):
    """Which notebook of the course this is, by the checker that it makes or by its file's name;
    ValueError where it is none."""
    try:
        nb = nbformat.read(path, as_version=4)
        source = "\n".join(cell.source for cell in nb.cells if cell.cell_type == "code")
    except Exception as error:  # whatever a broken file makes of the reader
        raise ValueError(f"not a notebook: {type(error).__name__}") from error
    asked = re.findall(r"""checker\(["'](\w+)["']\)""", source)
    for name in notebooks():
        if name in asked or path.stem.startswith(name):
            return name
    raise ValueError("names no notebook of the course")


def grade(path, folder, limits):
    """Rows of the CSV for the notebook at `path`."""
    label = str(path.relative_to(folder))
    try:
        name = course_name(path)
    except ValueError as error:
        return [[label, "", "", 0, "", "", str(error)]]
    with tempfile.TemporaryDirectory() as scratch:
        marks = Path(scratch, "marks.jsonl")
        trouble = run_limited(path, name, marks, Path(scratch), limits)
        lines = marks.read_text(encoding="utf-8").splitlines() if marks.exists() else []
    best = {}
    for mark in map(json.loads, lines):
        number = mark["exercise"]
        if mark["notebook"] == name and mark["points"] >= best.get(number, mark)["points"]:
            best[number] = mark
    rows = []
    for number, exercise in exercises(name).items():
        missed = {"points": 0, "of": exercise.points, "score": "", "reason": trouble or "no check"}
        mark = best.get(number, missed)
        reason = " ".join(mark["reason"].split())
        score = mark["score"].removeprefix("score: ")
        rows.append([label, name, number, mark["points"], exercise.points, score, reason])
    return rows


def run_limited(path, name, marks, scratch, limits):
    """Run one notebook in its own process; words for what went wrong, or ""."""
    command = [sys.executable, __file__, "--one", path.resolve(), "--name", name]
    command += ["--cell-seconds", limits.cell_seconds, "--memory", limits.memory]
    env = os.environ | {MARKS: str(marks), "REFATTN_FIGURES": str(scratch / "figures")}
    process = subprocess.Popen(
        list(map(str, command)),
        cwd=scratch,
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # so that the kernel can be stopped with it
    )
    try:
        _, said = process.communicate(timeout=limits.seconds)
    except subprocess.TimeoutExpired:
        return f"took longer than {limits.seconds:g} s"
    finally:
        stop(process)
    if process.returncode == KERNEL_DIED:
        return "the kernel died"
    if process.returncode:
        return f"could not be run: {(said.strip().splitlines() or [process.returncode])[-1]}"
    return ""


def stop(process):
    """End a process, and the kernel that it may have left."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (AttributeError, ProcessLookupError, PermissionError):
        process.kill()
    process.wait()
    process.stderr.close()


def totals(rows):
    """Points of each notebook, as text."""
    sums = {}
    for label, name, _, points, of, *_ in rows:
        got, most, _ = sums.get(label, (0, 0, ""))
        sums[label] = (got + points, most + (of or 0), name)
    lines = [[label, name or "-", f"{p:g}", str(m)] for label, (p, m, name) in sums.items()]
    return table(["file", "notebook", "points", "of"], lines)


def find(folder):
    """Notebooks in the folder and below it, and whatever else ends in .ipynb."""
    paths = sorted(p for p in folder.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
    if not paths:
        raise SystemExit(f"{folder} holds no .ipynb file")
    return paths


def parser():
    main = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    main.add_argument("folder", type=Path, nargs="?", help="where the notebooks are")
    main.add_argument("--out", type=Path, default=Path("grades.csv"), help="the CSV to write")
    main.add_argument("--seconds", type=float, default=300, help="for one notebook (default 300)")
    main.add_argument("--cell-seconds", type=float, default=60, help="for one cell (default 60)")
    main.add_argument("--memory", type=float, default=8, help="GiB, 0 for no limit (default 8)")
    main.add_argument("--jobs", type=int, default=os.cpu_count(), help="notebooks at a time")
    main.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    main.add_argument("--name", help=argparse.SUPPRESS)
    return main


def main(argv=None):
    args = parser().parse_args(argv)
    if args.one:
        return run_one(args.one, args.name, args.cell_seconds, args.memory)
    if args.folder is None or not args.folder.is_dir():
        print(f"{args.folder} is no folder: make grade DIR=folder", file=sys.stderr)
        return 2
    paths = find(args.folder)
    with concurrent.futures.ThreadPoolExecutor(max(1, args.jobs)) as pool:
        found = [pool.submit(grade, path, args.folder, args) for path in paths]
        done = concurrent.futures.as_completed(found)
        for _ in tqdm(done, total=len(found), unit="notebook"):
            pass
    rows = [row for one in found for row in one.result()]
    write_csv(args.out, HEADER, rows)
    print(totals(rows))
    print(f"\nPoints and reasons: {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
