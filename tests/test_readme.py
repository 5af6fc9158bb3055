"""The README's commands, settings, files and pictures are the program's."""

import re
import shlex

import pytest
from conftest import ROOT, dcgan, flags, run

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
    named = set(re.findall(r"`(--[a-z-]+)", README)) - {"--nnodes", "--node-rank", "--signal"}
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
