"""Several processes that train one model: what they add up, and when."""

from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import Tensor, distributed

from rempart.core.model import Meter
from rempart.core.ranks import Ranks
from rempart.train.setup import Run, uses_gpu


@contextmanager
def connected(ranks: Ranks, device: str | None) -> Generator[None]:
    """The process group of a training in several processes."""
    if ranks.world == 1:
        yield
        return
    meeting = distributed.PrefixStore("train", ranks.store)  # pyright: ignore[reportPrivateImportUsage]
    distributed.init_process_group(
        "nccl" if uses_gpu(device) else "gloo", store=meeting, rank=ranks.number, world_size=ranks.world
    )
    try:
        yield
    finally:
        distributed.destroy_process_group()


@torch.no_grad()
def together(run: Run, parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add up gradients and parts over all processes, in one message."""
    parameters = [parameter for _, parameter in run.learnt() if parameter.grad is not None]
    gradients = [parameter.grad.flatten() for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([*gradients, *(part.reshape(1) for part in parts.values())])
    distributed.all_reduce(flat)
    summed = flat.split([parameter.numel() for parameter in parameters] + [1] * len(parts))
    for parameter, gradient in zip(parameters, summed, strict=False):
        parameter.grad = gradient.view(parameter.shape).to(memory_format=_layout(parameter))
    return dict(zip(parts, (part[0] for part in summed[len(parameters) :]), strict=True))


def _layout(parameter: Tensor) -> torch.memory_format:
    flat = parameter.ndim != 4 or parameter.is_contiguous()
    return torch.contiguous_format if flat else torch.channels_last


@torch.no_grad()
def share_statistics(run: Run) -> None:
    """Average what batch norms saw in each process."""
    if run.ranks.world > 1:
        for buffer in run.classifier.buffers():
            if buffer.is_floating_point():
                distributed.all_reduce(buffer)
                buffer /= run.ranks.world


def added_up(run: Run, meter: Meter) -> tuple[int, int]:
    """Images sent forward and backward by all processes."""
    if run.ranks.world == 1:
        return meter.queries, meter.gradients
    counts = torch.tensor([meter.queries, meter.gradients], device=run.fabric.device)
    distributed.all_reduce(counts)
    queries, gradients = counts.tolist()
    return queries, gradients
