"""What freezing promises beyond the conformance kit: other policies, batch-norm statistics, the feature cache."""

from __future__ import annotations

import pytest
from backbone_cases import name_of, trained

from transfer import ConfigError
from transfer.config.train_settings import Parameters, Until
from transfer.models.model import BATCH_NORM
from transfer.testing import Case
from transfer.testing.freezing import boundaries, built, in_stage, train
from transfer.training.freezing import prefix_length, resolve

every = pytest.mark.parametrize("case", trained())
WITH_BATCH_NORM = [parameter for parameter in trained() if name_of(parameter.values[0]).startswith("resnet")]


@every
def test_every_boundary(case: Case) -> None:
    """One test of two properties, because training at every boundary takes most of the time."""
    model = built(case)[0]
    stages = list(model.stages)
    for run, frozen, others in boundaries(case):
        # Batch norm of the other stages follows the data.
        for stage in others:
            statistics = {n for n in in_stage(stage, run.before) if n.endswith(("running_mean", "running_var"))}
            assert statistics <= run.changed, run.until
        # The cache may store the output of the frozen stages.
        count = prefix_length(model, run.frozen)
        beyond = stages[len(frozen) : count]
        assert all(not list(model.stages[stage].parameters()) for stage in beyond), run.until
        left_out = stages[count : len(frozen)]
        assert all(getattr(model.stages[stage], "recompute", False) for stage in left_out), run.until


@every
def test_list_freezes_only_its_stages(case: Case) -> None:
    model = built(case)[0]
    with_parameters = [name for name, stage in model.stages.items() if any(True for _ in stage.parameters())][:-1]
    chosen = tuple(with_parameters[-1:])
    run = train(case, chosen)
    parameters = dict(model.named_parameters())
    assert run.changed & parameters.keys() == parameters.keys() - in_stage(chosen[0], parameters)
    assert not in_stage(chosen[0], run.changed)


@every
def test_pattern_freezes_only_matching_parameters(case: Case) -> None:
    model = built(case)[0]
    parameters = dict(model.named_parameters())
    run = train(case, Parameters(parameters=("bias",)))
    assert run.changed & parameters.keys() == {name for name in parameters if "bias" not in name}
    with pytest.raises(ConfigError, match="matches no parameter"):
        resolve(model, Parameters(parameters=("^nothing",)))


@pytest.mark.parametrize("case", WITH_BATCH_NORM)
def test_batch_norm_train_changes_only_running_statistics(case: Case) -> None:
    model = built(case)[0]
    stages = list(model.stages)
    norms = {name: module for name, module in model.named_modules() if isinstance(module, BATCH_NORM)}
    for until in ("stem", "layer2", "layer4"):
        run = train(case, Until(until=until), until, batch_norm="train")
        frozen = stages[: stages.index(until) + 1]
        inside = {name for name in norms if name.split(".")[0] in frozen}
        expected = {
            f"{name}.{buffer}" for name in inside for buffer in ("running_mean", "running_var", "num_batches_tracked")
        }
        assert {name for stage in frozen for name in in_stage(stage, run.changed)} == expected, until
        assert {name for name in run.in_training_mode if name.split(".")[0] in frozen} == inside
        assert not run.prefix_has_graph
        assert run.with_gradient == {name for name, _ in model.named_parameters() if name.split(".")[0] not in frozen}
        assert prefix_length(model, run.frozen) == 0
