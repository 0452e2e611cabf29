"""Every contract of every plugin of this package, and tests of rows."""

import csv
import json
from pathlib import Path

import pytest
import transfer
from transfer.testing import contracts

from transfer_tabular.data import TabularCSV
from transfer_tabular.mlp import TabularMLP

ROOT = Path(__file__).parents[1]
TABLE = str(ROOT / "wages.csv")
ROWS = [{"a": str(n), "b": "xy"[n % 2], "c": "" if n == 1 else "0.5"} for n in range(4)]
OPTIONS = {
    "tabular_mlp": [{"width": 4}, {"width": 3, "layers": 1, "dropout": 0.5}],
    "tabular_csv": [{"train": TABLE, "label": "wage", "target": "number"}, {"train": TABLE, "label": "trade"}],
    "quantiles": [{}, {"quantiles": [0.25, 0.75]}],
}
CONTRACTS = contracts(
    "transfer-tabular",
    OPTIONS,
    values={"tabular_mlp": ROWS},
    sources={"tabular_mlp": [json.dumps(row) for row in ROWS]},
    configs=[ROOT / "wages.yaml"],
)


@pytest.fixture(autouse=True)
def _in_the_folder_of_the_table(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("contract", CONTRACTS, ids=str)
def test_contract(contract):
    contract.check()


def test_encode_missing_and_unknown_cells():
    backbone = TabularMLP.from_data(ROWS, width=4).eval()
    encoded = backbone.preprocessing.encode([{"a": "", "b": "never", "c": 1}, {"a": 3, "b": "", "c": ""}])
    numbers, categories = backbone.preprocessing.collate(encoded)
    assert categories.tolist() == [[0], [0]]
    assert numbers[:, 1::2].tolist() == [[1, 0], [0, 1]]  # missing-value indicators
    assert backbone((numbers, categories)).isfinite().all()
    with pytest.raises(ValueError, match="column 'a' is not a number: got 'old'"):
        backbone.preprocessing.encode([{"a": "old", "b": "x", "c": "1"}])


def test_row_contains_columns_without_another_role(tmp_path):
    path = tmp_path / "table.tsv"
    lines = ["a\tlabel\tfold\twho\tb", "1\tx\ttrain\tanna\t", "2\ty\ttrain\tbo\tu", "3\tx\ttest\tcy\tv"]
    path.write_text("\n".join(lines), encoding="utf-8")
    data = TabularCSV(train=str(path), split="fold", group="who").load()
    assert list(data.splits["train"].fields["row"]) == [{"a": "1", "b": ""}, {"a": "2", "b": "u"}]
    assert (data.spec.classes, list(data.splits["test"].targets)) == (("x", "y"), [0])
    path.write_text("a\tlabel\n1\t2\n", encoding="utf-8")
    with pytest.raises(transfer.DataError, match="every column is used for something else"):
        TabularCSV(train=str(path), label=("a", "label"), target="number").load()


def test_wrong_table_reports_line(tmp_path):
    path = tmp_path / "table.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("a", "label"), (1, 2), (1, "much")])
    with pytest.raises(transfer.DataError, match="expected a finite number") as caught:
        TabularCSV(train=str(path), target="number").load()
    assert caught.value.problems[0].where == f"{path}:3"


def test_quantiles_cover_the_expected_fraction(tmp_path):
    run = transfer.run(ROOT / "wages.yaml", output=tmp_path)
    assert 0.65 < run.summary["test"]["coverage"] < 0.92
    (prediction,) = transfer.predict(run.folder, [json.dumps({"age": 50, "years": 30, "trade": "nurse"})])
    assert 22 < prediction["wage"]["0.1"] < prediction["wage"]["0.5"] < prediction["wage"]["0.9"] < 45
