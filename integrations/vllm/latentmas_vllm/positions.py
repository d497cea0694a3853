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


def passes_needed(
    latent: Tensor, positions: Tensor, requests: Tensor, starts: Tensor, block_table: Tensor, block_size: int
) -> int:
    """How often the model must run over a batch of chunks until every hidden state is right; synchronises.

    A latent token's embedding is right one pass after the hidden state before it, and a hidden state is right in the
    pass in which all embeddings up to it are. What lies before a chunk is in the cache. So each latent token of a chunk
    takes a pass of its own, and the first of them one more if the token before it is in the chunk.

    But vLLM offers a block to the next request as soon as it knows what the block will hold: of two requests that begin
    alike, the second one's chunk begins behind blocks that the first one's chunk has yet to fill, and its passes come
    on top of those that these blocks take.

    Args:
        latent: Which tokens are latent [tokens], chunk after chunk.
        positions: Position of each token in its request [tokens].
        requests: Row of `block_table` of each token [tokens].
        starts: Where each chunk starts, and the end of the last one [chunks + 1]; empty chunks are allowed.
        block_table: KV blocks of each request, in order [chunks, blocks]; 0 is nobody's.
        block_size: Positions per block.

    Returns:
        At least 1: the most that any token needs.
    """
    if not latent.any():
        return 1
    table, first = block_table.long(), starts[:-1].clamp_max(len(latent) - 1)
    before = torch.arange(table.shape[1], device=table.device) < (positions[first] // block_size)[:, None]
    filled = table[requests, positions // block_size]
    thoughts = latent.long()
    upto = thoughts.cumsum(0)
    upto = upto - (upto - thoughts)[first][requests]  # latent tokens of the chunk, up to each token
    depth = table.new_zeros(int(table.max()) + 1)  # by block: the pass that makes it right, 0 if an earlier step has
    for _ in range(len(first)):  # no chain of chunks that wait for each other is longer
        waits = (depth[table] * before).amax(1)
        right = torch.where(latent[first], waits, waits.clamp_min(1))[requests] + upto
        deeper = depth.scatter_reduce(0, filled, right, "amax")
        deeper[0] = 0
        if torch.equal(deeper, depth):
            break
        depth = deeper
    return int(right.max())
