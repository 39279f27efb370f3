"""Resolves requests' expert policies for one model, and reads and writes the calibration file. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moe_runtime.config.engine import EngineConfig
from moe_runtime.config.model import ModelConfig
from moe_runtime.system.files import field as read_field
from moe_runtime.system.files import parse_json, read_text, require_format
from moe_runtime.types.expert_policy import CLASSES, FULL, ExpertPolicy, PolicyRequest, parse_expert_policy

FORMAT = "moe_runtime.routing_calibration"
FORMAT_VERSION = 1
CALIBRATION_NAME = "routing_calibration.json"


@dataclass(frozen=True)
class PolicyCalibration:
    """The results of a model's calibration, which a file stores.

    Attributes:
        model: the model's name, for display.
        num_layers, num_experts, top_k: the model's number of sparse layers, experts, and experts per token.
        temperature: one per sparse layer for a sigmoid gate; None for a softmax gate.
        classes: the policy of each class except "full".
        measured: the measurements, one row per policy.
    """

    model: str
    num_layers: int
    num_experts: int
    top_k: int
    temperature: tuple[float, ...] | None
    classes: Mapping[str, ExpertPolicy]
    measured: Sequence[Mapping[str, Any]] = field(default=())

    def save(self, path: str | Path) -> None:
        """Write the calibration as JSON."""
        content = {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(self)}
        for policy in content["classes"].values():
            for name in [name for name, value in policy.items() if value is None]:
                del policy[name]
        Path(path).write_text(json.dumps(content, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> PolicyCalibration:
        """Read a file that `save` wrote.

        Raises:
            ValueError: no such file, another format, or a wrong field.
        """
        try:
            data = require_format(parse_json(read_text(Path(path))), FORMAT, FORMAT_VERSION)
            numbers = {name: read_field(data, name, int) for name in ("num_layers", "num_experts", "top_k")}
            temperature = read_field(data, "temperature", list, optional=True)
            classes = read_field(data, "classes", dict)
            for name in classes:
                if name not in CLASSES[1:]:
                    raise ValueError(f"classes: {name!r} is not allowed; it must be one of {list(CLASSES[1:])}")
            policies = {name: parse_expert_policy(policy) for name, policy in classes.items()}
            if not all(isinstance(policy, ExpertPolicy) for policy in policies.values()):
                raise ValueError("classes: each must be an object with top_k, top_p or threshold")
            return cls(
                model=read_field(data, "model", str),
                **numbers,
                temperature=None if temperature is None else ExpertPolicy(temperature=temperature).temperature,  # type: ignore[arg-type]
                classes=policies,  # type: ignore[arg-type]
                measured=read_field(data, "measured", list),
            )
        except OSError as error:
            raise ValueError(f"routing_calibration: {str(path)!r} cannot be read ({error.strerror})") from error
        except ValueError as error:
            raise ValueError(f"routing_calibration: {str(path)!r} is not allowed: {error}") from error

    def check(self, model: ModelConfig) -> None:
        """Raise ValueError unless the calibration is for a model of this shape."""
        found = (self.num_layers, self.num_experts, self.top_k)
        wanted = (len(model.moe_layers), model.moe.num_experts, model.moe.top_k)
        if found != wanted:
            raise ValueError(
                f"routing_calibration: is for {found[0]} sparse layers, {found[1]} experts and top_k {found[2]}; "
                f"the model has {wanted[0]}, {wanted[1]} and {wanted[2]}"
            )


class ExpertPolicies:
    """Turns the policy that a request asks for into the policy that the model's ranks apply.

    Args:
        model: the checkpoint.
        calibration: the model's calibration, or None.
        default: for requests that set no policy.

    Raises:
        ValueError: the calibration is for another model, or the default cannot be applied to this one.
    """

    def __init__(
        self, model: ModelConfig, calibration: PolicyCalibration | None = None, default: PolicyRequest = None
    ) -> None:
        if calibration is not None:
            calibration.check(model)
        self._model = model
        self._calibration = calibration
        self._default = self.resolve(FULL if default is None else default)

    def resolve(self, asked: PolicyRequest) -> ExpertPolicy | None:
        """The complete policy, checked for this model; None uses all experts that the gate chooses.

        Raises:
            ValueError: the policy cannot be applied to this model.
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
            return ExpertPolicy(policy.top_k, policy.top_p, policy.threshold, self._calibration.temperature)
        return policy

    def _of_class(self, name: str) -> ExpertPolicy:
        classes = {} if self._calibration is None else self._calibration.classes
        if name not in classes:
            raise ValueError(
                f"routing: {name!r} is not allowed for this model; it needs a file of `moe-runtime calibrate` "
                "as routing_calibration that has this class"
            )
        return classes[name]


def policies_of(config: EngineConfig, model: ModelConfig) -> ExpertPolicies:
    """The policies that a configuration allows.

    Raises:
        ValueError: the calibration cannot be read or is for another model, or the default policy does not fit.
    """
    path = config.routing_calibration
    return ExpertPolicies(model, None if path is None else PolicyCalibration.load(path), config.routing)
