"""The paths of NVIDIA cards and of Apple's MPS. Without such a device all of this is skipped."""

import gc

import pytest
import torch
from conftest import SCRIPT, batch, flags, refused, run

CUDA = torch.cuda.is_available()
needs_cuda = pytest.mark.skipif(not CUDA, reason="needs an NVIDIA card")
needs_mps = pytest.mark.skipif(not torch.backends.mps.is_available(), reason="needs a Mac")


@pytest.fixture
def card(tiny):
    """The first card, with the settings that a run makes on it."""
    tiny.DEVICE = "cuda"
    return tiny.pick_device()


def counters(network):
    return [int(buffer) for name, buffer in network.named_buffers() if "tracked" in name]


# ---------------------------------------------------------------------------------------- the graph


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_steps_by_the_graphs_are_the_steps_without_them(tiny, card, monkeypatch, dtype):
    monkeypatch.setattr(tiny, "R1_INTERVAL", 2)  # each second step is with the penalty
    graphed, eager = (tiny.Trainer(card, dtype) for _ in range(2))
    eager.graph = None
    for number in range(12):
        graphed.advance(*batch(number, device=card))
        eager.advance(*batch(number, device=card))
    assert graphed.graph.graphs.keys() == {True, False}
    loose = 1e-3 if dtype == torch.float32 else 0.1
    assert graphed.take_means() == pytest.approx(eager.take_means(), rel=loose, abs=loose)
    assert set(counters(graphed.generator)) == {12}  # one forward a step
    assert set(counters(graphed.discriminator)) == {36}  # reals, fakes, and fakes again


@needs_cuda
def test_the_optimizers_warn_of_nothing_and_are_capturable_with_the_graph(tiny, card, recwarn):
    trainer = tiny.Trainer(card, torch.float32)
    for number in range(6):
        trainer.advance(*batch(number, device=card))
    assert not [str(warning.message) for warning in recwarn]
    assert trainer.generator_optimizer.adamw.param_groups[0]["capturable"]


@needs_cuda
@pytest.mark.parametrize("failing", [False, True])
def test_a_capture_that_fails_leaves_a_run_that_continues(tiny, card, monkeypatch, capsys, failing):
    monkeypatch.setattr(tiny, "R1_INTERVAL", 2)
    trainer = tiny.Trainer(card, torch.float16)
    step = trainer.step

    def step_that_waits(*inputs):
        step(*inputs)
        if inputs[-1] == failing and torch.cuda.is_current_stream_capturing():
            trainer.totals.sum().item()  # which no capture survives

    monkeypatch.setattr(trainer, "step", step_that_waits)
    stream = torch.cuda.current_stream()
    for number in range(12):
        trainer.advance(*batch(number, device=card))
    assert trainer.graph is None and torch.cuda.current_stream() == stream
    [line] = [line for line in capsys.readouterr().out.splitlines() if "no CUDA graph" in line]
    assert all(mean == mean for mean in trainer.take_means())


@needs_cuda
def test_two_hundred_steps_take_no_more_memory_than_twenty(tiny, card, monkeypatch):
    monkeypatch.setattr(tiny, "R1_INTERVAL", 4)  # both graphs are there after 13 steps
    trainer = tiny.Trainer(card, torch.bfloat16)
    for number in range(20):
        trainer.advance(*batch(number, device=card))
    torch.cuda.synchronize()
    before = torch.cuda.memory_reserved()
    for number in range(200):
        trainer.advance(*batch(number % 20, device=card))
    torch.cuda.synchronize()
    assert torch.cuda.memory_reserved() - before < 2**20


# ------------------------------------------------------------------------------------- the penalty


@pytest.mark.parametrize(
    "name", [pytest.param("cuda", marks=needs_cuda), pytest.param("mps", marks=needs_mps)]
)
def test_the_penaltys_gradients_are_those_of_a_cpu(tiny, monkeypatch, name):
    """Its second derivative takes paths that nothing else does."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    reals = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    gradients = []
    for device in (torch.device("cpu"), torch.device(name, 0)):
        trainer = tiny.Trainer(device, torch.float32)
        trainer.gradient_penalty(reals.to(device)).backward()
        parameters = trainer.discriminator.parameters()
        gradients.append([weight.grad.cpu() for weight in parameters if weight.grad is not None])
    for here, there in zip(*gradients, strict=True):
        torch.testing.assert_close(there, here, rtol=1e-3, atol=1e-3 * here.abs().max().item())


# --------------------------------------------------------------------------------------------- data


@needs_cuda
def test_batches_are_the_same_from_the_card_and_from_pinned_memory(tiny, card, monkeypatch):
    faces = torch.randint(0, 256, (50, 3, 32, 32), dtype=torch.uint8)
    resident = tiny.Batches(faces, card)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (0, 1))
    pinned = tiny.Batches(faces, card)
    assert resident.faces.is_cuda and not pinned.faces.is_cuda
    for one, two in zip(resident.epoch(0), pinned.epoch(0), strict=True):
        assert all(torch.equal(a, b) and b.is_cuda for a, b in zip(one, two))


@needs_cuda
def test_rows_beyond_two_to_the_31_elements_are_the_right_ones(tiny):
    if torch.cuda.mem_get_info()[0] < 6 * 2**30:
        pytest.skip("needs 6 GiB on the card")
    count = 180_000  # 2.2e9 elements
    faces = torch.zeros(count, 3, 64, 64, dtype=torch.uint8)
    numbers = torch.arange(count, dtype=torch.int32)
    faces.view(count, -1)[:, :4] = numbers.view(torch.uint8).view(-1, 4)
    chosen = torch.tensor([0, 1, 174_762, 174_763, count - 1])
    there = faces.cuda().index_select(0, chosen.cuda()).cpu()
    assert torch.equal(there, faces[chosen])
    gc.collect()
    torch.cuda.empty_cache()


# --------------------------------------------------------------------------------------- whole runs


@needs_cuda
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_a_run_on_a_card_resumes_and_draws_the_same_faces_for_a_seed(tiny, capsys, precision):
    settings = ["--device", "cuda", "--precision", precision]
    assert tiny.main(settings) == 0
    assert tiny.main([*settings, "--epochs", "3"]) == 0
    said = capsys.readouterr()
    assert "epoch 3, step 1" in said.out and "Warning" not in said.err
    tiny.DEVICE, tiny.PRECISION = "cuda", precision
    first, again = (tiny.generate_images(70, seed=1) for _ in range(2))
    assert torch.equal(first, again) and first.device.type == "cpu"
    assert torch.equal(tiny.generate_images(3, seed=1), first[:3])


@needs_cuda
def test_a_full_card_is_one_line_with_what_is_free(tiny, capsys, monkeypatch):
    torch.cuda.set_per_process_memory_fraction(0.001)
    try:
        larger = {"BATCH_SIZE": 40, "G_FEATURES": 512, "D_FEATURES": 512, "DEVICE": "cuda"}
        line = refused(capsys, *flags(**larger, DATA_DIR="faces"), status=1)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
    assert "out of memory" in line and "BATCH_SIZE" in line and "free" in line


@needs_cuda
def test_torchrun_with_one_card_trains(workplace):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1", SCRIPT]
    done = run(*flags(DATA_DIR="faces", DEVICE="cuda"), cwd=workplace, program=torchrun)
    assert done.returncode == 0, done.stderr
    assert (workplace / "output/generator.pt").exists()


@needs_mps
def test_a_run_on_a_mac_learns_what_a_cpu_does(tiny):
    losses = {}
    for device in ("cpu", "mps"):
        trainer = tiny.Trainer(torch.device(device), torch.float32)
        for number in range(4):
            trainer.advance(*batch(number, device=device))
        losses[device] = trainer.take_means()
    assert losses["mps"] == pytest.approx(losses["cpu"], rel=0.05, abs=0.02)
    assert tiny.main(["--device", "mps"]) == 0
    assert tiny.main(["generate", "--device", "mps"]) == 0
