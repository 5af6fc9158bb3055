"""A real notebook, run by nbclient in a real kernel, as a user of Jupyter or Colab would."""

import asyncio
import base64
import threading

import nbformat
import pytest
from conftest import ROOT, TINY
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

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


@pytest.fixture(scope="module")
def notebook(workplace):
    client = NotebookClient(nbformat.v4.new_notebook(), timeout=120, kernel_name="python3")
    with client.setup_kernel():
        yield Notebook(workplace, client)


def text(outputs, name=None):
    """What has been printed, on the stream `name` or on both."""
    streams = [output for output in outputs if output.output_type == "stream"]
    return "".join(output.text for output in streams if name in (None, output.name))


def test_training_and_new_faces_show_in_a_notebook_without_noise(notebook, workplace):
    outputs = notebook.add("dcgan.EPOCHS = 2\ndcgan.train()")
    assert "finished" in text(outputs)
    assert "Warning" not in text(outputs) and "widget" not in str(outputs).lower(), text(outputs)
    lines = text(outputs, "stderr").count("\n")
    assert lines <= 3, "more than a line of decoding and one an epoch"
    assert (workplace / "output/generator.pt").exists()

    code = "images = dcgan.generate_images(num_images=16)\n(*images.shape, images.dtype)"
    outputs = notebook.add(code)
    (shown,) = (output for output in outputs if output.output_type == "display_data")
    assert base64.b64decode(shown.data["image/png"]).startswith(b"\x89PNG")
    (result,) = (output for output in outputs if output.output_type == "execute_result")
    assert result.data["text/plain"] == "(16, 3, 32, 32, torch.float32)"
    assert "seed" in text(outputs) and "output/generated.png" in text(outputs)

    outputs = notebook.add("dcgan.EPOCHS = 3\ndcgan.train()")
    assert "epoch 3, step 1" in text(outputs)
    with pytest.raises(CellExecutionError, match="EPOCHS"):
        notebook.add("dcgan.EPOCHS = 0\ndcgan.train()")


def test_interrupting_the_kernel_keeps_the_work_and_train_goes_on(notebook, workplace):
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
    assert f"epoch {epoch + 1}, step {step + 1}" in text(outputs) and "finished" in text(outputs)
