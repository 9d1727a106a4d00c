"""What a `.keras` or HDF5 file may hold: a network of known layers, and plain arrays. The rest is refused unread.

Keras refuses pickled functions itself (safe mode). The closed lists here also keep away what is registered by name,
imported by path, read from other files or unpacked to disk.
"""

import json
import re
import zipfile
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

from rempart.core.errors import ModelError
from rempart.data.files import MAX_RATIO, MAX_TOTAL_BYTES
from rempart.models.formats import RECIPE
from rempart.models.formats.keras_2 import MODELS, modern

MAX_CONFIG_BYTES = 64 * 2**20
"""Uncompressed size of the description of a network."""

_CONFIG, _WEIGHTS = "config.json", "model.weights.h5"
_MEMBERS = {"metadata.json", _CONFIG, _WEIGHTS}


def read_keras(path: Path) -> tuple[dict[str, Any], int]:
    """The description of the network in a `.keras` archive, and how many numbers its weights are.

    Raises:
        ModelError: If the file is damaged or exceeds a limit, or holds anything but known layers and arrays.
    """
    with _refused(path):
        size = path.stat().st_size
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
            if odd := sorted({info.filename for info in infos} - _MEMBERS):
                raise _unsafe(path, f"{odd[0]!r}, an entry that no network of images needs")
            if len(infos) != len(_MEMBERS):
                raise _unsafe(path, f"{len(infos)} entries instead of {', '.join(sorted(_MEMBERS))}")
            _within(path, sum(info.file_size for info in infos), size)
            if any(info.compress_type != zipfile.ZIP_STORED for info in infos):  # inflated, one may be of any size
                raise _unsafe(path, "compressed entries, which Keras does not write")
            if archive.getinfo(_CONFIG).file_size > MAX_CONFIG_BYTES:
                raise _unsafe(path, f"more than {MAX_CONFIG_BYTES:,} bytes of {_CONFIG} (MAX_CONFIG_BYTES)")
            version = str(json.loads(archive.read("metadata.json")).get("keras_version", "3"))
            config = json.loads(archive.read(_CONFIG))
            config = _checked(modern(config, version) if version < "3" and _is_model(config) else config, path)
            count = _count_arrays(BytesIO(archive.read(_WEIGHTS)), path, size)
    return config, count


def read_hdf5(path: Path) -> tuple[dict[str, Any], int]:
    """The same of an HDF5 file of a whole model: `.h5`, `.hdf5`, and `.keras` of TensorFlow up to 2.12.

    Raises:
        ModelError: As `read_keras`.
    """
    import h5py

    with _refused(path):
        count = _count_arrays(path, path, path.stat().st_size)
        with h5py.File(path, "r") as file:
            text: Any = file.attrs.get("model_config")
            version: Any = file.attrs.get("keras_version", "1")
        if text is None:
            hint = "load them into the network they belong to, and save that: model.save(FILE)"
            raise ModelError("a file of a whole Keras model", got=f"{path.name}, with weights alone", hint=hint)
        if len(text) > MAX_CONFIG_BYTES:
            raise _unsafe(path, f"a description of {len(text):,} bytes (MAX_CONFIG_BYTES)")
        config, version = json.loads(text), version.decode() if isinstance(version, bytes) else str(version)
        if _is_model(config):
            config = modern(config, version)
        return _checked(config, path), count


def check_config(config: Any) -> None:
    """Refuse a description of a network that names anything but layers of the closed list.

    Raises:
        ModelError: If it does, with the name.
    """
    for found in _objects(config):
        name, module, registered = found["class_name"], found.get("module"), found.get("registered_name")
        known = str(name) in _KNOWN or _OPERATIONS.fullmatch(str(module))
        if not known or registered not in (None, name) or not (module is None or _MODULES.fullmatch(str(module))):
            raise ModelError(
                "a Keras network of layers that run no code of the file's",
                got=f"{_told(registered or name)} of {_told(module)}",
                hint=f"where you trust its author, {RECIPE}",
            )


def _checked(config: Any, path: Path) -> dict[str, Any]:
    if not _is_model(config):
        came = _told(config.get("class_name")) if isinstance(config, dict) else type(config).__name__
        raise ModelError("a Sequential or Functional Keras model", got=f"{came} in {path.name}", hint=RECIPE)
    config = _without_compilation(config)
    check_config(config)
    return config


def _is_model(config: Any) -> TypeGuard[dict[str, Any]]:
    return isinstance(config, dict) and config.get("class_name") in MODELS


def _without_compilation(value: Any) -> Any:
    """Leave out losses, metrics and optimisers, which only Keras's own training needs."""
    if isinstance(value, dict):
        return {key: _without_compilation(inner) for key, inner in value.items() if key != "compile_config"}
    return [_without_compilation(inner) for inner in value] if isinstance(value, list) else value


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    """Every part of a description that Keras would make an object of."""
    if isinstance(value, dict):
        if "class_name" in value:
            yield value
        for inner in value.values():
            yield from _objects(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _objects(inner)


def _count_arrays(source: Path | BinaryIO, path: Path, size: int) -> int:
    """How many numbers the arrays of an HDF5 file hold; links to other places and other types are refused."""
    import h5py

    arrays: list[Any] = []

    def visit(name: str, item: Any) -> None:
        if isinstance(item, h5py.Group):
            links = [item.get(key, getlink=True) for key in item]
            if not all(isinstance(link, h5py.HardLink) for link in links):
                raise _unsafe(path, f"a link to another place in {name or 'its root'}")
        elif not isinstance(item, h5py.Dataset) or item.is_virtual or item.external or item.dtype.kind not in "biuf":
            raise _unsafe(path, f"{name}, which is no plain array")
        else:
            arrays.append(item)

    with h5py.File(source, "r") as file:
        visit("", file)
        file.visititems(visit)
        _within(path, sum(array.nbytes for array in arrays), size)
        return sum(array.size for array in arrays)


def _within(path: Path, size: int, packed: int) -> None:
    if size > MAX_TOTAL_BYTES or size > MAX_RATIO * packed:
        raise _unsafe(path, f"{size:,} bytes unpacked (MAX_TOTAL_BYTES, MAX_RATIO)")


def _unsafe(path: Path, came: str) -> ModelError:
    return ModelError("a Keras file of layers and weights alone", got=f"{path.name} with {came}", hint="save it again")


def _told(value: object) -> str:
    return repr(value)[:80]


@contextmanager
def _refused(path: Path) -> Generator[None]:
    """What a damaged file makes the readers raise, as one error."""
    try:
        yield
    except (
        *(OSError, ValueError, LookupError, TypeError, AttributeError, EOFError, RuntimeError, NotImplementedError),
        *(zipfile.BadZipFile, RecursionError, MemoryError, OverflowError),
    ) as error:
        if isinstance(error, ModelError):
            raise
        line = str(error).split("\n")[0][:200]
        raise ModelError(
            "a Keras file that is whole", got=f"{path.name} ({type(error).__name__}: {line})", hint="fetch it again"
        ) from None


_LAYER_NAMES = """
    InputLayer Dense EinsumDense Activation Identity
    Conv1D Conv2D Conv3D Conv1DTranspose Conv2DTranspose Conv3DTranspose
    SeparableConv1D SeparableConv2D DepthwiseConv1D DepthwiseConv2D
    MaxPooling1D MaxPooling2D MaxPooling3D AveragePooling1D AveragePooling2D AveragePooling3D
    GlobalMaxPooling1D GlobalMaxPooling2D GlobalMaxPooling3D
    GlobalAveragePooling1D GlobalAveragePooling2D GlobalAveragePooling3D
    AdaptiveMaxPooling1D AdaptiveMaxPooling2D AdaptiveMaxPooling3D
    AdaptiveAveragePooling1D AdaptiveAveragePooling2D AdaptiveAveragePooling3D
    BatchNormalization LayerNormalization GroupNormalization RMSNormalization UnitNormalization
    Dropout SpatialDropout1D SpatialDropout2D SpatialDropout3D GaussianDropout AlphaDropout GaussianNoise
    ActivityRegularization Flatten Reshape Permute RepeatVector
    ZeroPadding1D ZeroPadding2D ZeroPadding3D Cropping1D Cropping2D Cropping3D
    UpSampling1D UpSampling2D UpSampling3D
    Add Subtract Multiply Average Maximum Minimum Concatenate Dot
    ReLU LeakyReLU PReLU ELU Softmax
    LSTM GRU SimpleRNN Bidirectional TimeDistributed
    Attention AdditiveAttention MultiHeadAttention GroupedQueryAttention
    Rescaling Normalization CenterCrop Resizing
    RandomFlip RandomRotation RandomTranslation RandomZoom RandomContrast RandomBrightness RandomCrop
"""
_PART_NAMES = """
    GlorotUniform GlorotNormal HeNormal HeUniform LecunNormal LecunUniform VarianceScaling
    RandomNormal RandomUniform TruncatedNormal Zeros Ones Constant Orthogonal OrthogonalInitializer
    L1 L2 L1L2 OrthogonalRegularizer MaxNorm MinMaxNorm NonNeg UnitNorm
    DTypePolicy SeedGenerator __keras_tensor__ __numpy__
"""
_KNOWN = MODELS | frozenset(_LAYER_NAMES.split()) | frozenset(_PART_NAMES.split())
_OPERATIONS = re.compile(r"keras\.src\.ops\.(numpy|nn|math|image)")
_MODULES = re.compile(
    r"keras(\.(layers|models|initializers|regularizers|constraints|random|dtype_policies))?"
    r"|builtins|keras\.src\.(layers|models|ops|engine|initializers)\.[a-z0-9_.]+"
)
