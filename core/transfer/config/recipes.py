"""Named recipes, expanded to the phases for a model's stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from transfer.config.train_settings import Freeze, LearningRate, PhaseSettings, Recipe, Until
from transfer.errors import ConfigError

WITHOUT_PRETRAINED = frozenset({"scratch", "random_features"})
"""Recipes that start from random weights."""
FINE_TUNING = frozenset({"fine_tune", "lp_ft", "gradual"})
"""Recipes that train a pretrained backbone."""
PROBING = frozenset({"feature_extraction", "random_features", "lp_ft"})
"""Recipes with a phase that trains only the head and that L-BFGS can replace."""
MIN_EXAMPLES_FOR_STATISTICS = 5_000
"""Number of training examples below which fine-tuning keeps the statistics of batch norm. A batch is a poor estimate of
them, and on small data the few steps do not average it out."""
RECIPE_WARMUP_EPOCHS = 0.5
"""Warm-up of each phase of these recipes, before the cosine, if the config sets no scheduler."""
BACKBONE_LR_FACTOR = 0.1
"""Learning rate of the backbone relative to the head's: pretrained weights should change less than new ones."""
ADAPTIVE_LR_FACTOR = 0.02
"""The same for Adam and its variants, which move each weight by about the learning rate, however small its gradient:
2e-5 with the default rate of 1e-3, the usual rate for pretrained encoders (Devlin et al. 2019)."""
STAGE_DECAY = 1 / 2.6
"""Factor of the learning rate from a stage to the one before it (Howard and Ruder 2018, section 3.2)."""
MAX_DECAY_STEPS = 4
"""Number of these factors between the last and the first stage of the backbone. In a deeper network each factor is
closer to 1: otherwise the first of 14 stages would train at 1 / 250,000 of the rate of the last."""


def expand(
    recipe: Recipe, lr: LearningRate, stages: Sequence[str], *, adaptive: bool = False
) -> tuple[PhaseSettings, ...]:
    """Return the phases of a recipe.

    Args:
        recipe: Name of the recipe and its total number of epochs.
        lr: Learning rate of the optimizer. Learning rates by group are used unchanged in every phase.
        stages: Names of the backbone's stages that have parameters, from input to output.
        adaptive: Whether the optimizer is Adam or one of its variants.

    Raises:
        ConfigError: The recipe has two phases or more, and one epoch. Or it sets an option without an effect.
    """
    for option, names in {"batch_norm": FINE_TUNING, "solver": PROBING}.items():
        if getattr(recipe, option) is not None and recipe.name not in names:
            raise ConfigError(
                f"{option} of the recipe {recipe.name!r} has no effect",
                fix=f"remove it, or choose {', '.join(sorted(names))}",
            )
    batch_norm = recipe.batch_norm or "frozen"
    solved = PhaseSettings(epochs=1, freeze="backbone", solver="lbfgs")
    factor = ADAPTIVE_LR_FACTOR if adaptive else BACKBONE_LR_FACTOR
    by_group = {"head": lr, "backbone": lr * factor} if not isinstance(lr, Mapping) else lr
    if recipe.name in ("feature_extraction", "random_features"):
        if recipe.solver == "lbfgs":
            return (solved,)
        return (PhaseSettings(epochs=recipe.epochs, freeze="backbone", lr=lr),)
    if recipe.name == "fine_tune":
        return (PhaseSettings(epochs=recipe.epochs, lr=by_group, batch_norm=batch_norm),)
    if recipe.name == "scratch":
        return (PhaseSettings(epochs=recipe.epochs, lr=lr),)
    if recipe.name == "lp_ft":
        probe, tune = _split_epochs(recipe, 2)
        # The head is already trained by the linear probe, so it gets the low learning rate as well.
        slow = {"head": lr * factor, "backbone": lr * factor} if not isinstance(lr, Mapping) else lr
        if recipe.solver == "lbfgs":
            return (solved, PhaseSettings(epochs=recipe.epochs - 1, lr=slow, batch_norm=batch_norm))
        probed = PhaseSettings(epochs=probe, freeze="backbone", lr=lr)
        return (probed, PhaseSettings(epochs=tune, lr=slow, batch_norm=batch_norm))
    decay = STAGE_DECAY ** min(1.0, MAX_DECAY_STEPS / max(1, len(stages) - 1))
    decayed = by_group if isinstance(lr, Mapping) else {**by_group, "layer_decay": decay}
    # Gradual unfreezing: the head first, then one more stage per phase from the output on, finally everything.
    policies: list[Freeze] = [*(Until(until=stage) for stage in reversed(stages)), "none"]
    # With fewer epochs than stages, each phase unfreezes several of them.
    count = max(2, min(len(policies), recipe.epochs))
    policies = [policies[round(index * (len(policies) - 1) / (count - 1))] for index in range(count)]
    epochs = _split_epochs(recipe, count)
    rates: list[LearningRate] = [lr, *[decayed] * (count - 1)]
    return tuple(
        PhaseSettings(epochs=e, freeze=f, lr=r, batch_norm=batch_norm if index else "frozen")
        for index, (e, f, r) in enumerate(zip(epochs, policies, rates, strict=True))
    )


def _split_epochs(recipe: Recipe, count: int) -> list[int]:
    """Return the epochs of each of ``count`` phases: equal numbers, with the remainder in the last phases."""
    if recipe.epochs < count:
        raise ConfigError(
            f"recipe {recipe.name!r} has {count} phases on this model and {recipe.epochs} epochs",
            fix=f"set at least {count} epochs",
        )
    each, remainder = divmod(recipe.epochs, count)
    return [each + (index >= count - remainder) for index in range(count)]
