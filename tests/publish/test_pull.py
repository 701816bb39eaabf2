"""Pulling, and naming an artifact of the Hub wherever one is asked for: pinned, cached, offline."""

import json
from dataclasses import replace

import pytest
from conftest import refused
from stand_in_hub import REPO, Fault, Repository

import cosyq
from cosyq.artifact.manifest import Manifest
from cosyq.artifact.reader import MAX_MANIFEST
from cosyq.errors import NetworkError, UsageError


@pytest.fixture
def there(hub, cli, artifact_of):
    """The int8 artifact on the Hub; its commit."""
    return push(hub, cli, artifact_of("int8"))


def push(hub, cli, artifact, *options):
    code, out, err = cli("push", artifact, REPO, "--json", *options)
    assert code == 0, err
    hub.requests.clear()
    return json.loads(out)["commit"]


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def head(hub, branch="main"):
    return {name: content for name, content in hub.repositories[REPO].head(branch).items() if name[0] != "."}


def test_pull(hub, cli, there, tmp_path, monkeypatch):
    """What was pushed, card and all, and of the repository's other files nothing."""
    expected = head(hub)
    hub.repositories[REPO].head()["sample.wav"] = b"RIFF"
    code, out, _ = cli("pull", REPO, "-o", tmp_path / "a", "--json")
    assert code == 0
    report = json.loads(out)
    assert report["commit"] == there
    assert report["reference"] == f"hf://{REPO}@{there}"
    assert files(tmp_path / "a") == expected
    assert not any(path.is_symlink() for path in (tmp_path / "a").rglob("*"))
    assert cli("verify", tmp_path / "a")[0] == 0
    refused(cli("pull", REPO, "-o", tmp_path / "a"), 3, "exists already")
    assert cli("pull", f"hf://{REPO}@main", "-o", tmp_path / "a", "--force")[0] == 0
    assert hub.asked.count("llm.safetensors") == 1
    monkeypatch.chdir(tmp_path)
    assert cli("pull", REPO)[1] == "artifacts/tiny\n"
    again = json.loads(cli("push", "artifacts/tiny", REPO, "--json")[1])
    assert not again["changed"]  # what comes back is what went


def test_revisions(hub, cli, there, artifact_of, tmp_path):
    other = push(hub, cli, artifact_of("nf4"), "--revision", "small/er")
    assert other != there
    for name, revision, branch in (("a", "small/er", "small/er"), ("b", other, "small/er"), ("c", there, "main")):
        assert cli("pull", f"{REPO}@{revision}", "-o", tmp_path / name)[0] == 0
        assert files(tmp_path / name) == head(hub, branch)
    refused(cli("pull", f"{REPO}@none", "-o", tmp_path / "d"), 5, f"{REPO}@none: the Hub answered 404")


def test_every_command_that_takes_an_artifact(hub, cli, there, tmp_path, monkeypatch):
    reference = f"hf://{REPO}"
    pinned = f"hf://{REPO}@{there}"
    code, out, err = cli("inspect", reference, "--json")
    assert (code, json.loads(out)["schema"]) == (0, 1)
    assert err == f"using {pinned}\n"
    assert cli("verify", reference)[0] == 0
    sound = ("-o", tmp_path / "x.wav", "--device", "cpu", "--seed", "3")
    assert cli("synth", "hello", "-a", reference, *sound)[0] == 0
    monkeypatch.setenv("COSYQ_ARTIFACT", pinned)
    code, out, err = cli("voice", "list", "--json")
    assert (code, json.loads(out), err) == (0, {"voices": []}, f"using {pinned}\n")
    assert cli("push", reference, "me/copy")[0] == 0
    assert hub.repositories["me/copy"].head()["llm.safetensors"] == head(hub)["llm.safetensors"]
    assert hub.asked.count("llm.safetensors") == 1


def test_verify_against_the_hub(hub, cli, there, offline, artifact_of, tmp_path):
    """Every file, the manifest and the card too, against the Hub's own hashes; without a Hub where it is cached."""
    pinned = f"hf://{REPO}@{there}"
    assert cli("pull", REPO, "-o", tmp_path / "a")[0] == 0
    hub.requests.clear()
    code, out, _ = cli("verify", tmp_path / "a", "--hub", f"{REPO}@{there}", "--json")
    assert (code, json.loads(out)["hub"]) == (0, pinned)
    assert hub.requests == []
    err = cli("verify", tmp_path / "a", "--hub", REPO)[2]
    assert f"5 files are what the manifest says\n7 files are what the Hub says of {pinned}\n" in err
    with (tmp_path / "a" / "README.md").open("a") as card:
        card.write("Trust me.")
    refused(cli("verify", tmp_path / "a", "--hub", REPO), 3, f"differs from {pinned} in README.md")
    assert cli("verify", tmp_path / "a")[0] == 0
    refused(cli("verify", artifact_of("nf4"), "--hub", pinned), 3, "differs from", "manifest.json", "llm.safetensors")
    (tmp_path / "a" / "eval.json").write_text('{"about": "x", "columns": ["a"], "rows": []}')
    refused(cli("verify", tmp_path / "a", "--hub", pinned), 3, f"{pinned} has no eval.json")
    offline()
    code, out, _ = cli("verify", f"hf://{REPO}", "--json")
    assert (code, json.loads(out)["hub"]) == (0, pinned)
    snapshot = next((tmp_path / "cache").glob("models--*/snapshots/*/manifest.json")).parent
    forged = replace(Manifest.from_json((snapshot / "manifest.json").read_text()), device="another")
    (snapshot / "manifest.json").write_text(forged.to_json())  # which agrees with itself
    refused(cli("verify", f"hf://{REPO}"), 3, f"differs from {pinned} in manifest.json")


def test_where_the_cache_has_no_hashes_the_hub_is_asked(hub, cli, there, tmp_path, monkeypatch):
    """As on a system without symbolic links, where the cache has files by their names alone."""
    assert cli("verify", f"hf://{REPO}")[0] == 0
    snapshot = next((tmp_path / "cache").glob("models--*/snapshots/*/manifest.json")).parent
    for path in snapshot.iterdir():
        data = path.read_bytes()
        path.unlink()
        path.write_bytes(data)
    hub.requests.clear()
    assert cli("verify", f"hf://{REPO}@{there}")[0] == 0
    assert hub.requests == [f"GET /api/models/{REPO}/tree/{there}"]
    (snapshot / "README.md").write_text("Trust me.")
    refused(cli("verify", f"hf://{REPO}@{there}"), 3, "differs from", "README.md")


def test_from_python(hub, there, offline):
    speech = cosyq.load(f"hf://{REPO}", device="cpu").synthesize("hello", seed=3)
    assert hub.asked.count("llm.safetensors") == 1
    offline()
    again = cosyq.load(f"hf://{REPO}@{there}", device="cpu").synthesize("hello", seed=3)
    assert (again.samples == speech.samples).all()
    with pytest.raises(NetworkError, match="me/other@main: the Hub is out of reach"):
        cosyq.load("hf://me/other")
    with pytest.raises(UsageError, match="expected OWNER/NAME"):
        cosyq.load("hf://me")


def test_what_is_cached_needs_no_hub(hub, cli, there, artifact_of, offline):
    pinned, moving = f"hf://{REPO}@{there}", f"hf://{REPO}"
    assert cli("verify", moving)[0] == 0
    hub.requests.clear()
    assert cli("verify", pinned)[0] == 0
    assert hub.requests == []  # a commit does not change
    newer = push(hub, cli, artifact_of("nf4"))
    hub.faults = [Fault("HEAD", "/resolve/", 503)]
    assert cli("verify", moving)[2].startswith(f"using {pinned}\n")  # the Hub cannot say that there is a newer one
    hub.faults = []
    assert cli("verify", moving)[2].startswith(f"using hf://{REPO}@{newer}\n")
    assert cli("verify", pinned)[2].startswith(f"using {pinned}\n")
    offline()
    hub.requests.clear()
    assert cli("verify", pinned)[0] == 0
    assert cli("verify", moving)[2].startswith(f"using hf://{REPO}@{newer}\n")
    assert hub.requests == []
    refused(cli("verify", "hf://me/other"), 5, "the Hub is out of reach", "name a local folder")


def test_the_cache_is_not_changed(hub, cli, there):
    audio = "tests/golden/audio/zero_shot_prompt.wav"
    for command in (("add", "me", "--audio", audio), ("remove", "me")):
        refused(cli("voice", *command, "-a", f"hf://{REPO}"), 2, "not changed in place", "`cosyq pull`")
    assert hub.requests == []


def test_who_may_not_read(hub, cli, there, tmp_path, monkeypatch):
    hub.repositories[REPO].private = True
    for token, code in (("hf_other", 404), ("", 401), ("hf_nonsense", 401)):
        monkeypatch.setenv("HF_TOKEN", token)
        refused(cli("pull", REPO, "-o", tmp_path / "a"), 5, f"the Hub answered {code}", "HF_TOKEN")
    for name in ("tiny", "me/tiny@", "me/tiny@a b", "hf://", "https://huggingface.co/me/tiny", "me/tiny@../x"):
        refused(cli("pull", name, "-o", tmp_path / "a"), 2, "expected OWNER/NAME")
    assert not (tmp_path / "a").exists()


def test_what_is_no_artifact(hub, cli, there, tmp_path):
    def refuse(code, *parts):
        refused(cli("pull", REPO, "-o", tmp_path / "a"), code, *parts)
        assert not (tmp_path / "a").exists()

    repository = hub.repositories[REPO]
    whole = dict(repository.head())
    damaged = whole["llm.safetensors"][:-1] + bytes([whole["llm.safetensors"][-1] ^ 1])
    repository.commit("main", whole | {"llm.safetensors": damaged})
    refuse(3, "llm.safetensors: sha256 is")
    repository.commit("main", {k: v for k, v in whole.items() if k != "flow.safetensors"})
    refuse(5, "the repository lacks flow.safetensors")
    repository.commit("main", whole | {"manifest.json": b"{}"})
    refuse(3, "not a usable manifest")
    hub.asked.clear()
    repository.commit("main", whole | {"flow.safetensors": bytes(MAX_MANIFEST + sum(map(len, whole.values())))})
    refuse(5, "bytes, where at most")
    assert hub.asked == []
    repository.commit("main", whole | {"manifest.json": bytes(MAX_MANIFEST + 1)})
    refuse(5, f"manifest.json has {MAX_MANIFEST + 1} bytes")
    repository.commit("main", {"config.json": b"{}"})
    refuse(5, "the Hub answered 404")
    assert hub.asked == []


# ---- trouble on the way


@pytest.mark.parametrize("cut", [0, 499, 500, 100_001])
def test_a_download_goes_on_where_it_broke_off(hub, cli, there, tmp_path, monkeypatch, cut):
    """Twice, after so many bytes of a file. The client keeps whole blocks, here of 500 bytes."""
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 500)
    hub.faults = [Fault("GET", "/llm.safetensors", cut=cut, times=2)]
    assert cli("pull", REPO, "-o", tmp_path / "a")[0] == 0
    assert files(tmp_path / "a") == head(hub)
    kept = cut // 500 * 500
    assert hub.ranges == ([f"llm.safetensors {kept}", f"llm.safetensors {2 * kept}"] if kept else [])
    assert hub.sent == sum(map(len, head(hub).values())) - 2 * kept


def test_a_retry_fetches_only_what_is_missing(hub, cli, there, tmp_path):
    hub.faults = [Fault("GET", "/llm.safetensors", cut=0)]
    code, _, err = cli("pull", REPO, "-o", tmp_path / "a")
    assert (code, err.count("\n")) == (5, 1)
    assert "the Hub is out of reach" in err
    assert "run it again: it goes on where it stopped" in err
    assert list(tmp_path.glob("*a*")) == [tmp_path / "cache"]
    hub.faults, arrived = [], [name for name in hub.asked if name != "llm.safetensors"]
    assert {"manifest.json", "tokenizer.json"} <= set(arrived)
    hub.asked.clear()
    assert cli("pull", REPO, "-o", tmp_path / "a")[0] == 0
    assert "llm.safetensors" in hub.asked
    assert not set(arrived) & set(hub.asked)
    assert files(tmp_path / "a") == head(hub)


def test_a_connection_cut_at_any_request(hub, cli, there, tmp_path):
    """The nth request is cut: the pull ends well or says so in a line, and then leaves nothing; a retry ends well."""
    assert cli("pull", REPO, "-o", tmp_path / "whole")[0] == 0
    count = len(hub.requests)
    outcomes = set()
    for n in range(count):
        name = f"me/copy{n}"
        hub.repositories[name] = Repository(commits=hub.repositories[REPO].commits, branches={"main": there})
        hub.requests.clear()

        def cut(request, n=n):
            hub.faults = [Fault(*request.split(" ", 1), cut=9, times=1)] if len(hub.requests) == n + 1 else []

        hub.hook = cut
        folder = tmp_path / f"cut{n}"
        code, _, err = cli("pull", name, "-o", folder)
        outcomes.add(code)
        assert code in (0, 5), err
        assert folder.exists() == (code == 0)
        hub.hook = lambda _: None
        hub.faults = []
        if code:
            assert cli("pull", name, "-o", folder)[0] == 0
        assert files(folder) == head(hub)
    assert outcomes == {0, 5}


@pytest.mark.parametrize("status", [429, 500, 503])
@pytest.mark.parametrize(("method", "part"), [("HEAD", "manifest.json"), ("GET", "/tree/"), ("GET", "/flow.safe")])
def test_a_hub_in_trouble(hub, cli, there, tmp_path, method, part, status):
    hub.faults = [Fault(method, part, status)]
    refused(cli("pull", REPO, "-o", tmp_path / "a"), 5, f"the Hub answered {status}", "run it again")
    assert not (tmp_path / "a").exists()
    hub.faults = []
    assert cli("pull", REPO, "-o", tmp_path / "a")[0] == 0


def test_reports_come_along(hub, cli, scratch_artifact, tmp_path):
    (scratch_artifact / "bench.json").write_text(json.dumps({"about": "x", "columns": ["a"], "rows": [[1]]}))
    push(hub, cli, scratch_artifact)
    assert cli("pull", REPO, "-o", tmp_path / "a")[0] == 0
    assert (tmp_path / "a" / "bench.json").read_bytes() == (scratch_artifact / "bench.json").read_bytes()
    assert "bench.json" not in Manifest.from_json((tmp_path / "a" / "manifest.json").read_text()).files
