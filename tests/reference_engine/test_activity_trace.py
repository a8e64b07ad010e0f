import json

import numpy as np
import pytest

from flashfmt.errors import FlashError, FlashWriteError
from reference_engine.activity_trace import TraceHeader, TraceWriter, read_header, read_trace

HEADER = TraceHeader("tiny", 2, 100)
GOOD = [json.dumps({"flashfmt_trace": 1, "model": "tiny", "n_layers": 2, "n_neurons": 100})]


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "t.jsonl"
    rng = np.random.default_rng(0)
    passes = [[np.flatnonzero(rng.random(100) < 0.2).astype(np.int32) for _ in range(2)] for _ in range(5)]
    with TraceWriter(path, HEADER) as writer:
        for active in passes:
            writer.write(3, [(ids, {"n_hits": 1}) for ids in active])
    assert read_header(path) == HEADER
    for recorded, active in zip(read_trace(path), passes, strict=True):
        assert recorded.n_tokens == 3
        for got, expected in zip(recorded.active, active, strict=True):
            assert got.dtype == np.int32
            np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "no flashfmt_trace"),
        (["{}"], "no flashfmt_trace"),
        (['{"flashfmt_trace": 2}'], "no flashfmt_trace"),
        (['{"flashfmt_trace": 1}'], "header has the fields"),
        ([*GOOD, "{"], "line 2: not a recorded trace: not a JSON"),
        ([*GOOD, "{}"], "a pass has the fields"),
        ([*GOOD, '{"n_tokens": 1, "layers": [{"active": [1]}]}'], "in 2 layers"),
        ([*GOOD, '{"n_tokens": 1, "layers": [{"active": [1]}, {"active": [100]}]}'], "sorted ids below 100"),
        ([*GOOD, '{"n_tokens": 1, "layers": [{"active": [2, 1]}, {"active": []}]}'], "sorted ids below 100"),
        ([*GOOD, '{"n_tokens": 1, "layers": [{"active": [-1]}, {"active": []}]}'], "sorted ids below 100"),
    ],
)
def test_damaged_traces_are_refused_with_the_line(tmp_path, lines, message):
    path = tmp_path / "t.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(FlashError, match=message):
        list(read_trace(path))


def test_files_that_cannot_be_read_or_written(tmp_path):
    with pytest.raises(FlashError, match="cannot read"):
        read_header(tmp_path / "absent")
    with pytest.raises(FlashWriteError, match="cannot write"):
        TraceWriter(tmp_path / "absent" / "t", HEADER)
    (tmp_path / "binary").write_bytes(bytes(range(200, 256)))
    with pytest.raises(FlashError, match="not text"):
        read_header(tmp_path / "binary")
