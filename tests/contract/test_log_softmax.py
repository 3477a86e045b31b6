# ruff: noqa: C408 - dict(top_k=5) reads as the call that it stands for
"""`guided_log_softmax`: the whole distribution and its gradient."""

import pytest
import torch
import torch._dynamo.testing

from genarm_kernels import (
    available_backends,
    guided_log_softmax,
    guided_step,
)
from genarm_kernels.testing import make_logits
from rules import DTYPES, INF, bitmask, check_whole, oracle


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [1, 7, 1000, 32000])
def test_whole_distribution(backend: str, vocab: int, dtype: torch.dtype) -> None:
    """Values, with numbers and with one a row, and agreement with `guided_step` on the tokens it draws."""
    base, arm = make_logits("peaked", (3, vocab), dtype), make_logits("normal", (3, vocab), dtype, seed=1)
    for case in (
        dict(weights=[0.5], temperature=0.7),
        dict(weights=torch.tensor([[0.5], [0.0], [-1.0]]), base_weight=torch.tensor([1.0, 2.0, 0.0]),
             temperature=torch.tensor([0.5, 1.0, 2.0])),
    ):  # fmt: skip
        whole = guided_log_softmax(base, [arm], **case, backend=backend)
        check_whole(whole, oracle(base, [arm], **case))
        step = guided_step(base, [arm], **case, backend=backend)
        torch.testing.assert_close(whole.gather(1, step.token[:, None])[:, 0], step.logprob, rtol=1e-6, atol=4e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients(dtype: torch.dtype) -> None:
    """Against autograd of the formula in float64: masks, -inf, padding, parameters per row, weights of any sign."""
    vocab, mask = 37, torch.arange(37) % 5 != 0
    base, arm = make_logits("normal", (3, 40), dtype), make_logits("normal", (3, 38), dtype, seed=1)
    base[0, 3] = arm[1, 4] = -INF
    grad = torch.randn(3, 40, generator=torch.Generator().manual_seed(1))
    parameters = dict(
        weights=torch.tensor([[0.5], [-1.0], [0.0]]),
        base_weight=torch.tensor([1.0, 0.5, 2.0]),
        temperature=torch.tensor([0.5, 1.0, 2.0]),
    )
    words = bitmask([[v for v in range(37) if mask[v]]] * 3, 2)
    for case in (parameters, dict(weights=[-0.5], base_weight=1.5, temperature=0.7)):
        mine = [x.clone().requires_grad_() for x in (base, arm)]
        logp = guided_log_softmax(*mine[:1], mine[1:], **case, token_mask=words, vocab_size=vocab)
        logp.backward(grad)

        exact = [x.double().requires_grad_() for x in (base, arm)]
        w, w0, t = (torch.as_tensor(case[name]).double() for name in parameters)
        w, w0, t = w.expand(3, 1), w0.expand(3)[:, None], t.expand(3)[:, None]
        terms = [torch.where(c != 0, c * x[:, :vocab], 0.0) for c, x in zip((w0, w), exact, strict=True)]
        allowed = mask & ~torch.stack([term.isinf() for term in terms]).any(0)
        z = torch.where(allowed, sum(torch.where(allowed, term, 0.0) for term in terms) / t, -INF)
        truth = z.log_softmax(1)
        truth.backward(torch.where(allowed, grad[:, :vocab].double(), 0.0))
        torch.testing.assert_close(logp[:, :vocab].double(), truth, rtol=1e-5, atol=1e-5)
        for x, y in zip(mine, exact, strict=True):
            assert x.grad.dtype == dtype
            expected = torch.where(torch.nn.functional.pad(allowed, (0, x.shape[1] - vocab)), y.grad, 0.0)
            torch.testing.assert_close(x.grad.double(), expected, rtol=max(1e-5, 3 * torch.finfo(dtype).eps), atol=1e-5)


def test_gradient_of_one_operand_and_of_rows_without_tokens() -> None:
    arm = torch.zeros(2, 4, requires_grad=True)
    guided_log_softmax(torch.tensor([[0.0] * 4, [-INF] * 4]), [arm], 0.5)[:, 0].nan_to_num(neginf=0.0).sum().backward()
    assert arm.grad.tolist() == [[0.375, -0.125, -0.125, -0.125], [0.0] * 4]


@pytest.mark.parametrize("backend", [name for name in ("cpu", "triton", "cuda") if name in available_backends()])
def test_backends_without_a_gradient_say_so(backend: str) -> None:
    x = torch.zeros(2, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match="has no gradient"):
        guided_log_softmax(x, backend=backend)
