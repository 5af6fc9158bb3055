"""Train a DCGAN on CelebA with one command, then draw new faces with it.

    pip install -r requirements.txt
    python dcgan.py                            # downloads CelebA, trains, draws a grid of faces after each epoch
    python dcgan.py --demo                     # the same in minutes, on faces it draws itself: no network, no account
    python dcgan.py generate --num-images 16   # new faces
    python dcgan.py interpolate                # a film that walks from face to face
    python dcgan.py evaluate                   # FID and KID against the data set
    torchrun --nproc-per-node 4 dcgan.py       # the same training on four GPUs

In a notebook: import dcgan; dcgan.EPOCHS = 2; dcgan.train(); dcgan.generate_images(num_images=16)

The method: Radford, Metz, Chintala, "Unsupervised Representation Learning with Deep Convolutional Generative
Adversarial Networks", 2015, https://arxiv.org/abs/1511.06434. This file reads from top to bottom as the data flows:
settings, data, networks, training step, checkpoints, pictures, training, using a trained generator, command line.
"""

import argparse
import contextlib
import copy
import ctypes
import difflib
import hashlib
import importlib.util
import inspect
import io
import json
import math
import os
import random
import re
import shutil
import signal
import stat
import sys
import threading
import time
import warnings
import zipfile
import zlib
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from filelock import FileLock, Timeout
from PIL import Image, ImageDraw, ImageFilter, ImageOps
from torch import nn
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.functional import center_crop, pil_to_tensor, to_pil_image
from torchvision.utils import make_grid
from tqdm import tqdm

# ------------------------------------------------------------------------------------------------------- settings


class Setting(NamedTuple):
    """What a constant may hold: its type, and its range (ends included), its choices, or a text's form."""

    kind: type
    low: float = -math.inf
    high: float = math.inf
    choices: tuple = ()
    form: str = ".+"
    optional: bool = False

    def allowed(self):
        """The range in words."""
        number = f"a {'whole ' * (self.kind is int)}number from {self.low:,} to {self.high:,}"
        text = "a name" if self.form == ".+" else f"text of the form {self.form}"
        text = f"one of {', '.join(map(str, self.choices))}" if self.choices else text if self.kind is str else number
        return text + " or None" * self.optional

    def check(self, name, value):
        """`value`, which may be the text of a flag, as this setting's type. Raises ValueError with the range."""
        if self.optional and value in (None, "None", "none"):
            return None
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            typed = os.fspath(value) if self.kind is str else self.kind(value)
            exact = isinstance(value, str) or self.kind is str or (typed == value and not isinstance(value, bool))
            formed = re.fullmatch(self.form, typed) if self.kind is str else self.low <= typed <= self.high
            if exact and (typed in self.choices if self.choices else formed):
                return typed
        raise ValueError(f"{name} ({flag(name)}) is {one_line(repr(value))}; it must be {self.allowed()}")


# name: Setting(type, from, to) = default  # unit, reason. Each is a flag as well, and its comment the flag's help.

# Data
IMAGE_SIZE: Setting(int, choices=(32, 64, 128, 256)) = 64  # pixels a side; each doubling takes four times as long
BATCH_SIZE: Setting(int, 2, 65_536) = 64  # images a step, over all processes; small ones keep D and G in balance
MAX_IMAGES: Setting(int, 1, 10**9, optional=True) = None  # train on the first so many images; None: all
WORKERS: Setting(int, 0, 1_024, optional=True) = None  # processes that decode JPEGs, once; None: one a core

# Networks
LATENT_SIZE: Setting(int, 1, 65_536) = 100  # length of the noise z that a face is made from; the paper's
G_FEATURES: Setting(int, 4, 1_024) = 64  # generator's feature maps next to the image; inner layers have up to 8 times
D_FEATURES: Setting(int, 4, 1_024) = 64  # the discriminator's; fewer make it weaker

# Training
EPOCHS: Setting(int, 1, 10**6) = 20  # passes over the images; raise it to go on with a finished run
LEARNING_RATE: Setting(float, 0, 1) = 5e-4  # a step, of both AdamWs; gave better faces than 2e-4 in the same time
D_LEARNING_RATE: Setting(float, 0, 1, optional=True) = None  # the discriminator's, should it differ
BETA1: Setting(float, 0, 0.999) = 0.5  # AdamW's momentum; with its usual 0.9 the discriminator wins
BETA2: Setting(float, 0, 0.99999) = 0.999  # AdamW's memory of squared gradients; its usual
WEIGHT_DECAY: Setting(float, 0, 1) = 0.01  # AdamW's; its usual
REAL_LABEL: Setting(float, 0.5, 1) = 1.0  # target for real images; 0.9 keeps the discriminator from being too sure
EMA_IMAGES: Setting(int, 0, 10**9) = 5_000  # images; half-life of the averaged generator, which draws the better faces
SEED: Setting(int, 0, 2**63 - 1) = 0  # decides first weights, noise and the order of the images

# Reporting
LOG_EVERY: Setting(int, 1, 10**6) = 20  # steps that a row of metrics.csv is the mean of
CHECKPOINT_MINUTES: Setting(float, 0, 10**6) = 10  # minutes; no more work is ever lost; an epoch's end is saved too

# Hardware
DEVICE: Setting(str, form=r"cpu|mps|cuda(:\d+)?", optional=True) = None  # None: CUDA, else MPS, else the CPU
PRECISION: Setting(str, choices=("float32", "bfloat16", "float16"), optional=True) = None  # None: the device's fastest

# Places
CELEBA_DIR = "data/celeba"  # where CelebA is downloaded to
DATA_DIR: Setting(str) = CELEBA_DIR  # a folder of images, at any depth
CACHE_DIR: Setting(str) = "data/cache"  # decoded images; 2.3 GiB for all of CelebA at 64 pixels
OUTPUT_DIR: Setting(str) = "output"  # everything else that a run writes
KAGGLE_DATASET: Setting(str, form=r"[\w-]+/[\w-]+") = "jessicali9530/celeba-dataset"  # owner/name on kaggle.com

DEMO = {"DATA_DIR": "data/demo", "OUTPUT_DIR": "output-demo", "EPOCHS": 12, "G_FEATURES": 32, "D_FEATURES": 32}
NETWORK_SETTINGS = ("IMAGE_SIZE", "LATENT_SIZE", "G_FEATURES", "D_FEATURES")
ORDER_SETTINGS = ("BATCH_SIZE", "SEED", "MAX_IMAGES")
SETTINGS = {name: it for name, it in inspect.get_annotations(sys.modules[__name__]).items() if isinstance(it, Setting)}
WORLD_SIZE = int(os.environ.get("WORLD_SIZE") or 1)  # processes that torchrun has started
RANK = int(os.environ.get("RANK") or 0)  # this one's number; 0 draws, logs and saves


def values():
    """{name: value} of the constants above, as they are now."""
    return {name: globals()[name] for name in SETTINGS}


def flag(name):
    return "--" + name.lower().replace("_", "-")


def check_settings():
    """Check every constant before any work is done. Raises ValueError that names the constant, its value and range."""
    for name, setting in SETTINGS.items():
        globals()[name] = setting.check(name, globals()[name])
    data, output = Path(DATA_DIR).resolve(), Path(OUTPUT_DIR).resolve()
    if data in (output, *output.parents):
        raise ValueError(f"OUTPUT_DIR ({OUTPUT_DIR}) lies in DATA_DIR ({DATA_DIR}); move it, or samples are trained on")
    if BATCH_SIZE % WORLD_SIZE:
        raise ValueError(f"BATCH_SIZE is {BATCH_SIZE}; it must be a multiple of the {WORLD_SIZE} processes")


@contextlib.contextmanager
def changed_settings(changes):
    """Constants with other values, for as long as a `with` lasts."""
    before = values()
    globals().update(changes)
    try:
        yield
    finally:
        globals().update(before)


def seed_for(*parts):
    """A seed, the same on any machine, that differs for each SEED and `parts`."""
    return int.from_bytes(hashlib.sha256(repr((SEED, *parts)).encode()).digest()[:8], "big") >> 1


def notebook():
    """Whether this runs where pictures can be shown."""
    return "IPython" in sys.modules and hasattr(sys.modules["IPython"].get_ipython(), "kernel")


def progress_bar(*args, **options):
    """A tqdm bar, in a notebook a notebook's; none where nobody would see it."""
    with warnings.catch_warnings(action="ignore"):  # of missing ipywidgets
        from tqdm import auto
    hidden = RANK > 0 or not (sys.stderr.isatty() or notebook())
    return auto.tqdm(*args, disable=hidden, dynamic_ncols=True, **options)


def say(text):
    """Print a line, above any progress bar, on rank 0; a terminal that has gone away is no reason to stop."""
    with contextlib.suppress(OSError, ValueError):
        if RANK == 0:
            tqdm.write(text)
            sys.stdout.flush()


def one_line(error):
    """An error, or other text, in one line that is not too long."""
    return re.sub(r"\s+", " ", str(error))[:120] or type(error).__name__


@contextlib.contextmanager
def replacing(path):
    """A file to write beside `path`, which takes that name when all is written: the old file stays whole until then."""
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def write_file(path, write):
    """Let `write(file)` replace `path`, by way of memory: to a full disk torch.save itself gives no honest OSError."""
    buffer = io.BytesIO()
    write(buffer)
    with replacing(path) as file:
        file.write(buffer.getbuffer())


def need_space(folder, size, what):
    """Raise OSError, with both sizes, if the disk of `folder` has less than `size` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < size:
        sizes = [f"{n / 2**30:.1f} GiB" if n > 2**29 else f"{n / 2**20:.1f} MiB" for n in (size, free)]
        raise OSError(f"{what} needs {sizes[0]} on the disk of {folder}, which has {sizes[1]} free; make room there")


def locked(path, waiting=None):
    """A context that holds the lock file `path`: after saying `waiting`, it waits; OSError if that is None."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        return FileLock(path).acquire(timeout=0)
    except Timeout:
        if waiting is None:
            raise OSError(f"{path.parent} is in use by another run; wait for that one, or change OUTPUT_DIR") from None
    say(waiting)
    return FileLock(path).acquire()


# ----------------------------------------------------------------------------------------------------------- data

CELEBA_BYTES = 2_900_000_000  # the archive, 1.33 GiB, and the images unpacked beside it
KAGGLE_SECONDS = 60  # a server that is silent for so long has hung
KAGGLE_HELP = """Kaggle wants you to log in for {}. Either
  - make a token at https://www.kaggle.com/settings (API, Create New Token) and save it as ~/.kaggle/access_token,
    or set KAGGLE_API_TOKEN to it (an older kaggle.json goes to ~/.kaggle/kaggle.json); or
  - put images of faces, from anywhere, into {} by hand; or
  - run with --demo, which needs no account."""


def download_celeba():
    """Download KAGGLE_DATASET into DATA_DIR, unless images are there, and return that folder.

    With the user's Kaggle credentials if they are good, else without. Raises OSError if Kaggle, network or disk fail.
    """
    folder = Path(DATA_DIR)
    downloads = folder.with_name(folder.name + ".download")
    fill(folder, lambda part: fetch_celeba(downloads, part))
    shutil.rmtree(downloads, ignore_errors=True)
    return folder


def fill(folder, put):
    """Unless `folder` has images, let `put(part)` fill a hidden folder in it, which then gets a name: all or none."""
    if has_images(folder):
        return
    with locked(folder.with_name(folder.name + ".lock"), f"another process is filling {folder}; waiting for it"):
        if not has_images(folder):
            part = folder / ".part"  # on the same disk, wherever a link or a mount leads
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            put(part)
            say(f"{len(os.listdir(part)):,} images in {folder}")
            os.replace(part, folder / "images")


def fetch_celeba(downloads, folder):
    """Put the images of KAGGLE_DATASET into `folder`, by way of `downloads`, which a next run goes on with."""
    archive = downloads / (KAGGLE_DATASET.split("/")[1] + ".zip")
    for attempt in (1, 2):
        try:
            need_space(folder, CELEBA_BYTES - (archive.stat().st_size if archive.exists() else 0), "CelebA")
            say(f"downloading {KAGGLE_DATASET} from Kaggle (CelebA is for non-commercial research)")
            fetch_from_kaggle(downloads)
            return unpack(archive, folder)
        except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, zlib.error) as error:
            # A signed address that expired half-way leaves an error page in the zip, and Kaggle's client would
            # then take it for whole on every later run: away with it, and once more from the start.
            shutil.rmtree(downloads, ignore_errors=True)
            if attempt == 2:
                raise OSError(f"Kaggle's archive of {KAGGLE_DATASET} is damaged ({error}); try later") from None
            say(f"the download is damaged ({error})")


def fetch_from_kaggle(downloads):
    """Bring the archive into `downloads` with Kaggle's own client, which goes on with what was cut. Raises BadZipFile
    for what a new start may mend, OSError with a line for the user for the rest."""
    import requests

    for anonymous in (False, True):
        try:
            with tamed_kaggle(downloads, anonymous):
                from kaggle.api.kaggle_api_extended import KaggleApi

                api = KaggleApi()
                if not anonymous:
                    with contextlib.suppress(Exception, SystemExit):  # there are no credentials, or stale ones
                        api.authenticate()
                return api.dataset_download_files(KAGGLE_DATASET, path=str(downloads), quiet=False)
        except requests.HTTPError as error:
            status = error.response.status_code
            if error.response.history and status in (400, 401, 403, 404, 410):  # from storage: about time, not accounts
                raise zipfile.BadZipFile("its address has expired") from None
            if status not in (401, 403):
                cure = {404: "no such data set; check KAGGLE_DATASET", 429: "too many requests; wait an hour"}
                cure = cure.get(status, "try later")
                raise OSError(f"Kaggle answers {status} for {KAGGLE_DATASET}: {cure}") from None
            if anonymous:
                raise OSError(KAGGLE_HELP.format(KAGGLE_DATASET, DATA_DIR)) from None
        except requests.RequestException as error:
            raise OSError(f"Kaggle cannot be reached ({type(error).__name__}); check the network and run this again, "
                          "which goes on where it stopped, or try --demo, which needs no network") from None
        except ValueError as error:  # the client's "file size does not match"
            raise zipfile.BadZipFile(str(error)) from None


@contextlib.contextmanager
def tamed_kaggle(downloads, anonymous):
    """Keep Kaggle's client, which authenticates and prints at import, from printing more than its progress bar, from
    waiting for ever, and if `anonymous` from sending the credentials that it finds, good or bad."""
    import requests

    environment, send = dict(os.environ), requests.Session.send
    os.environ.pop("VERBOSE", None)  # would print the user's token
    for name in (name for name in environment if name.startswith("KAGGLE_")):
        os.environ[name] = environment[name].strip()  # the client fails at a newline
        if anonymous and name != "KAGGLE_API_ENVIRONMENT":
            del os.environ[name]
    if anonymous:
        os.environ["HOME"] = os.environ["USERPROFILE"] = str(downloads)
    requests.Session.send = lambda *args, **options: send(*args, **options | {"timeout": KAGGLE_SECONDS})
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        requests.Session.send = send
        os.environ.clear()
        os.environ.update(environment)


def unpack(archive, folder):
    """Unpack CelebA's images, and nothing else: of a member only the base name counts, and only six digits and .jpg."""
    with zipfile.ZipFile(archive) as source:
        members = {Path(member.filename).name: member for member in source.infolist()}
        members = {name: member for name, member in members.items() if re.fullmatch(r"[0-9]{6}\.jpg", name)}
        if not members:
            raise zipfile.BadZipFile("no images in it")
        need_space(folder, sum(member.file_size for member in members.values()), "unpacking CelebA")
        for name, member in progress_bar(members.items(), desc="unpacking", unit=" images"):
            (folder / name).write_bytes(source.read(member))
    if len(os.listdir(folder)) != len(members):
        raise OSError(f"{folder} does not hold the archive's {len(members):,} images; run this again")


def draw_demo(folder):
    """Put 4,000 JPEGs of drawn faces into `folder`."""
    for index in progress_bar(range(4_000), desc="drawing", unit=" faces"):
        draw_face(random.Random(index)).save(folder / f"{index:06d}.jpg", quality=90)


def draw_face(rng):
    """A drawn face, 178 × 218 pixels as CelebA's are; `rng`, a random.Random, decides on all of it."""

    def shade(*choices):
        return tuple(round(min(255, max(0, level + rng.uniform(-18, 18)))) for level in rng.choice(choices))

    def oval(x, y, width, height, colour, darker=1.0):
        colour = tuple(round(level * darker) for level in colour)
        draw.ellipse((cx + x - width, cy + y - height, cx + x + width, cy + y + height), colour)

    skin = shade((242, 205, 178), (222, 172, 138), (186, 130, 95), (128, 84, 60))
    hair = shade((38, 28, 24), (92, 58, 34), (196, 156, 92), (150, 70, 36))
    iris, lips = shade((70, 50, 35), (70, 110, 150), (80, 120, 70)), shade((190, 70, 80), (165, 60, 60))
    image = Image.new("RGB", (178, 218), shade((150, 185, 215), (205, 200, 185), (95, 110, 105), (205, 165, 165)))
    draw, cx, cy = ImageDraw.Draw(image), 89 + rng.uniform(-5, 5), 112 + rng.uniform(-4, 4)
    width, height, long, smile = rng.uniform(43, 51), rng.uniform(58, 66), rng.random() < 0.5, rng.random()
    oval(0, 122, 84, 48, shade((170, 60, 60), (60, 90, 160), (70, 130, 80)))
    oval(0, 8 if long else -14, width + 14, height + (22 if long else 2), hair)
    oval(0, 68, 19, 28, skin, 0.86)
    oval(0, 0, width, height, skin)
    draw.chord((cx - width - 3, cy - height - 8, cx + width + 3, cy + 18), 186 + rng.uniform(-8, 18), 354, hair)
    for gap in (rng.uniform(-22, -18), rng.uniform(18, 22)):
        oval(gap, -6, 10, 6, (250, 248, 244))
        oval(gap, -6, 5.5, 5.5, iris)
        oval(gap, -6, 2.5, 2.5, (15, 12, 12))
        draw.line([(cx + gap * 0.5, cy - 20), (cx + gap * 1.5, cy - 22)], tuple(level // 2 for level in hair), 4)
    draw.line([(cx, cy - 4), (cx - 4, cy + 17), (cx + 4, cy + 17)], tuple(round(level * 0.72) for level in skin), 3)
    draw.chord((cx - 18, cy + 34 - 12 * smile, cx + 18, cy + 38 + 10 * smile), 0, 180, lips)
    return image.filter(ImageFilter.GaussianBlur(1.2))


def list_images(folder):
    """Yield (path, size, time of change) of the images at any depth below `folder`, in no order: paths relative,
    hidden ones and __MACOSX left out; a folder that links lead to more than once counts once."""
    seen, waiting = set(), [""]
    while waiting:
        name = waiting.pop()
        path = os.path.join(folder, name)
        try:
            status = os.stat(path)
        except OSError:
            if not os.path.islink(path):  # it has just gone
                continue
            status = os.lstat(path)  # a link to nowhere counts, to be named
        kind = stat.S_IFMT(status.st_mode)
        if kind == stat.S_IFDIR and (status.st_dev, status.st_ino) not in seen:
            seen.add((status.st_dev, status.st_ino))
            inside = sorted(it for it in os.listdir(path) if not it.startswith(".") and it != "__MACOSX")
            waiting += [os.path.join(name, it) for it in reversed(inside)]
        elif kind in (stat.S_IFREG, stat.S_IFLNK) and name.lower().endswith(IMG_EXTENSIONS):
            yield name, status.st_size, status.st_mtime_ns


def has_images(folder):
    return folder.is_dir() and next(list_images(folder), None) is not None


def read_face(path, size):
    """The image at `path` as a uint8 tensor (3, size, size): its largest centre square, resized with antialiasing.
    Raises whatever Pillow does for a damaged file, or one of more pixels than Pillow takes for honest."""
    with warnings.catch_warnings(action="ignore"):
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path) as image:
            image.draft(None, (size, size))  # libjpeg decodes at 1/2, 1/4 or 1/8, yet no smaller than asked for
            ImageOps.exif_transpose(image, in_place=True)
            if image.mode.startswith("I"):  # 16 bits a pixel, which convert() would clip
                image = image.convert("I").point(lambda value: value / 256, "F")
            image = image if image.mode == "RGB" else image.convert("RGB")
    return pil_to_tensor(center_crop(image, min(image.size)).resize((size, size), Image.Resampling.BILINEAR))


class FaceFolder(ImageFolder):
    """torchvision's ImageFolder over `names` below `root`, in class folders or none. Items are the bytes of a face;
    of a file that cannot be read, a str that says why."""

    def __init__(self, root, names):
        self.names, self.size = names, IMAGE_SIZE
        super().__init__(root)

    def find_classes(self, directory):
        return [""], {"": 0}

    def make_dataset(self, directory, *args, **options):
        return [(os.path.join(directory, name), 0) for name in self.names]

    def __getitem__(self, index):
        try:
            return read_face(self.samples[index][0], self.size).numpy().tobytes()
        except Exception as error:  # Pillow raises almost anything for a broken file
            return f"{type(error).__name__}: {error}"


HEADER_BYTES = 4_096  # a cache file is a line of JSON, filled up to this, and then the images' bytes


def prepare_data():
    """`load_faces`, after a download of CelebA or a drawing of the demo's faces, if DATA_DIR is theirs and empty."""
    if Path(DATA_DIR) == Path(CELEBA_DIR):
        download_celeba()
    elif Path(DATA_DIR) == Path(DEMO["DATA_DIR"]):
        fill(Path(DATA_DIR), draw_demo)
    return load_faces()


def load_faces():
    """(faces, key): the images of DATA_DIR, uint8 (N, 3, IMAGE_SIZE, IMAGE_SIZE), mapped from a file in CACHE_DIR that
    the first call decodes them into. The key stands for the files and what was done to them. Raises ValueError if there
    are no images, fewer than a batch, or too many that cannot be read."""
    folder = Path(DATA_DIR)
    if not folder.is_dir():
        raise ValueError(f"DATA_DIR ({folder}) is no folder; give one that holds images")
    images = sorted(list_images(folder))[:MAX_IMAGES]
    if not images:
        raise ValueError(f"DATA_DIR ({folder}) holds no images; put some there, or give another folder")
    key = hashlib.sha256(f"{images} centre square, bilinear, {IMAGE_SIZE}".encode(errors="surrogatepass")).hexdigest()
    path = Path(CACHE_DIR) / f"faces-{key[:16]}-{IMAGE_SIZE}.bin"
    if (faces := open_cache(path, key)) is None:
        with locked(path.with_suffix(".lock"), "another process is decoding these images; waiting for it"):
            if (faces := open_cache(path, key)) is None:
                if path.exists():
                    say(f"{path} is damaged; decoding the images again")
                decode(folder, [name for name, *_ in images], path, key)
                faces = open_cache(path, key)
    if len(faces) < BATCH_SIZE:
        raise ValueError(f"DATA_DIR ({folder}) holds {len(faces)} images, fewer than BATCH_SIZE ({BATCH_SIZE}); "
                         "add images or lower BATCH_SIZE")
    return faces, key


def open_cache(path, key):
    """Map the faces of a cache; None if there is none, or if its size, header or key is wrong."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RuntimeError):
        with open(path, "rb") as file:
            header = json.loads(file.read(HEADER_BYTES))
        size, count = path.stat().st_size, header["images"]
        if header["key"] == key and count > 0 and size == HEADER_BYTES + count * 3 * IMAGE_SIZE**2:
            mapped = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
            return mapped[HEADER_BYTES:].view(count, 3, IMAGE_SIZE, IMAGE_SIZE)


def decode(folder, names, path, key):
    """Decode the images into a new cache at `path`; name, skip and count those that cannot be read."""
    need_space(path.parent, HEADER_BYTES + len(names) * 3 * IMAGE_SIZE**2, f"decoding {len(names):,} images")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = min(cores if WORKERS is None else WORKERS, math.ceil(len(names) / 64))
    # Workers send plain bytes through pipes: tensors would go through shared memory, of which Docker has 64 MB.
    loader = torch.utils.data.DataLoader(FaceFolder(folder, names), 64, num_workers=workers, collate_fn=list)
    skipped = 0
    try:
        with replacing(path) as file, progress_bar(total=len(names), desc="decoding", unit=" images") as bar:
            file.seek(HEADER_BYTES)
            for name, face in zip(names, (face for batch in loader for face in batch)):
                bar.update()
                if isinstance(face, bytes):
                    file.write(face)
                    continue
                skipped += 1
                if skipped <= 100:
                    say(f"skipped {os.path.join(folder, name)!r}: {face!r}")
                if skipped * 10 > len(names):
                    raise ValueError(f"more than one in ten of the {len(names):,} images in {folder} cannot be read, "
                                     f"the last {name!r}; mend or remove them")
            file.seek(0)
            file.write(json.dumps({"key": key, "images": len(names) - skipped}).ljust(HEADER_BYTES).encode())
    except RuntimeError as error:  # DataLoader's, for a worker that the system has killed
        raise OSError(f"decoding failed ({one_line(error)}); try fewer WORKERS") from None
    if skipped:
        say(f"skipped {skipped} of {len(names):,} images")


class Batches:
    """The training batches of `faces`, a function of (SEED, epoch, step) alone: a resumed run sees what an untouched
    one would, and a checkpoint needs no random states. Each of several processes draws the numbers of the whole batch
    and takes its slice of them, so that a batch does not depend on how many they are."""

    def __init__(self, faces, device):
        self.faces, self.device, self.count = faces, device, len(faces)
        self.steps = len(faces) // BATCH_SIZE  # full batches only
        share = BATCH_SIZE // WORLD_SIZE
        self.mine = slice(RANK * share, (RANK + 1) * share)
        self.random = torch.Generator(device)
        if device.type == "cuda":
            self.copies = torch.cuda.Stream(device)
            if faces.numel() < torch.cuda.mem_get_info(device)[0] / 2:
                self.faces = faces.to(device)

    def epoch(self, epoch, start=0):
        """Yield (faces, flips, latents) step by step: uint8 (B, 3, S, S), bool (B, 1, 1, 1) and float (B, z, 1, 1)."""
        order = torch.randperm(self.count, generator=torch.Generator().manual_seed(seed_for("order", epoch)))
        order = order.to(self.faces.device)
        following = self.gather(order, start)
        for step in range(start, self.steps):
            faces = following
            if self.device.type == "cuda" and not self.faces.is_cuda:
                torch.cuda.current_stream().wait_stream(self.copies)
                faces.record_stream(torch.cuda.current_stream())
            self.random.manual_seed(seed_for("step", epoch, step))
            latents = torch.randn(BATCH_SIZE, LATENT_SIZE, 1, 1, generator=self.random, device=self.device)
            flips = torch.rand(BATCH_SIZE, 1, 1, 1, generator=self.random, device=self.device) < 0.5
            yield faces, flips[self.mine], latents[self.mine]
            if step + 1 < self.steps:  # while the device still computes
                following = self.gather(order, step + 1)

    def gather(self, order, step):
        """This process's faces of a step on the device, or on their way there from pinned memory."""
        indices = order[step * BATCH_SIZE : (step + 1) * BATCH_SIZE][self.mine]
        if self.device.type != "cuda" or self.faces.is_cuda:
            return self.faces.index_select(0, indices).to(self.device)
        pinned = torch.empty(len(indices), *self.faces.shape[1:], dtype=torch.uint8, pin_memory=True)
        torch.index_select(self.faces, 0, indices, out=pinned)
        with torch.cuda.stream(self.copies):
            return pinned.to(self.device, non_blocking=True)


# ------------------------------------------------------------------------------------------------------- networks


def widths(features, image_size):
    """Feature maps from the image's neighbour inwards, e.g. [64, 128, 256, 512]: doubling, to at most 8 × features."""
    return [features * min(8, 2**level) for level in range(int(math.log2(image_size)) - 2)]


class Generator(nn.Module):
    """Noise (N, latent_size, 1, 1) to images (N, 3, image_size, image_size) in [-1, 1]. Shapes below: at 64 pixels."""

    def __init__(self, image_size=64, latent_size=100, features=64):
        super().__init__()
        wide = widths(features, image_size)[::-1]
        layers = [nn.ConvTranspose2d(latent_size, wide[0], 4, 1, 0, bias=False)]  # (N, 512, 4, 4)
        for before, after in zip(wide, wide[1:]):  # (N, 256, 8, 8), (N, 128, 16, 16), (N, 64, 32, 32)
            layers += [nn.BatchNorm2d(before), nn.ReLU(), nn.ConvTranspose2d(before, after, 4, 2, 1, bias=False)]
        layers += [nn.BatchNorm2d(wide[-1]), nn.ReLU()]
        layers += [nn.ConvTranspose2d(wide[-1], 3, 4, 2, 1), nn.Tanh()]  # (N, 3, 64, 64)
        self.layers = nn.Sequential(*layers)
        self.apply(init_weights)

    def forward(self, latents):
        return self.layers(latents)


class Discriminator(nn.Module):
    """Images (N, 3, image_size, image_size) in [-1, 1] to logits (N,); sigmoid(logits) is the probability of "real"."""

    def __init__(self, image_size=64, features=64):
        super().__init__()
        wide = widths(features, image_size)
        layers = [nn.Conv2d(3, wide[0], 4, 2, 1), nn.LeakyReLU(0.2)]  # (N, 64, 32, 32)
        for before, after in zip(wide, wide[1:]):  # (N, 128, 16, 16), (N, 256, 8, 8), (N, 512, 4, 4)
            layers += [nn.Conv2d(before, after, 4, 2, 1, bias=False), nn.BatchNorm2d(after), nn.LeakyReLU(0.2)]
        layers += [nn.Conv2d(wide[-1], 1, 4, 1, 0), nn.Flatten(0)]  # (N, 1, 1, 1), (N,)
        self.layers = nn.Sequential(*layers)
        self.apply(init_weights)

    def forward(self, images):
        return self.layers(images)


def init_weights(module):
    """The paper's: convolutions N(0, 0.02), BatchNorm gains N(1, 0.02), biases 0."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
    if getattr(module, "bias", None) is not None:
        nn.init.zeros_(module.bias)


# -------------------------------------------------------------------------------------------------- training step


def pick_device():
    """(device, dtype): DEVICE, or the best there is; PRECISION, or the fastest that the device has units for."""
    name = DEVICE or ("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name)
    there = {"cpu": 1, "mps": int(torch.backends.mps.is_available()), "cuda": torch.cuda.device_count()}[device.type]
    if (device.index or 0) >= there:
        raise ValueError(f"DEVICE is {device}, and this machine has {there} {device.type} devices; set it to None")
    fastest = torch.float32
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True  # all batches have one shape
        fastest = torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    elif device.type == "cpu":
        with contextlib.suppress(Exception):  # on glibc, keep freed memory: to fault it in anew takes a fifth of a step
            libc = ctypes.CDLL(None)
            libc.mallopt(-3, 2**30), libc.mallopt(-1, 2**31 - 1)  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
        if torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported():  # others emulate it, slowly
            fastest = torch.bfloat16
    return device, getattr(torch, PRECISION) if PRECISION else fastest


class Trainer:
    """Both networks, their optimizers, and the moving average of the generator, which draws the pictures."""

    def __init__(self, device, dtype):
        self.device, self.dtype = device, dtype
        torch.manual_seed(seed_for("weights"))
        # The memory format comes before the optimizers' state: fused AdamW would mix up the two formats, silently.
        self.generator = Generator(IMAGE_SIZE, LATENT_SIZE, G_FEATURES).to(device, memory_format=torch.channels_last)
        self.discriminator = Discriminator(IMAGE_SIZE, D_FEATURES).to(device, memory_format=torch.channels_last)
        self.average = copy.deepcopy(self.generator).eval().requires_grad_(False)
        rates = (LEARNING_RATE, LEARNING_RATE if D_LEARNING_RATE is None else D_LEARNING_RATE)
        options = {"betas": (BETA1, BETA2), "weight_decay": WEIGHT_DECAY, "fused": True}
        self.optimizer_g, self.optimizer_d = self.optimizers = [
            torch.optim.AdamW(network.parameters(), rate, capturable=device.type == "cuda", **options)
            for network, rate in zip((self.generator, self.discriminator), rates)
        ]
        # Only float16 needs its loss scaled; a scaler each, since one network may skip a step that the other takes.
        scaler = {"device": device.type, "enabled": dtype == torch.float16}
        self.scaler_g, self.scaler_d = self.scalers = [torch.amp.GradScaler(**scaler) for _ in range(2)]
        self.images = 0  # real ones seen so far
        self.totals = torch.zeros(4, device=device)  # of loss_d, loss_g, D(x), D(G(z)) since the last fetch
        pairs = list(zip(self.average.state_dict().values(), self.generator.state_dict().values()))
        self.averaged = list(zip(*(pair for pair in pairs if pair[0].is_floating_point())))
        self.counters = list(zip(*(pair for pair in pairs if not pair[0].is_floating_point())))
        self.networks = {"generator": self.generator, "discriminator": self.discriminator, "ema": self.average}
        self.g, self.d = self.generator, self.discriminator  # what runs: these, or what distributes them
        if WORLD_SIZE > 1:
            self.g, self.d = map(self.distributed, (self.g, self.d))
        # A CUDA graph wants some eager steps first, on a side stream. Several processes stay eager: a capture would
        # have to hold their collectives too.
        graphs = device.type == "cuda" and WORLD_SIZE == 1
        self.graph, self.eager_steps = None, 3 if graphs else math.inf
        self.side = torch.cuda.Stream() if graphs else None

    def distributed(self, network):
        """`network` with its gradients averaged over the processes and, on CUDA, BatchNorm over the whole batch."""
        ids = [self.device.index] if self.device.type == "cuda" else None
        if ids:
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        with warnings.catch_warnings(action="ignore"):  # of a newer name for broadcast_buffers
            # Broadcasting buffers would change D's statistics in place between its two forwards.
            return nn.parallel.DistributedDataParallel(network, ids, broadcast_buffers=False)

    def autocast(self):
        """A context for one stretch between optimizer steps: it keeps the weights that it has cast."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def step(self, faces, flips, latents):
        """One step of the discriminator, then one of the generator, on the same fakes."""
        reals = torch.where(flips, faces.flip(3), faces).to(torch.float32, memory_format=torch.channels_last)
        reals = reals.mul_(2 / 255).sub_(1)
        with self.autocast():
            fakes = self.g(latents)

        # Discriminator: minimise -log D(x) - log(1 - D(G(z))), either batch with its own BatchNorm statistics.
        with self.autocast():
            real_logits, fake_logits = self.d(reals), self.d(fakes.detach())
        real_logits, fake_logits = real_logits.float(), fake_logits.float()
        loss_d = bce(real_logits, REAL_LABEL) + bce(fake_logits, 0.0)
        self.update(loss_d, self.optimizer_d, self.scaler_d)

        # Generator: minimise -log D(G(z)), judged by the stepped D, whose own gradients nobody needs now.
        self.discriminator.requires_grad_(False)
        with self.autocast():
            judged = self.discriminator(fakes)
        loss_g = bce(judged.float(), 1.0)
        self.update(loss_g, self.optimizer_g, self.scaler_g)
        self.discriminator.requires_grad_(True)
        means = torch.stack([loss_d, loss_g, real_logits.sigmoid().mean(), fake_logits.sigmoid().mean()])
        self.totals += means.detach()

    def update(self, loss, optimizer, scaler):
        """One optimizer step down the gradient of `loss`."""
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    def advance(self, *batch):
        """`step` on a batch, and the average's. On CUDA a step's 150 small kernels are launched at once, as a graph."""
        if self.graph is None and self.eager_steps == 0:
            self.capture(batch)
        if self.graph:
            for static, new in zip(self.inputs, batch):
                static.copy_(new)
            self.graph.replay()
        else:
            self.eager_steps -= 1
            if self.side:
                self.side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.side):
                self.step(*batch)
            if self.side:
                torch.cuda.current_stream().wait_stream(self.side)
        self.images += BATCH_SIZE
        self.update_average()

    def capture(self, batch):
        """Record `step` as a CUDA graph on inputs of its own; where that fails, steps stay eager for ever."""
        self.inputs, graph = [tensor.clone() for tensor in batch], torch.cuda.CUDAGraph()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        try:
            with torch.cuda.graph(graph, stream=self.side):
                self.step(*self.inputs)
            self.graph = graph
        except RuntimeError as error:
            say(f"no CUDA graph here ({one_line(error)}): steps are launched kernel by kernel")
            self.discriminator.requires_grad_(True)
            self.eager_steps = math.inf

    @torch.no_grad()
    def update_average(self):
        """Move the average towards the generator: weights and BatchNorm's statistics by one lerp, counters as they are.
        The half-life grows to EMA_IMAGES, so that early grids are no ghosts; a CUDA graph would freeze it."""
        half_life = min(EMA_IMAGES, 0.05 * self.images)
        torch._foreach_lerp_(*self.averaged, 1 - 0.5 ** (BATCH_SIZE / half_life) if half_life else 1.0)
        torch._foreach_copy_(*self.counters)

    def fetch(self, steps):
        """The means of `totals` over `steps` steps: the one place where training waits for the device."""
        if WORLD_SIZE > 1:
            torch.distributed.all_reduce(self.totals)
        means = [total / steps / WORLD_SIZE for total in self.totals.tolist()]
        self.totals.zero_()
        return means


def bce(logits, target):
    """Binary cross-entropy on logits: after a sigmoid, a D that is sure and wrong would have no gradient at all."""
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, target))


# ---------------------------------------------------------------------------------------------------- checkpoints

COUNT = Setting(int, 0, 10**15)  # of epochs, steps or images
NOT_FINITE = ("likely causes: a LEARNING_RATE that is too high, or PRECISION float16; lower the one or set the other "
              "to float32, and run again, which goes on from the last checkpoint")


def save_checkpoint(run, whole_epoch):
    """Write checkpoint.pt, all that a run is made of, keep the one before, and after an epoch write generator.pt.
    Raises FloatingPointError, and leaves the files alone, if a weight is not finite."""
    run.saved = time.monotonic()
    if RANK > 0:
        return
    trainer, path = run.trainer, Path(OUTPUT_DIR) / "checkpoint.pt"
    state = {
        "settings": values(), "data": run.data_key, "fixed_noise": run.fixed_noise, "images": trainer.images,
        "epoch": run.epoch, "step": run.step, "interval": run.interval, "totals": trainer.totals.tolist(),
        "rows": run.rows, **{name: network.state_dict() for name, network in trainer.networks.items()},
        "optimizers": [one.state_dict() for one in trainer.optimizers],
        "scalers": [one.state_dict() for one in trainer.scalers],
    }
    for name in trainer.networks:
        if not torch.stack([tensor.isfinite().all() for tensor in [trainer.totals, *state[name].values()]]).all():
            raise FloatingPointError(f"the {name} or a loss is not finite in epoch {run.epoch + 1}; {NOT_FINITE}")
    if whole_epoch:  # first the generator: a run that is killed in between does this again
        small = {name: state[name] for name in ("epoch", "images", "ema")}
        small["settings"] = {name: state["settings"][name] for name in NETWORK_SETTINGS}
        write_file(path.with_name("generator.pt"), lambda file: torch.save(small, file))
    write_file(path.with_suffix(".new"), lambda file: torch.save(state, file))
    take_new(path)


def take_new(path):
    """Give a whole new checkpoint its name, and the one before its own; a kill in between is made good at the start."""
    if path.with_suffix(".new").exists():
        if path.exists():
            os.replace(path, path.with_suffix(".previous.pt"))
        os.replace(path.with_suffix(".new"), path)


def read_zip(path):
    """What torch.save wrote to `path`, on the CPU; nothing in it is run. Raises ValueError if it is damaged: torch.load
    does not notice flipped bits, but the zip that such a file is has checksums."""
    try:
        with zipfile.ZipFile(path) as archive:
            stored = all(member.compress_type == zipfile.ZIP_STORED for member in archive.infolist())
            wrong = archive.testzip() if stored else "compression"
        if wrong:
            raise ValueError(f"wrong: {wrong}")
        with warnings.catch_warnings(action="ignore"):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, IsADirectoryError):
        raise ValueError(f"there is no file {path}") from None
    except OSError:
        raise
    except Exception as error:  # a damaged zip or pickle raises almost anything
        raise ValueError(f"{path} is damaged, or not from torch.save ({one_line(error)})") from None


def read_checkpoint(path):
    """The state in a checkpoint.pt or generator.pt. Raises ValueError if it is damaged or something else."""
    state = read_zip(path)
    try:
        for name in NETWORK_SETTINGS:
            SETTINGS[name].check(name, state["settings"][name])
        for name in ("epoch", "images"):
            COUNT.check(name, state[name])
        build_generator(state)
        return state
    except Exception as error:  # whatever another program's file leads to
        raise ValueError(f"{path} is no checkpoint of dcgan.py ({one_line(error)})") from None


def build_generator(state):
    """The averaged generator of a checkpoint's state, built as its settings say."""
    with torch.device("meta"):  # no random numbers, and no memory for what a small file may claim
        generator = Generator(*(state["settings"][name] for name in ("IMAGE_SIZE", "LATENT_SIZE", "G_FEATURES")))
    if any(generator.state_dict()[name].shape != tensor.shape for name, tensor in state["ema"].items()):
        raise ValueError("its weights are not those of its settings")
    generator.to_empty(device="cpu").load_state_dict(state["ema"])
    return generator.eval().requires_grad_(False)


def newest_checkpoint():
    """The state to go on from, or None: OUTPUT_DIR's checkpoint.pt or, if that is damaged or gone, the one before."""
    path = Path(OUTPUT_DIR) / "checkpoint.pt"
    previous = path.with_suffix(".previous.pt")
    take_new(path)
    if not path.exists():
        return read_checkpoint(previous) if previous.exists() else None
    try:
        return read_checkpoint(path)
    except ValueError as error:
        if not previous.exists():
            raise ValueError(f"{error}; move it away to start afresh") from None
        state = read_checkpoint(previous)
        os.replace(path, path.with_suffix(".damaged.pt"))
        say(f"{error}: it is checkpoint.damaged.pt now, and checkpoint.previous.pt takes its place")
        return state


def restore(run, state):
    """Put a checkpoint's state into `run`, and say what has changed. Raises ValueError if the networks are others."""
    try:
        then, now, trainer = state["settings"], values(), run.trainer
        for name in NETWORK_SETTINGS:
            if then[name] != now[name]:
                raise ValueError(f"{name} is {now[name]}, and the run in {OUTPUT_DIR} has {then[name]}; set it back "
                                 "or choose another OUTPUT_DIR")
        changed = [name for name in now if then[name] != now[name]]
        epoch, step, interval = (COUNT.check(name, state[name]) for name in ("epoch", "step", "interval"))
        for name, network in trainer.networks.items():
            network.load_state_dict(state[name])
        for optimizer, saved in zip(trainer.optimizers, state["optimizers"], strict=True):
            restore_optimizer(optimizer, saved["state"])
        for scaler, saved in zip(trainer.scalers, state["scalers"], strict=True):
            if saved and scaler.is_enabled():
                scaler.load_state_dict(saved)
        run.fixed_noise.copy_(state["fixed_noise"])
        rows = [[*map(int, row[:3]), *map(float, row[3:8])] for row in state["rows"]]
        same_order = state["data"] == run.data_key and not set(ORDER_SETTINGS) & set(changed)
        if not same_order:
            rows, step, interval = [row for row in rows if row[0] <= epoch], 0, 0
        elif step:
            trainer.totals.copy_(torch.tensor(state["totals"]))
        trainer.images, run.epoch, run.step, run.interval, run.rows = state["images"], epoch, step, interval, rows
    except (KeyError, TypeError, RuntimeError, AttributeError, IndexError, OverflowError) as error:
        raise ValueError(f"the checkpoint in {OUTPUT_DIR} is not whole ({one_line(error)}); move it away") from None
    if changed:
        say("changed since the checkpoint: " + ", ".join(f"{name} {then[name]} -> {now[name]}" for name in changed))
    if state["step"] and not same_order:
        say(f"the order of the images has changed: epoch {run.epoch + 1} begins again")
    say(f"going on from {OUTPUT_DIR}/checkpoint.pt: epoch {run.epoch + 1}, step {run.step + 1}")


def restore_optimizer(optimizer, saved):
    """Load the moments alone, in the weights' memory format: the groups would bring the old learning rate back too."""
    optimizer.load_state_dict({"state": saved, "param_groups": optimizer.state_dict()["param_groups"]})
    for parameter, moments in optimizer.state.items():
        for name in ("exp_avg", "exp_avg_sq"):
            moments[name] = torch.empty_like(parameter).copy_(moments[name])
        moments["step"] = moments["step"].reshape(())


# ------------------------------------------------------------------------------------------------------- pictures

COLUMNS = ("epoch", "step", "images", "loss_d", "loss_g", "d_real", "d_fake", "images_per_second")
GIF_BYTES = 3_000_000


def grid(images, columns=8):
    """Images (N, 3, H, W) in [0, 1] as one PIL picture."""
    return to_pil_image(make_grid(images.float().cpu().clamp(0, 1), columns))


def save_gif(pictures, path, duration):
    """A film that begins anew at its end, of PIL pictures shown for `duration` ms."""
    options = {"save_all": True, "append_images": pictures[1:], "loop": 0, "duration": duration}
    write_file(path, lambda file: pictures[0].save(file, "GIF", **options))


@contextlib.contextmanager
def figure_file(name, width, height):
    """A matplotlib figure to draw on, then saved in OUTPUT_DIR; without pyplot, so that no window takes part."""
    module = os.environ.get("MPLBACKEND", "").partition("module://")[2]
    if module and not importlib.util.find_spec(module.partition(".")[0]):
        del os.environ["MPLBACKEND"]  # a script that Colab starts inherits one that it cannot import
    from matplotlib.figure import Figure

    figure = Figure((width, height), layout="constrained")
    yield figure
    write_file(Path(OUTPUT_DIR) / name, lambda file: figure.savefig(file, format="png"))


def draw_pictures(run, reals, fakes):
    """losses.png, real_vs_fake.png and training.gif of the whole run so far; images (64, 3, S, S) in [0, 1]."""
    draw_losses(run.rows)
    with figure_file("real_vs_fake.png", 11, 6) as figure:
        titles = ("real", f"generated, after {run.epoch} epochs")
        for axes, title, images in zip(figure.subplots(1, 2), titles, (reals, fakes)):
            axes.imshow(grid(images))
            axes.set_title(title)
            axes.axis("off")
    draw_film(run.epoch)


def draw_losses(rows):
    """losses.png from the rows of metrics.csv: raw values pale, their running mean over them."""
    steps = {row[0]: row[1] for row in rows}  # in each epoch
    epochs = [row[0] - 1 + row[1] / max(steps.values()) for row in rows]
    window = len(rows) // 100 * 2 + 1  # odd, to be centred
    with figure_file("losses.png", 9, 7) as figure:
        upper, lower = figure.subplots(2, 1, sharex=True)
        for index, label in enumerate(("discriminator", "generator", "D(x), of real images", "D(G(z)), of fakes")):
            axes, raw = (upper, lower)[index // 2], torch.tensor([row[3 + index] for row in rows], dtype=torch.float64)
            mean = F.avg_pool1d(raw[None], window, 1, window // 2, count_include_pad=False)[0]
            axes.plot(epochs, raw, color=f"C{index}", alpha=0.25, linewidth=0.8)
            axes.plot(epochs, mean, color=f"C{index}", label=label)
        late = [max(row[3:5]) for row in rows[len(rows) // 20 :]]  # the first steps' losses would dwarf the rest
        upper.set(ylabel="loss", ylim=(0, 1.1 * max(late) + 0.1),
                  title="healthy: both wander; a slowly rising generator loss is no failure")
        lower.set(ylabel='probability of "real"', ylim=(-0.02, 1.02), xlabel="epoch",
                  title="healthy: apart, but not stuck at 1 and 0, where the discriminator has won")
        for axes in (upper, lower):
            axes.legend(fontsize=9)
            axes.grid(alpha=0.2)


def draw_film(epochs):
    """training.gif: 25 faces of the grids in samples/, up to `epochs`, in at most 60 frames and 3 MB."""
    paths = [Path(OUTPUT_DIR) / f"samples/epoch_{epoch:03d}.png" for epoch in range(epochs + 1)]
    if paths := [path for path in paths if path.exists()]:
        largest = io.BytesIO()
        film_frame(paths[-1]).save(largest, "GIF")
        most = max(2, min(60, GIF_BYTES // largest.tell()))
        chosen = sorted({round(index * (len(paths) - 1) / (most - 1)) for index in range(most)})
        times = [max(60, 3000 // len(chosen))] * (len(chosen) - 1) + [2500]
        save_gif([film_frame(paths[index]) for index in chosen], Path(OUTPUT_DIR) / "training.gif", times)


def film_frame(path):
    """25 faces cut from a grid's file, the epoch written below them."""
    frame = Image.new("RGB", (332, 352), "white")
    with Image.open(path) as picture:
        side = round((picture.width - 2) * 5 / 8) + 2
        frame.paste(picture.convert("RGB").resize((332, 332), Image.Resampling.BILINEAR, (0, 0, side, side)))
    ImageDraw.Draw(frame).text((8, 336), f"epoch {int(path.stem[6:])}", "black")
    return frame.quantize(128, dither=Image.Dither.NONE)


def advice(rows, diversity):
    """Lines on what goes wrong, from an epoch's rows and the diversity of its fakes as a share of the reals'."""
    d_real, d_fake = (sum(row[column] for row in rows) / len(rows) for column in (5, 6))
    if d_real > 0.97 and d_fake < 0.03:
        yield (f"the discriminator has won: D(x) is {d_real:.3f} and D(G(z)) {d_fake:.3f} on average, so the generator "
               "learns little; lower D_LEARNING_RATE, or set BETA1 to 0.5 or REAL_LABEL to 0.9")
    if diversity < 0.3:
        yield (f"the samples look alike (mode collapse): their diversity is {diversity:.2f} of the real images'; "
               "lower LEARNING_RATE, raise BATCH_SIZE or try another SEED")


def diversity(images):
    """How much images (N, 3, H, W) differ: their standard deviation, averaged over 8 × 8 patches."""
    return F.adaptive_avg_pool2d(images.float(), 8).std(0).mean().item()


# ------------------------------------------------------------------------------------------------------- training


class Signals:
    """Within `with`, Ctrl-C, SIGTERM and SIGHUP raise KeyboardInterrupt(signum); while `deferred` the first one sets
    `pending` instead."""

    def __init__(self):
        self.pending, self.deferred, self.before = None, False, {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for name in ("SIGINT", "SIGTERM", "SIGHUP"):
                signum = getattr(signal, name, None)  # Windows has no SIGHUP, and nohup has it ignored
                if signum and signal.getsignal(signum) is not signal.SIG_IGN:
                    self.before[signum] = signal.signal(signum, self.handle)
        return self

    def __exit__(self, *exception):
        for signum, handler in self.before.items():
            signal.signal(signum, handler)

    def handle(self, signum, frame):
        if not self.deferred or (self.pending and signum == signal.SIGINT):
            raise KeyboardInterrupt(signum)
        self.pending = self.pending or signum


class Run:
    """Where a run stands: its Trainer, `epoch` whole epochs, `step` steps of the next one, and what it reports."""

    def __init__(self, trainer, data_key):
        self.trainer, self.data_key = trainer, data_key
        self.epoch = self.step = self.interval = 0  # interval: steps since the last row
        self.rows, self.saved, self.drawn, self.estimated = [], time.monotonic(), -math.inf, False
        stream = torch.Generator().manual_seed(seed_for("samples"))
        self.fixed_noise = torch.randn(64, LATENT_SIZE, 1, 1, generator=stream).to(trainer.device)

    def sample(self):
        """Images (64, 3, S, S) in [0, 1] of noise that stays the same for the whole run; an epoch's are saved."""
        fakes = images_from(self.trainer.average, self.fixed_noise, self.trainer.dtype)
        if RANK == 0 and self.step == 0:
            path = Path(OUTPUT_DIR) / f"samples/epoch_{self.epoch:03d}.png"
            write_file(path, lambda file: grid(fakes).save(file, "PNG"))
        return fakes

    def log(self, speed):
        """End an interval: return its means as a row, kept and appended to metrics.csv."""
        means = self.trainer.fetch(self.interval)
        if not all(map(math.isfinite, means)):
            steps = f"epoch {self.epoch + 1}, steps {self.step - self.interval + 1} to {self.step}"
            losses = f"loss_d {means[0]}, loss_g {means[1]}"
            raise FloatingPointError(f"a loss is not finite in {steps} ({losses}); {NOT_FINITE}")
        row = [self.epoch + 1, self.step, self.trainer.images, *means, speed]
        self.rows.append(row)
        self.interval = 0
        if RANK == 0:
            with open(Path(OUTPUT_DIR) / "metrics.csv", "ab") as file:
                file.write(csv_lines([row]))
        return row


def csv_lines(rows):
    cells = ([f"{value:.6g}" if isinstance(value, float) else str(value) for value in row] for row in rows)
    return "".join(",".join(row) + "\n" for row in cells).encode()


def train():
    """Train on DATA_DIR, or go on from OUTPUT_DIR/checkpoint.pt, and return the path of the trained generator. Raises
    ValueError for a wrong setting or data set, OSError for network and disk, FloatingPointError for a loss that is not
    finite and, when the work is saved, KeyboardInterrupt."""
    check_settings()
    output, state = Path(OUTPUT_DIR), None
    with Signals() as signals, contextlib.ExitStack() as stack:
        if RANK == 0:
            stack.enter_context(locked(output / ".lock"))
            state = newest_checkpoint()
        if state and state["epoch"] >= EPOCHS and WORLD_SIZE == 1:
            say(f"{output} holds a finished run of {state['epoch']} epochs; raise EPOCHS to go on, or choose another "
                "OUTPUT_DIR to start afresh")
            return output / "generator.pt"
        faces, key = prepare_data()
        device, dtype = pick_device()
        if WORLD_SIZE > 1:
            state, key = join_processes(state, key, len(faces), device)
        batches, run = Batches(faces, device), Run(Trainer(device, dtype), key)
        announce(run, batches)
        if state:
            restore(run, state)
        if RANK == 0:  # anew: what came after the checkpoint will be trained again
            write_file(output / "metrics.csv", lambda file: file.write(csv_lines([COLUMNS, *run.rows])))
        if not state:
            run.sample()
        chosen = torch.randperm(len(faces), generator=torch.Generator().manual_seed(seed_for("reals")))[:64]
        reals = faces.index_select(0, chosen).float() / 255
        while run.epoch < EPOCHS:
            train_epoch(run, batches, reals, signals)
        if WORLD_SIZE > 1:
            torch.distributed.destroy_process_group()
    say(f"finished; see {output}/samples, and draw new faces: python dcgan.py generate --output-dir {output}")
    return output / "generator.pt"


def join_processes(state, key, images, device):
    """Meet the other processes that torchrun has started; return rank 0's checkpoint and data key, on all of them. The
    time limit is long since another machine may still be decoding; torchrun is who notices when a process dies."""
    backend, limit = "nccl" if device.type == "cuda" else "gloo", timedelta(days=1)
    # torchrun --max-restarts keeps its store, with the addresses of the dead: a new name for each start. Not over
    # several machines, which may count the restarts differently.
    store = next(torch.distributed.rendezvous("env://", timeout=limit))[0]
    alone = os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]
    store = torch.distributed.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "") if alone else "", store)
    torch.distributed.init_process_group(backend, store=store, rank=RANK, world_size=WORLD_SIZE, timeout=limit)
    counts = [None] * WORLD_SIZE
    torch.distributed.all_gather_object(counts, images)
    if len(set(counts)) > 1:
        raise ValueError(f"the machines have different images: {', '.join(map(str, counts))}; copy DATA_DIR to all")
    shared = [state, key]  # the key covers times of change, which differ between machines
    torch.distributed.broadcast_object_list(shared, device=device)
    return shared


def announce(run, batches):
    """The first lines: on what it runs, with what."""
    device, gpus = run.trainer.device, torch.cuda.device_count()
    where = f"{device.type.upper()}, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        where = f"{torch.cuda.get_device_name(device)}, images on {'it' if batches.faces.is_cuda else 'disk'}"
    many = f" × {WORLD_SIZE} processes" if WORLD_SIZE > 1 else ""
    dtype = str(run.trainer.dtype).removeprefix("torch.")
    say(f"{where}{many}, {dtype}; {batches.count:,} images, {batches.steps:,} steps an epoch, {EPOCHS} epochs")
    if device.type == "cuda" and WORLD_SIZE == 1 and gpus > 1:
        say(f"of {gpus} GPUs this run uses one; torchrun --nproc-per-node {gpus} dcgan.py uses them all")


def train_epoch(run, batches, reals, signals):
    """The rest of an epoch, then samples, checkpoint, pictures and advice. Raises KeyboardInterrupt after a signal."""
    signals.deferred = True
    whole = train_steps(run, batches, signals)
    if whole:
        run.epoch, run.step = run.epoch + 1, 0
    fakes = run.sample()
    save_checkpoint(run, whole)
    last = run.epoch == EPOCHS or not whole
    if RANK == 0 and run.rows and (last or time.monotonic() - run.drawn > 30):
        draw_pictures(run, reals, fakes)
        run.drawn = time.monotonic()
    if not whole:
        say(f"saved after step {run.step} of epoch {run.epoch + 1}; the same command goes on from there")
        raise KeyboardInterrupt(signals.pending)
    if not sys.stderr.isatty():
        say(f"epoch {run.epoch}/{EPOCHS}: {summary(run.rows[-1])}")
    if run.trainer.images > 10_000:  # before that, nothing is amiss yet
        rows = [row for row in run.rows if row[0] == run.epoch]
        for line in advice(rows, diversity(fakes) / (diversity(reals) or 1)):
            say(f"after epoch {run.epoch}, {line}")


def train_steps(run, batches, signals):
    """The steps that an epoch still has. Returns whether it is whole: a signal ends it early."""
    spoken, began, since = time.monotonic(), time.perf_counter(), run.step
    bar = progress_bar(total=batches.steps, desc=f"epoch {run.epoch + 1}/{EPOCHS}", initial=run.step, unit=" steps")
    with bar:
        for batch in batches.epoch(run.epoch, run.step):
            run.trainer.advance(*batch)
            run.step, run.interval, row = run.step + 1, run.interval + 1, None
            ended = run.step == batches.steps
            if ended or run.step % LOG_EVERY == 0:
                row = run.log((run.step - since) * BATCH_SIZE / (time.perf_counter() - began))
                began, since = time.perf_counter(), run.step
                if bar.disable and time.monotonic() - spoken > 60:
                    say(f"epoch {row[0]}/{EPOCHS}, step {row[1]}/{batches.steps}: {summary(row)}")
                    spoken = time.monotonic()
                if not run.estimated:
                    run.estimated = True
                    minutes = math.ceil(((EPOCHS - run.epoch) * batches.steps - run.step) * BATCH_SIZE / row[7] / 60)
                    say(f"the run will take about {f'{minutes} min' if minutes < 100 else f'{minutes / 60:.1f} h'}")
            if stop_now(run, signals, row) and not ended:
                return False
            with contextlib.suppress(OSError):  # the terminal may be gone
                bar.update()
                if row:
                    bar.set_postfix_str(summary(row))
            if time.monotonic() - run.saved > 60 * CHECKPOINT_MINUTES and not ended:
                save_checkpoint(run, whole_epoch=False)
    return True


def summary(row):
    return f"loss_d {row[3]:.3f}, loss_g {row[4]:.3f}, D(x) {row[5]:.3f}, D(G(z)) {row[6]:.3f}, {row[7]:,.0f} images/s"


def stop_now(run, signals, row):
    """Whether a signal has come. Several processes agree on it, to stop after the same step: on a GPU, which would
    have to be waited for, only when an interval ends."""
    agree = WORLD_SIZE == 1 or row or run.trainer.device.type == "cpu"
    if WORLD_SIZE > 1 and agree:
        pending = torch.tensor(signals.pending or 0, device=run.trainer.device)
        torch.distributed.all_reduce(pending, torch.distributed.ReduceOp.MAX)
        signals.pending = pending.item() or None
    return bool(agree and signals.pending)


# --------------------------------------------------------------------------------------- using a trained generator

GENERATION_BATCH = 64  # always so many at once, so that an image does not depend on how many were asked for
GRID_LIMIT = 1_024  # images
LEAST_IMAGES = 2_048  # of fewer, an estimate of FID is no number
INCEPTION_URL = "https://github.com/toshas/torch-fidelity/releases, weights-inception-2015-12-05-6726825d.pth"


@torch.no_grad()
def images_from(generator, latents, dtype):
    """Images in [0, 1] (N, 3, H, W), float32, on the device of `latents` (N, z, 1, 1)."""
    latents = latents.contiguous(memory_format=torch.channels_last)
    with torch.autocast(latents.device.type, dtype, enabled=dtype != torch.float32):
        images = generator(latents)
    return images.float().add(1).div(2).clamp(0, 1)


class Faces:
    """The averaged generator of a checkpoint file, or of OUTPUT_DIR's newest, ready to draw; `state` is the file's."""

    def __init__(self, checkpoint=None):
        check_settings()
        if checkpoint is None:
            paths = [Path(OUTPUT_DIR) / name for name in ("checkpoint.pt", "checkpoint.previous.pt", "generator.pt")]
            checkpoint = next((path for path in paths if path.exists()), None)
            if checkpoint is None:
                raise ValueError(f"no checkpoint in OUTPUT_DIR ({OUTPUT_DIR}); train first, or give the file of one")
        self.state = read_checkpoint(checkpoint)
        self.device, self.dtype = pick_device()
        self.generator = build_generator(self.state).to(self.device, memory_format=torch.channels_last)

    def latents(self, number, seed):
        """A stream of noise (z,) for a seed, in batches on the CPU; None draws a seed and prints it."""
        if seed is None:
            seed = random.SystemRandom().randrange(10**6)
            say(f"seed {seed}")
        stream = torch.Generator().manual_seed(SETTINGS["SEED"].check("seed", seed))
        for _ in range(0, number, GENERATION_BATCH):
            yield torch.randn(GENERATION_BATCH, self.state["settings"]["LATENT_SIZE"], generator=stream)

    def draw(self, latents):
        """Images (N, 3, H, W) in [0, 1], on the CPU, of noise (N, z)."""
        return images_from(self.generator, latents[:, :, None, None].to(self.device), self.dtype).cpu()

    def batches(self, number, seed):
        """Yield `number` new images in batches of at most GENERATION_BATCH."""
        with progress_bar(total=number, desc="generating", unit=" images") as bar:
            for left, latents in zip(range(number, 0, -GENERATION_BATCH), self.latents(number, seed)):
                yield self.draw(latents)[:left]
                bar.update(min(GENERATION_BATCH, left))


def generate_images(num_images=16, seed=None, checkpoint=None, output=None):
    """New faces as a float tensor (num_images, 3, H, W) in [0, 1]; saved as a grid, and shown in a notebook. The same
    seed gives the same images on a device, and more images begin with the same ones; a seed of None is drawn and
    printed. `checkpoint` is a checkpoint.pt or generator.pt, by default OUTPUT_DIR's; the grid, of the first 1,024,
    goes to `output`, by default OUTPUT_DIR/generated.png. Raises ValueError for a wrong number, seed or file."""
    number = Setting(int, 1, 10**9).check("num_images", num_images)
    images = torch.cat(list(Faces(checkpoint).batches(number, seed)))
    save_grid(images[:GRID_LIMIT], output)
    return images


def save_grid(images, output):
    """Save images (N, 3, H, W) as a nearly square grid, and show it where there is a notebook."""
    picture, path = grid(images, math.ceil(math.sqrt(len(images)))), Path(output or Path(OUTPUT_DIR) / "generated.png")
    write_file(path, lambda file: picture.save(file, "PNG"))
    say(f"saved {path}")
    if notebook():
        from IPython.display import display

        display(picture)


def generate(num_images: int = 16, seed: int = None, checkpoint=None, output=None, individual=False):
    """Draw new faces into a grid or, with --individual and beyond 1,024, a file each."""
    number, faces, grid_of = Setting(int, 1, 10**9).check("num_images", num_images), Faces(checkpoint), []
    files, folder = individual or number > GRID_LIMIT, Path(individual and output or Path(OUTPUT_DIR) / "generated")
    if files:
        folder.mkdir(parents=True, exist_ok=True)
    for index, image in enumerate(image for images in faces.batches(number, seed) for image in images):
        if files:
            to_pil_image(image).save(folder / f"{index:06d}.png")
        if not individual and index < GRID_LIMIT:
            grid_of.append(image)
    if files:
        say(f"saved {number:,} images in {folder}")
    if grid_of:
        save_grid(torch.stack(grid_of), output)


def interpolate(num_faces: int = 8, frames: int = 16, seed: int = None, checkpoint=None, output=None):
    """Save a looping GIF that walks between new faces, `frames` pictures from each to the next; return its path.

    It walks on the sphere on which Gaussian noise of many dimensions lies: a straight line would leave it.
    """
    number = Setting(int, 2, 1_000).check("num_faces", num_faces)
    frames = Setting(int, 1, 1_000).check("frames", frames)
    faces = Faces(checkpoint)
    corners = torch.cat(list(faces.latents(number, seed)))[:number]
    corners = F.normalize(corners) * math.sqrt(corners.shape[1])
    angle = F.cosine_similarity(corners, corners.roll(-1, 0)).clamp(-1 + 1e-6, 1 - 1e-6).acos().view(-1, 1, 1)
    share = torch.arange(frames).div(frames).view(1, -1, 1)
    walk = (torch.sin((1 - share) * angle) * corners.unsqueeze(1)
            + torch.sin(share * angle) * corners.roll(-1, 0).unsqueeze(1)) / torch.sin(angle)
    pictures = []
    for latents in walk.flatten(0, 1).split(GENERATION_BATCH):
        pictures += [ImageOps.scale(to_pil_image(image), 2) for image in faces.draw(latents)]
    path = Path(output or Path(OUTPUT_DIR) / "interpolation.gif")
    save_gif(pictures, path, 60)
    say(f"saved {path}")
    return path


def evaluate(num_images: int = 50_000, checkpoint=None, inception_weights=None, seed: int = 0):
    """FID and KID, lower is better, of new faces against DATA_DIR's: {"fid": …, "kid": …}, appended to evaluation.csv.

    FID: Heusel et al. 2017; KID: Bińkowski et al. 2018; with torch-fidelity's Inception, the one that papers use.
    """
    number = Setting(int, LEAST_IMAGES, 10**6).check("num_images", num_images)
    faces = Faces(checkpoint)
    inception = load_inception(inception_weights, faces.device)
    with changed_settings({"IMAGE_SIZE": faces.state["settings"]["IMAGE_SIZE"]}):
        images, key = prepare_data()
    if len(images) < LEAST_IMAGES:
        raise ValueError(f"DATA_DIR ({DATA_DIR}) holds {len(images):,} images; FID wants {LEAST_IMAGES:,} or more")
    if min(number, len(images)) < 10_000:
        say(f"{number:,} generated and {len(images):,} real images; under 10,000, FID is too high; papers use 50,000")
    chosen = torch.linspace(0, len(images) - 1, min(len(images), 50_000)).long()
    weights = inception_weights and hashlib.sha256(Path(inception_weights).read_bytes()).hexdigest()[:8] or "2015-12-05"
    cached = Path(CACHE_DIR) / f"inception-{key[:16]}-{len(chosen)}-{weights}.pt"
    try:
        real = read_zip(cached)
    except (OSError, ValueError):
        real = (images[part] for part in chosen.split(GENERATION_BATCH))
        real = features(inception, real, len(chosen), faces.device)
        write_file(cached, lambda file: torch.save(real, file))
    drawn = (batch.mul(255).round().byte() for batch in faces.batches(number, seed))
    result = distances(features(inception, drawn, number, faces.device), real)
    about = {"epoch": faces.state["epoch"], "generated": number, "real": len(chosen), "size": images.shape[-1],
             "crop": "centre square", "network": f"inception-v3-compat {weights}"}
    path = Path(OUTPUT_DIR) / "evaluation.csv"
    before = path.read_bytes() if path.exists() else csv_lines([[*about, *result]])
    write_file(path, lambda file: file.write(before + csv_lines([[*about.values(), *result.values()]])))
    about = ", ".join(f"{name} {value}" for name, value in about.items())
    say(f"FID {result['fid']:.2f}, KID {result['kid']:.5f} ({about})")
    return result


def load_inception(weights, device):
    """torch-fidelity's Inception. Raises OSError if it or its weights are not to be had, ValueError if they are not."""
    try:
        from torch_fidelity.utils import create_feature_extractor
    except ImportError as error:
        raise OSError(f"evaluate needs torch-fidelity (no module {error.name}): pip install torch-fidelity") from None
    if weights and not Path(weights).is_file():
        raise ValueError(f"there is no file {weights}")
    try:
        if weights:
            torch.load(weights, map_location="cpu", weights_only=True)  # torch-fidelity itself would run what is in it
        options = {"cuda": False, "verbose": False, "feature_extractor_weights_path": weights}
        return create_feature_extractor("inception-v3-compat", ["2048"], **options).to(device)
    except OSError as error:
        raise OSError(f"no Inception weights ({error}); give --inception-weights FILE, from {INCEPTION_URL}") from None
    except Exception as error:
        raise ValueError(f"{weights} holds no weights of torch-fidelity's Inception ({one_line(error)})") from None


@torch.no_grad()
def features(inception, batches, number, device):
    """Inception's 2,048 features of uint8 images, (number, 2048), float32, on the CPU."""
    found = []
    with progress_bar(total=number, desc="Inception features", unit=" images") as bar:
        for batch in batches:
            found.append(inception(batch.to(device))[0].cpu())
            bar.update(len(batch))
    return torch.cat(found)


def distances(fake, real):
    """{"fid": …, "kid": …} between two sets of features (N, 2048)."""
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric

    fid = fid_statistics_to_metric(*map(fid_features_to_statistics, (fake, real)), verbose=False)
    kid = kid_features_to_metric(fake, real, verbose=False)
    return {"fid": float(fid["frechet_inception_distance"]), "kid": float(kid["kernel_inception_distance_mean"])}


# --------------------------------------------------------------------------------------------------- command line

FLAG_HELP = {
    "num_images": "how many", "num_faces": "how many", "frames": "pictures from one face to the next",
    "seed": "the same seed draws the same faces; without, one is drawn and printed",
    "checkpoint": "a checkpoint.pt or generator.pt, instead of OUTPUT_DIR's", "output": "where to save, instead",
    "individual": "a PNG an image: 000000.png ...", "inception_weights": "a file, instead of a download",
}


class Parser(argparse.ArgumentParser):
    """argparse's, but an error is a ValueError of one line."""

    def error(self, message):
        raise ValueError(f"{one_line(message)}; see {self.prog} --help")


def command_line():
    """(parser, names of all flags): a flag for each setting, and the commands with those of their function."""
    options = {"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter}
    about = __doc__.split("\n\nThe method")[0]
    parser = Parser("dcgan.py", usage="dcgan.py [command] [flags]", description=about, **options)
    parser.add_argument("--demo", action="store_true", help="train on faces that the script draws itself, in minutes")
    commands = parser.add_subparsers(title="commands, in place of training", metavar="command",
                                     prog="dcgan.py", parser_class=Parser)
    for function in (generate, interpolate, evaluate):
        about = inspect.getdoc(function)
        command = commands.add_parser(function.__name__, help=about.splitlines()[0], description=about, **options)
        command.set_defaults(function=function)
        for name, parameter in inspect.signature(function).parameters.items():
            kind = {"type": int, "metavar": "N"} if parameter.annotation is int else {"metavar": "PATH"}
            kind = {"action": "store_true"} if parameter.default is False else kind
            text = FLAG_HELP[name] + f" [{parameter.default}]" * (type(parameter.default) is int)
            command.add_argument(flag(name), default=argparse.SUPPRESS, help=text, **kind)
        data = ("DATA_DIR", "CACHE_DIR", "MAX_IMAGES", "WORKERS") if function is evaluate else ()
        add_settings(command, ("OUTPUT_DIR", "DEVICE", "PRECISION", *data))
    add_settings(parser, SETTINGS)
    helps = [one.format_help() for one in (parser, *commands.choices.values())]
    return parser, set(re.findall(r"--[a-z0-9-]+", " ".join(helps)))


def add_settings(parser, names):
    """Give `parser` the flags of these settings; their lines at the top of this file are groups and help."""
    group, title = None, ""
    for line in Path(__file__).read_text(encoding="utf-8").splitlines():
        if found := re.fullmatch(r"# (\w+)", line):
            group, title = None, found[1].lower()
        elif (found := re.match(r"(\w+): Setting.* = .*?  # (.*)", line)) and found[1] in names:
            group = group or parser.add_argument_group(title)
            setting, default = SETTINGS[found[1]], globals()[found[1]]
            text = found[2] + f"; {setting.allowed()}" * (setting.kind is not str and not setting.choices)
            text = (text + f" [{default}]" * (default is not None)).replace("%", "%%")
            metavar = "|".join(map(str, setting.choices)) or {int: "N", float: "X", str: "TEXT"}[setting.kind]
            group.add_argument(flag(found[1]), dest=found[1], default=argparse.SUPPRESS, metavar=metavar, help=text)


def main(argv=None):
    """The command line. Returns the exit status: 0, 1 for a failure, 2 for a wrong call, 128 and more for a signal."""
    try:
        argv = sys.argv[1:] if argv is None else argv
        parser, known = command_line()
        for name in (text.split("=")[0] for text in argv if text.startswith("--")):
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                parser.error(f"unknown flag {name}" + (f", did you mean {near[0]}?" if near else ""))
        options = vars(parser.parse_args(argv))
        flags = {name: options.pop(name) for name in SETTINGS if name in options}
        with changed_settings((DEMO if options.pop("demo") else {}) | flags):
            options.pop("function", train)(**options)
        return 0
    except KeyboardInterrupt as interrupt:
        return 128 + (interrupt.args or [signal.SIGINT])[0]
    except (ValueError, OSError, FloatingPointError) as error:
        status = 2 if isinstance(error, ValueError) else 1
        text = f"{error.strerror}: {error.filename}" if getattr(error, "filename", None) else error
    except ImportError as error:
        status, text = 1, f"the module {error.name or error} is missing: pip install -r requirements.txt"
    except RuntimeError as error:  # of PyTorch; any other than these two is a bug
        status, text = 1, f"out of memory ({one_line(error)}); lower BATCH_SIZE"
        if "memory" not in str(error):
            text = f"process {RANK} has lost the others ({one_line(error)})"
            if WORLD_SIZE == 1 or not re.search("gloo|nccl|connect|peer", str(error), re.IGNORECASE):
                raise
    print(f"dcgan.py: error: {text}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
