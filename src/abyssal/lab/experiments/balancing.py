"""Balancers on the same model and text: how even the load gets, how long that takes, and what it costs in loss."""

from __future__ import annotations

from abyssal.lab.charts import curves, points
from abyssal.lab.experiment import Figures, Finding, Job, Lab, Results, Table
from abyssal.lab.measure import run_figures, smoothed
from abyssal.lab.statistics import against, difference

NONE = "none"
EVEN = 0.1


class Balancing(Lab):
    def run(self, job: Job) -> Figures:
        return run_figures(job.train(job.recipe()))

    def conclude(self, results: Results) -> Finding:
        arms = list(results.figures)
        cv = {arm: results.of(arm, "cv_per_step") for arm in arms}
        loss = {arm: results.of(arm, "loss") for arm in arms}
        means = {arm: results.mean(arm, "cv_per_step") for arm in arms}
        evenest = min(arms, key=lambda arm: means[arm])
        others = [arm for arm in arms if arm != NONE]
        answer = [
            f"Evenest load: {evenest} (CV of a step's load {means[evenest]:.3f}, against {means[NONE]:.3f} without "
            "balancing).",
        ]
        even = [arm for arm in others if results.mean(arm, "cv") < EVEN]
        answer.append(
            f"A CV below {EVEN} of the load summed over the last 50 steps: {'; '.join(even) or 'none of them'}."
        )
        worse = [arm for arm in others if (d := difference(loss[NONE], loss[arm])).clear and d.mean > 0]
        better = [arm for arm in others if (d := difference(loss[NONE], loss[arm])).clear and d.mean < 0]
        answer.append(
            "Loss beside no balancing: "
            + "; ".join(
                (
                    f"higher with {' and '.join(worse)}" if worse else "higher with none of them",
                    f"lower with {' and '.join(better)}" if better else "lower with none of them",
                    "no difference that these seeds show for the others" if len(worse + better) < len(others) else "",
                )
            ).rstrip("; ")
            + "."
        )
        biases = [arm for arm in others if arm.startswith("bias")]
        losses = [arm for arm in others if "-wise loss" in arm]
        if biases and losses:
            best = min(biases, key=lambda arm: means[arm])
            strongest = min(losses, key=lambda arm: means[arm])
            answer.append(against("Loss", (strongest, loss[strongest]), (best, loss[best]), digits=4))
            answer.append(against("CV of a step's load", (strongest, cv[strongest]), (best, cv[best]), digits=4))
        costly = f"with {' and '.join(worse)}" if worse else f"with none of the {len(others)}"
        short = (
            f"{len(even)} of {len(others)} balancers keep the load even (CV below {EVEN}); {costly} does the loss end "
            f"higher than without balancing, as far as these seeds show."
        )
        table = Table(
            "Balance and loss",
            ["balancer", "CV a step", "CV, 50 steps", "MaxVio, 50 steps", "dead", "validation, nats a token"],
            [
                [
                    arm,
                    results.spread(arm, "cv_per_step"),
                    results.spread(arm, "cv"),
                    results.spread(arm, "max_vio"),
                    results.spread(arm, "dead", digits=1),
                    results.spread(arm, "loss", digits=4),
                ]
                for arm in arms
            ],
        )
        shown = {arm: [smoothed(curve)[1] for curve in results.of(arm, "cv_curve")] for arm in arms}
        ends = smoothed(results.of(arms[0], "cv_curve")[0])[0]
        charts = [
            curves(
                "CV of a step's load while training", ends, shown, across="step", up="CV, mean of layers", log_y=True
            ),
            points("Load at the end", "CV of a step's load, mean of the last 50 steps and of layers", cv, log=True),
            points("Loss at the end", "validation loss, nats a token", loss),
        ]
        limits = [
            "The sequence-wise loss is the stricter of the two kinds: every sequence has to be even. γ falls along a "
            "cosine to 0 at the run's end (the V3 paper: constant, then 0), and hundreds of steps ask for a larger one "
            "than a million do. What balance is worth when experts lie on many GPUs, which is why it is wanted, is not "
            "measured here."
        ]
        return Finding(short, answer, [table], charts, limits)


LAB = Balancing()
