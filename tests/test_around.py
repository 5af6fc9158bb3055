"""What is around a run: devices, cores, streams, ways to start the script, its import."""

import io
import os
import re
import runpy
import sys

import pytest
import torch
from conftest import SCRIPT, one_line, refused, succeed

import dcgan


@pytest.mark.parametrize(
    "wanted, best, picked, card",
    [
        (None, None, "cpu", []),
        (None, "mps", "mps", []),
        (None, "cuda", "cuda", [3]),  # that of torchrun's process
        ("cpu", "cuda", "cpu", []),
        ("cuda:1", "cuda", "cuda:1", [1]),
    ],
)
def test_the_device_is_the_one_asked_for_or_the_best(tiny, monkeypatch, wanted, best, picked, card):
    cards = []
    best = best and torch.device(best)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **options: best)
    monkeypatch.setattr(torch.cuda, "set_device", cards.append)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setenv("LOCAL_RANK", "3")
    tiny.DEVICE = wanted
    assert (tiny.pick_device(), cards) == (torch.device(picked), card)


@pytest.mark.parametrize("wanted, best", [("cuda", None), ("gpu", None), ("mps", "cuda")])
def test_a_device_that_is_not_there_is_one_line(tiny, monkeypatch, capsys, wanted, best):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **options: best)
    refused(capsys, "--device", wanted, words=["DEVICE", wanted, best or "no GPU"])


@pytest.mark.parametrize(
    "device, able, name, dtype",
    [
        ("cuda", (8, 0), "NVIDIA A100", "bfloat16"),
        ("cuda", (7, 5), "Tesla T4", "float16"),
        ("cuda", (7, 0), "Tesla V100", "float16"),
        ("cuda", (7, 5), "NVIDIA GeForce GTX 1660", "float32"),
        ("cuda", (6, 1), "NVIDIA GeForce GTX 1080", "float32"),
        ("cpu", {"avx512_bf16": True}, "", "bfloat16"),
        ("cpu", {"avx2": True, "avx512_f": True, "avx512_bf16": False}, "", "float32"),
        ("mps", {}, "", "float32"),
    ],
)
def test_the_precision_is_the_fastest_in_hardware(tiny, monkeypatch, device, able, name, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: able)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    assert tiny.pick_dtype(torch.device(device)) == torch.float32, "PRECISION is ignored"
    tiny.PRECISION = None
    assert tiny.pick_dtype(torch.device(device)) == getattr(torch, dtype)


@pytest.mark.parametrize("quota, cores", [("max 9", 4), ("9 9", 1), ("25 10", 3), (None, 4)])
def test_a_containers_quota_of_cores_counts(tmp_path, monkeypatch, quota, cores):
    if quota:
        (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
        (tmp_path / "sys/fs/cgroup/cpu.max").write_text(quota)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(dcgan, "Path", lambda path: tmp_path / path[1:])
    assert dcgan.usable_cores() == cores


class Gone(io.StringIO):
    def write(self, text):
        raise BrokenPipeError


STREAMS = {"closed": None, "no reader": Gone(), "ascii": io.TextIOWrapper(io.BytesIO(), "ascii")}


@pytest.mark.parametrize("kind", STREAMS)
@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_run_trains_whatever_its_streams_are(tiny, workplace, monkeypatch, name, kind):
    (workplace / "faces").rename("Gesichter ж")
    monkeypatch.setattr(sys, name, STREAMS[kind])
    monkeypatch.setattr(tiny, "DISTANCE_IMAGES", 64)
    assert tiny.main(["--data-dir", "Gesichter ж", "--output-dir", "Läufe", "--epochs", "1"]) == 0
    assert os.path.exists("Läufe/checkpoint.pt")


def test_without_a_terminal_lines_say_how_far_long_work_is(tiny, monkeypatch, capsys):
    class Impatient(dcgan.tqdm):
        def __init__(self, *about, **options):
            assert (options["mininterval"], options["delay"]) == (60, 60), "not a line per minute"
            super().__init__(*about, **options | {"mininterval": 0, "delay": 0})

    monkeypatch.setattr(tiny, "tqdm", Impatient)
    monkeypatch.setattr(tiny, "DISTANCE_IMAGES", 64)
    assert tiny.main(["--epochs", "1"]) == 0
    said, errors = capsys.readouterr()
    lines = re.findall(r"^\d\d:\d\d .* (\d+)%.* left, .*loss_d", said, re.MULTILINE)
    assert len(lines) > 2 and lines == sorted(lines, key=int)
    assert "\r" not in said and errors == ""


@pytest.mark.parametrize("optimize", [0, 2])
def test_the_script_is_read_from_stdin(finished, workplace, monkeypatch, optimize):
    """As `python - generate … < dcgan.py` does, and with -OO, which leaves out docstrings."""
    (workplace / "data").mkdir()
    (workplace / "data/celeba").symlink_to(workplace / "faces")  # nothing is downloaded
    command = f"- generate --seed 1 --output a.png --checkpoint {finished}/output/generator.pt"
    monkeypatch.setattr(sys, "argv", command.split())
    code = compile(SCRIPT.read_text(encoding="utf-8"), "<stdin>", "exec", optimize=optimize)
    with pytest.raises(SystemExit) as end:
        exec(code, {"__name__": "__main__"})
    assert end.value.code == 0 and os.path.exists("a.png"), "the command line is ignored"


def test_a_script_that_trains_needs_no_main_guard(tiny, monkeypatch):
    start = "multiprocessing.process.BaseProcess.start"  # it would import the script again
    monkeypatch.setattr(start, lambda process: pytest.fail("a process is started"))
    monkeypatch.setattr(tiny, "DISTANCE_IMAGES", 64)
    assert tiny.main(["--epochs", "1"]) == 0


def test_a_missing_package_is_one_line_that_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    one_line(f"{end.value.code}\n", "PIL", "-m pip install -r requirements.txt")


IMPORT = """
import os, signal, sys, torch, torchvision, warnings

def state():
    numbers = [torch.get_num_threads(), torch.backends.cudnn.benchmark, torch.initial_seed()]
    handlers = [signal.getsignal(number) for number in signal.valid_signals()]
    return repr([numbers, handlers, os.environ, os.listdir("."), warnings.filters])

before = state()
import dcgan
print(state() == before, {"kaggle", "matplotlib", "IPython"} & set(sys.modules))
"""


def test_import_has_no_side_effect_and_loads_neither_kaggle_nor_matplotlib(tmp_path):
    assert succeed(cwd=tmp_path, program=["-B", "-c", IMPORT], fresh=True) == "True set()\n"
