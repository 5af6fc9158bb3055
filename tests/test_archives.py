"""Zips and other archives: unpacked once, whole or not at all, never outside of their folder."""

import os
import shutil
import tarfile
import time
import zipfile
from multiprocessing.pool import ThreadPool
from pathlib import Path

import pytest
from conftest import files, flags, refused
from PIL import Image

import dcgan


def names(pattern):
    return [pattern.format(number) for number in range(5)]


def zipped(pattern="inner/{}.png"):
    """photos.zip, with five images of these names, written as they are."""
    with zipfile.ZipFile("photos.zip", "w") as archive:
        for number, name in enumerate(names(pattern)):
            with archive.open(name, "w") as file:
                Image.new("RGB", (8, 8), (50 * number, 0, 0)).save(file, "PNG")


def unpacked(place="photos.zip"):
    folder = dcgan.prepare_data(place)
    paths = [path for path, _ in dcgan.FaceFolder(folder).samples]
    assert len({Image.open(path).getpixel((0, 0)) for path in paths}) == 5, "not whole"
    return folder, sorted(os.path.relpath(path, folder / "images") for path in paths)


def test_a_zip_is_unpacked_once_beside_a_folder_of_its_name_and_anew_if_changed(tiny, workplace):
    shutil.copytree("faces", "photos")
    zipped()
    folder, found = unpacked()
    assert found == names("inner/{}.png") and files("photos").keys() == files("faces").keys()
    os.utime(folder / "images/inner/0.png", (1, 1))
    assert unpacked()[0] == folder and (folder / "images/inner/0.png").stat().st_mtime == 1
    zipped("other/{}.png")
    os.utime("photos.zip", (1, 1))
    assert unpacked()[1] == names("other/{}.png")


def test_two_runs_unpack_a_zip_once(tiny, workplace, monkeypatch):
    zipped()
    extract, calls = zipfile.ZipFile.extract, []

    def slow(*arguments):
        calls.append(arguments)
        time.sleep(0.1)
        return extract(*arguments)

    monkeypatch.setattr(zipfile.ZipFile, "extract", slow)
    with ThreadPool(2) as pool:
        folders = pool.map(dcgan.prepare_data, ["photos.zip"] * 2)
    assert len(calls) == 5 and folders == [unpacked()[0]] * 2
    assert [path.name for path in folders[0].iterdir()] == ["images"]


@pytest.mark.parametrize("form, suffix", [("tar", ".tar"), ("gztar", ".TAR.GZ"), ("zip", ".ZIP")])
def test_other_archives_are_unpacked(tiny, workplace, form, suffix):
    zipped()
    os.rename(shutil.make_archive("made", form, unpacked()[0] / "images"), "x" + suffix)
    assert unpacked("x" + suffix)[1] == names("inner/{}.png")


ODD = {
    "of Windows": (r"a\cat\{}.png", "a/cat/{}.png"),
    "zip-slip": ("../../{}.png", "{}.png"),
    "zip-slip of Windows": (r"..\..\{}.png", "{}.png"),
    "absolute": ("/tmp/dcgan/{}.png", "tmp/dcgan/{}.png"),
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_names_are_unpacked_in_their_folders_and_never_outside(tiny, workplace, kind):
    pattern, wanted = ODD[kind]
    zipped(pattern)
    folder, found = unpacked()
    assert found == names(wanted)
    assert {*os.listdir()} == {"faces", "photos.zip", folder.name}


def test_names_that_a_mac_has_written_are_right(tiny, workplace):
    zipped("caf##/{}.png")
    archive = Path("photos.zip")
    archive.write_bytes(archive.read_bytes().replace(b"caf##", "café".encode()))
    assert unpacked()[1] == names("café/{}.png")


def test_names_too_long_for_the_disk_are_counted(tiny, workplace, capsys):
    zipped()
    with zipfile.ZipFile("photos.zip", "a") as archive:
        for name in ("é" * 128 + ".png", "x" * 300 + "/a.png"):
            archive.write(tiny.DATA_DIR + "/000000.jpg", name)
        archive.write(tiny.DATA_DIR + "/000000.jpg", "__MACOSX/" + "é" * 120 + ".png")
    assert unpacked()[1] == names("inner/{}.png")
    assert "photos.zip: 2 files whose names are too long" in capsys.readouterr().out


REFUSED = {
    "photos.7z": lambda data: b"7z\xbc\xaf\x27\x1c" * 50,
    "photos.rar": lambda data: b"Rar!\x1a\x07" * 50,
    "photos.zip.001": lambda data: data[:300],
    "photo.jpg": lambda data: b"\xff\xd8\xff\xe0",
    "cut.zip": lambda data: data[:-200],
    "texts.zip": lambda data: data.replace(b".png", b".txt"),
    "damaged.zip": lambda data: data.replace(b"IDAT", b"IDXX"),
}


@pytest.mark.parametrize("name", [*REFUSED, "missing.zip", "slip.tar"])
def test_what_cannot_be_unpacked_is_one_line_and_leaves_no_folder(tiny, workplace, capsys, name):
    zipped()
    if name in REFUSED:
        (workplace / name).write_bytes(REFUSED[name]((workplace / "photos.zip").read_bytes()))
    with tarfile.open("slip.tar", "w") as archive:
        archive.add("photos.zip", "../../../slipped.jpg")
    before = {*os.listdir()}
    refused(capsys, *flags(DATA_DIR=name), words=[name])
    assert {*os.listdir()} == before and not (workplace.parent / "slipped.jpg").exists()


@pytest.mark.parametrize("place", ["photos.zip", "data/demo"])
def test_a_folder_is_filled_at_once_or_not_at_all(tiny, workplace, monkeypatch, place):
    monkeypatch.setattr(dcgan, "progress_bar", lambda items, *about: items[:5])
    zipped()
    owner, name = (zipfile.ZipFile, "extract") if "zip" in place else (Image.Image, "save")
    calls, whole = iter(range(9)), getattr(owner, name)

    def stopped(*arguments, **options):
        if next(calls) == 3:
            raise KeyboardInterrupt
        return whole(*arguments, **options)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(owner, name, stopped)
        dcgan.prepare_data(place)
    unpacked(place)
