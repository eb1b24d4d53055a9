"""What the benchmarks share: a record goes to the folder of the device that was measured, and nothing tiny is kept."""

import argparse

import pytest

from tests.paths import ROOT


@pytest.fixture
def record(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import record

    return record


@pytest.mark.parametrize(("kind", "folder"), [
    ("NVIDIA H100 80GB HBM3", "h100"),
    ("NVIDIA H200", "h200"),
    ("NVIDIA A100-SXM4-40GB", "nvidia-a100-sxm4-40gb"),
    ("cpu", "some-cpu-2-cores"),
])  # fmt: skip
def test_a_record_goes_to_the_folder_of_its_device(record, monkeypatch, tmp_path, kind, folder):
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(record, "device", lambda: {"platform": kind if kind == "cpu" else "gpu", "kind": kind})
    monkeypatch.setattr(record, "machine", lambda: {"cpu": "Some CPU", "cores": 2})
    monkeypatch.setenv("PAXATTN_COMMIT", "0000000")
    assert record.write("decode", [], method="none") == tmp_path / folder / "decode.json"
    assert record.write("scaling", [], method="none", devices=2) == tmp_path / f"{folder}x2" / "scaling.json"


def test_what_is_tiny_is_not_kept(record, capsys):
    parser = argparse.ArgumentParser()
    record.add_options(parser, "decode.json", tiny="a small model")
    with pytest.raises(SystemExit):
        parser.parse_args(["--tiny", "--save"])
    assert "--save: not allowed with argument --tiny" in capsys.readouterr().err
    assert parser.parse_args(["--save"]).tiny is False
