"""Where the API server is and who the router is: kubeconfigs, service accounts, and what is wrong with them."""

from __future__ import annotations

import base64
import os
from pathlib import Path
from typing import Any

import pytest

from certificates import Authority, Pair, replace
from discovery_scenes import kubeconfig
from sglang_router.discovery.kube_config import KubeAccess, KubeFiles, find
from sglang_router.errors import ConfigError


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("kube") / "ca")


@pytest.fixture(scope="module")
def pair(authority: Authority) -> Pair:
    return authority.issue("router")


def read(path: str) -> KubeAccess:
    return KubeFiles(find(path, {})).access()


def data_of(path: str) -> str:
    return base64.b64encode(Path(path).read_bytes()).decode()


def test_a_kubeconfig_with_a_token(tmp_path: Path, authority: Authority) -> None:
    cluster = {"server": "https://api.example:6443/k8s/clusters/x/", "certificate-authority": authority.cert}
    access = read(kubeconfig(tmp_path / "config", cluster, {"token": "s3cret"}, "llm"))
    assert (access.host, access.port, access.name, access.prefix) == (
        "api.example",
        6443,
        "api.example",
        "/k8s/clusters/x",
    )
    assert (access.token, access.namespace) == ("s3cret", "llm")
    assert access.tls is not None
    assert access.tls.verify_mode.name == "CERT_REQUIRED"
    assert access.url == "https://api.example:6443/k8s/clusters/x"
    assert "s3cret" not in repr(access)


def test_all_that_can_stand_in_the_kubeconfig_itself(tmp_path: Path, authority: Authority, pair: Pair) -> None:
    cluster = {"server": "https://[::1]", "certificate-authority-data": data_of(authority.cert), "tls-server-name": "k"}
    user = {"client-certificate-data": data_of(pair.cert), "client-key-data": data_of(pair.key)}
    access = read(kubeconfig(tmp_path / "config", cluster, user))
    assert (access.host, access.port, access.name, access.token) == ("::1", 443, "k", "")
    assert access.authority == "[::1]:443"
    assert access.tls is not None


def test_files_are_relative_to_the_kubeconfig_and_read_again_when_they_change(
    tmp_path: Path, authority: Authority, pair: Pair
) -> None:
    (tmp_path / "token").write_text("one\n")
    for name, source in (("ca", authority.cert), ("cert", pair.cert), ("key", pair.key)):
        (tmp_path / name).write_text(Path(source).read_text())
    cluster = {"server": "https://a", "certificate-authority": "ca"}
    user = {"tokenFile": "token", "client-certificate": "cert", "client-key": "key"}
    files = KubeFiles(find(kubeconfig(tmp_path / "config", cluster, user), {}))
    first = files.access()
    assert first.token == "one"
    assert first.token_from == str(tmp_path / "token")
    assert files.access() is first
    replace(str(tmp_path / "token"), "two")
    assert files.access().token == "two"
    replace(str(tmp_path / "token"), "")  # in the middle of a change
    assert files.access().token == "two"
    replace(str(tmp_path / "token"), "three")
    assert files.access().token == "three"


def test_a_file_that_a_kubeconfig_names_later_is_followed_too(tmp_path: Path) -> None:
    """A new token in it was never seen."""
    path, cluster = tmp_path / "config", {"server": "http://a"}
    files = KubeFiles(find(kubeconfig(path, cluster, {"token": "zero"}), {}))
    (tmp_path / "token").write_text("one")
    (tmp_path / "new").write_text(Path(kubeconfig(tmp_path / "c", cluster, {"tokenFile": "token"})).read_text())
    os.replace(tmp_path / "new", path)
    assert files.access().token == "one"
    replace(str(tmp_path / "token"), "two")
    assert files.access().token == "two"
    (tmp_path / "token").unlink()
    assert files.access().token == "two"
    replace(str(tmp_path / "token"), "three")
    assert files.access().token == "three"


def test_insecure_is_possible_and_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    access = read(kubeconfig(tmp_path / "c", {"server": "https://a", "insecure-skip-tls-verify": True}, {"token": "t"}))
    assert access.tls is not None
    assert access.tls.verify_mode.name == "CERT_NONE"
    assert "anybody may pose as the API server" in caplog.text


SERVER = {"server": "https://a"}


@pytest.mark.parametrize(
    ("cluster", "user", "why"),
    [
        (SERVER, {"exec": {"command": "aws"}}, "a command .exec. is not supported"),
        (SERVER, {"auth-provider": {"name": "gcp"}}, "an auth-provider is not supported"),
        (SERVER, {"username": "x"}, "a password is not supported"),
        (SERVER, {"token": "two words"}, "holds no token"),
        (SERVER, {"client-certificate-data": "YQ=="}, "client-certificate and client-key belong together"),
        (SERVER, {"client-certificate-data": "YQ==", "client-key-data": "YQ=="}, "cannot be used together"),
        (SERVER, {"tokenFile": "nowhere"}, "nowhere cannot be read"),
        (SERVER | {"proxy-url": "http://p"}, {}, "proxy-url is not supported"),
        (SERVER | {"certificate-authority-data": "%"}, {}, "not base64"),
        (SERVER | {"certificate-authority-data": "YQ=="}, {}, "no certificate that can be read"),
        ({"server": "a:6443"}, {}, "must be a URL that begins with https://"),
        ({"server": "https://a:x"}, {}, "must be a URL that begins with https://"),
        ({"server": 7}, {}, "is no kubeconfig"),
    ],
)
def test_what_is_wrong_with_a_kubeconfig_is_said(
    tmp_path: Path, cluster: dict[str, Any], user: dict[str, Any], why: str
) -> None:
    with pytest.raises(ConfigError, match=why):
        read(kubeconfig(tmp_path / "config", cluster, user))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "is no kubeconfig"),
        ("a: [", "is no kubeconfig"),
        ("current-context: x", "no context 'x'; set one: kubectl config use-context NAME"),
        ("current-context: x\ncontexts: [{name: x, context: {cluster: c}}]", "no cluster 'c'"),
    ],
)
def test_a_file_that_is_no_kubeconfig(tmp_path: Path, text: str, why: str) -> None:
    (tmp_path / "config").write_text(text)
    with pytest.raises(ConfigError, match=why):
        read(str(tmp_path / "config"))


@pytest.fixture
def account(tmp_path: Path, authority: Authority) -> Path:
    """The files of a service account, as Kubernetes mounts them: links to links, swapped at once."""
    for number, token in enumerate(("one", "two")):
        folder = tmp_path / f"..{number}"
        folder.mkdir()
        (folder / "token").write_text(token)
        (folder / "ca.crt").write_text(Path(authority.cert).read_text())
        (folder / "namespace").write_text("llm")
    (tmp_path / "..data").symlink_to("..0")
    for name in ("token", "ca.crt", "namespace"):
        (tmp_path / name).symlink_to(f"..data/{name}")
    return tmp_path


IN_A_POD = {"KUBERNETES_SERVICE_HOST": "fd00::1", "KUBERNETES_SERVICE_PORT": "6443"}


def test_a_service_account_whose_token_is_replaced(account: Path) -> None:
    files = KubeFiles(find(None, IN_A_POD, str(account)))
    access = files.access()
    assert (access.url, access.token, access.namespace) == ("https://[fd00::1]:6443", "one", "llm")
    (account / "..next").symlink_to("..1")
    (account / "..next").rename(account / "..data")
    assert files.access().token == "two"


def test_which_of_them_counts(tmp_path: Path, account: Path) -> None:
    config = kubeconfig(tmp_path / "config", SERVER, {"token": "from a file".replace(" ", "-")})
    assert read(config).token == "from-a-file"
    assert find(config, IN_A_POD)(set()).token == "from-a-file"
    assert find(None, IN_A_POD | {"KUBECONFIG": config})(set()).token == "from-a-file"
    assert find(None, IN_A_POD | {"HOME": str(tmp_path)}, str(account))(set()).token == "one"
    (tmp_path / ".kube").mkdir()
    (tmp_path / ".kube" / "config").write_text(Path(config).read_text())
    assert find(None, {"HOME": str(tmp_path)})(set()).token == "from-a-file"


def test_without_any_of_them_it_is_said_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"this is no pod .* name one with --kubeconfig"):
        find(None, {"HOME": str(tmp_path)})
    with pytest.raises(ConfigError, match="KUBECONFIG names several files"):
        find(None, {"KUBECONFIG": "a:b"})
    with pytest.raises(ConfigError, match="automountServiceAccountToken"):
        KubeFiles(find(None, IN_A_POD, str(tmp_path)))
    with pytest.raises(ConfigError, match="KUBERNETES_SERVICE_PORT: 'x' is not a port"):
        find(None, IN_A_POD | {"KUBERNETES_SERVICE_PORT": "x"}, str(account_of(tmp_path)))(set())


def account_of(folder: Path) -> Path:
    (folder / "token").write_text("t")
    (folder / "ca.crt").write_text("")
    return folder
