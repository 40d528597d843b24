"""A dense model converted in several ways, and each healed by training on text: perplexity against tokens seen.

    python benchmarks/upcycling.py convert SRC FOLDER --calibration TEXT --evaluate TEXT [--only mla256 …]
    python benchmarks/upcycling.py heal FOLDER --text TEXT --evaluate TEXT TEXT … [--tokens 300000] [--only mla256 …]
    python benchmarks/upcycling.py collect FOLDER FILE
    python benchmarks/upcycling.py show FILE [--svg FOLDER]

``convert`` is an ``abyssal upcycle`` for each way (and for ``dense`` a copy, to be trained on as the others are),
``heal`` an ``abyssal tune`` (method full) on the first records of ``--text``. Perplexity is that of 100,000 characters
of a text in windows of 1,024 tokens side by side: before, after each stage (what upcycle.json has) and after every
checkpoint of the healing, here of every text given with ``--evaluate``. Then the healed model is exported and continues
three prompts greedily here and in transformers, in FP32. ``collect`` keeps the figures in a JSON file (those of
docs/upcycling.md are in docs/figures/upcycling.json), ``show`` makes tables and charts of them (drawn by Plotly, in a
browser that Playwright starts).
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from charts import drawn
from machine import markdown

import abyssal
from abyssal.data.corpus import documents
from abyssal.evaluation import perplexity
from abyssal.training.hardware import autocast, has_bfloat16
from abyssal.upcycling import read_dense

WAYS: dict[str, list[str]] = {
    "dense": [],
    "mla256": ["--cache", "256"],
    "mla192": ["--cache", "192"],
    "mla128": ["--cache", "128"],
    "mla96": ["--cache", "96"],
    "mla256moe": ["--cache", "256", "--experts", "18", "--active", "6", "--shared", "6"],
}
NAMES = {way: f"MLA, {way[3:]} values" for way in WAYS} | {
    "dense": "dense, trained on",
    "mla256moe": "MLA, 256 values, and MoE",
}
PROMPTS = ("The deep sea begins where", "Once upon a time there was a king who", "Question: What is a whale?\nAnswer:")
CONTEXT, CHARACTERS, BATCH = 1024, 100_000, 2


def convert(options: argparse.Namespace) -> None:
    options.folder.mkdir(parents=True, exist_ok=True)
    for way in options.only:
        if way == "dense":
            dense = read_dense(options.source)
            abyssal.export(dense.model, options.folder / way, tokenizer=dense.tokenizer)
            continue
        program = [sys.executable, "-m", "abyssal", "upcycle", options.source, str(options.folder / way), *WAYS[way]]
        subprocess.run([*program, "--calibration", options.calibration, "--evaluate", options.evaluate], check=True)


def measured(folder: Path, texts: list[str]) -> list[float]:
    """The perplexity of what is in ``folder`` on each of ``texts``, as upcycle measures it."""
    model, tokenizer = abyssal.load(folder)
    model.float()
    device = torch.device("cpu")
    with autocast(device, torch.bfloat16 if has_bfloat16(device) else torch.float32):
        found = [perplexity(model, tokenizer, [t], context=CONTEXT, stride=CONTEXT, batch_size=4) for t in texts]
    return [one.perplexity for one in found]


def same_text(folder: Path) -> int:
    """How many of the prompts transformers continues as abyssal does, 48 tokens each."""
    import transformers

    model, tokenizer = abyssal.load(folder, dtype=torch.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    same = 0
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer.encode(prompt)])
        there = theirs.generate(ids, max_new_tokens=48, do_sample=False, eos_token_id=-1)[0, ids.shape[1] :].tolist()
        here = abyssal.generate(model, tokenizer, prompt, max_new_tokens=48, temperature=0.0)  # it ends at an EOS
        agrees = bool(here) and tokenizer.decode(there).startswith(here)
        print(json.dumps({"prompt": prompt, "text": here, "same": agrees}))
        same += agrees
    return same


def beginning(file: str) -> str:
    """The first characters of ``file``, of as many documents as that takes."""
    parts, size = [], 0
    for text in documents(file):
        parts.append(text[: CHARACTERS - size])
        size += len(parts[-1])
        if size >= CHARACTERS:
            break
    return "\n\n".join(parts)


def heal(options: argparse.Namespace) -> None:
    texts = [beginning(file) for file in options.evaluate]
    steps = options.tokens // (BATCH * CONTEXT)
    every = max(steps // options.points, 1)
    for way in options.only:
        run, out = options.folder / f"{way}-healed", options.folder / f"{way}-exported"
        settings = {
            "method": "full",
            "optimizer.lr": options.lr,
            "data.limit": options.records,
            "data.validation": options.evaluate[0],
            "training.steps": steps,
            "training.batch_size": BATCH,
            "training.sequence_length": CONTEXT,
            "validation.every": steps,
            "validation.batches": 1,
            "checkpoint.every": every,
            "checkpoint.keep": options.points + 1,
        }
        started = time.perf_counter()
        program = [sys.executable, "-m", "abyssal", "tune"]
        what = [str(options.folder / way), options.text, *(f"{k}={v}" for k, v in settings.items()), "--out", str(run)]
        if (run / "checkpoints").exists():  # it was interrupted
            what = ["--resume", str(run)]
        subprocess.run([*program, *what], check=True)
        seconds = time.perf_counter() - started
        curve = [[0, *measured(options.folder / way, texts)]]
        for checkpoint in sorted((run / "checkpoints").iterdir()):
            step = int(checkpoint.name.removeprefix("step-"))
            if step % every == 0:
                curve.append([step * BATCH * CONTEXT, *measured(checkpoint, texts)])
                print(way, *curve[-1], flush=True)
        subprocess.run([sys.executable, "-m", "abyssal", "export", str(run), str(out), "--dtype", "fp32"], check=True)
        found = {"texts": options.evaluate, "curve": curve, "seconds": seconds, "lr": options.lr}
        if way != "dense":
            found["same_text"] = same_text(out)
        (options.folder / f"{way}.json").write_text(json.dumps(found, indent=2))
        shutil.rmtree(run / "checkpoints")


def collect(options: argparse.Namespace) -> None:
    """Adds what is in FOLDER to FILE: a way's conversion, and its healing once that is done."""
    found = json.loads(options.file.read_text()) if options.file.exists() else {}
    for way in options.only:
        own = found.setdefault(way, {})
        if (file := options.folder / way / "upcycle.json").exists():
            report = json.loads(file.read_text())
            kept = ("perplexity", "parameters_before", "parameters_after", "active_after", "cached_after", "seconds")
            own["conversion"] = {key: report[key] for key in kept}
            for part in ("attention", "feed_forward"):
                stages = report["layers"][0][part]
                own["conversion"][part] = {s: [round(one[part][s], 4) for one in report["layers"]] for s in stages}
            own["conversion"]["split_error"] = max(one["split_error"] or 0 for one in report["layers"])
        if (file := options.folder / f"{way}.json").exists():
            after = json.loads(file.read_text())
            own["healing"] = after | {"texts": [Path(text).name for text in after["texts"]]}
    options.file.write_text(json.dumps({way: own for way, own in found.items() if own}, indent=1) + "\n")


def show(options: argparse.Namespace) -> None:
    found = json.loads(options.file.read_text())
    stages, layers, healed = [], [], []
    several = ("dense", "factorised", "norm in", "fitted", "experts routed", "experts fitted")
    for way in (way for way in WAYS if way in found):
        if (conversion := found[way].get("conversion")) is not None:
            figures = conversion["perplexity"]
            size = f"{conversion['parameters_after'] / 1e6:.1f}M"
            stages.append([NAMES[way], size, *(f"{figures[s]:.2f}" if s in figures else "–" for s in several)])
            for part, what in (("attention", "attention"), ("feed_forward", "FFN")):
                for stage, of in conversion[part].items():
                    by_layer = " ".join(f"{x:.3f}".removeprefix("0") for x in of)
                    layers.append([f"{NAMES[way]}: {what}, {stage}", f"{min(of):.4f}", f"{sum(of) / 30:.4f}", by_layer])
        if (healing := found[way].get("healing")) is not None:
            for which, text in enumerate(healing["texts"], 1):
                curve = [f"{point[0] / 1000:.0f}k: {point[which]:.2f}" for point in healing["curve"]]
                healed.append(
                    [NAMES[way], f"{healing['lr']:.0e}", text, " → ".join(curve), healing.get("same_text", "–")]
                )
    print(markdown(stages, "perplexity", "parameters", *several))
    print("\n" + markdown(layers, "cosine with the dense layer's output", "least", "mean", "layer by layer"))
    if healed:
        print("\n" + markdown(healed, "", "rate", "text", "perplexity after so many tokens", "same text of 3"))
    if options.svg:
        options.svg.mkdir(parents=True, exist_ok=True)
        curves = {way: own["healing"]["curve"] for way, own in found.items() if "healing" in own}
        if curves:
            lines = {NAMES[way]: ([p[0] / 1000 for p in c], [p[1] for p in c]) for way, c in curves.items()}
            drawing = drawn(lines, "thousand tokens of healing", "perplexity, WikiText-2", log=True)
            (options.svg / "upcycling-healing.svg").write_text(drawing, encoding="utf-8")
        cosines = {way: own["conversion"]["attention"]["fitted"] for way, own in found.items() if "conversion" in own}
        lines = {NAMES[way]: (list(range(len(of))), of) for way, of in cosines.items()}
        drawing = drawn(lines, "layer", "cosine with the dense attention's output")
        (options.svg / "upcycling-layers.svg").write_text(drawing, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("convert")
    one.add_argument("source")
    one.add_argument("folder", type=Path)
    one.add_argument("--calibration", required=True)
    one.add_argument("--evaluate", required=True)
    one.set_defaults(call=convert)
    two = commands.add_parser("heal")
    two.add_argument("folder", type=Path)
    two.add_argument("--text", required=True)
    two.add_argument("--evaluate", required=True, nargs="+")
    two.add_argument("--tokens", type=int, default=300_000)
    two.add_argument("--records", type=int, default=60, help="records (books) of the text to take")
    two.add_argument("--lr", type=float, default=5e-5)
    two.add_argument("--points", type=int, default=5, help="checkpoints to measure")
    two.set_defaults(call=heal)
    three = commands.add_parser("collect")
    three.add_argument("folder", type=Path)
    three.add_argument("file", type=Path)
    three.set_defaults(call=collect)
    four = commands.add_parser("show")
    four.add_argument("file", type=Path)
    four.add_argument("--svg", type=Path, help="a folder for the charts")
    four.set_defaults(call=show)
    for command in (one, two, three):
        command.add_argument("--only", nargs="+", default=list(WAYS), choices=list(WAYS))
    options = parser.parse_args()
    options.call(options)


if __name__ == "__main__":
    main()
