"""Several processes by real torchrun (gloo, on the CPU) train as one would.

torchrun runs this file, too, to see how.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from conftest import (
    RUN_FILES,
    SCRIPT,
    batch,
    dcgan,
    flags,
    free_port,
    refused,
    resuming,
    start,
    until,
)
from reading import checkpoint, files, metrics, steps_of


def drive():
    """`dcgan.main`, with a trainer that also notes what it sees: in rank-0.pt, rank-1.pt.

    Each third step is with the penalty. In step STOP_AT, rank 0 gets a SIGTERM.
    """
    seen, honest = {"batches": []}, dcgan.Trainer
    honest_sum = dcgan.sum_over_processes
    dcgan.R1_INTERVAL = 3
    stop_at = int(os.environ.get("STOP_AT", 0))

    class Spy(honest):
        def __init__(self, *where):
            super().__init__(*where)
            seen["gradients"] = gradients(honest, *where)

        def advance(self, *batch):
            super().advance(*batch)
            seen["batches"].append([part.clone() for part in batch])
            if len(seen["batches"]) == stop_at and dcgan.RANK == 0:
                signal.raise_signal(signal.SIGTERM)
            seen["totals"] = self.totals.clone()
            seen["group"] = torch.distributed.is_initialized()
            networks = (self.generator, self.discriminator, self.average)
            weights = [weight for network in networks for weight in network.parameters()]
            seen["weights"] = [weight.detach().clone() for weight in weights]

    def sum_over_processes(values):
        seen["own values"] = values.clone()
        return honest_sum(values)

    dcgan.sum_over_processes = sum_over_processes
    dcgan.Trainer = Spy
    status = dcgan.main()
    torch.save(seen, f"rank-{os.environ['RANK']}.pt")
    return status


def gradients(trainer_class, *where):
    """Of one step on a batch that is the same for any number of processes.

    BatchNorm's statistics are fixed, for on a CPU they are those of each process's share.
    """
    rate, dcgan.LEARNING_RATE = dcgan.LEARNING_RATE, 0.0
    trainer = trainer_class(*where)
    dcgan.LEARNING_RATE = rate
    for network in (trainer.ddp_generator, trainer.ddp_discriminator):
        network.eval()
    trainer.discriminator.train = lambda mode=True: trainer.discriminator  # and stay as they are
    parts = [part.chunk(dcgan.WORLD_SIZE)[dcgan.RANK] for part in batch()]
    trainer.step(*parts, with_penalty=True)
    networks = (trainer.generator, trainer.discriminator)
    return [weight.grad for network in networks for weight in network.parameters()]


class Torchrun:
    """torchrun in `folder`, its output in files there.

    After `with` nothing of it is left running.
    """

    def __init__(
        self, folder, *arguments, script=SCRIPT, processes=2, options=("--standalone",), **variables
    ):
        self.out, self.err = folder / "out.txt", folder / "err.txt"
        torchrun = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", *options]
        with open(self.out, "w") as out, open(self.err, "w") as err:
            files = {"stdout": out, "stderr": err, "env": variables}
            self.process = start(*arguments, cwd=folder, program=[*torchrun, script], **files)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        for process in [*self.workers(), self.process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()

    def workers(self):
        """The processes of the ranks, by rank."""
        with contextlib.suppress(psutil.NoSuchProcess):
            found = psutil.Process(self.process.pid).children(recursive=True)
            ranks = [process for process in found if "RANK" in process.environ()]
            return sorted(ranks, key=lambda process: int(process.environ()["RANK"]))
        return []

    def said(self):
        """What it has printed so far, for a message."""
        return f"{self.out.read_text()}\n{self.err.read_text()[-3000:]}"

    def wait(self, timeout=150):
        """Its exit status."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            pytest.fail(f"torchrun did not end in {timeout} s: {self.said()}")

    def until(self, text, count=1, timeout=150):
        """Wait for `text` to have been printed."""
        until(lambda: self.out.read_text().count(text) >= count, self.process, timeout)


def steps_in(epochs):
    """The `steps_of` so many epochs of 40 images, with 8 a step and 2 steps a row."""
    found = []
    for epoch in range(epochs):
        found += [(epoch + 1, step, 40 * epoch + 8 * step) for step in (2, 4, 5)]
    return found


def stop_in_step(monkeypatch, step):
    """Train here until SIGTERM comes in the `step`th step, and the command ends by it."""
    advance, steps = dcgan.Trainer.advance, []

    def advance_and_stop(trainer, *batch):
        advance(trainer, *batch)
        steps.append(1)
        if len(steps) == step:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(dcgan.Trainer, "advance", advance_and_stop)
        assert dcgan.main([]) == 128 + signal.SIGTERM


@pytest.fixture(scope="module")
def seen(all_faces, tmp_path_factory):
    """{processes: (folder, what each rank saw)} of the same training by one and by two."""
    found = {}
    for number in (1, 2):
        folder = tmp_path_factory.mktemp(f"by-{number}")
        arguments = flags(DATA_DIR=all_faces)
        with Torchrun(folder, *arguments, script=__file__, processes=number) as torchrun:
            assert torchrun.wait() == 0, torchrun.said()
        files = [folder / f"rank-{rank}.pt" for rank in range(number)]
        found[number] = folder, [torch.load(file, weights_only=True) for file in files]
    return found


# -------------------------------------------------------------------------------------- one machine


def test_two_processes_write_what_one_writes_and_once(seen):
    (one, _), (two, _) = seen[1], seen[2]
    assert steps_of(metrics(one)) == steps_of(metrics(two)) == steps_in(2)
    assert files(one / "output").keys() == files(two / "output").keys() == RUN_FILES
    printed = (two / "out.txt").read_text()
    assert "2 processes" in printed
    for text in ("finished", "5 steps per epoch", "epoch 1/2", "epoch 2/2", "the run will take"):
        assert printed.count(text) == 1, text


def test_two_processes_end_with_the_same_weights(seen):
    one, two = (rank["weights"] for rank in seen[2][1])
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    saved, weights = checkpoint(seen[2][0]), []
    for name in ("generator", "discriminator", "average"):
        parameters = [key for key in saved[name] if not re.search("running|tracked", key)]
        weights += [saved[name][key] for key in parameters]
    same = [torch.equal(a, b) for a, b in zip(weights, one, strict=True)]
    assert all(same), "the checkpoint has other weights"


def test_a_row_of_metrics_csv_is_the_mean_over_both_processes(seen):
    one, two = (rank["own values"] for rank in seen[2][1])  # of the last step, a row by itself
    assert not torch.equal(one, two)
    for rank in seen[2][1]:
        assert torch.equal(rank["totals"], one + two)  # the last of them is 2 steps


def test_two_processes_share_the_batches_of_one_and_no_image_comes_twice_an_epoch(seen):
    (alone,), (one, two) = seen[1][1], seen[2][1]
    shown = []
    for whole, *shares in zip(alone["batches"], one["batches"], two["batches"], strict=True):
        parts = [torch.cat(pair) for pair in zip(*shares, strict=True)]  # faces, flips, noise
        assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))
        assert {len(faces) for faces, *_ in shares} == {4}
        shown.append(parts[0])
    assert len(shown) == 10
    for epoch in (shown[:5], shown[5:]):
        assert len(torch.cat(epoch).unique(dim=0)) == 40


def test_the_gradients_of_two_processes_are_those_of_one_on_the_whole_batch(seen):
    for of_rank in seen[2][1]:
        for ours, reference in zip(of_rank["gradients"], seen[1][1][0]["gradients"], strict=True):
            # Some are sums of terms that all but cancel each other.
            largest = reference.abs().max().item()
            assert largest > 0
            torch.testing.assert_close(ours, reference, rtol=0, atol=0.01 * largest)


def test_torchrun_with_one_process_takes_the_plain_path(seen):
    assert seen[1][1][0]["group"] is False and seen[2][1][0]["group"] is True
    assert "processes" not in (seen[1][0] / "out.txt").read_text()


def test_checkpoints_go_from_one_process_to_two_and_back(tiny, workplace, monkeypatch, capsys):
    stop_in_step(monkeypatch, 3)
    at = 0, 3
    for signum in (signal.SIGTERM, signal.SIGINT):
        with Torchrun(workplace, *flags(DATA_DIR="faces", EPOCHS=10**6)) as torchrun:
            torchrun.until(f"epoch {at[0] + 2}/")
            torchrun.process.send_signal(signum)
            assert torchrun.wait() != 0
            printed = torchrun.out.read_text()
        assert resuming(*at) in printed
        assert printed.count("saved ") == 1
        state = checkpoint(workplace)
        at = state["epoch"], state["step"]
        # Which step it is, is up to the scheduler.
        assert 0 < at[1] <= 5
    capsys.readouterr()
    assert dcgan.main(["--epochs", str(at[0] + 1)]) == 0
    assert resuming(*at) in capsys.readouterr().out
    assert steps_of(metrics()) == steps_in(at[0] + 1)
    assert checkpoint()["images"] == (at[0] + 1) * 40


def test_two_resumed_processes_end_like_two_that_were_not_stopped(seen, workplace):
    """BatchNorm's statistics and the sums for metrics.csv differ by process on a CPU."""
    arguments = flags(DATA_DIR="faces")
    with Torchrun(workplace, *arguments, script=__file__, STOP_AT="3") as torchrun:
        assert torchrun.wait() != 0
    assert checkpoint(workplace)["step"] == 3  # within an interval, and before a penalty
    with Torchrun(workplace, *arguments, script=__file__) as torchrun:
        assert torchrun.wait() == 0, torchrun.said()
    untouched = seen[2][0]
    assert metrics(workplace) == metrics(untouched)
    for network in ("generator", "discriminator", "average"):
        one, two = (checkpoint(folder)[network] for folder in (workplace, untouched))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one), network


def test_processes_on_gpus_ask_each_other_in_each_epoch(tiny, monkeypatch):
    """There they ask only when a row is due."""
    due = []
    monkeypatch.setattr(tiny, "should_stop", lambda *about: due.append(about[-1]))
    tiny.LOG_EVERY = 20
    tiny.train()
    assert due == [False, False, False, False, True] * 2


def test_a_signal_that_comes_while_the_processes_ask_each_other_counts_after_the_next_step(
    tiny, monkeypatch
):
    monkeypatch.setattr(tiny, "WORLD_SIZE", 2)
    others = [lambda *sent: signal.raise_signal(signal.SIGTERM), lambda *sent: None]
    monkeypatch.setattr(tiny.dist, "all_reduce", lambda *sent: others.pop(0)(*sent))
    with tiny.caught_signals() as signals:
        stops = [tiny.should_stop(signals, torch.device("cpu"), True) for _ in range(2)]
    assert stops == [False, True] and signals == [signal.SIGTERM]


def test_a_killed_process_ends_the_others_and_a_restart_resumes_the_run(tiny, workplace):
    arguments = flags(DATA_DIR="faces", EPOCHS=10**6, CHECKPOINT_MINUTES=0)
    options = ("--standalone", "--max-restarts=1")
    with Torchrun(workplace, *arguments, options=options) as torchrun:
        torchrun.until("epoch 2/")
        torchrun.workers()[0].kill()
        torchrun.until("resuming from")
        epochs = checkpoint(workplace)["epoch"]
        torchrun.until(f"epoch {epochs + 3}/")
        workers = torchrun.workers()
        workers[1].kill()
        assert torchrun.wait(60) != 0
        assert not psutil.wait_procs(workers, timeout=5)[1]
    epochs = checkpoint()["epoch"] + 2
    assert tiny.main(["--epochs", str(epochs)]) == 0
    assert steps_of(metrics()) == steps_in(epochs)


# ------------------------------------------------------------------------------------- two machines


@contextlib.contextmanager
def machines(workplace, *arguments, second=()):
    """Two torchruns that work together, as on two machines, the second one in `other`.

    That one has copies of the images, and also the flags `second`.
    """
    other = workplace / "other"
    other.mkdir()
    shutil.copytree(workplace / "faces", other / "faces", copy_function=shutil.copyfile)
    common = ("--nnodes=2", "--master-addr=127.0.0.1", f"--master-port={free_port()}")

    def machine(rank, folder, *more):
        options = (*common, f"--node-rank={rank}")
        return Torchrun(folder, *arguments, *more, processes=1, options=options)

    with machine(0, workplace) as one, machine(1, other, *second) as two:
        yield one, two


def test_two_machines_resume_a_checkpoint_that_only_the_first_one_has(tiny, workplace, monkeypatch):
    stop_in_step(monkeypatch, 3)
    with machines(workplace, *flags(DATA_DIR="faces")) as (one, two):
        assert (one.wait(), two.wait()) == (0, 0), two.said()
        assert resuming(0, 3) in one.out.read_text()
        assert not two.out.read_text()
    assert steps_of(metrics()) == steps_in(2)
    assert list((workplace / "other").glob("data/cache/*.npy"))
    assert not (workplace / "other/output").exists()


def test_two_machines_with_different_images_end_with_a_line_that_says_so(workplace):
    line = r"the machines have different images \(40 images \w+, 24 images \w+\); copy DATA_DIR\n"
    with machines(workplace, *flags(DATA_DIR="faces"), second=("--max-images", 24)) as both:
        for torchrun in both:
            assert torchrun.wait(60) != 0
            assert len(re.findall(line, torchrun.err.read_text())) == 1, torchrun.said()
    assert not list(workplace.rglob("*.pt"))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_batch_size_that_the_processes_cannot_share_ends_with_one_line(
    tiny, monkeypatch, capsys, rank
):
    monkeypatch.setattr(dcgan, "WORLD_SIZE", 2)
    monkeypatch.setattr(dcgan, "RANK", rank)
    line = (
        "dcgan.py: error: BATCH_SIZE is 9; it must be a multiple of the number of processes (2)\n"
    )
    assert refused(capsys, "--batch-size", "9") == line
    assert not Path("output").exists()


if __name__ == "__main__":
    sys.exit(drive())
