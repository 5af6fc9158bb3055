"""Settings, flags and help: one definition, checked the same way wherever a value comes from."""

import ast
import contextlib
import importlib.util
import io
import json
import math
import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, SCRIPT, TINY, everything, flags, one_line, refused, run

import dcgan

SETTINGS = dcgan.SETTINGS


def numbers(text):
    """The numbers in a text, as in "1 to 65,536" or "up to 9.22e+18"."""
    return [
        float(found.replace(",", "").rstrip("."))
        for found in re.findall(r"-?\d[\d,.]*(?:e[+-]?\d+)?", text)
    ]


def names_range(text, setting):
    """Whether a text gives all that a setting may hold."""
    if not isinstance(setting, dcgan.Number):
        return setting.form in text
    ends = numbers(setting.allowed())
    assert len(ends) >= 2
    return all(any(math.isclose(end, number) for number in numbers(text)) for end in ends)


def wrong(name):
    """Values that a setting must not take."""
    setting = SETTINGS[name]
    if not isinstance(setting, dcgan.Number):
        return [""] if setting.form == "a path" else ["float8", ""]
    step = 1 if setting.kind is int else 1e-3
    outside = [setting.low - step, setting.high + step, "many", math.nan, math.inf]
    return outside + [2.5] * (setting.kind is int) + [33] * (name == "IMAGE_SIZE")


@pytest.fixture(scope="module")
def help_text():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "100")
        patch.delenv("NO_COLOR", raising=False)
        done = []
        for command in ((), ("generate",), ("interpolate",), ("evaluate",)):
            out = io.StringIO()
            with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
                dcgan.main([*command, "--help"])
            done.append(out.getvalue())
    return done


def entry(text, flag):
    """What a help text says of a flag, on one line."""
    found = re.search(rf"^  {flag}\b.*\n(?:    .*\n)*", text, re.MULTILINE)
    assert found, f"{flag} is missing"
    return re.sub(r"\s+", " ", found[0])


# --------------------------------------------------------------------------------------------- help


def test_help_gives_meaning_default_and_range_of_every_setting(help_text):
    entries = {name: entry(help_text[0], dcgan.flag(name)) for name in SETTINGS}
    assert [name for name, text in entries.items() if len(text.split()) < 5] == []
    given = {name: getattr(dcgan, name) for name in SETTINGS if getattr(dcgan, name) is not None}
    missing = [
        n
        for n, value in given.items()
        if str(value) not in entries[n] and value not in numbers(entries[n])
    ]
    assert missing == []
    assert [name for name, text in entries.items() if not names_range(text, SETTINGS[name])] == []


def test_help_fits_and_is_grouped(help_text):
    for text in help_text:
        assert max(map(len, text.splitlines())) <= 120
        assert text.startswith("usage: dcgan.py") and "Traceback" not in text
    groups = re.findall(r"^(\w+):\n", help_text[0], re.MULTILINE)
    assert [
        name
        for name in groups
        if name in ("data", "networks", "training", "reporting", "hardware", "places")
    ] == [
        "data",
        "networks",
        "training",
        "reporting",
        "hardware",
        "places",
    ]
    assert (
        help_text[0].index("training:")
        < help_text[0].index("--beta1")
        < help_text[0].index("reporting:")
    )
    for command in ("generate", "interpolate", "evaluate", "--demo", "torchrun"):
        assert command in help_text[0]
    for text, own in zip(help_text[1:], ("--individual", "--frames", "--inception-weights")):
        for flag in (own, "--seed", "--checkpoint", "--output-dir", "--device"):
            assert re.search(r"[a-z\[]", entry(text, flag).partition(flag)[2]), (
                f"{flag} is not explained"
            )
    for text in help_text[1:3]:
        assert "--learning-rate" not in text and entry(text, "--output ")
    assert numbers(entry(help_text[1], "--num-images"))[-1] == 16 and 50_000 in numbers(
        entry(help_text[3], "--num-images")
    )


# ------------------------------------------------------------------------------------- right values


def constants_in_the_file():
    """The constants of the settings section, in order."""
    source = SCRIPT.read_text(encoding="utf-8")
    section = source.index("- settings\n"), source.index("- networks\n")
    assigned = {}
    for node in ast.parse(source).body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            assigned[target.id] = source.index(f"\n{target.id}")
    return [name for name, place in assigned.items() if section[0] < place < section[1]]


def test_each_constant_has_a_row_in_the_table_that_holds_its_default():
    assert set(constants_in_the_file()) - {"CELEBA_DIR"} == set(SETTINGS)
    assert set(dcgan.DEMO) <= set(SETTINGS)
    for name, setting in SETTINGS.items():
        default = getattr(dcgan, name)
        checked = dcgan.checked(name, default)
        assert checked == default and type(checked) is type(default)
        assert (default is None) == setting.optional


def test_every_flag_sets_its_constant_for_the_run_and_main_puts_it_back(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    given = TINY | {
        "DATA_DIR": "faces",
        "CACHE_DIR": "c",
        "OUTPUT_DIR": "o",
        "KAGGLE_DATASET": "some/where",
        "MAX_IMAGES": 39,
        "EPOCHS": 1,
        "LEARNING_RATE": 1e-3,
        "D_LEARNING_RATE": 2e-4,
        "BETA1": 0.4,
        "BETA2": 0.99,
        "WEIGHT_DECAY": 0.02,
        "REAL_LABEL": 0.9,
        "R1_GAMMA": 0.02,
        "AVERAGE_SHARE": 0.1,
        "SEED": 7,
        "LOG_EVERY": 3,
        "CHECKPOINT_MINUTES": 0.5,
    }
    assert given.keys() == SETTINGS.keys()
    before = {name: getattr(dcgan, name) for name in SETTINGS}
    assert dcgan.main(flags(**given)) == 0
    assert {name: getattr(dcgan, name) for name in SETTINGS} == before
    assert torch.load("o/checkpoint.pt", weights_only=True)["settings"] == given
    assert dcgan.main(["--epochs", "0"]) == dcgan.main(["generate", "--output-dir", "nowhere"]) == 2
    assert {name: getattr(dcgan, name) for name in SETTINGS} == before


def test_flags_given_win_over_the_demos(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    given = flags(DATA_DIR="faces", EPOCHS=1, MAX_IMAGES=8)
    assert dcgan.main([*given, "--demo"]) == 0
    settings = torch.load("output-demo/checkpoint.pt", weights_only=True)["settings"]
    assert (
        settings["EPOCHS"] == 1 and settings["G_FEATURES"] == 4 and settings["DATA_DIR"] == "faces"
    )
    assert (
        settings["OUTPUT_DIR"] == "output-demo"
        and not os.path.exists("output")
        and not os.path.exists("data/demo")
    )
    assert dcgan.main(["--demo", "generate", "--num-images", "1", "--device", "cpu"]) == 0
    assert os.path.exists("output-demo/generated.png")


@pytest.mark.parametrize(
    "name, value, meant",
    [
        ("EPOCHS", "3", 3),
        ("EPOCHS", 3.0, 3),
        ("LEARNING_RATE", "1e-3", 1e-3),
        ("LEARNING_RATE", 1, 1.0),
        ("MAX_IMAGES", "None", None),
        ("D_LEARNING_RATE", None, None),
        ("DEVICE", "cuda:1", "cuda:1"),
        ("DATA_DIR", dcgan.Path("a/b"), "a/b"),
        ("IMAGE_SIZE", "128", 128),
        ("PRECISION", "none", None),
    ],
)
def test_a_value_may_be_written_in_several_ways(name, value, meant):
    checked = dcgan.checked(name, value)
    assert checked == meant and type(checked) is type(meant)


# ------------------------------------------------------------------------------------- wrong values


@pytest.mark.parametrize("name", SETTINGS)
def test_a_wrong_value_is_refused_as_flag_and_as_assignment(workplace, monkeypatch, capsys, name):
    monkeypatch.chdir(workplace)
    before = everything()
    for value in wrong(name):
        line = refused(capsys, f"{dcgan.flag(name)}={value}")
        assert name in line and dcgan.flag(name) in line and repr(str(value)) in line
        assert names_range(line, SETTINGS[name]) and ("None" in line) >= SETTINGS[name].optional
        with monkeypatch.context() as patch:
            patch.setattr(dcgan, name, value)
            assert name in refused(capsys)
            with pytest.raises(ValueError, match=name):
                dcgan.train()
            with pytest.raises(ValueError, match=name):
                dcgan.generate_images()
    for value in (True, [1], *([] if SETTINGS[name].optional else [None])):
        with monkeypatch.context() as patch:
            patch.setattr(dcgan, name, value)
            assert name in refused(capsys)
    assert everything() == before


@pytest.mark.parametrize("name", SETTINGS)
def test_a_wrong_value_written_into_the_file_is_refused(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    source = SCRIPT.read_text(encoding="utf-8")
    for node in ast.parse(source).body:
        target = getattr(node, "target", None) or getattr(node, "targets", [None])[0]
        if getattr(target, "id", None) == name:
            statement = ast.get_source_segment(source, node)
            break
    for value in wrong(name)[:2]:
        text = source.replace(f"\n{statement}", f"\n{name} = {value!r}", 1)
        assert text != source
        (tmp_path / "edited.py").write_text(text, encoding="utf-8")
        spec = importlib.util.spec_from_file_location(f"edited_{name}", tmp_path / "edited.py")
        edited = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, edited)
        spec.loader.exec_module(edited)
        capsys.readouterr()
        before = everything()
        assert edited.main([]) == 2
        out, line = capsys.readouterr()
        assert (
            out == ""
            and line.count("\n") == 1
            and name in line
            and names_range(line, SETTINGS[name])
        )
        assert everything() == before


@pytest.mark.parametrize(
    "arguments, says",
    [
        (("--bach-size", "8"), "--bach-size"),
        (("--epcohs=8",), "--epcohs"),
        (("--epochs", "8", "--output_dir", "x"), "--output_dir"),
        (("generate", "--num-image", "8"), "--num-image"),
        (("interpolate", "--num-frames", "8"), "--num-frames"),
        (("--xyzzy",), "--xyzzy"),
        (("generate", "--epochs", "8"), "--epochs"),
        (("--epochs",), "--epochs"),
        (("trian",), "trian"),
        (("generate", "stray"), "stray"),
        (("-x",), "-x"),
        (("--batch-size", "eight"), "'eight'.* 2 "),
        (("--batch-size", "8.5"), r"'8\.5'"),
        (("--learning-rate", "fast"), "'fast'"),
        (("--epochs", ""), "EPOCHS"),
        (("--device", "tpu"), "DEVICE.*'tpu'"),
        (
            (
                "--device",
                "cuda:99",
                "--data-dir",
                "faces",
                "--batch-size",
                "8",
                "--image-size",
                "32",
            ),
            "cuda:99",
        ),
    ],
)
def test_a_wrong_call_ends_in_one_line(workplace, monkeypatch, capsys, arguments, says):
    monkeypatch.chdir(workplace)
    line = refused(capsys, *arguments)
    assert re.search(says, line)


def test_the_script_itself_refuses_in_one_line_with_status_2_and_touches_nothing(workplace):
    before = everything(workplace)
    done = run("--batch-size", "1", cwd=workplace)
    assert done.returncode == 2 and done.stdout == "" and everything(workplace) == before
    assert re.fullmatch(r"dcgan\.py: error: BATCH_SIZE .*'1'.* 2 to 65,536\n", done.stderr)


# ------------------------------------------------------------- errors, and what no user can mend


def test_an_error_of_an_edited_training_step_keeps_its_traceback(tiny, monkeypatch):
    errors = (
        ValueError("shapes differ"),
        OSError("a file"),
        ImportError("a module"),
        NotImplementedError("to be written"),
        NotImplementedError("\"leaky_relu_cpu\" not implemented for 'Byte'"),
        RuntimeError("derivative for aten::_scaled_dot_product_backward is not implemented"),
        NotImplementedError("FileSystem does not appear to support flock"),  # filelock's
    )
    for error in errors:

        def step(trainer, *batch, error=error):
            raise error

        monkeypatch.setattr(tiny.Trainer, "step", step)
        with pytest.raises(type(error), match=str(error)):
            tiny.main([])


@pytest.mark.parametrize(
    "error, told",
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 2000000 bytes"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 9.05 GB)"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("unsupported memory format"), False),
    ],
)
def test_only_a_full_memory_is_called_one(tiny, monkeypatch, capsys, error, told):
    def step(trainer, *batch):
        raise error

    monkeypatch.setattr(tiny.Trainer, "step", step)
    if not told:
        with pytest.raises(RuntimeError, match="memory"):
            tiny.main([])
        return
    assert tiny.main([]) == 1
    one_line(capsys.readouterr().err, "error: out of memory", "BATCH_SIZE")


# ------------------------------------------------------------------------------------------- import

IMPORT = """
import json, os, signal, sys, time, warnings
sys.path.insert(0, {root!r})
import torch, torchvision
import PIL
torch.manual_seed(5)

def state():
    handlers = [str(signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    settings = (torch.backends.cudnn.benchmark, torch.get_float32_matmul_precision())
    more = (torch.get_num_threads(), torch.get_rng_state().sum(), os.listdir("."))
    return repr((handlers, settings, dict(os.environ), warnings.filters, more))

before = state()
began = time.perf_counter()
import dcgan
imported = time.perf_counter() - began
same, modules = state() == before, set(sys.modules)
try:
    dcgan.main(["--help"])
except SystemExit:
    pass
took = time.perf_counter() - began
heavy = {{"kaggle", "matplotlib", "IPython"}}
print(json.dumps([same and state() == before, imported, took, sorted(modules & heavy),
                  sorted(set(sys.modules) & {{"kaggle", "matplotlib"}})]), file=sys.stderr)
"""


def test_import_has_no_side_effect_and_help_is_quick(tmp_path):
    seconds = []
    while len(seconds) < 3:  # a busy machine gets more than one try
        done = subprocess.run(
            [sys.executable, "-B", "-c", IMPORT.format(root=str(ROOT))],
            cwd=tmp_path,
            text=True,
            capture_output=True,
            check=True,
            timeout=300,
        )
        untouched, _, took, at_import, at_help = json.loads(done.stderr)
        assert untouched and at_import == at_help == [] and list(tmp_path.iterdir()) == []
        assert done.stdout.startswith("usage: dcgan.py")
        seconds.append(took)
        if took < 0.5:
            break
    assert min(seconds) < 0.5
