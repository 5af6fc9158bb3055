"""The README's commands, settings, files and pictures are the program's."""

import contextlib
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from conftest import ROOT, dcgan, draw_faces, flags, run
from kaggle_server import serving

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(
    r"(?:python|nproc-per-node 2) dcgan\.py([^`\n>]*)", README.replace(" --help", "")
)


@pytest.mark.parametrize("arguments", sorted(set(COMMANDS)))
def test_a_command_is_understood(arguments):
    words = shlex.split(arguments, comments=True)
    options = vars(dcgan.command_line().parse_args(words))
    for name in dcgan.SETTINGS:
        dcgan.checked(name, options.get(name, getattr(dcgan, name)))


def test_flags_and_constants_that_are_named_exist():
    known = dcgan.command_line().known
    named = set(re.findall(r"`(--[a-z0-9-]+)", README)) - {"--nnodes", "--node-rank", "--signal"}
    assert len(named) > 5 and named <= known
    constants = set(re.findall(r"`([A-Z][A-Z0-9_]{3,})`", README))
    assert len(constants) > 5 and constants <= set(dcgan.SETTINGS)


def test_defaults_in_the_table_are_the_constants():
    table = dict(re.findall(r"^\| `([A-Z_]+)` \| ([\d]+) ", README, re.MULTILINE))
    assert len(table) >= 3 and all(
        getattr(dcgan, name) == int(value) for name, value in table.items()
    )


def test_pictures_and_requirements_are_there():
    paths = (
        re.findall(r"\]\((\.github/[^)]+)\)", README)
        + re.findall(r"-r (\S+)", README)
        + ["tests/fuzz.py"]
    )
    assert len(paths) > 5 and all((ROOT / path).is_file() for path in paths)


def test_what_it_writes_is_what_a_run_leaves_in_its_folders(workplace):
    done = run(*flags(DATA_DIR="faces", CHECKPOINT_MINUTES=0), cwd=workplace)
    assert done.returncode == 0, done.stderr
    section = README.partition("## What it writes")[2].partition("\n## ")[0]
    named = set(re.findall(r"`([\w./]+\.\w+)`", section))
    assert "data/cache/" in section and list(workplace.glob("data/cache/*.npy"))
    output = workplace / "output"
    files = [path.relative_to(output) for path in output.rglob("*") if path.is_file()]
    written = {str(path) for path in files if not path.name.startswith(".")}
    assert written == named | {"samples/epoch_002.png"}


# ------------------------------------------------------------------------- its commands, in a shell

# What each of them leaves behind, in the order of the README. It is removed before that.
LEAVES = {
    "python3 -m venv .venv && .venv/bin/pip install -r requirements.txt &&": "output/generator.pt",
    "--demo": "output-demo/training.gif",
    "--data-dir ~/photos": "output-photos/samples/epoch_001.png",
    "generate --num-images 16": "output/generated.png",
    "generate --num-images 50000 --individual": "output/generated/000049.png",
    "interpolate": "output/interpolation.gif",
    "generate --output-dir output-demo": "output-demo/generated.png",
    "--truncation": "output/generated.png",
    "nohup": "train.log",
    "torchrun --nproc-per-node 2 dcgan.py": "output/generator.pt",
    "--nnodes 2": "output/generator.pt",
    "evaluate": None,
}
TEST_COMMAND = "-m pytest"  # the one that runs this test
SHORT = shlex.join(flags(EPOCHS=1, MAX_IMAGES=40))


def shell_lines():
    """The lines of the README that are for the shell of a Unix."""
    lines = re.findall(r"^    (.*\.venv/bin/.*)$", README, re.MULTILINE)
    return [line for line in lines if TEST_COMMAND not in line]


def shortened(line):
    """The same command, with flags that make a training short."""
    if re.search("generate|interpolate|evaluate", line):
        return line.replace("50000", "50")
    return re.sub(r"(dcgan\.py[^>&#]*)", rf"\1 {SHORT} ", line)


class Newcomer:
    """Somebody with a folder in which there is nothing but two files of the project."""

    def __init__(self, folder, server):
        self.folder = folder
        for name in ("dcgan.py", "requirements.txt"):
            shutil.copy(ROOT / name, folder)
        draw_faces(server.home / "photos", 40)
        # pip finds that all packages are there already, so it has nothing to download.
        path = [server.environment(server.home)["PYTHONPATH"], sysconfig.get_path("purelib")]
        (server.home / "bin").mkdir()
        (server.home / "bin/python3").symlink_to(os.path.realpath(sys.executable))
        self.environment = server.environment(
            server.home,
            TORCH_HOME=str(server.home),  # where Inception's weights could be
            PATH=f"{server.home}/bin{os.pathsep}{os.environ['PATH']}",
            PYTHONPATH=os.pathsep.join(path),
        )

    def types(self, line):
        """Start a shell with this line, which waits for what it has put into the background."""
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        command = ["sh", "-c", f"{line}\nstatus=$?; wait; exit $status"]
        options = {"cwd": self.folder, "env": self.environment, "start_new_session": True}
        return subprocess.Popen(command, **pipes, **options)


def said(process, status=0):
    with process:
        try:
            output = process.communicate(timeout=300)[0]
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == status, output
    return output


@pytest.fixture
def newcomer(archive, tmp_path):
    with serving(archive) as server:
        server.home = tmp_path / "home"
        (tmp_path / "work").mkdir()
        yield Newcomer(tmp_path / "work", server)


@pytest.mark.skipif(os.name == "nt", reason="a Unix shell")
def test_each_command_does_in_a_shell_what_is_said_of_it(newcomer):
    lines = shell_lines()
    assert len(lines) == len(LEAVES)
    for line, (words, left) in zip(lines, LEAVES.items()):
        assert words in line
        folder = newcomer.folder
        if "nohup" in line or "torchrun" in line:
            shutil.rmtree(folder / "output", ignore_errors=True)
        if "torchrun" in line:  # pip did not install it, since it was there
            shutil.copy(Path(sysconfig.get_path("scripts"), "torchrun"), folder / ".venv/bin")
        if left:
            (folder / left).unlink(missing_ok=True)
        command = shortened(line)
        if "--nnodes" in line:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                command = command.replace("29500", str(free.getsockname()[1]))
            command = command.replace("FIRST_MACHINE", "127.0.0.1")
            second = command.replace("--node-rank 0", "--node-rank 1")
            second = newcomer.types(second.replace("dcgan.py", "dcgan.py --output-dir second", 1))
            try:
                assert "finished" in said(newcomer.types(command))
            finally:
                said(second)
        elif "evaluate" in line:
            # Inception's weights would come from the network, which is not there.
            assert "--inception-weights" in said(newcomer.types(command), status=1)
        else:
            said(newcomer.types(command))
        assert left is None or (folder / left).exists(), line
    assert "finished" in (folder / "train.log").read_text()


def test_the_lines_for_python_train_and_draw(tiny):
    [block] = re.findall(r"```python\n(import dcgan\n\ndcgan\.EPOCHS.*?)```", README, re.DOTALL)
    names = {}
    exec(block, names)
    assert names["faces"].shape == (16, 3, 32, 32)
    assert Path("output/samples/epoch_002.png").exists() and Path("output/generated.png").exists()
