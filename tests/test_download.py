"""The download: the real client of Kaggle against a server on loopback, and its faults."""

import shutil
from pathlib import Path

import pytest
from conftest import dcgan, exit_status, files, flags, one_line, start, until
from kaggle_server import archive_of, serving

FACES = [f"{index:06d}.jpg" for index in range(1, 41)]


@pytest.fixture
def server(all_faces, tiny, tmp_path, monkeypatch):
    """A Kaggle, the only one that processes which this one starts can reach."""
    monkeypatch.setattr(tiny, "DATA_DIR", tiny.CELEBA_DIR)
    with serving(archive_of(all_faces)) as server:
        for name, value in server.environment(tmp_path / "home").items():
            monkeypatch.setenv(name, value)
        yield server


@pytest.fixture
def download(server, capfd):
    """`python dcgan.py download ARGUMENTS` in this process: what it and the client say.

    No token, and with another exit `status` than 0 our own line at the end, with these words.
    """

    def call(*arguments, status=0, words=()):
        capfd.readouterr()
        assert exit_status("download", *arguments) == status
        said = "".join(capfd.readouterr())
        assert "good-token" not in said and "stale-token" not in said
        if status:
            one_line(said.splitlines(keepends=True)[-1], *words)
        return said

    return call


def images(folder="data/celeba"):
    """The names of the images, if nothing but them and their table is left of a download."""
    *names, table = sorted(Path(name).name for name in files(folder))
    assert table == "list_attr_celeba.csv"
    return names


def ranges(server):
    return [part for _, _, part, _ in server.requests if part]


def test_celeba_is_downloaded_once_without_an_account_and_trained_on(server, capfd):
    assert exit_status(*flags(DATA_DIR="data/celeba", EPOCHS=1)) == 0
    assert images() == FACES and "images: 40" in capfd.readouterr().out
    assert {account for _, account, _, _ in server.requests} == {None}
    server.requests.clear()
    assert exit_status(*flags(DATA_DIR="data/celeba", EPOCHS=2)) == 0
    assert server.requests == []


def test_attributes_come_from_the_downloaded_table(download, tiny, monkeypatch):
    download()
    monkeypatch.setattr(tiny, "ATTRIBUTES", "Eyeglasses,Male")
    paths = [f"{tiny.DATA_DIR}/images/img_align_celeba/img_align_celeba/{name}" for name in FACES]
    _, labels = tiny.read_labels(Path(tiny.DATA_DIR), paths)
    assert labels.tolist() == [[number >> 2 & 1, number & 1] for number in range(1, 41)]


def test_a_token_is_used_and_not_printed_by_a_verbose_client(download, server, monkeypatch):
    server.needs_token = True
    monkeypatch.setenv("KAGGLE_API_TOKEN", "good-token")
    monkeypatch.setenv("VERBOSE", "1")
    download()
    assert images() == FACES


def test_nothing_in_the_working_directory_is_imported_by_the_client(download):
    for name in ("requests", "kaggle", "yaml", "runpy"):
        Path(f"{name}.py").write_text("raise SystemExit('this was imported')")
    download()
    assert images() == FACES


@pytest.mark.parametrize("filled", [True, False])
def test_a_folder_without_images_is_filled_and_no_other(download, server, all_faces, filled):
    folder = Path("data/celeba")
    folder.mkdir(parents=True)
    (folder / "notes.md").write_text("mine")
    if filled:
        shutil.copy(all_faces / "000000.jpg", folder)
    download()
    (folder / "notes.md").unlink()  # it was still there
    assert (server.requests == []) if filled else images() == FACES


def test_a_folder_with_images_is_never_written_to(workplace, monkeypatch):
    Path("data").mkdir()
    Path("data/celeba").symlink_to(Path("faces").resolve())
    monkeypatch.setattr(dcgan, "FileLock", None)
    assert dcgan.prepare_data("data/celeba") == Path("data/celeba").absolute()


def test_another_data_set_goes_to_another_folder(download, server):
    download("--kaggle-dataset", "someone/cats", status=2, words=["DATA_DIR"])
    assert server.requests == []
    download("--kaggle-dataset", "someone/cats", "--data-dir", "cats")
    assert images("cats") == FACES and not Path("data").exists()
    asked = [body for method, _, _, body in server.requests if method == "POST"]
    assert asked and all("someone" in body and "cats" in body for body in asked)


def test_a_cut_connection_resumes_where_it_was(download, server):
    server.cut = 1_500_000
    download()
    assert images() == FACES and ranges(server) == ["bytes=1048576-"]


def test_a_killed_run_takes_the_client_with_it_and_the_next_one_resumes(download, server):
    server.stall = 2_500_000
    archive = Path("data/celeba/.part/celeba-dataset.zip")
    with start("download", cwd=".") as process:
        until(lambda: archive.exists() and archive.stat().st_size == 2 << 20, process)
        assert not server.left.is_set()
        process.kill()
    assert server.left.wait(3), "the client outlives the run that has started it"
    assert ranges(server) == []
    download()
    assert images() == FACES and ranges(server) == ["bytes=2097152-"]


def test_where_storage_refuses_the_rest_the_next_run_resumes(download, server):
    server.cut, server.expired = 1_500_000, True
    download(status=1, words=["run this again"])
    server.expired = False
    server.requests.clear()
    download()
    assert images() == FACES and ranges(server) == ["bytes=1048576-"]


def test_an_error_page_instead_of_the_archive_is_replaced_by_the_next_run(download, server):
    good, server.archive = server.archive, b"<html>sorry</html>"
    download(status=1, words=["run this again"])
    assert not Path("data/celeba/images").exists()
    server.archive = good
    download()
    assert images() == FACES


def test_a_silent_server_is_asked_again_for_the_rest_or_given_up(download, server, monkeypatch):
    code = dcgan.KAGGLE_CHILD.replace('"timeout": 60', '"timeout": 0.1')
    monkeypatch.setattr(dcgan, "KAGGLE_CHILD", code)
    server.mute = True
    download(status=1, words=["run this again"])
    server.mute, server.stall = False, 1_500_000
    download()
    assert images() == FACES and ranges(server) == ["bytes=1048576-"]


@pytest.mark.parametrize("token, refusal", [("", 401), ("", 404), ("stale-token", None)])
def test_the_clients_own_words_and_a_line_of_ours_are_shown_where_it_fails(
    download, server, monkeypatch, token, refusal
):
    server.refusal = refusal
    monkeypatch.setenv("KAGGLE_API_TOKEN", token)
    ways = ["https://www.kaggle.com/settings", "~/.kaggle/access_token", "--data-dir", "--demo"]
    said = download(status=1, words=ways)
    assert ("404 Client Error" if refusal == 404 else "Authentication required") in said
    assert not Path("data").exists()


def test_a_small_disk_is_named_before_anything_is_asked(download, server, monkeypatch, tmp_path):
    usage = shutil.disk_usage(".")._replace(free=2_000_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    download(status=1, words=["2.90 GB", "2.00", tmp_path / "data"])
    assert server.requests == []
