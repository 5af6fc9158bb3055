"""The step as a CUDA graph, and whole runs on cards, which imitated_gpu.py imitates.

Each run is a process of its own. What only a real card can show is in test_gpu.py.
"""

import ast
import functools
import signal

import pytest
import torch
from conftest import ROOT, checkpoint, draw_faces, flags, pixels, run, same_run, succeed

RULES = """
import pytest
ones, total = torch.ones(3, device="cuda"), torch.zeros(3, device="cuda")
assert ones.is_cuda and (ones + 1).device == torch.device("cuda", 0) and not ones.cpu().is_cuda
pytest.raises(RuntimeError, lambda: ones + torch.ones(3))
number, graph, stream = 2, torch.cuda.CUDAGraph(), torch.cuda.Stream()
with torch.cuda.graph(graph, stream=stream):
    total += number * ones
assert total.tolist() == [0, 0, 0]  # a capture computes nothing
number = 5  # which is frozen
graph.replay()
ones.fill_(10)
graph.replay()
assert total.tolist() == [22, 22, 22]
for forbidden in (total.sum().item, total.tolist, torch.ones(3).cuda):
    with pytest.raises(RuntimeError, match="in capture"):
        with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream):
            forbidden()
    torch.cuda.set_stream(imitated_gpu.default_stream)
"""
TRAIN = """
import dcgan
dcgan.R1_INTERVAL, dcgan.DISTANCE_IMAGES = 2, 64
{first}
assert dcgan.main(sys.argv[1:]) == 0
print([(len(graph.calls), graph.replays) for graph in imitated_gpu.graphs])
"""
NO_PICTURES = "dcgan.Run.draw_pictures = dcgan.save_picture = lambda *about: None\n"
EAGER = NO_PICTURES + "dcgan.StepGraph = lambda step, *about: step"
KILLED = f"""{NO_PICTURES}
after_step = dcgan.Run.after_step
def killed_after(run, *about):
    after_step(run, *about)
    if run.images == 72:  # both graphs are there, and the last checkpoint is a step older
        os.kill(os.getpid(), 9)
dcgan.Run.after_step = killed_after
"""
READING = f"""{NO_PICTURES}
scaled = torch.amp.GradScaler.step
def reading(scaler, optimizer):
    scaled(scaler, optimizer)
    optimizer.param_groups[0]["params"][0].sum().item()
torch.amp.GradScaler.step = reading
"""
SETTINGS = {"DATA_DIR": "faces", "ATTRIBUTES": "Odd", "LOG_EVERY": 4, "CHECKPOINT_MINUTES": 0}
SETTINGS |= {"DEVICE": None, "PRECISION": None}  # 10 steps; the 7th and the 8th are captured


def program(card, code, **changes):
    """What Python runs: `code` on a card."""
    head = f"import os, sys; sys.path.append({str(ROOT / 'tests')!r}); import imitated_gpu, torch"
    return ["-c", f"{head}\nimitated_gpu.install({card!r}, **{changes})\n{code}"]


def train(cwd, card, first=NO_PICTURES, by=succeed, **changes):
    """A training run in `cwd` on a card: what it has said."""
    draw_faces(cwd / "faces")
    rows = [f"{index:06d}.jpg,{index % 2}" for index in range(40)]
    (cwd / "faces/list_attr_celeba.csv").write_text("\n".join(["image_id,Odd", *rows]))
    code = TRAIN.format(first=first)
    return by(*flags(**SETTINGS), cwd=cwd, program=program(card, code, **changes))


def same_numbers(one, other):
    """Whether two runs have ended in the same state, whatever the devices and the paths."""
    return same_run(*(checkpoint(folder) | {"settings": None} for folder in (one, other)))


@pytest.fixture(scope="module")
def finished_on(tmp_path_factory):
    """A function: the folder of a finished run on a card, and what it said; run once each."""

    @functools.cache
    def finish(*about):
        folder = tmp_path_factory.mktemp("run")
        return folder, train(folder, *about)

    return finish


def test_the_imitation_bears_this_pytorch(tmp_path):
    succeed(cwd=tmp_path, program=program("A100", RULES))


def test_a_run_on_an_a100_leaves_all_its_files_and_replays_both_kinds_of_step(finished_on):
    folder, said = finished_on("A100", "")  # with pictures
    assert "cuda" in said and "bfloat16" in said and "no CUDA graph" not in said
    names = {"checkpoint.pt", "generator.pt", "losses.png", "real_vs_fake.png", "attributes.png"}
    names |= {"metrics.csv", "quality.csv", "training.gif", "samples/epoch_002.png"}
    assert all((folder / "output" / name).exists() for name in names)
    (penalty, replays), (plain, plain_replays) = ast.literal_eval(said.splitlines()[-1])
    assert plain < penalty and replays == plain_replays == 5 - 3  # the first three are not


def test_replays_equal_eager_steps_that_take_their_images_from_memory(finished_on, tmp_path):
    said = train(tmp_path, "A100", EAGER, free=1000)
    assert said.endswith("\n[]\n") and same_numbers(tmp_path, finished_on("A100", "")[0])


def test_a_run_on_a_t4_that_was_killed_ends_like_one_that_was_not(finished_on, tmp_path):
    assert train(tmp_path, "T4", KILLED, by=run).returncode == -signal.SIGKILL
    assert "epoch 2, step 4" in train(tmp_path, "T4")
    assert same_numbers(tmp_path, finished_on("T4")[0])


def test_a_step_whose_capture_fails_says_so_and_trains_on_eagerly(finished_on):
    """It reads a value where the scaler of float16 is between its two calls."""
    folder, said = finished_on("T4", READING)
    assert "float16" in said and said.count("no CUDA graph") == 2
    assert same_numbers(folder, finished_on("T4")[0])


def test_a_run_on_a_mac_has_the_numbers_of_a_cpu(finished_on, tiny, monkeypatch):
    """In the same memory format: sums in another order differ in their last digits."""
    folder, said = finished_on("Mac")
    assert "mps" in said and "float32" in said
    monkeypatch.setattr(tiny, "R1_INTERVAL", 2)
    monkeypatch.setattr(tiny, "DISTANCE_IMAGES", 64)
    monkeypatch.setattr(tiny, "memory_format", lambda device: torch.contiguous_format)
    here = {"DEVICE": "cpu", "PRECISION": "float32", "DATA_DIR": folder / "faces"}
    assert tiny.main(flags(**SETTINGS | here)) == 0
    assert same_numbers(".", folder)


def test_a_card_generates_the_faces_of_a_cpu(finished_on, tiny, tmp_path):
    """By the command in the docstring of imitated_gpu.py."""
    file = finished_on("A100", "")[0] / "output/generator.pt"
    words = ["generate", "--seed", "1", "--precision", "float32", "--checkpoint", str(file)]
    imitated = [ROOT / "tests/imitated_gpu.py", "A100", ROOT / "dcgan.py"]
    succeed(*words, "--output", "card.png", cwd=tmp_path, program=imitated)
    assert tiny.main([*words, "--output", "cpu.png", "--device", "cpu"]) == 0
    assert torch.equal(pixels("card.png"), pixels("cpu.png"))
