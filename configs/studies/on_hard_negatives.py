"""Does IFM add anything to hard negatives? Fixed before it was run.

    ifm-jax study --config=studies/on_hard_negatives --workdir=runs/on_hard_negatives

The confirmation found that hard negatives (beta 1) do three to four times as much as IFM. Here both are used together,
in the confirmation's setting and with its seeds, so that its runs of beta 1 are one half of each pair: copy their rows,
or its whole results.json, into the workdir, and they are not run again.

The confirmatory questions are IFM with hard negatives less hard negatives alone, in the mean over the labels and in the
worst label, on both sources: four tests, corrected by Holm's method. There is no placebo.

Hardware: half an hour of two CPU cores with the confirmation's rows, an hour without.
"""

from ifm_jax.studies import Comparison, Study, study

ALONE, BOTH = "beta 1", "beta 1, IFM 0.1"


def get_study() -> Study:
    """Returns the study."""
    confirmation = study.load("studies/confirmation")
    alone = dict(confirmation.arms[ALONE])
    return Study(
        question="Does IFM add anything to hard negatives?",
        sources=confirmation.sources,
        arms={ALONE: alone, BOTH: alone | {"ifm.objective": "ifm", "ifm.epsilon": 0.1}},
        seeds=confirmation.seeds,
        comparisons=[
            Comparison(BOTH, ALONE, confirmatory=True),
            *(
                Comparison(BOTH, ALONE, labels=(label, "texture", "color"), sources=(source,))
                for source, label in (("trifeature", "shape"), ("digits", "digit"))
            ),
        ],
    )
