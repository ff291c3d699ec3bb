"""Read the settings from environment variables, report all mistakes in them at once, and never show a secret.

`Config` declares the variables that every service knows; the variable `BIND_PORT` sets the field `bind_port`. A service adds
variables of its own in a frozen dataclass that it derives from `Config`, and gives these variables a prefix: with
`class Settings(Config, prefix="LIKES_")`, the variable `LIKES_USER` sets the field `user`.
"""

import difflib
import re
import ssl
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any, ClassVar, Self

from nanoservice.errors import ConfigError, SecretFileError

FINISH_SECONDS = 10.0  # A shutdown waits for this time until the requests in flight are answered.

# Kubernetes sets these variables for each Service of the namespace unless `enableServiceLinks` is false.
_SERVICE_LINK = re.compile(r"\w+_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_(ADDR|PORT|PROTO))?)")
_SERVICE_LINK_HINT = "; Kubernetes sets this variable for a Service of this name: give the pod `enableServiceLinks: false`"

# A variable without a known prefix is an error if its similarity to a setting is at least this number. Terminals set LINES,
# whose similarity to LANES is lower.
_MIN_SIMILARITY = 0.85


class Secret:
    """A text that is printed as stars. `reveal()` returns the text."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def reveal(self) -> str:
        """Return the secret itself."""
        return self._text

    def __repr__(self) -> str:
        return "***"


class SecretFile(Secret):
    """A secret in a file. `reveal()` reads the file each time, so a rotated secret needs no restart."""

    __slots__ = ()

    def reveal(self) -> str:
        """Return the secret that the file contains now. Raises SecretFileError if the file cannot be used any more."""
        try:
            return password(Path(self._text).read_bytes().decode())
        except OSError as error:
            raise SecretFileError(f"{self._text} cannot be read: {error.strerror}") from error
        except UnicodeDecodeError:  # The message of this error quotes the file.
            raise SecretFileError(f"{self._text} is not UTF-8") from None
        except ValueError:
            raise SecretFileError(f"{self._text} has no password in it") from None


def utf8(text: str) -> str:
    """Return `text`. Raises ValueError if it was not UTF-8 in the environment.

    Python keeps other bytes as surrogates, which cannot be sent to Redis.
    """
    try:
        text.encode()
    except UnicodeEncodeError:  # The message of this error quotes the text, which may be a password.
        raise ValueError("UTF-8") from None
    return text


def password(text: str) -> str:
    """Return the first password in `text`. manifests/redis/redis.sh reads the passwords of Redis's users by the same rule.

    Each line is a password, without its line end; empty lines and a byte-order mark are ignored. Raises ValueError if `text`
    has no password, or is not UTF-8.
    """
    for line in utf8(text).removeprefix("\ufeff").split("\n"):
        if found := line.rstrip("\r"):
            return found
    raise ValueError("a password, not only line ends")


def username(text: str) -> str:
    """Return `text` if it can be the name of a user in Redis."""
    if not utf8(text).isprintable() or " " in text:
        raise ValueError("a name without spaces, line ends and control characters")
    return text


def setting(default: Any, help: str, parse: Callable[[str], Any] = utf8) -> Any:
    """Return a dataclass field whose value is set by the environment variable of the same name.

    `parse` turns the variable's text into the value. If the text is invalid, `parse` raises a ValueError that says what the text
    must be ("a whole number ...").
    """
    return field(default=default, metadata={"help": help, "parse": parse})


def secret(help: str, help_file: str = "file with it, which is read again at each use") -> Any:
    """Return a dataclass field of the type `Secret | None`. The environment variable of the same name sets it.

    Instead, a variable of this name with the suffix `_FILE` can name a file with the secret. `password` checks both.
    """
    file = {"help": help_file, "parse": password_file}
    return field(default=None, metadata={"help": help, "parse": lambda text: Secret(password(text)), "file": file})


def integer(low: int, high: int) -> Callable[[str], int]:
    """Return a parser of whole numbers from `low` to `high`, both included."""

    def parse(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,18}", text) or not low <= int(text) <= high:
            raise ValueError(f"a whole number from {low} to {high}" + (_SERVICE_LINK_HINT if "://" in text else ""))
        return int(text)

    return parse


def seconds(low: float, high: float) -> Callable[[str], float]:
    """Return a parser of seconds from `low` to `high`, both included; decimals are allowed."""

    def parse(text: str) -> float:
        if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", text) or not low <= float(text) <= high:
            raise ValueError(f"a number of seconds from {low:g} to {high:g}")
        return float(text)

    return parse


def choice(*names: str) -> Callable[[str], str]:
    """Return a parser that accepts one of `names`, in upper or lower case."""

    def parse(text: str) -> str:
        if text.lower() not in names:
            raise ValueError("one of " + ", ".join(names))
        return text.lower()

    return parse


def flag(text: str) -> bool:
    """Return whether `text` means yes. Raises ValueError if it means neither yes nor no."""
    return choice("true", "on", "1", "false", "off", "0")(text) in ("true", "on", "1")


def host(text: str) -> str:
    """Return `text` if it is a host name or an address.

    A URL is refused, because it may contain a password, and the log shows the host.
    """
    try:
        # The resolver encodes a name in the same way. The encoding fails if a label is empty or longer than 63 characters.
        text.encode("idna")
        return text if re.fullmatch(r"[A-Za-z0-9_.-]+", text) else str(ip_address(text))
    except ValueError:
        raise ValueError("a host name or address alone: no scheme, user or port") from None


def addresses(text: str) -> tuple[tuple[str, int], ...]:
    """Return the hosts and ports that `text` lists, with commas between them. An IPv6 address is in brackets."""
    try:
        parts = [part.strip().rpartition(":") for part in text.split(",")]
        return tuple((host(re.sub(r"^\[(.*)\]$", r"\1", name)), integer(1, 65535)(port)) for name, _, port in parts)
    except ValueError:
        raise ValueError("host:port of each Sentinel, with commas between them") from None


def file(text: str) -> Path:
    """Return `text` as the path of a readable file."""
    try:
        with open(text, "rb"):
            return Path(text)
    except OSError as error:
        raise ValueError(f"the path of a file that can be read: {error.strerror}") from error


def password_file(text: str) -> SecretFile:
    """Return the secret in the file `text`, which must be readable and have a password in it."""
    secret = SecretFile(str(file(text)))
    try:
        secret.reveal()
    except SecretFileError as error:
        raise ValueError("the path of a file in UTF-8 with a password in it") from error
    return secret


def certificates(text: str) -> Path:
    """Return `text` as the path of a readable file of certificates (PEM)."""
    path = file(text)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
    except ssl.SSLError:
        raise ValueError("the path of a file of certificates (PEM)") from None
    return path


@dataclass(frozen=True)
class Config:
    """The settings that every service has."""

    bind_port: int = setting(8080, "public port; 0: any free port, which the log reports", integer(0, 65535))
    bind_host: str = setting("", "address to listen on; default: all", host)
    admin_port: int = setting(9090, "port of `/metrics`; 0: any free port; do not expose it to the public", integer(0, 65535))
    max_connections: int = setting(
        2000, "maximum number of open connections; a further one closes the connection that is idle longest", integer(1, 1000000)
    )
    redis_host: str = setting("", "host of Redis; default, in development only: an embedded Valkey", host)
    redis_port: int = setting(6379, "port of Redis", integer(1, 65535))
    redis_sentinels: tuple[tuple[str, int], ...] = setting(
        (), "instead of a host: `host:port` of each Sentinel, with commas; the primary's name there is `primary`", addresses
    )
    redis_replicas: int = setting(0, "number of replicas that must have a write before it is answered", integer(0, 16))
    redis_username: str = setting("", "user in Redis", username)
    redis_password: Secret | None = secret(
        "password of that user", "file with the password, read for each connection, so a new password needs no restart"
    )
    redis_tls: bool = setting(False, "`true`: connect to Redis by TLS and check its certificate", flag)
    redis_ca_file: Path | None = setting(None, "CA certificates to trust (PEM); default: those of the system", certificates)
    redis_cert_file: Path | None = setting(None, "client certificate (PEM)", certificates)
    redis_key_file: Path | None = setting(None, "key of the client certificate (PEM), without a passphrase", file)
    redis_timeout: float = setting(1.0, "time limit in seconds for connecting, and for each round trip", seconds(0.01, 60))
    drain_seconds: float = setting(0.0, "seconds to keep serving after SIGTERM, but not ready; 5 in a cluster", seconds(0, 3600))
    log_level: str = setting(
        "info", "`debug` (each request), `info`, `warning`, `error`", choice("debug", "info", "warning", "error")
    )
    log_format: str = setting("", "`json` or `text`; default: text on a terminal", choice("json", "text"))

    _prefix: ClassVar[str] = ""

    def __init_subclass__(cls, *, prefix: str | None = None) -> None:
        """Set the prefix of the variables that set the fields of `cls`.

        Without a prefix, a field `user` would read the variable `USER`, which a shell sets.
        """
        if prefix is None:  # `@dataclass(slots=True)` creates the class again, without this keyword.
            prefix = cls.__dict__.get("_prefix")
        if prefix is None or not re.fullmatch(r"([A-Z][A-Z0-9]*_)*", prefix):
            raise TypeError(f'give {cls.__name__} the prefix of its variables: class {cls.__name__}(Config, prefix="LIKES_")')
        cls._prefix = prefix

    @classmethod
    def read(cls, environ: Mapping[str, str], problems: Sequence[str] = ()) -> Self:
        """Return the settings from `environ`. An empty variable counts as not set.

        Raises ConfigError with all problems, including the caller's `problems`.
        """
        known = dict(variables(cls))
        values: dict[str, Any] = {}
        invalid, twice = {}, []
        for name, spec in known.items():
            if text := environ.get(name, ""):
                if spec.name in values:
                    twice.append(f"{name.removesuffix('_FILE')} and {name} are both set: keep one")
                try:
                    values[spec.name] = spec.metadata["parse"](text)
                except ValueError as error:
                    invalid[name] = f"{name} must be {error}"
        config = cls(**values)
        conflicts = [line for line in (*twice, *config.conflicts()) if not any(name in line for name in invalid)]
        if found := [*_unknown(environ, list(known), cls._prefix), *invalid.values(), *conflicts, *problems]:
            raise ConfigError(found)
        return config

    def conflicts(self) -> Iterator[str]:
        """Yield a line for each contradiction between settings that are valid on their own."""
        if self.redis_username and not self.redis_password:
            yield "REDIS_USERNAME needs REDIS_PASSWORD or REDIS_PASSWORD_FILE"
        if bool(self.redis_cert_file) != bool(self.redis_key_file):
            yield "REDIS_CERT_FILE and REDIS_KEY_FILE belong together: set both or none"
        elif self.redis_cert_file:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            try:
                # Without `password`, OpenSSL would ask for a passphrase on the terminal.
                context.load_cert_chain(self.redis_cert_file, self.redis_key_file, password=lambda: "")
            except ssl.SSLError:
                yield "REDIS_KEY_FILE must be the key of REDIS_CERT_FILE (PEM), without a passphrase"
        if not self.redis_tls and (self.redis_ca_file or self.redis_cert_file or self.redis_key_file):
            yield "REDIS_CA_FILE, REDIS_CERT_FILE and REDIS_KEY_FILE need REDIS_TLS=true"
        if self.redis_host and self.redis_sentinels:
            yield "REDIS_HOST and REDIS_SENTINELS are both set: keep one"
        needy = self.redis_password or self.redis_tls or self.redis_replicas
        if needy and not (self.redis_host or self.redis_sentinels):
            names = "REDIS_PASSWORD, REDIS_PASSWORD_FILE, REDIS_TLS or REDIS_REPLICAS"
            yield f"REDIS_HOST or REDIS_SENTINELS must be set for {names} to have a meaning"


def variables(config: type[Config]) -> list[tuple[str, Any]]:
    """Return the name of each variable of `config` with its dataclass field, in the order of declaration.

    Raises TypeError if two fields have the same variable.
    """
    # A class that only changes the default of an inherited field does not change the field's variable.
    owners = {spec.name: owner for owner in config.__mro__ if is_dataclass(owner) for spec in fields(owner)}
    found = []
    for spec in fields(config):
        name = getattr(owners[spec.name], "_prefix", "") + spec.name.upper()
        found.append((name, spec))
        if "file" in spec.metadata:
            file: Any = field(default=None, metadata=spec.metadata["file"])
            file.name = spec.name
            found.append((f"{name}_FILE", file))
    if twice := {name for name, _ in found if [other for other, _ in found].count(name) > 1}:
        raise TypeError(f"two settings have the same variable: {', '.join(twice)}; give {config.__name__} another prefix")
    return found


def table(config: type[Config]) -> str:
    """Return the variables of `config` as a Markdown table."""
    rows = ["| variable | default | |", "| --- | --- | --- |"]
    for name, spec in variables(config):
        default = {"": "", "()": "", "None": "", "False": "false"}.get(str(spec.default), f"{spec.default}")
        rows.append(f"| `{name}` | {default} | {spec.metadata['help']} |")
    return "\n".join(rows)


def _unknown(environ: Mapping[str, str], known: list[str], prefix: str) -> Iterator[str]:
    """Yield a line for each unknown variable that has the prefix of a setting or resembles a setting, and so may be misspelt.

    `prefix` is the prefix of the service's own settings.
    """
    own = [name for name in known if prefix and name.startswith(prefix)]
    prefixes = (*{name.split("_")[0] + "_" for name in known if "_" in name and name not in own}, *([prefix] if own else []))
    for name, value in environ.items():
        if not value or name in known or _SERVICE_LINK.fullmatch(name) or (name.endswith("_PORT") and "://" in value):
            continue  # Kubernetes sets such a variable for a Service.
        for nearest in difflib.get_close_matches(name, known, n=1, cutoff=0.0 if name.startswith(prefixes) else _MIN_SIMILARITY):
            yield f"{name} is not a setting; the nearest is {nearest}"
