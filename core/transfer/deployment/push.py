"""Upload of a run's model with its card to a model hub."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from transfer.deployment.export import export
from transfer.errors import UserError
from transfer.registry.requirements import CORE_DISTRIBUTION, unmet


@dataclass(frozen=True)
class Pushed:
    """An upload to a hub.

    Args:
        repository: Name of the repository, ``OWNER/NAME``.
        url: Address of the commit. Empty for a dry run.
        files: Size in bytes of each uploaded file. Empty for a dry run, which writes no files.
        names: Names of the uploaded files.
    """

    repository: str
    url: str
    names: Sequence[str]
    files: dict[str, int] = field(default_factory=dict)


def push(
    run: str | Path,
    repository: str,
    *,
    format: str = "safetensors",
    private: bool = False,
    revision: str | None = None,
    dry_run: bool = False,
) -> Pushed:
    """Export a run (:func:`transfer.export`) and upload the export to a repository of the Hugging Face Hub.

    The token is that of ``hf auth login`` or of the variable ``HF_TOKEN``. A repository that does not exist is created;
    in an existing one the files are replaced by a commit.

    Args:
        run: Run directory.
        repository: Name of the repository, ``OWNER/NAME``.
        format: Name of the export format.
        private: Whether a new repository is private.
        revision: Branch of the commit, which must exist. None is the default branch.
        dry_run: Whether to check the names and return the files without exporting or uploading them.

    Raises:
        UserError: An argument is wrong, there is no token, or the hub refuses the upload or cannot be reached.
        ExportError: The export does not reproduce the outputs of the run; nothing is uploaded.
    """
    if problem := unmet(CORE_DISTRIBUTION, ("hub",)):
        raise UserError(f"push needs an extra: {problem.message}", fix=problem.fix)
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UserError(f"the repository is wrong: {error}", fix="give OWNER/NAME") from error
    if repository.count("/") != 1:
        raise UserError(f"the repository is wrong: expected OWNER/NAME, got {repository!r}")
    if dry_run:
        return Pushed(repository, "", export(run, format, dry_run=True).files)
    if get_token() is None:
        raise UserError("there is no token of the hub", fix="run `hf auth login`, or set the variable HF_TOKEN")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "export")
        names = export(run, format, folder).files
        api = HfApi(library_name=CORE_DISTRIBUTION)
        try:
            api.create_repo(repository, private=private, exist_ok=True)
            message = f"Upload a model in the format {format}"
            commit = api.upload_folder(
                repo_id=repository, folder_path=folder, commit_message=message, revision=revision
            )
        except Exception as error:  # the classes of connection errors differ between versions of the client
            lines = str(error).strip().splitlines()
            raise UserError(
                f"the upload to {repository} failed: {lines[0] if lines else type(error).__name__}",
                where=api.endpoint,
                fix="check the name, the rights of the token and the connection; nothing of the run has changed",
            ) from error
        sizes = {name: (folder / name).stat().st_size for name in names}
    return Pushed(repository, str(commit.commit_url), names, sizes)
