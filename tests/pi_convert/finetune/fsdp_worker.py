"""One of two gloo processes: our loss under FSDP2, against the same model whole.

usage: torchrun --nproc-per-node 2 fsdp_worker.py MODEL
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from converters.sources import open_checkpoint
from pi_convert.finetune.model import load_model
from pi_convert.finetune.recipe import Recipe

# float32: the sums over two processes round in another order; 2.5e-7 was measured.
GRADIENTS_AGREE = 1e-5


def main(folder: Path) -> None:
    rope = open_checkpoint(str(folder)).rope
    recipe = Recipe("quick", 1, 64, 1, 2, 1e-5)
    whole, model = (load_model(folder, rope, recipe).eval() for _ in range(2))
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    windows = torch.randint(512, (2, 64), generator=torch.Generator().manual_seed(0))
    loss = model(input_ids=windows[dist.get_rank()][None])["loss"]
    loss.backward()
    expected = whole(input_ids=windows)["loss"]
    expected.backward()
    mean = loss.detach().clone()
    dist.all_reduce(mean, op=dist.ReduceOp.SUM)
    torch.testing.assert_close(mean / 2, expected.detach(), rtol=1e-5, atol=0)
    for (name, shard), (_, value) in zip(
        model.named_parameters(), whole.named_parameters(), strict=True
    ):
        assert isinstance(shard, DTensor), name
        assert isinstance(shard.grad, DTensor), name
        assert value.grad is not None
        difference = (shard.grad.full_tensor() - value.grad).abs().max()
        assert difference <= GRADIENTS_AGREE * value.grad.abs().max(), name
    with torch.no_grad():
        assert model(input_ids=windows[:1], per_token=True)["loss"].shape == (1, 63)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main(Path(sys.argv[1]))
    dist.barrier()
    os._exit(0)  # the mesh keeps gloo's threads, which abort while the interpreter goes down
