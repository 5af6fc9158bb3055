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
from torch.utils._pytree import tree_leaves, tree_map


@dataclass
class Card:
    """What PyTorch says of a card."""

    name: str
    kind: str = "cuda"
    capability: tuple[int, int] | None = None
    free: int = 8 * 2**30  # bytes of memory; the card has twice as many
    # Memory is full in each aten call whose name begins so; "to" is a move to or from the card.
    full_at: str | None = None

    @property
    def device(self):
        return torch.device(self.kind, 0)

    def has(self, device):
        """Whether `device`, an argument of PyTorch's, is this card."""
        return device is not None and torch.device(device).type == self.kind


CARDS = {
    "A100": Card("NVIDIA A100", capability=(8, 0)),
    "T4": Card("Tesla T4", capability=(7, 5)),
    "GTX 1660": Card("NVIDIA GeForce GTX 1660", capability=(7, 5)),
    "GTX 1080": Card("NVIDIA GeForce GTX 1080", capability=(6, 1)),
    "Mac": Card("Apple M2", kind="mps"),
}
card: Card  # the one that is installed
recording: "Graph | None" = None  # the graph that is being captured
graphs: "list[Graph]" = []  # all of them, in the order of their captures

# ------------------------------------------------------------------------------------------ tensors

FORBIDDEN = "operation not permitted when stream is capturing"
real_to = torch.Tensor.to
real_tensor = torch.tensor


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
        return self.detach().to("cpu").tolist()

    def numpy(self, **options):
        raise TypeError(f"can't convert {card.device} device type tensor to numpy")

    def pin_memory(self):
        raise RuntimeError("only dense CPU tensors can be pinned")

    def __deepcopy__(self, memo):
        copied = self.detach().clone().requires_grad_(self.requires_grad)
        copied._is_param = getattr(self, "_is_param", False)  # what makes it a Parameter
        return memo.setdefault(id(self), copied)

    def __repr__(self, **options):
        return f"{self.detach().cpu()!r} on {card.device}"

    def __format__(self, form):
        return format(self.detach().cpu(), form)

    def __reduce_ex__(self, protocol):  # files hold plain tensors
        return self.plain.__reduce_ex__(protocol)


def on_the_card(plain):
    """A GpuTensor on the memory of `plain`; anything but a tensor stays as it is."""
    return GpuTensor(plain) if isinstance(plain, torch.Tensor) else plain


def move(tensor, *arguments, copy=False, **options):
    """torch.Tensor.to, which also moves tensors to the card and away from it."""
    if arguments and isinstance(arguments[0], torch.Tensor):  # like that one
        arguments = (arguments[0].device, arguments[0].dtype, *arguments[1:])
    device, dtype, waitless, layout = torch._C._nn._parse_to(*arguments, **options)
    here = isinstance(tensor, GpuTensor)
    if device is not None and card.has(device) != here:
        if tensor.requires_grad and torch.is_grad_enabled():
            raise NotImplementedError("gradients between devices are not imitated")
        if recording and (here or not tensor.is_pinned()):
            recording.fail(FORBIDDEN)
        if waitless and card.kind == "mps":
            raise AssertionError("non-blocking copies to MPS can be wrong")
        with _disable_current_modes():
            copied = tensor.plain.clone() if here else tensor.detach().clone()
        run_full("to")
        tensor = copied if here else GpuTensor(copied)
    options = {"copy": copy, "memory_format": layout or torch.preserve_format}
    return real_to(tensor, dtype or tensor.dtype, **options)


def pin_memory(tensor):
    """torch.Tensor.pin_memory. On MPS it fails, as it does on PyTorch 2.11 to 2.13."""
    if card.kind == "mps":
        raise RuntimeError("Attempted to set the storage of a tensor to a storage on mps:0")
    pinned = tensor.clone()
    pinned.is_pinned = lambda: True
    return pinned


def make_tensor(data, *, device=None, **options):
    """torch.tensor. The real one would ask for a driver."""
    made = real_tensor(data, **options)
    return made if device is None else made.to(device)


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
    plain_arguments, plain_options = tree_map(
        lambda x: x.plain if isinstance(x, GpuTensor) else x, (arguments, options)
    )
    result = call(*plain_arguments, **plain_options)
    if not here:
        return result
    if card.kind == "mps":
        check_mps(name, given, tree_leaves(result))
    if recording:
        recording.calls.append((call, plain_arguments, plain_options, result))
    return tree_map(lambda x: ours[id(x)] if id(x) in ours else on_the_card(x), result)


def check_call(name, others):
    """Raise what PyTorch would. `others`: a call's tensors on the CPU, without single numbers."""
    run_full(name)
    if others and not name.startswith(MIXING):
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, "
            f"{card.device} and cpu! ({name})"
        )
    if recording and (name.startswith(READING) or others):
        recording.fail(FORBIDDEN)


def check_mps(name, given, results):
    """Raise what a Mac would, and where it would compute something else."""
    if any(isinstance(x, torch.Tensor) and x.dtype == torch.float64 for x in results):
        raise TypeError("the MPS framework doesn't support float64")
    if name.startswith("aten.convolution") and any(0 in x.stride() for x in given):
        raise AssertionError("MPS reads expanded tensors wrongly (PyTorch's issue 180201)")


def run_full(name):
    """Raise PyTorch's error for a full memory, if that is to come in this call."""
    if card.full_at and name.startswith(card.full_at):
        if card.kind == "mps":
            raise RuntimeError("MPS backend out of memory (MPS allocated: 9 GB). Tried 1 GB more.")
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")


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

    def fail(self, text):
        """Raise what a forbidden call does within a capture, which is then lost."""
        self.failed = True
        raise RuntimeError(f"CUDA error: {text}")

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
    values = [(tensor.plain, tensor.plain.clone()) for tensor in all_tensors()]
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


def all_tensors():
    return [thing for thing in gc.get_objects() if type(thing) is GpuTensor]


# ---------------------------------------------------------------------------------- to be installed


def install(name, **changes):
    """Make PyTorch say that it has the card `name` of CARDS, with `changes` of its fields."""
    global card
    card = replace(CARDS[name], **changes)

    torch.Tensor.to = move
    torch.Tensor.cuda = lambda tensor, device=None, non_blocking=False: move(tensor, "cuda")
    torch.Tensor.pin_memory = pin_memory
    torch.tensor = make_tensor
    torch.Generator = Generator
    torch.autocast = functools.partial(autocast_of_cpu, torch.autocast)
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
    cuda.synchronize = lambda device=None: recording and recording.fail(FORBIDDEN)
    cuda.Stream = Stream
    cuda.current_stream = lambda device=None: current_stream
    cuda.set_stream = set_stream
    cuda.stream = use_stream
    cuda.CUDAGraph = Graph
    cuda.graph = capture
    cuda.graph_pool_handle = lambda: (0, 1)
    cuda.is_current_stream_capturing = lambda: recording is not None


def autocast_of_cpu(real_autocast, device_type, *arguments, **options):
    """torch.autocast: C++ takes the card's tensors for the CPU's."""
    return real_autocast("cpu", *arguments, **options)


def grouped(group, lists, with_indices=False):
    """Optimizer._group_tensors_by_device_and_dtype: C++ takes the card's tensors for the CPU's."""
    here = any(isinstance(tensor, GpuTensor) for tensor in lists[0])
    return {
        (card.device if here else device, dtype): tensors
        for (device, dtype), tensors in group(lists, with_indices).items()
    }


if __name__ == "__main__":
    if len(sys.argv) < 3 or sys.argv[1] not in CARDS:
        sys.exit(f"usage: imitated_gpu.py CARD SCRIPT [arguments]; CARD is one of {list(CARDS)}")
    install(sys.argv[1])
    sys.argv = sys.argv[2:]
    runpy.run_path(sys.argv[0], run_name="__main__")
