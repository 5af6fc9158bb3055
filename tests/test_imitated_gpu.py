"""The paths of NVIDIA cards and of Apple's MPS, on imitated cards. imitated_gpu.py says how.

Each run is a process of its own. What only a real card can show is in test_gpu.py.
"""

import functools
import json
import shutil
import signal
import sys

import pytest
import torch
from conftest import (
    ROOT,
    RUN_FILES,
    SCRIPT,
    draw_faces,
    flags,
    one_line,
    run,
    start,
    succeed,
    until,
)
from imitated_gpu import CARDS
from reading import checkpoint, files, film, metrics, pixels, table

PROGRAM = """
import json, sys
sys.path.append({tests!r})
import imitated_gpu
if {card!r} in imitated_gpu.CARDS:
    imitated_gpu.install({card!r}, **{changes})
import dcgan
dcgan.R1_INTERVAL = 4  # each fourth step is with the penalty
{first}
status = dcgan.main(sys.argv[1:])
with open("graphs.json", "w") as file:
    json.dump([(len(graph.calls), graph.replays) for graph in imitated_gpu.graphs], file)
sys.exit(status)
"""
NO_PICTURES = "dcgan.Run.draw_pictures = lambda *about, **options: None\n"  # they take seconds
EAGER = NO_PICTURES + "dcgan.StepGraph = lambda trainer: None"
BY_CHANNEL = NO_PICTURES + "dcgan.memory_format = lambda device: dcgan.torch.contiguous_format"
FEW = """
from torch_fidelity.defaults import DEFAULTS
dcgan.LEAST_IMAGES = 16
DEFAULTS["kid_subset_size"], DEFAULTS["feature_layer_fid"] = 12, "192"
"""
SETTINGS = {"DATA_DIR": "faces", "EPOCHS": 2, "LOG_EVERY": 5, "DEVICE": None, "PRECISION": None}
STEPS = 30  # in all; the sixth and the thirteenth are captured
NEWEST_PYTORCH = (2, 15)  # that the imitation has been tried with

RULES = """
import sys
import pytest, torch
sys.path.insert(0, {tests!r})
import imitated_gpu
imitated_gpu.install("A100")

ones = torch.ones(3, device="cuda")
assert ones.is_cuda and (ones + 1).device == torch.device("cuda", 0) and not ones.cpu().is_cuda
with pytest.raises(RuntimeError, match="two devices"):
    ones + torch.ones(3)
with pytest.raises(TypeError, match="numpy"):
    ones.numpy()
assert "cuda:0" in repr(ones) and f"{{ones.sum():.1f}}" == "3.0"

total, number, stream = torch.zeros(3, device="cuda"), 2, torch.cuda.Stream()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph, stream=stream):
    total += number * ones
assert total.tolist() == [0, 0, 0]
number = 5
graph.replay()
ones.fill_(10)
graph.replay()
assert total.tolist() == [22, 22, 22]

for forbidden in (total.sum().item, total.tolist, torch.ones(3).cuda, torch.cuda.synchronize):
    with pytest.raises(RuntimeError, match="in capture"):
        with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream):
            forbidden()
    torch.cuda.set_stream(imitated_gpu.default_stream)
"""


@pytest.fixture(scope="module", autouse=True)
def imitation_works(tmp_path_factory):
    """Skip these tests if a newer PyTorch breaks the imitation."""
    program = ["-c", RULES.format(tests=str(ROOT / "tests"))]
    done = run(program=program, cwd=tmp_path_factory.mktemp("rules"))
    known = tuple(map(int, torch.__version__.split(".")[:2])) <= NEWEST_PYTORCH
    if done.returncode and not (known and sys.platform == "linux"):
        pytest.skip(
            f"PyTorch {torch.__version__} breaks the imitation: {done.stderr.splitlines()[-1]}"
        )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    return draw_faces(tmp_path_factory.mktemp("more") / "faces", 120)


@pytest.fixture
def workplace(tmp_path, faces):
    (tmp_path / "faces").symlink_to(faces)
    return tmp_path


def program(card, first="", **changes):
    """What Python runs: dcgan.py on `card`, that of its folder if it has one, after `first`."""
    options = {"card": card, "changes": changes, "first": first, "tests": str(ROOT / "tests")}
    return ["-c", PROGRAM.format(**options)]


def train(cwd, card, first="", **changed):
    """A training run in `cwd`, with `changed` settings."""
    settings = SETTINGS | changed
    if card == "CPU":
        settings |= {"DEVICE": "cpu", "PRECISION": "float32"}
    return run(*flags(**settings), cwd=cwd, program=program(card, first))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, faces):
    """A function: the folder where a run has ended, and its process. Each is run once."""

    @functools.cache
    def finish(card, first):
        folder = tmp_path_factory.mktemp("run")
        (folder / "faces").symlink_to(faces)
        done = train(folder, card, first)
        assert (done.returncode, done.stderr) == (0, "")
        return folder, done

    return lambda card, first="": finish(card, first)  # the cache takes () and ("",) for two


def edited(folder, old, new):
    """Put a copy of dcgan.py into `folder`, in which the line `old` is `new`."""
    text = SCRIPT.read_text(encoding="utf-8")
    assert text.count(f"{old}\n") == 1
    (folder / "dcgan.py").write_text(text.replace(f"{old}\n", f"{new}\n"), encoding="utf-8")


def numbers(folder):
    """metrics.csv without the speed, and the weights in generator.pt."""
    rows = metrics(folder)
    assert len(rows) == STEPS / SETTINGS["LOG_EVERY"]
    weights = checkpoint(folder, "generator.pt")["average"]
    return rows, {name: weight.tolist() for name, weight in weights.items()}


# -------------------------------------------------------------------------------------- whole runs


PRECISIONS = {"A100": "bfloat16", "T4": "float16"}
PRECISIONS |= dict.fromkeys(("GTX 1660", "GTX 1080", "Mac"), "float32")


@pytest.mark.parametrize("card, precision", PRECISIONS.items())
def test_a_run_on_a_card_leaves_all_its_files(finished, card, precision):
    folder, done = finished(card)
    name = "MPS" if card == "Mac" else f"{CARDS[card].name}, images in GPU memory"
    first, *others, last = done.stdout.splitlines()
    assert first.startswith(name) and f", {precision}; 120 images, 15 steps" in first
    assert len([line for line in others if line.startswith("epoch ")]) == 2
    assert last.startswith("finished")
    output = folder / "output"
    assert files(output).keys() == RUN_FILES
    before, after = (pixels(output / f"samples/epoch_00{epoch}.png") for epoch in (0, 2))
    assert before.shape == after.shape and not torch.equal(before, after)


@pytest.mark.parametrize("card", ["A100", "T4"])
def test_steps_of_both_kinds_are_replayed_and_give_the_numbers_of_steps_without_a_graph(
    finished, card
):
    folder = finished(card)[0]
    graphs = json.loads((folder / "graphs.json").read_text())
    (plain, plain_replays), (penalty, penalty_replays) = graphs
    assert plain < penalty
    # All steps but the first three of each kind; one in four is with the penalty.
    assert (plain_replays, penalty_replays) == (STEPS - 8 - 3, 8 - 3)
    eager = finished(card, EAGER)[0]
    assert json.loads((eager / "graphs.json").read_text()) == []
    assert numbers(folder) == numbers(eager)


@pytest.mark.parametrize(
    "card, other, layout",
    [("GTX 1080", "CPU", ""), ("GTX 1660", "GTX 1080", ""), ("Mac", "CPU", BY_CHANNEL)],
)
def test_float32_gives_the_numbers_of_the_cpu(finished, card, other, layout):
    """In the same memory format: sums in another order differ in their last digits."""
    assert numbers(finished(card)[0]) == numbers(finished(other, layout)[0])


def test_images_that_do_not_fit_on_the_card_give_the_same_numbers(finished, workplace):
    pinned = program("A100", NO_PICTURES, free=400_000)
    said = succeed(*flags(**SETTINGS), cwd=workplace, program=pinned)
    assert "images on disk" in said.splitlines()[0]
    assert numbers(workplace) == numbers(finished("A100")[0])


def test_labels_are_read_again_by_each_replay(finished, workplace):
    """Also where labels come from pinned memory; and the same as in steps without a graph."""
    rows = [f"{index:06d}.jpg,{index % 3 - 1}" for index in range(120)]
    table = "\n".join(["image_id,Third", *rows, ""])
    (workplace / "list_attr_celeba.csv").write_text(table)
    words = flags(**SETTINGS | {"ATTRIBUTES": "Third"})
    results = []
    for first, memory in [(NO_PICTURES, {}), (NO_PICTURES, {"free": 400_000}), (EAGER, {})]:
        shutil.rmtree(workplace / "output", ignore_errors=True)
        said = succeed(*words, cwd=workplace, program=program("A100", first, **memory))
        assert "attributes: Third 33%" in said
        results.append(numbers(workplace))
    assert results[0] == results[1] == results[2]
    assert results[0] != numbers(finished("A100")[0])


def test_a_killed_run_ends_with_the_numbers_of_an_uninterrupted_one(finished, workplace):
    words = flags(**SETTINGS | {"CHECKPOINT_MINUTES": 0.005})
    with start(*words, cwd=workplace, program=program("T4", NO_PICTURES)) as process:
        # 20 steps: both graphs are there.
        until(lambda: len(metrics(workplace)) > 3)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    done = train(workplace, "T4", NO_PICTURES)
    assert (done.returncode, done.stderr) == (0, "") and "resuming from" in done.stdout
    assert numbers(workplace) == numbers(finished("T4")[0])


# ------------------------------------------------------------------------------------- edited steps

SCHEDULE = f"""
{NO_PICTURES}
from torch.optim.lr_scheduler import ExponentialLR

class Scheduled(dcgan.Trainer):
    def __init__(self, *where):
        super().__init__(*where)
        optimizers = (self.generator_optimizer, self.discriminator_optimizer)
        self.schedules = [ExponentialLR(optimizer.adamw, 0.8) for optimizer in optimizers]

    def advance(self, *batch):
        super().advance(*batch)
        for schedule in self.schedules:
            schedule.step()

dcgan.Trainer = Scheduled
"""


def test_a_learning_rate_that_changes_between_steps_reaches_the_graphs(finished):
    scheduled = numbers(finished("A100", SCHEDULE)[0])
    assert scheduled == numbers(finished("A100", SCHEDULE + EAGER)[0])
    assert scheduled != numbers(finished("A100")[0])


READS = {
    "in each step": ("        loss_g = bce(judged, 1.0)", "loss_g.item()"),
    "in steps with the penalty": ("        self.discriminator.train()", "logits.sum().tolist()"),
    "in the optimizer": (
        "        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)",
        "read = lambda adamw, *about: adamw.param_groups[0]['lr'].item()\n"
        "        self.adamw.register_step_post_hook(read)",
    ),
    "between optimizer and scaler": ("        self.scaler.step(self.adamw)", "loss.item()"),
}


@pytest.mark.parametrize("place", READS)
def test_a_step_that_reads_a_value_is_reported_and_runs_without_a_graph(finished, workplace, place):
    line, reading = READS[place]
    card = "A100" if place == "in each step" else "T4"
    edited(workplace, line, f"{line}\n        {reading}")
    done = train(workplace, card, NO_PICTURES)
    assert (done.returncode, done.stderr) == (0, "")
    [said] = [line for line in done.stdout.splitlines() if "no CUDA graph" in line]
    assert "training continues" in said
    assert numbers(workplace) == numbers(finished(card, EAGER)[0])


def test_a_tensor_of_the_cpu_in_the_step_ends_with_a_traceback_that_names_the_line(workplace):
    line = "        loss_g = bce(judged, 1.0)"
    edited(workplace, line, f"{line} + torch.zeros(1)")
    done = train(workplace, "A100")
    assert done.returncode == 1 and "Traceback" in done.stderr
    assert "loss_g = bce(judged, 1.0) + torch.zeros(1)" in done.stderr
    assert "at least two devices, cuda:0 and cpu" in done.stderr.splitlines()[-1]


# ---------------------------------------------------------------------------------- the full memory


@pytest.mark.parametrize(
    "card, call",
    [
        ("A100", "to"),  # where the images move to the card
        ("A100", "aten.index_select."),  # where a batch is made
        ("A100", "aten.convolution_backward."),  # in a step
        ("Mac", "aten.convolution_backward."),
    ],
)
def test_a_full_memory_is_one_line(workplace, card, call):
    full = program(card, full_at=call)
    done = run(*flags(**SETTINGS), cwd=workplace, program=full)
    assert done.returncode == 1
    one_line(done.stderr, "out of memory", "lower BATCH_SIZE, IMAGE_SIZE", "Tried")


# ------------------------------------------------------------------------------ a trained generator


def test_the_generator_of_a_card_draws_the_same_faces_there_and_on_a_cpu(finished, tmp_path):
    source = finished("A100")[0] / "output/generator.pt"
    words = ["generate", "--seed", 1, "--precision", "float32", "--checkpoint", source]
    succeed(*words, "--output", "card.png", cwd=tmp_path, program=program("A100"))
    succeed(*words, "--output", "cpu.png", "--device", "cpu", cwd=tmp_path)
    assert torch.equal(pixels(tmp_path / "card.png"), pixels(tmp_path / "cpu.png"))


@pytest.mark.parametrize("card", ["T4", "Mac"])
def test_a_card_draws_a_film(finished, tmp_path, card):
    """By the command that its docstring gives."""
    imitated = [ROOT / "tests/imitated_gpu.py", card, SCRIPT, "interpolate", "--num-faces", 2]
    checkpoint = finished(card)[0] / "output/generator.pt"
    words = ["--checkpoint", checkpoint, "--output", "film.gif"]
    succeed(*words, cwd=tmp_path, program=imitated)
    assert len(film(tmp_path / "film.gif")[0]) == 2 * 16


def test_a_card_measures_the_faces(finished, workplace, weights):
    words = ["--checkpoint", finished("T4")[0] / "output/generator.pt", "--data-dir", "faces"]
    words += ["--num-images", 20, "--max-images", 16]
    options = {"program": program("T4", FEW), "env": {"TORCH_HOME": str(weights)}}
    succeed("evaluate", *words, cwd=workplace, **options)
    [row] = table(workplace / "output/evaluation.csv")
    assert float(row["FID"]) > 0 and 0 <= float(row["precision"]) <= 1
