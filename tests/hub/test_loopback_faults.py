"""What the real client does when a hub fails: what it repeats by itself, what it raises, and that nothing is lost.

Pushing is create_repo, validate-yaml, preupload, the LFS batch, the storage, the LFS verification, the commit. The client
repeats the middle four up to five times and none of the others; the error of a large file comes wrapped in a RuntimeError.
"""

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
import pytest
from hub_handler import Kind
from huggingface_hub import constants, create_repo, snapshot_download, upload_folder
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from loopback_hub import LoopbackHub
from safetensors.numpy import save_file
from test_loopback_hub import REPO, contents

# it shows that the stand-in is a hub, and nothing of ptr_hf
pytestmark = pytest.mark.full

CREATE, VALIDATE, COMMIT = "^/api/repos/create$", "^/api/validate-yaml$", "/commit/main$"
PREUPLOAD, BATCH, STORAGE, VERIFY = "/preupload/main$", "/lfs/objects/batch$", "^/storage/", "/lfs/verify$"
PUSH = (CREATE, VALIDATE, PREUPLOAD, BATCH, STORAGE, VERIFY, COMMIT)
REPEATED, WRAPPED = (PREUPLOAD, BATCH, STORAGE, VERIFY), (STORAGE, VERIFY)
KINDS: tuple[Kind, ...] = (500, 503, 429, 401, 403, 412, "timeout", "cut", "reset", "lost")
TRANSIENT = frozenset({500, 503, 429, "timeout", "cut", "reset", "lost"})
BROKEN = (httpx.NetworkError, httpx.RemoteProtocolError)
BACKOFF = [1, 2, 4, 8, 8]

INFO, TREE, HEAD, SMALL = "/revision/main$", "/tree/", "/resolve/", "/resolve/.*/config.json$"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that is quickly pushed: 40 kB of weights (a large file by its suffix), a configuration and a card."""
    folder = tmp_path_factory.mktemp("small")
    save_file({"weights": np.arange(10_000, dtype=np.float32)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"type": "act", "chunk_size": 8}))
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Card\n")
    return folder


def push(folder: Path) -> None:
    create_repo(REPO, exist_ok=True)
    upload_folder(repo_id=REPO, folder_path=folder)


def pushed(hub: LoopbackHub) -> dict[str, bytes]:
    """What the head of main holds, but for the file that the hub adds."""
    files = hub.repo(REPO).at("main").files
    return {name: file.content for name, file in files.items() if name != ".gitattributes"}


def check_error(error: BaseException | None, kind: Kind) -> None:
    """That an error says which kind of fault it was."""
    if isinstance(kind, int):
        assert isinstance(error, HfHubHTTPError)
        assert error.response.status_code == kind
    elif kind == "timeout":
        assert isinstance(error, httpx.ReadTimeout)
    else:
        assert isinstance(error, BROKEN)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stage", PUSH)
def test_push_fails_for_good(
    online: LoopbackHub,
    small: Path,
    waits: list[float],
    impatient: Callable[[str, int | None], None],
    stage: str,
    kind: Kind,
) -> None:
    impatient(stage, None if kind == "timeout" else 0)
    fault = online.fail(stage, times=None, kind=kind)
    with pytest.raises(Exception) as caught:  # noqa: PT011 (what it is, is checked below)
        push(small)
    if (stage, kind) == (VALIDATE, 503):
        # it reads the answer as JSON before it looks at the status, and a gateway answers in HTML
        assert isinstance(caught.value, json.JSONDecodeError)
    elif stage in WRAPPED:
        assert type(caught.value) is RuntimeError
        assert "model.safetensors" in str(caught.value)
        check_error(caught.value.__cause__, kind)
    else:
        check_error(caught.value, kind)
    repeated = stage in REPEATED and kind in TRANSIENT
    assert fault.hits == (6 if repeated else 1)
    assert waits == (BACKOFF if repeated else [])
    # a commit, and the creation of a repo, may have happened although the client heard nothing of it
    assert online.seen(COMMIT) == [] or stage == COMMIT
    unknown = (stage, kind) == (COMMIT, "lost")
    assert ((("model", REPO) in online.repos) and pushed(online) == contents(small)) == unknown
    # the same command again ends in the same state as if nothing had gone wrong
    online.heal()
    impatient(stage, 0)
    push(small)
    assert pushed(online) == contents(small)
    assert len(online.repo(REPO).commits) == 2
    assert online.leaks == []


@pytest.mark.parametrize(
    ("stage", "kind"), [*itertools.product(REPEATED, [500, 503, 429, "cut", "reset", "lost"]), (STORAGE, "timeout")]
)
def test_push_survives_a_fault_that_passes(
    online: LoopbackHub,
    small: Path,
    waits: list[float],
    impatient: Callable[[str, int | None], None],
    stage: str,
    kind: Kind,
) -> None:
    impatient(stage, 2 if kind == "timeout" else 0)
    fault = online.fail(stage, times=2, kind=kind)
    push(small)
    assert fault.hits == 2
    assert waits == [1, 2]
    assert pushed(online) == contents(small)
    assert online.leaks == []


def test_large_file_sent_before_a_failed_commit_is_not_sent_again(online: LoopbackHub, artifact: Path) -> None:
    create_repo(REPO)
    online.fail(COMMIT, "POST", kind=500)
    with pytest.raises(HfHubHTTPError, match="500"):
        upload_folder(repo_id=REPO, folder_path=artifact)
    upload_folder(repo_id=REPO, folder_path=artifact)
    assert len(online.seen(STORAGE, "PUT")) == 1
    assert contents(snapshot_download(REPO)) == contents(artifact)


def test_large_upload_cut_half_way_is_sent_whole_again(online: LoopbackHub, artifact: Path, waits: list[float]) -> None:
    create_repo(REPO)
    online.fail(STORAGE, "PUT", kind="cut")
    upload_folder(repo_id=REPO, folder_path=artifact)
    assert waits == [1]
    assert [r.status for r in online.seen(STORAGE, "PUT")] == [0, 200]
    assert contents(snapshot_download(REPO)) == contents(artifact)


def test_creating_a_repo_is_repeated_while_another_operation_conflicts(online: LoopbackHub, waits: list[float]) -> None:
    fault = online.fail(CREATE, times=3, kind=409)
    create_repo(REPO)
    assert (fault.hits, waits) == (3, [])


def test_conflict_of_a_commit_is_raised(online: LoopbackHub, small: Path) -> None:
    fault = online.fail(COMMIT, times=None, kind=409)
    with pytest.raises(HfHubHTTPError) as caught:
        push(small)
    assert (fault.hits, caught.value.response.status_code) == (1, 409)


# for each request of a pull and each fault: the error it ends in (None: it is repeated until it passes), and its cause
PULLS: dict[
    tuple[str, str, Kind], tuple[type[Exception] | tuple[type[Exception], ...] | None, type[Exception] | None]
] = {
    (INFO, "GET", 500): (LocalEntryNotFoundError, HfHubHTTPError),
    (INFO, "GET", 403): (LocalEntryNotFoundError, HfHubHTTPError),
    (INFO, "GET", 401): (HfHubHTTPError, httpx.HTTPStatusError),
    (INFO, "GET", "timeout"): (LocalEntryNotFoundError, httpx.ReadTimeout),
    (INFO, "GET", "cut"): (httpx.RemoteProtocolError, None),
    (INFO, "GET", "truncated"): (json.JSONDecodeError, None),
    (TREE, "GET", 500): (HfHubHTTPError, httpx.HTTPStatusError),
    (TREE, "GET", "timeout"): (httpx.ReadTimeout, None),
    (TREE, "GET", "cut"): (httpx.RemoteProtocolError, None),
    (HEAD, "HEAD", 500): (None, None),
    (HEAD, "HEAD", 403): (LocalEntryNotFoundError, HfHubHTTPError),
    (HEAD, "HEAD", "timeout"): (None, None),
    (HEAD, "HEAD", "cut"): (BROKEN, None),
    (STORAGE, "GET", 500): (HfHubHTTPError, httpx.HTTPStatusError),
    (STORAGE, "GET", 429): (None, None),
    (STORAGE, "GET", "timeout"): (None, None),
    (STORAGE, "GET", "cut"): (None, None),
    (STORAGE, "GET", "reset"): (BROKEN, None),
    (STORAGE, "GET", "truncated"): (OSError, None),
    (SMALL, "GET", 500): (HfHubHTTPError, httpx.HTTPStatusError),
    (SMALL, "GET", "cut"): (None, None),
    (SMALL, "GET", "truncated"): (OSError, None),
}


@pytest.mark.parametrize(("stage", "method", "kind"), list(PULLS))
def test_pull_meets_a_fault(
    online: LoopbackHub,
    small: Path,
    waits: list[float],
    impatient: Callable[[str, int | None], None],
    stage: str,
    method: str,
    kind: Kind,
) -> None:
    push(small)
    impatient(stage, 1 if kind == "timeout" else 0)
    error, cause = PULLS[stage, method, kind]
    fault = online.fail(stage, method, kind=kind)
    if error is None:
        assert contents(snapshot_download(REPO)) == contents(small)
    else:
        with pytest.raises(error) as caught:
            snapshot_download(REPO)
        if cause is not None:
            assert isinstance(caught.value.__cause__, cause)
    assert fault.hits == 1
    # what a failed pull leaves behind is never taken for a whole file
    assert contents(snapshot_download(REPO)) == contents(small)
    assert online.leaks == []


def test_download_cut_half_way_goes_on_where_it_stopped(
    online: LoopbackHub, artifact: Path, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    chunk = 1 << 20
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", chunk)  # only whole chunks are kept, of 10 MiB by default
    create_repo(REPO)
    upload_folder(repo_id=REPO, folder_path=artifact)
    online.fail(STORAGE, "GET", kind="cut")
    assert contents(snapshot_download(REPO)) == contents(artifact)
    first, second = online.seen(STORAGE, "GET")
    size = (artifact / "model.safetensors").stat().st_size
    assert "range" not in {name.lower() for name in first.headers}
    assert {name.lower(): value for name, value in second.headers.items()}[
        "range"
    ] == f"bytes={size // 2 // chunk * chunk}-"
    assert second.status == 206


def test_pulled_revision_is_kept_for_when_the_hub_is_down(online: LoopbackHub, small: Path) -> None:
    push(small)
    folder = snapshot_download(REPO)
    online.fail(".", times=None, kind=503)
    assert snapshot_download(REPO) == folder
