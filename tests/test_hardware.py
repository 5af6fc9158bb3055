"""Devices: what is picked, and what is said where one cannot be used. No GPU is needed for this."""

import pytest
import torch
from conftest import dcgan, flags, one_line, refused, succeed

ON_A_MAC = """
import sys
import torch._utils
torch._utils._get_available_device_type = lambda: "mps"
import dcgan
sys.exit(dcgan.main())
"""


# ----------------------------------------------------------------------------------------- a choice


def test_a_mac_trains_on_its_cpu(workplace):
    """There PyTorch's streams are asked of torch.mps, which does not have all of CUDA's."""
    succeed(*flags(DATA_DIR="faces", EPOCHS=1), cwd=workplace, program=["-c", ON_A_MAC])
    assert (workplace / "output/generator.pt").exists()


def test_several_processes_on_a_mac_take_the_cpu(tiny, monkeypatch):
    best = torch.device("mps")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **options: best)
    monkeypatch.setattr(tiny, "DEVICE", None)
    monkeypatch.setattr(tiny, "WORLD_SIZE", 2)
    assert tiny.pick_device() == torch.device("cpu")


@pytest.mark.parametrize(
    "capability, name, dtype",
    [
        ((9, 0), "NVIDIA H100", torch.bfloat16),
        ((8, 0), "NVIDIA A100", torch.bfloat16),
        ((7, 5), "Tesla T4", torch.float16),
        ((7, 0), "Tesla V100", torch.float16),
        ((7, 5), "NVIDIA GeForce GTX 1660", torch.float32),
        ((6, 1), "NVIDIA GeForce GTX 1080", torch.float32),
        ((6, 0), "Tesla P100", torch.float32),
    ],
)
def test_a_cards_precision_is_one_that_it_has_units_for(tiny, monkeypatch, capability, name, dtype):
    monkeypatch.setattr(tiny, "PRECISION", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert tiny.pick_dtype(torch.device("cuda", 0)) == dtype


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_a_card_that_is_not_there_is_one_line_that_names_the_cpu(tiny, capsys):
    for device in ("cuda", "cuda:3", "mps"):
        one_line(refused(capsys, "--device", device), device, "--device cpu")


@pytest.mark.parametrize(
    "text",
    [
        "The operator 'aten::x' is not currently implemented for the MPS device",
        "Could not run 'aten::x' with arguments from the 'XPU' backend",
        "\"batch_norm\" not implemented for 'Half'",
        "GET was unable to find an engine to execute this computation",
    ],
)
def test_what_a_device_cannot_do_is_one_line_that_names_the_cpu(tiny, monkeypatch, capsys, text):
    def step(trainer, *batch):
        raise (NotImplementedError if "implemented" in text else RuntimeError)(text)

    monkeypatch.setattr(tiny.Trainer, "step", step)
    one_line(refused(capsys, status=1), text, "--device cpu", "--precision float32")


def test_one_card_for_all_processes_is_refused(tiny, monkeypatch, capsys):
    monkeypatch.setattr(tiny, "WORLD_SIZE", 2)
    one_line(refused(capsys, "--device", "cuda:1"), "cuda:1", "2 processes")
    monkeypatch.setenv("LOCAL_RANK", "7")  # of a launcher that shows each process one card
    assert "LOCAL_RANK" in refused(capsys, "--device", "cuda")


def test_layouts_are_the_fastest_that_work():
    assert dcgan.memory_format(torch.device("mps")) == torch.contiguous_format
    for device in ("cpu", "cuda", "xpu"):
        assert dcgan.memory_format(torch.device(device)) == torch.channels_last


# ---------------------------------------------------------------------------------------------- CPU


@pytest.mark.parametrize(
    "quota, cores", [("max 100000", 4), ("100000 100000", 1), ("250000 100000", 3), ("", 4)]
)
def test_a_containers_quota_counts(tmp_path, monkeypatch, quota, cores):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0, 1, 2, 3}, raising=False)
    monkeypatch.setattr("sys.platform", "linux")
    (tmp_path / "cpu.max").write_text(quota)
    assert dcgan.usable_cores(tmp_path) == cores
    assert dcgan.usable_cores(tmp_path / "missing") == 4
    (tmp_path / "cpu.max").unlink()
    (tmp_path / "cpu").mkdir()  # version 1 of cgroups
    limit, _, period = (quota or "max").partition(" ")
    (tmp_path / "cpu/cpu.cfs_quota_us").write_text(limit.replace("max", "-1") + "\n")
    (tmp_path / "cpu/cpu.cfs_period_us").write_text(f"{period or 100_000}\n")
    assert dcgan.usable_cores(tmp_path) == cores


@pytest.mark.parametrize("most", [2**30, 2**25])
def test_glibc_keeps_freed_memory_up_to_the_limit_it_accepts(monkeypatch, most):
    accepted = {}

    class Library:
        def mallopt(self, option, value):
            if option == -3 and value > most:  # M_MMAP_THRESHOLD, in glibc before 2.35
                return 0
            accepted[option] = value
            return 1

    monkeypatch.setattr("ctypes.CDLL", lambda name: Library())
    dcgan.keep_freed_memory()
    assert accepted == {-3: most, -1: 2**31 - 1}
