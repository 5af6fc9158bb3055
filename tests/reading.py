"""What a run has left: its files, tables, checkpoints and pictures."""

import csv
from pathlib import Path

import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor


def everything(folder="."):
    """All below a folder, with when it was written."""
    return {path: path.lstat().st_mtime_ns for path in Path(folder).rglob("*")}


def files(folder="output"):
    """{name relative to the folder: path} of all files below it."""
    paths = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path for path in paths}


def table(path):
    """The rows of a file like metrics.csv, each a dict; none if the file is not there yet."""
    if not Path(path).exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def metrics(folder="."):
    """The rows of output/metrics.csv in a folder as lists of text, without images_per_second."""
    return [list(row.values())[:-1] for row in table(Path(folder, "output/metrics.csv"))]


def steps_of(rows):
    """The numbers (epoch, step, images) of rows of `metrics`."""
    return [tuple(map(int, row[:3])) for row in rows]


def checkpoint(folder=".", name="checkpoint.pt"):
    return torch.load(Path(folder, "output", name), weights_only=True)


def pixels(path):
    """A picture as a tensor (3, height, width) of bytes."""
    with Image.open(path) as image:
        return pil_to_tensor(image.convert("RGB"))


def film(path):
    """(frames (n, 3, height, width) of bytes, milliseconds of each) of a GIF that loops."""
    with Image.open(path) as image:
        assert image.format == "GIF" and image.info["loop"] == 0
        frames, times = [], []
        for index in range(image.n_frames):
            image.seek(index)
            frames.append(pil_to_tensor(image.convert("RGB")))
            times.append(image.info["duration"])
    return torch.stack(frames), times
