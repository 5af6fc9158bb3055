"""Attributes: labels that are right, or refused; kinds by folders; and faces as they are wished."""

import os
import re
import shutil
import unicodedata

import pytest
import torch
from conftest import TINY, checkpoint, flags, one_line, refused
from PIL import Image

import dcgan

HEAD = ["image_id", "Smiling", "Male"]
NAMES = [f"{index:03d}.png" for index in range(60)]
ROWS = [[name, i % 2 * 2 - 1, 1 if i < 15 else -1] for i, name in enumerate(NAMES)]


@pytest.fixture(scope="session")
def drawn(tmp_path_factory):
    """60 images that show their attributes: red if they smile, green if they are male."""
    folder = tmp_path_factory.mktemp("drawn")
    for name, smiling, male in ROWS:
        colour = (200 * (smiling > 0), 200 * (male > 0), 99)
        Image.new("RGB", (32, 32), colour).save(folder / name)
    return folder


@pytest.fixture
def people(tiny, drawn, tmp_path):
    """A function that puts these images and a table into the folder `people`; the folder."""

    def make(rows=ROWS, head=HEAD, rename="{}", text=None, suffix=".csv", encoding="utf-8"):
        for index, name in enumerate(NAMES):
            path = tmp_path / "people" / rename.format(name, "ab"[index % 2], index // 2)
            path.parent.mkdir(parents=True, exist_ok=True)
            os.link(drawn / name, path)
        text = text or "".join(",".join(map(str, row)) + "\n" for row in [head, *rows])
        path = tmp_path / f"people/list_attr_celeba{suffix}"
        path.write_text(text, encoding, newline="")
        return tmp_path / "people"

    return make


def read(folder, attributes):
    """The faces in a folder, the names of the attributes, and the labels."""
    dcgan.ATTRIBUTES = attributes
    dcgan.check_settings()
    faces, paths, *_ = dcgan.load_faces(folder, 32)
    return faces, *dcgan.read_labels(folder, paths)


def shown(faces):
    """The labels that the images themselves show."""
    return (faces[:, :2, 16, 16] > 100).float()


def cells(change):
    """The rows, each with `change` applied to its two values."""
    return {"rows": [[name, *map(change, values)] for name, *values in ROWS]}


TEXT = "".join("{},{},{}\n".format(*row) for row in [HEAD, *ROWS])
CELEBA = "60\nSmiling Male \n" + "".join("{}  {:2d} {:2d}\n".format(*row) for row in ROWS)
PATHS = [[f"{'ab'[i % 2]}/{i // 2:03d}.png", *row[1:]] for i, row in enumerate(ROWS)]
ZOE = "Zo\N{LATIN SMALL LETTER E WITH DIAERESIS} "
MAC = unicodedata.normalize("NFD", ZOE)
RIGHT = {
    "as CelebA's": {},
    "True and False": cells(lambda value: value > 0),
    "TRUE and FALSE": cells(lambda value: str(value > 0).upper()),
    "1 and 0, a mark": {**cells(lambda value: max(value, 0)), "encoding": "utf-8-sig"},
    "Windows' lines": {"text": TEXT.replace("\n", "\r\n")},
    "quotes": {"text": re.sub(r"([\w.-]+)", r'"\1"', TEXT)},
    "blanks": {"text": TEXT.replace(",", " , ")},
    "no end of line": {"text": TEXT.rstrip()},
    "other extensions": {"text": TEXT.replace(".png", ".jpg")},
    "another order": {"rows": ROWS[::-1]},
    "columns swapped": {"text": re.sub(",(.*),(.*)", r",\2,\1", TEXT)},
    "CelebA's own": {"text": CELEBA, "suffix": ".txt"},
    "CelebA's own, Windows": {"text": CELEBA.replace("\n", "\r\n"), "suffix": ".txt"},
    "photos in folders": {"rename": "{1}/{0}"},
    "paths": {"rename": "{1}/{2:03d}.png", "rows": PATHS},
    "Windows' paths": {"rename": "x/{0}", "rows": [["x\\" + name, *row] for name, *row in ROWS]},
    "photos of a Mac": {"rename": MAC + "{}", "text": TEXT.replace("\n0", f"\n{ZOE}0")},
    "a table of a Mac": {"rename": ZOE + "{}", "text": TEXT.replace("\n0", f"\n{MAC}0")},
}


@pytest.mark.parametrize("kind", RIGHT)
def test_labels_are_what_the_images_show(people, capsys, kind):
    faces, names, labels = read(people(**RIGHT[kind]), "Smiling, Male")
    assert names == ["Smiling", "Male"] and torch.equal(labels, shown(faces))
    assert "attributes: Smiling 50%, Male 25%" in capsys.readouterr().out


def test_attributes_may_be_a_list_and_have_any_order_and_umlauts(people):
    folder = people(head=["image_id", "Smiling", MAC])
    faces, names, labels = read(folder, [ZOE, "Smiling"])
    assert names == [ZOE.strip(), "Smiling"] and torch.equal(labels, shown(faces).flip(1))


def test_the_table_may_lie_beside_the_folder(people):
    folder = people(rename="inner/{}")
    faces, _, labels = read(folder / "inner", "Smiling,Male")
    assert torch.equal(labels, shown(faces))


def test_labels_stay_with_their_images_if_some_are_broken(people):
    folder = people()
    for name in NAMES[3:20:4]:
        (folder / name).unlink()
        (folder / name).write_bytes(b"no image")
    for _ in ("decoded", "from the cache"):
        faces, _, labels = read(folder, "Smiling,Male")
        assert len(faces) == 55 and torch.equal(labels, shown(faces)), "labels are shifted"


def test_what_is_not_known_is_neither_has_nor_has_not(people, capsys):
    """0 in a column that has -1, as well as photos without a row."""
    rows = [[name, 0 if i < 20 else smiling, male] for i, (name, smiling, male) in enumerate(ROWS)]
    faces, _, labels = read(people(rows[:50]), "Smiling,Male")
    wanted = shown(faces)
    wanted[:20, 0] = wanted[50:] = 0.5
    assert torch.equal(labels, wanted)
    said = capsys.readouterr().out
    assert "attributes: Smiling 25%, Male 25%" in said, "unknown ones are counted"
    [line] = [line for line in said.splitlines() if "10 photos" in line]
    assert "050.png" in line and "000.png" in line  # one of each side


def one_cell(value):
    """The table, with another value in the ninth line."""
    rows = [[*row] for row in ROWS]
    rows[7][1] = value
    return {"rows": rows}, ["line 9", "Smiling"]


WRONG = {
    "pandas' index": ({"text": "," + TEXT.replace("\n0", "\n7,0")}, ["image_id", "''"]),
    "no image_id": ({"head": HEAD[1:]}, ["image_id", "'Smiling'"]),
    "semicolons": ({"text": TEXT.replace(",", ";")}, ["image_id", "image_id;Smiling;Male"]),
    "tabs": ({"text": TEXT.replace(",", "\t")}, ["image_id"]),
    "a line for Excel": ({"text": "sep=,\n" + TEXT}, ["image_id", "'sep='"]),
    "an empty first line": ({"text": "\n" + TEXT}, ["image_id", "''"]),
    "nothing in it": ({"text": "\n"}, ["image_id"]),
    "a score": one_cell(0.73),
    "1 and 2": one_cell(2),
    "nan": one_cell("nan"),
    "an empty cell": one_cell(""),
    "a word": one_cell("yes"),
    "two values": one_cell("3;7"),
    "a decimal comma": one_cell("0,7"),
    "a cell too many": one_cell("1,1"),
    "a short row": ({"text": TEXT.replace("007.png,1,1", "007.png,1")}, ["line 9", "Male"]),
    "other photos": ({"text": TEXT.replace("\n0", "\nx0", 31)}, ["31 photos", "x000.png"]),
    "photos of one name": ({"rename": "{1}/{2:03d}.png"}, ["a/000.png", "b/000.png"]),
    "two rows for a photo": ({"rows": [*ROWS, [NAMES[0], -1, -1]]}, ["000.png"]),
    "a column twice": (
        {"rows": [[*row, 1] for row in ROWS], "head": [*HEAD, "Smiling"]},
        ["Smiling"],
    ),
    "no such column": ({"head": ["image_id", "Smiles", "Male"]}, ["Smiling", "Smiles"]),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_table_that_could_be_meant_otherwise_is_refused(people, kind):
    options, words = WRONG[kind]
    folder = people(**options)
    with pytest.raises(dcgan.UserError) as refusal:
        read(folder, "Smiling,Male")
    one_line(f"dcgan.py: error: {refusal.value}\n", "list_attr_celeba.csv", *words)


@pytest.mark.parametrize("wish", ["Smiling,-Smiling", "Smiling,Smiling", "Smiling,,Male", "Smilng"])
def test_attributes_that_are_not_in_the_table_once_are_refused(people, capsys, wish):
    wrong = [name for name in wish.split(",") if name != "Male"][-1]
    arguments = flags(DATA_DIR=people(), ATTRIBUTES=wish)
    refused(capsys, *arguments, words=[f"'{wrong}'", "Smiling, Male", "list_attr_celeba.csv"])


@pytest.mark.parametrize("number", [0, 2])
def test_no_table_and_two_tables_are_refused(people, capsys, number):
    folder = people()
    path = folder / "list_attr_celeba.csv"
    shutil.copy(path, folder / "list_attr_celeba.txt") if number else path.unlink()
    words = [folder, f"{number} tables", "list_attr_celeba.csv"]
    refused(capsys, *flags(DATA_DIR=folder, ATTRIBUTES="Smiling"), words=words)


KINDS = {
    "folders": "cat/1 cat/2 dog/1 dog/2",
    "deeper ones": "animals/cat/old/1 animals/cat/2 animals/dog/new/1",
    "a split": "train/cat/1 train/dog/1 val/cat/1 test/dog/1",
    "a split in a folder": "all/train/cat/1 all/train/dog/1 all/val/cat/1 all/val/dog/1",
    "a split of each": "cat/train/1 cat/test/1 dog/train/1 dog/test/1",
    "a split with other photos": "Training_set/cat/1 Training_set/dog/1 test1/1",
    "parts of each": "cat/part-1/1 cat/part-2/1 dog/part-1/1 dog/part-2/1",
    "numbers of each": "cat/1/1 cat/2/1 dog/1/1 dog/2/1",
    "a zoo": "home/cat/1 zoo/cat/1 home/dog/1 zoo/dog/1",
    "two downloads": "animals-001/animals/cat/1 animals-002/animals/dog/1",
    "other photos": "cat/1 dog/1 2",
}


@pytest.mark.parametrize("case", KINDS)
def test_kinds_are_the_folders_in_which_photos_differ(tiny, capsys, case):
    paths = [f"/photos/{name}" for name in KINDS[case].split()]
    tiny.ATTRIBUTES = "folders"
    names, labels = tiny.read_labels("/photos", paths)
    assert names == ["cat", "dog"]
    assert labels.tolist() == [[float(f"/{name}/" in path) for name in names] for path in paths]
    said = capsys.readouterr().out
    assert "attributes: cat" in said and ", dog" in said


def test_many_kinds_are_named_shortly(tiny, capsys):
    tiny.ATTRIBUTES = "folders"
    tiny.read_labels("/photos", [f"/photos/{index:02d}/1" for index in range(60)])
    said = capsys.readouterr().out
    assert "09 2%, and 50 more" in said and "10 2%" not in said


@pytest.mark.parametrize("kinds", ["train car", "cat test", "0 1", "trainers valley", "test_1 car"])
def test_kinds_may_have_any_names(tiny, kinds):
    inner = {"trainers": "red/", "valley": "green/"}
    names = [f"{kind}/{inner.get(kind, '')}1" for kind in kinds.split()]
    paths = [f"/photos/part-{part}/{name}" for part in (1, 2) for name in names]
    assert {*tiny.folder_kinds("/photos", paths)} == {*kinds.split()}


@pytest.mark.parametrize("folders", ["cat", "cat, domestic", "None", "-1"])
def test_folders_that_cannot_be_asked_for_are_refused_by_name(tiny, capsys, drawn, folders):
    others = [] if folders == "cat" else ["dog"]
    for index, kind in enumerate([folders, *others]):
        (tiny.Path("animals") / kind).mkdir(parents=True)
        for name in NAMES[index::2]:
            os.link(drawn / name, f"animals/{kind}/{name}")
    refused(capsys, *flags(DATA_DIR="animals", ATTRIBUTES="folders"), words=[folders])
    assert not os.path.exists("output")


def test_the_kept_labels_are_those_of_random_images(tiny):
    """Every second image may be of one kind: 0_left, 0_right, 1_left, …"""
    labels = torch.eye(2).repeat(2_100, 1)
    faces = torch.zeros(1, 3, 32, 32, dtype=torch.uint8).expand(4_200, -1, -1, -1)
    run = tiny.Run(tiny.Batches(faces, labels, torch.device("cpu")), ["left", "right"], "")
    for kept in (run.labels, run.latents[:, -2:]):
        share = kept[:, 0].mean().item()
        assert share == pytest.approx(0.5, abs=0.2), "the labels are no random sample"
        assert kept.sum(1).eq(1).all()
    assert len(run.labels) == 4_096


def test_a_run_says_and_keeps_its_attributes(finished):
    said = (finished / "stdout").read_text()
    assert "attributes: Odd 50%, Late 50%" in said
    for name in ("checkpoint.pt", "generator.pt"):
        state = checkpoint(finished, name)
        assert state["attributes"] == ["Odd", "Late"]
        rows, counts = state["labels"][:40].unique(dim=0, return_counts=True)
        assert rows.tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]] and counts.tolist() == [10] * 4


@pytest.mark.parametrize("changed", [None, "Odd", "Late,Odd"])
def test_a_run_is_not_resumed_with_other_attributes(copied, capsys, changed):
    arguments = flags(DATA_DIR="faces", ATTRIBUTES=changed, EPOCHS=4)
    refused(capsys, *arguments, words=["ATTRIBUTES", changed, "Odd,Late"])


def latents(wish=None, **options):
    """The labels and the noise of the faces that are drawn for a wish."""
    batches = dcgan.TrainedGenerator(attributes=wish).latents(512, 1, **options)
    return torch.cat(list(batches)).tensor_split([TINY["LATENT_SIZE"]], 1)[::-1]


@pytest.mark.parametrize(
    "wish, means",
    [("Odd", [1, 0.5]), ("-Late", [0.5, 0]), ("Odd, -Late", [1, 0]), (["-Odd", "Late"], [0, 1])],
)
def test_what_is_wished_holds_and_the_rest_is_as_frequent_as_in_such_images(copied, wish, means):
    labels, noise = latents(wish)
    assert labels.mean(0).tolist() == pytest.approx(means, abs=0.1)
    assert torch.equal(noise, latents()[1])
    short_labels, short = latents(wish, truncation=0.5)
    assert torch.equal(short_labels, labels) and torch.equal(short, noise / 2)


@pytest.mark.parametrize("command", ["generate", "interpolate"])
def test_a_wish_may_begin_with_a_minus_sign(copied, capsys, command):
    more = {"generate": ["--num-images", 2], "interpolate": ["--num-faces", 2, "--frames", 2]}
    assert dcgan.main([command, "--attributes", "-Odd,Late", *map(str, more[command])]) == 0
    assert "Odd, Late" in capsys.readouterr().out


@pytest.mark.parametrize("wish", ["Glasses", "Odd,-Odd", "--Odd", "-"])
def test_a_wish_that_the_generator_cannot_fulfil_is_refused(copied, capsys, wish):
    words = ["Odd, Late", wish.split(",")[0].strip("-")]
    refused(capsys, "generate", f"--attributes={wish}", words=words)
    assert not os.path.exists("output/generated.png")


def test_a_wish_that_no_training_image_fits_is_fulfilled_and_said(copied, capsys):
    state = checkpoint(name="generator.pt")
    state["labels"] = torch.tensor([[1, 0], [0.5, 0.5]])
    torch.save(state, "output/generator.pt")
    assert latents("-Odd")[0].unique(dim=0).tolist() == [[0, 0], [0, 0.5]]
    assert "-Odd" in capsys.readouterr().out
    assert latents("Odd")[0].unique(dim=0).tolist() == [[1, 0]]


def test_an_image_is_of_one_kind_at_most():
    labels = torch.eye(3)[:2]
    known = ["cat", "dog", "bird"]
    assert dcgan.wished(labels, "bird", known, True).tolist() == [[0, 0, 1], [0, 0, 1]]
    assert dcgan.wished(labels, "-cat", known, True).tolist() == [[0, 0, 0], [0, 1, 0]]
    assert dcgan.wished(labels, "cat,bird", known, True).tolist() == [[1, 0, 1], [1, 0, 1]]
    assert torch.equal(labels, torch.eye(3)[:2])
