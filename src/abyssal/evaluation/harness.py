"""The tasks of lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness), run on our models.

:class:`HarnessModel` answers the harness's three kinds of request; :func:`run_tasks` runs tasks with it. Where choices
were to be made they are those of the harness's own HFLM, so figures compare: a prompt that does not fit loses its
beginning, an empty prompt is the prefix token (BOS, else EOS), a tokenizer that puts BOS in front does so in every
prompt. One differs: in ``loglikelihood_rolling`` the prefix token is not followed by a second BOS.

Importing this module imports lm_eval (some seconds); where that is not installed, it raises UserError.
"""

from __future__ import annotations

import difflib
import json
import random
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from abyssal.data.tokenizer import Tokenizer
from abyssal.errors import UserError
from abyssal.evaluation.perplexity import Window, check_vocabulary, score, windows
from abyssal.generation import Sampling, generate
from abyssal.model import Transformer

try:
    import lm_eval
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.tasks import TaskManager
    from tqdm import tqdm
except ImportError as error:
    raise UserError(f"tasks need lm-evaluation-harness ({error}): pip install 'abyssal[eval]'") from error

SEED = 1234  # the harness's own, for tasks that sample
SAMPLING = ("top_k", "top_p", "min_p", "repetition_penalty")
IGNORED = {"num_beams": 1, "num_return_sequences": 1, "use_cache": True}  # settings of transformers that change nothing


class HarnessModel(TemplateLM):
    """A model and its tokenizer as the harness wants them: an ``LM`` for ``lm_eval.evaluate``.

    ``batch_size`` requests run at a time. Progress goes to stderr where that is a terminal. Raises UserError for a
    tokenizer larger than the model's vocabulary, or with neither BOS nor EOS.
    """

    def __init__(self, model: Transformer, tokenizer: Tokenizer, batch_size: int = 8) -> None:
        super().__init__()
        check_vocabulary(model, tokenizer)
        if tokenizer.bos_id is None and tokenizer.eos_id is None:
            raise UserError("tokenizer: it has neither BOS nor EOS; tasks need one of them in front of an empty prompt")
        self.model = model
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self._device = model.model.embed_tokens.weight.device
        self._chat = False

    @property
    def eot_token_id(self) -> int | None:
        return self.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before the first token of a text: BOS, or EOS where there is none."""
        return next(token for token in (self.tokenizer.bos_id, self.tokenizer.eos_id) if token is not None)

    @property
    def max_length(self) -> int:
        return self.model.config.max_position_embeddings

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in the harness's cache of requests."""
        return f"abyssal-{self.tokenizer.fingerprint}"

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """``chat_history`` as the tokenizer's chat template writes it; without ``add_generation_prompt`` the last
        message is to be continued, and what the template writes behind it is left out. From now on special tokens
        spelt in a prompt are those tokens. Raises UserError where the tokenizer has no chat template."""
        text = self.tokenizer.render_chat(chat_history, add_generation_prompt=add_generation_prompt)
        self._chat = True
        if not add_generation_prompt:
            last = chat_history[-1]["content"].strip()
            text = text[: text.rindex(last) + len(last)]
        return text

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The ids of ``string``, with BOS in front as ``add_special_tokens`` says (None: as the tokenizer does, unless
        a chat template has put it there)."""
        wanted = self.tokenizer.adds_bos if add_special_tokens is None else add_special_tokens
        self.tokenizer.backend.encode_special_tokens = not self._chat
        try:
            ids = self.tokenizer.encode(string)
        finally:
            self.tokenizer.backend.encode_special_tokens = True
        bos = self.tokenizer.bos_id
        there = add_special_tokens is None and ids[:1] == [bos]
        return [bos, *ids] if wanted and bos is not None and not there else ids

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """For each (context, continuation) the continuation's log-probability, and whether greedy decoding says it."""
        answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return answers

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        items: list[Window] = []
        cut = 0
        for _text, context, continuation in requests:
            if not 0 < len(continuation) <= self.max_length:
                raise UserError(
                    f"a task asks for a continuation of {len(continuation)} tokens; "
                    f"expected 1 to {self.max_length} (max_position_embeddings)"
                )
            ids = (context or [self.prefix_token_id]) + continuation
            cut += len(ids) > self.max_length + 1  # the last token is predicted, not taken in
            items.append((ids[-(self.max_length + 1) :], len(continuation)))
        self._warn_of_cut(cut)
        return self._scores(items, "log-likelihoods")

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """For each text its log-probability, in windows of the whole context that predict every token once."""
        items: list[Window] = []
        owners: list[int] = []
        for index, request in enumerate(requests):
            (text,) = request.args
            ids = [self.prefix_token_id, *self.tok_encode(text, add_special_tokens=False)]
            own = list(windows(ids, self.max_length, self.max_length))
            items += own
            owners += [index] * len(own)
        totals = [0.0] * len(requests)
        for index, (log_p, _) in zip(owners, self._scores(items, "rolling log-likelihoods"), strict=True):
            totals[index] += log_p
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """For each (context, settings) the text that follows, up to a stop string of ``until``.

        Raises UserError for settings that abyssal does not have, and a ``max_gen_toks`` that leaves no room for a
        prompt.
        """
        together: dict[str, list[int]] = {}  # requests with the same settings share batches
        for index, request in enumerate(requests):
            together.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(index)
        texts = [""] * len(requests)
        cut = 0
        with tqdm(total=len(requests), desc="generating", disable=None) as bar:
            for indices in together.values():
                sampling = _sampling(requests[indices[0]].args[1])
                room = self.max_length - sampling["max_new_tokens"]
                if room < 1:
                    raise UserError(
                        f"a task asks for {sampling['max_new_tokens']} new tokens (max_gen_toks), which leave no room "
                        f"for a prompt in the model's context of {self.max_length}"
                    )
                prompts = {i: self.tok_encode(requests[i].args[0]) or [self.prefix_token_id] for i in indices}
                cut += sum(len(prompt) > room for prompt in prompts.values())
                order = sorted(indices, key=lambda i: len(prompts[i]), reverse=True)
                for start in range(0, len(order), self.batch_size):
                    batch = order[start : start + self.batch_size]
                    # Each batch has its own seed: a prompt that is sampled several times gives several texts.
                    settings = Sampling(**sampling, seed=SEED + start)
                    ids: list[list[int]] = [prompts[i][-room:] for i in batch]
                    for i, text in zip(batch, generate(self.model, self.tokenizer, ids, settings), strict=True):
                        texts[i] = text
                    bar.update(len(batch))
        self._warn_of_cut(cut)
        return texts

    def _scores(self, items: list[Window], what: str) -> list[tuple[float, bool]]:
        answers = [(0.0, True)] * len(items)
        # disable=None: only on a terminal
        for index, log_p, greedy in tqdm(
            score(self.model, items, self.batch_size), total=len(items), desc=what, disable=None
        ):
            answers[index] = (log_p, greedy)
        return answers

    def _warn_of_cut(self, count: int) -> None:
        if count:
            warnings.warn(
                f"{count} prompts are longer than the model's context of {self.max_length} tokens; "
                "their beginnings were cut off",
                stacklevel=2,
            )


def run_tasks(
    model: Transformer,
    tokenizer: Tokenizer,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 8,
    include_path: str | Path | None = None,
    chat: bool = False,
) -> dict[str, Any]:
    """Runs ``tasks`` (names of tasks, groups or tags) and returns the harness's results without its samples.

    ``limit``: only so many documents of each task, for a quick look. ``num_fewshot``: examples in front of each prompt,
    by default the task's own. ``include_path``: a folder with further task files (their ``!function`` runs Python code
    from there). ``chat``: prompts go through the tokenizer's chat template, examples as turns of a conversation.
    ``results`` holds the figures by task, ``groups`` those of groups. What they are is what ``lm_eval.simple_evaluate``
    gives for :class:`HarnessModel`; it is not used because it starts git and pip to describe the machine. As it does,
    this sets Python's and numpy's global random states, for the tasks' sake.

    Raises UserError for an unknown task, a data set that cannot be had, a task that runs code of the model's or needs
    images, and what :class:`HarnessModel` raises it for.
    """
    names = list(dict.fromkeys(tasks))
    if not names:
        raise UserError("tasks: none given; expected at least one name, such as arc_easy")
    for field, value, low in (("limit", limit, 1), ("num_fewshot", num_fewshot, 0), ("batch_size", batch_size, 1)):
        if value is not None and value < low:
            raise UserError(f"{field}: {value!r} is not valid; expected a whole number from {low}")
    if include_path is not None and not Path(include_path).is_dir():
        raise UserError(f"{include_path}: no such folder; expected one with task files (.yaml)")
    wrapped = HarnessModel(model, tokenizer, batch_size)
    random.seed(0)  # before the data is read: some tasks shuffle theirs
    np.random.seed(SEED)  # noqa: NPY002 (the tasks' code uses the global state)
    loaded = _load(names, include_path)
    for task in loaded["tasks"].values():
        own = task.get_config("num_fewshot")
        if own is None or (num_fewshot is not None and own != 0):  # 0 in a task's file means: never any
            task.set_config("num_fewshot", num_fewshot or 0)
        task.set_fewshot_seed(SEED)
    results = lm_eval.evaluate(
        wrapped, loaded, limit=limit, log_samples=False, apply_chat_template=chat, fewshot_as_multiturn=chat
    )
    wanted = ("results", "groups", "n-shot", "n-samples", "versions", "higher_is_better")
    return {key: results[key] for key in wanted if key in results} | {"lm_eval": lm_eval.__version__}


def _load(names: list[str], include_path: str | Path | None) -> Any:
    """The harness's ``TaskDict`` for ``names``, data sets included."""
    manager = None
    if include_path is not None:
        # Reading the harness's own thousands of task files takes seconds: only where they are asked for.
        manager = TaskManager(include_path=str(include_path), include_defaults=False)
    if manager is None or not set(names) <= set(manager.all_subtasks):
        manager = TaskManager(include_path=None if include_path is None else str(include_path))
    for name in names:
        if name not in manager.all_tasks:
            close = difflib.get_close_matches(name, manager.all_tasks, n=3, cutoff=0.5)
            hint = f" (did you mean {' or '.join(map(repr, close))}?)" if close else ""
            raise UserError(f"tasks: {name!r} is not known to lm-evaluation-harness{hint}")
    which = f"tasks {', '.join(names)}" if len(names) > 1 else f"task {names[0]}"
    try:
        loaded = manager.load(names)
    except ConnectionError as error:
        raise UserError(
            f"{which}: the data set is not in the local cache and cannot be fetched, perhaps for want of a network "
            f"({_one_line(error)})"
        ) from error
    except Exception as error:  # whatever a task's own code, its YAML or its data set may raise
        raise UserError(f"{which}: cannot be loaded ({type(error).__name__}: {_one_line(error)})") from error
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise UserError(f"task {name}: it runs code that the model writes, which abyssal does not do")
        if getattr(task, "MULTIMODAL", False):
            raise UserError(f"task {name}: it needs images, which the model does not take")
    return loaded


def _sampling(asked: dict[str, Any]) -> dict[str, Any]:
    """A request's settings as fields of Sampling. Raises UserError for one that abyssal does not have."""
    settings = dict(normalize_gen_kwargs(asked))
    out = {"max_new_tokens": settings.pop("max_gen_toks"), "temperature": float(settings.pop("temperature", 0.0))}
    settings.pop("do_sample")  # normalize_gen_kwargs sets the temperature to 0 where it is false
    out["stop"] = tuple(text for text in settings.pop("until") if text)
    out |= {name: settings.pop(name) for name in SAMPLING if name in settings}
    for name, value in settings.items():
        if name not in IGNORED or IGNORED[name] != value:
            raise UserError(f"a task asks for {name}: {value!r} in its generation_kwargs, which abyssal does not have")
    return out


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
