"""The loopback hub serves the real client: what is pushed comes back exactly, and who may not is refused."""

import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import (
    CommitOperationAdd,
    HfApi,
    create_branch,
    create_commit,
    create_repo,
    create_tag,
    dataset_info,
    delete_repo,
    file_exists,
    get_session,
    hf_hub_download,
    hf_hub_url,
    list_repo_commits,
    list_repo_files,
    list_repo_refs,
    list_repo_tree,
    model_info,
    repo_exists,
    snapshot_download,
    update_repo_settings,
    upload_file,
    upload_folder,
    whoami,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from loopback_hub import STORAGE, LoopbackHub, environment

# it shows that the stand-in is a hub, and nothing of ptr_hf
pytestmark = pytest.mark.full

REPO = "lab/policy"


def contents(folder: str | Path) -> dict[str, bytes]:
    """Every file below a folder, but for the one that the hub itself adds and the client's own cache."""
    files = {p.relative_to(folder).as_posix(): p for p in Path(folder).rglob("*") if p.is_file()}
    return {name: p.read_bytes() for name, p in files.items() if not name.startswith((".gitattributes", ".cache"))}


def card(metadata: str) -> bytes:
    return f"---\n{metadata}\n---\n# Card\n".encode()


@pytest.mark.parametrize("repo_type", ["model", "dataset"])
def test_folder_comes_back_byte_for_byte(online: LoopbackHub, artifact: Path, tmp_path: Path, repo_type: str) -> None:
    create_repo(REPO, repo_type=repo_type)
    commit = upload_folder(repo_id=REPO, repo_type=repo_type, folder_path=artifact)
    assert contents(snapshot_download(REPO, repo_type=repo_type)) == contents(artifact)
    snapshot_download(REPO, repo_type=repo_type, revision=commit.oid, local_dir=tmp_path / "copy")
    assert contents(tmp_path / "copy") == contents(artifact)
    files = online.repo(REPO, repo_type).commits[commit.oid].files
    assert {name for name, file in files.items() if file.large} == {"model.safetensors"}
    stored = online.seen("^/storage/")
    assert [r.method for r in stored].count("PUT") == 1
    assert all(r.host == STORAGE and "Authorization" not in r.headers for r in stored)
    assert online.leaks == []
    assert all(r.status < 400 for r in online.requests)


def test_unchanged_files_are_neither_sent_nor_committed_again(online: LoopbackHub, artifact: Path) -> None:
    create_repo(REPO)
    first = upload_folder(repo_id=REPO, folder_path=artifact)
    assert upload_folder(repo_id=REPO, folder_path=artifact).oid == first.oid
    upload_file(repo_id=REPO, path_or_fileobj=artifact / "model.safetensors", path_in_repo="copy.safetensors")
    assert len(online.seen("^/storage/", "PUT")) == 1
    assert len(online.repo(REPO).commits) == 3


def test_branches_tags_and_commits_keep_what_they_named(online: LoopbackHub, artifact: Path) -> None:
    create_repo(REPO)
    old = upload_file(repo_id=REPO, path_or_fileobj=b"old", path_in_repo="sub folder/state.txt")
    create_tag(REPO, tag="v1.0")
    create_branch(REPO, branch="step/500")
    new = upload_file(repo_id=REPO, path_or_fileobj=b"new", path_in_repo="sub folder/state.txt")
    upload_file(repo_id=REPO, path_or_fileobj=b"branch", path_in_repo="sub folder/state.txt", revision="step/500")
    held = {"main": b"new", "v1.0": b"old", "step/500": b"branch", old.oid: b"old", new.oid: b"new"}
    for revision, content in held.items():
        assert Path(hf_hub_download(REPO, "sub folder/state.txt", revision=revision)).read_bytes() == content
    refs = list_repo_refs(REPO)
    assert {ref.name for ref in refs.branches} == {"main", "step/500"}
    assert [(ref.name, ref.target_commit) for ref in refs.tags] == [("v1.0", old.oid)]
    assert [commit.commit_id for commit in list_repo_commits(REPO)][:2] == [new.oid, old.oid]
    with pytest.raises(HfHubHTTPError, match="409"):
        create_tag(REPO, tag="v1.0")
    create_branch(REPO, branch="step/500", exist_ok=True)
    with pytest.raises(RevisionNotFoundError):
        snapshot_download(REPO, revision="v2.0")
    with pytest.raises(RevisionNotFoundError):
        upload_file(repo_id=REPO, path_or_fileobj=b"", path_in_repo="state.txt", revision="v2.0")


def test_files_are_listed_and_found(online: LoopbackHub, artifact: Path) -> None:
    create_repo(REPO)
    upload_folder(repo_id=REPO, folder_path=artifact)
    assert set(list_repo_files(REPO)) == {*contents(artifact), ".gitattributes"}
    entries = {entry.path: entry for entry in list_repo_tree(REPO)}
    assert "figures" in entries
    assert "figures/weights.txt" not in entries
    weights = entries["model.safetensors"]
    assert isinstance(weights, RepoFile)
    assert weights.lfs is not None
    assert weights.size == weights.lfs.size == (artifact / "model.safetensors").stat().st_size
    assert [entry.path for entry in list_repo_tree(REPO, "figures")] == ["figures/weights.txt"]
    infos = HfApi(endpoint=online.url).get_paths_info(REPO, ["figures", "config.json", "absent"])
    assert {info.path for info in infos} == {"figures", "config.json"}
    assert file_exists(REPO, "figures/weights.txt")
    assert not file_exists(REPO, "absent.json")
    with pytest.raises(RemoteEntryNotFoundError):
        hf_hub_download(REPO, "absent.json")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_ranges_are_served(online: LoopbackHub, artifact: Path, name: str) -> None:
    create_repo(REPO)
    upload_folder(repo_id=REPO, folder_path=artifact)
    whole, address = (artifact / name).read_bytes(), hf_hub_url(REPO, name)
    for asked, expected in (("2-5", whole[2:6]), ("7-", whole[7:]), ("-4", whole[-4:])):
        answer = get_session().get(address, headers={"Range": f"bytes={asked}"})
        assert (answer.status_code, answer.content) == (206, expected)
    assert get_session().get(address, headers={"Range": f"bytes={len(whole)}-"}).status_code == 416


def test_info_says_what_the_card_says(online: LoopbackHub, artifact: Path) -> None:
    create_repo(REPO, private=True)
    commit = upload_folder(repo_id=REPO, folder_path=artifact)
    info = model_info(REPO, files_metadata=True)
    assert (info.id, info.sha, info.private) == (REPO, commit.oid, True)
    assert (info.library_name, info.pipeline_tag) == ("lerobot", "robotics")
    expected = {
        "lerobot",
        "robotics",
        "post-training",
        "license:apache-2.0",
        "dataset:lab/points",
        "base_model:lab/base",
    }
    assert info.tags is not None
    assert expected <= set(info.tags)
    assert info.card_data is not None
    assert info.card_data.eval_results[0].metric_value == 62.5
    sizes = {sibling.rfilename: sibling.size for sibling in info.siblings or []}
    assert {name: len(content) for name, content in contents(artifact).items()}.items() <= sizes.items()
    assert model_info(REPO, revision=commit.oid).sha == commit.oid
    create_repo(REPO, repo_type="dataset")
    assert dataset_info(REPO).private is False


def test_private_repo_is_seen_by_its_owner_alone(online: LoopbackHub, artifact: Path, tmp_path: Path) -> None:
    create_repo(REPO, private=True)
    upload_folder(repo_id=REPO, folder_path=artifact)
    for token, status in ((False, 401), (online.stranger_token, 404)):
        for call in (model_info, snapshot_download, delete_repo):
            with pytest.raises(RepositoryNotFoundError) as caught:
                call(REPO, token=token)
            assert caught.value.response.status_code == status
        assert not repo_exists(REPO, token=token)
    with pytest.raises(HfHubHTTPError, match="401") as refused:
        model_info(REPO, token="hf_unknown")
    assert not isinstance(refused.value, RepositoryNotFoundError)
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        whoami("hf_unknown")
    assert contents(snapshot_download(REPO, token=online.read_token)) == contents(artifact)
    update_repo_settings(REPO, private=False)
    assert contents(snapshot_download(REPO, token=False, cache_dir=tmp_path)) == contents(artifact)


def test_writing_needs_the_right_token(online: LoopbackHub, artifact: Path) -> None:
    create_repo(REPO)
    for token, status in ((False, 401), (online.read_token, 403), (online.stranger_token, 403), ("hf_unknown", 401)):
        writer = HfApi(endpoint=online.url, token=token)
        for write in (
            lambda api: api.create_repo("lab/other"),
            lambda api: api.upload_folder(repo_id=REPO, folder_path=artifact / "figures"),
            lambda api: api.create_branch(REPO, branch="theirs"),
            lambda api: api.create_tag(REPO, tag="theirs"),
            lambda api: api.delete_repo(REPO),
        ):
            with pytest.raises(HfHubHTTPError) as caught:
                write(writer)
            assert caught.value.response.status_code == status
    assert set(online.repos) == {("model", REPO)}
    assert len(online.repo(REPO).commits) == 1


def test_commit_refused_unless_its_parent_is_the_head(online: LoopbackHub) -> None:
    create_repo(REPO)
    first = upload_file(repo_id=REPO, path_or_fileobj=b"1", path_in_repo="state.txt")
    upload_file(repo_id=REPO, path_or_fileobj=b"2", path_in_repo="state.txt", parent_commit=first.oid)
    with pytest.raises(HfHubHTTPError, match="A commit has happened since") as caught:
        upload_file(repo_id=REPO, path_or_fileobj=b"3", path_in_repo="state.txt", parent_commit=first.oid)
    assert caught.value.response.status_code == 412
    with pytest.raises(HfHubHTTPError, match="Pull requests are disabled"):
        upload_file(repo_id=REPO, path_or_fileobj=b"3", path_in_repo="state.txt", create_pr=True)
    assert Path(hf_hub_download(REPO, "state.txt")).read_bytes() == b"2"


def test_repos_are_created_once_and_deleted(online: LoopbackHub) -> None:
    address = create_repo("mine")
    assert (address.repo_id, address.repo_type) == ("ptr-tester/mine", "model")
    assert create_repo("ptr-tester/mine", exist_ok=True) == address
    with pytest.raises(HfHubHTTPError, match="409"):
        create_repo("ptr-tester/mine")
    delete_repo("ptr-tester/mine")
    assert not repo_exists("ptr-tester/mine")
    assert whoami()["name"] == "ptr-tester"


RESULT = """model-index:
- name: {name}
  results:
  - task: {{type: robotics}}
    dataset: {dataset}
    metrics: {metrics}"""
GOOD = {"name": "policy", "dataset": "{name: MT50, type: metaworld}", "metrics": "[{type: success, value: 0.5}]"}


@pytest.mark.parametrize(
    ("metadata", "complaint"),
    [
        ("license: my-own", '"license" must be one of'),
        ("license: other", '"license_name" is required'),
        ("tags: robotics\ndatasets: [1]", r'"datasets\[0\]" must be a string'),
        ("base_model: /home/me/base", '"base_model" with value .* is not valid'),
        ("license: [mit", "YAML Metadata Error"),
        ("- mit", "must be of type object"),
        ("model-index: {name: policy}", '"model-index" must be an array'),
        (RESULT.format(**{**GOOD, "name": "''"}), r'"model-index\[0\].name" is not allowed to be empty'),
        (RESULT.format(**{**GOOD, "dataset": "{name: MT50}"}), r'results\[0\].dataset.type" is required'),
        (RESULT.format(**{**GOOD, "dataset": "{name: MT50, type: Meta World}"}), "fails to match the required pattern"),
        (RESULT.format(**{**GOOD, "metrics": "[{type: success}]"}), r'metrics\[0\].value" is required'),
        (RESULT.format(**{**GOOD, "metrics": "[]"}), "at least one metric"),
    ],
)
def test_invalid_card_refused(online: LoopbackHub, metadata: str, complaint: str) -> None:
    create_repo(REPO)
    with pytest.raises(ValueError, match=complaint):
        upload_file(repo_id=REPO, path_or_fileobj=card(metadata), path_in_repo="README.md")
    assert online.seen("/api/validate-yaml")[-1].status == 400
    assert len(online.repo(REPO).commits) == 1


@pytest.mark.parametrize("metadata", [RESULT.format(**GOOD) + "\nlicense: mit", "license: [mit, apache-2.0]"])
def test_valid_card_accepted_without_a_warning(
    online: LoopbackHub, recwarn: pytest.WarningsRecorder, metadata: str
) -> None:
    create_repo(REPO)
    upload_file(repo_id=REPO, path_or_fileobj=card(metadata), path_in_repo="README.md")
    assert model_info(REPO).card_data is not None
    assert [w for w in recwarn if "README.md" in str(w.message)] == []


def test_card_without_metadata_is_warned_about(online: LoopbackHub) -> None:
    create_repo(REPO)
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        upload_file(repo_id=REPO, path_or_fileobj=b"# Card\n", path_in_repo="README.md")


def test_token_in_a_file_is_noticed(online: LoopbackHub) -> None:
    """So that `hub.leaks == []` elsewhere says something."""
    create_repo(REPO)
    state = b"\0arguments" + online.token.encode()
    for name in ("state.txt", "training_args.bin"):
        create_commit(
            REPO, [CommitOperationAdd(name, state if name.endswith("bin") else state[1:])], commit_message="x"
        )
    assert len(online.leaks) == 2
    get_session().get(online.url, params={"token": online.token})
    assert online.leaks[-1] == "GET /: address"


def test_process_with_the_environment_uses_the_hub(hub: LoopbackHub, tmp_path: Path) -> None:
    script = f"""if True:
        from pathlib import Path
        from huggingface_hub import create_repo, hf_hub_download, upload_file
        create_repo({REPO!r}, private=True)
        upload_file(repo_id={REPO!r}, path_or_fileobj=bytes(100), path_in_repo="model.safetensors")
        assert Path(hf_hub_download({REPO!r}, "model.safetensors")).read_bytes() == bytes(100)"""
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment(hub, tmp_path / "home"), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert hub.repo(REPO).private
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
    assert hub.leaks == []
