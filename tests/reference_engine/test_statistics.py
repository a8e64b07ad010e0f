import json

import pytest

from reference_engine.flash_io import IoCounters
from reference_engine.statistics import RunStatistics

RUN = RunStatistics(
    prompt_tokens=10,
    generated_tokens=5,
    first_token_seconds=2.0,
    total_seconds=4.0,
    io=IoCounters(bytes_read=9 << 20, n_requests=30, wait_seconds=1.0),
    decode_io=IoCounters(bytes_read=4 << 20, n_requests=16, wait_seconds=0.5),
    peak_memory_bytes=3 << 30,
)
NOTHING = RunStatistics(
    prompt_tokens=0,
    generated_tokens=0,
    first_token_seconds=0.0,
    total_seconds=0.0,
    io=IoCounters(),
    decode_io=IoCounters(),
    peak_memory_bytes=0,
)


def test_rates_leave_the_first_token_out():
    assert RUN.tokens_per_second == 2.0
    assert RUN.bytes_read_per_token == 1 << 20
    assert RUN.prompt_tokens_per_second == 5.0
    assert RUN.io_wait_share == 0.25


@pytest.mark.parametrize(
    "name", ["tokens_per_second", "prompt_tokens_per_second", "bytes_read_per_token", "io_wait_share"]
)
def test_rates_of_nothing_are_zero(name):
    assert getattr(NOTHING, name) == 0


def test_a_single_token_has_no_decoding_speed():
    run = RunStatistics(
        prompt_tokens=3,
        generated_tokens=1,
        first_token_seconds=1.0,
        total_seconds=1.0,
        io=IoCounters(100, 1, 0.1),
        decode_io=IoCounters(),
        peak_memory_bytes=1,
    )
    assert (run.tokens_per_second, run.bytes_read_per_token) == (0, 0)


def test_the_dictionary_is_json_and_complete():
    figures = json.loads(json.dumps(RUN.as_dict()))
    assert figures == {
        "prompt_tokens": 10,
        "generated_tokens": 5,
        "first_token_seconds": 2.0,
        "total_seconds": 4.0,
        "prompt_tokens_per_second": 5.0,
        "tokens_per_second": 2.0,
        "bytes_read": 9 << 20,
        "bytes_read_per_token": 1 << 20,
        "read_requests": 30,
        "io_wait_seconds": 1.0,
        "io_wait_share": 0.25,
        "peak_memory_bytes": 3 << 30,
    }


def test_rows_carry_units():
    rows = dict(RUN.rows())
    assert rows["generated"] == "5 tokens in 4.00 s"
    assert rows["speed after the first"] == "2.00 tokens/s"
    assert rows["read from flash"] == "9.0 MiB in 30 requests"
    assert rows["read per token"] == "1.0 MiB"
    assert rows["waiting for flash"] == "1.00 s (25%)"
    assert rows["peak memory"] == "3.0 GiB"
