"""Compares the head's Triton kernel, interpreted on the CPU, with the plain passes: for test_head.py.

Triton reads TRITON_INTERPRET when a kernel is defined, so this is a process of its own. Prints the
largest differences as JSON.
"""

import json
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import torch

from nanochat.kernels import fused_head, head


def main() -> None:
    fused_head._BLOCK = 32  # several blocks a row, the last one short
    worst = {}
    for dtype in (torch.float32, torch.bfloat16):
        for gradient in (True, False):
            generator = torch.Generator().manual_seed(0)
            logits = torch.randn((9, 75), generator=generator).mul(0.5).to(dtype)
            logits = logits[:, :70]  # rows further apart than they are long
            targets = torch.randint(70, (9,), generator=generator)
            targets[[0, 5]] = -1
            scale = torch.tensor(0.25) if gradient else None
            plain, nats = logits.contiguous().double().float(), torch.empty(9)
            head._eager_passes(plain, targets, nats, scale)
            ours, own_nats = logits.clone(), torch.full((9,), torch.nan)
            fused_head.fused_passes(ours, targets, own_nats, scale, outer=head._OUTER)
            errors = [float((own_nats - nats).abs().max())]
            reference = plain if gradient else logits
            errors.append(float((ours.float() - reference.float()).abs().max()))
            worst[f"{dtype} {gradient}"] = errors
    json.dump(worst, sys.stdout)


if __name__ == "__main__":
    main()
