"""Generators that are told what to draw: labels of images, training with them, asking for them."""

import csv
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, draw_faces, flags, refused, succeed
from PIL import Image
from reading import checkpoint, metrics, pixels, table

import dcgan

CPU = torch.device("cpu")
TABLE = "list_attr_celeba.csv"
NAMES = ("Smiling", "Long_Hair", "Blond_Hair", "Blue_Eyes")


def drawn(index):
    """The attributes of a drawn face, as the rows of the table have them."""
    return [1 if has else -1 for has in dcgan.draw_face(random.Random(index)).info.values()]


def write_table(path, rows, header=("image_id", *NAMES)):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


@pytest.fixture
def labelled(tiny, tmp_path):
    """`dcgan`; the folder `people` has 40 faces in it, and the table of their attributes above."""
    draw_faces(tmp_path / "people/portraits/large")
    write_table(tmp_path / "people" / TABLE, [[f"{i:06d}.jpg", *drawn(i)] for i in range(40)])
    tiny.DATA_DIR = "people"
    return tiny


@pytest.fixture
def kinds(tiny, tmp_path):
    """`dcgan`; the folder `animals` holds 120 light images and 40 dark ones, in two folders."""
    noise = np.random.default_rng(0)
    for kind, low, number in [("polar bear", 150, 120), ("black bear", 0, 40)]:
        folder = tmp_path / "animals" / kind / "all"
        folder.mkdir(parents=True)
        for index in range(number):
            values = noise.integers(low, low + 100, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(values).save(folder / f"{index}.png")
    tiny.DATA_DIR = "animals"
    return tiny


def train(dcgan, capsys, **settings):
    """What a run says."""
    capsys.readouterr()
    assert dcgan.main(flags(**{"DATA_DIR": dcgan.DATA_DIR} | settings)) == 0
    return capsys.readouterr().out


# ----------------------------------------------------------------------------------------- networks


def test_a_logit_is_its_own_and_that_of_each_attribute_as_its_label_says(tiny):
    torch.manual_seed(0)
    judge = tiny.Discriminator(32, 4, 2).eval()
    images = torch.rand(3, 3, 32, 32) * 2 - 1
    labels = torch.tensor([[1, 1], [1, -1], [-1, -1]], dtype=torch.int8)
    own, first, second = judge.layers(images).unbind(1)
    wanted = own + labels[:, 0] * first + labels[:, 1] * second
    torch.testing.assert_close(judge(images, labels), wanted)


def test_without_attributes_the_networks_and_the_noise_are_what_they_were(tiny, capsys):
    train(tiny, capsys, DATA_DIR="faces")
    state = checkpoint()
    assert state["generator"]["layers.0.weight"].shape[0] == TINY["LATENT_SIZE"]
    last = list(state["discriminator"].values())[-2]
    assert last.shape == (1, 16, 4, 4)
    assert state["labels"].numel() == 0 and state["attributes"] == []
    assert not Path("output/attributes.png").exists()


def test_the_average_is_fitted_to_the_labels_of_the_training_images(tiny):
    labels = torch.tensor([[1], [1], [1], [-1]], dtype=torch.int8)
    generator = tiny.Generator(32, 9, 4)
    with torch.no_grad():
        generator.layers[0].weight[:8] = 0  # the label alone counts
        generator.layers[0].weight[8] = 1
    tiny.refresh_batchnorm(generator, labels)
    norm = generator.layers[1]
    torch.testing.assert_close(norm.running_mean, torch.full((16,), 0.5), atol=0.1, rtol=0)


# ------------------------------------------------------------------------------------------- labels


def found(dcgan, attributes):
    faces = dcgan.find_faces(dcgan.data_folder(), 32, attributes)
    images = faces.load()
    return faces, images, faces.kept_labels()


def test_labels_are_the_columns_of_the_table_in_the_order_asked_for(labelled, capsys):
    faces, images, labels = found(labelled, "Long_Hair,Smiling")
    assert faces.attributes == ["Long_Hair", "Smiling"] and len(images) == 40
    assert labels.tolist() == [drawn(i)[1::-1] for i in range(40)]
    share = sum(drawn(i)[0] == 1 for i in range(40)) / 40
    assert f"Smiling {share:.0%}" in capsys.readouterr().out


def test_labels_follow_their_images_when_some_are_broken_and_when_the_cache_is_used_again(
    labelled, tmp_path, capsys
):
    for broken in (3, 17):
        (tmp_path / f"people/portraits/large/{broken:06d}.jpg").write_bytes(b"no image")
    wanted = [drawn(i)[:1] for i in range(40) if i not in (3, 17)]
    for _ in range(2):
        _, images, labels = found(labelled, "Smiling")
        assert len(images) == 38 and labels.tolist() == wanted
    assert "decoding the images again" not in capsys.readouterr().out


def test_a_cache_that_does_not_say_which_images_are_broken_is_made_anew(labelled, tmp_path, capsys):
    (tmp_path / "people/portraits/large/000003.jpg").write_bytes(b"no image")
    faces, images, _ = found(labelled, "Smiling")
    size = faces.cache.stat().st_size
    with open(faces.cache, "r+b") as file:
        file.truncate(size - 8)  # as earlier versions left it
    assert len(found(labelled, None)[1]) == 39
    assert "decoding" not in capsys.readouterr().out.replace("decoding: 100%", "")
    assert len(found(labelled, "Smiling")[2]) == 39
    assert "earlier version" in capsys.readouterr().out
    assert faces.cache.stat().st_size == size


def test_images_without_a_row_are_named_counted_and_left_out(labelled, tmp_path, capsys):
    rows = [[f"{i:06d}.jpg", *drawn(i)] for i in range(36)]
    write_table(tmp_path / "people" / TABLE, rows)
    said = train(labelled, capsys, ATTRIBUTES="Smiling")
    [line] = [line for line in said.splitlines() if "left out 4 images" in line]
    assert "000036.jpg" in line and str(tmp_path / "people" / TABLE) in line
    assert ", 4 steps per epoch" in said  # of 8 images
    assert len(checkpoint()["labels"]) == 36


SPREADSHEETS = {
    "0 for no": lambda text: text.replace(",-1", ",0"),
    "a mark at the start": lambda text: "\ufeff" + text,
    "Windows' lines": lambda text: text.replace("\n", "\r\n"),
    "semicolons": lambda text: text.replace(",", ";"),
    "spaces": lambda text: text.replace(",", ", "),
    "an empty last row": lambda text: text + ",,,,\n",
    "other extensions": lambda text: text.replace(".jpg", ".png"),
    "folders": lambda text: text.replace("\n0", "\nlarge/0"),
}


@pytest.mark.parametrize("kind", SPREADSHEETS)
def test_a_table_may_come_from_a_spreadsheet(labelled, tmp_path, kind):
    path = tmp_path / "people" / TABLE
    path.write_bytes(SPREADSHEETS[kind](path.read_text()).encode())
    labels = found(labelled, "Smiling,Blue_Eyes")[2]
    assert labels.tolist() == [[drawn(i)[0], drawn(i)[3]] for i in range(40)]


def test_a_table_far_above_the_folder_is_not_for_its_images(labelled, tmp_path, capsys):
    os.rename("people", "deeper")
    os.mkdir("people")
    os.rename("deeper/portraits", "people/portraits")
    os.rename(f"deeper/{TABLE}", TABLE)
    assert found(labelled, "Smiling")[2].shape == (40, 1)  # beside the folder
    labelled.DATA_DIR = "people/portraits/large"
    line = refused(capsys, *flags(DATA_DIR=labelled.DATA_DIR, ATTRIBUTES="Smiling"))
    assert f"there is no {TABLE} in" in line


def test_other_attributes_are_another_data_set(labelled):
    keys = {found(labelled, names)[0].key for names in ("Smiling", "Blue_Eyes", None)}
    assert len(keys) == 3


def test_each_subfolder_is_a_kind_wherever_they_lie(kinds, tmp_path):
    faces, _, labels = found(kinds, "folders")
    assert faces.attributes == ["black bear", "polar bear"]
    assert labels.tolist() == [[1, -1]] * 40 + [[-1, 1]] * 120
    shutil.make_archive(tmp_path / "zipped", "zip", tmp_path, "animals")
    for kind in faces.attributes:
        shutil.make_archive(tmp_path / "zips" / kind, "zip", tmp_path / "animals" / kind)
    for zips in ("zipped.zip", "zips"):
        kinds.DATA_DIR = zips
        zipped = kinds.prepare_data(kinds.data_folder(), 32, attributes="folders")
        assert zipped.attributes == faces.attributes and zipped.labels.tolist() == labels.tolist()


def test_kinds_are_those_of_all_images_whatever_max_images_says(kinds, capsys):
    kinds.MAX_IMAGES = 50
    faces, images, labels = found(kinds, "folders")
    assert faces.attributes == ["black bear", "polar bear"]
    assert len(images) == 50 and labels[:, 1].tolist() == [-1] * 40 + [1] * 10
    assert "black bear 80%, polar bear 20%" in capsys.readouterr().out


WRONG = {
    "Smilng": ("has no attribute Smilng; did you mean Smiling?",),
    "Xyz": ("has no attribute Xyz; it has Smiling, Long_Hair, Blond_Hair, Blue_Eyes",),
    "-Smiling": ("has no attribute -Smiling; did you mean Smiling?",),
    "folders": ("40 images not in a subfolder of", "such as portraits"),
    "True": ("has no attribute True; it has Smiling",),
    "Smiling,,Male": ("ATTRIBUTES (--attributes) is 'Smiling,,Male'; it must be",),
}


@pytest.mark.parametrize("names", WRONG)
def test_attributes_that_are_not_known_are_one_line(labelled, capsys, names):
    line = refused(capsys, *flags(DATA_DIR="people"), "--attributes", names)
    assert all(text in line for text in WRONG[names])
    assert not Path("data/cache").exists()  # nothing was decoded


FAULTS = {
    "no table": (None, f"there is no {TABLE} in"),
    "other images": (f"image_id,{','.join(NAMES)}\nx.jpg,1,1,1,1\n", "40 images not in"),
    "no numbers": (f"image_id,{','.join(NAMES)}\n000000.jpg,yes,1,1,1\n", "is damaged"),
    "short rows": (f"image_id,{','.join(NAMES)}\n000000.jpg\n", "is damaged"),
    "bytes": ("\udcff\udcfe", "is damaged"),
    "empty": ("", "has no attribute Smiling; it has none"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_table_that_is_of_no_use_is_one_line(labelled, tmp_path, capsys, fault):
    text, said = FAULTS[fault]
    path = tmp_path / "people" / TABLE
    path.unlink()
    if text is not None:
        path.write_text(text, encoding="utf-8", errors="surrogateescape")
    line = refused(capsys, *flags(DATA_DIR="people", ATTRIBUTES="Smiling"))
    assert said in line and str(path.parent) in line


def test_the_table_is_no_file_that_is_left_out(labelled, capsys):
    assert "left out" not in train(labelled, capsys, EPOCHS=1)


# --------------------------------------------------------------------------------------------- runs


def test_a_generator_draws_the_kind_that_is_asked_for(kinds, capsys):
    fast = {"AUGMENT": 0.0, "G_FEATURES": 8, "LEARNING_RATE": 2e-3}
    train(kinds, capsys, ATTRIBUTES="folders", EPOCHS=10, **fast)

    def brightness(attributes):
        images = kinds.generate_images(32, seed=1, attributes=attributes)
        return images.mean((1, 2, 3))

    dark, light, any_kind = map(brightness, ("black bear", "polar bear", None))
    assert dark.mean() < 0.4 and light.mean() > 0.55
    torch.testing.assert_close(brightness("-black bear"), light)
    # Without a wish, as many are dark as in the training images: a quarter.
    dark_ones = (any_kind < (dark.mean() + light.mean()) / 2).sum()
    assert 3 <= dark_ones <= 14

    # A picture of 8 rows, at twice the size: as drawn, the dark kind, the light kind.
    picture = pixels("output/attributes.png").float().mean(0)
    side = 2 * (32 + 2)
    assert picture.shape[1] // side == 3
    columns = picture[-8 * side :].chunk(3, 1)
    assert columns[1].mean() < columns[2].mean()

    film = kinds.interpolate(num_faces=2, frames=3, seed=1, attributes="black bear")
    assert pixels(film).float().mean() < 0.5 * 255


def test_quality_compares_fakes_and_reals_of_the_same_labels(kinds, capsys, monkeypatch):
    drawn, draw = [], kinds.Trainer.draw

    def noted(trainer, latents):
        drawn.append(latents)
        return draw(trainer, latents)

    monkeypatch.setattr(kinds.Trainer, "draw", noted)
    compared, distance = [], kinds.face_distance
    monkeypatch.setattr(
        kinds, "face_distance", lambda *sets: compared.append(sets[1]) or distance(*sets)
    )
    train(kinds, capsys, ATTRIBUTES="folders", EPOCHS=1)
    reals = compared[0]
    [rest] = [index for index, latents in enumerate(drawn) if len(latents) == len(reals) - 64]
    measured = torch.cat(drawn[rest - 1 : rest + 1])
    light = reals.mean((1, 2, 3)) > 0.4
    assert torch.equal(measured[:, -1, 0, 0] > 0, light)
    # and so do the samples, beside which the real images are drawn
    state = checkpoint()
    assert state["fixed_noise"].shape == (64, TINY["LATENT_SIZE"] + 2, 1, 1)
    assert set(state["fixed_noise"][:, -1].flatten().tolist()) == {-1, 1}


def test_a_resumed_run_ends_like_one_that_was_not_stopped(labelled, capsys):
    settings = {"ATTRIBUTES": "Smiling,Blond_Hair", "R1_GAMMA": 1.0}
    train(labelled, capsys, **settings, OUTPUT_DIR="whole")
    train(labelled, capsys, **settings, EPOCHS=1)
    said = train(labelled, capsys, **settings)
    assert "resuming" in said
    weights = [checkpoint(".", f"../{folder}/checkpoint.pt") for folder in ("output", "whole")]
    for name, weight in weights[0]["average"].items():
        assert torch.equal(weight, weights[1]["average"][name]), name
    assert metrics() == [list(row.values())[:-1] for row in table("whole/metrics.csv")]


def test_a_run_keeps_its_attributes(kinds, tmp_path, capsys):
    train(kinds, capsys, ATTRIBUTES="folders", EPOCHS=1)
    words = flags(DATA_DIR="animals", EPOCHS=2)
    assert "ATTRIBUTES is None, but folders in the run" in refused(capsys, *words)
    shutil.copytree(tmp_path / "animals/black bear", tmp_path / "animals/brown bear")
    line = refused(capsys, *words, "--attributes", "folders")
    assert "black bear, brown bear, polar bear" in line


# ------------------------------------------------------------------------------------------- asking


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The OUTPUT_DIR of a run with attributes, on 120 faces; the labels of those."""
    place = tmp_path_factory.mktemp("trained")
    draw_faces(place / "faces", 120)
    write_table(place / "faces" / TABLE, [[f"{i:06d}.jpg", *drawn(i)] for i in range(120)])
    places = {"DATA_DIR": place / "faces", "CACHE_DIR": place / "cache"}
    settings = {"OUTPUT_DIR": place / "output", "ATTRIBUTES": "Smiling,Blond_Hair,Long_Hair"}
    assert dcgan.main(flags(**places, **settings, EPOCHS=1)) == 0
    labels = np.array([drawn(index) for index in range(120)])[:, [0, 2, 1]]
    return place / "output", labels


@pytest.fixture
def drawer(trained, tiny):
    """`dcgan` whose OUTPUT_DIR is `trained`'s. No attributes are set: the file knows its own."""
    shutil.copytree(trained[0], "output")
    return tiny


@pytest.mark.parametrize("wish", ["Smiling,-Blond_Hair", "-Long_Hair", None])
def test_what_is_asked_for_holds_and_the_rest_is_as_frequent_as_in_such_images(
    drawer, trained, wish
):
    names = ["Smiling", "Blond_Hair", "Long_Hair"]
    fit = trained[1]
    for name in (wish or "").split(","):
        if name:
            fit = fit[fit[:, names.index(name.lstrip("-"))] == (-1 if name[0] == "-" else 1)]
    generator = drawer.TrainedGenerator(attributes=wish)
    labels = torch.cat(list(generator.latents(2048, 1)))[:, -3:]
    assert set(map(tuple, labels.tolist())) == set(map(tuple, fit.astype(float)))
    np.testing.assert_allclose(labels.mean(0), fit.mean(0), atol=0.1)


def test_the_noise_does_not_depend_on_the_wish_and_truncation_leaves_labels_alone(drawer):
    smiling = drawer.TrainedGenerator(attributes="Smiling")
    [one] = smiling.latents(8, 1)
    [other] = drawer.TrainedGenerator().latents(8, 1)
    size = TINY["LATENT_SIZE"]
    assert torch.equal(one[:, :size], other[:, :size])
    [short] = smiling.latents(8, 1, truncation=0.5)
    torch.testing.assert_close(short, torch.cat([one[:, :size] / 2, one[:, size:]], 1))
    few, more = (drawer.generate_images(number, 1, attributes="Smiling") for number in (5, 70))
    torch.testing.assert_close(more[:5], few)


def tiny_labels(dcgan, wish):
    generator = dcgan.TrainedGenerator(attributes=wish)
    [latents] = generator.latents(64, 1)
    return set(map(tuple, latents[:, TINY["LATENT_SIZE"] :].tolist()))


def test_a_combination_that_no_training_image_has_is_drawn_all_the_same(kinds, capsys):
    train(kinds, capsys, ATTRIBUTES="folders", EPOCHS=1)
    kinds.generate_images(4, attributes="polar bear,black bear")
    assert tiny_labels(kinds, "polar bear,black bear") == {(1, 1)}
    assert "hardly any training image is polar bear,black bear" in capsys.readouterr().out
    state = checkpoint(name="generator.pt")
    state["labels"] = state["labels"][:1].clone()  # as if one kind were too rare for the sample
    torch.save(state, "output/generator.pt")
    assert tiny_labels(kinds, "polar bear") == {(-1, 1)}


def test_generate_prints_the_names_that_the_generator_knows(drawer, capsys):
    assert drawer.main(["generate", "--attributes", "-Smiling,Long_Hair"]) == 0
    assert "; attributes: Smiling, Blond_Hair, Long_Hair" in capsys.readouterr().out
    line = refused(capsys, "generate", "--attributes", "Glasses")
    assert "generator.pt has no attribute Glasses; it has Smiling, Blond_Hair, Long_Hair" in line
    line = refused(capsys, "interpolate", "--attributes=Smilng")
    assert "did you mean Smiling?" in line


def test_a_generator_without_attributes_says_so(tiny, capsys):
    train(tiny, capsys, DATA_DIR="faces", EPOCHS=1)
    line = refused(capsys, "generate", "--attributes", "Smiling")
    assert "has no attribute Smiling; it has none" in line
    assert tiny.main(["generate", "--num-images", "1"]) == 0
    assert "attributes" not in capsys.readouterr().out


DAMAGES = {
    "too few labels": lambda state: state.update(labels=state["labels"][:, :1]),
    "no labels": lambda state: state.update(labels=state["labels"][:0]),
    "no tensor": lambda state: state.update(labels=[1, 2]),
    "no names": lambda state: state.update(attributes=None),
    "too many names": lambda state: state["attributes"].append("Bald"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_whose_labels_do_not_fit_is_one_line(drawer, capsys, damage):
    state = checkpoint(name="generator.pt")
    DAMAGES[damage](state)
    torch.save(state, "output/generator.pt")
    assert "is not a checkpoint of dcgan.py" in refused(capsys, "generate")


def test_a_checkpoint_of_a_version_without_attributes_is_used_and_resumed(tiny, capsys):
    train(tiny, capsys, DATA_DIR="faces", EPOCHS=1)
    for name in ("checkpoint.pt", "generator.pt"):
        state = checkpoint(name=name)
        del state["labels"], state["attributes"], state["settings"]["ATTRIBUTES"]
        torch.save(state, f"output/{name}")
    assert tiny.main(["generate", "--num-images", "1"]) == 0
    assert "resuming" in train(tiny, capsys, DATA_DIR="faces")


def test_the_demo_knows_what_it_draws(workplace):
    words = flags(EPOCHS=1, MAX_IMAGES=64, ATTRIBUTES="Smiling,Blue_Eyes")
    said = succeed("--demo", *words, cwd=workplace)
    assert "attributes: Smiling" in said and "3,936 beyond" in said
    rows = table(workplace / "data/demo/images" / TABLE)
    assert len(rows) == 4000 and list(rows[7].values()) == [
        "000007.jpg",
        *("1" if label == 1 else "0" for label in drawn(7)),
    ]
    assert (workplace / "output-demo/attributes.png").exists()
