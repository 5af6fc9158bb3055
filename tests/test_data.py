"""The data: what is an image, how it is decoded, the cache of decoded images, and the batches."""

import os
import shutil

import numpy as np
import pytest
import torch
from conftest import draw_faces, flags, refused, same
from PIL import Image, ImageOps

import dcgan


@pytest.fixture
def folder(tiny, tmp_path):
    (tmp_path / "images").mkdir()
    return tmp_path / "images"


def put(folder, *names, colour="red", side=40, form="PNG"):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (side, side), colour).save(folder / name, form)


def load(folder, size=32):
    """What `load_faces` returns. Its faces have to be those of its paths."""
    faces, paths, key = dcgan.load_faces(folder, size)
    for face, path in zip(faces, paths, strict=True):
        assert face.numpy().tobytes() == dcgan.read_face(Image.open(path), size), (
            f"not the face of {path}"
        )
    return faces, paths, key


def read(path):
    face = dcgan.read_face(Image.open(path), 32)
    return np.frombuffer(face, np.uint8).reshape(3, 32, 32).astype(float)


def test_images_are_found_at_any_depth_and_what_is_left_out_is_counted(folder, capsys):
    wanted = [
        "0.jpg",
        "a/1.JPG",
        "a/b/c/2.jfif",
        "#4.webp",
        "@b/c.png",
        "a\nb.png",
        os.fsdecode(b"\xff.png"),
    ]
    beside = [".h.jpg", ".thumbnails/1.jpg", "a/._1.jpg", "__MACOSX/a/x.jpg", "a/@eaDir/1.jpg"]
    put(folder, *wanted, *beside, "#recycle/1.jpg", "@Recycle/1.jpg", "$RECYCLE.BIN/1.jpg")
    for name in ("a.heic", "b.HEIC", "README", "3.jpg", "list.csv", "notes.txt", ".hidden.heic"):
        (folder / name).write_bytes(b"no image")
    os.mkfifo(folder / "pipe.jpg")  # opened, it would be waited for
    (folder / "nowhere.jpg").symlink_to("missing.jpg")
    assert {os.path.relpath(path, folder) for path in load(folder)[1]} == {*wanted}
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and said.startswith("images: 7; left out: ")
    assert all(kind in said for kind in ("2 .heic", "1 without extension", "1 broken"))


@pytest.mark.parametrize("number, words", [(0, [".heic"]), (7, ["7", "BATCH_SIZE", "8"])])
def test_too_few_images_are_refused_with_what_there_is(folder, capsys, number, words):
    draw_faces(folder, number)
    (folder / "x.heic").touch()
    refused(capsys, *flags(DATA_DIR=folder), words=words)
    assert not os.path.exists("output")


def test_files_with_several_pictures_are_counted_and_their_first_one_is_used(folder, capsys):
    pictures = [Image.new("RGB", (40, 40), colour) for colour in ("red", "blue", "blue")]
    for name in ("a.tif", "b.gif", "c.webp", "d.png"):
        pictures[0].save(folder / name, save_all=True, append_images=pictures[1:])
    pictures[0].save(folder / "e.tif")
    pictures[0].save(folder / "f.gif")
    red = load(folder)[0].float().mean((2, 3))
    assert "of 4 files with several pictures" in capsys.readouterr().out
    assert (red[:, 0] > 200).all() and (red[:, 2] < 50).all()


def test_a_file_with_several_links_is_one_image(folder, all_faces):
    (folder / "blobs").symlink_to(all_faces)  # as in the cache of Hugging Face
    (folder / "snapshots").mkdir()
    for name in os.listdir(all_faces):
        (folder / "snapshots" / name).symlink_to(f"../blobs/{name}")
    (folder / "circle").symlink_to(folder)
    assert len(dcgan.FaceFolder(folder).samples) == 40


@pytest.mark.parametrize("border", [(64, 0), (0, 64)])
def test_the_centre_square_is_taken_and_small_detail_averaged(tmp_path, border):
    chessboard = np.indices((256, 256)).sum(0) % 2 * 255
    image = Image.fromarray(chessboard.astype(np.uint8)).convert("RGB")
    ImageOps.expand(image, border, "red").save(tmp_path / "x.png")
    assert abs(read(tmp_path / "x.png")[:, 1:-1, 1:-1] - 127.5).max() < 9, "black, white or red"


def test_a_large_jpeg_is_decoded_at_an_eighth(all_faces, tmp_path, monkeypatch):
    Image.open(all_faces / "000000.jpg").resize((1200, 1000)).save(tmp_path / "x.jpg")
    crop, sizes = dcgan.center_crop, []
    monkeypatch.setattr(dcgan, "center_crop", lambda *of: sizes.append(of[0].size) or crop(*of))
    assert read(tmp_path / "x.jpg").std() > 20 and sizes == [(150, 125)]


def test_a_turned_photo_is_set_upright(tmp_path):
    image = ImageOps.expand(Image.new("RGB", (60, 60), "blue"), (0, 0, 0, 60), "red")
    exif = Image.Exif()
    exif[0x0112] = 6
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "x.jpg", exif=exif, quality=95)
    face = read(tmp_path / "x.jpg")
    assert face[2, :14].min() > 200 and face[0, 18:].min() > 200


@pytest.mark.parametrize(
    "name, mode, colour, value",
    [
        ("clear.png", "RGBA", (255, 0, 255, 0), 255),
        ("half.png", "RGBA", (0, 0, 0, 128), 127),
        ("palette.gif", "P", 0, 255),
        ("one-colour.png", "RGB", (255, 0, 255), 255),
        ("grey.png", "L", 99, 99),
    ],
)
def test_transparency_lies_on_white_and_all_is_rgb(tmp_path, name, mode, colour, value):
    options = {"transparency": colour} if mode in ("P", "RGB") else {}
    Image.new(mode, (40, 40), colour).save(tmp_path / name, **options)
    assert (read(tmp_path / name) == value).all()


def test_broken_images_are_listed_and_paths_stay_those_of_the_rest(folder, capsys):
    draw_faces(folder, 12)
    cut = (folder / "000003.jpg").read_bytes()[:-2000]
    broken = {"000003.jpg": cut, "000004x.jpg": b"<html>", "a.png": b""}
    for name, content in broken.items():
        (folder / name).write_bytes(content)
    deep = {"b.png": "I;16", "c.tif": "F", "d.tif": "I"}  # more than 8 bits, which would be clipped
    for name, mode in deep.items():
        Image.new(mode, (40, 40)).save(folder / name)
    for _ in ("decoded", "from the cache"):
        paths = load(folder)[1]
        assert {*map(os.path.basename, paths)} == {*os.listdir(folder)} - {*broken, *deep}
        count, _, report = capsys.readouterr().out.rpartition(" broken, listed in ")
        assert count.endswith("images: 11; left out: 6")
        lines = (folder.parent / report.strip()).read_text().splitlines()
        assert all(name in line for name, line in zip([*broken, *deep], lines, strict=True))
    (folder.parent / report.strip()).unlink()  # README: any file of the cache may be deleted
    assert len(load(folder)[0]) == 11


@pytest.mark.parametrize("name", ["a\nb.png", "a\u2028b.png", os.fsdecode(b"a\xffb.png")])
def test_a_broken_image_may_have_an_odd_name(folder, name):
    put(folder, "1.png", "2.png")
    (folder / name).touch()
    for _ in ("decoded", "from the cache"):
        assert len(load(folder)[0]) == 2


def test_more_broken_images_than_good_ones_are_refused(folder):
    put(folder, "1.png", "2.png")
    for name in ("3.png", "4.png", "5.png"):
        assert len(load(folder)[0]) == 2
        (folder / name).touch()
    with pytest.raises(OSError, match=r"3 of 5 .*3\.png"):
        load(folder)


@pytest.mark.parametrize("side, large, fits", [(100, 1, 64), (28, 1, 32), (28, 40, None)])
def test_many_small_images_are_told_with_the_size_that_fits(tmp_path, capsys, side, large, fits):
    put(tmp_path, "large.png", side=200)
    put(tmp_path, "small.png", side=side)
    dcgan.check_sizes(([tmp_path / "large.png"] * large + [tmp_path / "small.png"]) * 64, 128)
    said = capsys.readouterr().out
    assert f"({side} pixels)" in said and f"--image-size {fits} " in said if fits else said == ""


def test_images_are_decoded_once_also_if_moved_or_read_only(folder, monkeypatch):
    draw_faces(folder, 10)
    faces, _, key = load(folder)
    folder.rename(folder.parent / "moved")

    def read_only(file, mode="r", *rest, open=open, **options):
        assert not set(mode) & set("wax+"), f"{file} is opened for writing"
        return open(file, mode, *rest, **options)

    monkeypatch.setattr("builtins.open", read_only)
    again, _, same_key = load(folder.parent / "moved")
    assert torch.equal(again, faces) and key == same_key
    next(folder.parent.glob("data/cache/*.bin")).write_bytes(bytes(faces.numel()))
    assert not again.any()  # it is the file itself, not a copy in memory


CHANGES = {"time": ("1.bmp", 40, 2), "size": ("1.bmp", 50, 1), "name": ("-.bmp", 40, 1)}


@pytest.mark.parametrize("what", CHANGES)
def test_edited_more_or_larger_images_are_decoded_again(folder, what, monkeypatch):
    def edit(name, side, time, colour):
        put(folder, name, colour=colour, side=side, form="BMP")
        os.utime(folder / name, (time, time))
        return load(folder)[2]

    edit("0.bmp", 40, 1, "red")
    key = edit("1.bmp", 40, 1, "red")
    (folder / "1.bmp").unlink()
    assert (edit(*CHANGES[what], "blue") == key) == (what == "time")  # as in copies
    load(folder, 64)
    monkeypatch.setattr(dcgan, "MAX_IMAGES", 1)
    assert len(load(folder)[0]) == 1


def test_a_full_disk_is_named_before_anything_is_decoded(folder, monkeypatch, capsys):
    put(folder, "1.png", "2.png")
    usage = shutil.disk_usage(folder)._replace(free=2 * 3 * 32**2 - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    refused(capsys, *flags(DATA_DIR=folder), status=1, words=["GB", folder.parent])
    assert not os.path.exists("data")


def test_a_stopped_decoding_leaves_nothing_half(folder, monkeypatch):
    draw_faces(folder, 10)

    def stopped(items, *rest):
        yield from (item for item, _ in zip(items, range(7)))
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(dcgan, "progress_bar", stopped)
        load(folder)
    assert not [*folder.parent.glob("data/cache/*")]
    assert len(load(folder)[0]) == 10


def steps(number=50, epochs=1, first=0):
    """All steps of some epochs of images and labels that hold their own number."""
    numbers = torch.arange(number)
    faces = numbers.to(torch.uint8).view(number, 1, 1, 1)
    batches = dcgan.Batches(faces, numbers.view(number, 1).float(), torch.device("cpu"))
    return [step for epoch in range(epochs) for step in batches.epoch(epoch, first)]


def test_an_epoch_shows_each_image_once_with_its_label_and_epochs_differ(tiny):
    faces, _, latents, _ = map(torch.cat, zip(*steps(epochs=20)))
    orders = faces.view(20, 48).tolist()
    assert all(len(set(order)) == 48 for order in orders)
    assert set().union(*orders) == set(range(50))  # no image is left out for good
    assert torch.equal(faces.flatten(), latents[:, -1].to(torch.uint8))
    assert latents.shape == (960, tiny.LATENT_SIZE + 1) and len(latents[:, 0].unique()) == 960


def test_an_epoch_resumed_in_its_middle_goes_on_as_it_would_have(tiny, monkeypatch):
    whole = steps()
    for first in torch.randperm(6).tolist():  # PyTorch's own random state is of no account
        assert same(steps(first=first), whole[first:]), f"resumed at step {first}: other batches"
    monkeypatch.setattr(tiny, "SEED", 1)
    assert not same(steps(), whole)


def test_half_of_the_images_are_mirrored_or_none_and_all_else_stays(tiny, monkeypatch):
    faces, half, latents = map(torch.cat, zip(*steps(1_600)))
    assert half.float().mean().item() == pytest.approx(0.5, abs=0.05), "share of mirrored images"
    monkeypatch.setattr(tiny, "MIRROR", False)
    same_faces, none, same_latents = map(torch.cat, zip(*steps(1_600)))
    assert not none.any() and same([faces, latents], [same_faces, same_latents])


@pytest.mark.parametrize("number, share", [(80, 0.3), (600, 0.15), (1_000, 0)])
def test_the_fewer_images_there_are_the_more_are_changed(tiny, monkeypatch, number, share):
    changes = steps(number, epochs=8)
    monkeypatch.setattr(tiny, "AUGMENT", 0.0)
    assert same(steps(number, epochs=8), [step[:3] for step in changes])
    monkeypatch.setattr(tiny, "AUGMENT", share)
    assert same(steps(number, epochs=8), changes)
    if share:
        changes = torch.cat([step[3] for step in changes])
        changed = changes.ne(0).all(2)
        assert torch.equal(changed, changes.ne(0).any(2))  # all of an image, or nothing
        assert changed.float().mean().item() == pytest.approx(share, abs=0.05)
        reals, fakes = changes.abs().unbind(1)
        assert not torch.equal(reals, fakes) and 0.9 < reals.max() < 1


def test_shares_of_several_processes_are_the_batch_of_one(tiny, monkeypatch):
    whole, shares = steps(), []
    monkeypatch.setattr(tiny, "WORLD_SIZE", 4)
    for rank in range(4):
        monkeypatch.setattr(tiny, "RANK", rank)
        shares.append(steps())
    for step, *parts in zip(whole, *shares, strict=True):
        for tensor, *pieces in zip(step, *parts, strict=True):
            rows = torch.cat(pieces).flatten(1).tolist()
            assert sorted(rows) == sorted(tensor.flatten(1).tolist()), "the shares overlap"
