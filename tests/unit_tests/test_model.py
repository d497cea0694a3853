"""What is loaded, what is refused and why, and how a model is recognised."""

import json
import math
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from langchain_latentmas import LatentService
from langchain_latentmas.engine.alignment import Alignment
from langchain_latentmas.engine.model import LanguageModel
from langchain_latentmas.errors import EngineFailed, InvalidRequest, ModelNotFound, ModelNotSupported, WrongModel
from langchain_latentmas.service.local import LocalService

from ..conftest import Fresh, load_parts
from ..support import PARITY, at_once, messages, relative, say

QWEN = PARITY / "qwen3-tied" / "model"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
SMALL = {
    "vocab_size": 384,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 256}
ROPE = {"rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 128}


def random_model(kind: str, **config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SMALL, **config}))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.1)
    return model.double().eval()


def folder_with(tmp_path: Path, kind: str, **config: Any) -> str:
    """A model folder without weights: whoever asks for them meets another error than a refusal."""
    AutoConfig.for_model(kind, **{**SMALL, **config}).save_pretrained(tmp_path)
    for name in TOKENIZER_FILES:
        shutil.copy(QWEN / name, tmp_path)
    return str(tmp_path)


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    return Path(shutil.copytree(QWEN, tmp_path / "another name"))


REFUSED = [
    pytest.param("mistral", {"sliding_window": 64}, "slides over 64 positions; pass max_positions=64", id="sliding"),
    pytest.param("gemma3_text", {"sliding_window": 32}, "max_positions=32", id="some layers slide"),
    pytest.param("llama", {"rope_parameters": {"rope_type": "dynamic", **ROPE}}, "max_positions=128", id="dynamic"),
    pytest.param(
        "phi3",
        {
            "rope_parameters": {"rope_type": "longrope", "short_factor": [1.0] * 16, "long_factor": [2.0] * 16, **ROPE},
            "original_max_position_embeddings": 128,
        },
        "longrope rotary scaling .* pass max_positions=128",
        id="longrope",
    ),
    pytest.param("mamba", {}, "linear_attention are not supported", id="mamba"),
    pytest.param("qwen3_next", {}, "linear_attention are not supported", id="linear attention"),
    pytest.param("llama4_text", {"head_dim": 32}, "chunked_attention are not supported", id="chunked attention"),
    pytest.param("t5", {}, "encoder-decoder models are not supported; take a decoder-only", id="encoder-decoder"),
]


@pytest.mark.parametrize(("kind", "config", "why"), REFUSED)
def test_what_is_not_exact_is_refused_before_weights_are_read(
    tmp_path: Path, kind: str, config: dict[str, Any], why: str
) -> None:
    with pytest.raises(ModelNotSupported, match=why):
        LatentService.load(folder_with(tmp_path, kind, **config))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masks_that_are_made_of_shapes_are_seen_by_the_self_check(dtype: torch.dtype) -> None:
    """GPT-Neo takes the queries for the last cells in sight, whatever the mask says."""
    layers = {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "num_heads": 2}
    with pytest.raises(ModelNotSupported, match="computes something else in a ragged batch"):
        LanguageModel(random_model("gpt_neo", **layers).to(dtype), load_parts("qwen3-tied", "float64")[1])


AFTER_THE_HEAD = [
    ("granite", {"logits_scaling": 8.0}),
    ("hyperclovax", {"logits_scaling": 0.1}),
    ("cohere", {"logit_scale": 0.0625}),
    ("gemma2", {"head_dim": 32, "sliding_window": 256, "final_logit_softcapping": 2.0}),
    ("nanochat", {"final_logit_softcapping": 1.0}),
    ("llama", {}),
]


@pytest.mark.parametrize(("dtype", "exact"), [(torch.float64, 1e-12), (torch.bfloat16, 0.01)])
@pytest.mark.parametrize(("kind", "config"), AFTER_THE_HEAD, ids=[kind for kind, _ in AFTER_THE_HEAD])
def test_logits_are_multiplied_and_capped_as_the_model_does_it(
    kind: str, config: dict[str, Any], dtype: torch.dtype, exact: float
) -> None:
    plain = random_model(kind, **config).to(dtype)
    model, ids = LanguageModel(plain, load_parts("qwen3-tied", "float64")[1]), torch.arange(30, 60)[None]
    with torch.inference_mode():
        hidden = plain.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
        wanted = plain(input_ids=ids, use_cache=False).logits
        assert relative(model.logits(hidden).double(), wanted.double()) < exact
    assert (model._factor, model._cap) == (1, None) if kind == "llama" else (model._factor, model._cap) != (1, None)


def test_a_model_that_makes_something_else_of_its_logits_is_refused_for_that() -> None:
    model = random_model("llama")
    forward = model.forward

    def cubed(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        out.logits = out.logits**3
        return out

    model.forward = cubed
    with pytest.raises(ModelNotSupported, match="something else of its hidden states than its output matrix"):
        LanguageModel(model, load_parts("qwen3-tied", "float64")[1])


def test_a_model_whose_embeddings_are_narrower_than_its_layers_is_refused() -> None:
    model = random_model("opt", ffn_dim=64, word_embed_proj_dim=32)
    with pytest.raises(ModelNotSupported, match="its embeddings are 32 wide and its layers 64"):
        LanguageModel(model, load_parts("qwen3-tied", "float64")[1])


@pytest.mark.parametrize("realign", [True, False])
def test_a_thought_is_as_long_as_what_is_fed_for_a_token(realign: bool) -> None:
    """Gemma's embeddings multiply their rows by the root of the width."""
    model = LanguageModel(random_model("gemma", head_dim=32), load_parts("qwen3-tied", "float64")[1], realign=realign)
    with torch.inference_mode():
        fed = model.embed(torch.arange(model.config.vocab_size)).norm(dim=-1)
        thoughts = model.alignment(torch.randn(3, 64).double())
    assert fed.mean() > 5 * model.model.get_input_embeddings().weight.norm(dim=-1).mean()
    torch.testing.assert_close(thoughts.norm(dim=-1), fed.mean().expand(3))


@pytest.mark.parametrize(("kind", "config"), [("bloom", {}), ("falcon", {"alibi": True})])
def test_models_that_cannot_run_on_the_slot_cache_are_refused(kind: str, config: dict[str, Any]) -> None:
    with pytest.raises(ModelNotSupported, match=r"slot cache|max_position_embeddings"):
        LanguageModel(random_model(kind, **config), load_parts("qwen3-tied", "float64")[1])


ACCEPTED = [
    ("llama", {}),
    ("mistral", {"sliding_window": None}),
    ("qwen2", {}),
    ("gemma", {"head_dim": 32}),
    ("gemma2", {"head_dim": 32, "sliding_window": 256}),
    ("granite", {"logits_scaling": 8.0}),
    ("cohere", {"logit_scale": 0.0625}),
    ("gpt_neox", {}),
    ("phi", {}),
    ("phi3", {}),
    ("stablelm", {}),
    ("olmo2", {}),
    ("starcoder2", {}),
    ("nemotron", {}),
    ("glm4", {"head_dim": 32}),
    ("smollm3", {"num_hidden_layers": 4}),
    ("gpt2", GPT2),
    ("gptj", {**GPT2, "rotary_dim": 16}),
    ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 64}),
]


@pytest.mark.parametrize(("kind", "config"), ACCEPTED, ids=[kind for kind, _ in ACCEPTED])
def test_what_is_accepted_thinks_as_the_plain_model_does(kind: str, config: dict[str, Any]) -> None:
    model = random_model(kind, **config)
    with LocalService.from_model(model, load_parts("qwen3-tied", "float64")[1]) as service:
        refs = at_once([lambda n=n: service.think("x" * n, steps=3) for n in (3, 40)])
        for ref in refs:
            segment = service.memory(ref).segments[0]
            with torch.inference_mode():
                embeds = model.get_input_embeddings()(torch.tensor([segment.prompt_ids]))
                for thought in segment.thoughts:
                    hidden = model.get_decoder()(inputs_embeds=embeds, use_cache=False).last_hidden_state[0, -1]
                    exact = 1e-6 if kind == "gptj" else 1e-8  # it attends in float32 whatever its dtype
                    assert relative(thought, service.model.alignment(hidden)) < exact
                    embeds = torch.cat([embeds, thought[None, None]], dim=1)


@pytest.mark.parametrize("kind", ["gpt2", "smollm3"])
def test_models_without_movable_keys_rebuild_merged_memories_and_say_so(kind: str) -> None:
    model = random_model(kind, **dict(ACCEPTED)[kind])
    with LocalService.from_model(model, load_parts("qwen3-tied", "float64")[1]) as service:
        assert service.model.rotary is None
        assert service.info()["merge"] == "rebuild"
        one, two = (service.think(messages("What is 1 + 1?", f"Expert {i}."), steps=2) for i in range(2))
        assert say(service, messages("?"), [one, two]).usage["merge"] == "rebuilt"
        assert say(service, messages("?"), [one]).usage["merge"] == "none"
    with pytest.raises(ModelNotSupported, match="merge='auto' or 'rebuild'"):
        LocalService.from_model(model, load_parts("qwen3-tied", "float64")[1], merge="rotate")


def test_a_sliding_model_is_served_as_far_as_it_is_exact() -> None:
    model = random_model("mistral", sliding_window=64)
    with LocalService.from_model(model, load_parts("qwen3-tied", "float64")[1], max_positions=64) as service:
        assert service.info()["max_positions"] == 64


@pytest.mark.parametrize("wanted", [7, 2049])
def test_max_positions_stay_within_the_model(wanted: int) -> None:
    with pytest.raises(ModelNotSupported, match="between 8 and the model's 2048"):
        LatentService.load(str(QWEN), max_positions=wanted)


def test_a_tokenizer_without_chat_template_is_refused_and_one_can_be_given(copied: Path) -> None:
    (copied / "chat_template.jinja").unlink()
    with pytest.raises(ModelNotSupported, match=r"pass chat_template=\.\.\."):
        LatentService.load(str(copied))
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with LatentService.load(str(copied), chat_template=template) as service:
        assert service.think("hello", steps=1)["positions"] == 1 + len(
            load_parts("qwen3-tied", "float64")[1]("hello")["input_ids"]
        )


def test_template_args_are_passed_to_the_chat_template(fresh_service: Fresh) -> None:
    template = "{{ 'Be quick.' if enable_thinking is false else 'Think.' }} {{ messages[0]['content'] }}"
    read = []
    for args in ({}, {"enable_thinking": False}):
        service = fresh_service(chat_template=template, template_args=args)
        (segment,) = service.memory(service.think("What is 1 plus 2?", steps=0)).segments
        read.append(service.model.tokenizer.decode(list(segment.prompt_ids)))
    assert read == ["Think. What is 1 plus 2?", "Be quick. What is 1 plus 2?"]


@pytest.mark.parametrize("name", ["no/such-model", "/no/such/folder", "no such model", "ftp://example.com/model"])
def test_an_unknown_model_is_not_found(name: str) -> None:
    with pytest.raises(ModelNotFound, match=r"(?i)give .*a hub id"):
        LatentService.load(name)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_model_that_cannot_be_read_is_not_found(copied: Path, name: str) -> None:
    damaged = copied / name
    damaged.write_bytes(damaged.read_bytes()[: damaged.stat().st_size // 2])
    with pytest.raises(ModelNotFound, match="Give a hub id, a folder"):
        LatentService.load(str(copied))


def test_a_folder_without_a_model_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="Give a hub id, a folder"):
        LatentService.load(str(tmp_path))


def test_weights_of_another_shape_than_the_configuration_says_are_not_found(copied: Path) -> None:
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, "intermediate_size": 64}))
    with pytest.raises(ModelNotFound, match="Give a hub id, a folder"):
        LatentService.load(str(copied))


def no_memory(*_: Any, **__: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee the manual.")


@pytest.mark.parametrize(
    ("owner", "step"),
    [(AutoModelForCausalLM, "from_pretrained"), (LanguageModel, "hidden"), (Alignment, "of")],
    ids=["weights", "check", "alignment"],
)
def test_a_device_with_too_little_memory_is_named_with_what_helps(
    monkeypatch: pytest.MonkeyPatch, owner: type, step: str
) -> None:
    monkeypatch.setattr(owner, step, no_memory)
    with pytest.raises(EngineFailed, match=r"model does not fit on cpu, where \d+\.\d GB are free now") as failed:
        LatentService.load(str(QWEN), device="cpu")
    assert "(CUDA out of memory. Tried to allocate 2.00 GiB.). Free some there, or take" in str(failed.value)


def test_weights_that_were_changed_unseen_are_not_taken_for_those_before(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, tokenizer = load_parts("qwen3-tied", "float32")
    model = LanguageModel(deepcopy(loaded), tokenizer)
    before = model.fingerprint
    model.model.get_input_embeddings().weight.data.mul_(2)  # hides from `refresh_if_changed`
    with monkeypatch.context() as patch:
        patch.setattr(Alignment, "of", no_memory)
        with pytest.raises(EngineFailed, match="does not fit"):
            model.refresh()
    model.refresh_if_changed()
    assert model.fingerprint != before


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(ModelNotSupported, match="'bfloat16'"):
        LatentService.load(str(QWEN), dtype="float99")


@pytest.mark.parametrize(
    "settings", [{"no_such": 1}, {"max_rows": 0}, {"kv_budget": -1}, {"merge": "stir"}, {"prefill_chunk": 0}], ids=str
)
def test_settings_are_checked_before_the_model_is_loaded(settings: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="Settings: device, dtype"):
        LatentService.load("/no/such/folder", **settings)


@pytest.fixture
def writable() -> Iterator[LocalService]:
    """A service on weights of its own."""
    model, tokenizer = load_parts("qwen3-tied", "float32")
    with LocalService.from_model(deepcopy(model), tokenizer) as service:
        yield service


def test_the_fingerprint_is_made_of_values_and_not_of_dtype_or_folder(copied: Path, service32: LatentService) -> None:
    with LatentService.load(str(copied), dtype="float64") as moved:
        assert moved.info()["fingerprint"] == service32.info()["fingerprint"]
        assert moved.info()["dtype"] == "float64"
        assert service32.info()["dtype"] == "float32"


def test_half_precision_weights_are_others_than_those_they_were_rounded_from(service32: LatentService) -> None:
    with LatentService.load(str(QWEN), dtype="bfloat16") as rounded:
        assert rounded.info()["fingerprint"] != service32.info()["fingerprint"]
        half = say(rounded, messages("Hi"), [rounded.think(messages("Hi"), steps=2)])
        assert half.usage["latent_steps"] == 2
    bfloat, tokenizer = load_parts("qwen3-tied", "bfloat16")
    widened = LanguageModel(deepcopy(bfloat).float(), tokenizer)
    assert widened.fingerprint == LanguageModel(bfloat, tokenizer).fingerprint


def test_a_fingerprint_stays_what_it_was() -> None:
    """Memories in stores were made by the model that it names."""
    found = {dtype: LanguageModel(*load_parts("qwen3-tied", dtype)).fingerprint for dtype in ("float32", "bfloat16")}
    assert found == {
        "float32": "f8b64f40fdae78d893d5e4f32db680fa",
        "bfloat16": "b9136eb82702b2c810058fc8bc0f30c2",
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_weights_leave_their_device_as_they_lie_there(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """To hash them; wider ones would take room on a GPU, and twice as long to come from there."""
    model, tokenizer = load_parts("qwen3-tied", str(dtype).removeprefix("torch."))
    loaded, sent, cpu = LanguageModel(model, tokenizer), list[torch.dtype](), torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: sent.append(tensor.dtype) or cpu(tensor))
    fingerprint = loaded.fingerprint
    loaded.refresh()
    assert set(sent) == {dtype}
    assert loaded.fingerprint == fingerprint


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_what_is_masked_stays_finite_where_a_kernel_counts_in_powers_of_two(dtype: str) -> None:
    unseen = LanguageModel(*load_parts("qwen3-tied", dtype)).unseen
    assert (torch.tensor(unseen, dtype=torch.float32) * math.log2(math.e)).isfinite()


def test_another_vocabulary_is_another_model(service: LatentService) -> None:
    model, tokenizer = load_parts("qwen3-tied", "float64")
    more = deepcopy(tokenizer)
    more.add_tokens(["<extra>"])
    assert LanguageModel(model, more).fingerprint != service.info()["fingerprint"]


def test_who_comes_while_new_weights_are_hashed_waits_for_their_fingerprint(
    writable: LocalService, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, fingerprint = writable.think(messages("Hi"), steps=2), writable.model._fingerprint
    before = writable.memory(old).segments[-1].thoughts
    begun, go_on = Event(), Event()

    def slow() -> str:
        begun.set()
        assert go_on.wait(60)
        return fingerprint()

    monkeypatch.setattr(writable.model, "_fingerprint", slow)
    with torch.no_grad():
        next(iter(writable.model.model.parameters())).add_(1e-3)
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(writable.think, messages("Hi"), steps=2)
        assert begun.wait(60)
        second = threads.submit(writable.think, messages("Hi"), steps=2)
        with pytest.raises(TimeoutError):
            second.result(0.3)
        go_on.set()
        new = first.result(60)
        assert second.result(60) == new
    assert new["model"] != old["model"]
    assert not torch.equal(writable.memory(new).segments[-1].thoughts, before)


def test_a_weight_changed_in_place_makes_another_model(writable: LocalService) -> None:
    before, old = writable.info()["fingerprint"], writable.think(messages("Hi"), steps=2)
    with torch.no_grad():
        next(iter(writable.model.model.parameters())).add_(1e-3)

    with pytest.raises(WrongModel, match="hand its text over instead"):
        writable.memory(old)
    for read in (writable.think, writable.speak):
        with pytest.raises(WrongModel):
            read(messages("Hi"), [old])
    new = writable.think(messages("Hi"), steps=2)
    assert new["model"] == writable.info()["fingerprint"] != before
    assert new["id"] != old["id"]
    assert say(writable, messages("Hi"), [new]).ref["parents"] == [new["id"]]


def test_an_adapter_put_in_makes_another_model(writable: LocalService) -> None:
    class Doubled(torch.nn.Module):
        def __init__(self, base: torch.nn.Module) -> None:
            super().__init__()
            self.base, self.factor = base, torch.nn.Parameter(torch.tensor(2.0))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base(x) * self.factor.to(x.dtype)

    before, old = writable.info()["fingerprint"], writable.think(messages("Hi"), steps=2)
    attention = writable.model.model.get_decoder().layers[0].self_attn
    attention.o_proj = Doubled(attention.o_proj)
    with pytest.raises(WrongModel):
        writable.think(messages("Hi"), [old])
    assert writable.info()["fingerprint"] != before


def test_a_changed_embedding_changes_the_alignment_at_once(writable: LocalService) -> None:
    with torch.no_grad():
        writable.model.model.get_input_embeddings().weight.mul_(2)
    norm = writable.model.model.get_input_embeddings().weight.norm(dim=1).mean()
    ref = writable.think(messages("Hi"), steps=2)
    torch.testing.assert_close(writable.memory(ref).segments[0].thoughts.norm(dim=1), norm.detach().expand(2))


def test_weights_that_could_not_be_hashed_are_still_changed_ones(
    writable: LocalService, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = writable.think(messages("Hi"), steps=2)
    with torch.no_grad():
        next(iter(writable.model.model.parameters())).mul_(1.1)
    with monkeypatch.context() as patch:
        patch.setattr(Alignment, "of", no_memory)
        with pytest.raises(EngineFailed, match="does not fit on cpu"):
            writable.think(messages("Hi"), steps=2)
    assert writable.think(messages("Hi"), steps=2)["model"] != old["model"]


def test_weights_put_back_are_the_model_they_were(writable: LocalService) -> None:
    old = writable.think(messages("Hi"), steps=2)
    weight = next(iter(writable.model.model.parameters()))
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.add_(1)
        weight.copy_(kept)
    assert writable.memory(old).positions == old["positions"]


def test_another_model_is_told_whose_reference_it_was_given(fresh_service: Fresh, service: LatentService) -> None:
    ref = service.think(messages("Hi"), steps=1, agent="planner")
    llama = fresh_service("llama-untied")
    with pytest.raises(WrongModel, match="agent 'planner' belongs to model"):
        llama.think(messages("Hi"), [ref])
    assert llama.info()["ticks"] == 0


def test_a_checkpoint_with_weights_missing_is_not_served_with_random_ones(copied: Path) -> None:
    weights = load_file(copied / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, copied / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelNotFound, match=r"lacks 1 weights .* such as model\.layers\.1\.mlp\.up_proj\.weight"):
        LatentService.load(str(copied))


def test_a_model_that_overflows_float16_in_the_check_at_load_is_refused() -> None:
    model, tokenizer = load_parts("qwen3-tied", "float32")
    large = deepcopy(model)
    with torch.no_grad():
        for projection in (large.model.layers[0].mlp.up_proj, large.model.layers[0].mlp.down_proj):
            projection.weight.mul_(1e4)
    assert LanguageModel(large, tokenizer).fingerprint
    half = large.half()
    assert all(weight.isfinite().all() for weight in half.parameters())
    with pytest.raises(
        ModelNotSupported, match=r"infinite numbers or NaN .* torch\.float16, so it is refused; take dtype='bfloat16'"
    ):
        LanguageModel(half, tokenizer)
