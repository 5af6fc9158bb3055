"""Settings, flags and help: one definition, checked the same way wherever a value comes from."""

import contextlib
import io
import json
import math
import os
import re

import pytest
import torch
from conftest import SCRIPT, TINY, flags, one_line, refused, run
from reading import everything

import dcgan

SETTINGS = dcgan.SETTINGS
SOURCE = SCRIPT.read_text(encoding="utf-8")
OPTIONAL = [name for name, row in SETTINGS.items() if row.endswith(" or None")]


def allowed_for(name):
    """What a setting may be, as help and errors say it."""
    return SETTINGS[name].split("; ")[1]


def wrong(name):
    """Values that a setting must not take."""
    allowed = allowed_for(name).removesuffix(" or None")
    low, is_range, high = allowed.partition("..")
    if not is_range:
        texts = {"a path": [""], "names separated by commas": ["", ",", "Male,,Bald"]}
        return texts.get(allowed, ["float8", "33", ""])
    kind, step = (float, 1e-3) if "." in low else (int, 1)
    outside = [kind(low) - step, kind(high) + step, "many", "", math.nan, math.inf]
    return outside + [2.5] * (kind is int)


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
    for name, row in SETTINGS.items():
        meaning, allowed = row.split("; ")
        default = getattr(dcgan, name)
        shown = "" if default is None else f"; default {default}"
        assert f"{meaning} ({allowed}{shown})" in entries[name]
        kind = "PATH" if name.endswith("_DIR") else "N" if allowed[0].isdigit() else "NAME"
        kind = "[NAME]" if allowed == "True, False" else kind
        assert f"{dcgan.flag(name)} {kind} " in entries[name]


def test_help_fits_and_is_grouped(help_text):
    for text in help_text:
        assert max(map(len, text.splitlines())) <= 120
        assert text.startswith("usage: dcgan.py") and "Traceback" not in text
    groups = re.findall(r"^(\w+):\n", help_text[0], re.MULTILINE)
    assert groups[-6:] == ["data", "networks", "training", "reporting", "hardware", "places"]
    for command in ("generate", "interpolate", "evaluate", "--demo", "torchrun"):
        assert command in help_text[0]


def test_help_of_a_command_has_its_own_flags_in_its_own_words(help_text):
    for text, own in zip(help_text[1:], ("--individual", "--frames", "--max-images")):
        groups = re.findall(r"^(\w+):\n", text, re.MULTILINE)
        assert len(groups) == len(set(groups))
        for flag in (own, "--seed", "--checkpoint", "--output-dir", "--device"):
            assert re.search(r"[a-z]", entry(text, flag).partition(flag)[2]), f"{flag}: no words"
        assert "--learning-rate" not in text and "dict" not in text and "return" not in text
        assert "folder of the trained run" in entry(text, "--output-dir")
    assert "default 16)" in entry(help_text[1], "--num-images")
    assert "default 50000)" in entry(help_text[3], "--num-images")
    assert "default 0)" in entry(help_text[3], "--seed")
    assert "default" not in entry(help_text[1], "--seed")
    assert "compare" in entry(help_text[3], "--max-images")


# ------------------------------------------------------------------------------------- right values


def test_each_constant_has_a_row_in_the_table_that_holds_its_default():
    section = SOURCE.partition("- settings\n")[2].partition("\n# -----")[0]
    constants = set(re.findall(r"^([A-Z]\w+) = ", section, re.MULTILINE))
    assert constants - {"CELEBA", "CELEBA_DIR", "WORLD_SIZE", "RANK"} == set(SETTINGS)
    assert set(dcgan.DEMO) <= set(SETTINGS)
    for name in SETTINGS:
        default = getattr(dcgan, name)
        checked = dcgan.checked(name, default)
        default = os.path.abspath(default) if name.endswith("_DIR") else default
        assert checked == default and type(checked) is type(default)
        assert (default is None) == (name in OPTIONAL)


def test_every_flag_sets_its_constant_for_the_run_and_main_puts_it_back(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    given = TINY | {"DATA_DIR": "faces", "CACHE_DIR": "c", "OUTPUT_DIR": "o", "MAX_IMAGES": 39}
    given |= {"KAGGLE_DATASET": "some/where", "EPOCHS": 1, "LOG_EVERY": 3, "SEED": 7}
    given |= {"LEARNING_RATE": 1e-3, "D_LEARNING_RATE": 2e-4, "BETA1": 0.4, "BETA2": 0.99}
    given |= {"WEIGHT_DECAY": 0.02, "REAL_LABEL": 0.9, "R1_GAMMA": 0.02, "AVERAGE_SHARE": 0.2}
    given |= {"CHECKPOINT_MINUTES": 0.5, "SKIP_BROKEN": True, "MIRROR": False, "AUGMENT": 0.5}
    given |= {"ATTRIBUTES": "Bald"}
    rows = ["image_id,Bald", *(f"{index:06d}.jpg,1" for index in range(40))]
    (workplace / "list_attr_celeba.csv").write_text("\n".join(rows))
    assert given.keys() == SETTINGS.keys()
    before = dcgan.setting_values()
    assert not [name for name in given.keys() - TINY.keys() if given[name] == before[name]]
    assert dcgan.main(flags(**given)) == 0
    assert dcgan.setting_values() == before
    given |= {
        name: str(workplace / given[name]) for name in ("DATA_DIR", "CACHE_DIR", "OUTPUT_DIR")
    }
    assert torch.load("o/checkpoint.pt", weights_only=True)["settings"] == given
    assert dcgan.main(["--epochs", "0"]) == dcgan.main(["generate", "--output-dir", "nowhere"]) == 2
    assert dcgan.setting_values() == before


def test_flags_given_win_over_the_demos(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    given = flags(DATA_DIR="faces", EPOCHS=1, MAX_IMAGES=8)
    assert dcgan.main([*given, "--demo"]) == 0
    settings = torch.load("output-demo/checkpoint.pt", weights_only=True)["settings"]
    wanted = {"EPOCHS": 1, "G_FEATURES": 4, "DATA_DIR": str(workplace / "faces")}
    assert wanted.items() <= settings.items()
    assert not os.path.exists("output") and not os.path.exists("data/demo")
    assert dcgan.main(["--demo", "--device", "cpu", "generate", "--num-images", "1"]) == 0
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
        ("DATA_DIR", dcgan.Path("a/b"), os.path.abspath("a/b")),
        ("DATA_DIR", "~/faces", os.path.expanduser("~/faces")),
        ("SKIP_BROKEN", "True", True),
        ("SKIP_BROKEN", False, False),
        ("DEVICE", "xpu", "xpu"),
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
        assert f"it must be {allowed_for(name)}" in line
        with monkeypatch.context() as patch:
            patch.setattr(dcgan, name, value)
            assert name in refused(capsys)
            with pytest.raises(ValueError, match=name):
                dcgan.train()
            with pytest.raises(ValueError, match=name):
                dcgan.generate_images()
    others = [] if name in ("SKIP_BROKEN", "MIRROR") else [True]
    for value in (*others, [1], *([] if name in OPTIONAL else [None])):
        with monkeypatch.context() as patch:
            patch.setattr(dcgan, name, value)
            assert name in refused(capsys)
    assert everything() == before


def test_a_wrong_value_written_into_the_file_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("EPOCHS", "BETA1", "WORKERS", "PRECISION", "DATA_DIR", "KAGGLE_DATASET"):
        for value in wrong(name)[:2]:
            line = rf"^{name} = .*"
            text, count = re.subn(line, f"{name} = {value!r}", SOURCE, flags=re.MULTILINE)
            assert count == 1
            edited = {"__name__": "edited"}
            exec(text, edited)
            assert edited["main"]([]) == 2
            one_line(capsys.readouterr().err, name, f"it must be {allowed_for(name)}")
    assert everything() == {}


@pytest.mark.parametrize(
    "line, says",
    [
        ("--bach-size 8", "no flag --bach-size; did you mean --batch-size"),
        ("--epcohs=8", "no flag --epcohs; did you mean --epochs"),
        ("--epochs 8 --output_dir x", "--output_dir"),
        ("generate --num-image 8", "--num-image"),
        ("interpolate --num-frames 8", "--num-frames"),
        ("--xyzzy", "no flag --xyzzy; --help"),
        ("generate --epochs 8", "--epochs"),
        ("--seed 5 generate", "--seed has no effect here; add --help to see what has"),
        (
            "--epochs=5 --output-dir x evaluate",
            "--epochs has no effect here; add --help",
        ),
        ("--epochs", "--epochs"),
        ("trian", "trian"),
        ("generate stray", "stray"),
        ("-x", "-x"),
        ("--device cuda:99 --data-dir faces --batch-size 8 --image-size 32", "cuda:99"),
    ],
)
def test_a_wrong_call_ends_in_one_line(workplace, monkeypatch, capsys, line, says):
    monkeypatch.chdir(workplace)
    assert says in refused(capsys, *line.split())


def test_the_script_itself_refuses_in_one_line_with_status_2_and_touches_nothing(workplace):
    before = everything(workplace)
    done = run("--batch-size", "1", cwd=workplace)
    assert done.returncode == 2 and done.stdout == "" and everything(workplace) == before
    says = r"dcgan\.py: error: BATCH_SIZE .*'1'.* 2\.\.65536 \(whole numbers\)\n"
    assert re.fullmatch(says, done.stderr)


# ------------------------------------------------------------- errors, and what no user can fix


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
untouched = state() == before and not {"kaggle", "matplotlib", "IPython"} & set(sys.modules)
try:
    dcgan.main(["--help"])
except SystemExit:
    pass
took = time.perf_counter() - began
untouched = untouched and state() == before and not {"kaggle", "matplotlib"} & set(sys.modules)
print(json.dumps([untouched, took]), file=sys.stderr)
"""


def test_import_has_no_side_effect_and_help_is_quick(tmp_path):
    for _ in range(3):  # a busy machine gets more than one try
        done = run(cwd=tmp_path, program=["-B", "-c", IMPORT])
        assert done.stdout.startswith("usage: dcgan.py")
        untouched, took = json.loads(done.stderr)
        assert untouched and everything(tmp_path) == {}
        if took < 0.5:
            return
    pytest.fail(f"--help takes {took} s")
