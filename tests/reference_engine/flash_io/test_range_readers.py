"""One contract for every backend: the class below, once a backend; the subclasses say how faults are planted."""

import errno
import gc
import itertools
import linecache
import os
import signal
import sys
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashfmt.errors import FlashReadError
from reference_engine.flash_io import IoTuning, aligned_empty, open_reader
from reference_engine.flash_io.aio_queue import AioQueue
from reference_engine.flash_io.numba_queue import CompiledAioQueue, CompiledUringQueue
from reference_engine.flash_io.uring_queue import UringQueue

UNIT = 4096
N_UNITS = 700
TUNING = IoTuning(gap_bytes=2 * UNIT, max_request_bytes=8 * UNIT, depth=16)
SEPARATE = IoTuning(gap_bytes=0, max_request_bytes=8 * UNIT, depth=4)
FILLER = 0xA5


@pytest.fixture(scope="module")
def content():
    return np.random.default_rng(3).integers(0, 256, N_UNITS * UNIT, np.uint8)


@pytest.fixture(scope="module")
def path(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("ranges") / "data.bin"
    path.write_bytes(content)
    return path


@st.composite
def range_sets(draw):
    """(offsets, sizes, positions) in units: sorted ranges, slots in any order."""
    cuts = draw(st.lists(st.integers(0, N_UNITS), min_size=2, max_size=80, unique=True).map(sorted))
    pairs = list(zip(cuts[:-1:2], cuts[1::2], strict=False))
    if draw(st.booleans()):  # ranges that touch, too
        pairs = [(a, min(b, a + 9)) for a, b in itertools.pairwise(cuts)]
    sizes = np.array([b - a for a, b in pairs], np.int64)
    order = np.array(draw(st.permutations(range(len(pairs)))))
    positions = np.empty_like(sizes)
    positions[order] = np.cumsum(sizes[order]) - sizes[order]
    return np.array([a for a, _ in pairs], np.int64), sizes, positions


def read(reader, buffer, offsets, sizes, positions):
    """Submit ranges given in units."""
    return reader.submit(np.asarray(offsets) * UNIT, np.asarray(sizes) * UNIT, buffer, np.asarray(positions) * UNIT)


def check(content, buffer, offsets, sizes, positions):
    expected = np.full(buffer.nbytes, FILLER, np.uint8)
    for offset, size, position in zip(offsets, sizes, positions, strict=True):
        expected[position * UNIT : (position + size) * UNIT] = content[offset * UNIT : (offset + size) * UNIT]
    np.testing.assert_array_equal(buffer, expected)


@pytest.fixture(scope="class")
def reader(request, path):
    reader = open_reader(path, backend=request.cls.backend, tuning=TUNING, compiled=request.cls.compiled)
    yield reader
    reader.close()


def blank(n_units):
    buffer = aligned_empty(n_units * UNIT)
    buffer[:] = FILLER
    return buffer


@pytest.fixture(scope="module", params=["uring", "compiled uring", "aio", "compiled aio", "pread", "mmap"])
def any_reader(request, path):
    name, compiled = request.param.removeprefix("compiled "), request.param.startswith("compiled")
    try:
        reader = open_reader(path, backend=name, tuning=TUNING, compiled=compiled)
    except FlashReadError as error:
        pytest.skip(f"{name} does not work here: {error}")
    yield reader
    reader.close()


@given(ranges=range_sets())
@settings(max_examples=40, deadline=None)
def test_ranges_land_in_their_slots_and_nothing_else_is_touched(any_reader, content, ranges):
    buffer = blank(N_UNITS + 1)
    read(any_reader, buffer, *ranges).wait()
    check(content, buffer, *ranges)


class RangeReaderContract:
    backend: str
    compiled = False

    @pytest.fixture
    def make(self):
        readers = []

        def make(path, tuning=TUNING):
            readers.append(open_reader(path, backend=self.backend, tuning=tuning, compiled=self.compiled))
            return readers[-1]

        yield make
        for reader in readers:
            reader.close()

    def test_nothing_to_read(self, reader):
        pending = read(reader, blank(1), [], [], [])
        pending.wait()
        assert pending.is_done

    def test_one_size_for_all_and_a_matrix_of_slots(self, reader, content):
        slots = blank(6).reshape(6, UNIT)
        reader.submit(np.array([3, 9, 11]) * UNIT, UNIT, slots, np.array([5, 0, 2]) * UNIT).wait()
        check(content, slots.reshape(-1), [3, 9, 11], [1, 1, 1], [5, 0, 2])

    def test_many_batches_in_flight(self, reader, content):
        rng = np.random.default_rng(0)
        batches = []
        for i in range(60):
            offsets = np.sort(rng.choice(N_UNITS, 20, replace=False))
            buffer, positions = blank(20), rng.permutation(20)
            pending = reader.submit(offsets * UNIT, UNIT, buffer, positions * UNIT, ahead=i % 3 == 0)
            batches.append((pending, buffer, offsets, positions))
        for pending, buffer, offsets, positions in reversed(batches):
            pending.wait()
            check(content, buffer, offsets, [1] * 20, positions)

    def test_threads_share_a_reader(self, reader, content):
        failures = []

        def work(seed):
            rng = np.random.default_rng(seed)
            for _ in range(10):
                offsets, buffer = np.sort(rng.choice(N_UNITS, 30, replace=False)), blank(30)
                try:
                    read(reader, buffer, offsets, [1] * 30, range(30)).wait()
                    check(content, buffer, offsets, [1] * 30, range(30))
                except BaseException as error:  # noqa: BLE001 - raised below, in the test's own thread
                    failures.append(error)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures

    def test_the_buffer_is_kept_alive_without_the_caller(self, reader):
        for _ in range(20):
            read(reader, blank(200), range(0, 400, 2), [1] * 200, range(200))
        read(reader, blank(1), [0], [1], [0]).wait()

    def test_counters_count_bytes_requests_and_waiting(self, make, path):
        reader = make(path)
        read(reader, blank(30), [0, 2, 100], [1, 1, 10], [20, 0, 1]).wait()  # a gap of one; a split range
        assert reader.counters.bytes_read == (3 + 10) * UNIT
        assert reader.counters.n_requests == 3
        assert 0 <= reader.counters.wait_seconds < 60

    @pytest.mark.parametrize(
        ("offsets", "sizes", "positions"),
        [([5, 4], [1, 1], [0, 1]), ([4, 5], [2, 1], [0, 2]), ([4], [0], [0]), ([-1], [1], [0]), ([4], [-1], [0])],
        ids=["unsorted", "overlapping", "empty", "negative", "negative size"],
    )
    def test_bad_ranges_are_refused(self, reader, offsets, sizes, positions):
        with pytest.raises(ValueError, match="ranges must be"):
            read(reader, blank(9), offsets, sizes, positions)

    @pytest.mark.parametrize(("position", "size"), [(-1, 1), (9, 1), (8, 2)])
    def test_slots_outside_the_buffer_are_refused(self, reader, position, size):
        with pytest.raises(ValueError, match="outside the buffer"):
            read(reader, blank(9), [0], [size], [position])

    def test_unsuitable_buffers_are_refused(self, reader):
        for buffer in (np.zeros(UNIT, np.int8), blank(4)[::2]):
            with pytest.raises(ValueError, match="contiguous"):
                reader.submit(np.zeros(1, np.int64), 512, buffer, np.zeros(1, np.int64))
        constant = blank(1)
        constant.flags.writeable = False
        with pytest.raises(ValueError, match="writable"):
            read(reader, constant, [0], [1], [0])

    def test_positions_must_be_as_many_as_offsets(self, reader):
        with pytest.raises(ValueError, match="one length"):
            read(reader, blank(2), [0, 1], [1, 1], [0])

    @pytest.mark.parametrize("shift", [(1, 0, 0), (0, 1, 0), (0, 0, 1)], ids=["offset", "size", "position"])
    def test_misaligned_ranges_are_refused(self, reader, shift):
        if reader.file.alignment == 1:
            pytest.skip("reads through the page cache need no alignment")
        offset, size, position = shift
        with pytest.raises(ValueError, match="misaligned"):
            reader.submit(np.array([offset]), UNIT + size, blank(3), np.array([position]))

    def test_file_cut_short_under_the_reader(self, make, tmp_path, content):
        path = tmp_path / "cut.bin"
        path.write_bytes(content[: 100 * UNIT])
        reader = make(path)
        os.truncate(path, 50 * UNIT)
        buffer = blank(40)
        with pytest.raises(FlashReadError, match="ends inside") as caught:
            read(reader, buffer, [10, 49, 70], [1, 2, 1], [0, 1, 3]).wait()
        assert caught.value.path == path
        assert caught.value.where in (50 * UNIT, 70 * UNIT)
        assert "bytes from" in str(caught.value.expected)
        read(reader, buffer, [10], [1], [0]).wait()  # the reader goes on

    def test_waiting_again_raises_again(self, make, tmp_path, content):
        path = tmp_path / "short.bin"
        path.write_bytes(content[:UNIT])
        pending = read(make(path), blank(2), [1], [1], [0])
        for _ in range(2):
            with pytest.raises(FlashReadError):
                pending.wait()

    def test_close_with_reads_pending(self, make, path, content):
        reader = make(path, SEPARATE)
        batches = []
        for _ in range(30):
            buffer = blank(100)
            batches.append((buffer, read(reader, buffer, range(0, 200, 2), [1] * 100, range(100))))
        reader.close()
        reader.close()
        for buffer, pending in batches:
            assert pending.is_done
            try:
                pending.wait()
            except FlashReadError as error:
                outcome = error.message
            else:
                check(content, buffer, range(0, 200, 2), [1] * 100, range(100))
                outcome = "read"
            assert outcome in ("read", "the reader was closed before the range was read")
            buffer[:] = FILLER
        time.sleep(0.02)
        assert all((buffer == FILLER).all() for buffer, _ in batches)
        with pytest.raises(FlashReadError, match="closed"):
            read(reader, blank(1), [0], [1], [0])

    def test_close_ends_the_threads(self, make, path):
        before = threading.active_count()
        make(path).close()
        assert threading.active_count() == before

    def test_missing_file(self, tmp_path):
        with pytest.raises(FlashReadError, match="cannot open"):
            open_reader(tmp_path / "none.flash", backend=self.backend)


class FaultContract:
    """For backends whose system calls can be made to fail. `plant` lets the first `n` requests come to grief."""

    def plant(self, monkeypatch, *, number: int | None, n: int) -> None:
        """Request comes back short (`number` None) or with errno `number`, its bytes not all there."""
        raise NotImplementedError

    def gate(self, monkeypatch) -> tuple[threading.Event, list[int]]:
        """Hold the first request until the event is set, and note the offsets of requests as they begin."""
        raise NotImplementedError

    @pytest.mark.parametrize("number", [None, errno.EINTR, errno.EAGAIN], ids=["short", "EINTR", "EAGAIN"])
    def test_incomplete_requests_are_completed(self, make, path, content, monkeypatch, number):
        self.plant(monkeypatch, number=number, n=25)
        reader = make(path)
        buffer = blank(300)
        ranges = range(0, 400, 8), [4] * 50, np.random.default_rng(1).permutation(50) * 5
        read(reader, buffer, *ranges).wait()
        check(content, buffer, *ranges)

    def test_scattered_requests_are_completed(self, make, path, content, monkeypatch):
        self.plant(monkeypatch, number=None, n=25)
        reader = make(path)
        buffer = blank(300)
        ranges = range(0, 150, 2), [1] * 75, np.random.default_rng(1).permutation(75) * 3
        read(reader, buffer, *ranges).wait()
        check(content, buffer, *ranges)

    def test_device_error_names_the_range_and_leaves_nothing_in_flight(self, make, path, content, monkeypatch):
        self.plant(monkeypatch, number=errno.EIO, n=1)
        reader = make(path, SEPARATE)
        buffer = blank(200)
        pending = read(reader, buffer, range(0, 400, 2), [1] * 200, range(200))
        with pytest.raises(FlashReadError, match="Input/output error") as caught:
            pending.wait()
        buffer[:] = FILLER
        assert caught.value.path == path
        assert caught.value.where % (2 * UNIT) == 0
        assert caught.value.expected == f"{UNIT} bytes from {caught.value.where}"
        time.sleep(0.02)
        assert (buffer == FILLER).all()
        read(reader, buffer, [7], [1], [3]).wait()  # the reader goes on
        check(content, buffer, [7], [1], [3])

    def test_what_is_wanted_overtakes_what_is_read_ahead(self, make, path, monkeypatch):
        event, offsets = self.gate(monkeypatch)
        reader = make(path, IoTuning(gap_bytes=0, max_request_bytes=UNIT, depth=1))
        ahead = reader.submit(np.arange(0, 80, 2) * UNIT, UNIT, blank(40), np.arange(40) * UNIT, ahead=True)
        wanted = read(reader, blank(5), range(101, 110, 2), [1] * 5, range(5))
        event.set()
        wanted.wait()
        ahead.wait()
        begun = [offset // UNIT for offset in offsets]
        assert sorted(begun) == [*range(0, 80, 2), *range(101, 110, 2)]
        assert begun.index(109) < 20

    def test_a_signal_while_waiting_leaves_nothing_in_flight(self, make, path, monkeypatch):
        event, _ = self.gate(monkeypatch)
        reader = make(path, SEPARATE)
        buffer = blank(100)

        def interrupt(number, frame):
            event.set()
            raise KeyboardInterrupt

        before = signal.signal(signal.SIGALRM, interrupt)
        try:
            pending = read(reader, buffer, range(0, 200, 2), [1] * 100, range(100))
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            with pytest.raises(KeyboardInterrupt):
                pending.wait()
        finally:
            signal.signal(signal.SIGALRM, before)
        assert pending.is_done
        buffer[:] = FILLER
        time.sleep(0.02)
        assert (buffer == FILLER).all()


class TestMmap(RangeReaderContract):
    backend = "mmap"


class TestPread(RangeReaderContract, FaultContract):
    backend = "pread"

    def plant(self, monkeypatch, *, number, n):
        whole, left = os.preadv, iter(range(n))

        def faulty(fd, buffers, offset):
            if next(left, None) is None:
                return whole(fd, buffers, offset)
            if number is not None:
                raise OSError(number, os.strerror(number))
            return whole(fd, [buffers[0][:512]], offset)

        monkeypatch.setattr(os, "preadv", faulty)

    def gate(self, monkeypatch):
        whole, event, offsets = os.preadv, threading.Event(), []

        def slow(fd, buffers, offset):
            offsets.append(offset)
            event.wait()
            return whole(fd, buffers, offset)

        monkeypatch.setattr(os, "preadv", slow)
        return event, offsets

    def test_endless_eagain_is_an_error(self, make, path, monkeypatch):
        monkeypatch.setattr(time, "sleep", lambda seconds: None)
        self.plant(monkeypatch, number=errno.EAGAIN, n=10_000)
        with pytest.raises(FlashReadError, match="EAGAIN"):
            read(make(path), blank(1), [0], [1], [0]).wait()


class QueueContract(RangeReaderContract, FaultContract):
    queue: type
    calls: tuple[str, ...]  # system calls that begin requests and wait for them
    line_step: int  # at every which line an interrupt is tried

    @pytest.fixture(autouse=True)
    def _available(self, path):
        try:
            reader = open_reader(path, backend=self.backend, tuning=TUNING)
        except FlashReadError as error:
            pytest.skip(f"{self.backend} does not work here: {error}")
        reader.close()

    def plant(self, monkeypatch, *, number, n):
        prepare, take, left = self.queue.prepare, self.queue.take, iter(range(n))
        spoilt = set()

        def faulty_prepare(queue, plan, first_tag):
            entries = prepare(queue, plan, first_tag)
            for i, _ in zip(range(len(entries)), left, strict=False):
                spoilt.add(int(entries["tag"][i]))
                entries["nbytes"][i] = 512 if plan.n_segments[i] == 1 else 1  # bytes; or segments
            return entries

        def faulty_take(queue, n):
            tags, results = take(queue, n)
            if number is not None:
                results[[tag in spoilt for tag in tags.tolist()]] = -number
            return tags, results

        monkeypatch.setattr(self.queue, "prepare", faulty_prepare)
        monkeypatch.setattr(self.queue, "take", faulty_take)

    def gate(self, monkeypatch):
        push, wait, event, offsets = self.queue.push, self.queue.wait, threading.Event(), []

        def noting_push(queue, entries, start, stop):
            n = push(queue, entries, start, stop)
            offsets.extend(entries["offset"][start : start + n].tolist())
            return n

        def slow_wait(queue, at_least):
            event.wait()
            return wait(queue, at_least)

        monkeypatch.setattr(self.queue, "push", noting_push)
        monkeypatch.setattr(self.queue, "wait", slow_wait)
        return event, offsets

    def intermittent(self, monkeypatch, name, number):
        from reference_engine.flash_io import linux_syscalls

        call, n_calls = getattr(linux_syscalls, name), iter(range(10**9))

        def faulty(*arguments):
            return -number if next(n_calls) % 2 == 0 else call(*arguments)

        monkeypatch.setattr(linux_syscalls, name, faulty)

    @pytest.mark.parametrize("number", [errno.EINTR, errno.EAGAIN, errno.EBUSY])
    def test_interrupted_system_calls_are_made_again(self, make, path, content, monkeypatch, number):
        for name in self.calls:
            self.intermittent(monkeypatch, name, number)
        reader = make(path, SEPARATE)
        ranges = range(0, 400, 2), [1] * 200, np.random.default_rng(5).permutation(200)
        buffer = blank(200)
        read(reader, buffer, *ranges).wait()
        check(content, buffer, *ranges)

    def test_refused_requests_are_an_error_of_their_batch(self, make, path, content, monkeypatch):
        push, n_calls = self.queue.push, iter(range(100))

        def refusing(queue, entries, start, stop):
            if next(n_calls) == 1:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            return push(queue, entries, start, stop)

        monkeypatch.setattr(self.queue, "push", refusing)
        reader = make(path, SEPARATE)
        buffer = blank(200)
        with pytest.raises(FlashReadError, match="EINVAL"):
            read(reader, buffer, range(0, 400, 2), [1] * 200, range(200)).wait()
        buffer[:] = FILLER
        read(reader, buffer, [3], [1], [0]).wait()
        check(content, buffer, [3], [1], [0])

    def test_a_queue_that_breaks_down_fails_every_batch(self, make, path, monkeypatch):
        def broken(queue, at_least):
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))

        monkeypatch.setattr(self.queue, "wait", broken)
        reader = make(path)
        for _ in range(2):
            with pytest.raises(FlashReadError, match="broke down"):
                read(reader, blank(1), [0], [1], [0]).wait()

    def test_a_request_cancelled_with_its_thread_is_made_again(self, make, path, content, monkeypatch):
        self.plant(monkeypatch, number=errno.ECANCELED, n=3)
        reader = make(path)
        buffer = blank(20)
        read(reader, buffer, range(0, 40, 4), [2] * 10, range(0, 20, 2)).wait()
        check(content, buffer, range(0, 40, 4), [2] * 10, range(0, 20, 2))

    def test_nobody_needs_to_wait_for_reads_to_begin_and_end(self, make, path, content, monkeypatch):
        event, offsets = self.gate(monkeypatch)
        event.set()
        reader = make(path, SEPARATE)
        buffer = blank(10)
        pending = read(reader, buffer, range(0, 20, 2), [1] * 10, range(10))
        assert len(offsets) == SEPARATE.depth
        while not pending.is_done:
            time.sleep(0.001)
        check(content, buffer, range(0, 20, 2), [1] * 10, range(10))

    def test_reads_outlive_the_thread_that_began_them(self, make, path, content):
        reader, buffer, begun = make(path), blank(300), []
        ranges = range(0, 600, 2), [1] * 300, range(300)
        thread = threading.Thread(target=lambda: begun.append(read(reader, buffer, *ranges)))
        thread.start()
        thread.join()
        begun[0].wait()
        check(content, buffer, *ranges)

    def test_several_threads_wait_for_one_batch_and_for_each_others(self, make, path, content):
        reader = make(path, SEPARATE)
        batches = []
        for first in range(8):
            buffer = blank(40)
            ranges = range(first, first + 400, 10), [1] * 40, range(40)
            batches.append((buffer, ranges, read(reader, buffer, *ranges)))
        orders = [batches, batches[::-1], batches[3:], batches[:5]]
        threads = [
            threading.Thread(target=lambda order=order: [pending.wait() for _, _, pending in order], daemon=True)
            for order in orders
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads)
        for buffer, ranges, _ in batches:
            check(content, buffer, *ranges)

    def test_a_dropped_reader_ends_its_reads_and_closes_its_file(self, path):
        before = len(os.listdir("/proc/self/fd"))
        reader = open_reader(path, backend=self.backend, tuning=SEPARATE, compiled=self.compiled)
        buffer = blank(200)
        pending = read(reader, buffer, range(0, 400, 2), [1] * 200, range(200))
        del reader, pending
        gc.collect()
        assert len(os.listdir("/proc/self/fd")) == before
        buffer[:] = FILLER
        time.sleep(0.02)
        assert (buffer == FILLER).all()

    @pytest.mark.parametrize("call", ["submit", "wait"])
    def test_an_interrupt_at_any_line_leaves_nothing_in_flight_and_the_reader_whole(self, make, path, content, call):
        reader = make(path, SEPARATE)
        ranges = range(0, 40, 2), [1] * 20, range(20)
        outcomes = set()
        for countdown in itertools.count(step=self.line_step):
            other = blank(20)
            earlier = read(reader, other, *ranges)
            buffer = blank(20)
            tracer = _InterruptAtLine(countdown)
            pending = None
            try:
                if call == "submit":
                    with tracer:
                        pending = read(reader, buffer, *ranges)
                else:
                    pending = read(reader, buffer, *ranges)
                    with tracer:
                        pending.wait()
            except KeyboardInterrupt:
                buffer[:] = FILLER
                time.sleep(0.0005)
                assert (buffer == FILLER).all()
                assert pending is None or pending.is_done
            try:
                earlier.wait()
            except FlashReadError as error:
                outcomes.add(error.message)
            else:
                outcomes.add("read")
                check(content, other, *ranges)
            read(reader, buffer, *ranges).wait()
            check(content, buffer, *ranges)
            if not tracer.has_fired:
                break
        assert countdown > 20
        assert outcomes == {"read", "reading was interrupted"}


class _InterruptAtLine:
    """Raises KeyboardInterrupt before the given line, counted over what is run of the queues and their reader.

    Lines with ``with`` do not count: they are traced again between the block and the release of its lock, where the
    interpreter runs no handlers.
    """

    def __init__(self, countdown):
        self.countdown = countdown
        self.has_fired = False

    def __enter__(self):
        self.before = sys.gettrace()
        sys.settrace(self.trace)

    def __exit__(self, *exception):
        sys.settrace(self.before)

    def trace(self, frame, event, argument):
        if not frame.f_code.co_filename.endswith("_queue.py") and "queue_reader" not in frame.f_code.co_filename:
            return None
        if event != "line" or self.has_fired:
            return self.trace
        if linecache.getline(frame.f_code.co_filename, frame.f_lineno).lstrip().startswith("with "):
            return self.trace
        if self.countdown == 0:
            self.has_fired = True
            raise KeyboardInterrupt
        self.countdown -= 1
        return self.trace


class TestUring(QueueContract):
    backend = "uring"
    queue = UringQueue
    calls = ("io_uring_enter",)
    line_step = 1


class TestAio(QueueContract):
    backend = "aio"
    queue = AioQueue
    calls = ("io_submit", "io_getevents")
    line_step = 9  # ending a context takes a tenth of a second


class TestCompiledUring(QueueContract):
    backend = "uring"
    compiled = True
    queue = CompiledUringQueue
    calls = ("io_uring_enter",)
    line_step = 1


class TestCompiledAio(QueueContract):
    backend = "aio"
    compiled = True
    queue = CompiledAioQueue
    calls = ("io_submit", "io_getevents")
    line_step = 9
