"""The settings of `holdfast guard serve`; this module loads no tensors."""

from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from cyclopts import Parameter

from holdfast.errors import SettingsError
from holdfast.ranges import require_numbers

Policy = Literal["observe", "stop", "refuse", "steer", "redraw"]
Fault = Literal["closed", "open"]
KEYS_ENV = "HOLDFAST_API_KEYS"
"""The environment variable with the keys, apart by white space or commas."""
PORTS = 65535
REFUSAL = "I can't help with that."
Switched = Parameter(negative=(), show_default=False)


@dataclass(frozen=True)
class ServeSettings:
    """What is served and watched, to whom, and within which limits."""

    guard: Path | None = None
    """Directory of the guard bundle. Without one nothing is watched, and every answer
    says so."""

    policy: Policy = "stop"
    """What follows when the guard fires: observe (the answer goes on, flagged), stop
    (it ends there), refuse (and --refusal is said), steer (the bundle's edit of heads
    is on from there), redraw (the thinking is ended again with that edit)."""

    rate: float = 0.01
    """Rate of false stops per benign request; the bundle has a threshold for it."""

    refusal: str = REFUSAL
    """What is said in place of the answer under the policy `refuse`."""

    on_fault: Fault = "closed"
    """What happens to an answer that cannot be watched (its scores are no numbers, the
    reading failed): closed ends it as if the guard had fired, open lets it go on and
    says that it was not watched."""

    accept_stale: Annotated[bool, Switched] = False
    """Start also where thresholds were set on another serving configuration."""

    upstream: str | None = None
    """Stand in front of this OpenAI-shaped server (http://host:8000/v1): it writes, and
    the model here reads along."""

    upstream_key_env: str = "HOLDFAST_UPSTREAM_KEY"
    """Environment variable with the key of that server."""

    host: str = "127.0.0.1"
    """Address to listen on. Any but loopback needs API keys (HOLDFAST_API_KEYS or
    --key-file)."""

    port: int = 8080
    """Port to listen on; 0 for any that is free."""

    key_file: Path | None = None
    """File of API keys, one per line, beside those in HOLDFAST_API_KEYS."""

    name: str | None = None
    """Name of the model for clients. Default: as it was named to start."""

    queue: int = 64
    """Requests that may wait for room; further ones are answered with 429."""

    max_thinking: int = 2048
    """Tokens of thinking after which it is closed by force."""

    max_answer: int = 2048
    """Most tokens of an answer."""

    max_body: int = 1 << 20
    """Most bytes of a request."""

    requests_per_minute: int = 0
    """Most requests per minute and key, or per address without keys; 0 for any."""

    timeout: float = 600.0
    """Seconds after which an answer is given up, waiting included."""

    client_timeout: float = 30.0
    """Seconds that a client may take to send a request, or to take what is sent."""

    drain: float = 30.0
    """Seconds that answers under way have to end after SIGTERM."""

    log_text: Annotated[bool, Switched] = False
    """Write prompts and answers into the log as well."""

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        require_numbers(
            self, queue=1, max_thinking=0, max_answer=1, max_body=1024, port=0
        )
        require_numbers(self, requests_per_minute=0)
        # The system would take the rest of its division by 65536.
        if self.port > PORTS:
            raise SettingsError(
                f"--port from 0 to {PORTS}", str(self.port), "Choose another."
            )
        for name in ("timeout", "client_timeout", "drain"):
            if not 0 < getattr(self, name) <= 86400:
                raise SettingsError(
                    f"--{name.replace('_', '-')} above 0 and up to a day, in seconds",
                    f"{getattr(self, name):g}",
                    "For example 30.",
                )
        if self.guard is None and self.policy != "stop":
            raise SettingsError(
                "--guard DIR for a policy", f"--policy {self.policy} alone", "Add one."
            )
        if self.upstream is not None and self.policy in ("steer", "redraw"):
            raise SettingsError(
                "--policy observe, stop or refuse with --upstream, which writes itself",
                f"--policy {self.policy}",
                "Serve the model here to scale its heads.",
            )
        if self.upstream is not None and self.guard is None:
            raise SettingsError(
                "--guard DIR with --upstream", "none", "Add what is to be watched for."
            )
        if self.upstream is not None and not _is_url(self.upstream):
            raise SettingsError(
                "--upstream as http://HOST:PORT/v1",
                repr(self.upstream),
                "Name scheme, host and port of the server.",
            )

    @property
    def is_local(self) -> bool:
        """Whether only this machine reaches the server."""
        if self.host == "localhost":
            return True
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return False


def _is_url(text: str) -> bool:
    try:
        parts = urlsplit(text)
        # A port that is none is seen only where it is asked for.
        known = parts.port is None or parts.port > 0
    except ValueError:
        return False
    return known and parts.scheme in ("http", "https") and bool(parts.hostname)
