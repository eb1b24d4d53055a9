"""What the benchmarks share: a record goes to the folder of the device that was measured, and nothing tiny is kept."""

import argparse

import jax
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
    monkeypatch.setenv("XLA_FLAGS", "--some=1")
    assert record.document("decode", [], method="none")["xla_flags"] == "--some=1"
    assert record.write("decode", [], method="none") == tmp_path / folder / "decode.json"
    assert record.write("scaling", [], method="none", devices=2) == tmp_path / f"{folder}x2" / "scaling.json"


def test_what_is_tiny_is_not_kept(record, capsys):
    parser = argparse.ArgumentParser()
    record.add_options(parser, "decode.json", tiny="a small model")
    with pytest.raises(SystemExit):
        parser.parse_args(["--tiny", "--save"])
    assert "--save: not allowed with argument --tiny" in capsys.readouterr().err
    assert parser.parse_args(["--save"]).tiny is False


def test_a_timeline_is_read_by_scopes(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from gpu_timeline import phases, tracks

    def tile(at):
        spans = ("softmax", 0, 9), ("tile", 10, 11), ("turn", 12, 14), ("products", 24, 30)
        return [(ph, name, at + t) for name, *ends in spans for ph, t in zip("BE", ends, strict=True)]

    events = [(1, *e) for at in (0, 40, 90, 130) for e in tile(at)] + [(2, "B", "Init", 0), (2, "E", "Init", 5)]
    found = tracks([{"pid": 7, "tid": tid, "ph": ph, "name": name, "ts": t / 1e3} for tid, ph, name, t in events])
    assert len(found) == 1
    expected = {"softmax": 9, "tile wait": 1, "turn": 2, "products": 6, "issue": 10, "tile": 40}
    assert phases(found) == {name: pytest.approx(t) for name, t in expected.items()}


def test_kernels_are_added_up_by_name(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from device_time import kernel_seconds, mean_by_name
    from gpu_decode import kernels_ms

    assert mean_by_name([[("a", 1.0), ("b", 2.0), ("a", 3.0)], [("a", 2.0)], []]) == {"a": 3.0, "b": 1.0}
    spans = {"gemm_fusion_dot_1": 1.0, "gemm_fusion_dot_22_0": 2.0, "nvjet_64x8_TNT": 0.5, "loop_3": 0.01}
    assert kernels_ms(spans, 1000) == {"gemm_fusion_dot": 3.0, "nvjet_64x8_TNT": 0.5, "others": pytest.approx(0.01)}
    if jax.default_backend() == "cpu":
        assert kernel_seconds(lambda: jax.numpy.ones(3) + 1) == {}
