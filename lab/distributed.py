"""One run in several processes, under torchrun: the run in one, shared.

Every process takes its part of each step's batch; losses, norms and dropout are those of the whole.
"""

import io
import os
import sys
import typing
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from lab.devices import pick_device


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def own_device(name: str) -> torch.device:
    """The device of this process, see `pick_device`: each has a GPU of its own under torchrun."""
    if dist.is_torchelastic_launched() and name in ("auto", "cuda") and torch.cuda.is_available():
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    return pick_device(name)


def join_group(name: str) -> None:
    """Under torchrun, join the other processes; the first alone speaks from now on, and writes.

    name is that of the device, as in `own_device`. A script calls it once, before `engine.Run`.
    """
    device = own_device(name)  # alone too: a wrong one shows before the data are read
    if not dist.is_torchelastic_launched() or dist.is_initialized():
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")


def leave_group() -> None:
    """After training: the first process goes on alone, the others end here."""
    if dist.is_initialized():
        done = rank() > 0
        dist.destroy_process_group()
        if done:
            sys.exit(0)


def from_first(state: typing.Any) -> typing.Any:
    """The first process's state in every process, sent as a checkpoint is: it can run no code.

    Alone, the state itself.
    """
    if not dist.is_initialized():
        return state
    buffer = io.BytesIO()
    torch.save(state, buffer)
    size = torch.tensor(buffer.tell())
    dist.broadcast(size, 0)
    content = torch.empty(int(size), dtype=torch.uint8)
    if rank() == 0:
        content = torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)
    dist.broadcast(content, 0)
    return torch.load(io.BytesIO(content.numpy().tobytes()), weights_only=True)


def any_signal(stops: list[int]) -> int:
    """The signal that any process of the group was sent so far, else 0: all leave at one step."""
    own = stops[0] if stops else 0
    if not dist.is_initialized():
        return own
    number = torch.tensor(own)
    dist.all_reduce(number, dist.ReduceOp.MAX)  # among the CPUs: no step waits for the device
    return int(number)


def share(batch: Tensor) -> Tensor:
    """This process's part of a batch that all hold."""
    return batch.chunk(ranks())[rank()]


class SyncedBatchNorm(nn.BatchNorm2d):
    """BatchNorm over the batch of all processes.

    nn.SyncBatchNorm does not run on a CPU, and on a GPU each of its layers waits for the device.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        values = x.float()
        mean = AllMean.apply(values.mean((0, 2, 3)))
        centred = values - mean.view(-1, 1, 1)
        var = AllMean.apply(centred.square().mean((0, 2, 3)))
        count = ranks() * x.numel() / x.shape[1]
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * (count / (count - 1)), self.momentum)
        scale = self.weight * torch.rsqrt(var + self.eps)
        return (centred * scale.view(-1, 1, 1) + self.bias.view(-1, 1, 1)).to(x.dtype)


class AllMean(torch.autograd.Function):
    """The mean of a tensor over all processes; so is its gradient: each is part of every mean."""

    @staticmethod
    def forward(ctx: typing.Any, value: Tensor) -> Tensor:
        value = value.clone()
        dist.all_reduce(value)
        return value / ranks()

    backward = staticmethod(lambda ctx, gradient: AllMean.forward(ctx, gradient))


class SharedDropout(nn.Dropout):
    """Dropout that draws for the whole batch: it drops in a part what one process would drop."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        return x * share(F.dropout(torch.cat([torch.ones_like(x)] * ranks()), self.p))


class Replica(nn.Module):
    """A model whose step is shared: a part's forward pass here, and the logits of the whole batch.

    Every process computes the loss of the whole batch, so a loss that divides by something of the
    batch (class weights, Dice) is what it is in one process. A process differentiates its own part;
    DistributedDataParallel averages the parts' gradients, which `ranks()` turns into their sum.
    """

    def __init__(self, model: nn.Module, step_forward: Callable):
        super().__init__()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.__class__ = SharedDropout
            elif isinstance(module, nn.BatchNorm2d):
                module.__class__ = SyncedBatchNorm
        self.model = model
        self.step_forward = step_forward

    def forward(self, images: Tensor, dtype: torch.dtype) -> Tensor:
        logits = self.step_forward(self.model, images, dtype)
        logits.register_hook(lambda gradient: gradient * ranks())
        everyone = [torch.empty_like(logits, memory_format=torch.contiguous_format)
                    for _ in range(ranks())]
        dist.all_gather(everyone, logits.detach().contiguous())
        everyone[rank()] = logits
        return torch.cat(everyone)
