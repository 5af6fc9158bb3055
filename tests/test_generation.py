"""New faces from a trained generator: generate_images, generate, interpolate."""

import inspect
import math
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import TINY, draw_faces, flags, one_line, refused, succeed
from PIL import Image
from reading import checkpoint, everything, film, pixels

import dcgan

SIZE = TINY["IMAGE_SIZE"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The OUTPUT_DIR of a tiny run, with weights for faces that differ. The images are gone."""
    place = tmp_path_factory.mktemp("trained")
    faces, output = draw_faces(place / "faces", 8), place / "output"
    places = {"DATA_DIR": faces, "CACHE_DIR": place / "cache", "OUTPUT_DIR": output}
    assert dcgan.main(flags(**places, EPOCHS=1)) == 0
    for name in ("checkpoint.pt", "generator.pt"):
        state = checkpoint(place, name)
        generator = dcgan.build_generator(state)
        noise = torch.Generator().manual_seed(0)
        for weight in generator.parameters():
            if weight.dim() == 4:  # convolutions that neither damp nor amplify
                weight.normal_(0, (2 / 4 / len(weight)) ** 0.5, generator=noise)
        state["average"] = dcgan.refresh_batchnorm(generator).state_dict()
        torch.save(state, output / name)
    shutil.rmtree(faces)
    return output


@pytest.fixture
def drawer(trained, tiny):
    """`dcgan` whose OUTPUT_DIR holds a generator.pt alone, and whose constants are other ones."""
    os.mkdir("output")
    shutil.copy(trained / "generator.pt", "output")
    others = {"IMAGE_SIZE": 256, "LATENT_SIZE": 3, "G_FEATURES": 5, "DATA_DIR": "nowhere"}
    vars(tiny).update(others)
    return tiny


def same(picture, image):
    """Whether a picture of bytes holds an image in [0, 1], each value rounded."""
    return torch.equal(picture, image.mul(255).round().byte())


# ------------------------------------------------------------------------------------------- images


def test_images_come_from_generator_pt_alone_whatever_the_constants_say(drawer, capsys):
    images = drawer.generate_images(num_images=5, seed=1)
    assert images.shape == (5, 3, SIZE, SIZE) and images.dtype == torch.float32
    assert images.min() >= 0 and images.max() <= 1
    assert images.std(0).mean() > 0.02  # they differ
    assert drawer.IMAGE_SIZE == 256  # and stays so
    assert "output/generated.png" in capsys.readouterr().out
    assert sorted(os.listdir("output")) == ["generated.png", "generator.pt"]


def test_the_grid_holds_the_images_in_order(drawer):
    images = drawer.generate_images(num_images=5, seed=1)
    grid = pixels("output/generated.png")
    assert grid.shape == (3, 2 * 34 + 2, 3 * 34 + 2)  # 3 a row, 2 pixels between
    for index, image in enumerate(images):
        row, column = divmod(index, 3)
        cut = grid[:, 2 + 34 * row :, 2 + 34 * column :]
        assert same(cut[:, :SIZE, :SIZE], image)


def test_a_seed_decides_on_the_images_and_more_begin_with_the_same(drawer):
    few, same, other = (drawer.generate_images(6, seed=seed) for seed in (1, 1, 2))
    many, one = drawer.generate_images(130, seed=1), drawer.generate_images(1, seed=1)
    assert torch.equal(few, same) and not torch.equal(few, other)
    assert torch.equal(many[:6], few) and torch.equal(one, few[:1])
    assert len(many) == len(many.flatten(1).unique(dim=0)) == 130
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
    path = tmp_path / "new/folder/faces.png"
    for source in (trained / "checkpoint.pt", str(trained / "generator.pt")):
        assert torch.equal(drawer.generate_images(2, 3, source, path), images)
        assert pixels(path).shape == (3, 36, 70)
        path.unlink()
    assert os.listdir("output") == ["generator.pt"]
    drawer.OUTPUT_DIR = str(trained)  # a whole run's folder serves as well
    assert torch.equal(drawer.generate_images(2, 3, output="elsewhere.png"), images)


def test_noise_scaled_down_gives_faces_that_are_more_alike(drawer):
    def spread(truncation):
        return drawer.generate_images(20, seed=3, truncation=truncation).std(0).mean()

    full, half, none = spread(1), spread(0.5), spread(0)
    assert none < 1e-6 < half < 0.8 * full
    images = drawer.generate_images(2, seed=3, truncation=0.5)
    assert not torch.equal(images, drawer.generate_images(2, seed=3))
    assert drawer.main(["generate", "--num-images", "2", "--seed", "3", "--truncation", "0.5"]) == 0
    assert same(pixels("output/generated.png")[:, 2 : 2 + SIZE, 2 : 2 + SIZE], images[0])
    command = ["generate", "--num-images=2", "--seed=3", "--truncation=0.5", "--individual"]
    assert drawer.main(command) == 0
    assert same(pixels("output/generated/000001.png"), images[1])


# ------------------------------------------------------------------------------------------ command


def test_the_command_draws_a_grid_or_a_file_an_image(drawer, capsys):
    images = drawer.generate_images(5, seed=1)
    grid = pixels("output/generated.png")
    os.remove("output/generated.png")
    command = ["generate", "--num-images", "5", "--seed", "1"]
    assert drawer.main(command) == 0
    assert torch.equal(pixels("output/generated.png"), grid)
    os.remove("output/generated.png")
    for arguments, folder in (([], "output/generated"), (["--output", "my faces"], "my faces")):
        assert drawer.main([*command, "--individual", *arguments]) == 0
        assert folder in capsys.readouterr().out
        assert sorted(os.listdir(folder)) == [f"{index:06d}.png" for index in range(5)]
        for index, image in enumerate(images):
            assert same(pixels(f"{folder}/{index:06d}.png"), image)
    assert not os.path.exists("output/generated.png")
    assert drawer.main(["generate", "--num-images", "1", "--output", "one.png"]) == 0
    assert pixels("one.png").shape == (3, SIZE, SIZE)
    assert "seed " in capsys.readouterr().out


def test_more_images_than_a_grid_holds_are_refused_unless_each_gets_a_file(
    drawer, monkeypatch, capsys
):
    monkeypatch.setattr(drawer, "GRID_LIMIT", 4)
    command = ["generate", "--num-images", "5", "--seed", "1"]
    before = everything()
    one_line(refused(capsys, *command), "num_images (--num-images) is 5", "--individual")
    assert everything() == before
    assert drawer.main([*command, "--individual"]) == 0
    assert len(os.listdir("output/generated")) == 5
    assert drawer.main(["generate", "--num-images", "4"]) == 0


def test_from_python_all_images_come_and_a_grid_of_the_first_ones(drawer, monkeypatch):
    monkeypatch.setattr(drawer, "GRID_LIMIT", 4)
    images = drawer.generate_images(70, seed=1)
    assert len(images) == 70
    grid = pixels("output/generated.png")
    assert grid.shape == (3, 70, 70) and same(grid[:, 36:68, 36:68], images[3])
    assert sorted(os.listdir("output")) == ["generated.png", "generator.pt"]


@pytest.mark.parametrize(
    "line, says",
    [
        ("generate --num-images 0", r"num_images.* 1\.\.1000000000 "),
        ("generate --num-images -3 --individual", "num_images"),
        ("generate --num-images 1025", "--individual"),
        ("generate --seed -1", "seed"),
        ("generate --truncation 1.5", r"truncation.* 0\.0\.\.1\.0"),
        (f"generate --seed {2**64}", "seed"),
        ("generate --checkpoint no.pt", r"no\.pt"),
        ("generate --checkpoint no.pt --individual", r"no\.pt"),
        ("generate --checkpoint faces/000000.jpg", r"000000\.jpg"),
        ("generate --output-dir untrained", "untrained.*train first"),
        ("interpolate --num-faces 1", r"num_faces.* 2\.\.1000 "),
        ("interpolate --frames 0", r"frames.* 1\.\.1000 "),
        ("interpolate --seed -1", "seed"),
        ("interpolate --checkpoint faces", "faces"),
    ],
)
def test_a_wrong_number_or_path_ends_in_one_line_and_leaves_nothing_behind(
    drawer, capsys, line, says
):
    before = everything()
    assert re.search(says, refused(capsys, *line.split()))
    assert everything() == before


def test_from_python_a_wrong_number_is_a_value_error(drawer):
    for number in (0, -1, 2.5, None, "x", True):
        with pytest.raises(ValueError, match="num_images"):
            drawer.generate_images(number)
    for arguments in ((1,), (8, 0), (8, 1.5)):
        with pytest.raises(ValueError, match="num_faces|frames"):
            drawer.interpolate(*arguments)
    names = "num_images seed checkpoint output truncation attributes".split()
    assert list(inspect.signature(drawer.generate_images).parameters) == names


MEMORY = """
import os, resource
import dcgan
for number in ("64", "200", "1200"):
    command = ["generate", "--individual", "--num-images", number, "--output", number]
    assert dcgan.main([*command, "--device", "cpu"]) == 0
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print("MiB and files", memory, len(os.listdir(number)))
"""


def test_the_memory_of_individual_images_does_not_grow_with_their_number(drawer, workplace):
    shape = {"IMAGE_SIZE": 64, "LATENT_SIZE": 4, "G_FEATURES": 4, "D_FEATURES": 4}
    average = drawer.Generator(64, 4, 4).state_dict()
    state = {"settings": shape, "epoch": 1, "images": 1, "average": average}
    torch.save(state, "output/generator.pt")
    said = succeed(cwd=workplace, program=["-c", MEMORY])
    found = re.findall(r"MiB and files (\d+) (\d+)", said)
    assert [files for _, files in found] == ["64", "200", "1200"]
    # MiB; 1,000 images more would be 47 as floats.
    assert int(found[2][0]) - int(found[1][0]) < 20


FORMATS = {"a.png": "PNG", "b.JPG": "JPEG", "c.jpeg": "JPEG", "d.webp": "WEBP"}


def test_the_extension_of_an_output_decides_on_its_format(drawer):
    images = drawer.generate_images(1, seed=1)
    for name, form in FORMATS.items():
        drawer.generate_images(1, seed=1, output=name)
        with Image.open(name) as picture:
            assert picture.format == form
        assert (pixels(name).float() / 255).mean() == pytest.approx(
            images[0].mean().item(), abs=0.02
        )
    command = ["interpolate", "--num-faces", "2", "--frames", "3", "--seed", "1"]
    for name, form in {"w.gif": "GIF", "w.webp": "WEBP"}.items():
        assert drawer.main([*command, "--output", name]) == 0
        with Image.open(name) as picture:
            assert (picture.format, picture.n_frames) == (form, 6)


@pytest.mark.parametrize("name", ["faces", "faces.gif", "faces.bmp", "faces.jpg.txt", ".png"])
def test_an_output_of_another_format_is_refused_before_anything_is_drawn(drawer, capsys, name):
    before = everything()
    line = refused(capsys, "generate", "--output", name)
    assert name in line and ".png, .jpg, .jpeg, .webp" in line
    if name.endswith(".gif"):
        line = refused(capsys, "interpolate", "--output", "walk.png")
    assert everything() == before


def test_a_folder_of_single_images_holds_those_of_one_call_alone(drawer, capsys):
    command = ["generate", "--individual", "--seed", "1", "--num-images"]
    assert drawer.main([*command, "5"]) == 0
    before = everything()
    line = refused(capsys, *command, 3)
    assert "output/generated is not empty" in line and "--output" in line
    assert everything() == before
    os.mkdir("hidden")
    Path("hidden/.DS_Store").touch()  # does not count
    assert drawer.main([*command, "3", "--output", "hidden"]) == 0
    assert sorted(os.listdir("hidden")) == [".DS_Store"] + [f"{i:06d}.png" for i in range(3)]


# -------------------------------------------------------------------------------------- interpolate


def test_the_film_walks_in_small_steps_from_face_to_face_and_round(drawer, capsys):
    assert drawer.main(["interpolate", "--num-faces", "3", "--frames", "12", "--seed", "1"]) == 0
    assert "output/interpolation.gif" in capsys.readouterr().out
    pictures, times = film("output/interpolation.gif")
    assert len(pictures) == 36 and len(set(times)) == 1
    pictures = pictures.float()
    # The last step is the one back to the first frame.
    steps = (pictures - pictures.roll(-1, 0)).abs().mean((1, 2, 3))
    corners = pictures[::12]
    apart = (corners - corners.roll(-1, 0)).abs().mean((1, 2, 3))
    assert apart.min() > 1
    assert steps.max() < apart.min() / 2 and steps[-1] < 2.5 * steps.median()


def test_the_walk_begins_at_the_faces_and_stays_where_noise_lies(drawer, monkeypatch):
    trained = drawer.TrainedGenerator()
    [corners] = trained.latents(3, seed=1)
    walks, draw = [], drawer.TrainedGenerator.draw

    def drawn(trained, latents):
        walks.append(latents)
        return draw(trained, latents)

    monkeypatch.setattr(drawer.TrainedGenerator, "draw", drawn)
    drawer.interpolate(num_faces=3, frames=12, seed=1)
    assert len(walks) == 3
    for walk, corner in zip(walks, corners):
        length = math.sqrt(len(corner))
        torch.testing.assert_close(walk[0], corner / corner.norm() * length)
        torch.testing.assert_close(walk.norm(dim=1), torch.full((12,), length))


def test_a_film_has_the_frames_asked_for_and_its_path_is_returned(drawer):
    path = drawer.interpolate(num_faces=2, frames=5, seed=3, output="deep/er/walk.gif")
    assert path == Path("deep/er/walk.gif").absolute() and len(film(path)[0]) == 10
    assert len(film(drawer.interpolate(2, 1, seed=3))[0]) == 2
    assert len(film(drawer.interpolate(seed=3))[0]) == 8 * 16
    first = path.read_bytes()
    assert drawer.interpolate(2, 5, 3, output="again.gif").read_bytes() == first
    assert drawer.interpolate(2, 5, 4, output="other.gif").read_bytes() != first
