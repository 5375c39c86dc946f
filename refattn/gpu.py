"""The CUDA target: imported here and nowhere else; arrays of other libraries, and launches.

Kernels stand in ``MECHANISM/cuda_*.py``, made for a set of compile-time sizes by a cached
``make_NAME(...)``. Their wrappers, in ``MECHANISM/cuda.py``, work on arrays of any library: NumPy's
are copied to the device and back at each launch, device arrays of torch and CuPy are not copied.

With NUMBA_ENABLE_CUDASIM=1 in the environment, kernels run in Numba's simulator, without a GPU and
slowly, and arrays of torch may lie on the CPU.
"""

import contextlib
import contextvars
import importlib.util
import math
import sys

import numpy as np

from refattn import checks
from refattn.dispatch import BackendUnavailable

if not hasattr(np, "row_stack"):
    np.row_stack = np.vstack  # noqa: NPY201  numba-cuda asks for it up to 0.30.4
from numba import config, cuda

SHARED = 48 * 1024  # bytes of shared memory that every block may have
SIMULATED = bool(config.ENABLE_CUDASIM)
INSTALL = "pip install 'numba-cuda[cu13]'"
_STREAM = contextvars.ContextVar("_STREAM", default=0)


def require():
    """BackendUnavailable, unless kernels can be launched here."""
    if SIMULATED:
        return
    if importlib.util.find_spec("numba_cuda") is None:
        raise BackendUnavailable(
            f"backend 'cuda' needs the package 'numba-cuda': {INSTALL}, or call with "
            "backend='numpy'"
        )
    if not cuda.is_available():
        raise BackendUnavailable(
            "backend 'cuda' needs an NVIDIA GPU with its driver, and found none: see nvidia-smi, "
            f"or {INSTALL} again if the driver is newer; without a GPU call with backend='numba', "
            "or try the kernels in the simulator: NUMBA_ENABLE_CUDASIM=1"
        )


def namespace(*arrays):
    """The library of these arrays, with the functions of the array API; NumPy for what is none."""
    foreign = [x for x in arrays if hasattr(x, "__dlpack__") and not isinstance(x, np.ndarray)]
    if not foreign:
        return np
    try:
        from array_api_compat import array_namespace
    except ImportError as missing:
        raise BackendUnavailable(
            "backend 'cuda' needs the package 'array-api-compat' for arrays that are not NumPy's: "
            "pip install array-api-compat"
        ) from missing
    return array_namespace(*foreign)


def outline(x):
    """What stands for x where its shape and dtype are checked: NumPy's, without memory."""
    if x is None or isinstance(x, np.ndarray) or not hasattr(x, "__dlpack__"):
        return x
    return np.broadcast_to(np.zeros((), dtype_of(x)), tuple(x.shape))


def dtype_of(x):
    """The NumPy dtype of an array of any library."""
    if isinstance(x, np.ndarray):
        return x.dtype
    name = str(x.dtype).rsplit(".", 1)[-1]
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def cast(xp, x, dtype):
    """x in a NumPy dtype."""
    if isinstance(x, np.ndarray):
        return x.astype(dtype, copy=False)
    return x if dtype_of(x) == dtype else xp.astype(x, getattr(xp, np.dtype(dtype).name))


def contiguous(xp, x):
    """x in C order."""
    if isinstance(x, np.ndarray):
        return np.require(x, requirements=["C", "A"])
    return x.contiguous() if hasattr(x, "contiguous") else xp.ascontiguousarray(x)


def like(xp, x, found):
    """A NumPy array as an array of the library, where x lies."""
    return found if xp is np else xp.asarray(found, device=x.device)


def empty(xp, x, shape, dtype, fill=None):
    """A new array of the library, where x lies; all ``fill``, where that is given."""
    kind = np.dtype(dtype) if xp is np else getattr(xp, np.dtype(dtype).name)
    options = {} if xp is np else {"device": x.device}
    if fill is None:
        return xp.empty(shape, dtype=kind, **options)
    return xp.full(shape, fill, dtype=kind, **options)


def heads_of(xp, *arrays, axes=2):
    """As ``refattn.kernels.heads_of``: arrays (..., a, b) as (H, a, b), never copied where leading
    axes broadcast; which of its heads each gives to each head of the whole; the leading shape."""
    lead = np.broadcast_shapes(*(tuple(x.shape[:-axes]) for x in arrays))
    flat, index = [], []
    for x in arrays:
        own, core = tuple(x.shape[:-axes]), tuple(x.shape[-axes:])
        flat.append(xp.reshape(contiguous(xp, x), (math.prod(own), *core)))
        place = np.arange(math.prod(own)).reshape(own)
        index.append(np.broadcast_to(place, lead).reshape(-1))
    heads = np.ascontiguousarray(np.stack(index, axis=-1).astype(np.int32))
    return flat, like(xp, arrays[0], heads), lead


def summed(xp, gradient, shape):
    """A gradient summed to the shape of its input, whose axes broadcast."""
    shape = tuple(shape)
    extra = len(gradient.shape) - len(shape)
    pairs = enumerate(zip(gradient.shape[extra:], shape, strict=True), extra)
    axes = (*range(extra), *(axis for axis, (have, want) in pairs if have != want))
    if axes:
        gradient = xp.sum(gradient, axis=axes)
    return xp.reshape(gradient, shape)


def launch(kernel, grid, block, inputs, outputs):
    """``kernel[grid, block](*inputs, *outputs)``; outputs are written in place.

    Inputs may hold numbers and tuples of arrays. Nothing waits for the device unless arrays are
    NumPy's, which come back.
    """
    if 0 in (grid if isinstance(grid, tuple) else (grid,)):
        return
    stream = _stream_of(outputs[0])
    there = [_on_device(x, stream) for x in inputs]
    written = [_on_device(x, stream) for x in outputs]
    kernel[grid, block, stream](*there, *written)
    for x, y in zip(outputs, written, strict=True):
        if isinstance(x, np.ndarray) and x.size and not SIMULATED:
            y.copy_to_host(x, stream=stream)
    if stream and any(isinstance(x, np.ndarray) for x in outputs):
        stream.synchronize()


def _stream_of(x):
    """The stream that was asked for, else the one that the library of x works on now."""
    asked = _STREAM.get()
    if asked or SIMULATED or isinstance(x, np.ndarray):
        return asked
    name, address = type(x).__module__.split(".")[0], 0
    if name == "torch":
        address = sys.modules["torch"].cuda.current_stream(x.device).cuda_stream
    elif name == "cupy":
        address = sys.modules["cupy"].cuda.get_current_stream().ptr
    return cuda.external_stream(address) if address else 0


def _on_device(x, stream):
    if isinstance(x, tuple):
        return tuple(_on_device(part, stream) for part in x)
    if isinstance(x, np.ndarray):
        if SIMULATED:  # where every array is written back
            return x if x.flags.writeable else x.copy()
        return cuda.to_device(x, stream=stream)
    if not hasattr(x, "__dlpack__"):
        return x  # a number
    if SIMULATED:
        return x.detach().numpy() if hasattr(x, "detach") else np.asarray(x)
    if not hasattr(x, "__cuda_array_interface__"):
        raise TypeError(f"an array lies on {x.device}; expected a device array, or NumPy's")
    return cuda.as_cuda_array(x.detach() if hasattr(x, "detach") else x, sync=False)


@contextlib.contextmanager
def on(stream):
    """Launch on this stream of CUDA: a Numba stream, or the address of any other."""
    if isinstance(stream, int) and stream:
        stream = cuda.external_stream(stream)
    token = _STREAM.set(stream or 0)
    try:
        yield
    finally:
        _STREAM.reset(token)


def qkv(q, k, v):
    """``checks.qkv`` for arrays of any library: (xp, q, k, v, the dtype that came in)."""
    require()
    xp = namespace(q, k, v)
    *_, dtype = checks.fitting(outline(q), outline(k), outline(v))
    compute = checks.compute_dtype(dtype)
    if xp is np:
        q, k, v = (np.asarray(x) for x in (q, k, v))
    return xp, *(cast(xp, x, compute) for x in (q, k, v)), dtype


def placed(xp, near, x):
    """x in the library of ``near``, and where that lies."""
    if hasattr(x, "__dlpack__") and not isinstance(x, np.ndarray) and xp is not np:
        return x
    x = np.asarray(x)
    return x if xp is np else like(xp, near, np.array(x))


def shape_of(x):
    """The shape of an array of any library, or of what NumPy makes one of."""
    return tuple(x.shape) if hasattr(x, "__dlpack__") else np.shape(x)


def rows(x, positions):
    """x[..., positions, :] for positions that are NumPy's."""
    if not hasattr(x, "__dlpack__") or isinstance(x, np.ndarray):
        return np.asarray(x)[..., positions, :]
    xp = namespace(x)
    return xp.take(x, like(xp, x, np.array(positions, np.int64)), axis=len(x.shape) - 2)


def positions(xp, near, n):
    """0 to n - 1 in 32 bits, where ``near`` lies."""
    return xp.arange(n, dtype=xp.int32, **({} if xp is np else {"device": near.device}))


def cotangent(xp, near, name, x, shape, dtype):
    """``checks.cotangent`` for arrays of any library."""
    if xp is np:
        return checks.cotangent(name, x, shape, dtype)
    seen = checks.floating(name, outline(x))
    checks.cotangent(name, np.broadcast_to(np.float32(0), seen.shape), shape, np.float32)
    x = placed(xp, near, x)
    return cast(xp, cast(xp, x, dtype), checks.compute_dtype(dtype))


def real_option(xp, near, name, x, dtype):
    """``checks.real_option`` for arrays of any library, in the dtype of the arithmetic."""
    x, compute = placed(xp, near, x), checks.compute_dtype(dtype)
    if xp is np:
        return checks.real_option(name, x, dtype, compute)
    came = checks.floating(name, outline(x)).dtype
    rounded = cast(xp, cast(xp, x, dtype), compute)
    wider = came.itemsize > np.dtype(dtype).itemsize  # only then are numbers looked at
    if wider and xp.any(xp.isfinite(x) & ~xp.isfinite(rounded)):
        raise ValueError(f"{name} has finite entries beyond {np.dtype(dtype)}")
    return rounded
