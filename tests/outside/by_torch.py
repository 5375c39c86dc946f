"""What the suites of torch packages share."""

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (extra: outside)")


class Given(torch.nn.Module):
    """In the place of a projection: what it should have given."""

    def __init__(self, x):
        super().__init__()
        self.x = x

    def forward(self, _):
        return self.x


def leaves(dtype, *arrays):
    return [torch.from_numpy(x).to(dtype).requires_grad_() for x in arrays]


def with_gradients(y, dy, **inputs):
    grads = torch.autograd.grad(y, list(inputs.values()), torch.from_numpy(dy).to(y.dtype))
    return {"y": y, **dict(zip((f"d{name}" for name in inputs), grads, strict=True))}
