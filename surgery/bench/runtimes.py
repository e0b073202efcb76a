"""How each runtime loads a model and generates; imported in the measured process only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from surgery.bench.loaded import Generate, Loaded
from surgery.errors import CheckpointError


def load_transformers(job: dict[str, Any]) -> Loaded:
    """The model in transformers, as it is or compiled by torch.compile with a cache of fixed size."""
    import torch
    import transformers

    import surgery.loading  # noqa: F401  (layers of their own widths)

    dtype = job["dtype"] if job["dtype"] == "auto" else getattr(torch, job["dtype"])
    load = transformers.AutoModelForCausalLM.from_pretrained
    return _in_transformers(job, lambda: load(job["model"], revision=job.get("revision"), dtype=dtype))


def load_random(job: dict[str, Any]) -> Loaded:
    """A model of a config with random weights in transformers: as fast as a trained one of its shape."""
    import torch

    from surgery.checkpoint.transformers_model import auto_class, build_config

    config = build_config(job["config"], job["model"])
    dtype = getattr(torch, job["dtype"])
    return _in_transformers(job, lambda: auto_class(config).from_config(config, dtype=dtype))


def _in_transformers(job: dict[str, Any], load: Callable[[], Any]) -> Loaded:
    """What `load` gives, on the job's device with its threads, compiled where the runtime says so."""
    import torch
    import transformers

    if job["threads"]:
        torch.set_num_threads(job["threads"])
    model = load().eval().to(job["device"])
    compiled = job["runtime"] == "transformers-compiled"
    if compiled:
        model.forward = torch.compile(model.forward)
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    on_cuda = torch.device(job["device"]).type == "cuda"

    def device_bytes() -> int | None:
        return int(torch.cuda.max_memory_allocated()) if on_cuda else None

    generate = _transformers_generate(model, job, compiled)
    return Loaded(generate, versions, model.config.get_text_config().vocab_size, device_bytes)


def _transformers_generate(model: Any, job: dict[str, Any], compiled: bool) -> Generate:
    import torch
    from transformers import GenerationConfig, StaticCache

    length = job["prompt_tokens"] + job["new_tokens"] + 1

    def generate(prompts: list[list[int]], tokens: int) -> None:
        ids = torch.tensor(prompts, device=job["device"])
        settings = GenerationConfig(
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
            disable_compile=True,
        )
        cache = {"past_key_values": StaticCache(model.config, max_cache_len=length)} if compiled else {}
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), generation_config=settings, **cache
            )
        _check_count(int(out.shape[1]) - len(prompts[0]), tokens)  # waits for the device too

    return generate


def load_llama_cpp(job: dict[str, Any]) -> Loaded:
    """The model's GGUF file in llama.cpp, by the bindings of xllamacpp; torch would count as memory."""
    import xllamacpp

    most = max(job["batches"])
    options = xllamacpp.CommonParams()
    options.model.path = job["gguf"]
    options.n_parallel, options.verbosity = most, -1
    options.n_ctx = most * (job["prompt_tokens"] + job["new_tokens"] + 8)
    if job["threads"]:
        options.cpuparams.n_threads = options.cpuparams_batch.n_threads = job["threads"]
    try:
        server = xllamacpp.Server(options)
    except RuntimeError as error:
        raise CheckpointError("llama.cpp can't load the file", found=str(error)[:200]) from error

    def generate(prompts: list[list[int]], tokens: int) -> None:
        request = {
            "prompt": prompts if len(prompts) > 1 else prompts[0],
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "cache_prompt": False,
        }
        answer = server.handle_completions(request)
        found = [choice["finish_reason"] == "length" for choice in answer["choices"]]
        # of several answers in one, the usage is that of the first
        _check_count(answer["usage"]["completion_tokens"] * sum(found), tokens * len(prompts))

    return Loaded(generate, {"xllamacpp": xllamacpp.__version__}, job["vocabulary"])


def load_vllm(job: dict[str, Any]) -> Loaded:
    """The model in vLLM, without a prefix cache, which would answer the second run from the first."""
    import vllm

    model = vllm.LLM(
        model=job["model"],
        revision=job.get("revision"),
        dtype=job["dtype"],
        max_model_len=job["prompt_tokens"] + job["new_tokens"] + 1,
        max_num_seqs=max(job["batches"]),
        enable_prefix_caching=False,
        seed=job["seed"],
    )

    def generate(prompts: list[list[int]], tokens: int) -> None:
        settings = vllm.SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
        answers = model.generate([{"prompt_token_ids": ids} for ids in prompts], settings, use_tqdm=False)
        _check_count(sum(len(one.outputs[0].token_ids) for one in answers), tokens * len(prompts))

    vocabulary = model.llm_engine.model_config.get_vocab_size()
    return Loaded(generate, {"vllm": vllm.__version__}, vocabulary)


def _check_count(found: int, wanted: int) -> None:
    """Raise CheckpointError where a runtime stopped early: its speed would be that of other work."""
    if found != wanted:
        raise CheckpointError("the runtime stopped early", expected=f"{wanted} new tokens", found=str(found))


LOADERS: dict[str, Callable[[dict[str, Any]], Loaded]] = {
    "transformers": load_transformers,
    "transformers-compiled": load_transformers,
    "llama.cpp": load_llama_cpp,
    "vllm": load_vllm,
    "random": load_random,
}
