"""FID and KID with the real torch-fidelity, whose Inception has random weights here: no download, the same way."""

import csv
import os
import pickle
import random
import sys
import urllib.request
from pathlib import Path

import pytest
import torch
from conftest import dcgan
from torch_fidelity import feature_extractor_inceptionv3 as inception_module
from torch_fidelity.defaults import DEFAULTS

COLUMNS = ["epoch", "generated", "real", "size", "crop", "network", "fid", "kid"]


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """A file of Inception's weights, random ones of a size that lets the images through all the layers."""
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    extractor = inception_module.FeatureExtractorInceptionV3
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(inception_module, "load_state_dict_from_url", lambda *url, **options: None)
        patched.setattr(extractor, "load_state_dict", lambda network, state: None)
        network = extractor("inception-v3-compat", ["2048"])
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture
def trained(tiny, workplace, monkeypatch):
    """`dcgan` where output/generator.pt is."""
    about = {name: getattr(dcgan, name) for name in dcgan.NETWORK_SETTINGS}
    network = dcgan.Generator(dcgan.IMAGE_SIZE, dcgan.LATENT_SIZE, dcgan.G_FEATURES)
    Path("output").mkdir()
    torch.save({"epoch": 7, "images": 1, "ema": network.state_dict(), "settings": about}, "output/generator.pt")
    monkeypatch.setenv("TORCH_HOME", str(workplace / "torch"))
    return dcgan


@pytest.fixture
def computed(monkeypatch):
    """The numbers of images whose features have been computed."""
    numbers, honest = [], dcgan.features

    def features(inception, batches, number, device):
        numbers.append(number)
        return honest(inception, batches, number, device)

    monkeypatch.setattr(dcgan, "features", features)
    return numbers


@pytest.fixture
def few(monkeypatch):
    """Lets few images do."""
    check = dcgan.Setting.check
    patched = lambda setting, name, value: value if name == "num_images" else check(setting, name, value)  # noqa: E731
    monkeypatch.setattr(dcgan.Setting, "check", patched)
    monkeypatch.setattr(dcgan, "LEAST_IMAGES", 16, raising=False)
    monkeypatch.setitem(DEFAULTS, "kid_subset_size", 12)


def refused(capsys, *arguments):
    """The one line of an evaluation that is a wrong call."""
    assert dcgan.main(["evaluate", *map(str, arguments)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("dcgan.py: error: ") and len(line) < 500
    return line


def faces(first, number=30):
    drawn = [dcgan.draw_face(random.Random(index)).resize((32, 32)) for index in range(first, first + number)]
    return torch.stack([dcgan.pil_to_tensor(face) for face in drawn])


def test_a_set_has_no_distance_from_itself_and_noise_is_farther_from_faces_than_other_faces(weights, few):
    inception = dcgan.load_inception(str(weights), torch.device("cpu"))
    sets = faces(0), faces(1000), torch.randint(256, (30, 3, 32, 32)).byte()
    one, other, noise = (dcgan.features(inception, s.split(20), 30, torch.device("cpu")) for s in sets)
    assert one.shape == (30, 2048) and one.dtype == torch.float32 and one.device.type == "cpu"
    itself, near, far = (dcgan.distances(one[:, :20], features[:, :20])["fid"] for features in (one, other, noise))
    assert abs(itself) < 1e-3 * near and 5 * near < far
    itself, near, far = (dcgan.distances(one, features)["kid"] for features in (one, other, noise))
    assert abs(itself) < 0.01 * far and abs(near) < 0.1 * far


def test_evaluations_are_appended_and_features_of_the_real_images_kept(trained, weights, few, computed, capsys):
    command = ["evaluate", "--num-images", "24", "--data-dir", "faces", "--inception-weights", str(weights)]
    command += ["--max-images", "16"]
    assert dcgan.main(command) == 0
    printed = capsys.readouterr().out
    assert "under 10,000" in printed and "24 generated" in printed and "16 real" in printed
    assert sorted(computed) == [16, 24]
    assert dcgan.main([*command, "--seed", "1"]) == 0
    assert sorted(computed) == [16, 24, 24], "the real images' features were not kept"
    with open("output/evaluation.csv", newline="") as file:
        header, one, two = csv.reader(file)
    assert header == COLUMNS and one[:4] == ["7", "24", "16", "32"]
    assert "square" in one[4] and "inception" in one[5]
    assert one[:6] == two[:6] and one[6] != two[6] and one[7] != two[7]
    assert f"FID {float(one[6]):.2f}" in printed and float(one[6]) > 0


def test_damaged_features_of_the_real_images_are_computed_again(trained, weights, few, computed, monkeypatch):
    command = ["evaluate", "--num-images", "24", "--data-dir", "faces", "--inception-weights", str(weights)]
    command += ["--max-images", "16"]
    monkeypatch.setattr(dcgan.Faces, "batches", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
    for damaged in (False, True):
        assert dcgan.main(command) == 130
        (cached,) = Path("data/cache").glob("inception-*.pt")
        data = cached.read_bytes()
        assert damaged or computed.count(16) == 1
        half = len(data) // 2
        cached.write_bytes(data[:half] + bytes([data[half] ^ 255]) + data[half + 1 :])
    assert computed.count(16) == 2


@pytest.mark.parametrize("number", [0, 2047, "many"])
def test_too_few_images_are_no_fid(trained, capsys, number):
    line = refused(capsys, "--num-images", number)
    assert str(number) in line and (number == "many" or "2,048" in line)


def test_too_few_real_images_are_refused_before_hours_of_work(trained, weights, monkeypatch, capsys):
    monkeypatch.setattr(dcgan, "features", lambda *arguments: pytest.fail("Inception was set to work"))
    line = refused(capsys, "--num-images", 2048, "--data-dir", "faces", "--inception-weights", weights)
    assert "40" in line and "2,048" in line


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize("save", [torch.save, lambda bomb, path: Path(path).write_bytes(pickle.dumps(bomb))])
def test_a_pickle_that_runs_code_is_refused_and_never_runs(trained, capsys, save):
    save({"fc.weight": Bomb()}, "bomb.pth")
    line = refused(capsys, "--num-images", 2048, "--data-dir", "faces", "--inception-weights", "bomb.pth")
    assert "bomb.pth" in line and not Path("exploded").exists()


@pytest.mark.parametrize("kind", ["missing", "folder", "empty", "text", "other weights", "checkpoint", "truncated"])
def test_a_file_that_holds_no_inception_weights_is_refused(trained, weights, capsys, kind):
    path = Path("wrong.pth")
    if kind == "folder":
        path.mkdir()
    elif kind == "other weights":
        torch.save(torch.nn.Linear(2, 2).state_dict(), path)
    elif kind == "checkpoint":
        path = Path("output/generator.pt")
    elif kind != "missing":
        path.write_bytes({"empty": b"", "text": b"hello", "truncated": weights.read_bytes()[: 10**6]}[kind])
    assert str(path) in refused(capsys, "--num-images", 2048, "--data-dir", "faces", "--inception-weights", path)


def test_without_network_the_line_names_the_address_and_the_flag(trained, monkeypatch, capsys):
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setattr(urllib.request, "_opener", None)
    assert dcgan.main(["evaluate", "--num-images", "2048", "--data-dir", "faces"]) == 1
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("dcgan.py: error: ")
    page, name = inception_module.URL_INCEPTION_V3.split("/download/")
    assert page in line and Path(name).name in line and "--inception-weights" in line


def test_without_torch_fidelity_the_line_says_what_to_install(trained, monkeypatch, capsys):
    for name in ("torch_fidelity", *(name for name in sys.modules if name.startswith("torch_fidelity."))):
        monkeypatch.setitem(sys.modules, name, None)
    assert dcgan.main(["evaluate", "--num-images", "2048", "--data-dir", "faces"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "pip install torch-fidelity" in line
