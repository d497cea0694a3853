"""Sizes in settings, as people write them."""

from typing import Annotated

from pydantic import BeforeValidator, ByteSize, Field, TypeAdapter


def _bytes(value: object) -> object:
    return TypeAdapter(ByteSize).validate_python(value) if isinstance(value, str) else value


Bytes = Annotated[int, BeforeValidator(_bytes), Field(ge=0)]
"""A number of bytes, or a text with a unit, such as "2GiB" or "500 MB"."""
