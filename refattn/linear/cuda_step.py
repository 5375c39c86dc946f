"""One step of causal linear attention as a CUDA kernel: a new token meets the state before it."""

import functools

from refattn import gpu
from refattn.gpu import cuda
from refattn.linear.cuda_maps import make_feature

COLUMNS = 64  # threads of a block


@functools.cache
def make_step(kind, of, normalize):
    """S' = S + phi(k) v^T, z' = z + phi(k), y = phi(q)^T S' / phi(q)^T z'.

    Launch: one block of ``COLUMNS`` threads for each (head, tile of columns); a thread owns a
    column, and walks down it, so that S is read and written once. The first tile writes z'.
    """
    zero, feature = kind(0), make_feature(kind, of)

    @cuda.jit
    def step(q, k, v, heads, S, z, y, new_S, new_z):
        r, e = S.shape[1], S.shape[2]
        cuts = (e + COLUMNS - 1) // COLUMNS
        h = cuda.blockIdx.x // cuts
        cut = cuda.blockIdx.x - h * cuts
        thread = cuda.threadIdx.x
        c = cut * COLUMNS + thread
        a, b = heads[h, 0], heads[h, 1]
        if cut == 0:
            for f in range(thread, r, COLUMNS):
                new_z[h, f] = z[h, f] + feature(k[b, 0, f], zero, zero)
        if c < e:
            num, den, value = zero, zero, v[heads[h, 2], 0, c]
            for f in range(r):
                phi_q, phi_k = feature(q[a, 0, f], zero, zero), feature(k[b, 0, f], zero, zero)
                s = S[h, f, c] + phi_k * value
                new_S[h, f, c] = s
                num += phi_q * s
                if normalize:
                    den += phi_q * (z[h, f] + phi_k)
            if normalize:
                num = num / den if den != zero else zero
            y[h, 0, c] = num

    return step


def step(work, start, normalize):
    """y (H, 1, e), and S and z after the token."""
    H, _, _, r, e = work.shape
    shapes = (H, 1, e), (H, r, e), (H, r)
    y, *state = (gpu.empty(work.xp, work.v, shape, work.kind) for shape in shapes)
    kernel = make_step(work.kind, work.of, normalize)
    inputs = work.q, work.k, work.v, work.heads, *start
    gpu.launch(kernel, H * -(-e // COLUMNS), COLUMNS, inputs, (y, *state))
    return y, state
