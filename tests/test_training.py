"""Training as a user sees it: what it says and writes, that it learns, and how it ends."""

import contextlib
import os
import re
import shutil
import struct
from pathlib import Path

import pytest
import torch
from conftest import RUN_FILES, flags, one_line, refused, start, succeed
from PIL import Image
from reading import checkpoint, everything, files, film, metrics, pixels, steps_of, table

LINE = r"loss_d \d+\.\d+, loss_g \d+\.\d+, D\(x\) [01]\.\d+, D\(G\(z\)\) [01]\.\d+, [\d,]+ images/s"


def picture(epoch):
    """The 64 faces of an epoch's grid, (64, 3, 32, 32), in [0, 1]."""
    grid = pixels(f"output/samples/epoch_{epoch:03d}.png")[:, 2:, 2:]
    tiles = grid.unfold(1, 32, 34).unfold(2, 32, 34)
    return tiles.permute(1, 2, 0, 3, 4).flatten(0, 1).float() / 255


# --------------------------------------------------------------------------------- what a user sees


def test_a_run_without_a_terminal_says_a_line_an_epoch_and_writes_its_files(workplace, monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    odd = {"MPLBACKEND": "module://no_such_backend.x"}
    settings = flags(DATA_DIR="faces", MAX_IMAGES=39, LOG_EVERY=3, BATCH_SIZE=9)
    lines = succeed(*settings, cwd=workplace, env=odd).splitlines()
    first, second, third, *epochs, last = lines
    about = r"CPU, \d+ threads?, float32; 39 images, 4 steps per epoch, 2 epochs; left out: 1 .*"
    assert re.fullmatch(about, first)
    assert re.search(r"will take about [\d.]+ (min|h)\b", second) and "too short" in third
    more = r", distance \d\.\d+ \(of reals: \d\.\d+\), best in epoch \d"
    found = [re.fullmatch(rf"epoch (\d/\d): {LINE}{more}", line) for line in epochs]
    assert [match[1] for match in found] == ["1/2", "2/2"]
    assert last.startswith("finished") and "generate" in last

    output = workplace / "output"
    assert files(output).keys() == RUN_FILES
    assert not [name for name in files(workplace) if name.endswith((".part", ".new"))]
    header, *lines = (output / "metrics.csv").read_bytes().split(b"\n")
    assert header == b"epoch,step,images,loss_d,loss_g,d_real,d_fake,images_per_second"
    assert not any(b"\r" in line for line in lines)
    rows = table(output / "metrics.csv")
    assert steps_of(metrics(workplace)) == [(1, 3, 27), (1, 4, 36), (2, 3, 63), (2, 4, 72)]
    for row in rows:
        numbers = {name: float(text) for name, text in row.items()}
        assert 0 < numbers["d_real"] < 1 and 0 < numbers["d_fake"] < 1
        assert 0 < numbers["loss_d"] < 10 and 0 < numbers["loss_g"] < 10
        assert numbers["images_per_second"] > 1
    for epoch in range(3):
        grid = Image.open(output / f"samples/epoch_00{epoch}.png")
        assert grid.size == (8 * 34 + 2, 8 * 34 + 2) and grid.mode == "RGB"
    for name in ("losses.png", "real_vs_fake.png"):
        drawn = pixels(output / name).float()
        assert min(drawn.shape[1:]) >= 500 and drawn.std() > 5
    frames, times = film(output / "training.gif")
    assert len(frames) == 3 and times[-1] >= 2000 > max(times[:-1])


def test_a_run_of_too_few_steps_says_so_at_once_with_a_flag_that_gives_enough(tiny, capsys):
    tiny.train()  # 40 images in batches of 8: 10 steps
    line = capsys.readouterr().out.splitlines()[2]
    found = re.fullmatch(r".* 10 steps, .* --epochs (\d+), which takes about [\d.]+ (min|h)", line)
    assert int(found[1]) * 5 == tiny.STEPS_NEEDED[32]
    tiny.STEPS_NEEDED = {32: 40}
    assert tiny.main(["--epochs", "3", "--output-dir", "other"]) == 0
    assert "too short" not in capsys.readouterr().out


@pytest.mark.parametrize("batch_size, steps", [(40, "1 step"), (8, "5 steps")])
def test_a_run_of_a_single_row_says_so_too(tiny, capsys, batch_size, steps):
    arguments = ["--epochs", "1", "--log-every", "20", "--batch-size", str(batch_size)]
    assert tiny.main(arguments) == 0
    assert f"too short: it has {steps}, and" in capsys.readouterr().out


def test_of_many_short_epochs_only_some_leave_samples(tiny, capsys):
    assert tiny.main(["--epochs", "71", "--batch-size", "40"]) == 0
    kept = [*range(33), *range(34, 64, 2), 64, 68, 71]
    names = {f"epoch_{epoch:03d}.png" for epoch in kept}
    assert {path.name for path in Path("output/samples").iterdir()} == names | {"latest.png"}
    lines = re.findall(r"^epoch (\d+)/71: ", capsys.readouterr().out, re.MULTILINE)
    assert list(map(int, lines)) == kept[1:] and len(metrics()) == 71


def test_a_run_between_two_samples_is_saved_as_often_as_any(tiny, monkeypatch):
    monkeypatch.setattr(tiny.Run, "grid_due", lambda run, epoch: epoch == 4)
    saved = []
    monkeypatch.setattr(tiny, "save_checkpoint", lambda state: saved.append(state["epoch"]))
    arguments = ["--epochs", "4", "--batch-size", "40", "--checkpoint-minutes", "0"]
    assert tiny.main(arguments) == 0
    assert saved == [1, 2, 3, 4]


def test_a_terminal_shows_a_bar_with_the_losses(workplace):
    fcntl, termios = pytest.importorskip("fcntl"), pytest.importorskip("termios")
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 200, 0, 0))
    terminal = {"stdout": theirs, "stderr": theirs}
    with start(*flags(DATA_DIR="faces", EPOCHS=1), cwd=workplace, **terminal) as process:
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # the end, on Linux
            while read := os.read(ours, 10_000):
                shown += read
        os.close(ours)
        assert process.wait() == 0
    shown = shown.decode()
    bars = [line for line in re.split(r"[\r\n]", shown) if "steps/s" in line]
    assert re.search(rf"5/5 .*{LINE}", bars[-1]), bars
    assert not any(re.fullmatch(rf"epoch 1/1: {LINE}", line) for line in shown.splitlines())
    assert "finished" in shown


def test_a_finished_run_changes_nothing_and_continues_when_epochs_rises(tiny, capsys):
    assert tiny.main([]) == 0
    before = everything("output")
    samples = [Path(f"output/samples/epoch_00{epoch}.png") for epoch in range(4)]
    pictures = [path.read_bytes() for path in samples[:3]]
    capsys.readouterr()
    assert tiny.main([]) == 0
    said = capsys.readouterr()
    assert "finished" in said.out and "EPOCHS" in said.out and said.err == ""
    assert everything("output") == before

    assert tiny.main(["--epochs", "3"]) == 0
    said = capsys.readouterr().out
    assert "EPOCHS 2 -> 3" in said and "epoch 3, step 1" in said and "epoch 3/3" in said
    assert samples[3].exists()
    assert steps_of(metrics())[-2:] == [(3, 4, 112), (3, 5, 120)]
    assert [path.read_bytes() for path in samples[:3]] == pictures


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_trains_and_draws_on_the_cpu(tiny, capsys, precision):
    assert tiny.main(["--precision", precision]) == 0
    assert precision in capsys.readouterr().out
    assert len(metrics()) == 6
    weights = checkpoint()["generator"].values()
    assert {tensor.dtype for tensor in weights} == {torch.float32, torch.int64}
    assert not torch.equal(picture(0), picture(2))
    assert tiny.main(["--precision", precision, "--epochs", "3"]) == 0
    assert "epoch 3, step 1" in capsys.readouterr().out


# ------------------------------------------------------------------------------ learning, diverging


def test_training_brings_the_fakes_nearer_to_the_reals(tiny, all_faces):
    for name in "abcde":  # 200 images, in class folders
        shutil.copytree(all_faces, f"people/{name}")
    larger = {"G_FEATURES": 16, "D_FEATURES": 16, "LATENT_SIZE": 32, "LOG_EVERY": 10}
    assert tiny.main(flags(DATA_DIR="people", EPOCHS=10, **larger)) == 0  # 250 steps
    reals = torch.stack([tiny.read_face(path, 32) for path in sorted(all_faces.iterdir())]) / 255

    def distances(statistic):
        wanted = statistic(reals)
        return [(statistic(picture(epoch)) - wanted).abs().mean().item() for epoch in (0, 10)]

    mean, spread = distances(lambda images: images.mean(0)), distances(lambda images: images.std(0))
    assert mean[1] < mean[0] / 2, mean
    assert spread[1] < spread[0] * 0.8, spread


def test_a_diverging_run_stops_says_why_and_keeps_the_last_good_checkpoint(tiny, capsys):
    changed = {"DATA_DIR": "faces", "BATCH_SIZE": 2, "D_FEATURES": 64, "BETA1": 0}
    assert tiny.main(flags(**changed, EPOCHS=1)) == 0
    before = {path: path.read_bytes() for path in Path("output").glob("*.pt")}
    wild = flags(**changed, LEARNING_RATE=1, PRECISION="float16")
    error = refused(capsys, *wild, status=1)
    one_line(error, "error: a loss is not finite in epoch 2, before step ", "LEARNING_RATE")
    assert "float32" in error and "run the same command again" in error
    assert {path: path.read_bytes() for path in Path("output").glob("*.pt")} == before
    assert "nan" not in Path("output/metrics.csv").read_text()
    assert tiny.main(flags(**changed)) == 0
    assert "epoch 2, step 1" in capsys.readouterr().out


def test_a_loss_that_is_not_finite_gets_into_no_checkpoint(tiny, capsys):
    """In float16 a loss can overflow and its step be skipped: only the interval's sums are bad."""
    assert tiny.main(["--epochs", "1"]) == 0
    state = checkpoint()
    state["discriminator"]["layers.8.weight"] *= 1e9  # finite, and its logits are in float32 too
    assert state["discriminator"]["layers.8.weight"].shape[0] == 1
    torch.save(state, "output/checkpoint.pt")
    settings = ["--checkpoint-minutes", "0", "--log-every", "5"]
    assert "not finite" in refused(capsys, *settings, "--precision", "float16", status=1)
    assert tiny.main([*settings, "--precision", "float32"]) == 0


WON = {"AUGMENT": 0.0, "BETA1": 0.9, "D_FEATURES": 16, "D_LEARNING_RATE": 5e-3}


@pytest.mark.parametrize(
    ("settings", "seen", "cure"),
    [
        (WON, "the discriminator has won", "BETA1"),
        ({"D_LEARNING_RATE": 0.0}, "the samples look alike", "LEARNING_RATE"),
    ],
)
def test_a_game_that_goes_wrong_is_said_in_one_line(tiny, capsys, all_faces, settings, seen, cure):
    Path("many").mkdir()
    for number in range(3_400):  # as many as need three epochs before there is advice
        os.link(all_faces / f"{number % 40:06d}.jpg", f"many/{number}.jpg")
    settings = {"DATA_DIR": "many", "BATCH_SIZE": 32, "EPOCHS": 3} | settings
    assert tiny.main(flags(**settings)) == 0
    [line] = [line for line in capsys.readouterr().out.splitlines() if seen in line]
    assert line.startswith("after epoch 3, ") and cure in line
