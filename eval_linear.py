"""Evaluates a frozen backbone on labeled images.

    python eval_linear.py --workdir=DIR                     a run: the original's linear-evaluation protocol
    python eval_linear.py --pretrained=FILE.pth.tar ...     a PyTorch checkpoint, or one of Orbax's (a folder)
    ... --pretrained=FILE --prefix=backbone.                another library's, its network under that prefix
    ... --config.linear.lr=1,3,10,30                        several classifiers at once, the best chosen honestly
    ... --fast                                              minutes instead of hours: the features of a few views, kept
    ... --knn                                               k nearest neighbors (Wu et al. 2018), nothing is trained
    ... --diagnostics                                       alignment, uniformity, effective rank, similarities
    ... --features=FILE.npz [--split=train] [--layer=projection]     the features, with labels and names
    ... --map=FILE.png                                      the features in two dimensions (t-SNE), colored by label

A run's own config is taken, with --config.field=value on top; a file's network is read off its tensors, and
--config=FILE.py or --config.data.source=... says on which images. Results go into results.json of the workdir, or of
--output; the same command goes on with an evaluation that was stopped.
"""

if __name__ == "__main__":
    from ifm_jax import process

    process.begin(hosts=True)  # first: what is imported below takes seconds

    from ifm_jax.cli import evaluate

    evaluate.run(__doc__)
