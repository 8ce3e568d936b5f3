"""The limits of a server: their defaults, their ranges, and how a user sets them.

The fields of `Limits` are the only list of limits. The flags, environment variables and help of
`vidjax serve`, `/openapi.json` and the table in the page of the server come from these fields.
"""

from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple, get_args

import msgspec
from msgspec import Meta, Struct

from vidjax.utils.errors import UserError, closest

PREFIX = "VIDJAX_SERVE_"  # an environment variable is this text and the name of a limit
LOCK_SECONDS = 5.0  # how long a change of a gallery waits for changes of other programs to end
MOST, DAY = 1 << 40, 86_400  # largest values, of numbers and of seconds


def _size(about: str) -> Meta:
    return Meta(ge=1, le=MOST, description=about)


def _seconds(about: str, least: int = 1) -> Meta:
    return Meta(ge=least, le=DAY, description=about)


def _duration(about: str) -> Meta:
    return Meta(gt=0, le=DAY, description=about)


class Limits(Struct, frozen=True, kw_only=True):
    """The limits of a server. Names end in `_bytes` for sizes, and in `_seconds` for times."""

    # fmt: off
    body_bytes: Annotated[int, _size(
        "a body, and the arrays of an .npz file as float32 (413, 422)")] = 32 << 20
    json_bytes: Annotated[int, _size("a JSON body (413)")] = 4 << 20
    held_bytes: Annotated[int, _size(
        "all bodies, frames and answers in memory (429); at least 3 times body_bytes")] = 256 << 20
    clips: Annotated[int, _size("clips in a request (422)")] = 256
    frames: Annotated[int, _size("frames in a clip and modality (422)")] = 20_000
    batch_clips: Annotated[int, _size("clips that are scored together")] = 64
    waiting_clips: Annotated[int, _size("clips that wait to be scored or embedded (429)")] = 1024
    waiting_changes: Annotated[int, _size("enrolments and removals that wait (429)")] = 16
    answer_seconds: Annotated[float, _duration(
        "from the end of the body to the answer (503)")] = 10.0
    # After a removal, the parameters of the gallery may be fitted to the remaining clips, which can
    # take minutes.
    change_seconds: Annotated[float, _duration(
        "in addition, for a change of the gallery (503)")] = 120.0
    lock_seconds: Annotated[float, _seconds(
        "that a change waits for a change by another server or command (503); 0: it tries once",
        least=0)] = LOCK_SECONDS
    request_seconds: Annotated[float, _duration(
        "to receive a body, and again to send the answer (503, or cut off)")] = 130.0
    # The web server, not the application, applies the limits from here on.
    connections: Annotated[int, _size("open connections (503)")] = 512
    idle_seconds: Annotated[int, _seconds("until an idle connection is closed")] = 30
    unread_seconds: Annotated[int, _seconds(
        "until a client that reads nothing is cut off, on Linux")] = 60
    unready_seconds: Annotated[int, _seconds(
        "from SIGTERM until connections are refused; not ready meanwhile, so that a proxy asks "
        "another server; 0: they are refused at once", least=0)] = 0
    drain_seconds: Annotated[int, _seconds(
        "then, to finish the answers of received requests; 0: they are cut off", least=0)] = 15
    end_seconds: Annotated[int, _seconds("then, until a process that hangs is killed")] = 5
    # fmt: on

    def __post_init__(self) -> None:
        """Raises UserError if `held_bytes` is below three times `body_bytes`.

        A body of the largest size, its arrays and a copy of the arrays must fit into `held_bytes`.
        """
        if self.held_bytes < 3 * self.body_bytes:  # the body, its arrays, and a copy of the arrays
            raise UserError(
                f"held_bytes={self.held_bytes} is too small for body_bytes={self.body_bytes}: set "
                f"held_bytes to {3 * self.body_bytes} or more"
            )


class Limit(NamedTuple):
    """The range, default, flag and environment variable of a limit, a field of `Limits`."""

    kind: Any  # int or float, with its range
    meta: Meta  # the range and the meaning
    text: str  # the default, such as `20,000`
    flag: str  # the flag that sets the limit, such as `--body-bytes`
    variable: str  # the environment variable that sets the limit

    def read(self, place: str, text: str) -> float:
        """Converts the text that a user gave for a limit to a number.

        `place` is the flag or environment variable, for messages. Raises UserError if the text is
        wrong.
        """
        meta = self.meta
        try:
            return msgspec.convert(text.strip(), self.kind, strict=False)
        except msgspec.ValidationError:
            low = f"above {meta.gt}" if meta.ge is None else f"at least {meta.ge}"
            kind = "a whole number" if get_args(self.kind)[0] is int else "a number"
            raise UserError(
                f"{place}={text[:20]}: give {kind}, {low} and at most {meta.le:,}"
            ) from None


LIMITS = {
    x.name: Limit(
        x.type, get_args(x.type)[1], f"{x.default:,.15g}",
        flag="--" + x.name.replace("_", "-"), variable=PREFIX + x.name.upper(),
    )
    for x in msgspec.structs.fields(Limits)
}  # fmt: skip


def read_limits(flags: Mapping[str, str | None], environment: Mapping[str, str]) -> Limits:
    """Returns the limits of a server, which a user sets with flags and environment variables.

    `flags` is name of a limit -> value as text, or None if the flag is not given. `environment` is
    name of a variable -> value as text. A flag has priority over a variable, and a variable over
    the default. Raises UserError for a wrong value, or for a misspelt name of a variable.
    """
    # Kubernetes sets variables such as VIDJAX_SERVE_PORT, which resembles no limit, for a service
    # that is called vidjax-serve.
    for variable in environment.keys() - {limit.variable for limit in LIMITS.values()}:
        name = variable.removeprefix(PREFIX).lower() if variable.startswith(PREFIX) else ""
        if similar := closest(name, LIMITS, cutoff=0.8):
            raise UserError(f"unknown limit {variable}: did you mean {LIMITS[similar].variable}?")
    values = {}
    for name, limit in LIMITS.items():
        if text := flags.get(name):
            values[name] = limit.read(limit.flag, text)
        elif text := environment.get(limit.variable):
            values[name] = limit.read(limit.variable, text)
    return Limits(**values)
