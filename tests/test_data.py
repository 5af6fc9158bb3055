"""The data: what is found, how it is cut, what is skipped, the cache, and the batches."""

import math
import os
import random
import re
import shutil
import signal
import struct
import time
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from conftest import draw_faces, flags, load_faces, own_mounts, refused, run, start, succeed, until
from PIL import Image, ImageDraw, ImageOps

import dcgan

SIZE = 32  # pixels a side, as conftest's tiny settings say


def names(dcgan, folder):
    return sorted(name for name, *_ in dcgan.list_images(folder, Counter()))


def plain(path, size):
    """The centre square, decoded in full and resized by Pillow alone."""
    image = Image.open(path).convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    small = square.resize((size, size), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(small)).permute(2, 0, 1)


def difference(one, two):
    return (one.float() - two.float()).abs().mean().item()


def photo(width, height):
    """Something with detail at every scale, as a photograph has."""
    noise = np.random.default_rng(0)
    total = np.zeros((height, width, 3))
    for level in range(1, 9):
        shape = max(1, height >> level), max(1, width >> level), 3
        small = Image.fromarray(noise.integers(0, 256, shape, np.uint8))
        large = small.resize((width, height), Image.Resampling.BICUBIC)
        total += np.asarray(large) * 2.0**level
    return Image.fromarray((total / 510).clip(0, 255).astype(np.uint8))


@pytest.fixture
def folder(tmp_path):
    """An empty folder below the working directory of `tiny`."""
    (tmp_path / "images").mkdir()
    return tmp_path / "images"


# ------------------------------------------------------------------------------------ what is found


def test_images_are_found_at_any_depth_and_hidden_ones_are_not(tiny, folder):
    wanted = ["0.jpg", "a/1.JPG", "a/b/c/2.png", "faces/3.jpeg", "faces/4.webp"]
    hidden = [".h.jpg", ".ipynb_checkpoints/1.jpg", "a/._1.jpg"]
    hidden += ["__MACOSX/._x.jpg", "__MACOSX/x.jpg", "a/__MACOSX/a/1.jpg"]
    for name in [*wanted, *hidden]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(folder / name, "PNG")
    (folder / "notes.txt").write_text("no image")
    (folder / "empty").mkdir()
    assert names(tiny, folder) == wanted
    tiny.BATCH_SIZE, tiny.DATA_DIR = 5, str(folder)
    assert load_faces(tiny, SIZE)[0].shape == (5, 3, SIZE, SIZE)


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
    images = load_faces(tiny, SIZE)[0]
    not_unicode = sorted(found).index(os.fsdecode(odd[3]))
    assert torch.equal(images[not_unicode], tiny.read_face(all_faces / "000003.jpg", SIZE))


def test_five_thousand_files_in_a_folder_are_listed_quickly(tiny, folder):
    for number in range(5000):
        (folder / f"{number}.jpg").touch()

    def seconds():
        began = time.perf_counter()
        assert len(names(tiny, folder)) == 5000
        return time.perf_counter() - began

    assert min(seconds() for _ in range(3)) < 0.5


@pytest.mark.parametrize(
    "line, says",
    [
        ("--data-dir images", "holds no images"),
        ("--data-dir missing", "holds no images"),
        ("--data-dir three", r"3 images, fewer than BATCH_SIZE \(8\)"),
        ("--max-images 7", r"7 images, fewer than BATCH_SIZE \(8\)"),
        ("--output-dir faces/output", "OUTPUT_DIR .* is inside DATA_DIR"),
        ("--output-dir faces", "OUTPUT_DIR .* is inside DATA_DIR"),
        ("--data-dir images --output-dir faces/../images/o", "holds no images"),
    ],
)
def test_a_folder_that_cannot_be_trained_on_ends_in_one_line(
    tiny, folder, tmp_path, capsys, all_faces, line, says
):
    draw_faces(tmp_path / "three", 3)
    assert re.search(says, refused(capsys, *line.split()))
    assert len(os.listdir(all_faces)) == 40  # nothing was written among the images


# ------------------------------------------------------------------------------------ how it is cut


def test_the_largest_centre_square_is_taken_and_nothing_is_stretched(tiny, tmp_path):
    for width, height in ((178, 218), (218, 178), (300, 100), (64, 64), (20, 33)):
        image = photo(width, height)
        ImageDraw.Draw(image).circle((width / 2, height / 2), 9, "white")
        image.save(tmp_path / "x.png")
        for side in (32, 64):
            face = tiny.read_face(tmp_path / "x.png", side)
            assert face.shape == (3, side, side) and face.dtype == torch.uint8
            assert difference(face, plain(tmp_path / "x.png", side)) < 1.5


def test_decoding_at_a_fraction_of_the_size_looks_as_decoding_in_full_does(tiny, tmp_path):
    photo(1500, 1100).save(tmp_path / "photo.jpg", quality=92)
    tiny.draw_face(random.Random(7)).save(tmp_path / "face.jpg", quality=92)
    for path in (tmp_path / "photo.jpg", tmp_path / "face.jpg"):
        for size in (32, 64, 128):
            assert difference(tiny.read_face(path, size), plain(path, size)) < 2

    def seconds(read):
        began = time.process_time()
        read(tmp_path / "photo.jpg", 64)
        return time.process_time() - began

    fraction = min(seconds(tiny.read_face) for _ in range(3))
    assert fraction < min(seconds(plain) for _ in range(3))


def test_exif_rotation_is_applied(tiny, tmp_path):
    turns = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_90 TRANSVERSE ROTATE_270"
    upright = photo(150, 200)
    upright.save(tmp_path / "upright.png")
    wanted = tiny.read_face(tmp_path / "upright.png", SIZE)
    for orientation, name in enumerate(turns.split(), 2):
        turn, exif = Image.Transpose[name], Image.Exif()
        exif[0x0112] = orientation
        for kind, most in (("png", 1), ("jpg", 5)):
            path = tmp_path / f"{orientation}.{kind}"
            upright.transpose(turn).save(path, exif=exif, quality=95)
            assert difference(tiny.read_face(path, SIZE), wanted) < most, path.name


def test_images_of_any_mode_become_rgb_of_the_same_colour_or_brightness(tiny, tmp_path):
    face = tiny.draw_face(random.Random(1))
    grey = ImageOps.grayscale(face)
    palette, cmyk = face.quantize(256), face.convert("CMYK")
    colours = {"rgba.png": face.convert("RGBA"), "palette.png": palette, "palette.tif": palette}
    colours |= {"cmyk.jpg": cmyk, "cmyk.tif": cmyk, "rgb.webp": face, "rgb.bmp": face}
    greys = {"grey.png": grey, "grey.jpg": grey, "la.png": grey.convert("LA")}
    for original, images, most in ((face, colours, 6), (grey, greys, 4)):
        original.convert("RGB").save(tmp_path / "rgb.png")
        wanted = tiny.read_face(tmp_path / "rgb.png", SIZE)
        for name, image in images.items():
            image.save(tmp_path / name)
            read = tiny.read_face(tmp_path / name, SIZE)
            assert difference(read, wanted) < most, name
            assert original is face or (torch.equal(read[0], read[1]) and read[1].equal(read[2]))


def seen_through(tmp_path, image, name):
    """The colour of a picture's centre as `read_face` sees it, from a file of this name."""
    path = tmp_path / name
    image.save(path)
    return dcgan.read_face(path, SIZE)[:, SIZE // 2, SIZE // 2].tolist()


def test_transparency_lies_on_white(tmp_path):
    magenta, white = (255, 0, 255), [255, 255, 255]
    hidden = Image.new("RGBA", (64, 64), (*magenta, 0))
    palette = Image.new("P", (64, 64), 3)
    palette.putpalette([0, 0, 0] * 3 + [*magenta])
    palette.info["transparency"] = 3
    grey = Image.new("LA", (64, 64), (0, 0))
    key = Image.new("RGB", (64, 64), magenta)
    key.info["transparency"] = magenta
    for name, image in {"rgba.png": hidden, "rgba.webp": hidden, "la.png": grey}.items():
        assert seen_through(tmp_path, image, name) == white, name
    for name, image in {"palette.png": palette, "palette.gif": palette, "key.png": key}.items():
        image.save(tmp_path / name, transparency=image.info["transparency"])
        face = dcgan.read_face(tmp_path / name, SIZE)
        assert face.min() == 255, name
    half = Image.new("RGBA", (64, 64), (0, 0, 0, 128))
    assert seen_through(tmp_path, half, "half.png") == pytest.approx([127] * 3, abs=1)


def test_high_depths_are_scaled_by_their_own_range(tmp_path):
    ramp = np.linspace(0, 1, 64, dtype=np.float32)[None].repeat(64, 0)
    images = {
        "12 bits.png": Image.fromarray((ramp * 4095).astype(np.uint16)),
        "16 bits.png": Image.fromarray((ramp * 65535).astype(np.uint16)),
        "signed.tif": Image.fromarray((ramp * 2e6 - 1e6).astype(np.int32)),
        "floats.tif": Image.fromarray(ramp / 1000),
        "8 bits.png": Image.fromarray((ramp * 255).astype(np.uint8)),
    }
    faces = []
    for name, image in images.items():
        image.save(tmp_path / name)
        faces.append(dcgan.read_face(tmp_path / name, SIZE).int())
    for face, name in zip(faces, images):
        assert (face - faces[-1]).abs().max() <= 2, name


@pytest.mark.parametrize("value", [7, math.nan, math.inf])
def test_what_cannot_be_shown_is_named_and_skipped(tiny, folder, value, capsys):
    draw_faces(folder, 16)
    values = np.full((40, 40), value, np.float32)
    values[0, 0] = 7
    Image.fromarray(values).save(folder / "odd.tif")
    assert tiny.main(["--data-dir", str(folder), "--epochs", "1"]) == 0
    said = capsys.readouterr().out
    assert f"skipped '{folder / 'odd.tif'}': " in said and "not finite" in said
    assert "; 16 images, " in said and "left out: 1 broken" in said


def test_a_large_photo_that_pillow_opens_is_an_image(tmp_path):
    Image.new("RGB", (11_000, 9_000), (200, 100, 50)).save(tmp_path / "large.jpg")
    assert Image.MAX_IMAGE_PIXELS < 11_000 * 9_000
    face = dcgan.read_face(tmp_path / "large.jpg", SIZE).float().mean((1, 2))
    assert face.tolist() == pytest.approx([200, 100, 50], abs=3)


def test_images_of_any_shape_are_read(tiny, tmp_path):
    colour = torch.tensor([200, 100, 50]).view(3, 1, 1).expand(3, SIZE, SIZE)
    sizes = {"dot.png": (1, 1), "row.png": (3000, 1), "wide.jpg": (3000, 20), "tall.png": (2, 999)}
    for name, size in sizes.items():
        Image.new("RGB", size, (200, 100, 50)).save(tmp_path / name)
        assert difference(tiny.read_face(tmp_path / name, SIZE), colour) < 2, name


# ---------------------------------------------------------------------------------- what is skipped


def bomb(path):
    """A PNG of a few bytes that declares 20,000 x 20,000 pixels."""

    def chunk(kind, data):
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + checksum

    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-3000])


DAMAGED = {
    "000001.jpg": truncate,
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
    images, out = load_faces(tiny, SIZE)[0], capsys.readouterr().out
    assert len(images) == 55
    # The order is that of the rest.
    assert torch.equal(images[1], tiny.read_face(folder / "000002.jpg", SIZE))
    assert torch.equal(images[54], tiny.read_face(folder / "000055.jpg", SIZE))
    *lines, total = out.splitlines()
    listed = Path("output/broken_images.txt")
    assert total == f"skipped 5 of 60 images, listed in {listed}" and len(lines) == 5
    assert [f"skipped {line}" for line in listed.read_text().splitlines()] == lines
    for name in DAMAGED:
        assert any(line.startswith(f"skipped '{folder / name}': ") for line in lines), name


def test_a_pipe_among_the_images_is_named_and_skipped_and_not_waited_for(folder):
    draw_faces(folder, 20)
    os.mkfifo(folder / "x.jpg")
    said = succeed(*flags(DATA_DIR=folder, EPOCHS=1), cwd=folder.parent, timeout=120)
    assert f"skipped '{folder / 'x.jpg'}': " in said and "skipped 1 of 21 images, " in said


def test_more_than_one_damaged_image_in_ten_stops_the_run(tiny, folder, capsys):
    draw_faces(folder, 20)
    for number in (3, 7):
        truncate(folder / f"{number:06d}.jpg")
    tiny.DATA_DIR = str(folder)
    assert len(load_faces(tiny, SIZE)[0]) == 18
    before = caches(tiny)
    truncate(folder / "000011.jpg")
    assert "one in ten" in refused(capsys)
    assert caches(tiny) == before and len(before) == 1


# -------------------------------------------------------------------------------------------- cache


def caches(dcgan):
    """What lies in CACHE_DIR, without the lock files."""
    return sorted(path for path in dcgan.Path(dcgan.CACHE_DIR).glob("*") if path.suffix != ".lock")


def identity(path):
    return path.stat().st_ino, path.stat().st_mtime_ns


def all_read(dcgan, folder, size):
    """The images of a folder, each read from its own file."""
    found = names(dcgan, folder)[: dcgan.MAX_IMAGES]
    return torch.stack([dcgan.read_face(folder / name, size) for name in found])


def test_images_are_decoded_once_and_then_mapped(tiny, folder):
    draw_faces(folder, 10)
    tiny.DATA_DIR = str(folder)
    images, key = load_faces(tiny, SIZE)
    assert torch.equal(images, all_read(tiny, folder, SIZE))
    [path] = caches(tiny)
    assert np.array_equal(np.load(path), images.numpy())
    before, status = identity(path), (folder / "000003.jpg").stat()
    (folder / "000003.jpg").write_bytes(b"x" * status.st_size)  # whoever decoded now would stumble
    os.utime(folder / "000003.jpg", ns=(status.st_atime_ns, status.st_mtime_ns))
    again, same_key = load_faces(tiny, SIZE)
    assert torch.equal(images, again) and key == same_key
    assert caches(tiny) == [path] and identity(path) == before


def test_other_files_another_size_or_number_have_a_cache_of_their_own(tiny, folder):
    """Another run may need the old one, now or when it is resumed."""
    draw_faces(folder, 12)
    tiny.DATA_DIR = str(folder)
    keys, paths = [], []

    def decoded_again(count, size=SIZE):
        images, key = load_faces(tiny, size)
        [path] = set(caches(tiny)) - set(paths)
        assert images.shape == (count, 3, size, size)
        assert torch.equal(images, all_read(tiny, folder, size))
        assert key not in keys
        keys.append(key)
        paths.append(path)

    decoded_again(12)
    tiny.draw_face(random.Random(99)).save(folder / "000012.jpg")
    decoded_again(13)
    tiny.draw_face(random.Random(98)).save(folder / "000000.jpg")
    decoded_again(13)
    (folder / "000000.jpg").rename(folder / "zzz.jpg")
    decoded_again(13)
    (folder / "000001.jpg").unlink()
    decoded_again(12)
    tiny.MAX_IMAGES = 9
    decoded_again(9)
    decoded_again(9, 64)
    tiny.MAX_IMAGES = None
    before = [identity(path) for path in paths]
    load_faces(tiny, SIZE)
    assert caches(tiny) == sorted(paths) and [identity(path) for path in paths] == before


def test_a_folder_has_one_cache_by_whatever_path_it_is_given(tiny, all_faces, monkeypatch):
    load_faces(tiny, SIZE)
    [path] = caches(tiny)
    before = identity(path)
    for data_dir in ("./faces/", "faces/../faces", all_faces):
        tiny.DATA_DIR = str(data_dir)
        load_faces(tiny, SIZE)
        assert caches(tiny) == [path] and identity(path) == before


def test_the_same_files_in_two_folders_have_a_cache_each(tiny, folder, all_faces):
    shutil.copytree(all_faces, folder, dirs_exist_ok=True)  # with their times of change
    key = load_faces(tiny, SIZE)[1]
    tiny.DATA_DIR = str(folder)
    assert load_faces(tiny, SIZE)[1] == key
    assert len(caches(tiny)) == 2


def test_a_damaged_cache_is_built_again_and_bytes_after_the_last_image_are_no_damage(tiny, capsys):
    """fuzz.py tries more: headers that are whole, and say what no cache is."""
    images = load_faces(tiny, SIZE)[0].clone()
    [path] = caches(tiny)
    good = path.read_bytes()
    magic = bytes([good[0] ^ 4]) + good[1:]
    damages = {"empty": b"", "half": good[: len(good) // 2], "short": good[:-1], "magic": magic}
    for what, damaged in damages.items():
        path.write_bytes(damaged)
        capsys.readouterr()
        assert torch.equal(load_faces(tiny, SIZE)[0], images), what
        said = capsys.readouterr().out
        assert "is damaged (" in said and "decoding the images again" in said, what
        assert path.read_bytes() == good, what

    path.write_bytes(good + b"more")
    before = identity(path)
    assert torch.equal(load_faces(tiny, SIZE)[0], images) and identity(path) == before


READ_ONLY = """
mount --bind data/cache data/cache
mount -o remount,ro,bind data/cache
if touch data/cache/x 2>/dev/null; then exit 99; fi
"""


def test_a_cache_in_a_folder_that_cannot_be_written_is_used(tiny, workplace):
    load_faces(tiny, SIZE)
    [path] = caches(tiny)
    before = identity(path)
    cache = workplace / "data/cache"
    before_it = own_mounts(READ_ONLY) if os.geteuid() == 0 else ()  # modes do not stop root
    cache.chmod(0o555)
    try:
        succeed(*flags(DATA_DIR="faces", EPOCHS=1), cwd=workplace, before=before_it)
    finally:
        cache.chmod(0o755)
    assert (workplace / "output/generator.pt").exists()
    assert caches(tiny) == [path] and identity(path) == before


def test_a_cache_larger_than_the_memory_is_mapped(tiny, folder):
    memory = psutil.virtual_memory().total + psutil.swap_memory().total
    row = 3 * 64**2
    images = memory // row + 10
    path = folder / "faces.npy"
    with open(path, "wb") as file:
        file.truncate(2**20)
        if path.stat().st_blocks * 512 >= 2**20:
            pytest.skip("the file system has no sparse files")
        about = {"descr": "|u1", "fortran_order": False, "shape": (images, 3, 64, 64)}
        np.lib.format.write_array_header_1_0(file, about)
        start_of_rows = file.tell()
        file.truncate(start_of_rows + images * row)
    assert path.stat().st_size > memory > path.stat().st_blocks * 512

    reader = tiny.FaceFolder(folder, [], 64)
    reader.cache = path
    faces = reader.open_cache()
    assert faces.shape == (images, 3, 64, 64)
    ends = torch.tensor([0, 1, images - 2, images - 1])
    assert not faces.index_select(0, ends).any()
    with open(path, "r+b", buffering=0) as file:
        for value, index in enumerate(ends.tolist(), start=1):
            file.seek(start_of_rows + index * row)
            file.write(bytes([value]) * row)
    # What is written to the file is seen in the images, so they are the file and no copy.
    for value, face in enumerate(faces.index_select(0, ends), start=1):
        assert (face == value).all()
    assert not faces[images // 2].any() and not faces[2].any() and not faces[-3].any()


def test_the_number_of_workers_changes_nothing(tiny, folder, all_faces):
    for number in range(130):
        os.link(all_faces / f"{number % 40:06d}.jpg", folder / f"{number:03d}.jpg")
    data = (folder / "005.jpg").read_bytes()
    (folder / "005.jpg").unlink()  # a link to the file that others use
    (folder / "005.jpg").write_bytes(data[:-3000])
    tiny.DATA_DIR = str(folder)
    one = load_faces(tiny, SIZE)[0].clone()
    [path] = caches(tiny)
    path.unlink()
    tiny.WORKERS = 2
    assert len(one) == 129
    assert torch.equal(load_faces(tiny, SIZE)[0], one)


def test_a_killed_decode_is_done_again_and_by_one_of_two_processes_only(tiny, folder):
    photo(1600, 1600).save(folder / "0.png", compress_level=0)
    for number in range(1, 19):
        os.link(folder / "0.png", folder / f"{number}.png")
    (folder / "damaged.png").touch()
    here = folder.parent
    arguments = flags(DATA_DIR=folder, EPOCHS=1)
    with start(*arguments, cwd=here) as killed:
        until(lambda: list(here.glob("data/cache/*.part")), killed)
        killed.send_signal(signal.SIGKILL)
        killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    [part] = caches(tiny)
    assert part.suffix == ".part"

    outputs = ("one", "two")
    runs = [start(*arguments, "--output-dir", name, cwd=here) for name in outputs]
    spoken = [process.communicate(timeout=300) for process in runs]
    assert [process.returncode for process in runs] == [0, 0], spoken
    assert sum("skipped 1 of 20" in out for out, _ in spoken) == 1  # who decodes says so
    [path] = caches(tiny)
    assert path.suffix == ".npy"
    assert len({(here / name / "samples/epoch_001.png").read_bytes() for name in outputs}) == 1


SPAWN = """
import multiprocessing
import dcgan
if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    dcgan.DATA_DIR, dcgan.BATCH_SIZE, dcgan.WORKERS = "faces", 8, 1
    dcgan.find_faces(dcgan.data_folder(), 32).load()
"""


def test_workers_may_be_spawned_as_on_windows_and_macos(tiny, workplace):
    (workplace / "spawn.py").write_text(SPAWN)
    succeed(cwd=workplace, program=["spawn.py"], fresh=True)
    [path] = caches(tiny)
    made = identity(path)
    images = load_faces(tiny, SIZE)[0]
    assert identity(path) == made
    assert torch.equal(images[7], tiny.read_face("faces/000007.jpg", SIZE))


UNDECIDED = """
import multiprocessing, sys
import dcgan
dcgan.WORKERS = int(sys.argv[1])
faces = dcgan.FaceFolder(dcgan.Path("faces"), [("000000.jpg", 0, 0)], 32)
assert len(list(faces.decode())) == 1
multiprocessing.set_start_method("spawn")
"""


@pytest.mark.parametrize("workers", [0, 1])
def test_how_workers_start_is_still_to_be_chosen_after_a_decoding(workplace, workers):
    succeed(workers, cwd=workplace, program=["-c", UNDECIDED])


SMALL_DISK = """
mkdir small
mount -t tmpfs -o size=1m none small
mount --bind -o ro "$(readlink -f faces)" images
"""
TWICE = """
import sys
import dcgan
arguments = sys.argv[1:]
print("exit", dcgan.main([*arguments, "--cache-dir", "small/cache"]))
print("exit", dcgan.main(arguments))
"""


def test_a_small_disk_is_announced_before_decoding_and_images_may_be_read_only(tiny, folder):
    settings = flags(DATA_DIR="images", IMAGE_SIZE=128, EPOCHS=1)
    options = {"program": ["-c", TWICE], "before": own_mounts(SMALL_DISK)}
    done = run(*settings, cwd=folder.parent, **options)
    assert done.returncode == 0, done.stderr
    [error] = done.stderr.splitlines()
    needed, free = map(float, re.search(r" ([\d.]+) MiB.* ([\d.]+) MiB", error).groups())
    assert needed == pytest.approx(40 * 3 * 128**2 / 2**20, rel=0.05) and free <= 1
    assert re.findall(r"exit (\d)", done.stdout) == ["1", "0"]
    assert "skipped" not in done.stdout
    assert (folder.parent / "output/generator.pt").exists()
    assert len(caches(tiny)) == 1


# ------------------------------------------------------------------------------------------ batches


@pytest.fixture
def numbered(tiny):
    """(dcgan, a function that makes Batches of 50 images, each filled with its own number)."""
    numbers = torch.arange(50, dtype=torch.uint8).view(50, 1, 1, 1)
    images = numbers.expand(50, 3, SIZE, SIZE).contiguous()
    return tiny, lambda: tiny.Batches(images, torch.device("cpu"))


def same(one, two):
    """Whether two lists of batches hold the same."""
    pairs = [(a, b) for x, y in zip(one, two) for a, b in zip(x, y)]
    return len(one) == len(two) and all(torch.equal(a, b) for a, b in pairs)


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
    latents = torch.cat([latent for epoch in whole for _, _, latent, *_ in epoch])
    assert len(latents.unique(dim=0)) == 96
    assert latents.std().item() == pytest.approx(1, abs=0.1)


def test_an_epoch_shows_each_image_once_at_most_and_epochs_differ(numbered):
    _, make = numbered
    shown = [[faces[:, 0, 0, 0] for faces, *_ in make().epoch(epoch)] for epoch in range(20)]
    orders = [tuple(torch.cat(faces).tolist()) for faces in shown]
    assert all(len(order) == len(set(order)) == 48 for order in orders)
    assert len(set(orders)) == 20
    assert set().union(*orders) == set(range(50))  # no image is left out for good


def test_half_of_the_images_are_flipped(numbered):
    _, make = numbered
    flips = torch.cat([flips for epoch in range(20) for _, flips, *_ in make().epoch(epoch)])
    assert flips.shape == (960, 1, 1, 1)
    assert flips.float().mean().item() == pytest.approx(0.5, abs=0.08)


def test_none_are_flipped_without_mirror_and_all_else_stays(numbered):
    dcgan, make = numbered
    before = list(make().epoch(3))
    dcgan.MIRROR = False
    for (faces, flips, *rest), (same_faces, _, *same_rest) in zip(make().epoch(3), before):
        assert not flips.any() and torch.equal(faces, same_faces)
        assert all(map(torch.equal, rest, same_rest))


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_share_of_the_images_is_changed_and_the_rest_is_as_without(numbered, share):
    dcgan, make = numbered
    dcgan.AUGMENT = 0
    plain = [step for epoch in range(20) for step in make().epoch(epoch)]
    assert all(len(step) == 3 for step in plain)
    dcgan.AUGMENT = share
    steps = [step for epoch in range(20) for step in make().epoch(epoch)]
    assert same([step[:3] for step in steps], plain)
    if share:
        changes = torch.cat([changes for *_, changes in steps])
        assert changes.shape == (960, 2, 5) and changes.abs().max() <= 1
        changed = changes.ne(0).all(2)
        assert torch.equal(changed, changes.ne(0).any(2))  # all of an image, or nothing
        assert changed.float().mean().item() == pytest.approx(share, abs=0.04)
        assert not torch.equal(*changes.unbind(1))  # reals and fakes: each their own


def test_the_fewer_images_there_are_the_more_are_changed(numbered):
    dcgan, make = numbered
    shares = [dcgan.augment_share(images) for images in (8, 200, 600, 1_000, 202_599)]
    assert shares == [0.3, 0.3, 0.15, 0, 0] and make().augment == 0.3
