"""The README's commands, settings, files and pictures are the program's."""

import re
import shlex

import pytest
from conftest import ROOT, dcgan

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"(?:python|nproc-per-node 2) dcgan\.py([^`\n]*)", README.replace(" --help", ""))


@pytest.mark.parametrize("arguments", sorted(set(COMMANDS)))
def test_a_command_is_understood(arguments):
    parser, known = dcgan.command_line()
    words = shlex.split(arguments, comments=True)
    assert {word for word in words if word.startswith("--")} <= known
    options = vars(parser.parse_args(words))
    for name, setting in dcgan.SETTINGS.items():
        setting.check(name, options.get(name, getattr(dcgan, name)))


def test_flags_and_constants_that_are_named_exist():
    _, known = dcgan.command_line()
    flags = set(re.findall(r"`(--[a-z-]+)", README)) - {"--nnodes", "--rdzv-endpoint"}
    assert len(flags) > 5 and flags <= known
    constants = set(re.findall(r"`([A-Z][A-Z0-9_]{3,})`", README))
    assert len(constants) > 5 and constants <= set(dcgan.SETTINGS)


def test_defaults_in_the_table_are_the_constants():
    table = dict(re.findall(r"^\| `([A-Z_]+)` \| ([\d]+) ", README, re.MULTILINE))
    assert len(table) >= 3 and all(getattr(dcgan, name) == int(value) for name, value in table.items())


def test_pictures_and_requirements_are_there():
    paths = re.findall(r"\]\((\.github/[^)]+)\)", README) + re.findall(r"-r (\S+)", README) + ["tests/fuzz.py"]
    assert len(paths) > 5 and all((ROOT / path).is_file() for path in paths)
