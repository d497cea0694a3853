"""What a request must pass before the server parses it."""

import json

import httpx
import pytest

from langchain_latentmas.service.guard import MAX_NESTED
from langchain_latentmas.service.identity import MAX_PARENTS
from langchain_latentmas.service.server import Server
from langchain_latentmas.service.wire import MAX_MESSAGES, MAX_TOOLS, SpeakRequest

from ..conftest import Fresh
from ..served import client, serving


def asked(server: Server, content: bytes) -> tuple[int, str]:
    """Status and detail of the answer to a request to speak."""
    headers = {"content-type": "application/json"}
    reply = httpx.post(f"{server.address}/v1/speak", content=content, headers=headers, timeout=60)
    return reply.status_code, reply.json()["detail"]


@pytest.mark.parametrize("one", [b"[],", b"{},", b'{"":"[[{{"},'])
def test_a_request_has_so_many_arrays_and_objects_and_no_more(server: Server, one: bytes) -> None:
    for count, expected in ((MAX_NESTED, 422), (MAX_NESTED + 1, 413)):
        status, detail = asked(server, b'{"messages": [' + one * (count - 3) + b"{}]}")
        assert status == expected
        assert (f"more than {MAX_NESTED} arrays and objects" in detail) == (expected == 413)


def test_the_largest_request_that_makes_sense_has_fewer(fresh_service: Fresh) -> None:
    call = {"function": {"name": "add", "arguments": '{"numbers": [12, 30]}'}}
    turn = [{"role": "assistant", "tool_calls": [call] * 15}, *[{"role": "tool", "content": "42"}] * 15]
    argument = {"anyOf": [{"type": "integer"}, {"type": "null"}], "default": None}
    parameters = {"type": "object", "properties": {f"n{i}": argument for i in range(10)}, "required": ["n0"]}
    tool = {"type": "function", "function": {"name": "add", "parameters": parameters}}
    with serving(fresh_service(), max_body=1 << 22) as server, client(server) as remote:
        ref = remote.think("Plan.", steps=1)
        body = {
            "messages": turn * (MAX_MESSAGES // len(turn)),
            "latents": [ref] * MAX_PARENTS,
            "tools": [tool] * MAX_TOOLS,
        }
        content = json.dumps(body).encode()
        assert SpeakRequest.model_validate_json(content)
        assert asked(server, content)[0] == 422  # it was read, and is too much for this model alone
