"""Hand broken checkpoints, images, caches, folders and settings to dcgan.py.

    python tests/fuzz.py                              # some of each
    python tests/fuzz.py --checkpoints 5000 --seed 1

Each has to end well, or in one line that says why not. Prints a table, then what failed; the exit
status is 1 if anything did. All runs in one process, without the pictures of an epoch's end, for
speed; the rest is the real thing.
"""

import argparse
import contextlib
import copy
import io
import os
import random
import re
import shutil
import signal
import struct
import sys
import tempfile
import traceback
import warnings
import zipfile
from collections import Counter
from pathlib import Path

import torch
from conftest import TINY, dcgan, draw_faces, load_faces
from PIL import Image

SECONDS = 20  # a case may take
SIZE = TINY["IMAGE_SIZE"]
NUMBERS = "0 -1 1 5 2.5 1e-3 1e400 -1e400 nan inf 0x10 1_0 ٣".split()
NUMBERS += ["9" * 30, "9" * 5_000]
TEXTS = ["", " ", "x", "None", "none", "true", "a\nb", "\0", "\ud800", "é" * 300]
TEXTS += ["./a/../b", "/dev/null/x", "%s%n", "{0}"]
OBJECTS = [None, True, [], {}, (), b"x", 1.5, 10**400, float("nan"), float("inf"), object(), 1j]
OBJECTS += [torch.ones(2), int]
VALUES = [None, 0, -1, 7, 10**30, 1e300, float("nan"), float("inf"), True, "", "x", "a\nb", b"x"]
VALUES += [(), [], {}, [[]], [None], {"a": 1}, {1: []}, [[1] * 9], [["x"] * 9], [1e300] * 4]
VALUES += [torch.tensor(3), torch.ones(0), torch.ones(2, 2).half(), torch.tensor([1j])]
VALUES += [torch.zeros(1).expand(10**12)]


class TooLong(BaseException):
    """A case has taken more than SECONDS; no `except Exception` catches it."""


def end_case(*_):
    raise TooLong


# ------------------------------------------------------------------------------------ broken things


def broken(data, rng):
    """`data`, bytes, with one to three things wrong."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        at, size = rng.randrange(len(data) + 1), rng.randint(1, 64)
        kind = rng.choice(("flip", "cut", "noise", "insert", "remove", "swap", "zero"))
        if kind == "flip" and data:
            data[at % len(data)] ^= 1 << rng.randrange(8)
        elif kind == "cut":
            del data[at:]
        elif kind == "noise":
            data[at : at + size] = rng.randbytes(len(data[at : at + size]))
        elif kind == "insert":
            data[at:at] = rng.randbytes(size)
        elif kind == "remove":
            del data[at : at + size]
        elif kind == "zero":
            data[at : at + 50 * size] = bytes(len(data[at : at + 50 * size]))
        elif kind == "swap" and len(data) > 2 * size:
            one, two = sorted(rng.sample(range(len(data) - size), 2))
            two = max(two, one + size)
            first, second = data[one : one + size], data[two : two + size]
            data[one : one + size], data[two : two + size] = second, first
    return bytes(data)


def places(value, path=()):
    """The paths of all that is in nested dicts and lists."""
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield (*path, key)
            yield from places(value[key], (*path, key))


def changed(state, path, value):
    """A copy of `state` with another value at `path`, or with none if that is Ellipsis."""
    state = copy.deepcopy(state)
    *before, last = path
    inner = state
    for key in before:
        inner = inner[key]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    return state


def odd_zip(data, rng):
    """A zip as torch.save writes it, with one member that is not as it should be."""
    source, target = zipfile.ZipFile(io.BytesIO(data)), io.BytesIO()
    victim = rng.choice(source.infolist())
    kind = rng.choice(("missing", "twice", "empty", "deflated", "renamed", "random"))
    with zipfile.ZipFile(target, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the name that is there twice
        for member in source.infolist():
            inside, name = source.read(member), member.filename
            if member is not victim:
                archive.writestr(name, inside)
            elif kind == "twice":
                archive.writestr(name, inside)
                archive.writestr(name, inside)
            elif kind == "empty":
                archive.writestr(name, b"")
            elif kind == "deflated":
                archive.writestr(name, inside, zipfile.ZIP_DEFLATED)
            elif kind == "renamed":
                archive.writestr("archive/../../x", inside)
            elif kind == "random":
                archive.writestr(name, rng.randbytes(len(inside)))
    return target.getvalue()


def odd_headers():
    """Headers of NumPy's format that are whole, and say what no cache is."""
    good = {"descr": "|u1", "fortran_order": False, "shape": (40, 3, SIZE, SIZE)}
    shapes = [(), (40,), (-40, 3, SIZE, SIZE), (41, 3, SIZE, SIZE), (10**30, 3, SIZE, SIZE)]
    shapes += [(40.0, 3, SIZE, SIZE), ("40", 3, SIZE, SIZE), (None, 3, SIZE, SIZE), [40], 40, "x"]
    shapes += [(1e300, 3, SIZE, SIZE), (40, SIZE, SIZE, 3), (40, 3, 2**40, 2**40)]
    shapes += [(10, 3, 2 * SIZE, 2 * SIZE), (40 * 3 * SIZE**2,)]
    kinds = ["|i1", "<u2", "O", "|O", "V9", "S4", "x", "", "|u1" * 999, None, 1, [], [("a", "|u1")]]
    headers = [{}, [], 1, None, "x", (), {"shape": (40,)}, good | {"more": 1}, {**good, "descr": 0}]
    headers += [good | {"shape": shape} for shape in shapes]
    headers += [good | {"descr": kind} for kind in kinds]
    headers += [good | {"fortran_order": order} for order in (None, 1, "x")]
    texts = [repr(header) for header in headers]
    texts += ["", "[" * 4_000, "(" * 60_000, "{[]: 1}", "{'descr': '|u1', ", "'", "\t{}", "\\"]
    texts += ["9" * 5_000, "{'descr'", '"""', "{'shape': (40L, 3L)}", "\n  {}\n {}", "0x", "1L"]
    texts += ["~" * 99]
    return [text.encode() for text in texts]


# ---------------------------------------------------------------------------------------- the cases


class Fuzz:
    """A folder with a finished tiny run in it, and the cases of each kind.

    `counts` are for the table: {kind: Counter of how cases ended}; `failures` are lines.
    """

    def __init__(self, folder, seed=0):
        self.rng = random.Random(seed)
        self.counts = {}
        self.failures = []
        os.chdir(folder)
        draw_faces(Path("faces"), 40)
        vars(dcgan).update(TINY | {"DATA_DIR": "faces", "BATCH_SIZE": 20})
        dcgan.CELEBA_DIR = "no-download"
        dcgan.Run.draw_pictures = lambda *_, **__: None
        self.defaults = dcgan.setting_values()
        assert self.ending(["--epochs", "2"]) == "accepted"
        faces, self.key = load_faces(dcgan, SIZE)
        self.faces = faces.clone()  # the file itself will be broken
        self.cache = next(Path("data/cache").glob("*.npy"))
        self.good_cache = self.cache.read_bytes()
        self.good = {path: path.read_bytes() for path in Path("output").glob("*.pt")}
        self.state = torch.load("output/checkpoint.pt", weights_only=True)

    def ending(self, argv, out=None):
        """How a command ends. An error has to be one line. `out` is a file for what it says."""
        err = io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace")
        redirected = (
            contextlib.redirect_stdout(out or io.StringIO()),
            contextlib.redirect_stderr(err),
        )
        # PyTorch warns of odd indices
        with redirected[0], redirected[1], warnings.catch_warnings(action="ignore"):
            try:
                status = dcgan.main(argv)
            except SystemExit as end:  # of --help
                status = end.code or 0
        err.seek(0)
        error = err.read()
        assert status in (0, 1, 2), f"exit {status}"
        if status:
            one_line = error.startswith("dcgan.py: error: ") and error.count("\n") == 1
            assert one_line, f"not one line: {error!r}"
        return "refused" if status else "accepted"

    def one(self, kind, what, case, *arguments):
        """Run a case and count how it ends."""
        counts = self.counts.setdefault(kind, Counter())
        before = signal.signal(signal.SIGALRM, end_case)
        signal.alarm(SECONDS)
        try:
            end = case(*arguments)
        except KeyboardInterrupt:
            raise
        except TooLong:
            end = "too long"
        except BaseException as error:
            end = "wrong" if isinstance(error, AssertionError) else "traceback"
            where = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{Path(where.filename).name}:{where.lineno}"
            what += f": {type(error).__name__}: {dcgan.one_line(error)} ({place})"
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)
            vars(dcgan).update(self.defaults)
        counts[end] += 1
        if end not in ("accepted", "refused"):
            self.failures.append(f"{kind}, {end}: {what}")

    # Checkpoints

    def checkpoints(self, number):
        """Broken bytes are noticed, or change nothing; odd values lead to no traceback."""
        data, paths = self.good[Path("output/checkpoint.pt")], list(places(self.state))
        for index in range(number):
            case = f"case {index}"
            self.one("checkpoint, bytes", case, self.read, broken(data, self.rng))
            if index % 4 == 0:
                bad = odd_zip(data, self.rng)
                self.one("checkpoint, odd zip", case, self.read, bad, True)
        for path in paths[:: max(1, len(paths) // number)]:
            self.one("checkpoint, missing", f"without {path}", self.resume, path, ...)
        for index in range(number):
            path = (self.rng.choice(list(self.state)),) if index % 2 else self.rng.choice(paths)
            value = self.rng.choice(VALUES)
            self.one("checkpoint, odd value", f"{path} = {value!r:.60}", self.resume, path, value)
        for path, good in self.good.items():
            path.write_bytes(good)

    def read(self, bad, may_differ=False):
        Path("bad.pt").write_bytes(bad)
        try:
            state = dcgan.read_checkpoint("bad.pt")
        except (dcgan.UserError, dcgan.SystemFailure) as error:
            assert "\n" not in str(error), f"not one line: {error}"
            return "refused"
        one, two = io.BytesIO(), io.BytesIO()
        torch.save(state, one)
        torch.save(self.state, two)
        assert may_differ or one.getvalue() == two.getvalue(), "it was taken, and is another"
        return "accepted"

    def resume(self, path, value):
        """Put a changed checkpoint in place alone and train one more epoch from it."""
        for old in Path("output").glob("checkpoint*"):
            old.unlink()
        torch.save(changed(self.state, path, value), "output/checkpoint.pt")
        return self.ending(["--epochs", "3"])

    # Images

    def images(self, number):
        """A broken image is a face or the reason why not; a few of them do not stop a run."""
        folder, originals = Path("broken"), []
        folder.mkdir(exist_ok=True)
        face = Image.open("faces/000000.jpg")
        kinds = "JPEG RGB, PNG RGBA, JPEG L, JPEG CMYK, PNG P, PNG I;16, WEBP RGB, TIFF RGB"
        for kind in kinds.split(", "):
            form, mode = kind.split()
            file = io.BytesIO()
            face.convert("I" if mode == "I;16" else mode).convert(mode).save(file, form)
            originals.append(file.getvalue())
        for index in range(number):
            often = index % 2 if index % 3 else index % len(originals)
            (folder / f"{index}.jpg").write_bytes(broken(originals[often], self.rng))
            self.one("image", f"case {index}", self.decode, f"{index}.jpg")
        few = draw_faces(Path("mostly"), 40)
        for index in range(min(4, number)):
            (few / f"bad-{index}.jpg").write_bytes((folder / f"{index}.jpg").read_bytes())
        self.one("image", "a folder", self.ending, ["--data-dir", "mostly", "--output-dir", "new"])

    def decode(self, name):
        face = dcgan.FaceFolder(Path("broken"), [(name, 0, 0)], SIZE)[0]
        if isinstance(face, str):
            return "refused"
        assert isinstance(face, bytes) and len(face) == 3 * SIZE**2
        return "accepted"

    # Caches

    def caches(self, number):
        """A broken cache is decoded again, or has its rows; only broken pixels go unnoticed."""
        data = self.good_cache
        head = len(data) - self.faces.numel()
        for header in odd_headers():
            # NumPy's format, version 1.0
            bad = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data[head:]
            self.one("cache, odd header", f"{header[:60]}", self.reload, bad)
        for index in range(number):
            bad = broken(data, self.rng)
            if index % 2:
                bad = broken(data[:head], self.rng) + data[head:]
            self.one("cache, bytes", f"case {index}", self.reload, bad)
        self.cache.write_bytes(data)

    def reload(self, bad):
        self.cache.write_bytes(bad)
        before = self.cache.stat().st_ino
        with contextlib.redirect_stdout(io.StringIO()) as said:
            faces, key = load_faces(dcgan, SIZE)
        assert key == self.key and faces.shape[1:] == (3, SIZE, SIZE) and len(faces) <= 40
        assert faces.dtype == torch.uint8
        if self.cache.stat().st_ino == before:
            faces.sum()  # all of it can be read
            return "accepted"
        assert "is damaged (" in said.getvalue(), "decoded again silently"
        assert torch.equal(faces, self.faces), "decoded again, and wrongly"
        assert self.cache.read_bytes() == self.good_cache, "another file than at first"
        return "refused"

    # Folders

    def folders(self, number):
        """A mixture of files: each is used, left out or skipped, or a line says what is wrong."""
        face = Image.open("faces/000000.jpg").resize((40, 40))
        contents = []
        for form in sorted(Image.SAVE):
            with contextlib.suppress(Exception):  # some cannot write this, or not to memory
                file = io.BytesIO()
                face.save(file, form)
                contents.append(file.getvalue())
        for mode in ("1", "L", "P", "LA", "RGBA", "CMYK", "I;16", "I", "F"):
            file = io.BytesIO()
            odd = face.convert("I") if mode == "I;16" else face.convert(mode)
            odd.convert(mode).save(file, "TIFF")
            contents.append(file.getvalue())
        contents += [b"", b"no image", b"\0" * 99, b"PK\3\4", b"GIF89a", b"%PDF-1.4", b"P6 9 9 255"]
        contents += [self.rng.randbytes(500), b"<html>"]
        for index in range(number):
            shutil.rmtree("mixture", ignore_errors=True)
            Path("mixture").mkdir()
            used = [self.file(contents) for _ in range(self.rng.randint(1, 25))]
            draw_faces(Path("mixture/some/more"), self.rng.choice((0, 0, 20, 30)))
            what = f"case {index}: {[name for name, _ in used]}"
            self.one("folder", what[:300], self.mixture, self.rng.random() < 0.7)

    def file(self, contents):
        """Put a file into the mixture: its name, and the number of its content."""
        ends = [".jpg", ".PNG", ".jfif", ".txt", "", ".", ".heic", ".gif", ".j pg", ".tif", ".exr"]
        ends += [".avif", ".webp", ".mp4", ".é", ".\ud800", ".jpg.part", ".svg", ".bmp", ".jpeg~"]
        places = ["", "", "", "a/", "a/b/", ".git/", "__MACOSX/", "ж \n/", "x.jpg/"]
        stems = ["x", "._x", ".x", "a b", "-", "%s", "'", "x" * 200, "\udcff", "ж"]
        choice = self.rng.choice
        path = Path(
            "mixture", choice(places) + choice(stems) + str(self.rng.random()) + choice(ends)
        )
        number = self.rng.randrange(len(contents))
        with contextlib.suppress(OSError, UnicodeError):  # names that the disk does not take
            path.parent.mkdir(parents=True, exist_ok=True)
            kind = self.rng.random()
            if kind < 0.02:
                path.symlink_to("nowhere")
            elif kind < 0.04:
                path.symlink_to(Path("faces/000001.jpg").absolute())
            elif kind < 0.06:
                os.mkfifo(path)
            else:
                data = contents[number]
                path.write_bytes(broken(data, self.rng) if kind < 0.3 else data)
        return path.name, number

    def mixture(self, skip_broken):
        """Train one epoch on it. The numbers that are said have to add up to all files."""
        shutil.rmtree("mixed", ignore_errors=True)
        shutil.rmtree("data/cache", ignore_errors=True)
        argv = ["--data-dir", "mixture", "--output-dir", "mixed", "--epochs", "1"]
        argv += ["--batch-size", "2"] + ["--skip-broken"] * skip_broken
        with contextlib.redirect_stdout(io.StringIO()) as said:
            end = self.ending(argv, said)
        files = sum(len(names) for _, _, names in os.walk("mixture"))
        if found := re.search(
            r"; ([\d,]+) images?, .*?(?:; left out: (.*))?$", said.getvalue(), re.M
        ):
            others = re.findall(r"(?:^|, )([\d,]+) ", found[2] or "")
            total = sum(int(text.replace(",", "")) for text in (found[1], *others))
            assert total == files, f"{total} of {files}: {found[0]}"
        else:
            assert end == "refused"
        return end

    # Settings

    def settings(self, number):
        """Flags and constants of any kind: a run, or a line that says what is wrong."""
        names = list(dcgan.SETTINGS)
        commands = "generate,interpolate,--help,generate --help,evaluate,nonsense".split(",")
        words = "--num-images --seed --checkpoint --output --individual --frames --epoch -- -x"
        for index in range(number):
            name = self.rng.choice(names)
            if index % 3 == 0:
                value = self.rng.choice(OBJECTS + TEXTS)
                what = f"{name} = {value!r:.60}"
                self.one("setting, constant", what, self.constant, name, value)
                continue
            argv = ["--epochs", "2"] if index % 3 == 2 else self.rng.choice(commands).split()
            for _ in range(self.rng.randint(1, 3)):
                other = self.rng.choice(names)
                word = self.rng.choice(words.split())
                word = self.rng.choice((dcgan.flag(name), dcgan.flag(other), word))
                value = self.rng.choice(NUMBERS + TEXTS)
                argv += self.rng.choice(([word, value], [f"{word}={value}"], [word], [value]))
            self.one("setting, flag", " ".join(map(repr, argv))[:150], self.ending, argv)

    def constant(self, name, value):
        setattr(dcgan, name, value)
        return self.ending([])

    def table(self):
        ends = ("accepted", "refused", "too long", "traceback", "wrong")
        lines = [f"{'':24}{'cases':>9}" + "".join(f"{end:>11}" for end in ends)]
        for kind, counts in self.counts.items():
            cells = "".join(f"{counts[end]:11,}" for end in ends)
            lines.append(f"{kind:24}{counts.total():9,}{cells}")
        return "\n".join(lines)


def main():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    numbers = {"checkpoints": 500, "images": 500, "caches": 100, "folders": 500}
    numbers |= {"settings": 200, "seed": 0}
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default, help="[%(default)s]")
    options = vars(parser.parse_args())
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        fuzz = Fuzz(folder, options.pop("seed"))
        for name, number in options.items():
            if number:
                getattr(fuzz, name)(number)
        os.chdir("/")
    print(fuzz.table(), *fuzz.failures, sep="\n")
    return int(bool(fuzz.failures))


if __name__ == "__main__":
    sys.exit(main())
