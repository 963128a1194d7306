"""How rollouts are sampled and put into batches."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from remix.config.block import Block, Fraction


class HFEngineConfig(Block):
    """transformers on the trainer's own module."""

    type: Literal["hf"] = "hf"
    batch_size: PositiveInt = 256
    """Responses generated side by side."""


LARGEST_SWAPPED_RANK = 512
"""Of a LoRA that vLLM holds beside the base weights."""


class VLLMEngineConfig(Block):
    """vLLM, in the trainer's process or beside it."""

    type: Literal["vllm"] = "vllm"
    lora: Literal["merged", "hot_swap"] = "merged"
    """How an adapter gets there. merged: folded into a copy of all weights. hot_swap: the LoRA alone, which vLLM keeps
    beside the base weights: less is sent after each step, and each token costs more."""
    own_process: bool = False
    """Run it in a child process of each rank. Should that die or hang it is started again and asked the same again,
    and the run computes what it would have computed."""
    timeout: PositiveFloat = 1200.0
    """Seconds that one call to an engine in its own process may take before it counts as hung."""
    restarts: NonNegativeInt = 3
    """How often a run starts an engine in its own process again."""
    memory_fraction: Fraction = 0.4
    """Share of a GPU's memory that vLLM takes."""
    kv_cache_gib: PositiveFloat = 0.25
    """Cache size on a machine without a GPU."""
    enforce_eager: bool = False
    """Without CUDA graphs: starts sooner, samples slower."""
    sleep: bool = False
    """vLLM gives its memory of the GPU back whenever it does not sample: its weights wait in the host's memory, its
    cache is forgotten. Then memory_fraction may be as large as if it had the GPU to itself. Not on a CPU."""


class VLLMServerConfig(Block):
    """vLLM as servers (`python -m remix.rollout.serve`), on GPUs of their own, which all processes of a run share."""

    type: Literal["vllm_server"] = "vllm_server"
    urls: tuple[str, ...] = ()
    """Servers that are there, for example http://127.0.0.1:8000. Empty: the run starts its own, on this machine."""
    replicas: PositiveInt = 1
    """Servers that the run starts. Prompts are dealt out over all that answer."""
    devices: tuple[str, ...] = ()
    """GPUs of each replica that the run starts, as CUDA_VISIBLE_DEVICES names them: ["4,5", "6,7"]."""
    port: Annotated[int, Field(ge=1, le=65535)] | None = None
    """Of the first server that the run starts; the others' follow. Default: free ones."""
    tensor_parallel: PositiveInt = 1
    """GPUs over which a server that the run starts splits the model."""
    transfer: str | None = None
    """A folder that trainer and servers see, through which weights go. Default: this machine's shared memory."""
    lora: Literal["merged", "hot_swap"] = "merged"
    """How an adapter gets there: folded into a copy of all weights."""
    timeout: PositiveFloat = 600.0
    """Seconds that a response or a weight sync may take before its server counts as hung."""
    retries: NonNegativeInt = 3
    """How often a server that fails to answer is asked again, after growing pauses, before it is left out."""
    restarts: NonNegativeInt = 3
    """How often a run starts servers of its own again."""
    memory_fraction: Fraction = 0.9
    """Share of a GPU's memory that a server takes which the run starts."""
    kv_cache_gib: PositiveFloat = 0.25
    """Its cache size on a machine without a GPU."""
    enforce_eager: bool = False
    """Without CUDA graphs: starts sooner, samples slower."""


class RefillConfig(Block):
    """Dynamic sampling (DAPO): groups whose rewards are all equal are sampled anew from further prompts."""

    max_rounds: NonNegativeInt = 0
    """Further rounds of sampling a step may spend; 0 = off."""


class RolloutConfig(Block):
    """How responses are sampled."""

    engine: Annotated[HFEngineConfig | VLLMEngineConfig | VLLMServerConfig, Field(discriminator="type")] = (
        HFEngineConfig()
    )
    """What samples."""
    group_size: PositiveInt = 8
    """Responses to one prompt."""
    temperature: PositiveFloat = 1.0
    """Of sampling. Log-probs of the policy are at this temperature too."""
    max_tokens: PositiveInt = 1024
    """Longest response; what is not over by then is truncated."""
    overlap: bool = False
    """While a step is scored and updates, sample the next step's rollouts from the policy as it began. Fresh rollouts
    are then one policy old (policy_lag 1) in phases of either type, and replayed ones up to window + 1, which the
    objective treats as what they are. The first step of each phase samples from the policy as it is: nothing sampled
    before a reincarnation is trained on after it. Rounds of `refill` follow the update, by the same policy as the
    first. Needs an engine in processes of its own: vllm with own_process, or vllm_server."""
    mask_overlong: bool = False
    """Leave truncated responses out of loss and denominator."""
    drop_uniform_groups: bool | None = None
    """Groups whose rewards are all equal are neither trained on nor stored for replay.
    Default: true where they carry no gradient, which is under group-relative advantages without a KL in the reward."""
    refill: RefillConfig = RefillConfig()
    """Sampling again in place of groups that carry no gradient."""
    probe_tolerance: PositiveFloat | None = None
    """Largest mean |log-prob difference| between engine and trainer after a weight sync.
    Default: 1e-3 in float32, 0.05 in bfloat16."""


class BatchConfig(Block):
    """What a training step trains on, and in what pieces."""

    prompts: PositiveInt
    """Groups in a training step's batch, fresh and replayed together."""
    minibatches: PositiveInt = 1
    """Optimiser steps in one pass over the batch."""
    tokens_per_microbatch: PositiveInt = 16384
    """Prompt + response tokens of one forward and backward pass on one device: of a prompt and all of its responses
    once, where sequences are packed, else padded to the longest."""
    pack: bool = True
    """Sequences side by side without padding, each prompt once for all of its responses, where the model can have
    that: a run that cannot says why and pads. false: always pad."""
