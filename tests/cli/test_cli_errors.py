"""Whatever the user gets wrong: one line on stderr, exit code 2, nothing created, nothing changed."""

import json
import shutil

import pytest
import yaml
from tiny_runs import MODEL, write_corpus

from abyssal.cli import main
from abyssal.data.tokenizer import train_bpe


@pytest.fixture
def cli(monkeypatch, tmp_path, capsys):
    """Runs the command line in tmp_path; gives exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["abyssal", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main()
        out = capsys.readouterr()
        return caught.value.code, out.out, out.err

    return run


@pytest.fixture
def recipe(data, tmp_path):
    """recipe.yaml, of two steps."""
    data["training"] |= {"steps": 2, "accumulate": 1}
    data["schedule"] = {}
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


@pytest.fixture
def refused(cli, tmp_path):
    """Runs what must be refused and gives the message; no file may appear, vanish or change but in the text's cache."""

    def listing():
        return {
            p.relative_to(tmp_path): p.read_bytes() if p.is_file() else None
            for p in tmp_path.rglob("*")
            if p.name != ".lock" and "cache" not in p.relative_to(tmp_path).parts
        }

    def run(*arguments):
        before = listing()
        code, _, err = cli(*arguments)
        assert (code, err.count("\n")) == (2, 1), err
        assert err.startswith("abyssal: error: ")
        assert "Traceback" not in err
        assert listing() == before
        return err

    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run, made once; tests that change it copy it."""
    from tiny_runs import tiny_recipe, tiny_trainer

    folder = tmp_path_factory.mktemp("trained")
    data = tiny_recipe(folder)
    data["training"] |= {"steps": 2, "accumulate": 1}
    data["schedule"] = {}
    tiny_trainer(data, folder / "run").train()
    (folder / "tiny.yaml").write_text(yaml.safe_dump(data))
    return folder


@pytest.fixture
def run_folder(trained, tmp_path):
    """A copy of the finished run; its recipe and its corpus are where they were."""
    shutil.copytree(trained / "run", tmp_path / "run")
    return tmp_path / "run"


class TestNames:
    @pytest.mark.parametrize(
        ("arguments", "right"),
        [
            (("train", "dmo"), "did you mean 'demo'?"),
            (("train", "no/such.yaml"), "no/such.yaml: no such file"),
            (("train",), "demo"),
            (("train", "demo", "optimizer.lrr=1"), "did you mean 'lr'?"),
            (("train", "demo", "optimiser.lr=1"), "did you mean 'optimizer'?"),
            (("train", "demo", "model=dmeo"), "did you mean 'demo'?"),
            (("train", "demo", "model.hidden_sise=64"), "did you mean 'hidden_size'?"),
            (("train", "demo", "model.moe.n_routed_expert=4"), "did you mean 'n_routed_experts'?"),
            (("train", "demo", "balance=bias_sing"), "did you mean 'bias_sign'?"),
            (("train", "demo", "training.steps=many"), "training.steps"),
            (("train", "demo", "training.steps=0"), "training.steps"),
            (("train", "demo", "optimizer.lr=-1"), "optimizer.lr"),
            (("train", "demo", "name=../escape"), "../escape"),
            (("train", "demo", "training.steps"), "expected key=value"),
            (("train", "demo", "--resum"), "--resum"),
            (("train", "demo", "--out"), "--out"),
            (("trian", "demo"), "'trian'"),
            (("frobnicate",), "'frobnicate'; expected one of presets, inspect, plan"),
            (("inspect", "deepseek-v33"), "did you mean"),
            (("inspect", "none.json"), "none.json: no such file"),
            (("inspect",), "'MODEL'"),
            (("inspect", "--compare"), "'MODEL'"),
            (("inspect", "deepseek-v3", "deepseek-v33"), "did you mean 'deepseek-v3'?"),
            (("presets", "--jsn"), "--jsn"),
            (("generate", "nowhere", "x"), "nowhere: no such run or folder"),
        ],
    )
    def test_misspelt(self, refused, arguments, right):
        assert right in refused(*arguments)


class TestRecipe:
    @pytest.mark.parametrize(
        ("change", "right"),
        [
            ("model.moe.num_experts_per_tok=5", "num_experts_per_tok: 5 is more than n_routed_experts 4"),
            ("model.attention.qk_rope_head_dim=7", "qk_rope_head_dim: 7 is odd"),
            ("model.moe.n_group=3", "n_group: 3 does not divide n_routed_experts 4"),
            ("model.hidden_size=-1", "hidden_size: -1 is not valid"),
            ("schedule.warmup=-1", "schedule.warmup: -1 is not valid"),
            ("training.sequence_length=129", "training.sequence_length: 129 is more than"),
            ("schedule.warmup=2", "schedule.warmup: 2 is not below training.steps 2"),
            ("training.device=cuda:77", "training.device: 'cuda:77'"),
            ("training.device=toaster", "training.device: 'toaster'"),
            ("training.device=meta", "training.device: 'meta'"),
            ("training.dtype=float8", "training.dtype"),
            ("model.vocab_size=200", "model.vocab_size=258 or more"),
            ("samples.prompts=['" + "x" * 200 + "']", "samples.prompts"),
            ("data.tokenizer=nowhere.json", "nowhere.json: no such file"),
            ("model.moe=null", "balance.bias_sign: this model has no experts"),
        ],
    )
    def test_impossible(self, refused, recipe, change, right):
        assert right in refused("train", recipe, change)

    @pytest.mark.parametrize("balance", ["bias_sign", "bias_proportional"])
    def test_a_bias_balancer_without_a_bias(self, refused, recipe, balance):
        changes = ("model.moe.topk_method=greedy", "model.moe.scoring_func=softmax", f"balance={balance}")
        assert f"balance.{balance}: topk_method 'greedy' has no bias" in refused("train", recipe, *changes)

    @pytest.mark.parametrize("text", ["name: [", "- a\n- b\n", "", "just text"])
    def test_no_recipe_in_the_file(self, refused, tmp_path, text):
        (tmp_path / "bad.yaml").write_text(text)
        assert "bad.yaml" in refused("train", tmp_path / "bad.yaml")

    def test_binary(self, refused, tmp_path):
        (tmp_path / "bad.yaml").write_bytes(b"name: \xff")
        assert "not UTF-8" in refused("train", tmp_path / "bad.yaml")


class TestCorpus:
    def corpus(self, refused, recipe, path):
        return refused("train", recipe, f"data.source={path}")

    def test_missing(self, refused, recipe, tmp_path):
        assert "nothing.txt: no such file" in self.corpus(refused, recipe, tmp_path / "nothing.txt")

    def test_misspelt(self, refused, recipe):
        assert "did you mean 'tinyshakespeare'" in self.corpus(refused, recipe, "tinyshakespear")

    @pytest.mark.parametrize("content", [b"", b" \n\n ", b"\xef\xbb\xbf"])
    def test_empty(self, refused, recipe, tmp_path, content):
        (tmp_path / "empty.txt").write_bytes(content)
        assert "empty.txt: the corpus is empty" in self.corpus(refused, recipe, tmp_path / "empty.txt")

    def test_shorter_than_a_sequence(self, refused, recipe, tmp_path):
        (tmp_path / "short.txt").write_text("only a few")
        err = self.corpus(refused, recipe, tmp_path / "short.txt")
        assert "one sequence needs 18" in err  # 16 + the next token + one for the MTP module

    def test_nothing_held_out(self, refused, recipe, tmp_path):
        (tmp_path / "x.txt").write_text("only a few words, and not one of them is held out")
        (tmp_path / "v.txt").write_text("x")
        err = refused("train", recipe, f"data.source={tmp_path / 'x.txt'}", f"data.validation={tmp_path / 'gone.txt'}")
        assert "gone.txt" in err

    def test_not_utf8(self, refused, recipe, tmp_path):
        (tmp_path / "latin.txt").write_bytes(b"line one\ncaf\xe9 two\n")
        assert "latin.txt: not UTF-8 at byte 12" in self.corpus(refused, recipe, tmp_path / "latin.txt")

    def test_wrong_suffix(self, refused, recipe, tmp_path):
        (tmp_path / "book.pdf").write_bytes(b"%PDF")
        err = self.corpus(refused, recipe, tmp_path / "book.pdf")
        assert "book.pdf" in err
        assert ".txt" in err

    def test_field(self, refused, recipe, tmp_path):
        (tmp_path / "a.jsonl").write_text('{"txet": "x"}\n')
        err = self.corpus(refused, recipe, tmp_path / "a.jsonl")
        assert "line 1" in err
        assert "'text'" in err


class TestOut:
    def test_an_existing_run(self, refused, recipe, run_folder):
        err = refused("train", recipe, "--out", run_folder)
        assert "--resume" in err
        assert "--overwrite" in err

    @pytest.mark.parametrize("more", [(), ("--overwrite",)])
    @pytest.mark.parametrize("kind", ["folder", "file"])
    def test_no_run(self, refused, recipe, tmp_path, more, kind):
        place = tmp_path / "thesis"
        if kind == "folder":
            place.mkdir()
            (place / "chapter").write_text("years of work")
        else:
            place.write_text("years of work")
        assert "is no run folder" in refused("train", recipe, "--out", place, *more)

    def test_overwriting_only_when_all_is_well(self, refused, recipe, run_folder, tmp_path):
        (tmp_path / "short.txt").write_text("only a few")
        refused("train", recipe, f"data.source={tmp_path / 'short.txt'}", "--out", run_folder, "--overwrite")
        refused("train", recipe, "samples.prompts=['" + "x" * 200 + "']", "--out", run_folder, "--overwrite")

    def test_a_file_in_the_way(self, refused, recipe, tmp_path):
        (tmp_path / "file").write_text("x")
        assert "file" in refused("train", recipe, "--out", tmp_path / "file" / "run")


class TestResume:
    def test_no_run(self, refused, tmp_path):
        (tmp_path / "thesis").mkdir()
        assert "run.json is missing" in refused("train", "--resume", tmp_path / "thesis")
        assert "no such run folder" in refused("train", "--resume", tmp_path / "nowhere")

    def test_with_overwrite(self, refused, recipe, run_folder):
        assert "one of them" in refused("train", recipe, "--resume", run_folder, "--overwrite")

    def test_another_recipe(self, refused, trained, run_folder):
        err = refused("train", trained / "tiny.yaml", "--resume", run_folder, "optimizer.lr=0.5")
        assert "optimizer.lr is 0.01 there, 0.5 here" in err
        assert "optimizer.lr" in refused("train", "--resume", run_folder, "optimizer.lr=0.5")
        assert "model.hidden_size" in refused("train", "--resume", run_folder, "model.hidden_size=64")
        assert "model.vocab_size" in refused("train", "demo", "--resume", run_folder)

    def test_another_tokenizer(self, refused, run_folder):
        train_bpe(["some other text"], 262).save(run_folder)
        assert "tokenizer.json: not the tokenizer" in refused("train", "--resume", run_folder)

    def test_another_corpus(self, refused, recipe, cli, tmp_path):
        assert cli("train", recipe, "--out", tmp_path / "run")[0] == 0
        write_corpus(tmp_path / "corpus.txt", seed=9)
        assert "has changed since this run began" in refused("train", "--resume", tmp_path / "run")

    def test_auto_without_a_run(self, refused, recipe, run_folder):
        assert "no run in runs fits this recipe" in refused("train", recipe, "--resume")
        assert "fits this recipe" in refused("train", recipe, "--resume", "--out", run_folder, "training.seed=9")
        assert "which recipe?" in refused("train", "--resume")

    @pytest.mark.parametrize("file", ["recipe.yaml", "run.json", "tokenizer.json"])
    def test_damaged(self, refused, run_folder, file):
        (run_folder / file).write_text("{")
        assert file in refused("train", "--resume", run_folder)


class TestGenerate:
    def test_prompt_longer_than_the_context(self, refused, run_folder):
        assert "context of 128" in refused("generate", run_folder, "x" * 200)

    @pytest.mark.parametrize(
        ("option", "value"),
        [
            ("temperature", "-1"),
            ("temperature", "nan"),
            ("top-p", "0"),
            ("top-k", "-1"),
            ("min-p", "1"),
            ("tokens", "0"),
            ("seed", "-1"),
            ("stop", ""),
            ("repetition-penalty", "0"),
        ],
    )
    def test_settings(self, refused, run_folder, option, value):
        err = refused("generate", run_folder, "x", f"--{option}", value)
        assert {"tokens": "max_new_tokens"}.get(option, option.replace("-", "_")) in err

    def test_no_number(self, refused, run_folder):
        assert "--temperature" in refused("generate", run_folder, "x", "--temperature", "warm")

    def test_device(self, refused, run_folder):
        err = refused("generate", run_folder, "x", "--device", "toaster")
        assert "--device: 'toaster' cannot be used here" in err

    def test_no_checkpoint(self, refused, run_folder):
        shutil.rmtree(run_folder / "checkpoints")
        assert "no checkpoint yet" in refused("generate", run_folder, "x")

    def test_no_tokenizer(self, refused, run_folder):
        checkpoint = run_folder / "checkpoints" / "step-00000002"
        (checkpoint / "tokenizer.json").unlink()
        assert "no tokenizer.json" in refused("generate", checkpoint, "x")

    def test_damaged_weights(self, refused, run_folder):
        file = run_folder / "checkpoints" / "step-00000002" / "model.safetensors"
        file.write_bytes(file.read_bytes()[:1000])
        assert "model.safetensors: not a readable" in refused("generate", run_folder, "x")

    def test_an_empty_folder(self, refused, tmp_path):
        (tmp_path / "empty").mkdir()
        assert "config.json" in refused("generate", tmp_path / "empty", "x")


class TestInspect:
    def test_damaged_config(self, refused, tmp_path):
        (tmp_path / "config.json").write_text(json.dumps({**MODEL, "hidden_size": "32"}))
        assert "hidden_size" in refused("inspect", tmp_path / "config.json")
        (tmp_path / "config.json").write_text("{")
        assert "not valid json" in refused("inspect", tmp_path)
        assert "not valid json" in refused("inspect", "--compare", "demo", tmp_path)

    @pytest.mark.parametrize(
        ("arguments", "right"),
        [
            (("demo", "--context", "1025"), "--context: 1025 is not between 1 and demo's max_position_embeddings 1024"),
            (("demo", "--context", "0"), "--context: 0 is not between 1 and"),
            (("deepseek-v3", "demo", "--context", "4096"), "between 1 and demo's max_position_embeddings 1024"),
            (("demo", "--batch", "0"), "--batch: 0 is not between 1 and 1,000,000,000"),
            (("demo", "--batch", "-3", "--json"), "--batch: -3 is not between"),
            (("demo", "--batch", "9" * 400), "--batch: 999"),
            (("demo", "--batch", "many"), "'--batch'"),
            (("demo", "small", "--precision"), "--precision: for one model alone"),
            (("demo", "--compare", "--precision"), "--precision: for one model alone"),
            (("demo", "small", "--plan", "fp8"), "--plan: for one model alone"),
            (("demo", "small", "demo"), "demo: named twice"),
        ],
    )
    def test_options(self, refused, arguments, right):
        assert right in refused("inspect", *arguments)
