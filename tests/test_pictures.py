"""What a run draws (grids, curves, animation, comparisons), and the number for its faces."""

import random
import sys
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import pixels
from PIL import Image, ImageDraw, ImageSequence
from torchvision.transforms.functional import gaussian_blur

import dcgan


@pytest.fixture(scope="module")
def faces():
    """600 drawn faces, (600, 3, 32, 32) in [0, 1]."""
    drawn = [dcgan.draw_face(random.Random(index)).resize((32, 32)) for index in range(600)]
    return torch.stack([dcgan.pil_to_tensor(face) for face in drawn]) / 255


def tiles(picture, columns=8, size=32):
    """The images of a grid (3, H, W), row by row."""
    parts = picture[:, 2:, 2:].unfold(1, size, size + 2).unfold(2, size, size + 2)
    return parts[:, :, :columns].permute(1, 2, 0, 3, 4).flatten(0, 1)


def test_a_grid_holds_the_rounded_pixels_row_by_row():
    wanted = torch.randint(0, 256, (6, 3, 32, 32))
    images = (wanted + torch.rand(wanted.shape).sub(0.5).mul(0.9)).clamp(0, 255) / 255
    grid = dcgan.grid(images, 3)
    assert grid.dtype == torch.uint8 and grid.shape == (3, 70, 104)
    assert torch.equal(tiles(grid, 3), wanted.byte())


@pytest.mark.parametrize(("width", "factor"), [(36, 15), (274, 2), (511, 2), (512, 1), (900, 1)])
def test_pictures_to_look_at_are_enlarged_by_whole_factors_to_512_pixels(width, factor):
    image = torch.randint(0, 256, (3, 40, width), dtype=torch.uint8)
    large = dcgan.pil_to_tensor(dcgan.enlarged(image))
    assert torch.equal(large, image.repeat_interleave(factor, 1).repeat_interleave(factor, 2))


@pytest.mark.parametrize(
    ("epochs", "shown"),
    [
        ([0], [0]),
        (range(26), range(1, 26, 2)),
        (range(150), range(5, 150, 6)),
        ([9, 100, 20, 1001], [9, 20, 100, 1001]),
    ],
)
def test_the_animation_has_up_to_25_even_steps_in_order(tmp_path, monkeypatch, epochs, shown):
    monkeypatch.setattr(dcgan, "OUTPUT_DIR", tmp_path)
    (tmp_path / "samples").mkdir()
    for epoch in epochs:
        sample = Image.new("RGB", (68, 68), (epoch % 256,) * 3)
        sample.save(tmp_path / f"samples/epoch_{epoch:03d}.png")
    dcgan.draw_animation(tmp_path / "training.gif")
    with Image.open(tmp_path / "training.gif") as film:
        assert film.info["loop"] == 0
        frames = [frame.convert("L") for frame in ImageSequence.Iterator(film)]
        times = [frame.info["duration"] for frame in frames]
    assert [frame.getpixel((40, 40)) for frame in frames] == [epoch % 256 for epoch in shown]
    assert all(20 < time < 500 for time in times)


def test_the_animation_of_a_run_has_its_epochs_and_ends_with_the_last_samples(finished):
    with Image.open(finished / "output/training.gif") as film:
        assert film.n_frames == 4
        film.seek(3)
        last = dcgan.pil_to_tensor(film.convert("RGB")).float()
    samples = pixels(finished / "output/samples/epoch_003.png")
    assert last.shape == (3, 548, 548) and (last - samples).abs().mean() < 10


def test_real_vs_fake_shows_photos_samples_and_the_most_similar_photo_of_each(finished):
    [cache] = finished.glob("data/cache/*.bin")
    photos = torch.from_numpy(np.fromfile(cache, np.uint8)).view(40, 3, 32, 32)
    sheet = pixels(finished / "output/real_vs_fake.png")[:, 20:192]  # there are 40 photos only
    real, fake, similar = (tiles(part) for part in sheet.chunk(3, 2))
    assert sorted(map(bytes, real.numpy())) == sorted(map(bytes, photos.numpy()))
    latest = pixels(finished / "output/samples/latest.png")[:, ::2, ::2]
    assert torch.equal(fake, tiles(latest)[:40])
    both = torch.stack([photos, photos.flip(3)])
    apart = (both[None] - fake[:, None, None].float()).square().sum((3, 4, 5)).amin(1)
    assert torch.equal(similar, photos[apart.argmin(1)])


def test_the_most_similar_photo_may_be_mirrored_paler_or_noisy():
    photos = torch.rand(600, 3, 4, 4, generator=torch.Generator().manual_seed(0)).mul(255).byte()
    photos = photos.repeat_interleave(8, 2).repeat_interleave(8, 3)
    images = torch.cat([0.9 * photos[590:595], photos[5:10].flip(3) + 9.0]) / 255
    found = dcgan.nearest(images + 0.05 * torch.rand(images.shape), photos)
    assert torch.equal(found, torch.cat([photos[590:595], photos[5:10]]) / 255)


def test_each_attribute_is_drawn_without_and_with_it_for_the_same_people(monkeypatch):
    monkeypatch.setattr(dcgan, "LATENT_SIZE", 2)
    latents = torch.cat([torch.randn(64, 2), torch.randint(0, 2, (64, 2))], 1)
    run = SimpleNamespace(latents=latents, draw=lambda latents: latents, attributes=["Odd", "Late"])
    for attributes, wanted in (
        ("Odd,Late", {"-Odd": [0, None], "Odd": [1, None], "-Late": [None, 0], "Late": [None, 1]}),
        ("folders", {"Odd": [1, 0], "Late": [0, 1]}),
    ):
        monkeypatch.setattr(dcgan, "ATTRIBUTES", attributes)
        sets = dcgan.Run.with_attributes(run)
        assert list(sets) == ["as drawn", *wanted]
        for wish, labels in wanted.items():
            expected = latents[:8].clone()
            for column, label in enumerate(labels, 2):
                expected[:, column] = expected[:, column] if label is None else label
            assert torch.equal(sets[wish], expected), wish


@pytest.mark.parametrize("names", [["Odd", "x" * 60], [f"Attribute {n}" for n in range(80)]])
def test_titles_of_attributes_are_numbered_and_neither_cut_nor_on_each_other(
    tmp_path, monkeypatch, names
):
    boxes, text = {}, ImageDraw.ImageDraw.text

    def spy(pen, place, words, fill=None, **options):
        boxes[words] = pen.textbbox(place, words, **options)
        text(pen, place, words, fill, **options)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", spy)
    dcgan.side_by_side(tmp_path / "a.png", {name: torch.rand(8, 3, 32, 32) for name in names}, 1)
    with Image.open(tmp_path / "a.png") as sheet:
        width, height = sheet.size
    numbers = [str(number) for number in range(1, len(names) + 1)]
    assert [*boxes][0].split("\n") == [f"{number}: {name}" for number, name in zip(numbers, names)]
    assert all(0 <= box[0] and box[2] <= width and box[3] <= height for box in boxes.values())
    assert [*boxes][1:] == numbers
    for one, two in pairwise(numbers):
        assert boxes[one][2] < boxes[two][0], (one, two)


@pytest.mark.pictures
@pytest.mark.parametrize(("number", "around"), [(19, 0), (500, 4)])
def test_losses_png_has_each_curve_smoothed_under_its_name(tmp_path, monkeypatch, number, around):
    values = np.random.default_rng(0).random((number, 4))
    rows = [dict(zip(["loss_d", "loss_g", "d_real", "d_fake"], row)) for row in values]
    rows = [row | {"images": 8 * index} for index, row in enumerate(rows)]
    quality = [{"images": 40 * n, "distance": 1 / n} for n in (1, 2, 3)]
    figures = []
    savefig = "matplotlib.figure.Figure.savefig"
    monkeypatch.setattr(savefig, lambda figure, file: figures.append(figure))
    dcgan.draw_losses(tmp_path / "losses.png", rows, quality)
    upper, middle, lower = figures[0].axes
    lines = [{line.get_label(): line for line in axes.lines} for axes in (upper, middle)]
    assert [[*group][:2] for group in lines[:2]] == [["loss_d", "loss_g"], ["d_real", "d_fake"]]
    for column, line in enumerate([*lines[0].values(), *lines[1].values()]):
        for x, y in list(zip(line.get_xdata(), line.get_ydata()))[around : -around or None]:
            mean = values[x // 8 - around : x // 8 + around + 1, column].mean()
            assert y == pytest.approx(mean, abs=1e-5), line.get_label()
    assert line.get_xdata()[-1] == 8 * (number - 1) and len(line.get_xdata()) > 0.9 * number
    assert np.allclose(lower.lines[0].get_xydata(), [[40, 1], [80, 1 / 2], [120, 1 / 3]])


@pytest.mark.pictures
def test_losses_png_needs_no_backend_of_matplotlib(tmp_path, monkeypatch):
    """The variable may name one that is not installed; matplotlib reads it at its import."""
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setenv("MPLBACKEND", "no_such_backend")
    dcgan.draw_losses(tmp_path / "losses.png", [{"images": 8, "loss_d": 1.0}], [])
    assert pixels(tmp_path / "losses.png").float().std() > 5


def test_the_distance_of_other_photos_is_about_0_and_of_copies_below(faces):
    for number in (50, 300):
        one, other = faces[:number], faces[300 : 300 + number]
        assert abs(dcgan.face_distance(other, one)) < 0.05, number
        assert dcgan.face_distance(one, one) < -0.02, number


def test_the_distance_rises_with_every_fault_and_falls_for_better_fakes(faces):
    reals, other = faces[:200], faces[200:400]
    noise = torch.rand(other.shape, generator=torch.Generator().manual_seed(0))
    for name, fakes in {
        "blurred": [gaussian_blur(other, 7, sigma) for sigma in (0.5, 1)],
        "darker": [share * other for share in (0.95, 0.9)],
        "noisy": [other.lerp(noise, share) for share in (0.1, 0.2)],
        "collapsed": [other[:number].repeat(200 // number, 1, 1, 1) for number in (20, 2)],
    }.items():
        found = [dcgan.face_distance(images, reals) for images in (other, *fakes)]
        assert found == sorted(found) and found[1] > 2 * abs(found[0]), (name, found)


def test_the_distance_hardly_depends_on_how_many_images_there_are(faces):
    dark = 0.8 * faces
    few, many = (
        dcgan.face_distance(dark[300:400], faces[:100]),
        dcgan.face_distance(dark[300:], faces[:300]),
    )
    assert few == pytest.approx(many, rel=0.3)


def test_diversity_is_that_of_the_images_and_none_for_copies(faces):
    assert dcgan.diversity(faces) > 0.05
    assert dcgan.diversity(faces[:1].repeat(40, 1, 1, 1)) < 1e-6
    assert dcgan.diversity(faces[:2].repeat(20, 1, 1, 1)) < 0.9 * dcgan.diversity(faces)
