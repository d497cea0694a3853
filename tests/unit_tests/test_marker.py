import hmac
from typing import Any

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from langchain_latentmas import LatentRef, LatentService
from langchain_latentmas.errors import InvalidReference, InvalidRequest, TamperedReference, UnknownReference, WrongModel
from langchain_latentmas.service.identity import Signer
from langchain_latentmas.service.marker import MAX_LEFT, MAX_MARKERS, Marker, take_markers

SIGNER = Signer(b"k" * 32)


def marker(agent: str = "planner", steps: int = 20) -> Marker:
    ref = LatentRef(id="lat_" + "a" * 32, agent=agent, model="b" * 32, parents=[], positions=9, steps=steps, mac="")
    return Marker.of(ref, SIGNER)


def test_a_marker_is_written_as_those_in_the_messages_that_there_are() -> None:
    """Threads keep them as text: whoever changes this refuses theirs."""
    written = (
        b'{"agent":"Pl\\u00e4nner one","marker":"lat_aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa","model":"bbbbbbbb","steps":20}'
    )
    mac = hmac.digest(b"k" * 32, written, "sha256").hex()[:32]
    assert str(marker("Plänner one")) == f"[latent Pl%C3%A4nner+one 20 steps lat_{'a' * 32}.bbbbbbbb.{mac}]"


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
@example("[[]]")
def test_ordinary_text_is_left_alone(text: str) -> None:
    assume("lat_" not in text)
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
