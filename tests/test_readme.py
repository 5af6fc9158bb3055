"""README's commands, settings and pictures are dcgan.py's, which is as short as it promises."""

import ast
import graphlib
import io
import re
import shlex
import subprocess
import sys
import tokenize
import tomllib
from collections import Counter
from importlib.metadata import requires
from pathlib import Path

import pytest
import torch.distributed.run
from conftest import ROOT, SCRIPT, dcgan, draw_faces, exit_status, flags

README = (ROOT / "README.md").read_text(encoding="utf-8")
SOURCE = SCRIPT.read_text(encoding="utf-8")
TREE = ast.parse(SOURCE)
LINES = re.findall(r"^(?: {4}|srun )(\S.*dcgan\.py.*)$", README, re.MULTILINE)


def fetch(folder):
    """Images that are not downloaded, and their attributes."""
    names = [path.name for path in draw_faces(folder, 16).iterdir()]
    rows = ["image_id,Male,Smiling,Eyeglasses", *(f"{name},1,0,1" for name in names)]
    (folder / "list_attr_celeba.csv").write_text("\n".join(rows))


def test_the_commands_in_turn_do_what_is_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, value in {"DISTANCE_IMAGES": 16, "draw_demo": fetch, "fetch": fetch}.items():
        monkeypatch.setattr(dcgan, name, value)
    for folder in ("photos", "animals/cat", "animals/dog"):
        draw_faces(tmp_path / folder, 16)
    quick = {"generate": [], "download": [], "evaluate": [], "interpolate": ["--frames", 1]}
    for line in LINES:
        words = line.partition("dcgan.py")[2].replace("50000", "50")
        words = shlex.split(re.split("[>&]", words)[0], comments=True)
        status = exit_status(*words, *quick.get((words or [""])[0], flags(EPOCHS=1)))
        assert status == (2 if "evaluate" in line else 0), line  # too few images to measure
        left = re.findall(r"(?:--output-dir |# (?=output))([\w./-]+)", line)
        assert all(Path(path).exists() for path in left), line
        if "torchrun" in line:
            torch.distributed.run.get_args_parser().parse_args(shlex.split(line)[1:])


@pytest.mark.parametrize("words", ["nohup", "torchrun --nproc-per-node 2 dcgan"])
def test_a_line_typed_in_a_shell_trains(workplace, words):
    [line] = [line for line in LINES if words in line]
    (workplace / ".venv").symlink_to(sys.prefix)
    (workplace / "dcgan.py").symlink_to(SCRIPT)
    tiny = shlex.join(flags(EPOCHS=1, DATA_DIR="faces"))
    shell = ["sh", "-c", re.sub("dcgan.py[^>&]*", f"dcgan.py {tiny} ", line) + "\nwait"]
    done = subprocess.run(shell, capture_output=True, text=True)
    said = done.stdout if words != "nohup" else Path("train.log").read_text()
    assert "finished" in said and Path("output/generator.pt").exists(), said + done.stderr


def test_the_lines_for_python_train_and_draw(tiny, monkeypatch):
    monkeypatch.setattr(tiny, "DISTANCE_IMAGES", 16)
    train, draw = re.findall(r"```python\n([^`]*dcgan\n\n[^`]*)```", README)
    for block in (train, draw):
        exec(block, names := {})
        assert names["faces"].shape == (16, 3, 32, 32)


def test_what_is_named_exists():
    pictures = re.findall(r"!\[.+?\]\((\S+)\)", README)  # with a description
    assert len(pictures) == README.count(".github/") > 5
    others = re.findall(r"(?:-r |(?=tests/\w+\.py))([\w./]+)", README)
    assert [path for path in pictures + others if not (ROOT / path).exists()] == []
    named = {*re.findall("`([A-Z][A-Z0-9_]{3,}|--[a-z0-9-]+)", README)}
    known = {*dcgan.RULES, *map(dcgan.flag, dcgan.RULES), "--demo", "--no-mirror"}
    assert len(named) > 20 and named - known <= {"KAGGLE_API_TOKEN", "--node-rank"}
    values = re.findall(r"\(`([A-Z0-9_]+)` ([\d.]+)\)", README)  # defaults
    values += [("BATCH_SIZE", size) for size in re.findall(r"default batch size of (\d+)", README)]
    assert len(values) > 3 and values == [(name, f"{getattr(dcgan, name):g}") for name, _ in values]


def test_what_is_installed_is_what_is_imported():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    wanted = [line.partition("#")[0].strip().replace('"', "'") for line in lines]
    script = re.sub("(?m)^# ?", "", re.split("(?m)^# ///.*\n", SOURCE)[1])
    assert tomllib.loads(script)["dependencies"] == wanted
    packages = " ".join([*wanted, *requires("torch"), *requires("torchvision")])
    names = {*re.findall(r"(?m)^    (?:from|import) (\w+)", SOURCE.partition("\nexcept ")[0])}
    assert "torch" in names and {name for name in names if name not in packages} == {"PIL"}


def test_the_map_names_all_sections_and_no_two_need_each_other():
    lines = enumerate(SOURCE.splitlines(), 1)
    banners = {number: line.split("- ")[1] for number, line in lines if line.startswith("# ---")}
    titles = [banner.partition(":")[0] for banner in banners.values()]
    chart = ast.get_docstring(TREE).partition("in order")[2]
    assert re.findall(r"(?m)^    (\S.*?)  +", chart) == titles
    home, used = {}, {title: set() for title in titles}
    for node in TREE.body:
        title = titles[sum(start < node.lineno for start in banners) - 1]
        for target in getattr(node, "targets", [node]):
            home[getattr(target, "id", getattr(target, "name", None))] = title
        used[title] |= {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}
    needs = {title: {home.get(name, title) for name in used[title]} - {title} for title in titles}
    graphlib.TopologicalSorter(needs).prepare()  # raises CycleError


def test_the_file_is_as_short_as_promised():
    functions = [node for node in ast.walk(TREE) if isinstance(node, ast.FunctionDef)]
    assert [node.name for node in functions if node.end_lineno - node.lineno > 43] == []
    tokens = tokenize.generate_tokens(io.StringIO(SOURCE).readline)
    tokens = [token for token in tokens if not token.line.lstrip().startswith('"""')]  # docstrings
    layout = "COMMENT NL NEWLINE INDENT DEDENT ENDMARKER".split()
    code = [token for token in tokens if tokenize.tok_name[token.type] not in layout]
    counts = Counter(token.start[0] for token in code)
    assert "under 1,900 lines" in README and SOURCE.count("\n") < 1_900 and len(code) < 12_000
    assert sum(count > 25 for count in counts.values()) <= 0.015 * len(counts)
