"""NamedBlock recipes, worked out for a model's stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from transfer.config.train_settings import Freeze, LearningRate, PhaseSettings, Recipe, Until
from transfer.errors import ConfigError

WITHOUT_PRETRAINED = frozenset({"scratch", "random_features"})
"""Begin from random weights."""
BACKBONE_SHARE = 0.1
"""The backbone learns at this share of the head's rate: what was pretrained should move less than what is new."""
STAGE_DECAY = 1 / 2.6
"""From stage to stage downward (Howard and Ruder 2018, section 3.2)."""


def expand(recipe: Recipe, lr: LearningRate, stages: Sequence[str]) -> tuple[PhaseSettings, ...]:
    """Return the phases of a recipe.

    Args:
        recipe: Its name and the epochs over all phases.
        lr: The optimizer's learning rate; given by group, it is kept as it is in every phase.
        stages: The backbone's stages that have parameters, from input to output.

    Raises:
        ConfigError: There are fewer epochs than phases.
    """
    head = {"head": lr, "backbone": lr * BACKBONE_SHARE} if not isinstance(lr, Mapping) else lr
    if recipe.name in ("feature_extraction", "random_features"):
        return (PhaseSettings(epochs=recipe.epochs, freeze="backbone", lr=lr),)
    if recipe.name == "fine_tune":
        return (PhaseSettings(epochs=recipe.epochs, lr=head),)
    if recipe.name == "scratch":
        return (PhaseSettings(epochs=recipe.epochs, lr=lr),)
    if recipe.name == "lp_ft":
        probe, tune = _share(recipe, 2)
        # After the probe the head is good: it too is tuned slowly.
        slow = {"head": lr * BACKBONE_SHARE, "backbone": lr * BACKBONE_SHARE} if not isinstance(lr, Mapping) else lr
        return (PhaseSettings(epochs=probe, freeze="backbone", lr=lr), PhaseSettings(epochs=tune, lr=slow))
    decayed = head if isinstance(lr, Mapping) else {**head, "layer_decay": STAGE_DECAY}
    # First the head alone, then a stage more in each phase; in the last, nothing is frozen.
    frozen = [Until(until=stage) for stage in reversed(stages)]
    epochs = _share(recipe, len(stages) + 1)
    policies: list[Freeze] = [*frozen, "none"]
    rates: list[LearningRate] = [lr, *[decayed] * len(stages)]
    return tuple(PhaseSettings(epochs=e, freeze=f, lr=r) for e, f, r in zip(epochs, policies, rates, strict=True))


def _share(recipe: Recipe, count: int) -> list[int]:
    """Share the epochs out evenly; what is left over goes to the last phases."""
    if recipe.epochs < count:
        raise ConfigError(
            f"recipe {recipe.name!r} has {count} phases on this model and {recipe.epochs} epochs",
            fix=f"give it at least {count} epochs",
        )
    each, over = divmod(recipe.epochs, count)
    return [each + (index >= count - over) for index in range(count)]
