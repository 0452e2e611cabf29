"""The Markdown report of a sweep."""

from __future__ import annotations

from typing import Any

from transfer.experiments.sweep_report import _markdown

REPORT: dict[str, Any] = {
    "metric": "accuracy",
    "best": {"trial": 1, "run": "runs/a", "values": {"lr": 0.01}, "validation": 0.9, "test": {"accuracy": 0.8}},
    "importance": None,
    "trials": [
        {"trial": 0, "state": "fail", "validation": None, "epochs": 0, "values": {}, "why": "a | b\nc\x1b[2J"},
        {"trial": 1, "state": "complete", "validation": 0.9, "epochs": 2, "values": {"lr": 0.012345}, "why": None},
    ],
}


def rows(markdown: str) -> list[str]:
    return [line for line in markdown.split("\n## Trials\n")[1].splitlines() if line]


def test_sweep_report_sorts_trials_without_a_score_last() -> None:
    assert rows(_markdown(REPORT)) == [
        "| trial | lr | validation accuracy | epochs | |",
        "|---|---|---|---|---|",
        "| 2 | 0.01235 | 0.9000 | 2 | complete |",
        "| 1 | null |  | 0 | fail: a \\| b c\\x1b[2J |",
    ]


def test_sweep_report_states_best_trial_and_test_metrics() -> None:
    markdown = _markdown(REPORT)
    assert "Trial 2, `runs/a`: validation accuracy 0.9000\n\nTest (evaluated once" in markdown
    assert "```\nlr=0.01\n```" in markdown
    assert "too few or too similar" in markdown
    assert "| `lr` | 0.75 |" in _markdown(REPORT | {"importance": {"lr": 0.75}})
