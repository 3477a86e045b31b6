"""Small calls that reach every path of the GPU kernels, checked against the reference: what compute-sanitizer watches.

`python -m bench.small_steps`; the same with TRITON_INTERPRET=1 needs no GPU. With `--unchecked` the reference, which is
made of PyTorch's kernels, stays out.
"""

import sys

import torch

from genarm_kernels import guided_log_softmax, guided_step
from genarm_kernels.testing import make_logits, random_case

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def main() -> None:
    cases = [random_case(seed, device=DEVICE) for seed in range(12)]
    base, arm = (make_logits("normal", (2, 20000), torch.bfloat16, seed, DEVICE) for seed in range(2))
    filters = ({}, {"top_k": 50}, {"top_p": 0.9}, {"top_k": 2000, "top_p": 0.99}, {"min_p": 0.01})
    cases += [{"base_logits": base, "arm_logits": [arm], "weights": 0.5, **each} for each in filters]
    if "--unchecked" in sys.argv:
        for case in cases:
            guided_step(**case, backend="triton")
        guided_log_softmax(base, [arm], 0.5, backend="triton")
        torch.cuda.synchronize()
        return
    for case in cases:
        mine, law = (guided_step(**case, backend=backend) for backend in ("triton", "reference"))
        for name in ("token", "kept", "status"):
            assert torch.equal(getattr(mine, name), getattr(law, name)), (name, mine, law)
    mine, law = (guided_log_softmax(base, [arm], 0.5, backend=backend) for backend in ("triton", "reference"))
    torch.testing.assert_close(mine, law, rtol=1e-6, atol=1e-5)
    print(f"{len(cases)} calls agree with the reference")


if __name__ == "__main__":
    main()
