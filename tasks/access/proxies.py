"""A proxy of the environment is not asked for this machine itself: it would be told the password of our servers."""

from collections.abc import Mapping

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def direct(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables by which every client in use here leaves a proxy out for this machine."""
    named = ",".join(environment.get(name, "") for name in ("no_proxy", "NO_PROXY")).split(",")
    spared = ",".join(dict.fromkeys(filter(None, (*map(str.strip, named), *LOOPBACK))))
    return {"no_proxy": spared, "NO_PROXY": spared}
