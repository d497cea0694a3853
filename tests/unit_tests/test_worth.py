import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from langchain_latentmas.evaluation.worth import CONDITIONS, Answer, Audit, EdgeWorth

N = 40


def answers(right: int, n: int = N, error: str = "") -> list[Answer]:
    """The first `right` questions are answered right."""
    return [Answer(i < right, 10, 20, 0.5, "" if i < right else error) for i in range(n)]


def edge(name: str = "a->b", **right: int) -> EdgeWorth:
    return EdgeWorth.of(name, {condition: answers(k) for condition, k in right.items()}, range(N), N)


def audit(*edges: EdgeWorth) -> Audit:
    return Audit.of("relay", edges, seed=0, level=0.95)


def test_content_is_worth_what_another_memory_loses() -> None:
    worth = edge(intact=38, swapped=2, cut=2)
    assert worth.verdict == "this edge's content is worth 90 ± 10 points"
    assert worth.has_content
    assert worth.effects["presence"].points == 0


def test_several_edges_at_once_are_spoken_of_as_several() -> None:
    assert edge("all edges", intact=38, swapped=2).verdict.startswith("these edges' content is worth 90")
    assert edge("a->b, b->c", intact=38, swapped=2).verdict.startswith("these edges' content is worth 90")


def test_no_difference_is_no_content_and_says_how_little_that_proves() -> None:
    worth = edge(intact=30, swapped=30, cut=30)
    assert worth.verdict.startswith("no detectable content: keep text or cut the edge (content +0 ± 9 points)")
    assert worth.verdict.endswith("; 40 questions show none below 15 points, ask more")
    assert not worth.has_content


def test_a_reader_that_is_misled_but_needs_nothing_is_told_to_cut() -> None:
    given = {"intact": answers(380, 400), "swapped": answers(50, 400), "cut": answers(378, 400)}
    worth = EdgeWorth.of("a->b", given, range(400), 400)
    assert worth.verdict.startswith("the reader uses this edge's content (82 ± ")
    assert "answers as well without any: cut the edge (intact against cut +0 ± " in worth.verdict


def test_where_it_may_be_worth_something_nobody_is_told_to_cut() -> None:
    worth = edge(intact=38, swapped=5, cut=35)
    assert "but may answer as well without any (intact against cut +8 ± " in worth.verdict
    assert worth.verdict.endswith("ask more questions")


def test_answers_that_say_nothing_are_to_be_asked_again() -> None:
    failed = [*answers(30)[:-3], *[Answer(False, error="EngineFailed: out of memory")] * 3]
    worth = EdgeWorth.of("a->b", {"intact": answers(38), "swapped": failed}, range(N), N)
    assert worth.verdict.endswith("; 3 answers failed for want of a device, a server or a grader: run it again")


def test_who_has_nobody_to_swap_with_is_in_no_effect_of_swapping() -> None:
    swapped = [*answers(0)[:-8], *[None] * 8]
    given = {"intact": answers(N), "swapped": swapped, "cut": [*answers(0)[:-8], *answers(8)[:8]]}
    worth = EdgeWorth.of("a->b", given, range(N), N)
    assert worth.alone == worth.to_json()["alone"] == 8
    assert {name: effect.points for name, effect in worth.effects.items()} == {
        "content": 100,
        "presence": 0,
        "worth": 80,
    }
    few = EdgeWorth.of("a->b", {"intact": answers(N), "swapped": [*answers(5)[:5], *[None] * 35]}, range(N), N)
    assert "the edge had a memory to swap on 5 of 40 questions, too few to show any: ask more" in few.verdict


def test_a_condition_that_always_failed_is_left_out_unless_it_may_not_again() -> None:
    given = {"intact": answers(30), "swapped": answers(2), "cut": answers(0, error="InvalidRequest: no")}
    worth = EdgeWorth.of("a->b", given, range(N), N, notes=["first"])
    assert list(worth.outcomes) == ["intact", "swapped"]
    assert list(worth.effects) == ["content"]
    assert worth.notes == ("first", "cut: left out, since every question failed there (InvalidRequest: no)")
    worth = EdgeWorth.of("a->b", given | {"cut": answers(0, error="EngineFailed: memory")}, range(N), N)
    assert "40 answers failed for want of a device" in worth.verdict


@pytest.mark.parametrize("asked", [[*range(N)] * 3, [i for i in range(N) for _ in range(3)], [0] * 80 + [*range(N)]])
def test_a_question_that_is_asked_again_is_no_further_question(asked: list[int]) -> None:
    given = {name: answers(right) for name, right in (("intact", 34), ("swapped", 28), ("cut", 12))}
    once = EdgeWorth.of("a->b", given, range(N), N)
    again = EdgeWorth.of("a->b", {name: [of[i] for i in asked] for name, of in given.items()}, asked, N)
    assert again.effects == once.effects
    assert (again.n, again.alone, again.least, again.verdict) == (N, 0, once.least, once.verdict)
    assert {name: outcome.p for name, outcome in again.outcomes.items()} == {
        name: outcome.p for name, outcome in once.outcomes.items()
    }


def test_a_question_counts_with_the_share_of_its_answers_that_were_right() -> None:
    asked = [*range(N)] * 4
    swapped = [Answer(i >= 10 or k < 3) for k in range(4) for i in range(N)]  # 10 questions lose one in four
    given = {"intact": answers(4 * N, 4 * N), "swapped": swapped}
    content = EdgeWorth.of("a->b", given, asked, N).effects["content"]
    assert content.points == 100 * 10 / 4 / N
    assert content.p == 2 / 2**10


def test_who_has_nobody_to_swap_with_in_any_of_its_repeats_is_alone() -> None:
    asked = [*range(N)] * 2
    swapped = [None if i < 3 or (i < 5 and k) else Answer(False) for k in range(2) for i in range(N)]
    worth = EdgeWorth.of("a->b", {"intact": answers(2 * N, 2 * N), "swapped": swapped}, asked, N)
    assert worth.alone == 3
    assert worth.effects["content"].points == 100


@pytest.mark.parametrize(
    ("right", "sign"),
    [
        ({"intact": 38, "swapped": 2}, 1),
        ({"intact": 38, "swapped": 2, "cut": 2}, 1),
        ({"intact": 30, "swapped": 30, "cut": 10}, 0),
        ({"intact": 38, "swapped": 5, "cut": 35}, 0),
        ({"intact": 5, "swapped": 30}, -1),
        ({"intact": 20, "swapped": 5, "cut": 35}, -1),
    ],
)
def test_an_edge_is_of_use_only_where_its_tests_say_so(right: dict[str, int], sign: int) -> None:
    assert edge(**right).sign == sign


def test_content_can_do_harm() -> None:
    assert edge(intact=5, swapped=30).verdict.startswith("this edge's content does harm")


def test_no_verdict_advises_what_its_tests_speak_against() -> None:
    assert "content: keep text (" in edge(intact=30, swapped=30, cut=10).verdict
    assert "content: cut the edge (" in edge(intact=30, swapped=30, cut=29, text=10).verdict
    assert "content: any memory does (" in edge(intact=30, swapped=30, cut=10, text=10).verdict
    assert "does harm: keep text (" in edge(intact=20, swapped=30, cut=5).verdict


def test_what_an_edge_is_worth_comes_before_how_far_it_misleads() -> None:
    worth = edge(intact=36, swapped=0, cut=24)
    assert worth.verdict.startswith("the edge is worth 30 ± ")
    assert "; another question's memory costs 90 ± " in worth.verdict
    assert edge("all edges", intact=36, swapped=0, cut=24).verdict.startswith("the edges are worth 30 ± ")


def test_one_question_does_not_turn_too_few_into_as_well() -> None:
    for cut in (38, 39):
        assert edge(intact=38, swapped=5, cut=cut).verdict.endswith("ask more questions")


def test_what_cannot_be_shown_counts_crossings_and_the_edges_beside() -> None:
    rare = EdgeWorth.of("a->b", {"intact": answers(90, 100), "swapped": answers(85, 100)}, range(100), 5)
    assert rare.verdict.endswith("; the edge had a memory on 5 of 100 questions, too few to show any: ask more")
    one = EdgeWorth.of("a->b", {"intact": answers(60, 60), "swapped": answers(60, 60)}, range(60), 60)
    assert one.least == 10
    assert audit(one, one, one, one).edges[-1].least == pytest.approx(100 * 8 / 60)


def test_presence_and_text_are_mentioned_where_they_are_significant() -> None:
    worth = edge(intact=30, swapped=30, cut=10, text=40)
    assert "; its mere presence adds 50 ± " in worth.verdict
    assert "; as text the graph is 25 ± " in worth.verdict
    assert worth.verdict.endswith("points better")


@given(st.lists(st.integers(0, N), min_size=6, max_size=6))
def test_content_and_presence_add_up_to_the_worth(right: list[int]) -> None:
    worth = edge(**dict(zip(CONDITIONS, right, strict=True)))
    effects = worth.effects
    assert effects["content"].points + effects["presence"].points == pytest.approx(effects["worth"].points)
    for effect in effects.values():
        assert effect.low <= effect.points <= effect.high
    assert worth.has_content == (effects["content"].p < 0.05)
    json.dumps(worth.to_json())


def test_several_edges_are_held_to_a_stricter_test() -> None:
    weak = edge(intact=12, swapped=6)  # 6 lost, none won: p = 1/32
    assert audit(weak).edges[0].has_content
    several = audit(edge(intact=38, swapped=2), weak)
    assert several.edges[0].has_content
    assert several.edges[1].effects["content"].p == pytest.approx(1 / 32)  # the largest is not adjusted
    assert not audit(weak, weak).edges[0].has_content


def test_errors_are_counted_by_name() -> None:
    worth = EdgeWorth.of("a->b", {"intact": answers(40), "swapped": answers(30, error="ValueError: no")}, range(N), N)
    assert worth.outcomes["swapped"].errors == {"ValueError: no": 10}
    assert worth.outcomes["swapped"].accuracy == 75


def test_json_has_the_keys_that_were_promised() -> None:
    document = json.loads(json.dumps(audit(edge(intact=38, swapped=2, cut=1)).to_json()))
    assert document["task"] == "relay"
    assert document["n"] == N
    assert document["conditions"] == {"intact": 95, "swapped": 5, "cut": 2.5}
    assert set(document["content"]) == {"points", "low", "high", "p"}
    assert document["presence"]["points"] == 2.5
    assert document["against_text"] is None
    assert document["verdict"] == document["edges"][0]["verdict"]
    outcome = document["edges"][0]["outcomes"]["intact"]
    assert (outcome["output_tokens"], outcome["latent_steps"], outcome["seconds"]) == (10, 20, 0.5)
