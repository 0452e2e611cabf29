"""What comes from outside is refused in words: nothing of it is executed, nothing written outside its place."""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import stat
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import transfer
from transfer import DataError, RunError, Tables, UserError, WeightsError
from transfer.cli import app as cli
from transfer.cli.tables import error_panel
from transfer.config.check import load_config
from transfer.data import records
from transfer.deployment.export import export
from transfer.errors import ConfigError
from transfer.feature_cache.store import FeatureCache
from transfer.models.saved_model import read_model
from transfer.registry.entry_points import load
from transfer.registry.scaffold import new_plugin
from transfer.storage import checkpoint
from transfer.storage.run_directory import RunDirectory
from transfer.system.atomic_files import read_json
from transfer.system.terminal import Console, printable

ESCAPE = "\x1b]0;owned\x07\x1b[31m\u202e"


def status_of(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["transfer", *arguments])
    try:
        cli.main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


@pytest.fixture
def run(config: dict[str, Any], tmp_path: Path) -> Path:
    """Return a finished run, in a folder of its own."""
    return transfer.run(config, ["train.phases=[{epochs: 1}]"], output=tmp_path / "runs").folder


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """Return a file that is none of a run's business."""
    file = tmp_path / "outside.txt"
    file.write_text("mine", encoding="utf-8")
    return file


def edit(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    change(content)
    file.write_text(json.dumps(content), encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------ terminal


def test_a_message_cannot_command_the_terminal() -> None:
    written = io.StringIO()
    Console(file=written, force_terminal=True, width=200).print(
        error_panel(ConfigError(f"no {ESCAPE}", where=ESCAPE, available=[ESCAPE], fix=ESCAPE))
    )
    assert "\x1b]0" not in written.getvalue()
    assert "\x07" not in written.getvalue()
    assert "\u202e" not in written.getvalue()
    assert written.getvalue().count(r"\x1b]0;owned\x07") == 4


def test_printable_text_is_shown_unchanged() -> None:
    text = "naïve\tÇa va\n日本語 שלום 👩‍👩‍👧"
    assert printable(text) == text


def test_input_and_class_names_escape_terminal_codes(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(run / "model" / "model.json", lambda content: content["data"].update(classes=[ESCAPE, f"{ESCAPE}b"]))
    assert status_of(monkeypatch, "predict", str(run), "1,2,3,4 ") == 0
    assert status_of(monkeypatch, "predict", str(run), "--json", "1,2,3,4 ") == 0
    assert "\x1b" not in capsys.readouterr().out
    assert status_of(monkeypatch, "predict", f"{run}{ESCAPE}\udc80", "1,2,3,4") == 2
    assert "\x1b" not in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------- YAML, JSON

TAGS = ["!!python/object/apply:os.system [touch executed]", "!!python/name:os.system", "!!binary aGk=", "!custom x"]


@pytest.mark.parametrize("text", TAGS)
def test_yaml_tags_are_refused(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text(f"seed: {text}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="is not allowed"):
        load_config("config.yaml")
    with pytest.raises(RunError, match="is not allowed"):
        RunDirectory.open(tmp_path).config()
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize(
    "text",
    [
        "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
        + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10)),
        "a: &a [*a]\n",
        "a: " + "[" * 5000,
        "a: 2001-99-99\nb: !!int ''\n",
    ],
    ids=["aliases of aliases", "a value in itself", "depth", "values that are none"],
)
def test_alias_bomb_in_config_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(RunError):
        load_config(RunDirectory.open(tmp_path).config())


def test_run_config_reads_no_environment_variable(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("data: ${HOME}\n", encoding="utf-8")
    assert RunDirectory.open(tmp_path).config() == {"data": "${HOME}"}


@pytest.mark.parametrize("text", ['{"a": NaN}', "1" * 5000, '{"a": ' * 100_000])
def test_json_that_is_none_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "file.json").write_text(text, encoding="utf-8")
    with pytest.raises(RunError, match="cannot be read"):
        read_json(tmp_path / "file.json", "missing")


# ------------------------------------------------------------------------------------------------------- run directory


@pytest.mark.parametrize("name", ["metrics.jsonl", "lock", "checkpoints/last/state.json"])
def test_resume_writes_through_no_link(run: Path, outside: Path, name: str) -> None:
    (run / "summary.json").unlink()
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(outside)
    with pytest.raises(RunError, match="leads out of the run directory"):
        transfer.resume(run)
    assert outside.read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize("command", [["evaluate", "--images"], ["export", "--format", "safetensors"]])
def test_no_command_writes_through_a_linked_folder(
    run: Path, tmp_path: Path, command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "elsewhere").mkdir()
    shutil.rmtree(run / "plots")
    for name in ("plots", "export"):
        (run / name).symlink_to(tmp_path / "elsewhere")
    assert status_of(monkeypatch, command[0], str(run), *command[1:]) == 2
    assert "leads out of the run" in " ".join(capsys.readouterr().err.split())
    assert not list((tmp_path / "elsewhere").iterdir())


def test_temporary_files_are_swept_but_not_link_targets(run: Path, outside: Path) -> None:
    (run / ".x.tmp").symlink_to(outside.parent)
    RunDirectory.open(run).remove_temporary_files()
    assert not (run / ".x.tmp").is_symlink()
    assert outside.exists()


def test_folder_resembling_a_checkpoint_is_kept(run: Path) -> None:
    (run / "checkpoints" / "last.previous-x").mkdir()
    assert checkpoint.load(run / "checkpoints" / "last")[1]["epoch"] == 1


# -------------------------------------------------------------------------------------------------------- model folder


@pytest.mark.parametrize("name", ["../../outside.txt", "/etc/hostname", "..", "", "model.json", ".hidden", "a/b"])
def test_asset_outside_of_model_folder_is_refused(run: Path, name: str) -> None:
    edit(run / "model" / "model.json", lambda content: content.update(assets=[name]))
    for read in (read_model, lambda folder: export(folder.parent, "safetensors", dry_run=True)):
        with pytest.raises(RunError, match="is no file of it"):
            read(run / "model")


def test_only_an_installed_entry_point_is_imported(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "evil.py").write_text("raise SystemExit('executed')", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    described = {"kind": "backbone", "name": "evil", "distribution": "evil", "version": "1", "target": "evil:Evil"}

    def change(content: dict[str, Any]) -> None:
        content["plugins"]["backbone"] = described
        content["backbone"] = {"name": "evil"}

    edit(run / "model" / "model.json", change)
    with pytest.raises(RunError, match="unknown backbone 'evil'") as caught:
        read_model(run / "model")
    assert caught.value.problems[0].fix == "pip install evil==1"
    assert "evil" not in sys.modules


@pytest.mark.parametrize(
    ("distribution", "version", "extras"),
    [
        ("git+https://example.org/evil", "1", []),
        ("--index-url=https://example.org", "1", []),
        ("evil @ https://example.org/evil.whl", "1", []),
        ("evil", "1; touch x", []),
        ("evil", "", []),
        ("evil", "1", ["x] --pre [y"]),
        (ESCAPE, "1", []),
    ],
)
def test_install_hint_repeats_no_address_of_a_file(
    run: Path, distribution: str, version: str, extras: list[str]
) -> None:
    plugin = {"kind": "head", "name": "evil", "distribution": distribution, "version": version, "target": "evil:Evil"}

    def change(content: dict[str, Any]) -> None:
        content["plugins"]["head"] = {**plugin, "extras": extras}
        content["head"] = {"name": "evil"}

    edit(run / "model" / "model.json", change)
    with pytest.raises(RunError, match="unknown head 'evil'") as caught:
        read_model(run / "model")
    assert "the file does not name a valid one" in str(caught.value.problems[0].fix)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("summary.json", {"validation": []}, "validation"),
        ("summary.json", {"primary_metric": None}, "primary_metric"),
        ("summary.json", {"examples": {"test": "x"}}, "examples.test"),
        ("environment.json", {"format": 2}, "the run has format 2"),
        ("environment.json", {"versions": []}, "versions"),
        ("metrics.jsonl", {"lr": 5}, "lr"),
        ("metrics.jsonl", {"epoch": "\ud800"}, "epoch"),
        ("model/model.json", {"preprocessing": 5}, "preprocessing"),
    ],
)
def test_field_of_another_type_is_refused(run: Path, file: str, change: dict[str, Any], message: str) -> None:
    edit(run / file, lambda content: content.update(change))
    with pytest.raises(RunError, match=message):
        transfer.report(run)


@pytest.mark.parametrize(
    "change", [{"mean": "abc"}, {"std": [None]}, {"image_size": "32"}, {"resize": 0}, {"interpolation": 5}, {"mean": 1}]
)
def test_preprocessing_of_another_type_is_refused(change: dict[str, Any]) -> None:
    preset = {"image_size": 32, "resize": 32, "interpolation": "bilinear", "mean": [0.5] * 3, "std": [0.5] * 3}
    assets = {"preprocessing.json": json.dumps(preset | change)}
    with pytest.raises(ValueError, match=next(iter(change))):
        load("backbone", "torchvision").from_assets(assets, model="shufflenet_v2_x0_5", weights=None)


def test_run_files_have_mode_of_umask(config: dict[str, Any], tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        run = transfer.run(config, ["train.phases=[{epochs: 1}]"], output=tmp_path / "runs").folder
    finally:
        os.umask(before)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in run.rglob("*")}
    assert {path.suffix: oct(mode) for path, mode in modes.items() if mode != (0o750 if path.is_dir() else 0o640)} == {}


@pytest.mark.parametrize("name", ["metrics.jsonl", "lock", "checkpoints/pipe"])
def test_pipe_in_a_run_is_refused(run: Path, name: str) -> None:
    (run / "summary.json").unlink()
    (run / name).unlink(missing_ok=True)
    os.mkfifo(run / name)
    with pytest.raises(RunError, match="no regular file"):
        transfer.resume(run)


@pytest.mark.parametrize("name", ["checkpoints/last", "model", "loop"])
def test_link_to_itself_is_refused(run: Path, name: str) -> None:
    (run / "summary.json").unlink()
    if (run / name).exists():
        shutil.rmtree(run / name)
    (run / name).symlink_to(Path(name).name)
    with pytest.raises(RunError, match="leads out"):
        transfer.resume(run)


@pytest.mark.parametrize("name", ["model.json", "weights.safetensors"])
def test_a_file_without_an_end_is_not_read(run: Path, name: str) -> None:
    (run / "model" / name).unlink()
    os.mkfifo(run / "model" / name)
    with pytest.raises(RunError, match="regular file"):
        read_model(run / "model")


@pytest.mark.parametrize("source", ["/dev/zero", "a\0b.png", "~nobody-is-called-so/a.png", "\udc80.png"])
def test_upload_that_is_no_image_is_refused(source: str) -> None:
    preprocessing = load("backbone", "resnet18")(weights=None).preprocessing
    with pytest.raises(DataError, match="image"):
        preprocessing.read(source)


def test_weights_of_wrong_dtype_are_refused(run: Path) -> None:
    file = run / "model" / "weights.safetensors"
    save_file({name: tensor.to(torch.int32) for name, tensor in load_file(file).items()}, file)
    with pytest.raises(RunError, match=r"wrong dtype: expected torch\.float32, got torch\.int32"):
        read_model(run / "model")


@pytest.mark.parametrize("header", [b"\xff" * 8, (1 << 40).to_bytes(8, "little"), b"", b"\x02" + b"\0" * 7 + b"[]"])
def test_a_header_that_lies_is_refused(run: Path, header: bytes) -> None:
    (run / "model" / "weights.safetensors").write_bytes(header)
    with pytest.raises(RunError, match="tensors cannot be read"):
        read_model(run / "model")


def test_weights_that_give_no_numbers_give_no_prediction(run: Path) -> None:
    file = run / "model" / "weights.safetensors"
    save_file({k: v * torch.nan if v.is_floating_point() else v for k, v in load_file(file).items()}, file)
    with pytest.raises(RunError, match="not finite"):
        list(transfer.predict(run, ["1,2,3,4"]))


def test_stored_features_that_were_edited_are_dropped(tmp_path: Path) -> None:
    cache = FeatureCache(0, folder=tmp_path)
    entry = tmp_path / ("a" * 40)
    entry.mkdir()
    for what in ({"examples": "many", "stages": [], "view": None}, {}, None, {"examples": 1, "stages": [5], "view": 1}):
        (entry / "entry.json").write_text(json.dumps({"sha256": {}, "kinds": ["nn"], "what": what}), encoding="utf-8")
        assert cache.entries() == []
        entry.mkdir(exist_ok=True)
    (entry / "entry.json").write_text(json.dumps({"sha256": {"../x": "0"}, "kinds": ["nn"]}), encoding="utf-8")
    assert cache._open(entry, 1) is None


# ------------------------------------------------------------------------------------------------- archives and tables


def imdb_archive(path: Path, members: list[tuple[tarfile.TarInfo, bytes]]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for member, content in members:
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


@pytest.mark.parametrize("name", ["../evil.txt", "/tmp/evil.txt", "aclImdb/train/pos/../../../../evil.txt"])
def test_a_tar_archive_writes_nothing_outside(name: str, tmp_path: Path) -> None:
    path = tmp_path / "aclImdb_v1.tar.gz"
    link = tarfile.TarInfo("aclImdb/train/pos/0_9.txt")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
    imdb_archive(path, [(tarfile.TarInfo(name), b"evil"), (link, b"")])
    with pytest.raises(DataError, match="0 negative and 0 positive"):
        load("dataset", "imdb")(root=str(path)).load()
    assert [p.name for p in tmp_path.rglob("*")] == [path.name]


def test_tar_bomb_is_refused(tmp_path: Path) -> None:
    review = tarfile.TarInfo("aclImdb/train/pos/0_9.txt")
    path = imdb_archive(tmp_path / "aclImdb_v1.tar.gz", [(review, bytes(1 << 21))])
    with pytest.raises(DataError, match="would unpack to"):
        load("dataset", "imdb")(root=str(path)).load()


@pytest.mark.parametrize(
    ("name", "link", "message"),
    [
        ("../ants/1.jpg", False, "leads out"),
        ("/ants/1.jpg", False, "leads out"),
        ("C:\\ants\\1.jpg", False, "leads out"),
        ("a\\..\\..\\1.jpg", False, "leads out"),
        ("ants/1.jpg", True, "is a link"),
    ],
)
def test_a_zip_archive_that_leads_out_is_refused(tmp_path: Path, name: str, link: bool, message: str) -> None:
    member = zipfile.ZipInfo(name)
    if link:
        member.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "pictures.zip", "w") as archive:
        archive.writestr(member, "/etc/hostname")
    with pytest.raises(DataError, match=message):
        load("dataset", "image_folder")(root=str(tmp_path / "pictures.zip")).load()


def csv_table(path: Path) -> Tables:
    return Tables(
        train=str(path), val=None, test=None, example="text", column="text", label="label", target="class",
        separator=",", delimiter=None, encoding="utf-8", split=None, group=None, test_fraction=0.0,
    )  # fmt: skip


def test_compressed_table_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "MAX_TABLE_BYTES", 1 << 20)
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress(b"text,label\n" + b" " * (1 << 20)))
    with pytest.raises(DataError, match="would unpack to"):
        csv_table(tmp_path / "t.csv.gz").read("text")


@pytest.mark.parametrize("line", ["[" * 100_000, '{"text": ' + "1" * 5000 + "}", '{"text": "\\ud800", "label": "a"}'])
def test_unreadable_json_line_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "t.jsonl").write_text(line + "\n", encoding="utf-8")
    with pytest.raises(DataError):
        csv_table(tmp_path / "t.jsonl").read("text")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        # Without mtime=0 the content, and with it the test's id, would depend on the time of collection.
        ("endless.txt.gz", gzip.compress(b"x" * (1 << 23), mtime=0), "longer than"),
        ("wide.bin", b"1 99999999999\nword " + b"\0" * 16, "wide"),
        ("wide.txt", b"2 99999999999\nword 1 2\n", "contains 2 numbers"),
    ],
    ids=["endless.txt.gz", "wide.bin", "wide.txt"],
)
def test_vectors_that_would_fill_the_memory_are_refused(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    from transfer_text.vectors.word_vectors import width_of

    (tmp_path / name).write_bytes(content)
    with pytest.raises(WeightsError, match=message):
        width_of(str(tmp_path / name))


# --------------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil", "a b", "x;touch evil", "$(touch evil)", ESCAPE, "", "é"])
def test_plugin_name_is_neither_path_nor_code(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no valid package name"):
        new_plugin(name, tmp_path / "here", version="0.1.0")
    assert not list(tmp_path.iterdir())
