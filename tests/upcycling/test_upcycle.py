import json
import sys
import warnings

import pytest
import torch
from tiny_dense import dense_folder, text_file

import abyssal
from abyssal.data.corpus import documents
from abyssal.data.tokenizer import byte_tokenizer
from abyssal.errors import UserError
from abyssal.evaluation import perplexity
from abyssal.upcycling import ExpertSplit, Settings, read_dense, upcycle
from abyssal.upcycling.calibration import pieces

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

QUICK = {"windows": 6, "held_out": 2, "length": 32, "fit": 3, "batch": 2}
TOKENS = torch.arange(3, 93).view(2, 45) * 7 % 250


@pytest.fixture
def text(tmp_path):
    return text_file(tmp_path / "text.txt")


def logits_there(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model, model(TOKENS).logits


@pytest.mark.parametrize(("kv_heads", "tied"), [(2, False), (4, True), (1, False)])
def test_dense_model_computes_what_it_does_in_transformers(tmp_path, kv_heads, tied):
    theirs = dense_folder(tmp_path / "dense", kv_heads=kv_heads, tied=tied)
    dense = read_dense(tmp_path / "dense")
    with torch.no_grad():
        assert torch.allclose(dense.model(TOKENS), theirs(TOKENS).logits, atol=1e-4)
    assert dense.attention.num_key_value_heads == kv_heads
    assert dense.tokenizer.vocab_size == 258


@pytest.mark.parametrize(
    ("kv_heads", "tied", "experts"),
    [(2, True, None), (4, False, None), (2, False, ExpertSplit(4, 2, 2)), (1, True, ExpertSplit(8, 3, 0))],
)
def test_what_is_written_is_the_same_model_here_and_in_transformers(tmp_path, text, kv_heads, tied, experts):
    dense_folder(tmp_path / "dense", kv_heads=kv_heads, tied=tied)
    settings = Settings(cache=30, experts=experts, **QUICK)
    report = upcycle(
        tmp_path / "dense", tmp_path / "out", settings, calibration=text, evaluate=text, dtype=torch.float32
    )
    model, tokenizer = abyssal.load(tmp_path / "out")
    theirs, logits = logits_there(tmp_path / "out")
    assert type(theirs).__name__ == "DeepseekV3ForCausalLM"
    with torch.no_grad():
        assert torch.allclose(model(TOKENS), logits, atol=2e-4)
    prompt = torch.tensor([tokenizer.encode("the sea is")])
    there = theirs.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=-1)[0, prompt.shape[1] :]
    ids = prompt
    for _ in range(12):
        with torch.no_grad():
            ids = torch.cat((ids, model(ids)[:, -1:].argmax(-1)), dim=1)
    assert there.tolist() == ids[0, prompt.shape[1] :].tolist()

    config = model.config
    assert config.attention.cached_values == 30
    assert config.tie_word_embeddings == tied
    assert config.rms_norm_eps == pytest.approx(2e-5)
    assert (config.bos_token_id, config.eos_token_id) == (256, 257)
    data = json.loads((tmp_path / "out" / "upcycle.json").read_text())
    assert data["perplexity"] == report.perplexity
    assert len(data["layers"]) == 2
    stages = ["factorised", "norm in", "fitted"]
    assert list(data["layers"][0]["attention"]) == stages
    wanted = ["dense", *stages] + (["experts routed", "experts fitted"] if experts else [])
    assert list(report.perplexity) == wanted
    assert "| mean |" in (tmp_path / "out" / "upcycle.md").read_text()
    # what the report says of the last stage is what the folder holds
    found = perplexity(model, tokenizer, documents(text), context=128, stride=128)
    assert report.perplexity[wanted[-1]] == pytest.approx(found.perplexity, rel=0.02)
    if experts:
        assert max(layer.split_error for layer in report.layers) < 1e-5
        assert config.moe.routed_scaling_factor == experts.active
        assert 0 < report.layers[0].caught <= report.layers[0].caught_at_best <= 1


def test_stages_are_judged_on_the_dense_layers_own_inputs(tmp_path, text):
    """One key head, all of it rotary, and room for the values: nothing is lost before the norm comes in."""
    dense_folder(tmp_path / "dense", kv_heads=1)
    settings = Settings(cache=32, rotary=16, **QUICK)
    report = upcycle(tmp_path / "dense", tmp_path / "out", settings, calibration=text)
    assert all(layer.attention["factorised"] > 0.999 for layer in report.layers)
    assert all(0.9 < layer.attention["norm in"] < layer.attention["factorised"] + 1e-4 for layer in report.layers)
    assert report.perplexity["factorised"] == pytest.approx(report.perplexity["dense"], rel=0.01)
    assert all(layer.latent_error < 1e-4 for layer in report.layers)


def test_queries_through_a_latent_of_full_rank_lose_nothing(tmp_path, text):
    dense_folder(tmp_path / "dense", kv_heads=1)
    settings = Settings(cache=32, rotary=16, queries=64, **QUICK)
    report = upcycle(tmp_path / "dense", tmp_path / "out", settings, calibration=text)
    assert all(layer.attention["factorised"] > 0.999 for layer in report.layers)
    assert report.perplexity["factorised"] == pytest.approx(report.perplexity["dense"], rel=0.01)
    model, _ = abyssal.load(tmp_path / "out")
    assert model.config.attention.q_lora_rank == 64
    assert model.blocks[0].self_attn.q_a_proj.weight.shape == (64, 64)


def test_rank_by_error(tmp_path, text):
    dense_folder(tmp_path / "dense")
    ranks = {}
    for error in (0.5, 0.1):
        out = tmp_path / f"out{error}"
        report = upcycle(tmp_path / "dense", out, Settings(error=error, **(QUICK | {"fit": 0})), calibration=text)
        errors = [layer.latent_error for layer in report.layers]
        assert sum(errors) / len(errors) <= error
        ranks[error] = report.settings["kv_lora_rank"]
        assert report.cached_after == ranks[error] + report.settings["rotary"]
        assert list(report.perplexity) == ["dense", "factorised", "norm in"]
    assert ranks[0.5] < ranks[0.1]


def test_experts_alone_are_written_as_deepseek_moe(tmp_path, text):
    dense_folder(tmp_path / "dense")
    settings = Settings(experts=ExpertSplit(4, 2, 2), **QUICK)
    report = upcycle(
        tmp_path / "dense", tmp_path / "out", settings, calibration=text, evaluate=text, dtype=torch.float32
    )
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "deepseek"
    model, tokenizer = abyssal.load(tmp_path / "out")
    found = perplexity(model, tokenizer, documents(text), context=128, stride=128)
    assert report.perplexity["experts fitted"] == pytest.approx(found.perplexity, rel=0.02)
    assert list(report.perplexity) == ["dense", "experts routed", "experts fitted"]
    assert report.active_after < report.parameters_before


def test_experts_alone_that_are_all_active_are_the_dense_model(tmp_path, text):
    """DeepSeekMoE-16B's weights add up to 1: with a router of zeros each of four has 1/4, made up for inside."""
    theirs = dense_folder(tmp_path / "dense")
    settings = Settings(experts=ExpertSplit(4, 4, 2), **(QUICK | {"fit": 0}))
    upcycle(tmp_path / "dense", tmp_path / "out", settings, calibration=text, dtype=torch.float32)
    model, _ = abyssal.load(tmp_path / "out")
    for router in model.routers.values():
        torch.nn.init.zeros_(router.weight)
    with torch.no_grad():
        assert torch.allclose(model(TOKENS), theirs(TOKENS).logits, atol=1e-3)


@pytest.mark.parametrize("dead", ["o_proj", "q_proj"])
def test_a_head_that_does_nothing_is_no_trouble(tmp_path, text, dead):
    """Pruned models have them: costs of 0, whose root has no inverse."""
    model = dense_folder(tmp_path / "dense")
    with torch.no_grad():
        for layer in model.model.layers:
            weight = getattr(layer.self_attn, dead).weight
            (weight[:, :32] if dead == "o_proj" else weight[:32]).zero_()  # the query heads of one key head
    model.save_pretrained(tmp_path / "dense")
    report = upcycle(tmp_path / "dense", tmp_path / "out", Settings(cache=40, **QUICK), calibration=text)
    assert min(layer.attention["factorised"] for layer in report.layers) > 0.9


def test_a_rank_that_calibration_hardly_fills_does_not_ruin_the_norm(tmp_path, text):
    dense_folder(tmp_path / "dense")
    settings = Settings(cache=64, **(QUICK | {"windows": 12, "length": 64, "fit": 30}))
    report = upcycle(tmp_path / "dense", tmp_path / "out", settings, calibration=text)
    for layer in report.layers:
        assert layer.attention["norm in"] > layer.attention["factorised"] - 0.03
        assert layer.attention["fitted"] >= layer.attention["norm in"]


def test_short_documents_are_joined(tmp_path):
    tokenizer = byte_tokenizer()
    texts = ["abcde", "fgh", "ijklmnop" * 4, "q"]
    found = pieces(texts, tokenizer, windows=2, held_out=1, length=8)
    bos = [tokenizer.bos_id] if tokenizer.adds_bos else []
    rows = bos + tokenizer.encode("abcde") + bos + tokenizer.encode("fgh")
    assert found.calibration[0].tolist() == rows[:8]
    assert found.held_out.shape == (1, 8)
    with pytest.raises(UserError, match="the text has 0 windows of 8 tokens"):
        pieces(["abc"], tokenizer, windows=1, held_out=1, length=8)


def test_windows_are_four_of_a_document_then_later_ones(tmp_path):
    tokenizer = byte_tokenizer()
    texts = ["".join(chr(97 + i) for i in range(24)) * 2, "z" * 16]
    found = pieces(texts, tokenizer, windows=4, held_out=3, length=8)
    bos = [tokenizer.bos_id] if tokenizer.adds_bos else []
    one, other = bos + tokenizer.encode(texts[0]), bos + tokenizer.encode(texts[1])
    cut = [one[i : i + 8] for i in range(0, 32, 8)]
    assert found.calibration.tolist() == cut
    assert found.held_out.tolist() == [other[:8], other[8:16], one[32:40]]


def test_the_same_twice(tmp_path, text):
    dense_folder(tmp_path / "dense")
    settings = Settings(cache=30, experts=ExpertSplit(4, 2, 2), **QUICK)
    for out in ("one", "two"):
        upcycle(tmp_path / "dense", tmp_path / out, settings, calibration=text)
    assert (tmp_path / "one" / "model.safetensors").read_bytes() == (
        tmp_path / "two" / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (Settings(**QUICK), "nothing to convert"),
        (Settings(cache=30, error=0.1, **QUICK), "give one of them"),
        (Settings(error=1.5, **QUICK), "between 0 and 1"),
        (Settings(experts=ExpertSplit(4, 2, 2), rotary=4, **QUICK), "give cache or error too"),
        (Settings(cache=30, **(QUICK | {"fit": -1})), "fit: -1"),
        (Settings(cache=10, **QUICK), "rank of 0"),
        (Settings(cache=75, **QUICK), "expected 11 to 74"),
        (Settings(cache=30, rotary=7, **QUICK), "even number from 2 to head_dim 16"),
        (Settings(cache=30, rotary=18, **QUICK), "even number from 2 to head_dim 16"),
        (Settings(cache=30, queries=0, **QUICK), "queries: 0 .* expected 1 to 64"),
        (Settings(cache=30, queries=65, **QUICK), "queries: 65 .* expected 1 to 64"),
        (Settings(experts=ExpertSplit(4, 2, 2), queries=4, **QUICK), "give cache or error too"),
        (Settings(cache=30, experts=ExpertSplit(5, 2, 2), **QUICK), "do not divide intermediate_size 96"),
        (Settings(cache=30, **(QUICK | {"length": 400})), "max_position_embeddings 128"),
        (Settings(cache=30, **(QUICK | {"windows": 10000})), "expected at least 10002"),
        (
            Settings(cache=30, **(QUICK | {"windows": 1, "length": 30})),
            "of 30 tokens are 30; a rank of 20 needs 40 at least",
        ),
        (Settings(error=0.01, **(QUICK | {"windows": 1, "length": 30})), "a rank of .* at least"),
        (Settings(cache=30, seed=10**30, **QUICK), "seed: 1"),
    ],
)
def test_settings_that_cannot_be_are_refused_and_nothing_is_written(tmp_path, text, settings, said):
    dense_folder(tmp_path / "dense")
    with pytest.raises(UserError, match=said) as raised:
        upcycle(tmp_path / "dense", tmp_path / "out", settings, calibration=text)
    assert "\n" not in str(raised.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "text.txt"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        (
            {
                "rope_parameters": {
                    "rope_type": "llama3",
                    "rope_theta": 5000.0,
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 64,
                }
            },
            "llama3",
        ),
    ],
)
def test_other_kinds_of_llama_are_refused(tmp_path, text, changes, said):
    dense_folder(tmp_path / "dense", **changes)
    with pytest.raises(UserError, match=said):
        upcycle(tmp_path / "dense", tmp_path / "out", Settings(cache=30, **QUICK), calibration=text)
    assert not (tmp_path / "out").exists()


def test_other_architectures_are_refused(tmp_path, text):
    dense_folder(tmp_path / "dense")
    upcycle(tmp_path / "dense", tmp_path / "out", Settings(cache=30, **(QUICK | {"fit": 0})), calibration=text)
    with pytest.raises(UserError, match="latent attention already"):
        upcycle(tmp_path / "out", tmp_path / "again", Settings(cache=30, **QUICK), calibration=text)
    config = json.loads((tmp_path / "dense" / "config.json").read_text()) | {"model_type": "gpt2"}
    (tmp_path / "dense" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="'gpt2' is not one of"):
        upcycle(tmp_path / "dense", tmp_path / "again", Settings(cache=30, **QUICK), calibration=text)


def test_what_cannot_be_converted_is_said_before_any_work(tmp_path, text, monkeypatch):
    model = dense_folder(tmp_path / "dense")

    def refuse(said, **options):
        with pytest.raises(UserError, match=said) as raised:
            upcycle(
                tmp_path / "dense",
                options.pop("out", tmp_path / "out"),
                Settings(cache=30),
                calibration=text,
                **options,
            )
        assert "\n" not in str(raised.value)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "text.txt"]

    monkeypatch.setattr("abyssal.upcycling.conversion.Conversion.run", None)
    refuse("in the model's own folder", out=tmp_path / "dense" / "out")
    refuse("evaluate_limit: 0 is not valid", evaluate=text, evaluate_characters=0)
    refuse("mps has no 64-bit", device="mps")
    (tmp_path / "dense" / "chat_template.jinja").write_text("{% if %}")
    refuse("chat template, line 1")
    (tmp_path / "dense" / "chat_template.jinja").unlink()
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight[3, 4] = float("nan")
    model.save_pretrained(tmp_path / "dense")
    refuse("model.layers.1.self_attn.k_proj.weight: it holds numbers that are not finite")
    dense_folder(tmp_path / "dense", vocab_size=200, bos_token_id=1, eos_token_id=2)
    refuse("its vocabulary of 258 is larger")


def test_an_existing_folder_is_refused_before_any_work(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    with pytest.raises(UserError, match="exists"):
        upcycle(tmp_path / "no such model", tmp_path / "out", Settings(cache=30))


def test_a_failure_late_leaves_nothing(tmp_path, text, monkeypatch):
    dense_folder(tmp_path / "dense")

    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr("abyssal.upcycling.conversion.write_json", fail)
    with pytest.raises(OSError, match="disk full"):
        upcycle(tmp_path / "dense", tmp_path / "out", Settings(cache=30, **(QUICK | {"fit": 0})), calibration=text)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "text.txt"]


def test_gguf_that_cannot_be_read(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no such file"):
        read_dense(tmp_path / "model.gguf")
    (tmp_path / "model.gguf").write_bytes(b"GGUF and no more")
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "gguf", None)
        with pytest.raises(UserError, match=r"pip install 'abyssal\[tune\]'"):
            read_dense(tmp_path / "model.gguf")
    pytest.importorskip("gguf")
    with pytest.raises(UserError, match="not read by transformers") as raised:
        read_dense(tmp_path / "model.gguf")
    assert "\n" not in str(raised.value)


def test_command(tmp_path, text, monkeypatch, capsys):
    from abyssal.cli import main

    dense_folder(tmp_path / "dense")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["abyssal", "upcycle", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, capsys.readouterr()

    quick = ("--calibration", text, "--windows", 6, "--length", 32, "--fit", 2)
    code, shown = run(tmp_path / "dense", tmp_path / "out", "--cache", 30, "--experts", 6, "--shared", 2, *quick)
    assert code == 0, shown.err
    assert "attention, norm in" in shown.out
    assert "cached values a token and layer: 64 before, 30 now" in shown.out
    model, _ = abyssal.load(tmp_path / "out")
    assert model.config.moe.num_experts_per_tok == 2  # with the two shared ones half of eight
    for arguments, said in (
        ((tmp_path / "dense", tmp_path / "out", "--cache", 30), "exists"),
        ((tmp_path / "dense", tmp_path / "new", "--active", 2, "--cache", 30), "--experts"),
        ((tmp_path / "dense", tmp_path / "new"), "nothing to convert"),
        ((tmp_path / "dense", tmp_path / "new", "--cache", 30, "--dtype", "fp7"), "fp7"),
        ((tmp_path / "dense", tmp_path / "new", "--cache", 30, "--calibration", tmp_path / "no.txt"), "no such file"),
    ):
        code, shown = run(*arguments)
        assert code == 2
        assert said in shown.err
        assert shown.err.count("\n") == 1
