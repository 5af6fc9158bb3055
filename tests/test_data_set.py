"""A run belongs to its data set, and no file of a folder is left out silently."""

import os
import shutil
import zipfile
from pathlib import Path

import pytest
from conftest import draw_faces, flags, own_mounts, refused, run, succeed
from PIL import Image
from reading import checkpoint, table

# ------------------------------------------------------------------------ which images a run has


@pytest.fixture
def folder(tiny, workplace):
    """A copy of the faces, on which a run of one epoch in `output` has been trained."""
    shutil.copytree(workplace / "faces", workplace / "photos")
    assert tiny.main(["--data-dir", "photos", "--epochs", "1"]) == 0
    return workplace / "photos"


def others(folder):
    """A folder of images that are no faces."""
    folder.mkdir()
    for index in range(40):
        Image.new("RGB", (40, 40 + index), (index, 0, 0)).save(folder / f"{index}.png")
    return folder


def train(dcgan, capsys, *arguments):
    """What a run says that has to succeed."""
    capsys.readouterr()
    assert dcgan.main(list(map(str, arguments))) == 0
    return capsys.readouterr().out


def test_copies_of_the_same_images_are_the_same_data_set(tiny, folder, workplace, capsys):
    copies = workplace / "elsewhere/deeper"
    shutil.copytree(folder, copies)
    for path in copies.iterdir():
        os.utime(path, (1, 1))
    said = train(tiny, capsys, "--data-dir", copies.parent, "--epochs", 2)
    assert "resuming from" in said and "other images" not in said
    assert [row["best"] for row in table("output/quality.csv")][0] == "1"
    shutil.rmtree(folder)
    said = train(tiny, capsys, "--data-dir", "elsewhere", "--epochs", 3)
    assert "resuming from" in said and "other images" not in said


def test_other_images_in_the_same_folder_go_on_and_the_best_is_looked_for_anew(
    tiny, folder, monkeypatch, capsys
):
    shutil.rmtree(folder)
    others(folder)
    # Against other images, a distance says nothing: even a much larger one is the best so far.
    monkeypatch.setattr(tiny, "face_distance", lambda *_: 1e6)
    said = train(tiny, capsys, "--data-dir", folder, "--epochs", 2)
    assert f"{folder} holds other images than at the checkpoint" in said and "resuming" in said
    first, second = table("output/quality.csv")
    assert (first["best"], second["best"]) == ("1", "2")
    assert float(second["floor"]) == 1e6 != float(first["floor"])
    assert checkpoint(name="generator.pt")["epoch"] == 2
    said = train(tiny, capsys, "--data-dir", folder, "--epochs", 3)
    assert "other images" not in said
    assert [row["best"] for row in table("output/quality.csv")] == ["1", "2", "3"]


@pytest.mark.parametrize("epochs", [1, 2])
def test_another_folder_with_other_images_is_refused_finished_or_not(
    tiny, folder, workplace, capsys, epochs
):
    others(workplace / "shapes")
    before = {path: path.read_bytes() for path in Path("output").rglob("*") if path.is_file()}
    line = refused(capsys, "--data-dir", "shapes", "--epochs", epochs)
    for words in (str(folder), str(workplace / "shapes"), str(workplace / "output"), "OUTPUT_DIR"):
        assert words in line
    assert {path: path.read_bytes() for path in before} == before
    assert not list(Path("data/cache").glob("*-64.npy"))
    assert len(list(Path("data/cache").glob("*.npy"))) == 1  # nothing was decoded for it


def test_a_checkpoint_of_the_version_before_goes_on(tiny, folder, capsys):
    """Its key was another, and its folder stands in its settings, as the user wrote it."""
    import torch

    for name in ("checkpoint.pt", "generator.pt"):
        state = checkpoint(name=name)
        state.pop("older", None)
        if "data" in state:
            state["data"] = "0" * 64
            state["settings"]["DATA_DIR"] = "photos"
        else:
            del state["settings"]["DATA_DIR"]
        torch.save(state, f"output/{name}")
    assert "resuming" in train(tiny, capsys, "--data-dir", "photos", "--epochs", 2)
    assert tiny.main(["generate", "--num-images", "1"]) == 0


def test_evaluate_takes_the_images_of_the_run_unless_told_otherwise(tiny, folder, capsys):
    others(folder.parent / "shapes")
    command = ["evaluate", "--num-images", "2048"]
    assert f"{folder} holds 40 images; FID needs" in refused(capsys, *command)
    line = refused(capsys, *command, "--data-dir", "shapes")
    assert f"{folder.parent / 'shapes'} holds 40 images" in line


def test_a_kaggle_data_set_that_is_not_celeba_has_a_folder_of_its_own(tiny, workplace):
    tiny.DATA_DIR = tiny.CELEBA_DIR
    assert tiny.data_folder() == workplace / "data/celeba"
    tiny.KAGGLE_DATASET = "someone/cats"
    assert tiny.data_folder() == workplace / "data/kaggle/someone/cats"
    tiny.DATA_DIR = "photos"
    assert tiny.data_folder() == workplace / "photos"


# ----------------------------------------------------------------------------- what is left out

# All that Pillow writes and reads again, whatever its name.
FORMATS = {
    "photo.jfif": "JPEG",
    "photo.jpe": "JPEG",
    "no extension": "JPEG",
    "odd.name.123": "PNG",
    "wrong.txt": "PNG",
    "moving.gif": "GIF",
    "new.avif": "AVIF",
    "scan.tga": "TGA",
    "scan.jp2": "JPEG2000",
    "sprite.ico": "ICO",
    "old.pcx": "PCX",
    "old.dds": "DDS",
    "LOUD.JPEG": "JPEG",
}


def mixture(folder):
    """A folder of 40 drawn faces, of images with odd names, and of files that are none."""
    draw_faces(folder, 40)
    face = Image.open(folder / "000000.jpg").resize((64, 64))
    for name, form in FORMATS.items():
        if form in Image.SAVE:
            face.save(folder / name, form)
    for name in ("a.heic", "b.HEIC", "notes.txt", "labels.csv", "README", ".hidden.jpg"):
        (folder / name).write_bytes(b"no image at all")
    (folder / "__MACOSX").mkdir()
    (folder / "__MACOSX/._a.jpg").write_bytes(b"no image at all")
    return folder


def test_what_pillow_opens_is_used_and_the_rest_is_counted_in_the_first_line(
    tiny, tmp_path, capsys
):
    Image.init()
    folder = mixture(tmp_path / "mixture")
    images = 40 + sum(form in Image.SAVE for form in FORMATS.values())
    (folder / "broken.jpg").write_bytes(b"<html>not found</html>")
    arguments = ["--data-dir", folder, "--epochs", 1]
    said = train(tiny, capsys, *arguments)
    (first,) = [line for line in said.splitlines() if "steps per epoch" in line]
    assert f"; {images} images, " in first
    counted = first.partition("; left out: ")[2].split(", ")
    wanted = {"2 .heic", "1 .txt", "1 .csv", "1 without extension", "2 hidden", "1 broken"}
    assert set(counted) == wanted
    files = sum(path.is_file() for path in folder.rglob("*"))
    assert images + sum(int(kind.split()[0]) for kind in counted) == files
    shutil.rmtree(tmp_path / "output")
    assert first == train(tiny, capsys, *arguments).splitlines()[0]  # from the cache as well


def test_a_folder_without_images_says_what_is_there(tiny, tmp_path, capsys):
    folder = tmp_path / "photos"
    folder.mkdir()
    for index in range(3):
        (folder / f"IMG_{index}.HEIC").write_bytes(b"no image")
    line = refused(capsys, "--data-dir", folder)
    assert str(folder) in line and "left out: 3 .heic" in line and "DATA_DIR" in line


def test_a_pipe_without_an_images_name_is_not_opened(tiny, tmp_path):
    folder = draw_faces(tmp_path / "photos", 16)
    os.mkfifo(folder / "pipe")
    said = succeed(*flags(DATA_DIR=folder, EPOCHS=1), cwd=tmp_path, timeout=120)
    assert "left out: 1 without extension" in said


def test_a_folder_that_cannot_be_listed_is_named(tmp_path):
    folder = draw_faces(tmp_path / "photos", 16)
    (folder / "inner").mkdir()
    command = flags(DATA_DIR=folder, EPOCHS=1)
    if os.geteuid():
        (folder / "inner").chmod(0)
        before = ()
    else:  # modes do not stop root, unless it has given up that right
        before = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all"]
        if not shutil.which("setpriv"):
            pytest.skip("root needs setpriv")
        (folder / "inner").chmod(0)
    done = run(*command, cwd=tmp_path, before=before)
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"Permission denied: {folder / 'inner'}; check DATA_DIR ({folder})" in done.stderr


# ---------------------------------------------------------------------------------- broken images


def test_many_broken_images_are_all_listed_and_the_rest_can_be_used(tiny, tmp_path, capsys):
    folder = draw_faces(tmp_path / "photos", 40)
    for index in range(20):
        (folder / f"page {index:02d}.jpg").write_text("<html>not found</html>")
    line = refused(capsys, "--data-dir", folder)
    listed = tmp_path / "output/broken_images.txt"
    assert "20 of 60 images" in line and str(listed) in line and "--skip-broken" in line
    names = [text.partition("': ")[0] for text in listed.read_text().splitlines()]
    assert names == [f"'{folder}/page {index:02d}.jpg" for index in range(20)]
    said = train(tiny, capsys, "--data-dir", folder, "--epochs", 1, "--skip-broken")
    assert "; 40 images, " in said and "left out: 20 broken" in said
    assert said.count("skipped '") == 10


def test_a_folder_of_broken_images_alone_is_refused_in_any_case(tiny, tmp_path, capsys):
    folder = tmp_path / "photos"
    folder.mkdir()
    for index in range(9):
        (folder / f"{index}.jpg").write_text("<html>not found</html>")
    assert "9 of 9 images" in refused(capsys, "--data-dir", folder, "--skip-broken")


# ----------------------------------------------------------------------------------------- workers


NO_SEMAPHORES = """
mount -t tmpfs -o ro none /dev/shm
if touch /dev/shm/x 2>/dev/null; then exit 99; fi
"""


def test_where_no_workers_are_to_be_had_images_are_decoded_without(workplace):
    done = run(
        *flags(DATA_DIR="faces", EPOCHS=1, WORKERS=2),
        cwd=workplace,
        before=own_mounts(NO_SEMAPHORES),
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "no worker processes here (" in done.stdout and "40 images" in done.stdout


UNGUARDED = """
import multiprocessing
import dcgan
multiprocessing.set_start_method("spawn", force=True)
dcgan.DATA_DIR, dcgan.WORKERS = "faces", 1
dcgan.train()
"""


def test_a_script_that_its_workers_run_again_is_told_about_the_guard(workplace):
    (workplace / "mine.py").write_text(UNGUARDED)
    done = run(cwd=workplace, program=["mine.py"], fresh=True)
    assert done.returncode
    assert 'if __name__ == "__main__":' in done.stderr
    assert "in use by another run" not in done.stderr


# ------------------------------------------------------------------------------------------- zips


def zipped(path, faces, **more):
    """A zip of the images in the folder `faces`, and of other files, {name: text}."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for face in sorted(faces.iterdir()):
            archive.write(face, f"some/folder/{face.name}")
        for name, text in more.items():
            archive.writestr(name, text)
    return path


def test_a_zip_is_unpacked_once_into_the_folder_with_its_name(tiny, workplace, capsys):
    path = zipped(workplace / "my photos.ZIP", workplace / "faces", notes="", __MACOSX_x="")
    said = train(tiny, capsys, "--data-dir", path, "--epochs", 1)
    assert said.startswith(f"unpacked 40 images of {path}") and "; 40 images, " in said
    unpacked = [file for file in (workplace / "my photos").rglob("*") if file.is_file()]
    assert sorted(file.name for file in unpacked) == sorted(os.listdir(workplace / "faces"))
    path.unlink()
    said = train(tiny, capsys, "--data-dir", path, "--epochs", 2)
    assert "unpacked 40" not in said and "resuming from" in said
    assert f"using the images in {workplace / 'my photos'}; to unpack {path} again" in said


def test_zips_that_are_hidden_are_left_alone_and_linked_folders_are_not(tiny, workplace, capsys):
    zipped(workplace / "photos/.git/x.zip", workplace / "faces")
    assert "holds no images" in refused(capsys, "--data-dir", "photos")
    zipped(workplace / "elsewhere/y.zip", workplace / "faces")
    (workplace / "photos/link").symlink_to(workplace / "elsewhere")
    (workplace / "photos/circle").symlink_to(workplace / "photos")
    assert "40 images" in train(tiny, capsys, "--data-dir", "photos", "--epochs", 1)


def test_a_folder_of_zips_is_unpacked_and_a_zip_without_images_does_no_harm(
    tiny, workplace, capsys
):
    photos, nothing = workplace / "photos", workplace / "nothing"
    nothing.mkdir()
    for name in ("one/same", "two/same"):  # whose images have the same names, too
        zipped(photos / f"{name}.zip", workplace / "faces")
    zipped(photos / "labels.zip", nothing, **{"labels.txt": "a b c", "some.heic": ""})
    said = train(tiny, capsys, "--data-dir", photos, "--epochs", 1)
    assert "80 images" in said and "labels.zip; left out: 1 .txt, 1 .heic" in said


def test_celeba_downloaded_by_browser_needs_no_kaggle(tiny, workplace, capsys):
    zipped(workplace / "data/celeba/archive.zip", workplace / "faces")
    said = train(tiny, capsys, "--data-dir", tiny.CELEBA_DIR, "--epochs", 1)
    assert "40 images" in said and "Kaggle" not in said


@pytest.mark.parametrize("fault", ["cut", "text", "password", "no images"])
def test_a_zip_that_gives_no_images_is_named(tiny, workplace, capsys, fault):
    path = zipped(workplace / "photos.zip", workplace / "faces", notes="")
    data = path.read_bytes()
    if fault == "no images":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("notes.txt", "")
    else:
        # The bit of an entry that says that it is encrypted.
        secret = data.replace(b"PK\1\2\x14\3\x14\0\0", b"PK\1\2\x14\3\x14\0\1")
        path.write_bytes({"cut": data[:-300], "text": b"no zip", "password": secret}[fault])
    assert str(path) in refused(capsys, "--data-dir", path)
    assert not (workplace / "photos/images").exists()
    zipped(path, workplace / "faces")  # and with a good one, it works
    train(tiny, capsys, "--data-dir", path, "--epochs", 1)


def test_a_zip_that_cannot_be_unpacked_beside_itself_is_one_line(tiny, workplace, capsys):
    path = zipped(workplace / "photos.zip", workplace / "faces")
    (workplace / "photos.lock").mkdir()  # refuses to be written, as a read-only disk does
    assert f"check DATA_DIR ({path})" in refused(capsys, "--data-dir", path, status=1)


# ------------------------------------------------------------------------------------ small images


@pytest.mark.parametrize("side, fits", [(100, 64), (40, 32), (28, 32), (128, None)])
def test_images_smaller_than_the_size_are_told_with_the_size_that_fits(
    tiny, tmp_path, capsys, side, fits
):
    for index in range(40):
        extra = 0 if index % 2 else 300
        Image.new("RGB", (side + extra, side), (index, 0, 0)).save(tmp_path / f"{index}.png")
    tiny.find_faces(tmp_path, 128).check_sizes()
    said = capsys.readouterr().out
    assert said.count("\n") == (fits is not None)
    assert fits is None or f"down to {side} pixels" in said and f"--image-size {fits} is" in said


def test_of_a_few_small_images_nothing_is_said(tiny, folder, tmp_path, capsys):
    Image.new("RGB", (9, 9)).save(folder / "small.png")
    said = train(tiny, capsys, "--data-dir", folder, "--epochs", 2)
    assert "smaller" not in said


# ------------------------------------------------------------------------------------ grey images


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_grey_images_give_grey_samples(tiny, workplace, capsys, precision):
    (workplace / "grey").mkdir()
    for face in (workplace / "faces").iterdir():
        Image.open(face).convert("L").save(workplace / "grey" / face.name)
    tiny.PRECISION, tiny.LEARNING_RATE = precision, 5e-3
    train(tiny, capsys, "--data-dir", "grey", "--epochs", 20)
    images = tiny.generate_images(16, seed=1)
    spread = images.amax(1) - images.amin(1)
    assert spread.max() < 2 / 255 and images.std() > 0.01
