"""Draws against splitmix64 written a second time in plain integers, and digests that notice every change."""

import getpass
import hashlib
import io
import itertools
import platform
import struct
from typing import Any
from zlib import crc32

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kstest

from rempart.core.errors import ModelError
from rempart.core.repro import Draws, digest_arrays, digest_state, environment

pytestmark = pytest.mark.usefixtures("untouched_rng")
M = 2**64 - 1


def finalise(z: int) -> int:
    """The output function of splitmix64 as published (Steele, Lea, Flood 2014; Vigna's C code), in Python integers."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & M
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & M
    return z ^ (z >> 31)


def stream(state: int, n: int) -> list[int]:
    """The first n outputs of the generator: add the golden gamma, finalise."""
    outputs = []
    for _ in range(n):
        state = (state + 0x9E3779B97F4A7C15) & M
        outputs.append(finalise(state))
    return outputs


def unit(seed: int, index: int, stage: tuple[str, ...], n: int) -> list[float]:
    """A sample's numbers in (0, 1): its stream is seeded by (seed, stage) and then by the sample's number."""
    name = crc32("/".join(stage).encode())
    key = finalise((seed + (name * -((~0x9E3779B97F4A7C15 & M) + 1)) % 2**62) & M)
    start = finalise((key + index * 0x9E3779B97F4A7C15) & M)
    return [((bits >> 12) + 0.5) / 2**52 for bits in stream(start, n)]


def test_the_second_implementation_is_splitmix64():
    """Known answers of the published generator for the state 1234567."""
    assert stream(1234567, 3) == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@pytest.mark.parametrize("seed", [0, 1, -1, 2**31, 2**62, 2**63 - 1, -(2**63), 2**63, 2**64 - 1, 2**70 + 5])
@pytest.mark.parametrize("stage", [(), ("pgd", "0"), ("é",)])
def test_draws_are_splitmix64(seed, stage):
    like = torch.zeros(3, 1, 2, 4, dtype=torch.float64)
    index = torch.tensor([0, 7, 2**40])
    drawn = Draws(seed, index, stage).uniform(like)
    for row, number in zip(drawn, index.tolist(), strict=True):
        assert row.flatten().tolist() == unit(seed, number, stage, 8)


@given(
    order=st.permutations(range(9)),
    cut=st.integers(0, 9),
    seed=st.integers(),
    draw=st.sampled_from(["uniform", "normal", "sign"]),
)
def test_a_sample_draws_the_same_in_any_batch(order, cut, seed, draw):
    """Bit for bit, whatever the order, the batch size and the batch mates; empty batches included."""
    like = torch.zeros(9, 2, 3)
    whole = getattr(Draws(seed, torch.arange(9), ("s",)), draw)(like)
    for part in (order[:cut], order[cut:]):
        index = torch.tensor(part, dtype=torch.long)
        assert torch.equal(getattr(Draws(seed, index, ("s",)), draw)(like[: len(part)]), whole[index])


def test_at_and_select_are_other_spellings():
    like = torch.zeros(4, 1, 5)
    draws = Draws(3, torch.arange(10, 14))
    assert draws.at("pgd", 0).at("radius").stage == ("pgd", "0", "radius")
    mask = torch.tensor([True, False, False, True])
    assert torch.equal(draws.select(mask).normal(like[:2]), draws.normal(like)[mask])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shapes_types_and_ranges(dtype):
    like = torch.zeros(40, 3, 16, 16, dtype=dtype)
    draws = Draws(0, torch.arange(40))
    for drawn in (draws.uniform(like, -2, 5), draws.normal(like), draws.sign(like)):
        assert drawn.shape == like.shape and drawn.dtype == dtype and bool(drawn.isfinite().all())
    assert draws.uniform(like, -2, 5).min() >= -2 and draws.uniform(like, -2, 5).max() <= 5
    assert set(draws.sign(like).unique().tolist()) == {-1.0, 1.0}


def test_distributions():
    like = torch.zeros(50, 1, 40, 40, dtype=torch.float64)
    draws = Draws(11, torch.arange(50))
    assert kstest(draws.uniform(like, 2, 6).flatten().numpy(), "uniform", (2, 4)).pvalue > 1e-3
    assert kstest(draws.normal(like).flatten().numpy(), "norm").pvalue > 1e-3
    assert abs(draws.sign(like).mean()) < 4 / np.sqrt(like.numel())


def test_stages_samples_and_seeds_are_independent():
    """No two streams of a family are correlated beyond 5 standard errors, nor shifted against each other."""
    like = torch.zeros(6, 1, 100, 100, dtype=torch.float64)
    family = [
        Draws(seed, torch.tensor([0, 1, 2, 3, 10**6, -1]), stage).normal(like).flatten(1)
        for seed, stage in itertools.product((0, 1, 2**62), ((), ("a",), ("a", "0"), ("a", "1")))
    ]
    rows = torch.cat(family)
    for lag in (0, 1, 7):
        correlation = rows @ rows.roll(lag, 1).T / rows.shape[1]
        if lag == 0:
            correlation.fill_diagonal_(0)
        assert correlation.abs().max() < 5 / 100


def test_digest_of_arrays_is_stable_and_sensitive():
    base = [np.arange(6, dtype=np.float32).reshape(2, 3), np.array([1, 2])]
    content = b"<f4(2, 3)" + struct.pack("<6f", *range(6)) + b"<i8(2,)" + struct.pack("<2q", 1, 2)
    assert digest_arrays(base) == digest_arrays([a.copy() for a in base]) == hashlib.sha256(content).hexdigest()[:16]
    assert digest_arrays([base[0][:, ::-1][:, ::-1], base[1]]) == digest_arrays(base), "strides are not content"
    changed = base[0].copy()
    changed[1, 2] = np.nextafter(changed[1, 2], np.float32(9))
    others = [
        [changed, base[1]],
        [base[0].reshape(3, 2), base[1]],
        [base[0].view(np.int32), base[1]],
        [base[0].astype(">f4"), base[1]],
        base[::-1],
        base[:1],
        [],
    ]
    assert len({digest_arrays(arrays) for arrays in [base, *others]}) == 8


def test_digest_of_a_state_is_stable_and_sensitive():
    state = {"w": torch.arange(6.0).view(2, 3), "steps": torch.tensor(3), "half": torch.ones(2, dtype=torch.bfloat16)}
    base = digest_state(state)
    assert base == digest_state(dict(reversed(state.items()))), "the order of the names is not content"
    assert base == digest_state(state | {"w": torch.arange(6.0).view(3, 2).T.contiguous().T.reshape(2, 3)})
    assert base == digest_state(state | {"w": state["w"].T.contiguous().T.requires_grad_()})
    others = [
        state | {"w": state["w"].view(3, 2)},
        state | {"w": state["w"].int()},
        state | {"w": state["w"].view(torch.int32)},
        state | {"steps": torch.tensor(4)},
        state | {"half": torch.tensor([1.0, 1.0078125], dtype=torch.bfloat16)},
        {("v" if name == "w" else name): value for name, value in state.items()},
        {"w": state["w"], "steps": state["steps"]},
        {},
    ]
    digests = {digest_state(other) for other in others} | {base}
    assert len(digests) == 9 and all(len(digest) == 16 for digest in digests)


def test_environment_names_versions_but_nobody():
    record = environment()
    assert record["torch"] == torch.__version__ and record["numpy"] == np.__version__
    assert record["python"] == platform.python_version() and record["threads"] == str(torch.get_num_threads())
    assert int(record["cores"]) >= 1 and record["processor"]
    assert all(isinstance(value, str) for value in record.values())
    words = {word for value in record.values() for word in value.split()}
    assert platform.node() not in words and getpass.getuser() not in words


def _quantised(values: list[float], scale: float = 0.5) -> torch.Tensor:
    return torch.quantize_per_tensor(torch.tensor(values), scale, 0, torch.qint8)


def _channelwise(scales: list[float]) -> torch.Tensor:
    steps = torch.tensor(scales)
    return torch.quantize_per_channel(torch.ones(2, 2), steps, torch.zeros(2).int(), 0, torch.qint8)


class _Extra:
    def __init__(self, size: int) -> None:
        self.size, self.table = size, {"a": torch.ones(size)}


def _packed(rows: int) -> Any:
    """Weights as dynamic quantisation packs them: an object of torch's, no tensor."""
    return torch.ops.quantized.linear_prepack(_quantised([1.0] * 4 * rows).view(rows, 4), None)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "odd",
    [
        lambda k: _quantised([1.0, float(k)]),
        lambda k: _quantised([0.0, 0.0], scale=float(k)),  # the same stored integers
        lambda k: _channelwise([1.0, 0.5 * k]),
        lambda k: (_quantised([float(k)]), None),
        lambda k: torch.tensor([0.0, k]).to_sparse(),
        lambda k: torch.tensor([[0.0, k]]).to_sparse_csr(),
        lambda k: torch.tensor([1 + 1j * k]),
        lambda k: torch.tensor([1 + 1j * k]).conj(),
        lambda k: torch.tensor([1.0, k]).to(torch.float8_e4m3fn),
        lambda k: torch.zeros(0, k),
        lambda k: torch.nested.nested_tensor([torch.ones(2), torch.ones(k)]),
        lambda k: {"step": k, "mode": None, "names": ["a", ("b", 2.0)], "of": torch.float16},
        lambda k: io.BytesIO(bytes([k])),
        lambda k: np.arange(k),
        lambda k: _Extra(k),
        lambda k: {str(k), "b", "c"},
        lambda k: _packed(k),
    ],
)
def test_a_state_of_more_than_dense_tensors_counts_by_its_values(odd: Any) -> None:
    dense = {"w": torch.ones(2)}
    first, again, other = (digest_state(dense | {"odd": odd(k)}) for k in (2, 2, 3))
    assert first == again != other and first != digest_state(dense)


def test_a_sparse_tensor_counts_by_its_values_and_not_by_how_they_are_stored() -> None:
    twice = torch.sparse_coo_tensor([[1, 1]], [1.0, 2.0], (2,), check_invariants=True)
    once = torch.sparse_coo_tensor([[1]], [3.0], (2,), check_invariants=True)
    assert digest_state({"w": twice}) == digest_state({"w": once})


def test_a_state_without_values_is_refused_with_what_to_do() -> None:
    cycle: dict[str, Any] = {}
    cycle["itself"] = cycle
    for state, words in (
        (torch.nn.LazyLinear(3).state_dict(), "bias, which is not initialised yet; run one batch"),
        ({"w": torch.empty(2, device="meta")}, "w, which is on the meta device"),
        ({"hook": digest_arrays}, "hook, a function"),
        ({"extra": cycle}, "objects that hold each other"),
    ):
        with pytest.raises(ModelError, match=words):
            digest_state(state)
