"""What a run shows: samples, losses.png, real_vs_fake.png, training.gif, and its advice."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import film, flags, pixels, run, start, table, until
from PIL import Image
from torchvision.utils import make_grid

import dcgan

FILM = "output/training.gif"


def rows(folder="output"):
    """The rows of metrics.csv as lists of text."""
    return [list(row.values()) for row in table(f"{folder}/metrics.csv")]


# -------------------------------------------------------------------------------------------- a run


def test_a_run_leaves_all_its_pictures_even_with_a_backend_that_is_not_there(
    workplace, monkeypatch
):
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.chdir(workplace)
    done = run(
        *flags(DATA_DIR="faces", LOG_EVERY=2),
        cwd=workplace,
        env={"MPLBACKEND": "module://no_such_backend.x"},
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    grids = [f"epoch_00{epoch}.png" for epoch in range(3)]
    assert sorted(os.listdir("output/samples")) == [*grids, "latest.png"]
    for epoch in range(3):
        assert pixels(f"output/samples/epoch_00{epoch}.png").shape == (3, 8 * 34 + 2, 8 * 34 + 2)
    for name in ("losses.png", "real_vs_fake.png"):
        drawn = pixels(f"output/{name}").float()
        assert min(drawn.shape[1:]) >= 500 and drawn.std() > 5
    frames, times = film(FILM)
    assert len(frames) == 3 and times[-1] >= 2000 > max(times[:-1])
    assert not list(workplace.rglob("*.part"))

    numbers = rows()
    assert (
        Path("output/metrics.csv").read_text().split("\n")[0]
        == "epoch,step,images,loss_d,loss_g,d_real,d_fake,images_per_second"
    )
    assert [list(map(int, row[:3])) for row in numbers] == [
        [1, 2, 16],
        [1, 4, 32],
        [1, 5, 40],
        [2, 2, 56],
        [2, 4, 72],
        [2, 5, 80],
    ]
    for *_, loss_d, loss_g, d_real, d_fake, speed in (map(float, row) for row in numbers):
        assert (
            0 < loss_d < 10 and 0 < loss_g < 10 and 0 < d_real < 1 and 0 < d_fake < 1 and speed > 1
        )
    assert b"\r" not in open("output/metrics.csv", "rb").read()


def test_the_pictures_of_a_resumed_run_are_those_of_one_that_was_not_stopped(tiny):
    assert dcgan.main(["--epochs", "3", "--output-dir", "whole"]) == 0
    assert dcgan.main(["--epochs", "1"]) == 0
    assert dcgan.main(["--epochs", "3"]) == 0
    assert [row[:7] for row in rows()] == [row[:7] for row in rows("whole")]
    assert len(rows()) == 3 * 3
    for name in (
        "losses.png",
        "real_vs_fake.png",
        "samples/epoch_000.png",
        "samples/epoch_003.png",
        "samples/latest.png",
    ):
        assert torch.equal(pixels(f"output/{name}"), pixels(f"whole/{name}")), name
    (resumed, times), (whole, other) = film(FILM), film("whole/training.gif")
    assert len(resumed) == 4 and times == other and torch.equal(resumed, whole)
    dcgan.EPOCHS = 4  # and losses.png does go on
    before = pixels("output/losses.png")
    dcgan.train()
    assert not torch.equal(before, pixels("output/losses.png")) and len(film(FILM)[0]) == 5


def test_samples_are_drawn_by_the_averaged_generator_from_noise_that_stays(tiny):
    """In eval mode: in train mode an image would depend on its batch."""
    tiny.LEARNING_RATE = 0.03
    tiny.train()
    state = torch.load("output/checkpoint.pt", weights_only=True)
    generator = tiny.Generator(32, 8, 4).eval()
    for weights, drawn in (("generator", False), ("average", True)):
        generator.load_state_dict(state[weights])
        with torch.no_grad():
            images = generator(state["fixed_noise"]).add(1).div(2)
        tiny.to_pil_image(make_grid(images, 8)).save("again.png")
        again, epoch = pixels("again.png").int(), pixels("output/samples/epoch_002.png").int()
        assert ((again - epoch).abs().max() <= 1) == drawn


def test_a_long_epoch_shows_something_new_whenever_it_is_saved(workplace):
    (workplace / "many").mkdir()
    for index in range(2_000):
        (workplace / f"many/{index}.jpg").symlink_to(workplace / f"faces/{index % 40:06d}.jpg")
    arguments = flags(DATA_DIR="many", BATCH_SIZE=2, LOG_EVERY=1, CHECKPOINT_MINUTES=0)
    output = workplace / "output"
    with start(*arguments, cwd=workplace) as process:
        until(lambda: len(table(output / "metrics.csv")) > 3)
        process.kill()
        said = process.communicate()[0]
    shown = sorted(path.name for path in (output / "samples").glob("*.png"))
    assert shown == ["epoch_000.png", "latest.png"]
    first, newest = (pixels(output / f"samples/{name}.png") for name in ("epoch_000", "latest"))
    assert not torch.equal(first, newest)
    assert (output / "losses.png").exists() and (output / "real_vs_fake.png").exists()
    assert said.count("latest.png") == 1


def test_a_fresh_run_in_a_used_folder_films_itself_alone(tiny):
    assert dcgan.main(["--epochs", "4"]) == 0
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        Path(f"output/{name}").unlink(missing_ok=True)
    assert dcgan.main(["--epochs", "1", "--seed", "1"]) == 0
    assert len(film(FILM)[0]) == 2 and len(rows()) == 3


def test_the_pictures_show_the_images_trained_on_beside_the_generators(tiny):
    """real_vs_fake.png: the left half is the same whatever was trained, the right half is not."""
    tiny.EPOCHS = 1
    tiny.train()
    one = pixels("output/real_vs_fake.png")
    for part in ("checkpoint.pt", "checkpoint.previous.pt"):
        if os.path.exists(f"output/{part}"):
            os.remove(f"output/{part}")
    tiny.G_FEATURES, tiny.LEARNING_RATE = 8, 0.05
    tiny.train()
    two = pixels("output/real_vs_fake.png")
    (left, right), (left_too, right_too) = one.chunk(2, dim=2), two.chunk(2, dim=2)
    assert torch.equal(left, left_too) and not torch.equal(right, right_too)
    colours = left.flatten(1).T.numpy()
    assert len(np.unique(colours[colours.std(1) > 10], axis=0)) > 500  # faces, in colour


# --------------------------------------------------------------------------------------------- film


def samples(number, draw, every=1):
    """The samples of `number` epochs, as a run leaves them; `draw(epoch)` gives a grid's pixels."""
    os.makedirs("output/samples", exist_ok=True)
    for epoch in range(0, number * every, every):
        Image.fromarray(draw(epoch)).save(f"output/samples/epoch_{epoch:03d}.png", compress_level=1)


def flat(epoch):
    return np.full((274, 274, 3), epoch % 256, np.uint8)


@pytest.mark.parametrize("epochs, length", [(1, 1), (2, 2), (60, 60), (61, 31), (150, 50)])
def test_the_film_has_at_most_60_frames_by_a_stride_and_rests_on_the_last(tiny, epochs, length):
    samples(epochs, flat)
    tiny.draw_film(2_000)
    frames, times = film(FILM)
    shades = [frame[0, 166, 166].item() for frame in frames]
    assert len(frames) == length and shades[-1] == epochs - 1
    assert times[-1] >= 2000 and all(20 < shown < 2000 for shown in times[:-1])
    stride = -(-epochs // 60)
    assert set(np.diff(shades)) <= {stride} and shades[0] < stride


def test_the_film_of_a_long_noisy_run_stays_under_3_megabytes(tiny):
    numbers = np.random.default_rng(0)
    samples(3, lambda epoch: numbers.integers(0, 256, (530, 530, 3), np.uint8))
    for epoch in range(3, 150):
        os.link(
            f"output/samples/epoch_{epoch % 3:03d}.png", f"output/samples/epoch_{epoch:03d}.png"
        )
    tiny.draw_film(2_000)
    frames, times = film(FILM)
    assert os.path.getsize("output/training.gif") < 3_000_000
    assert 8 <= len(frames) <= 60 and times[-1] >= 2000


def test_the_film_of_a_thousand_epochs_is_in_order(tiny):
    samples(11, lambda epoch: flat(epoch // 10), every=100)
    samples(1, lambda epoch: flat(200))
    os.rename("output/samples/epoch_000.png", "output/samples/epoch_1001.png")
    tiny.draw_film(2_000)
    shades = [frame[0, 166, 166].item() for frame in film(FILM)[0]]
    assert shades == [10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 200]


def test_a_strangers_file_among_the_samples_does_not_stop_a_run(tiny):
    os.makedirs("output/samples")
    for name in ("epoch_007 (copy).png", "epoch_best.png", "notes.txt"):
        (Path("output/samples") / name).write_text("not a picture")
    assert tiny.main([]) == 0
    assert len(film(FILM)[0]) == 3


# ------------------------------------------------------------------------------------------- advice


def told(rows, diversity):
    return list(dcgan.advice(rows, diversity))


def epoch_of(d_real, d_fake, loss_d=1.0, loss_g=2.0):
    """An epoch's rows of metrics.csv."""
    means = (loss_d, loss_g, d_real, d_fake, 100.0)
    return [dcgan.Row(3, step, 640 * step, *means) for step in range(20, 200, 20)]


def constants(line):
    return [name for name in dcgan.SETTINGS if name in line]


def test_a_discriminator_that_has_won_is_named_with_numbers_and_what_to_change():
    [line] = told(epoch_of(0.995, 0.004, 0.01, 8.0), 1.0)
    assert (
        "discriminator has won" in line and "0.995" in line and "0.004" in line and "\n" not in line
    )
    assert {"D_LEARNING_RATE", "R1_GAMMA"} <= set(constants(line))


def test_mode_collapse_is_named_with_its_number_and_what_to_change():
    [line] = told(epoch_of(0.7, 0.3), 0.12)
    assert "collapse" in line and "0.12" in line and "\n" not in line and constants(line)


def test_both_are_told_and_a_healthy_epoch_is_met_with_silence():
    assert len(told(epoch_of(0.995, 0.004), 0.1)) == 2
    for d_real, d_fake, loss_g in (
        (0.5, 0.5, 0.7),
        (0.8, 0.2, 2.0),
        (0.9, 0.1, 4.0),
        (0.95, 0.3, 5.0),
        (0.6, 0.02, 6.0),
    ):
        assert told(epoch_of(d_real, d_fake, loss_g=loss_g), 0.9) == []
    mixed = epoch_of(0.999, 0.001)[:3] + epoch_of(0.7, 0.3)[3:]  # won for a moment only
    assert told(mixed, 0.9) == []


def test_diversity_is_1_for_the_same_images_and_0_for_copies(tiny):
    faces = tiny.load_faces(32)[0].float() / 255
    assert tiny.diversity(faces) > 0.05
    assert tiny.diversity(faces[:1].repeat(40, 1, 1, 1)) < 1e-3
    assert tiny.diversity(faces[:2].repeat(20, 1, 1, 1)) < 0.9 * tiny.diversity(faces)
