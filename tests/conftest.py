"""What the tests share: drawn faces, tiny settings, and the script run as a user runs it."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "dcgan.py"
sys.path.insert(0, str(ROOT))

import dcgan  # noqa: E402

signal.signal(
    signal.SIGINT, signal.default_int_handler
)  # a shell's background job has it ignored, and its children

TINY = {
    "IMAGE_SIZE": 32,
    "BATCH_SIZE": 8,
    "LATENT_SIZE": 8,
    "G_FEATURES": 4,
    "D_FEATURES": 4,
    "EPOCHS": 2,
    "LOG_EVERY": 2,
    "WORKERS": 0,
    "DEVICE": "cpu",
    "PRECISION": "float32",
}


def flags(**changed):
    """Tiny settings, and those given, as flags of the command line."""
    pairs = (TINY | changed).items()
    return [text for name, value in pairs for text in (dcgan.flag(name), str(value))]


def start(*arguments, cwd, env=None, **options):
    """Start `python dcgan.py ARGUMENTS` in `cwd`; the process, with its output in pipes of text."""
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    pipes = {
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
        "stdin": subprocess.DEVNULL,
    }
    env = os.environ | {"OMP_NUM_THREADS": "1"} | (env or {})
    return subprocess.Popen(command, cwd=cwd, env=env, **pipes | options)


def run(*arguments, cwd, env=None, timeout=300, **options):
    """Run `python dcgan.py ARGUMENTS` in `cwd` to its end. Returns a CompletedProcess."""
    with start(*arguments, cwd=cwd, env=env, **options) as process:
        try:
            stdout, stderr = process.communicate(timeout=timeout)
            return subprocess.CompletedProcess(arguments, process.returncode, stdout, stderr)
        finally:
            process.kill()


def draw_faces(folder, number=40):
    """A folder of `number` drawn faces as JPEGs."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(number):
        dcgan.draw_face(random.Random(index)).save(folder / f"{index:06d}.jpg", quality=90)
    return folder


@pytest.fixture(scope="session")
def all_faces(tmp_path_factory):
    return draw_faces(tmp_path_factory.mktemp("faces") / "faces")


@pytest.fixture
def workplace(tmp_path, all_faces):
    """An empty folder with `faces` in it: 40 drawn faces (a link, not to be written to)."""
    (tmp_path / "faces").symlink_to(all_faces)
    return tmp_path


@pytest.fixture
def tiny(monkeypatch, workplace):
    """`dcgan` itself with tiny settings, in a working directory that holds only `faces`."""
    monkeypatch.chdir(workplace)
    for name, value in (TINY | {"DATA_DIR": "faces"}).items():
        monkeypatch.setattr(dcgan, name, value)
    for name in dcgan.SETTINGS:  # what check_settings normalises is put back as well
        monkeypatch.setattr(dcgan, name, getattr(dcgan, name))
    return dcgan
