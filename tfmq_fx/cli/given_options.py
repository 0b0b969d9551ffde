"""Which options a user gave, and a refusal of those that change nothing beside the others."""

from __future__ import annotations

from collections.abc import Mapping

import typer

__all__ = ["is_given", "refuse_without_effect"]


def is_given(context: typer.Context, name: str) -> bool:
    """Whether the user gave this option, by the name of its parameter."""
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def refuse_without_effect(context: typer.Context, needs: Mapping[str, str | None]) -> None:
    """Refuse an option that would be ignored without a word.

    Args:
        context: The command's.
        needs: For each option that matters only beside others, by the name of its parameter: what it needs and does not
            have here, or None where it has an effect.

    Raises:
        typer.BadParameter: One was given that has none.
    """
    for name, missing in needs.items():
        if missing is not None and is_given(context, name):
            msg = f"it has no effect without {missing}: add that, or leave it out"
            raise typer.BadParameter(msg, ctx=context, param_hint=f"--{name.replace('_', '-')}")
