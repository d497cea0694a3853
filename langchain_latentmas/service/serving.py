"""Settings of `latentmas serve`: flag, else environment, else file, else default."""

import ipaddress
import logging
import ssl
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, JsonValue, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

from ..errors import InvalidRequest, first_fault
from .units import Bytes

MIN_TOKEN = 16
logger = logging.getLogger(__name__)


def _for_a_header(token: SecretStr) -> SecretStr:
    """A token without the end of line that files and variables bring along, which no header could carry."""
    said = token.get_secret_value().strip()
    if not (said and said.isascii() and said.isprintable()):
        raise ValueError("a token must consist of printable ASCII characters; look at where it comes from")
    return SecretStr(said)


Token = Annotated[SecretStr, AfterValidator(_for_a_header)]


def is_loopback(host: str) -> bool:
    """Whether a name or an address stands for this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def connections_that_fit(wanted: int) -> int:
    """How many connections this process can have; raises its limit of open files as far as that takes and it may.

    Half of the files are left for others, the store's above all.

    Args:
        wanted: The most that it shall have.
    """
    try:
        import resource
    except ModuleNotFoundError:  # a system without such a limit
        return wanted
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    files, most = (sys.maxsize if limit == resource.RLIM_INFINITY else limit for limit in limits)
    if files < 2 * wanted:
        with suppress(ValueError, OSError):  # some systems allow less than they say
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(2 * wanted, most), limits[1]))
            files = min(2 * wanted, most)
    if files >= 2 * wanted:
        return wanted
    fit = max(1, files // 2)
    logger.warning("at most %d connections, not %d: this process may open no more than %d files", fit, wanted, files)
    return fit


class ServeSettings(BaseSettings):
    """Every option of the server; each is a flag, an environment variable `LATENTMAS_...`, and a line of a TOML file.

    Attributes:
        model: "bundled", a hub id, or a folder.
        device: "cuda", "cpu", ...; None lets the service choose.
        dtype: Name of a torch dtype, or "auto".
        store: Folder of recipes and signing key; what is in it outlives the server.
        options: More settings of the model service: see `langchain_latentmas.service.local.LocalSettings`.
        host: Address to listen on. Any but a loopback address needs a token.
        port: Port to listen on; 0 takes a free one.
        certificate: PEM file, for HTTPS.
        certificate_key: PEM file of its key.
        token: Who has it may use the server, and read its metrics.
        tokens: Further tokens by tenant; no tenant sees anything of another.
        max_running: Most requests at work; the others wait. More than the rows of a tick, since some are being checked,
            stored or sent meanwhile.
        max_waiting: Most requests that wait.
        deadline: Seconds after which a request is given up, its wait included; the most that a client can ask for.
        drain: Seconds for which work goes on after SIGTERM.
        keep_alive: Seconds of silence after which a stream shows that it is alive.
        max_body: Most bytes of a request, an imported memory excepted; a number, or such as "2MiB".
        max_depth: Most nested arrays and objects in a request.
        max_headers: Most bytes of a request's headers.
        max_memory: Most bytes of a memory that is imported, or exported with its KV.
        max_connections: Most connections at a time; fewer where the process may not open twice as many files. One that
            is too many is closed at once.
        body_seconds: Seconds within which a request's headers must have come, then its body, or the next part of a
            memory's, and within which a client must take something of what it is sent.
        log_level: "debug", "info", "warning" or "error".
    """

    model_config = SettingsConfigDict(env_prefix="LATENTMAS_", extra="forbid")

    model: str = "bundled"
    device: str | None = None
    dtype: str = "auto"
    store: Path = Field(default_factory=lambda: Path.home() / ".local" / "state" / "latentmas")
    options: dict[str, JsonValue] = Field(default_factory=dict)
    host: str = "127.0.0.1"
    port: int = Field(8765, ge=0, lt=1 << 16)
    certificate: Path | None = None
    certificate_key: Path | None = None
    token: Token | None = None
    tokens: dict[str, Token] = Field(default_factory=dict)
    max_running: int = Field(128, ge=1)
    max_waiting: int = Field(256, ge=0)
    deadline: float = Field(600, gt=0)
    drain: float = Field(30, ge=0)
    keep_alive: float = Field(5, gt=0)
    max_body: Bytes = Field(1 << 20, ge=1024)  # as Python objects, JSON can take 20 times its bytes
    max_depth: int = Field(32, ge=8)
    max_headers: Bytes = Field(1 << 15, ge=1024)
    max_memory: Bytes = 1 << 30
    max_connections: int = Field(2048, ge=1)
    body_seconds: float = Field(30, gt=0)
    log_level: str = Field("info", pattern="^(debug|info|warning|error)$")

    @classmethod
    def gather(cls, file: Path | None, flags: dict[str, Any]) -> "ServeSettings":
        """Puts the settings together.

        Args:
            file: A TOML file, or None.
            flags: What was said on the command line.

        Raises:
            InvalidRequest: If a setting is unknown or out of range, or the file cannot be read.
        """

        class Gathered(cls):  # type: ignore[misc, valid-type]
            model_config = SettingsConfigDict(toml_file=file)

        if file is not None and not file.is_file():
            raise InvalidRequest(f"There is no file {file}; correct --config.")
        try:
            return Gathered(**flags)
        except ValidationError as error:
            raise InvalidRequest(f"{first_fault(error)}. Settings: {', '.join(cls.model_fields)}.") from None
        except (ValueError, OSError) as error:  # the file is no TOML or not ours, or the environment no JSON
            raise InvalidRequest(f"The settings cannot be read: {error}") from error

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags before environment before file."""
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)

    @model_validator(mode="after")
    def _secured(self) -> "ServeSettings":
        secrets = [secret.get_secret_value() for secret in (self.token, *self.tokens.values()) if secret is not None]
        if any(len(secret) < MIN_TOKEN for secret in secrets):
            raise ValueError(f"a token must have at least {MIN_TOKEN} ASCII characters; try: openssl rand -hex 32")
        if len(set(secrets)) < len(secrets):
            raise ValueError("two tenants have the same token; give each its own")
        if "" in self.tokens:
            raise ValueError("a tenant needs a name")
        if not self.loopback and not secrets:
            raise ValueError(
                f"host {self.host} can be reached from other machines, so it needs a token: set LATENTMAS_TOKEN, "
                "or listen on 127.0.0.1"
            )
        if (self.certificate is None) != (self.certificate_key is None):
            raise ValueError("HTTPS needs both certificate and certificate_key")
        if self.certificate is not None:  # before the model is loaded, which can take minutes
            try:
                ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self.certificate, self.certificate_key)
            except OSError as error:  # an `ssl.SSLError` is one
                raise ValueError(
                    f"certificate {self.certificate} and certificate_key {self.certificate_key} cannot be used "
                    f"({error}); give a PEM file with the certificate and one with its key, both readable to this user"
                ) from error
        return self

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        return is_loopback(self.host)

    @property
    def by_token(self) -> dict[str, str]:
        """Tenants by token; "" is the tenant of `token`."""
        named = {secret.get_secret_value(): name for name, secret in self.tokens.items()}
        return named if self.token is None else {self.token.get_secret_value(): "", **named}
