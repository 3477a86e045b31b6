"""What a call may take at most, by the clock: `pytest bench/test_calls.py`, a part of `make bench`."""

import time

import pytest
import torch

from genarm_kernels import available_backends, guided_step
from genarm_kernels.testing import make_logits


def test_a_launch_keeps_python_busy_only_briefly(tmp_path):
    """The Triton backend's part of a call on the host, with a driver that does nothing; microseconds."""
    pytest.importorskip("triton")
    from test_triton import with_fake_driver

    call_us = with_fake_driver(tmp_path, "--time")["call_us"]
    assert call_us["numbers"] < 80 and call_us["tensors"] < 100, call_us


@pytest.mark.skipif("cpu" not in available_backends(), reason="no CPU core")
@pytest.mark.parametrize("what", ["low temperature", "-inf at every seventh token", "a mask", "an ARM of weight 0"])
def test_no_row_is_slow(what):
    """Exponents that underflow cost the processor a hundredfold where nothing keeps them out; other rows stay near."""
    torch.set_num_threads(1)
    base, arm = (make_logits("peaked", (1, 128_256), torch.bfloat16, seed) for seed in (1, 2))
    other = base.clone()
    other[:, ::7] = -torch.inf
    changes = {
        "low temperature": {"temperature": 0.02},
        "-inf at every seventh token": {"base_logits": other},
        "a mask": {"token_mask": torch.full((1, 4008), -1, dtype=torch.int32)},
        "an ARM of weight 0": {"weights": 0.0},
    }

    def seconds(**change):
        case = {"base_logits": base, "arm_logits": [arm], "top_p": 0.9, "backend": "cpu"} | change
        times = []
        for _ in range(15):
            start = time.perf_counter()
            guided_step(**case)
            times.append(time.perf_counter() - start)
        return min(times)

    usual, unusual = seconds(), seconds(**changes[what])
    assert unusual < 6 * usual, f"{1e6 * unusual:.0f} against {1e6 * usual:.0f} microseconds"
