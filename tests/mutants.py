"""Put each fault of mutants.toml into a copy of dcgan.py: its test must fail, and without it pass.

python tests/mutants.py [WORD ...]    # those whose name has one of the words
"""

import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MUTANTS = tomllib.loads((ROOT / "tests/mutants.toml").read_text("utf-8"))["mutant"]


def passes(folder, test):
    """(whether a test passes in a copy, its seconds without setup, its last lines)"""
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", "-p", "no:cacheprovider"]
    command += ["--durations", "1", "--durations-min", "0", f"tests/{test}"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    seconds = [line.split()[0] for line in done.stdout.splitlines() if "s call " in line]
    return done.returncode == 0, seconds[0] if seconds else "", done.stdout[-800:]


def main():
    words = sys.argv[1:] or [""]
    chosen = [mutant for mutant in MUTANTS if any(word in mutant["name"] for word in words)]
    survivors = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, "copy")
        shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".venv", ".git", "data"))
        source = (ROOT / "dcgan.py").read_text("utf-8")
        for mutant in chosen:
            start = time.monotonic()
            fits = source.count(mutant["old"]) == 1
            (folder / "dcgan.py").write_text(source.replace(mutant["old"], mutant["new"]), "utf-8")
            passed, seconds, _ = passes(folder, mutant["test"])
            verdict = "caught" if fits and not passed else "SURVIVED" if fits else "DOES NOT FIT"
            if verdict != "caught":
                survivors.append(mutant["name"])
            whole = time.monotonic() - start
            row = f"{seconds:>7} {whole:4.0f}s  {mutant['name']}  <- {mutant['test']}"
            print(f"{verdict:12} {row}", flush=True)
        (folder / "dcgan.py").write_text(source, "utf-8")
        tests = sorted({mutant["test"] for mutant in chosen})
        for test in tests:
            passed, _, end = passes(folder, test)
            if not passed:
                survivors.append(test)
                print(f"FAILS WITHOUT A FAULT  {test}\n{end}", flush=True)
    print(f"{len(chosen)} faults, {len(tests)} tests; not as it should be: {survivors or 'none'}")
    return bool(survivors)


if __name__ == "__main__":
    sys.exit(main())
