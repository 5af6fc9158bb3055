"""The README's commands, settings, files and pictures are the program's."""

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest
from conftest import ROOT, RUN_FILES, SCRIPT, dcgan, draw_faces, flags, free_port
from kaggle_server import serving

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"(?:python|nproc-per-node 2) dcgan\.py([^`\n>]*)", README)


def test_each_command_is_understood():
    for arguments in COMMANDS:
        words = shlex.split(arguments.replace("--help", ""), comments=True)
        _, _, options = dcgan.parse_words(words)
        for name in options:
            dcgan.checked(name, options[name])


def test_flags_and_constants_that_are_named_exist():
    names = [*dcgan.SETTINGS, *dcgan.ARGUMENTS, "demo", "individual", "help", "version"]
    known = {dcgan.flag(name) for name in names}
    named = set(re.findall(r"`(--[a-z0-9-]+)", README)) - {"--nnodes", "--node-rank", "--signal"}
    assert len(named) > 5 and named <= known
    constants = set(re.findall(r"`([A-Z][A-Z0-9_]{3,})`", README))
    assert len(constants) > 5 and constants <= set(dcgan.SETTINGS)


def test_defaults_in_the_table_are_the_constants():
    table = dict(re.findall(r"^\| `([A-Z_]+)` \| ([\d]+) ", README, re.MULTILINE))
    assert len(table) >= 3
    assert table == {name: str(getattr(dcgan, name)) for name in table}


def test_pictures_and_requirements_are_there():
    paths = re.findall(r"\]\((\.github/[^)]+)\)|-r (\S+)|`(tests/\w+\.py)`", README)
    assert len(paths) > 5 and all((ROOT / "".join(path)).is_file() for path in paths)


def test_what_it_writes_is_what_a_run_leaves_in_its_folders():
    section = README.partition("## What it writes")[2].partition("\n## ")[0]
    named = set(re.findall(r"`([\w./]+\.\w+)`", section))
    left = RUN_FILES - {".lock", "samples/epoch_002.png"}
    assert named == left | {"checkpoint.previous.pt", "broken_images.txt"}
    assert f"`{dcgan.CACHE_DIR}/`" in section


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
    "--attributes Male": "output-attributes/attributes.png",
    "generate --output-dir output-attributes": "output-attributes/generated.png",
    "--attributes folders": "output-animals/attributes.png",
    "generate --output-dir output-animals": "output-animals/generated.png",
    "nohup": "train.log",
    "download": "../home/celeba/images",
    "torchrun --nproc-per-node 2 dcgan.py": "output/generator.pt",
    "--nnodes 2": "output/generator.pt",
    "evaluate": None,
}
TEST_COMMAND = "-m pytest"  # the one that runs this test
SHORT = shlex.join(flags(EPOCHS=1, MAX_IMAGES=40))


# The lines of the README that are for the shell of a Unix.
LINES = re.findall(r"^    (.*\.venv/bin/.*)$", README, re.MULTILINE)
LINES = [line for line in LINES if TEST_COMMAND not in line]


def shortened(line):
    """The same command, with flags that make a training short."""
    if re.search("generate|interpolate|evaluate|download", line):
        return line.replace("50000", "50")
    return re.sub(r"(dcgan\.py[^>&#]*)", rf"\1 {SHORT} ", line)


class Newcomer:
    """Somebody with a folder in which there is nothing but two files of the project."""

    def __init__(self, folder, server):
        self.folder = folder
        for name in ("dcgan.py", "requirements.txt"):
            shutil.copy(ROOT / name, folder)
        draw_faces(server.home / "photos", 40)
        for kind in ("cat", "dog"):
            draw_faces(server.home / "animals" / kind, 20)
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


@pytest.fixture(scope="module")
def newcomer(archive, tmp_path_factory):
    place = tmp_path_factory.mktemp("newcomer")
    with serving(archive) as server:
        server.home = place / "home"
        (place / "work").mkdir()
        yield Newcomer(place / "work", server)


def test_the_shell_commands_are_the_ones_that_are_tried():
    assert all(words in line for words, line in zip(LEAVES, LINES, strict=True))


@pytest.mark.skipif(os.name == "nt", reason="a Unix shell")
@pytest.mark.parametrize("words, left", LEAVES.items())
def test_a_command_does_in_a_shell_what_is_said_of_it(newcomer, words, left):
    """In the order of the README: each finds what the ones before have left."""
    [line] = [line for wanted, line in zip(LEAVES, LINES) if wanted == words]
    folder, command = newcomer.folder, shortened(line)
    if "nohup" in line or "torchrun" in line:
        shutil.rmtree(folder / "output", ignore_errors=True)
    if "torchrun" in line:  # pip did not install it, since it was there
        shutil.copy(Path(sysconfig.get_path("scripts"), "torchrun"), folder / ".venv/bin")
    if left:
        (folder / left).unlink(missing_ok=True)
    if "--nnodes" in line:
        command = command.replace("29500", str(free_port())).replace("FIRST_MACHINE", "127.0.0.1")
        other = command.replace("dcgan.py", "dcgan.py --output-dir second", 1)
        second = newcomer.types(other.replace("--node-rank 0", "--node-rank 1"))
        try:
            assert "finished" in said(newcomer.types(command))
        finally:
            said(second)
    elif "evaluate" in line:
        # There are too few images here to measure anything.
        assert "2,048 or more" in said(newcomer.types(command), status=2)
    else:
        said(newcomer.types(command))
    assert left is None or (folder / left).exists()
    assert "nohup" not in line or "finished" in (folder / left).read_text()


def test_what_uv_installs_is_what_pip_installs():
    block = re.search(r"^# /// script\n(.*?)^# ///$", SCRIPT.read_text(), re.DOTALL | re.MULTILINE)
    script = tomllib.loads(re.sub(r"^# ?", "", block[1], flags=re.MULTILINE))
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    wanted = [line.partition("#")[0].strip().replace('"', "'") for line in lines]
    assert script["dependencies"] == wanted
    [index] = script["tool"]["uv"]["index"]
    assert f"--index-url {index['url']}\n" in README and index["explicit"]
    sources = script["tool"]["uv"]["sources"]
    windows = {"index": index["name"], "marker": "sys_platform == 'win32'"}
    assert sources == {"torch": windows, "torchvision": windows}


def test_the_lines_for_python_train_and_draw(tiny):
    [block] = re.findall(r"```python\n(import dcgan\n\ndcgan\.EPOCHS.*?)```", README, re.DOTALL)
    names = {}
    exec(block, names)
    assert names["faces"].shape == (16, 3, 32, 32)
    assert Path("output/samples/epoch_002.png").exists() and Path("output/generated.png").exists()
