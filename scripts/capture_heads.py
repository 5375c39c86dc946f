"""Run the trained encoder over the opening of Alice and keep 12 of its 72 heads as data.

Writes refattn/data/heads.npz: q, k and v of heads chosen by the rules in `RULES`, so that each
approximation of softmax attention meets a head that suits it and one that breaks it.
"""

import argparse
from pathlib import Path

import numpy as np
from tqdm import tqdm

from refattn.encoder import load_encoder

ROOT = Path(__file__).resolve().parents[1]
TOKENS = 512
STATISTICS = ("mass_within_16", "entropy", "rank_99", "largest_column", "largest_logit")

# In this order, each kind takes the head with the largest (+1) or smallest (-1) value of its
# statistic among those not yet taken. A head that is extreme in several ways goes to the kind
# named first, so the ways in which it differs most from all others come first.
RULES = (
    ("large logits", "largest_logit", +1),
    ("high rank", "rank_99", +1),
    ("low rank", "rank_99", -1),
    ("sink", "largest_column", +1),
    ("local", "mass_within_16", +1),
    ("diffuse", "entropy", +1),
    ("small logits", "largest_logit", -1),
    ("global", "mass_within_16", -1),
    ("peaked", "entropy", -1),
)
# Then from each third of the layers the head nearest to the median in all statistics at once.
TYPICAL = ("typical early", "typical middle", "typical late")


def head_statistics(q, k):
    """What the attention matrix of one head, q and k (n, d), is like; computed in float64."""
    q, k = q.astype(np.float64), k.astype(np.float64)
    n, d = q.shape
    s = q @ k.T / np.sqrt(d)  # (n, n)
    p = np.exp(s - s.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    i = np.arange(n)
    near = np.abs(i[:, None] - i) <= 16
    energy = np.cumsum(np.linalg.svd(p, compute_uv=False) ** 2)
    return {
        "mass_within_16": p[near].sum() / n,
        "entropy": -(p * np.log(np.maximum(p, np.finfo(p.dtype).tiny))).sum() / n,
        "rank_99": 1 + int(np.searchsorted(energy, 0.99 * energy[-1])),
        "largest_column": p.sum(axis=0).max() / n,
        "largest_logit": s.max(),
    }


def select(table, layer):
    """The kinds and the row of `table` that each takes; `layer` holds each row's layer."""
    chosen = {}
    for kind, name, sign in RULES:
        order = np.argsort(-sign * table[name], kind="stable")
        chosen[kind] = next(int(row) for row in order if row not in chosen.values())
    rows = len(layer)
    ranks = np.array([np.argsort(np.argsort(table[name], kind="stable")) for name in STATISTICS])
    distance = np.abs(ranks - (rows - 1) / 2).sum(axis=0)  # (rows,)
    third = layer * len(TYPICAL) // (layer.max() + 1)
    for part, kind in enumerate(TYPICAL):
        order = np.argsort(np.where(third == part, distance, np.inf), kind="stable")
        chosen[kind] = next(int(row) for row in order if row not in chosen.values())
    return chosen


def print_table(table, layer, head, chosen):
    kinds = {row: kind for kind, row in chosen.items()}
    print("layer head  within 16  entropy  rank 99%  column  logit  kind")
    for row in range(len(layer)):
        mass, entropy, rank, column, logit = (table[name][row] for name in STATISTICS)
        line = f"{layer[row]:5d} {head[row]:4d} {mass:10.3f} {entropy:8.2f} {rank:9d}"
        print(f"{line} {column:7.3f} {logit:6.1f}  {kinds.get(row, '')}".rstrip())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    text, out = ROOT / "scripts/data/alice.txt", ROOT / "refattn/data/heads.npz"
    parser.add_argument("--text", type=Path, default=text, help="plain text of 512 tokens or more")
    parser.add_argument("--model", type=Path, help="model folder (default: the installed one)")
    parser.add_argument("--out", type=Path, default=out, help="file to write")
    args = parser.parse_args()

    encoder = load_encoder(args.model)
    ids = encoder.tokenize(args.text.read_text(encoding="utf-8"))
    if len(ids) != TOKENS:
        raise SystemExit(f"{args.text} has {len(ids)} tokens, expected at least {TOKENS}")
    q, k, v = encoder.heads_of(ids)  # (layers, heads, n, d)
    layer, head = (a.ravel() for a in np.indices(q.shape[:2]))
    q, k, v = (a.reshape(-1, *a.shape[2:]) for a in (q, k, v))  # (layers * heads, n, d)

    rows = [head_statistics(q[row], k[row]) for row in tqdm(range(len(q)), unit="head")]
    table = {name: np.array([row[name] for row in rows]) for name in STATISTICS}
    chosen = select(table, layer)
    print_table(table, layer, head, chosen)

    keep = list(chosen.values())
    np.savez(
        args.out,
        q=q[keep],
        k=k[keep],
        v=v[keep],
        layer=layer[keep],
        head=head[keep],
        kind=np.array(list(chosen)),
        tokens=np.array(encoder.tokens(ids)),
        **{name: values[keep] for name, values in table.items()},
    )
    print(f"{args.out}: {args.out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
