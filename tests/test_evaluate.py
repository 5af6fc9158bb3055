"""FID, KID, precision and recall by torch-fidelity, whose Inception has random weights here."""

import shutil
import sys

import pytest
import torch
import torch_fidelity
from conftest import ROOT, TINY, refused, same, table
from torch_fidelity.defaults import DEFAULTS
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

import dcgan

FOUND = {"frechet_inception_distance": 1.5, "kernel_inception_distance_mean": 2.5}
FOUND |= {"kernel_inception_distance_std": 9.0, "precision": 0.75, "recall": 0.25, "f_score": 9.0}


@pytest.fixture
def many(copied, monkeypatch):
    """There seem to be 2,080 real images: those of the run again and again."""
    faces = dcgan.load_faces("faces", TINY["IMAGE_SIZE"])[0].repeat(52, 1, 1, 1)
    monkeypatch.setattr(dcgan, "load_faces", lambda folder, size: (faces, [], "key", None))
    monkeypatch.setattr(dcgan, "DEVICE", "cpu")
    return faces


@pytest.fixture
def asked(monkeypatch):
    """The options of the last call of torch-fidelity, which returns FOUND."""
    options = {}
    monkeypatch.setattr(torch_fidelity, "calculate_metrics", lambda **o: options.update(o) or FOUND)
    return options


def test_each_number_comes_back_under_its_name_and_in_a_row_of_the_table(many, asked, capsys):
    wanted = {"epoch": 3, "generated": 2048, "real": 2080} | FOUND
    assert dcgan.evaluate(2048) == wanted
    assert "precision 0.75\nrecall 0.25\n" in capsys.readouterr().out
    assert dcgan.main(["evaluate", "--num-images", "2100"]) == 0
    first, second = table("output/evaluation.csv")
    assert first == {name: str(value) for name, value in wanted.items()}
    assert second == first | {"generated": "2100"}


def test_new_faces_of_a_seed_are_compared_with_the_real_images(many, asked):
    dcgan.evaluate(2048, seed=1)
    assert asked["fid"] and asked["kid"] and asked["prc"]
    assert (len(asked["input1"]), len(asked["input2"])) == (2048, 2080)
    faces = dcgan.generate_images(64, seed=1).mul(255).round().byte()
    assert same([asked["input1"][:64], asked["input2"][:64]], [[*faces], [*many[:64]]])


def test_of_over_50000_real_images_evenly_spread_ones_are_taken(many, asked, monkeypatch):
    faces = torch.arange(100_001)
    monkeypatch.setattr(dcgan, "load_faces", lambda folder, size: (faces, [], "key", None))
    assert dcgan.evaluate(2048)["real"] <= 50_000
    taken = torch.stack(asked["input2"])
    assert taken.diff().unique().tolist() == [3] and taken[-1] > 99_990, "not evenly spread"


@pytest.mark.parametrize("words, number", [((), 40), (("--data-dir", "few"), 3)])
def test_the_real_images_are_those_of_the_run_or_of_data_dir(copied, capsys, words, number):
    shutil.copytree("faces", "few", ignore=lambda folder, names: sorted(names)[3:])
    refused(capsys, "evaluate", "--device", "cpu", *words, words=["2,048", f"{number} real"])


def test_too_few_new_faces_are_refused_before_hours_of_work(many, asked, capsys):
    refused(capsys, "evaluate", "--num-images", 2047, words=["2,048", "2,047"])
    assert not asked


def test_without_network_the_line_says_where_to_read_what_to_do(many, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_HOME", "nothing")
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    assert dcgan.main(["evaluate", "--num-images", "2048"]) == 1
    *_, line = capsys.readouterr().err.splitlines()  # PyTorch says before that it downloads
    assert line.startswith("dcgan.py: error: ") and "README" in line and "torch-fidelity" in line
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert URL_INCEPTION_V3 in readme and "hub/checkpoints" in readme


def test_without_torch_fidelity_one_line_says_so(copied, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    refused(capsys, "evaluate", status=1, words=["torch_fidelity"])


def test_copies_of_few_real_images_are_precise_but_recall_little(many, inception, monkeypatch):
    """By the real torch-fidelity, of 20 and 20 images; FID and KID of fewer features and images."""
    monkeypatch.setenv("TORCH_HOME", str(inception))
    monkeypatch.setitem(DEFAULTS, "feature_layer_fid", "192")
    monkeypatch.setitem(DEFAULTS, "kid_subset_size", 12)
    images = dcgan.Images
    monkeypatch.setattr(dcgan, "Images", lambda many: images(list(many)[:20]))
    copies = many[:4].repeat(5, 1, 1, 1) / 255
    monkeypatch.setattr(dcgan.TrainedGenerator, "images", lambda trained, *about: iter(copies))
    found = dcgan.evaluate(2048)
    assert found["precision"] > 0.9 and found["recall"] < 0.5, "recall and precision are swapped"
