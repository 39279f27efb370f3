"""How many of its chosen experts a token uses: the policies of requests, and the file that calibrates them. No torch.

Shape suffixes: L sparse layers, K experts per token.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_runtime.config.engine import EngineConfig, ModelConfig

FULL = "full"
CLASSES = (FULL, "balanced", "fast")
FORMAT = "moe_runtime.routing_calibration"
FORMAT_VERSION = 1
CALIBRATION_NAME = "routing_calibration.json"
DEMO_CALIBRATION = Path(__file__).parent / "demo" / CALIBRATION_NAME
ALL_MASS = 2.0  # no sum of probabilities reaches it
ALLOWED = f'one of {list(CLASSES)}, "NAME=VALUE" or an object with top_k, top_p, threshold or temperature'


@dataclass(frozen=True)
class RoutingPolicy:
    """Fewer experts for the tokens of a request. A value is for all sparse layers, or a list with one for each.

    Of the experts that the gate chose, best first, a token keeps at most `top_k`, at most the fewest whose
    probabilities sum to `top_p`, and of these none below `threshold` times the most probable; always at least one. What
    is left is weighted as the model's gate weights what it chose, normalised if that does so.

    Probabilities are those of a softmax gate over all experts; a sigmoid gate's are the softmax of the router's logits
    divided by `temperature`, which a calibration finds.

    Attributes:
        top_k: at most the model's own; None keeps that.
        top_p: in (0, 1]; None keeps all (arXiv 2403.07652).
        threshold: in [0, 1]; None or 0 keeps all (arXiv 2402.14800).
        temperature: above 0; None for softmax gates.

    Raises:
        ValueError: a value is out of range.
    """

    top_k: int | Sequence[int] | None = None
    top_p: float | Sequence[float] | None = None
    threshold: float | Sequence[float] | None = None
    temperature: float | Sequence[float] | None = None

    def __post_init__(self) -> None:
        if self.top_k is not None:
            object.__setattr__(self, "top_k", _checked("top_k", self.top_k, int, 1, None, "an integer of at least 1"))
        for name, low, high, allowed in (
            ("top_p", 1e-9, 1.0, "a number above 0 and at most 1"),
            ("threshold", 0.0, 1.0, "a number from 0 to 1"),
            ("temperature", 1e-30, 1e30, "a number above 0"),
        ):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, _checked(name, value, float, low, high, allowed))

    @property
    def drops(self) -> bool:
        """Whether it asks for anything."""
        return (self.top_k, self.top_p, self.threshold) != (None, None, None)

    def rows(self, num_layers: int, top_k: int) -> list[list[float]]:
        """`[L, 4]`: most experts, mass, threshold and 1 / temperature of each layer, as gates take them."""
        columns = [
            _per_layer(value, neutral, num_layers)
            for value, neutral in (
                (self.top_k, top_k),
                (self.top_p, ALL_MASS),
                (self.threshold, 0.0),
                (self.temperature, 1.0),
            )
        ]
        return [[k, mass, threshold, 1 / temperature] for k, mass, threshold, temperature in zip(*columns, strict=True)]


Routing = str | RoutingPolicy | None
"""A class of `CLASSES`, a policy, or None for the server's default."""


def parse_routing(value: object) -> Routing:
    """A policy or the name of a class, from what users write: also `"top_p=0.8,top_k=6"`, JSON, or a mapping.

    Raises:
        ValueError: it is something else.
    """
    if value is None or isinstance(value, RoutingPolicy) or value in CLASSES:
        return value
    if isinstance(value, str):
        value = _from_text(value)
    known = [entry.name for entry in fields(RoutingPolicy)]
    if not isinstance(value, Mapping) or not value or not all(name in known for name in value):
        raise ValueError(f"routing: {value!r} is not allowed; it must be {ALLOWED}")
    return RoutingPolicy(**value)


def _from_text(text: str) -> object:
    if text.startswith("{"):
        try:
            return json.loads(text)
        except json.JSONDecodeError:
            return text
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(sign and name.strip() for name, sign, _ in pairs):
        return text
    values: dict[str, object] = {}
    for name, _, number in pairs:
        try:
            values[name.strip()] = int(number) if number.strip().isdigit() else float(number)
        except ValueError:
            return text
    return values


def _checked(name: str, value: object, kind: type, low: float, high: float | None, allowed: str) -> Any:
    """A number, or a tuple with one for each layer."""
    many = isinstance(value, (list, tuple))
    numbers: Any = value if many else [value]
    for number in numbers:
        is_number = isinstance(number, (int, kind)) and not isinstance(number, bool)
        if not is_number or not low <= number or (high is not None and number > high):
            raise ValueError(f"routing.{name}: {value!r} is not allowed; it must be {allowed}, or a list of them")
    if many and not numbers:
        raise ValueError(f"routing.{name}: [] is not allowed; it must be {allowed}, or one for each sparse layer")
    return tuple(map(kind, numbers)) if many else kind(value)


def _per_layer(value: float | Sequence[float] | None, neutral: float, num_layers: int) -> list[float]:
    if isinstance(value, Sequence):
        return list(value)
    return [neutral if value is None else value] * num_layers


@dataclass(frozen=True)
class RoutingCalibration:
    """What calibration found for a model, and the file that keeps it.

    Attributes:
        model: name shown.
        num_layers, num_experts, top_k: of the model it is for: sparse layers, experts, experts per token.
        temperature: of each sparse layer, for a sigmoid gate; None for a softmax gate.
        classes: the policy of each class but "full".
        measured: what was measured, a row for each policy.
    """

    model: str
    num_layers: int
    num_experts: int
    top_k: int
    temperature: tuple[float, ...] | None
    classes: Mapping[str, RoutingPolicy]
    measured: Sequence[Mapping[str, Any]] = field(default=())

    def save(self, path: str | Path) -> None:
        """Write it as JSON."""
        content = {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(self)}
        for policy in content["classes"].values():
            for name in [name for name, value in policy.items() if value is None]:
                del policy[name]
        Path(path).write_text(json.dumps(content, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> RoutingCalibration:
        """Read what `save` wrote.

        Raises:
            ValueError: no such file, another format, or a wrong field.
        """
        from moe_runtime.system.files import field as read_field
        from moe_runtime.system.files import parse_json, read_text, require_format

        try:
            data = require_format(parse_json(read_text(Path(path))), FORMAT, FORMAT_VERSION)
            numbers = {name: read_field(data, name, int) for name in ("num_layers", "num_experts", "top_k")}
            temperature = read_field(data, "temperature", list, optional=True)
            classes = read_field(data, "classes", dict)
            for name in classes:
                if name not in CLASSES[1:]:
                    raise ValueError(f"classes: {name!r} is not allowed; it must be one of {list(CLASSES[1:])}")
            policies = {name: parse_routing(policy) for name, policy in classes.items()}
            if not all(isinstance(policy, RoutingPolicy) for policy in policies.values()):
                raise ValueError("classes: each must be an object with top_k, top_p or threshold")
            return cls(
                model=read_field(data, "model", str),
                **numbers,
                temperature=None if temperature is None else RoutingPolicy(temperature=temperature).temperature,  # type: ignore[arg-type]
                classes=policies,  # type: ignore[arg-type]
                measured=read_field(data, "measured", list),
            )
        except OSError as error:
            raise ValueError(f"routing_calibration: {str(path)!r} cannot be read ({error.strerror})") from error
        except ValueError as error:
            raise ValueError(f"routing_calibration: {str(path)!r} is not allowed: {error}") from error

    def check(self, model: ModelConfig) -> None:
        """Raise ValueError unless it is for a model of this shape."""
        found = (self.num_layers, self.num_experts, self.top_k)
        wanted = (len(model.moe_layers), model.moe.num_experts, model.moe.top_k)
        if found != wanted:
            raise ValueError(
                f"routing_calibration: is for {found[0]} sparse layers, {found[1]} experts and top_k {found[2]}; "
                f"the model has {wanted[0]}, {wanted[1]} and {wanted[2]}"
            )


class RoutingPolicies:
    """The policies of one model: what a request asks for becomes what its ranks apply.

    Args:
        model: the checkpoint.
        calibration: of this model, or None.
        default: for requests that ask for nothing.

    Raises:
        ValueError: the calibration is for another model, or the default cannot be applied to this one.
    """

    def __init__(
        self, model: ModelConfig, calibration: RoutingCalibration | None = None, default: Routing = None
    ) -> None:
        if calibration is not None:
            calibration.check(model)
        self._model = model
        self._calibration = calibration
        self._default = self.resolve(FULL if default is None else default)

    def resolve(self, asked: Routing) -> RoutingPolicy | None:
        """The policy, complete and checked for this model; None uses all experts that the gate chooses.

        Raises:
            ValueError: it cannot be applied to this model.
        """
        if asked is None:
            return self._default
        if asked == FULL:
            return None
        policy = self._of_class(asked) if isinstance(asked, str) else asked
        if not policy.drops:
            return None
        moe, num_layers = self._model.moe, len(self._model.moe_layers)
        for name, value in vars(policy).items():
            if isinstance(value, tuple) and len(value) != num_layers:
                raise ValueError(
                    f"routing.{name}: {len(value)} values are not allowed; there must be one, "
                    f"or one for each of the {num_layers} sparse layers"
                )
        most = policy.top_k if isinstance(policy.top_k, Sequence) else [policy.top_k or 1]
        if max(most) > moe.top_k:
            raise ValueError(f"routing.top_k: {max(most)} is not allowed; the model uses {moe.top_k} experts per token")
        if moe.scoring == "softmax":
            if policy.temperature is not None:
                raise ValueError("routing.temperature: is not allowed with this model's softmax gate")
            return policy
        if policy.temperature is None and (policy.top_p, policy.threshold) != (None, None):
            if self._calibration is None or self._calibration.temperature is None:
                raise ValueError(
                    "routing: top_p and threshold need a temperature for this model's sigmoid gate; "
                    "give one, or a file of `moe-runtime calibrate` as routing_calibration"
                )
            return RoutingPolicy(policy.top_k, policy.top_p, policy.threshold, self._calibration.temperature)
        return policy

    def _of_class(self, name: str) -> RoutingPolicy:
        classes = {} if self._calibration is None else self._calibration.classes
        if name not in classes:
            raise ValueError(
                f"routing: {name!r} is not allowed for this model; it needs a file of `moe-runtime calibrate` "
                "as routing_calibration that has this class"
            )
        return classes[name]


def load_policies(config: EngineConfig, model: ModelConfig) -> RoutingPolicies:
    """The policies that a configuration allows.

    Raises:
        ValueError: the calibration cannot be read or is for another model, or the default policy does not fit.
    """
    path = config.routing_calibration
    return RoutingPolicies(model, None if path is None else RoutingCalibration.load(path), config.routing)
