"""One call of a kernel: arrays as its library has them, and what came back or went wrong."""

import contextlib
import signal
import threading
from dataclasses import dataclass, field

import numpy as np

from refattn.verify.libraries import NumPy, WrongKind
from refattn.verify.wanted import GRADIENTS


@dataclass(frozen=True)
class Answers:
    """{"y": ..., "dq": ...}: arrays, or the exceptions in their place; and in words what was wrong
    beside the numbers of each."""

    arrays: dict
    manners: dict = field(default_factory=dict)

    @property
    def trouble(self):
        """What was wrong with y."""
        return self.manners.get("y", "")


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
                with time_limit(self.time_limit):
                    y, grads = self._run(*given)
            except (Exception, SystemExit) as error:
                return Answers({"y": error})
            if y is None or y is ...:
                return Answers({"y": y})
            after = {name: self.library.take(x) for name, x in zip(named, given, strict=True)}
        shape = (*q.shape[:-1], v.shape[-1]) if dy is None else dy.shape
        arrays = {"y": self._back(y, shape)}
        if self.gradients:
            arrays |= self._gradients(grads, (q, k, v))
        return Answers(arrays, _manners(arrays, after, kept))

    def _run(self, q, k, v, dy=None):
        if self.gradients is False:
            return self.kernel(q, k, v), None
        if self.gradients is True:
            return self.library.pull(self.kernel, dy, (q, k, v))
        y = self.kernel(q, k, v)
        try:
            return y, self.gradients(dy, q, k, v)
        except (Exception, SystemExit) as error:  # y is judged all the same
            return y, error

    def _gradients(self, grads, inputs):
        if isinstance(grads, BaseException):
            return dict.fromkeys(GRADIENTS, grads)
        if not isinstance(grads, (tuple, list)) or len(grads) < len(GRADIENTS):
            came = "nothing" if grads is None else type(grads).__name__
            tracked = ", tracked from q, k and v to y" if self.gradients is True else ""
            missing = WrongKind(f"gave {came}, expected (dq, dk, dv){tracked}")
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


def _manners(arrays, given, kept):
    """What is wrong with answers beside their numbers: {"y": words, ...}."""
    found = {}
    for name, x in given.items():
        if not np.array_equal(np.ascontiguousarray(x).view(np.uint8), kept[name].view(np.uint8)):
            return dict.fromkeys(arrays, f"wrote to its input {name}")
    for part, y in arrays.items():
        if not isinstance(y, np.ndarray):
            continue
        for name, x in given.items():
            if np.shares_memory(y, x):
                found[part] = f"gave a view of its input {name}, expected an array of its own"
        if y.dtype != given["q"].dtype:
            found[part] = f"gave {y.dtype}, expected {given['q'].dtype}"
    return found


@contextlib.contextmanager
def time_limit(seconds):
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
