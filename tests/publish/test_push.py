"""Pushing: one commit of a verified artifact, only what differs, and a retry that goes on."""

import json

import pytest
from conftest import make_artifact, refused
from stand_in_hub import REPO, TOKEN, Fault, Repository

from cosyq.artifact.edit import put_voice
from cosyq.artifact.manifest import Manifest
from cosyq.artifact.reader import open_artifact
from cosyq.recipe import load_recipe

STAGES = ["flow.safetensors", "llm.safetensors", "vocoder.safetensors"]
PLAIN = sorted([*STAGES, "README.md", "manifest.json", "recipe.yaml", "tokenizer.json"])
VOICE = "voices/golden.safetensors"


@pytest.fixture
def spoken(scratch_artifact, voice):
    """An artifact with a voice."""
    return put_voice(open_artifact(scratch_artifact), "golden", voice.to_bytes()).folder


def pushed(result):
    code, out, err = result
    assert code == 0, err
    return json.loads(out)


def uploads(hub):
    return [request for request in hub.requests if request.startswith("PUT /large/")]


def test_a_push_is_one_commit_and_the_second_is_none(hub, cli, spoken):
    first = pushed(cli("push", spoken, REPO, "--json"))
    repository = hub.repositories[REPO]
    assert sorted(first["sent"]) == PLAIN
    assert first["changed"]
    assert first["commit_url"] == f"{hub.address}/{REPO}/commit/{first['commit']}"
    assert repository.branches == {"main": first["commit"]}
    assert len(repository.commits) == 2  # the Hub's own, and the push
    assert sorted(repository.head()) == [".gitattributes", *PLAIN]
    hub.requests.clear()
    again = pushed(cli("push", spoken, REPO, "--json"))
    assert again == first | {"changed": False, "sent": []}
    assert len(repository.commits) == 2
    assert all(request.startswith("GET ") for request in hub.requests)
    code, out, err = cli("push", spoken, REPO)
    assert (code, out) == (0, first["commit_url"] + "\n")
    assert "nothing to push" in err


def test_voices_are_pushed_when_asked_for_and_leave_no_trace_otherwise(hub, cli, spoken):
    """Neither a voice's file nor what the recipe says of it; the Hub's other files are left alone."""
    recipe = spoken / "recipe.yaml"
    assert "希望" in recipe.read_text()  # the shipped recipe's voice, which this artifact was built without
    pushed(cli("push", spoken, REPO, "--json"))
    everything = b"".join(hub.repositories[REPO].head().values())
    for trace in ("golden", "hello there", "希望", "voices/", "zero_shot_prompt"):
        assert trace.encode() not in everything
    hub.repositories[REPO].head()["sample.wav"] = b"RIFF"

    hub.requests.clear()
    added = pushed(cli("push", spoken, REPO, "--json", "--with-voices"))
    assert sorted(added["sent"]) == ["README.md", "manifest.json", "recipe.yaml", VOICE]
    assert len(uploads(hub)) == 1
    head = hub.repositories[REPO].head()
    assert head[VOICE] == (spoken / VOICE).read_bytes()
    assert head["manifest.json"] == (spoken / "manifest.json").read_bytes()
    assert head["recipe.yaml"] == recipe.read_bytes()
    assert b"`golden`" in head["README.md"]

    gone = pushed(cli("push", spoken, REPO, "--json"))
    assert gone["removed"] == [VOICE]
    assert len(hub.repositories[REPO].messages) == 4
    assert sorted(hub.repositories[REPO].head()) == sorted([".gitattributes", "sample.wav", *PLAIN])


def test_the_voices_of_a_recipe(hub, cli, voice, tmp_path):
    """Nor does the resolved recipe, in manifest and card, name those that the artifact was built with."""
    (tmp_path / "ready.safetensors").write_bytes(voice.to_bytes())
    artifact = make_artifact(tmp_path / "a", "int8", f"voices=[{{name: anna, file: {tmp_path}/ready.safetensors}}]")
    (sha256,) = (entry["sha256"] for entry in open_artifact(artifact).manifest.recipe["voices"])
    pushed(cli("push", artifact, REPO, "--json"))
    everything = b"".join(hub.repositories[REPO].head().values())
    assert b"anna" not in everything
    assert sha256.encode() not in everything
    assert cli("pull", REPO, "-o", tmp_path / "b")[0] == 0
    pushed(cli("push", artifact, REPO, "--json", "--with-voices"))
    assert cli("pull", REPO, "-o", tmp_path / "c")[0] == 0
    assert (tmp_path / "c" / "voices" / "anna.safetensors").is_file()


def test_the_recipe_that_goes_along_is_the_resolved_one(hub, cli, artifact_of, tmp_path):
    artifact = artifact_of("int8", "stages.llm.weights=bf16")
    pushed(cli("push", artifact, REPO, "--json"))
    head = hub.repositories[REPO].head()
    assert head["recipe.yaml"] != (artifact / "recipe.yaml").read_bytes()
    (tmp_path / "recipe.yaml").write_bytes(head["recipe.yaml"])
    manifest = Manifest.from_json(head["manifest.json"].decode())
    # A folder's path is no part of it, so a source has to be given.
    loaded = load_recipe(tmp_path / "recipe.yaml", [f"source.path={tmp_path}"])
    assert loaded.resolved() == manifest.recipe
    assert loaded.stages.llm.weights == "bf16"
    assert loaded.digest() == manifest.recipe_sha256  # it had no voices


def test_only_what_differs_is_sent(hub, cli, spoken, artifact_of):
    pushed(cli("push", spoken, REPO, "--json"))
    hub.requests.clear()
    other = pushed(cli("push", artifact_of("int8", "stages.llm.weights=bf16"), REPO, "--json"))
    # Every stage's header has the recipe's hash; the tokenizer has not.
    assert sorted(other["sent"]) == sorted(set(PLAIN) - {"tokenizer.json"})
    hub.requests.clear()
    (spoken / "eval.json").write_text(json.dumps({"about": "Fifty sentences.", "columns": ["WER"], "rows": [[0.1]]}))
    back = pushed(cli("push", spoken, REPO, "--json"))
    assert sorted(back["sent"]) == sorted({*PLAIN, "eval.json"} - {"tokenizer.json"})
    assert uploads(hub) == []  # those contents the Hub has had before
    assert "Fifty sentences." in hub.repositories[REPO].head()["README.md"].decode()


def test_a_dry_run_changes_nothing(hub, cli, spoken):
    would = pushed(cli("push", spoken, REPO, "--dry-run", "--json"))
    assert sorted(would["sent"]) == PLAIN
    assert would["commit"] is would["commit_url"] is None
    assert hub.repositories == {}
    done = pushed(cli("push", spoken, REPO, "--json"))
    code, out, err = cli("push", spoken, REPO, "--dry-run", "--with-voices")
    assert (code, out) == (0, "")
    assert f"would send {VOICE}" in err
    assert pushed(cli("push", spoken, REPO, "--dry-run", "--revision", "next", "--json"))["commit"] == done["commit"]
    assert list(hub.repositories[REPO].branches) == ["main"]
    assert all(
        r.startswith("GET ") for r in hub.requests[hub.requests.index(f"POST /api/models/{REPO}/commit/main") + 1 :]
    )


def test_branches_and_privacy(hub, cli, spoken):
    first = pushed(cli("push", spoken, REPO, "--private", "--revision", "v1/next", "--json"))
    repository = hub.repositories[REPO]
    assert repository.private
    assert repository.branches["v1/next"] == first["commit"] != repository.branches["main"]
    assert list(repository.head("main")) == [".gitattributes"]
    pushed(cli("push", spoken, REPO, "--json"))
    assert repository.private  # it stays as it is
    repository.private = False
    count = len(repository.commits)
    refused(cli("push", spoken, REPO, "--private", "--with-voices"), 5, f"{REPO}: is public")
    assert len(repository.commits) == count


@pytest.mark.parametrize("part_bytes", [1, 100_000], ids=["byte", "large"])
def test_large_files_in_parts(hub, cli, artifact_of, spoken, part_bytes):
    biggest = (spoken / "vocoder.safetensors").stat().st_size
    hub.part_bytes = part_bytes if part_bytes > 1 else -(-biggest // 2)
    pushed(cli("push", spoken, REPO, "--json"))
    for name in STAGES:
        assert hub.repositories[REPO].head()[name] == (spoken / name).read_bytes()
    assert len(uploads(hub)) > len(STAGES)


# ---- what is refused


@pytest.mark.parametrize(
    ("token", "repo", "parts"),
    [
        (None, REPO, ("HF_TOKEN is not set", "settings/tokens")),
        ("", REPO, ("HF_TOKEN is not set",)),
        ("hf_two words", REPO, ("HF_TOKEN: not a token",)),
        ("hf_nonsense", REPO, ("the Hub answered 401", "valid HF_TOKEN")),
        ("hf_reader", REPO, ("the Hub answered 403", "write access")),
        (TOKEN, "other/new", ("the Hub answered 403", "a repository of yours")),
        (TOKEN, "other/public", ("the Hub answered 403", "a repository of yours")),
        (TOKEN, "other/private", ("the Hub answered 403", "a repository of yours")),
    ],
)
def test_who_may_not(hub, cli, spoken, monkeypatch, token, repo, parts):
    for name, private in (("public", False), ("private", True)):
        hub.repositories[f"other/{name}"] = Repository(private=private)
        hub.repositories[f"other/{name}"].commit("main", {})
    monkeypatch.delenv("HF_TOKEN")
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    refused(cli("push", spoken, repo), 5, *parts)
    code, out, _ = cli("push", spoken, repo, "--json")
    assert code == 5
    assert json.loads(out)["error"]["exit_code"] == 5
    assert all(len(r.commits) == 1 for r in hub.repositories.values())
    assert uploads(hub) == []


def test_what_is_no_repository_and_what_is_no_artifact(hub, cli, spoken):
    for repo in ("tiny", "../tiny", "me/tiny/more", "me/ti ny", f"{REPO}@main", "-x/y"):
        assert cli("push", "--", spoken, repo)[0] == 2
    refused(cli("push", spoken, "me/ti--ny"), 2, "not a repository's name")
    (spoken / "eval.json").write_text("[1, 2]")
    refused(cli("push", spoken, REPO), 3, "eval.json: not a report")
    (spoken / "eval.json").unlink()
    data = bytearray((spoken / "llm.safetensors").read_bytes())
    data[-1] ^= 1
    (spoken / "llm.safetensors").write_bytes(data)
    refused(cli("push", spoken, REPO), 3, "llm.safetensors: sha256 is")
    assert hub.requests == []


# ---- trouble on the way

PLACES = [
    ("GET", f"/api/models/{REPO}/revision/"),
    ("POST", "/api/repos/create"),
    ("GET", f"/api/models/{REPO}/tree/"),
    ("POST", "/api/validate-yaml"),
    ("POST", "/preupload/"),
    ("POST", "/info/lfs/objects/batch"),
    ("PUT", "/large/"),
    ("POST", "/commit/"),
]


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize(("method", "part"), PLACES, ids=[part.strip("/").split("/")[-1] for _, part in PLACES])
def test_a_hub_in_trouble(hub, cli, spoken, method, part, status):
    """However long it lasts: one line, nothing committed. Afterwards the same command does it."""
    hub.faults = [Fault(method, part, status)]
    # The client reads the answer to this one before it looks at its status.
    what = "the Hub answered what is no answer" if "validate" in part else f"the Hub answered {status}"
    refused(cli("push", spoken, REPO), 5, what, "run it again")
    assert all(len(r.commits) == 1 for r in hub.repositories.values())
    hub.faults = []
    assert sorted(pushed(cli("push", spoken, REPO, "--json"))["sent"]) == PLAIN


def test_uploads_outlive_trouble_that_passes(hub, cli, spoken):
    hub.faults = [Fault("PUT", "/large/", 503, times=2), Fault("PUT", "/large/", cut=1000, times=2)]
    pushed(cli("push", spoken, REPO, "--json"))
    assert len(uploads(hub)) == 4 + len(STAGES)


@pytest.mark.parametrize("cut", [0, 1, 65_537, 200_000])
def test_a_retry_sends_only_what_did_not_arrive(hub, cli, spoken, cut):
    """One file's connection breaks off after so many bytes, every time."""
    broken = Manifest.from_json((spoken / "manifest.json").read_text()).files["llm.safetensors"].sha256
    hub.faults = [Fault("PUT", broken, cut=cut)]
    refused(cli("push", spoken, REPO), 5, "the Hub is out of reach", "run it again: it goes on where it stopped")
    assert len(hub.repositories[REPO].commits) == 1
    hub.faults, arrived = [], set(hub.large)
    hub.requests.clear()
    pushed(cli("push", spoken, REPO, "--json"))
    assert uploads(hub) == [f"PUT /large/{oid}" for oid in hub.large if oid not in arrived]
    assert f"PUT /large/{broken}" in uploads(hub)
    assert len(hub.repositories[REPO].commits) == 2


def test_a_connection_cut_at_any_request(hub, cli, spoken):
    """The nth request of a push is cut, for every n: it still ends well, or says so in a line and the retry ends well.

    Either way the repository has what it would have had, in one commit, also where that commit's answer was lost.
    """
    pushed(cli("push", spoken, "me/whole", "--json"))
    expected, count = hub.repositories["me/whole"].head(), len(hub.requests)
    assert count > 8
    failed = set()
    for n in range(count):
        repo = f"me/cut{n}"
        hub.large.clear()
        hub.requests.clear()

        def cut(request, n=n):
            hub.faults = [Fault(*request.split(" ", 1), cut=7, times=1)] if len(hub.requests) == n + 1 else []

        hub.hook = cut
        code, _, err = cli("push", spoken, repo)
        broken = hub.requests[n].replace(repo, REPO)
        hub.hook = lambda _: None
        hub.faults = []
        assert code in (0, 5), err
        if code == 5:
            failed.add(broken)
            assert "the Hub is out of reach" in err
        pushed(cli("push", spoken, repo, "--json"))
        head = hub.repositories[repo].head()
        assert {k: v for k, v in head.items() if k != "README.md"} == {
            k: v for k, v in expected.items() if k != "README.md"
        }
        assert len(hub.repositories[repo].commits) == 2, broken
    assert f"POST /api/models/{REPO}/commit/main" in failed


def test_another_commit_in_between(hub, cli, spoken):
    pushed(cli("push", spoken, REPO, "--json"))
    repository = hub.repositories[REPO]

    def meanwhile(request):
        if request.endswith("/validate-yaml"):
            repository.commit("main", repository.head() | {"theirs.txt": b"mine!"})

    hub.hook = meanwhile
    refused(cli("push", spoken, REPO, "--with-voices"), 5, "the Hub answered 412", "push again")
    hub.hook = lambda _: None
    assert VOICE not in repository.head()
    assert pushed(cli("push", spoken, REPO, "--with-voices", "--json"))["changed"]
    assert repository.head()["theirs.txt"] == b"mine!"
