"""The same training in FP32, BF16 and FP8."""

from __future__ import annotations

from abyssal.lab.charts import curves, points
from abyssal.lab.experiment import Figures, Finding, Job, Lab, Results, Table
from abyssal.lab.measure import run_figures, smoothed
from abyssal.lab.statistics import against, mean, spread, verdict


class Precision(Lab):
    def run(self, job: Job) -> Figures:
        found = run_figures(job.train(job.recipe()))
        del found["cv_curve"]
        return found

    def conclude(self, results: Results) -> Finding:
        arms = list(results.figures)
        loss = {arm: results.of(arm, "loss") for arm in arms}
        answer = [
            against("Validation loss", ("BF16", loss["BF16"]), ("FP8", loss["FP8"]), digits=4),
            against("Validation loss", ("FP32", loss["FP32"]), ("BF16", loss["BF16"]), digits=4),
        ]
        gaps = {
            arm: [
                [abs(x - y) for x, y in zip(one, other, strict=True)]
                for one, other in zip(results.of(arm, "loss_curve"), results.of("FP32", "loss_curve"), strict=True)
            ]
            for arm in arms
            if arm != "FP32"
        }
        relative = {arm: _apart(results.of(arm, "loss_curve"), results.of("FP32", "loss_curve")) for arm in gaps}
        between = _apart(results.of("FP8", "loss_curve"), results.of("BF16", "loss_curve"))
        answer.append(
            "A step's training loss is off FP32's by "
            + " and by ".join(f"{spread([100 * x for x in values], 2)}% in {arm}" for arm, values in relative.items())
            + f"; FP8 is off BF16 by {spread([100 * x for x in between], 2)}% (the V3 paper, §3.3: below 0.25%, in "
            "long runs of large models)."
        )
        word = verdict(
            loss["BF16"], loss["FP8"], "ends higher", "ends lower", "ends no different, as far as these seeds show"
        )
        short = f"Trained in FP8 instead of BF16 the validation loss {word}."
        table = Table(
            "Loss by precision",
            ["products in", "validation, nats a token", "bits a byte", "off FP32's training loss"],
            [
                [
                    arm,
                    results.spread(arm, "loss", digits=4),
                    results.spread(arm, "bits_per_byte", digits=4),
                    f"{spread([100 * x for x in relative[arm]], 2)}%" if arm in relative else "–",
                ]
                for arm in arms
            ],
        )
        shown = {arm: [smoothed(curve)[1] for curve in gaps[arm]] for arm in gaps}
        ends = smoothed(gaps["BF16"][0])[0]
        charts = [
            points("Loss at the end", "validation loss, nats a token", loss),
            curves(
                "Distance of a step's training loss from FP32's",
                ends,
                shown,
                across="step",
                up="nats a token",
                log_y=True,
            ),
        ]
        limits = [
            "Without FP8 hardware the rounding is that of E4M3 with V3's blocks and tiles, worked out in BF16: what is "
            "measured is what the numbers lose, not speed. Widths here are about that of one block."
        ]
        return Finding(short, answer, [table], charts, limits)


def _apart(curves: list[list[float]], others: list[list[float]]) -> list[float]:
    """By seed, the mean over steps of the distance of two losses, as a share of the second."""
    pairs = zip(curves, others, strict=True)
    return [mean([abs(x - y) / y for x, y in zip(one, other, strict=True)]) for one, other in pairs]


LAB = Precision()
