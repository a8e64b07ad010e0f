import re

import pytest
import tokenizers
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

from flashfmt.errors import PromptError, UnsupportedError
from flashfmt.manifest import SpecialTokens
from reference_engine.tokenizer import Tokenizer, load_tokenizer

TEXT = "the quick brown fox isn't jumping over the lazy dog 12 times  twice\n" * 3 + "größer 你好 你们 привет 👩‍🚀\n"
SPECIAL = ["<unk>", "<s>", "</s>", "<|user|>"]
ADDED = [AddedToken(" plain added", special=False, normalized=False), AddedToken("ñ☃", special=False, normalized=False)]
REPLACED = "\ufffd"


def special(tokens):
    return [AddedToken(token, special=True, normalized=False) for token in tokens]


def byte_level():
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator([TEXT], trainer)
    library.add_tokens(ADDED)
    return library


def byte_fallback(*, strip=True, vocabulary_of=TEXT[:200]):
    pieces = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    letters = sorted(set(vocabulary_of) - set(" \n"))
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("▁", "▁"), ("▁", "q"), ("o", "x"), ("▁▁", "▁▁")]
    pieces += [*letters, "▁", *(left + right for left, right in merges)]
    library = tokenizers.Tokenizer(
        models.BPE(
            vocab={piece: i for i, piece in enumerate(pieces)},
            merges=merges,
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if strip:
        library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        steps.append(decoders.Strip(" ", 1, 0))
    else:
        library.normalizer = normalizers.Replace(" ", "▁")
    library.decoder = decoders.Sequence(steps)
    library.add_special_tokens(special(SPECIAL))
    library.add_tokens(ADDED)
    return library


def metaspace():
    library = byte_fallback()
    library.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()])
    return library


LIBRARIES = {
    "byte_level": byte_level(),
    "byte_fallback": byte_fallback(),
    "byte_fallback_unstripped": byte_fallback(strip=False),
    "metaspace": metaspace(),
}
TOKENIZERS = {
    name: Tokenizer(library.to_str().encode(), SpecialTokens(bos=1, eos=(2,))) for name, library in LIBRARIES.items()
}
NAMES = st.sampled_from(sorted(TOKENIZERS))
UNICODE = st.text(st.characters(exclude_categories=("Cs",)) | st.sampled_from(" \nthe qox你👩\u200d🚀ñ☃"), max_size=30)


def streamed(tokenizer, ids, *, skip=False):
    stream = tokenizer.stream(skip_special_tokens=skip)
    return [*(stream.push(token) for token in ids), stream.flush()]


def byte_rows(tokenizer, ids):
    """The bytes of each row of byte-fallback tokens."""
    spelled = "".join(tokenizer.token(token) or "" for token in ids)
    for row in re.findall(r"(?:<0x[0-9A-F]{2}>)+", spelled):
        yield bytes.fromhex(row.replace("<0x", "").replace(">", ""))


def is_utf8(data):
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


@settings(max_examples=150, deadline=None)
@given(name=NAMES, text=UNICODE)
def test_streaming_a_text_gives_the_decoded_text(name, text):
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(text, add_special_tokens=False)
    assume(all(is_utf8(row) for row in byte_rows(tokenizer, ids)))
    pieces = streamed(tokenizer, ids)
    assert "".join(pieces) == LIBRARIES[name].decode(ids, skip_special_tokens=False)
    assert pieces[-1] == ""


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, LIBRARIES["byte_level"].get_vocab_size() + 2), max_size=40), skip=st.booleans())
def test_streaming_random_byte_level_tokens_gives_the_decoded_text(ids, skip):
    pieces = streamed(TOKENIZERS["byte_level"], ids, skip=skip)
    assert "".join(pieces) == LIBRARIES["byte_level"].decode(ids, skip_special_tokens=skip)


@settings(max_examples=200, deadline=None)
@given(data=st.data(), name=st.sampled_from(["byte_fallback", "byte_fallback_unstripped", "metaspace"]))
def test_streaming_random_byte_fallback_tokens_gives_the_decoded_text(data, name):
    tokenizer, library = TOKENIZERS[name], LIBRARIES[name]
    skip = data.draw(st.booleans())
    words = st.integers(0, 3) | st.integers(260, library.get_vocab_size() + 2)
    characters = st.sampled_from(" \n\x7fé你👩").map(
        lambda c: [library.token_to_id(f"<0x{b:02X}>") for b in c.encode()]
    )
    parts = data.draw(st.lists(words.map(lambda token: [token]) | characters, max_size=25))
    ids = [token for part in parts for token in part]
    assert "".join(streamed(tokenizer, ids, skip=skip)) == library.decode(ids, skip_special_tokens=skip)


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(4, 259) | st.integers(132, 259) | st.integers(260, 290), max_size=25))
def test_in_malformed_rows_complete_characters_survive(ids):
    """Where the library gives U+FFFD for each byte of a malformed row, the stream decodes it as UTF-8 is decoded."""
    tokenizer, library = TOKENIZERS["byte_fallback_unstripped"], LIBRARIES["byte_fallback_unstripped"]
    data = b"".join(
        bytes([token - 4]) if 4 <= token < 260 else library.id_to_token(token).replace("▁", " ").encode()
        for token in ids
    )
    assert "".join(streamed(tokenizer, ids)) == data.decode(errors="replace")


@pytest.mark.parametrize("name", sorted(TOKENIZERS))
def test_a_split_character_comes_whole_with_its_last_token(name):
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode("x👩y", add_special_tokens=False)
    pieces = streamed(tokenizer, ids)
    assert "👩" in pieces
    assert REPLACED not in "".join(pieces)
    assert pieces[pieces.index("👩") - 1] == ""


@pytest.mark.parametrize("name", sorted(TOKENIZERS))
def test_a_character_left_incomplete_is_flushed_as_one_replacement(name):
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode("x👩", add_special_tokens=False)
    *pieces, last = streamed(tokenizer, ids[:-1])
    assert "".join(pieces).strip() == "x"
    assert last == REPLACED


def test_spaces_survive_in_the_middle_and_one_goes_at_the_start():
    tokenizer = TOKENIZERS["byte_fallback"]
    ids = tokenizer.encode("the the  the", add_special_tokens=False)
    assert streamed(tokenizer, ids)[0] == "the"
    assert "".join(streamed(tokenizer, ids)) == "the the  the"
    the = tokenizer.encode("the", add_special_tokens=False)
    assert streamed(tokenizer, [*the, *the]) == ["the", " the", ""]


def test_newlines_of_byte_tokens_come_at_once():
    tokenizer = TOKENIZERS["byte_fallback"]
    stream = tokenizer.stream()
    assert [stream.push(token) for token in tokenizer.encode("o\no", add_special_tokens=False)][-2:] == ["\n", "o"]


@pytest.mark.parametrize("name", sorted(TOKENIZERS))
def test_special_tokens_are_shown_or_skipped(name):
    tokenizer = TOKENIZERS[name]
    ids = [1, *tokenizer.encode("o<|user|>x plain added", add_special_tokens=False), 2]
    shown, skipped = ("".join(streamed(tokenizer, ids, skip=skip)) for skip in (False, True))
    assert shown.startswith("<s>")
    assert shown.endswith("</s>")
    assert "<|user|>" in shown
    assert not any(token in skipped for token in SPECIAL)
    assert skipped.endswith("x plain added")


def test_the_cost_of_a_token_does_not_grow_with_the_text(monkeypatch):
    tokenizer = TOKENIZERS["byte_fallback"]
    decoded = []
    monkeypatch.setattr(
        Tokenizer,
        "decode",
        lambda self, ids, **options: decoded.append(len(ids)) or LIBRARIES["byte_fallback"].decode(ids),
    )
    the = tokenizer.encode("the", add_special_tokens=False)
    stream = tokenizer.stream()
    for token in the * 200:
        stream.push(token)
    assert max(decoded) == 2


def test_without_a_decoder_tokens_are_joined_by_spaces():
    library = tokenizers.Tokenizer(models.WordLevel({"one": 0, "two": 1, "<unk>": 2}, unk_token="<unk>"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = Tokenizer(library.to_str().encode(), SpecialTokens())
    assert streamed(tokenizer, [0, 1, 1]) == ["one", " two", " two", ""]


@pytest.mark.parametrize(
    "decoder",
    [decoders.BPEDecoder(), decoders.CTC(), decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1)])],
)
def test_decoders_that_cannot_be_streamed_are_refused(decoder):
    library = byte_fallback()
    library.decoder = decoder
    with pytest.raises(UnsupportedError, match="decoder"):
        Tokenizer(library.to_str().encode(), SpecialTokens())


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff", b'{"model": 1}'])
def test_what_is_no_tokenizer_is_refused(content):
    with pytest.raises(PromptError, match="files/tokenizer"):
        Tokenizer(content, SpecialTokens())


def test_truncation_and_padding_of_the_file_are_ignored():
    library = byte_level()
    library.enable_truncation(3)
    library.enable_padding(length=64)
    ids = Tokenizer(library.to_str().encode(), SpecialTokens()).encode("the quick brown fox", add_special_tokens=True)
    assert ids == byte_level().encode("the quick brown fox").ids
    assert 3 < len(ids) < 64


def test_the_manifest_decides_on_bos():
    library = byte_level()
    library.post_processor = processors.TemplateProcessing(
        single="<|user|> $A </s>", special_tokens=[("<|user|>", 3), ("</s>", 2)]
    )
    content = library.to_str().encode()
    plain = Tokenizer(content, SpecialTokens()).encode("fox", add_special_tokens=True)
    assert not {1, 2, 3} & set(plain)
    assert Tokenizer(content, SpecialTokens(bos=1)).encode("fox", add_special_tokens=True) == plain
    adding = Tokenizer(content, SpecialTokens(bos=1, add_bos=True))
    assert adding.encode("fox", add_special_tokens=True) == [1, *plain]
    assert adding.encode("fox", add_special_tokens=False) == plain
    assert adding.encode("<s>fox", add_special_tokens=True) == [1, *plain]
    assert adding.encode("", add_special_tokens=True) == [1]


def test_a_text_that_is_no_unicode_is_refused():
    with pytest.raises(PromptError, match="character 2"):
        TOKENIZERS["byte_level"].encode("ab\udcff", add_special_tokens=True)


class FileOf:
    """A flash model, as far as its tokenizer goes."""

    path = "m.flash"

    def __init__(self, content):
        self.content = content
        self.manifest = self
        self.tokens = SpecialTokens(bos=1)

    def file(self, role):
        return self.content if role == "tokenizer" else None


def test_the_tokenizer_of_a_file():
    tokenizer = load_tokenizer(FileOf(LIBRARIES["byte_level"].to_str().encode()))
    assert tokenizer.tokens.bos == 1
    assert tokenizer.token(1) == "<s>"
    assert tokenizer.token(1 << 20) is None
    assert tokenizer.vocab_size == LIBRARIES["byte_level"].get_vocab_size()


def test_a_file_without_a_tokenizer_says_what_to_do():
    with pytest.raises(PromptError, match=r"m\.flash.*no tokenizer.*token ids"):
        load_tokenizer(FileOf(None))
