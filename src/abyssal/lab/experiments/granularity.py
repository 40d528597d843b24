"""The same routed channels, cut into few or many experts."""

from __future__ import annotations

from itertools import pairwise

from abyssal.analysis.parameters import count_parameters
from abyssal.lab.charts import points
from abyssal.lab.experiment import Figures, Finding, Job, Lab, Results, Table
from abyssal.lab.measure import run_figures
from abyssal.lab.statistics import against, difference, verdict


class Granularity(Lab):
    def run(self, job: Job) -> Figures:
        recipe = job.recipe()
        config = recipe.model_config_resolved()
        counts = count_parameters(config)
        found = run_figures(job.train(recipe))
        del found["cv_curve"]
        return found | {"parameters": counts.total, "active": counts.active}

    def conclude(self, results: Results) -> Finding:
        arms = list(results.figures)
        loss = {arm: results.of(arm, "loss") for arm in arms}
        coarse, fine = arms[0], arms[-1]
        best = min(arms, key=lambda arm: results.mean(arm, "loss"))
        answer = [against("Validation loss", (coarse, loss[coarse]), (fine, loss[fine]), digits=4)]
        if best not in (coarse, fine):
            answer.append(f"The lowest mean is that of {best}.")
            answer.append(against("Validation loss", (fine, loss[fine]), (best, loss[best]), digits=4))
        steps = [difference(loss[a], loss[b]) for a, b in pairwise(arms)]
        rising = [f"{a} → {b}" for (a, b), d in zip(pairwise(arms), steps, strict=True) if d.low > 0]
        falling = [f"{a} → {b}" for (a, b), d in zip(pairwise(arms), steps, strict=True) if d.high < 0]
        answer.append(
            f"Each time the experts are halved and twice as many of them chosen, the loss falls clearly for: "
            f"{'; '.join(falling) or 'no such step'}; it rises clearly for: {'; '.join(rising) or 'none'}."
        )
        word = verdict(loss[coarse], loss[fine], "worse than", "better than", "no different from")
        short = f"At this size the finest cut ({fine}) is {word} the coarsest ({coarse}) as far as these seeds show."
        table = Table(
            "Loss by how finely the same parameters are cut",
            ["routed experts", "parameters", "active", "validation, nats a token", "CV a step", "s of training"],
            [
                [
                    arm,
                    f"{results.of(arm, 'parameters')[0]:,}",
                    f"{results.of(arm, 'active')[0]:,}",
                    results.spread(arm, "loss", digits=4),
                    results.spread(arm, "cv_per_step"),
                    results.spread(arm, "seconds", digits=0),
                ]
                for arm in arms
            ],
        )
        charts = [points("Loss by granularity", "validation loss, nats a token", loss)]
        limits = [
            "Parameters are equal but for the routers' (hidden size times experts, counted above). One learning rate "
            "and one γ for all; an expert sees fewer tokens the more there are, and is as much smaller.",
            "Seconds are of whatever else the machine did, and say little.",
        ]
        return Finding(short, answer, [table], charts, limits)


LAB = Granularity()
