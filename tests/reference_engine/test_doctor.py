import json

import pytest
from click.testing import CliRunner

from reference_engine import doctor as module
from reference_engine.doctor import doctor
from reference_engine.flash_io import load_profile


@pytest.fixture(autouse=True)
def _quick(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(module, "BLOCKS", (16 << 10, 64 << 10))
    monkeypatch.setattr(module, "DEPTHS", (8,))


def run(*arguments):
    return CliRunner().invoke(doctor, [*map(str, arguments)], catch_exceptions=False)


def test_doctor_measures_says_why_and_remembers(tmp_path):
    result = run(tmp_path, "--size", "64MiB", "--seconds", "0.01")
    assert result.exit_code == 0
    for word in ("random reads", "sequential reads", "pread", "16 KiB", "backend ", "depth 8", "kept in"):
        assert word in result.stdout
    profile = load_profile(tmp_path)
    assert profile.is_measured
    assert all(reason in result.stdout for reason in profile.reasons)
    assert [p.name for p in tmp_path.iterdir()] == ["cache"]


def test_json_holds_profile_and_measurements(tmp_path):
    report = json.loads(run(tmp_path, "--size", "64MiB", "--seconds", "0.01", "--json").stdout)
    assert report["backend"] == load_profile(tmp_path).backend
    assert {m["pattern"] for m in report["measurements"]} == {"random", "sequential"}
    assert report["kept_in"].endswith(".json")


def test_show_measures_nothing(tmp_path):
    result = run(tmp_path, "--show")
    assert result.exit_code == 0
    assert "not measured: defaults" in result.stdout
    assert not list(tmp_path.iterdir())


def test_no_more_requests_are_made_than_the_system_takes(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "DEPTHS", (4, 8))
    monkeypatch.setattr(module, "request_limit", lambda path: 4)
    report = json.loads(run(tmp_path, "--size", "64MiB", "--seconds", "0.01", "--json").stdout)
    assert {m["depth"] for m in report["measurements"]} == {4}


@pytest.mark.parametrize("size", ["1MiB", "much"])
def test_useless_sizes_are_refused(tmp_path, size):
    assert run(tmp_path, "--size", size).exit_code == 2
