"""A copy of refattn in a folder of its own, with one file changed, and what is run there.

Numba's machine code is kept between runs, but only that of modules which do not import the changed
one, however indirectly: all else is compiled anew in a folder that is empty before.
"""

import ast
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from mutants_grade import MEMORY

ROOT = Path(__file__).parents[1]
QUIET = {
    "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "2",
    "PYTHONDONTWRITEBYTECODE": "", "MPLBACKEND": "Agg", "TQDM_DISABLE": "1",
}  # fmt: skip
KILLED = {
    signal.SIGPROF: "endless",
    signal.SIGALRM: "endless",
    signal.SIGKILL: "endless",
}


class Sandbox:
    """``home`` has refattn/, tests/ and caches; it is made here and is the caller's to delete.

    Where an earlier run left one, ``files`` of refattn, of which one may still be changed, are as
    they should be again.
    """

    def __init__(self, home, files=(), source=ROOT):
        self.home = Path(home)
        if self.home.exists():
            for file in files:
                old, new = source / "refattn" / file, self.home / "refattn" / file
                if old.read_bytes() != new.read_bytes():
                    shutil.copy2(old, new)
        else:
            skip = shutil.ignore_patterns("__pycache__")
            for part in ("refattn", "tests"):
                shutil.copytree(source / part, self.home / part, ignore=skip)
            shutil.copy(source / "pyproject.toml", self.home)
        self.warm, self.numba = self.home / "warm", self.home / "numba"
        self.bytecode = self.home / "bytecode"
        self.imports = imports_of(self.home / "refattn")
        self.changed, self.process = None, None

    def text(self, file):
        return (self.home / "refattn" / file).read_text(encoding="utf-8")

    def set(self, file, text, alone=False):
        """``file`` of refattn has this text, and nothing that was compiled from it is left; where
        it is ``alone``, what was compiled from the files that import it stays."""
        self.reset()
        path = self.home / "refattn" / file
        self.changed = path, path.read_text(encoding="utf-8"), path.stat()
        path.write_text(text, encoding="utf-8")
        self._forget(path)
        shutil.rmtree(self.numba, ignore_errors=True)
        self.numba.mkdir()
        if self.warm.exists():
            module = file.removesuffix(".py").replace("/", ".")
            self._keep({module} if alone else importers(self.imports, module))

    def reset(self):
        """The file that was set is as it was, its times too, by which Numba knows it."""
        if self.changed:
            path, text, stat = self.changed
            path.write_text(text, encoding="utf-8")
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
            self._forget(path)
            self.changed = None

    def plain(self):
        """The code as it is, with all that has been compiled of it."""
        self.reset()
        shutil.rmtree(self.numba, ignore_errors=True)
        self.numba.mkdir()
        if self.warm.exists():
            shutil.copytree(self.warm, self.numba, dirs_exist_ok=True)

    def keep(self):
        """What has been compiled so far, of the code as it is, serves the runs to come."""
        shutil.rmtree(self.warm, ignore_errors=True)
        shutil.copytree(self.numba, self.warm)

    def _keep(self, gone):
        """Machine code of all modules but these."""
        for path in self.warm.glob("*/*"):
            package = path.parent.name.rsplit("_", 1)[0]
            module = path.name.split(".", 1)[0]
            if (module if package == "refattn" else f"{package}.{module}") not in gone:
                (self.numba / path.parent.name).mkdir(exist_ok=True)
                os.link(path, self.numba / path.parent.name / path.name)

    def _forget(self, path):
        for cached in self.bytecode.rglob(f"{path.stem}.*.pyc"):
            if cached.parent.name == path.parent.name:
                cached.unlink()

    def run(self, arguments, limit):
        """Run Python here: (how it ended, output, words, seconds); how is "" for an exit status of
        0, else "raised", "crashed" or "endless"."""
        environment = {**os.environ, **QUIET}
        environment |= {
            "PYTHONPATH": str(self.home),
            "NUMBA_CACHE_DIR": str(self.numba),
            "PYTHONPYCACHEPREFIX": str(self.bytecode),
        }
        began = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=self.home,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self.process = process
        resource.prlimit(process.pid, resource.RLIMIT_AS, (MEMORY, MEMORY))
        try:
            output, errors = process.communicate(timeout=limit)
        except BaseException as error:
            self.stop()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            output, errors = process.communicate()
        status, seconds = process.returncode, time.monotonic() - began
        if status < 0:
            how, words = KILLED.get(-status, "crashed"), signal.Signals(-status).name
        else:
            lines = errors.strip().splitlines() or [""]
            how, words = ("raised" if status else ""), lines[-1]
        return how, output, words, seconds

    def stop(self):
        """End what runs here."""
        if self.process and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)


def imports_of(folder):
    """{module: modules of the package that it imports}, names relative to the package."""
    found = {}
    for path in folder.rglob("*.py"):
        names = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                names.add(node.module)
                names |= {f"{node.module}.{alias.name}" for alias in node.names}
            elif isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
        inside = {name.removeprefix("refattn.") for name in names if name.startswith("refattn.")}
        found[_module(path.relative_to(folder))] = inside
    return {name: inside & set(found) for name, inside in found.items()}


def _module(path):
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def importers(imports, module):
    """The module and all that import it, however indirectly."""
    found, ahead = set(), [module]
    while ahead:
        name = ahead.pop()
        if name not in found:
            found.add(name)
            ahead += [other for other, names in imports.items() if name in names]
    return found
