"""The data: what is found, how it is cut, what is skipped, the cache, and the batches."""

import os
import random
import re
import signal
import struct
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
import torch
from conftest import ROOT, draw_faces, flags, start
from PIL import Image, ImageDraw, ImageOps


def refused(dcgan, capsys, *arguments, status=2):
    """The one line on stderr with which the command line ends."""
    capsys.readouterr()
    assert dcgan.main(list(map(str, arguments))) == status
    error = capsys.readouterr().err
    assert error.startswith("dcgan.py: error: ") and error.count("\n") == 1, error
    return error


def names(dcgan, folder):
    return sorted(name for name, *_ in dcgan.list_images(folder))


def plain(path, size):
    """The centre square, decoded in full and resized by Pillow alone."""
    image = Image.open(path).convert("RGB")
    side, left, top = min(image.size), (image.width - min(image.size)) // 2, (image.height - min(image.size)) // 2
    square = image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1)


def difference(one, two):
    return (one.float() - two.float()).abs().mean().item()


def photo(width, height):
    """Something with detail at every scale, as a photograph has."""
    noise = np.random.default_rng(0)
    total = np.zeros((height, width, 3))
    for level in range(1, 9):
        small = noise.integers(0, 256, (max(1, height >> level), max(1, width >> level), 3), np.uint8)
        total += np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)) * 2.0**level
    return Image.fromarray((total / 510).clip(0, 255).astype(np.uint8))


@pytest.fixture
def folder(tmp_path):
    """An empty folder below the working directory of `tiny`."""
    (tmp_path / "images").mkdir()
    return tmp_path / "images"


# ------------------------------------------------------------------------------------------------ what is found


def test_images_are_found_at_any_depth_and_hidden_ones_are_not(tiny, folder):
    wanted = ["0.jpg", "a/1.JPG", "a/b/c/2.png", "faces/3.jpeg", "faces/4.webp"]
    hidden = [
        ".h.jpg",
        ".ipynb_checkpoints/1.jpg",
        "__MACOSX/._x.jpg",
        "a/__MACOSX/a/._1.jpg",
        "a/._1.jpg",
        "notes.txt",
    ]
    for name in wanted + hidden:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(folder / name, "PNG")
    (folder / "empty").mkdir()
    assert names(tiny, folder) == wanted
    tiny.BATCH_SIZE, tiny.DATA_DIR = 5, str(folder)
    assert tiny.load_faces()[0].shape == (5, 3, 32, 32)


def test_odd_file_names_and_links_are_read_and_each_folder_once(tiny, folder, all_faces):
    odd = [b"a b.jpg", b"a\nb.jpg", "ж é.jpg".encode(), b"\xff\xfe.jpg", b"%s{}.jpg", b"-x.jpg"]
    for number, name in enumerate(odd):
        with open(os.path.join(os.fsencode(folder), name), "wb") as file:
            file.write((all_faces / f"{number:06d}.jpg").read_bytes())
    (folder / "loop").symlink_to(folder)
    (folder / "again").symlink_to(folder, target_is_directory=True)
    (folder / "itself").symlink_to("itself")
    (folder / "elsewhere").symlink_to(all_faces)
    (folder / "elsewhere too").symlink_to(all_faces)
    found = names(tiny, folder)
    assert {os.fsencode(name) for name in found if os.sep not in name} == set(odd)
    assert len(found) == len(odd) + 40
    tiny.DATA_DIR = str(folder)
    images, order = tiny.load_faces()[0], sorted(found)
    assert torch.equal(images[order.index(os.fsdecode(odd[3]))], tiny.read_face(all_faces / "000003.jpg", 32))


def test_five_thousand_files_in_a_folder_are_listed_quickly(tiny, folder):
    for number in range(5000):
        (folder / f"{number}.jpg").touch()

    def seconds():
        began = time.perf_counter()
        assert len(names(tiny, folder)) == 5000
        return time.perf_counter() - began

    assert min(seconds() for _ in range(3)) < 0.5


@pytest.mark.parametrize(
    "make, arguments, says",
    [
        (lambda path: None, ("--data-dir", "images"), "no images"),
        (lambda path: path.rmdir(), ("--data-dir", "images"), "no folder"),
        (lambda path: draw_faces(path, 3), ("--data-dir", "images"), r"3 images, fewer than BATCH_SIZE \(8\)"),
        (lambda path: None, ("--max-images", "7"), r"7 images, fewer than BATCH_SIZE \(8\)"),
        (lambda path: None, ("--output-dir", "faces/output"), "OUTPUT_DIR .* lies in DATA_DIR"),
        (lambda path: None, ("--output-dir", "faces"), "OUTPUT_DIR .* lies in DATA_DIR"),
        (lambda path: None, ("--data-dir", "images", "--output-dir", "faces/../images/o"), "no images"),
    ],
)
def test_a_folder_that_cannot_be_trained_on_ends_in_one_line(tiny, folder, capsys, all_faces, make, arguments, says):
    make(folder)
    assert re.search(says, refused(tiny, capsys, *arguments))
    assert len(os.listdir(all_faces)) == 40  # nothing was written among the images


# ------------------------------------------------------------------------------------------------ how it is cut


def test_the_largest_centre_square_is_taken_and_nothing_is_stretched(tiny, tmp_path):
    for size in ((178, 218), (218, 178), (300, 100), (64, 64), (20, 33)):
        image = photo(*size)
        ImageDraw.Draw(image).ellipse((size[0] / 2 - 9, size[1] / 2 - 9, size[0] / 2 + 9, size[1] / 2 + 9), "white")
        image.save(tmp_path / "x.png")
        for side in (32, 64):
            face = tiny.read_face(tmp_path / "x.png", side)
            assert face.shape == (3, side, side) and face.dtype == torch.uint8
            assert difference(face, plain(tmp_path / "x.png", side)) < 1.5


def test_decoding_at_a_fraction_of_the_size_looks_as_decoding_in_full_does(tiny, tmp_path):
    image = photo(1500, 1100)
    image.save(tmp_path / "photo.jpg", quality=92)
    tiny.draw_face(random.Random(0)).save(tmp_path / "face.jpg", quality=92)
    for name in ("photo.jpg", "face.jpg"):
        for size in (32, 64, 128):
            assert difference(tiny.read_face(tmp_path / name, size), plain(tmp_path / name, size)) < 2
    began = time.perf_counter()
    tiny.read_face(tmp_path / "photo.jpg", 64)
    drafted = time.perf_counter() - began
    began = time.perf_counter()
    plain(tmp_path / "photo.jpg", 64)
    assert drafted < time.perf_counter() - began


def test_exif_rotation_is_applied(tiny, tmp_path):
    T = Image.Transpose
    stored = {2: T.FLIP_LEFT_RIGHT, 3: T.ROTATE_180, 4: T.FLIP_TOP_BOTTOM, 5: T.TRANSPOSE, 6: T.ROTATE_90,
              7: T.TRANSVERSE, 8: T.ROTATE_270}  # fmt: skip
    upright = photo(150, 200)
    upright.save(tmp_path / "0.png")
    for orientation, turn in stored.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        for kind, most in (("png", 1), ("jpg", 5)):
            path = tmp_path / f"{orientation}.{kind}"
            upright.transpose(turn).save(path, exif=exif, quality=95)
            assert difference(tiny.read_face(path, 32), tiny.read_face(tmp_path / "0.png", 32)) < most


def test_images_of_any_mode_and_shape_become_rgb(tiny, tmp_path):
    face = tiny.draw_face(random.Random(1))
    face.save(tmp_path / "rgb.png")
    colour, grey = tiny.read_face(tmp_path / "rgb.png", 32), ImageOps.grayscale(face)
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    for name, image in {
        "rgba.png": face.convert("RGBA"), "palette.png": face.quantize(256), "palette.gif": face.quantize(256),
        "cmyk.jpg": face.convert("CMYK"), "cmyk.tif": face.convert("CMYK"), "rgb.webp": face, "rgb.bmp": face,
    }.items():  # fmt: skip
        if name.endswith(".gif"):
            continue
        image.save(tmp_path / name)
        assert difference(tiny.read_face(tmp_path / name, 32), colour) < 6, name
    for name, image in {
        "grey.png": grey,
        "grey.jpg": grey,
        "grey alpha.png": grey.convert("LA"),
        "16.png": deep,
    }.items():
        image.save(tmp_path / name)
        read = tiny.read_face(tmp_path / name, 32)
        assert torch.equal(read[0], read[1]) and torch.equal(read[1], read[2])
        assert difference(read, colour.float().mul(torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(0)) < 4, name
    for name, size in {"dot.png": (1, 1), "line.png": (3000, 1), "wide.jpg": (3000, 20), "tall.png": (2, 999)}.items():
        Image.new("RGB", size, (200, 100, 50)).save(tmp_path / name)
        assert difference(tiny.read_face(tmp_path / name, 32), torch.tensor([200, 100, 50]).view(3, 1, 1)) < 2, name


# ---------------------------------------------------------------------------------------------- what is skipped


def bomb(path):
    """A PNG of a few bytes that declares 20,000 x 20,000 pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    )


def truncated(path):
    path.write_bytes(path.read_bytes()[:-3000])


DAMAGED = {
    "000001.jpg": truncated,
    "a text.jpg": lambda path: path.write_text("<html>not found</html>"),
    "empty.png": lambda path: path.touch(),
    "bomb.png": bomb,
    "link.jpg": lambda path: path.symlink_to("nowhere.jpg"),
}


def test_files_that_cannot_be_read_are_named_skipped_and_counted(tiny, folder, capsys):
    draw_faces(folder, 56)
    for name, damage in DAMAGED.items():
        damage(folder / name)
    tiny.DATA_DIR = str(folder)
    images, out = tiny.load_faces()[0], capsys.readouterr().out
    assert len(images) == 55
    assert torch.equal(images[1], tiny.read_face(folder / "000002.jpg", 32))  # the order is that of the rest
    assert torch.equal(images[54], tiny.read_face(folder / "000055.jpg", 32))
    for name in ("000001.jpg", "a text.jpg", "empty.png", "bomb.png"):
        assert len(re.findall(f"skipped .*{name}.*", out)) == 1, name
    assert re.search(r"skipped (4 of 59|5 of 60) ", out)


def test_a_link_to_an_image_that_is_gone_is_named(tiny, folder, capsys):
    draw_faces(folder, 20)
    (folder / "link.jpg").symlink_to("nowhere.jpg")
    tiny.DATA_DIR = str(folder)
    assert len(tiny.load_faces()[0]) == 20
    assert "link.jpg" in capsys.readouterr().out


def test_more_than_one_damaged_image_in_ten_stops_the_run(tiny, folder, capsys):
    draw_faces(folder, 20)
    for number in (3, 7):
        truncated(folder / f"{number:06d}.jpg")
    tiny.DATA_DIR = str(folder)
    assert len(tiny.load_faces()[0]) == 18
    truncated(folder / "000011.jpg")
    assert "one in ten" in refused(tiny, capsys)
    assert len(caches(tiny)) == 1 and not list(folder.parent.rglob("*.part"))


# -------------------------------------------------------------------------------------------------------- cache


def caches(dcgan):
    return sorted(path for path in dcgan.Path(dcgan.CACHE_DIR).glob("*") if path.suffix != ".lock")


def identity(path):
    return path.stat().st_ino, path.stat().st_mtime_ns


def test_images_are_decoded_once_and_then_mapped(tiny, folder):
    draw_faces(folder, 10)
    tiny.DATA_DIR = str(folder)
    images, key = tiny.load_faces()
    assert torch.equal(images[3], tiny.read_face(folder / "000003.jpg", 32))
    [path] = caches(tiny)
    before, status = identity(path), (folder / "000003.jpg").stat()
    (folder / "000003.jpg").write_bytes(b"x" * status.st_size)  # whoever decoded now would stumble
    os.utime(folder / "000003.jpg", ns=(status.st_atime_ns, status.st_mtime_ns))
    again, same = tiny.load_faces()
    assert torch.equal(images, again) and key == same and [path] == caches(tiny) and identity(path) == before


def test_another_folder_size_or_number_of_images_is_decoded_anew(tiny, folder):
    draw_faces(folder, 12)
    tiny.DATA_DIR = str(folder)
    keys = [tiny.load_faces()[1]]

    def decoded_anew(count, size=32):
        images, key = tiny.load_faces()
        assert images.shape == (count, 3, size, size) and key not in keys
        found = [tiny.read_face(folder / name, size) for name in names(tiny, folder)[: tiny.MAX_IMAGES]]
        assert torch.equal(images, torch.stack(found))
        keys.append(key)

    tiny.draw_face(random.Random(99)).save(folder / "000012.jpg")
    decoded_anew(13)
    tiny.draw_face(random.Random(98)).save(folder / "000000.jpg")
    decoded_anew(13)
    (folder / "000000.jpg").rename(folder / "zzz.jpg")
    decoded_anew(13)
    (folder / "000001.jpg").unlink()
    decoded_anew(12)
    tiny.MAX_IMAGES = 9
    decoded_anew(9)
    tiny.IMAGE_SIZE = 64
    decoded_anew(9, 64)


def test_a_damaged_cache_is_built_again(tiny):
    images = tiny.load_faces()[0].clone()
    [path] = caches(tiny)
    good = path.read_bytes()
    tiny.MAX_IMAGES = 39  # a whole cache, of other images
    tiny.load_faces()
    [other] = [other for other in caches(tiny) if other != path]
    tiny.MAX_IMAGES = None
    for damaged in (
        good[: len(good) // 2], b"", good[:-1], good + b"x", bytes([good[0] ^ 4]) + good[1:],
        bytes(100) + good[100:], b"[]" + b" " * 4094 + good[4096:], other.read_bytes(),
    ):  # fmt: skip
        path.write_bytes(damaged)
        assert torch.equal(tiny.load_faces()[0], images)
        assert path.read_bytes() == good


def test_the_number_of_workers_changes_nothing(tiny, folder, all_faces):
    for number in range(130):
        os.link(all_faces / f"{number % 40:06d}.jpg", folder / f"{number:03d}.jpg")
    truncated_link = folder / "005.jpg"
    truncated_link.unlink()
    truncated_link.write_bytes((all_faces / "000005.jpg").read_bytes()[:-3000])
    tiny.DATA_DIR = str(folder)
    one = tiny.load_faces()[0].clone()
    [path] = caches(tiny)
    path.unlink()
    tiny.WORKERS = 2
    assert len(one) == 129 and torch.equal(tiny.load_faces()[0], one)


def test_a_killed_decode_is_done_again_and_by_one_of_two_processes_only(tiny, folder):
    photo(1600, 1600).save(folder / "0.png", compress_level=0)
    for number in range(1, 19):
        os.link(folder / "0.png", folder / f"{number}.png")
    (folder / "damaged.png").touch()
    here = folder.parent
    arguments = flags(DATA_DIR=folder, EPOCHS=1)
    with start(*arguments, cwd=here) as killed:
        until = time.monotonic() + 120
        while not list(here.glob("data/cache/*.part")) and killed.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
        killed.send_signal(signal.SIGKILL)
        killed.communicate()
    assert killed.returncode == -signal.SIGKILL and not list(here.glob("data/cache/*.bin"))
    outputs = ("one", "two")
    runs = [start(*arguments, "--output-dir", name, cwd=here) for name in outputs]
    spoken = [process.communicate(timeout=300) for process in runs]
    assert [process.returncode for process in runs] == [0, 0], spoken
    assert sum("skipped 1 of 20" in out for out, _ in spoken) == 1  # who decodes says so
    assert len(caches(tiny)) == 1
    assert len({(here / name / "samples/epoch_001.png").read_bytes() for name in outputs}) == 1


SPAWN = """
import multiprocessing, sys
sys.path.insert(0, {root!r})
import dcgan
if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    dcgan.DATA_DIR, dcgan.IMAGE_SIZE, dcgan.BATCH_SIZE, dcgan.WORKERS = "faces", 32, 8, 1
    dcgan.load_faces()
"""


def test_workers_may_be_spawned_as_on_windows_and_macos(tiny, workplace):
    (workplace / "spawn.py").write_text(SPAWN.format(root=str(ROOT)))
    subprocess.run([sys.executable, "spawn.py"], cwd=workplace, check=True, timeout=300)
    [path] = caches(tiny)
    made = identity(path)
    images = tiny.load_faces()[0]
    assert identity(path) == made and torch.equal(images[7], tiny.read_face("faces/000007.jpg", 32))


MOUNTS = """
mkdir small && mount -t tmpfs -o size=1m none small && mount --bind -o ro "$(readlink -f faces)" images || exit 99
exec "$@"
"""
TWICE = """
import sys
sys.path.insert(0, {root!r})
import dcgan
arguments = sys.argv[1:]
print(dcgan.main([*arguments, "--cache-dir", "small/cache"]))
print(dcgan.main(arguments))
"""


def test_a_small_disk_is_announced_before_decoding_and_images_may_be_read_only(tiny, folder):
    command = ["unshare", "-m", "sh", "-c", MOUNTS, "sh", sys.executable, "-c", TWICE.format(root=str(ROOT))]
    try:
        done = subprocess.run(
            [*command, *flags(DATA_DIR="images", IMAGE_SIZE=128, EPOCHS=1)], cwd=folder.parent, text=True,
            capture_output=True, timeout=300, check=False,
        )  # fmt: skip
    except FileNotFoundError:
        pytest.skip("no unshare here")
    if done.returncode in (1, 99) and ("unshare:" in done.stderr or "mount:" in done.stderr):
        pytest.skip("may not mount here")
    [error] = done.stderr.splitlines()
    needed, free = map(float, re.search(r" ([\d.]+) MiB.* ([\d.]+) MiB", error).groups())
    assert needed == pytest.approx(40 * 3 * 128**2 / 2**20, rel=0.05) and free <= 1
    statuses = [line for line in done.stdout.splitlines() if line in "012"]
    assert statuses == ["1", "0"] and "skipped" not in done.stdout
    assert (folder.parent / "output/generator.pt").exists() and len(caches(tiny)) == 1


# ------------------------------------------------------------------------------------------------------ batches


@pytest.fixture
def numbered(tiny):
    """Batches of 50 images, each filled with its own number: (dcgan, a function that makes them)."""
    images = torch.arange(50, dtype=torch.uint8).view(50, 1, 1, 1).expand(50, 3, 32, 32).contiguous()
    return tiny, lambda: tiny.Batches(images, torch.device("cpu"))


def same(one, two):
    return len(one) == len(two) and all(torch.equal(a, b) for x, y in zip(one, two) for a, b in zip(x, y))


def test_batches_follow_from_seed_epoch_and_step_alone(numbered):
    dcgan, make = numbered
    whole = [list(make().epoch(epoch)) for epoch in range(2)]
    assert len(whole[0]) == 6 and make().steps == 6
    for stop in range(6):
        torch.manual_seed(stop)
        torch.rand(stop)
        assert same(list(make().epoch(1, stop)), whole[1][stop:])
    assert not same(*whole)
    dcgan.SEED = 1
    assert not same(list(make().epoch(0)), whole[0])
    latents = torch.cat([latent for epoch in whole for *_, latent in epoch])
    assert len(latents.unique(dim=0)) == 96 and latents.std().item() == pytest.approx(1, abs=0.1)


def test_an_epoch_shows_each_image_once_at_most_and_epochs_differ(numbered):
    _, make = numbered
    orders = [torch.cat([faces[:, 0, 0, 0] for faces, *_ in make().epoch(epoch)]).tolist() for epoch in range(20)]
    assert all(len(order) == len(set(order)) == 48 for order in orders)
    assert len(set(map(tuple, orders))) == 20
    assert set().union(*orders) == set(range(50))  # nobody is left out for ever


def test_half_of_the_images_are_flipped(numbered):
    _, make = numbered
    flips = torch.cat([flips for epoch in range(20) for _, flips, _ in make().epoch(epoch)]).float()
    assert flips.shape == (960, 1, 1, 1) and flips.mean().item() == pytest.approx(0.5, abs=0.08)


def test_the_slices_of_two_processes_are_the_batch_of_one(numbered, monkeypatch):
    dcgan, make = numbered
    alone = list(make().epoch(3))
    monkeypatch.setattr(dcgan, "WORLD_SIZE", 2)
    slices = []
    for rank in (0, 1):
        monkeypatch.setattr(dcgan, "RANK", rank)
        slices.append(list(make().epoch(3)))
    assert all(len(faces) == 4 for faces, *_ in slices[0])
    assert same([[torch.cat(pair) for pair in zip(*step)] for step in zip(*slices)], alone)


def test_a_face_comes_out_mirrored_where_it_is_flipped(tiny):
    """The flip itself is part of the training step: a discriminator sees images in [-1, 1], mirrored or not."""
    trainer, seen = tiny.Trainer(torch.device("cpu"), torch.float32), []
    trainer.discriminator.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach().clone()))
    faces = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
    flips = (torch.arange(8) % 2 == 0).view(8, 1, 1, 1)
    trainer.step(faces, flips, torch.randn(8, 8, 1, 1))
    wanted = (
        torch.stack([face.flip(2) if flip else face for face, flip in zip(faces, flips.flatten())]).div(127.5).sub(1)
    )
    torch.testing.assert_close(seen[0], wanted)
