"""What can be seen, without running it, of the models that some code calls."""

import dis
import inspect
from collections.abc import Hashable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple, Self

from langchain_core.language_models import BaseChatModel
from langchain_core.output_parsers import BaseOutputParser, StrOutputParser
from langchain_core.runnables import Runnable, RunnableBinding, RunnableLambda, RunnableParallel
from langgraph.func import _TaskFunction
from langgraph.prebuilt import ToolNode
from langgraph.pregel import Pregel
from langgraph.utils.runnable import RunnableCallable  # type: ignore[attr-defined]

from .chat_model import ChatLatentMAS
from .node import LatentAgentNode

LIBRARIES = {"langchain", "langchain_core", "langgraph", "langsmith"}  # their globals hold none of the user's models


class Calls(NamedTuple):
    """What can be seen of the calls that some code makes.

    Attributes:
        models: The chat models.
        tools: Whether tools are bound to one, or run.
        parsers: Names of the output parsers, those aside that leave text as it is.
        subgraphs: Compiled graphs, and workflows of the functional API.
        tasks: Names of the functional API's tasks.
        agents: Those that read and write references by themselves, with chat models that are none of `models`.
    """

    models: list[BaseChatModel]
    tools: bool
    parsers: list[str]
    subgraphs: list[Pregel]
    tasks: list[str]
    agents: list[LatentAgentNode]

    @property
    def foreign(self) -> str | None:
        """Name of a chat model that is none of ours."""
        return next((type(model).__name__ for model in self.models if not isinstance(model, ChatLatentMAS)), None)

    @property
    def ours(self) -> list[ChatLatentMAS]:
        """The chat models that can think."""
        return [model for model in self.models if isinstance(model, ChatLatentMAS)]

    @classmethod
    def of(cls, root: Any, into_subgraphs: bool = True) -> Self:
        """Follows what some code holds on to (closures, globals it names, attributes, steps) to the models it calls.

        Args:
            root: A function, a runnable, or any object that is called like one.
            into_subgraphs: Whether what a graph's nodes call counts, too.
        """
        models: list[BaseChatModel] = []
        parsers: list[str] = []
        subgraphs: list[Pregel] = []
        tasks: list[str] = []
        agents: list[LatentAgentNode] = []
        tools = False
        seen: dict[Hashable, Any] = {}  # holds on to what it has seen, so that no id comes twice
        queue: list[Any] = [root]
        while queue:
            at = queue.pop()
            key = (id(at.__func__), id(at.__self__)) if isinstance(at, MethodType) else id(at)  # made at every look
            if key in seen:
                continue
            seen[key] = at
            if isinstance(at, BaseChatModel):
                models.append(at)
            elif isinstance(at, ToolNode):
                tools = True
            elif isinstance(at, Pregel):
                subgraphs.append(at)
                queue += [at.nodes[name].bound for name in at.nodes] if into_subgraphs else []
            elif isinstance(at, RunnableBinding):
                tools = tools or bool(at.kwargs.get("tools"))
                queue.append(at.bound)
            elif isinstance(at, LatentAgentNode):
                agents.append(at)
            elif isinstance(at, BaseOutputParser):
                parsers += [] if isinstance(at, StrOutputParser) else [type(at).__name__]
            else:
                tasks += [getattr(at, "__name__", "")] if isinstance(at, _TaskFunction) else []
                queue += _held(at)
        return cls(models, tools, parsers, subgraphs, tasks, agents)


def _held(at: Any) -> Iterator[Any]:
    """What an object that is no model may call."""
    if isinstance(at, Runnable) and isinstance(steps := getattr(at, "steps", None), list):  # a sequence
        yield from steps
    elif isinstance(at, RunnableParallel):
        yield from at.steps__.values()
    elif isinstance(at, (RunnableCallable, RunnableLambda)):
        yield from (f for f in (getattr(at, "func", None), getattr(at, "afunc", None)) if f is not None)
    elif isinstance(at, partial):
        yield from (at.func, *at.args, *at.keywords.values())
    elif isinstance(at, MethodType):
        yield at.__func__
        if isinstance(at.__func__, FunctionType):
            yield from _asked_of(at.__self__, at.__func__.__code__)
    elif isinstance(at, FunctionType):
        yield from (cell.cell_contents for cell in at.__closure__ or () if cell != CellType())
        yield from (*(at.__defaults__ or ()), *(at.__kwdefaults__ or {}).values())
        if (at.__module__ or "").split(".")[0] not in LIBRARIES:
            yield from (_named_by(chain, at.__globals__) for chain in _chains(at.__code__))
    elif isinstance(at, (list, tuple)):
        yield from at
    elif isinstance(at, dict):
        yield from at.values()
    elif isinstance(at, Runnable):
        yield from getattr(at, "__dict__", {}).values()
    elif isinstance(called := inspect.getattr_static(type(at), "__call__", None), FunctionType):
        yield MethodType(called, at)  # an object that is called like a node


def _asked_of(owner: Any, code: CodeType) -> Iterator[Any]:
    """The attributes of a method's object that the method names, and the other methods of it."""
    for name in code.co_names:
        found = inspect.getattr_static(owner, name, None)
        if isinstance(found, (property, cached_property, staticmethod, classmethod)):
            found = getattr(found, "fget", None) or getattr(found, "func", None) or getattr(found, "__func__", None)
        elif inspect.ismemberdescriptor(found):
            found = getattr(owner, name, None)
        yield MethodType(found, owner) if isinstance(found, FunctionType) else found
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _asked_of(owner, constant)


def _chains(code: CodeType) -> Iterator[list[str]]:
    """The globals that a function names, and those defined inside of it, each with the attributes asked of it."""
    chain: list[str] = []
    for each in dis.get_instructions(code):
        if each.opname in ("LOAD_ATTR", "LOAD_METHOD") and chain:
            chain.append(each.argval)
            continue
        if chain:
            yield chain
        chain = [each.argval] if each.opname in ("LOAD_GLOBAL", "LOAD_NAME") else []
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _chains(constant)


def _named_by(chain: Sequence[str], names: Mapping[str, Any]) -> Any:
    """What a chain of names leads to: through modules, as far as the first thing that is none."""
    found: Any = None
    for name in chain:
        found = names.get(name)
        if not isinstance(found, ModuleType):
            return found
        names = vars(found)
    return None
