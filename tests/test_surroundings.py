"""Odd terminals, launchers, disks and versions: dcgan.py works there, or says in a line why not."""

import contextlib
import errno
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import SCRIPT, TINY, flags, one_line, refused, run, start, succeed, until
from reading import table

QUICK = flags(DATA_DIR="faces", EPOCHS=1)

# ------------------------------------------------------------------------- streams and encodings


def redirected(workplace, redirections, **variables):
    """The status of a run of the script in a shell, with these redirections."""
    command = shlex.join([sys.executable, str(SCRIPT), *map(str, QUICK)])
    done = subprocess.run(
        ["sh", "-c", f"{command} {redirections}"],
        cwd=workplace,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert "Traceback" not in done.stdout + done.stderr
    return done


@pytest.mark.parametrize("redirections", [">&-", "<&- >&- 2>&-"])
def test_a_run_without_streams_trains(tiny, workplace, redirections):
    assert redirected(workplace, redirections).returncode == 0
    tiny.read_checkpoint("output/checkpoint.pt")
    assert len(table("output/metrics.csv")) > 1


ASCII = """
import contextlib, sys
import dcgan
with contextlib.suppress(SystemExit):
    dcgan.main(["--help"])
sys.exit(dcgan.main())
"""


def test_an_encoding_without_a_character_loses_no_line(workplace):
    os.rename(workplace / "faces", workplace / "Gesichter ж")
    where = flags(DATA_DIR="Gesichter ж", OUTPUT_DIR="Läufe", EPOCHS=1)
    ascii_only = {"PYTHONIOENCODING": "ascii"}
    said = succeed(*where, cwd=workplace, env=ascii_only, program=["-c", ASCII])
    assert "--data-dir" in said and r"L\xe4ufe/samples" in said


def test_optimised_python_trains_and_helps(workplace, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    code = compile(SCRIPT.read_text(encoding="utf-8"), "dcgan.py", "exec", optimize=2)
    optimised = {"__name__": "dcgan"}
    exec(code, optimised)
    assert optimised["train"].__doc__ is None
    assert optimised["main"](list(map(str, QUICK))) == 0
    with pytest.raises(SystemExit):
        optimised["main"](["--help"])
    assert "--data-dir" in capsys.readouterr().out


# ------------------------------------------------------------------------------ versions, imports


OLDER = f"""
import runpy, torch
torch.__version__ = type(torch.__version__)("2.4.1")
runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
"""


def test_an_older_pytorch_is_named_with_what_is_needed(tmp_path):
    """The real one, under another version."""
    done = run(cwd=tmp_path, program=["-c", OLDER])
    assert done.returncode == 1 and done.stdout == ""
    one_line(done.stderr, "PyTorch 2.11 or newer is needed, and this is 2.4.1", "-m pip install")


def test_a_missing_package_is_named_with_what_installs_it(tmp_path):
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision/__init__.py").write_text("raise ImportError('no torchvision here')")
    done = run(cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 1
    one_line(done.stderr, "no torchvision here", "-m pip install -r requirements.txt")


def test_the_version_is_what_a_report_of_a_bug_needs(workplace):
    said = succeed("--version", cwd=workplace)
    blob = subprocess.run(["git", "hash-object", SCRIPT], capture_output=True, text=True)
    number = blob.stdout[:10] if blob.returncode == 0 else ""
    python = ".".join(map(str, sys.version_info[:3]))
    for words in (f"dcgan.py {number}", f"PyTorch {torch.__version__}", f"Python {python}"):
        assert words in said
    assert re.search("CPU|NVIDIA|MPS", said)


# ----------------------------------------------------------------------------- printed commands


def test_the_command_that_is_printed_at_the_end_runs_as_printed(workplace):
    script = workplace / "my script.py"
    shutil.copy(SCRIPT, script)
    said = succeed(*QUICK, "--output-dir", "my run", cwd=workplace, program=[script])
    line = said.splitlines()[-1].partition("to generate new faces: ")[2]
    elsewhere = workplace / "elsewhere"
    elsewhere.mkdir()
    done = subprocess.run(["sh", "-c", f"{line} --device cpu"], cwd=elsewhere, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert (workplace / "my run/generated.png").exists()


def test_home_is_understood_wherever_a_path_is_taken(tiny, workplace, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(workplace))
    where = ["--data-dir=~/faces", "--output-dir=~/runs/a", "--cache-dir=~/c", "--epochs=1"]
    assert tiny.main(where) == 0
    assert (workplace / "runs/a/checkpoint.pt").exists() and list((workplace / "c").glob("*.npy"))
    assert tiny.main(["generate", "--num-images=1", "--output-dir=~/runs/a"]) == 0
    assert (workplace / "runs/a/generated.png").exists()
    tiny.generate_images(1, checkpoint="~/runs/a/generator.pt", output="~/faces.png")
    assert (workplace / "faces.png").exists()
    command = "generate --individual --num-images 1 --checkpoint ~/runs/a/generator.pt"
    assert tiny.main([*command.split(), "--output", "~/single"]) == 0
    command = "interpolate --num-faces 2 --frames 2 --checkpoint ~/runs/a/generator.pt"
    assert tiny.main([*command.split(), "--output", "~/walk.gif"]) == 0
    assert {"single", "walk.gif"} <= set(os.listdir(workplace)) and "~" not in os.listdir()


# ---------------------------------------------------------------------------------------- launchers

TORCHRUN = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}


@pytest.mark.parametrize(
    "variables",
    [
        {"RANK": "1"},
        {"WORLD_SIZE": "2"},
        {"RANK": "0", "WORLD_SIZE": "2"},
        TORCHRUN,
        TORCHRUN | {"MASTER_PORT": "many"},
        TORCHRUN | {"MASTER_PORT": "29500", "RANK": "2"},
        {"RANK": "-1"},
        {"WORLD_SIZE": "two"},
        {"LOCAL_RANK": "first"},
        {"WORLD_SIZE": "0", "RANK": "0"},
    ],
    ids=lambda variables: " ".join(f"{name}={text}" for name, text in variables.items()),
)
def test_variables_of_a_launcher_that_do_not_fit_are_named(tiny, monkeypatch, capsys, variables):
    for name, text in variables.items():
        monkeypatch.setenv(name, text)
    monkeypatch.setattr(tiny, "RANK", tiny.launcher_number("RANK", 0))
    monkeypatch.setattr(tiny, "WORLD_SIZE", tiny.launcher_number("WORLD_SIZE", 1))
    line = refused(capsys)
    for words in ("torchrun", "unset", *(f"{name}={text}" for name, text in variables.items())):
        assert words in line
    assert not os.path.exists("output")


def test_importing_with_odd_variables_is_no_error(workplace):
    done = run(*QUICK, cwd=workplace, env={"RANK": "one", "WORLD_SIZE": "-"}, timeout=60)
    assert done.returncode == 2
    one_line(done.stderr, "RANK=one", "WORLD_SIZE=-")


def test_variables_of_a_launcher_for_one_process_are_no_obstacle(tiny, monkeypatch):
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "", "MASTER_ADDR": "somewhere"}
    for name, text in alone.items():
        monkeypatch.setenv(name, text)
    assert tiny.launcher_number("LOCAL_RANK", 0) == 0
    assert tiny.main(["--epochs", "1"]) == 0


def test_a_process_that_waits_for_others_says_for_whom(workplace):
    lonely = TORCHRUN | {"MASTER_PORT": "29517", "PYTHONUNBUFFERED": "1"}
    with open(workplace / "said", "w") as said:
        process = start(*QUICK, cwd=workplace, env=lonely, stdout=said, stderr=said)
        with process:
            words = "process 0 is waiting for the other 1 at 127.0.0.1:29517"
            until(lambda: words in (workplace / "said").read_text(), process)
            process.kill()


# ---------------------------------------------------------------------------------- disks and locks


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_disk_without_file_locks_is_used_without(tiny, workplace, monkeypatch, capsys, number):
    fcntl = pytest.importorskip("fcntl")

    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    assert tiny.main(["--epochs", "1"]) == 0
    said = capsys.readouterr().out
    if number != errno.ENOSYS:  # then filelock has a way of its own
        assert f"{workplace / 'output'} has no file locks" in said
    assert tiny.read_checkpoint("output/checkpoint.pt")["epoch"] == 1


def test_what_is_only_to_be_looked_at_ends_no_run(tiny, workplace, capsys):
    """A folder stands where each picture and table should be written."""
    looked_at = ["losses.png", "real_vs_fake.png", "training.gif", "metrics.csv", "quality.csv"]
    looked_at += ["samples/latest.png", "samples/epoch_001.png"]
    for name in looked_at:
        (workplace / "output" / name / "mine").mkdir(parents=True)
    assert tiny.main(["--epochs", "2"]) == 0
    said = capsys.readouterr().out
    for name in looked_at:
        assert said.count(f"{name} cannot be written (") == 1, name
        assert (workplace / "output" / name / "mine").exists()
    assert tiny.read_checkpoint("output/checkpoint.pt")["epoch"] == 2
    assert tiny.read_checkpoint("output/generator.pt")
    # At the next turn, all rows are written.
    for name in looked_at:
        shutil.rmtree(workplace / "output" / name)
    assert tiny.main(["--epochs", "3"]) == 0
    assert "cannot be written" not in capsys.readouterr().out
    assert [row["epoch"] for row in table("output/quality.csv")] == ["1", "2", "3"]
    assert [row["step"] for row in table("output/metrics.csv")] == ["2", "4", "5"] * 3


def test_a_damaged_picture_of_an_earlier_epoch_ends_no_run(tiny, capsys):
    assert tiny.main(["--epochs", "1"]) == 0
    Path("output/samples/epoch_001.png").write_bytes(b"damaged")
    assert tiny.main(["--epochs", "2"]) == 0
    assert "training.gif cannot be written" in capsys.readouterr().out


def test_an_error_in_the_loop_is_raised_after_saving(tiny, monkeypatch):
    honest, steps = tiny.Trainer.advance, []

    def advance(trainer, *batch):
        if len(steps) == 7:
            raise ZeroDivisionError("a bug")
        steps.append(honest(trainer, *batch))

    monkeypatch.setattr(tiny.Trainer, "advance", advance)
    monkeypatch.setattr(tiny, "SEED", 5)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        tiny.train()
    state = tiny.read_checkpoint("output/checkpoint.pt")
    assert (state["epoch"], state["step"]) == (1, 2)


def test_an_error_at_the_end_of_an_epoch_lets_the_next_run_end_it_again(tiny, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(tiny.Run, "measure", lambda run: [][0])
        with pytest.raises(IndexError):
            tiny.train()
    state = tiny.read_checkpoint("output/checkpoint.pt")
    assert (state["epoch"], state["step"]) == (0, 5)
    monkeypatch.setattr(tiny, "EPOCHS", 1)
    tiny.train()
    assert tiny.read_checkpoint("output/generator.pt")["epoch"] == 1
    assert [row["epoch"] for row in table("output/quality.csv")] == ["1"]


def test_what_draws_is_loaded_before_the_first_step(tiny, workplace, capsys, monkeypatch):
    broken = workplace / "modules/matplotlib"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise ImportError('numpy has another ABI')")
    done = run(*QUICK, cwd=workplace, env={"PYTHONPATH": str(broken.parent)})
    assert done.returncode == 1
    one_line(done.stderr, "matplotlib is missing or broken", "another ABI", "-m pip install")
    assert not list((workplace / "output").glob("*.pt"))


def test_a_path_that_cannot_be_written_is_named_with_its_setting(tiny, workplace, capsys):
    (workplace / "file").touch()
    line = refused(capsys, "--cache-dir", "file/cache", status=1)
    assert "Not a directory" in line and f"check CACHE_DIR ({workplace / 'file/cache'})" in line
    line = refused(capsys, "--output-dir", "file/output", status=1)
    assert f"check OUTPUT_DIR ({workplace / 'file/output'})" in line


def test_a_foreign_checkpoint_is_refused_in_whole_words(tiny, workplace, capsys):
    torch.save({"weights": 1}, workplace / "foreign.pt")
    line = refused(capsys, "generate", "--checkpoint", "foreign.pt")
    assert f"{workplace / 'foreign.pt'} is not a checkpoint of dcgan.py" in line
    assert "there is no 'settings'" in line


# -------------------------------------------------------------------------------- progress in lines


def test_without_a_terminal_long_work_says_how_far_it_is(tiny, monkeypatch, capsys):
    monkeypatch.setattr(tiny, "LINE_SECONDS", 0.03)
    assert tiny.main(["--epochs", "3"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^epoch \d/3: +\d+%.* \d/5 .*<\d\d:\d\d.*loss_d", said, re.MULTILINE)
    assert tiny.main(["generate", "--num-images", "1000", "--individual"]) == 0
    said = capsys.readouterr().out
    lines = re.findall(r"^generating: +(\d+)%.* (\d+)/1000 .*<\d\d:\d\d", said, re.MULTILINE)
    assert len(lines) > 1 and "\r" not in said
    assert [int(count) for _, count in lines] == sorted(int(count) for _, count in lines)


# ------------------------------------------------------------------------------------------- device


def test_a_device_is_any_that_pytorch_knows_and_has(tiny, capsys):
    assert TINY["DEVICE"] == "cpu"
    for name in ("gpu", "cuda:99999999999", "cuda:-1", ""):
        assert "it must be a device" in refused(capsys, "--device", name)
    for name in ("xpu", "xpu:3", "meta", "cuda:7"):
        assert f"DEVICE is {name}" in refused(capsys, "--device", name)
    assert tiny.main(["--device", "cpu:0", "--epochs", "1"]) == 0


def test_signals_of_schedulers_are_caught_unless_they_are_ignored(tiny):
    before = signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    try:
        with tiny.caught_signals() as received:
            for name in "SIGUSR2 SIGTERM SIGUSR1 SIGXCPU SIGHUP SIGINT".split():
                with contextlib.suppress(KeyboardInterrupt):  # a second signal that is Ctrl-C
                    signal.raise_signal(getattr(signal, name))
        assert received == [signal.SIGTERM, signal.SIGUSR1, signal.SIGXCPU, signal.SIGHUP]
    finally:
        signal.signal(signal.SIGUSR2, before)
