"""Randomness keyed by sample, digests, and the record of the environment."""

import hashlib
import io
import os
import platform
import random
import sys
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal
from zlib import crc32

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from rempart.core.errors import ModelError
from rempart.core.types import Images, Mask

_GOLDEN = -7046029254386353131  # 2**64 / golden ratio as a signed 64-bit integer: the splitmix64 increment
_MIX = ((30, -4658895280553007687), (27, -7723592293110705685))


@dataclass(frozen=True, slots=True)
class Draws:
    """Random numbers that depend on (seed, sample index, stage) and on nothing else.

    A stateless, counter-based generator (splitmix64; Steele, Lea, Flood 2014). A sample gets the same numbers whatever
    its batch mates, the batch size, the order, the device and the number of processes; the global random state is
    neither read nor written.

    Attributes:
        seed: The seed of the run, any integer; it counts modulo 2**64.
        index: The samples' numbers in their data set, int64, shape (n).
        stage: Names what the numbers are for, for example `("pgd", "0")`.
    """

    seed: int
    index: Tensor
    stage: tuple[str, ...] = ()

    def at(self, *stage: object) -> "Draws":
        """The draws of a sub-stage, for example of one restart."""
        return replace(self, stage=(*self.stage, *(str(s) for s in stage)))

    def select(self, mask: Mask | Tensor) -> "Draws":
        """The draws of a part of the samples."""
        return replace(self, index=self.index[mask])

    def uniform(self, like: Images, low: float = 0.0, high: float = 1.0) -> Images:
        """Numbers uniform between low and high (rounding to the dtype may give high), shaped and placed as `like`."""
        return (self._unit(like) * (high - low) + low).to(like.dtype)

    def normal(self, like: Images) -> Images:
        """Standard normal numbers in the shape, dtype and device of `like`."""
        return torch.special.ndtri(self._unit(like)).to(like.dtype)

    def sign(self, like: Images) -> Images:
        """Numbers -1 or +1 with equal chance."""
        return torch.where(self._unit(like) < 0.5, -1.0, 1.0).to(like.dtype)

    def _unit(self, like: Tensor) -> Tensor:
        """Float64 numbers inside (0, 1), one for each element of `like`."""
        index = self.index.to(like.device, non_blocking=like.device.type != "cpu")  # a GPU goes on
        key = _mix(torch.full_like(index, _wrap(self.seed + crc32("/".join(self.stage).encode()) * _GOLDEN % 2**62)))
        start = _mix(key + index * _GOLDEN)
        counter = torch.arange(1, like[0].numel() + 1, device=like.device) if len(like) else index
        bits = _mix(start[:, None] + counter * _GOLDEN)
        return ((_shift(bits, 12).double() + 0.5) / 2**52).view(like.shape)


def _wrap(value: int) -> int:
    """The integer modulo 2**64, as an int64."""
    return (value + 2**63) % 2**64 - 2**63


def _shift(value: Tensor, places: int) -> Tensor:
    """Logical right shift of int64 (the `>>` of torch keeps the sign)."""
    return (value >> places) & ((1 << (64 - places)) - 1)


def _mix(value: Tensor) -> Tensor:
    """The finaliser of splitmix64; int64 products wrap, as they must."""
    for places, factor in _MIX:
        value = (value ^ _shift(value, places)) * factor
    return value ^ _shift(value, 31)


@contextmanager
def seeded(seed: int, device: torch.device) -> Generator[None]:
    """The global random numbers of torch, numpy and Python from this seed, for models that draw some.

    All three are as before afterwards. What a model draws from elsewhere (a generator of its own, the operating system,
    the clock, another process) is not replayed.
    """
    with own_random_state([device] if device.type == "cuda" else []):
        reseed(seed)
        yield


@contextmanager
def own_random_state(gpus: Sequence[torch.device] = ()) -> Generator[None]:
    """Put the global random states of torch, numpy and Python back afterwards."""
    python, arrays = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=gpus):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)


def reseed(seed: int) -> None:
    """Start the global random numbers of torch, numpy and Python from this seed."""
    torch.manual_seed(seed % 2**63)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def random_state(device: torch.device) -> bytes:
    """The global random states of torch, numpy and Python: what is drawn from one of them changes them."""
    states = [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]
    _, keys, *rest = np.random.get_state()
    told = [state.numpy().tobytes() for state in states] + [np.asarray(keys).tobytes(), repr(rest).encode()]
    return hashlib.sha256(b"".join([*told, repr(random.getstate()).encode()])).digest()


def digest_arrays(arrays: Iterable[np.ndarray]) -> str:
    """SHA-256 over dtype, shape and bytes of each array, 16 hexadecimal digits."""
    state = hashlib.sha256()
    for array in arrays:
        state.update(f"{array.dtype.str}{array.shape}".encode())
        state.update(np.ascontiguousarray(array).tobytes())
    return state.hexdigest()[:16]


def digest_state(state: Mapping[str, Any]) -> str:
    """Digest of a state dict: names, types, shapes and values, in sorted order.

    Entries that are no dense tensors count by their values: sparse, quantised and nested tensors by their parts,
    packed weights and the extra state of modules by what they hold.

    Raises:
        ModelError: If an entry has no value (a lazy parameter, the meta device), or is an object of unknown contents.
    """
    try:
        parts = [part for name in sorted(state) for part in _dense(name, state[name])]
    except RecursionError:
        raise ModelError("a state dict of values", got="objects that hold each other", hint=_EXTRA) from None
    heads = (f"{name} {tensor.dtype} {tuple(tensor.shape)}" for name, tensor in parts)
    names = hashlib.sha256("\n".join(heads).encode()).hexdigest()
    values = (tensor.detach().cpu().resolve_conj().resolve_neg().reshape(-1) for _, tensor in parts)
    arrays = digest_arrays(value.view(torch.uint8).numpy() for value in values)  # as bytes: numpy has no bfloat16
    return hashlib.sha256((names + arrays).encode()).hexdigest()[:16]


def _dense(name: str, value: object) -> Iterator[tuple[str, Tensor]]:
    """An entry of a state dict as named dense tensors; one that is a dense tensor, as it is."""
    if isinstance(value, Tensor):
        yield from _dense_parts(name, value)
    elif isinstance(value, dict):
        held = {f"{type(key).__name__} {key}": part for key, part in value.items()}
        yield from _dense(f"{name} dict of {len(held)}", None)
        for key in sorted(held):
            yield from _dense(f"{name}/{key}", held[key])
    elif isinstance(value, (list, tuple)):
        yield from _dense(f"{name} {type(value).__name__} of {len(value)}", None)
        for at, part in enumerate(value):
            yield from _dense(f"{name}/{at}", part)
    elif isinstance(value, (set, frozenset)):
        yield from _dense(name, sorted(map(repr, value)))
    elif isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        native = np.ascontiguousarray(value, value.dtype.newbyteorder("="))
        yield f"{name} array {value.dtype.name} {value.shape}", torch.from_numpy(native.reshape(-1).view(np.uint8))
    elif isinstance(value, (bytes, bytearray, io.BytesIO)):
        content = value.getvalue() if isinstance(value, io.BytesIO) else bytes(value)
        yield f"{name} bytes", torch.tensor(list(content), dtype=torch.uint8)
    elif isinstance(value, _PLAIN):
        yield from _dense(f"{name} {type(value).__name__}", repr(value).encode())
    else:
        yield from _dense(f"{name} {type(value).__qualname__}", _contents(name, value))


_PLAIN = (type(None), bool, int, float, complex, str, Enum, np.generic)
_PLAIN += (torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size)  # pyright: ignore


def without_numbers(tensor: Tensor) -> Literal["lazy", "meta"] | None:
    """Why a weight holds no numbers yet; None where it does. A subclass may say `meta` and keep them elsewhere."""
    if is_lazy(tensor):
        return "lazy"
    return "meta" if tensor.is_meta and type(tensor) in (Tensor, nn.Parameter) else None


def _dense_parts(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    missing = without_numbers(tensor)
    if missing == "lazy":
        hint = "run one batch of images through the network before it is returned, or give its layers their sizes"
        raise ModelError("weights of known shape", got=f"{name}, which is not initialised yet", hint=hint)
    if missing == "meta":
        hint = "load its weights before it is returned: to_empty(), then load_state_dict(), or assign=True"
        raise ModelError("weights with values", got=f"{name}, which is on the meta device and has none", hint=hint)
    tensor = tensor.detach()
    if tensor.is_nested:
        yield from _dense(f"{name} nested", list(tensor.unbind()))
    elif tensor.is_quantized:
        if tensor.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
            steps = tensor.q_scale(), tensor.q_zero_point()
        else:
            steps = tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points(), tensor.q_per_channel_axis()
        yield from _dense(f"{name} {tensor.dtype}", (tensor.int_repr(), steps))
    elif tensor.layout == torch.sparse_coo:
        whole = tensor.coalesce()
        yield from _dense(f"{name} sparse {tuple(tensor.shape)}", (whole.indices(), whole.values()))
    elif tensor.layout != torch.strided:
        yield from _dense(name, tensor.to_sparse_coo())
    elif flatten := getattr(tensor, "__tensor_flatten__", None):  # a subclass made of other tensors, as of torchao
        inner, about = flatten()
        held = {key: getattr(tensor, key) for key in inner}
        yield from _dense(f"{name} {type(tensor).__name__} {tuple(tensor.shape)}", (held, about))
    else:
        yield name, tensor


def _contents(name: str, value: object) -> object:
    """What an object holds: packed weights by what they unpack to, others by their attributes."""
    if isinstance(value, torch.ScriptObject):
        with suppress(AttributeError, RuntimeError):
            return value.__getstate__()
    elif hasattr(value, "__dict__") and not callable(value):
        return vars(value)
    raise ModelError("a state dict of values", got=f"{name}, a {type(value).__name__}", hint=_EXTRA)


_EXTRA = "let get_extra_state return tensors, numbers, text, or lists and dicts of them"


_PACKAGES = ("rempart", "torch", "numpy", "scipy", "scikit-learn", "pillow", "safetensors", "pydantic", "matplotlib")


def environment() -> dict[str, str]:
    """What a figure depends on besides its spec: versions, processor, threads. No host or user names."""
    record = {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    record["processor"] = _processor()
    record["cores"] = str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    record["threads"] = str(torch.get_num_threads())
    record["accelerator"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    for package in _PACKAGES:
        try:
            record[package] = version(package)
        except PackageNotFoundError:
            record[package] = "not installed"
    return record


def _processor() -> str:
    if sys.platform == "linux":
        try:
            with open("/proc/cpuinfo", encoding="utf-8") as lines:
                return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
        except OSError:
            pass
    return platform.processor() or platform.machine()
