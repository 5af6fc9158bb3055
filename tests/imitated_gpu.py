"""A GPU imitated on a CPU, so that a program's whole GPU path runs on a machine that has none.

    python tests/imitated_gpu.py A100 dcgan.py --epochs 2    # a script, on one of CARDS
    imitated_gpu.install("Mac")                              # or from Python, once in a process

PyTorch then says that it has this card. A tensor on it computes on the CPU, but says that it is on
cuda:0 or mps:0, and may not be mixed with tensors of the CPU. A CUDA graph records the aten calls
of its capture and replays them: Python's code does not run again, its numbers are frozen, and to
read a value during the capture is an error. Numbers are those of the CPU, to the last digit.

It cannot show speed, the numbers of real kernels, what fits into memory, or races between streams.
A module that is moved gets new Parameter objects; on a real card they stay the same objects.
"""

import contextlib
import functools
import gc
import runpy
import sys
from dataclasses import dataclass, replace

import torch
from torch.optim.optimizer import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only


@dataclass
class Card:
    """What PyTorch says of a card."""

    name: str
    kind: str = "cuda"
    capability: tuple[int, int] | None = None
    free: int = 8 * 2**30  # bytes of memory; the card has twice as many

    @property
    def device(self):
        return torch.device(self.kind, 0)

    def has(self, device):
        return device is not None and torch.device(device).type == self.kind


CARDS = {
    "A100": Card("NVIDIA A100", capability=(8, 0)),
    "T4": Card("Tesla T4", capability=(7, 5)),
    "Mac": Card("Apple M2", kind="mps"),
}
card: Card  # the one that is installed
recording: "Graph | None" = None  # the graph that is being captured
graphs: "list[Graph]" = []  # all of them, in the order of their captures

# ------------------------------------------------------------------------------------------ tensors

real_to = torch.Tensor.to


class GpuTensor(torch.Tensor):
    """A tensor on the card. Its values are in `plain`, a tensor of the CPU on the same memory.

    PyTorch's C++ takes it for a tensor of the CPU, so nothing asks for a driver.
    """

    plain: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, plain):
        tensor = torch.Tensor._make_subclass(cls, plain)
        tensor.plain = plain
        return tensor

    @classmethod
    def __torch_dispatch__(cls, call, types, arguments=(), options=None):
        return launch(call, arguments, options or {})

    device = property(lambda self: card.device)
    is_cpu = property(lambda self: False)
    is_cuda = property(lambda self: card.kind == "cuda")
    is_mps = property(lambda self: card.kind == "mps")

    def get_device(self):
        return 0

    def cpu(self):
        return self.to("cpu")

    def tolist(self):
        return self.detach().cpu().tolist()

    def numpy(self, **options):
        raise TypeError(f"can't convert {card.device} device type tensor to numpy")

    def __deepcopy__(self, memo):
        copied = self.detach().clone().requires_grad_(self.requires_grad)
        copied._is_param = getattr(self, "_is_param", False)  # what makes it a Parameter
        return memo.setdefault(id(self), copied)

    def __reduce_ex__(self, protocol):  # files hold plain tensors
        return self.plain.__reduce_ex__(protocol)


def move(tensor, *arguments, copy=False, **options):
    """torch.Tensor.to, which also moves tensors to the card and away from it."""
    if arguments and isinstance(arguments[0], torch.Tensor):  # like that one
        arguments = (arguments[0].device, arguments[0].dtype, *arguments[1:])
    device, dtype, waitless, layout = torch._C._nn._parse_to(*arguments, **options)
    here = isinstance(tensor, GpuTensor)
    if device is not None and card.has(device) != here:
        if tensor.requires_grad and torch.is_grad_enabled():
            raise NotImplementedError("gradients between devices are not imitated")
        if recording:
            recording.fail()
        assert not waitless or card.kind != "mps", "non-blocking copies to MPS can be wrong"
        with _disable_current_modes():
            copied = tensor.plain.clone() if here else tensor.detach().clone()
        tensor = copied if here else GpuTensor(copied)
    options = {"copy": copy, "memory_format": layout or torch.preserve_format}
    return real_to(tensor, dtype or tensor.dtype, **options)


class Generator(torch.Generator):
    """torch.Generator, whose numbers are the CPU's. The real one would ask for a driver."""

    def __new__(cls, device="cpu"):
        return super().__new__(cls, "cpu")


# --------------------------------------------------------------------------------------- aten calls

MIXING = ("aten._to_copy.", "aten.copy_.", "aten.index.", "aten.index_put_.")
READING = ("aten._local_scalar_dense.", "aten.nonzero.", "aten.masked_select.", "aten.equal.")


def launch(call, arguments, options):
    """Carry out an aten call as the card would: by its rules, and within a capture recorded."""
    name = str(call)
    given = [x for x in tree_leaves((arguments, options)) if isinstance(x, torch.Tensor)]
    ours = {id(tensor.plain): tensor for tensor in given if isinstance(tensor, GpuTensor)}
    others = [tensor for tensor in given if not isinstance(tensor, GpuTensor) and tensor.dim()]
    here = bool(ours) or card.has(options.get("device"))
    if here:
        check_call(name, others)
        if card.has(options.get("device")):
            options = options | {"device": torch.device("cpu")}
    plain, plain_options = tree_map_only(GpuTensor, lambda x: x.plain, (arguments, options))
    result = call(*plain, **plain_options)
    if not here:
        return result
    if card.kind == "mps":  # what it cannot do, and what it would compute wrongly
        assert not any(x.dtype == torch.float64 for x in tree_leaves(result) if torch.is_tensor(x))
        expanded = name.startswith("aten.convolution") and any(0 in x.stride() for x in given)
        assert not expanded, "MPS reads expanded tensors wrongly (PyTorch's issue 180201)"
    if recording:
        recording.calls.append((call, plain, plain_options, result))
    return tree_map_only(
        torch.Tensor, lambda x: ours[id(x)] if id(x) in ours else GpuTensor(x), result
    )


def check_call(name, others):
    """Raise what PyTorch would. `others`: a call's tensors on the CPU, without single numbers."""
    if others and not name.startswith(MIXING):
        raise RuntimeError(f"Expected all tensors on one device, not {card.device} and cpu: {name}")
    if recording and (name.startswith(READING) or others):
        recording.fail()


class EveryCall(TorchDispatchMode):
    """Leads those calls to `launch` that have no GpuTensor among their arguments."""

    def __torch_dispatch__(self, call, types, arguments=(), options=None):
        return launch(call, arguments, options or {})


# ------------------------------------------------------------------------------- streams and graphs


class Stream:
    """torch.cuda.Stream. It keeps no order, since here each call is done when it returns."""

    def __init__(self, *arguments, **options):
        pass

    def wait_stream(self, other):
        pass

    def is_capturing(self):
        return recording is not None


default_stream = current_stream = Stream()


def set_stream(stream):
    global current_stream
    current_stream = stream


@contextlib.contextmanager
def use_stream(stream):
    """torch.cuda.stream"""
    before = current_stream
    set_stream(stream)
    try:
        yield
    finally:
        set_stream(before)


class Graph:
    """torch.cuda.CUDAGraph"""

    def __init__(self):
        self.calls = []  # (call, arguments, options, result), all of plain tensors
        self.replays = 0
        self.failed = False

    def fail(self):
        """Raise what a forbidden call does within a capture, which is then lost."""
        self.failed = True
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    def replay(self):
        """Do all calls again, each with its result in the memory that it had at first."""
        self.replays += 1
        with torch.no_grad(), _disable_current_modes():
            for call, arguments, options, result in self.calls:
                again = call(*arguments, **options)
                for old, new in zip(tree_leaves(result), tree_leaves(again)):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


@contextlib.contextmanager
def capture(graph, pool=None, stream=None):
    """torch.cuda.graph. It computes nothing: what its calls have changed is put back."""
    global recording
    assert stream is not default_stream, "a capture needs a stream of its own"
    before = current_stream
    tensors = [thing for thing in gc.get_objects() if type(thing) is GpuTensor]
    values = [(tensor.plain, tensor.plain.clone()) for tensor in tensors]
    set_stream(stream)
    recording = graph
    graphs.append(graph)
    try:
        yield
    finally:
        recording = None
        with _disable_current_modes(), torch.no_grad():
            for *_, result in graph.calls:
                for made in tree_leaves(result):
                    if isinstance(made, torch.Tensor) and made.is_floating_point():
                        made.fill_(torch.nan)
            for tensor, value in values:
                tensor.copy_(value)
        if graph.failed:  # PyTorch then leaves the capture's stream in place
            raise RuntimeError("CUDA error: operation failed due to a previous error in capture")
        set_stream(before)


# ---------------------------------------------------------------------------------- to be installed


def install(name, **changes):
    """Make PyTorch say that it has the card `name` of CARDS, with `changes` of its fields."""
    global card
    card = replace(CARDS[name], **changes)

    torch.Tensor.to = move
    torch.Tensor.cuda = lambda tensor, device=None, non_blocking=False: move(tensor, "cuda")
    torch.Generator = Generator
    autocast = torch.autocast  # of the CPU, as which C++ takes the card's tensors
    torch.autocast = lambda device_type, *about, **options: autocast("cpu", *about, **options)
    group = Optimizer._group_tensors_by_device_and_dtype
    Optimizer._group_tensors_by_device_and_dtype = staticmethod(functools.partial(grouped, group))
    torch.__future__.set_overwrite_module_params_on_conversion(True)

    torch.accelerator.current_accelerator = lambda **options: torch.device(card.kind)
    torch.accelerator.current_stream = lambda device=None: current_stream
    if card.kind == "mps":
        torch.backends.mps.is_available = functools.cache(lambda: True)
    else:
        install_cuda()
    EveryCall().__enter__()


def install_cuda():
    cuda = torch.cuda
    cuda._lazy_init = lambda: None
    cuda.is_available = cuda.is_initialized = lambda: True
    cuda.device_count = lambda: 1
    cuda.current_device = lambda: 0
    cuda.set_device = lambda device: None
    cuda.get_device_capability = lambda device=None: card.capability
    cuda.get_device_name = lambda device=None: card.name
    cuda.mem_get_info = lambda device=None: (card.free, 2 * card.free)
    cuda.Stream = Stream
    cuda.current_stream = lambda device=None: current_stream
    cuda.set_stream = set_stream
    cuda.stream = use_stream
    cuda.CUDAGraph = Graph
    cuda.graph = capture
    cuda.is_current_stream_capturing = lambda: recording is not None


def grouped(group, lists, with_indices=False):
    """Optimizer._group_tensors_by_device_and_dtype: C++ takes the card's tensors for the CPU's."""
    here = any(isinstance(tensor, GpuTensor) for tensor in lists[0])
    return {
        (card.device if here else device, dtype): tensors
        for (device, dtype), tensors in group(lists, with_indices).items()
    }


if __name__ == "__main__":
    install(sys.argv[1])
    sys.argv = sys.argv[2:]
    runpy.run_path(sys.argv[0], run_name="__main__")
