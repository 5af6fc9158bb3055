"""Several processes (by real torchrun, gloo, on the CPU) train together as one would."""

import os
import signal
import sys
from pathlib import Path
from unittest.mock import Mock, patch

import conftest
import torch
from conftest import TINY, batch, checkpoint, dcgan, exit_status, flags, metrics


def gradients():
    """Of a step with the penalty and fixed statistics: the same for any number of processes."""
    with patch.multiple(dcgan, **TINY, LEARNING_RATE=0.0):
        trainer = dcgan.Trainer(torch.device("cpu"), torch.float32, attributes=1)
        networks = (trainer.generator.eval(), trainer.discriminator.eval())
        trainer.discriminator.train = lambda mode=True: trainer.discriminator
        mine = slice(dcgan.RANK, None, dcgan.WORLD_SIZE)
        trainer.step(True, *(part[mine] for part in batch(attributes=1)))
    return [weight.grad for network in networks for weight in network.parameters()]


def worker():
    """What torchrun runs in each process: in step 3, all wait until one has got a signal."""
    after_step = dcgan.Run.after_step

    def wait(run, bar, signals):
        if run.done == 3:
            weights = [weight.detach() for weight in run.average.parameters()]
            found = {"gradients": gradients(), "totals": run.totals, "weights": weights}
            torch.save(found, f"rank-{dcgan.RANK}.pt")
            Path(f"there-{dcgan.RANK}").touch()
            while not signals:
                os.sched_yield()
        after_step(run, bar, signals)

    dcgan.Run.after_step = wait
    dcgan.Run.draw_pictures = lambda *about: None
    sys.exit(dcgan.main())


def test_two_processes_train_as_one_are_stopped_by_a_signal_and_go_on_as_one(tiny):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
    where = {"cwd": Path.cwd(), "program": torchrun, "fresh": True}
    with conftest.start(*flags(DATA_DIR="faces", EPOCHS=3), **where) as process:
        try:
            conftest.until(lambda: len(list(Path().glob("there-*"))) == 2, process)
            process.send_signal(signal.SIGTERM)
            said, _ = process.communicate(timeout=60)
        finally:
            process.kill()
    assert said.count("processes: 2") == said.count("same command again") == 1
    assert checkpoint()["done"] == 4, "they have not stopped after the same row"
    assert [row[:3] for row in metrics()] == [["1", "2", "16"], ["1", "4", "32"]]
    ranks = [torch.load(f"rank-{rank}.pt", weights_only=True) for rank in range(2)]
    assert conftest.same(ranks[0]["weights"], ranks[1]["weights"]), "not the same weights"
    assert not torch.equal(ranks[0]["totals"], ranks[1]["totals"]), "not on shares"
    for found, alone in zip(ranks[1]["gradients"], gradients(), strict=True):
        torch.testing.assert_close(found, alone, rtol=0, atol=0.01 * alone.abs().max().item())
    first = Path("output/samples/epoch_000.png").read_bytes()
    assert exit_status() == 0
    assert [int(row[2]) for row in metrics()] == [16, 32, 48, 64, 80]
    assert exit_status("--output-dir", "alone") == 0
    assert Path("alone/samples/epoch_000.png").read_bytes() == first


def test_the_shares_of_two_processes_are_the_batches_of_one(monkeypatch, tiny):
    tiny.AUGMENT = 0.5
    faces = torch.randint(0, 256, (24, 3, 32, 32), dtype=torch.uint8)
    batches = tiny.Batches(faces, torch.rand(24, 2), torch.device("cpu"))
    whole = list(batches.epoch(1))
    monkeypatch.setattr(tiny, "WORLD_SIZE", 2)
    for rank in range(2):
        monkeypatch.setattr(tiny, "RANK", rank)
        mine = [[part[rank::2] for part in batch] for batch in whole]
        assert conftest.same(list(batches.epoch(1)), mine), "shares overlap, or are not random"


def test_means_are_those_over_all_processes(monkeypatch, tiny):
    trainer = tiny.Trainer(torch.device("cpu"), torch.float32, 0)
    trainer.totals += torch.tensor([2.0, 4.0, 6.0, 8.0, 2.0])
    monkeypatch.setattr(tiny, "WORLD_SIZE", 2)
    others = Mock(all_reduce=lambda totals: totals.add_(torch.tensor([8.0, 6.0, 4.0, 2.0, 2.0])))
    monkeypatch.setattr(tiny, "dist", others)
    assert list(trainer.take_means().values()) == [2.5] * 4


def test_the_second_process_stops_with_the_first_and_writes_nothing(monkeypatch, tiny, capsys):
    steps, advance = [], tiny.Run.advance
    monkeypatch.setattr(tiny.Run, "advance", lambda *batch: (steps.append(1), advance(*batch)))
    monkeypatch.setattr(tiny, "dist", Mock(all_reduce=lambda sums: sums.add_(1)))  # a signal there
    monkeypatch.setattr(tiny, "WORLD_SIZE", 2)
    monkeypatch.setattr(tiny, "RANK", 1)
    assert exit_status() == 130
    assert len(steps) == 2 and set(conftest.files()) <= {".lock-1"}
    assert capsys.readouterr() == ("", "")


if __name__ == "__main__":
    worker()
