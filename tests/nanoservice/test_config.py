"""Settings are read from variables; one run reports every mistake, with the variable's name but without its value."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import trustme
from cryptography.hazmat.primitives import serialization

from nanoservice import config
from nanoservice.config import Secret, integer, seconds, secret, setting, table, variables
from nanoservice.errors import ConfigError, SecretFileError
from tests.support.variables import OTHERS


@dataclass(frozen=True)
class Config(config.Config, prefix=""):
    """Two settings of one service, in addition to the settings of every service."""

    lanes: int = setting(4, "a number", integer(1, 64))  # `LANES` resembles `LINES`, which terminals set
    wait_seconds: float = setting(2.0, "a duration", seconds(0.1, 60))


def problems(environ: dict[str, str]) -> list[str]:
    """Return the problems that are reported for `environ`."""
    with pytest.raises(ConfigError) as caught:
        Config.read(environ)
    return caught.value.problems


def test_defaults_need_no_variable() -> None:
    found = Config.read({})
    assert (found.bind_port, found.admin_port, found.redis_port, found.lanes) == (8080, 9090, 6379, 4)


def test_empty_variable_counts_as_not_set() -> None:
    assert Config.read({"BIND_PORT": "", "REDIS_HOST": "", "REDIS_HSOT": "", "LANE": ""}) == Config.read({})
    assert Shop.read({"SHOP_OLD": ""}) == Shop.read({})


def test_each_kind_of_value_is_read() -> None:
    found = Config.read(
        {"BIND_PORT": "0", "DRAIN_SECONDS": "2.5", "LOG_LEVEL": "DEBUG", "REDIS_HOST": "::1", "REDIS_TLS": "on", "LANES": "2"}
    )
    assert (found.bind_port, found.drain_seconds, found.log_level) == (0, 2.5, "debug")
    assert (found.redis_host, found.redis_tls, found.lanes) == ("::1", True, 2)
    found = Config.read({"REDIS_SENTINELS": "a.example:26379, 10.0.0.1:1,[::1]:65535"})
    assert found.redis_sentinels == (("a.example", 26379), ("10.0.0.1", 1), ("::1", 65535))


@pytest.mark.parametrize(
    ("name", "value", "should_be"),
    [
        ("BIND_PORT", "http", "a whole number from 0 to 65535"),
        ("BIND_PORT", "65536", "a whole number from 0 to 65535"),
        ("BIND_PORT", "-1", "a whole number from 0 to 65535"),
        ("BIND_PORT", "8" * 5000, "a whole number from 0 to 65535"),
        ("BIND_PORT", "٨٠٨٠", "a whole number from 0 to 65535"),
        ("BIND_HOST", "0.0.0.0:80", "a host name or address alone"),
        ("BIND_HOST", "a..b", "a host name or address alone"),
        ("REDIS_HOST", "r" * 64, "a host name or address alone"),
        ("REDIS_PORT", "0", "a whole number from 1 to 65535"),
        ("REDIS_HOST", "redis://u:secret@h:1", "a host name or address alone"),
        ("REDIS_TLS", "maybe", "one of true, on, 1, false, off, 0"),
        ("REDIS_TIMEOUT", "0", "a number of seconds from 0.01 to 60"),
        ("REDIS_TIMEOUT", "nan", "a number of seconds"),
        ("WAIT_SECONDS", "1e3", "a number of seconds from 0.1 to 60"),
        ("LOG_LEVEL", "loud", "one of debug, info, warning, error"),
        ("LOG_FORMAT", "xml", "one of json, text"),
        ("LANES", "0", "a whole number from 1 to 64"),
        ("REDIS_SENTINELS", "sentinel-0", "host:port of each Sentinel, with commas between them"),
        ("REDIS_SENTINELS", "sentinel-0:26379,", "host:port of each Sentinel"),
        ("REDIS_SENTINELS", "redis://u:secret@h:26379", "host:port of each Sentinel"),
        ("REDIS_REPLICAS", "17", "a whole number from 0 to 16"),
        ("REDIS_PASSWORD_FILE", "/nowhere", "the path of a file that can be read: No such file"),
        ("REDIS_PASSWORD_FILE", "/dev/null", "the path of a file in UTF-8 with a password in it"),
        ("REDIS_PASSWORD", "\ufeff\r\n", "a password, not only line ends"),
        ("REDIS_USERNAME", "svc\n", "a name without spaces, line ends and control characters"),
        ("REDIS_USERNAME", "\ufeffsvc", "a name without spaces, line ends and control characters"),
        ("REDIS_PASSWORD", "caf\udce9", "UTF-8"),  # Python reads the byte E9 as this surrogate.
        ("REDIS_USERNAME", "caf\udce9", "UTF-8"),
        ("REDIS_CA_FILE", "/", "the path of a file that can be read: Is a directory"),
        ("REDIS_CA_FILE", __file__, "the path of a file of certificates (PEM)"),
    ],
)
def test_report_of_a_wrong_value_says_what_is_valid_and_hides_the_value(name: str, value: str, should_be: str) -> None:
    found = [
        line for line in problems({"REDIS_HOST": "h", "REDIS_TLS": "on", name: value}) if line.startswith(f"{name} must be ")
    ]
    assert len(found) == 1
    assert should_be in found[0]
    assert len(value) < 4 or value not in found[0]


def test_all_problems_are_reported_in_one_run() -> None:
    found = problems({"BIND_PORT": "x", "LANES": "x", "REDIS_PASSWRD": "s3cret", "LOG_FORMAT": "x", "REDIS_TLS": "yes"})
    assert sorted(line.split()[0] for line in found) == ["BIND_PORT", "LANES", "LOG_FORMAT", "REDIS_PASSWRD", "REDIS_TLS"]
    assert not any("s3cret" in line for line in found)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("REDIS_PASSWRD", "REDIS_PASSWORD"),
        ("BIND_PROT", "BIND_PORT"),
        ("LOG_LEVLE", "LOG_LEVEL"),
        ("WAIT_SECONS", "WAIT_SECONDS"),
    ],
)
def test_misspelt_variable_is_reported_with_the_nearest_one(name: str, nearest: str) -> None:
    assert problems({name: "s3cret"}) == [f"{name} is not a setting; the nearest is {nearest}"]


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("LANE", "LANES"),
        ("LANS", "LANES"),
        ("REDS_HOST", "REDIS_HOST"),
        ("BINDPORT", "BIND_PORT"),
        ("RDIS_PASSWORD", "REDIS_PASSWORD"),
    ],
)
def test_variable_that_is_misspelt_at_its_beginning_is_reported_too(name: str, nearest: str) -> None:
    assert problems({name: "s3cret"}) == [f"{name} is not a setting; the nearest is {nearest}"]


def test_variables_of_other_programs_are_ignored() -> None:
    assert Config.read(dict.fromkeys(OTHERS, "x")) == Config.read({})
    # Kubernetes sets such variables for a Service whose name resembles the prefix of a setting.
    assert Config.read({"REDIS2_PORT": "tcp://10.0.0.1:6379", "BINDS_SERVICE_HOST": "10.0.0.1"}) == Config.read({})


def test_variables_that_kubernetes_sets_for_a_service_named_redis_are_ignored() -> None:
    link = "tcp://10.0.0.7:6379"
    injected = {
        "REDIS_SERVICE_HOST": "10.0.0.7",
        "REDIS_SERVICE_PORT": "6379",
        "REDIS_SERVICE_PORT_REDIS": "6379",
        "REDIS_PORT_6379_TCP": link,
        "REDIS_PORT_6379_TCP_ADDR": "10.0.0.7",
        "REDIS_PORT_6379_TCP_PORT": "6379",
        "REDIS_PORT_6379_TCP_PROTO": "tcp",
        "REDIS_MASTER_SERVICE_HOST": "10.0.0.8",
        "REDIS_MASTER_PORT": link,
    }
    assert Config.read(injected) == Config.read({})
    for name in ("REDIS_PORT", "ADMIN_PORT", "BIND_PORT"):
        [problem] = problems({**injected, name: link})
        assert problem.startswith(f"{name} must be a whole number")
        assert "enableServiceLinks: false" in problem


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return the paths of files for TLS: a certificate, its key, this key with a passphrase, another key, and plain text."""
    folder = tmp_path_factory.mktemp("tls")
    mine, other = (trustme.CA().issue_cert("client@example.org") for _ in range(2))
    locked = serialization.load_pem_private_key(mine.private_key_pem.bytes(), None).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"passphrase")
    )
    contents = {
        "certificate": mine.cert_chain_pems[0].bytes(), "key": mine.private_key_pem.bytes(), "locked key": locked,
        "other key": other.private_key_pem.bytes(), "letter": b"Dear all,",
    }  # fmt: skip
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return {name: str(folder / name) for name in contents}


@pytest.mark.parametrize(
    ("environ", "named"),
    [
        ({"REDIS_PASSWORD": "s3cret", "REDIS_PASSWORD_FILE": "letter"}, "REDIS_PASSWORD and REDIS_PASSWORD_FILE"),
        ({"REDIS_SENTINELS": "s:26379"}, "REDIS_HOST and REDIS_SENTINELS are both set: keep one"),
        ({"REDIS_USERNAME": "u"}, "REDIS_USERNAME needs"),
        ({"REDIS_TLS": "on", "REDIS_CERT_FILE": "certificate"}, "REDIS_CERT_FILE and REDIS_KEY_FILE"),
        ({"REDIS_CA_FILE": "certificate"}, "need REDIS_TLS=true"),
        *(
            ({"REDIS_TLS": "on", "REDIS_CERT_FILE": "certificate", "REDIS_KEY_FILE": key}, "REDIS_KEY_FILE must be the key of")
            for key in ("other key", "locked key", "certificate", "letter")
        ),
    ],
)
def test_settings_that_contradict_each_other_are_reported(files: dict[str, str], environ: dict[str, str], named: str) -> None:
    found = problems({"REDIS_HOST": "h"} | {name: files.get(value, value) for name, value in environ.items()})
    assert len(found) == 1
    assert named in found[0]
    assert "s3cret" not in found[0]


def test_certificate_and_its_key_are_accepted(files: dict[str, str]) -> None:
    environ = {"REDIS_CA_FILE": "certificate", "REDIS_CERT_FILE": "certificate", "REDIS_KEY_FILE": "key"}
    found = Config.read({"REDIS_HOST": "h", "REDIS_TLS": "on"} | {name: files[value] for name, value in environ.items()})
    assert found.redis_key_file == Path(files["key"])


@pytest.mark.parametrize("name", ["REDIS_PASSWORD", "REDIS_TLS", "REDIS_PASSWORD_FILE", "REDIS_REPLICAS"])
def test_redis_settings_without_a_redis_host_are_reported(name: str) -> None:
    value = {"REDIS_TLS": "on", "REDIS_PASSWORD_FILE": __file__, "REDIS_REPLICAS": "1"}.get(name, "s3cret")
    assert "REDIS_HOST or REDIS_SENTINELS must be set" in problems({name: value})[0]
    assert Config.read({name: value, "REDIS_SENTINELS": "s:26379"})


def test_repr_does_not_show_a_secret() -> None:
    found = Config.read({"REDIS_HOST": "h", "REDIS_PASSWORD": "s3cret"})
    assert found.redis_password is not None
    assert found.redis_password.reveal() == "s3cret"
    assert "s3cret" not in f"{found!r} {found} {found.redis_password!r} {found.redis_password} {[Secret('s3cret')]}"


def test_every_variable_is_explained() -> None:
    assert all(spec.metadata["help"] for _, spec in variables(Config))


@dataclass(frozen=True)
class Shop(config.Config, prefix="SHOP_"):
    """A service's settings whose names a shell and other programs use too."""

    user: str = setting("nobody", "a name that a shell sets, without the prefix")
    api_key: Secret | None = secret("key of the supplier")
    drain_seconds: float = setting(3.0, "another default of an inherited setting", seconds(0, 9))


def test_prefix_keeps_variables_of_shells_and_of_other_programs_apart() -> None:
    shop = Shop.read({"USER": "root", "API_URL": "x", "API_KEY": "x", "SHOP_USER": "ada", "SHOP_PORT": "tcp://10.0.0.1:80"})
    assert (shop.user, shop.api_key, shop.drain_seconds) == ("ada", None, 3.0)
    assert Shop.read({"DRAIN_SECONDS": "4"}).drain_seconds == 4
    with pytest.raises(ConfigError) as caught:
        Shop.read({"SHOP_API": "s3cret"})
    assert caught.value.problems == ["SHOP_API is not a setting; the nearest is SHOP_API_KEY"]


def test_prefix_of_two_words_leaves_other_variables_with_its_first_word_alone() -> None:
    @dataclass(frozen=True, slots=True)
    class Settings(config.Config, prefix="OUR_SHOP_"):
        size: int = setting(1, "a number", integer(1, 9))

    assert Settings.read({"OUR_TOOL": "x", "OUR_SHOP_SIZE": "2"}).size == 2


def test_settings_without_a_valid_prefix_are_an_error_that_says_what_to_write() -> None:
    with pytest.raises(TypeError, match=r'class Settings\(Config, prefix="LIKES_"\)'):

        class Settings(config.Config):
            pass

    with pytest.raises(TypeError, match="prefix"):

        class Lower(config.Config, prefix="likes"):
            pass


def test_two_settings_with_one_variable_are_an_error() -> None:
    @dataclass(frozen=True)
    class Settings(config.Config, prefix="REDIS_"):
        host: str = setting("", "a host")

    with pytest.raises(TypeError, match="REDIS_HOST"):
        Settings.read({})


def test_secret_of_a_service_is_read_from_its_variable_or_again_from_its_file(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("first\n")
    key = Shop.read({"SHOP_API_KEY": "s3cret"}).api_key
    assert key is not None
    assert (key.reveal(), repr(key)) == ("s3cret", "***")
    key = Shop.read({"SHOP_API_KEY_FILE": str(file)}).api_key
    assert key is not None
    assert key.reveal() == "first"
    file.write_text("second")
    assert key.reveal() == "second"
    assert "second" not in repr(key)
    file.write_bytes(b"s3cret\xff")
    with pytest.raises(SecretFileError, match="is not UTF-8") as caught:
        key.reveal()
    assert "s3cret" not in str(caught.value)
    with pytest.raises(ConfigError) as wrong:
        Shop.read({"SHOP_API_KEY_FILE": str(tmp_path / "gone"), "SHOP_API_KEY": "x"})
    assert wrong.value.problems == ["SHOP_API_KEY_FILE must be the path of a file that can be read: No such file or directory"]
    file.write_text("second")
    with pytest.raises(ConfigError) as both:
        Shop.read({"SHOP_API_KEY_FILE": str(file), "SHOP_API_KEY": "x"})
    assert both.value.problems == ["SHOP_API_KEY and SHOP_API_KEY_FILE are both set: keep one"]
    assert "| `SHOP_API_KEY_FILE` |  | file with it, which is read again at each use |" in table(Shop)
