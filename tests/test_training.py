"""Training as a user sees it: what it says and writes, that it learns, and how it ends."""

import os
import re
import struct

import pytest
import torch
from conftest import RUN_FILES, dcgan, draw_faces, flags, one_line, pixels, run, start, table
from PIL import Image

LINE = r"loss_d \d+\.\d+, loss_g \d+\.\d+, D\(x\) [01]\.\d+, D\(G\(z\)\) [01]\.\d+, [\d,]+ images/s"


def files(folder):
    return {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}


def picture(folder, epoch):
    """The 64 faces of an epoch's grid, (64, 3, 32, 32), in [0, 1]."""
    grid = pixels(folder / f"samples/epoch_{epoch:03d}.png")[:, 2:, 2:]
    tiles = grid.unfold(1, 32, 34).unfold(2, 32, 34)
    return tiles.permute(1, 2, 0, 3, 4).flatten(0, 1).float() / 255


# --------------------------------------------------------------------------------- what a user sees


def test_a_run_without_a_terminal_says_a_line_an_epoch_and_writes_its_files(workplace):
    done = run(*flags(DATA_DIR="faces", MAX_IMAGES=39, LOG_EVERY=3, BATCH_SIZE=9), cwd=workplace)
    assert (done.returncode, done.stderr) == (0, "")
    first, second, *epochs, last = done.stdout.splitlines()
    assert re.fullmatch(r"CPU, \d+ threads, float32; 39 images, 4 steps an epoch, 2 epochs", first)
    assert re.search(r"about [\d.]+ (s|min|h)\b", second)
    more = r", distance \d\.\d+ \(of reals: \d\.\d+\), best in epoch \d"
    found = [re.fullmatch(rf"epoch (\d/\d): {LINE}{more}", line) for line in epochs]
    assert [match[1] for match in found] == ["1/2", "2/2"]
    assert last.startswith("finished") and "generate" in last

    written = files(workplace / "output")
    assert written.keys() == RUN_FILES | {"samples/epoch_002.png"}
    assert not [name for name in files(workplace) if name.endswith((".part", ".new"))]
    rows = table(workplace / "output/metrics.csv")
    assert (
        list(rows[0]) == "epoch step images loss_d loss_g d_real d_fake images_per_second".split()
    )
    keys = [(int(row["epoch"]), int(row["step"]), int(row["images"])) for row in rows]
    assert keys == [(1, 3, 27), (1, 4, 36), (2, 3, 63), (2, 4, 72)]
    for row in rows:
        assert (
            0 < float(row["d_real"]) < 1
            and 0 < float(row["d_fake"]) < 1
            and float(row["images_per_second"]) > 0
        )
        assert 0 < float(row["loss_d"]) < 10 and 0 < float(row["loss_g"]) < 10
    grid = Image.open(workplace / "output/samples/epoch_002.png")
    assert grid.size == (274, 274) and grid.mode == "RGB"
    assert Image.open(workplace / "output/training.gif").n_frames == 3
    for name in ("losses.png", "real_vs_fake.png"):
        assert min(Image.open(workplace / "output" / name).size) > 400


def test_a_terminal_shows_a_bar_with_the_losses(workplace):
    fcntl, termios = pytest.importorskip("fcntl"), pytest.importorskip("termios")
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 200, 0, 0))
    with start(
        *flags(DATA_DIR="faces", EPOCHS=1), cwd=workplace, stdout=theirs, stderr=theirs
    ) as process:
        os.close(theirs)
        shown = b""
        try:
            while read := os.read(ours, 10_000):
                shown += read
        except OSError:  # the end, on Linux
            os.close(ours)
        assert process.wait() == 0
    shown = shown.decode()
    bars = [line for line in re.split(r"[\r\n]", shown) if "steps/s" in line]
    assert re.search(rf"5/5 .*{LINE}", bars[-1]), bars
    assert not any(re.fullmatch(rf"epoch 1/1: {LINE}", line) for line in shown.splitlines())
    assert "finished" in shown


def test_a_finished_run_changes_nothing_and_goes_on_when_epochs_rises(tiny, workplace, capsys):
    assert tiny.main([]) == 0
    before = {
        name: (path.stat().st_mtime_ns, path.read_bytes())
        for name, path in files(workplace / "output").items()
    }
    capsys.readouterr()
    assert tiny.main([]) == 0
    said = capsys.readouterr()
    assert "finished" in said.out and "EPOCHS" in said.out and said.err == ""
    after = {
        name: (path.stat().st_mtime_ns, path.read_bytes())
        for name, path in files(workplace / "output").items()
    }
    assert after == before

    assert tiny.main(["--epochs", "3"]) == 0
    said = capsys.readouterr().out
    assert "EPOCHS 2 -> 3" in said and "epoch 3, step 1" in said and "epoch 3/3" in said
    assert (workplace / "output/samples/epoch_003.png").exists()
    last = table(workplace / "output/metrics.csv")[-2:]
    assert [(row["epoch"], row["step"]) for row in last] == [("3", "4"), ("3", "5")]
    for epoch in (1, 2):
        name = f"samples/epoch_{epoch:03d}.png"
        assert (workplace / "output" / name).read_bytes() == before[name][1]


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_trains_and_draws_on_the_cpu(tiny, workplace, capsys, precision):
    assert tiny.main(["--precision", precision]) == 0
    assert precision in capsys.readouterr().out
    assert len(table(workplace / "output/metrics.csv")) == 6
    state = torch.load(workplace / "output/checkpoint.pt", weights_only=True)
    assert {tensor.dtype for tensor in state["generator"].values()} == {torch.float32, torch.int64}
    assert not torch.equal(picture(workplace / "output", 0), picture(workplace / "output", 2))
    assert tiny.main(["--precision", precision, "--epochs", "3"]) == 0
    assert "epoch 3, step 1" in capsys.readouterr().out


# ------------------------------------------------------------------------------ learning, diverging


def test_training_brings_the_fakes_nearer_to_the_reals(tiny, workplace):
    for name in "abcde":  # 200 images, in class folders
        (workplace / "people" / name).mkdir(parents=True)
        for path in (workplace / "faces").iterdir():
            (workplace / "people" / name / path.name).symlink_to(path.resolve())
    larger = {"G_FEATURES": 16, "D_FEATURES": 16, "LATENT_SIZE": 32, "LOG_EVERY": 10}
    assert tiny.main(flags(DATA_DIR="people", EPOCHS=10, **larger)) == 0  # 250 steps
    faces = (
        torch.stack(
            [dcgan.read_face(path, 32) for path in sorted((workplace / "faces").iterdir())]
        ).float()
        / 255
    )
    worse, better = (picture(workplace / "output", epoch) for epoch in (0, 10))

    def distance(statistic):
        return [
            (statistic(fakes) - statistic(faces)).abs().mean().item() for fakes in (worse, better)
        ]

    mean, spread = distance(lambda images: images.mean(0)), distance(lambda images: images.std(0))
    print(mean, spread)
    assert mean[1] < mean[0] / 2, mean
    assert spread[1] < spread[0] * 0.8, spread


def test_a_diverging_run_stops_says_why_and_keeps_the_last_good_checkpoint(tiny, workplace, capsys):
    changed = {"DATA_DIR": "faces", "BATCH_SIZE": 2, "D_FEATURES": 64, "BETA1": 0}
    assert tiny.main(flags(**changed, EPOCHS=1)) == 0
    before = {path: path.read_bytes() for path in (workplace / "output").glob("*.pt")}
    capsys.readouterr()
    assert tiny.main(flags(**changed, LEARNING_RATE=1, PRECISION="float16")) == 1
    error = one_line(capsys.readouterr().err, "error: a loss is not finite in epoch 2, steps ")
    assert "LEARNING_RATE" in error and "float32" in error and "run again" in error
    assert {path: path.read_bytes() for path in (workplace / "output").glob("*.pt")} == before
    assert "nan" not in (workplace / "output/metrics.csv").read_text()
    assert tiny.main(flags(**changed)) == 0
    assert "epoch 2, step 1" in capsys.readouterr().out


def test_a_loss_that_is_not_finite_gets_into_no_checkpoint(tiny, workplace, capsys):
    """In float16 a loss can overflow and its step be skipped: only the interval's sums are bad."""
    assert tiny.main(["--epochs", "1"]) == 0
    path = workplace / "output/checkpoint.pt"
    state = torch.load(path, weights_only=True)
    state["discriminator"]["layers.8.weight"] *= 1e9  # finite, and its logits are in float32 too
    assert state["discriminator"]["layers.8.weight"].shape[0] == 1
    torch.save(state, path)
    settings = ["--checkpoint-minutes", "0", "--log-every", "5"]
    assert tiny.main([*settings, "--precision", "float16"]) == 1
    assert "not finite" in capsys.readouterr().err
    assert tiny.main([*settings, "--precision", "float32"]) == 0


@pytest.mark.parametrize(
    ("settings", "seen", "cure"),
    [
        (
            {"BETA1": 0.9, "D_FEATURES": 32, "D_LEARNING_RATE": 2e-3},
            "the discriminator has won",
            "BETA1",
        ),
        ({"D_LEARNING_RATE": 0.0}, "the samples look alike", "LEARNING_RATE"),
    ],
)
def test_a_game_that_goes_wrong_is_said_in_one_line(
    tiny, monkeypatch, capsys, tmp_path, settings, seen, cure
):
    draw_faces(tmp_path / "more", 400)
    for name, value in ({"DATA_DIR": "more", "BATCH_SIZE": 32, "EPOCHS": 32} | settings).items():
        monkeypatch.setattr(tiny, name, value)
    tiny.train()
    lines = [line for line in capsys.readouterr().out.splitlines() if seen in line]
    assert lines and all(line.startswith("after epoch ") and cure in line for line in lines)
