import pytest

from reference_engine.sizes import format_size, parse_size


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("0", 0),
        ("1048576", 1 << 20),
        ("6GiB", 6 << 30),
        ("6 gib", 6 << 30),
        ("1.5GB", 1_500_000_000),
        ("512M", 512 << 20),
        ("512 MiB", 512 << 20),
        ("2k", 2048),
        ("7B", 7),
    ],
)
def test_parse(text, nbytes):
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1 2", "5 apples", "1e9", "nan", "٣ GiB x"])
def test_refused(text):
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (3.5 * 2**30, "3.5 GiB"), (5 << 40, "5.0 TiB")],
)
def test_format(nbytes, text):
    assert format_size(nbytes) == text
