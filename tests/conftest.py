"""What the tests share: drawn faces, tiny settings, and the script run as a user runs it."""

import csv
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "dcgan.py"
sys.path.insert(0, str(ROOT))

from kaggle_server import archive_of  # noqa: E402

import dcgan  # noqa: E402

# What forks, or limits its own files, needs a Unix.
collect_ignore = ["test_checkpoint.py"] if os.name == "nt" else []

# a shell's background job has it ignored, and its children
signal.signal(signal.SIGINT, signal.default_int_handler)

# Of two tests that run at once, each has one core, and so has what it starts: more threads would
# wait for each other.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

# Started first, so that neither of two workers is left with a long file at the end.
LONG_FILES = (
    "test_imitated_gpu.py",
    "test_download.py",
    "test_checkpoint.py",
    "test_distributed.py",
    "test_readme.py",
)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONG_FILES)


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
RUN_FILES = {  # of one epoch, in OUTPUT_DIR
    ".lock",
    "checkpoint.pt",
    "generator.pt",
    "losses.png",
    "metrics.csv",
    "quality.csv",
    "real_vs_fake.png",
    "training.gif",
    "samples/epoch_000.png",
    "samples/epoch_001.png",
    "samples/latest.png",
}


def flags(**changed):
    """Tiny settings, and those given, as flags of the command line."""
    pairs = (TINY | changed).items()
    return [text for name, value in pairs for text in (dcgan.flag(name), str(value))]


def start(*arguments, cwd, env=None, program=(SCRIPT,), **options):
    """Start `python dcgan.py ARGUMENTS` in `cwd`; the process, with its output in pipes of text.

    `program` is what Python runs in place of dcgan.py.
    """
    command = [sys.executable, *map(str, program), *map(str, arguments)]
    pipes = {
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
        "stdin": subprocess.DEVNULL,
    }
    env = os.environ | (env or {})
    return subprocess.Popen(command, cwd=cwd, env=env, **pipes | options)


def run(*arguments, cwd, env=None, timeout=300, **options):
    """Run `python dcgan.py ARGUMENTS` in `cwd` to its end. Returns a CompletedProcess."""
    with start(*arguments, cwd=cwd, env=env, **options) as process:
        try:
            stdout, stderr = process.communicate(timeout=timeout)
            return subprocess.CompletedProcess(arguments, process.returncode, stdout, stderr)
        finally:
            process.kill()


def one_line(text, *words):
    """`text`, which has to be the one line of an error, with these words in it."""
    assert text.startswith("dcgan.py: error: "), text
    assert text.endswith("\n") and text.count("\n") == 1, text
    for word in words:
        assert str(word) in text, text
    return text


def refused(capsys, *arguments, status=2):
    """The one line on stderr with which `main` ends, which is no essay."""
    capsys.readouterr()
    assert dcgan.main(list(map(str, arguments))) == status
    line = one_line(capsys.readouterr().err)
    assert len(line) < 500
    return line


def everything(folder="."):
    """All below a folder, with when it was written."""
    return {path: path.lstat().st_mtime_ns for path in Path(folder).rglob("*")}


def table(path):
    """The rows of a file like metrics.csv, each a dict; none if the file is not there yet."""
    if not Path(path).exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def pixels(path):
    """A picture as a tensor (3, height, width) of bytes."""
    with Image.open(path) as image:
        return pil_to_tensor(image.convert("RGB"))


def film(path):
    """(frames (n, 3, height, width) of bytes, milliseconds of each) of a GIF that runs for ever."""
    with Image.open(path) as image:
        assert image.format == "GIF" and image.info["loop"] == 0
        frames, times = [], []
        for index in range(image.n_frames):
            image.seek(index)
            frames.append(pil_to_tensor(image.convert("RGB")))
            times.append(image.info["duration"])
    return torch.stack(frames), times


def until(condition, seconds=100):
    """Wait for something to come true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it does not come to pass"
        time.sleep(0.002)


def own_mounts(script):
    """The beginning of a command that runs after `script`, whose mounts nobody else sees."""
    prefix = ["unshare", "-m", "sh", "-ec"]
    trial = [*prefix, "mount -t tmpfs none /mnt"]
    if not shutil.which("unshare") or subprocess.run(trial, capture_output=True).returncode:
        pytest.skip("only root of a Linux may mount")
    return [*prefix, f'{script}\nexec "$@"', "sh"]


def draw_faces(folder, number=40):
    """A folder of `number` drawn faces as JPEGs."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(number):
        dcgan.draw_face(random.Random(index)).save(folder / f"{index:06d}.jpg", quality=90)
    return folder


@pytest.fixture(scope="session")
def all_faces(tmp_path_factory):
    return draw_faces(tmp_path_factory.mktemp("faces") / "faces")


@pytest.fixture(scope="session")
def archive(all_faces):
    return archive_of(all_faces)


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """A file of Inception's weights: random ones, of a size that lets images through all layers."""
    from torch_fidelity import feature_extractor_inceptionv3 as inception_module

    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    extractor = inception_module.FeatureExtractorInceptionV3
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(inception_module, "load_state_dict_from_url", lambda *url, **options: None)
        patched.setattr(extractor, "load_state_dict", lambda network, state: None)
        network = extractor("inception-v3-compat", ["2048"])
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    torch.save(network.state_dict(), path)
    return path


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
