"""A Ray that is there already: its address, whether it wants a token, and whether its nodes can do the work.
This is checked beforehand, because Ray answers a wrong guess with pages of its own stack."""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import grpc
import ray
from ray._private.services import canonicalize_bootstrap_address_or_die
from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ddsweep.errors import UserError
from ddsweep.machine import NONCE, versions
from ddsweep.results.files import write_atomic

__all__ = ["check_nodes", "find_ray", "is_silent", "read_token_again", "use_its_token"]

_METHOD = "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo"
"""A method of Ray's control service (GCS). An empty request asks for all nodes."""

_ANSWER_S = 10.0
_LOOK_AT_NODES_S = 300.0

_HOW_TO_JOIN = "such as 10.0.0.1:6379, or auto for the one on this machine (docs/cluster.md)"


def find_ray(address: str) -> str:
    """``host:port`` of the control service that ``address`` means. Raises `UserError`."""
    if "://" in address:
        raise UserError(
            f"--address: {address} is for Ray Client or the dashboard; run ddsweep on a node of the cluster "
            f"(ray job submit does), with the address of its head, {_HOW_TO_JOIN}"
        )
    try:
        found = canonicalize_bootstrap_address_or_die(address)
        host, _, port = found.rpartition(":")
        socket.getaddrinfo(host.strip("[]"), int(port))
    except ConnectionError:
        raise UserError(
            "--address: there is no Ray on this machine, or more than one; name one, such as 10.0.0.1:6379"
        ) from None
    except (ValueError, OSError) as error:
        raise UserError(
            f"--address: {address}: {error}; give the address of the head, {_HOW_TO_JOIN}"
        ) from None
    return str(found)


Answer = Literal["open", "closed", "silent"]


def knock(address: str, token: str | None, timeout_s: float | None = None) -> Answer:
    """The answer of the control service at ``address`` to ``token``, or without one."""
    metadata = () if token is None else (("authorization", f"Bearer {token}"),)
    with grpc.insecure_channel(address) as channel:
        try:
            ask = channel.unary_unary(_METHOD)
            ask(b"", timeout=timeout_s or _ANSWER_S, metadata=metadata, wait_for_ready=True)
        except grpc.RpcError as error:
            return "closed" if error.code() == grpc.StatusCode.UNAUTHENTICATED else "silent"
    return "open"


def is_silent(address: str) -> bool:
    """Whether no Ray answers there any more. One that asks for a token answers. Under TLS this cannot be
    told, and is false."""
    return not _under_tls() and knock(address, None) == "silent"


def _under_tls() -> bool:
    return os.environ.get("RAY_USE_TLS", "0") not in ("", "0")


def read_token_again() -> Any:
    """Have Ray read how to log in again: it reads its configuration at import, and keeps the last token.
    Returns its loader of tokens."""
    Config.initialize("")
    loader = AuthenticationTokenLoader.instance()
    loader.reset_cache()
    return loader


def use_its_token(address: str) -> None:
    """Tell Ray in this process whether the one at ``address`` wants a token, which must be where Ray looks
    for it. Raises `UserError` without an answer, and for a missing or wrong token."""
    if _under_tls():
        return  # asking needs its certificates; Ray reports problems itself
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_S).close()
        answer = knock(address, None)
        why = "another program listens there"
    except OSError as error:
        answer, why = "silent", error.strerror or str(error)
    if answer == "silent":
        raise UserError(
            f"--address: no Ray answers at {address} ({why}); is it up, and is that the port of its head "
            "(ray start prints it, mostly 6379; it is not that of the dashboard)?"
        )
    os.environ["RAY_AUTH_MODE"] = "disabled" if answer == "open" else "token"
    loader = read_token_again()
    if answer == "open":
        return
    wants = f"--address: the Ray at {address} wants a token"
    where = "RAY_AUTH_TOKEN_PATH (a file of mode 600), RAY_AUTH_TOKEN, or ~/.ray/auth_token"
    try:
        token = loader.get_raw_token(ignore_auth_mode=True) if loader.has_token(ignore_auth_mode=True) else ""
    except Exception as error:  # Ray's, of a file that cannot be read
        raise UserError(f"{wants}: {' '.join(str(error).split())[:300]}") from None
    if not token:
        raise UserError(f"{wants}, and there is none in {where}")
    if knock(address, token) == "closed":
        raise UserError(f"{wants}, and not the one that was found in {where}")


# ------------------------------------------------------------------------------------------ its nodes


def check_nodes(hosts: Mapping[str, str], folder: Path) -> None:
    """Raises `UserError` with all problems of the cluster's nodes: other versions than here, no ddsweep, or
    another or unwritable ``folder`` of results. ``hosts`` are their names by their ids in Ray."""
    nonce = secrets.token_hex(16)
    place = folder / f"nodes-{nonce[:8]}"
    place.mkdir()
    try:
        write_atomic(place / NONCE, nonce.encode(), folder)
        look, asked = ray.remote(_look()), {}
        how = {"num_cpus": 0, "memory": 1, "max_retries": 2, "name": "look at a node"}
        for node, host in hosts.items():
            there = look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False), **how)
            asked[there.remote(str(place), nonce, versions())] = host
        by_trouble: dict[str, list[str]] = {}
        ray.wait(list(asked), num_returns=len(asked), timeout=_LOOK_AT_NODES_S)
        for reference, host in asked.items():
            if trouble := _trouble(reference):
                by_trouble.setdefault(trouble, []).append(host)
    finally:
        for path in (*place.glob("*"), place):
            (path.rmdir if path == place else path.unlink)()
    if by_trouble:
        told = "; ".join(f"{', '.join(nodes)}: {text}" for text, nodes in by_trouble.items())
        raise UserError(f"--address: nodes of this Ray cannot run the sweep: {told}")


def _trouble(reference: Any) -> str:
    try:
        return str(ray.get(reference, timeout=0.1))
    except ray.exceptions.GetTimeoutError:
        return f"did not answer within {_LOOK_AT_NODES_S:.0f} s"
    except ray.exceptions.RayError as error:
        return " ".join(str(getattr(error, "cause", None) or error).split())[:300]


def _look() -> Callable[[str, str, dict[str, str]], str]:
    """The check on a node. An inner function is sent as code and not by its name, because the node may lack
    ddsweep."""

    def look(place: str, nonce: str, wanted: dict[str, str]) -> str:
        from pathlib import Path

        try:
            from ddsweep.machine import folder_trouble, shared_trouble, versions
        except ImportError as error:
            if error.name and not error.name.startswith("ddsweep"):
                return f"ddsweep cannot be imported there: {error}"
            return f"has no ddsweep, or an older one; install {wanted['ddsweep']} there"
        found = versions()
        if other := [
            f"{key} {found[key]} (here {wanted[key]})" for key in wanted if found[key] != wanted[key]
        ]:
            return f"has other versions: {', '.join(other)}; install the same environment on all nodes"
        trouble = shared_trouble(Path(place), nonce) or folder_trouble(Path(place))
        return trouble and f"{trouble}; --results must be a folder that all nodes share"

    return look
