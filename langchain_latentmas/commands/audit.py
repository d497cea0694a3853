"""`latentmas audit`: what is the content of an edge worth?"""

import hashlib
import importlib
import json
import random
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..errors import InvalidEdge, InvalidRequest
from .folder import ANSWERS, run_bars, run_folder
from .options import AsJson, LocalModel, Options
from .session import describe, load, loading, print_json, reported, settled
from .terminal import headline, open_console, printable, tone

if TYPE_CHECKING:
    from ..evaluation.worth import Audit
    from ..modes import Edge

RESULT = "audit.json"
EFFECTS = {
    "content": "intact - swapped",
    "presence": "swapped - cut",
    "worth": "intact - cut",
    "against_text": "intact - text",
}
COLOURS = {1: "green", 0: "yellow", -1: "red"}
"""Of a verdict, by `EdgeWorth.sign`."""


def audit(
    ctx: typer.Context,
    graph: Annotated[
        str | None, typer.Argument(help="module:name of a graph of yours, or of a function that makes one.")
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="Without a graph: words, relay, split, a benchmark, or a path ending in .jsonl.")
    ] = None,
    examples: Annotated[
        Path | None,
        typer.Option(
            help="For a graph: a .jsonl file with `input` and `answer`. An input is a state, or a text, which becomes "
            '{"messages": [("human", text)]}.'
        ),
    ] = None,
    grader: Annotated[
        str | None,
        typer.Option(
            help="Of --examples: number, letter or exact, which read the last of `messages`, else the field `answer`; "
            "or module:function of state and answer. Of a .jsonl --task: number, letter, exact or code."
        ),
    ] = None,
    n: Annotated[
        int | None, typer.Option("--n", help="Questions; by default 100 of words, relay and split, else all.")
    ] = None,
    model: LocalModel = "bundled",
    arrangement: Annotated[
        Literal["sequential", "hierarchical"], typer.Option(help="For a task: who works on it.")
    ] = "sequential",
    edge: Annotated[
        list[str] | None, typer.Option(help="Such as planner->critic; may be given again. All at once otherwise.")
    ] = None,
    each: Annotated[bool, typer.Option("--each", help="Also every edge by itself; not with --edge.")] = False,
    conditions: Annotated[
        str, typer.Option(help="Of intact, swapped, zeroed, random, cut and text, with commas.")
    ] = "intact,swapped,zeroed,random,cut,text",
    steps: Annotated[int | None, typer.Option(help="For a task: latent steps of each thinker.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="For a task: most tokens that one agent decodes.")] = None,
    seed: Annotated[int, typer.Option(help="Which questions; and of swaps, noise and intervals. 0 or more.")] = 0,
    level: Annotated[float, typer.Option(help="Confidence of intervals and tests.")] = 0.95,
    batch: Annotated[int, typer.Option(help="Questions at work at a time.")] = 32,
    out: Annotated[
        Path | None, typer.Option(help="Folder for answers.jsonl and audit.json; a run that is there goes on.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Also draw a picture: a .png or .svg file.")] = None,
    option: Options = None,
    as_json: AsJson = False,
) -> None:
    """What the content of latent edges is worth: a graph with its edges intact, swapped, zeroed, random, cut, as text.

    Every answer is written down as it comes: the same command goes on where an interrupted one stopped.
    """
    with reported(as_json):
        edges = _edges(edge, each)
        if (graph is None) == (task is None):
            raise InvalidRequest("Name a graph (module:name, with --examples) or a --task; one of them.")
        if graph is not None and examples is None:
            raise InvalidRequest("A graph needs --examples: a .jsonl file whose lines have `input` and `answer`.")
        if graph is not None and (given := _given(ctx, "model", "option")):
            raise InvalidRequest(
                f"A graph brings its own model; leave {given} out. Agents without one take what "
                "LATENTMAS_SERVICE names."
            )
        if graph is not None and (given := _given(ctx, "arrangement", "steps", "max_tokens")):
            raise InvalidRequest(f"A graph brings its own agents; {given} is for a --task.")
        if task is not None and (given := _given(ctx, "examples")):
            raise InvalidRequest(f"A task brings its own questions; {given} is for a graph.")
        if plot is not None:
            from ..evaluation.pictures import check_path

            check_path(plot)
        with loading(show=not as_json):
            from ..auditing import audit as run
            from ..auditing import journal_head

            service = None
            if task is not None:
                from ..evaluation import sandbox
                from ..evaluation.benchmarks import task_named

                asked = task_named(task, grader)
                if asked.runs_code:
                    sandbox.missing()  # said, or refused, before the model is loaded
                questions = asked.questions(n, seed)  # a data set that is not there is found before the model is loaded
                service = load(model, option)
                built: Any = asked.graph(service, arrangement, steps=steps, max_tokens=max_tokens)
                pairs: list[tuple[Any, Any]] = [(asked.input(question), question) for question in questions]
                grade: Callable[[Any, Any], bool] = lambda state, question: asked.grade(_text(state), question)  # noqa: E731
                name, about = asked.name, {**describe(service, model), "arrangement": arrangement}
                about |= {"steps": asked.steps if steps is None else steps, "max_tokens": max_tokens}
            else:
                assert graph is not None
                assert examples is not None
                grader = grader or "number"
                built, pairs, grade = _named_graph(graph), _pairs(examples, n, seed), _grader(grader)
                name, about = graph, {"graph": graph, "examples": str(examples), "grader": grader}
                about["sources"] = _sources(graph, *([grader] if ":" in grader else []))
            head = journal_head(built, pairs, seed, about)
        try:
            with (
                settled(),
                run_folder(out, "audit", name, [head, level], RESULT, _errors) as folder,
                run_bars(show=not as_json) as on_answer,
            ):
                journal = folder / ANSWERS
                result = run(
                    built,
                    pairs,
                    grade,
                    edges=edges,
                    conditions=[word.strip() for word in conditions.split(",") if word.strip()],
                    seed=seed,
                    level=level,
                    concurrency=batch,
                    journal=journal,
                    task=name,
                    about=about,
                    on_answer=on_answer,
                )
                (folder / RESULT).write_text(json.dumps(result.to_json(), indent=2), encoding="utf-8")
        finally:
            if service is not None:
                service.close()
        if as_json:
            print_json(**result.to_json())
        else:
            open_console().print(picture(result, journal))
        if plot is not None:
            result.plot(plot)


def picture(result: "Audit", journal: Path) -> RenderableType:
    """What the terminal shows of an audit."""
    about = {"name": "own", **result.about}
    rest = f"{result.task}, {result.n} questions, seed {result.seed}"
    if "steps" in about:
        rest += f"; {about['arrangement']}, {about['steps']} latent steps a thinker, greedy"
    parts: list[RenderableType] = [headline("audit", about, rest), Text(), _table(result), Text()]
    width = max(len(each.edge) for each in result.edges) + 2
    for each in result.edges:
        line = Table.grid(padding=(0, 0))
        line.add_column(width=width, no_wrap=True)
        line.add_column()
        line.add_row(Text(each.edge, "dim"), Text(each.verdict, f"bold {COLOURS[each.sign]}"))
        parts.append(line)
    parts.append(Text())
    for each in result.edges:
        for note in each.notes:
            parts.append(Text(f"{each.edge}: {note}.", "yellow"))
        for condition, outcome in each.outcomes.items():
            for error, count in outcome.errors.items():
                text = f"{each.edge}, {condition}: {count} counted as wrong: {printable(error)}"
                parts.append(Text(text, "yellow"))
    parts.append(Text(_footnote(result), "dim"))
    parts.append(Text(f"Every answer: {journal}", "dim", no_wrap=True, overflow="fold"))
    return Group(*parts)


def _table(result: "Audit") -> Table:
    table = Table(box=None, padding=(0, 1), header_style="dim", expand=False)
    table.add_column()
    for name in ("right", f"{100 * result.level:.0f} %", "p", "output\ntokens", "latent\nsteps", "seconds"):
        table.add_column(name, justify="right")
    for each in result.edges:
        crossed = "" if each.crossed == each.n else f" (crossed on {each.crossed} of {each.n})"
        table.add_row(Text(f"{each.edge}{crossed}", "bold"))
        for name, o in each.outcomes.items():
            table.add_row(
                f"  {name}",
                f"{o.accuracy:.1f} %",
                f"{o.low:.0f} to {o.high:.0f}",
                "" if name == "intact" else _p(o.p),
                f"{o.output_tokens:,.1f}",
                f"{o.latent_steps:,.0f}",
                f"{o.seconds:.2f}",
            )
        for name, effect in each.effects.items():
            shown = "as latent" if name == "against_text" else name
            table.add_row(
                f"  {shown}: {EFFECTS[name]}",
                f"{effect.points:+.1f}",
                f"{effect.low:+.0f} to {effect.high:+.0f}",
                _p(effect.p),
                style=tone(effect.low, effect.high) if name == "content" else "dim",
            )
    return table


def _p(p: float) -> str:
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def _footnote(result: "Audit") -> str:
    adjusted = " (Holm-adjusted over the edges below the conditions)" if len(result.edges) > 1 else ""
    return (
        "Tokens, steps and seconds are per question; what the service still knew from the intact run took no time. "
        "Intervals: Wilson for a share of the answers, paired bootstrap over the questions for a difference. p: "
        f"McNemar's exact test over the questions, against intact{adjusted}; content is what lies below "
        f"{1 - result.level:.2g}."
        + (" What is said of one edge holds while the others stay as they are." if len(result.edges) > 1 else "")
    )


def _errors(document: dict[str, Any]) -> Iterator[str]:
    return (error for edge in document["edges"] for o in edge["outcomes"].values() for error in o["errors"])


def _edges(named: Sequence[str] | None, each: bool) -> "list[Edge] | Literal['all', 'each']":
    if not named:
        return "each" if each else "all"
    if each:
        raise InvalidRequest("Edges that --edge names are audited by themselves anyway; leave --each out.")
    pairs = []
    for name in named:
        source, arrow, target = name.partition("->")
        if not (source.strip() and arrow and target.strip()):
            raise InvalidEdge(f"An edge is written planner->critic (in quotes, for the shell's sake), not {name!r}.")
        pairs.append((source.strip(), target.strip()))
    return pairs


def _attribute(path: str) -> Any:
    """What `module:name` names, with modules of the working directory too."""
    module, _, name = path.partition(":")
    if not (module and name):
        raise InvalidRequest(f"{path!r} is not of the form module:name.")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise InvalidRequest(f"There is no {path}: {error}") from error


def _sources(*paths: str) -> str:
    """A digest of the code behind each `module:name`: its package, and what else is loaded from the working directory.

    Installed packages are left out: the same ones are there the next time, as a rule.
    """
    own = {path.partition(":")[0].partition(".")[0] for path in paths}
    installed = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    digest, here = hashlib.sha256(), Path.cwd()
    for name, module in sorted(sys.modules.items()):
        file, package = Path(getattr(module, "__file__", None) or ""), name.partition(".")[0]
        near = file.is_relative_to(here) and not any(map(file.is_relative_to, installed))
        if file.is_file() and (package in own or (near and package not in ("__main__", "langchain_latentmas"))):
            digest.update(f"{name}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def _named_graph(path: str) -> Any:
    from langgraph.graph import StateGraph
    from langgraph.pregel import Pregel

    found = _attribute(path)
    made = found if isinstance(found, (StateGraph, Pregel)) or not callable(found) else found()
    if not isinstance(made, (StateGraph, Pregel)):
        raise InvalidRequest(f"{path} is no graph but a {type(made).__name__}; name a StateGraph, compiled or not.")
    return made


def _given(ctx: typer.Context, *names: str) -> str:
    """Those of the command's options that somebody gave."""
    sources = ((name, ctx.get_parameter_source(name)) for name in names)
    there = (name for name, source in sources if source is not None and source.name == "COMMANDLINE")
    return " and ".join(f"--{name.replace('_', '-')}" for name in there)


def _pairs(path: Path, n: int | None, seed: int) -> list[tuple[Any, Any]]:
    """All examples of a file, or `n` of them in its order."""
    try:
        lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"The examples cannot be read: {error}") from error
    if n is not None and not 1 <= n <= len(lines):
        raise InvalidRequest(f"--n must lie between 1 and the {len(lines)} examples of {path}, not at {n}.")
    pairs = []
    chosen = sorted(random.Random(seed).sample(range(len(lines)), len(lines) if n is None else n))
    for number, line in ((i + 1, lines[i]) for i in chosen):
        try:
            row = json.loads(line)
            asked, answer = row["input"], row["answer"]
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidRequest(
                f'{path}, example {number}: a line has "input" and "answer" ({type(error).__name__}: {error}).'
            ) from error
        pairs.append(({"messages": [("human", asked)]} if isinstance(asked, str) else asked, answer))
    return pairs


def _grader(name: str) -> Callable[[Any, Any], bool]:
    if ":" in name:
        found = _attribute(name)
        if not callable(found):
            raise InvalidRequest(f"{name} is no function of a state and an answer.")
        return found
    from ..evaluation import graders

    known: dict[str, Callable[[str, str], bool]] = {
        "number": graders.number,
        "letter": graders.letter,
        "exact": graders.exact,
    }
    if name not in known:
        raise InvalidRequest(f"There is no grader {name!r}; take one of {', '.join(known)}, or module:function.")
    graders.check_installed(name)
    return lambda state, answer: known[name](_text(state), str(answer))


def _text(state: Any) -> str:
    """The answer in a graph's last state: the text of its last message, else its field `answer`.

    Raises:
        InvalidRequest: If it has neither.
    """
    fields = state if isinstance(state, Mapping) else {}  # a graph of the functional API may return anything
    if messages := fields.get("messages"):
        return str(messages[-1].text)
    if "answer" in fields:
        return str(fields["answer"])
    raise InvalidRequest("the state has neither messages nor answer; give --grader module:function.")
