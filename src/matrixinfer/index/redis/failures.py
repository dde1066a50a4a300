"""What kind of error keeps Redis from being used, and what to do about it, in words."""

from __future__ import annotations

from typing import Literal, TypeAlias

from redis.exceptions import AuthenticationError, NoPermissionError

from matrixinfer.errors import IndexUnavailable

RedisFailure: TypeAlias = Literal["unreachable", "login", "permission"]
"""Why Redis cannot be used: no answer; it refuses the login; or a command or a key."""
_REFUSALS = ("NOAUTH", "WRONGPASS", "invalid username-password", "invalid password", "Authentication required")


def failure_of(error: IndexUnavailable) -> RedisFailure:
    """The kind of an error that the client raised."""
    if isinstance(error.__cause__, NoPermissionError):
        return "permission"
    # A server with other errors at the login is not ready yet; the client derives those from the same class.
    if isinstance(error.__cause__, AuthenticationError) or any(sign in str(error) for sign in _REFUSALS):
        return "login"
    return "unreachable"


def explained(failure: RedisFailure, *, where: str, username: str | None, error: str) -> tuple[str, str]:
    """What happened, and what to do. `where` is the server's address, `error` the client's own words."""
    user = f"the user `{username}`" if username else "the default user"
    if failure == "login":
        return (
            f"Redis at {where} refuses the login of {user}: {error}",
            "correct `redis.username` and `redis.password`, or the environment variable REDIS_PASSWORD",
        )
    if failure == "permission":
        return (
            f"Redis at {where} does not let {user} read the index: {error}",
            "allow the keys and commands under Permissions in docs/redis.md (`ACL SETUSER`)",
        )
    return f"Redis at {where} does not answer: {error}", "start it, or correct `redis` in the config"
