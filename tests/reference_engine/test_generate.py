import time

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from flashfmt.errors import FlashError, PromptError
from flashfmt.manifest import SpecialTokens
from reference_engine.flash_io import IoCounters
from reference_engine.generate import Piece, generate
from reference_engine.sampler import SamplingOptions
from reference_engine.tokenizer import Tokenizer

GREEDY = SamplingOptions(temperature=0)


def byte_tokenizer():
    """A token for each byte, and three special ones after them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    library = tokenizers.Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([AddedToken("<bos>"), AddedToken("<eos>"), AddedToken("<mark>")])
    return library


LIBRARY = byte_tokenizer()
BOS, EOS, MARK = (LIBRARY.token_to_id(token) for token in ("<bos>", "<eos>", "<mark>"))
VOCAB_SIZE = LIBRARY.get_vocab_size()
TOKENIZER = Tokenizer(LIBRARY.to_str().encode(), SpecialTokens(bos=BOS, eos=(EOS,)))


def ids_of(text):
    return TOKENIZER.encode(text, add_special_tokens=False)


class ScriptedModel:
    """Wants to say a given sequence of tokens; each step reads 100 bytes in 2 requests and waits a second for them."""

    def __init__(self, script, context_tokens=1000):
        self.script = list(script)
        self.context_tokens = context_tokens
        self.vocab_size = VOCAB_SIZE
        self.fed = []
        self.n_steps = 7  # steps that others took before

    def start(self):
        return ScriptedSession(self)

    def counters(self):
        return IoCounters(100 * self.n_steps, 2 * self.n_steps, float(self.n_steps))


class ScriptedSession:
    def __init__(self, model, n_tokens=0):
        self.model = model
        self.n_tokens = n_tokens

    def feed(self, token_ids):
        self.model.fed.append(list(token_ids))
        self.model.n_steps += 1
        self.n_tokens += len(token_ids)
        logits = np.zeros(VOCAB_SIZE, np.float32)
        logits[self.model.script[len(self.model.fed) - 1]] = 9
        return logits


def say(script, *, prompt="p", model=None, tokenizer=TOKENIZER, **options):
    model = model or ScriptedModel(script)
    settings = {"sampling": GREEDY, "max_tokens": None} | options
    return generate(model, tokenizer, ids_of(prompt) if isinstance(prompt, str) else prompt, **settings)


def test_pieces_come_token_by_token_and_end_at_eos():
    model = ScriptedModel([*ids_of("héy"), EOS])
    generation = say(None, model=model, prompt="ab")
    assert generation.finish_reason is None
    assert [(piece.token_id, piece.text) for piece in generation] == list(
        zip(ids_of("héy"), ["h", "", "é", "y"], strict=True)
    )
    assert generation.finish_reason == "eos"
    assert generation.text == "héy"
    assert generation.token_ids == [*ids_of("héy"), EOS]
    assert model.fed == [ids_of("ab"), *([token] for token in ids_of("héy"))]


def test_nothing_is_computed_before_it_is_asked_for():
    model = ScriptedModel([*ids_of("abc"), EOS])
    generation = say(None, model=model)
    assert model.fed == []
    assert next(iter(generation)).text == "a"
    assert len(model.fed) == 1
    assert generation.text == "a"
    assert "".join(piece.text for piece in generation) == "bc"


@pytest.mark.parametrize("max_tokens", [1, 3])
def test_length(max_tokens):
    model = ScriptedModel(ids_of("abcdef"))
    generation = say(None, model=model, max_tokens=max_tokens)
    assert "".join(piece.text for piece in generation) == "abcdef"[:max_tokens]
    assert generation.finish_reason == "length"
    assert len(model.fed) == max_tokens


@pytest.mark.parametrize("n_prompt", [1, 4, 5])
def test_a_full_context_ends_the_text(n_prompt):
    model = ScriptedModel(ids_of("abcdefgh"), context_tokens=5)
    generation = say(None, model=model, prompt="p" * n_prompt)
    list(generation)
    assert generation.finish_reason == "context"
    assert generation.text == "abcdefgh"[: 5 - n_prompt + 1]  # the last token needs no room


def test_a_stop_string_over_several_tokens_is_not_passed_on():
    generation = say(ids_of("one\n\ntwo"), stop=["\n\n", "###"])
    texts = [piece.text for piece in generation]
    assert texts == ["o", "n", "e", "", ""]
    assert (generation.finish_reason, generation.text) == ("stop", "one")


def test_text_held_back_for_a_stop_string_comes_in_the_end():
    generation = say([*ids_of("a#"), EOS], stop=["##"])
    assert [*generation] == [Piece(ids_of("a")[0], "a"), Piece(ids_of("#")[0], ""), Piece(None, "#")]
    assert (generation.finish_reason, generation.text) == ("eos", "a#")


def test_an_incomplete_character_comes_in_the_end():
    generation = say(ids_of("é")[:1], max_tokens=1)
    assert [piece.text for piece in generation] == ["", "\ufffd"]


def test_what_was_held_back_keeps_its_order():
    generation = say([*ids_of("#"), *ids_of("é")[:1]], stop=["##"], max_tokens=2)
    assert "".join(piece.text for piece in generation) == "#\ufffd"


@settings(max_examples=50, deadline=None)
@given(text=st.text("ab\n你", max_size=20), stop=st.lists(st.text("ab\n", min_size=1, max_size=3), max_size=2))
def test_the_text_is_what_stands_before_the_first_stop_string(text, stop):
    generation = say([*ids_of(text), EOS], stop=stop)
    joined = "".join(piece.text for piece in generation)
    found = [(text.find(s) + len(s), text.find(s)) for s in stop if s in text]
    assert joined == generation.text == (text[: min(found)[1]] if found else text)
    assert generation.finish_reason == ("stop" if found else "eos")


def test_eos_can_be_ignored():
    generation = say([*ids_of("a"), EOS, *ids_of("b")], ignore_eos=True, max_tokens=3)
    list(generation)
    assert (generation.finish_reason, generation.text) == ("length", "ab")


def test_any_of_several_eos_tokens_ends_the_text():
    generation = say([*ids_of("a"), MARK], tokens=SpecialTokens(eos=(EOS, MARK)))
    list(generation)
    assert generation.finish_reason == "eos"


@pytest.mark.parametrize(("show", "text"), [(False, "a"), (True, "a<mark>")])
def test_special_tokens_are_shown_on_request(show, text):
    generation = say([*ids_of("a"), MARK, EOS], show_special_tokens=show)
    list(generation)
    assert generation.text == text


def test_without_a_tokenizer_there_are_token_ids_only():
    generation = say([5, 6, 2], tokenizer=None, prompt=[9], tokens=SpecialTokens(eos=(2,)))
    assert [*generation] == [Piece(5, ""), Piece(6, "")]
    assert (generation.finish_reason, generation.text, generation.token_ids) == ("eos", "", [5, 6, 2])


def test_penalties_see_the_prompt_and_what_was_generated():
    options = SamplingOptions(temperature=0, presence_penalty=50.0)
    model = ScriptedModel(ids_of("paa"))
    generation = say(None, model=model, prompt="p", sampling=options, max_tokens=3)
    list(generation)
    wanted = ids_of("paa")
    assert generation.token_ids[0] != wanted[0]
    assert generation.token_ids[1] == wanted[1]
    assert generation.token_ids[2] != wanted[2]


def test_a_session_is_gone_on_with():
    model = ScriptedModel(ids_of("abc"), context_tokens=10)
    generation = say(None, model=model, prompt="pq", session=ScriptedSession(model, n_tokens=7))
    list(generation)
    assert (generation.finish_reason, generation.text) == ("context", "ab")
    assert generation.session.n_tokens == 10
    with pytest.raises(PromptError, match="2 tokens after 9 that came before"):
        say(None, model=model, prompt="pq", session=ScriptedSession(model, n_tokens=9))
    with pytest.raises(PromptError, match="empty"):
        say(None, model=model, prompt="", session=ScriptedSession(model, n_tokens=9))


def test_an_empty_prompt_is_the_bos_token():
    model = ScriptedModel([EOS])
    list(say(None, model=model, prompt=""))
    assert model.fed == [[BOS]]


def test_an_empty_prompt_without_bos_is_refused():
    with pytest.raises(PromptError, match="empty"):
        say([EOS], prompt=[], tokens=SpecialTokens())


def test_a_prompt_longer_than_the_context_names_both_numbers():
    with pytest.raises(PromptError, match=r"6 tokens.*context of 5") as caught:
        say(None, model=ScriptedModel([], context_tokens=5), prompt="p" * 6)
    assert caught.value.actual == 6


@pytest.mark.parametrize("token", [-1, VOCAB_SIZE])
def test_token_ids_outside_the_vocabulary_are_refused(token):
    with pytest.raises(PromptError, match="token 1 of the prompt") as caught:
        say([EOS], prompt=[3, token])
    assert caught.value.actual == token


def test_requests_that_make_no_sense_are_refused():
    with pytest.raises(PromptError, match="at least 1"):
        say([EOS], max_tokens=0)
    with pytest.raises(PromptError, match="stop string"):
        say([EOS], stop=[""])
    with pytest.raises(PromptError, match="tokenizer"):
        say([EOS], tokenizer=None, stop=["x"])


def test_statistics_count_this_run_only():
    generation = say([*ids_of("abc"), EOS], prompt="pq")
    assert generation.statistics.generated_tokens == 0
    list(generation)
    statistics = generation.statistics
    assert (statistics.prompt_tokens, statistics.generated_tokens) == (2, 4)
    assert statistics.io == IoCounters(400, 8, 4.0)
    assert statistics.decode_io == IoCounters(300, 6, 3.0)
    assert statistics.bytes_read_per_token == 100
    assert 0 < statistics.first_token_seconds < statistics.total_seconds
    assert statistics.peak_memory_bytes > 1 << 20


def test_time_that_the_receiver_takes_does_not_count():
    generation = say([*ids_of("abc"), EOS])
    for _ in generation:
        time.sleep(0.1)
    assert generation.statistics.total_seconds < 0.25


def test_an_error_of_the_model_comes_through_and_what_was_generated_stays():
    model = ScriptedModel(ids_of("ab"))
    session = model.start()
    feed = session.feed
    session.feed = lambda ids: feed(ids) if len(model.fed) < 2 else np.full(VOCAB_SIZE, np.nan, np.float32)
    generation = say(None, model=model, session=session)
    with pytest.raises(FlashError, match="logits"):
        list(generation)
    assert (generation.text, generation.finish_reason) == ("ab", None)
    assert generation.statistics.generated_tokens == 2
