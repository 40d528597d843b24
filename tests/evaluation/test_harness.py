"""Our side of lm-evaluation-harness, against its own class for transformers and against plain loops."""

import importlib
import json
import sys

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from tiny_runs import MODEL

from abyssal.checkpoint import save_model
from abyssal.config import ModelConfig
from abyssal.data.tokenizer import BOS, EOS, Tokenizer, byte_tokenizer
from abyssal.errors import UserError
from abyssal.evaluation.perplexity import windows
from abyssal.model import Transformer

pytest.importorskip("lm_eval", reason="lm-eval is not installed (extra eval)")

PRINTABLE = range(0x20, 0x7F)
LONG = "seven wizards brew strong black tea at dawn " * 5  # more than the context of 128 tokens


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def make_tokenizer(bos):
    """A token a byte; ``bos``: "added" before plain text, "unused" there, or "none" at all."""
    return Tokenizer(
        byte_tokenizer().backend,
        None if bos == "none" else BOS,
        EOS,
        config={"add_bos_token": False} if bos == "unused" else {},
        template=None if bos == "none" else TEMPLATE,
    )


def make_model():
    """FP32; greedy decoding gives printable ASCII and does not go in circles."""
    model = Transformer(ModelConfig.model_validate(MODEL))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.3, generator=generator)
        for token in range(258):
            if token - 2 not in PRINTABLE:
                model.lm_head.weight[token] = 0
    return model.eval()


@pytest.fixture(scope="module", params=["added", "unused", "none"])
def pair(request, tmp_path_factory):
    """The model as HarnessModel and, from a folder, as the harness's HFLM."""
    pytest.importorskip("accelerate", reason="lm_eval's HFLM needs accelerate")
    from lm_eval.models.huggingface import HFLM

    from abyssal.evaluation.harness import HarnessModel

    folder = tmp_path_factory.mktemp("model")
    model, tokenizer = make_model(), make_tokenizer(request.param)
    save_model(model, folder)
    tokenizer.save(folder)
    theirs = HFLM(str(folder), device="cpu", dtype="float32", batch_size=3)
    assert type(theirs.model).__name__ == "DeepseekV3ForCausalLM"
    assert theirs.tok_encode("a") == [0] * (request.param == "added") + [2 + ord("a")]
    return HarnessModel(model, tokenizer, batch_size=3), theirs


@pytest.fixture(scope="module")
def ours():
    from abyssal.evaluation.harness import HarnessModel

    return HarnessModel(make_model(), make_tokenizer("added"), batch_size=3)


def instances(kind, arguments):
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=pair, idx=index) for index, pair in enumerate(arguments)]


def greedy_text(model, prompt, count, bos=True):
    """What greedy decoding says, one forward pass a token."""
    ids = [0] * bos + [2 + byte for byte in prompt.encode()]
    start = len(ids)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return bytes(token - 2 for token in ids[start:]).decode()


def loop(ids, count):
    """log p of the last ``count`` of ``ids``, in float64, one forward pass a token; and whether each is likeliest."""
    model = make_model().double()
    total, best = 0.0, True
    for t in range(len(ids) - count, len(ids)):
        with torch.no_grad():
            logits = model(torch.tensor([ids[:t]]))[0, -1]
        total += float(logits.log_softmax(-1)[ids[t]])
        best &= int(logits.argmax()) == ids[t]
    return total, best


def pairs(model, bos):
    said = greedy_text(model, "the fox", 4, bos)
    return [
        ("the fox", said),
        ("the fox", said[:1]),
        ("the fox", said[:3] + "é"),
        *(("tea at", f" {letter}") for letter in "abc"),
        ("trailing blanks  ", "été"),
        ("", "from nothing"),
        (" ", "x"),
        ("été ", "🙂"),
        (LONG, " again"),
        (LONG[:120], " on the edge"),
    ]


class TestAgainstTransformers:
    def test_loglikelihood(self, pair):
        ours, theirs = pair
        bos = ours.tokenizer.adds_bos
        # HFLM refuses a context that is all blanks where there is no BOS: nothing is left in front of the continuation
        asked = [(c, t) for c, t in pairs(ours.model, bos) if bos or c != " "]
        requests = instances("loglikelihood", asked)
        with pytest.warns(UserWarning, match="2 prompts are longer than the model's context of 128"):
            found = ours.loglikelihood(requests)
        expected = theirs.loglikelihood(requests, disable_tqdm=True)
        assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], rel=1e-4)
        assert [best for _, best in found] == [best for _, best in expected]
        assert [best for _, best in found[:3]] == [True, True, False]

    def test_loglikelihood_rolling(self, pair):
        ours, theirs = pair
        texts = ["é", LONG[:127], LONG[:128], LONG[:129], LONG * 2]
        if ours.tokenizer.adds_bos:  # HFLM's own method puts a second BOS in front
            texts = texts[:3]
            expected = [
                value for value, _ in theirs.loglikelihood(instances("loglikelihood", [("", t) for t in texts]))
            ]
        else:
            expected = theirs.loglikelihood_rolling(instances("loglikelihood_rolling", [(t,) for t in texts]))
        found = ours.loglikelihood_rolling(instances("loglikelihood_rolling", [(t,) for t in texts]))
        assert found == pytest.approx(expected, rel=1e-4)

    def test_generate_until(self, pair):
        ours, theirs = pair
        bos = ours.tokenizer.adds_bos
        said = greedy_text(ours.model, "the fox", 12, bos)
        settings = [
            {"until": [], "max_gen_toks": 12},
            {"until": [said[4], "never said"], "max_gen_toks": 12, "do_sample": False, "temperature": 0.0},
            {"until": said[3:5], "max_gen_toks": 9},
        ]
        prompts = ["the fox", "a", "été", LONG, "tea at dawn"]
        requests = instances("generate_until", [(prompt, dict(s)) for prompt in prompts for s in settings])
        with pytest.warns(UserWarning, match="3 prompts are longer"):
            found = ours.generate_until(requests)
        assert found == theirs.generate_until(requests, disable_tqdm=True)
        assert found[:3] == [said, said[: said.index(said[4])], said[: said.index(said[3:5])]]


class TestAgainstALoop:
    def test_loglikelihood(self, ours):
        asked = pairs(ours.model, True)[:9]
        found = ours.loglikelihood(instances("loglikelihood", asked))
        for (context, continuation), answer in zip(asked, found, strict=True):
            # blanks at the end of a context count as the continuation's: tokens of words begin with one
            count = len((context + continuation).encode()) - len(context.rstrip().encode())
            ids = [0] + [2 + byte for byte in (context + continuation).encode()]
            value, best = loop(ids, count)
            assert answer == (pytest.approx(value, rel=1e-4), best)

    def test_loglikelihood_rolling(self, ours):
        texts = ["tea at dawn", "é", ""]
        found = ours.loglikelihood_rolling(instances("loglikelihood_rolling", [(text,) for text in texts]))
        for text, value in zip(texts, found, strict=True):
            ids = [0] + [2 + byte for byte in text.encode()]
            assert value == pytest.approx(loop(ids, len(ids) - 1)[0], rel=1e-4)

    @given(st.integers(0, 60), st.integers(1, 12), st.data())
    def test_windows_are_the_harness_s(self, length, context, data):
        from lm_eval.utils import get_rolling_token_windows

        stride = data.draw(st.integers(1, context))
        ids = list(range(1, length + 1))
        expected = get_rolling_token_windows(ids, 0, context, context - stride + 1)
        assert [([*taken, wanted[-1]], len(wanted)) for taken, wanted in expected] == list(
            windows([0, *ids], context, stride)
        )


class TestRequests:
    def test_sampling(self, ours):
        settings = {"until": ["\n"], "max_gen_toks": 20, "do_sample": True, "temperature": 1.0, "top_p": 0.9}
        requests = instances("generate_until", [("the fox", settings)] * 5)
        texts = ours.generate_until(requests)
        assert texts == ours.generate_until(requests)
        assert len(set(texts)) == 5  # a prompt that is asked several times, in two batches

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"num_beams": 4}, "num_beams: 4"),
            ({"until": ["\n"], "max_gen_toks": 128}, r"128 new tokens \(max_gen_toks\).* context of 128"),
            ({"do_sample": True, "temperature": -1.0, "max_gen_toks": 4}, "temperature: -1"),
        ],
    )
    def test_settings_refused(self, ours, settings, message):
        with pytest.raises(UserError, match=message):
            ours.generate_until(instances("generate_until", [("a", settings)]))

    def test_settings_that_change_nothing(self, ours):
        asked = {"num_beams": 1, "max_new_tokens": 5}
        assert ours.generate_until(instances("generate_until", [("the fox", asked)])) == [
            greedy_text(ours.model, "the fox", 5)
        ]

    @pytest.mark.parametrize("text", ["", "x" * 200])
    def test_continuations_refused(self, ours, text):
        with pytest.raises(UserError, match=f"continuation of {len(text)} tokens; expected 1 to 128"):
            ours.loglikelihood(instances("loglikelihood", [("a", text)]))

    def test_no_token_for_an_empty_prompt(self):
        from abyssal.evaluation.harness import HarnessModel

        with pytest.raises(UserError, match="neither BOS nor EOS"):
            HarnessModel(make_model(), Tokenizer(byte_tokenizer().backend))


class TestChat:
    def test_prompts(self, pair):
        from abyssal.evaluation.harness import HarnessModel

        theirs = pair[1]
        ours = HarnessModel(pair[0].model, pair[0].tokenizer)
        assert len(ours.tok_encode(EOS, add_special_tokens=False)) == len(EOS.encode())  # plain text before any chat
        question, answer = {"role": "user", "content": "tea?"}, {"role": "assistant", "content": " yes "}
        if ours.tokenizer.chat is None:
            with pytest.raises(UserError, match="no chat template"):
                ours.apply_chat_template([question])
            return
        for messages, begins in (([question], True), ([question, answer, question], True), ([question, answer], False)):
            text = ours.apply_chat_template(messages, begins)
            assert text.rstrip() == theirs.apply_chat_template(messages, begins).rstrip()
            assert ours.tok_encode(text) == theirs.tok_encode(text)
            assert ours.tok_encode(text).count(0) == 1  # no second BOS
        assert ours.tokenizer.encode(EOS) != [1]  # the tokenizer itself is as before

    def test_tasks(self, pair, task_folder, monkeypatch):
        """Prompts, few-shot examples as turns, answers: as the harness has them with HFLM."""
        import lm_eval
        from lm_eval.tasks import TaskManager

        from abyssal.evaluation.harness import run_tasks

        ours, theirs = pair
        monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda _: None)  # it runs pip
        chat = ours.tokenizer.chat is not None
        names = ["tiny_choice", "tiny_answer"]
        found = run_tasks(
            ours.model, ours.tokenizer, names, num_fewshot=2, batch_size=3, include_path=task_folder, chat=chat
        )
        manager = TaskManager(include_path=str(task_folder))
        expected = lm_eval.simple_evaluate(
            theirs, tasks=names, num_fewshot=2, task_manager=manager, apply_chat_template=chat, bootstrap_iters=10
        )
        assert found["results"]["tiny_choice"] == pytest.approx(expected["results"]["tiny_choice"])
        assert found["results"]["tiny_answer"] == pytest.approx(expected["results"]["tiny_answer"])


CHOICES = {
    "task": "tiny_choice",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "gold",
    "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")],
}
ROLLING = {
    "task": "tiny_text",
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{question}}",
    "metric_list": [
        {"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False},
    ],
}
ANSWERS = {
    "task": "tiny_answer",
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 3},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}


@pytest.fixture
def task_folder(tmp_path, monkeypatch):
    """Three tasks over eight documents; no network, no cache but in tmp_path, none of the harness's own tasks."""
    import datasets
    import lm_eval.tasks.manager

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was asked for"))
    monkeypatch.setattr(
        lm_eval.tasks.manager, "__file__", str(tmp_path / "own" / "manager.py")
    )  # reading all takes 8 s
    model = make_model()
    words = "dog cat fox tree tea dawn wizard night".split()
    rows = []
    for index, word in enumerate(words):
        question = f"the {word}"
        said = greedy_text(model, question, 3)
        rows.append(
            {
                "question": question,
                "choices": [" is a thing", " no", f" {said}"],
                "gold": index % 3,
                "answer": said if index < 3 else "something else",
            }
        )
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    source = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "data.jsonl")}},
        "test_split": "test",
        "fewshot_split": "test",
        "target_delimiter": "",
    }
    for task in (CHOICES, ROLLING, ANSWERS):
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump(source | task))
    return folder


class TestRunTasks:
    def test_figures(self, task_folder, ours):
        from abyssal.evaluation.harness import run_tasks

        names = ["tiny_choice", "tiny_text", "tiny_answer"]
        found = run_tasks(ours.model, ours.tokenizer, names, batch_size=3, include_path=task_folder)
        json.dumps(found)
        rows = [json.loads(line) for line in (task_folder / "data.jsonl").read_text().splitlines()]
        right = nats = 0
        for row in rows:
            prompt = [0] + [2 + byte for byte in row["question"].encode()]
            values = []
            for choice in row["choices"]:
                ids = [2 + byte for byte in choice.encode()]
                values.append(loop(prompt + ids, len(ids))[0])
            right += values.index(max(values)) == row["gold"]
            nats -= loop(prompt, len(prompt) - 1)[0]
        assert 0 < right < len(rows)
        size = sum(len(row["question"]) for row in rows)
        bits = nats / size / torch.tensor(2.0, dtype=torch.float64).log().item()
        assert found["results"]["tiny_choice"]["acc,none"] == right / len(rows)
        assert found["results"]["tiny_text"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-5)
        assert found["results"]["tiny_answer"]["exact_match,none"] == 3 / 8
        assert {figures["effective"] for figures in found["n-samples"].values()} == {8}

    def test_as_simple_evaluate_does(self, task_folder, ours, monkeypatch):
        import lm_eval
        from lm_eval.tasks import TaskManager

        from abyssal.evaluation.harness import run_tasks

        monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda _: None)  # it runs pip
        names = ["tiny_choice", "tiny_answer"]
        for settings in ({"num_fewshot": 2}, {"limit": 5}):
            found = run_tasks(ours.model, ours.tokenizer, names, include_path=task_folder, **settings)
            expected = lm_eval.simple_evaluate(
                ours, tasks=names, task_manager=TaskManager(include_path=str(task_folder)), **settings
            )
            for key in ("results", "n-shot", "n-samples", "versions"):
                assert found[key] == expected[key]

    def test_a_group(self, task_folder, ours):
        from abyssal.evaluation.harness import run_tasks

        group = {"group": "tiny", "task": ["tiny_choice"], "aggregate_metric_list": [{"metric": "acc"}]}
        (task_folder / "group.yaml").write_text(yaml.safe_dump(group))
        found = run_tasks(ours.model, ours.tokenizer, ["tiny"], include_path=task_folder)
        assert found["groups"]["tiny"]["acc,none"] == found["results"]["tiny_choice"]["acc,none"]

    @pytest.mark.parametrize(
        ("names", "changes", "message"),
        [
            (["tiny_chioce"], {}, r"tasks: 'tiny_chioce' is not known .*did you mean 'tiny_choice'"),
            ([], {}, "tasks: none given"),
            (["tiny_choice"], {"limit": 0}, "limit: 0 .* from 1"),
            (["tiny_choice"], {"num_fewshot": -1}, "num_fewshot: -1 .* from 0"),
            (["tiny_choice"], {"batch_size": 0}, "batch_size: 0 .* from 1"),
            (["tiny_choice"], {"include_path": "nowhere"}, "nowhere: no such folder"),
        ],
    )
    def test_refused(self, task_folder, ours, names, changes, message):
        from abyssal.evaluation.harness import run_tasks

        with pytest.raises(UserError, match=message) as caught:
            run_tasks(ours.model, ours.tokenizer, names, **({"include_path": task_folder} | changes))
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("task", "message"),
        [
            ({"unsafe_code": True}, "task tiny_choice: it runs code that the model writes"),
            ({"dataset_kwargs": {"data_files": "gone.jsonl"}}, r"task tiny_choice: cannot be loaded \(.*gone.jsonl"),
            ({"output_type": "riddle"}, r"task tiny_choice: cannot be loaded \(ValueError: .*riddle"),
        ],
    )
    def test_tasks_refused(self, task_folder, ours, task, message):
        from abyssal.evaluation.harness import run_tasks

        file = task_folder / "tiny_choice.yaml"
        file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | task))
        with pytest.raises(UserError, match=message) as caught:
            run_tasks(ours.model, ours.tokenizer, ["tiny_choice"], include_path=task_folder)
        assert "\n" not in str(caught.value)

    def test_no_network(self, task_folder, ours, monkeypatch):
        from abyssal.evaluation.harness import run_tasks

        def unreachable(*_, **__):  # as datasets 4 says it
            raise ConnectionError("Couldn't reach 'allenai/ai2_arc' on the Hub (LocalEntryNotFoundError)")

        monkeypatch.setattr("datasets.load_dataset", unreachable)
        with pytest.raises(UserError, match=r"task tiny_choice: the data set is not in the local cache.*ai2_arc"):
            run_tasks(ours.model, ours.tokenizer, ["tiny_choice"], include_path=task_folder)


def test_without_lm_eval(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "abyssal.evaluation.harness", raising=False)
    with pytest.raises(UserError, match=r"pip install 'abyssal\[eval\]'"):
        importlib.import_module("abyssal.evaluation.harness")
