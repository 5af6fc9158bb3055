"""A run that is killed, stopped or given damaged files resumes, and ends as an uninterrupted one.

KILLS=40 kills more often than by itself.
"""

import contextlib
import io
import os
import pickle
import random
import shutil
import signal
import subprocess
import time
import zipfile
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from conftest import TINY, dcgan, flags, one_line, own_mounts, refused, start, until
from forks import Server
from PIL import Image
from reading import checkpoint, metrics, steps_of

KILLS = int(os.environ.get("KILLS", 6))
LONG = {"DATA_DIR": "faces", "BATCH_SIZE": 4, "EPOCHS": 3, "LOG_EVERY": 3}  # 10 steps per epoch
LONG |= {"CHECKPOINT_MINUTES": 0.005}  # at 0, after each step, it takes twice as long
QUICK = "import sys, dcgan; dcgan.RETRY_SECONDS = 2; sys.exit(dcgan.main())"


class Forks:
    """A server of forks, and its newest run."""

    def __init__(self, *prefix):
        self.server = Server(*prefix)

    def start(self, cwd, *more, tty=None, nohup=False, limit=0, **changed):
        arguments = [*flags(**LONG | changed), *more]
        options = {"tty": tty, "nohup": nohup, "limit": limit}
        self.newest = self.server.start(["-c", QUICK], arguments, cwd, **options)

    def send(self, signum):
        self.newest.send_signal(signum)

    def wait(self):
        """(status, stdout, stderr) of the run that was started."""
        stdout, stderr = self.newest.communicate()
        return self.newest.returncode, stdout, stderr

    def run(self, *arguments, **options):
        self.start(*arguments, **options)
        return self.wait()

    def succeed(self, *arguments, **options):
        """stdout of a run that succeeds and prints nothing on stderr."""
        status, stdout, stderr = self.run(*arguments, **options)
        assert (status, stderr) == (0, "")
        return stdout

    def fail(self, *arguments, status=1, words=(), **options):
        """Run what has to end with this status and one line with these words."""
        found, _, stderr = self.run(*arguments, **options)
        assert found == status
        one_line(stderr, *words)

    def interrupt(self, signum, folder, rows=1):
        """Send a signal after so many rows of metrics.csv: what `wait` returns."""
        until(lambda: len(metrics(folder)) >= rows)
        self.send(signum)
        return self.wait()

    def inside(self, path):
        """`path` as this server sees it, which may have mounts of its own."""
        return Path(f"/proc/{self.server.process.pid}/root{path}")


@pytest.fixture(scope="module")
def forks():
    forks = Forks()
    yield forks
    forks.server.close()


@pytest.fixture(scope="module")
def reference(forks, all_faces, tmp_path_factory):
    """The folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("reference")
    (folder / "faces").symlink_to(all_faces)
    assert forks.run(folder)[0] == 0
    return folder


@pytest.fixture(scope="module")
def half_done(forks, reference, tmp_path_factory):
    """The folder of a run that was stopped within its first or second epoch."""
    folder = copied(reference, tmp_path_factory.mktemp("half") / "done")
    shutil.rmtree(folder / "output")
    forks.start(folder, EPOCHS=10**5)
    assert forks.interrupt(signal.SIGTERM, folder)[0] == 143
    state = checkpoint(folder)
    assert state["step"] > 0 and state["epoch"] < 3
    return folder


def copied(folder, to):
    return shutil.copytree(folder, to, symlinks=True)


def same(one, two):
    """Whether two states are equal bit for bit."""
    if isinstance(one, torch.Tensor):
        one, two = (tensor.contiguous().view(-1) for tensor in (one, two))
        return one.dtype == two.dtype and torch.equal(one.view(torch.uint8), two.view(torch.uint8))
    if isinstance(one, dict):
        return list(one) == list(two) and all(same(value, two[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(map(same, one, two))
    return type(one) is type(two) and one == two


def assert_ended_alike(folder, reference, rows=12):
    """Whether a run has ended as another: networks, optimizers, metrics, samples."""
    best = [checkpoint(place, "generator.pt") for place in (folder, reference)]
    states = [checkpoint(folder), checkpoint(reference)]
    for state in [*states, *best]:  # what may differ: places, and how often is saved
        for name in (*dcgan.SETTING_GROUPS["places"], "CHECKPOINT_MINUTES"):
            state["settings"].pop(name, None)
    for state in states:
        state["metrics"] = [row[:7] for row in state["metrics"]]
    for key in states[1]:
        assert same(states[0][key], states[1][key]), f"{key} differs"
    assert same(*best)
    assert metrics(folder) == metrics(reference) and len(metrics(folder)) == rows
    for path in (reference / "output/samples").iterdir():
        assert path.read_bytes() == (folder / "output/samples" / path.name).read_bytes()


def assert_whole(folder):
    """Whether no file is half a file, whatever happened."""
    for path in (folder / "output").rglob("*"):
        if path.suffix in (".png", ".gif"):
            Image.open(path).load()
        if path.suffix == ".pt":
            dcgan.read_checkpoint(path)


def contents(folder):
    return {path: path.read_bytes() for path in (folder / "output").glob("*.pt")}


# -------------------------------------------------------------------------------- kills and signals

# What a user, a terminal and schedulers send.
SIGNALS = [signal.SIGINT, signal.SIGHUP, signal.SIGUSR1]


def test_a_run_killed_at_random_moments_ends_as_an_uninterrupted_one(forks, reference, workplace):
    rng, kills, writing = random.Random(time.time_ns()), 1, 0
    with start(*flags(**LONG), cwd=workplace, fresh=True) as process:
        time.sleep(rng.uniform(0, 3))  # while it imports
        process.kill()
    for number in range(KILLS):
        forks.start(workplace, CHECKPOINT_MINUTES=0)
        deadline = time.monotonic() + rng.expovariate(1 / 0.5)
        while time.monotonic() < deadline:
            part = "*/**/*.part" if number % 4 == 1 else "output/checkpoint*.part"
            if number % 2 and list(workplace.glob(part)):
                writing += 1
                break
        forks.send(signal.SIGKILL)
        status = forks.wait()[0]
        assert status in (0, -signal.SIGKILL)
        assert_whole(workplace)
        kills += status < 0
        if status == 0:
            assert_ended_alike(workplace, reference)
            shutil.rmtree(workplace / ("output" if number % 3 else "data"))
            shutil.rmtree(workplace / "output", ignore_errors=True)
    forks.succeed(workplace)
    print(f"{kills} kills, {writing} while it was writing")
    assert_ended_alike(workplace, reference)


def test_a_kill_between_the_renames_of_a_save_is_survived(forks, reference, tmp_path):
    folder = copied(reference, tmp_path / "run")
    (folder / "output/checkpoint.pt").rename(folder / "output/checkpoint.pt.part")
    forks.succeed(folder)
    assert_ended_alike(folder, reference)


@pytest.mark.parametrize("signum", SIGNALS)
def test_a_signal_saves_says_how_to_resume_and_loses_nothing(forks, reference, workplace, signum):
    forks.start(workplace)
    status, stdout, stderr = forks.interrupt(signum, workplace)
    assert status == 128 + signum and stderr == ""
    state = checkpoint(workplace)
    assert state["step"] > 0
    line = stdout.splitlines()[-1]
    assert f"saved after step {state['step']} of epoch {state['epoch'] + 1}" in line
    assert "run the same command again" in line
    assert "resuming" in forks.succeed(workplace)
    assert_ended_alike(workplace, reference)


def test_a_signal_ends_a_run_whose_epochs_have_one_step(forks, workplace, all_faces):
    one_step = {"MAX_IMAGES": LONG["BATCH_SIZE"]}
    forks.start(workplace, **one_step, EPOCHS=10**5)
    status, stdout, stderr = forks.interrupt(signal.SIGTERM, workplace)
    assert (status, stderr) == (143, "") and "saved after step 1 of epoch" in stdout
    epochs = checkpoint(workplace)["epoch"] + 3
    said = forks.succeed(workplace, **one_step, EPOCHS=epochs)
    assert f"the end of epoch {epochs - 2}\n" in said

    untouched = workplace / "untouched"
    untouched.mkdir()
    (untouched / "faces").symlink_to(all_faces)
    assert forks.run(untouched, **one_step, EPOCHS=epochs)[0] == 0
    assert_ended_alike(workplace, untouched, rows=epochs)


def test_ctrl_c_before_the_first_step_ends_at_once(forks, reference, tmp_path):
    folder = copied(reference, tmp_path / "run")
    shutil.rmtree(folder / "data")
    before = contents(folder)
    forks.start(folder, EPOCHS=10**5)
    until(lambda: list((folder / "data/cache").glob("*.part")))
    forks.send(signal.SIGINT)
    assert forks.wait()[::2] == (130, "")
    assert contents(folder) == before
    assert_ended_alike(folder, reference)


def test_a_second_ctrl_c_leaves_at_once_with_files_whole(forks, reference, workplace):
    forks.start(workplace, CHECKPOINT_MINUTES=1e6)
    until(lambda: metrics(workplace))
    forks.send(signal.SIGINT)
    until((workplace / "output/checkpoint.pt").exists)
    forks.send(signal.SIGINT)  # while it draws the pictures
    status, stdout, stderr = forks.wait()
    assert status == 130 and stderr == "" and "saved after" not in stdout
    assert_whole(workplace)
    forks.succeed(workplace)
    assert_ended_alike(workplace, reference)


def test_nohup_outlives_a_hangup(forks, reference, workplace):
    forks.start(workplace, nohup=True)
    assert forks.interrupt(signal.SIGHUP, workplace)[::2] == (0, "")
    assert_ended_alike(workplace, reference)


@pytest.mark.parametrize("nohup", [False, True])
def test_a_terminal_that_goes_away_loses_nothing(forks, reference, workplace, nohup):
    ours, theirs = os.openpty()
    forks.start(workplace, tty=os.ttyname(theirs), nohup=nohup)
    while not metrics(workplace):
        os.read(ours, 10_000)
    os.close(theirs)
    os.close(ours)
    assert forks.wait()[0] == (0 if nohup else 129)
    assert (workplace / "output/checkpoint.pt").exists()
    forks.succeed(workplace)
    assert_ended_alike(workplace, reference)


# -------------------------------------------------------------------------------------------- disks


def test_files_that_may_not_grow_are_named(forks, reference, half_done, tmp_path):
    folder = copied(half_done, tmp_path / "run")
    before = contents(folder)
    forks.fail(
        folder,
        limit=20_000,
        words=(
            "File too large",
            "output/",
        ),
    )
    assert contents(folder) == before and not list(folder.rglob("*.part"))
    forks.succeed(folder)
    assert_ended_alike(folder, reference)


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    """(Forks, folder): for these processes alone, `output` in it is a disk of 3 MB."""
    folder = tmp_path_factory.mktemp("disk") / "run"
    (folder / "output").mkdir(parents=True)
    forks = Forks(*own_mounts(f"mount -t tmpfs -o size=3m none '{folder}/output'"))
    yield forks, folder
    forks.server.close()


@pytest.fixture
def small_disk(disk, reference):
    """(Forks, folder as they see it, folder as we see it) of a run of one epoch on that disk."""
    forks, folder = disk
    if not (folder / "faces").exists():
        copied(reference / "data", folder / "data")
        (folder / "faces").symlink_to((reference / "faces").resolve())
    assert forks.run(folder, EPOCHS=1)[::2] == (0, "")  # by now the disk is mounted
    yield forks, folder, forks.inside(folder)
    remount(forks, folder, "rw")
    for path in forks.inside(folder / "output").iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def remount(forks, folder, mode):
    enter = ("nsenter", "-t", str(forks.server.process.pid), "-m")
    subprocess.run([*enter, "mount", "-o", f"remount,{mode}", str(folder / "output")], check=True)


def fill(folder):
    with contextlib.suppress(OSError), open(folder / "output/filler", "wb", buffering=0) as file:
        while file.write(b"\0" * 4096):
            pass


def test_a_full_disk_is_named_and_the_old_files_stay(small_disk, reference):
    forks, folder, seen = small_disk
    before = contents(seen)
    fill(seen)
    forks.fail(
        folder,
        words=(
            "No space left on device",
            "output/",
        ),
    )
    assert contents(seen) == before and not list((seen / "output").glob("**/*.part"))

    (seen / "output/filler").unlink()
    # A disk that is full for a while ends no run.
    forks.start(folder, LOG_EVERY=1, EPOCHS=10**5)
    until(lambda: len(metrics(seen)) > 6)
    fill(seen)
    said = forks.newest.place / "stdout"
    until(lambda: "checkpoint.pt cannot be written (No space left" in said.read_text())
    old = (seen / "output/checkpoint.pt").stat().st_mtime_ns
    (seen / "output/filler").unlink()

    def saved_again():
        for path in (seen / "output/samples").glob("epoch_*.png"):  # they would fill it, too
            path.unlink()
        with contextlib.suppress(FileNotFoundError):  # for a moment, while it is replaced
            return (seen / "output/checkpoint.pt").stat().st_mtime_ns > old

    until(saved_again)
    until(lambda: steps_of(metrics(seen)))
    steps = [row[:2] for row in steps_of(metrics(seen))]
    assert steps == sorted(set(steps)) and len(steps) > 6  # no row is missing or twice
    fill(seen)  # and so it is at the end
    forks.send(signal.SIGTERM)
    status, stdout, stderr = forks.wait()
    assert status == 1
    one_line(stderr, "No space left on device", "output/", "check OUTPUT_DIR")
    assert stdout.count("metrics.csv cannot be written") <= 2
    for path in contents(seen):
        dcgan.read_checkpoint(path)

    (seen / "output/filler").unlink()
    shutil.rmtree(seen / "output/samples")
    for path in (seen / "output").glob("*.pt"):
        path.unlink()
    forks.succeed(folder)
    assert_ended_alike(seen, reference)


def test_a_disk_that_cannot_be_written_is_named(small_disk):
    forks, folder, seen = small_disk
    before = contents(seen)
    remount(forks, folder, "ro")
    forks.fail(
        folder,
        words=(
            "Read-only file system",
            "output",
        ),
    )
    assert contents(seen) == before


def test_an_output_dir_that_is_a_file_is_named(forks, workplace):
    (workplace / "output").write_text("mine")
    status, _, stderr = forks.run(workplace)
    assert status in (1, 2)
    one_line(stderr, "output")
    assert (workplace / "output").read_text() == "mine"


def test_two_runs_do_not_share_an_output_dir(forks, workplace, tiny, capsys):
    forks.start(workplace, EPOCHS=10**5)
    until(lambda: metrics(workplace))
    one_line(refused(capsys, status=1), "in use", "output")
    forks.send(signal.SIGTERM)
    assert forks.wait()[::2] == (143, "")


# ------------------------------------------------------------------------------------------- damage


def flipped(data):
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :]


DAMAGE = {
    "flipped": flipped,
    "cut": lambda data: data[:-1000],
    "empty": lambda data: b"",
    "text": lambda data: b"hello\n",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_kept_and_the_one_before_taken(forks, reference, tmp_path, damage):
    folder = copied(reference, tmp_path / "run")
    newest, previous = folder / "output/checkpoint.pt", folder / "output/checkpoint.previous.pt"
    damaged, good = DAMAGE[damage](newest.read_bytes()), previous.read_bytes()
    newest.write_bytes(damaged)
    stdout = forks.succeed(folder)
    assert "checkpoint.pt is damaged" in stdout and "using checkpoint.previous.pt" in stdout
    assert_ended_alike(folder, reference)
    kept = [path.read_bytes() for path in (folder / "output").glob("*.pt")]
    assert damaged in kept and good in kept


def test_two_damaged_checkpoints_are_an_error_that_loses_nothing(forks, reference, tmp_path):
    folder = copied(reference, tmp_path / "run")
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        path = folder / "output" / name
        path.write_bytes(flipped(path.read_bytes()))
    before = sorted(contents(folder).values())
    forks.fail(
        folder,
        status=2,
        words=(
            "damaged",
            "output/checkpoint",
        ),
    )
    assert sorted(contents(folder).values()) == before


class Bomb:
    """Unpickled, it leaves a file behind."""

    def __reduce__(self):
        return os.mkdir, ("exploded",)


def bombs(state):
    """Files that run code when they are unpickled."""
    files = {name: io.BytesIO() for name in ("zip", "legacy", "hidden", "inner", "pickle")}
    torch.save(Bomb(), files["zip"])
    torch.save(Bomb(), files["legacy"], _use_new_zipfile_serialization=False)
    torch.save(state | {"metrics": [Bomb()]}, files["hidden"])
    with zipfile.ZipFile(files["inner"], "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Bomb(), 2))
        archive.writestr("archive/version", "3")
    files["pickle"].write(pickle.dumps(Bomb()))
    return {name: file.getvalue() for name, file in files.items()}


def test_a_checkpoint_that_holds_code_never_runs_it(reference, tmp_path, monkeypatch, tiny, capsys):
    for name, data in bombs(checkpoint(reference)).items():
        folder = copied(reference, tmp_path / name)
        monkeypatch.chdir(folder)
        (folder / "bomb.pt").write_bytes(data)
        with contextlib.suppress(FileExistsError):
            torch.load("bomb.pt", weights_only=False) if name != "pickle" else pickle.loads(data)
        assert os.path.exists("exploded"), "no bomb at all"
        os.rmdir("exploded")
        for arguments in (["generate", "--checkpoint", "bomb.pt"], flags(EPOCHS=10)):
            (folder / "output/checkpoint.previous.pt").unlink(missing_ok=True)
            (folder / "output/checkpoint.pt").write_bytes(data)
            assert ".pt" in refused(capsys, *arguments)
        assert not os.path.exists("exploded"), name


def test_a_small_file_that_claims_a_huge_network_takes_no_memory(
    reference, tmp_path, monkeypatch, tiny, capsys
):
    state = checkpoint(reference)
    state["settings"] |= {"LATENT_SIZE": 65_536, "G_FEATURES": 16}  # 0.5 GB
    torch.save(state, tmp_path / "huge.pt")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here

    def kilobytes(name):
        return int(Path("/proc/self/status").read_text().partition(f"{name}:")[2].split()[0])

    before = kilobytes("VmRSS")
    assert "huge.pt" in refused(capsys, "generate", "--checkpoint", tmp_path / "huge.pt")
    assert kilobytes("VmHWM") - before < 200_000


def test_a_checkpoint_that_is_something_else_is_one_line(tiny, capsys):
    for thing in (torch.zeros(3), [1], "hello"):
        torch.save(thing, "thing.pt")
        line = refused(capsys, "generate", "--checkpoint", "thing.pt")
        assert "thing.pt" in line and "not a checkpoint of dcgan.py" in line


def test_a_full_memory_is_no_reason_to_call_a_checkpoint_damaged(tiny, monkeypatch, capsys):
    for epochs in (1, 2):  # so that there is a checkpoint.previous.pt, to be used by mistake
        assert tiny.main(["--epochs", str(epochs)]) == 0
    before = contents(Path())
    for place, error in (
        ("torch.load", RuntimeError("DefaultCPUAllocator: can't allocate memory")),
        ("dcgan.build_generator", torch.OutOfMemoryError("CUDA out of memory")),
        ("dcgan.restore_values", RuntimeError("MPS backend out of memory")),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(place, Mock(side_effect=error))
            assert "out of memory" in refused(capsys, "--epochs", "3", status=1)
        assert contents(Path()) == before


def as_saved_before(state):
    """A checkpoint's state under the names that it had in earlier versions."""
    state = dict(state)
    optimizers = [state.pop(name) for name in dcgan.Trainer.optimizers]
    state["optimizers"] = [{"state": one["moments"], "param_groups": []} for one in optimizers]
    state["scalers"] = [one["scaler"] for one in optimizers]
    state["rows"] = state.pop("metrics")
    *state["totals"], steps = state["totals"].tolist()
    return state | {"interval": int(steps)}


def test_files_of_the_version_before_still_load(forks, half_done, tmp_path):
    ends = []
    for name, change in (("new", dict), ("old", as_saved_before)):
        folder = copied(half_done, tmp_path / name)
        torch.save(change(checkpoint(folder)), folder / "output/checkpoint.pt")
        epochs = checkpoint(folder)["epoch"] + 2
        assert "resuming from" in forks.succeed(folder, EPOCHS=epochs)
        ends.append(folder)
    assert_ended_alike(*ends, rows=4 * epochs)


# -------------------------------------------------------------------------------- what a file holds


def test_the_previous_checkpoint_is_one_save_older(reference):
    assert checkpoint(reference)["epoch"] == 3
    assert checkpoint(reference, "checkpoint.previous.pt")["epoch"] == 2


def test_short_epochs_are_not_all_saved_but_the_last_one_is(tiny):
    tiny.EPOCHS, tiny.CHECKPOINT_MINUTES = 3, 10
    tiny.train()
    assert checkpoint(Path())["epoch"] == 3 and not Path("output/checkpoint.previous.pt").exists()
    assert len(os.listdir("output/samples")) == 1 + 4


def test_a_checkpoint_holds_plain_things_under_plain_keys(reference):
    state = checkpoint(reference)

    def walk(value):
        if isinstance(value, dict):
            assert {type(key) for key in value} <= {str, int}
            assert not [key for key in map(str, value) if key.startswith(("module.", "_orig_mod."))]
            value = list(value.values())
        if isinstance(value, (list, tuple)):
            for one in value:
                walk(one)
            return
        assert type(value) in (torch.Tensor, str, int, float, bool, type(None)), value
        assert not isinstance(value, torch.Tensor) or value.device.type == "cpu"

    walk(state)
    generator = dcgan.Generator(32, 8, 4)
    assert list(state["generator"]) == list(state["average"]) == list(generator.state_dict())
    assert list(state["discriminator"]) == list(dcgan.Discriminator(32, 4).state_dict())
    small = checkpoint(reference, "generator.pt")
    assert small["epoch"] == state["quality"][-1][-1]  # the best epoch's
    assert small["epoch"] < 3 or same(small["average"], state["average"])
    sizes = {path.name: path.stat().st_size for path in (reference / "output").glob("*.pt")}
    assert sizes["generator.pt"] < sizes["checkpoint.pt"] / 3


# --------------------------------------------------------------------------------- changed settings


def test_networks_of_other_settings_are_refused_with_both_values(forks, half_done):
    before = contents(half_done)
    for name, now in {"IMAGE_SIZE": 64, "LATENT_SIZE": 9, "G_FEATURES": 5, "D_FEATURES": 6}.items():
        forks.fail(half_done, status=2, words=(name, now, TINY[name]), **{name: now})
    assert contents(half_done) == before


def test_a_changed_learning_rate_is_said_and_takes_effect(forks, half_done, tmp_path):
    folder = copied(half_done, tmp_path / "run")
    before = checkpoint(folder)
    said = forks.succeed(folder, LEARNING_RATE=0, EPOCHS=2)
    assert f"LEARNING_RATE {dcgan.LEARNING_RATE} -> 0.0" in said
    after = checkpoint(folder)
    assert after["images"] > before["images"]
    for network in ("generator", "discriminator"):
        for name, tensor in before[network].items():
            if name.endswith(("weight", "bias")):
                assert torch.equal(after[network][name], tensor), f"{network}'s {name} has moved"


@pytest.mark.parametrize("change", ["BATCH_SIZE", "SEED", "MAX_IMAGES", "files"])
def test_another_order_of_the_images_restarts_a_half_done_epoch(forks, half_done, tmp_path, change):
    folder, changed = copied(half_done, tmp_path / "run"), {}
    then, epoch = checkpoint(folder)["images"], checkpoint(folder)["epoch"]
    if change == "files":
        real = (folder / "faces").resolve()
        (folder / "faces").unlink()
        shutil.copytree(real, folder / "faces")
        (folder / "faces/000007.jpg").unlink()
        for path in contents(folder):  # as if it had been trained here
            state = torch.load(path, weights_only=True)
            state["settings"]["DATA_DIR"] = str(folder / "faces")
            torch.save(state, path)
    else:
        changed = {change: {"BATCH_SIZE": 5, "SEED": 7, "MAX_IMAGES": 32}[change]}
    stdout = forks.succeed(folder, EPOCHS=epoch + 1, **changed)
    assert f"epoch {epoch + 1} starts again" in stdout
    assert all(f"{name} " in stdout for name in changed)
    steps = {"BATCH_SIZE": 8, "MAX_IMAGES": 8, "files": 9}.get(change, 10)
    keys = steps_of(metrics(folder))
    assert keys == sorted(set(keys)) and keys[-1][:2] == (epoch + 1, steps)
    assert checkpoint(folder)["images"] == then + steps * changed.get("BATCH_SIZE", 4)
