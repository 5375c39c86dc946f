"""docs/outside.md: what refattn is held against, where that differs, and the test that shows it.

``python tests/outside/page.py`` writes the page; test_page.py sees that it is up to date, that each
test it names exists, and that the releases are those that are installed.
"""

from pathlib import Path
from typing import NamedTuple

PAGE = Path(__file__).parents[2] / "docs" / "outside.md"


class Software(NamedTuple):
    package: str
    release: str  # "" for a dependency of refattn itself, of which any will do
    what: str


class Held(NamedTuple):
    """A mechanism of refattn, and what of it is held against which packages by which test."""

    mechanism: str
    packages: str
    by: str
    parts: str
    test: str  # file::name


class Difference(NamedTuple):
    package: str
    says: str
    test: str


def rows(kind, text):
    """Lines of cells between bars; an indented line goes on with the one before."""
    lines = text.strip().replace("\n    ", " ").splitlines()
    return [kind(*(cell.strip() for cell in line.split("|"))) for line in lines]


SOFTWARE = rows(
    Software,
    """
torch | 2.13.0 | its own kernels; autograd and forward mode of other formulas
jax | 0.10.2 | dot_product_attention; references of its TPU kernels; scans; grad
onnx | 1.23.2 | the standard's reference implementation and its stored cases
onnxruntime | 1.32.0 | C++ kernels for the CPU
transformers | 5.24.0 | attention layers of language models
fla-core | 0.6.0 | references of flash-linear-attention's Triton kernels
performer-pytorch | 1.1.4 | FAVOR+
local-attention | 1.11.2 | windows by buckets
linformer | 0.2.3 | Linformer's layer
linear-attention-transformer | 0.19.1 | softmax maps, full and causal by buckets
h-transformer-1d | 0.1.9 | many levels of summaries
scikit-learn | 1.9.1 | kernel regression, densities, random Fourier features
scipy | | filters, densities, log-sum-exp
""",
)

# The outputs of each attention in test_autodiff.py, beside all gradients.
BY_AUTODIFF = {
    "softmax_attention": "y, lse",
    "local_attention": "y",
    "sparse_attention": "y",
    "linear_attention": "y, state",
    "linear_attention_chunked": "y, state",
    "performer_attention": "y",
    "linformer_attention": "y",
    "block_attention": "y",
    "two_level_attention": "y",
    "gated_attention": "y",
}
HELD = [
    Held(
        mechanism,
        "torch",
        "dense formulas and autograd, every input broadcast; one form of each by forward mode",
        f"{parts}, all gradients",
        "test_autodiff.py::test_the_formula_in_float64",
    )
    for mechanism, parts in BY_AUTODIFF.items()
] + rows(
    Held,
    """
softmax_attention | jax | the same dense formulas and jax.grad | y, lse, all gradients |
    test_autodiff.py::test_jax_says_the_same_as_torch
linear_attention_chunked | jax | the same dense formulas and jax.grad | y, state, all gradients |
    test_autodiff.py::test_jax_says_the_same_as_torch
performer_attention | jax | the same dense formulas and jax.grad | y, all gradients |
    test_autodiff.py::test_jax_says_the_same_as_torch
block_attention | jax | the same dense formulas and jax.grad | y, all gradients |
    test_autodiff.py::test_jax_says_the_same_as_torch
two_level_attention | jax | the same dense formulas and jax.grad | y, all gradients |
    test_autodiff.py::test_jax_says_the_same_as_torch
softmax_attention | torch | SDPA's plain and flash kernels, by the grader | y, dq, dk, dv |
    test_torch.py::test_each_kernel_of_sdpa_by_the_grader
softmax_attention | torch | grouped heads (enable_gqa) | y, dq, dk, dv |
    test_torch.py::test_grouped_heads
softmax_attention | torch | a real attn_mask that is broadcast | y, dq, dk, dv, dbias |
    test_torch.py::test_the_gradient_of_a_bias
softmax_attention | torch | FlexAttention with a score_mod | y, lse |
    test_torch.py::test_flex_with_a_softcap_a_bias_and_grouped_heads
sparse_attention | torch | FlexAttention on each kind of mask in refattn.masks | y, lse |
    test_torch.py::test_flex_on_each_mask
merge_attention | torch | FlexAttention's parts and their log-sum-exps | y, lse |
    test_torch.py::test_parts_of_flex_merge_to_the_whole
attention_matrix | torch | MultiheadAttention's weights | y, weights |
    test_torch.py::test_the_multi_head_layer
softmax_attention | torch | logcumsumexp | lse, dk |
    test_torch.py::test_a_running_logsumexp_is_causal_attention_to_one_column
local_attention | torch | average pooling | y, dv |
    test_torch.py::test_average_pooling_is_a_window_of_equal_scores
two_level_attention | torch | maximum pooling | y |
    test_torch.py::test_max_pooling_is_the_pool_of_two_levels
gates.sigmoid | torch | sigmoid and autograd | gate, all gradients |
    test_torch.py::test_the_gates_sigmoid
gates.top_k | torch | topk | rows | test_torch.py::test_the_gates_top_k
gates.block_top_k | torch | average pooling and topk | y |
    test_torch.py::test_the_blocks_that_a_query_likes_best
softmax_attention_cost | torch | FlopCounterMode | matrix products |
    test_torch.py::test_matrix_products_cost_what_torch_counts
linformer_attention_cost | torch | FlopCounterMode | matrix products |
    test_torch.py::test_matrix_products_cost_what_torch_counts
linear_attention_cost | torch | FlopCounterMode | matrix products |
    test_torch.py::test_matrix_products_cost_what_torch_counts
softmax_attention | jax | dot_product_attention, grouped heads | y, lse, dq, dk, dv, dbias |
    test_jax.py::test_bias_grouped_heads_and_the_logsumexp
softmax_attention | jax | lengths of queries and keys | y |
    test_jax.py::test_lengths_hide_keys_and_queries
block_attention | jax | mha_reference with segments | y |
    test_jax.py::test_segments_are_a_block_diagonal
local_attention | jax | splash attention's reference, LocalMask and softcap | y, lse |
    test_jax.py::test_a_window_with_a_softcap
softmax_attention | jax | lax.scan with a running maximum | y, lse |
    test_jax.py::test_the_online_softmax_by_scan
linear_attention | jax | lax.scan and associative_scan | y, state, steps, all gradients |
    test_jax.py::test_linear_attention_by_scans
softmax_attention | onnx | Attention 23, 24, 25 by the grader, three types | y |
    test_onnx.py::test_the_reference_by_the_grader
local_attention | onnx | windows of Attention 25 by the grader | y |
    test_onnx.py::test_windows_of_opset_25
softmax_attention | onnx | every stored case of Attention | y |
    test_onnx.py::test_the_stored_cases_of_attention
attention_matrix | onnx, onnxruntime | weights with grouped heads | y, weights |
    test_onnx.py::test_the_weights_and_grouped_heads
linear_attention | onnx, onnxruntime | LinearAttention 27, rule linear | y, state |
    test_onnx.py::test_linear_attention
softmax_attention | onnxruntime | Attention 23, 24 by the grader, two types | y |
    test_onnx.py::test_attention_by_the_grader
local_attention | onnxruntime | GroupQueryAttention with a window, a cache, a softcap | y |
    test_onnx.py::test_group_query_attention
softmax_attention | onnxruntime | MultiHeadAttention with a bias | y |
    test_onnx.py::test_multi_head_attention_with_a_bias
sparse_attention | onnxruntime | SparseAttention on csr blocks | y |
    test_onnx.py::test_sparse_attention_on_a_csr_mask_of_blocks
sparse_attention | transformers | Longformer's sliding chunks and global tokens | y, dq, dk, dv |
    test_transformers.py::test_longformer
sparse_attention | transformers | BigBird's blocks, in training | y, dq, dk, dv |
    test_transformers.py::test_in_training
softmax_attention | transformers | Gemma 2's softcap | y, weights, dq, dk, dv |
    test_transformers.py::test_a_softcap_and_grouped_heads
gated_attention | transformers | Qwen3-Next's output gate | y, dq, dk, dv, dgate |
    test_transformers.py::test_an_output_gate
masks | transformers | causal, sliding and chunked mask functions | pairs |
    test_transformers.py::test_mask_functions
linear_attention | fla-core | by steps and by chunks, by the grader | y, dq, dk, dv |
    test_fla.py::test_linear_attention
local_attention | fla-core | naive_parallel_attn by the grader | y, dq, dk, dv |
    test_fla.py::test_attention
linear_attention | fla-core | Based's Taylor map, whole and by chunks | y, dq, dk, dv |
    test_fla.py::test_the_taylor_map
linear_attention | fla-core | retention, as a map that knows its row | y, dq, dk, dv |
    test_fla.py::test_retention
softmax_attention | fla-core | forgetting attention, as a bias | y, dq, dk, dv, dbias |
    test_fla.py::test_forgetting_attention
performer_attention | performer-pytorch | softmax_kernel without its epsilon | y, dq, dk, dv |
    test_lucidrains.py::test_without_the_epsilon_it_is_our_positive_kind
linear_attention | performer-pytorch | generalised attention with relu | y, dq, dk, dv |
    test_lucidrains.py::test_generalised_attention_is_linear_attention_of_relu
linear_attention | performer-pytorch | no_projection: softmax maps | y, dq, dk, dv |
    test_lucidrains.py::test_no_projection_is_our_softmax_map
local_attention | local-attention | exact windows, causal and not | y, dq, dk, dv |
    test_lucidrains.py::test_exact_windows
sparse_attention | local-attention | buckets | y, dq, dk, dv | test_lucidrains.py::test_buckets
linformer_attention | linformer | with one projection and with two | y, all gradients |
    test_lucidrains.py::test_linformer
linear_attention | linear-attention-transformer | softmax maps; causal by ones | y, dq, dk, dv |
    test_lucidrains.py::test_causal_in_buckets_of_one
softmax_attention | scikit-learn | Nadaraya and Watson's regression | y |
    test_statistics.py::test_kernel_regression
sparse_attention | scikit-learn | regression on the nearest neighbours | y |
    test_statistics.py::test_nearest_neighbours_are_a_csr_mask
linear_attention | scikit-learn | polynomial_kernel | y |
    test_statistics.py::test_the_taylor_map_is_a_polynomial_kernel
performer_attention | scikit-learn | RBFSampler, two phases a quarter turn apart | kernel, y |
    test_statistics.py::test_random_fourier_features
softmax_attention | scipy | an exponential moving average by lfilter (ALiBi) | y, lse, state |
    test_statistics.py::test_an_exponential_moving_average
softmax_attention | scipy | gaussian_kde with weights | lse |
    test_statistics.py::test_a_kernel_density
""",
)

DIFFERENCES = rows(
    Difference,
    """
torch | The flash kernel wants as many columns in v as in k; without that SDPA takes the plain
    kernel, in silence. |
    test_torch.py::test_the_flash_kernel_wants_as_many_columns_in_v
torch | is_causal stands at the first key; torch.nn.attention.bias.causal_lower_right at the
    last, as refattn does. |
    test_torch.py::test_lower_right_is_our_causal
torch | elu(x) + 1, as it is mostly written, loses what exp(x) has where x << 0.
    | test_graded.py::test_the_one_of_elu
jax | The log-sum-exp of return_residual is held constant: its gradient is lost in silence. |
    test_jax.py::test_bias_grouped_heads_and_the_logsumexp
jax | A row hidden by a bias of -inf is NaN; by a mask it is the mean of v. |
    test_jax.py::test_a_row_hidden_by_a_bias_is_nan
jax | mha_reference of the TPU flash kernel multiplies its bias with sm_scale, as it does the
    scores. |
    test_jax.py::test_its_bias_is_scaled_too
onnxruntime | local_window_size of GroupQueryAttention counts the query's own key;
    left_window_size of the standard's Attention does not. |
    test_onnx.py::test_group_query_attention
onnxruntime | unidirectional of MultiHeadAttention stands at the first key, but the last query
    sees every key: with more keys than queries that is neither alignment. |
    test_onnx.py::test_its_causal_flag_lets_the_last_query_see_all
transformers | Outside training BigBird's random blocks are all block 0, whose keys then stand in
    the softmax 1 + num_random_blocks times: a bias of the logarithm of that. |
    test_transformers.py::test_when_it_is_used_block_0_counts_three_times
transformers | sliding_window_causal_mask_function(w) shows w keys, the bidirectional one 2 w +
    1. |
    test_transformers.py::test_mask_functions
transformers | The eager softmax is float32 for float64 too. |
    test_transformers.py::test_a_softcap_and_grouped_heads
fla-core | 1e-10 is added to the denominator of linear attention, which shows where features are
    as small. |
    test_fla.py::test_the_epsilon_shows
fla-core | Based adds 1e-6 to its denominator. |
    test_fla.py::test_the_taylor_map
performer-pytorch | 1e-4 is added to every feature after its maximum was taken off, and causally
    1e-6 to the running sum of the keys' features. |
    test_lucidrains.py::test_with_its_epsilons
performer-pytorch | The maximum is over the whole sequence: a large last key turns earlier causal
    rows into means of the values so far. |
    test_lucidrains.py::test_a_later_key_changes_the_causal_output
performer-pytorch | Orthogonal directions come without the correction of signs, so that one entry
    is never positive. |
    test_lucidrains.py::test_its_orthogonal_directions_are_one_sided
local-attention | A row with nothing to attend gets the mean of its buckets, in which places
    outside the sequence hold -1. |
    test_lucidrains.py::test_a_row_with_nothing_to_attend_averages_its_padding_too
linear-attention-transformer | The full form is ours times 1/sqrt(d). |
    test_lucidrains.py::test_full
linear-attention-transformer | Causal in buckets of more than one, a query sees none of its own
    bucket, and the first bucket gives 0. |
    test_lucidrains.py::test_larger_buckets_do_not_see_their_own
h-transformer-1d | A summary's values are added up and its weight is counted once, so that equal
    values come out larger: no reference for two_level_attention. |
    test_lucidrains.py::test_h_transformer_counts_a_summary_once
""",
)


def name_of(test):
    """The test's own name, which -k takes."""
    return test.split("::")[1]


def table(*lines):
    """A Markdown table of a header and rows."""
    header, *body = lines
    return "".join("| " + " | ".join(x) + " |\n" for x in [header, ["---"] * len(header), *body])


def page():
    """The page as text."""
    software = [[f"`{s.package}`", s.release or "any", s.what] for s in SOFTWARE]
    held = [
        [f"`{h.mechanism}`", h.packages, h.by, h.parts, f"`{name_of(h.test)}`"]
        for h in sorted(HELD, key=lambda h: h.mechanism)
    ]
    differences = [f"- `{d.package}`: {d.says} `{name_of(d.test)}`\n" for d in DIFFERENCES]
    return f"""# Held against other software

<!-- written by tests/outside/page.py -->

`tests/outside` holds refattn against software as the package index has it; nothing of it is copied.

    .venv/bin/python -m pip install -c constraints.txt -e '.[outside]'
    .venv/bin/python -m pytest tests/outside

What is not installed is skipped, with its name. Each row is right to rounding: within the grader's
rule (`refattn.verify.wanted`), with the error of the formula in float32 for E, and for other types
that times the ratio of the types' eps. The rows of automatic differentiation are run in float64, in
float32, and in float32 by the compiled kernels, on more than one tile.

## Releases

{table(["package", "release", "what it is here"], *software)}
## What is held

{table(["refattn", "held against", "by", "what", "test"], *held)}
## Where conventions differ

Each is asserted exactly, by refattn with the difference put in; to run the test of one:
`.venv/bin/python -m pytest tests/outside -k NAME`. `test_graded.py` puts some of these kernels
before `refattn.verify.check`, which names the difference.

{"".join(differences)}"""


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE.name)
