"""FID, KID, precision and recall by the real torch-fidelity.

Its Inception has random weights here, from where torch-fidelity keeps them: nothing is downloaded.
"""

import csv
import random
import re
import sys
import urllib.request
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from conftest import ROOT, dcgan, refused
from torch_fidelity import feature_extractor_inceptionv3 as inception_module
from torch_fidelity.defaults import DEFAULTS

METRICS = ["FID", "KID", "precision", "recall"]
COLUMNS = ["epoch", "generated", "real", "size", "crop", "network", "data", *METRICS]
CPU = torch.device("cpu")


@pytest.fixture
def trained(tiny, workplace, monkeypatch):
    """`dcgan` where output/generator.pt is."""
    network = dcgan.Generator(dcgan.IMAGE_SIZE, dcgan.LATENT_SIZE, dcgan.G_FEATURES)
    state = {
        "epoch": 7,
        "images": 1,
        "average": dcgan.refresh_batchnorm(network).state_dict(),
        "settings": {name: getattr(dcgan, name) for name in dcgan.NETWORK_SETTINGS},
    }
    Path("output").mkdir()
    torch.save(state, "output/generator.pt")
    monkeypatch.setenv("TORCH_HOME", str(workplace / "torch"))  # where no weights are
    return dcgan


@pytest.fixture
def few(monkeypatch, weights):
    """Lets few images do, and takes FID of a layer of 192 features: of 2,048 it takes seconds."""
    monkeypatch.setenv("TORCH_HOME", str(weights))
    monkeypatch.setattr(dcgan, "LEAST_IMAGES", 16)
    monkeypatch.setitem(DEFAULTS, "kid_subset_size", 12)
    monkeypatch.setitem(DEFAULTS, "feature_layer_fid", "192")


@pytest.fixture
def handed_out(monkeypatch):
    """{number of images of a set: {index: image}} of what torch-fidelity has asked for."""
    asked, honest = defaultdict(dict), dcgan.ImageTensors.__getitem__

    def getitem(images, index):
        asked[len(images)][index] = honest(images, index)
        return asked[len(images)][index]

    monkeypatch.setattr(dcgan.ImageTensors, "__getitem__", getitem)
    return asked


def command(*arguments):
    """An evaluation of few images."""
    words = ["evaluate", "--num-images", 20, "--data-dir", "faces", "--max-images", 16]
    return list(map(str, [*words, *arguments]))


def rows():
    with open("output/evaluation.csv", newline="") as file:
        return list(csv.reader(file))


WORDS = ("evaluate", "--data-dir", "faces")


# ---------------------------------------------------------------------------------------- distances


def faces(first, number=30):
    """Drawn faces (number, 3, 32, 32) in [0, 1]."""
    drawn = (dcgan.draw_face(random.Random(index)) for index in range(first, first + number))
    return torch.stack([dcgan.pil_to_tensor(face.resize((32, 32))) / 255 for face in drawn])


def distances(fakes, reals, name):
    def tensors(images):
        return dcgan.ImageTensors(iter(images), len(images), dcgan.progress_bar(None, None, "", ""))

    return dcgan.distances(tensors(fakes), tensors(reals), name, CPU)


@pytest.mark.slow
def test_distances_say_what_is_near_what_is_strange_and_what_is_alike(tiny, few):
    torch.manual_seed(0)
    reals = faces(0)
    noise = torch.rand(reals.shape)
    alike = reals[:6].repeat(5, 1, 1, 1)
    alike += torch.rand(alike.shape).sub_(0.5).div_(255)
    half_noise = torch.cat([reals[:15], noise[15:]])

    itself, other, strange, repeated, half_strange = (
        distances(fakes, reals, "reals") for fakes in (reals, faces(1000), noise, alike, half_noise)
    )
    assert list(itself) == METRICS
    assert abs(itself["FID"]) < 1e-3 * other["FID"] and 5 * other["FID"] < strange["FID"]
    # KID's estimate is of an expectation that is 0 for both: it may lie below.
    assert abs(itself["KID"]) < 0.01 * strange["KID"] and abs(other["KID"]) < 0.1 * strange["KID"]
    for name in ("precision", "recall"):
        assert itself[name] == 1 and 0.5 < other[name] <= 1 and strange[name] == 0
    assert repeated["precision"] > 0.9 and repeated["recall"] < 0.5
    assert half_strange["precision"] == pytest.approx(0.5)


# -------------------------------------------------------------------------------------- evaluations


def test_evaluations_are_printed_appended_and_returned(trained, few, capsys):
    assert dcgan.main(command()) == 0
    printed = capsys.readouterr().out
    assert "fewer than 10,000" in printed
    assert "generated 20" in printed and "real 16" in printed
    dcgan.DATA_DIR, dcgan.MAX_IMAGES = "faces", 16
    returned = dcgan.evaluate(20, seed=0)
    assert dcgan.main(command("--seed", 1)) == 0
    header, default, zero, one = rows()
    assert header == COLUMNS
    assert default[:5] == ["7", "20", "16", "32", "centre square"]
    assert "inception" in default[5]
    assert zero == default, "the seed is not 0 unless another is given"
    assert one[:7] == default[:7] and one[7:9] != default[7:9]

    assert default[6] == str(Path("faces").absolute())
    found = dict(zip(METRICS, map(float, default[7:])))
    assert found["FID"] > 0
    assert 0 <= found["precision"] <= 1 and 0 <= found["recall"] <= 1
    assert list(returned) == METRICS and returned == pytest.approx(found, rel=1e-5)
    said = {name: float(re.search(rf"{name} ([-+.\de]+)", printed)[1]) for name in METRICS}
    assert said == pytest.approx(found, rel=1e-3)


def test_features_of_the_real_images_are_kept_until_those_change(trained, few, handed_out):
    assert dcgan.main(command()) == 0
    assert {number: len(images) for number, images in handed_out.items()} == {20: 20, 16: 16}
    reals = torch.stack([image for _, image in sorted(handed_out[16].items())])
    wanted = [dcgan.read_face(f"faces/{index:06d}.jpg", 32) for index in range(16)]
    assert torch.equal(reals, torch.stack(wanted))

    handed_out.clear()
    assert dcgan.main(command("--seed", 1)) == 0
    assert list(handed_out) == [20], "the real images' features were not kept"

    handed_out.clear()
    assert dcgan.main(command("--max-images", 17)) == 0
    assert sorted(handed_out) == [17, 20], "other real images' features were taken"


def test_a_place_for_features_that_cannot_be_written_is_named_before_hours_of_work(
    trained, few, handed_out, capsys
):
    Path("data/cache").mkdir(parents=True)
    Path("data/cache/inception").touch()
    assert "data/cache/inception" in refused(capsys, *command(), status=1)
    assert not handed_out


def test_new_columns_are_named_below_the_rows_of_old_ones(trained):
    Path("output/evaluation.csv").write_bytes(b"epoch,fid\n1,99\n")
    for epoch in (7, 8):
        dcgan.append_evaluation({"epoch": epoch, "FID": 1.5})
    assert rows() == [["epoch", "fid"], ["1", "99"], ["epoch", "FID"], ["7", "1.5"], ["8", "1.5"]]


# ---------------------------------------------------------------------- what is refused, and before


@pytest.fixture
def no_work(monkeypatch):
    """Nothing may be measured."""
    monkeypatch.setattr(dcgan, "distances", lambda *_: pytest.fail("Inception was set to work"))


def test_too_few_images_are_refused_before_hours_of_work(trained, no_work, capsys):
    for number, says in ((0, "1..1000000000"), (2047, "2,048 or more")):
        line = refused(capsys, *WORDS, "--num-images", number)
        assert "num_images (--num-images)" in line and str(number) in line and says in line
    line = refused(capsys, *WORDS, "--num-images", 2048)
    assert "holds 40 images" in line and "2,048 or more" in line  # the real ones are too few


def test_without_network_the_line_says_where_to_read_what_to_do(
    trained, few, workplace, monkeypatch, capsys
):
    monkeypatch.setenv("TORCH_HOME", str(workplace / "torch"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setattr(urllib.request, "_opener", None)
    assert dcgan.main(command()) == 1
    *_, line = capsys.readouterr().err.splitlines()  # PyTorch says before that it downloads
    assert line.startswith("dcgan.py: error: torch-fidelity cannot download its weights")
    assert "README" in line
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert inception_module.URL_INCEPTION_V3 in readme and "hub/checkpoints" in readme


def test_without_torch_fidelity_the_line_says_what_to_install(
    trained, no_work, monkeypatch, capsys
):
    parts = [name for name in sys.modules if name.startswith("torch_fidelity.")]
    for name in ("torch_fidelity", *parts):
        monkeypatch.setitem(sys.modules, name, None)
    assert "pip install torch-fidelity" in refused(capsys, *WORDS, status=1)
