"""What the tests share: tiny settings, drawn faces, one run that many look at, and the script."""

import csv
import functools
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "dcgan.py"
sys.path.insert(0, str(ROOT))

from forks import Server  # noqa: E402

import dcgan  # noqa: E402

# A shell's background job ignores it, and so would its children.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Two tests run at once: each has one core, and so has what it starts.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["PYTHONPATH"] = str(ROOT)  # programs that the tests start find dcgan, too
for variable in [name for name in os.environ if name.startswith("KAGGLE")]:
    del os.environ[variable]  # no test uses an account of the person who runs it

TINY = {
    "IMAGE_SIZE": 32,
    "BATCH_SIZE": 8,
    "LATENT_SIZE": 8,
    "G_FEATURES": 4,
    "D_FEATURES": 4,
    "EPOCHS": 2,
    "LOG_EVERY": 2,
    "DEVICE": "cpu",
    "PRECISION": "float32",
}


# ------------------------------------------------------------------------------------ fixtures


@pytest.fixture(scope="session")
def all_faces(tmp_path_factory):
    """A folder of 40 drawn faces: five batches."""
    return draw_faces(tmp_path_factory.mktemp("faces") / "faces")


@pytest.fixture(autouse=True)
def pictures(request, monkeypatch):
    """No run in this process draws losses.png and so on, unless the test is marked `pictures`."""
    if not request.node.get_closest_marker("pictures"):
        monkeypatch.setattr(dcgan.Run, "draw_pictures", lambda *about: None)


@contextmanager
def settings_kept():
    """What is done within has no effect on the settings afterwards."""
    before = dcgan.setting_values()
    try:
        yield
    finally:
        vars(dcgan).update(before)


@pytest.fixture(autouse=True)
def settings_as_before():
    """What checks the settings also makes paths absolute: not for the next test."""
    with settings_kept():
        yield
    dcgan.failing.clear()


@pytest.fixture
def workplace(tmp_path, all_faces, monkeypatch):
    """The working directory: an empty folder with `faces` in it (a link, not to be written to)."""
    (tmp_path / "faces").symlink_to(all_faces)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def tiny(monkeypatch, workplace):
    """`dcgan` itself with tiny settings, on `faces`; each fourth step has the penalty."""
    for name, value in (TINY | {"DATA_DIR": "faces", "R1_INTERVAL": 4}).items():
        monkeypatch.setattr(dcgan, name, value)
    return dcgan


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A folder that only tests read: the end of a whole run of the script, made once for all.

    `faces` has 40 images, one that is broken, and a table of attributes; `stdout` is what the run
    has said.
    """
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # the same for all workers
    folder = folder / "finished"
    with FileLock(f"{folder}.lock"):
        if not (folder / "stdout").exists():
            shutil.rmtree(folder, ignore_errors=True)
            draw_faces(folder / "faces")
            (folder / "faces/broken.jpg").write_bytes(b"no image")
            (folder / "faces/notes.heic").write_bytes(b"no image either")
            rows = [f"{index:06d}.jpg,{index % 2 * 2 - 1},{index // 20}" for index in range(40)]
            table = "\n".join(["image_id,Odd,Late", *rows, "broken.jpg,1,1"])
            (folder / "faces/list_attr_celeba.csv").write_text(table)
            said = succeed(*flags(**FINISHED), cwd=folder)
            (folder / "stdout").write_text(said)
    return folder


FINISHED = {"DATA_DIR": "faces", "EPOCHS": 3, "ATTRIBUTES": "Odd,Late", "CHECKPOINT_MINUTES": 0}


@pytest.fixture
def copied(finished, tmp_path, monkeypatch):
    """A copy of the `finished` run, to be changed: the working directory."""
    shutil.copytree(finished, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture(scope="session")
def inception(tmp_path_factory):
    """A TORCH_HOME with Inception's weights: random, of a size that lets images through."""
    from torch_fidelity import feature_extractor_inceptionv3 as module

    home = tmp_path_factory.mktemp("inception")
    path = home / "hub/checkpoints" / Path(module.URL_INCEPTION_V3).name
    path.parent.mkdir(parents=True)
    extractor = module.FeatureExtractorInceptionV3
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(module, "load_state_dict_from_url", lambda *url, **options: None)
        patched.setattr(extractor, "load_state_dict", lambda network, state: None)
        network = extractor("inception-v3-compat", ["2048"])
    torch.manual_seed(0)
    for layer in network.modules():
        if isinstance(layer, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(layer.weight)
    torch.save(network.state_dict(), path)
    return home


# ----------------------------------------------------------------------------------- processes


def flags(**changed):
    """Tiny settings, and those given, as flags of the command line."""
    pairs = (TINY | changed).items()
    return [text for name, value in pairs for text in (dcgan.flag(name), str(value))]


fork_server = functools.cache(Server)


def start(*arguments, cwd, env=None, program=(SCRIPT,), fresh=False, **options):
    """Start `python dcgan.py ARGUMENTS` in `cwd`; the process, with its output in pipes of text.

    `program` is what Python runs instead of dcgan.py. On Linux the process is a fork of one that
    has imported PyTorch, which is quicker, unless it has to be `fresh`. `options`: as for either.
    """
    if sys.platform == "linux" and not fresh:
        return fork_server().start(program, arguments, cwd, env, **options)
    command = [sys.executable, *program, *arguments]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    options = pipes | {"text": True, "env": os.environ | (env or {})} | options
    return subprocess.Popen(list(map(str, command)), cwd=cwd, **options)


def run(*arguments, timeout=100, **options):
    """Run `python dcgan.py ARGUMENTS` to its end; options as for `start`: a CompletedProcess."""
    with start(*arguments, **options) as process:
        try:
            stdout, stderr = process.communicate(timeout=timeout)
            return subprocess.CompletedProcess(arguments, process.returncode, stdout, stderr)
        finally:
            process.kill()


def succeed(*arguments, **options):
    """stdout of `run`, which has to succeed and print nothing on stderr."""
    done = run(*arguments, **options)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def until(condition, process=None, seconds=60):
    """Wait for something to come true while `process` lives."""
    end = time.monotonic() + seconds
    while not condition():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.002)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


# ------------------------------------------------------------------------- what a run has said


def one_line(text, *words):
    """`text`, which has to be the one line of an error, with these words in it."""
    assert text.startswith("dcgan.py: error: "), text
    assert text.endswith("\n") and text.count("\n") == 1 and len(text) < 600, text
    for word in words:
        assert str(word) in text, text
    return text


def refused(capsys, *arguments, status=2, words=()):
    """The one line, with these words, on stderr with which `main` ends."""
    capsys.readouterr()
    assert exit_status(*arguments) == status
    return one_line(capsys.readouterr().err, *words)


def exit_status(*arguments):
    """That of the command line with these arguments, in this process."""
    with settings_kept():
        try:
            return dcgan.main(list(map(str, arguments)))
        except SystemExit as end:  # argparse's
            return end.code


# ------------------------------------------------------------------------- what a run has left


draw_demo = dcgan.draw_demo  # in one test, dcgan has another one


def draw_faces(folder, number=40):
    """A folder of `number` drawn faces as JPEGs."""
    folder.mkdir(parents=True, exist_ok=True)
    draw_demo(folder, number)
    return folder


def files(folder="output"):
    """{name relative to the folder: path} of all files below it."""
    paths = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path for path in paths}


def table(path):
    """The rows of a file like metrics.csv, each a dict; none if the file is not there yet."""
    if not Path(path).exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def metrics(folder="."):
    """The rows of output/metrics.csv in a folder as lists of text, without images_per_second."""
    return [list(row.values())[:-1] for row in table(Path(folder, "output/metrics.csv"))]


def checkpoint(folder=".", name="checkpoint.pt"):
    return torch.load(Path(folder, "output", name), weights_only=True)


def same(one, two):
    """Whether two states are equal bit for bit."""
    if isinstance(one, torch.Tensor):
        return one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, dict):
        return list(one) == list(two) and all(same(value, two[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(map(same, one, two))
    return one == two


def same_run(one, two):
    """Whether two checkpoints are those of the same run, but for the speeds in their metrics."""
    one, two = (
        state | {"metrics": [row | {"images_per_second": 0} for row in state["metrics"]]}
        for state in (one, two)
    )
    return same(one, two)


def pixels(path):
    """A picture as a tensor (3, height, width) of bytes."""
    with Image.open(path) as image:
        return pil_to_tensor(image.convert("RGB"))


def batch(number=0, size=TINY["IMAGE_SIZE"], device="cpu", attributes=0):
    """(faces, flips, latents) as the training step takes them; the same for a `number`."""
    rng = torch.Generator().manual_seed(number)
    faces = torch.randint(0, 256, (8, 3, size, size), dtype=torch.uint8, generator=rng)
    flips = torch.rand(8, 1, 1, 1, generator=rng) < 0.5
    noise = torch.randn(8, TINY["LATENT_SIZE"], generator=rng)
    labels = torch.randint(0, 2, (8, attributes), generator=rng) * 2.0 - 1
    return [tensor.to(device) for tensor in (faces, flips, torch.cat([noise, labels], 1))]
