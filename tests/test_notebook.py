"""A real notebook, run by nbclient in a real kernel, as a user of Jupyter or Colab would."""

import asyncio
import base64
import contextlib
import io
import re
import threading

import nbformat
import numpy as np
import pytest
from conftest import ROOT, TINY, resuming
from kaggle_server import serving
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from PIL import Image

SETUP = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import dcgan
for name, value in {TINY | {"DATA_DIR": "faces"}}.items():
    setattr(dcgan, name, value)
"""


class Notebook:
    """Cells run one by one in a kernel that works in `folder`."""

    def __init__(self, folder, client):
        self.client = client
        self.add(f"{SETUP}os.chdir({str(folder)!r})")

    def add(self, source):
        """Run `source` in a new cell; its outputs."""
        cell = nbformat.v4.new_code_cell(source)
        self.client.nb.cells.append(cell)
        self.client.execute_cell(cell, len(self.client.nb.cells) - 1)
        return cell.outputs


@pytest.fixture(scope="module")
def workplace(all_faces, tmp_path_factory):
    folder = tmp_path_factory.mktemp("notebook")
    (folder / "faces").symlink_to(all_faces)
    return folder


@contextlib.contextmanager
def opened(folder, **options):
    """A Notebook in `folder`; `options` are for its kernel."""
    client = NotebookClient(nbformat.v4.new_notebook(), timeout=120, kernel_name="python3")
    with client.setup_kernel(**options):
        yield Notebook(folder, client)


@pytest.fixture(scope="module")
def notebook(workplace):
    with opened(workplace) as notebook:
        yield notebook


def text(outputs, name=None):
    """What has been printed, on the stream `name` or on both."""
    streams = [output for output in outputs if output.output_type == "stream"]
    return "".join(output.text for output in streams if name in (None, output.name))


def shown(outputs):
    """The pictures that a cell shows, as arrays (height, width, 3)."""
    displayed = [output for output in outputs if output.output_type == "display_data"]
    files = [io.BytesIO(base64.b64decode(output.data["image/png"])) for output in displayed]
    return [np.asarray(Image.open(file).convert("RGB")) for file in files]


def test_training_and_new_faces_show_in_a_notebook_without_noise(notebook, workplace):
    outputs = notebook.add("dcgan.EPOCHS = 2\ndcgan.train()")
    assert "finished" in text(outputs)
    newest, losses = shown(outputs)  # each epoch's faces take the place of the ones before
    for picture, name in ((newest, "samples/epoch_002.png"), (losses, "losses.png")):
        written = Image.open(workplace / "output" / name).convert("RGB")
        assert np.array_equal(picture, np.asarray(written)), name
    assert "Warning" not in text(outputs) and "widget" not in str(outputs).lower(), text(outputs)
    lines = text(outputs, "stderr").count("\n")
    assert lines <= 3, "more than a line of decoding and one an epoch"
    assert (workplace / "output/generator.pt").exists()

    code = "images = dcgan.generate_images(num_images=16)\n(*images.shape, images.dtype)"
    outputs = notebook.add(code)
    (grid,) = shown(outputs)
    assert grid.shape == (4 * 34 + 2, 4 * 34 + 2, 3)
    (result,) = (output for output in outputs if output.output_type == "execute_result")
    assert result.data["text/plain"] == "(16, 3, 32, 32, torch.float32)"
    assert "seed" in text(outputs) and "output/generated.png" in text(outputs)

    outputs = notebook.add("dcgan.EPOCHS = 3\ndcgan.train()")
    assert "epoch 3, step 1" in text(outputs)
    with pytest.raises(CellExecutionError, match="EPOCHS"):
        notebook.add("dcgan.EPOCHS = 0\ndcgan.train()")


def test_interrupting_the_kernel_keeps_the_work_and_train_resumes(notebook, workplace):
    ended = threading.Event()

    def interrupt():
        while not (workplace / "stopped/samples/epoch_003.png").exists() and not ended.wait(0.05):
            pass
        asyncio.run(notebook.client.km.interrupt_kernel())

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(CellExecutionError, match="Interrupt"):
        notebook.add("dcgan.OUTPUT_DIR = 'stopped'\ndcgan.EPOCHS = 10**6\ndcgan.train()")
    ended.set()
    thread.join()

    code = "state = dcgan.read_checkpoint('stopped/checkpoint.pt')\nstate['epoch'], state['step']"
    epoch, step = eval(notebook.add(code)[-1].data["text/plain"])
    assert epoch >= 2
    outputs = notebook.add(f"dcgan.EPOCHS = {epoch + 1}\ndcgan.train()")
    assert resuming(epoch, step, "stopped") in text(outputs) and "finished" in text(outputs)


# ------------------------------------------------------------------------- the cells in the README


def cells(title, folder):
    """The cells below `title` in the README, with folders of theirs in `folder`."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = readme.partition(f"**{title}**")[2].partition("\n**")[0]
    found = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert found
    place = f'"{folder.as_posix()}/'
    return [re.sub('"/(content|kaggle|tmp)/', lambda _: place, cell) for cell in found]


DRIVE = """
from pathlib import Path
def mount(place):
    Path(place, "MyDrive").mkdir(parents=True, exist_ok=True)
"""


def test_the_cells_for_colab_train_and_resume_in_the_next_session(archive, tmp_path):
    modules = tmp_path / "home/modules"  # where the server's environment has Python look first
    (modules / "google/colab").mkdir(parents=True)
    (modules / "google/colab/drive.py").write_text(DRIVE)
    drive = tmp_path / "drive/MyDrive/dcgan"
    for session, epochs in (("one", 1), ("two", 2)):
        disk = tmp_path / session  # a session's own, which begins empty
        disk.mkdir()
        with (
            serving(archive) as server,
            opened(disk, env=server.environment(tmp_path / "home")) as notebook,
        ):
            notebook.add(f"dcgan.EPOCHS = {epochs}")
            mount, train = map(notebook.add, cells("Colab", tmp_path))
        assert "error" not in text(mount).lower()
        assert "40 images" in text(train) and f", {epochs} epoch" in text(train)
        assert ("resuming from" in text(train)) == (session == "two")
        assert len(shown(train)) == 3
        assert (drive / f"samples/epoch_{epochs:03d}.png").exists()
        assert not (disk / "output").exists()


def test_the_cells_for_kaggle_train_on_the_data_set(archive, tmp_path):
    with (
        serving(archive) as server,
        opened(tmp_path, env=server.environment(tmp_path / "home")) as notebook,
    ):
        (outputs,) = map(notebook.add, cells("Kaggle notebook", tmp_path))
    assert "40 images" in text(outputs) and len(shown(outputs)) == 3
    assert (tmp_path / "output/generated.png").exists()
    assert list((tmp_path / "cache").glob("*.npy")) and not (tmp_path / "data").exists()


# ------------------------------------------------------------------- the file itself in a notebook


@pytest.fixture
def bare(all_faces, tmp_path):
    """A notebook that does not import dcgan, in a folder that holds `faces`."""
    (tmp_path / "faces").symlink_to(all_faces)
    with opened(tmp_path) as notebook:
        notebook.client.nb.cells.clear()
        yield notebook


def edited(**settings):
    """dcgan.py with other constants."""
    source = (ROOT / "dcgan.py").read_text(encoding="utf-8")
    for name, value in settings.items():
        source, count = re.subn(rf"^{name} = .*", f"{name} = {value!r}", source, flags=re.MULTILINE)
        assert count == 1
    return source


def test_pasted_into_a_cell_it_trains_with_the_constants_of_the_cell(bare, tmp_path):
    outputs = bare.add(edited(**TINY | {"DATA_DIR": "faces", "EPOCHS": 1}))
    said = text(outputs)
    assert "40 images" in said and "finished" in said and "SystemExit" not in str(outputs)
    assert said.splitlines()[-1].endswith("to generate new faces: generate_images(num_images=16)")
    (tmp_path / "output/generator.pt").stat()
    assert len(shown(bare.add("generate_images(num_images=16);"))) == 1
    again = bare.add("EPOCHS = 2\ntrain();")
    assert "epoch 2, step 1" in text(again)


def test_pasted_into_a_cell_a_wrong_constant_is_one_line(bare):
    outputs = bare.add(edited(EPOCHS=0))
    assert text(outputs, "stderr").count("\n") == 1 and "EPOCHS" in text(outputs, "stderr")


def test_run_by_percent_run_it_takes_the_flags_given(bare, tmp_path):
    (tmp_path / "dcgan.py").write_text(edited(**TINY | {"DATA_DIR": "faces"}), encoding="utf-8")
    outputs = bare.add("%run dcgan.py --epochs 1 --output-dir here")
    assert "finished" in text(outputs) and "SystemExit" not in str(outputs)
    assert (tmp_path / "here/generator.pt").exists()
