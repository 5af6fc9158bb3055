"""How fast dcgan.py trains, beside the usual public DCGAN script, on the same images.

    python tests/benchmark.py [FOLDER] [--batch-size N] [--seconds N] [--rounds N]

FOLDER holds images; without it, dcgan.py draws faces. Both are measured in turn, warm, for several
rounds; the figures are medians over the rounds.
"""

import argparse
import itertools
import statistics
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

USUAL_TRANSFORM = transforms.Compose(
    [
        transforms.Resize(64),
        transforms.CenterCrop(64),
        transforms.ToTensor(),
        transforms.Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    ]
)


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
    dataset = torchvision.datasets.ImageFolder(folder.parent, USUAL_TRANSFORM)
    dataset.samples *= 50  # long epochs: starting the workers weighs little
    options = {"shuffle": True, "num_workers": 2, "drop_last": True}
    loader = torch.utils.data.DataLoader(dataset, dcgan.BATCH_SIZE, **options)
    net_g, net_d = (network.to(device).apply(usual_weights) for network in usual_networks())
    optimizer_g = torch.optim.Adam(net_g.parameters(), lr=2e-4, betas=(0.5, 0.999))
    optimizer_d = torch.optim.Adam(net_d.parameters(), lr=2e-4, betas=(0.5, 0.999))
    criterion = nn.BCELoss()
    while True:
        for images, _ in loader:
            net_d.zero_grad()
            real = images.to(device)
            label = torch.full((len(real),), 1.0, device=device)
            loss_real = criterion(net_d(real).view(-1), label)
            loss_real.backward()
            fake = net_g(torch.randn(len(real), 100, 1, 1, device=device))
            loss_fake = criterion(net_d(fake.detach()).view(-1), label.fill_(0.0))
            loss_fake.backward()
            optimizer_d.step()
            net_g.zero_grad()
            loss_g = criterion(net_d(fake).view(-1), label.fill_(1.0))
            loss_g.backward()
            optimizer_g.step()
            loss_real.item() + loss_fake.item() + loss_g.item()  # the script prints them
            yield


def ours(folder, device):
    """dcgan.py's training, a step at a time."""
    images, paths, *_ = dcgan.load_faces(folder, 64)
    trainer = dcgan.Trainer(device, dcgan.pick_dtype(device), 0)
    batches = dcgan.Batches(images, torch.zeros(len(paths), 0), device)
    for epoch in itertools.count():
        for batch in batches.epoch(epoch):
            trainer.advance(*batch)
            yield


def speed(steps, seconds, device):
    """Images per second of an iterator of steps."""
    done, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        next(steps)
        done += 1
    if device.type == "cuda":
        torch.cuda.synchronize()
    return done * dcgan.BATCH_SIZE / (time.perf_counter() - start)


def measure(folder, options):
    device = dcgan.pick_device()
    programs = {"dcgan.py": ours(folder, device), "usual": usual(folder, device)}
    for steps in programs.values():
        speed(steps, 5, device)  # to be warm
    found = {name: [] for name in programs}
    for _ in range(options.rounds):
        for name, steps in programs.items():
            found[name].append(speed(steps, options.seconds, device))
    medians = {name: statistics.median(speeds) for name, speeds in found.items()}
    for name, median in medians.items():
        extremes = f"{min(found[name]):.1f} to {max(found[name]):.1f}"
        print(f"{name:10} {median:8.1f} images/s of {extremes}")
    ratio = medians["dcgan.py"] / medians["usual"]
    print(f"ratio      {ratio:8.2f}; {device}, {dcgan.pick_dtype(device)}, {torch.__version__}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", nargs="?", help="images; without, drawn ones")
    parser.add_argument("--batch-size", type=int, default=dcgan.BATCH_SIZE)
    parser.add_argument("--seconds", type=float, default=15)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    dcgan.BATCH_SIZE = options.batch_size
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, "root/faces")  # ImageFolder wants a folder for each class
        folder.parent.mkdir()
        dcgan.CACHE_DIR = f"{place}/cache"
        if options.folder:
            folder.symlink_to(Path(options.folder).resolve())
        else:
            folder.mkdir()
            dcgan.draw_demo(folder, 2_000)
        measure(folder, options)


if __name__ == "__main__":
    main()
