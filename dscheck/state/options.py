"""The options of an optimizer's groups (learning rates and the like) as they are stored: by the names of parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dscheck.manifest.objects import encode_object
from dscheck.state.leaf import FlatState
from dscheck.state.objects import to_array
from dscheck.state.optimizers import bare_name, plain_options


def put_options(flat: FlatState, optimizer: str, groups: Iterable[tuple[Mapping[str, Any], Sequence[str]]]) -> None:
    """Store the options of each group, encoded once, under the names of its parameters.

    Groups that hold no parameter here are listed in their order: nothing else names their options.
    """
    options = flat.options[optimizer] = {}
    bare = []
    for group, names in groups:
        if names:
            options |= dict.fromkeys(names, encode_object(plain_options(group), f"{optimizer}.options", to_array))
        else:
            bare.append(encode_object(plain_options(group), bare_name(optimizer), to_array))
    if bare:
        flat.ours[bare_name(optimizer)] = bare
