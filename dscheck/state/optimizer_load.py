"""An optimizer put back by name, without load_state_dict, which would cast its state to the parameters' dtype."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from dscheck.errors import StateError, StateMismatchError
from dscheck.manifest.objects import decode_object
from dscheck.state.memory import References, fresh_state, target_of
from dscheck.state.objects import decode, from_array, on_device, tensors_in
from dscheck.state.optimizers import IMPLEMENTATION, NamedOptimizer, Parameter, bare_name, own_options, state_cut
from dscheck.state.overlap import is_fillable
from dscheck.state.placements import Cut
from dscheck.state.saved import Match, shown
from dscheck.state.tensors import is_wrapper, local_of
from dscheck.state.wrappers import match_described, refuse_saved_wrapper, take_apart

_ABSENT = object()
_STEP_FIRST = "let the optimizer step once, with zero gradients, so that it makes its state, and load then"


@dataclass(slots=True)
class OptimizerLoad:
    """What one optimizer gets from a checkpoint: values to install, live ones to remove, options for its groups."""

    optimizer: NamedOptimizer
    _installed: list[tuple[Any, str | None, Any]] = field(default_factory=list)
    _removed: list[tuple[Any, str]] = field(default_factory=list)
    _options: list[tuple[dict[str, Any], dict[str, Any]]] = field(default_factory=list)

    def prepare(self, match: Match, references: References) -> None:
        """Match state and options by parameter name; tensors get memory, live where it exists. Changes nothing live."""
        stored, whole = _stored_state(self.optimizer, match)
        complete = match.wants(self.optimizer.name)
        for group, members in self.optimizer.groups:
            on_device = bool(group.get("capturable") or group.get("fused"))
            for parameter in members:
                saved_name = self._saved_name(parameter, match)
                if saved_name is not None:
                    self._prepare_state(parameter, stored.get(saved_name, {}), match, references, complete, on_device)
                if complete:
                    self._note_absent_options(parameter, match)
            if complete:
                self._prepare_options(group, members, match)
        if complete:
            self._prepare_whole(whole, match, references)
            self._prepare_bare(match)

    def finish(self) -> None:
        """Install what was prepared; its tensors are filled by now."""
        state = self.optimizer.inner.state
        for owner, key in self._removed:
            state[owner].pop(key, None)
            if not state[owner]:
                del state[owner]
        for parameter, entry, value in self._installed:
            if entry is None:
                state[parameter] = value
            else:
                state.setdefault(parameter, {})[entry] = value
        for group, options in self._options:
            _apply_options(group, options)

    def _saved_name(self, parameter: Parameter, match: Match) -> str | None:
        known = match.saved.options.get(self.optimizer.name, {})
        return next((name for name in parameter.names if name in known or self._is_conflicted(name, match)), None)

    def _is_conflicted(self, parameter: str, match: Match) -> bool:
        return f"{self.optimizer.name}.{parameter}" in match.saved.conflicted

    def _note_absent_options(self, parameter: Parameter, match: Match) -> None:
        name = self._saved_name(parameter, match)
        if name is None:
            match.missing.append(f"{self.optimizer.name}.{parameter.names[0]}")
        elif self._is_conflicted(name, match):
            match.conflicts.append(f"{self.optimizer.name}.{name}")

    def _prepare_state(
        self,
        parameter: Parameter,
        stored: dict[str, str],
        match: Match,
        references: References,
        complete: bool,
        on_device: bool,
    ) -> None:
        live = self.optimizer.inner.state.get(parameter.tensor, {})
        for key, name in stored.items():
            if not match.wants(name):
                continue
            current = live.get(key, _ABSENT)
            if isinstance(current, torch.Tensor) and is_wrapper(local_of(current)):
                _fill_wrapper(name, current, state_cut(current, parameter, name), match)
                continue
            refuse_saved_wrapper(name, match, "absent" if current is _ABSENT else "plain", _STEP_FIRST)
            if name not in match.saved.tensors:
                value = self._decoded(name, parameter, current, match, references)
            elif isinstance(current, torch.Tensor) and is_fillable(local_of(current)):
                match.fill(target_of(name, current, state_cut(current, parameter, name)))
                continue
            else:
                value = fresh_state(name, key, match.saved.tensors[name], parameter, on_device=on_device)
                match.fill(target_of(name, value, state_cut(value, parameter, name)))
            self._installed.append((parameter.tensor, key, value))
        if complete:
            self._removed += [(parameter.tensor, key) for key in live if key not in stored]

    def _decoded(self, name: str, parameter: Parameter, current: Any, match: Match, references: References) -> Any:
        live = {} if current is _ABSENT else tensors_in(current, name)
        device = parameter.tensor.device
        value = decode(match.object(name), name, references.finder(live, device, parameter))
        return on_device(value, name, device)

    def _prepare_whole(self, stored: dict[str, str], match: Match, references: References) -> None:
        """State under a text instead of a parameter, as some optimizers keep it."""
        whole: Mapping[Any, Any] = self.optimizer.inner.state
        for key, name in stored.items():
            live = tensors_in(whole.get(key), name)
            self._installed.append((key, None, decode(match.object(name), name, references.finder(live))))

    def _prepare_options(self, group: dict[str, Any], members: list[Parameter], match: Match) -> None:
        known = match.saved.options.get(self.optimizer.name, {})
        found = [(name, known[name]) for parameter in members for name in parameter.names if name in known]
        for name, options in found:
            match.used.add(f"{self.optimizer.name}.{name}")
            if options is not found[0][1] and _semantic(options) != _semantic(found[0][1]):
                raise StateMismatchError(
                    f"optimizer '{self.optimizer.name}': '{found[0][0]}' and '{name}' are in one group here and were "
                    f"saved with different options ({_differing(options, found[0][1])}): give them groups of their own",
                    names=[found[0][0], name],
                )
        if found:
            self._refuse_another_class(group, *found[0])
            self._install_options(group, found[0][1])

    def _prepare_bare(self, match: Match) -> None:
        """Options of groups without parameters, by position where there are as many as were saved.

        Else those stay as they are: on another number of ranks other groups may be without parameters here.
        """
        name = bare_name(self.optimizer.name)
        match.used.add(name)
        saved = match.saved.ours.get(name, [])
        if len(saved) == len(self.optimizer.bare) and name not in match.saved.conflicted:
            for group, options in zip(self.optimizer.bare, saved, strict=True):
                self._install_options(group, options)

    def _install_options(self, group: dict[str, Any], options: dict[str, Any]) -> None:
        path = f"{self.optimizer.name}.options"
        self._options.append((group, decode_object(_semantic(options), path, from_array)))

    def _refuse_another_class(self, group: dict[str, Any], parameter: str, options: dict[str, Any]) -> None:
        """A version of torch may add options; only another class both lacks some and has others."""
        here, saved = own_options(group), own_options(options)
        if here - saved and saved - here:
            raise StateMismatchError(
                f"optimizer '{self.optimizer.name}' is of another class than the saved one: for '{parameter}' the "
                f"{type(self.optimizer.inner).__name__} here has the options {shown(sorted(here))}, and saved were "
                f"{shown(sorted(saved))}: make the optimizer that was saved, or load the rest with only=[...]",
                names=[f"{self.optimizer.name}.{parameter}"],
            )


def _stored_state(optimizer: NamedOptimizer, match: Match) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """Saved state of an optimizer: parameter → key → full name, and key → full name for that of the whole optimizer."""
    prefix = f"{optimizer.name}.state."
    found: dict[str, dict[str, str]] = {}
    whole: dict[str, str] = {}
    for name in match.saved.under.get(optimizer.name.partition(".")[0], ()):
        if name.startswith(prefix):
            key, dot, parameter = name[len(prefix) :].partition(".")
            (found.setdefault(parameter, {}) if dot else whole)[key] = name
    return found, whole


def _fill_wrapper(name: str, live: torch.Tensor, cut: Cut, match: Match) -> None:
    """A wrapper in an optimizer's state gets the bytes of its inner tensors, in place."""
    apart = take_apart(live, cut, name)
    match_described([name], apart.described, match)
    for attribute, (inner, inner_cut) in apart.inner.items():
        inside = f"{name}.{attribute}"
        if inside not in match.saved.tensors:
            match.missing.append(inside)
        elif not is_fillable(local_of(inner)):
            raise StateError(f"'{inside}' is expanded or a lazy view: it cannot be loaded in place", path=inside)
        else:
            match.fill(target_of(inside, inner, inner_cut))


def _semantic(options: Any) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key not in IMPLEMENTATION}


def _differing(one: Any, other: Any) -> str:
    keys = [key for key in _semantic(one) if one.get(key) != other.get(key)] or ["their names"]
    return ", ".join(keys)


def _apply_options(group: dict[str, Any], options: dict[str, Any]) -> None:
    """Live tensors (a learning rate on the device, in a captured graph) keep their memory, numbers stay numbers."""
    for key, value in options.items():
        live = group.get(key)
        if isinstance(live, torch.Tensor):
            live.detach().copy_(torch.as_tensor(value))
        elif isinstance(value, torch.Tensor) and isinstance(live, int | float) and value.numel() == 1:
            group[key] = value.item()
        else:
            group[key] = value
