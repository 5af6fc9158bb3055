"""Train a DCGAN on CelebA with one command, then generate new faces with it.

    pip install -r requirements.txt
    python dcgan.py                            # download CelebA, train, save samples
    python dcgan.py --demo                     # a small run in minutes, on cartoon faces
    python dcgan.py generate --num-images 16   # new faces
    python dcgan.py interpolate                # an animation that moves from face to face
    python dcgan.py evaluate                   # FID, KID, precision and recall

In a notebook: import dcgan; dcgan.EPOCHS = 2; dcgan.train(); dcgan.generate_images(num_images=16)

The method: Radford, Metz, Chintala, "Unsupervised Representation Learning with Deep Convolutional
Generative Adversarial Networks", 2015, https://arxiv.org/abs/1511.06434.

The sections of this file, in order (dependencies between two sections go one way only):

    settings                   the constants to edit
    networks                   generator and discriminator
    training step              losses, optimizers, the average of the generator
    hardware                   device, precision, the step as a CUDA graph
    data                       images decoded once into a file, their labels, batches of them
    pictures and distance      grids, animations, curves, the distance to real faces
    training                   the run: epochs, reports, samples, signals
    using a trained generator  generate, interpolate and evaluate
    where images come from     Kaggle, archives, or cartoon faces for the demo
    files and messages         errors, safe writing, checkpoints, printing
    what the settings are      their meaning and what they may be
    command line               flags, commands, exit statuses
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
#     "kaggle>=2.2.5",
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
import difflib
import hashlib
import inspect
import io
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import warnings
import zipfile
from collections import Counter
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from itertools import chain, islice, pairwise, zip_longest
from multiprocessing.pool import ThreadPool
from pathlib import Path
from time import perf_counter, sleep, strftime
from unicodedata import normalize

try:
    import numpy as np
    import torch
    import torch.distributed as dist
    import torch.nn.functional as F
    from filelock import FileLock
    from PIL import Image, ImageDraw, ImageOps
    from torch import nn
    from torch.optim.swa_utils import get_ema_multi_avg_fn, update_bn
    from torchvision.datasets import ImageFolder
    from torchvision.io import encode_png
    from torchvision.transforms.functional import center_crop, pil_to_tensor, to_pil_image
    from torchvision.utils import make_grid
    from tqdm import tqdm
except ImportError as error:
    if __name__ != "__main__":
        raise
    sys.exit(f"dcgan.py: error: {error}; run {sys.executable} -m pip install -r requirements.txt")

# ---------------------------------------------------------------------------------------- settings
# Edit these lines, or use flags: BATCH_SIZE is --batch-size. The comments give the reason for each
# value. What a setting is, and what it may be, is in HELP below, and in --help.

# Data
IMAGE_SIZE = 64  # as in the paper; doubling it takes three to five times as long
BATCH_SIZE = 64  # 32 learns more from each image in short runs, but is slower
MAX_IMAGES = None  # all images
MIRROR = True  # doubles the images; False where left and right differ, as in letters and logos
AUGMENT = None  # 0.3 for up to 200 images, which a discriminator would memorise; 0 from 1,000

# Networks
LATENT_SIZE = 100  # as in the paper
G_FEATURES = 64  # the paper's 128 is slower; layers farther from the image have more
D_FEATURES = 64  # fewer make the discriminator weaker
ATTRIBUTES = None  # as in the paper; "Male,Smiling" lets you choose them for each face you generate

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
KAGGLE_DATASET = CELEBA  # for another one, set DATA_DIR too
DATA_DIR = CELEBA_DIR  # for your own photos, give their folder, or a zip of them
CACHE_DIR = "data/cache"  # holds 2.3 GiB for all of CelebA at 64 pixels
OUTPUT_DIR = "output"  # one folder per run

# What torchrun says of this process
WORLD_SIZE = int(os.environ.get("WORLD_SIZE") or 1)  # number of processes
RANK = int(os.environ["RANK"]) if WORLD_SIZE > 1 else 0  # 0 draws, logs and saves

# ---------------------------------------------------------------------------------------- networks


def layer_widths(features, image_size):
    """Channels per layer, starting next to the image: [64, 128, 256, 512] at 64 pixels."""
    levels = int(math.log2(image_size)) - 2
    return [features * min(8, 2**level) for level in range(levels)]


class Generator(nn.Sequential):
    """Noise and labels (N, latent_size) to images (N, 3, S, S) in [-1, 1]; in comments, S is 64."""

    def __init__(self, image_size, latent_size, features):
        widths = layer_widths(features, image_size)[::-1]
        layers = [
            nn.Unflatten(1, (latent_size, 1, 1)),  # (N, latent_size, 1, 1)
            nn.ConvTranspose2d(latent_size, widths[0], 4, bias=False),  # (N, 512, 4, 4)
        ]
        for inner, outer in pairwise([*widths, 3]):
            layers += [nn.BatchNorm2d(inner), nn.ReLU(inplace=True)]
            # in turn (N, 256, 8, 8), (N, 128, 16, 16), (N, 64, 32, 32), (N, 3, 64, 64)
            layers += [nn.ConvTranspose2d(inner, outer, 4, 2, 1, bias=outer == 3)]
        super().__init__(*layers, nn.Tanh())
        self.apply(init_weights)


class Discriminator(nn.Sequential):
    """Images (N, 3, S, S) in [-1, 1] to float32 logits (N,) of the probability of "real".

    One more logit for each attribute, times the label (N, A), is added, so an image that does not
    fit its labels looks fake ("projection discriminator", https://arxiv.org/abs/1802.05637).
    """

    def __init__(self, image_size, features, attributes):
        widths = layer_widths(features, image_size)
        layers = []
        for outer, inner in pairwise([3, *widths]):
            # in turn (N, 64, 32, 32), (N, 128, 16, 16), (N, 256, 8, 8), (N, 512, 4, 4)
            layers += [nn.Conv2d(outer, inner, 4, 2, 1, bias=outer == 3)]
            if outer != 3:
                layers += [nn.BatchNorm2d(inner)]
            layers += [nn.LeakyReLU(0.2, inplace=True)]
        last = nn.Conv2d(widths[-1], 1 + attributes, 4)
        super().__init__(*layers, last, nn.Flatten())  # (N, 1 + A)
        self.apply(init_weights)
        nn.init.zeros_(last.weight[1:])  # many attributes would make the first logits huge

    def forward(self, images, labels=0):
        logits = super().forward(images).float()
        return logits[:, 0] + (labels * logits[:, 1:]).sum(1)


def init_weights(module):
    """Initial weights as in the paper's code: convolutions N(0, 0.02), gains N(1, 0.02).

    Layers of other types keep PyTorch's.
    """
    mean = 1.0 if isinstance(module, nn.BatchNorm2d) else 0.0
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d)):
        nn.init.normal_(module.weight, mean, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def build_generator(state):
    """The averaged generator in a checkpoint, on the CPU; `state`: by `read_checkpoint`."""
    settings = state["settings"]
    latent_size = settings["LATENT_SIZE"] + len(state["attributes"])
    generator = Generator(settings["IMAGE_SIZE"], latent_size, settings["G_FEATURES"])
    restore(generator, state["average"])
    return generator.eval()


@torch.no_grad()
def draw(generator, latents, dtype):
    """Images (N, 3, H, W) in [0, 1], on the CPU, from `latents` (N, z + A)."""
    device = next(generator.parameters()).device
    with autocast(device, dtype):
        images = generator(latents.to(device))
    return images.float().add(1).div(2).clamp(0, 1).cpu()


# ----------------------------------------------------------------------------------- training step

R1_INTERVAL = 32  # the R1 penalty is slow, so only every 32nd step has it, 32 times as strong
# What a step measures: columns of metrics.csv, values in the bar, curves in losses.png. D(x) and
# D(G(z)), the probabilities of "real" for real and generated images, are d_real and d_fake.
MEASURES = ("d_real", "d_fake", "loss_d", "loss_g")


def bce(logits, target):
    """Binary cross-entropy on float32 logits: probabilities of 0 or 1 would have no gradient."""
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, target))


def augment(images, changes):
    """Change colours and place of `images` (N, 3, S, S) by `changes` (N, 5), all in [-1, 1].

    A change of 0 is none. The discriminator sees reals and fakes changed, so it cannot memorise a
    small set. The gradient passes through the changes, so the generator does not learn to draw them
    ("DiffAugment", Zhao et al. 2020, https://arxiv.org/abs/2006.10738).
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
    apart = here[:, None] - here
    rows = apart == (down * size / 8).round()
    columns = apart == (-right * size / 8).round()
    return rows.float() @ images @ columns.float()


class Trainer:
    """Both networks, their optimizers, and the averaged generator, which draws all samples."""

    def __init__(self, device, dtype, attributes):
        self.device = device
        self.dtype = dtype
        self.autocast = partial(autocast, device, dtype)
        # At once: fused AdamW is silently wrong if weights and moments differ in memory format.
        layout = {"device": device, "memory_format": memory_format(device)}
        torch.manual_seed(seed_for("weights"))
        self.generator = Generator(IMAGE_SIZE, LATENT_SIZE + attributes, G_FEATURES).to(**layout)
        self.discriminator = Discriminator(IMAGE_SIZE, D_FEATURES, attributes).to(**layout)
        self.average = copy.deepcopy(self.generator).eval().requires_grad_(False)
        self.g_optimizer = adamw(self.generator, LEARNING_RATE)
        self.d_optimizer = adamw(self.discriminator, D_LEARNING_RATE or LEARNING_RATE)
        self.kind = type(self.g_optimizer).__name__  # of optimizer
        # Only float16 uses it: small gradients would become 0 there.
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        self.images = 0  # real images seen so far
        self.totals = torch.zeros(len(MEASURES) + 1, device=device)  # sums, and number of steps
        self.steps = [partial(self.step, False), partial(self.step, True)]
        # With several processes, a graph would have to capture their communication.
        if device.type == "cuda" and WORLD_SIZE == 1:
            stream = torch.cuda.Stream()
            self.steps = [StepGraph(step, stream, self.abandon_step) for step in self.steps]

    @torch.no_grad()
    def start_grey(self):
        """Make the weights of the three colours equal: on grey images they stay so."""
        for network in (self.generator, self.discriminator, self.average):
            for weight in network.parameters():
                if weight.dim() == 4 and weight.shape[1] == 3:  # of the layer next to the image
                    weight[:, 1:] = weight[:, :1]

    def step(self, with_penalty, faces, flips, latents, changes=None):
        """One step of the discriminator, then one of the generator, on the same fakes.

        `faces`: uint8 (N, 3, H, W); `flips`, which of them to mirror: bool (N, 1, 1, 1); `latents`:
        noise, and the labels of the faces, which the fakes get as well: (N, z + A); `changes` by
        `augment` of reals and fakes: (N, 2, 5), or None.

        Careful when you edit this: on CUDA it runs three times, then as a CUDA graph, in which
        Python numbers keep their value, and print() prints nothing. Tensors behave as usual.
        """
        self.discriminator.train().requires_grad_(True)
        reals = torch.where(flips, faces.flip(3), faces)
        reals = reals.to(torch.float32, memory_format=memory_format(self.device))
        reals.mul_(2 / 255).sub_(1)
        labels = latents[:, LATENT_SIZE:]

        # Discriminator: minimise -log D(x) - log(1 - D(G(z))).
        with self.autocast():
            fakes = self.generator(latents)
        if changes is not None:  # not in half precision, in which pixels would be rounded
            reals = augment(reals, changes[:, 0])
            fakes = augment(fakes, changes[:, 1])
        # Two calls, so that reals and fakes are each normalised by their own statistics.
        with self.autocast():
            real_logits = self.discriminator(reals, labels)
            fake_logits = self.discriminator(fakes.detach(), labels)
        loss_d = bce(real_logits, REAL_LABEL) + bce(fake_logits, 0.0)
        penalty = self.gradient_penalty(reals, labels) if with_penalty else 0.0
        self.descend(self.d_optimizer, loss_d + R1_INTERVAL * R1_GAMMA / 2 * penalty)

        # Generator: minimise -log D(G(z)), judged by the updated discriminator.
        self.discriminator.requires_grad_(False)
        with self.autocast():
            loss_g = bce(self.discriminator(fakes, labels), 1.0)
        self.descend(self.g_optimizer, loss_g)
        self.scaler.update()

        # The values of MEASURES, in that order. To show another loss, add it to both.
        measured = [real_logits.sigmoid().mean(), fake_logits.sigmoid().mean(), loss_d, loss_g]
        self.totals += torch.stack([*measured, torch.ones_like(loss_d)]).detach()

    def gradient_penalty(self, reals, labels):
        """R1: the mean squared norm of the gradient of the discriminator's logit at real images.

        It keeps the discriminator from being too sure (https://arxiv.org/abs/1801.04406). BatchNorm
        uses its running statistics, so that each logit depends on its own image only.
        """
        reals.requires_grad_()
        self.discriminator.eval()
        with self.autocast():
            logits = self.discriminator(reals, labels)
        self.discriminator.train()
        # Not the gradient of logits.sum(), which is wrong on a Mac (PyTorch issue 180201).
        ones = torch.ones_like(logits)
        (gradients,) = torch.autograd.grad(logits, reals, ones, create_graph=True)
        return gradients.square().sum((1, 2, 3)).mean()

    def advance(self, *batch):
        """Do `step` on a batch, by a CUDA graph if there is one; then update the average.

        The average's half-life is a share of the images seen, so that early weights do not linger.
        """
        with_penalty = R1_GAMMA > 0 and self.images // BATCH_SIZE % R1_INTERVAL == 0
        self.steps[with_penalty](*batch)
        self.images += BATCH_SIZE
        keep = 0.5 ** (BATCH_SIZE / (AVERAGE_SHARE * self.images))
        update = get_ema_multi_avg_fn(keep)
        update([*self.average.parameters()], [*self.generator.parameters()], None)  # None is unused

    def take_means(self):
        """{name: mean since the last call}. Only this makes the training loop wait for the GPU."""
        if WORLD_SIZE > 1:
            dist.all_reduce(self.totals)
        *sums, steps = self.totals.tolist()
        self.totals.zero_()
        return {name: float(f"{total / steps:.6g}") for name, total in zip(MEASURES, sums)}

    def descend(self, optimizer, loss):
        """One step of `optimizer` down the gradient of `loss`, averaged over all processes."""
        optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        if WORLD_SIZE > 1:
            for weight in optimizer.param_groups[0]["params"]:
                dist.all_reduce(weight.grad.div_(WORLD_SIZE))
        self.scaler.step(optimizer)

    def abandon_step(self):
        """Make the scaler forget a half-done step, so that it accepts the next one."""
        self.scaler.update(self.scaler.get_scale())  # the same scale


def refresh_batchnorm(generator, labels):
    """Compute BatchNorm's statistics from the weights, on 16 batches of noise with a fixed seed.

    `labels`: (M, A), those of some training images. Averaged statistics would be wrong: averaged
    weights have smaller activations, and faces would come out smooth and pale.
    """
    rng = torch.Generator().manual_seed(0)
    noise = torch.randn(16, 64, LATENT_SIZE, generator=rng)
    chosen = torch.randint(len(labels), (16, 64), generator=rng)
    latents = torch.cat([noise, labels[chosen]], 2)
    update_bn(latents, generator, next(generator.parameters()).device)  # iterates over batches


def adamw(network, rate):
    """An optimizer for one network."""
    weights = list(network.parameters())
    options = {"weight_decay": WEIGHT_DECAY, "fused": True, "capturable": weights[0].is_cuda}
    return torch.optim.AdamW(weights, rate, (BETA1, BETA2), **options)


# ---------------------------------------------------------------------------------------- hardware


def pick_device():
    """DEVICE or the best available, ready to use. Raises UserError if it is not there."""
    best = torch.accelerator.current_accelerator(check_available=True)
    name = str(DEVICE or best or "cpu")
    if name.split(":")[0] not in ("cpu", str(best)):
        raise UserError(f"DEVICE is {DEVICE}, but this machine has {best or 'no GPU'}")
    device = torch.device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device.index or int(os.environ.get("LOCAL_RANK", 0)))
        torch.backends.cudnn.benchmark = True  # all batches have one shape
    torch.set_num_threads(min(torch.get_num_threads(), usable_cores()))
    return device


def pick_dtype(device):
    """PRECISION, or the fastest that the device supports in hardware."""
    if PRECISION:
        return getattr(torch, PRECISION)
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability()
        if capability >= (8, 0):
            return torch.bfloat16
        if capability >= (7, 0) and "GTX 16" not in torch.cuda.get_device_name():
            return torch.float16
    elif device.type == "cpu" and torch.cpu.get_capabilities().get("avx512_bf16"):
        return torch.bfloat16  # other CPUs emulate it, slowly
    return torch.float32


def usable_cores():
    """CPU cores of this machine or, in a container, its quota of them."""
    with suppress(OSError, ValueError):  # there is no such file, or it says "max"
        quota, period = map(int, Path("/sys/fs/cgroup/cpu.max").read_text().split())
        return math.ceil(quota / period)
    return os.cpu_count()


def memory_format(device):
    """The fastest memory format for networks and images that works on this device."""
    # On MPS, BatchNorm is wrong in channels_last (PyTorch issue 175189), convolutions slow (193349)
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


def autocast(device, dtype):
    """Autocast to `dtype`. It caches the cast weights: enter a new one after each weight update."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


class StepGraph:
    """A step on CUDA that, from its fourth call on, replays a CUDA graph of itself.

    A graph launches 300 small kernels at once. Before the capture, PyTorch needs calls on a side
    stream. If the capture fails, `abandon` cleans up, and all calls run without a graph.
    """

    def __init__(self, function, stream, abandon):
        self.function = function
        self.stream = stream
        self.abandon = abandon
        self.calls = 0
        self.graph = None

    def __call__(self, *inputs):
        self.calls += 1
        current = torch.cuda.current_stream()
        if self.calls == 4:
            self.inputs = [tensor.clone() for tensor in inputs]
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph, stream=self.stream):
                    self.function(*self.inputs)
                self.graph = graph
            except RuntimeError as error:
                say(f"no CUDA graph here ({error!r}); training continues without it, but slower")
                torch.cuda.set_stream(current)
                self.stream = current
                # Before PyTorch 2.13, cuDNN's benchmark does not work after this (issue 180395).
                torch.backends.cudnn.benchmark = False
                self.abandon()
        if self.graph:
            for static, new in zip(self.inputs, inputs):
                static.copy_(new)
            self.graph.replay()
            return
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            self.function(*inputs)
        current.wait_stream(self.stream)


# -------------------------------------------------------------------------------------------- data

DECODER = "centre square, bilinear, on white"  # change it with read_face, or old files are used
# What computers put beside photos (hidden files, previews, deleted ones), and tables
NOT_PHOTOS = re.compile(
    r"[/\\](\.|__MACOSX|(@eaDir|[@#][Rr]ecycle|#snapshot|\$RECYCLE\.BIN)[/\\])|\.(csv|txt)$"
)
TABLE = "list_attr_celeba.*"  # CelebA's table of attributes, .csv or .txt
LABELS = {"1": 1.0, "True": 1.0, "0": 0.0, "False": 0.0, "-1": -1.0}  # as tables write them


class FaceFolder(ImageFolder):
    """torchvision's ImageFolder of all images below a folder, at any depth, as a single class."""

    def __init__(self, folder):
        self.left_out = Counter()  # files that are no images, by suffix
        self.first = {}  # the first path of each file; a linked file has several
        super().__init__(str(folder), is_valid_file=self.is_image, allow_empty=True)

    def find_classes(self, directory):
        return [""], {"": 0}

    def is_image(self, path):
        if NOT_PHOTOS.search(path, len(self.root)) or not os.path.isfile(path):
            return False
        suffix = os.path.splitext(path)[1].lower()
        if Image.registered_extensions().get(suffix) not in Image.OPEN:
            self.left_out[suffix or "without extension"] += 1
            return False
        status = os.stat(path)
        return self.first.setdefault((status.st_dev, status.st_ino or path), path) == path


def read_face(image, size):
    """A PIL image as bytes, (3, size, size): its largest centre square, antialiased.

    Raises Pillow's errors for damaged files, and ValueError for 16 or 32 bits per colour.
    """
    image.draft(None, (size, size))  # libjpeg may decode at 1/2, 1/4 or 1/8, not smaller
    image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":
        raise ValueError("it has 16 or 32 bits per colour; convert it to 8")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    square = center_crop(image.convert("RGB"), min(image.size))
    square = square.resize((size, size), Image.Resampling.BILINEAR)
    return pil_to_tensor(square).numpy().tobytes()


def load_faces(folder, size):
    """The images below `folder`: uint8 (N, 3, size, size), mapped from disk; their paths; a key.

    The first call decodes them into a file in CACHE_DIR. The same images have the same key.
    """
    found = FaceFolder(folder)
    paths = [path for path, _ in found.samples][:MAX_IMAGES]
    if not paths:
        raise UserError(f"{folder} holds no images; it has: {listed(found.left_out) or 'nothing'}")
    files = [(os.path.basename(path), os.path.getsize(path)) for path in paths]
    key = digest(files, DECODER, size)
    pixels = Path(CACHE_DIR, f"faces-{digest(key, *map(os.path.getmtime, paths))}.bin")
    report = pixels.with_suffix(".broken.txt")
    with warnings.catch_warnings(action="ignore"):  # of odd images, and of a read-only file
        if not (pixels.exists() and report.exists()):
            check_sizes(paths, size)
            need_space(pixels.parent, len(paths) * 3 * size**2)
            decode(paths, size, pixels, report)
        faces = torch.from_numpy(np.memmap(pixels, np.uint8, "r")).view(-1, 3, size, size)
    broken = [int(line.split()[0]) for line in report.read_text("utf-8").splitlines()]
    others = [f"{count:,} {kind}" for kind, count in found.left_out.items()]
    if broken:
        others.append(f"{len(broken):,} broken, listed in {report}")
    say(f"images: {len(faces):,}; left out: {listed(others) or 'nothing'}")
    return faces, np.delete(paths, broken).tolist(), key


def decode(paths, size, pixels, report):
    """Write the images at `paths` to `pixels`, and a line for each broken one to `report`."""

    def read(path):
        try:
            with Image.open(path) as image:
                several.append(getattr(image, "is_animated", False))
                return read_face(image, size)
        except Exception as error:  # Pillow raises almost anything for a broken file
            return f"{path!r}: {error!r}"

    several, broken = [], []
    # Threads, as Pillow decodes outside of Python's global lock
    with replacing(pixels) as file, ThreadPool(usable_cores()) as pool:
        items = pool.imap(read, paths, 16)
        for number, item in enumerate(progress_bar(items, len(paths), "decoding")):
            if isinstance(item, bytes):
                file.write(item)
            else:
                broken.append(f"{number} {item}\n")
        if 2 * len(broken) > len(paths):
            raise OSError(f"{len(broken):,} of {len(paths):,} are broken, such as {broken[0]}")
        report.write_text("".join(broken), "utf-8")
    if any(several):
        say(f"of {sum(several):,} files with several pictures, only the first picture is used")


def check_sizes(paths, size):
    """Say so if over a tenth of the images will be enlarged. Looks at 64 of them."""
    sides = [size]
    for path in random.Random(0).choices(paths, k=64):
        with suppress(Exception), Image.open(path) as image:
            sides.append(min(image.size))
    fits = max(32, 2 ** int(math.log2(np.quantile(sides, 0.1))))
    if fits < size:
        say(f"many are small ({min(sides)} pixels); {spelled('IMAGE_SIZE', fits)} is best for them")


def read_labels(folder, paths):
    """The names of the ATTRIBUTES, and the labels (N, A) of the images at `paths` in `folder`.

    A label is 1 for what the face has, 0 for what it has not, and 0.5 if that is not known. With -1
    instead of 0, many attributes give worse faces, and with 60 folders training collapses.
    """
    if not ATTRIBUTES:
        return [], torch.zeros(len(paths), 0)
    if ATTRIBUTES == "folders":
        kinds = folder_kinds(folder, paths)
        names = sorted({*kinds} - {""})
        labels = torch.tensor([[float(name == kind) for name in names] for kind in kinds])
    else:
        names = split_names(ATTRIBUTES)
        labels = table_labels(folder, paths, names)
    shares = labels.eq(1).float().mean(0)
    say("attributes: " + listed(f"{name} {share:.0%}" for name, share in zip(names, shares)))
    return names, labels


def folder_kinds(folder, paths):
    """The kind of each image: the name of the folder in which the images differ, or "".

    That is the outermost level, unless the same names are in several of its folders (home/cat,
    zoo/cat), or it only splits the kinds up (train and test_set; part-1 and part-2).
    """
    trails = [split_names(Path(path).relative_to(folder).parts[:-1]) for path in paths]
    levels = zip_longest(*trails, fillvalue="")  # the names at each depth
    levels = [level for level in levels if len({"", *level}) > 2]
    if not levels:
        raise UserError(f"ATTRIBUTES is folders; all {len(paths):,} images are in one: {trails[0]}")
    splits = r"(?i)^((train|test)(ing)?|val(id|idation)?)([\W\d_].*)?$|\d"
    stem = partial(re.sub, splits, "")  # what tells kinds apart
    useful = [level for level in levels if len({"", *map(stem, level)}) > 2]
    kinds, *inners = useful or levels[-1:]
    for inner in inners:
        pairs = {pair for pair in zip(kinds, inner) if pair[1]}
        if len(pairs) >= len({"", *inner}):
            kinds = inner
    wrong = [kind for kind in {*kinds} if re.search("^-|,|^None$", kind)]
    if wrong:
        raise UserError(f"give other names to these folders, which are ATTRIBUTES: {listed(wrong)}")
    return kinds


def table_labels(folder, paths, names):
    """The labels (N, A) of the images at `paths`, from CelebA's table in `folder` or beside it."""
    tables = [*folder.rglob(TABLE), *folder.parent.glob(TABLE)]
    if len(tables) != 1:
        raise UserError(
            f"{folder} has {len(tables)} tables of attributes in it or beside it; it needs one, "
            "list_attr_celeba.csv, with image_id,Smiling,Male and then lines like 1.jpg,1,-1"
        )
    table = tables[0]
    rows, labels = read_table(table, names)
    with_folders = re.search(r"[/\\]", " ".join(rows))

    def by_key(images):
        """{what is compared: its number in `images`}"""
        numbers = {}
        for number, image in enumerate(images):
            path = Path(normalize("NFC", image.replace("\\", "/")))
            key = path.parent / path.stem if with_folders else path.stem
            if key in numbers:
                raise UserError(f"{images[numbers[key]]} and {image} are one image for {table}")
            numbers[key] = number
        return numbers

    known = by_key(rows)
    photos = by_key([os.path.relpath(path, table.parent) for path in paths])
    missing = [path for path, key in zip(paths, photos) if key not in known]
    if missing:
        text = f"{len(missing):,} photos have no row, such as {missing[0]}; {table} has {rows[:1]}"
        if 2 * len(missing) > len(paths):
            raise UserError(text)
        say(text)
    labels = F.pad(labels, (0, 0, 0, 1), value=0.5)  # the last row is for the missing ones
    return labels[[known.get(key, -1) for key in photos]]


def read_table(path, names):
    """The images in CelebA's table at `path`, and their labels (M, A) of the attributes `names`."""
    text = path.read_text("utf-8-sig", "replace")
    if path.suffix == ".txt":  # CelebA's own: a count, the names, and then values between blanks
        text = re.sub(r"^\d+\s+", "image_id ", text)
        text = re.sub(r"[ \t]+(?=\S)", ",", text)
    reader = csv.DictReader(text.splitlines(), skipinitialspace=True)
    first, *known = reader.fieldnames = split_names(reader.fieldnames or [""])
    if first != "image_id":
        raise UserError(f"{path}: its first column must be image_id, not {first!r}")
    check_names(names, known, path)
    images, labels = [], []
    for row in reader:
        images.append(row[first])
        for name in names:
            label = LABELS.get(str(row[name]).strip().capitalize())
            if label is None or None in row:  # None has the cells beyond the header
                place = f"{path}, line {reader.line_num}"
                rule = "it must be 1 or -1, or 1 or 0, with no cells beyond the header"
                raise UserError(f"{place}: {name} is {row[name]!r}; {rule}")
            labels.append(label)
    labels = torch.tensor(labels).view(-1, len(names))
    # In a column that has -1, 0 means "not known".
    return images, torch.where(labels.eq(-1).any(0), (labels + 1) / 2, labels)


def split_names(text):
    """The names in "Smiling, Male", or in a list of them, as they are compared."""
    names = text.split(",") if isinstance(text, str) else text
    return [normalize("NFC", name.strip()) for name in names]


def check_names(names, known, owner):
    """Raise UserError if one of `names` is not `known` to `owner`, or is there twice."""
    for name in names:
        if names.count(name) * known.count(name) != 1:
            raise UserError(f"{owner} must have {name!r} once; it has {', '.join(known) or 'none'}")


def wished(labels, wish, known, exclusive):
    """`labels` (N, A) of `known` attributes, changed as `wish` says, such as "Smiling,-Male".

    `exclusive`: whether the attributes are folders, so an image has one of them at most.
    """
    wishes = split_names(wish)
    names = [name.removeprefix("-") for name in wishes]
    check_names(names, known, "the generator")
    alone = exclusive and set(names) & set(wishes)
    labels = labels * (not alone)  # a folder asked for excludes the others
    for name, wanted in zip(names, wishes):
        labels[:, known.index(name)] = float(name == wanted)
    return labels


class Batches:
    """The training batches of `faces`, which depend on SEED, epoch and step only.

    So a resumed run sees what an uninterrupted one would, and checkpoints need no random states.
    With several processes, each draws the numbers of the whole batch and takes its share of them.
    """

    def __init__(self, faces, labels, device):
        """`faces`: uint8 (N, 3, H, W); `labels`: (N, A)."""
        self.faces = faces
        self.device = device
        self.steps = len(faces) // BATCH_SIZE  # full batches only
        if self.steps == 0:
            raise UserError(f"there are fewer images ({len(faces)}) than BATCH_SIZE ({BATCH_SIZE})")
        if device.type == "cuda" and faces.numel() < torch.cuda.mem_get_info()[0] / 2:
            self.faces = faces.to(device)
        self.labels = labels.to(self.faces.device)

    def epoch(self, epoch, first_step=0):
        """Yield (faces, flips, latents) of each step and, with augmentation, changes."""
        rng = torch.Generator().manual_seed(seed_for("order", epoch))
        order = torch.randperm(len(self.faces), generator=rng)
        batches = order.to(self.faces.device).split(BATCH_SIZE)
        rng = torch.Generator(self.device)
        numbers = {"generator": rng, "device": self.device}
        mine = slice(RANK, None, WORLD_SIZE)
        share = AUGMENT
        if share is None:
            # For 200 faces, 0.3 makes the distance a third smaller; for 1,000, a quarter larger.
            share = np.interp(len(order), [200, 1_000], [0.3, 0])
        for step in range(first_step, self.steps):
            rng.manual_seed(seed_for("step", epoch, step))
            noise = torch.randn(BATCH_SIZE, LATENT_SIZE, **numbers)[mine]
            flips = torch.rand(BATCH_SIZE, 1, 1, 1, **numbers)[mine] < 0.5 * MIRROR
            chosen = batches[step][mine]
            faces = self.faces.index_select(0, chosen).to(self.device)
            labels = self.labels[chosen].to(self.device)
            batch = [faces, flips, torch.cat([noise, labels], 1)]
            if share:
                chance = torch.rand(BATCH_SIZE, 2, 6, **numbers)[mine]
                changed = chance[..., :1] < share
                batch.append((2 * chance[..., 1:] - 1) * changed)
            yield batch

    def some(self, number):
        """The numbers of up to `number` random images, and latents with their labels, on the CPU.

        The latents are (number, z + A): labels are repeated if the images are fewer.
        """
        rng = torch.Generator().manual_seed(seed_for("samples"))
        noise = torch.randn(number, LATENT_SIZE, generator=rng)
        order = torch.randperm(len(self.faces), generator=rng)
        labels = self.labels[order[torch.arange(number) % len(order)]].cpu()
        return order[:number], torch.cat([noise, labels], 1)


# ---------------------------------------------------------------------------- pictures and distance

METRICS = ["epoch", "step", "images", *MEASURES, "images_per_second"]  # of metrics.csv
QUALITY = "epoch images distance best".split()  # of quality.csv
ANIMATION_FRAMES = 25  # training.gif stays small enough to send


def to_bytes(images):
    """Images in [0, 1] as uint8, rounded: what files hold, and what `evaluate` measures."""
    return images.mul(255).round().byte()


def grid(images, columns=8):
    """Images (N, 3, H, W) in [0, 1] as one, uint8 (3, H, W)."""
    return make_grid(to_bytes(images), columns)


def enlarged(image):
    """An image, uint8 (3, H, W), as a PIL picture to look at: 512 pixels wide or more."""
    picture = to_pil_image(image)
    return ImageOps.scale(picture, math.ceil(512 / picture.width), Image.Resampling.NEAREST)


def save_picture(path, picture, **options):
    """Write a PIL picture in the format of the path's extension."""
    with replacing(path) as file:
        picture.save(file, quality=95, **options)


def save_animation(path, pictures, duration):
    """A looping animation of PIL pictures, each shown for `duration` milliseconds."""
    first, *rest = pictures
    save_picture(path, first, save_all=True, append_images=rest, loop=0, duration=duration)


def downscale(images):
    return F.adaptive_avg_pool2d(images, 32)


def face_distance(fakes, reals):
    """How far `fakes` are from `reals`, both (N, 3, 32, 32) in [0, 1].

    Lower is better, and real images are at 0 from other real ones, however many there are: it is
    the unbiased estimate of KID (Bińkowski et al. 2018, https://arxiv.org/abs/1801.01401). Here two
    convolutions with fixed random filters make the features, averaged on a 4 × 4 grid: no trained
    network is needed. Well below 0, the fakes are copies of these very reals.
    """
    rng = torch.Generator().manual_seed(0)
    images, real = torch.cat([reals, fakes]), len(reals)
    for channels in (3, 32):
        filters = torch.randn(32, channels, 3, 3, generator=rng)
        bias = 0.3 * torch.randn(32, generator=rng)
        images = F.conv2d(images, filters, stride=2, padding=1)
        variance, mean = torch.var_mean(images[:real], (0, 2, 3))
        images = F.leaky_relu(F.batch_norm(images, mean, variance, bias=bias), 0.2)
    features = F.adaptive_avg_pool2d(images, 4).flatten(1)
    variance, mean = torch.var_mean(features[:real], 0)
    features = F.batch_norm(features, mean, variance)
    kernel = (features @ features.T / features.shape[1] + 1) ** 3
    kernel.fill_diagonal_(math.nan)  # an image is no pair with itself
    among_reals = kernel[:real, :real].nanmean()
    among_fakes = kernel[real:, real:].nanmean()
    return (among_reals + among_fakes - 2 * kernel[:real, real:].mean()).item()


def nearest(images, faces):
    """For each of `images` (N, 3, H, W) in [0, 1], the most similar of `faces`, maybe mirrored."""
    wanted = downscale(images)
    wanted = torch.stack([wanted, wanted.flip(3)]).flatten(2)
    distances = []
    for part in faces.split(512):
        candidates = downscale(part.cpu() / 255).flatten(1)
        distances.append(torch.cdist(wanted, candidates).amin(0))
    indices = torch.cat(distances, 1).argmin(1)
    return faces[indices.to(faces.device)].cpu() / 255


def diversity(images):
    """How much images (N, 3, H, W) differ from each other: the mean standard deviation."""
    return downscale(images).std(0).mean()


def side_by_side(path, sets, columns):
    """Save grids of {title: images (N, 3, H, W) in [0, 1]}, numbered, with titles below."""
    picture = enlarged(torch.cat([grid(images, columns) for images in sets.values()], 2))
    lines = [f"{number}: {title}" for number, title in enumerate(sets, 1)]
    sheet = ImageOps.expand(picture, (0, 20, 0, 20 * len(lines)), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((4, picture.height + 22), "\n".join(lines), "black", font_size=14)
    for number in range(len(lines)):
        pen.text((4 + number * picture.width // len(lines), 2), str(number + 1), "black")
    save_picture(path, sheet)


def draw_losses(path, rows, quality):
    """losses.png: the rows of metrics.csv, smoothed, and the distances in quality.csv."""
    if not in_notebook():
        os.environ.pop("MPLBACKEND", None)  # it may name one that is not installed here
    from matplotlib.figure import Figure  # it opens no window, as pyplot would

    figure = Figure((9, 10), layout="constrained")
    upper, middle, lower = figure.subplots(3, 1, sharex=True)
    rows = rows[len(rows) // 20 :]  # the first steps' losses would dwarf the rest
    images = [row["images"] for row in rows]
    around = len(rows) // 100  # rows on each side that a curve is averaged over
    for name in MEASURES:
        axes = upper if name.startswith("loss") else middle
        values = torch.tensor([[row.get(name, math.nan) for row in rows]])
        smooth = F.avg_pool1d(values, 2 * around + 1, 1, around, count_include_pad=False)
        axes.plot(images, smooth[0], label=name)
        axes.legend()
    lower.plot([row["images"] for row in quality], [row["distance"] for row in quality], "o-")
    upper.set(ylabel="loss", title="healthy: both rise and fall; the generator's may rise slowly")
    middle.set(ylabel='probability of "real"', title="healthy: apart, but away from 1 and 0")
    lower.set(ylabel="distance to real faces", xlabel="real images seen", yscale="symlog")
    with replacing(path) as file:
        figure.savefig(file)


def draw_animation(path):
    """training.gif: the grids in samples/, counted from the last one, which is always shown."""
    files = output_path("samples").glob("epoch_*.png")
    files = sorted(files, key=lambda file: int(file.stem[6:]))
    stride = math.ceil(len(files) / ANIMATION_FRAMES)
    frames = [Image.open(file) for file in files[::-stride][::-1]]
    save_animation(path, frames, 150)


# ---------------------------------------------------------------------------------------- training

NETWORK_SETTINGS = "IMAGE_SIZE LATENT_SIZE G_FEATURES D_FEATURES ATTRIBUTES".split()
# What a checkpoint holds of a Run
OBJECTS = "generator discriminator average g_optimizer d_optimizer scaler".split()
VALUES = "epoch done images metrics quality attributes labels kind".split()
DISTANCE_IMAGES = 2_048  # generated ones and, if there are so many, real ones
NOISE = 0.002  # standard deviation of the distance, measured over noise vectors
MEASURE_EVERY = 25_000  # images; one measurement takes as long as training on about 500
STEPS_NEEDED = 4_000  # for good faces at 64 pixels, batches of 64; with a quarter they are crude
RETRY_SECONDS = 15  # until the last save is tried again: a network disk may come back
NOT_FINITE = "is not finite; lower LEARNING_RATE or use float32, and run it again to resume"
BAR = "{desc} {percentage:3.0f}%|{bar:8}| {remaining} left{postfix}"
# What users, terminals and schedulers send. Windows has only some of them.
STOP_SIGNALS = "SIGINT SIGTERM SIGHUP SIGUSR1 SIGUSR2 SIGXCPU".split()


def train():
    """Train on DATA_DIR, or resume from OUTPUT_DIR/checkpoint.pt; return the path of generator.pt.

    Raises UserError, OSError for network and disk, FloatingPointError for NaN and, after saving,
    KeyboardInterrupt for a signal.
    """
    check_settings()
    checkpoint = output_path("checkpoint.pt")
    best = output_path("generator.pt")
    state = read_checkpoint(checkpoint) if checkpoint.exists() else None
    if state:
        compare_settings(state["settings"])
        if state["epoch"] >= EPOCHS:
            say(f"{OUTPUT_DIR} holds a finished run; raise EPOCHS, or choose another OUTPUT_DIR")
            return best
    device = pick_device()
    if WORLD_SIZE > 1:
        dist.init_process_group()
    for rank in range(WORLD_SIZE):  # one after the other: the first one decodes
        if rank == RANK:
            folder = prepare_data(DATA_DIR)
            faces, paths, data = load_faces(folder, IMAGE_SIZE)
        if WORLD_SIZE > 1:
            dist.barrier()
    names, labels = read_labels(folder, paths)
    run = Run(Batches(faces, labels, device), names, data)
    if not state:
        # Two checkpoints, each three times the state now: Adam adds two moments per weight.
        need_space(Path(OUTPUT_DIR), 6 * len(to_file(run.state())))
    try:
        lock = FileLock(output_path(f".lock-{RANK}")).acquire(timeout=0)
    except TimeoutError:
        raise OSError(f"{OUTPUT_DIR} is in use by another run") from None
    with lock:
        # Read again: another run may have saved it since.
        run.start(read_checkpoint(checkpoint) if checkpoint.exists() else None)
        run.train()
    say(
        "finished; for new faces, call dcgan.generate_images(), or run: "
        f'python dcgan.py generate --output-dir "{OUTPUT_DIR}"'
    )
    return best


def compare_settings(then):
    """Say which settings are not as `then`. Raises UserError if they build other networks."""
    for name, value in sorted(setting_values().items() - then.items()):
        if name in NETWORK_SETTINGS:
            raise UserError(f"{name} was {then.get(name)}, now {value}; choose another OUTPUT_DIR")
        say(f"changed since the checkpoint: {name} {then.get(name)} -> {value}")


class Run(Trainer):
    """A training run: where it stands, what it has measured, and what it does at which step."""

    def __init__(self, batches, attributes, data):
        """`attributes`: their names; `data`: the key of the images."""
        super().__init__(batches.device, pick_dtype(batches.device), len(attributes))
        self.batches = batches
        self.attributes = attributes
        self.data = data
        self.epoch = 0  # finished epochs
        self.done = 0  # steps done in the next one
        self.metrics = []  # rows of metrics.csv
        self.quality = []  # rows of quality.csv
        # All samples are drawn from this noise, with the labels of these real images.
        chosen, self.latents = batches.some(64)
        self.reals = batches.faces[chosen].cpu() / 255
        # Those of some images, for BatchNorm and `generate`
        self.labels = batches.some(4_096)[1][:, LATENT_SIZE:]
        self.draw = partial(draw, self.average, dtype=self.dtype)  # images from latents
        self.better = None  # the content of a generator.pt that is to be written
        self.saved_at = perf_counter()
        self.shown = None  # where a notebook shows the samples

    def start(self, state):
        """Resume from a checkpoint's state, or draw samples of the untrained generator."""
        say(
            f"device: {self.device}, {self.dtype}; processes: {WORLD_SIZE}; epochs: {EPOCHS}, of "
            f"{self.batches.steps:,} steps"
        )
        if state:
            self.resume(state)
        elif self.reals.eq(self.reals[:, :1]).all():
            self.start_grey()
        if RANK == 0:
            if not state:
                self.sample()
            about = setting_values() | {"PyTorch": torch.__version__, "Python": sys.version}
            attempt(write_bytes, "settings.json", json.dumps(about, indent=2).encode())
        self.timed = perf_counter(), self.images

    def resume(self, state):
        """Restore a checkpoint's state. Raises UserError if it belongs to other images."""
        if state.get("kind") != self.kind:  # a generator.pt has none
            raise UserError(f"{OUTPUT_DIR}/checkpoint.pt is not of a run with this optimizer")
        place = state["settings"]["DATA_DIR"]
        other = state["data"] != self.data and place != DATA_DIR
        if other or state["attributes"] != self.attributes:
            raise UserError(f"{OUTPUT_DIR} is for the images and kinds of {place}; choose another")
        for name in OBJECTS:
            restore(getattr(self, name), state[name])
        for name in VALUES:
            setattr(self, name, state[name])
        if state["totals"].shape == self.totals.shape:  # not if MEASURES has been edited
            self.totals.copy_(state["totals"])
        say(f"resuming from {OUTPUT_DIR}: epoch {self.epoch + 1}, step {self.done + 1}")

    def state(self):
        """All that a checkpoint holds. Call `sample` first: it sets the average's BatchNorm."""
        state = {name: getattr(self, name).state_dict() for name in OBJECTS}
        state |= {name: getattr(self, name) for name in VALUES}
        return state | {"data": self.data, "totals": self.totals, "settings": setting_values()}

    def train(self):
        """Train to the last epoch or until a signal; then save, and raise KeyboardInterrupt."""
        steps = self.batches.steps
        done = self.epoch * steps + self.done
        bar = progress_bar(None, EPOCHS * steps, "training", initial=done, bar_format=BAR)
        with caught_signals() as signals, bar:
            while self.epoch < EPOCHS:
                for batch in self.batches.epoch(self.epoch, self.done):
                    self.advance(*batch)
                    self.done += 1
                    bar.update()
                    self.after_step(bar, signals)
                self.epoch += 1
                self.done = 0
                if RANK == 0 and self.grid_due():
                    self.pause()

    def after_step(self, bar, signals):
        """Log, save and stop if it is time to."""
        last = self.epoch + 1 == EPOCHS and self.done == self.batches.steps
        # Not at each epoch's end: all rows are means over as many steps.
        row_due = last or self.images // BATCH_SIZE % LOG_EVERY == 0
        if row_due:
            self.log(bar)
        stop = len(signals)
        if WORLD_SIZE > 1:  # all processes stop after the same step
            if not row_due:
                return
            stop = torch.tensor(stop, device=self.device)
            dist.all_reduce(stop)
        if stop:
            if RANK == 0:
                self.sample()
                self.save(last=True)
            say(f"saved in {OUTPUT_DIR}; run the same command again to resume")
            raise KeyboardInterrupt(*signals)
        if RANK == 0 and row_due and perf_counter() - self.saved_at > 60 * CHECKPOINT_MINUTES:
            self.pause()

    def log(self, bar):
        """Add a row to metrics.csv, and say how long a good run takes if this one is too short.

        Raises FloatingPointError if a mean is not finite.
        """
        means = self.take_means()
        if not math.isfinite(sum(means.values())):
            raise FloatingPointError(f"a loss {NOT_FINITE}")
        start, images = self.timed
        self.timed = perf_counter(), self.images
        speed = round((self.images - images) / (self.timed[0] - start), 1)
        row = {"epoch": self.epoch + 1, "step": self.done, "images": self.images} | means
        self.metrics.append(row | {"images_per_second": speed})
        if RANK == 0:
            attempt(write_rows, "metrics.csv", METRICS, self.metrics[-1:], "a")
        bar.set_description_str(f"epoch {self.epoch + 1}/{EPOCHS}", refresh=False)
        bar.set_postfix(means, speed=speed, refresh=False)
        steps, needed = self.batches.steps, STEPS_NEEDED * IMAGE_SIZE // 64
        # Said twice: the first row is slower, but a short run has no other.
        if len(self.metrics) < 3 and EPOCHS * steps < needed / 4:
            epochs = spelled("EPOCHS", math.ceil(needed / steps))
            minutes = math.ceil(needed * BATCH_SIZE / speed / 60)
            say(f"this run is too short; use {epochs}, which takes about {minutes} min")

    def grid_due(self):
        """Whether this epoch has a grid: of short ones, from the 64th on ever fewer."""
        long = self.batches.steps * BATCH_SIZE >= MEASURE_EVERY
        return long or self.epoch == EPOCHS or self.epoch % max(1, self.epoch // 32) == 0

    def pause(self):
        """Between two steps: sample; then measure, save, draw and advise if it is time to."""
        last = self.epoch == EPOCHS
        fakes = self.sample()
        measured = self.quality[-1]["images"] if self.quality else -math.inf
        if last or (self.done == 0 and self.images - measured >= MEASURE_EVERY):
            self.measure()
        # On a fast GPU, all this after every epoch would take a twentieth of the time.
        if last or perf_counter() - self.saved_at > min(120, 60 * CHECKPOINT_MINUTES):
            self.save(last)
            if self.metrics:
                self.draw_pictures(fakes, last)
                if self.images >= 10_000:  # before that, nothing is wrong yet
                    self.advise(fakes)
        self.timed = perf_counter(), self.images

    def sample(self):
        """Images (64, 3, H, W) in [0, 1] of the fixed noise, saved and, in a notebook, shown.

        Raises FloatingPointError if a weight is not finite.
        """
        refresh_batchnorm(self.average, self.labels)
        fakes = self.draw(self.latents)
        if not fakes.isfinite().all():
            raise FloatingPointError(f"a weight {NOT_FINITE}")
        picture = enlarged(grid(fakes))
        attempt(save_picture, "samples/latest.png", picture)
        if self.done == 0:
            attempt(save_picture, f"samples/epoch_{self.epoch:03d}.png", picture)
        self.shown = show(picture, self.shown)
        return fakes

    def measure(self):
        """Add a row to quality.csv; keep the generator if no earlier one was clearly better."""
        chosen, latents = self.batches.some(DISTANCE_IMAGES)
        reals = downscale(self.batches.faces[chosen].cpu() / 255)
        fakes = torch.cat([downscale(self.draw(part)) for part in latents.split(64)])
        distance = face_distance(fakes, reals)
        best = self.epoch
        if all(distance <= 1.05 * row["distance"] + NOISE for row in self.quality):
            state = self.state()
            # Private, if the file is given to others
            state["settings"] |= dict.fromkeys("DATA_DIR CACHE_DIR OUTPUT_DIR".split())
            self.better = to_file({name: state[name] for name in GENERATOR_STATE})
        else:
            best = self.quality[-1]["best"]
        row = [self.epoch, self.images, distance, best]
        self.quality.append(dict(zip(QUALITY, row)))
        attempt(write_rows, "quality.csv", QUALITY, self.quality)
        say(f"epoch {self.epoch}/{EPOCHS}: distance {distance:.4f}, best in epoch {best}")

    def write(self):
        """Write checkpoint.pt and, if there is a better one, generator.pt. Returns success."""
        if self.better and attempt(write_bytes, "generator.pt", self.better):
            self.better = None
        # Anew: after a crash, it has rows that this run will write again.
        attempt(write_rows, "metrics.csv", METRICS, self.metrics)
        return attempt(write_bytes, "checkpoint.pt", to_file(self.state())) and not self.better

    def save(self, last):
        """Call `write`; if that fails the `last` time, wait, try again, and then raise OSError."""
        saved = self.write()
        if last and not saved:
            sleep(RETRY_SECONDS)
            saved = self.write()
        if saved:
            self.saved_at = perf_counter()
        elif last:
            minutes = (perf_counter() - self.saved_at) / 60
            raise OSError(f"{OUTPUT_DIR} lacks the last {minutes:.0f} minutes of this run")

    def draw_pictures(self, fakes, last):
        """Draw losses.png and so on, with `fakes` (64, 3, H, W); the `last` time, more of it."""
        attempt(draw_losses, "losses.png", self.metrics, self.quality)
        attempt(draw_animation, "training.gif")
        fakes = fakes[: len(self.reals)]
        sets = {"real": self.reals, "generated": fakes}
        if last:
            sets["the most similar real image of each"] = nearest(fakes, self.batches.faces)
            show(output_path("losses.png"))
        attempt(side_by_side, "real_vs_fake.png", sets, 8)
        if self.attributes:
            attempt(side_by_side, "attributes.png", self.with_attributes(), 1)

    def advise(self, fakes):
        """Warn of each sign of trouble."""
        row = self.metrics[-1]
        if row.get("d_real", 0) > 0.97 and row["d_fake"] < 0.03:
            say("the discriminator has won; set D_LEARNING_RATE to 0.0002, or R1_GAMMA to 0.1 or 1")
        if 3 * diversity(fakes) < diversity(self.reals):
            say("the samples look alike (mode collapse); lower LEARNING_RATE or raise BATCH_SIZE")

    def with_attributes(self):
        """{title: images} of 8 people: as drawn, and without (no folders) and with each."""
        noise, labels = self.latents[:8].tensor_split([LATENT_SIZE], 1)
        kinds = ATTRIBUTES == "folders"
        sets = {"as drawn": self.draw(self.latents[:8])}
        for name in self.attributes:
            for wish in [name] if kinds else ["-" + name, name]:
                changed = wished(labels, wish, self.attributes, kinds)
                sets[wish] = self.draw(torch.cat([noise, changed], 1))
        return sets


@contextmanager
def caught_signals():
    """A list that collects signals within `with`. A second Ctrl-C ends the program at once."""
    received = []

    def receive(number, frame):
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt(number)
        received.append(number)

    with ExitStack() as handlers:
        for number in signal.Signals:
            before = signal.getsignal(number)
            # nohup sets SIG_IGN. None is a handler that is not Python's.
            if number.name in STOP_SIGNALS and before not in (signal.SIG_IGN, None):
                signal.signal(number, receive)
                handlers.callback(signal.signal, number, before)
        yield received


# ----------------------------------------------------------------------- using a trained generator


class TrainedGenerator:
    """The averaged generator in a checkpoint file, and the labels that fit `attributes`."""

    def __init__(self, checkpoint=None, attributes=None):
        check_settings()
        name = "generator.pt" if output_path("generator.pt").exists() else "checkpoint.pt"
        self.path = Path(checkpoint or output_path(name))
        state = read_checkpoint(self.path)
        self.settings = state["settings"]
        self.epoch = state["epoch"]
        self.labels = state["labels"]
        known = state["attributes"]
        say(f"{self.path}: epoch {self.epoch}; attributes: {', '.join(known) or 'none'}")
        if attributes:
            kinds = self.settings["ATTRIBUTES"] == "folders"
            labels = wished(self.labels, attributes, known, kinds)
            fit = labels.eq(self.labels).all(1)
            if not fit.any():
                say(f"no training image has {attributes}; the faces may look odd")
                fit[:] = True
            self.labels = labels[fit]
        device = pick_device()
        generator = build_generator(state).to(device, memory_format=memory_format(device))
        self.draw = partial(draw, generator, dtype=pick_dtype(device))

    def latents(self, number, seed, truncation=1.0):
        """Yield (64, z + A), on the CPU, for `number` images: if there are more, none changes."""
        if seed is None:
            seed = random.randrange(10**6)
            say(f"seed {seed}")
        rng = torch.Generator().manual_seed(seed)
        for _ in range(0, number, 64):
            noise = torch.randn(64, self.settings["LATENT_SIZE"], generator=rng)
            chosen = torch.randint(len(self.labels), (64,), generator=rng)
            yield torch.cat([truncation * noise, self.labels[chosen]], 1)

    def images(self, number, seed, truncation=1.0):
        """An iterator over `number` new images (3, H, W) in [0, 1]."""
        batches = map(self.draw, self.latents(number, seed, truncation))
        images = islice(chain.from_iterable(batches), number)
        return progress_bar(images, number, "generating")


def generate_images(
    num_images=16,
    seed=None,
    checkpoint=None,
    output=None,
    truncation=1.0,
    attributes=None,
    individual=False,
):
    """New faces: a float tensor (num_images, 3, H, W) in [0, 1]; up to 1,024 are saved as a grid.

    In a notebook, the grid is shown as well. On one device, the same seed gives the same images,
    and a larger `num_images` only adds some; None chooses a seed and prints it. `checkpoint` is a
    checkpoint.pt or generator.pt, by default OUTPUT_DIR's. `output` is a picture, by default
    generated.png beside the checkpoint; if `individual`, a folder for a file each, which is then
    returned. A `truncation` below 1 scales the noise down: faces are cleaner, but more alike.
    `attributes`, such as "Smiling,-Male", are to have and, with "-", not to have; others are as
    frequent as in the training images with these. Raises UserError for wrong names or files.
    """
    trained = TrainedGenerator(checkpoint, attributes)
    images = trained.images(num_images, seed, truncation)
    if individual:
        return save_each(images, Path(output or trained.path.with_name("generated")))
    images = torch.stack(list(images))
    path = Path(output or trained.path.with_name("generated.png")).absolute()
    shown = images[:1_024]
    picture = enlarged(grid(shown, math.ceil(len(shown) ** 0.5)))
    if attempt(save_picture, path, picture):
        say(f"saved {path}")
    show(picture)
    return images


def save_each(images, folder):
    """Save images as 000000.png and so on; return `folder`.

    A file that is there must be the same, or its beginning: a stopped call can be repeated.
    """
    os.makedirs(folder, exist_ok=True)
    for index, image in enumerate(images):
        path = folder / f"{index:06d}.png"
        content = encode_png(to_bytes(image)).numpy().tobytes()
        if path.exists() and not content.startswith(path.read_bytes()):
            raise UserError(f"{folder} has other images; empty it, or choose another output")
        path.write_bytes(content)
    say(f"saved in {folder}")
    return folder


def interpolate(num_faces=8, frames=16, seed=None, checkpoint=None, output=None, attributes=None):
    """Save a looping animation that moves between new faces; return its path.

    `frames` pictures lead from each face to the next. Labels and noise change linearly, but noise
    between two would be too short, so it is scaled to the usual length.
    """
    trained = TrainedGenerator(checkpoint, attributes)
    path = Path(output or trained.path.with_name("interpolation.gif")).absolute()
    corners = torch.cat(list(trained.latents(num_faces, seed)))[:num_faces]
    share = torch.arange(frames)[:, None] / frames
    pictures = []
    for start, end in zip(corners, corners.roll(-1, 0)):
        walk = torch.lerp(start, end, share)
        walk[:, : trained.settings["LATENT_SIZE"]] /= torch.hypot(share, 1 - share)
        pictures += map(enlarged, to_bytes(trained.draw(walk)))
    if attempt(save_animation, path, pictures, 60):
        say(f"saved {path}")
        show(path)
    return path


class Images(list, torch.utils.data.Dataset):  # type: ignore[misc]
    """Images, uint8 (3, H, W), as torch-fidelity wants them."""


def evaluate(num_images=50_000, checkpoint=None, seed=0, data_dir=None):
    """FID, KID, precision and recall of new faces against real ones, as a dict.

    The real images are those in `data_dir`, by default the training run's, or evenly spread ones
    if they are over 50,000. The results are also printed, and appended to evaluation.csv. FID
    and KID are better when lower (Heusel et al. 2017, Bińkowski et al. 2018), precision and recall
    when higher (Kynkäänniemi et al. 2019). All come from torch-fidelity.
    """
    from torch_fidelity import calculate_metrics  # not everybody has it

    trained = TrainedGenerator(checkpoint)
    settings = trained.path.with_name("settings.json")
    data_dir = data_dir or json.loads(settings.read_text())["DATA_DIR"]
    faces, *_ = load_faces(prepare_data(data_dir), trained.settings["IMAGE_SIZE"])
    reals = faces[:: math.ceil(len(faces) / 50_000)]
    if min(num_images, len(reals)) < 2_048:
        raise UserError(f"FID needs 2,048 images, not {num_images:,} new, {len(reals):,} real ones")
    try:
        metrics = calculate_metrics(
            input1=Images(map(to_bytes, trained.images(num_images, seed))),
            input2=Images(reals),
            feature_extractor="inception-v3-compat",  # the network that papers use
            fid=True,
            kid=True,
            prc=True,
            cuda=torch.cuda.is_available(),
            save_cpu_ram=True,  # no worker processes, and distances part by part
        )
    except OSError as error:
        raise OSError(f"{error}; README says where to put torch-fidelity's weights") from error
    row = {"epoch": trained.epoch, "generated": num_images, "real": len(reals)} | metrics
    say("\n".join(f"{name} {value:.5g}" for name, value in row.items()))
    write_rows(trained.path.with_name("evaluation.csv"), row, [row], "a")
    return row


# --------------------------------------------------- where images come from: Kaggle, archives, demo

# Kaggle's command line, which resumes; it ends when its parent does, as its stdin closes then.
# The client has no timeout; with ours, a server that sends nothing for 60 seconds has failed. With
# another argv[0] than "kaggle", it assumes that it is used as a library, and demands a login.
KAGGLE_CHILD = """
import os, requests, runpy, sys, threading
threading.Thread(target=lambda: (os.read(0, 1), os._exit(1)), daemon=True).start()
send = requests.Session.send
requests.Session.send = lambda *request, **options: send(*request, **options | {"timeout": 60})
sys.argv[:1] = ["kaggle", "datasets", "download", "--unzip", "-p"]
runpy.run_module("kaggle", run_name="__main__", alter_sys=True)
"""
DEMO_DIR = "data/demo"
DEMO = (
    f"--data-dir {DEMO_DIR} --output-dir output-demo --batch-size 32 --epochs 12 --g-features 32 "
    "--d-features 32"
)


def prepare_data(place):
    """The folder of the images at `place`: a folder, or an archive, which is unpacked once.

    The folders of CelebA, the demo and another KAGGLE_DATASET are filled if they hold no images.
    """
    folder = Path(place).absolute()
    if folder == Path.cwd() / DEMO_DIR:
        fill_folder(folder, draw_demo)
    elif folder == Path.cwd() / CELEBA_DIR or KAGGLE_DATASET != CELEBA:
        fill_folder(folder, fetch)
    elif not folder.is_dir():
        put = partial(unpack, folder)
        try:
            status = folder.stat()  # a changed archive has another folder
            folder = Path(f"{folder}-{digest(status.st_size, status.st_mtime_ns)[:8]}")
            fill_folder(folder, put)
        except Exception as error:  # a damaged file can raise almost any error
            shutil.rmtree(folder, ignore_errors=True)
            raise UserError(f"{place} is no folder, zip or tar of photos ({error!r})") from error
    return folder


def download():
    """The command: download KAGGLE_DATASET to DATA_DIR, and do nothing else."""
    check_settings()
    fill_folder(Path(DATA_DIR), fetch)


def fill_folder(folder, put):
    """If `folder` has no images, `put(part)` fills a hidden folder in it, which is then renamed."""
    if FaceFolder(folder).samples:
        return
    part = folder / ".part"  # on the same disk, wherever a link or a mount leads
    lock = folder / ".lock"
    say(f"filling {folder} (or waiting for a run that does)")
    try:
        with FileLock(lock):
            if FaceFolder(folder).samples:  # another run has filled it
                return
            os.makedirs(part, exist_ok=True)
            put(part)
            if not FaceFolder(part).samples:
                raise UserError(f"there are no images in {part}")
            part.rename(folder / "images")
    finally:
        with suppress(OSError):  # if they are empty
            lock.unlink()
            part.rmdir()
            folder.rmdir()
            os.rmdir("data")  # in which the folders of CelebA and the demo are


def unpack(archive, folder):
    """Unpack a zip or tar into `folder`, never outside of it."""
    if archive.suffix.lower() != ".zip":
        shutil.unpack_archive(archive, folder, "tar", filter="data")  # compressed or not
        return
    too_long = 0
    with zipfile.ZipFile(archive) as source:
        for member in source.infolist():
            name = member.filename.replace("\\", "/")  # some Windows programs write "\\"
            with suppress(UnicodeError):  # a Mac writes UTF-8, which zipfile reads as CP437
                name = name.encode("cp437").decode()
            member.filename = name
            if re.search(rb"[^/]{256}", name.encode()):  # longer than file systems take
                too_long += 1
            else:
                source.extract(member, folder)
    if too_long:
        say(f"left out of {archive}: {too_long:,} files whose names are too long")


def fetch(folder):
    """Download KAGGLE_DATASET into `folder`. Raises OSError if Kaggle's client fails."""
    say(f"downloading {KAGGLE_DATASET} from Kaggle (CelebA is for non-commercial research)")
    if KAGGLE_DATASET == CELEBA:
        need_space(folder, 2_900_000_000)  # the archive and, for a moment, the images beside it
    command = [sys.executable, "-P", "-c", KAGGLE_CHILD, folder, KAGGLE_DATASET]
    environment = os.environ | {"VERBOSE": "no"}  # else the client may print the user's token
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE) as process:
        if process.wait() == 0:
            return
    raise OSError(
        "Kaggle's client has failed, as said above; run this again to resume. Or create a token at "
        "https://www.kaggle.com/settings and save it as ~/.kaggle/access_token. Or give images of "
        "your own, or the zip from the browser, as DATA_DIR: --data-dir archive.zip. Or run --demo"
    )


def draw_demo(folder, number=4_000):
    """Put `number` JPEGs of drawn faces into `folder`."""
    for index in progress_bar(range(number), number, "drawing"):
        draw_face(random.Random(index)).save(folder / f"{index:06d}.jpg", quality=90)


def draw_face(rng):
    """A drawn face, 128 × 128 pixels; it depends on `rng`, a random.Random."""
    image = Image.new("RGB", (128, 128), f"hsl({rng.randrange(360)}, 25%, {rng.randint(35, 80)}%)")
    hair = f"hsl(30, 60%, {rng.randint(6, 40)}%)"
    skin = f"hsl(24, 45%, {rng.randint(40, 82)}%)"
    iris = f"hsl({rng.randint(20, 220)}, 40%, 25%)"
    side = rng.uniform(27, 33)
    smile = rng.uniform(0, 9)
    ovals = [
        (20, 4, 108, rng.choice((104, 126)), hair),
        (side, 23, 128 - side, 113, skin),
        (43, 59, 57, 69, "white"),
        (71, 59, 85, 69, "white"),
        (47, 60, 53, 68, iris),
        (75, 60, 81, 68, iris),
        (51, 92 - smile, 77, 95 + smile, "#be4650"),
    ]
    for *box, colour in ovals:
        ImageDraw.Draw(image).ellipse(box, colour)
    return image


# ------------------------------------------------------------------------------ files and messages

# What generator.pt holds
GENERATOR_STATE = "settings epoch images average attributes labels".split()


class UserError(ValueError):
    """A wrong call, setting or data set: what a user can fix, in one line."""


failing = set()  # type: ignore[var-annotated]  # what could not be written the last time


def attempt(write, name, *arguments):
    """Call `write`, whose failure must not end the run. Returns whether it has worked.

    `name`: in OUTPUT_DIR, or absolute. Of several failures in a row, only the first is reported.
    """
    path = output_path(name)
    try:
        write(path, *arguments)
    except Exception as error:
        if path not in failing:
            say(f"{path} cannot be written: {error!r}")
        failing.add(path)
        return False
    failing.discard(path)
    return True


@contextmanager
def replacing(path):
    """A file to write, which takes the name `path` when everything is written."""
    part = path.with_name(f".{os.getpid()}-{path.name}")
    os.makedirs(path.parent, exist_ok=True)
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_bytes(path, content):
    with replacing(path) as file:
        file.write(content)


def write_rows(path, columns, rows, mode="w"):
    """Write dicts as rows of a CSV file or, in mode "a", add them to it."""
    with open(path, mode) as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if file.tell() == 0:
            writer.writeheader()
        writer.writerows(rows)


def to_file(state):
    """The content of a checkpoint file. In memory, as torch.save hides the error of a full disk."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def read_checkpoint(path):
    """The state in a checkpoint.pt or generator.pt, on the CPU. No code in the file is run."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        return {name: state[name] for name in GENERATOR_STATE} | state
    except FileNotFoundError:
        raise UserError(f"there is no {path}; train first, or choose another checkpoint") from None
    except Exception as error:  # a damaged or foreign file can raise almost any error
        raise UserError(f"{path} is damaged, or no checkpoint ({str(error)[:80]!r})") from error


def restore(owner, state):
    """`owner.load_state_dict(state)`. Raises UserError if it is the state of other networks.

    Of an optimizer, only the moments: rates and betas stay as today's settings say.
    """
    if isinstance(owner, torch.optim.Optimizer):
        state |= {"param_groups": owner.state_dict()["param_groups"]}
    try:
        if state:  # a scaler that was not in use has none
            owner.load_state_dict(state)
    except RuntimeError as error:
        text = "the networks in dcgan.py have changed since; choose another OUTPUT_DIR"
        raise UserError(text) from error
    for weight, moments in getattr(owner, "state", {}).items():
        for name, moment in moments.items():
            # In another memory format than the weights', fused AdamW would be silently wrong.
            if torch.is_tensor(moment) and moment.shape == weight.shape:
                moments[name] = torch.empty_like(weight).copy_(moment)


def output_path(name):
    """The path of `name` in OUTPUT_DIR."""
    return Path(OUTPUT_DIR, name)


def need_space(folder, size):
    """Raise OSError if the disk of `folder` has less than `size` bytes free."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < size:
        raise OSError(f"{size / 1e9:.2f} GB are needed in {folder}, and {free / 1e9:.2f} are free")


def seed_for(*parts):
    """A seed, the same on any machine, that differs for each SEED and `parts`."""
    return int(digest(SEED, *parts)[:16], 16) >> 1  # 63 bits


def digest(*parts):
    """The SHA-256 of some values, in hexadecimal."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def listed(words):
    """Words with commas between them, at most ten."""
    words = list(words)
    if len(words) > 10:
        words[10:] = [f"and {len(words) - 10:,} more"]
    return ", ".join(words)


def flag(name):
    return "--" + name.lower().replace("_", "-")


def spelled(name, value):
    """How the user sets a setting here."""
    return f"{name} = {value}" if in_notebook() else f"{flag(name)} {value}"


def in_notebook():
    """Whether this runs where pictures can be shown."""
    return "IPython" in sys.modules and hasattr(sys.modules["IPython"].get_ipython(), "kernel")


def show(picture, handle=None):
    """In a notebook, show a PIL picture or an animation's path, in `handle`, which is returned."""
    if not in_notebook():
        return
    from IPython import display

    if isinstance(picture, Path):
        picture = display.Image(filename=picture)
    if handle is None:
        return display.display(picture, display_id=True)
    handle.update(picture)
    return handle


class Lines:
    """A text file whose lines are printed by `say`, with the time of day."""

    def write(self, text):
        if text.strip():
            say(f"{strftime('%H:%M')} {text.strip()}")


def progress_bar(items, total, name, **options):
    """A tqdm bar; where there is no terminal, a line per minute."""
    if not in_notebook() and not (sys.stderr and sys.stderr.isatty()):
        options |= {"mininterval": 60, "delay": 60, "miniters": 1, "file": Lines()}
    return tqdm(items, name, total, disable=RANK > 0, dynamic_ncols=True, **options)


def say(text):
    """Print a line, above any progress bar, in the first process."""
    if RANK == 0:
        with suppress(OSError, ValueError), tqdm.external_write_mode():  # stdout may be gone
            print(text, flush=True)


# -------------------------------------------------------------------------- what the settings are

# Each setting and (in small letters) argument: its kind, the limits of a number, and what it is
HELP = """\
IMAGE_SIZE         integer 32     256  pixels per side: 32, 64, 128 or 256
BATCH_SIZE         integer  2   65536  images per step, over all processes
MAX_IMAGES         integer  1     1e9  use only the first images by path, by default all
MIRROR             boolean  -       -  mirror real images at random
AUGMENT            number   0       1  share of images whose colours and place are changed
LATENT_SIZE        integer  1     1e9  length of the noise vector of a face
G_FEATURES         integer  1     1e9  channels of the generator's layer next to the image
D_FEATURES         integer  1     1e9  channels of the discriminator's layer next to the image
ATTRIBUTES         text     -       -  names in list_attr_celeba.csv, as 'Male,Smiling', or folders
EPOCHS             integer  1     1e9  passes over the images
LEARNING_RATE      number   0       1  learning rate of both optimizers
D_LEARNING_RATE    number   1e-9    1  learning rate of the discriminator, if different
BETA1              number   0   0.999  decay rate of AdamW's average of gradients
BETA2              number   0 0.99999  decay rate of AdamW's average of squared gradients
WEIGHT_DECAY       number   0       1  weight decay of AdamW
REAL_LABEL         number   0       1  target for real images
R1_GAMMA           number   0    1000  weight of the discriminator's gradient penalty
AVERAGE_SHARE      number 1e-9      1  half-life of the average, as a share of the images seen
SEED               integer  0    9e18  seed of weights, noise and image order
LOG_EVERY          integer  1     1e9  steps per row of metrics.csv
CHECKPOINT_MINUTES number   0     1e6  minutes between checkpoints
DEVICE             text     -       -  cpu, cuda, cuda:1 or mps, by default the best
PRECISION          text     -       -  float32, bfloat16 or float16, by default the fastest
KAGGLE_DATASET     text     -       -  data set on kaggle.com, as owner/name
DATA_DIR           path     -       -  folder of images, with all subfolders, or a zip of them
CACHE_DIR          path     -       -  folder for decoded images
OUTPUT_DIR         path     -       -  folder of the run: samples, tables, checkpoints
num_images         integer  1     1e9  number of faces
num_faces          integer  2    1000  number of faces
frames             integer  1     1e9  frames from one face to the next
truncation         number   0       1  factor for the noise; below 1, cleaner but more alike
attributes         text     -       -  what faces have or, with -, do not have: 'Smiling,-Male'
individual         boolean  -       -  one PNG file per face instead of a grid
seed               integer  0    9e18  seed of the noise: the same seed draws the same faces
checkpoint         path     -       -  checkpoint.pt or generator.pt to draw from
output             path     -       -  file or folder to write
data_dir           path     -       -  folder of the real images, by default the run's
"""
RULES = {name: rule for name, *rule in re.findall(r"(\S+) +(\S+) +(\S+) +(\S+) +(.+)", HELP)}
SETTINGS = [name for name in RULES if name.isupper()]
OPTIONAL = "MAX_IMAGES AUGMENT ATTRIBUTES D_LEARNING_RATE DEVICE PRECISION".split()
KINDS = {
    "integer": int,
    "number": float,
    "boolean": lambda text: text == "True",
    "text": str,
    "path": lambda text: os.path.abspath(os.path.expanduser(text)),
}
# What the texts of these may be; of all others, anything but nothing
PATTERNS = {
    "IMAGE_SIZE": "32|64|128|256",
    "MIRROR": "True|False",
    "PRECISION": "float32|bfloat16|float16",
}


def setting_values():
    """{name: value} of the settings, as they are now."""
    return {name: globals()[name] for name in SETTINGS}


def parsed(name, value):
    """The value of a setting or argument that `value`, maybe a flag's text, stands for."""
    kind, low, high, meaning = RULES[name]
    text = ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    if text == "None" and name in OPTIONAL:
        return None
    with suppress(ValueError):
        result = KINDS[kind](text)
        in_limits = low == "-" or float(low) <= result <= float(high)
        if in_limits and re.fullmatch(PATTERNS.get(name, "(?!None$).+"), text):
            return result
    limits = "" if low == "-" else f" from {low} to {high}"
    raise UserError(f"{name} is {value!r}; it must be: {kind}{limits}; {meaning}")


def check_settings():
    """Check every setting before any work is done, and make folders absolute. Raises UserError."""
    for name, value in setting_values().items():
        globals()[name] = parsed(name, value)
    if KAGGLE_DATASET != CELEBA and DATA_DIR == os.path.abspath(CELEBA_DIR):
        raise UserError(f"{DATA_DIR} is for CelebA; choose another DATA_DIR for {KAGGLE_DATASET}")
    if BATCH_SIZE % WORLD_SIZE:
        raise UserError(f"BATCH_SIZE ({BATCH_SIZE}) is no multiple of {WORLD_SIZE} processes")
    if Path(OUTPUT_DIR).is_relative_to(DATA_DIR):
        raise UserError(f"OUTPUT_DIR ({OUTPUT_DIR}) is in DATA_DIR: samples would be trained on")


# ------------------------------------------------------------------------------------ command line

DRAWING = "OUTPUT_DIR DEVICE PRECISION".split()
# For each command: the function that it calls, what it does, and the settings that it uses.
COMMANDS = {
    "train": (train, "train, or resume a run", SETTINGS),
    "generate": (generate_images, "new faces: a grid, or one file per face", DRAWING),
    "interpolate": (interpolate, "a looping animation that moves from face to face", DRAWING),
    "evaluate": (evaluate, "FID, KID, precision and recall", [*DRAWING, "MAX_IMAGES", "CACHE_DIR"]),
    "download": (download, "the images, and nothing else", ("DATA_DIR", "KAGGLE_DATASET")),
}
WRONG_CALLS = (UserError, argparse.ArgumentError)
FAILURES = (OSError, ImportError, FloatingPointError, MemoryError, torch.OutOfMemoryError)


def parse(words):
    """The function that a command line calls, and {name: text} of its settings and arguments."""
    command = words.pop(0) if words and words[0] in COMMANDS else "train"
    function, about, settings = COMMANDS[command]
    parser = argparse.ArgumentParser(
        f"dcgan.py {command}", description=about, allow_abbrev=False, exit_on_error=False
    )
    parser.epilog = f"commands, to come first: {', '.join(COMMANDS)}"
    if command == "train":
        parser.add_argument("--demo", action="store_true", help="a short run on drawn faces")
        if "--demo" in words:
            words = DEMO.split() + words  # the last of two flags wins
    call = inspect.signature(function).bind()
    call.apply_defaults()
    defaults = call.arguments | {name: globals()[name] for name in settings}
    for name, default in defaults.items():
        options = {"metavar": "X"}
        if isinstance(default, bool):
            options = {"action": argparse.BooleanOptionalAction}
        options |= {"dest": name, "default": argparse.SUPPRESS}
        parser.add_argument(flag(name), help=f"{RULES[name][-1]} (default {default})", **options)
    # With a blank before it, the -Male of `--attributes -Male` is no flag.
    words = [re.sub("^-(?!-|h$)", " -", word) for word in words]
    options, unknown = parser.parse_known_args(words)
    if unknown:
        flags = parser._option_string_actions
        close = [name for name in flags if re.sub(r"(\w)\w*-?", r"\1", name) == unknown[0]]
        close += difflib.get_close_matches(unknown[0], flags)
        hint = f"did you mean {close[0]}?" if close else "--help shows what there is"
        raise UserError(f"there is no {unknown[0]}; {hint}")
    options = vars(options)
    options.pop("demo", None)
    return function, options


def main(argv=None):
    """The command line. Returns the exit status: 0, 1 for a failure, 2 for a wrong call.

    After signal N it is 128 + N. Errors that only an editor of this file can fix keep a traceback.
    """
    try:
        function, options = parse(sys.argv[1:] if argv is None else list(argv))
        values = {name: parsed(name, text) for name, text in options.items()}
        globals().update({name: values.pop(name) for name in SETTINGS if name in values})
        function(**values)
        return 1 if failing and function is not train else 0  # a run goes on without pictures
    except KeyboardInterrupt as interrupt:
        return 128 + (interrupt.args or [signal.SIGINT])[0]
    except WRONG_CALLS + FAILURES as error:
        print(f"dcgan.py: error: {' '.join((str(error) or repr(error)).split())}", file=sys.stderr)
        return 2 if isinstance(error, WRONG_CALLS) else 1


if __name__ == "__main__":
    if "__file__" in globals() or not in_notebook():
        sys.exit(main())
    main([])  # pasted into a cell of a notebook
