"""The check itself: a kernel on cases, or an answer beside the right one."""

from dataclasses import dataclass

import numpy as np
import tqdm

from refattn import checks
from refattn.verify.call import Caller
from refattn.verify.cases import attention_name, cast, eps_of, number_type, too_short, trials
from refattn.verify.compare import compare, numbers
from refattn.verify.libraries import library_of
from refattn.verify.like import Reference, convention_of, lead_of
from refattn.verify.mistakes import equal_mistakes
from refattn.verify.report import Report
from refattn.verify.wanted import wanted_of


@dataclass(frozen=True)
class Seen:
    """A case that the kernel answered: what was given, wanted and got, {"y": ...} in float64."""

    trial: object
    options: dict
    wanted: dict
    got: dict

    @property
    def eps(self):
        return eps_of(self.trial.q.dtype)


def check(
    kernel,
    mechanism,
    *,
    dtype="float32",
    like=None,
    xp=None,
    gradients=False,
    cases="default",
    lead=None,
    device=None,
    title=None,
    hint="",
    time_limit=60.0,
    progress=False,
    **options,
):
    r"""Hold ``kernel(q, k, v)`` against one of refattn's attentions.

    The truth is the formula in float64 on the same rounded inputs. A kernel passes when

    .. math:: |error| \le 2 E + 4\, \mathrm{eps}\, (1 + \max|s|) \max|v|

    with s the logits and E the error of refattn's own formula in the kernel's dtype; for float16
    and bfloat16 with every array operation rounded to that type, if that is larger. A gradient
    passes by the same rule with its own E and size (``refattn.verify.wanted``).

    Parameters
    ----------
    kernel : callable
        ``kernel(q, k, v) -> y``, arrays (n, d), (m, d), (m, e) to (n, e), with the options built
        in.
    mechanism : str or function
        The attention to be equal to, such as "local_attention".
    dtype : {"float32", "float64", "float16", "bfloat16"}
        What the kernel is given, and should give back.
    like : {"torch", "jax", "flash_attn", "onnx", "fla", "xformers"} or Convention, optional
        Whose conventions the kernel and the options follow: arrays, layout, alignment of causal
        forms, windows, rows with nothing to attend (docs/conventions.md). The kernel then gets
        a batch of 2 with 3 heads.
    xp : module or str, optional
        The library of the arrays alone: "torch", "jax", "cupy" or any array API namespace.
    gradients : bool or callable
        Also hold dq, dk and dv against the formula's: True takes the library's automatic
        gradients, a function ``gradients(dy, q, k, v) -> (dq, dk, dv)`` is a kernel of its own.
    cases : {"default", "square", "tiles"} or list of (n, m, d, e)
        "square" leaves out n != m; "tiles" has multiples of 64 only.
    lead : tuple of int, optional
        Leading axes of q, k, v and y: (batch, heads) where ``like`` is given, none else.
    device : optional
        Where the library's arrays lie, such as "cuda".
    title : str, optional
        The name in the report; the kernel's own if None.
    hint : str
        What to say while the kernel is an unfilled hole, one that returns None or ``...``.
    time_limit : float
        Seconds for one case; a kernel that takes longer is interrupted (where signals can be used:
        in the main thread of a Unix process, when it next runs Python).
    progress : bool
        Show a bar while it runs.
    **options
        The mechanism's options, real arrays rounded to ``dtype``. Where an array fixes n, m, d or
        e, the cases take those sizes.

    Returns
    -------
    Report
        Whatever the kernel does ends as a line of the report: an exception, another shape, dtype,
        library or device, NaN, writing to its inputs, giving one of them back, or taking too long.
        Its ``diagnosis`` names the known mistakes that the kernel equals in every case
        (docs/mistakes.md); where there is none, ``findings`` says where the error sits.

    Raises
    ------
    ValueError
        Unknown mechanism or cases, or options that no case fits: the fault is not the kernel's.
        ``return_lse`` and ``return_state`` are refused: the kernel's y is what is compared.

    Examples
    --------
    >>> import numpy as np
    >>> def kernel(q, k, v):
    ...     a = np.exp(q @ k.T)  # the scale is missing
    ...     return a @ v / a.sum(axis=1, keepdims=True)
    >>> report = check(kernel, "softmax_attention", cases=[(5, 7, 4, 3)])
    >>> report.passed, report.diagnosis[0]
    (False, 'scale missing: the scores are q . k: the factor on them is missing')
    """
    name = _mechanism(mechanism, options)
    _asked(kernel, gradients, time_limit)
    convention = convention_of(like)
    library = library_of(xp or convention.arrays, device)
    if gradients is True and not library.differentiates:
        raise ValueError(
            f"gradients=True came for arrays of {xp or convention.arrays}, which have no automatic "
            "gradients; expected a function gradients(dy, q, k, v) -> (dq, dk, dv)"
        )
    title = title or getattr(kernel, "__name__", type(kernel).__name__)
    lead = lead_of(lead, like)
    call = Caller(kernel, library, convention.layout, gradients, time_limit)
    reference = Reference(name, convention)
    options = {key: _as_numpy(x) for key, x in reference.translated(options).items()}
    dtype = number_type(dtype)
    low = {name: cast(value, dtype) for name, value in options.items()}
    wide = {name: cast(value, np.float64) for name, value in low.items()}
    lines, seen, empty, misfit = [], [], [], None
    asked = trials(name, cases, dtype, options, lead, same_columns=convention.same_columns)
    bar = tqdm.tqdm(list(asked), disable=not progress, leave=False)
    for trial in bar:
        bar.set_description(trial.name)
        try:
            wanted = wanted_of(reference, trial, low, wide, gradients is not False)
        except ValueError as error:
            misfit = error
            continue
        answers = call(*trial.inputs, trial.dy)
        got = {}
        for part, y in answers.arrays.items():
            want = wanted[part]
            empty.append(y is None or y is ...)
            case = trial.name if part == "y" else f"{trial.name}: {part}"
            trouble = answers.manners.get(part, "")
            lines.append(compare(case, y, want.value, want.budget, want.conditioning, trouble))
            y = None if isinstance(y, BaseException) else numbers(y)
            if y is not None and y.shape == want.value.shape:
                got[part] = y
        seen.append(Seen(trial, wide, wanted, got))
    if not lines:
        raise misfit or ValueError(f"no case fits the shapes of the options {sorted(options)}")
    if all(empty):
        return Report(title, hint=hint)
    known, found = (), ()
    if any(line.trouble for line in lines):
        known = tuple(f"{m.name}: {m.tells}" for m in equal_mistakes(name, reference, seen))
        by_rows = all(x.wanted["y"].value.shape[-2] == x.trial.q.shape[-2] for x in seen)
        found = () if known or not by_rows else _findings(seen)
    note = too_short(cases, options)
    found = (*found, note) if note else found
    return Report(title, lines, diagnosis=known, findings=found, seen=seen)


def check_answer(answer, wanted, *, title="answer", tolerance=0.0, hint=""):
    """Hold a number or an array against the right one.

    Parameters
    ----------
    answer : number, array, or a function of no arguments that gives one
        ``...`` or None while nothing has been filled in. What a function raises is reported.
    wanted : number or array
    title : str
        What the answer is.
    tolerance : float
        Largest absolute error that is still right.
    hint : str
        What to say while nothing has been filled in.

    Returns
    -------
    Report

    Examples
    --------
    >>> print(check_answer(..., 6, title="pairs", hint="Count the row sums."))
    pairs: nothing here yet. Count the row sums.
    >>> check_answer(6, 6).passed
    True
    """
    if callable(answer):
        try:
            answer = answer()
        except (Exception, SystemExit) as error:
            answer = error
    if wanted is None:
        raise TypeError("wanted is None; expected the right number or array")
    if answer is None or answer is ...:
        return Report(title, hint=hint)
    return Report(title, [compare(title, answer, np.asarray(wanted), tolerance)])


def _asked(kernel, gradients, time_limit):
    """Refuse what the caller asks wrongly, before the kernel is blamed for it."""
    if not callable(kernel):
        raise TypeError(f"kernel is {type(kernel).__name__}; expected a function of q, k and v")
    if not (gradients is True or gradients is False or callable(gradients)):
        raise TypeError(
            f"gradients is {gradients!r}; expected True, False or a function of dy, q, k and v"
        )
    checks.number("time_limit", time_limit, positive=True)


def _as_numpy(value):
    """An option's array as NumPy's, whatever library it is of; all else as it is."""
    foreign = hasattr(value, "__dlpack__") and not isinstance(value, np.ndarray)
    return (
        np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)
        if foreign
        else value
    )


def _findings(seen):
    from refattn.verify.findings import findings  # much code, and only a failure needs it

    return findings(seen)


def _mechanism(mechanism, options):
    """The name of an attention, or ValueError."""
    name = attention_name(mechanism)
    for refused in ("return_lse", "return_state"):
        if options.get(refused):
            raise ValueError(f"{refused}=True came; only the output y is compared")
    return name
