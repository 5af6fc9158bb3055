"""Train a DCGAN on CelebA with one command, then draw new faces with it.

    pip install -r requirements.txt
    python dcgan.py                            # download CelebA, train, draw after each epoch
    python dcgan.py --demo                     # the same in minutes, on faces that it draws itself
    python dcgan.py generate --num-images 16   # new faces
    python dcgan.py interpolate                # a film that walks from face to face
    python dcgan.py evaluate                   # FID, KID, precision and recall
    torchrun --nproc-per-node 4 dcgan.py       # the same training on four GPUs

In a notebook: import dcgan; dcgan.EPOCHS = 2; dcgan.train(); dcgan.generate_images(num_images=16)

The method: Radford, Metz, Chintala, "Unsupervised Representation Learning with Deep Convolutional
Generative Adversarial Networks", 2015, https://arxiv.org/abs/1511.06434. In this file the settings,
the networks and the training step come first. The functions that they call follow.

Measured on two cores of an Intel Xeon (bfloat16 by AMX, PyTorch 2.14.1) at 64 pixels: 182 images a
second, 2.4 times a plain float32 DCGAN (tests/benchmark.py).
"""

import argparse
import copy
import csv
import ctypes
import hashlib
import importlib.util
import inspect
import io
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import site
import subprocess
import sys
import threading
import warnings
import zipfile
import zlib
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from time import perf_counter, sleep, time
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from filelock import FileLock, Timeout
from PIL import Image, ImageColor, ImageDraw, ImageFilter, ImageOps
from torch import nn
from torch.optim.swa_utils import update_bn
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.functional import center_crop, pil_to_tensor, to_pil_image
from torchvision.utils import make_grid
from tqdm import tqdm

# ---------------------------------------------------------------------------------------- settings
# Edit these lines, or give flags: BATCH_SIZE is --batch-size.

# Data
IMAGE_SIZE = 64  # pixels a side: 32, 64, 128 or 256; each doubling takes four times as long
BATCH_SIZE = 32  # images a step, over all processes; 64 is faster, but learns less from each
MAX_IMAGES: int | None = None  # train on the first N images; None: on all
WORKERS: int | None = None  # processes that decode the images, once; None: one a core

# Networks
LATENT_SIZE = 100  # length of the noise that a face is made from, as in the paper
G_FEATURES = 64  # channels of the generator's layer next to the image; inner ones have more
D_FEATURES = 64  # the discriminator's; fewer make it weaker

# Training
EPOCHS = 20  # passes over the images; raise it to go on with a finished run
LEARNING_RATE = 5e-4  # of both optimizers; gave better faces than 2e-4 in the same time
D_LEARNING_RATE: float | None = None  # the discriminator's own; None: the same
BETA1 = 0.0  # AdamW's momentum; the paper's 0.5 learns more slowly; with 0.9 D wins
BETA2 = 0.999  # AdamW's memory of squared gradients; PyTorch's default
WEIGHT_DECAY = 0.01  # AdamW's; PyTorch's default
REAL_LABEL = 1.0  # target for real images; 0.9 keeps the discriminator from being too sure
R1_GAMMA = 0.0128  # weight of a penalty that keeps the discriminator from winning; 0: none
AVERAGE_SHARE = 0.1  # half-life of the generator's average, as a share of the images seen
SEED = 0  # decides the first weights, the noise and the order of the images

# Reporting
LOG_EVERY = 20  # steps a row of metrics.csv, which holds their means
CHECKPOINT_MINUTES = 10.0  # minutes of work that can be lost; long epochs are saved, too

# Hardware
DEVICE: str | None = None  # cpu, mps, cuda or cuda:1; None: the best that is there
PRECISION: str | None = None  # float32, bfloat16 or float16; None: the device's fastest

# Places
CELEBA_DIR = "data/celeba"  # CelebA is downloaded to this folder
DATA_DIR = CELEBA_DIR  # any folder of images, at any depth
CACHE_DIR = "data/cache"  # decoded images: 2.3 GiB for all of CelebA at 64 pixels
OUTPUT_DIR = "output"  # all else that a run writes
KAGGLE_DATASET = "jessicali9530/celeba-dataset"  # owner/name on kaggle.com

# ---------------------------------------------------------------------------------------- networks


def layer_widths(features, image_size):
    """Channels, first those of the layer next to the image: [64, 128, 256, 512] at 64 pixels."""
    levels = int(math.log2(image_size)) - 2
    return [features * min(8, 2**level) for level in range(levels)]


class Generator(nn.Module):
    """Noise (N, latent_size, 1, 1) to images (N, 3, S, S) in [-1, 1]. Shapes: at 64 pixels."""

    def __init__(self, image_size=64, latent_size=100, features=64):
        super().__init__()
        widths = layer_widths(features, image_size)[::-1]
        layers = [nn.ConvTranspose2d(latent_size, widths[0], 4, 1, 0, bias=False)]  # (N, 512, 4, 4)
        for inner, outer in zip(widths, widths[1:]):
            layers += [nn.BatchNorm2d(inner), nn.ReLU(inplace=True)]
            # in turn (N, 256, 8, 8), (N, 128, 16, 16), (N, 64, 32, 32)
            layers += [nn.ConvTranspose2d(inner, outer, 4, 2, 1, bias=False)]
        layers += [nn.BatchNorm2d(widths[-1]), nn.ReLU(inplace=True)]
        layers += [nn.ConvTranspose2d(widths[-1], 3, 4, 2, 1), nn.Tanh()]  # (N, 3, 64, 64)
        self.layers = nn.Sequential(*layers)
        self.apply(init_weights)

    def forward(self, latents):
        return self.layers(latents)


class Discriminator(nn.Module):
    """Images (N, 3, S, S) in [-1, 1] to logits (N,), whose sigmoid is the probability of "real"."""

    def __init__(self, image_size=64, features=64):
        super().__init__()
        widths = layer_widths(features, image_size)
        layers = [nn.Conv2d(3, widths[0], 4, 2, 1)]  # (N, 64, 32, 32)
        layers += [nn.LeakyReLU(0.2, inplace=True)]
        for outer, inner in zip(widths, widths[1:]):
            # in turn (N, 128, 16, 16), (N, 256, 8, 8), (N, 512, 4, 4)
            layers += [nn.Conv2d(outer, inner, 4, 2, 1, bias=False)]
            layers += [nn.BatchNorm2d(inner), nn.LeakyReLU(0.2, inplace=True)]
        layers += [nn.Conv2d(widths[-1], 1, 4, 1, 0), nn.Flatten(0)]  # (N, 1, 1, 1), (N,)
        self.layers = nn.Sequential(*layers)
        self.apply(init_weights)

    def forward(self, images):
        return self.layers(images)


def init_weights(module):
    """Initial weights as in the paper: convolutions N(0, 0.02), gains N(1, 0.02), biases 0."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
    if getattr(module, "bias", None) is not None:
        nn.init.zeros_(module.bias)


@torch.no_grad()
def images_from(generator, latents, dtype):
    """Images (N, 3, H, W) in [0, 1] from the noise `latents` (N, z, 1, 1), on the same device."""
    latents = latents.contiguous(memory_format=memory_format(latents.device))
    with autocast(latents.device, dtype):
        images = generator(latents)
    return images.float().add(1).div(2).clamp(0, 1)


def build_generator(state):
    """The averaged generator in a checkpoint: `state` is what `read_checkpoint` returns.

    It is on the CPU. Raises ValueError if its weights do not fit the settings beside them.
    """
    settings, weights = state["settings"], state["average"]
    sizes = [settings[name] for name in ("IMAGE_SIZE", "LATENT_SIZE", "G_FEATURES")]
    with torch.device("meta"):  # takes no memory: a bad file could ask for a huge one
        generator = Generator(*sizes)
    for name, tensor in generator.state_dict().items():
        if weights[name].shape != tensor.shape:
            raise ValueError(f"its {name} does not fit its settings")
    generator.to_empty(device="cpu").load_state_dict(weights)
    return generator.eval().requires_grad_(False)


# ----------------------------------------------------------------------------------- training step

R1_INTERVAL = 32  # steps; the R1 penalty is slow, so one of them has it for all


def bce(logits, target):
    """Binary cross-entropy on logits, in float32.

    After a sigmoid, a discriminator that is sure and wrong would have no gradient at all.
    """
    logits = logits.float()
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, target))


class Trainer:
    """Both networks, their optimizers, and the generator's average, which draws the pictures."""

    def __init__(self, device, dtype):
        self.device = device
        self.dtype = dtype
        torch.manual_seed(seed_for("weights"))
        generator = Generator(IMAGE_SIZE, LATENT_SIZE, G_FEATURES)
        discriminator = Discriminator(IMAGE_SIZE, D_FEATURES)
        # Before the optimizers see them: fused AdamW is silently wrong where weights and moments
        # differ in memory format.
        layout = memory_format(device)
        self.generator = generator.to(device, memory_format=layout)
        self.discriminator = discriminator.to(device, memory_format=layout)
        self.average = copy.deepcopy(self.generator).eval().requires_grad_(False)
        self.generator_descent = Descent(self.generator, LEARNING_RATE, dtype)
        d_rate = LEARNING_RATE if D_LEARNING_RATE is None else D_LEARNING_RATE
        self.discriminator_descent = Descent(self.discriminator, d_rate, dtype)
        # What the step calls: the same networks or, with several processes, their DDP wrappers.
        self.joint_generator = join_gradients(self.generator, device)
        self.joint_discriminator = join_gradients(self.discriminator, device)
        self.graph = StepGraph(self) if device.type == "cuda" and WORLD_SIZE == 1 else None
        self.images = 0  # real images seen so far
        self.settled = -1  # `images` when the average's statistics were last worked out
        self.totals = torch.zeros(4, device=device)  # of loss_d, loss_g, D(x), D(G(z))

    def step(self, faces, flips, latents, with_penalty=False):
        """One step of the discriminator, then one of the generator, on the same fakes.

        `faces`: uint8 (N, 3, H, W); `flips`, which of them to mirror: bool (N, 1, 1, 1); `latents`,
        the noise: (N, z, 1, 1). Before you edit this: on CUDA it runs only a few times. Then it is
        recorded and replayed as a CUDA graph: Python's numbers keep the value that they had then,
        and a print prints no more. Tensors work as usual.
        """
        reals = torch.where(flips, faces.flip(3), faces)
        layout = memory_format(self.device)
        reals = reals.to(torch.float32, memory_format=layout).mul_(2 / 255).sub_(1)
        with autocast(self.device, self.dtype):
            fakes = self.joint_generator(latents)

        # Discriminator: minimise -log D(x) - log(1 - D(G(z))). Two calls, so that reals and fakes
        # are each normalised by their own statistics.
        with autocast(self.device, self.dtype):
            real_logits = self.joint_discriminator(reals)
            fake_logits = self.joint_discriminator(fakes.detach())
        loss_d = bce(real_logits, REAL_LABEL) + bce(fake_logits, 0.0)
        penalty = 0.0
        if with_penalty:
            penalty = R1_INTERVAL * R1_GAMMA / 2 * self.gradient_penalty(reals)
        self.discriminator_descent.step(loss_d + penalty)

        # Generator: minimise -log D(G(z)), judged by the stepped discriminator. Its own gradients
        # are not needed here, so it is called without its DDP wrapper.
        self.discriminator.requires_grad_(False)
        with autocast(self.device, self.dtype):
            judged = self.discriminator(fakes)
        loss_g = bce(judged, 1.0)
        self.generator_descent.step(loss_g)
        self.discriminator.requires_grad_(True)

        d_real = real_logits.float().sigmoid().mean()
        d_fake = fake_logits.float().sigmoid().mean()
        means = torch.stack([loss_d, loss_g, d_real, d_fake]).detach()
        self.totals += join_means(means)  # in each step, since only rank 0 knows when it saves

    def gradient_penalty(self, reals):
        """R1: how steep the discriminator's logit is around a real image, squared, on average.

        Where it is flat, the discriminator cannot be too sure (Mescheder, Geiger, Nowozin 2018,
        https://arxiv.org/abs/1801.04406). BatchNorm uses its running statistics here, so that each
        logit depends on its own image alone; PyTorch's SyncBatchNorm would have no second
        derivative, either.
        """
        reals = reals.detach().requires_grad_()
        self.discriminator.eval()
        with autocast(self.device, self.dtype):
            logits = self.discriminator(reals).float()
        self.discriminator.train()
        # Not of logits.sum(), whose expanded gradient is wrong on a Mac (PyTorch's issue 180201).
        ones = torch.ones_like(logits)
        (gradients,) = torch.autograd.grad(logits, reals, ones, create_graph=True)
        return gradients.square().sum((1, 2, 3)).mean()

    def advance(self, *batch):
        """`step` on a batch, by way of the CUDA graph if there is one; then move the average."""
        with_penalty = R1_GAMMA > 0 and self.images // BATCH_SIZE % R1_INTERVAL == 0
        if with_penalty:  # the only use of BatchNorm's running statistics in training
            join_statistics(self.discriminator)
        if self.graph is None:
            self.step(*batch, with_penalty)
        else:
            self.graph.step(batch, with_penalty)
        self.images += BATCH_SIZE
        self.update_average()

    @torch.no_grad()
    def update_average(self):
        """Move the average's weights towards the generator's.

        The half-life is a share of the images seen, so that no grid is a ghost of the start.
        """
        half_life = AVERAGE_SHARE * self.images
        share = 1 - 0.5 ** (BATCH_SIZE / half_life) if half_life else 1.0
        averages, weights = self.average.parameters(), self.generator.parameters()
        torch._foreach_lerp_(list(averages), list(weights), share)

    def settled_average(self):
        """The averaged generator, its BatchNorm's statistics worked out: ready to draw or save."""
        if self.settled != self.images:
            settle_statistics(self.average)
            self.settled = self.images
        return self.average

    def fetch(self, steps):
        """The means of `totals` over `steps` steps; then begin anew.

        Between two rows of metrics.csv, training waits for the device only here.
        """
        means = [total / steps for total in self.totals.tolist()]
        self.totals.zero_()
        return means


def settle_statistics(generator):
    """Recompute BatchNorm's statistics from the weights, with 16 batches of noise of a fixed seed.

    To average the statistics as well would be wrong: averaged weights give smaller activations than
    the weights that they come from, and the faces would be smooth and pale. Returns `generator`.
    """
    stream = torch.Generator().manual_seed(0)
    latent_size = generator.layers[0].in_channels
    noise = torch.randn(16, 64, latent_size, 1, 1, generator=stream)
    update_bn(noise, generator, next(generator.parameters()).device)
    return generator


class Descent:
    """AdamW on one network and, for float16 alone, the scaler that keeps its gradients from 0.

    Each network has its own scaler, since one may skip a step that the other takes.
    """

    def __init__(self, network, rate, dtype):
        device = next(network.parameters()).device
        options = {"betas": (BETA1, BETA2), "weight_decay": WEIGHT_DECAY, "fused": True}
        rate = torch.tensor(rate, device=device)  # a tensor: a CUDA graph sees it change
        self.optimizer = torch.optim.AdamW(network.parameters(), rate, **options)
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    def step(self, loss):
        """One step down the gradient of `loss`."""
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def forget_step(self):
        """Remove what an unfinished step leaves behind: gradients, and the scaler's record."""
        self.optimizer.zero_grad(set_to_none=True)
        for name in ("grad_scale", "found_inf"):  # GradScaler.step lends them to the optimizer
            vars(self.optimizer).pop(name, None)
        self.scaler.update(self.scaler.get_scale())  # keeps the scale, and clears the record


# ---------------------------------------------------------------------------------------- hardware

WORLD_SIZE = int(os.environ.get("WORLD_SIZE") or 1)  # processes that torchrun has started
RANK = int(os.environ.get("RANK") or 0)  # this one's number; 0 draws, logs and saves


def pick_device():
    """DEVICE, or the best there is, made ready. Raises UserError if this machine has none such."""
    best = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    if best.type == "mps" and WORLD_SIZE > 1:
        best = torch.device("cpu")  # processes cannot share gradients on MPS
    device = torch.device(DEVICE or best.type)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    elif device.index is not None and WORLD_SIZE > 1:
        raise UserError(f"DEVICE is {device}, for all {WORLD_SIZE} processes; set it to None")
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"DEVICE is {device}, which cannot be used here ({one_line(error)}); try --device cpu "
            "or, if each process sees one GPU, LOCAL_RANK=0"
        ) from error
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True  # all batches have one shape
    elif device.type == "cpu":
        torch.set_num_threads(min(torch.get_num_threads(), usable_cores()))
        keep_freed_memory()
    return device


def pick_dtype(device):
    """PRECISION, or the fastest that the device has units for."""
    if PRECISION is not None:
        return getattr(torch, PRECISION)
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability >= (8, 0):
            return torch.bfloat16
        if capability >= (7, 0) and "GTX 16" not in torch.cuda.get_device_name(device):
            return torch.float16
    elif device.type == "cpu":
        # Other CPUs emulate bfloat16, slowly.
        if torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported():
            return torch.bfloat16
    elif device.type == "xpu" and torch.xpu.is_bf16_supported():
        return torch.bfloat16
    return torch.float32


def keep_freed_memory():
    """Let glibc keep the memory that is freed: to fault it in anew takes a fifth of a step."""
    M_TRIM_THRESHOLD = -1  # these two numbers are glibc's, from malloc.h
    M_MMAP_THRESHOLD = -3
    with suppress(OSError, AttributeError, TypeError):  # another C library
        libc = ctypes.CDLL(None)
        if not libc.mallopt(M_MMAP_THRESHOLD, 2**30):
            libc.mallopt(M_MMAP_THRESHOLD, 2**25)  # the most that glibc before 2.35 accepts
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def usable_cores(quota_file="/sys/fs/cgroup/cpu.max"):
    """CPU cores that this process may use: in a container its quota, not all that it can see."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    with suppress(OSError, ValueError):  # there is no such file, or it says "max"
        quota, period = Path(quota_file).read_text().split()
        cores = min(cores, math.ceil(int(quota) / int(period)))
    return cores


def memory_format(device):
    """How networks and images lie in memory: the fastest way that works on this device.

    On MPS, BatchNorm's backward is wrong in channels_last (PyTorch's issue 175189), and
    convolution's is slow (193349).
    """
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


def autocast(device, dtype):
    """A context that computes in `dtype`. It caches cast weights: a new one after each update."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


class StepGraph:
    """A Trainer's step on CUDA: its 300 small kernels are launched at once, as one graph.

    Steps with and without the gradient penalty have a graph each. The first of a kind run as they
    are, on a side stream, as a capture wants it. With several processes there is no graph: it would
    have to hold what they send each other, too.
    """

    def __init__(self, trainer):
        self.trainer = trainer
        self.stream = torch.cuda.Stream()
        self.memory = torch.cuda.graph_pool_handle()  # the graphs share it: one runs at a time
        self.eager_steps = {True: 3.0, False: 3.0}  # warm-up steps left; inf: no graph is possible
        self.graphs = {}
        self.inputs = []

    def step(self, batch, with_penalty):
        if self.eager_steps[with_penalty] == 0 and with_penalty not in self.graphs:
            self.capture(batch, with_penalty)
        if with_penalty in self.graphs:
            for static, new in zip(self.inputs, batch):
                static.copy_(new)
            self.graphs[with_penalty].replay()
        else:
            self.eager_steps[with_penalty] -= 1
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                self.trainer.step(*batch, with_penalty)
            torch.cuda.current_stream().wait_stream(self.stream)

    def capture(self, batch, with_penalty):
        """Record the step on inputs of its own. If that fails, steps run as they are for ever."""
        self.inputs = self.inputs or [tensor.clone() for tensor in batch]
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.current_stream()
        self.prepare_optimizers(capturable=True)
        try:
            with torch.cuda.graph(graph, self.memory, self.stream):
                self.trainer.step(*self.inputs, with_penalty)
            self.graphs[with_penalty] = graph
        except RuntimeError as error:
            say(f"no CUDA graph here ({one_line(error)}): steps are launched kernel by kernel")
            torch.cuda.set_stream(stream)
            self.prepare_optimizers(capturable=False)
            self.trainer.discriminator.train().requires_grad_(True)
            self.graphs.clear()
            self.eager_steps = {True: math.inf, False: math.inf}
            # Before PyTorch 2.13 the allocator stays in capture mode (issue 180395), which the
            # trials of cuDNN's benchmark would not survive.
            torch.backends.cudnn.benchmark = False

    def prepare_optimizers(self, capturable):
        for descent in (self.trainer.generator_descent, self.trainer.discriminator_descent):
            descent.forget_step()
            for group in descent.optimizer.param_groups:
                group["capturable"] = capturable


def join_gradients(network, device):
    """`network`, with gradients averaged over the processes if there are several.

    On CUDA, BatchNorm then works on the whole batch; on a CPU on each process's share of it.
    """
    if WORLD_SIZE == 1:
        return network
    ids = None
    if device.type == "cuda":
        ids = [device.index]
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    with warnings.catch_warnings(action="ignore"):  # that an argument is to be renamed
        # Broadcast buffers would change the discriminator's statistics between its two calls.
        return nn.parallel.DistributedDataParallel(network, ids, broadcast_buffers=False)


def join_means(means):
    """Average `means`, which each process has computed on its share of a batch, in place."""
    if WORLD_SIZE > 1:
        dist.all_reduce(means)
        means /= WORLD_SIZE
    return means


def join_statistics(network):
    """Give all processes rank 0's BatchNorm statistics, the only ones in a checkpoint.

    If each used its own, a resumed run would differ from one that was not stopped.
    """
    if WORLD_SIZE > 1:
        for statistic in network.buffers():
            dist.broadcast(statistic, 0)


def join_processes(state, key, images, device):
    """Meet the processes that torchrun has started. Returns rank 0's checkpoint and data key.

    The time limit is long, since another machine may still decode its images. It is torchrun that
    notices when a process dies. Raises UserError if the machines have different images.
    """
    backend = "nccl" if device.type == "cuda" else "gloo"
    limit = timedelta(days=1)
    store = next(dist.rendezvous("env://", timeout=limit))[0]
    # After torchrun --max-restarts the store still has the addresses of the attempt before, so each
    # attempt uses a name of its own. Not over several machines, which may count differently.
    restart = ""
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
        restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "")
    store = dist.PrefixStore(restart, store)
    dist.init_process_group(backend, store=store, rank=RANK, world_size=WORLD_SIZE, timeout=limit)
    counts = [0] * WORLD_SIZE
    dist.all_gather_object(counts, images)
    if len(set(counts)) > 1:
        found = ", ".join(map(str, counts))
        raise UserError(f"the machines have different images: {found}; copy DATA_DIR to all")
    shared = [state, key]  # rank 0's key: times of change differ between machines
    dist.broadcast_object_list(shared, device=device)
    return shared


def should_stop(signals, device, row_due):
    """Whether a signal has come. Several processes agree on it, to stop after the same step.

    On a GPU, which would have to be waited for, they ask each other only when a row is due.
    """
    if WORLD_SIZE == 1:
        return bool(signals)
    if device.type != "cpu" and not row_due:
        return False
    received = torch.tensor(signals[0] if signals else 0, device=device)
    dist.all_reduce(received, dist.ReduceOp.MAX)
    if received:
        signals[:] = [received.item()]
    # What has come meanwhile stays in the list, for the next call: here all have to agree.
    return bool(received)


# -------------------------------------------------------------------------------------------- data


def prepare_data(image_size):
    """`load_faces`; before that, download CelebA or draw the demo's faces if DATA_DIR wants it."""
    folder = Path(DATA_DIR)
    if folder.absolute() == Path(CELEBA_DIR).absolute():
        download_celeba()
    elif folder == Path(DEMO["DATA_DIR"]):
        fill(folder, draw_demo)
    return load_faces(image_size)


def list_images(folder):
    """Yield (path, size, time of change) of each image below `folder`, with paths relative to it.

    What is hidden, and __MACOSX, is left out. Links are followed, but no folder is listed twice.
    """
    seen = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        real_place = os.path.realpath(place)
        if real_place in seen:
            folders.clear()
            continue
        seen.add(real_place)
        folders[:] = [name for name in folders if name[0] != "." and name != "__MACOSX"]
        inner = Path(place).relative_to(folder)
        for name in files:
            if name[0] != "." and name.lower().endswith(IMG_EXTENSIONS):
                path = os.path.join(place, name)
                # A link to nowhere counts as an image, to be named when it is read.
                status = os.stat(path, follow_symlinks=os.path.exists(path))
                yield str(inner / name), status.st_size, status.st_mtime_ns


def has_images(folder):
    return next(list_images(folder), None) is not None


def read_face(path, size):
    """The image at `path` as uint8 (3, size, size): its largest centre square, antialiased.

    Raises what Pillow does for a damaged file, or for a small one that claims a huge size.
    """
    with warnings.catch_warnings(action="ignore"):
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path) as image:
            image.draft(None, (size, size))  # libjpeg may decode at 1/2, 1/4 or 1/8, not smaller
            ImageOps.exif_transpose(image, in_place=True)
            if image.mode.startswith("I"):  # 16 bits a pixel, which convert() would clip
                image = image.convert("I").point(lambda value: value / 256, "F")
            image = image.convert("RGB")
    square = center_crop(image, min(image.size))
    return pil_to_tensor(square.resize((size, size), Image.Resampling.BILINEAR))


class FaceFolder(ImageFolder):
    """torchvision's ImageFolder that needs no class folders: of `names` below `root`.

    Items are the bytes of a face or, for a file that cannot be read, a str that says why.
    """

    def __init__(self, root, names, image_size):
        self.names = names
        self.image_size = image_size
        super().__init__(root)

    def find_classes(self, directory):
        return ["face"], {"face": 0}

    def make_dataset(self, directory, *args, **options):
        return [(os.path.join(directory, name), 0) for name in self.names]

    def __getitem__(self, index):
        path, _ = self.samples[index]
        if not os.path.isfile(path):  # a pipe would be waited for without end
            return "no regular file"
        try:
            return read_face(path, self.image_size).numpy().tobytes()
        except Exception as error:  # Pillow raises almost anything for a broken file
            return f"{type(error).__name__}: {error}"


def load_faces(image_size):
    """(faces, key): DATA_DIR's images as uint8 (N, 3, image_size, image_size), and their key.

    They are mapped from a file in CACHE_DIR, into which the first call decodes them. The key stands
    for the files and what was done to them. Raises UserError if there are no images, or too many
    that cannot be read.
    """
    folder = Path(DATA_DIR)
    with disk_errors(folder):
        if not folder.is_dir():
            raise UserError(f"DATA_DIR ({folder}) is no folder; give one that holds images")
        images = sorted(list_images(folder))[:MAX_IMAGES]
    if not images:
        raise UserError(f"DATA_DIR ({folder}) holds no images; put some there, or change DATA_DIR")
    key = data_key(images, image_size)
    path = cache_path(folder, key, image_size)
    faces = build_once(
        lambda: open_cache(path, image_size),
        lambda: decode(folder, [name for name, *_ in images], image_size, path),
        path.with_suffix(".lock"),
        "another process is decoding these images; waiting for it",
    )
    return faces, key


def data_key(images, image_size):
    """A hash of these (path, size, time of change) and of how the images are cut and scaled."""
    text = f"{images} centre square, bilinear, {image_size}"
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def cache_path(folder, key, image_size):
    """The cache file. Another folder, other images or another size give another file."""
    place = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()
    return Path(CACHE_DIR) / f"faces-{place[:8]}-{key[:16]}-{image_size}.npy"


def open_cache(path, image_size):
    """Map the faces of a cache file. None if there is none, or if it is not whole."""
    if not path.exists():
        return None
    with warnings.catch_warnings(action="ignore"):  # that nobody may write to the tensor
        try:
            with disk_errors(path):
                faces = np.lib.format.open_memmap(path, mode="r")
            if faces.dtype != np.uint8 or faces.shape[1:] != (3, image_size, image_size):
                raise ValueError("it is of something else")
            return torch.from_numpy(faces)
        except SystemFailure:
            raise
        except Exception:  # what a damaged header leads to
            say(f"{path} is damaged; decoding the images again")
            return None


def decode(folder, names, image_size, path):
    """Decode images into a new cache file. Names, skips and counts those that cannot be read."""
    need_space(path.parent, len(names) * 3 * image_size**2, "decoding the images")
    bar = progress_bar(total=len(names), desc="decoding", unit=" images")
    skipped = 0
    with bar, replacing(path) as file:
        write_cache_header(file, len(names), image_size)
        for name, face in zip(names, decoded_faces(folder, names, image_size)):
            bar.update()
            if isinstance(face, bytes):
                file.write(face)
                continue
            skipped += 1
            if skipped <= 100:
                say(f"skipped {os.path.join(folder, name)!r}: {face!r}")
            if skipped * 10 > len(names):
                raise UserError(
                    f"more than one in ten of the {len(names):,} images in {folder} cannot be "
                    f"read, the last {name!r}; mend or remove them"
                )
        write_cache_header(file, len(names) - skipped, image_size)
    if skipped:
        say(f"skipped {skipped} of {len(names):,} images")


def write_cache_header(file, images, image_size):
    """Begin a file in NumPy's format, .npy. The header's length does not depend on `images`."""
    shape = (images, 3, image_size, image_size)
    file.seek(0)
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)


def decoded_faces(folder, names, image_size):
    """Yield the items of a FaceFolder, in order, read by WORKERS processes."""
    workers = usable_cores() if WORKERS is None else WORKERS
    # With None allowed, asking does not fix the method, which a notebook may still want to set.
    method = multiprocessing.get_start_method(allow_none=True)
    method = method or multiprocessing.get_all_start_methods()[0]  # the first is the default
    if method != "fork":  # each worker imports torch anew
        workers = min(workers, 8)
    workers = min(workers, math.ceil(len(names) / 64))
    faces = FaceFolder(folder, names, image_size)
    # Workers send bytes through pipes: tensors would go through shared memory, 64 MB in Docker.
    context = method if workers else None
    options = {"num_workers": workers, "multiprocessing_context": context}
    loader = torch.utils.data.DataLoader(faces, 64, collate_fn=list, **options)
    try:
        for batch in loader:
            yield from batch
    except RuntimeError as error:  # the system has killed a worker
        raise SystemFailure(f"decoding failed ({one_line(error)}); try fewer WORKERS") from None


class Batches:
    """The training batches of `faces`: a function of (SEED, epoch, step) alone.

    So a resumed run sees what an untouched one would, and a checkpoint needs no random states. Of
    several processes each draws the numbers of the whole batch and takes its share of them.
    """

    def __init__(self, faces, device):
        self.faces = faces
        self.device = device
        self.count = len(faces)
        self.steps = len(faces) // BATCH_SIZE  # full batches only
        if self.steps == 0:
            raise UserError(
                f"DATA_DIR ({DATA_DIR}) holds {len(faces)} images, fewer than BATCH_SIZE "
                f"({BATCH_SIZE}); add images or lower BATCH_SIZE"
            )
        if device.type == "cuda" and faces.numel() < torch.cuda.mem_get_info(device)[0] / 2:
            self.faces = faces.to(device)

    def epoch(self, epoch, first_step=0):
        """Yield (faces, flips, latents) of each step, as `Trainer.step` takes them."""
        share = BATCH_SIZE // WORLD_SIZE
        mine = slice(RANK * share, (RANK + 1) * share)
        shuffle = torch.Generator().manual_seed(seed_for("order", epoch))
        order = torch.randperm(self.count, generator=shuffle).to(self.faces.device)
        batches = order.split(BATCH_SIZE)
        stream = torch.Generator(self.device)
        for step in range(first_step, self.steps):
            stream.manual_seed(seed_for("step", epoch, step))
            numbers = {"generator": stream, "device": self.device}
            latents = torch.randn(BATCH_SIZE, LATENT_SIZE, 1, 1, **numbers)
            flips = torch.rand(BATCH_SIZE, 1, 1, 1, **numbers) < 0.5
            faces = self.faces.index_select(0, batches[step][mine])
            if self.device.type == "cuda" and not faces.is_cuda:
                # From pinned memory, the copy runs while the CPU continues. Only on CUDA: such
                # copies to MPS fail or are wrong (PyTorch's issues 86060 and 189690).
                faces = faces.pin_memory().to(self.device, non_blocking=True)
            yield faces.to(self.device), flips[mine], latents[mine]


# ------------------------------------------------------------------------------------- checkpoints

NETWORK_SETTINGS = ("IMAGE_SIZE", "LATENT_SIZE", "G_FEATURES", "D_FEATURES")
NETWORKS = ("generator", "discriminator", "average")
ORDER_SETTINGS = ("BATCH_SIZE", "SEED", "MAX_IMAGES")
NOT_FINITE = (
    "likely causes: a LEARNING_RATE that is too high, or PRECISION float16; lower the one or set "
    "the other to float32, and run again, which goes on from the last checkpoint"
)


@dataclass
class Progress:
    """Where a run stands."""

    epoch: int = 0  # epochs that are whole
    step: int = 0  # steps of the next one
    interval: int = 0  # steps since the last row of metrics.csv


def checkpoint_state(run):
    """All that a run is made of, in plain Python and tensors.

    Raises UserError if a weight or a loss is not finite: such a state is never saved.
    """
    trainer = run.trainer
    trainer.settled_average()
    networks = {name: getattr(trainer, name).state_dict() for name in NETWORKS}
    for name, tensors in networks.items():
        finite = [tensor.isfinite().all() for tensor in (trainer.totals, *tensors.values())]
        if not torch.stack(finite).all():
            epoch = run.progress.epoch + 1
            text = f"the {name} or a loss is not finite in epoch {epoch}; {NOT_FINITE}"
            raise UserError(text, status=1)
    descents = (trainer.generator_descent, trainer.discriminator_descent)
    return {
        "settings": setting_values(),
        "data": run.data_key,
        "fixed_noise": run.fixed_noise,
        "images": trainer.images,
        "rows": [list(row) for row in run.rows],
        "quality": [list(row) for row in run.quality],
        "totals": trainer.totals.tolist(),
        "optimizers": [descent.optimizer.state_dict() for descent in descents],
        "scalers": [descent.scaler.state_dict() for descent in descents],
        **networks,
        **asdict(run.progress),
    }


def save_generator(state, row):
    """Write generator.pt: the averaged generator, what builds it, and how good its faces are."""
    small = {name: state[name] for name in ("epoch", "images", "average")}
    small["settings"] = {name: state["settings"][name] for name in NETWORK_SETTINGS}
    small["distance"] = row.distance
    write_file(Path(OUTPUT_DIR) / "generator.pt", lambda file: torch.save(small, file))


def save_checkpoint(state):
    """Write checkpoint.pt; the one before becomes checkpoint.previous.pt."""
    path = Path(OUTPUT_DIR) / "checkpoint.pt"
    previous = path.with_name("checkpoint.previous.pt")
    write_file(path, lambda file: torch.save(state, file), previous)


def load_safely(path):
    """What torch.save wrote to `path`, on the CPU; nothing in it is run.

    Raises UserError if it is damaged. torch.load does not notice flipped bits, but such a file is a
    zip, which has checksums.
    """
    try:
        if not Path(path).is_file():
            raise UserError(f"there is no file {path}")
        with zipfile.ZipFile(path) as archive:
            if any(member.compress_type for member in archive.infolist()) or archive.testzip():
                raise ValueError("a checksum is wrong")
        with warnings.catch_warnings(action="ignore"):
            return torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except OSError as error:
        raise SystemFailure(f"{path} cannot be read: {error.strerror}") from None
    except Exception as error:  # a damaged zip or pickle raises almost anything
        if out_of_memory(error):
            raise
        text = f"{path} is damaged, or not from torch.save ({one_line(error)})"
        raise UserError(text) from error


def read_checkpoint(path):
    """The state in a checkpoint.pt or generator.pt.

    Raises UserError if the file is damaged or something else.
    """
    state = load_safely(path)
    try:
        if not isinstance(state, dict):
            raise ValueError(f"it holds a {type(state).__name__}")
        if "ema" in state:  # from an earlier version
            state["average"] = state.pop("ema")
        for name in NETWORK_SETTINGS:
            checked(name, state["settings"][name])
        COUNT.parse(state["epoch"])
        COUNT.parse(state["images"])
        build_generator(state)
    except Exception as error:  # whatever another program's file leads to
        if out_of_memory(error):
            raise
        text = f"{path} is no checkpoint of dcgan.py ({one_line(error)})"
        raise UserError(text) from error
    return state


def newest_checkpoint():
    """The state to go on from, or None: of checkpoint.pt or, if need be, of the one before."""
    path = Path(OUTPUT_DIR) / "checkpoint.pt"
    previous = path.with_name("checkpoint.previous.pt")
    if not path.exists():
        return read_checkpoint(previous) if previous.exists() else None
    try:
        return read_checkpoint(path)
    except UserError as error:
        if not previous.exists():
            raise UserError(f"{error}; move it away to start afresh") from None
        state = read_checkpoint(previous)
        path.replace(path.with_name("checkpoint.damaged.pt"))
        say(f"{error}: it is now checkpoint.damaged.pt, and checkpoint.previous.pt is used")
        return state


def restore(run, state):
    """Put a checkpoint's state into `run`, and say what has changed since.

    Raises UserError if its networks are not of today's settings, or if the state is not whole.
    """
    then, now = state["settings"], setting_values()
    for name in NETWORK_SETTINGS:
        if then[name] != now[name]:
            raise UserError(
                f"{name} is {now[name]}, and the run in {OUTPUT_DIR} has {then[name]}; set it back "
                "or choose another OUTPUT_DIR"
            )
    try:
        changed = [name for name in now if name in then and then[name] != now[name]]
        same_order = state.get("data") == run.data_key and not set(changed) & set(ORDER_SETTINGS)
        restore_trainer(run.trainer, state)
        restore_progress(run, state, same_order)
    except Exception as error:  # whatever a file that is not whole leads to
        if out_of_memory(error):
            raise
        text = f"the checkpoint in {OUTPUT_DIR} is not whole ({one_line(error)}); move it away"
        raise UserError(text) from error

    if changed:
        changes = [f"{name} {then[name]} -> {now[name]}" for name in changed]
        say("changed since the checkpoint: " + ", ".join(changes))
    epoch = run.progress.epoch + 1
    if state["step"] and not same_order:
        say(f"the order of the images has changed: epoch {epoch} begins again")
    at = f"epoch {epoch}, step {run.progress.step + 1}"
    if run.progress.step == run.steps:  # a signal came in the epoch's last step
        at = f"the end of epoch {epoch}"
    say(f"going on from {OUTPUT_DIR}/checkpoint.pt: {at}")


def restore_trainer(trainer, state):
    for name in NETWORKS:
        getattr(trainer, name).load_state_dict(state[name])
    descents = (trainer.generator_descent, trainer.discriminator_descent)
    for descent, saved in zip(descents, state["optimizers"], strict=True):
        restore_optimizer(descent.optimizer, saved["state"])
    for descent, saved in zip(descents, state["scalers"], strict=True):
        if saved and descent.scaler.is_enabled():
            descent.scaler.load_state_dict(saved)
    trainer.images = COUNT.parse(state["images"])


def restore_optimizer(optimizer, saved):
    """Load the moments alone, in the weights' memory format.

    The saved groups would bring back the old learning rate, and a new setting had no effect.
    """
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": saved, "param_groups": groups})
    for parameter, moments in optimizer.state.items():
        for name in ("exp_avg", "exp_avg_sq"):
            moments[name] = torch.empty_like(parameter).copy_(moments[name])
        moments["step"] = moments["step"].reshape(())  # older PyTorch saved (1,)


def restore_progress(run, state, same_order):
    """Where the run stood. If the images come in another order now, a half-done epoch is undone."""
    run.fixed_noise.copy_(state["fixed_noise"])
    run.progress = Progress(*(COUNT.parse(state[name]) for name in ("epoch", "step", "interval")))
    run.rows = [Row(*map(int, row[:3]), *map(float, row[3:])) for row in state["rows"]]
    for epoch, images, distance, floor, best in state.get("quality", []):
        row = Quality(int(epoch), int(images), float(distance), float(floor), int(best))
        run.quality.append(row)
    if same_order:
        run.trainer.totals.copy_(torch.tensor(state["totals"]))
    else:
        run.progress = Progress(run.progress.epoch)
        run.rows = [row for row in run.rows if row.epoch <= run.progress.epoch]


# ----------------------------------------------------------------------------- pictures and advice

FILM_BYTES = 3_000_000  # training.gif is not larger, so that it can be sent


def to_bytes(images):
    """Images in [0, 1] as uint8, rounded: what files hold, and what `evaluate` measures."""
    return images.mul(255).round().byte()


def grid(images, columns=8):
    """Images (N, 3, H, W) in [0, 1] as one PIL picture."""
    return to_pil_image(make_grid(to_bytes(images.cpu()), columns))


def save_picture(picture, path):
    write_file(path, lambda file: picture.save(file, "PNG"))


def save_gif(pictures, path, duration):
    """A film that begins anew at its end, of PIL pictures that are each shown for `duration` ms."""
    options = {"save_all": True, "append_images": pictures[1:], "loop": 0, "duration": duration}
    write_file(path, lambda file: pictures[0].save(file, "GIF", **options))


DISTANCE_IMAGES = 2_048  # that a distance is measured on, and as many real ones


@torch.no_grad()
def face_distance(fakes, reals):
    """How far `fakes` are from `reals`, both (N, 3, 32, 32) in [0, 1]: lower is better.

    It is the Fréchet distance between what two layers of fixed random filters see in them, so it
    needs no trained network. It keeps where things are, on a raster of 4 × 4. Each feature is
    scaled by its spread among the reals: copies of one image are at about 1. How far reals are from
    other reals is its floor.
    """
    if len(reals) < 2:
        return math.inf
    stream = torch.Generator().manual_seed(0)
    for channels in (3, 32):
        filters = torch.randn(32, channels, 3, 3, generator=stream)
        bias = 0.3 * torch.randn(32, 1, 1, generator=stream)
        fakes = F.conv2d(fakes, filters, stride=2, padding=1)
        reals = F.conv2d(reals, filters, stride=2, padding=1)
        spread, mean = torch.std_mean(reals, (0, 2, 3), keepdim=True)
        spread = spread.clamp_min(1e-6)
        fakes = F.leaky_relu((fakes - mean) / spread + bias, 0.2)
        reals = F.leaky_relu((reals - mean) / spread + bias, 0.2)
    fakes = F.adaptive_avg_pool2d(fakes, 4).flatten(1).double()
    reals = F.adaptive_avg_pool2d(reals, 4).flatten(1).double()
    spread = reals.std(0)
    varied = spread > 1e-6  # a white corner tells nothing
    if not varied.any():  # nor do copies of one image
        return math.inf
    fakes = fakes[:, varied] / spread[varied]
    reals = reals[:, varied] / spread[varied]
    try:
        return frechet_distance(fakes, reals) / len(spread[varied])
    except torch.linalg.LinAlgError:  # too many images are copies of others
        return math.inf


def shrunk(batches):
    """Batches of images (N, 3, H, W) as one of (N, 3, 32, 32), on the CPU."""
    return torch.cat([F.adaptive_avg_pool2d(batch, 32).cpu() for batch in batches])


def frechet_distance(one, two):
    """Between Gaussians with the means and covariances of two sets of features (N, D)."""
    covariance_one, covariance_two = torch.cov(one.T), torch.cov(two.T)
    values, vectors = torch.linalg.eigh(covariance_one)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T  # of covariance_one
    cross = torch.linalg.eigvalsh(root @ covariance_two @ root).clamp_min(0).sqrt().sum()
    shift = (one.mean(0) - two.mean(0)).square().sum()
    return (shift + covariance_one.trace() + covariance_two.trace() - 2 * cross).item()


@contextmanager
def figure_file(name, width, height):
    """A matplotlib figure to draw on, which is then saved in OUTPUT_DIR. No window takes part."""
    backend = os.environ.get("MPLBACKEND", "").partition("module://")[2]
    if backend and importlib.util.find_spec(backend.partition(".")[0]) is None:
        del os.environ["MPLBACKEND"]  # what Colab starts inherits one that it cannot import
    from matplotlib.figure import Figure

    figure = Figure((width, height), layout="constrained")
    yield figure
    write_file(Path(OUTPUT_DIR) / name, lambda file: figure.savefig(file, format="png"))


def draw_pictures(run, fakes, now=False):
    """losses.png, real_vs_fake.png and training.gif, if they are two minutes old, or `now`.

    `now` is at the end of a run, where a notebook shows the losses. `fakes`: the samples of the run
    so far, (64, 3, H, W) in [0, 1].
    """
    old = perf_counter() - run.drawn_at > 120
    if RANK > 0 or not run.rows or not (old or now):
        return
    run.drawn_at = perf_counter()
    draw_losses(run.steps, run.rows, run.quality)
    epochs = run.progress.epoch + run.progress.step / run.steps
    with figure_file("real_vs_fake.png", 11, 6) as figure:
        left, right = figure.subplots(1, 2)
        left.set_title("real")
        left.imshow(grid(run.reals))
        right.set_title(f"generated, after {round(epochs, 2):g} epochs")
        right.imshow(grid(fakes))
        for axes in (left, right):
            axes.axis("off")
    draw_film(run.progress.epoch)
    if now:
        with Image.open(Path(OUTPUT_DIR) / "losses.png") as picture:
            show(picture)


def draw_losses(steps, rows, quality):
    """losses.png from the rows of metrics.csv, `steps` an epoch: raw values, and running means.

    Below them, the distances of quality.csv; the epoch of generator.pt is marked.
    """
    columns = Row(*zip(*rows))
    epochs = [row.epoch - 1 + row.step / steps for row in rows]
    late = rows[len(rows) // 20 :]  # the first steps' losses would dwarf the rest
    highest = max(row.loss_d + row.loss_g for row in late)
    with figure_file("losses.png", 9, 10) as figure:
        upper, middle, lower = figure.subplots(3, 1, sharex=True)
        draw_curve(upper, epochs, columns.loss_d, "C0", "discriminator")
        draw_curve(upper, epochs, columns.loss_g, "C1", "generator")
        draw_curve(middle, epochs, columns.d_real, "C2", "D(x), of real images")
        draw_curve(middle, epochs, columns.d_fake, "C3", "D(G(z)), of fakes")
        upper.set_title("healthy: both wander; a slowly rising generator loss is no failure")
        upper.set(ylabel="loss", ylim=(0, highest))
        middle.set_title("healthy: apart, but not at 1 and 0, where the discriminator has won")
        middle.set(ylabel='probability of "real"', ylim=(-0.02, 1.02))
        lower.set_title("how far the faces are from real ones; real ones from others: the line")
        lower.set(ylabel="distance", xlabel="epoch", yscale="log")
        if quality:
            measured = Quality(*zip(*quality))
            best = measured.epoch.index(measured.best[-1])
            lower.plot(measured.epoch, measured.distance, "C4o-", label="averaged generator")
            lower.plot(measured.best[-1], measured.distance[best], "r*", label="generator.pt")
            lower.axhline(measured.floor[-1], color="grey")
        for axes in figure.axes:
            axes.grid(alpha=0.2)
            if axes.get_legend_handles_labels()[0]:
                axes.legend(fontsize=9)


def draw_curve(axes, epochs, values, colour, label):
    raw = torch.tensor(values)
    window = len(values) // 100 * 2 + 1  # odd, to be centred
    smooth = F.avg_pool1d(raw[None], window, 1, window // 2, count_include_pad=False)
    axes.plot(epochs, raw, color=colour, alpha=0.25, linewidth=0.8)
    axes.plot(epochs, smooth[0], color=colour, label=label)


def draw_film(epochs):
    """training.gif: 25 faces of each grid in samples/, up to `epochs`."""
    folder = Path(OUTPUT_DIR) / "samples"
    paths = [folder / f"epoch_{epoch:03d}.png" for epoch in range(epochs + 1)]
    paths = [path for path in paths if path.exists()]
    if not paths:
        return
    frame = io.BytesIO()
    film_frame(paths[-1]).save(frame, "GIF")
    stride = math.ceil(len(paths) / min(60, FILM_BYTES // frame.tell()))
    shown = paths[::-stride][::-1]  # counted from the last one, which is always shown
    times = [max(60, 3000 // len(shown))] * len(shown)
    times[-1] = 2500
    save_gif([film_frame(path) for path in shown], Path(OUTPUT_DIR) / "training.gif", times)


def film_frame(path):
    """25 faces cut from a grid's file, and the epoch written below them."""
    frame = Image.new("RGB", (332, 352), "white")
    with Image.open(path) as picture:
        side = picture.width * 5 // 8
        faces = picture.convert("RGB").crop((0, 0, side, side))
    frame.paste(faces.resize((332, 332), Image.Resampling.BILINEAR))
    ImageDraw.Draw(frame).text((8, 336), path.stem.replace("_", " "), "black")
    return frame.quantize(128, dither=Image.Dither.NONE)


def advice(rows, diversity_share):
    """Yield a line for each thing that goes wrong.

    `rows`: an epoch's, of metrics.csv; `diversity_share`: diversity of fakes, divided by reals'.
    """
    d_real = sum(row.d_real for row in rows) / len(rows)
    d_fake = sum(row.d_fake for row in rows) / len(rows)
    if d_real > 0.97 and d_fake < 0.03:
        yield (
            f"the discriminator has won: D(x) is {d_real:.3f} and D(G(z)) {d_fake:.3f} on average, "
            "so the generator learns little; lower D_LEARNING_RATE, raise R1_GAMMA to 0.1 or 1, "
            "and keep BETA1 at 0"
        )
    if diversity_share < 0.3:
        yield (
            f"the samples look alike (mode collapse): their diversity is {diversity_share:.2f} of "
            "the real images'; lower LEARNING_RATE, raise BATCH_SIZE, or start afresh with another "
            "SEED and OUTPUT_DIR"
        )


def decline(quality):
    """A line if the rows of quality.csv have been far worse than the best for long, else None."""
    best = min(quality, key=lambda row: row.distance)
    if len(quality) > 3 and min(row.distance for row in quality[-3:]) > 1.5 * best.distance:
        return (
            f"the faces have become worse: distance {quality[-1].distance:.3f}, after "
            f"{best.distance:.3f} in epoch {best.epoch}; generator.pt holds the best, of epoch "
            f"{quality[-1].best}; stop, or go on with a lower LEARNING_RATE"
        )
    return None


def diversity(images):
    """How much images (N, 3, H, W) differ: their standard deviation, over 8 × 8 patches."""
    return F.adaptive_avg_pool2d(images.float(), 8).std(0).mean().item()


# ---------------------------------------------------------------------------------------- training


class Row(NamedTuple):
    """A row of metrics.csv: means over the steps since the row before."""

    epoch: int
    step: int
    images: int  # real ones seen since the run began
    loss_d: float
    loss_g: float
    d_real: float  # D(x): how real the discriminator finds real images
    d_fake: float  # D(G(z)): how real it finds fakes
    images_per_second: float

    def summary(self):
        return (
            f"loss_d {self.loss_d:.3f}, loss_g {self.loss_g:.3f}, D(x) {self.d_real:.3f}, "
            f"D(G(z)) {self.d_fake:.3f}, {self.images_per_second:,.0f} images/s"
        )


class Quality(NamedTuple):
    """A row of quality.csv: how far the averaged generator's faces are from the real ones."""

    epoch: int
    images: int  # real ones seen since the run began
    distance: float  # `face_distance` of DISTANCE_IMAGES faces, of noise that stays the same
    floor: float  # that of as many other real images
    best: int  # the epoch of generator.pt

    def summary(self):
        return (
            f"distance {self.distance:.3f} (of reals: {self.floor:.3f}), best in epoch {self.best}"
        )


class Run:
    """A training run: its Trainer, its Progress, the rows of metrics.csv, and when it reported."""

    def __init__(self, trainer, faces, data_key, steps):
        self.trainer = trainer
        self.faces = faces
        self.reals = some_reals(faces)
        self.data_key = data_key
        self.steps = steps  # an epoch
        self.progress = Progress()
        self.rows = []
        self.quality = []
        self.saved_at = self.spoke_at = perf_counter()
        self.timed = (perf_counter(), 0)  # a moment, and how many images had been seen then
        self.drawn_at = -math.inf
        self.reports = 0
        self.shown = None  # where a notebook shows the samples
        stream = torch.Generator().manual_seed(seed_for("samples"))
        noise = torch.randn(64, LATENT_SIZE, 1, 1, generator=stream)
        self.fixed_noise = noise.to(trainer.device)  # the samples are drawn from it, always

    def log(self):
        """End an interval: its means as a Row, which is kept and appended to metrics.csv.

        Raises UserError if a loss is not finite.
        """
        progress, images = self.progress, self.trainer.images
        means = self.trainer.fetch(progress.interval)
        before, images_before = self.timed
        self.timed = (perf_counter(), images)
        speed = (images - images_before) / (perf_counter() - before)
        row = Row(progress.epoch + 1, progress.step, images, *means, speed)
        if not math.isfinite(row.loss_d + row.loss_g):
            first = progress.step - progress.interval + 1
            raise UserError(
                f"a loss is not finite in epoch {row.epoch}, steps {first} to {row.step} (loss_d "
                f"{row.loss_d}, loss_g {row.loss_g}); {NOT_FINITE}",
                status=1,
            )
        self.rows.append(row)
        progress.interval = 0
        path = Path(OUTPUT_DIR) / "metrics.csv"
        if RANK == 0:
            with disk_errors(path), open(path, "ab") as file:
                file.write(csv_lines([row]))
        return row

    def save(self):
        """Write checkpoint.pt."""
        self.saved_at = perf_counter()
        if RANK == 0:
            save_checkpoint(checkpoint_state(self))


def train():
    """Train on DATA_DIR, or go on from OUTPUT_DIR/checkpoint.pt; return generator.pt's path.

    Raises UserError for a wrong setting or data set and for a loss that is not finite,
    SystemFailure for network and disk and, when the work is saved, KeyboardInterrupt.
    """
    check_settings()
    output = Path(OUTPUT_DIR)
    with ExitStack() as stack:
        state = None
        if RANK == 0:
            stack.enter_context(locked(output / ".lock"))
            state = newest_checkpoint()
        if state and state["epoch"] >= EPOCHS and WORLD_SIZE == 1:
            say(
                f"{output} holds a finished run of {state['epoch']} epochs; raise EPOCHS to go on, "
                "or choose another OUTPUT_DIR to start afresh"
            )
            return output / "generator.pt"
        if importlib.util.find_spec("matplotlib") is None:
            text = "the module matplotlib is missing: pip install -r requirements.txt"
            raise UserError(text, status=1)
        device = pick_device()
        faces, key = prepare_data(IMAGE_SIZE)
        if WORLD_SIZE > 1:
            state, key = join_processes(state, key, len(faces), device)
        batches = Batches(faces, device)
        run = Run(Trainer(device, pick_dtype(device)), faces, key, batches.steps)
        announce(run.trainer, batches)
        begin(run, state)
        train_epochs(run, batches)
        if WORLD_SIZE > 1:
            dist.destroy_process_group()
    say(
        f"finished; see {output}/samples, and draw new faces: "
        f"python dcgan.py generate --output-dir {output}"
    )
    return output / "generator.pt"


def announce(trainer, batches):
    """The first lines: on what it runs, with what."""
    device = trainer.device
    where = f"{device.type.upper()}, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        place = "it" if batches.faces.is_cuda else "disk"
        where = f"{torch.cuda.get_device_name(device)}, images on {place}"
    if WORLD_SIZE > 1:
        where += f" × {WORLD_SIZE} processes"
    dtype = str(trainer.dtype).removeprefix("torch.")
    amount = f"{batches.count:,} images, {batches.steps:,} steps an epoch, {EPOCHS} epochs"
    say(f"{where}, {dtype}; {amount}")


def begin(run, state):
    """Go on from a checkpoint's state, or show what comes out before training."""
    if state:
        restore(run, state)
    else:
        sample(run)
    if RANK == 0:  # anew: rows after the checkpoint will come again
        write_rows("metrics.csv", Row, run.rows)
        write_rows("quality.csv", Quality, run.quality)


def sample(run):
    """Images (64, 3, H, W) in [0, 1] of the run's fixed noise, saved and, in a notebook, shown.

    latest.png is always the newest grid; each whole epoch has one of its own as well.
    """
    trainer, progress = run.trainer, run.progress
    fakes = images_from(trainer.settled_average(), run.fixed_noise, trainer.dtype)
    if RANK == 0:
        picture = grid(fakes)
        folder = Path(OUTPUT_DIR) / "samples"
        with suppress(SystemFailure):  # on Windows a viewer can hold it
            save_picture(picture, folder / "latest.png")
        if progress.step == 0:
            save_picture(picture, folder / f"epoch_{progress.epoch:03d}.png")
        run.shown = show(picture, run.shown)
    return fakes


def some_reals(faces):
    """64 of the real images, always the same, (64, 3, H, W) in [0, 1]."""
    stream = torch.Generator().manual_seed(seed_for("reals"))
    chosen = torch.randperm(len(faces), generator=stream)[:64]
    return faces.index_select(0, chosen).float() / 255


def train_epochs(run, batches):
    """Train to the last epoch, or to a signal: then save, and raise KeyboardInterrupt."""
    progress = run.progress
    with kept_signals() as signals:
        while progress.epoch < EPOCHS:
            whole = train_epoch(run, batches, signals)
            if not whole:
                save_and_show(run, now=True)
                at = f"step {progress.step} of epoch {progress.epoch + 1}"
                say(f"saved after {at}; the same command goes on from there")
                raise KeyboardInterrupt(*signals)
            progress.epoch += 1
            progress.step = 0
            end_epoch(run)


def train_epoch(run, batches, signals):
    """The steps that an epoch still has. Returns False if a signal came, in the last one too."""
    progress = run.progress
    run.timed = (perf_counter(), run.trainer.images)
    name = f"epoch {progress.epoch + 1}/{EPOCHS}"
    bar = progress_bar(total=batches.steps, initial=progress.step, desc=name, unit=" steps")
    with bar:
        for batch in batches.epoch(progress.epoch, progress.step):
            run.trainer.advance(*batch)
            progress.step += 1
            progress.interval += 1
            with suppress(OSError):  # the terminal may be gone
                bar.update()

            last = progress.step == batches.steps
            row_due = last or progress.step % LOG_EVERY == 0
            if row_due:
                report(run, run.log(), bar)
            if should_stop(signals, run.trainer.device, row_due):
                return False
            if not last and perf_counter() - run.saved_at > 60 * CHECKPOINT_MINUTES:
                save_and_show(run)
    return True


def save_and_show(run, now=False):
    """Within an epoch: save, first of all; then draw the samples and, as they are due, pictures."""
    run.save()
    if RANK == 0:
        draw_pictures(run, sample(run), now)


def report(run, row, bar):
    """Show a row: on the bar or, without one, in a line a minute. After the first, an estimate."""
    with suppress(OSError):  # the terminal may be gone
        bar.set_postfix_str(row.summary())
    if bar.disable and perf_counter() - run.spoke_at > 60:
        say(f"epoch {row.epoch}/{EPOCHS}, step {row.step}/{bar.total}: {row.summary()}")
        run.spoke_at = perf_counter()
    run.reports += 1
    if run.reports == 2:  # the first one has the warm-up in it
        steps_left = (EPOCHS - run.progress.epoch) * bar.total - row.step
        minutes = math.ceil(steps_left * BATCH_SIZE / row.images_per_second / 60)
        duration = f"{minutes} min" if minutes < 100 else f"{minutes / 60:.1f} h"
        say(f"the run will take about {duration}; see {OUTPUT_DIR}/samples/latest.png meanwhile")


def end_epoch(run):
    """After an epoch: samples, the number for the faces, checkpoint, pictures, and advice."""
    epoch = run.progress.epoch
    fakes = sample(run)
    new_best = measure(run)
    if new_best:  # before the checkpoint: a run that is killed in between does this again
        save_generator(checkpoint_state(run), new_best)
    last = epoch == EPOCHS
    if last or perf_counter() - run.saved_at > min(60, 60 * CHECKPOINT_MINUTES):
        run.save()  # on a fast GPU, saving every epoch would take a twentieth of the time
    draw_pictures(run, fakes, now=last)
    measured = run.quality and run.quality[-1].epoch == epoch
    news = [] if sys.stderr.isatty() else [run.rows[-1].summary()]
    if measured:
        news.append(run.quality[-1].summary())
    if news:
        say(f"epoch {epoch}/{EPOCHS}: {', '.join(news)}")
    if measured and (line := decline(run.quality)):
        say(f"after epoch {epoch}, {line}")
    if run.trainer.images > 10_000:  # before that, nothing is amiss yet
        rows = [row for row in run.rows if row.epoch == epoch]
        share = diversity(fakes) / (diversity(run.reals) or 1)
        for line in advice(rows, share):
            say(f"after epoch {epoch}, {line}")


MEASURE_EVERY = 25_000  # images at least, since it takes as long as to train on about 500
TIE = 0.03  # nearer distances count as the same: twice what other noise changes


def measure(run):
    """Append a row to quality.csv, and return it if its generator is the best so far.

    Short epochs are not all measured; the first and the last one are.
    """
    trainer, faces, epoch = run.trainer, run.faces, run.progress.epoch
    measured = run.quality[-1].images if run.quality else -math.inf
    if RANK > 0 or (epoch < EPOCHS and trainer.images - measured < MEASURE_EVERY):
        return None
    stream = torch.Generator().manual_seed(0)
    chosen = torch.randperm(len(faces), generator=stream)[: 2 * DISTANCE_IMAGES]
    shown = (faces.index_select(0, part) / 255 for part in chosen.split(64))
    reals, others = shrunk(shown).chunk(2)
    latents = torch.randn(len(reals), LATENT_SIZE, 1, 1, generator=stream).to(trainer.device)
    average = trainer.settled_average()
    fakes = (images_from(average, part, trainer.dtype) for part in latents.split(64))
    fakes = shrunk(fakes).nan_to_num()  # of a generator that is not finite, and will not be saved
    distance = face_distance(fakes, reals)
    floor = run.quality[0].floor if run.quality else face_distance(others, reals)
    lowest = min((row.distance for row in run.quality), default=math.inf)
    is_best = distance <= lowest * (1 + TIE)
    best = epoch if is_best else run.quality[-1].best
    run.quality.append(Quality(epoch, trainer.images, distance, floor, best))
    write_rows("quality.csv", Quality, run.quality)
    return run.quality[-1] if is_best else None


def write_rows(name, kind, rows):
    """Write a table in OUTPUT_DIR anew, with the names of its columns."""
    lines = csv_lines([kind._fields, *rows])
    write_file(Path(OUTPUT_DIR) / name, lambda file: file.write(lines))


def csv_lines(rows):
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for row in rows:
        writer.writerow(f"{cell:.6g}" if isinstance(cell, float) else cell for cell in row)
    return text.getvalue().encode()


@contextmanager
def kept_signals():
    """A list to which Ctrl-C, SIGTERM and SIGHUP are added within `with`, instead of ending it.

    A second Ctrl-C raises KeyboardInterrupt at once.
    """
    received: list[int] = []

    def receive(signum, frame):
        if received and signum == signal.SIGINT:
            raise KeyboardInterrupt(signum)
        received.append(signum)

    names = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP
    handlers = {getattr(signal, name): None for name in names if hasattr(signal, name)}
    if threading.current_thread() is not threading.main_thread():  # where they cannot be handled
        handlers = {}
    for signum in handlers:
        handlers[signum] = signal.getsignal(signum)
        if handlers[signum] is not signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(signum, receive)
    try:
        yield received
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)


# ------------------------------------------------------------------------ using a trained generator

GENERATION_BATCH = 64  # always, so that an image does not depend on how many were asked for
GRID_LIMIT = 1_024  # images


class TrainedGenerator:
    """The averaged generator of a checkpoint file, or of the newest in OUTPUT_DIR, ready to draw.

    `state` is what the file holds. Raises UserError if there is none, or if it is damaged.
    """

    def __init__(self, checkpoint=None):
        check_settings()
        path = checkpoint or find_checkpoint()
        self.state = read_checkpoint(path)
        say(f"the generator of {path}, after epoch {self.state['epoch']}")
        self.device = pick_device()
        self.dtype = pick_dtype(self.device)
        generator = build_generator(self.state)
        self.generator = generator.to(self.device, memory_format=memory_format(self.device))

    def latents(self, number, seed):
        """Yield noise (GENERATION_BATCH, z) for at least `number` images, on the CPU.

        A seed of None is drawn and printed.
        """
        if seed is None:
            seed = random.SystemRandom().randrange(10**6)
            say(f"seed {seed}")
        stream = torch.Generator().manual_seed(checked("seed", seed))
        size = self.state["settings"]["LATENT_SIZE"]
        for _ in range(0, number, GENERATION_BATCH):
            yield torch.randn(GENERATION_BATCH, size, generator=stream)

    def draw(self, latents):
        """Images (N, 3, H, W) in [0, 1], on the CPU, of noise (N, z)."""
        latents = latents[:, :, None, None].to(self.device)
        return images_from(self.generator, latents, self.dtype).cpu()

    def images(self, number, seed, truncation=1.0):
        """Yield `number` new images (3, H, W) in [0, 1], on the CPU, of `truncation` × noise."""
        with progress_bar(total=number, desc="generating", unit=" images") as bar:
            for first, latents in enumerate(self.latents(number, seed)):
                images = self.draw(truncation * latents)[: number - first * GENERATION_BATCH]
                yield from images
                bar.update(len(images))


def find_checkpoint():
    """OUTPUT_DIR's best generator or, before there is one, its checkpoint. UserError without."""
    for name in ("generator.pt", "checkpoint.pt", "checkpoint.previous.pt"):
        path = Path(OUTPUT_DIR) / name
        if path.exists():
            return path
    raise UserError(
        f"no checkpoint in OUTPUT_DIR ({OUTPUT_DIR}); train first, or give the file of one"
    )


def generate_images(num_images=16, seed=None, checkpoint=None, output=None, truncation=1.0):
    """New faces as a float tensor (num_images, 3, H, W) in [0, 1]; saved as a grid.

    In a notebook the grid is shown, too. The same seed gives the same images on a device, and more
    images begin with the same ones; a seed of None is drawn and printed. `checkpoint` is a
    checkpoint.pt or generator.pt, by default OUTPUT_DIR's. The grid, of the first 1,024, goes to
    `output`, by default OUTPUT_DIR/generated.png. A `truncation` under 1 scales the noise down: the
    faces are surer, and more alike. Raises UserError for a wrong number or file.
    """
    number = checked("num_images", num_images)
    truncation = checked("truncation", truncation)
    images = torch.stack(list(TrainedGenerator(checkpoint).images(number, seed, truncation)))
    shown = images[:GRID_LIMIT]
    picture = grid(shown, math.ceil(math.sqrt(len(shown))))
    path = Path(output or Path(OUTPUT_DIR) / "generated.png")
    save_picture(picture, path)
    say(f"saved {path}")
    show(picture)
    return images


def generate(
    num_images=16, seed=None, checkpoint=None, output=None, truncation=1.0, individual=False
):
    """Draw new faces, into a grid or, with --individual, a file each."""
    number = checked("num_images", num_images)
    truncation = checked("truncation", truncation)
    if not individual and number > GRID_LIMIT:
        raise UserError(
            f"num_images (--num-images) is {number}, and a grid holds {GRID_LIMIT:,}; "
            "add --individual for a file each"
        )
    if not individual:
        generate_images(number, seed, checkpoint, output, truncation)
        return
    images = TrainedGenerator(checkpoint).images(number, seed, truncation)
    folder = Path(output or Path(OUTPUT_DIR) / "generated")
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for index, image in enumerate(images):
            to_pil_image(to_bytes(image)).save(folder / f"{index:06d}.png")
    say(f"saved {number:,} images in {folder}")


def interpolate(num_faces=8, frames=16, seed=None, checkpoint=None, output=None):
    """Save a looping film that walks between new faces; return its path.

    `frames` pictures lead from each face to the next. It walks on the sphere near which noise of
    many dimensions lies, and takes the angle between two such vectors for 90°, as it nearly is.
    """
    number = checked("num_faces", num_faces)
    frames = checked("frames", frames)
    trained = TrainedGenerator(checkpoint)
    corners = torch.cat(list(trained.latents(number, seed)))[:number]
    following = corners.roll(-1, 0)
    pictures = []
    for start, end in zip(corners, following):
        angle = torch.arange(frames).mul(math.pi / 2 / frames).unsqueeze(1)
        walk = F.normalize(angle.cos() * start + angle.sin() * end) * math.sqrt(len(start))
        for image in trained.draw(walk):
            pictures.append(ImageOps.scale(to_pil_image(to_bytes(image)), 2))
    path = Path(output or Path(OUTPUT_DIR) / "interpolation.gif")
    save_gif(pictures, path, 60)
    say(f"saved {path}")
    return path


# ---------------------------------------------------------------------------------------- evaluate

LEAST_IMAGES = 2_048  # of fewer, an estimate of FID is no number
MOST_REALS = 50_000
INCEPTION = "inception-v3-compat"  # torch-fidelity's name for the one that papers use
INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases, weights-inception-2015-12-05-6726825d.pth"
)


def evaluate(num_images=50_000, checkpoint=None, inception_weights=None, seed=0):
    """FID, KID, precision and recall of new faces against DATA_DIR's, as a dict.

    They are printed, and appended to evaluation.csv, too. FID and KID are better when lower
    (Heusel et al. 2017, Bińkowski et al. 2018), precision and recall when higher (Kynkäänniemi
    et al. 2019). All come from torch-fidelity.
    """
    number = checked("num_images", num_images)
    if number < LEAST_IMAGES:
        raise UserError(
            f"num_images (--num-images) is {number}; it must be {LEAST_IMAGES:,} or more"
        )
    trained = TrainedGenerator(checkpoint)
    check_inception(inception_weights)
    faces, key = prepare_data(trained.state["settings"]["IMAGE_SIZE"])
    if len(faces) < LEAST_IMAGES:
        raise UserError(
            f"DATA_DIR ({DATA_DIR}) holds {len(faces):,} images; FID wants {LEAST_IMAGES:,} or more"
        )
    chosen = torch.linspace(0, len(faces) - 1, min(len(faces), MOST_REALS)).long()
    if min(number, len(chosen)) < 10_000:
        say(
            f"{number:,} generated and {len(chosen):,} real images; under 10,000, FID is too high; "
            "papers use 50,000"
        )
    about = {
        "epoch": trained.state["epoch"],
        "generated": number,
        "real": len(chosen),
        "size": faces.shape[-1],
        "crop": "centre square",
        "network": f"{INCEPTION} {weights_name(inception_weights)}",
    }
    with progress_bar(total=number + len(chosen), desc="Inception", unit=" images") as bar:
        fakes = ImageTensors(trained.images(number, seed), number, bar)
        reals = ImageTensors((faces[index] / 255 for index in chosen), len(chosen), bar)
        cache_name = f"{key[:16]}-{len(chosen)}-{weights_name(inception_weights)}"
        result = distances(fakes, reals, cache_name, inception_weights, trained.device)
    append_evaluation(about | result)
    results = ", ".join(f"{name} {value:.5g}" for name, value in result.items())
    say(f"{results} ({', '.join(f'{name} {value}' for name, value in about.items())})")
    return result


class ImageTensors(torch.utils.data.Dataset):
    """What torch-fidelity measures: uint8 images (3, H, W), of images in [0, 1].

    They come from an iterator, so they can be read only once and in order.
    """

    def __init__(self, images, number, bar):
        self.images = images
        self.number = number
        self.bar = bar
        self.first = next(images)
        bar.update()

    def __len__(self):
        return self.number

    def __getitem__(self, index):
        image = self.first  # torch-fidelity reads the first item twice
        if index > 0:
            image = next(self.images)
            self.bar.update()
        return to_bytes(image)


def distances(fakes, reals, cache_name, weights, device):
    """{"FID", "KID", "precision", "recall"} of two ImageTensors. Features of reals are cached."""
    from torch_fidelity import calculate_metrics

    cache = Path(CACHE_DIR) / "inception"
    with disk_errors(cache):
        cache.mkdir(parents=True, exist_ok=True)
        for path in cache.glob(f"{cache_name}-*"):
            try:
                load_safely(path)  # torch-fidelity would run what is in it
            except UserError:
                path.unlink()
        metrics = calculate_metrics(
            input1=fakes,
            input2=reals,
            input2_cache_name=cache_name,
            cache_root=str(cache),
            feature_extractor=INCEPTION,
            feature_extractor_weights_path=weights,
            fid=True,
            kid=True,
            prc=True,
            cuda=device.type == "cuda",
            save_cpu_ram=True,  # no worker processes, and distances part by part
            verbose=False,
        )
    return {
        "FID": metrics["frechet_inception_distance"],
        "KID": metrics["kernel_inception_distance_mean"],
        "precision": metrics["precision"],
        "recall": metrics["recall"],
    }


def weights_name(weights):
    """What tells files of Inception's weights apart; None is the file that is downloaded."""
    if weights is None:
        return "2015-12-05"
    return hashlib.sha256(Path(weights).read_bytes()).hexdigest()[:8]


def check_inception(weights):
    """Raise UserError or SystemFailure, before hours of work, if there is no Inception to use."""
    try:
        from torch_fidelity.utils import create_feature_extractor as create
    except ImportError as error:
        raise UserError(
            f"evaluate needs torch-fidelity (no module {error.name}): pip install torch-fidelity",
            status=1,
        ) from None
    if weights is not None and not Path(weights).is_file():
        raise UserError(f"there is no file {weights}")
    try:
        if weights is not None:  # safely, before torch-fidelity does, which would run what is in it
            with warnings.catch_warnings(action="ignore"):
                torch.load(weights, map_location="cpu", weights_only=True)
        options = {"feature_extractor_weights_path": weights, "verbose": False}
        create(INCEPTION, ["2048"], cuda=False, **options)
    except OSError as error:
        raise SystemFailure(
            f"no Inception weights ({error}); give --inception-weights FILE, from {INCEPTION_URL}"
        ) from None
    except Exception as error:  # whatever another file leads to
        if out_of_memory(error):
            raise
        name = weights or "the download"
        text = f"{name} holds no weights of torch-fidelity's Inception ({one_line(error)})"
        raise UserError(text) from error


def append_evaluation(columns):
    """Append a row to evaluation.csv, below a line with its columns' names if they are new."""
    path = Path(OUTPUT_DIR) / "evaluation.csv"
    before = path.read_bytes() if path.exists() else b""
    header = csv_lines([columns.keys()])
    if header not in before:
        before += header
    row = csv_lines([columns.values()])
    write_file(path, lambda file: file.write(before + row))


# ------------------------------------------------------------- where images come from: Kaggle, demo

CELEBA_BYTES = 2_900_000_000  # the archive, 1.33 GiB, and the images unpacked beside it
FILL_TIME = 10**9  # when the images seem to have changed, in seconds: the same in each download
KAGGLE_SECONDS = 60  # a download that brings no byte for so long has hung
# Kaggle's command line, in a process that ends when its parent does: its stdin closes then.
# It wants to be called by its name, or it takes itself for a library and asks for a login.
KAGGLE_CHILD = """
import os, runpy, sys, threading
threading.Thread(target=lambda: (os.read(0, 1), os._exit(1)), daemon=True).start()
sys.argv[0] = "kaggle"
runpy.run_module("kaggle", run_name="__main__", alter_sys=True)
"""
# What Kaggle's client says when it fails, in several versions, and what we say then.
LOGIN_WANTED = "Authentication required|don't have access|40[13] Client Error"
KAGGLE_ERRORS = {
    LOGIN_WANTED: """Kaggle wants you to log in:
  - either make a token at https://www.kaggle.com/settings (API, Create New Token), save it as
    ~/.kaggle/access_token, or set KAGGLE_API_TOKEN to it (an older kaggle.json goes to
    ~/.kaggle/kaggle.json); or
  - put images of faces, from anywhere, into DATA_DIR (data/celeba) by hand; or
  - run with --demo, which needs no account.""",
    r"No module named '(\w+)": r"the module \1 is missing: pip install -r requirements.txt",
    "was not found|404 Client": "Kaggle answers 404: no such data set; check KAGGLE_DATASET",
    "rate limited|429 Client": "Kaggle answers 429: too many requests; wait an hour",
    "Server Error|Kaggle's side": "Kaggle answers that it has an error (500 or more); try later",
    "No space left": "No space left on the disk of DATA_DIR; make room there",
    "Connection|Timeout|Protocol": "Kaggle cannot be reached; check the network and run this again,"
    " which goes on where it stopped, or try --demo, which needs no network",
    # Any other words of its own stay unsaid, for they may hold credentials.
    "": "Kaggle's client has failed; to see why, run: kaggle datasets download KAGGLE_DATASET",
}
# A refusal by its storage, not by Kaggle itself, means that the signed address has expired.
DAMAGED = r"does not match expected size|4\d\d Client Error(?!.*/v1/)"
# What zipfile raises for an archive that is damaged.
ARCHIVE_ERRORS = (
    zipfile.BadZipFile,
    RuntimeError,
    EOFError,
    zlib.error,
    FileNotFoundError,
)


class DamagedDownload(Exception):
    """A download that may be whole after a new start."""


def download_celeba():
    """Download KAGGLE_DATASET into DATA_DIR, unless images are there.

    With the user's Kaggle credentials if they are good, else without. Raises SystemFailure if
    Kaggle, network or disk fail.
    """
    folder = Path(DATA_DIR)
    downloads = folder.with_name(folder.name + ".download")
    fill(folder, lambda part: fetch_celeba(downloads, part))
    shutil.rmtree(downloads, ignore_errors=True)


def fill(folder, put):
    """Unless `folder` has images, let `put(part)` fill a hidden folder in it.

    That one then gets a name, so that the images are there all at once or not at all.
    """

    def fill_part():
        part = folder / ".part"  # on the same disk, wherever a link or a mount leads
        with disk_errors(folder):
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            put(part)
            paths = list(part.iterdir())
            with suppress(OSError):  # some disks keep no times
                for path in paths:  # one time for all: a run can go on with a new download
                    os.utime(path, (time(), FILL_TIME))
            say(f"{len(paths):,} images in {folder}")
            part.rename(folder / "images")

    lock = folder.with_name(folder.name + ".lock")
    waiting = f"another process is filling {folder}; waiting for it"
    build_once(lambda: has_images(folder) or None, fill_part, lock, waiting)


def fetch_celeba(downloads, folder):
    """Put the images of KAGGLE_DATASET into `folder`, by way of `downloads`.

    What is in `downloads` is used: Kaggle's client goes on with what was cut.
    """
    archive = downloads / (KAGGLE_DATASET.split("/")[1] + ".zip")
    for last_try in (False, True):
        downloads.mkdir(parents=True, exist_ok=True)
        try:
            fetch_archive(archive)
            return unpack(archive, folder)
        except DamagedDownload as error:
            # If a signed address expires half-way, an error page is in the zip, and Kaggle's client
            # takes it for whole on every later run. So: away with it, and again from the start.
            shutil.rmtree(downloads, ignore_errors=True)
            what = f"Kaggle's archive of {KAGGLE_DATASET} is damaged ({error})"
            if last_try:
                raise SystemFailure(f"{what}; try later") from None
            say(f"{what}; starting again")


def fetch_archive(archive):
    """Download `archive`: with the user's credentials and, if those are no good, without.

    Raises DamagedDownload for what a new start may mend.
    """
    need_space(archive.parent, CELEBA_BYTES - file_size(archive), "CelebA")
    say(f"downloading {KAGGLE_DATASET} from Kaggle (CelebA is for non-commercial research)")
    for anonymous in (False, True):
        said = run_kaggle(archive, anonymous)
        if re.search(DAMAGED, said):
            raise DamagedDownload("its address has expired, or it is cut")
        if not re.search(f"{LOGIN_WANTED}|Traceback", said):
            break
    if said:
        for pattern, text in KAGGLE_ERRORS.items():
            if found := re.search(pattern, said):
                raise SystemFailure(found.expand(text))


def run_kaggle(archive, anonymous):
    """Let Kaggle's command line bring `archive`. Returns what it said if it failed, else "".

    One that brings nothing for KAGGLE_SECONDS is ended and, if it has brought anything before that,
    started again for the rest. Raises SystemFailure if it has not.
    """
    folder = archive.parent
    command = [sys.executable, "-c", KAGGLE_CHILD]
    command += ["datasets", "download", KAGGLE_DATASET, "-p", str(folder)]
    size_before = file_size(archive)
    log_path = folder / "kaggle.log"
    with open(log_path, "wb") as log:
        child = subprocess.Popen(
            command,
            env=kaggle_environment(folder, anonymous),
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
        )
    try:
        hung = not child_ends(child, archive, log_path)
    finally:
        child.kill()
        child.wait()
        child.stdin.close()
    said = re.sub(r"[^\n]*\r", "", read_log(log_path))  # without the progress bar
    if not hung:
        return f"{said}exit status {child.returncode}" if child.returncode else ""
    if "No space left" in said:  # which the client tries again and again
        return said
    silence = f"Kaggle has sent nothing for {KAGGLE_SECONDS} s"
    if file_size(archive) <= size_before:
        raise SystemFailure(
            f"{silence}; check the network and run this again, which goes on where it stopped, "
            "or try --demo, which needs no network"
        )
    say(f"{silence}; asking again for the rest")
    return run_kaggle(archive, anonymous)


def child_ends(child, archive, log_path):
    """Wait for a process that makes `archive` grow, and show its progress bar, which is in a log.

    Returns False when the archive has not grown for KAGGLE_SECONDS.
    """
    size, grew_at = file_size(archive), perf_counter()
    while child.poll() is None:
        with suppress(subprocess.TimeoutExpired):
            child.wait(timeout=0.5)
        if sys.stderr.isatty() or in_notebook():
            bar = read_log(log_path).rpartition("\r")[2]
            with suppress(OSError):  # the terminal may be gone
                print("\r" + bar.strip(), end="", file=sys.stderr, flush=True)
        if file_size(archive) != size:
            size, grew_at = file_size(archive), perf_counter()
        elif perf_counter() - grew_at > KAGGLE_SECONDS:
            return False
    return True


def read_log(path):
    return path.read_bytes().decode(errors="replace")


def kaggle_environment(folder, anonymous):
    """The environment for Kaggle's client; if `anonymous`, one in which it finds no credentials."""
    environment = {name: value.strip() for name, value in os.environ.items()}  # newlines stop it
    environment.pop("VERBOSE", None)  # would make it print the user's token
    if anonymous:
        for name in os.environ:
            if name.startswith("KAGGLE_") and name != "KAGGLE_API_ENVIRONMENT":
                del environment[name]
        environment.pop("XDG_CONFIG_HOME", None)
        environment["PYTHONUSERBASE"] = site.getuserbase()  # stays where it is, but home moves
        environment["HOME"] = environment["USERPROFILE"] = str(folder.resolve())
    return environment


def file_size(path):
    return path.stat().st_size if path.exists() else 0


def unpack(archive, folder):
    """Unpack CelebA's images, and nothing else, into `folder`.

    Of a member only the base name counts, which must be six digits and .jpg. Raises DamagedDownload
    if that cannot be.
    """
    try:
        with zipfile.ZipFile(archive) as source:
            members = {}
            for member in source.infolist():
                name = Path(member.filename).name
                if re.fullmatch(r"[0-9]{6}\.jpg", name):
                    members[name] = member
            if not members:
                raise SystemFailure(f"{KAGGLE_DATASET} has no images as CelebA's: 000001.jpg …")
            size = sum(member.file_size for member in members.values())
            need_space(folder, size, "unpacking CelebA")
            for name, member in progress_bar(members.items(), desc="unpacking", unit=" images"):
                (folder / name).write_bytes(source.read(member))
    except ARCHIVE_ERRORS as error:
        raise DamagedDownload(str(error)) from None


# What --demo changes.
DEMO = {
    "DATA_DIR": "data/demo",
    "OUTPUT_DIR": "output-demo",
    "EPOCHS": 12,
    "G_FEATURES": 32,
    "D_FEATURES": 32,
}


def draw_demo(folder):
    """Put 4,000 JPEGs of drawn faces into `folder`."""
    for index in progress_bar(range(4_000), desc="drawing", unit=" faces"):
        draw_face(random.Random(index)).save(folder / f"{index:06d}.jpg", quality=90)


def draw_face(rng):
    """A drawn face, 178 × 218 pixels as CelebA's are; `rng`, a random.Random, decides on it."""

    def shade(*colours):
        return tuple(
            level + rng.randint(-18, 13) for level in ImageColor.getrgb(rng.choice(colours))
        )

    skin = shade("#f2cdb2", "#deac8a", "#ba825f", "#80543c")
    hair = shade("#261c18", "#5c3a22", "#c49c5c", "#964624")
    iris = shade("#463223", "#466e96", "#507846")
    lips = shade("#be4650", "#a53c3c")
    image = Image.new("RGB", (178, 218), shade("#96b9d7", "#cdc8b9", "#5f6e69", "#cda5a5"))
    draw = ImageDraw.Draw(image, "RGBA")
    x, y = 89 + rng.uniform(-5, 5), 112 + rng.uniform(-4, 4)
    width, height = rng.uniform(43, 51), rng.uniform(58, 66)
    locks = y + height + rng.choice((-12, 30))
    draw.ellipse((x - width - 14, y - height - 16, x + width + 14, locks), hair)
    draw.rectangle((x - 19, y + 40, x + 19, 218), skin)
    draw.rectangle((x - 19, y + 40, x + 19, 218), "#00000028")  # in the shadow of the chin
    draw.ellipse((x - width, y - height, x + width, y + height), skin)
    fringe = y - height * rng.uniform(0.1, 0.4)
    draw.chord((x - width, y - height - 6, x + width, fringe), 175, 365, hair)
    for eye in (x + rng.uniform(-22, -18), x + rng.uniform(18, 22)):
        draw.ellipse((eye - 10, y - 12, eye + 10, y), "#faf8f4")
        draw.circle((eye, y - 6), 5.5, iris)
        draw.circle((eye, y - 6), 2.5, "black")
        draw.line((eye - 10, y - 21, eye + 10, y - 21), hair, 4)
    draw.line((x, y - 4, x - 4, y + 17, x + 4, y + 17), "#00000048", 3)
    smile = 12 * rng.random()
    draw.chord((x - 18, y + 34 - smile, x + 18, y + 38 + smile), 0, 180, lips)
    return image.filter(ImageFilter.GaussianBlur(1.2))


# ------------------------------------------------------------------------------ files and messages


class UserError(ValueError):
    """What a user can mend, in one line: a wrong call, setting or path.

    `status` is the exit status of the command line: 2, or 1 for a failure on the way.
    """

    def __init__(self, text, status=2):
        super().__init__(text)
        self.status = status


class SystemFailure(OSError):
    """A failure of network or disk, in one line."""

    status = 1


@contextmanager
def disk_errors(path):
    """Turn an OSError within `with` into a SystemFailure that names the file."""
    try:
        yield
    except SystemFailure:
        raise
    except OSError as error:
        text = f"{error.strerror or error}: {error.filename or path}"
        raise SystemFailure(text) from error


@contextmanager
def replacing(path, previous=None):
    """A file to write beside `path`, which takes its name when all is written.

    Until then the old file stays whole; then it becomes `previous`, if that is given.
    """
    part = path.with_name(path.name + ".part")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(part, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            if previous and path.exists():
                move(path, previous)
            move(part, path)
        finally:
            with suppress(OSError):
                part.unlink(missing_ok=True)


def move(path, to):
    """os.replace; on Windows a virus scanner can hold a file for a moment, so try again."""
    for _ in range(5 if sys.platform == "win32" else 0):
        with suppress(PermissionError):
            return os.replace(path, to)
        sleep(0.2)
    os.replace(path, to)


def write_file(path, write, previous=None):
    """Let `write(file)` replace `path`, by way of memory.

    To a full disk torch.save itself raises no OSError.
    """
    buffer = io.BytesIO()
    write(buffer)
    with replacing(path, previous) as file:
        file.write(buffer.getbuffer())


def need_space(folder, size, what):
    """Raise SystemFailure if the disk of `folder` has less than `size` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < size:
        raise SystemFailure(
            f"{what} needs {readable(size)} on the disk of {folder}, which has {readable(free)} "
            "free; make room there"
        )


def readable(size):
    """A number of bytes in words."""
    return f"{size / 2**30:.1f} GiB" if size > 2**29 else f"{size / 2**20:.1f} MiB"


def locked(path, waiting=None):
    """A context that holds the lock file `path`.

    If another process holds it, it says `waiting` and waits or, without such a text, raises
    SystemFailure.
    """
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            return FileLock(path).acquire(timeout=0)
        except Timeout:
            pass
        if waiting is None:
            raise SystemFailure(
                f"{path.parent} is in use by another run; wait for that one, or change OUTPUT_DIR"
            )
        say(waiting)
        return FileLock(path).acquire()


def build_once(find, build, lock, waiting):
    """What `find()` returns; while that is None, `build()` makes it, in one process alone."""
    found = find()
    if found is None:
        with locked(lock, waiting):
            found = find()
            if found is None:
                build()
                found = find()
    return found


def seed_for(*parts):
    """A seed, the same on any machine, that differs for each SEED and `parts`."""
    text = repr((SEED, *parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def in_notebook():
    """Whether this runs where pictures can be shown."""
    return "IPython" in sys.modules and hasattr(sys.modules["IPython"].get_ipython(), "kernel")


def show(picture, place=None):
    """In a notebook, show a PIL picture: in `place`, or in a new place, which is returned."""
    if in_notebook():
        from IPython.display import display

        if place is None:
            return display(picture, display_id=True)
        place.update(picture)
    return place


def progress_bar(*args, **options):
    """A tqdm bar, in a notebook a notebook's; none where nobody would see it."""
    with warnings.catch_warnings(action="ignore"):  # of missing ipywidgets
        from tqdm import auto
    hidden = RANK > 0 or not (sys.stderr.isatty() or in_notebook())
    return auto.tqdm(*args, disable=hidden, dynamic_ncols=True, **options)


def say(text):
    """Print a line, above any progress bar, on rank 0."""
    if RANK > 0:
        return
    with suppress(OSError, ValueError):  # a terminal that is gone stops nobody
        tqdm.write(text)
        sys.stdout.flush()


def one_line(error):
    """An error, or other text, in one line that is not too long."""
    return re.sub(r"\s+", " ", str(error))[:120] or type(error).__name__


# ------------------------------------------------------------------------------------ command line


class Number(NamedTuple):
    """A number of type `kind`, from `low` to `high`, both included."""

    kind: type
    low: float
    high: float
    help: str = ""
    optional: bool = False

    def parse(self, value):
        """`value`, a number or the text of one, as `kind`. Raises ValueError or the like."""
        number = self.kind(value)
        exact = isinstance(value, str) or (number == value and not isinstance(value, bool))
        if not exact or not self.low <= number <= self.high:
            raise ValueError
        return number

    def allowed(self):
        whole = "whole " if self.kind is int else ""
        return f"a {whole}number from {self.low:,} to {self.high:,}"


class Text(NamedTuple):
    """Text that has the form of `pattern`: a path if no other is given."""

    help: str
    form: str = "a path"
    pattern: str = r"[^\0]+"
    optional: bool = False

    def parse(self, value):
        text = os.fspath(value)
        os.fsencode(text)  # raises ValueError if no file can have this name
        if not re.fullmatch(self.pattern, text):
            raise ValueError
        return text

    def allowed(self):
        return self.form


class Size(Number):
    """A number of pixels a side that the networks can have."""

    def parse(self, value):
        number = super().parse(value)
        if number not in (32, 64, 128, 256):
            raise ValueError
        return number

    def allowed(self):
        return "32, 64, 128 or 256"


SETTING_GROUPS: dict[str, dict] = {
    "data": {
        "IMAGE_SIZE": Size(int, 32, 256, "pixels a side"),
        "BATCH_SIZE": Number(int, 2, 65_536, "images a step, over all processes"),
        "MAX_IMAGES": Number(int, 1, 10**9, "train on the first N images", optional=True),
        "WORKERS": Number(int, 0, 1_024, "processes that decode the JPEGs", optional=True),
    },
    "networks": {
        "LATENT_SIZE": Number(int, 1, 65_536, "length of the noise that a face is made from"),
        "G_FEATURES": Number(int, 4, 1_024, "the generator's feature maps next to the image"),
        "D_FEATURES": Number(int, 4, 1_024, "the discriminator's; fewer make it weaker"),
    },
    "training": {
        "EPOCHS": Number(int, 1, 10**6, "passes over the images; raise it to go on"),
        "LEARNING_RATE": Number(float, 0, 1, "of both AdamWs"),
        "D_LEARNING_RATE": Number(float, 0, 1, "the discriminator's own", optional=True),
        "BETA1": Number(float, 0, 0.999, "AdamW's momentum"),
        "BETA2": Number(float, 0, 0.99999, "AdamW's memory of squared gradients"),
        "WEIGHT_DECAY": Number(float, 0, 1, "AdamW's weight decay"),
        "REAL_LABEL": Number(float, 0.5, 1, "target for real images; 0.9 holds D back"),
        "R1_GAMMA": Number(float, 0, 1_000, "weight of D's gradient penalty, which holds it back"),
        "AVERAGE_SHARE": Number(float, 0, 1, "the average's half-life, of the images seen"),
        "SEED": Number(int, 0, 2**63 - 1, "decides weights, noise and the order of images"),
    },
    "reporting": {
        "LOG_EVERY": Number(int, 1, 10**6, "steps to a row of metrics.csv"),
        "CHECKPOINT_MINUTES": Number(float, 0, 10**6, "minutes of work that can be lost at most"),
    },
    "hardware": {
        "DEVICE": Text(
            "where to train; without it, on the best that is there",
            form="cpu, mps, cuda or cuda:1",
            pattern=r"cpu|mps|cuda(:\d+)?",
            optional=True,
        ),
        "PRECISION": Text(
            "of the networks' arithmetic; without it, the device's fastest",
            form="float32, bfloat16 or float16",
            pattern="float32|bfloat16|float16",
            optional=True,
        ),
    },
    "places": {
        "DATA_DIR": Text("a folder of images, at any depth"),
        "CACHE_DIR": Text("for decoded images"),
        "OUTPUT_DIR": Text("for all else that a run writes"),
        "KAGGLE_DATASET": Text("on kaggle.com", form="owner/name", pattern=r"[\w-]+/[\w-]+"),
    },
}
SETTINGS = {name: setting for group in SETTING_GROUPS.values() for name, setting in group.items()}
ARGUMENTS = {
    "num_images": Number(int, 1, 10**9),
    "num_faces": Number(int, 2, 1_000),
    "frames": Number(int, 1, 1_000),
    "seed": Number(int, 0, 2**63 - 1),
    "truncation": Number(float, 0, 1),
}
COUNT = Number(int, 0, 10**15)  # of epochs, steps or images


def setting_values():
    """{name: value} of the settings, as they are now."""
    return {name: globals()[name] for name in SETTINGS}


def flag(name):
    return "--" + name.lower().replace("_", "-")


def checked(name, value):
    """`value` of a setting or argument, which may be the text of a flag, as its type.

    Raises UserError, with what is allowed.
    """
    kind = SETTINGS.get(name) or ARGUMENTS[name]
    if kind.optional and value in (None, "None", "none"):
        return None
    try:
        return kind.parse(value)
    except (TypeError, ValueError, OverflowError):
        allowed = kind.allowed() + (" or None" if kind.optional else "")
        given = one_line(repr(value))
        raise UserError(f"{name} ({flag(name)}) is {given}; it must be {allowed}") from None


def check_settings():
    """Check every setting before any work is done. Raises UserError."""
    for name in SETTINGS:
        globals()[name] = checked(name, globals()[name])
    data, output = Path(DATA_DIR).resolve(), Path(OUTPUT_DIR).resolve()
    if data in (output, *output.parents):
        raise UserError(
            f"OUTPUT_DIR ({OUTPUT_DIR}) lies in DATA_DIR ({DATA_DIR}); move it, or samples are "
            "trained on"
        )
    if BATCH_SIZE % WORLD_SIZE:
        raise UserError(
            f"BATCH_SIZE is {BATCH_SIZE}; it must be a multiple of the {WORLD_SIZE} processes"
        )


class Parser(argparse.ArgumentParser):
    """argparse's, but an error is a UserError of one line, and no flag may be shortened.

    `known` are the flags of all parsers. One that is not among them is named, since argparse would
    take its value for a command and complain about that.
    """

    known: set[str] = set()

    def __init__(self, **options):
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(allow_abbrev=False, formatter_class=form, **options)

    def parse_args(self, words):
        for word in words:
            if word.startswith("--") and word.partition("=")[0] not in self.known:
                self.error(f"there is no flag {word}")
        return super().parse_args(words)

    def error(self, message):
        raise UserError(f"{one_line(message)}; see {self.prog} --help")


def command_line():
    """The parser: a flag for each setting, and the commands with flags of their own."""
    about = __doc__.partition("\n\nThe method")[0]
    parser = Parser(prog="dcgan.py", usage="dcgan.py [command] [flags]", description=about)
    parser.set_defaults(command=train)
    parser.add_argument(
        "--demo",
        action="store_true",
        help="train on faces that the script draws, in minutes",
    )
    commands = parser.add_subparsers(
        title="commands, in place of training", metavar="command", prog="dcgan.py"
    )

    draw = add_command(commands, generate)
    add_argument(draw, generate, "num_images", "how many faces")
    add_argument(draw, generate, "truncation", "of the noise; under 1: surer faces, more alike")
    add_argument(draw, generate, "output", "where to save the grid or the files")
    add_argument(draw, generate, "individual", "a PNG for each image", action="store_true")

    walk = add_command(commands, interpolate)
    add_argument(walk, interpolate, "num_faces", "how many faces")
    add_argument(walk, interpolate, "frames", "pictures from one face to the next")
    add_argument(walk, interpolate, "output", "where to save the film")

    judge = add_command(commands, evaluate)
    add_argument(judge, evaluate, "num_images", "how many new faces")
    add_argument(judge, evaluate, "inception_weights", "a file, in place of a download")
    add_settings(judge, ("MAX_IMAGES", "WORKERS", "DATA_DIR", "CACHE_DIR"))

    add_settings(parser, SETTINGS)
    for one in (parser, draw, walk, judge):
        Parser.known.update(one._option_string_actions)
    return parser


def add_command(commands, function):
    """A parser for a command that calls `function`."""
    about = inspect.getdoc(function)
    name, first_line = function.__name__, about.splitlines()[0]
    parser = commands.add_parser(name, help=first_line, description=about)
    parser.set_defaults(command=function)
    add_argument(parser, function, "checkpoint", "a checkpoint.pt or generator.pt to draw with")
    add_argument(parser, function, "seed", "the same seed draws the same faces")
    add_settings(parser, ("OUTPUT_DIR", "DEVICE", "PRECISION"))
    return parser


def add_argument(parser, function, name, text, **options):
    """A flag for an argument of `function`, with the default that it has there."""
    default = inspect.signature(function).parameters[name].default
    if default is not None and default is not False:
        text = f"{text} [{default}]"
    parser.add_argument(flag(name), default=default, help=text, **options)


def add_settings(parser, names):
    """Flags for these settings, grouped, with range and default."""
    for title, group in SETTING_GROUPS.items():
        section = parser.add_argument_group(title)
        for name, setting in group.items():
            if name in names:
                default = globals()[name]
                text = f"{setting.help}; {setting.allowed()}"
                if default is not None:
                    text = f"{text} [{default}]"
                section.add_argument(flag(name), dest=name, default=argparse.SUPPRESS, help=text)


# What PyTorch says where a device lacks an operation, in this precision or with so little memory.
UNSUPPORTED = (
    "implemented for the .* device|Could not run 'aten::|not implemented for '(Half|BFloat16)'"
    "|unable to find an engine"
)


def main(argv=None):
    """The command line. Returns the exit status: 0, 1 for a failure, 2 for a wrong call.

    After a signal it is 128 and the signal's number. What nobody but an editor of this file can
    mend keeps its traceback.
    """
    settings_before = setting_values()
    try:
        words = sys.argv[1:] if argv is None else argv
        options = vars(command_line().parse_args(words))
        command = options.pop("command")
        flags = {name: options.pop(name) for name in SETTINGS if name in options}
        if options.pop("demo"):
            globals().update(DEMO)
        globals().update(flags)
        command(**options)
        return 0
    except KeyboardInterrupt as interrupt:
        return 128 + (interrupt.args[0] if interrupt.args else signal.SIGINT)
    except (UserError, SystemFailure) as error:
        return complain(error, error.status)
    except (RuntimeError, MemoryError) as error:  # mostly PyTorch's
        if out_of_memory(error):
            return complain(
                f"{memory_left(error)} ({one_line(error)}); lower BATCH_SIZE or IMAGE_SIZE, "
                "or ask for fewer images"
            )
        if re.search(UNSUPPORTED, str(error)):
            cure = "try --precision float32, a lower BATCH_SIZE or --device cpu"
            return complain(f"{one_line(error)}; {cure}")
        if WORLD_SIZE > 1 and re.search("gloo|nccl|connect|peer", str(error), re.IGNORECASE):
            return complain(f"process {RANK} has lost the others ({one_line(error)})")
        raise
    finally:
        globals().update(settings_before)


def out_of_memory(error):
    """Whether `error` was raised because the memory of a device or a CPU is full."""
    full = re.search("out of memory|DefaultCPUAllocator|ALLOC_FAILED", str(error))
    return bool(full) or isinstance(error, MemoryError)


def memory_left(error):
    """Which memory is full, and how much of a GPU's is free, in words."""
    if not torch.cuda.is_available() or not re.search("CUDA|HIP", str(error)):
        return "out of memory"
    free, total = torch.cuda.mem_get_info()
    name = torch.cuda.get_device_name()
    return f"out of memory: {readable(free)} of {readable(total)} are free on the {name}"


def complain(text, status=1):
    """Print an error in its one line, and return the exit status."""
    print(f"dcgan.py: error: {text}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
