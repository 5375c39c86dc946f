"""The two kinds of files of arrays, to the byte: .safetensors and .npz.

Both are written here, since neither library promises the same bytes twice.
"""

import io
import json
import zipfile

import numpy as np

from refattn.verify.cases import number_type

SAFE = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int32": "I32",
    "bool": "BOOL",
}
NAMES = {word: name for name, word in SAFE.items()}
YEAR = 1980, 1, 1, 0, 0, 0  # the first that a zip file can hold


def bytes_of(x):
    """Little-endian, the last axis fastest, every NaN the same."""
    x = np.ascontiguousarray(x)
    if x.dtype.name != "bool" and x.dtype.kind not in "iu":
        x = np.where(np.isnan(x), np.array(np.nan, x.dtype), x)
    return x.astype(x.dtype.newbyteorder("<") if x.dtype.name != "bfloat16" else x.dtype).tobytes()


def safetensors(arrays):
    """The bytes of a .safetensors file: length of the header, header, arrays without gaps."""
    header, parts, place = {}, [], 0
    widest_first = sorted(arrays, key=lambda name: (-arrays[name].dtype.itemsize, name))
    for name in widest_first:
        x = arrays[name]
        data = bytes_of(x)
        header[name] = {
            "dtype": SAFE[x.dtype.name],
            "shape": list(x.shape),
            "data_offsets": [place, place + len(data)],
        }
        parts.append(data)
        place += len(data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *parts])


def read_safetensors(data, keep=lambda name: True):
    """{name: array} of the bytes of a .safetensors file, those whose name ``keep`` takes."""
    start = 8 + int.from_bytes(data[:8], "little")
    found = {}
    for name, entry in json.loads(data[8:start]).items():
        if name == "__metadata__" or not keep(name):
            continue
        first, last = (start + offset for offset in entry["data_offsets"])
        kind = NAMES[entry["dtype"]]
        dtype = number_type(kind) if "float" in kind else np.dtype(kind)
        found[name] = np.frombuffer(data[first:last], dtype).reshape(entry["shape"]).copy()
    return found


def npz(arrays):
    """The bytes of a .npz file; bfloat16, which NumPy lacks, as float32 of the same value."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as file:
        for name in sorted(arrays):
            x = arrays[name]
            x = np.frombuffer(bytes_of(x), x.dtype).reshape(x.shape)
            x = x.astype(np.float32) if x.dtype.name == "bfloat16" else x
            member = zipfile.ZipInfo(f"{name}.npy", YEAR)
            member.create_system, member.external_attr = 3, 0o644 << 16
            content = io.BytesIO()
            np.lib.format.write_array(content, x, version=(1, 0), allow_pickle=False)
            file.writestr(member, content.getvalue())
    return out.getvalue()
