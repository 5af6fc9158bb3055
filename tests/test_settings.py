"""Settings, flags and help: one definition, checked the same way wherever a value comes from."""

import os
import re
import tomllib
from contextlib import nullcontext
from math import inf, nan
from pathlib import Path

import pytest
from conftest import ROOT, SCRIPT, exit_status, one_line, refused

import dcgan

SOURCE = SCRIPT.read_text(encoding="utf-8")
WHOLE = "IMAGE_SIZE BATCH_SIZE MAX_IMAGES LATENT_SIZE G_FEATURES D_FEATURES EPOCHS SEED LOG_EVERY"
NUMBERS = "AUGMENT LEARNING_RATE D_LEARNING_RATE BETA1 BETA2 WEIGHT_DECAY REAL_LABEL R1_GAMMA"
PATHS = "DATA_DIR CACHE_DIR OUTPUT_DIR"
# Another value of each setting than its default
OTHER = dict.fromkeys(WHOLE.split(), 128) | dict.fromkeys(PATHS.split(), "/elsewhere")
OTHER |= dict.fromkeys([*NUMBERS.split(), "AVERAGE_SHARE", "CHECKPOINT_MINUTES"], 0.25)
OTHER |= {"ATTRIBUTES": "Bald", "DEVICE": "cuda:1", "PRECISION": "bfloat16", "MIRROR": False}
OTHER |= {"KAGGLE_DATASET": "some/where"}
WRONG = {
    "IMAGE_SIZE": [16, 48, 512],
    "BATCH_SIZE": [1, 65537],
    "EPOCHS": [0, (3, 4)],
    "BETA1": [1.0],
    "AVERAGE_SHARE": [0],
    "MIRROR": ["yes", 1],
    "PRECISION": ["float8"],
}
OPTIONAL = ["MAX_IMAGES", "AUGMENT", "ATTRIBUTES", "D_LEARNING_RATE", "DEVICE", "PRECISION"]


@pytest.fixture(autouse=True)
def nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine").touch()
    monkeypatch.setattr(dcgan, "fetch", lambda folder: pytest.fail("a wrong setting is accepted"))
    yield
    assert os.listdir(tmp_path) == ["mine"], "work is done before all is checked"


@pytest.fixture
def seen(monkeypatch):
    """A function: the settings with which a command line calls the function of its command."""
    calls = []
    for command, (_, *about) in dcgan.COMMANDS.items():
        spy = (lambda: calls.append(dcgan.setting_values()), *about)
        monkeypatch.setitem(dcgan.COMMANDS, command, spy)
    return lambda line: calls.pop() if exit_status(*line.split()) == 0 else None


@pytest.mark.parametrize("name", OTHER)
def test_a_wrong_value_is_one_line_with_the_name_and_what_it_may_be(capsys, name):
    values = ["", *WRONG.get(name, []), *[None] * (name not in OPTIONAL)]
    if type(OTHER[name]) in (int, float):
        values += [-0.1, 1e20, "many", nan, inf]
    for value in values:
        if name != "MIRROR":  # is one flag of two, without a value
            refused(capsys, f"{dcgan.flag(name)}={value}", words=[name, dcgan.RULES[name][-1]])
        setattr(dcgan, name, value)
        refused(capsys, words=[name, repr(value), dcgan.RULES[name][-1]])
        for function in (dcgan.train, dcgan.generate_images):
            with pytest.raises(dcgan.UserError, match=name):
                function()


@pytest.mark.parametrize(
    "line, word",
    [
        ("--imageSize 64", "--image-size?"),
        ("--epcohs=8", "--epochs?"),
        ("--no_mirror", "--no-mirror?"),
        ("--lr 0.001", "--learning-rate?"),
        ("--bs 32", "--batch-size?"),
        ("generate --ni 8", "--num-images?"),
        ("--gpu", "--help"),
        ("generate --num-image 8", "--num-images?"),
        ("generate --epochs 8", "--epochs"),
        ("trian", "trian"),
        ("--epochs", "--epochs"),
        ("--learning-rate -1", "LEARNING_RATE"),
        ("-x", "-x"),
        ("--data-dir faces --output-dir faces/run", "OUTPUT_DIR"),
        ("--kaggle-dataset some/where", "DATA_DIR"),  # is CelebA's
    ],
)
def test_a_wrong_call_is_one_line_that_says_what_may_be_meant(capsys, line, word):
    refused(capsys, *line.split(), words=[word])


def test_a_batch_that_the_processes_cannot_share_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(dcgan, "WORLD_SIZE", 2)
    refused(capsys, "--batch-size", 9, words=["BATCH_SIZE", 9, 2])


def test_a_value_may_be_written_in_several_ways():
    assert (dcgan.parsed("EPOCHS", "3"), dcgan.parsed("MAX_IMAGES", "None")) == (3, None)
    assert dcgan.parsed("ATTRIBUTES", ["Male", "Bald"]) == "Male,Bald"
    assert dcgan.parsed("DATA_DIR", Path("a/b")) == os.path.abspath("a/b")
    assert dcgan.parsed("DATA_DIR", "~/faces") == os.path.expanduser("~/faces")


@pytest.mark.parametrize("name", OTHER)
def test_every_flag_sets_its_constant_for_the_call(seen, name):
    given = "--no-mirror" if name == "MIRROR" else f"{dcgan.flag(name)} {OTHER[name]}"
    assert seen(given) == dcgan.setting_values() | {name: OTHER[name]}
    assert seen(f"train {given}") == seen(given)


def test_demo_changes_defaults_only(seen):
    demo = seen("--demo")
    assert demo == dcgan.setting_values() | seen(dcgan.DEMO) and demo["OUTPUT_DIR"] != "output"
    for line in ("--demo --epochs 3 --no-mirror", "train --no-mirror --epochs 3 --demo"):
        assert seen(line) == demo | {"EPOCHS": 3, "MIRROR": False}


@pytest.mark.parametrize(
    "error, status",
    [
        (dcgan.UserError("a word"), 2),
        (OSError("a word"), 1),
        (MemoryError(), 1),
        (KeyboardInterrupt(15), 143),
        (KeyboardInterrupt(), 130),
        (ZeroDivisionError("a bug"), None),
    ],
)
def test_main_ends_with_a_status(monkeypatch, capsys, error, status):
    def fail():
        assert dcgan.EPOCHS == 3
        raise error

    monkeypatch.setitem(dcgan.COMMANDS, "train", (fail, *dcgan.COMMANDS["train"][1:]))
    with nullcontext() if status else pytest.raises(ZeroDivisionError):
        assert exit_status("--epochs", 3) == status
    if status in (1, 2):
        assert re.search("error: [A-Za-z]", one_line(capsys.readouterr().err)), "it says nothing"


DRAWS = "seed checkpoint output-dir device precision "
HELP = {
    "train": " ".join(["demo no-mirror", *map(dcgan.flag, OTHER)]),
    "generate": DRAWS + "num-images output truncation attributes individual no-individual",
    "interpolate": DRAWS + "num-faces frames output attributes",
    "evaluate": DRAWS + "num-images data-dir max-images cache-dir",
    "download": "data-dir kaggle-dataset",
}


@pytest.mark.parametrize("command", HELP)
def test_help_names_exactly_the_flags_of_a_command_with_what_stands_in_the_file(capsys, command):
    vars(dcgan).update(OTHER)
    with pytest.raises(SystemExit):
        dcgan.main([command, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    names = {word.strip("-") for word in f"help {HELP[command]}".split()}
    assert set(re.findall(r"(?<!\S)\[?--([\w-]+)", text)) == names
    for name in dcgan.COMMANDS[command][2]:
        assert f"{dcgan.RULES[name][-1]} (default {OTHER[name]})" in text


def test_each_constant_is_a_setting_whose_default_is_allowed():
    section = SOURCE.partition("- settings\n")[2].partition("\n# -----")[0]
    constants = set(re.findall(r"^([A-Z]\w+) = ", section, re.MULTILINE))
    assert constants - {"CELEBA", "CELEBA_DIR", "WORLD_SIZE", "RANK"} == OTHER.keys()
    assert dcgan.setting_values().keys() == OTHER.keys()
    dcgan.check_settings()
    assert [name for name, value in dcgan.setting_values().items() if value is None] == OPTIONAL


def test_uv_installs_the_packages_in_requirements_txt():
    block = re.search(r"^# /// script\n(.*?)^# ///$", SOURCE, re.MULTILINE | re.DOTALL)[1]
    wanted = (ROOT / "requirements.txt").read_text().replace('"', "'").splitlines()
    found = tomllib.loads(re.sub("^# ?", "", block, flags=re.MULTILINE))["dependencies"]
    assert found == [line.partition("#")[0].strip() for line in wanted]
