"""Make the pictures of README anew, in .github: an hour on two cores.

    python tests/pictures.py CELEBA [NAME ...]    # NAME: faces, attributes, demo, photos

CELEBA is a folder or zip of CelebA's images and table; README's pictures come from 10,000 of them.
Runs that are there already are continued, in the folder `pictures`.
"""

import subprocess
import sys
from pathlib import Path

import torch
from torchvision.utils import make_grid

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import dcgan  # noqa: E402

HERE = ROOT / ".github"
WORK = ROOT / "pictures"
CELEBA = Path(sys.argv[1]).resolve()
RECIPE = ["--data-dir", CELEBA, "--max-images", 10_000, "--batch-size", 32]


def run(*words):
    command = [sys.executable, ROOT / "dcgan.py", *words]
    subprocess.run(list(map(str, command)), cwd=WORK, check=True)


def faces():
    """faces.png: 64 new faces; truncation.png: rows with weaker and weaker noise."""
    run(*RECIPE, "--output-dir", "faces")
    checkpoint = WORK / "faces/generator.pt"
    dcgan.generate_images(64, 1, checkpoint, HERE / "faces.png")
    rows = [
        dcgan.generate_images(10, 5, checkpoint, WORK / "row.png", truncation)
        for truncation in (1.0, 0.8, 0.6)
    ]
    picture = make_grid(dcgan.to_bytes(torch.cat(rows)), 10)
    dcgan.save_picture(HERE / "truncation.png", dcgan.enlarged(picture))


def attributes():
    """attributes.jpg: eight people without and with each of three attributes."""
    run(*RECIPE, "--attributes", "Male,Smiling,Eyeglasses", "--output-dir", "attributes")
    with dcgan.Image.open(WORK / "attributes/attributes.png") as picture:
        picture.save(HERE / "attributes.jpg", quality=90)


def demo():
    """demo.gif and losses.png, as the demo leaves them."""
    run("--demo")
    for source, name in [("training.gif", "demo.gif"), ("losses.png", "losses.png")]:
        (HERE / name).write_bytes((WORK / "output-demo" / source).read_bytes())


def photos():
    """photos-50.png and so on: the first eight samples of runs on few drawn faces."""
    for number, epochs in [(50, 3_000), (500, 200), (5_000, 20)]:
        folder = WORK / f"photos-{number}"
        folder.mkdir(exist_ok=True)
        dcgan.draw_demo(folder, number)
        words = ["--image-size", 32, "--batch-size", 32, "--epochs", epochs]
        run("--data-dir", folder, *words, "--output-dir", f"output-{number}")
        with dcgan.Image.open(WORK / f"output-{number}/samples/latest.png") as picture:
            eighth = picture.height // 8
            picture.crop((0, 0, picture.width, eighth)).save(HERE / f"photos-{number}.png")


if __name__ == "__main__":
    WORK.mkdir(exist_ok=True)
    for name in sys.argv[2:] or ("demo", "faces", "attributes", "photos"):
        globals()[name]()
