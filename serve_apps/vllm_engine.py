"""The `Filter` on vLLM: one asynchronous engine, verdicts constrained to two words, a reason only after FAIL.

vLLM batches concurrent calls itself. The first call holds the engine's grammar, not the text, to PASS or FAIL, so the
log-probabilities of its first token are those of the two words; the reason continues the same conversation, whose pictures
and prefix the engine has cached.
"""

import itertools
import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from rlhf.errors import Refused
from rlhf.rewards import filters
from rlhf.rewards.config import FilterJudgeConfig
from rlhf.rewards.protocols import JudgeError, Sources, quick_fingerprint
from rlhf.types import Verdict

TOP_LOGPROBS = 20
"""vLLM's own limit; at most 8 beginnings of the two words exist."""


class VLLMFilter:
    """A `Filter` that owns a vLLM engine until `close`."""

    def __init__(self, judge: FilterJudgeConfig):
        """Load the folder `judge.path` into a new engine, in a running event loop: about a minute for a tiny model on a CPU."""
        path = Path(str(judge.path))
        self.judge_config, self.device = judge, "cuda" if judge.num_gpus else "cpu"
        self.version = f"{path.name}@{quick_fingerprint(path)}"
        self._ids = itertools.count()
        if not judge.num_gpus:
            os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("VLLM_HOST_IP", "127.0.0.1")  # the engine's processes share this node
        from vllm.engine.arg_utils import AsyncEngineArgs  # slow import, and only replicas have vLLM
        from vllm.v1.engine.async_llm import AsyncLLM

        arguments = AsyncEngineArgs(
            model=str(judge.path),
            dtype=judge.dtype,
            max_model_len=judge.max_model_len,
            tensor_parallel_size=judge.tensor_parallel_size,
            gpu_memory_utilization=judge.gpu_memory_utilization,
            max_num_seqs=judge.max_batch_size,
            limit_mm_per_prompt={"image": filters.MAX_SOURCES + 1, "video": 0},
            enforce_eager=not judge.num_gpus,
            enable_prefix_caching=True,
            disable_log_stats=True,
            seed=0,
        )
        self.engine = AsyncLLM.from_engine_args(arguments)
        self.tokenizer = self.engine.get_tokenizer()

    async def judge(self, image: np.ndarray, sources: Sources, prompt: str) -> Verdict:
        """See `Filter.judge`."""
        from vllm import SamplingParams
        from vllm.sampling_params import StructuredOutputsParams

        pictures = [Image.fromarray(filters.shrink(picture)) for picture in (*sources, image)]
        words = StructuredOutputsParams(choice=list(filters.VERDICTS))
        constrained = {"logprobs": TOP_LOGPROBS, "structured_outputs": words}

        async def answer(
            messages: filters.Messages, max_tokens: int, is_verdict: bool
        ) -> tuple[str, list[tuple[str, float]]]:
            extras = constrained if is_verdict else {}
            found = await self._generate(
                messages, pictures, SamplingParams(temperature=0.0, max_tokens=max_tokens, **extras)
            )
            if is_verdict and not found.logprobs:
                raise JudgeError("the filter's engine gave no log-probabilities")
            tokens = found.logprobs[0].values() if is_verdict else ()
            return found.text, [(token.decoded_token or "", token.logprob) for token in tokens]

        return await filters.converse(self.judge_config, answer, sources=len(sources), prompt=prompt)

    async def close(self) -> None:
        """End the engine's processes."""
        self.engine.shutdown()

    async def _generate(self, messages: list[dict[str, Any]], pictures: list[Image.Image], parameters: Any) -> Any:
        from vllm.exceptions import VLLMClientError
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        prompt = {"prompt": text, "multi_modal_data": {"image": pictures}}
        final = None
        try:
            async for output in self.engine.generate(prompt, parameters, request_id=str(next(self._ids))):
                final = output
        except VLLMClientError as error:  # too long a prompt, for example
            raise Refused(f"the filter cannot read this request: {error}") from error
        except (EngineDeadError, EngineGenerateError) as error:
            raise JudgeError(f"the filter's engine failed: {type(error).__name__}: {error}") from error
        if final is None or not final.finished:
            raise JudgeError("the filter's engine ended a request without an answer")
        return final.outputs[0]
