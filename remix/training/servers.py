"""From a recipe to vLLM servers: those that are there, checked, or those that the run starts."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Sequence
from typing import TypeVar

from remix.config import Recipe, VLLMServerConfig
from remix.models import files
from remix.models.policy import Policy
from remix.rollout.launch import OwnServers, choose_ports
from remix.rollout.replica import Wanted
from remix.rollout.serve import KEY, served
from remix.rollout.server import ServerEngine
from remix.training.distributed import Cluster

A = TypeVar("A")


def open_servers(
    recipe: Recipe,
    config: VLLMServerConfig,
    policy: Policy,
    longest: int,
    cluster: Cluster,
    message: Callable[[str], None],
) -> ServerEngine:
    """The first rank checks or starts them; all ranks ask them. `longest`: most tokens of a prompt and its response.

    Raises ValueError on all ranks where they cannot be had.
    """

    key, urls, ports = _by_the_first(cluster, lambda: _key_and_urls(config))
    engine = ServerEngine(
        urls,
        key=key,
        max_model_len=longest,
        eos_token_ids=policy.module.eos_token_ids,
        never=policy.module.never,
        timeout=config.timeout,
        retries=config.retries,
        transfer=config.transfer,
        own=not config.urls,
        message=message,
        gather=lambda value: cluster.gather(value, "the hand-over of weights to the servers"),
        is_main=cluster.is_main,
    )

    def ready() -> None:
        if config.urls:
            engine.check(_wanted(recipe, longest))
            return
        message(f"starting {config.replicas} vLLM server{'s' * (config.replicas > 1)}")
        engine.servers = OwnServers(
            recipe.model.path,
            _options(recipe, config, longest),
            ports=ports,
            devices=config.devices,
            key=key,
            max_restarts=config.restarts,
            message=message,
            revive=engine.revive,
        )
        engine.servers.wait(engine.answers)

    try:
        _by_the_first(cluster, ready)
    except BaseException:
        engine.close()
        raise
    return engine


def _key_and_urls(config: VLLMServerConfig) -> tuple[str, Sequence[str], Sequence[int]]:
    """And the ports, of servers that are still to be started."""
    if not config.urls:
        ports = choose_ports(config.port, config.replicas)
        return secrets.token_urlsafe(32), [f"http://127.0.0.1:{port}" for port in ports], ports
    key = os.environ.get(KEY, "").strip()
    if not key:
        raise ValueError(f"rollout.engine.urls: set {KEY} to the key that the servers were started with")
    return key, config.urls, ()


def refuse_servers(recipe: Recipe) -> None:
    """Raises ValueError where a model that sees images is to be sampled from servers."""
    if isinstance(recipe.rollout.engine, VLLMServerConfig):
        raise ValueError(
            f"rollout.engine.type vllm_server takes token ids alone, and {recipe.model.path} sees images: set it to "
            "vllm or hf"
        )


def _wanted(recipe: Recipe, longest: int) -> Wanted:
    folder = files.find(recipe.model.path, recipe.model.revision, files.SMALL_FILES, "model.path")
    return Wanted(recipe.model.path, **served(folder), dtype=recipe.model.dtype, max_model_len=longest)


def _options(recipe: Recipe, config: VLLMServerConfig, longest: int) -> list[str]:
    words: dict[str, object] = {
        "max-model-len": longest,
        "dtype": recipe.model.dtype,
        "tensor-parallel": config.tensor_parallel,
        "memory-fraction": config.memory_fraction,
        "kv-cache-gib": config.kv_cache_gib,
        "seed": recipe.seed,
    }
    if recipe.model.revision is not None:
        words["revision"] = recipe.model.revision
    switches = {"trust-remote-code": recipe.model.trust_remote_code, "enforce-eager": config.enforce_eager}
    return [f"--{name}={value}" for name, value in words.items()] + [f"--{name}" for name in switches if switches[name]]


def _by_the_first(cluster: Cluster, work: Callable[[], A]) -> A:
    """What the first rank finds, on all of them, a ValueError too."""
    found: A | ValueError | None = None
    if cluster.is_main:
        try:
            found = work()
        except ValueError as error:
            found = error
    found = cluster.gather(found, "the first process, which sees to the vLLM servers")[0]
    if isinstance(found, ValueError):
        raise found
    return found  # type: ignore[return-value]
