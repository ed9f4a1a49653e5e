"""Check the package that is installed: it has the compiled core, which computes as the reference does.

    python scripts/check_core.py

With ``LOKU_CUDA=1`` the core must have its CUDA kernel.

The sources of a checkout do not shadow what is installed, since they are not beside this file.
"""

import os

import torch

import loku_kernels
from loku_kernels import _core  # after torch, whose OpenMP runtime it then shares


def results(backend, dtype):
    os.environ["LOKU_BACKEND"] = backend
    generator = torch.Generator().manual_seed(0)
    logits = (5 * torch.randn(40, 3000, generator=generator)).to(dtype).requires_grad_()
    labels = torch.randint(0, 3000, (40,), generator=generator)
    loss = loku_kernels.ihl_loss(logits, labels)
    loss.backward()
    inputs, grad_outputs = (torch.randn(3, 20, n, generator=generator).to(dtype) for n in (50, 30))
    fisher = loku_kernels.accumulate_squared_grad_(torch.zeros(30, 50), inputs, grad_outputs)
    return loss.detach(), logits.grad, fisher


def main():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for ours, plain in zip(results("native", dtype), results("reference", dtype), strict=True):
            torch.testing.assert_close(ours, plain)
    if os.environ.get("LOKU_CUDA") == "1" and not _core.has_cuda:
        raise SystemExit(f"{_core.__file__} has no CUDA kernel")
    print(f"{_core.__file__}: {_core.instruction_set}, OpenMP {_core.has_openmp}, CUDA {_core.has_cuda}")


if __name__ == "__main__":
    main()
