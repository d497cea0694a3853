"""Where the hidden state before a position is kept, and how often a chunk must run until all of them are right."""

import torch
from torch import Tensor


def slots_before(positions: Tensor, requests: Tensor, block_table: Tensor, block_size: int) -> Tensor:
    """KV slots of the positions before, on the device and without synchronisation.

    Args:
        positions: Position of each token in its request [tokens].
        requests: Row of `block_table` of each token [tokens].
        block_table: KV blocks of each request, in order [requests, blocks].
        block_size: Positions per block.

    Returns:
        [tokens]; for position 0, which has none before it, its own slot.
    """
    before = (positions - 1).clamp_min(0)
    return block_table[requests, before // block_size].long() * block_size + before % block_size


def passes_needed(latent: Tensor, starts: Tensor) -> Tensor:
    """How often the model must run over a batch of chunks until every hidden state is right.

    A latent token's embedding is right one pass after the hidden state before it, and a hidden state is right in the
    pass in which all embeddings up to it are. What lies before a chunk is in the cache. So each latent token of a chunk
    takes a pass of its own, and the first of them one more if the token before it is in the chunk.

    Args:
        latent: Which tokens are latent [tokens], chunk after chunk.
        starts: Where each chunk starts, and the end of the last one [chunks + 1]; empty chunks are allowed.

    Returns:
        A scalar tensor, at least 1: the most that any chunk needs.
    """
    upto = torch.nn.functional.pad(latent.long().cumsum(0), (1, 0))
    count = upto[starts[1:]] - upto[starts[:-1]]
    first = latent[starts[:-1].clamp_max(len(latent) - 1)]
    return (count + ((count > 0) & ~first).long()).max().clamp_min(1)
