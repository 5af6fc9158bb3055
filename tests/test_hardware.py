"""Devices: what is picked, what is said where one cannot be used, and the paths of GPUs and Macs.

What needs an NVIDIA card or a Mac is skipped without one, and is to be run where there is one:
pytest tests/test_hardware.py
"""

import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY, dcgan, flags

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA card")
needs_mps = pytest.mark.skipif(not torch.backends.mps.is_available(), reason="needs a Mac")

ON_A_MAC = """
import sys
import torch._utils
torch._utils._get_available_device_type = lambda: "mps"
sys.path.insert(0, sys.argv[1])
import dcgan
sys.exit(dcgan.main(sys.argv[2:]))
"""


def batch(device, number=0):
    """(faces, flips, latents) as the training step takes them."""
    stream = torch.Generator().manual_seed(number)
    size = TINY["IMAGE_SIZE"]
    faces = torch.randint(0, 256, (8, 3, size, size), dtype=torch.uint8, generator=stream)
    flips = torch.rand(8, 1, 1, 1, generator=stream) < 0.5
    latents = torch.randn(8, TINY["LATENT_SIZE"], 1, 1, generator=stream)
    return [tensor.to(device) for tensor in (faces, flips, latents)]


# ----------------------------------------------------------------------------------------- a choice


def test_a_mac_trains_on_its_cpu(workplace):
    """There PyTorch's streams are asked of torch.mps, which does not have all of CUDA's."""
    arguments = [sys.executable, "-c", ON_A_MAC, str(ROOT), *flags(DATA_DIR="faces", EPOCHS=1)]
    done = subprocess.run(arguments, cwd=workplace, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
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
        assert tiny.main(["--device", device]) == 2
        line = capsys.readouterr().err
        assert line.count("\n") == 1 and device in line and "--device cpu" in line


def test_one_card_for_all_processes_is_refused(tiny, monkeypatch, capsys):
    monkeypatch.setattr(tiny, "WORLD_SIZE", 2)
    assert tiny.main(["--device", "cuda:1"]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "cuda:1" in line and "2 processes" in line


def test_a_launcher_that_shows_each_process_one_card_is_told_of_local_rank(
    tiny, monkeypatch, capsys
):
    monkeypatch.setenv("LOCAL_RANK", "7")
    assert tiny.main(["--device", "cuda"]) == 2
    assert "LOCAL_RANK" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------- NVIDIA


@needs_cuda
def test_steps_by_the_graph_are_the_steps_without_it(tiny):
    device = torch.device("cuda", 0)
    graphed, eager = (tiny.Trainer(device, torch.float32) for _ in range(2))
    eager.graph = None
    for number in range(8):
        graphed.advance(*batch(device, number))
        eager.advance(*batch(device, number))
    assert graphed.graph.graph is not None
    torch.testing.assert_close(graphed.fetch(8), eager.fetch(8), rtol=1e-3, atol=1e-3)
    for one, two in zip(graphed.generator.parameters(), eager.generator.parameters()):
        torch.testing.assert_close(one, two, rtol=1e-2, atol=1e-4)


@needs_cuda
def test_a_capture_that_fails_leaves_a_run_that_goes_on(tiny, monkeypatch, capsys):
    device = torch.device("cuda", 0)
    trainer = tiny.Trainer(device, torch.float16)
    step = trainer.step

    def step_that_waits(*inputs):
        step(*inputs)
        if torch.cuda.is_current_stream_capturing():
            trainer.totals.tolist()  # which no capture survives

    monkeypatch.setattr(trainer, "step", step_that_waits)
    for number in range(8):
        trainer.advance(*batch(device, number))
    assert trainer.graph.graph is None and "no CUDA graph" in capsys.readouterr().out
    assert all(mean == mean for mean in trainer.fetch(8))


@needs_cuda
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_a_run_on_a_card_resumes_and_generates_without_a_warning(tiny, capsys, precision):
    settings = ["--device", "cuda", "--precision", precision]
    assert tiny.main(settings) == 0
    assert tiny.main([*settings, "--epochs", "3"]) == 0
    assert tiny.main(["generate", "--device", "cuda"]) == 0
    said = capsys.readouterr()
    assert "epoch 3, step 1" in said.out and "Warning" not in said.err


@needs_cuda
def test_rows_beyond_two_to_the_31_elements_are_the_right_ones(tiny):
    if torch.cuda.mem_get_info()[0] < 6 * 2**30:
        pytest.skip("needs 6 GiB on the card")
    count = 180_000  # 2.2e9 elements
    faces = torch.zeros(count, 3, 64, 64, dtype=torch.uint8)
    faces.view(count, -1)[:, :4] = (
        torch.arange(count, dtype=torch.int32).view(torch.uint8).view(-1, 4)
    )
    chosen = torch.tensor([0, 1, 174_762, 174_763, count - 1])
    there = faces.cuda().index_select(0, chosen.cuda()).cpu()
    assert torch.equal(there, faces[chosen])


# ---------------------------------------------------------------------------------------------- Mac


@needs_mps
def test_a_run_on_a_mac_learns_what_a_cpu_does(tiny):
    losses = {}
    for device in ("cpu", "mps"):
        trainer = tiny.Trainer(torch.device(device), torch.float32)
        for number in range(4):
            trainer.advance(*batch(device, number))
        losses[device] = trainer.fetch(4)
    torch.testing.assert_close(losses["mps"], losses["cpu"], rtol=0.05, atol=0.02)


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
    assert dcgan.usable_cores(tmp_path / "cpu.max") == cores
    assert dcgan.usable_cores(tmp_path / "missing") == 4
