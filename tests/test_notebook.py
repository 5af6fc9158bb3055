"""Real notebooks: cells run by nbclient in real kernels, as a user of Jupyter or Colab would."""

import asyncio
import base64
import contextlib
import io
import re
import threading

import nbformat
import pytest
from conftest import ROOT, SCRIPT, TINY, checkpoint, dcgan, pixels, until
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

SETUP = f"import dcgan\nvars(dcgan).update({TINY | {'DATA_DIR': 'faces'}})\n"


class Notebook(NotebookClient):
    def add(self, source):
        """Run `source` in a new cell; its outputs."""
        self.nb.cells.append(nbformat.v4.new_code_cell(source))
        return self.execute_cell(self.nb.cells[-1], len(self.nb.cells) - 1).outputs


@contextlib.contextmanager
def opened(folder):
    """A Notebook whose kernel works in `folder`."""
    options = {"timeout": 60, "kernel_name": "python3", "shutdown_kernel": "immediate"}
    notebook = Notebook(nbformat.v4.new_notebook(), **options)
    with notebook.setup_kernel(cwd=str(folder)):
        yield notebook


def text(outputs):
    return "".join(output.text for output in outputs if output.output_type == "stream")


def shown(outputs):
    """The pictures that a cell shows at its end, as tensors (3, height, width) of bytes."""
    data = [output.data for output in outputs if output.output_type == "display_data"]
    contents = [formats.get("image/gif") or formats["image/png"] for formats in data]
    return [pixels(io.BytesIO(base64.b64decode(content))) for content in contents]


def test_imported_it_trains_stops_resumes_and_draws_with_pictures_in_place(workplace):
    with opened(workplace) as notebook:
        outputs = notebook.add(f"{SETUP}dcgan.train()")
        newest, losses = shown(outputs)  # each epoch's faces took the place of the ones before
        assert newest.equal(pixels("output/samples/epoch_002.png"))
        assert losses.equal(pixels("output/losses.png"))
        assert "Warning" not in text(outputs) and "widget" not in str(outputs).lower()

        def interrupt():
            until((workplace / "output/samples/epoch_004.png").exists)
            asyncio.run(notebook.km.interrupt_kernel())

        threading.Thread(target=interrupt).start()
        with pytest.raises(CellExecutionError, match="KeyboardInterrupt"):
            notebook.add("dcgan.EPOCHS = 10**6\ndcgan.train()")
        epoch = checkpoint()["epoch"]
        outputs = notebook.add(f"dcgan.EPOCHS = {epoch + 1}\ndcgan.train()")
        assert f"epoch {epoch + 1}" in text(outputs) and len(shown(outputs)) == 2

        for number in (9, 16):
            outputs = notebook.add(f"faces = dcgan.generate_images({number})\n*faces.shape,")
            [grid] = shown(outputs)
            assert grid.equal(pixels("output/generated.png"))
            assert outputs[-1].data["text/plain"] == f"({number}, 3, 32, 32)"
        [animation] = shown(notebook.add("path = dcgan.interpolate(2, 3)"))
        assert animation.equal(pixels("output/interpolation.gif"))
        with pytest.raises(CellExecutionError, match="EPOCHS"):
            notebook.add("dcgan.EPOCHS = 0\ndcgan.train()")


def pasted(**settings):
    """dcgan.py with other constants."""
    source = SCRIPT.read_text(encoding="utf-8")
    for name, value in settings.items():
        source = re.sub(rf"(?m)^{name} = .*", f"{name} = {value!r}", source)
    return source


def test_pasted_into_a_cell_it_trains_with_the_constants_of_the_cell(workplace):
    with opened(workplace) as notebook:
        outputs = notebook.add(pasted(**TINY | {"DATA_DIR": "faces", "EPOCHS": 1}))
        assert "images: 40" in text(outputs) and "SystemExit" not in str(outputs)
        assert (workplace / "output/generator.pt").exists()
        assert len(shown(notebook.add("generate_images(num_images=16);"))) == 1
        outputs = notebook.add(pasted(EPOCHS=0))
        assert text(outputs).count("\n") == 1 and "EPOCHS" in text(outputs)


NO_PICTURES = "dcgan.Run.draw_pictures = print"
# Stand-ins for what Colab has: {file: its content}
MODULES = {
    "google/colab/drive.py": "import os\ndef mount(place): os.makedirs(place, exist_ok=True)",
    "kagglehub.py": f"dataset_download = {{{dcgan.CELEBA!r}: '../faces'}}.get",
}


def test_the_cells_for_colab_train_and_resume_in_the_next_session(workplace):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = readme.partition("**Colab**")[2].partition("\n**")[0]
    cells = re.findall(r"```python\n(.*?)```", section.replace("/content", ".."), re.DOTALL)
    for name, source in MODULES.items():
        (workplace / name).parent.mkdir(parents=True, exist_ok=True)
        (workplace / name).write_text(source)
    with opened(workplace) as notebook:
        notebook.add(f"import os, sys\nsys.path.insert(0, {str(workplace)!r})")
        for session, epochs in (("one", 1), ("two", 2)):
            disk = workplace / session  # which begins empty
            disk.mkdir()
            notebook.add(f"os.chdir({str(disk)!r})\nsys.modules.pop('dcgan', None)")
            notebook.add(f"{SETUP}dcgan.EPOCHS = {epochs}\n{NO_PICTURES}")
            *_, outputs = map(notebook.add, cells)
            assert "images: 40" in text(outputs) and len(shown(outputs)) == 2
            assert ("resuming" in text(outputs)) == (session == "two")
            assert (workplace / f"drive/MyDrive/dcgan/samples/epoch_{epochs:03d}.png").exists()
            assert not (disk / "output").exists()
