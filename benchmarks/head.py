"""Memory and time of the language-model head, forward and backward, against logits that are made whole.

    python -m benchmarks.head [--quick]

Baselines: `naive` is log_softmax of all logits and autograd's backward, `checkpointed` the same under
torch.utils.checkpoint, `matmuls` the bare chain of the four products of the head's tiles and nothing else: its floor.
All give the log-probs and the gradients of hidden states and weight, in fp32, on one thread.

Every measurement is a fresh process: inputs are touched first, the kernel's high-water mark of resident memory is reset
(`/proc/self/clear_refs`) and read after (`VmHWM`), and the bytes of inputs and outputs are subtracted. A baseline's
peak may come before its outputs exist; subtracting them all the same is in the baseline's favour. Seconds are processor
seconds of that process, so other load on the machine counts little. Methods take turns; medians are reported. A
baseline that would need more than 16 GiB by its formula is not run. Linux only.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections import defaultdict
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.rows import Row
from megatron_papo.logprobs import vocab_parallel_head
from megatron_papo.logprobs.tiling import blocks, tile_of

VOCAB = 151_936
"""The vocabulary of Qwen2.5-VL."""
HIDDEN, QUICK_HIDDEN = 512, 128
"""The hidden size of a small model, so that the whole run takes minutes. At the 2048 and 3584 of Qwen2.5-VL the
products take a larger share, and the ratio of seconds to naive tends to the 4/3 of their number; the memory of logits
is the same."""
POINTS = (*((tokens, HIDDEN) for tokens in (512, 1024, 2048, 4096, 8192, 16384)), (1024, 2048))
"""Response tokens and hidden size; the last is the width of Qwen2.5-VL-3B."""
QUICK_POINTS = ((512, QUICK_HIDDEN),)
LIMIT_BYTES = 16 * 2**30
"""A baseline that needs more, or more than nine tenths of what the machine has free, is not run."""
MOST_TOKENS = {"matmuls": 4096}
"""The largest number of tokens at which a baseline is measured, where its time is a straight line."""
MIB = 2**20


def _logprobs(hidden_RH: Tensor, weight_VH: Tensor, targets_R: Tensor) -> Tensor:
    logits_RV = hidden_RH @ weight_VH.T
    return F.log_softmax(logits_RV, -1).gather(1, targets_R[:, None])[:, 0]


def _checkpointed(hidden_RH: Tensor, weight_VH: Tensor, targets_R: Tensor) -> Tensor:
    return checkpoint(_logprobs, hidden_RH, weight_VH, targets_R, use_reentrant=False)


def _ours(hidden_RH: Tensor, weight_VH: Tensor, targets_R: Tensor) -> Tensor:
    return vocab_parallel_head(
        hidden_RH, None, weight_VH, targets_R, group=None, vocab_start=0, vocab_size=VOCAB, banned_ids=(),
        temperature=1.0, entropy=False, kl=False,
    ).logprobs_R  # fmt: skip


def _matmuls(hidden_RH: Tensor, weight_VH: Tensor, targets_R: Tensor) -> Tensor:
    """The four products, tile by tile, of whatever numbers: what no head that keeps no logits can do without."""
    rows_most, words_most = tile_of(hidden_RH.device, len(hidden_RH))
    hidden_RH.grad, weight_VH.grad = torch.zeros_like(hidden_RH), torch.empty_like(weight_VH)
    memory = torch.empty(rows_most * words_most)
    with torch.no_grad():
        for backward in (False, True):
            for words in blocks(VOCAB, words_most):
                block_WH = weight_VH[words]
                for rows in blocks(len(hidden_RH), rows_most):
                    hidden_CH = hidden_RH[rows]
                    tile_CW = memory[: len(hidden_CH) * len(block_WH)].view(len(hidden_CH), -1)
                    torch.mm(hidden_CH, block_WH.T, out=tile_CW)
                    if backward:
                        hidden_RH.grad[rows].addmm_(tile_CW, block_WH)
                        weight_VH.grad[words].addmm_(tile_CW.T, hidden_CH, beta=int(rows.start > 0))
    return torch.zeros(len(hidden_RH))


METHODS: dict[str, Callable[..., Tensor]] = {
    "ours": _ours, "naive": _logprobs, "checkpointed": _checkpointed, "matmuls": _matmuls,
}  # fmt: skip


def _predicted_bytes(method: str, num_tokens: int, hidden: int) -> int:
    """Inputs and outputs, and of a baseline three matrices of the logits' size: log-probs, their gradient, logits'."""
    shared = 8 * hidden * (num_tokens + VOCAB)
    return shared + (3 * 4 * num_tokens * VOCAB if method in ("naive", "checkpointed") else 0)


def _fits(method: str, num_tokens: int, hidden: int) -> bool:
    with open("/proc/meminfo") as lines:
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    most = LIMIT_BYTES if method == "ours" else min(LIMIT_BYTES, available * 0.9)
    enough = num_tokens <= MOST_TOKENS.get(method, num_tokens)
    return enough and _predicted_bytes(method, num_tokens, hidden) <= most


def _resident_bytes(key: str) -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(key))


def _measure(method: str, num_tokens: int, hidden: int) -> tuple[float, float]:
    """Peak bytes beyond inputs and outputs, and processor seconds, of one forward and backward in this process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    hidden_RH = torch.randn(num_tokens, hidden, requires_grad=True)
    weight_VH = torch.empty(VOCAB, hidden).normal_(std=hidden**-0.5).requires_grad_()
    targets_R = torch.randint(VOCAB, (num_tokens,))
    (torch.randn(64, 64) @ torch.randn(64, 64)).exp_()  # the libraries' own start
    with open("/proc/self/clear_refs", "w") as clear:
        clear.write("5")
    before = _resident_bytes("VmRSS")
    start = time.process_time()
    logprobs_R = METHODS[method](hidden_RH, weight_VH, targets_R)
    if logprobs_R.requires_grad:
        logprobs_R.sum().backward()
    seconds = time.process_time() - start
    outputs = [logprobs_R, hidden_RH.grad, weight_VH.grad]
    assert all(torch.isfinite(one.sum()) for one in outputs if one is not None)
    return _resident_bytes("VmHWM") - before - sum(one.nbytes for one in outputs if one is not None), seconds


def _in_a_fresh_process(*args: Any) -> tuple[float, float]:
    with multiprocessing.get_context("forkserver").Pool(1) as pool:
        return pool.apply(_measure, args)


def run(quick: bool) -> list[Row]:
    """Two rows for each point and baseline, peak and seconds; the peak of ours against that at the fewest tokens too.
    `quick`: 512 tokens of a small hidden size, once."""
    multiprocessing.set_forkserver_preload(["torch", "megatron_papo.logprobs"])
    console = Console(stderr=True)
    rows, least = [], 0.0
    for num_tokens, hidden in QUICK_POINTS if quick else POINTS:
        what = f"head, {num_tokens} tokens, hidden {hidden}"
        methods = [name for name in METHODS if _fits(name, num_tokens, hidden)]
        results = defaultdict(list)
        for _ in range(1 if quick else max(1, min(3, 4096 * 512 // (num_tokens * hidden)))):
            for name in methods:
                peak, seconds = _in_a_fresh_process(name, num_tokens, hidden)
                results[name].append((peak, seconds))
                console.print(f"[dim]{what}: {name}: {peak / MIB:.0f} MiB, {seconds:.2f} s[/dim]")
        least = least or median(peak for peak, _ in results["ours"])
        rows += _rows(what, results, least)
    return rows


def _rows(what: str, results: dict[str, list[tuple[float, float]]], least: float) -> list[Row]:
    peaks, seconds = ({name: [run[which] for run in runs] for name, runs in results.items()} for which in (0, 1))
    rows = [_row(f"{what}: peak / its own at the fewest tokens", peaks["ours"], [least] * len(peaks["ours"]), MIB)]
    for name in results:
        if name in ("naive", "checkpointed"):
            rows.append(_row(f"{what}: peak / {name}", peaks["ours"], peaks[name], MIB))
        if name != "ours":
            rows.append(_row(f"{what}: seconds / {name}", seconds["ours"], seconds[name], 1))
    return rows


def _row(name: str, ours: list[float], others: list[float], unit: int) -> Row:
    ratio = median(mine / other for mine, other in zip(ours, others))
    return Row(name, median(ours) / unit, median(others) / unit, ratio, "MiB" if unit == MIB else "s")


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory and time of the language-model head.")
    parser.add_argument("--quick", action="store_true", help="512 tokens of a small hidden size, once")
    for row in run(parser.parse_args().quick):
        print(f"{row.name:70} {row.value:10.2f} {row.baseline:10.2f} {row.unit:4} {row.ratio:7.4f}", flush=True)


if __name__ == "__main__":
    main()
