"""What gathering a position bias for the kept pairs of tokens costs (BEiT, vit_relpos).

    python benchmarks/pair_bias.py [--threads 1]

Blocks of timm's ``vit_relpos_small_patch16_224`` on 16 images: on all patches with the bias as it
is, and on the kept ones with the bias of every image's own pairs, gathered once a block (BEiT, and
relative positions of each block's own) or once for all blocks; and without any bias, which is what
the count of tokens promises. Rounds take turns; ratios are of medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import timm
import torch
from torch import Tensor

IMAGES, ROUNDS = 16, 9


def gathered(bias_1HNN: Tensor, index_BK: Tensor) -> Tensor:
    """(B, H, K, K): the bias of each image's kept pairs."""
    num_places = bias_1HNN.shape[-1]
    pair_BKK = index_BK.unsqueeze(2) * num_places + index_BK.unsqueeze(1)
    flat = bias_1HNN[0].flatten(1).index_select(1, pair_BKK.flatten())
    return flat.unflatten(1, pair_BKK.shape).transpose(0, 1)


def medians(runs: dict[str, Callable[[], object]]) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS + 1):
        for name, run in runs.items():
            start = time.process_time()
            run()
            times[name].append(time.process_time() - start)
    return {name: statistics.median(taken[1:]) for name, taken in times.items()}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    torch.set_num_threads(parser.parse_args().threads)
    model = timm.create_model("vit_relpos_small_patch16_224").eval()
    block, places = model.blocks[0], model.patch_embed.num_patches
    bias = block.attn.rel_pos.get_bias()

    def run(x: Tensor, pairs: Tensor | None) -> Tensor:
        block.attn.rel_pos = None
        return block(x, shared_rel_pos=pairs)

    x = torch.randn(IMAGES, places, block.attn.qkv.in_features)
    for ratio in (0.7, 0.5):
        kept = round(ratio * places)
        index_BK = torch.rand(IMAGES, places).argsort(1)[:, :kept]
        some, once = x[:, :kept].contiguous(), gathered(bias, index_BK).contiguous()
        found = medians(
            {
                "all": lambda: run(x, bias),
                "promised": lambda some=some: run(some, None),
                "once": lambda some=some, once=once: run(some, once),
                "each": lambda some=some, index=index_BK: run(some, gathered(bias, index)),
            }
        )
        ratios = {name: found["all"] / taken for name, taken in found.items()}
        shown = ", ".join(f"{name} {times:.2f}x" for name, times in ratios.items())
        print(f"{ratio:g} kept: {shown}")


if __name__ == "__main__":
    main()
