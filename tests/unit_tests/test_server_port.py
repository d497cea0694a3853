import asyncio
import socket
from contextlib import closing
from typing import Any

import pytest

from langchain_latentmas.errors import InvalidRequest
from langchain_latentmas.service.port import Port
from langchain_latentmas.service.serving import ServeSettings

from ..served import TOKEN


def on(**settings: Any) -> Port:
    return Port(ServeSettings(**settings))


def number(port: Port) -> int:
    return int(port._sockets[0].getsockname()[1])


def test_a_port_in_use_is_said_in_words() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        with pytest.raises(InvalidRequest, match=f"Port {taken} of 127.0.0.1 cannot be listened on .*in use"):
            on(port=taken)


@pytest.mark.parametrize("host", ["192.0.2.1", "there..now"])
def test_so_is_a_host_that_is_not_this_machine(host: str) -> None:
    with pytest.raises(InvalidRequest, match=f"of {host} cannot be listened on"):
        on(host=host, port=0, token=TOKEN)


def test_of_two_that_take_the_same_port_the_slower_is_told() -> None:
    with closing(on(port=0)) as first, closing(on(port=number(first))) as second:
        first.open()
        with pytest.raises(InvalidRequest, match="in use"):
            second.open()


def test_nobody_waits_at_a_port_before_it_is_opened() -> None:
    with closing(on(port=0)) as port:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", number(port)), 5)
        port.open()
        socket.create_connection(("127.0.0.1", number(port)), 5).close()


def test_an_address_that_a_name_has_and_the_machine_has_not_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(host: str, port: int, **_: Any) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (at, port)) for at in ("192.0.2.1", "127.0.0.1")]

    monkeypatch.setattr(socket, "getaddrinfo", found)
    with closing(on(host="localhost", port=0)) as port:
        assert [each.getsockname()[0] for each in port.open()] == ["127.0.0.1"]


def test_small_replies_are_sent_without_delay() -> None:
    async def accepted() -> int:
        told = asyncio.get_running_loop().create_future()

        def connected(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            told.set_result(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        with closing(on(port=0)) as port:
            async with await asyncio.start_server(connected, sock=port.open()[0]):
                _, writer = await asyncio.open_connection("127.0.0.1", number(port))
                delay = await asyncio.wait_for(told, 5)
                writer.close()
                return int(delay)

    assert asyncio.run(accepted()) == 1
