"""Where the ids of the start and end tokens come from."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from flashfmt.convert.checkpoint import SourceFile
from flashfmt.convert.special_tokens import special_tokens
from flashfmt.manifest import SpecialTokens


@dataclass
class Source:
    config: dict
    files: dict = field(default_factory=dict)
    path: Path = Path("checkpoint")


def tokens(config=None, vocab_size=100, **documents):
    files = {role: SourceFile(f"{role}.json", json.dumps(value).encode()) for role, value in documents.items()}
    return special_tokens(Source(config or {}, files), vocab_size)


def test_generation_config_goes_before_config():
    config = {"bos_token_id": 1, "eos_token_id": 2}
    assert tokens(config) == SpecialTokens(bos=1, eos=(2,))
    assert tokens(config, generation_config={"eos_token_id": [5, 6]}) == SpecialTokens(bos=1, eos=(5, 6))


def test_the_tokenizers_own_tokens_are_added():
    tokenizer = {"added_tokens": [{"id": 7, "content": "<|im_end|>"}, {"id": 8, "content": "<s>"}]}
    options = {"eos_token": {"content": "<|im_end|>"}, "bos_token": "<s>"}
    found = tokens({"eos_token_id": 2}, tokenizer=tokenizer, tokenizer_config=options)
    assert found == SpecialTokens(bos=8, eos=(2, 7))


def test_ids_that_cannot_occur_are_left_out():
    assert tokens({"bos_token_id": 100, "eos_token_id": [99, 100, -1, True, None]}) == SpecialTokens(eos=(99,))
    assert tokens({"bos_token_id": None, "eos_token_id": None}) == SpecialTokens()


def processor(token_id):
    return {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [token_id], "tokens": ["<s>"]}},
    }


@pytest.mark.parametrize(
    ("options", "post_processor", "add_bos"),
    [
        ({}, None, False),
        ({"add_bos_token": True}, None, True),
        ({"add_bos_token": False}, processor(1), False),
        ({}, processor(1), True),
        ({"add_bos_token": None}, processor(1), True),
        ({}, processor(9), False),
        ({}, {"type": "Sequence", "processors": [{"type": "ByteLevel"}, processor(1)]}, True),
        ({}, {"type": "ByteLevel"}, False),
    ],
)
def test_whether_texts_start_with_the_start_token(options, post_processor, add_bos):
    found = tokens({"bos_token_id": 1}, tokenizer_config=options, tokenizer={"post_processor": post_processor})
    assert found.add_bos == add_bos
    assert not tokens({}, tokenizer_config=options, tokenizer={"post_processor": post_processor}).add_bos
