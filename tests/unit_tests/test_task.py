from typing import Any

import pytest

from langchain_latentmas.bundled import tasks
from langchain_latentmas.errors import InvalidRequest
from langchain_latentmas.evaluation.roles import BOXED, BUNDLED
from langchain_latentmas.evaluation.task import BUNDLED_TASKS, Question, Split
from langchain_latentmas.service.local import LocalService
from langchain_latentmas.teams import ARRANGEMENTS

FACTS = ("Ann has 3 pens.", "Ben has 4 pens.", "Eva has 5 pens.")
SPLIT = Question(
    "s-0",
    "How many pens are there?",
    "12",
    dict(zip([*BUNDLED.sequential, *BUNDLED.hierarchical], FACTS * 2, strict=True)),
)


def prompts(service: LocalService, task: Any, question: Question, arrangement: str, **options: Any) -> dict[str, str]:
    """By agent: the prompt as the model got it, latently."""
    graph = task.graph(service, arrangement, steps=1, max_tokens=1, **options).compile()
    state = graph.invoke(task.input(question))
    own = {ref["agent"]: service.memory(ref).segments[-1] for ref in state["latents"]}
    return {agent: service.model.tokenizer.decode(segment.prompt_ids) for agent, segment in own.items()}


@pytest.mark.parametrize("name", BUNDLED_TASKS)
def test_questions_depend_on_the_seed_alone_and_more_of_them_begin_the_same(name: str) -> None:
    task = BUNDLED_TASKS[name]()
    ten = task.questions(10, seed=3)
    assert ten == task.questions(20, seed=3)[:10]
    assert not {question.text for question in ten} & {question.text for question in task.questions(10, seed=4)}
    assert len({question.id for question in ten}) == 10


@pytest.mark.parametrize("name", BUNDLED_TASKS)
def test_answers_are_graded(name: str) -> None:
    task = BUNDLED_TASKS[name]()
    for question in task.questions(20):
        assert task.grade(f"The answer is \\boxed{{{question.answer}}}.", question)
        assert tasks.grade(f"\\boxed{{{question.answer}\\text{{ coins}}}}", int(question.answer))  # the demo's, too
        assert not task.grade(f"The answer is \\boxed{{{int(question.answer) + 1}}}.", question)
        assert not task.grade("", question)


def test_there_must_be_a_question() -> None:
    with pytest.raises(InvalidRequest, match="at least 1"):
        BUNDLED_TASKS["words"]().questions(0)


def test_an_unknown_arrangement_is_refused(bundled: LocalService) -> None:
    with pytest.raises(InvalidRequest, match="no arrangement 'ring'"):
        BUNDLED_TASKS["words"]().graph(bundled, "ring")


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@pytest.mark.parametrize("name", ["words", "relay"])
def test_who_sees_the_question(bundled: LocalService, name: str, arrangement: str) -> None:
    task = BUNDLED_TASKS[name]()
    question = task.questions(1)[0]
    seen = prompts(bundled, task, question, arrangement)
    roles = task.roles(bundled)
    assert set(seen) == ({"solver"} if arrangement == "single" else {*getattr(roles, arrangement), "judger"})
    hidden = {agent for agent, prompt in seen.items() if question.text not in prompt}
    assert hidden == ({"judger"} if name == "relay" and arrangement != "single" else set())


@pytest.mark.parametrize("arrangement", ["sequential", "hierarchical"])
def test_facts_are_private(bundled: LocalService, arrangement: str) -> None:
    seen = prompts(bundled, Split(), SPLIT, arrangement)
    judger = seen.pop("judger")
    assert f"user\n{SPLIT.text}<" in judger
    assert not any(fact in judger for fact in FACTS)
    for (agent, prompt), fact in zip(seen.items(), FACTS, strict=False):
        own = SPLIT.facts[agent]
        assert f"user\n{own}<" in prompt
        assert not any(other in prompt for other in FACTS if other != own)
        assert arrangement == "hierarchical" or own == fact  # in their order


def test_who_is_alone_is_told_all_facts(bundled: LocalService) -> None:
    seen = prompts(bundled, Split(), SPLIT, "single")
    assert f"user\n{' '.join(FACTS)} {SPLIT.text}<" in seen["solver"]


def test_as_text_each_reads_the_others_before_its_own_fact(bundled: LocalService) -> None:
    graph = Split().graph(bundled, "sequential", max_tokens=4).compile()
    state = graph.invoke(Split().input(SPLIT), {"configurable": {"edges": "text"}})
    assert [message.name for message in state["messages"][1:]] == ["planner", "critic", "refiner", "judger"]


def test_a_judger_that_reads_nobody_knows_nothing(bundled: LocalService) -> None:
    graph = BUNDLED_TASKS["relay"]().graph(bundled, "hierarchical", steps=2, max_tokens=4, reads=[]).compile()
    state = graph.invoke(BUNDLED_TASKS["relay"]().input(SPLIT))
    assert state["messages"][-1].usage_metadata["output_token_details"]["latent_steps"] == 0


def test_another_model_is_told_to_box_its_answer(service: LocalService) -> None:
    assert BUNDLED_TASKS["words"]().roles(service) == BOXED
    assert "\\boxed" in BOXED.judger
    assert "\\boxed" in BOXED.solver
