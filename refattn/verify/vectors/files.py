"""A folder of vectors: manifest.json, and two files of arrays for each mechanism."""

import hashlib
import inspect
import json
from pathlib import Path

import numpy as np
import scipy

import refattn
from refattn.verify.vectors import formats
from refattn.verify.vectors.case import Case
from refattn.verify.vectors.entry import DTYPES
from refattn.verify.vectors.words import BUDGET, CONVENTIONS, LAYOUT, PARTS

FORMAT = 1
MANIFEST = "manifest.json"
SHIPPED = Path(refattn.__file__).parent / "data" / "vectors"
KINDS = {".safetensors": formats.safetensors, ".npz": formats.npz}


def write(folder, cases):
    """Write cases; the same cases give the same bytes.

    Parameters
    ----------
    folder : path
        Made where it is missing. What another call wrote there is replaced.
    cases : list of Case

    Returns
    -------
    str
        The digest: SHA-256 of the lines "SHA-256  name" of all files of arrays. Budgets, in the
        manifest, are not part of it.

    Raises
    ------
    ValueError
        The folder holds something else.

    Examples
    --------
    >>> import tempfile
    >>> from refattn.verify.vectors import load
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     digest = write(folder, load(mechanism="merge_attention"))
    ...     len(digest), len(load(folder)) == len(load(mechanism="merge_attention"))
    (64, True)
    """
    folder = Path(folder)
    for path in free(folder):
        path.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    groups = {}
    for case in cases:
        groups.setdefault(case.mechanism, {}).update(_named(case))
    files = {}
    for mechanism, arrays in groups.items():
        for ending, made in KINDS.items():
            data = made(arrays)
            (folder / f"{mechanism}{ending}").write_bytes(data)
            files[f"{mechanism}{ending}"] = {"bytes": len(data), "sha256": _sha(data)}
    digest = _sha("".join(f"{files[name]['sha256']}  {name}\n" for name in sorted(files)).encode())
    manifest = {
        "format": FORMAT,
        "refattn": refattn.__version__,
        "digest": digest,
        "layout": LAYOUT,
        "conventions": CONVENTIONS,
        "parts": PARTS,
        "defaults": {name: _defaults(name) for name in groups},
        "budget": BUDGET,
        "files": files,
    }
    lines = ",\n".join(json.dumps(_record(case), allow_nan=False) for case in cases)
    text = json.dumps(manifest, indent=1)
    text = f'{text[:-2]},\n "cases": [\n{lines}\n ]\n}}\n'
    (folder / MANIFEST).write_text(text, encoding="utf-8", newline="\n")
    return digest


def load(folder=None, *, mechanism=None, dtype=None):
    """Vectors, each a ``Case``.

    Parameters
    ----------
    folder : path, optional
        What ``python -m refattn vectors`` wrote; the small set that comes with refattn if None.
    mechanism : str or list of str, optional
        Such as "softmax_attention"; all if None.
    dtype : str or list of str, optional
        "float64", "float32", "float16" or "bfloat16"; all if None, but bfloat16 only where the
        package ml_dtypes is installed.

    Returns
    -------
    list of Case

    Raises
    ------
    ValueError
        No such folder, a format of another version, files whose bytes have changed, an unknown
        mechanism or dtype.

    Examples
    --------
    >>> case = load(mechanism="softmax_attention", dtype="float32")[0]
    >>> case.name
    'softmax_attention/odd sizes/float32'
    >>> case.inputs["q"].shape, case.wanted["y"].dtype
    ((13, 5), dtype('float64'))
    """
    folder = SHIPPED if folder is None else Path(folder)
    manifest = _manifest(folder)
    there = list(dict.fromkeys(case["mechanism"] for case in manifest["cases"]))
    mechanisms = _chosen("mechanism", mechanism, there)
    dtypes = _chosen("dtype", dtype, list(DTYPES))
    if dtype is None and not _has_bfloat16():
        dtypes.remove("bfloat16")
    found = []
    for name in mechanisms:
        records = [
            case
            for case in manifest["cases"]
            if case["mechanism"] == name and case["dtype"] in dtypes
        ]
        if records:
            arrays = _arrays(folder, f"{name}.safetensors", manifest, records)
            found += [_case(record, arrays) for record in records]
    return found


def free(folder):
    """The files that writing there replaces: those of an earlier call; anything else is refused."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; expected a folder, or a name that is free")
    there = {path.name for path in folder.iterdir()} if folder.exists() else set()
    ours = {MANIFEST, *_manifest(folder)["files"]} if MANIFEST in there else set()
    if there - ours:
        left = min(there - ours)
        raise ValueError(f"{folder} holds {left}; expected an empty folder, or vectors alone")
    return [folder / name for name in there]  # a manifest may name files elsewhere: not those


def _named(case):
    """{name in the file: array}."""
    return {f"{case.name}/{role}": x for role, (_, x) in _roles(case).items()}


def _roles(case):
    """{role: ("input" | "option" | "wanted", array)}."""
    found = {name: ("input", x) for name, x in case.inputs.items()}
    for name, x in case.options.items():
        if hasattr(x, "indptr"):
            found[name] = "option", x.toarray()
            found[f"{name}.indptr"] = "option", x.indptr.astype(np.int32)
            found[f"{name}.indices"] = "option", x.indices.astype(np.int32)
        elif isinstance(x, np.ndarray):
            found[name] = "option", x
        elif name == "initial_state" and x is not None:
            found[f"{name}.S"], found[f"{name}.z"] = (("option", part) for part in x)
    return found | {name: ("wanted", x) for name, x in case.wanted.items()}


def _defaults(mechanism):
    """What an option is that a case does not name."""
    parameters = inspect.signature(getattr(refattn, mechanism)).parameters.values()
    return {
        p.name: getattr(p.default, "__name__", p.default)
        for p in parameters
        if p.kind is p.KEYWORD_ONLY and p.default is not p.empty and p.name != "backend"
    }


def _record(case):
    """A case as the manifest has it."""
    arrays = {
        role: {
            "kind": kind,
            "dtype": x.dtype.name,
            "shape": list(x.shape),
            "sha256": _sha(formats.bytes_of(x)),
        }
        for role, (kind, x) in _roles(case).items()
    }
    flags = {
        name: getattr(x, "__name__", x)
        for name, x in case.options.items()
        if name not in arrays and name != "initial_state"
    }
    return {
        "name": case.name,
        "mechanism": case.mechanism,
        "dtype": case.dtype,
        "options": flags,
        "arrays": arrays,
        "budget": case.budget,
        "error": case.error,
    }


def _case(record, arrays):
    by_kind = {"input": {}, "option": {}, "wanted": {}}
    for role, entry in record["arrays"].items():
        by_kind[entry["kind"]][role] = arrays[f"{record['name']}/{role}"]
    options = {name: _flag(name, x) for name, x in record["options"].items()}
    given = by_kind["option"]
    if "mask.indptr" in given:
        indptr, indices = given.pop("mask.indptr"), given.pop("mask.indices")
        parts = np.ones(len(indices), bool), indices, indptr
        given["mask"] = scipy.sparse.csr_array(parts, shape=given["mask"].shape)
    if "initial_state.S" in given:
        options["initial_state"] = given.pop("initial_state.S"), given.pop("initial_state.z")
    return Case(
        record["name"],
        record["mechanism"],
        record["dtype"],
        options | given,
        by_kind["input"],
        by_kind["wanted"],
        record["error"],
        record["budget"],
    )


def _flag(name, x):
    if name == "attention":
        return getattr(refattn, x)
    return tuple(x) if isinstance(x, list) else x


def _manifest(folder):
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(
            f"{folder} has no {MANIFEST}; expected a folder that `python -m refattn vectors` wrote"
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version = manifest["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no manifest of vectors: {error}") from error
    if version != FORMAT:
        raise ValueError(
            f"{path} has format {version!r}; this refattn ({refattn.__version__}) reads {FORMAT}"
        )
    missing = {"files", "cases"} - set(manifest)
    if missing:
        raise ValueError(f"{path} is no manifest of vectors: {', '.join(sorted(missing))} missing")
    return manifest


def _arrays(folder, name, manifest, records):
    """The arrays of these records, once the file is found to be the one that was written."""
    path = folder / name
    if not path.is_file():
        raise ValueError(f"{folder} has no {name}, which its {MANIFEST} names")
    data = path.read_bytes()
    came, wanted = _sha(data), manifest["files"][name]["sha256"]
    if came != wanted:
        raise ValueError(
            f"{path} has changed: its SHA-256 is {came}, the {MANIFEST} says {wanted}; "
            "write or copy the folder again"
        )
    prefixes = {record["name"] for record in records}
    return formats.read_safetensors(data, lambda key: key.rsplit("/", 1)[0] in prefixes)


def _chosen(name, asked, there):
    if asked is None:
        return list(there)
    asked = [asked] if isinstance(asked, str) or not np.iterable(asked) else list(asked)
    for one in asked:
        if one not in there:
            raise ValueError(f"{name} is {one!r}; expected one of {', '.join(there)}")
    return asked


def _has_bfloat16():
    try:
        import ml_dtypes  # noqa: F401
    except ImportError:
        return False
    return True


def _sha(data):
    return hashlib.sha256(data).hexdigest()
