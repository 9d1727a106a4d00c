"""A registry of functions whose keyword-only signature is their schema."""

import difflib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from rempart.core.errors import RempartError, SpecError
from rempart.core.foreign import contained, undisturbed

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")


@dataclass(frozen=True)
class Entry(Generic[F, T]):
    """A registered function, its traits and the pydantic model of its parameters."""

    name: str
    function: F
    traits: T
    params: type[BaseModel]

    @property
    def summary(self) -> str:
        """The first line of the docstring."""
        return (inspect.getdoc(self.function) or "").split("\n")[0]

    def parse(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Validate options, strings included, and fill in the defaults.

        Raises:
            SpecError: If a key is unknown or a value is out of range; all faults in one message.
        """
        if not isinstance(options, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
            hint = f"such as {{{next(iter(self.params.model_fields), 'name')!r}: ...}}"
            raise SpecError(f"options of {self.name!r} by name", got=type(options).__name__, hint=hint)
        given = {key: None if value == "none" else value for key, value in options.items()}
        try:
            return dict(self.params.model_validate(given))
        except ValidationError as error:
            raise SpecError(
                f"options of {self.name!r} to be valid",
                got="; ".join(self._explain(e["loc"][0], e["msg"], e["input"], e["type"]) for e in error.errors()),
                hint=f"it takes {', '.join(self.params.model_fields) or 'no options'}",
            ) from None

    def _explain(self, key: Any, message: str, value: Any, kind: str) -> str:
        if kind == "extra_forbidden":
            return f"unknown option {key!r}{suggestion(str(key), self.params.model_fields)}"
        if kind == "missing":
            return f"no {key}"
        return f"{key}={value!r} ({message[:1].lower()}{message[1:]})"


class Registry(Generic[F, T]):
    """Functions by name. A name can be taken once; plug-ins join through an entry-point group."""

    def __init__(self, kind: str, *, reserved: frozenset[str] = frozenset(), group: str = "") -> None:
        self.kind, self.reserved, self.group = kind, reserved, group
        self._entries: dict[str, Entry[F, T]] = {}
        self._plugins_loaded = not group

    def register(self, name: str, traits: T) -> Callable[[F], F]:
        """Register the decorated function under `name`."""

        def decorate(function: F) -> F:
            if name in self._entries:
                raise SpecError(f"a free {self.kind} name", got=repr(name), hint="choose another name")
            self._entries[name] = Entry(name, function, traits, self._schema(name, function))
            return function

        return decorate

    def __getitem__(self, name: str) -> Entry[F, T]:
        self._load_plugins()
        try:
            return self._entries[name]
        except KeyError:
            raise SpecError(
                f"one {self.kind} out of {', '.join(self._entries)}",
                got=repr(name),
                hint=suggestion(name, self._entries).strip(" ()"),
            ) from None

    def __iter__(self) -> Iterator[Entry[F, T]]:
        self._load_plugins()
        return iter(self._entries.values())

    def __contains__(self, name: object) -> bool:
        self._load_plugins()
        return name in self._entries

    def __len__(self) -> int:
        self._load_plugins()
        return len(self._entries)

    def _schema(self, name: str, function: F) -> type[BaseModel]:
        fields: dict[str, Any] = {
            key: (parameter.annotation, ... if parameter.default is parameter.empty else parameter.default)
            for key, parameter in inspect.signature(function, eval_str=True).parameters.items()
            if parameter.kind is parameter.KEYWORD_ONLY and key not in self.reserved
        }
        return create_model(
            name.replace("-", " ").title().replace(" ", ""),
            __config__=ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False),
            **fields,
        )

    def _load_plugins(self) -> None:
        if not self._plugins_loaded:
            self._plugins_loaded = True  # before loading: a plug-in may look into the registry it joins
            for point in entry_points(group=self.group):
                plugin = f"the plug-in {point.value} of the group {self.group} to be imported"
                try:
                    with contained(plugin, SpecError), undisturbed():
                        point.load()
                except RempartError:
                    raise
                except Exception as error:
                    came, hint = f"{type(error).__name__}: {error}", "mend or uninstall the package it comes from"
                    raise SpecError(plugin, got=came, hint=hint) from error


def suggestion(name: str, known: Any) -> str:
    """Return ` (did you mean 'x'?)` for the nearest known name, or nothing."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else ""


def bounds_of(field: Any) -> str:
    """Describe the type and the bounds of a pydantic field in a few words, for tables and help."""
    kind = field.annotation
    inner = [getattr(a, "__origin__", a) for a in get_args(kind)]  # a number in bounds counts as its plain type
    nested = [m for a in get_args(kind) for m in getattr(a, "__metadata__", ())]
    choices = [repr(a) if isinstance(a, str) else getattr(a, "__name__", "") for a in inner]
    words = " | ".join("none" if c == "NoneType" else c for c in choices) if choices else getattr(kind, "__name__", "")
    bounds = [*field.metadata, *nested]
    limits = [f"{op} {getattr(m, attr)}" for m in bounds for op, attr in _LIMITS if hasattr(m, attr)]
    return ", ".join([words, *limits])


_LIMITS = ((">=", "ge"), (">", "gt"), ("<=", "le"), ("<", "lt"))
