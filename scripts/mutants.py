"""Make random mutants of refattn, one change each, and see who catches them.

A mutant is a copy of refattn in which one operator, bound, index, constant or sign is another. It
is held against the stored vectors, which the code as it is wrote; what they let through, against
refattn.verify.check (Numba kernels alone) and then the tests. Each runs in a process of its own
with limits: one that crashes, hangs or fills the memory is caught too.

    python scripts/mutants.py --kind numba --count 20
    python scripts/mutants.py --only softmax/tiles.py --jobs 2
    python scripts/mutants.py --resume build/mutants.jsonl --record

The same seed gives the same mutants, and a larger count has those of a smaller. Exit status 0 where
every survivor is explained in scripts/data/mutants.json, 1 where one is not, 2 where nothing can be
learned since the code as it is fails.
"""

import argparse
import itertools
import json
import os
import queue
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mutants_change import MODULE, sample
from mutants_grade import Job
from mutants_sandbox import QUIET, ROOT, Sandbox, importers
from tqdm import tqdm

RECORD = ROOT / "scripts" / "data" / "mutants.json"
STAGES = ("vectors", "check", "tests")
FILES = {
    "numba": """softmax/cpu softmax/tiles softmax/tiles_backward sparse/cpu sparse/csr_cpu
        sparse/plan sparse/tiles sparse/tiles_backward linear/cpu linear/over_features linear/tiles
        linear/tiles_backward linear/maps linear/groups performer/cpu performer/exponentials
        linformer/cpu hierarchy/cpu gates/cpu kernels scalars""",
    "truth": """softmax/formula softmax/merge softmax/steps sparse/formula sparse/pairs
        linear/formula linear/core linear/chunked linear/feature_maps linear/inputs linear/steps
        performer/formula performer/features linformer/formula hierarchy/formula
        hierarchy/two_level hierarchy/merged gates/formula gates/functions gates/options arrays
        masks""",
    "costs": """softmax/formula sparse/formula linear/formula linear/chunked linear/inputs
        performer/formula linformer/formula hierarchy/formula hierarchy/two_level gates/formula""",
}
BACKEND = {"numba": "numba", "truth": "numpy"}
STAGES_OF = {"numba": STAGES, "truth": ("vectors", "tests"), "costs": ("tests",)}
MECHANISMS = {
    "softmax": ("softmax_attention", "merge_attention"),
    "sparse": ("sparse_attention", "local_attention"),
    "linear": ("linear_attention", "linear_attention_chunked", "linear_attention_step"),
    "performer": ("performer_attention",),
    "linformer": ("linformer_attention",),
    "hierarchy": ("block_attention", "two_level_attention"),
    "gates": ("gated_attention",),
}
NO_CHECK = ("merge_attention", "linear_attention_step")  # no function of q, k and v
# For each package, the tests that are about it, likeliest first; "" for the files beside them.
TESTS = {
    "numba": {
        "softmax": "backends kernels cpu_properties",
        "sparse": "cpu_sparse backends cpu_properties",
        "linear": "cpu_linear backends cpu_properties",
        "performer": "cpu_linear backends cpu_properties",
        "linformer": "linformer backends",
        "hierarchy": "hierarchy backends cpu_properties",
        "gates": "gates backends cpu_properties",
        "": "kernels backends cpu_linear cpu_sparse cpu_properties",
    },
    "truth": {
        "softmax": "formulas vjps leaks steps properties errors",
        "sparse": "formulas vjps leaks masks properties errors",
        "linear": "linear formulas vjps leaks properties errors",
        "performer": "performer formulas vjps leaks properties errors features_check",
        "linformer": "linformer formulas vjps leaks properties errors",
        "hierarchy": "hierarchy formulas vjps leaks properties errors",
        "gates": "gates formulas vjps leaks properties errors",
        "": "masks formulas vjps leaks properties linear errors",
    },
    "costs": {
        package: f"costs gates {package}"
        for package in ("linear", "performer", "linformer", "hierarchy")
    }
    | dict.fromkeys(("softmax", "sparse", "gates"), "costs gates"),
}
PROCESSOR, WALL = 40.0, 240.0  # seconds for one case, compiling included
WHOLE = {"vectors": 1200.0, "check": 1200.0, "tests": 900.0}  # seconds of the clock for a stage


def mutants(kind, seed, texts=None):
    """Mutants as dicts, in an order that the seed fixes."""
    texts = texts or {
        f"{name}.py": (ROOT / "refattn" / f"{name}.py").read_text(encoding="utf-8")
        for name in FILES[kind].split()
    }
    for file, change in sample(texts, f"{seed} {kind}", costs=kind == "costs"):
        made = change.made(texts[file])
        before, after = (x.splitlines()[change.line - 1].strip() for x in (texts[file], made))
        yield {
            "kind": kind,
            "file": file,
            "line": change.line,
            "function": change.function,
            "class": change.group,
            "before": before,
            "after": after,
            "text": made,
        }


def key(mutant):
    """What a mutant is known by, wherever its line has moved to."""
    return tuple(mutant[name] for name in ("kind", "file", "function", "before", "after"))


def chosen(options):
    """The mutants that were asked for."""
    found = []
    for kind in options.kind or FILES:
        words = ("file", "function", "before", "after", "class")
        fit = (m for m in mutants(kind, options.seed)
               if options.only in " ".join(m[w] for w in words))  # fmt: skip
        found += itertools.islice(fit, options.count)
    random.Random(options.seed).shuffle(found)  # a run that is stopped has seen some of all
    return found


class Grader:
    """A sandbox and what the code as it is does in it."""

    def __init__(self, home, vectors, stages):
        files = [f"{name}.py" for names in FILES.values() for name in names.split()]
        self.sandbox, self.vectors, self.stages = Sandbox(home, files), vectors, stages
        self.known = {}

    def learn(self, kinds, say=print):
        """Run the code as it is: what it fails is left out later, what it compiles is kept."""
        kept = self.sandbox.home / "known.json"
        if kept.exists():  # the run that made this sandbox has done so
            found = json.loads(kept.read_text(encoding="utf-8"))
            self.known = {tuple(name.split()): lines for name, lines in found.items()}
        self.sandbox.plain()
        for kind in kinds:
            everything = [name for names in MECHANISMS.values() for name in names]
            for stage in self.stages:
                if stage not in STAGES_OF[kind] or (kind, stage) in self.known:
                    continue
                if stage == "tests":
                    self._tests_pass(kind, say)
                    self.known[kind, stage] = []
                else:
                    found = self.ask(kind, stage, everything, whole=True)
                    lines = [x["where"] for x in found["lines"]]
                    if found["how"]:
                        raise SystemExit(f"the code as it is {found['how']}: {found['words']}")
                    for line in lines:
                        say(f"left out, wrong in the code as it is: {line}")
                    self.known[kind, stage] = lines
        self.sandbox.keep()
        found = {f"{kind} {stage}": lines for (kind, stage), lines in self.known.items()}
        kept.write_text(json.dumps(found), encoding="utf-8")

    def _tests_pass(self, kind, say):
        files = " ".join(dict.fromkeys(" ".join(TESTS[kind].values()).split()))
        how, output, words, _ = self.sandbox.run(pytest_of(files), WHOLE["tests"])
        if how:
            say(output[-3000:])
            print(f"the tests {files} fail on the code as it is: {how} {words}")
            raise SystemExit(2)

    def grade(self, mutant):
        """The mutant with its verdict."""
        # Nothing compiled calls what stands there, but for the decorator.
        alone = mutant["file"] == "kernels.py" and mutant["function"] not in (MODULE, "compiled")
        self.sandbox.set(mutant["file"], mutant["text"], alone)
        kind, result, seconds = mutant["kind"], None, 0.0
        for stage in self.stages:
            if stage in mutant.get("passed", ()) or stage not in STAGES_OF[kind]:
                continue
            if stage == "tests":
                result = self._by_tests(kind, mutant["file"])
            else:
                result = self._by_cases(kind, stage, mutant["file"])
            seconds += result.pop("seconds")
            if result["how"]:
                result["by"] = stage
                break
        self.sandbox.reset()
        result = result or {"how": "", "where": "", "words": ""}
        verdict = "caught" if result["how"] else "survived"
        return {
            **{name: x for name, x in mutant.items() if name != "text"},
            "verdict": verdict,
            "by": result.get("by", ""),
            "how": result["how"],
            "where": result["where"],
            "words": result["words"][:300],
            "seconds": round(seconds + mutant.get("seconds", 0.0), 1),
            "passed": [] if result["how"] else list(self.stages),
        }

    def _by_cases(self, kind, stage, file):
        mechanisms = self.reached(kind, file)
        own = MECHANISMS.get(file.split("/")[0], mechanisms) if kind == "numba" else mechanisms
        more = {"wide": own, "forward": "backward" not in file}
        found = self.ask(kind, stage, mechanisms, **more)
        if not found["how"] and found["lines"]:
            found |= found["lines"][0]
        return found

    def ask(self, kind, stage, mechanisms, wide=None, **more):
        """Run a job: how it ended where it did not end well, and the lines that are wrong."""
        wide = mechanisms if wide is None else wide
        tried = [
            tuple(m for m in names if stage == "vectors" or m not in NO_CHECK)
            for names in (mechanisms, wide)
        ]
        job = Job(
            stage,
            BACKEND[kind],
            tried[0],
            str(self.vectors),
            str(self.sandbox.home),
            PROCESSOR,
            WALL,
            wide=tried[1],
            known=tuple(self.known.get((kind, stage), ())),
            **more,
        )
        script = str(Path(__file__).with_name("mutants_grade.py"))
        how, output, words, seconds = self.sandbox.run([script, job.to_json()], WHOLE[stage])
        said = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
        where = next((x["at"] for x in reversed(said) if "at" in x), "import refattn")
        lines = said[-1].get("found", []) if said else []
        return {"how": how, "where": where, "words": words, "lines": lines, "seconds": seconds}

    def _by_tests(self, kind, file):
        package = file.split("/")[0]
        files = TESTS[kind][package if "/" in file else ""]
        doctests = ["--doctest-modules", f"refattn/{package}"] if kind != "numba" else []
        command = [*pytest_of(files), *doctests]
        how, output, words, seconds = self.sandbox.run(command, WHOLE["tests"])
        failed = re.search(r"^(?:FAILED|ERROR) (?:tests/)?(\S+)(?: - (.*))?", output, re.MULTILINE)
        where = failed[1] if failed else "tests"
        words = (failed[2] or words) if failed else words
        return {"how": how, "where": where, "words": words, "seconds": seconds}

    def reached(self, kind, file):
        """Attentions that the file can change, those of its own folder first."""
        gone = importers(self.sandbox.imports, file.removesuffix(".py").replace("/", "."))
        own = file.split("/")[0]
        module = {"numba": "cpu", "truth": "formula"}[kind]
        near = [own] if own in MECHANISMS else []
        for package in MECHANISMS:
            homes = {f"{package}.{module}"} | {f"{package}.{x}" for x in ("merge", "two_level")}
            reaches = homes & gone or package == "gates"  # which calls any other
            if package not in near and reaches:
                near.append(package)
        return [name for package in near for name in MECHANISMS[package]]


def pytest_of(files):
    paths = [f"tests/test_{name}.py" for name in files.split()]
    words = "not readme and not links and not lane"
    return ["-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-k", words, *paths]


def recorded():
    """The record, or an empty one."""
    if not RECORD.exists():
        return {"left_out": {}, "mutants": []}
    return json.loads(RECORD.read_text(encoding="utf-8"))


def explained():
    """{key: sentence} of the survivors in the record."""
    return {key(m): m["explanation"] for m in recorded()["mutants"] if m.get("explanation")}


def write_record(results, options, digest, left_out):
    known = explained()
    for m in results:
        m.pop("passed", None)
        m.pop("vectors", None)
        m["words"] = re.sub(r"/\S*/", "", m["words"])  # a traceback's paths are this machine's
        if m["verdict"] == "survived":
            m["explanation"] = known.get(key(m), "")
    results.sort(key=lambda m: (m["kind"], m["file"], m["line"], m["after"]))
    left_out = recorded()["left_out"] if left_out is None else left_out
    head = {"seed": options.seed, "vectors": digest, "left_out": left_out}
    lines = ",\n".join(json.dumps(m, ensure_ascii=False) for m in results)
    text = json.dumps(head, indent=1, ensure_ascii=False)
    RECORD.write_text(f'{text[:-2]},\n "mutants": [\n{lines}\n ]\n}}\n', encoding="utf-8")


def write_vectors(folder):
    """The full set of vectors, by the code as it is; how many there are and their digest."""
    if not (folder / "manifest.json").exists():
        command = [sys.executable, "-m", "refattn", "vectors", str(folder)]
        subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, **QUIET})
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    return {"cases": len(manifest["cases"]), "digest": manifest["digest"]}


def parser():
    main = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    main.add_argument("--kind", choices=list(FILES), action="append", help="all if not given")
    main.add_argument("--count", type=int, default=150, help="of each kind (default 150)")
    main.add_argument("--seed", type=int, default=0, help="of the random choice (default 0)")
    main.add_argument("--only", default="", help="those whose file, function or line holds this")
    main.add_argument("--jobs", type=int, default=1, help="processes at a time (default 1)")
    main.add_argument("--until", choices=STAGES, default="tests", help="the last stage")
    main.add_argument("--vectors", type=Path, help="a folder that `refattn vectors` wrote")
    main.add_argument(
        "--home",
        type=Path,
        help="a folder for copies and compiled code that a later run finds again, while the files "
        "stay as they are (default: one that is deleted)",
    )
    main.add_argument("--out", type=Path, default=ROOT / "build" / "mutants.jsonl",
                      help="where results go, a line each")  # fmt: skip
    main.add_argument(
        "--resume",
        type=Path,
        metavar="FILE",
        help="go on with the results in FILE: what is caught or explained there is not run again",
    )
    main.add_argument("--record", action="store_true", help=f"write {RECORD.relative_to(ROOT)}")
    return main


def done_before(options, digest):
    """{key: result} of an earlier run: those that need no more, and the stages others passed."""
    found = {}
    if options.resume and options.resume.exists():
        for line in options.resume.read_text(encoding="utf-8").splitlines():
            result = json.loads(line)
            if result["vectors"] != digest and result["verdict"] == "survived":
                result["passed"] = []  # there are other vectors now
            found[key(result)] = result
    return found


def main(arguments=None):
    """Run, print what survived; the exit status."""
    options = parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what runs is ended too
    path = options.resume or options.out
    path.parent.mkdir(parents=True, exist_ok=True)
    stages = STAGES[: STAGES.index(options.until) + 1]
    with tempfile.TemporaryDirectory(prefix="mutants_") as folder:
        folder = (options.home or Path(folder)).resolve()
        vectors = (options.vectors or folder / "vectors").resolve()
        about = write_vectors(vectors)
        asked, before = chosen(options), done_before(options, about["digest"])
        why = explained()
        waiting = []
        for m in asked:
            old = before.get(key(m), {"verdict": "", "passed": []})
            ahead = [x for x in stages if x in STAGES_OF[m["kind"]] and x not in old["passed"]]
            if old["verdict"] == "caught" or not ahead:
                continue
            waiting.append({**m, "passed": old["passed"], "seconds": old.get("seconds", 0.0)})
        left_out = run_all(waiting, options, folder, vectors, stages, path, about["digest"])
        results = done_before(argparse.Namespace(resume=path), about["digest"])
    ours = [results[key(m)] for m in asked if key(m) in results]
    if options.record:
        write_record(ours, options, about, left_out)
    return told(ours, why)


def run_all(waiting, options, folder, vectors, stages, path, digest):
    """Grade the mutants, a line of ``path`` for each; what the code as it is fails, or None where
    there was nothing to do."""
    if not waiting:
        return None
    jobs = max(1, min(options.jobs, len(waiting)))
    graders = [Grader(folder / f"sandbox{i}", vectors, stages) for i in range(jobs)]
    free = queue.Queue()
    kinds = list(dict.fromkeys(m["kind"] for m in waiting))
    for grader in graders:
        grader.learn(kinds, say=tqdm.write)
        free.put(grader)
    lock, stopped = threading.Lock(), threading.Event()
    mode = "a" if options.resume else "w"
    with path.open(mode, encoding="utf-8") as out, tqdm(total=len(waiting)) as bar:

        def work(mutant):
            grader = free.get()
            try:
                result = {**grader.grade(mutant), "vectors": digest}
            finally:
                free.put(grader)
            if stopped.is_set():
                return
            with lock:
                out.write(json.dumps(result, ensure_ascii=False) + "\n")
                out.flush()
                bar.update()

        with ThreadPoolExecutor(jobs) as pool:
            runs = [pool.submit(work, m) for m in waiting]
            try:
                for one in runs:
                    one.result()
            except BaseException:  # Ctrl-C: what is under way has no verdict
                stopped.set()
                pool.shutdown(wait=False, cancel_futures=True)
                for grader in graders:
                    grader.sandbox.stop()
                raise
    return {f"{kind} {stage}": lines for (kind, stage), lines in graders[0].known.items()}


def told(results, why):
    """Print who caught what, and what survived; the exit status."""
    for kind in FILES:
        ours = [m for m in results if m["kind"] == kind]
        if not ours:
            continue
        by = {stage: sum(m["by"] == stage for m in ours) for stage in STAGES}
        left = [m for m in ours if m["verdict"] == "survived"]
        words = ", ".join(f"{count} by {stage}" for stage, count in by.items())
        print(f"{kind}: {len(ours)} mutants, caught {words}; {len(left)} survived")
        for m in left:
            print(f"\n  {m['file']}:{m['line']} {m['function']} ({m['class']})")
            print(f"  - {m['before']}\n  + {m['after']}\n  {why.get(key(m), 'not explained')}")
    return int(any(m["verdict"] == "survived" and not why.get(key(m)) for m in results))


if __name__ == "__main__":
    sys.exit(main())
