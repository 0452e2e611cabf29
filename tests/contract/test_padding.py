"""Padding never changes a result: every text backbone, every variant and readout, to the tolerance of float32."""

from __future__ import annotations

import pytest
import torch
from backbone_cases import BACKBONES

from transfer.testing import Case
from transfer.testing.backbones import Subject, outputs, tensors


@pytest.mark.parametrize(
    "case", [case for case in BACKBONES if getattr(case.component().cls, "field", None) == "text"], ids=str
)
def test_features_do_not_depend_on_padding(case: Case) -> None:
    made = Subject(case)
    for name, parameter in made.backbone.named_parameters():
        if "bias" in name:  # a large one shows padding that counts
            torch.nn.init.uniform_(parameter, -1, 1)
    texts = [*made.values, " ".join(made.values * 3)]
    together = tensors(outputs(made.backbone, made.batch(made.backbone, texts)))
    for place, text in enumerate(texts):
        alone = tensors(outputs(made.backbone, made.batch(made.backbone, [text])))
        for one, other in zip(alone, together, strict=True):
            if made.backbone.features.layout == "sequence":
                assert not other[place, one.shape[1] :].any()  # neither a value nor a place in the mask
                other = other[:, : one.shape[1]]
            torch.testing.assert_close(one[0], other[place])
