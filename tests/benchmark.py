"""How fast dcgan.py trains, beside the usual public DCGAN script, on this machine and the same images.

    python tests/benchmark.py [FOLDER]              # FOLDER of real images; without: faces that dcgan.py draws
    python tests/benchmark.py --image-size 32 64 128 256 --processes 1,2 --decode --scale --generation   # more tables

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
from pathlib import Path

import torch
import torchvision
from torch import nn
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dcgan  # noqa: E402

CELEBA = 202_599  # images
USUAL_TRANSFORM = transforms.Compose(
    [
        transforms.Resize(64),
        transforms.CenterCrop(64),
        transforms.ToTensor(),
        transforms.Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    ]
)


def usual(folder, device):
    """The usual public script at 64 pixels, a step at a time: Sigmoid, BCELoss, float32, JPEGs decoded every time."""
    with tempfile.TemporaryDirectory() as root:
        os.symlink(Path(folder).resolve(), Path(root) / "faces")  # ImageFolder wants a folder for each class
        dataset = torchvision.datasets.ImageFolder(root, USUAL_TRANSFORM)
        dataset.samples = dataset.samples[: dcgan.MAX_IMAGES]
        # As long an epoch as CelebA's, so that starting the workers weighs no more than it does there.
        dataset.samples *= -(-CELEBA // len(dataset.samples))
        loader = torch.utils.data.DataLoader(dataset, dcgan.BATCH_SIZE, shuffle=True, num_workers=2, drop_last=True)

        def weights_init(module):
            if "Conv" in type(module).__name__:
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif "BatchNorm" in type(module).__name__:
                nn.init.normal_(module.weight, 1.0, 0.02)
                nn.init.zeros_(module.bias)

        net_g, net_d = [nn.ConvTranspose2d(100, 512, 4, 1, 0, bias=False), nn.BatchNorm2d(512), nn.ReLU(True)], []
        for n in (512, 256, 128):
            up = nn.ConvTranspose2d(n, n // 2, 4, 2, 1, bias=False)
            net_g += [up, nn.BatchNorm2d(n // 2), nn.ReLU(True)]
        net_g = nn.Sequential(*net_g, nn.ConvTranspose2d(64, 3, 4, 2, 1, bias=False), nn.Tanh())
        for n in (64, 128, 256):
            down = nn.Conv2d(n, n * 2, 4, 2, 1, bias=False)
            net_d += [down, nn.BatchNorm2d(n * 2), nn.LeakyReLU(0.2, True)]
        net_d = [nn.Conv2d(3, 64, 4, 2, 1, bias=False), nn.LeakyReLU(0.2, True), *net_d]
        net_d = nn.Sequential(*net_d, nn.Conv2d(512, 1, 4, 1, 0, bias=False), nn.Sigmoid())
        net_g, net_d = net_g.to(device).apply(weights_init), net_d.to(device).apply(weights_init)
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
                trainer.fetch(dcgan.LOG_EVERY)
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


def flops_a_step(images, device, dtype):
    from torch.utils.flop_counter import FlopCounterMode

    batch = next(dcgan.Batches(images, device).epoch(0))
    trainer = dcgan.Trainer(device, dtype)
    with FlopCounterMode(display=False) as counter:
        trainer.step(*batch)
    return counter.get_total_flops()


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


def probe(options):
    """In a process of its own, started at `options.began`: one training's first step, speed and memory, as JSON."""
    device, dtype = dcgan.pick_device()
    if options.probe == "usual":
        stepper = usual(dcgan.DATA_DIR, device)
    else:
        images, _ = dcgan.load_faces()
        if dcgan.WORLD_SIZE > 1:
            torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
        stepper = ours(images, device, dtype)
    next(stepper)
    synchronize(device)
    found = {"first_step": time.time() - options.began, "speed": speed(stepper, options.steps, device)}
    if Path("/proc/self/status").exists():
        found["anonymous"] = anonymous_memory()
    stepper.close()
    if dcgan.RANK == 0:
        print(json.dumps(found | {"memory": peak_memory(device)}))
    if dcgan.WORLD_SIZE > 1:
        torch.distributed.destroy_process_group()


def probed(options, kind, processes=1, **changed):
    """The figures of `probe` in a fresh process, or of several by torchrun."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    values = vars(options) | {"probe": kind, "began": time.time()} | changed
    names = ("images", "steps", "batch_size", "device", "cache", "probe", "began", "image_size")
    given = [f"{dcgan.flag(name)}={values[name]}" for name in names if values[name] is not None]
    command = [sys.executable, *torchrun, __file__, str(values["folder"]), *given]
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    return json.loads(done.stdout.strip().splitlines()[-1])


def compare(options):
    """The main table: both scripts in turn on the same images."""
    first, later, other = (probed(options, kind, steps=4, image_size=64) for kind in ("ours", "ours", "usual"))
    device, dtype = dcgan.pick_device()
    images, _ = dcgan.load_faces()
    steppers = {"ours": ours(images, device, dtype), "usual": usual(dcgan.DATA_DIR, device)}
    speeds = {name: [] for name in steppers}
    for _ in range(options.rounds):
        for name, stepper in steppers.items():
            time.sleep(1)  # the usual script's workers fill their queues
            speeds[name].append(speed(stepper, options.steps, device))
    for stepper in steppers.values():
        stepper.close()
    one, two = (statistics.median(speeds[name]) for name in ("ours", "usual"))
    flops, peak = flops_a_step(images, device, dtype), peak_flops(device, dtype)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    kind = "GPU memory" if device.type == "cuda" else "memory, main process"
    ratios = sorted(a / b for a, b in zip(speeds["ours"], speeds["usual"]))
    name = str(dtype).removeprefix("torch.")
    table(
        f"{where}, PyTorch {torch.__version__}; {len(images):,} images, 64 pixels, batch {dcgan.BATCH_SIZE}, "
        f"{options.rounds} rounds of {options.steps} steps",
        [
            ("", "dcgan.py", "usual", "ratio"),
            ("arithmetic", name, "float32", ""),
            ("images/s, median", f"{one:,.1f}", f"{two:,.1f}", f"{one / two:.2f}"),
            ("  lowest to highest", *(f"{min(s):,.1f} to {max(s):,.1f}" for s in speeds.values()),
             f"{ratios[0]:.2f} to {ratios[-1]:.2f}"),
            (f"epoch of {CELEBA:,} images at that speed, s", f"{CELEBA / one:,.0f}", f"{CELEBA / two:,.0f}", ""),
            ("start of process to first step, the first time, s", f"{first['first_step']:.1f}", "", ""),
            ("start of process to first step, s", f"{later['first_step']:.1f}", f"{other['first_step']:.1f}", ""),
            (f"peak {kind}, MiB", f"{later['memory']:,.0f}", f"{other['memory']:,.0f}", ""),
            ("GFLOP an image", f"{flops / dcgan.BATCH_SIZE / 1e9:.2f}", "", ""),
            (f"share of a {name} matrix product's {peak / 1e12:,.2f} TFLOP/s",
             f"{100 * one * flops / dcgan.BATCH_SIZE / peak:.1f} %", "", ""),
        ],
    )  # fmt: skip


def sizes(options):
    rows = [("pixels", "images/s", "peak memory, MiB")]
    for size in options.image_size:
        steps = max(3, int(options.steps * min(1, (64 / size) ** 2)))
        found = probed(options, "ours", image_size=size, steps=steps)
        rows.append((size, f"{found['speed']:,.1f}", f"{found['memory']:,.0f}"))
    table("dcgan.py at other sizes", rows)


def processes(options):
    rows = [("processes", "images/s")]
    for count in options.processes.split(","):
        rows.append((count, f"{probed(options, 'ours', int(count), image_size=64)['speed']:,.1f}"))
    table(f"dcgan.py by torchrun, {dcgan.BATCH_SIZE} images a step in all", rows)


def decode(options):
    """Per core: seconds are the process's own, so that a busy machine does not count."""
    from PIL import Image

    torch.set_num_threads(1)
    folder = Path(dcgan.DATA_DIR)
    paths = [folder / name for name in sorted(name for name, *_ in dcgan.list_images(folder))[:500]]
    ways = {"dcgan.read_face": lambda path: dcgan.read_face(path, 64),
            "the usual transform": lambda path: USUAL_TRANSFORM(Image.open(path).convert("RGB"))}  # fmt: skip
    speeds = {name: [] for name in ways}
    for _ in range(options.rounds + 1):
        for name, way in ways.items():
            began = time.process_time()
            for path in paths:
                way(path)
            speeds[name].append(len(paths) / (time.process_time() - began))
    table("JPEGs decoded a second and core", [(name, f"{statistics.median(s[1:]):,.0f}") for name, s in speeds.items()])


def scale(options):
    """Folders of empty files, with a cache of zeros that takes no room on the disk."""

    def sparse(folder, names, path, key):
        with open(path, "wb") as file:
            file.write(json.dumps({"key": key, "images": len(names)}).ljust(dcgan.HEADER_BYTES).encode())
            file.truncate(dcgan.HEADER_BYTES + len(names) * 3 * dcgan.IMAGE_SIZE**2)

    names = "images|list and open, s|to first step, s|cold, images/s|warm, images/s|batches, MiB|run, MiB"
    rows = [tuple(names.split("|"))]
    dcgan.MAX_IMAGES, honest, device = None, dcgan.decode, dcgan.pick_device()[0]
    for count in options.scale:
        with tempfile.TemporaryDirectory() as place:
            dcgan.DATA_DIR, dcgan.CACHE_DIR = f"{place}/faces", f"{place}/cache"
            os.mkdir(dcgan.DATA_DIR)
            for index in range(count):
                os.close(os.open(f"{dcgan.DATA_DIR}/{index:07d}.jpg", os.O_CREAT))
            dcgan.decode = sparse
            dcgan.load_faces()
            dcgan.decode = honest
            began = time.perf_counter()
            images, _ = dcgan.load_faces()
            loaded, before = time.perf_counter() - began, anonymous_memory()
            batches, speeds = dcgan.Batches(images, device), []
            for epoch in range(12):  # the first ones still map pages in, which an epoch does once
                began = time.perf_counter()
                taken = sum(1 for _ in itertools.islice(batches.epoch(epoch), 300))
                synchronize(device)
                speeds.append(taken * dcgan.BATCH_SIZE / (time.perf_counter() - began))
            grown = anonymous_memory() - before
            changed = {
                "folder": dcgan.DATA_DIR,
                "cache": dcgan.CACHE_DIR,
                "images": count,
                "image_size": 64,
                "steps": 2,
            }
            found = probed(options, "ours", **changed)
            figures = (speeds[0], speeds[-1], grown, found["anonymous"])
            rows.append((f"{count:,}", f"{loaded:.2f}", f"{found['first_step']:.1f}", *(f"{n:,.0f}" for n in figures)))
    table("dcgan.py on many images (empty files, a cache of zeros): 300 batches of an epoch, anonymous memory", rows)


def generation(options):
    network = dcgan.Generator(dcgan.IMAGE_SIZE, dcgan.LATENT_SIZE, dcgan.G_FEATURES)
    about = {name: getattr(dcgan, name) for name in dcgan.NETWORK_SETTINGS}
    file = Path(options.cache) / "generator.pt"
    torch.save({"epoch": 1, "images": 1, "ema": network.state_dict(), "settings": about}, file)
    faces = dcgan.Faces(file)
    number = dcgan.GENERATION_BATCH * options.steps
    list(faces.batches(2 * dcgan.GENERATION_BATCH, 0))
    speeds = []
    for seed in range(options.rounds):
        began = time.perf_counter()
        for _ in faces.batches(number, seed):
            pass
        speeds.append(number / (time.perf_counter() - began))
    table("generation, into the CPU's memory", [("images/s, median", f"{statistics.median(speeds):,.0f}")])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", help="real images; default: drawn faces")
    parser.add_argument("--images", type=int, default=1000, help="use, or draw, so many [%(default)s]")
    parser.add_argument("--steps", type=int, help="steps a round [15 on a CPU, 300 on a GPU]")
    parser.add_argument("--rounds", type=int, default=3, help="[%(default)s]; 0: no main table")
    parser.add_argument("--batch-size", type=int, default=dcgan.BATCH_SIZE, help="[%(default)s]")
    parser.add_argument("--device", help="as dcgan.py's --device")
    parser.add_argument("--image-size", type=int, nargs="+", metavar="S", help="a table of these sizes")
    parser.add_argument("--processes", metavar="1,2", help="a table of so many processes by torchrun")
    parser.add_argument("--decode", action="store_true", help="a table of decoding")
    parser.add_argument("--generation", action="store_true", help="a table of generation")
    parser.add_argument("--scale", type=int, nargs="*", metavar="N", help="a table of so many images [10 k to 1 M]")
    for name in ("--cache", "--probe", "--began"):
        parser.add_argument(name, help=argparse.SUPPRESS, type=float if name == "--began" else str)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        options.cache = options.cache or place
        if options.folder is None:
            options.folder = Path(place) / "faces"
            options.folder.mkdir()
            for index in range(options.images):
                dcgan.draw_face(random.Random(index)).save(options.folder / f"{index:06d}.jpg", quality=90)
        dcgan.DATA_DIR, dcgan.CACHE_DIR, dcgan.OUTPUT_DIR = str(options.folder), str(options.cache), place
        dcgan.MAX_IMAGES, dcgan.BATCH_SIZE, dcgan.DEVICE = options.images, options.batch_size, options.device
        dcgan.IMAGE_SIZE = options.image_size[0] if options.probe else 64
        dcgan.check_settings()
        options.steps = options.steps or (300 if dcgan.pick_device()[0].type == "cuda" else 15)
        if options.probe:
            return probe(options)
        if options.rounds:
            compare(options)
        options.rounds = options.rounds or 3
        options.scale = [10_000, 100_000, 1_000_000] if options.scale == [] else options.scale
        for make in (sizes, processes, decode, generation, scale):
            if getattr(options, {"sizes": "image_size"}.get(make.__name__, make.__name__)):
                make(options)


if __name__ == "__main__":
    main()
