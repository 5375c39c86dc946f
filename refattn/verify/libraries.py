"""Arrays of other libraries: from NumPy, back to NumPy, and their automatic gradients.

None is a dependency: a library is imported when a kernel of its own is checked.
"""

import contextlib
import importlib
from dataclasses import dataclass
from types import ModuleType

import numpy as np


class WrongKind(TypeError):
    """What a kernel gave is no array as it was asked for."""


@dataclass(frozen=True)
class NumPy:
    """NumPy's own arrays. A subclass says what differs for its library."""

    device: object = None
    differentiates = False

    def give(self, x):
        """A NumPy array of the kernel's dtype as this library's, on ``device``."""
        return x

    def take(self, y):
        """The kernel's answer as NumPy's, or WrongKind where it is not this library's array."""
        if type(y) is not np.ndarray:
            raise WrongKind(f"gave {_named(y)}, expected numpy.ndarray")
        return y

    def pull(self, kernel, dy, inputs):
        """y and its gradients, (dq, dk, dv), where the library ``differentiates`` by itself."""
        raise NotImplementedError

    def session(self, dtype):
        """A context in which arrays of ``dtype`` keep it."""
        return contextlib.nullcontext()


class Torch(NumPy):
    differentiates = True

    def give(self, x):
        import torch

        if x.dtype.name == "bfloat16":  # no NumPy type of torch's: the same bits
            x = torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
        else:
            x = torch.from_numpy(x)
        if self.device is None:
            return x
        try:
            return x.to(self.device)
        except (AssertionError, RuntimeError) as error:
            raise ValueError(f"device is {self.device!r}; torch: {error}") from error

    def take(self, y):
        import torch

        if not isinstance(y, torch.Tensor):
            raise WrongKind(f"gave {_named(y)}, expected torch.Tensor")
        wanted = torch.device("cpu" if self.device is None else self.device)
        if y.device.type != wanted.type or wanted.index not in (None, y.device.index):
            raise WrongKind(f"gave a tensor on {y.device}, expected one on {wanted}")
        try:
            y = y.detach().cpu().resolve_conj().resolve_neg()
            if y.dtype != torch.bfloat16:
                return y.numpy()
            bits = y.contiguous().view(torch.int16).numpy()
        except (TypeError, RuntimeError) as error:
            raise WrongKind(f"gave a tensor of {y.dtype}, {y.layout}: {error}") from error
        import ml_dtypes

        return bits.view(ml_dtypes.bfloat16)

    def pull(self, kernel, dy, inputs):
        import torch

        leaves = [x.detach().requires_grad_() for x in inputs]
        y = kernel(*leaves)
        if not isinstance(y, torch.Tensor) or not y.requires_grad:
            return y, None
        grads = torch.autograd.grad(y, leaves, dy, allow_unused=True)
        zero = (torch.zeros_like(x) for x in leaves)
        return y, [z if g is None else g for g, z in zip(grads, zero, strict=True)]


class JAX(NumPy):
    differentiates = True

    def give(self, x):
        import jax

        device = self.device
        if isinstance(device, str):
            try:
                device = jax.devices(device)[0]
            except RuntimeError as error:
                raise ValueError(f"device is {device!r}; jax: {error}") from error
        return jax.device_put(x, device)

    def take(self, y):
        import jax

        if not isinstance(y, jax.Array):
            raise WrongKind(f"gave {_named(y)}, expected jax.Array")
        return np.asarray(y)

    def pull(self, kernel, dy, inputs):
        import jax

        y, back = jax.vjp(kernel, *inputs)
        return y, back(dy)

    def session(self, dtype):
        import jax

        if dtype.name != "float64":
            return contextlib.nullcontext()
        here = getattr(jax, "enable_x64", None)  # a context of its own since jax 0.8
        if here is None:
            from jax.experimental import enable_x64 as here
        return here(True)


@dataclass(frozen=True)
class ArrayAPI(NumPy):
    """Any namespace of the array API standard, such as cupy: by DLPack and array-api-compat."""

    namespace: ModuleType = None

    def give(self, x):
        if x.dtype.name == "bfloat16":
            raise ValueError(f"{self.namespace.__name__} has no bfloat16; choose another dtype")
        options = {} if self.device is None else {"device": self.device}
        return self.namespace.asarray(x, **options)

    def take(self, y):
        kind = type(self.namespace.asarray(0.0))
        if not isinstance(y, kind):
            raise WrongKind(f"gave {_named(y)}, expected {_named_type(kind)}")
        try:
            return np.from_dlpack(y)
        except (BufferError, RuntimeError, TypeError):  # it lies on a device
            from array_api_compat import to_device

            return np.asarray(to_device(y, "cpu"))


def library_of(xp, device=None):
    """The library of a module or its name: "numpy", "torch", "jax", "cupy", or a namespace."""
    name = xp if isinstance(xp, str) else getattr(xp, "__name__", None)
    if not isinstance(name, str):
        raise TypeError(
            f"xp is {type(xp).__name__}; expected a module or its name, such as 'torch'"
        )
    kinds = {"numpy": NumPy, "torch": Torch, "jax": JAX}
    top = name.split(".")[0]
    if isinstance(xp, str) or top in ("torch", "jax"):
        module = _imported(top if top in ("torch", "jax") else name)
    else:
        module = xp
    if top == "numpy" and device not in (None, "cpu"):
        raise ValueError(f"device is {device!r}; NumPy's arrays lie on the cpu (name like= or xp=)")
    if top in kinds:
        return kinds[top](device)
    if not hasattr(module, "asarray"):
        raise ValueError(f"xp is {name!r}; it has no asarray, as array namespaces have")
    return ArrayAPI(device, module)


def _imported(name):
    try:
        return importlib.import_module(name)
    except ImportError as missing:
        raise ValueError(f"xp is {name!r}, which cannot be imported: {missing}") from missing


def _named(y):
    return _named_type(type(y))


def _named_type(kind):
    module = kind.__module__.split(".")[0]
    return kind.__name__ if module == "builtins" else f"{module}.{kind.__name__}"
