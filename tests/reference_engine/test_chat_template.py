import json
import subprocess
import sys
import time
from datetime import datetime

import pytest
import tokenizers
from tokenizers import AddedToken, models

from flashfmt.errors import PromptError
from flashfmt.manifest import SpecialTokens
from reference_engine import template_worker
from reference_engine.chat_template import ChatTemplate, TemplateLimits, load_chat_template
from reference_engine.tokenizer import Tokenizer

CHATML = """\
{%- if messages[0].role != "system" -%}
    {{- "<|im_start|>system\\nBe brief.<|im_end|>\\n" -}}
{%- endif -%}
{% for message in messages %}
    {% if message['role'] == 'assistant' %}
<|im_start|>assistant
{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}

    {% else %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' }}

    {% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""
INST = """\
{%- set ns = namespace(system='') -%}
{%- if messages[0]['role'] == 'system' -%}
    {%- set ns.system = '<<SYS>>\\n' + messages[0]['content'].strip() + '\\n<</SYS>>\\n\\n' -%}
    {%- set messages = messages[1:] -%}
{%- endif -%}
{%- for message in messages -%}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) -%}
        {{- raise_exception('Roles must alternate user and assistant') -}}
    {%- endif -%}
    {%- if message.role == 'user' -%}
        {{- bos_token ~ '[INST] ' ~ (ns.system if loop.first else '') ~ message.content | trim ~ ' [/INST]' -}}
    {%- else -%}
        {{- ' ' ~ message.content | trim ~ ' ' ~ eos_token -}}
    {%- endif -%}
{%- endfor -%}
"""
HEADERS = """\
{{- bos_token }}
{%- macro header(role) %}{{ '<|start_header_id|>' ~ role ~ '<|end_header_id|>\\n\\n' }}{% endmacro %}
{%- if tools is not none %}{{ raise_exception('no tools here') }}{% endif %}
{%- for message in messages %}
    {%- if message.role == 'skip' %}{% continue %}{% endif %}
    {{- header(message.role) }}
    {%- if message.content is string %}
        {{- message.content | trim }}
    {%- else %}
        {%- for part in message.content if part.type == 'text' %}{{ part.text }}{% endfor %}
    {%- endif %}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ header('assistant') }}{% endif %}
"""
JSONED = """\
{% for message in messages %}
  {{ message | tojson }}
  {{ message | tojson(indent=2, sort_keys=True) }}
{% endfor %}
{{ dict(a=1) | tojson }} {{ pad_token }}{{ strftime_now('%Y') }} {{ documents is none }}"""
NAMED = {"ChatML": CHATML, "INST": INST, "headers": HEADERS, "tojson": JSONED}
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
CONVERSATIONS = [
    [{"role": "user", "content": "Hi <b>&</b> 'you' 你好 👩‍🚀"}],
    [
        {"role": "system", "content": " Answer in rhyme. "},
        {"role": "user", "content": "One\n\n"},
        {"role": "assistant", "content": " Two "},
        {"role": "user", "content": "Three"},
    ],
]


def rendered(source, messages=CONVERSATIONS[0], tokens=TOKENS, add_generation_prompt=True):
    """The worker's answer, computed in this process."""
    variables = {**tokens, "messages": messages, "tools": None, "documents": None}
    variables["add_generation_prompt"] = add_generation_prompt
    request = {"source": source, "variables": variables, "max_chars": 10_000}
    return template_worker.answer(json.loads(json.dumps(request)))


@pytest.fixture(scope="module")
def oracle():
    transformers = pytest.importorskip("transformers")
    library = tokenizers.Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "x": 2}, unk_token="x"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=library, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("add_generation_prompt", [False, True])
@pytest.mark.parametrize("messages", CONVERSATIONS, ids=["one", "several"])
@pytest.mark.parametrize("name", NAMED)
def test_templates_render_as_in_transformers(oracle, name, messages, add_generation_prompt):
    expected = oracle.apply_chat_template(
        messages, chat_template=NAMED[name], tokenize=False, add_generation_prompt=add_generation_prompt
    )
    got = rendered(NAMED[name], messages, add_generation_prompt=add_generation_prompt)
    assert got == {"text": expected}
    assert "Hi" in expected or "Three" in expected


def test_contents_in_parts_and_loop_controls(oracle):
    messages = [
        {"role": "skip", "content": "gone"},
        {
            "role": "user",
            "content": [{"type": "text", "text": "Look:"}, {"type": "image"}, {"type": "text", "text": "!"}],
        },
    ]
    expected = oracle.apply_chat_template(messages, chat_template=HEADERS, tokenize=False)
    assert rendered(HEADERS, messages, add_generation_prompt=False) == {"text": expected}
    assert "gone" not in expected


def test_a_generation_block_keeps_its_variables_to_itself(oracle):
    source = "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}"
    expected = oracle.apply_chat_template(CONVERSATIONS[0], chat_template=source, tokenize=False)
    assert rendered(source) == {"text": expected} == {"text": "21"}


def test_the_clock_is_local():
    year = str(datetime.now().year)
    assert rendered("{{ strftime_now('%Y') }}")["text"] in (year, str(int(year) + 1))


@pytest.mark.parametrize(
    ("source", "line", "message"),
    [
        ("a\n{% if %}", 2, "Expected an expression"),
        ("{{ nothing }", 1, "unexpected '}'"),
        ("a\n\n{{ raise_exception('no system role') }}", 3, "no system role"),
        ("a\n{{ 1 / 0 }}", 2, "ZeroDivisionError: division by zero"),
        ("{{ messages[0].content + 1 }}", 1, "TypeError"),
        ("\n{{ missing.attribute }}", 2, "'missing' is undefined"),
        ("{{ ''.__class__.__mro__ }}", 1, "unsafe"),
        ("{{ messages.append(1) }}", 1, "unsafe"),
        ("{% set ns = namespace(__class__=1) %}", 1, "underscore"),
        ("{% set ns = namespace() %}\n{% set ns.__iter__ = 1 %}", 2, "underscore"),
        ("{{ range(1000000000) }}", 1, "Range too big"),
        ("{% for i in range(9999) %}{{ 'abc' }}{% endfor %}", None, "more than 10000 characters"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", None, "nested too deeply"),
        ("{% include 'x' %}", 1, "no loader"),
        ("{% import os %}", 1, "expected token 'as'"),
    ],
)
def test_faulty_templates_name_the_line(source, line, message):
    answer = rendered(source)
    assert "text" not in answer
    assert answer["line"] == line
    assert message in answer["error"]


def test_the_process_gives_what_the_worker_gives():
    template = ChatTemplate(CHATML, TOKENS)
    assert template.render(CONVERSATIONS[1]) == rendered(CHATML, CONVERSATIONS[1])["text"]
    assert not template.render(CONVERSATIONS[1], add_generation_prompt=False).endswith("assistant\n")


def test_fields_without_a_value_are_left_out(oracle):
    source = "{{ messages | tojson }} {{ messages[0].tool_calls is defined }}"
    messages = [{"role": "assistant", "content": "x", "tool_calls": None}]
    expected = oracle.apply_chat_template(messages, chat_template=source, tokenize=False)
    assert ChatTemplate(source, {}).render(messages) == expected == '[{"role": "assistant", "content": "x"}] False'


def test_an_error_in_the_process_names_file_and_line():
    template = ChatTemplate(INST, TOKENS, path="m.flash")
    with pytest.raises(PromptError) as caught:
        template.render([{"role": "assistant", "content": "first"}])
    assert str(caught.value) == "m.flash: chat template, line 8: Roles must alternate user and assistant"


LIMITS_MEMORY = pytest.mark.skipif(sys.platform != "linux", reason="the system does not limit address space")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "longer than 1 seconds"),
        ("{{ (10 ** 10) ** (10 ** 8) }}", "longer than 1 seconds"),
        pytest.param("{{ 'a' * 10 ** 11 }}", "memory", marks=LIMITS_MEMORY),
        pytest.param("{% set x = 'aaaaaaaa' %}" + "{% set x = x ~ x %}" * 60, "memory", marks=LIMITS_MEMORY),
        ("{% for a in range(99999) %}{{ 'a' * 9999 }}{% endfor %}", "more than 16777216 characters"),
    ],
)
def test_hostile_templates_are_stopped(source, message):
    seconds = 1 if "longer" in message else 30
    template = ChatTemplate(source, {}, limits=TemplateLimits(seconds=seconds, memory_bytes=200 << 20))
    began = time.monotonic()
    with pytest.raises(PromptError, match=message):
        template.render(CONVERSATIONS[0])
    assert time.monotonic() - began < 30


def test_a_process_that_dies_is_an_error(monkeypatch):
    dead = subprocess.CompletedProcess([], -9, b"", b"")
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: dead)
    with pytest.raises(PromptError, match="exit status -9"):
        ChatTemplate("x", {}).render(CONVERSATIONS[0])


def test_a_template_of_megabytes_is_refused():
    with pytest.raises(PromptError, match="characters"):
        ChatTemplate("x" * (1 << 20) + "y", {})


@pytest.mark.parametrize("message", [{"content": "no role"}, "text", {"role": 1, "content": ""}, None])
def test_malformed_messages_are_refused(message):
    with pytest.raises(PromptError, match="message 1"):
        ChatTemplate("x", {}).render([{"role": "user", "content": ""}, message])


def test_messages_that_are_not_json_are_refused():
    with pytest.raises(PromptError, match="JSON"):
        ChatTemplate("x", {}).render([{"role": "user", "content": object()}])


class FileOf:
    """A flash model, as far as its files go."""

    path = "m.flash"

    def __init__(self, **files):
        self.files = {
            role: text if isinstance(text, bytes) else json.dumps(text).encode() for role, text in files.items()
        }

    def file(self, role):
        content = self.files.get(role)
        return content if content is None or isinstance(content, bytes) else json.dumps(content).encode()


@pytest.fixture(scope="module")
def tokenizer():
    library = tokenizers.Tokenizer(models.WordLevel({"x": 0}, unk_token="x"))
    library.add_special_tokens([AddedToken("<bos>"), AddedToken("<eos>")])
    return Tokenizer(library.to_str().encode(), SpecialTokens(bos=1, eos=(2, 0)))


def test_the_file_of_the_template_comes_first(tokenizer):
    model = FileOf(chat_template=b"from file", tokenizer_config={"chat_template": "from config"})
    assert load_chat_template(model, tokenizer).source == "from file"


@pytest.mark.parametrize(
    "value",
    ["wanted", [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "wanted"}]],
    ids=["text", "list"],
)
def test_the_template_in_the_configuration(tokenizer, value):
    assert load_chat_template(FileOf(tokenizer_config={"chat_template": value}), tokenizer).source == "wanted"


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"tokenizer_config": {"bos_token": "<s>"}},
        {"tokenizer_config": {"chat_template": None}},
        {"tokenizer_config": {"chat_template": [{"name": "tool_use", "template": "no"}]}},
        {"chat_template": b""},
    ],
)
def test_a_file_without_a_template_says_what_to_do(tokenizer, files):
    with pytest.raises(PromptError, match=r"m\.flash.*no chat template.*flashfmt run"):
        load_chat_template(FileOf(**files), tokenizer)


@pytest.mark.parametrize(
    ("files", "place"),
    [
        ({"tokenizer_config": b"{"}, "files/tokenizer_config"),
        ({"tokenizer_config": [1]}, "files/tokenizer_config"),
        ({"chat_template": b"x", "special_tokens_map": b"\xff"}, "files/special_tokens_map"),
        ({"chat_template": b"ab\xff"}, "files/chat_template, byte 2"),
    ],
)
def test_malformed_files_are_refused(tokenizer, files, place):
    with pytest.raises(PromptError, match=place):
        load_chat_template(FileOf(**files), tokenizer)


def test_special_tokens_come_from_the_manifest_the_map_and_the_configuration(tokenizer):
    template = load_chat_template(
        FileOf(
            chat_template=b"x",
            special_tokens_map={"eos_token": {"content": "<map>"}, "pad_token": "<pad>", "unk_token": "<a>"},
            tokenizer_config={
                "unk_token": {"content": "<b>", "lstrip": False},
                "sep_token": None,
                "model_max_length": 5,
            },
        ),
        tokenizer,
    )
    assert template.special_tokens == {
        "bos_token": "<bos>",
        "eos_token": "<map>",
        "pad_token": "<pad>",
        "unk_token": "<b>",
    }
