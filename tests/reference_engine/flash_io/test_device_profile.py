import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashfmt.errors import FlashWriteError
from reference_engine.flash_io import DeviceProfile, IoTuning, device_profile, load_profile
from reference_engine.flash_io.device_choice import choose_profile
from reference_engine.flash_io.device_measurement import cases, measure, temporary_file
from reference_engine.flash_io.device_profile import (
    Measurement,
    device_name,
    profile_path,
    request_limit,
    save_profile,
)

KIB = 1 << 10
BLOCKS = [kib * KIB for kib in (4, 16, 32, 64, 256, 1024, 2048)]


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def modelled(fixed_us, us_per_kib, *, backend="uring", cpu=0.1, depths=(1, 8, 32, 128, 256, 512), full_at=32):
    """Random reads of a device whose requests cost fixed_us + us_per_kib a KiB once `full_at` are in flight."""
    return [
        Measurement(
            backend, "random", block, depth,
            block / ((fixed_us + us_per_kib * block / KIB) * 1e-6) * min(1, depth / full_at), cpu,
        )
        for block in BLOCKS for depth in depths
    ]  # fmt: skip


def test_choice_follows_the_model_of_the_device():
    profile = choose_profile(modelled(5.9, 0.418))
    assert profile.is_measured
    assert profile.backend == "uring"
    assert profile.tuning == IoTuning(gap_bytes=12 * KIB, max_request_bytes=256 * KIB, depth=256)
    assert len(profile.reasons) == 4


@pytest.mark.parametrize(
    ("depths", "full_at", "chosen"),
    [((1, 32, 128, 256, 512), 32, 256), ((1, 128, 256, 512), 512, 512), ((1, 8, 32, 64), 8, 64), ((1, 8), 32, 8)],
)
def test_depth_is_enough_for_the_device_and_for_while_nobody_waits(depths, full_at, chosen):
    assert choose_profile(modelled(5.9, 0.418, depths=depths, full_at=full_at)).tuning.depth == chosen


def test_backends_of_one_speed_are_told_apart_by_processor_time():
    slow, dear, cheap = (
        modelled(20, 1, backend="pread", cpu=0.01),
        modelled(5, 0.5, backend="uring", cpu=0.3),
        modelled(5.2, 0.5, backend="aio", cpu=0.1),
    )
    assert choose_profile(slow + dear + cheap).backend == "aio"
    assert choose_profile(slow + dear).backend == "uring"


def test_mmap_is_never_chosen():
    assert choose_profile(modelled(1, 0.1, backend="mmap") + modelled(9, 1, backend="pread")).backend == "pread"


@given(
    speeds=st.lists(st.floats(1e6, 1e11), min_size=2 * len(BLOCKS), max_size=2 * len(BLOCKS)),
)
@settings(max_examples=60, deadline=None)
def test_any_measurements_give_a_usable_tuning(speeds):
    rows = [
        Measurement("uring", "random", block, depth, speed, 0.1)
        for (block, depth), speed in zip([(b, d) for b in BLOCKS for d in (1, 32)], speeds, strict=True)
    ]
    tuning = choose_profile(rows).tuning
    assert 0 <= tuning.gap_bytes < tuning.max_request_bytes
    assert tuning.gap_bytes % 4096 == tuning.max_request_bytes % 4096 == 0


def test_a_profile_is_kept_for_the_device(tmp_path):
    profile = choose_profile(modelled(5.9, 0.418))
    assert load_profile(tmp_path) == DeviceProfile()
    kept_in = save_profile(tmp_path, profile)
    assert kept_in.parent == tmp_path / "cache" / "flashfmt" / "devices"
    assert load_profile(tmp_path) == profile
    assert load_profile(tmp_path / "not" / "there.flash") == profile


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: text.replace('"version": 1', '"version": 2'),
        lambda text: text.replace('"backend": "uring",\n "tuning"', '"backend": "magic",\n "tuning"'),
        lambda text: text.replace('"depth": 256\n }', '"depth": 0\n }'),
        lambda text: text.replace('"gap_bytes": 12288', '"gap_bytes": 12289'),
    ],
    ids=["cut", "other type", "other version", "unknown backend", "no depth", "misaligned gap"],
)
def test_a_damaged_profile_counts_as_none(tmp_path, damage):
    kept_in = save_profile(tmp_path, choose_profile(modelled(5.9, 0.418)))
    text = kept_in.read_text()
    assert damage(text) != text
    kept_in.write_text(damage(text))
    assert load_profile(tmp_path) == DeviceProfile()


def test_the_systems_limit_on_requests_is_asked_for(tmp_path, monkeypatch):
    assert request_limit(Path("/proc")) is None
    number = tmp_path.stat().st_dev
    monkeypatch.setattr(device_profile, "_SYS_BLOCK", tmp_path)
    partition = tmp_path / f"{os.major(number)}:{os.minor(number)}"
    partition.mkdir()
    (partition / "partition").touch()
    assert request_limit(tmp_path) is None
    (tmp_path / "queue").mkdir()
    (tmp_path / "queue" / "nr_requests").write_text("64\n")
    assert request_limit(tmp_path / "model.flash") == 64


def test_names_are_file_names_and_tell_devices_apart(tmp_path):
    assert "/" not in device_name(tmp_path)
    assert device_name(tmp_path) == device_name(tmp_path / "none")
    assert device_name(tmp_path) != device_name(Path("/proc"))
    assert profile_path(tmp_path).suffix == ".json"


def test_measuring_covers_what_works_and_leaves_nothing_behind(tmp_path):
    wanted = cases(("pread", "mmap"), (4 * KIB, 64 * KIB), (1, 8))
    assert len(wanted) == 2 * 2 * 3
    n_done = []
    with temporary_file(tmp_path, 1 << 20) as path:
        results = measure(path, wanted, seconds=0.005, progress=lambda: n_done.append(1))
    assert {(m.backend, m.pattern, m.block_bytes, m.depth) for m in results} == {
        (case.backend, case.pattern, case.block_bytes, case.depth) for case in wanted
    }
    assert all(m.bytes_per_second > 0 and m.cpu_seconds_per_gib >= 0 for m in results)
    assert len(n_done) == 2 * len(wanted)
    assert not list(tmp_path.glob(".flashfmt*"))


def test_the_test_file_is_deleted_after_an_error(tmp_path):
    with pytest.raises(RuntimeError), temporary_file(tmp_path, 1 << 20):
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_no_room_for_the_test_file(tmp_path):
    with pytest.raises(FlashWriteError, match="no room"), temporary_file(tmp_path, 1 << 60):
        pass
