"""A folder -> one commit on the Hub: verified, described by a card, without voices unless they are asked for."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path

from cosyq.artifact.manifest import FILE_NAME, RECIPE_FILE, STAGE_FILES, TOKENIZER_FILE, VOICE_FOLDER, FileRecord
from cosyq.artifact.reader import Artifact, open_artifact
from cosyq.audit import verify_artifact
from cosyq.errors import UsageError
from cosyq.hub.push import Pushed
from cosyq.hub.push import push as commit
from cosyq.publish.card import CARD_FILE, model_card
from cosyq.publish.reference import parse
from cosyq.publish.reports import REPORT_FILES, check_measured, read_report

_VOICE = re.compile(rf"{VOICE_FOLDER}/[^/]+\.safetensors")
_FIXED = {FILE_NAME, RECIPE_FILE, TOKENIZER_FILE, CARD_FILE, *STAGE_FILES.values(), *REPORT_FILES}


def push(
    folder: Path, repo: str, *, with_voices: bool, private: bool, branch: str = "main", dry_run: bool = False
) -> Pushed:
    """Verify an artifact and make a branch of a repository hold it, in one commit, or none where it does already.

    Raises:
        UsageError: no repository can have that name.
        ArtifactError: it is not whole, or a report in it cannot be read or is of other weights.
        NetworkError: see `hub.push.push`.
    """
    if "@" in repo:
        raise UsageError("a push names its branch with --revision", where=repo)
    repo, _ = parse(repo)
    opened = open_artifact(folder)
    verify_artifact(opened)
    files = contents(opened, repo, with_voices=with_voices)
    message = f"{opened.manifest.name}, recipe {opened.manifest.recipe_sha256[:12]}"
    return commit(repo, files, ours=is_ours, message=message, private=private, branch=branch, dry_run=dry_run)


def is_ours(name: str) -> bool:
    """Whether a file of a repository has a name that only an artifact's file has: a push may remove it."""
    return name in _FIXED or _VOICE.fullmatch(name) is not None


def contents(artifact: Artifact, repo: str, *, with_voices: bool) -> dict[str, Path | bytes]:
    """What a repository holds of an artifact: what the manifest lists, itself, the reports and the card."""
    published, replaced = (artifact, {}) if with_voices else _without_voices(artifact)
    manifest = published.manifest
    reports = {name: artifact.folder / name for name in REPORT_FILES if (artifact.folder / name).is_file()}
    tables = {name: read_report(path) for name, path in reports.items()}
    for name, report in tables.items():
        check_measured(report, manifest, reports[name])
    files: dict[str, Path | bytes] = {name: artifact.folder / name for name in manifest.files}
    return {
        **files,
        **replaced,
        **reports,
        FILE_NAME: manifest.to_json().encode(),
        CARD_FILE: model_card(manifest, repo, tables).encode(),
    }


def _without_voices(artifact: Artifact) -> tuple[Artifact, dict[str, bytes]]:
    """The artifact as if it had been built without voices, but for the recipe's hash, and the files that differ.

    A recipe says of a voice where its recording lies and what is said in it. So the recipe that goes along is the
    resolved one without them. Its hash stays: every stage file carries it.
    """
    manifest = artifact.manifest
    recipe = {**manifest.recipe, "voices": []}
    text = json.dumps(recipe, ensure_ascii=False, indent=1) + "\n"  # JSON is YAML
    data = f"# As it was resolved, without voices.\n{text}".encode()
    record = FileRecord(len(data), hashlib.sha256(data).hexdigest())
    kept = {name: found for name, found in manifest.files.items() if not _VOICE.fullmatch(name)}
    changed = replace(manifest, recipe=recipe, files={**kept, RECIPE_FILE: record})
    return Artifact(artifact.folder, changed), {RECIPE_FILE: data}
