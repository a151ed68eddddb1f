"""Packed execution against a uniform batch, and against the other ways to run per-image counts.

``python benchmarks/packing.py`` on an otherwise idle machine (under four minutes on 2 cores) prints
all of them and writes ``results/packing.json`` and the tables of ``results/packing.md``.

DeiT-S, 12 blocks and head. The counts of the batch spread by 25 tokens around their mean of 111;
the uniform batch keeps 111 of every image. The ways take turns, and each is compared with the
uniform batch right before and right after it: two virtual processors may share a core for seconds,
and then all times are half as long again. ``--fit`` measures the constants of the cost model
instead (``vitrim/tokens/bucketing.py``).
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from vitrim.checkpoint import write_atomic
from vitrim.families import family_of
from vitrim.tokens.bucketing import bucketed_attention, make_bucket
from vitrim.tokens.packed import PackedTokens, select
from vitrim.tokens.plain import Tokens
from vitrim.tools.benchmark import DTYPES, Quartiles, checked_device
from vitrim.tools.hardware import hardware

MODEL = "deit_small_patch16_224"
MEAN, SPREAD, GRID = 111, 25, 196
RESULTS = Path(__file__).parents[1] / "results"
UNIFORM, PACKED, STAGE = "uniform batch", "packed (vitrim)", ", stage included"

Run = Callable[[], Tensor]
Attend = Callable[[Tensor], Tensor]
"""Contexts (rows, H, D) of packed queries, keys and values (rows, 3, H, D)."""


def counts_of(batch: int) -> list[int]:
    """Normal counts of exactly the mean."""
    z = torch.randn(batch, generator=torch.Generator().manual_seed(0))
    z = (z - z.mean()) / z.std(correction=0)
    counts = (MEAN + SPREAD * z).round().long().clamp(1, GRID)
    counts[0] += MEAN * batch - counts.sum()
    return [int(count) for count in counts]


class Ways:
    """Every way to run the blocks and the head on the same tokens."""

    def __init__(self, batch: int, dtype: torch.dtype, device: torch.device) -> None:
        torch.manual_seed(0)
        model = timm.create_model(MODEL).eval().to(device, dtype)
        self.family, self.blocks = family_of(model), model.blocks
        x = torch.randn(batch, 1 + GRID, model.embed_dim).to(device, dtype)
        self.tokens = Tokens.of(x, 1)
        rank = torch.rand(batch, GRID).argsort(1).argsort(1)
        self.keep = (rank < torch.tensor(counts_of(batch)).unsqueeze(1)).to(device)
        self.positions = (rank < MEAN).nonzero()[:, 1].view(batch, MEAN).to(device)
        packed = select(self.tokens, self.keep)
        assert isinstance(packed, PackedTokens)
        self.packed, self.layout = packed, packed.layout

    def all(self, flex: bool) -> dict[str, Run]:
        lengths = self.layout.lengths
        uniform, padded = self.tokens.gather(self.positions), self.packed.padded()
        runs = [len(list(run)) for _, run in groupby(lengths)]
        sixteens = [len(list(run)) for _, run in groupby(lengths, lambda n: -(-n // 16))]
        eighth = max(1, len(lengths) // 8)
        eight = [eighth] * (len(lengths) // eighth)
        ways: dict[str, Run] = {
            UNIFORM: lambda: self.run(uniform),
            PACKED: lambda: self.run(self.packed),
            UNIFORM + STAGE: lambda: self.run(self.tokens.gather(self.positions)),
            PACKED + STAGE: lambda: self.run(select(self.tokens, self.keep)),
            "packed, MLP in one piece": self.in_one_piece,
            "padding with a mask": lambda: self.whole_blocks([padded]),
            "whole blocks in eight buckets": self.in_eight(padded, eighth),
            "loop over images, whole blocks": self.alone(),
            "eight buckets, attention": self.divided(eight, True, lanes=1),
            "loop over images, attention": self.divided([1] * len(lengths), False),
            "equal lengths, no padding": self.divided(runs, False),
            "a bucket per 16 tokens": self.divided(sixteens, True),
            "two matrix products, not fused": lambda: self.with_attention(self.unfused),
            "jagged nested tensors": lambda: self.with_attention(self.nested),
        }
        if flex:
            attend = self.flex()
            ways["flex attention, compiled"] = lambda: self.with_attention(attend)
        return ways

    def run(self, tokens: Any) -> Tensor:
        for block in range(self.family.depth):
            tokens = self.family.run_block(block, tokens)
        return self.family.head(tokens)

    def in_one_piece(self) -> Tensor:
        """Without the slices of the packed rows: what the buckets alone give."""
        buckets = self.layout.buckets(self.packed.x.dtype, self.blocks[0].attn.num_heads)
        return self.with_attention(lambda qkv: bucketed_attention(qkv, buckets, 0.0))

    def divided(self, sizes: list[int], padded: bool, lanes: int = 16) -> Run:
        """Packed, with buckets of these numbers of images."""
        qkv, buckets = self.packed.x, []
        for part in torch.tensor(self.layout.lengths).split(sizes):
            buckets.append(make_bucket(part.tolist(), padded, qkv.dtype, qkv.device, lanes))
        return lambda: self.with_attention(lambda qkv: bucketed_attention(qkv, buckets, 0.0))

    def with_attention(self, attend: Attend) -> Tensor:
        def attention_half(block: Any, x: Tensor) -> Tensor:  # lets go of its memory, as vitrim's
            attention = block.attn
            qkv = attention.qkv(block.norm1(x)).unflatten(1, (3, -1, attention.head_dim))
            return x + attention.proj(attend(qkv).flatten(1))

        x = self.packed.x
        for block in self.blocks:
            x = attention_half(block, x)
            x = x + block.mlp(block.norm2(x))
        return self.family.head(self.packed.with_x(x))

    def whole_blocks(self, parts: list[Tokens]) -> Tensor:
        """Padded batches under a mask, with timm's fused attention."""
        logits = []
        for tokens in parts:
            x = tokens.x
            mask = torch.zeros_like(tokens.keep_all).masked_fill(tokens.keep_all < 0.5, -torch.inf)
            for block in self.blocks:
                x = block(x, attn_mask=mask[:, None, None, :])
            logits.append(self.family.head(tokens.with_x(x)))
        return torch.cat(logits)

    def in_eight(self, padded: Tokens, size: int) -> Run:
        """Eight batches, each padded to its longest image; logits in the batch's order."""
        order = torch.tensor(self.layout.order)
        parts = []
        for images in order.split(size):
            longest = max(self.layout.counts[int(image)] for image in images)
            images = images.to(padded.x.device)
            keep, index = padded.keep_BN, padded.index_BN
            assert keep is not None
            x = padded.x[images, : 1 + longest]
            parts.append(Tokens(x, 1, index[images, :longest], keep[images, :longest]))
        back = order.argsort().to(padded.x.device)
        return lambda: self.whole_blocks(parts)[back]

    def alone(self) -> Run:
        """Image after image through all blocks."""
        images = []
        for image in range(len(self.keep)):
            places = self.keep[image].nonzero().T
            images.append(Tokens.of(self.tokens.x[image : image + 1], 1).gather(places))
        return lambda: torch.cat([self.run(one) for one in images])

    def unfused(self, qkv: Tensor) -> Tensor:
        contexts = []
        lengths = self.layout.lengths
        for part, length in zip(qkv.split(lengths), lengths, strict=True):
            q, k, v = part.unflatten(0, (1, length)).permute(2, 0, 3, 1, 4).unbind(0)
            weights = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1)
            contexts.append((weights @ v).transpose(1, 2).flatten(0, 1))
        return torch.cat(contexts)

    def nested(self, qkv: Tensor) -> Tensor:
        """Built per block, as the linear layers run on the packed rows."""
        bounds = self.layout.bounds.long()
        q, k, v = (
            torch.nested.nested_tensor_from_jagged(part.contiguous(), bounds).transpose(1, 2)
            for part in qkv.unbind(1)
        )
        out: Tensor = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return out.values()

    def flex(self) -> Attend:
        """One sequence of all rows; a row sees the rows of its own image."""
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        image, rows = self.layout.image_T, self.layout.num_rows
        mask = create_block_mask(
            lambda _b, _h, query, key: image[query] == image[key],
            None,
            None,
            rows,
            rows,
            device=str(image.device),
        )
        compiled: Any = torch.compile(flex_attention, dynamic=False)

        def attend(qkv: Tensor) -> Tensor:
            q, k, v = qkv.permute(1, 2, 0, 3).unsqueeze(1).unbind(0)
            out: Tensor = compiled(q, k, v, block_mask=mask)
            return out[0].transpose(0, 1)

        return attend


def keep_freed_memory() -> None:
    """Tell glibc to keep what is freed; other C libraries are left as they are.

    Otherwise large blocks go back to the system and are faulted in anew, at up to a sixth of the
    time, more or less so depending on what ran before.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_max = -1, -4
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_max, 0)


Pair = tuple[float, float]
"""Seconds of the uniform batch, before and after a way on average, and of the way."""


def measure(ways: dict[str, Run], seconds: float, device: torch.device) -> dict[str, list[Pair]]:
    """Times of each way in each round, of the packed one in three places; three rounds or more."""
    names, pairs = list(ways), {name: list[Pair]() for name in ways}
    third = len(names) // 3
    order = [*names[:third], PACKED, *names[third : 2 * third], PACKED, *names[2 * third :]]
    deadline, turn = time.perf_counter() + seconds, 0
    while turn < 3 or time.perf_counter() < deadline:
        for name in order:
            uniform = ways[UNIFORM + STAGE if name.endswith(STAGE) else UNIFORM]
            before, own, after = (timed(run, device) for run in (uniform, ways[name], uniform))
            pairs[name].append(((before + after) / 2, own))
        turn += 1
    return pairs


def timed(run: Run, device: torch.device) -> float:
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start


def measured_rows(options: argparse.Namespace, dtype: str, device: torch.device) -> list[Any]:
    """A row per way, after a check that all give the same logits."""
    ways = Ways(options.batch, DTYPES[dtype], device).all(flex=not options.no_flex)
    expected = ways[PACKED]().float()
    broken = {}
    for name, run in list(ways.items()):
        try:
            logits = run().float()
        except Exception as error:  # a way that this torch or machine cannot run is a result too
            broken[name] = f"{type(error).__name__}: {error}".splitlines()[0][:120]
            del ways[name]
            continue
        if not name.startswith(UNIFORM):
            tolerance = 1e-4 if dtype == "fp32" else 0.1
            torch.testing.assert_close(logits, expected, atol=tolerance, rtol=0)
    pairs = measure(ways, options.seconds, device)
    rows = []
    for name, own in pairs.items():
        relative = Quartiles.of([uniform / seconds for uniform, seconds in own])
        rows.append(
            {
                "way": name,
                "dtype": dtype,
                "relative": vars_of(relative),
                "milliseconds": vars_of(Quartiles.of([1e3 * seconds for _, seconds in own])),
                "rounds": len(own),
            }
        )
        print(line(rows[-1]), flush=True)
    for name, reason in broken.items():
        print(f"{dtype} {name:34s} cannot run: {reason}")
    rows += [{"way": name, "dtype": dtype, "error": why} for name, why in broken.items()]
    return rows


def vars_of(quartiles: Quartiles) -> dict[str, float]:
    return {name: round(getattr(quartiles, name), 4) for name in ("median", "low", "high")}


def line(row: dict[str, Any]) -> str:
    ratio, time_ = row["relative"], row["milliseconds"]
    return (
        f"{row['dtype']} {row['way']:34s} {ratio['median']:.3f} of uniform "
        f"[{ratio['low']:.3f}, {ratio['high']:.3f}]  {time_['median']:8.1f} ms"
    )


def table(run: dict[str, Any]) -> str:
    """Markdown of one run."""
    hardware_ = run["hardware"]
    where = hardware_.get("gpu", hardware_["cpu"])
    by_way: dict[str, dict[str, str]] = {}
    for row in run["rows"]:
        cell = "cannot run"
        if "relative" in row:
            ratio = row["relative"]
            cell = f"{ratio['median']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]"
        by_way.setdefault(row["way"], {})[row["dtype"]] = cell
    dtypes = sorted({row["dtype"] for row in run["rows"]}, reverse=True)
    threads = "" if "gpu" in hardware_ else f", {hardware_['threads']} thread(s)"
    lines = [
        f"### {where}{threads}, batch {run['batch']}",
        "",
        f"torch {hardware_['torch']}, {hardware_['date']}, `{run['command']}`"
        + (f"; {run['note']}" if run.get("note") else ""),
        "",
        "| way | " + " | ".join(dtypes) + " |",
        "|---|" + "---|" * len(dtypes),
    ]
    lines += [
        f"| {way} | " + " | ".join(cells.get(dtype, "") for dtype in dtypes) + " |"
        for way, cells in by_way.items()
    ]
    return "\n".join(lines)


def save(run: dict[str, Any]) -> None:
    """Put the run in the place of the last one on such a machine, in both files."""
    path = RESULTS / "packing.json"
    runs = json.loads(path.read_text())["runs"] if path.exists() else []

    def kind(run: dict[str, Any]) -> tuple[Any, ...]:
        return run["hardware"]["device"], run["hardware"]["threads"], run["batch"]

    runs = sorted([old for old in runs if kind(old) != kind(run)] + [run], key=kind, reverse=True)
    write_atomic(path, (json.dumps({"model": MODEL, "runs": runs}, indent=1) + "\n").encode())
    page = RESULTS / "packing.md"
    begin, end = "<!-- tables -->", "<!-- end of tables -->"
    before, _, rest = page.read_text().partition(begin)
    tables = "\n\n".join(table(run) for run in runs)
    text = f"{before}{begin}\n\n{tables}\n\n{end}{rest.partition(end)[2]}"
    write_atomic(page, text.encode())


def fit(dtype: torch.dtype, heads: int = 6, dim: int = 64) -> None:
    """Measure the constants of the cost model by least squares of relative errors; one thread."""
    terms, times = [], []
    alone = (8, 16, 32, 61, 73, 97, 104, 105, 111, 112, 119, 127, 128, 151, 160, 197)
    for images, length in [(1, length) for length in alone] + [(2, 33), (2, 64), (2, 80)]:
        equal, mixed = [length] * images, [length] * images + [length + 1] * 2
        for lengths, padded in ((equal, False), (equal, True), (mixed, True)):
            longest, num = lengths[-1], len(lengths) * heads
            # As many rows as a real batch has: what is read was not read a moment ago.
            turns = max(1, 3584 // sum(lengths))
            qkv = torch.randn(turns * sum(lengths), 3, heads, dim).to(dtype)
            buckets = turns * [make_bucket(lengths, padded, dtype, qkv.device)]
            run = partial(bucketed_attention, qkv, buckets, 0.0)
            times.append(quickest(run) / turns)
            keys = -(-longest // 16) * 16 if padded else longest
            tail = keys % 16
            terms.append(
                [
                    1.0,
                    num * longest * keys,
                    num * longest * (tail > 0),
                    num * longest * tail,
                    num * keys * padded,
                    num * longest * (lengths[0] < longest),
                ]
            )
    relative = torch.tensor(terms, dtype=torch.float64) / torch.tensor(times).double()[:, None]
    found = torch.linalg.lstsq(relative, torch.ones(len(times), 1).double()).solution
    left_over = (relative @ found - 1).abs()
    names = ("call", "pair", "ragged", "tail", "row", "back")
    constants = {name: round(float(value), 1) for name, value in zip(names, found, strict=True)}
    print(f"{dtype}: {constants}; error {left_over.mean():.3f}, at most {left_over.max():.3f}")


def quickest(run: Run) -> float:
    """Nanoseconds."""
    best = float("inf")
    run()
    for _ in range(12):
        start = time.perf_counter_ns()
        run()
        best = min(best, time.perf_counter_ns() - start)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtypes", default="fp32,bf16", help="weights and tokens are cast")
    parser.add_argument("--seconds", type=float, default=85, help="of measuring, per dtype")
    parser.add_argument("--no-flex", action="store_true", help="leave out what must be compiled")
    parser.add_argument("--note", default="", help="goes into the results")
    parser.add_argument(
        "--return-memory", action="store_true", help="leave the C library's allocator as it is"
    )
    parser.add_argument("--fit", action="store_true", help="measure the cost model's constants")
    options = parser.parse_args()
    device = checked_device(options.device)
    if not options.return_memory:
        keep_freed_memory()
    torch.set_num_threads(1 if options.fit else options.threads)
    with torch.inference_mode():
        if options.fit:
            for dtype in (torch.float32, torch.bfloat16):
                fit(dtype)
            return
        rows = []
        for dtype in options.dtypes.split(","):
            rows += measured_rows(options, dtype, device)
    command = " ".join(["python benchmarks/packing.py", *sys.argv[1:]])
    run = {"command": command, "batch": options.batch, "hardware": hardware(device), "rows": rows}
    save(run | {"counts": counts_of(options.batch), "note": options.note})


if __name__ == "__main__":
    main()
