"""Other libraries' conventions, in one table: a kernel of theirs is judged by its own rules."""

from dataclasses import dataclass

import numpy as np

import refattn
from refattn import checks
from refattn.verify.visible import visible


@dataclass(frozen=True)
class Convention:
    """How a library calls attention, where it may differ from refattn.

    Attributes
    ----------
    library, release : str
        What the facts are about, and the release or commit that they were read from.
    arrays : str
        The library of its arrays, a name for ``refattn.verify.libraries.library_of``.
    layout : str
        Axes of q, k, v and y: b batch, h heads, n tokens, d columns.
    causal : {"top-left", "bottom-right"}
        With n != m, whether query i sees keys j <= i, or j <= i + (m - n) as here. A window is
        aligned in the same way.
    window : str
        "inclusive": left + right + 1 keys, as here; "counts itself": w keys, the query's own and
        those before it.
    empty_row : {"0", "mean of v", "NaN"}
        The output of a query with nothing to attend.
    mask : str
        What True means, and what else is taken.
    epsilon : float
        Added to the denominator of linear attention.
    scaled_linear : bool
        Whether linear attention multiplies q by 1/sqrt(d).
    same_columns : bool
        Whether v must have as many columns as k.
    tested : bool
        Whether refattn's tests hold the installed library to these lines.
    note : str
    """

    library: str
    release: str
    arrays: str
    layout: str = "b h n d"
    causal: str = "bottom-right"
    window: str = "inclusive"
    empty_row: str = "0"
    mask: str = "True = may attend"
    epsilon: float = 0.0
    scaled_linear: bool = False
    same_columns: bool = False
    tested: bool = False
    note: str = ""


HOUSE = Convention("refattn", "this version", "numpy", layout="... n d", tested=True)
CONVENTIONS = {
    "torch": Convention(
        "torch: scaled_dot_product_attention, flex_attention",
        "2.13.0",
        "torch",
        causal="top-left",
        window="none; by mask or mask_mod",
        mask="True = may attend; real numbers are added",
        tested=True,
        note="FlexAttention has no causal flag: mask_mod counts queries and keys from 0. Its "
        "score_mod gets the scaled score, ahead of the mask.",
    ),
    "jax": Convention(
        "jax.nn.dot_product_attention",
        "0.10.2",
        "jax",
        layout="b n h d",
        causal="top-left",
        empty_row="mean of v",
        mask="True = may attend; real numbers go in bias",
        same_columns=True,
        tested=True,
        note="The softmax is float32 for float64 input too. A row hidden by a bias of -inf, not by "
        "a mask, is NaN.",
    ),
    "flash_attn": Convention(
        "flash_attn.flash_attn_func",
        "2.8.3",
        "torch",
        layout="b n h d",
        mask="none",
        same_columns=True,
        note="Bottom-right since 2.1. float16 and bfloat16 only.",
    ),
    "onnx": Convention(
        "ONNX operator Attention, reference implementation",
        "onnx 1.23.2",
        "numpy",
        causal="top-left",
        mask="True = may attend; real numbers are added",
        tested=True,
        note="Without a cache; with past keys the last query stands at the last key. Windows since "
        "opset 25. sqrt(scale) multiplies q and k apart. Softcap ahead of the mask since pull "
        "request 7867.",
    ),
    "fla": Convention(
        "flash-linear-attention: parallel_attn, chunk_linear_attn",
        "fla-core 0.6.0",
        "torch",
        layout="b n h d",
        window="counts itself",
        mask="none",
        epsilon=1e-10,
        scaled_linear=True,
        tested=True,
        note="Its plain references, not its Triton kernels. Always causal, n = m. No feature map "
        "inside: the kernel under test applies it. As documented, normalize is True in the chunked "
        "forms and False in the recurrent ones.",
    ),
    "xformers": Convention(
        "xformers.ops.memory_efficient_attention",
        "0.0.35",
        "torch",
        layout="b n h d",
        causal="top-left",
        empty_row="NaN",
        mask="real numbers are added",
        note="For LowerTriangularMask; the mask that is named FromBottomRight is aligned at the "
        "last key. The empty row is that of the reference code in its documentation.",
    ),
}
LEAD = (2, 3)  # batch and heads of the cases, where a library's layout has them


def convention_of(like):
    """The entry of a name, or a Convention as it is; refattn's own for None."""
    if like is None:
        return HOUSE
    if isinstance(like, Convention):
        return like
    checks.choice("like", like, tuple(CONVENTIONS))
    return CONVENTIONS[like]


def lead_of(lead, like):
    """The checked leading axes; where None came, batch and heads for another library."""
    if lead is None:
        return () if like is None else LEAD
    if not isinstance(lead, (tuple, list)):
        raise TypeError(f"lead is {lead!r}; expected a tuple of sizes, such as (2, 3)")
    return tuple(checks.whole("each entry of lead", size, least=1) for size in lead)


class Reference:
    """An attention and its gradient as a library defines them.

    ``translated`` turns the library's options into refattn's, with ``top_left`` added where its
    causal forms are aligned at the first key; ``forward`` and ``vjp`` take those.
    """

    def __init__(self, mechanism, convention=HOUSE):
        self.mechanism, self.convention = mechanism, convention
        self._forward = getattr(refattn, mechanism)
        self._vjp = getattr(refattn, f"{mechanism}_vjp")
        self._in_pairs = mechanism in ("softmax_attention", "local_attention")
        self._own_denominator = convention.epsilon > 0 and mechanism.startswith("linear_")
        by_softmax = self._in_pairs or mechanism == "sparse_attention"
        self._fills = by_softmax and convention.empty_row != "0"

    def translated(self, options):
        options = dict(options)
        if self._forward is refattn.linear_attention_chunked:
            options.setdefault("causal", True)
        aligned = self._in_pairs or self.mechanism == "gated_attention"
        if aligned and self.convention.causal == "top-left":
            options["top_left"] = True
        if self.convention.window == "counts itself" and "window" in options:
            width = checks.whole("window", options["window"], least=1)
            options["window"] = (width - 1, 0 if options.get("causal") else width - 1)
        return options

    def forward(self, q, k, v, **options):
        if self._own_denominator:
            num, den = self._parts(q, k, v, options)
            return (num / den).astype(q.dtype)
        forward, _, inner = self._called(q, k, options)
        y = forward(q, k, v, **inner)
        if not self._fills:
            return y
        nothing = self.convention.empty_row == "NaN"
        fill = np.nan if nothing else v.mean(axis=-2, keepdims=True)
        return np.where(self._empty(q, k, options), fill, y).astype(q.dtype)

    def vjp(self, dy, q, k, v, **options):
        if self._own_denominator:
            # y = num / den, and both come from one sum over v with a column of ones
            num, den = self._parts(q, k, v, options)
            dnum = dy / den
            dden = -(dnum * num).sum(axis=-1, keepdims=True) / den
            dden = dden if options.get("normalize", True) else 0 * dden
            parts = np.concatenate([dnum, dden], axis=-1).astype(q.dtype)
            dq, dk, dv = self._vjp(parts, q, k, _with_ones(v), **_unnormalised(options))[:3]
            return dq, dk, dv[..., :-1]
        _, vjp, inner = self._called(q, k, options)
        dq, dk, dv, *rest = vjp(dy, q, k, v, **inner)
        if self._fills and self.convention.empty_row == "mean of v":
            pulled = np.where(self._empty(q, k, options), dy, 0).sum(axis=-2, keepdims=True)
            dv = (dv + pulled / v.shape[-2]).astype(q.dtype)
        return dq, dk, dv, *rest

    def _called(self, q, k, options):
        """Forward, gradient and options; where causal is aligned at the first key, as a mask."""
        n, m = q.shape[-2], k.shape[-2]
        inner = {name: x for name, x in options.items() if name != "top_left"}
        if options.get("top_left") and n != m and self.mechanism == "gated_attention":
            raise ValueError("a gated attention aligned at the first key is checked for n = m only")
        bounded = options.get("causal") or "window" in options
        if not (options.get("top_left") and n != m and bounded):
            return self._forward, self._vjp, inner
        kept = {name: x for name, x in inner.items() if name in ("scale", "softcap", "bias")}
        kept["mask"] = visible(n, m, options)
        return refattn.softmax_attention, refattn.softmax_attention_vjp, kept

    def _empty(self, q, k, options):
        """(..., n, 1): queries with nothing to attend."""
        return ~visible(q.shape[-2], k.shape[-2], options).any(axis=-1, keepdims=True)

    def _parts(self, q, k, v, options):
        """Linear attention's numerator, and what the library divides it by."""
        both = self._forward(q, k, _with_ones(v), **_unnormalised(options))
        num, den = both[..., :-1], both[..., -1:]
        scale = q.shape[-1] ** -0.5 if self.convention.scaled_linear else 1.0
        if not options.get("normalize", True):
            return num, np.full_like(den, 1 / scale)
        return num, den + self.convention.epsilon / scale


def _unnormalised(options):
    return {**options, "normalize": False, "return_state": False}


def _with_ones(v):
    return np.concatenate([v, np.ones_like(v[..., :1])], axis=-1)
