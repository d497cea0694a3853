"""What a client makes of a server that keeps to no bounds."""

import pytest

from langchain_latentmas.errors import ServiceUnreachable
from langchain_latentmas.service import events
from langchain_latentmas.service.events import Event, EventReader


@pytest.mark.parametrize("sent", [b"data: " + b"x" * 95, b"data: " + b"x" * 51 + b"\ndata: " + b"x" * 50 + b"\n"])
def test_an_event_that_does_not_end_is_given_up(monkeypatch: pytest.MonkeyPatch, sent: bytes) -> None:
    monkeypatch.setattr(events, "MAX_EVENT", 100)
    reader = EventReader()
    assert list(reader.feed(b"data: " + b"x" * 93)) == []
    assert list(reader.feed(b"xxxxxxx\n\n")) == [Event("message", "x" * 100)]
    with pytest.raises(ServiceUnreachable, match="more than 100 characters"):
        list(reader.feed(sent))
