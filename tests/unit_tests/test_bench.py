"""`latentmas bench`: the arithmetic of floors and bounds, what is left out, targets, and the command on tiny models."""

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import psutil
import pytest
import torch
from transformers import AutoConfig
from typer.testing import CliRunner

from benchmarks import overhead as measuring
from benchmarks.overhead import overhead
from benchmarks.speak import main as speak
from benchmarks.summary import main as summary
from langchain_latentmas import LatentService
from langchain_latentmas.benchmark import graphs, shapes, ticks
from langchain_latentmas.benchmark.graphs import concurrency, text_against_latent
from langchain_latentmas.benchmark.memory import Copy
from langchain_latentmas.benchmark.shapes import SHAPES, build, parameters
from langchain_latentmas.benchmark.targets import Target, targets
from langchain_latentmas.benchmark.ticks import (
    Generate,
    Measured,
    Published,
    Work,
    _random_kv,
    floor_bytes,
    measure,
    memory_needed,
    obstacle,
    weight_bytes,
)
from langchain_latentmas.cli import app
from langchain_latentmas.commands.bench import _notes
from langchain_latentmas.engine.graphs import Compute, Graphs
from langchain_latentmas.engine.llama import LlamaDecoder
from langchain_latentmas.engine.model import LanguageModel
from langchain_latentmas.engine.tick import Ticker
from langchain_latentmas.errors import EngineFailed, InvalidRequest
from langchain_latentmas.evaluation.machine import Steal, machine
from langchain_latentmas.service.local import LocalService, LocalSettings

from ..conftest import load_parts
from ..support import PARITY
from .test_model import GPT2, random_model

GB = 10**9
ROW = {"what", "rows", "positions", "ms", "gb_s", "floor_ratio", "full_lm_ratio"}


@pytest.fixture(params=["qwen3-tied", "llama-untied"])
def model(request: pytest.FixtureRequest) -> LanguageModel:
    return LanguageModel(*load_parts(request.param, "float32"))


def layer_weights(config: Any) -> int:
    """Weights of all layers and the final norm, from a configuration alone."""
    heads, kv, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    attention = config.hidden_size * size * (2 * heads + 2 * kv)
    norms = 2 * config.hidden_size + (2 * size if config.model_type == "qwen3" else 0)
    mlp = 3 * config.hidden_size * config.intermediate_size
    return config.num_hidden_layers * (attention + norms + mlp) + config.hidden_size


def test_a_thought_reads_the_layers_and_the_alignment_a_token_the_layers_and_the_output_matrix(
    model: LanguageModel,
) -> None:
    config = model.config
    layers = 4 * layer_weights(config)
    assert weight_bytes(model, "think") == layers + 4 * config.hidden_size**2
    assert weight_bytes(model, "speak") == layers + 4 * config.vocab_size * config.hidden_size


def test_without_realign_a_thought_reads_the_layers_alone() -> None:
    model = LanguageModel(*load_parts("qwen3-tied", "float32"), realign=False)
    assert weight_bytes(model, "think") == 4 * layer_weights(model.config)


def test_the_floor_adds_the_kv_of_all_rows(model: LanguageModel) -> None:
    config = model.config
    kv = 2 * 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    expected = weight_bytes(model, "speak") + 3 * 100 * kv
    assert floor_bytes(model, Work("speak", 3, 100)) == expected


@pytest.mark.parametrize(
    ("shape", "count"),
    [
        ("Qwen3-0.6B", 596_049_920),
        ("Qwen3-4B", 4_022_468_096),
        ("Qwen3-8B", 8_190_735_360),
        ("Llama-3.2-1B", 1_235_814_400),
        ("Llama-3.1-8B", 8_030_261_248),
    ],
)
def test_shapes_have_as_many_weights_as_the_models_on_the_hub(shape: str, count: int) -> None:
    assert parameters(shape) == count


def test_an_unknown_shape_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InvalidRequest, match="Qwen3-4B"):
        parameters("Qwen3-5B")


def test_a_shape_that_does_not_fit_is_refused_before_anything_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "free_bytes", lambda device: 8 * GB)
    with pytest.raises(InvalidRequest, match=r"Qwen3-8B takes 16\.4 GB in bfloat16, and cpu has 8\.0 GB free"):
        build("Qwen3-8B", "cpu", torch.bfloat16)


def test_a_shape_is_a_model_that_thinks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "tiny", {**SHAPES["Qwen3-0.6B"], **TINY})
    model = build("tiny", "cpu", torch.float32)
    assert sum(p.numel() for p in model.model.parameters()) == parameters("tiny")
    with LocalService(model, LocalSettings()) as service:
        assert service.think("What is 12 plus 30?", steps=3)["steps"] == 3


def test_random_weights_are_not_hashed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "tiny", {**SHAPES["Qwen3-0.6B"], **TINY})
    monkeypatch.setattr(LanguageModel, "_fingerprint", lambda model: pytest.fail("hashed"))
    one, same, other = (build("tiny", "cpu", dtype) for dtype in (torch.float32, torch.float32, torch.bfloat16))
    assert len(one.fingerprint) == 32
    assert one.fingerprint == same.fingerprint != other.fingerprint


def test_a_shape_in_8_bits_reads_a_quarter(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchao")
    monkeypatch.setitem(SHAPES, "tiny", {**SHAPES["Qwen3-0.6B"], **TINY})
    whole, packed = (build("tiny", "cpu", torch.float32, kind) for kind in (None, "int8"))
    aligned = 4 * TINY["hidden_size"] ** 2
    share = (weight_bytes(packed, "think") - aligned) / (weight_bytes(whole, "think") - aligned)
    assert 0.25 < share < 0.3  # scales and norms stay as they are
    head = 4 * TINY["vocab_size"] * TINY["hidden_size"]
    for model in (whole, packed):
        assert weight_bytes(model, "speak") - weight_bytes(model, "think") == head - aligned


TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "vocab_size": 2048,
}


def test_more_positions_than_the_model_has_are_left_out(model: LanguageModel) -> None:
    assert obstacle(model, Work("think", 1, model.max_positions), 1) == ""
    assert str(model.max_positions) in obstacle(model, Work("think", 1, model.max_positions + 1), 1)


def test_rows_too_short_for_all_turns_are_left_out(model: LanguageModel) -> None:
    assert obstacle(model, Work("think", 1, 32), 5) == ""
    assert "positions" in obstacle(model, Work("think", 1, 16), 5)


def test_what_does_not_fit_is_left_out_by_its_bound(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    work = Work("speak", 8, 64)
    # Slots, the loop's cache and the one of generate.
    assert memory_needed(model, work) > 3 * 8 * 64 * model.bytes_per_position
    monkeypatch.setattr(ticks, "free_bytes_for", lambda devices: memory_needed(model, work))
    assert "can be used" in obstacle(model, work, 1)
    monkeypatch.setattr(ticks, "free_bytes_for", lambda devices: 2 * memory_needed(model, work))
    assert obstacle(model, work, 1) == ""


def test_a_row_is_its_medians() -> None:
    measured = Measured(Work("think", 4, 256), 2 * GB, engine=[0.2, 0.1, 0.4], published=[0.4, 0.4, 0.5])
    row = measured.row(bandwidth=40 * GB)
    assert row["ms"] == 200
    assert row["gb_s"] == pytest.approx(10)
    assert row["floor_ms"] == pytest.approx(50)
    assert row["floor_ratio"] == pytest.approx(4)
    assert row["full_lm_ratio"] == pytest.approx(0.5)  # of 0.5, 0.25 and 0.8
    assert row["per_second"] == pytest.approx(20)
    assert row["ms_spread"] == [100, 400]
    assert row["generate_ms"] is None


def test_every_loop_takes_its_turns(model: LanguageModel) -> None:
    model.eos, copied = frozenset(), []
    copy = Copy(model.device, size=1 << 16)
    for what, generated in (("think", 0), ("speak", 2)):
        measured = measure(model, Work(what, 2, 48), 2, copy, copied)  # type: ignore[arg-type]
        assert len(measured.engine) == len(measured.published) == 2
        assert len(measured.generate) == generated
        assert min([*measured.engine, *measured.published]) > 0
        assert measured.row(1.0)["cuda_graphs"] == "off"
    assert len(copied) == 4


def test_of_a_mixture_of_experts_those_that_a_row_takes_are_read() -> None:
    experts = {"num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": None}
    plain = random_model("mixtral", **experts).float()
    model = LanguageModel(plain, load_parts("qwen3-tied", "float64")[1])
    whole = sum(weight.nbytes for weight in plain.get_decoder().parameters())
    inputs, head = plain.get_input_embeddings().weight.nbytes, plain.get_output_embeddings().weight.nbytes
    idle = 2 * (8 - 2) * 3 * 64 * 64 * 4  # of each layer six experts, each three matrices
    assert weight_bytes(model, "speak") == whole - inputs - idle + head
    published = Published(model, Work("think", 3, 48), _random_kv(model, 8))
    assert torch.equal(published.hidden, published.hidden[:1].expand(3, -1))  # and so do all of its rows


KINDS = [("gpt2", GPT2), ("gpt_neox", {}), ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 64})]


@pytest.mark.parametrize(("kind", "config"), KINDS, ids=[kind for kind, _ in KINDS])
def test_a_model_whose_configuration_names_no_heads_of_keys_is_measured(kind: str, config: dict[str, Any]) -> None:
    plain = random_model(kind, **config).float()
    del plain.config.num_key_value_heads  # which every random model is given
    model = LanguageModel(plain, load_parts("qwen3-tied", "float64")[1])
    model.eos = frozenset()
    for what in ("think", "speak"):
        measured = measure(model, Work(what, 2, 48), 1, Copy(model.device, size=1 << 16), [])  # type: ignore[arg-type]
        assert len(measured.engine) == 1


def test_cuda_graphs_that_were_given_up_are_told(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(compute: Compute) -> Compute:
        raise RuntimeError("operation not permitted")

    monkeypatch.setattr(ticks.Graphs, "of", lambda model: Graphs(refuse, 1.0))
    model.eos = frozenset()
    measured = measure(model, Work("think", 1, 48), 1, Copy(model.device, size=1 << 16), [])
    row = measured.row(1.0)
    assert row["cuda_graphs"] == "operation not permitted"
    told = [str(part) for part in _notes({"rows": [row], "skipped": [], "steal": None})]
    assert any("operation not permitted" in part for part in told)


class Times(NamedTuple):
    """What psutil says on Linux, in seconds."""

    user: float
    idle: float
    steal: float


@pytest.mark.parametrize(("taken", "told"), [(1.9, False), (2.5, True)])
def test_what_the_host_takes_from_the_machine_is_told(
    monkeypatch: pytest.MonkeyPatch, taken: float, told: bool
) -> None:
    times = iter([Times(10.0, 50.0, 3.0), Times(60.0, 100.0 - taken, 3.0 + taken)])
    monkeypatch.setattr(psutil, "cpu_times", lambda: next(times))
    share = Steal().share
    assert share == pytest.approx(taken / 100)
    assert told == any("The host gave 2% " in str(part) for part in _notes({"rows": [], "skipped": [], "steal": share}))


def test_a_system_that_tells_of_no_host_is_no_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "cpu_times", lambda: (1.0, 2.0))
    assert Steal().share is None


def test_a_text_that_ends_by_itself_is_not_measured(model: LanguageModel) -> None:
    model.eos = frozenset(range(model.config.vocab_size))
    with pytest.raises(EngineFailed, match="eos"):
        measure(model, Work("speak", 1, 48), 1, Copy(model.device, size=1 << 16), [])


def test_a_loop_that_made_fewer_tokens_than_are_timed_is_not_measured(model: LanguageModel) -> None:
    loop = Generate(model, Work("speak", 2, 48), _random_kv(model, 8))
    loop.causal = SimpleNamespace(device=model.device, generate=lambda ids, **_: torch.cat([ids, ids[:, :2]], 1))  # type: ignore[assignment]
    with pytest.raises(EngineFailed, match="generate made 2 tokens instead of 3"):
        loop.run(3)


def result(name: str, device: str, *rows: tuple[str, int, int, float, float, float], **more: Any) -> dict[str, Any]:
    names = ("what", "rows", "positions", "floor_ratio", "full_lm_ratio", "per_second")
    return {
        "model": {"name": name, "device": device},
        "rows": [dict(zip(names, row, strict=True)) for row in rows],
        **more,
    }


def test_targets_of_the_cpu() -> None:
    rows = [("think", 1, 2048, 9.0, 9.0, 1.0), ("think", 1, 256, 2.3, 0.6, 10.0), ("think", 32, 256, 1.0, 1.0, 95.0)]
    found = {target.name: target.met for target in targets(result("random Qwen3-0.6B", "cpu", *rows))}
    assert found == {
        "a thought, share of the plain loop": True,
        "a thought, times its floor": False,
        "thoughts per second, 32 rows over 1": True,
    }
    bundled = result("bundled", "cpu", ("think", 1, 256, 99.0, 0.76, 1.0), concurrency={"concurrent": 64, "times": 7})
    assert [target.met for target in targets(bundled)] == [False, True]


def test_targets_of_cuda() -> None:
    rows = [("think", 1, 256, 1.2, 0.5, 10.0), ("speak", 1, 256, 1.4, 0.5, 10.0), ("think", 32, 256, 1.0, 1.0, 190.0)]
    ticks = {"text_ticks": 1024, "latent_ticks": 320}
    graphs = [
        {"questions": 1, "arrangement": "sequential", "text_over_latent": 4.1, **ticks},
        {"questions": 32, "arrangement": "sequential", "text_over_latent": 1.0, **ticks},
    ]
    found = list(targets(result("random Qwen3-4B", "cuda:0", *rows, graphs=graphs)))
    assert [target.met for target in found] == [True, False, False, True]
    assert found[2].row() == {
        "name": "thoughts per second, 32 rows over 1",
        "value": 19,
        "bound": 20,
        "least": True,
        "possible": None,
        "met": False,
    }
    assert found[3].possible == 3.2
    assert found[3].cells()[1] == "≥ 4 [dim](ticks allow 3.20)[/]"
    assert [Target.of(json.loads(json.dumps(target.row()))) for target in found] == found


def test_a_target_that_an_older_version_wrote_is_read() -> None:
    target = Target("thoughts per second, 32 rows over 1", 19, 20, least=True)
    written = {name: value for name, value in target.row().items() if name != "possible"}
    assert Target.of(written) == target


def test_what_is_measured_draws_nothing_from_the_generator_that_a_failed_recording_leaves_behind(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn, randn = list[object](), torch.randn
    monkeypatch.setattr(torch, "randn", lambda *a, **how: drawn.append(how.get("generator")) or randn(*a, **how))
    model.eos = frozenset()
    measure(model, Work("think", 1, 48), 1, Copy(model.device, size=1 << 16), [])
    assert drawn
    assert all(isinstance(generator, torch.Generator) for generator in drawn)


def test_the_loop_beside_leaves_the_decoder_as_it_was(model: LanguageModel) -> None:
    with torch.inference_mode():
        Published(model, Work("think", 1, 64), _random_kv(model, 8)).run(2)
    model.refresh_if_changed()
    assert model.decoder_fault == ""


def test_text_and_latent_teams_take_as_many_tokens_as_they_should(bundled: LatentService) -> None:
    assert isinstance(bundled, LocalService)
    model, turns = bundled.model, []
    model.eos, eos = frozenset(), model.eos
    try:
        rows = text_against_latent(model, questions=2, steps=3, tokens=24, repeats=1, done=lambda: turns.append(1))
    finally:
        model.eos = eos
    assert [row["arrangement"] for row in rows] == ["sequential", "hierarchical"]
    assert len(turns) == 8  # of each kind one that is not counted
    for row in rows:
        agents = 4 if row["arrangement"] == "sequential" else 2  # one behind the other
        # Nodes that come at the same time share ticks; on a busy machine, none may.
        assert 24 * agents <= row["text_ticks"] <= 2 * 4 * 24
        assert 24 <= row["latent_ticks"] <= 2 * (3 * 3 + 24)
    with pytest.raises(EngineFailed, match="instead of"):  # the bundled model's texts end by themselves
        text_against_latent(model, questions=1, steps=3, tokens=200, repeats=1, done=lambda: None)


def test_concurrency_counts_questions(bundled: LatentService, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(bundled, LocalService)
    turns: list[int] = []
    # Of each kind one turn that is not counted; then four questions at once take 8 s, and two by themselves 1 s.
    clock = iter([0, 50, 100, 108, 200, 250, 300, 301])
    monkeypatch.setattr(graphs, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    found = concurrency(
        bundled.model, concurrent=4, alone=2, repeats=1, done=lambda: turns.append(1), steps=2, max_tokens=4
    )
    assert (found["concurrent"], found["alone"], len(turns)) == (4, 2, 2)
    assert (found["per_second"], found["per_second_alone"], found["times"]) == (0.5, 2, 0.25)
    assert next(clock, None) is None


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["bench", *arguments])


TINY_RUN = ("--model", str(PARITY / "qwen3-tied" / "model"), "--device", "cpu", "--repeats", "1")


def test_the_command_prints_json() -> None:
    ran = run(*TINY_RUN, "--rows", "1,2", "--positions", "48 100000", "--json")
    assert ran.exit_code == 0, ran.output
    document = json.loads(ran.stdout)
    assert {"machine", "steal", "bandwidth_gb_s", "rows"} <= document.keys()
    assert [(row["what"], row["rows"], row["positions"]) for row in document["rows"]] == [
        ("think", 1, 48),
        ("think", 2, 48),
        ("speak", 1, 48),
        ("speak", 2, 48),
    ]
    for row in document["rows"]:
        assert row.keys() >= ROW
        assert row["floor_ratio"] == pytest.approx(document["bandwidth_gb_s"] / row["gb_s"])
        assert row["per_second"] == pytest.approx(1000 * row["rows"] / row["ms"])
    assert document["model"]["decoder"] == "own"
    assert [(one["rows"], one["positions"]) for one in document["skipped"]] == 2 * [(1, 100000), (2, 100000)]
    assert "graphs" not in document


def test_a_cpu_that_nobody_asked_for_is_no_silent_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    ran = run(*TINY_RUN[:2], "--repeats", "1", "--rows", "1", "--positions", "48", "--json")
    assert ran.exit_code == 0, ran.output
    assert "no CUDA device can be used; running on the CPU" in ran.stderr


def test_the_command_prints_tables_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    picture = tmp_path / "bench.svg"
    ran = run(*TINY_RUN, "--rows", "1", "--positions", "48 100000", "--svg", str(picture))
    assert ran.exit_code == 0, ran.output
    assert "Thinking" in ran.stdout
    assert "Speaking" in ran.stdout
    assert "Left out: think, 100,000 positions" in ran.stdout
    assert max(map(len, ran.stdout.splitlines())) <= 100
    assert picture.read_text().startswith("<?xml")


def test_the_tables_say_when_transformers_computed_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LlamaDecoder, "obstacle", lambda decoder: "its activation is gelu")
    ran = run(*TINY_RUN, "--rows", "1", "--positions", "48")
    assert ran.exit_code == 0, ran.output
    assert "layers computed by transformers: its activation is gelu" in ran.stdout


def test_graphs_are_measured_where_they_are_asked_for() -> None:
    small = ("--steps", "2", "--tokens", "3", "--concurrent", "2", "--alone", "3", "--questions", "1")
    ran = run(*TINY_RUN, "--rows", "1", "--positions", "48", "--graphs", *small, "--json")
    assert ran.exit_code == 0, ran.output
    document = json.loads(ran.stdout)
    assert [graph["arrangement"] for graph in document["graphs"]] == ["sequential", "hierarchical"]
    assert (document["concurrency"]["concurrent"], document["concurrency"]["alone"]) == (2, 3)
    assert document["targets"] == []


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("--rows", "none"), "--rows takes whole numbers"),
        (("--positions", "0"), "--positions takes whole numbers"),
        (("--shape", "GPT-9"), "There is no shape 'GPT-9'"),
        (("--shape", "Qwen3-0.6B", "--dtype", "int3"), "no dtype of weights"),
        (("--shape", "Qwen3-0.6B", "--dtype", "float8_e4m3fn"), "no dtype of weights"),
        (("--shape", "Qwen3-0.6B", "--device", "foo"), "no device 'foo'"),
        (("--shape", "Qwen3-0.6B", "--device", "cuda:77"), "no device 'cuda:77'"),
        ((*TINY_RUN, "--device", "cuda:77"), "Cannot load"),
        ((*TINY_RUN, "--rows", "1", "--positions", "4", "--svg", "none.svg"), "nothing to draw"),
        (("--model", "http://127.0.0.1:8765"), "a server cannot be measured"),
        (("--svg", "bench.gif"), "must end in .png or .svg"),
    ],
)
def test_wrong_options_are_refused_in_one_line(arguments: tuple[str, ...], why: str) -> None:
    ran = run(*arguments, "--json")
    assert ran.exit_code == 2
    assert why in json.loads(ran.stdout)["message"]


def test_the_summary_says_which_targets_were_met(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    met = Target("a thought, times its floor", 1.2, 1.25, least=False)
    missed = Target("thoughts per second, 32 rows over 1", 19, 20, least=True)
    measured = run(*TINY_RUN, "--rows", "1", "--positions", "64", "--json")
    document = {
        **json.loads(measured.stdout),
        "machine": {**machine(), "device": "NVIDIA Test"},
        "bandwidth_gb_s": 4000.0,
        "targets": [met.row(), missed.row()],
    }
    document["model"] |= {"name": "random Qwen3-4B", "decoder": "a module has a hook"}
    (tmp_path / "Qwen3-4B.json").write_text(json.dumps(document))
    overheads = {"rows": [{"node": "thinks one step", "together_us": {"median": 900.0}}]}
    (tmp_path / "overhead.json").write_text(json.dumps(overheads))
    summary(tmp_path)
    lines = capsys.readouterr().out.splitlines()
    begin = next(i for i, line in enumerate(lines) if "NVIDIA Test, 4,000 GB/s" in line)
    assert [line.split()[-1] for line in lines[begin + 2 :]] == ["met", "missed", "met"]
    shown = " ".join(lines[:begin])
    assert "random Qwen3-4B" in shown
    assert "layers computed by transformers: a module has a hook" in shown  # a fallback is no slow run
    assert all(title in shown for title in ("ms a tick", "the floor", "plain loop", "generate"))


def test_vllm_beside_the_tick_gets_the_share_of_the_memory_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, dict[str, Any]] = {}

    def load(model: str, **settings: Any) -> Any:
        asked[model] = settings
        if model.startswith("vllm:"):
            raise InterruptedError
        return nullcontext()

    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
    monkeypatch.setattr(LatentService, "load", load)
    for share in (0.4, None):
        with pytest.raises(InterruptedError):
            speak(repeats=1, eager=True, gpu_memory_utilization=share)
        own = {} if share is None else {"gpu_memory_utilization": share}
        assert asked["vllm:bundled"]["engine"] == {"enforce_eager": True, **own}


def test_overhead_is_what_lies_outside_of_the_engine(bundled: LatentService, monkeypatch: pytest.MonkeyPatch) -> None:
    now, step = [0], Ticker.step

    def slow(ticker: Ticker) -> None:
        now[0] += 100
        step(ticker)

    def call() -> None:
        now[0] += 2
        bundled.think("What is the overhead of a think?", steps=1)
        now[0] += 3

    monkeypatch.setattr(measuring, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(Ticker, "step", slow)
    assert overhead(call) == (2, 3)
    assert now[0] >= 105  # ticks were taken


def test_tied_shapes_are_those_that_say_so() -> None:
    tied = {name for name, values in SHAPES.items() if AutoConfig.for_model(**values).tie_word_embeddings}
    assert tied == {"Qwen3-0.6B", "Qwen3-1.7B", "Qwen3-4B", "Llama-3.2-1B", "Llama-3.2-3B"}
