"""ONNX: its reference implementation by the grader, its own test cases of Attention, and the same
operators as the kernels of ONNX Runtime compute them."""

import functools

import numpy as np
import pytest
from judge import draw, hold, logits

import refattn
from refattn.verify import check

onnx = pytest.importorskip("onnx", reason="onnx is not installed (extra: outside)")
from onnx import TensorProto, helper  # noqa: E402
from onnx.reference import ReferenceEvaluator  # noqa: E402

KINDS = {
    np.dtype("float16"): TensorProto.FLOAT16,
    np.dtype("float32"): TensorProto.FLOAT,
    np.dtype("float64"): TensorProto.DOUBLE,
    np.dtype("bool"): TensorProto.BOOL,
    np.dtype("int32"): TensorProto.INT32,
}
ORT = {"ir_version": 10}  # what both read


@functools.cache
def model(op, opset, domain, kinds, outputs, attributes):
    """One node as a model. ``kinds`` are (name, dtype) of its inputs."""
    names = [name for name, _ in kinds]
    node = helper.make_node(op, names, list(outputs), domain=domain, **dict(attributes))
    value = helper.make_tensor_value_info
    given = [value(name, KINDS[kind], None) for name, kind in kinds if name]
    out = [value(name, KINDS[kinds[0][1]], None) for name in outputs if name]
    imports = [helper.make_opsetid("", opset)]
    imports += [helper.make_opsetid(domain, 1)] if domain else []
    graph = helper.make_graph([node], op, given, out)
    return helper.make_model(graph, opset_imports=imports, ir_version=10)  # which both read


@functools.cache
def evaluator(*key):
    return ReferenceEvaluator(model(*key))


@functools.cache
def session(*key):
    ort = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (extra: outside)")
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    given = model(*key).SerializeToString()
    return ort.InferenceSession(given, options, providers=["CPUExecutionProvider"])


def run_by(make, op, opset, inputs, outputs=("Y",), domain="", names=None, **attributes):
    """``names`` are those of all inputs in order, where some are left out with ""."""
    kinds = tuple((name, inputs[name].dtype if name else None) for name in names or inputs)
    return make(op, opset, domain, kinds, outputs, tuple(attributes.items())).run(None, inputs)


by_reference = functools.partial(run_by, evaluator)
by_runtime = functools.partial(run_by, session)


def attention(run, opset, mask=None, **attributes):
    """A kernel of q, k and v."""

    def kernel(q, k, v):
        inputs = {"Q": q, "K": k, "V": v}
        if mask is not None:
            inputs["attn_mask"] = mask if mask.dtype == bool else mask.astype(q.dtype)
        return run("Attention", opset, inputs, **attributes)[0]

    return kernel


SEEN = np.random.default_rng(0).random((13, 17)) < 0.5
SEEN[4] = False
ADDED = np.random.default_rng(1).standard_normal((13, 17))
ADDED[5, :9] = -np.inf
# options of refattn, and of the operator
FORMS = {
    "full": ({}, {}),
    "causal": ({"causal": True}, {"is_causal": 1}),
    "scale": ({"scale": 0.25}, {"scale": 0.25}),
    "softcap": ({"softcap": 1.5}, {"softcap": 1.5}),
    "mask": ({"mask": SEEN}, {"mask": SEEN}),
    "bias": ({"bias": ADDED}, {"mask": ADDED}),
    "softcap and bias": ({"bias": ADDED, "softcap": 0.5}, {"mask": ADDED, "softcap": 0.5}),
}


# NumPy has no tiles
SMALL = {"like": "onnx", "cases": [(1, 1, 4, 3), (13, 17, 5, 7), (17, 13, 4, 4)]}


@pytest.mark.parametrize(
    ("opset", "dtype"),
    [(23, "float32"), (24, "float32"), (25, "float32"), (25, "float64"), (25, "float16")],
)
@pytest.mark.parametrize("form", FORMS)
def test_the_reference_by_the_grader(form, opset, dtype):
    options, attributes = FORMS[form]
    kernel = attention(by_reference, opset, **attributes)
    report = check(kernel, "softmax_attention", dtype=dtype, **SMALL, **options)
    assert report.passed, report


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [(0, 0), (3, 0), (2, 5), (9, 9)])
def test_windows_of_opset_25(window, causal):
    left, right = window
    kernel = attention(
        by_reference, 25, left_window_size=left, right_window_size=right, is_causal=int(causal)
    )
    asked = {"window": window, "causal": causal, **SMALL}
    report = check(kernel, "local_attention", **asked)
    assert report.passed, report
    counted = attention(by_reference, 25, left_window_size=left + 1, right_window_size=right)
    assert not check(counted, "local_attention", **asked).passed


def test_a_missing_scale_is_named():
    report = check(attention(by_reference, 25, scale=1.0), "softmax_attention", **SMALL)
    assert report.diagnosis[0].startswith("scale missing: ")


def grouped(x, groups):
    """(b, h g, n, c) as (b, h, g, n, c); an axis of 1 stays one."""
    heads = (groups, -1) if x.shape[1] > 1 else (1, 1)
    return x.reshape(x.shape[0], *heads, *x.shape[2:])


def translated(case):
    """A stored case as refattn's: (attention, q, k, v, options), heads grouped."""
    (node,) = case.model.graph.node
    told = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    given = dict(zip([name for name in node.input if name], case.data_sets[0][0], strict=True))
    q, k, v = given["Q"], given["K"], given["V"]
    if q.ndim == 3:
        heads = told["q_num_heads"], told["kv_num_heads"], told["kv_num_heads"]
        q, k, v = (
            x.reshape(*x.shape[:2], h, -1).swapaxes(1, 2)
            for x, h in zip((q, k, v), heads, strict=True)
        )
    if "past_key" in given:
        k = np.concatenate([given["past_key"], k], axis=2)
        v = np.concatenate([given["past_value"], v], axis=2)
    n, m, shared = q.shape[2], k.shape[2], k.shape[1]
    lengths = given.get("nonpad_kv_seqlen")
    offset = given["past_key"].shape[2] if "past_key" in given else 0
    offset = offset if lengths is None else (lengths - n).reshape(-1, 1, 1, 1, 1)
    at, j = np.arange(n)[:, None] + offset, np.arange(m)
    seen, options = np.ones((n, m), bool), {}
    if told.get("is_causal") and np.ndim(offset) == 0 and offset == m - n:
        options["causal"] = True  # the last query stands at the last key
    elif told.get("is_causal"):
        seen = seen & (j <= at)
    if told.get("left_window_size", -1) >= 0:
        seen = seen & (at - j <= told["left_window_size"])
    if told.get("right_window_size", -1) >= 0:
        seen = seen & (j - at <= told["right_window_size"])
    if lengths is not None:
        seen = seen & (j < lengths.reshape(-1, 1, 1, 1, 1))
    if "attn_mask" in given:
        mask = given["attn_mask"]
        short = [(0, 0)] * (mask.ndim - 1) + [(0, m - mask.shape[-1])]
        hidden = False if mask.dtype == bool else -np.inf
        if mask.shape[-1] > 1:
            mask = np.pad(mask, short, constant_values=hidden)
        if mask.ndim >= 3:
            mask = grouped(mask.reshape((1,) * (4 - mask.ndim) + mask.shape), shared)
        if mask.dtype == bool:
            seen = seen & mask
        else:
            options["bias"] = mask
    if not seen.all():
        options["mask"] = seen
    if told.get("scale") is not None:
        options["scale"] = told["scale"]
    if told.get("softcap"):
        options["softcap"] = told["softcap"]
    return grouped(q, shared), k[:, :, None], v[:, :, None], options


def test_the_stored_cases_of_attention():
    """Each case that ships with the package (more than 90), through refattn, by its own numbers.

    They were computed by the reference in the case's dtype, which may round each step.
    """
    import onnx.backend.test.case.node.attention  # makes its cases as it is imported

    made = onnx.backend.test.case.node._NodeTestCases  # collect_testcases makes all operators'
    cases = [case for case in made if "expanded" not in case.name]
    done = []
    for case in cases:
        (node,) = case.model.graph.node
        q, k, v, options = translated(case)
        wanted = case.data_sets[0][1][0]

        def ours(kind, q=q, k=k, v=v, options=options, wanted=wanted):
            cast = lambda x: x.astype(kind) if getattr(x, "dtype", bool) != bool else x
            told = {name: cast(x) for name, x in options.items()}
            y = refattn.softmax_attention(*(x.astype(kind) for x in (q, k, v)), **told)
            b, h, g, n, e = y.shape
            y = y.reshape(b, h * g, n, e)
            return {"y": y if wanted.ndim == 4 else y.swapaxes(1, 2).reshape(b, n, -1)}

        bias = options.get("bias", np.zeros(1)).astype(float)
        size = logits(q.astype(float), k.astype(float), options.get("scale"))
        size += abs(bias[np.isfinite(bias)]).max(initial=0)
        try:
            hold({"y": wanted}, ours, size)
        except AssertionError as error:
            raise AssertionError(f"{case.name}: {error}") from error
        done.append(case.name)
    assert len(done) == len(cases) > 90
    assert any("causal" in options for *_, options in map(translated, cases))


@pytest.mark.parametrize("run", [by_reference, by_runtime])
@pytest.mark.parametrize("form", ["mask", "softcap and bias", "causal"])
def test_the_weights_and_grouped_heads(form, run):
    """Mode 3 of qk_matmul_output gives the weights, which are attention_matrix."""
    options, attributes = FORMS[form]
    attributes = dict(attributes)
    q, k, v = draw(1, (2, 6, 13, 8), (2, 2, 17, 8), (2, 2, 17, 8))
    inputs = {"Q": q, "K": k, "V": v}
    if "mask" in attributes:
        mask = attributes.pop("mask")
        inputs["attn_mask"] = mask if mask.dtype == bool else mask.astype(np.float32)
    if form == "causal":  # as many queries as keys, where alignments agree
        inputs["Q"] = q = draw(2, (2, 6, 17, 8))[0]
    inputs = {n: x if x.dtype == bool else x.astype(np.float32) for n, x in inputs.items()}
    outputs = ("Y", "", "", "qk_matmul_output")
    y, weights = run("Attention", 23, inputs, outputs, qk_matmul_output_mode=3, **attributes)

    def ours(kind):
        args = grouped(q, 2).astype(kind), k[:, :, None].astype(kind), v[:, :, None].astype(kind)
        told = {n: x.astype(kind) if n == "bias" else x for n, x in options.items()}
        matrix = refattn.attention_matrix(refattn.softmax_attention, *args[:2], **told)
        y = refattn.softmax_attention(*args, **told)
        return {"y": y.reshape(2, 6, -1, 8), "weights": matrix.reshape(2, 6, -1, 17)}

    hold({"y": y, "weights": weights}, ours, logits(grouped(q, 2), k[:, :, None]) + 3)


def packed(x):
    """(b, h, n, c) as (b, n, h c)."""
    return np.ascontiguousarray(x.swapaxes(1, 2).reshape(x.shape[0], x.shape[2], -1))


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(
    ("run", "opset", "domain"), [(by_reference, 27, ""), (by_runtime, 21, "com.microsoft")]
)
def test_linear_attention(run, opset, domain, normalize):
    """The update rule "linear" on features made ahead: causal, no denominator, a state in and out.

    A column of ones among the values makes the denominator, which is how a normalised form is had
    from it.
    """
    phi_q, phi_k, v, S = draw(3, (2, 3, 40, 8), (2, 3, 40, 8), (2, 3, 40, 5), (2, 3, 8, 5))
    phi_q, phi_k = abs(phi_q), abs(phi_k)
    v = np.concatenate([v, np.ones_like(v[..., :1])], axis=-1) if normalize else v
    z = abs(draw(4, (2, 3, 8))[0])
    S = np.concatenate([S, z[..., None]], axis=-1) if normalize else S
    inputs = {"query": packed(phi_q), "key": packed(phi_k), "value": packed(v), "past_state": S}
    inputs = {name: x.astype(np.float32) for name, x in inputs.items()}
    y, state = run(
        "LinearAttention",
        opset,
        inputs,
        ("output", "present_state"),
        domain,
        q_num_heads=3,
        kv_num_heads=3,
        scale=1.0,
        update_rule="linear",
    )
    y = y.reshape(2, 40, 3, -1).swapaxes(1, 2).astype(float)
    if normalize:
        y = y[..., :-1] / y[..., -1:]
    bare = refattn.linear.FeatureMap(refattn.linear.identity, refattn.linear.identity)

    def ours(kind):
        args = [x.astype(kind) for x in (phi_q, phi_k, v[..., :5])]
        y, (S_end, z_end) = refattn.linear_attention(
            *args,
            feature_map=bare,
            causal=True,
            normalize=normalize,
            initial_state=(S[..., :5].astype(kind), z.astype(kind)),
            return_state=True,
        )
        end = np.concatenate([S_end, z_end[..., None]], axis=-1) if normalize else S_end
        return {"y": y, "state": end}

    hold({"y": y.astype(np.float32), "state": state}, ours, 8.0)


class TestRuntime:
    """ONNX Runtime's C++ kernels for the CPU, those outside the standard too."""

    @pytest.fixture(autouse=True)
    def library(self):
        pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (extra: outside)")

    @pytest.mark.parametrize(
        ("opset", "dtype"), [(23, "float32"), (24, "float32"), (24, "float16")]
    )
    @pytest.mark.parametrize("form", FORMS)
    def test_attention_by_the_grader(self, form, opset, dtype):
        options, attributes = FORMS[form]
        kernel = attention(by_runtime, opset, **attributes)
        asked = {"like": "onnx"} if (opset, dtype) == (24, "float32") else SMALL
        report = check(kernel, "softmax_attention", dtype=dtype, **asked, **options)
        assert report.passed, report

    @pytest.mark.parametrize("window", [None, 1, 5])
    @pytest.mark.parametrize("past", [0, 9])
    def test_group_query_attention(self, past, window):
        """Causal, with a cache the last query stands at the last key. Its local_window_size counts
        the query's own key; left_window_size of the standard's Attention does not."""
        told = {} if window is None else {"local_window_size": window}
        q, k, v = draw(5, (1, 4, 20, 8), (1, 2, 20 + past, 8), (1, 2, 20 + past, 8))
        inputs = {
            "query": packed(q),
            "key": packed(k[:, :, past:]),
            "value": packed(v[:, :, past:]),
        }
        inputs |= {"past_key": k[:, :, :past], "past_value": v[:, :, :past]}
        inputs = {name: x.astype(np.float32) for name, x in inputs.items()}
        inputs["seqlens_k"] = np.array([19 + past], np.int32)
        inputs["total_sequence_length"] = np.array(20 + past, np.int32)
        outputs = "output", "present_key", "present_value"
        heads = {"num_heads": 4, "kv_num_heads": 2, "softcap": 2.0 if window is None else 0.0}
        y, *_ = by_runtime(
            "GroupQueryAttention", 21, inputs, outputs, "com.microsoft", **heads, **told
        )

        def ours(kind):
            args = [x.astype(kind) for x in (grouped(q, 2), k[:, :, None], v[:, :, None])]
            if window is None:
                y = refattn.softmax_attention(*args, causal=True, softcap=2.0)
            else:
                y = refattn.local_attention(*args, window=(window - 1, 0))
            return {"y": packed(y.reshape(q.shape))}

        hold({"y": y}, ours, logits(grouped(q, 2), k[:, :, None]))

    @pytest.mark.parametrize("heads", [4, 1])
    def test_multi_head_attention_with_a_bias(self, heads):
        q, k, v, bias = draw(6, (2, 4, 20, 8), (2, 4, 30, 8), (2, 4, 30, 6), (1, heads, 20, 30))
        inputs = {"query": packed(q), "key": packed(k), "value": packed(v), "attention_bias": bias}
        inputs = {name: x.astype(np.float32) for name, x in inputs.items()}
        names = ("query", "key", "value", "", "", "attention_bias")
        y, *_ = by_runtime(
            "MultiHeadAttention", 21, inputs, ("output",), "com.microsoft", names, num_heads=4
        )

        def ours(kind):
            args = [x.astype(kind) for x in (q, k, v)]
            return {"y": packed(refattn.softmax_attention(*args, bias=bias.astype(kind)))}

        hold({"y": y}, ours, logits(q, k, bias=abs(bias).max()))

    @pytest.mark.parametrize(("n", "m"), [(20, 20), (20, 30), (30, 20)])
    def test_its_causal_flag_lets_the_last_query_see_all(self, n, m):
        """unidirectional of MultiHeadAttention stands at the first key, but for its last row, which
        sees every key: with more keys than queries that is neither alignment."""
        q, k, v = draw(8, (2, 4, n, 8), (2, 4, m, 8), (2, 4, m, 8))
        inputs = {"query": packed(q), "key": packed(k), "value": packed(v)}
        inputs = {name: x.astype(np.float32) for name, x in inputs.items()}
        told = {"num_heads": 4, "unidirectional": 1}
        y, *_ = by_runtime("MultiHeadAttention", 21, inputs, ("output",), "com.microsoft", **told)
        seen = np.tri(n, m, dtype=bool)
        seen[-1] = True

        def ours(kind):
            args = [x.astype(kind) for x in (q, k, v)]
            return {"y": packed(refattn.softmax_attention(*args, mask=seen))}

        hold({"y": y}, ours, logits(q, k))

    def test_sparse_attention_on_a_csr_mask_of_blocks(self):
        """Block rows and columns as in csr, causal inside; its cache is written in place."""
        import onnxruntime as ort

        n, block = 128, 16
        masks = refattn.masks
        pattern = masks.union(masks.local(n // block, (1, 0)), masks.strided(n // block, 3))
        pattern = masks.intersection(pattern, masks.causal(n // block))
        q, k, v = draw(7, (1, 4, n, 16), (1, 2, n, 16), (1, 2, n, 16))
        inputs = {"query": packed(q), "key": packed(k), "value": packed(v)}
        inputs |= {"past_key": 0 * k, "past_value": 0 * v}
        inputs = {name: x.astype(np.float32) for name, x in inputs.items()}
        inputs |= {
            "block_row_indices": pattern.indptr[None].astype(np.int32),
            "block_col_indices": pattern.indices[None].astype(np.int32),
            "total_sequence_length": np.array(n, np.int32),
            "key_total_sequence_lengths": np.array([n], np.int32),
        }
        outputs = "output", "present_key", "present_value"
        told = {"num_heads": 4, "kv_num_heads": 2, "sparse_block_size": block}
        kinds = tuple((name, x.dtype) for name, x in inputs.items())
        run = session("SparseAttention", 21, "com.microsoft", kinds, outputs, tuple(told.items()))
        bound = run.io_binding()
        for name, x in inputs.items():
            value = ort.OrtValue.ortvalue_from_numpy(x)
            bound.bind_ortvalue_input(name, value)
            if name.startswith("past"):
                bound.bind_ortvalue_output(name.replace("past", "present"), value)
        bound.bind_output("output")
        run.run_with_iobinding(bound)
        (y,) = (x.numpy() for x in bound.get_outputs() if x.shape() == [1, n, 64])
        mask = masks.intersection(masks.expand_blocks(pattern, block, n), masks.causal(n))

        def ours(kind):
            args = [x.astype(kind) for x in (grouped(q, 2), k[:, :, None], v[:, :, None])]
            return {"y": packed(refattn.sparse_attention(*args, mask=mask).reshape(q.shape))}

        hold({"y": y}, ours, logits(grouped(q, 2), k[:, :, None]))
