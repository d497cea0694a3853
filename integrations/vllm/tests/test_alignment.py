import pytest
import torch
from latentmas_vllm.alignment import Alignment

from langchain_latentmas.engine import alignment


@pytest.mark.parametrize("realign", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_maps_as_the_transformers_engine_does(realign: bool, tied: bool) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(300, 32)
    outputs = inputs if tied else torch.randn(300, 32)
    hidden = torch.randn(7, 32)
    theirs = alignment.Alignment(inputs, outputs, realign)(hidden)
    torch.testing.assert_close(Alignment(inputs, outputs, vocab_size=300, realign=realign)(hidden), theirs)


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_sharded_vocabulary_gives_the_same_map(ranks: int) -> None:
    """Each rank's sums by themselves, then the whole: what an all-reduce over tensor-parallel ranks hands to each."""
    torch.manual_seed(0)
    inputs, outputs = torch.randn(100, 16).double(), torch.randn(100, 16).double()
    shards = list(zip(inputs.tensor_split(ranks), outputs.tensor_split(ranks), strict=True))
    sums: list[list[torch.Tensor]] = []
    for i, o in shards:
        seen: list[torch.Tensor] = []
        Alignment(i, o, vocab_size=100, all_reduce=lambda tensor, seen=seen: seen.append(tensor.clone()) or tensor)
        sums.append(seen)
    totals = iter([sum(parts) for parts in zip(*sums, strict=True)])
    sharded = Alignment(*shards[-1], vocab_size=100, all_reduce=lambda _: next(totals))
    whole = Alignment(inputs, outputs, vocab_size=100)
    assert sharded.weight is not None
    torch.testing.assert_close(sharded.weight, whole.weight)
    torch.testing.assert_close(sharded.norm, whole.norm)


def test_half_precision_thoughts_keep_their_dtype() -> None:
    inputs = torch.randn(50, 8).bfloat16()
    align = Alignment(inputs, inputs, vocab_size=50)
    assert align.norm.dtype is torch.float32
    assert align(torch.randn(2, 8).bfloat16()).dtype is torch.bfloat16
