"""Recreated tokenizers against those that transformers and the `tokenizers` library make."""

import json
import warnings

import pytest
from tokenizers import AddedToken, Tokenizer

from flashfmt.convert import open_checkpoint
from flashfmt.convert.bpe import PRE_TOKENIZERS, byte_level_bpe, tokenizer_from_bpe_files
from flashfmt.convert.gguf_tokenizer import tokenizer_files
from flashfmt.errors import CheckpointError

TEXTS = [
    "Hello world! It's 2024, def foo(x):\n\treturn x+12345  # naïve café",
    "<|im_start|>user\nWhat's 1 + 22?<|im_end|>\n<|im_start|>assistant\n",
    "日本語のテキスト, emoji 🎉🎉 and   spaces   ",
    "",
    "\r\n\r\n  WE'LL they'd\t\tend123456789",
]


def from_gguf(path):
    transformers = pytest.importorskip("transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def test_smollm2_matches_transformers_and_round_trips(smollm2):
    checkpoint = open_checkpoint(smollm2)
    checkpoint.close()
    ours = Tokenizer.from_str(checkpoint.files["tokenizer"].content.decode())
    theirs = from_gguf(smollm2)
    for text in TEXTS:
        ids = ours.encode(text, add_special_tokens=False).ids
        assert ids == theirs(text, add_special_tokens=False).input_ids
        assert ours.decode(ids, skip_special_tokens=False) == text
    assert ours.token_to_id("<|im_end|>") == 2
    # transformers splits no digits here; SmolLM2's own tokenizer.json, like ours, does so before anything else
    assert ours.encode("a\t\t1").tokens == ["a", "ĉĉ", "1"]
    assert "".join(ours.encode(" 2024").tokens) == "Ġ2024"
    assert len(ours.encode("2024").ids) == 4
    options = json.loads(checkpoint.files["tokenizer_config"].content)
    assert options["eos_token"] == "<|im_end|>"
    assert options["chat_template"].encode() == checkpoint.files["chat_template"].content


BYTES = sorted(
    {chr(b) for b in [*range(33, 127), *range(161, 173), *range(174, 256)]} | {chr(256 + i) for i in range(68)}
)


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_every_pre_tokenizer_round_trips(pre):
    tokens = [*BYTES, "he", "ll", "llo", "hello", "Ġhello", "12", "123", "<end>"]
    merges = [("h", "e"), ("l", "l"), ("ll", "o"), ("he", "llo"), ("Ġ", "hello"), ("1", "2"), ("12", "3")]
    added = [AddedToken("<end>", special=True, normalized=False)]
    tokenizer = byte_level_bpe(tokens, merges, added, pre)
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.encode(" hello<end>").tokens == ["Ġhello", "<end>"]
    digits = {"smollm": 4, "qwen2": 4, "llama-bpe": 2, "gpt-2": 2}
    if pre in digits:
        assert len(tokenizer.encode("1234").ids) == digits[pre]
    assert tokenizer.decode(tokenizer.encode("a<end>").ids) == "a"  # special tokens are left out


def test_unknown_pre_tokenizers_are_refused():
    with pytest.raises(CheckpointError, match="got tiktoken"):
        byte_level_bpe(["a"], [], [], "tiktoken")


PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "h", "e", "l", "o", "he", "ll", "hell"]
PIECES += ["hello", "▁hello", "▁h", "user", "<tool>", "w", "r", "d", "or", "▁w", "▁wor", "ld", "▁world"]
KINDS = [2, 3, 3, *[6] * 256, *[1] * (len(PIECES) - 259)]
KINDS[PIECES.index("<tool>")] = 4
SCORES = [0.0] * 259 + [-float(i) for i in range(len(PIECES) - 259)]
SPM = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": PIECES,
    "tokenizer.ggml.scores": SCORES,
    "tokenizer.ggml.token_type": KINDS,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.unknown_token_id": 0,
}


def test_sentencepiece_matches_transformers(write_gguf, tmp_path):
    path = write_gguf("llama", SPM, {})
    ours = Tokenizer.from_str(tokenizer_files(SPM, path)["tokenizer"].content.decode())
    theirs = from_gguf(path)
    for text in ["hello world", " hello", "hello", "worldhello héllo", "x<tool>hello", "</s>hello", "日本"]:
        assert ours.encode(text, add_special_tokens=False).ids == theirs(text, add_special_tokens=False).input_ids, text
    encoded = ours.encode("hello world é")
    assert encoded.tokens[:3] == ["<s>", "▁hello", "▁world"]
    assert ours.decode(encoded.ids) == "hello world é"


def test_a_start_token_only_where_the_file_asks_for_it(tmp_path):
    without = {**SPM, "tokenizer.ggml.add_bos_token": False}
    files = tokenizer_files(without, tmp_path)
    assert Tokenizer.from_str(files["tokenizer"].content.decode()).encode("hello").tokens == ["▁hello"]
    assert json.loads(files["tokenizer_config"].content)["add_bos_token"] is False


def test_no_space_in_front_where_the_file_says_so(tmp_path):
    files = tokenizer_files({**SPM, "tokenizer.ggml.add_space_prefix": False}, tmp_path)
    tokenizer = Tokenizer.from_str(files["tokenizer"].content.decode())
    assert tokenizer.encode("hello world", add_special_tokens=False).tokens == ["hello", "▁world"]


def test_opt_like_files_become_a_tokenizer(tmp_path):
    tokens = ["<s>", "<pad>", "</s>", *BYTES, "he", "Ġhe"]
    (tmp_path / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nh e\nĠ he\n", encoding="utf-8")
    (tmp_path / "special_tokens_map.json").write_text('{"bos_token": {"content": "</s>"}, "eos_token": "</s>"}')
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": true}')
    tokenizer = Tokenizer.from_str(tokenizer_from_bpe_files(tmp_path).decode())
    assert tokenizer.encode("he he").tokens == ["</s>", "he", "Ġhe"]
    assert tokenizer.encode("a</s>", add_special_tokens=False).ids[-1] == 2
    (tmp_path / "merges.txt").write_text("h e l\n")
    with pytest.raises(CheckpointError, match="not two known pieces"):
        tokenizer_from_bpe_files(tmp_path)
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 2}')
    with pytest.raises(CheckpointError, match="token ids are not"):
        tokenizer_from_bpe_files(tmp_path)
