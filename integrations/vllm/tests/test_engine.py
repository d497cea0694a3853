"""The latent token in vLLM itself, in this process: every parity case, however vLLM gets to it."""

import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

if find_spec("vllm.config") is None:  # a folder of that name, this one say, is no vLLM
    pytest.skip("vLLM is not installed; see `make test-vllm`", allow_module_level=True)
os.environ |= {"VLLM_PLUGINS": "latentmas", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

from latentmas_vllm.model import LatentToken
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from vllm import LLM, SamplingParams
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM

from langchain_latentmas.service.local import LocalService

pytestmark = pytest.mark.vllm

PARITY = Path(__file__).parents[3] / "tests" / "data" / "parity"
LATENT = 0  # of the parity models
BLOCK = 32
TEXT = list(range(10, 10 + BLOCK))  # a block of it
ARCHITECTURES = {"qwen3-tied": "LatentQwen3ForCausalLM", "llama-untied": "LatentLlamaForCausalLM"}
SETTINGS = [(model, realign) for model in ARCHITECTURES for realign in (True, False)]

Start = Callable[..., LLM]


def start(folder: Path, architecture: str, realign: bool = True, **settings: Any) -> LLM:
    overrides = {"architectures": [architecture], "latent_realign": realign}
    return LLM(
        str(folder),
        hf_overrides=overrides,
        **{
            "dtype": "float32",
            "enforce_eager": True,
            "max_model_len": 1024,
            "block_size": BLOCK,
            "max_num_seqs": 32,
            "max_num_batched_tokens": 512,
            "kv_cache_memory_bytes": 32 << 20,
            **settings,
        },
    )


@pytest.fixture(scope="module", params=SETTINGS, ids=lambda s: f"{s[0]}-{'realign' if s[1] else 'rescale'}")
def served(request: pytest.FixtureRequest) -> Iterator[tuple[LLM, list[dict[str, Any]]]]:
    model, realign = request.param
    cases = json.loads((PARITY / model / "reference.json").read_text())["cases"]
    llm = start(PARITY / model / "model", ARCHITECTURES[model], realign)
    yield llm, [case for case in cases if case["realign"] == realign]
    llm.llm_engine.engine_core.shutdown()


@pytest.fixture
def qwen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Starts engines of their own on the tied parity model."""
    made: list[LLM] = []

    def make(**settings: Any) -> LLM:
        made.append(start(PARITY / "qwen3-tied" / "model", "LatentQwen3ForCausalLM", **settings))
        return made[-1]

    yield make
    for llm in made:
        llm.llm_engine.engine_core.shutdown()


def run(llm: LLM, prompts: list[list[int]], **sampling: Any) -> list[Any]:
    params = SamplingParams(**{"temperature": 0, "max_tokens": 24, **sampling})
    return llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)


def think(llm: LLM, prompts: list[list[int]], steps: int) -> list[list[int]]:
    """All at once; returns the memories."""
    done = run(llm, prompts, max_tokens=steps + 1, allowed_token_ids=[LATENT], ignore_eos=True)
    assert all(list(out.outputs[0].token_ids) == [LATENT] * (steps + 1) for out in done)
    return [ids + [LATENT] * steps for ids in prompts]


def spoken(out: Any) -> list[int]:
    return list(out.outputs[0].token_ids)


def memory_of(case: dict[str, Any]) -> list[int]:
    return [i for agent in case["agents"] for i in [*agent["input_ids"], *[LATENT] * case["steps"]]]


def question_to(case: dict[str, Any]) -> list[int]:
    return memory_of(case) + case["judge"]["input_ids"]


def test_greedy_tokens_of_the_published_implementation(served: Any) -> None:
    llm, cases = served
    assert len(cases) == 6
    for case in cases:
        memory: list[int] = []
        for agent in case["agents"]:
            [memory] = think(llm, [memory + agent["input_ids"]], case["steps"])
        assert memory == memory_of(case)
        [out] = run(llm, [question_to(case)])
        assert spoken(out) == case["greedy"], case["key"]
        assert out.num_cached_tokens >= len(memory) // BLOCK * BLOCK, case["key"]  # the hand-over was free


def test_the_same_after_all_kv_is_gone(served: Any) -> None:
    """The memory is prefilled anew, thoughts and all, in chunks that hold many of them."""
    llm, cases = served
    for case in cases:
        llm.reset_prefix_cache()
        [out] = run(llm, [question_to(case)])
        assert out.num_cached_tokens == 0
        assert spoken(out) == case["greedy"], case["key"]


def test_the_same_all_at_once_with_text_in_between(served: Any) -> None:
    llm, cases = served
    llm.reset_prefix_cache()
    texts = [case["judge"]["input_ids"] for case in cases]
    alone = [spoken(run(llm, [ids])[0]) for ids in texts]
    llm.reset_prefix_cache()
    greedy = SamplingParams(temperature=0, max_tokens=24)
    memories: list[list[int]] = [[] for _ in cases]
    for i in range(len(cases[0]["agents"])):
        prompts = [memory + case["agents"][i]["input_ids"] for memory, case in zip(memories, cases, strict=True)]
        thinking = [
            SamplingParams(temperature=0, max_tokens=case["steps"] + 1, allowed_token_ids=[LATENT], ignore_eos=True)
            for case in cases
        ]
        mixed = [{"prompt_token_ids": ids} for pair in zip(prompts, texts, strict=True) for ids in pair]
        done = llm.generate(mixed, [p for one in thinking for p in (one, greedy)], use_tqdm=False)
        assert [spoken(out) for out in done[1::2]] == alone
        memories = [ids + [LATENT] * case["steps"] for ids, case in zip(prompts, cases, strict=True)]
    done = run(llm, [memory + case["judge"]["input_ids"] for memory, case in zip(memories, cases, strict=True)])
    assert [spoken(out) for out in done] == [case["greedy"] for case in cases]


def test_the_same_when_memory_is_short_and_requests_are_preempted(qwen: Start) -> None:
    cases = json.loads((PARITY / "qwen3-tied" / "reference.json").read_text())["cases"]
    cases = [case for case in cases if case["realign"]]
    llm = qwen(num_gpu_blocks_override=24, disable_log_stats=False, max_model_len=512)
    done = run(llm, [question_to(case) for case in cases * 2])
    assert [spoken(out) for out in done] == [case["greedy"] for case in cases * 2]
    preemptions = [m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions"]
    assert preemptions[0] > 0


def test_who_speaks_in_the_row_that_a_thinker_has_left_does_not_think(qwen: Start) -> None:
    """vLLM moves the last row of its batch to where one has become free, and gives the last one away again."""
    llm = qwen()
    text = list(range(10, 60))
    [alone] = run(llm, [text])
    greedy = SamplingParams(temperature=0, max_tokens=24)
    thinking = SamplingParams(temperature=0, max_tokens=60, allowed_token_ids=[LATENT], ignore_eos=True)
    engine, done = llm.llm_engine, {}

    def step() -> None:
        done.update({out.request_id: spoken(out) for out in engine.step() if out.finished})

    engine.add_request("short", {"prompt_token_ids": text[:20]}, SamplingParams(temperature=0, max_tokens=2))
    engine.add_request("thinker", {"prompt_token_ids": text[:30]}, thinking)
    for _ in range(5):
        step()
    assert list(done) == ["short"]
    engine.add_request("late", {"prompt_token_ids": text}, greedy)
    while engine.has_unfinished_requests():
        step()
    assert done["late"] == spoken(alone)
    assert done["thinker"] == [LATENT] * 60


@pytest.mark.parametrize("thoughts", [0, 8])
def test_the_same_behind_a_block_that_another_request_fills_in_the_same_step(thoughts: int, qwen: Start) -> None:
    llm = qwen()
    block = [*TEXT[thoughts:], *[LATENT] * thoughts]
    text = [*block, *[LATENT] * 8, 9]
    alone = spoken(run(llm, [text])[0])
    llm.reset_prefix_cache()
    out = run(llm, [[*block, 7], text])[1]
    assert out.num_cached_tokens == BLOCK
    assert spoken(out) == alone


def test_the_same_behind_a_block_that_another_request_ends_with_a_thought(qwen: Start) -> None:
    """Each of the two has one token in that step, as if both went on from an earlier one."""
    llm = qwen()
    thinking = SamplingParams(temperature=0, max_tokens=4, allowed_token_ids=[LATENT], ignore_eos=True)
    text = [*TEXT[:-1], LATENT, LATENT]
    alone = spoken(run(llm, [text])[0])
    llm.reset_prefix_cache()
    engine, done = llm.llm_engine, {}
    engine.add_request("thinker", {"prompt_token_ids": text[:-2]}, thinking)
    engine.step()
    engine.add_request("reader", {"prompt_token_ids": text}, SamplingParams(temperature=0, max_tokens=24))
    while engine.has_unfinished_requests():
        done.update({out.request_id: out for out in engine.step() if out.finished})
    assert done["reader"].num_cached_tokens == BLOCK
    assert spoken(done["reader"]) == alone


@pytest.mark.parametrize("settings", [{"block_size": 128}, {"max_num_batched_tokens": 64, "max_num_seqs": 8}])
def test_the_same_for_other_blocks_and_chunks(settings: dict[str, Any], qwen: Start) -> None:
    cases = json.loads((PARITY / "qwen3-tied" / "reference.json").read_text())["cases"]
    cases = [case for case in cases if case["realign"]]
    done = run(qwen(**settings), [question_to(case) for case in cases])
    assert [spoken(out) for out in done] == [case["greedy"] for case in cases]


@pytest.mark.slow
def test_the_same_when_compiled(qwen: Start) -> None:
    cases = json.loads((PARITY / "qwen3-tied" / "reference.json").read_text())["cases"]
    cases = [case for case in cases if case["realign"]]
    done = run(qwen(enforce_eager=False), [question_to(case) for case in cases])
    assert [spoken(out) for out in done] == [case["greedy"] for case in cases]


def test_passes_readers_and_samples(qwen: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    plain = Qwen3ForCausalLM.forward

    def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(Qwen3ForCausalLM, "forward", counting)
    llm = qwen(disable_log_stats=False)

    def passes(work: Callable[[], Any]) -> int:
        calls.clear()
        work()
        return len(calls)

    text = list(range(10, 100))
    assert passes(partial(run, llm, [text], max_tokens=1)) == 1  # no LATENT: one pass
    llm.reset_prefix_cache()
    assert passes(partial(think, llm, [text], 8)) == 1 + 8  # a prefill, and a tick per thought
    llm.reset_prefix_cache()
    memory = text + [LATENT] * 8
    assert passes(partial(run, llm, [[*memory, 7]], max_tokens=1)) == 1 + 8  # rebuilt in one prefill of nine passes
    assert passes(partial(run, llm, [[*memory, 7, *text]], max_tokens=1)) == 2  # but for the last two thoughts, cached

    # 16 readers at once: what a whole block holds is read, not computed.
    readers = [[*memory, *range(100 + i, 140 + i)] for i in range(16)]
    done = run(llm, readers, max_tokens=2)
    assert [out.num_cached_tokens for out in done] == [len(memory) // BLOCK * BLOCK] * 16

    # With nothing before it, a LATENT is a token like any other, whatever others have left in its slot.
    first = spoken(run(llm, [[LATENT, *text]])[0])
    run(llm, [list(range(300 - i, 380 - i)) for i in range(30)])
    llm.reset_prefix_cache()
    assert spoken(run(llm, [[LATENT, *text]])[0]) == first
    assert passes(partial(run, llm, [[LATENT, *text[::-1]]], max_tokens=1)) == 1

    # A LATENT is never spoken, however hot; only those who ask for it get it.
    done = run(llm, [text] * 8, temperature=2.0, max_tokens=200, ignore_eos=True, seed=1)
    assert all(LATENT not in spoken(out) for out in done)
    assert len({i for out in done for i in spoken(out)}) > 50  # hot enough to draw much else


def test_the_lens_is_the_logprobs_of_a_thinking_request(qwen: Start) -> None:
    llm = qwen()
    text = list(range(10, 60))
    [out] = run(llm, [text], max_tokens=5, allowed_token_ids=[LATENT], ignore_eos=True, logprobs=3)
    folder = PARITY / "qwen3-tied" / "model"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        theirs = model(torch.tensor([text])).logits[0, -1].log_softmax(-1).topk(3)
    ours = {i: entry.logprob for i, entry in out.outputs[0].logprobs[0].items() if i != LATENT}
    assert list(ours) == theirs.indices.tolist()
    torch.testing.assert_close(torch.tensor(list(ours.values())), theirs.values, rtol=1e-3, atol=1e-3)
    assert all(step[LATENT].logprob < -1e4 for step in out.outputs[0].logprobs)


@pytest.mark.parametrize("family", ["Qwen2", "Mistral"])
def test_other_families_think_as_transformers_does(family: str, tmp_path: Path) -> None:
    parity = PARITY / "llama-untied" / "model"
    base = AutoConfig.from_pretrained(parity).to_dict()
    kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim")
    config = AutoConfig.for_model(
        family.lower(),
        **{name: base[name] for name in kept},
        num_key_value_heads=2,
        max_position_embeddings=512,
        sliding_window=None,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    tokenizer = AutoTokenizer.from_pretrained(parity)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with LocalService.from_model(model, tokenizer) as service:
        ref = service.think("What is 12 plus 30?", steps=6)
        prompt = list(service.memory(ref).segments[0].prompt_ids)
        theirs = [t for chunk in service.speak("Answer.", [ref], max_tokens=12) for t in chunk.token_ids]
        question = list(service.encode("Answer.", ""))
    llm = start(tmp_path, f"Latent{family}ForCausalLM", max_model_len=512)
    [memory] = think(llm, [prompt], 6)
    [out] = run(llm, [memory + question], max_tokens=12)
    assert spoken(out) == theirs
    llm.llm_engine.engine_core.shutdown()


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"enable_prompt_embeds": True}, "--enable-prompt-embeds"), ({"enable_lora": True}, "--enable-lora")],
)
def test_a_server_that_could_not_think_does_not_start(settings: dict[str, Any], named: str, qwen: Start) -> None:
    with pytest.raises(ValueError, match=named):
        qwen(**settings)


def test_other_weights_are_refused_once_thoughts_were_aligned() -> None:
    with pytest.raises(ValueError, match="start the server anew"):
        LatentToken.load_weights(SimpleNamespace(_alignment=object()), [])  # type: ignore[arg-type]
