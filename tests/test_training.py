"""A run as a user sees it: what it says and writes, the best epoch, trouble, and that it learns."""

import os
import re
import sys
import termios
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import FINISHED, checkpoint, exit_status, flags, metrics, pixels, refused, same, table
from PIL import Image
from torchvision.utils import make_grid

import dcgan


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """A measurement takes 64 images, not 2,048, and samples are not enlarged."""
    monkeypatch.setattr(dcgan, "DISTANCE_IMAGES", 64)
    monkeypatch.setattr(dcgan, "enlarged", dcgan.to_pil_image)


@pytest.fixture
def clock(monkeypatch):
    """The time, of which a step of training takes `step` seconds, and nothing else takes any."""
    clock = SimpleNamespace(now=2e9, step=60.01)
    clock.wait = lambda seconds: vars(clock).update(now=clock.now + seconds)
    step = dcgan.Trainer.advance
    monkeypatch.setattr(dcgan.Trainer, "advance", lambda *x: step(*x) or clock.wait(clock.step))
    monkeypatch.setattr(dcgan, "perf_counter", lambda: clock.now)
    monkeypatch.setattr("tqdm.std.time", lambda: clock.now)
    return clock


def edit(**changes):
    torch.save(checkpoint() | changes, "output/checkpoint.pt")


def latents_of_finished(number):
    labels = torch.tensor([[index % 2, index // 20] for index in range(40)]).float()
    return dcgan.Batches(torch.zeros(40, 1), labels, torch.device("cpu")).some(number)[1]


def test_a_run_says_what_it_does_and_leaves_its_files_of_which_one_can_be_shared(finished):
    data, labels, about, short, again, *epochs, last = (
        (finished / "stdout").read_text().splitlines()
    )
    assert all(word in data for word in ("40", "1 .heic", "1 broken")), data
    for line, word in zip(
        [labels, about, short, again, last], ["Late 50%", "cpu", "400", "400", "generate"]
    ):
        assert word in line
    for line, row in zip(epochs, table(finished / "output/quality.csv"), strict=True):
        assert f"epoch {row['epoch']}/3" in line and f"{float(row['distance']):.4f}" in line
    [report] = finished.glob("data/cache/*.broken.txt")
    assert str(report) in data and "broken.jpg" in report.read_text()
    names = ".lock-0 attributes.png checkpoint.pt generator.pt latest.png losses.png metrics.csv"
    names += " quality.csv real_vs_fake.png samples settings.json training.gif"
    names += "".join(f" epoch_00{epoch}.png" for epoch in range(4))
    output = finished / "output"
    assert {*os.listdir(output), *os.listdir(output / "samples")} == {*names.split()}
    assert str(finished).encode() not in (output / "generator.pt").read_bytes(), "names a folder"


def test_a_row_of_metrics_holds_the_means_of_the_steps_since_the_row_before(tiny, monkeypatch):
    bce, judged = dcgan.bce, []

    def spy(logits, target):
        judged.append([bce(logits, target).item(), logits.sigmoid().mean().item()])
        return bce(logits, target)

    monkeypatch.setattr(tiny, "bce", spy)
    tiny.LOG_EVERY = 3  # one row goes across an epoch's end, and the last is of one step
    tiny.train()
    real, fake, again = np.array(judged).reshape(10, 3, 2).transpose(1, 2, 0)
    steps = np.array([real[1], fake[1], real[0] + fake[0], again[0]])
    assert [",".join(row[:3]) for row in metrics()] == ["1,3,24", "2,1,48", "2,4,72", "2,5,80"]
    for row, part in zip(metrics(), np.split(steps, [3, 6, 9], 1)):
        assert [float(text) for text in row[3:]] == pytest.approx(part.mean(1), rel=2e-5), row


def test_a_save_within_an_epoch_shows_new_samples_and_slows_no_row(tiny, clock, monkeypatch):
    shown, latest = [], Path("output/samples/latest.png")
    save = lambda *run: shown.append(latest.read_bytes()) or clock.wait(10)  # noqa: E731
    monkeypatch.setattr(dcgan.Run, "save", save)
    tiny.CHECKPOINT_MINUTES, clock.step = 0, 2
    tiny.train()
    assert {row["images_per_second"] for row in table("output/metrics.csv")} == {"4.0"}
    assert len({*shown}) == 6, "new samples at all saves but the last"


@pytest.mark.parametrize("needed, told", [(8_000, "800, .* 67 m"), (84, " 9, .* 1 m"), (80, "^$")])
def test_a_run_that_is_too_short_is_told_so(tiny, clock, capsys, monkeypatch, needed, told):
    clock.step = 1
    monkeypatch.setattr(tiny, "STEPS_NEEDED", needed)  # at 64 pixels; the run has 10, at 32
    tiny.train()
    assert re.search(told, "".join(re.findall("--epochs .* min", capsys.readouterr().out)))


def test_the_bar_of_a_resumed_run_shows_the_time_left_and_all_scores(copied, clock, monkeypatch):
    edit(epoch=1, done=2)  # 8 of 15 steps are left
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    with os.fdopen(theirs, "w", encoding="utf-8") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        assert exit_status(*flags(**FINISHED)) == 0
        shown = os.read(ours, 60_000).decode()
    os.close(ours)
    left = re.findall(r"(\S+) left", shown)
    assert list(dict.fromkeys(left)) == ["?", *[f"0{minutes}:00" for minutes in range(7, -1, -1)]]
    *_, last = lines = [line for line in re.split("[\r\n]+", shown) if " left" in line]
    assert " 47%" in lines[0] and "100%" in last and max(map(len, lines)) < 80
    assert "d_real=0." in last and "d_fake=0." in last, "cut off at 80 columns"


def test_without_a_terminal_there_is_a_line_a_minute_with_the_time_of_day(tiny, clock, capsys):
    clock.step = 20
    tiny.train()
    said = capsys.readouterr()
    lines = re.findall(r"^[0-2]\d:[0-5]\d .*?(\d+)%.* left", said.out, re.MULTILINE)
    assert lines == ["30", "60", "90", "100"], said.out
    assert said.err == "" and "\r" not in said.out


def test_of_many_short_epochs_only_some_leave_samples():
    dcgan.EPOCHS = 110
    few = [*range(1, 64), *range(64, 96, 2), 96, 99, 102, 105, 108, 110]
    for images, expected in ((24_960, few), (25_024, [*range(1, 111)])):
        batches = SimpleNamespace(steps=images // dcgan.BATCH_SIZE)
        runs = [SimpleNamespace(batches=batches, epoch=epoch) for epoch in range(1, 111)]
        assert [run.epoch for run in runs if dcgan.Run.grid_due(run)] == expected


def test_samples_are_the_average_with_batchnorm_of_its_own_on_the_noise_of_the_run(finished, tiny):
    state, shown = checkpoint(finished), pixels(finished / "output/samples/epoch_003.png")
    for network in ("generator", "average"):
        generator = dcgan.build_generator(state | {"average": state[network]})
        with torch.no_grad():
            drawn = make_grid(generator(latents_of_finished(64)).add(1).mul(127.5), 8)
        assert ((drawn - shown[:, ::2, ::2]).abs().max() < 0.51) == (network == "average")
    dcgan.refresh_batchnorm(generator, state["labels"])
    for name, value in generator.state_dict().items():
        assert torch.allclose(value, state["average"][name], 1e-3, 1e-7), (
            f"{name} is of old weights"
        )


def test_the_distance_is_that_of_generator_pt_to_the_photos(finished, tiny):
    [cache] = finished.glob("data/cache/*.bin")
    reals = torch.from_numpy(np.fromfile(cache, np.uint8)).view(40, 3, 32, 32) / 255
    generator = dcgan.build_generator(checkpoint(finished, "generator.pt"))
    fakes = dcgan.draw(generator, latents_of_finished(2_048), torch.float32)
    distance = table(finished / "output/quality.csv")[-1]["distance"]
    assert float(distance) == pytest.approx(dcgan.face_distance(fakes, reals), rel=1e-3)


def test_the_distance_is_measured_every_so_many_images_on_the_same_ones(tiny, monkeypatch):
    monkeypatch.setattr(tiny, "MEASURE_EVERY", 80)  # of 40 images an epoch
    monkeypatch.setattr(tiny, "DISTANCE_IMAGES", 16)  # of 40
    tiny.EPOCHS, tiny.LEARNING_RATE = 4, 0.0  # so that nothing else differs
    tiny.train()
    rows = table("output/quality.csv")
    assert [row["images"] for row in rows] == ["40", "120", "160"]
    assert len({row["distance"] for row in rows}) == 1, rows


def test_a_later_epoch_is_the_best_unless_an_earlier_one_was_clearly_better(tiny, monkeypatch):
    numbers = iter([0.1, 0.05, 0.054, 0.055])  # 5 % and 0.002 are a tie
    monkeypatch.setattr(tiny, "face_distance", lambda fakes, reals: next(numbers))
    monkeypatch.setattr(tiny, "MEASURE_EVERY", 0)
    kept = [tiny.train() and checkpoint(name="generator.pt") for tiny.EPOCHS in range(1, 5)]
    best = [state["epoch"] for state in kept]
    assert best == [int(row["best"]) for row in table("output/quality.csv")] == [1, 2, 3, 3]


@pytest.mark.parametrize("seed", [0, 1])
def test_a_seed_reproduces_a_run_to_the_byte_and_another_one_does_not(copied, seed):
    assert exit_status(*flags(**FINISHED, SEED=seed, OUTPUT_DIR="new/output")) == 0
    equal = same(checkpoint()["average"], checkpoint("new")["average"])
    assert equal == (metrics() == metrics("new")) == (seed == 0)


@pytest.mark.parametrize("network", ["discriminator", "average"])
def test_what_is_not_finite_ends_in_one_line_and_gets_into_no_file(copied, capsys, network):
    weights = checkpoint()[network]
    edit(**{network: {name: value * torch.nan for name, value in weights.items()}})
    before = {path: path.read_bytes() for path in Path("output").glob("*.pt")}
    refused(capsys, *flags(**FINISHED | {"EPOCHS": 4}), status=1, words=["LEARNING_RATE"])
    assert before == {path: path.read_bytes() for path in Path("output").glob("*.pt")}
    assert "nan" not in Path("output/metrics.csv").read_text()


@pytest.mark.parametrize(("images", "told"), [(10_000, True), (9_000, False)])
def test_trouble_is_told_but_not_in_the_first_10000_images(copied, capsys, images, told):
    dead = {name: value * 0 for name, value in checkpoint()["generator"].items()}
    edit(generator=dead, average=dead, images=images)  # all of its samples are alike
    assert exit_status(*flags(**FINISHED | {"EPOCHS": 4, "LEARNING_RATE": 0})) == 0
    assert ("mode collapse" in capsys.readouterr().out) == told


def test_each_trouble_is_told_with_what_to_change(capsys):
    reals = torch.rand(64, 3, 32, 32)
    for d_real, d_fake, scale, words in [
        (0.98, 0.02, 0.5, ["D_LEARNING_RATE"]),
        (0.98, 0.02, 0.2, ["D_LEARNING_RATE", "BATCH_SIZE"]),
        (0.98, 0.04, 0.2, ["BATCH_SIZE"]),
        (0.96, 0.02, 0.5, []),
        (None, None, 0.5, []),  # a student has removed them
    ]:
        row = {"d_real": d_real, "d_fake": d_fake} if d_real else {}
        run = SimpleNamespace(metrics=[row], reals=reals)
        dcgan.Run.advise(run, scale * reals)
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == len(words) and all(map(str.__contains__, lines, words)), lines


def test_grey_photos_give_grey_samples(tiny, all_faces):
    Path("grey").mkdir()
    for path in all_faces.iterdir():
        Image.open(path).convert("L").save(Path("grey", path.name))
    assert tiny.main(["--data-dir", "grey", "--learning-rate", "0.01"]) == 0
    red, green, blue = pixels("output/samples/latest.png").float()
    assert red.std() > 5 and (red - green).abs().max() <= 1 >= (red - blue).abs().max()


def test_training_brings_the_fakes_nearer_and_labels_decide_the_colour(workplace):
    for kind, hue in (("red", 0), ("blue", 240)):
        Path("photos", kind).mkdir(parents=True)
        for index in range(40):
            photo = Image.new("RGB", (32, 32), f"hsl({hue}, 70%, {30 + index}%)")
            photo.save(f"photos/{kind}/{index}.png")
    larger = {"ATTRIBUTES": "folders", "G_FEATURES": 8, "D_FEATURES": 8, "LEARNING_RATE": 0.005}
    assert exit_status(*flags(DATA_DIR="photos", EPOCHS=6, AUGMENT=0, **larger)) == 0
    first, last = (float(row["distance"]) for row in table("output/quality.csv"))
    assert last < first / 2
    for kind, sign in (("red", 1), ("blue", -1)):
        images = dcgan.generate_images(16, 1, "output/generator.pt", attributes=kind)
        assert sign * (images[:, 0] - images[:, 2]).mean() > 0.1, kind
