"""New faces from a trained generator: generate_images, generate, interpolate."""

import inspect
import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY, draw_faces, flags
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

import dcgan


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The OUTPUT_DIR of a tiny run, with weights for faces that differ. The images are gone."""
    place = tmp_path_factory.mktemp("trained")
    faces = draw_faces(place / "faces", 8)
    places = flags(DATA_DIR=faces, CACHE_DIR=place / "cache", OUTPUT_DIR=place / "output", EPOCHS=1)
    assert dcgan.main(places) == 0
    for name in ("checkpoint.pt", "generator.pt"):
        state = torch.load(place / "output" / name, weights_only=True)
        for tensor in state["ema"].values():
            if tensor.dim() == 4:  # convolutions that neither damp nor amplify
                tensor.normal_(0, (2 / 4 / len(tensor)) ** 0.5, generator=torch.Generator().manual_seed(0))
        torch.save(state, place / "output" / name)
    for face in faces.iterdir():
        face.unlink()
    return place / "output"


@pytest.fixture
def drawer(trained, tiny, monkeypatch):
    """`dcgan` whose OUTPUT_DIR holds a trained generator.pt alone, and whose networks' constants are other ones."""
    os.mkdir("output")
    (dcgan.Path("output") / "generator.pt").write_bytes((trained / "generator.pt").read_bytes())
    for name, value in {"IMAGE_SIZE": 256, "LATENT_SIZE": 3, "G_FEATURES": 5, "DATA_DIR": "nowhere"}.items():
        monkeypatch.setattr(dcgan, name, value)
    return dcgan


def everything():
    return {path: path.lstat().st_mtime_ns for path in dcgan.Path().rglob("*")}


def picture(path):
    with Image.open(path) as image:
        return pil_to_tensor(image.convert("RGB"))


# ------------------------------------------------------------------------------------------------------- images


def test_images_come_from_generator_pt_alone_whatever_the_constants_say(drawer, capsys):
    images = drawer.generate_images(num_images=5, seed=1)
    assert images.shape == (5, 3, TINY["IMAGE_SIZE"], TINY["IMAGE_SIZE"]) and images.dtype == torch.float32
    assert images.min() >= 0 and images.max() <= 1 and images.std(0).mean() > 0.02  # they differ
    assert drawer.IMAGE_SIZE == 256  # and stays so
    assert "output/generated.png" in capsys.readouterr().out
    assert sorted(os.listdir("output")) == ["generated.png", "generator.pt"]


def test_the_grid_holds_the_images_in_order(drawer):
    images = drawer.generate_images(num_images=5, seed=1)
    grid = picture("output/generated.png")
    assert grid.shape == (3, 2 * 34 + 2, 3 * 34 + 2)  # 3 a row, 2 pixels between
    for index, image in enumerate(images):
        row, column = divmod(index, 3)
        cut = grid[:, 2 + 34 * row :, 2 + 34 * column :][:, :32, :32]
        assert (cut.float() / 255 - image).abs().max() < 1.01 / 255


def test_a_seed_decides_on_the_images_and_more_begin_with_the_same(drawer):
    few, same, other = (drawer.generate_images(6, seed=seed) for seed in (1, 1, 2))
    many, one = drawer.generate_images(130, seed=1), drawer.generate_images(1, seed=1)
    assert torch.equal(few, same) and not torch.equal(few, other)
    assert torch.equal(many[:6], few) and torch.equal(one, few[:1])
    assert many.shape[0] == 130 and len(many.flatten(1).unique(dim=0)) == 130
    torch.rand(7)
    assert torch.equal(drawer.generate_images(6, seed=1), few)


def test_a_seed_of_none_is_drawn_and_printed(drawer, capsys):
    images = drawer.generate_images(2)
    seed = int(re.search(r"seed (\d+)", capsys.readouterr().out)[1])
    assert torch.equal(drawer.generate_images(2, seed=seed), images)
    assert not torch.equal(drawer.generate_images(2), images)


def test_a_checkpoint_and_an_output_may_be_given(drawer, trained, tmp_path):
    images = drawer.generate_images(2, seed=3)
    os.remove("output/generated.png")
    for checkpoint in (trained / "checkpoint.pt", str(trained / "generator.pt")):
        assert torch.equal(drawer.generate_images(2, 3, checkpoint, tmp_path / "new/folder/faces.png"), images)
    assert picture("new/folder/faces.png").shape == (3, 36, 70) and os.listdir("output") == ["generator.pt"]
    drawer.OUTPUT_DIR = str(trained)  # a whole run's folder serves as well
    assert torch.equal(drawer.generate_images(2, 3, output="elsewhere.png"), images)


# ------------------------------------------------------------------------------------------------------ command


def test_the_command_draws_a_grid_or_a_file_an_image(drawer, capsys):
    images = drawer.generate_images(5, seed=1)
    grid = picture("output/generated.png")
    os.remove("output/generated.png")
    assert drawer.main(["generate", "--num-images", "5", "--seed", "1"]) == 0
    assert torch.equal(picture("output/generated.png"), grid)
    os.remove("output/generated.png")
    for arguments, folder in (((), "output/generated"), (("--output", "my faces"), "my faces")):
        assert drawer.main(["generate", "--num-images", "5", "--seed", "1", "--individual", *arguments]) == 0
        assert folder in capsys.readouterr().out
        assert sorted(os.listdir(folder)) == [f"{index:06d}.png" for index in range(5)]
        for index, image in enumerate(images):
            assert (picture(f"{folder}/{index:06d}.png") / 255 - image).abs().max() < 1.01 / 255
    assert not os.path.exists("output/generated.png")
    assert drawer.main(["generate", "--num-images", "1", "--output", "one.png"]) == 0
    assert picture("one.png").shape[1:] in ((32, 32), (36, 36)) and "seed " in capsys.readouterr().out


def test_more_images_than_a_grid_holds_become_files_too(drawer, monkeypatch):
    monkeypatch.setattr(drawer, "GRID_LIMIT", 4)
    assert drawer.generate_images(70, seed=1).shape[0] == 70
    grid = picture("output/generated.png")
    assert grid.shape == (3, 70, 70) and os.listdir("output").count("generated") == 0
    os.remove("output/generated.png")
    assert drawer.main(["generate", "--num-images", "70", "--seed", "1"]) == 0
    assert torch.equal(picture("output/generated.png"), grid) and len(os.listdir("output/generated")) == 70


@pytest.mark.parametrize(
    "arguments, says",
    [
        (("generate", "--num-images", "0"), "num_images.* from 1 "),
        (("generate", "--num-images", "-3", "--individual"), "num_images"),
        (("generate", "--num-images", "many"), "many"),
        (("generate", "--num-images", "2.5"), r"2\.5"),
        (("generate", "--seed", "-1"), "seed"),
        (("generate", "--seed", str(2**64)), "seed"),
        (("generate", "--checkpoint", "no.pt"), r"no\.pt"),
        (("generate", "--checkpoint", "no.pt", "--individual"), r"no\.pt"),
        (("generate", "--checkpoint", "faces/000000.jpg"), r"000000\.jpg"),
        (("generate", "--output-dir", "untrained"), "untrained.*train first"),
        (("interpolate", "--num-faces", "1"), "num_faces.* from 2 "),
        (("interpolate", "--frames", "0"), "frames.* from 1 "),
        (("interpolate", "--seed", "-1"), "seed"),
        (("interpolate", "--checkpoint", "faces"), "faces"),
    ],
)
def test_a_wrong_number_or_path_ends_in_one_line_and_leaves_nothing_behind(drawer, capsys, arguments, says):
    before = everything()
    status, captured = drawer.main(list(arguments)), capsys.readouterr()
    assert captured.err.startswith("dcgan.py: error: ") and captured.err.count("\n") == 1
    assert re.search(says, captured.err) and everything() == before
    assert status == 2


def test_from_python_a_wrong_number_is_a_value_error(drawer):
    for number in (0, -1, 2.5, None, "x", True):
        with pytest.raises(ValueError, match="num_images"):
            drawer.generate_images(number)
    for arguments in ((1,), (8, 0), (8, 1.5)):
        with pytest.raises(ValueError, match="num_faces|frames"):
            drawer.interpolate(*arguments)
    names = list(inspect.signature(drawer.generate_images).parameters)
    assert names == ["num_images", "seed", "checkpoint", "output"]


MEMORY = """
import os, resource, sys
sys.path.insert(0, {root!r})
import dcgan
for number in (64, 200, 1200):
    assert dcgan.main(["generate", "--individual", "--num-images", str(number), "--device", "cpu"]) == 0
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, len(os.listdir("output/generated")))
"""


def test_the_memory_of_individual_images_does_not_grow_with_their_number(drawer, workplace):
    os.remove("output/generator.pt")
    shape = {"IMAGE_SIZE": 64, "LATENT_SIZE": 4, "G_FEATURES": 4}
    state = {
        "settings": shape | {"D_FEATURES": 4},
        "epoch": 1,
        "images": 1,
        "ema": drawer.Generator(64, 4, 4).state_dict(),
    }
    torch.save(state, "output/generator.pt")
    done = subprocess.run(
        [sys.executable, "-c", MEMORY.format(root=str(ROOT))], cwd=workplace, text=True, capture_output=True,
        timeout=300, check=True,
    )  # fmt: skip
    sizes = [list(map(int, line.split())) for line in done.stdout.splitlines() if line[0].isdigit()]
    assert [count for _, count in sizes] == [64, 200, 1200]
    assert sizes[2][0] - sizes[1][0] < 20  # MiB; 1,000 images more would be 47 as floats


# -------------------------------------------------------------------------------------------------- interpolate


def frames(path):
    with Image.open(path) as film:
        pictures, times = [], []
        for index in range(film.n_frames):
            film.seek(index)
            pictures.append(pil_to_tensor(film.convert("RGB")).float())
            times.append(film.info["duration"])
        return torch.stack(pictures), times, film.info.get("loop")


def test_the_film_walks_in_small_steps_from_face_to_face_and_round(drawer, capsys):
    assert drawer.main(["interpolate", "--num-faces", "3", "--frames", "12", "--seed", "1"]) == 0
    assert "output/interpolation.gif" in capsys.readouterr().out
    pictures, times, loop = frames("output/interpolation.gif")
    assert len(pictures) == 36 and loop == 0 and len(set(times)) == 1
    steps = (pictures - pictures.roll(-1, 0)).abs().mean((1, 2, 3))  # the last is the one back to the first frame
    corners = pictures[::12]
    apart = (corners - corners.roll(-1, 0)).abs().mean((1, 2, 3))
    assert steps.max() < apart.min() / 2 and steps[-1] < 2.5 * steps.median() and apart.min() > 1


def test_a_film_has_the_frames_asked_for_and_its_path_is_returned(drawer):
    path = drawer.interpolate(num_faces=2, frames=5, seed=3, output="deep/er/walk.gif")
    assert str(path) == "deep/er/walk.gif" and len(frames(path)[0]) == 10
    assert len(frames(drawer.interpolate(2, 1, seed=3))[0]) == 2
    assert len(frames(drawer.interpolate(seed=3))[0]) == 8 * 16
    first = path.read_bytes()
    assert drawer.interpolate(2, 5, 3, output="again.gif").read_bytes() == first
    assert drawer.interpolate(2, 5, 4, output="other.gif").read_bytes() != first
