import json
import textwrap

import ormsgpack
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage
from langchain_core.prompts import ChatPromptTemplate

from langchain_latentmas import LatentService
from langchain_latentmas.errors import TamperedReference
from langchain_latentmas.service.identity import Signer
from langchain_latentmas.service.marker import Marker, take_markers
from langchain_latentmas.state import LatentRef

from ..support import messages

SIGNER = Signer(bytes(range(32)))
AGENTS = st.text(min_size=1, max_size=200)
HARD_AGENTS = (
    "plan-and-solve",
    "data  analyst",
    " x ",
    "100 %",
    "a+b",
    "Анна",
    "🦜" * 200,
    "]",
    "[latent a]",
    "7 steps",
)


def marker_of(agent: str = "planner", steps: int = 20) -> Marker:
    ref = LatentRef(id="lat_" + "3f9a" * 8, agent=agent, model="5e" * 16, parents=[], positions=9, steps=steps, mac="")
    return Marker.of(ref, SIGNER)


@given(AGENTS, st.integers(0, 999_999_999), st.text(), st.text())
@example("a", 1, "\0", "[")
def test_a_marker_comes_out_of_any_text_as_it_went_in(agent: str, steps: int, before: str, after: str) -> None:
    marker = marker_of(agent, steps)
    text, found = take_markers(f"{before}{marker}{after}", left="<here>")
    assert text == f"{before}<here>{after}"
    assert found == [marker]
    assert found[0].genuine(SIGNER)


@given(st.lists(AGENTS, min_size=1, max_size=4))
def test_markers_come_out_in_their_order(agents: list[str]) -> None:
    markers = [marker_of(agent, steps) for steps, agent in enumerate(agents)]
    text, found = take_markers("then".join(map(str, markers)))
    assert text == "then" * (len(agents) - 1)
    assert found == markers


@given(AGENTS)
def test_a_marker_is_ascii_that_json_and_templates_leave_alone(agent: str) -> None:
    text = str(marker_of(agent))
    assert text.isascii()
    assert not set("\"'\\{}<>&\n") & set(text)
    assert json.dumps(text) == f'"{text}"'
    assert ormsgpack.unpackb(ormsgpack.packb(text)) == text
    assert ChatPromptTemplate.from_messages([("human", text)]).format_messages()[0].content == text
    assert ChatPromptTemplate.from_template("{plan}").format_messages(plan=text)[0].content == text


@pytest.mark.parametrize("agent", HARD_AGENTS)
@pytest.mark.parametrize("width", [12, 30, 70, 79])
def test_a_marker_survives_wrapped_and_indented_text(agent: str, width: int) -> None:
    marker = marker_of(agent)
    wrapped = textwrap.indent(textwrap.fill(f"Check this plan: {marker} with great care, please.", width), "    ")
    assert "\n" in wrapped
    text, found = take_markers(wrapped)
    assert found == [marker]
    assert found[0].genuine(SIGNER)
    assert text.split() == "Check this plan: with great care, please.".split()


@pytest.mark.parametrize(
    "text",
    [
        "a [link](b), a list [1, 2], [latent variables], \0 and [latent diffusion 20 steps]",
        "see [latent heat and [latent",
        "[latent diffusion 20 steps, guidance 7] and then [latent]",
        f"the id lat_{'0' * 32}, and lat_ and lat.",
    ],
)
def test_text_about_latent_things_is_never_touched(text: str) -> None:
    assert take_markers(text, left="<here>") == (text, [])


def test_a_marker_cut_at_any_length_is_noticed() -> None:
    marker = str(marker_of())
    head = len("[latent planner 2")
    for length in range(head, len(marker)):
        cut = marker[:length]
        for text in (cut, f"Plan: {cut}", f"{cut}...", f"{cut}{marker}", f"planner: {cut}\n\nHow many?"):
            with pytest.raises(TamperedReference, match="cut or edited"):
                take_markers(text)
    for length in range(head):  # nothing tells these from text
        assert take_markers(marker[:length]) == (marker[:length], [])


def test_a_marker_without_its_head_is_noticed() -> None:
    marker = str(marker_of())
    for start in range(1, marker.index(".")):
        with pytest.raises(TamperedReference, match="cut or edited"):
            take_markers(marker[start:])


@pytest.mark.parametrize("change", [str.upper, str.title, str.swapcase])
def test_a_marker_in_another_case_is_noticed(change: object) -> None:
    assert callable(change)
    with pytest.raises(TamperedReference):
        take_markers(change(str(marker_of())))


@pytest.mark.parametrize("kind", [AIMessage, HumanMessage, SystemMessage])
def test_a_marker_survives_any_message_and_its_json(service: LatentService, kind: type[BaseMessage]) -> None:
    ref = service.think(messages("one"), steps=1, agent="planner")
    again = kind.model_validate_json(kind(f"Plan: {service.marker(ref)}").model_dump_json())
    assert service.take_markers(again.text) == ("Plan: ", [ref])
