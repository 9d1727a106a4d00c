"""A second device without a second device: tensors that say `meta` and compute on the CPU.

While `Elsewhere` is active, `.to("meta")` gives tensors that hold their values, and an operation that mixes them with
tensors of the CPU fails as it would on a GPU. What makes the host wait for a GPU is counted by name.
"""

from collections import Counter

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

_INDEXING = ("aten.index.Tensor", "aten.index_put_.default", "aten.index_put.default", "aten._index_put_impl_.default")
_READING = ("aten._local_scalar_dense.default", "aten.nonzero.default", "aten.equal.default")
_META = torch.device("meta")


class Elsewhere(TorchDispatchMode):
    """The device.

    Attributes:
        waits: How often the host would have waited for it, by the operation it waited for.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = str(func), dict(kwargs or {})
        flat = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
        there = [leaf for leaf in flat if isinstance(leaf, _Remote)]
        asked = kwargs.get("device")
        crossing = name in ("aten._to_copy.default", "aten.copy_.default")
        self._check(name, args, there, [] if crossing else flat)
        if asked is not None:
            kwargs["device"] = torch.device("cpu")
        result = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))
        if there and (name in _READING or (name == "aten.index.Tensor" and _by_mask(args[1]))):
            self.waits[name] += 1
        if there and name in _INDEXING:
            self.waits["to the device"] += any(type(index) is Tensor for index in args[1])
        if name == "aten._to_copy.default" and asked is not None and (torch.device(asked) == _META) != bool(there):
            self.waits["to the device" if not there else "from the device"] += not kwargs.get("non_blocking")
        schema = func._schema
        if schema.is_mutable and len(schema.returns) == 1 and schema.returns[0].alias_info is not None:
            return next(arg for arg, told in zip(args, schema.arguments, strict=False) if told.alias_info is not None)
        far = torch.device(asked) == _META if asked is not None else bool(there)
        return tree_map(_Remote, result) if far else result

    @staticmethod
    def _check(name, args, there, flat) -> None:
        here = [leaf for leaf in flat if not isinstance(leaf, _Remote) and leaf.ndim > 0]
        if name in _INDEXING and isinstance(args[0], _Remote):
            here = [leaf for leaf in args[2:3] if not isinstance(leaf, _Remote) and leaf.ndim > 0]
        assert not (there and here), f"{name} of tensors on two devices: {[tuple(leaf.shape) for leaf in flat]}"


class _Remote(Tensor):
    """A tensor on the device; its values are in `held`."""

    @staticmethod
    def __new__(cls, held):
        if not isinstance(held, Tensor) or isinstance(held, _Remote):
            return held
        shape, strides, start = held.shape, held.stride(), held.storage_offset()
        remote = Tensor._make_wrapper_subclass(
            cls, shape, strides=strides, storage_offset=start, dtype=held.dtype, device=_META
        )
        remote.held = held.detach()
        return remote

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} outside of the device")


def _inner(leaf):
    return leaf.held if isinstance(leaf, _Remote) else leaf


def _by_mask(indices) -> bool:
    return any(isinstance(index, Tensor) and index.dtype == torch.bool for index in indices)
