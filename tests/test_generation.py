"""New faces from a trained generator: generate_images, generate, interpolate."""

import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from conftest import TINY, checkpoint, exit_status, files, pixels, refused
from PIL import Image

import dcgan

SIZE, NOISE = TINY["IMAGE_SIZE"], TINY["LATENT_SIZE"]


@pytest.fixture
def output(finished, tmp_path, monkeypatch):
    """OUTPUT_DIR, with generator.pt alone, whose faces differ; the constants are other ones."""
    monkeypatch.chdir(tmp_path)
    vars(dcgan).update(IMAGE_SIZE=256, LATENT_SIZE=3, DEVICE="cpu", PRECISION="float32")
    state = checkpoint(finished, "generator.pt")
    *_, last, _ = state["average"]  # the weight of the last layer, before its bias
    state["average"][last] *= 20
    Path("output").mkdir()
    torch.save(state, "output/generator.pt")
    return Path("output")


@pytest.fixture
def drawn(monkeypatch):
    """A list of all latents that are drawn."""
    found, draw = [], dcgan.draw
    monkeypatch.setattr(dcgan, "draw", lambda g, z, dtype: found.append(z) or draw(g, z, dtype))
    return found


def test_faces_come_from_generator_pt_alone_whatever_the_constants_say(output, capsys):
    images = dcgan.generate_images(num_images=5, seed=1)
    assert images.shape == (5, 3, SIZE, SIZE) and images.dtype == torch.float32
    assert images.min() >= 0 and images.max() <= 1 and images.std(0).mean() > 0.02
    assert "output/generated.png" in capsys.readouterr().out
    assert sorted(files(".")) == ["output/generated.png", "output/generator.pt"]


def test_the_file_is_a_grid_of_the_returned_faces_in_order_each_value_rounded(output):
    images = dcgan.generate_images(num_images=5, seed=1).mul(255).round().byte()
    picture = pixels("output/generated.png")
    assert picture.shape[2] >= 512, "it is too small to look at"
    scale = picture.shape[2] // (3 * (SIZE + 2) + 2)  # three a row, two pixels between
    grid = picture[:, 2 * scale :: scale, 2 * scale :: scale]
    tiles = grid.unfold(1, SIZE, SIZE + 2).unfold(2, SIZE, SIZE + 2).permute(1, 2, 0, 3, 4)
    assert torch.equal(tiles.flatten(0, 1)[:5], images)


def test_a_seed_decides_on_the_faces_and_more_begin_with_the_same(output, capsys):
    few, again, other = (dcgan.generate_images(6, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(few, again), "the same seed gives other faces"
    assert not torch.equal(few, other), "the seed is ignored"
    many = dcgan.generate_images(130, seed=1)
    torch.testing.assert_close(many[:6], few)
    assert len(many) == len(many.flatten(1).unique(dim=0)) == 130
    images = dcgan.generate_images(2)
    seed = int(re.search(r"seed (\d+)", capsys.readouterr().out)[1])
    assert not torch.equal(dcgan.generate_images(2), images), "there is a seed by default"
    assert torch.equal(dcgan.generate_images(2, seed=seed), images), "another seed is printed"


def test_truncation_makes_faces_more_alike(output):
    options = {"num_images": 20, "seed": 3, "attributes": "Odd,Late"}
    sets = [dcgan.generate_images(truncation=share, **options) for share in (0, 0.5, 1)]
    none, half, full = (images.std(0).mean() for images in sets)
    assert none < 1e-6 < half < 0.9 * full, "truncation is ignored"


def test_the_command_does_what_its_flags_say(output):
    dcgan.generate_images(5, 7, None, "python.png", 0.5, "-Odd")
    command = "generate --num-images 5 --seed 7 --truncation 0.5 --attributes -Odd".split()
    assert dcgan.main([*command, "--output", "command.png"]) == 0
    assert torch.equal(pixels("python.png"), pixels("command.png"))


@pytest.mark.parametrize("name", ["file/faces.png", "faces.txt", "folder.png"])
def test_faces_are_returned_even_if_no_file_can_be_written(output, capsys, name):
    Path("file").touch()
    Path("folder.png").mkdir()
    assert len(dcgan.generate_images(2, seed=1, output=name)) == 2
    assert f"{name} cannot be written" in capsys.readouterr().out
    for command in ("generate --num-images 2", "interpolate --num-faces 2 --frames 1"):
        assert exit_status(*command.split(), "--output", name) == 1
    assert sorted(files(".")) == ["file", "output/generator.pt"]


def test_individual_files_hold_exactly_the_returned_faces(output):
    images = dcgan.generate_images(5, seed=1).mul(255).round().byte()
    folder = dcgan.generate_images(5, seed=1, output="my faces", individual=True)
    names = [f"{index:06d}.png" for index in range(5)]
    assert sorted(files(folder)) == names
    assert torch.equal(torch.stack([pixels(folder / name) for name in names]), images)


def test_individual_files_of_a_stopped_call_are_completed_by_the_same_line(output, monkeypatch):
    command = "generate --individual --num-images 70 --seed 1".split()
    assert dcgan.main([*command, "--output", "whole"]) == 0
    wanted = [path.read_bytes() for _, path in sorted(files("whole").items())]
    draws = iter([dcgan.draw, lambda *z, **t: signal.raise_signal(signal.SIGINT)])
    with monkeypatch.context() as patched:
        patched.setattr(dcgan, "draw", lambda *z, **t: next(draws)(*z, **t))
        assert dcgan.main(command) == 130
    half = files("output/generated")
    assert len(half) == 64, "files are not written as soon as they are drawn"
    half["000063.png"].write_bytes(wanted[63][:100])
    assert dcgan.main(command) == 0
    assert [path.read_bytes() for _, path in sorted(files("output/generated").items())] == wanted


def test_individual_files_never_overwrite_others(output, capsys):
    Path("mine").mkdir()
    Path("mine/000001.png").write_bytes(b"a picture of mine")
    command = "generate --individual --num-images 3 --seed 1 --output mine".split()
    refused(capsys, *command, words=["mine", "another output"])
    assert Path("mine/000001.png").read_bytes() == b"a picture of mine"


def test_the_generator_of_the_best_epoch_is_drawn_not_that_of_the_last(output, finished):
    best = dcgan.generate_images(2, seed=1)
    shutil.copy(finished / "output/checkpoint.pt", output)
    assert torch.equal(dcgan.generate_images(2, seed=1), best), "checkpoint.pt is preferred"
    other = dcgan.generate_images(2, seed=1, checkpoint="output/checkpoint.pt")
    assert not torch.equal(other, best), "the checkpoint asked for is not drawn"
    Path("output/generator.pt").unlink()
    assert torch.equal(dcgan.generate_images(2, seed=1), other)  # better than nothing


def test_pictures_lie_beside_the_checkpoint_and_nowhere_else(output):
    output.rename("shared")
    dcgan.generate_images(1, checkpoint="shared/generator.pt")
    dcgan.generate_images(1, checkpoint=Path("shared/generator.pt"), individual=True)
    dcgan.interpolate(2, 1, checkpoint="shared/generator.pt")
    names = ["generated.png", "generated/000000.png", "generator.pt", "interpolation.gif"]
    assert sorted(files(".")) == [f"shared/{name}" for name in names]
    assert not output.exists()


WRONG = {
    "generate --num-images 0": "num_images",
    "generate --truncation 1.5": "truncation",
    "generate --checkpoint no.pt": "no.pt",
    "generate --checkpoint notes.txt --individual": "notes.txt",
    "generate --attributes Bald": "'Bald'",
    "generate --attributes Odd,-Odd": "'Odd'",
    "interpolate --num-faces 1": "num_faces",
}


@pytest.mark.parametrize("line", WRONG)
def test_a_wrong_argument_or_file_is_one_line_and_leaves_nothing(output, capsys, line):
    Path("notes.txt").write_text("not a checkpoint")
    refused(capsys, *line.split(), words=[WRONG[line]])
    assert sorted(files(".")) == ["notes.txt", "output/generator.pt"]


@pytest.mark.parametrize(
    "wish, folders, labels",
    [
        (None, False, [(0, 0), (0, 1), (1, 0), (1, 1)]),
        ("Odd", False, [(1, 0), (1, 1)]),
        (["-Odd", " Late"], False, [(0, 1)]),
        ("-Late", True, [(1, 0)]),
        ("Late", True, [(0, 1)]),  # and not Odd: an image is in one folder
    ],
)
def test_faces_have_what_was_asked_for(output, drawn, wish, folders, labels):
    if folders:
        state = checkpoint(name="generator.pt") | {"labels": torch.tensor([[1.0, 0.0]])}
        state["settings"]["ATTRIBUTES"] = "folders"
        torch.save(state, "output/generator.pt")
    dcgan.generate_images(64, seed=1, attributes=wish)
    assert sorted({*map(tuple, drawn[0][:, NOISE:].tolist())}) == labels, "the wish is ignored"


def test_an_animation_has_the_frames_asked_for_loops_and_begins_at_a_face(output, capsys):
    path = dcgan.interpolate(num_faces=3, frames=4, seed=1)
    assert str(path) in capsys.readouterr().out
    with Image.open("output/interpolation.gif") as film:
        assert (film.n_frames, film.info["loop"], film.width) == (12, 0, 512)
    first = pixels(path)[:, :: 512 // SIZE, :: 512 // SIZE]
    gaps = (dcgan.generate_images(3, seed=1) - first / 255).abs().mean((1, 2, 3))
    assert gaps[0] < gaps[1:].min() / 2


def test_between_two_faces_noise_keeps_its_length_and_labels_fade(output, drawn):
    dcgan.interpolate(num_faces=3, frames=2, seed=1, output="walk.webp")
    corners, half = torch.stack(drawn).unbind(1)
    noise, labels = (corners + corners.roll(-1, 0)).tensor_split([NOISE], 1)
    torch.testing.assert_close(half, torch.cat([noise / 2**0.5, labels / 2], 1))
