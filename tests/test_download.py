"""The download: the real client of Kaggle against a server on loopback, and all its faults."""

import copy
import io
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT, SCRIPT, flags, own_mounts, start, until
from kaggle_server import NAME, TABLE_BYTES, archive_of, serving
from PIL import Image
from reading import metrics

SECRETS = ("good-token", "good-key", "c29tZW9uZTpnb29kLWtleQ", "stale-token", "stale-key")
QUICK = flags(EPOCHS=1)


@pytest.fixture
def server(archive, workplace):
    """A Kaggle that serves the archive; `server.home` is for the environment."""
    with serving(archive) as server:
        server.home = workplace / "home"
        server.home.mkdir()
        yield server


def process(server, cwd, *arguments, script=SCRIPT, before=(), **variables):
    """Start the script against the server."""
    environment = server.environment(server.home, **variables)
    return start(*arguments, cwd=cwd, program=[script], before=before, env=environment)


def ended(process, status=0, timeout=120):
    """(stdout, stderr) of a process that ends with this status, without traceback or secret."""
    with process:
        try:
            out, err = process.communicate(timeout=timeout)
        finally:
            process.kill()
    return checked(out, err, process.returncode, status)


def checked(out, err, status, wanted):
    """(stdout, stderr), when a run has ended as it should."""
    assert status == wanted, out + err
    assert "Traceback" not in out + err
    assert not [secret for secret in SECRETS if secret in out + err]
    errors = re.findall(r"dcgan\.py: error: .+", err)
    assert len(errors) == (wanted in (1, 2)), err
    return out, err


class InProcess:
    """`python dcgan.py` in this process; Kaggle's client runs in one of its own."""

    def __init__(self, dcgan, server, monkeypatch, capfd):
        self.dcgan, self.server, self.monkeypatch, self.capfd = dcgan, server, monkeypatch, capfd

    def __call__(self, *arguments, status=0, **variables):
        environment = self.server.environment(self.server.home, VERBOSE="1", **variables)
        with self.monkeypatch.context() as patched:
            for name, value in environment.items():
                patched.setenv(name, value)
            before = dict(os.environ)
            self.capfd.readouterr()
            result = self.dcgan.main(list(arguments))
            assert dict(os.environ) == before
        return checked(*self.capfd.readouterr(), result, status)

    def fails(self, *arguments, status=1, lines=1, **variables):
        """The error's text, when nothing passes for a data set afterwards."""
        err = self(*arguments, status=status, **variables)[1]
        assert not Path("data/celeba/images").exists()
        error = err[err.index("dcgan.py: error: ") :]
        assert error.count("\n") <= lines
        return error


@pytest.fixture
def dcgan_run(tiny, server, monkeypatch, capfd):
    monkeypatch.setattr(tiny, "DATA_DIR", tiny.CELEBA_DIR)
    monkeypatch.setattr(tiny, "EPOCHS", 1)
    return InProcess(tiny, server, monkeypatch, capfd)


def images(place=Path()):
    """The names of the images, when only they and their attributes are left of a download."""
    assert set(os.listdir(place / "data")) - {"cache", "celeba.lock"} == {"celeba"}
    files = [path for path in (place / "data/celeba").rglob("*") if not path.is_dir()]
    assert all(path.is_file() and not path.is_symlink() for path in files)
    return sorted(path.name for path in files if path.name != "list_attr_celeba.csv")


def ranges(server):
    return [request[3] for request in server.downloads() if request[3]]


FACES = [f"{index:06d}.jpg" for index in range(1, 41)]

# --------------------------------------------------------------------------------- what should work


def test_without_an_account_it_downloads_once_says_so_in_a_line_and_trains(server, workplace):
    out, err = ended(process(server, workplace, *QUICK))
    [attributes] = (workplace / "data/celeba").rglob("list_attr_celeba.csv")
    assert attributes.stat().st_size == TABLE_BYTES
    assert "left out" not in out
    assert images(workplace) == FACES and (workplace / "output/generator.pt").is_file()
    first, *others = out.splitlines()
    assert "kaggle" in first.lower() and "kaggle" not in str(others).lower()  # none of theirs
    assert "; 40 images, " in out
    assert {request[2] for request in server.requests} == {None}

    server.requests.clear()
    broken = workplace / "broken/kaggle"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise SystemExit('kaggle was imported')")
    run = process(server, workplace, *flags(EPOCHS=2), PYTHONPATH=str(broken.parent))
    out, err = ended(run)
    assert server.requests == [] and "kaggle" not in (out + err).lower()


# {id: (files in ~/.kaggle, variables)}
CREDENTIALS = {
    "token variable": ({}, {"KAGGLE_API_TOKEN": "good-token\n"}),
    "token file": ({"access_token": "good-token\n"}, {}),
    "kaggle.json": ({"kaggle.json": '{"username": "someone", "key": "good-key"}'}, {}),
    "key pair": ({}, {"KAGGLE_USERNAME": "someone\n", "KAGGLE_KEY": "good-key\n"}),
}


@pytest.mark.parametrize("kind", CREDENTIALS)
def test_good_credentials_are_used_newline_or_not(dcgan_run, server, kind):
    server.needs_token = True
    files, variables = CREDENTIALS[kind]
    save_credentials(server.home, files)
    dcgan_run(**variables)
    assert images() == FACES


@pytest.mark.parametrize("kind", [*CREDENTIALS, "broken kaggle.json"])
def test_stale_credentials_are_no_worse_than_none(dcgan_run, server, kind):
    broken = {"kaggle.json": "{not json: good-key"}, {}
    files, variables = CREDENTIALS.get(kind, broken)
    files = {name: text.replace("good", "stale") for name, text in files.items()}
    save_credentials(server.home, files)
    dcgan_run(**{name: text.replace("good", "stale") for name, text in variables.items()})
    assert images() == FACES and server.requests[-1][2] is None
    assert {path.name: path.read_text() for path in (server.home / ".kaggle").glob("*")} == files


def save_credentials(home, files):
    (home / ".kaggle").mkdir()
    for name, text in files.items():
        (home / ".kaggle" / name).write_text(text)
        (home / ".kaggle" / name).chmod(0o600)


def test_two_runs_at_once_with_a_token_download_once(server, workplace):
    server.needs_token, account = True, {"KAGGLE_API_TOKEN": "good-token\n", "VERBOSE": "1"}
    places = [["--output-dir", f"output-{number}"] for number in range(2)]
    runs = [process(server, workplace, *QUICK, *place, **account) for place in places]
    with runs[1]:
        ended(runs[0])
        ended(runs[1])
    assert images(workplace) == FACES and len(server.downloads()) == 1


def test_the_command_downloads_to_any_folder_and_does_nothing_else(dcgan_run, server):
    out, _ = dcgan_run("download", "--data-dir", "scratch/faces")
    assert out.splitlines()[-1] == f"{Path('scratch/faces').absolute()} holds 40 images"
    assert sorted(os.listdir()) == ["faces", "home", "scratch"]
    again, _ = dcgan_run("download", "--data-dir", "scratch/faces")
    assert "nothing is downloaded" in again and len(server.downloads()) == 1
    trained, _ = dcgan_run("--data-dir", "scratch/faces")
    assert "40 images" in trained and len(server.downloads()) == 1


# -------------------------------------------------------------------------------- accounts, network


@pytest.mark.parametrize("status", [401, 403])
def test_where_kaggle_wants_a_login_it_says_how_and_what_else_there_is(dcgan_run, server, status):
    server.api_answers = [status] * 9
    error = dcgan_run.fails(lines=8, KAGGLE_API_TOKEN="good-token")
    needed = "https://www.kaggle.com/settings ~/.kaggle/access_token KAGGLE_API_TOKEN data/celeba"
    for words in (*needed.split(), "--demo"):
        assert words in error


def test_a_refused_login_shows_none_of_kaggles_own_text(dcgan_run, server):
    server.needs_token = True
    out, err = dcgan_run(KAGGLE_API_TOKEN="stale-token\n", status=1)
    assert len(out.splitlines()) == 1
    assert err.startswith("dcgan.py: error: Kaggle wants you to log in"), err


def test_an_http_error_is_one_line_with_its_reason_and_a_cure(dcgan_run, server):
    reasons = {404: "(was not found)", 429: "(rate limited)", 500: "(Kaggle's side)"}
    cures = {404: "404 or 'not found', check KAGGLE_DATASET", 429: "wait an hour", 500: "later"}
    for status in reasons:
        server.api_answers = [status] * 9
        error = dcgan_run.fails()
        assert reasons[status] in error and cures[status] in error
    server.api_answers.clear()
    dcgan_run()
    assert images() == FACES


@pytest.mark.parametrize("status", [403, 503])
def test_a_storage_that_always_refuses_is_one_line(dcgan_run, server, status):
    server.storage_answers = [status] * 9
    error = dcgan_run.fails(KAGGLE_API_TOKEN="good-token")
    assert "later" in error


def test_without_a_network_one_line_names_the_demo(dcgan_run, server):
    server.address = "http://localhost:9"
    error = dcgan_run.fails(KAGGLE_API_TOKEN="good-token")
    assert "--demo" in error and "reached" in error


def test_a_hung_server_is_given_up(dcgan_run, server, monkeypatch):
    monkeypatch.setattr(dcgan_run.dcgan, "KAGGLE_SECONDS", 6)
    server.hang, began = [60] * 9, time.monotonic()
    error = dcgan_run.fails(KAGGLE_API_TOKEN="good-token")
    assert "cannot be reached" in error and "--demo" in error
    assert time.monotonic() - began < 60


def test_a_server_that_falls_silent_in_the_middle_is_asked_again_for_the_rest(
    dcgan_run, server, monkeypatch
):
    monkeypatch.setattr(dcgan_run.dcgan, "KAGGLE_SECONDS", 6)
    server.stalls, began = [2_500_000], time.monotonic()
    out, err = dcgan_run()
    assert images() == FACES
    assert ranges(server) == ["bytes=2097152-"] and time.monotonic() - began < 40


# ------------------------------------------------------------------------------------ interruptions


def test_a_killed_or_stopped_download_resumes_where_it_was(server, workplace):
    archive = workplace / "data/celeba.download/celeba-dataset.zip"
    server.stalls = [2_500_000]
    with process(server, workplace, *QUICK) as run:
        until(lambda: archive.exists() and archive.stat().st_size == 2 << 20, run)
        run.kill()
    assert ranges(server) == []

    # What a resuming client asks for first, it does not read.
    server.stalls = [len(server.archive), 1_050_000]
    with process(server, workplace, *QUICK) as run:
        until(lambda: archive.stat().st_size == 3 << 20, run)
        run.send_signal(signal.SIGINT)
        out, err = ended(run, status=130, timeout=20)
    assert ranges(server) == ["bytes=2097152-"]

    ended(process(server, workplace, *QUICK))
    assert images(workplace) == FACES and ranges(server)[1:] == ["bytes=3145728-"]


def test_a_half_done_epoch_resumes_with_images_that_are_downloaded_again(server, workplace):
    with process(server, workplace, *flags(EPOCHS=10**6, LOG_EVERY=1)) as run:
        until(lambda: len(metrics(workplace)) > 11, run)
        run.send_signal(signal.SIGTERM)
        out, err = ended(run, status=128 + signal.SIGTERM)
    step, epoch = re.search(r"saved after step (\d+) of epoch (\d+)", out).groups()
    shutil.rmtree(workplace / "data")  # as the disk of a session on Colab

    out, err = ended(process(server, workplace, *flags(EPOCHS=epoch, LOG_EVERY=1)))
    assert len(server.downloads()) == 2
    assert f"epoch {epoch}, step {int(step) + 1}\n" in out and "order" not in out


def test_a_killed_unpacking_is_never_taken_for_the_data_set(server, workplace):
    face = (workplace / "faces/000000.jpg").read_bytes()
    faces = [(NAME.format(f"{index:06d}.jpg"), face) for index in range(1, 3_001)]
    server.archive = archive_of(Path(), faces)
    with process(server, workplace, *QUICK) as run:
        until(lambda: sum(1 for _ in workplace.glob("data/celeba*/**/*.jpg")) > 10, run)
        run.send_signal(signal.SIGSTOP)
        unpacked = len(list(workplace.glob("data/celeba*/**/*.jpg")))
        run.kill()
    assert 10 < unpacked < 3_000 and not list((workplace / "data/celeba/images").rglob("*.jpg"))
    ended(process(server, workplace, *QUICK, "--max-images", 16))
    assert len(images(workplace)) == 3_000


def test_the_folder_may_be_a_link_to_another_disk(dcgan_run, workplace):
    with tempfile.TemporaryDirectory(dir="/dev/shm") as other:
        assert os.stat(other).st_dev != os.stat(workplace).st_dev
        (workplace / "data").mkdir()
        (workplace / "data/celeba").symlink_to(other)
        dcgan_run()
        assert images(workplace) == FACES


def test_a_cut_connection_resumes_where_it_was(dcgan_run, server):
    server.cuts = [1_500_000]
    dcgan_run()
    assert images() == FACES and ranges(server) == ["bytes=1048576-"]


@pytest.mark.slow
def test_a_connection_cut_three_times_resumes_where_it_was(dcgan_run, server):
    server.cuts = [1_500_000, 1_500_000, 10]
    dcgan_run()
    asked = ["bytes=1048576-", "bytes=2097152-", "bytes=2097152-"]
    assert images() == FACES and ranges(server) == asked


@pytest.mark.slow
def test_a_connection_cut_for_ever_is_one_line_and_the_next_run_resumes(dcgan_run, server):
    server.cuts = [1_500_000] + [10] * 50
    error = dcgan_run.fails()
    assert "--demo" in error
    server.cuts.clear()
    server.requests.clear()
    dcgan_run()
    assert images() == FACES and ranges(server) == ["bytes=1048576-"]


def test_an_address_that_expired_before_the_rest_came_is_renewed(dcgan_run, server):
    server.cuts, server.storage_answers = [1_500_000], [200, 403, 403]
    dcgan_run(KAGGLE_API_TOKEN="good-token")
    assert images() == FACES


@pytest.mark.slow
def test_an_address_that_expired_for_all_tries_of_the_client_is_renewed(dcgan_run, server):
    server.cuts, server.storage_answers = [1_500_000], [200, *[403] * 5]
    out, err = dcgan_run()
    assert images() == FACES and "asking for the rest" in out
    assert ranges(server)[-1] == "bytes=1048576-"


@pytest.mark.skipif(not shutil.which("openssl"), reason="openssl makes the certificate")
def test_a_certificate_that_nobody_has_signed_has_a_line_of_its_own(dcgan_run, server, workplace):
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost"
    secret = workplace / "secret.pem"
    files = ["-keyout", secret, "-out", workplace / "certificate.pem"]
    subprocess.run([*command.split(), *files], check=True, capture_output=True)
    with open(secret, "a") as file:
        file.write((workplace / "certificate.pem").read_text())
    with serving(server.archive, secret=secret) as storage:
        server.storage = storage.address.replace("http:", "https:")
        error = dcgan_run.fails()
    assert "certificate" in error and "REQUESTS_CA_BUNDLE" in error


def test_a_proxy_that_does_not_work_has_a_line_of_its_own(dcgan_run, server):
    nowhere = "http://name:good-key@127.0.0.1:9"
    error = dcgan_run.fails(http_proxy=nowhere, HTTP_PROXY=nowhere, no_proxy="", NO_PROXY="")
    assert "proxy" in error and "HTTPS_PROXY" in error


def test_nothing_in_the_working_directory_changes_the_client(server, workplace):
    for name in ("requests", "kaggle", "yaml"):
        (workplace / f"{name}.py").write_text("raise SystemExit('this was imported')")
    shutil.copy(SCRIPT, workplace)
    ended(process(server, workplace, *QUICK, script="dcgan.py"))
    assert images(workplace) == FACES


# ---------------------------------------------------------------------------------- other data sets


def test_another_data_set_has_a_folder_of_its_own_beside_celeba(dcgan_run, server, workplace):
    shutil.copytree(workplace / "faces", "data/celeba")
    cats = io.BytesIO()
    with zipfile.ZipFile(cats, "w") as archive:
        for index in range(24):
            picture = io.BytesIO()
            Image.new("RGB", (40, 40), (index, 0, 0)).save(picture, "GIF" if index % 2 else "PNG")
            archive.writestr(f"cats/kind {index % 3}/{index}.img", picture.getvalue())
        archive.writestr("cats/labels.csv", "name,kind")
    server.archive, server.listing = cats.getvalue(), ["cats/labels.csv", "cats/kind 0/0.img"]
    out, err = dcgan_run("--kaggle-dataset", "someone/cats")
    assert "; 24 images, " in out and "downloading someone/cats" in out
    place = workplace / "data/kaggle/someone/cats"
    assert len([path for path in place.rglob("*") if path.is_file()]) == 24
    assert len(server.downloads()) == 1
    out, err = dcgan_run("--output-dir", "another")  # CelebA, as before
    assert "; 40 images, " in out and len(server.downloads()) == 1


def test_a_data_set_that_lists_no_images_is_not_downloaded(dcgan_run, server):
    server.listing = ["train.csv", "test/labels.JSON"]
    error = dcgan_run.fails("--kaggle-dataset", "someone/tables")
    assert "someone/tables has no images, only .csv, .json" in error
    assert server.downloads() == []


@pytest.mark.parametrize("listing", [None, ["a.csv", "b.img"]])
def test_a_data_set_that_may_hold_images_is_downloaded(dcgan_run, server, listing):
    server.listing = listing
    dcgan_run("--kaggle-dataset", "someone/faces")
    assert len(server.downloads()) == 1


# --------------------------------------------------------------------------------- damaged archives

PAGE = b"<html>" + b"sorry " * 10_000


def test_an_error_page_left_by_an_earlier_run_is_replaced(dcgan_run, server):
    Path("data/celeba.download").mkdir(parents=True)
    newer_and_longer = PAGE * 100  # than Kaggle's archive
    Path("data/celeba.download/celeba-dataset.zip").write_bytes(newer_and_longer)
    dcgan_run()
    assert images() == FACES


@pytest.mark.parametrize("broken", ["page", "truncated", "empty"])
def test_what_is_no_archive_is_fetched_once_more_and_then_given_up(dcgan_run, server, broken):
    body = {"page": PAGE, "truncated": server.archive[:-9_000], "empty": b""}[broken]
    server.pages = [body] * 9
    error = dcgan_run.fails()
    assert "damaged" in error and len(server.downloads()) == 2
    server.pages = [body]
    dcgan_run()
    assert images() == FACES


def changed(archive, name, offset_there, offset_here, value, size):
    """An archive with a field changed in both headers of a member."""
    data, number = bytearray(archive), value.to_bytes(size, "little")
    central = data.rindex(NAME.format(name).encode()) - 46
    assert data[central : central + 4] == b"PK\1\2"
    local = int.from_bytes(data[central + 42 : central + 46], "little")
    data[central + offset_there : central + offset_there + size] = number
    data[local + offset_here : local + offset_here + size] = number
    return bytes(data)


DAMAGE = {  # offsets as in PKWARE's APPNOTE 4.3
    "encrypted": (8, 6, 1, 2),
    "unknown compression": (10, 8, 98, 2),
    "wrong checksum": (16, 14, 12345, 4),
    "shorter than its data": (24, 22, 100, 4),
    "not compressed, it says": (10, 8, 8, 2),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_member_that_cannot_be_unpacked_is_one_line(dcgan_run, server, damage):
    server.archive = changed(server.archive, FACES[20], *DAMAGE[damage])
    error = dcgan_run.fails()
    assert "damaged" in error and len(server.downloads()) == 2


def test_a_member_larger_than_any_disk_is_one_line(dcgan_run, server):
    huge = zipfile.ZipInfo(NAME.format("000050.jpg"))
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w") as archive:
        archive.writestr(huge, b"x")
        archive.filelist[0].file_size = 1 << 50
    server.archive = memory.getvalue()
    error = dcgan_run.fails()
    assert "1048576.0 GiB" in error.replace(",", "") or "damaged" in error


def test_an_archive_without_images_is_one_line_and_is_kept(dcgan_run, server, workplace):
    server.archive = archive_of(Path())
    error = dcgan_run.fails()
    assert "no images" in error
    kept = workplace / "data/celeba.download/celeba-dataset.zip"
    assert str(kept) in error and kept.read_bytes() == server.archive


def test_only_plain_images_come_out_of_a_hostile_archive(dcgan_run, server, workplace, all_faces):
    face = (all_faces / "000000.jpg").read_bytes()
    link = zipfile.ZipInfo(NAME.format("000903.jpg"))
    link.external_attr = 0o120777 << 16
    members = [
        ("../000901.jpg", face),
        ("../../../../000901.jpg", face),
        (f"{workplace}/000902.jpg", face),
        (link, b"/etc/passwd"),
        (NAME.format("٠٠٠٩٠٤.jpg"), face),
        (NAME.format("000905.jpg/"), b""),
        (NAME.format("..\\..\\000906.jpg"), face),
        (NAME.format("000907.jpg.exe"), b"MZ"),
        (NAME.format("000908.JPG"), face),
        (NAME.format("0000909.jpg"), face),
        (NAME.format(f"{'deep/' * 50}000910.jpg"), face),
        (".kaggle/kaggle.json", b"{}"),
        ("twice/000001.jpg", face),
        *((f"more/{index}.txt", b"") for index in range(2_000)),
    ]
    server.archive = archive_of(all_faces, members)
    before = set(workplace.parent.rglob("*"))
    dcgan_run()
    wanted = "000902.jpg 000903.jpg ٠٠٠٩٠٤.jpg 000908.JPG 0000909.jpg 000910.jpg".split()
    assert images() == sorted([*FACES, *wanted, "000001.jpg"])
    written = set(workplace.parent.rglob("*")) - before
    places = {path.relative_to(workplace).parts[0] for path in written}
    assert places <= {"data", "output", "home"} and not any((workplace / "home").rglob("*.json"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["{:06d}.txt", "000999.jpg"], ids=["no images", "one image over and over"]
)
def test_many_more_members_take_less_than_two_minutes(dcgan_run, server, all_faces, name):
    memory = io.BytesIO(archive_of(all_faces))
    with zipfile.ZipFile(memory, "a") as archive:
        archive.writestr(NAME.format("000999.jpg"), (all_faces / "000000.jpg").read_bytes())
        for index in range(100_000):
            member = copy.copy(archive.filelist[-1])
            member.filename = member.orig_filename = NAME.format(name.format(index))
            archive.filelist.append(member)
    server.archive, began = memory.getvalue(), time.monotonic()
    dcgan_run()
    assert images() == [*FACES, "000999.jpg"] and time.monotonic() - began < 120


# ------------------------------------------------------------------------------------- this machine

SMALL_DISK = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import dcgan
for size in map(int, sys.argv[1].split(",")):
    dcgan.ARCHIVE_BYTES = {{dcgan.CELEBA: size}}
    status = dcgan.main(sys.argv[2:])
    print("status", status, file=sys.stderr)
"""


def on_a_small_disk(server, workplace, megabytes, sizes):
    """stderr of runs with `data` on a disk of its own, for archives of each of these sizes."""
    (workplace / "data").mkdir()
    (workplace / "launch.py").write_text(SMALL_DISK)
    mount = own_mounts(f"mount -t tmpfs -o size={megabytes}m none data")
    run = process(server, workplace, sizes, *QUICK, script="launch.py", before=mount)
    out, err = run.communicate(timeout=300)
    assert run.returncode == 0 and "Traceback" not in out + err, out + err
    assert not [secret for secret in SECRETS if secret in out + err]
    return re.split(r"status (?=\d)", err)


def test_a_disk_that_is_too_small_is_named_with_both_sizes(server, workplace, all_faces):
    large = zipfile.ZipInfo(NAME.format("000999.jpg"))
    large.compress_type = zipfile.ZIP_DEFLATED
    server.archive = archive_of(all_faces, [(large, bytes(80 << 20))])
    before, unpacking, end = on_a_small_disk(server, workplace, 40, "1450000000,0")
    assert re.search(r"error: CelebA needs 2\.7 GiB .*data.* 40\.0 MiB free.*\n$", before)
    assert re.search(r"error: .*needs 83\.\d MiB .*data.* 3\d\.\d MiB free.*\n$", unpacking)
    assert unpacking.startswith("1\n") and end == "1\n"


@pytest.mark.slow
def test_a_disk_that_fills_during_the_download_is_one_line(server, workplace):
    filled, end = on_a_small_disk(server, workplace, 2, "0")
    assert re.search(r"error: .*[Nn]o space left.*\n$", filled) and end == "1\n"


@pytest.mark.parametrize("missing", ["six", "kaggle"])
def test_a_missing_module_is_named(dcgan_run, server, missing):
    server.environment(server.home)  # makes the folder of modules that come first
    text = f"raise ModuleNotFoundError(\"No module named '{missing}'\", name={missing!r})"
    (server.home / f"modules/{missing}.py").write_text(text)
    error = dcgan_run.fails()
    assert f"No module named '{missing}'" in error and "-m pip install" in error
    assert server.requests == []


def test_another_folder_is_never_downloaded_into(dcgan_run, server):
    Path("empty").mkdir()
    for folder in ("missing", "empty"):
        error = dcgan_run.fails("--data-dir", folder, status=2)
        assert folder in error
    assert server.requests == [] and not Path("missing").exists() and not os.listdir("empty")
