"""Requests to this machine itself go past a proxy of the environment, which would learn the password of our servers."""

from collections.abc import Mapping

LOOPBACK = ("127.0.0.1", "localhost", "::1")
"""The names of this machine."""


def direct(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables with which clients use no proxy for this machine, nor for the hosts that the user named."""
    user_hosts = ",".join(environment.get(name, "") for name in ("no_proxy", "NO_PROXY")).split(",")
    hosts = ",".join(dict.fromkeys(filter(None, (*map(str.strip, user_hosts), *LOOPBACK))))
    # both spellings, since some clients read only one of them
    return {"no_proxy": hosts, "NO_PROXY": hosts}
