"""vLLM in this process: samples on the device that trains, takes over the weights without leaving it.

A response depends on its call and the weights alone. One engine per process, each rank samples its own requests. Where
`torch.distributed` is in use, all ranks build, sync and close their engines together, after the process group exists.
After every call the trainer's random state, threads, matmul precision, launch environment and process group are as
before.
"""

from __future__ import annotations

import json
import os
import random
import sys
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, get_args

import numpy as np
import torch
from torch import Tensor

from remix.config import ModelConfig
from remix.models.loading import load_processor, sees_images
from remix.models.vision import Places, check_vllm
from remix.rollout import frames
from remix.rollout.frames import SHARED_MEMORY
from remix.rollout.limits import check_fits
from remix.rollout.serve import CPU_BATCHED_TOKENS, NEVER
from remix.tasks.images import open_image
from remix.types import Completion, FinishReason, Request, Sampling

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # weights are handed over as tensors of this process
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_HOST_IP", "127.0.0.1")  # should anything listen, then for this machine alone

try:
    from vllm import LLM, SamplingParams
    from vllm.config.lora import MaxLoRARanks
    from vllm.lora.request import LoRARequest
    from vllm.platforms import current_platform

    from remix.rollout.vllm_weights import Expected, repack_tied_heads
except ModuleNotFoundError as error:
    if error.name != "vllm":
        raise
    raise ModuleNotFoundError(
        "vLLM is not installed. Run `bash scripts/setup.sh vllm` or `pip install remix-rl[vllm]`, "
        "or sample with transformers: `rollout.engine.type: hf`.",
        name="vllm",
    ) from None

_ENVIRONMENT = ("LD_PRELOAD", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GLOO_SOCKET_IFNAME")
"""Restored after every call: the first would reach processes that the trainer starts, the others say who the rank is
and how its group talks."""


class VLLMEngine:
    """Samples with vLLM in this process. An `Engine`; at most one is open at a time.

    dtype: of weights and activations. `float32` on the CPU gives the trainer's log-probs to 1e-5.
    max_model_len: most tokens of a prompt and its response together.
    eos_token_ids: tokens that end a response; None = those of the checkpoint's generation config.
    memory_fraction: share of the GPU's memory for weights, activations and KV cache. Without effect on a CPU.
    kv_cache_gib: memory of the KV cache on a CPU. Without effect on a GPU.
    sleep: whether it gives its memory of the GPU back between calls; see `_awake`. Without effect on a CPU.
    enforce_eager: no CUDA graphs and no compilation: starts sooner, decodes slower. A CPU always runs eagerly.
    lora: the configuration of a LoRA, as PEFT writes it, without what names files. With it `sync` takes the LoRA's
        weights alone, which vLLM keeps beside those of the checkpoint.
    images: most images in one prompt.
    never: tokens that are not drawn.
    kv_blocks: blocks of the KV cache; None = as many as there is memory for, afterwards in the attribute `kv_blocks`.
    """

    _open: ClassVar[weakref.ref[VLLMEngine] | None] = None

    def __init__(
        self,
        model_path: str,
        *,
        max_model_len: int,
        dtype: str = "float32",
        eos_token_ids: Sequence[int] | None = None,
        memory_fraction: float = 0.4,
        kv_cache_gib: float = 0.25,
        enforce_eager: bool = False,
        sleep: bool = False,
        seed: int = 0,
        revision: str | None = None,
        trust_remote_code: bool = False,
        lora: Mapping[str, Any] | None = None,
        kv_blocks: int | None = None,
        images: int = 0,
        never: Sequence[int] = (),
    ) -> None:
        """Raises ValueError where there are no safetensors weights: others would run code as they are read."""
        self._refuse_a_second()
        self._model_path = model_path
        self._max_model_len = max_model_len
        self._eos_token_ids = eos_token_ids
        self._shares_process_group = torch.distributed.is_initialized()
        self._weights_intact = True
        self._lora = lora
        self._lora_request: LoRARequest | None = None
        self._never = tuple(never)
        self._sleeps = sleep
        model = ModelConfig(path=model_path, revision=revision, trust_remote_code=trust_remote_code)
        of_images = _image_options(model, images)
        self._places = Places(load_processor(model, needed=True)) if images else None
        with _trainer_undisturbed(), _clear_where_no_weights(model_path):
            _say_who_the_rank_is()
            self._llm = LLM(
                model_path,
                load_format="safetensors",
                revision=revision,
                trust_remote_code=trust_remote_code,
                dtype=dtype,
                max_model_len=max_model_len,
                gpu_memory_utilization=memory_fraction,
                num_gpu_blocks_override=kv_blocks,
                **_cpu_options(max_model_len, kv_cache_gib, enforce_eager=enforce_eager),
                seed=seed,
                logprobs_mode="processed_logprobs",  # at the sampling temperature
                **of_images,
                use_tqdm_on_load=False,
                **_lora_options(lora),
                enable_sleep_mode=sleep and not current_platform.is_cpu(),
                async_scheduling=False,  # a batch scheduled ahead would outlive its call
                distributed_executor_backend="external_launcher" if self._shares_process_group else "uni",
            )
            (model,) = self._llm.collective_rpc("get_model")
            self._expected = Expected(self._llm.llm_engine.vllm_config, model)
        self.kv_blocks: int = self._llm.llm_engine.vllm_config.cache_config.num_gpu_blocks
        with _trainer_undisturbed():
            self._fall_asleep()
        VLLMEngine._open = weakref.ref(self)

    @classmethod
    def _refuse_a_second(cls) -> None:
        # vLLM keeps its process groups in globals of the process: closing one engine would take them from another.
        if cls._open is not None and cls._open() is not None:
            raise RuntimeError("Another VLLMEngine is open in this process. Close it first: engine.close().")

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """One completion per request, in order. Under temperature 0 log-probs are those at temperature 1."""
        self._check_weights_intact()
        check_fits(requests, sampling, self._max_model_len)
        prompts = [self._prompt(request) for request in requests]
        params = [
            SamplingParams(
                seed=request.seed % 2**63,  # vLLM takes -1 to mean no seed
                max_tokens=sampling.max_tokens,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                ignore_eos=self._eos_token_ids is not None,
                stop_token_ids=list(self._eos_token_ids or ()),
                logprobs=0,  # the sampled token's only
                detokenize=False,
                logit_bias=dict.fromkeys(self._never, NEVER) or None,
            )
            for request in requests
        ]
        # vLLM compiles its log-prob gather by itself; on a CPU this takes longer (4 to 20 s) than it ever saves.
        eagerly = torch.compiler.set_stance("force_eager") if current_platform.is_cpu() else nullcontext()
        with _trainer_undisturbed(), eagerly, self._awake("weights", "kv_cache"):
            # A cached block was computed in another batch, perhaps from other weights. Within the call it is shared.
            if not self._llm.reset_prefix_cache():
                raise RuntimeError("An interrupted call left vLLM amid a step. Build a new engine.")
            self._llm.llm_engine.reset_encoder_cache()  # what other weights made of an image
            try:
                outputs = self._llm.generate(prompts, params, use_tqdm=False, lora_request=self._lora_request)
            except BaseException:
                self._abort()
                raise
        for request, output in zip(requests, outputs, strict=True):
            if list(output.prompt_token_ids) != list(request.prompt_ids):
                raise ValueError(
                    f"vLLM reads the images of {self._model_path} as {len(output.prompt_token_ids)} tokens where its "
                    f"processor has {len(request.prompt_ids)}: sample with transformers (rollout.engine.type: hf)"
                )
        return [_completion(output.outputs[0]) for output in outputs]

    def sync(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Takes over all weights, named and shaped as in the checkpoint that the engine was built from.

        The iterable is read once, tensor by tensor; a tensor may be changed or freed when the next is asked for.
        A tied output head may be among the weights or not. On an unknown, missing or misshapen weight this raises
        ValueError, and the engine, now holding a mixture, refuses to go on. With `lora`: the LoRA's weights, named as
        in PEFT's files, taken over all at once or not at all.
        """
        self._check_weights_intact()
        if self._lora is not None:
            self._swap_lora(weights, self._lora)
            return
        self._weights_intact = False
        # The cache stays away while two sets of weights are there.
        with _trainer_undisturbed(), self._awake("weights"):
            self._llm.collective_rpc(_load_weights, args=(self._checked(weights),))
        self._weights_intact = True

    def _swap_lora(self, weights: Iterable[tuple[str, Tensor]], config: Mapping[str, Any]) -> None:
        tensors = dict(weights)
        folder_of = TemporaryDirectory(dir=SHARED_MEMORY, prefix="remix-lora-")
        with _trainer_undisturbed(), self._awake("weights"), folder_of as folder:
            (Path(folder) / "adapter_config.json").write_text(json.dumps(dict(config)), encoding="utf-8")
            (Path(folder) / "adapter_model.safetensors").write_bytes(frames.pack({}, tensors))
            # In place: another of the same number would be taken for the one that is there.
            self._llm.llm_engine.add_lora(LoRARequest("policy", 1, folder, load_inplace=True))
            self._lora_request = LoRARequest("policy", 1, folder)

    def close(self) -> None:
        """Gives back the memory; the engine cannot be used afterwards. Closing twice is fine."""
        if not hasattr(self, "_llm"):
            return
        with _process_group_kept() if self._shares_process_group else nullcontext():
            self._llm.llm_engine.engine_core.shutdown()
        del self._llm
        VLLMEngine._open = None

    @contextmanager
    def _awake(self, *tags: str) -> Iterator[None]:
        """Memory of these kinds is there meanwhile; of an engine that does not sleep it always is.

        What is asleep has no memory: weights wait in main memory (level 1), since a call may come without a `sync`
        before it, and the cache is made anew for every call anyway.
        """
        if self._sleeps:
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()  # vLLM takes memory that is free, not what torch keeps for later
            self._llm.wake_up(tags=list(tags))
        try:
            yield
        finally:
            self._fall_asleep()

    def _fall_asleep(self) -> None:
        if self._sleeps:
            self._llm.sleep(level=1)

    def _prompt(self, request: Request) -> dict[str, Any]:
        if not request.images:
            return {"prompt_token_ids": list(request.prompt_ids)}
        assert self._places is not None, "built for prompts with images"
        return {
            "prompt_token_ids": self._places.unexpanded(request.prompt_ids, request.images),
            "multi_modal_data": {"image": [open_image(reference) for reference in request.images]},
        }

    def _abort(self) -> None:
        """Forgets the requests of a call that was interrupted, which the next would compute along with its own."""
        engine = self._llm.llm_engine
        engine.abort_request(list(engine.output_processor.request_states), internal=True)
        self._llm.collective_rpc(_forget_batch)

    def _check_weights_intact(self) -> None:
        if not self._weights_intact:
            raise RuntimeError("An earlier weight sync failed and left a mixture of weights. Build a new engine.")

    def _checked(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        current: list[Tensor] = []

        def shapes() -> Iterator[tuple[str, torch.Size]]:
            for name, tensor in weights:
                current[:] = [tensor]
                yield name, tensor.shape

        for name in self._expected.checked(shapes()):
            # vLLM holds on to the tensors of a layer until the last of them has come.
            yield name, current[0].detach().clone()


def _say_who_the_rank_is() -> None:
    """In the environment, where vLLM looks for it."""
    if torch.distributed.is_initialized():
        os.environ.setdefault("RANK", str(torch.distributed.get_rank()))
        os.environ.setdefault("LOCAL_RANK", os.environ["RANK"])
    elif sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # it listens, though it is alone in its group


def _cpu_options(max_model_len: int, kv_cache_gib: float, *, enforce_eager: bool) -> dict[str, Any]:
    """What is another on a CPU, of vLLM's options."""
    if not current_platform.is_cpu():
        return {"enforce_eager": enforce_eager}
    return {
        "enforce_eager": True,
        "kv_cache_memory_bytes": int(kv_cache_gib * 2**30),
        # Between two chunks of a prompt vLLM turns a seeded generator back, which one of a CPU cannot do.
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(max_model_len, CPU_BATCHED_TOKENS),
    }


def _image_options(model: ModelConfig, images: int) -> dict[str, Any]:
    """Token ids in, token ids out; but a processor of images needs the tokenizer."""
    if not sees_images(model):
        return {"skip_tokenizer_init": True}
    check_vllm(model.path)
    return {"skip_tokenizer_init": False, "limit_mm_per_prompt": {"image": images, "video": 0}}


def _lora_options(lora: Mapping[str, Any] | None) -> dict[str, Any]:
    """Room for one LoRA, of the next rank that vLLM has kernels for."""
    if lora is None:
        return {}
    slots: tuple[int, ...] = get_args(MaxLoRARanks)
    return {"enable_lora": True, "max_loras": 1, "max_lora_rank": next(size for size in slots if size >= lora["r"])}


def _completion(output: Any) -> Completion:
    if output.finish_reason not in ("stop", "length"):
        raise RuntimeError(f"vLLM ended a response with {output.finish_reason!r} instead of stop or length.")
    reason: FinishReason = output.finish_reason
    sampled = [of_token[token].logprob for of_token, token in zip(output.logprobs, output.token_ids, strict=True)]
    return Completion(
        response_ids=torch.tensor(output.token_ids, dtype=torch.int64),
        sampler_logprobs=torch.tensor(sampled, dtype=torch.float32),
        finish_reason=reason,
    )


def _forget_batch(worker: Any) -> None:
    worker.model_runner.execute_model_state = None  # what a forward pass left for the sampling that never came


def _load_weights(worker: Any, weights: Iterator[tuple[str, Tensor]]) -> None:
    worker.reload_weights(weights_iterator=weights)
    repack_tied_heads(worker.get_model())


@contextmanager
def _trainer_undisturbed() -> Iterator[None]:
    """Gives the trainer back what vLLM changes in its process: random state, threads, precision, environment."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    set_num_threads, num_threads = torch.set_num_threads, torch.get_num_threads()
    precision = torch.get_float32_matmul_precision()
    environment = {name: os.environ.get(name) for name in _ENVIRONMENT}
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_num_threads = set_num_threads  # on a CPU vLLM puts a function that does nothing in its place
        torch.set_num_threads(num_threads)
        torch.set_float32_matmul_precision(precision)
        for name, value in environment.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _clear_where_no_weights(model_path: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if "Cannot find any model weights" not in str(error):
            raise
        raise ValueError(
            f"model {model_path}: no weights as safetensors (*.safetensors) there, and others are never read, as "
            "reading a pickle can run any code. Save it with save_pretrained of transformers 5, which writes them"
        ) from error


@contextmanager
def _process_group_kept() -> Iterator[None]:
    """vLLM's shutdown destroys the default process group, also where the trainer had made it."""
    destroy = torch.distributed.destroy_process_group

    def destroy_own(group: Any = None) -> None:
        if group is not None:
            destroy(group)

    torch.distributed.destroy_process_group = destroy_own
    try:
        yield
    finally:
        torch.distributed.destroy_process_group = destroy
