"""A run that is killed, stopped, or has no disk to write to, resumes and ends as if nothing had."""

import itertools
import json
import os
import resource
import shutil
import signal
import sys
from pathlib import Path
from unittest.mock import DEFAULT, Mock

import conftest
import pytest
import torch
from conftest import FINISHED, TINY, checkpoint, dcgan, exit_status, files, flags, metrics, refused
from filelock import FileLock

# Two epochs of three steps: rows after steps 2, 4 and 6, the penalty in steps 1 and 5
PLAN = {"MAX_IMAGES": 24, "ATTRIBUTES": "Odd", "AUGMENT": 0.5, "CHECKPOINT_MINUTES": 0}
PLAN |= TINY | {"DATA_DIR": "faces"}
FILES = 18  # written and renamed in such a run
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also below nohup
SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
CHECKPOINT = Path("output/checkpoint.pt")
BOMB = type("Bomb", (), {"__reduce__": lambda self: (pytest.fail, ("code in it was run",))})()
DAMAGES = {
    "cut": lambda: CHECKPOINT.read_bytes()[:-1000],
    "text": lambda: b"hello",
    "another file": lambda: dcgan.to_file({"weights": torch.zeros(3)}),
    "malicious": lambda: dcgan.to_file({**checkpoint(), "metrics": [BOMB]}),
    "generator.pt": lambda: Path("output/generator.pt").read_bytes(),
}
NETWORKS = ("IMAGE_SIZE", "LATENT_SIZE", "G_FEATURES", "D_FEATURES", "ATTRIBUTES")
LONGER = TINY | FINISHED | {"EPOCHS": 4}
CALLS = ["--image-size 33", "--data-dir nothing", "--batch-size 25", "--attributes Nose"]


class Crash(BaseException): ...


def begin(patched):
    """Settings of PLAN, and a table of attributes in the working directory."""
    for name, value in (dcgan.setting_values() | PLAN).items():
        patched.setattr(dcgan, name, value)
    patched.setattr(dcgan, "R1_INTERVAL", 4)
    # Quicker, but as much depends on the labels, and on what was drawn before
    update = dcgan.update_bn
    patched.setattr(dcgan, "update_bn", lambda latents, *about: update(latents[:2], *about))
    patched.setattr(dcgan, "enlarged", dcgan.to_pil_image)
    patched.setattr(dcgan, "DISTANCE_IMAGES", 64)
    rows = [f"{index:06d}.jpg,{index % 2}\n" for index in range(40)]
    Path("list_attr_celeba.csv").write_text("image_id,Odd\n" + "".join(rows))


@pytest.fixture
def plan(workplace, monkeypatch):
    begin(monkeypatch)
    return dcgan


@pytest.fixture(scope="module")
def whole(all_faces, tmp_path_factory):
    """The `ending` of a run that was not stopped."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "faces").symlink_to(all_faces)
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        patched.setattr(dcgan.Run, "draw_pictures", lambda *about: None)
        begin(patched)
        crash_at(patched, FILES)  # there is none after the last one
        dcgan.train()
        return ending()


def ending():
    """{name: what a run here has left}, but for settings that may differ, and speeds."""
    found = {"checkpoint.pt": checkpoint(), "generator.pt": checkpoint(name="generator.pt")}
    for state in found.values():
        for name in ("DATA_DIR", "CACHE_DIR", "OUTPUT_DIR", "CHECKPOINT_MINUTES"):
            del state["settings"][name]
    for row in found["checkpoint.pt"]["metrics"]:
        del row["images_per_second"]
    samples = sorted((name, path.read_bytes()) for name, path in files("output/samples").items())
    return found | {"metrics.csv": metrics(), "samples": samples}


def assert_ends_like(whole, *but):
    differing = {name for name, part in ending().items() if not conftest.same(part, whole[name])}
    assert differing <= {*but}


def assert_resumes(whole):
    assert {path.name for path in Path().glob("output/**/.*")} <= {".lock-0"}
    dcgan.train()
    assert_ends_like(whole)


def crash_at(monkeypatch, number):
    """The file of this number raises Crash before its name: as before fsync, it is not there."""
    effects = [DEFAULT] * number + [Crash]
    monkeypatch.setattr(os, "replace", Mock(wraps=os.replace, side_effect=effects))


def in_step(monkeypatch, actions):
    """{number, the first being 1: function of the run to call at the end of this step}"""
    advance, step = dcgan.Run.advance, itertools.count(1)
    acting = lambda run, *batch: (advance(run, *batch), actions.get(next(step), bool)(run))  # noqa: E731
    monkeypatch.setattr(dcgan.Run, "advance", acting)


def send(name):
    assert signal.getsignal(getattr(signal, name)) != signal.SIG_DFL, f"{name} is not caught"
    signal.raise_signal(getattr(signal, name))


@pytest.mark.parametrize("number", range(FILES))
def test_a_crash_before_any_file_gets_its_name_loses_nothing(plan, whole, monkeypatch, number):
    with monkeypatch.context() as patched, pytest.raises(Crash):
        crash_at(patched, number)
        plan.train()
    assert_resumes(whole)


def test_a_file_gets_its_name_only_when_all_of_it_is_on_the_disk(tmp_path, monkeypatch):
    path, seen = tmp_path / "file", []
    path.write_text("old")
    with pytest.raises(TypeError), dcgan.replacing(path) as file:
        file.write(b"half") + "what fails"
    assert [part.read_text() for part in tmp_path.iterdir()] == ["old"], "written in place"
    monkeypatch.setattr(os, "fsync", lambda number: seen.append(os.fstat(number).st_size))
    monkeypatch.setattr(os, "replace", lambda part, to: seen.append(Path(part).read_text()))
    dcgan.write_bytes(path, b"new")
    assert seen == [3, "new"], "no fsync of the whole file before its renaming"


@pytest.mark.parametrize("step, name", enumerate(SIGNALS, 1))
def test_a_signal_in_any_step_loses_nothing(plan, whole, monkeypatch, step, name):
    handlers = list(map(signal.getsignal, signal.Signals))
    with monkeypatch.context() as patched:
        patched.setattr(dcgan, "CHECKPOINT_MINUTES", 1e6)
        in_step(patched, {step: lambda run: send(name)})
        assert exit_status() == 128 + getattr(signal, name)
    assert checkpoint()["images"] == 8 * step
    after = list(map(signal.getsignal, signal.Signals))
    assert after == handlers, "signal handlers are not restored"
    assert_resumes(whole)


def test_signals_that_nohup_ignores_or_others_handle_are_left_to_them(monkeypatch):
    handlers = {signal.SIGHUP: signal.SIG_IGN, signal.SIGUSR1: None}  # None: not Python's
    changed = set()
    monkeypatch.setattr(signal, "getsignal", lambda number: handlers.get(number, signal.SIG_DFL))
    monkeypatch.setattr(signal, "signal", lambda number, handler: changed.add(number.name))
    with dcgan.caught_signals():
        assert changed == {"SIGINT", "SIGTERM", "SIGUSR2", "SIGXCPU"}


def test_a_second_ctrl_c_leaves_at_once_even_while_it_saves(plan, whole, monkeypatch):
    with monkeypatch.context() as patched:
        again = lambda number: send("SIGINT")  # noqa: E731
        in_step(patched, {3: lambda run: (send("SIGINT"), patched.setattr(os, "fsync", again))})
        assert exit_status() == 130
    assert checkpoint()["images"] == 2 * 8
    assert_resumes(whole)


@pytest.mark.parametrize("number, status", [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_a_process_that_is_killed_or_gets_ctrl_c_resumes(plan, number, status):
    program = ["-c", "import sys, dcgan; dcgan.Run.draw_pictures = print; sys.exit(dcgan.main())"]
    settings = flags(**PLAN | {"EPOCHS": 10**6})
    with conftest.start(*settings, cwd=Path.cwd(), program=program) as process:
        conftest.until(lambda: len(metrics()) > 3, process)
        process.send_signal(number)
    assert process.returncode == status
    epochs = checkpoint()["epoch"] + 2
    assert exit_status("--epochs", epochs) == 0
    images = [int(row[2]) for row in metrics()]
    assert images == [*range(16, 24 * epochs, 16), 24 * epochs]


@pytest.mark.parametrize("what", ["a weight is not", "a loss is not", "some error"])
def test_a_step_that_goes_wrong_is_never_saved(plan, whole, monkeypatch, capsys, what):
    def break_something(run):
        if what == "some error":
            raise MemoryError(what)
        broken = run.totals if what == "a loss is not" else next(run.average.parameters())
        broken.fill_(torch.nan)

    with monkeypatch.context() as patched:
        in_step(patched, {4: break_something})
        refused(capsys, status=1, words=[what])
    assert checkpoint()["images"] == 3 * 8
    assert_resumes(whole)


@pytest.fixture
def limit():
    """A function: from now on, no file gets larger than so many bytes, as on a full disk."""
    before, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size=before: resource.setrlimit(resource.RLIMIT_FSIZE, (size, most))
    resource.setrlimit(resource.RLIMIT_FSIZE, (before, most))


def test_a_disk_that_is_full_for_a_while_ends_no_run(plan, whole, monkeypatch, limit, capsys):
    in_step(monkeypatch, {1: lambda run: limit(100), 5: lambda run: limit()})
    assert exit_status() == 0
    said = capsys.readouterr().out
    for name in ("checkpoint.pt", "generator.pt", "metrics.csv", "samples/latest.png"):
        assert said.count(f"{name} cannot be written") == 1, "said never, or again and again"
    assert_ends_like(whole, "samples")  # that of epoch 1 is missing


@pytest.mark.parametrize("returns", [False, True])
def test_the_best_generator_is_tried_twice_too(plan, whole, monkeypatch, capsys, returns):
    good, away = dcgan.write_bytes, [True]

    def write(path, content):
        if away and path.name == "generator.pt":
            raise OSError("no disk")
        good(path, content)

    monkeypatch.setattr(dcgan, "write_bytes", write)
    monkeypatch.setattr(dcgan, "sleep", lambda seconds: returns and away.clear())
    assert exit_status() == (0 if returns else 1)
    if returns:
        assert_ends_like(whole)


@pytest.mark.parametrize("returns", [False, True])
def test_the_last_save_is_tried_twice(plan, whole, monkeypatch, limit, capsys, returns):
    with monkeypatch.context() as patched:
        patched.setattr(dcgan, "sleep", sleep := Mock(side_effect=lambda time: returns and limit()))
        in_step(patched, {5: lambda run: (limit(20_000), send("SIGTERM"))})
        assert exit_status() == (143 if returns else 1)
    sleep.assert_called_once_with(dcgan.RETRY_SECONDS)
    assert returns or conftest.one_line(capsys.readouterr().err, "output", "minutes")
    assert checkpoint()["images"] == 8 * (5 if returns else 4)
    limit()
    assert_resumes(whole)


def test_a_run_begins_if_there_is_space_for_two_checkpoints(plan, monkeypatch, capsys):
    plan.train()
    size = CHECKPOINT.stat().st_size
    shutil.rmtree("output")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Mock(free=1.8 * size))
    refused(capsys, "--epochs", 2, status=1, words=["GB are needed"])
    assert not Path("output").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Mock(free=5 * size))
    assert exit_status("--epochs", 2) == 0


@pytest.mark.parametrize("seconds, saved", [(61, [3, 5, 8, 10]), (25, [5, 10]), (5, [10])])
def test_a_checkpoint_is_due_after_so_many_minutes(plan, monkeypatch, seconds, saved):
    plan.CHECKPOINT_MINUTES, plan.LOG_EVERY, plan.MAX_IMAGES = 2.5, 1, 40
    time, found, save = [0], [], plan.Run.save
    monkeypatch.setattr(plan, "perf_counter", lambda: sum(time))
    monkeypatch.setattr(plan.Run, "sample", lambda run: None)
    in_step(monkeypatch, dict.fromkeys(range(1, 11), lambda run: time.append(seconds)))
    monkeypatch.setattr(plan.Run, "save", lambda *run: (found.append(run[0].images), save(*run)))
    plan.train()
    assert found == [8 * step for step in saved]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_or_foreign_checkpoint_is_one_line_and_stays(copied, capsys, damage):
    bad = DAMAGES[damage]()
    CHECKPOINT.write_bytes(bad)
    refused(capsys, *flags(**LONGER), words=["output/checkpoint.pt"])
    if damage != "generator.pt":
        refused(capsys, "generate", "--checkpoint", CHECKPOINT, words=[CHECKPOINT])
    assert CHECKPOINT.read_bytes() == bad


@pytest.mark.parametrize("name", NETWORKS)
def test_other_network_settings_are_refused_with_both_values(copied, capsys, name):
    refused(capsys, *flags(**LONGER | {name: 128}), words=(name, 128, LONGER[name]))


def test_other_changes_are_said_and_rates_take_effect(plan, capsys):
    plan.train()
    then = checkpoint()["generator"]
    assert exit_status("--beta1", 0.5) == 0
    assert "BETA1 0.0 -> 0.5" in (said := capsys.readouterr().out) and "raise EPOCHS" in said, (
        "not on a finished run"
    )
    assert exit_status("--learning-rate", 0, "--epochs", 3) == 0
    assert "LEARNING_RATE 0.0005 -> 0.0" in capsys.readouterr().out
    assert [row[2] for row in metrics()] == ["16", "32", "48", "64", "72"]
    now = checkpoint()["generator"]
    assert all(torch.equal(then[name], now[name]) for name in then if name.endswith("weight"))


def test_a_run_keeps_to_its_photos_which_may_move_or_become_more(plan, capsys):
    plan.EPOCHS = 1
    plan.train()
    shutil.copytree("faces", "moved")
    assert exit_status("--epochs", 2, "--data-dir", "moved") == 0
    shutil.copy("moved/000039.jpg", "moved/000000-2.jpg")
    assert exit_status("--epochs", 3, "--data-dir", "moved") == 0
    refused(capsys, "--epochs", 4, words=["moved"])


def test_two_runs_do_not_share_a_folder(plan, capsys):
    with FileLock("output/.lock-0"):
        refused(capsys, status=1, words=["output", "in use by another run"])


@pytest.mark.parametrize("call", [*CALLS, "generate --checkpoint nothing"])
def test_a_failed_call_leaves_no_output_folder(plan, capsys, call):
    refused(capsys, *call.split(), words=call.split()[-1:])
    assert not Path("output").exists()


def test_settings_json_says_how_a_run_was_made_and_generator_pt_not_where(finished):
    about = json.loads((finished / "output/settings.json").read_text())
    assert (about.pop("PyTorch"), about.pop("Python")) == (torch.__version__, sys.version)
    assert about == checkpoint(finished)["settings"]
    assert str(finished) not in str(checkpoint(finished, "generator.pt")["settings"])


def test_broken_images_are_listed_until_they_are_mended(plan, capsys):
    shutil.copytree("faces", "photos")
    Path("photos/000007.jpg").write_bytes(b"no image")
    assert exit_status("--data-dir", "photos", "--epochs", 1) == 0
    report = capsys.readouterr().out.partition("1 broken, listed in ")[2].split()[0]
    assert "000007.jpg" in Path(report).read_text()
    shutil.copy("faces/000007.jpg", "photos")
    assert exit_status("--data-dir", "photos") == 0
    assert " broken, " not in capsys.readouterr().out
