"""What the tests share: drawn faces, tiny settings, and the script run as a user runs it."""

import functools
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "dcgan.py"
sys.path.insert(0, str(ROOT))

from forks import Server  # noqa: E402
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

os.environ["PYTHONPATH"] = str(ROOT)  # programs that the tests start find dcgan, too
for variable in [name for name in os.environ if name.startswith("KAGGLE")]:
    del os.environ[variable]  # no test uses an account of the person who runs it

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
# What a run of two epochs leaves in OUTPUT_DIR.
RUN_FILES = set(".lock checkpoint.pt generator.pt metrics.csv quality.csv losses.png".split())
RUN_FILES |= set("real_vs_fake.png training.gif samples/latest.png".split())
RUN_FILES |= {f"samples/epoch_00{epoch}.png" for epoch in range(3)}


def flags(**changed):
    """Tiny settings, and those given, as flags of the command line."""
    pairs = (TINY | changed).items()
    return [text for name, value in pairs for text in (dcgan.flag(name), str(value))]


fork_server = functools.cache(Server)


def start(*arguments, cwd, env=None, program=(SCRIPT,), before=(), fresh=False, **options):
    """Start `python dcgan.py ARGUMENTS` in `cwd`; the process, with its output in pipes of text.

    `program` is what Python runs instead of dcgan.py; `before` comes before Python. On Linux the
    process is a fork, which is quicker, unless it has to be `fresh`, or needs to be.
    """
    early = ("PYTHON", "MPL", "OMP")  # these variables are read by what a fork has imported
    fresh = fresh or before or options or program[0] in ("-m", "-B")
    fresh = fresh or any(name.startswith(early) for name in env or {})
    if sys.platform == "linux" and not fresh:
        return fork_server().start(program, arguments, cwd, env)
    command = [*before, sys.executable, *program, *arguments]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    options = pipes | {"text": True, "env": os.environ | (env or {})} | options
    return subprocess.Popen(list(map(str, command)), cwd=cwd, **options)


def run(*arguments, timeout=300, **options):
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


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


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


def resuming(epoch, step, folder="output"):
    """The end of the line with which a run on 5 batches resumes after so many epochs and steps."""
    at = f"the end of epoch {epoch + 1}" if step == 5 else f"epoch {epoch + 1}, step {step + 1}"
    return f"/{folder}: {at}\n"


def until(condition, process=None, seconds=100):
    """Wait for something to come true while `process` lives."""
    end = time.monotonic() + seconds
    while not condition():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.002)


def own_mounts(script):
    """The beginning of a command that runs after `script`, whose mounts no other process sees."""
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


def load_faces(dcgan, size):
    """(images as uint8 (N, 3, size, size), key) of the data set that the settings say."""
    found = dcgan.find_faces(dcgan.data_folder(), size)
    return found.load(), found.key


def batch(number=0, size=TINY["IMAGE_SIZE"], device="cpu"):
    """(faces, flips, latents) as the training step takes them; the same for a `number`."""
    stream = torch.Generator().manual_seed(number)
    faces = torch.randint(0, 256, (8, 3, size, size), dtype=torch.uint8, generator=stream)
    flips = torch.rand(8, 1, 1, 1, generator=stream) < 0.5
    latents = torch.randn(8, TINY["LATENT_SIZE"], 1, 1, generator=stream)
    return [tensor.to(device) for tensor in (faces, flips, latents)]


@pytest.fixture(scope="session")
def all_faces(tmp_path_factory):
    return draw_faces(tmp_path_factory.mktemp("faces") / "faces")


@pytest.fixture(scope="session")
def archive(all_faces):
    return archive_of(all_faces)


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """A TORCH_HOME with Inception's weights: random, of a size that lets images through."""
    from torch_fidelity import feature_extractor_inceptionv3 as inception_module

    home = tmp_path_factory.mktemp("inception")
    path = home / "hub/checkpoints" / Path(inception_module.URL_INCEPTION_V3).name
    path.parent.mkdir(parents=True)
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
    return home


@pytest.fixture(autouse=True)
def settings_as_before():
    """What checks the settings also makes their paths absolute: not for the next test."""
    before = dcgan.setting_values()
    yield
    vars(dcgan).update(before)


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
    return dcgan
