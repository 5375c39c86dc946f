"""What a manifest says in words."""

CONVENTIONS = {
    "shapes": "q (..., n, d), k (..., m, d), v (..., m, e) give y (..., n, e); leading axes "
    "broadcast",
    "arithmetic": "wanted arrays are those of real numbers for the stored inputs, in float64",
    "mask": "bool, true where a query may attend; bias is added, and -inf hides a pair",
    "empty row": "a query with nothing to attend has y = 0, lse = -inf and gradient 0",
    "causal": "query i sees keys j <= i + (m - n): bottom-right; linear forms and Performer need "
    "n = m",
    "window": "(left, right), both inclusive, around position i + (m - n); an integer w is (w, w); "
    "keys are dilation apart; causal makes right 0",
    "scale": "1/sqrt(d) where none is given; none at all in linear attention",
    "order": "scale, softcap, bias, mask, softmax; softcap is c tanh(s / c)",
    "denominator": "linear attention adds no epsilon; a denominator of 0 gives 0",
    "hidden": "NaN and infinities in what nobody may see reach no output and no gradient",
    "two level": "a summary's score has log(size of its block) added",
    "maximum": "of equals the first gets the gradient",
    "gate": "a query whose gate is all 0 is a constant: its gradients and the gate's are 0",
    "feature maps": "elu: x + 1 where x > 0, else e^x; relu: max(x, 0); softmax: of q over "
    "columns, of k over visible positions; taylor: 1, all x_c, then x_b x_c of b <= c row by row, "
    "x_c^2 / sqrt(2) where b = c",
    "performer": "x = sqrt(scale) q or k, w = omega x: positive e^(w - |x|^2/2); hyperbolic that "
    "of w and of -w; trig e^(|x|^2/2) (cos w, sin w); y = phi(q) (phi(k)^T v) / phi(q) phi(k)^T 1",
    "linformer": "softmax(scale q (E k)^T) (F v), F = E where none is given; hidden keys are left "
    "out of the sums",
    "blocks": "block keys each; concat: each query its own block; exact: softmax over all; else "
    "row p is the sum, mean, max or weighted sum of row p of the blocks' attentions",
    "pool": "two level: the own block's keys and the mean or maximum of every other block's keys "
    "and values, in one softmax",
    "gated": "y = gate * attention",
    "constants": "scale, softcap, omega and masks have no gradient",
}
PARTS = {
    "y": "the output",
    "lse": "log-sum-exp of each query's scores",
    "S, z": "the state of linear attention after all keys: sums of phi(k) v^T and of phi(k)",
    "dy, dlse, dS, dz": "inputs of the gradient: that of a scalar by y, lse, S and z",
    "dq, dk, dv, dbias, dE, dF, dgate, dweights": "the gradient by each, in its shape",
    "dS0, dz0": "the gradient by the initial state",
    "mask, mask.indptr, mask.indices": "a sparse mask, whole and as a csr matrix",
    "ys, lses": "outputs and log-sum-exps of parts, to be merged",
}
LAYOUT = (
    "array CASE/ROLE in MECHANISM.safetensors and MECHANISM.npz, little-endian, last axis fastest; "
    ".npz has bfloat16 as float32 of the same value; sha256 of an array is that of its bytes in "
    ".safetensors"
)
BUDGET = (
    "a kernel is right when every |entry - wanted| is at most 2 E + 4 eps ((1 + max|s|) size + "
    "floor) + error: s the logits, E the error of refattn's own formula in this dtype, size and "
    "floor the magnitudes that docs/vectors.md lists, error that of the stored array; where "
    "-inf is wanted, only -inf is right"
)
