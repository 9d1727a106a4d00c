"""Which network this is: its weights, the code it runs, and what it answers."""

import ast
import functools
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from rempart.core.foreign import names, own
from rempart.core.model import TORCHS_OWN, Classifier, frozen, placed
from rempart.core.repro import Draws, digest_state, seeded
from rempart.core.types import Images

_CLOSE = 1e-3
"""Two answers agree within this share of the largest: processors, threads and versions of torch round differently."""
_FACTORY = "_rempart_factory"


@dataclass(frozen=True, slots=True)
class Identity:
    """What tells a network from every other one, as reports, detectors and explanations record it.

    Attributes:
        weights: Digest of the state dict; it covers defences and their options.
        code: Digest of the user's own code that the network runs; empty: not recorded, as before there was such a
            digest.
        answers: Logits on fixed images, then sums over their gradients, scaled to the size of the logits; empty: not
            recorded, or two passes with the same seed differ.
    """

    weights: str
    code: str = ""
    answers: tuple[float, ...] = ()

    def difference(self, other: "Identity") -> str:
        """In what another network differs, in words; empty if it is the same as far as both records say."""
        if self.weights != other.weights:
            return f"other weights or defences (digest {other.weights})"
        if self.code and other.code and self.code != other.code:
            return f"the same weights run by other code (digest of the source {other.code} in place of {self.code})"
        if self.answers and other.answers and not agree(self.answers, other.answers):
            return (
                "the same weights, but other answers to the same images, or other gradients: code or settings changed"
            )
        return ""

    def certain(self, other: "Identity") -> bool:
        """Whether both are fully recorded and the same: what a verdict may be taken over by."""
        recorded = all(bool(known.code and known.answers) for known in (self, other))
        return recorded and not self.difference(other)


def identity(model: Classifier) -> Identity:
    """Identify a classifier by its weights, by its code and by its answers.

    The code is that of the user's own files: those that define classes or functions in the module tree, that of the
    factory, and whatever these import in turn. Comments, docstrings and formatting do not count. Installed packages,
    torch and Rempart do not count either, so that an upgrade which changes no answer changes no identity; the answers,
    and the names of no files, stand for them.

    Raises:
        ModelError: If the state holds something that has no value, such as a parameter on the meta device.
    """
    weights, x, settings = digest_state(model.state_dict()), _probes(model), _settings(model)
    said = answers(model, x)
    size = max(map(abs, said), default=0.0)
    slopes = _slopes(model, x[:-1]) if said else ()  # in a flat image, rounding decides between equal neighbours
    said = (*said, *(float(f"{slope * size:.6g}") for slope in slopes))
    steady = settings & _settings(model)  # without counters and what else a pass changes
    return Identity(weights, code_of([model], settings=steady), said)  # after the passes, which may import


def built_by(model: nn.Module, module: str) -> None:
    """Note which module's factory built a network: its code belongs to the network."""
    object.__setattr__(model, _FACTORY, module)


def agree(one: Iterable[float], other: Iterable[float]) -> bool:
    """Whether two rows of answers are those of one function, but for rounding."""
    a, b = np.array(tuple(one)), np.array(tuple(other))
    return a.shape == b.shape and bool(np.all(np.abs(a - b) <= _CLOSE * np.abs(a).max(initial=1e-30)))


def answers(model: Classifier, x: Images) -> tuple[float, ...]:
    """Logits with the random generators seeded; none where the network fails or cannot be replayed.

    What is not finite counts as 0.
    """
    return _replayed(model, placed(model, x), lambda x: model(x).detach())


def _slopes(model: Classifier, x: Images) -> tuple[float, ...]:
    """Two weighted sums over the gradient at each image, the largest of all scaled to 1; none without gradients."""

    def sums(x: Images) -> Tensor:
        x = x.requires_grad_()
        with torch.enable_grad():
            z = model(x).double()
            total = (z * torch.linspace(1, 2, z.shape[1], dtype=z.dtype, device=z.device)).sum()
            slopes = torch.autograd.grad(total, x)[0].double().flatten(1)
        turns = torch.cos(torch.arange(slopes.shape[1], dtype=slopes.dtype, device=slopes.device))
        found = slopes.nan_to_num(0, 0, 0) @ torch.stack([turns + 1, turns - 1], 1)
        return found / found.abs().max().clamp_min(torch.finfo(found.dtype).tiny)

    return _replayed(model, placed(model, x), sums)


def _replayed(model: Classifier, x: Images, ask: Callable[[Images], Tensor]) -> tuple[float, ...]:
    found: list[tuple[float, ...]] = []
    try:
        with frozen(model), torch.no_grad():
            for _ in range(2):
                with seeded(0, x.device):
                    told = ask(x.clone()).double().cpu().nan_to_num(0, 0, 0).flatten()
                found.append(tuple(float(f"{value:.6g}") for value in told.tolist()))
    except Exception:  # noqa: BLE001  what is wrong with the network is for the preflight to say
        return ()
    return found[0] if agree(*found) else ()


def _probes(model: Classifier) -> Images:
    """Eleven images in the box: noise, smooth noise, dark, bright, six of other brightness, and flat."""
    like = torch.zeros(11, *model.shape, dtype=torch.float64)
    unit = Draws(0, torch.arange(11), ("identity",)).uniform(like)
    axes = [torch.linspace(0, 1, side, dtype=torch.float64) for side in model.shape[1:]]
    waves = sum(torch.cos((3 + at) * grid) for at, grid in enumerate(torch.meshgrid(*axes, indexing="ij")))
    unit[1] = 0.5 + 0.3 * torch.as_tensor(waves) / max(1, len(axes)) + 0.1 * unit[1]
    unit[2], unit[3], unit[10] = 0.1 * unit[2], 1 - 0.1 * unit[3], 0.5
    for k, mean in enumerate((0.15, 0.25, 0.35, 0.65, 0.75, 0.85), 4):
        unit[k] = mean + 0.2 * (unit[k] - 0.5)
    return (model.low + (model.high - model.low) * unit).float()


def code_of(roots: Iterable[object], *, installed: bool = False, settings: Iterable[str] = ()) -> str:
    """16 hexadecimal digits over the user's own code that objects run, whatever its files are called.

    Args:
        roots: Modules of a network, functions, or classes.
        settings: What else belongs to the code.
        installed: Also count the files of installed packages that define the roots themselves, but not Rempart's.
    """
    walk = _Walk()
    for root in roots:
        walk.reach(root, foreign=installed)
    walk.texts.update(settings)
    return walk.digest()


class _Walk:
    """Follows objects to the code behind them, each object and file once."""

    def __init__(self) -> None:
        self.seen: set[int] = set()
        self.kept: list[object] = []  # so that no id is taken twice
        self.files: set[Path] = set()
        self.texts: set[str] = set()

    def digest(self) -> str:
        """Of all that was found, in no order."""
        return sha256("\n".join(sorted(self.texts)).encode()).hexdigest()[:16]

    def reach(self, value: object, *, foreign: bool = False) -> None:
        """Add the code of a function, a class, a module of Python, or an object and what it holds."""
        if id(value) in self.seen or isinstance(value, (str, bytes, int, float, complex, Tensor, type(None))):
            return
        self.seen.add(id(value))
        self.kept.append(value)
        if isinstance(value, (list, tuple, set, frozenset)):
            for part in value:
                self.reach(part)
        elif isinstance(value, dict):
            for part in value.values():
                self.reach(part)
        elif isinstance(value, functools.partial):
            self.texts.add(f"partial {[*_plain(enumerate(value.args)), *_plain(value.keywords.items())]}")
            self.reach((value.func, value.args, value.keywords))
        elif isinstance(value, types.MethodType):
            self.reach((value.__func__, value.__self__))
        elif isinstance(value, types.FunctionType):
            self._function(value, foreign)
        elif isinstance(value, types.ModuleType):
            self._module(value.__name__)
            if value.__name__ not in sys.modules and (file := getattr(value, "__file__", None)):  # loaded by hand
                self._file(Path(file))
        elif isinstance(value, type):
            self._class(value, foreign)
        else:
            self._object(value, foreign)

    def _object(self, value: object, foreign: bool) -> None:
        self.reach(type(value), foreign=foreign)
        if isinstance(value, fx.GraphModule):
            self.texts.add(_graph(value))
        if isinstance(value, torch.jit.ScriptModule):
            self.texts.add(str(getattr(value, "code", "")))
        if isinstance(value, nn.Module):  # hooks, functions as attributes, a forward of its own
            self.reach(list(vars(value).values()))
            if factory := vars(value).get(_FACTORY):
                self._module(factory)

    def _class(self, kind: type, foreign: bool) -> None:
        for base in kind.__mro__:
            if base.__module__.partition(".")[0] in _SHARED:
                continue
            self._module(base.__module__, foreign=foreign)
            for part in vars(base).values():  # also what was put there from elsewhere
                part = getattr(part, "__func__", getattr(part, "fget", part))
                if isinstance(part, types.FunctionType):
                    self.reach(part)

    def _function(self, function: types.FunctionType, foreign: bool) -> None:
        if function.__module__ and function.__module__.partition(".")[0] in _SHARED:
            return
        self.reach(getattr(function, "__wrapped__", None))
        self.reach([cell.cell_contents for cell in function.__closure__ or () if _filled(cell)])
        path, module = Path(function.__code__.co_filename), _file_of(function.__module__)
        if file := path if path.is_file() else module:
            self._file(file, foreign=foreign)
        if path.is_file() and own(path):  # what it calls by a name may come from elsewhere than its imports
            held = [function.__globals__.get(name) for name in names(function.__code__)]
            self.reach([value for value in held if isinstance(value, (types.ModuleType, types.FunctionType))])
        if path.is_file() or (module is not None and not (own(module) and str(path).startswith("<"))):
            return
        self.texts.add(_compiled(function.__code__))  # typed in, or made by exec: no file holds it
        for name in names(function.__code__):
            held = function.__globals__.get(name)
            self.reach(held)
            if isinstance(held, (str, bytes, bool, int, float, list, tuple)):
                self.texts.add(f"{name} = {held!r}"[:10_000])

    def _module(self, name: str, *, foreign: bool = False) -> None:
        if name.partition(".")[0] in _SHARED:
            return
        if file := _file_of(name):
            self._file(file, foreign=foreign)

    def _file(self, path: Path, *, foreign: bool = False) -> None:
        path = path.resolve()
        if path in self.files or not (own(path) or foreign):
            return
        self.files.add(path)
        try:
            content = path.read_bytes()
        except OSError:
            return
        if path.suffix != ".py":
            self.texts.add(sha256(content).hexdigest())
            return
        text, imports = _parsed(content)
        self.texts.add(text)
        root = _root(path)
        package = root / path.relative_to(root).parts[0]
        for level, name in imports:
            for file in _resolved(path, level, name):
                self._file(file, foreign=foreign and file.is_relative_to(package))


def _plain(named: Iterable[tuple[object, object]]) -> Iterator[str]:
    """Numbers, texts and short rows of them, with their names: settings that no file of code holds."""
    for name, value in named:
        parts = value if isinstance(value, (list, tuple)) and len(value) <= _SETTINGS else (value,)
        if all(isinstance(part, (bool, int, float, str)) for part in parts):
            yield f"{name} = {value!r}"


def _settings(model: nn.Module) -> set[str]:
    """The plain values that the modules of a network hold, where their classes are the user's own."""
    own_keys = {*TORCHS_OWN, _FACTORY}
    return {
        f"{path}.{text}"
        for path, module in model.named_modules()
        if type(module).__module__.partition(".")[0] not in _SHARED
        for text in _plain((key, value) for key, value in vars(module).items() if key not in own_keys)
    }


_SETTINGS = 64
_SHARED = {"torch", "rempart", "numpy", "builtins", "keras"}
"""Packages whose classes networks are made of: an upgrade that changes no answer changes no network."""


def _file_of(name: str | None) -> Path | None:
    """The file of an imported module, if it has one."""
    file = getattr(sys.modules.get(name or ""), "__file__", None)
    return None if file is None else Path(file)


def _root(path: Path) -> Path:
    """The folder that holds a module, or the package it is in."""
    root = path.parent
    while (root / "__init__.py").exists():
        root = root.parent
    return root


def _graph(module: fx.GraphModule) -> str:
    """The operations of a traced or exported network; the guards that torch adds to one are its own."""
    return "\n".join(
        f"{node.name} {node.op} {getattr(node.target, '__name__', node.target)} {node.args} {node.kwargs}"
        for node in module.graph.nodes
        if "_guards_fn" not in str(node.target)
    )


def _filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _compiled(code: types.CodeType) -> str:
    """A function that no file holds, by its compiled code."""
    constants = [
        _compiled(c) if isinstance(c, types.CodeType) else repr(sorted(map(repr, c)) if isinstance(c, frozenset) else c)
        for c in code.co_consts
    ]
    return f"{code.co_code.hex()} {code.co_names} {code.co_varnames} {constants}"


@functools.lru_cache(maxsize=512)
def _parsed(content: bytes) -> tuple[str, tuple[tuple[int, str], ...]]:
    """The digest of what a source file says, and the modules that it imports, each with its level."""
    try:
        tree = ast.parse(content)
    except (SyntaxError, ValueError):
        return sha256(content).hexdigest(), ()
    found: dict[tuple[int, str], None] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {(0, alias.name): None for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = f"{node.module}." if node.module else ""
            found |= {(node.level, f"{base}{alias.name}"): None for alias in node.names}
        elif isinstance(node, ast.Call) and (name := _called_for(node)):
            found[len(name) - len(name.lstrip(".")), name.lstrip(".")] = None
    return sha256(_said(tree).encode()).hexdigest(), tuple(found)


def _called_for(node: ast.Call) -> str:
    """The module that a call such as `importlib.import_module("name")` imports; empty where it imports none."""
    named = getattr(node.func, "attr", getattr(node.func, "id", "")) in ("import_module", "__import__")
    first = node.args[0] if named and node.args else None
    return first.value if isinstance(first, ast.Constant) and isinstance(first.value, str) else ""


def _said(node: object) -> str:
    """A syntax tree as text; empty fields, which versions of Python add, and docstrings are left out."""
    if isinstance(node, list):
        return "[" + ",".join(map(_said, _without_docstrings(node))) + "]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = [(name, value) for name, value in ast.iter_fields(node) if value is not None and value != []]
    return type(node).__name__ + "(" + ",".join(f"{name}={_said(value)}" for name, value in fields) + ")"


def _without_docstrings(nodes: list[Any]) -> list[Any]:
    return [
        node
        for node in nodes
        if not (
            isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        )
    ]


def _resolved(importer: Path, level: int, name: str) -> Iterator[Path]:
    """The files that an import reads, packages on the way included; nothing is imported to find out."""
    parts = [part for part in name.split(".") if part != "*"]
    package = importer.parent
    for _ in range(level - 1):
        package = package.parent
    places = [package] if level else [_root(importer), *map(Path, sys.path)]
    for count in range(len(parts) + 1 if level else len(parts), -1 if level else 0, -1):
        inner = Path(*parts[:count])
        for place in places:
            files = [(place / inner).with_suffix(".py")] if count else []
            if found := next((f for f in (*files, place / inner / "__init__.py") if f.is_file()), None):
                yield found
                break
        else:
            if not level and (file := _file_of(".".join(parts[:count]))):
                yield file
