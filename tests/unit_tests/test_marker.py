import json
import textwrap
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from langchain_latentmas import LatentRef, LatentService
from langchain_latentmas.errors import InvalidReference, InvalidRequest, TamperedReference, UnknownReference, WrongModel
from langchain_latentmas.service.identity import Signer
from langchain_latentmas.service.marker import MAX_LEFT, MAX_MARKERS, Marker, take_markers

SIGNER = Signer(b"k" * 32)
names = st.text(min_size=1, max_size=40).filter(lambda s: s.isprintable() and s.strip() == s and "  " not in s)


def marker(agent: str = "planner", steps: int = 20) -> Marker:
    ref = LatentRef(id="lat_" + "a" * 32, agent=agent, model="b" * 32, parents=[], positions=9, steps=steps, mac="")
    return Marker.of(ref, SIGNER)


@given(names, st.integers(0, 10**8))
def test_any_agent_comes_back_from_its_marker(agent: str, steps: int) -> None:
    made = marker(agent, steps)
    assert str(made).isascii()
    assert take_markers(f"Before {made} after.") == ("Before  after.", [made])
    assert made.genuine(SIGNER)


@given(names)
def test_a_marker_survives_json_and_wrapping(agent: str) -> None:
    made = marker(agent)
    assert take_markers(json.loads(json.dumps({"plan": str(made)}))["plan"])[1] == [made]
    assert take_markers(json.dumps([str(made)]))[1] == [made]
    wrapped = textwrap.fill(f"The plan is {made} and so on.", 60, break_long_words=False, break_on_hyphens=False)
    assert take_markers(wrapped)[1] == [made]


def test_markers_come_in_order_and_leave_what_is_asked() -> None:
    one, two = marker("one"), marker("two")
    assert take_markers(f"{one}, {two}", "[…]") == ("[…], […]", [one, two])


def test_a_text_grows_by_no_more_than_is_stated() -> None:
    most = str(marker()) * MAX_MARKERS
    text, found = take_markers(most, "x" * MAX_LEFT)
    assert (len(text), len(found)) == (MAX_LEFT * MAX_MARKERS, MAX_MARKERS)
    with pytest.raises(InvalidRequest, match=f"more than {MAX_MARKERS} markers"):
        take_markers(most + str(marker()))
    with pytest.raises(InvalidRequest, match=f"{MAX_LEFT} characters"):
        take_markers("none here", "x" * (MAX_LEFT + 1))


@given(st.data())
def test_no_edit_of_the_signed_part_is_genuine(data: st.DataObject) -> None:
    text = str(marker())
    at = data.draw(st.integers(text.index("planner"), len(text) - 2))
    other = data.draw(st.sampled_from("0123456789abcdefxyz "))
    assume(other != text[at])
    try:
        _, found = take_markers(text[:at] + other + text[at + 1 :])
    except TamperedReference:
        return
    assert all(not each.genuine(SIGNER) for each in found)


@pytest.mark.parametrize(("written", "edited"), [("3 steps", "03 steps"), ("%C3", "%c3"), ("nner", "n%6Eer")])
def test_another_spelling_of_the_same_is_an_edit(written: str, edited: str) -> None:
    made = str(marker("Plänner", 3))
    assert take_markers(made)[1]
    with pytest.raises(TamperedReference, match="cut or edited"):
        take_markers(made.replace(written, edited))


@given(st.text(alphabet=st.characters(exclude_characters="\0")))
def test_ordinary_text_is_left_alone(text: str) -> None:
    assume("lat_" not in text)
    assert take_markers(text) == (text, [])


@pytest.mark.parametrize("text", ["[latent space]", "the [latent diffusion] takes 20 steps", "plates lat_ [x]", "[[]]"])
def test_words_like_latent_and_brackets_are_text(text: str) -> None:
    assert take_markers(text) == (text, [])


def test_a_service_reads_its_own_markers_and_no_others(fresh_service: Any) -> None:
    service: LatentService = fresh_service(key=b"k" * 32)
    ref = service.think("Plan.", steps=2, agent="planner")
    made = service.marker(ref)
    assert service.take_markers(f"Look: {made}") == ("Look: ", [ref])
    with pytest.raises(TamperedReference):
        service.take_markers(made.replace("2 steps", "3 steps"))
    with pytest.raises(TamperedReference):
        fresh_service().take_markers(made)
    with pytest.raises(UnknownReference):
        fresh_service(key=b"k" * 32).take_markers(made)
    with pytest.raises(WrongModel, match="to text"):
        fresh_service("llama-untied", key=b"k" * 32).take_markers(made)
    with pytest.raises(InvalidReference):
        service.marker({**ref, "steps": 9})  # type: ignore[typeddict-item]
