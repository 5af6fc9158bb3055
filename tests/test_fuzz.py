"""A small sample of fuzz.py, which see."""

import pytest
from conftest import dcgan
from fuzz import Fuzz


@pytest.mark.parametrize(
    "kind, number",
    [("checkpoints", 60), ("images", 60), ("caches", 20), ("folders", 12), ("settings", 60)],
)
def test_broken_things_end_in_success_or_one_line(tmp_path, monkeypatch, kind, number):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dcgan.Run, "draw_pictures", dcgan.Run.draw_pictures)
    for name, value in vars(dcgan).items():  # what the fuzzer changes is put back
        if name.isupper():
            monkeypatch.setattr(dcgan, name, value)
    fuzz = Fuzz(tmp_path, seed=1)
    getattr(fuzz, kind)(number)
    print(fuzz.table())
    assert not fuzz.failures, "\n".join(fuzz.failures)
    assert all(counts["accepted"] + counts["refused"] > 10 for counts in fuzz.counts.values())
