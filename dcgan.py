"""Train a DCGAN on CelebA with one command, then generate new faces with it.

    pip install -r requirements.txt
    python dcgan.py                            # download CelebA, train, save samples
    python dcgan.py --demo                     # a small run in minutes, on cartoon faces
    python dcgan.py generate --num-images 16   # new faces
    python dcgan.py interpolate                # an animation that moves from face to face
    python dcgan.py evaluate                   # FID, KID, precision and recall
    torchrun --nproc-per-node 4 dcgan.py --batch-size 512    # train on four GPUs

In a notebook: import dcgan; dcgan.EPOCHS = 2; dcgan.train(); dcgan.generate_images(num_images=16)

The method: Radford, Metz, Chintala, "Unsupervised Representation Learning with Deep Convolutional
Generative Adversarial Networks", 2015, https://arxiv.org/abs/1511.06434.

The sections of this file, in order (dependencies between two sections go one way only):

    settings                   the constants to edit
    networks                   generator and discriminator
    training step              losses, optimizers, the average of the generator
    hardware                   device, precision, the step as a CUDA graph, full memory
    several processes          what differs under torchrun
    data                       images decoded once into a cache, and batches of them
    records                    rows of metrics.csv and quality.csv; saving and restoring values
    checkpoints                reading and writing them
    pictures and advice        grids, animations, curves, the distance to real faces
    training                   the run: epochs, reports, samples, signals
    using a trained generator  generate and interpolate
    evaluate                   FID and the like, by torch-fidelity
    where images come from     Kaggle, zips, or cartoon faces for the demo
    files and messages         errors, safe writing, locks, printing
    ranges of the settings     what each setting is and may be
    command line               flags, commands, exit statuses

Measured on two cores of an Intel Xeon (bfloat16 by AMX, PyTorch 2.14.1) at 64 pixels with
batches of 64: 209 images per second, 2.5 times as many as a plain float32 DCGAN.
"""

# For `uv run dcgan.py`, which needs no installation: the same packages as in requirements.txt. On
# Windows, PyTorch with CUDA comes from its own index.
#
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch>=2.11",
#     "torch>=2.14; sys_platform == 'darwin'",
#     "torchvision>=0.26",
#     "matplotlib>=3.9",
#     "tqdm>=4.66",
#     "pillow>=10.1",
#     "kaggle>=2.2",
#     "six>=1.16",
# ]
#
# [tool.uv.sources]
# torch = { index = "pytorch", marker = "sys_platform == 'win32'" }
# torchvision = { index = "pytorch", marker = "sys_platform == 'win32'" }
#
# [[tool.uv.index]]
# name = "pytorch"
# url = "https://download.pytorch.org/whl/cu130"
# explicit = true
# ///

import argparse
import copy
import csv
import ctypes
import difflib
import errno
import hashlib
import importlib.util
import inspect
import io
import math
import multiprocessing
import os
import random
import re
import shlex
import shutil
import signal
import site
import subprocess
import sys
import tempfile
import threading
import warnings
import zipfile
from collections import Counter
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from datetime import timedelta
from operator import call
from pathlib import Path
from statistics import fmean
from time import perf_counter, sleep
from typing import NamedTuple
from urllib.error import URLError

try:
    import numpy as np
    import torch
    import torch.distributed as dist
    import torch.nn.functional as F
    from filelock import FileLock, Timeout
    from PIL import Image, ImageDraw, ImageFilter, ImageOps
    from torch import nn
    from torch.optim.swa_utils import get_ema_multi_avg_fn, update_bn
    from torch.utils.data import DataLoader, Dataset
    from torchvision.datasets import ImageFolder
    from torchvision.transforms.functional import center_crop, pil_to_tensor, to_pil_image
    from torchvision.utils import make_grid
    from tqdm import tqdm

    if torch.__version__ < "2.11":
        raise ImportError(f"PyTorch 2.11 or newer is needed, and this is {torch.__version__}")
except ImportError as error:
    if __name__ != "__main__":
        raise
    sys.exit(f"dcgan.py: error: {error}; run {sys.executable} -m pip install -r requirements.txt")

# ---------------------------------------------------------------------------------------- settings
# Edit these lines, or use flags: BATCH_SIZE is --batch-size. The comments give the reason for each
# value. What a setting is, and its range, is in SETTING_GROUPS below, and in --help.

# Data
IMAGE_SIZE = 64  # as in the paper; doubling it takes three to five times as long
BATCH_SIZE = 64  # 32 learns more from each image in short runs, but is slower
MAX_IMAGES = None  # all images
MIRROR = True  # doubles the images; False where left and right differ, as in letters and logos
AUGMENT = None  # 0.3 for up to 200 images, which a discriminator would memorise; 0 from 1,000
WORKERS = None  # one per core
SKIP_BROKEN = False  # many broken images may mean that a download or a disk has failed

# Networks
LATENT_SIZE = 100  # as in the paper
G_FEATURES = 64  # the paper's 128 is slower; layers farther from the image have more
D_FEATURES = 64  # fewer make the discriminator weaker
ATTRIBUTES = None  # as in the paper; Male,Smiling lets you choose them for each face you generate

# Training
EPOCHS = 20  # enough for CelebA; a higher number continues a finished run
LEARNING_RATE = 5e-4  # gives better faces than 2e-4 in the same time
D_LEARNING_RATE = None  # the same as LEARNING_RATE
BETA1 = 0.0  # the paper's 0.5 learns more slowly; with 0.9 the discriminator wins
BETA2 = 0.999  # PyTorch's default
WEIGHT_DECAY = 0.01  # PyTorch's default
REAL_LABEL = 1.0  # 0.9 keeps the discriminator from being too sure
R1_GAMMA = 0.0128  # with 0, the discriminator wins in long runs; 0.1 helps in short ones only
AVERAGE_SHARE = 0.1  # less gives noisier faces; more lets early weights linger
SEED = 0  # any other number gives another run

# Reporting
LOG_EVERY = 20  # often enough for curves; for each row, the CPU waits for the GPU
CHECKPOINT_MINUTES = 10.0  # a crash loses no more work than this

# Hardware
DEVICE = None  # the best available
PRECISION = None  # the fastest on the device

# Places
CELEBA = "jessicali9530/celeba-dataset"  # needs no account
CELEBA_DIR = "data/celeba"
KAGGLE_DATASET = CELEBA  # another one gets a folder of its own below data/kaggle
DATA_DIR = CELEBA_DIR  # for your own photos, give their folder, or a zip of them
CACHE_DIR = "data/cache"  # holds 2.3 GiB for all of CelebA at 64 pixels
OUTPUT_DIR = "output"  # one folder per run


def launcher_number(name, default):
    """A number that torchrun puts into the environment. `check_launcher` refuses a wrong one."""
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else default


WORLD_SIZE = launcher_number("WORLD_SIZE", 1)  # number of processes
RANK = launcher_number("RANK", 0)  # number of this process; 0 draws, logs and saves

# ---------------------------------------------------------------------------------------- networks


def layer_widths(features, image_size):
    """Channels per layer, starting next to the image: [64, 128, 256, 512] at 64 pixels."""
    levels = int(math.log2(image_size)) - 2
    return [features * min(8, 2**level) for level in range(levels)]


class Generator(nn.Module):
    """Noise (N, latent_size, 1, 1) to images (N, 3, S, S) in [-1, 1]. Shapes are for 64 pixels.

    With attributes, their labels are part of the noise: 1 for what the face has, else -1.
    """

    def __init__(self, image_size, latent_size, features):
        super().__init__()
        widths = layer_widths(features, image_size)[::-1]
        layers = [nn.ConvTranspose2d(latent_size, widths[0], 4, 1, 0, bias=False)]  # (N, 512, 4, 4)
        for inner, outer in zip(widths, [*widths[1:], 3]):
            layers += [nn.BatchNorm2d(inner), nn.ReLU(inplace=True)]
            # in turn (N, 256, 8, 8), (N, 128, 16, 16), (N, 64, 32, 32), (N, 3, 64, 64)
            layers += [nn.ConvTranspose2d(inner, outer, 4, 2, 1, bias=outer == 3)]
        self.layers = nn.Sequential(*layers, nn.Tanh())
        self.apply(init_weights)

    def forward(self, latents):
        return self.layers(latents)


class Discriminator(nn.Module):
    """Images (N, 3, S, S) in [-1, 1] to float32 logits (N,) of the probability of "real".

    With attributes, it has one more logit for each. These, times the image's labels (N, A), are
    added ("projection discriminator", Miyato, Koyama 2018, https://arxiv.org/abs/1802.05637), so an
    image that does not fit its labels looks fake.
    """

    def __init__(self, image_size, features, attributes=0):
        super().__init__()
        widths = layer_widths(features, image_size)
        layers = []
        for outer, inner in zip([3, *widths], widths):
            # in turn (N, 64, 32, 32), (N, 128, 16, 16), (N, 256, 8, 8), (N, 512, 4, 4)
            layers += [nn.Conv2d(outer, inner, 4, 2, 1, bias=outer == 3)]
            if outer != 3:
                layers += [nn.BatchNorm2d(inner)]
            layers += [nn.LeakyReLU(0.2, inplace=True)]
        layers += [nn.Conv2d(widths[-1], 1 + attributes, 4, 1, 0), nn.Flatten()]  # (N, 1 + A)
        self.layers = nn.Sequential(*layers)
        self.apply(init_weights)
        with torch.no_grad():
            self.layers[-2].weight[1:] = 0  # many attributes would make the first logits huge

    def forward(self, images, labels=None):
        logits = self.layers(images).float()
        if logits.shape[1] > 1:
            logits = logits[:, 0] + (labels * logits[:, 1:]).sum(1)
        return logits.flatten()


def init_weights(module):
    """Initial weights as in the paper's code: convolutions N(0, 0.02), gains N(1, 0.02)."""
    if hasattr(module, "weight"):
        mean = 1.0 if isinstance(module, nn.BatchNorm2d) else 0.0
        nn.init.normal_(module.weight, mean, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


NO_LABELS = torch.zeros(1, 0, dtype=torch.int8)  # a row of labels without attributes


def with_labels(noise, labels):
    """What a generator draws from: noise (N, z, 1, 1), and labels (N, A) as further channels."""
    if labels.shape[-1] == 0:
        return noise
    return torch.cat([noise, labels[..., None, None].to(noise.dtype)], -3)


@torch.no_grad()
def images_from(generator, latents, dtype):
    """Images (N, 3, H, W) in [0, 1] from `latents` (N, z + A, 1, 1), on the same device."""
    with autocast(latents.device, dtype):
        images = generator(latents)
    return images.float().add(1).div(2).clamp(0, 1)


def build_generator(state):
    """The averaged generator in a checkpoint: `state` is what `read_checkpoint` returns.

    It is on the CPU. Raises RuntimeError if its weights do not fit the settings saved with them.
    """
    settings = state["settings"]
    latent_size = settings["LATENT_SIZE"] + len(state["attributes"])
    with torch.device("meta"):  # takes no memory: a bad file could ask for a huge network
        generator = Generator(settings["IMAGE_SIZE"], latent_size, settings["G_FEATURES"])
    # A plain dict has no _metadata, in which PyTorch would keep `assign` for later loads.
    generator.load_state_dict(dict(state["average"]), assign=True)
    return generator.float().eval().requires_grad_(False)


# ----------------------------------------------------------------------------------- training step

R1_INTERVAL = 32  # the R1 penalty is slow, so only every 32nd step has it, 32 times as strong


def bce(logits, target):
    """Binary cross-entropy on float32 logits.

    Not on probabilities: a saturated sigmoid has no gradient, so a discriminator that is sure and
    wrong could not learn.
    """
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, target))


def training_images(faces, flips):
    """`faces`, uint8 (N, 3, H, W), as images in [-1, 1], mirrored where `flips` (N, 1, 1, 1)."""
    images = torch.where(flips, faces.flip(3), faces)
    layout = memory_format(faces.device)
    return images.to(torch.float32, memory_format=layout).mul_(2 / 255).sub_(1)


def augment(images, changes):
    """Change the colours and the place of `images` (N, 3, S, S) in [-1, 1], each by its `changes`.

    Those are five numbers per image in [-1, 1], (N, 5); 0 changes nothing. The discriminator sees
    real images and fakes changed in the same way, so it cannot memorise a small set. The gradient
    passes through the changes, so the generator does not learn to draw them ("DiffAugment", Zhao
    et al. 2020, https://arxiv.org/abs/2006.10738).
    """
    brightness, saturation, contrast, down, right = changes[..., None, None, None].unbind(1)
    images = images + brightness / 2
    grey = images.mean(1, keepdim=True)
    images = grey.lerp(images, 1 + saturation)
    mean = images.mean((1, 2, 3), keepdim=True)
    images = mean.lerp(images, 1 + contrast / 2)
    # A product with a shifted identity matrix moves rows or columns by up to an eighth.
    size = images.shape[-1]
    here = torch.arange(size, device=images.device)
    there = here[:, None]
    rows = there == here + (down * size / 8).round()
    columns = there + (right * size / 8).round() == here
    return rows.to(images.dtype) @ images @ columns.to(images.dtype)


class Trainer:
    """Both networks, their optimizers, and the averaged generator, which draws all samples."""

    networks = ("generator", "discriminator", "average")
    optimizers = ("generator_optimizer", "discriminator_optimizer")
    saved = (*networks, *optimizers, "images", "totals")

    def __init__(self, device, dtype, labels=NO_LABELS):
        """`labels`: (M, A), those of some training images."""
        self.device = device
        self.dtype = dtype
        self.labels = labels
        attributes = labels.shape[1]
        torch.manual_seed(seed_for("weights"))
        self.generator = Generator(IMAGE_SIZE, LATENT_SIZE + attributes, G_FEATURES)
        self.discriminator = Discriminator(IMAGE_SIZE, D_FEATURES, attributes)
        # Before the optimizers see them: fused AdamW is silently wrong where weights and moments
        # differ in memory format.
        for network in (self.generator, self.discriminator):
            network.to(device, memory_format=memory_format(device))
        # Copied before data_parallel: SyncBatchNorm would need all processes to draw.
        self.average = copy.deepcopy(self.generator).eval().requires_grad_(False)
        self.generator_optimizer = ScaledAdamW(self.generator, LEARNING_RATE, dtype)
        d_rate = LEARNING_RATE if D_LEARNING_RATE is None else D_LEARNING_RATE
        self.discriminator_optimizer = ScaledAdamW(self.discriminator, d_rate, dtype)
        # What the step calls: the same networks or, with several processes, their DDP wrappers.
        self.ddp_generator = data_parallel(self.generator, device)
        self.ddp_discriminator = data_parallel(self.discriminator, device)
        self.graph = StepGraph(self) if device.type == "cuda" and WORLD_SIZE == 1 else None
        self.images = 0  # real images seen so far
        self.refreshed_at = -1  # `images` at the last refresh_batchnorm of the average
        # Sums of loss_d, loss_g, D(x), D(G(z)), and how many have been added up.
        self.totals = torch.zeros(5, device=device)
        self.one = torch.ones((), device=device)  # the count of one step

    @torch.no_grad()
    def start_grey(self):
        """Make the weights of the three colours equal, before the first step.

        On grey images their gradients are equal as well, so all samples come out grey.
        """
        first, last = self.discriminator.layers[0], self.generator.layers[-2]
        for layer in (first, last, self.average.layers[-2]):
            layer.weight[:, 1:] = layer.weight[:, :1]

    def step(self, faces, flips, latents, with_penalty=False, changes=None):
        """One step of the discriminator, then one of the generator, on the same fakes.

        `faces`: uint8 (N, 3, H, W); `flips`, which of them to mirror: bool (N, 1, 1, 1); `latents`:
        noise, and the labels of the faces, which the fakes get as well: (N, z + A, 1, 1);
        `changes` by `augment` of reals and fakes: (N, 2, 5), or None.

        Careful when you edit this: on CUDA it runs a few times, is then captured as a CUDA graph,
        and from then on only replayed. Python numbers keep the value they had at the capture, and
        print() stops printing. Tensors behave as usual.
        """
        reals = training_images(faces, flips)
        labels = latents[:, LATENT_SIZE:].flatten(1)

        # Discriminator: minimise -log D(x) - log(1 - D(G(z))).
        with autocast(self.device, self.dtype):
            fakes = self.ddp_generator(latents)
        if changes is not None:  # not in half precision, in which pixels would be rounded
            reals = augment(reals, changes[:, 0])
            fakes = augment(fakes, changes[:, 1])
        # Two calls, so that reals and fakes are each normalised by their own statistics.
        with autocast(self.device, self.dtype):
            real_logits = self.ddp_discriminator(reals, labels)
            fake_logits = self.ddp_discriminator(fakes.detach(), labels)
        loss_d = bce(real_logits, REAL_LABEL) + bce(fake_logits, 0.0)
        penalised = loss_d
        if with_penalty:
            penalty = self.gradient_penalty(reals, labels)
            penalised = loss_d + R1_INTERVAL * R1_GAMMA / 2 * penalty
        self.discriminator_optimizer.step(penalised)

        # Generator: minimise -log D(G(z)), judged by the updated discriminator. This needs no
        # gradients of the discriminator's weights, so that is called without its DDP wrapper.
        self.discriminator.requires_grad_(False)
        with autocast(self.device, self.dtype):
            judged = self.discriminator(fakes, labels)
        loss_g = bce(judged, 1.0)
        self.generator_optimizer.step(loss_g)
        self.discriminator.requires_grad_(True)

        d_real = real_logits.sigmoid().mean()
        d_fake = fake_logits.sigmoid().mean()
        values = torch.stack([loss_d, loss_g, d_real, d_fake, self.one]).detach()
        self.totals += sum_over_processes(values)  # in every step: a checkpoint may follow

    def step_on(self, batch, with_penalty):
        """`step` on a batch of `Batches`, which may have no changes."""
        faces, flips, latents, *changes = batch
        self.step(faces, flips, latents, with_penalty, *changes)

    def gradient_penalty(self, reals, labels=None):
        """R1: the mean squared norm of the gradient of the discriminator's logit at real images.

        It keeps the discriminator from being too sure (Mescheder, Geiger, Nowozin 2018,
        https://arxiv.org/abs/1801.04406). BatchNorm uses its running statistics here, so that each
        logit depends on its own image only. (In train mode, the backward of SyncBatchNorm cannot be
        differentiated again.)
        """
        reals = reals.detach().requires_grad_()
        self.discriminator.eval()
        with autocast(self.device, self.dtype):
            logits = self.discriminator(reals, labels)
        self.discriminator.train()
        # Not of logits.sum(), whose expanded gradient is wrong on a Mac (PyTorch issue 180201).
        ones = torch.ones_like(logits)
        (gradients,) = torch.autograd.grad(logits, reals, ones, create_graph=True)
        return gradients.square().sum((1, 2, 3)).mean()

    def advance(self, *batch):
        """Do `step` on a batch, by the CUDA graph if there is one; then update the average."""
        with_penalty = R1_GAMMA > 0 and (self.images // BATCH_SIZE) % R1_INTERVAL == 0
        if with_penalty:  # the only use of BatchNorm's running statistics in training
            broadcast_batchnorm(self.discriminator)
        if self.graph is None:
            self.step_on(batch, with_penalty)
        else:
            self.graph.step(batch, with_penalty)
        self.images += BATCH_SIZE
        self.update_average()

    def update_average(self):
        """Move the average's weights towards the generator's.

        The half-life is a share of the images seen, so that early weights do not linger.
        """
        half_life = AVERAGE_SHARE * self.images
        keep = 0.5 ** (BATCH_SIZE / half_life) if half_life else 0.0
        averages, weights = self.average.parameters(), self.generator.parameters()
        get_ema_multi_avg_fn(keep)(list(averages), list(weights), None)  # it ignores the None

    def averaged_generator(self):
        """The average with up-to-date BatchNorm statistics: ready to draw or to save."""
        if self.refreshed_at != self.images:
            refresh_batchnorm(self.average, self.labels)
            self.refreshed_at = self.images
        return self.average

    def draw(self, latents):
        """Images (N, 3, H, W) in [0, 1] by the averaged generator, from (N, z + A, 1, 1)."""
        return images_from(self.averaged_generator(), latents.to(self.device), self.dtype)

    def take_means(self):
        """The means since the last call: loss_d, loss_g, D(x), D(G(z)).

        With one GPU, the only place in the training loop where the CPU waits for it.
        """
        *sums, steps = self.totals.tolist()
        self.totals.zero_()
        return [total / steps for total in sums]

    def abandon_step(self):
        """Undo what an unfinished step leaves behind."""
        self.generator_optimizer.abandon_step()
        self.discriminator_optimizer.abandon_step()
        self.discriminator.train().requires_grad_(True)


def refresh_batchnorm(generator, labels=NO_LABELS):
    """Compute BatchNorm's statistics from the weights, on 16 batches of noise with a fixed seed.

    `labels`: (M, A), those of some training images.

    Averaging the statistics would be wrong: averaged weights produce smaller activations than the
    weights they average, and faces would come out smooth and pale. Returns `generator`.
    """
    rng = torch.Generator().manual_seed(0)
    latent_size = generator.layers[0].in_channels - labels.shape[1]
    noise = torch.randn(16, 64, latent_size, 1, 1, generator=rng)
    latents = with_labels(noise, labels[torch.randint(len(labels), (16, 64), generator=rng)])
    update_bn(latents, generator, next(generator.parameters()).device)  # iterates over batches
    return generator


class ScaledAdamW:
    """AdamW for one network, and a gradient scaler.

    Only float16 uses the scaler: small gradients would become 0 there. Each network has a scaler of
    its own, because one network may skip a step that the other one takes.
    """

    def __init__(self, network, rate, dtype):
        device = next(network.parameters()).device
        self.adamw = torch.optim.AdamW(
            network.parameters(),
            torch.tensor(rate, device=device),  # a tensor, so that a CUDA graph sees it change
            betas=(BETA1, BETA2),
            weight_decay=WEIGHT_DECAY,
            fused=True,
            capturable=device.type == "cuda",
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    def step(self, loss):
        """One step down the gradient of `loss`."""
        self.adamw.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.adamw)
        self.scaler.update()

    def abandon_step(self):
        """Remove what an unfinished step leaves behind: gradients, and the scaler's record."""
        self.adamw.zero_grad(set_to_none=True)
        for name in ("grad_scale", "found_inf"):  # GradScaler.step lends them to the optimizer
            vars(self.adamw).pop(name, None)
        self.scaler.update(self.scaler.get_scale())  # keeps the scale, and clears the record

    def state_dict(self):
        return {"moments": self.adamw.state_dict()["state"], "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state):
        """Restore the moments and the scale. Rates and betas stay as today's settings say."""
        self.adamw.load_state_dict(self.adamw.state_dict() | {"state": state["moments"]})
        for parameter, moments in self.adamw.state.items():
            for name in ("exp_avg", "exp_avg_sq"):  # they need the weights' memory format
                moments[name] = torch.empty_like(parameter).copy_(moments[name])
            moments["step"] = moments["step"].reshape(())  # a damaged one could have any shape
        if state["scaler"]:  # ignored by a scaler that is not in use
            self.scaler.load_state_dict(state["scaler"])


# ---------------------------------------------------------------------------------------- hardware


def pick_device():
    """DEVICE or the best available, ready to use. Raises UserError if it cannot be used."""
    best = torch.accelerator.current_accelerator(check_available=True)
    kind = best.type if best else "cpu"
    if kind == "mps" and WORLD_SIZE > 1:
        kind = "cpu"  # processes cannot share gradients on MPS
    device = torch.device(DEVICE or kind)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", launcher_number("LOCAL_RANK", 0))
    elif device.index is not None and WORLD_SIZE > 1:
        raise UserError(f"DEVICE is {device}, but there are {WORLD_SIZE} processes; set it to None")
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:
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
    """PRECISION, or the fastest that the device supports in hardware."""
    if PRECISION:
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


def device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type.upper()}, {plural(torch.get_num_threads(), 'thread')}"


def keep_freed_memory():
    """Tell glibc not to return freed memory to the system.

    Getting it again takes a fifth of the time per step.
    """
    M_TRIM_THRESHOLD = -1  # these two numbers are glibc's, from malloc.h
    M_MMAP_THRESHOLD = -3
    with suppress(OSError, AttributeError, TypeError):  # another C library
        libc = ctypes.CDLL(None)
        if not libc.mallopt(M_MMAP_THRESHOLD, 2**30):
            libc.mallopt(M_MMAP_THRESHOLD, 2**25)  # the most that glibc before 2.35 accepts
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def usable_cores(cgroup="/sys/fs/cgroup"):
    """CPU cores that this process may use. In a container that is its quota."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    # One file in version 2 of cgroups, two in version 1.
    for names in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):
        with suppress(OSError, ValueError):  # there is no such file, or it says "max"
            text = " ".join(Path(cgroup, name).read_text() for name in names)
            quota, period = map(int, text.split())
            if quota > 0:
                cores = min(cores, math.ceil(quota / period))
    return cores


def memory_format(device):
    """The fastest memory format for networks and images that works on this device.

    On MPS, BatchNorm's backward is wrong in channels_last (PyTorch issue 175189), and that of
    convolutions is slow (193349).
    """
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


def autocast(device, dtype):
    """Autocast to `dtype`. It caches the cast weights: use a new one after each update of them."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


class StepGraph:
    """A Trainer's step on CUDA as a graph, which launches its 300 small kernels at once.

    There is one graph for steps with the gradient penalty and one for steps without. The first
    three steps of each kind run eagerly on a side stream, as a capture requires. If a capture
    fails, all steps run eagerly. Not used with several processes: the graph would have to capture
    their communication.
    """

    def __init__(self, trainer):
        self.trainer = trainer
        self.stream = torch.cuda.Stream()
        self.memory = torch.cuda.graph_pool_handle()  # shared: one graph runs at a time
        self.eager_steps = {True: 3, False: 3}  # left until a capture, by `with_penalty`
        self.graphs = {}
        self.inputs = []

    def step(self, batch, with_penalty):
        stream = torch.cuda.current_stream()
        if self.eager_steps[with_penalty] > 0:
            self.eager_steps[with_penalty] -= 1
            self.stream.wait_stream(stream)
            with torch.cuda.stream(self.stream):
                self.trainer.step_on(batch, with_penalty)
            stream.wait_stream(self.stream)
            return
        try:
            if with_penalty not in self.graphs:
                self.capture(batch, with_penalty)
        except RuntimeError as error:
            say(f"no CUDA graph here ({one_line(error)}); training continues without, more slowly")
            torch.cuda.set_stream(stream)
            # Before PyTorch 2.13 the allocator stays in capture mode (issue 180395), which cuDNN's
            # benchmark would not survive.
            torch.backends.cudnn.benchmark = False
            self.trainer.graph = None
            self.trainer.abandon_step()
            self.trainer.step_on(batch, with_penalty)
            return
        for static, new in zip(self.inputs, batch):
            static.copy_(new)
        self.graphs[with_penalty].replay()

    def capture(self, batch, with_penalty):
        """Capture the step, on inputs that each replay reads again."""
        self.inputs = self.inputs or [tensor.clone() for tensor in batch]
        graph = torch.cuda.CUDAGraph()
        self.trainer.abandon_step()  # the graph must allocate gradients of its own
        with torch.cuda.graph(graph, self.memory, self.stream):
            self.trainer.step_on(self.inputs, with_penalty)
        self.graphs[with_penalty] = graph


# What PyTorch says where a device lacks an operation, in this precision or with so little memory.
UNSUPPORTED = (
    "implemented for the .* device|Could not run 'aten::|not implemented for '(Half|BFloat16)'"
    "|unable to find an engine"
)


def device_error(error):
    """One line for an error of PyTorch that a user can fix; None for any other error."""
    text = one_line(error)
    if out_of_memory(error):
        return f"out of memory ({text}); lower BATCH_SIZE, IMAGE_SIZE or --num-images"
    if re.search(UNSUPPORTED, str(error)):
        return f"{text}; try --precision float32, a lower BATCH_SIZE or --device cpu"
    if WORLD_SIZE > 1 and re.search("(?i)gloo|nccl|connect|peer", str(error)):
        return f"process {RANK} has lost the others ({text}); see the first error, and run it again"
    return None


# -------------------------------------------------------------------------------- several processes

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def check_launcher():
    """Raise UserError if what a launcher puts into the environment does not fit together."""
    given = " ".join(f"{name}={os.environ.get(name, '')}" for name in LAUNCHER)
    alone = "RANK=0? WORLD_SIZE=1? LOCAL_RANK=[0-9]* .*"
    several = "RANK=[0-9]+ WORLD_SIZE=[0-9]+ LOCAL_RANK=[0-9]* MASTER_ADDR=.+ MASTER_PORT=[0-9]+"
    if RANK >= WORLD_SIZE or not re.fullmatch(f"{alone}|{several}", given):
        raise UserError(
            f"the environment has {given}, which do not fit together; torchrun sets all of them; "
            "for a run of one process, unset them"
        )


def data_parallel(network, device):
    """`network`, wrapped to average gradients over the processes if there are several.

    On CUDA, BatchNorm then works on the whole batch; on a CPU, on each process's share of it.
    """
    if WORLD_SIZE == 1:
        return network
    ids = None
    if device.type == "cuda":
        ids = [device.index]
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    with quiet():  # hides that an argument will be renamed
        # Broadcast buffers would change the discriminator's statistics between its two calls.
        return nn.parallel.DistributedDataParallel(network, ids, broadcast_buffers=False)


def sum_over_processes(values):
    """Add up `values`, which each process computes on its share of a batch, in place."""
    if WORLD_SIZE > 1:
        dist.all_reduce(values)
    return values


def broadcast_batchnorm(network):
    """Give all processes the BatchNorm statistics of rank 0, the only ones in a checkpoint.

    If each used its own, a resumed run would differ from an uninterrupted one.
    """
    if WORLD_SIZE > 1:
        for statistic in network.buffers():
            dist.broadcast(statistic, 0)


def connect_processes(state, images, device):
    """Connect to the other processes. Returns the checkpoint of rank 0.

    `images` describes the images of this process. The timeout is long because another machine may
    still be decoding images; torchrun itself notices dead processes. Raises UserError if the
    machines have different images.
    """
    backend = "nccl" if device.type == "cuda" else "gloo"
    limit = timedelta(days=1)
    address = "{MASTER_ADDR}:{MASTER_PORT}".format_map(os.environ)
    text = f"process {RANK} is waiting for the other {WORLD_SIZE - 1} at {address}"
    waiting = threading.Timer(10, print, [text])
    waiting.daemon = True
    waiting.start()
    store = next(dist.rendezvous("env://", timeout=limit))[0]
    # After torchrun --max-restarts the store still holds the addresses of the last attempt, so each
    # attempt uses a prefix of its own. Not on several machines, which may count differently.
    attempt = ""
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "")
    store = dist.PrefixStore(attempt, store)
    dist.init_process_group(backend, store=store, rank=RANK, world_size=WORLD_SIZE, timeout=limit)
    sets = [""] * WORLD_SIZE
    dist.all_gather_object(sets, images)
    waiting.cancel()
    if len(set(sets)) > 1:
        raise UserError(f"the machines have different images ({', '.join(sets)}); copy DATA_DIR")
    shared = [state]
    dist.broadcast_object_list(shared, device=device)
    return shared[0]


def should_stop(signals, device, row_due):
    """Whether a signal has come. Several processes agree on it, to stop after the same step.

    On GPUs the answer would make the CPU wait, so they only ask when a metrics row is due.
    """
    if WORLD_SIZE == 1:
        return bool(signals)
    if device.type != "cpu" and not row_due:
        return False
    received = torch.tensor(signals[0] if signals else 0, device=device)
    dist.all_reduce(received, dist.ReduceOp.MAX)
    if received:
        signals[:] = [received.item()]
    # A signal that came meanwhile waits for the next call: all must return the same answer.
    return bool(received)


# -------------------------------------------------------------------------------------------- data


def unzipped(path):
    """The folder at `path` or, for a zip, the one beside it that has its name."""
    path = Path(path).absolute()
    return path.with_suffix("") if path.suffix.lower() == ".zip" and not path.is_dir() else path


def data_folder():
    """The folder of the images: DATA_DIR, unless that is CelebA's and KAGGLE_DATASET is another."""
    folder = unzipped(DATA_DIR)
    if KAGGLE_DATASET != CELEBA and folder == Path(CELEBA_DIR).absolute():
        folder = Path("data/kaggle", KAGGLE_DATASET).absolute()
    return folder


# The names that nearly all images have. Any other file is opened to find out.
IMAGE_NAME = re.compile("(?i)[.](jpe?g|png|bmp|ppm|pgm|tiff?|webp)$")
ATTRIBUTE_FILE = "list_attr_celeba.csv"  # CelebA's table of attributes
# What is unpacked.
WANTED = re.compile(f"{IMAGE_NAME.pattern}|{ATTRIBUTE_FILE}$")


def list_images(folder, others):
    """Yield (path, size, modification time) of each image below `folder`; paths are relative.

    A file is an image if its extension says so, or else if Pillow opens it. The rest is
    counted in `others`, a Counter, by extension. Raises OSError for a folder that cannot be listed.
    """
    for relative in list_files(folder):
        path = os.path.join(folder, relative)
        if hidden(relative):
            others["hidden"] += 1
        # Opening a pipe would wait forever.
        elif IMAGE_NAME.search(relative) or (os.path.isfile(path) and opens(path)):
            # A broken link is listed, too, so that decoding reports it.
            status = os.stat(path, follow_symlinks=os.path.exists(path))
            yield relative, status.st_size, status.st_mtime_ns
        elif os.path.basename(relative) != ATTRIBUTE_FILE:
            others[os.path.splitext(relative)[1].lower() or "without extension"] += 1


def list_files(folder):
    """Yield the relative path of each file below `folder`, if that is a folder.

    Links are followed, but no folder is listed twice. Raises OSError for a folder that cannot be
    listed.
    """
    if not os.path.isdir(folder):
        return

    def refuse(error):
        if not hidden(os.path.relpath(error.filename, folder)):
            raise error

    seen = set()
    root = os.path.join(folder, "")
    for place, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        real_place = os.path.realpath(place)
        if real_place in seen:
            folders.clear()
            continue
        seen.add(real_place)
        for name in files:
            yield os.path.join(place, name).removeprefix(root)


def hidden(path):
    """Whether a name in this relative path begins with a dot or with __MACOSX."""
    return re.search(r"(^|[/\\])(\.(?!$)|__MACOSX)", path) is not None


# Formats that Pillow recognises, but does not decode.
NOT_SHOWN = ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF")


def opens(file):
    """Whether Pillow opens a file, given as a path or as an object, and can show it."""
    try:
        with quiet(), Image.open(file) as image:
            return image.format not in NOT_SHOWN
    except Exception:  # it raises almost anything
        return False


def read_face(path, size):
    """The image at `path` as uint8 (3, size, size): its largest centre square, antialiased.

    Raises Pillow's errors for damaged files and for decompression bombs.
    """
    with quiet(), Image.open(path) as image:
        image.draft(None, (size, size))  # libjpeg may decode at 1/2, 1/4 or 1/8, not smaller
        with suppress(Exception):  # its EXIF data may be damaged
            ImageOps.exif_transpose(image, in_place=True)
        image = as_shown(image)
    square = center_crop(image, min(image.size))
    return pil_to_tensor(square.resize((size, size), Image.Resampling.BILINEAR))


def as_shown(image):
    """A PIL image in RGB, with transparency on white; 16 and 32 bits are stretched to their range.

    Raises ValueError if there is no range to stretch.
    """
    if image.mode[0] in "IF":  # 16 or 32 bits per pixel
        values = np.asarray(image, np.float32)
        values = (values - values.min()) / np.ptp(values)
        if not np.isfinite(values).all():
            raise ValueError("its pixels are all the same, or not finite")
        image = Image.fromarray(np.uint8(255 * values + 0.5))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


# Change this text when you change what read_face returns.
DECODER = "centre square, bilinear, transparency on white, high depths by their range"


def find_faces(folder, image_size, attributes=None):
    """The images in `folder`, a Path, as a FaceFolder, with labels if `attributes` is not None.

    Raises UserError if there are none.
    """
    others = Counter()
    with disk_errors(folder):
        images = sorted(list_images(folder, others))
    if not images:
        raise UserError(
            f"DATA_DIR ({folder}) holds no images{left_out(others)}; put some there, or a zip of "
            "them, or change DATA_DIR (--data-dir)"
        )
    known, rows = [], {}
    if attributes is not None:
        known, rows = read_labels(folder, [name for name, *_ in images], attributes)
        images = [image for image in images if image[0] in rows]
    others["beyond MAX_IMAGES"] = len(images[MAX_IMAGES:]) if MAX_IMAGES else 0
    images = images[:MAX_IMAGES]
    has = np.array([rows.get(name, []) for name, *_ in images], np.int8)
    if known:
        shares = [f"{name} {share:.0%}" for name, share in zip(known, has.mean(0))]
        say("attributes: " + ", ".join(shares))
    return FaceFolder(folder, images, image_size, others, known, 2 * has - 1)


def read_labels(folder, names, attributes):
    """The labels of the images `names` in `folder`: ([attribute], {name: [whether it has it]}).

    They come from the names of subfolders, or from ATTRIBUTE_FILE. Images without labels are left
    out. Raises UserError if none has any.
    """
    place = folder / os.path.commonpath(map(os.path.dirname, names))
    if attributes == "folders":
        parts = {name: (folder / name).relative_to(place).parts for name in names}
        keys = {name: inner[0] for name, inner in parts.items() if len(inner) > 1}
        known = sorted(set(keys.values()))
        table = dict(zip(known, np.eye(len(known), dtype=bool)))
        listed = f"in a subfolder of {place}"
    else:
        known = list(dict.fromkeys(attributes.split(",")))
        path = find_table(folder, place)
        keys = {name: Path(name).stem for name in names}
        table = read_attributes(path, known)
        listed = f"in {path}"
    rows = {name: table[key] for name, key in keys.items() if key in table}
    missing = [name for name in names if name not in rows]
    if missing:
        text = f"{plural(len(missing), 'image')} not {listed}, such as {missing[0]}"
        if not rows:
            raise UserError(f"ATTRIBUTES is {attributes}, but there are {text}")
        say(f"left out {text}")
    return known, rows


def find_table(folder, place):
    """The path of ATTRIBUTE_FILE, in `place` or above it, at most beside `folder`."""
    for above in (place, *place.parents):
        if (above / ATTRIBUTE_FILE).is_file():
            return above / ATTRIBUTE_FILE
        if above == folder.parent:
            break
    raise UserError(
        f"there is no {ATTRIBUTE_FILE} in {folder} or beside it; put one there, with image_id,"
        "Smiling,Male in its first line, and then lines such as 1.jpg,1,-1. If dcgan.py has filled "
        "this folder, move it away and run this again"
    )


def read_attributes(path, known):
    """{name of an image, without extension: [whether it has each of `known`]} from a CSV file.

    Raises UserError if it is damaged, or lacks one of the attributes.
    """
    with damage_errors(f"{path} is damaged"), disk_errors(path):
        text = path.read_text("utf-8-sig").replace(";", ",")  # some spreadsheets write these
        table = csv.reader(text.splitlines(), skipinitialspace=True)
        header = next(table, [])[1:]
    columns = [1 + attribute_index(name, header, path) for name in known]
    with damage_errors(f"{path} is damaged"):
        return {
            Path(row[0]).stem: [float(row[column]) > 0 for column in columns]
            for row in table
            if any(row)
        }


def attribute_index(name, known, owner):
    """The place of an attribute in `known`. Raises UserError with the nearest ones."""
    if name in known:
        return known.index(name)
    close = difflib.get_close_matches(name, known)
    hint = f"it has {', '.join(known) or 'none'}"
    if close:
        hint = f"did you mean {' or '.join(close)}?"
    raise UserError(f"{owner} has no attribute {name}; {hint}")


def wished(labels, wish, known, owner, kinds=None):
    """`labels` (N, A, ...) of `known` attributes, changed as `wish` says, such as "Smiling,-Male".

    Raises UserError for a name that `owner` does not know.
    """
    labels = labels.clone()
    if kinds == "folders":
        labels[:] = -1
    for name in wish.split(","):
        bare = name.removeprefix("-")
        labels[:, attribute_index(bare, known, owner)] = 1 if name == bare else -1
    return labels


def left_out(others):
    """Text for `others`, a Counter: how many files of each kind are not used."""
    kinds = dict(others.most_common(9))
    kinds["others"] = others.total() - sum(kinds.values())
    text = ", ".join(f"{count:,} {kind}" for kind, count in kinds.items() if count > 0)
    return f"; left out: {text}" if text else ""


class FaceFolder(ImageFolder):
    """torchvision's ImageFolder without class folders, and a cache of its decoded images.

    `images` come from `list_images`. An item is the bytes of an image or, if its file cannot be
    read, a string saying why. The cache is a file in CACHE_DIR, in NumPy's format. Another folder,
    other images or another size have another file.
    """

    def __init__(self, folder, images, image_size, others=None, attributes=(), labels=()):
        self.names = [name for name, *_ in images]
        self.others = others or Counter()  # kinds of files that are not used
        self.attributes = list(attributes)
        self.labels = labels  # those of broken images are still among them
        self.shape = (3, image_size, image_size)
        super().__init__(folder)
        about = f"{DECODER}, {image_size}"
        files = digest(f"{folder.resolve()} {images} {about}")
        self.cache = Path(CACHE_DIR) / f"faces-{files[:24]}-{image_size}.npy"
        # Copies of the same images have the same key, whatever their folder.
        same = [(os.path.basename(name), size) for name, size, _ in images]
        labelled = f" {attributes} {self.labels.tobytes()}" if attributes else ""
        self.key = digest(f"{same} {about}{labelled}")

    def find_classes(self, directory):
        return ["face"], {"face": 0}

    def make_dataset(self, directory, *args, **options):
        return [(os.path.join(directory, name), 0) for name in self.names]

    def __getitem__(self, index):
        path, _ = self.samples[index]
        if not os.path.isfile(path):  # reading a pipe would wait forever
            return "not a regular file"
        try:
            return read_face(path, self.shape[-1]).numpy().tobytes()
        except Exception as error:  # Pillow raises almost anything for a broken file
            return f"{type(error).__name__}: {error}"

    def check_sizes(self):
        """Say so if over a tenth of the images are smaller than they will be.

        It reads the headers of 64 of them.
        """
        sides = []
        for path, _ in self.samples[:: math.ceil(len(self) / 64)]:
            if os.path.isfile(path):  # opening a pipe would wait forever
                with suppress(Exception), quiet(), Image.open(path) as image:
                    sides.append(min(image.size))
        size = self.shape[-1]
        side = sorted(sides)[len(sides) // 10] if sides else size
        fits = max(32, 2 ** (side.bit_length() - 1))
        if fits < size:
            say(
                f"many images are smaller than IMAGE_SIZE ({size}), down to {min(sides)} pixels, "
                f"and would look blurred; --image-size {fits} is the best size for them"
            )

    def load(self):
        """The images as uint8 (N, 3, S, S), mapped from the cache, which the first call fills.

        Raises UserError if too many of them cannot be read.
        """
        waiting = "another process is decoding these images; waiting for it"
        lock = self.cache.with_suffix(".lock")
        return build_once(self.open_cache, self.fill_cache, lock, waiting)

    def open_cache(self):
        """Map the images (N, 3, S, S). None if there is no file, or if it is damaged."""
        try:
            with damage_errors(f"{self.cache} is damaged"), disk_errors(self.cache):
                if not self.cache.exists():
                    return None
                images = np.load(self.cache, mmap_mode="r")
                if images.dtype != np.uint8 or images.shape[1:] != self.shape:
                    raise ValueError("it holds something else")
                end = images.offset + images.nbytes
                self.broken = np.fromfile(self.cache, np.int64, offset=end)
                if self.attributes and len(images) + len(self.broken) != len(self):
                    raise ValueError("it is from an earlier version")
                with quiet():  # that the file is read-only
                    return torch.from_numpy(images)
        except UserError as error:
            say(f"{error}; decoding the images again")
            return None

    def fill_cache(self):
        """Decode all images. Names, skips and counts those that cannot be read.

        Raises UserError if they are too many.
        """
        count, broken = len(self), {}
        need_space(self.cache.parent, count * math.prod(self.shape), "decoding the images")
        bar = progress_bar(self.decode(), count, "decoding", " images")
        with replacing(self.cache) as file:
            self.write_header(file, count)
            for number, item in enumerate(bar):
                if isinstance(item, bytes):
                    file.write(item)
                    continue
                broken[number] = f"{self.samples[number][0]!r}: {one_line(item)}"
                if len(broken) <= 10:
                    say(f"skipped {broken[number]}")
            if broken:
                self.report_broken(broken.values())
            file.write(np.array(list(broken), np.int64).tobytes())  # for `kept_labels`
            self.write_header(file, count - len(broken))

    def report_broken(self, broken):
        """List the broken images in a file. Raises UserError if they are too many."""
        path = output_path("broken_images.txt")
        lines = "\n".join([*broken, ""]).encode(errors="backslashreplace")
        attempt(path.name, write_file, path, lambda file: file.write(lines))
        text = f"skipped {len(broken):,} of {plural(len(self), 'image')}, listed in {path}"
        share = len(broken) / len(self)
        if share == 1 or (share > 0.1 and not SKIP_BROKEN):
            raise UserError(
                f"{text}: more than one in ten cannot be read; repair or remove them, or use the "
                "rest with --skip-broken"
            )
        say(text)

    def kept_labels(self):
        """The labels (N, A) of the images that `load` has returned."""
        return torch.from_numpy(np.delete(self.labels, self.broken, 0))

    def write_header(self, file, count):
        """Write the start of the cache. Its length does not depend on `count`."""
        file.seek(0)
        header = {"descr": "|u1", "fortran_order": False, "shape": (count, *self.shape)}
        np.lib.format.write_array_header_1_0(file, header)

    def decode(self):
        """Yield all items in order, read by WORKERS processes."""
        workers = usable_cores() if WORKERS is None else WORKERS
        # With allow_none, asking does not set the method, which a notebook may still want to do.
        method = multiprocessing.get_start_method(allow_none=True)
        method = method or multiprocessing.get_all_start_methods()[0]  # the first is the default
        # With others, each worker imports torch, and this file, which a cell of a notebook is not.
        most = math.inf if method == "fork" else 8 * ("__file__" in globals())
        workers = min(workers, most, math.ceil(len(self) / 64))
        # Workers send bytes through pipes: tensors would go through shared memory, 64 MB in Docker.
        options = {"num_workers": workers, "multiprocessing_context": method if workers else None}
        try:
            multiprocessing.get_context(method).Lock()  # if this fails, DataLoader leaves a mess
            batches = iter(DataLoader(self, 64, collate_fn=list, **options))
        except (OSError, ImportError) as error:  # the system has no processes or locks for them
            say(f"no worker processes here ({one_line(error)}); decoding without, more slowly")
            batches = iter(DataLoader(self, 64, collate_fn=list))
        try:
            for batch in batches:
                yield from batch
        except RuntimeError as error:  # the system has killed a worker
            raise SystemFailure(f"decoding failed ({one_line(error)}); try fewer WORKERS") from None


def augment_share(images):
    """AUGMENT for a number of images: 0.3 up to 200, then less, and 0 from 1,000.

    Measured at 32 pixels, after 120,000 images: 0.3 makes the distance to real faces a third
    smaller for 200 faces, but a quarter larger for 1,000. At 64 pixels, after 200,000 images, 1,000
    faces give as good results as 10,000, and with 0.3 the distance is 7 % larger. A share of 1 is
    far too much.
    """
    return 0.3 * min(1.0, max(0.0, (1_000 - images) / 800))


class Batches:
    """The training batches of `faces`, which depend on SEED, epoch and step only.

    So a resumed run sees what an uninterrupted one would, and checkpoints need no random states.
    With several processes, each draws the numbers of the whole batch and takes its share of them.
    """

    def __init__(self, faces, device, labels=NO_LABELS):
        """`faces`: (N, 3, H, W); `labels`: (N, A), or NO_LABELS."""
        self.faces = faces
        self.labels = labels.expand(len(faces), -1)
        self.device = device
        self.steps = len(faces) // BATCH_SIZE  # full batches only
        if self.steps == 0:
            raise UserError(
                f"DATA_DIR ({data_folder()}) holds {plural(len(faces), 'image')}, fewer "
                f"than BATCH_SIZE ({BATCH_SIZE}); add images or lower BATCH_SIZE"
            )
        if device.type == "cuda" and faces.numel() < torch.cuda.mem_get_info(device)[0] / 2:
            self.faces = faces.to(device)
        self.labels = self.labels.to(self.faces.device)
        self.augment = augment_share(len(faces)) if AUGMENT is None else AUGMENT

    def epoch(self, epoch, first_step=0):
        """Yield (faces, flips, latents, changes) of each step, as `Trainer.step` takes them.

        Without augmentation, there are no changes.
        """
        share = BATCH_SIZE // WORLD_SIZE
        mine = slice(RANK * share, (RANK + 1) * share)
        shuffle = torch.Generator().manual_seed(seed_for("order", epoch))
        order = torch.randperm(len(self.faces), generator=shuffle).to(self.faces.device)
        batches = order.split(BATCH_SIZE)
        rng = torch.Generator(self.device)
        for step in range(first_step, self.steps):
            rng.manual_seed(seed_for("step", epoch, step))
            numbers = {"generator": rng, "device": self.device}
            latents = torch.randn(BATCH_SIZE, LATENT_SIZE, 1, 1, **numbers)
            flips = torch.rand(BATCH_SIZE, 1, 1, 1, **numbers) < 0.5 * MIRROR
            changes = []
            if self.augment:
                chance = torch.rand(BATCH_SIZE, 2, 6, **numbers)[mine]
                changes.append((2 * chance[..., 1:] - 1) * (chance[..., :1] < self.augment))
            chosen = batches[step][mine]
            faces, labels = (
                self.on_device(tensor.index_select(0, chosen))
                for tensor in (self.faces, self.labels)
            )
            yield faces, flips[mine], with_labels(latents[mine], labels), *changes

    def on_device(self, tensor):
        """`tensor`, moved to the device if it is not there."""
        if self.device.type == "cuda" and not tensor.is_cuda:
            # From pinned memory, the copy runs while the CPU continues. Only on CUDA: such
            # copies to MPS fail or are wrong (PyTorch issues 86060 and 189690).
            tensor = tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)

    def latents(self, noise, chosen):
        """`noise` (N, z, 1, 1) with the labels of the images `chosen`, repeated if too few."""
        chosen = chosen[torch.arange(len(noise)) % len(chosen)]
        return with_labels(noise, self.labels.cpu()[chosen])

    def reals(self, chosen):
        """The real images with the numbers `chosen`, (N, 3, H, W) in [0, 1], on the CPU."""
        return self.faces[chosen].cpu() / 255


# ----------------------------------------------------------------------------------------- records


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
    """A row of quality.csv: how far the averaged generator's faces are from real ones."""

    epoch: int
    images: int  # real ones seen since the run began
    distance: float  # `face_distance` of DISTANCE_IMAGES faces, always of the same noise
    floor: float  # the distance of as many other real images
    best: int  # the epoch of generator.pt

    def summary(self):
        return (
            f"distance {self.distance:.3f} (of reals: {self.floor:.3f}), best in epoch {self.best}"
        )


class Table:
    """A CSV file in OUTPUT_DIR. Its rows, of class `kind`, are kept in memory as well."""

    def __init__(self, name, kind):
        self.name = name
        self.kind = kind
        self.rows = []
        self.complete = False  # whether the file holds all rows

    def append(self, row):
        """Add a row to the rows and to the file."""
        self.rows.append(row)
        if self.complete:
            self.complete = attempt(self.name, append_rows, output_path(self.name), [row])
        else:
            self.write()

    def write(self):
        """Replace the file by one that holds all the rows."""
        if RANK == 0:
            lines = csv_lines([self.kind._fields, *self.rows])
            path = output_path(self.name)
            self.complete = attempt(self.name, write_file, path, lambda file: file.write(lines))

    def state_dict(self):
        return [list(row) for row in self.rows]

    def load_state_dict(self, rows):
        types = self.kind.__annotations__.values()
        self.rows = [self.kind(*map(call, types, row)) for row in rows]  # each cell of its type


def append_rows(path, rows):
    with disk_errors(path):
        make_folder(path.parent)
        with open(path, "ab") as file:
            file.write(csv_lines(rows))


def csv_lines(rows):
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for row in rows:
        writer.writerow(f"{cell:.6g}" if isinstance(cell, float) else cell for cell in row)
    return text.getvalue().encode()


def saved_values(owner):
    """{name: value} of the attributes that `owner.saved` names, for a checkpoint."""
    state = {}
    for name in owner.saved:
        value = getattr(owner, name)
        state[name] = value.state_dict() if hasattr(value, "state_dict") else value
    return state


def restore_values(owner, state):
    """Set the attributes that `owner.saved` names to the values in `state`.

    A value that is not a tensor and has no load_state_dict is a whole number.
    """
    for name in owner.saved:
        value = getattr(owner, name)
        if hasattr(value, "load_state_dict"):
            value.load_state_dict(state[name])
        elif isinstance(value, torch.Tensor):
            value.copy_(state[name])
        else:
            setattr(owner, name, parse(state[name], COUNT))


class Timer:
    """Limits how often something happens."""

    def __init__(self, due_at_once=False):
        self.last = -math.inf if due_at_once else perf_counter()

    def due(self, seconds):
        """Whether more than so many seconds have passed since it last returned True."""
        if perf_counter() - self.last <= seconds:
            return False
        self.last = perf_counter()
        return True


# ------------------------------------------------------------------------------------- checkpoints

NETWORK_SETTINGS = ("IMAGE_SIZE", "LATENT_SIZE", "G_FEATURES", "D_FEATURES", "ATTRIBUTES")
ORDER_SETTINGS = {"BATCH_SIZE", "SEED", "MAX_IMAGES"}


def generator_state(state, row):
    """What generator.pt holds: the averaged generator, what builds it, its data and its quality."""
    names = ("epoch", "images", "average", "attributes", "labels")
    small = {name: state[name] for name in names}
    small["settings"] = {name: state["settings"][name] for name in (*NETWORK_SETTINGS, "DATA_DIR")}
    small["distance"] = row.distance
    return small


def save_checkpoint(state):
    """Write checkpoint.pt; the one before becomes checkpoint.previous.pt."""
    path, previous = output_path("checkpoint.pt"), output_path("checkpoint.previous.pt")
    write_file(path, lambda file: torch.save(state, file), previous)


def read_checkpoint(path):
    """The state in a checkpoint.pt or generator.pt, on the CPU. No code in the file is run.

    Raises UserError if the file is damaged or something else.
    """
    if not os.path.isfile(path):
        raise UserError(f"there is no file {path}")
    with damage_errors(f"{path} is damaged, or was not written by torch.save"), disk_errors(path):
        # torch.load does not notice flipped bits, but the file is a zip, which has checksums.
        with zipfile.ZipFile(path) as archive:
            if any(member.compress_type for member in archive.infolist()) or archive.testzip():
                raise ValueError("a checksum is wrong")
        with quiet():
            state = torch.load(path, map_location="cpu", weights_only=True)
    with damage_errors(f"{path} is not a checkpoint of dcgan.py"):
        rename_old_fields(state)
        settings = state["settings"]
        for name in (*NETWORK_SETTINGS, "DATA_DIR"):
            settings[name] = checked(name, settings[name])
        for name in ("epoch", "images"):
            state[name] = parse(state[name], COUNT)
        state["attributes"] = list(map(str, state["attributes"]))
        list(zip(state["attributes"], state["labels"][0], strict=True))  # an error if they differ
        build_generator(state)  # raises an error if the weights do not fit
    return state


def rename_old_fields(state):
    """Give the fields of a checkpoint of an earlier version today's names, in place."""
    if "optimizers" in state:
        saved = zip(Trainer.optimizers, state.pop("optimizers"), state.pop("scalers"))
        for name, adamw, scaler in saved:
            state[name] = {"moments": adamw["state"], "scaler": scaler}
        state["metrics"] = state.pop("rows")
        state["totals"] = torch.tensor([*state["totals"], state.pop("interval")])
    if "older" not in state:
        state |= {"older": 0, "data": None}  # its images had another kind of key
    defaults = {"AUGMENT": 0.0, "ATTRIBUTES": None, "DATA_DIR": data_folder()}
    state["settings"] = defaults | state["settings"]
    state |= {"attributes": [], "labels": NO_LABELS} | state


def newest_checkpoint():
    """The state in checkpoint.pt or, if that is damaged, in checkpoint.previous.pt; or None."""
    path, previous = output_path("checkpoint.pt"), output_path("checkpoint.previous.pt")
    if not path.exists():
        return read_checkpoint(previous) if previous.exists() else None
    try:
        return read_checkpoint(path)
    except UserError as error:
        if not previous.exists():
            raise UserError(f"{error}; rename it to start a new run") from None
        state = read_checkpoint(previous)
        path.replace(output_path("checkpoint.damaged.pt"))
        say(f"{error}; renamed it to checkpoint.damaged.pt, and using checkpoint.previous.pt")
        return state


# ----------------------------------------------------------------------------- pictures and advice

ANIMATION_FRAMES = 25  # of 140 kB at most: training.gif stays small enough to send
ATTRIBUTES_SHOWN = 40  # as many as CelebA has
DISTANCE_IMAGES = 2_048  # generated and real images that a distance is measured on


def to_bytes(images):
    """Images in [0, 1] as uint8, rounded: what files hold, and what `evaluate` measures."""
    return images.mul(255).round().byte()


def grid(images, columns=8):
    """Images (N, 3, H, W), or one (3, H, W), in [0, 1] as one PIL picture."""
    return to_pil_image(make_grid(to_bytes(images.cpu()), columns))


def save_picture(picture, path, **options):
    """Write a PIL picture in the format of the path's extension."""
    write_file(path, lambda file: picture.save(file, quality=95, **options))


def save_animation(pictures, path, duration):
    """A looping animation of PIL pictures, each shown for `duration` milliseconds."""
    first, *rest = pictures
    save_picture(first, path, save_all=True, append_images=rest, loop=0, duration=duration)


@torch.no_grad()
def face_distance(fakes, reals):
    """How far `fakes` are from `reals`, both (N, 3, 32, 32) in [0, 1]: lower is better.

    It is the Fréchet distance between features of the two sets. Two convolutions with fixed random
    filters make the features, averaged on a 4 × 4 grid, so no trained network is needed. Each
    feature is divided by its standard deviation over the reals: copies of one image are at 1 to 2.
    The distance of reals from other reals is the floor.
    """
    if min(len(fakes), len(reals)) < 2:
        return math.inf
    rng = torch.Generator().manual_seed(0)
    images, count = torch.cat([reals, fakes]), len(reals)
    for channels in (3, 32):
        filters = torch.randn(32, channels, 3, 3, generator=rng)
        bias = 0.3 * torch.randn(32, 1, 1, generator=rng)
        images = F.conv2d(images, filters, stride=2, padding=1)
        spread, mean = torch.std_mean(images[:count], (0, 2, 3), keepdim=True)
        images = F.leaky_relu((images - mean) / spread.clamp_min(1e-6) + bias, 0.2)
    features = F.adaptive_avg_pool2d(images, 4).flatten(1).double()
    spread = features[:count].std(0)
    varied = spread > 1e-6  # a constant feature says nothing
    if not varied.any():  # all are copies of one image
        return math.inf
    features = features[:, varied] / spread[varied]
    return frechet_distance(features[count:], features[:count]) / features.shape[1]


def frechet_distance(one, two):
    """Between Gaussians with the means and covariances of two sets of features (N, D)."""
    sets = [(features - features.mean(0)) / math.sqrt(len(features) - 1) for features in (one, two)]
    # R of the QR decomposition is a root of the covariance, which is R.T @ R.
    root_one, root_two = (torch.linalg.qr(features, "r").R for features in sets)
    # The trace of the root of the product of both covariances.
    cross = torch.linalg.svdvals(root_one @ root_two.T).sum()
    shift = (one.mean(0) - two.mean(0)).square().sum()
    return (shift + root_one.square().sum() + root_two.square().sum() - 2 * cross).item()


def downscale(batches):
    """Batches of images (N, 3, H, W) as one of (N, 3, 32, 32), on the CPU."""
    return torch.cat([F.adaptive_avg_pool2d(batch, 32).cpu() for batch in batches])


def nearest(images, batches):
    """For each of `images` (N, 3, H, W), the nearest one in `batches` of such, by its pixels.

    That may be a mirrored one, if MIRROR.
    """
    wanted = downscale([images]).flatten(1)
    least = torch.full((len(images),), math.inf)
    found = torch.zeros_like(images)
    for batch in batches:
        for candidates in [batch, batch.flip(3)] if MIRROR else [batch]:
            nearness, indices = torch.cdist(wanted, downscale([candidates]).flatten(1)).min(1)
            nearer = nearness < least
            least[nearer] = nearness[nearer]
            found[nearer] = candidates[indices[nearer]]
    return found


def diversity(images):
    """How much images (N, 3, H, W) differ: their standard deviation, on a grid of 8 × 8."""
    return F.adaptive_avg_pool2d(images.float(), 8).std(0).mean().item()


def advice(rows, diversity_share):
    """Yield a line for each thing that goes wrong.

    `rows`: those of metrics.csv for one epoch; `diversity_share`: diversity of fakes, divided by
    that of reals.
    """
    d_real = fmean(row.d_real for row in rows)
    d_fake = fmean(row.d_fake for row in rows)
    if d_real > 0.97 and d_fake < 0.03:
        yield (
            f"the discriminator has won: D(x) is {d_real:.3f} and D(G(z)) {d_fake:.3f} on average, "
            "so the generator learns little; set D_LEARNING_RATE to 0.0002, or R1_GAMMA to 0.1 or "
            "1, and keep BETA1 at 0"
        )
    if diversity_share < 0.3:
        yield (
            f"the samples look alike (mode collapse): their diversity is {diversity_share:.2f} of "
            "the real images'; lower LEARNING_RATE, raise BATCH_SIZE, or start again with another "
            "SEED and OUTPUT_DIR"
        )


def side_by_side(pictures, titles, width):
    """PIL pictures in a row, each in the middle of `width` pixels and below its title."""
    top = 24 * max(title.count("\n") + 1 for title in titles)
    height = top + max(picture.height for picture in pictures)
    sheet = Image.new("RGB", (width * len(pictures), height), "white")
    for number, (picture, title) in enumerate(zip(pictures, titles)):
        left = width * number
        sheet.paste(picture, (left + (width - picture.width) // 2, top))
        ImageDraw.Draw(sheet).text((left + 4, 2), title, "black", font_size=16)
    return sheet


def load_matplotlib():
    """Load all that drawing needs, so that nothing can be missing later."""
    backend = os.environ.get("MPLBACKEND", "").partition("module://")[2]
    if backend and importlib.util.find_spec(backend.partition(".")[0]) is None:
        del os.environ["MPLBACKEND"]  # programs started from Jupyter inherit one they do not have
    figure = need_module("matplotlib.figure", "matplotlib").Figure
    figure((1, 1)).savefig(io.BytesIO(), format="png")  # loads what is imported late
    Image.init()  # as well


def draw_comparison(epochs, reals, fakes, batches=None):
    """real_vs_fake.png: `reals` and `fakes`, (64, 3, H, W) in [0, 1], side by side.

    With `batches` of all real images, also the ones that are most similar to the fakes.
    """
    sets = [reals, fakes]
    if batches:
        sets.append(nearest(fakes.cpu(), batches))
    titles = (
        "real",
        f"generated, after {round(epochs, 2):g} epochs",
        "for each generated image, the most similar real one",
    )
    scale = max(1, 64 // fakes.shape[-1])
    pictures = [ImageOps.scale(grid(images), scale) for images in sets]
    width = max(550, pictures[0].width)
    save_picture(side_by_side(pictures, titles, width), output_path("real_vs_fake.png"))


def draw_attributes(draw, latents, names):
    """attributes.png: a row of faces for each of `latents` (N, z + A, 1, 1).

    The first face has its own labels; then for each attribute there is one without and one with
    it or, if the attributes are folders, one that has no other.
    """
    columns = {"as drawn": latents}
    for name in names[:ATTRIBUTES_SHOWN]:
        for wish in (name,) if ATTRIBUTES == "folders" else (f"-{name}", name):
            changed = wished(latents[:, LATENT_SIZE:], wish, names, "", ATTRIBUTES)
            columns[wish] = torch.cat([latents[:, :LATENT_SIZE], changed], 1)
    pictures = [ImageOps.scale(grid(draw(column), 1), 2) for column in columns.values()]
    titles = [name.replace("_", "\n") for name in columns]
    save_picture(side_by_side(pictures, titles, pictures[0].width), output_path("attributes.png"))


def draw_losses(steps, rows, quality):
    """losses.png from the rows of metrics.csv, raw and smoothed. `steps`: steps per epoch.

    Below them, the distances in quality.csv; the epoch of generator.pt is marked.
    """
    from matplotlib.figure import Figure  # it opens no window, as pyplot would

    columns = Row(*zip(*rows))  # its fields hold whole columns here
    epochs = [row.epoch - 1 + row.step / steps for row in rows]
    late = rows[len(rows) // 20 :]  # the first steps' losses would dwarf the rest
    highest = max(row.loss_d + row.loss_g for row in late)
    figure = Figure((9, 10))
    figure.subplots_adjust(0.08, 0.06, 0.98, 0.96)
    upper, middle, lower = figure.subplots(3, 1, sharex=True)
    draw_curve(upper, epochs, columns.loss_d, "C0", "discriminator")
    draw_curve(upper, epochs, columns.loss_g, "C1", "generator")
    draw_curve(middle, epochs, columns.d_real, "C2", "D(x), of real images")
    draw_curve(middle, epochs, columns.d_fake, "C3", "D(G(z)), of fakes")
    upper.set_title("healthy: both rise and fall; the generator's loss may rise slowly")
    upper.set(ylabel="loss", ylim=(0, highest))
    middle.set_title("healthy: apart, but away from 1 and 0 (there the discriminator has won)")
    middle.set(ylabel='probability of "real"', ylim=(-0.02, 1.02))
    lower.set_title("distance to real faces (grey line: real faces to other real faces)")
    lower.set(ylabel="distance", xlabel="epoch", yscale="log")
    if quality:
        measured = Quality(*zip(*quality))
        best = measured.epoch.index(measured.best[-1])
        lower.plot(measured.epoch, measured.distance, "C4o-", label="averaged generator")
        lower.plot(measured.best[-1], measured.distance[best], "r*", label="generator.pt")
        lower.axhline(measured.floor[-1], color="grey")
        lower.legend()
    write_file(output_path("losses.png"), lambda file: figure.savefig(file, format="png"))


def draw_curve(axes, epochs, values, colour, label):
    raw = torch.tensor(values)
    window = len(values) // 100 * 2 + 1  # odd, to be centred
    smooth = F.avg_pool1d(raw[None], window, 1, window // 2, count_include_pad=False)
    axes.plot(epochs, raw, colour, alpha=0.25)
    axes.plot(epochs, smooth[0], colour, label=label)
    axes.legend()


def draw_animation(epochs):
    """training.gif: 25 faces of each grid in samples/, up to `epochs`."""
    paths = [output_path(f"samples/epoch_{epoch:03d}.png") for epoch in range(epochs + 1)]
    paths = [path for path in paths if path.exists()]
    if not paths:
        return
    stride = math.ceil(len(paths) / ANIMATION_FRAMES)
    shown = paths[::-stride][::-1]  # counted from the last one, which is always shown
    times = [150] * (len(shown) - 1) + [2500]  # milliseconds
    save_animation([animation_frame(path) for path in shown], output_path("training.gif"), times)


def animation_frame(path):
    """25 faces cut from the file of a grid, with the epoch written on them."""
    with Image.open(path) as picture:
        side = picture.width * 5 // 8
        box = (0, 0, side, side)
        frame = picture.convert("RGB").resize((332, 332), Image.Resampling.BILINEAR, box)
    about = path.stem.replace("_", " ")
    ImageDraw.Draw(frame).text((8, 316), about, "white", stroke_width=2, stroke_fill="black")
    return frame.quantize(128, dither=Image.Dither.NONE)


# ---------------------------------------------------------------------------------------- training

MEASURE_EVERY = 25_000  # images; one measurement takes as long as training on about 500
# Steps after which faces are good, by IMAGE_SIZE, with batches of 64; after a quarter of them, they
# are crude. Measured at 64 pixels.
STEPS_NEEDED = {32: 2_000, 64: 4_000, 128: 8_000, 256: 16_000}
RETRY_SECONDS = 15  # until a save that has failed is tried again: a network disk may come back
TIE = 0.03  # distances this close count as equal: twice the variation between noise seeds
NOT_FINITE = (
    "LEARNING_RATE may be too high, or float16 too coarse; lower LEARNING_RATE or set PRECISION to "
    "float32, then run the same command again to resume"
)


def train():
    """Train on DATA_DIR, or resume from OUTPUT_DIR/checkpoint.pt; return the path of generator.pt.

    Raises UserError for a wrong setting or data set and for a loss that is not finite,
    SystemFailure for network and disk and, after saving, KeyboardInterrupt for a signal.
    """
    check_settings()
    failing.clear()
    output, folder = Path(OUTPUT_DIR), data_folder()
    with locked(output / ".lock") if RANK == 0 else nullcontext():
        state = newest_checkpoint() if RANK == 0 else None
        # Of several processes, the others do not know yet, and wait for this one.
        finished = state and state["epoch"] >= EPOCHS and WORLD_SIZE == 1
        if finished and same_folder(state):
            say(
                f"{output} holds a finished run of {plural(state['epoch'], 'epoch')}; raise EPOCHS "
                "to continue it, or choose another OUTPUT_DIR for a new run"
            )
            return output / "generator.pt"
        if state:
            check_networks(state["settings"])
        load_matplotlib()
        device = pick_device()
        found = prepare_data(folder, IMAGE_SIZE, attributes=ATTRIBUTES)
        if state:
            check_data(state, found)
        else:
            found.check_sizes()
        faces = found.load()
        if WORLD_SIZE > 1:
            images = f"{plural(len(faces), 'image')} {found.key[:8]}"
            state = connect_processes(state, images, device)
        labels = found.kept_labels()
        some = labels[:: math.ceil(len(labels) / 4_096)].clone()
        trainer = Trainer(device, pick_dtype(device), some)
        run = Run(trainer, Batches(faces, device, labels), found)
        found.others["broken"] = len(found) - len(faces)
        run.announce(left_out(found.others))
        run.start(state)
        run.train()
        if WORLD_SIZE > 1:
            dist.destroy_process_group()
    say(f"finished; samples are in {output / 'samples'}; to generate new faces: {drawing_call()}")
    return output / "generator.pt"


def drawing_call():
    """What draws new faces: a command or, in a notebook or another program, a call."""
    if __name__ == "__main__" and not in_notebook():
        return shell(sys.argv[0], "generate", "--output-dir", OUTPUT_DIR)
    return "generate_images(num_images=16)"


def check_networks(then):
    """Raise UserError if the settings `then` of a checkpoint do not build today's networks."""
    for name in NETWORK_SETTINGS:
        now = globals()[name]
        if then[name] != now:
            raise UserError(
                f"{name} is {now}, but {then[name]} in the run in {OUTPUT_DIR}; set it back, or "
                "choose another OUTPUT_DIR"
            )


def same_folder(state):
    """Whether a checkpoint's run has the same DATA_DIR as this one."""
    return os.path.realpath(state["settings"]["DATA_DIR"]) == os.path.realpath(data_folder())


def check_data(state, found):
    """Raise UserError if a checkpoint's run has other attributes, or another set of images."""
    if state["attributes"] != found.attributes:
        raise UserError(
            f"{data_folder()} holds folders of {', '.join(found.attributes)}, but the run in "
            f"{OUTPUT_DIR} knows {', '.join(state['attributes'])}; choose another OUTPUT_DIR"
        )
    if state.get("data") not in (None, found.key) and not same_folder(state):
        raise UserError(
            f"{OUTPUT_DIR} holds a run on the images in {state['settings']['DATA_DIR']}, and "
            f"{data_folder()} holds different ones; set DATA_DIR back, or choose another OUTPUT_DIR"
        )


class Run:
    """A training run: where it stands, what it has measured, and what it does at which step."""

    saved = ("epoch", "step", "fixed_noise", "metrics", "quality", "older")

    def __init__(self, trainer, batches, found):
        self.trainer = trainer
        self.batches = batches
        self.data_key = found.key
        self.attributes = found.attributes
        self.epoch = 0  # finished epochs
        self.step = 0  # steps done in the next one
        self.metrics = Table("metrics.csv", Row)
        self.quality = Table("quality.csv", Quality)
        self.older = 0  # rows of it that come from other images than today's
        self.better = None  # a `generator_state` that is to be written
        rng = torch.Generator().manual_seed(seed_for("samples"))
        noise = torch.randn(64, LATENT_SIZE, 1, 1, generator=rng)
        rng.manual_seed(seed_for("reals"))
        chosen = torch.randperm(len(batches.faces), generator=rng)[:64]
        self.reals = batches.reals(chosen)
        # All samples are drawn from this noise, with the labels of those real images.
        self.fixed_noise = batches.latents(noise, chosen)
        self.save_timer = Timer()
        self.picture_timer = Timer(due_at_once=True)
        self.reports = 0
        self.shown = None  # where a notebook shows the samples

    def announce(self, left_out):
        """Say what the run uses: device, precision, images. `left_out` comes after it."""
        device, count = self.trainer.device, len(self.batches.faces)
        where = device_name(device)
        if device.type == "cuda":
            where += f", images {'in GPU memory' if self.batches.faces.is_cuda else 'on disk'}"
        if WORLD_SIZE > 1:
            where += f" × {WORLD_SIZE} processes"
        dtype = str(self.trainer.dtype).removeprefix("torch.")
        steps = f"{plural(self.batches.steps, 'step')} per epoch"
        images, epochs = plural(count, "image"), plural(EPOCHS, "epoch")
        say(f"{where}, {dtype}; {images}, {steps}, {epochs}{left_out}")

    def start(self, state):
        """Resume from a checkpoint's state, or draw samples of the untrained generator."""
        if state:
            self.resume(state)
        else:
            if self.reals.eq(self.reals[:, :1]).all():
                self.trainer.start_grey()
            self.sample()
        self.metrics.write()  # without the rows after the checkpoint, which will come again
        self.quality.write()

    def resume(self, state):
        """Restore a checkpoint's state, and say what has changed since.

        Raises UserError if it is damaged.
        """
        now, places = setting_values(), SETTING_GROUPS["places"]
        with damage_errors(f"the checkpoint in {OUTPUT_DIR} is damaged; move it away"):
            then = now | state["settings"]
            changed = [name for name in now if then[name] != now[name] and name not in places]
            for owner in (self, self.trainer):
                restore_values(owner, state)
        if changed:
            changes = [f"{name} {then[name]} -> {now[name]}" for name in changed]
            say("changed since the checkpoint: " + ", ".join(changes))
        other_images = state.get("data") not in (None, self.data_key)
        if other_images:
            self.older = len(self.quality.rows)
            say(
                f"{data_folder()} holds other images than at the checkpoint; the search for the "
                "best epoch starts again"
            )
        if other_images or ORDER_SETTINGS & set(changed):
            if self.step:
                say(f"the order of the images has changed: epoch {self.epoch + 1} starts again")
            self.step = 0
            self.trainer.totals.zero_()
            self.metrics.rows = [row for row in self.metrics.rows if row.epoch <= self.epoch]
        at = f"epoch {self.epoch + 1}, step {self.step + 1}"
        if self.step == self.batches.steps:  # a signal came in the epoch's last step
            at = f"the end of epoch {self.epoch + 1}"
        say(f"resuming from {OUTPUT_DIR}: {at}")

    def train(self):
        """Train to the last epoch or until a signal; then save, and raise KeyboardInterrupt.

        After an error, it saves as well, unless the networks are broken.
        """
        try:
            with caught_signals() as signals:
                while self.epoch < EPOCHS:
                    if not self.train_epoch(signals):
                        self.end_early(signals)
                    self.finish_epoch()
        except RunError:  # a weight or a loss is not finite
            raise
        except Exception:
            with suppress(Exception):
                self.save()
            raise

    def finish_epoch(self):
        """`end_epoch`. If it fails, a run that resumes ends the epoch again."""
        self.epoch += 1
        self.step = 0
        try:
            self.end_epoch()
        except Exception:
            self.epoch -= 1
            self.step = self.batches.steps
            self.quality.rows = [row for row in self.quality.rows if row.epoch <= self.epoch]
            raise

    def end_early(self, signals):
        """Save after a signal, and raise KeyboardInterrupt."""
        self.save_and_draw(last=True)
        at = f"step {self.step} of epoch {self.epoch + 1}"
        say(f"saved after {at}; run the same command again to resume")
        raise KeyboardInterrupt(*signals)

    def train_epoch(self, signals):
        """Do the remaining steps of an epoch. Returns False if a signal has come."""
        self.timed = (perf_counter(), self.trainer.images)  # for the speed of the next row
        steps = self.batches.steps
        name = f"epoch {self.epoch + 1}/{EPOCHS}"
        options = {"initial": self.step}
        if not self.grid_due(self.epoch + 1):
            # In a notebook, even a bar that is removed leaves an empty line.
            options |= {"leave": False, "delay": int(in_notebook())}
        with progress_bar(None, steps, name, " steps", **options) as bar:
            for batch in self.batches.epoch(self.epoch, self.step):
                self.trainer.advance(*batch)
                self.step += 1
                with suppress(OSError):  # the terminal may be gone
                    bar.update()

                last = self.step == steps
                row_due = last or self.step % LOG_EVERY == 0
                if row_due:
                    self.report(self.log(), bar)
                if should_stop(signals, self.trainer.device, row_due):
                    return False
                if not last and self.save_due(60 * CHECKPOINT_MINUTES):
                    self.save_and_draw()
        return True

    def log(self):
        """Add the means since the last row to metrics.csv. Returns them as a Row.

        Raises UserError if a loss is not finite.
        """
        images = self.trainer.images
        means = self.trainer.take_means()
        before, images_before = self.timed
        self.timed = (perf_counter(), images)
        speed = (images - images_before) / (self.timed[0] - before)
        row = Row(self.epoch + 1, self.step, images, *means, speed)
        if not math.isfinite(row.loss_d + row.loss_g):
            raise RunError(
                f"a loss is not finite in epoch {row.epoch}, before step {row.step + 1} (loss_d "
                f"{row.loss_d}, loss_g {row.loss_g}); {NOT_FINITE}"
            )
        self.metrics.append(row)
        return row

    def report(self, row, bar):
        """Show a row on the progress bar; after the second one, say how long the run will take."""
        with suppress(OSError):  # the terminal may be gone
            bar.set_postfix_str(row.summary(), refresh=False)
        self.reports += 1
        # The first row is slower: it has the warm-up in it. But it may be the only one.
        only = row.epoch == EPOCHS and row.step == bar.total and self.reports == 1
        if self.reports == 2 or only:
            self.estimate(row)

    def estimate(self, row):
        """Say how long the run will take by the speed in `row`, and whether it is too short."""
        done = self.epoch * self.batches.steps + row.step
        steps = EPOCHS * self.batches.steps

        def duration(steps):
            minutes = math.ceil((steps - done) * BATCH_SIZE / row.images_per_second / 60)
            return f"about {minutes} min" if minutes < 100 else f"about {minutes / 60:.1f} h"

        needed = STEPS_NEEDED[IMAGE_SIZE]
        if done < steps:
            latest = output_path("samples/latest.png")
            say(f"the run will take {duration(steps)}; see {latest}")
        if steps < needed / 4:
            epochs = math.ceil(needed / self.batches.steps)
            say(
                f"this run is too short: it has {plural(steps, 'step')}, and good images need "
                f"about {needed:,}; use --epochs {epochs}, which takes {duration(needed)}"
            )

    def end_epoch(self):
        """After an epoch: samples, distance to real faces, checkpoint, pictures, advice."""
        if not self.grid_due(self.epoch):
            if self.save_due(60 * CHECKPOINT_MINUTES):
                self.save_and_draw()
            return
        fakes = self.sample()
        measured = self.measure()
        if measured and measured[0].best == self.epoch:
            self.better = copy.deepcopy(generator_state(self.checked_state(), measured[0]))
        last = self.epoch == EPOCHS
        # On a fast GPU, saving after every epoch would take a twentieth of the time.
        if last or self.save_due(min(60, 60 * CHECKPOINT_MINUTES)):
            self.save(last)
        else:
            attempt("generator.pt", self.save_files)
        self.draw_pictures(fakes, now=last)
        # On a terminal, the progress bar shows the newest row of metrics.csv.
        news = measured if on_terminal() else [self.metrics.rows[-1], *measured]
        if news:
            summaries = ", ".join(row.summary() for row in news)
            say(f"epoch {self.epoch}/{EPOCHS}: {summaries}")
        if self.trainer.images > 10_000:  # before that, nothing is wrong yet
            first = self.epoch - self.grid_stride(self.epoch)
            rows = [row for row in self.metrics.rows if row.epoch > first]
            share = diversity(fakes) / (diversity(self.reals) or 1)
            for line in advice(rows, share):
                say(f"after epoch {self.epoch}, {line}")

    def grid_due(self, epoch):
        """Whether the samples after this epoch are kept, by `grid_stride`."""
        return epoch == EPOCHS or epoch % self.grid_stride(epoch) == 0

    def grid_stride(self, epoch):
        """Epochs between two kept grids of samples: 1, but more when epochs are many and short.

        A small set needs thousands of them. From epoch 32 on it is 2, from 64 on 4, and so on.
        """
        images = self.batches.steps * BATCH_SIZE  # per epoch
        longest = max(1, math.ceil(MEASURE_EVERY / images))
        return min(2 ** max(0, epoch.bit_length() - 5), longest)

    def sample(self):
        """Images (64, 3, H, W) in [0, 1] of the fixed noise, saved and, in a notebook, shown.

        latest.png is always the newest grid; each finished epoch has one of its own as well.
        """
        fakes = self.trainer.draw(self.fixed_noise)
        if RANK == 0:
            picture = grid(fakes)
            names = ["samples/latest.png"]
            if self.step == 0 and self.grid_due(self.epoch):
                names.append(f"samples/epoch_{self.epoch:03d}.png")
            for name in names:
                attempt(name, save_picture, picture, output_path(name))
            self.shown = show(picture, self.shown)
        return fakes

    def measure(self):
        """Add a row to quality.csv. Returns the new rows: this one or, if it is too early, none.

        Some are skipped if epochs are short, but never the first or the last one.
        """
        rows, trainer = self.quality.rows[self.older :], self.trainer
        early = rows and trainer.images - rows[-1].images < MEASURE_EVERY
        if RANK > 0 or (early and self.epoch < EPOCHS):
            return []
        rng = torch.Generator().manual_seed(0)
        chosen = torch.randperm(len(self.batches.faces), generator=rng)[: 2 * DISTANCE_IMAGES]
        reals, others = downscale(map(self.batches.reals, chosen.split(64))).chunk(2)
        noise = torch.randn(len(reals), LATENT_SIZE, 1, 1, generator=rng)
        latents = self.batches.latents(noise, chosen)  # the first of them are those of `reals`
        # A generator that is not finite will not be saved.
        fakes = downscale(map(trainer.draw, latents.split(64))).nan_to_num()
        distance = face_distance(fakes, reals)
        floor = rows[0].floor if rows else face_distance(others, reals)
        lowest = min((row.distance for row in rows), default=math.inf)
        best = self.epoch if distance <= lowest * (1 + TIE) else rows[-1].best
        row = Quality(self.epoch, trainer.images, distance, floor, best)
        self.quality.append(row)
        return [row]

    def save_due(self, seconds):
        """Whether it is time to save: after so many seconds or, if saving has failed, soon."""
        return self.save_timer.due(RETRY_SECONDS if "checkpoint.pt" in failing else seconds)

    def save(self, last=False):
        """Write checkpoint.pt and, if it is better, generator.pt.

        If that fails, it says so. If this is the `last` time, it waits, tries once more, and then
        raises SystemFailure.
        """
        if RANK > 0:
            return
        state = self.checked_state()
        if not attempt("checkpoint.pt", self.save_files, state) and last:
            sleep(RETRY_SECONDS)
            self.save_files(state)

    def save_files(self, state=None):
        """Write generator.pt, if there is a better one, and a checkpoint's `state`, if given."""
        if self.better:
            write_file(output_path("generator.pt"), lambda file: torch.save(self.better, file))
            self.better = None
        if state:
            save_checkpoint(state)

    def save_and_draw(self, last=False):
        """Between two grids: save first; then draw the samples and, if they are due, pictures."""
        self.save(last)
        if RANK == 0:
            self.draw_pictures(self.sample(), last)

    def draw_pictures(self, fakes, now=False):
        """losses.png, real_vs_fake.png and training.gif, once per two minutes, or `now`.

        `now`: at the end of a run, where a notebook also shows losses.png. `fakes`: the newest
        samples, (64, 3, H, W) in [0, 1].
        """
        rows, steps = self.metrics.rows, self.batches.steps
        if RANK > 0 or not rows or not (now or self.picture_timer.due(120)):
            return
        epochs = self.epoch + self.step / steps
        drawn = attempt("losses.png", draw_losses, steps, rows, self.quality.rows)
        batches = None
        if self.epoch == EPOCHS:
            numbers = torch.arange(len(self.batches.faces)).split(64)
            numbers = progress_bar(numbers, None, "comparing", " batches", leave=False)
            batches = map(self.batches.reals, numbers)
        attempt("real_vs_fake.png", draw_comparison, epochs, self.reals, fakes, batches)
        attempt("training.gif", draw_animation, self.epoch)
        if self.attributes:
            shown, draw = self.fixed_noise[:8], self.trainer.draw
            attempt("attributes.png", draw_attributes, draw, shown, self.attributes)
        if now and drawn and in_notebook():
            with Image.open(output_path("losses.png")) as picture:
                show(picture)

    def checked_state(self):
        """`state_dict`, ready to be saved. Raises UserError if a weight or loss is not finite."""
        self.trainer.averaged_generator()  # brings its statistics up to date
        state = self.state_dict()
        tensors = [state["totals"]]
        for name in Trainer.networks:
            tensors += state[name].values()
        if not all(tensor.isfinite().all() for tensor in tensors):
            images = f"{self.trainer.images:,} images"
            raise RunError(f"a weight or a loss is not finite after {images}; {NOT_FINITE}")
        return state

    def state_dict(self):
        settings = setting_values() | {"DATA_DIR": str(data_folder())}
        state = {"settings": settings, "data": self.data_key}
        state |= {"attributes": self.attributes, "labels": self.trainer.labels}
        return state | saved_values(self) | saved_values(self.trainer)


@contextmanager
def caught_signals():
    """A list that collects signals within `with`; they do not end the program.

    Only a second Ctrl-C raises KeyboardInterrupt at once.
    """
    # What users, terminals and schedulers send. Windows has only some of them.
    names = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGBREAK")
    received = []

    def receive(signum, frame):
        if received and signum == signal.SIGINT:
            raise KeyboardInterrupt(signum)
        received.append(signum)

    with ExitStack() as restore:
        with suppress(ValueError):  # only the main thread can set handlers
            for signum in (getattr(signal, name, None) for name in names):
                if signum and signal.getsignal(signum) is not signal.SIG_IGN:  # as nohup sets it
                    restore.callback(signal.signal, signum, signal.signal(signum, receive))
        yield received


# ----------------------------------------------------------------------- using a trained generator

GENERATION_BATCH = 64  # always, so that an image does not depend on how many were asked for
GRID_LIMIT = 1_024  # images
STILLS = (".png", ".jpg", ".jpeg", ".webp")
ANIMATIONS = (".gif", ".webp")


class TrainedGenerator:
    """The averaged generator in a checkpoint file, by default the best in OUTPUT_DIR.

    `state` is what the file holds. With `attributes`, such as "Smiling,-Male", all faces have
    Smiling and none has Male. Raises UserError if there is no file, or if it is damaged, and for
    attributes that the generator does not know.
    """

    def __init__(self, checkpoint=None, attributes=None):
        check_settings()
        path = checked("checkpoint", checkpoint) if checkpoint else find_checkpoint()
        self.state = read_checkpoint(path)
        known = ", ".join(self.state["attributes"])
        about = f"; attributes: {known}" if known else ""
        say(f"the generator of {path}, after epoch {self.state['epoch']}{about}")
        self.labels = self.state["labels"]
        if wish := checked("attributes", attributes):
            self.choose_labels(wish, path)
        self.device = pick_device()
        self.dtype = pick_dtype(self.device)
        generator = build_generator(self.state)
        self.generator = generator.to(self.device, memory_format=memory_format(self.device))

    def choose_labels(self, attributes, path):
        """Keep the labels of those training images that have the given attributes."""
        known, kinds = self.state["attributes"], self.state["settings"]["ATTRIBUTES"]
        fit = wished(self.labels, attributes, known, path).eq(self.labels).all(1)
        if fit.any():
            self.labels = self.labels[fit]
        else:
            say(f"hardly any training image is {attributes}, so faces may look odd")
            self.labels = wished(self.labels, attributes, known, path, kinds)

    def latents(self, number, seed, truncation=1.0):
        """Yield (GENERATION_BATCH, z + A) for at least `number` images, on the CPU.

        It is `truncation` × noise, and labels that training images have, in random order.
        If `seed` is None, a seed is chosen and printed.
        """
        if seed is None:
            seed = random.SystemRandom().randrange(10**6)
            say(f"seed {seed}")
        seed = checked("seed", seed)
        rng = torch.Generator().manual_seed(seed)
        label_rng = torch.Generator().manual_seed(~seed)  # numbers that the noise does not use
        size = self.state["settings"]["LATENT_SIZE"]
        for _ in range(0, number, GENERATION_BATCH):
            noise = truncation * torch.randn(GENERATION_BATCH, size, generator=rng)
            chosen = torch.randint(len(self.labels), (GENERATION_BATCH,), generator=label_rng)
            yield torch.cat([noise, self.labels[chosen]], 1)

    def draw(self, latents):
        """Images (N, 3, H, W) in [0, 1], on the CPU, from noise and labels (N, z + A)."""
        latents = latents[:, :, None, None].to(self.device)
        return images_from(self.generator, latents, self.dtype).cpu()

    def images(self, number, seed, truncation=1.0):
        """Yield `number` new images (3, H, W) in [0, 1], on the CPU, from `truncation` × noise."""
        for first, latents in enumerate(self.latents(number, seed, truncation)):
            yield from self.draw(latents)[: number - first * GENERATION_BATCH]


def find_checkpoint():
    """OUTPUT_DIR's best generator or, before there is one, its checkpoint. UserError if none."""
    for name in ("generator.pt", "checkpoint.pt", "checkpoint.previous.pt"):
        path = output_path(name)
        if path.exists():
            return path
    raise UserError(f"no checkpoint in OUTPUT_DIR ({OUTPUT_DIR}); train first, or use --checkpoint")


def new_images(num_images, seed, checkpoint, truncation, attributes):
    """An iterator over new images (3, H, W) in [0, 1], with a progress bar."""
    number = checked("num_images", num_images)
    truncation = checked("truncation", truncation)
    images = TrainedGenerator(checkpoint, attributes).images(number, seed, truncation)
    return progress_bar(images, number, "generating", " images")


def generate_images(
    num_images=16, seed=None, checkpoint=None, output=None, truncation=1.0, attributes=None
):
    """New faces as a float tensor (num_images, 3, H, W) in [0, 1]; also saved as a grid.

    In a notebook, the grid is shown as well. On one device, the same seed gives the same images,
    and a larger `num_images` only adds some. If `seed` is None, a seed is chosen and printed.
    `checkpoint` is a checkpoint.pt or generator.pt, by default OUTPUT_DIR's. The grid shows the
    first 1,024 and is saved to `output` (.png, .jpg or .webp), by default OUTPUT_DIR/generated.png.
    A `truncation` below 1 scales the noise down: faces are cleaner, but more alike. `attributes`,
    such as "Smiling,-Male", are those to have and, with "-", not to have; all others are as
    frequent as in the training images with these. Raises UserError for a wrong argument or file.
    """
    path = picture_path("generated.png", output, STILLS)
    images = torch.stack(list(new_images(num_images, seed, checkpoint, truncation, attributes)))
    shown = images[:GRID_LIMIT]
    picture = grid(shown, math.ceil(math.sqrt(len(shown))))
    save_picture(picture, path)
    say(f"saved {path}")
    show(picture)
    return images


def chosen_path(name, chosen):
    """The path `chosen` or, if there is none, that of `name` in OUTPUT_DIR."""
    check_settings()
    return Path(checked("output", chosen)) if chosen else output_path(name)


def picture_path(name, chosen, extensions):
    """`chosen_path`. Raises UserError if it has none of the extensions."""
    path = chosen_path(name, chosen)
    if path.suffix.lower() not in extensions:
        raise UserError(
            f"output (--output) is {path}; its name must end in {', '.join(extensions)}"
        )
    return path


def generate(
    num_images=16,
    seed=None,
    checkpoint=None,
    output=None,
    truncation=1.0,
    individual=False,
    attributes=None,
):
    """The command: new faces in a grid or, if `individual`, in a file each."""
    number = checked("num_images", num_images)
    if not checked("individual", individual):
        if number > GRID_LIMIT:
            raise UserError(
                f"num_images (--num-images) is {number}, but a grid holds {GRID_LIMIT:,}; "
                "add --individual for a file each"
            )
        generate_images(number, seed, checkpoint, output, truncation, attributes)
        return
    folder = chosen_path("generated", output)
    with disk_errors(folder):
        if folder.exists() and any(path.name[0] != "." for path in folder.iterdir()):
            raise UserError(f"{folder} is not empty; empty it, or choose another --output")
        images = new_images(number, seed, checkpoint, truncation, attributes)
        make_folder(folder)
        for index, image in enumerate(images):
            grid(image).save(folder / f"{index:06d}.png")
    say(f"saved {plural(number, 'image')} in {folder}")


def interpolate(num_faces=8, frames=16, seed=None, checkpoint=None, output=None, attributes=None):
    """Save a looping animation that moves between new faces; return its path.

    `frames` pictures lead from each face to the next. `attributes`: as for `generate_images`; the
    labels of a face change linearly into those of the next. Noise is interpolated on a sphere,
    because all noise vectors have nearly the same length. Any two are nearly orthogonal, so the
    angle between them is taken as 90°.
    """
    path = picture_path("interpolation.gif", output, ANIMATIONS)
    number = checked("num_faces", num_faces)
    frames = checked("frames", frames)
    trained = TrainedGenerator(checkpoint, attributes)
    corners = torch.cat(list(trained.latents(number, seed)))[:number]
    angles = torch.arange(frames).mul(math.pi / 2 / frames).unsqueeze(1)
    size = trained.state["settings"]["LATENT_SIZE"]
    pictures = []
    pairs = zip(corners, corners.roll(-1, 0))
    for start, end in progress_bar(pairs, number, "drawing", " faces"):
        noise = angles.cos() * start[:size] + angles.sin() * end[:size]
        walk = torch.lerp(start, end, angles * 2 / math.pi)
        walk[:, :size] = F.normalize(noise) * math.sqrt(size)
        pictures += [ImageOps.scale(grid(image), 2) for image in trained.draw(walk)]
    save_animation(pictures, path, 60)
    say(f"saved {path}")
    return path


# ---------------------------------------------------------------------------------------- evaluate

LEAST_IMAGES = 2_048  # with fewer images FID cannot be estimated
MOST_REALS = 50_000
INCEPTION = "inception-v3-compat"  # torch-fidelity's name for the network that papers use


def evaluate(num_images=50_000, checkpoint=None, seed=0, data_dir=None):
    """FID, KID, precision and recall of new faces against real ones, as a dict.

    The real images are those in `data_dir`, by default those of the training run. The results are
    also printed, and appended to evaluation.csv. FID and KID are better when lower (Heusel
    et al. 2017, Bińkowski et al. 2018), precision and recall when higher (Kynkäänniemi et al.
    2019). All come from torch-fidelity.
    """
    number = checked("num_images", num_images)
    if number < LEAST_IMAGES:
        raise UserError(
            f"num_images (--num-images) is {number}; it must be {LEAST_IMAGES:,} or more"
        )
    need_module("torch_fidelity", "torch-fidelity")
    trained = TrainedGenerator(checkpoint)
    folder = unzipped(checked("data_dir", data_dir or trained.state["settings"]["DATA_DIR"]))
    found = prepare_data(folder, trained.state["settings"]["IMAGE_SIZE"])
    faces = found.load()
    if len(faces) < LEAST_IMAGES:
        raise UserError(f"{folder} holds {len(faces):,} images; FID needs {LEAST_IMAGES:,} or more")
    chosen = torch.linspace(0, len(faces) - 1, min(len(faces), MOST_REALS)).long()
    if min(number, len(chosen)) < 10_000:
        say("with fewer than 10,000 generated or real images, FID is too high; papers use 50,000")
    with progress_bar(None, number + len(chosen), "Inception", " images") as bar:
        fakes = ImageTensors(trained.images(number, seed), number, bar)
        reals = ImageTensors((faces[index] / 255 for index in chosen), len(chosen), bar)
        result = distances(fakes, reals, f"{found.cache.stem}-{len(chosen)}", trained.device)
    about = {
        "epoch": trained.state["epoch"],
        "generated": number,
        "real": len(chosen),
        "size": faces.shape[-1],
        "crop": "centre square",
        "network": f"{INCEPTION} 2015-12-05",
        "data": str(folder),
    }
    rounded = {name: f"{value:.5g}" for name, value in result.items()}
    say(", ".join(f"{name} {value}" for name, value in (rounded | about).items()))
    append_evaluation(about | result)
    return result


class ImageTensors(Dataset):
    """Images in [0, 1] as torch-fidelity wants them: uint8 (3, H, W).

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


def distances(fakes, reals, cache_name, device):
    """{"FID", "KID", "precision", "recall"} of two ImageTensors. Features of reals are cached."""
    from torch_fidelity import calculate_metrics

    cache = Path(CACHE_DIR) / "inception"
    with disk_errors(cache):
        make_folder(cache)
        for path in cache.glob(f"{cache_name}-*"):  # torch-fidelity would run code in these files
            try:
                torch.load(path, weights_only=True)
            except Exception:  # damaged, or not only tensors: it computes them again
                path.unlink()
        try:
            metrics = calculate_metrics(
                input1=fakes,
                input2=reals,
                input2_cache_name=cache_name,
                cache_root=cache,
                feature_extractor=INCEPTION,
                fid=True,
                kid=True,
                prc=True,
                cuda=device.type == "cuda",
                save_cpu_ram=True,  # no worker processes, and distances part by part
                verbose=False,
            )
        except URLError as error:
            raise SystemFailure(
                f"torch-fidelity cannot download its weights ({error.reason}); README says where "
                "to put the file on a machine without network"
            ) from None
    return {
        "FID": metrics["frechet_inception_distance"],
        "KID": metrics["kernel_inception_distance_mean"],
        "precision": metrics["precision"],
        "recall": metrics["recall"],
    }


def append_evaluation(columns):
    """Append a row to evaluation.csv, below the names of its columns if they are new."""
    path = output_path("evaluation.csv")
    if not path.exists() or csv_lines([columns.keys()]) not in path.read_bytes():
        append_rows(path, [columns.keys()])
    append_rows(path, [columns.values()])


# ------------------------------------------------------- where images come from: Kaggle, zips, demo


def prepare_data(folder, image_size, download=False, attributes=None):
    """`find_faces`; before that, fill `folder` if it holds no images.

    Zips in it, or one beside it that has its name, are unpacked. Without any, the demo's faces are
    drawn, or KAGGLE_DATASET is downloaded, if `folder` is the one for them or if `download`.
    """
    found = any_image(folder)
    archives = [] if found else find_archives(folder)
    if archives:
        fill_folder(folder, lambda part: unpack_all(archives, part))
    elif folder == Path(DEMO["DATA_DIR"]).absolute():
        fill_folder(folder, draw_demo)
    elif download or KAGGLE_DATASET != CELEBA or folder == Path(CELEBA_DIR).absolute():
        download_celeba(folder)
    elif found and DATA_DIR.lower().endswith(".zip"):
        say(f"using the images in {folder}; to unpack {DATA_DIR} again, delete that folder")
    return find_faces(folder, image_size, attributes)


def download():
    """The command: download KAGGLE_DATASET to DATA_DIR, and do nothing else."""
    check_settings()
    folder = data_folder()
    if any_image(folder):
        say(f"{folder} holds images already; nothing is downloaded")
    found = prepare_data(folder, IMAGE_SIZE, download=True)
    say(f"{folder} holds {plural(len(found), 'image')}{left_out(found.others)}")


def any_image(folder):
    """An image in `folder`, as `list_images` yields it, or None."""
    with disk_errors(folder):
        return next(list_images(folder, Counter()), None)


def find_archives(folder):
    """The zips in `folder` or, if there are none, the one beside it that has its name."""
    inside = [Path(folder, name) for name in list_files(folder) if not hidden(name)]
    beside = [path for path in folder.parent.glob("*") if path.stem == folder.name]
    for paths in (inside, beside):
        zips = [path for path in paths if path.suffix.lower() == ".zip" and os.path.isfile(path)]
        if zips:
            return sorted(zips)
    return []


def unpack_all(archives, folder):
    """Unpack the images of `archives` into `folder`. Raises UserError if they are damaged."""
    images = 0
    for number, archive in enumerate(archives):
        place = folder / archive.stem
        if place.exists():  # in several folders, zips may have the same name
            place = folder / f"{archive.stem} {number}"
        try:
            count, others = unpack(archive, place)
        except UserError as error:
            raise UserError(f"{archive}: {error}; get it again, or unpack it yourself") from None
        say(f"unpacked {plural(count, 'image')} of {archive}{left_out(others)}")
        images += count
    if images == 0:
        names = ", ".join(map(str, archives))
        raise UserError(f"{names} holds no image that can be read; change DATA_DIR")


def fill_folder(folder, put):
    """If `folder` has no images, let `put(part)` write some to a hidden folder in it.

    That is then renamed, so that the images appear all at once or not at all.
    """

    def fill_part():
        part = folder / ".part"  # on the same disk, wherever a link or a mount leads
        with disk_errors(folder):
            shutil.rmtree(part, ignore_errors=True)
            make_folder(part)
            try:
                put(part)
                taken = (folder / "images").exists()  # by something that is no image
                part.rename(folder / ("more images" if taken else "images"))
            finally:
                shutil.rmtree(part, ignore_errors=True)

    lock = Path(f"{folder}.lock")
    waiting = f"another process is filling {folder}; waiting for it"
    build_once(lambda: any_image(folder), fill_part, lock, waiting)


# The size of an archive where it is known; its images take about as much again.
ARCHIVE_BYTES = {CELEBA: 1_450_000_000}
KAGGLE_SECONDS = 60  # a server that sends nothing for this long has failed
# Kaggle's command line, in a process that ends when its parent does, because its stdin closes then.
# The client has no timeout, so we set one. With another argv[0] than "kaggle", it assumes that it
# is used as a library, and demands a login.
KAGGLE_CHILD = """
import os, requests, runpy, sys, threading
threading.Thread(target=lambda: (os.read(0, 1), os._exit(1)), daemon=True).start()
send = requests.Session.send
requests.Session.send = lambda *request, **options: send(*request, **options | {"timeout": SECONDS})
sys.argv[0] = "kaggle"
runpy.run_module("kaggle", run_name="__main__", alter_sys=True)
"""
LOGIN_WANTED = "Authentication required|don't have access|40[13] Client Error"
NO_NETWORK = "Connection|Timeout|Protocol"
# What Kaggle's client says when it fails, and what we say then.
KAGGLE_ERRORS = {
    "SSLError|CERTIFICATE_VERIFY_FAILED": "the certificate of Kaggle's server is not valid here: a "
    "company's proxy or a virus scanner may have put its own in place; set REQUESTS_CA_BUNDLE to "
    "the file of that certificate, or use another network",
    "ProxyError|Proxy Auth": "the proxy refuses the connection to Kaggle; check HTTPS_PROXY, and "
    "the name and password in it",
    LOGIN_WANTED: """Kaggle wants you to log in:
  - either create a token at https://www.kaggle.com/settings (API, Create New Token), and save it as
    ~/.kaggle/access_token, or set KAGGLE_API_TOKEN to it (an older kaggle.json goes to
    ~/.kaggle/kaggle.json); or
  - put images of faces, from anywhere, into DATA_DIR (data/celeba) yourself; or
  - run with --demo, which needs no account.""",
    r"was not found|rate limited|Kaggle's side|[45]\d\d (Client|Server) Error": r"Kaggle returned "
    r"an error (\g<0>): if it is 404 or 'not found', check KAGGLE_DATASET; if it is 429 or a rate "
    "limit, wait an hour; else try again later",
    "No space left": "No space left on the disk of DATA_DIR; free some space there",
    NO_NETWORK: "Kaggle cannot be reached; check the network and run this again to resume, or try "
    "--demo, which needs no network",
}
# An error of the storage server, not of Kaggle's API, means that the signed URL has expired.
EXPIRED = r"4\d\d Client Error(?!.*/v1/)"
DAMAGED = rf"not unpacked.*|does not match expected size|{EXPIRED}"


def download_celeba(folder):
    """Download KAGGLE_DATASET into `folder`, unless images are there.

    Raises SystemFailure if Kaggle, the network or the disk fails.
    """
    downloads = Path(f"{folder}.download")
    fill_folder(folder, lambda part: fetch_celeba(downloads, part))
    shutil.rmtree(downloads, ignore_errors=True)


def fetch_celeba(downloads, folder):
    """Put the images of KAGGLE_DATASET into `folder`; the archive goes to `downloads`.

    It uses the credentials of the user or, if Kaggle refuses those, none. An incomplete archive is
    resumed; a damaged one is downloaded again, once.
    """
    archive = downloads / (KAGGLE_DATASET.split("/")[1] + ".zip")
    say(f"downloading {KAGGLE_DATASET} from Kaggle (CelebA is for non-commercial research)")
    anonymous = again = False
    while True:
        make_folder(downloads)
        size = file_size(archive)
        need_space(downloads, 2 * ARCHIVE_BYTES.get(KAGGLE_DATASET, 0) - size, "CelebA")
        if KAGGLE_DATASET not in ARCHIVE_BYTES:
            check_listing(archive, anonymous)
        words = ["download", "--quiet", "-p", str(downloads)]
        failed, failure = run_kaggle(words, archive, anonymous)
        if not failed:
            try:
                images, _ = unpack(archive, folder)
                if images:
                    return
                raise SystemFailure(
                    f"{KAGGLE_DATASET} has no images; choose another KAGGLE_DATASET, or look into "
                    f"the archive, which is {archive}"
                )
            except UserError as error:
                failure = str(error)
        if re.search(f"{NO_NETWORK}|{EXPIRED}", failure) and file_size(archive) > size:
            say("the connection to Kaggle was lost; asking for the rest")
        elif found := re.search(DAMAGED, failure):
            # If a signed URL expires half-way, an error page ends up in the archive, and Kaggle's
            # client would take it for complete on every later run. So delete it.
            shutil.rmtree(downloads)
            what = f"Kaggle's archive of {KAGGLE_DATASET} is damaged ({found[0]})"
            if again:
                raise SystemFailure(f"{what}; try again later")
            say(f"{what}; starting again")
            again = True
        elif re.search(f"{LOGIN_WANTED}|Traceback", failure) and not anonymous:
            anonymous = True
        else:
            raise SystemFailure(kaggle_error(failure))


# Extensions of files that are certainly no images.
NO_IMAGES = set(".csv .tsv .json .txt .xml .xlsx .parquet .md .pdf .mp3 .wav .mp4 .ipynb".split())


def check_listing(archive, anonymous):
    """Raise SystemFailure if Kaggle lists the files of KAGGLE_DATASET, and none is an image."""
    failed, said = run_kaggle(["files", "--csv", "--page-size", "200"], archive, anonymous)
    kinds = set(re.findall(r"(\.?\w+),[0-9]+,", said.lower()))
    if kinds and kinds <= NO_IMAGES and not failed and "Next Page Token" not in said:
        raise SystemFailure(f"{KAGGLE_DATASET} has no images, only {', '.join(sorted(kinds))}")


def kaggle_error(said):
    """The line to show for what Kaggle's client said when it failed."""
    for pattern, text in KAGGLE_ERRORS.items():
        if found := re.search(pattern, said):
            return found.expand(text)
    last_line = re.sub(r"(?=\S*\d)\S{20,}", "…", one_line(said.splitlines()[-1]))  # tokens
    install = shell("-m", "pip", "install", "--upgrade", "kaggle", "six")
    if UNDER_UV:
        install = shell("--upgrade", *sys.argv)
    return f"Kaggle's client has failed ({last_line}); try {install}"


def run_kaggle(words, archive, anonymous):
    """Run a command of Kaggle's client on KAGGLE_DATASET. Returns whether it failed; what it said.

    The progress bar shows how the archive grows.
    """
    child = KAGGLE_CHILD.replace("SECONDS", str(KAGGLE_SECONDS))
    # -P: so that it imports nothing from the working directory.
    command = [sys.executable, "-P", "-c", child, "datasets", *words, KAGGLE_DATASET]
    environment = kaggle_environment(str(archive.parent.resolve()), anonymous)
    options = {"initial": file_size(archive), "unit_scale": True}
    total = ARCHIVE_BYTES.get(KAGGLE_DATASET)
    bar = progress_bar(None, total, "downloading", "B", **options)
    with tempfile.TemporaryFile() as log, bar:
        pipes = {"stdin": subprocess.PIPE, "stdout": log, "stderr": log}
        with subprocess.Popen(command, env=environment, **pipes) as child:
            try:
                while child.poll() is None:
                    sleep(0.2)
                    with suppress(OSError):  # the terminal may be gone
                        bar.update(file_size(archive) - bar.n)
            finally:
                child.kill()
        log.seek(0)
        said = log.read().decode(errors="replace").strip()
    return child.returncode != 0, said or f"exit status {child.returncode}"


def kaggle_environment(home, anonymous):
    """The environment for Kaggle's client; if `anonymous`, one in which it finds no credentials."""
    unwanted, moved = "VERBOSE", {}  # this one would make it print the user's token
    if anonymous:
        unwanted += "|XDG_CONFIG_HOME|KAGGLE_(?!API_ENVIRONMENT).*"
        moved = {"HOME": home, "USERPROFILE": home, "PYTHONUSERBASE": site.getuserbase()}
    kept = {
        key: text.strip() for key, text in os.environ.items() if not re.fullmatch(unwanted, key)
    }
    return kept | moved


def file_size(path):
    return path.stat().st_size if path.exists() else 0


def unpack(archive, folder):
    """Unpack the images of an archive, and their attributes, into `folder`.

    Returns the number of images, and a Counter of the other files by extension. Raises UserError,
    which begins with "not unpacked", if the archive is damaged.
    """
    with damage_errors("not unpacked"), zipfile.ZipFile(archive) as source:
        members, others = [], Counter()
        for member in source.infolist():
            name = member.filename
            if not hidden(name) and (WANTED.search(name) or opens(source.open(member))):
                members.append(member)
            else:
                others[Path(name).suffix.lower()] += 1
        del others[""]  # folders
        count = sum(ATTRIBUTE_FILE not in member.filename for member in members)
        with disk_errors(folder):
            make_folder(folder)
        need_space(folder, sum(member.file_size for member in members), "unpacking")
        for member in progress_bar(members, None, "unpacking", " images"):
            with disk_errors(folder):
                source.extract(member, folder)  # never outside of the folder
    return count, others


# The settings that --demo changes.
DEMO = {
    "DATA_DIR": "data/demo",
    "OUTPUT_DIR": "output-demo",
    "BATCH_SIZE": 32,
    "EPOCHS": 12,
    "G_FEATURES": 32,
    "D_FEATURES": 32,
}


def draw_demo(folder):
    """Put 4,000 JPEGs of drawn faces into `folder`, and a table of their attributes."""
    rows = []
    for index in progress_bar(range(4_000), 4_000, "drawing", " faces"):
        face, name = draw_face(random.Random(index)), f"{index:06d}.jpg"
        face.save(folder / name, quality=90)
        rows.append([name, *map(int, face.info.values())])
    append_rows(folder / ATTRIBUTE_FILE, [["image_id", *face.info], *rows])


def draw_face(rng):
    """A drawn face, 178 × 218 pixels as CelebA's are; it depends on `rng`, a random.Random.

    Its `info` says which attributes it has.
    """

    def oval(x, y, width, height, colour):
        draw.ellipse((x - width, y - height, x + width, y + height), colour)

    skin = f"hsl(24, 45%, {rng.randint(40, 82)}%)"
    hair_hue, hair_light = rng.randint(15, 45), rng.randint(6, 40)
    hair = f"hsl({hair_hue}, 60%, {hair_light}%)"
    eye_hue = rng.randint(20, 220)
    iris = f"hsl({eye_hue}, 40%, 25%)"
    wall = f"hsl({rng.randrange(360)}, 25%, {rng.randint(35, 80)}%)"
    image = Image.new("RGB", (178, 218), wall)
    draw = ImageDraw.Draw(image)
    x, y = rng.uniform(84, 94), rng.uniform(108, 116)
    width, height = rng.uniform(43, 51), rng.uniform(58, 66)
    length = rng.choice((0, 20))
    oval(x, y - 15 + length, width + 14, height + length, hair)
    draw.rectangle((x - 19, y + 40, x + 19, 218), skin)
    oval(x, y, width, height, skin)
    for eye in (x - 20, x + 20):
        oval(eye, y - 6, 10, 6, "white")
        oval(eye, y - 6, 4, 5, iris)
        draw.line((eye - 10, y - 20, eye + 10, y - 20), hair, 4)
    smile = rng.uniform(0, 12)
    draw.chord((x - 18, y + 34 - smile, x + 18, y + 38 + smile), 0, 180, "#be4650")
    image = image.filter(ImageFilter.GaussianBlur(1.2))
    image.info = {
        "Smiling": smile > 6,
        "Long_Hair": length > 0,
        "Blond_Hair": hair_light > 22,
        "Blue_Eyes": eye_hue > 150,
    }
    return image


# ------------------------------------------------------------------------------ files and messages


class UserError(ValueError):
    """What a user can fix, in one line: a wrong call, setting or path."""

    status = 2  # the exit status of the command line


class RunError(UserError):
    """A UserError that only shows after the work has begun."""

    status = 1


class SystemFailure(OSError):
    """A failure of network or disk, in one line."""

    status = 1


def out_of_memory(error):
    """Whether `error` was raised because the memory of a device or of the CPU is full."""
    full = "out of memory|DefaultCPUAllocator|ALLOC_FAILED"
    return isinstance(error, MemoryError) or re.search(full, str(error)) is not None


@contextmanager
def damage_errors(text):
    """Turn any error within `with` into a UserError that begins with `text`.

    A damaged file can raise almost any error. Errors of memory or disk pass through unchanged.
    """
    try:
        yield
    except SystemFailure:
        raise
    except Exception as error:
        if out_of_memory(error):
            raise
        raise UserError(f"{text} ({one_line(error)})") from error


@contextmanager
def disk_errors(path):
    """Turn an OSError within `with` into a SystemFailure that names the file and its setting."""
    try:
        yield
    except SystemFailure:
        raise
    except OSError as error:
        text = f"{error.strerror or error}: {error.filename or path}"
        for name in ("OUTPUT_DIR", "CACHE_DIR", "DATA_DIR"):
            place = os.path.splitext(os.path.abspath(globals()[name]))[0]  # a zip is unpacked there
            if os.path.abspath(path).startswith(place):
                text += f"; check {name} ({globals()[name]})"
        raise SystemFailure(text) from error


failing: set[str] = set()  # what could not be written the last time


def attempt(what, write, *arguments):
    """Call `write`, whose failure must not end the run. Returns whether it has worked.

    Of several failures in a row, only the first is reported.
    """
    try:
        write(*arguments)
    except Exception as error:
        if what not in failing:
            say(f"{what} cannot be written ({one_line(error)}); trying again later")
        failing.add(what)
        return False
    failing.discard(what)
    return True


@contextmanager
def replacing(path, previous=None):
    """A file to write next to `path`, which takes that name when everything is written.

    Until then the old file stays as it is; then it becomes `previous`, if that is given.
    """
    part = Path(f"{path}.part")
    with disk_errors(path):
        make_folder(path.parent)
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
                part.unlink()


def move(path, to):
    """os.replace; on Windows a virus scanner can hold a file for a moment, so try again."""
    for _ in range(5 if sys.platform == "win32" else 0):
        with suppress(PermissionError):
            return os.replace(path, to)
        sleep(0.2)
    os.replace(path, to)


def write_file(path, write, previous=None):
    """Let `write(file)` replace `path`.

    It writes to memory first, because torch.save raises no OSError when a disk is full.
    """
    buffer = io.BytesIO()
    buffer.name = path  # its extension tells Pillow the format
    write(buffer)
    with replacing(path, previous) as file:
        file.write(buffer.getbuffer())


def make_folder(path):
    path.mkdir(parents=True, exist_ok=True)


def output_path(name):
    """The path of `name` in OUTPUT_DIR."""
    return Path(OUTPUT_DIR, name)


def need_space(folder, size, what):
    """Raise SystemFailure if the disk of `folder` has less than `size` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < size:
        raise SystemFailure(
            f"{what} needs {readable(size)} on the disk of {folder}, which has {readable(free)} "
            "free; free some space"
        )


def need_module(name, package):
    """Import a module of a package, and return it. Raises RunError if that fails."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        install = shell("-m", "pip", "install", package)
        if UNDER_UV:
            install = shell("--with", package, *sys.argv)
        raise RunError(f"{package} is missing or broken ({one_line(error)}): {install}") from error


# Started by `uv run dcgan.py`
UNDER_UV = "UV_RUN_RECURSION_DEPTH" in os.environ and __name__ == "__main__"


def shell(*words):
    """A line for the shell that runs Python with these words, as this process was run."""
    join = subprocess.list2cmdline if sys.platform == "win32" else shlex.join
    python = ["uv", "run"] if UNDER_UV else [sys.orig_argv[0]]
    return join([*python, *map(str, words)])


def readable(size):
    """A number of bytes as text."""
    return f"{size / 2**30:.1f} GiB" if size > 2**29 else f"{size / 2**20:.1f} MiB"


def plural(count, noun):
    """ "1 epoch", "2 epochs"."""
    return f"{count:,} {noun}" + "s" * (count != 1)


NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


def locked(path, waiting=None):
    """A context that holds the lock file `path`, where the disk has locks.

    If another process holds it: prints `waiting` and waits; without that text, raises
    SystemFailure.
    """
    with disk_errors(path):
        make_folder(path.parent)
        lock = FileLock(path)
        try:
            return lock.acquire(timeout=0)
        except Timeout:
            pass
        except (OSError, NotImplementedError) as error:
            if getattr(error, "errno", errno.ENOSYS) not in NO_LOCKS:
                raise
            say(f"the disk of {path.parent} has no file locks; use it for one run at a time")
            return nullcontext()
        if waiting is None:
            raise SystemFailure(
                f"{path.parent} is in use by another run; wait for its end, or change OUTPUT_DIR"
            )
        say(waiting)
        return lock.acquire()


def build_once(find, build, lock, waiting):
    """What `find()` returns. While that is None, a single process calls `build()` to make it."""
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
    return int(digest(repr((SEED, *parts)))[:16], 16) >> 1  # 63 bits


def digest(text):
    """The SHA-256 of a text, in hexadecimal."""
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()


def in_notebook():
    """Whether this runs where pictures can be shown."""
    return "IPython" in sys.modules and hasattr(sys.modules["IPython"].get_ipython(), "kernel")


def on_terminal():
    return sys.stderr is not None and sys.stderr.isatty()


def show(picture, place=None):
    """In a notebook, show a PIL picture: in `place`, or in a new place, which is returned."""
    if in_notebook():
        from IPython.display import display

        if place is None:
            return display(picture, display_id=True)
        place.update(picture)
    return place


def quiet():
    return warnings.catch_warnings(action="ignore")


LINE_SECONDS = 60  # between two lines of a progress bar where there is no terminal


class Lines:
    """A text file whose lines are printed by `say`."""

    def write(self, text):
        if text.strip():
            say(text.strip())


def progress_bar(items, total, name, unit, **options):
    """A tqdm bar, of the notebook style in a notebook; without a terminal, a line now and then."""
    if in_notebook() or on_terminal():
        options |= {"disable": RANK > 0, "dynamic_ncols": True}
    else:
        seconds = dict.fromkeys(("mininterval", "delay"), LINE_SECONDS)
        options |= seconds | {"miniters": 1, "leave": False, "file": Lines()}
    with quiet():  # about missing ipywidgets
        from tqdm.auto import tqdm as bar
    return bar(items, name, total, unit=unit, **options)


def say(text):
    """Print a line, above any progress bar, on rank 0."""
    if RANK > 0:
        return
    with suppress(OSError, ValueError, AttributeError):  # the terminal may be gone, or be None
        tqdm.write(text)
        sys.stdout.flush()


def one_line(error):
    """An error, or other text, in one line that is not too long."""
    text = f"there is no {error}" if isinstance(error, KeyError) else str(error)
    return re.sub(r"\s+", " ", text)[:120] or type(error).__name__


# -------------------------------------------------------------------------- ranges of the settings

# What each setting is and, after the semicolon, what it may be: a range of whole numbers (2..65536)
# or of any numbers (0.0..1.0), one of some words or numbers, or a path.
SETTING_GROUPS = {
    "data": {
        "IMAGE_SIZE": "pixels per side; 32, 64, 128, 256",
        "BATCH_SIZE": "images per step, over all processes; 2..65536",
        "MAX_IMAGES": "use the first so many images by name, by default all; 1..1000000000 or None",
        "MIRROR": "mirror real images at random; True, False",
        "AUGMENT": "share of real and fake images whose colours and position are changed at "
        "random, by default 0.3 for small sets; 0.0..1.0 or None",
        "WORKERS": "processes that decode images, by default one per core; 0..1024 or None",
        "SKIP_BROKEN": "go on even if over a tenth of the images cannot be read; True, False",
    },
    "networks": {
        "LATENT_SIZE": "length of the noise vector of a face; 1..65536",
        "G_FEATURES": "channels of the generator's layer next to the image; 4..1024",
        "D_FEATURES": "channels of the discriminator's layer next to the image; 4..1024",
        "ATTRIBUTES": "attributes that can be chosen for each generated face: columns of "
        "list_attr_celeba.csv, such as Male,Smiling, or folders: the name of each subfolder is "
        "one; names separated by commas or None",
    },
    "training": {
        "EPOCHS": "passes over the images; 1..1000000",
        "LEARNING_RATE": "learning rate of both optimizers; 0.0..1.0",
        "D_LEARNING_RATE": "learning rate of the discriminator, if different; 0.0..1.0 or None",
        "BETA1": "decay rate of AdamW's average of gradients; 0.0..0.999",
        "BETA2": "decay rate of AdamW's average of squared gradients; 0.0..0.99999",
        "WEIGHT_DECAY": "weight decay of AdamW; 0.0..1.0",
        "REAL_LABEL": "target for real images; 0.5..1.0",
        "R1_GAMMA": "weight of the discriminator's gradient penalty; 0.0..1000.0",
        "AVERAGE_SHARE": "half-life of the average, as a share of the images seen; 0.0..1.0",
        "SEED": "seed of weights, noise and image order; 0..9223372036854775807",
    },
    "reporting": {
        "LOG_EVERY": "steps per row of metrics.csv; 1..1000000",
        "CHECKPOINT_MINUTES": "minutes between checkpoints; 0.0..1000000.0",
    },
    "hardware": {
        "DEVICE": "device, by default the best; a device (cpu, cuda, cuda:1, mps, xpu) or None",
        "PRECISION": "number format, by default the fastest; float32, bfloat16, float16 or None",
    },
    "places": {
        "KAGGLE_DATASET": "data set on kaggle.com; owner/name",
        "DATA_DIR": "folder of images, which may be in subfolders, or a zip of them; a path",
        "CACHE_DIR": "folder for decoded images; a path",
        "OUTPUT_DIR": "folder of the run: samples, tables, checkpoints; a path",
    },
}
SETTINGS = {name: setting for group in SETTING_GROUPS.values() for name, setting in group.items()}
# The arguments of the commands.
ARGUMENTS = {
    "num_images": "number of faces; 1..1000000000",
    "num_faces": "number of faces; 2..1000",
    "frames": "frames from one face to the next; 1..1000",
    "truncation": "factor for the noise; below 1, faces are cleaner but more alike; 0.0..1.0",
    "attributes": "what all faces have or, with - before it, do not have, such as "
    "Smiling,-Male; names separated by commas or None",
    "individual": "one PNG file per face instead of a grid; True, False",
    "seed": "seed of the noise: the same seed draws the same faces; 0..9223372036854775807",
    "checkpoint": "checkpoint.pt or generator.pt to draw from; a path",
    "output": "file or folder to write; a path",
    "data_dir": "folder or zip of the real images, by default that of the training run; a path",
}
COUNT = "0..1000000000000000"  # of epochs, steps or images


def setting_values():
    """{name: value} of the settings, as they are now."""
    return {name: globals()[name] for name in SETTINGS}


def flag(name):
    return "--" + name.lower().replace("_", "-")


def checked(name, value):
    """Convert `value`, which may be the text of a flag, to the type of this setting or argument.

    Raises UserError, with what is allowed.
    """
    allowed = (SETTINGS | ARGUMENTS)[name].rpartition("; ")[2]
    try:
        return parse(value, allowed)
    except Exception:  # what is raised depends on the type of `value`
        given = one_line(repr(value))
        whole = " (whole numbers)" if re.match(r"\d+\.\.", allowed) else ""
        text = f"{name} ({flag(name)}) is {given}; it must be {allowed}{whole}"
        raise UserError(text) from None


def parse(value, allowed):
    """`value`, which may be text, as the type that `allowed` describes, as in the table above.

    Raises ValueError, TypeError, OverflowError or RuntimeError for all others.
    """
    rule = allowed.removesuffix(" or None")
    if rule != allowed and value in (None, "None", "none"):
        return None
    low, is_range, high = rule.partition("..")
    if is_range:
        kind = float if "." in low else int
        number = kind(value)
        exact = isinstance(value, str) or (number == value and not isinstance(value, bool))
        if exact and kind(low) <= number <= kind(high):
            return number
        raise ValueError
    if rule.startswith("a device"):
        return str(torch.device(value))
    patterns = {
        "a path": r"[^\0]+",
        "owner/name": r"[\w-]+/[\w-]+",
        "names separated by commas": r"[^,\0]+(,[^,\0]+)*",
    }
    text = os.fspath(value) if rule in patterns else str(value)
    os.fsencode(text)  # raises ValueError if no file can have this name
    if not re.fullmatch(patterns.get(rule) or rule.replace(", ", "|"), text):
        raise ValueError
    if rule == "a path":
        return str(Path(text).expanduser().absolute())
    if rule in patterns:
        return text
    return {"True": True, "False": False}.get(text, int(text) if rule[0].isdigit() else text)


def check_settings():
    """Check every setting before any work is done. Raises UserError."""
    check_launcher()
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        sys.exit(
            "dcgan.py: a worker process has imported your script again, and must not train; put "
            'the lines that call dcgan below: if __name__ == "__main__":'
        )
    for name in SETTINGS:
        globals()[name] = checked(name, globals()[name])
    data, output = data_folder().resolve(), Path(OUTPUT_DIR).resolve()
    if data in (output, *output.parents):
        raise UserError(
            f"OUTPUT_DIR ({OUTPUT_DIR}) is inside DATA_DIR ({data}); move it, or samples would "
            "become training images"
        )
    if BATCH_SIZE % WORLD_SIZE:
        raise UserError(
            f"BATCH_SIZE is {BATCH_SIZE}; it must be a multiple of the number of processes "
            f"({WORLD_SIZE})"
        )


# ------------------------------------------------------------------------------------ command line


# The flags of all commands that use a trained generator. Small letters are arguments of the
# function, capitals are settings.
GENERATOR_FLAGS = "seed checkpoint OUTPUT_DIR DEVICE PRECISION "
# What some settings mean to these commands.
MEANINGS = {
    "OUTPUT_DIR": "folder of the trained run",
    "DATA_DIR": "folder to download to",
    "MAX_IMAGES": "number of real images to compare with, in the order of their names",
    "CACHE_DIR": "folder for decoded images and for Inception features of real ones",
}
# For each command: the function that it calls, what it does, and its flags.
COMMANDS = {
    "generate": (
        generate,
        "Generate new faces: one grid or, with --individual, one file per face.",
        GENERATOR_FLAGS + "num_images truncation individual output attributes",
    ),
    "interpolate": (
        interpolate,
        "Make a looping animation that moves from face to face.",
        GENERATOR_FLAGS + "num_faces frames output attributes",
    ),
    "download": (
        download,
        "Download CelebA, or KAGGLE_DATASET, to DATA_DIR, and do nothing else.",
        "DATA_DIR KAGGLE_DATASET",
    ),
    "evaluate": (
        evaluate,
        "Measure FID, KID, precision and recall of new faces, and append them to evaluation.csv.",
        GENERATOR_FLAGS + "num_images MAX_IMAGES WORKERS SKIP_BROKEN data_dir CACHE_DIR",
    ),
}


class Parser(argparse.ArgumentParser):
    """argparse's, but an error is a UserError of one line."""

    def error(self, message):
        raise UserError(f"{one_line(message)}; add --help to see what is possible")


def command_line():
    """The parser: flags for training, and the commands with flags of their own."""
    about = (__doc__ or "").partition("\n\nThe method")[0]
    options = {"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter}
    usage = "dcgan.py [command] [flags]"
    parser = Parser("dcgan.py", usage, about, **options)
    text = "a short run on cartoon faces that the script draws; takes minutes"
    parser.add_argument("--demo", action="store_true", help=text)
    text = "print the versions of dcgan.py, PyTorch and Python, and the device"
    parser.add_argument("--version", action="store_true", help=text)
    add_flags(parser, train, SETTINGS, {})
    words = parser.add_subparsers(
        title="commands, instead of training", metavar="command", prog="dcgan.py", dest="command"
    )
    for word, (function, about, flags) in COMMANDS.items():
        inner = words.add_parser(word, help=about, description=about, **options)
        add_flags(inner, function, flags.split(), MEANINGS)
    return parser


def add_flags(parser, function, flags, meanings):
    """Add `flags` of a command that calls `function`, in groups, with ranges and defaults."""
    parameters = inspect.signature(function).parameters
    for title, group in ({"arguments": ARGUMENTS} | SETTING_GROUPS).items():
        section = parser.add_argument_group(title)
        for name, row in group.items():
            if name not in flags:
                continue
            meaning, _, allowed = row.rpartition("; ")
            metavar = "PATH" if allowed == "a path" else "N" if allowed[0].isdigit() else "NAME"
            default = parameters[name].default if name in parameters else globals()[name]
            shown = "" if default is None else f"; default {default}"
            text = f"{meanings.get(name, meaning)} ({allowed}{shown})".replace("%", "%%")
            options = {"metavar": metavar, "default": argparse.SUPPRESS}
            if allowed == "True, False":
                options |= {"nargs": "?", "const": "True"}
            section.add_argument(flag(name), dest=name, help=text, **options)


def parse_words(words):
    """(function to call, its arguments, settings to change) for the words of a command line.

    Raises UserError for what is unknown, and for a setting that the command does not use.
    """
    known = [flag(name) for name in (*SETTINGS, *ARGUMENTS, "demo", "version", "help")]
    for word in words:
        name = word.partition("=")[0]
        if name.startswith("--") and name not in known:  # argparse would call its value a command
            close = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {close[0]}?" if close else "--help lists all of them"
            raise UserError(f"there is no flag {one_line(name)}; {hint}")
    # argparse would take -Male for a flag.
    line = "\0".join(["", *words]).replace("\0--attributes\0", "\0--attributes=")
    words = line.split("\0")[1:]
    given, unused = command_line().parse_known_args(words)
    options = vars(given)
    demo, word, version = (options.pop(name) for name in ("demo", "command", "version"))
    settings = {name: options.pop(name) for name in SETTINGS if name in options}
    if version:
        return print_version, {}, settings
    function = train
    if word:
        function, _, flags = COMMANDS[word]
        unused += [flag(name) for name in settings if name not in flags.split()]
    if unused:
        raise UserError(f"{one_line(unused[0])} has no effect here; add --help to see what has")
    return function, options, DEMO | settings if demo else settings


def print_version():
    """Print what a bug report needs. The number of dcgan.py is what `git hash-object` says."""
    check_settings()
    text = Path(__file__).read_text(encoding="utf-8").encode()
    number = hashlib.sha1(b"blob %d\0" % len(text) + text).hexdigest()[:10]
    python = sys.version.split()[0]
    where = f"{device_name(pick_device())}, {sys.platform}"
    say(f"dcgan.py {number}, PyTorch {torch.__version__}, Python {python}; {where}")


def open_streams():
    """Let printing work without stdout or stderr, and in an encoding that lacks a character."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))
        with suppress(OSError, AttributeError):  # what stands in for one may not be able to
            getattr(sys, name).reconfigure(errors="backslashreplace")


def main(argv=None):
    """The command line. Returns the exit status: 0, 1 for a failure, 2 for a wrong call.

    After a signal it is 128 plus the number of the signal. Errors that only someone editing this
    file can fix keep their traceback.
    """
    settings_before = setting_values()
    open_streams()
    try:
        function, arguments, settings = parse_words(sys.argv[1:] if argv is None else argv)
        globals().update(settings)
        function(**arguments)
        return 0
    except KeyboardInterrupt as interrupt:
        return 128 + (interrupt.args[0] if interrupt.args else signal.SIGINT)
    except (UserError, SystemFailure) as error:
        text, status = error, error.status
    except (RuntimeError, MemoryError) as error:  # mostly PyTorch's
        text, status = device_error(error), 1
        if text is None:
            raise
    finally:
        globals().update(settings_before)
    print(f"dcgan.py: error: {text}", file=sys.stderr)
    return status


if __name__ == "__main__":
    # Pasted into a cell of a notebook, it has no file, and the command line is the kernel's.
    status = main(None if "__file__" in globals() or not in_notebook() else [])
    if not in_notebook():
        sys.exit(status)
