"""A CPU that poses as one GPU: real numbers under CUDA's rules, for machines that have none.

    with posing.posing() as gpu:
        train_seg.main(["--device", "cuda", ...])
    gpu.operations, gpu.waits

Every tensor stays on the CPU; those that the program put on "cuda" are known by their storage.
They say that they lie on cuda:0. An operation that mixes them with others raises what CUDA raises,
what CUDA refuses under torch.use_deterministic_algorithms is refused, and what waits for the
device while an epoch runs is counted, by line.

It cannot see cuDNN, cuBLAS, NCCL, memory, torch.compile, nor which operations autocast lowers on
CUDA. FakeTensorMode will not do instead: its backward asks for a driver.
"""

import collections
import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from unittest import mock

import torch
import torch.cuda.amp.common
from torch import Tensor
from torch._decomp.decompositions import _replication_pad
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lab import batches, engine, provenance

NAME = "a CPU that poses as a GPU"
MEMORY = 80 << 30  # bytes that it says are free
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
PROJECT = (str(provenance.SOURCE), str(provenance.SOURCE / "lab"))
aten = torch.ops.aten
MAY_MIX = {aten.copy_.default, aten._to_copy.default, aten.set_.source_Tensor,
           aten.set_.source_Storage_storage_offset}
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default,
            aten._index_put_impl_.default}
# what must know a value, or how many there are, before it can return
WAITING = {f"aten::{name}" for name in (
    "_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_consecutive",
    "unique_dim", "bincount", "repeat_interleave", "equal")}
# the documentation of torch.use_deterministic_algorithms: what raises on CUDA
REFUSED = {f"aten::{name}" for name in """
    adaptive_avg_pool2d_backward _adaptive_avg_pool2d_backward adaptive_max_pool2d_backward
    avg_pool3d_backward max_pool3d_with_indices_backward fractional_max_pool2d_backward
    upsample_bilinear2d_backward upsample_bicubic2d_backward upsample_linear1d_backward
    upsample_trilinear3d_backward reflection_pad1d_backward reflection_pad2d_backward
    replication_pad1d_backward replication_pad2d_backward replication_pad3d_backward
    nll_loss2d_forward nll_loss2d_backward _ctc_loss_backward put_ histc median
    grid_sampler_2d_backward kthvalue max_unpool2d""".split()}
MIXED = ("Expected all tensors to be on the same device, but found at least two devices, cuda:0 "
         "and cpu!")
DEVICE, IS_CUDA, IS_CPU = (
    attribute.__get__ for attribute in (Tensor.device, Tensor.is_cuda, Tensor.is_cpu))
# an epoch may wait here: once, or once a second, but in no step
ONCE_AN_EPOCH = {"checked", "save", "begin_epoch"}


def tensors_in(tree: object) -> list[Tensor]:
    """Those of arguments or results, at any depth; torch's own pytree takes four times as long."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = tuple(tree.values())
    return [tensor for part in tree for tensor in tensors_in(part)] if (
        isinstance(tree, (list, tuple))) else []


class Gpu:
    """What lies on the device, how often each operation ran there, and what waited for it.

    `waits` counts, by (what, file:line), those within `engine.fit_epoch` alone.
    """

    def __init__(self) -> None:
        self.storages: dict[int, StorageWeakRef] = {}
        self.operations: collections.Counter[str] = collections.Counter()
        self.waits: collections.Counter[tuple[str, str]] = collections.Counter()
        self.factories = [False]  # whether the call under way makes its new tensors on the device
        self.silent = False
        self.pinned: list[Tensor] = []  # the last few, as the ids of others may come back
        self.ahead = 0  # copies that nothing waited for

    def holds(self, tensor: Tensor) -> bool:
        try:
            storage = self.storages.get(tensor.untyped_storage()._cdata)
        except (NotImplementedError, RuntimeError):  # it has none
            return False
        return storage is not None and not storage.expired()

    def take(self, tensor: Tensor) -> Tensor:
        if len(self.storages) > 20_000:
            self.storages = {key: s for key, s in self.storages.items() if not s.expired()}
        storage = tensor.untyped_storage()
        self.storages[storage._cdata] = StorageWeakRef(storage)
        return tensor

    @contextlib.contextmanager
    def making(self, here: bool) -> Iterator[None]:
        self.factories.append(here)
        try:
            yield
        finally:
            self.factories.pop()

    def move(self, tensor: Tensor, device: torch.device, nowait: bool = False,
             **changes: object) -> Tensor:
        """What `tensor.to(device, **changes)` gives: itself where nothing changes, else a copy.

        With `nowait` (non_blocking) nothing waits for a copy out of pinned memory.
        """
        there = device.type == "cuda"
        out = tensor.to(**changes) if changes else tensor
        if self.holds(tensor) == there:
            return out
        if there and nowait and any(tensor is one for one in self.pinned):
            self.ahead += 1
        else:
            self.wait(f"copy {'to' if there else 'from'} the device")
        with self.making(False):
            out = out.clone(memory_format=torch.preserve_format)
        self.storages.pop(out.untyped_storage()._cdata, None)
        return self.take(out) if there else out

    def wait(self, what: str) -> None:
        frame, lines, functions = sys._getframe(1), [], set()
        while frame is not None:  # the project's own lines, not those of the tests
            folder, name = os.path.split(frame.f_code.co_filename)
            if folder in PROJECT:
                lines.append(f"{name}:{frame.f_lineno}")
                functions.add(frame.f_code.co_name)
            frame = frame.f_back
        if "fit_epoch" in functions and not functions & ONCE_AN_EPOCH and not self.silent:
            self.waits[what, lines[0]] += 1

    def steps_wait(self) -> list[str]:
        """Each wait that comes in every step: "what in file:line"."""
        steps = self.operations["aten::_fused_adam_"]
        return [f"{what} in {line}" for (what, line), times in self.waits.items()
                if times >= steps]


class Operations(TorchDispatchMode):
    """CUDA's rules for each operation, also of the backward pass, and where its results lie."""

    def __init__(self, gpu: Gpu) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func: Callable, types: object, args: tuple = (),
                           kwargs: dict | None = None) -> object:
        gpu, kwargs = self.gpu, kwargs or {}
        tensors = [tensor for tensor in tensors_in((args, kwargs)) if tensor.device.type == "cpu"]
        there = [tensor for tensor in tensors if gpu.holds(tensor)]
        if there:
            self.check(func, args, there, [t for t in tensors if not gpu.holds(t)])
        out = func(*args, **kwargs)
        if func is not aten.copy_.default and (there or not tensors and gpu.factories[-1]):
            for tensor in tensors_in(out):
                if tensor.device.type == "cpu":
                    gpu.take(tensor)
        return out

    def check(self, func: Callable, args: tuple, there: list[Tensor], here: list[Tensor]) -> None:
        gpu, name = self.gpu, func._schema.name
        gpu.operations[name] += 1
        if func in INDEXING:
            self.check_index(name, *args[:3])
        elif func is aten.copy_.default and here:
            gpu.wait("copy between host and device")
        elif func not in MAY_MIX:
            joins = name in ("aten::cat", "aten::stack")
            written = {id(tensor) for tensor in self.written(func, args)} if here else set()
            # a single number may lie on the host, where it is read
            mixed = [tuple(tensor.shape) for tensor in here
                     if tensor.dim() or joins or id(tensor) in written]
            if mixed:
                raise RuntimeError(f"{MIXED} [{name} {mixed}]")
        if name in WAITING:
            gpu.wait(name)
        if torch.are_deterministic_algorithms_enabled():
            weighted = name == "aten::bincount" and len(args) > 1 and args[1] is not None
            if name in REFUSED or weighted:
                raise RuntimeError(f"{name} does not have a deterministic implementation, but you "
                                   f"set 'torch.use_deterministic_algorithms(True)'")

    @staticmethod
    def written(func: Callable, args: tuple) -> list[Tensor]:
        """The arguments that the operation changes in place."""
        return tensors_in([value for value, argument in zip(args, func._schema.arguments)
                           if argument.alias_info is not None and argument.alias_info.is_write])

    def check_index(self, name: str, tensor: Tensor, indices: list[Tensor | None],
                    values: Tensor | None = None) -> None:
        gpu = self.gpu
        if not gpu.holds(tensor):
            raise RuntimeError(f"indices should be either on cpu or on the same device as the "
                               f"indexed tensor (cpu) [{name}]")
        if values is not None and not gpu.holds(values) and values.dim():
            raise RuntimeError(f"{MIXED} [{name} {tuple(values.shape)}]")
        for index in (index for index in indices if index is not None):
            if not gpu.holds(index):
                gpu.wait("an index on the host")
            if index.dtype in (torch.bool, torch.uint8):
                gpu.wait("an index by truth values")


class Calls(TorchFunctionMode):
    """What a tensor says of its device, how it moves, and where new ones are made."""

    def __init__(self, gpu: Gpu) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, func: Callable, types: object, args: tuple = (),
                           kwargs: dict | None = None) -> object:
        gpu, kwargs = self.gpu, dict(kwargs or {})
        first = args[0] if args and isinstance(args[0], Tensor) else None
        there = first is not None and gpu.holds(first)
        name = getattr(func, "__name__", "")
        if name == "__get__":  # of an attribute
            if func in (IS_CUDA, IS_CPU):
                return there == (func == IS_CUDA) and first.device.type == "cpu"
            return GPU if there and func == DEVICE else func(*args)
        if there and name in ("numpy", "__array__"):
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() "
                            "to copy the tensor to host memory first.")
        if there and name == "tolist":
            gpu.wait("tolist")
        if first is not None and name in ("cpu", "cuda"):
            return gpu.move(first, CPU if name == "cpu" else GPU)
        if name == "pin_memory":
            gpu.pinned = [*gpu.pinned[-7:], first.clone()]
            return gpu.pinned[-1]
        if name == "__deepcopy__":
            copied = func(*args, **kwargs)
            return gpu.take(copied) if there else copied
        if func is Tensor.to:
            return self.to(first, *args[1:], **kwargs)
        if (there and func is torch.nn.functional.pad and "replicate" in (*args, *kwargs.values())
                and torch.are_deterministic_algorithms_enabled()):
            with self:  # the way it takes where is_cuda holds, which it asks with this mode off
                return _replication_pad(first, args[1])
        device = kwargs.get("device")
        on_gpu = device is not None and torch.device(device).type == "cuda"
        if on_gpu:
            kwargs["device"] = CPU
            if func in (torch.tensor, torch.as_tensor):
                gpu.wait("copy to the device")
        mine = [tensor for tensor in tensors_in((args, kwargs)) if tensor.device.type == "cpu"]
        gpu.silent = func is torch.nn.functional.one_hot  # it looks at values on a CPU alone
        with gpu.making(on_gpu or device is None and any(gpu.holds(tensor) for tensor in mine)):
            out = func(*args, **kwargs)
        gpu.silent = False
        for tensor in tensors_in(out) if on_gpu else ():
            gpu.take(tensor)
        return out

    def to(self, tensor: Tensor, *args: object, **kwargs: object) -> Tensor:
        copy = kwargs.pop("copy", False)
        device, dtype, nowait, layout = torch._C._nn._parse_to(*args, **kwargs)
        changes = {"dtype": dtype} if dtype is not None else {}
        changes |= {"memory_format": layout} if layout is not None else {}
        if device is None:
            return tensor.to(**changes)
        if "meta" in (device.type, tensor.device.type):
            if device.type == "cuda":
                raise NotImplementedError("Cannot copy out of meta tensor; no data!")
            return tensor.to(device, **changes)
        out = self.gpu.move(tensor, device, nowait, **changes)
        return out.clone() if copy and out is tensor else out


class Stream:
    """Of a stream and of an event, what does nothing where all happens at once."""

    def wait_event(self, event: object) -> None:
        pass

    def record(self, stream: object) -> None:
        pass


def driver(gpu: Gpu) -> list[contextlib.AbstractContextManager]:
    """What stands in for torch's own calls of a driver that is not there."""
    real_autocast = torch.autocast

    class autocast(real_autocast):
        def __init__(self, device_type: str, *args: object, **kwargs: object) -> None:
            super().__init__("cpu" if device_type == "cuda" else device_type, *args, **kwargs)

    optimizer = torch.optim.Optimizer
    group = optimizer._group_tensors_by_device_and_dtype

    def grouped(lists: list, with_indices: bool = False) -> dict:
        where = lambda device, tensors: GPU if any(gpu.holds(t) for t in tensors[0][0]) else device
        return {(where(device, found), dtype): found
                for (device, dtype), found in group(lists, with_indices).items()}

    def buckets(function: Callable) -> Callable:  # of gradients, which C++ makes beside them
        def call(*args: object, **kwargs: object) -> object:
            with gpu.making(True):
                return function(*args, **kwargs)
        return call

    answers = {"is_available": True, "device_count": 1, "current_device": 0, "set_device": None,
               "get_device_name": NAME, "get_device_capability": (9, 0),
               "manual_seed_all": None, "is_current_stream_capturing": False,
               "mem_get_info": (MEMORY, MEMORY), "Stream": Stream(), "Event": Stream(),
               "stream": contextlib.nullcontext(), "current_stream": Stream()}
    patches = [mock.patch.object(torch.cuda, name, lambda *args, answer=answer, **more: answer)
               for name, answer in answers.items()]
    patches += [
        mock.patch("torch.autocast", autocast),
        mock.patch.object(Tensor, "record_stream", lambda tensor, stream: None),
        mock.patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False),
        mock.patch.object(optimizer, "_group_tensors_by_device_and_dtype", staticmethod(grouped))]
    patches += [mock.patch.object(DistributedDataParallel, name, buckets(
        getattr(DistributedDataParallel, name))) for name in ("_ddp_init_helper", "_pre_forward")]
    if hasattr(optimizer, "_accelerator_graph_capture_health_check"):  # it asks for a stream
        patches.append(mock.patch.object(optimizer, "_accelerator_graph_capture_health_check",
                                         lambda self: None))
    return patches


@contextlib.contextmanager
def posing() -> Iterator[Gpu]:
    """Inside the block torch has one GPU."""
    gpu = Gpu()
    with contextlib.ExitStack() as stack:
        for part in (*driver(gpu), Operations(gpu), Calls(gpu)):
            stack.enter_context(part)
        batches.per_channel.cache_clear()  # it holds tensors of another device of the same name
        stack.callback(batches.per_channel.cache_clear)
        yield gpu


class RealGpu:
    """In a step of which a wait is an error."""

    def steps_wait(self) -> list[str]:
        return []


@contextlib.contextmanager
def waits_refused() -> Iterator[RealGpu]:
    """Inside the block a training step that waits for the GPU raises RuntimeError."""
    def under(mode: str, function: Callable) -> Callable:
        def call(*args: object, **kwargs: object) -> object:
            before = torch.cuda.get_sync_debug_mode()
            torch.cuda.set_sync_debug_mode(mode)
            try:
                return function(*args, **kwargs)
            finally:
                torch.cuda.set_sync_debug_mode(before)
        return call

    def shuffled(*args: object, real: Callable = batches.shuffled) -> Iterator:
        steps = real(*args)
        yield under("default", next)(steps)  # the order is copied, once an epoch
        yield from steps

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(batches, "shuffled", shuffled))
        modes = [(engine, "fit_epoch", "error"), (engine, "checked", "default"),
                 (engine.Run, "save", "default"), (engine.Run, "begin_epoch", "default")]
        for owner, name, mode in modes:
            stack.enter_context(mock.patch.object(owner, name, under(mode, getattr(owner, name))))
        yield RealGpu()


def device() -> contextlib.AbstractContextManager[Gpu | RealGpu]:
    """A GPU whose rules are kept: the real one, else a CPU that poses as it."""
    return waits_refused() if torch.cuda.is_available() else posing()
