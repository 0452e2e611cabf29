"""YAML documents with locations, variables and overrides."""

from __future__ import annotations

import math
import shlex
from pathlib import Path
from typing import Any

import pytest

from transfer import ConfigError
from transfer.config.yaml_document import Document, make_document, read_document


@pytest.fixture
def read(tmp_path: Path) -> Any:
    """Return a function from YAML text (and overrides) to a document."""

    def from_text(text: str, *overrides: str) -> Document:
        path = tmp_path / "file.yaml"
        path.write_text(text, encoding="utf-8")
        return read_document(path, overrides)

    return from_text


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1.0e-3", 0.001),
        (".5", 0.5),
        ("5.", 5.0),
        ("-2", -2),
        ("010", 10),
        ("1_000", "1_000"),
        ("12:30:45", "12:30:45"),
        ("2024-01-31", "2024-01-31"),
        ("off", "off"),
        ("no", "no"),
        ("yes", "yes"),
        ("true", True),
        ("False", False),
        ("tRue", "tRue"),
        ("null", None),
        ("~", None),
        ("", None),
        ("'5'", "5"),
        ('"true"', "true"),
        ("!!str 5", "5"),
        (".inf", math.inf),
        ("-.INF", -math.inf),
        ("[a, 1, [2.5]]", ["a", 1, [2.5]]),
    ],
)
def test_scalars_follow_yaml_1_2(read: Any, text: str, value: Any) -> None:
    value_read = read(f"key: {text}\n").data["key"]
    assert value_read == value
    assert type(value_read) is type(value)


def test_nan_is_read(read: Any) -> None:
    assert math.isnan(read("key: .nan").data["key"])


def test_location_of_values(read: Any) -> None:
    document = read("a: 1\n\nb:\n  c: 2\n  d:\n    - 3\n    - {e: 4}\n")
    path = document.source
    lines = {("a",): 1, ("b",): 3, ("b", "c"): 4, ("b", "d"): 5, ("b", "d", 0): 6, ("b", "d", 1, "e"): 7}
    assert {key: document.location(key) for key in lines} == {key: f"{path}:{line}" for key, line in lines.items()}


def test_location_of_missing_key_is_block_around_it(read: Any) -> None:
    document = read("a: 1\nb:\n  c: 2\n")
    assert document.location(("b", "nothing", 3)) == f"{document.source}:2"


def test_duplicated_key_names_second_line(read: Any) -> None:
    with pytest.raises(ConfigError, match="the key 'a' is duplicated") as caught:
        read("x:\n  a: 1\n  a: 2\n")
    assert caught.value.problems[0].where.endswith("file.yaml:3")


def test_problems_are_reported_together(read: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        read("a: 1\na: 2\nb: !secret x\nc: ${TRANSFER_SURELY_NOT_SET}\n[1]: 2\n")
    assert [p.where.rpartition(":")[2] for p in caught.value.problems] == ["2", "3", "4", "5"]


@pytest.mark.parametrize(
    "text",
    [
        "key: !!python/object:os.system x",
        "key: !!python/object/apply:os.system [ls]",
        "key: !!python/object:transfer.Split {a: 1}",
        "key: !!binary aGk=",
        "key: !!set {a, b}",
        "key: !mine [1]",
        "!mine\nkey: 1",
    ],
)
def test_tags_are_refused(read: Any, text: str) -> None:
    with pytest.raises(ConfigError, match=r"tag .* not allowed"):
        read(text)


@pytest.mark.parametrize("text", ["key: !!int many", "key: !!float many", "key: !!bool maybe", "key: !!null x"])
def test_scalar_with_wrong_tag_is_refused(read: Any, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(text)
    assert caught.value.problems[0].where.endswith("file.yaml:1")


def test_aliases_are_resolved(read: Any) -> None:
    assert read("a: &x {b: 1}\nc: *x\n").data == {"a": {"b": 1}, "c": {"b": 1}}


def test_alias_bomb_is_refused(read: Any) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    with pytest.raises(ConfigError, match="values"):
        read("\n".join(lines))


@pytest.mark.parametrize("text", ["a: &x [*x]", "a: &x {b: *x}", "a: " + "[" * 5000])
def test_endless_nesting_is_refused(read: Any, text: str) -> None:
    with pytest.raises(ConfigError):
        read(text)


def test_variables_are_substituted(read: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOLDER", "/data")
    monkeypatch.delenv("OTHER", raising=False)
    document = read('a: ${FOLDER}/x\nb: ${OTHER:-y}\nc: ${OTHER:-}z\nd: ["${FOLDER}"]\n')
    assert document.data == {"a": "/data/x", "b": "y", "c": "z", "d": ["/data"]}


def test_unquoted_variable_is_parsed_as_yaml(read: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPOCHS", "5")
    data = read("plain: ${EPOCHS}\ndouble: \"${EPOCHS}\"\nsingle: '${EPOCHS}'\nblock: |-\n  ${EPOCHS}\n").data
    assert data == {"plain": 5, "double": "5", "single": "5", "block": "5"}


def test_empty_variable_uses_default(read: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPOCHS", "")
    assert read("key: ${EPOCHS:-7}").data == {"key": 7}


def test_unset_variable_is_named(read: Any) -> None:
    with pytest.raises(ConfigError, match="TRANSFER_SURELY_NOT_SET is not set") as caught:
        read("a: 1\nb: ${TRANSFER_SURELY_NOT_SET}\n")
    (problem,) = caught.value.problems
    assert problem.where.endswith("file.yaml:2")
    assert "export TRANSFER_SURELY_NOT_SET" in problem.fix


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("a=2", {"a": 2, "b": {"c": [1, {"d": 2}]}}),
        ("b.c.0=1e-3", {"a": 1, "b": {"c": [0.001, {"d": 2}]}}),
        ("b.c.1.d=off", {"a": 1, "b": {"c": [1, {"d": "off"}]}}),
        ("b.c=[4, 5]", {"a": 1, "b": {"c": [4, 5]}}),
        ("b.new.deep='5'", {"a": 1, "b": {"c": [1, {"d": 2}], "new": {"deep": "5"}}}),
        ("a=", {"a": None, "b": {"c": [1, {"d": 2}]}}),
        ("a=x=y", {"a": "x=y", "b": {"c": [1, {"d": 2}]}}),
    ],
)
def test_overrides_set_one_value(read: Any, override: str, expected: Any) -> None:
    assert read("a: 1\nb:\n  c: [1, {d: 2}]\n", override).data == expected


def test_location_of_overridden_value(read: Any) -> None:
    document = read("a:\n  b: {c: 1}\n", "a.b={c: 2, d: 3}")
    assert document.location(("a", "b", "d")) == "override 'a.b={c: 2, d: 3}'"
    assert document.location(("a",)).endswith("file.yaml:1")


def test_location_of_mapping_created_by_override(read: Any) -> None:
    document = read("a: 1\n", "b.c.d=2")
    assert [document.location(key) for key in (("a",), ("b",), ("b", "c"))] == [f"{document.source}:1"] + 2 * [
        "override 'b.c.d=2'"
    ]


def test_override_leaves_alias_unchanged(read: Any) -> None:
    assert read("a: &x {b: 1}\nc: *x\n", "c.b=2").data == {"a": {"b": 1}, "c": {"b": 2}}


def test_wrong_overrides_are_reported_together(read: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        read("a: 1\nb: [1]\n", "a", "a.x=1", "b.7=1", "b.x=1", ".=1", "b=[", "=1")
    problems = caught.value.problems
    assert [p.where for p in problems] == [
        f"override {o!r}" for o in ("a", "a.x=1", "b.7=1", "b.x=1", ".=1", "b=[", "=1")
    ]
    assert problems[2].available == ("0",)


def test_override_with_variable(read: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPOCHS", "5")
    assert read("a: 1", "a=${EPOCHS}").data == {"a": 5}


def test_missing_file_lists_config_files(tmp_path: Path) -> None:
    for name in ("quick.yaml", "other.yml", "notes.txt"):
        (tmp_path / name).touch()
    with pytest.raises(ConfigError) as caught:
        read_document(tmp_path / "quack.yaml")
    (problem,) = caught.value.problems
    assert problem.available == ("other.yml", "quick.yaml")
    assert str(tmp_path / "quick.yaml") in problem.fix


def test_missing_folder_is_reported(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        read_document(tmp_path / "nowhere" / "quack.yaml")


@pytest.mark.parametrize("content", [b"a: \xff\xfe", b"a: \x00", b"a: \x07b"], ids=["not UTF-8", "NUL", "BEL"])
def test_binary_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_document(path)
    assert str(path) in caught.value.problems[0].where


@pytest.mark.parametrize("text", ["", "# only a comment\n", "[1, 2]", "just words"])
def test_document_that_is_no_mapping_is_refused(read: Any, text: str) -> None:
    with pytest.raises(ConfigError, match="expected a mapping of data"):
        read(text)


@pytest.mark.parametrize(("text", "line"), [("a: 1\nb: [1\n", 3), ("a: 1\n  b: 2\n", 2), ("a: 1\n---\nb: 2\n", 2)])
def test_invalid_yaml_names_line(read: Any, text: str, line: int) -> None:
    with pytest.raises(ConfigError, match="not YAML") as caught:
        read(text)
    assert caught.value.problems[0].where.endswith(f"file.yaml:{line}")


def test_plain_data_is_copied(tmp_path: Path) -> None:
    data = {"a": {"b": (1, 2)}, "c": tmp_path}
    document = make_document(data, ["a.b.0=5"])
    assert document.data == {"a": {"b": [5, 2]}, "c": str(tmp_path)}
    assert data["a"] == {"b": (1, 2)}
    assert document.location(("a",)) == "config"


def test_plain_data_with_other_types_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        make_document({"a": {"b": object(), "c": [{1, 2}]}, "d": {5: "x"}})
    assert [p.where for p in caught.value.problems] == ["config: a.b", "config: a.c.0", "config: d"]


@pytest.mark.parametrize(
    "value", ["#", " #", "a #b", "[1] # two", "|", ">", "&", "*", "!", "%", "@", "`", "-", "?", ":", ",", " "]
)
def test_override_with_special_character_asks_for_quotes(read: Any, value: str) -> None:
    with pytest.raises(ConfigError, match="special character of YAML") as caught:
        read("data: {separator: x}\n", f"data.separator={value}")
    fix = str(caught.value.problems[0].fix)
    assert fix.startswith("quote the value: ")
    (quoted,) = shlex.split(fix.removeprefix("quote the value: "))
    assert read("data: {separator: x}\n", quoted).data == {"data": {"separator": value}}


@pytest.mark.parametrize("value", ["[", "'", '"', "{", "]", "}", "a: b: c"])
def test_override_that_is_no_yaml_asks_for_quotes(read: Any, value: str) -> None:
    with pytest.raises(ConfigError, match="not YAML") as caught:
        read("data: {separator: x}\n", f"data.separator={value}")
    (quoted,) = shlex.split(str(caught.value.problems[0].fix).removeprefix("quote the value: "))
    assert read("data: {separator: x}\n", quoted).data == {"data": {"separator": value}}


@pytest.mark.parametrize(
    ("value", "expected"), [("", None), ("~", None), ("a#b", "a#b"), (";", ";"), ('"#"', "#"), ("-1", -1)]
)
def test_override_without_special_character_is_taken(read: Any, value: str, expected: object) -> None:
    assert read("data: {separator: x}\n", f"data.separator={value}").data == {"data": {"separator": expected}}


def test_bare_hash_in_a_file_is_reported(read: Any) -> None:
    with pytest.raises(ConfigError, match="separator has no value: # starts a comment") as caught:
        read("data:\n  separator: #\n  label: x\n")
    problem = caught.value.problems[0]
    assert str(problem.where).endswith("file.yaml:2")
    assert 'separator: "#"' in str(problem.fix)


def test_comments_in_a_file_stay_comments(read: Any) -> None:
    assert read("a: # none\nb: #\n  c: 1 #\nd:\n#\ne: '#'\n").data == {"a": None, "b": {"c": 1}, "d": None, "e": "#"}


def test_folder_as_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a folder: expected a YAML file") as caught:
        read_document(tmp_path)
    assert caught.value.problems[0].fix == "give the path of a YAML file"
    (tmp_path / "config.yaml").touch()
    with pytest.raises(ConfigError) as caught:
        read_document(tmp_path)
    assert caught.value.problems[0].fix == f"give {tmp_path / 'config.yaml'}, the config of the run"
