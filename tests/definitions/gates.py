"""Gated attention: the gate's row times the attention's row; a row of zeros is a constant 0."""

from definitions.numbers import number_like


def is_open(gate_row):
    return any(g.real > 0 or g.real < 0 for g in gate_row)


def gated_attention(q, k, v, *, gate, attention, **options):
    """``attention`` is a definition; gate has a row of 1 or e numbers for each query."""
    y = attention(q, k, v, **options)
    result = []
    for gate_row, row in zip(gate, y):
        if is_open(gate_row):
            wide = gate_row if len(gate_row) == len(row) else gate_row * len(row)
            result.append([g * x for g, x in zip(wide, row)])
        else:
            result.append([number_like(x) for x in row])
    return result


def gated_attention_of_open_rows(q, k, v, *, gate, attention, positions, **options):
    """The same, computing open rows alone: ``attention`` takes the positions of its queries.

    The gate is plain floats while counting, so that finding the open rows costs nothing.
    """
    opened = [i for i, row in enumerate(positions) if row]
    if not opened:
        return []
    y = attention([q[i] for i in opened], k, v, positions=opened, **options)
    for i, row in zip(opened, y):
        wide = gate[i] if len(gate[i]) == len(row) else gate[i] * len(row)
        for g, x in zip(wide, row):
            g * x
    return y
