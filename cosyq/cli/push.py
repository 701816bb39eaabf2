"""cosyq push: an artifact onto the Hub."""

from __future__ import annotations

from typing import Annotated

import typer

from cosyq.cli.console import ArtifactArgument, Json, choose_artifact, emit, note


def push(
    artifact: ArtifactArgument,
    repo: Annotated[str, typer.Argument(help="OWNER/NAME; made if it is missing.")],
    private: Annotated[bool, typer.Option("--private", help="Make it private; refuse one that is public.")] = False,
    revision: Annotated[str, typer.Option(help="The branch; made if it is missing.")] = "main",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be sent, and stop.")] = False,
    with_voices: Annotated[bool, typer.Option("--with-voices", help="Publish the voices, too.")] = False,
    as_json: Json = False,
) -> None:
    """Verify an artifact and push it, with a model card, in one commit. Asks nothing; the token is HF_TOKEN's."""
    folder = choose_artifact(artifact)

    from cosyq.publish.push import push as publish

    pushed = publish(folder, repo, with_voices=with_voices, private=private, branch=revision, dry_run=dry_run)
    if as_json:
        emit(
            {
                "repo": repo,
                "revision": revision,
                "commit": pushed.commit,
                "commit_url": pushed.url,
                "changed": bool(pushed.sent or pushed.removed),
                "sent": list(pushed.sent),
                "removed": list(pushed.removed),
                "dry_run": dry_run,
            }
        )
        return
    if not (pushed.sent or pushed.removed):
        note(f"{repo} holds it already: nothing to push")
    for verb, names in (("send", pushed.sent), ("remove", pushed.removed)):
        for name in names:
            note(f"{'would ' if dry_run else ''}{verb} {name}")
    if pushed.url and not dry_run:
        print(pushed.url)
