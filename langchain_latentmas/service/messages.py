"""Messages as they go to a model service: plain JSON, text only."""

from typing import Any

from langchain_core.language_models import LanguageModelInput
from langchain_core.messages import convert_to_messages, convert_to_openai_messages
from langchain_core.prompt_values import PromptValue

from ..errors import InvalidRequest


def as_openai(messages: LanguageModelInput) -> list[dict[str, Any]]:
    """Messages in OpenAI's form, with strings as contents and the arguments of tool calls as JSON strings.

    Args:
        messages: Anything LangChain accepts as messages, this form among it: then it comes back as it is.

    Raises:
        InvalidRequest: If there are none, they are no messages, or they hold more than text.
    """
    if isinstance(messages, PromptValue):
        messages = messages.to_messages()
    elif isinstance(messages, str):
        messages = [("human", messages)]
    try:
        listed = convert_to_openai_messages(convert_to_messages(messages), text_format="string")
    except KeyError as error:
        raise InvalidRequest(f"These are no messages that LangChain knows: one has no {error}.") from error
    except (ValueError, NotImplementedError, TypeError, AttributeError, RecursionError) as error:
        raise InvalidRequest(f"These are no messages that LangChain knows: {error}") from error
    assert isinstance(listed, list)
    if not listed:
        raise InvalidRequest("There are no messages; give at least one.")
    for message in listed:
        if not isinstance(message.get("content") or "", str):
            raise InvalidRequest(f"A {message['role']} message holds more than text; this service reads text only.")
    return listed
