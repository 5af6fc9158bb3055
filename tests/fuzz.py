"""Hand broken checkpoints, images, caches and settings to dcgan.py: each ends well, or in one line that says why.

    python tests/fuzz.py                                     # 500 checkpoints, 500 images, 100 caches, 200 settings
    python tests/fuzz.py --checkpoints 5000 --seed 1

Prints a table, then what failed; the exit status is 1 if anything did. In one process, and with the pictures of an
epoch's end left out, for speed; the rest is the real thing.
"""

import argparse
import contextlib
import copy
import io
import json
import os
import random
import signal
import sys
import tempfile
import traceback
import warnings
import zipfile
from collections import Counter
from pathlib import Path

import torch
from conftest import TINY, dcgan, draw_faces
from PIL import Image

SECONDS = 20  # a case may take
NUMBERS = (
    "0",
    "-1",
    "1",
    "5",
    "2.5",
    "1e-3",
    "1e400",
    "-1e400",
    "nan",
    "inf",
    "9" * 30,
    "9" * 5_000,
    "0x10",
    "1_0",
    "٣",
)
TEXTS = (
    "",
    " ",
    "x",
    "None",
    "none",
    "true",
    "a\nb",
    "\0",
    "\ud800",
    "é" * 300,
    "./a/../b",
    "/dev/null/x",
    "%s%n",
    "{0}",
)
OBJECTS = (None, True, [], {}, (), b"x", 1.5, 10**400, float("nan"), float("inf"), object(), 1j, torch.ones(2), int)
TENSORS = (torch.tensor(3), torch.ones(0), torch.zeros(1).expand(10**12), torch.ones(2, 2).half(), torch.tensor([1j]))
VALUES = (None, 0, -1, 7, 10**30, 1e300, float("nan"), float("inf"), True, "", "x", "a\nb", b"x", [], {}, [[]], [None])
VALUES += ({"a": 1}, {1: []}, [[1] * 9], [["x"] * 9], [1e300] * 4, (), *TENSORS)


class TooLong(BaseException):
    """A case has taken more than SECONDS; no `except Exception` catches it."""


@contextlib.contextmanager
def time_limit():
    def end(*_):
        raise TooLong

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


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
            data[one : one + size], data[two : two + size] = data[two : two + size], data[one : one + size]
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


def odd_zips(data, rng):
    """A zip as torch.save writes it, with an entry missing, twice, empty, compressed, renamed or of random bytes."""
    source, target = zipfile.ZipFile(io.BytesIO(data)), io.BytesIO()
    victim, kind = (
        rng.choice(source.infolist()),
        rng.choice(("missing", "twice", "empty", "deflated", "renamed", "random")),
    )
    with zipfile.ZipFile(target, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the name that is there twice
        for member in source.infolist():
            inside, name, method = source.read(member), member.filename, zipfile.ZIP_STORED
            if member is victim:
                inside = {"empty": b"", "random": rng.randbytes(len(inside))}.get(kind, inside)
                name = "archive/../../x" if kind == "renamed" else name
                method = zipfile.ZIP_DEFLATED if kind == "deflated" else method
            for _ in range({"missing": 0, "twice": 2}.get(kind, 1) if member is victim else 1):
                archive.writestr(name, inside, method)
    return target.getvalue()


class Fuzz:
    """A folder with a finished tiny run in it, and the cases of each kind; `failures` are lines, `counts` the table."""

    def __init__(self, folder, seed=0):
        self.rng, self.counts, self.failures = random.Random(seed), {}, []
        os.chdir(folder)
        draw_faces(Path("faces"), 40)
        small = {"DATA_DIR": "faces", "BATCH_SIZE": 20, "CELEBA_DIR": "no-download", "draw_pictures": lambda *_: None}
        vars(dcgan).update(TINY | small)
        self.defaults = dcgan.values()
        assert self.call(["--epochs", "2"])[0] == 0
        self.faces, self.key = dcgan.load_faces()
        self.cache = next(Path("data/cache").glob("*.bin"))
        self.good = {path: path.read_bytes() for path in Path("output").glob("*.pt")}
        self.state = torch.load("output/checkpoint.pt", weights_only=True)

    def call(self, argv):
        """(status, stdout, stderr) of the command line. Raises AssertionError unless an error is one line."""
        out, err = io.StringIO(), io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace")
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch's of odd indices
            try:
                status = dcgan.main(argv)
            except SystemExit as end:  # of --help
                status = end.code or 0
        err.seek(0)
        error = err.read()
        assert status in (0, 1, 2), f"exit {status}"
        if status:
            assert error.startswith("dcgan.py: error: ") and error.count("\n") == 1, f"not one line: {error!r}"
        return status, out.getvalue(), error

    def one(self, kind, what, case, *arguments):
        """Run a case and count how it ends."""
        counts = self.counts.setdefault(kind, Counter())
        try:
            with time_limit():
                end = case(*arguments)
        except TooLong:
            end = "too long"
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            end = "traceback" if not isinstance(error, AssertionError) else "wrong"
            where = traceback.extract_tb(error.__traceback__)[-1]
            what += f": {type(error).__name__}: {dcgan.one_line(error)} ({Path(where.filename).name}:{where.lineno})"
        finally:
            vars(dcgan).update(self.defaults)
        counts[end] += 1
        if end in ("too long", "traceback", "wrong"):
            self.failures.append(f"{kind}, {end}: {what}")

    def train(self, data):
        """Put a checkpoint in place alone and train one more epoch from it."""
        for path in Path("output").glob("checkpoint*"):
            path.unlink()
        Path("output/checkpoint.pt").write_bytes(data)
        return self.call(["--epochs", "3"])

    def checkpoints(self, number):
        """Broken bytes are found out, or were of no account; odd values in a whole file lead to no traceback."""
        data, paths = self.good[Path("output/checkpoint.pt")], list(places(self.state))
        for index in range(number):
            self.one("checkpoint, bytes", f"case {index}", self.read, broken(data, self.rng))
            if index % 4 == 0:
                self.one("checkpoint, odd zip", f"case {index}", self.read, odd_zips(data, self.rng), True)
        for path in paths[:: max(1, len(paths) // number)]:
            self.one("checkpoint, missing", f"without {path}", self.resume, path, ...)
        for index in range(number):
            path = (self.rng.choice(list(self.state)),) if index % 2 else self.rng.choice(paths)
            value = self.rng.choice(VALUES)
            self.one("checkpoint, odd value", f"{path} = {value!r:.60}", self.resume, path, value)
        for path, bytes_ in self.good.items():
            path.write_bytes(bytes_)

    def read(self, bad, may_differ=False):
        Path("bad.pt").write_bytes(bad)
        try:
            state = dcgan.read_checkpoint("bad.pt")
        except (ValueError, OSError) as error:
            assert "\n" not in str(error), f"not one line: {error}"
            return "refused"
        one, two = (io.BytesIO() for _ in range(2))
        torch.save(state, one), torch.save(self.state, two)
        assert may_differ or one.getvalue() == two.getvalue(), "it was taken, and is another"
        return "accepted"

    def resume(self, path, value):
        file = io.BytesIO()
        torch.save(changed(self.state, path, value), file)
        return ("accepted", "refused", "refused")[self.train(file.getvalue())[0]]

    def images(self, number):
        """A broken image is a face or the reason why not; a folder with a few of them is trained on."""
        folder, originals = Path("broken"), []
        folder.mkdir(exist_ok=True)
        face = Image.open("faces/000000.jpg")
        modes = {"JPEG": ("RGB", "L", "CMYK"), "PNG": ("RGBA", "P", "I;16"), "WEBP": ("RGB",), "TIFF": ("RGB",)}
        for kind, several in modes.items():
            for mode in several:
                file = io.BytesIO()
                face.convert("I" if mode == "I;16" else mode).convert(mode).save(file, kind)
                originals.append(file.getvalue())
        for index in range(number):
            bad = broken(originals[index % 2 if index % 3 else index % len(originals)], self.rng)
            (folder / f"{index}.jpg").write_bytes(bad)
            self.one("image", f"case {index}", self.decode, f"{index}.jpg")
        few = draw_faces(Path("mostly"), 40)
        for index in range(min(4, number)):
            (few / f"bad-{index}.jpg").write_bytes((folder / f"{index}.jpg").read_bytes())
        dcgan.DATA_DIR = "mostly"
        self.one("image", "a folder", lambda: "accepted" if 40 <= len(self.load()[0]) <= 44 else 1 / 0)

    def decode(self, name):
        face = dcgan.FaceFolder("broken", [name])[0]
        assert isinstance(face, str) or (isinstance(face, bytes) and len(face) == 3 * 32 * 32)
        return "refused" if isinstance(face, str) else "accepted"

    def load(self):
        with contextlib.redirect_stdout(io.StringIO()):
            return dcgan.load_faces()

    def caches(self, number):
        """A broken cache is decoded anew; broken pixels alone go unseen."""
        data, head = self.cache.read_bytes(), dcgan.HEADER_BYTES
        odd = [{}, [], 1, None, "x", "[" * 4_000, {"key": self.key}, {"images": 40}, {"key": [], "images": {}}]
        odd += [
            {"key": self.key, "images": value} for value in (0, -40, 40.0, 41, True, 10**30, "40", None, [40], 1e300)
        ]
        for index in range(number):
            if index % 3 == 0:
                header = self.rng.choice(odd)
                text = header if header == odd[5] else json.dumps(header)
                bad = text.ljust(head).encode() + data[head:]
            elif index % 3 == 1:
                bad = broken(data, self.rng)
            else:
                bad = broken(data[:head].rstrip(), self.rng).ljust(head) + data[head:]
            self.cache.write_bytes(bad)
            self.one("cache", f"case {index}", self.reload)
        self.cache.write_bytes(data)

    def reload(self):
        mark = self.cache.stat().st_ino
        faces, key = self.load()
        assert key == self.key and faces.shape == (40, 3, 32, 32) and faces.dtype == torch.uint8
        anew = self.cache.stat().st_ino != mark
        assert not anew or torch.equal(faces, self.faces)
        assert anew or (faces != self.faces).float().mean() < 0.2
        return "refused" if anew else "accepted"

    def settings(self, number):
        """Flags and constants of any kind: a run, or a line that says what is wrong."""
        names = list(dcgan.SETTINGS)
        offline = ["evaluate", "--inception-weights", "nowhere.pth"]
        commands = (["generate"], ["interpolate"], ["--help"], ["generate", "--help"], offline, ["nonsense"])
        words = (
            "--num-images",
            "--seed",
            "--checkpoint",
            "--output",
            "--individual",
            "--frames",
            "--epoch",
            "--",
            "-x",
        )
        for index in range(number):
            name = self.rng.choice(names)
            if index % 3 == 0:
                value = self.rng.choice(OBJECTS + TEXTS)
                self.one("setting, constant", f"{name} = {value!r:.60}", self.constant, name, value)
                continue
            argv = ["--epochs", "2"]
            for _ in range(self.rng.randint(1, 3)):
                word = self.rng.choice((dcgan.flag(name), dcgan.flag(self.rng.choice(names)), self.rng.choice(words)))
                value = self.rng.choice(NUMBERS + TEXTS)
                argv += self.rng.choice(([word, value], [f"{word}={value}"], [word], [value]))
            if index % 3 == 1:
                argv = self.rng.choice(commands) + argv[2:]
            self.one("setting, flag", " ".join(map(repr, argv))[:150], self.flags, argv)

    def constant(self, name, value):
        setattr(dcgan, name, value)
        return ("accepted", "refused", "refused")[self.call([])[0]]

    def flags(self, argv):
        return ("accepted", "refused", "refused")[self.call(argv)[0]]

    def table(self):
        ends = ("accepted", "refused", "too long", "traceback", "wrong")
        lines = [f"{'':24}{'cases':>9}" + "".join(f"{end:>11}" for end in ends)]
        for kind, counts in self.counts.items():
            lines.append(f"{kind:24}{counts.total():9,}" + "".join(f"{counts[end]:11,}" for end in ends))
        return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"checkpoints": 500, "images": 500, "caches": 100, "settings": 200, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = vars(parser.parse_args())
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        fuzz = Fuzz(folder, options.pop("seed"))
        for name, number in options.items():
            getattr(fuzz, name)(number) if number else None
        os.chdir("/")
    print(fuzz.table(), *fuzz.failures, sep="\n")
    return int(bool(fuzz.failures))


if __name__ == "__main__":
    sys.exit(main())
