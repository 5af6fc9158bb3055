"""The number for the faces, the best generator that is kept by it, and a run that gets worse."""

import random

import pytest
import torch
import torch.nn.functional as F
from conftest import dcgan, draw_faces, flags, load_faces
from reading import table
from torchvision.transforms.functional import gaussian_blur


@pytest.fixture(scope="module")
def faces():
    """600 drawn faces, (600, 3, 32, 32) in [0, 1]."""
    drawn = [dcgan.draw_face(random.Random(index)) for index in range(600)]
    drawn = [dcgan.center_crop(face, 178).resize((32, 32)) for face in drawn]
    return torch.stack([dcgan.pil_to_tensor(face) for face in drawn]).float() / 255


def quality(folder="output"):
    return table(f"{folder}/quality.csv")


def best_file(folder="output"):
    return torch.load(f"{folder}/generator.pt", weights_only=True)


# -------------------------------------------------------------------------------------- the number


def test_worse_images_are_farther_away_and_other_faces_near(faces):
    one, other = faces[:300], faces[300:]
    floor = dcgan.face_distance(other, one)
    noise = torch.rand(other.shape, generator=torch.Generator().manual_seed(0))
    soft = [dcgan.face_distance(gaussian_blur(other, 7, sigma), one) for sigma in (0.5, 1, 2)]
    noisy = [dcgan.face_distance(other.lerp(noise, share), one) for share in (0.1, 0.2, 0.4)]
    few = dcgan.face_distance(other[:10].repeat(30, 1, 1, 1), one)
    copies = dcgan.face_distance(other[:1].repeat(300, 1, 1, 1), one)
    assert dcgan.face_distance(one, one) < 1e-6 < floor
    assert floor < soft[0] < soft[1] < soft[2] and floor < noisy[0] < noisy[1] < noisy[2]
    assert 2 * floor < few < copies and 0.7 < copies < 3
    assert dcgan.face_distance(1 - other, one) > 10 * floor


@pytest.mark.parametrize("number", [2, 20, 500])  # fewer images than features, and more
def test_the_distance_of_stretched_and_moved_features_is_known(number):
    rng = torch.Generator().manual_seed(0)
    one = torch.randn(number, 64, dtype=torch.float64, generator=rng)
    stretched = 2**2 * one.var(0).sum()
    moved = (2 * one.mean(0) + 0.5).square().sum()
    distance = dcgan.frechet_distance(3 * one + 0.5, one)
    assert distance == pytest.approx((stretched + moved).item(), rel=1e-9)


def test_it_depends_on_nothing_but_the_images(faces):
    state = torch.get_rng_state()
    first = dcgan.face_distance(faces[:300], faces[300:])
    assert torch.equal(state, torch.get_rng_state())
    torch.rand(7)
    shuffled = faces[:300][torch.randperm(300)]
    assert dcgan.face_distance(shuffled, faces[300:]) == pytest.approx(first, rel=1e-3)


def test_parts_that_never_change_count_for_nothing_and_copies_have_no_distance(faces):
    discs = faces.clone()
    discs[:, :, :8] = 1.0
    assert 0 < dcgan.face_distance(discs[:300], discs[300:]) < 1
    assert dcgan.face_distance(faces[:9], faces[:1].repeat(9, 1, 1, 1)) == float("inf")
    assert dcgan.face_distance(faces[:1], faces[1:2]) == float("inf")


def test_images_of_any_size_are_measured_at_32_pixels(faces):
    large = F.interpolate(faces[:40], scale_factor=4)
    assert torch.allclose(dcgan.downscale(large.split(16)), faces[:40], atol=1e-6)


def test_each_measured_epoch_is_a_row_with_its_floor_and_in_the_epochs_line(tiny, capsys):
    tiny.EPOCHS = 4
    tiny.train()  # of 40 images an epoch
    out = capsys.readouterr().out
    rows = quality()
    assert list(rows[0]) == "epoch images distance floor best".split()
    assert [row["epoch"] for row in rows] == ["1", "4"]  # the first and the last, if all are short
    assert [row["images"] for row in rows] == ["40", "160"]
    assert len({row["floor"] for row in rows}) == 1
    assert all(float(row["distance"]) > float(row["floor"]) > 0 for row in rows)
    for row in rows:
        assert f"distance {float(row['distance']):.3f}" in out


def test_long_epochs_are_all_measured(tiny, monkeypatch):
    monkeypatch.setattr(tiny, "MEASURE_EVERY", 80)
    tiny.EPOCHS = 6
    tiny.train()
    assert [row["epoch"] for row in quality()] == ["1", "3", "5", "6"]


# --------------------------------------------------------------------------------- the best is kept


@pytest.fixture
def learned(tiny, tmp_path, monkeypatch):
    """`dcgan` after a run that has learned something, each epoch of which is measured."""
    draw_faces(tmp_path / "more", 200)
    monkeypatch.setattr(tiny, "MEASURE_EVERY", 0)
    larger = {"G_FEATURES": 16, "D_FEATURES": 16, "LATENT_SIZE": 32, "LOG_EVERY": 10}
    settings = larger | {"DATA_DIR": "more", "BATCH_SIZE": 20}
    assert tiny.main(flags(**settings, EPOCHS=12)) == 0
    return tiny, settings


def test_a_run_that_collapses_ends_with_its_best_faces_and_says_which(learned, capsys):
    dcgan, settings = learned
    good = min(float(row["distance"]) for row in quality())
    capsys.readouterr()
    wild = {"LEARNING_RATE": 0.05, "BETA1": 0.9}  # what wrecks this game
    assert dcgan.main(flags(**settings | wild, EPOCHS=20)) == 0
    rows, kept = quality(), best_file()
    assert float(rows[-1]["distance"]) > 3 * good, "it has not collapsed"
    assert kept["epoch"] == int(rows[-1]["best"]) <= 13
    assert kept["distance"] <= (1 + dcgan.TIE) * min(float(row["distance"]) for row in rows)
    assert f"best in epoch {kept['epoch']}\n" in capsys.readouterr().out

    assert dcgan.main(["generate", "--seed", "1", "--num-images", "64"]) == 0
    assert f"after epoch {kept['epoch']}\n" in capsys.readouterr().out
    best = dcgan.generate_images(64, seed=1)
    last = dcgan.generate_images(64, seed=1, checkpoint="output/checkpoint.pt")
    reals = dcgan.downscale([load_faces(dcgan, 32)[0][:64] / 255])
    assert 2 * dcgan.face_distance(best, reals) < dcgan.face_distance(last, reals)


def test_a_resumed_run_still_compares(learned):
    dcgan, settings = learned
    before = quality()
    assert dcgan.main(flags(**settings, EPOCHS=14)) == 0
    rows = quality()
    assert rows[:12] == before and [row["epoch"] for row in rows[12:]] == ["13", "14"]
    lowest = min(float(row["distance"]) for row in rows)
    kept = best_file()
    assert kept["epoch"] == int(rows[-1]["best"])
    assert kept["distance"] <= lowest * (1 + dcgan.TIE)


def test_a_later_epoch_wins_a_tie_and_a_worse_one_does_not(tiny, monkeypatch):
    numbers = iter([0.100, 0.030, 0.101, 0.120, 0.104])  # the second is the floor
    monkeypatch.setattr(tiny, "MEASURE_EVERY", 0)
    monkeypatch.setattr(tiny, "face_distance", lambda fakes, reals: next(numbers))
    tiny.EPOCHS = 4
    tiny.train()
    assert [row["best"] for row in quality()] == ["1", "2", "2", "2"] and best_file()["epoch"] == 2
