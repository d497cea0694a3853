import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from langchain_latentmas import LatentService
from langchain_latentmas.engine.text import TextStream

from ..support import PARITY, messages, say

TOKENIZER: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(PARITY / "qwen3-tied" / "model")
BYTES = sorted(range(256))
PROMPT = messages("Tell me a story.", "You are a writer.")


def byte_tokens() -> list[int]:
    """The token of every byte, by the byte-level alphabet that GPT-2 introduced."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = (b for b in range(256) if b not in printable)
    letters = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    return [TOKENIZER.convert_tokens_to_ids(letters[b]) for b in BYTES]


OF_BYTE = byte_tokens()


def stream(tokens: list[int], stop: tuple[str, ...] = ()) -> tuple[list[str], TextStream]:
    text = TextStream(TOKENIZER, stop)
    return [*(text.push(token) for token in tokens), text.end()], text


def tokens_of(text: str) -> list[int]:
    return [OF_BYTE[b] for b in text.encode()]


def test_a_text_of_replacement_signs_streams_and_stops() -> None:
    pieces, text = stream(tokens_of("\ufffd" * 50))
    assert "".join(pieces) == "\ufffd" * 50
    assert len("".join(pieces[:-1])) > 45
    assert max(len(text._ids) - text._read, text._read - text._context) <= 8  # each token costs as much as the last
    _, text = stream(tokens_of("\ufffd" * 50), stop=("\ufffd" * 7,))
    assert text.stopped


@given(st.binary(max_size=40), st.lists(st.sampled_from(["a", "\ufffd", "b a", "ü"]), max_size=2))
@example("so, ü".encode(), ["ü"])
@example(b"\xf0\x9f\x8c ab a", ["b a"])
def test_a_text_that_nobody_reads_along_comes_whole_at_its_end(data: bytes, stop: list[str]) -> None:
    loud, quiet = TextStream(TOKENIZER, stop), TextStream(TOKENIZER, stop, quiet=True)
    pieces = []
    for byte in data:
        pieces.append(loud.push(OF_BYTE[byte]))
        assert quiet.push(OF_BYTE[byte]) == ""
        assert quiet.stopped == loud.stopped
    assert quiet.end() == "".join([*pieces, loud.end()])
    assert quiet.stopped == loud.stopped


def test_the_alphabet_covers_every_byte() -> None:
    assert len(set(OF_BYTE)) == 256
    assert TOKENIZER.decode(tokens_of("Grüße 🌍")) == "Grüße 🌍"


@given(st.binary(max_size=40))
@example(b"\xff\xfe a")
@example("a\ufffdb\ufffd".encode())
@example(b"\xe2\x82")
@example(b"\xf0\x9f\x8c" * 9 + b"\xf0\x9f\x8c\x8d")
@example(b"\xff" * 11 + b"\xf0\x9f\x8c\x8d" * 3)
@example(b"\xf0\x9f\x8c\x8d"[:3] + b"\xf0\x9f\x8c\x8d")
def test_the_pieces_of_any_bytes_are_what_the_tokenizer_decodes(data: bytes) -> None:
    tokens = [OF_BYTE[b] for b in data]
    assert "".join(stream(tokens)[0]) == TOKENIZER.decode(tokens, skip_special_tokens=True)


@given(st.lists(st.integers(0, len(TOKENIZER) - 1), max_size=30))
def test_the_pieces_of_any_tokens_are_what_the_tokenizer_decodes(tokens: list[int]) -> None:
    assert "".join(stream(tokens)[0]) == TOKENIZER.decode(tokens, skip_special_tokens=True)


@given(st.text(max_size=12))
def test_a_character_comes_when_its_last_byte_has_come(text: str) -> None:
    text = text.replace("\ufffd", "")
    pieces, _ = stream(tokens_of(text))
    ends, at = set[int](), -1
    for character in text:
        at += len(character.encode())
        ends.add(at)
    assert [i for i, piece in enumerate(pieces) if piece] == sorted(ends)


@given(st.text("ab", max_size=20), st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3))
@example("aab", ["ab"])
@example("abab", ["abb", "ba"])
def test_a_text_ends_before_the_stop_string_that_is_complete_first(text: str, stops: list[str]) -> None:
    pieces, made = stream(tokens_of(text), tuple(stops))

    ends = [(text.index(stop) + len(stop), text.index(stop)) for stop in stops if stop in text]
    first = min((end for end, _ in ends), default=None)
    begin = min((begin for end, begin in ends if end == first), default=len(text))
    assert "".join(pieces) == text[:begin]
    assert made.stopped == bool(ends)


@given(st.text("abc", max_size=20), st.text("ab", min_size=2, max_size=4))
def test_nothing_that_may_become_a_stop_string_is_let_out(text: str, stop: str) -> None:
    out, seen, made = "", "", TextStream(TOKENIZER, (stop,))
    for token, character in zip(tokens_of(text), text, strict=True):
        seen += character
        out += made.push(token)
        if made.stopped:
            break
        held = seen.removeprefix(out)
        assert stop.startswith(held)
        assert len(held) == max(n for n in range(len(stop)) if seen.endswith(stop[:n]))


def test_a_stop_string_may_begin_and_end_inside_tokens() -> None:
    words = TOKENIZER("what is the question", add_special_tokens=False)["input_ids"]
    assert len(words) < len("what is the question")
    pieces, made = stream(words, ("at is th",))
    assert "".join(pieces) == "wh"
    assert made.stopped


def test_after_a_stop_string_nothing_comes() -> None:
    made = TextStream(TOKENIZER, ("b",))
    assert [made.push(token) for token in tokens_of("abc")] == ["a", "", ""]
    assert made.end() == ""


def test_held_back_text_comes_at_the_end() -> None:
    assert stream(tokens_of("ab"), ("abc",))[0] == ["", "", "ab"]


@pytest.fixture(scope="module")
def story(service: LatentService) -> str:
    text = say(service, PROMPT, max_tokens=24).text
    assert len(text) > 12
    return text


def test_a_spoken_text_ends_before_its_stop_string(service: LatentService, story: str) -> None:
    stop = story[5:8]
    said = say(service, PROMPT, max_tokens=24, stop=[stop])
    assert said.text == story[: story.index(stop)]
    assert said.finish == "stop"
    assert len(said.token_ids) < 24


def test_a_stop_string_that_never_comes_changes_nothing(service: LatentService, story: str) -> None:
    said = say(service, PROMPT, max_tokens=24, stop=[story[-2:] + "zzz", "not there"])
    assert said.text == story
    assert said.finish == "length"


def test_one_stop_string_needs_no_list(service: LatentService, story: str) -> None:
    assert say(service, PROMPT, max_tokens=24, stop=story[5:8]).text == story[: story.index(story[5:8])]


def test_max_tokens_are_spoken_and_no_more(service: LatentService) -> None:
    for n in (1, 2, 5):
        said = say(service, PROMPT, max_tokens=n)
        assert len(said.token_ids) == said.usage["output_tokens"] == n
        assert said.finish == "length"
        assert service.memory(said.ref).segments[-1].spoken_ids == said.token_ids
