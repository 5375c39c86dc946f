"""One call of a kernel: arrays as its library has them, and what came back or went wrong."""

import contextlib
import signal
import threading
from dataclasses import dataclass, field

import numpy as np

from refattn.verify.libraries import NumPy, WrongKind
from refattn.verify.truth import GRADIENTS


@dataclass(frozen=True)
class Answers:
    """{"y": ..., "dq": ...}: arrays, or the exceptions in their place; and what was wrong beside
    the numbers."""

    arrays: dict
    trouble: str = ""


@dataclass(frozen=True)
class Caller:
    """A kernel on the arrays of a trial, whatever its library and layout are.

    ``gradients`` is False, True for the library's automatic ones, or a function
    (dy, q, k, v) -> (dq, dk, dv).
    """

    kernel: object
    library: object = field(default_factory=NumPy)
    layout: str = "... n d"
    gradients: object = False
    time_limit: float = 60.0

    def __call__(self, q, k, v, dy=None):
        named = {"q": q, "k": k, "v": v, "dy": dy if self.gradients else None}
        named = {name: self._laid_out(x).copy() for name, x in named.items() if x is not None}
        kept = {name: x.copy() for name, x in named.items()}
        with self.library.session(q.dtype):
            given = [
                self.library.give(x) for x in named.values()
            ]  # its errors are not the kernel's
            try:
                with _time_limit(self.time_limit):
                    y, grads = self._run(*given)
            except Exception as error:
                return Answers({"y": error})
        if y is None or y is ...:
            return Answers({"y": y})
        wanted = {"y": (*q.shape[:-1], v.shape[-1])}
        arrays = {"y": self._back(y, wanted["y"])}
        if self.gradients:
            arrays |= self._gradients(grads, (q, k, v))
        return Answers(arrays, _manners(arrays["y"], named, kept))

    def _run(self, q, k, v, dy=None):
        if self.gradients is False:
            return self.kernel(q, k, v), None
        if self.gradients is True:
            return self.library.pull(self.kernel, dy, (q, k, v))
        return self.kernel(q, k, v), self.gradients(dy, q, k, v)

    def _gradients(self, grads, inputs):
        if not isinstance(grads, (tuple, list)) or len(grads) < len(GRADIENTS):
            came = "none" if grads is None else type(grads).__name__
            missing = WrongKind(f"gave {came}, expected (dq, dk, dv), tracked from q, k and v to y")
            return dict.fromkeys(GRADIENTS, missing)
        pairs = zip(GRADIENTS, grads, inputs, strict=False)
        return {name: self._back(grad, x.shape) for name, grad, x in pairs}

    def _back(self, y, shape):
        """An answer in refattn's layout, or the exception that says why it is none."""
        try:
            y = self.library.take(y)
        except WrongKind as error:
            return error
        if not isinstance(y, np.ndarray):
            return y
        expected = tuple(shape[axis] for axis in self._order(len(shape)))
        if y.shape != expected:
            return WrongKind(f"has shape {y.shape}, expected {expected}")
        return self._laid_out(y)  # the exchange of two axes is its own inverse

    def _laid_out(self, x):
        return x.transpose(self._order(x.ndim))

    def _order(self, ndim):
        return (0, 2, 1, 3) if self.layout == "b n h d" and ndim == 4 else tuple(range(ndim))


def _manners(y, given, kept):
    """What is wrong with an answer beside its numbers."""
    for name, x in given.items():
        if not np.array_equal(x.view(np.uint8), kept[name].view(np.uint8)):
            return f"wrote to its input {name}"
        if isinstance(y, np.ndarray) and np.shares_memory(y, x):
            return f"gave a view of its input {name}, expected an array of its own"
    if isinstance(y, np.ndarray) and y.dtype != given["q"].dtype:
        return f"gave {y.dtype}, expected {given['q'].dtype}"
    return ""


@contextlib.contextmanager
def _time_limit(seconds):
    """TimeoutError after so many seconds, where a signal can be had."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGALRM"):
        yield
        return

    def stop(number, frame):
        raise TimeoutError(f"took longer than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
