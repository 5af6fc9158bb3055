"""What a run shows: samples, losses.png, real_vs_fake.png, training.gif, and its advice."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import flags, load_faces, start, until
from PIL import Image
from reading import checkpoint, film, metrics, pixels
from torchvision.utils import make_grid

import dcgan

FILM = "output/training.gif"


# -------------------------------------------------------------------------------------------- a run


def test_the_pictures_of_a_resumed_run_are_those_of_one_that_was_not_stopped(tiny):
    assert tiny.main(["--epochs", "3"]) == 0
    os.rename("output", "whole")
    for epochs in (1, 3):
        assert tiny.main(["--epochs", str(epochs)]) == 0
    samples = [f"samples/{name}.png" for name in ("epoch_000", "epoch_003", "latest")]
    for name in ("losses.png", "real_vs_fake.png", *samples):
        assert torch.equal(pixels(f"output/{name}"), pixels(f"whole/{name}")), name
    (resumed, times), (whole, other) = film(FILM), film("whole/training.gif")
    assert len(resumed) == 4 and times == other and torch.equal(resumed, whole)
    before = pixels("output/losses.png")
    assert tiny.main(["--epochs", "4"]) == 0  # and losses.png changes
    assert not torch.equal(before, pixels("output/losses.png")) and len(film(FILM)[0]) == 5


def test_samples_are_drawn_by_the_averaged_generator_from_noise_that_stays(tiny):
    """In eval mode: in train mode an image would depend on its batch."""
    tiny.LEARNING_RATE = 0.03
    tiny.train()
    state = checkpoint()
    generator = tiny.Generator(32, 8, 4).eval()
    for weights, drawn in (("generator", False), ("average", True)):
        generator.load_state_dict(state[weights])
        with torch.no_grad():
            images = generator(state["fixed_noise"]).add(1).div(2)
        again = make_grid(images, 8).mul(255)
        apart = (again - pixels("output/samples/epoch_002.png")).abs().max()
        assert (apart <= 1) == drawn


def test_a_long_epoch_shows_something_new_whenever_it_is_saved(workplace):
    (workplace / "many").mkdir()
    for index in range(2_000):
        (workplace / f"many/{index}.jpg").symlink_to(workplace / f"faces/{index % 40:06d}.jpg")
    arguments = flags(DATA_DIR="many", BATCH_SIZE=2, LOG_EVERY=1, CHECKPOINT_MINUTES=0)
    output = workplace / "output"
    with start(*arguments, cwd=workplace) as process:
        until(lambda: len(metrics(workplace)) > 3)
        process.kill()
        said = process.communicate()[0]
    shown = sorted(path.name for path in (output / "samples").glob("*.png"))
    assert shown == ["epoch_000.png", "latest.png"]
    first, newest = (pixels(output / f"samples/{name}.png") for name in ("epoch_000", "latest"))
    assert not torch.equal(first, newest)
    assert (output / "losses.png").exists() and (output / "real_vs_fake.png").exists()
    assert said.count("latest.png") == 1


def forget():
    """Remove the checkpoints, so that the next run is a fresh one."""
    for path in Path("output").glob("checkpoint*"):
        path.unlink()


def test_a_fresh_run_in_a_used_folder_films_itself_alone(tiny):
    assert tiny.main(["--epochs", "4"]) == 0
    forget()
    assert tiny.main(["--epochs", "1", "--seed", "1"]) == 0
    assert len(film(FILM)[0]) == 2 and len(metrics()) == 3


def test_the_pictures_show_the_images_trained_on_beside_the_generators(tiny):
    """real_vs_fake.png: the left part is the same whatever was trained, the others are not."""
    tiny.EPOCHS = 1
    tiny.train()
    one = pixels("output/real_vs_fake.png")
    forget()
    tiny.G_FEATURES, tiny.LEARNING_RATE = 8, 0.05
    tiny.train()
    two = pixels("output/real_vs_fake.png")
    left, *others = zip(one.chunk(3, dim=2), two.chunk(3, dim=2))
    assert torch.equal(*left) and not any(torch.equal(*pair) for pair in others)
    colours = left[0].flatten(1).T.numpy()
    assert len(np.unique(colours[colours.std(1) > 10], axis=0)) > 500  # faces, in colour


def test_at_the_end_each_fake_stands_beside_the_real_image_it_is_nearest_to(tiny):
    """Also if that is mirrored, paler, or a little changed."""
    reals, _ = load_faces(tiny, 32)
    batches = tiny.Batches(reals, torch.device("cpu"))
    wanted = torch.randperm(len(reals))[:10]
    images = batches.reals(wanted)
    copies = torch.cat([0.9 * images[:5], images[5:].flip(3)]) + 0.05 * torch.rand(10, 3, 32, 32)
    parts = [batches.reals(part) for part in torch.arange(40).split(16)]
    found = tiny.nearest(copies, parts)
    assert torch.equal(found, torch.cat([images[:5], images[5:].flip(3)]))
    tiny.MIRROR = False
    assert torch.equal(tiny.nearest(images, parts), images)

    tiny.train()
    assert pixels("output/real_vs_fake.png").shape[2] == 1650
    with Image.open("output/samples/epoch_002.png") as samples:
        assert samples.size == (8 * 34 + 2, 8 * 34 + 2)


# --------------------------------------------------------------------------------------------- film


def samples(number, draw, every=1):
    """The samples of `number` epochs, as a run leaves them; `draw(epoch)` gives a grid's pixels."""
    os.makedirs("output/samples", exist_ok=True)
    for epoch in range(0, number * every, every):
        Image.fromarray(draw(epoch)).save(f"output/samples/epoch_{epoch:03d}.png", compress_level=1)


def flat(epoch):
    return np.full((274, 274, 3), epoch % 256, np.uint8)


@pytest.mark.parametrize("epochs, length", [(1, 1), (2, 2), (25, 25), (26, 13), (150, 25)])
def test_the_animation_has_at_most_25_frames_by_a_stride_and_rests_on_the_last(
    tiny, epochs, length
):
    samples(epochs, flat)
    tiny.draw_animation(2_000)
    frames, times = film(FILM)
    shades = [frame[0, 166, 166].item() for frame in frames]
    assert len(frames) == length and shades[-1] == epochs - 1
    assert times[-1] >= 2000 and all(20 < shown < 2000 for shown in times[:-1])
    stride = -(-epochs // 25)
    assert set(np.diff(shades)) <= {stride} and shades[0] < stride


def test_the_animation_of_a_long_noisy_run_stays_small_enough_to_send(tiny):
    numbers = np.random.default_rng(0)
    samples(3, lambda epoch: numbers.integers(0, 256, (530, 530, 3), np.uint8))
    for epoch in range(3, 150):
        first = f"output/samples/epoch_{epoch % 3:03d}.png"
        os.link(first, f"output/samples/epoch_{epoch:03d}.png")
    tiny.draw_animation(2_000)
    frames, times = film(FILM)
    assert os.path.getsize("output/training.gif") < 4_000_000
    assert len(frames) == 25 and times[-1] >= 2000


def test_the_animation_of_a_thousand_epochs_is_in_order(tiny):
    samples(11, lambda epoch: flat(epoch // 10), every=100)
    samples(1, lambda epoch: flat(200))
    os.rename("output/samples/epoch_000.png", "output/samples/epoch_1001.png")
    tiny.draw_animation(2_000)
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
    assert "discriminator has won" in line and "\n" not in line
    assert "0.995" in line and "0.004" in line
    assert {"D_LEARNING_RATE", "R1_GAMMA"} <= set(constants(line))


def test_mode_collapse_is_named_with_its_number_and_what_to_change():
    [line] = told(epoch_of(0.7, 0.3), 0.12)
    assert "collapse" in line and "0.12" in line and "\n" not in line and constants(line)


def test_both_are_told_and_a_healthy_epoch_is_met_with_silence():
    assert len(told(epoch_of(0.995, 0.004), 0.1)) == 2
    for d_real, d_fake in ((0.5, 0.5), (0.8, 0.2), (0.9, 0.1), (0.95, 0.3), (0.6, 0.02)):
        assert told(epoch_of(d_real, d_fake), 0.9) == []
    mixed = epoch_of(0.999, 0.001)[:3] + epoch_of(0.7, 0.3)[3:]  # won for a moment only
    assert told(mixed, 0.9) == []


def test_diversity_is_1_for_the_same_images_and_0_for_copies(tiny):
    faces = load_faces(tiny, 32)[0].float() / 255
    assert tiny.diversity(faces) > 0.05
    assert tiny.diversity(faces[:1].repeat(40, 1, 1, 1)) < 1e-3
    assert tiny.diversity(faces[:2].repeat(20, 1, 1, 1)) < 0.9 * tiny.diversity(faces)
