"""refattn: efficient attention, written once to be read, tested and costed.

Each mechanism is a folder with the truth in ``formula.py``. Attentions take q (..., n, d),
k (..., m, d), v (..., m, e); beside NAME stand NAME_vjp, its gradient, and NAME_cost.
"""

from refattn import datasets, gates, masks, verify
from refattn.arrays import attention_matrix
from refattn.cost import Cost
from refattn.dispatch import BackendUnavailable
from refattn.gates import gated_attention, gated_attention_cost, gated_attention_vjp
from refattn.hierarchy import (
    block_attention,
    block_attention_cost,
    block_attention_vjp,
    two_level_attention,
    two_level_attention_cost,
    two_level_attention_vjp,
)
from refattn.linear import (
    FeatureMap,
    linear_attention,
    linear_attention_chunked,
    linear_attention_chunked_cost,
    linear_attention_chunked_vjp,
    linear_attention_cost,
    linear_attention_step,
    linear_attention_vjp,
)
from refattn.linformer import (
    linformer_attention,
    linformer_attention_cost,
    linformer_attention_vjp,
)
from refattn.performer import (
    hyperbolic_features,
    performer_attention,
    performer_attention_cost,
    performer_attention_vjp,
    positive_features,
    random_features,
    trig_features,
)
from refattn.softmax import (
    merge_attention,
    softmax_attention,
    softmax_attention_cost,
    softmax_attention_vjp,
)
from refattn.sparse import (
    local_attention,
    local_attention_cost,
    local_attention_vjp,
    sparse_attention,
    sparse_attention_cost,
    sparse_attention_vjp,
)

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailable",
    "Cost",
    "FeatureMap",
    "attention_matrix",
    "block_attention",
    "block_attention_cost",
    "block_attention_vjp",
    "datasets",
    "gated_attention",
    "gated_attention_cost",
    "gated_attention_vjp",
    "gates",
    "hyperbolic_features",
    "linear_attention",
    "linear_attention_chunked",
    "linear_attention_chunked_cost",
    "linear_attention_chunked_vjp",
    "linear_attention_cost",
    "linear_attention_step",
    "linear_attention_vjp",
    "linformer_attention",
    "linformer_attention_cost",
    "linformer_attention_vjp",
    "local_attention",
    "local_attention_cost",
    "local_attention_vjp",
    "masks",
    "merge_attention",
    "performer_attention",
    "performer_attention_cost",
    "performer_attention_vjp",
    "positive_features",
    "random_features",
    "softmax_attention",
    "softmax_attention_cost",
    "softmax_attention_vjp",
    "sparse_attention",
    "sparse_attention_cost",
    "sparse_attention_vjp",
    "trig_features",
    "two_level_attention",
    "two_level_attention_cost",
    "two_level_attention_vjp",
    "verify",
]
