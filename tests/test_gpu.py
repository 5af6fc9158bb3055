"""What only a real NVIDIA card can show; without one, all of this is skipped."""

import math

import pytest
import torch
from conftest import batch

import dcgan

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA card")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def card(tiny):
    """The first card, as a run prepares it."""
    tiny.DEVICE = "cuda"
    return tiny.pick_device()


def advanced(device, dtype, steps=10, eager=False):
    """A Trainer after some steps, each second one with the penalty, and its means."""
    made = dcgan.Trainer(device, dtype, 0)
    if eager:
        made.steps = [graph.function for graph in made.steps]
    for number in range(steps):
        made.advance(*batch(number, device=device))
    return made, made.take_means()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_steps_by_the_graphs_are_the_steps_without_them(card, monkeypatch, recwarn, dtype):
    monkeypatch.setattr(dcgan, "R1_INTERVAL", 2)
    (made, means), (_, wanted) = (advanced(card, dtype, eager=eager) for eager in (False, True))
    assert all(graph.graph for graph in made.steps)
    loose = 1e-3 if dtype == torch.float32 else 0.1
    assert means == pytest.approx(wanted, rel=loose, abs=loose)
    counters = [buffer for name, buffer in made.generator.named_buffers() if "tracked" in name]
    assert {counter.item() for counter in counters} == {10}  # one forward a step, in replays, too
    assert not [str(warning.message) for warning in recwarn]


def test_a_capture_that_fails_leaves_a_run_that_continues(card, monkeypatch, capsys):
    monkeypatch.setattr(dcgan, "R1_INTERVAL", 2)
    stream, step = torch.cuda.current_stream(), dcgan.Trainer.step

    def reading(trainer, *inputs):
        step(trainer, *inputs)
        trainer.totals.sum().item()  # which no capture survives

    monkeypatch.setattr(dcgan.Trainer, "step", reading)
    _, means = advanced(card, torch.float16, 12)
    assert capsys.readouterr().out.count("no CUDA graph") == 2
    assert torch.cuda.current_stream() == stream and math.isfinite(sum(means.values()))


def test_two_hundred_steps_take_no_more_memory_than_twenty(card):
    made, _ = advanced(card, torch.bfloat16, 20)
    before = torch.cuda.memory_reserved()
    for number in range(200):
        made.advance(*batch(number % 20, device=card))
    assert torch.cuda.memory_reserved() - before < 2**20


def test_the_penaltys_gradients_are_those_of_a_cpu(tiny, monkeypatch):
    """Its second derivative takes paths that nothing else does."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    reals = torch.rand(8, 3, 32, 32) * 2 - 1
    gradients = []
    for device in (torch.device("cpu"), torch.device("cuda", 0)):
        made = dcgan.Trainer(device, torch.float32, 0)
        made.gradient_penalty(reals.clone().to(device), torch.zeros(8, 0, device=device)).backward()
        weights = made.discriminator.parameters()
        gradients.append([weight.grad.cpu() for weight in weights if weight.grad is not None])
    for wanted, found in zip(*gradients, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3 * wanted.abs().max().item())


def test_batches_are_the_same_from_the_card_and_from_memory(card, monkeypatch):
    faces, labels = torch.randint(0, 256, (50, 3, 32, 32), dtype=torch.uint8), torch.rand(50, 2)
    on_card = dcgan.Batches(faces, labels, card)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (0, 1))
    in_memory = dcgan.Batches(faces, labels, card)
    assert on_card.faces.is_cuda and not in_memory.faces.is_cuda
    for one, two in zip(on_card.epoch(0), in_memory.epoch(0), strict=True):
        assert all(torch.equal(a, b) and b.is_cuda for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_run_resumes_and_draws_the_same_faces_for_a_seed(tiny, capsys, dtype):
    tiny.DEVICE, tiny.PRECISION = "cuda", dtype
    tiny.train()
    tiny.EPOCHS = 4
    tiny.train()
    said = capsys.readouterr()
    assert "epoch 3, step 1" in said.out and "no CUDA graph" not in said.out
    assert f"cuda, torch.{dtype}" in said.out and "Warning" not in said.err
    first, again = (tiny.generate_images(70, seed=1) for _ in range(2))
    assert torch.equal(first, again) and torch.equal(tiny.generate_images(3, seed=1), first[:3])
