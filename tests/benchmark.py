"""How fast dcgan.py trains, beside the usual public DCGAN script, on the same images.

    python tests/benchmark.py [FOLDER]      # FOLDER of images; without: faces that dcgan.py draws
    python tests/benchmark.py --image-size 32 64 128 256 --processes 1,2     # more tables
    python tests/benchmark.py --rounds 0 --decode --scale --generation       # and more

Both are measured in turn, warm, for several rounds; the figures are medians over the rounds.
"""

import argparse
import itertools
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
import torchvision
from PIL import Image
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dcgan  # noqa: E402

CELEBA = 202_599  # images
USUAL_STEPS = [transforms.Resize(64), transforms.CenterCrop(64), transforms.ToTensor()]
USUAL_STEPS += [transforms.Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))]
USUAL_TRANSFORM = transforms.Compose(USUAL_STEPS)


def usual_networks():
    """The two networks of the usual public script at 64 pixels, with Sigmoid."""
    net_g = [nn.ConvTranspose2d(100, 512, 4, 1, 0, bias=False), nn.BatchNorm2d(512), nn.ReLU(True)]
    for n in (512, 256, 128):
        up = nn.ConvTranspose2d(n, n // 2, 4, 2, 1, bias=False)
        net_g += [up, nn.BatchNorm2d(n // 2), nn.ReLU(True)]
    net_g += [nn.ConvTranspose2d(64, 3, 4, 2, 1, bias=False), nn.Tanh()]
    net_d = [nn.Conv2d(3, 64, 4, 2, 1, bias=False), nn.LeakyReLU(0.2, True)]
    for n in (64, 128, 256):
        down = nn.Conv2d(n, n * 2, 4, 2, 1, bias=False)
        net_d += [down, nn.BatchNorm2d(n * 2), nn.LeakyReLU(0.2, True)]
    net_d += [nn.Conv2d(512, 1, 4, 1, 0, bias=False), nn.Sigmoid()]
    return nn.Sequential(*net_g), nn.Sequential(*net_d)


def usual_weights(module):
    if "Conv" in type(module).__name__:
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif "BatchNorm" in type(module).__name__:
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


def usual(folder, device):
    """The usual public script, a step at a time: BCELoss, float32, JPEGs decoded every time."""
    with tempfile.TemporaryDirectory() as root:
        # ImageFolder wants a folder for each class.
        os.symlink(Path(folder).resolve(), Path(root) / "faces")
        dataset = torchvision.datasets.ImageFolder(root, USUAL_TRANSFORM)
        samples = dataset.samples[: dcgan.MAX_IMAGES]
        # As long an epoch as CelebA's: starting the workers weighs no more than it does there.
        dataset.samples = samples * -(-CELEBA // len(samples))
        options = {"shuffle": True, "num_workers": 2, "drop_last": True}
        loader = torch.utils.data.DataLoader(dataset, dcgan.BATCH_SIZE, **options)
        net_g, net_d = (network.to(device).apply(usual_weights) for network in usual_networks())
        optimizer_g = torch.optim.Adam(net_g.parameters(), lr=2e-4, betas=(0.5, 0.999))
        optimizer_d = torch.optim.Adam(net_d.parameters(), lr=2e-4, betas=(0.5, 0.999))
        criterion = nn.BCELoss()
        while True:
            for images, _ in loader:
                net_d.zero_grad()
                images = images.to(device)
                label = torch.full((len(images),), 1.0, device=device)
                loss_real = criterion(net_d(images).view(-1), label)
                loss_real.backward()
                fake = net_g(torch.randn(len(images), 100, 1, 1, device=device))
                loss_fake = criterion(net_d(fake.detach()).view(-1), label.fill_(0.0))
                loss_fake.backward()
                optimizer_d.step()
                net_g.zero_grad()
                loss_g = criterion(net_d(fake).view(-1), label.fill_(1.0))
                loss_g.backward()
                optimizer_g.step()
                yield loss_real.item() + loss_fake.item(), loss_g.item()


def ours(images, device, dtype):
    """dcgan.py's training, a step at a time, its metrics fetched as often as in a real run."""
    batches, trainer = dcgan.Batches(images, device), dcgan.Trainer(device, dtype)
    for epoch in itertools.count():
        for step, batch in enumerate(batches.epoch(epoch), 1):
            trainer.advance(*batch)
            if step % dcgan.LOG_EVERY == 0:
                trainer.take_means()
            yield


def speed(stepper, steps, device):
    """Images a second over `steps` steps, after some to warm up."""
    for _ in range(max(2, steps // 5)):
        next(stepper)
    synchronize(device)
    began = time.perf_counter()
    for _ in range(steps):
        next(stepper)
    synchronize(device)
    return steps * dcgan.BATCH_SIZE / (time.perf_counter() - began)


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device):
    """MiB: what PyTorch took of the GPU, or the process's largest resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def anonymous_memory():
    """MiB that belong to this process alone, so without mapped files."""
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) / 2**10


class Calls(TorchDispatchMode):
    """Counts the aten calls that compute something. On a GPU, each launches a kernel or more."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        returns = [value.alias_info for value in func._schema.returns]
        view = any(alias and not alias.is_write for alias in returns)
        computes = func.namespace == "aten" and not func.overloadpacket.__name__.startswith("empty")
        self.count += computes and not view
        return func(*args, **kwargs or {})


def cost_of_a_step(images, device, dtype):
    """The FLOP of a step without the penalty, and its aten calls."""
    batches = dcgan.Batches(images, device).epoch(0)
    trainer = dcgan.Trainer(device, dtype)
    trainer.step_on(next(batches), False)  # the optimizers make their moments
    batch = next(batches)
    with FlopCounterMode(display=False) as flops, Calls() as calls:
        trainer.step_on(batch, False)
    return flops.get_total_flops(), calls.count


def peak_flops(device, dtype):
    """FLOP a second of the best of some large matrix products."""
    side = 8192 if device.type == "cuda" else 2048
    one, two = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    best = 0
    for _ in range(8):
        synchronize(device)
        began = time.perf_counter()
        one @ two
        synchronize(device)
        best = max(best, 2 * side**3 / (time.perf_counter() - began))
    return best


def table(title, rows):
    widths = [max(len(str(row[column])) for row in rows) for column in range(len(rows[0]))]
    print(f"\n{title}")
    for first, *cells in rows:
        cells = (str(cell).rjust(width) for cell, width in zip(cells, widths[1:]))
        print("  ".join(["", str(first).ljust(widths[0]), *cells]), flush=True)


def setup():
    """(device, dtype, images) as dcgan.py's settings say."""
    device = dcgan.pick_device()
    images = dcgan.find_faces(dcgan.data_folder(), dcgan.IMAGE_SIZE).load()
    return device, dcgan.pick_dtype(device), images


def probe(options):
    """One training's first step, speed and memory, as JSON.

    In a process of its own, which has been started at `options.began`.
    """
    if options.probe == "usual":
        device = dcgan.pick_device()
        stepper = usual(dcgan.DATA_DIR, device)
    else:
        device, dtype, images = setup()
        if dcgan.WORLD_SIZE > 1:
            torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
        stepper = ours(images, device, dtype)
    next(stepper)
    synchronize(device)
    found = {"first_step": time.time() - options.began}
    found["speed"] = speed(stepper, options.steps, device)
    if Path("/proc/self/status").exists():
        found["anonymous"] = anonymous_memory()
    stepper.close()
    if dcgan.RANK == 0:
        print(json.dumps(found | {"memory": peak_memory(device)}))
    if dcgan.WORLD_SIZE > 1:
        torch.distributed.destroy_process_group()


def probed(options, kind, processes=1, **changed):
    """The figures of `probe` in a fresh process, or of several by torchrun."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    values = vars(options) | {"probe": kind, "began": time.time()} | changed
    command += [__file__, str(values["folder"])]
    for name in "images steps batch_size device cache probe began image_size".split():
        if values[name] is not None:
            command.append(f"{dcgan.flag(name)}={values[name]}")
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    return json.loads(done.stdout.strip().splitlines()[-1])


# ------------------------------------------------------------------------------------------- tables


def compare(options):
    """The main table: both scripts in turn on the same images."""
    figures = {"steps": 4, "image_size": 64}
    first, later, other = (probed(options, kind, **figures) for kind in ("ours", "ours", "usual"))
    device, dtype, images = setup()
    steppers = {"ours": ours(images, device, dtype), "usual": usual(dcgan.DATA_DIR, device)}
    speeds = {name: [] for name in steppers}
    for _ in range(options.rounds):
        for name, stepper in steppers.items():
            time.sleep(1)  # the usual script's workers fill their queues
            speeds[name].append(speed(stepper, options.steps, device))
    for stepper in steppers.values():
        stepper.close()
    one, two = (statistics.median(speeds[name]) for name in ("ours", "usual"))
    ratios = sorted(a / b for a, b in zip(speeds["ours"], speeds["usual"]))
    ranges = [f"{min(found):,.1f} to {max(found):,.1f}" for found in speeds.values()]
    flops, calls = cost_of_a_step(images, device, dtype)
    peak = peak_flops(device, dtype)
    share = f"{100 * one * flops / dcgan.BATCH_SIZE / peak:.1f} %"
    precision = str(dtype).removeprefix("torch.")
    where, kind = f"CPU, {torch.get_num_threads()} threads", "memory, main process"
    if device.type == "cuda":
        where, kind = torch.cuda.get_device_name(device), "GPU memory"
    starts = [f"{found['first_step']:.1f}" for found in (first, later, other)]
    peaks = [f"{found['memory']:,.0f}" for found in (later, other)]
    table(
        f"{where}, PyTorch {torch.__version__}; {len(images):,} images, 64 pixels, "
        f"batch {dcgan.BATCH_SIZE}, {options.rounds} rounds of {options.steps} steps",
        [
            ("", "dcgan.py", "usual", "ratio"),
            ("arithmetic", precision, "float32", ""),
            ("images/s, median", f"{one:,.1f}", f"{two:,.1f}", f"{one / two:.2f}"),
            ("  lowest to highest", *ranges, f"{ratios[0]:.2f} to {ratios[-1]:.2f}"),
            ("epoch of CelebA at that speed, s", *(f"{CELEBA / n:,.0f}" for n in (one, two)), ""),
            ("start of process to first step, the first time, s", starts[0], "", ""),
            ("start of process to first step, s", *starts[1:], ""),
            (f"peak {kind}, MiB", *peaks, ""),
            ("GFLOP an image", f"{flops / dcgan.BATCH_SIZE / 1e9:.2f}", "", ""),
            ("aten calls a step, without views", calls, "", ""),
            (f"share of {peak / 1e12:,.2f} TFLOP/s of a {precision} product", share, "", ""),
        ],
    )


def sizes(options):
    rows = [("pixels", "images/s", "peak memory, MiB")]
    for size in options.image_size:
        found = probed(options, "ours", image_size=size)
        rows.append((size, f"{found['speed']:,.1f}", f"{found['memory']:,.0f}"))
    table("dcgan.py at other sizes", rows)


def processes(options):
    rows = [("processes", "images/s")]
    for count in options.processes.split(","):
        found = probed(options, "ours", int(count), image_size=64)
        rows.append((count, f"{found['speed']:,.1f}"))
    table(f"dcgan.py by torchrun, {dcgan.BATCH_SIZE} images a step in all", rows)


def decode(options):
    """Per core: seconds are the process's own, so that a busy machine does not count."""
    torch.set_num_threads(1)
    folder = Path(dcgan.DATA_DIR)
    paths = [folder / name for name, *_ in sorted(dcgan.list_images(folder, Counter()))[:500]]
    ways = {
        "dcgan.read_face": lambda path: dcgan.read_face(path, 64),
        "the usual transform": lambda path: USUAL_TRANSFORM(Image.open(path).convert("RGB")),
    }
    speeds = {name: [] for name in ways}
    for _ in range(options.rounds + 1):
        for name, way in ways.items():
            began = time.process_time()
            for path in paths:
                way(path)
            speeds[name].append(len(paths) / (time.process_time() - began))
    medians = [(name, f"{statistics.median(found[1:]):,.0f}") for name, found in speeds.items()]
    table("JPEGs decoded a second and core", medians)


def generation(options):
    network = dcgan.Generator(dcgan.IMAGE_SIZE, dcgan.LATENT_SIZE, dcgan.G_FEATURES)
    settings = {name: getattr(dcgan, name) for name in dcgan.NETWORK_SETTINGS}
    state = {"epoch": 1, "images": 1, "average": network.state_dict(), "settings": settings}
    file = Path(options.cache) / "generator.pt"
    torch.save(state, file)
    trained = dcgan.TrainedGenerator(file)
    number = dcgan.GENERATION_BATCH * options.steps
    speeds = []
    for seed in range(options.rounds + 1):
        began = time.perf_counter()
        for _ in trained.images(number, seed):
            pass
        speeds.append(number / (time.perf_counter() - began))
    median = statistics.median(speeds[1:])
    table("generation, into the CPU's memory", [("images/s, median", f"{median:,.0f}")])


def scale(options):
    """Folders of empty files, with a cache of zeros that takes no room on the disk."""
    rows = [
        ("images", "list and open, s", "to first step, s", "cold, images/s", "warm, images/s")
        + ("batches, MiB", "run, MiB")
    ]
    dcgan.MAX_IMAGES, device = None, dcgan.pick_device()
    for count in options.scale or [10_000, 100_000, 1_000_000]:
        with tempfile.TemporaryDirectory() as place:
            dcgan.DATA_DIR, dcgan.CACHE_DIR = f"{place}/faces", f"{place}/cache"
            make_empty(count)
            began = time.perf_counter()
            images = dcgan.find_faces(dcgan.data_folder(), dcgan.IMAGE_SIZE).load()
            loaded, before = time.perf_counter() - began, anonymous_memory()
            batches, speeds = dcgan.Batches(images, device), []
            for epoch in range(12):  # the first ones still map pages in, which an epoch does once
                began = time.perf_counter()
                taken = sum(1 for _ in itertools.islice(batches.epoch(epoch), 300))
                synchronize(device)
                speeds.append(taken * dcgan.BATCH_SIZE / (time.perf_counter() - began))
            grown = anonymous_memory() - before
            changed = {"folder": dcgan.DATA_DIR, "cache": dcgan.CACHE_DIR, "images": count}
            found = probed(options, "ours", image_size=64, steps=2, **changed)
            figures = (speeds[0], speeds[-1], grown, found["anonymous"])
            times = (f"{loaded:.2f}", f"{found['first_step']:.1f}")
            rows.append((f"{count:,}", *times, *(f"{figure:,.0f}" for figure in figures)))
    table(
        "dcgan.py on many images (empty files, a cache of zeros): "
        "300 batches of an epoch, anonymous memory",
        rows,
    )


def make_empty(count):
    """Put `count` empty files into DATA_DIR, and what dcgan.py takes for their cache in place."""
    folder, size = Path(dcgan.DATA_DIR), dcgan.IMAGE_SIZE
    folder.mkdir()
    for index in range(count):
        os.close(os.open(f"{folder}/{index:07d}.jpg", os.O_CREAT))
    faces = dcgan.FaceFolder(folder, sorted(dcgan.list_images(folder, Counter())), size)
    faces.cache.parent.mkdir()
    with open(faces.cache, "wb") as file:
        faces.write_header(file, count)
        file.truncate(file.tell() + count * 3 * size**2)


# ------------------------------------------------------------------------------------- command line


def main():
    options = parse()
    with tempfile.TemporaryDirectory() as place:
        options.cache = options.cache or place
        if options.folder is None:
            options.folder = Path(place) / "faces"
            options.folder.mkdir()
            for index in range(options.images):
                face = dcgan.draw_face(random.Random(index))
                face.save(options.folder / f"{index:06d}.jpg", quality=90)
        dcgan.DATA_DIR, dcgan.CACHE_DIR = str(options.folder), str(options.cache)
        dcgan.OUTPUT_DIR, dcgan.MAX_IMAGES = place, options.images
        dcgan.BATCH_SIZE, dcgan.DEVICE = options.batch_size, options.device
        dcgan.IMAGE_SIZE = options.image_size[0] if options.probe else 64
        dcgan.check_settings()
        if options.steps is None:
            # So that each round has its share of steps with the penalty.
            penalties = 10 if dcgan.pick_device().type == "cuda" else 1
            options.steps = penalties * dcgan.R1_INTERVAL
        if options.probe:
            return probe(options)
        if options.rounds:
            compare(options)
        options.rounds = options.rounds or 3
        tables = {"image_size": sizes, "processes": processes, "decode": decode}
        tables |= {"generation": generation, "scale": scale}
        for name, more in tables.items():
            if getattr(options, name) not in (None, False):
                more(options)


def parse():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("folder", nargs="?", help="real images; default: drawn faces")
    add("--images", type=int, default=1000, help="use, or draw, so many [%(default)s]")
    add("--steps", type=int, help="steps a round [32 on a CPU, 320 on a GPU]")
    add("--rounds", type=int, default=3, help="[%(default)s]; 0: no main table")
    add("--batch-size", type=int, default=dcgan.BATCH_SIZE, help="[%(default)s]")
    add("--device", help="as dcgan.py's --device")
    add("--image-size", type=int, nargs="+", metavar="S", help="a table of these sizes")
    add("--processes", metavar="1,2", help="a table of so many processes by torchrun")
    add("--decode", action="store_true", help="a table of decoding")
    add("--generation", action="store_true", help="a table of generation")
    add("--scale", type=int, nargs="*", metavar="N", help="a table of N images [10 k to 1 M]")
    for name in ("--cache", "--probe"):
        add(name, help=argparse.SUPPRESS)
    add("--began", type=float, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
