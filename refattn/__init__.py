"""refattn: efficient attention, written once to be read, run three ways, proved and costed.

Each mechanism is a folder with the truth in ``formula.py``. Attentions take q (..., n, d),
k (..., m, d), v (..., m, e); beside NAME stand NAME_vjp, its gradient, and NAME_cost.
"""

from refattn import datasets, masks, verify
from refattn.arrays import attention_matrix
from refattn.cost import Cost
from refattn.dispatch import BackendUnavailable
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
    "attention_matrix",
    "datasets",
    "local_attention",
    "local_attention_cost",
    "local_attention_vjp",
    "masks",
    "merge_attention",
    "softmax_attention",
    "softmax_attention_cost",
    "softmax_attention_vjp",
    "sparse_attention",
    "sparse_attention_cost",
    "sparse_attention_vjp",
    "verify",
]
