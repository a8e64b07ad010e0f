"""Whatever fails while a model is written, and whenever: the target is whole or what it was, and the next run ends it.

The faults are counted in system calls. A killed process dies in the middle of one, with half of its bytes written.
"""

import errno
import itertools
import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import flashfmt
import flashfmt.output
import flashfmt.staging
from flashfmt import FlashWriteError

VICTIM = """
import importlib.util, os, signal, sys
import flashfmt, flashfmt.output, flashfmt.staging, flashfmt.writer

def load(path):
    spec = importlib.util.spec_from_file_location("helpers", path)
    module = sys.modules["helpers"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

helpers, source, target, container, n_calls = sys.argv[1], *sys.argv[2:5], int(sys.argv[5])
flashfmt.staging.SYNC_NBYTES = 20000
n_done = 0

def dying(call):
    def wrapper(*arguments):
        global n_done
        n_done += 1
        if n_done == n_calls:
            if call is os.pwrite:
                fd, view, offset = arguments
                os.pwrite(fd, view[: len(view) // 2], offset)
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*arguments)
    return wrapper

flashfmt.output.pwrite = dying(os.pwrite)
flashfmt.output.fsync = dying(os.fsync)
flashfmt.output.fdatasync = dying(os.fdatasync)
os.replace, os.rename, os.unlink = dying(os.replace), dying(os.rename), dying(os.unlink)
with flashfmt.open(source) as model:
    load(helpers).Writing.copy(model, __import__("pathlib").Path(target), container=container, overwrite=True)
print(n_done)
"""


def victim(source, target, container, n_calls):
    """Write `source` to `target` in a process that dies in its n-th call; 0 lets it live."""
    helpers = Path(__file__).with_name("conftest.py")
    command = [sys.executable, "-c", VICTIM, str(helpers), str(source.path), str(target), container, str(n_calls)]
    return subprocess.run(command, capture_output=True, text=True, cwd=Path(flashfmt.__file__).parents[1], check=False)


@pytest.fixture
def reference(source, tmp_path, writing, container, content):
    """The bytes that an undisturbed run writes."""
    return content(writing.copy(source, tmp_path / "reference", container=container))


def leftovers(target):
    return sorted(path.name for path in target.parent.glob(target.name + ".*"))


class TestKill:
    """SIGKILL at any call."""

    def check(self, source, tmp_path, writing, container, content, reference, n_kills, seed):
        n_calls = int(victim(source, tmp_path / "counted", container, 0).stdout)
        assert n_calls > 30
        dice = random.Random(seed)
        for kill in range(n_kills):
            target = tmp_path / f"m{kill}"
            old = None
            if kill % 2 and container == "file":
                target.write_bytes(b"the model that was there before")
                old = target.read_bytes()
            at = dice.randint(1, n_calls)
            assert victim(source, target, container, at).returncode == -signal.SIGKILL, at
            found = content(target) if target.exists() else None
            assert found in (old, reference), f"killed in call {at}"
            writing.copy(source, target, container=container, overwrite=True)
            assert content(target) == reference, f"killed in call {at}"
            assert leftovers(target) == []

    def test_a_kill_at_a_random_call(self, source, tmp_path, writing, container, content, reference):
        self.check(source, tmp_path, writing, container, content, reference, 6, seed=1)

    @pytest.mark.slow
    def test_a_kill_at_many_random_calls(self, source, tmp_path, writing, container, content, reference):
        self.check(source, tmp_path, writing, container, content, reference, 60, seed=2)

    def test_a_kill_at_a_random_time(self, source, tmp_path, writing, content):
        reference = content(writing.copy(source, tmp_path / "reference.flash"))
        dice = random.Random(3)
        target = tmp_path / "m.flash"
        helpers = Path(__file__).with_name("conftest.py")
        command = [sys.executable, "-c", VICTIM, str(helpers), str(source.path), str(target), "file", "0"]
        for _ in range(4):
            process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(flashfmt.__file__).parents[1])
            try:
                process.wait(dice.uniform(0.25, 0.6))
            except subprocess.TimeoutExpired:
                process.kill()
            process.communicate()
            assert not target.exists() or content(target) == reference
        writing.copy(source, target, overwrite=True)
        assert content(target) == reference


class TestFullDisk:
    """ENOSPC, EDQUOT, EIO after some bytes."""

    def fail_after(self, monkeypatch, n_bytes, code):
        """pwrite stores `n_bytes` in all, then fails."""
        left, lock = n_bytes, threading.Lock()

        def pwrite(fd, view, offset):
            nonlocal left
            with lock:
                if left == 0:
                    raise OSError(code, os.strerror(code))
                count = os.pwrite(fd, view[:left], offset)
                left -= count
                return count

        monkeypatch.setattr(flashfmt.output, "pwrite", pwrite)

    @pytest.mark.parametrize("seed", range(8))
    def test_a_full_disk(self, source, tmp_path, writing, container, content, reference, monkeypatch, seed):
        monkeypatch.setattr(flashfmt.staging, "SYNC_NBYTES", 20000)
        target = tmp_path / "m"
        n_bytes = random.Random(seed).randint(0, source.verify_nbytes - 1)
        self.fail_after(monkeypatch, n_bytes, errno.ENOSPC)
        with pytest.raises(FlashWriteError, match="No space left on device; make room") as error:
            writing.copy(source, target, container=container)
        assert error.value.path is not None
        assert not target.exists()
        assert leftovers(target) != []
        monkeypatch.setattr(flashfmt.output, "pwrite", os.pwrite)
        writing.copy(source, target, container=container)
        assert content(target) == reference
        assert leftovers(target) == []

    def test_other_errors_name_their_reason(self, source, tmp_path, writing, monkeypatch):
        self.fail_after(monkeypatch, 50000, errno.EIO)
        with pytest.raises(FlashWriteError, match=r"cannot write: Input/output error$"):
            writing.copy(source, tmp_path / "m.flash")

    def test_short_writes_are_completed(self, source, tmp_path, writing, container, content, reference, monkeypatch):
        monkeypatch.setattr(flashfmt.output, "pwrite", lambda fd, view, offset: os.pwrite(fd, view[:777], offset))
        assert content(writing.copy(source, tmp_path / "m", container=container)) == reference


class TestFailingSync:
    """fsync and fdatasync that fail: nothing is published, nothing unsafe is journalled."""

    @pytest.mark.parametrize("n_call", [1, 2, 3, 5, 8, 1000])
    def test_a_sync_that_fails(self, source, tmp_path, writing, container, content, reference, monkeypatch, n_call):
        monkeypatch.setattr(flashfmt.staging, "SYNC_NBYTES", 20000)
        counter = itertools.count(1)

        def fail_once(call):
            def sync(fd):
                if next(counter) == n_call:
                    raise OSError(errno.EIO, os.strerror(errno.EIO))
                call(fd)

            return sync

        monkeypatch.setattr(flashfmt.output, "fsync", fail_once(os.fsync))
        monkeypatch.setattr(flashfmt.output, "fdatasync", fail_once(os.fdatasync))
        target = tmp_path / "m"
        failure = None
        try:
            writing.copy(source, target, container=container)
        except FlashWriteError as error:
            failure = str(error)
        assert (failure is None) == (next(counter) <= n_call)
        assert failure is None or "cannot store: Input/output error" in failure
        if failure is not None and f"{tmp_path}: " not in failure:  # the directory is synced after the rename
            assert not target.exists()
        assert not target.exists() or content(target) == reference
        monkeypatch.undo()
        writing.copy(source, target, container=container, overwrite=True)
        assert content(target) == reference
        assert leftovers(target) == []

    def test_all_is_stored_before_the_rename(self, source, tmp_path, writing, container, monkeypatch):
        """Every file is synced after its last write, and the rename comes after that."""
        unsynced, events = set(), []

        def name(fd):
            return Path(os.readlink(f"/proc/self/fd/{fd}"))

        def pwrite(fd, view, offset):
            unsynced.add(name(fd))
            return os.pwrite(fd, view, offset)

        def sync(fd):
            unsynced.discard(name(fd))
            os.fsync(fd)

        replace = os.replace
        monkeypatch.setattr(flashfmt.output, "pwrite", pwrite)
        monkeypatch.setattr(flashfmt.output, "fsync", sync)
        monkeypatch.setattr(flashfmt.output, "fdatasync", sync)
        monkeypatch.setattr(os, "replace", lambda a, b: (events.append(set(unsynced)), replace(a, b)))
        writing.copy(source, tmp_path / "m", container=container)
        assert events == [set()]
