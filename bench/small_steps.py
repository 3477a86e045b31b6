"""Small calls that reach every path of the GPU kernels, checked against the reference: what compute-sanitizer watches.

`python -m bench.small_steps`; the same with TRITON_INTERPRET=1 needs no GPU. With `--unchecked` the reference, which is
made of PyTorch's kernels, stays out.
"""

import sys

import torch

from genarm_kernels import available_backends, guided_log_softmax, guided_step
from genarm_kernels.backends import cuda
from genarm_kernels.parameters import SharedLayer, WholeLayer
from genarm_kernels.shared_linear import shared_linear
from genarm_kernels.testing import make_logits, random_case

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Blocks that share a row on the CUDA backend: as planned, two launches, the largest clusters there are.
WAYS = (-1, 0, 8, 16) if DEVICE == "cuda" and torch.cuda.get_device_capability() >= (9, 0) else (-1, 0)
OURS = [name for name in available_backends() if name in ("triton", "cuda")]


def main() -> None:
    cases = [random_case(seed, device=DEVICE) for seed in range(12)]
    base, arm = (make_logits("normal", (2, 20000), torch.bfloat16, seed, DEVICE) for seed in range(2))
    filters = ({}, {"top_k": 50}, {"top_p": 0.9}, {"top_k": 2000, "top_p": 0.99}, {"min_p": 0.01})
    cases += [{"base_logits": base, "arm_logits": [arm], "weights": 0.5, **each} for each in filters]
    for backend in OURS:
        for blocks in WAYS if backend == "cuda" else (-1,):
            if backend == "cuda":
                cuda._cuda.force_cluster(blocks)
            for case in cases:
                mine = guided_step(**case, backend=backend)
                if "--unchecked" not in sys.argv:
                    law = guided_step(**case, backend="reference")
                    for name in ("token", "kept", "status"):
                        assert torch.equal(getattr(mine, name), getattr(law, name)), (backend, name, mine, law)
            whole = guided_log_softmax(base, [arm], 0.5, backend=backend)
            if "--unchecked" not in sys.argv:
                law_whole = guided_log_softmax(base, [arm], 0.5, backend="reference")
                torch.testing.assert_close(whole, law_whole, rtol=1e-6, atol=1e-5)
    if "triton" in OURS:
        for rows, ranks, width, height in ((2, 8, 264, 70), (64, 64, 128, 40)):
            x, weight, down, up = (
                make_logits("normal", shape, torch.float16, seed, DEVICE)
                for seed, shape in enumerate([(rows, width), (height, width), (ranks, width), (ranks, height)])
            )
            owners = torch.ones(ranks, dtype=torch.int32, device=DEVICE)
            layer = SharedLayer(torch.nn.Identity(), [], 2, WholeLayer(weight, None, down, up, owners, 2))
            y = shared_linear(x[:, None], layer, "triton")[:, 0]
            if "--unchecked" not in sys.argv:
                expected = x.float() @ weight.float().t()
                expected[1::2] += (x[1::2].float() @ down.float().t()) @ up.float()
                torch.testing.assert_close(y.float(), expected, rtol=1e-2, atol=1e-2 * expected.abs().max().item())
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    print(f"{len(cases)} calls on {', '.join(OURS)}")


if __name__ == "__main__":
    main()
